/* Decode attention over listed entries of lanes in an 8-bit format: attention_listed.cu's lists and pieces,
 * attention_codes.cuh's products. */
#include "kernels/cuda/attention_codes.cuh"
#include "kernels/cuda/attention_listed.cuh"

/* The row of codes, or scale, of the key of this thread's entry: threads 0 .. 15 have the warp's next tile, the others
 * the one after it. */
__device__ static int64_t find_codes(const struct listed_arguments &a, const struct listed_item &listed, int at)
{
    const int thread = (int)threadIdx.x % 32, mine = at + thread / TILE * STEP + thread % TILE;
    if (mine >= listed.item.end) return 0;
    return code_row(a.decode.kv, listed.item.lane, listed.entry ? listed.entry[mine] : mine);
}

/* Asks for the keys of a tile whose rows stand with threads tile * TILE .. ; n_valid tokens of it are the piece's. */
template <int HALVES, bool WIDE>
__device__ static __forceinline__ void ask_listed_keys(struct code_tile<HALVES> *x, const struct kv_view &kv,
                                                       int64_t rows, int tile, int n_valid)
{
    const int thread = (int)threadIdx.x % 32, r = thread / 4, t = thread % 4, dim = kv.head_dim;
    const int64_t low = __shfl_sync(~0u, rows, tile * TILE + r), high = __shfl_sync(~0u, rows, tile * TILE + r + 8);
    const uint8_t *pool = (const uint8_t *)kv.pool.data;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        x->low[h] = read_codes<WIDE>(pool + low * dim, h * 64 + t * 16, dim, r < n_valid);
        x->high[h] = read_codes<WIDE>(pool + high * dim, h * 64 + t * 16, dim, r + 8 < n_valid);
    }
    x->key_scale[0] = r < n_valid ? __ldcg(&kv.scale[low]) : 0;
    x->key_scale[1] = r + 8 < n_valid ? __ldcg(&kv.scale[high]) : 0;
}

template <int HALVES>
__device__ static __forceinline__ void ask_listed_values(struct code_tile<HALVES> *x, const struct kv_view &kv,
                                                         int64_t rows, int tile, int n_valid)
{
    const int thread = (int)threadIdx.x % 32, r = thread / 4, t = thread % 4, dim = kv.head_dim;
    const int64_t from_key = code_tokens(kv); /* in rows */
    const int64_t low = __shfl_sync(~0u, rows, tile * TILE + r), high = __shfl_sync(~0u, rows, tile * TILE + r + 8);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int token = 2 * t + (i & 1) + (i & 2) * 4;
        const int64_t value = __shfl_sync(~0u, rows, tile * TILE + token) + from_key;
        const uint8_t *row = (const uint8_t *)kv.pool.data + value * dim;
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            const int at = h * 64 + r * 8;
            x->v[h][i] = token < n_valid && at < dim ? __ldcg((const uint2 *)(row + at)) : make_uint2(0, 0);
        }
    }
    x->value_scale[0] = r < n_valid ? __ldcg(&kv.scale[low + from_key]) : 0;
    x->value_scale[1] = r + 8 < n_valid ? __ldcg(&kv.scale[high + from_key]) : 0;
}

/* The entries of a piece, tiles dealt to the block's warps; the next tile's keys are on their way while this one's
 * values are used. */
template <typename T, enum kv_format FORMAT, int HALVES, bool WIDE, int PRODUCTS>
__device__ static __forceinline__ void gather_listed_codes(struct gathered<HALVES, PRODUCTS> *g,
                                                           const struct listed_arguments &a,
                                                           const struct listed_item &listed)
{
    const struct kv_view &kv = a.decode.kv;
    const int end = listed.item.end, first = listed.item.first + (int)(threadIdx.x / 32) * TILE;
    const int n = first < end ? (end - first + STEP - 1) / STEP : 0; /* tiles of this warp */
    struct code_tile<HALVES> x;
    struct half_queries<HALVES, PRODUCTS> q;
    uint32_t unit = 0;
    load_half_queries<T, HALVES, PRODUCTS>(&q, a.decode, listed.item.row, listed.item.head);
    if (n == 0) return;
    int64_t rows = find_codes(a, listed, first), next = find_codes(a, listed, first + 2 * STEP);
    ask_listed_keys<HALVES, WIDE>(&x, kv, rows, 0, end - first);
    for (int i = 0; i < n; i++) {
        const int left = end - first - i * STEP;
        float s[PRODUCTS][4];
        ask_listed_values<HALVES>(&x, kv, rows, i & 1, left);
        score_codes<FORMAT, HALVES, PRODUCTS, false>(s, x, q, left);
        if (i + 1 < n) {
            if (i & 1) {
                rows = next;
                next = find_codes(a, listed, first + (i + 3) * STEP);
            }
            ask_listed_keys<HALVES, WIDE>(&x, kv, rows, (i + 1) & 1, left - STEP);
        }
        take_codes<FORMAT, HALVES, PRODUCTS>(g, &unit, s, x, a.decode.scale);
    }
    undo_unit<HALVES, PRODUCTS>(g, unit);
}

template <typename T, enum kv_format FORMAT, int HALVES, bool WIDE, int PRODUCTS>
__global__ static void __launch_bounds__(WARPS * 32, resident_blocks(HALVES, PRODUCTS))
    listed_codes_kernel(struct listed_arguments a)
{
    extern __shared__ __align__(16) char shared[];
    let_successor_start();
    wait_for_predecessor();
    attend_lists<T, HALVES, PRODUCTS>(a, (struct block_part *)shared,
                                      [&](struct gathered<HALVES, PRODUCTS> *g, const struct listed_item &listed) {
                                          gather_listed_codes<T, FORMAT, HALVES, WIDE, PRODUCTS>(g, a, listed);
                                      });
}

/* ---- launches ---- */

template <typename T, enum kv_format FORMAT, int PRODUCTS>
static int launch_for_dim(struct ops *o, const struct listed_arguments &a)
{
    const int dim = a.decode.kv.head_dim;
    if (dim % 16) return launch_lists(o, listed_codes_kernel<T, FORMAT, 2, false, PRODUCTS>, a, 2);
    if (dim <= 64) return launch_lists(o, listed_codes_kernel<T, FORMAT, 1, true, PRODUCTS>, a, 1);
    return launch_lists(o, listed_codes_kernel<T, FORMAT, 2, true, PRODUCTS>, a, 2);
}

template <typename T, enum kv_format FORMAT>
static int launch_for_group(struct ops *o, const struct listed_arguments &a)
{
    return a.decode.group <= COLUMNS ? launch_for_dim<T, FORMAT, 1>(o, a) : launch_for_dim<T, FORMAT, 2>(o, a);
}

int cuda__listed_codes(struct ops *o, enum dtype dtype, const struct listed_arguments &a)
{
    const enum kv_format format = a.decode.kv.format;
    WITH_TYPE(dtype, T,
              return format == KV_INT8 ? launch_for_group<T, KV_INT8>(o, a) : launch_for_group<T, KV_FP8>(o, a));
}
