#include "kvcache/eviction.h"

#include <stdlib.h>

static const char label[] = "policy state";

static void count_lanes(const struct policy_env *env, struct eviction *e)
{
    for (int l = 0; l < env->n_layers; l++) {
        e->layer_first[l] = e->n_lanes;
        e->n_lanes += env->layers[l].heads.n_kv_heads;
    }
}

int eviction_open(struct eviction *e, const struct policy_env *env, struct arena *arena)
{
    *e = (struct eviction){.layer_first = calloc((size_t)env->n_layers, sizeof *e->layer_first),
                           .window = calloc((size_t)env->n_layers, sizeof *e->window),
                           .group = calloc((size_t)env->n_layers, sizeof *e->group)};
    if (!e->layer_first || !e->window || !e->group) FAIL(ERR_NOMEM, "policy: out of memory");
    count_lanes(env, e);
    size_t lanes = (size_t)e->n_lanes;
    e->lane_k = calloc(lanes + 1, sizeof *e->lane_k);
    e->lane_window = calloc(lanes + 1, sizeof *e->lane_window);
    if (!e->lane_k || !e->lane_window) FAIL(ERR_NOMEM, "policy: out of memory");
    TRY(arena_take(arena, lanes * (size_t)env->max_prompt_tokens * sizeof *e->score, label, &e->score));
    TRY(arena_take(arena, lanes * sizeof *e->share, label, &e->share));
    return arena_take(arena, lanes * (size_t)env->max_context * sizeof *e->index, label, &e->index);
}

void eviction_close(struct eviction *e)
{
    free(e->layer_first);
    free(e->window);
    free(e->group);
    free(e->lane_k);
    free(e->lane_window);
    *e = (struct eviction){0};
}

float *eviction_scores(const struct eviction *e, const struct policy_sequence *sequence, int layer)
{
    return e->score + e->n_lanes * sequence->first_column + e->layer_first[layer] * sequence->prompt_tokens;
}

int eviction_tokens(struct kv_budget budget, int m)
{
    int k = policy_floor(kv_budget_share(budget, m) * m);
    return k < 1 ? 1 : k > m ? m : k;
}

int eviction_budgets(struct policy *policy, const struct policy_sequence *sequence, int *k)
{
    for (int l = 0; l < policy->env.n_layers; l++) k[l] = eviction_tokens(sequence->budget, sequence->prompt_tokens);
    return OK;
}

/* Lets the heads of each layer compete for the layer's tokens; leaves each lane's number in lane_k. */
static int share_out(struct policy *policy, struct eviction *e, struct tensor score)
{
    const struct policy_env *env = &policy->env;
    int n_groups = 0;
    for (int l = 0; l < env->n_layers; l++) {
        int first = (int)e->layer_first[l], heads = env->layers[l].heads.n_kv_heads;
        if (!heads) continue;
        int window = e->lane_window[first], own = e->lane_k[first] - window;
        e->group[n_groups++] = (struct budget_group){.first_row = first,
                                                     .n_rows = heads,
                                                     .n_columns = (int)score.dim[1] - window,
                                                     .own = policy_floor(policy->config.heads_floor * own),
                                                     .total = heads * own};
    }
    TRY(ops_split_budgets(env->ops, e->share, score, e->group, n_groups));
    TRY(ops_download(env->ops, e->lane_k, e->share, (size_t)e->n_lanes * sizeof *e->lane_k));
    for (int64_t i = 0; i < e->n_lanes; i++) e->lane_k[i] += e->lane_window[i];
    return OK;
}

int eviction_keep(struct policy *policy, struct eviction *e, const struct policy_sequence *sequence, const int *k,
                  const int *window, struct policy_keep *out)
{
    const struct policy_env *env = &policy->env;
    int m = sequence->prompt_tokens, lane = 0;
    for (int l = 0; l < env->n_layers; l++)
        for (int h = 0; h < env->layers[l].heads.n_kv_heads; h++, lane++) {
            e->lane_k[lane] = k[l];
            e->lane_window[lane] = window[l] < k[l] ? window[l] : k[l];
        }
    struct tensor score = tensor_2d(eviction_scores(e, sequence, 0), DTYPE_F32, lane, m);
    if (policy->config.heads == KV_HEADS_ADAPTIVE) TRY(share_out(policy, e, score));
    *out = (struct policy_keep){.index = e->index, .stride = m, .n_keep = e->lane_k};
    return ops_select_top(env->ops, e->index, m, score, e->lane_k, e->lane_window);
}
