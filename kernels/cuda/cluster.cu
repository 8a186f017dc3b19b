/* k-means of keys by cosine (ClusterKV), all lanes of a slot side by side.
 *
 * A round is four kernels. assign: a block holds 256 keys in registers as fragments, streams the centres past them and
 * keeps a running best; similarities are never written. Centres have length 1 and are two 16-bit numbers each, the
 * rounded one and what rounding left, so that products are as good as float32's while keys are exact anyway.
 * scan, place: a stable counting sort of entries by label, in chunks. mean: a block a cluster adds its keys up in the
 * order of the sort. With a list each lane has its own numbers of entries and clusters, below the job's; what lies
 * beyond is not there. Counters are integers and sums have one order: the result depends on the keys and centres alone.
 * Of keys in 8 bits the codes are compared, for a key's length does not matter to its cosine; centres and means are of
 * what codes and scales stand for. */
#include "kernels/cuda/attention_instructions.cuh"
#include "kernels/cuda/quantised.cuh"

enum {
    WARP = 32,
    KEYS_A_BLOCK = 256, /* 8 warps of 32 */
    TILE = 32,          /* centres in shared memory, twice */
    MOST_CHUNKS = 32,
    SHORTEST_CHUNK = 256,
    MEAN_THREADS = 128,
    COLUMNS = 16, /* threads for the 16-byte pieces of a key */
    PARTS = MEAN_THREADS / COLUMNS,
    SCAN_THREADS = 1024,
    WIDEST = 128
};

struct cluster_arguments {
    struct kv_view kv;
    struct cluster_job job;
    int first_lane;    /* in the cache */
    int64_t first_row; /* in the arrays of kv_clusters */
    int max_clusters, max_entries;
    void *centroid;
    int32_t *size, *entry;
    void *unit;     /* [n_lanes, n_clusters, 2, width]: rounded, the rest */
    int32_t *label; /* [n_lanes, n_entries] */
    int32_t *count; /* [n_lanes, n_chunks, n_clusters]: entries, then where the next one goes */
    int width, n_chunks, chunk;
};

/* How much of the job is this lane's. Strides of arrays are the job's. */
__device__ static int entries_of(const struct cluster_arguments &a, int lane)
{
    return a.job.index ? min(a.job.count[lane].n_entries, a.job.n_entries) : a.job.n_entries;
}
__device__ static int clusters_of(const struct cluster_arguments &a, int lane)
{
    return a.job.index ? min(a.job.count[lane].n_clusters, a.job.n_clusters) : a.job.n_clusters;
}

/* Where a key of the job is stored, and as what. */
struct stored_key {
    const void *at; /* its elements, or its codes */
    float scale;    /* of codes */
    enum kv_format format;
};

template <typename T> __device__ static struct stored_key find_key(const struct cluster_arguments &a, int lane, int i)
{
    const int entry = a.job.index ? a.job.index[(int64_t)lane * a.job.index_stride + i] : a.job.first_entry + i;
    struct stored_key key = {NULL, 1, lane_format(a.kv, a.first_lane + lane)};
    if (key.format == KV_PLAIN) {
        key.at = (const T *)a.kv.pool.data + cache_key(a.kv, a.first_lane + lane, entry);
        return key;
    }
    const int64_t row = code_row(a.kv, a.first_lane + lane, entry);
    key.at = (const uint8_t *)a.kv.pool.data + row * a.kv.head_dim;
    key.scale = a.kv.scale[row];
    return key;
}

/* Elements d and d + 1, of codes without their scale; d is even. */
template <typename T> __device__ static uint32_t key_pair(const struct stored_key &key, int d)
{
    if (key.format == KV_PLAIN) return *(const uint32_t *)((const T *)key.at + d);
    const uint32_t code = *(const uint16_t *)((const uint8_t *)key.at + d);
    return pack2<T>(quantise_value(key.format, (uint8_t)code), quantise_value(key.format, (uint8_t)(code >> 8)));
}

/* Elements d .. d + 7; d is a multiple of 8. */
template <typename T> __device__ static void key_piece(const struct stored_key &key, int d, float *piece)
{
    if (key.format == KV_PLAIN) {
        unpack8<T>(*(const uint4 *)((const T *)key.at + d), piece);
        return;
    }
    const uint2 code = *(const uint2 *)((const uint8_t *)key.at + d);
#pragma unroll
    for (int j = 0; j < 8; j++)
        piece[j] = quantise_value(key.format, (uint8_t)((j < 4 ? code.x : code.y) >> j % 4 * 8)) * key.scale;
}

/* Stores a centre, thread d its dimension d (0 beyond the heads' dimensions): as it is, and at length 1 in two parts.
 */
template <typename T>
__device__ static void store_centre(const struct cluster_arguments &a, int lane, int cluster, float value)
{
    const int d = (int)threadIdx.x, dim = a.kv.head_dim;
    const float square = block_sum(value * value);
    const float unit = square > 0 ? value / sqrtf(square) : 0;
    T *to = (T *)a.unit + ((int64_t)lane * a.job.n_clusters + cluster) * 2 * a.width;
    if (d < dim)
        ((T *)a.centroid)[((a.first_row + lane) * a.max_clusters + a.job.first_cluster + cluster) * dim + d] =
            from_float<T>(value);
    if (d >= a.width) return;
    const T rounded = from_float<T>(unit);
    to[d] = rounded;
    to[a.width + d] = from_float<T>(unit - to_float(rounded));
}

template <typename T> __global__ static void __launch_bounds__(WIDEST) start_kernel(struct cluster_arguments a)
{
    let_successor_start();
    wait_for_predecessor();
    const int cluster = (int)blockIdx.x, lane = (int)blockIdx.y, d = (int)threadIdx.x;
    const int n_entries = entries_of(a, lane);
    if (cluster >= clusters_of(a, lane) || n_entries < 1) return;
    int i = a.job.centre[(int64_t)lane * a.job.n_clusters + cluster];
    i = i < 0 ? 0 : i < n_entries ? i : n_entries - 1;
    const struct stored_key key = find_key<T>(a, lane, i);
    float value = 0;
    if (d < a.kv.head_dim) {
        const float2 pair = unpack2<T>(key_pair<T>(key, d & ~1));
        value = (d & 1 ? pair.y : pair.x) * key.scale;
    }
    store_centre<T>(a, lane, cluster, value);
}

/* ---- assign ---- */

/* A fragments of 16 keys from `first` on; zeros for keys and dimensions that are not there. */
template <typename T, int STEPS>
__device__ static void load_keys(const struct cluster_arguments &a, int lane, int first, int n_entries,
                                 uint32_t (*fragment)[4])
{
    const int thread = (int)threadIdx.x % WARP, low = first + thread / 4, high = low + 8, dim = a.kv.head_dim;
    struct stored_key key[2] = {};
    if (low < n_entries) key[0] = find_key<T>(a, lane, low);
    if (high < n_entries) key[1] = find_key<T>(a, lane, high);
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int column = 16 * k + i / 2 * 8 + thread % 4 * 2;
            fragment[k][i] = key[i % 2].at && column < dim ? key_pair<T>(key[i % 2], column) : 0;
        }
}

/* Begins the copy of TILE centres from `first` on: rounded parts, then rests, a row of PITCH each. */
template <typename T, int STEPS>
__device__ static void fetch_centres(const struct cluster_arguments &a, int lane, int first, int n_clusters, T *stage)
{
    enum { WIDTH = 16 * STEPS, PITCH = WIDTH + 8, PIECES = WIDTH / 8 };
    const T *unit = (const T *)a.unit + (int64_t)lane * a.job.n_clusters * 2 * WIDTH;
    for (int i = (int)threadIdx.x; i < 2 * TILE * PIECES; i += KEYS_A_BLOCK) {
        const int row = i / PIECES, piece = i % PIECES, part = row / TILE, cluster = first + row % TILE;
        const bool there = cluster < n_clusters;
        copy_16(shared_address(stage + row * PITCH + 8 * piece),
                unit + ((int64_t)(there ? cluster : 0) * 2 + part) * WIDTH + 8 * piece, there);
    }
    copies_begin();
}

/* The best centre of each of a thread's 4 keys so far. */
struct best {
    float score[4];
    int cluster[4];
};

/* 8 centres of the stage against a warp's 32 keys. */
template <typename T, int STEPS>
__device__ static void compare_8(int n_clusters, const T *stage, int in_stage, int cluster,
                                 const uint32_t (*keys)[STEPS][4], struct best *best)
{
    enum { PITCH = 16 * STEPS + 8 };
    const int thread = (int)threadIdx.x % WARP, matrix = thread / 8;
    const uint32_t from = shared_address(stage + (matrix / 2 * TILE + in_stage + thread % 8) * PITCH + matrix % 2 * 8);
    float sum[2][4] = {};
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        uint32_t centre[4]; /* rounded: low and high half of the step; the rest: both halves */
        load_matrices(centre, from + (uint32_t)(32 * k));
#pragma unroll
        for (int m = 0; m < 2; m++) {
            const uint32_t *key = keys[m][k];
            mma_16816<T>(sum[m], key[0], key[1], key[2], key[3], centre[0], centre[1]);
            mma_16816<T>(sum[m], key[0], key[1], key[2], key[3], centre[2], centre[3]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int c = cluster + thread % 4 * 2 + j;
            const float score = sum[i / 2][i % 2 * 2 + j];
            if (c < n_clusters && score > best->score[i]) best->score[i] = score, best->cluster[i] = c;
        }
}

/* Grid: blocks of keys x lanes. Centres come in rising order, so the first of equal ones stays. */
template <typename T, int STEPS>
__global__ static void __launch_bounds__(KEYS_A_BLOCK) assign_kernel(struct cluster_arguments a)
{
    enum { PITCH = 16 * STEPS + 8 };
    __shared__ __align__(16) T stage[2][2 * TILE * PITCH];
    let_successor_start();
    wait_for_predecessor();
    const int lane = (int)blockIdx.y, thread = (int)threadIdx.x % WARP;
    const int first = (int)blockIdx.x * KEYS_A_BLOCK + (int)threadIdx.x / WARP * 32;
    const int n_entries = entries_of(a, lane), n_clusters = clusters_of(a, lane);
    if ((int)blockIdx.x * KEYS_A_BLOCK >= n_entries) return;
    uint32_t keys[2][STEPS][4];
    struct best best;
    for (int i = 0; i < 4; i++) best.score[i] = -INFINITY, best.cluster[i] = 0;
    fetch_centres<T, STEPS>(a, lane, 0, n_clusters, stage[0]);
    load_keys<T, STEPS>(a, lane, first, n_entries, keys[0]);
    load_keys<T, STEPS>(a, lane, first + 16, n_entries, keys[1]);
    for (int c = 0, at = 0; c < n_clusters; c += TILE, at ^= 1) {
        copies_end();
        __syncthreads(); /* this stage is whole, and nobody reads the other one any more */
        if (c + TILE < n_clusters) fetch_centres<T, STEPS>(a, lane, c + TILE, n_clusters, stage[at ^ 1]);
        for (int i = 0; i < TILE && c + i < n_clusters; i += 8)
            compare_8<T, STEPS>(n_clusters, stage[at], i, c + i, keys, &best);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float score = best.score[i];
        int cluster = best.cluster[i];
        for (int step = 1; step < 4; step *= 2) {
            const float other = __shfl_xor_sync(~0u, score, step);
            const int its = __shfl_xor_sync(~0u, cluster, step);
            if (other > score || (other == score && its < cluster)) score = other, cluster = its;
        }
        const int key = first + i / 2 * 16 + i % 2 * 8 + thread / 4;
        if (thread % 4 || key >= n_entries) continue;
        a.label[(int64_t)lane * a.job.n_entries + key] = cluster;
        atomicAdd(&a.count[((int64_t)lane * a.n_chunks + key / a.chunk) * a.job.n_clusters + cluster], 1);
    }
}

/* ---- sort ---- */

/* What the threads before this one bring in all; whole block. */
__device__ static int block_before(int x, int *total)
{
    __shared__ int part[33];
    const int warp = (int)threadIdx.x / WARP, thread = (int)threadIdx.x % WARP, n_warps = (int)blockDim.x / WARP;
    int upto = x;
    for (int step = 1; step < WARP; step *= 2) {
        const int below = __shfl_up_sync(~0u, upto, step);
        if (thread >= step) upto += below;
    }
    __syncthreads();
    if (thread == WARP - 1) part[warp] = upto;
    __syncthreads();
    if (warp == 0) {
        int mine = thread < n_warps ? part[thread] : 0, sum = mine;
        for (int step = 1; step < WARP; step *= 2) {
            const int below = __shfl_up_sync(~0u, sum, step);
            if (thread >= step) sum += below;
        }
        part[thread] = sum - mine;
        if (thread == WARP - 1) part[32] = sum;
    }
    __syncthreads();
    *total = part[32];
    return part[warp] + upto - x;
}

/* Sizes of the clusters, and in `count` where each chunk's first entry of each cluster goes. A block a lane. */
__global__ static void __launch_bounds__(SCAN_THREADS) scan_kernel(struct cluster_arguments a)
{
    let_successor_start();
    wait_for_predecessor();
    const int lane = (int)blockIdx.x, n = a.job.n_clusters;
    int32_t *count = a.count + (int64_t)lane * a.n_chunks * n;
    int32_t *size = a.size + (a.first_row + lane) * a.max_clusters + a.job.first_cluster;
    int placed = 0;
    for (int first = 0; first < n; first += SCAN_THREADS) {
        const int c = first + (int)threadIdx.x;
        int mine = 0, total;
        for (int chunk = 0; chunk < a.n_chunks && c < n; chunk++) mine += count[(int64_t)chunk * n + c];
        int at = placed + block_before(mine, &total);
        placed += total;
        if (c >= n) continue;
        size[c] = mine;
        for (int chunk = 0; chunk < a.n_chunks; chunk++) {
            const int here = count[(int64_t)chunk * n + c];
            count[(int64_t)chunk * n + c] = at;
            at += here;
        }
    }
}

/* Entries of a chunk to their places, 32 at a time in their order. A warp a chunk, grid: chunks x lanes. */
__global__ static void __launch_bounds__(WARP) place_kernel(struct cluster_arguments a)
{
    let_successor_start();
    wait_for_predecessor();
    const int chunk = (int)blockIdx.x, lane = (int)blockIdx.y, thread = (int)threadIdx.x;
    const int end = min((chunk + 1) * a.chunk, entries_of(a, lane));
    const int32_t *label = a.label + (int64_t)lane * a.job.n_entries;
    volatile int32_t *next = a.count + ((int64_t)lane * a.n_chunks + chunk) * a.job.n_clusters;
    int32_t *entry = a.entry + (a.first_row + lane) * a.max_entries + a.job.first_place;
    for (int first = chunk * a.chunk; first < end; first += WARP) {
        const int i = first + thread, mine = i < end ? label[i] : -1;
        const unsigned same = __match_any_sync(~0u, mine);
        const int at = i < end ? next[mine] : 0;
        __syncwarp();
        if (i < end) entry[at + __popc(same & ((1u << thread) - 1))] = a.job.index ? ~i : a.job.first_entry + i;
        if (i < end && __ffs((int)same) - 1 == thread) next[mine] = at + __popc(same);
        __syncwarp();
    }
}

/* ---- mean ---- */

/* Grid: clusters x lanes. Thread (part, column) adds every PARTS-th key's piece; parts are then added in their order.
 */
template <typename T> __global__ static void __launch_bounds__(MEAN_THREADS) mean_kernel(struct cluster_arguments a)
{
    __shared__ float sums[PARTS][WIDEST];
    let_successor_start();
    wait_for_predecessor();
    const int cluster = (int)blockIdx.x, lane = (int)blockIdx.y, n = a.job.n_clusters;
    const int size = a.size[(a.first_row + lane) * a.max_clusters + a.job.first_cluster + cluster];
    if (size == 0) return; /* keeps its centre */
    const int last = a.count[((int64_t)lane * a.n_chunks + a.n_chunks - 1) * n + cluster];
    const int32_t *entry = a.entry + (a.first_row + lane) * a.max_entries + a.job.first_place + last - size;
    const int column = (int)threadIdx.x % COLUMNS, part = (int)threadIdx.x / COLUMNS, d = (int)threadIdx.x;
    float sum[8] = {};
    if (8 * column < a.kv.head_dim)
#pragma unroll 4
        for (int i = part; i < size; i += PARTS) {
            float piece[8];
            key_piece<T>(find_key<T>(a, lane, a.job.index ? ~entry[i] : entry[i] - a.job.first_entry), 8 * column,
                         piece);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += piece[j];
        }
#pragma unroll
    for (int j = 0; j < 8; j++) sums[part][8 * column + j] = sum[j];
    __syncthreads();
    float value = 0;
    for (int p = 0; p < PARTS; p++) value += sums[p][d];
    store_centre<T>(a, lane, cluster, value / (float)size);
}

/* ---- the op ---- */

static int width_of(int head_dim) { return head_dim <= 64 ? 64 : WIDEST; }

static int place_work(int n_lanes, int head_dim, int n_entries, int n_chunks, int n_clusters, struct arena *arena,
                      struct cluster_arguments *a)
{
    static const char label[] = "cluster work";
    const size_t lanes = (size_t)n_lanes, clusters = (size_t)n_clusters;
    TRY(arena_take(arena, lanes * clusters * 2 * (size_t)width_of(head_dim) * 2, label, &a->unit));
    TRY(arena_take(arena, lanes * (size_t)n_entries * sizeof *a->label, label, &a->label));
    return arena_take(arena, lanes * (size_t)n_chunks * clusters * sizeof *a->count, label, &a->count);
}

size_t cuda__cluster_bytes(const struct ops *o, int n_lanes, int head_dim, int max_entries, int max_clusters)
{
    struct arena arena;
    struct cluster_arguments a = {};
    (void)o;
    arena_measure(&arena);
    /* A measuring arena refuses nothing. */
    if (place_work(n_lanes, head_dim, max_entries, MOST_CHUNKS, max_clusters, &arena, &a)) return 0;
    return arena.used;
}

template <typename T> static int assign(struct ops *o, const struct cluster_arguments &a, int n_lanes)
{
    const int n = a.job.n_entries;
    const dim3 grid((unsigned)(n + KEYS_A_BLOCK - 1) / KEYS_A_BLOCK, (unsigned)n_lanes), block(KEYS_A_BLOCK);
    CUDA_TRY(cudaMemsetAsync(a.count, 0, sizeof *a.count * (size_t)n_lanes * (size_t)a.n_chunks * a.job.n_clusters,
                             cuda__of(o)->stream));
    if (a.width == 64)
        TRY(cuda__launch(o, "cluster_assign", assign_kernel<T, 4>, grid, block, 0, a));
    else
        TRY(cuda__launch(o, "cluster_assign", assign_kernel<T, 8>, grid, block, 0, a));
    TRY(cuda__launch(o, "cluster_scan", scan_kernel, dim3((unsigned)n_lanes), dim3(SCAN_THREADS), 0, a));
    return cuda__launch(o, "cluster_place", place_kernel, dim3((unsigned)a.n_chunks, (unsigned)n_lanes), dim3(WARP), 0,
                        a);
}

template <typename T> static int cluster_keys(struct ops *o, const struct cluster_arguments &a, int n_lanes)
{
    const dim3 grid((unsigned)a.job.n_clusters, (unsigned)n_lanes);
    TRY(cuda__launch(o, "cluster_start", start_kernel<T>, grid, dim3(WIDEST), 0, a));
    for (int i = 0; i < a.job.iterations; i++) {
        TRY(assign<T>(o, a, n_lanes));
        TRY(cuda__launch(o, "cluster_mean", mean_kernel<T>, grid, dim3(MEAN_THREADS), 0, a));
    }
    return assign<T>(o, a, n_lanes);
}

int cuda__cluster_keys(struct ops *o, const struct kv_view *kv, const struct kv_clusters *clusters,
                       const struct cluster_job *job)
{
    struct cluster_arguments a = {};
    struct arena arena;
    const int n_lanes = job->n_lanes ? job->n_lanes : clusters->n_lanes,
              even = (job->n_entries + MOST_CHUNKS - 1) / MOST_CHUNKS;
    if (kv->head_dim % 8 || kv->head_dim > WIDEST || n_lanes > 65535)
        FAIL(ERR_UNSUPPORTED, "cuda: clusters of keys of %d dimensions in %d lanes, served are steps of 8 up to %d",
             kv->head_dim, n_lanes, WIDEST);
    a.kv = *kv;
    a.job = *job;
    a.first_lane = job->slot * kv->lanes_per_slot + clusters->first_lane + job->first_lane;
    a.first_row = (int64_t)job->slot * clusters->n_lanes + job->first_lane;
    a.max_clusters = clusters->max_clusters, a.max_entries = clusters->max_entries;
    a.centroid = clusters->centroid.data, a.size = clusters->size, a.entry = clusters->entry;
    a.width = width_of(kv->head_dim);
    a.chunk = even < SHORTEST_CHUNK ? SHORTEST_CHUNK : (even + WARP - 1) / WARP * WARP;
    a.n_chunks = (job->n_entries + a.chunk - 1) / a.chunk;
    arena_init(&arena, clusters->work,
               cuda__cluster_bytes(o, clusters->n_lanes, kv->head_dim, clusters->max_entries, clusters->max_clusters));
    TRY(place_work(n_lanes, kv->head_dim, job->n_entries, a.n_chunks, job->n_clusters, &arena, &a));
    WITH_TYPE(o->dtype, T, return cluster_keys<T>(o, a, n_lanes));
}
