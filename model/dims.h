/* dims - the architecture of a model as plain data: everything that decides shapes, and nothing about ranks.
 *
 * Filled once from config.json (+ generation_config.json) or from the metadata of a GGUF file, range-checked there, and
 * read by everyone. What a config omits has the default that transformers gives it. What this build does not
 * compute (another activation, a sliding window, experts ...) is refused here by name, so no later code asks. */
#ifndef VITRAIL_MODEL_DIMS_H
#define VITRAIL_MODEL_DIMS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "base/tensor.h"
#include "kernels/ops.h" /* enum activation */

enum { MODEL_MAX_HEAD_DIM = 512, MODEL_MAX_EOS_IDS = 16 };

enum model_family { MODEL_LLAMA, MODEL_LLAVA, MODEL_FAMILY_N };
enum rope_scaling {
    ROPE_SCALING_NONE,
    ROPE_SCALING_LINEAR, /* every frequency / factor */
    ROPE_SCALING_LLAMA3, /* low frequencies / factor, a ramp between low_ and high_freq_factor */
    ROPE_SCALING_TABLE,  /* frequency i / table[i]: rope_freqs.weight of a GGUF file */
    ROPE_SCALING_N
};

struct rope_dims {
    double theta;
    enum rope_scaling scaling;
    double factor, low_freq_factor, high_freq_factor; /* factor: LINEAR and LLAMA3; the others LLAMA3 */
    int original_max_position;                        /* LLAMA3 */
    float table[MODEL_MAX_HEAD_DIM / 2];              /* TABLE: [head_dim / 2] divisors */
};

/* CLIP tower and projector; all zero unless family is MODEL_LLAVA. */
struct vision_dims {
    int image_size, patch_size; /* pixels, both square */
    int n_patches;              /* (image_size / patch_size)^2; the tower also has one class token */
    int hidden_size, intermediate_size, n_layers, n_heads, head_dim;
    enum activation hidden_act; /* QUICK_GELU, GELU or GELU_TANH */
    double layer_norm_eps;
    int n_run_layers;   /* encoder layers to run: vision_feature_layer resolved; 0 takes the embeddings */
    bool select_full;   /* vision_feature_select_strategy: full keeps the class token, default drops it */
    int n_image_tokens; /* features, and so prompt tokens, an image: n_patches (+ 1 if select_full) */
    int image_token_id;
    int image_seq_length;          /* as the config has it; informative, n_image_tokens is what counts */
    enum activation projector_act; /* GELU, GELU_TANH, QUICK_GELU or SILU */
    bool projector_bias;
};

/* generation_config.json; a value counts only if its has_ flag is set. */
struct sampling_defaults {
    bool has_do_sample, has_temperature, has_top_k, has_top_p, has_max_new_tokens, has_repetition_penalty;
    bool do_sample;
    double temperature, top_p, repetition_penalty;
    int top_k, max_new_tokens;
};

struct model_dims {
    enum model_family family;
    char architecture[64]; /* for people: "LlavaForConditionalGeneration", "llama (GGUF)" */
    enum dtype dtype;      /* of the checkpoint as the config states it: F32, F16, BF16 (quantised GGUF: F16) */

    int vocab_size, hidden_size, intermediate_size, n_layers; /* n_heads and so on are of the whole model */
    int n_heads, n_kv_heads, head_dim;                        /* n_heads is a multiple of n_kv_heads */
    int max_position_embeddings;
    double rms_norm_eps;
    struct rope_dims rope;
    bool qkv_bias, o_bias, mlp_bias;
    bool tie_word_embeddings;       /* lm_head is embed_tokens */
    int bos_token_id, pad_token_id; /* -1: none */
    int n_eos_ids;
    int eos_ids[MODEL_MAX_EOS_IDS]; /* generation_config's first, then config's; no repeats */

    struct vision_dims vision;
    struct sampling_defaults sampling;
};

/* model_dims_load - reads the dims of a model: a directory with config.json, or a .gguf file.
 * Errors: ERR_IO; ERR_FORMAT naming file and key; ERR_UNSUPPORTED naming what was found and what is served. */
int model_dims_load(const char *model_path, struct model_dims *out) MUST_CHECK;

/* model_dims_is_gguf - true if the path is to be read as a GGUF file (its name ends in .gguf). */
bool model_dims_is_gguf(const char *model_path);

/* model_dims_hash - the same number on two ranks exactly if they loaded the same dims. */
uint64_t model_dims_hash(const struct model_dims *dims);

/* model_dims_rope_frequencies - inverse frequencies of RoPE, scaling applied: out [head_dim / 2] float, radians a
 * position. Rounded step by step in float as transformers does, so that angles agree at long positions. */
void model_dims_rope_frequencies(const struct model_dims *dims, float *out);

#endif
