/* CUDA against CPU, op by op: rows and tokens, norms, sums, rope, activations, image patches. */
#include "tests/cuda/cuda_fixture.h"

/* ---- rows ---- */

static void compare_embed(struct cuda_fixture *f, enum dtype dtype, int rows, int n, int hidden, int first_row, int gap)
{
    struct twin table = twin_make(f, dtype, rows, hidden, -1, 0, 1), y = twin_2d(f, n, hidden, gap, 0);
    int32_t *ids = fixture_take(f->cpu, sizeof *ids * (size_t)n);
    for (int i = 0; i < n; i++) ids[i] = i % 7 == 3 ? -1 - i : fixture_int(f->cpu, first_row - 2, first_row + rows + 1);
    struct pair id = pair_of(f, ids, sizeof *ids * (size_t)n);
    cuda_what(f, "embed %d of %d x %d from %d on, %s", n, rows, hidden, first_row, dtype_name(dtype));
    int rc = ops_embed(&f->gpu, y.gpu, table.gpu, id.gpu, first_row);
    if (rc == ERR_UNSUPPORTED && dtype != f->dtype) return; /* tables are stored in the activation dtype */
    RUN(f, rc);
    RUN(f, ops_embed(&f->cpu->ops, y.cpu, table.cpu, id.cpu, first_row));
    twin_check(f, y, 0, "y");
}

static void test_embed(void)
{
    struct cuda_fixture *f = cuda_begin(1);
    compare_embed(f, f->dtype, 50, 20, 64, 10, 0);
    compare_embed(f, f->dtype, 33, 9, 7, 0, 3);
    if (f->effort > QUICK) {
        compare_embed(f, f->dtype, 3000, 1, 4096, 3000, 0);
        compare_embed(f, f->dtype, 1000, 2880, 5120, 0, 8);
        compare_embed(f, f->dtype, 1000, 700, 577, 5, 1);
        compare_embed(f, DTYPE_F32, 40, 30, 576, 7, 0);
        compare_embed(f, f->dtype == DTYPE_F16 ? DTYPE_BF16 : DTYPE_F16, 40, 30, 100, 7, 0);
    }
    cuda_end(f);
}

static void compare_gather(struct cuda_fixture *f, enum dtype dtype, int rows, int n, int width, int gap)
{
    struct twin x = twin_make(f, dtype, rows, width, -1, gap, 1), y = twin_make(f, dtype, n, width, -1, 2 * gap, 0);
    struct twin back = twin_make(f, dtype, rows, width, -1, 1, 1);
    int32_t *index = fixture_take(f->cpu, sizeof *index * (size_t)n);
    for (int i = 0; i < n; i++) index[i] = fixture_int(f->cpu, 0, rows - 1);
    struct pair from = pair_of(f, index, sizeof *index * (size_t)n);
    cuda_what(f, "gather %d of %d rows of %d, %s", n, rows, width, dtype_name(dtype));
    RUN(f, ops_gather_rows(&f->gpu, y.gpu, x.gpu, from.gpu));
    RUN(f, ops_gather_rows(&f->cpu->ops, y.cpu, x.cpu, from.cpu));
    twin_check(f, y, 0, "y");
    char *used = fixture_take(f->cpu, (size_t)rows); /* no row twice: which came last would be left to chance */
    for (int i = 0; i < n; i++) index[i] = i % 5 == 2 || used[index[i]]++ ? -1 : index[i];
    struct pair to = pair_of(f, index, sizeof *index * (size_t)n);
    cuda_what(f, "scatter %d to %d rows of %d, %s", n, rows, width, dtype_name(dtype));
    RUN(f, ops_scatter_rows(&f->gpu, back.gpu, to.gpu, y.gpu));
    RUN(f, ops_scatter_rows(&f->cpu->ops, back.cpu, to.cpu, y.cpu));
    twin_check(f, back, 0, "y");
}

/* Rows that are not there: the op may do what it likes with its own rows, and leaves everything else alone. */
static void wild_index(struct cuda_fixture *f)
{
    struct twin x = twin_2d(f, 10, 40, 0, 1), y = twin_2d(f, 4, 40, 8, 1);
    const int32_t wild[4] = {-1, 10, INT32_MAX, INT32_MIN}, beyond[4] = {4, 1 << 30, -7, INT32_MAX};
    struct pair a = pair_of(f, wild, sizeof wild), b = pair_of(f, beyond, sizeof beyond);
    cuda_what(f, "rows that are not there");
    RUN(f, ops_gather_rows(&f->gpu, y.gpu, x.gpu, a.gpu));
    twin_check_poison(f, y, twin_fetch(f, y), "y");
    struct twin z = twin_2d(f, 4, 40, 8, 1);
    RUN(f, ops_scatter_rows(&f->gpu, z.gpu, b.gpu, twin_rows(x, 0, 4).gpu));
    twin_check(f, z, 0, "y of a scatter to no row");
}

static void test_gather_scatter(void)
{
    struct cuda_fixture *f = cuda_begin(2);
    compare_gather(f, f->dtype, 40, 20, 64, 0);
    compare_gather(f, f->dtype, 40, 20, 7, 1);
    wild_index(f);
    if (f->effort > QUICK) {
        compare_gather(f, f->dtype, 2880, 577, 4096, 8);
        compare_gather(f, f->dtype, 577, 1, 5120, 0);
        compare_gather(f, DTYPE_F32, 64, 64, 1001, 3);
    }
    cuda_end(f);
}

static void compare_unshard(struct cuda_fixture *f, enum dtype dtype, int n, const int32_t *count, int ranks, int gap)
{
    int widest = 0, columns = 0;
    for (int r = 0; r < ranks; r++) columns += count[r], widest = count[r] > widest ? count[r] : widest;
    struct twin shards = twin_make(f, dtype, ranks, n, widest, 0, 1), y = twin_make(f, dtype, n, columns, -1, gap, 0);
    cuda_what(f, "unshard %d rows of %d columns from %d ranks, %s", n, columns, ranks, dtype_name(dtype));
    RUN(f, ops_unshard_columns(&f->gpu, y.gpu, shards.gpu, count));
    for (int i = 0; i < n; i++) /* the CPU op has no 16-bit form; its float32 one is a copy all the same */
        for (int r = 0, at = 0; r < ranks; at += count[r++])
            memcpy(fixture_row(y.cpu, i) + at, (float *)shards.cpu.data + ((int64_t)r * n + i) * widest,
                   sizeof(float) * (size_t)count[r]);
    twin_check(f, y, 0, "y");
}

static void test_unshard(void)
{
    struct cuda_fixture *f = cuda_begin(3);
    compare_unshard(f, DTYPE_F32, 5, (const int32_t[]){7, 6, 6}, 3, 2);
    compare_unshard(f, f->dtype, 3, (const int32_t[]){64, 64}, 2, 0);
    compare_unshard(f, DTYPE_F32, 4, (const int32_t[]){9, 0, 5, 1}, 4, 0);
    if (f->effort > QUICK) {
        compare_unshard(f, DTYPE_F32, 64, (const int32_t[]){16000, 16000}, 2, 0);
        compare_unshard(f, f->dtype, 33, (const int32_t[]){4008, 4007, 4007, 4007}, 4, 1);
        compare_unshard(f, DTYPE_F32, 1, (const int32_t[]){50000}, 1, 0);
    }
    cuda_end(f);
}

/* ---- norms and sums ---- */

static void compare_norms(struct cuda_fixture *f, int rows, int n, int gap)
{
    const double tolerance = cuda_tolerance(f);
    struct ops *gpu = &f->gpu, *cpu = &f->cpu->ops;
    struct pair w = pair_floats(f, n, 0.3f, 1), b = pair_floats(f, n, 0.5f, 0);
    struct twin x = twin_2d(f, rows, n, gap, 2), y = twin_2d(f, rows, n, 1, 0), z = twin_2d(f, rows, n, gap, 0);
    struct twin residual = twin_2d(f, rows, n, gap, 3);
    cuda_what(f, "rms_norm %d x %d, gap %d", rows, n, gap);
    RUN(f, ops_rms_norm(gpu, y.gpu, x.gpu, w.gpu, 1e-5f));
    RUN(f, ops_rms_norm(cpu, y.cpu, x.cpu, w.cpu, 1e-5f));
    twin_check(f, y, tolerance, "y");
    twin_check(f, x, 0, "x");
    cuda_what(f, "add_rms_norm %d x %d, gap %d", rows, n, gap);
    RUN(f, ops_add_rms_norm(gpu, z.gpu, residual.gpu, x.gpu, w.gpu, 1e-6f));
    RUN(f, ops_add_rms_norm(cpu, z.cpu, residual.cpu, x.cpu, w.cpu, 1e-6f));
    twin_check(f, z, tolerance, "y");
    twin_check(f, residual, 0, "residual");
    cuda_what(f, "rms_norm in place %d x %d, gap %d", rows, n, gap);
    RUN(f, ops_rms_norm(gpu, x.gpu, x.gpu, w.gpu, 1e-5f));
    RUN(f, ops_rms_norm(cpu, x.cpu, x.cpu, w.cpu, 1e-5f));
    twin_check(f, x, tolerance, "x");
    if (n == 1) return; /* nothing but the bias is left */
    struct twin u = twin_2d(f, rows, n, gap, 2), v = twin_2d(f, rows, n, gap, 0);
    for (int r = 0; r < rows; r++) /* far from zero, where a variance by differences would cancel */
        for (int i = 0; i < n; i++)
            fixture_row(u.cpu, r)[i] = cuda_round(fixture_row(u.cpu, r)[i] + 8 * (float)(r % 3), f->dtype);
    twin_send(f, u, true);
    cuda_what(f, "layer_norm %d x %d, gap %d", rows, n, gap);
    RUN(f, ops_layer_norm(gpu, v.gpu, u.gpu, w.gpu, b.gpu, 1e-5f));
    RUN(f, ops_layer_norm(cpu, v.cpu, u.cpu, w.cpu, b.cpu, 1e-5f));
    twin_check(f, v, tolerance, "y");
}

static void test_norms(void)
{
    static const int widths[] = {1, 5, 16, 64, 100, 576, 1024, 1027, 1152, 4096, 5120, 8192, 14336};
    struct cuda_fixture *f = cuda_begin(4);
    static const int rows[] = {1, 3, 51};
    for (int i = 0; i < (f->effort == QUICK ? 8 : 13); i += f->effort == QUICK ? 2 : 1)
        for (int j = 0; j < (f->effort == QUICK ? 2 : 3); j++) {
            compare_norms(f, rows[j], widths[i], i % 3 * 4);
            cuda_clear(f);
        }
    compare_norms(f, f->effort == QUICK ? 2 : 577, 1024, 0);
    cuda_end(f);
}

static void compare_add(struct cuda_fixture *f, int rows, int repeated, int n, int gap)
{
    struct twin y = twin_2d(f, rows, n, gap, 1), x = twin_2d(f, repeated, n, 2 * gap, 1);
    cuda_what(f, "add %d rows to %d, %d columns, gap %d", repeated, rows, n, gap);
    RUN(f, ops_add(&f->gpu, y.gpu, x.gpu));
    RUN(f, ops_add(&f->cpu->ops, y.cpu, x.cpu));
    twin_check(f, y, 0, "y");
    twin_check(f, x, 0, "x");
}

static void test_add(void)
{
    struct cuda_fixture *f = cuda_begin(5);
    compare_add(f, 12, 4, 33, 5);
    compare_add(f, 1, 1, 4096, 0);
    compare_add(f, 5, 1, 8, 8);
    if (f->effort > QUICK) {
        compare_add(f, 3 * 577, 577, 1024, 0);
        compare_add(f, 2 * 729, 729, 1152, 4);
        compare_add(f, 64, 64, 5120, 0);
        compare_add(f, 2880, 2880, 1027, 1);
    }
    cuda_end(f);
}

/* ---- rope, activations, patches ---- */

/* q and k of a fused product, or all heads of a tensor with a gap; positions up to far out in a long context. */
static void compare_rope(struct cuda_fixture *f, int rows, int heads, int dim, int gap, int farthest)
{
    const int half = dim / 2;
    struct twin all = twin_2d(f, rows, (heads + 2) * dim, gap, 1), x = twin_heads(all, dim, heads, dim);
    float *frequency = fixture_take(f->cpu, sizeof(float) * (size_t)half);
    int32_t *position = fixture_take(f->cpu, sizeof(int32_t) * (size_t)rows);
    for (int i = 0; i < half; i++) frequency[i] = (float)pow(10000, -2.0 * i / dim);
    for (int i = 0; i < rows; i++) position[i] = i == 0 ? farthest : fixture_int(f->cpu, 0, farthest);
    struct pair at = pair_of(f, position, sizeof(int32_t) * (size_t)rows);
    struct pair turn = pair_of(f, frequency, sizeof(float) * (size_t)half);
    const float scale = rows % 2 ? 1 : 1.25f;
    cuda_what(f, "rope %d x %d x %d, gap %d, up to position %d", rows, heads, dim, gap, farthest);
    RUN(f, ops_rope(&f->gpu, x.gpu, at.gpu, turn.gpu, scale));
    RUN(f, ops_rope(&f->cpu->ops, x.cpu, at.cpu, turn.cpu, scale));
    twin_check(f, all, cuda_tolerance(f), "x");
}

static void test_rope(void)
{
    static const int dims[] = {2, 8, 16, 64, 72, 80, 96, 128};
    struct cuda_fixture *f = cuda_begin(6);
    for (int i = 0; i < 8; i += f->effort == QUICK ? 3 : 1) {
        compare_rope(f, 1, 1 + i, dims[i], 0, 4000);
        compare_rope(f, 1 + 8 * i, 3, dims[i], i % 2 ? 3 : 8, 131071);
        if (f->effort == ALL) compare_rope(f, 577, 40, dims[i], 0, 2880);
        cuda_clear(f);
    }
    cuda_end(f);
}

static void compare_swiglu(struct cuda_fixture *f, int rows, int n, int gap)
{
    struct twin gate_up = twin_2d(f, rows, 2 * n, gap, 2), y = twin_2d(f, rows, n, 2 * gap, 0);
    for (int i = 0; i < rows; i++)
        fixture_row(gate_up.cpu, i)[0] = cuda_round((float)((i + 19) % 25 - 9) * 12, f->dtype); /* -108 .. 180 */
    twin_send(f, gate_up, true);
    cuda_what(f, "swiglu %d x %d, gap %d", rows, n, gap);
    RUN(f, ops_swiglu(&f->gpu, y.gpu, gate_up.gpu));
    RUN(f, ops_swiglu(&f->cpu->ops, y.cpu, gate_up.cpu));
    twin_check(f, y, cuda_tolerance(f), "y");
}

static void compare_activate(struct cuda_fixture *f, enum activation kind, int rows, int n, int gap)
{
    struct twin x = twin_2d(f, rows, n, gap, 4);
    for (int i = 0; i < rows && n > 1; i++) /* both tails */
        for (int j = 0; j < n; j += 7) fixture_row(x.cpu, i)[j] = cuda_round((float)(i * 31 + j) * 0.1f - 40, f->dtype);
    twin_send(f, x, true);
    cuda_what(f, "activation %d, %d x %d, gap %d", (int)kind, rows, n, gap);
    RUN(f, ops_activate(&f->gpu, x.gpu, kind));
    RUN(f, ops_activate(&f->cpu->ops, x.cpu, kind));
    twin_check(f, x, cuda_tolerance(f), "x");
}

static void test_activations(void)
{
    struct cuda_fixture *f = cuda_begin(7);
    static const int widths[] = {1, 7, 100, 512, 1001, 1536, 4304, 13824};
    for (int i = 0; i < 8; i += f->effort == QUICK ? 3 : 1) {
        compare_swiglu(f, 19, widths[i], i % 3);
        compare_swiglu(f, 1, widths[i], 0);
        if (f->effort == ALL) compare_swiglu(f, 130, widths[i], 8);
        for (int kind = 0; kind < ACTIVATION_N; kind++)
            compare_activate(f, (enum activation)kind, 1 + i * (f->effort == ALL ? 40 : 2), widths[i], i % 2 * 5);
        cuda_clear(f);
    }
    cuda_end(f);
}

static void compare_patches(struct cuda_fixture *f, int images, int size, int patch, int gap)
{
    const int64_t side = size / patch;
    const float scale[3] = {1 / 68.5f, 1 / 66.6f, 1 / 70.3f}, shift[3] = {-1.8f, -1.75f, -1.48f};
    struct twin y = twin_2d(f, images * side * side, 3 * (int64_t)patch * patch, gap, 0);
    struct pair pixels = pair_of(f, NULL, (size_t)images * (size_t)size * (size_t)size * 3);
    for (size_t i = 0; i < pixels.bytes; i++) ((uint8_t *)pixels.cpu)[i] = (uint8_t)fixture_bits(f->cpu);
    pair_send(f, pixels);
    cuda_what(f, "patches of %d, %d images of %d", patch, images, size);
    RUN(f, ops_image_patches(&f->gpu, y.gpu, pixels.gpu, images, size, patch, scale, shift));
    RUN(f, ops_image_patches(&f->cpu->ops, y.cpu, pixels.cpu, images, size, patch, scale, shift));
    twin_check(f, y, cuda_tolerance(f), "y");
}

static void test_patches(void)
{
    struct cuda_fixture *f = cuda_begin(8);
    compare_patches(f, 2, 31, 7, 4);
    compare_patches(f, 1, 28, 14, 0);
    if (f->effort > QUICK) {
        compare_patches(f, 3, 336, 14, 0);
        compare_patches(f, 1, 384, 14, 12); /* SigLIP: six pixels are left over */
        compare_patches(f, 2, 224, 16, 0);
    }
    cuda_end(f);
}

int main(int argc, char **argv)
{
    const struct check_case cases[] = {{"embed", test_embed},
                                       {"gather and scatter", test_gather_scatter},
                                       {"unshard columns", test_unshard},
                                       {"norms", test_norms},
                                       {"add", test_add},
                                       {"rope", test_rope},
                                       {"activations", test_activations},
                                       {"image patches", test_patches},
                                       {0}};
    return cuda_main("cuda_layers", cases, argc, argv);
}
