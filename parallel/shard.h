/* shard - the shard plan: who owns which KV heads, query heads, MLP columns and vocabulary rows.
 *
 * Pure functions of the model's counts, the number of ranks, the rank and the layer: no state, no communicator.
 * Whole KV-head groups (one KV head with its query heads) are dealt out, contiguous and ascending by rank; what
 * does not divide evenly rotates over the layers, so that memory stays level. With more ranks than groups the
 * groups are replicated: each replica computes the whole group, and only the lowest-ranked one counts in sums. */
#ifndef VITRAIL_PARALLEL_SHARD_H
#define VITRAIL_PARALLEL_SHARD_H

#include <stdbool.h>
#include <stdint.h>

struct shard_heads {
    int kv_first, kv_count; /* KV heads [kv_first, kv_first + kv_count) of this rank; kv_count >= 1 */
    bool counted;           /* this rank adds its part to sums (o_proj, counts, scores, reported bytes) */
};

struct shard_range {
    int64_t first, count; /* items [first, first + count); count may be 0 */
};

/* shard_kv_heads - the KV heads of `rank` in `layer`. n_kv_heads, tp_size >= 1; 0 <= rank < tp_size; layer >= 0. */
struct shard_heads shard_kv_heads(int n_kv_heads, int tp_size, int rank, int layer);

/* shard_query_heads - the query heads that go with them: n_heads / n_kv_heads per KV head, the same order.
 * n_heads is a multiple of n_kv_heads. */
struct shard_range shard_query_heads(int n_heads, int n_kv_heads, int tp_size, int rank, int layer);

/* shard_max_kv_heads - the most KV heads that any rank holds in any layer; for the size of shared buffers. */
int shard_max_kv_heads(int n_kv_heads, int tp_size);

/* shard_kv_heads_total - KV heads of `rank`, summed over layers [0, n_layers); ranks differ by at most one. */
int64_t shard_kv_heads_total(int n_kv_heads, int tp_size, int rank, int n_layers);

/* shard_range - rows or columns [first, first + count) of `total`, dealt in whole units; ranks differ by at most
 * one unit, lower ranks get the remainder; ranks beyond the last unit get 0 items. unit >= 1; if it does not divide
 * total, the last unit is short. total >= 0. */
struct shard_range shard_range(int64_t total, int64_t unit, int tp_size, int rank);

/* shard_max_count - the largest share: rank 0's. */
int64_t shard_max_count(int64_t total, int64_t unit, int tp_size);

/* shard_mlp_unit - columns of an MLP are dealt in units of 16 if that divides them, else one by one. */
int64_t shard_mlp_unit(int64_t intermediate_size);

/* shard_image - the rank that encodes image i of a step. */
int shard_image(int64_t i, int tp_size);

#endif
