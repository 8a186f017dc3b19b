/* liveness_private - the shared segment, and the two halves of the module: liveness.c is called by the program,
 * liveness_watch.c is the thread. They share nothing but these structs, all of it atomic or written before the start.
 */
#ifndef VITRAIL_PARALLEL_LIVENESS_PRIVATE_H
#define VITRAIL_PARALLEL_LIVENESS_PRIVATE_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/types.h>

#include "parallel/liveness.h"

enum { LIVENESS__TICK_MS = 250, LIVENESS__STILL_TICKS = 16, LIVENESS__PHASE_WORDS = 4, LIVENESS__LINE_BYTES = 1200 };

enum slot_state { SLOT_ABSENT, SLOT_RUNNING, SLOT_LEFT };

/* One rank of this host; written by that rank alone. */
struct slot {
    _Alignas(128) _Atomic int state; /* enum slot_state; stored after rank, pid and start_time */
    int rank;                        /* in the whole job */
    pid_t pid;
    unsigned long long start_time;                 /* of the process, as /proc counts it: tells a reused pid */
    ino_t pid_namespace;                           /* pids of another one mean nothing here: heartbeat alone */
    _Atomic uint64_t heartbeat;                    /* bumped every tick */
    _Atomic uint64_t step;                         /* the current or last one */
    _Atomic uint64_t calls;                        /* collectives entered (comm_watch) */
    _Atomic bool busy;                             /* inside a step */
    _Atomic bool stepped;                          /* `step` was ever set */
    _Atomic uint64_t phase[LIVENESS__PHASE_WORDS]; /* text, zero-padded; a torn read shows a mixed name, no more */
};

enum report { REPORT_NONE, REPORT_CLAIMED, REPORT_DONE };

struct segment {
    _Atomic int report;      /* enum report: one rank claims it, writes exit_code, prints the line, sets DONE */
    _Atomic int exit_code;   /* what every process ends with; valid from REPORT_CLAIMED + a moment on, else 5 */
    _Atomic int stop_signal; /* first SIGTERM, SIGINT or SIGHUP that any rank took; 0: none */
    struct slot slot[];      /* one a local rank */
};

/* What the watcher remembers of a slot from tick to tick. */
struct sight {
    uint64_t heartbeat, step, calls;
    int still_ticks, stuck_ticks;
};

struct liveness {
    struct comm *comm;
    struct segment *segment;
    struct liveness_options options;
    int rank, size, n_slots, me;                       /* me: index of the own slot */
    struct sight *sight;                               /* [n_slots], the thread's */
    int signals, ticks_since_signal, ticks_since_stop; /* the thread's */
    pthread_t thread;
    _Atomic bool leaving;
};

/* liveness__watch - body of the watching thread; argument: struct liveness. */
void *liveness__watch(void *argument);

/* How a job ends. The first process of the host to come forward prints and decides; the others follow it. */
struct ending {
    int exit_code;
    const char *line; /* NULL: nothing to print */
    int turn;         /* how many others should come forward first; each gets a short while */
    int kill_slot;    /* the printing rank also kills this slot's process, which cannot end by itself; -1: none */
};

/* liveness__end - ends this process, and by the mark it leaves in the segment all others of the host. */
_Noreturn void liveness__end(struct liveness *l, struct ending ending);

/* liveness__process - state of a process: false if it is gone, a zombie, or another one with the same pid
 * (start_time differs; 0 accepts any). Writes the start time to *found if not NULL. */
bool liveness__process(pid_t pid, unsigned long long start_time, unsigned long long *found);

/* liveness__signals - the signals that the thread takes: those of the three that were not ignored at start. */
void liveness__signals(sigset_t *set);

#endif
