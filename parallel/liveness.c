/* liveness - joining and leaving the watch, and the marks that the program sets; see liveness_watch.c for the thread.
 * The segment outlives the watch: the communicator counts its calls in it until the process is gone. */
#include "parallel/liveness.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "parallel/liveness_private.h"
#include "parallel/segment.h"

void liveness__signals(sigset_t *set)
{
    static const int wanted[] = {SIGTERM, SIGINT, SIGHUP};
    sigemptyset(set);
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        struct sigaction action;
        /* nohup and shells' background jobs ignore some; a blocked signal would be taken in spite of that. */
        if (!sigaction(wanted[i], NULL, &action) && action.sa_handler != SIG_IGN) sigaddset(set, wanted[i]);
    }
}

void liveness_block_signals(void)
{
    sigset_t set;
    liveness__signals(&set);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
}

static void set_phase(struct slot *slot, const char *phase)
{
    uint64_t words[LIVENESS__PHASE_WORDS] = {0};
    strncpy((char *)words, phase, sizeof words - 1);
    for (int i = 0; i < LIVENESS__PHASE_WORDS; i++)
        atomic_store_explicit(&slot->phase[i], words[i], memory_order_relaxed);
}

static ino_t pid_namespace(void)
{
    struct stat s;
    return stat("/proc/self/ns/pid", &s) ? 0 : s.st_ino;
}

/* join - fills the own slot and starts the thread. */
static int join(struct liveness *l)
{
    struct slot *own = &l->segment->slot[l->me];
    own->rank = l->rank;
    own->pid = getpid();
    liveness__process(own->pid, 0, &own->start_time);
    own->pid_namespace = pid_namespace();
    set_phase(own, "start");
    atomic_store_explicit(&own->state, SLOT_RUNNING, memory_order_release);
    liveness_block_signals(); /* a no-op if main did it, as it should */
    int error = pthread_create(&l->thread, NULL, liveness__watch, l);
    if (!error) return OK;
    atomic_store_explicit(&own->state, SLOT_LEFT, memory_order_release);
    FAIL(ERR_IO, "cannot start the heartbeat thread: %s", strerror(error));
}

int liveness_open(struct comm *c, const struct liveness_options *options, struct liveness **out)
{
    *out = NULL;
    size_t slots = (size_t)c->local_size;
    void *segment = NULL;
    struct liveness *l = calloc(1, sizeof *l);
    struct sight *sight = calloc(slots, sizeof *sight);
    int rc = l && sight ? OK : status_set(ERR_NOMEM, __FILE__, __LINE__, "no memory for %zu heartbeats", slots);
    TRY_GOTO(comm_agree(c, rc, "start"), rc, failed);
    TRY_GOTO(segment_open(c, sizeof(struct segment) + slots * sizeof(struct slot), "heartbeats", &segment), rc, failed);
    /* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): without l the agreement failed */
    *l = (struct liveness){.comm = c,
                           .segment = segment,
                           .options = *options,
                           .rank = c->rank,
                           .size = c->size,
                           .n_slots = c->local_size,
                           .me = c->local_rank,
                           .sight = sight};
    if (l->options.stop_grace <= 0) l->options.stop_grace = 8; /* all are gone within 10 s */
    comm_watch(c, &l->segment->slot[l->me].calls, &l->segment->stop_signal);
    rc = join(l);
    bool joined = !rc;
    rc = comm_agree(c, rc, "start");
    if (rc && joined) {
        liveness_leave(l);
        return rc;
    }
    if (rc) goto failed;
    *out = l;
    return OK;
failed:
    free(sight);
    free(l);
    return rc;
}

void liveness_phase(struct liveness *l, const char *phase)
{
    set_phase(&l->segment->slot[l->me], phase);
    comm_phase(l->comm, phase);
}

void liveness_step_begin(struct liveness *l, uint64_t step)
{
    struct slot *own = &l->segment->slot[l->me];
    atomic_store_explicit(&own->step, step, memory_order_relaxed);
    atomic_store_explicit(&own->stepped, true, memory_order_relaxed);
    atomic_store_explicit(&own->busy, true, memory_order_release);
}

void liveness_step_end(struct liveness *l)
{
    atomic_store_explicit(&l->segment->slot[l->me].busy, false, memory_order_release);
}

int liveness_stop_requested(const struct liveness *l)
{
    return atomic_load_explicit(&l->segment->stop_signal, memory_order_relaxed);
}

_Noreturn void liveness_fail(struct liveness *l, int code, const char *text)
{
    char line[LIVENESS__LINE_BYTES];
    if (l->size > 1)
        snprintf(line, sizeof line, "vitrail: stopped by rank %d: %s", l->rank, text);
    else
        snprintf(line, sizeof line, "vitrail: %s", text);
    liveness__end(l, (struct ending){.exit_code = status_exit_code(code), .line = line, .kill_slot = -1});
}

/* let_first_rank_end - mpirun, once told to stop, kills the rest as soon as one rank has exited: rank 0, which owns the
 * output, goes first. */
static void let_first_rank_end(struct liveness *l)
{
    enum { LONGEST_MS = 1000, POLL_MS = 5 };
    const struct slot *first = &l->segment->slot[0];
    struct timespec t = {.tv_nsec = POLL_MS * 1000000};
    if (first->pid_namespace != l->segment->slot[l->me].pid_namespace) return;
    for (int ms = 0; ms < LONGEST_MS && liveness__process(first->pid, first->start_time, NULL); ms += POLL_MS)
        nanosleep(&t, NULL);
}

void liveness_leave(struct liveness *l)
{
    if (!l) return;
    atomic_store_explicit(&l->segment->slot[l->me].state, SLOT_LEFT, memory_order_release);
    atomic_store_explicit(&l->leaving, true, memory_order_release);
    /* Only to wake it: the signal is blocked there, and it looks at `leaving` first. */
    pthread_kill(l->thread, SIGTERM); // NOLINT(bugprone-bad-signal-to-kill-thread)
    pthread_join(l->thread, NULL);
    if (l->me > 0 && liveness_stop_requested(l)) let_first_rank_end(l);
    free(l->sight);
    free(l);
}
