/* Scores of prompt tokens: averages over neighbours, and how heads share a layer's budget by them. */
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/select.h"

int cpu__average_pool(struct ops *o, struct tensor y, struct tensor x, int width)
{
    const int n = (int)x.dim[1], half = width / 2;
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) if (tensor_count(x) > CPU_PARALLEL_WORK)
    for (int64_t row = 0; row < x.dim[0]; row++) {
        const float *from = cpu__row(x, row);
        float *to = cpu__row(y, row);
        for (int j = 0; j < n; j++) {
            float sum = 0;
            for (int i = j > half ? j - half : 0; i <= j + half && i < n; i++) sum += from[i];
            to[j] = sum / (float)width;
        }
    }
    return OK;
}

/* Which entries of a row are its own best ones, in a pass from left to right. */
struct own {
    uint32_t bound;
    int64_t equal; /* entries equal to the bound that are still to come in */
};

static struct own own_of(const float *row, const struct budget_group *group)
{
    struct own own = {UINT32_MAX, 0};
    if (group->own > 0) own.bound = select__kth_key(row, group->n_columns, group->own, &own.equal);
    return own;
}

static bool is_own(struct own *own, uint32_t key)
{
    return key > own->bound || (key == own->bound && own->equal-- > 0);
}

/* Digits of the keys that compete and agree with `prefix` above `shift`. */
static void count_digits(struct tensor score, const struct budget_group *group, uint32_t prefix, int shift,
                         int64_t *count)
{
    memset(count, 0, 256 * sizeof *count);
    for (int r = 0; r < group->n_rows; r++) {
        const float *row = cpu__row(score, group->first_row + r);
        struct own own = own_of(row, group);
        for (int i = 0; i < group->n_columns; i++) {
            uint32_t key = select__key(row[i]);
            if (!is_own(&own, key) && ((uint64_t)(key ^ prefix) >> (shift + 8)) == 0) count[key >> shift & 255]++;
        }
    }
}

static void split_group(int32_t *count, struct tensor score, const struct budget_group *group)
{
    int64_t wanted = group->total - (int64_t)group->n_rows * group->own, digits[256];
    uint32_t bound = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        uint32_t digit = 255;
        count_digits(score, group, bound, shift, digits);
        for (; digits[digit] < wanted && digit > 0; digit--) wanted -= digits[digit];
        bound |= digit << shift;
    }
    for (int r = 0; r < group->n_rows; r++) {
        const float *row = cpu__row(score, group->first_row + r);
        struct own own = own_of(row, group);
        int32_t in = group->own;
        for (int i = 0; i < group->n_columns; i++) {
            uint32_t key = select__key(row[i]);
            if (!is_own(&own, key)) in += key > bound || (key == bound && wanted-- > 0);
        }
        count[group->first_row + r] = in;
    }
}

int cpu__split_budgets(struct ops *o, int32_t *count, struct tensor score, const struct budget_group *group,
                       int n_groups)
{
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) if (tensor_count(score) > CPU_PARALLEL_WORK)
    for (int i = 0; i < n_groups; i++) split_group(count, score, &group[i]);
    return OK;
}
