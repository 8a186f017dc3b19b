/* cluster_kv - what tests look at of the ClusterKV policy, which is policies/cluster_kv.c. */
#ifndef VITRAIL_KVCACHE_CLUSTER_KV_H
#define VITRAIL_KVCACHE_CLUSTER_KV_H

#include "kvcache/policy.h"

/* cluster_kv_clusters - the clusters of an open ClusterKV policy: device memory, the policy's. */
const struct kv_clusters *cluster_kv_clusters(const struct policy *policy);

/* cluster_kv_count - clusters of a prompt of m tokens with n_keys of them to be clustered. */
int cluster_kv_count(const struct cluster_kv_options *options, int m, int n_keys);

/* cluster_kv_most - the most clusters that a lane of at most max_context tokens can come to. */
int64_t cluster_kv_most(const struct cluster_kv_options *options, int max_context);

#endif
