/* dims: configs against what transformers makes of them, GGUF metadata, and refusals that name the key. */
#include "model/dims.h"

#include "base/json.h"
#include "model_files.h"
#include "tests/check.h"

static double number(const cJSON *want, const char *key)
{
    const cJSON *item = json_get(want, key);
    CHECK(cJSON_IsNumber(item));
    return item ? item->valuedouble : -1;
}

static void check_fields(const struct model_dims *d, const cJSON *want)
{
    CHECK(d->vocab_size == number(want, "vocab_size") && d->hidden_size == number(want, "hidden_size"));
    CHECK(d->intermediate_size == number(want, "intermediate_size") && d->n_layers == number(want, "n_layers"));
    CHECK(d->n_heads == number(want, "n_heads") && d->n_kv_heads == number(want, "n_kv_heads"));
    CHECK(d->head_dim == number(want, "head_dim"));
    CHECK(d->max_position_embeddings == number(want, "max_position_embeddings"));
    CHECK(d->rms_norm_eps == number(want, "rms_norm_eps") && d->rope.theta == number(want, "theta"));
    CHECK(d->qkv_bias == number(want, "qkv_bias") && d->o_bias == number(want, "qkv_bias"));
    CHECK(d->mlp_bias == number(want, "mlp_bias"));
    CHECK(d->tie_word_embeddings == number(want, "tie_word_embeddings"));
    CHECK(d->rope.scaling == number(want, "scaling"));
    CHECK((d->family == MODEL_LLAVA) == (json_get(want, "image_size") != NULL));
    if (d->family != MODEL_LLAVA) return;
    const struct vision_dims *v = &d->vision;
    CHECK(v->image_size == number(want, "image_size") && v->patch_size == number(want, "patch_size"));
    CHECK(v->n_patches == number(want, "n_patches") && v->hidden_size == number(want, "vision_hidden"));
    CHECK(v->intermediate_size == number(want, "vision_intermediate"));
    CHECK(v->n_layers == number(want, "vision_layers") && v->n_heads == number(want, "vision_heads"));
    CHECK(v->layer_norm_eps == number(want, "layer_norm_eps") && v->n_run_layers == number(want, "n_run_layers"));
    CHECK(v->n_image_tokens == number(want, "n_image_tokens"));
    CHECK(v->image_token_id == number(want, "image_token_id"));
    CHECK(v->image_seq_length == number(want, "image_seq_length"));
    CHECK(v->projector_bias == number(want, "projector_bias") && v->hidden_act == ACTIVATION_QUICK_GELU);
}

static void check_rope(const struct model_dims *d, const cJSON *want)
{
    float got[MODEL_MAX_HEAD_DIM / 2];
    const cJSON *item;
    int i = 0;
    CHECK(cJSON_GetArraySize(want) == d->head_dim / 2);
    model_dims_rope_frequencies(d, got);
    cJSON_ArrayForEach (item, want) {
        CHECK(fabs((double)got[i] - item->valuedouble) <= 2e-7 * item->valuedouble);
        i++;
    }
}

static void test_transformers(void)
{
    cJSON *cases = NULL, *one;
    struct temp temp = temp_open();
    uint64_t last_hash = 0;
    CHECK_OK(json_parse_file(SOURCE_DIR "/tests/data/checkpoint/dims.json", 1 << 20, &cases));
    cJSON_ArrayForEach (one, cases) {
        struct model_dims d, again;
        char *config = cJSON_Print(json_get(one, "config"));
        temp_text(&temp, "config.json", config);
        free(config);
        temp_remove(&temp, "generation_config.json");
        if (json_get(one, "generation")) {
            char *generation = cJSON_Print(json_get(one, "generation"));
            temp_text(&temp, "generation_config.json", generation);
            free(generation);
        }
        CHECK_OK(model_dims_load(temp.path, &d));
        CHECK_OK(model_dims_load(temp.path, &again));
        check_fields(&d, json_get(one, "want"));
        check_rope(&d, json_get(one, "rope"));
        CHECK(model_dims_hash(&d) == model_dims_hash(&again) && model_dims_hash(&d) != last_hash);
        last_hash = model_dims_hash(&d);
        again.n_kv_heads++;
        CHECK(model_dims_hash(&again) != last_hash);
    }
    cJSON_Delete(cases);
    temp_close(&temp);
}

/* Loads a config given as text. */
static int load(const char *config, const char *generation, struct model_dims *d)
{
    struct temp temp = temp_open();
    temp_text(&temp, "config.json", config);
    if (generation) temp_text(&temp, "generation_config.json", generation);
    int rc = model_dims_load(temp.path, d);
    temp_close(&temp);
    return rc;
}

static void test_eos_and_sampling(void)
{
    struct model_dims d;
    CHECK_OK(load("{\"model_type\":\"llama\",\"eos_token_id\":[5,6]}",
                  "{\"eos_token_id\":[7,5],\"temperature\":0.5,\"top_k\":null,\"do_sample\":true}", &d));
    CHECK(d.n_eos_ids == 3 && d.eos_ids[0] == 7 && d.eos_ids[1] == 5 && d.eos_ids[2] == 6);
    CHECK(d.sampling.has_temperature && d.sampling.temperature == 0.5 && !d.sampling.has_top_k);
    CHECK(d.sampling.has_do_sample && d.sampling.do_sample && !d.sampling.has_top_p && d.bos_token_id == 1);
    CHECK_OK(load("{\"model_type\":\"llama\"}", NULL, &d));
    CHECK(d.n_eos_ids == 1 && d.eos_ids[0] == 2 && d.pad_token_id == -1 && !d.sampling.has_temperature);
    CHECK_OK(
        load("{\"model_type\":\"llama\",\"eos_token_id\":null,\"bos_token_id\":null,\"pad_token_id\":-1}", NULL, &d));
    CHECK(d.n_eos_ids == 0 && d.bos_token_id == -1 && d.pad_token_id == -1);
    CHECK_FAILS(load("{\"model_type\":\"llama\",\"eos_token_id\":[1,2.5]}", NULL, &d), ERR_FORMAT, "eos_token_id");
    CHECK_FAILS(load("{\"model_type\":\"llama\",\"eos_token_id\":32000}", NULL, &d), ERR_FORMAT, "32000");
    CHECK_FAILS(load("{\"model_type\":\"llama\"}", "{\"top_p\":1.5}", &d), ERR_FORMAT, "generation_config.json: top_p");
    char many[200] = "{\"model_type\":\"llama\",\"eos_token_id\":[0";
    for (int i = 1; i <= 16; i++) sprintf(many + strlen(many), ",%d", i);
    CHECK_FAILS(load(strcat(many, "]}"), NULL, &d), ERR_UNSUPPORTED, "16");
}

static void test_refusals(void)
{
    static const struct {
        const char *rest; /* of {"model_type":"llama", */
        int code;
        const char *part;
    } rows[] = {
        {"\"hidden_size\":0", ERR_FORMAT, "hidden_size"},
        {"\"hidden_size\":\"big\"", ERR_FORMAT, "hidden_size"},
        {"\"hidden_size\":1e300", ERR_FORMAT, "hidden_size"},
        {"\"hidden_size\":100", ERR_FORMAT, "head_dim"},
        {"\"num_hidden_layers\":-1", ERR_FORMAT, "num_hidden_layers"},
        {"\"num_hidden_layers\":2.5", ERR_FORMAT, "num_hidden_layers"},
        {"\"num_key_value_heads\":5", ERR_FORMAT, "no multiple of 5"},
        {"\"head_dim\":7", ERR_FORMAT, "head_dim is 7"},
        {"\"rms_norm_eps\":-1", ERR_FORMAT, "rms_norm_eps"},
        {"\"rope_theta\":0", ERR_FORMAT, "rope_theta"},
        {"\"vocab_size\":99999999999", ERR_FORMAT, "vocab_size"},
        {"\"hidden_act\":\"gelu\"", ERR_UNSUPPORTED, "hidden_act \"gelu\""},
        {"\"attention_bias\":1", ERR_FORMAT, "attention_bias"},
        {"\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2}", ERR_UNSUPPORTED, "yarn"},
        {"\"rope_scaling\":{\"type\":\"linear\"}", ERR_FORMAT, "factor"},
        {"\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8}", ERR_FORMAT, "low_freq_factor"},
        {"\"rope_scaling\":[2]", ERR_FORMAT, "rope_scaling"},
        {"\"rope_parameters\":{\"full_attention\":{}}", ERR_UNSUPPORTED, "full_attention"},
        {"\"partial_rotary_factor\":0.5", ERR_UNSUPPORTED, "partial_rotary_factor"},
        {"\"quantization_config\":{}", ERR_UNSUPPORTED, "quantization_config"},
        {"\"architectures\":[\"LlamaForSequenceClassification\"]", ERR_UNSUPPORTED, "LlamaForSequenceClassification"},
        {"\"torch_dtype\":\"float64\"", ERR_UNSUPPORTED, "float64"},
        {"\"vocab_size\":10,\"vocab_size\":11", ERR_FORMAT, "twice"},
    };
    struct model_dims d;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char config[300];
        snprintf(config, sizeof config, "{\"model_type\":\"llama\",%s}", rows[i].rest);
        CHECK_FAILS(load(config, NULL, &d), rows[i].code, rows[i].part);
        CHECK(strstr(status_message(), "config.json") != NULL);
    }
    CHECK_FAILS(load("{\"model_type\":\"qwen2\"}", NULL, &d), ERR_UNSUPPORTED, "qwen2");
    CHECK_FAILS(load("{}", NULL, &d), ERR_UNSUPPORTED, "model_type");
    CHECK_FAILS(load("[]", NULL, &d), ERR_FORMAT, "object");
    CHECK_FAILS(load("{\"model_type\":", NULL, &d), ERR_FORMAT, "config.json");
    CHECK_FAILS(load("{\"model_type\":\"mistral\"}", NULL, &d), ERR_UNSUPPORTED, "sliding_window of 4096");
    CHECK_OK(load("{\"model_type\":\"mistral\",\"sliding_window\":4096,\"max_position_embeddings\":4096}", NULL, &d));
    CHECK(d.n_kv_heads == 8 && d.family == MODEL_LLAMA && !d.qkv_bias);
    CHECK_FAILS(model_dims_load("/nonexistent", &d), ERR_IO, "/nonexistent/config.json");
    CHECK_FAILS(model_dims_load("/nonexistent/x.gguf", &d), ERR_IO, "x.gguf");
}

static void test_llava_refusals(void)
{
    static const struct {
        const char *rest;
        int code;
        const char *part;
    } rows[] = {
        {"\"text_config\":{\"model_type\":\"qwen2\"}", ERR_UNSUPPORTED, "text_config: model_type \"qwen2\""},
        {"\"text_config\":{\"model_type\":\"llava\"}", ERR_UNSUPPORTED, "llava"},
        {"\"text_config\":{\"hidden_size\":-4}", ERR_FORMAT, "text_config: hidden_size"},
        {"\"vision_config\":{\"model_type\":\"siglip_vision_model\"}", ERR_UNSUPPORTED, "siglip_vision_model"},
        {"\"vision_config\":{\"image_size\":[336,336]}", ERR_FORMAT, "vision_config: image_size"},
        {"\"vision_config\":{\"patch_size\":225}", ERR_FORMAT, "patch_size 225"},
        {"\"vision_config\":{\"num_channels\":4}", ERR_UNSUPPORTED, "num_channels"},
        {"\"vision_config\":{\"num_attention_heads\":7}", ERR_FORMAT, "7 heads"},
        {"\"vision_config\":{\"hidden_act\":\"relu\"}", ERR_UNSUPPORTED, "relu"},
        {"\"vision_feature_layer\":[-2,-5]", ERR_UNSUPPORTED, "vision_feature_layer"},
        {"\"vision_feature_layer\":-26", ERR_FORMAT, "vision_feature_layer"},
        {"\"vision_feature_layer\":25", ERR_FORMAT, "vision_feature_layer"},
        {"\"vision_feature_select_strategy\":\"cls\"", ERR_FORMAT, "cls"},
        {"\"projector_hidden_act\":\"relu\"", ERR_UNSUPPORTED, "projector_hidden_act"},
        {"\"image_token_index\":40000", ERR_FORMAT, "image_token_index 40000"},
    };
    struct model_dims d;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char config[300];
        snprintf(config, sizeof config, "{\"model_type\":\"llava\",\"image_token_id\":3,%s}", rows[i].rest);
        CHECK_FAILS(load(config, NULL, &d), rows[i].code, rows[i].part);
        CHECK(strstr(status_message(), "config.json") != NULL);
    }
    CHECK_OK(load("{\"model_type\":\"llava\",\"image_token_id\":3,\"vision_feature_layer\":-1}", NULL, &d));
    CHECK(d.vision.n_run_layers == 24);
    CHECK_OK(load("{\"model_type\":\"llava\",\"image_token_id\":3,\"vision_feature_layer\":-25}", NULL, &d));
    CHECK(d.vision.n_run_layers == 0);
}

static void test_demo(void)
{
    struct model_dims d;
    CHECK_OK(model_dims_load(SOURCE_DIR "/models/demo-vlm", &d));
    CHECK(d.family == MODEL_LLAVA && d.n_layers == 10 && d.n_heads == 8 && d.n_kv_heads == 4 && d.head_dim == 64);
    CHECK(d.dtype == DTYPE_BF16 && d.tie_word_embeddings && d.vision.n_image_tokens == 576);
    CHECK(d.vision.n_run_layers == 6 && d.vision.image_token_id == 3 && d.pad_token_id == 0);
    CHECK(d.sampling.has_do_sample && !d.sampling.do_sample && d.sampling.max_new_tokens == 256);
    CHECK(!strcmp(d.architecture, "LlavaForConditionalGeneration"));
}

/* ---- GGUF ---- */

/* A file of one block of 2 heads of 4; `skip` leaves one key out, `key`/`value` replaces or adds an integer key. */
static struct bytes small_gguf(const char *skip, const char *key, uint32_t value)
{
    static const struct {
        const char *key;
        uint32_t value;
    } ints[] = {{"llama.block_count", 1},           {"llama.context_length", 64},
                {"llama.embedding_length", 8},      {"llama.feed_forward_length", 16},
                {"llama.attention.head_count", 2},  {"tokenizer.ggml.eos_token_id", 2},
                {"tokenizer.ggml.eot_token_id", 4}, {"tokenizer.ggml.padding_token_id", UINT32_MAX}};
    struct bytes b = {0};
    bool replaces = false;
    size_t n = sizeof ints / sizeof *ints;
    for (size_t i = 0; i < n; i++) replaces |= key && !strcmp(ints[i].key, key);
    gguf_begin(&b, 3, 3, n + 2 - (skip ? 1 : 0) + (key && !replaces ? 1 : 0));
    gguf_put_string(&b, "general.architecture", "llama");
    for (size_t i = 0; i < n; i++) {
        bool other = key && !strcmp(ints[i].key, key);
        if (!skip || strcmp(skip, ints[i].key)) gguf_put_u32(&b, ints[i].key, other ? value : ints[i].value);
    }
    if (key && !replaces) gguf_put_u32(&b, key, value);
    if (!skip || strcmp(skip, "llama.attention.layer_norm_rms_epsilon"))
        gguf_put_f32(&b, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    gguf_put_tensor(&b, "token_embd.weight", 8, 10, 1, 0);
    gguf_put_tensor(&b, "rope_freqs.weight", 2, 0, 0, 160);
    gguf_put_tensor(&b, "blk.0.attn_q.bias", 8, 0, 0, 192);
    gguf_align(&b, 32);
    put_zeros(&b, 160);
    put(&b, (float[]){1.0f, 4.0f}, 8);
    put_zeros(&b, 24 + 32);
    return b;
}

static int load_gguf(struct bytes b, struct model_dims *d)
{
    struct temp temp = temp_open();
    temp_write(&temp, "m.gguf", b.data, b.size);
    bytes_free(&b);
    char path[512];
    snprintf(path, sizeof path, "%s", temp_file(&temp, "m.gguf"));
    int rc = model_dims_load(path, d);
    temp_close(&temp);
    return rc;
}

static void test_gguf(void)
{
    struct model_dims d;
    float rope[2];
    CHECK_OK(load_gguf(small_gguf(NULL, NULL, 0), &d));
    CHECK(d.family == MODEL_LLAMA && d.vocab_size == 10 && d.hidden_size == 8 && d.intermediate_size == 16);
    CHECK(d.n_heads == 2 && d.n_kv_heads == 2 && d.head_dim == 4 && d.qkv_bias && !d.o_bias && !d.mlp_bias);
    CHECK(d.tie_word_embeddings && d.n_eos_ids == 2 && d.eos_ids[0] == 2 && d.eos_ids[1] == 4);
    CHECK(d.bos_token_id == -1 && d.pad_token_id == -1 && d.rope.scaling == ROPE_SCALING_TABLE);
    model_dims_rope_frequencies(&d, rope);
    CHECK_CLOSE(rope, ((float[]){1.0f, 0.01f / 4}), 2, 1e-8);
    CHECK_OK(load_gguf(small_gguf(NULL, "llama.attention.head_count_kv", 1), &d));
    CHECK(d.n_kv_heads == 1);
    static const char *const needed[] = {"llama.block_count", "llama.embedding_length", "llama.feed_forward_length",
                                         "llama.attention.head_count", "llama.attention.layer_norm_rms_epsilon"};
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
        CHECK_FAILS(load_gguf(small_gguf(needed[i], NULL, 0), &d), ERR_FORMAT, needed[i]);
    CHECK_FAILS(load_gguf(small_gguf(NULL, "llama.block_count", 0), &d), ERR_FORMAT, "llama.block_count");
    CHECK_FAILS(load_gguf(small_gguf(NULL, "llama.vocab_size", 11), &d), ERR_FORMAT, "llama.vocab_size");
    CHECK_FAILS(load_gguf(small_gguf(NULL, "tokenizer.ggml.eos_token_id", 10), &d), ERR_FORMAT, "eos_token_id");
    CHECK_FAILS(load_gguf(small_gguf(NULL, "llama.rope.dimension_count", 2), &d), ERR_UNSUPPORTED, "rotary");
    CHECK_FAILS(load_gguf(small_gguf(NULL, "llama.attention.value_length", 2), &d), ERR_UNSUPPORTED, "values");
    CHECK_FAILS(load_gguf(small_gguf(NULL, "llama.expert_count", 8), &d), ERR_UNSUPPORTED, "expert");
    CHECK_FAILS(load_gguf(small_gguf(NULL, "llama.attention.head_count_kv", 3), &d), ERR_FORMAT, "multiple of 3");
    CHECK_FAILS(load_gguf(small_gguf(NULL, "general.architecture", 3), &d), ERR_FORMAT, "stands twice");
}

static void test_smollm2(void)
{
    const char *path = SOURCE_DIR "/models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
    struct model_dims d;
    if (access(path, R_OK)) {
        fprintf(stderr, "skipped: %s is not there (launch/get-model smollm2 fetches it)\n", path);
        return;
    }
    CHECK_OK(model_dims_load(path, &d));
    CHECK(d.vocab_size == 49152 && d.hidden_size == 576 && d.intermediate_size == 1536 && d.n_layers == 30);
    CHECK(d.n_heads == 9 && d.n_kv_heads == 3 && d.head_dim == 64 && d.max_position_embeddings == 8192);
    CHECK(d.rope.theta == 100000 && d.rope.scaling == ROPE_SCALING_NONE && d.tie_word_embeddings && !d.qkv_bias);
    CHECK(d.bos_token_id == 1 && d.pad_token_id == 2 && d.n_eos_ids == 1 && d.eos_ids[0] == 2);
    CHECK(d.dtype == DTYPE_F16);
}

int main(void)
{
    return check_run("dims", (struct check_case[]){{"configs as transformers reads them", test_transformers},
                                                   {"end tokens and sampling defaults", test_eos_and_sampling},
                                                   {"refusals name file and key", test_refusals},
                                                   {"llava refusals", test_llava_refusals},
                                                   {"the demo model", test_demo},
                                                   {"GGUF metadata", test_gguf},
                                                   {"SmolLM2", test_smollm2},
                                                   {0}});
}
