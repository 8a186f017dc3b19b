/* Decode attention over listed entries of each lane: what a policy that recalls reads in place of the whole cache.
 *
 * A list is cut into even pieces, of a size fixed by the configuration and the lists' stride; a block of four warps
 * takes a piece, a warp 16 entries at a time. Each thread finds the rows of one entry (list, page number, row) for the
 * next two tiles of its warp while the ones before are computed, and hands them round. How long lists are is known on
 * the device alone: the grid has room for a few pieces of each, blocks beyond a list's end leave at once. A list may be
 * the whole lane (count < 0), whose pieces are as long as attention_decode.cu's. The block that finishes the last piece
 * adds the pieces up in their order. Who takes a piece changes no bit.
 *
 * Where each query head has a list of its own, it is a group of one head: `head` of a piece and n_kv_heads of the
 * arguments then count query heads, of which lane_lists in a row have the same lane. */
#include "kernels/cuda/attention_listed.cuh"

enum { FEW_SEQUENCES = 16 /* fewer: the device is filled by short pieces, and there is room for many */ };

/* Where the key of this thread's entry begins, in bytes from the pool: threads 0 .. 15 have the warp's next tile, the
 * others the one after it. */
__device__ static int64_t find_row(const struct listed_arguments &a, const struct listed_item &listed, int at,
                                   int row_bytes)
{
    const struct kv_view &kv = a.decode.kv;
    const int thread = (int)threadIdx.x % 32, mine = at + thread / TILE * STEP + thread % TILE;
    if (mine >= listed.item.end) return 0;
    const int entry = listed.entry ? listed.entry[mine] : mine;
    if (entry < 0) {
        const int64_t page = a.host_page_row[(int64_t)listed.item.lane * a.host_max_pages + ~entry / kv.page_size];
        return (page * 2 * kv.page_size + ~entry % kv.page_size) * row_bytes + a.host_offset;
    }
    if (entry >= RECENT_ENTRY) {
        const int place = entry - RECENT_ENTRY;
        const int64_t page = listed.recent_page + place / kv.page_size;
        return (page * 2 * kv.page_size + place % kv.page_size) * row_bytes + a.recent_offset;
    }
    const int64_t page = kv.page_row[(int64_t)listed.item.lane * kv.max_pages + entry / kv.page_size];
    return (page * 2 * kv.page_size + entry % kv.page_size) * row_bytes;
}

/* Keys of tokens r and r + 8, as load_keys of attention_decode.cuh has them, of rows anywhere. */
template <int CHUNKS>
__device__ static void load_listed_keys(uint4 *low, uint4 *high, const char *pool, int64_t rows, int tile,
                                        int row_bytes, int n_valid)
{
    const int thread = (int)threadIdx.x % 32, r = thread / 4, t = thread % 4;
    const uint4 none = make_uint4(0, 0, 0, 0);
    const char *first = pool + __shfl_sync(~0u, rows, tile * TILE + r);
    const char *second = pool + __shfl_sync(~0u, rows, tile * TILE + r + 8);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int at = c * 64 + t * 16;
        low[c] = at < row_bytes && r < n_valid ? read_16<true>(first + at) : none;
        high[c] = at < row_bytes && r + 8 < n_valid ? read_16<true>(second + at) : none;
    }
}

/* Values of tokens 2t, 2t + 1, 2t + 8, 2t + 9, as load_values has them. */
template <int HALVES>
__device__ static void load_listed_values(uint4 (*v)[4], const char *values, int64_t rows, int tile, int row_bytes,
                                          int n_valid)
{
    const int thread = (int)threadIdx.x % 32, r = thread / 4, t = thread % 4;
    const uint4 none = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int token = 2 * t + (i & 1) + (i & 2) * 4;
        const char *row = values + __shfl_sync(~0u, rows, tile * TILE + token);
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            const int at = h * 128 + r * 16;
            v[h][i] = at < row_bytes && token < n_valid ? read_16<true>(row + at) : none;
        }
    }
}

/* The entries of a piece, tiles dealt to the block's warps; the next tile's keys are on their way while this one's
 * values are used. */
template <typename T, int CHUNKS, bool EXACT, int PRODUCTS>
__device__ static void gather_listed(struct gathered<(CHUNKS + 1) / 2, PRODUCTS> *g, const struct listed_arguments &a,
                                     const struct listed_item &listed, const uint4 (*q)[CHUNKS])
{
    enum { HALVES = (CHUNKS + 1) / 2 };
    const struct kv_view &kv = a.decode.kv;
    const int r = (int)threadIdx.x % 32 / 4, row_bytes = (EXACT ? CHUNKS * 32 : kv.head_dim) * (int)sizeof(T);
    const char *pool = (const char *)kv.pool.data, *values = pool + (int64_t)kv.page_size * row_bytes;
    const int end = listed.item.end, first = listed.item.first + (int)(threadIdx.x / 32) * TILE;
    const int n = first < end ? (end - first + STEP - 1) / STEP : 0; /* tiles of this warp */
    uint4 low[CHUNKS], high[CHUNKS], v[HALVES][4];
    if (n == 0) return;
    int64_t rows = find_row(a, listed, first, row_bytes), next = find_row(a, listed, first + 2 * STEP, row_bytes);
    load_listed_keys<CHUNKS>(low, high, pool, rows, 0, row_bytes, end - first);
    for (int i = 0; i < n; i++) {
        const int left = end - first - i * STEP;
        float s[PRODUCTS][4];
        load_listed_values<HALVES>(v, values, rows, i & 1, row_bytes, left);
        if (left >= TILE)
            score_tile<T, CHUNKS, PRODUCTS, true>(s, low, high, q, r, TILE);
        else
            score_tile<T, CHUNKS, PRODUCTS, false>(s, low, high, q, r, left);
        if (i + 1 < n) {
            if (i & 1) {
                rows = next;
                next = find_row(a, listed, first + (i + 3) * STEP, row_bytes);
            }
            load_listed_keys<CHUNKS>(low, high, pool, rows, (i + 1) & 1, row_bytes, left - STEP);
        }
        take_tile<T, HALVES, PRODUCTS>(g, s, v, a.decode.scale);
    }
}

template <typename T, int CHUNKS, bool EXACT, int PRODUCTS>
__global__ static void __launch_bounds__(WARPS * 32, PRODUCTS == 1 ? 3 : 2) listed_kernel(struct listed_arguments a)
{
    enum { HALVES = (CHUNKS + 1) / 2 };
    extern __shared__ char shared[];
    let_successor_start();
    wait_for_predecessor();
    attend_lists<T, HALVES, PRODUCTS>(
        a, (struct block_part *)shared, [&](struct gathered<HALVES, PRODUCTS> *g, const struct listed_item &listed) {
            uint4 q[PRODUCTS][CHUNKS]; /* anew for each piece: the end of one wants the registers */
            load_queries<T, CHUNKS, PRODUCTS>(q, a.decode, listed.item.row, listed.item.head);
            gather_listed<T, CHUNKS, EXACT, PRODUCTS>(g, a, listed, q);
        });
}

/* ---- pieces ---- */

/* Entries of a piece of a list, if that makes no more than most_pieces. */
static int shortest_piece(const struct ops_limits *limits)
{
    return limits->max_seqs < FEW_SEQUENCES ? STEP : 2 * STEP;
}

/* Pieces of a row's lane or list: as many as a whole lane needs, and enough for lists (one more than fit, for strides
 * in whole pages). */
static int most_pieces(const struct cuda *c, const struct ops_limits *limits)
{
    const int shortest = shortest_piece(limits), enough = limits->max_seqs < FEW_SEQUENCES ? 128 : 64;
    const int whole = (limits->max_context + c->split_tokens - 1) / c->split_tokens + 1;
    const int lane = whole < c->most_pieces ? whole : c->most_pieces;
    const int longest = (limits->max_context + shortest - 1) / shortest + 1, list = longest < enough ? longest : enough;
    const int most = lane > list ? lane : list;
    return most < MOST_SPLITS ? most : MOST_SPLITS;
}

static int list_piece(const struct cuda *c, int stride)
{
    const int shortest = shortest_piece(&c->limits), most = most_pieces(c, &c->limits);
    const int even = (int)(((int64_t)stride + most - 1) / most), whole = (even + STEP - 1) / STEP * STEP;
    return whole > shortest ? whole : shortest;
}

static int place_partials(const struct cuda *c, const struct ops_limits *limits, struct arena *arena, float **out,
                          float2 **ends)
{
    static const char label[] = "op scratch";
    const size_t pieces = (size_t)limits->max_heads * (size_t)limits->max_seqs * (size_t)most_pieces(c, limits);
    TRY(arena_take(arena, pieces * (size_t)limits->head_dim * sizeof **out, label, out));
    return arena_take(arena, pieces * sizeof **ends, label, ends);
}

int cuda__listed_measure(const struct cuda *c, const struct ops_limits *limits, struct arena *arena)
{
    float *out;
    float2 *ends;
    return place_partials(c, limits, arena, &out, &ends);
}

/* ---- launches ---- */

template <typename T, int PRODUCTS> static int launch_for_dim(struct ops *o, const struct listed_arguments &a)
{
    const int dim = a.decode.kv.head_dim;
    if (dim == 128) return launch_lists(o, listed_kernel<T, 4, true, PRODUCTS>, a, 2);
    if (dim == 64) return launch_lists(o, listed_kernel<T, 2, true, PRODUCTS>, a, 1);
    if (dim <= 64) return launch_lists(o, listed_kernel<T, 2, false, PRODUCTS>, a, 1);
    if (dim <= 96) return launch_lists(o, listed_kernel<T, 3, false, PRODUCTS>, a, 2);
    return launch_lists(o, listed_kernel<T, 4, false, PRODUCTS>, a, 2);
}

static int check_listed(const struct cuda *c, struct tensor out, struct tensor q, const struct seq_batch *batch,
                        const struct kv_view *kv, const struct attention_heads *heads, int group)
{
    if (kv->head_dim % 8 || kv->head_dim > 128 || group > 2 * COLUMNS || q.stride[0] % 8 || (uint64_t)q.data % 16 ||
        out.stride[0] % 4 || (uint64_t)out.data % 8)
        FAIL(ERR_UNSUPPORTED,
             "cuda: attention over listed entries, heads of %d dimensions in groups of %d; served are dimensions in "
             "steps of 8 up to 128, groups up to %d",
             kv->head_dim, group, 2 * COLUMNS);
    if (batch->n_seqs > c->limits.max_seqs || heads->n_heads > c->limits.max_heads || kv->head_dim > c->limits.head_dim)
        FAIL(ERR_BUG, "ops_attention_decode_listed: %d sequences of %d heads, more than ops_reserve was told",
             batch->n_seqs, heads->n_heads);
    return OK;
}

int cuda__attention_decode_listed(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                                  const struct kv_view *kv, const struct attention_heads *heads,
                                  const struct kv_list *list)
{
    const struct cuda *c = cuda__of(o);
    struct listed_arguments a = {};
    struct decode_arguments *d = &a.decode;
    struct arena arena;
    const int n_lists = list->per_query_head ? heads->n_heads : heads->n_kv_heads; /* of a row */
    TRY(check_listed(c, out, q, batch, kv, heads, heads->n_heads / n_lists));
    TRY(cuda__scratch(o, &arena));
    TRY(place_partials(c, &c->limits, &arena, &d->partial_out, &d->partial));
    a.entry = list->entry, a.count = list->count;
    a.stride = list->stride;
    if (list->host) {
        a.host_page_row = list->host->page_row;
        a.host_max_pages = list->host->max_pages;
        a.host_offset = (int64_t)((uint64_t)list->host->pool.data - (uint64_t)kv->pool.data);
    }
    if (list->recent) {
        a.recent_offset = (int64_t)((uint64_t)list->recent->pool.data - (uint64_t)kv->pool.data);
        a.recent_first_lane = list->recent->first_lane, a.recent_lanes = list->recent->n_lanes;
        a.recent_pages = list->recent->capacity / kv->page_size;
    }
    a.list_piece = list_piece(c, list->stride);
    a.lane_piece = c->split_tokens;
    a.most_pieces = most_pieces(c, &c->limits);
    a.lane_lists = n_lists / heads->n_kv_heads;
    d->kv = *kv;
    d->q = q.data, d->q_stride = q.stride[0];
    d->out = out.data, d->out_stride = out.stride[0];
    d->slot = batch->slot;
    d->n_seqs = batch->n_seqs;
    d->n_kv_heads = n_lists;
    d->group = heads->n_heads / n_lists;
    d->lane = heads->lane;
    d->capacity = c->limits.max_seqs * a.most_pieces;
    d->counter_stride = c->limits.max_seqs;
    d->counter = c->counter;
    d->scale = heads->scale * 1.44269504088896f;
    if (kv->format != KV_PLAIN && (list->host || list->recent)) return cuda__listed_mixed(o, q.dtype, a);
    if (kv->format != KV_PLAIN) return cuda__listed_codes(o, q.dtype, a);
    WITH_TYPE(q.dtype, T, return d->group <= COLUMNS ? launch_for_dim<T, 1>(o, a) : launch_for_dim<T, 2>(o, a));
}
