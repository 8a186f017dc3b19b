/* comm_nvlink - see comm_nvlink.h.
 *
 * Each rank's window, alike on all ranks:
 *   head    per block: operations and chunks so far (its own), chunks that arrived from each source (written by peers)
 *   lines   [2 slots][source][block][2 halves][vector] of 16 bytes
 *   chunks  [source][block][4 slots] of chunk_bytes
 * A source is a peer, numbered as the window's owner sees it: ranks in order, itself left out. A vector is 16 bytes.
 *
 * Block b of a rank talks to block b of its peers alone, in a region of its own, and counts on its own; so launches may
 * differ in blocks. The same launches in the same order on all ranks keep the counters equal.
 *
 * Two slots of lines suffice: a rank that writes operation t + 2 ended t + 1, so it has the peer's lines of t + 1,
 * which the peer's kernel sent after its kernel of t had ended, reading included. Four slots of chunks suffice: chunk j
 * is sent after chunk j - 2 was received, which the peer sent after it had used up j - 4. */
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdlib.h>
#include <string.h>

#include "parallel/comm_nvlink.h"

enum {
    LINE_BLOCKS = 128,
    LINE_VECTORS = 1024, /* of data, in one block's region */
    LINE_REGION = 2 * 16 * LINE_VECTORS,
    CHUNK_BLOCKS = 128,
    CHUNK_SLOTS = 4,
    CHUNK_THREADS = 512, /* and one warp more, which raises the flags */
    CHUNK_LEAST = 16 * CHUNK_THREADS,
    NORM_THREADS = 256, /* as the norm op's, whose order of summation this is */
    HEAD_BYTES = 64 << 10,
    SPINS_A_LOOK = 4096 /* at the abort word, which is across PCIe */
};

/* How often lines are wiped, in operations of a block; flags are the operation's number, and come round after 2^31. */
static const uint32_t wipe_every = 1u << 28, line_flag = 1u << 31;

enum kind { SUM_F32, SUM_BF16, SUM_F16, GATHER };

struct head {
    uint32_t line_op[LINE_BLOCKS];
    uint32_t chunk_op[CHUNK_BLOCKS];
    uint32_t arrived[CHUNK_BLOCKS][NVLINK_MAX_RANKS]; /* by source */
};

/* What kernels are told, by value. */
struct peers {
    char *window[NVLINK_MAX_RANKS]; /* of each rank, as mapped here */
    const uint32_t *stop;           /* host memory: not 0 once the job is over */
    int64_t chunks_at;              /* offset of the chunks in a window */
    int rank, size, chunk_bytes;
};

struct nvlink {
    struct peers peers;
    uint32_t *stop;
    size_t bytes;
    int device;
    int n_multiprocessors;
    bool early; /* kernels may be launched before their predecessor ends */
};

/* ---- words across the link ---- */

__device__ static inline void put_line(char *to, uint32_t a, uint32_t b, uint32_t flag)
{
    uint64_t low = a | (uint64_t)flag << 32, high = b | (uint64_t)flag << 32;
    asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(low), "l"(high) : "memory");
}

/* true if both halves of the line carry the flag. */
__device__ static inline bool get_line(const char *from, uint32_t flag, uint32_t *a, uint32_t *b)
{
    uint64_t low, high;
    asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];" : "=l"(low), "=l"(high) : "l"(from) : "memory");
    *a = (uint32_t)low;
    *b = (uint32_t)high;
    return (uint32_t)(low >> 32) == flag && (uint32_t)(high >> 32) == flag;
}

/* Past the first-level cache, which a peer's writes do not reach. */
__device__ static inline uint4 load_arrived(const char *from)
{
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

__device__ static inline void raise_flag(uint32_t *flag, uint32_t value)
{
    asm volatile("st.release.sys.global.b32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ static inline uint32_t read_flag(const uint32_t *flag)
{
    uint32_t value;
    asm volatile("ld.acquire.sys.global.b32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

__device__ static inline bool stopped(const struct peers &p) { return *(const volatile uint32_t *)p.stop != 0; }

/* As in the kernels room: before these may be launched early, every thread waits for what came before. */
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

/* ---- places ---- */

__device__ static inline struct head *head_of(const struct peers &p, int rank) { return (struct head *)p.window[rank]; }

/* The number that `owner` gives to another rank. */
__device__ static inline int source_at(int owner, int rank) { return rank - (rank > owner); }

__device__ static inline char *line_region(const struct peers &p, int owner, uint32_t op, int source)
{
    int64_t region = ((int64_t)(op & 1) * (p.size - 1) + source) * LINE_BLOCKS + blockIdx.x;
    return p.window[owner] + HEAD_BYTES + region * LINE_REGION;
}

__device__ static inline char *chunk_region(const struct peers &p, int owner, uint32_t chunk, int source)
{
    int64_t region = ((int64_t)source * CHUNK_BLOCKS + blockIdx.x) * CHUNK_SLOTS + chunk % CHUNK_SLOTS;
    return p.window[owner] + p.chunks_at + region * p.chunk_bytes;
}

/* ---- vectors ---- */

/* The 16 bytes at `at` of a message; zeros past its end. Messages may start at any 2-byte boundary. */
__device__ static inline uint4 load_vector(const char *from, int64_t at, int64_t bytes)
{
    const char *here = from + at;
    uint32_t word[4] = {0, 0, 0, 0};
    if ((uint64_t)here % 16 == 0 && at + 16 <= bytes) return *(const uint4 *)here;
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (at + 2 * i < bytes) word[i / 2] |= (uint32_t)((const uint16_t *)here)[i] << 16 * (i % 2);
    return make_uint4(word[0], word[1], word[2], word[3]);
}

__device__ static inline void store_vector(char *to, int64_t at, int64_t bytes, uint4 v)
{
    char *here = to + at;
    const uint32_t word[4] = {v.x, v.y, v.z, v.w};
    if ((uint64_t)here % 16 == 0 && at + 16 <= bytes) {
        *(uint4 *)here = v;
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (at + 2 * i < bytes) ((uint16_t *)here)[i] = (uint16_t)(word[i / 2] >> 16 * (i % 2));
}

template <int KIND> __device__ static inline float2 unpack2(uint32_t word)
{
    if (KIND == SUM_BF16) return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
    __half2_raw raw;
    raw.x = (uint16_t)word;
    raw.y = (uint16_t)(word >> 16);
    return __half22float2(__half2(raw));
}

template <int KIND> __device__ static inline uint32_t pack2(float low, float high)
{
    uint32_t word;
    if (KIND == SUM_BF16) {
        __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        memcpy(&word, &pair, sizeof word);
    } else {
        __half2 pair = __floats2half2_rn(low, high);
        memcpy(&word, &pair, sizeof word);
    }
    return word;
}

template <int KIND> __device__ static inline void unpack(uint4 v, float *out)
{
    const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (KIND == SUM_F32) {
            out[i] = __uint_as_float(word[i]);
        } else {
            float2 pair = unpack2<KIND>(word[i]);
            out[2 * i] = pair.x;
            out[2 * i + 1] = pair.y;
        }
    }
}

template <int KIND> __device__ static inline uint4 pack(const float *in)
{
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        word[i] = KIND == SUM_F32 ? __float_as_uint(in[i]) : pack2<KIND>(in[2 * i], in[2 * i + 1]);
    return make_uint4(word[0], word[1], word[2], word[3]);
}

/* Rank r's vector, of this rank's own and those of the sources. A register array: r is a constant. */
template <int N> __device__ static inline uint4 vector_of(const struct peers &p, int r, uint4 own, const uint4 *arrived)
{
    uint4 before = arrived[r < N - 1 ? r : N - 2], after = arrived[r > 0 ? r - 1 : 0];
    return r < p.rank ? before : r > p.rank ? after : own;
}

/* Rank 0's + rank 1's + ..., in float32, rounded once. */
template <int KIND, int N>
__device__ static inline uint4 sum_in_order(const struct peers &p, uint4 own, const uint4 *arrived)
{
    enum { ELEMENTS = KIND == SUM_F32 ? 4 : 8 };
    float sum[ELEMENTS], part[ELEMENTS];
    unpack<KIND>(vector_of<N>(p, 0, own, arrived), sum);
#pragma unroll
    for (int r = 1; r < N; r++) {
        if (r >= p.size) break;
        unpack<KIND>(vector_of<N>(p, r, own, arrived), part);
#pragma unroll
        for (int i = 0; i < ELEMENTS; i++) sum[i] += part[i];
    }
    return pack<KIND>(sum);
}

/* Puts everybody's vector at `at` together: the sum into out, or each into its own place. */
template <int KIND, int N>
__device__ static inline void finish(const struct peers &p, char *out, const char *in, int64_t at, int64_t bytes,
                                     uint4 own, const uint4 *arrived)
{
    if constexpr (KIND != GATHER) {
        store_vector(out, at, bytes, sum_in_order<KIND, N>(p, own, arrived));
    } else {
#pragma unroll
        for (int r = 0; r < N; r++) {
            char *place = out + r * bytes;
            if (r < p.size && place != in) store_vector(place, at, bytes, vector_of<N>(p, r, own, arrived));
        }
    }
}

/* ---- lines ---- */

template <int N> __device__ static inline void send_line(const struct peers &p, uint32_t op, int vector, uint4 v)
{
#pragma unroll
    for (int i = 1; i < N; i++) {
        if (i >= p.size) break;
        int peer = p.rank + i < p.size ? p.rank + i : p.rank + i - p.size;
        char *to = line_region(p, peer, op, source_at(peer, p.rank)) + 16 * vector;
        put_line(to, v.x, v.y, op | line_flag);
        put_line(to + 16 * LINE_VECTORS, v.z, v.w, op | line_flag);
    }
}

/* Waits for n of a thread's vectors, `step` apart, from all sources; all loads are on their way together. What is asked
 * for beyond n or the last source is the last again. */
template <int PIECES, int N>
__device__ static inline void receive_lines(const struct peers &p, uint32_t op, int vector, int step, int n,
                                            uint4 arrived[PIECES][N - 1])
{
    const char *from = line_region(p, p.rank, op, 0) + 16 * vector;
    const int64_t next_source = (int64_t)LINE_BLOCKS * LINE_REGION;
    bool ready;
    unsigned spins = 0;
    do {
        ready = true;
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
            for (int s = 0; s < N - 1; s++) {
                const char *line = from + 16 * step * (piece < n ? piece : n - 1);
                if (N > 2) line += next_source * (s < p.size - 1 ? s : p.size - 2);
                uint4 *v = &arrived[piece][s];
                bool first = get_line(line, op | line_flag, &v->x, &v->y);
                bool second = get_line(line + 16 * LINE_VECTORS, op | line_flag, &v->z, &v->w);
                ready = ready && first && second;
            }
    } while (!ready && (++spins % SPINS_A_LOOK || !stopped(p)));
}

/* Now and then a block wipes the slot that is not in use, so that no flag ever meets itself of 2^31 operations ago. A
 * peer writes there only after it has this rank's lines, which are sent after the wipe. */
__device__ static inline void wipe_lines(const struct peers &p, uint32_t op)
{
    if ((op & (wipe_every - 1)) >= 2) return;
    for (int s = 0; s < p.size - 1; s++) {
        uint4 *region = (uint4 *)line_region(p, p.rank, op + 1, s);
        for (int i = (int)threadIdx.x; i < LINE_REGION / 16; i += (int)blockDim.x) region[i] = make_uint4(0, 0, 0, 0);
    }
    __threadfence_system();
    __syncthreads();
}

__device__ static inline uint32_t line_op(const struct peers &p)
{
    return *(const volatile uint32_t *)&head_of(p, p.rank)->line_op[blockIdx.x];
}

/* The last thing a block does. */
__device__ static inline void end_line_op(const struct peers &p, uint32_t op)
{
    __syncthreads();
    if (threadIdx.x == 0) head_of(p, p.rank)->line_op[blockIdx.x] = op + 1;
}

/* A vector a thread. */
template <int KIND, int N>
__global__ static void __launch_bounds__(LINE_VECTORS)
    lines_kernel(const __grid_constant__ struct peers p, char *out, const char *in, int64_t bytes)
{
    wait_for_predecessor();
    let_successor_start();
    const int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 16;
    const uint32_t op = line_op(p);
    uint4 own = make_uint4(0, 0, 0, 0), arrived[1][N - 1];
    if (at < bytes) own = load_vector(in, at, bytes);
    wipe_lines(p, op);
    if (at < bytes) {
        send_line<N>(p, op, (int)threadIdx.x, own);
        receive_lines<1, N>(p, op, (int)threadIdx.x, 0, 1, arrived);
        finish<KIND, N>(p, out, in, at, bytes, own, arrived[0]);
    }
    end_line_op(p, op);
}

/* Sum over the block, on every thread, in the order of the norm op's. */
__device__ static inline float block_sum(float x)
{
    __shared__ float part[NORM_THREADS / 32];
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < NORM_THREADS / 32 ? part[threadIdx.x % 32] : 0;
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

/* A row a block; thread t has the vectors t, t + 256, ... of the row. The arithmetic is that of a sum, rounded, and
 * then the op add_rms_norm, operation for operation. */
template <int KIND, int N, int PIECES>
__global__ static void __launch_bounds__(NORM_THREADS)
    norm_kernel(const __grid_constant__ struct peers p, const char *x, char *residual, const float *weight,
                float epsilon, char *out, int width)
{
    const int row_vectors = width / 8, first = (int)threadIdx.x;
    const int n = first < row_vectors ? (row_vectors - first + NORM_THREADS - 1) / NORM_THREADS : 0;
    const int64_t row = (int64_t)blockIdx.x * width * 2;
    uint4 own[PIECES], before[PIECES], arrived[PIECES][N - 1];
    float value[PIECES][8], squares = 0;
    wait_for_predecessor();
    let_successor_start();
    const uint32_t op = line_op(p);
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        if (i < n) own[i] = ((const uint4 *)(x + row))[first + i * NORM_THREADS];
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        if (i < n) before[i] = ((const uint4 *)(residual + row))[first + i * NORM_THREADS];
    wipe_lines(p, op);
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        if (i < n) send_line<N>(p, op, first + i * NORM_THREADS, own[i]);
    if (n > 0) receive_lines<PIECES, N>(p, op, first, NORM_THREADS, n, arrived);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        if (i >= n) break;
        float old[8];
        unpack<KIND>(sum_in_order<KIND, N>(p, own[i], arrived[i]), value[i]);
        unpack<KIND>(before[i], old);
        for (int j = 0; j < 8; j++) value[i][j] += old[j];
        uint4 sum = pack<KIND>(value[i]);
        ((uint4 *)(residual + row))[first + i * NORM_THREADS] = sum;
        unpack<KIND>(sum, value[i]); /* the norm sees what was stored */
        for (int j = 0; j < 8; j++) squares += value[i][j] * value[i][j];
    }
    const float scale = rsqrtf(block_sum(squares) / (float)width + epsilon);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        if (i >= n) break;
        const float4 *w = (const float4 *)weight + 2 * (first + i * NORM_THREADS);
        const float4 w0 = w[0], w1 = w[1];
        const float factor[8] = {w0.x, w0.y, w0.z, w0.w, w1.x, w1.y, w1.z, w1.w};
        for (int j = 0; j < 8; j++) value[i][j] *= scale * factor[j];
        ((uint4 *)(out + row))[first + i * NORM_THREADS] = pack<KIND>(value[i]);
    }
    end_line_op(p, op);
}

/* ---- chunks ---- */

/* Vectors that a thread has in hand at a time. */
template <int N> struct batch {
    enum { VECTORS = N == 2 ? 4 : N == 4 ? 2 : 1 };
};

/* Writes n vectors from `at` on into the peers' slots of a chunk. */
template <int N>
__device__ static inline void send_chunk(const struct peers &p, const char *in, int64_t at, int64_t bytes, int n,
                                         uint32_t chunk)
{
    enum { VECTORS = batch<N>::VECTORS };
    for (int first = (int)threadIdx.x; first < n; first += VECTORS * CHUNK_THREADS) {
        uint4 v[VECTORS];
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            int vector = first + i * CHUNK_THREADS;
            if (vector < n) v[i] = load_vector(in, at + 16 * (int64_t)vector, bytes);
        }
#pragma unroll
        for (int k = 1; k < N; k++) {
            if (k >= p.size) break;
            int peer = p.rank + k < p.size ? p.rank + k : p.rank + k - p.size;
            uint4 *to = (uint4 *)chunk_region(p, peer, chunk, source_at(peer, p.rank));
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
                int vector = first + i * CHUNK_THREADS;
                if (vector < n) to[vector] = v[i];
            }
        }
    }
}

/* The peers have sent this chunk once they count one more than its number. */
__device__ static inline void await_chunk(const struct peers &p, uint32_t chunk)
{
    const uint32_t *arrived = head_of(p, p.rank)->arrived[blockIdx.x];
    for (int s = 0; s < p.size - 1; s++)
        for (unsigned spins = 1; (int32_t)(read_flag(&arrived[s]) - (chunk + 1)) < 0; spins++)
            if (spins % SPINS_A_LOOK == 0 && stopped(p)) return;
}

template <int KIND, int N>
__device__ static inline void finish_chunk(const struct peers &p, char *out, const char *in, int64_t at, int64_t bytes,
                                           int n, uint32_t chunk)
{
    enum { VECTORS = batch<N>::VECTORS };
    for (int first = (int)threadIdx.x; first < n; first += VECTORS * CHUNK_THREADS) {
        uint4 own[VECTORS], arrived[VECTORS][N - 1];
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            int vector = first + i * CHUNK_THREADS;
            if (vector < n) own[i] = load_vector(in, at + 16 * (int64_t)vector, bytes);
        }
#pragma unroll
        for (int s = 0; s < N - 1; s++) {
            const char *from = chunk_region(p, p.rank, chunk, s < p.size - 1 ? s : p.size - 2);
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
                int vector = first + i * CHUNK_THREADS;
                arrived[i][s] = load_arrived(from + 16 * (vector < n ? vector : n - 1));
            }
        }
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            int vector = first + i * CHUNK_THREADS;
            if (vector < n) finish<KIND, N>(p, out, in, at + 16 * (int64_t)vector, bytes, own[i], arrived[i]);
        }
    }
}

/* Block b has the chunks b, b + blocks, ... of `chunk_bytes`. It sends one ahead of the one it finishes. */
template <int KIND, int N>
__global__ static void __launch_bounds__(CHUNK_THREADS + 32)
    chunks_kernel(const __grid_constant__ struct peers p, char *out, const char *in, int64_t bytes, int chunk_bytes)
{
    wait_for_predecessor();
    let_successor_start();
    const bool signals = threadIdx.x >= CHUNK_THREADS;
    const int peer = (int)threadIdx.x - CHUNK_THREADS; /* that a signalling thread tells */
    const int64_t at = (int64_t)blockIdx.x * chunk_bytes, step = (int64_t)gridDim.x * chunk_bytes;
    const int n = at < bytes ? (int)((bytes - at + step - 1) / step) : 0;
    uint32_t *counter = &head_of(p, p.rank)->chunk_op[blockIdx.x];
    const uint32_t base = *(volatile uint32_t *)counter;
    for (int k = -1; k < n; k++) {
        if (k + 1 < n) {
            const int64_t next = at + (k + 1) * step, left = bytes - next;
            const int vectors = (int)(((left < chunk_bytes ? left : chunk_bytes) + 15) / 16);
            if (!signals) send_chunk<N>(p, in, next, bytes, vectors, base + (uint32_t)(k + 1));
            __syncthreads();
            if (signals && peer < p.size && peer != p.rank)
                raise_flag(&head_of(p, peer)->arrived[blockIdx.x][source_at(peer, p.rank)], base + (uint32_t)(k + 2));
        }
        if (k >= 0 && !signals) {
            const int64_t here = at + k * step, left = bytes - here;
            const int vectors = (int)(((left < chunk_bytes ? left : chunk_bytes) + 15) / 16);
            await_chunk(p, base + (uint32_t)k);
            finish_chunk<KIND, N>(p, out, in, here, bytes, vectors, base + (uint32_t)k);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) *counter = base + (uint32_t)n;
}

__global__ static void scale_kernel(float *x, int64_t n, float factor)
{
    wait_for_predecessor();
    let_successor_start();
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x)
        x[i] *= factor;
}

/* ---- the host's side ---- */

int comm__cuda_failed(const char *what, int error)
{
    (void)cudaGetLastError(); /* else a later launch would report it */
    FAIL(ERR_DEVICE, "CUDA: %s: %s (%s)", what, cudaGetErrorString((cudaError_t)error),
         cudaGetErrorName((cudaError_t)error));
}

static int launch(bool early, const char *name, const void *kernel, unsigned grid, unsigned block, void **arguments,
                  void *stream)
{
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(block);
    config.stream = (cudaStream_t)stream;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    cudaError_t error = cudaLaunchKernelExC(&config, kernel, arguments);
    return error == cudaSuccess ? OK : comm__cuda_failed(name, error);
}

static int arch_of(int device, int *major)
{
    COMM_CUDA_TRY(cudaDeviceGetAttribute(major, cudaDevAttrComputeCapabilityMajor, device));
    return OK;
}

/* Kernels come for 2, up to 4 and up to 8 ranks. */
template <int KIND> static const void *lines_of(int size)
{
    if (size <= 2) return (const void *)lines_kernel<KIND, 2>;
    return size <= 4 ? (const void *)lines_kernel<KIND, 4> : (const void *)lines_kernel<KIND, 8>;
}
template <int KIND> static const void *chunks_of(int size)
{
    if (size <= 2) return (const void *)chunks_kernel<KIND, 2>;
    return size <= 4 ? (const void *)chunks_kernel<KIND, 4> : (const void *)chunks_kernel<KIND, 8>;
}
template <int KIND, int N> static const void *norm_of_pieces(int pieces)
{
    if (pieces <= 1) return (const void *)norm_kernel<KIND, N, 1>;
    return pieces <= 2 ? (const void *)norm_kernel<KIND, N, 2> : (const void *)norm_kernel<KIND, N, 4>;
}
template <int KIND> static const void *norm_of(int size, int pieces)
{
    if (size <= 2) return norm_of_pieces<KIND, 2>(pieces);
    return size <= 4 ? norm_of_pieces<KIND, 4>(pieces) : norm_of_pieces<KIND, 8>(pieces);
}

static size_t window_bytes(const struct peers *p)
{
    return (size_t)p->chunks_at + (size_t)(p->size - 1) * CHUNK_BLOCKS * CHUNK_SLOTS * (size_t)p->chunk_bytes;
}

static int take_window(struct nvlink *n, struct nvlink_card *card)
{
    cudaIpcMemHandle_t handle;
    static_assert(sizeof handle == sizeof card->handle, "a card holds one memory handle");
    COMM_CUDA_TRY(cudaSetDevice(n->device));
    int major = 0;
    TRY(arch_of(n->device, &major));
    n->early = major >= 9;
    COMM_CUDA_TRY(cudaDeviceGetAttribute(&n->n_multiprocessors, cudaDevAttrMultiProcessorCount, n->device));
    COMM_CUDA_TRY(cudaHostAlloc((void **)&n->stop, sizeof *n->stop, cudaHostAllocMapped | cudaHostAllocPortable));
    *(volatile uint32_t *)n->stop = 0;
    COMM_CUDA_TRY(cudaHostGetDevicePointer((void **)&n->peers.stop, n->stop, 0));
    COMM_CUDA_TRY(cudaMalloc((void **)&n->peers.window[n->peers.rank], n->bytes));
    COMM_CUDA_TRY(cudaMemset(n->peers.window[n->peers.rank], 0, n->bytes));
    COMM_CUDA_TRY(cudaDeviceSynchronize()); /* before a peer writes */
    COMM_CUDA_TRY(cudaIpcGetMemHandle(&handle, n->peers.window[n->peers.rank]));
    memcpy(card->handle, &handle, sizeof handle);
    COMM_CUDA_TRY(cudaDeviceGetPCIBusId(card->bus_id, sizeof card->bus_id, n->device));
    return OK;
}

int comm__nvlink_open(int rank, int size, int device, struct nvlink_card *card, struct nvlink **out)
{
    *out = NULL;
    memset(card, 0, sizeof *card);
    if (size < 2 || size > NVLINK_MAX_RANKS)
        FAIL(ERR_UNSUPPORTED, "%d ranks: peer memory is for 2 to %d", size, NVLINK_MAX_RANKS);
    struct nvlink *n = (struct nvlink *)calloc(1, sizeof *n);
    if (!n) FAIL(ERR_NOMEM, "no memory for a communicator");
    n->device = device;
    n->peers.rank = rank;
    n->peers.size = size;
    n->peers.chunk_bytes = size == 2 ? 32 << 10 : size <= 4 ? 16 << 10 : 8 << 10;
    n->peers.chunks_at = HEAD_BYTES + (int64_t)2 * (size - 1) * LINE_BLOCKS * LINE_REGION;
    n->bytes = window_bytes(&n->peers);
    *out = n;
    return take_window(n, card);
}

/* A device that this process cannot see may still be mapped: then the mapping itself tells. */
static int check_access(const struct nvlink *n, int rank, const char *bus_id)
{
    int device = -1, reachable = 0;
    if (cudaDeviceGetByPCIBusId(&device, bus_id) != cudaSuccess) {
        (void)cudaGetLastError();
        return OK;
    }
    if (device == n->device)
        FAIL(ERR_UNSUPPORTED, "rank %d uses the same device, %s; each rank needs one of its own", rank, bus_id);
    COMM_CUDA_TRY(cudaDeviceCanAccessPeer(&reachable, n->device, device));
    if (!reachable) FAIL(ERR_UNSUPPORTED, "device %d cannot reach rank %d's, %s", n->device, rank, bus_id);
    return OK;
}

int comm__nvlink_connect(struct nvlink *n, const struct nvlink_card *cards)
{
    for (int r = 0; r < n->peers.size; r++) {
        cudaIpcMemHandle_t handle;
        void *window = NULL;
        if (r == n->peers.rank) continue;
        TRY(check_access(n, r, cards[r].bus_id));
        memcpy(&handle, cards[r].handle, sizeof handle);
        COMM_CUDA_TRY(cudaIpcOpenMemHandle(&window, handle, cudaIpcMemLazyEnablePeerAccess));
        n->peers.window[r] = (char *)window;
    }
    return OK;
}

void comm__nvlink_disconnect(struct nvlink *n)
{
    if (!n) return;
    for (int r = 0; r < n->peers.size; r++) {
        if (r == n->peers.rank || !n->peers.window[r]) continue;
        (void)cudaIpcCloseMemHandle(n->peers.window[r]);
        n->peers.window[r] = NULL;
    }
}

void comm__nvlink_close(struct nvlink *n)
{
    if (!n) return;
    comm__nvlink_disconnect(n);
    if (n->peers.window[n->peers.rank]) (void)cudaFree(n->peers.window[n->peers.rank]);
    if (n->stop) (void)cudaFreeHost(n->stop);
    free(n);
}

void comm__nvlink_interrupt(struct nvlink *n)
{
    if (n && n->stop) __atomic_store_n(n->stop, 1, __ATOMIC_SEQ_CST);
}

/* Blocks of a line kernel: small ones, over many multiprocessors, as long as there are enough. */
static int line_threads(size_t vectors)
{
    int threads = 128;
    while ((size_t)threads * LINE_BLOCKS < vectors) threads *= 2;
    return threads;
}

bool comm__nvlink_takes(const struct nvlink *n, bool lines, size_t bytes)
{
    /* All blocks of a kernel must be on the device together: 1,024 threads a multiprocessor are on any. */
    size_t threads = (size_t)n->n_multiprocessors * 1024, most = (size_t)LINE_BLOCKS * LINE_VECTORS;
    if (bytes == 0 || bytes % 2) return false;
    return !lines || (bytes + 15) / 16 <= (threads < most ? threads : most);
}

static int run_lines(struct nvlink *n, const void *kernel, void *out, const void *in, size_t bytes, void *stream)
{
    size_t vectors = (bytes + 15) / 16;
    int threads = line_threads(vectors);
    int64_t size = (int64_t)bytes;
    void *arguments[] = {&n->peers, &out, &in, &size};
    return launch(n->early, "lines between ranks", kernel, (unsigned)((vectors + threads - 1) / threads),
                  (unsigned)threads, arguments, stream);
}

/* About four chunks a block, so that sending and adding overlap, within the sizes there are. */
static int run_chunks(struct nvlink *n, const void *kernel, void *out, const void *in, size_t bytes, void *stream)
{
    size_t most = (size_t)n->n_multiprocessors < CHUNK_BLOCKS ? (size_t)n->n_multiprocessors : CHUNK_BLOCKS;
    size_t chunk = bytes / (4 * most) / CHUNK_LEAST * CHUNK_LEAST;
    if (chunk < CHUNK_LEAST) chunk = CHUNK_LEAST;
    if (chunk > (size_t)n->peers.chunk_bytes) chunk = (size_t)n->peers.chunk_bytes;
    size_t blocks = (bytes + chunk - 1) / chunk;
    int64_t size = (int64_t)bytes;
    int chunk_bytes = (int)chunk;
    void *arguments[] = {&n->peers, &out, &in, &size, &chunk_bytes};
    return launch(n->early, "chunks between ranks", kernel, (unsigned)(blocks < most ? blocks : most),
                  CHUNK_THREADS + 32, arguments, stream);
}

int comm__nvlink_all_reduce(struct nvlink *n, bool lines, void *x, enum dtype dtype, size_t bytes, void *stream)
{
    const int size = n->peers.size;
    const void *kernel = NULL;
    if (dtype == DTYPE_F32) kernel = lines ? lines_of<SUM_F32>(size) : chunks_of<SUM_F32>(size);
    if (dtype == DTYPE_BF16) kernel = lines ? lines_of<SUM_BF16>(size) : chunks_of<SUM_BF16>(size);
    if (dtype == DTYPE_F16) kernel = lines ? lines_of<SUM_F16>(size) : chunks_of<SUM_F16>(size);
    if (!kernel) FAIL(ERR_BUG, "peer memory: no sum of %s", dtype_name(dtype));
    return (lines ? run_lines : run_chunks)(n, kernel, x, x, bytes, stream);
}

int comm__nvlink_all_gather(struct nvlink *n, bool lines, void *out, const void *in, size_t bytes, void *stream)
{
    const void *kernel = lines ? lines_of<GATHER>(n->peers.size) : chunks_of<GATHER>(n->peers.size);
    return (lines ? run_lines : run_chunks)(n, kernel, out, in, bytes, stream);
}

bool comm__nvlink_norm_takes(const struct nvlink *n, int64_t rows, int64_t width, enum dtype dtype)
{
    return (dtype == DTYPE_BF16 || dtype == DTYPE_F16) && rows <= LINE_BLOCKS && width % 8 == 0 &&
           width / 8 <= LINE_VECTORS && rows <= n->n_multiprocessors;
}

int comm__nvlink_add_norm(struct nvlink *n, const void *x, void *residual, const float *weight, float epsilon,
                          void *out, int64_t rows, int64_t width, enum dtype dtype, void *stream)
{
    if (((uint64_t)x | (uint64_t)residual | (uint64_t)weight | (uint64_t)out) % 16)
        FAIL(ERR_BUG, "all-reduce with norm: an argument is not 16-byte aligned");
    int columns = (int)width, pieces = (columns / 8 + NORM_THREADS - 1) / NORM_THREADS;
    const void *kernel =
        dtype == DTYPE_BF16 ? norm_of<SUM_BF16>(n->peers.size, pieces) : norm_of<SUM_F16>(n->peers.size, pieces);
    void *arguments[] = {&n->peers, &x, &residual, &weight, &epsilon, &out, &columns};
    return launch(n->early, "all-reduce with norm", kernel, (unsigned)rows, NORM_THREADS, arguments, stream);
}

int comm__nvlink_scale(float *x, size_t n, float factor, void *stream)
{
    int device = 0, major = 0;
    int64_t count = (int64_t)n;
    COMM_CUDA_TRY(cudaGetDevice(&device));
    TRY(arch_of(device, &major));
    void *arguments[] = {&x, &count, &factor};
    size_t blocks = (n + 255) / 256;
    return launch(major >= 9, "scale", (const void *)scale_kernel, (unsigned)(blocks < 1024 ? blocks : 1024), 256,
                  arguments, stream);
}
