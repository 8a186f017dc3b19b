/* tokenizer_added - finds added tokens in a text: at each position the longest one that begins there, left to right. */
#include <stdlib.h>

#include "base/utf8.h"
#include "model/tokenizer_internal.h"

static int new_node(struct tokenizer_trie *trie, unsigned char byte, int32_t *out)
{
    if (trie->n == trie->capacity) {
        int32_t capacity = trie->capacity ? trie->capacity * 2 : 256;
        struct tokenizer_trie_node *node = realloc(trie->node, (size_t)capacity * sizeof *node);
        if (!node) FAIL(ERR_NOMEM, "tokenizer: no memory for added tokens");
        trie->node = node;
        trie->capacity = capacity;
        if (!trie->n) trie->n = 1; /* node 0 means none */
    }
    trie->node[trie->n] = (struct tokenizer_trie_node){.added = -1, .byte = byte};
    *out = trie->n++;
    return OK;
}

int tokenizer__trie_add(struct tokenizer_trie *trie, const char *text, size_t size, int32_t added)
{
    int32_t at = trie->first[(unsigned char)text[0]];
    if (trie->n > (1 << 28)) FAIL(ERR_FORMAT, "tokenizer: too many bytes of added tokens");
    if (!at) {
        TRY(new_node(trie, (unsigned char)text[0], &at));
        trie->first[(unsigned char)text[0]] = at;
    }
    for (size_t i = 1; i < size; i++) {
        unsigned char byte = (unsigned char)text[i];
        int32_t child = trie->node[at].child;
        while (child && trie->node[child].byte != byte) child = trie->node[child].sibling;
        if (!child) {
            TRY(new_node(trie, byte, &child));
            trie->node[child].sibling = trie->node[at].child;
            trie->node[at].child = child;
        }
        at = child;
    }
    trie->node[at].added = added;
    return OK;
}

static bool hidden(const struct tokenizer_encoder *e, int32_t added)
{
    return e->t->added[added].special && !(e->flags & TOKENIZER_PARSE_SPECIAL);
}

/* The longest added token that text begins with; -1 and *size 0 if none. */
static int32_t longest(const struct tokenizer_encoder *e, const struct tokenizer_trie *trie, const char *text,
                       size_t left, size_t *size)
{
    int32_t best = -1, at = trie->first[(unsigned char)text[0]];
    *size = 0;
    for (size_t i = 1; at; i++) {
        int32_t added = trie->node[at].added;
        if (added >= 0 && !(e->t->hide_special && hidden(e, added))) {
            best = added;
            *size = i;
        }
        if (i == left) break;
        at = trie->node[at].child;
        while (at && trie->node[at].byte != (unsigned char)text[i]) at = trie->node[at].sibling;
    }
    return best;
}

static int is_word_char(struct tokenizer_encoder *e, const char *text, size_t size, bool *is)
{
    struct tokenizer_match m = {0, SIZE_MAX, 0, 0};
    return tokenizer__regex_next(e->t->word, e, text, size, &m, is);
}

/* A single_word token counts only where no word character touches it. */
static int stands_alone(struct tokenizer_encoder *e, const char *text, size_t size, size_t start, size_t end, bool *yes)
{
    bool before = false, after = false;
    uint32_t code;
    size_t back = start;
    while (back && ((unsigned char)text[back - 1] & 0xc0) == 0x80) back--;
    if (start) TRY(is_word_char(e, text + back - 1, start - back + 1, &before));
    if (end < size) TRY(is_word_char(e, text + end, utf8_next(text + end, size - end, &code), &after));
    *yes = !before && !after;
    return OK;
}

int tokenizer__added_next(struct tokenizer_encoder *e, const struct tokenizer_trie *trie, const char *text, size_t size,
                          size_t *at, size_t floor, struct tokenizer_found *out, bool *found)
{
    *found = false;
    while (*at < size) {
        size_t length, start = *at;
        int32_t k = trie->n ? longest(e, trie, text + start, size - start, &length) : -1;
        if (!trie->n) *at = size;
        if (k < 0) {
            ++*at;
            continue;
        }
        const struct tokenizer_added *added = &e->t->added[k];
        *at = start + length;
        bool good = !hidden(e, k) && start >= floor;
        if (good && added->single_word) TRY(stands_alone(e, text, size, start, start + length, &good));
        if (!good) continue;
        *out = (struct tokenizer_found){start, start + length, added->id};
        for (size_t n = 1; added->lstrip && n && out->start > floor; out->start -= n)
            n = tokenizer__space_before(text + floor, out->start - floor);
        for (size_t n = 1; added->rstrip && n && out->end < size; out->end += n)
            n = tokenizer__space_at(text + out->end, size - out->end);
        *found = true;
        return OK;
    }
    return OK;
}
