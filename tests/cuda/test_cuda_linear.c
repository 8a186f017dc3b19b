/* CUDA's linear against the CPU's: every number of rows that a decode step has, odd numbers of features, bias, float32
 * results, strided rows; and that neither another row nor another run changes a row. */
#include "tests/cuda/cuda_fixture.h"

struct variant {
    bool bias, wide; /* wide: y is float32 */
    int gap;         /* of y's rows; x's have half of it */
};

static void compare(struct cuda_fixture *f, int m, struct twin w, struct pair bias, struct variant v)
{
    const int n = (int)w.cpu.dim[0], k = (int)w.cpu.dim[1];
    struct twin x = twin_2d(f, m, k, v.gap / 2, 1);
    struct twin y = twin_make(f, v.wide ? DTYPE_F32 : f->dtype, m, n, -1, v.gap, 0);
    cuda_what(f, "linear %d rows, %d to %d%s%s, gap %d", m, k, n, v.bias ? ", bias" : "", v.wide ? ", float32" : "",
              v.gap);
    RUN(f, ops_linear(&f->gpu, y.gpu, x.gpu, w.gpu, v.bias ? bias.gpu : NULL));
    RUN(f, ops_linear(&f->cpu->ops, y.cpu, x.cpu, w.cpu, v.bias ? bias.cpu : NULL));
    twin_check(f, y, v.wide ? TOLERANCE_F32 : cuda_tolerance(f), "y");
}

/* One weight for all these numbers of rows; the variants take turns. */
static void compare_rows(struct cuda_fixture *f, int n, int k, const int *rows, int n_rows)
{
    struct twin w = twin_2d(f, n, k, 0, 1.0f / sqrtf((float)k));
    struct pair bias = pair_floats(f, n, 1, 0);
    for (int i = 0; i < n_rows; i++) {
        const unsigned turn = (unsigned)(i + n + k);
        compare(f, rows[i], w, bias, (struct variant){turn % 2, turn / 2 % 3 == 0, (int)(turn / 3 % 4) * 4});
        if (turn % 5 == 0) compare(f, rows[i], w, bias, (struct variant){turn % 3, turn / 2 % 3 != 0, 3});
    }
    cuda_clear(f);
}

static const int few[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17};
static const int many[] = {31, 64, 100, 577};

static void test_odd(void)
{
    static const int sizes[] = {1, 7, 72, 100, 576, 1000, 4304};
    struct cuda_fixture *f = cuda_begin(1);
    for (int i = 0; i < 7; i++)
        for (int j = 0; j < 7; j++) {
            if (f->effort == QUICK && (i > 4 || j > 4 || (i + j) % 3)) continue;
            if (f->effort == SOME && (i + j) % 3) continue;
            if (f->effort == QUICK)
                compare_rows(f, sizes[i], sizes[j], (const int[]){1, 3, 8, 17}, 4);
            else if ((i + j) % 2 == 0)
                compare_rows(f, sizes[i], sizes[j], few, 17);
            else
                compare_rows(f, sizes[i], sizes[j], (const int[]){1 + i, 8 + j, 31, 64}, 4);
            if (f->effort == ALL && (i * 3 + j) % 4 == 0) compare_rows(f, sizes[i], sizes[j], many, 4);
        }
    cuda_end(f);
}

/* The shapes of models, at the sizes of decode steps and prompts. */
static void test_models(void)
{
    static const int shapes[][2] = {{960, 576},   {576, 1536},   {3072, 576},   {6144, 4096},
                                    {4096, 4096}, {4096, 14336}, {15360, 5120}, {1152, 4304}};
    struct cuda_fixture *f = cuda_begin(2);
    static const int rows[] = {1, 8, 4, 2, 16, 32, 64, 256};
    for (int i = 0; i < (f->effort == QUICK ? 2 : 8); i++)
        compare_rows(f, shapes[i][0], shapes[i][1], rows, f->effort == QUICK ? 1 : f->effort == SOME ? 3 : 8);
    cuda_end(f);
}

/* A row gives the same bits again, and with other rows beside it. */
static void test_rows_apart(void)
{
    struct cuda_fixture *f = cuda_begin(3);
    struct twin w = twin_2d(f, 1000, 576, 0, 0.05f);
    for (int m = 1; m <= 64; m = m < 8 ? m + 1 : m * 2) {
        if (f->effort == QUICK && m > 3) break;
        const int row = m / 2;
        struct twin x = twin_2d(f, m, 576, 0, 1), y = twin_2d(f, m, 1000, 0, 0), again = twin_2d(f, m, 1000, 0, 0);
        struct twin other = twin_2d(f, m, 576, 0, 5), beside = twin_2d(f, m, 1000, 0, 0);
        memcpy(fixture_row(other.cpu, row), fixture_row(x.cpu, row), 576 * sizeof(float));
        twin_send(f, other, true);
        cuda_what(f, "linear %d rows twice", m);
        RUN(f, ops_linear(&f->gpu, y.gpu, x.gpu, w.gpu, NULL));
        RUN(f, ops_linear(&f->gpu, again.gpu, x.gpu, w.gpu, NULL));
        RUN(f, ops_linear(&f->gpu, beside.gpu, other.gpu, w.gpu, NULL));
        const uint16_t *a = twin_fetch(f, y), *b = twin_fetch(f, again), *c = twin_fetch(f, beside);
        const int64_t at = cuda_guard(f) + row * 1000;
        EXPECT(f, fixture_same(a, b, sizeof *a * (size_t)(y.span + 2 * cuda_guard(f))));
        EXPECT(f, fixture_same(a + at, c + at, sizeof *a * 1000));
    }
    cuda_end(f);
}

/* ---- the sizes of decode batches that have a kernel of their own: 9 to 32 rows ---- */

enum { DECODE_LEAST = 9, DECODE_MOST = 32 };

/* kernels/cuda/cuda.h's: whether our own kernel takes the shape, of which more is true than of the library's. */
struct cuda;
bool cuda__linear_rows_fits(const struct cuda *c, struct tensor y, struct tensor x, struct tensor w);

/* Every number of rows, and one more; tiles of w that are whole, cut, or shared by blocks; columns that end within a
 * step. The last gap leaves x misaligned, which is the library's. */
static void test_decode_rows(void)
{
    static const int shapes[][2] = {{384, 576}, {128, 64}, {130, 72}, {1000, 1000}, {2048, 4096}, {8448, 1024}};
    static const int gaps[] = {0, 16, 0, 32, 48, 6};
    struct cuda_fixture *f = cuda_begin(5);
    for (int i = 0; i < (f->effort == QUICK ? 1 : 6); i++) {
        const int n = shapes[i][0], k = shapes[i][1], step = f->effort == QUICK ? 12 : f->effort == SOME ? 4 : 1;
        struct twin w = twin_2d(f, n, k, i == 3 ? 8 : 0, 1.0f / sqrtf((float)k));
        struct pair bias = pair_floats(f, n, 1, 0);
        for (int m = DECODE_LEAST; m <= DECODE_MOST + 1; m += step) {
            const struct variant v = {m / 2 % 2, (m + i) % 5 == 0, gaps[(m + i) % 6]};
            compare(f, m, w, bias, v);
            if (m > DECODE_MOST) compare(f, DECODE_MOST, w, bias, v);
        }
        cuda_clear(f);
    }
    cuda_end(f);
}

/* Some of the rows of `all` are the same bits as when they were computed with all. */
static void check_same_rows(struct cuda_fixture *f, struct twin all, struct twin part, int first)
{
    const size_t size = dtype_size(all.gpu.dtype), row = (size_t)all.cpu.dim[1] * size;
    const char *a = twin_fetch(f, all), *b = twin_fetch(f, part);
    const size_t guard = (size_t)cuda_guard(f) * size, bytes = (size_t)part.cpu.dim[0] * row;
    EXPECT(f, fixture_same(a + guard + (size_t)first * row, b + guard, bytes));
}

static void compare_batches(struct cuda_fixture *f, int n, int k, bool wide, bool gated)
{
    struct twin w = twin_2d(f, gated ? 2 * n : n, k, 0, 0.05f), x = twin_2d(f, DECODE_MOST, k, 0, 1);
    struct twin room = twin_2d(f, DECODE_MOST, 2 * n, 0, 0), y[DECODE_MOST + 1];
    for (int m = DECODE_MOST; m >= DECODE_LEAST; m -= f->effort == ALL ? 1 : 11) {
        const int first = (DECODE_MOST - m) * 5 / 7;
        const struct twin rows = twin_rows(x, first, m);
        y[m] = twin_make(f, wide ? DTYPE_F32 : f->dtype, m, n, -1, 0, 0);
        cuda_what(f, "linear%s rows [%d, %d) of %d, %d to %d%s", gated ? "_swiglu" : "", first, first + m, DECODE_MOST,
                  k, n, wide ? ", float32" : "");
        if (!cuda__linear_rows_fits((const struct cuda *)f->gpu.impl, y[m].gpu, rows.gpu, w.gpu)) continue;
        if (gated)
            RUN(f, ops_linear_swiglu(&f->gpu, y[m].gpu, twin_rows(room, 0, m).gpu, rows.gpu, w.gpu, NULL));
        else
            RUN(f, ops_linear(&f->gpu, y[m].gpu, rows.gpu, w.gpu, NULL));
        check_same_rows(f, y[DECODE_MOST], y[m], first);
    }
    cuda_clear(f);
}

/* Requests come and go: what a sequence computes must not change with their number. */
static void test_batches_alike(void)
{
    struct cuda_fixture *f = cuda_begin(6);
    compare_batches(f, 384, 576, false, false);
    compare_batches(f, 192, 576, false, true);
    if (f->effort != QUICK) {
        compare_batches(f, 2048, 4096, false, false);
        compare_batches(f, 1000, 1096, true, false);
        compare_batches(f, 1536, 2048, false, true);
    }
    cuda_end(f);
}

/* ---- with the gate ---- */

static void compare_gated(struct cuda_fixture *f, int m, int features, int k, bool with_bias, int gap)
{
    struct twin w = twin_2d(f, 2 * features, k, 0, 1.5f / sqrtf((float)k)), x = twin_2d(f, m, k, gap, 1);
    struct twin y = twin_2d(f, m, features, gap, 0), gate_up = twin_2d(f, m, 2 * features, gap / 2 * 2, 0);
    struct pair bias = pair_floats(f, 2 * features, 1, 0);
    cuda_what(f, "linear_swiglu %d rows, %d to 2 x %d%s, gap %d", m, k, features, with_bias ? ", bias" : "", gap);
    RUN(f, ops_linear_swiglu(&f->gpu, y.gpu, gate_up.gpu, x.gpu, w.gpu, with_bias ? bias.gpu : NULL));
    RUN(f, ops_linear_swiglu(&f->cpu->ops, y.cpu, gate_up.cpu, x.cpu, w.cpu, with_bias ? bias.cpu : NULL));
    twin_check(f, y, cuda_tolerance(f), "y");
    twin_check_poison(f, gate_up, twin_fetch(f, gate_up), "gate_up");
    cuda_clear(f);
}

static void test_gated(void)
{
    static const int shapes[][2] = {{1, 7}, {7, 64}, {8, 72}, {100, 576}, {1536, 576}, {1000, 100}, {4304, 1152}};
    static const int rows[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 64, 300};
    struct cuda_fixture *f = cuda_begin(4);
    for (int i = 0; i < (f->effort == QUICK ? 4 : 7); i++)
        for (int j = 0; j < 12; j++) {
            if (f->effort == QUICK && (i + j) % 4) continue;
            if (f->effort == SOME && (i + j) % 2) continue;
            compare_gated(f, rows[j], shapes[i][0], shapes[i][1], (i + j) % 3 == 0, (i + j) % 4 * 8);
        }
    for (int m = DECODE_LEAST; m <= DECODE_MOST; m += f->effort == ALL ? 1 : f->effort == SOME ? 7 : 23) {
        compare_gated(f, m, m % 2 ? 192 : 1000, 576, m % 3 == 0, m % 4 * 8);
        if (f->effort != QUICK && m % 8 == 1) compare_gated(f, m, 2048, 1096, m % 3 == 1, m % 5 * 2);
    }
    if (f->effort == ALL) {
        compare_gated(f, 1, 14336, 4096, false, 0);
        compare_gated(f, 4, 13824, 5120, false, 0);
    }
    cuda_end(f);
}

int main(int argc, char **argv)
{
    const struct check_case cases[] = {{"odd shapes", test_odd},
                                       {"shapes of models", test_models},
                                       {"rows apart", test_rows_apart},
                                       {"decode batches", test_decode_rows},
                                       {"batches alike", test_batches_alike},
                                       {"with the gate", test_gated},
                                       {0}};
    return cuda_main("cuda_linear", cases, argc, argv);
}
