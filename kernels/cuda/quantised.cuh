/* quantised - lanes in an 8-bit format on the device: how a lane is stored, where a token's codes and scale stand, and
 * how a warp writes them. Included by .cu files only. */
#ifndef VITRAIL_KERNELS_CUDA_QUANTISED_CUH
#define VITRAIL_KERNELS_CUDA_QUANTISED_CUH

#define QUANTISE_FUNCTION __host__ __device__ static inline
#include "kernels/cuda/device.cuh"
#include "kernels/quantise.h"

__device__ static inline enum kv_format lane_format(const struct kv_view &kv, int lane)
{
    return kv.lane_format ? (enum kv_format)kv.lane_format[lane] : KV_PLAIN;
}

/* Tokens of a page: of any lane, and of a quantised one (activations have two bytes). */
__device__ static inline int code_tokens(const struct kv_view &kv) { return 2 * kv.page_size; }
__device__ static inline int page_tokens(const struct kv_view &kv, int lane)
{
    return lane_format(kv, lane) == KV_PLAIN ? kv.page_size : code_tokens(kv);
}

/* Where token i of a quantised lane has its key: the scale's index, and in head_dim bytes that of the codes. Its value
 * stands code_tokens further. */
__device__ static inline int64_t code_row(const struct kv_view &kv, int lane, int i)
{
    const int tokens = code_tokens(kv);
    const int64_t page = kv.page_row[(int64_t)lane * kv.max_pages + i / tokens];
    return page * 2 * tokens + i % tokens;
}

__device__ static inline uint32_t largest_of(float2 x)
{
    const uint32_t a = quantise_magnitude(x.x), b = quantise_magnitude(x.y);
    return a > b ? a : b;
}
__device__ static inline uint32_t codes_of(enum kv_format format, float2 x, float scale)
{
    return (uint32_t)quantise_code(format, x.x, scale) | (uint32_t)quantise_code(format, x.y, scale) << 8;
}

/* The numbers that 8 codes stand for, before their scale. */
template <enum kv_format FORMAT> __device__ static inline void unpack8_codes(uint2 x, float *out)
{
    const uint32_t word[2] = {x.x, x.y};
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = quantise_value(FORMAT, (uint8_t)(word[i / 4] >> i % 4 * 8));
}

/* Four elements of a token's key or value as codes; whole warps. */
template <typename T> __device__ static inline uint32_t quantise_four(enum kv_format format, uint2 x, float *scale)
{
    const float2 a = unpack2<T>(x.x), b = unpack2<T>(x.y);
    *scale = quantise_scale(format, __reduce_max_sync(~0u, max(largest_of(a), largest_of(b))));
    return codes_of(format, a, *scale) | codes_of(format, b, *scale) << 16;
}

/* A whole warp writes a key or value at a code_row. Each thread brings two words of two elements, the i-th and the j-th
 * of the row; words past the row are ignored. */
template <typename T>
__device__ static inline void put_codes(const struct kv_view &kv, enum kv_format format, int64_t row, int i, uint32_t a,
                                        int j, uint32_t b)
{
    const int words = kv.head_dim / 2;
    const float2 none = make_float2(0, 0), x = i < words ? unpack2<T>(a) : none, y = j < words ? unpack2<T>(b) : none;
    const uint32_t mine = max(largest_of(x), largest_of(y)), largest = __reduce_max_sync(~0u, mine);
    const float scale = quantise_scale(format, largest);
    uint8_t *to = (uint8_t *)kv.pool.data + row * kv.head_dim;
    if (i < words) *(uint16_t *)(to + 2 * i) = (uint16_t)codes_of(format, x, scale);
    if (j < words) *(uint16_t *)(to + 2 * j) = (uint16_t)codes_of(format, y, scale);
    if (threadIdx.x % 32 == 0) kv.scale[row] = scale;
}

#endif
