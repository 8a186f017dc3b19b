/* y = x w^T for few rows of x: bound by reading the weights once. A block of eight warps takes 16 rows of w and shares
 * out their columns; a warp reads 128 columns at a time straight into the registers of a matrix product, of which the
 * rows of x are the other side. Which columns meet in which step is free as long as both sides agree, so every thread
 * loads 16 consecutive bytes. The first weights are on their way before the predecessor of the kernel has ended.
 * Sums are added in a fixed order that does not depend on the number of rows. */
#include "kernels/cuda/device.cuh"

enum {
    GEMV_WARPS = 8,
    GEMV_ROWS = 16,            /* of w, a block */
    GEMV_MOST = CUDA_FEW_ROWS, /* rows of x: the columns of one product */
    GEMV_CHUNKS = 4,           /* of 32 columns, at once */
    GEMV_COLUMNS = 32 * GEMV_CHUNKS
};

struct gemv_arguments {
    const void *w, *x;
    void *y;
    const float *bias;
    int64_t w_stride, x_stride, y_stride;
    int n_out, n_in, n_rows;
};

/* Columns [k, k + 128) of the block's rows r and r + 8. */
template <typename T>
__device__ static void load_weights(uint4 *low, uint4 *high, const struct gemv_arguments &a, const T *w_low,
                                    const T *w_high, int k)
{
    const int t = (int)threadIdx.x % 4;
    const uint4 none = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int c = 0; c < GEMV_CHUNKS; c++) {
        const int at = k + c * 32 + t * 8;
        low[c] = w_low && at < a.n_in ? __ldcs((const uint4 *)(w_low + at)) : none;
        high[c] = w_high && at < a.n_in ? __ldcs((const uint4 *)(w_high + at)) : none;
    }
}

template <typename T>
__device__ static void multiply_add(float *sum, const uint4 *low, const uint4 *high, const struct gemv_arguments &a,
                                    const T *x, int k)
{
    const int t = (int)threadIdx.x % 4;
    uint4 columns[GEMV_CHUNKS];
#pragma unroll
    for (int c = 0; c < GEMV_CHUNKS; c++) {
        const int at = k + c * 32 + t * 8;
        columns[c] = x && at < a.n_in ? *(const uint4 *)(x + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int c = 0; c < GEMV_CHUNKS; c++) {
        mma_16816<T>(sum, low[c].x, high[c].x, low[c].y, high[c].y, columns[c].x, columns[c].y);
        mma_16816<T>(sum, low[c].z, high[c].z, low[c].w, high[c].w, columns[c].z, columns[c].w);
    }
}

__device__ static float total_of(const float (*part)[GEMV_ROWS * GEMV_MOST], int i)
{
    float total = 0;
#pragma unroll
    for (int w = 0; w < GEMV_WARPS; w++) total += part[w][i];
    return total;
}

/* silu(gate) * up of the block's 8 pairs; both rounded first, as when they are stored between the two ops. */
template <typename T>
__device__ static void write_gated(const struct gemv_arguments &a, const float (*part)[GEMV_ROWS * GEMV_MOST])
{
    const int m = (int)threadIdx.x / 8, i = (int)threadIdx.x % 8, n = (int)blockIdx.x * 8 + i;
    if (m >= a.n_rows || n >= a.n_out) return;
    float gate = total_of(part, m * GEMV_ROWS + i), up = total_of(part, m * GEMV_ROWS + i + 8);
    if (a.bias) gate += a.bias[n], up += a.bias[a.n_out + n];
    gate = to_float(from_float<T>(gate));
    up = to_float(from_float<T>(up));
    ((T *)a.y)[m * a.y_stride + n] = from_float<T>(gate / (1 + __expf(-gate)) * up);
}

/* With `gated` a block takes 8 rows of the gate and the same 8 of the upper half, and writes silu(gate) * up: n_out is
 * the number of gates. */
template <typename T, typename Out, bool gated>
__global__ static void __launch_bounds__(GEMV_WARPS * 32, 3) gemv_kernel(struct gemv_arguments a)
{
    __shared__ float part[GEMV_WARPS][GEMV_ROWS * GEMV_MOST];
    const int warp = (int)threadIdx.x / 32, thread = (int)threadIdx.x % 32, r = thread / 4, t = thread % 4;
    const int row = (int)blockIdx.x * (gated ? GEMV_ROWS / 2 : GEMV_ROWS) + r, high_row = row + (gated ? a.n_out : 8);
    const T *w_low = row < a.n_out ? (const T *)a.w + row * a.w_stride : NULL;
    const T *w_high = high_row < (gated ? 2 : 1) * a.n_out && w_low ? (const T *)a.w + high_row * a.w_stride : NULL;
    const T *x = r < a.n_rows ? (const T *)a.x + r * a.x_stride : NULL;
    const int step = GEMV_WARPS * GEMV_COLUMNS;
    int k = warp * GEMV_COLUMNS;
    float sum[4] = {0, 0, 0, 0};
    uint4 low[GEMV_CHUNKS], high[GEMV_CHUNKS];
    load_weights<T>(low, high, a, w_low, w_high, k);
    let_successor_start();
    wait_for_predecessor();
    while (k < a.n_in) {
        uint4 next_low[GEMV_CHUNKS], next_high[GEMV_CHUNKS];
        load_weights<T>(next_low, next_high, a, w_low, w_high, k + step);
        multiply_add<T>(sum, low, high, a, x, k);
#pragma unroll
        for (int c = 0; c < GEMV_CHUNKS; c++) low[c] = next_low[c], high[c] = next_high[c];
        k += step;
    }
    /* sum: rows r and r + 8 of w, rows 2t and 2t + 1 of x. */
    part[warp][(2 * t) * GEMV_ROWS + r] = sum[0];
    part[warp][(2 * t + 1) * GEMV_ROWS + r] = sum[1];
    part[warp][(2 * t) * GEMV_ROWS + r + 8] = sum[2];
    part[warp][(2 * t + 1) * GEMV_ROWS + r + 8] = sum[3];
    __syncthreads();
    if (gated) {
        write_gated<T>(a, part);
        return;
    }
    const int m = (int)threadIdx.x / GEMV_ROWS, n = (int)blockIdx.x * GEMV_ROWS + (int)threadIdx.x % GEMV_ROWS;
    if (m >= a.n_rows || n >= a.n_out) return;
    const float total = total_of(part, (int)threadIdx.x);
    ((Out *)a.y)[m * a.y_stride + n] = from_float<Out>(a.bias ? total + a.bias[n] : total);
}

bool cuda__gemv_fits(const struct cuda *c, struct tensor y, struct tensor x, struct tensor w)
{
    (void)c, (void)y;
    return x.dim[0] <= GEMV_MOST && w.dim[1] % 8 == 0 && w.stride[0] % 8 == 0 && x.stride[0] % 8 == 0 &&
           ((uint64_t)w.data | (uint64_t)x.data) % 16 == 0;
}

static struct gemv_arguments arguments_of(struct tensor y, struct tensor x, struct tensor w, const float *bias)
{
    struct gemv_arguments a = {};
    a.w = w.data, a.w_stride = w.stride[0];
    a.x = x.data, a.x_stride = x.stride[0];
    a.y = y.data, a.y_stride = y.stride[0];
    a.bias = bias;
    a.n_out = (int)y.dim[1], a.n_in = (int)w.dim[1], a.n_rows = (int)x.dim[0];
    return a;
}

int cuda__gemv(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias)
{
    const struct gemv_arguments a = arguments_of(y, x, w, bias);
    const dim3 grid((unsigned)(a.n_out + GEMV_ROWS - 1) / GEMV_ROWS), block(GEMV_WARPS * 32);
    if (y.dtype == DTYPE_F32)
        WITH_TYPE(w.dtype, T, return cuda__launch(o, "gemv", gemv_kernel<T, float, false>, grid, block, 0, a));
    WITH_TYPE(w.dtype, T, return cuda__launch(o, "gemv", gemv_kernel<T, T, false>, grid, block, 0, a));
}

int cuda__gemv_swiglu(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias)
{
    const struct gemv_arguments a = arguments_of(y, x, w, bias); /* of w's rows y has half */
    const dim3 grid((unsigned)(a.n_out + 7) / 8), block(GEMV_WARPS * 32);
    WITH_TYPE(w.dtype, T, return cuda__launch(o, "gemv_swiglu", gemv_kernel<T, T, true>, grid, block, 0, a));
}

/* ---- any shape at all: a thread an element ---- */

template <typename T, typename Out> __global__ static void plain_kernel(struct gemv_arguments a)
{
    let_successor_start();
    wait_for_predecessor();
    const int n = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (n >= a.n_out) return;
    const T *w = (const T *)a.w + n * a.w_stride;
    for (int m = (int)blockIdx.y; m < a.n_rows; m += (int)gridDim.y) {
        const T *x = (const T *)a.x + m * a.x_stride;
        float sum = 0;
        for (int i = 0; i < a.n_in; i++) sum += to_float(w[i]) * to_float(x[i]);
        ((Out *)a.y)[m * a.y_stride + n] = from_float<Out>(a.bias ? sum + a.bias[n] : sum);
    }
}

int cuda__linear_plain(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias)
{
    const struct gemv_arguments a = arguments_of(y, x, w, bias);
    const dim3 grid((unsigned)(a.n_out + 127) / 128, (unsigned)(a.n_rows < 4096 ? a.n_rows : 4096)), block(128);
    if (y.dtype == DTYPE_F32)
        WITH_TYPE(w.dtype, T, return cuda__launch(o, "linear", plain_kernel<T, float>, grid, block, 0, a));
    WITH_TYPE(w.dtype, T, return cuda__launch(o, "linear", plain_kernel<T, T>, grid, block, 0, a));
}
