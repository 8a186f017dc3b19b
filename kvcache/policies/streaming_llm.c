/* StreamingLLM (arXiv 2309.17453): the first tokens (attention sinks) and the newest ones stay, the middle goes; and
 * `random`, the floor that every policy must beat: a recent window and tokens drawn at random.
 *
 * Neither looks at the attention. Keys keep the positions that they were rotated to; the paper's own code gives them
 * new ones inside the cache. */
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "kvcache/choose.h"
#include "kvcache/eviction.h"

struct positional {
    struct eviction eviction;
    float *host;      /* [max_context] scores of one lane, host */
    int32_t *drawing; /* [max_context] */
};

static int positional_open(struct policy *policy, struct arena *arena)
{
    const struct policy_env *env = &policy->env;
    struct positional *p = calloc(1, sizeof *p);
    policy->state = p;
    policy->config.heads = KV_HEADS_EQUAL; /* no scores to compete by: in a tie the first head would take all sinks */
    if (!p) FAIL(ERR_NOMEM, "%s: out of memory", policy->vt->name);
    TRY(eviction_open(&p->eviction, env, arena));
    p->host = calloc((size_t)env->max_context, sizeof *p->host);
    p->drawing = calloc((size_t)env->max_context, sizeof *p->drawing);
    if (!p->host || !p->drawing) FAIL(ERR_NOMEM, "%s: out of memory", policy->vt->name);
    return OK;
}

static void positional_close(struct policy *policy)
{
    struct positional *p = policy->state;
    if (!p) return;
    eviction_close(&p->eviction);
    free(p->host);
    free(p->drawing);
    free(p);
}

/* With all scores alike the lower position wins: what the window leaves of the budget goes to the sinks. */
static int streaming_llm_select(struct policy *policy, const struct policy_sequence *sequence, const int *k,
                                struct policy_keep *out)
{
    struct positional *p = policy->state;
    for (int l = 0; l < policy->env.n_layers; l++) {
        int sinks = policy->config.streaming_llm.sinks;
        p->eviction.window[l] = k[l] - (sinks < k[l] - 1 ? sinks : k[l] - 1);
    }
    TRY(ops_zero(policy->env.ops, eviction_scores(&p->eviction, sequence, 0),
                 (size_t)(p->eviction.n_lanes * sequence->prompt_tokens) * sizeof(float)));
    return eviction_keep(policy, &p->eviction, sequence, k, p->eviction.window, out);
}

/* Draws k - window of the tokens before the window, for each KV head its own, whatever rank holds it. */
static int draw_lane(struct policy *policy, const struct policy_sequence *sequence, int layer, int head, int k)
{
    struct positional *p = policy->state;
    int m = sequence->prompt_tokens, window = p->eviction.window[layer];
    struct choose_stream stream =
        choose_stream(sequence->seed, layer, policy->env.layers[layer].first_kv_head + head, 0);
    choose(&stream, m - window, k - window, p->drawing);
    memset(p->host, 0, (size_t)m * sizeof *p->host);
    for (int i = 0; i < k - window; i++) p->host[p->drawing[i]] = 1;
    float *score = eviction_scores(&p->eviction, sequence, layer) + (int64_t)head * m;
    return ops_upload(policy->env.ops, score, p->host, (size_t)m * sizeof *p->host);
}

static int random_select(struct policy *policy, const struct policy_sequence *sequence, const int *k,
                         struct policy_keep *out)
{
    struct positional *p = policy->state;
    for (int l = 0; l < policy->env.n_layers; l++) {
        p->eviction.window[l] = k[l] / 10 > 1 ? k[l] / 10 : 1;
        for (int h = 0; h < policy->env.layers[l].heads.n_kv_heads; h++) TRY(draw_lane(policy, sequence, l, h, k[l]));
    }
    return eviction_keep(policy, &p->eviction, sequence, k, p->eviction.window, out);
}

const struct policy_vt policy_streaming_llm = {
    .name = "streaming_llm",
    .paper = "StreamingLLM, arXiv 2309.17453",
    .open = positional_open,
    .close = positional_close,
    .prefill_end = eviction_budgets,
    .select = streaming_llm_select,
};

const struct policy_vt policy_random = {
    .name = "random",
    .paper = "a recent window and random tokens, the floor",
    .open = positional_open,
    .close = positional_close,
    .prefill_end = eviction_budgets,
    .select = random_select,
};
