/* Completions as JSON: log-probabilities, text of every kind, numbers that JSON does not have. */
#include "runtime/output.h"

#include "base/json.h"
#include "runtime/prompt.h"
#include "tests/check.h"

static struct tokenizer *tokenizer;

static void open_tokenizer(void) { CHECK_OK(prompt_tokenizer_open(SOURCE_DIR "/models/demo-vlm", &tokenizer)); }

static const int kept[3] = {10, 20, 30};
static struct completion completion(const char *text, size_t size)
{
    static const int32_t tokens[2] = {5, 2};
    return (struct completion){.text = text,
                               .text_size = size,
                               .tokens = tokens,
                               .n_tokens = 2,
                               .finish_reason = FINISH_LENGTH,
                               .prompt_tokens = 590,
                               .image_tokens = 576,
                               .policy = "vl_cache",
                               .budget = {0.1, 0},
                               .kept_tokens_per_layer = kept,
                               .n_layers = 3,
                               .bytes_full = 5000000000,
                               .bytes_kept = 500000000,
                               .first_token_seconds = 0.5,
                               .total_seconds = 1.5};
}

static cJSON *chat(const struct completion *c, int top_logprobs)
{
    struct output_buffer b = {0};
    struct output_chat o = {"chatcmpl-1", "a \"model\"", 1700000000, top_logprobs, tokenizer};
    cJSON *tree = NULL;
    output_chat_completion(&b, &o, c);
    CHECK_OK(output_check(&b));
    CHECK(!memchr(b.text, '\n', b.size));
    CHECK_OK(json_parse(b.text, b.size, "completion", &tree));
    output_free(&b);
    return tree;
}

static void test_fields(void)
{
    struct completion c = completion("4\n\"\\\xf0\x9f\x98\x80\x01", 9);
    cJSON *t = chat(&c, -1);
    const cJSON *choice = json_get(t, "choices")->child, *kv = json_get(t, "kv_cache"), *usage = json_get(t, "usage");
    CHECK(!strcmp(json_get(t, "model")->valuestring, "a \"model\""));
    CHECK(json_get(t, "created")->valuedouble == 1700000000);
    CHECK(!strcmp(json_get(json_get(choice, "message"), "content")->valuestring, "4\n\"\\\xf0\x9f\x98\x80\x01"));
    CHECK(!strcmp(json_get(choice, "finish_reason")->valuestring, "length") && !json_get(choice, "logprobs"));
    CHECK(json_get(usage, "prompt_tokens")->valueint == 590 && json_get(usage, "completion_tokens")->valueint == 2);
    CHECK(json_get(usage, "total_tokens")->valueint == 592 && json_get(usage, "image_tokens")->valueint == 576);
    CHECK(json_get(kv, "budget")->valuedouble == 0.1 && json_get(kv, "prompt_tokens")->valueint == 590);
    CHECK(json_get(kv, "bytes_full")->valuedouble == 5e9 && json_get(kv, "bytes_kept")->valuedouble == 5e8);
    CHECK(cJSON_GetArraySize(json_get(kv, "kept_tokens_per_layer")) == 3);
    CHECK(cJSON_GetArrayItem(json_get(kv, "kept_tokens_per_layer"), 2)->valueint == 30);
    cJSON_Delete(t);

    c = completion("\xff\xc3", 2); /* never from the engine; must stay JSON all the same */
    c.budget = (struct kv_budget){1, 64};
    t = chat(&c, 3);
    choice = json_get(t, "choices")->child;
    CHECK(!strcmp(json_get(json_get(choice, "message"), "content")->valuestring, "\xef\xbf\xbd\xef\xbf\xbd"));
    CHECK(!strcmp(json_get(json_get(t, "kv_cache"), "budget")->valuestring, "64t") && !json_get(choice, "logprobs"));
    cJSON_Delete(t);
}

/* The byte-level token of one byte. */
static int32_t byte_token(const char *printable)
{
    int32_t id = tokenizer_find(tokenizer, printable);
    CHECK(id >= 0);
    return id;
}

static void test_logprobs(void)
{
    struct completion c = completion("x", 1);
    /* "A" with "!" and a blank before it; the end token with a third of a character and the least number. */
    float logprob[6] = {-0.25f, -0.5f, -1, -1.5f, -2, -INFINITY};
    int32_t token[6] = {byte_token("A"), byte_token("!"), byte_token("\xc4\xa0"), 2, byte_token("\xc3\xa2"), 5};
    c.logprob = logprob;
    c.logprob_token = token;
    c.n_logprobs = 2;
    cJSON *t = chat(&c, 2);
    const cJSON *content = json_get(json_get(json_get(t, "choices")->child, "logprobs"), "content"),
                *first = cJSON_GetArrayItem(content, 0), *second = cJSON_GetArrayItem(content, 1),
                *top = json_get(first, "top_logprobs"), *top2 = json_get(second, "top_logprobs");
    CHECK(cJSON_GetArraySize(content) == 2 && cJSON_GetArraySize(top) == 2);
    CHECK(!strcmp(json_get(first, "token")->valuestring, "A") && json_get(first, "logprob")->valuedouble == -0.25);
    CHECK(json_get(first, "bytes")->child->valueint == 'A');
    CHECK(!strcmp(json_get(top->child, "token")->valuestring, "!"));
    CHECK(!strcmp(json_get(cJSON_GetArrayItem(top, 1), "token")->valuestring, " "));
    CHECK(!strcmp(json_get(second, "token")->valuestring, "</s>"));
    CHECK(!strcmp(json_get(top2->child, "token")->valuestring, "\xef\xbf\xbd") && !json_get(top2->child, "bytes"));
    CHECK(json_get(cJSON_GetArrayItem(top2, 1), "logprob")->valuedouble == -9999);
    cJSON_Delete(t);
    t = chat(&c, 0); /* asked for the chosen tokens only */
    content = json_get(json_get(json_get(t, "choices")->child, "logprobs"), "content");
    CHECK(cJSON_GetArraySize(content) == 2 && !cJSON_GetArraySize(json_get(content->child, "top_logprobs")));
    cJSON_Delete(t);
}

static void test_generate(void)
{
    struct output_buffer b = {0};
    struct completion c = completion("a", 1);
    cJSON *t;
    output_printf(&b, "old");
    output_clear(&b);
    output_generate(&b, &c);
    CHECK_OK(json_parse(b.text, b.size, "generate", &t));
    CHECK(!strcmp(json_get(t, "text")->valuestring, "a"));
    CHECK(json_get(json_get(t, "timing"), "decode_tokens_per_second")->valuedouble == 1);
    cJSON_Delete(t);
    output_free(&b);
}

static void close_tokenizer(void) { tokenizer_close(tokenizer); }

int main(void)
{
    return check_run("output", (struct check_case[]){{"open", open_tokenizer},
                                                     {"chat completion", test_fields},
                                                     {"log-probabilities", test_logprobs},
                                                     {"generate", test_generate},
                                                     {"close", close_tokenizer},
                                                     {0}});
}
