/* Evaluation on an engine that only pretends: questions files, the list of runs, scores, reports, and what is refused.
 */
#include "runtime/eval.h"

#include <signal.h>
#include <unistd.h>

#include "base/json.h"
#include "base/log.h"
#include "runtime/eval_internal.h"
#include "tests/check.h"
#include "tests/fake_engine.h"

#define MODEL SOURCE_DIR "/models/demo-vlm"
enum { QUESTIONS = 6 };

static struct config config;
static struct model_dims dims;
static struct prompt_builder *builder;
static struct engine engine;
static char folder[64], questions[128], output[128];
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
                "\"model_tokens\":[%d,%d,2],\"min_margin\":%g}\n%s",
                i, i == 0 ? "\"page.png\"" : "", i == 0 ? "<image>\\n" : "", i, i == 3 ? "something else" : text, t[0],
                t[1] + (i >= 4), i == 4 ? 0.01 : 2.5, i == 2 ? "\n  \n" : "");
    }
    fclose(f);
}

static int run(const char *policies, const char *budgets, FILE *table, struct eval_result *result)
{
    memset(&engine, 0, sizeof engine);
    engine.max_queued = 4;
    struct eval_options options = {.questions = questions,
                                   .output = output,
                                   .policies = policies,
                                   .budgets = budgets,
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
    CHECK(number(a, "token_f1") > 0.5 && number(a, "token_f1") < 0.7); /* two of three words */
    CHECK(fabs(number(d, "kept_share") - 0.25) < 1e-9 && number(d, "generated_tokens") == 3 * QUESTIONS);
    const cJSON *item = cJSON_GetArrayItem(items, 3 * QUESTIONS);
    CHECK(!strcmp(json_get(item, "id")->valuestring, "q0") && cJSON_IsTrue(json_get(item, "correct")));
    CHECK(!strncmp(json_get(item, "text")->valuestring, "answer ", 7));
    CHECK(cJSON_GetArraySize(json_get(item, "tokens")) == 3);
    cJSON_Delete(tree);
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
}

static void test_signal(void)
{
    struct eval_result r;
    stop_after = 2;
    CHECK_OK(run("full", NULL, NULL, &r));
    CHECK(r.stop_signal == SIGINT && engine.n == 0 && !r.n_runs);
    stop_after = 0;
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
        {"\n{\"id\":\"a\",\"prompt\":\"p\",\"answer\":\"x\",\"min_margin\":\"z\"}", "line 2: min_margin"},
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
    CHECK_FAILS(run("full", NULL, NULL, &r), ERR_IO, "out.json.part");
    strcpy(output, saved);
}

static void test_f1(void)
{
    CHECK(eval__f1("", 0, "") == 1 && eval__f1("a", 1, "") == 0 && eval__f1("", 0, "a") == 0);
    CHECK(eval__f1("A b\n c", 6, "c  B a") == 1);
    CHECK(fabs(eval__f1("a a b", 5, "a b c d") - 4.0 / 7) < 1e-12);
    CHECK(eval__f1("ab", 2, "abc") == 0);
}

static void close_builder(void)
{
    char link[192];
    prompt_close(builder);
    snprintf(link, sizeof link, "%s/page.png", folder);
    unlink(link);
    unlink(questions);
    unlink(output);
    CHECK(rmdir(folder) == 0);
}

int main(void)
{
    return check_run("eval", (struct check_case[]){{"open", open_builder},
                                                   {"word overlap", test_f1},
                                                   {"runs, scores and reports", test_runs},
                                                   {"lists of policies and budgets", test_lists},
                                                   {"stopped by a signal", test_signal},
                                                   {"files that are wrong", test_bad_files},
                                                   {"close", close_builder},
                                                   {0}});
}
