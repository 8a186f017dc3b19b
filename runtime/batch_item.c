/* One line of the input on its way to one record of the output. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/json.h"
#include "runtime/batch_internal.h"

enum { MAX_ID = 512 };

void batch__item_fail(struct batch_item *item, int rc, const char *code)
{
    free(item->message);
    item->rc = rc;
    item->code = code;
    item->message = strdup(status_message());
}

void batch__item_free(struct batch_item *item)
{
    if (!item) return;
    free(item->custom_id);
    free(item->quoted_id);
    cJSON_Delete(item->tree);
    free(item->message);
    request_free(&item->request);
    free(item);
}

/* Takes the id first, so that the record of a line that is wrong otherwise carries it. */
static int read_line(struct batch_item *item, const char *what)
{
    const cJSON *id = json_get(item->tree, "custom_id"), *method = json_get(item->tree, "method"),
                *url = json_get(item->tree, "url");
    if (!cJSON_IsObject(item->tree)) FAIL(ERR_REQUEST, "%s: must be an object with custom_id and body", what);
    if (!cJSON_IsString(id) || !*id->valuestring || strlen(id->valuestring) > MAX_ID)
        FAIL(ERR_REQUEST, "%s: custom_id must be a string of 1 to %d bytes", what, MAX_ID);
    item->quoted_id = json_quote(id->valuestring, strlen(id->valuestring));
    item->custom_id = strdup(id->valuestring);
    if (!item->quoted_id || !item->custom_id) FAIL(ERR_NOMEM, "%s: no memory for its custom_id", what);
    item->key = batch__key_of_id(item->quoted_id);
    if (method && (!cJSON_IsString(method) || strcmp(method->valuestring, "POST")))
        FAIL(ERR_REQUEST, "%s: method must be \"POST\"", what);
    if (url && (!cJSON_IsString(url) || strcmp(url->valuestring, "/v1/chat/completions")))
        FAIL(ERR_REQUEST, "%s: url must be \"/v1/chat/completions\"", what);
    item->body = json_get(item->tree, "body");
    if (!cJSON_IsObject(item->body)) FAIL(ERR_REQUEST, "%s: body must be an object", what);
    item->top_logprobs = prompt_logprobs_asked(item->body);
    return OK;
}

int batch__item_parse(const struct batch_line *line, struct batch_item **out)
{
    char what[48];
    struct batch_item *item = calloc(1, sizeof *item);
    if (!item) FAIL(ERR_NOMEM, "no memory for a line of the input");
    *out = item;
    item->line = line->number;
    item->key = batch__key_of_line(line->number);
    snprintf(what, sizeof what, "line %" PRId64, line->number);
    if (line->too_long) {
        int rc = status_set(ERR_REQUEST, __FILE__, __LINE__, "%s: longer than max_request_bytes", what);
        batch__item_fail(item, rc, "line_too_long");
        return OK;
    }
    int rc = json_parse(line->text, line->size, what, &item->tree);
    if (rc && rc != ERR_NOMEM) {
        batch__item_fail(item, ERR_REQUEST, "invalid_json");
        return OK;
    }
    if (!rc) rc = read_line(item, what);
    if (rc == ERR_REQUEST) {
        batch__item_fail(item, rc, "invalid_request");
        return OK;
    }
    if (rc) {
        batch__item_free(item);
        *out = NULL;
    }
    return rc;
}

void batch__item_prepare(const struct prompt_builder *builder, struct batch_item *item)
{
    int rc = prompt_from_body(builder, item->body, item->custom_id, &item->request);
    if (rc) batch__item_fail(item, rc, "invalid_request");
    cJSON_Delete(item->tree);
    item->tree = NULL;
    item->body = NULL;
}

/* {"id":...,"custom_id":..., with the same hash in all names of this line's objects. */
static void put_head(struct output_buffer *b, const struct batch_item *item)
{
    output_printf(b, "{\"id\":\"batch_req_%016" PRIx64 "%016" PRIx64 "\",\"custom_id\":%s,", item->key.high,
                  item->key.low, item->quoted_id ? item->quoted_id : "null");
}

void batch__put_answer(struct output_buffer *b, const struct batch_item *item, const struct prompt_builder *builder,
                       const struct completion *completion)
{
    char id[64];
    snprintf(id, sizeof id, "chatcmpl-%016" PRIx64 "%016" PRIx64, item->key.high, item->key.low);
    struct output_chat chat = {.id = id,
                               .model = prompt_config(builder)->model,
                               .created = (int64_t)time(NULL),
                               .top_logprobs = item->top_logprobs,
                               .tokenizer = prompt_tokenizer(builder)};
    output_clear(b);
    put_head(b, item);
    output_printf(b, "\"response\":{\"status_code\":200,\"request_id\":\"req_%s\",\"body\":", id + 9);
    output_chat_completion(b, &chat, completion);
    output_printf(b, "},\"error\":null}\n");
}

void batch__put_error(struct output_buffer *b, const struct batch_item *item, bool by_line)
{
    const char *message = item->message ? item->message : "no memory for the message";
    output_clear(b);
    put_head(b, item);
    if (by_line) output_printf(b, "\"line\":%" PRId64 ",", item->line);
    output_printf(b, "\"response\":null,\"error\":{\"code\":\"%s\",\"message\":", item->code);
    output_string(b, message, strlen(message));
    output_printf(b, "}}\n");
}
