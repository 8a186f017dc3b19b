/* gguf_llama - what the llama architecture means by its tensors: Hugging Face's names for GGUF's, and the row order of
 * q and k. Its hyperparameters are read by model/dims_gguf.c, its vocabulary by model/gguf_vocab.c. */
#ifndef VITRAIL_MODEL_GGUF_LLAMA_H
#define VITRAIL_MODEL_GGUF_LLAMA_H

#include <stdint.h>

#include "base/status.h"
#include "model/gguf.h"

enum { GGUF_LLAMA_MAX_NAME = 1200 };

/* gguf_llama_check - the file is of the llama architecture, without experts; else ERR_UNSUPPORTED naming what it is. */
int gguf_llama_check(const struct gguf *g) MUST_CHECK;

/* gguf_llama_name - Hugging Face's name of a tensor ("blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight")
 * into out; a name that has none is copied as it is. */
void gguf_llama_name(const char *name, char out[GGUF_LLAMA_MAX_NAME]);

/* GGUF stores the rows of q and k, head by head, with the two members of a rotary pair side by side: file row 2 j + s
 * of a head is row s * head_dim / 2 + j of Hugging Face's rotate-half layout. */

/* gguf_llama_permuted_heads - the number of heads whose rows are stored so in this tensor, 0 if none are.
 * Errors: ERR_FORMAT if the rows do not divide by the head count of the metadata. */
int gguf_llama_permuted_heads(const struct gguf *g, const struct gguf_tensor *t, int *n_heads) MUST_CHECK;

/* gguf_llama_row - Hugging Face's row that stands at file row `row` of a permuted tensor. */
int64_t gguf_llama_row(int64_t row, int64_t head_dim);

#endif
