/* dims_config - the text part of a Hugging Face config, its end tokens, and generation_config.json. Keys that a config
 * omits have the defaults of transformers' LlamaConfig and MistralConfig. */
#include "base/file.h"
#include "base/json.h"
#include "model/dims_internal.h"

#include <stdio.h>
#include <string.h>

enum { MAX_CONFIG = 16 << 20, MAX_PATH = 4096 };

/* Which families there are, by model_type; `text` rows may also stand in a llava's text_config. */
static const struct family_row {
    const char *model_type, *architecture;
    enum model_family family;
    bool is_text;
    int intermediate_size, n_kv_heads, max_position_embeddings, sliding_window; /* defaults; 0: none */
} family_rows[] = {
    {"llama", "LlamaForCausalLM", MODEL_LLAMA, true, 11008, 0, 2048, 0},
    {"mistral", "MistralForCausalLM", MODEL_LLAMA, true, 14336, 8, 131072, 4096},
    {"llava", "LlavaForConditionalGeneration", MODEL_LLAVA, false, 0, 0, 0, 0},
};

static const struct family_row *find_family(const char *model_type)
{
    for (size_t i = 0; i < sizeof family_rows / sizeof *family_rows; i++) {
        if (!strcmp(family_rows[i].model_type, model_type)) return &family_rows[i];
    }
    return NULL;
}

static bool is_null(const cJSON *object, const char *key)
{
    return cJSON_IsNull(cJSON_GetObjectItemCaseSensitive(object, key));
}

static int get_int(const cJSON *object, const char *what, const char *key, int min, int max, int *out)
{
    int64_t v = *out;
    TRY(json_int(object, what, key, min, max, &v));
    *out = (int)v;
    return OK;
}

/* The architecture that a config must name, if it names one. */
static int check_architecture(const cJSON *config, const char *what, const struct family_row *row,
                              struct model_dims *out)
{
    const cJSON *list = json_get(config, "architectures");
    const char *name =
        cJSON_IsArray(list) && cJSON_IsString(list->child) ? list->child->valuestring : row->architecture;
    if (strcmp(name, row->architecture))
        FAIL(ERR_UNSUPPORTED, "%s: architectures names \"%.100s\"; for model_type \"%s\", %s is served", what, name,
             row->model_type, row->architecture);
    snprintf(out->architecture, sizeof out->architecture, "%s", name);
    return OK;
}

static int read_dtype(const cJSON *config, const cJSON *text, const char *what, enum dtype *out)
{
    static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16};
    const char *name = "float32";
    TRY(json_string(text, what, "torch_dtype", &name));
    TRY(json_string(text, what, "dtype", &name));
    TRY(json_string(config, what, "torch_dtype", &name));
    TRY(json_string(config, what, "dtype", &name));
    for (int i = 0; i < 3; i++) {
        if (strcmp(name, dtype_name(dtypes[i]))) continue;
        *out = dtypes[i];
        return OK;
    }
    FAIL(ERR_UNSUPPORTED, "%s: torch_dtype \"%.40s\"; float32, float16 and bfloat16 are served", what, name);
}

/* rope_scaling {type or rope_type, ...} as before transformers 5, or rope_parameters, which also holds rope_theta. */
static int read_rope(const cJSON *text, const char *what, int max_position, struct rope_dims *rope)
{
    const char *type = "default";
    double partial = 1;
    const cJSON *child, *scaling = json_get(text, "rope_scaling");
    if (!scaling) scaling = json_get(text, "rope_parameters");
    if (scaling && !cJSON_IsObject(scaling)) FAIL(ERR_FORMAT, "%s: rope_scaling must be an object", what);
    cJSON_ArrayForEach (child, scaling) {
        if (cJSON_IsObject(child))
            FAIL(ERR_UNSUPPORTED, "%s: rope_parameters differ by layer (\"%.40s\"), which is not served", what,
                 child->string);
    }
    rope->theta = 10000;
    TRY(json_double(text, what, "rope_theta", 1, 1e15, &rope->theta));
    TRY(json_double(scaling, what, "rope_theta", 1, 1e15, &rope->theta));
    TRY(json_double(text, what, "partial_rotary_factor", 0, 1, &partial));
    TRY(json_double(scaling, what, "partial_rotary_factor", 0, 1, &partial));
    if (partial != 1) FAIL(ERR_UNSUPPORTED, "%s: partial_rotary_factor is %g; only 1 is served", what, partial);
    TRY(json_string(scaling, what, "type", &type));
    TRY(json_string(scaling, what, "rope_type", &type));
    if (!strcmp(type, "default")) return OK;
    bool is_llama3 = !strcmp(type, "llama3");
    if (!is_llama3 && strcmp(type, "linear"))
        FAIL(ERR_UNSUPPORTED, "%s: rope scaling of type \"%.40s\"; default, linear and llama3 are served", what, type);
    rope->scaling = is_llama3 ? ROPE_SCALING_LLAMA3 : ROPE_SCALING_LINEAR;
    TRY(json_double(scaling, what, "factor", 1, 1e6, &rope->factor));
    if (rope->factor == 0) FAIL(ERR_FORMAT, "%s: rope scaling of type \"%s\" needs a factor", what, type);
    if (!is_llama3) return OK;
    rope->original_max_position = max_position;
    TRY(get_int(scaling, what, "original_max_position_embeddings", 1, DIMS_MAX_POSITION, &rope->original_max_position));
    TRY(json_double(scaling, what, "low_freq_factor", 1e-3, 1e6, &rope->low_freq_factor));
    TRY(json_double(scaling, what, "high_freq_factor", 1e-3, 1e6, &rope->high_freq_factor));
    if (rope->low_freq_factor == 0 || rope->high_freq_factor <= rope->low_freq_factor)
        FAIL(ERR_FORMAT, "%s: rope scaling llama3 needs low_freq_factor below high_freq_factor, found %g and %g", what,
             rope->low_freq_factor, rope->high_freq_factor);
    return OK;
}

static int read_heads(const cJSON *text, const char *what, const struct family_row *row, struct model_dims *out)
{
    out->n_heads = 32;
    TRY(get_int(text, what, "num_attention_heads", 1, DIMS_MAX_HEADS, &out->n_heads));
    out->n_kv_heads = row->n_kv_heads && !is_null(text, "num_key_value_heads") ? row->n_kv_heads : out->n_heads;
    TRY(get_int(text, what, "num_key_value_heads", 1, DIMS_MAX_HEADS, &out->n_kv_heads));
    TRY(get_int(text, what, "head_dim", 1, MODEL_MAX_HEAD_DIM, &out->head_dim));
    if (out->head_dim) return OK;
    out->head_dim = out->hidden_size / out->n_heads;
    if (out->hidden_size % out->n_heads || out->head_dim > MODEL_MAX_HEAD_DIM)
        FAIL(ERR_FORMAT, "%s: hidden_size %d over %d heads gives no head_dim between 1 and %d", what, out->hidden_size,
             out->n_heads, MODEL_MAX_HEAD_DIM);
    return OK;
}

/* Attention over a window that never fills is attention over everything. */
static int check_window(const cJSON *text, const char *what, const struct family_row *row, const struct model_dims *d)
{
    int window = is_null(text, "sliding_window") ? 0 : row->sliding_window;
    if (!row->sliding_window) return OK;
    TRY(get_int(text, what, "sliding_window", 1, INT32_MAX, &window));
    if (window && window < d->max_position_embeddings)
        FAIL(ERR_UNSUPPORTED, "%s: sliding_window of %d below max_position_embeddings %d is not served", what, window,
             d->max_position_embeddings);
    return OK;
}

static int read_text(const cJSON *text, const char *what, const struct family_row *row, struct model_dims *out)
{
    const char *act = "silu";
    bool attention_bias = false;
    out->vocab_size = 32000;
    out->hidden_size = 4096;
    out->intermediate_size = row->intermediate_size;
    out->n_layers = 32;
    out->max_position_embeddings = row->max_position_embeddings;
    out->rms_norm_eps = 1e-6;
    TRY(get_int(text, what, "vocab_size", 1, DIMS_MAX_VOCAB, &out->vocab_size));
    TRY(get_int(text, what, "hidden_size", 1, DIMS_MAX_HIDDEN, &out->hidden_size));
    TRY(get_int(text, what, "intermediate_size", 1, DIMS_MAX_INTERMEDIATE, &out->intermediate_size));
    TRY(get_int(text, what, "num_hidden_layers", 1, DIMS_MAX_LAYERS, &out->n_layers));
    TRY(get_int(text, what, "max_position_embeddings", 1, DIMS_MAX_POSITION, &out->max_position_embeddings));
    TRY(json_double(text, what, "rms_norm_eps", 0, 1, &out->rms_norm_eps));
    TRY(json_string(text, what, "hidden_act", &act));
    if (strcmp(act, "silu") && strcmp(act, "swish"))
        FAIL(ERR_UNSUPPORTED, "%s: hidden_act \"%.40s\"; silu is served", what, act);
    if (!row->sliding_window) { /* mistral has neither key */
        TRY(json_bool(text, what, "attention_bias", &attention_bias));
        TRY(json_bool(text, what, "mlp_bias", &out->mlp_bias));
    }
    out->qkv_bias = out->o_bias = attention_bias;
    TRY(json_bool(text, what, "tie_word_embeddings", &out->tie_word_embeddings));
    TRY(read_heads(text, what, row, out));
    TRY(check_window(text, what, row, out));
    TRY(read_rope(text, what, out->max_position_embeddings, &out->rope));
    return dims__check(out, what);
}

/* One id or a list; -1 and null are none. */
static int read_eos(const cJSON *config, const char *what, struct model_dims *out)
{
    const cJSON *item, *eos = json_get(config, "eos_token_id");
    int64_t id = -1;
    if (!cJSON_IsArray(eos)) {
        TRY(json_int(config, what, "eos_token_id", -1, INT32_MAX, &id));
        return id < 0 ? OK : dims__add_eos(out, what, id);
    }
    cJSON_ArrayForEach (item, eos) {
        if (!cJSON_IsNumber(item) || item->valuedouble != (double)item->valueint)
            FAIL(ERR_FORMAT, "%s: eos_token_id must be a token id or a list of token ids", what);
        TRY(dims__add_eos(out, what, item->valueint));
    }
    return OK;
}

/* Special tokens of the config; the innermost object is read first, so the outer one wins. */
static int read_special(const cJSON *config, const cJSON *text, const char *what, struct model_dims *out)
{
    out->bos_token_id = is_null(text, "bos_token_id") ? -1 : 1;
    TRY(get_int(text, what, "bos_token_id", -1, INT32_MAX, &out->bos_token_id));
    TRY(get_int(text, what, "pad_token_id", -1, INT32_MAX, &out->pad_token_id));
    TRY(get_int(config, what, "bos_token_id", -1, INT32_MAX, &out->bos_token_id));
    TRY(get_int(config, what, "pad_token_id", -1, INT32_MAX, &out->pad_token_id));
    if (out->bos_token_id >= out->vocab_size)
        FAIL(ERR_FORMAT, "%s: bos_token_id %d is no token of a vocabulary of %d", what, out->bos_token_id,
             out->vocab_size);
    TRY(read_eos(config, what, out));
    if (text != config) TRY(read_eos(text, what, out));
    bool named = cJSON_HasObjectItem(text, "eos_token_id") || cJSON_HasObjectItem(config, "eos_token_id");
    if (!named && out->n_eos_ids == 0 && out->vocab_size > 2) TRY(dims__add_eos(out, what, 2));
    return OK;
}

static int read_generation(const char *directory, struct model_dims *out)
{
    char path[MAX_PATH];
    struct sampling_defaults *s = &out->sampling;
    cJSON *json = NULL;
    TRY(path_join(path, sizeof path, directory, "generation_config.json"));
    if (!file_exists(path)) return OK;
    TRY(json_parse_file(path, MAX_CONFIG, &json));
    int rc = read_eos(json, path, out);
    if (!rc) rc = json_bool(json, path, "do_sample", &s->do_sample);
    if (!rc) rc = json_double(json, path, "temperature", 0, 100, &s->temperature);
    if (!rc) rc = get_int(json, path, "top_k", 0, INT32_MAX, &s->top_k);
    if (!rc) rc = json_double(json, path, "top_p", 0, 1, &s->top_p);
    if (!rc) rc = json_double(json, path, "repetition_penalty", 1e-3, 1000, &s->repetition_penalty);
    if (!rc) rc = get_int(json, path, "max_new_tokens", 1, INT32_MAX, &s->max_new_tokens);
    s->has_do_sample = json_get(json, "do_sample") != NULL;
    s->has_temperature = json_get(json, "temperature") != NULL;
    s->has_top_k = json_get(json, "top_k") != NULL;
    s->has_top_p = json_get(json, "top_p") != NULL;
    s->has_repetition_penalty = json_get(json, "repetition_penalty") != NULL;
    s->has_max_new_tokens = json_get(json, "max_new_tokens") != NULL;
    cJSON_Delete(json);
    return rc;
}

static int read_config(const cJSON *config, const char *path, const char *directory, struct model_dims *out)
{
    const char *model_type = "none", *text_type = "llama";
    const cJSON *text = config;
    char what[MAX_PATH + 32];
    if (!cJSON_IsObject(config)) FAIL(ERR_FORMAT, "%s: must be a JSON object", path);
    TRY(json_string(config, path, "model_type", &model_type));
    const struct family_row *row = find_family(model_type), *text_row = row;
    if (!row)
        FAIL(ERR_UNSUPPORTED, "%s: model_type \"%.100s\"; llama, mistral without sliding window, and llava are served",
             path, model_type);
    if (json_get(config, "quantization_config"))
        FAIL(ERR_UNSUPPORTED, "%s: quantization_config: quantised weights are served from GGUF files only", path);
    out->family = row->family;
    TRY(check_architecture(config, path, row, out));
    snprintf(what, sizeof what, "%s", path);
    if (row->family == MODEL_LLAVA) {
        text = json_get(config, "text_config");
        snprintf(what, sizeof what, "%s: text_config", path);
        TRY(json_string(text, what, "model_type", &text_type));
        text_row = find_family(text_type);
        if (!text_row || !text_row->is_text)
            FAIL(ERR_UNSUPPORTED, "%s: model_type \"%.100s\"; llama and mistral without sliding window are served",
                 what, text_type);
    }
    TRY(read_text(text, what, text_row, out));
    TRY(read_dtype(config, text, path, &out->dtype));
    if (row->family == MODEL_LLAVA) {
        bool tied = false; /* either place may say so */
        TRY(json_bool(config, path, "tie_word_embeddings", &tied));
        out->tie_word_embeddings |= tied;
        TRY(dims__load_vision(config, path, out));
    }
    TRY(read_generation(directory, out));
    return read_special(config, text, path, out);
}

int dims__load_config(const char *directory, struct model_dims *out)
{
    char path[MAX_PATH];
    cJSON *config = NULL;
    TRY(path_join(path, sizeof path, directory, "config.json"));
    TRY(json_parse_file(path, MAX_CONFIG, &config));
    int rc = read_config(config, path, directory, out);
    cJSON_Delete(config);
    return rc;
}
