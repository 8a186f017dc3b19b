/* vl_cache - the arithmetic of VL-Cache (arXiv 2410.23317) as pure functions, so that tests can hold each step against
 * the worked example and the oracle's vectors; the policy itself is policies/vl_cache.c. */
#ifndef VITRAIL_KVCACHE_VL_CACHE_H
#define VITRAIL_KVCACHE_VL_CACHE_H

#include <stdint.h>

#include "kvcache/policy.h"

/* vl_cache_judging_rows - number tau of judging (post-vision) rows, the last tau of m: from the end of the last image
 * or the start of the last turn, whichever is later; extended back over text to min_rows, never into an image; a prompt
 * that ends in an image uses its last max(1, min_rows) rows; no image: min(no_image_rows, m); then capped by max_rows.
 */
int vl_cache_judging_rows(const struct vl_cache_options *options, int m, const struct image_span *spans, int n_spans,
                          int last_turn_start);

/* vl_cache_budgets - tokens to keep in each layer (k [n_layers], 1..m) from the kept-entry counts of all query heads
 * (kept [n_layers] > 0): share_l = clip(kept_l / sum kept * alpha * n_layers, clip_min, clip_max), nothing
 * renormalised; rounded as options->rounding says. Section 1.1 step 4; rules of record 1 of ALGORITHMS.md section 11.
 */
void vl_cache_budgets(const struct vl_cache_options *options, const int64_t *kept, int n_layers, int m, double alpha,
                      int *k);

/* vl_cache_window - newest tokens that are always kept in a layer of budget k: max(1, floor(window * k)), at most k; or
 * of alpha * m with VL_CACHE_WINDOW_OF_PROMPT. */
int vl_cache_window(const struct vl_cache_options *options, int k, int m, double alpha);

#endif
