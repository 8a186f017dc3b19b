/* Rows, norms, rope, activations and image patches against plain double precision. */
#include "tests/ops_fixture.h"

static void test_embed(void)
{
    struct fixture *f = fixture_open(2, 1);
    int32_t ids[6] = {10, 12, 3, 14, 15, -1};
    float *table = fixture_floats(f, 5 * 9, 1), y[6 * 11];
    uint16_t half[45], brain[45];
    for (int i = 0; i < 45; i++) half[i] = float_to_half(table[i]), brain[i] = float_to_bfloat(table[i]);
    void *data[3] = {table, half, brain};
    for (int dtype = DTYPE_F32; dtype <= DTYPE_BF16; dtype++) {
        struct tensor out = tensor_2d(y, DTYPE_F32, 6, 9);
        out.stride[0] = 11;
        memset(y, 0x7f, sizeof y);
        CHECK_OK(ops_embed(&f->ops, out, tensor_2d(data[dtype], (enum dtype)dtype, 5, 9), ids, 10));
        for (int i = 0; i < 6; i++)
            for (int j = 0; j < 9; j++) {
                int row = ids[i] - 10, at = row * 9 + j;
                float want = row < 0 || row > 4   ? 0
                             : dtype == DTYPE_F32 ? table[at]
                             : dtype == DTYPE_F16 ? half_to_float(half[at])
                                                  : bfloat_to_float(brain[at]);
                CHECK(y[i * 11 + j] == want);
            }
    }
    fixture_close(f);
}

static void test_gather_scatter(void)
{
    struct fixture *f = fixture_open(2, 2);
    enum { N = 700, W = 37 };
    struct tensor x = fixture_2d(f, N, W, 3), y = fixture_2d(f, N, W, 0), back = fixture_2d(f, N, W, 1);
    int32_t *index = fixture_take(f, N * sizeof *index);
    for (int i = 0; i < N; i++) index[i] = (i * 13 + 5) % N;
    CHECK_OK(ops_gather_rows(&f->ops, y, x, index));
    for (int i = 0; i < N; i++) CHECK(fixture_same(fixture_row(y, i), fixture_row(x, index[i]), W * sizeof(float)));
    CHECK_OK(ops_scatter_rows(&f->ops, back, index, y));
    for (int i = 0; i < N; i++) CHECK(fixture_same(fixture_row(back, i), fixture_row(x, i), W * sizeof(float)));
    float before = fixture_row(back, index[0])[0];
    index[0] = -1;
    fixture_row(y, 0)[0] = before + 1;
    CHECK_OK(ops_scatter_rows(&f->ops, back, index, y));
    CHECK(fixture_row(back, 5)[0] == before);
    index[3] = N;
    CHECK_FAILS(ops_gather_rows(&f->ops, y, x, index), ERR_ARG, "index[0] is -1");
    CHECK_FAILS(ops_scatter_rows(&f->ops, y, index, x), ERR_ARG, "index[3] is 700");
    fixture_close(f);
}

static void test_unshard(void)
{
    struct fixture *f = fixture_open(2, 3);
    enum { RANKS = 3, N = 5, WIDEST = 7 };
    const int32_t count[RANKS] = {7, 6, 6};
    struct tensor shards = fixture_3d(f, RANKS, N, WIDEST, 0), y = fixture_2d(f, N, 19, 2);
    CHECK_OK(ops_unshard_columns(&f->ops, y, shards, count));
    for (int i = 0; i < N; i++)
        for (int r = 0, at = 0; r < RANKS; at += count[r++])
            CHECK(fixture_same(fixture_row(y, i) + at, (float *)shards.data + (r * N + i) * WIDEST,
                               (size_t)count[r] * sizeof(float)));
    fixture_close(f);
}

static void want_norm(float *y, const float *x, const float *w, const float *b, int n, double eps)
{
    double mean = 0, squares = 0;
    for (int i = 0; b && i < n; i++) mean += (double)x[i] / n;
    for (int i = 0; i < n; i++) squares += ((double)x[i] - mean) * ((double)x[i] - mean);
    for (int i = 0; i < n; i++)
        y[i] = (float)(((double)x[i] - mean) / sqrt(squares / n + eps) * (double)w[i] + (b ? (double)b[i] : 0));
}

static void test_norms(void)
{
    static const int widths[] = {1, 5, 16, 64, 100, 576, 1027};
    struct fixture *f = fixture_open(2, 4);
    for (int k = 0; k < 7; k++)
        for (int rows = 1; rows <= 51; rows += 50) {
            int n = widths[k];
            struct tensor x = fixture_2d(f, rows, n, k % 3), y = fixture_2d(f, rows, n, 1);
            struct tensor residual = fixture_2d(f, rows, n, 2);
            float *w = fixture_floats(f, n, 1), *b = fixture_floats(f, n, 1);
            float *want = fixture_take(f, sizeof(float) * (size_t)n), *sum = fixture_take(f, sizeof(float) * (size_t)n);
            CHECK_OK(ops_layer_norm(&f->ops, y, x, w, b, 1e-5f));
            want_norm(want, fixture_row(x, rows - 1), w, b, n, 1e-5);
            CHECK_CLOSE(fixture_row(y, rows - 1), want, n, 2e-5);
            for (int i = 0; i < n; i++) sum[i] = fixture_row(residual, rows - 1)[i] + fixture_row(x, rows - 1)[i];
            CHECK_OK(ops_add_rms_norm(&f->ops, y, residual, x, w, 1e-6f));
            want_norm(want, sum, w, NULL, n, 1e-6);
            CHECK_CLOSE(fixture_row(y, rows - 1), want, n, 2e-5);
            CHECK_CLOSE(fixture_row(residual, rows - 1), sum, n, 0);
            want_norm(want, fixture_row(x, 0), w, NULL, n, 1e-6);
            CHECK_OK(ops_rms_norm(&f->ops, x, x, w, 1e-6f)); /* in place */
            CHECK_CLOSE(fixture_row(x, 0), want, n, 2e-5);
        }
    fixture_close(f);
}

static void test_add(void)
{
    struct fixture *f = fixture_open(2, 5);
    struct tensor y = fixture_2d(f, 12, 33, 0), x = fixture_2d(f, 4, 33, 5), before = fixture_2d(f, 12, 33, 0);
    memcpy(before.data, y.data, tensor_bytes(y));
    CHECK_OK(ops_add(&f->ops, y, x));
    for (int i = 0; i < 12; i++)
        for (int j = 0; j < 33; j++)
            CHECK(fixture_row(y, i)[j] == fixture_row(before, i)[j] + fixture_row(x, i % 4)[j]);
    CHECK_FAILS(ops_add(&f->ops, y, tensor_rows(x, 0, 0)), ERR_ARG, "x has 0 rows");
    fixture_close(f);
}

static void test_rope(void)
{
    static const int dims[] = {2, 64, 72, 80, 96, 128};
    struct fixture *f = fixture_open(2, 6);
    for (int k = 0; k < 6; k++) {
        int dim = dims[k], half = dim / 2, n = 1 + 8 * k;
        struct tensor x = fixture_3d(f, n, 3, dim, 7), before = fixture_3d(f, n, 3, dim, 7);
        float *frequency = fixture_take(f, sizeof(float) * (size_t)half);
        int32_t *position = fixture_take(f, sizeof(int32_t) * (size_t)n);
        memcpy(before.data, x.data, sizeof(float) * (size_t)((n - 1) * x.stride[0] + 3 * dim));
        for (int i = 0; i < half; i++) frequency[i] = (float)pow(10000, -2.0 * i / dim);
        for (int i = 0; i < n; i++) position[i] = i * 97;
        CHECK_OK(ops_rope(&f->ops, x, position, frequency, 1.25f));
        for (int row = 0; row < n; row++)
            for (int at = 0; at < 3 * dim; at++) {
                int i = at % dim, pair = i < half ? at + half : at - half;
                double angle = (double)((float)position[row] * frequency[i % half]);
                double a = (double)fixture_row(before, row)[at], b = (double)fixture_row(before, row)[pair];
                double want = 1.25 * (i < half ? a * cos(angle) - b * sin(angle) : a * cos(angle) + b * sin(angle));
                CHECK(fabs((double)fixture_row(x, row)[at] - want) < 3e-6);
            }
    }
    fixture_close(f);
}

static double want_activation(double x, enum activation kind)
{
    switch (kind) {
    case ACTIVATION_SILU: return x / (1 + exp(-x));
    case ACTIVATION_GELU: return 0.5 * x * (1 + erf(x * sqrt(0.5)));
    case ACTIVATION_GELU_TANH: return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    default: return x / (1 + exp(-1.702 * x));
    }
}

static void test_activations(void)
{
    struct fixture *f = fixture_open(2, 7);
    for (int n = 1; n <= 1000; n += 333) {
        struct tensor gate_up = fixture_2d(f, 19, 2 * n, 3), y = fixture_2d(f, 19, n, 1);
        for (int i = 0; i < 19; i++) fixture_row(gate_up, i)[0] = (float)(i - 9) * 12;
        CHECK_OK(ops_swiglu(&f->ops, y, gate_up));
        for (int i = 0; i < 19; i++)
            for (int j = 0; j < n; j++) {
                double gate = (double)fixture_row(gate_up, i)[j], up = (double)fixture_row(gate_up, i)[n + j];
                double want = want_activation(gate, ACTIVATION_SILU) * up;
                CHECK(fabs((double)fixture_row(y, i)[j] - want) <= 1e-6 * fabs(want) + 1e-7);
            }
    }
    for (int kind = 0; kind < ACTIVATION_N; kind++) {
        float x[801];
        for (int i = 0; i < 801; i++) x[i] = (float)(i - 400) * 0.26f;
        CHECK_OK(ops_activate(&f->ops, tensor_2d(x, DTYPE_F32, 3, 267), (enum activation)kind));
        for (int i = 0; i < 801; i++) {
            double want = want_activation((double)((float)(i - 400) * 0.26f), (enum activation)kind);
            CHECK(fabs((double)x[i] - want) <= 2e-6 * fabs(want) + 1e-6);
        }
    }
    CHECK_FAILS(ops_activate(&f->ops, fixture_2d(f, 1, 1, 0), ACTIVATION_N), ERR_ARG, "kind");
    fixture_close(f);
}

static void test_patches(void)
{
    enum { SIZE = 31, PATCH = 7, SIDE = 4, COUNT = 2, ROW = 3 * PATCH * PATCH };
    struct fixture *f = fixture_open(2, 8);
    uint8_t *pixels = fixture_take(f, COUNT * SIZE * SIZE * 3);
    const float scale[3] = {0.1f, 0.2f, 0.3f}, shift[3] = {-1, 0, 2};
    struct tensor y = fixture_2d(f, COUNT * SIDE * SIDE, ROW, 4);
    for (int i = 0; i < COUNT * SIZE * SIZE * 3; i++) pixels[i] = (uint8_t)fixture_bits(f);
    CHECK_OK(ops_image_patches(&f->ops, y, pixels, COUNT, SIZE, PATCH, scale, shift));
    for (int row = 0; row < COUNT * SIDE * SIDE; row++)
        for (int at = 0; at < ROW; at++) {
            int c = at / (PATCH * PATCH), py = at / PATCH % PATCH, px = at % PATCH;
            int line = row % (SIDE * SIDE) / SIDE * PATCH + py, column = row % SIDE * PATCH + px;
            int value = pixels[((row / (SIDE * SIDE) * SIZE + line) * SIZE + column) * 3 + c];
            CHECK(fabsf(fixture_row(y, row)[at] - ((float)value * scale[c] + shift[c])) < 1e-5f);
        }
    CHECK_FAILS(ops_image_patches(&f->ops, y, pixels, COUNT, SIZE, 0, scale, shift), ERR_ARG, "patches of 0");
    fixture_close(f);
}

int main(void)
{
    return check_run("ops_layers", (struct check_case[]){{"embed", test_embed},
                                                         {"gather and scatter", test_gather_scatter},
                                                         {"unshard columns", test_unshard},
                                                         {"norms", test_norms},
                                                         {"add", test_add},
                                                         {"rope", test_rope},
                                                         {"activations", test_activations},
                                                         {"image patches", test_patches},
                                                         {0}});
}
