/* PyramidInfer (arXiv 2405.12532): tokens leave while the prompt is read. After a layer the newest rows judge the
 * context before them, and the hidden states of the tokens that they attend to least leave all deeper layers, which
 * compute and store only what is left.
 *
 * Hidden states are replicated, so all ranks must drop the same tokens: the score of a token is the sum over all query
 * heads, each head's rounded to a fixed-point integer before it is added, and the integers are summed over ranks. How
 * many tokens stay where follows from lengths and options alone (kvcache/pyramid_infer.h). Everything of the prefill
 * stays on the device's stream: the host uploads row weights once a prompt and launches. */
#include <math.h>
#include <stdlib.h>

#include "base/log.h"
#include "kvcache/pyramid_infer.h"
#include "kvcache/vl_cache.h"

static const char label[] = "policy state";

/* A schedule, solved once for prompts of the same length, budget and window. */
struct plan {
    struct pyramid_shape shape;
    double share, rho, r;
    int window;
    int *stored, *keep; /* [n_layers] */
};
enum { PLANS = 64 };

struct pyramid_infer {
    double *decay; /* [n_layers] */
    struct plan plan[PLANS];
    int *lengths;              /* behind all plans' stored and keep */
    bool told;                 /* that a budget cannot be reached */
    float *column;             /* [max heads, max_context] of one prompt's layer, device */
    float *weight;             /* [max_prompt_tokens] of the judging rows of all prompts of a step, device */
    float *host_weight;        /* [max_context] */
    int64_t *score;            /* [max_prompt_tokens] of a layer's contexts, one after the other, device */
    int64_t n_scores;          /* how many of them are there, since the last narrowing */
    struct row_choice *choice; /* [n_slots] */
};

static int pyramid_open(struct policy *policy, struct arena *arena)
{
    const struct policy_env *env = &policy->env;
    const size_t layers = (size_t)env->n_layers;
    struct pyramid_infer *p = calloc(1, sizeof *p);
    size_t heads = 1;
    policy->state = p;
    if (!p) FAIL(ERR_NOMEM, "pyramid_infer: out of memory");
    p->decay = calloc(layers, sizeof *p->decay);
    p->lengths = calloc(2 * PLANS * layers, sizeof *p->lengths);
    p->host_weight = calloc((size_t)env->max_context, sizeof *p->host_weight);
    p->choice = calloc((size_t)env->kv->n_slots, sizeof *p->choice);
    if (!p->decay || !p->lengths || !p->host_weight || !p->choice) FAIL(ERR_NOMEM, "pyramid_infer: out of memory");
    pyramid_infer_decay(env->n_layers, p->decay);
    for (size_t i = 0; i < PLANS; i++) {
        p->plan[i].stored = p->lengths + 2 * i * layers;
        p->plan[i].keep = p->plan[i].stored + layers;
    }
    for (size_t l = 0; l < layers; l++)
        if ((size_t)env->layers[l].heads.n_heads > heads) heads = (size_t)env->layers[l].heads.n_heads;
    TRY(arena_take(arena, heads * (size_t)env->max_context * sizeof *p->column, label, &p->column));
    TRY(arena_take(arena, (size_t)env->max_prompt_tokens * sizeof *p->weight, label, &p->weight));
    return arena_take(arena, (size_t)env->max_prompt_tokens * sizeof *p->score, label, &p->score);
}

static void pyramid_close(struct policy *policy)
{
    struct pyramid_infer *p = policy->state;
    if (!p) return;
    free(p->decay);
    free(p->lengths);
    free(p->host_weight);
    free(p->choice);
    free(p);
}

/* ---- how many tokens stay ---- */

/* Rows behind the last image, the same as VL-Cache's; 0: the recent share judges. */
static int text_window(const struct policy *policy, const struct policy_sequence *sequence)
{
    struct vl_cache_options rows;
    if (policy->config.pyramid_infer.judges != PYRAMID_INFER_TEXT) return 0;
    vl_cache_options_default(&rows);
    return vl_cache_judging_rows(&rows, sequence->prompt_tokens, sequence->spans, sequence->n_spans,
                                 sequence->last_turn_start);
}

static void solve(const struct policy *policy, struct plan *plan)
{
    struct pyramid_infer *p = policy->state;
    const struct pyramid_infer_options *options = &policy->config.pyramid_infer;
    plan->rho = options->recent_ratio;
    plan->r = options->ratio;
    if (options->target_ratio) {
        double mean = pyramid_infer_solve(&plan->shape, plan->share, &plan->rho, &plan->r);
        if (!(fabs(mean - plan->share) <= PYRAMID_INFER_WITHIN) && !p->told && policy->env.comm->rank == 0) {
            log_line(LOG_WARNING,
                     "pyramid_infer: no schedule keeps %.3f of a prompt of %d tokens as the mean of %d layers; the "
                     "nearest keeps %.3f (said once)",
                     plan->share, plan->shape.tokens, plan->shape.n_layers, mean);
            p->told = true;
        }
    }
    plan->window = pyramid_infer_window(&plan->shape, plan->rho);
    pyramid_infer_schedule(&plan->shape, plan->rho, plan->r, plan->stored, plan->keep, NULL);
}

/* The sequence's schedule; valid until the next call. */
static const struct plan *plan_of(const struct policy *policy, const struct policy_sequence *sequence)
{
    struct pyramid_infer *p = policy->state;
    const int m = sequence->prompt_tokens, window = text_window(policy, sequence);
    const double share = kv_budget_share(sequence->budget, m);
    struct plan *plan = &p->plan[((unsigned)m + 31u * (unsigned)window + (unsigned)(share * 4096)) % PLANS];
    if (plan->shape.tokens == m && plan->shape.window == window && plan->share == share) return plan;
    plan->share = share;
    plan->shape = (struct pyramid_shape){.tokens = m,
                                         .n_layers = policy->env.n_layers,
                                         .interval = policy->config.pyramid_infer.interval,
                                         .min_context = policy->config.pyramid_infer.min_context,
                                         .window = window,
                                         .decay = p->decay};
    solve(policy, plan);
    return plan;
}

static int pyramid_rows(const struct policy *policy, const struct policy_sequence *sequence)
{
    return plan_of(policy, sequence)->window;
}

/* Whether tokens leave after a layer: what would leave the last one makes no difference any more. */
static bool narrows(const struct plan *plan, int layer)
{
    return plan->keep[layer] >= 0 && layer + 1 < plan->shape.n_layers;
}

static bool narrowed_before(const struct plan *plan, int layer)
{
    while (--layer >= 0)
        if (narrows(plan, layer)) return true;
    return false;
}

/* ---- while the prompt is read ---- */

static int pyramid_prefill_layer(struct policy *policy, const struct policy_sequence *sequence,
                                 const struct policy_prefill *in)
{
    struct pyramid_infer *p = policy->state;
    const struct policy_env *env = &policy->env;
    const struct policy_layer *layer = &env->layers[in->layer];
    const struct plan *plan = plan_of(policy, sequence);
    float *weight = p->weight + sequence->first_column;
    if (!narrows(plan, in->layer)) return OK;
    const int context = plan->stored[in->layer] - plan->window, rows = layer->counted ? layer->heads.n_heads : 0;
    struct attention_probe probe = {.slot = sequence->slot,
                                    .n_rows = plan->window,
                                    .first_position = in->first_position,
                                    .row_weight = weight,
                                    .column_sum = p->column,
                                    .per_head = true};
    if (in->first_position != context || in->q.dim[0] != plan->window)
        FAIL(ERR_BUG, "pyramid_infer: %lld rows after %d at layer %d, planned were %d after %d",
             (long long)in->q.dim[0], in->first_position, in->layer, plan->window, context);
    if (!narrowed_before(plan, in->layer)) {
        pyramid_infer_row_weights(plan->window, policy->config.pyramid_infer.recent_weight, p->host_weight);
        TRY(ops_upload(env->ops, weight, p->host_weight, (size_t)plan->window * sizeof *weight));
    }
    if (rows) TRY(ops_attention_probe(env->ops, in->q, env->kv, &layer->heads, &probe));
    struct tensor columns = tensor_2d(p->column, DTYPE_F32, rows, context);
    columns.stride[0] = context + plan->window;
    TRY(ops_sum_fixed(env->ops, p->score + p->n_scores, columns, 1.0 / plan->window));
    p->n_scores += context;
    return OK;
}

/* All rows of a sequence stay, unless its schedule says otherwise. */
static struct row_choice choice_of(const struct policy *policy, const struct policy_narrow *in, int i, int64_t *score)
{
    const struct policy_sequence *sequence = &in->sequence[i];
    struct row_choice choice = {.first_row = in->cu_seqlens[i], .n_rows = in->cu_seqlens[i + 1] - in->cu_seqlens[i]};
    if (!in->ends[i] || !policy_runs(policy, sequence)) return choice;
    const struct plan *plan = plan_of(policy, sequence);
    if (!narrows(plan, in->layer)) return choice;
    const int context = plan->stored[in->layer] - plan->window, keep = plan->keep[in->layer];
    const int sinks = policy->config.pyramid_infer.sinks;
    choice.first = sinks < keep ? sinks : keep;
    choice.n_competing = context - choice.first;
    choice.keep = keep - choice.first;
    choice.first_score = *score + choice.first;
    *score += context;
    return choice;
}

static int pyramid_narrow(struct policy *policy, const struct policy_narrow *in)
{
    struct pyramid_infer *p = policy->state;
    int64_t score = 0;
    in->new_cu_seqlens[0] = 0;
    for (int i = 0; i < in->n_seqs; i++) {
        const struct row_choice *c = &p->choice[i];
        p->choice[i] = choice_of(policy, in, i, &score);
        in->new_cu_seqlens[i + 1] = in->new_cu_seqlens[i] + c->n_rows - c->n_competing + c->keep;
    }
    if (score != p->n_scores)
        FAIL(ERR_BUG, "pyramid_infer: %lld scores at layer %d, expected %lld", (long long)p->n_scores, in->layer,
             (long long)score);
    p->n_scores = 0;
    if (!score) return OK;
    TRY(policy_sum_scores(policy, p->score, score));
    return ops_select_rows(policy->env.ops, in->row_index, p->score, p->choice, in->n_seqs);
}

static int pyramid_prefill_end(struct policy *policy, const struct policy_sequence *sequence, int *k)
{
    const struct plan *plan = plan_of(policy, sequence);
    for (int l = 0; l < policy->env.n_layers; l++) k[l] = plan->stored[l];
    return OK;
}

const struct policy_vt policy_pyramid_infer = {
    .name = "pyramid_infer",
    .paper = "PyramidInfer, arXiv 2405.12532",
    .whole_prompt = true,
    .open = pyramid_open,
    .close = pyramid_close,
    .judging_rows = pyramid_rows,
    .prefill_layer = pyramid_prefill_layer,
    .narrow = pyramid_narrow,
    .prefill_end = pyramid_prefill_end,
};
