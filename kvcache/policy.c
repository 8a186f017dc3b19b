#include "kvcache/policy.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/nearest.h"

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

/* Whether decode steps read lanes by ops of the policy's own, which know the model's dtype alone. */
static bool reads_lanes(const struct policy_vt *vt, const struct policy_config *config)
{
    if (vt == &policy_pyramid_infer) return config->pyramid_infer.generation_block > 0;
    return vt->decode_attention != NULL;
}

int policy_check(const struct policy_config *config)
{
    const struct policy_vt *vt;
    TRY(policy_find(config->policy, &vt));
    if (kv_dtype_format(config->dtype) != KV_PLAIN && reads_lanes(vt, config))
        FAIL(ERR_CONFIG,
             "kv_cache.dtype %s with kv_cache.policy %s: that policy's decode steps read the model's dtype alone; set "
             "kv_cache.dtype to auto, %s",
             config->dtype == KV_DTYPE_FP8 ? "fp8" : "int8", vt->name,
             vt == &policy_pyramid_infer ? "or kv_cache.pyramid_infer.generation_block to 0" : "or another policy");
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
    return policy->vt->open ? policy->vt->open(policy, arena) : OK;
}

void policy_close(struct policy *policy)
{
    if (policy->vt && policy->vt->close) policy->vt->close(policy);
    memset(policy, 0, sizeof *policy);
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
    if (policy->vt && policy->vt->reads && policy_runs(policy, sequence))
        return policy->vt->reads(policy, sequence, kept, before);
    return (struct policy_reads){kept + before + 1, 0};
}

int policy_kv_heads(const struct policy *policy)
{
    const struct attention_heads *heads = &policy->env.layers[0].heads; /* every rank has a group of heads at least */
    return policy->env.g_n_heads / (heads->n_heads / heads->n_kv_heads);
}

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
