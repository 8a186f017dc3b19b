/* prompt - rank 0's front end: what a client wrote becomes a struct request, complete and checked.
 *
 * Owns: the tokenizer, the chat template, the image processor of a model, the meaning of every field of an OpenAI
 * chat-completions body, and the limits on them. Does not own: where bodies come from (runtime/batch.h, a server) and
 * what happens to the request (runtime/engine.h). A builder is immutable once open: any number of threads may use it.
 * Whatever a client can get wrong is ERR_REQUEST with a message that client can act on. */
#ifndef VITRAIL_RUNTIME_PROMPT_H
#define VITRAIL_RUNTIME_PROMPT_H

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"
#include "model/dims.h"
#include "model/tokenizer.h"
#include "runtime/config.h"
#include "runtime/request.h"

enum { PROMPT_DEFAULT_MAX_TOKENS = 256 };

struct prompt_builder;

/* prompt_open - reads tokenizer, chat template and preprocessor settings of config->model. `config` and `dims` are
 * kept and must outlive the builder. A model without a chat template that this build knows opens as well: it serves
 * raw prompts, and prompt_check_chat says why no others. Errors: ERR_IO, ERR_FORMAT, ERR_UNSUPPORTED naming the file.
 */
int prompt_open(const struct config *config, const struct model_dims *dims, struct prompt_builder **out) MUST_CHECK;
void prompt_close(struct prompt_builder *builder);

/* prompt_check_chat - OK if messages can be rendered; else ERR_CONFIG naming the key chat_template. */
int prompt_check_chat(const struct prompt_builder *builder) MUST_CHECK;

/* prompt_tokenizer_open - the tokenizer of a model directory or .gguf file. */
int prompt_tokenizer_open(const char *model_path, struct tokenizer **out) MUST_CHECK;

const struct tokenizer *prompt_tokenizer(const struct prompt_builder *builder);
const struct config *prompt_config(const struct prompt_builder *builder);
int prompt_max_model_len(const struct prompt_builder *builder); /* tokens of prompt and answer together */

/* prompt_from_body - the body of a chat completion: messages, images by file: or data: URL, sampling, limits, and
 * kv_cache.budget. `what` names the request in messages; where the body brings no seed it salts the configured one, so
 * that a job gives the same samples in any order. Fields that would change the answer and are not served are refused by
 * name, the others ignored. Errors: ERR_REQUEST; ERR_CONFIG without a chat template; ERR_NOMEM.
 * On success *out is the caller's (request_free); on error it is zeroed. */
int prompt_from_body(const struct prompt_builder *builder, const cJSON *body, const char *what,
                     struct request *out) MUST_CHECK;

/* prompt_logprobs_asked - best tokens to report with every token's log-probability: top_logprobs if the body's logprobs
 * is true, else -1. */
int prompt_logprobs_asked(const cJSON *body);

/* A prompt from a command line or a questions file; its image files are trusted. */
struct prompt_text {
    const char *text;
    size_t size;
    const char *const *images; /* [n_images] paths */
    int n_images;
    bool raw; /* text for the tokenizer as it stands: special tokens are parsed, each "<image>" marks an image, the
                 begin token is added as the tokenizer does; else it is one user message behind the images */
};

/* prompt_from_text - the same for a text; `options` is an object with a body's sampling fields, or NULL. */
int prompt_from_text(const struct prompt_builder *builder, const struct prompt_text *text, const cJSON *options,
                     const char *what, struct request *out) MUST_CHECK;

#endif
