/* The best k of a row, in ascending order of place: the k-th best key by radix selection, then one ordered pass. And
 * what a list leaves of the numbers below n. */
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

/* Grid: shares of the numbers x lists. A number that is not kept goes as far left as kept ones stand before it. */
__global__ static void __launch_bounds__(SELECT_THREADS)
    list_others_kernel(int32_t *other, int other_stride, const int32_t *keep, int keep_stride, struct select_rows rows,
                       int n)
{
    let_successor_start();
    wait_for_predecessor();
    const int n_keep = rows.k[blockIdx.y];
    keep += (int64_t)blockIdx.y * keep_stride;
    other += (int64_t)blockIdx.y * other_stride;
    for (int j = (int)(blockIdx.x * blockDim.x + threadIdx.x); j < n; j += (int)(gridDim.x * blockDim.x)) {
        int low = 0, high = n_keep; /* the kept ones below j */
        while (low < high) {
            const int middle = (low + high) / 2;
            if (keep[middle] < j)
                low = middle + 1;
            else
                high = middle;
        }
        if (low == n_keep || keep[low] != j) other[j - low] = j;
    }
}

int cuda__list_others(struct ops *o, int32_t *other, int other_stride, const int32_t *keep, int keep_stride,
                      const int32_t *n_keep, int n, int n_lanes)
{
    const unsigned shares = (unsigned)(n + SELECT_THREADS - 1) / SELECT_THREADS;
    for (int first = 0; first < n_lanes; first += MOST_ROWS) {
        struct select_rows rows = {};
        const int lists = n_lanes - first < MOST_ROWS ? n_lanes - first : MOST_ROWS;
        for (int i = 0; i < lists; i++) rows.k[i] = n_keep[first + i];
        TRY(cuda__launch(o, "list_others", list_others_kernel, dim3(shares < 16 ? shares : 16, (unsigned)lists),
                         dim3(SELECT_THREADS), 0, other + (int64_t)first * other_stride, other_stride,
                         keep + (int64_t)first * keep_stride, keep_stride, rows, n));
    }
    return OK;
}
