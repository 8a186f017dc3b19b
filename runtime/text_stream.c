#include "runtime/text_stream.h"

#include <stdlib.h>
#include <string.h>

int text_stream_begin(struct text_stream *s, const struct tokenizer *tokenizer, const struct request *request)
{
    memset(s, 0, sizeof *s);
    if (tokenizer) token_stream_init(&s->tokens, tokenizer, true);
    s->has_text = tokenizer != NULL;
    s->request = request;
    s->capacity = 1024;
    s->text = malloc(s->capacity);
    if (!s->text) FAIL(ERR_NOMEM, "text of a request: out of memory");
    s->text[0] = 0;
    return OK;
}

void text_stream_end(struct text_stream *s)
{
    free(s->text);
    memset(s, 0, sizeof *s);
}

static int make_room(struct text_stream *s, size_t more)
{
    if (s->size + more < s->capacity) return OK;
    size_t capacity = 2 * s->capacity + more;
    char *text = realloc(s->text, capacity);
    if (!text) FAIL(ERR_NOMEM, "text of a request: out of memory");
    s->text = text;
    s->capacity = capacity;
    return OK;
}

/* Looks for a stop string that ends within the newest bytes; the earliest match wins. */
static bool cut_at_stop(struct text_stream *s, size_t new_bytes)
{
    const struct request *r = s->request;
    char *first = NULL;
    size_t length = 0;
    for (int i = 0; i < r->n_stops; i++) {
        size_t n = strlen(r->stop[i]), back = n - 1 + new_bytes;
        size_t from = back < s->size ? s->size - back : 0;
        char *found = memmem(s->text + from, s->size - from, r->stop[i], n);
        if (found && (!first || found < first)) {
            first = found;
            length = n;
        }
    }
    if (!first) return false;
    s->size = (size_t)(first - s->text) + (r->include_stop ? length : 0);
    s->text[s->size] = 0;
    return true;
}

int text_stream_push(struct text_stream *s, int32_t id, bool may_stop, bool *stopped)
{
    *stopped = false;
    if (!s->has_text) return OK;
    TRY(make_room(s, TOKEN_STREAM_BYTES + 1));
    size_t n = token_stream_push(&s->tokens, id, s->text + s->size);
    s->size += n;
    s->text[s->size] = 0;
    if (n && may_stop) *stopped = cut_at_stop(s, n);
    return OK;
}

int text_stream_finish(struct text_stream *s)
{
    if (!s->has_text) return OK;
    TRY(make_room(s, TOKEN_STREAM_BYTES + 1));
    s->size += token_stream_finish(&s->tokens, s->text + s->size);
    s->text[s->size] = 0;
    return OK;
}

/* Length of the longest end of the text that begins a stop string. */
static size_t possible_stop(const struct text_stream *s)
{
    const struct request *r = s->request;
    size_t longest = 0;
    for (int i = 0; i < r->n_stops; i++) {
        size_t n = strlen(r->stop[i]) - 1;
        if (n > s->size) n = s->size;
        while (n > longest && memcmp(s->text + s->size - n, r->stop[i], n)) n--;
        if (n > longest) longest = n;
    }
    return longest;
}

const char *text_stream_show(struct text_stream *s, bool all, size_t *size)
{
    size_t end = s->size, from = s->shown;
    if (!all) {
        /* Cutting before a possible stop string may fall inside a character only if the stop string does; step back. */
        end -= possible_stop(s);
        while (end > from && ((unsigned char)s->text[end] & 0xc0) == 0x80) end--;
    }
    *size = end > from ? end - from : 0;
    s->shown += *size;
    return s->text + from;
}
