/* comm_nvlink_kernels - the kernels behind comm_nvlink.cu, and what lies where in the windows.
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
#ifndef VITRAIL_PARALLEL_COMM_NVLINK_KERNELS_CUH
#define VITRAIL_PARALLEL_COMM_NVLINK_KERNELS_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

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

#endif
