/* fake_engine - stands in for runtime/engine.h in tests of what is above it: requests take a few steps each, end in
 * another order than they came, and answer with a function of their prompt. At most one log-probability and 8 forced
 * tokens. Include it in one file of a test program;
 * it defines the engine's symbols, so the linker takes no engine from the library. */
#ifndef VITRAIL_TESTS_FAKE_ENGINE_H
#define VITRAIL_TESTS_FAKE_ENGINE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/hash.h"
#include "runtime/engine.h"

enum { FAKE_MAX = 512, FAKE_LAYERS = 2 };

struct engine {
    int max_queued;           /* requests it takes before ERR_FULL */
    int fail_after, n_steps;  /* engine_step fails then, if not 0 */
    int refuse_prompt_tokens; /* engine_submit: ERR_REQUEST for prompts longer than this, if not 0 */
    bool zero_byte;           /* answers end in one */
    unsigned step_microseconds;
    struct policy_config policy;
    int n, n_submitted, n_finished, most;
    struct fake_running {
        struct request request;
        struct sink sink;
        int steps_left;
    } running[FAKE_MAX];
    struct engine_counters counters;
};

/* The answer to a prompt: three tokens and their text. A policy other than full at a small budget gets it wrong. */
static inline void fake_answer(const struct request *request, const struct policy_config *policy, int32_t tokens[3],
                               char text[64])
{
    uint64_t h = hash_bytes(request->ids, (size_t)request->n_ids * sizeof *request->ids);
    if (request->n_images) h = hash_mix(h, hash_bytes(request->pixels, request->pixel_bytes));
    tokens[0] = (int32_t)(h % 1000) + 10;
    tokens[1] = request->n_ids % 1000 + 10;
    tokens[2] = 2;
    if (strcmp(policy->policy, "full") && request->budget.share < 0.5) tokens[1]++;
    snprintf(text, 64, "answer %d %d", tokens[0], tokens[1]);
}

static inline void fake_finish(struct engine *e, int i, enum finish_reason reason)
{
    struct fake_running r = e->running[i];
    e->running[i] = e->running[--e->n];
    int32_t tokens[3];
    char text[64];
    int kept[FAKE_LAYERS] = {r.request.n_ids / 2, r.request.n_ids / 4};
    fake_answer(&r.request, &e->policy, tokens, text);
    float logprob[16];
    for (int k = 0; k < 8; k++) { /* of pairs; a forced token that the policy would not have said is unlikely */
        bool other = k < r.request.n_forced && k < 3 && r.request.forced[k] != tokens[k];
        logprob[2 * k] = other ? -2 : -0.25f;
        logprob[2 * k + 1] = -0.125f;
    }
    int image_tokens = 0;
    for (int k = 0; k < r.request.n_images; k++) image_tokens += r.request.spans[k].end - r.request.spans[k].start;
    struct completion c = {.text = text,
                           .text_size = strlen(text) + e->zero_byte,
                           .tokens = r.request.n_forced ? r.request.forced : tokens,
                           .n_tokens = r.request.n_forced ? r.request.n_forced : 3,
                           .logprob = r.request.sampling.n_logprobs ? logprob : NULL,
                           .n_logprobs = r.request.sampling.n_logprobs,
                           .bytes_read_per_step = 100 * (double)r.request.n_ids,
                           .finish_reason = reason,
                           .prompt_tokens = r.request.n_ids,
                           .image_tokens = image_tokens,
                           .policy = e->policy.policy,
                           .budget = r.request.budget,
                           .kept_tokens_per_layer = kept,
                           .n_layers = FAKE_LAYERS,
                           .bytes_full = 1024 * (int64_t)r.request.n_ids,
                           .bytes_kept = 256 * (int64_t)r.request.n_ids};
    c.more = r.request.n_followup && reason != FINISH_ABORT;
    r.sink.on_done(r.sink.arg, &c);
    if (c.more) { /* the second turn has the same answer, but for the number */
        c.more = false, c.turn = 1, c.n_logprobs = 0;
        r.sink.on_done(r.sink.arg, &c);
    }
    request_free(&r.request);
    if (reason != FINISH_ABORT) e->n_finished++;
}

int engine_submit(struct engine *e, struct request *request, struct sink sink)
{
    if (e->n >= e->max_queued || e->n >= FAKE_MAX) FAIL(ERR_FULL, "queue full");
    if (e->refuse_prompt_tokens && request->n_ids > e->refuse_prompt_tokens)
        FAIL(ERR_REQUEST, "%d tokens do not fit the pool", request->n_ids);
    e->running[e->n++] = (struct fake_running){*request, sink, 1 + e->n_submitted++ * 7 % 5};
    if (e->n > e->most) e->most = e->n;
    memset(request, 0, sizeof *request);
    return OK;
}

int engine_step(struct engine *e, int *active)
{
    if (e->step_microseconds) usleep(e->step_microseconds);
    if (e->fail_after && ++e->n_steps >= e->fail_after) FAIL(ERR_PEER, "rank 1 died");
    for (int i = e->n - 1; i >= 0; i--) {
        e->counters.decode_tokens++;
        if (--e->running[i].steps_left <= 0) fake_finish(e, i, FINISH_STOP);
    }
    e->counters.steps++;
    *active = e->n;
    return OK;
}

int engine_abort_all(struct engine *e)
{
    while (e->n) fake_finish(e, e->n - 1, FINISH_ABORT);
    return OK;
}

int engine_set_policy(struct engine *e, const struct policy_config *config)
{
    e->policy = *config;
    return OK;
}

void engine_counters(struct engine *e, struct engine_counters *out) { *out = e->counters; }

#endif
