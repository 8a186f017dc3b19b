/* SnapKV (arXiv 2404.14469), PyramidKV (arXiv 2406.02069), which scores as SnapKV and differs in its budgets, and TOVA
 * (arXiv 2401.06104), whose window is the last row alone and which does not average.
 *
 * The newest rows of the prompt (the observation window) judge: a token's score is the attention that they pay to it,
 * averaged over neighbouring tokens so that clusters stay whole. Each KV head keeps the window and its best tokens
 * before it. SnapKV's layers have equal budgets; PyramidKV's fall in an arithmetic progression from the first layer to
 * the last. All decisions are local to a rank; budgets follow from the prompt's length alone. */
#include <stdlib.h>

#include "kvcache/eviction.h"
#include "kvcache/snapkv.h"

struct snapkv {
    struct eviction eviction;
    float *raw; /* [most KV heads, max_context] scores of one layer before they are averaged, device */
};

/* Window and kernel of whichever of them this is. */
static struct snapkv_options options_of(const struct policy *policy)
{
    const struct pyramid_kv_options *pyramid = &policy->config.pyramid_kv;
    if (policy->vt == &policy_pyramid_kv) return (struct snapkv_options){pyramid->window, pyramid->kernel};
    if (policy->vt == &policy_tova) return (struct snapkv_options){1, 1};
    return policy->config.snapkv;
}

static int window_of(const struct policy *policy, int m)
{
    int window = options_of(policy).window;
    return window < m ? window : m;
}

static int snapkv_open(struct policy *policy, struct arena *arena)
{
    const struct policy_env *env = &policy->env;
    struct snapkv *s = calloc(1, sizeof *s);
    policy->state = s;
    if (!s) FAIL(ERR_NOMEM, "snapkv: out of memory");
    TRY(eviction_open(&s->eviction, env, arena));
    const size_t heads = (size_t)policy_most_kv_heads(env);
    return arena_take(arena, heads * (size_t)env->max_context * sizeof *s->raw, "policy state", &s->raw);
}

static void snapkv_close(struct policy *policy)
{
    struct snapkv *s = policy->state;
    if (!s) return;
    eviction_close(&s->eviction);
    free(s);
}

static int snapkv_rows(const struct policy *policy, const struct policy_sequence *sequence)
{
    return window_of(policy, sequence->prompt_tokens);
}

static int snapkv_prefill_layer(struct policy *policy, const struct policy_sequence *sequence,
                                const struct policy_prefill *in)
{
    const struct snapkv *s = policy->state;
    const struct policy_env *env = &policy->env;
    const struct attention_heads *heads = &env->layers[in->layer].heads;
    int m = sequence->prompt_tokens, before = m - (int)in->q.dim[0];
    struct attention_probe probe = {.slot = sequence->slot,
                                    .n_rows = (int)in->q.dim[0],
                                    .first_position = in->first_position,
                                    .column_sum = s->raw};
    TRY(ops_attention_probe(env->ops, in->q, env->kv, heads, &probe));
    /* The window itself is kept in any case and lends its neighbours nothing. */
    struct tensor raw = tensor_2d(s->raw, DTYPE_F32, heads->n_kv_heads, before), score = raw;
    raw.stride[0] = score.stride[0] = m;
    score.data = eviction_scores(&s->eviction, sequence, in->layer);
    return before ? ops_average_pool(env->ops, score, raw, options_of(policy).kernel) : OK;
}

void pyramid_kv_budgets(const struct pyramid_kv_options *options, int cap, int m, int n_layers, int *k)
{
    int window = options->window, b = cap - window;
    for (int l = 0; l < n_layers; l++) k[l] = cap < m ? cap : m;
    if (b <= 0 || n_layers == 1 || m <= cap) return;
    int least = policy_floor(b / options->beta), most = 2 * b - least;
    if (most >= m - window) {
        most = m - window;
        least = 2 * b - most;
    }
    int step = (most - least) / (n_layers - 1);
    for (int l = 0; l < n_layers; l++) k[l] = most - l * step + window;
}

static int pyramid_kv_prefill_end(struct policy *policy, const struct policy_sequence *sequence, int *k)
{
    int m = sequence->prompt_tokens;
    pyramid_kv_budgets(&policy->config.pyramid_kv, eviction_tokens(sequence->budget, m), m, policy->env.n_layers, k);
    return OK;
}

static int snapkv_select(struct policy *policy, const struct policy_sequence *sequence, const int *k,
                         struct policy_keep *out)
{
    struct snapkv *s = policy->state;
    for (int l = 0; l < policy->env.n_layers; l++) s->eviction.window[l] = window_of(policy, sequence->prompt_tokens);
    return eviction_keep(policy, &s->eviction, sequence, k, s->eviction.window, out);
}

const struct policy_vt policy_snapkv = {
    .name = "snapkv",
    .paper = "SnapKV, arXiv 2404.14469",
    .open = snapkv_open,
    .close = snapkv_close,
    .judging_rows = snapkv_rows,
    .prefill_layer = snapkv_prefill_layer,
    .prefill_end = eviction_budgets,
    .select = snapkv_select,
};

const struct policy_vt policy_pyramid_kv = {
    .name = "pyramid_kv",
    .paper = "PyramidKV, arXiv 2406.02069",
    .open = snapkv_open,
    .close = snapkv_close,
    .judging_rows = snapkv_rows,
    .prefill_layer = snapkv_prefill_layer,
    .prefill_end = pyramid_kv_prefill_end,
    .select = snapkv_select,
};

/* Each KV head by the mean of its own query heads; the paper's own code takes one set a layer by the mean of all. */
const struct policy_vt policy_tova = {
    .name = "tova",
    .paper = "TOVA, arXiv 2401.06104",
    .open = snapkv_open,
    .close = snapkv_close,
    .judging_rows = snapkv_rows,
    .prefill_layer = snapkv_prefill_layer,
    .prefill_end = eviction_budgets,
    .select = snapkv_select,
};
