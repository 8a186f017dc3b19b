/* tokenizer_internal - what the tokenizer_*.c files share: the opened tokenizer, its tables, and the state of one
 * encode call. Not for other modules. Loaders (tokenizer_json*.c, tokenizer_gguf.c) fill struct tokenizer through the
 * functions here; after tokenizer__finish it never changes. */
#ifndef VITRAIL_MODEL_TOKENIZER_INTERNAL_H
#define VITRAIL_MODEL_TOKENIZER_INTERNAL_H

#include <string.h>

#include "model/tokenizer.h"

enum {
    TOKENIZER_MAX_STEPS = 24,   /* pre-tokenizer or normalizer steps once sequences are flattened */
    TOKENIZER_MAX_FRAME = 16,   /* ids that a template puts before or after the text */
    TOKENIZER_MAX_STRING = 4096 /* bytes of a pattern, replacement or prefix in a tokenizer.json */
};

/* ---- growable bytes ---- */
struct tokenizer_buffer {
    char *data;
    size_t size, capacity;
};
int tokenizer__reserve(struct tokenizer_buffer *b, size_t more) MUST_CHECK;
int tokenizer__append(struct tokenizer_buffer *b, const char *bytes, size_t size) MUST_CHECK;

/* PCRE2 is called without its own check: whatever is matched has passed this one. */
bool tokenizer__is_utf8(const char *text, size_t size);

/* ---- tables: tokenizer_table.c ---- */

enum {
    TOKEN_PRESENT = 1,
    TOKEN_SPECIAL = 2,
    TOKEN_ADDED = 4,
    TOKEN_RAW = 8 /* its text is its piece */,
    TOKEN_BYTE = 16
};

struct tokenizer_token {
    uint32_t text, size;        /* offset and bytes in `text`, NUL-terminated */
    uint32_t piece, piece_size; /* offset and bytes in `pieces`: what the token decodes to */
    uint32_t flags;
};

struct tokenizer_strings { /* open addressing: token id by text, -1 = free */
    int32_t *slot;
    size_t mask, n;
};

struct tokenizer_pair_value {
    uint32_t rank;
    int32_t id; /* of the merged token */
};
struct tokenizer_pairs { /* open addressing: merge by left << 32 | right, UINT64_MAX = free */
    uint64_t *key;
    struct tokenizer_pair_value *value;
    size_t mask, n;
};

/* ---- regular expressions: tokenizer_regex.c ---- */
struct tokenizer_regex; /* a compiled expression or a literal string; immutable */

/* Compiles an expression written for Oniguruma (`literal`: a plain string). `what` names the file and component. */
int tokenizer__regex_open(const char *pattern, size_t size, bool literal, const char *what,
                          struct tokenizer_regex **out) MUST_CHECK;
void tokenizer__regex_close(struct tokenizer_regex *regex);

struct tokenizer_match { /* iterates over non-overlapping matches */
    size_t at, last_end;
    size_t start, end; /* the match found */
};
struct tokenizer_encoder;
/* Finds the next match in text[0..size); start with {0, SIZE_MAX}. *found is false at the end. */
int tokenizer__regex_next(const struct tokenizer_regex *regex, struct tokenizer_encoder *e, const char *text,
                          size_t size, struct tokenizer_match *m, bool *found) MUST_CHECK;

/* Frees what matching left in the encoder. */
void tokenizer__regex_release(struct tokenizer_encoder *e);

/* ---- normalizer: tokenizer_normalize.c ---- */
enum tokenizer_normalize_kind { NORMALIZE_PREPEND, NORMALIZE_REPLACE, NORMALIZE_NFC, NORMALIZE_NFD, NORMALIZE_STRIP };
struct tokenizer_normalize_step {
    enum tokenizer_normalize_kind kind;
    struct tokenizer_regex *regex; /* REPLACE */
    char *content;                 /* PREPEND, REPLACE */
    size_t content_size;
    bool left, right; /* STRIP */
};
/* Normalizes text; *out points to `text` itself or into one of the encoder's two buffers. */
int tokenizer__normalize(struct tokenizer_encoder *e, const char *text, size_t size, const char **out,
                         size_t *out_size) MUST_CHECK;
/* Canonical decomposition or composition, appended to out. */
int tokenizer__normal_form(const char *text, size_t size, bool compose, struct tokenizer_buffer *out) MUST_CHECK;
/* Bytes of the whitespace character (Unicode White_Space) that text begins with, 0 if it begins with none. */
size_t tokenizer__space_at(const char *text, size_t size);
/* The same for the end of text. */
size_t tokenizer__space_before(const char *text, size_t size);

/* ---- pre-tokenizer: tokenizer_pretokenize.c ---- */
enum tokenizer_split_behavior { SPLIT_ISOLATED, SPLIT_REMOVED, SPLIT_PREVIOUS, SPLIT_NEXT, SPLIT_CONTIGUOUS };
enum tokenizer_step_kind {
    STEP_SPLIT,        /* cut at the matches of a regex */
    STEP_PREFIX_SPACE, /* put a space before a piece that does not begin with one */
    STEP_BYTES,        /* write each byte as its printable character */
    STEP_METASPACE     /* write spaces as another character and perhaps put one before */
};
enum tokenizer_prepend { PREPEND_NEVER, PREPEND_FIRST, PREPEND_ALWAYS };
struct tokenizer_step {
    enum tokenizer_step_kind kind;
    struct tokenizer_regex *regex; /* SPLIT */
    enum tokenizer_split_behavior behavior;
    bool invert;
    enum tokenizer_prepend prepend; /* METASPACE */
    char replacement[5];
    size_t replacement_size;
};
extern const char tokenizer__gpt2_pattern[];
/* Runs the steps over one segment and encodes every piece. `first`: the segment begins the text. */
int tokenizer__pretokenize(struct tokenizer_encoder *e, const char *text, size_t size, bool first) MUST_CHECK;
/* The character that stands for a byte in byte-level vocabularies, and back (-1: none). */
uint32_t tokenizer__byte_char(unsigned char byte);
int tokenizer__char_byte(uint32_t code);

/* ---- added tokens: tokenizer_added.c ---- */
struct tokenizer_added {
    int32_t id;
    bool special, normalized, lstrip, rstrip, single_word;
};
struct tokenizer_trie_node {
    int32_t child, sibling; /* node numbers, 0 = none */
    int32_t added;          /* index into `added`, -1 */
    unsigned char byte;
};
struct tokenizer_trie {
    struct tokenizer_trie_node *node;
    int32_t n, capacity;
    int32_t first[256]; /* node of a pattern's first byte */
};
struct tokenizer_found {
    size_t start, end; /* with the whitespace that lstrip and rstrip take */
    int32_t id;
};
int tokenizer__trie_add(struct tokenizer_trie *trie, const char *text, size_t size, int32_t added) MUST_CHECK;
/* The next added token of text from *at on, not before `floor`; advances *at. *found is false at the end. */
int tokenizer__added_next(struct tokenizer_encoder *e, const struct tokenizer_trie *trie, const char *text, size_t size,
                          size_t *at, size_t floor, struct tokenizer_found *out, bool *found) MUST_CHECK;

/* ---- the opened tokenizer ---- */
struct tokenizer {
    enum tokenizer_kind kind; /* BPE: ranked merges; SPM: the score of the merged token decides */
    int n;                    /* one more than the largest id */
    struct tokenizer_token *token;
    struct tokenizer_buffer text, pieces;
    struct tokenizer_strings strings;
    uint32_t longest; /* bytes of the longest token that is not added */

    struct tokenizer_pairs pairs; /* BPE */
    float *score;                 /* SPM: [n] */
    int32_t char_id[0x800];       /* BPE: token of a one-character string, -1 */
    int32_t byte_id[256];         /* token "<0xHH>", -1 */
    int32_t unk;                  /* -1: none */
    bool fuse_unk, byte_fallback, ignore_merges;

    struct tokenizer_added *added;
    int32_t n_added;
    struct tokenizer_trie raw, normalized; /* added tokens sought before and after the normalizer */
    struct tokenizer_regex *word;          /* one word character; NULL unless an added token is single_word */
    bool hide_special; /* without PARSE_SPECIAL special tokens do not exist (else: they are found, and left as text) */

    struct tokenizer_normalize_step normalize[TOKENIZER_MAX_STEPS];
    int n_normalize;
    struct tokenizer_step step[TOKENIZER_MAX_STEPS];
    int n_step;
    int32_t prefix[TOKENIZER_MAX_FRAME], suffix[TOKENIZER_MAX_FRAME];
    int n_prefix, n_suffix;
    int32_t bos, eos;

    char strip; /* decoder: this ASCII character is dropped at the start of the text, up to n_strip times */
    unsigned n_strip;
    char drop[5]; /* decoder: this character is dropped wherever it stands in the first token */
    size_t drop_size;
};

/* A zeroed tokenizer with -1 where "none" is meant. */
struct tokenizer *tokenizer__new(enum tokenizer_kind kind);
/* Room for ids 0..n-1. */
int tokenizer__resize(struct tokenizer *t, int n, const char *what) MUST_CHECK;
/* Sets the text of an id; ERR_FORMAT if the id has one already. Does not enter it into the string table. */
int tokenizer__set_token(struct tokenizer *t, int32_t id, const char *text, size_t size, uint32_t flags,
                         const char *what) MUST_CHECK;
/* Enters an id's text for lookup. *other is the id that holds this text already, or -1. */
int tokenizer__enter(struct tokenizer *t, int32_t id, int32_t *other) MUST_CHECK;
int32_t tokenizer__lookup(const struct tokenizer *t, const char *text, size_t size);
int tokenizer__pairs_reserve(struct tokenizer_pairs *p, size_t n) MUST_CHECK;
/* A later entry of the same pair replaces an earlier one. Reserve first. */
void tokenizer__pairs_set(struct tokenizer_pairs *p, int32_t left, int32_t right, struct tokenizer_pair_value value);
static inline const struct tokenizer_pair_value *tokenizer__pairs_get(const struct tokenizer_pairs *p, int32_t left,
                                                                      int32_t right)
{
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    if (!p->key) return NULL;
    for (size_t i = (size_t)((key * 0x9e3779b97f4a7c15u) >> 40) & p->mask;; i = (i + 1) & p->mask) {
        if (p->key[i] == key) return &p->value[i];
        if (p->key[i] == UINT64_MAX) return NULL;
    }
}

/* Loader helpers. add_token: an added token; its id must have text already. finish: derived tables (char_id, byte_id,
 * tries). set_piece: what an id decodes to. add_merge: ERR_FORMAT if a part or the result is not in the vocabulary. */
int tokenizer__add_token(struct tokenizer *t, const struct tokenizer_added *added, const char *what) MUST_CHECK;
int tokenizer__finish(struct tokenizer *t, const char *what) MUST_CHECK;
int tokenizer__set_piece(struct tokenizer *t, int32_t id, const char *bytes, size_t size) MUST_CHECK;
int tokenizer__add_merge(struct tokenizer *t, const char *left, size_t left_size, const char *right, size_t right_size,
                         uint32_t rank, const char *what) MUST_CHECK;
int tokenizer__add_normalize(struct tokenizer *t, const struct tokenizer_normalize_step *step, const char *content,
                             const char *what) MUST_CHECK;
int tokenizer__add_split(struct tokenizer *t, const char *pattern, bool literal, enum tokenizer_split_behavior behavior,
                         bool invert, const char *what) MUST_CHECK;
int tokenizer__add_step(struct tokenizer *t, const struct tokenizer_step *step, const char *what) MUST_CHECK;
/* Appends the bytes that a byte-level token stands for; a token with another character in it stands for itself. */
int tokenizer__unmap_bytes(const char *text, size_t size, struct tokenizer_buffer *out) MUST_CHECK;
/* 0..255 if text is "<0xHH>", else -1. */
int tokenizer__byte_token(const char *text, size_t size);
static inline const char *tokenizer__text(const struct tokenizer *t, int32_t id)
{
    return t->text.data + t->token[id].text;
}

/* tokenizer_json_parts.c: the components of a tokenizer.json around the model. */
struct cJSON;
int tokenizer__json_normalizer(struct tokenizer *t, const struct cJSON *node, const char *what) MUST_CHECK;
int tokenizer__json_pre_tokenizer(struct tokenizer *t, const struct cJSON *node, const char *what) MUST_CHECK;
int tokenizer__json_post_processor(struct tokenizer *t, const struct cJSON *node, const char *what) MUST_CHECK;
int tokenizer__json_decoder(struct tokenizer *t, const struct cJSON *node, const char *what) MUST_CHECK;

/* ---- one encode call ---- */
struct tokenizer_symbol {
    int32_t id;           /* BPE: token; -1 once merged into its left neighbour */
    int32_t prev, next;   /* -1 at the ends */
    uint32_t start, size; /* SPM: bytes of the word; size 0 once merged */
};
struct tokenizer_heap_entry {
    uint64_t key;  /* smallest first: rank or inverted score, then position */
    uint32_t size; /* SPM: bytes of the pair when it was pushed */
};

struct tokenizer_encoder {
    const struct tokenizer *t;
    unsigned flags;
    int32_t *ids;
    size_t n, capacity;
    struct tokenizer_buffer normal[2];
    struct tokenizer_buffer scratch[TOKENIZER_MAX_STEPS];
    void *match_data, *match_context; /* PCRE2 */
    struct tokenizer_symbol *symbol;
    size_t n_symbol, symbol_capacity;
    struct tokenizer_heap_entry *heap;
    size_t n_heap, heap_capacity;
};
void tokenizer__encoder_init(struct tokenizer_encoder *e, const struct tokenizer *t, unsigned flags);
void tokenizer__encoder_free(struct tokenizer_encoder *e);
int tokenizer__emit(struct tokenizer_encoder *e, int32_t id) MUST_CHECK;
int tokenizer__reserve_symbols(struct tokenizer_encoder *e, size_t n) MUST_CHECK;
int tokenizer__heap_push(struct tokenizer_encoder *e, struct tokenizer_heap_entry entry) MUST_CHECK;
struct tokenizer_heap_entry tokenizer__heap_pop(struct tokenizer_encoder *e);
/* Encodes one word (valid UTF-8, not empty). */
int tokenizer__bpe_word(struct tokenizer_encoder *e, const char *word, size_t size) MUST_CHECK;
int tokenizer__spm_word(struct tokenizer_encoder *e, const char *word, size_t size) MUST_CHECK;

#endif
