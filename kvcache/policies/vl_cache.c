/* VL-Cache (arXiv 2410.23317): modality-aware, layer-adaptive eviction of the prompt's KV cache, once, after prefill.
 *
 * While the prompt's last chunk runs, each layer's attention of the judging (post-vision) rows is probed: how many
 * entries stand above p of their row's maximum (the layer's density), and how much attention each token got (its
 * score). At the end the densities, as exact integers summed over all ranks, divide the budget over the layers; each KV
 * head then keeps its best tokens and a recent window. Scores never leave their rank. */
#include <stdlib.h>

#include "kvcache/eviction.h"
#include "kvcache/vl_cache.h"

struct vl_cache {
    struct eviction eviction;
    float *raw;         /* [most KV heads, max_context] a layer's scores before they are averaged, device */
    int64_t *kept;      /* [n_slots, n_layers, max heads] entries above the threshold, device */
    int64_t *host_kept; /* [n_layers, max heads] of the sequence at hand, host */
    int64_t *counts;    /* [n_layers] host */
    int max_heads;      /* most query heads of a layer */
};

static int vl_cache_open(struct policy *policy, struct arena *arena)
{
    const struct policy_env *env = &policy->env;
    size_t layers = (size_t)env->n_layers;
    struct vl_cache *vl = calloc(1, sizeof *vl);
    policy->state = vl;
    if (!vl) FAIL(ERR_NOMEM, "vl_cache: out of memory");
    TRY(eviction_open(&vl->eviction, env, arena));
    vl->max_heads = policy_most_heads(env);
    size_t heads = layers * (size_t)vl->max_heads;
    vl->counts = calloc(layers, sizeof *vl->counts);
    vl->host_kept = calloc(heads, sizeof *vl->host_kept);
    if (!vl->counts || !vl->host_kept) FAIL(ERR_NOMEM, "vl_cache: out of memory");
    if (policy->config.vl_cache.kernel > 1)
        TRY(arena_take(arena, (size_t)policy_most_kv_heads(env) * (size_t)env->max_context * sizeof *vl->raw,
                       "policy state", &vl->raw));
    return arena_take(arena, (size_t)env->kv->n_slots * heads * sizeof *vl->kept, "policy state", &vl->kept);
}

static void vl_cache_close(struct policy *policy)
{
    struct vl_cache *vl = policy->state;
    if (!vl) return;
    eviction_close(&vl->eviction);
    free(vl->counts);
    free(vl->host_kept);
    free(vl);
}

static int64_t *kept_of(const struct vl_cache *vl, const struct policy *policy, int slot)
{
    return vl->kept + (int64_t)slot * policy->env.n_layers * vl->max_heads;
}

static int vl_cache_rows(const struct policy *policy, const struct policy_sequence *sequence)
{
    return vl_cache_judging_rows(&policy->config.vl_cache, sequence->prompt_tokens, sequence->spans, sequence->n_spans,
                                 sequence->last_turn_start);
}

static int vl_cache_prefill_layer(struct policy *policy, const struct policy_sequence *sequence,
                                  const struct policy_prefill *in)
{
    const struct vl_cache *vl = policy->state;
    const struct attention_heads *heads = &policy->env.layers[in->layer].heads;
    const int kernel = policy->config.vl_cache.kernel;
    float *score = eviction_scores(&vl->eviction, sequence, in->layer);
    struct attention_probe probe = {
        .slot = sequence->slot,
        .n_rows = (int)in->q.dim[0],
        .first_position = in->first_position,
        .threshold = (float)policy->config.vl_cache.threshold,
        .column_sum = kernel > 1 ? vl->raw : score,
        .kept = kept_of(vl, policy, sequence->slot) + (int64_t)in->layer * vl->max_heads,
    };
    TRY(ops_attention_probe(policy->env.ops, in->q, policy->env.kv, heads, &probe));
    if (kernel <= 1) return OK;
    struct tensor raw = tensor_2d(vl->raw, DTYPE_F32, heads->n_kv_heads, sequence->prompt_tokens), averaged = raw;
    averaged.data = score;
    return ops_average_pool(policy->env.ops, averaged, raw, kernel);
}

static int vl_cache_prefill_end(struct policy *policy, const struct policy_sequence *sequence, int *k)
{
    struct vl_cache *vl = policy->state;
    const struct policy_env *env = &policy->env;
    int heads = vl->max_heads;
    TRY(ops_download(env->ops, vl->host_kept, kept_of(vl, policy, sequence->slot),
                     (size_t)env->n_layers * (size_t)heads * sizeof *vl->host_kept));
    for (int l = 0; l < env->n_layers; l++) {
        vl->counts[l] = 0;
        for (int h = 0; env->layers[l].counted && h < env->layers[l].heads.n_heads; h++)
            vl->counts[l] += vl->host_kept[(size_t)l * (size_t)heads + (size_t)h];
    }
    TRY(policy_sum_counts(policy, vl->counts, env->n_layers));
    double alpha = kv_budget_share(sequence->budget, sequence->prompt_tokens);
    vl_cache_budgets(&policy->config.vl_cache, vl->counts, env->n_layers, sequence->prompt_tokens, alpha, k);
    return OK;
}

static int vl_cache_select(struct policy *policy, const struct policy_sequence *sequence, const int *k,
                           struct policy_keep *out)
{
    struct vl_cache *vl = policy->state;
    int m = sequence->prompt_tokens;
    double alpha = kv_budget_share(sequence->budget, m);
    for (int l = 0; l < policy->env.n_layers; l++)
        vl->eviction.window[l] = vl_cache_window(&policy->config.vl_cache, k[l], m, alpha);
    return eviction_keep(policy, &vl->eviction, sequence, k, vl->eviction.window, out);
}

const struct policy_vt policy_vl_cache = {
    .name = "vl_cache",
    .paper = "VL-Cache, arXiv 2410.23317",
    .open = vl_cache_open,
    .close = vl_cache_close,
    .judging_rows = vl_cache_rows,
    .prefill_layer = vl_cache_prefill_layer,
    .prefill_end = vl_cache_prefill_end,
    .select = vl_cache_select,
};
