/* The best k of a row, in ascending order of place: the k-th best key by radix selection, then one ordered pass. */
#include "kernels/cuda/select.cuh"

enum { MOST_ROWS = 256 /* of a launch: their numbers travel as an argument */ };

struct select_rows {
    int32_t k[MOST_ROWS], window[MOST_ROWS];
};

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
