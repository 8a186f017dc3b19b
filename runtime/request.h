/* request - one question to the engine, complete and checked: token ids with image placeholders expanded, pixels ready
 * for the vision tower, sampling, limits. What turns an OpenAI body into one is runtime/prompt.h; this is plain data.
 */
#ifndef VITRAIL_RUNTIME_REQUEST_H
#define VITRAIL_RUNTIME_REQUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "kernels/ops.h"
#include "kvcache/policy.h"

enum { REQUEST_MAX_STOPS = 16, REQUEST_MAX_STOP_IDS = 16 };

struct request {
    int32_t *ids; /* [n_ids] prompt; each image is a run of image tokens */
    int n_ids;
    struct image_span *spans; /* [n_images] token range of each image */
    uint8_t *pixels;          /* [n_images, image_size, image_size, 3] RGB, resized and cropped */
    int n_images;
    size_t pixel_bytes; /* of all images */
    int last_turn_start;
    struct sampling_params sampling;
    int max_tokens, min_tokens;
    bool ignore_eos;
    char *stop[REQUEST_MAX_STOPS]; /* stop strings, malloc'd */
    int n_stops;
    int32_t stop_id[REQUEST_MAX_STOP_IDS];
    int n_stop_ids;
    bool include_stop;
    struct kv_budget budget; /* of this request; preset from the configuration */
    /* [n_forced] malloc'd: the first generated tokens, whatever the logits say; at most MAX_FORCED (kernels/ops.h) and
     * max_tokens. Stop conditions begin to count with the last of them. */
    int32_t *forced;
    int n_forced;
    /* A second turn: [n_followup] malloc'd ids that follow the first answer, over the cache as the policy left it for
     * the first turn, nothing of which is read again or compressed again; answered by up to followup_max_tokens. It
     * gets no log-probabilities and no forced tokens. n_followup 0: none. */
    int32_t *followup;
    int n_followup, followup_max_tokens;
};

/* request_free - frees what the request owns, not the struct. Accepts a zeroed one. */
void request_free(struct request *request);

enum finish_reason { FINISH_STOP, FINISH_LENGTH, FINISH_ABORT, FINISH_N };
const char *finish_reason_name(enum finish_reason reason); /* "stop", "length", "abort" */

/* What the engine says at the end of a request; pointers are valid during the callback only. */
struct completion {
    const char *text; /* UTF-8 */
    size_t text_size;
    const int32_t *tokens; /* generated ids, the end-of-sequence id included if one was sampled */
    int n_tokens;
    enum finish_reason finish_reason;
    int turn;  /* 0, or 1 for the answer to a follow-up */
    bool more; /* the sink is called again, for the next turn */
    int prompt_tokens, image_tokens;
    /* KV cache of the prompt after compression, over all ranks (replicas counted once) */
    const char *policy;
    struct kv_budget budget;
    const int *kept_tokens_per_layer; /* [n_layers] */
    int n_layers;
    int64_t bytes_full, bytes_kept;
    int64_t bytes_host;           /* of the prompt's tokens that went to host memory */
    double bytes_read_per_step;   /* what attention reads of the cache in a decode step, mean; 0 without such a step */
    double recall_bytes_per_step; /* those of them that come over the bus from host memory */
    double recall_hit_rate;       /* of the tokens in host memory that steps attended to: share found on the device (of
                                     rank 0's heads) */
    double queue_seconds, first_token_seconds, total_seconds; /* since submission */
    /* Log-probabilities, if asked for: per generated token 1 + n_logprobs pairs, the chosen one first. */
    const float *logprob;
    const int32_t *logprob_token;
    int n_logprobs;
};

/* Where a request's output goes. on_text may be NULL; both are called on rank 0 between steps. */
struct sink {
    void *arg;
    void (*on_text)(void *arg, const char *text, size_t size); /* whole characters only */
    void (*on_done)(void *arg, const struct completion *completion);
};

#endif
