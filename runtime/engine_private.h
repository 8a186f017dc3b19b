/* engine_private - the engine's parts, shared by its three files: engine.c (public calls), engine_start.c (opening),
 * engine_step.c (executing a step plan). */
#ifndef VITRAIL_RUNTIME_ENGINE_PRIVATE_H
#define VITRAIL_RUNTIME_ENGINE_PRIVATE_H

#include "runtime/engine.h"
#include "runtime/plan.h"
#include "runtime/resources.h"
#include "runtime/scheduler.h"
#include "runtime/step.h"

/* What every rank remembers of the sequence in a slot, from its beginning to the end of its prompt. */
struct engine_slot {
    struct kv_budget budget;
    uint64_t seed; /* of its sampling, and of a policy's random choices */
    int last_turn_start, n_spans;
    struct image_span *spans; /* [max_images_per_prompt] */
};

/* Host arrays of one prefill, sized for the largest step. */
struct engine_prefill {
    int32_t *ids, *position;          /* [max tokens] */
    int32_t *slot, *cu_seqlens;       /* [n_slots], [n_slots + 1] */
    int32_t *image_row;               /* [max images] */
    bool *ends;                       /* [n_slots] */
    struct policy_sequence *sequence; /* [n_slots] */
    int *kept;                        /* [n_slots, n_layers] */
};

struct engine {
    struct comm *comm; /* the caller's, or ours around it where the data plane is a GPU's */
    struct comm *device_comm;
    struct liveness *liveness;
    struct ops ops;
    struct resources resources;
    struct memory_plan plan;
    void *memory;       /* the arena's block */
    void *host_memory;  /* pages of evicted tokens */
    size_t used_before; /* memory in use before ours was taken */
    struct step_message message;
    struct step_limits limits;
    struct engine_slot *slots;
    struct image_span *spans; /* [n_slots * max_images_per_prompt] */
    struct engine_prefill prefill;
    struct scheduler *scheduler; /* rank 0 */
    int32_t *host_tokens;        /* [n_slots + 1] results of one step, rank 0 */
    float *host_logprob;
    int32_t *host_logprob_token;
    int64_t *host_recall_counts; /* [n_slots, 2] */
    struct engine_counters counters;
    double load_seconds;
};

/* engine_start.c: phases of the opening, each local; engine_open agrees after each. */
int engine__configure(struct engine *e, const struct config *config) MUST_CHECK;
int engine__describe(struct engine *e, const struct config *config, struct model_dims *dims) MUST_CHECK;
/* collective: the communicator of the device */
int engine__connect(struct engine *e, const struct config *config, const struct model_dims *dims) MUST_CHECK;
int engine__plan(struct engine *e, const struct config *config, const struct model_dims *dims,
                 struct checkpoint **checkpoint) MUST_CHECK;
int engine__allocate(struct engine *e, const struct checkpoint *checkpoint) MUST_CHECK;
int engine__load(struct engine *e, struct checkpoint *checkpoint) MUST_CHECK;
/* collective: decode steps recorded before the first request */
int engine__warm(struct engine *e) MUST_CHECK;

/* engine_step.c: executes the message's step on this rank; collective. */
int engine__run_step(struct engine *e) MUST_CHECK;
/* reads results of the oldest pending step on rank 0 and hands them to the scheduler. */
int engine__collect(struct engine *e) MUST_CHECK;

#endif
