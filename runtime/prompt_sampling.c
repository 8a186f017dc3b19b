/* The fields of a body that steer sampling, and those that this build does not serve. Names, ranges and the order of
 * precedence are vLLM's: the request's value, else generation_config.json's, else OpenAI's default. */
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "base/json.h"
#include "runtime/prompt_internal.h"

/* Fields that change what the answer means: a value other than null, false, empty or a harmless word is refused. */
static const struct refused {
    const char *name, *harmless[2];
} refused[] = {{"tools", {0}},
               {"functions", {0}},
               {"tool_choice", {"none", "auto"}},
               {"function_call", {"none", "auto"}},
               {"logit_bias", {0}},
               {"use_beam_search", {0}},
               {"prompt_logprobs", {0}},
               {"echo", {0}},
               {"continue_final_message", {0}},
               {"chat_template", {0}},
               {"chat_template_kwargs", {0}},
               {"documents", {0}},
               {"bad_words", {0}},
               {"allowed_token_ids", {0}},
               {"logits_processors", {0}},
               {"structured_outputs", {0}},
               {"guided_json", {0}},
               {"guided_regex", {0}},
               {"guided_choice", {0}},
               {"guided_grammar", {0}},
               {"truncate_prompt_tokens", {0}},
               {"mm_processor_kwargs", {0}},
               {"audio", {0}},
               {"suffix", {0}}};

static bool is_empty(const cJSON *item)
{
    if (!item || cJSON_IsFalse(item)) return true;
    if (cJSON_IsString(item)) return !*item->valuestring;
    return (cJSON_IsArray(item) || cJSON_IsObject(item)) && !item->child;
}

static bool is_word(const cJSON *item, const char *word)
{
    return word && cJSON_IsString(item) && !strcmp(item->valuestring, word);
}

static int check_refused(const cJSON *body, const char *what)
{
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        const cJSON *item = json_get(body, refused[i].name);
        if (is_empty(item) || is_word(item, refused[i].harmless[0]) || is_word(item, refused[i].harmless[1])) continue;
        FAIL(ERR_REQUEST, "%s: %s is not served; leave it out", what, refused[i].name);
    }
    const cJSON *format = json_get(body, "response_format"), *modality;
    if (format && !is_word(json_get(format, "type"), "text"))
        FAIL(ERR_REQUEST, "%s: response_format is not served but for {\"type\": \"text\"}", what);
    cJSON_ArrayForEach (modality, json_get(body, "modalities"))
        if (!is_word(modality, "text")) FAIL(ERR_REQUEST, "%s: modalities other than text are not served", what);
    bool template = true, skip = true, stream = false;
    TRY(json_bool(body, what, "add_generation_prompt", &template));
    TRY(json_bool(body, what, "skip_special_tokens", &skip));
    TRY(json_bool(body, what, "stream", &stream));
    if (!template) FAIL(ERR_REQUEST, "%s: add_generation_prompt false is not served", what);
    if (!skip) FAIL(ERR_REQUEST, "%s: skip_special_tokens false is not served", what);
    int64_t n = 1, best_of = 1;
    TRY(json_int(body, what, "n", 1, 1024, &n));
    TRY(json_int(body, what, "best_of", 1, 1024, &best_of));
    if (n != 1) FAIL(ERR_REQUEST, "%s: n must be 1: send the request several times with different seeds", what);
    if (best_of != 1) FAIL(ERR_REQUEST, "%s: best_of must be 1", what);
    const char *model = NULL;
    return json_string(body, what, "model", &model);
}

static int float_field(const cJSON *body, const char *what, const char *key, double min, double max, float *out)
{
    double value = (double)*out;
    TRY(json_double(body, what, key, min, max, &value));
    *out = (float)value;
    return OK;
}

static void presets(const struct prompt_builder *b, const char *what, struct request *out)
{
    const struct sampling_defaults *d = &b->dims->sampling;
    struct sampling_params *s = &out->sampling;
    *s = (struct sampling_params){.temperature = 1, .top_p = 1, .repetition_penalty = 1};
    if (d->has_temperature) s->temperature = (float)d->temperature;
    if (d->has_do_sample && !d->do_sample) s->temperature = 0;
    if (d->has_top_p) s->top_p = (float)d->top_p;
    if (d->has_top_k && d->top_k > 0) s->top_k = d->top_k;
    if (d->has_repetition_penalty) s->repetition_penalty = (float)d->repetition_penalty;
    s->seed = hash_mix(b->config->seed, hash_bytes(what, strlen(what)));
    out->max_tokens = d->has_max_new_tokens && d->max_new_tokens > 0 ? d->max_new_tokens : PROMPT_DEFAULT_MAX_TOKENS;
    out->budget = b->config->kv_cache.budget;
}

static int read_params(const struct prompt_builder *b, const cJSON *body, const char *what, struct sampling_params *s)
{
    enum { EXACT = 1 << 30 };
    int64_t top_k = s->top_k, seed = 0;
    TRY(float_field(body, what, "temperature", 0, 100, &s->temperature));
    TRY(float_field(body, what, "top_p", 0, 1, &s->top_p));
    TRY(float_field(body, what, "min_p", 0, 1, &s->min_p));
    TRY(float_field(body, what, "presence_penalty", -2, 2, &s->presence_penalty));
    TRY(float_field(body, what, "frequency_penalty", -2, 2, &s->frequency_penalty));
    TRY(float_field(body, what, "repetition_penalty", 0, 100, &s->repetition_penalty));
    if (!(s->top_p > 0)) FAIL(ERR_REQUEST, "%s: top_p must be above 0", what);
    if (!(s->repetition_penalty > 0)) FAIL(ERR_REQUEST, "%s: repetition_penalty must be above 0", what);
    TRY(json_int(body, what, "top_k", -1, EXACT, &top_k));
    s->top_k = top_k <= 0 || top_k >= b->dims->vocab_size ? 0 : (int32_t)top_k;
    if (json_get(body, "seed")) {
        TRY(json_int(body, what, "seed", -(1LL << 53), 1LL << 53, &seed));
        s->seed = (uint64_t)seed;
    }
    return OK;
}

static int read_logprobs(const cJSON *body, const char *what, struct sampling_params *s)
{
    bool asked = false;
    int64_t top = 0;
    TRY(json_bool(body, what, "logprobs", &asked));
    TRY(json_int(body, what, "top_logprobs", 0, MAX_LOGPROBS, &top));
    if (top && !asked) FAIL(ERR_REQUEST, "%s: top_logprobs needs logprobs: true", what);
    /* The engine reports the chosen token with at least one other; the writer leaves out what was not asked for. */
    s->n_logprobs = asked ? (top ? (int32_t)top : 1) : 0;
    return OK;
}

int prompt_logprobs_asked(const cJSON *body)
{
    const cJSON *top = json_get(body, "top_logprobs");
    if (!cJSON_IsTrue(json_get(body, "logprobs"))) return -1;
    return cJSON_IsNumber(top) ? top->valueint : 0;
}

static int read_limits(const cJSON *body, const char *what, struct request *out, bool *max_tokens_given)
{
    enum { MOST = 1 << 24 };
    int64_t max_tokens = out->max_tokens, min_tokens = 0;
    *max_tokens_given = json_get(body, "max_tokens") || json_get(body, "max_completion_tokens");
    TRY(json_int(body, what, "max_tokens", 1, MOST, &max_tokens));
    TRY(json_int(body, what, "max_completion_tokens", 1, MOST, &max_tokens));
    TRY(json_int(body, what, "min_tokens", 0, MOST, &min_tokens));
    if (min_tokens > max_tokens)
        FAIL(ERR_REQUEST, "%s: min_tokens %d is more than max_tokens %d", what, (int)min_tokens, (int)max_tokens);
    out->max_tokens = (int)max_tokens;
    out->min_tokens = (int)min_tokens;
    TRY(json_bool(body, what, "ignore_eos", &out->ignore_eos));
    return json_bool(body, what, "include_stop_str_in_output", &out->include_stop);
}

static int add_stop(const cJSON *item, const char *what, struct request *out)
{
    if (!cJSON_IsString(item) || !*item->valuestring)
        FAIL(ERR_REQUEST, "%s: stop must be a string, or a list of strings, none of them empty", what);
    if (out->n_stops == REQUEST_MAX_STOPS) FAIL(ERR_REQUEST, "%s: more than %d stop strings", what, REQUEST_MAX_STOPS);
    char *copy = strdup(item->valuestring);
    if (!copy) FAIL(ERR_NOMEM, "no memory for a stop string");
    out->stop[out->n_stops++] = copy;
    return OK;
}

static int read_stops(const struct prompt_builder *b, const cJSON *body, const char *what, struct request *out)
{
    const cJSON *stop = json_get(body, "stop"), *ids = json_get(body, "stop_token_ids"), *item;
    if (stop && !cJSON_IsArray(stop)) TRY(add_stop(stop, what, out));
    if (cJSON_IsArray(stop))
        cJSON_ArrayForEach (item, stop) TRY(add_stop(item, what, out));
    if (ids && !cJSON_IsArray(ids)) FAIL(ERR_REQUEST, "%s: stop_token_ids must be a list of integers", what);
    cJSON_ArrayForEach (item, ids) {
        double id = cJSON_IsNumber(item) ? item->valuedouble : -1;
        if (!(id >= 0 && id < b->dims->vocab_size) || id != (double)(int32_t)id)
            FAIL(ERR_REQUEST, "%s: stop_token_ids must be integers from 0 to %d", what, b->dims->vocab_size - 1);
        if (out->n_stop_ids == REQUEST_MAX_STOP_IDS)
            FAIL(ERR_REQUEST, "%s: more than %d stop_token_ids", what, REQUEST_MAX_STOP_IDS);
        out->stop_id[out->n_stop_ids++] = (int32_t)id;
    }
    return OK;
}

/* kv_cache: {"budget": 0.2} or {"budget": "64t"}. */
static int read_kv_cache(const cJSON *body, const char *what, struct request *out)
{
    const cJSON *map = json_get(body, "kv_cache"), *item;
    if (!map) return OK;
    if (!cJSON_IsObject(map)) FAIL(ERR_REQUEST, "%s: kv_cache must be an object, as in {\"budget\": 0.1}", what);
    cJSON_ArrayForEach (item, map)
        if (strcmp(item->string, "budget"))
            FAIL(ERR_REQUEST, "%s: kv_cache.%.100s cannot be set by a request, only kv_cache.budget can", what,
                 item->string);
    const cJSON *budget = json_get(map, "budget");
    if (!budget) return OK;
    if (cJSON_IsString(budget)) {
        int rc = kv_budget_parse(budget->valuestring, &out->budget);
        return rc ? status_prefix(rc, "%s: kv_cache", what) : OK;
    }
    if (!cJSON_IsNumber(budget) || !(budget->valuedouble > 0) || budget->valuedouble > 1)
        FAIL(ERR_REQUEST,
             "%s: kv_cache.budget must be the share of prompt tokens to keep, above 0 and at most 1, or "
             "tokens as in \"64t\"",
             what);
    out->budget = (struct kv_budget){budget->valuedouble, 0};
    return OK;
}

static int read_all(const struct prompt_builder *b, const cJSON *body, const char *what, struct request *out,
                    bool *max_tokens_given)
{
    TRY(check_refused(body, what));
    TRY(read_params(b, body, what, &out->sampling));
    TRY(read_logprobs(body, what, &out->sampling));
    TRY(read_limits(body, what, out, max_tokens_given));
    TRY(read_stops(b, body, what, out));
    return read_kv_cache(body, what, out);
}

int prompt__sampling(const struct prompt_builder *b, const cJSON *body, const char *what, struct request *out,
                     bool *max_tokens_given)
{
    presets(b, what, out);
    *max_tokens_given = false;
    if (!body) return OK;
    int rc = read_all(b, body, what, out, max_tokens_given);
    return rc == ERR_FORMAT || rc == ERR_CONFIG ? ERR_REQUEST : rc;
}
