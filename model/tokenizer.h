/* tokenizer - text to token ids and back, for Hugging Face tokenizer.json files and GGUF vocabularies.
 *
 * Owns: normalising, pre-tokenizing, the BPE merges, special tokens, decoding and streaming decode. Does not own chat
 * templates (model/chat.h) nor reading GGUF metadata (model/gguf.h fills struct tokenizer_vocab). Ids are those of the
 * `tokenizers` library for tokenizer.json, and of llama.cpp for GGUF. A component that is not implemented is refused
 * by name when the file is opened, never ignored. A tokenizer is immutable once open: any number of threads may use it.
 */
#ifndef VITRAIL_MODEL_TOKENIZER_H
#define VITRAIL_MODEL_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum {
    TOKENIZER_MAX_TEXT = 16 << 20,                     /* bytes of one text to encode */
    TOKENIZER_MAX_FILE = 256 << 20,                    /* bytes of a tokenizer.json */
    TOKENIZER_MAX_TOKENS = 1 << 22,                    /* entries of a vocabulary */
    TOKENIZER_MAX_TOKEN = 2048,                        /* bytes of one token */
    TOKEN_STREAM_BYTES = 3 * (TOKENIZER_MAX_TOKEN + 4) /* most that one push or finish writes */
};

enum tokenizer_flags {
    TOKENIZER_ADD_SPECIAL = 1,  /* begin / end tokens as the post-processor or the vocabulary says */
    TOKENIZER_PARSE_SPECIAL = 2 /* special tokens written out in the text ("<image>", "<|im_end|>") become their ids */
};
/* Raw prompts use both flags, which is tokenizer(text) of transformers. Rendered chat templates use PARSE_SPECIAL
 * alone, since they write their own begin token. Text of a user that must not inject control tokens uses neither;
 * added tokens that are not special (user-defined words) are recognised always. */

struct tokenizer;

enum tokenizer_kind { TOKENIZER_SPM = 1 /* "llama" */, TOKENIZER_BPE = 2 /* "gpt2" */ };

/* Types of GGUF's tokenizer.ggml.token_type. */
enum tokenizer_token_type {
    TOKENIZER_TYPE_NORMAL = 1,
    TOKENIZER_TYPE_UNKNOWN = 2,
    TOKENIZER_TYPE_CONTROL = 3,
    TOKENIZER_TYPE_USER_DEFINED = 4,
    TOKENIZER_TYPE_UNUSED = 5,
    TOKENIZER_TYPE_BYTE = 6
};

/* A vocabulary as GGUF metadata has it (keys tokenizer.ggml.*); plain data, borrowed during tokenizer_open_vocab only.
 * Strings are bytes with a size and need no terminating NUL. */
struct tokenizer_vocab {
    enum tokenizer_kind kind; /* model */
    const char *pre;          /* pre: name of the pre-tokenizer, NULL if the key is absent; kind BPE only */
    int n;                    /* tokens */
    const char *const *token; /* [n] tokens */
    const size_t *token_size; /* [n] their bytes */
    const float *score;       /* [n] scores; NULL allowed for BPE */
    const int32_t *type;      /* [n] token_type; NULL = all normal */
    int n_merges;
    const char *const *merge; /* [n_merges] merges, "left right" */
    const size_t *merge_size; /* [n_merges] */
    int bos, eos, unk;        /* bos_token_id, eos_token_id, unknown_token_id; -1 if absent */
    int add_bos,
        add_eos; /* add_bos_token, add_eos_token: 0, 1, or -1 if absent (then: SPM adds bos, BPE as pre says) */
    int add_space_prefix; /* add_space_prefix: 0, 1, or -1 if absent (then: SPM yes, BPE no) */
};

/* tokenizer_open_json - reads tokenizer.json; tokenizer_config.json, if not NULL, names the begin and end token and may
 * list further added tokens. Whether those two are added to a prompt is the post-processor's matter alone: like
 * transformers 5, this ignores add_bos_token where a tokenizer.json is present.
 * Errors: ERR_IO; ERR_FORMAT (malformed); ERR_UNSUPPORTED (a component this build does not have, named). */
int tokenizer_open_json(const char *tokenizer_json_path, const char *tokenizer_config_path,
                        struct tokenizer **out) MUST_CHECK;

/* tokenizer_open_json_memory - the same from memory; `config` may be NULL. `what` names the text in errors. */
int tokenizer_open_json_memory(const char *json, size_t size, const char *config, size_t config_size, const char *what,
                               struct tokenizer **out) MUST_CHECK;

/* tokenizer_open_vocab - from a GGUF vocabulary; `what` names the file in errors. Nothing of `vocab` is kept. */
int tokenizer_open_vocab(const struct tokenizer_vocab *vocab, const char *what, struct tokenizer **out) MUST_CHECK;

void tokenizer_close(struct tokenizer *t);

/* tokenizer_encode - the ids of text[0..size). Each invalid UTF-8 sequence counts as U+FFFD, as Python's
 * errors="replace" does; NUL bytes are ordinary characters. A character that the vocabulary can express neither by
 * tokens, bytes nor an unknown token gives no id, as in the reference. *ids is malloc'd, never NULL on success; the
 * caller frees it. Errors: ERR_REQUEST if the text is larger than TOKENIZER_MAX_TEXT, or takes the pre-tokenizer's
 * regular expression more steps than its limit; ERR_NOMEM. */
int tokenizer_encode(const struct tokenizer *t, const char *text, size_t size, unsigned flags, int32_t **ids,
                     size_t *n) MUST_CHECK;

/* tokenizer_decode - the text of n ids: always valid UTF-8, malloc'd with a terminating NUL (not counted in *size).
 * Bytes that do not form a character give U+FFFD as errors="replace" does. Ids without a token give nothing (a model
 * may have more output rows than tokens). skip_special drops special tokens. */
int tokenizer_decode(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip_special, char **text,
                     size_t *size) MUST_CHECK;

/* A streaming decoder, for the caller to embed; the members are private. The bytes of all pushes and of finish, put
 * together, are those of tokenizer_decode of all ids, and every single push gives complete characters. */
struct token_stream {
    const struct tokenizer *tokenizer;
    bool skip_special;
    bool seen_token, seen_text; /* the first token and the first byte may lose a space */
    unsigned char n_stripped;   /* leading bytes dropped so far */
    unsigned char n_held;       /* bytes of a character that is not complete yet */
    char held[3];
};

void token_stream_init(struct token_stream *stream, const struct tokenizer *t, bool skip_special);

/* token_stream_push - appends one id and writes the characters that became complete; returns their bytes (0 is common).
 * out has room for TOKEN_STREAM_BYTES; no NUL is written. */
size_t token_stream_push(struct token_stream *stream, int32_t id, char *out);

/* token_stream_finish - an incomplete character at the end becomes U+FFFD; returns the bytes written. The stream is
 * then as after init. */
size_t token_stream_finish(struct token_stream *stream, char *out);

/* tokenizer_find - the id of a token by its text as the vocabulary writes it (special tokens as such); -1 if absent. */
int32_t tokenizer_find(const struct tokenizer *t, const char *token);

/* tokenizer_token - the token as the vocabulary writes it (byte-level ones in their printable form), NUL-terminated;
 * NULL for an id without a token. */
const char *tokenizer_token(const struct tokenizer *t, int32_t id);

/* tokenizer_size - one more than the largest id. */
int tokenizer_size(const struct tokenizer *t);

/* tokenizer_bos, tokenizer_eos - id of the begin / end token, -1 if the files name none. */
int32_t tokenizer_bos(const struct tokenizer *t);
int32_t tokenizer_eos(const struct tokenizer *t);

/* tokenizer_is_special - true for control tokens, which skip_special drops. */
bool tokenizer_is_special(const struct tokenizer *t, int32_t id);

#endif
