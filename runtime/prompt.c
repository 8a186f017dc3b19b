#include "runtime/prompt.h"

#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"
#include "model/gguf_vocab.h"
#include "runtime/prompt_internal.h"

enum { MAX_CONFIG_FILE = 64 << 20, MAX_PATH = 4096 };

int prompt_tokenizer_open(const char *model_path, struct tokenizer **out)
{
    if (model_dims_is_gguf(model_path)) return gguf_vocab_open_tokenizer(model_path, out);
    char json[MAX_PATH], config[MAX_PATH];
    TRY(path_join(json, sizeof json, model_path, "tokenizer.json"));
    TRY(path_join(config, sizeof config, model_path, "tokenizer_config.json"));
    if (!file_exists(json) && file_exists(model_path))
        FAIL(ERR_UNSUPPORTED, "%s: no tokenizer.json; a tokenizer.model alone must be converted first", model_path);
    return tokenizer_open_json(json, file_exists(config) ? config : NULL, out);
}

/* ---- the model's own chat template, as text ---- */

/* The member chat_template of a JSON file: a string, or a list of named ones of which "default" counts. */
static int template_from_json(const char *path, char **out)
{
    cJSON *tree;
    if (!file_exists(path)) return OK;
    TRY(json_parse_file(path, MAX_CONFIG_FILE, &tree));
    const cJSON *item = json_get(tree, "chat_template"), *entry, *text = NULL;
    if (cJSON_IsString(item)) text = item;
    if (cJSON_IsArray(item)) {
        cJSON_ArrayForEach (entry, item) {
            const cJSON *name = json_get(entry, "name");
            if (!text || (cJSON_IsString(name) && !strcmp(name->valuestring, "default")))
                text = json_get(entry, "template");
        }
    }
    if (text && cJSON_IsString(text)) *out = strdup(text->valuestring);
    cJSON_Delete(tree);
    return OK;
}

/* *out is malloc'd, NULL if the model brings none. The tokenizer's template of a model with a vision tower is its
 * language model's own, for text alone, and does not count. */
static int read_template(const char *model_path, enum model_family family, char **out)
{
    static const char *const files[] = {"chat_template.json", "processor_config.json", "tokenizer_config.json"};
    int n_files = family == MODEL_LLAVA ? 2 : 3;
    *out = NULL;
    if (model_dims_is_gguf(model_path)) return gguf_vocab_chat_template(model_path, out);
    char path[MAX_PATH];
    size_t size;
    TRY(path_join(path, sizeof path, model_path, "chat_template.jinja"));
    if (file_exists(path)) return file_read_all(path, MAX_CONFIG_FILE, out, &size);
    for (int i = 0; i < n_files && !*out; i++) {
        TRY(path_join(path, sizeof path, model_path, files[i]));
        TRY(template_from_json(path, out));
    }
    return OK;
}

static int open_chat(struct prompt_builder *b)
{
    char *jinja;
    TRY(read_template(b->config->model, b->dims->family, &jinja));
    int rc = chat_open(&b->chat, b->config->chat_template, jinja, b->dims->family, b->tokenizer);
    free(jinja);
    b->has_chat = rc == OK;
    if (rc != ERR_CONFIG) return rc;
    b->chat_message = strdup(status_message());
    return OK;
}

/* ---- images ---- */

static int open_vision(struct prompt_builder *b)
{
    const struct vision_dims *v = &b->dims->vision;
    char path[MAX_PATH];
    int height, width;
    b->has_vision = b->dims->family == MODEL_LLAVA;
    if (!b->has_vision) return OK;
    b->image_token = tokenizer_token(b->tokenizer, v->image_token_id);
    if (!b->image_token)
        FAIL(ERR_FORMAT, "%s: the config's image token %d is not in the tokenizer", b->config->model,
             v->image_token_id);
    b->processor = image_processor_default(v->image_size);
    TRY(path_join(path, sizeof path, b->config->model, "preprocessor_config.json"));
    if (file_exists(path)) TRY(image_processor_load(path, &b->processor));
    image_processor_output_size(&b->processor, &height, &width);
    if (height != v->image_size || width != v->image_size)
        FAIL(ERR_FORMAT, "%s makes images of %dx%d pixels, the vision tower takes %dx%d", path, width, height,
             v->image_size, v->image_size);
    return OK;
}

/* ---- special tokens ---- */

static int compare_texts(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static int list_special(struct prompt_builder *b)
{
    int n = 0;
    for (int32_t id = 0; id < tokenizer_size(b->tokenizer); id++) n += tokenizer_is_special(b->tokenizer, id);
    b->special = calloc((size_t)n + 1, sizeof *b->special);
    if (!b->special) FAIL(ERR_NOMEM, "no memory for %d special tokens", n);
    for (int32_t id = 0; id < tokenizer_size(b->tokenizer); id++) {
        const char *text = tokenizer_is_special(b->tokenizer, id) ? tokenizer_token(b->tokenizer, id) : NULL;
        if (text && *text) b->special[b->n_special++] = text;
    }
    qsort(b->special, (size_t)b->n_special, sizeof *b->special, compare_texts);
    return OK;
}

/* ---- open and close ---- */

static int open_parts(struct prompt_builder *b)
{
    TRY(prompt_tokenizer_open(b->config->model, &b->tokenizer));
    TRY(list_special(b));
    TRY(open_vision(b));
    return open_chat(b);
}

int prompt_open(const struct config *config, const struct model_dims *dims, struct prompt_builder **out)
{
    struct prompt_builder *b = calloc(1, sizeof *b);
    if (!b) FAIL(ERR_NOMEM, "no memory for the prompt builder");
    b->config = config;
    b->dims = dims;
    b->max_model_len = config->max_model_len;
    if (!b->max_model_len)
        b->max_model_len = dims->max_position_embeddings < CONFIG_AUTO_MODEL_LEN ? dims->max_position_embeddings
                                                                                 : CONFIG_AUTO_MODEL_LEN;
    int rc = open_parts(b);
    if (rc) {
        prompt_close(b);
        return rc;
    }
    *out = b;
    return OK;
}

void prompt_close(struct prompt_builder *b)
{
    if (!b) return;
    chat_close(&b->chat);
    free(b->chat_message);
    free(b->special);
    tokenizer_close(b->tokenizer);
    free(b);
}

int prompt_check_chat(const struct prompt_builder *b)
{
    if (b->has_chat) return OK;
    FAIL(ERR_CONFIG, "%s: %s", b->config->model, b->chat_message ? b->chat_message : "no chat template");
}

const struct tokenizer *prompt_tokenizer(const struct prompt_builder *b) { return b->tokenizer; }
const struct config *prompt_config(const struct prompt_builder *b) { return b->config; }
int prompt_max_model_len(const struct prompt_builder *b) { return b->max_model_len; }
