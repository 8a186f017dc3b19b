/* chunks - how a long prompt is cut into pieces of at most max_num_batched_tokens: pure functions. */
#ifndef VITRAIL_RUNTIME_CHUNKS_H
#define VITRAIL_RUNTIME_CHUNKS_H

#include "kvcache/policy.h"

/* chunk_next - tokens of the next chunk of an m-token prompt of which `done` are in the cache, if `room` tokens fit in
 * this step. No cut falls inside an image (its features are made in one step), and the last chunk holds the last
 * `judging` rows. 0: nothing fits; wait for a step with more room. */
int chunk_next(int m, int done, int room, const struct image_span *spans, int n_spans, int judging);

/* chunk_possible - whether a prompt can be cut at all with full room in every step. */
bool chunk_possible(int m, int room, const struct image_span *spans, int n_spans, int judging);

#endif
