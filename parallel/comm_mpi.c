/* comm_mpi - ranks over MPI, host buffers. The only file of the CPU build that includes mpi.h. Among ranks of one host
 * the data plane goes through shared memory (comm_shared), MPI carries the control plane; between hosts MPI carries
 * both.
 *
 * No call waits inside MPI: collectives are the I-variants, tested in a loop that yields (await), so that ranks may
 * outnumber cores and the watching thread can end the process. MPI's own reductions are not used: their order of
 * summation depends on size and algorithm, ours is rank 0 + rank 1 + ... for every element on every rank. */
#include <mpi.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "parallel/comm_private.h"
#include "parallel/comm_shared.h"
#include "parallel/shard.h"

static const size_t small_bytes = 64 << 10;   /* up to here every rank receives all and sums all: one round trip */
static const size_t piece_bytes = 4 << 20;    /* larger messages go in pieces of this size; bounds the scratch */
static const size_t int_safe_bytes = 1 << 30; /* MPI counts are ints */

/* The communicator and what is ours of it, in one allocation; comm.impl points to its own block. */
struct mpi {
    struct comm comm;
    MPI_Comm world;        /* a duplicate of MPI_COMM_WORLD, errors returned */
    struct shared *shared; /* data plane, if all ranks are on this host; else NULL */
    unsigned char *scratch;
    const void **part; /* [size], of the scratch */
    int *counts;       /* [4 * size]: counts and displacements of a vector collective, to send and to receive */
};

static int mpi_error(struct comm *c, const char *what, int error)
{
    char text[MPI_MAX_ERROR_STRING] = "";
    int n = 0;
    MPI_Error_string(error, text, &n);
    FAIL(ERR_COMM, "MPI %s on rank %d%s%s: %s", what, c->rank, c->phase[0] ? " in " : "", c->phase, text);
}

/* back_off - between steps: yield for a while, then naps that grow by a sixty-fourth of the time waited so far, from
 * 50 us to 6.4 ms: a nap and a test cost up to 60 us of a slow or virtual core, and 2% of it is all that waiting may
 * take. */
static void back_off(unsigned round)
{
    enum { YIELDS = 100, ROUNDS_A_DOUBLING = 44, MOST_DOUBLINGS = 7 };
    if (round < YIELDS) {
        sched_yield();
        return;
    }
    unsigned doublings = (round - YIELDS) / ROUNDS_A_DOUBLING;
    struct timespec t = {.tv_nsec = 50000L << (doublings < MOST_DOUBLINGS ? doublings : MOST_DOUBLINGS)};
    nanosleep(&t, NULL);
}

/* The analyser knows MPI_Wait only; await is our wait. NOLINTBEGIN(clang-analyzer-optin.mpi.MPI-Checker) */

/* ask_device - some twenty times a second: who waits for a message learns here that its own device is lost, for which
 * the sender may be waiting. */
static int ask_device(struct comm *c, double *asked)
{
    const double interval = 0.05, now = c->device ? clock_seconds() : 0;
    if (!c->device || now - *asked < interval) return OK;
    *asked = now;
    return comm_poll(c->device);
}

/* await - `started` is what the I-call returned; waits for its request. */
static int await(struct comm *c, const char *what, int started, MPI_Request *request, bool idle)
{
    double asked = c->device ? clock_seconds() : 0;
    if (started) return mpi_error(c, what, started);
    for (unsigned round = 0;; round++) {
        int done = 0, error = MPI_Test(request, &done, MPI_STATUS_IGNORE);
        if (error) return mpi_error(c, what, error);
        if (done) return OK;
        TRY(ask_device(c, &asked));
        if (idle)
            back_off(round);
        else
            sched_yield();
    }
}

static int broadcast(struct comm *c, void *buf, size_t n, int root, bool idle)
{
    struct mpi *m = c->impl;
    comm__enter(c);
    for (size_t at = 0; at < n; at += piece_bytes) {
        size_t piece = n - at < piece_bytes ? n - at : piece_bytes;
        MPI_Request request;
        int rc = MPI_Ibcast((char *)buf + at, (int)piece, MPI_BYTE, root, m->world, &request);
        TRY(await(c, "broadcast", rc, &request, idle && at == 0));
    }
    return OK;
}

static int gather(struct comm *c, void *out, const void *in, size_t n_each, int root)
{
    struct mpi *m = c->impl;
    MPI_Request request;
    comm__enter(c);
    if (n_each > int_safe_bytes / (size_t)c->size)
        FAIL(ERR_ARG, "gather of %zu bytes from each of %d ranks: at most %zu in all", n_each, c->size, int_safe_bytes);
    int rc = MPI_Igather(in, (int)n_each, MPI_BYTE, out, (int)n_each, MPI_BYTE, root, m->world, &request);
    return await(c, "gather", rc, &request, false);
}

static int all_gather_host(struct comm *c, void *out, const void *in, size_t n_each)
{
    struct mpi *m = c->impl;
    unsigned char *own = (unsigned char *)out + (size_t)c->rank * n_each;
    comm__enter(c);
    if (n_each <= int_safe_bytes / (size_t)c->size) {
        const void *from = in == own ? MPI_IN_PLACE : in;
        MPI_Request request;
        int rc = MPI_Iallgather(from, (int)n_each, MPI_BYTE, out, (int)n_each, MPI_BYTE, m->world, &request);
        return await(c, "all-gather", rc, &request, false);
    }
    if (in != own) memcpy(own, in, n_each);
    for (int root = 0; root < c->size; root++)
        TRY(broadcast(c, (unsigned char *)out + (size_t)root * n_each, n_each, root, false));
    return OK;
}

static int all_gather(struct comm *c, struct tensor out, struct tensor in, void *stream)
{
    (void)stream;
    struct mpi *m = c->impl;
    if (!m->shared) return all_gather_host(c, out.data, in.data, tensor_bytes(in));
    comm__enter(c);
    comm__shared_gather(m->shared, out.data, in.data, tensor_bytes(in));
    return OK;
}

/* sum_scratch - sum := the ordered sum of the scratch, which holds n elements of each rank in turn. */
static void sum_scratch(struct comm *c, void *sum, enum dtype dtype, int64_t n)
{
    struct mpi *m = c->impl;
    for (int r = 0; r < c->size; r++) m->part[r] = m->scratch + (size_t)(r * n) * dtype_size(dtype);
    comm__ordered_sum(sum, m->part, c->size, dtype, (size_t)n);
}

/* reduce_small - everybody gets everything and adds it up. */
static int reduce_small(struct comm *c, void *x, enum dtype dtype, int64_t n)
{
    struct mpi *m = c->impl;
    int bytes = (int)((size_t)n * dtype_size(dtype));
    MPI_Request request;
    int rc = MPI_Iallgather(x, bytes, MPI_BYTE, m->scratch, bytes, MPI_BYTE, m->world, &request);
    TRY(await(c, "all-reduce", rc, &request, false));
    sum_scratch(c, x, dtype, n);
    return OK;
}

/* reduce_large - rank r adds up slice r of all ranks, then the finished slices are gathered: each element crosses
 * twice, however many ranks there are. */
static int reduce_large(struct comm *c, unsigned char *x, enum dtype dtype, int64_t n)
{
    struct mpi *m = c->impl;
    MPI_Datatype type = dtype == DTYPE_F32 ? MPI_FLOAT : MPI_INT64_T;
    int *slice = m->counts, *slice_at = slice + c->size, *own = slice_at + c->size, *own_at = own + c->size;
    struct shard_range mine = shard_range(n, 1, c->size, c->rank);
    for (int r = 0; r < c->size; r++) {
        struct shard_range s = shard_range(n, 1, c->size, r);
        slice[r] = (int)s.count;
        slice_at[r] = (int)s.first;
        own[r] = (int)mine.count;
        own_at[r] = (int)(r * mine.count);
    }
    MPI_Request request;
    int rc = MPI_Ialltoallv(x, slice, slice_at, type, m->scratch, own, own_at, type, m->world, &request);
    TRY(await(c, "all-reduce (exchange)", rc, &request, false));
    sum_scratch(c, x + (size_t)mine.first * dtype_size(dtype), dtype, mine.count);
    rc = MPI_Iallgatherv(MPI_IN_PLACE, 0, type, x, slice, slice_at, type, m->world, &request);
    return await(c, "all-reduce (gather)", rc, &request, false);
}

static int all_reduce_sum(struct comm *c, struct tensor x, void *stream)
{
    (void)stream;
    struct mpi *m = c->impl;
    comm__enter(c);
    if (c->size == 1) return OK;
    if (m->shared) {
        comm__shared_sum(m->shared, x.data, x.dtype, (size_t)tensor_count(x));
        return OK;
    }
    size_t element = dtype_size(x.dtype), n = (size_t)tensor_count(x), most = piece_bytes / element;
    for (size_t at = 0; at < n; at += most) {
        size_t piece = n - at < most ? n - at : most;
        unsigned char *data = (unsigned char *)x.data + at * element;
        if (piece * element <= small_bytes)
            TRY(reduce_small(c, data, x.dtype, (int64_t)piece));
        else
            TRY(reduce_large(c, data, x.dtype, (int64_t)piece));
    }
    return OK;
}

/* NOLINTEND(clang-analyzer-optin.mpi.MPI-Checker) */

size_t comm_scratch_bytes(int size, size_t max_bytes)
{
    if (size == 1) return 0;
    size_t small = (size_t)size * (max_bytes < small_bytes ? max_bytes : small_bytes);
    /* Slices differ by one element, so the received ones may add up to one element a rank more than the message. */
    size_t large = (max_bytes < piece_bytes ? max_bytes : piece_bytes) + (size_t)size * sizeof(int64_t);
    return small > large ? small : large;
}

static int reserve(struct comm *c, size_t max_bytes)
{
    struct mpi *m = c->impl;
    size_t bytes = m->shared ? 0 : comm_scratch_bytes(c->size, max_bytes);
    if (!bytes) return OK;
    void *scratch = realloc(m->scratch, bytes);
    if (!scratch) FAIL(ERR_NOMEM, "no memory for %zu bytes of all-reduce scratch", bytes);
    m->scratch = scratch;
    return OK;
}

static void abort_job(struct comm *c, int exit_code) { MPI_Abort(((struct mpi *)c->impl)->world, exit_code); }

static void discard(struct mpi *m)
{
    comm__shared_close(m->shared);
    free(m->scratch);
    free(m->part);
    free(m->counts);
    free(m);
}

static void close_mpi(struct comm *c)
{
    struct mpi *m = c->impl;
    bool stopped = c->stop_signal && atomic_load(c->stop_signal);
    /* Behind a failed collective the others are elsewhere, and MPI_Finalize would wait for them. It would also wait for
     * mpirun, which sleeps between the signals with which it ends a job and finally kills whoever waits. */
    if (stopped && comm_barrier(c)) c->broken = ERR_COMM;
    if (!c->broken && !stopped) {
        MPI_Comm_free(&m->world);
        MPI_Finalize();
    }
    discard(m);
}

static const struct comm_vt mpi_vt = {
    .name = "mpi",
    .all_reduce_sum = all_reduce_sum,
    .all_gather = all_gather,
    .broadcast = broadcast,
    .gather = gather,
    .all_gather_host = all_gather_host,
    .reserve = reserve,
    .abort = abort_job,
    .close = close_mpi,
};

static int start_mpi(void)
{
    int initialised = 0, provided = 0;
    MPI_Initialized(&initialised);
    if (initialised) FAIL(ERR_BUG, "the MPI communicator is opened twice in one process");
    /* Copying between processes needs a right (ptrace) that containers take away, and Open MPI 4 notices only in
     * mid-transfer. Its shared-memory path is as fast for the messages that matter; a set variable wins. */
    setenv("OMPI_MCA_btl_vader_single_copy_mechanism", "none", 0);
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided) || provided < MPI_THREAD_FUNNELED)
        FAIL(ERR_COMM, "MPI cannot start with thread support (MPI_THREAD_FUNNELED): found level %d", provided);
    return OK;
}

/* describe - ranks and sizes, and a communicator that returns its errors. */
static int describe(struct comm *c, struct mpi *m)
{
    MPI_Comm local;
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    int rc = MPI_Comm_dup(MPI_COMM_WORLD, &m->world);
    if (rc) return mpi_error(c, "communicator", rc);
    MPI_Comm_rank(m->world, &c->rank);
    MPI_Comm_size(m->world, &c->size);
    rc = MPI_Comm_split_type(m->world, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &local);
    if (rc) return mpi_error(c, "ranks of this host", rc);
    MPI_Comm_rank(local, &c->local_rank);
    MPI_Comm_size(local, &c->local_size);
    MPI_Comm_free(&local);
    if (c->size > COMM__MAX_RANKS)
        FAIL(ERR_UNSUPPORTED, "%d ranks were started: at most %d are served", c->size, COMM__MAX_RANKS);
    return OK;
}

/* progress - lets MPI move what it holds, for the waits that are not in MPI. */
static void progress(struct comm *c)
{
    int found;
    MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, ((struct mpi *)c->impl)->world, &found, MPI_STATUS_IGNORE);
}

static int prepare(struct comm *c, struct mpi *m, bool share_memory)
{
    c->vt = &mpi_vt;
    c->impl = m;
    TRY(describe(c, m));
    m->counts = calloc(4 * (size_t)c->size, sizeof *m->counts);
    m->part = calloc((size_t)c->size, sizeof *m->part);
    if (!m->counts || !m->part) FAIL(ERR_NOMEM, "no memory for a communicator of %d ranks", c->size);
    if (!share_memory || c->size == 1 || c->local_size < c->size) return OK;
    return comm__shared_open(c, progress, &m->shared);
}

int comm__open_mpi(bool share_memory, struct comm **out)
{
    TRY(start_mpi());
    struct mpi *m = calloc(1, sizeof *m);
    if (!m) FAIL(ERR_NOMEM, "no memory for a communicator");
    int rc = prepare(&m->comm, m, share_memory);
    if (rc)
        discard(m);
    else
        *out = &m->comm;
    return rc;
}
