/* tokenizer_normalize - the normalizer steps of a tokenizer.json, from text to text.
 *
 * Canonical normalization (NFC, NFD) follows UAX 15: decompose, order by combining class, compose. The tables come from
 * tests/tools/make_tokenizer_unicode.py. The compatibility forms (NFKC, NFKD) are not served. */
#include <stdlib.h>

#include "base/utf8.h"
#include "model/tokenizer_internal.h"
#include "model/tokenizer_unicode.h"

static bool is_space(uint32_t c)
{
    return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
           c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

size_t tokenizer__space_at(const char *text, size_t size)
{
    uint32_t code = 0;
    size_t n = size ? utf8_next(text, size, &code) : 0;
    return is_space(code) ? n : 0;
}

size_t tokenizer__space_before(const char *text, size_t size)
{
    size_t start = size;
    uint32_t code;
    if (!size) return 0;
    do start--;
    while (start && ((unsigned char)text[start] & 0xc0) == 0x80);
    utf8_next(text + start, size - start, &code);
    return is_space(code) ? size - start : 0;
}

/* ---- canonical forms ---- */

enum { HANGUL = 0xac00, N_HANGUL = 11172, LEAD = 0x1100, VOWEL = 0x1161, TRAIL = 0x11a7, N_VOWEL = 21, N_TRAIL = 28 };

struct point {
    uint32_t code, order; /* order: place before sorting */
    unsigned char class;
};

/* Characters of a stretch that begins with a starter; its length is bounded by the text's. */
struct points {
    struct point *at;
    size_t n, capacity;
};

static unsigned char combining_class(uint32_t code)
{
    size_t low = 0, high = sizeof tokenizer_classes / sizeof *tokenizer_classes;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (code > tokenizer_classes[middle].last)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == sizeof tokenizer_classes / sizeof *tokenizer_classes || code < tokenizer_classes[low].first) return 0;
    return tokenizer_classes[low].class;
}

static const struct tokenizer_decomposition *decomposition(uint32_t code)
{
    size_t low = 0, n = sizeof tokenizer_decompositions / sizeof *tokenizer_decompositions, high = n;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (code > tokenizer_decompositions[middle].code)
            low = middle + 1;
        else
            high = middle;
    }
    return low < n && tokenizer_decompositions[low].code == code ? &tokenizer_decompositions[low] : NULL;
}

/* Primary composites only: singletons and excluded characters have no `compose` mark. */
static uint32_t composition(uint32_t a, uint32_t b)
{
    if (a >= LEAD && a < LEAD + 19 && b >= VOWEL && b < VOWEL + N_VOWEL)
        return HANGUL + ((a - LEAD) * N_VOWEL + (b - VOWEL)) * N_TRAIL;
    if (a >= HANGUL && a < HANGUL + N_HANGUL && (a - HANGUL) % N_TRAIL == 0 && b > TRAIL && b < TRAIL + N_TRAIL)
        return a + (b - TRAIL);
    size_t low = 0, n = sizeof tokenizer_compositions / sizeof *tokenizer_compositions, high = n;
    while (low < high) {
        size_t middle = (low + high) / 2;
        const struct tokenizer_composition *c = &tokenizer_compositions[middle];
        if (a > c->first || (a == c->first && b > c->second))
            low = middle + 1;
        else
            high = middle;
    }
    if (low < n && tokenizer_compositions[low].first == a && tokenizer_compositions[low].second == b)
        return tokenizer_compositions[low].code;
    return 0;
}

static int add_point(struct points *p, uint32_t code)
{
    if (p->n == p->capacity) {
        size_t capacity = p->capacity ? p->capacity * 2 : 64;
        struct point *at = realloc(p->at, capacity * sizeof *at);
        if (!at) FAIL(ERR_NOMEM, "tokenizer: no memory to normalize the text");
        p->at = at;
        p->capacity = capacity;
    }
    p->at[p->n] = (struct point){code, (uint32_t)p->n, combining_class(code)};
    p->n++;
    return OK;
}

static int by_class(const void *a, const void *b)
{
    const struct point *x = a, *y = b;
    if (x->class != y->class) return x->class < y->class ? -1 : 1;
    return x->order < y->order ? -1 : x->order > y->order;
}

/* Puts every run of marks into the order of their classes; equal classes keep the order of the text. */
static void order_marks(struct points *p)
{
    for (size_t i = 0; i < p->n;) {
        size_t end = i;
        bool sorted = true;
        for (; end < p->n && p->at[end].class; end++)
            if (end > i && p->at[end].class < p->at[end - 1].class) sorted = false;
        if (!sorted) qsort(p->at + i, end - i, sizeof *p->at, by_class);
        i = end + 1;
    }
}

static int decompose(struct points *p, uint32_t code)
{
    if (code >= HANGUL && code < HANGUL + N_HANGUL) {
        uint32_t k = code - HANGUL;
        TRY(add_point(p, LEAD + k / (N_VOWEL * N_TRAIL)));
        TRY(add_point(p, VOWEL + k % (N_VOWEL * N_TRAIL) / N_TRAIL));
        return k % N_TRAIL ? add_point(p, TRAIL + k % N_TRAIL) : OK;
    }
    const struct tokenizer_decomposition *d = decomposition(code);
    if (!d) return add_point(p, code);
    for (size_t i = 0; i < d->n; i++) TRY(add_point(p, tokenizer_decomposed[d->at + i]));
    return OK;
}

/* Writes a stretch; what follows the first starter may combine with it. */
static int flush(struct points *p, bool compose, struct tokenizer_buffer *out)
{
    size_t starter = 0, kept = p->n ? 1 : 0;
    unsigned char last = 0;
    order_marks(p);
    for (size_t i = 1; compose && i < p->n; i++) {
        struct point c = p->at[i];
        bool blocked = kept - 1 > starter && (last >= c.class || !last);
        uint32_t both = !blocked && !p->at[starter].class ? composition(p->at[starter].code, c.code) : 0;
        if (both) {
            p->at[starter].code = both;
            continue;
        }
        if (!c.class) starter = kept;
        last = c.class;
        p->at[kept++] = c;
    }
    if (!compose) kept = p->n;
    TRY(tokenizer__reserve(out, 4 * kept));
    for (size_t i = 0; i < kept; i++) out->size += utf8_put(p->at[i].code, out->data + out->size);
    p->n = 0;
    return OK;
}

/* A character that neither changes nor combines with what stands before it: the stretch may end there. */
static bool is_boundary(uint32_t code)
{
    return code < 0x300 || (code >= 0x3041 && code < 0x3097) || (code >= 0x3400 && code < 0xa000);
}

int tokenizer__normal_form(const char *text, size_t size, bool compose, struct tokenizer_buffer *out)
{
    struct points p = {0};
    int rc = OK;
    for (size_t i = 0; i < size && !rc;) {
        uint32_t code;
        i += utf8_next(text + i, size - i, &code);
        if (is_boundary(code)) rc = flush(&p, compose, out);
        if (!rc) rc = decompose(&p, code);
    }
    if (!rc) rc = flush(&p, compose, out);
    free(p.at);
    return rc;
}

/* Nothing below U+0300 changes under NFC, nothing below U+00C0 under NFD. */
static bool is_plain(const char *text, size_t size, unsigned char below)
{
    for (size_t i = 0; i < size; i++)
        if ((unsigned char)text[i] >= below) return false;
    return true;
}

/* ---- steps ---- */

static int replace(struct tokenizer_encoder *e, const struct tokenizer_normalize_step *s, const char *text, size_t size,
                   struct tokenizer_buffer *out)
{
    struct tokenizer_match m = {0, SIZE_MAX, 0, 0};
    size_t done = 0;
    for (;;) {
        bool found;
        TRY(tokenizer__regex_next(s->regex, e, text, size, &m, &found));
        TRY(tokenizer__append(out, text + done, (found ? m.start : size) - done));
        if (!found) return OK;
        TRY(tokenizer__append(out, s->content, s->content_size));
        if (out->size > 8u * TOKENIZER_MAX_TEXT) FAIL(ERR_REQUEST, "text grows too large in the normalizer");
        done = m.end;
    }
}

static int run_step(struct tokenizer_encoder *e, const struct tokenizer_normalize_step *s, const char **text,
                    size_t *size, struct tokenizer_buffer *out)
{
    size_t n;
    bool compose = s->kind == NORMALIZE_NFC;
    out->size = 0;
    switch (s->kind) {
    case NORMALIZE_STRIP:
        while (s->left && (n = tokenizer__space_at(*text, *size))) *text += n, *size -= n;
        while (s->right && (n = tokenizer__space_before(*text, *size))) *size -= n;
        return OK;
    case NORMALIZE_NFC:
    case NORMALIZE_NFD:
        if (is_plain(*text, *size, compose ? 0xcc : 0xc3)) return OK;
        TRY(tokenizer__normal_form(*text, *size, compose, out));
        break;
    case NORMALIZE_PREPEND:
        if (!*size) return OK;
        TRY(tokenizer__append(out, s->content, s->content_size));
        TRY(tokenizer__append(out, *text, *size));
        break;
    case NORMALIZE_REPLACE:
        if (!*size) return OK;
        TRY(replace(e, s, *text, *size, out));
        break;
    }
    *text = out->data;
    *size = out->size;
    return OK;
}

int tokenizer__normalize(struct tokenizer_encoder *e, const char *text, size_t size, const char **out, size_t *out_size)
{
    int in = 1; /* the buffer that the text may be in: the next step writes into the other one */
    for (int i = 0; i < e->t->n_normalize; i++) {
        TRY(run_step(e, &e->t->normalize[i], &text, &size, &e->normal[!in]));
        if (text == e->normal[!in].data) in = !in;
    }
    *out = text;
    *out_size = size;
    return OK;
}
