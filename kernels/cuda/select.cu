/* The best k of a row, in ascending order of place: the k-th best key by radix selection, then one ordered pass. */
#include "kernels/cuda/select.cuh"

/* The cut after the best k of n scores; whole block. */
__device__ static struct cut cut_after(const float *score, int n, int k, int *count)
{
    __shared__ struct cut cut;
    if (threadIdx.x == 0) cut.key = 0, cut.n_equal = k, cut.above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = (int)threadIdx.x; i < SELECT_DIGITS; i += (int)blockDim.x) count[i] = 0;
        __syncthreads();
        const uint32_t prefix = cut.key;
        for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
            const uint32_t key = select_key(score[i]);
            if ((uint64_t)(key ^ prefix) >> (shift + 8) == 0) atomicAdd(&count[key >> shift & 255], 1);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int digit = 255;
            for (; count[digit] < cut.n_equal && digit > 0; digit--) cut.n_equal -= count[digit];
            cut.key |= (uint32_t)digit << shift;
        }
        __syncthreads();
    }
    return cut;
}

__global__ static void __launch_bounds__(SELECT_THREADS)
    select_top_kernel(int32_t *index, const float *score, int64_t stride, int n, int k, int window)
{
    __shared__ int count[SELECT_DIGITS];
    const int others = n - window, wanted = k - window;
    wait_for_predecessor();
    let_successor_start();
    score += blockIdx.x * stride;
    index += (int64_t)blockIdx.x * k;
    if (wanted > 0) {
        const struct cut cut = cut_after(score, others, wanted, count);
        int64_t equal = 0;
        int taken = 0;
        for (int first = 0; first < others; first += (int)blockDim.x) {
            const int i = first + (int)threadIdx.x;
            const uint32_t key = i < others ? select_key(score[i]) : 0;
            int n_equal, n_taken;
            const bool tied = i < others && key == cut.key;
            const int among_tied = block_rank(tied, &n_equal);
            const bool take = i < others && (key > cut.key || (tied && equal + among_tied < cut.n_equal));
            const int at = block_rank(take, &n_taken);
            if (take) index[taken + at] = i;
            equal += n_equal;
            taken += n_taken;
        }
    }
    for (int i = (int)threadIdx.x; i < window; i += (int)blockDim.x) index[wanted + i] = others + i;
}

int cuda__select_top(struct ops *o, int32_t *index, struct tensor score, int k, int window)
{
    return cuda__launch(o, "select_top", select_top_kernel, dim3((unsigned)score.dim[0]), dim3(SELECT_THREADS), 0,
                        index, (const float *)score.data, score.stride[0], (int)score.dim[1], k, window);
}
