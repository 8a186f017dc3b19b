/* y = x w^T for 9 to 32 rows of x on Hopper: still bound by reading the weights once, but beyond what the registers of
 * gemv.cu hold. Products are wgmma's of 64 rows of w by all rows of x; both sides come through the tensor copy engine
 * into a ring as deep as shared memory is. More rows are the library's (docs/benchmarks.md).
 *
 * A block takes tiles of 128 rows of w, a step is 64 columns; all steps of all tiles are dealt evenly to the blocks in
 * one row, so that a tile may be shared by several. Those leave sums in scratch and the last one there adds them in the
 * order of the columns. Who adds what is fixed by the weight's shape and the device: a row of y has the same bits
 * whatever rows stand beside it, and however many.
 *
 * The ring fills with weights before the predecessor of the kernel has ended, and blocks whose sums wait for another's
 * leave at once, so that the next linear may do the same. With `gated` a tile is 64 rows of the gate and the same 64 of
 * the upper half, and gives silu(gate) * up. */
#include "kernels/cuda/attention_instructions.cuh"
#include "kernels/cuda/tensor_map.cuh"

enum {
    ROWS_MOST = 32,    /* of x */
    ROWS_HALF = 64,    /* rows of w of one product; a tile has two */
    ROWS_COLUMNS = 64, /* of a step: 128 bytes, which is the width of a swizzled box */
    ROWS_CONSUMERS = 128,
    ROWS_THREADS = ROWS_CONSUMERS + 32, /* the last warp starts the copies */
    ROWS_RING_BYTES = 220 << 10,
    ROWS_LEAST_STEPS = 4, /* of a block: for less it is not worth another sum */
    ROWS_MOST_BLOCKS = CUDA_LEAST_COUNTERS,
    ROWS_SUM_BYTES = ROWS_CONSUMERS * ROWS_MOST * (int)sizeof(float), /* of a tile; two a block */
};

struct rows_arguments {
    CUtensorMap w_map, x_map;
    void *y;
    const float *bias;
    float4 *partial;  /* [blocks, 2, N / 4, ROWS_CONSUMERS]: sums of a tile that the block's range ends or begins in */
    int32_t *counter; /* [blocks] how many sums of the tile are there whose first steps are this block's */
    int64_t y_stride;
    int n_rows, n_out;
    int tile_steps, n_steps; /* of a tile, of all */
    bool gated, wide;        /* wide: y is float32 */
};

template <int N> struct rows_ring {
    static constexpr int stages = ROWS_RING_BYTES / ((2 * ROWS_HALF + N) * ROWS_COLUMNS * 2);
    uint16_t w[stages][2][ROWS_HALF][ROWS_COLUMNS];
    uint16_t x[stages][N][ROWS_COLUMNS];
    uint64_t full[stages], empty[stages];
    int arrived;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/* ---- instructions ---- */

INLINE uint64_t read_once(void)
{
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
INLINE uint64_t read_often(void)
{
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

INLINE void box_load(uint32_t to, const void *map, uint32_t barrier, int column, int row, uint64_t policy)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
                 "[%1, {%3, %4}], [%2], %5;" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(column), "r"(row), "l"(policy)
                 : "memory");
}

/* An 8 x 8 matrix of 16-bit values spread over a warp as products are, turned round. */
INLINE uint32_t turn_matrix(uint32_t x)
{
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

#define BIND_8(d, i) BIND_4(d, i), BIND_4(d, (i) + 4)
#define NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"

/* d[64, n] (+)= a b^T, both in shared memory, k along the rows. */
#define WGMMA_ROWS(type, n, names, a, b, add, ...)                                                                     \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\n"                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, " a ", " b              \
                 ", p, 1, 1, 0, 0;\n}"                                                                                 \
                 : __VA_ARGS__                                                                                         \
                 : "l"(whole_descriptor(w, 1024)), "l"(whole_descriptor(x, 1024)), "r"(sum))
#define WGMMA_ROWS_16(type) WGMMA_ROWS(type, "16", NAMES_8, "%8", "%9", "%10", BIND_8(d, 0))
#define WGMMA_ROWS_32(type) WGMMA_ROWS(type, "32", NAMES_16, "%16", "%17", "%18", BIND_16(d, 0))
#define WGMMA_ROWS_OF(rows)                                                                                            \
    do {                                                                                                               \
        if constexpr (__is_same(T, bfloat))                                                                            \
            WGMMA_ROWS_##rows("bf16");                                                                                 \
        else                                                                                                           \
            WGMMA_ROWS_##rows("f16");                                                                                  \
    } while (0)

template <typename T, int N> INLINE void wgmma_rows(float *d, uint32_t w, uint32_t x, int sum)
{
    if constexpr (N == 16)
        WGMMA_ROWS_OF(16);
    else
        WGMMA_ROWS_OF(32);
}

/* ---- who does which steps ---- */

/* The range of steps that is this block's. */
struct rows_share {
    int first, end;
};

INLINE int first_step(const struct rows_arguments &a, int block) { return a.n_steps * block / (int)gridDim.x; }
/* The block whose range a step is in. */
INLINE int block_of(const struct rows_arguments &a, int step) { return ((step + 1) * (int)gridDim.x - 1) / a.n_steps; }

INLINE struct rows_share share_of(const struct rows_arguments &a)
{
    return {first_step(a, (int)blockIdx.x), first_step(a, (int)blockIdx.x + 1)};
}

/* ---- the producer: one thread ---- */

/* A step: its place in the ring, its tile and its columns. */
struct rows_step {
    int stage, tile, column;
};

INLINE struct rows_step step_of(const struct rows_arguments &a, const struct rows_share &s)
{
    return {0, s.first / a.tile_steps, s.first % a.tile_steps * ROWS_COLUMNS};
}
template <int N> INLINE void advance(const struct rows_arguments &a, struct rows_step *t)
{
    t->stage = t->stage + 1 < rows_ring<N>::stages ? t->stage + 1 : 0;
    t->column += ROWS_COLUMNS;
    if (t->column == a.tile_steps * ROWS_COLUMNS) t->column = 0, t->tile++;
}

template <int N>
INLINE void load_w(const struct rows_arguments &a, struct rows_ring<N> *m, const struct rows_step &t, uint64_t policy)
{
    const int row = t.tile * (a.gated ? ROWS_HALF : 2 * ROWS_HALF);
    const int beside = row + (a.gated ? a.n_out : (int)ROWS_HALF);
    const uint32_t full = shared_address(&m->full[t.stage]);
    barrier_expect(full, (int)(sizeof m->w[0] + sizeof m->x[0]));
    box_load(shared_address(m->w[t.stage][0]), &a.w_map, full, t.column, row, policy);
    box_load(shared_address(m->w[t.stage][1]), &a.w_map, full, t.column, beside, policy);
}

template <int N>
INLINE void load_x(const struct rows_arguments &a, struct rows_ring<N> *m, const struct rows_step &t, uint64_t policy)
{
    box_load(shared_address(m->x[t.stage]), &a.x_map, shared_address(&m->full[t.stage]), t.column, 0, policy);
}

/* The first weights, before anything else is known; returns the step after them. */
template <int N>
INLINE struct rows_step begin_ring(const struct rows_arguments &a, const struct rows_share &s, struct rows_ring<N> *m)
{
    const uint64_t once = read_once();
    struct rows_step t = step_of(a, s);
    tensor_map_prefetch(&a.w_map);
    tensor_map_prefetch(&a.x_map);
    for (int i = 0; i < rows_ring<N>::stages; i++) {
        barrier_init(shared_address(&m->full[i]), 1);
        barrier_init(shared_address(&m->empty[i]), ROWS_CONSUMERS / 32);
    }
    barriers_ready();
    async_fence();
    for (int i = 0; i < min(s.end - s.first, rows_ring<N>::stages); i++, advance<N>(a, &t)) load_w<N>(a, m, t, once);
    return t;
}

template <int N>
INLINE void produce(const struct rows_arguments &a, const struct rows_share &s, struct rows_ring<N> *m,
                    struct rows_step t)
{
    constexpr int stages = rows_ring<N>::stages;
    const uint64_t once = read_once(), often = read_often();
    const int n = s.end - s.first;
    struct rows_step first = step_of(a, s);
    for (int i = 0; i < min(n, stages); i++, advance<N>(a, &first)) load_x<N>(a, m, first, often);
    for (int i = stages; i < n; i++, advance<N>(a, &t)) {
        barrier_wait(shared_address(&m->empty[t.stage]), (i / stages + 1) % 2);
        load_w<N>(a, m, t, once);
        load_x<N>(a, m, t, often);
    }
}

/* ---- consumers: a warpgroup ---- */

/* Each warp tells the producer that it has read step i. */
template <int N> INLINE void release(struct rows_ring<N> *m, int i)
{
    if (threadIdx.x % 32 == 0) barrier_arrive(shared_address(&m->empty[i % rows_ring<N>::stages]));
}

/* sum = the block's steps [i, end), all of one tile. */
template <typename T, int N> INLINE void multiply_steps(struct rows_ring<N> *m, float *sum, int i, int end)
{
    constexpr int stages = rows_ring<N>::stages, unit = ROWS_HALF * ROWS_COLUMNS * 2 / 16;
    const int first = i;
    for (; i < end; i++) {
        const int stage = i % stages;
        const uint32_t w = matrix_descriptor(shared_address(m->w[stage]), 0);
        const uint32_t x = matrix_descriptor(shared_address(m->x[stage]), 0);
        barrier_wait(shared_address(&m->full[stage]), i / stages % 2);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < ROWS_COLUMNS / 16; k++) {
            wgmma_rows<T, N>(sum, w + 2 * k, x + 2 * k, i > first || k > 0);
            wgmma_rows<T, N>(sum + N / 2, w + unit + 2 * k, x + 2 * k, i > first || k > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (i > first) release<N>(m, i - 1);
    }
    wgmma_wait<0>();
    hold<N>(sum);
    release<N>(m, end - 1);
}

/* A tile's sum of a block stands in its second place if the block has the tile's first steps, else in its first. */
INLINE float4 *place_of(const struct rows_arguments &a, int block, bool first)
{
    const int64_t at = (int64_t)block * 2 + first;
    return a.partial + at * (ROWS_SUM_BYTES / (int)sizeof(float4)) + threadIdx.x;
}

template <int N> INLINE void load_sum(float4 *to, const float4 *from)
{
#pragma unroll
    for (int i = 0; i < N / 4; i++) to[i] = __ldcg(from + i * ROWS_CONSUMERS);
}
template <int N> INLINE void add_sum(float *sum, const float4 *more)
{
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        sum[4 * i] += more[i].x, sum[4 * i + 1] += more[i].y;
        sum[4 * i + 2] += more[i].z, sum[4 * i + 3] += more[i].w;
    }
}

/* Of a tile of blocks [low, high]: leaves this one's sum in scratch; the last to do so gets the whole, in the blocks'
 * order, and true. */
template <int N>
INLINE bool join_sums(const struct rows_arguments &a, struct rows_ring<N> *m, float *sum, int low, int high)
{
    const int block = (int)blockIdx.x;
    int32_t *counter = &a.counter[low];
    float4 *mine = place_of(a, block, block == low), now[N / 4], next[N / 4];
#pragma unroll
    for (int i = 0; i < N / 4; i++)
        __stcg(mine + i * ROWS_CONSUMERS, make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]));
    __threadfence();
    group_sync(1, ROWS_CONSUMERS);
    if (threadIdx.x == 0) m->arrived = atomicAdd(counter, 1);
    group_sync(1, ROWS_CONSUMERS);
    if (m->arrived < high - low) return false;
    __threadfence();
    if (threadIdx.x == 0) *counter = 0;
    load_sum<N>(now, place_of(a, low, true));
#pragma unroll
    for (int i = 0; i < N; i++) sum[i] = 0;
    for (int other = low + 1; other <= high; other++) {
        load_sum<N>(next, place_of(a, other, false));
        add_sum<N>(sum, now);
#pragma unroll
        for (int i = 0; i < N / 4; i++) now[i] = next[i];
    }
    add_sum<N>(sum, now);
    return true;
}

/* ---- results: a thread holds two rows of w, `m` and the one 8 below, by two rows of x in every 8 ---- */

/* silu(gate) * up; both rounded first, as when they are stored between the two ops. */
template <typename T> INLINE float gate(float x, float up)
{
    x = to_float(from_float<T>(x));
    return __fdividef(x, 1 + __expf(-x)) * to_float(from_float<T>(up));
}

/* 8 rows of w from `row` on, sum[4 j] and the next those by two of rows 8 j and on of x. Narrow ones are turned round
 * in the warp to two neighbouring values of one row of y. */
template <typename T, int N> INLINE void store_eight(const struct rows_arguments &a, const float *sum, int row)
{
    const int lane = (int)threadIdx.x % 32, x = a.wide ? lane % 4 * 2 : lane / 4;
    const int m = row + (a.wide ? lane / 4 : lane % 4 * 2), n = m < a.n_out ? a.n_rows - x : 0;
    const int64_t at = x * a.y_stride + m;
    if (a.wide) {
        float *y = (float *)a.y + at;
#pragma unroll
        for (int j = 0; j < N / 8; j++, y += 8 * a.y_stride) {
            if (8 * j < n) y[0] = sum[4 * j];
            if (8 * j + 1 < n) y[a.y_stride] = sum[4 * j + 1];
        }
    } else {
        T *y = (T *)a.y + at;
#pragma unroll
        for (int j = 0; j < N / 8; j++, y += 8 * a.y_stride) {
            const uint32_t pair = turn_matrix(pack2<T>(sum[4 * j], sum[4 * j + 1]));
            if (8 * j < n) *(uint32_t *)y = pair;
        }
    }
}

/* Adds the bias of two rows of w; `of`: where that of the thread's first stands, `left`: rows from there on. */
template <int N> INLINE void add_bias(float *sum, const float *of, int left)
{
    const float bias = left > 0 ? of[0] : 0, below = left > 8 ? of[8] : 0;
#pragma unroll
    for (int i = 0; i < N / 2; i++) sum[i] += i % 4 < 2 ? bias : below;
}

/* A tile's sums: its first 64 rows of w, then its others. A warp has 16 rows of each. */
template <typename T, int N> INLINE void store_sums(const struct rows_arguments &a, float *sum, int tile)
{
    const int lane = (int)threadIdx.x % 32, within = (int)threadIdx.x / 32 * 16;
    const int row = tile * (a.gated ? ROWS_HALF : 2 * ROWS_HALF) + within, mine = row + lane / 4;
    if (a.bias) {
        add_bias<N>(sum, a.bias + mine, a.n_out - mine);
        if (a.gated)
            add_bias<N>(sum + N / 2, a.bias + a.n_out + mine, a.n_out - mine);
        else
            add_bias<N>(sum + N / 2, a.bias + mine + ROWS_HALF, a.n_out - mine - ROWS_HALF);
    }
    if (a.gated) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) sum[i] = gate<T>(sum[i], sum[N / 2 + i]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (half && a.gated) break;
        store_eight<T, N>(a, sum + half * N / 2, row + half * ROWS_HALF);
        store_eight<T, N>(a, sum + half * N / 2 + 2, row + half * ROWS_HALF + 8);
    }
}

template <typename T, int N>
INLINE void consume(const struct rows_arguments &a, const struct rows_share &s, struct rows_ring<N> *m)
{
    float sum[N]; /* of the tile's first 64 rows of w, then of the others */
    for (int step = s.first; step < s.end;) {
        const int tile = step / a.tile_steps, begin = tile * a.tile_steps, end = min(s.end, begin + a.tile_steps);
        const int low = block_of(a, begin), high = block_of(a, begin + a.tile_steps - 1);
        multiply_steps<T, N>(m, sum, step - s.first, end - s.first);
        step = end;
        if (low < high && !join_sums<N>(a, m, sum, low, high)) continue;
        store_sums<T, N>(a, sum, tile);
    }
}

#endif

/* ---- the kernel ---- */

template <typename T, int N>
__global__ void __launch_bounds__(ROWS_THREADS, 1) linear_rows_kernel(const __grid_constant__ struct rows_arguments a)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) unsigned char dynamic[];
    struct rows_ring<N> *m = (struct rows_ring<N> *)(dynamic + (1024 - shared_address(dynamic) % 1024) % 1024);
    const struct rows_share s = share_of(a);
    struct rows_step next = {};
    let_successor_start();
    if (threadIdx.x == ROWS_CONSUMERS) next = begin_ring<N>(a, s, m);
    __syncthreads();
    wait_for_predecessor();
    if (threadIdx.x < ROWS_CONSUMERS)
        consume<T, N>(a, s, m);
    else if (threadIdx.x == ROWS_CONSUMERS)
        produce<N>(a, s, m, next);
#endif
}

/* ---- the host's side ---- */

/* A matrix of 16-bit rows, in boxes of 64 columns and so many rows. */
static int encode_rows(encode_tiled encode, CUtensorMap *map, const char *name, const struct tensor *t, int rows)
{
    const cuuint64_t size[2] = {(cuuint64_t)t->dim[1], (cuuint64_t)t->dim[0]};
    const cuuint64_t stride[1] = {(cuuint64_t)t->stride[0] * 2};
    const cuuint32_t box[2] = {ROWS_COLUMNS, (cuuint32_t)rows};
    return encode_map(encode, map, name, t, 2, size, stride, box);
}

bool cuda__linear_rows_fits(const struct cuda *c, struct tensor y, struct tensor x, struct tensor w)
{
    const int64_t most = INT32_MAX / 2;
    const bool narrow = y.dtype != DTYPE_F32;
    return c->arch == 90 && x.dim[0] > CUDA_FEW_ROWS && x.dim[0] <= ROWS_MOST && w.dim[0] >= 2 * ROWS_HALF &&
           w.dim[1] >= ROWS_COLUMNS && w.dim[0] < most && w.dim[1] < most &&
           (w.dim[0] / ROWS_HALF + 2) * (w.dim[1] / ROWS_COLUMNS + 1) < most / ROWS_MOST_BLOCKS && w.dim[1] % 8 == 0 &&
           w.stride[0] % 8 == 0 && x.stride[0] % 8 == 0 && ((uint64_t)w.data | (uint64_t)x.data) % 16 == 0 &&
           (!narrow || (y.dim[1] % 2 == 0 && y.stride[0] % 2 == 0 && (uint64_t)y.data % 4 == 0)) &&
           c->n_multiprocessors <= ROWS_MOST_BLOCKS && c->n_counters >= ROWS_MOST_BLOCKS;
}

template <typename T, int N> static int launch_rows(struct ops *o, struct rows_arguments *a, int n_tiles)
{
    const struct cuda *c = cuda__of(o);
    const size_t bytes = sizeof(struct rows_ring<N>) + 1024;
    const int most = c->n_multiprocessors;
    static_assert(sizeof(struct rows_ring<N>) + 1024 <= 227 << 10, "what a block of compute capability 9.0 may have");
    a->n_steps = n_tiles * a->tile_steps;
    const int worth = a->n_steps / ROWS_LEAST_STEPS, blocks = worth < 1 ? 1 : worth < most ? worth : most;
    CUDA_TRY(cudaFuncSetAttribute(linear_rows_kernel<T, N>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    return cuda__launch(o, "linear_rows", linear_rows_kernel<T, N>, dim3((unsigned)blocks), dim3(ROWS_THREADS), bytes,
                        *a);
}

template <typename T> static int launch_padded(struct ops *o, struct rows_arguments *a, int n_tiles)
{
    return a->n_rows <= 16 ? launch_rows<T, 16>(o, a, n_tiles) : launch_rows<T, 32>(o, a, n_tiles);
}

static int multiply_rows(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias,
                         bool gated)
{
    const struct cuda *c = cuda__of(o);
    static_assert(2 * ROWS_MOST_BLOCKS * ROWS_SUM_BYTES <= CUDA_WORKSPACE_BYTES, "sums of all blocks have room");
    if (!c->workspace) FAIL(ERR_BUG, "cuda: ops_linear before ops_reserve");
    struct rows_arguments a = {};
    encode_tiled encode = NULL;
    a.y = y.data, a.y_stride = y.stride[0];
    a.bias = bias;
    a.partial = (float4 *)c->workspace, a.counter = c->counter;
    a.n_rows = (int)x.dim[0], a.n_out = (int)y.dim[1];
    a.tile_steps = (int)((w.dim[1] + ROWS_COLUMNS - 1) / ROWS_COLUMNS);
    a.gated = gated, a.wide = y.dtype == DTYPE_F32;
    const int tile = gated ? ROWS_HALF : 2 * ROWS_HALF, n_tiles = (a.n_out + tile - 1) / tile;
    TRY(find_encoder(&encode));
    TRY(encode_rows(encode, &a.w_map, "w", &w, ROWS_HALF));
    TRY(encode_rows(encode, &a.x_map, "x", &x, a.n_rows <= 16 ? 16 : 32));
    WITH_TYPE(w.dtype, T, return launch_padded<T>(o, &a, n_tiles));
}

int cuda__linear_rows(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias)
{
    return multiply_rows(o, y, x, w, bias, false);
}

int cuda__linear_rows_swiglu(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias)
{
    return multiply_rows(o, y, x, w, bias, true);
}
