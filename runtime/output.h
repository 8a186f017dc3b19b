/* output - completions as JSON: the body of an OpenAI chat completion, and the flat line of `vitrail generate --json`.
 *
 * Writes text into a buffer that grows; a failed allocation is remembered there and asked for once, at the end. Every
 * string is valid UTF-8 and every number finite, whatever the model said. */
#ifndef VITRAIL_RUNTIME_OUTPUT_H
#define VITRAIL_RUNTIME_OUTPUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "model/tokenizer.h"
#include "runtime/request.h"

/* Text being written; zero-initialised. `text` is NUL-terminated once something is in it. */
struct output_buffer {
    char *text;
    size_t size, room;
    bool failed;
};

/* output_printf - appends. output_string - appends text as a JSON string; invalid UTF-8 becomes U+FFFD.
 * output_clear - empties it and keeps the memory; output_free - gives the memory back.
 * output_check - ERR_NOMEM if an append failed. */
void output_printf(struct output_buffer *buffer, const char *format, ...) PRINTF_LIKE(2, 3);
void output_string(struct output_buffer *buffer, const char *text, size_t size);
void output_clear(struct output_buffer *buffer);
void output_free(struct output_buffer *buffer);
int output_check(const struct output_buffer *buffer) MUST_CHECK;

/* What a chat completion needs beside what the engine says. */
struct output_chat {
    const char *id, *model;
    int64_t created;  /* Unix time */
    int top_logprobs; /* -1: no log-probabilities */
    const struct tokenizer *tokenizer;
};

/* output_chat_completion - {"id", "object", "created", "model", "choices", "usage", "kv_cache"}, without a newline. */
void output_chat_completion(struct output_buffer *buffer, const struct output_chat *chat,
                            const struct completion *completion);

/* output_generate - {"text", "finish_reason", "usage", "kv_cache", "timing"}, without a newline. */
void output_generate(struct output_buffer *buffer, const struct completion *completion);

#endif
