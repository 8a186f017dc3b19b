/* ClusterKV (arXiv 2412.03213; ALGORITHMS.md sections 3 and 11.4): every token stays, and a decode step attends to the
 * clusters of keys that score best against its queries.
 *
 * After the prompt each KV head of the layers from full_layers on clusters its keys, but for the first few (sinks);
 * every `window` generated tokens become clusters of their own. What is attended to leaves here as a struct kv_list, of
 * a KV head or of each query head: where the entries lie is not this file's business. KV heads are clustered one by one
 * and seeded by their number over all ranks, so nothing is said between ranks. A prompt's last text tokens may be
 * clusters of one token each (single_text): a key of text that lies among those of image patches is lost in their mean.
 * A prompt's layers are clustered together at its end or, a long one's with overlap on, one by one beside the layers
 * that follow: the same clusters.
 *
 * With kv_cache.evicted: host the prompt's clustered tokens lie in host memory and the lanes keep the sinks and what is
 * generated. What the lists then name is an entry of either. The same stands beside a policy that evicts: it clusters
 * and sends to host memory what that policy does not keep (cluster_kv_take). */
#include "kvcache/cluster_kv.h"

#include <stdlib.h>

#include "kvcache/choose.h"
#include "kvcache/eviction.h"

static const char label[] = "policy state";

/* Keys of a lane from which on, for each piece of the prompt, a layer's lanes are clustered by themselves where overlap
 * is on: fewer leave most of a GPU idle (a block takes 256 keys of a lane), and each layer's launches take longer than
 * to cluster all layers at once. */
enum { LEAST_ASIDE = 4096 };

/* Host's view of a slot. */
struct slot {
    bool runs;
    int n_waiting; /* generated tokens that wait for their window, behind the clustered ones */
    int n_blocks;
    uint64_t seed;
    int clustered; /* of a prompt in its last step: layers below this one have their clusters */
};

struct cluster_kv {
    struct kv_clusters clusters;
    struct slot *slot;          /* [n_slots] */
    struct cluster_state *lane; /* [n_slots * n_lanes] host, as clusters.state */
    int32_t *centre;            /* [n_lanes, max_clusters] device */
    int32_t *entry;             /* [n_slots * most lists of a layer, stride] device, the lists of a layer */
    int32_t *count;             /* [n_slots * most lists of a layer] device */
    int stride;
    int32_t *host_centre; /* as centre */
    int32_t *drawing;     /* [max_entries] */
    /* of one sequence whose tokens go to host memory */
    int32_t *evicted;              /* [n_lanes, max_context] device: its entries */
    struct cluster_count *counted; /* [n_lanes] device */
    struct cluster_count *host_counted;
    int32_t *n_evicted; /* [n_lanes] host */
    /* of ClusterKV's own decision what goes there */
    int32_t *sinks;      /* [n_lanes, n_sinks] device: the first tokens, over and over */
    int32_t *host_sinks; /* as sinks */
    int32_t *n_keep;     /* [n_lanes] host */
    int n_sinks;
    struct kv_recent recent; /* capacity 0: there is none */
};

const int64_t *cluster_kv_recall_counts(const struct policy *policy)
{
    const struct cluster_kv *s = policy->state;
    return s && s->recent.capacity ? s->recent.counts : NULL;
}

const struct kv_clusters *cluster_kv_clusters(const struct policy *policy)
{
    return &((const struct cluster_kv *)policy->state)->clusters;
}

static int least(int a, int b) { return a < b ? a : b; }

/* ---- state ---- */

/* Lists of a row in a layer of this rank, at most: one for each KV head, or for each query head. */
static int most_lists(const struct policy *policy)
{
    return policy->config.cluster_kv.group == CLUSTER_KV_QUERY_HEAD ? policy_most_heads(&policy->env)
                                                                    : policy_most_kv_heads(&policy->env);
}

static int place_clusters(struct policy *policy, struct cluster_kv *s, struct arena *arena)
{
    const struct policy_env *env = &policy->env;
    const struct kv_view *kv = env->kv;
    struct kv_clusters *c = &s->clusters;
    const size_t rows = (size_t)kv->n_slots * (size_t)c->n_lanes,
                 lists = (size_t)kv->n_slots * (size_t)most_lists(policy);
    const size_t centres = (size_t)c->n_lanes * (size_t)c->max_clusters;
    const struct tensor centroid = tensor_3d(NULL, env->ops->dtype, (int64_t)rows, c->max_clusters, kv->head_dim);
    TRY(arena_tensor(arena, centroid, label, &c->centroid));
    TRY(arena_take(arena, rows * (size_t)c->max_clusters * sizeof *c->size, label, &c->size));
    TRY(arena_take(arena, rows * (size_t)c->max_entries * sizeof *c->entry, label, &c->entry));
    TRY(arena_take(arena, rows * sizeof *c->state, label, &c->state));
    TRY(arena_take(arena, ops_cluster_bytes(env->ops, c->n_lanes, kv->head_dim, c->max_entries, c->max_clusters), label,
                   &c->work));
    TRY(arena_take(arena, centres * sizeof *s->centre, label, &s->centre));
    TRY(arena_take(arena, lists * (size_t)s->stride * sizeof *s->entry, label, &s->entry));
    TRY(arena_take(arena, lists * sizeof *s->count, label, &s->count));
    s->slot = calloc((size_t)kv->n_slots, sizeof *s->slot);
    s->host_centre = calloc(centres, sizeof *s->host_centre);
    s->drawing = calloc((size_t)c->max_entries, sizeof *s->drawing);
    s->lane = calloc(rows, sizeof *s->lane);
    if (!s->slot || !s->host_centre || !s->drawing || !s->lane) FAIL(ERR_NOMEM, "cluster_kv: out of memory");
    return OK;
}

static int take_recent(const struct policy *policy, struct arena *arena, struct kv_recent *r)
{
    const struct kv_view *kv = policy->env.kv;
    const size_t rows = (size_t)kv->n_slots * (size_t)r->n_lanes, places = rows * (size_t)r->capacity;
    const struct tensor pool = tensor_3d(NULL, policy->env.ops->dtype, (int64_t)places / kv->page_size,
                                         2 * (int64_t)kv->page_size, kv->head_dim);
    TRY(arena_tensor(arena, pool, label, &r->pool));
    TRY(arena_take(arena, rows * (size_t)r->max_entries * sizeof *r->place, label, &r->place));
    TRY(arena_take(arena, places * sizeof *r->holder, label, &r->holder));
    TRY(arena_take(arena, places * sizeof *r->stamp, label, &r->stamp));
    TRY(arena_take(arena, rows * sizeof *r->step, label, &r->step));
    TRY(arena_take(arena, 2 * places * sizeof *r->work, label, &r->work));
    return arena_take(arena, 2 * (size_t)kv->n_slots * sizeof *r->counts, label, &r->counts);
}

/* Places for what so many steps recall of the longest prompt. Where the plan was made for a smaller budget there are
 * fewer; lists that find no room are read from host memory. */
static int place_recent(struct policy *policy, struct cluster_kv *s, struct arena *arena)
{
    const struct policy_config *config = &policy->config;
    const struct kv_view *kv = policy->env.kv;
    const int most = policy->env.max_context;
    const int tokens = eviction_tokens(policy->beside ? config->recall_budget : config->budget, most);
    const int64_t wanted = (int64_t)config->recall_cache_steps * tokens;
    struct kv_recent r = {.first_lane = s->clusters.first_lane,
                          .n_lanes = s->clusters.n_lanes,
                          .max_entries = most,
                          .capacity = (int)((wanted < most ? wanted : most) + kv->page_size - 1) / kv->page_size,
                          .steps = config->recall_cache_steps};
    r.capacity *= kv->page_size;
    for (struct arena trial; arena->memory && r.capacity; r.capacity -= kv->page_size) {
        struct kv_recent unused = r;
        arena_measure(&trial);
        TRY(take_recent(policy, &trial, &unused));
        if (trial.used <= arena->size - arena->used) break;
    }
    if (!r.capacity || !r.n_lanes) return OK;
    TRY(take_recent(policy, arena, &r));
    s->recent = r;
    return OK;
}

/* What sending tokens to host memory takes, and deciding which. */
static int place_eviction(struct policy *policy, struct cluster_kv *s, struct arena *arena)
{
    const size_t lanes = (size_t)s->clusters.n_lanes, most = (size_t)policy->env.max_context;
    s->n_sinks = least(policy->config.cluster_kv.sinks, policy->env.max_context);
    const size_t sinks = lanes * (size_t)(policy->beside ? 0 : s->n_sinks);
    TRY(arena_take(arena, lanes * most * sizeof *s->evicted, label, &s->evicted));
    TRY(arena_take(arena, lanes * sizeof *s->counted, label, &s->counted));
    TRY(arena_take(arena, sinks * sizeof *s->sinks, label, &s->sinks));
    s->host_counted = calloc(lanes, sizeof *s->host_counted);
    s->n_evicted = calloc(lanes, sizeof *s->n_evicted);
    s->n_keep = calloc(lanes, sizeof *s->n_keep);
    s->host_sinks = calloc(sinks + 1, sizeof *s->host_sinks);
    if (!s->host_counted || !s->n_evicted || !s->n_keep || !s->host_sinks) FAIL(ERR_NOMEM, "cluster_kv: out of memory");
    for (size_t i = 0; i < sinks; i++) s->host_sinks[i] = (int32_t)(i % (size_t)s->n_sinks);
    return OK;
}

static int cluster_kv_open(struct policy *policy, struct arena *arena)
{
    const struct policy_env *env = &policy->env;
    const struct cluster_kv_options *options = &policy->config.cluster_kv;
    const int64_t most = cluster_kv_most(options, env->max_context);
    struct cluster_kv *s = calloc(1, sizeof *s);
    policy->state = s;
    if (!s) FAIL(ERR_NOMEM, "cluster_kv: out of memory");
    if (options->full_layers >= env->n_layers) return OK; /* no layer has clusters */
    if (most > MOST_CLUSTERS)
        FAIL(ERR_CONFIG,
             "kv_cache.cluster_kv: a lane of %d tokens could come to %lld clusters, at most %d are served; raise "
             "tokens_per_cluster (%d) or window over window_clusters (%d / %d), or lower max_model_len",
             env->max_context, (long long)most, MOST_CLUSTERS, options->tokens_per_cluster, options->window,
             options->window_clusters);
    s->clusters.first_lane = env->layers[options->full_layers].heads.lane;
    s->clusters.n_lanes = env->kv->lanes_per_slot - s->clusters.first_lane;
    s->clusters.max_clusters = (int)most;
    s->stride = s->clusters.max_entries = env->kv->max_pages * env->kv->page_size;
    TRY(place_clusters(policy, s, arena));
    if (!env->host) return OK;
    TRY(place_eviction(policy, s, arena));
    return place_recent(policy, s, arena);
}

static void cluster_kv_close(struct policy *policy)
{
    struct cluster_kv *s = policy->state;
    if (!s) return;
    void *owned[] = {s->slot,         s->lane,      s->host_centre, s->drawing,
                     s->host_counted, s->n_evicted, s->n_keep,      s->host_sinks};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    free(s);
}

/* ---- clustering ---- */

static struct cluster_state *lanes_of(const struct cluster_kv *s, int slot)
{
    return s->lane + (int64_t)slot * s->clusters.n_lanes;
}

static int send_state(struct policy *policy, int slot)
{
    const struct cluster_kv *s = policy->state;
    const size_t n = (size_t)s->clusters.n_lanes;
    return ops_upload(policy->env.ops, s->clusters.state + (size_t)slot * n, lanes_of(s, slot), n * sizeof *s->lane);
}

/* Layers first .. end - 1, or their lanes, counted from the clusters' first one. */
struct range {
    int first, end;
};

static struct range all_layers(const struct policy *policy)
{
    return (struct range){policy->config.cluster_kv.full_layers, policy->env.n_layers};
}

static struct range lanes_in(const struct policy *policy, struct range layers)
{
    const struct cluster_kv *s = policy->state;
    struct range lanes = {0, 0};
    if (layers.first >= layers.end) return lanes;
    lanes.first = lanes.end = policy->env.layers[layers.first].heads.lane - s->clusters.first_lane;
    for (int l = layers.first; l < layers.end; l++) lanes.end += policy->env.layers[l].heads.n_kv_heads;
    return lanes;
}

/* The first centres of these layers' lanes, n_clusters of each: lane i's first n[i].n_clusters among its n[i].n_entries
 * entries (n NULL: all lanes as `each`), the rest unused. block: 0 for the prompt (or its first piece), then 1, ... */
static int draw_centres(struct policy *policy, int slot, struct range layers, const struct cluster_count *n,
                        struct cluster_count each, int block)
{
    struct cluster_kv *s = policy->state;
    const struct policy_env *env = &policy->env;
    int32_t *centre = s->host_centre;
    for (int l = layers.first; l < layers.end; l++)
        for (int h = 0; h < env->layers[l].heads.n_kv_heads; h++, centre += each.n_clusters) {
            const struct cluster_count own = n ? *n++ : each;
            struct choose_stream stream = choose_stream(s->slot[slot].seed, l, env->layers[l].first_kv_head + h, block);
            choose(&stream, own.n_entries, own.n_clusters, s->drawing);
            for (int c = 0; c < each.n_clusters; c++) centre[c] = c < own.n_clusters ? s->drawing[c] : 0;
        }
    return ops_upload(env->ops, s->centre, s->host_centre, (size_t)(centre - s->host_centre) * sizeof *centre);
}

/* Entries that become clusters together, alike in all lanes. */
struct block {
    int number;
    struct cluster_count n;
    int first_entry, first_cluster, first_place; /* as in struct cluster_job */
};

/* Where each entry is a cluster, the first round is the last. */
static int cluster_block(struct policy *policy, int slot, struct range layers, const struct block *block)
{
    struct cluster_kv *s = policy->state;
    const struct range lanes = lanes_in(policy, layers);
    const bool singles = block->n.n_clusters == block->n.n_entries;
    if (lanes.first == lanes.end) return OK;
    TRY(draw_centres(policy, slot, layers, NULL, block->n, block->number));
    const struct cluster_job job = {.slot = slot,
                                    .first_entry = block->first_entry,
                                    .n_entries = block->n.n_entries,
                                    .first_cluster = block->first_cluster,
                                    .n_clusters = block->n.n_clusters,
                                    .first_place = block->first_place,
                                    .iterations = singles ? 1 : policy->config.cluster_kv.iterations,
                                    .first_lane = lanes.first,
                                    .n_lanes = lanes.end - lanes.first,
                                    .centre = s->centre};
    return ops_cluster_keys(policy->env.ops, policy->env.kv, &s->clusters, &job);
}

/* A prompt's pieces in these layers; *next: the block that would come behind them. */
static int cluster_prompt(struct policy *policy, const struct policy_sequence *sequence, struct range layers,
                          struct block *next)
{
    const struct cluster_kv_options *options = &policy->config.cluster_kv;
    const int m = sequence->prompt_tokens, first = least(options->sinks, m);
    *next = (struct block){.first_entry = first};
    for (int at = first; at < m; next->number++) {
        next->n = cluster_kv_next_piece(options, sequence, &at);
        TRY(cluster_block(policy, sequence->slot, layers, next));
        next->first_entry = at;
        next->first_place = at - first;
        next->first_cluster += next->n.n_clusters;
    }
    return OK;
}

static void extend_lanes(struct cluster_kv *s, int slot, int end, int n_clusters)
{
    struct cluster_state *lane = lanes_of(s, slot);
    for (int i = 0; i < s->clusters.n_lanes; i++) lane[i].end = end, lane[i].n_clusters = n_clusters;
}

/* Clustered tokens that a step attends to: the policy's budget, or the recall's where another policy evicts. */
static int tokens_chosen(const struct policy *policy, const struct policy_sequence *sequence)
{
    return eviction_tokens(policy->beside ? policy->config.recall_budget : sequence->budget, sequence->prompt_tokens);
}

static void begin_slot(struct policy *policy, const struct policy_sequence *sequence, int first)
{
    struct cluster_kv *s = policy->state;
    struct cluster_state *lane = lanes_of(s, sequence->slot);
    s->slot[sequence->slot] = (struct slot){.runs = policy_runs(policy, sequence), .seed = sequence->seed};
    for (int i = 0; i < s->clusters.n_lanes; i++)
        lane[i] = (struct cluster_state){
            .first = first, .end = first, .budget = tokens_chosen(policy, sequence), .n_clusters = 0, .n_host = 0};
}

/* Of another sequence nothing is found. */
static int forget_recent(struct policy *policy, int slot)
{
    const struct kv_recent *r = &((struct cluster_kv *)policy->state)->recent;
    const size_t lanes = (size_t)r->n_lanes, first = (size_t)slot * lanes;
    if (!r->capacity) return OK;
    TRY(ops_zero(policy->env.ops, r->stamp + first * (size_t)r->capacity,
                 lanes * (size_t)r->capacity * sizeof *r->stamp));
    TRY(ops_zero(policy->env.ops, r->step + first, lanes * sizeof *r->step));
    return ops_zero(policy->env.ops, r->counts + 2 * slot, 2 * sizeof *r->counts);
}

/* Whether a prompt's layers are clustered one by one. */
static bool goes_aside(const struct policy *policy, const struct policy_sequence *sequence)
{
    const struct cluster_kv_options *options = &policy->config.cluster_kv;
    const int m = sequence->prompt_tokens, first = least(options->sinks, m);
    int64_t n_means = 0; /* pieces with rounds of k-means */
    if (!options->overlap) return false;
    if (policy->env.host || policy->beside || sequence->continues || m - first < LEAST_ASIDE) return false;
    for (int at = first; at < m;) {
        const struct cluster_count n = cluster_kv_next_piece(options, sequence, &at);
        n_means += n.n_clusters < n.n_entries;
    }
    return m - first >= n_means * LEAST_ASIDE;
}

/* All keys of the prompt are in the layer's lanes, and stay as they are until cluster_kv_begin has joined. */
static int cluster_kv_prefill_layer(struct policy *policy, const struct policy_sequence *sequence,
                                    const struct policy_prefill *in)
{
    struct cluster_kv *s = policy->state;
    struct block next;
    const int full = policy->config.cluster_kv.full_layers;
    if (in->layer < full || !goes_aside(policy, sequence)) return OK;
    if (in->layer == full)
        begin_slot(policy, sequence, least(policy->config.cluster_kv.sinks, sequence->prompt_tokens));
    TRY(ops_aside_begin(policy->env.ops));
    const int rc = cluster_prompt(policy, sequence, (struct range){in->layer, in->layer + 1}, &next);
    ops_aside_end(policy->env.ops);
    if (!rc) s->slot[sequence->slot].clustered = in->layer + 1;
    return rc;
}

static int cluster_kv_begin(struct policy *policy, const struct policy_sequence *sequence)
{
    struct cluster_kv *s = policy->state;
    TRY(ops_aside_join(policy->env.ops));
    if (!s->slot || sequence->continues) return OK; /* a follow-up's tokens wait for their window like generated ones */
    if (policy->env.host && policy_runs(policy, sequence)) return OK; /* cluster_kv_take has begun it */
    const int m = sequence->prompt_tokens, first = least(policy->config.cluster_kv.sinks, m);
    struct slot *own = &s->slot[sequence->slot];
    struct range layers = all_layers(policy);
    if (goes_aside(policy, sequence) && own->clustered > layers.first) layers.first = own->clustered;
    begin_slot(policy, sequence, first);
    if (policy->env.host) TRY(forget_recent(policy, sequence->slot));
    if (own->runs) {
        struct block next;
        TRY(cluster_prompt(policy, sequence, layers, &next)); /* of no layer it is a count */
        extend_lanes(s, sequence->slot, next.first_entry, next.first_cluster);
        own->n_blocks = next.number ? next.number - 1 : 0; /* generated tokens begin with block 1 */
    }
    return send_state(policy, sequence->slot);
}

static int cluster_kv_decode_end(struct policy *policy, const int32_t *slot, int n)
{
    struct cluster_kv *s = policy->state;
    const struct cluster_kv_options *options = &policy->config.cluster_kv;
    const struct cluster_count block = {options->window, least(options->window_clusters, options->window)};
    if (policy->beside || !s->slot || !s->clusters.n_lanes)
        return OK; /* what another policy's lanes get stays as it is */
    for (int i = 0; i < n; i++) {
        struct slot *own = &s->slot[slot[i]];
        const struct cluster_state *lane = lanes_of(s, slot[i]);
        own->n_waiting++;
        if (!own->runs || own->n_waiting < options->window) continue;
        /* A lane that is full: its last step, or one too many. */
        if (lane->n_host + lane->end + options->window > s->clusters.max_entries ||
            lane->n_clusters + block.n_clusters > s->clusters.max_clusters)
            continue;
        const struct block next = {++own->n_blocks, block, lane->end, lane->n_clusters,
                                   lane->n_host + lane->end - lane->first};
        TRY(cluster_block(policy, slot[i], all_layers(policy), &next));
        extend_lanes(s, slot[i], lane->end + block.n_entries, lane->n_clusters + block.n_clusters);
        own->n_waiting -= options->window;
        TRY(send_state(policy, slot[i]));
    }
    return OK;
}

/* ---- to host memory ---- */

/* States of the lanes and what of each is to be clustered; the most of a lane. */
static struct cluster_count count_evicted(struct policy *policy, const struct policy_sequence *sequence,
                                          const int32_t *n_keep)
{
    struct cluster_kv *s = policy->state;
    struct cluster_state *lane = lanes_of(s, sequence->slot);
    struct cluster_count most = {0, 0};
    const int m = sequence->prompt_tokens;
    for (int i = 0; i < s->clusters.n_lanes; i++) {
        const int n = m - n_keep[i], clusters = n ? cluster_kv_count(&policy->config.cluster_kv, m, n) : 0;
        s->n_evicted[i] = n;
        s->host_counted[i] = (struct cluster_count){n, clusters};
        lane[i].first = lane[i].end = n_keep[i];
        lane[i].n_host = n;
        lane[i].n_clusters = clusters;
        if (n > most.n_entries) most.n_entries = n;
        if (clusters > most.n_clusters) most.n_clusters = clusters;
    }
    return most;
}

int cluster_kv_take(struct policy *policy, const struct policy_sequence *sequence, const struct policy_keep *keep)
{
    struct cluster_kv *s = policy->state;
    const struct policy_env *env = &policy->env;
    const int m = sequence->prompt_tokens, n_lanes = s->clusters.n_lanes, lane = s->clusters.first_lane;
    if (!s->slot || !n_lanes) return OK;
    if (keep->lane > lane) FAIL(ERR_BUG, "cluster_kv: lists from lane %d on, clusters from %d on", keep->lane, lane);
    const int32_t *n_keep = keep->n_keep + (lane - keep->lane);
    const int32_t *kept = keep->index + (int64_t)(lane - keep->lane) * keep->stride;
    begin_slot(policy, sequence, 0);
    TRY(forget_recent(policy, sequence->slot));
    const struct cluster_count most = count_evicted(policy, sequence, n_keep);
    if (most.n_entries) {
        TRY(ops_list_others(env->ops, s->evicted, m, kept, keep->stride, n_keep, m, n_lanes));
        TRY(ops_upload(env->ops, s->counted, s->host_counted, (size_t)n_lanes * sizeof *s->counted));
        TRY(draw_centres(policy, sequence->slot, all_layers(policy), s->host_counted, most, 0));
        const struct cluster_job job = {.slot = sequence->slot,
                                        .n_entries = most.n_entries,
                                        .n_clusters = most.n_clusters,
                                        .iterations = policy->config.cluster_kv.iterations,
                                        .centre = s->centre,
                                        .index = s->evicted,
                                        .count = s->counted,
                                        .index_stride = m};
        TRY(ops_cluster_keys(env->ops, env->kv, &s->clusters, &job));
        TRY(ops_kv_split(env->ops, env->kv, env->host, sequence->slot, lane, n_lanes, s->evicted, m, s->n_evicted));
    }
    return send_state(policy, sequence->slot);
}

static int cluster_kv_prefill_end(struct policy *policy, const struct policy_sequence *sequence, int *k)
{
    const struct cluster_kv_options *options = &policy->config.cluster_kv;
    for (int l = options->full_layers; l < policy->env.n_layers; l++)
        k[l] = least(options->sinks, sequence->prompt_tokens);
    return OK;
}

static int cluster_kv_select(struct policy *policy, const struct policy_sequence *sequence, const int *k,
                             struct policy_keep *out)
{
    struct cluster_kv *s = policy->state;
    const size_t n = (size_t)s->clusters.n_lanes;
    (void)k;
    *out = (struct policy_keep){.lane = policy->env.kv->lanes_per_slot};
    if (!s->slot || !n) return OK;
    for (size_t i = 0; i < n; i++) s->n_keep[i] = least(s->n_sinks, sequence->prompt_tokens);
    TRY(ops_upload(policy->env.ops, s->sinks, s->host_sinks, n * (size_t)s->n_sinks * sizeof *s->sinks));
    *out = (struct policy_keep){
        .index = s->sinks, .stride = s->n_sinks, .n_keep = s->n_keep, .lane = s->clusters.first_lane};
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
    const enum cluster_kv_group by = (enum cluster_kv_group)options->group;
    TRY(ops_select_clusters(env->ops, s->entry, s->count, s->stride, in->q, by, in->batch, env->kv, heads,
                            &s->clusters));
    const struct kv_recent *recent = s->recent.capacity ? &s->recent : NULL;
    if (recent) TRY(ops_recall(env->ops, s->entry, s->count, s->stride, in->batch, env->kv, heads, env->host, recent));
    const struct kv_list list = {s->entry, s->count, s->stride, env->host, recent, by == CLUSTER_KV_QUERY_HEAD};
    return ops_attention_decode_listed(env->ops, in->out, in->q, in->batch, env->kv, heads, &list);
}

/* Lists that are read of a lane. */
static int lane_lists(const struct policy *policy)
{
    const struct attention_heads *heads = &policy->env.layers[0].heads; /* groups are alike in all layers */
    return policy->config.cluster_kv.group == CLUSTER_KV_QUERY_HEAD ? heads->n_heads / heads->n_kv_heads : 1;
}

static struct policy_reads cluster_kv_reads(const struct policy *policy, const struct policy_sequence *sequence,
                                            double kept, int before)
{
    const struct policy_env *env = &policy->env;
    const struct cluster_kv_options *options = &policy->config.cluster_kv;
    const int m = sequence->prompt_tokens, budget = tokens_chosen(policy, sequence);
    const int keys = policy->beside ? m - (int)kept : m - least(options->sinks, m);
    const int blocks = policy->beside ? 0 : before / options->window, clustered = keys + blocks * options->window;
    int n_clusters = blocks * least(options->window_clusters, options->window);
    if (policy->env.host) n_clusters += keys ? cluster_kv_count(options, m, keys) : 0;
    for (int at = m - keys; !policy->env.host && at < m;)
        n_clusters += cluster_kv_next_piece(options, sequence, &at).n_clusters;
    /* Tokens that neither left nor are in clusters; kept is a mean over layers of which the first are whole. */
    const double lane = (policy->beside ? kept + keys : m) + before + 1, chosen = least(budget, clustered);
    const int full = least(options->full_layers, env->n_layers), layers = env->n_layers - full;
    const int lists = lane_lists(policy);
    if (!policy_runs(policy, sequence) || !n_clusters || (budget >= clustered && !policy->env.host))
        return (struct policy_reads){.tokens = lane * ((full + layers * lists) / (double)env->n_layers)};
    const int64_t centroid = env->kv->head_dim * (int64_t)dtype_size(env->ops->dtype) + (int64_t)sizeof(int32_t);
    return (struct policy_reads){.tokens = (full * lane + layers * lists * (lane - clustered + chosen)) / env->n_layers,
                                 .beside_bytes = (int64_t)policy_kv_heads(policy) * layers * lists *
                                                 (n_clusters * centroid + (int64_t)chosen * (int64_t)sizeof(int32_t)),
                                 .recalled = policy->env.host ? layers * chosen / env->n_layers : 0};
}

const struct policy_vt policy_cluster_kv = {
    .name = "cluster_kv",
    .paper = "ClusterKV, arXiv 2412.03213",
    .open = cluster_kv_open,
    .close = cluster_kv_close,
    .prefill_layer = cluster_kv_prefill_layer,
    .begin_decode = cluster_kv_begin,
    .decode_attention = cluster_kv_attend,
    .decode_end = cluster_kv_decode_end,
    .reads = cluster_kv_reads,
};

const struct policy_vt policy_cluster_kv_host = {
    .name = "cluster_kv",
    .paper = "ClusterKV, arXiv 2412.03213",
    .open = cluster_kv_open,
    .close = cluster_kv_close,
    .prefill_end = cluster_kv_prefill_end,
    .select = cluster_kv_select,
    .begin_decode = cluster_kv_begin,
    .decode_attention = cluster_kv_attend,
    .decode_end = cluster_kv_decode_end,
    .reads = cluster_kv_reads,
};
