/* lanes - how a lane takes pages and gives them back, by a whole warp. Included by .cu files only.
 *
 * Pages are popped and pushed with integer counters. A kernel does one or the other: what one block pushes another one
 * of the same kernel must not pop, since the numbers follow the counter. */
#ifndef VITRAIL_KERNELS_CUDA_LANES_CUH
#define VITRAIL_KERNELS_CUDA_LANES_CUH

#include "kernels/cuda/quantised.cuh"

enum { LANES_A_BLOCK = 4, WARP = 32 };

/* Pages that `length` tokens of a lane take. */
__device__ static inline int pages_of(const struct kv_view &kv, int lane, int64_t length)
{
    const int tokens = page_tokens(kv, lane);
    return (int)((length + tokens - 1) / tokens);
}

/* Grows a lane by n tokens, called by a whole warp; its length before, or -1 (and the error word set). */
__device__ static inline int grow_lane(const struct kv_view &kv, int lane, int n)
{
    const int thread = (int)threadIdx.x % WARP;
    const int length = kv.lane_len[lane], have = pages_of(kv, lane, length);
    const int wanted = pages_of(kv, lane, (int64_t)length + n);
    int32_t *row = kv.page_row + (int64_t)lane * kv.max_pages;
    int base = 0;
    if (wanted > kv.max_pages) {
        if (thread == 0) atomicOr(kv.error, KV_ERROR_LANE_FULL);
        return -1;
    }
    const int more = wanted - have;
    if (more > 0) {
        if (thread == 0) {
            base = atomicSub(kv.free_count, more) - more;
            if (base < 0) {
                atomicAdd(kv.free_count, more);
                atomicOr(kv.error, KV_ERROR_NO_FREE_PAGE);
            }
        }
        base = __shfl_sync(~0u, base, 0);
        if (base < 0) return -1;
        for (int i = thread; i < more; i += WARP) row[have + i] = kv.free_stack[base + more - 1 - i];
    }
    __syncwarp();
    if (thread == 0) kv.lane_len[lane] = length + n;
    return length;
}

/* Cuts a lane to a length and pushes the pages beyond, called by a whole warp. */
__device__ static inline void shrink_lane(const struct kv_view &kv, int lane, int length)
{
    const int thread = (int)threadIdx.x % WARP, before = kv.lane_len[lane];
    if (length > before) return;
    const int keep = pages_of(kv, lane, length), freed = pages_of(kv, lane, before) - keep;
    const int32_t *row = kv.page_row + (int64_t)lane * kv.max_pages;
    int base = 0;
    if (freed > 0) {
        if (thread == 0) base = atomicAdd(kv.free_count, freed);
        base = __shfl_sync(~0u, base, 0);
        for (int i = thread; i < freed; i += WARP) kv.free_stack[base + i] = row[keep + freed - 1 - i];
    }
    __syncwarp();
    if (thread == 0) kv.lane_len[lane] = length;
}

#endif
