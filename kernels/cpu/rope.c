/* Rotary position embedding, rotate-half form: dimension i turns with dimension i + head_dim / 2. */
#include <math.h>

#include "kernels/cpu/cpu.h"

enum { HALF_MAX = 512 }; /* half of the widest head; angles of one row stand on the stack */

static void rotate_row(float *x, int64_t n_heads, int64_t half, const float *cosine, const float *sine)
{
    for (int64_t h = 0; h < n_heads; h++, x += 2 * half)
        for (int64_t i = 0; i < half; i++) {
            float a = x[i], b = x[i + half];
            x[i] = a * cosine[i] - b * sine[i];
            x[i + half] = b * cosine[i] + a * sine[i];
        }
}

int cpu__rope(struct ops *o, struct tensor x, const int32_t *position, const float *inverse_frequency, float scale)
{
    const int64_t half = x.dim[2] / 2;
    if (half > HALF_MAX)
        FAIL(ERR_UNSUPPORTED, "ops_rope: heads of %lld dimensions, expected at most %d", (long long)x.dim[2],
             2 * HALF_MAX);
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) if (x.dim[0] * half * 64 > CPU_PARALLEL_WORK)
    for (int64_t row = 0; row < x.dim[0]; row++) {
        float cosine[HALF_MAX], sine[HALF_MAX];
        for (int64_t i = 0; i < half; i++) {
            float angle = (float)position[row] * inverse_frequency[i];
            cosine[i] = cosf(angle) * scale;
            sine[i] = sinf(angle) * scale;
        }
        rotate_row(cpu__row(x, row), x.dim[1], half, cosine, sine);
    }
    return OK;
}
