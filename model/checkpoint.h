/* checkpoint - the tensors of a model by name, read by ranges of rows and columns with pread: a rank reads only its
 * own.
 *
 * One interface over Hugging Face directories (model.safetensors, or shards with model.safetensors.index.json) and
 * GGUF files. It owns descriptors, headers and one bounce buffer; it knows nothing of ranks, layers or devices.
 *
 * Names are canonical, whatever the file has: model.embed_tokens.weight, model.layers.N.self_attn.q_proj.weight,
 * model.norm.weight, lm_head.weight, multi_modal_projector.linear_1.weight, vision_tower.vision_model.<...>. The LLaVA
 * prefixes of transformers before and after 4.52 and GGUF's llama names are translated; the rows of GGUF's q and k
 * come back in Hugging Face's (rotate-half) order.
 *
 * Every tensor is a matrix [rows, cols]: 2-D as it stands; 1-D [n] is rows n, cols 1 (so biases are cut like the rows
 * of their weight); 3-D and 4-D [a, b, ...] is [a, b * ...] (convolutions); a scalar is [1, 1]. Not thread-safe: one
 * thread at a time on one checkpoint. */
#ifndef VITRAIL_MODEL_CHECKPOINT_H
#define VITRAIL_MODEL_CHECKPOINT_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "base/tensor.h"

struct checkpoint;

struct checkpoint_tensor {
    const char *name;        /* canonical; strings live as long as the checkpoint */
    const char *stored_name; /* as the file has it */
    const char *file;        /* path of the file that holds it */
    const char *type_name;   /* "F32", "BF16", "Q4_K", ... */
    bool readable;           /* false: a type that checkpoint_read refuses (integers, fp8, IQ ...) */
    int n_dims;
    int64_t dim[4]; /* outermost first, as in PyTorch, also for GGUF */
    int64_t rows, cols;
};

/* checkpoint_open - reads and checks all headers of a model directory or .gguf file; no tensor data yet.
 * Errors: ERR_IO; ERR_FORMAT naming file and tensor (truncated, overlapping, overflowing, listed twice, index and
 * shards disagree); ERR_UNSUPPORTED for pickle-only directories and other GGUF architectures. */
int checkpoint_open(const char *model_path, struct checkpoint **out) MUST_CHECK;
void checkpoint_close(struct checkpoint *c);

/* checkpoint_find - true if there is a tensor of that canonical name; info may be NULL. */
bool checkpoint_find(const struct checkpoint *c, const char *name, struct checkpoint_tensor *info);

/* The i-th tensor, 0 <= i < checkpoint_count, in order of canonical name. */
int checkpoint_count(const struct checkpoint *c);
void checkpoint_at(const struct checkpoint *c, int i, struct checkpoint_tensor *info);
const char *checkpoint_name(const struct checkpoint *c, int i);

/* checkpoint_name_is_ignored - a canonical name that many files carry and no model needs: position_ids, inv_freq,
 * rope_freqs.weight (model_dims_load reads it), the tower's unused post_layernorm. For "unexpected tensor" reports. */
bool checkpoint_name_is_ignored(const char *name);

/* checkpoint_natural_dtype - the dtype to hold this tensor in: as stored for F32, F16 and BF16, F16 for quantised ones.
 * Errors: ERR_FORMAT no such tensor; ERR_UNSUPPORTED not readable. */
int checkpoint_natural_dtype(const struct checkpoint *c, const char *name, enum dtype *out) MUST_CHECK;

/* checkpoint_read - rows [row_first, row_first + row_count) and columns [col_first, col_first + col_count) into
 * out, dense [row_count, col_count] of out_dtype (F32, F16 or BF16; host memory), rounding to nearest even.
 * Reads only these bytes (quantised columns: their covering blocks; whole rows where the columns leave out
 * less than a ninth). Contiguous ranges that need no conversion go straight into out.
 * Errors: ERR_FORMAT no such tensor or range outside it; ERR_UNSUPPORTED type; ERR_IO. */
int checkpoint_read(struct checkpoint *c, const char *name, int64_t row_first, int64_t row_count, int64_t col_first,
                    int64_t col_count, enum dtype out_dtype, void *out) MUST_CHECK;

/* checkpoint_bytes_read - bytes asked of the files since open, headers included; checkpoint_file_bytes - of all files.
 */
uint64_t checkpoint_bytes_read(const struct checkpoint *c);
uint64_t checkpoint_file_bytes(const struct checkpoint *c);

#endif
