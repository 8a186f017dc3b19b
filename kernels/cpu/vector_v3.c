/* The table for x86-64 with AVX2, FMA and F16C; on other machines a copy of the base, never chosen. */
#include "kernels/cpu/vector.h"

#define VECTOR_NAME "x86-64-v3"
#define VECTOR_TABLE vector__v3
#if !defined(__x86_64__)
#define VECTOR_WIDTH 4
#include "kernels/cpu/vector_body.h"
#else
#include <immintrin.h>
#define VECTOR_WIDTH 8
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#include "kernels/cpu/vector_body.h"
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "kernels/cpu/vector_body.h"
#pragma GCC pop_options
#endif
#endif
