/* The CUDA backend beside its kernels: copies of all sizes, order of ops and marks, filling with random weights to the
 * CPU's bits, ceilings, errors that name what is wrong. */
#include "tests/cuda/cuda_fixture.h"

/* ---- copies ---- */

static void fill_bytes(struct cuda_fixture *f, unsigned char *x, size_t n)
{
    uint64_t bits = fixture_bits(f->cpu);
    for (size_t i = 0; i < n; i++) {
        if (i % 8 == 0) bits = hash_splitmix(bits);
        x[i] = (unsigned char)(bits >> i % 8 * 8);
    }
}

/* Up to an odd address and down again; the host's memory is free for other use as soon as ops_upload returns. */
static void compare_copies(struct cuda_fixture *f, size_t bytes, size_t offset)
{
    unsigned char *a = malloc(bytes + 1), *b = malloc(bytes + 1), *c = malloc(bytes + 1);
    if (!a || !b || !c) abort();
    char *to = cuda_take(f, bytes + offset + 16), *copy = cuda_take(f, bytes + 16);
    fill_bytes(f, a, bytes);
    memcpy(b, a, bytes);
    cuda_what(f, "copies of %zu bytes at offset %zu", bytes, offset);
    RUN(f, ops_upload(&f->gpu, to + offset, b, bytes));
    memset(b, 0x55, bytes);
    RUN(f, ops_copy(&f->gpu, copy, to + offset, bytes));
    RUN(f, ops_zero(&f->gpu, to + offset, bytes));
    RUN(f, ops_download(&f->gpu, b, copy, bytes));
    RUN(f, ops_download(&f->gpu, c, to + offset, bytes));
    EXPECT(f, fixture_same(a, b, bytes));
    size_t other = 0;
    for (size_t i = 0; i < bytes; i++) other += c[i] != 0;
    EXPECT(f, other == 0);
    free(a), free(b), free(c);
    cuda_clear(f);
}

static void test_copies(void)
{
    static const size_t sizes[] = {1, 3, 16, 255, 4097, 65536, 1048577, 8388608, 33554435, 104857603};
    struct cuda_fixture *f = cuda_begin(1);
    for (int i = 0; i < (f->effort == QUICK ? 6 : 10); i++) compare_copies(f, sizes[i], (size_t)(i % 4) * 5);
    unsigned char zero[1000] = {0}, got[1000];
    cuda_what(f, "memory as it is taken");
    RUN(f, ops_download(&f->gpu, got, cuda_take(f, 1000), 1000));
    EXPECT(f, fixture_same(got, zero, 1000));
    RUN(f, ops_upload(&f->gpu, NULL, NULL, 0));
    RUN(f, ops_download(&f->gpu, NULL, NULL, 0));
    cuda_end(f);
}

/* Thousands of small uploads between ops that use them: none may overtake another, or wait for long. */
static void test_small_uploads(void)
{
    enum { N = 3000, WIDTH = 64 };
    struct cuda_fixture *f = cuda_begin(2);
    const int n = f->effort == QUICK ? 100 : N;
    struct twin x = twin_2d(f, n, WIDTH, 0, 1), y = twin_2d(f, n, WIDTH, 0, 0);
    int32_t *one = cuda_take(f, sizeof(int32_t));
    cuda_what(f, "%d small uploads", n);
    for (int i = 0; i < n; i++) {
        int32_t index = (i * 7 + 1) % n;
        RUN(f, ops_upload(&f->gpu, one, &index, sizeof index));
        RUN(f, ops_gather_rows(&f->gpu, tensor_rows(y.gpu, i, 1), x.gpu, one));
        memcpy(fixture_row(y.cpu, i), fixture_row(x.cpu, index), WIDTH * sizeof(float));
    }
    twin_check(f, y, 0, "y");
    cuda_end(f);
}

/* What is marked comes down as it was at the mark, while later ops go on. */
static void test_marks(void)
{
    enum { TOKENS = 64 };
    struct cuda_fixture *f = cuda_begin(3);
    const int side = f->effort == QUICK ? 64 : 4096;
    struct twin x = twin_2d(f, side, side, 0, 1), w = twin_2d(f, side, side, 0, 0.02f),
                y = twin_2d(f, side, side, 0, 1);
    int32_t *result[2] = {cuda_take(f, TOKENS * 4), cuda_take(f, TOKENS * 4)}, want[2][TOKENS], got[TOKENS];
    double waited = 0, busy = 0;
    cuda_what(f, "marks");
    for (int i = 0; i < 6; i++) {
        for (int j = 0; j < TOKENS; j++) want[i % 2][j] = i * 1000 + j;
        RUN(f, ops_upload(&f->gpu, result[i % 2], want[i % 2], sizeof want[0]));
        RUN(f, ops_mark(&f->gpu, i % 2));
        double start = clock_seconds();
        for (int j = 0; j < 10; j++) RUN(f, ops_linear(&f->gpu, y.gpu, x.gpu, w.gpu, NULL));
        if (i) { /* the step before this one, while the linears run */
            RUN(f, ops_download_marked(&f->gpu, got, result[(i - 1) % 2], sizeof got, (i - 1) % 2));
            EXPECT(f, fixture_same(got, want[(i - 1) % 2], sizeof got));
        }
        RUN(f, ops_download_marked(&f->gpu, got, result[i % 2], sizeof got, i % 2));
        EXPECT(f, fixture_same(got, want[i % 2], sizeof got));
        waited += clock_seconds() - start;
        RUN(f, ops_finish(&f->gpu));
        busy += clock_seconds() - start;
    }
    printf("(results came after %.2f ms of %.2f) ", waited * 1e3, busy * 1e3);
    cuda_end(f);
}

/* ---- random weights ---- */

static void compare_fill(struct cuda_fixture *f, enum dtype dtype, int64_t rows, int64_t cols, int gap,
                         int64_t first_row, int64_t first_column)
{
    const size_t size = dtype_size(dtype), bytes = (size_t)(rows * (cols + gap)) * size;
    struct tensor cpu = tensor_2d(fixture_take(f->cpu, bytes), dtype, rows, cols), gpu = cpu;
    struct pair p = pair_of(f, NULL, bytes);
    cpu.stride[0] = gpu.stride[0] = cols + gap;
    gpu.data = p.gpu;
    cpu.data = p.cpu;
    cuda_what(f, "fill %lld x %lld of %s, gap %d", (long long)rows, (long long)cols, dtype_name(dtype), gap);
    RUN(f, ops_fill_normal(&f->gpu, gpu, 77, 0.02f, first_row, first_column, 2 * cols + first_column));
    RUN(f, ops_fill_normal(&f->cpu->ops, cpu, 77, 0.02f, first_row, first_column, 2 * cols + first_column));
    EXPECT(f, fixture_same(pair_fetch(f, p), p.cpu, bytes));
    cuda_clear(f);
}

static void test_fill(void)
{
    struct cuda_fixture *f = cuda_begin(4);
    for (int dtype = DTYPE_F32; dtype <= DTYPE_BF16; dtype++) {
        compare_fill(f, (enum dtype)dtype, 5, 7, 0, 0, 0);
        compare_fill(f, (enum dtype)dtype, 33, 100, 3, 12, 50);
        if (f->effort > QUICK) compare_fill(f, (enum dtype)dtype, 1000, 4304, 0, 100000, 8192);
    }
    if (f->effort == ALL) compare_fill(f, f->dtype, 4096, 5120, 0, 2000000, 0);
    cuda_end(f);
}

/* ---- the rest ---- */

static void test_ceilings(void)
{
    struct cuda_fixture *f = cuda_begin(5);
    struct ops_ceilings c = {0};
    size_t before = 0, after = 0, total = 0;
    cuda_what(f, "ceilings");
    if (f->effort == ALL) {
        RUN(f, ops_memory_free(&f->gpu, &before, &total));
        RUN(f, ops_ceilings(&f->gpu, (size_t)1 << 30, &c));
        RUN(f, ops_memory_free(&f->gpu, &after, &total));
        printf("(gemm %.0f TFLOP/s, gemv %.0f GB/s, copy %.0f GB/s) ", c.gemm_tflops, c.gemv_gbs, c.copy_gbs);
        EXPECT(f, c.gemm_tflops > 20 && c.gemm_tflops < 3000);
        EXPECT(f, c.gemv_gbs > 100 && c.gemv_gbs < 10000);
        EXPECT(f, c.copy_gbs > 100 && c.copy_gbs < 10000);
        EXPECT(f, after + ((size_t)256 << 20) > before && total >= before); /* given back */
    }
    cuda_end(f);
}

/* What callers may get wrong, and memory that is not there; the backend works on after each. */
static void test_errors(void)
{
    struct cuda_fixture *f = cuda_begin(6);
    struct ops other;
    void *memory = NULL;
    size_t left = 0, total = 0;
    cuda_what(f, "errors");
    EXPECT(f, ops_open(&other, "cuda", 4096, 1) != OK && strstr(status_message(), "4096"));
    ops_close(&other);
    RUN(f, ops_memory_free(&f->gpu, &left, &total));
    EXPECT(f, left > 0 && left <= total);
    if (f->effort > QUICK) /* compute-sanitizer counts the refusal as an error */
        EXPECT(f, ops_memory_take(&f->gpu, total * 2, &memory) == ERR_NOMEM && memory == NULL);
    struct twin x = twin_2d(f, 3, 8, 0, 1), wrong = twin_make(f, DTYPE_F32, 3, 8, -1, 0, 1), y = twin_2d(f, 3, 8, 0, 0);
    struct pair w = pair_floats(f, 8, 1, 0);
    EXPECT(f, ops_rms_norm(&f->gpu, wrong.gpu, x.gpu, w.gpu, 1e-5f) == ERR_ARG);
    RUN(f, ops_rms_norm(&f->gpu, y.gpu, x.gpu, w.gpu, 1e-5f));
    RUN(f, ops_rms_norm(&f->cpu->ops, y.cpu, x.cpu, w.cpu, 1e-5f));
    twin_check(f, y, cuda_tolerance(f), "y");
    cuda_end(f);
}

/* Padded sizes of decode steps: enough for the rows, never shrinking, not much more than they need, and the same for a
 * size that is one already. */
static void test_buckets(void)
{
    struct cuda_fixture *f = cuda_begin(7);
    cuda_what(f, "buckets");
    for (int n = 1, last = 0; n <= 1024; n++) {
        const int bucket = ops_bucket(&f->gpu, n);
        EXPECT(f, bucket >= n && bucket >= last && bucket < 2 * n + 8 && ops_bucket(&f->gpu, bucket) == bucket);
        last = bucket;
    }
    cuda_end(f);
}

/* ---- who watches a wait ---- */

struct watcher {
    int n_asked, fails_at;
};

static int watch(void *arg)
{
    struct watcher *w = arg;
    if (++w->n_asked == w->fails_at) FAIL(ERR_COMM, "asked %d times", w->n_asked);
    return OK;
}

/* Long waits ask, and end with the watcher's error though the device is not done; the device goes on as it was. */
static void test_watch(void)
{
    enum { SIDE = 4096, LINEARS = 900 }; /* fewer than a stream takes without holding the host up */
    struct cuda_fixture *f = cuda_begin(8);
    struct watcher w = {0};
    cuda_what(f, "watch");
    if (f->effort == QUICK) { /* the device of a sanitizer takes minutes over it */
        cuda_end(f);
        return;
    }
    struct twin x = twin_2d(f, SIDE, SIDE, 0, 1), wide = twin_2d(f, SIDE, SIDE, 0, 0.02f),
                y = twin_2d(f, SIDE, SIDE, 0, 1);
    RUN(f, ops_linear(&f->gpu, y.gpu, x.gpu, wide.gpu, NULL));
    RUN(f, ops_finish(&f->gpu));
    ops_watch(&f->gpu, watch, &w);
    for (int fails = 0; fails < 2; fails++) {
        w = (struct watcher){.fails_at = fails ? 1 : 0};
        for (int i = 0; i < LINEARS; i++) RUN(f, ops_linear(&f->gpu, y.gpu, x.gpu, wide.gpu, NULL));
        int rc = ops_finish(&f->gpu);
        EXPECT(f, w.n_asked > 0);
        EXPECT(f, fails ? rc == ERR_COMM && w.n_asked == 1 : rc == OK);
    }
    ops_watch(&f->gpu, NULL, NULL);
    RUN(f, ops_finish(&f->gpu));
    cuda_end(f);
}

int main(int argc, char **argv)
{
    const struct check_case cases[] = {
        {"copies", test_copies},       {"small uploads", test_small_uploads}, {"marks", test_marks},
        {"random weights", test_fill}, {"ceilings", test_ceilings},           {"errors", test_errors},
        {"buckets", test_buckets},     {"who watches a wait", test_watch},    {0}};
    return cuda_main("cuda_ops", cases, argc, argv);
}
