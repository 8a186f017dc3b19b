/* Expected Attention (arXiv 2510.00636): scores that ask no question.
 *
 * The prompt's queries before their rotation, but for the first ones, are taken for draws from a Gaussian, one for each
 * query head; turned by the mean rotation of the positions to come it stands for the queries of any later question. A
 * token's score is the attention that they should pay it, averaged over the KV head's query heads, times the length of
 * its value. The first tokens always stay. All of it is local to a KV head; the paper combines it with
 * adaptive heads. */
#include <stdlib.h>

#include "kvcache/eviction.h"

struct expected {
    struct eviction eviction;
};

static int expected_open(struct policy *policy, struct arena *arena)
{
    struct expected *x = calloc(1, sizeof *x);
    policy->state = x;
    if (!x) FAIL(ERR_NOMEM, "expected_attention: out of memory");
    return eviction_open(&x->eviction, &policy->env, arena);
}

static void expected_close(struct policy *policy)
{
    struct expected *x = policy->state;
    if (!x) return;
    eviction_close(&x->eviction);
    free(x);
}

static int expected_rows(const struct policy *policy, const struct policy_sequence *sequence)
{
    const int most = policy->config.expected_attention.max_rows, m = sequence->prompt_tokens;
    return most > 0 && most < m ? most : m;
}

/* A budget below the sinks has room for so many alone, and one token must count: of adaptive heads each keeps its
 * sinks, so that none is left with nothing. */
static int sinks_of(const struct policy *policy, const struct policy_sequence *sequence)
{
    const struct expected_attention_options *options = &policy->config.expected_attention;
    const int k = eviction_tokens(sequence->budget, sequence->prompt_tokens), m = sequence->prompt_tokens;
    const int room = k > options->window ? k - options->window : 0;
    int sinks = options->sinks < room ? options->sinks : room;
    return sinks < m ? sinks : m - 1;
}

static int expected_prefill_layer(struct policy *policy, const struct policy_sequence *sequence,
                                  const struct policy_prefill *in)
{
    const struct expected *x = policy->state;
    const struct expected_attention_options *options = &policy->config.expected_attention;
    struct expected_attention expected = {.slot = sequence->slot,
                                          .n_rows = (int)in->q.dim[0],
                                          .first_position = in->first_position,
                                          .sinks = sinks_of(policy, sequence),
                                          .future = options->future,
                                          .inverse_frequency = policy->env.inverse_frequency,
                                          .epsilon = (float)options->epsilon,
                                          .score = eviction_scores(&x->eviction, sequence, in->layer)};
    return ops_expected_attention(policy->env.ops, in->q, policy->env.kv, &policy->env.layers[in->layer].heads,
                                  &expected);
}

static int expected_select(struct policy *policy, const struct policy_sequence *sequence, const int *k,
                           struct policy_keep *out)
{
    struct expected *x = policy->state;
    for (int l = 0; l < policy->env.n_layers; l++) x->eviction.window[l] = policy->config.expected_attention.window;
    return eviction_keep(policy, &x->eviction, sequence, k, x->eviction.window, out);
}

const struct policy_vt policy_expected_attention = {
    .name = "expected_attention",
    .paper = "Expected Attention, arXiv 2510.00636",
    .open = expected_open,
    .close = expected_close,
    .judging_rows = expected_rows,
    .prefill_layer = expected_prefill_layer,
    .prefill_end = eviction_budgets,
    .select = expected_select,
};
