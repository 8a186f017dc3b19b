/* Decode attention over lanes in an 8-bit format: the pieces, the list of them and the way they are added up are
 * attention_decode.cuh's.
 *
 * Codes become 16-bit numbers in registers, exactly, and enter the same products as plain keys and values; the scale of
 * a token's key multiplies its logits, that of its value its weights. Weights times scales are rounded to 16 bits, so a
 * power of two goes with them, which brings them to the size that weights have beside plain values. */
#include "kernels/cuda/attention_decode.cuh"
#include "kernels/cuda/quantised.cuh"

/* ---- two codes of a word (bytes 0, 1 or bytes 2, 3) as two numbers of the activations ---- */

template <typename T, enum kv_format FORMAT> struct codes;

/* x y + z on pairs of bfloat16; exact here. */
__device__ static inline uint32_t bfloat_fma(uint32_t x, uint32_t y, uint32_t z)
{
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(y), "r"(z));
    return d;
}

/* 128 + the low seven bits, less 128 or (negative) 256. */
template <> struct codes<bfloat, KV_INT8> {
    __device__ static uint32_t widen(uint32_t word, int pair)
    {
        const uint32_t x = __byte_perm(word, 0, pair ? 0x4342 : 0x4140);
        return bfloat_fma((x & 0x00800080u) | 0x43004300u, 0xbf80bf80u, (x & 0x007f007fu) | 0x43004300u);
    }
};

/* 1024 + the code as 0 .. 255, less 1152. */
template <> struct codes<__half, KV_INT8> {
    __device__ static uint32_t widen(uint32_t word, int pair)
    {
        uint32_t d;
        const uint32_t x = __byte_perm(word ^ 0x80808080u, 0x64646464u, pair ? 0x4342 : 0x4140);
        asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(x), "r"(0x64806480u));
        return d;
    }
};

/* Exponent and mantissa moved to their places below the sign: the number times 2^-120. */
template <> struct codes<bfloat, KV_FP8> {
    __device__ static uint32_t widen(uint32_t word, int pair)
    {
        const uint32_t x = __byte_perm(word, 0, pair ? 0x3424 : 0x1404);
        return bfloat_fma((x & 0x80008000u) | (x >> 4 & 0x07f007f0u), 0x7b807b80u, 0x80008000u);
    }
};

template <> struct codes<__half, KV_FP8> {
    __device__ static uint32_t widen(uint32_t word, int pair)
    {
        uint32_t d;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
        const unsigned short x = (unsigned short)(pair ? word >> 16 : word);
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(x));
#else
        const uint32_t x = __byte_perm(word, 0, pair ? 0x3424 : 0x1404); /* likewise, times 2^-8 */
        asm("mul.f16x2 %0, %1, %2;" : "=r"(d) : "r"((x & 0x80008000u) | (x >> 1 & 0x3f803f80u)), "r"(0x5c005c00u));
#endif
        return d;
    }
};

/* What weights are multiplied by beside their scale: no product leaves a float16's range. */
template <enum kv_format FORMAT> __device__ static constexpr float weight_factor(void)
{
    return FORMAT == KV_INT8 ? 64.0f : 256.0f;
}

/* ---- 16 tokens of a lane ---- */

/* Codes on their way into a warp's registers, and the scales of tokens r and r + 8. HALVES of 64 dimensions. */
template <int HALVES> struct code_tile {
    uint4 low[HALVES], high[HALVES]; /* keys of tokens r and r + 8 at dims half * 64 + t * 16 */
    uint2 v[HALVES][4];              /* values of tokens 2t, 2t + 1, 2t + 8, 2t + 9 at dims half * 64 + r * 8 */
    float key_scale[2], value_scale[2];
};

/* 16 codes of a row; WIDE: rows begin at multiples of 16 bytes. */
template <bool WIDE> __device__ static uint4 read_codes(const uint8_t *row, int at, int dim, bool valid)
{
    const uint2 none = make_uint2(0, 0);
    if (WIDE) return valid && at < dim ? __ldcg((const uint4 *)(row + at)) : make_uint4(0, 0, 0, 0);
    const uint2 first = valid && at < dim ? __ldcg((const uint2 *)(row + at)) : none;
    const uint2 second = valid && at + 8 < dim ? __ldcg((const uint2 *)(row + at + 8)) : none;
    return make_uint4(first.x, first.y, second.x, second.y);
}

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

/* The queries of a group: head n of a product at dims half * 64 + t * 16. */
template <typename T, int HALVES, int PRODUCTS>
__device__ static void load_code_queries(uint4 (*q)[HALVES][2], const struct decode_arguments &a, int row, int head)
{
    const int thread = (int)threadIdx.x % 32, n = thread / 4, t = thread % 4, dim = a.kv.head_dim;
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++) {
        const int in_group = p * COLUMNS + n;
        const T *from = (const T *)a.q + row * a.q_stride + (int64_t)(head * a.group + in_group) * dim;
#pragma unroll
        for (int i = 0; i < 2 * HALVES; i++) {
            const int at = i / 2 * 64 + t * 16 + i % 2 * 8;
            q[p][i / 2][i % 2] = in_group < a.group && at < dim ? *(const uint4 *)(from + at) : make_uint4(0, 0, 0, 0);
        }
    }
}

/* Logits of 16 tokens before scaling, in two chains; -inf past the end. */
template <typename T, enum kv_format FORMAT, int HALVES, int PRODUCTS>
__device__ static void score_codes(float (*s)[4], const struct code_tile<HALVES> &x, const uint4 (*q)[HALVES][2],
                                   int n_valid)
{
    const int r = (int)threadIdx.x % 32 / 4;
    float other[PRODUCTS][4];
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[p][i] = other[p][i] = 0;
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t low = word_of(x.low[h], j), high = word_of(x.high[h], j);
            const uint32_t a0 = codes<T, FORMAT>::widen(low, 0), a1 = codes<T, FORMAT>::widen(high, 0);
            const uint32_t a2 = codes<T, FORMAT>::widen(low, 1), a3 = codes<T, FORMAT>::widen(high, 1);
#pragma unroll
            for (int p = 0; p < PRODUCTS; p++)
                mma_16816<T>(j % 2 ? other[p] : s[p], a0, a1, a2, a3, word_of(q[p][h][j / 2], j % 2 * 2),
                             word_of(q[p][h][j / 2], j % 2 * 2 + 1));
        }
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            s[p][i] = r + (i & 2) * 4 < n_valid ? (s[p][i] + other[p][i]) * x.key_scale[i / 2] : -INFINITY;
}

/* The softmax so far over the tile's logits: leaves weights in their place. */
template <int HALVES, int PRODUCTS>
__device__ static void soften_tile(struct gathered<HALVES, PRODUCTS> *g, int p, float *s, float scale)
{
    float best[2];
#pragma unroll
    for (int e = 0; e < 2; e++) best[e] = fmaxf(s[e], s[e + 2]);
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
        best[0] = fmaxf(best[0], __shfl_xor_sync(~0u, best[0], step));
        best[1] = fmaxf(best[1], __shfl_xor_sync(~0u, best[1], step));
    }
    best[0] = fmaxf(best[0], g->top[p][0]), best[1] = fmaxf(best[1], g->top[p][1]);
    if (__any_sync(~0u, best[0] > g->top[p][0] || best[1] > g->top[p][1]))
        shrink_gathered<HALVES>(g->out[p], g->top[p], g->sum[p], best, scale);
#pragma unroll
    for (int e = 0; e < 2; e++) {
        s[e] = power_of_2((s[e] - best[e]) * scale);
        s[e + 2] = power_of_2((s[e + 2] - best[e]) * scale);
        g->sum[p][e] += s[e] + s[e + 2];
    }
}

/* Takes the tile's values in. Of a word of each of four tokens two bytes make one product: the dimensions of its rows.
 */
template <typename T, enum kv_format FORMAT, int HALVES, int PRODUCTS>
__device__ static void take_codes(struct gathered<HALVES, PRODUCTS> *g, float (*s)[4],
                                  const struct code_tile<HALVES> &x, float scale)
{
    uint32_t weight[PRODUCTS][2];
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++) {
        soften_tile<HALVES, PRODUCTS>(g, p, s[p], scale);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float by = x.value_scale[i] * weight_factor<FORMAT>();
            weight[p][i] = transpose_8x8(pack2<T>(s[p][2 * i] * by, s[p][2 * i + 1] * by));
        }
    }
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t c0 = j < 2 ? x.v[h][0].x : x.v[h][0].y, c1 = j < 2 ? x.v[h][1].x : x.v[h][1].y;
            const uint32_t c2 = j < 2 ? x.v[h][2].x : x.v[h][2].y, c3 = j < 2 ? x.v[h][3].x : x.v[h][3].y;
            const uint32_t first = __byte_perm(c0, c1, j % 2 ? 0x7362 : 0x5140);
            const uint32_t second = __byte_perm(c2, c3, j % 2 ? 0x7362 : 0x5140);
            const uint32_t a0 = codes<T, FORMAT>::widen(first, 0), a1 = codes<T, FORMAT>::widen(first, 1);
            const uint32_t a2 = codes<T, FORMAT>::widen(second, 0), a3 = codes<T, FORMAT>::widen(second, 1);
#pragma unroll
            for (int p = 0; p < PRODUCTS; p++)
                mma_16816<T>(g->out[p][h][j], a0, a1, a2, a3, weight[p][0], weight[p][1]);
        }
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

template <enum kv_format FORMAT, int HALVES, int PRODUCTS>
__device__ static void undo_weight_factor(struct gathered<HALVES, PRODUCTS> *g)
{
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++)
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int i = 0; i < 16; i++) g->out[p][h][i / 4][i % 4] *= 1 / weight_factor<FORMAT>();
}

/* Blocks that a multiprocessor's registers have room for. */
__host__ __device__ static constexpr int resident_blocks(int halves, int products)
{
    return products == 2 ? 2 : halves == 2 ? 3 : 4;
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
    a.item = (const int4 *)c->work_item, a.count = c->work_count;
    a.counter = c->counter;
    WITH_TYPE(q.dtype, T,
              return kv->format == KV_INT8 ? launch_for_group<T, KV_INT8>(o, a) : launch_for_group<T, KV_FP8>(o, a));
}
