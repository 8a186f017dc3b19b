/* Sums, activations and biases, element by element. */
#include "kernels/cuda/device.cuh"

enum { ELEMENT_THREADS = 256 };

template <typename T>
__global__ static void add_kernel(T *y, int64_t y_stride, const T *x, int64_t x_stride, int64_t x_rows, int n)
{
    let_successor_start();
    wait_for_predecessor();
    y += blockIdx.x * y_stride;
    x += (blockIdx.x % x_rows) * x_stride;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) y[i] = from_float<T>(to_float(y[i]) + to_float(x[i]));
}

int cuda__add(struct ops *o, struct tensor y, struct tensor x)
{
    WITH_TYPE(y.dtype, T,
              return cuda__launch(o, "add", add_kernel<T>, dim3((unsigned)y.dim[0]), dim3(ELEMENT_THREADS), 0,
                                  (T *)y.data, y.stride[0], (const T *)x.data, x.stride[0], x.dim[0], (int)y.dim[1]));
}

__device__ static float silu(float x) { return x / (1 + __expf(-x)); }

/* y[n, f] = silu(gate) * up: 8 columns a thread where rows allow it. */
template <typename T>
__global__ static void __launch_bounds__(ELEMENT_THREADS)
    swiglu_kernel(T *y, int64_t y_stride, const T *gate_up, int64_t x_stride, int n, bool pieces)
{
    let_successor_start();
    wait_for_predecessor();
    y += blockIdx.y * y_stride;
    const T *gate = gate_up + blockIdx.y * x_stride, *up = gate + n;
    const int step = (int)(gridDim.x * blockDim.x);
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (!pieces) {
        for (; i < n; i += step) y[i] = from_float<T>(silu(to_float(gate[i])) * to_float(up[i]));
        return;
    }
    for (; i < n / 8; i += step) {
        float a[8], b[8];
        unpack8<T>(((const uint4 *)gate)[i], a);
        unpack8<T>(((const uint4 *)up)[i], b);
        for (int j = 0; j < 8; j++) a[j] = silu(a[j]) * b[j];
        ((uint4 *)y)[i] = pack8<T>(a);
    }
}

int cuda__swiglu(struct ops *o, struct tensor y, struct tensor gate_up)
{
    const int n = (int)y.dim[1];
    const bool pieces = n % 8 == 0 && ((uint64_t)y.data | (uint64_t)gate_up.data) % 16 == 0 && y.stride[0] % 8 == 0 &&
                        gate_up.stride[0] % 8 == 0;
    const int work = pieces ? n / 8 : n;
    const dim3 grid((unsigned)(work + ELEMENT_THREADS - 1) / ELEMENT_THREADS, (unsigned)y.dim[0]);
    if (y.dim[0] > 65535) FAIL(ERR_UNSUPPORTED, "ops_swiglu: %lld rows, at most 65535", (long long)y.dim[0]);
    WITH_TYPE(y.dtype, T,
              return cuda__launch(o, "swiglu", swiglu_kernel<T>, grid, dim3(ELEMENT_THREADS), 0, (T *)y.data,
                                  y.stride[0], (const T *)gate_up.data, gate_up.stride[0], n, pieces));
}

__device__ static float activated(float x, int kind)
{
    if (kind == ACTIVATION_SILU) return silu(x);
    if (kind == ACTIVATION_QUICK_GELU) return x / (1 + __expf(-1.702f * x));
    if (kind == ACTIVATION_GELU_TANH)
        return x /
               (1 + __expf(-1.5957691216057308f * (x + 0.044715f * x * x * x))); /* 1 + tanh, without the difference */
    return 0.5f * x * (1 + erff(x * 0.70710678118654752f));
}

template <typename T> __global__ static void activate_kernel(T *x, int64_t stride, int n, int kind)
{
    let_successor_start();
    wait_for_predecessor();
    x += blockIdx.x * stride;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) x[i] = from_float<T>(activated(to_float(x[i]), kind));
}

int cuda__activate(struct ops *o, struct tensor x, enum activation kind)
{
    WITH_TYPE(x.dtype, T,
              return cuda__launch(o, "activate", activate_kernel<T>, dim3((unsigned)x.dim[0]), dim3(ELEMENT_THREADS), 0,
                                  (T *)x.data, x.stride[0], (int)x.dim[1], (int)kind));
}

/* A bias that no matrix product added: y += bias, y of either float. */
template <typename T> __global__ static void add_bias_kernel(T *y, int64_t stride, const float *bias, int n)
{
    let_successor_start();
    wait_for_predecessor();
    y += blockIdx.x * stride;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) y[i] = from_float<T>(to_float(y[i]) + bias[i]);
}

int cuda__add_bias(struct ops *o, struct tensor y, const float *bias)
{
    const dim3 grid((unsigned)y.dim[0]), block(ELEMENT_THREADS);
    if (y.dtype == DTYPE_F32)
        return cuda__launch(o, "add_bias", add_bias_kernel<float>, grid, block, 0, (float *)y.data, y.stride[0], bias,
                            (int)y.dim[1]);
    WITH_TYPE(y.dtype, T,
              return cuda__launch(o, "add_bias", add_bias_kernel<T>, grid, block, 0, (T *)y.data, y.stride[0], bias,
                                  (int)y.dim[1]));
}
