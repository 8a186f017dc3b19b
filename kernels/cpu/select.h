/* select - ranking of floats by integer keys, for select_top and for sampling. */
#ifndef VITRAIL_KERNELS_CPU_SELECT_H
#define VITRAIL_KERNELS_CPU_SELECT_H

#include <stdint.h>

/* select__key - an integer that orders as the float does: -inf .. inf, NaN below all, -0 equal to 0. */
uint32_t select__key(float value);

/* select__kth_key - key of the k-th best (1 <= k <= n) of n values; *n_equal: how many with just this key are among
 * the best k. */
uint32_t select__kth_key(const float *value, int64_t n, int64_t k, int64_t *n_equal);

#endif
