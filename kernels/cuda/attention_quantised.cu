/* Decode attention over lanes in an 8-bit format: the pieces, the list of them and the way they are added up are
 * attention_decode.cuh's, the products attention_codes.cuh's. */
#include "kernels/cuda/attention_codes.cuh"

/* Asks for the keys of the tile whose first token has this row of codes; n_valid tokens of it are the lane's. */
template <int HALVES, bool WIDE>
__device__ static __forceinline__ void ask_keys(struct code_tile<HALVES> *x, const struct decode_arguments &a,
                                                int64_t first, int n_valid)
{
    const int thread = (int)threadIdx.x % 32, r = thread / 4, t = thread % 4, dim = a.kv.head_dim;
    const uint8_t *low = (const uint8_t *)a.kv.pool.data + (first + r) * dim, *high = low + 8 * dim;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        x->low[h] = read_codes<WIDE>(low, h * 64 + t * 16, dim, r < n_valid);
        x->high[h] = read_codes<WIDE>(high, h * 64 + t * 16, dim, r + 8 < n_valid);
    }
    x->key_scale[0] = r < n_valid ? __ldcg(&a.kv.scale[first + r]) : 0;
    x->key_scale[1] = r + 8 < n_valid ? __ldcg(&a.kv.scale[first + r + 8]) : 0;
}

template <int HALVES>
__device__ static __forceinline__ void ask_values(struct code_tile<HALVES> *x, const struct decode_arguments &a,
                                                  int64_t first, int n_valid)
{
    const int thread = (int)threadIdx.x % 32, r = thread / 4, t = thread % 4, dim = a.kv.head_dim;
    first += a.kv.page_size; /* values stand behind the page's keys */
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int token = 2 * t + (i & 1) + (i & 2) * 4;
        const uint8_t *row = (const uint8_t *)a.kv.pool.data + (first + token) * dim;
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            const int at = h * 64 + r * 8;
            x->v[h][i] = token < n_valid && at < dim ? __ldcg((const uint2 *)(row + at)) : make_uint2(0, 0);
        }
    }
    x->value_scale[0] = r < n_valid ? __ldcg(&a.kv.scale[first + r]) : 0;
    x->value_scale[1] = r + 8 < n_valid ? __ldcg(&a.kv.scale[first + r + 8]) : 0;
}

/* The row of codes, or scale, of the first key of a tile; `pages`: the page numbers of its 32 tiles, one a thread. */
__device__ static int64_t tile_row(const struct decode_arguments &a, const struct decode_item &item, int tile,
                                   int pages)
{
    const int64_t page = __shfl_sync(~0u, pages, tile % 32);
    return page * 2 * a.kv.page_size + token_of(item, tile) % a.kv.page_size;
}

/* The tokens of a piece: the next tile's keys are asked for when this one's are taken, its values after this one's. */
template <typename T, enum kv_format FORMAT, int HALVES, bool WIDE, int PRODUCTS>
__device__ static __forceinline__ void gather_codes(struct gathered<HALVES, PRODUCTS> *g,
                                                    const struct decode_arguments &a, const struct decode_item &item,
                                                    const uint4 (*q)[HALVES][2])
{
    const int n = tiles_of(item);
    struct code_tile<HALVES> x;
    int pages = pages_from(a, item, 0), ahead = pages_from(a, item, 32);
    if (n == 0) return;
    int64_t row = tile_row(a, item, 0, pages);
    ask_keys<HALVES, WIDE>(&x, a, row, item.end - token_of(item, 0));
    ask_values<HALVES>(&x, a, row, item.end - token_of(item, 0));
    for (int i = 0; i < n; i++) {
        const int n_valid = item.end - token_of(item, i), next_valid = n_valid - WARPS * TILE;
        const bool more = i + 1 < n;
        float s[PRODUCTS][4];
        score_codes<T, FORMAT, HALVES, PRODUCTS>(s, x, q, n_valid);
        if (more) {
            if ((i + 1) % 32 == 0) pages = ahead, ahead = pages_from(a, item, i + 33);
            row = tile_row(a, item, i + 1, pages);
            ask_keys<HALVES, WIDE>(&x, a, row, next_valid);
        }
        take_codes<T, FORMAT, HALVES, PRODUCTS>(g, s, x, a.scale);
        if (more) ask_values<HALVES>(&x, a, row, next_valid);
    }
}

template <typename T, enum kv_format FORMAT, int HALVES, bool WIDE, int PRODUCTS>
__global__ static void __launch_bounds__(WARPS * 32, resident_blocks(HALVES, PRODUCTS))
    quantised_kernel(struct decode_arguments a)
{
    extern __shared__ __align__(16) char shared[];
    int *ends = (int *)shared; /* items up to and with each head */
    struct block_part *part = (struct block_part *)(shared + (a.n_kv_heads + 3) / 4 * 16);
    let_successor_start();
    wait_for_predecessor();
    clear_padding<T>(a);
    list_ends(a, ends);
    const int n_items = ends[a.n_kv_heads - 1], end = first_item(n_items, (int)blockIdx.x + 1);
    for (int at = first_item(n_items, (int)blockIdx.x); at < end; at++) {
        const struct decode_item item = fetch_item(a, ends, at);
        struct gathered<HALVES, PRODUCTS> g;
        uint4 q[PRODUCTS][HALVES][2];
        begin_gathering<HALVES, PRODUCTS>(&g);
        load_code_queries<T, HALVES, PRODUCTS>(q, a, item.row, item.head);
        gather_codes<T, FORMAT, HALVES, WIDE, PRODUCTS>(&g, a, item, q);
        undo_weight_factor<FORMAT, HALVES, PRODUCTS>(&g);
        finish_item<T, HALVES, PRODUCTS>(a, part, &g, item, [] {});
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
    WITH_TYPE(q.dtype, T,
              return kv->format == KV_INT8 ? launch_for_group<T, KV_INT8>(o, a) : launch_for_group<T, KV_FP8>(o, a));
}
