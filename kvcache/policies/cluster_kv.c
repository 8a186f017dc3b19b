/* ClusterKV (arXiv 2412.03213; ALGORITHMS.md sections 3 and 11.4): every token stays, and a decode step attends to the
 * clusters of keys that score best against its queries.
 *
 * After the prompt each KV head of the layers from full_layers on clusters its keys, but for the first few (sinks);
 * every `window` generated tokens become clusters of their own. What is attended to leaves here as a struct kv_list:
 * where the entries lie is not this file's business. KV heads are clustered one by one and seeded by their number over
 * all ranks, so nothing is said between ranks. */
#include "kvcache/cluster_kv.h"

#include <stdlib.h>

#include "kvcache/choose.h"
#include "kvcache/eviction.h"

static const char label[] = "policy state";

/* Host's view of a slot. */
struct slot {
    bool runs;
    int first, end; /* the clustered entries; generated tokens from `end` on wait for their window */
    int prompt, n_generated;
    int n_clusters, budget, n_blocks;
    uint64_t seed;
};

struct cluster_kv {
    struct kv_clusters clusters;
    struct slot *slot; /* [n_slots] */
    int32_t *centre;   /* [n_lanes, max_clusters] device */
    int32_t *entry;    /* [n_slots * most heads of a layer, stride] device, the lists of a layer */
    int32_t *count;    /* [n_slots * most heads of a layer] device */
    int stride;
    int32_t *host_centre; /* as centre */
    int32_t *drawing;     /* [max_entries] */
};

const struct kv_clusters *cluster_kv_clusters(const struct policy *policy)
{
    return &((const struct cluster_kv *)policy->state)->clusters;
}

static int least(int a, int b) { return a < b ? a : b; }

int cluster_kv_count(const struct cluster_kv_options *options, int m, int n_keys)
{
    int n = m / options->tokens_per_cluster;
    return least(n > 1 ? n : 1, n_keys);
}

/* A prompt of m tokens and what is generated behind it: m / per + (max_context - m) / window * new is largest at one of
 * its ends; a short prompt has a cluster all the same. */
int64_t cluster_kv_most(const struct cluster_kv_options *options, int max_context)
{
    int64_t prompt = max_context / options->tokens_per_cluster;
    int64_t generated = (int64_t)max_context * least(options->window_clusters, options->window) / options->window;
    return least(max_context, (int)(prompt > generated ? prompt : generated) + 1);
}

/* ---- state ---- */

static int place_clusters(struct policy *policy, struct cluster_kv *s, int most_heads, struct arena *arena)
{
    const struct policy_env *env = &policy->env;
    const struct kv_view *kv = env->kv;
    struct kv_clusters *c = &s->clusters;
    const size_t rows = (size_t)kv->n_slots * (size_t)c->n_lanes, lists = (size_t)(kv->n_slots * most_heads);
    const size_t centres = (size_t)c->n_lanes * (size_t)c->max_clusters;
    const struct tensor centroid = tensor_3d(NULL, env->ops->dtype, (int64_t)rows, c->max_clusters, kv->head_dim);
    TRY(arena_tensor(arena, centroid, label, &c->centroid));
    TRY(arena_take(arena, rows * (size_t)c->max_clusters * sizeof *c->size, label, &c->size));
    TRY(arena_take(arena, rows * (size_t)c->max_entries * sizeof *c->entry, label, &c->entry));
    TRY(arena_take(arena, (size_t)kv->n_slots * sizeof *c->state, label, &c->state));
    TRY(arena_take(arena, ops_cluster_bytes(env->ops, c->n_lanes, kv->head_dim, c->max_entries, c->max_clusters), label,
                   &c->work));
    TRY(arena_take(arena, centres * sizeof *s->centre, label, &s->centre));
    TRY(arena_take(arena, lists * (size_t)s->stride * sizeof *s->entry, label, &s->entry));
    TRY(arena_take(arena, lists * sizeof *s->count, label, &s->count));
    s->slot = calloc((size_t)kv->n_slots, sizeof *s->slot);
    s->host_centre = calloc(centres, sizeof *s->host_centre);
    s->drawing = calloc((size_t)c->max_entries, sizeof *s->drawing);
    if (!s->slot || !s->host_centre || !s->drawing) FAIL(ERR_NOMEM, "cluster_kv: out of memory");
    return OK;
}

static int cluster_kv_open(struct policy *policy, struct arena *arena)
{
    const struct policy_env *env = &policy->env;
    const struct cluster_kv_options *options = &policy->config.cluster_kv;
    const int64_t most = cluster_kv_most(options, env->max_context);
    struct cluster_kv *s = calloc(1, sizeof *s);
    int most_heads = 0;
    policy->state = s;
    if (!s) FAIL(ERR_NOMEM, "cluster_kv: out of memory");
    if (options->full_layers >= env->n_layers) return OK; /* no layer has clusters */
    if (most > MOST_CLUSTERS)
        FAIL(ERR_CONFIG,
             "kv_cache.cluster_kv: a lane of %d tokens could come to %lld clusters, at most %d are served; raise "
             "tokens_per_cluster (%d) or window over window_clusters (%d / %d), or lower max_model_len",
             env->max_context, (long long)most, MOST_CLUSTERS, options->tokens_per_cluster, options->window,
             options->window_clusters);
    for (int l = options->full_layers; l < env->n_layers; l++)
        if (env->layers[l].heads.n_kv_heads > most_heads) most_heads = env->layers[l].heads.n_kv_heads;
    s->clusters.first_lane = env->layers[options->full_layers].heads.lane;
    s->clusters.n_lanes = env->kv->lanes_per_slot - s->clusters.first_lane;
    s->clusters.max_clusters = (int)most;
    s->stride = s->clusters.max_entries = env->kv->max_pages * env->kv->page_size;
    return place_clusters(policy, s, most_heads, arena);
}

static void cluster_kv_close(struct policy *policy)
{
    struct cluster_kv *s = policy->state;
    if (!s) return;
    free(s->slot);
    free(s->host_centre);
    free(s->drawing);
    free(s);
}

/* ---- clustering ---- */

static int send_state(struct policy *policy, int slot)
{
    const struct cluster_kv *s = policy->state;
    const struct slot *own = &s->slot[slot];
    const struct cluster_state state = {own->runs ? own->n_clusters : 0, own->first, own->end, own->budget};
    return ops_upload(policy->env.ops, s->clusters.state + slot, &state, sizeof state);
}

/* The next n_entries entries of all lanes become n_clusters clusters; block: 0 for the prompt, then 1, 2, ... */
static int cluster_block(struct policy *policy, int slot, int n_entries, int n_clusters, int block)
{
    struct cluster_kv *s = policy->state;
    const struct policy_env *env = &policy->env;
    struct slot *own = &s->slot[slot];
    int32_t *centre = s->host_centre;
    for (int l = policy->config.cluster_kv.full_layers; l < env->n_layers; l++)
        for (int h = 0; h < env->layers[l].heads.n_kv_heads; h++, centre += n_clusters) {
            struct choose_stream stream = choose_stream(own->seed, l, env->layers[l].first_kv_head + h, block);
            choose(&stream, n_entries, n_clusters, s->drawing);
            for (int c = 0; c < n_clusters; c++) centre[c] = s->drawing[c];
        }
    TRY(ops_upload(env->ops, s->centre, s->host_centre,
                   (size_t)s->clusters.n_lanes * (size_t)n_clusters * sizeof *s->centre));
    const struct cluster_job job = {.slot = slot,
                                    .first_entry = own->end,
                                    .n_entries = n_entries,
                                    .first_cluster = own->n_clusters,
                                    .n_clusters = n_clusters,
                                    .first_place = own->end - own->first,
                                    .iterations = policy->config.cluster_kv.iterations,
                                    .centre = s->centre};
    TRY(ops_cluster_keys(env->ops, env->kv, &s->clusters, &job));
    own->end += n_entries;
    own->n_clusters += n_clusters;
    return OK;
}

static int cluster_kv_begin(struct policy *policy, const struct policy_sequence *sequence)
{
    struct cluster_kv *s = policy->state;
    const struct cluster_kv_options *options = &policy->config.cluster_kv;
    if (!s->slot || sequence->continues) return OK; /* a follow-up's tokens wait for their window like generated ones */
    struct slot *own = &s->slot[sequence->slot];
    const int m = sequence->prompt_tokens, first = least(options->sinks, m);
    *own = (struct slot){.runs = policy_runs(policy, sequence),
                         .first = first,
                         .end = first,
                         .prompt = m,
                         .budget = eviction_tokens(sequence->budget, m),
                         .seed = sequence->seed};
    if (own->runs && m > first)
        TRY(cluster_block(policy, sequence->slot, m - first, cluster_kv_count(options, m, m - first), 0));
    return send_state(policy, sequence->slot);
}

static int cluster_kv_decode_end(struct policy *policy, const int32_t *slot, int n)
{
    struct cluster_kv *s = policy->state;
    const struct cluster_kv_options *options = &policy->config.cluster_kv;
    const int n_new = least(options->window_clusters, options->window);
    for (int i = 0; s->slot && i < n; i++) {
        struct slot *own = &s->slot[slot[i]];
        own->n_generated++;
        if (!own->runs || own->prompt + own->n_generated - own->end < options->window) continue;
        /* A lane that is full: its last step, or one too many. */
        if (own->end + options->window > s->clusters.max_entries || own->n_clusters + n_new > s->clusters.max_clusters)
            continue;
        TRY(cluster_block(policy, slot[i], options->window, n_new, ++own->n_blocks));
        TRY(send_state(policy, slot[i]));
    }
    return OK;
}

/* ---- decoding ---- */

static int cluster_kv_attend(struct policy *policy, const struct policy_decode *in)
{
    const struct cluster_kv *s = policy->state;
    const struct policy_env *env = &policy->env;
    const struct cluster_kv_options *options = &policy->config.cluster_kv;
    const struct attention_heads *heads = &env->layers[in->layer].heads;
    if (in->layer < options->full_layers)
        return ops_attention_decode(env->ops, in->out, in->q, in->batch, env->kv, heads);
    if (in->batch->n_seqs > env->kv->n_slots)
        FAIL(ERR_BUG, "cluster_kv: a step of %d rows, there are %d slots", in->batch->n_seqs, env->kv->n_slots);
    TRY(ops_select_clusters(env->ops, s->entry, s->count, s->stride, in->q, options->group == CLUSTER_KV_MEAN,
                            in->batch, env->kv, heads, &s->clusters));
    const struct kv_list list = {s->entry, s->count, s->stride};
    return ops_attention_decode_listed(env->ops, in->out, in->q, in->batch, env->kv, heads, &list);
}

static struct policy_reads cluster_kv_reads(const struct policy *policy, const struct policy_sequence *sequence,
                                            double kept, int before)
{
    const struct cluster_kv *s = policy->state;
    const struct policy_env *env = &policy->env;
    const struct cluster_kv_options *options = &policy->config.cluster_kv;
    const int m = sequence->prompt_tokens, keys = m - least(options->sinks, m), blocks = before / options->window;
    const int clustered = keys + blocks * options->window, budget = eviction_tokens(sequence->budget, m);
    const int n_clusters =
        (keys ? cluster_kv_count(options, m, keys) : 0) + blocks * least(options->window_clusters, options->window);
    const double lane = kept + before + 1;
    if (!s->slot || !n_clusters || budget >= clustered) return (struct policy_reads){lane, 0};
    const int full = options->full_layers, layers = env->n_layers - full;
    const int64_t centroid = env->kv->head_dim * (int64_t)dtype_size(env->ops->dtype) + (int64_t)sizeof(int32_t);
    return (struct policy_reads){(full * lane + layers * (lane - clustered + budget)) / env->n_layers,
                                 (int64_t)policy_kv_heads(policy) * layers *
                                     (n_clusters * centroid + budget * (int64_t)sizeof(int32_t))};
}

const struct policy_vt policy_cluster_kv = {
    .name = "cluster_kv",
    .paper = "ClusterKV, arXiv 2412.03213",
    .open = cluster_kv_open,
    .close = cluster_kv_close,
    .begin_decode = cluster_kv_begin,
    .decode_attention = cluster_kv_attend,
    .decode_end = cluster_kv_decode_end,
    .reads = cluster_kv_reads,
};
