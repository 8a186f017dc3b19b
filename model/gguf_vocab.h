/* gguf_vocab - the vocabulary and chat template of a GGUF file (keys tokenizer.*), as the tokenizer and the chat
 * templates take them. Checks types and counts; what the tokens mean is the tokenizer's business. */
#ifndef VITRAIL_MODEL_GGUF_VOCAB_H
#define VITRAIL_MODEL_GGUF_VOCAB_H

#include "base/status.h"
#include "model/gguf.h"
#include "model/tokenizer.h"

struct gguf_vocab;

/* gguf_vocab_open - the vocabulary of an open file, whose strings it points into: close it before `g`.
 * Errors: ERR_FORMAT naming file and key; ERR_UNSUPPORTED a tokenizer.ggml.model other than llama and gpt2. */
int gguf_vocab_open(const struct gguf *g, struct gguf_vocab **out) MUST_CHECK;
void gguf_vocab_close(struct gguf_vocab *v);

/* gguf_vocab_get - the arrays; valid until gguf_vocab_close. */
const struct tokenizer_vocab *gguf_vocab_get(const struct gguf_vocab *v);

/* gguf_vocab_special_id - a token id by its key ("tokenizer.ggml.eos_token_id"); -1 if absent or stored as 2^32 - 1,
 * which converters write for none. Errors: ERR_FORMAT if it is not below n_tokens. */
int gguf_vocab_special_id(const struct gguf *g, const char *key, int64_t n_tokens, int *out) MUST_CHECK;

/* gguf_vocab_open_tokenizer - the tokenizer of a .gguf file; needs nothing else open. */
int gguf_vocab_open_tokenizer(const char *path, struct tokenizer **out) MUST_CHECK;

/* gguf_vocab_chat_template - tokenizer.chat_template of a .gguf file: malloc'd, NUL-terminated; NULL if it has none. */
int gguf_vocab_chat_template(const char *path, char **out) MUST_CHECK;

#endif
