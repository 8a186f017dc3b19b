/* Decode attention: one query row a sequence over its lane, bound by reading K and V once.
 *
 * A lane is cut into pieces of c->split_tokens tokens, fixed by the configuration. decode_begin lists the pieces of all
 * lanes at the start of a step; a persistent grid walks the list of a layer. A block of four warps takes a piece, a
 * warp 16 tokens at a time, straight from the pages into registers: both products are arranged so that a thread's
 * operands are 16 consecutive bytes of memory (the order of a contraction's terms is free, as long as both sides share
 * it). The heads of a group are the columns of one matrix product: K is read once for all of them. The warp that
 * finishes a lane's last piece adds the pieces up, in their order: the result depends on the lane alone. */
#include "kernels/cuda/device.cuh"

enum {
    WARPS = 4,
    TILE = 16,   /* tokens a warp takes at once */
    COLUMNS = 8, /* query heads of one matrix product */
    MOST_SPLITS = 256,
    MOST_SEQS = 1 << 15
};

/* A piece of a lane: row of the batch, number of the piece, pieces of the lane less one. */
__device__ static int32_t pack_item(int row, int split, int n_splits)
{
    return row << 16 | split << 8 | (n_splits - 1);
}

__global__ static void __launch_bounds__(256)
    list_work_kernel(struct kv_view kv, const int32_t *slot, int n_seqs, int split_tokens, int32_t *item, int capacity,
                     int32_t *count)
{
    __shared__ int warp_total[8];
    wait_for_predecessor();
    let_successor_start();
    const int lane = (int)blockIdx.x, thread = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    int total = 0;
    item += (int64_t)lane * capacity;
    for (int first = 0; first < n_seqs; first += 256) {
        const int row = first + (int)threadIdx.x;
        const int s = row < n_seqs ? slot[row] : -1;
        const int length = s >= 0 && s < kv.n_slots ? kv.lane_len[cache_lane(kv, s, lane)] + 1 : 0;
        int n = (length + split_tokens - 1) / split_tokens;
        if (n > MOST_SPLITS) n = MOST_SPLITS; /* a full lane, reported by kv_append */
        int upto = n;
        for (int step = 1; step < 32; step *= 2) {
            int below = __shfl_up_sync(~0u, upto, step);
            if (thread >= step) upto += below;
        }
        if (thread == 31) warp_total[warp] = upto;
        __syncthreads();
        int before = total;
        for (int w = 0; w < 8; w++) {
            if (w < warp) before += warp_total[w];
            total += warp_total[w];
        }
        for (int i = 0; i < n; i++) {
            int at = before + upto - n + i;
            if (at < capacity) item[at] = pack_item(row, i, n);
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) count[lane] = total < capacity ? total : capacity;
}

int cuda__decode_begin(struct ops *o, const struct seq_batch *batch, const struct kv_view *kv)
{
    const struct cuda *c = cuda__of(o);
    if (kv->lanes_per_slot > c->limits.max_lanes || batch->n_seqs > c->limits.max_seqs || batch->n_seqs > MOST_SEQS)
        FAIL(ERR_BUG, "ops_decode_begin: %d lanes and %d sequences, ops_reserve was told %d and %d", kv->lanes_per_slot,
             batch->n_seqs, c->limits.max_lanes, c->limits.max_seqs);
    return cuda__launch(o, "decode_begin", list_work_kernel, dim3((unsigned)kv->lanes_per_slot), dim3(256), 0, *kv,
                        batch->slot, batch->n_seqs, c->split_tokens, c->work_item, c->work_capacity, c->work_count);
}

/* ---- the attention of a layer ---- */

struct decode_arguments {
    struct kv_view kv;
    const void *q;
    void *out;
    int64_t q_stride, out_stride;
    const int32_t *slot;
    int n_seqs, n_kv_heads, group, lane, split_tokens, capacity, counter_stride;
    float scale; /* of logits, in powers of two */
    const int32_t *item, *count;
    float *partial_out; /* [kv head, item, group, head_dim] of lanes in several pieces */
    float2 *partial;    /* [kv head, item, group] maximum and sum */
    int32_t *counter;   /* [kv head, row] */
};

/* Rows of 16 bytes a thread: a token's key at dims chunk * 32 + t * 8. */
template <int CHUNKS>
__device__ static void load_keys(uint4 *low, uint4 *high, const char *page, int row_bytes, int r, int t, int n_valid)
{
    const uint4 none = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int at = c * 64 + t * 16;
        low[c] = at < row_bytes && r < n_valid ? *(const uint4 *)(page + r * row_bytes + at) : none;
        high[c] = at < row_bytes && r + 8 < n_valid ? *(const uint4 *)(page + (r + 8) * row_bytes + at) : none;
    }
}

/* Values of tokens 2t, 2t + 1, 2t + 8, 2t + 9 at dims half * 64 + r * 8. */
template <int HALVES>
__device__ static void load_values(uint4 (*v)[4], const char *page, int row_bytes, int r, int t, int n_valid)
{
    const uint4 none = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = 2 * t + (i & 1) + (i & 2) * 4, at = h * 128 + r * 16;
            v[h][i] = at < row_bytes && token < n_valid ? *(const uint4 *)(page + token * row_bytes + at) : none;
        }
}

__device__ static uint32_t transpose_8x8(uint32_t x)
{
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

__device__ static uint32_t word_of(const uint4 &x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

/* What a warp has gathered: for the group's heads 2t and 2t + 1 of each product of 8 columns. */
template <int HALVES, int PRODUCTS> struct gathered {
    float out[PRODUCTS][HALVES][4][4];
    float top[PRODUCTS][2], sum[PRODUCTS][2];
};

/* One tile of 16 tokens: logits, softmax so far, values. */
template <typename T, int CHUNKS, int HALVES, int PRODUCTS>
__device__ static void take_tile(struct gathered<HALVES, PRODUCTS> *g, const uint4 *low, const uint4 *high,
                                 const uint4 (*v)[4], const uint4 (*q)[CHUNKS], float scale, int r, int n_valid)
{
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++) {
        float s[4] = {0, 0, 0, 0};
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            mma_16816<T>(s, low[c].x, high[c].x, low[c].y, high[c].y, q[p][c].x, q[p][c].y);
            mma_16816<T>(s, low[c].z, high[c].z, low[c].w, high[c].w, q[p][c].z, q[p][c].w);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) s[i] = r + (i & 2) * 4 < n_valid ? s[i] * scale : -INFINITY;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float top = fmaxf(s[e], s[e + 2]);
            for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
            const float best = fmaxf(g->top[p][e], top), shrink = exp2f(g->top[p][e] - best);
            s[e] = exp2f(s[e] - best);
            s[e + 2] = exp2f(s[e + 2] - best);
            g->top[p][e] = best;
            g->sum[p][e] = g->sum[p][e] * shrink + s[e] + s[e + 2];
#pragma unroll
            for (int h = 0; h < HALVES; h++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    g->out[p][h][j][e] *= shrink;
                    g->out[p][h][j][e + 2] *= shrink;
                }
        }
        const uint32_t b0 = transpose_8x8(pack2<T>(s[0], s[1])), b1 = transpose_8x8(pack2<T>(s[2], s[3]));
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint32_t w0 = word_of(v[h][0], j), w1 = word_of(v[h][1], j), w2 = word_of(v[h][2], j),
                               w3 = word_of(v[h][3], j);
                mma_16816<T>(g->out[p][h][j], __byte_perm(w0, w1, 0x5410), __byte_perm(w0, w1, 0x7632),
                             __byte_perm(w2, w3, 0x5410), __byte_perm(w2, w3, 0x7632), b0, b1);
            }
    }
}

/* Tokens [first, end) of a lane, tiles dealt to the block's warps. The next tile's keys are on their way while this
 * one's values are used. */
template <typename T, int CHUNKS, int HALVES, int PRODUCTS>
__device__ static void gather(struct gathered<HALVES, PRODUCTS> *g, const struct decode_arguments &a, int lane,
                              int first, int end, const uint4 (*q)[CHUNKS])
{
    const int thread = (int)threadIdx.x % 32, r = thread / 4, t = thread % 4,
              row_bytes = a.kv.head_dim * (int)sizeof(T);
    const int64_t value_bytes = (int64_t)a.kv.page_size * row_bytes;
    const char *pool = (const char *)a.kv.pool.data;
    const int32_t *row = a.kv.page_row + (int64_t)lane * a.kv.max_pages;
    uint4 low[CHUNKS], high[CHUNKS], v[HALVES][4];
    int at = first + (int)(threadIdx.x / 32) * TILE;
    if (at >= end) return;
    const char *page =
        pool + ((int64_t)row[at / a.kv.page_size] * 2 * a.kv.page_size + at % a.kv.page_size) * row_bytes;
    load_keys<CHUNKS>(low, high, page, row_bytes, r, t, end - at);
    while (at < end) {
        const int n_valid = end - at, next = at + WARPS * TILE;
        load_values<HALVES>(v, page + value_bytes, row_bytes, r, t, n_valid);
        uint4 next_low[CHUNKS], next_high[CHUNKS];
        if (next < end) {
            page =
                pool + ((int64_t)row[next / a.kv.page_size] * 2 * a.kv.page_size + next % a.kv.page_size) * row_bytes;
            load_keys<CHUNKS>(next_low, next_high, page, row_bytes, r, t, end - next);
        }
        take_tile<T, CHUNKS, HALVES, PRODUCTS>(g, low, high, v, q, a.scale, r, n_valid);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) low[c] = next_low[c], high[c] = next_high[c];
        at = next;
    }
}

/* The queries of a group as the second operand: head n of a product at dims chunk * 32 + t * 8. */
template <typename T, int CHUNKS, int PRODUCTS>
__device__ static void load_queries(uint4 (*q)[CHUNKS], const struct decode_arguments &a, int row, int head)
{
    const int thread = (int)threadIdx.x % 32, n = thread / 4, t = thread % 4, dim = a.kv.head_dim;
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++) {
        const int in_group = p * COLUMNS + n;
        const T *from = (const T *)a.q + row * a.q_stride + (int64_t)(head * a.group + in_group) * dim;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const int at = c * 32 + t * 8;
            q[p][c] = in_group < a.group && at < dim ? *(const uint4 *)(from + at) : make_uint4(0, 0, 0, 0);
        }
    }
}

/* What the block's warps leave each other. */
template <int HALVES, int PRODUCTS> struct block_part {
    float top[WARPS][PRODUCTS * COLUMNS], sum[WARPS][PRODUCTS * COLUMNS];
    float out[WARPS][PRODUCTS * COLUMNS][HALVES * 64 + 4];
    int last;
};

template <int HALVES, int PRODUCTS>
__device__ static void leave_part(struct block_part<HALVES, PRODUCTS> *part, struct gathered<HALVES, PRODUCTS> *g)
{
    const int thread = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, r = thread / 4, t = thread % 4;
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int column = p * COLUMNS + 2 * t + e;
            float sum = g->sum[p][e];
            for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
            if (r == 0) part->top[warp][column] = g->top[p][e], part->sum[warp][column] = sum;
#pragma unroll
            for (int h = 0; h < HALVES; h++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    part->out[warp][column][h * 64 + r * 8 + 2 * j] = g->out[p][h][j][e];
                    part->out[warp][column][h * 64 + r * 8 + 2 * j + 1] = g->out[p][h][j][e + 2];
                }
        }
}

/* A head's maximum and sum over the warps, and the factor of each warp's part. */
template <int HALVES, int PRODUCTS>
__device__ static float2 join_warps(const struct block_part<HALVES, PRODUCTS> *part, int column, float *factor)
{
    float top = -INFINITY, sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, part->top[w][column]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        factor[w] = part->top[w][column] == -INFINITY ? 0 : exp2f(part->top[w][column] - top);
        sum += part->sum[w][column] * factor[w];
    }
    return make_float2(top, sum);
}

/* The pieces of a lane, in their order, into the output row. */
template <typename T>
__device__ static void join_pieces(const struct decode_arguments &a, int row, int head, int64_t first_piece, int n)
{
    const int dim = a.kv.head_dim;
    for (int i = (int)threadIdx.x; i < a.group * dim; i += (int)blockDim.x) {
        const int in_group = i / dim;
        float top = -INFINITY, sum = 0, value = 0;
        for (int s = 0; s < n; s++) top = fmaxf(top, __ldcg(&a.partial[(first_piece + s) * a.group + in_group]).x);
        for (int s = 0; s < n; s++) {
            const float2 piece = __ldcg(&a.partial[(first_piece + s) * a.group + in_group]);
            const float factor = piece.x == -INFINITY ? 0 : exp2f(piece.x - top);
            sum += piece.y * factor;
            value += __ldcg(&a.partial_out[(first_piece + s) * a.group * dim + i]) * factor;
        }
        ((T *)a.out)[row * a.out_stride + (int64_t)head * a.group * dim + i] =
            from_float<T>(sum > 0 ? value / sum : 0.0f);
    }
}

/* One piece of one lane. `at`: its place in the list of its KV head. */
template <typename T, int CHUNKS, int HALVES, int PRODUCTS>
__device__ static void take_item(const struct decode_arguments &a, struct block_part<HALVES, PRODUCTS> *part, int head,
                                 int at)
{
    const int32_t item = a.item[(int64_t)(a.lane + head) * a.capacity + at];
    const int row = item >> 16, split = item >> 8 & 255, n_splits = (item & 255) + 1, dim = a.kv.head_dim;
    const int lane = cache_lane(a.kv, a.slot[row], a.lane + head), first = split * a.split_tokens;
    const int length = a.kv.lane_len[lane];
    const int end = length - first < a.split_tokens ? length : first + a.split_tokens;
    uint4 q[PRODUCTS][CHUNKS];
    struct gathered<HALVES, PRODUCTS> g;
    memset(&g.out, 0, sizeof g.out);
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++) g.top[p][0] = g.top[p][1] = -INFINITY, g.sum[p][0] = g.sum[p][1] = 0;
    load_queries<T, CHUNKS, PRODUCTS>(q, a, row, head);
    gather<T, CHUNKS, HALVES, PRODUCTS>(&g, a, lane, first, end, q);
    leave_part<HALVES, PRODUCTS>(part, &g);
    __syncthreads();
    const int64_t piece = (int64_t)head * a.capacity + at;
    for (int i = (int)threadIdx.x; i < a.group * dim; i += (int)blockDim.x) {
        float factor[WARPS], value = 0;
        const int in_group = i / dim, d = i % dim;
        const float2 joined = join_warps<HALVES, PRODUCTS>(part, in_group, factor);
#pragma unroll
        for (int w = 0; w < WARPS; w++) value += part->out[w][in_group][d] * factor[w];
        if (n_splits == 1) {
            ((T *)a.out)[row * a.out_stride + (int64_t)head * a.group * dim + i] =
                from_float<T>(joined.y > 0 ? value / joined.y : 0.0f);
        } else {
            a.partial_out[piece * a.group * dim + i] = value;
            if (d == 0) a.partial[piece * a.group + in_group] = joined;
        }
    }
    if (n_splits > 1) {
        __threadfence();
        __syncthreads();
        int32_t *counter = &a.counter[head * a.counter_stride + row];
        if (threadIdx.x == 0) part->last = atomicAdd(counter, 1) == n_splits - 1;
        __syncthreads();
        if (part->last) {
            __threadfence();
            join_pieces<T>(a, row, head, piece - split, n_splits);
            if (threadIdx.x == 0) *counter = 0;
        }
    }
    __syncthreads(); /* before the next item overwrites the parts */
}

template <typename T, int CHUNKS, int HALVES, int PRODUCTS>
__global__ static void __launch_bounds__(WARPS * 32, PRODUCTS == 1 ? 3 : 2) decode_kernel(struct decode_arguments a)
{
    extern __shared__ char shared[];
    struct block_part<HALVES, PRODUCTS> *part = (struct block_part<HALVES, PRODUCTS> *)shared;
    wait_for_predecessor();
    let_successor_start();
    const int width = a.n_kv_heads * a.group * a.kv.head_dim;
    for (int row = (int)blockIdx.x; row < a.n_seqs; row += (int)gridDim.x) /* padding */
        if (a.slot[row] < 0)
            for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x)
                ((T *)a.out)[row * a.out_stride + i] = from_float<T>(0.0f);
    int head = 0, passed = 0;
    for (int at = (int)blockIdx.x;; at += (int)gridDim.x) {
        while (head < a.n_kv_heads && at - passed >= a.count[a.lane + head]) passed += a.count[a.lane + head++];
        if (head == a.n_kv_heads) return;
        take_item<T, CHUNKS, HALVES, PRODUCTS>(a, part, head, at - passed);
    }
}

static int place_partials(const struct cuda *c, const struct ops_limits *limits, struct arena *arena, float **out,
                          float2 **ends)
{
    static const char label[] = "op scratch";
    size_t pieces = (size_t)limits->max_heads * (size_t)c->work_capacity;
    TRY(arena_take(arena, pieces * (size_t)limits->head_dim * sizeof **out, label, out));
    return arena_take(arena, pieces * sizeof **ends, label, ends);
}

int cuda__decode_measure(const struct cuda *c, const struct ops_limits *limits, struct arena *arena)
{
    float *out;
    float2 *ends;
    return place_partials(c, limits, arena, &out, &ends);
}

template <typename T, int CHUNKS, int HALVES, int PRODUCTS>
static int launch_decode(struct ops *o, const struct decode_arguments &a)
{
    const struct cuda *c = cuda__of(o);
    void (*kernel)(struct decode_arguments) = decode_kernel<T, CHUNKS, HALVES, PRODUCTS>;
    const size_t shared = sizeof(struct block_part<HALVES, PRODUCTS>);
    if (shared > 48 << 10)
        CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    return cuda__launch(o, "attention_decode", kernel, dim3((unsigned)c->n_multiprocessors * (PRODUCTS == 1 ? 3 : 2)),
                        dim3(WARPS * 32), shared, a);
}

template <typename T, int PRODUCTS> static int launch_for_dim(struct ops *o, const struct decode_arguments &a)
{
    if (a.kv.head_dim <= 32) return launch_decode<T, 1, 1, PRODUCTS>(o, a);
    if (a.kv.head_dim <= 64) return launch_decode<T, 2, 1, PRODUCTS>(o, a);
    if (a.kv.head_dim <= 96) return launch_decode<T, 3, 2, PRODUCTS>(o, a);
    return launch_decode<T, 4, 2, PRODUCTS>(o, a);
}

static int check_decode(const struct cuda *c, struct tensor q, const struct seq_batch *batch, const struct kv_view *kv,
                        const struct attention_heads *heads)
{
    const int group = heads->n_heads / heads->n_kv_heads;
    if (kv->head_dim % 8 || kv->head_dim > 128 || group > 2 * COLUMNS || kv->page_size % TILE || q.stride[0] % 8 ||
        (uint64_t)q.data % 16)
        FAIL(ERR_UNSUPPORTED,
             "cuda: decode attention over heads of %d dimensions in groups of %d, pages of %d tokens; served are "
             "dimensions in steps of 8 up to 128, groups up to %d, pages in steps of %d",
             kv->head_dim, group, kv->page_size, 2 * COLUMNS, TILE);
    if (batch->n_seqs > c->limits.max_seqs || heads->n_heads > c->limits.max_heads ||
        kv->head_dim > c->limits.head_dim || heads->lane + heads->n_kv_heads > c->limits.max_lanes)
        FAIL(ERR_BUG, "ops_attention_decode: %d sequences of %d heads, more than ops_reserve was told", batch->n_seqs,
             heads->n_heads);
    return OK;
}

int cuda__attention_decode(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                           const struct kv_view *kv, const struct attention_heads *heads)
{
    const struct cuda *c = cuda__of(o);
    struct decode_arguments a = {};
    struct arena arena;
    TRY(check_decode(c, q, batch, kv, heads));
    TRY(cuda__scratch(o, &arena));
    TRY(place_partials(c, &c->limits, &arena, &a.partial_out, &a.partial));
    a.kv = *kv;
    a.q = q.data, a.q_stride = q.stride[0];
    a.out = out.data, a.out_stride = out.stride[0];
    a.slot = batch->slot;
    a.n_seqs = batch->n_seqs;
    a.n_kv_heads = heads->n_kv_heads;
    a.group = heads->n_heads / heads->n_kv_heads;
    a.lane = heads->lane;
    a.split_tokens = c->split_tokens;
    a.capacity = c->work_capacity;
    a.counter_stride = c->limits.max_seqs;
    a.scale = heads->scale * 1.44269504088896f;
    a.item = c->work_item, a.count = c->work_count;
    a.counter = c->counter;
    WITH_TYPE(q.dtype, T, return a.group <= COLUMNS ? launch_for_dim<T, 1>(o, a) : launch_for_dim<T, 2>(o, a));
}
