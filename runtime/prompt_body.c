/* Messages, and the two entries: an OpenAI body, and a text from a command line or a questions file. */
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "runtime/prompt_internal.h"

/* A conversation as the body has it; strings are the body's. */
struct conversation {
    struct chat_message *messages;
    struct chat_text *texts; /* of all messages */
    struct prompt_image *images;
    int n_messages, n_texts, n_images;
};

static void conversation_free(struct conversation *c)
{
    free(c->messages);
    free(c->texts);
    free(c->images);
}

/* Room for all messages and parts: counted generously, filled exactly. */
static int conversation_take(const cJSON *messages, struct conversation *c)
{
    size_t n = 0, parts = 0;
    const cJSON *item;
    cJSON_ArrayForEach (item, messages) {
        const cJSON *content = json_get(item, "content");
        parts += cJSON_IsArray(content) ? (size_t)cJSON_GetArraySize(content) : 1;
        n++;
    }
    c->messages = calloc(n + 1, sizeof *c->messages);
    c->texts = calloc(parts + 1, sizeof *c->texts);
    c->images = calloc(parts + 1, sizeof *c->images);
    if (!c->messages || !c->texts || !c->images) FAIL(ERR_NOMEM, "no memory for %zu messages", n);
    return OK;
}

static int read_role(const cJSON *message, int i, const char *what, enum chat_role *out)
{
    static const struct {
        const char *name;
        enum chat_role role;
    } roles[] = {
        {"system", CHAT_SYSTEM}, {"developer", CHAT_SYSTEM}, {"user", CHAT_USER}, {"assistant", CHAT_ASSISTANT}};
    const cJSON *role = json_get(message, "role");
    if (!cJSON_IsString(role))
        FAIL(ERR_REQUEST, "%s: messages[%d].role must be a string: system, user or assistant", what, i);
    for (size_t k = 0; k < sizeof roles / sizeof *roles; k++) {
        if (strcmp(role->valuestring, roles[k].name)) continue;
        *out = roles[k].role;
        return OK;
    }
    FAIL(ERR_REQUEST, "%s: messages[%d].role \"%.50s\" is not served: system, user or assistant", what, i,
         role->valuestring);
}

static void add_text(struct conversation *c, struct chat_message *m, const char *text)
{
    c->texts[c->n_texts++] = (struct chat_text){text, strlen(text)};
    m->n_texts++;
}

static int read_part(struct conversation *c, struct chat_message *m, const cJSON *part, int i, int k, const char *what)
{
    if (cJSON_IsString(part)) {
        add_text(c, m, part->valuestring);
        return OK;
    }
    const cJSON *type = json_get(part, "type"), *text = json_get(part, "text"), *url = json_get(part, "image_url");
    const char *name = cJSON_IsString(type) ? type->valuestring : "";
    if (!strcmp(name, "text")) {
        if (!cJSON_IsString(text)) FAIL(ERR_REQUEST, "%s: messages[%d].content[%d].text must be a string", what, i, k);
        add_text(c, m, text->valuestring);
        return OK;
    }
    if (strcmp(name, "image_url"))
        FAIL(ERR_REQUEST, "%s: messages[%d].content[%d].type \"%.50s\" is not served: text or image_url", what, i, k,
             name);
    if (cJSON_IsObject(url)) url = json_get(url, "url");
    if (!cJSON_IsString(url))
        FAIL(ERR_REQUEST, "%s: messages[%d].content[%d].image_url must be {\"url\": \"file:... or data:...\"}", what, i,
             k);
    c->images[c->n_images++] = (struct prompt_image){url->valuestring, false};
    m->n_images++;
    return OK;
}

static int read_message(struct conversation *c, const cJSON *message, int i, const char *what)
{
    struct chat_message *m = &c->messages[i];
    const cJSON *content = json_get(message, "content"), *part, *calls = json_get(message, "tool_calls");
    int k = 0;
    if (!cJSON_IsObject(message)) FAIL(ERR_REQUEST, "%s: messages[%d] must be an object", what, i);
    TRY(read_role(message, i, what, &m->role));
    if (calls && calls->child) FAIL(ERR_REQUEST, "%s: messages[%d].tool_calls is not served", what, i);
    m->texts = &c->texts[c->n_texts];
    if (cJSON_IsString(content)) {
        add_text(c, m, content->valuestring);
        return OK;
    }
    if (!cJSON_IsArray(content) || !content->child)
        FAIL(ERR_REQUEST, "%s: messages[%d].content must be a string or a list of parts", what, i);
    cJSON_ArrayForEach (part, content) TRY(read_part(c, m, part, i, k++, what));
    return OK;
}

static int read_messages(const cJSON *body, const char *what, struct conversation *c)
{
    const cJSON *messages = json_get(body, "messages"), *item;
    if (!cJSON_IsArray(messages))
        FAIL(ERR_REQUEST, "%s: messages must be a list of {\"role\": ..., \"content\": ...}", what);
    TRY(conversation_take(messages, c));
    cJSON_ArrayForEach (item, messages) {
        TRY(read_message(c, item, c->n_messages, what));
        c->n_messages++;
    }
    return OK;
}

static int finish_chat(const struct prompt_builder *b, const struct conversation *c, bool max_tokens_given,
                       const char *what, struct request *out)
{
    struct chat_prompt text;
    int32_t *ids;
    size_t n, last_turn;
    TRY(prompt__count_images(b, c->n_images, what));
    int rc = chat_render(&b->chat, c->messages, c->n_messages, &text);
    if (rc) return status_prefix(rc, "%s", what);
    rc = prompt__encode_chat(b, &text, &ids, &n, &last_turn);
    chat_prompt_free(&text);
    if (rc) return status_prefix(rc, "%s", what);
    rc = prompt__finish(b, ids, n, last_turn, c->images, c->n_images, max_tokens_given, what, out);
    free(ids);
    return rc;
}

int prompt_from_body(const struct prompt_builder *b, const cJSON *body, const char *what, struct request *out)
{
    struct conversation c = {0};
    bool max_tokens_given;
    memset(out, 0, sizeof *out);
    TRY(prompt_check_chat(b));
    if (!cJSON_IsObject(body)) FAIL(ERR_REQUEST, "%s: the body must be an object with messages", what);
    int rc = prompt__sampling(b, body, what, out, &max_tokens_given);
    if (!rc) rc = read_messages(body, what, &c);
    if (!rc) rc = finish_chat(b, &c, max_tokens_given, what, out);
    conversation_free(&c);
    if (rc) request_free(out);
    return rc;
}

static int finish_raw(const struct prompt_builder *b, const struct prompt_text *text, const struct prompt_image *images,
                      bool max_tokens_given, const char *what, struct request *out)
{
    int32_t *ids;
    size_t n;
    TRY(prompt__count_images(b, text->n_images, what));
    int rc = prompt__encode_raw(b, text->text, text->size, &ids, &n);
    if (rc) return status_prefix(rc, "%s", what);
    rc = prompt__finish(b, ids, n, 0, images, text->n_images, max_tokens_given, what, out);
    free(ids);
    return rc;
}

int prompt_from_text(const struct prompt_builder *b, const struct prompt_text *text, const cJSON *options,
                     const char *what, struct request *out)
{
    bool max_tokens_given;
    memset(out, 0, sizeof *out);
    if (!text->raw) TRY(prompt_check_chat(b));
    struct prompt_image *images = calloc((size_t)text->n_images + 1, sizeof *images);
    if (!images) FAIL(ERR_NOMEM, "no memory for %d images", text->n_images);
    for (int i = 0; i < text->n_images; i++) images[i] = (struct prompt_image){text->images[i], true};
    int rc = prompt__sampling(b, options, what, out, &max_tokens_given);
    if (!rc && text->raw) {
        rc = finish_raw(b, text, images, max_tokens_given, what, out);
    } else if (!rc) {
        struct chat_text part = {text->text, text->size};
        struct chat_message message = {CHAT_USER, &part, 1, text->n_images};
        struct conversation c = {&message, &part, images, 1, 1, text->n_images};
        rc = finish_chat(b, &c, max_tokens_given, what, out);
    }
    free(images);
    if (rc) request_free(out);
    return rc;
}
