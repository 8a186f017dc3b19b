/* Norms and the residual sum: a block a row. Rows of whole 16-byte pieces stay in registers between the two passes;
 * others are read twice. */
#include "kernels/cuda/device.cuh"

enum { NORM_THREADS = 256, NORM_PIECES = 8, NORM_LONGEST = NORM_THREADS * NORM_PIECES * 8 };

static bool in_pieces(struct tensor t)
{
    return (uint64_t)t.data % 16 == 0 && t.stride[0] % 8 == 0 && t.dim[1] % 8 == 0 && t.dim[1] <= NORM_LONGEST;
}

/* y = x / sqrt(mean(x^2) + eps) * w, and before it residual += x where there is one (x is then the sum). */
template <typename T>
__global__ static void __launch_bounds__(NORM_THREADS)
    rms_norm_pieces(T *y, int64_t y_stride, T *residual, int64_t residual_stride, const T *x, int64_t x_stride,
                    const float *w, int n, float eps)
{
    float value[NORM_PIECES][8], squares = 0;
    let_successor_start();
    wait_for_predecessor();
    x += blockIdx.x * x_stride;
    y += blockIdx.x * y_stride;
    if (residual) residual += blockIdx.x * residual_stride;
#pragma unroll
    for (int p = 0; p < NORM_PIECES; p++) {
        const int at = (p * NORM_THREADS + (int)threadIdx.x) * 8;
        if (at >= n) break;
        unpack8<T>(*(const uint4 *)(x + at), value[p]);
        if (residual) {
            float before[8];
            unpack8<T>(*(const uint4 *)(residual + at), before);
            for (int i = 0; i < 8; i++) value[p][i] += before[i];
            uint4 sum = pack8<T>(value[p]);
            *(uint4 *)(residual + at) = sum;
            unpack8<T>(sum, value[p]); /* the norm sees what was stored */
        }
        for (int i = 0; i < 8; i++) squares += value[p][i] * value[p][i];
    }
    const float scale = rsqrtf(block_sum(squares) / (float)n + eps);
#pragma unroll
    for (int p = 0; p < NORM_PIECES; p++) {
        const int at = (p * NORM_THREADS + (int)threadIdx.x) * 8;
        if (at >= n) break;
        const float4 w0 = *(const float4 *)(w + at), w1 = *(const float4 *)(w + at + 4);
        const float weight[8] = {w0.x, w0.y, w0.z, w0.w, w1.x, w1.y, w1.z, w1.w};
        for (int i = 0; i < 8; i++) value[p][i] *= scale * weight[i];
        *(uint4 *)(y + at) = pack8<T>(value[p]);
    }
}

template <typename T>
__global__ static void __launch_bounds__(NORM_THREADS)
    rms_norm_elements(T *y, int64_t y_stride, T *residual, int64_t residual_stride, const T *x, int64_t x_stride,
                      const float *w, int n, float eps)
{
    float squares = 0;
    let_successor_start();
    wait_for_predecessor();
    x += blockIdx.x * x_stride;
    y += blockIdx.x * y_stride;
    if (residual) residual += blockIdx.x * residual_stride;
    for (int i = (int)threadIdx.x; i < n; i += NORM_THREADS) {
        float value = to_float(x[i]);
        if (residual) {
            residual[i] = from_float<T>(to_float(residual[i]) + value);
            value = to_float(residual[i]);
        }
        squares += value * value;
    }
    const float scale = rsqrtf(block_sum(squares) / (float)n + eps);
    const T *from = residual ? residual : x;
    for (int i = (int)threadIdx.x; i < n; i += NORM_THREADS) y[i] = from_float<T>(to_float(from[i]) * scale * w[i]);
}

static int rms_norm(struct ops *o, struct tensor y, struct tensor residual, struct tensor x, const float *w, float eps)
{
    bool pieces = in_pieces(x) && in_pieces(y) && (!residual.data || in_pieces(residual)) && (uint64_t)w % 16 == 0;
    const dim3 grid((unsigned)x.dim[0]), block(NORM_THREADS);
    WITH_TYPE(x.dtype, T,
              return cuda__launch(o, "rms_norm", pieces ? rms_norm_pieces<T> : rms_norm_elements<T>, grid, block, 0,
                                  (T *)y.data, y.stride[0], (T *)residual.data, residual.stride[0], (const T *)x.data,
                                  x.stride[0], w, (int)x.dim[1], eps));
}

int cuda__rms_norm(struct ops *o, struct tensor y, struct tensor x, const float *w, float eps)
{
    struct tensor none = {};
    return rms_norm(o, y, none, x, w, eps);
}

int cuda__add_rms_norm(struct ops *o, struct tensor y, struct tensor residual, struct tensor x, const float *w,
                       float eps)
{
    return rms_norm(o, y, residual, x, w, eps);
}

template <typename T>
__global__ static void __launch_bounds__(NORM_THREADS)
    layer_norm_kernel(T *y, int64_t y_stride, const T *x, int64_t x_stride, const float *w, const float *b, int n,
                      float eps)
{
    float sum = 0, squares = 0;
    let_successor_start();
    wait_for_predecessor();
    x += blockIdx.x * x_stride;
    y += blockIdx.x * y_stride;
    for (int i = (int)threadIdx.x; i < n; i += NORM_THREADS) sum += to_float(x[i]);
    const float mean = block_sum(sum) / (float)n;
    for (int i = (int)threadIdx.x; i < n; i += NORM_THREADS) {
        float d = to_float(x[i]) - mean;
        squares += d * d;
    }
    const float scale = rsqrtf(block_sum(squares) / (float)n + eps);
    for (int i = (int)threadIdx.x; i < n; i += NORM_THREADS)
        y[i] = from_float<T>((to_float(x[i]) - mean) * scale * w[i] + b[i]);
}

int cuda__layer_norm(struct ops *o, struct tensor y, struct tensor x, const float *w, const float *b, float eps)
{
    WITH_TYPE(x.dtype, T,
              return cuda__launch(o, "layer_norm", layer_norm_kernel<T>, dim3((unsigned)x.dim[0]), dim3(NORM_THREADS),
                                  0, (T *)y.data, y.stride[0], (const T *)x.data, x.stride[0], w, b, (int)x.dim[1],
                                  eps));
}
