/* ops_aged - lanes in two parts: the first and the newest entries in the activation dtype, all between them in 8 bits.
 * A part of ops.h, which includes it.
 *
 * Two views share a pool of pages and its stack: the lanes of `kv` are plain (a prompt is read into them, policies work
 * on them, tokens are appended to them), those of `aged` have its 8-bit format and begin empty. Lane i of one and lane
 * i of the other are one sequence's cache. ops_kv_reset and ops_kv_release are called for both. */
#ifndef VITRAIL_KERNELS_OPS_AGED_H
#define VITRAIL_KERNELS_OPS_AGED_H

#include "kernels/ops.h"

/* ops_kv_age - of each of a slot's lanes in kv, what exceeds sinks + window entries, the oldest behind the first
 * `sinks` ones, goes to the end of the lane in aged, in aged->format, and the lane closes up. Meanwhile a lane takes as
 * many more pages as its new codes do or, where aged's lane is empty and they are fewer, as sinks + window entries do:
 * the codes then lie in pages that it had. A lane that cannot take them stays as it is (KV_ERROR_NO_FREE_PAGE,
 * KV_ERROR_LANE_FULL). */
int ops_kv_age(struct ops *o, const struct kv_view *kv, const struct kv_view *aged, int slot, int sinks,
               int window) MUST_CHECK;

/* ops_decode_begin_aged - ops_decode_begin where tokens are appended to kv and attention reads both. In the step aged
 * stays as it is. Needs ops_limits.aged. */
int ops_decode_begin_aged(struct ops *o, const struct seq_batch *batch, const struct kv_view *kv,
                          const struct kv_view *aged) MUST_CHECK;

/* ops_attention_decode_aged - ops_attention_decode over both parts of each lane: one softmax. Needs ops_limits.aged. */
int ops_attention_decode_aged(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                              const struct kv_view *kv, const struct kv_view *aged,
                              const struct attention_heads *heads) MUST_CHECK;

/* kv_age_pages - pages that a lane of `length` entries takes beside its own, at most, when it first ages. */
static inline int kv_age_pages(int length, int plain, int page_tokens, int code_tokens)
{
    const int room = (plain + page_tokens - 1) / page_tokens;
    const int codes = length > plain ? (length - plain + code_tokens - 1) / code_tokens : 0;
    return room < codes ? room : codes;
}

#endif
