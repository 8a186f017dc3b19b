/* vitrail generate - one prompt, one answer: streamed as it comes, or as one line of JSON. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "launch/launch.h"
#include "launch/ranks.h"
#include "runtime/engine.h"
#include "runtime/output.h"
#include "runtime/prompt.h"

/* What the callbacks and the loop share. */
struct answer {
    const struct tokenizer *tokenizer;
    struct request request;
    bool json;
    int rc; /* of a callback */
};

static const struct option options[] = {
    {"prompt", "TEXT", false, "the question; required"},
    {"image", "FILE", true, "a PNG or JPEG file; several stand in the order given, before the text"},
    {"raw-prompt", NULL, false, "no chat template: the text as it is, each <image> in it marks an image"},
    {"json", NULL, false, "print one line of JSON instead of streaming"},
    {"max-tokens", "N", false, "longest answer in tokens (default: 256)"},
    {"min-tokens", "N", false, "no end of the answer before so many tokens"},
    {"temperature", "X", false, "0 takes the likeliest token (default: generation_config.json's, else 1)"},
    {"top-p", "X", false, "sample from the likeliest tokens of this total probability"},
    {"top-k", "N", false, "sample from so many likeliest tokens"},
    {"min-p", "X", false, "sample from tokens at least this share as likely as the likeliest"},
    {"presence-penalty", "X", false, "against tokens that were generated before"},
    {"frequency-penalty", "X", false, "the same, by how often"},
    {"repetition-penalty", "X", false, "against tokens of prompt and answer; 1: none"},
    {"stop", "TEXT", true, "end the answer before this text"},
    {"ignore-eos", NULL, false, "do not end at the model's end token"},
    {NULL, NULL, false, NULL},
};

/* ---- the request ---- */

/* Options become the fields of an OpenAI body, so that both have the same ranges and messages. */
static int add_number(const struct arguments *arguments, const char *option, const char *field, bool whole, cJSON *body)
{
    double value = 0;
    int64_t integer = 0;
    if (!arguments_text(arguments, option)) return OK;
    if (whole)
        TRY(arguments_int(arguments, option, INT32_MIN, INT32_MAX, &integer));
    else
        TRY(arguments_double(arguments, option, -1e9, 1e9, &value));
    if (!cJSON_AddNumberToObject(body, field, whole ? (double)integer : value)) FAIL(ERR_NOMEM, "no memory");
    return OK;
}

static int add_sampling(const struct arguments *arguments, cJSON *body)
{
    static const struct {
        const char *option, *field;
        bool whole;
    } numbers[] = {
        {"max-tokens", "max_tokens", true},
        {"min-tokens", "min_tokens", true},
        {"temperature", "temperature", false},
        {"top-p", "top_p", false},
        {"top-k", "top_k", true},
        {"min-p", "min_p", false},
        {"presence-penalty", "presence_penalty", false},
        {"frequency-penalty", "frequency_penalty", false},
        {"repetition-penalty", "repetition_penalty", false},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        TRY(add_number(arguments, numbers[i].option, numbers[i].field, numbers[i].whole, body));
    bool good = true;
    if (arguments_flag(arguments, "ignore-eos")) good = cJSON_AddTrueToObject(body, "ignore_eos") != NULL;
    cJSON *stops = arguments_text(arguments, "stop") ? cJSON_AddArrayToObject(body, "stop") : NULL;
    const char *stop;
    for (int i = 0; stops && (stop = arguments_nth(arguments, "stop", i)); i++)
        good &= cJSON_AddItemToArray(stops, cJSON_CreateString(stop)) != 0;
    if (!good) FAIL(ERR_NOMEM, "no memory for the options of the request");
    return OK;
}

static int build_request(const struct launch *launch, const struct prompt_builder *builder, struct request *out)
{
    const struct arguments *arguments = &launch->arguments;
    const char *text = arguments_text(arguments, "prompt");
    int n = 0, rc;
    const char **images = calloc((size_t)arguments->n + 1, sizeof *images);
    cJSON *body = cJSON_CreateObject();
    if (images && body) {
        while ((images[n] = arguments_nth(arguments, "image", n))) n++;
        struct prompt_text prompt = {.text = text,
                                     .size = strlen(text),
                                     .images = images,
                                     .n_images = n,
                                     .raw = arguments_flag(arguments, "raw-prompt")};
        rc = add_sampling(arguments, body);
        if (!rc) rc = prompt_from_text(builder, &prompt, body, "the prompt", out);
    } else {
        rc = status_set(ERR_NOMEM, __FILE__, __LINE__, "no memory for the request");
    }
    cJSON_Delete(body);
    free(images);
    return rc;
}

/* Before the model is loaded: a missing image is told in a second, not in minutes. */
static int prepare(const struct launch *launch, struct model_dims *dims, struct prompt_builder **builder,
                   struct request *request)
{
    const struct arguments *arguments = &launch->arguments;
    if (!arguments_text(arguments, "prompt")) FAIL(ERR_CONFIG, "vitrail generate needs --prompt TEXT");
    TRY(model_dims_load(launch->config->model, dims));
    TRY(prompt_open(launch->config, dims, builder));
    if (!arguments_flag(arguments, "raw-prompt")) TRY(prompt_check_chat(*builder));
    return build_request(launch, *builder, request);
}

/* ---- the answer ---- */

static int written(const char *what)
{
    if (fflush(stdout) || ferror(stdout)) FAIL(ERR_IO, "cannot write %s to standard output: %s", what, strerror(errno));
    return OK;
}

static void on_text(void *arg, const char *text, size_t size)
{
    struct answer *answer = arg;
    if (answer->rc) return;
    fwrite(text, 1, size, stdout);
    answer->rc = written("the answer");
}

static double tokens_per_second(const struct completion *c)
{
    double seconds = c->total_seconds - c->first_token_seconds;
    return c->n_tokens > 1 && seconds > 0 ? (c->n_tokens - 1) / seconds : 0;
}

static double kept_mean(const struct completion *c)
{
    double sum = 0;
    for (int i = 0; i < c->n_layers; i++) sum += c->kept_tokens_per_layer[i];
    return c->n_layers ? sum / c->n_layers : 0;
}

static void print_summary(const struct completion *c)
{
    double kept = kept_mean(c), mib = 1024.0 * 1024.0;
    fprintf(stderr,
            "prompt %d tokens, %d of them images; %s keeps %.1f a layer (%.1f%%), KV %.2f of %.2f MiB; first token "
            "%.2f s; %d tokens, %.1f tokens/s; %s\n",
            c->prompt_tokens, c->image_tokens, c->policy, kept, c->prompt_tokens ? 100 * kept / c->prompt_tokens : 0.0,
            (double)c->bytes_kept / mib, (double)c->bytes_full / mib, c->first_token_seconds, c->n_tokens,
            tokens_per_second(c), finish_reason_name(c->finish_reason));
}

static int print_json(const struct completion *c)
{
    struct output_buffer line = {0};
    output_generate(&line, c);
    output_printf(&line, "\n");
    int rc = output_check(&line);
    if (!rc) fwrite(line.text, 1, line.size, stdout);
    if (!rc) rc = written("the answer");
    output_free(&line);
    return rc;
}

static void on_done(void *arg, const struct completion *c)
{
    struct answer *answer = arg;
    if (!answer->json && !answer->rc) {
        putchar('\n');
        answer->rc = written("the answer");
    }
    if (answer->json && !answer->rc) answer->rc = print_json(c);
    print_summary(c);
}

/* Rank 0's part: one request until it ends, or until a signal or a closed output ends it early. */
static int work(struct launch *launch, struct engine *engine, void *arg)
{
    struct answer *answer = arg;
    struct sink sink = {.arg = answer, .on_text = answer->json ? NULL : on_text, .on_done = on_done};
    bool aborted = false;
    engine_use_tokenizer(engine, answer->tokenizer);
    TRY(engine_submit(engine, &answer->request, sink));
    for (int active = 1; active > 0;) {
        TRY(engine_step(engine, &active));
        if (aborted || (!answer->rc && !liveness_stop_requested(launch->liveness))) continue;
        TRY(engine_abort_all(engine));
        aborted = true;
    }
    return answer->rc;
}

static int run(struct launch *launch)
{
    struct model_dims dims;
    struct prompt_builder *builder = NULL;
    struct answer answer = {.json = arguments_flag(&launch->arguments, "json")};
    liveness_phase(launch->liveness, "request");
    int rc = launch->comm->rank == 0 ? prepare(launch, &dims, &builder, &answer.request) : OK;
    rc = comm_agree(launch->comm, rc, "request");
    if (builder) answer.tokenizer = prompt_tokenizer(builder);
    if (!rc) rc = ranks_serve(launch, work, &answer);
    request_free(&answer.request);
    prompt_close(builder);
    return rc;
}

const struct command command_generate = {
    .name = "generate",
    .summary = "answer one prompt, with or without images",
    .usage = "[mpirun -np N] vitrail generate --config F [--image FILE ...] --prompt TEXT [options]",
    .options = options,
    .needs_model = true,
    .ranks = true,
    .run = run,
};
