/* The CUDA backend's table entry: opening, memory, scratch, marks. */
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "kernels/cuda/cuda.h"

int cuda__failed(const char *what, cudaError_t error)
{
    FAIL(ERR_DEVICE, "CUDA: %s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

int cuda__launched(const char *kernel)
{
    cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? OK : cuda__failed(kernel, error);
}

static int count_devices(void)
{
    int n = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
}

/* ---- opening ---- */

/* A device for which this build has no code is refused here, not at the first launch. */
static int check_device(struct cuda *c)
{
    struct cudaDeviceProp device;
    CUDA_TRY(cudaGetDeviceProperties(&device, c->device));
    c->arch = 10 * device.major + device.minor;
    c->n_multiprocessors = device.multiProcessorCount;
    c->max_shared_bytes = (int)device.sharedMemPerBlockOptin;
    bool has_code =
        c->arch == 90 || (device.major == 8 && (device.minor == 0 || device.minor == 6 || device.minor == 9));
    if (!has_code)
        FAIL(ERR_UNSUPPORTED, "%s has compute capability %d.%d; this build has code for 8.0, 8.6, 8.9 and 9.0",
             device.name, device.major, device.minor);
    return OK;
}

static int open_parts(struct ops *o, struct cuda *c)
{
    CUDA_TRY(cudaSetDevice(c->device));
    TRY(check_device(c));
    TRY(cuda__open_streams(c));
    CUDA_TRY(cudaStreamCreateWithFlags(&c->copy_stream, cudaStreamNonBlocking));
    for (int i = 0; i < CUDA_MARKS; i++) CUDA_TRY(cudaEventCreateWithFlags(&c->mark[i], cudaEventDisableTiming));
    o->stream = c->stream;
    TRY(cuda__upload_open(c));
    return cuda__linear_open(c);
}

static int open_cuda(struct ops *o, int device, int n_threads)
{
    (void)n_threads;
    int n = device == OPS_NO_DEVICE ? 0 : count_devices();
    if (device != OPS_NO_DEVICE && (device < 0 || device >= n))
        FAIL(ERR_DEVICE, "CUDA: device %d was asked for, this process sees %d", device, n);
    struct cuda *c = calloc(1, sizeof *c);
    if (!c) FAIL(ERR_NOMEM, "cuda: %zu bytes for the backend", sizeof *c);
    c->device = device;
    o->impl = c;
    o->dtype = DTYPE_BF16;
    return device == OPS_NO_DEVICE ? OK : open_parts(o, c);
}

static void close_cuda(struct ops *o)
{
    struct cuda *c = cuda__of(o);
    if (!c) return;
    if (c->device == OPS_NO_DEVICE) {
        free(c);
        return;
    }
    cuda__aside_end(o);
    cuda__drain(c);
    cuda__graphs_close(c);
    cuda__linear_close(c);
    cuda__upload_close(c);
    if (c->scratch) (void)cudaFree(c->scratch);
    for (int i = 0; i < CUDA_MARKS; i++)
        if (c->mark[i]) (void)cudaEventDestroy(c->mark[i]);
    cuda__aside_close(c);
    if (c->copy_stream) (void)cudaStreamDestroy(c->copy_stream);
    if (c->stream) (void)cudaStreamDestroy(c->stream);
    free(c);
    o->impl = NULL;
}

static int use_dtype(struct ops *o, enum dtype model_dtype)
{
    o->dtype = model_dtype == DTYPE_F16 ? DTYPE_F16 : DTYPE_BF16;
    return OK;
}

/* ---- memory ---- */

static int memory_free(struct ops *o, size_t *free_bytes, size_t *total_bytes)
{
    *free_bytes = *total_bytes = 0;
    if (cuda__of(o)->device != OPS_NO_DEVICE) CUDA_TRY(cudaMemGetInfo(free_bytes, total_bytes));
    return OK;
}

static int memory_take(struct ops *o, size_t bytes, void **out)
{
    const struct cuda *c = cuda__of(o);
    const double mib = 1 << 20;
    size_t left = 0, total = 0;
    CUDA_TRY(cudaMemGetInfo(&left, &total));
    if (cudaMalloc(out, bytes ? bytes : 1) != cudaSuccess) {
        (void)cudaGetLastError(); /* else a later launch would report it */
        FAIL(ERR_NOMEM, "cuda: %.1f MiB of device memory wanted, %.1f of %.1f MiB are free", (double)bytes / mib,
             (double)left / mib, (double)total / mib);
    }
    CUDA_TRY(cudaMemsetAsync(*out, 0, bytes, c->stream));
    CUDA_TRY(cudaStreamSynchronize(c->stream));
    return OK;
}

static void memory_give_back(struct ops *o, void *memory, size_t bytes)
{
    (void)bytes;
    cuda__drain(cuda__of(o));
    (void)cudaFree(memory);
}

/* Pinned and in the device's address space: kernels read and write it over the bus. */
static int host_take(struct ops *o, size_t bytes, void **out)
{
    void *memory = NULL;
    (void)o;
    if (cudaHostAlloc(&memory, bytes ? bytes : 1, cudaHostAllocMapped | cudaHostAllocPortable) != cudaSuccess) {
        (void)cudaGetLastError(); /* else a later launch would report it */
        FAIL(ERR_NOMEM, "cuda: %.1f MiB of pinned host memory are not to be had; lower kv_cache.host_memory_bytes",
             (double)bytes / (1 << 20));
    }
    cudaError_t error = cudaHostGetDevicePointer(out, memory, 0);
    if (error == cudaSuccess && *out != memory) error = cudaErrorNotSupported; /* one address on all 64-bit systems */
    if (error != cudaSuccess) {
        *out = NULL;
        (void)cudaFreeHost(memory);
        return cuda__failed("cudaHostGetDevicePointer", error);
    }
    memset(memory, 0, bytes);
    return OK;
}

static void host_give_back(struct ops *o, void *memory, size_t bytes)
{
    (void)bytes;
    cuda__drain(cuda__of(o));
    (void)cudaFreeHost(memory);
}

static int copy(struct ops *o, void *to, const void *from, size_t bytes)
{
    CUDA_TRY(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cuda__of(o)->stream));
    return OK;
}

static int zero(struct ops *o, void *to, size_t bytes)
{
    CUDA_TRY(cudaMemsetAsync(to, 0, bytes, cuda__of(o)->stream));
    return OK;
}

static int finish(struct ops *o)
{
    TRY(cuda__aside_join(o));
    return cuda__await(o, cuda__of(o)->stream, NULL);
}

static int mark(struct ops *o, int i)
{
    CUDA_TRY(cudaEventRecord(cuda__of(o)->mark[i], cuda__of(o)->stream));
    return OK;
}

/* A step is over in milliseconds: a look now and then costs it nothing, and a wait that does not end is asked about. */
int cuda__await(struct ops *o, cudaStream_t stream, cudaEvent_t event)
{
    enum { BUSY_LOOKS = 100, NAP_NANOSECONDS = 50000 };
    const double interval = 0.05;
    const struct timespec nap = {.tv_nsec = NAP_NANOSECONDS};
    double asked = clock_seconds();
    for (int looks = 0;; looks++) {
        cudaError_t state = event ? cudaEventQuery(event) : cudaStreamQuery(stream);
        if (state != cudaErrorNotReady) {
            CUDA_TRY(state);
            return OK;
        }
        (void)cudaGetLastError(); /* else a later launch would report it */
        if (looks < BUSY_LOOKS) {
            sched_yield();
            continue;
        }
        nanosleep(&nap, NULL);
        if (!o->watch || clock_seconds() - asked < interval) continue;
        TRY(o->watch(o->watch_arg));
        asked = clock_seconds();
    }
}

/* The copy goes beside the ops, which have moved on. */
static int download_marked(struct ops *o, void *to_host, const void *from, size_t bytes, int i)
{
    struct cuda *c = cuda__of(o);
    TRY(cuda__await(o, c->stream, c->mark[i]));
    CUDA_TRY(cudaMemcpyAsync(to_host, from, bytes, cudaMemcpyDeviceToHost, c->copy_stream));
    return cuda__await(o, c->copy_stream, NULL);
}

/* ---- scratch ---- */

/* Lanes are cut into pieces of this many tokens, long ones into so many larger pieces: fixed by the configuration, so
 * that a sequence's result does not depend on its neighbours. Few lanes need many pieces to fill the device. A long
 * lane's pieces are as many as eight heads need to give every block one. */
static void choose_pieces(struct cuda *c, const struct ops_limits *limits)
{
    enum { SHORT = 64, LONG = 704, MANY_SEQUENCES = 16, MOST_PIECES = 48 };
    c->split_tokens = limits->max_seqs < MANY_SEQUENCES ? SHORT : LONG;
    c->most_pieces = MOST_PIECES;
}

/* What lives from one launch to the next, in front of the families' scratch. */
static int place_lasting(struct cuda *c, const struct ops_limits *limits, struct arena *arena)
{
    static const char label[] = "op scratch";
    choose_pieces(c, limits);
    const int pieces = (limits->max_context + c->split_tokens - 1) / c->split_tokens + 1; /* of a full lane */
    c->work_capacity = limits->max_seqs * (pieces < c->most_pieces ? pieces : c->most_pieces);
    c->n_counters = limits->max_seqs * limits->max_heads;
    if (c->n_counters < CUDA_LEAST_COUNTERS) c->n_counters = CUDA_LEAST_COUNTERS;
    size_t lanes = (size_t)limits->max_lanes;
    TRY(arena_take(arena, lanes * (size_t)c->work_capacity * 4 * sizeof(int32_t), label, &c->work_item));
    TRY(arena_take(arena, lanes * sizeof(int32_t), label, &c->work_count));
    if (limits->aged) {
        TRY(arena_take(arena, lanes * (size_t)c->work_capacity * 4 * sizeof(int32_t), label, &c->aged_item));
        TRY(arena_take(arena, lanes * sizeof(int32_t), label, &c->aged_count));
    }
    TRY(arena_take(arena, CUDA_WORKSPACE_BYTES, label, &c->workspace));
    return arena_take(arena, (size_t)c->n_counters * sizeof(int32_t), label, &c->counter);
}

static int reserve(struct ops *o, const struct ops_limits *limits, size_t *bytes, bool measure)
{
    static int (*const families[])(const struct cuda *, const struct ops_limits *, struct arena *) = {
        cuda__kv_measure,    cuda__decode_measure,   cuda__quantised_measure, cuda__listed_measure,
        cuda__probe_measure, cuda__expected_measure, cuda__sample_measure,    cuda__aged_measure};
    struct cuda *c = cuda__of(o), planned = *c;
    struct arena arena;
    size_t most = ARENA_ALIGNMENT;
    arena_measure(&arena);
    TRY(place_lasting(&planned, limits, &arena));
    const size_t lasting = arena.used;
    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++) {
        arena_measure(&arena);
        TRY(families[i](&planned, limits, &arena));
        most = arena.used > most ? arena.used : most;
    }
    *bytes = lasting + most;
    c->limits = *limits;
    if (measure) return OK;
    if (c->scratch) memory_give_back(o, c->scratch, c->scratch_bytes);
    c->scratch = NULL;
    TRY(memory_take(o, *bytes, &c->scratch));
    arena_init(&arena, c->scratch, *bytes);
    TRY(place_lasting(c, limits, &arena));
    c->scratch_first = lasting;
    c->scratch_bytes = *bytes;
    return OK;
}

int cuda__scratch(struct ops *o, struct arena *arena)
{
    struct cuda *c = cuda__of(o);
    if (!c->scratch) FAIL(ERR_BUG, "cuda: an op needs scratch before ops_reserve");
    arena_init(arena, (char *)c->scratch + c->scratch_first, c->scratch_bytes - c->scratch_first);
    return OK;
}

static void forget_steps(struct ops *o)
{
    (void)cudaStreamSynchronize(cuda__of(o)->stream);
    cuda__graphs_close(cuda__of(o));
}

/* One format for all lanes that a step reads. */
static int attention_decode(struct ops *o, struct tensor out, struct tensor q, float *log_sum,
                            const struct seq_batch *batch, const struct kv_view *kv,
                            const struct attention_heads *heads)
{
    return kv->format == KV_PLAIN ? cuda__attention_decode(o, out, q, log_sum, batch, kv, heads)
                                  : cuda__attention_quantised(o, out, q, log_sum, batch, kv, heads);
}

const struct ops_vt ops_cuda = {
    .name = "cuda",
    .device_count = count_devices,
    .open = open_cuda,
    .close = close_cuda,
    .use_dtype = use_dtype,
    .memory_free = memory_free,
    .reserve = reserve,
    .memory_take = memory_take,
    .memory_give_back = memory_give_back,
    .host_take = host_take,
    .host_give_back = host_give_back,
    .upload = cuda__upload,
    .download = cuda__download,
    .copy = copy,
    .zero = zero,
    .finish = finish,
    .forget_steps = forget_steps,
    .run_step = cuda__run_step,
    .bucket = cuda__bucket,
    .graph_bytes = cuda__graph_bytes,
    .mark = mark,
    .download_marked = download_marked,
    .aside_begin = cuda__aside_begin,
    .aside_join = cuda__aside_join,
    .aside_end = cuda__aside_end,
    .ceilings = cuda__ceilings,
    .fill_normal = cuda__fill_normal,
    .embed = cuda__embed,
    .gather_rows = cuda__gather_rows,
    .scatter_rows = cuda__scatter_rows,
    .decode_inputs = cuda__decode_inputs,
    .rms_norm = cuda__rms_norm,
    .add_rms_norm = cuda__add_rms_norm,
    .layer_norm = cuda__layer_norm,
    .add = cuda__add,
    .linear = cuda__linear,
    .rope = cuda__rope,
    .swiglu = cuda__swiglu,
    .linear_swiglu = cuda__linear_swiglu,
    .activate = cuda__activate,
    .image_patches = cuda__image_patches,
    .attention_vision = cuda__attention_vision,
    .attention_prefill = cuda__attention_prefill,
    .decode_begin = cuda__decode_begin,
    .attention_decode = attention_decode,
    .attention_decode_aged = cuda__attention_decode_aged,
    .attention_decode_listed = cuda__attention_decode_listed,
    .attention_probe = cuda__attention_probe,
    .judge_columns = cuda__judge_columns,
    .cluster_bytes = cuda__cluster_bytes,
    .cluster_keys = cuda__cluster_keys,
    .select_clusters = cuda__select_clusters,
    .kv_reset = cuda__kv_reset,
    .kv_append = cuda__kv_append,
    .rope_append = cuda__rope_append,
    .kv_pack = cuda__kv_pack,
    .list_others = cuda__list_others,
    .kv_split = cuda__kv_split,
    .recall = cuda__recall,
    .kv_drop = cuda__kv_drop,
    .kv_quantise = cuda__kv_quantise,
    .kv_widen = cuda__kv_widen,
    .kv_age = cuda__kv_age,
    .kv_release = cuda__kv_release,
    .select_top = cuda__select_top,
    .split_budgets = cuda__split_budgets,
    .heavy_begin = cuda__heavy_begin,
    .heavy_decode = cuda__heavy_decode,
    .average_pool = cuda__average_pool,
    .page_bounds = cuda__page_bounds,
    .pick_pages = cuda__pick_pages,
    .sum_fixed = cuda__sum_fixed,
    .select_rows = cuda__select_rows,
    .expected_attention = cuda__expected_attention,
    .unshard_columns = cuda__unshard_columns,
    .sample = cuda__sample,
    .sampling_begin = cuda__sampling_begin,
};
