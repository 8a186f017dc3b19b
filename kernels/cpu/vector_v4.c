/* The table for x86-64 with AVX-512 (F, DQ, BW, VL); on other machines a copy of the base, never chosen. */
#include "kernels/cpu/vector.h"

#define VECTOR_NAME "x86-64-v4"
#define VECTOR_TABLE vector__v4
#if !defined(__x86_64__)
#define VECTOR_WIDTH 4
#include "kernels/cpu/vector_body.h"
#else
#include <immintrin.h>
#define VECTOR_WIDTH 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))),              \
                             apply_to = function)
#include "kernels/cpu/vector_body.h"
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("prefer-vector-width=512,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#include "kernels/cpu/vector_body.h"
#pragma GCC pop_options
#endif
#endif
