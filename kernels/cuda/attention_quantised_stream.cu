/* Decode attention on Hopper over lanes in an 8-bit format: as attention_quantised.cu, but codes and scales stream
 * through shared memory, as attention_stream.cu has it for plain lanes. A place of a warp's ring holds the keys' codes
 * of 16 tokens, their values', and the scales of both. */
#include "kernels/cuda/attention_codes.cuh"
#include "kernels/cuda/attention_instructions.cuh"

enum { MOST_STAGES = 8, SCALE_BYTES = TILE * (int)sizeof(float) };

/* A warp's ring and the tiles of its piece. */
struct stream {
    uint8_t *ring;                       /* [stages, stage_bytes] of this warp */
    uint32_t barrier;                    /* [stages] */
    int stages, stage_bytes, code_bytes; /* code_bytes: of a tile's keys */
    int put, taken;                      /* places that are filled and read next */
    int taken_phase;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

INLINE void bulk_copy(uint32_t to, const void *from, int bytes, uint32_t barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

/* Asks for a tile, of whose page numbers the first 32 are in *pages. The whole of it: what lies behind the lane's end
 * is room of the page. */
INLINE void put_tile(struct stream *s, const struct decode_arguments &a, const struct decode_item &item, int tile,
                     int *pages)
{
    if (tile % 32 == 0 && tile > 0) *pages = pages_from(a, item, tile);
    const int64_t page = __shfl_sync(~0u, *pages, tile % 32);
    if (threadIdx.x % 32 == 0) {
        const int64_t key = page * 2 * a.kv.page_size + token_of(item, tile) % a.kv.page_size;
        const int64_t value = key + a.kv.page_size;
        const uint8_t *pool = (const uint8_t *)a.kv.pool.data;
        const uint32_t to = shared_address(s->ring + s->put * s->stage_bytes), barrier = s->barrier + 8 * s->put;
        barrier_expect(barrier, 2 * s->code_bytes + 2 * SCALE_BYTES);
        bulk_copy(to, pool + key * a.kv.head_dim, s->code_bytes, barrier);
        bulk_copy(to + s->code_bytes, pool + value * a.kv.head_dim, s->code_bytes, barrier);
        bulk_copy(to + 2 * s->code_bytes, a.kv.scale + key, SCALE_BYTES, barrier);
        bulk_copy(to + 2 * s->code_bytes + SCALE_BYTES, a.kv.scale + value, SCALE_BYTES, barrier);
    }
    if (++s->put == s->stages) s->put = 0;
}

/* One tile that is there. */
template <enum kv_format FORMAT, int HALVES, int PRODUCTS, bool FULL>
__device__ static __forceinline__ void
gather_tile(struct gathered<HALVES, PRODUCTS> *g, uint32_t *unit, const uint8_t *place, int dim,
            const struct half_queries<HALVES, PRODUCTS> &q, float scale, int n_valid)
{
    struct code_tile<HALVES> x;
    float s[PRODUCTS][4];
    const float *scales = (const float *)(place + 2 * TILE * dim);
    load_code_keys<HALVES, true, FULL, false>(&x, place, scales, dim, n_valid);
    score_codes<FORMAT, HALVES, PRODUCTS, FULL>(s, x, q, n_valid);
    load_code_values<HALVES, FULL, false>(&x, place + TILE * dim, scales + TILE, dim, n_valid);
    take_codes<FORMAT, HALVES, PRODUCTS>(g, unit, s, x, scale);
}

template <enum kv_format FORMAT, int HALVES, int PRODUCTS>
__device__ static void stream_item(struct stream *s, struct gathered<HALVES, PRODUCTS> *g,
                                   const struct decode_arguments &a, const struct decode_item &item,
                                   const struct half_queries<HALVES, PRODUCTS> &q, int *pages,
                                   const struct decode_item &next, int *next_pages)
{
    const int n = tiles_of(item), dim = a.kv.head_dim;
    uint32_t unit = 0;
    for (int tile = 0; tile < n; tile++) {
        const uint8_t *place = s->ring + s->taken * s->stage_bytes;
        const int n_valid = item.end - token_of(item, tile);
        barrier_wait(s->barrier + 8 * s->taken, s->taken_phase);
        if (n_valid >= TILE)
            gather_tile<FORMAT, HALVES, PRODUCTS, true>(g, &unit, place, dim, q, a.scale, n_valid);
        else
            gather_tile<FORMAT, HALVES, PRODUCTS, false>(g, &unit, place, dim, q, a.scale, n_valid);
        if (++s->taken == s->stages) s->taken = 0, s->taken_phase ^= 1;
        __syncwarp(); /* all have read the place that is filled next */
        if (tile + s->stages < n) put_tile(s, a, item, tile + s->stages, pages);
        if (tile == 0) *next_pages = pages_from(a, next, 0);
    }
    if (n == 0) *next_pages = pages_from(a, next, 0);
    undo_unit<HALVES, PRODUCTS>(g, unit);
}

#endif

template <typename T, enum kv_format FORMAT, int HALVES, int PRODUCTS>
__global__ static void __launch_bounds__(WARPS * 32, resident_blocks(HALVES, PRODUCTS))
    stream_kernel(struct decode_arguments a, int stages)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = (int)threadIdx.x / 32;
    struct stream s = {};
    s.stages = stages;
    s.code_bytes = TILE * a.kv.head_dim;
    s.stage_bytes = 2 * s.code_bytes + 2 * SCALE_BYTES;
    s.ring = shared + warp * stages * s.stage_bytes;
    uint64_t *barriers = (uint64_t *)(shared + WARPS * stages * s.stage_bytes);
    s.barrier = shared_address(barriers + warp * stages);
    int *ends = (int *)(barriers + WARPS * MOST_STAGES);
    struct block_part *part = (struct block_part *)((char *)ends + (a.n_kv_heads + 3) / 4 * 16);
    if (threadIdx.x % 32 == 0)
        for (int i = 0; i < stages; i++) barrier_init(s.barrier + 8 * i, 1);
    barriers_ready();
    __syncthreads();
    let_successor_start();
    const bool padding = has_padding(a);
    list_ends(a, ends);
    const int n_items = ends[a.n_kv_heads - 1], end = first_item(n_items, (int)blockIdx.x + 1);
    int at = first_item(n_items, (int)blockIdx.x), pages = 0, tile = 0;
    struct decode_item item = {};
    if (at < end) item = fetch_item(a, ends, at), pages = pages_from(a, item, 0);
    const int n_first = tiles_of(item) < stages ? tiles_of(item) : stages;
    for (; tile < n_first && tile_is_old(item, tile); tile++) put_tile(&s, a, item, tile, &pages);
    wait_for_predecessor();
    if (padding) clear_padding<T>(a);
    if (at >= end) return;
    if (ends_in_new_page(a, item)) pages = pages_from(a, item, 0);
    for (; tile < n_first; tile++) put_tile(&s, a, item, tile, &pages);
    for (;;) {
        struct gathered<HALVES, PRODUCTS> g;
        struct half_queries<HALVES, PRODUCTS> q;
        const bool more = ++at < end;
        /* Where the next piece lies is known before this one ends. */
        const struct decode_item next = fetch_item(a, ends, more ? at : at - 1);
        int next_pages = 0;
        begin_gathering<HALVES, PRODUCTS>(&g);
        load_half_queries<T, HALVES, PRODUCTS>(&q, a, item.row, item.head);
        stream_item<FORMAT, HALVES, PRODUCTS>(&s, &g, a, item, q, &pages, next, &next_pages);
        pages = next_pages;
        for (tile = 0; more && tile < stages && tile < tiles_of(next); tile++) put_tile(&s, a, next, tile, &pages);
        finish_item<T, HALVES, PRODUCTS>(a, part, &g, item, [] {});
        if (!more) return;
        item = next;
    }
#else
    (void)a, (void)stages;
#endif
}

template <typename T, enum kv_format FORMAT, int HALVES, int PRODUCTS>
static int launch_stream(struct ops *o, const struct decode_arguments &a)
{
    const struct cuda *c = cuda__of(o);
    void (*kernel)(struct decode_arguments, int) = stream_kernel<T, FORMAT, HALVES, PRODUCTS>;
    const size_t part = block_part_bytes(HALVES, a.group) + (size_t)(a.n_kv_heads + 3) / 4 * 16 +
                        WARPS * MOST_STAGES * sizeof(uint64_t);
    const size_t stage = (size_t)WARPS * (2 * TILE * (size_t)a.kv.head_dim + 2 * SCALE_BYTES);
    /* As many blocks a multiprocessor as registers allow, if each has room for two tiles a warp, else two. A block
     * costs 1 KB beside. */
    const size_t whole = (size_t)c->max_shared_bytes + 1024, most = (size_t)resident_blocks(HALVES, PRODUCTS);
    const int blocks = whole / most - 1024 >= part + 2 * stage ? (int)most : 2;
    int stages = whole / (size_t)blocks - 1024 > part ? (int)((whole / (size_t)blocks - 1024 - part) / stage) : 1;
    if (stages > MOST_STAGES) stages = MOST_STAGES;
    if (stages < 1) stages = 1;
    const size_t shared = (size_t)stages * stage + part;
    CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    return cuda__launch(o, "attention_quantised", kernel, dim3((unsigned)(c->n_multiprocessors * blocks)),
                        dim3(WARPS * 32), shared, a, stages);
}

template <typename T, enum kv_format FORMAT>
static int stream_for_shape(struct ops *o, const struct decode_arguments &a)
{
    const bool wide = a.kv.head_dim > 64;
    if (a.group <= COLUMNS) return wide ? launch_stream<T, FORMAT, 2, 1>(o, a) : launch_stream<T, FORMAT, 1, 1>(o, a);
    return wide ? launch_stream<T, FORMAT, 2, 2>(o, a) : launch_stream<T, FORMAT, 1, 2>(o, a);
}

int cuda__quantised_stream(struct ops *o, enum dtype dtype, const struct decode_arguments &a)
{
    WITH_TYPE(dtype, T,
              return a.kv.format == KV_INT8 ? stream_for_shape<T, KV_INT8>(o, a) : stream_for_shape<T, KV_FP8>(o, a));
}
