/* Activations, element by element. */
#include <math.h>

#include "kernels/cpu/cpu.h"

static float silu(float x) { return x / (1 + expf(-x)); }
static float gelu(float x) { return 0.5f * x * (1 + erff(x * 0.70710678118654752f)); }
static float gelu_tanh(float x) { return 0.5f * x * (1 + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x))); }
static float quick_gelu(float x) { return x / (1 + expf(-1.702f * x)); }

int cpu__swiglu(struct ops *o, struct tensor y, struct tensor gate_up)
{
    const int64_t n = y.dim[1];
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) if (y.dim[0] * n > CPU_PARALLEL_WORK)
    for (int64_t i = 0; i < y.dim[0]; i++) {
        float *to = cpu__row(y, i);
        const float *gate = cpu__row(gate_up, i), *up = gate + n;
        for (int64_t j = 0; j < n; j++) to[j] = silu(gate[j]) * up[j];
    }
    return OK;
}

int cpu__activate(struct ops *o, struct tensor x, enum activation kind)
{
    static float (*const functions[ACTIVATION_N])(float) = {[ACTIVATION_SILU] = silu,
                                                            [ACTIVATION_GELU] = gelu,
                                                            [ACTIVATION_GELU_TANH] = gelu_tanh,
                                                            [ACTIVATION_QUICK_GELU] = quick_gelu};
    float (*function)(float) = functions[kind];
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) if (x.dim[0] * x.dim[1] > CPU_PARALLEL_WORK)
    for (int64_t i = 0; i < x.dim[0]; i++) {
        float *row = cpu__row(x, i);
        for (int64_t j = 0; j < x.dim[1]; j++) row[j] = function(row[j]);
    }
    return OK;
}
