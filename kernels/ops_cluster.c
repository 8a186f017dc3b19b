/* The checking wrappers of the ops that cluster keys and select clusters. See ops.c. */
#include "kernels/ops.h"
#include "kernels/ops_check.h"

#define POINTER(p) TRY(ops_check__pointer(op, #p, (p)))

static int check_clusters(const char *op, const struct ops *o, const struct kv_view *kv, const struct kv_clusters *c)
{
    POINTER(c);
    if (c->n_lanes < 1 || c->first_lane < 0 || c->first_lane > kv->lanes_per_slot - c->n_lanes)
        FAIL(ERR_ARG, "%s: clusters of lanes %d .. %d, a slot has %d", op, c->first_lane, c->first_lane + c->n_lanes,
             kv->lanes_per_slot);
    if (c->max_clusters < 1 || c->max_clusters > MOST_CLUSTERS || c->max_entries < 1)
        FAIL(ERR_ARG, "%s: room for %d clusters and %d entries a lane, expected 1 .. %d clusters", op, c->max_clusters,
             c->max_entries, MOST_CLUSTERS);
    TRY(ops_check__tensor(op, "clusters.centroid", c->centroid, 1u << o->dtype, 3, (int64_t)kv->n_slots * c->n_lanes,
                          c->max_clusters, kv->head_dim));
    POINTER(c->size);
    POINTER(c->entry);
    POINTER(c->state);
    return ops_check__pointer(op, "clusters.work", c->work);
}

size_t ops_cluster_bytes(const struct ops *o, int n_lanes, int head_dim, int max_entries, int max_clusters)
{
    return n_lanes > 0 ? o->vt->cluster_bytes(o, n_lanes, head_dim, max_entries, max_clusters) : 0;
}

int ops_cluster_keys(struct ops *o, const struct kv_view *kv, const struct kv_clusters *clusters,
                     const struct cluster_job *job)
{
    const char *op = __func__;
    TRY(ops_check__kv(op, o, kv));
    TRY(check_clusters(op, o, kv, clusters));
    POINTER(job);
    if (job->slot < 0 || job->slot >= kv->n_slots)
        FAIL(ERR_ARG, "%s: job.slot is %d, the cache has %d", op, job->slot, kv->n_slots);
    if (job->first_entry < 0 || job->n_entries < 0 ||
        (int64_t)job->first_entry + job->n_entries > (int64_t)kv->max_pages * kv->page_size)
        FAIL(ERR_ARG, "%s: %d entries from %d on, a lane holds %lld", op, job->n_entries, job->first_entry,
             (long long)kv->max_pages * kv->page_size);
    if (!job->n_entries) return OK;
    if (job->n_clusters < 1 || job->n_clusters > job->n_entries || job->first_cluster < 0 ||
        job->first_cluster > clusters->max_clusters - job->n_clusters)
        FAIL(ERR_ARG, "%s: %d entries in clusters %d .. %d, expected at most one an entry and %d in all", op,
             job->n_entries, job->first_cluster, job->first_cluster + job->n_clusters, clusters->max_clusters);
    if (job->first_place < 0 || job->first_place > clusters->max_entries - job->n_entries)
        FAIL(ERR_ARG, "%s: %d entries go to places from %d on, there is room for %d", op, job->n_entries,
             job->first_place, clusters->max_entries);
    if (job->iterations < 1) FAIL(ERR_ARG, "%s: %d iterations, expected at least 1", op, job->iterations);
    POINTER(job->centre);
    return o->vt->cluster_keys(o, kv, clusters, job);
}

int ops_select_clusters(struct ops *o, int32_t *entry, int32_t *count, int stride, struct tensor q, bool mean,
                        const struct seq_batch *batch, const struct kv_view *kv, const struct attention_heads *heads,
                        const struct kv_clusters *clusters)
{
    const char *op = __func__;
    TRY(ops_check__kv(op, o, kv));
    TRY(ops_check__heads(op, kv, heads));
    TRY(ops_check__batch(op, kv, batch, true));
    TRY(check_clusters(op, o, kv, clusters));
    TRY(ops_check__tensor(op, "q", q, 1u << o->dtype, 3, batch->n_seqs, heads->n_heads, heads->head_dim));
    if (heads->lane < clusters->first_lane ||
        heads->lane + heads->n_kv_heads > clusters->first_lane + clusters->n_lanes)
        FAIL(ERR_ARG, "%s: a layer of lanes %d .. %d, clusters are of %d .. %d", op, heads->lane,
             heads->lane + heads->n_kv_heads, clusters->first_lane, clusters->first_lane + clusters->n_lanes);
    if (stride < 1) FAIL(ERR_ARG, "%s: lists of %d entries", op, stride);
    if (!batch->n_seqs) return OK;
    POINTER(entry);
    POINTER(count);
    return o->vt->select_clusters(o, entry, count, stride, q, mean, batch, kv, heads, clusters);
}
