/* tensor_parallel - the only places where the model's data crosses ranks: embedding, row-parallel linear, head, image
 * features. Everything in model/decoder.c and model/vision.c calls these and never a communicator. */
#ifndef VITRAIL_MODEL_TENSOR_PARALLEL_H
#define VITRAIL_MODEL_TENSOR_PARALLEL_H

#include "kernels/ops.h"
#include "model/weights.h"
#include "parallel/comm.h"

struct tensor_parallel {
    struct ops *ops;
    struct comm *comm;
    int32_t *vocab_count; /* [ranks] vocabulary rows of each rank, host */
    int vocab_widest;
};

/* tensor_parallel_open - notes the shards of the vocabulary; _close frees them. */
int tensor_parallel_open(struct tensor_parallel *tp, struct ops *ops, struct comm *comm, int vocab_size) MUST_CHECK;
void tensor_parallel_close(struct tensor_parallel *tp);

/* tp_embed - x [n, hidden] = embeddings of ids [n] (device): each rank fills the rows it owns, one all-reduce. Exact:
 * one rank contributes, the others add zeros. */
int tp_embed(struct tensor_parallel *tp, struct tensor x, const struct weights *w, const int32_t *ids) MUST_CHECK;

/* tp_row_add_norm - partial = x w^T (+ bias on rank 0; zeros where this rank has nothing to add), summed over ranks;
 * residual += sum; y = rms_norm(residual) * norm. One fused call where the communicator has it.
 *   x [n, in of this rank], partial, residual, y [n, hidden] */
int tp_row_add_norm(struct tensor_parallel *tp, struct tensor y, struct tensor residual, struct tensor partial,
                    struct tensor x, struct tensor w, struct tensor bias, bool counted, struct tensor norm,
                    float eps) MUST_CHECK;

/* tp_lm_head - logits [n, vocab] float32 on every rank from x [n, hidden]. local [n, widest shard] and gathered
 * [ranks * n, widest] are float32 buffers. */
int tp_lm_head(struct tensor_parallel *tp, struct tensor logits, struct tensor local, struct tensor gathered,
               struct tensor x, struct tensor w) MUST_CHECK;

/* tp_gather_features - every rank's image features to all: out [ranks * share, rows of an image, hidden] flattened to
 * rows, from mine [share * rows, hidden], where share is the largest number of images on a rank. */
int tp_gather_features(struct tensor_parallel *tp, struct tensor out, struct tensor mine) MUST_CHECK;

#endif
