/* The paged cache: append, pack, release. Pages are popped and pushed with integer counters, so that which number a
 * lane gets may vary from run to run, and nothing else can. Every op leaves free pages + pages below the lanes' lengths
 * = all pages, also when it reports an error. */
#include "kernels/cuda/lanes.cuh"

__global__ static void reset_kernel(struct kv_view kv)
{
    wait_for_predecessor();
    const int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = first; i < kv.n_pages; i += step) kv.free_stack[i] = kv.n_pages - 1 - (int32_t)i;
    for (int64_t i = first; i < (int64_t)kv.n_slots * kv.lanes_per_slot; i += step) {
        kv.lane_len[i] = 0;
        if (kv.lane_format) kv.lane_format[i] = KV_PLAIN;
    }
    if (first == 0) *kv.free_count = kv.n_pages, *kv.error = 0;
}

int cuda__kv_reset(struct ops *o, const struct kv_view *kv)
{
    return cuda__launch(o, "kv_reset", reset_kernel, dim3(512), dim3(256), 0, *kv);
}

/* ---- decode: one token a lane, a warp each ---- */

/* A key or value of a quantised lane from where it lies; a whole warp. */
template <typename T>
__device__ static void put_row(const struct kv_view &kv, int lane, int64_t row, const uint32_t *from)
{
    const int i = (int)threadIdx.x % WARP, j = i + WARP, words = kv.head_dim / 2;
    put_codes<T>(kv, lane_format(kv, lane), row, i, i < words ? from[i] : 0, j, j < words ? from[j] : 0);
}

template <typename T>
__global__ static void append_one_kernel(struct kv_view kv, int lane_of_layer, int n_kv_heads, const T *k,
                                         int64_t k_stride, const T *v, int64_t v_stride, const int32_t *slot,
                                         int n_seqs)
{
    let_successor_start();
    wait_for_predecessor();
    const int item = (int)blockIdx.x * LANES_A_BLOCK + (int)threadIdx.x / WARP, thread = (int)threadIdx.x % WARP;
    const int row = item / n_kv_heads, head = item % n_kv_heads, dim = kv.head_dim;
    if (row >= n_seqs || slot[row] < 0 || slot[row] >= kv.n_slots) return;
    const int lane = cache_lane(kv, slot[row], lane_of_layer + head), at = grow_lane(kv, lane, 1);
    if (at < 0) return;
    __syncwarp();
    const T *from_k = k + row * k_stride + (int64_t)head * dim, *from_v = v + row * v_stride + (int64_t)head * dim;
    if (lane_format(kv, lane) != KV_PLAIN) {
        const int64_t key = code_row(kv, lane, at);
        put_row<T>(kv, lane, key, (const uint32_t *)from_k);
        put_row<T>(kv, lane, key + code_tokens(kv), (const uint32_t *)from_v);
        return;
    }
    T *to = (T *)kv.pool.data + cache_key(kv, lane, at);
    for (int i = thread; i < dim / 2; i += WARP) {
        ((uint32_t *)to)[i] = ((const uint32_t *)from_k)[i];
        ((uint32_t *)(to + (int64_t)kv.page_size * dim))[i] = ((const uint32_t *)from_v)[i];
    }
}

/* ---- prompts: lanes grow first, then rows are written by many blocks ---- */

/* first[sequence, head]: where the lane's new tokens begin; -1: it did not grow. */
__global__ static void grow_kernel(struct kv_view kv, int lane_of_layer, int n_kv_heads, const int32_t *slot,
                                   const int32_t *cu_seqlens, int n_seqs, int32_t *first)
{
    let_successor_start();
    wait_for_predecessor();
    const int item = (int)blockIdx.x * LANES_A_BLOCK + (int)threadIdx.x / WARP;
    const int i = item / n_kv_heads, head = item % n_kv_heads;
    if (i >= n_seqs) return;
    const int n = cu_seqlens[i + 1] - cu_seqlens[i];
    int at = -1;
    if (slot[i] >= 0 && slot[i] < kv.n_slots && n > 0) {
        const int lane = cache_lane(kv, slot[i], lane_of_layer + head);
        if (lane_format(kv, lane) == KV_PLAIN)
            at = grow_lane(kv, lane, n);
        else if (threadIdx.x % WARP == 0)
            atomicOr(kv.error, KV_ERROR_QUANTISED);
    }
    if (threadIdx.x % WARP == 0) first[item] = at;
}

/* ---- the same with the turn of rotary embedding ---- */

enum { TURN_WARPS = 8, TURN_HALF_MOST = 64 };

struct turn_arguments {
    struct kv_view kv;
    void *q;
    const void *k, *v;
    int64_t q_stride, k_stride, v_stride;
    int lane, n_heads, n_kv_heads, n_seqs;
    const int32_t *position, *slot, *cu_seqlens, *first; /* first NULL: decode, lanes grow here */
    const float *inverse_frequency;
    float scale;
};

/* Dimensions i, i + 1 of a head's row and their partners, turned. */
template <typename T>
__device__ static uint2 turn_pair(const T *from, int i, int half, const float *cosine, const float *sine)
{
    const float2 a = unpack2<T>(*(const uint32_t *)(from + i)), b = unpack2<T>(*(const uint32_t *)(from + half + i));
    return make_uint2(pack2<T>(a.x * cosine[i] - b.x * sine[i], a.y * cosine[i + 1] - b.y * sine[i + 1]),
                      pack2<T>(b.x * cosine[i] + a.x * sine[i], b.y * cosine[i + 1] + a.y * sine[i + 1]));
}

/* Turns a head's row, two dimensions and their partners a thread; `to` may be `from`. */
template <typename T>
__device__ static void turn_head(T *to, const T *from, int half, const float *cosine, const float *sine)
{
    for (int i = 2 * ((int)threadIdx.x % WARP); i < half; i += 2 * WARP) {
        const uint2 turned = turn_pair<T>(from, i, half, cosine, sine);
        *(uint32_t *)(to + i) = turned.x;
        *(uint32_t *)(to + half + i) = turned.y;
    }
}

/* A key of a quantised lane: as it is rounded in a plain one, then as codes. half <= TURN_HALF_MOST, a pair a thread.
 */
template <typename T>
__device__ static void turn_codes(const struct kv_view &kv, int lane, int64_t row, const T *from, int half,
                                  const float *cosine, const float *sine)
{
    const int i = (int)threadIdx.x % WARP, words = kv.head_dim / 2;
    const bool mine = 2 * i < half;
    const uint2 turned = mine ? turn_pair<T>(from, 2 * i, half, cosine, sine) : make_uint2(0, 0);
    put_codes<T>(kv, lane_format(kv, lane), row, mine ? i : words, turned.x, mine ? half / 2 + i : words, turned.y);
}

__device__ static int sequence_of(const int32_t *cu_seqlens, int n_seqs, int row);

/* Where a row's token stands in the lane of a KV head, which grows for it in decode; -1: nowhere. */
__device__ static int place_of(const struct turn_arguments &a, int row, int head, int *lane)
{
    const int i = a.first ? sequence_of(a.cu_seqlens, a.n_seqs, row) : row, slot = a.slot[i];
    if (slot < 0 || slot >= a.kv.n_slots) return -1;
    *lane = cache_lane(a.kv, slot, a.lane + head);
    if (!a.first) return grow_lane(a.kv, *lane, 1);
    const int at = a.first[i * a.n_kv_heads + head];
    return at < 0 ? -1 : at + row - a.cu_seqlens[i];
}

/* Grid: rows x shares of the heads; a warp a head. */
template <typename T> __global__ static void __launch_bounds__(TURN_WARPS *WARP) turn_kernel(struct turn_arguments a)
{
    __shared__ float cosine[TURN_HALF_MOST], sine[TURN_HALF_MOST];
    let_successor_start();
    wait_for_predecessor();
    const int row = (int)blockIdx.x, dim = a.kv.head_dim, half = dim / 2, thread = (int)threadIdx.x % WARP;
    const float place = (float)a.position[row];
    for (int i = (int)threadIdx.x; i < half; i += (int)blockDim.x) {
        float s, c;
        sincosf(place * a.inverse_frequency[i], &s, &c);
        cosine[i] = c * a.scale, sine[i] = s * a.scale;
    }
    __syncthreads();
    for (int item = (int)(blockIdx.y * TURN_WARPS + threadIdx.x / WARP); item < a.n_kv_heads + a.n_heads;
         item += (int)gridDim.y * TURN_WARPS) {
        if (item >= a.n_kv_heads) {
            T *q = (T *)a.q + row * a.q_stride + (int64_t)(item - a.n_kv_heads) * dim;
            turn_head<T>(q, q, half, cosine, sine);
            continue;
        }
        int lane = 0;
        const int at = place_of(a, row, item, &lane);
        if (at < 0) continue;
        __syncwarp();
        const T *k = (const T *)a.k + row * a.k_stride + (int64_t)item * dim;
        const uint32_t *v = (const uint32_t *)((const T *)a.v + row * a.v_stride + (int64_t)item * dim);
        if (lane_format(a.kv, lane) != KV_PLAIN) {
            const int64_t key = code_row(a.kv, lane, at);
            turn_codes<T>(a.kv, lane, key, k, half, cosine, sine);
            put_row<T>(a.kv, lane, key + code_tokens(a.kv), v);
            continue;
        }
        T *to = (T *)a.kv.pool.data + cache_key(a.kv, lane, at);
        turn_head<T>(to, k, half, cosine, sine);
        for (int i = thread; i < half; i += WARP) ((uint32_t *)(to + (int64_t)a.kv.page_size * dim))[i] = v[i];
    }
}

/* The sequence that a row belongs to. */
__device__ static int sequence_of(const int32_t *cu_seqlens, int n_seqs, int row)
{
    int low = 0, high = n_seqs;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (cu_seqlens[middle] <= row)
            low = middle;
        else
            high = middle;
    }
    return low;
}

template <typename T>
__global__ static void write_rows_kernel(struct kv_view kv, int lane_of_layer, int n_kv_heads, const T *k,
                                         int64_t k_stride, const T *v, int64_t v_stride, const int32_t *slot,
                                         const int32_t *cu_seqlens, int n_seqs, const int32_t *first)
{
    let_successor_start();
    wait_for_predecessor();
    const int row = (int)blockIdx.x, i = sequence_of(cu_seqlens, n_seqs, row), dim = kv.head_dim;
    const int words = dim / 2, page_words = kv.page_size * dim / 2;
    const uint32_t *from_k = (const uint32_t *)(k + row * k_stride), *from_v = (const uint32_t *)(v + row * v_stride);
    for (int w = (int)threadIdx.x; w < n_kv_heads * words; w += (int)blockDim.x) {
        const int head = w / words, at = first[i * n_kv_heads + head];
        if (at < 0) continue;
        uint32_t *to = (uint32_t *)((T *)kv.pool.data + cache_key(kv, cache_lane(kv, slot[i], lane_of_layer + head),
                                                                  at + row - cu_seqlens[i]));
        to[w % words] = from_k[w];
        to[page_words + w % words] = from_v[w];
    }
}

int cuda__kv_append(struct ops *o, const struct kv_view *kv, const struct attention_heads *heads, struct tensor k,
                    struct tensor v, const struct seq_batch *batch)
{
    const int items = batch->n_seqs * heads->n_kv_heads;
    const dim3 grid((unsigned)(items + LANES_A_BLOCK - 1) / LANES_A_BLOCK), block(LANES_A_BLOCK * WARP);
    if (kv->head_dim % 2 || k.stride[0] % 2 || v.stride[0] % 2)
        FAIL(ERR_UNSUPPORTED, "ops_kv_append: heads of %d dimensions in rows of %lld: the GPU moves pairs",
             kv->head_dim, (long long)k.stride[0]);
    if (!batch->cu_seqlens)
        WITH_TYPE(k.dtype, T,
                  return cuda__launch(o, "kv_append", append_one_kernel<T>, grid, block, 0, *kv, heads->lane,
                                      heads->n_kv_heads, (const T *)k.data, k.stride[0], (const T *)v.data, v.stride[0],
                                      batch->slot, batch->n_seqs));
    struct arena arena;
    int32_t *first;
    TRY(cuda__scratch(o, &arena));
    TRY(arena_take(&arena, (size_t)items * sizeof *first, "op scratch", &first));
    TRY(cuda__launch(o, "kv_append", grow_kernel, grid, block, 0, *kv, heads->lane, heads->n_kv_heads, batch->slot,
                     batch->cu_seqlens, batch->n_seqs, first));
    WITH_TYPE(k.dtype, T,
              return cuda__launch(o, "kv_append", write_rows_kernel<T>, dim3((unsigned)batch->n_tokens), dim3(256), 0,
                                  *kv, heads->lane, heads->n_kv_heads, (const T *)k.data, k.stride[0],
                                  (const T *)v.data, v.stride[0], batch->slot, batch->cu_seqlens, batch->n_seqs,
                                  (const int32_t *)first));
}

int cuda__rope_append(struct ops *o, const struct kv_view *kv, const struct attention_heads *heads, struct tensor q,
                      struct tensor k, struct tensor v, const int32_t *position, const float *inverse_frequency,
                      float scale, const struct seq_batch *batch)
{
    struct turn_arguments a = {};
    struct arena arena;
    if (kv->head_dim % 4 || kv->head_dim > 2 * TURN_HALF_MOST || (q.stride[0] | k.stride[0] | v.stride[0]) % 2)
        FAIL(ERR_UNSUPPORTED,
             "cuda: rotary embedding of heads of %d dimensions in rows of %lld, served are steps of 4 "
             "up to %d",
             kv->head_dim, (long long)q.stride[0], 2 * TURN_HALF_MOST);
    a.kv = *kv;
    a.q = q.data, a.k = k.data, a.v = v.data;
    a.q_stride = q.stride[0], a.k_stride = k.stride[0], a.v_stride = v.stride[0];
    a.lane = heads->lane, a.n_heads = heads->n_heads, a.n_kv_heads = heads->n_kv_heads, a.n_seqs = batch->n_seqs;
    a.position = position, a.slot = batch->slot, a.cu_seqlens = batch->cu_seqlens;
    a.inverse_frequency = inverse_frequency, a.scale = scale;
    if (batch->cu_seqlens) {
        const int items = batch->n_seqs * heads->n_kv_heads;
        int32_t *first;
        TRY(cuda__scratch(o, &arena));
        TRY(arena_take(&arena, (size_t)items * sizeof *first, "op scratch", &first));
        TRY(cuda__launch(o, "rope_append", grow_kernel, dim3((unsigned)(items + LANES_A_BLOCK - 1) / LANES_A_BLOCK),
                         dim3(LANES_A_BLOCK * WARP), 0, *kv, heads->lane, heads->n_kv_heads, batch->slot,
                         batch->cu_seqlens, batch->n_seqs, first));
        a.first = first;
    }
    const unsigned shares = (unsigned)(heads->n_heads + heads->n_kv_heads + TURN_WARPS - 1) / TURN_WARPS;
    const dim3 grid((unsigned)batch->n_tokens, batch->n_tokens < 256 ? shares : 1);
    WITH_TYPE(q.dtype, T, return cuda__launch(o, "rope_append", turn_kernel<T>, grid, dim3(TURN_WARPS * WARP), 0, a));
}

int cuda__kv_measure(const struct cuda *c, const struct ops_limits *limits, struct arena *arena)
{
    int32_t *first;
    (void)c;
    return arena_take(arena, (size_t)limits->max_seqs * (size_t)limits->max_heads * sizeof *first, "op scratch",
                      &first);
}

/* ---- pack and release ---- */

enum {
    MOST_PACKED = 896, /* lanes of a launch: launch arguments end at 4 KiB */
    PACK_THREADS = 256,
    PACK_ROW = 16, /* threads for an entry's piece of 16 words */
    PACK_STEP = PACK_THREADS / PACK_ROW,
    PACK_HELD = 8, /* words in a thread's registers */
    PACK_ENTRIES = PACK_STEP * PACK_HELD
};

/* How many entries each lane of a layer keeps; travels as a launch argument. */
struct keep_counts {
    int32_t n[MOST_PACKED];
};

/* Where a lane's entry stands: its row in the pool. */
__device__ static int64_t row_of(const struct kv_view &kv, int lane, int entry)
{
    const int64_t page = kv.page_row[(int64_t)lane * kv.max_pages + entry / kv.page_size];
    return page * 2 * kv.page_size + entry % kv.page_size;
}

/* Moves kept entries left, a block for each lane, half (K, V) and slice of a row. Entries are ascending, so a round's
 * targets lie below the sources of all later rounds; within a round everything is read before anything is written.
 * Half of the threads look up where the next round's entries stand, half where they go, while this round's arrive. */
template <typename W>
__global__ static void __launch_bounds__(PACK_THREADS)
    pack_kernel(struct kv_view kv, int first_lane, const int32_t *keep, int keep_stride, struct keep_counts counts,
                int element)
{
    __shared__ int64_t place[3][2][PACK_ENTRIES]; /* of the round before, this one, the next: sources, targets */
    let_successor_start();
    wait_for_predecessor();
    const int lane = first_lane + (int)blockIdx.x, n = counts.n[blockIdx.x], length = kv.lane_len[lane];
    const int word = (int)(blockIdx.z * PACK_ROW + threadIdx.x % PACK_ROW), step = (int)threadIdx.x / PACK_ROW;
    const int words = kv.head_dim * element / (int)sizeof(W);
    const int most = lane_format(kv, lane) != KV_PLAIN ? 0 : n < length ? n : length;
    const int look = (int)threadIdx.x % PACK_ENTRIES, target = (int)threadIdx.x / PACK_ENTRIES;
    W *const pool = (W *)kv.pool.data + (int64_t)blockIdx.y * kv.page_size * words + word;
    int64_t looked = 0;
    keep += (int64_t)blockIdx.x * keep_stride;
    for (int first = -PACK_ENTRIES, round = 2; first < most; first += PACK_ENTRIES) {
        const int j = first + PACK_ENTRIES + look, next = round == 2 ? 0 : round + 1;
        W held[PACK_HELD];
#pragma unroll
        for (int i = 0; i < PACK_HELD; i++) {
            const int at = i * PACK_STEP + step;
            if (first >= 0 && first + at < most && word < words) held[i] = pool[place[round][0][at] * words];
        }
        if (j < most) {
            int entry = target ? j : keep[j];
            entry = entry < j ? j : entry >= length ? length - 1 : entry; /* stay inside the lane whatever is given */
            looked = row_of(kv, lane, entry);
        }
        place[next][target][look] = looked;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < PACK_HELD; i++) {
            const int at = i * PACK_STEP + step;
            if (first >= 0 && first + at < most && word < words) pool[place[round][1][at] * words] = held[i];
        }
        round = next;
    }
}

__global__ static void shrink_kernel(struct kv_view kv, int first_lane, int n_lanes, struct keep_counts counts,
                                     bool to_nothing)
{
    let_successor_start();
    wait_for_predecessor();
    const int i = (int)blockIdx.x * LANES_A_BLOCK + (int)threadIdx.x / WARP;
    if (i >= n_lanes) return;
    const bool quantised = lane_format(kv, first_lane + i) != KV_PLAIN;
    if (quantised && !to_nothing) {
        if (threadIdx.x % WARP == 0) atomicOr(kv.error, KV_ERROR_QUANTISED);
        return;
    }
    shrink_lane(kv, first_lane + i, to_nothing ? 0 : counts.n[i]);
    __syncwarp(); /* all know how it was stored */
    if (quantised && threadIdx.x % WARP == 0) kv.lane_format[first_lane + i] = KV_PLAIN;
}

template <typename W>
static int launch_pack(struct ops *o, const struct kv_view *kv, int first_lane, int n_lanes, const int32_t *keep,
                       int keep_stride, const struct keep_counts &counts)
{
    const int element = (int)dtype_size(kv->pool.dtype), words = kv->head_dim * element / (int)sizeof(W);
    const dim3 grid((unsigned)n_lanes, 2, (unsigned)(words + PACK_ROW - 1) / PACK_ROW);
    return cuda__launch(o, "kv_pack", pack_kernel<W>, grid, dim3(PACK_THREADS), 0, *kv, first_lane, keep, keep_stride,
                        counts, element);
}

int cuda__kv_pack(struct ops *o, const struct kv_view *kv, int slot, int lane, int n_lanes, const int32_t *keep,
                  int keep_stride, const int32_t *n_keep)
{
    const int row_bytes = kv->head_dim * (int)dtype_size(kv->pool.dtype);
    const bool wide = row_bytes % 16 == 0 && (uint64_t)kv->pool.data % 16 == 0;
    for (int first = 0; first < n_lanes; first += MOST_PACKED) {
        struct keep_counts counts = {};
        const int n = n_lanes - first < MOST_PACKED ? n_lanes - first : MOST_PACKED;
        const int first_lane = slot * kv->lanes_per_slot + lane + first;
        const int32_t *entries = keep + (int64_t)first * keep_stride;
        for (int i = 0; i < n; i++) counts.n[i] = n_keep[first + i];
        TRY(wide ? launch_pack<uint4>(o, kv, first_lane, n, entries, keep_stride, counts)
                 : launch_pack<uint32_t>(o, kv, first_lane, n, entries, keep_stride, counts));
        TRY(cuda__launch(o, "kv_pack", shrink_kernel, dim3((unsigned)(n + LANES_A_BLOCK - 1) / LANES_A_BLOCK),
                         dim3(LANES_A_BLOCK * WARP), 0, *kv, first_lane, n, counts, false));
    }
    return OK;
}

/* ---- to host memory ---- */

/* A warp a lane; one that holds something already stays as it is. */
__global__ static void split_grow_kernel(struct kv_view host, int first_lane, int n_lanes, struct keep_counts counts)
{
    let_successor_start();
    wait_for_predecessor();
    const int i = (int)blockIdx.x * LANES_A_BLOCK + (int)threadIdx.x / WARP;
    if (i >= n_lanes || counts.n[i] == 0) return;
    if (host.lane_len[first_lane + i] > 0) {
        if (threadIdx.x % WARP == 0) atomicOr(host.error, KV_ERROR_LANE_FULL);
        return;
    }
    (void)grow_lane(host, first_lane + i, counts.n[i]);
}

/* Grid: shares of the entries x lanes x (halves of a page, slices of a row). Rows go over the bus in whole pieces of 16
 * words. A lane that did not grow to its number gets nothing. */
template <typename W>
__global__ static void __launch_bounds__(PACK_THREADS)
    split_kernel(struct kv_view kv, struct kv_view host, int first_lane, const int32_t *index, int index_stride,
                 struct keep_counts counts, int element)
{
    let_successor_start();
    wait_for_predecessor();
    const int lane = first_lane + (int)blockIdx.y, n = counts.n[blockIdx.y], length = kv.lane_len[lane];
    const int word = (int)(blockIdx.z / 2 * PACK_ROW + threadIdx.x % PACK_ROW);
    const int words = kv.head_dim * element / (int)sizeof(W);
    const int64_t half = (int64_t)(blockIdx.z % 2) * kv.page_size * words + word;
    if (host.lane_len[lane] != n || length < 1 || word >= words) return;
    index += (int64_t)blockIdx.y * index_stride;
    for (int j = (int)(blockIdx.x * PACK_STEP + threadIdx.x / PACK_ROW); j < n; j += (int)gridDim.x * PACK_STEP) {
        const int entry = min(max(index[j], 0), length - 1); /* inside the lane whatever is given */
        ((W *)host.pool.data)[half + row_of(host, lane, j) * words] =
            ((const W *)kv.pool.data)[half + row_of(kv, lane, entry) * words];
    }
}

int cuda__kv_split(struct ops *o, const struct kv_view *kv, const struct kv_view *host, int slot, int lane, int n_lanes,
                   const int32_t *index, int index_stride, const int32_t *n_index)
{
    enum { SHARES = 16 };
    const int element = (int)dtype_size(kv->pool.dtype), row_bytes = kv->head_dim * element;
    const bool wide = row_bytes % 16 == 0 && ((uint64_t)kv->pool.data | (uint64_t)host->pool.data) % 16 == 0;
    const unsigned slices = (unsigned)(row_bytes / (wide ? 16 : 4) + PACK_ROW - 1) / PACK_ROW;
    for (int first = 0; first < n_lanes; first += MOST_PACKED) {
        struct keep_counts counts = {};
        const int n = n_lanes - first < MOST_PACKED ? n_lanes - first : MOST_PACKED;
        const int first_lane = slot * kv->lanes_per_slot + lane + first;
        for (int i = 0; i < n; i++) counts.n[i] = n_index[first + i];
        TRY(cuda__launch(o, "kv_split", split_grow_kernel, dim3((unsigned)(n + LANES_A_BLOCK - 1) / LANES_A_BLOCK),
                         dim3(LANES_A_BLOCK * WARP), 0, *host, first_lane, n, counts));
        TRY(cuda__launch(o, "kv_split", wide ? split_kernel<uint4> : split_kernel<uint32_t>,
                         dim3(SHARES, (unsigned)n, 2 * slices), dim3(PACK_THREADS), 0, *kv, *host, first_lane,
                         index + (int64_t)first * index_stride, index_stride, counts, element));
    }
    return OK;
}

int cuda__kv_release(struct ops *o, const struct kv_view *kv, int slot)
{
    struct keep_counts none = {};
    const int n = kv->lanes_per_slot;
    return cuda__launch(o, "kv_release", shrink_kernel, dim3((unsigned)(n + LANES_A_BLOCK - 1) / LANES_A_BLOCK),
                        dim3(LANES_A_BLOCK * WARP), 0, *kv, slot * n, n, none, true);
}

/* ---- drop from the middle ---- */

enum { MOST_DROPS = 128 /* of a launch */ };

struct kv_drops {
    struct kv_drop of[MOST_DROPS];
};

/* What a lane holds from d.first on after the drop; -1: it does not have the block, nothing is done. */
__device__ static int left_behind(const struct kv_drop &d, int length)
{
    return length - d.first < d.n_block ? -1 : length - d.first - d.n_block + d.n_keep;
}

/* Grid: drops x lanes x (halves of a page, slices of a row). As in pack_kernel entries only move left, in ascending
 * order: what a round writes lies below what later rounds read. The first thread of a row moves its scale, too. */
template <typename W>
__global__ static void __launch_bounds__(PACK_THREADS)
    drop_kernel(struct kv_view kv, int first_lane, const int32_t *index, struct kv_drops drops, int element)
{
    let_successor_start();
    wait_for_predecessor();
    const struct kv_drop d = drops.of[blockIdx.x];
    if ((int)blockIdx.y >= d.n_lanes) return;
    const int lane = first_lane + d.lane + (int)blockIdx.y, n = left_behind(d, kv.lane_len[lane]);
    const bool plain = lane_format(kv, lane) == KV_PLAIN;
    const int words = kv.head_dim * (plain ? element : 1) / (int)sizeof(W), step = (int)threadIdx.x / PACK_ROW;
    const int word = (int)(blockIdx.z / 2 * PACK_ROW + threadIdx.x % PACK_ROW);
    const int64_t half = (int64_t)(blockIdx.z % 2) * page_tokens(kv, lane);
    W *const pool = (W *)kv.pool.data + half * words + word;
    float *const scale = plain || word ? NULL : kv.scale + half;
    for (int first = 0; first < n; first += PACK_ENTRIES) {
        W held[PACK_HELD];
        float held_scale[PACK_HELD];
#pragma unroll
        for (int i = 0; i < PACK_HELD; i++) {
            const int j = first + i * PACK_STEP + step;
            if (j >= n || word >= words) continue;
            /* Inside the block whatever is given. */
            const int from =
                j < d.n_keep ? min(max(index[d.first_index + j], j), d.n_block - 1) : j - d.n_keep + d.n_block;
            const int64_t row = plain ? row_of(kv, lane, d.first + from) : code_row(kv, lane, d.first + from);
            held[i] = pool[row * words];
            if (scale) held_scale[i] = scale[row];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < PACK_HELD; i++) {
            const int j = first + i * PACK_STEP + step;
            if (j >= n || word >= words) continue;
            const int64_t row = plain ? row_of(kv, lane, d.first + j) : code_row(kv, lane, d.first + j);
            pool[row * words] = held[i];
            if (scale) scale[row] = held_scale[i];
        }
    }
}

/* Grid: drops x shares of their lanes; a warp a lane. */
__global__ static void drop_shrink_kernel(struct kv_view kv, int first_lane, struct kv_drops drops)
{
    let_successor_start();
    wait_for_predecessor();
    const struct kv_drop d = drops.of[blockIdx.x];
    const int i = (int)blockIdx.y * LANES_A_BLOCK + (int)threadIdx.x / WARP, lane = first_lane + d.lane + i;
    if (i >= d.n_lanes) return;
    const int n = left_behind(d, kv.lane_len[lane]);
    if (n >= 0) shrink_lane(kv, lane, d.first + n);
}

int cuda__kv_drop(struct ops *o, const struct kv_view *kv, int slot, const int32_t *index, const struct kv_drop *drop,
                  int n_drops)
{
    const int element = (int)dtype_size(kv->pool.dtype), row_bytes = kv->head_dim * element;
    const bool wide =
        (kv->format == KV_PLAIN ? row_bytes : kv->head_dim) % 16 == 0 && (uint64_t)kv->pool.data % 16 == 0;
    const unsigned slices = (unsigned)(row_bytes / (wide ? 16 : 4) + PACK_ROW - 1) / PACK_ROW;
    const int first_lane = slot * kv->lanes_per_slot;
    for (int first = 0; first < n_drops; first += MOST_DROPS) {
        struct kv_drops drops = {};
        const unsigned n = (unsigned)(n_drops - first < MOST_DROPS ? n_drops - first : MOST_DROPS);
        unsigned lanes = 0;
        for (unsigned i = 0; i < n; i++) {
            drops.of[i] = drop[first + (int)i];
            if ((unsigned)drops.of[i].n_lanes > lanes) lanes = (unsigned)drops.of[i].n_lanes;
        }
        if (!lanes) continue;
        TRY(cuda__launch(o, "kv_drop", wide ? drop_kernel<uint4> : drop_kernel<uint32_t>, dim3(n, lanes, 2 * slices),
                         dim3(PACK_THREADS), 0, *kv, first_lane, index, drops, element));
        TRY(cuda__launch(o, "kv_drop", drop_shrink_kernel, dim3(n, (lanes + LANES_A_BLOCK - 1) / LANES_A_BLOCK),
                         dim3(LANES_A_BLOCK * WARP), 0, *kv, first_lane, drops));
    }
    return OK;
}
