/* H2O's decode step: scores of a lane's entries grow by the attention that each new row pays them, and the least goes
 * when the lane is full. A block a lane; a thread works out whole entries, so that sums have one order. */
#include "kernels/cuda/quantised.cuh"

enum { HEAVY_THREADS = 256, HEAVY_WARPS = HEAVY_THREADS / 32, MOST_HEADS = 16, MOST_DIM = 128 };

struct heavy_arguments {
    struct kv_view kv;
    struct heavy_hitters heavy;
    const void *q;
    int64_t q_stride;
    int lane, n_kv_heads, group, n_seqs;
    const int32_t *position, *slot;
    float scale; /* of logits in powers of two */
};

__global__ static void heavy_begin_kernel(struct kv_view kv, struct heavy_hitters heavy, int slot, const float *score,
                                          int64_t score_stride, const int32_t *index, int index_stride)
{
    let_successor_start();
    wait_for_predecessor();
    const int i = (int)blockIdx.x, lane = cache_lane(kv, slot, i);
    const int64_t first = (int64_t)lane * heavy.stride;
    const int n = min(heavy.limit[lane], heavy.stride);
    for (int j = (int)threadIdx.x; j < n; j += (int)blockDim.x) {
        const int at = index[(int64_t)i * index_stride + j];
        heavy.score[first + j] = score[i * score_stride + at];
        heavy.position[first + j] = at;
    }
}

int cuda__heavy_begin(struct ops *o, const struct kv_view *kv, const struct heavy_hitters *heavy, int slot,
                      struct tensor score, const int32_t *index, int index_stride)
{
    return cuda__launch(o, "heavy_begin", heavy_begin_kernel, dim3((unsigned)kv->lanes_per_slot), dim3(HEAVY_THREADS),
                        0, *kv, *heavy, slot, (const float *)score.data, score.stride[0], index, index_stride);
}

/* Logits of an entry for all heads of the group, in powers of two. */
template <typename T, enum kv_format FORMAT>
__device__ static void entry_logits(float *s, const struct kv_view &kv, int lane, int i, const float (*q)[MOST_DIM],
                                    int group)
{
    const int dim = kv.head_dim;
    const int64_t row = FORMAT == KV_PLAIN ? 0 : code_row(kv, lane, i);
    const T *key = (const T *)kv.pool.data + (FORMAT == KV_PLAIN ? cache_key(kv, lane, i) : 0);
    const uint8_t *code = (const uint8_t *)kv.pool.data + row * dim;
    for (int h = 0; h < MOST_HEADS; h++) s[h] = 0;
    for (int at = 0; at < dim; at += 8) {
        float k[8];
        if constexpr (FORMAT == KV_PLAIN)
            unpack8<T>(__ldcg((const uint4 *)(key + at)), k);
        else
            unpack8_codes<FORMAT>(__ldcg((const uint2 *)(code + at)), k);
#pragma unroll
        for (int h = 0; h < MOST_HEADS; h++)
            if (h < group)
#pragma unroll
                for (int d = 0; d < 8; d++) s[h] += q[h][at + d] * k[d];
    }
    if (FORMAT == KV_PLAIN) return;
    const float scale = __ldcg(&kv.scale[row]);
    for (int h = 0; h < MOST_HEADS; h++) s[h] *= scale;
}

/* Every head's maximum and sum over the lane, joined over the block in a fixed order; top[h] + log2(sum) at the end. */
template <typename T, enum kv_format FORMAT>
__device__ static void row_sums(const struct heavy_arguments &a, int lane, int n, const float (*q)[MOST_DIM],
                                float (*part)[HEAVY_WARPS], float *log_sum)
{
    float s[MOST_HEADS], top[MOST_HEADS], sum[MOST_HEADS];
    for (int h = 0; h < MOST_HEADS; h++) top[h] = -INFINITY, sum[h] = 0;
    for (int i = (int)threadIdx.x; i < n; i += HEAVY_THREADS) {
        entry_logits<T, FORMAT>(s, a.kv, lane, i, q, a.group);
#pragma unroll
        for (int h = 0; h < MOST_HEADS; h++) {
            const float high = fmaxf(top[h], s[h]);
            sum[h] = sum[h] * power_of_2(top[h] - high) + power_of_2(s[h] - high);
            top[h] = high;
        }
    }
    const int warp = (int)threadIdx.x / 32;
    for (int h = 0; h < a.group; h++) {
        float all = warp_max(top[h]);
        if (threadIdx.x % 32 == 0) part[h][warp] = all;
    }
    __syncthreads();
    for (int h = 0; h < a.group; h++) {
        float all = part[h][0];
        for (int w = 1; w < HEAVY_WARPS; w++) all = fmaxf(all, part[h][w]);
        /* A thread without entries has the maximum minus infinity, and its sum counts nothing. */
        const float total = block_sum(sum[h] > 0 ? sum[h] * power_of_2(top[h] - all) : 0);
        if (threadIdx.x == 0) log_sum[h] = all + log2f(total);
    }
    __syncthreads();
}

/* Entries as 64-bit keys of which the least goes: scores rise, positions fall, the newest are out of reach. */
__device__ static uint64_t worst_key(const float *score, const int32_t *position, int n, int oldest_recent)
{
    uint64_t least = ~0ull;
    for (int i = (int)threadIdx.x; i < n; i += HEAVY_THREADS) {
        if (position[i] >= oldest_recent) continue;
        const uint32_t rank = __float_as_uint(score[i] + 0.0f); /* scores are not negative: their bits rise with them */
        const uint64_t key = (uint64_t)rank << 32 | (uint32_t)(0x7fffffff - position[i]);
        least = key < least ? key : least;
    }
    return least;
}

__device__ static uint64_t block_least(uint64_t key, uint64_t *part)
{
    for (int step = 16; step > 0; step >>= 1) {
        const uint64_t other = __shfl_xor_sync(~0u, key, step);
        key = other < key ? other : key;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = key;
    __syncthreads();
    for (int w = 0; w < HEAVY_WARPS; w++) key = part[w] < key ? part[w] : key;
    return key;
}

/* Entry `from` of a lane takes the place of entry `to`; the whole block. */
template <enum kv_format FORMAT> __device__ static void move_entry(const struct kv_view &kv, int lane, int to, int from)
{
    const bool plain = FORMAT == KV_PLAIN;
    const int words = kv.head_dim / (plain ? 2 : 4), tokens = plain ? kv.page_size : code_tokens(kv);
    const int64_t at = plain ? cache_key(kv, lane, to) / 2 : code_row(kv, lane, to) * words;
    const int64_t source = plain ? cache_key(kv, lane, from) / 2 : code_row(kv, lane, from) * words;
    uint32_t *pool = (uint32_t *)kv.pool.data;
    const int64_t values = (int64_t)tokens * words;
    for (int i = (int)threadIdx.x; i < words; i += HEAVY_THREADS) {
        pool[at + i] = pool[source + i];
        pool[at + values + i] = pool[source + values + i];
    }
    if (plain || threadIdx.x > 1) return;
    const int64_t half = (int64_t)threadIdx.x * tokens; /* of keys, of values */
    kv.scale[code_row(kv, lane, to) + half] = kv.scale[code_row(kv, lane, from) + half];
}

/* Evicts one entry: the last one takes its place. false: all are among the newest. */
template <enum kv_format FORMAT>
__device__ static bool evict_one(const struct heavy_arguments &a, int lane, float *score, int32_t *position, int n,
                                 int oldest_recent, uint64_t *part)
{
    const uint64_t worst = block_least(worst_key(score, position, n, oldest_recent), part);
    if (worst == ~0ull) return false;
    const int gone = 0x7fffffff - (int)(uint32_t)worst, last = n - 1;
    __shared__ int hole;
    for (int i = (int)threadIdx.x; i < n; i += HEAVY_THREADS)
        if (position[i] == gone) hole = i;
    __syncthreads();
    if (hole != last) {
        move_entry<FORMAT>(a.kv, lane, hole, last);
        if (threadIdx.x == 0) score[hole] = score[last], position[hole] = position[last];
    }
    __syncthreads();
    return true;
}

template <typename T, enum kv_format FORMAT>
__global__ static void __launch_bounds__(HEAVY_THREADS) heavy_kernel(struct heavy_arguments a)
{
    __shared__ float q[MOST_HEADS][MOST_DIM], part[MOST_HEADS][HEAVY_WARPS], log_sum[MOST_HEADS];
    __shared__ uint64_t least[HEAVY_WARPS];
    let_successor_start();
    wait_for_predecessor();
    const int row = (int)blockIdx.x / a.n_kv_heads, head = (int)blockIdx.x % a.n_kv_heads, dim = a.kv.head_dim;
    if (a.slot[row] < 0 || a.slot[row] >= a.kv.n_slots) return;
    const int lane = cache_lane(a.kv, a.slot[row], a.lane + head), limit = a.heavy.limit[lane];
    const int length = a.kv.lane_len[lane];
    if (limit <= 0 || length < 1 || length > a.heavy.stride) return;
    float *score = a.heavy.score + (int64_t)lane * a.heavy.stride;
    int32_t *position = a.heavy.position + (int64_t)lane * a.heavy.stride;
    const T *from = (const T *)a.q + row * a.q_stride + (int64_t)head * a.group * dim;
    for (int i = (int)threadIdx.x; i < a.group * dim; i += HEAVY_THREADS)
        q[i / dim][i % dim] = to_float(from[i]) * a.scale;
    if (threadIdx.x == 0) score[length - 1] = 0, position[length - 1] = a.position[row];
    __syncthreads();
    row_sums<T, FORMAT>(a, lane, length, q, part, log_sum);
    for (int i = (int)threadIdx.x; i < length; i += HEAVY_THREADS) {
        float s[MOST_HEADS], sum = 0;
        entry_logits<T, FORMAT>(s, a.kv, lane, i, q, a.group);
#pragma unroll
        for (int h = 0; h < MOST_HEADS; h++)
            if (h < a.group) sum += power_of_2(s[h] - log_sum[h]);
        score[i] += sum;
    }
    __syncthreads();
    int n = length;
    while (n > limit &&
           evict_one<FORMAT>(a, lane, score, position, n, a.position[row] - a.heavy.recent[lane] + 1, least))
        n--;
    if (threadIdx.x || n == length) return;
    const int tokens = FORMAT == KV_PLAIN ? a.kv.page_size : code_tokens(a.kv);
    const int keep = (n + tokens - 1) / tokens, had = (length + tokens - 1) / tokens;
    for (int i = had - 1; i >= keep; i--)
        a.kv.free_stack[atomicAdd(a.kv.free_count, 1)] = a.kv.page_row[(int64_t)lane * a.kv.max_pages + i];
    a.kv.lane_len[lane] = n;
}

template <typename T> static int launch_heavy(struct ops *o, const struct heavy_arguments &a)
{
    void (*kernel)(struct heavy_arguments) = a.kv.format == KV_INT8  ? heavy_kernel<T, KV_INT8>
                                             : a.kv.format == KV_FP8 ? heavy_kernel<T, KV_FP8>
                                                                     : heavy_kernel<T, KV_PLAIN>;
    const dim3 grid((unsigned)(a.n_seqs * a.n_kv_heads));
    return cuda__launch(o, "heavy_decode", kernel, grid, dim3(HEAVY_THREADS), 0, a);
}

int cuda__heavy_decode(struct ops *o, struct tensor q, const int32_t *position, const struct seq_batch *batch,
                       const struct kv_view *kv, const struct attention_heads *heads, const struct heavy_hitters *heavy)
{
    struct heavy_arguments a = {};
    a.kv = *kv, a.heavy = *heavy;
    a.q = q.data, a.q_stride = q.stride[0];
    a.lane = heads->lane, a.n_kv_heads = heads->n_kv_heads, a.group = heads->n_heads / heads->n_kv_heads;
    a.n_seqs = batch->n_seqs, a.position = position, a.slot = batch->slot;
    a.scale = heads->scale * 1.44269504088896340736f;
    if (a.group > MOST_HEADS || kv->head_dim > MOST_DIM || kv->head_dim % 8)
        FAIL(ERR_UNSUPPORTED,
             "cuda: h2o serves up to %d query heads a KV head, of up to %d dimensions in steps of 8; "
             "this model has %d of %d",
             MOST_HEADS, MOST_DIM, a.group, kv->head_dim);
    WITH_TYPE(q.dtype, T, return launch_heavy<T>(o, a));
}
