/* tokenizer_bpe - byte-pair encoding of one word by ranked merges.
 *
 * The pair of lowest rank is merged first, the leftmost of equals. Short words, nearly all of them, scan for it; long
 * ones keep a heap of candidates over a linked list, so that a megabyte without a space takes n log n steps. */
#include <stdlib.h>

#include "base/utf8.h"
#include "model/tokenizer_internal.h"

enum { SHORT_WORD = 32 };

static int32_t char_token(const struct tokenizer *t, uint32_t code, const char *text, size_t size)
{
    return code < 0x800 ? t->char_id[code] : tokenizer__lookup(t, text, size);
}

static int add_symbol(struct tokenizer_encoder *e, int32_t id)
{
    TRY(tokenizer__reserve_symbols(e, 1));
    e->symbol[e->n_symbol++] = (struct tokenizer_symbol){.id = id};
    return OK;
}

/* All bytes of a character as byte tokens, if the vocabulary has every one of them. */
static int add_bytes(struct tokenizer_encoder *e, const char *text, size_t size, bool *done)
{
    for (size_t i = 0; i < size; i++)
        if (e->t->byte_id[(unsigned char)text[i]] < 0) return OK;
    *done = true;
    for (size_t i = 0; i < size; i++) TRY(add_symbol(e, e->t->byte_id[(unsigned char)text[i]]));
    return OK;
}

/* The word as characters, bytes and unknowns. An unknown is written when the next known character comes, and byte
 * tokens do not count as one: the reference's order. */
static int symbols_of(struct tokenizer_encoder *e, const char *word, size_t size)
{
    const struct tokenizer *t = e->t;
    bool unknown = false;
    e->n_symbol = 0;
    for (size_t i = 0, step; i < size; i += step) {
        uint32_t code;
        step = utf8_next(word + i, size - i, &code);
        int32_t id = char_token(t, code, word + i, step);
        if (id >= 0) {
            if (unknown) TRY(add_symbol(e, t->unk));
            unknown = false;
            TRY(add_symbol(e, id));
            continue;
        }
        bool done = false;
        if (t->byte_fallback) TRY(add_bytes(e, word + i, step, &done));
        if (done || t->unk < 0) continue;
        if (unknown && !t->fuse_unk) TRY(add_symbol(e, t->unk));
        unknown = true;
    }
    return unknown ? add_symbol(e, t->unk) : OK;
}

static int merge_short(struct tokenizer_encoder *e)
{
    const struct tokenizer_pairs *pairs = &e->t->pairs;
    uint32_t rank[SHORT_WORD];
    int32_t id[SHORT_WORD + 1], merged[SHORT_WORD];
    size_t n = e->n_symbol;
    for (size_t i = 0; i < n; i++) id[i] = e->symbol[i].id;
    for (size_t i = 0; i + 1 < n; i++) {
        const struct tokenizer_pair_value *v = tokenizer__pairs_get(pairs, id[i], id[i + 1]);
        rank[i] = v ? v->rank : UINT32_MAX;
        merged[i] = v ? v->id : -1;
    }
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (rank[i] < rank[best]) best = i;
        if (rank[best] == UINT32_MAX) break;
        id[best] = merged[best];
        n--;
        for (size_t i = best + 1; i < n; i++) id[i] = id[i + 1];
        for (size_t i = best; i + 1 < n; i++) {
            rank[i] = rank[i + 1];
            merged[i] = merged[i + 1];
        }
        for (size_t i = best ? best - 1 : 0; i <= best && i + 1 < n; i++) {
            const struct tokenizer_pair_value *v = tokenizer__pairs_get(pairs, id[i], id[i + 1]);
            rank[i] = v ? v->rank : UINT32_MAX;
            merged[i] = v ? v->id : -1;
        }
    }
    for (size_t i = 0; i < n; i++) TRY(tokenizer__emit(e, id[i]));
    return OK;
}

static int push_pair(struct tokenizer_encoder *e, int32_t left)
{
    if (left < 0 || e->symbol[left].next < 0) return OK;
    const struct tokenizer_pair_value *v =
        tokenizer__pairs_get(&e->t->pairs, e->symbol[left].id, e->symbol[e->symbol[left].next].id);
    if (!v) return OK;
    return tokenizer__heap_push(e, (struct tokenizer_heap_entry){(uint64_t)v->rank << 32 | (uint32_t)left, 0});
}

static int merge_long(struct tokenizer_encoder *e)
{
    struct tokenizer_symbol *s = e->symbol;
    int32_t n = (int32_t)e->n_symbol;
    for (int32_t i = 0; i < n; i++) {
        s[i].prev = i - 1;
        s[i].next = i + 1 < n ? i + 1 : -1;
    }
    e->n_heap = 0;
    for (int32_t i = 0; i + 1 < n; i++) TRY(push_pair(e, i));
    while (e->n_heap) {
        uint64_t key = tokenizer__heap_pop(e).key;
        int32_t left = (int32_t)(uint32_t)key, right = s[left].next;
        if (s[left].id < 0 || right < 0) continue;
        const struct tokenizer_pair_value *v = tokenizer__pairs_get(&e->t->pairs, s[left].id, s[right].id);
        if (!v || v->rank != key >> 32) continue; /* one side has changed since */
        s[left].id = v->id;
        s[left].next = s[right].next;
        if (s[right].next >= 0) s[s[right].next].prev = left;
        s[right].id = -1;
        TRY(push_pair(e, s[left].prev));
        TRY(push_pair(e, left));
    }
    for (int32_t i = 0; i >= 0 && i < n; i = s[i].next) TRY(tokenizer__emit(e, s[i].id));
    return OK;
}

int tokenizer__bpe_word(struct tokenizer_encoder *e, const char *word, size_t size)
{
    if (e->t->ignore_merges) {
        int32_t whole = tokenizer__lookup(e->t, word, size);
        if (whole >= 0) return tokenizer__emit(e, whole);
    }
    TRY(symbols_of(e, word, size));
    if (!e->n_symbol) return OK;
    return e->n_symbol <= SHORT_WORD ? merge_short(e) : merge_long(e);
}
