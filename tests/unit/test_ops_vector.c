/* The vector loops of every instruction set that this machine runs, against double precision: the ones that the op
 * table does not choose here are chosen elsewhere. */
#include "kernels/cpu/vector.h"
#include "tests/ops_fixture.h"

static const struct vector_ops *const tables[] = {&vector__base, &vector__v3, &vector__v4};
enum { N_TABLES = 3 };

static void compare_linear(struct fixture *f, const struct vector_ops *v, enum dtype dtype, int m, int k, int n)
{
    float *x = fixture_floats(f, m * k, 1), *w = fixture_floats(f, n * k, 1), *bias = fixture_floats(f, n, 1);
    float *y = fixture_floats(f, m * n, 1), *wide = fixture_floats(f, n * k, 1);
    uint16_t *narrow = fixture_take(f, sizeof *narrow * (size_t)(n * k));
    for (int i = 0; i < n * k; i++) {
        narrow[i] = dtype == DTYPE_F16 ? float_to_half(w[i]) : float_to_bfloat(w[i]);
        if (dtype != DTYPE_F32) w[i] = dtype == DTYPE_F16 ? half_to_float(narrow[i]) : bfloat_to_float(narrow[i]);
    }
    const void *data = dtype == DTYPE_F32 ? (void *)w : (void *)narrow;
    struct vector_linear a = {y, x, bias, data, n, k, k, m, k, n, dtype};
    v->linear(&a);
    v->widen(wide, data, dtype, (int64_t)n * k);
    CHECK(fixture_same(wide, w, sizeof(float) * (size_t)(n * k)));
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            double sum = (double)bias[j];
            for (int c = 0; c < k; c++) sum += (double)x[i * k + c] * (double)w[j * k + c];
            CHECK(fabs((double)y[i * n + j] - sum) < 1e-5 * (1 + sqrt(k)));
        }
}

static void test_linear(void)
{
    struct fixture *f = fixture_open(1, 1);
    for (int t = 0; t < N_TABLES; t++)
        for (int m = 1; m <= 18 && vector__runs(tables[t]); m++)
            compare_linear(f, tables[t], (enum dtype)(m % 3), m, 5 + 13 * m, 1 + m * 7 % 60);
    fixture_close(f);
}

static void compare_multiply(struct fixture *f, const struct vector_ops *v, int m, int n, int k)
{
    const int width = vector__round_up(n) + 16;
    float *rows = fixture_floats(f, n * k, 1), *b = fixture_floats(f, k * width, 1), *a = fixture_floats(f, m * k, 1);
    float *c = fixture_floats(f, m * width, 1), *before = fixture_floats(f, m * width, 1);
    const float *row[64];
    for (int j = 0; j < n; j++) row[j] = rows + j * k;
    v->transpose(b, width, row, n, k);
    for (int d = 0; d < k; d++)
        for (int j = 0; j < vector__round_up(n); j++) CHECK(b[d * width + j] == (j < n ? rows[j * k + d] : 0));
    struct vector_product p = {c, a, b, width, k, width, m, vector__round_up(n), k, 0.3f, false};
    v->multiply(&p);
    memcpy(before, c, sizeof(float) * (size_t)(m * width));
    p.add = true;
    v->multiply(&p);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < vector__round_up(n); j++) {
            double sum = 0;
            for (int d = 0; d < k; d++) sum += (double)a[i * k + d] * (double)b[d * width + j];
            CHECK(fabs((double)before[i * width + j] - sum * (double)0.3f) < 1e-5 * (1 + sqrt(k)));
            CHECK(fabs((double)c[i * width + j] - sum * (1 + (double)0.3f)) < 1e-5 * (1 + sqrt(k)));
        }
}

static void test_multiply(void)
{
    struct fixture *f = fixture_open(1, 2);
    for (int t = 0; t < N_TABLES; t++)
        for (int i = 0; i < 30 && vector__runs(tables[t]); i++)
            compare_multiply(f, tables[t], fixture_int(f, 1, 14), fixture_int(f, 1, 64), fixture_int(f, 1, 130));
    fixture_close(f);
}

/* exp over its whole range, and what softmax needs of the ends. */
static void test_exponentials(void)
{
    struct fixture *f = fixture_open(1, 3);
    float x[40], y[40];
    for (int t = 0; t < N_TABLES; t++) {
        const struct vector_ops *v = tables[t];
        for (int i = -1100; i < 883 && vector__runs(v); i++) {
            for (int j = 0; j < 39; j++) x[j] = ((float)i + (float)j / 39) * 0.1f;
            v->exponentials(y, x, 0, 1, 39);
            for (int j = 0; j < 39; j++) {
                double want = exp((double)x[j]);
                CHECK(fabs((double)y[j] - want) <= 3e-7 * want + 1.5e-45);
            }
        }
        if (!vector__runs(v)) continue;
        memcpy(x, (float[]){-INFINITY, 0, NAN, INFINITY, 200}, 5 * sizeof(float));
        v->exponentials(y, x, 0, 1, 5);
        CHECK(y[0] == 0 && y[1] == 1 && y[2] != y[2] && y[3] == INFINITY && y[4] == INFINITY);
    }
    fixture_close(f);
}

static void test_rows(void)
{
    struct fixture *f = fixture_open(1, 4);
    for (int t = 0; t < N_TABLES; t++)
        for (int n = 1; n <= 70 && vector__runs(tables[t]); n++) {
            const struct vector_ops *v = tables[t];
            float *x = fixture_floats(f, n, 2), *y = fixture_floats(f, n, 2), sum;
            double top = -INFINITY, total = 0, squares = 0;
            int64_t count = 0;
            for (int i = 0; i < n; i++) {
                top = (double)x[i] > top ? (double)x[i] : top;
                squares += (double)x[i] * (double)x[i];
                count += x[i] >= 0.5f;
            }
            for (int i = 0; i < n; i++) total += exp((double)x[i] - top);
            CHECK((double)v->maximum(x, n) == top);
            CHECK(v->count_from(x, n, 0.5f) == count);
            CHECK(fabs((double)v->sum_squares(x, n) - squares) < 1e-5 * squares);
            memcpy(y, x, sizeof(float) * (size_t)n);
            CHECK((double)v->soften(y, n, -100, &sum) == top && fabs((double)sum - total) < 1e-5 * total);
            CHECK(v->soften(x, n, 50, &sum) == 50);
        }
    fixture_close(f);
}

static void test_keys(void)
{
    struct fixture *f = fixture_open(1, 5);
    for (int t = 0; t < N_TABLES; t++)
        for (int n = 1; n <= 20 && vector__runs(tables[t]); n++) {
            const int dim = 8 * n + n % 3;
            float *q = fixture_floats(f, dim, 1), *keys = fixture_floats(f, n * dim, 1), score[20];
            float *out = fixture_floats(f, dim, 1), *before = fixture_floats(f, dim, 1);
            memcpy(before, out, sizeof(float) * (size_t)dim);
            tables[t]->score_keys(score, q, keys, n, dim, 0.5f);
            tables[t]->add_values(out, score, keys, n, dim);
            for (int i = 0; i < n; i++) {
                double sum = 0;
                for (int d = 0; d < dim; d++) sum += (double)q[d] * (double)keys[i * dim + d];
                CHECK(fabs((double)score[i] - sum / 2) < 1e-4);
            }
            for (int d = 0; d < dim; d++) {
                double sum = (double)before[d];
                for (int i = 0; i < n; i++) sum += (double)score[i] * (double)keys[i * dim + d];
                CHECK(fabs((double)out[d] - sum) < 1e-3);
            }
        }
    fixture_close(f);
}

int main(void)
{
    return check_run("ops_vector", (struct check_case[]){{"linear", test_linear},
                                                         {"products and transposition", test_multiply},
                                                         {"exponentials", test_exponentials},
                                                         {"rows", test_rows},
                                                         {"keys and values", test_keys},
                                                         {0}});
}
