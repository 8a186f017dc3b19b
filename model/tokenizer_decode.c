/* tokenizer_decode - ids to text, whole or as a stream.
 *
 * Every token's bytes are fixed when the tokenizer is opened, so decoding appends them; only the start of a text
 * differs (spaces that the tokenizer added are dropped). The whole text is decoded through the stream, which is why the
 * two always agree. An invalid sequence gives one U+FFFD for what Python counts as one error, also among byte tokens,
 * where the tokenizers library would give one for each byte of the run. */
#include <stdlib.h>

#include "base/utf8.h"
#include "model/tokenizer_internal.h"

void token_stream_init(struct token_stream *stream, const struct tokenizer *t, bool skip_special)
{
    *stream = (struct token_stream){.tokenizer = t, .skip_special = skip_special};
}

/* Valid characters of bytes[0..size) to out; a character that more bytes could complete is held back. */
static size_t put_complete(struct token_stream *s, const char *bytes, size_t size, char *out)
{
    size_t pending = utf8_pending(bytes, size);
    char *to = out;
    for (size_t i = 0; i < size - pending;) {
        uint32_t code;
        i += utf8_next(bytes + i, size - pending - i, &code);
        to += utf8_put(code, to);
    }
    memmove(s->held, bytes + size - pending, pending);
    s->n_held = (unsigned char)pending;
    return (size_t)(to - out);
}

/* The first token without the characters that the decoder drops in it. */
static size_t first_token(const struct tokenizer *t, int32_t id, char *out)
{
    const char *text = tokenizer__text(t, id), *end = text + t->token[id].size;
    char *to = out;
    while (text < end) {
        if ((size_t)(end - text) >= t->drop_size && !memcmp(text, t->drop, t->drop_size))
            text += t->drop_size;
        else
            *to++ = *text++;
    }
    return (size_t)(to - out);
}

size_t token_stream_push(struct token_stream *s, int32_t id, char *out)
{
    const struct tokenizer *t = s->tokenizer;
    char bytes[TOKENIZER_MAX_TOKEN + 8];
    if (id < 0 || id >= t->n || !(t->token[id].flags & TOKEN_PRESENT)) return 0;
    if (s->skip_special && t->token[id].flags & TOKEN_SPECIAL) return 0;
    const char *piece = t->pieces.data + t->token[id].piece;
    size_t size = t->token[id].piece_size, held = s->n_held;
    memcpy(bytes, s->held, held);
    if (!s->seen_token && t->drop_size && !(t->token[id].flags & TOKEN_RAW)) {
        size = first_token(t, id, bytes + held);
    } else {
        while (!s->seen_text && size && s->n_stripped < t->n_strip && *piece == t->strip)
            piece++, size--, s->n_stripped++;
        memcpy(bytes + held, piece, size);
    }
    s->seen_token = true;
    if (size) s->seen_text = true;
    return put_complete(s, bytes, held + size, out);
}

size_t token_stream_finish(struct token_stream *s, char *out)
{
    size_t size = s->n_held ? utf8_put(0xfffd, out) : 0;
    token_stream_init(s, s->tokenizer, s->skip_special);
    return size;
}

int tokenizer_decode(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip_special, char **text,
                     size_t *size)
{
    struct tokenizer_buffer out = {0};
    struct token_stream stream;
    char part[TOKEN_STREAM_BYTES];
    int rc = tokenizer__reserve(&out, 4 * n);
    token_stream_init(&stream, t, skip_special);
    for (size_t i = 0; i < n && !rc; i++) rc = tokenizer__append(&out, part, token_stream_push(&stream, ids[i], part));
    if (!rc) rc = tokenizer__append(&out, part, token_stream_finish(&stream, part));
    if (rc) {
        free(out.data);
        return rc;
    }
    out.data[out.size] = 0; /* reserve keeps one byte more than asked for */
    *text = out.data;
    *size = out.size;
    return OK;
}
