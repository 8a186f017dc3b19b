/* Letting rows leave: sums of scores in fixed point, which no order of addition changes, and the rows that stay, found
 * by radix selection of 64-bit scores, a block a sequence. */
#include "kernels/cuda/select.cuh"

enum { FIXED_THREADS = 128, MOST_CHOICES = 64 /* of a launch: they travel as an argument */ };

__global__ static void __launch_bounds__(FIXED_THREADS)
    sum_fixed_kernel(int64_t *sum, const float *x, int64_t stride, int rows, int64_t n, double factor)
{
    let_successor_start();
    wait_for_predecessor();
    const int64_t j = (int64_t)blockIdx.x * FIXED_THREADS + threadIdx.x;
    if (j >= n) return;
    int64_t total = 0;
    for (int r = 0; r < rows; r++) {
        const double most = 9007199254740992.0, value = __dmul_rn((double)x[r * stride + j], factor);
        /* Written so that a NaN adds 0. */
        if (value == value) total += __double2ll_rn(fmin(fmax(value, -most), most));
    }
    sum[j] = total;
}

int cuda__sum_fixed(struct ops *o, int64_t *sum, struct tensor x, double scale)
{
    return cuda__launch(o, "sum_fixed", sum_fixed_kernel,
                        dim3((unsigned)((x.dim[1] + FIXED_THREADS - 1) / FIXED_THREADS)), dim3(FIXED_THREADS), 0, sum,
                        (const float *)x.data, x.stride[0], (int)x.dim[0], x.dim[1], scale * 1099511627776.0);
}

struct row_choices {
    struct row_choice of[MOST_CHOICES];
    int64_t to[MOST_CHOICES]; /* where each one's numbers begin */
};

/* Rises with the score. */
__device__ static uint64_t score_key(int64_t score) { return (uint64_t)score ^ 1ull << 63; }

/* Adds 1 to count[digit] for each thread that takes part, those of a warp with one digit together; whole warps. */
__device__ static void count_key_digit(int *count, int digit, bool takes_part)
{
    const unsigned part = __ballot_sync(~0u, takes_part);
    if (!takes_part) return;
    const unsigned same = __match_any_sync(part, digit);
    if (__ffs((int)same) - 1 == (int)threadIdx.x % 32) atomicAdd(&count[digit], __popc(same));
}

/* The key of the k-th best of n scores, 1 <= k <= n; *n_equal of the scores with this key are among the best. Whole
 * block; all threads get the same. */
__device__ static uint64_t kth_key(const int64_t *score, int n, int k, int *n_equal)
{
    __shared__ int count[SELECT_DIGITS], left;
    __shared__ uint64_t bound;
    if (threadIdx.x == 0) bound = 0, left = k;
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (int i = (int)threadIdx.x; i < SELECT_DIGITS; i += (int)blockDim.x) count[i] = 0;
        __syncthreads();
        const uint64_t prefix = bound;
        for (int first = 0; first < n; first += (int)blockDim.x) {
            const int i = first + (int)threadIdx.x;
            const uint64_t key = i < n ? score_key(score[i]) : 0;
            const bool agrees = i < n && (shift == 56 || (key ^ prefix) >> (shift + 8) == 0);
            count_key_digit(count, (int)(key >> shift & 255), agrees);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int digit = 255;
            for (; count[digit] < left && digit > 0; digit--) left -= count[digit];
            bound = prefix | (uint64_t)digit << shift;
        }
        __syncthreads();
    }
    *n_equal = left;
    return bound;
}

/* Grid: choices. */
__global__ static void __launch_bounds__(SELECT_THREADS)
    select_rows_kernel(int32_t *index, const int64_t *score, struct row_choices choices)
{
    let_successor_start();
    wait_for_predecessor();
    const struct row_choice c = choices.of[blockIdx.x];
    int32_t *to = index + choices.to[blockIdx.x];
    const int step = (int)blockDim.x, rest = c.first + c.n_competing;
    for (int i = (int)threadIdx.x; i < c.first; i += step) to[i] = c.first_row + i;
    for (int i = (int)threadIdx.x; i < c.n_rows - rest; i += step) to[c.first + c.keep + i] = c.first_row + rest + i;
    to += c.first;
    if (c.keep == c.n_competing) {
        for (int i = (int)threadIdx.x; i < c.keep; i += step) to[i] = c.first_row + c.first + i;
        return;
    }
    if (c.keep == 0) return;
    score += c.first_score;
    int n_equal, equal = 0, taken = 0;
    const uint64_t bound = kth_key(score, c.n_competing, c.keep, &n_equal);
    for (int first = 0; first < c.n_competing; first += step) {
        const int i = first + (int)threadIdx.x;
        const uint64_t key = i < c.n_competing ? score_key(score[i]) : 0;
        int all_tied, all_taken;
        const bool tied = i < c.n_competing && key == bound;
        const int among_tied = block_rank(tied, &all_tied);
        const bool take = i < c.n_competing && (key > bound || (tied && equal + among_tied < n_equal));
        const int at = block_rank(take, &all_taken);
        if (take) to[taken + at] = c.first_row + c.first + i;
        equal += all_tied;
        taken += all_taken;
    }
}

int cuda__select_rows(struct ops *o, int32_t *index, const int64_t *score, const struct row_choice *choice,
                      int n_choices)
{
    int64_t to = 0;
    for (int first = 0; first < n_choices; first += MOST_CHOICES) {
        struct row_choices choices = {};
        const int n = n_choices - first < MOST_CHOICES ? n_choices - first : MOST_CHOICES;
        for (int i = 0; i < n; i++) {
            const struct row_choice *c = &choice[first + i];
            choices.of[i] = *c;
            choices.to[i] = to;
            to += c->n_rows - c->n_competing + c->keep;
        }
        TRY(cuda__launch(o, "select_rows", select_rows_kernel, dim3((unsigned)n), dim3(SELECT_THREADS), 0, index, score,
                         choices));
    }
    return OK;
}
