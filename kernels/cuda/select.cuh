/* select - the value at a place of a row's order, found by counting digits of the values' keys from the top (radix
 * selection): linear, exact on ties, deterministic because it counts in integers. For one block a row. */
#ifndef VITRAIL_KERNELS_CUDA_SELECT_CUH
#define VITRAIL_KERNELS_CUDA_SELECT_CUH

#include "kernels/cuda/device.cuh"

enum { SELECT_THREADS = 1024, SELECT_DIGITS = 256 };

/* Keys rise with the values; -0 ranks as 0, NaN lowest. */
__device__ static inline uint32_t select_key(float value)
{
    value += 0.0f;
    if (value != value) return 0;
    const uint32_t bits = __float_as_uint(value);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* Where a row's order is cut: everything with a higher key, and the first n_equal elements with this one.
 * `above`: what lies over the key, in the measure that was asked for. */
struct cut {
    uint32_t key;
    int64_t n_equal;
    unsigned long long above;
};

/* Number of set flags among the threads before this one, and of all; whole block. */
__device__ static inline int block_rank(bool flag, int *total)
{
    __shared__ int part[33];
    const int warp = (int)threadIdx.x / 32, thread = (int)threadIdx.x % 32, n_warps = (int)blockDim.x / 32;
    const unsigned votes = __ballot_sync(~0u, flag);
    __syncthreads();
    if (thread == 0) part[warp] = __popc(votes);
    __syncthreads();
    if (warp == 0) {
        int mine = thread < n_warps ? part[thread] : 0, upto = mine;
        for (int step = 1; step < 32; step *= 2) {
            int below = __shfl_up_sync(~0u, upto, step);
            if (thread >= step) upto += below;
        }
        part[thread] = upto - mine;
        if (thread == 31) part[32] = upto;
    }
    __syncthreads();
    *total = part[32];
    return part[warp] + __popc(votes & ((1u << thread) - 1));
}

#endif
