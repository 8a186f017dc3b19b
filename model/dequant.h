/* dequant - the number formats in which checkpoint files store tensors, and their conversion to what memory holds.
 *
 * A format is blocks of a fixed number of elements in a fixed number of bytes; F32, F16 and BF16 are blocks of one. A
 * quantised row is a whole number of blocks. Values equal those of the reference dequantisation bit for bit: a product
 * and a sum are rounded separately. Knows no files and no tensors. */
#ifndef VITRAIL_MODEL_DEQUANT_H
#define VITRAIL_MODEL_DEQUANT_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "base/tensor.h"

enum storage_type {
    STORAGE_F32,
    STORAGE_F16,
    STORAGE_BF16,
    STORAGE_Q8_0,
    STORAGE_Q4_0,
    STORAGE_Q4_1,
    STORAGE_Q5_0,
    STORAGE_Q5_1,
    STORAGE_Q4_K,
    STORAGE_Q5_K,
    STORAGE_Q6_K,
    STORAGE_OTHER, /* may stand in a file, cannot be read */
    STORAGE_N
};

enum { DEQUANT_MAX_BLOCK = 256, DEQUANT_MAX_BLOCK_BYTES = 210 };

/* dequant_block_size - elements of a block; dequant_block_bytes - its bytes. Both 0 for STORAGE_OTHER. */
int dequant_block_size(enum storage_type type);
int dequant_block_bytes(enum storage_type type);

/* dequant_natural_dtype - F32, F16, BF16 for themselves, F16 for quantised types. Not for STORAGE_OTHER. */
enum dtype dequant_natural_dtype(enum storage_type type);

/* dequant_is_dtype - true if memory of this dtype holds the very bytes of the file. */
bool dequant_is_dtype(enum storage_type type, enum dtype dtype);

/* dequant_to_float - elements [first, first + n) counted from the first element of `blocks`, which need not be aligned,
 * into out [n]. `first` and n need not be multiples of a block; blocks not touched are not read. */
void dequant_to_float(enum storage_type type, const void *blocks, int64_t first, int64_t n, float *out);

/* dequant_convert - the same into out [n] of dtype F32, F16 or BF16, rounding to nearest even. */
void dequant_convert(enum storage_type type, const void *blocks, int64_t first, int64_t n, enum dtype dtype, void *out);

#endif
