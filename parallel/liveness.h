/* liveness - no rank is ever left waiting: ranks of one host watch each other, and stop together.
 *
 * Each rank has a slot in shared memory {pid, phase, step, heartbeat}; a thread of its own bumps the heartbeat 4
 * times a second, looks at the peers and takes the signals. A peer is dead when its process is gone, or when its
 * heartbeat stood still for 16 of the WATCHER's ticks (a watcher that was itself stopped accuses nobody). A living
 * rank that is inside a step and neither advances its step nor enters a collective for watchdog_timeout is ended too.
 * Then one rank, the lowest living, prints one line, and all processes end: within 10 s, whatever they were doing.
 *
 * Several hosts: the shared memory covers the ranks of one host; a rank that ends with an error makes the launcher
 * (mpirun, srun --kill-on-bad-exit) end the other hosts, and remote crashes reach us the same way, as SIGTERM.
 *
 * Exit codes of a rank: status_exit_code(code) of the error that was reported (liveness_fail, or orderly after
 * comm_agree); 5 when a rank died, stopped or hung; 130 (SIGINT), 143 (SIGTERM), 129 (SIGHUP) for a job ended by a
 * signal, also when it ended in good order: the job is then unfinished but resumable. What mpirun makes of them: the
 * first rank's code that is not 0; 137 if it saw a rank killed first; 1 if it was itself told to stop. Told to stop
 * (also by Ctrl-C), Open MPI 4.1 waits 1 s, sends SIGTERM, waits 1 s, sends SIGKILL: work in hand has one second to end
 * in good order. */
#ifndef VITRAIL_PARALLEL_LIVENESS_H
#define VITRAIL_PARALLEL_LIVENESS_H

#include <stdint.h>

#include "base/status.h"
#include "parallel/comm.h"

struct liveness;

struct liveness_options {
    double watchdog_timeout;         /* seconds inside a step without progress; 0: off */
    double stop_grace;               /* seconds from the first signal to a forced end; 0: 8 */
    void (*cleanup)(void *argument); /* called once before a forced exit, from the watching thread; may be NULL */
    void *cleanup_argument;
};

/* liveness_block_signals - blocks SIGTERM, SIGINT and SIGHUP (those not ignored already) in this thread and all
 * that it starts, for the watching thread to take. Call first thing in main, before any thread or comm_open. */
void liveness_block_signals(void);

/* liveness_open - joins the watch; collective, right after comm_open. Keeps c for liveness_phase.
 * Errors: ERR_IO (shared memory), agreed on by all ranks. */
int liveness_open(struct comm *c, const struct liveness_options *options, struct liveness **out) MUST_CHECK;

/* liveness_phase - "load", "decode", ...: up to 31 bytes, copied; also tells the communicator (comm_phase). */
void liveness_phase(struct liveness *l, const char *phase);

/* liveness_step_begin - inside step `step` from now on: the watchdog runs. liveness_step_end - between steps:
 * idle as long as it likes. A long load may call step_begin once per tensor: a new number is progress. */
void liveness_step_begin(struct liveness *l, uint64_t step);
void liveness_step_end(struct liveness *l);

/* liveness_stop_requested - 0, or the number of the signal by which a rank of this host was asked to stop. The
 * scheduler on rank 0 reads it between steps, ends in good order and exits with 128 + signal. A second
 * signal, or stop_grace passing, ends all ranks at once with that code. */
int liveness_stop_requested(const struct liveness *l);

/* liveness_fail - a fatal error of this rank after a broadcast: prints "vitrail: stopped by rank R: text" once for the
 * whole job, makes all ranks of this host end with status_exit_code(code) within half a second, and exits. */
_Noreturn void liveness_fail(struct liveness *l, int code, const char *text);

/* liveness_leave - the orderly end: this process may vanish now. After comm_close, so that MPI_Finalize is watched
 * as well; also before an orderly exit with an error that all ranks agreed on. NULL is fine. Stops the thread. After a
 * stop was requested, ranks other than 0 wait here (up to 1 s) for rank 0 to be gone: see to it that whatever
 * THEY still have to do is done before comm_close. */
void liveness_leave(struct liveness *l);

#endif
