/* y = x w^T + bias.
 *
 * Few rows (decode): every weight is read once for all rows. Many rows (prefill): OpenBLAS on float32 panels of
 * weight rows; 16-bit weights are widened into a panel of each thread's own first. */
#include <cblas.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

enum { FEW_ROWS = 16, PANEL_ROWS = 128 };

static int place(const struct cpu *c, struct arena *arena, int64_t n_in, float **panels)
{
    return arena_take(arena, (size_t)c->n_threads * PANEL_ROWS * (size_t)n_in * sizeof(float), "linear panels", panels);
}

int cpu__linear_measure(const struct cpu *c, const struct ops_limits *limits, struct arena *arena)
{
    float *panels;
    return place(c, arena, limits->max_in_features, &panels);
}

static void widen(float *y, const void *x, enum dtype dtype, int64_t n)
{
    const uint16_t *bits = x;
    if (dtype == DTYPE_F32)
        memcpy(y, x, (size_t)n * sizeof *y);
    else if (dtype == DTYPE_BF16)
        for (int64_t i = 0; i < n; i++) y[i] = bfloat_to_float(bits[i]);
    else
        for (int64_t i = 0; i < n; i++) y[i] = half_to_float(bits[i]);
}

static void multiply(struct tensor y, struct tensor x, const float *w, int64_t ldw, int64_t first, int64_t n)
{
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)x.dim[0], (int)n, (int)x.dim[1], 1.0f, x.data,
                (int)x.stride[0], w, (int)ldw, 0.0f, (float *)y.data + first, (int)y.stride[0]);
}

static void add_bias(struct tensor y, const float *bias, int64_t first, int64_t n)
{
    for (int64_t i = 0; i < y.dim[0]; i++)
        for (int64_t j = first; j < first + n; j++) cpu__row(y, i)[j] += bias[j];
}

int cpu__linear(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias)
{
    const struct cpu *c = cpu__of(o);
    struct arena arena;
    float *panels;
    TRY(cpu__scratch(o, &arena));
    TRY(place(c, &arena, x.dim[1], &panels));
    const int64_t n_out = w.dim[0], n_in = x.dim[1], n_panels = (n_out + PANEL_ROWS - 1) / PANEL_ROWS;
#pragma omp parallel for num_threads(c->n_threads) schedule(dynamic, 1)
    for (int64_t p = 0; p < n_panels; p++) {
        int64_t first = p * PANEL_ROWS, n = n_out - first < PANEL_ROWS ? n_out - first : PANEL_ROWS;
        struct tensor rows = tensor_rows(w, first, n);
        const float *panel = rows.data;
        int64_t ldw = w.stride[0];
        if (w.dtype != DTYPE_F32) {
            float *wide = panels + omp_get_thread_num() * PANEL_ROWS * n_in;
            for (int64_t i = 0; i < n; i++) widen(wide + i * n_in, tensor_rows(rows, i, 1).data, w.dtype, n_in);
            panel = wide, ldw = n_in;
        }
        multiply(y, x, panel, ldw, first, n);
        if (bias) add_bias(y, bias, first, n);
    }
    return OK;
}
