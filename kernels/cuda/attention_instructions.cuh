/* attention_instructions - the instructions behind prompt attention, one function each: copies and fragment loads of
 * every GPU since compute capability 8.0, and Hopper's barriers in memory, tensor copies and products of a warpgroup.
 * Addresses in shared memory are 32-bit. Included by .cu files only. */
#ifndef VITRAIL_KERNELS_CUDA_ATTENTION_INSTRUCTIONS_CUH
#define VITRAIL_KERNELS_CUDA_ATTENTION_INSTRUCTIONS_CUH

#include "kernels/cuda/device.cuh"

#define INLINE __device__ static __forceinline__

INLINE uint32_t shared_address(const void *pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

/* ---- copies to shared memory and fragments from it ---- */

/* 16 bytes from global memory; zeros where !valid. */
INLINE void copy_16(uint32_t to, const void *from, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
INLINE void copies_begin(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
INLINE void copies_end(void) { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

INLINE void load_matrices(uint32_t *d, uint32_t from)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(from)
                 : "memory");
}
INLINE void load_matrices_transposed(uint32_t *d, uint32_t from)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(from)
                 : "memory");
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

INLINE void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}

/* ---- barriers in shared memory ---- */

INLINE void barrier_init(uint32_t barrier, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
/* Makes the barriers just initialised known to the tensor copy engine. */
INLINE void barriers_ready(void) { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
INLINE void barrier_arrive(uint32_t barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/* Arrives, and lets the phase wait for so many bytes of tensor copies. */
INLINE void barrier_expect(uint32_t barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
/* Waits until the phase of this parity is complete; the phase before the first counts as one of parity 1. */
INLINE void barrier_wait(uint32_t barrier, int parity)
{
    uint32_t done;
    do {
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.b32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!done);
}

/* Named barriers of whole warps; 0 is __syncthreads'. */
INLINE void group_sync(int id, int n_threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory"); }
INLINE void group_arrive(int id, int n_threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

/* ---- tensor copies ---- */

/* The box of a tensor that begins at these coordinates; what lies outside the tensor arrives as zeros. */
INLINE void tensor_load(uint32_t to, const void *map, uint32_t barrier, int x, int y, int z)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
                 "%5}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
                 : "memory");
}
INLINE void tensor_load(uint32_t to, const void *map, uint32_t barrier, int x, int y, int z, int w)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
                 "%5, %6}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
                 : "memory");
}
INLINE void tensor_map_prefetch(const void *map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

/* Ordinary accesses to shared memory so far come before later ones of the copy engine and the tensor cores. */
INLINE void async_fence(void) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* ---- registers ---- */

template <int COUNT> INLINE void registers_release(void)
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> INLINE void registers_acquire(void)
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

/* ---- products of a warpgroup ----
 * D[64, n] += A[64, 16] B[16, n], begun by all 4 warps, done after wgmma_wait. D is spread like mma_16816's: warp w has
 * rows 16 w .. 16 w + 15, d[4 j + i] is element i of the 16 x 8 tile j. */

#define BIND_4(d, i) "+f"((d)[i]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3])
#define BIND_16(d, i) BIND_4(d, i), BIND_4(d, (i) + 4), BIND_4(d, (i) + 8), BIND_4(d, (i) + 12)
#define BIND_32(d) BIND_16(d, 0), BIND_16(d, 16)
#define BIND_64(d) BIND_32(d), BIND_16(d, 32), BIND_16(d, 48)
#define NAMES_32                                                                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                                       \
    NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                      \
             "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/* A matrix in shared memory: rows of 64 columns, 128 bytes, with the 128-byte swizzle; 8 rows lie below one another,
 * the next 8 are `stride` bytes further. `leading`: bytes to the next 64 columns, where a product's n goes along the
 * rows; where its k does, each step of 16 has a descriptor of its own. matrix_descriptor is the half that steps in
 * units of 16 bytes are added to. */
INLINE uint32_t matrix_descriptor(uint32_t address, int leading) { return address >> 4 | (uint32_t)leading >> 4 << 16; }
INLINE uint64_t whole_descriptor(uint32_t low, int stride) { return 1ull << 62 | (uint64_t)(stride >> 4) << 32 | low; }

INLINE void wgmma_begin(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void wgmma_commit(void) { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/* Until at most PENDING groups are left. */
template <int PENDING> INLINE void wgmma_wait(void)
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
/* The values are used neither before nor, where they are operands, overwritten until here. */
template <int N> INLINE void hold(float *d)
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i]));
}
template <int N> INLINE void hold(uint32_t *d)
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(d[i]));
}

/* d[64, 128] (+)= a b^T, both in shared memory, k along the rows. */
#define WGMMA_SCORES(type)                                                                                             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                          \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" NAMES_64 "}, %64, %65, p, 1, 1, "   \
                 "0, 0;\n}"                                                                                            \
                 : BIND_64(d)                                                                                          \
                 : "l"(whole_descriptor(a, A_STRIDE)), "l"(whole_descriptor(b, B_STRIDE)), "r"(add))
template <typename T, int A_STRIDE, int B_STRIDE> INLINE void wgmma_scores(float *d, uint32_t a, uint32_t b, int add)
{
    if constexpr (__is_same(T, bfloat))
        WGMMA_SCORES("bf16");
    else
        WGMMA_SCORES("f16");
}

/* d[64, N] += a b: a fragments as mma_16816's, b in shared memory, n along the rows. */
#define WGMMA_VALUES(type, n, names, bind, a0, a1, a2, a3, b0)                                                         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, {" a0 ", " a1 ", " a2   \
                 ", " a3 "}, " b0 ", p, 1, 1, 1;\n}"                                                                   \
                 : bind(d)                                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(whole_descriptor(b, B_STRIDE)))
#define WGMMA_VALUES_128(type) WGMMA_VALUES(type, "128", NAMES_64, BIND_64, "%64", "%65", "%66", "%67", "%68")
#define WGMMA_VALUES_64(type) WGMMA_VALUES(type, "64", NAMES_32, BIND_32, "%32", "%33", "%34", "%35", "%36")
template <typename T, int N, int B_STRIDE> INLINE void wgmma_values(float *d, const uint32_t *a, uint32_t b)
{
    if constexpr (N == 128 && __is_same(T, bfloat))
        WGMMA_VALUES_128("bf16");
    else if constexpr (N == 128)
        WGMMA_VALUES_128("f16");
    else if constexpr (__is_same(T, bfloat))
        WGMMA_VALUES_64("bf16");
    else
        WGMMA_VALUES_64("f16");
}

#endif

#endif
