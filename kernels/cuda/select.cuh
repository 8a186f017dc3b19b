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

/* Adds 1 to count[digit] for each thread that takes part; threads of a warp with one digit, as the leading ones have,
 * add together. */
__device__ static inline void count_digit(int *count, int digit, bool takes_part)
{
    const unsigned part = __ballot_sync(~0u, takes_part);
    if (!takes_part) return;
    const unsigned same = __match_any_sync(part, digit);
    if (__ffs((int)same) - 1 == (int)threadIdx.x % 32) atomicAdd(&count[digit], __popc(same));
}

/* The digit at which the place-th highest key lies, given how many keys have each; *place becomes its place among those
 * with this digit. Called by a whole warp; on every thread of it. */
__device__ static inline int digit_at(const int *count, int64_t *place)
{
    enum { EACH = SELECT_DIGITS / 32 };
    const int thread = (int)threadIdx.x % 32;
    int digit = SELECT_DIGITS - 1 - EACH * thread, mine = 0;
    for (int i = 0; i < EACH; i++) mine += count[digit - i];
    int upto = mine;
    for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(~0u, upto, step);
        if (thread >= step) upto += below;
    }
    const unsigned reached = __ballot_sync(~0u, upto >= *place);
    const int finder = reached ? __ffs((int)reached) - 1 : 31;
    int64_t left = *place - (upto - mine);
    for (int i = 1; i < EACH && count[digit] < left; i++) left -= count[digit--];
    *place = __shfl_sync(~0u, left, finder);
    return __shfl_sync(~0u, digit, finder);
}

/* The cut after the best k of n scores, on every thread; whole block. count: [SELECT_DIGITS] shared. */
__device__ static inline struct cut cut_after(const float *score, int n, int k, int *count)
{
    __shared__ struct cut cut;
    if (threadIdx.x == 0) cut.key = 0, cut.n_equal = k, cut.above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = (int)threadIdx.x; i < SELECT_DIGITS; i += (int)blockDim.x) count[i] = 0;
        __syncthreads();
        const uint32_t prefix = cut.key;
        for (int first = 0; first < n; first += (int)blockDim.x) {
            const int i = first + (int)threadIdx.x;
            const uint32_t key = i < n ? select_key(score[i]) : 0;
            count_digit(count, (int)(key >> shift & 255), i < n && (uint64_t)(key ^ prefix) >> (shift + 8) == 0);
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            int64_t place = cut.n_equal;
            const int digit = digit_at(count, &place);
            if (threadIdx.x == 0) cut.n_equal = place, cut.key |= (uint32_t)digit << shift;
        }
        __syncthreads();
    }
    return cut;
}

#endif
