/* snapkv - the arithmetic of PyramidKV's budgets, for tests; the policies are policies/snapkv.c. */
#ifndef VITRAIL_KVCACHE_SNAPKV_H
#define VITRAIL_KVCACHE_SNAPKV_H

#include "kvcache/policy.h"

/* pyramid_kv_budgets - tokens to keep in each layer, k [n_layers], window included, of an m-token prompt whose mean
 * budget is `cap`: b = cap - window falls from 2 b - b / beta to b / beta in equal steps; the first layer gets no more
 * than there is, and the last one then more. cap <= window or one layer: cap; m <= cap: m. Section 5. */
void pyramid_kv_budgets(const struct pyramid_kv_options *options, int cap, int m, int n_layers, int *k);

#endif
