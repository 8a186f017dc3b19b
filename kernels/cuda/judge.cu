/* Rows of decode steps as judges of generated tokens: a block for a row, a KV head and up to 4 of its query heads. What
 * the softmax divides by is known from decode attention, so that only the keys of judged tokens are read, a few dozen
 * at the lane's end. Each one's share is added as an integer, which may come in any order.
 *
 * Warps work apart: 8 threads hold a key, 16 bytes at a time, and 4 keys at once, so that their loads overlap. Which
 * tokens a row judges is found before the attention has ended: it was settled before the step began. */
#include "kernels/cuda/quantised.cuh"

enum {
    JUDGE_WARPS = 4,
    KEY_THREADS = 8,
    KEY_GROUPS = 32 / KEY_THREADS,
    KEYS_AT_ONCE = 4,
    WARP_KEYS = KEY_GROUPS * KEYS_AT_ONCE,
    MOST_DIM = 128,
    DIM_STEPS = MOST_DIM / (8 * KEY_THREADS),
    MOST_JUDGE_HEADS = 4
};

struct judge_arguments {
    struct kv_view kv;
    struct decode_judges judges;
    const void *q;
    int64_t q_stride;
    const float *log_sum; /* [row, query head] */
    const int32_t *slot;
    int lane, group;
    float scale; /* of logits in powers of two */
};

/* Weight of step t's row for a block, over the number of its rows; 0: it is none of them. */
__device__ static float judge_weight(const struct decode_judges &judges, int slot, int b, int t)
{
    const int32_t *block = judges.block + 2 * ((int64_t)slot * judges.max_blocks + b);
    const int rows = __ldcg(block + 1), age = __ldcg(block) - t;
    if (age < 0 || age >= rows) return 0;
    const float part = rows > 1 ? (float)(rows - 1 - age) / (float)(rows - 1) : 0;
    return (1 + (judges.newest - 1) * part) / (float)rows;
}

/* Tokens [x, y) beyond which step t's row judges none; whole warp. */
__device__ static int2 judged_tokens(const struct decode_judges &judges, int slot, int t, int settled)
{
    const int end = min(t / judges.block_tokens + 1, judges.max_blocks);
    int low = end, high = -1;
    for (int b = settled + (int)threadIdx.x % 32; b < end; b += 32)
        if (judge_weight(judges, slot, b, t) > 0) low = min(low, b), high = max(high, b);
    low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
    return make_int2(low * judges.block_tokens, min((high + 1) * judges.block_tokens, t + 1));
}

/* A thread's dimensions of a row, out of memory; zeros beyond the head's. */
template <typename T> __device__ static __forceinline__ void load_row(uint4 *to, const T *row, int dim)
{
#pragma unroll
    for (int c = 0; c < DIM_STEPS; c++) {
        const int at = (c * KEY_THREADS + (int)threadIdx.x % KEY_THREADS) * 8;
        to[c] = at < dim ? __ldcg((const uint4 *)(row + at)) : make_uint4(0, 0, 0, 0);
    }
}

/* A thread's dimensions of a key of a lane, as they lie there: elements, or codes. */
template <enum kv_format FORMAT> struct key_part {
    uint2 of[DIM_STEPS];
    float by;
    template <typename T> __device__ __forceinline__ void load(const struct kv_view &kv, int64_t row)
    {
        const uint8_t *code = (const uint8_t *)kv.pool.data + row * kv.head_dim;
#pragma unroll
        for (int c = 0; c < DIM_STEPS; c++) {
            const int at = (c * KEY_THREADS + (int)threadIdx.x % KEY_THREADS) * 8;
            of[c] = at < kv.head_dim ? __ldcg((const uint2 *)(code + at)) : make_uint2(0, 0);
        }
        by = __ldcg(&kv.scale[row]);
    }
    template <typename T> __device__ __forceinline__ void unpack(int c, float *out) const
    {
        unpack8_codes<FORMAT>(of[c], out);
    }
    __device__ __forceinline__ float scale(void) const { return by; }
};
template <> struct key_part<KV_PLAIN> {
    uint4 of[DIM_STEPS];
    template <typename T> __device__ __forceinline__ void load(const struct kv_view &kv, int64_t row)
    {
        load_row<T>(of, (const T *)kv.pool.data + row * kv.head_dim, kv.head_dim);
    }
    template <typename T> __device__ __forceinline__ void unpack(int c, float *out) const { unpack8<T>(of[c], out); }
    __device__ __forceinline__ float scale(void) const { return 1; }
};

/* Logits of KEYS_AT_ONCE entries of a lane, on all threads of the 8 that share them; whole warp. */
template <typename T, enum kv_format FORMAT, int HEADS>
__device__ static void judge_logits(float (*s)[HEADS], const struct judge_arguments &a, const uint4 (*query)[DIM_STEPS],
                                    int lane, const int *entry)
{
    const int size = FORMAT == KV_PLAIN ? a.kv.page_size : code_tokens(a.kv);
    const int32_t *pages = a.kv.page_row + (int64_t)lane * a.kv.max_pages;
    int64_t row[KEYS_AT_ONCE];
    struct key_part<FORMAT> k[KEYS_AT_ONCE];
#pragma unroll
    for (int i = 0; i < KEYS_AT_ONCE; i++)
        row[i] = (int64_t)__ldcg(pages + entry[i] / size) * 2 * size + entry[i] % size;
#pragma unroll
    for (int i = 0; i < KEYS_AT_ONCE; i++) k[i].template load<T>(a.kv, row[i]);
#pragma unroll
    for (int i = 0; i < KEYS_AT_ONCE; i++) {
#pragma unroll
        for (int h = 0; h < HEADS; h++) s[i][h] = 0;
#pragma unroll
        for (int c = 0; c < DIM_STEPS; c++) {
            float x[8];
            k[i].template unpack<T>(c, x);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                float y[8];
                unpack8<T>(query[h][c], y);
#pragma unroll
                for (int d = 0; d < 8; d++) s[i][h] += x[d] * y[d];
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
#pragma unroll
            for (int step = 1; step < KEY_THREADS; step *= 2) s[i][h] += __shfl_xor_sync(~0u, s[i][h], step);
            s[i][h] *= a.scale * k[i].scale();
        }
    }
}

/* Adds the row's attention to tokens [first, first + WARP_KEYS) before `end`, times their blocks' weights; whole warp.
 * `before`: entries of the lane before token 0. log_sum in powers of two; infinite: no head. */
template <typename T, enum kv_format FORMAT, int HEADS>
__device__ static void judge_tokens(const struct judge_arguments &a, const uint4 (*query)[DIM_STEPS],
                                    const float *log_sum, int slot, int lane, int t, int before, int first, int end)
{
    const struct decode_judges &j = a.judges;
    const int key_group = (int)threadIdx.x % 32 / KEY_THREADS;
    int entry[KEYS_AT_ONCE];
    float s[KEYS_AT_ONCE][HEADS], weight[KEYS_AT_ONCE];
#pragma unroll
    for (int i = 0; i < KEYS_AT_ONCE; i++) {
        const int g = first + i * KEY_GROUPS + key_group;
        weight[i] = g < end && before + g >= 0 ? judge_weight(j, slot, g / j.block_tokens, t) : 0;
        entry[i] = max(before + min(g, end - 1), 0);
    }
    judge_logits<T, FORMAT, HEADS>(s, a, query, lane, entry);
#pragma unroll
    for (int i = 0; i < KEYS_AT_ONCE; i++) {
        const int g = first + i * KEY_GROUPS + key_group, b = g / j.block_tokens;
        if (threadIdx.x % KEY_THREADS || !(weight[i] > 0)) continue;
        long long total = 0;
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            const float x = weight[i] * power_of_2(s[i][h] - log_sum[h]);
            if (x == x) total += __double2ll_rn((double)x * 1099511627776.0);
        }
        int64_t *to = j.sum + slot * j.slot_stride + b % j.ring_blocks * j.block_stride + g % j.block_tokens;
        atomicAdd((unsigned long long *)to, (unsigned long long)total);
    }
}

/* Grid: rows x KV heads x shares of a group's heads. */
template <typename T, enum kv_format FORMAT, int HEADS>
__global__ static void __launch_bounds__(JUDGE_WARPS * 32) judge_kernel(struct judge_arguments a)
{
    let_successor_start();
    const struct decode_judges &j = a.judges;
    const int slot = a.slot[blockIdx.x], kv_head = (int)blockIdx.y, first_head = (int)blockIdx.z * HEADS;
    const bool row = slot >= 0 && slot < a.kv.n_slots;
    const int t = row ? __ldcg(j.progress + 2 * slot) : -1, settled = row ? __ldcg(j.progress + 2 * slot + 1) : 0;
    const int2 tokens = t >= 0 ? judged_tokens(j, slot, t, settled) : make_int2(0, 0);
    const int newest = (t + 1) / j.block_tokens;
    wait_for_predecessor();
    if (t < 0) return;
    if (kv_head == 0 && first_head == 0 && threadIdx.x == 0 && newest < j.max_blocks)
        j.sum[slot * j.slot_stride + newest % j.ring_blocks * j.block_stride + (t + 1) % j.block_tokens] = 0;
    int first = tokens.x + (int)threadIdx.x / 32 * WARP_KEYS;
    if (first >= tokens.y) return;
    const int lane = cache_lane(a.kv, slot, a.lane + kv_head), n = __ldcg(a.kv.lane_len + lane);
    const int64_t head = (int64_t)kv_head * a.group + first_head;
    const T *q = (const T *)a.q + blockIdx.x * a.q_stride + head * a.kv.head_dim;
    const float *sums = a.log_sum + (int64_t)blockIdx.x * gridDim.y * a.group + head;
    uint4 query[HEADS][DIM_STEPS];
    float log_sum[HEADS];
    if (n < 1) return;
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        const bool exists = first_head + h < a.group;
        load_row<T>(query[h], q + h * a.kv.head_dim, exists ? a.kv.head_dim : 0);
        log_sum[h] = exists ? __ldcg(sums + h) * 1.44269504088896f : INFINITY;
    }
#pragma unroll 1
    for (; first < tokens.y; first += JUDGE_WARPS * WARP_KEYS)
        judge_tokens<T, FORMAT, HEADS>(a, query, log_sum, slot, lane, t, n - 2 - t, first, tokens.y);
}

template <typename T, int HEADS>
static int launch_judges(struct ops *o, const struct judge_arguments &a, int n_rows, int n_kv_heads)
{
    const dim3 grid((unsigned)n_rows, (unsigned)n_kv_heads, (unsigned)((a.group + HEADS - 1) / HEADS));
    void (*kernel)(struct judge_arguments) = a.kv.format == KV_INT8  ? judge_kernel<T, KV_INT8, HEADS>
                                             : a.kv.format == KV_FP8 ? judge_kernel<T, KV_FP8, HEADS>
                                                                     : judge_kernel<T, KV_PLAIN, HEADS>;
    return cuda__launch(o, "judge_columns", kernel, grid, dim3(JUDGE_WARPS * 32), 0, a);
}

int cuda__judge_columns(struct ops *o, struct tensor q, const float *log_sum, const struct seq_batch *batch,
                        const struct kv_view *kv, const struct attention_heads *heads,
                        const struct decode_judges *judges)
{
    struct judge_arguments a = {};
    if (kv->head_dim % 8 || kv->head_dim > MOST_DIM || q.stride[0] % 8 || (uint64_t)q.data % 16)
        FAIL(ERR_UNSUPPORTED,
             "cuda: judges over heads of %d dimensions, rows of queries %lld apart; served are steps of 8 up to %d, "
             "rows at multiples of 8",
             kv->head_dim, (long long)q.stride[0], (int)MOST_DIM);
    a.kv = *kv;
    a.judges = *judges;
    a.q = q.data;
    a.q_stride = q.stride[0];
    a.log_sum = log_sum;
    a.slot = batch->slot;
    a.lane = heads->lane;
    a.group = heads->n_heads / heads->n_kv_heads;
    a.scale = heads->scale * 1.44269504088896f;
    if (a.group == 1) WITH_TYPE(q.dtype, T, return (launch_judges<T, 1>(o, a, batch->n_seqs, heads->n_kv_heads)));
    WITH_TYPE(q.dtype, T, return (launch_judges<T, MOST_JUDGE_HEADS>(o, a, batch->n_seqs, heads->n_kv_heads)));
}
