/* chat - chat templates as code: messages become the text that a model was trained on.
 *
 * Owns the five templates and the choice among them. Does not own tokenizing: the result is text in segments, each
 * marked with where it came from, so that the caller can let the template's own control tokens through and keep a
 * user's "<|im_end|>" or "<image>" plain text. The rendering is that of the models' own Jinja templates; images of a
 * message come first, each with a newline, as LLaVA's template has it, whatever the order of the parts. */
#ifndef VITRAIL_MODEL_CHAT_H
#define VITRAIL_MODEL_CHAT_H

#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"
#include "model/dims.h"
#include "model/tokenizer.h"

enum chat_template {
    CHAT_LLAVA_1_5, /* "USER: <image>\nQ ASSISTANT:", answers end with the end token */
    CHAT_LLAMA_2,   /* "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s>" */
    CHAT_LLAMA_3,   /* "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>" */
    CHAT_LLAMA_3_1, /* the same with a system message that always states two dates */
    CHAT_CHATML,    /* "<|im_start|>user\nQ<|im_end|>\n" */
    CHAT_TEMPLATE_N
};

enum chat_role { CHAT_SYSTEM, CHAT_USER, CHAT_ASSISTANT };

/* One message; all pointers are the caller's. */
struct chat_message {
    enum chat_role role;
    const struct chat_text {
        const char *text;
        size_t size;
    } * texts; /* the text parts, in order */
    int n_texts, n_images;
};

/* A template, chosen; immutable, any number of threads may render with it. */
struct chat {
    enum chat_template template;
    char bos[64], eos[64]; /* the tokens' text; "" where the tokenizer names none */
    char *default_system;  /* system message of a conversation without one; NULL: none */
};

enum chat_segment_kind {
    CHAT_CONTROL, /* written by the template: special tokens in it are meant */
    CHAT_CONTENT, /* from a message: never to be taken for a special token */
    CHAT_IMAGE    /* stands for one image; no text */
};

/* A rendered conversation. */
struct chat_prompt {
    char *text; /* all segments joined; NUL-terminated */
    size_t size;
    struct chat_segment {
        enum chat_segment_kind kind;
        size_t start, size; /* bytes of text */
    } * segments;
    int n_segments;
    size_t last_turn; /* byte at which the last user message's turn begins; images of before start before it */
    bool add_special; /* the tokenizer's begin token is to be added: the template does not write it */
};

/* chat_open - by name, or for "auto" from what is known of the model: the text of its Jinja template (NULL if it has
 * none), the family, and the control tokens of its vocabulary. Errors: ERR_CONFIG listing the names, and where nothing
 * fits naming the key chat_template; ERR_NOMEM. chat_close frees what chat_open took. */
int chat_open(struct chat *chat, const char *name, const char *jinja, enum model_family family,
              const struct tokenizer *tokenizer) MUST_CHECK;
void chat_close(struct chat *chat);

/* chat_name - i-th template's name, NULL past the end. */
const char *chat_name(int i);

/* chat_render - the prompt that asks for the answer to the last message, which must be a user's.
 * Errors: ERR_REQUEST: no message, roles in an order that the template does not have, an image outside of a user's
 * message; ERR_NOMEM. On success the caller calls chat_prompt_free. */
int chat_render(const struct chat *chat, const struct chat_message *messages, int n_messages,
                struct chat_prompt *out) MUST_CHECK;
void chat_prompt_free(struct chat_prompt *prompt);

#endif
