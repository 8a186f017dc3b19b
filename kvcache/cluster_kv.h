/* cluster_kv - what others see of the ClusterKV policy, which is policies/cluster_kv.c: the recall of evicted tokens
 * from host memory, and what tests look at. */
#ifndef VITRAIL_KVCACHE_CLUSTER_KV_H
#define VITRAIL_KVCACHE_CLUSTER_KV_H

#include "kvcache/policy.h"

/* cluster_kv_clusters - the clusters of an open ClusterKV policy: device memory, the policy's. */
const struct kv_clusters *cluster_kv_clusters(const struct policy *policy);

/* cluster_kv_count - clusters of a prompt of m tokens with n_keys of them to be clustered. */
int cluster_kv_count(const struct cluster_kv_options *options, int m, int n_keys);

/* cluster_kv_most - the most clusters that a lane of at most max_context tokens can come to. */
int64_t cluster_kv_most(const struct cluster_kv_options *options, int max_context);

/* cluster_kv_next_piece - how many entries from *at on are clustered together, and how many clusters they become; *at
 * moves behind them. A prompt's pieces begin behind its sinks and end with it. */
struct cluster_count cluster_kv_next_piece(const struct cluster_kv_options *options,
                                           const struct policy_sequence *sequence, int *at);

/* cluster_kv_recall_counts - see policy_recall_counts. */
const int64_t *cluster_kv_recall_counts(const struct policy *policy);

/* cluster_kv_take - of an open ClusterKV policy with pages in host memory: clusters the keys of all tokens of a prompt
 * that a decision does not keep and copies those tokens to host memory, lane by lane; decode steps then attend to the
 * lanes as they will be packed and to the best clusters. Before the lanes are packed. */
int cluster_kv_take(struct policy *policy, const struct policy_sequence *sequence,
                    const struct policy_keep *keep) MUST_CHECK;

#endif
