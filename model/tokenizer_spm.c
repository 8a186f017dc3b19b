/* tokenizer_spm - SentencePiece's BPE as GGUF stores it: no list of merges; two neighbours merge if their text together
 * is a token, that of the highest score first, the leftmost of equals. What stays unknown is written as bytes. */
#include <stdlib.h>

#include "base/utf8.h"
#include "model/tokenizer_internal.h"

/* Orders floats as unsigned integers, the highest score smallest. */
static uint32_t score_key(float score)
{
    uint32_t bits;
    memcpy(&bits, &score, sizeof bits);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return ~bits;
}

static int push_pair(struct tokenizer_encoder *e, const char *word, int32_t left)
{
    if (left < 0 || e->symbol[left].next < 0) return OK;
    const struct tokenizer_symbol *a = &e->symbol[left], *b = &e->symbol[a->next];
    uint32_t size = a->size + b->size;
    if (size > e->t->longest) return OK;
    int32_t id = tokenizer__lookup(e->t, word + a->start, size);
    if (id < 0) return OK;
    uint64_t key = (uint64_t)score_key(e->t->score[id]) << 32 | (uint32_t)left;
    return tokenizer__heap_push(e, (struct tokenizer_heap_entry){key, size});
}

static int emit_symbol(struct tokenizer_encoder *e, const char *text, size_t size)
{
    int32_t id = tokenizer__lookup(e->t, text, size);
    if (id >= 0) return tokenizer__emit(e, id);
    for (size_t i = 0; i < size; i++) {
        id = e->t->byte_id[(unsigned char)text[i]];
        if (id < 0) id = e->t->unk;
        if (id >= 0) TRY(tokenizer__emit(e, id));
    }
    return OK;
}

int tokenizer__spm_word(struct tokenizer_encoder *e, const char *word, size_t size)
{
    e->n_symbol = 0;
    for (size_t i = 0, step; i < size; i += step) {
        uint32_t code;
        step = utf8_next(word + i, size - i, &code);
        TRY(tokenizer__reserve_symbols(e, 1));
        int32_t k = (int32_t)e->n_symbol++;
        e->symbol[k] = (struct tokenizer_symbol){
            .prev = k - 1, .next = i + step < size ? k + 1 : -1, .start = (uint32_t)i, .size = (uint32_t)step};
    }
    struct tokenizer_symbol *s = e->symbol;
    e->n_heap = 0;
    for (int32_t i = 0; i < (int32_t)e->n_symbol; i++) TRY(push_pair(e, word, i));
    while (e->n_heap) {
        struct tokenizer_heap_entry top = tokenizer__heap_pop(e);
        int32_t left = (int32_t)(uint32_t)top.key, right = s[left].next;
        if (!s[left].size || right < 0 || s[left].size + s[right].size != top.size) continue;
        s[left].size = top.size;
        s[right].size = 0;
        s[left].next = s[right].next;
        if (s[right].next >= 0) s[s[right].next].prev = left;
        TRY(push_pair(e, word, s[left].prev));
        TRY(push_pair(e, word, left));
    }
    for (int32_t i = 0; i >= 0; i = s[i].next) TRY(emit_symbol(e, word + s[i].start, s[i].size));
    return OK;
}
