/* weights - one rank's share of a model's parameters: which tensors, which rows and columns of them, where they lie.
 *
 * One table states every parameter once: checkpoint name, whole shape, this rank's part, destination. Checking a
 * checkpoint, measuring, placing, reading and filling with random numbers are loops over that table, so they
 * cannot disagree. Column-parallel weights are fused (q, k, v; gate, up) by placing their rows one below the other. */
#ifndef VITRAIL_MODEL_WEIGHTS_H
#define VITRAIL_MODEL_WEIGHTS_H

#include "base/arena.h"
#include "kernels/ops.h"
#include "model/checkpoint.h"
#include "model/dims.h"
#include "parallel/shard.h"

/* Sizes in this rank's terms. Matrices are [out, in], row-major, of the weight dtype; vectors are float32. NULL:
 * absent. */
struct decoder_layer {
    struct attention_heads heads; /* this rank's; heads.lane counts lanes of the layers before */
    int first_kv_head;            /* which of all ranks' KV heads its first one is */
    bool counted;                 /* false on all but the lowest replica: its o_proj part is not added */
    int n_columns;                /* f: this rank's MLP columns, may be 0 */
    struct tensor qkv;            /* [(n_heads + 2 n_kv_heads) head_dim, hidden]: q rows, k rows, v rows */
    struct tensor o;              /* [hidden, n_heads head_dim] */
    struct tensor gate_up;        /* [2 f, hidden]: gate rows, up rows */
    struct tensor down;           /* [hidden, f] */
    struct tensor input_norm, post_norm, qkv_bias, o_bias, gate_up_bias, down_bias;
};

struct vision_layer {
    struct tensor norm1, norm1_bias, qkv, qkv_bias, out, out_bias, norm2, norm2_bias, fc1, fc1_bias, fc2, fc2_bias;
};

struct weights {
    struct tensor embed;   /* [vocabulary rows of this rank, hidden] */
    struct tensor lm_head; /* the same memory if tied */
    struct tensor norm;    /* [hidden] */
    struct decoder_layer *layers;
    int n_layers, lanes; /* lanes: KV heads of this rank over all layers */
    struct shard_range vocab;
    /* vision tower and projector, whole on every rank */
    struct tensor class_embedding, position_embedding; /* [1, h], [patches + 1, h] of the activation dtype */
    struct tensor patch_embedding;                     /* [h, 3 patch^2] */
    struct tensor pre_norm, pre_norm_bias, linear_1, linear_1_bias, linear_2, linear_2_bias;
    struct vision_layer *vision_layers;
    int n_vision_layers; /* that are run */
    struct weights_table *table;
};

/* weights_open - builds the table for rank `rank` of `tp_size`. Host memory only. weights_close frees it. */
int weights_open(const struct model_dims *dims, int tp_size, int rank, struct weights *w) MUST_CHECK;
void weights_close(struct weights *w);

/* weights_check - holds the table against a checkpoint. Error: ERR_FORMAT with ALL missing, misshapen and unexpected
 * tensors (as many as a message holds, and the number of the rest). */
int weights_check(const struct weights *w, const struct checkpoint *checkpoint) MUST_CHECK;

/* weights_place - takes memory for every parameter (or measures). dtype: of the matrices; DTYPE_N keeps the file's own
 * (checkpoint NULL: the config's); vectors are float32, embeddings of the vision tower `activation`. */
int weights_place(struct weights *w, struct arena *arena, const struct checkpoint *checkpoint, enum dtype dtype,
                  enum dtype activation) MUST_CHECK;

/* weights_step_bytes - matrices that every decode step reads once: all layers and the head. weights_layer_elements -
 * those of the layers alone, which every prompt token passes. */
size_t weights_step_bytes(const struct weights *w);
int64_t weights_layer_elements(const struct weights *w);

/* What a load reports as it goes; called a few times a second. */
struct load_progress {
    void *arg;
    void (*report)(void *arg, size_t bytes_done, size_t bytes_total);
};

/* weights_load - reads this rank's parts of the checkpoint into place through a bounce buffer. */
int weights_load(struct weights *w, struct ops *ops, struct checkpoint *checkpoint,
                 const struct load_progress *progress) MUST_CHECK;

/* weights_fill - random parameters as at initialisation: matrices normal(0, 0.02), norms 1, biases 0; a value depends
 * on (seed, name, row, column) alone, so all ranks together hold the same model for any number of ranks. */
int weights_fill(struct weights *w, struct ops *ops, uint64_t seed, const struct load_progress *progress) MUST_CHECK;

#endif
