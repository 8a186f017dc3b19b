#include "kvcache/policy.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/nearest.h"
#include "kvcache/cluster_kv.h"

static const struct policy_vt *const policies[] = {&policy_full,
                                                   &policy_vl_cache,
                                                   &policy_snapkv,
                                                   &policy_pyramid_kv,
                                                   &policy_streaming_llm,
                                                   &policy_random,
                                                   &policy_h2o,
                                                   &policy_quest,
                                                   &policy_pyramid_infer,
                                                   &policy_cluster_kv,
                                                   &policy_expected_attention,
                                                   &policy_tova};
enum { N_POLICIES = sizeof policies / sizeof *policies };

/* The policy that keeps everything: no hooks. */
const struct policy_vt policy_full = {.name = "full", .paper = "the whole cache, the reference"};

int kv_budget_parse(const char *text, struct kv_budget *out)
{
    char *end;
    double value = strtod(text, &end);
    if (end != text && !strcmp(end, "t")) {
        if (value < 1 || value > 1e9 || value != (double)(int)value)
            FAIL(ERR_CONFIG, "budget %s: a number of tokens to keep must be a whole number from 1 on, as in 64t", text);
        *out = (struct kv_budget){1, (int)value};
        return OK;
    }
    if (end == text || *end || !(value > 0) || value > 1)
        FAIL(ERR_CONFIG,
             "budget %s: expected the share of prompt tokens to KEEP, above 0 and at most 1, or tokens as in 64t",
             text);
    *out = (struct kv_budget){value, 0};
    return OK;
}

double kv_budget_share(struct kv_budget budget, int m)
{
    if (!budget.tokens) return budget.share;
    return budget.tokens >= m ? 1.0 : (double)budget.tokens / m;
}

const char *kv_budget_print(struct kv_budget budget, char *buf, size_t size)
{
    if (budget.tokens)
        snprintf(buf, size, "%dt", budget.tokens);
    else
        snprintf(buf, size, "%.10g", budget.share);
    return buf;
}

const char *policy_name(int i) { return i >= 0 && i < N_POLICIES ? policies[i]->name : NULL; }

int policy_find(const char *name, const struct policy_vt **out)
{
    const char *names[N_POLICIES + 1] = {0};
    char known[256] = "";
    for (int i = 0; i < N_POLICIES; i++) {
        if (!strcmp(policies[i]->name, name)) {
            *out = policies[i];
            return OK;
        }
        names[i] = policies[i]->name;
        strncat(known, i ? ", " : "", sizeof known - strlen(known) - 1);
        strncat(known, policies[i]->name, sizeof known - strlen(known) - 1);
    }
    FAIL(ERR_CONFIG, "kv_cache.policy: no policy is called '%.64s'; there are %s (nearest: %s)", name, known,
         nearest_name(name, names));
}

/* Whether what a policy evicts can be recalled: it is ClusterKV, evicts once, after the prompt, or never. */
static bool can_recall(const struct policy_vt *vt)
{
    if (vt == &policy_cluster_kv || !vt->open) return true;
    return vt->select && !vt->decode_attention && !vt->begin_decode && !vt->narrow;
}

static int check_evicted(const struct policy_config *config, const struct policy_vt *vt)
{
    if (config->evicted != KV_EVICTED_HOST) return OK;
    if (!can_recall(vt))
        FAIL(ERR_CONFIG,
             "kv_cache.evicted: host is not served with kv_cache.policy %s, whose decode steps are its own; served are "
             "cluster_kv and the policies that evict once, after the prompt",
             vt->name);
    if (vt->open && config->cluster_kv.group == CLUSTER_KV_QUERY_HEAD)
        FAIL(ERR_CONFIG,
             "kv_cache.evicted: host with kv_cache.cluster_kv.group query_head: tokens are recalled once for each KV "
             "head; set kv_cache.cluster_kv.group to max or mean, or kv_cache.evicted to free");
    if (vt->open && config->cluster_kv.single_text)
        FAIL(ERR_CONFIG,
             "kv_cache.cluster_kv.single_text %d with kv_cache.evicted: host, which clusters evicted tokens all "
             "together; set kv_cache.cluster_kv.single_text to 0, or kv_cache.evicted to free",
             config->cluster_kv.single_text);
    return OK;
}

/* Whether decode steps read the cache by ops of the policy's own, in place of the model's. */
static bool reads_lanes(const struct policy_config *config, const struct policy_vt *vt)
{
    if (vt == &policy_pyramid_infer) return config->pyramid_infer.generation_block > 0;
    return vt->decode_attention != NULL;
}

/* Lanes in two parts are read by the model's decode attention alone. */
static int check_plain(const struct policy_config *config, const struct policy_vt *vt)
{
    if (!kv_plain_tokens(config)) return OK;
    if (reads_lanes(config, vt))
        FAIL(ERR_CONFIG,
             "kv_cache.plain_sinks, kv_cache.plain_window with kv_cache.policy %s: that policy's decode steps read "
             "lanes of one dtype; set both to 0, %s",
             vt->name,
             vt == &policy_pyramid_infer ? "or kv_cache.pyramid_infer.generation_block to 0" : "or another policy");
    if (config->evicted == KV_EVICTED_HOST)
        FAIL(ERR_CONFIG,
             "kv_cache.plain_sinks, kv_cache.plain_window with kv_cache.evicted host: recall reads lanes of "
             "one dtype; set both to 0");
    return OK;
}

int policy_check(const struct policy_config *config)
{
    const struct policy_vt *vt;
    TRY(policy_find(config->policy, &vt));
    TRY(check_plain(config, vt));
    return check_evicted(config, vt);
}

/* Who brings evicted tokens back, where they are to stay. */
static int choose_recall(struct policy *policy)
{
    const struct policy_vt *vt = policy->vt;
    if (policy->config.evicted != KV_EVICTED_HOST || !vt->open) return OK;
    if (!policy->env.host) FAIL(ERR_BUG, "%s: kv_cache.evicted is host, and there are no pages there", vt->name);
    if (vt == &policy_cluster_kv) {
        policy->vt = &policy_cluster_kv_host;
        policy->recall = policy;
        return OK;
    }
    struct policy *recall = calloc(1, sizeof *recall);
    if (!recall) FAIL(ERR_NOMEM, "%s: out of memory", vt->name);
    *recall = (struct policy){.vt = &policy_cluster_kv, .config = policy->config, .env = policy->env, .beside = true};
    recall->config.cluster_kv.full_layers = 0; /* of every layer something was evicted */
    policy->recall = recall;
    return OK;
}

int policy_open(struct policy *policy, const struct policy_config *config, const struct policy_env *env,
                struct arena *arena)
{
    memset(policy, 0, sizeof *policy);
    TRY(policy_check(config));
    TRY(policy_find(config->policy, &policy->vt));
    policy->config = *config;
    policy->env = *env;
    if (config->evicted != KV_EVICTED_HOST) policy->env.host = NULL;
    TRY(choose_recall(policy));
    if (policy->vt->open) TRY(policy->vt->open(policy, arena));
    return policy->recall && policy->recall != policy ? policy->recall->vt->open(policy->recall, arena) : OK;
}

void policy_close(struct policy *policy)
{
    if (policy->recall && policy->recall != policy) {
        policy_close(policy->recall);
        free(policy->recall);
    }
    if (policy->vt && policy->vt->close) policy->vt->close(policy);
    memset(policy, 0, sizeof *policy);
}

struct policy *policy_decoder(struct policy *policy) { return policy->recall ? policy->recall : policy; }

int policy_evict(struct policy *policy, const struct policy_sequence *sequence, const struct policy_keep *keep)
{
    const struct kv_view *kv = policy->env.kv;
    if (policy->recall) TRY(cluster_kv_take(policy->recall, sequence, keep));
    return ops_kv_pack(policy->env.ops, kv, sequence->slot, keep->lane, kv->lanes_per_slot - keep->lane, keep->index,
                       keep->stride, keep->n_keep);
}

const int64_t *policy_recall_counts(const struct policy *policy)
{
    return policy->recall ? cluster_kv_recall_counts(policy->recall) : NULL;
}

int policy_host_tokens(const struct policy *policy, struct kv_budget budget, int m)
{
    const struct policy_sequence asked = {.prompt_tokens = m, .budget = budget};
    return policy->recall && policy_runs(policy, &asked) ? m : 0;
}

bool policy_runs(const struct policy *policy, const struct policy_sequence *sequence)
{
    return policy->vt->open && kv_budget_share(sequence->budget, sequence->prompt_tokens) < 1.0;
}

int policy_judging_rows(const struct policy *policy, const struct policy_sequence *sequence)
{
    return policy->vt->judging_rows ? policy->vt->judging_rows(policy, sequence) : 1;
}

struct policy_reads policy_step_reads(const struct policy *policy, const struct policy_sequence *sequence, double kept,
                                      int before)
{
    const struct policy *decoder = policy->recall ? policy->recall : policy;
    if (decoder->vt && decoder->vt->reads) return decoder->vt->reads(decoder, sequence, kept, before);
    return (struct policy_reads){.tokens = kept + before + 1};
}

int policy_kv_heads(const struct policy *policy)
{
    const struct attention_heads *heads = &policy->env.layers[0].heads; /* every rank has a group of heads at least */
    return policy->env.g_n_heads / (heads->n_heads / heads->n_kv_heads);
}

int policy_most_heads(const struct policy_env *env)
{
    int most = 1;
    for (int l = 0; l < env->n_layers; l++)
        if (env->layers[l].heads.n_heads > most) most = env->layers[l].heads.n_heads;
    return most;
}

int policy_most_kv_heads(const struct policy_env *env)
{
    int most = 1;
    for (int l = 0; l < env->n_layers; l++)
        if (env->layers[l].heads.n_kv_heads > most) most = env->layers[l].heads.n_kv_heads;
    return most;
}

bool policy_speaks(const struct policy *policy) { return policy->env.comm->rank == 0; }

int policy_sum_scores(struct policy *policy, int64_t *scores, int64_t n)
{
    if (policy->env.comm->size == 1) return OK;
    return comm_all_reduce_sum(policy->env.comm, tensor_1d(scores, DTYPE_I64, n), policy->env.ops->stream);
}

int policy_sum_counts(struct policy *policy, int64_t *counts, int n)
{
    struct comm *comm = policy->env.comm;
    int64_t all[8 * 256];
    if (comm->size == 1) return OK;
    /* In pieces, so that the gathered counts need no allocation. */
    int piece = (int)(sizeof all / sizeof *all) / comm->size;
    if (piece < 1)
        FAIL(ERR_UNSUPPORTED, "%d ranks: counts are summed over at most %zu", comm->size, sizeof all / sizeof *all);
    for (int first = 0; first < n; first += piece) {
        int m = n - first < piece ? n - first : piece;
        TRY(comm_all_gather_host(comm, all, counts + first, (size_t)m * sizeof *counts));
        for (int i = 0; i < m; i++) {
            int64_t sum = 0;
            for (int r = 0; r < comm->size; r++) sum += all[r * m + i];
            counts[first + i] = sum;
        }
    }
    return OK;
}
