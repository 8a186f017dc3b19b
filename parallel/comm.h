/* comm - the communicator: what ranks say to each other, and the only way they say it.
 *
 * Data plane: all-reduce and all-gather of tensors, enqueued on the op stream (host memory and immediate on CPU).
 * Control plane: small host buffers - broadcast, gather, agreement, same-hash, barrier.
 * Sums are taken in rank order (rank 0 + rank 1 + ...) and every rank gets the same bits.
 *
 * Every function marked "collective" is called by all ranks, in the same order, with the same sizes. A collective
 * that FAILS on a rank (not: an agreement on somebody's error) breaks that rank's communicator: every later call
 * returns the same error at once, and the rank ends through liveness_fail, which stops the others.
 * Waiting inside a collective tests and yields, it never sleeps; only comm_broadcast_idle backs off. Who waits in the
 * control plane asks comm_poll of the device communicator that stands on it some twenty times a second: a rank whose
 * GPU is lost must not wait for ranks that wait for its GPU. Calls come from one thread: the one that opened the
 * communicator (comm_interrupt may come from any).
 *
 * On GPUs a second communicator stands on the first: comm_device_open. Its data plane works on device memory, in the
 * order of its stream; its control plane is the first one's, whose error state and phase it shares. */
#ifndef VITRAIL_PARALLEL_COMM_H
#define VITRAIL_PARALLEL_COMM_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "base/tensor.h"

struct comm;

/* What comm_all_reduce_add_norm returns when it did nothing: no error, the caller takes the two ops instead. */
enum { COMM_DECLINED = 1 };

/* One implementation. Arguments are checked by the functions below before a slot is called. */
struct comm_vt {
    const char *name;
    bool sums_half; /* all-reduce of F16 and BF16 too */
    int (*all_reduce_sum)(struct comm *c, struct tensor x, void *stream);
    int (*all_gather)(struct comm *c, struct tensor out, struct tensor in, void *stream);
    /* Optional, NULL on CPU; may return COMM_DECLINED, then on all ranks. */
    int (*all_reduce_add_norm)(struct comm *c, struct tensor x, struct tensor residual, struct tensor weight,
                               float epsilon, struct tensor out, void *stream);
    int (*broadcast)(struct comm *c, void *buf, size_t n, int root, bool idle);
    int (*gather)(struct comm *c, void *out, const void *in, size_t n_each, int root);
    int (*all_gather_host)(struct comm *c, void *out, const void *in, size_t n_each);
    int (*reserve)(struct comm *c, size_t max_bytes);
    /* Optional: called first in comm_agree with this rank's code; returns the code to agree on (fault injection). */
    int (*before_agree)(struct comm *c, int code);
    /* Optional: called for every data-plane call of the communicator that stands on this one (fault injection). */
    int (*before_data)(struct comm *c);
    /* Optional: enqueues a kernel that writes where no memory is, after which the device is lost (fault injection). */
    int (*break_device)(struct comm *c);
    void (*watch)(struct comm *c, _Atomic uint64_t *calls, const _Atomic int *stop_signal);
    int (*poll)(struct comm *c);       /* optional */
    void (*interrupt)(struct comm *c); /* optional; any thread */
    void (*abort)(struct comm *c, int exit_code);
    void (*close)(struct comm *c);
};

struct comm {
    const struct comm_vt *vt;
    int rank, size;
    int local_rank, local_size; /* among the ranks of this host */
    char phase[32];             /* what the program is at; for messages and fault injection */
    int broken;                 /* the error of the first failed collective, 0 while sound */
    char broken_text[512];      /* and its message */
    size_t reserved_bytes;      /* largest all-reduce announced by comm_reserve */
    size_t device_bytes;        /* device memory that it took, NCCL's share included, as measured */
    struct comm *control;       /* of a device communicator: the one that it stands on; else NULL */
    struct comm *device;        /* the device communicator that stands on this one, if any */
    /* Of parallel/liveness.h, may be NULL: collectives entered, for the watchdog; signal that asked us to stop. */
    _Atomic uint64_t *calls;
    const _Atomic int *stop_signal;
    void *impl;
};

/* comm_open - "self": one rank, no MPI call is made. "mpi": MPI_Init, MPI_COMM_WORLD; the data plane goes through
 * shared memory if all ranks are on one host, through messages if not. "mpi-messages": messages always. Collective.
 * Call liveness_block_signals first: MPI starts threads. Errors: ERR_CONFIG unknown kind, ERR_COMM, ERR_IO. */
int comm_open(const char *kind, struct comm **out) MUST_CHECK;

/* comm_open_auto - "mpi" if the environment says that a launcher (mpirun, srun) started us, else "self". */
int comm_open_auto(struct comm **out) MUST_CHECK;

/* comm_device_open - the GPUs' data plane over `control` (from comm_open, or wrapped by comm_wrap_fault): all-reduces
 * and all-gathers of device memory on `stream` (a cudaStream_t, not the default stream), through NCCL and, where all
 * GPUs reach each other's memory, through that: which way for which size is measured here, for messages up to
 * max_bytes, and agreed on. Sums are in rank order, each in float32 rounded once; NCCL's, which carry the large
 * messages of more than two ranks, have an order of their own; all ranks have the same bits either way. The calls only
 * enqueue, and may be captured in a graph; all of one communicator go to the one stream. Collective. One rank: no NCCL,
 * copies. `control` stays the caller's: comm_close of *out frees what is its own; by then captured graphs are destroyed
 * and the stream has run dry, and the ranks close it together, before `control`.
 * Errors: ERR_UNSUPPORTED in a build without CUDA, ERR_COMM (NCCL), ERR_DEVICE, ERR_NOMEM; agreed on, or `control` is
 * broken. */
int comm_device_open(struct comm *control, int device, void *stream, size_t max_bytes, struct comm **out) MUST_CHECK;

/* comm_close - ends the communicator; NULL is fine. Collective for MPI: MPI_Finalize; but once a signal has asked for
 * the end only a barrier, since the launcher that sends it no longer answers MPI_Finalize. */
void comm_close(struct comm *c);

/* comm_wrap_fault - wraps *c for tests so that a fault happens at a known place. spec, comma-separated:
 *   rank=R           the rank it happens on (default: all)
 *   call=N           at the N-th collective call, counting from 1, within `phase` if one is given (default 1)
 *   phase=P          count only calls made while the phase (comm_phase, or comm_agree's argument) is P
 *   action=A         error (the call fails; in comm_agree: this rank reports an error), exit (status 9, no word
 *                    to anyone), kill (SIGKILL), stop (SIGSTOP), hang (never returns), sticky (a kernel of this rank
 *                    writes where no memory is: all that it asks of its GPU from now on fails; needs a device
 *                    communicator), delay:MS (from call N on, each)
 * Calls of a device communicator on *c count too; those within a captured step when it is recorded, not when it runs.
 * Not collective. On error *c is unchanged; afterwards comm_close closes both. Errors: ERR_CONFIG. */
int comm_wrap_fault(struct comm **c, const char *spec) MUST_CHECK;

/* comm_reserve - takes scratch for all-reduces of up to max_bytes, once, at start-up. Local, not collective.
 * A larger all-reduce later is ERR_BUG, since nothing is allocated on the decode path. Calling again may only
 * happen at start-up too. comm_scratch_bytes - what a rank takes at most, for the memory plan. */
int comm_reserve(struct comm *c, size_t max_bytes) MUST_CHECK;
size_t comm_scratch_bytes(int size, size_t max_bytes);

/* ---- data plane, on `stream` (NULL on CPU); collective ---- */

/* comm_all_reduce_sum - x := sum over ranks, in place. x: dense F32 or I64, on GPUs also BF16 or F16; same shape
 * everywhere, may be empty. */
int comm_all_reduce_sum(struct comm *c, struct tensor x, void *stream) MUST_CHECK;

/* comm_all_gather - out[r] := rank r's `in`. in: dense [n, ...]; out: dense [size * n, ...], same dtype; or any
 * shape of size times the elements. `in` may be this rank's own part of out; another overlap is a bug. */
int comm_all_gather(struct comm *c, struct tensor out, struct tensor in, void *stream) MUST_CHECK;

/* comm_all_reduce_add_norm - in one kernel: x := sum over ranks; residual += x; out := RMSNorm(residual) * weight, the
 * bits of comm_all_reduce_sum and ops_add_rms_norm. x, residual, out: dense [rows, n], one dtype; weight [n] F32. What
 * x holds afterwards is undefined. COMM_DECLINED (positive: no error) where there is no such kernel for the shape or it
 * would not pay, decided alike on all ranks; nothing has happened then. */
int comm_all_reduce_add_norm(struct comm *c, struct tensor x, struct tensor residual, struct tensor weight,
                             float epsilon, struct tensor out, void *stream) MUST_CHECK;

/* ---- control plane, host memory; collective ---- */

/* comm_broadcast - root's n bytes to all; any n (large ones go in pieces). comm_broadcast_idle - the same for the
 * wait between steps: receivers back off to naps of up to 6.4 ms, so that an idle rank costs under 2% of
 * a core. */
int comm_broadcast(struct comm *c, void *buf, size_t n, int root) MUST_CHECK;
int comm_broadcast_idle(struct comm *c, void *buf, size_t n, int root) MUST_CHECK;

/* comm_gather - root's out[r * n_each] := rank r's in[n_each]; out is read at the root only.
 * comm_all_gather_host - the same on every rank. Bytes. */
int comm_gather(struct comm *c, void *out, const void *in, size_t n_each, int root) MUST_CHECK;
int comm_all_gather_host(struct comm *c, void *out, const void *in, size_t n_each) MUST_CHECK;

/* comm_agree - ends a phase: OK only if every rank passed OK. Else every rank returns the code of the LOWEST
 * failing rank, with that rank's message, "rank R: text" (unchanged on one rank). A rank that failed has its
 * message in status_message(), as after any failure. */
int comm_agree(struct comm *c, int code, const char *phase) MUST_CHECK;

/* comm_same - ERR_PEER on every rank, naming `what` and the ranks that differ from rank 0, unless all hashes are equal.
 */
int comm_same(struct comm *c, const char *what, uint64_t hash) MUST_CHECK;

int comm_barrier(struct comm *c) MUST_CHECK;

/* ---- local ---- */

/* comm_phase - names what comes next ("load", "decode"); text of up to 31 bytes, copied. */
void comm_phase(struct comm *c, const char *phase);

/* comm_watch - from now on every collective entered adds 1 to *calls, and comm_close looks at *stop_signal. Both must
 * live as long as the process. */
void comm_watch(struct comm *c, _Atomic uint64_t *calls, const _Atomic int *stop_signal);

/* comm_poll - the error of a collective that failed after it was enqueued, OK while there is none. For loops that wait
 * for the stream. */
int comm_poll(struct comm *c) MUST_CHECK;

/* comm_interrupt - kernels that wait for a peer end soon, with garbage, and so do all later ones: for a rank that is
 * about to end and wants its stream to run dry. From any thread; nothing on CPU. */
void comm_interrupt(struct comm *c);

/* comm_abort - ends the whole job at once with status_exit_code(code); does not return. For use where
 * there is no liveness yet. The caller has printed its message. */
_Noreturn void comm_abort(struct comm *c, int code);

#endif
