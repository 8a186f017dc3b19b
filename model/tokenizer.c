/* tokenizer - the opened tokenizer: making, completing and freeing it, and looking things up in it. Encoding and
 * decoding are in tokenizer_encode.c and tokenizer_decode.c, the loaders in tokenizer_json.c and tokenizer_gguf.c. */
#include "model/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>

#include "base/utf8.h"
#include "model/tokenizer_internal.h"

struct tokenizer *tokenizer__new(enum tokenizer_kind kind)
{
    struct tokenizer *t = calloc(1, sizeof *t);
    if (!t) return NULL;
    t->kind = kind;
    t->unk = t->bos = t->eos = -1;
    for (size_t i = 0; i < sizeof t->char_id / sizeof *t->char_id; i++) t->char_id[i] = -1;
    for (size_t i = 0; i < 256; i++) t->byte_id[i] = -1;
    return t;
}

void tokenizer_close(struct tokenizer *t)
{
    if (!t) return;
    for (int i = 0; i < t->n_normalize; i++) {
        tokenizer__regex_close(t->normalize[i].regex);
        free(t->normalize[i].content);
    }
    for (int i = 0; i < t->n_step; i++) tokenizer__regex_close(t->step[i].regex);
    tokenizer__regex_close(t->word);
    free(t->token);
    free(t->text.data);
    free(t->pieces.data);
    free(t->strings.slot);
    free(t->pairs.key);
    free(t->pairs.value);
    free(t->score);
    free(t->added);
    free(t->raw.node);
    free(t->normalized.node);
    free(t);
}

int tokenizer__byte_token(const char *text, size_t size)
{
    int value = 0;
    if (size != 6 || memcmp(text, "<0x", 3) || text[5] != '>') return -1;
    for (int i = 3; i < 5; i++) {
        char c = text[i];
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                           : -1;
        if (digit < 0) return -1;
        value = value * 16 + digit;
    }
    return value;
}

int tokenizer__unmap_bytes(const char *text, size_t size, struct tokenizer_buffer *out)
{
    size_t before = out->size;
    TRY(tokenizer__reserve(out, size));
    for (size_t i = 0; i < size;) {
        uint32_t code;
        i += utf8_next(text + i, size - i, &code);
        int byte = tokenizer__char_byte(code);
        if (byte < 0) {
            out->size = before;
            return tokenizer__append(out, text, size);
        }
        out->data[out->size++] = (char)byte;
    }
    return OK;
}

int tokenizer__add_token(struct tokenizer *t, const struct tokenizer_added *added, const char *what)
{
    if (t->token[added->id].flags & TOKEN_ADDED)
        FAIL(ERR_FORMAT, "%s: added_tokens: id %d (\"%.100s\") stands there twice", what, added->id,
             tokenizer__text(t, added->id));
    if (!t->token[added->id].size) FAIL(ERR_FORMAT, "%s: added_tokens: id %d has an empty text", what, added->id);
    if ((t->n_added & (t->n_added - 1)) == 0) { /* full at powers of two */
        struct tokenizer_added *larger = realloc(t->added, (size_t)(t->n_added ? 2 * t->n_added : 1) * sizeof *larger);
        if (!larger) FAIL(ERR_NOMEM, "%s: out of memory", what);
        t->added = larger;
    }
    t->added[t->n_added++] = *added;
    t->token[added->id].flags |= TOKEN_ADDED | (added->special ? TOKEN_SPECIAL : 0);
    return OK;
}

int tokenizer__add_step(struct tokenizer *t, const struct tokenizer_step *step, const char *what)
{
    if (t->n_step == TOKENIZER_MAX_STEPS)
        FAIL(ERR_UNSUPPORTED, "%s: pre_tokenizer: more than %d steps", what, TOKENIZER_MAX_STEPS);
    t->step[t->n_step++] = *step;
    return OK;
}

int tokenizer__add_split(struct tokenizer *t, const char *pattern, bool literal, enum tokenizer_split_behavior behavior,
                         bool invert, const char *what)
{
    struct tokenizer_step step = {.kind = STEP_SPLIT, .behavior = behavior, .invert = invert};
    TRY(tokenizer__regex_open(pattern, strlen(pattern), literal, what, &step.regex));
    int rc = tokenizer__add_step(t, &step, what);
    if (rc) tokenizer__regex_close(step.regex);
    return rc;
}

int tokenizer__add_normalize(struct tokenizer *t, const struct tokenizer_normalize_step *step, const char *content,
                             const char *what)
{
    struct tokenizer_normalize_step own = *step;
    if (t->n_normalize == TOKENIZER_MAX_STEPS)
        FAIL(ERR_UNSUPPORTED, "%s: normalizer: more than %d steps", what, TOKENIZER_MAX_STEPS);
    if (content) {
        own.content_size = strlen(content);
        if (own.content_size > TOKENIZER_MAX_STRING)
            FAIL(ERR_FORMAT, "%s: normalizer: a text of %zu bytes; at most %d", what, own.content_size,
                 TOKENIZER_MAX_STRING);
        own.content = strdup(content);
        if (!own.content) FAIL(ERR_NOMEM, "%s: out of memory", what);
    }
    t->normalize[t->n_normalize++] = own;
    return OK;
}

static void index_tokens(struct tokenizer *t)
{
    char text[8];
    for (uint32_t code = 0; code < 0x800; code++) t->char_id[code] = tokenizer__lookup(t, text, utf8_put(code, text));
    for (int i = 0; i < 256; i++) {
        snprintf(text, sizeof text, "<0x%02X>", (unsigned)i);
        t->byte_id[i] = tokenizer__lookup(t, text, 6);
    }
    for (int32_t id = 0; id < t->n; id++)
        if (t->token[id].size > t->longest) t->longest = t->token[id].size;
}

/* Added tokens that are sought in normalized text are sought as the normalizer writes them. */
static int index_normalized(struct tokenizer *t, struct tokenizer_encoder *e, int32_t k)
{
    const char *text;
    size_t size;
    int32_t id = t->added[k].id;
    TRY(tokenizer__normalize(e, tokenizer__text(t, id), t->token[id].size, &text, &size));
    return size ? tokenizer__trie_add(&t->normalized, text, size, k) : OK;
}

int tokenizer__finish(struct tokenizer *t, const char *what)
{
    static const char word[] = "[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{200c}\\x{200d}]";
    struct tokenizer_encoder e;
    int rc = OK;
    index_tokens(t);
    tokenizer__encoder_init(&e, t, 0);
    for (int32_t k = 0; k < t->n_added && !rc; k++) {
        const struct tokenizer_added *added = &t->added[k];
        if (added->single_word && !t->word) rc = tokenizer__regex_open(word, strlen(word), false, what, &t->word);
        if (rc) break;
        rc = added->normalized
                 ? index_normalized(t, &e, k)
                 : tokenizer__trie_add(&t->raw, tokenizer__text(t, added->id), t->token[added->id].size, k);
    }
    tokenizer__encoder_free(&e);
    if (!rc && !t->pieces.data) rc = tokenizer__reserve(&t->pieces, 1);
    return rc;
}

void tokenizer__encoder_free(struct tokenizer_encoder *e)
{
    free(e->ids);
    free(e->symbol);
    free(e->heap);
    free(e->normal[0].data);
    free(e->normal[1].data);
    for (size_t i = 0; i < TOKENIZER_MAX_STEPS; i++) free(e->scratch[i].data);
    tokenizer__regex_release(e);
}

int32_t tokenizer_find(const struct tokenizer *t, const char *token)
{
    size_t size = strlen(token);
    int32_t id = tokenizer__lookup(t, token, size);
    for (int32_t i = 0; id < 0 && i < t->n_added; i++) {
        int32_t k = t->added[i].id;
        if (t->token[k].size == size && !memcmp(tokenizer__text(t, k), token, size)) id = k;
    }
    return id;
}

const char *tokenizer_token(const struct tokenizer *t, int32_t id)
{
    if (id < 0 || id >= t->n || !(t->token[id].flags & TOKEN_PRESENT)) return NULL;
    return tokenizer__text(t, id);
}

int tokenizer_size(const struct tokenizer *t) { return t->n; }

int32_t tokenizer_bos(const struct tokenizer *t) { return t->bos; }

int32_t tokenizer_eos(const struct tokenizer *t) { return t->eos; }

bool tokenizer_is_special(const struct tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->n && (t->token[id].flags & TOKEN_SPECIAL);
}
