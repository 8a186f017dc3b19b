/* Expected attention: a Gaussian model of the queries to come, and what they would attend to. In turn: the mean
 * rotation of the future positions; each head's mean and covariance of the rows, which are turned as they are read; the
 * logits of all keys, a product of 64 keys with the covariance at a time; their softmax, and its mean over the group.
 *
 * All float32. Rotations are factors on pairs of dimensions (i, i + head_dim / 2), taken as complex numbers. */
#include "kernels/cuda/device.cuh"

enum {
    MOST_DIM = 128,
    TURN_THREADS = 128,
    MEAN_THREADS = 1024,
    TILE = 64, /* of a covariance; and keys of a block */
    THREADS = 256,
    SIDE = 16, /* threads of a block stand in a square */
    EACH = TILE / SIDE,
    DEPTH = 16, /* rows in shared memory */
    COLUMNS = MOST_DIM / SIDE
};

struct expected_arguments {
    struct kv_view kv;
    const void *q; /* the first row that counts */
    int64_t q_stride;
    int lane, group, n_rows, first_position; /* of that row */
    int n_keys, sinks, future;
    const float *inverse_frequency;
    float scale, epsilon;
    float2 *turn;  /* [head_dim / 2] the mean rotation */
    float *mean;   /* [n_heads, head_dim] */
    float *sigma;  /* [n_heads, head_dim, head_dim] */
    float *logit;  /* [n_heads, n_keys] */
    float2 *whole; /* [n_heads] maximum of the logits, 1 / sum of their exponentials */
    float *score;
};

/* Grid: pairs. */
__global__ static void __launch_bounds__(TURN_THREADS) expected_turn_kernel(struct expected_arguments a)
{
    let_successor_start();
    wait_for_predecessor();
    const float frequency = a.inverse_frequency[blockIdx.x];
    float real = 0, imaginary = 0;
    for (int p = (int)threadIdx.x; p < a.future; p += TURN_THREADS) {
        float sine, cosine;
        sincosf((float)(a.n_keys + p) * frequency, &sine, &cosine);
        real += cosine, imaginary += sine;
    }
    real = block_sum(real);
    imaginary = block_sum(imaginary);
    if (threadIdx.x == 0) a.turn[blockIdx.x] = make_float2(real / (float)a.future, imaginary / (float)a.future);
}

/* Dimensions i and half + i of a row of a head, taken back to position 0 and on to the future. */
template <typename T> __device__ static float2 turned_pair(const struct expected_arguments &a, int head, int row, int i)
{
    const int half = a.kv.head_dim / 2;
    const T *q = (const T *)a.q + row * a.q_stride + (int64_t)head * a.kv.head_dim;
    const float x = to_float(q[i]), y = to_float(q[half + i]);
    if (!a.inverse_frequency) return make_float2(x, y);
    const float2 mean = a.turn[i];
    float sine, cosine;
    sincosf((float)(a.first_position + row) * a.inverse_frequency[i], &sine, &cosine);
    const float real = mean.x * cosine + mean.y * sine, imaginary = mean.y * cosine - mean.x * sine;
    return make_float2(x * real - y * imaginary, y * real + x * imaginary);
}

/* Grid: heads. Threads share the rows of each pair, and join in a fixed order. */
template <typename T>
__global__ static void __launch_bounds__(MEAN_THREADS) expected_mean_kernel(struct expected_arguments a)
{
    __shared__ float2 part[MEAN_THREADS];
    let_successor_start();
    wait_for_predecessor();
    const int half = a.kv.head_dim / 2, shares = MEAN_THREADS / half, head = (int)blockIdx.x;
    const int i = (int)threadIdx.x % half, share = (int)threadIdx.x / half;
    float2 sum = make_float2(0, 0);
    for (int row = share; row < a.n_rows && share < shares; row += shares) {
        const float2 x = turned_pair<T>(a, head, row, i);
        sum.x += x.x, sum.y += x.y;
    }
    part[threadIdx.x] = sum;
    __syncthreads();
    if (share > 0) return;
    for (int other = 1; other < shares; other++) {
        const float2 x = part[other * half + i];
        sum.x += x.x, sum.y += x.y;
    }
    float *mean = a.mean + (int64_t)head * a.kv.head_dim;
    mean[i] = sum.x / (float)a.n_rows;
    mean[half + i] = sum.y / (float)a.n_rows;
}

/* Rows [first, first + DEPTH) of TILE dimensions from `column` on, less their means; zeros outside. Whole block. */
template <typename T>
__device__ static void load_centred(float (*to)[TILE], const struct expected_arguments &a, int head, int first,
                                    int column)
{
    const int dim = a.kv.head_dim, half = dim / 2;
    for (int at = (int)threadIdx.x; at < DEPTH * TILE; at += THREADS) {
        const int row = at / TILE, d = column + at % TILE;
        float x = 0;
        if (first + row < a.n_rows && d < dim) {
            const float2 pair = turned_pair<T>(a, head, first + row, d < half ? d : d - half);
            x = (d < half ? pair.x : pair.y) - a.mean[(int64_t)head * dim + d];
        }
        to[row][at % TILE] = x;
    }
}

/* Grid: heads x tiles of their covariances. A thread has every 16th dimension of either side of a tile. */
template <typename T>
__global__ static void __launch_bounds__(THREADS) expected_covariance_kernel(struct expected_arguments a)
{
    __shared__ float left[DEPTH][TILE], right[DEPTH][TILE];
    let_successor_start();
    wait_for_predecessor();
    const int dim = a.kv.head_dim, tiles = (dim + TILE - 1) / TILE, head = (int)blockIdx.x;
    const int top = (int)blockIdx.y / tiles * TILE, side = (int)blockIdx.y % tiles * TILE;
    const int x = (int)threadIdx.x % SIDE, y = (int)threadIdx.x / SIDE;
    float sum[EACH][EACH] = {};
    for (int first = 0; first < a.n_rows; first += DEPTH) {
        __syncthreads();
        load_centred<T>(left, a, head, first, top);
        load_centred<T>(right, a, head, first, side);
        __syncthreads();
#pragma unroll
        for (int row = 0; row < DEPTH; row++)
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int j = 0; j < EACH; j++) sum[i][j] += left[row][y + i * SIDE] * right[row][x + j * SIDE];
    }
    float *sigma = a.sigma + (int64_t)head * dim * dim;
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const int row = top + y + i * SIDE, column = side + x + j * SIDE;
            if (row < dim && column < dim) sigma[row * dim + column] = sum[i][j] / (float)a.n_rows;
        }
}

/* TILE keys of a lane as float32, zeros beyond the last. Whole block. */
template <typename T>
__device__ static void load_keys(float (*k)[MOST_DIM + 1], const struct expected_arguments &a, int lane, int first)
{
    const int pieces = a.kv.head_dim / 8;
    for (int at = (int)threadIdx.x; at < TILE * pieces; at += THREADS) {
        const int key = at / pieces, d = at % pieces * 8;
        float x[8] = {};
        if (first + key < a.n_keys) {
            const T *from = (const T *)a.kv.pool.data + cache_key(a.kv, lane, first + key) + d;
            unpack8<T>(__ldcg((const uint4 *)from), x);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) k[key][d + i] = x[i];
    }
}

/* product[i][j]: key y * EACH + i times column x + j * SIDE of the head's covariance; columns past the last are of no
 * use. Whole block. */
__device__ static void multiply_keys(float (*product)[COLUMNS], const float (*k)[MOST_DIM + 1], float (*part)[MOST_DIM],
                                     const float *sigma, int dim)
{
    const int x = (int)threadIdx.x % SIDE, y = (int)threadIdx.x / SIDE;
    for (int first = 0; first < dim; first += DEPTH) {
        const int depth = min(DEPTH, dim - first);
        __syncthreads();
        for (int at = (int)threadIdx.x; at < depth * dim; at += THREADS)
            part[at / dim][at % dim] = sigma[(int64_t)first * dim + at];
        __syncthreads();
        for (int row = 0; row < depth; row++)
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int j = 0; j < COLUMNS; j++)
                    product[i][j] += k[y * EACH + i][first + row] * part[row][x + j * SIDE];
    }
}

/* Grid: tiles of keys x heads. */
template <typename T>
__global__ static void __launch_bounds__(THREADS) expected_logits_kernel(struct expected_arguments a)
{
    __shared__ float k[TILE][MOST_DIM + 1], part[DEPTH][MOST_DIM];
    let_successor_start();
    wait_for_predecessor();
    const int dim = a.kv.head_dim, first = (int)blockIdx.x * TILE, head = (int)blockIdx.y;
    const int x = (int)threadIdx.x % SIDE, y = (int)threadIdx.x / SIDE;
    float product[EACH][COLUMNS] = {};
    load_keys<T>(k, a, a.lane + head / a.group, first);
    multiply_keys(product, k, part, a.sigma + (int64_t)head * dim * dim, dim);
    const float *mean = a.mean + (int64_t)head * dim;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int key = y * EACH + i;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            const int d = x + j * SIDE;
            if (d < dim) sum += k[key][d] * (mean[d] + a.scale / 2 * product[i][j]);
        }
#pragma unroll
        for (int step = SIDE / 2; step > 0; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
        if (x == 0 && first + key < a.n_keys) a.logit[(int64_t)head * a.n_keys + first + key] = a.scale * sum;
    }
}

/* Grid: heads. */
__global__ static void __launch_bounds__(MEAN_THREADS) expected_whole_kernel(struct expected_arguments a)
{
    __shared__ float part[MEAN_THREADS / 32];
    let_successor_start();
    wait_for_predecessor();
    const float *logit = a.logit + (int64_t)blockIdx.x * a.n_keys;
    float top = -INFINITY, sum = 0;
    for (int i = a.sinks + (int)threadIdx.x; i < a.n_keys; i += MEAN_THREADS) top = fmaxf(top, logit[i]);
    top = warp_max(top);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = top;
    __syncthreads();
    for (int w = 0; w < MEAN_THREADS / 32; w++) top = fmaxf(top, part[w]);
    for (int i = a.sinks + (int)threadIdx.x; i < a.n_keys; i += MEAN_THREADS) sum += expf(logit[i] - top);
    sum = block_sum(sum);
    if (threadIdx.x == 0) a.whole[blockIdx.x] = make_float2(top, 1 / sum);
}

/* Grid: keys x KV heads; a thread a key. */
template <typename T>
__global__ static void __launch_bounds__(THREADS) expected_score_kernel(struct expected_arguments a)
{
    let_successor_start();
    wait_for_predecessor();
    const int i = (int)(blockIdx.x * THREADS + threadIdx.x), kv_head = (int)blockIdx.y;
    if (i >= a.n_keys) return;
    const T *v = (const T *)a.kv.pool.data + cache_key(a.kv, a.lane + kv_head, i) + a.kv.page_size * a.kv.head_dim;
    float attention = 0, square = 0;
    for (int h = kv_head * a.group; h < (kv_head + 1) * a.group; h++)
        attention += expf(a.logit[(int64_t)h * a.n_keys + i] - a.whole[h].x) * a.whole[h].y;
    for (int d = 0; d < a.kv.head_dim; d += 8) {
        float x[8];
        unpack8<T>(__ldcg((const uint4 *)(v + d)), x);
#pragma unroll
        for (int j = 0; j < 8; j++) square += x[j] * x[j];
    }
    const float score = (attention / (float)a.group + a.epsilon) * sqrtf(square);
    a.score[(int64_t)kv_head * a.n_keys + i] = i < a.sinks ? INFINITY : score;
}

/* ---- scratch and launches ---- */

static int place_expected(int n_heads, int head_dim, int n_keys, struct arena *arena, struct expected_arguments *a)
{
    static const char label[] = "op scratch";
    const size_t heads = (size_t)n_heads, dim = (size_t)head_dim;
    TRY(arena_take(arena, dim * sizeof *a->turn, label, &a->turn));
    TRY(arena_take(arena, heads * dim * sizeof *a->mean, label, &a->mean));
    TRY(arena_take(arena, heads * dim * dim * sizeof *a->sigma, label, &a->sigma));
    TRY(arena_take(arena, heads * (size_t)n_keys * sizeof *a->logit, label, &a->logit));
    return arena_take(arena, heads * sizeof *a->whole, label, &a->whole);
}

int cuda__expected_measure(const struct cuda *c, const struct ops_limits *limits, struct arena *arena)
{
    struct expected_arguments a;
    (void)c;
    return place_expected(limits->max_heads, limits->head_dim, limits->max_context, arena, &a);
}

template <typename T> static int launch_expected(struct ops *o, const struct expected_arguments &a, unsigned n_heads)
{
    const unsigned dim = (unsigned)a.kv.head_dim, tiles = (dim + TILE - 1) / TILE, n_keys = (unsigned)a.n_keys;
    static const char name[] = "expected_attention";
    if (a.inverse_frequency) TRY(cuda__launch(o, name, expected_turn_kernel, dim3(dim / 2), dim3(TURN_THREADS), 0, a));
    TRY(cuda__launch(o, name, expected_mean_kernel<T>, dim3(n_heads), dim3(MEAN_THREADS), 0, a));
    TRY(cuda__launch(o, name, expected_covariance_kernel<T>, dim3(n_heads, tiles * tiles), dim3(THREADS), 0, a));
    TRY(cuda__launch(o, name, expected_logits_kernel<T>, dim3((n_keys + TILE - 1) / TILE, n_heads), dim3(THREADS), 0,
                     a));
    TRY(cuda__launch(o, name, expected_whole_kernel, dim3(n_heads), dim3(MEAN_THREADS), 0, a));
    return cuda__launch(o, name, expected_score_kernel<T>,
                        dim3((n_keys + THREADS - 1) / THREADS, n_heads / (unsigned)a.group), dim3(THREADS), 0, a);
}

int cuda__expected_attention(struct ops *o, struct tensor q, const struct kv_view *kv,
                             const struct attention_heads *heads, const struct expected_attention *expected)
{
    struct expected_arguments a = {};
    struct arena arena;
    const int first =
        expected->sinks > expected->first_position ? expected->sinks - expected->first_position : 0; /* that counts */
    if (kv->head_dim % 8 || kv->head_dim > MOST_DIM)
        FAIL(ERR_UNSUPPORTED, "cuda: expected attention over heads of %d dimensions; served are steps of 8 up to %d",
             kv->head_dim, MOST_DIM);
    a.kv = *kv;
    a.q = (const char *)q.data + first * q.stride[0] * 2, a.q_stride = q.stride[0];
    a.lane = expected->slot * kv->lanes_per_slot + heads->lane;
    a.group = heads->n_heads / heads->n_kv_heads;
    a.n_rows = expected->n_rows - first, a.first_position = expected->first_position + first;
    a.n_keys = expected->first_position + expected->n_rows;
    a.sinks = expected->sinks, a.future = expected->future;
    a.inverse_frequency = expected->inverse_frequency;
    a.scale = heads->scale, a.epsilon = expected->epsilon;
    a.score = expected->score;
    TRY(cuda__scratch(o, &arena));
    TRY(place_expected(heads->n_heads, kv->head_dim, a.n_keys, &arena, &a));
    WITH_TYPE(q.dtype, T, return launch_expected<T>(o, a, (unsigned)heads->n_heads));
}
