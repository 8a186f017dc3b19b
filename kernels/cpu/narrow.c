/* Letting rows leave: sums of scores in fixed point, which no order of addition changes, and the rows that stay. */
#include <math.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

static int64_t fixed(double x)
{
    const double most = 0x1p53;
    if (x != x) return 0;
    return (int64_t)rint(x > most ? most : x < -most ? -most : x); /* to nearest, half to even: the default mode */
}

int cpu__sum_fixed(struct ops *o, int64_t *sum, struct tensor x, double scale)
{
    const double factor = scale * 0x1p40;
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) if (tensor_count(x) > CPU_PARALLEL_WORK)
    for (int64_t j = 0; j < x.dim[1]; j++) {
        int64_t total = 0;
        for (int64_t r = 0; r < x.dim[0]; r++) total += fixed((double)cpu__row(x, r)[j] * factor);
        sum[j] = total;
    }
    return OK;
}

/* Rises with the score. */
static uint64_t key_of(int64_t score) { return (uint64_t)score ^ 1ull << 63; }

/* The key of the k-th best of n scores, 1 <= k <= n; *n_equal: how many scores with this key are among the best k. */
static uint64_t kth_key(const int64_t *score, int n, int k, int *n_equal)
{
    uint64_t prefix = 0;
    for (int shift = 56; shift >= 0; shift -= 8) {
        int count[256] = {0}, digit = 255;
        for (int i = 0; i < n; i++) {
            uint64_t key = key_of(score[i]);
            if (shift == 56 || (key ^ prefix) >> (shift + 8) == 0) count[key >> shift & 255]++;
        }
        for (; count[digit] < k && digit > 0; digit--) k -= count[digit];
        prefix |= (uint64_t)digit << shift;
    }
    *n_equal = k;
    return prefix;
}

static int32_t *choose_rows(int32_t *index, const int64_t *score, const struct row_choice *c)
{
    int equal = 0, end = c->first + c->n_competing;
    uint64_t bound = c->keep ? kth_key(score, c->n_competing, c->keep, &equal) : UINT64_MAX;
    for (int i = 0; i < c->first; i++) *index++ = c->first_row + i;
    for (int i = 0; i < c->n_competing && c->keep; i++) {
        uint64_t key = key_of(score[i]);
        if (key > bound || (key == bound && equal-- > 0)) *index++ = c->first_row + c->first + i;
    }
    for (int i = end; i < c->n_rows; i++) *index++ = c->first_row + i;
    return index;
}

int cpu__select_rows(struct ops *o, int32_t *index, const int64_t *score, const struct row_choice *choice,
                     int n_choices)
{
    (void)o;
    for (int i = 0; i < n_choices; i++) {
        const struct row_choice *c = &choice[i];
        struct row_choice all = *c;
        all.n_competing = all.keep = 0;
        index =
            c->keep == c->n_competing ? choose_rows(index, NULL, &all) : choose_rows(index, score + c->first_score, c);
    }
    return OK;
}
