/* Pages of a lane (struct page_pick), ranked by what a key within the page's bounds could give to the queries at hand.
 *
 * A warp takes a page, four channels a thread; the bounds of the lane's last page, which has just grown, are made anew
 * from its keys by the warp that ranks it. Then a block a list cuts off the best pages and writes their entries in
 * order. Lengths are read on the device: a step can be captured. */
#include "kernels/cuda/quantised.cuh"
#include "kernels/cuda/select.cuh"

enum { PAGE_WARPS = 8, MOST_GROUP = 16, MOST_DIM = 128, BLOCKS_EACH = 8 /* of a multiprocessor */, LIST_THREADS = 256 };

struct page_arguments {
    struct kv_view kv;
    struct page_pick pick;
    const void *q;
    int64_t q_stride;
    const int32_t *slot;
    int n_kv_heads, group, lane;
};

/* Four channels of a page's keys, from 4 * thread on. */
struct channels {
    float least[4], largest[4];
};

template <typename T> __device__ static void unpack4(uint2 x, float *out)
{
    const float2 low = unpack2<T>(x.x), high = unpack2<T>(x.y);
    out[0] = low.x, out[1] = low.y, out[2] = high.x, out[3] = high.y;
}

template <typename T> __device__ static uint2 pack4(const float *in)
{
    return make_uint2(pack2<T>(in[0], in[1]), pack2<T>(in[2], in[3]));
}

/* Where a page of a lane has its bounds, in elements: the least of each channel, then the largest. */
__device__ static int64_t bounds_of(const struct kv_view &kv, int lane, int page)
{
    const int each = kv.format == KV_PLAIN ? 1 : code_tokens(kv) / kv.page_size;
    const int64_t number = kv.page_row[(int64_t)lane * kv.max_pages + page / each];
    return (number * each + page % each) * 2 * kv.head_dim;
}

/* Takes four channels of a key in. */
__device__ static void widen_channels(struct channels *c, const float *x)
{
#pragma unroll
    for (int j = 0; j < 4; j++) c->least[j] = fminf(c->least[j], x[j]), c->largest[j] = fmaxf(c->largest[j], x[j]);
}

/* The bounds of the n_tokens keys of a page, kept in `bounds`; a warp. Threads past the head have none. */
template <typename T>
__device__ static void bound_page(struct channels *c, T *bounds, const struct kv_view &kv, int lane, int page,
                                  int n_tokens)
{
    const int dim = kv.head_dim, at = 4 * ((int)threadIdx.x % 32), first = page * kv.page_size;
    const enum kv_format format = lane_format(kv, lane);
    if (at >= dim) return;
    for (int j = 0; j < 4; j++) c->least[j] = INFINITY, c->largest[j] = -INFINITY;
    if (format == KV_PLAIN) {
        const T *key = (const T *)kv.pool.data + cache_key(kv, lane, first) + at;
#pragma unroll 4
        for (int i = 0; i < n_tokens; i++) {
            float x[4];
            unpack4<T>(*(const uint2 *)(key + i * dim), x);
            widen_channels(c, x);
        }
    } else {
        const int64_t row = code_row(kv, lane, first);
        const uint8_t *code = (const uint8_t *)kv.pool.data + row * dim + at;
#pragma unroll 4
        for (int i = 0; i < n_tokens; i++) {
            const uint32_t word = *(const uint32_t *)(code + i * dim);
            const float scale = kv.scale[row + i];
            float x[4];
#pragma unroll
            for (int j = 0; j < 4; j++) x[j] = quantise_value(format, (uint8_t)(word >> 8 * j)) * scale;
            widen_channels(c, x);
        }
    }
    T *to = bounds + bounds_of(kv, lane, page) + at;
    const uint2 least = pack4<T>(c->least), largest = pack4<T>(c->largest);
    *(uint2 *)to = least;
    *(uint2 *)(to + dim) = largest;
    unpack4<T>(least, c->least); /* as a later step will find them */
    unpack4<T>(largest, c->largest);
}

__device__ static int pages_of(const struct kv_view &kv, int length)
{
    return (length + kv.page_size - 1) / kv.page_size;
}

template <typename T>
__global__ static void __launch_bounds__(PAGE_WARPS * 32)
    page_bounds_kernel(T *bounds, struct kv_view kv, int first_lane)
{
    let_successor_start();
    wait_for_predecessor();
    const int lane = first_lane + (int)blockIdx.y, length = kv.lane_len[lane], n = pages_of(kv, length);
    for (int page = (int)(blockIdx.x * PAGE_WARPS + threadIdx.x / 32); page < n; page += (int)gridDim.x * PAGE_WARPS) {
        struct channels c;
        const int left = length - page * kv.page_size;
        bound_page<T>(&c, bounds, kv, lane, page, left < kv.page_size ? left : kv.page_size);
    }
}

static int check_pages(const struct kv_view *kv, int group)
{
    if (kv->head_dim % 8 || kv->head_dim > MOST_DIM || group > MOST_GROUP)
        FAIL(ERR_UNSUPPORTED,
             "cuda: pages of keys of %d dimensions, for groups of %d heads; served are dimensions in steps of 8 up to "
             "%d, groups up to %d",
             kv->head_dim, group, MOST_DIM, MOST_GROUP);
    return OK;
}

int cuda__page_bounds(struct ops *o, struct tensor bounds, const struct kv_view *kv, int slot, int lane, int n_lanes)
{
    enum { MOST_BLOCKS = 16 /* of a lane */ };
    const int blocks = (kv->max_pages + PAGE_WARPS - 1) / PAGE_WARPS;
    const dim3 grid((unsigned)(blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS), (unsigned)n_lanes);
    TRY(check_pages(kv, 1));
    WITH_TYPE(bounds.dtype, T,
              return cuda__launch(o, "page_bounds", page_bounds_kernel<T>, grid, dim3(PAGE_WARPS * 32), 0,
                                  (T *)bounds.data, *kv, slot * kv->lanes_per_slot + lane));
}

/* ---- picking ---- */

/* A row's lane of one KV head: its pages, and how many of them are wanted: none, some, or (as many as there are) all.
 */
struct wanted_pages {
    int lane, length, n, limit;
};

__device__ static bool find_wanted(const struct page_arguments &a, int row, int head, struct wanted_pages *w)
{
    const int slot = a.slot[row], most = a.pick.stride / a.kv.page_size;
    if (slot < 0 || slot >= a.kv.n_slots) return false;
    w->lane = cache_lane(a.kv, slot, a.lane + head);
    w->length = a.kv.lane_len[w->lane];
    w->n = pages_of(a.kv, w->length);
    w->limit = a.pick.limit[slot] < most ? a.pick.limit[slot] : most;
    if (w->n > a.kv.max_pages) w->limit = 0; /* more than scores have room for: read whole */
    return true;
}

/* The most that a key within the bounds gives to any query of the group; a warp, on all its threads. */
__device__ static float rank_page(const struct channels &c, const float *q, int group, int dim)
{
    const int at = 4 * ((int)threadIdx.x % 32);
    float best = -INFINITY;
    for (int j = 0; j < group; j++) {
        float sum = 0;
        if (at < dim) {
            const float4 x = *(const float4 *)(q + j * dim + at);
            sum = fmaxf(x.x * c.least[0], x.x * c.largest[0]) + fmaxf(x.y * c.least[1], x.y * c.largest[1]) +
                  (fmaxf(x.z * c.least[2], x.z * c.largest[2]) + fmaxf(x.w * c.least[3], x.w * c.largest[3]));
        }
        best = fmaxf(best, warp_sum(sum));
    }
    return best;
}

template <typename T>
__global__ static void __launch_bounds__(PAGE_WARPS * 32) rank_pages_kernel(struct page_arguments a)
{
    __shared__ __align__(16) float q[MOST_GROUP * MOST_DIM];
    let_successor_start();
    wait_for_predecessor();
    const int head = (int)blockIdx.y, row = (int)blockIdx.z, dim = a.kv.head_dim, width = a.group * dim;
    struct wanted_pages w;
    if (!find_wanted(a, row, head, &w) || w.limit <= 0) return;
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x)
        q[i] = to_float(((const T *)a.q)[row * a.q_stride + (int64_t)head * width + i]);
    __syncthreads();
    T *bounds = (T *)a.pick.bounds.data;
    float *score = (float *)a.pick.score.data + ((int64_t)row * a.n_kv_heads + head) * a.kv.max_pages;
    const int at = 4 * ((int)threadIdx.x % 32), step = (int)gridDim.x * PAGE_WARPS;
    for (int page = (int)(blockIdx.x * PAGE_WARPS + threadIdx.x / 32); page < w.n; page += step) {
        struct channels c = {};
        if (page == w.n - 1) {
            bound_page<T>(&c, bounds, a.kv, w.lane, page, w.length - page * a.kv.page_size);
        } else if (w.limit >= w.n) { /* all are wanted: only bounds must stay up to date */
            continue;
        } else if (at < dim) {
            const T *from = bounds + bounds_of(a.kv, w.lane, page) + at;
            unpack4<T>(*(const uint2 *)from, c.least);
            unpack4<T>(*(const uint2 *)(from + dim), c.largest);
        }
        const float best = rank_page(c, q, a.group, dim);
        if (at == 0) score[page] = best;
    }
}

__global__ static void __launch_bounds__(LIST_THREADS) list_pages_kernel(struct page_arguments a)
{
    __shared__ int digits[SELECT_DIGITS];
    let_successor_start();
    wait_for_predecessor();
    const int head = (int)blockIdx.x, row = (int)blockIdx.y, size = a.kv.page_size;
    const int64_t list = (int64_t)row * a.n_kv_heads + head;
    struct wanted_pages w;
    const bool runs = find_wanted(a, row, head, &w);
    if (!runs || w.limit <= 0 || w.limit >= w.n) {
        if (threadIdx.x == 0) a.pick.count[list] = runs ? -1 : 0;
        return;
    }
    const float *score = (const float *)a.pick.score.data + list * a.kv.max_pages;
    int32_t *entry = a.pick.entry + list * a.pick.stride;
    const struct cut cut = cut_after(score, w.n, w.limit, digits);
    int64_t equal = 0;
    int taken = 0, last_taken = 0;
    for (int first = 0; first < w.n; first += (int)blockDim.x) {
        const int page = first + (int)threadIdx.x;
        const uint32_t key = page < w.n ? select_key(score[page]) : 0;
        int n_equal, n_taken;
        const bool tied = page < w.n && key == cut.key;
        const int among_tied = block_rank(tied, &n_equal);
        const bool take = page < w.n && (key > cut.key || (tied && equal + among_tied < cut.n_equal));
        const int at = (taken + block_rank(take, &n_taken)) * size;
        for (int i = 0; take && i < size && page * size + i < w.length; i++) entry[at + i] = page * size + i;
        last_taken |= __syncthreads_or(take && page == w.n - 1);
        equal += n_equal;
        taken += n_taken;
    }
    if (threadIdx.x == 0) a.pick.count[list] = taken * size - (last_taken ? w.n * size - w.length : 0);
}

int cuda__pick_pages(struct ops *o, struct tensor q, const struct seq_batch *batch, const struct kv_view *kv,
                     const struct attention_heads *heads, const struct page_pick *pick)
{
    const int lanes = batch->n_seqs * heads->n_kv_heads, most = (kv->max_pages + PAGE_WARPS - 1) / PAGE_WARPS;
    const int wanted = (BLOCKS_EACH * cuda__of(o)->n_multiprocessors + lanes - 1) / lanes;
    const dim3 grid((unsigned)(wanted < most ? wanted : most), (unsigned)heads->n_kv_heads, (unsigned)batch->n_seqs);
    const struct page_arguments a = {.kv = *kv,
                                     .pick = *pick,
                                     .q = q.data,
                                     .q_stride = q.stride[0],
                                     .slot = batch->slot,
                                     .n_kv_heads = heads->n_kv_heads,
                                     .group = heads->n_heads / heads->n_kv_heads,
                                     .lane = heads->lane};
    TRY(check_pages(kv, a.group));
    if (q.dtype == DTYPE_F16)
        TRY(cuda__launch(o, "rank_pages", rank_pages_kernel<__half>, grid, dim3(PAGE_WARPS * 32), 0, a));
    else
        TRY(cuda__launch(o, "rank_pages", rank_pages_kernel<bfloat>, grid, dim3(PAGE_WARPS * 32), 0, a));
    return cuda__launch(o, "list_pages", list_pages_kernel, dim3((unsigned)heads->n_kv_heads, (unsigned)batch->n_seqs),
                        dim3(LIST_THREADS), 0, a);
}
