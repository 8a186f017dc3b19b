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
    TILE = 16,   /* tokens a warp takes at once */
    COLUMNS = 8, /* query heads of one matrix product */
    MOST_SPLITS = 256
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
};

/* A piece of a lane. */
struct decode_item {
    int head, at; /* KV head, place in its list */
    int row, split, n_splits, lane;
    int first, end; /* tokens */
};

/* Tokens of a piece of a lane of `length` tokens in n pieces: even, in whole tiles of all warps. */
__device__ static inline int piece_tokens(int length, int n)
{
    const int step = WARPS * TILE, even = (length + n - 1) / n;
    return (even + step - 1) / step * step;
}

__device__ static inline struct decode_item fetch_item(const struct decode_arguments &a, const int *ends, int linear)
{
    struct decode_item item;
    item.head = 0;
    while (linear >= ends[item.head]) item.head++;
    item.at = item.head ? linear - ends[item.head - 1] : linear;
    const int4 listed = a.item[(int64_t)(a.lane + item.head) * a.capacity + item.at];
    item.row = listed.x;
    item.split = listed.y >> 8, item.n_splits = (listed.y & 255) + 1;
    item.lane = cache_lane(a.kv, listed.w, a.lane + item.head);
    const int tokens = piece_tokens(listed.z, item.n_splits);
    item.first = item.split * tokens;
    item.end = listed.z - item.first < tokens ? listed.z : item.first + tokens;
    return item;
}

/* Rows of 16 bytes a thread: a token's key at dims chunk * 32 + t * 8. FULL: all tokens of the tile are the lane's. */
template <int CHUNKS, bool FULL>
__device__ static void load_keys(uint4 *low, uint4 *high, const char *page, int row_bytes, int r, int t, int n_valid)
{
    const uint4 none = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int at = c * 64 + t * 16;
        low[c] = at < row_bytes && (FULL || r < n_valid) ? *(const uint4 *)(page + r * row_bytes + at) : none;
        high[c] =
            at < row_bytes && (FULL || r + 8 < n_valid) ? *(const uint4 *)(page + (r + 8) * row_bytes + at) : none;
    }
}

/* Values of tokens 2t, 2t + 1, 2t + 8, 2t + 9 at dims half * 64 + r * 8. */
template <int HALVES, bool FULL>
__device__ static void load_values(uint4 (*v)[4], const char *page, int row_bytes, int r, int t, int n_valid)
{
    const uint4 none = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = 2 * t + (i & 1) + (i & 2) * 4, at = h * 128 + r * 16;
            v[h][i] =
                at < row_bytes && (FULL || token < n_valid) ? *(const uint4 *)(page + token * row_bytes + at) : none;
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

/* What the block's warps leave each other: `out` [WARPS, group, HALVES * 64 + 1]; the last block of a lane uses its
 * room for the pieces' factors, [group, MOST_SPLITS]. */
struct block_part {
    float top[WARPS][2 * COLUMNS], sum[WARPS][2 * COLUMNS];
    int last;
    float out[];
};

template <int HALVES> __device__ static float *part_row(struct block_part *part, int warp, int column, int group)
{
    return part->out + (warp * group + column) * (HALVES * 64 + 1);
}

static inline size_t block_part_bytes(int halves, int group)
{
    const size_t out = (size_t)WARPS * (size_t)group * ((size_t)halves * 64 + 1), factor = (size_t)group * MOST_SPLITS;
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
                    row[0] = g->out[p][h][j][e];
                    row[1] = g->out[p][h][j][e + 2];
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

/* The factor of each piece of a lane, by which its sums count, over the sum of all: a warp a head. */
__device__ static void weigh_pieces(const struct decode_arguments &a, struct block_part *part, int64_t first_piece,
                                    int n)
{
    const int thread = (int)threadIdx.x % 32;
    for (int in_group = (int)threadIdx.x / 32; in_group < a.group; in_group += WARPS) {
        float top = -INFINITY, sum = 0;
        for (int s = thread; s < n; s += 32)
            top = fmaxf(top, __ldcg(&a.partial[(first_piece + s) * a.group + in_group]).x);
        top = warp_max(top);
        for (int s = thread; s < n; s += 32) {
            const float2 piece = __ldcg(&a.partial[(first_piece + s) * a.group + in_group]);
            const float factor = piece.x == -INFINITY ? 0 : exp2f(piece.x - top);
            part->out[in_group * MOST_SPLITS + s] = factor;
            sum += piece.y * factor;
        }
        sum = warp_sum(sum);
        for (int s = thread; s < n; s += 32) part->out[in_group * MOST_SPLITS + s] *= sum > 0 ? 1 / sum : 0;
    }
}

/* The pieces of a lane, in their order, into the output row; four dimensions a thread. */
template <typename T>
__device__ static void join_pieces(const struct decode_arguments &a, struct block_part *part, int row, int head,
                                   int64_t first_piece, int n)
{
    const int width = a.group * a.kv.head_dim;
    weigh_pieces(a, part, first_piece, n);
    __syncthreads();
    for (int i = 4 * (int)threadIdx.x; i < width; i += 4 * (int)blockDim.x) {
        const float *factor = part->out + i / a.kv.head_dim * MOST_SPLITS;
        const float4 *from = (const float4 *)(a.partial_out + first_piece * width + i);
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
        for (int s = 0; s < n; s++) {
            const float4 value = __ldcg(&from[(int64_t)s * (width / 4)]);
            sum.x += value.x * factor[s], sum.y += value.y * factor[s];
            sum.z += value.z * factor[s], sum.w += value.w * factor[s];
        }
        *(uint2 *)((T *)a.out + row * a.out_stride + (int64_t)head * width + i) =
            make_uint2(pack2<T>(sum.x, sum.y), pack2<T>(sum.z, sum.w));
    }
}

/* The end of a piece: the warps' parts into the output row, or into its place among the lane's pieces, of which the
 * last one to be done adds up all. Whole block. */
template <typename T, int HALVES, int PRODUCTS>
__device__ static void finish_item(const struct decode_arguments &a, struct block_part *part,
                                   struct gathered<HALVES, PRODUCTS> *g, const struct decode_item &item)
{
    const int dim = a.kv.head_dim;
    leave_part<HALVES, PRODUCTS>(part, g, a.group, a.scale);
    __syncthreads();
    const int64_t piece = (int64_t)item.head * a.capacity + item.at;
    for (int i = (int)threadIdx.x; i < a.group * dim; i += (int)blockDim.x) {
        float factor[WARPS], value = 0;
        const int in_group = i / dim, d = i % dim;
        const float2 joined = join_warps(part, in_group, factor);
#pragma unroll
        for (int w = 0; w < WARPS; w++) value += part_row<HALVES>(part, w, in_group, a.group)[d] * factor[w];
        if (item.n_splits == 1) {
            ((T *)a.out)[item.row * a.out_stride + (int64_t)item.head * a.group * dim + i] =
                from_float<T>(joined.y > 0 ? value / joined.y : 0.0f);
        } else {
            a.partial_out[piece * a.group * dim + i] = value;
            if (d == 0) a.partial[piece * a.group + in_group] = joined;
        }
    }
    if (item.n_splits > 1) {
        __threadfence();
        __syncthreads();
        int32_t *counter = &a.counter[item.head * a.counter_stride + item.row];
        if (threadIdx.x == 0) part->last = atomicAdd(counter, 1) == item.n_splits - 1;
        __syncthreads();
        if (part->last) {
            __threadfence();
            join_pieces<T>(a, part, item.row, item.head, piece - item.split, item.n_splits);
            if (threadIdx.x == 0) *counter = 0;
        }
    }
    __syncthreads(); /* before the next item overwrites the parts */
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
        int upto = head < a.n_kv_heads ? a.count[a.lane + head] : 0;
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

#endif
