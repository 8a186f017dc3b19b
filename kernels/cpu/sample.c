/* Sampling: one token a row from logits, in the order penalties, temperature, min_p, top_k, top_p.
 *
 * A row is a task. Tokens are ranked by falling probability with ties to the lower id, and a draw is a number in [0, 1)
 * laid against the sums of that order, so the same logits, parameters and position give the same token always.
 * Of equal values at the k-th place, top_k keeps those of lower ids: top_k 1 is the greedy choice. */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "base/hash.h"
#include "kernels/cpu/cpu.h"

/* Below it sampling is greedy: the quotient of a difference of logits and the temperature would overflow. */
#define LEAST_TEMPERATURE 1e-5f

enum { BUCKET_SHIFT = 20 };

struct candidate {
    float weight; /* exp(logit - best), not normalised */
    int32_t id;
};

/* Each thread's: logits after penalties or weights, and candidates. */
struct scratch {
    float *adjusted;
    struct candidate *candidates;
};

static int place(const struct cpu *c, struct arena *arena, int64_t vocab_size, struct scratch *s)
{
    const size_t n = (size_t)c->n_threads * (size_t)vocab_size;
    TRY(arena_take(arena, n * sizeof *s->adjusted, "sampling logits", &s->adjusted));
    return arena_take(arena, n * sizeof *s->candidates, "sampling candidates", &s->candidates);
}

int cpu__sample_measure(const struct cpu *c, const struct ops_limits *limits, struct arena *arena)
{
    struct scratch s;
    return place(c, arena, limits->vocab_size, &s);
}

/* A number in [0, 1) that depends on seed and position alone. */
static double uniform(uint64_t seed, int32_t position)
{
    return (double)(hash_mix(seed, (uint32_t)position) >> 11) * 0x1p-53;
}

static bool ranks_before(struct candidate a, struct candidate b)
{
    return a.weight > b.weight || (a.weight == b.weight && a.id < b.id);
}

static void sift_down(struct candidate *heap, int64_t n, int64_t at)
{
    struct candidate moving = heap[at];
    for (int64_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && ranks_before(heap[child + 1], heap[child])) child++;
        if (!ranks_before(heap[child], moving)) break;
        heap[at] = heap[child];
    }
    heap[at] = moving;
}

/* The best token, the lowest of equals; token 0 where no logit is a number. */
static int32_t best_id(const struct vector_ops *v, const float *logits, int64_t n)
{
    const float best = v->maximum(logits, n);
    int64_t i = 0;
    while (i < n && logits[i] != best) i++;
    return i < n ? (int32_t)i : 0;
}

/* Logits after penalties: `logits` itself where none applies, else `adjusted`. */
static const float *penalise(float *adjusted, const float *logits, const int32_t *token_count, int64_t n,
                             const struct sampling_params *p)
{
    if (p->repetition_penalty == 1 && p->frequency_penalty == 0 && p->presence_penalty == 0) return logits;
    for (int64_t i = 0; i < n; i++) {
        float x = logits[i];
        int32_t times = token_count[i] & TOKEN_COUNT_MASK;
        if (token_count[i]) x = x > 0 ? x / p->repetition_penalty : x * p->repetition_penalty;
        if (times) x -= (float)times * p->frequency_penalty + p->presence_penalty;
        adjusted[i] = x;
    }
    return adjusted;
}

/* Turns logits into weights, those below min_p of the best into 0. An infinite logit leaves no weight to the others. */
static void weigh(const struct vector_ops *v, float *weight, const float *logits, int64_t n,
                  const struct sampling_params *p)
{
    const float best = v->maximum(logits, n);
    if (fabsf(best) == INFINITY)
        for (int64_t i = 0; i < n; i++) weight[i] = logits[i] == best;
    else
        v->exponentials(weight, logits, best, 1 / p->temperature, n);
    for (int64_t i = 0; i < n && p->min_p > 0; i++) weight[i] = weight[i] >= p->min_p ? weight[i] : 0;
}

/* The rank order of the weights, made only where it is looked at: buckets of nearly equal weights (exponent and three
 * bits more), each with its number and sum, of which one at a time is sorted. */
enum { BUCKETS = (0x3f800000 >> BUCKET_SHIFT) + 1 };

struct ranking {
    const float *weight;
    int64_t n;
    int64_t count[BUCKETS];
    double sum[BUCKETS];
    struct candidate *sorted; /* members of sorted_bucket, best at the end */
    int sorted_bucket;
};

/* A run of the best: everything above a bucket and the first `rank` of it; id is the run's last. */
struct run {
    int bucket;
    int64_t rank;
    double mass;
    int32_t id;
};

static int bucket_of(float weight)
{
    uint32_t bits;
    memcpy(&bits, &weight, sizeof bits);
    int bucket = (int)(bits >> BUCKET_SHIFT);
    return bucket < BUCKETS ? bucket : BUCKETS - 1;
}

/* Returns the whole run; mass 0: there is nothing to draw from. */
static struct run rank_weights(struct ranking *r, const float *weight, int64_t n, struct candidate *space)
{
    struct run all = {.bucket = BUCKETS - 1};
    memset(r, 0, sizeof *r);
    r->weight = weight, r->n = n, r->sorted = space, r->sorted_bucket = -1;
    for (int64_t i = 0; i < n; i++) {
        if (!(weight[i] > 0)) continue;
        int bucket = bucket_of(weight[i]);
        r->count[bucket]++;
        r->sum[bucket] += (double)weight[i];
        if (bucket < all.bucket) all.bucket = bucket;
    }
    all.rank = r->count[all.bucket];
    for (int b = BUCKETS - 1; b >= 0; b--) all.mass += r->sum[b];
    return all;
}

static void sort_bucket(struct ranking *r, int bucket)
{
    struct candidate *heap = r->sorted;
    int64_t n = 0;
    if (r->sorted_bucket == bucket) return;
    for (int64_t i = 0; i < r->n; i++)
        if (r->weight[i] > 0 && bucket_of(r->weight[i]) == bucket)
            heap[n++] = (struct candidate){r->weight[i], (int32_t)i};
    for (int64_t i = n / 2 - 1; i >= 0; i--) sift_down(heap, n, i);
    while (n > 1) {
        struct candidate best = heap[0];
        heap[0] = heap[--n];
        heap[n] = best;
        sift_down(heap, n, 0);
    }
    r->sorted_bucket = bucket;
}

static struct candidate ranked(const struct ranking *r, int64_t rank)
{
    return r->sorted[r->count[r->sorted_bucket] - 1 - rank];
}

/* The best k; k is below their number. */
static struct run best_k(struct ranking *r, int64_t k)
{
    struct run run = {.bucket = BUCKETS - 1};
    for (; r->count[run.bucket] < k; run.bucket--) {
        k -= r->count[run.bucket];
        run.mass += r->sum[run.bucket];
    }
    sort_bucket(r, run.bucket);
    for (; run.rank < k; run.rank++) run.mass += (double)ranked(r, run.rank).weight;
    return run;
}

/* The shortest run within `within` whose mass reaches `mass`. */
static struct run reach(struct ranking *r, const struct run *within, double mass)
{
    struct run run = {.bucket = BUCKETS - 1};
    while (run.bucket > within->bucket && (!r->count[run.bucket] || run.mass + r->sum[run.bucket] < mass))
        run.mass += r->sum[run.bucket--];
    sort_bucket(r, run.bucket);
    const int64_t members = run.bucket == within->bucket ? within->rank : r->count[run.bucket];
    while (run.rank < members && (run.rank == 0 || run.mass < mass)) {
        run.id = ranked(r, run.rank).id;
        run.mass += (double)ranked(r, run.rank++).weight;
    }
    return run;
}

/* Draws from the weights: their best top_k, of these the shortest run with probability top_p. -1: there are none. */
static int32_t draw(struct ranking *r, const float *weight, int64_t n, const struct sampling_params *p,
                    struct candidate *space, double u)
{
    struct run run = rank_weights(r, weight, n, space);
    int64_t count = 0;
    for (int b = 0; b < BUCKETS; b++) count += r->count[b];
    if (!count) return -1;
    if (p->top_k > 0 && p->top_k < count) run = best_k(r, p->top_k);
    if (p->top_p < 1) run = reach(r, &run, (double)p->top_p * run.mass);
    return reach(r, &run, u * run.mass).id;
}

/* Log-probabilities of the best tokens, lower ids first among equals; returns the log of the sum of exponentials, which
 * turns a logit into one. `work` is overwritten. */
static double best_logprobs(const struct vector_ops *v, const float *logits, float *work, int64_t n, int n_best,
                            float *logprob, int32_t *token)
{
    int count = 0;
    float sum;
    memcpy(work, logits, (size_t)n * sizeof *work);
    double log_sum = (double)v->soften(work, n, -INFINITY, &sum);
    log_sum += log((double)sum);
    for (int64_t i = 0; i < n; i++) {
        if (count == n_best && !(logits[i] > logprob[count - 1])) continue;
        int at = count < n_best ? count++ : count - 1;
        for (; at > 0 && logits[i] > logprob[at - 1]; at--) logprob[at] = logprob[at - 1], token[at] = token[at - 1];
        logprob[at] = logits[i], token[at] = (int32_t)i;
    }
    for (int i = 0; i < n_best; i++) {
        logprob[i] = i < count ? (float)((double)logprob[i] - log_sum) : -INFINITY;
        if (i >= count) token[i] = -1;
    }
    return log_sum;
}

/* The token that the slot must take at a position; -1: what is sampled. */
static int32_t forced_token(const struct sampling_state *state, int slot, int32_t position)
{
    if (!state->forced_span) return -1;
    const struct forced_span span = state->forced_span[slot];
    const int32_t at = position - span.first;
    return at >= 0 && at < span.n ? state->forced[(int64_t)slot * MAX_FORCED + at] : -1;
}

static int32_t choose(const struct vector_ops *v, const float *logits, const int32_t *token_count, int64_t n,
                      const struct sampling_params *p, int32_t position, float *adjusted, struct candidate *candidates)
{
    const float *scored = penalise(adjusted, logits, token_count, n, p);
    int32_t chosen = best_id(v, scored, n);
    if (p->temperature >= LEAST_TEMPERATURE) {
        struct ranking ranking;
        weigh(v, adjusted, scored, n, p);
        int32_t drawn = draw(&ranking, adjusted, n, p, candidates, uniform(p->seed, position));
        chosen = drawn >= 0 ? drawn : chosen;
    }
    return chosen;
}

static void sample_row(const struct vector_ops *v, const float *logits, int slot, const struct sampling_state *state,
                       float *adjusted, struct candidate *candidates)
{
    const int64_t n = state->vocab_size;
    const struct sampling_params *p = &state->params[slot];
    const int n_logprobs = cpu__min(p->n_logprobs, MAX_LOGPROBS);
    int32_t *token_count = state->token_count + slot * n;
    float *logprob = state->logprob + (int64_t)slot * (1 + MAX_LOGPROBS);
    int32_t *logprob_token = state->logprob_token + (int64_t)slot * (1 + MAX_LOGPROBS);
    const int32_t position = ++state->position[slot];
    double log_sum = 0;
    if (n_logprobs > 0) log_sum = best_logprobs(v, logits, adjusted, n, n_logprobs, logprob + 1, logprob_token + 1);
    int32_t chosen = forced_token(state, slot, position);
    if (chosen < 0) chosen = choose(v, logits, token_count, n, p, position, adjusted, candidates);
    state->next_token[slot] = chosen;
    if ((token_count[chosen] & TOKEN_COUNT_MASK) < TOKEN_COUNT_MASK) token_count[chosen]++;
    if (n_logprobs > 0) {
        logprob[0] = (float)((double)logits[chosen] - log_sum);
        logprob_token[0] = chosen;
    }
}

int cpu__sample(struct ops *o, struct tensor logits, const int32_t *slot, const struct sampling_state *state)
{
    const struct cpu *c = cpu__of(o);
    struct arena arena;
    struct scratch s;
    TRY(cpu__scratch(o, &arena));
    TRY(place(c, &arena, state->vocab_size, &s));
#pragma omp parallel for num_threads(c->n_threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < logits.dim[0]; i++) {
        const size_t offset = (size_t)omp_get_thread_num() * (size_t)state->vocab_size;
        if (slot[i] >= 0 && slot[i] < state->n_slots)
            sample_row(c->vector, cpu__row(logits, i), slot[i], state, s.adjusted + offset, s.candidates + offset);
    }
    return OK;
}

int cpu__sampling_begin(struct ops *o, const struct sampling_state *state, int slot,
                        const struct sampling_params *params, const int32_t *prompt_ids, int n_prompt)
{
    (void)o;
    int32_t *token_count = state->token_count + (int64_t)slot * state->vocab_size;
    memset(token_count, 0, (size_t)state->vocab_size * sizeof *token_count);
    for (int i = 0; i < n_prompt; i++)
        if (prompt_ids[i] >= 0 && prompt_ids[i] < state->vocab_size) token_count[prompt_ids[i]] = TOKEN_IN_PROMPT;
    state->params[slot] = *params;
    state->position[slot] = n_prompt - 1;
    if (state->forced_span) state->forced_span[slot].n = 0;
    return OK;
}
