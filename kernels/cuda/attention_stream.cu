/* Decode attention on Hopper: as attention_decode.cu, but K and V stream through shared memory. Every warp has a ring
 * of places of its own, each for the keys and values of 16 tokens, which a page holds in one piece: one instruction
 * asks for it, and a barrier in memory tells when it is there. The first tiles of a block's next piece are asked for
 * before the end of the one at hand, so that memory stays busy. */
#include "kernels/cuda/attention_decode.cuh"
#include "kernels/cuda/attention_instructions.cuh"

enum { MOST_STAGES = 8 };

/* A warp's ring and the tiles of its piece. */
struct stream {
    char *ring;       /* [stages, stage_bytes] of this warp */
    uint32_t barrier; /* [stages] */
    int stages, stage_bytes, row_bytes;
    int put, taken; /* places that are filled and read next */
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
        const int half = TILE * s->row_bytes;
        const int64_t value = (int64_t)a.kv.page_size * s->row_bytes;
        const char *keys = (const char *)a.kv.pool.data + 2 * page * value +
                           (int64_t)(token_of(item, tile) % a.kv.page_size) * s->row_bytes;
        const uint32_t to = shared_address(s->ring + s->put * s->stage_bytes), barrier = s->barrier + 8 * s->put;
        barrier_expect(barrier, 2 * half);
        if (a.kv.page_size == TILE) {
            bulk_copy(to, keys, 2 * half, barrier);
        } else {
            bulk_copy(to, keys, half, barrier);
            bulk_copy(to + half, keys + value, half, barrier);
        }
    }
    if (++s->put == s->stages) s->put = 0;
}

/* One tile that is there. */
template <typename T, int CHUNKS, int PRODUCTS, bool FULL>
__device__ static __forceinline__ void gather_tile(struct gathered<(CHUNKS + 1) / 2, PRODUCTS> *g, const char *place,
                                                   int row_bytes, const uint4 (*q)[CHUNKS], float scale, int n_valid)
{
    enum { HALVES = (CHUNKS + 1) / 2 };
    const int thread = (int)threadIdx.x % 32, r = thread / 4, t = thread % 4;
    uint4 low[CHUNKS], high[CHUNKS], v[HALVES][4];
    float scores[PRODUCTS][4];
    load_keys<CHUNKS, FULL, false>(low, high, place, row_bytes, r, t, n_valid);
    score_tile<T, CHUNKS, PRODUCTS, FULL>(scores, low, high, q, r, n_valid);
    load_values<HALVES, FULL, false>(v, place + TILE * row_bytes, row_bytes, r, t, n_valid);
    take_tile<T, HALVES, PRODUCTS>(g, scores, v, scale);
}

template <typename T, int CHUNKS, int PRODUCTS>
__device__ static void stream_item(struct stream *s, struct gathered<(CHUNKS + 1) / 2, PRODUCTS> *g,
                                   const struct decode_arguments &a, const struct decode_item &item,
                                   const uint4 (*q)[CHUNKS], int *pages, const struct decode_item &next,
                                   int *next_pages)
{
    const int n = tiles_of(item);
    for (int tile = 0; tile < n; tile++) {
        const char *place = s->ring + s->taken * s->stage_bytes;
        const int n_valid = item.end - token_of(item, tile);
        barrier_wait(s->barrier + 8 * s->taken, s->taken_phase);
        if (n_valid >= TILE)
            gather_tile<T, CHUNKS, PRODUCTS, true>(g, place, s->row_bytes, q, a.scale, n_valid);
        else
            gather_tile<T, CHUNKS, PRODUCTS, false>(g, place, s->row_bytes, q, a.scale, n_valid);
        if (++s->taken == s->stages) s->taken = 0, s->taken_phase ^= 1;
        __syncwarp(); /* all have read the place that is filled next */
        if (tile + s->stages < n) put_tile(s, a, item, tile + s->stages, pages);
        if (tile == 0) *next_pages = pages_from(a, next, 0);
    }
    if (n == 0) *next_pages = pages_from(a, next, 0);
}

#endif

template <typename T, int CHUNKS, bool EXACT, int PRODUCTS>
__global__ static void __launch_bounds__(WARPS * 32, PRODUCTS == 1 ? 3 : 2)
    stream_kernel(struct decode_arguments a, int stages)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    enum { HALVES = (CHUNKS + 1) / 2 };
    extern __shared__ __align__(128) char shared[];
    const int warp = (int)threadIdx.x / 32;
    struct stream s = {};
    s.stages = stages;
    s.row_bytes = (EXACT ? CHUNKS * 32 : a.kv.head_dim) * (int)sizeof(T);
    s.stage_bytes = 2 * TILE * s.row_bytes;
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
        uint4 q[PRODUCTS][CHUNKS];
        const bool more = ++at < end;
        /* Where the next piece lies is known before this one ends. */
        const struct decode_item next = fetch_item(a, ends, more ? at : at - 1);
        int next_pages = 0;
        begin_gathering<HALVES, PRODUCTS>(&g);
        load_queries<T, CHUNKS, PRODUCTS>(q, a, item.row, item.head);
        stream_item<T, CHUNKS, PRODUCTS>(&s, &g, a, item, q, &pages, next, &next_pages);
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

template <typename T, int CHUNKS, bool EXACT, int PRODUCTS>
static int launch_stream(struct ops *o, const struct decode_arguments &a)
{
    const struct cuda *c = cuda__of(o);
    void (*kernel)(struct decode_arguments, int) = stream_kernel<T, CHUNKS, EXACT, PRODUCTS>;
    const size_t part = block_part_bytes((CHUNKS + 1) / 2, a.group) + (size_t)(a.n_kv_heads + 3) / 4 * 16 +
                        WARPS * MOST_STAGES * sizeof(uint64_t);
    const size_t stage = (size_t)WARPS * 2 * TILE * (size_t)a.kv.head_dim * sizeof(T);
    /* Three blocks a multiprocessor where each has room for two tiles a warp, else two. A block costs 1 KB beside. */
    const size_t whole = (size_t)c->max_shared_bytes + 1024;
    int blocks = PRODUCTS == 1 && whole / 3 - 1024 >= part + 2 * stage ? 3 : 2;
    int stages = whole / (size_t)blocks - 1024 > part ? (int)((whole / (size_t)blocks - 1024 - part) / stage) : 1;
    if (stages > MOST_STAGES) stages = MOST_STAGES;
    if (stages < 1) stages = 1;
    const size_t shared = (size_t)stages * stage + part;
    CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    return cuda__launch(o, "attention_decode", kernel, dim3((unsigned)(c->n_multiprocessors * blocks)),
                        dim3(WARPS * 32), shared, a, stages);
}

template <typename T, int PRODUCTS> static int stream_for_dim(struct ops *o, const struct decode_arguments &a)
{
    if (a.kv.head_dim == 128) return launch_stream<T, 4, true, PRODUCTS>(o, a);
    if (a.kv.head_dim == 64) return launch_stream<T, 2, true, PRODUCTS>(o, a);
    if (a.kv.head_dim <= 32) return launch_stream<T, 1, false, PRODUCTS>(o, a);
    if (a.kv.head_dim <= 64) return launch_stream<T, 2, false, PRODUCTS>(o, a);
    if (a.kv.head_dim <= 96) return launch_stream<T, 3, false, PRODUCTS>(o, a);
    return launch_stream<T, 4, false, PRODUCTS>(o, a);
}

int cuda__decode_stream(struct ops *o, enum dtype dtype, const struct decode_arguments &a)
{
    WITH_TYPE(dtype, T, return a.group <= COLUMNS ? stream_for_dim<T, 1>(o, a) : stream_for_dim<T, 2>(o, a));
}
