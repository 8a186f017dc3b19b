/* step - the step plan: what rank 0 tells all ranks to do next, one message, the only control channel.
 *
 * A fixed head, then arrays of plain structs in the order of the counts, then token ids, image spans and pixels. Every
 * rank (rank 0 too) reads the arrays through step_view, which checks all counts against the message's size. */
#ifndef VITRAIL_RUNTIME_STEP_H
#define VITRAIL_RUNTIME_STEP_H

#include <stdint.h>

#include "kernels/ops.h"
#include "kvcache/policy.h"

enum step_kind { STEP_RUN, STEP_SET_POLICY, STEP_CEILINGS, STEP_STOP };

struct step_head {
    uint64_t number;
    int32_t kind; /* enum step_kind */
    int32_t n_release, n_begin, n_chunks, n_decode, n_ids, n_spans, n_images;
    uint64_t body_bytes;
};

/* A sequence takes a slot. Its prompt's ids and spans follow in the message's arrays. */
struct step_begin {
    struct sampling_params sampling;
    struct kv_budget budget;
    int32_t slot, n_ids, first_id, n_spans, first_span, last_turn_start;
    int32_t n_forced, first_forced; /* of the message's ids: tokens that it must generate first */
};

/* Some prompt rows of a slot. */
struct step_chunk {
    int32_t slot, first, n_tokens; /* positions [first, first + n_tokens) */
    int32_t first_id;              /* of the message's ids */
    int32_t prompt_tokens;
    int32_t ends;         /* 1: the prompt ends with this chunk */
    int32_t first_column; /* among the prompts that end in this step */
    int32_t continues;    /* 1: of a follow-up; the policy lets its lanes be */
    int32_t n_images, first_image;
};

/* The message under construction (rank 0) or received; memory is taken once. */
struct step_message {
    struct step_head head;
    char *body;
    size_t capacity;
};

/* Pointers into a message's body. */
struct step_view {
    const int32_t *release;             /* [n_release] slots */
    const struct step_begin *begin;     /* [n_begin] */
    const struct step_chunk *chunk;     /* [n_chunks] */
    const int32_t *decode;              /* [n_decode] slots */
    const int32_t *ids;                 /* [n_ids] */
    const struct image_span *spans;     /* [n_spans] */
    const uint8_t *pixels;              /* [n_images * image_bytes] */
    const struct policy_config *policy; /* of STEP_SET_POLICY */
};

/* The most that one step can carry; fixes the message's capacity. */
struct step_limits {
    int max_seqs, max_ids, max_spans, max_images;
    size_t image_bytes;
};

int step_message_open(struct step_message *message, const struct step_limits *limits) MUST_CHECK;
void step_message_close(struct step_message *message);
size_t step_message_bytes(const struct step_limits *limits);

/* step_layout - sets head.body_bytes from the counts and returns where the arrays go, for rank 0 to fill (cast away
 * const). ERR_BUG if it exceeds the capacity. step_read - the same for a received message, checking its size. */
int step_layout(struct step_message *message, size_t image_bytes, struct step_view *view) MUST_CHECK;
int step_read(const struct step_message *message, size_t image_bytes, struct step_view *view) MUST_CHECK;

#endif
