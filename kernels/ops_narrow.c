/* The checking wrappers of the ops with which a policy lets rows leave: exact sums of scores, and the rows that stay.
 * See ops.c. */
#include "kernels/ops.h"
#include "kernels/ops_check.h"

#define TENSOR(t, dtypes, n_dims, ...) TRY(ops_check__tensor(__func__, #t, t, (dtypes), (n_dims), __VA_ARGS__))
#define POINTER(p) TRY(ops_check__pointer(__func__, #p, (p)))

int ops_sum_fixed(struct ops *o, int64_t *sum, struct tensor x, double scale)
{
    TENSOR(x, IS_F32, 2, ANY_SIZE, ANY_SIZE, 1);
    if (x.dim[1] == 0) return OK;
    POINTER(sum);
    return o->vt->sum_fixed(o, sum, x, scale);
}

static int check_choice(const struct row_choice *c, int i)
{
    if (c->first_row < 0 || c->n_rows < 0 || c->first < 0 || c->n_competing < 0 || c->first > c->n_rows ||
        c->n_competing > c->n_rows - c->first || c->first_score < 0)
        FAIL(ERR_ARG, "ops_select_rows: choice %d: rows %d .. %d of %d from %d on compete, scores from %lld", i,
             c->first, c->first + c->n_competing, c->n_rows, c->first_row, (long long)c->first_score);
    if (c->keep < 0 || c->keep > c->n_competing)
        FAIL(ERR_ARG, "ops_select_rows: choice %d keeps %d of %d rows", i, c->keep, c->n_competing);
    return OK;
}

int ops_select_rows(struct ops *o, int32_t *index, const int64_t *score, const struct row_choice *choice, int n_choices)
{
    bool reads = false;
    if (n_choices <= 0) return OK;
    POINTER(index);
    POINTER(choice);
    for (int i = 0; i < n_choices; i++) {
        TRY(check_choice(&choice[i], i));
        reads |= choice[i].keep < choice[i].n_competing;
    }
    if (reads) POINTER(score);
    return o->vt->select_rows(o, index, score, choice, n_choices);
}
