#include "runtime/output.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"

/* ---- the buffer ---- */

static bool make_room(struct output_buffer *b, size_t more)
{
    if (b->failed) return false;
    if (b->size + more + 1 <= b->room) return true;
    size_t room = (b->size + more + 1) * 2;
    char *text = realloc(b->text, room);
    if (!text) {
        b->failed = true;
        return false;
    }
    b->text = text;
    b->room = room;
    return true;
}

void output_printf(struct output_buffer *b, const char *format, ...)
{
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (n >= 0 && make_room(b, (size_t)n)) {
        vsnprintf(b->text + b->size, (size_t)n + 1, format, again);
        b->size += (size_t)n;
    }
    va_end(again);
}

void output_string(struct output_buffer *b, const char *text, size_t size)
{
    char *quoted = json_quote(text, size);
    size_t n = quoted ? strlen(quoted) : 0;
    if (!quoted) b->failed = true;
    if (quoted && make_room(b, n)) {
        memcpy(b->text + b->size, quoted, n + 1);
        b->size += n;
    }
    free(quoted);
}

void output_clear(struct output_buffer *b)
{
    b->size = 0;
    b->failed = false;
}

void output_free(struct output_buffer *b)
{
    free(b->text);
    memset(b, 0, sizeof *b);
}

int output_check(const struct output_buffer *b)
{
    if (b->failed) FAIL(ERR_NOMEM, "no memory for an answer of more than %zu bytes", b->size);
    return OK;
}

/* ---- completions ---- */

static void put_usage(struct output_buffer *b, const struct completion *c)
{
    output_printf(b,
                  "\"usage\":{\"prompt_tokens\":%d,\"completion_tokens\":%d,\"total_tokens\":%d,\"image_tokens\":%d}",
                  c->prompt_tokens, c->n_tokens, c->prompt_tokens + c->n_tokens, c->image_tokens);
}

static void put_kv_cache(struct output_buffer *b, const struct completion *c)
{
    char budget[32];
    const char *quote = c->budget.tokens ? "\"" : "";
    output_printf(b, "\"kv_cache\":{\"policy\":");
    output_string(b, c->policy ? c->policy : "", c->policy ? strlen(c->policy) : 0);
    output_printf(b, ",\"budget\":%s%s%s,\"prompt_tokens\":%d,\"kept_tokens_per_layer\":[", quote,
                  kv_budget_print(c->budget, budget, sizeof budget), quote, c->prompt_tokens);
    for (int i = 0; i < c->n_layers; i++) output_printf(b, "%s%d", i ? "," : "", c->kept_tokens_per_layer[i]);
    output_printf(b, "],\"bytes_full\":%" PRId64 ",\"bytes_kept\":%" PRId64, c->bytes_full, c->bytes_kept);
    if (c->bytes_host) output_printf(b, ",\"bytes_host\":%" PRId64, c->bytes_host);
    output_printf(b, "}");
}

/* The text that a token adds: a decoder may drop the space before the first one, so it is decoded behind itself. */
static char *token_text(const struct tokenizer *t, int32_t id, size_t *size)
{
    int32_t twice[2] = {id, id};
    char *one, *two;
    size_t n_one, n_two;
    if (tokenizer_decode(t, twice, 1, false, &one, &n_one)) return NULL;
    int rc = tokenizer_decode(t, twice, 2, false, &two, &n_two);
    free(one);
    if (rc) return NULL;
    *size = n_two > n_one ? n_two - n_one : 0;
    memmove(two, two + (n_two - *size), *size + 1);
    return two;
}

/* One token with its log-probability: {"token", "logprob", "bytes", left open for more. */
static void put_token(struct output_buffer *b, const struct tokenizer *t, int32_t id, float logprob)
{
    static const char replacement[] = "\xef\xbf\xbd";
    size_t size;
    char *text = token_text(t, id, &size);
    if (!text) {
        b->failed = true;
        return;
    }
    output_printf(b, "{\"token\":");
    output_string(b, text, size);
    output_printf(b, ",\"logprob\":%.9g", isfinite(logprob) ? (double)logprob : -9999.0);
    if (memmem(text, size, replacement, 3)) { /* a part of a character: its bytes cannot be told from the text */
        output_printf(b, ",\"bytes\":null");
    } else {
        output_printf(b, ",\"bytes\":[");
        for (size_t i = 0; i < size; i++) output_printf(b, "%s%d", i ? "," : "", (unsigned char)text[i]);
        output_printf(b, "]");
    }
    free(text);
}

static void put_logprobs(struct output_buffer *b, const struct output_chat *chat, const struct completion *c)
{
    if (chat->top_logprobs < 0 || !c->logprob || c->n_logprobs < 1) {
        output_printf(b, "\"logprobs\":null");
        return;
    }
    int stride = 1 + c->n_logprobs, top = chat->top_logprobs < c->n_logprobs ? chat->top_logprobs : c->n_logprobs;
    output_printf(b, "\"logprobs\":{\"content\":[");
    for (int i = 0; i < c->n_tokens; i++) {
        const float *logprob = c->logprob + (size_t)i * stride;
        const int32_t *token = c->logprob_token + (size_t)i * stride;
        if (i) output_printf(b, ",");
        put_token(b, chat->tokenizer, token[0], logprob[0]);
        output_printf(b, ",\"top_logprobs\":[");
        for (int k = 1; k <= top; k++) {
            if (k > 1) output_printf(b, ",");
            put_token(b, chat->tokenizer, token[k], logprob[k]);
            output_printf(b, "}");
        }
        output_printf(b, "]}");
    }
    output_printf(b, "]}");
}

void output_chat_completion(struct output_buffer *b, const struct output_chat *chat, const struct completion *c)
{
    output_printf(b, "{\"id\":");
    output_string(b, chat->id, strlen(chat->id));
    output_printf(b, ",\"object\":\"chat.completion\",\"created\":%" PRId64 ",\"model\":", chat->created);
    output_string(b, chat->model, strlen(chat->model));
    output_printf(b, ",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":");
    output_string(b, c->text, c->text_size);
    output_printf(b, "},\"finish_reason\":\"%s\",", finish_reason_name(c->finish_reason));
    put_logprobs(b, chat, c);
    output_printf(b, "}],");
    put_usage(b, c);
    output_printf(b, ",");
    put_kv_cache(b, c);
    output_printf(b, "}");
}

void output_generate(struct output_buffer *b, const struct completion *c)
{
    double decode = c->total_seconds - c->first_token_seconds;
    output_printf(b, "{\"text\":");
    output_string(b, c->text, c->text_size);
    output_printf(b, ",\"finish_reason\":\"%s\",", finish_reason_name(c->finish_reason));
    put_usage(b, c);
    output_printf(b, ",");
    put_kv_cache(b, c);
    output_printf(b,
                  ",\"timing\":{\"queue_seconds\":%.6f,\"first_token_seconds\":%.6f,\"total_seconds\":%.6f,"
                  "\"decode_tokens_per_second\":%.3f}}",
                  c->queue_seconds, c->first_token_seconds, c->total_seconds,
                  c->n_tokens > 1 && decode > 0 ? (c->n_tokens - 1) / decode : 0.0);
}
