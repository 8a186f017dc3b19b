/* Activations, element by element. */
#include <math.h>

#include "kernels/cpu/cpu.h"

int cpu__swiglu(struct ops *o, struct tensor y, struct tensor gate_up)
{
    const struct cpu *c = cpu__of(o);
    const int64_t n = y.dim[1];
#pragma omp parallel for num_threads(c->n_threads) if (y.dim[0] * n > CPU_PARALLEL_WORK)
    for (int64_t i = 0; i < y.dim[0]; i++)
        c->vector->swiglu(cpu__row(y, i), cpu__row(gate_up, i), cpu__row(gate_up, i) + n, n);
    return OK;
}

static void gelu(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) x[i] = 0.5f * x[i] * (1 + erff(x[i] * 0.70710678118654752f));
}

static void activate_row(const struct vector_ops *v, float *x, int64_t n, enum activation kind)
{
    if (kind == ACTIVATION_SILU) v->sigmoid_gate(x, 1, n);
    if (kind == ACTIVATION_QUICK_GELU) v->sigmoid_gate(x, 1.702f, n);
    if (kind == ACTIVATION_GELU_TANH) v->gelu_tanh(x, n);
    if (kind == ACTIVATION_GELU) gelu(x, n);
}

int cpu__activate(struct ops *o, struct tensor x, enum activation kind)
{
    const struct cpu *c = cpu__of(o);
#pragma omp parallel for num_threads(c->n_threads) if (x.dim[0] * x.dim[1] > CPU_PARALLEL_WORK)
    for (int64_t i = 0; i < x.dim[0]; i++) activate_row(c->vector, cpu__row(x, i), x.dim[1], kind);
    return OK;
}
