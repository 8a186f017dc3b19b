/* Which clusters of keys a decode step attends to (ClusterKV). A block a list (of a row's KV head, or query head): the
 * clusters' scores, the cut of their order at the budget, the entries.
 *
 * The order itself is never made. The score at which the sizes of all better clusters reach the budget is found by
 * summing sizes over digits of the scores' keys from the top, in integers; the list then follows the clusters'
 * numbers. */
#include "kernels/cuda/select.cuh"

enum { WARP = 32, THREADS = 512, WARPS = THREADS / WARP, PIECES = 16, WIDEST = 128, MOST_GROUP = 16, DIGITS = 256 };

struct select_arguments {
    struct kv_view kv;
    const void *q, *centroid;
    int64_t q_stride;
    const int32_t *slot, *size, *entry;
    const struct cluster_state *state;
    int32_t *out, *count;
    int stride, lane, first_lane, n_lanes, max_clusters, max_entries;
    int n_lists, lane_lists, group; /* lists of a row, lists of a lane, query heads of a list */
    bool mean;
};

/* Shared memory of a block. */
struct choice {
    float q[MOST_GROUP][WIDEST];
    uint32_t key[MOST_CLUSTERS]; /* rises with the score */
    int size[MOST_CLUSTERS];
    int start[THREADS], taken[THREADS], place[THREADS];
    int digit[DIGITS], part[WARPS + 1];
    uint32_t cut;
    int left;
};

/* What the threads before this one bring in all; whole block. */
__device__ static int before(struct choice *s, int x, int *total)
{
    const int warp = (int)threadIdx.x / WARP, thread = (int)threadIdx.x % WARP;
    int upto = x, sum = 0, all = 0;
    for (int step = 1; step < WARP; step *= 2) {
        const int below = __shfl_up_sync(~0u, upto, step);
        if (thread >= step) upto += below;
    }
    __syncthreads();
    if (thread == WARP - 1) s->part[warp] = upto;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) {
        if (w < warp) sum += s->part[w];
        all += s->part[w];
    }
    *total = all;
    return sum + upto - x;
}

/* Scores of all clusters, 16 threads a centroid, 8 dimensions each. */
template <typename T>
__device__ static void score_clusters(const struct select_arguments &a, struct choice *s, int64_t row, int n)
{
    const int dim = a.kv.head_dim, piece = (int)threadIdx.x % PIECES;
    const T *centroid = (const T *)a.centroid + row * a.max_clusters * dim;
    const int32_t *size = a.size + row * a.max_clusters;
#pragma unroll 2
    for (int first = 0; first < n; first += THREADS / PIECES) {
        const int c = first + (int)threadIdx.x / PIECES;
        const bool there = c < n && 8 * piece < dim;
        float centre[8] = {}, score = 0;
        if (there) unpack8<T>(*(const uint4 *)(centroid + (int64_t)c * dim + 8 * piece), centre);
        for (int g = 0; g < a.group; g++) {
            float sum = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) sum += s->q[g][8 * piece + j] * centre[j];
#pragma unroll
            for (int step = PIECES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
            if (a.mean)
                score += sum / (float)a.group;
            else if (g == 0 || sum > score)
                score = sum;
        }
        if (c < n && piece == 0) s->key[c] = select_key(score), s->size[c] = size[c];
    }
    __syncthreads();
}

/* The digit at which the sizes, added from the highest digit down, reach s->left; takes off what lies above. One warp,
 * 8 digits a thread. */
__device__ static void enter_digit(struct choice *s, int shift)
{
    const int thread = (int)threadIdx.x, top = DIGITS - 1 - 8 * thread, left = s->left;
    int mine = 0, upto;
    for (int i = 0; i < 8; i++) mine += s->digit[top - i];
    upto = mine;
    for (int step = 1; step < WARP; step *= 2) {
        const int below = __shfl_up_sync(~0u, upto, step);
        if (thread >= step) upto += below;
    }
    const bool here = upto >= left && upto - mine < left;
    __syncwarp(); /* all have read what one is about to write */
    if (here) {
        int above = upto - mine, digit = top;
        for (; above + s->digit[digit] < left; digit--) above += s->digit[digit];
        s->cut |= (uint32_t)digit << shift;
        s->left = left - above;
    }
}

/* Leaves in s->cut the key of the cluster that the budget ends in, in s->left what clusters of this key get in all. */
__device__ static void find_cut(struct choice *s, int n, int budget)
{
    if (threadIdx.x == 0) s->cut = 0, s->left = budget;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = (int)threadIdx.x; i < DIGITS; i += THREADS) s->digit[i] = 0;
        __syncthreads();
        const uint32_t prefix = s->cut;
        for (int c = (int)threadIdx.x; c < n; c += THREADS)
            if ((uint64_t)(s->key[c] ^ prefix) >> (shift + 8) == 0)
                atomicAdd(&s->digit[s->key[c] >> shift & (DIGITS - 1)], s->size[c]);
        __syncthreads();
        if (threadIdx.x < WARP) enter_digit(s, shift);
        __syncthreads();
    }
}

/* The entries of the chosen clusters to out, in the order of the clusters' numbers; a warp a cluster. */
__device__ static void write_clusters(struct choice *s, int n, const int32_t *entry, int32_t *out)
{
    const int thread = (int)threadIdx.x;
    int start = 0, tied = 0, place = 0, total;
    for (int first = 0; first < n; first += THREADS) {
        const int c = first + thread, size = c < n ? s->size[c] : 0;
        const bool better = c < n && s->key[c] > s->cut, equal = c < n && s->key[c] == s->cut;
        s->start[thread] = start + before(s, size, &total);
        start += total;
        const int rest = s->left - tied - before(s, equal ? size : 0, &total);
        tied += total;
        const int taken = better ? size : !equal || rest < 0 ? 0 : rest < size ? rest : size;
        s->taken[thread] = taken;
        s->place[thread] = place + before(s, taken, &total);
        place += total;
        __syncthreads();
        for (int i = thread / WARP; i < THREADS && first + i < n; i += WARPS)
            for (int j = thread % WARP; j < s->taken[i]; j += WARP) out[s->place[i] + j] = entry[s->start[i] + j];
        __syncthreads();
    }
}

template <typename T> __global__ static void __launch_bounds__(THREADS) select_kernel(struct select_arguments a)
{
    __shared__ struct choice s;
    let_successor_start();
    wait_for_predecessor();
    const int item = (int)blockIdx.x, row_list = item % a.n_lists, head = row_list / a.lane_lists;
    const int slot = a.slot[item / a.n_lists];
    if (slot < 0 || slot >= a.kv.n_slots) {
        if (threadIdx.x == 0) a.count[item] = 0;
        return;
    }
    const int64_t row = (int64_t)slot * a.n_lanes + a.lane + head - a.first_lane;
    const struct cluster_state state = a.state[row];
    const int length = a.kv.lane_len[cache_lane(a.kv, slot, a.lane + head)], n = state.n_clusters;
    const int clustered = state.end - state.first + state.n_host;
    const int budget = state.budget < clustered ? state.budget : clustered;
    const int listed = state.first + budget + length - state.end;
    const bool whole = n < 1 || n > a.max_clusters || budget < 1 || (budget == clustered && state.n_host == 0) ||
                       length < state.end || listed > a.stride;
    if (threadIdx.x == 0) a.count[item] = whole ? -1 : listed;
    if (whole) return;
    const T *q = (const T *)a.q + item / a.n_lists * a.q_stride + (int64_t)row_list * a.group * a.kv.head_dim;
    int32_t *out = a.out + (int64_t)item * a.stride;
    for (int i = (int)threadIdx.x; i < a.group * WIDEST; i += THREADS) {
        const int g = i / WIDEST, d = i % WIDEST;
        s.q[g][d] = d < a.kv.head_dim ? to_float(q[g * a.kv.head_dim + d]) : 0;
    }
    __syncthreads();
    score_clusters<T>(a, &s, row, n);
    find_cut(&s, n, budget);
    write_clusters(&s, n, a.entry + row * a.max_entries, out + state.first);
    for (int i = (int)threadIdx.x; i < state.first; i += THREADS) out[i] = i;
    for (int i = (int)threadIdx.x; i < length - state.end; i += THREADS) out[state.first + budget + i] = state.end + i;
}

int cuda__select_clusters(struct ops *o, int32_t *entry, int32_t *count, int stride, struct tensor q,
                          enum cluster_kv_group by, const struct seq_batch *batch, const struct kv_view *kv,
                          const struct attention_heads *heads, const struct kv_clusters *clusters)
{
    struct select_arguments a = {};
    const int n_lists = by == CLUSTER_KV_QUERY_HEAD ? heads->n_heads : heads->n_kv_heads;
    const int group = heads->n_heads / n_lists;
    if (kv->head_dim % 8 || kv->head_dim > WIDEST || group > MOST_GROUP)
        FAIL(ERR_UNSUPPORTED,
             "cuda: clusters of keys of %d dimensions, %d query heads that share a list; served are steps of 8 up to "
             "%d and up to %d heads",
             kv->head_dim, group, WIDEST, MOST_GROUP);
    a.kv = *kv;
    a.q = q.data, a.q_stride = q.stride[0];
    a.centroid = clusters->centroid.data, a.size = clusters->size, a.entry = clusters->entry;
    a.slot = batch->slot, a.state = clusters->state;
    a.out = entry, a.count = count, a.stride = stride;
    a.n_lists = n_lists, a.lane_lists = n_lists / heads->n_kv_heads, a.group = group, a.lane = heads->lane;
    a.first_lane = clusters->first_lane, a.n_lanes = clusters->n_lanes;
    a.max_clusters = clusters->max_clusters, a.max_entries = clusters->max_entries;
    a.mean = by == CLUSTER_KV_MEAN;
    WITH_TYPE(o->dtype, T,
              return cuda__launch(o, "select_clusters", select_kernel<T>, dim3((unsigned)(batch->n_seqs * n_lists)),
                                  dim3(THREADS), 0, a));
}
