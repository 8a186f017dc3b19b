/* tokenizer_table - storage of a vocabulary: token texts in one buffer, lookup by text, merges by pair of ids.
 * Open addressing at most half full, so that a lookup is one cache miss or two. */
#include <stdlib.h>

#include "base/tensor.h"
#include "base/utf8.h"
#include "model/tokenizer_internal.h"

int tokenizer__reserve(struct tokenizer_buffer *b, size_t more)
{
    size_t need;
    if (size_add(b->size, more, &need) || size_add(need, 1, &need)) FAIL(ERR_NOMEM, "tokenizer: text too large");
    if (need <= b->capacity) return OK;
    size_t capacity = b->capacity * 2 > need ? b->capacity * 2 : need;
    if (capacity < 256) capacity = 256;
    char *data = realloc(b->data, capacity);
    if (!data) FAIL(ERR_NOMEM, "tokenizer: no memory for %zu bytes of text", capacity);
    b->data = data;
    b->capacity = capacity;
    return OK;
}

int tokenizer__append(struct tokenizer_buffer *b, const char *bytes, size_t size)
{
    TRY(tokenizer__reserve(b, size));
    if (size) memcpy(b->data + b->size, bytes, size);
    b->size += size;
    return OK;
}

bool tokenizer__is_utf8(const char *text, size_t size)
{
    for (size_t i = 0; i < size;) {
        uint32_t code;
        size_t n = utf8_next(text + i, size - i, &code);
        if (code == 0xfffd && (n != 3 || memcmp(text + i, "\xef\xbf\xbd", 3))) return false; /* not itself U+FFFD */
        i += n;
    }
    return true;
}

static uint64_t hash_bytes(const char *text, size_t size)
{
    uint64_t h = size * 0x9e3779b97f4a7c15u, word;
    for (; size >= 8; text += 8, size -= 8) {
        memcpy(&word, text, 8);
        h = (h ^ word) * 0xff51afd7ed558ccdu;
        h ^= h >> 32;
    }
    word = 0;
    memcpy(&word, text, size);
    h = (h ^ word) * 0xff51afd7ed558ccdu;
    h ^= h >> 32;
    h *= 0xc4ceb9fe1a85ec53u;
    return h ^ h >> 29;
}

int32_t tokenizer__lookup(const struct tokenizer *t, const char *text, size_t size)
{
    const struct tokenizer_strings *s = &t->strings;
    if (!s->slot) return -1;
    for (size_t i = (size_t)hash_bytes(text, size) & s->mask;; i = (i + 1) & s->mask) {
        int32_t id = s->slot[i];
        if (id < 0) return -1;
        if (t->token[id].size == size && !memcmp(tokenizer__text(t, id), text, size)) return id;
    }
}

static void place(const struct tokenizer *t, struct tokenizer_strings *s, int32_t id)
{
    size_t i = (size_t)hash_bytes(tokenizer__text(t, id), t->token[id].size) & s->mask;
    while (s->slot[i] >= 0) i = (i + 1) & s->mask;
    s->slot[i] = id;
    s->n++;
}

static int grow_strings(struct tokenizer *t)
{
    struct tokenizer_strings larger = {.mask = t->strings.slot ? t->strings.mask * 2 + 1 : 1023};
    larger.slot = malloc((larger.mask + 1) * sizeof *larger.slot);
    if (!larger.slot) FAIL(ERR_NOMEM, "tokenizer: no memory for a table of %zu tokens", larger.mask + 1);
    for (size_t i = 0; i <= larger.mask; i++) larger.slot[i] = -1;
    for (size_t i = 0; t->strings.slot && i <= t->strings.mask; i++)
        if (t->strings.slot[i] >= 0) place(t, &larger, t->strings.slot[i]);
    free(t->strings.slot);
    t->strings = larger;
    return OK;
}

int tokenizer__enter(struct tokenizer *t, int32_t id, int32_t *other)
{
    *other = tokenizer__lookup(t, tokenizer__text(t, id), t->token[id].size);
    if (*other >= 0) return OK;
    if (!t->strings.slot || t->strings.n * 2 >= t->strings.mask) TRY(grow_strings(t));
    place(t, &t->strings, id);
    return OK;
}

int tokenizer__resize(struct tokenizer *t, int n, const char *what)
{
    if (n <= t->n) return OK;
    if (n > TOKENIZER_MAX_TOKENS) FAIL(ERR_FORMAT, "%s: %d token ids; at most %d", what, n, TOKENIZER_MAX_TOKENS);
    struct tokenizer_token *token = realloc(t->token, (size_t)n * sizeof *token);
    if (!token) FAIL(ERR_NOMEM, "%s: no memory for %d tokens", what, n);
    memset(token + t->n, 0, (size_t)(n - t->n) * sizeof *token);
    t->token = token;
    t->n = n;
    return OK;
}

int tokenizer__set_token(struct tokenizer *t, int32_t id, const char *text, size_t size, uint32_t flags,
                         const char *what)
{
    struct tokenizer_token *token = &t->token[id];
    if (token->flags & TOKEN_PRESENT)
        FAIL(ERR_FORMAT, "%s: id %d belongs to two tokens, \"%.100s\" and \"%.*s\"", what, id, tokenizer__text(t, id),
             (int)(size < 100 ? size : 100), text);
    if (size > TOKENIZER_MAX_TOKEN)
        FAIL(ERR_FORMAT, "%s: token %d has %zu bytes; at most %d", what, id, size, TOKENIZER_MAX_TOKEN);
    if (t->text.size > UINT32_MAX - size - 1) FAIL(ERR_FORMAT, "%s: more than 4 GiB of token text", what);
    token->text = (uint32_t)t->text.size;
    token->size = (uint32_t)size;
    token->flags = flags | TOKEN_PRESENT;
    TRY(tokenizer__append(&t->text, text, size));
    return tokenizer__append(&t->text, "", 1);
}

int tokenizer__set_piece(struct tokenizer *t, int32_t id, const char *bytes, size_t size)
{
    if (t->pieces.size > UINT32_MAX - size) FAIL(ERR_FORMAT, "tokenizer: more than 4 GiB of token text");
    t->token[id].piece = (uint32_t)t->pieces.size;
    t->token[id].piece_size = (uint32_t)size;
    return tokenizer__append(&t->pieces, bytes, size);
}

int tokenizer__pairs_reserve(struct tokenizer_pairs *p, size_t n)
{
    size_t slots = 16;
    while (slots < n * 2 + 2) slots *= 2;
    p->key = malloc(slots * sizeof *p->key);
    p->value = malloc(slots * sizeof *p->value);
    if (!p->key || !p->value) FAIL(ERR_NOMEM, "tokenizer: no memory for %zu merges", n);
    for (size_t i = 0; i < slots; i++) p->key[i] = UINT64_MAX;
    p->mask = slots - 1;
    return OK;
}

void tokenizer__pairs_set(struct tokenizer_pairs *p, int32_t left, int32_t right, struct tokenizer_pair_value value)
{
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    size_t i = (size_t)((key * 0x9e3779b97f4a7c15u) >> 40) & p->mask;
    while (p->key[i] != key && p->key[i] != UINT64_MAX) i = (i + 1) & p->mask;
    if (p->key[i] == UINT64_MAX) p->n++;
    p->key[i] = key;
    p->value[i] = value;
}

int tokenizer__add_merge(struct tokenizer *t, const char *left, size_t left_size, const char *right, size_t right_size,
                         uint32_t rank, const char *what)
{
    char both[2 * TOKENIZER_MAX_TOKEN];
    int32_t a = tokenizer__lookup(t, left, left_size), b = tokenizer__lookup(t, right, right_size);
    const char *missing = a < 0 ? left : right;
    size_t missing_size = a < 0 ? left_size : right_size;
    if (a < 0 || b < 0)
        FAIL(ERR_FORMAT, "%s: merge %u: \"%.*s\" is not in the vocabulary", what, rank,
             (int)(missing_size < 100 ? missing_size : 100), missing);
    memcpy(both, left, left_size); /* sizes are those of tokens, so at most TOKENIZER_MAX_TOKEN each */
    memcpy(both + left_size, right, right_size);
    int32_t id = tokenizer__lookup(t, both, left_size + right_size);
    if (id < 0)
        FAIL(ERR_FORMAT, "%s: merge %u: its result \"%.*s\" is not in the vocabulary", what, rank,
             (int)(left_size + right_size < 100 ? left_size + right_size : 100), both);
    tokenizer__pairs_set(&t->pairs, a, b, (struct tokenizer_pair_value){rank, id});
    return OK;
}
