/* The table that every machine runs. */
#define VECTOR_WIDTH 4
#define VECTOR_NAME "base"
#define VECTOR_TABLE vector__base
#include "kernels/cpu/vector_body.h"

const struct vector_ops *vector__choose(void)
{
    if (vector__runs(&vector__v4)) return &vector__v4;
    return vector__runs(&vector__v3) ? &vector__v3 : &vector__base;
}

bool vector__runs(const struct vector_ops *v)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (v == &vector__v4)
        return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (v == &vector__v3) return v3; /* every processor with AVX2 and FMA has F16C */
#endif
    return v == &vector__base;
}
