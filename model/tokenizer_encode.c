/* tokenizer_encode - one encode call: clean UTF-8, added tokens, normalizer, words, begin and end tokens; and the
 * memory that lives as long as the call. */
#include <stdlib.h>

#include "base/tensor.h"
#include "base/utf8.h"
#include "model/tokenizer_internal.h"

void tokenizer__encoder_init(struct tokenizer_encoder *e, const struct tokenizer *t, unsigned flags)
{
    memset(e, 0, sizeof *e);
    e->t = t;
    e->flags = flags;
}

/* Doubles an array until it holds `need` elements. */
static int grow(void *array, size_t *capacity, size_t need, size_t element)
{
    size_t n = *capacity ? *capacity : 64, bytes;
    while (n < need) n *= 2;
    if (n == *capacity) return OK;
    if (size_mul(n, element, &bytes)) FAIL(ERR_NOMEM, "tokenizer: text too large");
    void *old, *larger;
    memcpy(&old, array, sizeof old);
    larger = realloc(old, bytes);
    if (!larger) FAIL(ERR_NOMEM, "tokenizer: no memory for %zu bytes while encoding", bytes);
    memcpy(array, &larger, sizeof larger);
    *capacity = n;
    return OK;
}

int tokenizer__emit(struct tokenizer_encoder *e, int32_t id)
{
    if (e->n == e->capacity) TRY(grow(&e->ids, &e->capacity, e->n + 1, sizeof *e->ids));
    e->ids[e->n++] = id;
    return OK;
}

int tokenizer__reserve_symbols(struct tokenizer_encoder *e, size_t n)
{
    if (e->n_symbol + n <= e->symbol_capacity) return OK;
    return grow(&e->symbol, &e->symbol_capacity, e->n_symbol + n, sizeof *e->symbol);
}

int tokenizer__heap_push(struct tokenizer_encoder *e, struct tokenizer_heap_entry entry)
{
    if (e->n_heap == e->heap_capacity) TRY(grow(&e->heap, &e->heap_capacity, e->n_heap + 1, sizeof *e->heap));
    size_t i = e->n_heap++;
    for (; i && e->heap[(i - 1) / 2].key > entry.key; i = (i - 1) / 2) e->heap[i] = e->heap[(i - 1) / 2];
    e->heap[i] = entry;
    return OK;
}

struct tokenizer_heap_entry tokenizer__heap_pop(struct tokenizer_encoder *e)
{
    struct tokenizer_heap_entry *h = e->heap, top = h[0], last = h[--e->n_heap];
    size_t i = 0, n = e->n_heap;
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && h[child + 1].key < h[child].key) child++;
        if (h[child].key >= last.key) break;
        h[i] = h[child];
    }
    h[i] = last;
    return top;
}

/* A segment behind the normalizer: added tokens that are sought in normalized text, and words between them. */
static int encode_normal(struct tokenizer_encoder *e, const char *text, size_t size, bool first)
{
    size_t at = 0, done = 0;
    for (;;) {
        struct tokenizer_found hit;
        bool found = false;
        if (e->t->normalized.n) TRY(tokenizer__added_next(e, &e->t->normalized, text, size, &at, done, &hit, &found));
        size_t stop = found ? hit.start : size;
        TRY(tokenizer__pretokenize(e, text + done, stop - done, first && !done));
        if (!found) return OK;
        TRY(tokenizer__emit(e, hit.id));
        done = hit.end;
    }
}

static int encode_segment(struct tokenizer_encoder *e, const char *text, size_t size, bool first)
{
    const char *normal;
    if (!size) return OK;
    TRY(tokenizer__normalize(e, text, size, &normal, &size));
    return encode_normal(e, normal, size, first);
}

static int encode_text(struct tokenizer_encoder *e, const char *text, size_t size)
{
    size_t at = 0, done = 0;
    for (;;) {
        struct tokenizer_found hit;
        bool found = false;
        if (e->t->raw.n) TRY(tokenizer__added_next(e, &e->t->raw, text, size, &at, done, &hit, &found));
        size_t stop = found ? hit.start : size;
        TRY(encode_segment(e, text + done, stop - done, !done));
        if (!found) return OK;
        TRY(tokenizer__emit(e, hit.id));
        done = hit.end;
    }
}

static int replace_invalid(const char *text, size_t size, struct tokenizer_buffer *out)
{
    TRY(tokenizer__reserve(out, 3 * size));
    char *to = out->data;
    for (size_t i = 0; i < size;) {
        uint32_t code;
        i += utf8_next(text + i, size - i, &code);
        to += utf8_put(code, to);
    }
    out->size = (size_t)(to - out->data);
    return OK;
}

static int encode(struct tokenizer_encoder *e, const char *text, size_t size, struct tokenizer_buffer *clean)
{
    const struct tokenizer *t = e->t;
    bool special = (e->flags & TOKENIZER_ADD_SPECIAL) != 0;
    if (!tokenizer__is_utf8(text, size)) {
        TRY(replace_invalid(text, size, clean));
        text = clean->data;
        size = clean->size;
    }
    TRY(grow(&e->ids, &e->capacity, size / 4 + 16, sizeof *e->ids));
    for (int i = 0; special && i < t->n_prefix; i++) TRY(tokenizer__emit(e, t->prefix[i]));
    TRY(encode_text(e, text, size));
    for (int i = 0; special && i < t->n_suffix; i++) TRY(tokenizer__emit(e, t->suffix[i]));
    return OK;
}

int tokenizer_encode(const struct tokenizer *t, const char *text, size_t size, unsigned flags, int32_t **ids, size_t *n)
{
    if (size > TOKENIZER_MAX_TEXT)
        FAIL(ERR_REQUEST, "text of %zu bytes; at most %d can be tokenized at once", size, TOKENIZER_MAX_TEXT);
    struct tokenizer_encoder e;
    struct tokenizer_buffer clean = {0};
    tokenizer__encoder_init(&e, t, flags);
    int rc = encode(&e, text, size, &clean);
    free(clean.data);
    if (!rc) {
        *ids = e.ids;
        *n = e.n;
        e.ids = NULL;
    }
    tokenizer__encoder_free(&e);
    return rc;
}
