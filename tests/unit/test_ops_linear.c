/* linear against sums in double: dtypes, odd shapes, strides, bias; and what holds of its bits. */
#include "tests/ops_fixture.h"

/* A weight tensor of a dtype, and the same values as doubles. */
static struct tensor make_weight(struct fixture *f, enum dtype dtype, int64_t rows, int64_t cols, int gap, double *wide)
{
    struct tensor w = tensor_2d(NULL, dtype, rows, cols);
    w.stride[0] += gap;
    size_t n = (size_t)(rows * w.stride[0] - (rows ? gap : 0));
    float *values = fixture_floats(f, (int64_t)n, 0.3f);
    uint16_t *narrow = fixture_take(f, n * sizeof *narrow);
    for (size_t i = 0; i < n && dtype != DTYPE_F32; i++) {
        narrow[i] = dtype == DTYPE_F16 ? float_to_half(values[i]) : float_to_bfloat(values[i]);
        values[i] = dtype == DTYPE_F16 ? half_to_float(narrow[i]) : bfloat_to_float(narrow[i]);
    }
    w.data = dtype == DTYPE_F32 ? (void *)values : (void *)narrow;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) wide[i * cols + j] = (double)values[i * w.stride[0] + j];
    return w;
}

static void compare_linear(struct fixture *f, enum dtype dtype, int n, int n_in, int n_out, int gap, bool biased)
{
    double *wide = fixture_take(f, sizeof(double) * (size_t)n_in * (size_t)n_out);
    struct tensor w = make_weight(f, dtype, n_out, n_in, gap, wide);
    struct tensor x = fixture_2d(f, n, n_in, gap), y = fixture_2d(f, n, n_out, gap);
    float *bias = biased ? fixture_floats(f, n_out, 1) : NULL, beyond = n > 1 && gap ? fixture_row(y, 0)[n_out] : 0;
    CHECK_OK(ops_linear(&f->ops, y, x, w, bias));
    float *want = fixture_take(f, sizeof(float) * (size_t)n_out);
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < n_out; j++) {
            double sum = bias ? (double)bias[j] : 0;
            for (int k = 0; k < n_in; k++) sum += (double)fixture_row(x, i)[k] * wide[(int64_t)j * n_in + k];
            want[j] = (float)sum;
        }
        CHECK_CLOSE(fixture_row(y, i), want, n_out, 2e-5 * sqrt(n_in));
    }
    if (n > 1 && gap) CHECK(fixture_row(y, 0)[n_out] == beyond);
}

static void test_shapes(void)
{
    static const int rows[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 23, 64, 100};
    static const int ins[] = {1, 7, 16, 31, 64, 72, 100, 257, 576};
    static const int outs[] = {1, 3, 8, 17, 130, 300};
    struct fixture *f = fixture_open(2, 1);
    for (int dtype = DTYPE_F32; dtype <= DTYPE_BF16; dtype++)
        for (int r = 0; r < 13; r++)
            for (int k = 0; k < 3; k++)
                compare_linear(f, (enum dtype)dtype, rows[r], ins[(r + 3 * k + dtype) % 9], outs[(r + 2 * k) % 6],
                               (r + k) % 2 * 5, k == 1);
    compare_linear(f, DTYPE_F16, 70, 1536, 576, 0, true);
    compare_linear(f, DTYPE_BF16, 65, 1720, 385, 0, false);
    compare_linear(f, DTYPE_F32, 150, 100, 1000, 2, true);
    compare_linear(f, DTYPE_BF16, 1, 4096, 40, 3, true);
    fixture_close(f);
}

static void test_empty(void)
{
    struct fixture *f = fixture_open(1, 2);
    float w[8] = {0};
    CHECK_OK(ops_linear(&f->ops, tensor_2d(NULL, DTYPE_F32, 0, 2), tensor_2d(NULL, DTYPE_F32, 0, 4),
                        tensor_2d(w, DTYPE_F32, 2, 4), NULL));
    fixture_close(f);
}

/* Every float16 value through a weight of one column: widening is exact, subnormals and infinities included. */
static void test_every_half(void)
{
    enum { ALL = 65536 };
    struct fixture *f = fixture_open(2, 3);
    uint16_t *bits = fixture_take(f, ALL * sizeof *bits);
    float *y = fixture_take(f, 66 * ALL * sizeof *y), x[66];
    for (int i = 0; i < ALL; i++) bits[i] = (uint16_t)i;
    for (int i = 0; i < 66; i++) x[i] = 1;
    for (int n = 1; n <= 66; n += 65)
        for (int dtype = DTYPE_F16; dtype <= DTYPE_BF16; dtype++) {
            int wrong = 0;
            CHECK_OK(ops_linear(&f->ops, tensor_2d(y, DTYPE_F32, n, ALL), tensor_2d(x, DTYPE_F32, n, 1),
                                tensor_2d(bits, (enum dtype)dtype, ALL, 1), NULL));
            for (int i = 0; i < ALL; i++) {
                float want = dtype == DTYPE_F16 ? half_to_float(bits[i]) : bfloat_to_float(bits[i]);
                /* sums of products may flush what float32 itself holds as subnormal */
                wrong += !(y[i] == want || (y[i] != y[i] && want != want) || (fabsf(want) < 1.2e-38f && y[i] == 0));
            }
            CU_ASSERT_EQUAL(wrong, 0);
        }
    fixture_close(f);
}

/* Up to 64 rows, a row's result is the same bits whatever rows stand beside it, and for any number of threads. */
static void test_row_independent(void)
{
    enum { N = 64, IN = 203, OUT = 77 };
    struct fixture *f = fixture_open(2, 4), *one = fixture_open(1, 4);
    double *wide = fixture_take(f, sizeof(double) * IN * OUT);
    for (int dtype = DTYPE_F32; dtype <= DTYPE_BF16; dtype++) {
        struct tensor w = make_weight(f, (enum dtype)dtype, OUT, IN, 0, wide);
        struct tensor x = fixture_2d(f, N, IN, 0), y = fixture_2d(f, N, OUT, 0);
        for (int n = 1; n <= N; n++) {
            struct tensor some = fixture_2d(f, n, OUT, 0), alone = fixture_2d(f, 1, OUT, 0);
            CHECK_OK(ops_linear(&f->ops, some, tensor_rows(x, 0, n), w, NULL));
            CHECK_OK(ops_linear(&one->ops, alone, tensor_rows(x, n - 1, 1), w, NULL));
            CHECK(fixture_same(fixture_row(some, n - 1), alone.data, OUT * sizeof(float)));
            if (n == N) memcpy(y.data, some.data, tensor_bytes(y));
        }
        CHECK_OK(ops_linear(&one->ops, fixture_2d(f, N, OUT, 0), x, w, NULL));
    }
    fixture_close(one);
    fixture_close(f);
}

/* The same call twice gives the same bits, also for many rows. */
static void test_repeatable(void)
{
    struct fixture *f = fixture_open(2, 5);
    double *wide = fixture_take(f, sizeof(double) * 300 * 576);
    struct tensor w = make_weight(f, DTYPE_F16, 300, 576, 0, wide), x = fixture_2d(f, 90, 576, 0);
    struct tensor a = fixture_2d(f, 90, 300, 0), b = fixture_2d(f, 90, 300, 0);
    for (int i = 0; i < 5; i++) {
        CHECK_OK(ops_linear(&f->ops, a, x, w, NULL));
        CHECK_OK(ops_linear(&f->ops, b, x, w, NULL));
        CHECK(fixture_same(a.data, b.data, tensor_bytes(a)));
    }
    fixture_close(f);
}

int main(void)
{
    return check_run("ops_linear", (struct check_case[]){{"dtypes, odd shapes, strides, bias", test_shapes},
                                                         {"no rows", test_empty},
                                                         {"every 16-bit weight is widened exactly", test_every_half},
                                                         {"few rows do not depend on each other", test_row_independent},
                                                         {"repeatable", test_repeatable},
                                                         {0}});
}
