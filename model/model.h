/* model - one rank's model, ready to run: weights, activations, the forward pass of prompts and of decode steps.
 *
 * It knows nothing of requests or scheduling: a call gets the rows of one step and leaves sampled tokens in the
 * sampling state. The KV cache is handed in as a view and a policy as its table. All functions that run are collective.
 */
#ifndef VITRAIL_MODEL_MODEL_H
#define VITRAIL_MODEL_MODEL_H

#include "base/arena.h"
#include "kernels/ops.h"
#include "kvcache/policy.h"
#include "model/checkpoint.h"
#include "model/dims.h"
#include "model/weights.h"
#include "parallel/comm.h"

struct model;

struct model_options {
    int max_tokens;          /* prompt tokens of one step */
    int max_seqs;            /* sequences of one step */
    int max_context;         /* tokens of one sequence */
    int max_images;          /* images of one step */
    bool aged;               /* lanes may be stored in two parts */
    enum dtype weight_dtype; /* of matrices; DTYPE_N: as in the checkpoint */
    float pixel_scale[3], pixel_shift[3];
};

/* One step's prompt rows. */
struct prefill {
    const int32_t *ids;      /* [n_tokens] host */
    const int32_t *position; /* [n_tokens] host */
    int n_seqs, n_tokens;
    const int32_t *slot;       /* [n_seqs] host */
    const int32_t *cu_seqlens; /* [n_seqs + 1] host */
    int n_images;
    const uint8_t *pixels;    /* [n_images, size, size, 3] host */
    const int32_t *image_row; /* [n_images] host: first row of the step that image i's features replace */
    const bool *ends;         /* [n_seqs] this chunk ends its prompt: sample a token, let the policy compress */
    const struct policy_sequence *sequence; /* [n_seqs]; read where ends, `continues` of all */
    int *kept; /* [n_seqs, n_layers] out, host: tokens kept in each lane of a layer; written where ends */
};

/* model_open - builds the shard plan of this rank; no device memory yet. Keeps dims, ops and comm. */
int model_open(const struct model_dims *dims, const struct model_options *options, struct ops *ops, struct comm *comm,
               struct model **out) MUST_CHECK;
void model_close(struct model *model);

const struct weights *model_weights(const struct model *model);

/* model_layers - [n_layers] this rank's part of each layer, for the policy and the KV cache. model_lanes - lanes of a
 * slot. model_inverse_frequency - of the rotation, [head_dim / 2] device, once placed. */
const struct policy_layer *model_layers(const struct model *model);
int model_lanes(const struct model *model);
const float *model_inverse_frequency(const struct model *model);

/* model_limits - what ops_reserve needs. model_reduce_bytes - the largest all-reduce, for comm_reserve. */
struct ops_limits model_limits(const struct model *model);
size_t model_reduce_bytes(const struct model *model);

/* model_place - takes weights and activations from the arena, or measures them. checkpoint may be NULL (dummy weights).
 */
int model_place(struct model *model, struct arena *arena, const struct checkpoint *checkpoint) MUST_CHECK;

/* model_load - weights from the checkpoint, or random ones (checkpoint NULL, seed); then constant tables. */
int model_load(struct model *model, struct checkpoint *checkpoint, uint64_t seed,
               const struct load_progress *progress) MUST_CHECK;

/* model_prefill - runs prompt rows through the model: appends K and V to the lanes, lets the policy observe, samples
 * one token for each sequence that ends, compresses its lanes. */
int model_prefill(struct model *model, const struct prefill *in, const struct kv_view *kv, struct policy *policy,
                  const struct sampling_state *sampling) MUST_CHECK;

/* model_decode - one token for each of n slots (host [n]) from their next_token; samples the following one. Slot -1:
 * padding, which changes neither lanes nor pages nor sampling state. */
int model_decode(struct model *model, const int32_t *slot, int n, const struct kv_view *kv, struct policy *policy,
                 const struct sampling_state *sampling) MUST_CHECK;

/* model_warm - what a first use costs, before the first request: on a backend that captures steps every decode step's
 * size is run and recorded with rows of padding alone, and a full chunk's matrix products are run once; waits for it.
 * Elsewhere nothing. Needs loaded weights and a reset cache, leaves no trace in cache and sampling state. Again after
 * ops_forget_steps, should the step's ops change. *n_buckets: steps recorded. Collective. */
int model_warm(struct model *model, const struct kv_view *kv, struct policy *policy,
               const struct sampling_state *sampling, int *n_buckets) MUST_CHECK;

/* model_begin_sequence - uploads the prompt's ids for penalties and sets a slot's sampling state. */
int model_begin_sequence(struct model *model, int slot, const int32_t *ids, int n, const struct sampling_params *params,
                         const struct sampling_state *sampling) MUST_CHECK;

/* model_watch_logits - for tests against a reference: `watch` sees each call's logits [rows, vocab] float32, device,
 * before sampling: a prompt's row in the order of the prompts that end, then a row a decoding slot. NULL: nobody. */
void model_watch_logits(struct model *model, void (*watch)(void *arg, struct tensor logits), void *arg);

/* model_vision_seconds - time spent in the vision tower since the open, as the host saw it. */
double model_vision_seconds(const struct model *model);

#endif
