/* prompt_internal - what the files of prompt share: the builder and the steps from messages to a request. */
#ifndef VITRAIL_RUNTIME_PROMPT_INTERNAL_H
#define VITRAIL_RUNTIME_PROMPT_INTERNAL_H

#include "model/chat.h"
#include "model/image.h"
#include "runtime/prompt.h"

struct prompt_builder {
    const struct config *config;
    const struct model_dims *dims;
    struct tokenizer *tokenizer;
    int max_model_len;
    bool has_chat;
    struct chat chat;
    char *chat_message; /* why has_chat is false */
    bool has_vision;
    struct image_processor processor;
    const char *image_token; /* its text, as the tokenizer has it */
    /* Texts of the special tokens, sorted: what a user's text must not be taken for. Strings are the tokenizer's. */
    const char **special;
    int n_special;
};

/* One image of a request, not read yet. */
struct prompt_image {
    const char *where; /* a URL of a client, or a path from the command line */
    bool trusted;      /* a path */
};

/* prompt__sampling - the body's sampling fields and limits into *out (ids not needed yet). *max_tokens_given: false
 * where the default applies, which gives way to a long prompt. Errors: ERR_REQUEST. */
int prompt__sampling(const struct prompt_builder *b, const cJSON *body, const char *what, struct request *out,
                     bool *max_tokens_given) MUST_CHECK;

/* prompt__encode_chat - ids of a rendered conversation, one image token an image; *last_turn is the first token of the
 * last user turn. prompt__encode_raw - of a text as it stands. *ids is malloc'd. */
int prompt__encode_chat(const struct prompt_builder *b, const struct chat_prompt *prompt, int32_t **ids, size_t *n,
                        size_t *last_turn) MUST_CHECK;
int prompt__encode_raw(const struct prompt_builder *b, const char *text, size_t size, int32_t **ids,
                       size_t *n) MUST_CHECK;

/* prompt__finish - from ids with one image token an image to the request: checks lengths, expands images into spans,
 * then reads and processes the pictures. */
int prompt__finish(const struct prompt_builder *b, const int32_t *ids, size_t n, size_t last_turn,
                   const struct prompt_image *images, int n_images, bool max_tokens_given, const char *what,
                   struct request *out) MUST_CHECK;

/* prompt__count_images - ERR_REQUEST if the model takes no images or not so many. */
int prompt__count_images(const struct prompt_builder *b, int n_images, const char *what) MUST_CHECK;

#endif
