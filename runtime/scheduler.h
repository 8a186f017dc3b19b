/* scheduler - continuous batching on rank 0: which requests hold slots, what the next step does, when a request ends.
 *
 * It knows lengths, pages and ids, no tensors. A step is planned before the tokens of the one before are known: they
 * come one step late, so a sequence found finished may have run one surplus step, whose token is dropped. Requests are
 * admitted first come, first served; a sequence reserves all pages it can come to use, so none is ever preempted. */
#ifndef VITRAIL_RUNTIME_SCHEDULER_H
#define VITRAIL_RUNTIME_SCHEDULER_H

#include <stdbool.h>
#include <stdint.h>

#include "kvcache/pages.h"
#include "model/dims.h"
#include "model/tokenizer.h"
#include "runtime/config.h"
#include "runtime/request.h"
#include "runtime/step.h"

struct scheduler;

struct scheduler_options {
    const struct config *config; /* limits resolved; must outlive the scheduler, as must dims */
    const struct model_dims *dims;
    struct pages *pages;      /* taken */
    struct pages *host_pages; /* of evicted tokens, taken; NULL: they are freed */
    int64_t token_bytes;      /* K and V of one token over all layers and ranks */
    size_t image_bytes;
};

int scheduler_open(const struct scheduler_options *options, struct scheduler **out) MUST_CHECK;
void scheduler_close(struct scheduler *s);
/* What completions need; before the first submit. Tokenizer and policy must outlive the scheduler. */
void scheduler_use_tokenizer(struct scheduler *s, const struct tokenizer *tokenizer);
void scheduler_use_policy(struct scheduler *s, const struct policy *policy);
/* scheduler_use_storage - how lanes are stored once their prompt has ended, where not as the prompt's: tokens of a
 * page, bytes of a token over all layers and ranks, and tokens of a lane that stay as the prompt's (0: none). With
 * nothing active. */
void scheduler_use_storage(struct scheduler *s, int page_tokens, int64_t token_bytes, int plain_tokens);

/* scheduler_submit - see engine_submit; `judging`: rows that the policy needs in the prompt's last chunk (1: none). */
int scheduler_submit(struct scheduler *s, struct request *request, struct sink sink, int judging) MUST_CHECK;

/* scheduler_plan - writes the next step into `message`; *work is false if there is nothing to run. */
int scheduler_plan(struct scheduler *s, struct step_message *message, bool *work) MUST_CHECK;

/* scheduler_prompt_ended - what the policy left of a prompt that ended in the planned step: kept [n_layers]. */
void scheduler_prompt_ended(struct scheduler *s, int slot, const int *kept);

/* Results of the i-th step (its number): next_token [n_slots] and, where wanted, log-probabilities. Delivers text and
 * completions. */
struct step_results {
    uint64_t step;
    const int32_t *token;
    const float *logprob;
    const int32_t *logprob_token;
    const int64_t *recall_counts; /* [n_slots, 2] of policy_recall_counts; NULL: nothing is recalled */
};
int scheduler_collect(struct scheduler *s, const struct step_results *results) MUST_CHECK;

/* scheduler_pending - number of the oldest step whose results were not collected; 0 if none. scheduler_wants_logprobs -
 * whether that step has any. */
uint64_t scheduler_pending(const struct scheduler *s);
bool scheduler_wants_logprobs(const struct scheduler *s);

/* scheduler_active - requests queued or in slots (finished ones that wait for their release not counted). */
int scheduler_active(const struct scheduler *s);
int scheduler_max_running(const struct scheduler *s);

/* scheduler_abort_all - completes everything with FINISH_ABORT; slots are released by the next step. */
int scheduler_abort_all(struct scheduler *s) MUST_CHECK;

#endif
