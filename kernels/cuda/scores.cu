/* Scores of prompt tokens: averages over neighbours, and how heads share a layer's budget by them.
 *
 * A block a group: each row's own best are cut off by radix selection, then the digits of all other keys of the group
 * are counted together. Only how many entries of a row are in is wanted, so equal keys need no order within a row. */
#include "kernels/cuda/select.cuh"

enum { POOL_THREADS = 256, MOST_GROUPS = 128 /* of a launch: they travel as an argument */, MOST_GROUP_ROWS = 3072 };

__global__ static void __launch_bounds__(POOL_THREADS)
    average_pool_kernel(float *y, int64_t y_stride, const float *x, int64_t x_stride, int64_t rows, int n, int width)
{
    const int j = (int)(blockIdx.x * blockDim.x + threadIdx.x), half = width / 2;
    let_successor_start();
    wait_for_predecessor();
    if (j >= n) return;
    const int first = j > half ? j - half : 0, last = n - 1 - j > half ? j + half : n - 1;
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
        float sum = 0;
        for (int i = first; i <= last; i++) sum += x[row * x_stride + i];
        y[row * y_stride + j] = sum / (float)width;
    }
}

int cuda__average_pool(struct ops *o, struct tensor y, struct tensor x, int width)
{
    enum { MOST_BLOCKS = 65535 };
    const int n = (int)x.dim[1];
    const unsigned rows = (unsigned)(x.dim[0] < MOST_BLOCKS ? x.dim[0] : MOST_BLOCKS);
    return cuda__launch(o, "average_pool", average_pool_kernel,
                        dim3((unsigned)((n + POOL_THREADS - 1) / POOL_THREADS), rows), dim3(POOL_THREADS), 0,
                        (float *)y.data, y.stride[0], (const float *)x.data, x.stride[0], x.dim[0], n, width);
}

/* ---- budgets ---- */

struct split_groups {
    struct budget_group group[MOST_GROUPS];
};

/* A row of a group, in shared memory: where its own best end (`equal` of the entries with just this key are among
 * them), and how many of its other entries lie above the group's bound and on it. */
struct split_row {
    uint32_t key;
    int32_t equal, above, tied;
};

/* Digits of the keys that compete and agree with `prefix` above `shift`: all that are not above their row's own cut,
 * less those on it that are own. Whole block. */
__device__ static void count_competitors(int *count, const float *score, int64_t stride, const struct budget_group &g,
                                         const struct split_row *row, uint32_t prefix, int shift)
{
    for (int i = (int)threadIdx.x; i < SELECT_DIGITS; i += (int)blockDim.x) count[i] = 0;
    __syncthreads();
    for (int r = 0; r < g.n_rows; r++) {
        const uint32_t own = row[r].key;
        for (int first = 0; first < g.n_columns; first += (int)blockDim.x) {
            const int i = first + (int)threadIdx.x;
            const uint32_t key = i < g.n_columns ? select_key(score[r * stride + i]) : 0;
            count_digit(count, (int)(key >> shift & 255),
                        i < g.n_columns && key <= own && (uint64_t)(key ^ prefix) >> (shift + 8) == 0);
        }
        if (threadIdx.x == 0 && (uint64_t)(own ^ prefix) >> (shift + 8) == 0)
            atomicSub(&count[own >> shift & 255], row[r].equal);
    }
    __syncthreads();
}

/* How many competitors of each row lie above the bound and on it. Whole block. */
__device__ static void count_rows(const float *score, int64_t stride, const struct budget_group &g,
                                  struct split_row *row, uint32_t bound)
{
    for (int r = 0; r < g.n_rows; r++) {
        const uint32_t own = row[r].key;
        int above = 0, tied = 0;
        for (int first = 0; first < g.n_columns; first += (int)blockDim.x) {
            const int i = first + (int)threadIdx.x;
            const uint32_t key = i < g.n_columns ? select_key(score[r * stride + i]) : 0;
            const bool competes = i < g.n_columns && key <= own;
            above += __syncthreads_count(competes && key > bound);
            tied += __syncthreads_count(competes && key == bound);
        }
        if (threadIdx.x == 0) {
            row[r].above = above - (own > bound ? row[r].equal : 0);
            row[r].tied = tied - (own == bound ? row[r].equal : 0);
        }
    }
}

__global__ static void __launch_bounds__(SELECT_THREADS)
    split_budgets_kernel(int32_t *result, const float *score, int64_t stride, struct split_groups groups)
{
    extern __shared__ struct split_row row[];
    __shared__ int count[SELECT_DIGITS], wanted;
    __shared__ uint32_t bound;
    const struct budget_group g = groups.group[blockIdx.x];
    let_successor_start();
    wait_for_predecessor();
    score += g.first_row * stride;
    for (int r = 0; r < g.n_rows; r++) {
        struct cut own = {UINT32_MAX, 0, 0};
        if (g.own > 0) own = cut_after(score + r * stride, g.n_columns, g.own, count);
        if (threadIdx.x == 0) row[r].key = own.key, row[r].equal = (int32_t)own.n_equal;
        __syncthreads(); /* before the next row's cut is written over this one's */
    }
    if (threadIdx.x == 0) bound = 0, wanted = (int)(g.total - (int64_t)g.n_rows * g.own);
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        count_competitors(count, score, stride, g, row, bound, shift);
        if (threadIdx.x < 32) {
            int64_t place = wanted;
            const int digit = digit_at(count, &place);
            if (threadIdx.x == 0) wanted = (int)place, bound |= (uint32_t)digit << shift;
        }
    }
    __syncthreads();
    count_rows(score, stride, g, row, bound);
    if (threadIdx.x > 0) return;
    for (int r = 0, left = wanted; r < g.n_rows; r++) {
        const int taken = row[r].tied < left ? row[r].tied : left;
        result[g.first_row + r] = g.own + row[r].above + taken;
        left -= taken;
    }
}

int cuda__split_budgets(struct ops *o, int32_t *count, struct tensor score, const struct budget_group *group,
                        int n_groups)
{
    for (int first = 0; first < n_groups; first += MOST_GROUPS) {
        struct split_groups groups;
        const int n = n_groups - first < MOST_GROUPS ? n_groups - first : MOST_GROUPS;
        int most_rows = 0;
        for (int i = 0; i < n; i++) {
            groups.group[i] = group[first + i];
            if (group[first + i].n_rows > most_rows) most_rows = group[first + i].n_rows;
        }
        if (most_rows > MOST_GROUP_ROWS)
            FAIL(ERR_UNSUPPORTED, "cuda: split_budgets over a group of %d rows; served are %d", most_rows,
                 MOST_GROUP_ROWS);
        TRY(cuda__launch(o, "split_budgets", split_budgets_kernel, dim3((unsigned)n), dim3(SELECT_THREADS),
                         (size_t)most_rows * sizeof(struct split_row), count, (const float *)score.data,
                         score.stride[0], groups));
    }
    return OK;
}
