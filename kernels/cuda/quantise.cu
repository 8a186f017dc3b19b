/* Lanes of a finished prompt rewritten in an 8-bit format, in place. */
#include "kernels/cuda/quantised.cuh"

enum {
    QUANTISE_WARPS = 8,
    CODE_TOKENS = 32, /* of a page: what a block takes at once */
    WARP_TOKENS = CODE_TOKENS / QUANTISE_WARPS,
    MOST_DIM = 128 /* four elements a thread */
};

/* Four elements of a token's key or value as codes; whole warps. */
template <typename T> __device__ static uint32_t quantise_four(enum kv_format format, uint2 x, float *scale)
{
    const float2 a = unpack2<T>(x.x), b = unpack2<T>(x.y);
    *scale = quantise_scale(format, __reduce_max_sync(~0u, max(largest_of(a), largest_of(b))));
    return codes_of(format, a, *scale) | codes_of(format, b, *scale) << 16;
}

/* A block a lane. Page i gets the tokens of pages 2i and 2i + 1, which lie at or behind it: a block has read both
 * before it writes, and what it writes it never reads again. */
template <typename T>
__global__ static void __launch_bounds__(QUANTISE_WARPS * 32) quantise_kernel(struct kv_view kv, int first_lane)
{
    let_successor_start();
    wait_for_predecessor();
    const int lane = first_lane + (int)blockIdx.x, n = kv.lane_len[lane], dim = kv.head_dim;
    const int thread = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, at = 4 * thread;
    const bool plain = kv.lane_format[lane] == KV_PLAIN;
    for (int first = 0; plain && first < n; first += CODE_TOKENS) {
        uint32_t code[WARP_TOKENS][2];
        float scale[WARP_TOKENS][2];
#pragma unroll
        for (int i = 0; i < WARP_TOKENS; i++) {
            const int token = first + warp * WARP_TOKENS + i;
            uint2 k = make_uint2(0, 0), v = k;
            if (token < n && at < dim) {
                const T *from = (const T *)kv.pool.data + cache_key(kv, lane, token) + at;
                k = *(const uint2 *)from;
                v = *(const uint2 *)(from + (int64_t)kv.page_size * dim);
            }
            code[i][0] = quantise_four<T>(kv.format, k, &scale[i][0]);
            code[i][1] = quantise_four<T>(kv.format, v, &scale[i][1]);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < WARP_TOKENS; i++) {
            const int token = first + warp * WARP_TOKENS + i;
            if (token >= n) break;
            const int64_t key = code_row(kv, lane, token);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int64_t row = key + half * CODE_TOKENS;
                if (at < dim) *(uint32_t *)((uint8_t *)kv.pool.data + row * dim + at) = code[i][half];
                if (thread == 0) kv.scale[row] = scale[i][half];
            }
        }
    }
    __syncthreads(); /* all know whether the lane was plain */
    if (warp > 0 || !plain) return;
    const int keep = (n + CODE_TOKENS - 1) / CODE_TOKENS, freed = (n + kv.page_size - 1) / kv.page_size - keep;
    const int32_t *pages = kv.page_row + (int64_t)lane * kv.max_pages + keep;
    int base = 0;
    if (thread == 0) {
        base = atomicAdd(kv.free_count, freed);
        kv.lane_format[lane] = kv.format;
    }
    base = __shfl_sync(~0u, base, 0);
    for (int i = thread; i < freed; i += 32) kv.free_stack[base + i] = pages[freed - 1 - i];
}

int cuda__kv_quantise(struct ops *o, const struct kv_view *kv, int slot)
{
    if (2 * kv->page_size != CODE_TOKENS || kv->head_dim % 8 || kv->head_dim > MOST_DIM)
        FAIL(ERR_UNSUPPORTED,
             "cuda: keys and values in 8 bits of heads of %d dimensions, pages of %d tokens; served are dimensions in "
             "steps of 8 up to %d, pages of %d",
             kv->head_dim, kv->page_size, MOST_DIM, CODE_TOKENS / 2);
    WITH_TYPE(kv->pool.dtype, T,
              return cuda__launch(o, "kv_quantise", quantise_kernel<T>, dim3((unsigned)kv->lanes_per_slot),
                                  dim3(QUANTISE_WARPS * 32), 0, *kv, slot * kv->lanes_per_slot));
}
