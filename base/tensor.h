/* tensor - a view: pointer, dtype, up to 4 dimensions and strides; passed by value, owns nothing.
 * The memory may be the host's or a device's: only the op table (kernels/ops.h) dereferences `data`. */
#ifndef VITRAIL_BASE_TENSOR_H
#define VITRAIL_BASE_TENSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum dtype { DTYPE_F32, DTYPE_F16, DTYPE_BF16, DTYPE_I32, DTYPE_I64, DTYPE_U8, DTYPE_N };

struct tensor {
    void *data;
    enum dtype dtype;
    int n_dims;
    int64_t dim[4];
    int64_t stride[4]; /* in elements; row-major, the last dimension is dense */
};

/* dtype_size - bytes of one element. dtype_name - "float32", "bfloat16", ... */
size_t dtype_size(enum dtype dtype);
const char *dtype_name(enum dtype dtype);

/* Dense row-major views over `data`. */
struct tensor tensor_1d(void *data, enum dtype dtype, int64_t n);
struct tensor tensor_2d(void *data, enum dtype dtype, int64_t rows, int64_t cols);
struct tensor tensor_3d(void *data, enum dtype dtype, int64_t a, int64_t b, int64_t c);

/* tensor_rows - rows [first, first + n) of the outermost dimension, sharing memory. No bounds check. */
struct tensor tensor_rows(struct tensor t, int64_t first, int64_t n);

/* tensor_count - number of elements; tensor_bytes - their size when dense. */
int64_t tensor_count(struct tensor t);
size_t tensor_bytes(struct tensor t);
bool tensor_is_dense(struct tensor t);
static inline bool tensor_is_null(struct tensor t) { return t.data == NULL; }

/* tensor_describe - "float32 [3, 4]" into buf, for error messages; returns buf. */
const char *tensor_describe(struct tensor t, char *buf, size_t size);

/* Conversions of one value; round to nearest even, as the hardware does. */
float half_to_float(uint16_t h);
uint16_t float_to_half(float f);
static inline float bfloat_to_float(uint16_t b)
{
    union {
        uint32_t u;
        float f;
    } x = {.u = (uint32_t)b << 16};
    return x.f;
}
uint16_t float_to_bfloat(float f);

/* size_mul, size_add - checked arithmetic for sizes that come from files and sockets: true on overflow. */
static inline bool size_mul(size_t a, size_t b, size_t *out) { return __builtin_mul_overflow(a, b, out); }
static inline bool size_add(size_t a, size_t b, size_t *out) { return __builtin_add_overflow(a, b, out); }

#endif
