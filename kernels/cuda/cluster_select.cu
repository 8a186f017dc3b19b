/* Which clusters of keys a decode step attends to (ClusterKV), a list for each KV head of a row, or query head. Two
 * kernels: the clusters' scores, by blocks of 64 clusters, for few rows must fill the device too; then a block a list
 * cuts their order at the budget and writes the entries. Between them the scores stand where the list will.
 *
 * The order itself is never made. The score at which the sizes of all better clusters reach the budget is found by
 * summing sizes over digits of the scores' keys from the top, in integers; the list then follows the clusters'
 * numbers. */
#include "kernels/cuda/select.cuh"

enum { WARP = 32, THREADS = 512, WARPS = THREADS / WARP, WIDEST = 128, MOST_GROUP = 16, DIGITS = 256 };
enum {
    SCORE_THREADS = 256,
    PIECES = 16, /* threads a centroid, 8 dimensions each */
    ABREAST = SCORE_THREADS / PIECES,
    HELD = 4,     /* centroids of a thread, all asked for before the first is used */
    TOGETHER = 4, /* query heads in registers */
    SCORED = ABREAST * HELD
};

struct select_arguments {
    struct kv_view kv;
    const void *q, *centroid;
    int64_t q_stride;
    const int32_t *slot, *size, *entry;
    const struct cluster_state *state;
    int32_t *out, *count;
    int stride, lane, first_lane, n_lanes, max_clusters, max_entries;
    int n_lists, lane_lists, group; /* lists of a row, lists of a lane, query heads of a list */
    int n_parts;                    /* blocks of SCORED clusters of a list */
    bool mean;
};

/* Where the lane of a list is found. What is read here changes between steps alone. */
struct listed {
    int slot, head;
    int64_t row; /* in the arrays of kv_clusters */
};

__device__ static bool find_listed(const struct select_arguments &a, int item, struct listed *l)
{
    l->slot = __ldcg(&a.slot[item / a.n_lists]);
    l->head = a.lane + item % a.n_lists / a.lane_lists;
    l->row = (int64_t)l->slot * a.n_lanes + l->head - a.first_lane;
    return l->slot >= 0 && l->slot < a.kv.n_slots;
}

/* ---- scores ---- */

/* The scores of a thread's centroids, of which it has 8 dimensions; whole warp. */
template <typename T>
__device__ static void score_held(const struct select_arguments &a, const T *q, const uint4 *held, float *score)
{
    const int dim = a.kv.head_dim, d = 8 * ((int)threadIdx.x % PIECES);
    for (int first = 0; first < a.group; first += TOGETHER) {
        float query[TOGETHER][8] = {};
#pragma unroll
        for (int g = 0; g < TOGETHER; g++)
            if (first + g < a.group && d < dim) unpack8<T>(*(const uint4 *)(q + (first + g) * dim + d), query[g]);
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            float centre[8];
            unpack8<T>(held[i], centre);
#pragma unroll
            for (int g = 0; g < TOGETHER; g++) {
                float sum = 0;
#pragma unroll
                for (int j = 0; j < 8; j++) sum += query[g][j] * centre[j];
#pragma unroll
                for (int step = PIECES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
                if (first + g >= a.group) continue;
                if (a.mean)
                    score[i] += sum / (float)a.group;
                else if (first + g == 0 || sum > score[i])
                    score[i] = sum;
            }
        }
    }
}

/* Centroids are asked for before the step's queries are there. */
template <typename T> __global__ static void __launch_bounds__(SCORE_THREADS) score_kernel(struct select_arguments a)
{
    let_successor_start();
    const int item = (int)blockIdx.x / a.n_parts, piece = (int)threadIdx.x % PIECES, dim = a.kv.head_dim;
    const int part = (int)blockIdx.x % a.n_parts * SCORED, first = part + (int)threadIdx.x / PIECES;
    struct listed l;
    const int n = find_listed(a, item, &l) ? min(__ldcg(&a.state[l.row].n_clusters), a.max_clusters) : 0;
    const T *centroid = (const T *)a.centroid + l.row * a.max_clusters * dim + 8 * piece;
    uint4 held[HELD];
    float score[HELD] = {};
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int c = first + i * ABREAST;
        held[i] =
            c < n && 8 * piece < dim ? __ldcg((const uint4 *)(centroid + (int64_t)c * dim)) : make_uint4(0, 0, 0, 0);
    }
    wait_for_predecessor();
    if (part >= n) return;
    score_held<T>(a, (const T *)a.q + item / a.n_lists * a.q_stride + (int64_t)(item % a.n_lists) * a.group * dim, held,
                  score);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int c = first + i * ABREAST;
        if (c < n && piece == 0) a.out[(int64_t)item * a.stride + c] = (int32_t)select_key(score[i]);
    }
}

/* ---- the choice ---- */

/* Shared memory of a block. */
struct choice {
    uint32_t key[MOST_CLUSTERS]; /* rises with the score */
    int size[MOST_CLUSTERS];
    int start[THREADS], place[THREADS];
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

/* The cluster of the batch that place `at` of the list falls to: the last one that begins there or before. */
__device__ static int cluster_at(const struct choice *s, int n, int at)
{
    int low = 0;
    for (int high = n; high - low > 1;) {
        const int middle = (low + high) / 2;
        if (s->place[middle] <= at)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* The entries of the chosen clusters to out, in the order of the clusters' numbers. */
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
        s->place[thread] = before(s, taken, &total);
        __syncthreads();
        for (int at = thread; at < total; at += THREADS) {
            const int i = cluster_at(s, THREADS, at);
            out[place + at] = entry[s->start[i] + at - s->place[i]];
        }
        place += total;
        __syncthreads();
    }
}

__global__ static void __launch_bounds__(THREADS) select_kernel(struct select_arguments a)
{
    __shared__ struct choice s;
    let_successor_start();
    const int item = (int)blockIdx.x, thread = (int)threadIdx.x;
    int32_t *out = a.out + (int64_t)item * a.stride;
    struct listed l;
    struct cluster_state state = {};
    const bool there = find_listed(a, item, &l);
    if (there) state = a.state[l.row];
    const int n = state.n_clusters;
    for (int c = thread; c < n && c < a.max_clusters; c += THREADS)
        s.size[c] = __ldcg(&a.size[l.row * a.max_clusters + c]);
    wait_for_predecessor();
    if (!there) {
        if (thread == 0) a.count[item] = 0;
        return;
    }
    const int length = a.kv.lane_len[cache_lane(a.kv, l.slot, l.head)];
    const int clustered = state.end - state.first + state.n_host;
    const int budget = state.budget < clustered ? state.budget : clustered;
    const int listed = state.first + budget + length - state.end;
    const bool whole = n < 1 || n > a.max_clusters || budget < 1 || (budget == clustered && state.n_host == 0) ||
                       length < state.end || listed > a.stride;
    if (thread == 0) a.count[item] = whole ? -1 : listed;
    if (whole) return;
    for (int c = thread; c < n; c += THREADS) s.key[c] = (uint32_t)out[c];
    __syncthreads();
    find_cut(&s, n, budget);
    write_clusters(&s, n, a.entry + l.row * a.max_entries, out + state.first);
    for (int i = thread; i < state.first; i += THREADS) out[i] = i;
    for (int i = thread; i < length - state.end; i += THREADS) out[state.first + budget + i] = state.end + i;
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
    if (((uint64_t)q.data | (uint64_t)q.stride[0] * dtype_size(q.dtype)) % 16)
        FAIL(ERR_UNSUPPORTED, "cuda: ops_select_clusters: queries that do not lie in whole pieces of 16 bytes");
    a.kv = *kv;
    a.q = q.data, a.q_stride = q.stride[0];
    a.centroid = clusters->centroid.data, a.size = clusters->size, a.entry = clusters->entry;
    a.slot = batch->slot, a.state = clusters->state;
    a.out = entry, a.count = count, a.stride = stride;
    a.n_lists = n_lists, a.lane_lists = n_lists / heads->n_kv_heads, a.group = group, a.lane = heads->lane;
    a.first_lane = clusters->first_lane, a.n_lanes = clusters->n_lanes;
    a.max_clusters = clusters->max_clusters, a.max_entries = clusters->max_entries;
    a.mean = by == CLUSTER_KV_MEAN;
    a.n_parts = (clusters->max_clusters + SCORED - 1) / SCORED;
    const int items = batch->n_seqs * n_lists;
    WITH_TYPE(o->dtype, T,
              TRY(cuda__launch(o, "cluster_scores", score_kernel<T>, dim3((unsigned)items * (unsigned)a.n_parts),
                               dim3(SCORE_THREADS), 0, a)));
    return cuda__launch(o, "select_clusters", select_kernel, dim3((unsigned)items), dim3(THREADS), 0, a);
}
