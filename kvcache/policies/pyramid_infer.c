/* PyramidInfer (arXiv 2405.12532): tokens leave while the prompt is read. After a layer the newest rows judge the
 * context before them, and the hidden states of the tokens that they attend to least leave all deeper layers, which
 * compute and store only what is left.
 *
 * Hidden states are replicated, so all ranks must drop the same tokens: the score of a token is the sum over all query
 * heads, each head's rounded to a fixed-point integer before it is added, and the integers are summed over ranks. How
 * many tokens stay where follows from lengths and options alone (kvcache/pyramid_infer.h). Everything of the prefill
 * stays on the device's stream: the host uploads row weights once a prompt and launches.
 *
 * Generated tokens are thinned in blocks, as the authors' first code does it: once a block lies behind the recent rows,
 * these judge it, and the worst of it leave, in each layer others. When which block is judged by which rows follows
 * from lengths too, so each decode step adds its attention to the sums of the tokens that it is going to judge, and no
 * row is ever stored. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

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
enum { PLANS = 64 /* kept beside those of the slots, so that prompts of one length are solved for once */ };

/* Generated tokens on their way out; see struct decode_judges. */
struct thinning {
    struct decode_judges judges; /* of layer 0; the next one's sums stand a block further */
    int32_t *progress, *block;   /* what the judges point to, on the device ... */
    int64_t *sum;
    float *log_sum;                      /* [n_slots, most heads of a layer] of a step's rows, device */
    int32_t *host_progress, *host_block; /* ... and here */
    int32_t *index;                      /* [n_layers, block] entries of a block that stay, device */
    int *length;                         /* [n_slots, n_layers] tokens in a lane */
    int *keep;                           /* [n_layers] tokens of a block that stay */
    struct kv_drop *drop;                /* [n_layers] */
};

struct pyramid_infer {
    double *decay;             /* [n_layers] */
    struct plan *plan;         /* [n_slots + PLANS] */
    int *lengths;              /* behind all plans' stored and keep */
    bool told;                 /* that a budget cannot be reached */
    float *column;             /* [max heads, max_context] of one prompt's layer, device */
    float *weight;             /* [max_prompt_tokens] of the judging rows of all prompts of a step, device */
    float *host_weight;        /* [max_context] */
    int64_t *score;            /* [max_prompt_tokens] of a layer's contexts, one after the other, device */
    int64_t n_scores;          /* how many of them are there, since the last narrowing */
    struct row_choice *choice; /* [n_slots], at least n_layers */
    struct thinning thinning;
};

static int open_thinning(struct policy *policy, struct thinning *t, struct arena *arena)
{
    const struct policy_env *env = &policy->env;
    const struct pyramid_infer_options *options = &policy->config.pyramid_infer;
    const int layers = env->n_layers, block = options->generation_block;
    const double rho = options->target_ratio && options->recent_ratio < 0.2 ? 0.2 : options->recent_ratio;
    const size_t slots = (size_t)env->kv->n_slots;
    struct decode_judges *j = &t->judges;
    if (!block) return OK;
    j->block_tokens = block;
    j->newest = (float)options->recent_weight;
    j->max_blocks = env->max_context / block + 2;
    j->ring_blocks = (int)(rho * env->max_context) / block + 3; /* unsettled at once: the recent rows and a block */
    j->block_stride = (int64_t)layers * block;
    j->slot_stride = j->block_stride * j->ring_blocks;
    t->host_progress = calloc(2 * slots, sizeof *t->host_progress);
    t->host_block = calloc(2 * (size_t)j->max_blocks, sizeof *t->host_block * slots);
    t->length = calloc(slots * (size_t)layers, sizeof *t->length);
    t->keep = calloc((size_t)layers, sizeof *t->keep);
    t->drop = calloc((size_t)layers, sizeof *t->drop);
    if (!t->host_progress || !t->host_block || !t->length || !t->keep || !t->drop)
        FAIL(ERR_NOMEM, "pyramid_infer: out of memory");
    for (size_t i = 0; i < slots; i++) t->host_progress[2 * i] = -1;
    for (int l = 0; l < layers; l++)
        t->keep[l] = pyramid_infer_block_keep(((struct pyramid_infer *)policy->state)->decay[l], block,
                                              options->generation_compress, options->generation_decay);
    TRY(arena_take(arena, 2 * slots * sizeof(int32_t), label, &t->progress));
    TRY(arena_take(arena, 2 * slots * (size_t)j->max_blocks * sizeof(int32_t), label, &t->block));
    TRY(arena_take(arena, slots * (size_t)j->slot_stride * sizeof(int64_t), label, &t->sum));
    TRY(arena_take(arena, slots * (size_t)policy_most_heads(env) * sizeof(float), label, &t->log_sum));
    TRY(arena_take(arena, (size_t)(layers * block) * sizeof(int32_t), label, &t->index));
    j->progress = t->progress;
    j->block = t->block;
    return OK;
}

static int pyramid_open(struct policy *policy, struct arena *arena)
{
    const struct policy_env *env = &policy->env;
    const size_t layers = (size_t)env->n_layers;
    struct pyramid_infer *p = calloc(1, sizeof *p);
    policy->state = p;
    if (!p) FAIL(ERR_NOMEM, "pyramid_infer: out of memory");
    p->decay = calloc(layers, sizeof *p->decay);
    const size_t plans = PLANS + (size_t)env->kv->n_slots;
    p->plan = calloc(plans, sizeof *p->plan);
    p->lengths = calloc(2 * plans * layers, sizeof *p->lengths);
    p->host_weight = calloc((size_t)env->max_context, sizeof *p->host_weight);
    p->choice = calloc((size_t)env->kv->n_slots + layers, sizeof *p->choice);
    if (!p->decay || !p->plan || !p->lengths || !p->host_weight || !p->choice)
        FAIL(ERR_NOMEM, "pyramid_infer: out of memory");
    pyramid_infer_decay(env->n_layers, p->decay);
    for (size_t i = 0; i < plans; i++) {
        p->plan[i].stored = p->lengths + 2 * i * layers;
        p->plan[i].keep = p->plan[i].stored + layers;
    }
    const size_t heads = (size_t)policy_most_heads(env);
    TRY(arena_take(arena, heads * (size_t)env->max_context * sizeof *p->column, label, &p->column));
    TRY(arena_take(arena, (size_t)env->max_prompt_tokens * sizeof *p->weight, label, &p->weight));
    TRY(arena_take(arena, (size_t)env->max_prompt_tokens * sizeof *p->score, label, &p->score));
    return open_thinning(policy, &p->thinning, arena);
}

static void pyramid_close(struct policy *policy)
{
    struct pyramid_infer *p = policy->state;
    if (!p) return;
    free(p->decay);
    free(p->plan);
    free(p->lengths);
    free(p->host_weight);
    free(p->choice);
    free(p->thinning.host_progress);
    free(p->thinning.host_block);
    free(p->thinning.length);
    free(p->thinning.keep);
    free(p->thinning.drop);
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
        if (!(fabs(mean - plan->share) <= PYRAMID_INFER_WITHIN) && !p->told && policy_speaks(policy)) {
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

static bool plan_is(const struct plan *plan, int m, int window, double share)
{
    return plan->shape.tokens == m && plan->shape.window == window && plan->share == share;
}

/* A schedule out of those that were solved lately. */
static const struct plan *find_plan(const struct policy *policy, int m, int window, double share)
{
    struct pyramid_infer *p = policy->state;
    const unsigned place = ((unsigned)m + 31u * (unsigned)window + (unsigned)(share * 4096)) % PLANS;
    struct plan *plan = &p->plan[(unsigned)policy->env.kv->n_slots + place];
    if (plan_is(plan, m, window, share)) return plan;
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

/* The sequence's schedule; its slot holds it as long as the slot is asked about no other prompt. */
static const struct plan *plan_of(const struct policy *policy, const struct policy_sequence *sequence)
{
    struct pyramid_infer *p = policy->state;
    const int m = sequence->prompt_tokens, window = text_window(policy, sequence);
    const double share = kv_budget_share(sequence->budget, m);
    const size_t bytes = (size_t)policy->env.n_layers * sizeof *p->lengths;
    struct plan *plan = &p->plan[sequence->slot];
    if (plan_is(plan, m, window, share)) return plan;
    struct plan copy = *find_plan(policy, m, window, share);
    memcpy(plan->stored, copy.stored, bytes);
    memcpy(plan->keep, copy.keep, bytes);
    copy.stored = plan->stored;
    copy.keep = plan->keep;
    *plan = copy;
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
    if (!in->ends[i] || sequence->continues || !policy_runs(policy, sequence)) return choice;
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

/* ---- while tokens are generated ---- */

static int pyramid_begin_decode(struct policy *policy, const struct policy_sequence *sequence)
{
    struct pyramid_infer *p = policy->state;
    struct thinning *t = &p->thinning;
    struct ops *ops = policy->env.ops;
    const int slot = sequence->slot, layers = policy->env.n_layers, max_blocks = t->judges.max_blocks;
    if (!t->judges.block_tokens) return OK;
    int32_t *progress = t->host_progress + 2 * slot, *block = t->host_block + 2 * (size_t)slot * (size_t)max_blocks;
    const size_t at = 2 * (size_t)slot * (size_t)max_blocks, stride = (size_t)t->judges.slot_stride;
    progress[0] = !sequence->continues && policy_runs(policy, sequence) ? 0 : -1; /* a follow-up ends the thinning */
    progress[1] = 0;
    if (progress[0] == 0) {
        const struct plan *plan = plan_of(policy, sequence);
        struct pyramid_generation generation = {.tokens = sequence->prompt_tokens,
                                                .block = t->judges.block_tokens,
                                                .first_keep = t->keep[0],
                                                .window = plan->window,
                                                .rho = plan->rho};
        for (int l = 0; l < layers; l++) t->length[slot * layers + l] = plan->stored[l];
        pyramid_infer_blocks(&generation, policy->env.max_context, max_blocks, block);
        TRY(ops_upload(ops, t->block + at, block, 2 * (size_t)max_blocks * sizeof *block));
        TRY(ops_zero(ops, t->sum + (size_t)slot * stride, stride * sizeof *t->sum));
    }
    return ops_upload(ops, t->progress + 2 * slot, progress, 2 * sizeof *progress);
}

static int pyramid_decode_attention(struct policy *policy, const struct policy_decode *in)
{
    const struct pyramid_infer *p = policy->state;
    const struct policy_layer *layer = &policy->env.layers[in->layer];
    struct decode_judges judges = p->thinning.judges;
    float *log_sum = p->thinning.log_sum;
    if (!judges.block_tokens || !layer->counted)
        return ops_attention_decode(policy->env.ops, in->out, in->q, in->batch, policy->env.kv, &layer->heads);
    if (in->batch->n_seqs > policy->env.kv->n_slots)
        FAIL(ERR_BUG, "pyramid_infer: a step of %d rows, there are %d slots", in->batch->n_seqs,
             policy->env.kv->n_slots);
    TRY(ops_attention_decode_log_sum(policy->env.ops, in->out, in->q, log_sum, in->batch, policy->env.kv,
                                     &layer->heads));
    judges.sum = p->thinning.sum + (size_t)in->layer * (size_t)judges.block_tokens;
    return ops_judge_columns(policy->env.ops, in->q, log_sum, in->batch, policy->env.kv, &layer->heads, &judges);
}

/* The block that is settled at this step loses its worst tokens, in all layers. */
static int thin(struct policy *policy, int slot, int step, int b)
{
    struct pyramid_infer *p = policy->state;
    const struct policy_env *env = &policy->env;
    struct thinning *t = &p->thinning;
    const int layers = env->n_layers, block = t->judges.block_tokens;
    int *length = t->length + (ptrdiff_t)slot * layers, n_index = 0;
    int64_t *sum = t->sum + slot * t->judges.slot_stride + b % t->judges.ring_blocks * t->judges.block_stride;
    TRY(policy_sum_scores(policy, sum, t->judges.block_stride));
    for (int l = 0; l < layers; l++) {
        const struct policy_layer *layer = &env->layers[l];
        p->choice[l] = (struct row_choice){
            .n_rows = block, .n_competing = block, .keep = t->keep[l], .first_score = (int64_t)l * block};
        t->drop[l] = (struct kv_drop){.lane = layer->heads.lane,
                                      .n_lanes = layer->heads.n_kv_heads,
                                      .first = length[l] - 2 - step + b * block,
                                      .n_block = block,
                                      .n_keep = t->keep[l],
                                      .first_index = n_index};
        n_index += t->keep[l];
        length[l] -= block - t->keep[l];
    }
    TRY(ops_select_rows(env->ops, t->index, sum, p->choice, layers));
    return ops_kv_drop(env->ops, env->kv, slot, t->index, t->drop, layers);
}

static int pyramid_decode_end(struct policy *policy, const int32_t *slot, int n)
{
    struct pyramid_infer *p = policy->state;
    struct thinning *t = &p->thinning;
    const int layers = policy->env.n_layers;
    bool any = false;
    for (int i = 0; i < n && t->judges.block_tokens; i++) {
        int32_t *progress = t->host_progress + 2 * slot[i];
        if (progress[0] < 0) continue;
        const int32_t *block = t->host_block + 2 * ((size_t)slot[i] * (size_t)t->judges.max_blocks);
        for (int l = 0; l < layers; l++) t->length[slot[i] * layers + l]++;
        if (progress[1] < t->judges.max_blocks && block[2 * progress[1]] == progress[0]) {
            TRY(thin(policy, slot[i], progress[0], progress[1]));
            progress[1]++;
        }
        progress[0]++;
        any = true;
    }
    const size_t bytes = 2 * (size_t)policy->env.kv->n_slots * sizeof *t->progress;
    return any ? ops_upload(policy->env.ops, t->progress, t->host_progress, bytes) : OK;
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
    .begin_decode = pyramid_begin_decode,
    .decode_attention = pyramid_decode_attention,
    .decode_end = pyramid_decode_end,
};
