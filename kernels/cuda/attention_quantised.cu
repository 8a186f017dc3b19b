/* Decode attention over lanes in an 8-bit format: the pieces, the list of them and the way they are added up are
 * attention_decode.cuh's, the products attention_codes.cuh's. */
#include "kernels/cuda/attention_codes.cuh"

/* The row of codes, or scale, of the first key of a tile; `pages`: the page numbers of its 32 tiles, one a thread. */
__device__ static int64_t tile_row(const struct decode_arguments &a, const struct decode_item &item, int tile,
                                   int pages)
{
    const int64_t page = __shfl_sync(~0u, pages, tile % 32);
    return page * 2 * a.kv.page_size + token_of(item, tile) % a.kv.page_size;
}

/* Asks for the keys, then the values of the tile whose first key has this row; n_valid tokens of it are the lane's. */
template <int HALVES, bool WIDE>
__device__ static __forceinline__ void ask_keys(struct code_tile<HALVES> *x, const struct decode_arguments &a,
                                                int64_t row, int n_valid)
{
    const uint8_t *keys = (const uint8_t *)a.kv.pool.data + row * a.kv.head_dim;
    if (n_valid >= TILE)
        load_code_keys<HALVES, WIDE, true, true>(x, keys, a.kv.scale + row, a.kv.head_dim, n_valid);
    else
        load_code_keys<HALVES, WIDE, false, true>(x, keys, a.kv.scale + row, a.kv.head_dim, n_valid);
}
template <int HALVES>
__device__ static __forceinline__ void ask_values(struct code_tile<HALVES> *x, const struct decode_arguments &a,
                                                  int64_t row, int n_valid)
{
    row += a.kv.page_size; /* values stand behind the page's keys */
    const uint8_t *values = (const uint8_t *)a.kv.pool.data + row * a.kv.head_dim;
    if (n_valid >= TILE)
        load_code_values<HALVES, true, true>(x, values, a.kv.scale + row, a.kv.head_dim, n_valid);
    else
        load_code_values<HALVES, false, true>(x, values, a.kv.scale + row, a.kv.head_dim, n_valid);
}

/* The first tile of a piece, if the warp has one. */
template <int HALVES, bool WIDE>
__device__ static __forceinline__ void ask_first(struct code_tile<HALVES> *x, const struct decode_arguments &a,
                                                 const struct decode_item &item, int pages)
{
    if (tiles_of(item) == 0) return;
    const int64_t row = tile_row(a, item, 0, pages);
    ask_keys<HALVES, WIDE>(x, a, row, item.end - token_of(item, 0));
    ask_values<HALVES>(x, a, row, item.end - token_of(item, 0));
}

/* The tokens of a piece, the first tile of which is on its way: the next tile's keys are asked for when this one's are
 * taken, its values after this one's. */
template <enum kv_format FORMAT, int HALVES, bool WIDE, int PRODUCTS>
__device__ static __forceinline__ void gather_codes(struct gathered<HALVES, PRODUCTS> *g, struct code_tile<HALVES> *x,
                                                    const struct decode_arguments &a, const struct decode_item &item,
                                                    const struct half_queries<HALVES, PRODUCTS> &q, int pages)
{
    const int n = tiles_of(item);
    uint32_t unit = 0;
    int ahead = pages_from(a, item, 32);
    for (int i = 0; i < n; i++) {
        const int n_valid = item.end - token_of(item, i), next_valid = n_valid - WARPS * TILE;
        const bool more = i + 1 < n;
        int64_t row = 0;
        float s[PRODUCTS][4];
        if (n_valid >= TILE)
            score_codes<FORMAT, HALVES, PRODUCTS, true>(s, *x, q, n_valid);
        else
            score_codes<FORMAT, HALVES, PRODUCTS, false>(s, *x, q, n_valid);
        if (more) {
            if ((i + 1) % 32 == 0) pages = ahead, ahead = pages_from(a, item, i + 33);
            row = tile_row(a, item, i + 1, pages);
            ask_keys<HALVES, WIDE>(x, a, row, next_valid);
        }
        take_codes<FORMAT, HALVES, PRODUCTS>(g, &unit, s, *x, a.scale);
        if (more) ask_values<HALVES>(x, a, row, next_valid);
    }
    undo_unit<HALVES, PRODUCTS>(g, unit);
}

/* The first tile is asked for before the step's append has ended, where it holds nothing of it: as in
 * attention_decode.cu. */
template <typename T, enum kv_format FORMAT, int HALVES, bool WIDE, int PRODUCTS>
__global__ static void __launch_bounds__(WARPS * 32, resident_blocks(HALVES, PRODUCTS))
    quantised_kernel(struct decode_arguments a)
{
    extern __shared__ __align__(16) char shared[];
    int *ends = (int *)shared; /* items up to and with each head */
    struct block_part *part = (struct block_part *)(shared + (a.n_kv_heads + 3) / 4 * 16);
    let_successor_start();
    const bool padding = has_padding(a);
    list_ends(a, ends);
    const int n_items = ends[a.n_kv_heads - 1], end = first_item(n_items, (int)blockIdx.x + 1);
    int at = first_item(n_items, (int)blockIdx.x), pages = 0;
    struct code_tile<HALVES> x;
    struct decode_item item = {};
    bool early = false;
    if (at < end) {
        item = fetch_item(a, ends, at);
        pages = pages_from(a, item, 0);
        early = tile_is_old(item, 0);
    }
    if (early) ask_first<HALVES, WIDE>(&x, a, item, pages);
    wait_for_predecessor();
    if (padding) clear_padding<T>(a);
    if (at >= end) return;
    if (ends_in_new_page(a, item)) pages = pages_from(a, item, 0);
    if (!early) ask_first<HALVES, WIDE>(&x, a, item, pages);
    for (;;) {
        struct gathered<HALVES, PRODUCTS> g;
        struct half_queries<HALVES, PRODUCTS> q;
        begin_gathering<HALVES, PRODUCTS>(&g);
        load_half_queries<T, HALVES, PRODUCTS>(&q, a, item.row, item.head);
        gather_codes<FORMAT, HALVES, WIDE, PRODUCTS>(&g, &x, a, item, q, pages);
        const struct decode_item done = item;
        const bool more = ++at < end;
        if (more) {
            item = fetch_item(a, ends, at);
            pages = pages_from(a, item, 0);
        }
        finish_item<T, HALVES, PRODUCTS>(a, part, &g, done, [&] {
            if (more) ask_first<HALVES, WIDE>(&x, a, item, pages);
        });
        if (!more) return;
    }
}

/* ---- launches ---- */

static int place_partials(const struct cuda *c, const struct ops_limits *limits, struct arena *arena, float **out,
                          float2 **ends)
{
    static const char label[] = "op scratch";
    const size_t pieces = (size_t)limits->max_heads * (size_t)c->work_capacity;
    TRY(arena_take(arena, pieces * (size_t)limits->head_dim * sizeof **out, label, out));
    return arena_take(arena, pieces * sizeof **ends, label, ends);
}

int cuda__quantised_measure(const struct cuda *c, const struct ops_limits *limits, struct arena *arena)
{
    float *out;
    float2 *ends;
    return place_partials(c, limits, arena, &out, &ends);
}

template <typename T, enum kv_format FORMAT, int HALVES, bool WIDE, int PRODUCTS>
static int launch_quantised(struct ops *o, const struct decode_arguments &a)
{
    void (*kernel)(struct decode_arguments) = quantised_kernel<T, FORMAT, HALVES, WIDE, PRODUCTS>;
    const size_t shared = block_part_bytes(HALVES, a.group) + (size_t)(a.n_kv_heads + 3) / 4 * 16;
    const int blocks = cuda__of(o)->n_multiprocessors * resident_blocks(HALVES, PRODUCTS);
    if (shared > 48 << 10)
        CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    return cuda__launch(o, "attention_quantised", kernel, dim3((unsigned)blocks), dim3(WARPS * 32), shared, a);
}

template <typename T, enum kv_format FORMAT, int PRODUCTS>
static int launch_for_dim(struct ops *o, const struct decode_arguments &a)
{
    if (a.kv.head_dim % 16) return launch_quantised<T, FORMAT, 2, false, PRODUCTS>(o, a);
    if (a.kv.head_dim <= 64) return launch_quantised<T, FORMAT, 1, true, PRODUCTS>(o, a);
    return launch_quantised<T, FORMAT, 2, true, PRODUCTS>(o, a);
}

template <typename T, enum kv_format FORMAT>
static int launch_for_group(struct ops *o, const struct decode_arguments &a)
{
    return a.group <= COLUMNS ? launch_for_dim<T, FORMAT, 1>(o, a) : launch_for_dim<T, FORMAT, 2>(o, a);
}

static int check_quantised(const struct cuda *c, struct tensor out, struct tensor q, const struct seq_batch *batch,
                           const struct kv_view *kv, const struct attention_heads *heads)
{
    const int group = heads->n_heads / heads->n_kv_heads;
    if (kv->head_dim % 8 || kv->head_dim > 128 || group > 2 * COLUMNS || kv->page_size % TILE || q.stride[0] % 8 ||
        (uint64_t)q.data % 16 || out.stride[0] % 4 || (uint64_t)out.data % 8)
        FAIL(ERR_UNSUPPORTED,
             "cuda: decode attention in 8 bits over heads of %d dimensions in groups of %d, pages of %d tokens; served "
             "are dimensions in steps of 8 up to 128, groups up to %d, pages in steps of %d",
             kv->head_dim, group, kv->page_size, 2 * COLUMNS, TILE);
    if (batch->n_seqs > c->limits.max_seqs || heads->n_heads > c->limits.max_heads ||
        kv->head_dim > c->limits.head_dim || heads->lane + heads->n_kv_heads > c->limits.max_lanes)
        FAIL(ERR_BUG, "ops_attention_decode: %d sequences of %d heads, more than ops_reserve was told", batch->n_seqs,
             heads->n_heads);
    return OK;
}

int cuda__attention_quantised(struct ops *o, struct tensor out, struct tensor q, float *log_sum,
                              const struct seq_batch *batch, const struct kv_view *kv,
                              const struct attention_heads *heads)
{
    const struct cuda *c = cuda__of(o);
    return cuda__attention_pieces(o, out, q, log_sum, batch, kv, heads, c->work_item, c->work_count);
}

int cuda__attention_pieces(struct ops *o, struct tensor out, struct tensor q, float *log_sum,
                           const struct seq_batch *batch, const struct kv_view *kv, const struct attention_heads *heads,
                           const int32_t *item, const int32_t *count)
{
    const struct cuda *c = cuda__of(o);
    struct decode_arguments a = {};
    struct arena arena;
    TRY(check_quantised(c, out, q, batch, kv, heads));
    TRY(cuda__scratch(o, &arena));
    TRY(place_partials(c, &c->limits, &arena, &a.partial_out, &a.partial));
    a.kv = *kv;
    a.kv.page_size = kv_page_tokens(kv, kv->format); /* of the lanes that are read */
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
    a.item = (const int4 *)item, a.count = count;
    a.counter = c->counter;
    /* The same bits by either kernel; which one, as for plain lanes. */
    if (c->arch == 90 && batch->n_seqs > CUDA_FEW_ROWS && kv->head_dim % 16 == 0)
        return cuda__quantised_stream(o, q.dtype, a);
    WITH_TYPE(q.dtype, T,
              return kv->format == KV_INT8 ? launch_for_group<T, KV_INT8>(o, a) : launch_for_group<T, KV_FP8>(o, a));
}
