/* resources - everything of one rank that takes device memory, placed by one function: model, KV cache, sampling,
 * policy. The memory plan is that function run over a measuring arena, so plan and engine cannot disagree. */
#ifndef VITRAIL_RUNTIME_RESOURCES_H
#define VITRAIL_RUNTIME_RESOURCES_H

#include "base/arena.h"
#include "kernels/ops.h"
#include "kvcache/policy.h"
#include "model/model.h"
#include "runtime/config.h"

struct resources {
    struct config config; /* with 0 = auto limits resolved */
    struct model_dims dims;
    struct ops *ops;
    struct comm *comm;
    struct model *model;
    struct kv_view kv;
    struct kv_view aged; /* where lanes are stored in two parts: the one in 8 bits, of kv's pages */
    struct kv_view host; /* evicted tokens: pages in host memory, tables on the device; none: n_pages 0 */
    struct sampling_state sampling;
    struct policy policy;
    char *policy_memory; /* holds the state of the greediest policy, so that eval can change policies */
    size_t policy_bytes;
    bool quantises;    /* the cache's dtype, or another that may be set, is one of 8 bits */
    bool ages;         /* and some of a lane's tokens are to stay plain: there are tables for two parts */
    size_t gpu_memory; /* of a GPU that is only planned for; 0: there is one, or its size is not known */
    /* Results of a step on their way to the host, one step late: two of each, used in turn. */
    int32_t *tokens;        /* [2, n_slots + 1]: next_token of all slots, then the cache's error word */
    float *logprob;         /* [2, n_slots, 1 + MAX_LOGPROBS] */
    int32_t *logprob_token; /* [2, n_slots, 1 + MAX_LOGPROBS] */
    int64_t *recall_counts; /* [2, n_slots, 2] of policy_recall_counts, where evicted tokens stay in host memory */
};

/* resources_use_dtype - settles the activations' dtype by the config's, else the checkpoint's. Before resources_open.
 * Errors: ERR_CONFIG for float32 on a GPU. */
int resources_use_dtype(const struct config *config, const struct model_dims *dims, struct ops *ops) MUST_CHECK;

/* resources_open - shard plan and sizes for a loaded config and dims; no device memory yet. ops and comm are kept.
 * Errors: ERR_CONFIG where limits and model do not fit together, naming the keys. resources_close accepts half-open. */
int resources_open(const struct config *config, const struct model_dims *dims, struct ops *ops, struct comm *comm,
                   struct resources *r) MUST_CHECK;
void resources_close(struct resources *r);

/* resources_place - takes (or measures) everything, with a pool of n_pages pages and one of n_host_pages in host
 * memory, whose pages alone are not the arena's: resources_use_host says where they are. */
int resources_place(struct resources *r, struct arena *arena, const struct checkpoint *checkpoint, int64_t n_pages,
                    int64_t n_host_pages) MUST_CHECK;
void resources_use_host(struct resources *r, void *memory);

/* resources_check_policy - ERR_CONFIG where a policy cannot be set: see policy_check; an 8-bit dtype that no room was
 * made for; ERR_UNSUPPORTED what GPUs have not been seen to do. resources_set_policy - opens a policy in the memory set
 * aside, and the cache's dtype with it; closes the one before. With no sequence in a slot. */
int resources_check_policy(const struct resources *r, const struct policy_config *config) MUST_CHECK;
int resources_set_policy(struct resources *r, const struct policy_config *config) MUST_CHECK;

/* resources_begin - loads the weights and resets the cache, after placing. */
int resources_begin(struct resources *r, struct checkpoint *checkpoint,
                    const struct load_progress *progress) MUST_CHECK;

/* Derived numbers. */
/* resources_policy_page_bytes - what the policies' state takes with each page of the pool, at most. */
int resources_policy_page_bytes(struct resources *r, size_t *bytes) MUST_CHECK;
bool resources_keeps_evicted(const struct resources *r);    /* in host memory */
size_t resources_page_bytes(const struct resources *r);     /* one page of the pool */
size_t resources_scale_bytes(const struct resources *r);    /* the scales of its tokens; 0: none are needed */
enum kv_format resources_format(const struct resources *r); /* of tokens, once the prompt has ended */
int64_t resources_lane_pages(const struct resources *r,
                             int tokens);                      /* of a lane of so many, once the prompt has ended */
int64_t resources_kept_token_bytes(const struct resources *r); /* as resources_token_bytes, once the prompt has ended */
int resources_max_images(const struct config *config, const struct model_dims *dims); /* of one step */
int resources_max_prompt_tokens(const struct config *config); /* of all prompts that end in one step */
int64_t resources_token_bytes(const struct model_dims *dims,
                              enum dtype dtype); /* K and V of a token, all layers, all ranks */

#endif
