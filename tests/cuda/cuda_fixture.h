/* cuda_fixture - what the tests of the CUDA backend share: both backends open at once and the same numbers on both.
 *
 * Values are rounded to the 16-bit dtype before either backend sees them; the CPU computes with them in float32 and is
 * the reference. What an op writes is poisoned first, and poison stands around tensors and between their rows, so that
 * an element left out, or one written beside them, shows. A case counts what is wrong and fails once, at its end. */
#ifndef VITRAIL_TESTS_CUDA_CUDA_FIXTURE_H
#define VITRAIL_TESTS_CUDA_CUDA_FIXTURE_H

#include <stdarg.h>
#include <unistd.h>

#include "base/clock.h"
#include "tests/ops_fixture.h"

/* How much a pass tries: QUICK for compute-sanitizer, SOME for the second dtype. */
enum cuda_effort { QUICK, SOME, ALL };
enum { LINES_PRINTED = 30, CUDA_BLOCKS = 4096, GUARD = 128, MOST_LANES = 704 };

struct cuda_fixture {
    struct fixture *cpu; /* its ops, random numbers and host memory */
    struct ops gpu;
    enum dtype dtype; /* of activations in this pass */
    enum cuda_effort effort;
    int n_blocks, wrong, n_printed;
    struct {
        void *memory;
        size_t bytes;
    } block[CUDA_BLOCKS];
    char what[200]; /* the shape at hand, for messages */
};

/* ---- failures ---- */

static inline void cuda_wrong(struct cuda_fixture *f, const char *format, ...) PRINTF_LIKE(2, 3);
static inline void cuda_wrong(struct cuda_fixture *f, const char *format, ...)
{
    va_list args;
    f->wrong++;
    if (f->n_printed++ >= LINES_PRINTED) return;
    fprintf(stderr, "\n    %s: ", f->what);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
}
static inline void cuda_what(struct cuda_fixture *f, const char *format, ...) PRINTF_LIKE(2, 3);
static inline void cuda_what(struct cuda_fixture *f, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(f->what, sizeof f->what, format, args);
    va_end(args);
}

/* RUN - the call returns OK. EXPECT - the condition holds. */
#define RUN(f, call)                                                                                                   \
    do {                                                                                                               \
        if (call) cuda_wrong((f), "%s:%d: %s", __FILE__, __LINE__, status_message());                                  \
    } while (0)
#define EXPECT(f, condition)                                                                                           \
    do {                                                                                                               \
        if (!(condition)) cuda_wrong((f), "%s:%d: %s is false", __FILE__, __LINE__, #condition);                       \
    } while (0)

/* ---- opening; every case starts with cuda_begin and ends with cuda_end ---- */

static struct cuda_fixture *cuda_shared; /* one context for all cases: opening takes its time */

static inline struct cuda_fixture *cuda_open(enum dtype dtype, enum cuda_effort effort)
{
    struct cuda_fixture *f = calloc(1, sizeof *f);
    const struct ops_limits limits = {.max_tokens = 4096,
                                      .max_seqs = 64,
                                      .max_context = 4352,
                                      .max_in_features = 14336,
                                      .max_heads = 64,
                                      .head_dim = 128,
                                      .vocab_size = 128256,
                                      .max_lanes = MOST_LANES,
                                      .aged = true};
    const long cores = sysconf(_SC_NPROCESSORS_ONLN);
    size_t planned = 0, taken = 0;
    if (!f || !(f->cpu = calloc(1, sizeof *f->cpu))) abort();
    f->dtype = dtype, f->effort = effort;
    cuda_what(f, "opening");
    RUN(f, ops_open(&f->cpu->ops, "cpu", 0, cores < 1 ? 1 : cores > 16 ? 16 : (int)cores));
    RUN(f, ops_reserve(&f->cpu->ops, &limits, &taken, false));
    RUN(f, ops_open(&f->gpu, "cuda", 0, 1));
    RUN(f, ops_use_dtype(&f->gpu, dtype));
    RUN(f, ops_reserve(&f->gpu, &limits, &planned, true));
    RUN(f, ops_reserve(&f->gpu, &limits, &taken, false));
    EXPECT(f, planned > 0 && planned == taken && f->gpu.dtype == dtype);
    return f;
}

/* Frees what the tensors and arrays so far took, on both sides. */
static inline void cuda_clear(struct cuda_fixture *f)
{
    RUN(f, ops_finish(&f->gpu));
    for (int i = 0; i < f->n_blocks; i++) ops_memory_give_back(&f->gpu, f->block[i].memory, f->block[i].bytes);
    for (int i = 0; i < f->cpu->n_blocks; i++) free(f->cpu->block[i]);
    f->n_blocks = f->cpu->n_blocks = 0;
}

static inline struct cuda_fixture *cuda_begin(uint64_t seed)
{
    struct cuda_fixture *f = cuda_shared;
    f->cpu->seed = hash_splitmix(seed);
    f->wrong = f->n_printed = 0;
    cuda_what(f, "start");
    return f;
}
static inline void cuda_end(struct cuda_fixture *f)
{
    cuda_clear(f);
    if (f->wrong) fprintf(stderr, "\n    %d wrong; ", f->wrong);
    CU_ASSERT_EQUAL(f->wrong, 0);
}

static inline int cuda_pass(const char *suite, const struct check_case *cases, enum dtype dtype,
                            enum cuda_effort effort)
{
    double start = clock_seconds();
    cuda_shared = cuda_open(dtype, effort);
    int failed = cuda_shared->wrong ? 1 : check_run(suite, cases);
    fixture_close(cuda_shared->cpu);
    ops_close(&cuda_shared->gpu);
    free(cuda_shared);
    printf("%s, %s: %s in %.1f s\n", suite, dtype_name(dtype), failed ? "FAILED" : "passed", clock_seconds() - start);
    return failed;
}

/* The main of these programs. --quick: a few small shapes, for compute-sanitizer. */
static inline int cuda_main(const char *suite, const struct check_case *cases, int argc, char **argv)
{
    if (ops_device_count("cuda") == 0) {
        printf("%s: skipped: no CUDA device\n", suite);
        return 0;
    }
    if (argc > 1 && !strcmp(argv[1], "--quick")) return cuda_pass(suite, cases, DTYPE_BF16, QUICK);
    int failed = cuda_pass(suite, cases, DTYPE_BF16, ALL);
    return cuda_pass(suite, cases, DTYPE_F16, SOME) || failed;
}

/* ---- device memory and arrays ---- */

static inline void *cuda_take(struct cuda_fixture *f, size_t bytes)
{
    void *memory = NULL;
    RUN(f, ops_memory_take(&f->gpu, bytes, &memory));
    if (f->n_blocks == CUDA_BLOCKS) abort();
    if (memory) f->block[f->n_blocks].memory = memory, f->block[f->n_blocks++].bytes = bytes;
    return memory;
}

/* Elements of poison before and after; none for compute-sanitizer, which sees a step past the end by itself. */
static inline int64_t cuda_guard(const struct cuda_fixture *f) { return f->effort == QUICK ? 0 : GUARD; }

/* The same bytes on both sides, poison after them on the device. */
struct pair {
    void *gpu, *cpu;
    size_t bytes;
};

static inline void pair_send(struct cuda_fixture *f, struct pair p)
{
    unsigned char poison[GUARD];
    memset(poison, 0xa5, sizeof poison);
    RUN(f, ops_upload(&f->gpu, p.gpu, p.cpu, p.bytes));
    RUN(f, ops_upload(&f->gpu, (char *)p.gpu + p.bytes, poison, (size_t)cuda_guard(f)));
}
static inline struct pair pair_of(struct cuda_fixture *f, const void *values, size_t bytes)
{
    struct pair p = {cuda_take(f, bytes + (size_t)cuda_guard(f)), fixture_take(f->cpu, bytes), bytes};
    if (values)
        memcpy(p.cpu, values, bytes);
    else
        memset(p.cpu, 0x7a, bytes);
    pair_send(f, p);
    return p;
}
static inline struct pair pair_floats(struct cuda_fixture *f, int64_t n, float scale, float shift)
{
    float *x = fixture_take(f->cpu, (size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = shift + scale * fixture_normal(f->cpu);
    return pair_of(f, x, (size_t)n * sizeof *x);
}
/* pair_fetch - what the device holds now, its poison checked. */
static inline void *pair_fetch(struct cuda_fixture *f, struct pair p)
{
    const size_t guard = (size_t)cuda_guard(f);
    unsigned char *got = fixture_take(f->cpu, p.bytes + guard);
    RUN(f, ops_download(&f->gpu, got, p.gpu, p.bytes + guard));
    for (size_t i = p.bytes; i < p.bytes + guard; i++)
        if (got[i] != 0xa5) {
            cuda_wrong(f, "an array of %zu bytes was written at byte %zu", p.bytes, i);
            break;
        }
    return got;
}
/* pair_check - both sides hold the same 32-bit words. */
static inline void pair_check(struct cuda_fixture *f, struct pair p, const char *name)
{
    const uint32_t *got = pair_fetch(f, p), *want = p.cpu;
    for (size_t i = 0; i < p.bytes / 4; i++)
        if (got[i] != want[i]) {
            cuda_wrong(f, "%s[%zu] is %d (0x%x), expected %d (0x%x)", name, i, (int)got[i], got[i], (int)want[i],
                       want[i]);
            return;
        }
}

/* ---- tensors ---- */

static inline float cuda_round(float x, enum dtype dtype)
{
    if (dtype == DTYPE_F16) return half_to_float(float_to_half(x));
    return dtype == DTYPE_BF16 ? bfloat_to_float(float_to_bfloat(x)) : x;
}
static inline float cuda_element(const void *data, enum dtype dtype, int64_t i)
{
    if (dtype == DTYPE_F32) return ((const float *)data)[i];
    const uint16_t bits = ((const uint16_t *)data)[i];
    return dtype == DTYPE_F16 ? half_to_float(bits) : bfloat_to_float(bits);
}
static inline void cuda_set_element(void *data, enum dtype dtype, int64_t i, float x)
{
    if (dtype == DTYPE_F32)
        ((float *)data)[i] = x;
    else
        ((uint16_t *)data)[i] = dtype == DTYPE_F16 ? float_to_half(x) : float_to_bfloat(x);
}

/* A tensor on both sides, of the same shape and strides; the CPU's is float32. */
struct twin {
    struct tensor gpu, cpu;
    char *base;   /* on the device: poison, rows with poison between them, poison */
    int64_t span; /* elements from the first to the last, gaps included */
};

static inline int64_t twin_width(struct twin t)
{
    return t.cpu.n_dims == 3 ? t.cpu.dim[1] * t.cpu.dim[2] : t.cpu.dim[1];
}

/* Sends the CPU's values, or poison in their place. All bits set is not-a-number in every dtype. */
static inline void twin_send(struct cuda_fixture *f, struct twin t, bool values)
{
    const int64_t guard = cuda_guard(f), width = twin_width(t);
    const size_t size = dtype_size(t.gpu.dtype), bytes = (size_t)(t.span + 2 * guard) * size;
    char *raw = malloc(bytes + 1);
    if (!raw) abort();
    memset(raw, 0xff, bytes);
    for (int64_t r = 0; r < t.cpu.dim[0] && values; r++)
        for (int64_t i = 0; i < width; i++)
            cuda_set_element(raw, t.gpu.dtype, guard + r * t.cpu.stride[0] + i, fixture_row(t.cpu, r)[i]);
    RUN(f, ops_upload(&f->gpu, t.base, raw, bytes));
    free(raw);
}

/* c < 0: two dimensions. Rows are `gap` elements apart. Values are normal times `scale`; scale 0: poison. */
static inline struct twin twin_make(struct cuda_fixture *f, enum dtype dtype, int64_t a, int64_t b, int64_t c, int gap,
                                    float scale)
{
    struct twin t = {.cpu = c < 0 ? tensor_2d(NULL, DTYPE_F32, a, b) : tensor_3d(NULL, DTYPE_F32, a, b, c)};
    const int64_t width = t.cpu.stride[0], guard = cuda_guard(f);
    t.cpu.stride[0] += gap;
    t.span = a ? (a - 1) * t.cpu.stride[0] + width : 0;
    t.gpu = t.cpu;
    t.gpu.dtype = dtype;
    t.cpu.data = fixture_take(f->cpu, (size_t)t.span * sizeof(float));
    t.base = cuda_take(f, (size_t)(t.span + 2 * guard) * dtype_size(dtype));
    t.gpu.data = t.base + (size_t)guard * dtype_size(dtype);
    for (int64_t r = 0; r < a && scale != 0; r++)
        for (int64_t i = 0; i < width; i++) {
            uint64_t bits = fixture_bits(f->cpu); /* near enough to a normal number */
            int sum =
                (int)(bits & 0xffff) + (int)(bits >> 16 & 0xffff) + (int)(bits >> 32 & 0xffff) + (int)(bits >> 48);
            fixture_row(t.cpu, r)[i] = cuda_round(scale * (float)(sum - 131070) * (1 / 37837.0f), dtype);
        }
    twin_send(f, t, scale != 0);
    return t;
}
static inline struct twin twin_2d(struct cuda_fixture *f, int64_t rows, int64_t cols, int gap, float scale)
{
    return twin_make(f, f->dtype, rows, cols, -1, gap, scale);
}
static inline struct twin twin_3d(struct cuda_fixture *f, int64_t a, int64_t b, int64_t c, int gap, float scale)
{
    return twin_make(f, f->dtype, a, b, c, gap, scale);
}

/* twin_heads - columns [first, first + heads * dim) of a 2-d twin as [rows, heads, dim]: q, k or v of a fused product.
 * twin_rows - some of the rows. Both share the twin's memory. */
static inline struct twin twin_heads(struct twin t, int64_t first, int64_t heads, int64_t dim)
{
    struct tensor *side[2] = {&t.gpu, &t.cpu};
    for (int i = 0; i < 2; i++) {
        struct tensor view = tensor_3d((char *)side[i]->data + (size_t)first * dtype_size(side[i]->dtype),
                                       side[i]->dtype, side[i]->dim[0], heads, dim);
        view.stride[0] = side[i]->stride[0];
        *side[i] = view;
    }
    return t;
}
static inline struct twin twin_rows(struct twin t, int64_t first, int64_t n)
{
    t.gpu = tensor_rows(t.gpu, first, n);
    t.cpu = tensor_rows(t.cpu, first, n);
    return t;
}

/* twin_fetch - the device's whole block; the twin as it was made starts at element cuda_guard. */
static inline void *twin_fetch(struct cuda_fixture *f, struct twin t)
{
    size_t bytes = (size_t)(t.span + 2 * cuda_guard(f)) * dtype_size(t.gpu.dtype);
    void *raw = fixture_take(f->cpu, bytes);
    RUN(f, ops_download(&f->gpu, raw, t.base, bytes));
    return raw;
}

/* Whether poison still stands around the rows and between them. */
static inline void twin_check_poison(struct cuda_fixture *f, struct twin t, const void *raw, const char *name)
{
    const int64_t guard = cuda_guard(f), width = twin_width(t);
    const size_t size = dtype_size(t.gpu.dtype);
    static const unsigned char poison[4] = {0xff, 0xff, 0xff, 0xff};
    for (int64_t i = -guard; i < t.span + guard; i++) {
        const int64_t row = t.cpu.stride[0] ? i / t.cpu.stride[0] : 0, column = i - row * t.cpu.stride[0];
        if (i >= 0 && i < t.span && column < width) continue;
        if (memcmp((const char *)raw + (size_t)(guard + i) * size, poison, size) == 0) continue;
        cuda_wrong(f, "%s was written beside its rows, at element %lld of row %lld (%lld rows of %lld)", name,
                   (long long)column, (long long)row, (long long)t.cpu.dim[0], (long long)width);
        return;
    }
}

/* The relative L2 distance of a whole twin from the CPU's values is within the tolerance and no element is off by more
 * than a few times as much, measured by itself and its row; poison is whole. Tolerance 0: the rounded values. */
static inline void twin_check(struct cuda_fixture *f, struct twin t, double tolerance, const char *name)
{
    const int64_t guard = cuda_guard(f), width = twin_width(t), rows = t.cpu.dim[0];
    const void *raw = twin_fetch(f, t);
    double all = 0, wrong = 0, worst = -1, share = 0;
    int64_t at[2] = {0, 0};
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < width; i++) all += (double)fixture_row(t.cpu, r)[i] * (double)fixture_row(t.cpu, r)[i];
    for (int64_t r = 0; r < rows; r++) {
        double of_row = 0;
        const float *want = fixture_row(t.cpu, r);
        for (int64_t i = 0; i < width; i++) of_row += (double)want[i] * (double)want[i];
        const double typical = sqrt(of_row / (double)width) + 1e-3 * sqrt(all / (double)(rows * width));
        for (int64_t i = 0; i < width; i++) {
            double got = (double)cuda_element(raw, t.gpu.dtype, guard + r * t.cpu.stride[0] + i);
            double expected = (double)(tolerance > 0 ? want[i] : cuda_round(want[i], t.gpu.dtype));
            double d = fabs(got - expected), scale = fabs(expected) + typical;
            wrong += d * d;
            share = d > 0 || d != d ? d / scale : 0;
            if (share <= worst) continue;
            worst = share, at[0] = r, at[1] = i;
            if (share != share) r = rows, i = width; /* not a number: that is the one to name */
        }
    }
    const double distance = all > 0 ? sqrt(wrong / all) : sqrt(wrong);
    if (rows * width > 0 && !(distance <= tolerance && worst <= 3 * tolerance))
        cuda_wrong(f, "%s: relative error %.3g, tolerance %g; worst at [%lld, %lld]: got %g, expected %g", name,
                   distance, tolerance, (long long)at[0], (long long)at[1],
                   (double)cuda_element(raw, t.gpu.dtype, guard + at[0] * t.cpu.stride[0] + at[1]),
                   (double)fixture_row(t.cpu, at[0])[at[1]]);
    twin_check_poison(f, t, raw, name);
}

/* What an op that rounds its result to the activation dtype is allowed; and one with a float32 result. */
static inline double cuda_tolerance(const struct cuda_fixture *f) { return f->dtype == DTYPE_F16 ? 2e-3 : 1e-2; }
#define TOLERANCE_F32 1e-3

#endif
