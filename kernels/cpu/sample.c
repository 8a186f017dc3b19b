/* Sampling: one token a row from logits, in the order penalties, temperature, min_p, top_k, top_p.
 *
 * A row is a task. Sums over the vocabulary run in double in the order of ids, and candidates are ranked by falling
 * probability with ties to the lower id, so the same logits, parameters and position give the same token always.
 * Of equal values at the k-th place, top_k keeps those of lower ids: top_k 1 is the greedy choice. */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "base/hash.h"
#include "kernels/cpu/cpu.h"

/* Below it sampling is greedy: the quotient of a difference of logits and the temperature would overflow. */
#define LEAST_TEMPERATURE 1e-5f

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

/* The best candidate leaves the heap for the place behind its end: heap[n] after n shrank. */
static struct candidate pop_best(struct candidate *heap, int64_t *n)
{
    struct candidate best = heap[0];
    heap[0] = heap[--*n];
    heap[*n] = best;
    if (*n) sift_down(heap, *n, 0);
    return best;
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

/* Turns logits into weights and fills candidates with those that pass min_p; returns their number. An infinite logit
 * leaves no weight to the others. */
static int64_t weigh(const struct vector_ops *v, struct candidate *candidates, float *weight, const float *logits,
                     int64_t n, const struct sampling_params *p)
{
    const float best = v->maximum(logits, n);
    int64_t count = 0;
    if (fabsf(best) == INFINITY)
        for (int64_t i = 0; i < n; i++) weight[i] = logits[i] == best;
    else
        v->exponentials(weight, logits, best, 1 / p->temperature, n);
    for (int64_t i = 0; i < n; i++)
        if (weight[i] > 0 && weight[i] >= p->min_p) candidates[count++] = (struct candidate){weight[i], (int32_t)i};
    return count;
}

/* Draws from candidates: their first top_k by rank, of these the shortest run with probability top_p. Ranked ones
 * gather behind the heap, best at the end of the array. */
static int32_t draw(struct candidate *candidates, int64_t n, const struct sampling_params *p, double u)
{
    double total = 0, ranked = 0;
    int64_t rest = n;
    for (int64_t i = n / 2 - 1; i >= 0; i--) sift_down(candidates, n, i);
    if (p->top_k > 0 && p->top_k < n) {
        while (n - rest < p->top_k) total += (double)pop_best(candidates, &rest).weight;
    } else {
        for (int64_t i = 0; i < n; i++) total += (double)candidates[i].weight;
    }
    const int64_t top_k_end = p->top_k > 0 && p->top_k < n ? n - p->top_k : 0;
    double bound = total;
    if (p->top_p < 1) { /* the last one kept is the first whose run reaches top_p */
        int64_t at = n;
        while (at > top_k_end && (at == n || ranked < (double)p->top_p * total)) {
            if (--at < rest) (void)pop_best(candidates, &rest);
            ranked += (double)candidates[at].weight;
        }
        bound = ranked;
    }
    double target = u * bound, sum = 0;
    for (int64_t at = n - 1; at >= 0; at--) {
        if (at < rest) (void)pop_best(candidates, &rest);
        sum += (double)candidates[at].weight;
        if (sum > target || at == top_k_end) return candidates[at].id;
    }
    return candidates[n - 1].id;
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
    const float *scored = penalise(adjusted, logits, token_count, n, p);
    int32_t chosen = best_id(v, scored, n);
    if (p->temperature >= LEAST_TEMPERATURE) {
        int64_t count = weigh(v, candidates, adjusted, scored, n, p);
        if (count) chosen = draw(candidates, count, p, uniform(p->seed, position));
    }
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
    return OK;
}
