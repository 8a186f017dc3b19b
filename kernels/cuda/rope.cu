/* Rotary position embedding, rotate-half form: dimension i turns with dimension i + head_dim / 2. */
#include "kernels/cuda/device.cuh"

/* A warp a head of a row; angles in float32, as transformers. */
template <typename T>
__global__ static void rope_kernel(T *x, int64_t stride, int n_heads, int half, const int32_t *position,
                                   const float *inverse_frequency, float scale)
{
    let_successor_start();
    wait_for_predecessor();
    const float place = (float)position[blockIdx.x];
    x += blockIdx.x * stride;
    for (int i = (int)threadIdx.x; i < half; i += 32) {
        float sine, cosine;
        sincosf(place * inverse_frequency[i], &sine, &cosine);
        sine *= scale, cosine *= scale;
        for (int h = (int)threadIdx.y; h < n_heads; h += (int)blockDim.y) {
            T *head = x + (int64_t)h * 2 * half;
            float a = to_float(head[i]), b = to_float(head[i + half]);
            head[i] = from_float<T>(a * cosine - b * sine);
            head[i + half] = from_float<T>(b * cosine + a * sine);
        }
    }
}

int cuda__rope(struct ops *o, struct tensor x, const int32_t *position, const float *inverse_frequency, float scale)
{
    const unsigned warps = x.dim[1] < 16 ? (unsigned)x.dim[1] : 16;
    WITH_TYPE(x.dtype, T,
              return cuda__launch(o, "rope", rope_kernel<T>, dim3((unsigned)x.dim[0]), dim3(32, warps), 0, (T *)x.data,
                                  x.stride[0], (int)x.dim[1], (int)(x.dim[2] / 2), position, inverse_frequency, scale));
}
