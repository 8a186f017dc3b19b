/* tokenizer_gguf - tokenizers from the vocabulary that a GGUF file carries in its metadata.
 *
 * Kind SPM: scores decide merges, spaces are written as U+2581, unknown characters as byte tokens. Kind BPE: byte-level
 * merges by rank; a name ("pre") says which expressions cut the text into words. Begin and end tokens, and the
 * expressions, are as llama.cpp has them for these names; a name it does not list is refused. */
#include <stdlib.h>

#include "model/tokenizer_internal.h"

#define META "\xe2\x96\x81" /* U+2581 */

#define LLAMA3_TAIL " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define CONTRACTIONS "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"

/* Which pre-tokenizer a name means. Expressions run one after the other, each on the pieces that the last one left. */
struct pre {
    const char *names[8];
    const char *split[4];
    bool ignore_merges, add_bos;
};
static const struct pre pres[] = {
    {{"llama-bpe", "llama3", "llama-v3", "llama-3"}, {CONTRACTIONS "\\p{N}{1,3}|" LLAMA3_TAIL}, true, true},
    {{"qwen2", "deepseek-r1-qwen"}, {CONTRACTIONS "\\p{N}|" LLAMA3_TAIL}, false, false},
    {{"smollm", "starcoder", "refact", "command-r", "codeshell"}, {"\\p{N}", tokenizer__gpt2_pattern}, false, false},
    {{"gpt-2", "gpt2", "phi-2", "mpt", "olmo"}, {tokenizer__gpt2_pattern}, false, false},
    {{"default"}, {"[\\p{P}\\$\\+<=>\\^~\\|]+", tokenizer__gpt2_pattern, "\\p{N}+", "[0-9][0-9][0-9]"}, false, false},
};

static const struct pre *find_pre(const char *name)
{
    for (size_t i = 0; i < sizeof pres / sizeof *pres; i++)
        for (size_t k = 0; k < 8 && pres[i].names[k]; k++)
            if (!strcmp(pres[i].names[k], name ? name : "default")) return &pres[i];
    return NULL;
}

static int set_up_bpe(struct tokenizer *t, const struct tokenizer_vocab *v, const char *what, bool *add_bos)
{
    const struct pre *pre = find_pre(v->pre);
    if (!pre)
        FAIL(ERR_UNSUPPORTED,
             "%s: tokenizer.ggml.pre \"%.60s\" is not supported; known are llama-bpe, qwen2, smollm, gpt-2, default",
             what, v->pre);
    for (size_t i = 0; i < 4 && pre->split[i]; i++)
        TRY(tokenizer__add_split(t, pre->split[i], false, SPLIT_ISOLATED, false, what));
    t->ignore_merges = pre->ignore_merges;
    *add_bos = pre->add_bos;
    return tokenizer__add_step(t, &(struct tokenizer_step){.kind = STEP_BYTES}, what);
}

static int set_up_spm(struct tokenizer *t, const struct tokenizer_vocab *v, const char *what, bool *add_bos)
{
    struct tokenizer_normalize_step replace = {.kind = NORMALIZE_REPLACE};
    if (!v->score) FAIL(ERR_FORMAT, "%s: tokenizer.ggml.scores is missing; a \"llama\" vocabulary needs it", what);
    t->score = malloc((size_t)v->n * sizeof *t->score);
    if (!t->score) FAIL(ERR_NOMEM, "%s: out of memory", what);
    for (int i = 0; i < v->n; i++) {
        if (v->score[i] != v->score[i]) FAIL(ERR_FORMAT, "%s: tokenizer.ggml.scores: entry %d is no number", what, i);
        t->score[i] = v->score[i] + 0.0f; /* -0 and 0 are one score */
    }
    if (v->add_space_prefix) {
        struct tokenizer_normalize_step prepend = {.kind = NORMALIZE_PREPEND};
        TRY(tokenizer__add_normalize(t, &prepend, META, what));
        t->strip = ' ';
        t->n_strip = 1;
    }
    TRY(tokenizer__regex_open(" ", 1, true, what, &replace.regex));
    int rc = tokenizer__add_normalize(t, &replace, META, what);
    if (rc) tokenizer__regex_close(replace.regex);
    *add_bos = true;
    return rc;
}

static int set_spm_piece(struct tokenizer *t, int32_t id, struct tokenizer_buffer *piece)
{
    const char *text = tokenizer__text(t, id), *end = text + t->token[id].size, *hit;
    piece->size = 0;
    for (; (hit = memmem(text, (size_t)(end - text), META, 3)); text = hit + 3) {
        TRY(tokenizer__append(piece, text, (size_t)(hit - text)));
        TRY(tokenizer__append(piece, " ", 1));
    }
    TRY(tokenizer__append(piece, text, (size_t)(end - text)));
    return tokenizer__set_piece(t, id, piece->data, piece->size);
}

/* What a token decodes to: control and user-defined ones to their text as it stands. */
static int set_piece(struct tokenizer *t, int32_t id, int type, struct tokenizer_buffer *piece)
{
    const char *text = tokenizer__text(t, id);
    size_t size = t->token[id].size;
    if (type == TOKENIZER_TYPE_CONTROL || type == TOKENIZER_TYPE_UNKNOWN || type == TOKENIZER_TYPE_USER_DEFINED)
        return tokenizer__set_piece(t, id, text, size);
    if (type == TOKENIZER_TYPE_BYTE && tokenizer__byte_token(text, size) >= 0) {
        char byte = (char)tokenizer__byte_token(text, size);
        return tokenizer__set_piece(t, id, &byte, 1);
    }
    if (t->kind == TOKENIZER_SPM) return set_spm_piece(t, id, piece);
    piece->size = 0;
    TRY(tokenizer__unmap_bytes(text, size, piece));
    return tokenizer__set_piece(t, id, piece->data, piece->size);
}

static int read_token(struct tokenizer *t, const struct tokenizer_vocab *v, int32_t id, const char *what,
                      struct tokenizer_buffer *piece)
{
    int type = v->type ? v->type[id] : TOKENIZER_TYPE_NORMAL;
    int32_t other;
    size_t size = v->token_size[id];
    TRY(tokenizer__set_token(t, id, v->token[id], size, 0, what));
    TRY(tokenizer__enter(t, id, &other)); /* of equal tokens the first is used, the others can only be decoded */
    TRY(set_piece(t, id, type, piece));
    bool special = type == TOKENIZER_TYPE_CONTROL || type == TOKENIZER_TYPE_UNKNOWN;
    if (special) t->token[id].flags |= TOKEN_SPECIAL;
    if (!special && type != TOKENIZER_TYPE_USER_DEFINED) return OK;
    if (!size || !tokenizer__is_utf8(v->token[id], size)) return OK; /* cannot stand in a text */
    return tokenizer__add_token(t, &(struct tokenizer_added){.id = id, .special = special}, what);
}

static int read_merges(struct tokenizer *t, const struct tokenizer_vocab *v, const char *what)
{
    if (v->n_merges < 0 || v->n_merges > TOKENIZER_MAX_TOKENS)
        FAIL(ERR_FORMAT, "%s: tokenizer.ggml.merges: %d entries; at most %d", what, v->n_merges, TOKENIZER_MAX_TOKENS);
    TRY(tokenizer__pairs_reserve(&t->pairs, (size_t)v->n_merges));
    for (int i = 0; i < v->n_merges; i++) {
        const char *merge = v->merge[i];
        size_t size = v->merge_size[i];
        /* A part may begin with a space in no byte-level vocabulary; the search skips the first byte all the same. */
        const char *space = size > 1 ? memchr(merge + 1, ' ', size - 1) : NULL;
        if (!space || space + 1 == merge + size)
            FAIL(ERR_FORMAT, "%s: tokenizer.ggml.merges: entry %d is not \"left right\"", what, i);
        size_t left = (size_t)(space - merge);
        TRY(tokenizer__add_merge(t, merge, left, space + 1, size - left - 1, (uint32_t)i, what));
    }
    return OK;
}

static int check_id(int id, const char *key, const struct tokenizer_vocab *v, const char *what, int32_t *out)
{
    if (id < -1 || id >= v->n) FAIL(ERR_FORMAT, "%s: tokenizer.ggml.%s %d; 0 to %d expected", what, key, id, v->n - 1);
    *out = id;
    return OK;
}

static int frame(struct tokenizer *t, const struct tokenizer_vocab *v, bool add_bos, const char *what)
{
    TRY(check_id(v->bos, "bos_token_id", v, what, &t->bos));
    TRY(check_id(v->eos, "eos_token_id", v, what, &t->eos));
    TRY(check_id(v->unk, "unknown_token_id", v, what, &t->unk));
    if (v->add_bos >= 0) add_bos = v->add_bos != 0;
    if ((v->add_bos > 0 && t->bos < 0) || (v->add_eos > 0 && t->eos < 0))
        FAIL(ERR_FORMAT, "%s: tokenizer.ggml.add_bos_token or add_eos_token is set, but that token has no id", what);
    if (add_bos && t->bos >= 0) t->prefix[t->n_prefix++] = t->bos;
    if (v->add_eos > 0) t->suffix[t->n_suffix++] = t->eos;
    return OK;
}

static int fill(struct tokenizer *t, const struct tokenizer_vocab *v, const char *what, struct tokenizer_buffer *piece)
{
    bool add_bos = false;
    t->hide_special = true;
    TRY(tokenizer__resize(t, v->n, what));
    TRY(v->kind == TOKENIZER_SPM ? set_up_spm(t, v, what, &add_bos) : set_up_bpe(t, v, what, &add_bos));
    for (int32_t id = 0; id < v->n; id++) TRY(read_token(t, v, id, what, piece));
    if (v->kind == TOKENIZER_BPE) TRY(read_merges(t, v, what));
    TRY(frame(t, v, add_bos, what));
    if (v->kind == TOKENIZER_BPE) t->unk = -1; /* byte-level text has no unknowns */
    return tokenizer__finish(t, what);
}

int tokenizer_open_vocab(const struct tokenizer_vocab *vocab, const char *what, struct tokenizer **out)
{
    if (vocab->kind != TOKENIZER_SPM && vocab->kind != TOKENIZER_BPE)
        FAIL(ERR_ARG, "%s: tokenizer kind %d", what, (int)vocab->kind);
    if (vocab->n < 1 || vocab->n > TOKENIZER_MAX_TOKENS)
        FAIL(ERR_FORMAT, "%s: tokenizer.ggml.tokens: %d entries; 1 to %d expected", what, vocab->n,
             TOKENIZER_MAX_TOKENS);
    struct tokenizer *t = tokenizer__new(vocab->kind);
    if (!t) FAIL(ERR_NOMEM, "%s: out of memory", what);
    struct tokenizer_buffer piece = {0};
    int rc = fill(t, vocab, what, &piece);
    free(piece.data);
    if (rc) {
        tokenizer_close(t);
        return rc;
    }
    *out = t;
    return OK;
}
