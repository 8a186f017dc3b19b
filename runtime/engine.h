/* engine - the serving engine of one rank: opens the model's shard, the KV pool and the policy, and runs steps.
 *
 * Rank 0 takes requests and plans steps; the other ranks follow the broadcast step plan. All fallible calls that are
 * marked collective must be made by all ranks. After engine_open a failure is fatal for all ranks (liveness_fail). */
#ifndef VITRAIL_RUNTIME_ENGINE_H
#define VITRAIL_RUNTIME_ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "model/dims.h"
#include "model/tokenizer.h"
#include "parallel/comm.h"
#include "parallel/liveness.h"
#include "runtime/config.h"
#include "runtime/request.h"

struct engine;

/* engine_open - collective: agrees on configuration, plans and prints memory, loads this rank's shard, takes the KV
 * pool, seals memory. engine_close accepts NULL. */
int engine_open(const struct config *config, struct comm *comm, struct liveness *liveness,
                struct engine **out) MUST_CHECK;
void engine_close(struct engine *engine);

/* Facts for the front end. */
const struct model_dims *engine_dims(const struct engine *engine);
const struct config *engine_config(const struct engine *engine); /* limits resolved */
int engine_max_prompt_tokens(const struct engine *engine); /* longest prompt that can be admitted, generation aside */

/* engine_use_tokenizer - rank 0, before the first submit: turns tokens into text; must outlive the engine. Without one
 * completions have ids and no text. */
void engine_use_tokenizer(struct engine *engine, const struct tokenizer *tokenizer);

/* engine_submit - rank 0: queues a request and takes what it owns (the struct is zeroed). Errors: ERR_FULL when
 * config.max_queued requests wait (run engine_step and try again); ERR_REQUEST when it can never fit (too long for
 * max_model_len or for the KV pool), naming the number. */
int engine_submit(struct engine *engine, struct request *request, struct sink sink) MUST_CHECK;

/* engine_step - rank 0: admits, broadcasts and runs one step, delivers text and completions. *active = requests that
 * are queued or running after it; with none it returns at once without a step. */
int engine_step(struct engine *engine, int *active) MUST_CHECK;

/* engine_abort_all - rank 0: ends all requests; sinks get FINISH_ABORT. */
int engine_abort_all(struct engine *engine) MUST_CHECK;

/* engine_follow - ranks > 0: executes rank 0's steps until engine_stop. engine_stop - rank 0: ends the followers. */
int engine_follow(struct engine *engine) MUST_CHECK;
int engine_stop(struct engine *engine) MUST_CHECK;

/* engine_set_policy - collective between runs with nothing active (rank 0 calls, followers obey): another policy or
 * budget over the same weights, for eval and bench. ERR_NOMEM if its state exceeds what was planned. */
int engine_set_policy(struct engine *engine, const struct policy_config *config) MUST_CHECK;

/* engine_ceilings - rank 0 calls, followers obey, nothing active: what all ranks' devices do at the same time, summed;
 * and what a step costs at least. For bench. */
struct engine_floor {
    struct ops_ceilings sum;
    size_t weight_bytes;     /* of matrices, that a decode step reads on all ranks */
    int64_t layer_elements;  /* matrix elements of all layers and ranks: a prompt token takes two operations each */
    int64_t attention_width; /* query heads * head_dim over all layers: 4 operations each and (query, key) pair */
    int64_t kv_token_bytes;  /* K and V of one token as the cache keeps it, all layers and ranks */
};
int engine_ceilings(struct engine *engine, struct engine_floor *out) MUST_CHECK;

/* Counters since the open, for bench and eval. */
struct engine_counters {
    int64_t steps, prefill_tokens, decode_tokens;
    double prefill_seconds, decode_seconds, vision_seconds;
    int max_running;                           /* most sequences that ran at once */
    int64_t pages_total, pages_free;           /* of this rank's pool */
    int64_t host_pages_total, host_pages_free; /* of its pool of evicted tokens; 0: there is none */
    size_t planned_bytes, used_bytes;          /* of this rank: the plan, and how the memory it is about really grew */
};
void engine_counters(struct engine *engine, struct engine_counters *out);

/* engine_progress - the counters of steps and tokens alone, without a look at the device. */
void engine_progress(const struct engine *engine, struct engine_counters *out);

/* engine_finish - waits until this rank's device has done all steps so far. For clocks. */
int engine_finish(struct engine *engine) MUST_CHECK;

#endif
