/* Lanes of a finished prompt rewritten in an 8-bit format, and back for a prompt that comes behind, in place. */
#include "kernels/cuda/quantised.cuh"

enum {
    QUANTISE_WARPS = 8,
    CODE_TOKENS = 32, /* of a page: what a block takes at once */
    WARP_TOKENS = CODE_TOKENS / QUANTISE_WARPS,
    MOST_DIM = 128 /* four elements a thread */
};

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

/* ---- and back ---- */

/* Pops the pages that a quantised lane of n tokens lacks as a plain one, called by a whole block; false: there are
 * none, and the error word says so. */
__device__ static bool take_pages(const struct kv_view &kv, int lane, int n)
{
    __shared__ int base;
    const int have = (n + CODE_TOKENS - 1) / CODE_TOKENS, wanted = (n + kv.page_size - 1) / kv.page_size;
    const int more = wanted - have;
    int32_t *row = kv.page_row + (int64_t)lane * kv.max_pages + have;
    if (threadIdx.x == 0) {
        base = 0;
        if (wanted > kv.max_pages) {
            base = -1;
            atomicOr(kv.error, KV_ERROR_LANE_FULL);
        } else if (more > 0 && (base = atomicSub(kv.free_count, more) - more) < 0) {
            atomicAdd(kv.free_count, more);
            atomicOr(kv.error, KV_ERROR_NO_FREE_PAGE);
        }
    }
    __syncthreads();
    if (base < 0) return false;
    for (int i = (int)threadIdx.x; i < more; i += (int)blockDim.x) row[i] = kv.free_stack[base + more - 1 - i];
    __syncthreads();
    return true;
}

/* Four elements of a token's key or value from their codes. */
template <typename T> __device__ static uint2 widen_four(enum kv_format format, uint32_t code, float scale)
{
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = quantise_value(format, (uint8_t)(code >> 8 * i)) * scale;
    return make_uint2(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]));
}

/* A block a lane. Pages 2i and 2i + 1 get the tokens of page i, from the last on: what is written over was read, but
 * for page 0, all of which a block reads before it writes. */
template <typename T>
__global__ static void __launch_bounds__(QUANTISE_WARPS * 32) widen_kernel(struct kv_view kv, int first_lane)
{
    let_successor_start();
    wait_for_predecessor();
    const int lane = first_lane + (int)blockIdx.x, n = kv.lane_len[lane], dim = kv.head_dim;
    const int thread = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, at = 4 * thread;
    const enum kv_format format = lane_format(kv, lane);
    if (format == KV_PLAIN || !take_pages(kv, lane, n)) return;
    for (int first = (n - 1) / CODE_TOKENS * CODE_TOKENS; first >= 0; first -= CODE_TOKENS) {
        uint2 element[WARP_TOKENS][2];
#pragma unroll
        for (int i = 0; i < WARP_TOKENS; i++) {
            const int token = first + warp * WARP_TOKENS + i;
            if (token >= n || at >= dim) continue;
            const int64_t row = code_row(kv, lane, token);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint8_t *code = (const uint8_t *)kv.pool.data + (row + half * CODE_TOKENS) * dim + at;
                element[i][half] = widen_four<T>(format, *(const uint32_t *)code, kv.scale[row + half * CODE_TOKENS]);
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < WARP_TOKENS; i++) {
            const int token = first + warp * WARP_TOKENS + i;
            if (token >= n || at >= dim) continue;
            T *to = (T *)kv.pool.data + cache_key(kv, lane, token) + at;
            *(uint2 *)to = element[i][0];
            *(uint2 *)(to + (int64_t)kv.page_size * dim) = element[i][1];
        }
    }
    if (threadIdx.x == 0) kv.lane_format[lane] = KV_PLAIN;
}

/* ---- launches ---- */

static int check_pages(const struct kv_view *kv)
{
    if (2 * kv->page_size != CODE_TOKENS || kv->head_dim % 8 || kv->head_dim > MOST_DIM)
        FAIL(ERR_UNSUPPORTED,
             "cuda: keys and values in 8 bits of heads of %d dimensions, pages of %d tokens; served are dimensions in "
             "steps of 8 up to %d, pages of %d",
             kv->head_dim, kv->page_size, MOST_DIM, CODE_TOKENS / 2);
    return OK;
}

int cuda__kv_quantise(struct ops *o, const struct kv_view *kv, int slot)
{
    TRY(check_pages(kv));
    WITH_TYPE(kv->pool.dtype, T,
              return cuda__launch(o, "kv_quantise", quantise_kernel<T>, dim3((unsigned)kv->lanes_per_slot),
                                  dim3(QUANTISE_WARPS * 32), 0, *kv, slot * kv->lanes_per_slot));
}

int cuda__kv_widen(struct ops *o, const struct kv_view *kv, int slot)
{
    TRY(check_pages(kv));
    WITH_TYPE(kv->pool.dtype, T,
              return cuda__launch(o, "kv_widen", widen_kernel<T>, dim3((unsigned)kv->lanes_per_slot),
                                  dim3(QUANTISE_WARPS * 32), 0, *kv, slot * kv->lanes_per_slot));
}
