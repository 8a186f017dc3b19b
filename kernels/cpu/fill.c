/* Random weights from a counter: each element is a function of (key, its place in the whole matrix). */
#include "base/hash.h"
#include "kernels/cpu/cpu.h"

/* Sum of four uniform 16-bit numbers, centred, divided by its standard deviation: near enough to a normal one for a
 * model that only has to run, and the same bits on every machine. */
static float normal_of(uint64_t bits)
{
    int sum = (int)(bits & 0xffff) + (int)(bits >> 16 & 0xffff) + (int)(bits >> 32 & 0xffff) + (int)(bits >> 48);
    return (float)(sum - 131070) * (1.0f / 37837.227f);
}

static void store(struct tensor w, int64_t at, float value)
{
    if (w.dtype == DTYPE_F32)
        ((float *)w.data)[at] = value;
    else if (w.dtype == DTYPE_F16)
        ((uint16_t *)w.data)[at] = float_to_half(value);
    else
        ((uint16_t *)w.data)[at] = float_to_bfloat(value);
}

int cpu__fill_normal(struct ops *o, struct tensor w, uint64_t key, float std, int64_t first_row, int64_t first_column,
                     int64_t whole_columns)
{
#pragma omp parallel for num_threads(cpu__of(o)->n_threads)
    for (int64_t r = 0; r < w.dim[0]; r++)
        for (int64_t c = 0; c < w.dim[1]; c++) {
            uint64_t place = (uint64_t)((first_row + r) * whole_columns + first_column + c);
            store(w, r * w.stride[0] + c, std * normal_of(hash_splitmix(key ^ hash_splitmix(place))));
        }
    return OK;
}
