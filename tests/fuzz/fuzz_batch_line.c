/* One line of a batch file, from bytes to a request and to its record. Whatever the line holds: a request that is made
 * is within the limits and consistent in itself, and every record is one line of JSON that carries the line's id. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "runtime/batch_internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct config config;
static struct model_dims dims;
static struct prompt_builder *builder;

static void must(bool condition, const char *what)
{
    if (condition) return;
    fprintf(stderr, "broken: %s\n", what);
    abort();
}

static void open_builder(void)
{
    const char *slash = strrchr(__FILE__, '/');
    must(config_defaults(&config) == OK, "defaults");
    snprintf(config.model, sizeof config.model, "%.*s/../../models/demo-vlm", slash ? (int)(slash - __FILE__) : 1,
             slash ? __FILE__ : ".");
    config.allowed_local_media_path[0] = 0;
    config.max_image_pixels = 1 << 20;
    if (model_dims_load(config.model, &dims) || prompt_open(&config, &dims, &builder)) {
        fprintf(stderr, "%s\n", status_message());
        abort();
    }
}

static void check_request(const struct request *r)
{
    int at = 0, image_tokens = 0;
    must(r->n_ids > 0 && r->max_tokens >= 1 && r->n_ids + r->max_tokens <= prompt_max_model_len(builder), "length");
    must(r->min_tokens <= r->max_tokens && r->last_turn_start >= 0 && r->last_turn_start < r->n_ids, "limits");
    for (int i = 0; i < r->n_ids; i++) {
        must(r->ids[i] >= 0 && r->ids[i] < dims.vocab_size, "token");
        image_tokens += r->ids[i] == dims.vision.image_token_id;
    }
    must(image_tokens == r->n_images * dims.vision.n_image_tokens, "image tokens");
    for (int i = 0; i < r->n_images; i++) {
        must(r->spans[i].start >= at && r->spans[i].end - r->spans[i].start == dims.vision.n_image_tokens, "span");
        at = r->spans[i].end;
        for (int k = r->spans[i].start; k < at; k++) must(r->ids[k] == dims.vision.image_token_id, "span's tokens");
    }
    must(r->sampling.temperature >= 0 && r->sampling.top_p > 0 && r->sampling.top_p <= 1, "sampling");
    must(r->n_stops <= REQUEST_MAX_STOPS && r->n_stop_ids <= REQUEST_MAX_STOP_IDS, "stops");
}

/* The record is one line of JSON, and its id is the item's. */
static void check_record(const struct output_buffer *record, const struct batch_item *item)
{
    must(!record->failed && record->size > 1 && record->text[record->size - 1] == '\n', "record's end");
    must(!memchr(record->text, '\n', record->size - 1), "newline inside a record");
    cJSON *tree = cJSON_ParseWithLength(record->text, record->size);
    must(tree != NULL, "record's JSON");
    const cJSON *id = json_get(tree, "custom_id");
    must(cJSON_IsString(id) == (item->custom_id != NULL), "record's id");
    if (cJSON_IsString(id)) {
        char *quoted = json_quote(id->valuestring, strlen(id->valuestring));
        must(quoted && !strcmp(quoted, item->quoted_id), "record's id");
        free(quoted);
    }
    cJSON_Delete(tree);
}

static void check_answer(struct output_buffer *record, const struct batch_item *item, const uint8_t *data, size_t size)
{
    int32_t tokens[4] = {5, 224, 1535, 2};
    float logprob[8] = {-1, -2, -3, -4, -5, -6, -7, -1.0f / 0.0f};
    int32_t logprob_token[8] = {5, 6, 224, 225, 1535, 3, 2, 0};
    int kept[2] = {1, 2};
    struct completion c = {.text = (const char *)data,
                           .text_size = size,
                           .tokens = tokens,
                           .n_tokens = 4,
                           .policy = "full",
                           .budget = item->request.budget,
                           .kept_tokens_per_layer = kept,
                           .n_layers = 2,
                           .logprob = logprob,
                           .logprob_token = logprob_token,
                           .n_logprobs = 1};
    batch__put_answer(record, item, builder, &c);
    check_record(record, item);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!builder) open_builder();
    struct output_buffer record = {0};
    struct batch_line line = {(const char *)data, size, 1, false, true};
    struct batch_item *item;
    must(batch__item_parse(&line, &item) == OK, "parsing");
    if (!item->rc) batch__item_prepare(builder, item);
    must(item->rc == OK || item->rc == ERR_REQUEST, "class of the error");
    if (item->rc) {
        must(item->message && *item->message && item->code, "message");
        batch__put_error(&record, item, !item->quoted_id);
        check_record(&record, item);
    } else {
        check_request(&item->request);
        check_answer(&record, item, data, size);
    }
    output_free(&record);
    batch__item_free(item);
    return 0;
}
