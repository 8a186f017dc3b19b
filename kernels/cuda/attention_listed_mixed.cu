/* Decode attention over listed entries of which some lie in lanes of an 8-bit format and others, in host memory and at
 * recent places, as they are: attention_listed_codes.cu's products with operands of either kind.
 *
 * Where a token's codes are 8 bytes, its plain elements are 16: a thread has room for these and reads what is there.
 * Codes become 16-bit numbers when they are used; a plain token's scales are 1. */
#include "kernels/cuda/attention_codes.cuh"
#include "kernels/cuda/attention_listed.cuh"

enum { HALVES = 2 /* of 64 dimensions; those that a head does not have are zeros */ };

/* 16 tokens on their way into a warp's registers; thread r * 4 + t. */
struct mixed_tile {
    uint4 low[HALVES][2], high[HALVES][2]; /* keys of tokens r and r + 8 at dims half * 64 + t * 16; codes: the first */
    uint4 v[HALVES][4]; /* values of tokens 2t, 2t + 1, 2t + 8, 2t + 9 at dims half * 64 + r * 8; codes: x and y */
    bool low_plain, high_plain, v_plain[4];
    float key_scale[2], value_scale[2]; /* of tokens r and r + 8 */
};

/* Where the key of this thread's entry stands: a row of codes, or (negative) ~ the address of what is plain. Threads
 * 0 .. 15 have the warp's next tile, the others the one after it. */
__device__ static int64_t find_entry(const struct listed_arguments &a, const struct listed_item &listed, int at)
{
    const struct kv_view &kv = a.decode.kv;
    const int thread = (int)threadIdx.x % 32, mine = at + thread / TILE * STEP + thread % TILE, size = kv.page_size;
    if (mine >= listed.item.end) return 0;
    const int entry = listed.entry ? listed.entry[mine] : mine;
    if (entry >= 0 && entry < RECENT_ENTRY) return code_row(kv, listed.item.lane, entry);
    const int place = entry < 0 ? ~entry : entry - RECENT_ENTRY;
    const int64_t page = entry < 0 ? a.host_page_row[(int64_t)listed.item.lane * a.host_max_pages + place / size]
                                   : listed.recent_page + place / size;
    const int64_t row = page * 2 * size + place % size, offset = entry < 0 ? a.host_offset : a.recent_offset;
    return ~((int64_t)kv.pool.data + offset + row * kv.head_dim * 2);
}

/* 16 elements or codes of a key at `at`. */
__device__ static __forceinline__ void ask_key(uint4 *out, const struct kv_view &kv, int64_t row, int at, bool valid)
{
    const int dim = kv.head_dim;
    const uint4 none = make_uint4(0, 0, 0, 0);
    out[0] = out[1] = none;
    if (!valid) return;
    if (row >= 0) {
        out[0] = read_codes<false>((const uint8_t *)kv.pool.data + row * dim, at, dim, true);
        return;
    }
    const char *from = (const char *)~row + 2 * at;
    if (at < dim) out[0] = read_16<true>(from);
    if (at + 8 < dim) out[1] = read_16<true>(from + 16);
}

/* The scale of a token's key, or (from_key) value. */
__device__ static __forceinline__ float ask_scale(const struct kv_view &kv, int64_t row, int from_key, bool valid)
{
    return !valid ? 0.0f : row < 0 ? 1.0f : __ldcg(&kv.scale[row + from_key]);
}

/* Asks for the keys of a tile whose rows stand with threads tile * TILE .. ; n_valid tokens of it are the piece's. */
__device__ static __forceinline__ void ask_mixed_keys(struct mixed_tile *x, const struct kv_view &kv, int64_t rows,
                                                      int tile, int n_valid)
{
    const int thread = (int)threadIdx.x % 32, r = thread / 4, t = thread % 4;
    const int64_t low = __shfl_sync(~0u, rows, tile * TILE + r), high = __shfl_sync(~0u, rows, tile * TILE + r + 8);
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        ask_key(x->low[h], kv, low, h * 64 + t * 16, r < n_valid);
        ask_key(x->high[h], kv, high, h * 64 + t * 16, r + 8 < n_valid);
    }
    x->low_plain = low < 0, x->high_plain = high < 0;
    x->key_scale[0] = ask_scale(kv, low, 0, r < n_valid);
    x->key_scale[1] = ask_scale(kv, high, 0, r + 8 < n_valid);
}

__device__ static __forceinline__ void ask_mixed_values(struct mixed_tile *x, const struct kv_view &kv, int64_t rows,
                                                        int tile, int n_valid)
{
    const int thread = (int)threadIdx.x % 32, r = thread / 4, t = thread % 4, dim = kv.head_dim;
    const int64_t low = __shfl_sync(~0u, rows, tile * TILE + r), high = __shfl_sync(~0u, rows, tile * TILE + r + 8);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int token = 2 * t + (i & 1) + (i & 2) * 4;
        const int64_t row = __shfl_sync(~0u, rows, tile * TILE + token);
        x->v_plain[i] = row < 0;
        const char *plain = (const char *)~row + (int64_t)kv.page_size * dim * 2;
        const uint8_t *code = (const uint8_t *)kv.pool.data + (row + code_tokens(kv)) * dim;
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            const int at = h * 64 + r * 8;
            x->v[h][i] = make_uint4(0, 0, 0, 0);
            if (token >= n_valid || at >= dim) continue;
            if (row < 0) {
                x->v[h][i] = read_16<true>(plain + 2 * at);
            } else {
                const uint2 codes = __ldcg((const uint2 *)(code + at));
                x->v[h][i].x = codes.x, x->v[h][i].y = codes.y;
            }
        }
    }
    x->value_scale[0] = ask_scale(kv, low, code_tokens(kv), r < n_valid);
    x->value_scale[1] = ask_scale(kv, high, code_tokens(kv), r + 8 < n_valid);
}

/* Elements 4j + 2 pair and the next one of a key. */
template <typename T, enum kv_format FORMAT>
__device__ static __forceinline__ uint32_t key_pair(const uint4 *key, bool plain, int j, int pair)
{
    const uint32_t code = codes<T, FORMAT>::widen(word_of(key[0], j), pair);
    return plain ? word_of(key[j / 2], j % 2 * 2 + pair) : code;
}

/* Logits of 16 tokens, as score_codes has them. */
template <typename T, enum kv_format FORMAT, int PRODUCTS>
__device__ static __forceinline__ void score_mixed(float (*s)[4], const struct mixed_tile &x,
                                                   const uint4 (*q)[HALVES][2], int n_valid)
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
            const uint32_t a0 = key_pair<T, FORMAT>(x.low[h], x.low_plain, j, 0);
            const uint32_t a1 = key_pair<T, FORMAT>(x.high[h], x.high_plain, j, 0);
            const uint32_t a2 = key_pair<T, FORMAT>(x.low[h], x.low_plain, j, 1);
            const uint32_t a3 = key_pair<T, FORMAT>(x.high[h], x.high_plain, j, 1);
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

/* Takes the tile's values in: elements 2j and 2j + 1 of four tokens are the rows of one product. */
template <typename T, enum kv_format FORMAT, int PRODUCTS>
__device__ static __forceinline__ void take_mixed(struct gathered<HALVES, PRODUCTS> *g, float (*s)[4],
                                                  const struct mixed_tile &x, float scale)
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
            uint32_t w[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t code = codes<T, FORMAT>::widen(word_of(x.v[h][i], j / 2), j % 2);
                w[i] = x.v_plain[i] ? word_of(x.v[h][i], j) : code;
            }
#pragma unroll
            for (int p = 0; p < PRODUCTS; p++)
                mma_16816<T>(g->out[p][h][j], __byte_perm(w[0], w[1], 0x5410), __byte_perm(w[0], w[1], 0x7632),
                             __byte_perm(w[2], w[3], 0x5410), __byte_perm(w[2], w[3], 0x7632), weight[p][0],
                             weight[p][1]);
        }
}

/* The entries of a piece, as gather_listed_codes goes through them. */
template <typename T, enum kv_format FORMAT, int PRODUCTS>
__device__ static __forceinline__ void gather_mixed(struct gathered<HALVES, PRODUCTS> *g,
                                                    const struct listed_arguments &a, const struct listed_item &listed)
{
    const struct kv_view &kv = a.decode.kv;
    const int end = listed.item.end, first = listed.item.first + (int)(threadIdx.x / 32) * TILE;
    const int n = first < end ? (end - first + STEP - 1) / STEP : 0; /* tiles of this warp */
    struct mixed_tile x;
    uint4 q[PRODUCTS][HALVES][2];
    load_code_queries<T, HALVES, PRODUCTS>(q, a.decode, listed.item.row, listed.item.head);
    if (n == 0) return;
    int64_t rows = find_entry(a, listed, first), next = find_entry(a, listed, first + 2 * STEP);
    ask_mixed_keys(&x, kv, rows, 0, end - first);
    for (int i = 0; i < n; i++) {
        const int left = end - first - i * STEP;
        float s[PRODUCTS][4];
        ask_mixed_values(&x, kv, rows, i & 1, left);
        score_mixed<T, FORMAT, PRODUCTS>(s, x, q, left);
        if (i + 1 < n) {
            if (i & 1) {
                rows = next;
                next = find_entry(a, listed, first + (i + 3) * STEP);
            }
            ask_mixed_keys(&x, kv, rows, (i + 1) & 1, left - STEP);
        }
        take_mixed<T, FORMAT, PRODUCTS>(g, s, x, a.decode.scale);
    }
}

template <typename T, enum kv_format FORMAT, int PRODUCTS>
__global__ static void __launch_bounds__(WARPS * 32, 2) listed_mixed_kernel(struct listed_arguments a)
{
    extern __shared__ __align__(16) char shared[];
    let_successor_start();
    wait_for_predecessor();
    attend_lists<T, HALVES, PRODUCTS>(a, (struct block_part *)shared,
                                      [&](struct gathered<HALVES, PRODUCTS> *g, const struct listed_item &listed) {
                                          gather_mixed<T, FORMAT, PRODUCTS>(g, a, listed);
                                          undo_weight_factor<FORMAT, HALVES, PRODUCTS>(g);
                                      });
}

template <typename T, enum kv_format FORMAT>
static int launch_for_group(struct ops *o, const struct listed_arguments &a)
{
    return a.decode.group <= COLUMNS ? launch_lists(o, listed_mixed_kernel<T, FORMAT, 1>, a, HALVES)
                                     : launch_lists(o, listed_mixed_kernel<T, FORMAT, 2>, a, HALVES);
}

int cuda__listed_mixed(struct ops *o, enum dtype dtype, const struct listed_arguments &a)
{
    const enum kv_format format = a.decode.kv.format;
    WITH_TYPE(dtype, T,
              return format == KV_INT8 ? launch_for_group<T, KV_INT8>(o, a) : launch_for_group<T, KV_FP8>(o, a));
}
