/* test_ops_scores - ops on scores: the split of a budget over rows against a full ranking of their entries, averages
 * over neighbours against sums in double, and what both refuse. */
#include "tests/ops_fixture.h"

/* ---- ops_split_budgets ---- */

struct ranked {
    float score;
    int row, column;
    bool own;
};

/* NaN below all, -0 as 0; then the lower row, then the lower column. */
static int by_rank(const void *left, const void *right)
{
    const struct ranked *a = left, *b = right;
    if (a->own != b->own) return a->own ? -1 : 1;
    if (isnan(a->score) != isnan(b->score)) return isnan(a->score) ? 1 : -1;
    if (a->score < b->score || a->score > b->score) return a->score > b->score ? -1 : 1;
    return a->row != b->row ? a->row - b->row : a->column - b->column;
}

static void rank_group(struct fixture *f, struct tensor score, const struct budget_group *g, int32_t *count)
{
    const int n = g->n_columns;
    struct ranked *all = fixture_take(f, (size_t)(g->n_rows * n) * sizeof *all);
    for (int r = 0; r < g->n_rows; r++) {
        for (int i = 0; i < n; i++)
            all[r * n + i] = (struct ranked){fixture_row(score, g->first_row + r)[i], r, i, false};
        qsort(all + r * n, (size_t)n, sizeof *all, by_rank);
        for (int i = 0; i < g->own; i++) all[r * n + i].own = true;
        count[g->first_row + r] = 0;
    }
    qsort(all, (size_t)(g->n_rows * n), sizeof *all, by_rank);
    for (int i = 0; i < g->total; i++) count[g->first_row + all[i].row]++;
}

/* One group that is the whole tensor. */
static void split(struct fixture *f, struct tensor score, int own, int total, int32_t *count)
{
    struct budget_group group = {
        .n_rows = (int)score.dim[0], .n_columns = (int)score.dim[1], .own = own, .total = total};
    CHECK_OK(ops_split_budgets(&f->ops, count, score, &group, 1));
}

/* ALGORITHMS.md 8.4: two heads, 3 tokens each. */
static void test_worked(void)
{
    float score[2][6] = {{.40f, .30f, .10f, .08f, .07f, .05f}, {.20f, .18f, .17f, .16f, .15f, .14f}};
    struct fixture *f = fixture_open(1, 1);
    struct tensor t = tensor_2d(score, DTYPE_F32, 2, 6);
    int32_t count[2];
    split(f, t, 0, 6, count);
    CHECK(count[0] == 2 && count[1] == 4);
    split(f, t, 3, 6, count); /* all of it each row's own */
    CHECK(count[0] == 3 && count[1] == 3);
    split(f, t, 0, 2, count);
    CHECK(count[0] == 2 && count[1] == 0);
    split(f, t, 1, 3, count);
    CHECK(count[0] == 2 && count[1] == 1);
    split(f, t, 0, 12, count);
    CHECK(count[0] == 6 && count[1] == 6);
    split(f, t, 0, 0, count);
    CHECK(count[0] == 0 && count[1] == 0);
    fixture_close(f);
}

/* Where all are equal the first rows win; zeros of both signs are equal; not-a-numbers come last. */
static void test_ties(void)
{
    float same[3][4] = {{2, 2, 2, 2}, {2, 2, 2, 2}, {2, 2, 2, 2}};
    float zeros[3][3] = {{-0.0f, NAN, 0.0f}, {0.0f, -INFINITY, -0.0f}, {NAN, -0.0f, INFINITY}};
    struct fixture *f = fixture_open(1, 2);
    int32_t count[3];
    split(f, tensor_2d(same, DTYPE_F32, 3, 4), 0, 6, count);
    CHECK(count[0] == 4 && count[1] == 2 && count[2] == 0);
    split(f, tensor_2d(same, DTYPE_F32, 3, 4), 1, 6, count);
    CHECK(count[0] == 4 && count[1] == 1 && count[2] == 1);
    struct tensor t = tensor_2d(zeros, DTYPE_F32, 3, 3);
    split(f, t, 0, 1, count);
    CHECK(count[0] == 0 && count[1] == 0 && count[2] == 1);
    split(f, t, 0, 4, count);
    CHECK(count[0] == 2 && count[1] == 1 && count[2] == 1);
    split(f, t, 0, 6, count);
    CHECK(count[0] == 2 && count[1] == 2 && count[2] == 2);
    split(f, t, 0, 7, count);
    CHECK(count[0] == 2 && count[1] == 3 && count[2] == 2);
    split(f, t, 0, 8, count);
    CHECK(count[0] == 3 && count[1] == 3 && count[2] == 2);
    split(f, t, 3, 9, count);
    CHECK(count[0] == 3 && count[1] == 3 && count[2] == 3);
    fixture_close(f);
}

/* Scores of few values, so that ties abound, or of many; now and then a NaN or a zero of either sign. */
static struct tensor random_scores(struct fixture *f, int rows, int n, int kind)
{
    struct tensor score = fixture_2d(f, rows, n, fixture_int(f, 0, 3));
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++) {
            float *x = &fixture_row(score, r)[i];
            if (kind % 3 == 0) *x = (float)fixture_int(f, -2, 2) * (fixture_int(f, 0, 1) ? 0.25f : -0.25f);
            if (kind % 3 == 1 && fixture_int(f, 0, 9) == 0) *x = NAN;
        }
    return score;
}

static void test_ranking(void)
{
    struct fixture *f = fixture_open(2, 3);
    for (int kind = 0; kind < 60; kind++) {
        struct budget_group group[3];
        int32_t got[64], want[64];
        int rows = 1; /* the first belongs to no group */
        const int n = fixture_int(f, 1, 150);
        for (int g = 0; g < 3; g++) {
            const int columns = fixture_int(f, 0, n), heads = fixture_int(f, 1, 9), own = fixture_int(f, 0, columns);
            group[g] = (struct budget_group){.first_row = rows, .n_rows = heads, .n_columns = columns, .own = own};
            group[g].total = fixture_int(f, heads * own, heads * columns);
            rows += heads;
        }
        struct tensor score = random_scores(f, rows + 1, n, kind);
        for (int i = 0; i < 64; i++) got[i] = want[i] = -7;
        for (int g = 0; g < 3; g++) rank_group(f, score, &group[g], want);
        CHECK_OK(ops_split_budgets(&f->ops, got, score, group, 3));
        CHECK(fixture_same(got, want, sizeof got));
    }
    fixture_close(f);
}

static void test_split_refusals(void)
{
    struct fixture *f = fixture_open(1, 4);
    struct tensor score = fixture_2d(f, 4, 5, 0);
    int32_t count[4] = {9, 9, 9, 9};
    struct budget_group group = {.first_row = 2, .n_rows = 3, .n_columns = 5, .own = 1, .total = 6};
    CHECK_FAILS(ops_split_budgets(&f->ops, count, score, &group, 1), ERR_ARG, "rows 2 .. 5");
    group.n_rows = 2, group.n_columns = 6;
    CHECK_FAILS(ops_split_budgets(&f->ops, count, score, &group, 1), ERR_ARG, "6 columns");
    group.n_columns = 5, group.total = 11;
    CHECK_FAILS(ops_split_budgets(&f->ops, count, score, &group, 1), ERR_ARG, "shares 11 entries");
    group.total = 1;
    CHECK_FAILS(ops_split_budgets(&f->ops, count, score, &group, 1), ERR_ARG, "shares 1 entries");
    CHECK_OK(ops_split_budgets(&f->ops, count, score, NULL, 0));
    CHECK(count[0] == 9 && count[2] == 9);
    fixture_close(f);
}

/* ---- ops_average_pool ---- */

static void test_pool(void)
{
    static const int widths[] = {1, 3, 5, 7, 31, 255};
    struct fixture *f = fixture_open(2, 5);
    for (int i = 0; i < 6; i++)
        for (int n = 1; n < 200; n += n < 12 ? 1 : 47) {
            const int half = widths[i] / 2;
            struct tensor x = fixture_2d(f, 3, n, i), y = fixture_2d(f, 3, n, 2);
            CHECK_OK(ops_average_pool(&f->ops, y, x, widths[i]));
            for (int r = 0; r < 3; r++)
                for (int j = 0; j < n; j++) {
                    double sum = 0;
                    for (int c = j - half; c <= j + half; c++)
                        if (c >= 0 && c < n) sum += (double)fixture_row(x, r)[c];
                    CHECK(fabs((double)fixture_row(y, r)[j] - sum / widths[i]) < 1e-5);
                }
        }
    fixture_close(f);
}

/* The pooled scores of ALGORITHMS.md 8.4. */
static void test_pool_worked(void)
{
    float raw[6] = {.756258f, .192013f, .271456f, .009046f, .090655f, .023017f}, pooled[6];
    const float want[6] = {.316090f, .406576f, .157505f, .123719f, .040906f, .037891f};
    struct fixture *f = fixture_open(1, 6);
    CHECK_OK(ops_average_pool(&f->ops, tensor_2d(pooled, DTYPE_F32, 1, 6), tensor_2d(raw, DTYPE_F32, 1, 6), 3));
    CHECK_CLOSE(pooled, want, 6, 2e-6);
    fixture_close(f);
}

static void test_pool_refusals(void)
{
    struct fixture *f = fixture_open(1, 7);
    struct tensor x = fixture_2d(f, 2, 5, 0), y = fixture_2d(f, 2, 5, 0);
    CHECK_FAILS(ops_average_pool(&f->ops, y, x, 4), ERR_ARG, "width is 4");
    CHECK_FAILS(ops_average_pool(&f->ops, y, x, -1), ERR_ARG, "width is -1");
    CHECK_FAILS(ops_average_pool(&f->ops, fixture_2d(f, 2, 6, 0), x, 3), ERR_ARG, "y");
    fixture_close(f);
}

int main(void)
{
    static const struct check_case cases[] = {{"budgets: worked example", test_worked},
                                              {"budgets: ties, zeros, not-a-numbers", test_ties},
                                              {"budgets: against a full ranking", test_ranking},
                                              {"budgets: refusals", test_split_refusals},
                                              {"average: against sums", test_pool},
                                              {"average: worked example", test_pool_worked},
                                              {"average: refusals", test_pool_refusals},
                                              {0}};
    return check_run("scores", cases);
}
