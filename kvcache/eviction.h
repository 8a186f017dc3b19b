/* eviction - what the policies share that evict a prompt's tokens by scores: room for a score a token and KV head, the
 * keep lists made from them, and how a layer's budget is split over its heads. */
#ifndef VITRAIL_KVCACHE_EVICTION_H
#define VITRAIL_KVCACHE_EVICTION_H

#include "kvcache/policy.h"

struct eviction {
    int *lane_k,
        *lane_window;     /* [lanes] host: tokens to keep in each lane; the newest of them, kept whatever they score */
    float *score;         /* device; see eviction_scores */
    int32_t *index;       /* [lanes, max_context] the keep lists of one sequence, device */
    int32_t *share;       /* [lanes] budgets of adaptive heads, device */
    int64_t *layer_first; /* [n_layers] KV heads of this rank in the layers before, host */
    int *window;          /* [n_layers] host: room for what eviction_keep is given */
    struct budget_group *group; /* [n_layers] host */
    int64_t n_lanes;            /* of a slot on this rank */
};

/* eviction_open - places scores for all prompts that end in one step, and the lists of one sequence, in the arena.
 * Errors: ERR_NOMEM. eviction_close - frees the host's part; accepts a failed open. */
int eviction_open(struct eviction *e, const struct policy_env *env, struct arena *arena) MUST_CHECK;
void eviction_close(struct eviction *e);

/* eviction_scores - scores of a prompt at a layer, [n_kv_heads, m] float32, device: prompts one after the other, layers
 * within a prompt, heads within a layer. */
float *eviction_scores(const struct eviction *e, const struct policy_sequence *sequence, int layer);

/* eviction_tokens - tokens that a budget keeps of an m-token prompt in a layer: max(1, floor(share * m)), at most m. */
int eviction_tokens(struct kv_budget budget, int m);

/* eviction_budgets - a layer's tokens, the same in all layers: the prefill_end of policies with equal budgets. */
int eviction_budgets(struct policy *policy, const struct policy_sequence *sequence, int *k);

/* eviction_keep - keep lists from the scores: in each lane of layer l the newest min(window[l], k[l]) tokens and the
 * best of the others. Where config.heads is adaptive a layer's heads share n_kv_heads * k[l] tokens as Ada-KV has it:
 * each head's own best floor(heads_floor * (k - window)) first, then all heads' other scores compete (per rank). */
int eviction_keep(struct policy *policy, struct eviction *e, const struct policy_sequence *sequence, const int *k,
                  const int *window, struct policy_keep *out) MUST_CHECK;

#endif
