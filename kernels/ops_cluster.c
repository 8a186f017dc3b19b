/* The checking wrappers of the ops that cluster keys and select clusters, and of those that move what is clustered to
 * host memory. See ops.c. */
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
    if (job->first_lane < 0 || job->n_lanes < 0 || job->first_lane > clusters->n_lanes - job->n_lanes ||
        (!job->n_lanes && job->first_lane))
        FAIL(ERR_ARG, "%s: a job of %d lanes from %d on, clusters are of %d", op, job->n_lanes, job->first_lane,
             clusters->n_lanes);
    if (job->iterations < 1) FAIL(ERR_ARG, "%s: %d iterations, expected at least 1", op, job->iterations);
    POINTER(job->centre);
    if (job->index && (job->first_entry || job->index_stride < job->n_entries))
        FAIL(ERR_ARG, "%s: up to %d listed entries from entry %d on in lists of %d", op, job->n_entries,
             job->first_entry, job->index_stride);
    if (job->index) POINTER(job->count);
    return o->vt->cluster_keys(o, kv, clusters, job);
}

int ops_aside_begin(struct ops *o) { return o->vt->aside_begin ? o->vt->aside_begin(o) : OK; }

void ops_aside_end(struct ops *o)
{
    if (o->vt->aside_end) o->vt->aside_end(o);
}

int ops_aside_join(struct ops *o) { return o->vt->aside_join ? o->vt->aside_join(o) : OK; }

int ops_select_clusters(struct ops *o, int32_t *entry, int32_t *count, int stride, struct tensor q,
                        enum cluster_kv_group by, const struct seq_batch *batch, const struct kv_view *kv,
                        const struct attention_heads *heads, const struct kv_clusters *clusters)
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
    if (stride < clusters->max_clusters)
        FAIL(ERR_ARG, "%s: lists of %d entries, expected room for a lane's clusters (%d)", op, stride,
             clusters->max_clusters);
    if (!batch->n_seqs) return OK;
    POINTER(entry);
    POINTER(count);
    return o->vt->select_clusters(o, entry, count, stride, q, by, batch, kv, heads, clusters);
}

/* ---- to host memory ---- */

int ops_check__host(const char *op, const struct ops *o, const struct kv_view *kv, const struct kv_view *host)
{
    TRY(ops_check__kv(op, o, host));
    if (host->page_size != kv->page_size || host->head_dim != kv->head_dim || host->n_slots != kv->n_slots ||
        host->lanes_per_slot != kv->lanes_per_slot)
        FAIL(ERR_ARG,
             "%s: host memory has pages of %d x %d, %d slots of %d lanes, the cache pages of %d x %d, %d slots of %d",
             op, host->page_size, host->head_dim, host->n_slots, host->lanes_per_slot, kv->page_size, kv->head_dim,
             kv->n_slots, kv->lanes_per_slot);
    return OK;
}

int ops_list_others(struct ops *o, int32_t *other, int other_stride, const int32_t *keep, int keep_stride,
                    const int32_t *n_keep, int n, int n_lanes)
{
    const char *op = __func__;
    int most_kept = 0, most_others = 0;
    if (n < 0 || n_lanes < 0) FAIL(ERR_ARG, "%s: %d lists of numbers below %d", op, n_lanes, n);
    if (n_lanes == 0) return OK;
    POINTER(n_keep);
    for (int i = 0; i < n_lanes; i++) {
        if (n_keep[i] < 0 || n_keep[i] > n)
            FAIL(ERR_ARG, "%s: n_keep[%d] is %d, expected 0 .. %d", op, i, n_keep[i], n);
        if (n_keep[i] > most_kept) most_kept = n_keep[i];
        if (n - n_keep[i] > most_others) most_others = n - n_keep[i];
    }
    if (n_lanes > 1 && (most_kept > keep_stride || most_others > other_stride))
        FAIL(ERR_ARG, "%s: lists of %d and %d numbers, there is room for %d and %d", op, most_kept, most_others,
             keep_stride, other_stride);
    if (most_kept) POINTER(keep);
    if (!most_others) return OK;
    POINTER(other);
    return o->vt->list_others(o, other, other_stride, keep, keep_stride, n_keep, n, n_lanes);
}

int ops_kv_split(struct ops *o, const struct kv_view *kv, const struct kv_view *host, int slot, int lane, int n_lanes,
                 const int32_t *index, int index_stride, const int32_t *n_index)
{
    const char *op = __func__;
    int most = 0;
    TRY(ops_check__kv(op, o, kv));
    TRY(ops_check__host(op, o, kv, host));
    if (slot < 0 || slot >= kv->n_slots) FAIL(ERR_ARG, "%s: slot %d, the cache has %d", op, slot, kv->n_slots);
    if (lane < 0 || n_lanes < 0 || lane > kv->lanes_per_slot - n_lanes)
        FAIL(ERR_ARG, "%s: lanes %d .. %d, a slot has %d", op, lane, lane + n_lanes, kv->lanes_per_slot);
    if (n_lanes == 0) return OK;
    POINTER(n_index);
    for (int i = 0; i < n_lanes; i++) {
        if (n_index[i] < 0 || (n_lanes > 1 && n_index[i] > index_stride))
            FAIL(ERR_ARG, "%s: n_index[%d] is %d, expected 0 .. index_stride (%d)", op, i, n_index[i], index_stride);
        if (n_index[i] > most) most = n_index[i];
    }
    if (!most) return OK;
    POINTER(index);
    return o->vt->kv_split(o, kv, host, slot, lane, n_lanes, index, index_stride, n_index);
}

int ops_check__recent(const char *op, const struct ops *o, const struct kv_view *kv, const struct kv_recent *r)
{
    if (r->n_lanes < 1 || r->first_lane < 0 || r->first_lane > kv->lanes_per_slot - r->n_lanes)
        FAIL(ERR_ARG, "%s: recent tokens of lanes %d .. %d, a slot has %d", op, r->first_lane,
             r->first_lane + r->n_lanes, kv->lanes_per_slot);
    if (r->capacity < kv->page_size || r->capacity % kv->page_size || r->steps < 1 || r->max_entries < 1)
        FAIL(ERR_ARG, "%s: places for %d of %d recent tokens of %d steps, expected whole pages of %d", op, r->capacity,
             r->max_entries, r->steps, kv->page_size);
    return ops_check__tensor(op, "recent.pool", r->pool, 1u << o->dtype, 3,
                             (int64_t)kv->n_slots * r->n_lanes * (r->capacity / kv->page_size),
                             2 * (int64_t)kv->page_size, kv->head_dim);
}

int ops_recall(struct ops *o, int32_t *entry, const int32_t *count, int stride, const struct seq_batch *batch,
               const struct kv_view *kv, const struct attention_heads *heads, const struct kv_view *host,
               const struct kv_recent *recent)
{
    const char *op = __func__;
    TRY(ops_check__kv(op, o, kv));
    TRY(ops_check__host(op, o, kv, host));
    TRY(ops_check__heads(op, kv, heads));
    TRY(ops_check__batch(op, kv, batch, true));
    POINTER(recent);
    TRY(ops_check__recent(op, o, kv, recent));
    if (heads->lane < recent->first_lane || heads->lane + heads->n_kv_heads > recent->first_lane + recent->n_lanes)
        FAIL(ERR_ARG, "%s: a layer of lanes %d .. %d, recent tokens are of %d .. %d", op, heads->lane,
             heads->lane + heads->n_kv_heads, recent->first_lane, recent->first_lane + recent->n_lanes);
    if (stride < 1) FAIL(ERR_ARG, "%s: lists of %d entries", op, stride);
    if (!batch->n_seqs) return OK;
    POINTER(entry);
    POINTER(count);
    POINTER(recent->place);
    POINTER(recent->holder);
    POINTER(recent->stamp);
    POINTER(recent->step);
    POINTER(recent->work);
    POINTER(recent->counts);
    return o->vt->recall(o, entry, count, stride, batch, kv, heads, host, recent);
}
