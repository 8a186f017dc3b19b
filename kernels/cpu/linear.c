/* y = x w^T + bias.
 *
 * Few rows (decode): vectors of our own read every weight once, widening it in registers, for all rows; a row's result
 * is the same bits whatever rows stand beside it and however many threads share the work. Many rows (prefill): panels
 * of weight rows go to OpenBLAS, one thread a panel; 16-bit weights are widened into a panel of the thread's own
 * first. There a result's bits depend on the number of rows, as OpenBLAS chooses its blocks by it, and on nothing else.
 */
#include <cblas.h>
#include <omp.h>

#include "kernels/cpu/cpu.h"

/* Measured: up to this many rows our own product is the faster one, or as fast; it also covers the default number of
 * sequences of a decode step. A panel is what the second-level cache holds. */
enum { FEW_ROWS = 64, PANEL_ROWS = 384, PANEL_ROWS_LEAST = 48, PANEL_FLOATS = 640 << 10 };

/* Never fewer for more columns, so that what is reserved for the widest weight does for all. */
static int64_t panel_floats(int64_t n_in)
{
    int64_t floats = PANEL_ROWS_LEAST * n_in > PANEL_FLOATS ? PANEL_ROWS_LEAST * n_in : PANEL_FLOATS;
    return PANEL_ROWS * n_in < floats ? PANEL_ROWS * n_in : floats;
}

static int place(const struct cpu *c, struct arena *arena, int64_t n_in, float **panels)
{
    return arena_take(arena, (size_t)(c->n_threads * panel_floats(n_in)) * sizeof(float), "linear panels", panels);
}

int cpu__linear_measure(const struct cpu *c, const struct ops_limits *limits, struct arena *arena)
{
    float *panels;
    return place(c, arena, limits->max_in_features, &panels);
}

/* Weight rows [first, first + n) for few rows of x. */
static void few_rows(const struct cpu *c, struct tensor y, struct tensor x, struct tensor w, const float *bias,
                     int64_t first, int64_t n)
{
    struct vector_linear slice = {.y = (float *)y.data + first,
                                  .x = x.data,
                                  .bias = bias ? bias + first : NULL,
                                  .w = tensor_rows(w, first, n).data,
                                  .y_stride = y.stride[0],
                                  .x_stride = x.stride[0],
                                  .w_stride = w.stride[0],
                                  .m = (int)x.dim[0],
                                  .k = (int)x.dim[1],
                                  .n = n,
                                  .dtype = w.dtype};
    c->vector->linear(&slice);
}

static void many_rows(const struct cpu *c, struct tensor y, struct tensor x, struct tensor w, const float *bias,
                      int64_t first, int64_t n, float *panel)
{
    const int64_t n_in = x.dim[1];
    struct tensor rows = tensor_rows(w, first, n);
    const float *wide = rows.data;
    int64_t stride = w.stride[0];
    if (w.dtype != DTYPE_F32) {
        for (int64_t i = 0; i < n; i++) c->vector->widen(panel + i * n_in, tensor_rows(rows, i, 1).data, w.dtype, n_in);
        wide = panel, stride = n_in;
    }
    float *out = (float *)y.data + first;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)x.dim[0], (int)n, (int)n_in, 1.0f, x.data,
                (int)x.stride[0], wide, (int)stride, 0.0f, out, (int)y.stride[0]);
    if (bias)
        for (int64_t i = 0; i < x.dim[0]; i++) c->vector->add_scaled(out + i * y.stride[0], bias + first, 1, n);
}

int cpu__linear(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias)
{
    const struct cpu *c = cpu__of(o);
    const int64_t n_out = w.dim[0], n_in = x.dim[1];
    struct arena arena;
    float *panels;
    TRY(cpu__scratch(o, &arena));
    if (x.dim[0] <= FEW_ROWS) {
#pragma omp parallel num_threads(c->n_threads) if (n_out * n_in > CPU_PARALLEL_WORK)
        {
            int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
            int64_t first = n_out * thread / threads, end = n_out * (thread + 1) / threads;
            if (end > first) few_rows(c, y, x, w, bias, first, end - first);
        }
        return OK;
    }
    TRY(place(c, &arena, n_in, &panels));
    /* Panels of nearly equal size, a multiple of the number of threads where there is enough for all. */
    const int64_t most = n_in ? panel_floats(n_in) / n_in : PANEL_ROWS;
    int64_t n_panels = (n_out + most - 1) / most;
    n_panels = (n_panels + c->n_threads - 1) / c->n_threads * c->n_threads;
    n_panels = n_panels < n_out ? n_panels : n_out;
#pragma omp parallel for num_threads(c->n_threads) schedule(dynamic, 1)
    for (int64_t p = 0; p < n_panels; p++) {
        int64_t first = n_out * p / n_panels, end = n_out * (p + 1) / n_panels;
        many_rows(c, y, x, w, bias, first, end - first, panels + omp_get_thread_num() * panel_floats(n_in));
    }
    return OK;
}
