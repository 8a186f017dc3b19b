/* CUDA's attention probe and selection against the CPU's. Column sums by relative L2; counts within the number of
 * entries that stand so close to the cut (1e-3 in logits) that rounding may put them on either side. */
#include "tests/cuda/cuda_cache.h"

struct shape {
    int n_kv_heads, group, dim, page_size;
};

/* Entries of each head within 1e-3 of the cut, in double precision from the values that both sides see. */
static void count_doubtful(const struct cache *c, const struct attention_heads *heads, struct twin q,
                           const struct attention_probe *probe, int64_t *doubtful)
{
    const int group = heads->n_heads / heads->n_kv_heads, dim = heads->head_dim;
    double *s = malloc(sizeof *s * (size_t)(probe->first_position + probe->n_rows));
    if (!s) abort();
    for (int h = 0; h < heads->n_heads; h++) {
        const int lane = probe->slot * c->cpu.lanes_per_slot + heads->lane + h / group;
        doubtful[h] = 0;
        for (int row = 0; row < probe->n_rows; row++) {
            const float *query = fixture_row(q.cpu, row) + (int64_t)h * dim;
            const int n = probe->first_position + row + 1;
            double top = -INFINITY;
            for (int i = 0; i < n; i++) {
                const float *key = fixture_key(&c->cpu, lane, i);
                float sum = 0;
                for (int d = 0; d < dim; d++) sum += query[d] * key[d];
                s[i] = (double)sum * (double)heads->scale;
                top = s[i] > top ? s[i] : top;
            }
            const double cut = top + log((double)probe->threshold);
            for (int i = 0; i < n; i++) doubtful[h] += fabs(s[i] - cut) < 1e-3;
        }
    }
    free(s);
}

struct request {
    int first_position, n_rows;
    float threshold;
    bool weights, kept;
    int gap; /* of q's rows */
};

static void compare_probe(struct cuda_fixture *f, struct shape s, struct request r)
{
    const int n = r.first_position + r.n_rows, n_heads = s.n_kv_heads * s.group, max_pages = n / s.page_size + 2;
    const struct attention_heads heads = {n_heads, s.n_kv_heads, s.dim, 1, 1.0f / sqrtf((float)s.dim)};
    struct cache c =
        cache_take(f, 2, s.n_kv_heads + 1, max_pages, max_pages * s.n_kv_heads * 2, s.page_size, s.dim, STALE_LARGE);
    cuda_what(f, "probe of %d rows from %d on, %d/%d heads of %d, threshold %g%s", r.n_rows, r.first_position, n_heads,
              s.n_kv_heads, s.dim, (double)r.threshold, r.weights ? ", weighted" : "");
    cache_fill(f, &c, &heads, 0, 5);
    cache_fill(f, &c, &heads, 1, n + r.n_rows % 2); /* sometimes the lane holds a token more */
    struct twin q = twin_3d(f, r.n_rows, n_heads, s.dim, r.gap, 2);
    struct twin column = twin_make(f, DTYPE_F32, s.n_kv_heads, n, -1, 0, 0);
    struct pair weight = pair_floats(f, r.n_rows, 0.1f, 1), kept = pair_of(f, NULL, sizeof(int64_t) * (size_t)n_heads);
    struct attention_probe gpu = {.slot = 1,
                                  .n_rows = r.n_rows,
                                  .first_position = r.first_position,
                                  .row_weight = r.weights ? weight.gpu : NULL,
                                  .threshold = r.threshold,
                                  .column_sum = column.gpu.data,
                                  .kept = r.kept ? kept.gpu : NULL};
    struct attention_probe cpu = gpu;
    cpu.row_weight = r.weights ? weight.cpu : NULL;
    cpu.column_sum = column.cpu.data;
    cpu.kept = r.kept ? kept.cpu : NULL;
    RUN(f, ops_attention_probe(&f->gpu, q.gpu, &c.gpu, &heads, &gpu));
    RUN(f, ops_attention_probe(&f->cpu->ops, q.cpu, &c.cpu, &heads, &cpu));
    twin_check(f, column, TOLERANCE_F32, "column_sum");
    const int64_t *got = pair_fetch(f, kept), *want = kept.cpu;
    int64_t doubtful[64] = {0};
    if (r.kept && r.threshold > 0) count_doubtful(&c, &heads, q, &cpu, doubtful);
    for (int h = 0; h < n_heads; h++)
        if (llabs(got[h] - want[h]) > doubtful[h])
            cuda_wrong(f, "head %d: %lld kept, expected %lld within %lld", h, (long long)got[h], (long long)want[h],
                       (long long)doubtful[h]);
    struct twin again = twin_make(f, DTYPE_F32, s.n_kv_heads, n, -1, 0, 0);
    gpu.column_sum = again.gpu.data; /* written, not added to; and the same bits */
    RUN(f, ops_attention_probe(&f->gpu, q.gpu, &c.gpu, &heads, &gpu));
    EXPECT(f, fixture_same(twin_fetch(f, column), twin_fetch(f, again),
                           (size_t)(column.span + 2 * cuda_guard(f)) * sizeof(float)));
    EXPECT(f, fixture_same(got, pair_fetch(f, kept), kept.bytes));
    cuda_clear(f);
}

static void test_probe(void)
{
    static const int dims[] = {8, 16, 64, 72, 80, 96, 128}, groups[] = {1, 2, 3, 4, 7, 8, 16};
    static const float thresholds[] = {0.01f, 0.001f, 0, 1, 0.3f};
    struct cuda_fixture *f = cuda_begin(1);
    for (int i = 0; i < 7; i++)
        for (int j = 0; j < 7; j++) {
            if (f->effort == QUICK ? (i + 2 * j) % 7 != 0 : f->effort == SOME && (i + j) % 3) continue;
            const int rows[] = {50, 1, 64, 17, 130}, n_rows = f->effort == QUICK ? 5 : rows[(i * 2 + j) % 5];
            const int first = f->effort == QUICK ? 30 * j : (j % 4) * 211;
            compare_probe(f, (struct shape){1 + (i + j) % 3, groups[j], dims[i], 16},
                          (struct request){first, n_rows, thresholds[(i + j) % 5], (i + j) % 2, true, j % 3 * 8});
        }
    compare_probe(f, (struct shape){2, 2, 64, 16}, (struct request){33, 9, 0.01f, true, false, 0});
    if (f->effort > QUICK) {
        compare_probe(f, (struct shape){8, 4, 128, 16}, (struct request){2830, 50, 0.01f, false, true, 0});
        compare_probe(f, (struct shape){5, 1, 128, 16}, (struct request){2830, 50, 0.01f, true, true, 0});
        compare_probe(f, (struct shape){3, 3, 64, 16}, (struct request){4090, 6, 0.001f, true, true, 0});
        compare_probe(f, (struct shape){2, 3, 72, 16}, (struct request){0, 700, 0.01f, true, true, 0});
        compare_probe(f, (struct shape){2, 3, 96, 7}, (struct request){300, 40, 0.01f, false, true, 0});
        compare_probe(f, (struct shape){2, 3, 80, 16}, (struct request){300, 40, 0.01f, false, true, 8});
    }
    cuda_end(f);
}

/* ---- the best k of a row ---- */

static void compare_select(struct cuda_fixture *f, int rows, int n, int k, int window, int levels, int gap)
{
    struct twin score = twin_make(f, DTYPE_F32, rows, n, -1, gap, 1);
    struct pair index = pair_of(f, NULL, sizeof(int32_t) * (size_t)(rows * k));
    for (int i = 0; i < rows && levels; i++) /* few different values: many ties, some of them -0 */
        for (int j = 0; j < n; j++) {
            const int level = fixture_int(f->cpu, -levels, levels);
            fixture_row(score.cpu, i)[j] = level ? (float)level : j % 2 ? -0.0f : 0.0f;
        }
    twin_send(f, score, true);
    cuda_what(f, "select %d of %d, window %d, %d rows, %d levels", k, n, window, rows, levels);
    RUN(f, fixture_select(&f->gpu, index.gpu, score.gpu, k, window));
    RUN(f, fixture_select(&f->cpu->ops, index.cpu, score.cpu, k, window));
    pair_check(f, index, "index");
}

/* Each row with a k and a window of its own, into rows wider than any; what stands behind them stays. */
static void compare_select_rows(struct cuda_fixture *f, int rows, int n)
{
    const int stride = n + 3;
    int *k = fixture_take(f->cpu, sizeof *k * (size_t)rows), *window = fixture_take(f->cpu, sizeof *k * (size_t)rows);
    struct twin score = twin_make(f, DTYPE_F32, rows, n, -1, 0, 1);
    struct pair index = pair_of(f, NULL, sizeof(int32_t) * (size_t)(rows * stride));
    for (int i = 0; i < rows; i++) {
        k[i] = i % 5 == 3 ? 0 : fixture_int(f->cpu, 0, n);
        window[i] = fixture_int(f->cpu, 0, k[i]);
    }
    cuda_what(f, "select of %d rows of %d, each its own number", rows, n);
    RUN(f, ops_select_top(&f->gpu, index.gpu, stride, score.gpu, k, window));
    RUN(f, ops_select_top(&f->cpu->ops, index.cpu, stride, score.cpu, k, window));
    pair_check(f, index, "index");
    cuda_clear(f);
}

static void test_select(void)
{
    struct cuda_fixture *f = cuda_begin(2);
    for (int i = 0; i < (f->effort == QUICK ? 10 : 200); i++) {
        const int n = fixture_int(f->cpu, 1, i % 2 ? 90 : 3000), k = fixture_int(f->cpu, 1, n);
        compare_select(f, fixture_int(f->cpu, 1, 4), n, k, fixture_int(f->cpu, 0, k), i % 4, i % 3);
        cuda_clear(f);
    }
    compare_select_rows(f, 7, 100);
    if (f->effort > QUICK) compare_select_rows(f, 600, 700);
    compare_select(f, 3, 600, 600, 0, 2, 0);
    compare_select(f, 3, 600, 60, 60, 2, 0);
    if (f->effort > QUICK) {
        compare_select(f, 8, 2880, 288, 28, 0, 0);
        compare_select(f, 40, 2880, 288, 28, 0, 0);
        compare_select(f, 64, 4352, 1000, 10, 1, 0);
        compare_select(f, 2, 4352, 4351, 0, 0, 0);
        compare_select(f, 8, 4352, 1, 0, 0, 0);
    }
    const float odd[] = {NAN, -INFINITY, 1, INFINITY, NAN, -0.0f, 0, 1e-42f, -1e-42f, 3e38f};
    struct pair index = pair_of(f, NULL, 7 * sizeof(int32_t));
    struct pair score = pair_of(f, odd, sizeof odd);
    for (int k = 1; k <= 7; k += 2) {
        cuda_what(f, "select %d of odd scores", k);
        RUN(f, fixture_select(&f->gpu, index.gpu, tensor_2d(score.gpu, DTYPE_F32, 1, 10), k, k / 3));
        RUN(f, fixture_select(&f->cpu->ops, index.cpu, tensor_2d(score.cpu, DTYPE_F32, 1, 10), k, k / 3));
        pair_check(f, index, "index");
    }
    cuda_end(f);
}

int main(int argc, char **argv)
{
    const struct check_case cases[] = {{"attention probe", test_probe}, {"the best k", test_select}, {0}};
    return cuda_main("cuda_probe", cases, argc, argv);
}
