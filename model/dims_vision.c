/* dims_vision - the CLIP tower and the projector of a llava config. A vision_config that is given has the defaults of
 * CLIPVisionConfig; one that is absent is the tower of LLaVA-1.5, as in transformers. */
#include <stdio.h>
#include <string.h>

#include "base/json.h"
#include "model/dims_internal.h"

static int get_int(const cJSON *object, const char *what, const char *key, int min, int max, int *out)
{
    int64_t v = *out;
    TRY(json_int(object, what, key, min, max, &v));
    *out = (int)v;
    return OK;
}

static int get_activation(const cJSON *object, const char *what, const char *key, bool tower, enum activation *out)
{
    static const struct {
        const char *name;
        enum activation act;
    } rows[] = {{"quick_gelu", ACTIVATION_QUICK_GELU},
                {"gelu", ACTIVATION_GELU},
                {"gelu_pytorch_tanh", ACTIVATION_GELU_TANH},
                {"silu", ACTIVATION_SILU}};
    const char *name = tower ? "quick_gelu" : "gelu";
    TRY(json_string(object, what, key, &name));
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        *out = rows[i].act;
        if (!strcmp(rows[i].name, name) && !(tower && rows[i].act == ACTIVATION_SILU)) return OK;
    }
    FAIL(ERR_UNSUPPORTED, "%s: %s \"%.40s\"; quick_gelu, gelu and gelu_pytorch_tanh%s are served", what, key, name,
         tower ? "" : " and silu");
}

static int read_tower(const cJSON *config, const char *path, struct vision_dims *v)
{
    const cJSON *tower = json_get(config, "vision_config");
    const char *model_type = "clip_vision_model", *what = path;
    int n_channels = 3;
    *v = tower ? (struct vision_dims){.hidden_size = 768,
                                      .intermediate_size = 3072,
                                      .n_layers = 12,
                                      .n_heads = 12,
                                      .image_size = 224,
                                      .patch_size = 32}
               : (struct vision_dims){.hidden_size = 1024,
                                      .intermediate_size = 4096,
                                      .n_layers = 24,
                                      .n_heads = 16,
                                      .image_size = 336,
                                      .patch_size = 14};
    v->layer_norm_eps = 1e-5;
    TRY(json_string(tower, what, "model_type", &model_type));
    if (strcmp(model_type, "clip_vision_model"))
        FAIL(ERR_UNSUPPORTED, "%s: model_type \"%.100s\"; clip_vision_model is served", what, model_type);
    TRY(get_int(tower, what, "image_size", 1, DIMS_MAX_IMAGE, &v->image_size));
    TRY(get_int(tower, what, "patch_size", 1, DIMS_MAX_IMAGE, &v->patch_size));
    TRY(get_int(tower, what, "hidden_size", 1, DIMS_MAX_HIDDEN, &v->hidden_size));
    TRY(get_int(tower, what, "intermediate_size", 1, DIMS_MAX_INTERMEDIATE, &v->intermediate_size));
    TRY(get_int(tower, what, "num_hidden_layers", 1, DIMS_MAX_LAYERS, &v->n_layers));
    TRY(get_int(tower, what, "num_attention_heads", 1, DIMS_MAX_HEADS, &v->n_heads));
    TRY(get_int(tower, what, "num_channels", 1, 1024, &n_channels));
    TRY(json_double(tower, what, "layer_norm_eps", 0, 1, &v->layer_norm_eps));
    TRY(get_activation(tower, what, "hidden_act", true, &v->hidden_act));
    if (n_channels != 3) FAIL(ERR_UNSUPPORTED, "%s: num_channels is %d; 3 is served", what, n_channels);
    if (v->patch_size > v->image_size)
        FAIL(ERR_FORMAT, "%s: patch_size %d is larger than image_size %d", what, v->patch_size, v->image_size);
    if (v->hidden_size % v->n_heads || v->hidden_size / v->n_heads > MODEL_MAX_HEAD_DIM)
        FAIL(ERR_FORMAT, "%s: hidden_size %d over %d heads gives no head size between 1 and %d", what, v->hidden_size,
             v->n_heads, MODEL_MAX_HEAD_DIM);
    v->head_dim = v->hidden_size / v->n_heads;
    v->n_patches = (v->image_size / v->patch_size) * (v->image_size / v->patch_size);
    return OK;
}

/* vision_feature_layer counts hidden states: 0 the embeddings, i the output of layer i, negative ones from the end. */
static int read_feature(const cJSON *config, const char *what, struct vision_dims *v)
{
    int layer = -2;
    const char *strategy = "default";
    if (cJSON_IsArray(json_get(config, "vision_feature_layer")))
        FAIL(ERR_UNSUPPORTED, "%s: vision_feature_layer is a list; one layer is served", what);
    TRY(get_int(config, what, "vision_feature_layer", -v->n_layers - 1, v->n_layers, &layer));
    v->n_run_layers = layer < 0 ? v->n_layers + 1 + layer : layer;
    TRY(json_string(config, what, "vision_feature_select_strategy", &strategy));
    v->select_full = !strcmp(strategy, "full");
    if (!v->select_full && strcmp(strategy, "default"))
        FAIL(ERR_FORMAT, "%s: vision_feature_select_strategy \"%.40s\"; default and full are served", what, strategy);
    v->n_image_tokens = v->n_patches + (v->select_full ? 1 : 0);
    return OK;
}

int dims__load_vision(const cJSON *config, const char *path, struct model_dims *out)
{
    struct vision_dims *v = &out->vision;
    char what[4160];
    snprintf(what, sizeof what, "%s: vision_config", path);
    TRY(read_tower(config, what, v));
    TRY(read_feature(config, path, v));
    v->image_token_id = 32000;
    v->image_seq_length = 576;
    v->projector_bias = true;
    TRY(get_int(config, path, "image_token_id", 0, INT32_MAX, &v->image_token_id));
    TRY(get_int(config, path, "image_token_index", 0, INT32_MAX, &v->image_token_id));
    TRY(get_int(config, path, "image_seq_length", 0, INT32_MAX, &v->image_seq_length));
    TRY(get_activation(config, path, "projector_hidden_act", false, &v->projector_act));
    TRY(json_bool(config, path, "multimodal_projector_bias", &v->projector_bias));
    if (v->image_token_id >= out->vocab_size)
        FAIL(ERR_FORMAT, "%s: image_token_index %d is no token of a vocabulary of %d", path, v->image_token_id,
             out->vocab_size);
    return OK;
}
