#include "base/tensor.h"

#include <stdio.h>
#include <string.h>

size_t dtype_size(enum dtype dtype)
{
    static const size_t sizes[DTYPE_N] = {4, 2, 2, 4, 8, 1};
    return sizes[dtype];
}

const char *dtype_name(enum dtype dtype)
{
    static const char *const names[DTYPE_N] = {"float32", "float16", "bfloat16", "int32", "int64", "uint8"};
    return dtype < DTYPE_N ? names[dtype] : "?";
}

struct tensor tensor_1d(void *data, enum dtype dtype, int64_t n)
{
    return (struct tensor){data, dtype, 1, {n, 1, 1, 1}, {1, 1, 1, 1}};
}

struct tensor tensor_2d(void *data, enum dtype dtype, int64_t rows, int64_t cols)
{
    return (struct tensor){data, dtype, 2, {rows, cols, 1, 1}, {cols, 1, 1, 1}};
}

struct tensor tensor_3d(void *data, enum dtype dtype, int64_t a, int64_t b, int64_t c)
{
    return (struct tensor){data, dtype, 3, {a, b, c, 1}, {b * c, c, 1, 1}};
}

struct tensor tensor_rows(struct tensor t, int64_t first, int64_t n)
{
    t.data = (char *)t.data + (size_t)(first * t.stride[0]) * dtype_size(t.dtype);
    t.dim[0] = n;
    return t;
}

int64_t tensor_count(struct tensor t)
{
    int64_t n = 1;
    for (int i = 0; i < t.n_dims; i++) n *= t.dim[i];
    return n;
}

size_t tensor_bytes(struct tensor t) { return (size_t)tensor_count(t) * dtype_size(t.dtype); }

bool tensor_is_dense(struct tensor t)
{
    int64_t expected = 1;
    for (int i = t.n_dims - 1; i >= 0; i--) {
        if (t.dim[i] != 1 && t.stride[i] != expected) return false;
        expected *= t.dim[i];
    }
    return true;
}

const char *tensor_describe(struct tensor t, char *buf, size_t size)
{
    int n = snprintf(buf, size, "%s [", dtype_name(t.dtype));
    for (int i = 0; i < t.n_dims && n > 0 && (size_t)n < size; i++)
        n += snprintf(buf + n, size - (size_t)n, "%s%lld", i ? ", " : "", (long long)t.dim[i]);
    if (n > 0 && (size_t)n < size) snprintf(buf + n, size - (size_t)n, "]");
    return buf;
}

static uint32_t float_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static float bits_float(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

float half_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
    if (exponent == 31) return bits_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent) return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
    float subnormal = (float)mantissa * 0x1p-24f;
    return sign ? -subnormal : subnormal;
}

uint16_t float_to_half(float f)
{
    uint32_t u = float_bits(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds to infinity */
    if (magnitude < 0x38800000) {                                  /* subnormal: let the adder round to 2^-24 */
        float shifted = bits_float(magnitude) + 0.5f;
        return (uint16_t)(sign | (float_bits(shifted) - 0x3f000000u));
    }
    uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return (uint16_t)(sign | (rounded - 0x38000000u) >> 13);
}

uint16_t float_to_bfloat(float f)
{
    uint32_t u = float_bits(f);
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
