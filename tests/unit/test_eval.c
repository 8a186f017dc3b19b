/* Evaluation on an engine that only pretends: questions files, the list of runs, scores, reports, and what is refused.
 */
#include "runtime/eval.h"

#include <signal.h>
#include <unistd.h>

#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "runtime/eval_internal.h"
#include "tests/check.h"
#include "tests/fake_engine.h"
#include "tests/svg.h"

#define MODEL SOURCE_DIR "/models/demo-vlm"
enum { QUESTIONS = 6 };

static struct config config;
static struct model_dims dims;
static struct prompt_builder *builder;
static struct engine engine;
static char folder[64], questions[128], output[128], journal[160], plot[128];
static bool resume, no_forced;
static const char *dtypes;
static int stop_after; /* answers, then a signal; 0: none */

int liveness_stop_requested(const struct liveness *l)
{
    (void)l;
    return stop_after && engine.n_finished >= stop_after ? SIGINT : 0;
}

static void open_builder(void)
{
    log_set(LOG_ERROR, -1);
    snprintf(folder, sizeof folder, "%s/test_eval.XXXXXX", P_tmpdir);
    CHECK(mkdtemp(folder) != NULL);
    snprintf(questions, sizeof questions, "%s/q.jsonl", folder);
    snprintf(output, sizeof output, "%s/out.json", folder);
    snprintf(journal, sizeof journal, "%s/out.json.partial", folder);
    snprintf(plot, sizeof plot, "%s/out.svg", folder);
    CHECK_OK(config_defaults(&config));
    strcpy(config.model, MODEL);
    config.max_num_seqs = 3;
    CHECK_OK(model_dims_load(MODEL, &dims));
    CHECK_OK(prompt_open(&config, &dims, &builder));
    char link[192];
    snprintf(link, sizeof link, "%s/page.png", folder);
    CHECK(symlink(MODEL "/dev-eval/images/dev-1p-0000.png", link) == 0);
}

/* What the pretended engine says to question i under the full cache. */
static void expected(int i, int32_t tokens[3], char text[64])
{
    char prompt[128], path[192];
    const char *image = path;
    struct request r;
    struct policy_config full = {.policy = "full"};
    snprintf(path, sizeof path, "%s/page.png", folder);
    int n = snprintf(prompt, sizeof prompt, "USER: %sWhat is FIELD %d? ASSISTANT:", i == 0 ? "<image>\n" : "", i);
    struct prompt_text p = {prompt, (size_t)n, &image, i == 0, true};
    CHECK_OK(prompt_from_text(builder, &p, NULL, "q", &r));
    r.budget = (struct kv_budget){1, 0};
    fake_answer(&r, &full, tokens, text);
    request_free(&r);
}

/* Six questions: 0 has an image; 3's answer is another; 4's reference differs and is a tie, 5's differs and is none. */
static void write_questions(void)
{
    FILE *f = fopen(questions, "w");
    for (int i = 0; i < QUESTIONS; i++) {
        int32_t t[3];
        char text[64];
        expected(i, t, text);
        fprintf(f,
                "{\"id\":\"q%d\",\"images\":[%s],\"prompt\":\"USER: %sWhat is FIELD %d? ASSISTANT:\",\"answer\":\"%s\","
                "\"task\":\"%s\",%s\"model_tokens\":[%d,%d,2],\"min_margin\":%g}\n%s",
                i, i == 0 ? "\"page.png\"" : "", i == 0 ? "<image>\\n" : "", i, i == 3 ? "something else" : text,
                i < 2 ? "find" : "count",
                i == 5   ? "\"long\":true,"
                : i == 1 ? "\"followup\":{\"prompt\":\" USER: And?\",\"answer\":\"answer 1 2\"},"
                         : "",
                t[0], t[1] + (i >= 4), i == 4 ? 0.01 : 2.5, i == 2 ? "\n  \n" : "");
    }
    fclose(f);
}

static int run(const char *policies, const char *budgets, FILE *table, struct eval_result *result)
{
    memset(&engine, 0, sizeof engine);
    engine.max_queued = 4;
    struct eval_options options = {.questions = questions,
                                   .output = output,
                                   .plot = plot,
                                   .resume = resume,
                                   .no_forced = no_forced,
                                   .policies = policies,
                                   .budgets = budgets,
                                   .dtypes = dtypes,
                                   .max_in_flight = 8,
                                   .table = table,
                                   .liveness = (struct liveness *)&engine};
    return eval_run(&engine, builder, &options, result);
}

static double number(const cJSON *o, const char *key)
{
    const cJSON *item = json_get(o, key);
    CHECK(cJSON_IsNumber(item));
    return cJSON_IsNumber(item) ? item->valuedouble : -1;
}

/* The fake's own tokens have -0.25 each; at a small budget it would say another second one of three. */
static void check_likelihoods(const cJSON *full, const cJSON *small, const cJSON *large)
{
    CHECK(number(full, "log_likelihood") == -0.25 && number(large, "log_likelihood") == -0.25);
    CHECK(fabs(number(small, "log_likelihood") - (-2.5 / 3)) < 1e-8);
}

static void test_runs(void)
{
    struct eval_result r;
    char *table = NULL;
    size_t table_size;
    FILE *f = open_memstream(&table, &table_size);
    write_questions();
    CHECK_OK(run("vl_cache,full", "0.1,0.9,64t", f, &r));
    fclose(f);
    CHECK(r.n_questions == QUESTIONS && r.n_runs == 4 && !r.stop_signal);
    CHECK(r.n_unlike_reference == 2 && r.n_ties == 1);
    CHECK(strstr(table, "5/6") && strstr(table, "q4: unlike the reference from token 1 on"));
    CHECK(strstr(table, "margin of the reference 0.01, a tie") && strstr(table, "2.5\n"));
    free(table);

    cJSON *tree;
    CHECK_OK(json_parse_file(output, 1 << 20, &tree));
    const cJSON *runs = json_get(tree, "runs"), *items = json_get(tree, "items");
    CHECK(cJSON_GetArraySize(runs) == 4 && cJSON_GetArraySize(items) == 4 * QUESTIONS);
    const cJSON *a = cJSON_GetArrayItem(runs, 0), *b = cJSON_GetArrayItem(runs, 1), *c = cJSON_GetArrayItem(runs, 2),
                *d = cJSON_GetArrayItem(runs, 3);
    CHECK(!strcmp(json_get(d, "policy")->valuestring, "full") && number(d, "budget") == 1);
    CHECK(number(a, "budget") == 0.1 && number(b, "budget") == 0.9);
    CHECK(!strcmp(json_get(c, "budget")->valuestring, "64t"));
    CHECK(fabs(number(d, "exact_match") - 5.0 / 6) < 1e-8 && number(d, "same_as_full") == 1);
    CHECK(fabs(number(d, "same_as_reference") - 4.0 / 6) < 1e-8 && number(d, "n_reference") == QUESTIONS);
    CHECK(cJSON_GetArraySize(json_get(d, "unlike_reference")) == 2);
    CHECK(number(a, "exact_match") == 0 && number(a, "same_as_full") == 0);
    CHECK(fabs(number(b, "exact_match") - 5.0 / 6) < 1e-8 && number(b, "same_as_full") == 1);
    check_likelihoods(d, a, b);
    const cJSON *find = json_get(json_get(d, "tasks"), "find"), *rest = json_get(json_get(d, "tasks"), "count");
    CHECK(number(find, "n") == 2 && number(find, "exact_match") == 1 && number(find, "log_likelihood") == -0.25);
    CHECK(number(rest, "n") == 4 && number(rest, "exact_match") == 0.75 && number(rest, "anls") < 1);
    CHECK(number(json_get(d, "long"), "n") == 1 && number(json_get(d, "long"), "anls") == 1);
    CHECK(number(d, "bytes_read_per_step") > 100 && !strcmp(json_get(d, "dtype")->valuestring, "auto"));
    const cJSON *next = json_get(d, "followup"); /* another number, mostly */
    CHECK(number(next, "n") == 1 && number(next, "exact_match") == 0 && number(next, "same_as_full") == 1);
    CHECK(number(next, "anls") > 0 && number(json_get(a, "followup"), "same_as_full") == 0);
    CHECK(access(journal, F_OK) != 0);
    CHECK(number(a, "token_f1") > 0.5 && number(a, "token_f1") < 0.7); /* two of three words */
    CHECK(fabs(number(d, "kept_share") - 0.25) < 1e-9 && number(d, "generated_tokens") == 3 * QUESTIONS);
    const cJSON *item = cJSON_GetArrayItem(items, 3 * QUESTIONS);
    CHECK(!strcmp(json_get(item, "id")->valuestring, "q0") && cJSON_IsTrue(json_get(item, "correct")));
    CHECK(!strncmp(json_get(item, "text")->valuestring, "answer ", 7));
    CHECK(cJSON_GetArraySize(json_get(item, "tokens")) == 3);
    cJSON_Delete(tree);
}

/* ---- continuations ---- */

static void write_continuations(void)
{
    FILE *f = fopen(questions, "w");
    fputs("{\"id\":\"said\",\"prompt\":\"USER: Which? ASSISTANT:\",\"answer\":\"x\",\"task\":\"ask\"}\n", f);
    for (int i = 0; i < 2; i++)
        fprintf(f, "{\"id\":\"read%d\",\"prompt\":\"A page %d\",\"continuation\":\" and so on\",\"task\":\"read\"}\n",
                i, i);
    fclose(f);
}

/* What the pretended engine says to " and so on": a token that is not its own is unlikely. */
static double expected_likelihood(int i, int *n)
{
    char prompt[64], text[64];
    int32_t own[3], *tokens;
    size_t n_tokens;
    struct request r;
    struct policy_config full = {.policy = "full"};
    int size = snprintf(prompt, sizeof prompt, "A page %d", i);
    struct prompt_text p = {prompt, (size_t)size, NULL, 0, true};
    double sum = 0;
    CHECK_OK(prompt_from_text(builder, &p, NULL, "q", &r));
    r.budget = (struct kv_budget){1, 0};
    fake_answer(&r, &full, own, text);
    request_free(&r);
    CHECK_OK(tokenizer_encode(prompt_tokenizer(builder), " and so on", 10, 0, &tokens, &n_tokens));
    CHECK(n_tokens > 1 && n_tokens <= 8);
    for (size_t k = 0; k < n_tokens; k++) sum += k < 3 && tokens[k] != own[k] ? -2 : -0.25;
    *n = (int)n_tokens;
    free(tokens);
    return sum;
}

static void check_continuations(const cJSON *run, int n, double mean)
{
    const cJSON *ask = json_get(json_get(run, "tasks"), "ask"), *read = json_get(json_get(run, "tasks"), "read");
    CHECK(number(run, "n") == 3 && number(run, "exact_match") == 0 && number(ask, "n") == 1);
    CHECK(number(read, "n") == 2 && !json_get(read, "exact_match"));
    CHECK(!json_get(read, "same_as_full") && !json_get(read, "anls"));
    CHECK(fabs(number(read, "log_likelihood") - mean) < 1e-8);
    CHECK(fabs(number(read, "perplexity") / exp(-mean) - 1) < 1e-8);
    CHECK(number(run, "generated_tokens") == 3 + 2 * n);
}

/* Asked once in every run, the full cache's and one without a full cache included, and scored by the file's text. */
static void test_continuations(void)
{
    struct eval_result r;
    char *table = NULL;
    size_t table_size;
    FILE *f = open_memstream(&table, &table_size);
    int n;
    double sum = expected_likelihood(0, &n) + expected_likelihood(1, &n);
    write_continuations();
    CHECK_OK(run("full,vl_cache", "0.1", f, &r));
    fclose(f);
    CHECK(engine.n_finished == 3 + 3 + 1); /* the answer is forced as well */
    CHECK(strstr(table, "perplexity") && strstr(table, "0/1"));
    free(table);
    cJSON *tree;
    CHECK_OK(json_parse_file(output, 1 << 20, &tree));
    for (int i = 0; i < 2; i++) check_continuations(cJSON_GetArrayItem(json_get(tree, "runs"), i), n, sum / (2 * n));
    const cJSON *item = cJSON_GetArrayItem(json_get(tree, "items"), 1);
    CHECK(number(item, "likelihood_tokens") == n && !json_get(item, "correct"));
    cJSON_Delete(tree);
    CHECK_OK(run("vl_cache", "0.1", NULL, &r));
    CHECK_OK(json_parse_file(output, 1 << 20, &tree));
    check_continuations(cJSON_GetArrayItem(json_get(tree, "runs"), 0), n, sum / (2 * n));
    cJSON_Delete(tree);
}

/* ---- the journal ---- */

static const char *const policies = "vl_cache,full";

/* The output with its times made 0; the caller frees it. */
static char *read_output(void)
{
    char *text;
    size_t size;
    CHECK_OK(file_read_all(output, 1 << 20, &text, &size));
    for (char *at = text; (at = strstr(at, "\"seconds\":")); at += 10)
        for (char *c = at + 10; *c != ','; c++) *c = '0';
    return text;
}

/* Stopped after k answers and gone on with, from a last line that is torn: the same result, nothing asked twice. */
static void check_stopped(int k, const char *whole, int n_asked)
{
    struct eval_result r;
    stop_after = k;
    resume = k % 2; /* with no journal there it makes no difference */
    CHECK_OK(run(policies, "0.1,0.9", NULL, &r));
    CHECK(r.stop_signal == SIGINT && access(journal, F_OK) == 0);
    int first = engine.n_finished;
    stop_after = 0;
    resume = false;
    CHECK_FAILS(run(policies, "0.1,0.9", NULL, &r), ERR_CONFIG, "out.json.partial exists");
    FILE *f = fopen(journal, "a");
    fputs(k % 3 ? "{\"policy\":\"full\",\"budg" : "", f);
    fclose(f);
    resume = true;
    CHECK_OK(run(policies, "0.1,0.9", NULL, &r));
    CHECK(!r.stop_signal && first >= k && first + engine.n_finished == n_asked);
    char *again = read_output();
    CHECK(!strcmp(again, whole));
    free(again);
    CHECK(access(journal, F_OK) != 0);
    resume = false;
}

static void test_resume(void)
{
    struct eval_result r;
    write_questions();
    CHECK_OK(run(policies, "0.1,0.9", NULL, &r));
    int n_asked = engine.n_finished;
    CHECK(n_asked == 5 * QUESTIONS); /* three runs, two of them with forced answers */
    char *whole = read_output();
    CHECK(strstr(whole, "\"seconds\":0") != NULL);
    for (int k = 1; k < n_asked - 1; k += 3) check_stopped(k, whole, n_asked);
    free(whole);
    write_continuations();
    CHECK_OK(run(policies, "0.1,0.9", NULL, &r));
    n_asked = engine.n_finished;
    whole = read_output();
    for (int k = 1; k < n_asked - 1; k++) check_stopped(k, whole, n_asked);
    free(whole);
    write_questions();
    no_forced = true;
    CHECK_OK(run(policies, "0.1,0.9", NULL, &r));
    CHECK(engine.n_finished == 3 * QUESTIONS);
    no_forced = false;
}

/* A journal of another questions file, configuration or format is refused and left as it was. */
static void test_other_journal(void)
{
    struct eval_result r;
    stop_after = 4;
    CHECK_OK(run("full", NULL, NULL, &r));
    stop_after = 0;
    resume = true;
    FILE *f = fopen(questions, "a");
    fputs("\n", f);
    fclose(f);
    CHECK_FAILS(run("full", NULL, NULL, &r), ERR_CONFIG, "made with another questions file");
    write_questions();
    config.kv_cache.vl_cache.threshold = 0.5;
    CHECK_FAILS(run("full", NULL, NULL, &r), ERR_CONFIG, "made with another configuration");
    config.kv_cache.vl_cache.threshold = 0.01;
    f = fopen(journal, "a");
    fputs("no record\n", f);
    fclose(f);
    CHECK_FAILS(run("full", NULL, NULL, &r), ERR_FORMAT, "is no JSON");
    CHECK(access(journal, F_OK) == 0);
    unlink(journal);
    resume = false;
}

/* ---- the plot ---- */

static char *read_plot(void)
{
    char *text;
    size_t size;
    CHECK_OK(file_read_all(plot, 1 << 20, &text, &size));
    CHECK(svg_well_formed(text) && !strstr(text, "nan") && !strstr(text, "inf"));
    return text;
}

static int count(const char *text, const char *part)
{
    int n = 0;
    for (; (text = strstr(text, part)); text++) n++;
    return n;
}

static void test_plot(void)
{
    struct eval_result r;
    CHECK_OK(run("vl_cache,full", "0.9,0.1", NULL, &r));
    char *svg = read_plot(), files[300];
    CHECK(count(svg, "<polyline") == 1 && count(svg, "<circle") == 2 && count(svg, ">vl_cache<") == 1);
    CHECK(count(svg, ">full<") == 1 && strstr(svg, "exact match") && strstr(svg, "q.jsonl: 6 questions"));
    unlink(plot);
    CHECK_OK(eval_plot_files(output, plot));
    char *again = read_plot();
    CHECK(!strcmp(strstr(again, "exact match"), strstr(svg, "exact match")));
    free(svg);
    free(again);
    snprintf(files, sizeof files, "%s,%s", output, output); /* one file twice is one curve with its points twice */
    CHECK_OK(eval_plot_files(files, plot));
    svg = read_plot();
    CHECK(count(svg, "<circle") == 4 && count(svg, ">vl_cache, out.json<") == 1);
    free(svg);
    CHECK_FAILS(eval_plot_files(questions, plot), ERR_FORMAT, "q.jsonl");
    CHECK_FAILS(eval_plot_files("none.json", plot), ERR_IO, "none.json");
}

static void test_lists(void)
{
    struct eval_result r;
    CHECK_OK(run("full", "0.1,0.2", NULL, &r));
    CHECK(r.n_runs == 1);
    CHECK_OK(run("vl_cache", NULL, NULL, &r)); /* the configuration's budget, and no run of the full cache */
    CHECK(r.n_runs == 1 && !r.n_unlike_reference);
    CHECK_OK(run(NULL, NULL, NULL, &r));
    CHECK(r.n_runs == 1 && !strcmp(engine.policy.policy, config.kv_cache.policy));
    CHECK_FAILS(run("vl_cash", NULL, NULL, &r), ERR_CONFIG, "vl_cache");
    CHECK_FAILS(run("full,", NULL, NULL, &r), ERR_CONFIG, "comma list");
    CHECK_FAILS(run("vl_cache", "0.1,,1", NULL, &r), ERR_CONFIG, "comma list");
    CHECK_FAILS(run("vl_cache", "2", NULL, &r), ERR_CONFIG, "budget 2");
    dtypes = "auto,float31";
    CHECK_FAILS(run("full", NULL, NULL, &r), ERR_CONFIG, "float31");
    dtypes = "auto,";
    CHECK_FAILS(run("full", NULL, NULL, &r), ERR_CONFIG, "comma list");
    dtypes = "auto";
    CHECK_OK(run("full", NULL, NULL, &r));
    CHECK(r.n_runs == 1);
    dtypes = "auto,int8,fp8";
    CHECK_OK(run("full,snapkv", "0.1,0.2", NULL, &r));
    CHECK(r.n_runs == 9 && engine.policy.dtype == KV_DTYPE_FP8);
    dtypes = NULL;
}

static void test_signal(void)
{
    struct eval_result r;
    stop_after = 2;
    CHECK_OK(run("full", NULL, NULL, &r));
    CHECK(r.stop_signal == SIGINT && engine.n == 0 && !r.n_runs);
    stop_after = 0;
    CHECK(unlink(journal) == 0);
}

static void test_bad_files(void)
{
    static const char *const bad[][2] = {
        {"", "no questions"},
        {"\n \n", "no questions"},
        {"{\"id\":\"a\"", "line 1: not valid JSON"},
        {"[]", "line 1: must be an object"},
        {"{\"id\":\"a\",\"prompt\":\"p\"}", "answer is not"},
        {"{\"id\":1,\"prompt\":\"p\",\"answer\":\"x\"}", "id is not"},
        {"{\"id\":\"a\",\"prompt\":\"p\",\"answer\":\"x\",\"images\":\"f\"}", "images must be a list"},
        {"{\"id\":\"a\",\"prompt\":\"p\",\"answer\":\"x\",\"images\":[3]}", "images must be a list"},
        {"{\"id\":\"a\",\"prompt\":\"p\",\"answer\":\"x\",\"model_tokens\":[1.5]}", "model_tokens must be"},
        {"{\"id\":\"a\",\"prompt\":\"p\",\"answer\":\"x\",\"followup\":{\"prompt\":\"q\"}}", "followup must be"},
        {"\n{\"id\":\"a\",\"prompt\":\"p\",\"answer\":\"x\",\"min_margin\":\"z\"}", "line 2: min_margin"},
        {"{\"id\":\"a\",\"prompt\":\"p\",\"continuation\":7}", "continuation must be a text"},
        {"{\"id\":\"a\",\"prompt\":\"p\",\"continuation\":\"\"}", "continuation must be a text"},
        {"{\"id\":\"a\",\"prompt\":\"p\",\"answer\":\"x\",\"continuation\":\"c\"}", "a continuation and answer"},
        {"{\"id\":\"a\",\"prompt\":\"p\",\"continuation\":\"c\",\"followup\":{}}", "continuation and followup"},
    };
    struct eval_result r;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        FILE *f = fopen(questions, "w");
        fputs(bad[i][0], f);
        fclose(f);
        CHECK_FAILS(run("full", NULL, NULL, &r), ERR_FORMAT, bad[i][1]);
    }
    static const char *const unaskable[][2] = {
        {"{\"id\":\"q-x\",\"prompt\":\"<image>\",\"answer\":\"x\",\"images\":[\"none.png\"]}", "q-x: image 1"},
        {"{\"id\":\"q-x\",\"prompt\":\"no place\",\"answer\":\"x\",\"images\":[\"page.png\"]}", "q-x: 1 images"},
    };
    for (size_t i = 0; i < sizeof unaskable / sizeof *unaskable; i++) {
        FILE *f = fopen(questions, "w");
        fprintf(f, "{\"id\":\"ok\",\"prompt\":\"p\",\"answer\":\"x\"}\n%s\n", unaskable[i][0]);
        fclose(f);
        CHECK_FAILS(run("full", NULL, NULL, &r), ERR_REQUEST, unaskable[i][1]);
        CHECK(engine.n == 0);
    }
    unlink(questions);
    CHECK_FAILS(run("full", NULL, NULL, &r), ERR_IO, "q.jsonl");
    write_questions();
    char saved[128];
    strcpy(saved, output);
    snprintf(output, sizeof output, "%s/none/out.json", folder);
    CHECK_FAILS(run("full", NULL, NULL, &r), ERR_IO, "out.json.partial");
    strcpy(output, saved);
}

static void test_f1(void)
{
    CHECK(eval__f1("", 0, "") == 1 && eval__f1("a", 1, "") == 0 && eval__f1("", 0, "a") == 0);
    CHECK(eval__f1("A b\n c", 6, "c  B a") == 1);
    CHECK(fabs(eval__f1("a a b", 5, "a b c d") - 4.0 / 7) < 1e-12);
    CHECK(eval__f1("ab", 2, "abc") == 0);
}

static void test_anls(void)
{
    CHECK(eval__anls("", 0, "") == 1 && eval__anls("a", 1, "") == 0 && eval__anls("", 0, "a") == 0);
    CHECK(eval__anls(" Hello\n", 7, "hELLO ") == 1);
    CHECK(fabs(eval__anls("kitten", 6, "sitting") - (1 - 3.0 / 7)) < 1e-12);
    CHECK(eval__anls("abcd", 4, "abxy") == 0);                                       /* half of it differs */
    CHECK(fabs(eval__anls("abcd", 4, "abcxy") - 0.6) < 1e-12);                       /* two of five */
    CHECK(fabs(eval__anls("caf\xc3\xa9", 5, "caf\xc3\xa8") - 0.75) < 1e-12);         /* one character, not bytes */
    CHECK(fabs(eval__anls("\xe2\x82\xac 12", 6, "\xe2\x82\xac 12.") - 0.8) < 1e-12); /* one more at the end */
}

static void close_builder(void)
{
    char link[192];
    prompt_close(builder);
    snprintf(link, sizeof link, "%s/page.png", folder);
    unlink(link);
    unlink(questions);
    unlink(output);
    unlink(plot);
    CHECK(rmdir(folder) == 0);
}

int main(void)
{
    return check_run("eval", (struct check_case[]){{"open", open_builder},
                                                   {"word overlap", test_f1},
                                                   {"Levenshtein similarity", test_anls},
                                                   {"runs, scores and reports", test_runs},
                                                   {"continuations", test_continuations},
                                                   {"stopped and gone on with", test_resume},
                                                   {"a journal of something else", test_other_journal},
                                                   {"plots", test_plot},
                                                   {"lists of policies and budgets", test_lists},
                                                   {"stopped by a signal", test_signal},
                                                   {"files that are wrong", test_bad_files},
                                                   {"close", close_builder},
                                                   {0}});
}
