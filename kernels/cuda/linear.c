/* Linear layers: few rows by our own kernels (gemv.cu, on Hopper linear_rows.cu), which read the weights once at memory
 * speed; the rest by cuBLASLt. What the library proposes for a shape is kept, so that a shape has the same result in
 * every step; shapes that it does not take (odd strides) go through a plain kernel. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cublaslt.h"
#include "kernels/cuda/cuda.h"

enum { CHOICES = 1024 };

/* What makes a matrix product: column-major y[out, n] = w[in, out]^T x[in, n]. */
struct shape {
    int64_t out, in, n, ld_w, ld_x, ld_y;
    enum dtype from, to;
    int alignment; /* of all three matrices, bytes, at most 16 */
};

/* Where the library's first proposal is not its best: the place of the one that was, found by timing all of them on an
 * H200 (docs/benchmarks.md). A table and not a measurement at start, so that a run repeats its bits. Of CUDA 13's
 * library; another one's order is not known. */
static const struct tuned {
    int out, in, n, place;
} tuned[] = {
    {15360, 5120, 64, 4}, {27648, 5120, 64, 2},  {27648, 5120, 128, 3}, {5120, 13824, 64, 1},
    {28672, 4096, 64, 2}, {28672, 4096, 128, 1}, {4096, 14336, 64, 3},  {6144, 4096, 64, 1},
};
enum { PROPOSALS = 8 };

static int place_of(const struct shape *s)
{
    for (size_t i = 0; i < sizeof tuned / sizeof *tuned && CUBLAS_VER_MAJOR == 13; i++)
        if (tuned[i].out == s->out && tuned[i].in == s->in && tuned[i].n == s->n && s->from == s->to)
            return tuned[i].place;
    return 0;
}

struct choice {
    struct shape shape;
    bool used, served;
    cublasLtMatmulDesc_t matmul;
    cublasLtMatrixLayout_t w, x, y;
    cublasLtMatmulAlgo_t algorithm;
};

struct cuda_linear {
    struct cublaslt lt;
    cublasLtHandle_t handle;
    struct choice choice[CHOICES]; /* by hash, the next places on collision */
    int n;
};

static int lt_failed(const struct cuda_linear *l, const char *what, cublasStatus_t status)
{
    FAIL(ERR_DEVICE, "cuBLASLt: %s: %s", what, l->lt.status_string(status));
}

#define LT_TRY(l, function, ...)                                                                                       \
    do {                                                                                                               \
        cublasStatus_t lt_status = (l)->lt.function(__VA_ARGS__);                                                      \
        if (lt_status != CUBLAS_STATUS_SUCCESS) return lt_failed((l), #function, lt_status);                           \
    } while (0)

int cuda__linear_open(struct cuda *c)
{
    c->linear = calloc(1, sizeof *c->linear);
    if (!c->linear) FAIL(ERR_NOMEM, "cuda: out of host memory");
    TRY(cublaslt_load(&c->linear->lt));
    LT_TRY(c->linear, create, &c->linear->handle);
    return OK;
}

static void forget(const struct cublaslt *lt, struct choice *choice)
{
    if (choice->matmul) lt->matmul_destroy(choice->matmul);
    if (choice->w) lt->layout_destroy(choice->w);
    if (choice->x) lt->layout_destroy(choice->x);
    if (choice->y) lt->layout_destroy(choice->y);
    memset(choice, 0, sizeof *choice);
}

void cuda__linear_close(struct cuda *c)
{
    struct cuda_linear *l = c->linear;
    if (!l) return;
    for (int i = 0; i < CHOICES && l->handle; i++) forget(&l->lt, &l->choice[i]);
    if (l->handle) l->lt.destroy(l->handle);
    cublaslt_unload(&l->lt);
    free(l);
    c->linear = NULL;
}

static cudaDataType_t type_of(enum dtype dtype)
{
    return dtype == DTYPE_F32 ? CUDA_R_32F : dtype == DTYPE_F16 ? CUDA_R_16F : CUDA_R_16BF;
}

static int describe(struct cuda_linear *l, struct choice *choice)
{
    const struct shape *s = &choice->shape;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    LT_TRY(l, matmul_create, &choice->matmul, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    LT_TRY(l, matmul_set, choice->matmul, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed);
    LT_TRY(l, layout_create, &choice->w, type_of(s->from), (uint64_t)s->in, (uint64_t)s->out, s->ld_w);
    LT_TRY(l, layout_create, &choice->x, type_of(s->from), (uint64_t)s->in, (uint64_t)s->n, s->ld_x);
    LT_TRY(l, layout_create, &choice->y, type_of(s->to), (uint64_t)s->out, (uint64_t)s->n, s->ld_y);
    return OK;
}

/* One of the library's proposals; none: the shape is not served. */
static int choose(struct cuda_linear *l, struct choice *choice)
{
    const uint32_t alignment = (uint32_t)choice->shape.alignment;
    const size_t workspace = CUDA_WORKSPACE_BYTES;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t found[PROPOSALS];
    int n = 0, place = place_of(&choice->shape);
    TRY(describe(l, choice));
    LT_TRY(l, preference_create, &preference);
    static const cublasLtMatmulPreferenceAttributes_t aligned[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    cublasStatus_t status =
        l->lt.preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
    for (size_t i = 0; i < sizeof aligned / sizeof *aligned && status == CUBLAS_STATUS_SUCCESS; i++)
        status = l->lt.preference_set(preference, aligned[i], &alignment, sizeof alignment);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = l->lt.heuristic(l->handle, choice->matmul, choice->w, choice->x, choice->y, choice->y, preference,
                                 place ? PROPOSALS : 1, found, &n);
    l->lt.preference_destroy(preference);
    if (place >= n) place = 0;
    choice->served = status == CUBLAS_STATUS_SUCCESS && n > 0 && found[place].state == CUBLAS_STATUS_SUCCESS;
    if (choice->served) choice->algorithm = found[place].algo;
    return OK;
}

static uint64_t hash_of(const struct shape *s)
{
    const int64_t part[] = {s->out, s->in, s->n, s->ld_w, s->ld_x, s->ld_y, s->from, s->to, s->alignment};
    uint64_t hash = 0;
    for (size_t i = 0; i < sizeof part / sizeof *part; i++) hash = (hash ^ (uint64_t)part[i]) * 0x9E3779B97F4A7C15u;
    return hash >> 40;
}

static bool same(const struct shape *a, const struct shape *b)
{
    return a->out == b->out && a->in == b->in && a->n == b->n && a->ld_w == b->ld_w && a->ld_x == b->ld_x &&
           a->ld_y == b->ld_y && a->from == b->from && a->to == b->to && a->alignment == b->alignment;
}

static int find_choice(struct cuda_linear *l, const struct shape *shape, struct choice **out)
{
    enum { NEIGHBOURS = 16 };
    uint64_t at = hash_of(shape);
    struct choice *choice = NULL;
    for (int i = 0; i < NEIGHBOURS; i++) {
        choice = &l->choice[(at + (uint64_t)i) % CHOICES];
        if (choice->used && same(&choice->shape, shape)) {
            *out = choice;
            return OK;
        }
        if (!choice->used) break;
    }
    forget(&l->lt, choice); /* empty, or the oldest of a full neighbourhood */
    choice->shape = *shape;
    choice->used = true;
    *out = choice;
    return choose(l, choice);
}

static int alignment_of(struct tensor t)
{
    uint64_t bits = (uint64_t)(uintptr_t)t.data | (uint64_t)t.stride[0] * dtype_size(t.dtype) | 16;
    return (int)(bits & ~(bits - 1));
}

static int least(int a, int b) { return a < b ? a : b; }

static int multiply(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias)
{
    struct cuda *c = cuda__of(o);
    struct cuda_linear *l = c->linear;
    struct shape shape = {.out = w.dim[0],
                          .in = w.dim[1],
                          .n = x.dim[0],
                          .ld_w = w.stride[0],
                          .ld_x = x.stride[0],
                          .ld_y = y.stride[0],
                          .from = w.dtype,
                          .to = y.dtype};
    struct choice *choice;
    const float one = 1, zero = 0;
    /* A tensor of one row may carry any stride; the library wants one that holds the row. */
    if (shape.ld_w < shape.in) shape.ld_w = shape.in;
    if (shape.ld_x < shape.in) shape.ld_x = shape.in;
    if (shape.ld_y < shape.out) shape.ld_y = shape.out;
    shape.alignment = least(alignment_of(w), least(alignment_of(x), alignment_of(y)));
    if (!c->workspace) FAIL(ERR_BUG, "cuda: ops_linear before ops_reserve");
    TRY(find_choice(l, &shape, &choice));
    /* A library epilogue would want a 16-bit bias; where rows are narrow, rounding twice shows. */
    if (!choice->served || (bias && w.dim[0] < 8)) return cuda__linear_plain(o, y, x, w, bias);
    LT_TRY(l, matmul, l->handle, choice->matmul, &one, w.data, choice->w, x.data, choice->x, &zero, y.data, choice->y,
           y.data, choice->y, &choice->algorithm, c->workspace, CUDA_WORKSPACE_BYTES, c->stream);
    return bias ? cuda__add_bias(o, y, bias) : OK;
}

int cuda__linear_swiglu(struct ops *o, struct tensor y, struct tensor gate_up, struct tensor x, struct tensor w,
                        const float *bias)
{
    if (w.dtype == x.dtype && cuda__gemv_fits(cuda__of(o), y, x, w)) return cuda__gemv_swiglu(o, y, x, w, bias);
    if (w.dtype == x.dtype && cuda__linear_rows_fits(cuda__of(o), y, x, w))
        return cuda__linear_rows_swiglu(o, y, x, w, bias);
    TRY(cuda__linear(o, gate_up, x, w, bias));
    return cuda__swiglu(o, y, gate_up);
}

int cuda__linear(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias)
{
    if (w.dtype != x.dtype)
        FAIL(ERR_UNSUPPORTED, "cuda: a linear of %s weights and %s rows, expected one dtype", dtype_name(w.dtype),
             dtype_name(x.dtype));
    if (cuda__gemv_fits(cuda__of(o), y, x, w)) return cuda__gemv(o, y, x, w, bias);
    if (cuda__linear_rows_fits(cuda__of(o), y, x, w)) return cuda__linear_rows(o, y, x, w, bias);
    return multiply(o, y, x, w, bias);
}
