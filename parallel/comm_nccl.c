/* comm_nccl - see comm_nccl.h. NCCL is loaded when the first communicator of GPUs opens, so that one program also
 * starts where there is none. Its communicators do not block: a call that is not done at once is polled for. */
#include "parallel/comm_nccl.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wstrict-prototypes" /* () for (void) */
#include <nccl.h>
#pragma GCC diagnostic pop

#include "base/clock.h"
#include "base/log.h"
#include "parallel/comm_nvlink.h"
#include "parallel/comm_private.h"

static const double patience = 60;    /* seconds for NCCL to start, or for a measurement */
static const double end_patience = 3; /* for NCCL to end: it never does while a captured graph holds it */

/* What is called of NCCL. */
#define NCCL_CALLS(X)                                                                                                  \
    X(GetVersion)                                                                                                      \
    X(GetUniqueId)                                                                                                     \
    X(GetErrorString)                                                                                                  \
    X(GetLastError)                                                                                                    \
    X(CommInitRankConfig)                                                                                              \
    X(CommGetAsyncError)                                                                                               \
    X(CommFinalize)                                                                                                    \
    X(CommDestroy)                                                                                                     \
    X(AllReduce)                                                                                                       \
    X(AllGather)
#define NCCL_POINTER(call) __typeof__(nccl##call) *call; /* NOLINT(bugprone-macro-parentheses) */

struct nccl {
    NCCL_CALLS(NCCL_POINTER)
    ncclComm_t comm;
};

/* Times are taken at 1 KB, 4 KB, ... 64 MB, of the message of a sum or of one rank's part of a gather. */
enum { N_TIMED = 9, TIMED_STEP = 4 };
static const size_t least_timed = 1 << 10;
enum operation { SUM, GATHER, OPERATION_N };

struct times {
    int n;                          /* sizes that were timed */
    double us[COMM_WAY_N][N_TIMED]; /* INFINITY: does not go this way */
};

struct device {
    struct comm comm;
    struct comm *control;
    int device;
    cudaStream_t stream; /* for the measurements and faults; operations are told theirs */
    struct nccl nccl;
    struct nvlink *nvlink; /* NULL: NCCL alone */
    struct times times[OPERATION_N];
    enum comm_way forced; /* COMM_WAY_N: by the times */
};

static const char *const way_names[] = {"nccl", "lines", "chunks"};

/* ---- NCCL ---- */

static int find(void *library, const char *name, void **out)
{
    *out = dlsym(library, name);
    if (!*out) FAIL(ERR_COMM, "libnccl.so.2 has no %s: NCCL 2.18 or newer is needed", name);
    return OK;
}

static int load_nccl(struct nccl *n)
{
    int version = 0;
    /* Multicast over NVLink can put a host's GPUs out of service when a program that uses it dies. Registering buffers
     * of captured graphs saves little and ties memory to graphs; a set variable wins there. */
    setenv("NCCL_NVLS_ENABLE", "0", 1);
    setenv("NCCL_GRAPH_REGISTER", "0", 0);
    void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        FAIL(ERR_COMM, "NCCL cannot be loaded: %s; install it, or name its folder in LD_LIBRARY_PATH", dlerror());
#define NCCL_FIND(call) TRY(find(library, "nccl" #call, (void **)&n->call));
    NCCL_CALLS(NCCL_FIND)
#undef NCCL_FIND
    if (n->GetVersion(&version) != ncclSuccess || version < NCCL_VERSION(2, 18, 0))
        FAIL(ERR_COMM, "NCCL has version code %d, %d (2.18) or newer is needed", version, NCCL_VERSION(2, 18, 0));
    log_line(LOG_DEBUG, "NCCL %d.%d.%d", version / 10000, version / 100 % 100, version % 100);
    return OK;
}

/* await_nccl - `result` is what a call returned; OK once it is done. The host's part of a collective is short; only the
 * start and the first use wait for others. */
static int await_nccl(struct device *d, const char *what, ncclResult_t result, double seconds)
{
    struct nccl *n = &d->nccl;
    double deadline = 0;
    while (result == ncclInProgress) {
        if (deadline == 0) deadline = clock_seconds() + seconds;
        ncclResult_t asked = n->CommGetAsyncError(n->comm, &result);
        if (asked != ncclSuccess) result = asked;
        if (result == ncclInProgress && clock_seconds() > deadline)
            FAIL(ERR_COMM, "NCCL %s on rank %d: not done after %.0f s", what, d->comm.rank, seconds);
        if (result == ncclInProgress) sched_yield();
    }
    if (result == ncclSuccess) return OK;
    const char *more = n->GetLastError(n->comm);
    FAIL(ERR_COMM, "NCCL %s on rank %d%s%s: %s%s%s", what, d->comm.rank, d->control->phase[0] ? " in " : "",
         d->control->phase, n->GetErrorString(result), more && *more ? ": " : "", more ? more : "");
}

static int start_nccl(struct device *d, const ncclUniqueId *id)
{
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    ncclResult_t result = d->nccl.CommInitRankConfig(&d->nccl.comm, d->comm.size, *id, d->comm.rank, &config);
    return await_nccl(d, "start", result, patience);
}

static int open_nccl(struct device *d)
{
    struct comm *control = d->control;
    ncclUniqueId id;
    memset(&id, 0, sizeof id);
    int rc = load_nccl(&d->nccl);
    if (!rc && control->rank == 0 && d->nccl.GetUniqueId(&id) != ncclSuccess)
        rc = status_set(ERR_COMM, __FILE__, __LINE__, "NCCL cannot start: %s", d->nccl.GetLastError(NULL));
    TRY(comm_agree(control, rc, control->phase));
    TRY(comm_broadcast(control, &id, sizeof id, 0));
    return comm_agree(control, start_nccl(d, &id), control->phase);
}

/* ---- peer memory ---- */

/* all_ok - whether rc is OK on all ranks: a rank without peer memory is no error, all do without then. */
static int all_ok(struct device *d, int rc, bool *ok)
{
    int codes[NVLINK_MAX_RANKS];
    *ok = true;
    if (rc) log_line(LOG_DEBUG, "peer memory is not used: %s", status_message());
    TRY(comm_all_gather_host(d->control, codes, &rc, sizeof rc));
    for (int r = 0; r < d->comm.size; r++) *ok = *ok && codes[r] == OK;
    return OK;
}

/* give_up_peers - nobody frees a window that another has mapped. */
static int give_up_peers(struct device *d)
{
    comm__nvlink_disconnect(d->nvlink);
    TRY(comm_barrier(d->control));
    comm__nvlink_close(d->nvlink);
    d->nvlink = NULL;
    return OK;
}

static int open_peers(struct device *d)
{
    struct comm *c = &d->comm;
    struct nvlink_card card, cards[NVLINK_MAX_RANKS];
    bool ok;
    if (c->size > NVLINK_MAX_RANKS || c->local_size < c->size) return OK;
    TRY(all_ok(d, comm__nvlink_open(c->rank, c->size, d->device, &card, &d->nvlink), &ok));
    if (!ok) return give_up_peers(d);
    TRY(comm_all_gather_host(d->control, cards, &card, sizeof card));
    TRY(all_ok(d, comm__nvlink_connect(d->nvlink, cards), &ok));
    return ok ? OK : give_up_peers(d);
}

/* ---- operations ---- */

static ncclDataType_t nccl_type(enum dtype dtype)
{
    switch (dtype) {
    case DTYPE_F32: return ncclFloat32;
    case DTYPE_F16: return ncclFloat16;
    case DTYPE_BF16: return ncclBfloat16;
    default: return ncclInt64;
    }
}

static bool takes(const struct device *d, enum comm_way way, size_t bytes)
{
    return way == COMM_WAY_NCCL || (d->nvlink && comm__nvlink_takes(d->nvlink, way == COMM_WAY_LINES, bytes));
}

static int sum_by(struct device *d, enum comm_way way, void *x, enum dtype dtype, size_t bytes, cudaStream_t stream)
{
    if (way != COMM_WAY_NCCL) return comm__nvlink_all_reduce(d->nvlink, way == COMM_WAY_LINES, x, dtype, bytes, stream);
    size_t n = bytes / dtype_size(dtype);
    return await_nccl(d, "all-reduce", d->nccl.AllReduce(x, x, n, nccl_type(dtype), ncclSum, d->nccl.comm, stream),
                      patience);
}

static int gather_by(struct device *d, enum comm_way way, void *out, const void *in, size_t bytes, cudaStream_t stream)
{
    if (way != COMM_WAY_NCCL) return comm__nvlink_all_gather(d->nvlink, way == COMM_WAY_LINES, out, in, bytes, stream);
    return await_nccl(d, "all-gather", d->nccl.AllGather(in, out, bytes, ncclUint8, d->nccl.comm, stream), patience);
}

/* estimate - microseconds, between two timed sizes on the line through them, beyond the last in proportion. */
static double estimate(const struct times *t, enum comm_way way, size_t bytes)
{
    size_t size = least_timed;
    if (bytes <= size) return t->us[way][0];
    for (int i = 1; i < t->n; i++, size *= TIMED_STEP)
        if (bytes <= size * TIMED_STEP) {
            double part = (double)(bytes - size) / (double)(size * (TIMED_STEP - 1));
            return t->us[way][i - 1] + part * (t->us[way][i] - t->us[way][i - 1]);
        }
    return t->us[way][t->n - 1] * (double)bytes / (double)size;
}

static enum comm_way choose(const struct device *d, enum operation operation, size_t bytes)
{
    const struct times *t = &d->times[operation];
    enum comm_way best = COMM_WAY_NCCL;
    if (d->forced != COMM_WAY_N) return takes(d, d->forced, bytes) ? d->forced : COMM_WAY_NCCL;
    if (!d->nvlink || t->n == 0) return COMM_WAY_NCCL;
    for (enum comm_way way = COMM_WAY_LINES; way < COMM_WAY_N; way++)
        if (takes(d, way, bytes) && estimate(t, way, bytes) < estimate(t, best, bytes)) best = way;
    return best;
}

static int all_reduce_sum(struct comm *c, struct tensor x, void *stream)
{
    struct device *d = c->impl;
    size_t bytes = tensor_bytes(x);
    comm__enter(c);
    if (c->size == 1) return OK;
    return sum_by(d, x.dtype == DTYPE_I64 ? COMM_WAY_NCCL : choose(d, SUM, bytes), x.data, x.dtype, bytes, stream);
}

static int all_gather(struct comm *c, struct tensor out, struct tensor in, void *stream)
{
    struct device *d = c->impl;
    size_t bytes = tensor_bytes(in);
    comm__enter(c);
    if (c->size > 1) return gather_by(d, choose(d, GATHER, bytes), out.data, in.data, bytes, stream);
    if (out.data != in.data) COMM_CUDA_TRY(cudaMemcpyAsync(out.data, in.data, bytes, cudaMemcpyDeviceToDevice, stream));
    return OK;
}

static int all_reduce_add_norm(struct comm *c, struct tensor x, struct tensor residual, struct tensor weight,
                               float epsilon, struct tensor out, void *stream)
{
    struct device *d = c->impl;
    int64_t rows = x.dim[0], width = x.dim[1];
    if (!d->nvlink || !comm__nvlink_norm_takes(d->nvlink, rows, width, x.dtype)) return COMM_DECLINED;
    if (choose(d, SUM, tensor_bytes(x)) != COMM_WAY_LINES) return COMM_DECLINED;
    comm__enter(c);
    return comm__nvlink_add_norm(d->nvlink, x.data, residual.data, weight.data, epsilon, out.data, rows, width, x.dtype,
                                 stream);
}

/* ---- the times ---- */

/* await_stream - polls, since a peer may be gone. */
static int await_stream(struct device *d)
{
    double deadline = clock_seconds() + patience;
    cudaError_t state;
    while ((state = cudaStreamQuery(d->stream)) == cudaErrorNotReady) {
        if (clock_seconds() > deadline) {
            comm__nvlink_interrupt(d->nvlink);
            FAIL(ERR_TIMEOUT, "rank %d waited %.0f s for its GPU while communication was measured", d->comm.rank,
                 patience);
        }
        sched_yield();
    }
    COMM_CUDA_TRY(state);
    return OK;
}

struct trial {
    enum operation operation;
    enum comm_way way;
    size_t bytes;
    char *buffer;
    cudaEvent_t begin, end;
    cudaGraphExec_t graph;
};

static int run_trial(struct device *d, const struct trial *t, int repeats)
{
    for (int i = 0; i < repeats; i++) {
        const char *in = t->buffer + (size_t)d->comm.rank * t->bytes;
        TRY(t->operation == SUM ? sum_by(d, t->way, t->buffer, DTYPE_BF16, t->bytes, d->stream)
                                : gather_by(d, t->way, t->buffer, in, t->bytes, d->stream));
    }
    return OK;
}

static int record_trial(struct device *d, struct trial *t, int repeats)
{
    cudaGraph_t graph = NULL;
    COMM_CUDA_TRY(cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal));
    int rc = run_trial(d, t, repeats);
    cudaError_t error = cudaStreamEndCapture(d->stream, &graph);
    if (error == cudaSuccess) error = cudaGraphInstantiate(&t->graph, graph, 0);
    if (graph) (void)cudaGraphDestroy(graph);
    if (!rc) COMM_CUDA_TRY(error);
    return rc;
}

/* time_trial - the best of a few replays of operations in a row, after one outside of a graph. */
static int time_trial(struct device *d, struct trial *t, double *us)
{
    enum { TRIES = 5 };
    int repeats = t->bytes <= 1 << 20 ? 20 : 4;
    *us = INFINITY;
    TRY(run_trial(d, t, 1));
    TRY(record_trial(d, t, repeats));
    for (int i = 0; i < TRIES; i++) {
        float ms = 0;
        TRY(comm_barrier(d->control));
        COMM_CUDA_TRY(cudaEventRecord(t->begin, d->stream));
        COMM_CUDA_TRY(cudaGraphLaunch(t->graph, d->stream));
        COMM_CUDA_TRY(cudaEventRecord(t->end, d->stream));
        TRY(await_stream(d));
        COMM_CUDA_TRY(cudaEventElapsedTime(&ms, t->begin, t->end));
        if (1e3 * ms / repeats < *us) *us = 1e3 * ms / repeats;
    }
    COMM_CUDA_TRY(cudaGraphExecDestroy(t->graph));
    t->graph = NULL;
    return OK;
}

/* wake - the clocks rise with work; who is timed first should not pay for it. */
static int wake(struct device *d, struct trial *t, size_t most)
{
    double end = clock_seconds() + 0.03;
    while (clock_seconds() < end) {
        for (int i = 0; i < 8; i++) COMM_CUDA_TRY(cudaMemsetAsync(t->buffer, 0, most, d->stream));
        TRY(await_stream(d));
    }
    return OK;
}

static int time_all(struct device *d, struct trial *t, size_t most)
{
    TRY(wake(d, t, most));
    for (enum operation o = 0; o < OPERATION_N; o++) {
        struct times *times = &d->times[o];
        size_t largest = o == SUM ? most : most / (size_t)d->comm.size;
        for (size_t bytes = least_timed; times->n < N_TIMED && bytes <= largest; bytes *= TIMED_STEP, times->n++)
            for (enum comm_way way = 0; way < COMM_WAY_N; way++) {
                double *us = &times->us[way][times->n];
                t->operation = o, t->way = way, t->bytes = bytes;
                *us = INFINITY;
                if (takes(d, way, bytes)) TRY(time_trial(d, t, us));
            }
    }
    return OK;
}

/* check_sum - a sum of known numbers by peer memory: where a bridge or an IOMMU between the GPUs loses writes, NCCL is
 * left. */
static int check_sum(struct device *d, enum comm_way way, float *x, float *host, int n)
{
    int all = d->comm.size * (d->comm.size + 1) / 2, wrong = 0;
    size_t bytes = (size_t)n * sizeof *x;
    for (int i = 0; i < n; i++) host[i] = (float)((d->comm.rank + 1) * (i % 1021));
    COMM_CUDA_TRY(cudaMemcpyAsync(x, host, bytes, cudaMemcpyHostToDevice, d->stream));
    TRY(sum_by(d, way, x, DTYPE_F32, bytes, d->stream));
    TRY(await_stream(d));
    COMM_CUDA_TRY(cudaMemcpyAsync(host, x, bytes, cudaMemcpyDeviceToHost, d->stream));
    COMM_CUDA_TRY(cudaStreamSynchronize(d->stream));
    for (int i = 0; i < n; i++) wrong += host[i] != (float)(all * (i % 1021));
    if (wrong) FAIL(ERR_DEVICE, "%d of %d sums over peer memory (%s) came out wrong", wrong, n, way_names[way]);
    return OK;
}

static int check_sums(struct device *d, float *x)
{
    enum { N = 100003 };
    float *host = malloc(N * sizeof *host);
    if (!host) FAIL(ERR_NOMEM, "no memory for a communicator");
    int rc = check_sum(d, COMM_WAY_LINES, x, host, N);
    if (!rc) rc = check_sum(d, COMM_WAY_CHUNKS, x, host, N);
    free(host);
    return rc;
}

static void log_times(const struct device *d)
{
    static const char *const names[] = {"all-reduce", "all-gather"};
    for (enum operation o = 0; o < OPERATION_N; o++) {
        size_t bytes = least_timed;
        for (int i = 0; i < d->times[o].n; i++, bytes *= TIMED_STEP)
            log_line(LOG_DEBUG, "%s of %zu KB: nccl %.1f, lines %.1f, chunks %.1f us", names[o], bytes >> 10,
                     d->times[o].us[COMM_WAY_NCCL][i], d->times[o].us[COMM_WAY_LINES][i],
                     d->times[o].us[COMM_WAY_CHUNKS][i]);
    }
}

static int prepare_trial(struct device *d, struct trial *t, size_t bytes)
{
    COMM_CUDA_TRY(cudaMalloc((void **)&t->buffer, bytes));
    COMM_CUDA_TRY(cudaEventCreate(&t->begin));
    COMM_CUDA_TRY(cudaEventCreate(&t->end));
    COMM_CUDA_TRY(cudaMemsetAsync(t->buffer, 0, bytes, d->stream));
    return OK;
}

static int try_peers(struct device *d, struct trial *t)
{
    bool ok;
    if (!d->nvlink) return OK;
    TRY(all_ok(d, check_sums(d, (float *)t->buffer), &ok));
    return ok ? OK : give_up_peers(d);
}

/* measure - the check and the times, in a buffer of its own; the times of rank 0 count. */
static int measure(struct device *d, size_t max_bytes)
{
    static const size_t least = 1 << 20, most = 64 << 20;
    size_t bytes = max_bytes < least ? least : max_bytes < most ? max_bytes : most;
    struct trial t = {0};
    TRY(comm_agree(d->control, prepare_trial(d, &t, bytes), d->control->phase));
    /* Sums in a row: a rank that fails here stands elsewhere than the others, and must not agree on anything. */
    int rc = try_peers(d, &t);
    if (!rc) rc = time_all(d, &t, bytes);
    TRY(comm__settle(d->control, rc));
    TRY(comm_broadcast(d->control, d->times, sizeof d->times, 0));
    if (d->comm.rank == 0) log_times(d);
    TRY(comm_barrier(d->control)); /* nobody reads this rank's buffer any more */
    COMM_CUDA_TRY(cudaEventDestroy(t.begin));
    COMM_CUDA_TRY(cudaEventDestroy(t.end));
    COMM_CUDA_TRY(cudaFree(t.buffer));
    return OK;
}

/* ---- the communicator ---- */

static int broadcast(struct comm *c, void *buf, size_t n, int root, bool idle)
{
    return c->control->vt->broadcast(c->control, buf, n, root, idle);
}

static int gather(struct comm *c, void *out, const void *in, size_t n_each, int root)
{
    return c->control->vt->gather(c->control, out, in, n_each, root);
}

static int all_gather_host(struct comm *c, void *out, const void *in, size_t n_each)
{
    return c->control->vt->all_gather_host(c->control, out, in, n_each);
}

static int before_agree(struct comm *c, int code)
{
    return c->control->vt->before_agree ? c->control->vt->before_agree(c->control, code) : code;
}

/* Everything was taken when it opened. */
static int reserve(struct comm *c, size_t max_bytes)
{
    (void)c, (void)max_bytes;
    return OK;
}

static void watch(struct comm *c, _Atomic uint64_t *calls, const _Atomic int *stop_signal)
{
    comm_watch(c->control, calls, stop_signal);
}

/* What a kernel did wrong shows in the next call about any stream. Of a stream that is being captured nothing may be
 * asked, and nobody waits then. */
static int poll_device(struct comm *c)
{
    struct device *d = c->impl;
    ncclResult_t state = ncclSuccess;
    const cudaError_t kernels = cudaStreamQuery(d->stream);
    if (kernels == cudaErrorNotReady)
        (void)cudaGetLastError(); /* else a later launch would report it */
    else
        COMM_CUDA_TRY(kernels);
    if (!d->nccl.comm) return OK;
    ncclResult_t asked = d->nccl.CommGetAsyncError(d->nccl.comm, &state);
    if (asked != ncclSuccess) state = asked;
    return state == ncclInProgress ? OK : await_nccl(d, "in the background", state, 0);
}

static void interrupt(struct comm *c) { comm__nvlink_interrupt(((struct device *)c->impl)->nvlink); }

static int break_device(struct comm *c) { return comm__nvlink_break(((struct device *)c->impl)->stream); }

static void abort_job(struct comm *c, int exit_code)
{
    interrupt(c);
    c->control->vt->abort(c->control, exit_code);
}

/* release - in good order: the streams are dry, on all ranks once they have met. What does not end in time is left to
 * the end of the process. */
static void release(struct device *d)
{
    struct nccl *n = &d->nccl;
    if (cudaSetDevice(d->device) != cudaSuccess || comm_barrier(d->control)) return;
    if (await_nccl(d, "end", n->CommFinalize(n->comm), end_patience))
        log_line(LOG_DEBUG, "%s", status_message());
    else
        (void)n->CommDestroy(n->comm);
    comm__nvlink_disconnect(d->nvlink);
    if (comm_barrier(d->control)) return;
    comm__nvlink_close(d->nvlink);
}

/* After a failure or a stop signal the others may be anywhere: waiting kernels end, the rest goes with the process. */
static void close_device(struct comm *c)
{
    struct device *d = c->impl;
    bool stopped = c->stop_signal && atomic_load(c->stop_signal);
    if (c->broken || d->control->broken || stopped)
        interrupt(c);
    else if (c->size > 1)
        release(d);
    free(d);
}

static const struct comm_vt device_vt = {
    .name = "device",
    .sums_half = true,
    .all_reduce_sum = all_reduce_sum,
    .all_gather = all_gather,
    .all_reduce_add_norm = all_reduce_add_norm,
    .broadcast = broadcast,
    .gather = gather,
    .all_gather_host = all_gather_host,
    .reserve = reserve,
    .before_agree = before_agree,
    .break_device = break_device,
    .watch = watch,
    .poll = poll_device,
    .interrupt = interrupt,
    .abort = abort_job,
    .close = close_device,
};

static int free_memory(const struct device *d, size_t *bytes)
{
    size_t total;
    COMM_CUDA_TRY(cudaSetDevice(d->device));
    COMM_CUDA_TRY(cudaMemGetInfo(bytes, &total));
    return OK;
}

static int open_parts(struct device *d, size_t max_bytes)
{
    size_t before = 0, after = 0;
    TRY(comm_agree(d->control, free_memory(d, &before), d->control->phase));
    if (d->comm.size == 1) return OK;
    TRY(open_nccl(d));
    TRY(open_peers(d));
    TRY(measure(d, max_bytes));
    TRY(comm_agree(d->control, free_memory(d, &after), d->control->phase));
    d->comm.device_bytes = before > after ? before - after : 0;
    if (d->comm.rank == 0)
        log_line(LOG_DEBUG, "communicator of %d GPUs: %s, %.1f MiB", d->comm.size,
                 d->nvlink ? "NCCL and peer memory" : "NCCL", (double)d->comm.device_bytes / (1 << 20));
    return OK;
}

int comm__device_open(struct comm *control, int device, void *stream, size_t max_bytes, struct comm **out)
{
    struct device *d = calloc(1, sizeof *d);
    int rc = d ? OK : status_set(ERR_NOMEM, __FILE__, __LINE__, "no memory for a communicator");
    if (!rc && !stream) rc = status_set(ERR_ARG, __FILE__, __LINE__, "communicator of device %d: no stream", device);
    rc = comm_agree(control, rc, control->phase);
    if (rc) {
        free(d);
        return rc;
    }
    /* NOLINTBEGIN(clang-analyzer-core.NullDereference): without d the agreement failed */
    d->comm = *control; /* rank, size, phase, the watch */
    d->comm.vt = &device_vt;
    d->comm.impl = d;
    d->comm.control = d->control = control;
    d->comm.reserved_bytes = max_bytes;
    d->device = device;
    d->stream = stream;
    d->forced = COMM_WAY_N;
    /* NOLINTEND(clang-analyzer-core.NullDereference) */
    rc = open_parts(d, max_bytes);
    if (rc)
        free(d); /* GPU memory and NCCL's threads go with the process, which cannot go on without them */
    else
        *out = &d->comm;
    return rc;
}

const char *comm__way_name(enum comm_way way) { return way < COMM_WAY_N ? way_names[way] : "chosen"; }

bool comm__has_peers(const struct comm *c) { return ((const struct device *)c->impl)->nvlink != NULL; }

void comm__use_way(struct comm *c, enum comm_way way) { ((struct device *)c->impl)->forced = way; }

enum comm_way comm__way_of_sum(const struct comm *c, size_t bytes) { return choose(c->impl, SUM, bytes); }
