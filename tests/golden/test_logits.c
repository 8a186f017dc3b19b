/* test_logits - the model against transformers: float32 logits within 1e-3 of their spread, and the greedy tokens, for
 * the demo model, tiny random models of every served shape, and SmolLM2 from its GGUF file if it is there; prompts in
 * one piece, in chunks, and several in one batch; with VL-Cache also the logits over the compressed cache. Of a random
 * model of SmolLM2's shape the tokens alone. tests/cuda/test_cuda_logits.c holds the GPU against the same references.
 */
#include "tests/random_checkpoint.h"

static struct ranks ranks;

/* Logits differ by at most this share of their standard deviation. */
static const double tolerance = 1e-3;

static double check_row(const char *what, int step, const float *got, const float *want, size_t n, double std,
                        double allowed)
{
    double d = distance(got, want, n) / (std > 0 ? std : spread(want, n));
    if (d > allowed) fprintf(stderr, "%s, step %d: logits differ by %g of their spread\n", what, step, d);
    CHECK(d <= allowed);
    return d;
}

/* ---- one golden answer ---- */

static void check_kept(const cJSON *item, const struct answer *a)
{
    const cJSON *kept = vectors_get(item, "kept"), *k;
    int l = 0, different = 0;
    CHECK(a->n_layers == cJSON_GetArraySize(kept));
    cJSON_ArrayForEach (k, kept) different += l < a->n_layers && a->kept[l++] != k->valueint;
    if (different)
        fprintf(stderr, "%s at %g: %d layers keep another number of tokens; %d entries near the threshold\n",
                vectors_string(item, "id"), vectors_number(item, "budget"), different, vectors_int(item, "doubtful"));
    CHECK(!different);
}

/* One golden answer; logits of its first steps, or of the second one alone if the cache was compressed before it. */
static double run_item(struct service *s, const cJSON *item, struct request *r, double allowed)
{
    struct answer a;
    struct seen_logits seen = {0};
    int32_t tokens[256];
    size_t n;
    int n_tokens = golden_tokens(item, tokens);
    double budget = vectors_number(item, "budget"), worst = 0;
    const cJSON *top = cJSON_GetObjectItemCaseSensitive(item, "top");
    float *want = golden_floats(item, "logits", &n);
    r->budget = (struct kv_budget){budget, 0};
    service_watch(s, &seen);
    service_submit(s, r, &a);
    service_run(s);
    service_watch(s, NULL);
    if (!answer_is(&a, tokens, n_tokens))
        fprintf(stderr, "%s at %g: %d tokens, \"%s\", are not the reference's\n", vectors_string(item, "id"), budget,
                a.n_tokens, a.text);
    CHECK(answer_is(&a, tokens, n_tokens));
    check_kept(item, &a);
    size_t width = top ? (size_t)cJSON_GetArraySize(cJSON_GetArrayItem(top, 0)) : seen.vocab;
    int first = !top && budget < 1;
    for (int i = 0; i < (int)(n / width) && i + first < seen.n; i++) {
        const float *row = seen.row + (size_t)(i + first) * seen.vocab;
        float picked[64];
        for (size_t j = 0; top && j < width && j < 64; j++)
            picked[j] = row[cJSON_GetArrayItem(cJSON_GetArrayItem(top, i), (int)j)->valueint];
        worst = fmax(worst, check_row(vectors_string(item, "id"), i + first, top ? picked : row,
                                      want + (size_t)i * width, width, top ? vectors_number(item, "std") : 0, allowed));
    }
    free(seen.row);
    free(want);
    answer_free(&a);
    return worst;
}

/* ---- tiny models ---- */

/* One prompt alone, every step's logits. */
static double run_alone(struct service *s, const cJSON *prompt, const char *what)
{
    struct answer a;
    struct seen_logits seen = {0};
    int32_t tokens[64];
    size_t n;
    int steps = golden_tokens(prompt, tokens);
    double worst = 0;
    float *want = golden_floats(prompt, "logits", &n);
    struct request r = request_golden(prompt, &engine_dims(s->engine)->vision, steps);
    int chunk = engine_config(s->engine)->max_num_batched_tokens, n_chunks = (r.n_ids + chunk - 1) / chunk;
    int64_t before = service_counters(s).steps;
    service_watch(s, &seen);
    service_submit(s, &r, &a);
    service_run(s);
    service_watch(s, NULL);
    CHECK(answer_is(&a, tokens, steps));
    CHECK(service_counters(s).steps - before >= n_chunks + steps - 1);
    CHECK(seen.n >= steps && n == (size_t)steps * seen.vocab);
    for (int i = 0; i < steps && i < seen.n; i++) {
        size_t at = (size_t)i * seen.vocab;
        worst = fmax(worst, check_row(what, i, seen.row + at, want + at, seen.vocab, 0, tolerance));
    }
    free(seen.row);
    free(want);
    answer_free(&a);
    return worst;
}

/* The same prompt with VL-Cache. */
static double run_compressed(struct service *s, const cJSON *prompt)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(prompt, "compressed");
    if (!item || engine_config(s->engine)->max_num_batched_tokens < 20) return 0; /* too few for the judging rows */
    struct request r =
        request_golden(prompt, &engine_dims(s->engine)->vision, cJSON_GetArraySize(vectors_get(item, "tokens")));
    return run_item(s, item, &r, tolerance);
}

/* All prompts of a model, one by one and then together. */
static void run_model(const char *name, const char *model, const cJSON *prompts, const char *const *settings)
{
    struct service s;
    struct answer answers[8];
    double worst = 0;
    int n = 0;
    const cJSON *prompt;
    int32_t tokens[64];
    service_open(&s, &ranks, model, settings);
    cJSON_ArrayForEach (prompt, prompts) {
        worst = fmax(worst, run_alone(&s, prompt, name));
        worst = fmax(worst, run_compressed(&s, prompt));
    }
    cJSON_ArrayForEach (prompt, prompts) {
        struct request r =
            request_golden(prompt, &engine_dims(s.engine)->vision, cJSON_GetArraySize(vectors_get(prompt, "tokens")));
        service_submit(&s, &r, &answers[n++]);
    }
    service_run(&s);
    n = 0;
    cJSON_ArrayForEach (prompt, prompts) {
        CHECK(answer_is(&answers[n], tokens, golden_tokens(prompt, tokens)));
        answer_free(&answers[n++]);
    }
    printf("\n    %-18s worst difference %.1e of the spread", name, worst);
    service_close(&s);
}

static void test_shapes(void)
{
    static const char *const names[] = {"mha",         "gqa_tied",   "biases",      "rope_llama3",
                                        "rope_linear", "mistral",    "head_dim",    "heads_6",
                                        "heads_7",     "heads_9",    "heads_14",    "heads_14_one_kv",
                                        "llava",       "llava_full", "llava_layer", "llava_embeddings"};
    static const char *const whole[] = {"kv_cache.policy", "vl_cache", NULL};
    const char *chunked[] = {"max_num_batched_tokens", "17", "kv_cache.policy", "vl_cache", NULL};
    static const char *const widened[] = {"dtype", "float32", "kv_cache.policy", "vl_cache", NULL};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char path[512];
        snprintf(path, sizeof path, "%.100s/golden.json", names[i]);
        cJSON *golden = golden_load(path);
        const cJSON *prompts = vectors_get(golden, "prompts");
        snprintf(path, sizeof path, GOLDEN "/%.100s", names[i]);
        run_model(names[i], path, prompts, whole);
        chunked[1] = strstr(names[i], "llava") ? "24" : strstr(names[i], "rope") ? "70" : "17";
        run_model("  in chunks", path, prompts, chunked);
        if (!SLOW_BUILD) run_model("  as float32", path, prompts, widened);
        cJSON_Delete(golden);
    }
    printf("\n  ");
}

/* ---- the demo model ---- */

/* The items of demo.json; long_ones: only those of several pages. */
static void run_demo(const char *const *settings, bool long_ones)
{
    struct service s;
    int n, done = 0;
    double worst = 0;
    cJSON *golden = golden_load("demo.json");
    const cJSON *item;
    struct question *q = questions_load(&n);
    service_open(&s, &ranks, DEMO, settings);
    cJSON_ArrayForEach (item, vectors_get(golden, "items")) {
        if (long_ones && vectors_int(item, "prompt_tokens") < 1000) continue;
        if (done == (long_ones || SLOW_BUILD ? 3 : 1000)) break;
        done++;
        struct request r = request_question(&s, questions_find(q, n, vectors_string(item, "id")));
        CHECK(r.n_ids == vectors_int(item, "prompt_tokens"));
        worst = fmax(worst, run_item(&s, item, &r, tolerance));
    }
    printf("\n    %d answers, worst difference %.1e of the spread\n  ", done, worst);
    service_close(&s);
    questions_free(q, n);
    cJSON_Delete(golden);
}

static void test_demo(void)
{
    static const char *const settings[] = {"kv_cache.policy", "vl_cache", NULL};
    run_demo(settings, false);
}

static void test_demo_chunks(void)
{
    static const char *const settings[] = {"kv_cache.policy", "vl_cache", "max_num_batched_tokens", "600", NULL};
    if (!SLOW_BUILD) run_demo(settings, true);
}

/* ---- SmolLM2 ---- */

/* The first items of smollm2.json with this dtype of the weights. */
static void run_smollm2(const char *dtype, int n_items, double allowed)
{
    const char *settings[] = {
        "kv_cache.policy", "vl_cache", "max_model_len", "512", "max_num_batched_tokens", "512", "dtype", dtype, NULL};
    struct service s;
    double worst = 0;
    cJSON *golden = golden_load("smollm2.json");
    service_open(&s, &ranks, SMOLLM2, settings);
    for (int i = 0; i < n_items; i++) {
        const cJSON *item = cJSON_GetArrayItem(vectors_get(golden, "items"), i);
        struct request r = request_smollm2(&s, item);
        worst = fmax(worst, run_item(&s, item, &r, allowed));
    }
    printf("\n    weights as %s: worst difference %.1e of the spread", dtype, worst);
    service_close(&s);
    cJSON_Delete(golden);
}

/* Blocks become float16 where nothing else is asked for, which rounds their values: that is not the reference's. */
static void test_smollm2(void)
{
    if (!file_exists(SMOLLM2)) {
        printf("\n    skipped: no models/smollm2 (launch/get-model smollm2)\n  ");
        return;
    }
    run_smollm2("float32", SLOW_BUILD ? 1 : 4, tolerance);
    if (!SLOW_BUILD) run_smollm2("auto", 2, 1e-2);
    printf("\n  ");
}

/* Where the real file is not at hand: transformers' tokens of a random model of its shape. */
static void test_smollm2_shape(void)
{
    static const char *const settings[] = {"max_model_len", "512", "max_num_batched_tokens", "512", NULL};
    if (SLOW_BUILD) return;
    struct random_checkpoint c = random_checkpoint_open();
    struct service s;
    struct answer a;
    int32_t tokens[64];
    cJSON *errors = golden_load("bf16_error.json");
    int n = golden_tokens(vectors_get(vectors_get(errors, "cases"), "smollm2_shape"), tokens);
    struct request r = request_random(RANDOM_SEED, RANDOM_PROMPT, RANDOM_VOCAB, n);
    service_open(&s, &ranks, c.directory, settings);
    service_submit(&s, &r, &a);
    service_run(&s);
    CHECK(answer_is(&a, tokens, n));
    answer_free(&a);
    service_close(&s);
    random_checkpoint_close(&c);
    cJSON_Delete(errors);
}

int main(void)
{
    static const struct check_case cases[] = {{"tiny models of every shape", test_shapes},
                                              {"the demo model, full and compressed", test_demo},
                                              {"four pages in chunks", test_demo_chunks},
                                              {"SmolLM2", test_smollm2},
                                              {"a random model of SmolLM2's shape", test_smollm2_shape},
                                              {0}};
    ranks = ranks_open();
    return ranks_run(&ranks, "logits", cases);
}
