/* What this machine can do: OpenBLAS's sgemm, its sgemv over as many bytes as the weights have, and a memory copy. */
#include <cblas.h>
#include <string.h>

#include "base/clock.h"
#include "kernels/cpu/cpu.h"

enum { GEMM_ROWS = 512, GEMM_SIDE = 1536, GEMV_COLUMNS = 1024, TRIES = 7 };

static double gemm_seconds(float *x, float *w, float *y)
{
    double start = clock_seconds();
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, GEMM_ROWS, GEMM_SIDE, GEMM_SIDE, 1, x, GEMM_SIDE, w, GEMM_SIDE,
                0, y, GEMM_SIDE);
    return clock_seconds() - start;
}

static double gemv_seconds(int rows, float *w, float *x, float *y)
{
    double start = clock_seconds();
    cblas_sgemv(CblasRowMajor, CblasNoTrans, rows, GEMV_COLUMNS, 1, w, GEMV_COLUMNS, x, 1, 0, y, 1);
    return clock_seconds() - start;
}

static double copy_seconds(const struct cpu *c, char *to, const char *from, size_t bytes)
{
    double start = clock_seconds();
#pragma omp parallel for num_threads(c->n_threads)
    for (size_t i = 0; i < bytes; i += 1 << 16) memcpy(to + i, from + i, bytes - i < 1 << 16 ? bytes - i : 1 << 16);
    return clock_seconds() - start;
}

static double least(double a, double b) { return a < b ? a : b; }

int cpu__ceilings(struct ops *o, size_t weight_bytes, struct ops_ceilings *out)
{
    enum { GEMM_FLOATS = 2 * GEMM_ROWS * GEMM_SIDE + GEMM_SIDE * GEMM_SIDE };
    size_t rows = weight_bytes / sizeof(float) / GEMV_COLUMNS + 1, matrix = rows * GEMV_COLUMNS;
    size_t floats = (matrix + rows > GEMM_FLOATS ? matrix + rows : GEMM_FLOATS) + GEMV_COLUMNS;
    float *w;
    double gemm = 1e9, gemv = 1e9, copy = 1e9;
    TRY(ops_memory_take(o, floats * sizeof *w, (void **)&w));
    for (size_t i = 0; i < floats; i++) w[i] = (float)(i % 1009) * 1e-3f;
    for (int i = 0; i < TRIES; i++) {
        gemm =
            least(gemm, gemm_seconds(w, w + GEMM_ROWS * GEMM_SIDE, w + GEMM_ROWS * GEMM_SIDE + GEMM_SIDE * GEMM_SIDE));
        gemv = least(gemv, gemv_seconds((int)rows, w, w + matrix, w + matrix + GEMV_COLUMNS));
        copy = least(copy,
                     copy_seconds(cpu__of(o), (char *)w, (char *)w + floats / 2 * sizeof *w, floats / 2 * sizeof *w));
    }
    ops_memory_give_back(o, w, floats * sizeof *w);
    out->gemm_tflops = 2.0 * GEMM_ROWS * GEMM_SIDE * GEMM_SIDE / gemm * 1e-12;
    out->gemv_gbs = (double)(matrix * sizeof *w) / gemv * 1e-9;
    size_t copied = floats / 2 * sizeof *w;
    out->copy_gbs = 2.0 * (double)copied / copy * 1e-9;
    return OK;
}
