/* H2O (arXiv 2306.14048): heavy hitters and recent tokens.
 *
 * A token's score is all the attention that it has received, from every row of the prompt and from every token that was
 * generated since. A lane keeps the newest tokens and the best-scored others, and stays that large: each generated
 * token pushes one out. All of it is local to a KV head. The whole prompt judges, so it must come in one piece. */
#include <stdlib.h>

#include "kvcache/eviction.h"
#include "kvcache/h2o.h"

struct h2o {
    struct eviction eviction;
    struct heavy_hitters heavy;
};

const struct heavy_hitters *h2o_account(const struct policy *policy)
{
    const struct h2o *h = policy->state;
    return &h->heavy;
}

static int h2o_open(struct policy *policy, struct arena *arena)
{
    static const char label[] = "policy state";
    const struct policy_env *env = &policy->env;
    struct h2o *h = calloc(1, sizeof *h);
    policy->state = h;
    if (!h) FAIL(ERR_NOMEM, "h2o: out of memory");
    TRY(eviction_open(&h->eviction, env, arena));
    h->heavy.stride = env->max_context + 1;
    size_t lanes = (size_t)env->kv->n_slots * (size_t)h->eviction.n_lanes, cells = lanes * (size_t)h->heavy.stride;
    TRY(arena_take(arena, cells * sizeof *h->heavy.score, label, &h->heavy.score));
    TRY(arena_take(arena, cells * sizeof *h->heavy.position, label, &h->heavy.position));
    TRY(arena_take(arena, lanes * sizeof *h->heavy.limit, label, &h->heavy.limit));
    return arena_take(arena, lanes * sizeof *h->heavy.recent, label, &h->heavy.recent);
}

static void h2o_close(struct policy *policy)
{
    struct h2o *h = policy->state;
    if (!h) return;
    eviction_close(&h->eviction);
    free(h);
}

static int h2o_rows(const struct policy *policy, const struct policy_sequence *sequence)
{
    (void)policy;
    return sequence->prompt_tokens;
}

static int h2o_prefill_layer(struct policy *policy, const struct policy_sequence *sequence,
                             const struct policy_prefill *in)
{
    const struct h2o *h = policy->state;
    struct attention_probe probe = {.slot = sequence->slot,
                                    .n_rows = (int)in->q.dim[0],
                                    .first_position = in->first_position,
                                    .column_sum = eviction_scores(&h->eviction, sequence, in->layer)};
    return ops_attention_probe(policy->env.ops, in->q, policy->env.kv, &policy->env.layers[in->layer].heads, &probe);
}

static int h2o_select(struct policy *policy, const struct policy_sequence *sequence, const int *k,
                      struct policy_keep *out)
{
    struct h2o *h = policy->state;
    for (int l = 0; l < policy->env.n_layers; l++) {
        int recent = policy_floor(policy->config.h2o.recent * k[l]);
        h->eviction.window[l] = recent < 1 ? 1 : recent;
    }
    return eviction_keep(policy, &h->eviction, sequence, k, h->eviction.window, out);
}

/* A slot whose prompt was not compressed has no limits either, nor has one from its first follow-up on: the tokens that
 * come with it have no account. */
static int h2o_begin_decode(struct policy *policy, const struct policy_sequence *sequence)
{
    struct h2o *h = policy->state;
    const struct policy_env *env = &policy->env;
    size_t first = (size_t)sequence->slot * (size_t)h->eviction.n_lanes;
    size_t bytes = (size_t)h->eviction.n_lanes * sizeof(int32_t);
    if (sequence->continues || !policy_runs(policy, sequence)) return ops_zero(env->ops, h->heavy.limit + first, bytes);
    TRY(ops_upload(env->ops, h->heavy.limit + first, h->eviction.lane_k, bytes));
    TRY(ops_upload(env->ops, h->heavy.recent + first, h->eviction.lane_window, bytes));
    struct tensor score =
        tensor_2d(eviction_scores(&h->eviction, sequence, 0), DTYPE_F32, h->eviction.n_lanes, sequence->prompt_tokens);
    return ops_heavy_begin(env->ops, env->kv, &h->heavy, sequence->slot, score, h->eviction.index,
                           sequence->prompt_tokens);
}

static int h2o_decode_attention(struct policy *policy, const struct policy_decode *in)
{
    struct h2o *h = policy->state;
    const struct policy_env *env = &policy->env;
    const struct attention_heads *heads = &env->layers[in->layer].heads;
    TRY(ops_attention_decode(env->ops, in->out, in->q, in->batch, env->kv, heads));
    return ops_heavy_decode(env->ops, in->q, in->position, in->batch, env->kv, heads, &h->heavy);
}

/* Lanes do not grow: a step reads what was kept and its own token. */
static struct policy_reads h2o_reads(const struct policy *policy, const struct policy_sequence *sequence, double kept,
                                     int before)
{
    (void)policy, (void)sequence, (void)before;
    return (struct policy_reads){.tokens = kept + 1};
}

const struct policy_vt policy_h2o = {
    .name = "h2o",
    .paper = "H2O, arXiv 2306.14048",
    .whole_prompt = true,
    .open = h2o_open,
    .close = h2o_close,
    .judging_rows = h2o_rows,
    .prefill_layer = h2o_prefill_layer,
    .prefill_end = eviction_budgets,
    .select = h2o_select,
    .begin_decode = h2o_begin_decode,
    .decode_attention = h2o_decode_attention,
    .reads = h2o_reads,
};
