/* device - what kernels share: the two 16-bit floats behind one set of names, sums over a warp and a block, addresses
 * in the paged cache, and launches that may begin before their predecessor ends. Included by .cu files only. */
#ifndef VITRAIL_KERNELS_CUDA_DEVICE_CUH
#define VITRAIL_KERNELS_CUDA_DEVICE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "kernels/cuda/cuda.h"

typedef __nv_bfloat16 bfloat;

/* ---- the 16-bit floats ---- */

__device__ static inline float to_float(bfloat x) { return __bfloat162float(x); }
__device__ static inline float to_float(__half x) { return __half2float(x); }
__device__ static inline float to_float(float x) { return x; }

template <typename T> __device__ static inline T from_float(float x);
template <> __device__ inline bfloat from_float<bfloat>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline float from_float<float>(float x) { return x; }

/* Two values in one register, the first in the low half. */
template <typename T> __device__ static inline uint32_t pack2(float low, float high)
{
    T a = from_float<T>(low), b = from_float<T>(high);
    return (uint32_t) * (uint16_t *)&a | (uint32_t) * (uint16_t *)&b << 16;
}
template <typename T> __device__ static inline float2 unpack2(uint32_t x)
{
    uint16_t low = (uint16_t)x, high = (uint16_t)(x >> 16);
    return make_float2(to_float(*(T *)&low), to_float(*(T *)&high));
}

/* 8 values of 16 bytes. */
template <typename T> __device__ static inline void unpack8(uint4 x, float *out)
{
    const uint32_t word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair = unpack2<T>(word[i]);
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
    }
}
template <typename T> __device__ static inline uint4 pack8(const float *in)
{
    return make_uint4(pack2<T>(in[0], in[1]), pack2<T>(in[2], in[3]), pack2<T>(in[4], in[5]), pack2<T>(in[6], in[7]));
}

/* Runs the statement with T = the C type of a 16-bit dtype. */
#define WITH_TYPE(dtype, T, ...)                                                                                       \
    do {                                                                                                               \
        if ((dtype) == DTYPE_F16) {                                                                                    \
            typedef __half T;                                                                                          \
            __VA_ARGS__;                                                                                               \
        } else {                                                                                                       \
            typedef bfloat T;                                                                                          \
            __VA_ARGS__;                                                                                               \
        }                                                                                                              \
    } while (0)

/* ---- matrix products of a warp: D[16, 8] += A[16, 16] B[16, 8], fragments as PTX lays them out ---- */

template <typename T>
__device__ static inline void mma_16816(float *d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1);
template <>
__device__ inline void mma_16816<bfloat>(float *d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma_16816<__half>(float *d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* The generator of base/hash.h on the device. */
__device__ static inline uint64_t splitmix(uint64_t x)
{
    uint64_t z = x + 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* 2^x; 0 for minus infinity. */
__device__ static inline float power_of_2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* ---- sums ---- */

__device__ static inline float warp_sum(float x)
{
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
    return x;
}
__device__ static inline float warp_max(float x)
{
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

/* Sum over the block, on every thread; blocks of whole warps. The order is fixed. */
__device__ static inline float block_sum(float x)
{
    __shared__ float part[33];
    const int warp = threadIdx.x / 32, n_warps = (blockDim.x + 31) / 32;
    x = warp_sum(x);
    __syncthreads(); /* an earlier sum may still be read */
    if (threadIdx.x % 32 == 0) part[warp] = x;
    __syncthreads();
    if (warp == 0) {
        float y = (int)threadIdx.x < n_warps ? part[threadIdx.x] : 0;
        y = warp_sum(y);
        if (threadIdx.x == 0) part[32] = y;
    }
    __syncthreads();
    return part[32];
}

/* ---- a kernel that starts early ----
 * Launched with cuda__launch a kernel may begin while its predecessor still runs. Before it touches anything that an
 * earlier kernel writes, and before it writes anything that an earlier kernel reads, every thread calls
 * wait_for_predecessor; a kernel that never calls it would let its successors overtake, so all do.
 * let_successor_start lets the next kernel's blocks in as room appears; it comes first, so that a linear behind a small
 * kernel may fetch its first weights while the one before both still drains. */
__device__ static inline void wait_for_predecessor(void)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ static inline void let_successor_start(void)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <typename... P, typename... A>
static int cuda__launch(struct ops *o, const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                        A... args)
{
    struct cuda *c = cuda__of(o);
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute early = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = c->stream;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &early;
    config.numAttrs = c->arch >= 90 && !c->behind_event ? 1 : 0;
    c->behind_event = false;
    cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
    return error == cudaSuccess ? OK : cuda__failed(name, error);
}

/* ---- the paged cache ---- */

__device__ static inline int cache_lane(const struct kv_view &kv, int slot, int lane)
{
    return slot * kv.lanes_per_slot + lane;
}
/* Element offset of token i's key in the pool; its value stands page_size * head_dim further. */
__device__ static inline int64_t cache_key(const struct kv_view &kv, int lane, int i)
{
    int64_t page = kv.page_row[(int64_t)lane * kv.max_pages + i / kv.page_size];
    return (page * 2 * kv.page_size + i % kv.page_size) * kv.head_dim;
}

#endif
