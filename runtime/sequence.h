/* sequence - one request's life on rank 0: queued, in a slot, generating, done. Private to the scheduler. */
#ifndef VITRAIL_RUNTIME_SEQUENCE_H
#define VITRAIL_RUNTIME_SEQUENCE_H

#include <stdint.h>

#include "runtime/request.h"
#include "runtime/text_stream.h"

enum sequence_state {
    SEQUENCE_FREE,
    SEQUENCE_QUEUED,
    SEQUENCE_PREFILL,
    SEQUENCE_RUNNING,
    SEQUENCE_DONE /* completed; its slot is released by the next step */
};

struct sequence {
    enum sequence_state state;
    uint64_t serial;
    struct request request;
    struct sink sink;
    struct text_stream stream;
    int slot, judging;
    bool begun;      /* a step has introduced it to the ranks */
    int n_prefilled; /* prompt rows that steps have covered */
    int n_issued;    /* tokens that planned steps sample */
    int turn;        /* 1: the follow-up */
    int n_behind;    /* tokens in the lanes behind what was kept, when this turn's answer begins */
    int32_t *tokens; /* [max_tokens] collected ids */
    int n_tokens;
    float *logprob; /* [max_tokens, 1 + n_logprobs], NULL if not wanted */
    int32_t *logprob_token;
    int *kept;                /* [n_layers] tokens kept in each lane of a layer; the slot's, set after the prompt */
    int64_t recall_counts[2]; /* of this rank's lanes so far, as policy_recall_counts has them */
    double submitted_at, admitted_at, first_token_at;
};

/* sequence_begin - takes the request over (zeroing it) and prepares its output. sequence_clear - frees all of it but
 * `kept`, which belongs to the slot, and zeroes the rest. */
int sequence_begin(struct sequence *seq, struct request *request, struct sink sink, const struct tokenizer *tokenizer,
                   int judging) MUST_CHECK;
void sequence_clear(struct sequence *seq);

/* sequence_continue - from DONE to PREFILL of its follow-up: the prompt is now the conversation so far, of which the
 * lanes hold all but the last tokens. */
int sequence_continue(struct sequence *seq, const struct tokenizer *tokenizer) MUST_CHECK;

/* What every completion of an engine shares. */
struct sequence_facts {
    const struct policy *policy;
    int n_layers;
    int64_t token_bytes, kept_token_bytes; /* K and V of one token over all layers and ranks; as the cache keeps it */
    int plain_tokens, page_tokens; /* so many of a lane stay as the prompt's, and up to a page's more until they age */
    const int *eos_ids;
    int n_eos_ids;
};

/* sequence_push - one collected token: appends it, gives new text to the sink, completes the sequence if it ends here
 * (state DONE). logprob, logprob_token: the slot's [1 + MAX_LOGPROBS] or NULL. */
int sequence_push(struct sequence *seq, const struct sequence_facts *facts, int32_t token, const float *logprob,
                  const int32_t *logprob_token) MUST_CHECK;

/* sequence_complete - tells the sink and moves to DONE (or FREE if it was queued). */
int sequence_complete(struct sequence *seq, const struct sequence_facts *facts, enum finish_reason reason) MUST_CHECK;

#endif
