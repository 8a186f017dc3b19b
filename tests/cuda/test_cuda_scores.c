/* CUDA's ops on scores against the CPU's: budgets split over rows, averages over neighbours. The same bits. */
#include "tests/cuda/cuda_fixture.h"

/* Scores of a prompt as policies have them: kind 0 positive and skewed, 1 of few values, 2 with NaN, infinities and
 * zeros of both signs, 3 all the same. Rounded on neither side: both get float32. */
static struct twin take_scores(struct cuda_fixture *f, int rows, int n, int gap, int kind)
{
    static const float odd[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1.0f, -1.0f, 1e-42f};
    struct twin score = twin_make(f, DTYPE_F32, rows, n, -1, gap, 1);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++) {
            float *x = &fixture_row(score.cpu, r)[i];
            if (kind == 0) *x = expf(2 * *x) * 1e-3f;
            if (kind == 1) *x = (float)fixture_int(f->cpu, -2, 3) * 0.125f;
            if (kind == 2 && fixture_int(f->cpu, 0, 2) == 0) *x = odd[fixture_int(f->cpu, 0, 7)];
            if (kind == 3) *x = 0.5f;
        }
    twin_send(f, score, true);
    return score;
}

static void compare_split(struct cuda_fixture *f, int groups, int most_heads, int n, int kind)
{
    struct budget_group *group = fixture_take(f->cpu, (size_t)groups * sizeof *group);
    int rows = 0;
    for (int g = 0; g < groups; g++) {
        const int heads = fixture_int(f->cpu, 1, most_heads), columns = g % 5 == 4 ? fixture_int(f->cpu, 0, n) : n;
        const int mean = fixture_int(f->cpu, 0, columns), own = g % 3 == 0 ? 0 : mean / (g % 3 == 1 ? 5 : 1);
        rows += g % 4 == 3; /* rows of no group keep what they hold */
        group[g] = (struct budget_group){rows, heads, columns, own, heads * mean};
        if (g % 7 == 6) group[g].total = heads * columns;
        rows += heads;
    }
    cuda_what(f, "split_budgets, %d groups of up to %d heads, %d columns, kind %d", groups, most_heads, n, kind);
    struct twin score = take_scores(f, rows, n, kind, kind);
    struct pair count = pair_of(f, NULL, (size_t)rows * sizeof(int32_t));
    RUN(f, ops_split_budgets(&f->gpu, count.gpu, score.gpu, group, groups));
    RUN(f, ops_split_budgets(&f->cpu->ops, count.cpu, score.cpu, group, groups));
    pair_check(f, count, "count");
    cuda_clear(f);
}

static void test_split(void)
{
    static const int columns[] = {1, 2, 31, 33, 600, 1023, 1024, 1025, 2333, 4096};
    struct cuda_fixture *f = cuda_begin(1);
    for (int i = 0; i < 10; i++)
        for (int kind = 0; kind < 4; kind++) {
            if (f->effort == QUICK && (i + kind) % 4) continue;
            compare_split(f, f->effort == QUICK ? 3 : 9, 1 + (i * 5 + kind) % 9, columns[i], kind);
        }
    if (f->effort > QUICK) compare_split(f, 300, 8, 70, 1); /* several launches */
    if (f->effort > QUICK) compare_split(f, 2, 700, 40, 1); /* many rows */
    cuda_end(f);
}

static void test_too_many_rows(void)
{
    struct cuda_fixture *f = cuda_begin(2);
    struct twin score = take_scores(f, 4000, 1, 0, 0);
    struct pair count = pair_of(f, NULL, 4000 * sizeof(int32_t));
    const struct budget_group group = {0, 4000, 1, 0, 10};
    cuda_what(f, "split_budgets over 4000 rows");
    EXPECT(f, ops_split_budgets(&f->gpu, count.gpu, score.gpu, &group, 1) == ERR_UNSUPPORTED);
    EXPECT(f, strstr(status_message(), "4000 rows") != NULL);
    cuda_end(f);
}

static void test_pool(void)
{
    static const int columns[] = {1, 2, 5, 255, 256, 257, 2301}, widths[] = {1, 3, 5, 7, 63, 1023};
    struct cuda_fixture *f = cuda_begin(3);
    for (int i = 0; i < 7; i++)
        for (int j = 0; j < 6; j++) {
            if (f->effort == QUICK && (i + j) % 5) continue;
            const int rows = 1 + (i * 3 + j) % 9;
            cuda_what(f, "average_pool of %d, [%d, %d]", widths[j], rows, columns[i]);
            struct twin x = take_scores(f, rows, columns[i], i, 0);
            struct twin y = twin_make(f, DTYPE_F32, rows, columns[i], -1, j, 0);
            RUN(f, ops_average_pool(&f->gpu, y.gpu, x.gpu, widths[j]));
            RUN(f, ops_average_pool(&f->cpu->ops, y.cpu, x.cpu, widths[j]));
            twin_check(f, y, 0, "y");
            cuda_clear(f);
        }
    cuda_end(f);
}

int main(int argc, char **argv)
{
    static const struct check_case cases[] = {{"budgets of heads", test_split},
                                              {"more rows than are served", test_too_many_rows},
                                              {"averages over neighbours", test_pool},
                                              {0}};
    return cuda_main("scores on CUDA", cases, argc, argv);
}
