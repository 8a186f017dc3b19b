/* Norms and the residual sum. */
#include <math.h>

#include "kernels/cpu/cpu.h"

static void rms_norm_row(const struct cpu *c, float *y, const float *x, const float *w, int64_t n, float eps)
{
    float mean = c->vector->sum_squares(x, n) / (float)n;
    c->vector->scale_by(y, x, 1.0f / sqrtf(mean + eps), w, n);
}

int cpu__rms_norm(struct ops *o, struct tensor y, struct tensor x, const float *w, float eps)
{
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) if (x.dim[0] * x.dim[1] > CPU_PARALLEL_WORK)
    for (int64_t i = 0; i < x.dim[0]; i++) rms_norm_row(cpu__of(o), cpu__row(y, i), cpu__row(x, i), w, x.dim[1], eps);
    return OK;
}

int cpu__add_rms_norm(struct ops *o, struct tensor y, struct tensor residual, struct tensor x, const float *w,
                      float eps)
{
    const int64_t n = x.dim[1];
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) if (x.dim[0] * n > CPU_PARALLEL_WORK)
    for (int64_t i = 0; i < x.dim[0]; i++) {
        float *sum = cpu__row(residual, i);
        cpu__of(o)->vector->add_scaled(sum, cpu__row(x, i), 1, n);
        rms_norm_row(cpu__of(o), cpu__row(y, i), sum, w, n, eps);
    }
    return OK;
}

/* Mean and variance in double: two plain loops, and no care for cancellation. */
static void layer_norm_row(float *y, const float *x, const float *w, const float *b, int64_t n, float eps)
{
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i];
    double mean = sum / (double)n;
    for (int64_t i = 0; i < n; i++) squares += ((double)x[i] - mean) * ((double)x[i] - mean);
    float inverse = (float)(1.0 / sqrt(squares / (double)n + (double)eps)), centre = (float)mean;
    for (int64_t i = 0; i < n; i++) y[i] = (x[i] - centre) * inverse * w[i] + b[i];
}

int cpu__layer_norm(struct ops *o, struct tensor y, struct tensor x, const float *w, const float *b, float eps)
{
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) if (x.dim[0] * x.dim[1] > CPU_PARALLEL_WORK)
    for (int64_t i = 0; i < x.dim[0]; i++) layer_norm_row(cpu__row(y, i), cpu__row(x, i), w, b, x.dim[1], eps);
    return OK;
}

int cpu__add(struct ops *o, struct tensor y, struct tensor x)
{
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) if (y.dim[0] * y.dim[1] > CPU_PARALLEL_WORK)
    for (int64_t i = 0; i < y.dim[0]; i++)
        cpu__of(o)->vector->add_scaled(cpu__row(y, i), cpu__row(x, i % x.dim[0]), 1, y.dim[1]);
    return OK;
}
