/* tokenizer_json_decoder - the decoder of a tokenizer.json, worked out once for every token when the file is opened.
 *
 * What a token decodes to does not depend on its neighbours in any supported decoder, but for the start of the text:
 * Metaspace drops its character throughout the first token, and a Strip behind Fuse drops leading characters. */
#include <stdlib.h>

#include "base/json.h"
#include "base/utf8.h"
#include "model/tokenizer_internal.h"

enum { MAX_DECODE_STEPS = 16 };
enum decode_kind { DECODE_REPLACE, DECODE_BYTE_FALLBACK, DECODE_BYTE_LEVEL };
struct decode_step {
    enum decode_kind kind;
    struct tokenizer_regex *regex;
    const char *content; /* in the JSON tree */
};
struct decoder {
    struct decode_step step[MAX_DECODE_STEPS];
    int n;
    bool fused;
};

static int add_step(struct decoder *d, struct decode_step step, const char *what)
{
    if (d->fused) FAIL(ERR_UNSUPPORTED, "%s: decoder: a step other than Strip behind Fuse", what);
    if (d->n == MAX_DECODE_STEPS) FAIL(ERR_UNSUPPORTED, "%s: decoder: more than %d steps", what, MAX_DECODE_STEPS);
    d->step[d->n++] = step;
    return OK;
}

static int add_replace(struct decoder *d, const cJSON *node, const char *what)
{
    struct decode_step step = {.kind = DECODE_REPLACE};
    const cJSON *pattern = json_get(node, "pattern");
    const char *text = NULL, *regex = NULL;
    TRY(json_string(pattern, what, "String", &text));
    TRY(json_string(pattern, what, "Regex", &regex));
    TRY(json_string(node, what, "content", &step.content));
    if ((!text && !regex) || !step.content)
        FAIL(ERR_FORMAT, "%s: decoder Replace: a pattern and a content expected", what);
    if (strlen(step.content) > TOKENIZER_MAX_STRING) FAIL(ERR_FORMAT, "%s: decoder Replace: content too long", what);
    const char *source = text ? text : regex;
    TRY(tokenizer__regex_open(source, strlen(source), text != NULL, what, &step.regex));
    int rc = add_step(d, step, what);
    if (rc) tokenizer__regex_close(step.regex);
    return rc;
}

static int add_strip(struct tokenizer *t, const struct decoder *d, const cJSON *node, const char *what)
{
    const char *content = NULL;
    int64_t start = 0, stop = 0;
    TRY(json_string(node, what, "content", &content));
    TRY(json_int(node, what, "start", 0, 255, &start));
    TRY(json_int(node, what, "stop", 0, INT32_MAX, &stop));
    if (!start && !stop) return OK;
    if (!d->fused || stop || t->n_strip || !content || strlen(content) != 1)
        FAIL(ERR_UNSUPPORTED,
             "%s: decoder Strip: only one, behind Fuse, of one ASCII character at the start, is supported", what);
    t->strip = *content;
    t->n_strip = (unsigned)start;
    return OK;
}

static int add_metaspace(struct tokenizer *t, struct decoder *d, const cJSON *node, const char *what)
{
    const char *text = "\xe2\x96\x81", *scheme = "always";
    struct decode_step step = {.kind = DECODE_REPLACE, .content = " "};
    bool prefix = true;
    uint32_t code;
    TRY(json_string(node, what, "replacement", &text));
    TRY(json_string(node, what, "prepend_scheme", &scheme));
    TRY(json_bool(node, what, "add_prefix_space", &prefix));
    size_t size = *text ? utf8_next(text, strlen(text), &code) : 0;
    if (!size || text[size]) FAIL(ERR_FORMAT, "%s: decoder Metaspace: replacement: one character expected", what);
    if (d->n) FAIL(ERR_UNSUPPORTED, "%s: decoder Metaspace behind other steps is not supported", what);
    if (prefix && strcmp(scheme, "never")) {
        memcpy(t->drop, text, size);
        t->drop_size = size;
    }
    TRY(tokenizer__regex_open(text, size, true, what, &step.regex));
    int rc = add_step(d, step, what);
    if (rc) tokenizer__regex_close(step.regex);
    return rc;
}

static int read_decoder(struct tokenizer *t, struct decoder *d, const cJSON *node, const char *what)
{
    const char *type = NULL;
    if (!cJSON_IsObject(node)) FAIL(ERR_FORMAT, "%s: decoder: an object expected", what);
    TRY(json_string(node, what, "type", &type));
    if (!type) FAIL(ERR_FORMAT, "%s: decoder has no type", what);
    if (!strcmp(type, "Sequence")) {
        const cJSON *list = json_get(node, "decoders"), *item;
        if (!cJSON_IsArray(list)) FAIL(ERR_FORMAT, "%s: a Sequence without its array \"decoders\"", what);
        cJSON_ArrayForEach (item, list) TRY(read_decoder(t, d, item, what));
        return OK;
    }
    if (t->drop_size) FAIL(ERR_UNSUPPORTED, "%s: decoder %.60s behind Metaspace is not supported", what, type);
    if (!strcmp(type, "ByteLevel")) return add_step(d, (struct decode_step){.kind = DECODE_BYTE_LEVEL}, what);
    if (!strcmp(type, "ByteFallback")) return add_step(d, (struct decode_step){.kind = DECODE_BYTE_FALLBACK}, what);
    if (!strcmp(type, "Replace")) return add_replace(d, node, what);
    if (!strcmp(type, "Strip")) return add_strip(t, d, node, what);
    if (!strcmp(type, "Metaspace")) return add_metaspace(t, d, node, what);
    if (strcmp(type, "Fuse")) FAIL(ERR_UNSUPPORTED, "%s: decoder \"%.60s\" is not supported by this build", what, type);
    d->fused = true;
    return OK;
}

static int run_replace(struct tokenizer_encoder *e, const struct decode_step *s, const struct tokenizer_buffer *in,
                       struct tokenizer_buffer *out)
{
    struct tokenizer_match m = {0, SIZE_MAX, 0, 0};
    size_t done = 0;
    for (;;) {
        bool found;
        TRY(tokenizer__regex_next(s->regex, e, in->data, in->size, &m, &found));
        TRY(tokenizer__append(out, in->data + done, (found ? m.start : in->size) - done));
        if (!found) return OK;
        TRY(tokenizer__append(out, s->content, strlen(s->content)));
        done = m.end;
    }
}

/* One token through all steps; the result is in *in. */
static int decode_token(const struct decoder *d, struct tokenizer_encoder *e, struct tokenizer_buffer *in,
                        struct tokenizer_buffer *out)
{
    for (int i = 0; i < d->n; i++) {
        const struct decode_step *s = &d->step[i];
        int byte = s->kind == DECODE_BYTE_FALLBACK ? tokenizer__byte_token(in->data, in->size) : -1;
        char value = (char)byte;
        out->size = 0;
        if (s->kind == DECODE_REPLACE)
            TRY(run_replace(e, s, in, out));
        else if (s->kind == DECODE_BYTE_LEVEL)
            TRY(tokenizer__unmap_bytes(in->data, in->size, out));
        else
            TRY(tokenizer__append(out, byte < 0 ? in->data : &value, byte < 0 ? in->size : 1));
        struct tokenizer_buffer swap = *in;
        *in = *out;
        *out = swap;
    }
    return OK;
}

static int set_piece(struct tokenizer *t, int32_t id, const struct tokenizer_buffer *piece, const char *what)
{
    if (piece->size > TOKENIZER_MAX_TOKEN)
        FAIL(ERR_FORMAT, "%s: token %d decodes to %zu bytes; at most %d", what, id, piece->size, TOKENIZER_MAX_TOKEN);
    return tokenizer__set_piece(t, id, piece->data, piece->size);
}

/* Added tokens that are sought in normalized text decode from what the normalizer makes of them. */
static int decode_normalized(struct tokenizer *t, const struct decoder *d, struct tokenizer_encoder *e,
                             struct tokenizer_buffer *a, struct tokenizer_buffer *b, const char *what)
{
    for (int32_t i = 0; i < t->n_added; i++) {
        int32_t id = t->added[i].id;
        const char *text;
        size_t size;
        if (!t->added[i].normalized) continue;
        TRY(tokenizer__normalize(e, tokenizer__text(t, id), t->token[id].size, &text, &size));
        a->size = 0;
        TRY(tokenizer__append(a, text, size));
        TRY(decode_token(d, e, a, b));
        TRY(set_piece(t, id, a, what));
    }
    return OK;
}

static int decode_all(struct tokenizer *t, const struct decoder *d, struct tokenizer_encoder *e,
                      struct tokenizer_buffer *a, struct tokenizer_buffer *b, const char *what)
{
    for (int32_t id = 0; id < t->n; id++) {
        if (!(t->token[id].flags & TOKEN_PRESENT)) continue;
        a->size = 0;
        TRY(tokenizer__append(a, tokenizer__text(t, id), t->token[id].size));
        TRY(decode_token(d, e, a, b));
        TRY(set_piece(t, id, a, what));
    }
    return decode_normalized(t, d, e, a, b, what);
}

int tokenizer__json_decoder(struct tokenizer *t, const cJSON *node, const char *what)
{
    struct decoder d = {.n = 0};
    struct tokenizer_encoder e;
    struct tokenizer_buffer a = {0}, b = {0};
    if (!node) FAIL(ERR_UNSUPPORTED, "%s: decoder is null; without one, ids cannot be turned back into text", what);
    tokenizer__encoder_init(&e, t, 0);
    int rc = read_decoder(t, &d, node, what);
    if (!rc) rc = decode_all(t, &d, &e, &a, &b, what);
    for (int i = 0; i < d.n; i++) tokenizer__regex_close(d.step[i].regex);
    tokenizer__encoder_free(&e);
    free(a.data);
    free(b.data);
    return rc;
}
