/* Rows of decode steps as judges of generated tokens: a block for a row, a KV head and up to 4 of its query heads goes
 * over the lane's keys for the sum of the softmax, then over the unsettled tokens at the lane's end once more, and adds
 * each one's share as an integer, which may come in any order.
 *
 * 8 threads hold a key, 16 bytes at a time, and 4 keys of different places at once, so that their loads overlap. */
#include "kernels/cuda/device.cuh"

enum {
    JUDGE_THREADS = 512,
    KEY_THREADS = 8,
    KEY_GROUPS = JUDGE_THREADS / KEY_THREADS,
    KEYS_AT_ONCE = 4,
    MOST_DIM = 128,
    MOST_JUDGE_HEADS = 4
};

struct judge_arguments {
    struct kv_view kv;
    struct decode_judges judges;
    const void *q;
    int64_t q_stride;
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

/* Logits of KEYS_AT_ONCE entries of a lane, on all threads of the 8 that share them; whole warp. */
template <typename T, int HEADS>
__device__ static void judge_logits(float (*s)[HEADS], const struct judge_arguments &a, const float (*query)[MOST_DIM],
                                    int lane, const int *entry)
{
    const int t = (int)threadIdx.x % KEY_THREADS, size = a.kv.page_size, dim = a.kv.head_dim;
    const int32_t *pages = a.kv.page_row + (int64_t)lane * a.kv.max_pages;
    int64_t key[KEYS_AT_ONCE];
    uint4 k[KEYS_AT_ONCE][2];
#pragma unroll
    for (int i = 0; i < KEYS_AT_ONCE; i++)
        key[i] = ((int64_t)__ldcg(pages + entry[i] / size) * 2 * size + entry[i] % size) * dim;
#pragma unroll
    for (int i = 0; i < KEYS_AT_ONCE; i++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int at = (c * KEY_THREADS + t) * 8;
            k[i][c] =
                at < dim ? __ldcg((const uint4 *)((const T *)a.kv.pool.data + key[i] + at)) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
    for (int i = 0; i < KEYS_AT_ONCE; i++) {
#pragma unroll
        for (int h = 0; h < HEADS; h++) s[i][h] = 0;
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float x[8];
            unpack8<T>(k[i][c], x);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                const float *y = query[h] + (c * KEY_THREADS + t) * 8; /* zeros beyond the head's dimensions */
#pragma unroll
                for (int d = 0; d < 8; d++) s[i][h] += x[d] * y[d];
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
#pragma unroll
            for (int step = 1; step < KEY_THREADS; step *= 2) s[i][h] += __shfl_xor_sync(~0u, s[i][h], step);
            s[i][h] *= a.scale;
        }
    }
}

/* Maximum and sum over the whole lane for each head, on all threads; whole block. */
template <typename T, int HEADS>
__device__ static void judge_softmax(float2 *whole, const struct judge_arguments &a, const float (*query)[MOST_DIM],
                                     int lane, int n)
{
    __shared__ float2 part[HEADS][KEY_GROUPS];
    __shared__ float2 joined[HEADS];
    const int key_group = (int)threadIdx.x / KEY_THREADS, warp = (int)threadIdx.x / 32, thread = (int)threadIdx.x % 32;
    float top[HEADS], sum[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) top[h] = -INFINITY, sum[h] = 0;
    for (int first = 0; first < n; first += KEY_GROUPS * KEYS_AT_ONCE) {
        int entry[KEYS_AT_ONCE];
        float s[KEYS_AT_ONCE][HEADS];
#pragma unroll
        for (int i = 0; i < KEYS_AT_ONCE; i++) entry[i] = min(first + i * KEY_GROUPS + key_group, n - 1);
        judge_logits<T, HEADS>(s, a, query, lane, entry);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float best = top[h];
#pragma unroll
            for (int i = 0; i < KEYS_AT_ONCE; i++) {
                if (first + i * KEY_GROUPS + key_group >= n) s[i][h] = -INFINITY;
                best = fmaxf(best, s[i][h]);
            }
            const float base = best == -INFINITY ? 0 : best;
            sum[h] *= power_of_2(top[h] - base);
#pragma unroll
            for (int i = 0; i < KEYS_AT_ONCE; i++) sum[h] += power_of_2(s[i][h] - base);
            top[h] = best;
        }
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++)
        if (threadIdx.x % KEY_THREADS == 0) part[h][key_group] = make_float2(top[h], sum[h]);
    __syncthreads();
    if (warp < HEADS) { /* a warp joins a head's groups */
        const float2 x = part[warp][thread], y = part[warp][thread + 32];
        const float best = warp_max(fmaxf(x.x, y.x));
        const float all = warp_sum(x.y * power_of_2(x.x - best) + y.y * power_of_2(y.x - best));
        if (thread == 0) joined[warp] = make_float2(best, all);
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < HEADS; h++) whole[h] = joined[h];
}

/* Adds the row's attention to tokens [g, end) times their blocks' weights; whole block. */
template <typename T, int HEADS>
__device__ static void judge_tokens(const struct judge_arguments &a, const float (*query)[MOST_DIM],
                                    const float2 *whole, int slot, int lane, int n, int t, int g0, int n_heads)
{
    const struct decode_judges &j = a.judges;
    const int key_group = (int)threadIdx.x / KEY_THREADS, end = t + 1;
    for (int first = g0; first < end; first += KEY_GROUPS * KEYS_AT_ONCE) {
        int entry[KEYS_AT_ONCE];
        float s[KEYS_AT_ONCE][HEADS], weight[KEYS_AT_ONCE];
        bool judged = false;
#pragma unroll
        for (int i = 0; i < KEYS_AT_ONCE; i++) {
            const int g = first + i * KEY_GROUPS + key_group, b = g / j.block_tokens;
            weight[i] = g < end && b < j.max_blocks && n - 1 - end + g >= 0 ? judge_weight(j, slot, b, t) : 0;
            entry[i] = min(max(n - 1 - end + g, 0), n - 1);
            judged |= weight[i] > 0;
        }
        if (!__any_sync(~0u, judged)) continue;
        judge_logits<T, HEADS>(s, a, query, lane, entry);
#pragma unroll
        for (int i = 0; i < KEYS_AT_ONCE; i++) {
            const int g = first + i * KEY_GROUPS + key_group, b = g / j.block_tokens;
            if (threadIdx.x % KEY_THREADS || !(weight[i] > 0)) continue;
            long long total = 0;
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                const float x = weight[i] * (power_of_2(s[i][h] - whole[h].x) / whole[h].y);
                if (h < n_heads && x == x) total += __double2ll_rn((double)x * 1099511627776.0);
            }
            int64_t *to = j.sum + slot * j.slot_stride + b % j.ring_blocks * j.block_stride + g % j.block_tokens;
            atomicAdd((unsigned long long *)to, (unsigned long long)total);
        }
    }
}

/* Grid: rows x KV heads x shares of a group's heads. */
template <typename T, int HEADS>
__global__ static void __launch_bounds__(JUDGE_THREADS) judge_kernel(struct judge_arguments a)
{
    __shared__ __align__(16) float query[HEADS][MOST_DIM];
    let_successor_start();
    wait_for_predecessor();
    const struct decode_judges &j = a.judges;
    const int slot = a.slot[blockIdx.x], kv_head = (int)blockIdx.y, first_head = (int)blockIdx.z * HEADS;
    if (slot < 0 || slot >= a.kv.n_slots) return;
    const int t = __ldcg(j.progress + 2 * slot), settled = __ldcg(j.progress + 2 * slot + 1);
    if (t < 0) return;
    const int lane = cache_lane(a.kv, slot, a.lane + kv_head), n = __ldcg(a.kv.lane_len + lane);
    const int n_heads = min(HEADS, a.group - first_head), g0 = settled * j.block_tokens;
    const int newest = (t + 1) / j.block_tokens;
    if (kv_head == 0 && first_head == 0 && threadIdx.x == 0 && newest < j.max_blocks)
        j.sum[slot * j.slot_stride + newest % j.ring_blocks * j.block_stride + (t + 1) % j.block_tokens] = 0;
    bool judges = false; /* whether this row is among those of any block */
    for (int b = settled + (int)threadIdx.x; b <= t / j.block_tokens && b < j.max_blocks; b += JUDGE_THREADS)
        judges |= judge_weight(j, slot, b, t) > 0;
    if (!__syncthreads_or(judges) || n < 1) return;
    const T *q = (const T *)a.q + blockIdx.x * a.q_stride + (int64_t)(kv_head * a.group + first_head) * a.kv.head_dim;
    for (int i = (int)threadIdx.x; i < HEADS * MOST_DIM; i += JUDGE_THREADS) {
        const int h = i / MOST_DIM, d = i % MOST_DIM;
        query[h][d] = h < n_heads && d < a.kv.head_dim ? to_float(q[(int64_t)h * a.kv.head_dim + d]) : 0;
    }
    __syncthreads();
    float2 whole[HEADS];
    judge_softmax<T, HEADS>(whole, a, query, lane, n);
    judge_tokens<T, HEADS>(a, query, whole, slot, lane, n, t, g0, n_heads);
}

template <typename T, int HEADS>
static int launch_judges(struct ops *o, const struct judge_arguments &a, int n_rows, int n_kv_heads)
{
    const dim3 grid((unsigned)n_rows, (unsigned)n_kv_heads, (unsigned)((a.group + HEADS - 1) / HEADS));
    return cuda__launch(o, "judge_columns", judge_kernel<T, HEADS>, grid, dim3(JUDGE_THREADS), 0, a);
}

int cuda__judge_columns(struct ops *o, struct tensor q, const struct seq_batch *batch, const struct kv_view *kv,
                        const struct attention_heads *heads, const struct decode_judges *judges)
{
    struct judge_arguments a = {};
    if (kv->head_dim % 8 || kv->head_dim > MOST_DIM)
        FAIL(ERR_UNSUPPORTED, "cuda: judges over heads of %d dimensions; served are steps of 8 up to %d", kv->head_dim,
             (int)MOST_DIM);
    a.kv = *kv;
    a.judges = *judges;
    a.q = q.data;
    a.q_stride = q.stride[0];
    a.slot = batch->slot;
    a.lane = heads->lane;
    a.group = heads->n_heads / heads->n_kv_heads;
    a.scale = heads->scale * 1.44269504088896f;
    if (a.group == 1) WITH_TYPE(q.dtype, T, return (launch_judges<T, 1>(o, a, batch->n_seqs, heads->n_kv_heads)));
    WITH_TYPE(q.dtype, T, return (launch_judges<T, MOST_JUDGE_HEADS>(o, a, batch->n_seqs, heads->n_kv_heads)));
}
