/* attention_decode - what the two kernels of decode attention share: a piece of a lane as the list names it, the
 * products of 16 tokens with a group's queries, and how the parts of warps and of pieces are added up. Included by the
 * .cu files of decode attention only.
 *
 * Both products are arranged so that a thread's operands are 16 consecutive bytes of a token's key or value (the order
 * of a contraction's terms is free, as long as both sides share it). The heads of a group are the columns of one matrix
 * product: K is read once for all of them. */
#ifndef VITRAIL_KERNELS_CUDA_ATTENTION_DECODE_CUH
#define VITRAIL_KERNELS_CUDA_ATTENTION_DECODE_CUH

#include "kernels/cuda/device.cuh"

/* Templates below: CHUNKS of 32 dimensions a head is cut into, of which HALVES of 64; EXACT: it fills them. */
enum {
    WARPS = 4,
    TILE = 16,         /* tokens a warp takes at once */
    COLUMNS = 8,       /* query heads of one matrix product */
    MOST_SPLITS = 128, /* pieces of a lane */
    JOIN_AHEAD = 8     /* pieces whose sums a thread asks for at once */
};

struct decode_arguments {
    struct kv_view kv;
    const void *q;
    void *out;
    int64_t q_stride, out_stride;
    const int32_t *slot;
    int n_seqs, n_kv_heads, group, lane, capacity, counter_stride;
    float scale;      /* of logits, in powers of two */
    const int4 *item; /* of decode_begin: row, (piece << 8) + pieces - 1, length of the lane, slot */
    const int32_t *count;
    float *partial_out; /* [kv head, item, group, head_dim] of lanes in several pieces */
    float2 *partial;    /* [kv head, item, group] maximum and sum */
    int32_t *counter;   /* [kv head, row] */
    float *log_sum;     /* [row, query head] natural logarithm of what each softmax divides by; NULL: not wanted */
};

/* A piece of a lane. */
struct decode_item {
    int head, at; /* KV head, place in its list */
    int row, split, n_splits, lane;
    int first, end; /* tokens */
    int length;     /* of the lane, the step's own token last */
};

/* Tokens of a piece of a lane of `length` tokens in n pieces: even, in whole tiles of all warps. */
__device__ static inline int piece_tokens(int length, int n)
{
    const int step = WARPS * TILE, even = (length + n - 1) / n;
    return (even + step - 1) / step * step;
}

/* Whole warps. */
__device__ static inline struct decode_item fetch_item(const struct decode_arguments &a, const int *ends, int linear)
{
    struct decode_item item;
    item.head = 0;
    for (int first = 0; first < a.n_kv_heads; first += 32) {
        const int head = first + (int)threadIdx.x % 32;
        item.head += __popc(__ballot_sync(~0u, head < a.n_kv_heads && ends[head] <= linear));
    }
    item.at = item.head ? linear - ends[item.head - 1] : linear;
    const int4 listed = __ldcg(&a.item[(int64_t)(a.lane + item.head) * a.capacity + item.at]);
    item.row = listed.x;
    item.split = listed.y >> 8, item.n_splits = (listed.y & 255) + 1;
    item.lane = cache_lane(a.kv, listed.w, a.lane + item.head);
    const int tokens = piece_tokens(listed.z, item.n_splits);
    item.first = item.split * tokens;
    item.length = listed.z;
    item.end = item.length - item.first < tokens ? item.length : item.first + tokens;
    return item;
}

/* ---- the tiles of a piece, dealt to the block's warps in turn ---- */

__device__ static inline int tiles_of(const struct decode_item &item)
{
    const int rest = item.end - item.first - (int)(threadIdx.x / 32) * TILE;
    return rest > 0 ? (rest + WARPS * TILE - 1) / (WARPS * TILE) : 0;
}
__device__ static inline int token_of(const struct decode_item &item, int tile)
{
    return item.first + (tile * WARPS + (int)(threadIdx.x / 32)) * TILE;
}

/* The page numbers of 32 tiles of the warp from `tile` on, one a thread. */
__device__ static inline int pages_from(const struct decode_arguments &a, const struct decode_item &item, int tile)
{
    const int token = token_of(item, tile + (int)threadIdx.x % 32);
    const int32_t *row = a.kv.page_row + (int64_t)item.lane * a.kv.max_pages;
    return token < item.end ? __ldcg(&row[token / a.kv.page_size]) : 0;
}

/* ---- before the predecessor has ended ----
 * The list, the slots and all tokens but a lane's last stood in memory before decode_begin let its successor start, and
 * nothing in the step changes them: they are read at once. Past the first-level cache, so that no line is kept from
 * which something newer would be read later. */

/* The tile holds none of the tokens that the step appends. */
__device__ static inline bool tile_is_old(const struct decode_item &item, int tile)
{
    return token_of(item, tile) + TILE < item.length;
}
/* The piece's last page is one that the step's append has just taken. */
__device__ static inline bool ends_in_new_page(const struct decode_arguments &a, const struct decode_item &item)
{
    return item.end == item.length && (item.length - 1) % a.kv.page_size == 0;
}

__device__ static inline bool has_padding(const struct decode_arguments &a)
{
    bool found = false;
    for (int row = (int)blockIdx.x; row < a.n_seqs; row += (int)gridDim.x) found |= __ldcg(&a.slot[row]) < 0;
    return found;
}

/* ---- a tile ---- */

/* GLOBAL: memory of the device, each byte of which is read once; else shared memory. */
template <bool GLOBAL> __device__ static inline uint4 read_16(const char *from)
{
    return GLOBAL ? __ldcg((const uint4 *)from) : *(const uint4 *)from;
}

/* Rows of 16 bytes a thread: a token's key at dims chunk * 32 + t * 8. FULL: all tokens of the tile are the lane's. */
template <int CHUNKS, bool FULL, bool GLOBAL>
__device__ static void load_keys(uint4 *low, uint4 *high, const char *page, int row_bytes, int r, int t, int n_valid)
{
    const uint4 none = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int at = c * 64 + t * 16;
        low[c] = at < row_bytes && (FULL || r < n_valid) ? read_16<GLOBAL>(page + r * row_bytes + at) : none;
        high[c] = at < row_bytes && (FULL || r + 8 < n_valid) ? read_16<GLOBAL>(page + (r + 8) * row_bytes + at) : none;
    }
}

/* Values of tokens 2t, 2t + 1, 2t + 8, 2t + 9 at dims half * 64 + r * 8. */
template <int HALVES, bool FULL, bool GLOBAL>
__device__ static void load_values(uint4 (*v)[4], const char *page, int row_bytes, int r, int t, int n_valid)
{
    const uint4 none = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = 2 * t + (i & 1) + (i & 2) * 4, at = h * 128 + r * 16;
            v[h][i] =
                at < row_bytes && (FULL || token < n_valid) ? read_16<GLOBAL>(page + token * row_bytes + at) : none;
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

/* Logits of 16 tokens before scaling, in two chains; -inf past the end. */
template <typename T, int CHUNKS, int PRODUCTS, bool FULL>
__device__ static void score_tile(float (*s)[4], const uint4 *low, const uint4 *high, const uint4 (*q)[CHUNKS], int r,
                                  int n_valid)
{
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++) {
        float other[4] = {0, 0, 0, 0};
        s[p][0] = s[p][1] = s[p][2] = s[p][3] = 0;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            mma_16816<T>(s[p], low[c].x, high[c].x, low[c].y, high[c].y, q[p][c].x, q[p][c].y);
            mma_16816<T>(other, low[c].z, high[c].z, low[c].w, high[c].w, q[p][c].z, q[p][c].w);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) s[p][i] = FULL || r + (i & 2) * 4 < n_valid ? s[p][i] + other[i] : -INFINITY;
    }
}

/* A higher maximum shrinks what was gathered under the one before. Rare after the first tiles. */
template <int HALVES>
__device__ static void shrink_gathered(float (*out)[4][4], float *top, float *sum, const float *best, float scale)
{
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const float shrink = power_of_2((top[e] - best[e]) * scale);
        top[e] = best[e];
        sum[e] *= shrink;
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                out[h][j][e] *= shrink;
                out[h][j][e + 2] *= shrink;
            }
    }
}

/* Takes the tile's values in, by the softmax so far. */
template <typename T, int HALVES, int PRODUCTS>
__device__ static void take_tile(struct gathered<HALVES, PRODUCTS> *g, float (*scores)[4], const uint4 (*v)[4],
                                 float scale)
{
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++) {
        float *s = scores[p], best[2];
#pragma unroll
        for (int e = 0; e < 2; e++) best[e] = fmaxf(s[e], s[e + 2]);
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
            best[0] = fmaxf(best[0], __shfl_xor_sync(~0u, best[0], step));
            best[1] = fmaxf(best[1], __shfl_xor_sync(~0u, best[1], step));
        }
        best[0] = fmaxf(best[0], g->top[p][0]), best[1] = fmaxf(best[1], g->top[p][1]);
        if (__any_sync(~0u, best[0] > g->top[p][0] || best[1] > g->top[p][1]))
            shrink_gathered<HALVES>(g->out[p], g->top[p], g->sum[p], best, scale);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            s[e] = power_of_2((s[e] - best[e]) * scale);
            s[e + 2] = power_of_2((s[e + 2] - best[e]) * scale);
            g->sum[p][e] += s[e] + s[e + 2];
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

/* What the block's warps leave each other: `out` [WARPS, group, HALVES * 64 + 2]; the last block of a lane uses its
 * room for the pieces' factors, [group, MOST_SPLITS]. */
struct block_part {
    float top[WARPS][2 * COLUMNS], sum[WARPS][2 * COLUMNS];
    int last, unused[3];
    float out[];
};

template <int HALVES> __device__ static float *part_row(struct block_part *part, int warp, int column, int group)
{
    return part->out + (warp * group + column) * (HALVES * 64 + 2);
}

static inline size_t block_part_bytes(int halves, int group)
{
    const size_t out = (size_t)WARPS * (size_t)group * ((size_t)halves * 64 + 2), factor = (size_t)group * MOST_SPLITS;
    return (sizeof(struct block_part) + (out > factor ? out : factor) * sizeof(float) + 15) / 16 * 16;
}

template <int HALVES, int PRODUCTS>
__device__ static void leave_part(struct block_part *part, struct gathered<HALVES, PRODUCTS> *g, int group, float scale)
{
    const int thread = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, r = thread / 4, t = thread % 4;
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int column = p * COLUMNS + 2 * t + e;
            float sum = g->sum[p][e];
            for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
            if (column >= group) continue;
            if (r == 0) part->top[warp][column] = g->top[p][e] * scale, part->sum[warp][column] = sum;
#pragma unroll
            for (int h = 0; h < HALVES; h++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float *row = part_row<HALVES>(part, warp, column, group) + h * 64 + r * 8 + 2 * j;
                    *(float2 *)row = make_float2(g->out[p][h][j][e], g->out[p][h][j][e + 2]);
                }
        }
}

/* A head's maximum and sum over the warps, and the factor of each warp's part. */
__device__ static float2 join_warps(struct block_part *part, int column, float *factor)
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

/* Natural logarithm of a head's whole sum, its maximum in powers of two. */
__device__ static float log_of_sum(float top, float sum) { return (top + log2f(sum)) * 0.693147180559945f; }

/* Where those of a piece's heads go. */
__device__ static float *log_sum_of(const struct decode_arguments &a, const struct decode_item &item)
{
    return a.log_sum + ((int64_t)item.row * a.n_kv_heads + item.head) * a.group;
}

/* Four dimensions of the warps' parts, added up. */
template <int HALVES>
__device__ static float4 add_parts(struct block_part *part, int column, int d, int group, const float *factor)
{
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const float *from = part_row<HALVES>(part, w, column, group) + d;
        const float2 low = *(const float2 *)from, high = *(const float2 *)(from + 2);
        sum.x += low.x * factor[w], sum.y += low.y * factor[w];
        sum.z += high.x * factor[w], sum.w += high.y * factor[w];
    }
    return sum;
}

template <typename T> __device__ static void put_out(T *to, float4 value)
{
    *(uint2 *)to = make_uint2(pack2<T>(value.x, value.y), pack2<T>(value.z, value.w));
}

/* The pieces of a lane, side by side in memory: [n, group, dim] sums, [n, group] maxima and weights. */
struct pieces {
    const float *out;
    const float2 *ends;
    float *log_sum; /* [group]; NULL: not wanted */
    int n, group, dim;
};

/* The factor of each piece, by which its sums count, over the sum of all: a warp a head. */
__device__ static void weigh_pieces(const struct pieces &p, float *factors)
{
    const int thread = (int)threadIdx.x % 32;
#pragma unroll 1
    for (int in_group = (int)threadIdx.x / 32; in_group < p.group; in_group += WARPS) {
        float2 piece[MOST_SPLITS / 32];
        float top = -INFINITY, sum = 0;
#pragma unroll
        for (int k = 0; k < MOST_SPLITS / 32; k++) {
            const int s = k * 32 + thread;
            piece[k] = s < p.n ? __ldcg(&p.ends[s * p.group + in_group]) : make_float2(-INFINITY, 0);
        }
#pragma unroll
        for (int k = 0; k < MOST_SPLITS / 32; k++) top = fmaxf(top, piece[k].x);
        top = warp_max(top);
#pragma unroll
        for (int k = 0; k < MOST_SPLITS / 32; k++) {
            piece[k].x = piece[k].x == -INFINITY ? 0 : exp2f(piece[k].x - top);
            sum += piece[k].y * piece[k].x;
        }
        sum = warp_sum(sum);
        const float inverse = sum > 0 ? 1 / sum : 0;
        if (p.log_sum && thread == 0) p.log_sum[in_group] = log_of_sum(top, sum);
#pragma unroll
        for (int k = 0; k < MOST_SPLITS / 32; k++)
            factors[in_group * MOST_SPLITS + k * 32 + thread] = piece[k].x * inverse;
    }
}

/* Four dimensions of pieces [s, s + JOIN_AHEAD). */
__device__ static __forceinline__ void load_pieces(float4 *value, const struct pieces &p, int i, int s)
{
    const float *from = p.out + (int64_t)s * p.group * p.dim + i;
#pragma unroll
    for (int k = 0; k < JOIN_AHEAD; k++)
        value[k] = s + k < p.n ? __ldcg((const float4 *)(from + k * p.group * p.dim)) : make_float4(0, 0, 0, 0);
}

/* Adds up the pieces, in their order, into the output row; four dimensions a thread. The first ones are on their way
 * while the factors are found. */
template <typename T> __device__ static void join_pieces(struct pieces p, T *out, float *factors)
{
    const int width = p.group * p.dim, first = 4 * (int)threadIdx.x;
    float4 value[JOIN_AHEAD];
    if (first < width) load_pieces(value, p, first, 0);
    weigh_pieces(p, factors);
    __syncthreads();
#pragma unroll 1
    for (int i = first; i < width; i += 4 * (int)blockDim.x) {
        const float *factor = factors + i / p.dim * MOST_SPLITS;
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 1
        for (int s = 0; s < p.n; s += JOIN_AHEAD) {
            if (s > 0 || i > first) load_pieces(value, p, i, s);
#pragma unroll
            for (int k = 0; k < JOIN_AHEAD; k++) {
                const float by = factor[s + k]; /* 0 past the last piece */
                sum.x += value[k].x * by, sum.y += value[k].y * by;
                sum.z += value[k].z * by, sum.w += value[k].w * by;
            }
        }
        put_out<T>(out + i, sum);
    }
}

/* The end of a piece: the warps' parts into the output row, or into its place among the lane's pieces, of which the
 * last one to be done adds up all. Whole block. `meanwhile` asks for the next piece's first keys: behind the fence,
 * which would wait for them. */
template <typename T, int HALVES, int PRODUCTS, typename F>
__device__ static void finish_item(const struct decode_arguments &a, struct block_part *part,
                                   struct gathered<HALVES, PRODUCTS> *g, const struct decode_item &item, F meanwhile)
{
    const int dim = a.kv.head_dim, width = a.group * dim;
    leave_part<HALVES, PRODUCTS>(part, g, a.group, a.scale);
    __syncthreads();
    const int64_t piece = (int64_t)item.head * a.capacity + item.at;
    T *out = (T *)a.out + item.row * a.out_stride + (int64_t)item.head * width;
#pragma unroll 1
    for (int i = 4 * (int)threadIdx.x; i < width; i += 4 * (int)blockDim.x) {
        float factor[WARPS];
        const int in_group = i / dim, d = i - in_group * dim;
        const float2 joined = join_warps(part, in_group, factor);
        float4 value = add_parts<HALVES>(part, in_group, d, a.group, factor);
        if (item.n_splits == 1) {
            const float inverse = joined.y > 0 ? 1 / joined.y : 0;
            value.x *= inverse, value.y *= inverse, value.z *= inverse, value.w *= inverse;
            put_out<T>(out + i, value);
            if (a.log_sum && d == 0) log_sum_of(a, item)[in_group] = log_of_sum(joined.x, joined.y);
        } else {
            *(float4 *)&a.partial_out[piece * width + i] = value;
            if (d == 0) a.partial[piece * a.group + in_group] = joined;
        }
    }
    if (item.n_splits == 1) {
        meanwhile();
        __syncthreads(); /* before the next item overwrites the parts */
        return;
    }
    int32_t *counter = &a.counter[item.head * a.counter_stride + item.row];
    int done = 0;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence(); /* what the block has written comes before */
        done = atomicAdd(counter, 1);
    }
    meanwhile();
    if (threadIdx.x == 0) {
        part->last = done == item.n_splits - 1;
        if (part->last) __threadfence(); /* what the others have written is read after */
    }
    __syncthreads();
    if (part->last) {
        const int64_t first = (piece - item.split) * a.group;
        float *log_sum = a.log_sum ? log_sum_of(a, item) : NULL;
        const struct pieces p = {a.partial_out + first * dim, a.partial + first, log_sum, item.n_splits, a.group, dim};
        join_pieces<T>(p, out, part->out);
        if (threadIdx.x == 0) *counter = 0;
        __syncthreads(); /* before the next item overwrites the factors */
    }
}

template <int HALVES, int PRODUCTS> __device__ static void begin_gathering(struct gathered<HALVES, PRODUCTS> *g)
{
    memset(&g->out, 0, sizeof g->out);
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++) g->top[p][0] = g->top[p][1] = -INFINITY, g->sum[p][0] = g->sum[p][1] = 0;
}

/* The block's share of a layer's pieces: neighbours, so that short and long ones mix. */
__device__ static inline int first_item(int n_items, int block) { return (int)((int64_t)n_items * block / gridDim.x); }

/* Running sums of the heads' counts into shared memory; whole block. */
__device__ static void list_ends(const struct decode_arguments &a, int *ends)
{
    int before = 0;
    for (int first = 0; first < a.n_kv_heads && threadIdx.x < 32; first += 32) {
        const int head = first + (int)threadIdx.x;
        int upto = head < a.n_kv_heads ? __ldcg(&a.count[a.lane + head]) : 0;
        for (int step = 1; step < 32; step *= 2) {
            const int below = __shfl_up_sync(~0u, upto, step);
            if ((int)threadIdx.x >= step) upto += below;
        }
        if (head < a.n_kv_heads) ends[head] = before + upto;
        before += __shfl_sync(~0u, upto, 31);
    }
    __syncthreads();
}

/* Rows of the batch that are padding become zeros. */
template <typename T> __device__ static void clear_padding(const struct decode_arguments &a)
{
    const int width = a.n_kv_heads * a.group * a.kv.head_dim;
    for (int row = (int)blockIdx.x; row < a.n_seqs; row += (int)gridDim.x)
        if (a.slot[row] < 0)
            for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x)
                ((T *)a.out)[row * a.out_stride + i] = from_float<T>(0.0f);
}

/* attention_stream.cu - the kernel of Hopper; the other one's twin. */
int cuda__decode_stream(struct ops *o, enum dtype dtype, const struct decode_arguments &a) MUST_CHECK;
/* attention_quantised_stream.cu - likewise, of attention_quantised.cu; dimensions in steps of 16. */
int cuda__quantised_stream(struct ops *o, enum dtype dtype, const struct decode_arguments &a) MUST_CHECK;

#endif
