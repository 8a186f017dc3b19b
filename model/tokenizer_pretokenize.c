/* tokenizer_pretokenize - cuts a segment into words and hands each to the model.
 *
 * The steps of a pre-tokenizer run depth first: a piece that one step cuts off goes through all later steps and is
 * encoded before the next piece is sought, so memory does not grow with the number of words. */
#include <stdlib.h>

#include "base/utf8.h"
#include "model/tokenizer_internal.h"

/* The expression of GPT-2's tokenizer, which ByteLevel uses. */
const char tokenizer__gpt2_pattern[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

uint32_t tokenizer__byte_char(unsigned char byte)
{
    if ((byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad)) return byte;
    if (byte <= 0x20) return 0x100u + byte;
    if (byte == 0xad) return 0x143;
    return 0x100u + 33 + (byte - 0x7fu);
}

int tokenizer__char_byte(uint32_t code)
{
    if ((code >= 0x21 && code <= 0x7e) || (code >= 0xa1 && code <= 0xff && code != 0xad)) return (int)code;
    if (code < 0x100 || code > 0x143) return -1;
    if (code <= 0x120) return (int)code - 0x100;
    if (code == 0x143) return 0xad;
    return (int)code - 0x100 - 33 + 0x7f;
}

static int run(struct tokenizer_encoder *e, int step, const char *text, size_t size, bool first);

struct cutter {
    struct tokenizer_encoder *e;
    int step;
    const char *text;
    bool first, held, was_match; /* was_match: the last event was one */
    size_t start, end;           /* the piece held back */
};

static int pass_on(struct cutter *c, size_t start, size_t end)
{
    if (start == end) return OK;
    return run(c->e, c->step + 1, c->text + start, end - start, c->first && !start);
}

/* Takes the next stretch of text, a match or what lies between two, and passes on every piece that is settled. */
static int take(struct cutter *c, size_t start, size_t end, bool match)
{
    const struct tokenizer_step *s = &c->e->t->step[c->step];
    match ^= s->invert;
    if (s->behavior == SPLIT_ISOLATED) return pass_on(c, start, end);
    if (s->behavior == SPLIT_REMOVED) return match ? OK : pass_on(c, start, end);
    bool join = false;
    if (s->behavior == SPLIT_PREVIOUS) join = c->held && match && !c->was_match;
    if (s->behavior == SPLIT_CONTIGUOUS) join = c->held && match == c->was_match;
    if (s->behavior == SPLIT_NEXT) join = c->held && !match && c->was_match;
    c->was_match = match;
    if (join) {
        c->end = end;
        return OK;
    }
    if (c->held) TRY(pass_on(c, c->start, c->end));
    c->held = true;
    c->start = start;
    c->end = end;
    return OK;
}

static int split(struct tokenizer_encoder *e, int step, const char *text, size_t size, bool first)
{
    struct cutter c = {.e = e, .step = step, .text = text, .first = first};
    struct tokenizer_match m = {0, SIZE_MAX, 0, 0};
    size_t end = 0;
    for (;;) {
        bool found;
        TRY(tokenizer__regex_next(e->t->step[step].regex, e, text, size, &m, &found));
        if (!found) break;
        if (m.start > end) TRY(take(&c, end, m.start, false));
        TRY(take(&c, m.start, m.end, true));
        end = m.end;
    }
    if (end < size) TRY(take(&c, end, size, false));
    return c.held ? pass_on(&c, c.start, c.end) : OK;
}

static int map_bytes(struct tokenizer_encoder *e, int step, const char *text, size_t size, bool first)
{
    struct tokenizer_buffer *b = &e->scratch[step];
    b->size = 0;
    TRY(tokenizer__reserve(b, 2 * size));
    char *to = b->data;
    for (size_t i = 0; i < size; i++) to += utf8_put(tokenizer__byte_char((unsigned char)text[i]), to);
    b->size = (size_t)(to - b->data);
    return run(e, step + 1, b->data, b->size, first);
}

static int prefix_space(struct tokenizer_encoder *e, int step, const char *text, size_t size, bool first)
{
    struct tokenizer_buffer *b = &e->scratch[step];
    if (*text == ' ') return run(e, step + 1, text, size, first);
    b->size = 0;
    TRY(tokenizer__append(b, " ", 1));
    TRY(tokenizer__append(b, text, size));
    return run(e, step + 1, b->data, b->size, first);
}

static int metaspace(struct tokenizer_encoder *e, int step, const char *text, size_t size, bool first)
{
    const struct tokenizer_step *s = &e->t->step[step];
    struct tokenizer_buffer *b = &e->scratch[step];
    bool has = *text == ' ' || (size >= s->replacement_size && !memcmp(text, s->replacement, s->replacement_size));
    b->size = 0;
    if (!has && (s->prepend == PREPEND_ALWAYS || (s->prepend == PREPEND_FIRST && first)))
        TRY(tokenizer__append(b, s->replacement, s->replacement_size));
    for (const char *end = text + size; text < end;) {
        const char *space = memchr(text, ' ', (size_t)(end - text));
        const char *stop = space ? space : end;
        TRY(tokenizer__append(b, text, (size_t)(stop - text)));
        if (space) TRY(tokenizer__append(b, s->replacement, s->replacement_size));
        text = stop + (space != NULL);
    }
    return run(e, step + 1, b->data, b->size, first);
}

static int run(struct tokenizer_encoder *e, int step, const char *text, size_t size, bool first)
{
    if (step == e->t->n_step)
        return e->t->kind == TOKENIZER_SPM ? tokenizer__spm_word(e, text, size) : tokenizer__bpe_word(e, text, size);
    switch (e->t->step[step].kind) {
    case STEP_SPLIT: return split(e, step, text, size, first);
    case STEP_BYTES: return map_bytes(e, step, text, size, first);
    case STEP_PREFIX_SPACE: return prefix_space(e, step, text, size, first);
    case STEP_METASPACE: return metaspace(e, step, text, size, first);
    }
    FAIL(ERR_BUG, "tokenizer: step %d has no kind", step);
}

int tokenizer__pretokenize(struct tokenizer_encoder *e, const char *text, size_t size, bool first)
{
    return size ? run(e, 0, text, size, first) : OK;
}
