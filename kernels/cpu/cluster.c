/* Clusters of keys (ClusterKV): k-means by cosine over the entries of lanes, and the choice of clusters for a query.
 *
 * Lanes are clustered side by side, each by one thread and in one order: results do not depend on the number of
 * threads. */
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/lane.h"

/* What a thread works with. */
struct work {
    float *unit;    /* [max_clusters, head_dim] centres of length 1 */
    float *score;   /* [max_clusters] */
    int32_t *label; /* [max_entries] */
    int32_t *place; /* [max_clusters] */
    float *key;     /* [head_dim] of a quantised lane */
};

static int place_work(struct arena *arena, int head_dim, int max_entries, int max_clusters, struct work *w)
{
    static const char label[] = "cluster work";
    TRY(arena_take(arena, (size_t)max_clusters * (size_t)head_dim * sizeof *w->unit, label, &w->unit));
    TRY(arena_take(arena, (size_t)max_clusters * sizeof *w->score, label, &w->score));
    TRY(arena_take(arena, (size_t)max_clusters * sizeof *w->place, label, &w->place));
    TRY(arena_take(arena, (size_t)head_dim * sizeof *w->key, label, &w->key));
    return arena_take(arena, (size_t)max_entries * sizeof *w->label, label, &w->label);
}

size_t cpu__cluster_bytes(const struct ops *o, int n_lanes, int head_dim, int max_entries, int max_clusters)
{
    struct arena arena;
    struct work w;
    (void)n_lanes;
    arena_measure(&arena);
    /* A measuring arena refuses nothing. */
    if (place_work(&arena, head_dim, max_entries, max_clusters, &w)) return 0;
    return arena.used * (size_t)cpu__of(o)->n_threads;
}

/* One lane's clustering. */
struct lane_job {
    const struct vector_ops *vector;
    const struct kv_view *kv;
    const struct cluster_job *job;
    int lane, n_entries, n_clusters;
    const int32_t *index;
    float *centroid; /* [n_clusters, head_dim] */
    int32_t *size, *entry;
    struct work work;
};

/* The key of the job's i-th entry, until the next one is asked for. */
static const float *key_of(const struct lane_job *a, int i)
{
    const int entry = a->index ? a->index[i] : a->job->first_entry + i, dim = a->kv->head_dim;
    const enum kv_format format = lane__format(a->kv, a->lane);
    if (format == KV_PLAIN) return lane__key(a->kv, a->lane, entry);
    a->vector->widen_codes(a->work.key, lane__key_codes(a->kv, a->lane, entry), format == KV_FP8, dim);
    a->vector->scale(a->work.key, *lane__key_scale(a->kv, a->lane, entry), dim);
    return a->work.key;
}

/* The centres at length 1; a zero vector stays one. In double: equal directions get equal bits. */
static void find_units(const struct lane_job *a)
{
    const int dim = a->kv->head_dim;
    for (int c = 0; c < a->n_clusters; c++) {
        const float *centre = a->centroid + (int64_t)c * dim;
        double square = 0;
        for (int i = 0; i < dim; i++) square += (double)centre[i] * (double)centre[i];
        const double length = sqrt(square);
        for (int i = 0; i < dim; i++)
            a->work.unit[(int64_t)c * dim + i] = length > 0 ? (float)((double)centre[i] / length) : 0;
    }
}

/* Gives each key the label of the nearest centre; whether any label is new. A key's length changes no order. */
static bool assign(const struct lane_job *a)
{
    const int dim = a->kv->head_dim, n_clusters = a->n_clusters;
    float *score = a->work.score;
    bool changed = false;
    find_units(a);
    for (int i = 0; i < a->n_entries; i++) {
        a->vector->score_keys(score, key_of(a, i), a->work.unit, n_clusters, dim, 1);
        int best = 0;
        for (int c = 1; c < n_clusters; c++) best = score[c] > score[best] ? c : best;
        changed = changed || best != a->work.label[i];
        a->work.label[i] = best;
    }
    return changed;
}

static void count_sizes(const struct lane_job *a)
{
    memset(a->size, 0, (size_t)a->n_clusters * sizeof *a->size);
    for (int i = 0; i < a->n_entries; i++) a->size[a->work.label[i]]++;
}

/* Centres become the means of their keys. */
static void find_means(const struct lane_job *a)
{
    const int dim = a->kv->head_dim;
    count_sizes(a);
    for (int c = 0; c < a->n_clusters; c++)
        if (a->size[c]) memset(a->centroid + (int64_t)c * dim, 0, (size_t)dim * sizeof *a->centroid);
    for (int i = 0; i < a->n_entries; i++)
        a->vector->add_scaled(a->centroid + (int64_t)a->work.label[i] * dim, key_of(a, i), 1, dim);
    for (int c = 0; c < a->n_clusters; c++)
        for (int i = 0; i < dim && a->size[c]; i++) a->centroid[(int64_t)c * dim + i] /= (float)a->size[c];
}

static void cluster_lane(const struct lane_job *a, const int32_t *centre)
{
    const struct cluster_job *job = a->job;
    const int dim = a->kv->head_dim;
    bool changed = true;
    for (int i = 0; i < a->n_entries; i++) a->work.label[i] = -1;
    for (int c = 0; c < a->n_clusters; c++)
        memcpy(a->centroid + (int64_t)c * dim, key_of(a, centre[c]), (size_t)dim * sizeof *a->centroid);
    /* Labels that stay make the same centres, and those the same labels: nothing more would happen. */
    for (int i = 0; i < job->iterations && (changed = assign(a)); i++) find_means(a);
    if (changed) assign(a);
    count_sizes(a);
    for (int c = 0, place = 0; c < a->n_clusters; place += a->size[c++]) a->work.place[c] = place;
    for (int i = 0; i < a->n_entries; i++)
        a->entry[a->work.place[a->work.label[i]]++] = a->index ? ~i : job->first_entry + i;
}

static int check_job(const struct kv_view *kv, const struct kv_clusters *clusters, const struct cluster_job *job, int i)
{
    const int lane = job->slot * kv->lanes_per_slot + clusters->first_lane + job->first_lane + i;
    const int length = kv->lane_len[lane];
    const struct cluster_count n = job->index ? job->count[i] : (struct cluster_count){job->n_entries, job->n_clusters};
    if (n.n_entries < 0 || n.n_entries > job->n_entries || n.n_clusters > job->n_clusters ||
        n.n_clusters > n.n_entries || (n.n_entries > 0 && n.n_clusters < 1))
        FAIL(ERR_ARG, "ops_cluster_keys: lane %d, %d entries in %d clusters, expected up to %d in up to %d", lane,
             n.n_entries, n.n_clusters, job->n_entries, job->n_clusters);
    const int needed = !job->index   ? job->first_entry + job->n_entries
                       : n.n_entries ? job->index[(int64_t)i * job->index_stride + n.n_entries - 1] + 1
                                     : 0;
    if (length < needed)
        FAIL(ERR_ARG, "ops_cluster_keys: lane %d holds %d entries, %d are to be clustered", lane, length, needed);
    return OK;
}

int cpu__cluster_keys(struct ops *o, const struct kv_view *kv, const struct kv_clusters *clusters,
                      const struct cluster_job *job)
{
    const struct cpu *c = cpu__of(o);
    const int dim = kv->head_dim, n_lanes = job->n_lanes ? job->n_lanes : clusters->n_lanes;
    const size_t bytes = cpu__cluster_bytes(o, clusters->n_lanes, dim, clusters->max_entries, clusters->max_clusters);
    for (int i = 0; i < n_lanes; i++) TRY(check_job(kv, clusters, job, i));
    int failed = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(c->n_threads) reduction(| : failed)
    for (int i = 0; i < n_lanes; i++) {
        const int64_t row = (int64_t)job->slot * clusters->n_lanes + job->first_lane + i;
        const int64_t first = row * clusters->max_clusters;
        struct arena arena;
        struct lane_job a = {.vector = c->vector,
                             .kv = kv,
                             .job = job,
                             .lane = job->slot * kv->lanes_per_slot + clusters->first_lane + job->first_lane + i,
                             .centroid = cpu__row(clusters->centroid, row) + (int64_t)job->first_cluster * dim,
                             .size = clusters->size + first + job->first_cluster,
                             .n_entries = job->index ? job->count[i].n_entries : job->n_entries,
                             .n_clusters = job->index ? job->count[i].n_clusters : job->n_clusters,
                             .index = job->index ? job->index + (int64_t)i * job->index_stride : NULL,
                             .entry = clusters->entry + row * clusters->max_entries + job->first_place};
        const size_t share = bytes / (size_t)c->n_threads;
        arena_init(&arena, (char *)clusters->work + share * (size_t)omp_get_thread_num(), share);
        if (place_work(&arena, dim, clusters->max_entries, clusters->max_clusters, &a.work))
            failed = 1;
        else
            cluster_lane(&a, job->centre + (int64_t)i * job->n_clusters);
    }
    if (failed) FAIL(ERR_BUG, "ops_cluster_keys: the work area is too small");
    return OK;
}

/* ---- selection ---- */

struct ranked {
    float score;
    int32_t cluster;
};

static int falling(const void *a, const void *b)
{
    const struct ranked *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return (x->cluster > y->cluster) - (x->cluster < y->cluster);
}

/* q . centroid of the heads of a group, as one number a cluster. */
static void rank_clusters(const struct vector_ops *v, const float *q, int group, bool mean, const float *centroid,
                          int n_clusters, int dim, float *score, struct ranked *rank)
{
    for (int c = 0; c < n_clusters; c++) rank[c] = (struct ranked){0, c};
    for (int g = 0; g < group; g++) {
        v->score_keys(score, q + (int64_t)g * dim, centroid, n_clusters, dim, 1);
        for (int c = 0; c < n_clusters; c++) {
            if (mean)
                rank[c].score += score[c] / (float)group;
            else if (g == 0 || score[c] > rank[c].score)
                rank[c].score = score[c];
        }
    }
    qsort(rank, (size_t)n_clusters, sizeof *rank, falling);
}

/* A list of a row; returns its length. */
static int list_entries(const struct cluster_state *s, const struct kv_clusters *clusters, int64_t row,
                        const struct ranked *rank, int length, int32_t *out)
{
    const int32_t *size = clusters->size + row * clusters->max_clusters;
    const int32_t *entry = clusters->entry + row * clusters->max_entries;
    const int clustered = s->end - s->first + s->n_host;
    int n = 0, start[MOST_CLUSTERS], left = cpu__min(s->budget, clustered);
    for (int c = 0, at = 0; c < s->n_clusters; at += size[c++]) start[c] = at;
    for (int i = 0; i < s->first; i++) out[n++] = i;
    for (int i = 0; i < s->n_clusters && left > 0; i++) {
        const int c = rank[i].cluster, take = cpu__min(size[c], left);
        memcpy(out + n, entry + start[c], (size_t)take * sizeof *out);
        n += take;
        left -= take;
    }
    for (int i = s->end; i < length; i++) out[n++] = i;
    return n;
}

int cpu__select_clusters(struct ops *o, int32_t *entry, int32_t *count, int stride, struct tensor q,
                         enum cluster_kv_group by, const struct seq_batch *batch, const struct kv_view *kv,
                         const struct attention_heads *heads, const struct kv_clusters *clusters)
{
    const struct cpu *c = cpu__of(o);
    const int n_lists = by == CLUSTER_KV_QUERY_HEAD ? heads->n_heads : heads->n_kv_heads, dim = heads->head_dim;
    const int group = heads->n_heads / n_lists, lane_lists = n_lists / heads->n_kv_heads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(c->n_threads)
    for (int item = 0; item < batch->n_seqs * n_lists; item++) {
        const int slot = batch->slot[item / n_lists], lane = heads->lane + item % n_lists / lane_lists;
        count[item] = 0;
        if (slot < 0 || slot >= kv->n_slots) continue;
        const int length = kv->lane_len[slot * kv->lanes_per_slot + lane];
        const int64_t row = (int64_t)slot * clusters->n_lanes + lane - clusters->first_lane;
        const struct cluster_state *s = &clusters->state[row];
        const int clustered = s->end - s->first + s->n_host, taken = cpu__min(s->budget, clustered);
        count[item] = -1;
        if (s->n_clusters < 1 || taken < 1 || (taken == clustered && !s->n_host) || length < s->end ||
            s->first + taken + (length - s->end) > stride)
            continue;
        float score[MOST_CLUSTERS];
        struct ranked rank[MOST_CLUSTERS];
        rank_clusters(c->vector, cpu__row(q, item / n_lists) + (int64_t)(item % n_lists) * group * dim, group,
                      by == CLUSTER_KV_MEAN, cpu__row(clusters->centroid, row), s->n_clusters, dim, score, rank);
        count[item] = list_entries(s, clusters, row, rank, length, entry + (int64_t)item * stride);
    }
    return OK;
}
