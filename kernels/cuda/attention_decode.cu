/* Decode attention: one query row a sequence over its lane, bound by reading K and V once.
 *
 * A lane is cut into even pieces of about c->split_tokens tokens, or into c->most_pieces larger ones where it is long:
 * fixed by the configuration and its own length. decode_begin lists the pieces of all lanes at the start of a step; a
 * persistent grid walks the list of a layer. A block of four warps takes a piece, a warp 16 tokens at a time, straight
 * from the pages into registers (attention_stream.cu brings them through shared memory instead, where there is hardware
 * for it). The block that finishes a lane's last piece adds the pieces up, in their order: the result depends on the
 * lane alone.
 *
 * What counts with few lanes is not to wait: a block's first tile is asked for before the step's append has ended, its
 * next piece's before the end of the one at hand. */
#include "kernels/cuda/attention_decode.cuh"

__global__ static void __launch_bounds__(256)
    list_work_kernel(struct kv_view kv, const int32_t *slot, int n_seqs, int more, int split_tokens, int4 *item,
                     int capacity, int32_t *count, int most_pieces)
{
    __shared__ int warp_total[8];
    wait_for_predecessor();
    const int lane = (int)blockIdx.x, thread = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    int total = 0;
    item += (int64_t)lane * capacity;
    for (int first = 0; first < n_seqs; first += 256) {
        const int row = first + (int)threadIdx.x;
        const int s = row < n_seqs ? slot[row] : -1;
        const int length = s >= 0 && s < kv.n_slots ? kv.lane_len[cache_lane(kv, s, lane)] + more : 0;
        int n = (length + split_tokens - 1) / split_tokens;
        if (n > most_pieces) n = most_pieces;
        if (n > 0) n = (length + piece_tokens(length, n) - 1) / piece_tokens(length, n);
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
            if (at < capacity) item[at] = make_int4(row, i << 8 | (n - 1), length, s);
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) count[lane] = total < capacity ? total : capacity;
    /* The step's later kernels start when this list, and all that came before it, stands in memory: attention reads it
     * and the lanes' older tokens before its own predecessor has ended. */
    __threadfence();
    __syncthreads();
    let_successor_start();
}

/* Lists the pieces of lanes that are about to get `more` tokens. */
static int list_work(struct ops *o, const struct seq_batch *batch, const struct kv_view *kv, int more, int32_t *item,
                     int32_t *count)
{
    const struct cuda *c = cuda__of(o);
    return cuda__launch(o, "decode_begin", list_work_kernel, dim3((unsigned)kv->lanes_per_slot), dim3(256), 0, *kv,
                        batch->slot, batch->n_seqs, more, c->split_tokens, (int4 *)item, c->work_capacity, count,
                        c->most_pieces);
}

/* Of two lists the second is begun when the first stands in memory, and what follows when both do. */
int cuda__decode_begin(struct ops *o, const struct seq_batch *batch, const struct kv_view *kv,
                       const struct kv_view *aged)
{
    const struct cuda *c = cuda__of(o);
    if (kv->lanes_per_slot > c->limits.max_lanes || batch->n_seqs > c->limits.max_seqs)
        FAIL(ERR_BUG, "ops_decode_begin: %d lanes and %d sequences, ops_reserve was told %d and %d", kv->lanes_per_slot,
             batch->n_seqs, c->limits.max_lanes, c->limits.max_seqs);
    if (aged && !c->limits.aged) FAIL(ERR_BUG, "ops_decode_begin_aged: ops_reserve was told of no lanes in two parts");
    if (aged) TRY(list_work(o, batch, aged, 0, c->aged_item, c->aged_count));
    return list_work(o, batch, kv, 1, c->work_item, c->work_count);
}

/* ---- the attention of a layer ---- */

/* 16 tokens on their way into a warp's registers. */
template <int CHUNKS> struct tile {
    uint4 low[CHUNKS], high[CHUNKS], v[(CHUNKS + 1) / 2][4];
};

/* Where a tile of the warp begins; `pages`: the page numbers of its 32 tiles, one a thread. */
__device__ static const char *tile_address(const struct decode_arguments &a, const struct decode_item &item, int tile,
                                           int pages, int row_bytes)
{
    const int64_t page = __shfl_sync(~0u, pages, tile % 32);
    return (const char *)a.kv.pool.data +
           (page * 2 * a.kv.page_size + token_of(item, tile) % a.kv.page_size) * row_bytes;
}

template <int CHUNKS>
__device__ static __forceinline__ void ask_keys(struct tile<CHUNKS> *x, const char *at, int row_bytes, int n_valid)
{
    const int thread = (int)threadIdx.x % 32, r = thread / 4, t = thread % 4;
    if (n_valid >= TILE)
        load_keys<CHUNKS, true, true>(x->low, x->high, at, row_bytes, r, t, n_valid);
    else
        load_keys<CHUNKS, false, true>(x->low, x->high, at, row_bytes, r, t, n_valid);
}

template <int CHUNKS>
__device__ static __forceinline__ void ask_values(struct tile<CHUNKS> *x, const char *at, int row_bytes, int n_valid)
{
    const int thread = (int)threadIdx.x % 32, r = thread / 4, t = thread % 4;
    if (n_valid >= TILE)
        load_values<(CHUNKS + 1) / 2, true, true>(x->v, at, row_bytes, r, t, n_valid);
    else
        load_values<(CHUNKS + 1) / 2, false, true>(x->v, at, row_bytes, r, t, n_valid);
}

/* The keys, then the values of the warp's first tile of a piece, if it has one. */
template <int CHUNKS>
__device__ static __forceinline__ void ask_first_keys(struct tile<CHUNKS> *x, const struct decode_arguments &a,
                                                      const struct decode_item &item, int pages, int row_bytes)
{
    if (tiles_of(item) > 0)
        ask_keys<CHUNKS>(x, tile_address(a, item, 0, pages, row_bytes), row_bytes, item.end - token_of(item, 0));
}
template <int CHUNKS>
__device__ static __forceinline__ void ask_first_values(struct tile<CHUNKS> *x, const struct decode_arguments &a,
                                                        const struct decode_item &item, int pages, int row_bytes)
{
    if (tiles_of(item) > 0)
        ask_values<CHUNKS>(x, tile_address(a, item, 0, pages, row_bytes) + (int64_t)a.kv.page_size * row_bytes,
                           row_bytes, item.end - token_of(item, 0));
}

/* A piece into the warp's own place: kept in shared memory, since registers are full of tiles. */
__device__ static __forceinline__ void hold_item(struct decode_item *held, const struct decode_arguments &a,
                                                 const int *ends, int at)
{
    const struct decode_item item = fetch_item(a, ends, at);
    if (threadIdx.x % 32 == 0) *held = item;
    __syncwarp();
}

/* The tokens of a piece, the first tile of which is on its way: the next tile's keys are asked for when this one's are
 * taken, its values after this one's. Page numbers come 32 tiles ahead. */
template <typename T, int CHUNKS, int PRODUCTS>
__device__ static __forceinline__ void gather(struct gathered<(CHUNKS + 1) / 2, PRODUCTS> *g, struct tile<CHUNKS> *x,
                                              const struct decode_arguments &a, const struct decode_item &item,
                                              const uint4 (*q)[CHUNKS], int pages, int row_bytes)
{
    enum { HALVES = (CHUNKS + 1) / 2 };
    const int r = (int)threadIdx.x % 32 / 4, n = tiles_of(item);
    const int64_t value_bytes = (int64_t)a.kv.page_size * row_bytes;
    int ahead = pages_from(a, item, 32);
    for (int i = 0; i < n; i++) {
        const int n_valid = item.end - token_of(item, i), next_valid = n_valid - WARPS * TILE;
        const char *next = NULL;
        float s[PRODUCTS][4];
        if (n_valid >= TILE)
            score_tile<T, CHUNKS, PRODUCTS, true>(s, x->low, x->high, q, r, TILE);
        else
            score_tile<T, CHUNKS, PRODUCTS, false>(s, x->low, x->high, q, r, n_valid);
        if (i + 1 < n) {
            if ((i + 1) % 32 == 0) pages = ahead, ahead = pages_from(a, item, i + 33);
            next = tile_address(a, item, i + 1, pages, row_bytes);
            ask_keys<CHUNKS>(x, next, row_bytes, next_valid);
        }
        take_tile<T, HALVES, PRODUCTS>(g, s, x->v, a.scale);
        if (i + 1 < n) ask_values<CHUNKS>(x, next + value_bytes, row_bytes, next_valid);
    }
}

template <typename T, int CHUNKS, bool EXACT, int PRODUCTS>
__global__ static void __launch_bounds__(WARPS * 32, PRODUCTS == 1 ? 3 : 2) decode_kernel(struct decode_arguments a)
{
    enum { HALVES = (CHUNKS + 1) / 2 };
    __shared__ struct decode_item held[WARPS][2]; /* of each warp: the piece at hand and the next */
    extern __shared__ __align__(16) char shared[];
    int *ends = (int *)shared; /* items up to and with each head */
    struct block_part *part = (struct block_part *)(shared + (a.n_kv_heads + 3) / 4 * 16);
    const int row_bytes = (EXACT ? CHUNKS * 32 : a.kv.head_dim) * (int)sizeof(T);
    let_successor_start();
    const bool padding = has_padding(a);
    list_ends(a, ends);
    const int n_items = ends[a.n_kv_heads - 1], end = first_item(n_items, (int)blockIdx.x + 1);
    int at = first_item(n_items, (int)blockIdx.x), pages = 0;
    struct decode_item *item = held[threadIdx.x / 32], *next = item + 1;
    struct tile<CHUNKS> x;
    bool early = false;
    if (at < end) {
        hold_item(item, a, ends, at);
        pages = pages_from(a, *item, 0);
        early = tile_is_old(*item, 0);
    }
    if (early) {
        ask_first_keys<CHUNKS>(&x, a, *item, pages, row_bytes);
        ask_first_values<CHUNKS>(&x, a, *item, pages, row_bytes);
    }
    wait_for_predecessor();
    if (padding) clear_padding<T>(a);
    if (at >= end) return;
    if (ends_in_new_page(a, *item)) pages = pages_from(a, *item, 0);
    if (!early) {
        ask_first_keys<CHUNKS>(&x, a, *item, pages, row_bytes);
        ask_first_values<CHUNKS>(&x, a, *item, pages, row_bytes);
    }
    for (;;) {
        struct gathered<HALVES, PRODUCTS> g;
        uint4 q[PRODUCTS][CHUNKS];
        const bool more = ++at < end;
        int next_pages = 0;
        if (more) {
            hold_item(next, a, ends, at);
            next_pages = pages_from(a, *next, 0);
        }
        begin_gathering<HALVES, PRODUCTS>(&g);
        load_queries<T, CHUNKS, PRODUCTS>(q, a, item->row, item->head);
        gather<T, CHUNKS, PRODUCTS>(&g, &x, a, *item, q, pages, row_bytes);
        finish_item<T, HALVES, PRODUCTS>(a, part, &g, *item, [&] {
            if (more) ask_first_keys<CHUNKS>(&x, a, *next, next_pages, row_bytes);
        });
        if (!more) return;
        ask_first_values<CHUNKS>(&x, a, *next, next_pages, row_bytes);
        struct decode_item *const done = item;
        item = next, next = done, pages = next_pages;
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

template <typename T, int CHUNKS, bool EXACT, int PRODUCTS>
static int launch_decode(struct ops *o, const struct decode_arguments &a)
{
    const struct cuda *c = cuda__of(o);
    void (*kernel)(struct decode_arguments) = decode_kernel<T, CHUNKS, EXACT, PRODUCTS>;
    const size_t shared = block_part_bytes((CHUNKS + 1) / 2, a.group) + (size_t)(a.n_kv_heads + 3) / 4 * 16;
    if (shared > 48 << 10)
        CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    return cuda__launch(o, "attention_decode", kernel, dim3((unsigned)c->n_multiprocessors * (PRODUCTS == 1 ? 3 : 2)),
                        dim3(WARPS * 32), shared, a);
}

template <typename T, int PRODUCTS> static int launch_for_dim(struct ops *o, const struct decode_arguments &a)
{
    if (a.kv.head_dim == 128) return launch_decode<T, 4, true, PRODUCTS>(o, a);
    if (a.kv.head_dim == 64) return launch_decode<T, 2, true, PRODUCTS>(o, a);
    if (a.kv.head_dim <= 32) return launch_decode<T, 1, false, PRODUCTS>(o, a);
    if (a.kv.head_dim <= 64) return launch_decode<T, 2, false, PRODUCTS>(o, a);
    if (a.kv.head_dim <= 96) return launch_decode<T, 3, false, PRODUCTS>(o, a);
    return launch_decode<T, 4, false, PRODUCTS>(o, a);
}

static int check_decode(const struct cuda *c, struct tensor out, struct tensor q, const struct seq_batch *batch,
                        const struct kv_view *kv, const struct attention_heads *heads)
{
    const int group = heads->n_heads / heads->n_kv_heads;
    if (kv->head_dim % 8 || kv->head_dim > 128 || group > 2 * COLUMNS || kv->page_size % TILE || q.stride[0] % 8 ||
        (uint64_t)q.data % 16 || out.stride[0] % 4 || (uint64_t)out.data % 8)
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

int cuda__attention_decode(struct ops *o, struct tensor out, struct tensor q, float *log_sum,
                           const struct seq_batch *batch, const struct kv_view *kv, const struct attention_heads *heads)
{
    const struct cuda *c = cuda__of(o);
    struct decode_arguments a = {};
    struct arena arena;
    TRY(check_decode(c, out, q, batch, kv, heads));
    TRY(cuda__scratch(o, &arena));
    TRY(place_partials(c, &c->limits, &arena, &a.partial_out, &a.partial));
    a.kv = *kv;
    a.q = q.data, a.q_stride = q.stride[0];
    a.out = out.data, a.out_stride = out.stride[0];
    a.log_sum = log_sum;
    a.slot = batch->slot;
    a.n_seqs = batch->n_seqs;
    a.n_kv_heads = heads->n_kv_heads;
    a.group = heads->n_heads / heads->n_kv_heads;
    a.lane = heads->lane;
    a.capacity = c->work_capacity;
    a.counter_stride = c->limits.max_seqs;
    a.scale = heads->scale * 1.44269504088896f;
    a.item = (const int4 *)c->work_item, a.count = c->work_count;
    a.counter = c->counter;
    /* The same bits by either kernel. Loads into registers pass through the first-level cache, of which the streaming
     * kernel leaves little: not beside the linears of few rows (gemv.cu), which live by it. */
    if (c->arch == 90 && batch->n_seqs > CUDA_FEW_ROWS) return cuda__decode_stream(o, q.dtype, a);
    WITH_TYPE(q.dtype, T, return a.group <= COLUMNS ? launch_for_dim<T, 1>(o, a) : launch_for_dim<T, 2>(o, a));
}
