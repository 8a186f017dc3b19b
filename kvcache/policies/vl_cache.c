/* VL-Cache (arXiv 2410.23317): modality-aware, layer-adaptive eviction of the prompt's KV cache, once, after prefill.
 *
 * While the prompt's last chunk runs, each layer's attention of the judging (post-vision) rows is probed: how many
 * entries stand above p of their row's maximum (the layer's density), and how much attention each token got (its
 * score). At the end the densities, as exact integers summed over all ranks, divide the budget over the layers; each KV
 * head then keeps its best tokens and a recent window. Scores never leave their rank. */
#include <stdlib.h>
#include <string.h>

#include "kvcache/vl_cache.h"

struct vl_cache {
    float *score;              /* per layer [n_kv_heads, m] of every finishing prompt, device; see score_of */
    int64_t *kept;             /* [n_layers, max heads] of the sequence at hand, device */
    int32_t *index;            /* [lanes, max_context] the keep lists of one sequence, device */
    int *lane_k, *lane_window; /* [lanes] host */
    int64_t *host_kept;        /* the same as kept, host */
    int64_t *counts;           /* [n_layers] host */
    int64_t *layer_first;      /* [n_layers] KV heads of this rank in the layers before, host */
    int max_heads, max_sequences;
    int64_t total_kv_heads;
};

static void find_sizes(const struct policy_env *env, struct vl_cache *vl)
{
    vl->max_heads = 1;
    for (int l = 0; l < env->n_layers; l++) {
        const struct attention_heads *heads = &env->layers[l].heads;
        if (heads->n_heads > vl->max_heads) vl->max_heads = heads->n_heads;
        vl->layer_first[l] = vl->total_kv_heads;
        vl->total_kv_heads += heads->n_kv_heads;
    }
}

static int vl_cache_open(struct policy *policy, struct arena *arena)
{
    const struct policy_env *env = &policy->env;
    size_t layers = (size_t)env->n_layers;
    struct vl_cache *vl = calloc(1, sizeof *vl);
    policy->state = vl;
    if (!vl) FAIL(ERR_NOMEM, "vl_cache: out of memory");
    vl->layer_first = calloc(layers, sizeof *vl->layer_first);
    vl->counts = calloc(layers, sizeof *vl->counts);
    if (!vl->layer_first || !vl->counts) FAIL(ERR_NOMEM, "vl_cache: out of memory");
    find_sizes(env, vl);
    vl->max_sequences = env->kv->n_slots;
    vl->host_kept = calloc(layers * (size_t)vl->max_heads, sizeof *vl->host_kept);
    vl->lane_k = calloc((size_t)vl->total_kv_heads + 1, sizeof *vl->lane_k);
    vl->lane_window = calloc((size_t)vl->total_kv_heads + 1, sizeof *vl->lane_window);
    if (!vl->host_kept || !vl->lane_k || !vl->lane_window) FAIL(ERR_NOMEM, "vl_cache: out of memory");
    size_t scores = (size_t)vl->total_kv_heads * (size_t)env->max_prompt_tokens;
    size_t counts = (size_t)vl->max_sequences * layers * (size_t)vl->max_heads;
    TRY(arena_take(arena, scores * sizeof *vl->score, "policy state", &vl->score));
    TRY(arena_take(arena, counts * sizeof *vl->kept, "policy state", &vl->kept));
    return arena_take(arena, (size_t)vl->total_kv_heads * (size_t)env->max_context * sizeof *vl->index, "policy state",
                      &vl->index);
}

static void vl_cache_close(struct policy *policy)
{
    struct vl_cache *vl = policy->state;
    if (!vl) return;
    free(vl->layer_first);
    free(vl->counts);
    free(vl->host_kept);
    free(vl->lane_k);
    free(vl->lane_window);
    free(vl);
}

/* Scores of a prompt at a layer, [n_kv_heads, m]: prompts one after the other, layers within a prompt. */
static float *score_of(const struct vl_cache *vl, const struct policy_sequence *sequence, int layer)
{
    return vl->score + vl->total_kv_heads * sequence->first_column + vl->layer_first[layer] * sequence->prompt_tokens;
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
    struct attention_probe probe = {
        .slot = sequence->slot,
        .n_rows = (int)in->q.dim[0],
        .first_position = in->first_position,
        .threshold = (float)policy->config.vl_cache.threshold,
        .column_sum = score_of(vl, sequence, in->layer),
        .kept = kept_of(vl, policy, sequence->slot) + (int64_t)in->layer * vl->max_heads,
    };
    return ops_attention_probe(policy->env.ops, in->q, policy->env.kv, &policy->env.layers[in->layer].heads, &probe);
}

static int vl_cache_prefill_end(struct policy *policy, const struct policy_sequence *sequence, int *k)
{
    struct vl_cache *vl = policy->state;
    const struct policy_env *env = &policy->env;
    TRY(ops_download(env->ops, vl->host_kept, kept_of(vl, policy, sequence->slot),
                     (size_t)env->n_layers * (size_t)vl->max_heads * sizeof *vl->host_kept));
    for (int l = 0; l < env->n_layers; l++) {
        vl->counts[l] = 0;
        for (int h = 0; env->layers[l].counted && h < env->layers[l].heads.n_heads; h++)
            vl->counts[l] += vl->host_kept[(size_t)l * (size_t)vl->max_heads + (size_t)h];
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
    const struct policy_env *env = &policy->env;
    int m = sequence->prompt_tokens, lane = 0;
    double alpha = kv_budget_share(sequence->budget, m);
    for (int l = 0; l < env->n_layers; l++)
        for (int h = 0; h < env->layers[l].heads.n_kv_heads; h++, lane++) {
            vl->lane_k[lane] = k[l];
            vl->lane_window[lane] = vl_cache_window(&policy->config.vl_cache, k[l], m, alpha);
        }
    *out = (struct policy_keep){vl->index, m};
    return ops_select_top(env->ops, vl->index, m, tensor_2d(score_of(vl, sequence, 0), DTYPE_F32, lane, m), vl->lane_k,
                          vl->lane_window);
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
