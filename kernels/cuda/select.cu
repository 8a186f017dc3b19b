/* The best k of a row, in ascending order of place: the k-th best key by radix selection, then one ordered pass. */
#include "kernels/cuda/select.cuh"

enum { MOST_ROWS = 256 /* of a launch: their numbers travel as an argument */ };

struct select_rows {
    int32_t k[MOST_ROWS], window[MOST_ROWS];
};

/* Adds 1 to count[digit] for each thread that takes part; threads of a warp with one digit, as the leading ones have,
 * add together. */
__device__ static void count_digit(int *count, int digit, bool takes_part)
{
    const unsigned part = __ballot_sync(~0u, takes_part);
    if (!takes_part) return;
    const unsigned same = __match_any_sync(part, digit);
    if (__ffs((int)same) - 1 == (int)threadIdx.x % 32) atomicAdd(&count[digit], __popc(same));
}

/* The cut after the best k of n scores; whole block. */
__device__ static struct cut cut_after(const float *score, int n, int k, int *count)
{
    __shared__ struct cut cut;
    if (threadIdx.x == 0) cut.key = 0, cut.n_equal = k, cut.above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = (int)threadIdx.x; i < SELECT_DIGITS; i += (int)blockDim.x) count[i] = 0;
        __syncthreads();
        const uint32_t prefix = cut.key;
        for (int first = 0; first < n; first += (int)blockDim.x) {
            const int i = first + (int)threadIdx.x;
            const uint32_t key = i < n ? select_key(score[i]) : 0;
            count_digit(count, (int)(key >> shift & 255), i < n && (uint64_t)(key ^ prefix) >> (shift + 8) == 0);
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
    select_top_kernel(int32_t *index, int index_stride, const float *score, int64_t stride, int n,
                      struct select_rows rows)
{
    __shared__ int count[SELECT_DIGITS];
    const int window = rows.window[blockIdx.x], others = n - window, wanted = rows.k[blockIdx.x] - window;
    let_successor_start();
    wait_for_predecessor();
    score += blockIdx.x * stride;
    index += (int64_t)blockIdx.x * index_stride;
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

int cuda__select_top(struct ops *o, int32_t *index, int index_stride, struct tensor score, const int *k,
                     const int *window)
{
    for (int64_t first = 0; first < score.dim[0]; first += MOST_ROWS) {
        struct select_rows rows;
        const int n = (int)(score.dim[0] - first < MOST_ROWS ? score.dim[0] - first : MOST_ROWS);
        for (int i = 0; i < n; i++) rows.k[i] = k[first + i], rows.window[i] = window[first + i];
        TRY(cuda__launch(o, "select_top", select_top_kernel, dim3((unsigned)n), dim3(SELECT_THREADS), 0,
                         index + first * index_stride, index_stride,
                         (const float *)score.data + first * score.stride[0], score.stride[0], (int)score.dim[1],
                         rows));
    }
    return OK;
}
