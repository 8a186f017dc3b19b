/* test_bench - lists, figures, JSON and plot of vitrail bench over the demo model on one rank. */
#include <unistd.h>

#include "base/file.h"
#include "base/json.h"
#include "runtime/bench_internal.h"
#include "tests/engine_fixture.h"
#include "tests/svg.h"

static struct ranks ranks;
static char folder[64], output[128], plot[128];

static struct bench_options options_of(const char *batches, const char *prompt_lens, const char *policies,
                                       const char *budgets)
{
    return (struct bench_options){.batches = batches,
                                  .prompt_lens = prompt_lens,
                                  .policies = policies,
                                  .budgets = budgets,
                                  .gen_len = 4,
                                  .repeats = 1,
                                  .output = output,
                                  .plot = plot,
                                  .table = NULL,
                                  .liveness = ranks.liveness};
}

/* Runs into a table that the caller frees, and the JSON tree. */
static cJSON *bench(struct service *s, struct bench_options options, char **table)
{
    size_t size;
    cJSON *tree = NULL;
    options.table = open_memstream(table, &size);
    CHECK_OK(bench_run(s->engine, &options));
    fclose(options.table);
    DEMAND(json_parse_file(output, 1 << 20, &tree));
    return tree;
}

static double number(const cJSON *object, const char *key)
{
    const cJSON *item = json_get(object, key);
    if (!cJSON_IsNumber(item)) fprintf(stderr, "no number %s\n", key);
    CHECK(cJSON_IsNumber(item));
    return cJSON_IsNumber(item) ? item->valuedouble : -1;
}

static bool is(const cJSON *object, const char *key, const char *text)
{
    const cJSON *item = json_get(object, key);
    return cJSON_IsString(item) && !strcmp(item->valuestring, text);
}

static int count(const char *text, const char *part)
{
    int n = 0;
    for (; (text = strstr(text, part)); text++) n++;
    return n;
}

/* The plot as text; the caller frees it. */
static char *read_plot(void)
{
    char *text;
    size_t size;
    DEMAND(file_read_all(plot, 1 << 20, &text, &size));
    CHECK(svg_well_formed(text));
    CHECK(!strstr(text, "nan") && !strstr(text, "inf"));
    return text;
}

/* ---- tests ---- */

static void test_numbers(void)
{
    int out[BENCH_LIST_MAX], n;
    char many[BENCH_LIST_MAX * 2 + 2] = "1";
    CHECK_OK(bench__read_numbers("--batch", "1,8,32", 64, "max_num_seqs", out, &n));
    CHECK(n == 3 && out[0] == 1 && out[1] == 8 && out[2] == 32);
    CHECK_OK(bench__read_numbers("--batch", "64", 64, "max_num_seqs", out, &n));
    CHECK(n == 1 && out[0] == 64);
    static const char *const bad[] = {"", ",", "1,", ",1", "1,,2", "x", "1x", "0", "-1", "1;2", "99999999999999999999"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK_FAILS(bench__read_numbers("--prompt-len", bad[i], 64, "x", out, &n), ERR_CONFIG, "--prompt-len");
    CHECK_FAILS(bench__read_numbers("--batch", "1,65", 64, "max_num_seqs", out, &n), ERR_CONFIG,
                "--batch 65 exceeds 64, max_num_seqs");
    for (int i = 0; i < BENCH_LIST_MAX; i++) strcat(many, ",1");
    CHECK_FAILS(bench__read_numbers("--batch", many, 64, "x", out, &n), ERR_CONFIG, "more than 32");
}

static int lists(struct bench_options options, struct bench_lists *out)
{
    struct config config = service_config(DEMO, NULL);
    struct model_dims dims;
    DEMAND(model_dims_load(DEMO, &dims));
    config.max_model_len = 1024;
    return bench__read_lists(&options, &config, &dims, out);
}

static void test_lists(void)
{
    struct bench_lists l;
    struct bench_options o = options_of("1,4", "64,256", "full,vl_cache", "0.1,64t");
    CHECK_OK(lists(o, &l));
    CHECK(l.n_batches == 2 && l.n_prompt_lens == 2 && l.prompt_len[1] == 256 && l.n_policies == 2 && l.n_budgets == 2);
    CHECK(!strcmp(l.policy[1], "vl_cache") && l.budget[0].share == 0.1 && l.budget[1].tokens == 64);
    CHECK_OK(lists(options_of("1", "1020", NULL, NULL), &l));
    CHECK(l.n_policies == 1 && !strcmp(l.policy[0], "full") && l.n_budgets == 1);
    CHECK_FAILS(lists(options_of("5", "64", NULL, NULL), &l), ERR_CONFIG, "--batch 5");
    CHECK_FAILS(lists(options_of("1", "1021", NULL, NULL), &l), ERR_CONFIG, "--prompt-len 1021");
    CHECK_FAILS(lists(options_of("1", "64", "full,vl_cash", NULL), &l), ERR_CONFIG, "--kv-policy");
    CHECK_FAILS(lists(options_of("1", "64", "full,", NULL), &l), ERR_CONFIG, "--kv-policy");
    CHECK_FAILS(lists(options_of("1", "64", NULL, "0.1,2"), &l), ERR_CONFIG, "--kv-budget");
    o.n_images = 2; /* of 576 tokens each */
    CHECK_FAILS(lists(o, &l), ERR_CONFIG, "--images");
    o.n_images = 65;
    CHECK_FAILS(lists(o, &l), ERR_CONFIG, "max_images_per_prompt");
    o.n_images = 1;
    CHECK_OK(lists(o, &l));
    o = options_of("1", "64", NULL, NULL);
    o.find_batch = true;
    o.gen_len = 1;
    CHECK_FAILS(lists(o, &l), ERR_CONFIG, "--find-batch");
}

static void test_language_model(void)
{
    struct config config = service_config(DEMO, NULL);
    struct model_dims dims = {.family = MODEL_LLAMA};
    struct bench_lists l;
    struct bench_options o = options_of("1", "64", NULL, NULL);
    config.max_model_len = 1024;
    CHECK_OK(bench__read_lists(&o, &config, &dims, &l));
    o.n_images = 1;
    CHECK_FAILS(bench__read_lists(&o, &config, &dims, &l), ERR_CONFIG, "without a vision tower");
}

static void check_run_figures(const cJSON *run)
{
    static const char *const positive[] = {
        "prefill_ms",        "decode_ms", "tokens_per_s", "decode_tokens_per_s", "fraction_of_gemm",
        "fraction_of_floor", "floor_ms",  "kv_bytes",     "peak_bytes"};
    const cJSON *stages = json_get(run, "stages");
    bool full = is(run, "policy", "full");
    for (size_t i = 0; i < sizeof positive / sizeof *positive; i++) CHECK(number(run, positive[i]) > 0);
    CHECK(number(run, "gen_len") == 4);
    CHECK(number(stages, "vision_ms") == 0 && number(stages, "other_ms") >= 0);
    CHECK(number(stages, "prefill_ms") > 0 && number(stages, "decode_ms") >= number(run, "decode_ms"));
    CHECK(is(run, "budget", full ? "1" : "0.25"));
    CHECK(full ? number(run, "kv_bytes") == number(run, "kv_bytes_full")
               : number(run, "kv_bytes") < 0.5 * number(run, "kv_bytes_full"));
}

static void test_sweep(struct service *s)
{
    char *table, *svg;
    cJSON *tree = bench(s, options_of("1,2", "24,64", "full,vl_cache", "0.25"), &table);
    const cJSON *runs = json_get(tree, "runs"), *ceilings = json_get(tree, "ceilings"), *run;
    CHECK(is(tree, "device", "cpu") && number(tree, "ranks") == 1 && is(tree, "floor_of", "gemv"));
    CHECK(number(ceilings, "copy_gbs") > 0 && number(ceilings, "gemm_tflops") > 0 && number(ceilings, "gemv_gbs") > 0);
    CHECK(!json_get(tree, "commit") && !json_get(tree, "prompt_len"));
    CHECK(cJSON_GetArraySize(runs) == 8);
    cJSON_ArrayForEach (run, runs) check_run_figures(run);
    run = cJSON_GetArrayItem(runs, 3);
    CHECK(is(run, "policy", "full") && number(run, "batch") == 2 && number(run, "prompt_len") == 64);
    CHECK(strstr(table, "prompt") && strstr(table, "of gemv") && count(table, "vl_cache") == 4);
    svg = read_plot();
    CHECK(count(svg, "<polyline") == 8 && count(svg, "<circle") == 8); /* four lines and their floors */
    CHECK(strstr(svg, "vl_cache 0.25, prompt 24") && strstr(svg, "batch, sequences at once"));
    free(svg);
    free(table);
    cJSON_Delete(tree);
}

static void test_prompt_lengths(struct service *s)
{
    char *table, *svg;
    cJSON *tree = bench(s, options_of("2", "24,48,64", "full", NULL), &table);
    svg = read_plot();
    CHECK(count(svg, "<polyline") == 2 && strstr(svg, "prompt length") && strstr(svg, ">48<"));
    free(svg);
    free(table);
    cJSON_Delete(tree);
    struct bench_options o = options_of("1", "24", "full", NULL);
    char nowhere[160];
    snprintf(nowhere, sizeof nowhere, "%s/none/r.svg", folder);
    o.plot = nowhere;
    CHECK_FAILS(bench_run(s->engine, &o), ERR_IO, "none/r.svg");
}

static void test_images(struct service *s)
{
    char *table;
    struct bench_options o = options_of("1", "8", "vl_cache", "0.25");
    o.n_images = 1;
    o.repeats = 2;
    cJSON *tree = bench(s, o, &table);
    const cJSON *run = cJSON_GetArrayItem(json_get(tree, "runs"), 0), *stages = json_get(run, "stages");
    int image = engine_dims(s->engine)->vision.n_image_tokens;
    CHECK(number(run, "images") == 1 && number(run, "prompt_tokens") == 8 + image && number(run, "prompt_len") == 8);
    CHECK(number(run, "images_per_s") > 0 && number(stages, "vision_ms") > 0 && number(stages, "prefill_ms") > 0);
    CHECK(number(run, "kv_bytes") < number(run, "kv_bytes_full"));
    CHECK(strstr(table, "images/s") && number(tree, "prompt_len") == 8);
    free(table);
    cJSON_Delete(tree);
}

static void test_sizes(void)
{
    static const char *const settings[] = {"max_model_len",
                                           "1024",
                                           "max_num_batched_tokens",
                                           "1024",
                                           "kv_cache_memory_bytes",
                                           "24MiB",
                                           "tensor_parallel_size",
                                           "1",
                                           NULL};
    struct service s;
    service_open(&s, &ranks, DEMO, settings);
    test_sweep(&s);
    test_prompt_lengths(&s);
    test_images(&s);
    service_close(&s);
}

/* The pool holds three sequences of 64 tokens; a prompt that was compressed makes room for a fourth, and there are four
 * slots. */
static void test_find_batch(void)
{
    static const char *const settings[] = {
        "max_model_len", "1024", "max_num_batched_tokens", "1024", "kv_cache_memory_bytes", "4MiB", NULL};
    struct service s;
    char *table;
    service_open(&s, &ranks, DEMO, settings);
    struct bench_options o = options_of("1", "48", "full,vl_cache", "0.25");
    o.find_batch = true;
    o.gen_len = 16;
    cJSON *tree = bench(&s, o, &table);
    const cJSON *runs = json_get(tree, "runs");
    const cJSON *full = cJSON_GetArrayItem(runs, 0), *kept = cJSON_GetArrayItem(runs, 1);
    CHECK(cJSON_GetArraySize(runs) == 2);
    CHECK(number(full, "batch") == 3 && is(full, "limit", "kv_pool") && cJSON_IsTrue(json_get(full, "largest_batch")));
    CHECK(number(kept, "batch") == 4 && is(kept, "limit", "max_num_seqs"));
    CHECK(number(full, "tokens_per_s") > 0 && strstr(table, " *4 "));
    free(read_plot());
    free(table);
    cJSON_Delete(tree);

    /* Sizes that the pool can never hold are refused and give no row; without a search they end the sweep behind what
     * was measured. */
    o.prompt_lens = "48,900";
    o.policies = "full";
    log_set(LOG_ERROR, 0);
    tree = bench(&s, o, &table);
    log_set(LOG_WARNING, 0);
    CHECK(cJSON_GetArraySize(json_get(tree, "runs")) == 1);
    free(table);
    cJSON_Delete(tree);
    o.find_batch = false;
    o.table = fopen("/dev/null", "w");
    CHECK_FAILS(bench_run(s.engine, &o), ERR_REQUEST, "kv_cache_memory_bytes");
    fclose(o.table);
    DEMAND(json_parse_file(output, 1 << 20, &tree));
    CHECK(cJSON_GetArraySize(json_get(tree, "runs")) == 1);
    cJSON_Delete(tree);
    service_close(&s);
}

static void test_xml(void)
{
    CHECK(svg_well_formed("<a b=\"c\"><d/>text<e f-g=\"\">x</e></a>\n"));
    static const char *const bad[] = {"<a>",          "<a></b>",         "<a b=c/>", "<a/><b/>", "x<a/>", "<a>&</a>",
                                      "<a b=\"<\"/>", "<text>x</texts>", "",         "<a",       "</a>"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) CHECK(!svg_well_formed(bad[i]));
}

int main(void)
{
    static const struct check_case cases[] = {{"lists of numbers", test_numbers},
                                              {"lists of all options", test_lists},
                                              {"images need a vision tower", test_language_model},
                                              {"what this test takes for XML", test_xml},
                                              {"sweeps, prompt lengths, images", test_sizes},
                                              {"the largest batch", test_find_batch},
                                              {0}};
    ranks = ranks_open();
    snprintf(folder, sizeof folder, "%s/test_bench.XXXXXX", P_tmpdir);
    vectors_demand(mkdtemp(folder) != NULL, "a folder");
    snprintf(output, sizeof output, "%s/r.json", folder);
    snprintf(plot, sizeof plot, "%s/r.svg", folder);
    int rc = ranks_run(&ranks, "bench", cases);
    unlink(output);
    unlink(plot);
    rmdir(folder);
    return rc;
}
