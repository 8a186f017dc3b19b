/* test_cuda_logits - whole models on the GPU against transformers' float32 logits and greedy tokens: tiny models of
 * every served shape, the demo model, and a random model of SmolLM2-135M's shape against the CPU's engine.
 *
 * The logits may be off by at most 1.5 times what transformers itself loses in the same 16-bit dtype
 * (tests/data/golden/bf16_error.json), as the relative L2 distance over all prompts of a model. A greedy token may be
 * another one only at a near-tie, where the two best logits are closer than transformers' largest error; each is
 * listed, the reference's token is given in its place, and the comparison goes on behind it. The full cache alone: what
 * VL-Cache keeps at a threshold is a matter of rounding, and tests/cuda/test_cuda_probe.c holds it.
 * Arguments: --quick for compute-sanitizer; a backend's name ("cpu" shows that the test itself is right). */
#include "tests/random_checkpoint.h"

static struct ranks ranks;
static cJSON *errors; /* bf16_error.json */
static const char *device = "cuda";
static bool quick;

static const double allowed = 1.5; /* times transformers' own error */

/* What an answer is held against. */
struct reference {
    const char *what;
    const float *logits; /* [n_rows, vocab] that the first n_rows tokens were chosen from */
    int n_rows;
    const int32_t *tokens; /* [n_tokens] */
    const double *margin;  /* [n_tokens] between the two best logits */
    int n_tokens;
};

/* The prompts of one model together. */
struct sums {
    double wrong, theirs, all; /* squares of: our error, transformers', the logits */
    double largest, tie;       /* error; margin below which a token may differ */
    int prompts, rows, tokens, near_ties;
};

/* ---- one prompt ---- */

/* The prompt and the first n tokens of its answer. */
static struct request request_behind(const struct request *prompt, const int32_t *tokens, int n)
{
    struct request r = *prompt;
    r.n_ids = prompt->n_ids + n;
    r.ids = take((size_t)r.n_ids * sizeof *r.ids);
    memcpy(r.ids, prompt->ids, (size_t)prompt->n_ids * sizeof *r.ids);
    if (n) memcpy(r.ids + prompt->n_ids, tokens, (size_t)n * sizeof *r.ids);
    r.spans = r.n_images ? copy_of(prompt->spans, (size_t)r.n_images * sizeof *r.spans) : NULL;
    r.pixels = r.pixel_bytes ? copy_of(prompt->pixels, r.pixel_bytes) : NULL;
    r.ignore_eos = true;
    r.budget = (struct kv_budget){1, 0};
    return r;
}

/* Answers to the end; unlike service_run it returns what the engine says. */
static int ask(struct service *s, struct request r, struct answer *a, struct seen_logits *seen)
{
    struct sink sink = {a, answer_show, answer_done};
    int active = 1;
    memset(a, 0, sizeof *a);
    service_watch(s, seen);
    int rc = engine_submit(s->engine, &r, sink);
    if (rc) request_free(&r);
    while (!rc && active) rc = engine_step(s->engine, &active);
    if (!rc) rc = engine_step(s->engine, &active); /* releases the slot */
    service_watch(s, NULL);
    return rc;
}

static void add_row(struct sums *sums, const float *got, const float *want, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        double d = (double)got[i] - (double)want[i];
        sums->wrong += d * d;
        sums->all += (double)want[i] * (double)want[i];
        if (!(fabs(d) <= sums->largest)) sums->largest = fabs(d);
    }
    sums->rows++;
}

/* A token that is not the reference's. */
static void add_difference(struct sums *sums, const struct reference *want, int at, int32_t got)
{
    bool near_tie = want->margin[at] <= sums->tie;
    printf("\n      %s, token %d: %d in place of %d, margin %.3g, %s transformers' largest error %.3g", want->what, at,
           (int)got, (int)want->tokens[at], want->margin[at], near_tie ? "a near-tie within" : "ABOVE", sums->tie);
    sums->near_ties += near_tie;
    CHECK(near_tie);
}

/* Follows the reference's answer from token `at` on until the tokens part; returns where to go on. */
static int follow(const struct answer *a, const struct seen_logits *seen, const struct reference *want, int at,
                  struct sums *sums)
{
    for (int i = 0; i < a->n_tokens && i < seen->n && at < want->n_tokens; i++, at++) {
        if (at < want->n_rows)
            add_row(sums, seen->row + (size_t)i * seen->vocab, want->logits + (size_t)at * seen->vocab, seen->vocab);
        sums->tokens++;
        if (a->tokens[i] == want->tokens[at]) continue;
        add_difference(sums, want, at, a->tokens[i]);
        return at + 1;
    }
    return at;
}

/* compare - a prompt (freed) against its reference; theirs: transformers' relative error of it. Returns the engine's
 * error, after which it takes no more steps. */
static int compare(struct service *s, struct request *prompt, const struct reference *want, double theirs,
                   struct sums *sums)
{
    double before = sums->all;
    int rc = OK;
    for (int at = 0; at < want->n_tokens && !rc;) {
        struct answer a;
        struct seen_logits seen = {0};
        struct request r = request_behind(prompt, want->tokens, at);
        r.max_tokens = want->n_tokens - at;
        rc = ask(s, r, &a, &seen);
        int next = rc ? want->n_tokens : follow(&a, &seen, want, at, sums);
        free(seen.row);
        answer_free(&a);
        CHECK(next > at);
        at = next > at ? next : want->n_tokens;
    }
    sums->theirs += theirs * theirs * (sums->all - before);
    sums->prompts += !rc;
    request_free(prompt);
    return rc;
}

/* The distance between the two best logits of each row. */
static void margins_of(const float *logits, int n_rows, size_t vocab, double *margin)
{
    for (int r = 0; r < n_rows; r++) {
        const float *row = logits + (size_t)r * vocab;
        float best = -INFINITY, second = -INFINITY;
        for (size_t i = 0; i < vocab; i++) {
            if (row[i] > best)
                second = best, best = row[i];
            else if (row[i] > second)
                second = row[i];
        }
        margin[r] = (double)best - (double)second;
    }
}

/* ---- one model ---- */

static const cJSON *errors_of(const char *name) { return vectors_get(vectors_get(errors, "cases"), name); }

static struct sums sums_begin(const char *name)
{
    return (struct sums){.tie = vectors_number(errors_of(name), "largest")};
}

static double theirs_of(const char *name, int prompt)
{
    const cJSON *relative = cJSON_GetArrayItem(vectors_get(errors_of(name), "relative"), prompt);
    vectors_demand(cJSON_IsNumber(relative), name);
    return relative->valuedouble;
}

/* Whether the error of all prompts is within the bound. */
static void sums_end(const struct sums *sums, const char *name)
{
    double ours = sqrt(sums->wrong / sums->all), theirs = sqrt(sums->theirs / sums->all);
    printf("\n    %-18s %d prompts, %d rows: relative error %.3g, transformers' %s %.3g: %.2f times; largest %.3g; "
           "%d of %d tokens differ, at near-ties",
           name, sums->prompts, sums->rows, ours, vectors_string(errors_of(name), "dtype"), theirs, ours / theirs,
           sums->largest, sums->near_ties, sums->tokens);
    CHECK(sums->rows > 0 && ours <= allowed * theirs);
}

static void open_on(struct service *s, const char *backend, const char *model, const char *chunk)
{
    const char *settings[] = {"device",
                              backend,
                              "max_model_len",
                              "4096",
                              "kv_cache_memory_bytes",
                              "256MiB",
                              chunk ? "max_num_batched_tokens" : NULL,
                              chunk,
                              NULL};
    struct model_dims dims;
    DEMAND(model_dims_load(model, &dims));
    if (dims.max_position_embeddings < 4096) settings[3] = "512";
    service_open(s, &ranks, model, settings);
}

/* ---- tiny models ---- */

/* What a GPU refuses of a model with images (kernels/ops.h), NULL if nothing. */
static const char *refused(const struct service *s)
{
    static char why[100];
    const struct model_dims *d = engine_dims(s->engine);
    int width = d->family == MODEL_LLAVA ? d->vision.head_dim : 8;
    if (strcmp(device, "cuda") != 0 || (width % 8 == 0 && width <= 128)) return NULL;
    snprintf(why, sizeof why, "a vision tower of head_dim %d", width);
    return why;
}

static int run_prompt(struct service *s, const cJSON *prompt, const char *name, int i, struct sums *sums)
{
    int32_t tokens[64];
    double margin[64];
    size_t n;
    float *logits = golden_floats(prompt, "logits", &n);
    struct reference want = {name, logits, 0, tokens, margin, golden_tokens(prompt, tokens)};
    want.n_rows = want.n_tokens;
    struct request r = request_golden(prompt, &engine_dims(s->engine)->vision, want.n_tokens);
    margins_of(logits, want.n_rows, n / (size_t)want.n_rows, margin);
    int rc = compare(s, &r, &want, theirs_of(name, i), sums);
    free(logits);
    return rc;
}

/* All prompts of a model, those with images last: after a refusal the engine takes no more steps. */
static void run_model(const char *name, const char *chunk)
{
    char path[512];
    snprintf(path, sizeof path, "%.100s/golden.json", name);
    cJSON *golden = golden_load(path);
    const cJSON *prompts = vectors_get(golden, "prompts");
    snprintf(path, sizeof path, GOLDEN "/%.100s", name);
    struct service s;
    open_on(&s, device, path, chunk);
    struct sums sums = sums_begin(name);
    const char *why = refused(&s);
    int n = cJSON_GetArraySize(prompts), rc = OK;
    for (int i = 0; i < 2 * n && !rc; i++) {
        const cJSON *prompt = cJSON_GetArrayItem(prompts, i % n);
        bool images = cJSON_GetArraySize(vectors_get(prompt, "images")) > 0;
        if (images != (i >= n)) continue;
        rc = run_prompt(&s, prompt, name, i % n, &sums);
        if (why && images) {
            printf("\n    %-18s %s for %s: %s", name, rc ? "refused" : "NOT REFUSED", why, rc ? status_message() : "");
            CHECK(rc == ERR_UNSUPPORTED);
            rc = rc ? rc : ERR_UNSUPPORTED;
        } else if (rc) {
            printf("\n    %-18s FAILED: %s", name, status_message());
            CHECK(!rc);
        }
    }
    sums_end(&sums, name);
    service_close(&s);
    cJSON_Delete(golden);
}

static void test_shapes(void)
{
    const cJSON *item;
    int n = 0;
    cJSON_ArrayForEach (item, vectors_get(errors, "cases")) {
        if (!strcmp(item->string, "demo") || !strcmp(item->string, "smollm2_shape")) continue;
        if (quick && n >= 3) break;
        run_model(item->string, NULL);
        n++;
    }
    CHECK(n == (quick ? 3 : 16));
    printf("\n  ");
}

static void test_chunks(void)
{
    run_model("gqa_tied", "17");
    if (!quick) run_model("rope_llama3", "70");
    run_model("llava", "24");
    printf("\n  ");
}

/* ---- the demo model ---- */

static int run_question(struct service *s, const cJSON *item, const struct question *question, int i, struct sums *sums)
{
    int32_t tokens[256];
    size_t n_margins, n;
    double *margin = vectors_list(vectors_get(item, "margins"), &n_margins);
    float *logits = golden_floats(item, "logits", &n);
    struct reference want = {question->id, logits, 0, tokens, margin, golden_tokens(item, tokens)};
    want.n_rows = (int)(n / (size_t)engine_dims(s->engine)->vocab_size);
    vectors_demand((int)n_margins == want.n_tokens, "a margin for each token");
    struct request r = request_question(s, question);
    CHECK(r.n_ids == vectors_int(item, "prompt_tokens"));
    int rc = compare(s, &r, &want, theirs_of("demo", i), sums);
    free(margin);
    free(logits);
    return rc;
}

/* The items of demo.json with the full cache: one page and four. */
static void run_demo(const char *chunk)
{
    struct service s;
    open_on(&s, device, DEMO, chunk);
    struct sums sums = sums_begin("demo");
    int n_questions, n = 0, rc = OK;
    cJSON *golden = golden_load("demo.json");
    const cJSON *item;
    struct question *q = questions_load(&n_questions);
    cJSON_ArrayForEach (item, vectors_get(golden, "items")) {
        if (vectors_number(item, "budget") < 1) continue;
        rc = run_question(&s, item, questions_find(q, n_questions, vectors_string(item, "id")), n++, &sums);
        if (rc) printf("\n    %s FAILED: %s", vectors_string(item, "id"), status_message());
        CHECK(!rc);
        if (rc || quick) break;
    }
    CHECK(rc || quick || n == cJSON_GetArraySize(vectors_get(errors_of("demo"), "relative")));
    sums_end(&sums, "demo");
    printf("\n  ");
    service_close(&s);
    questions_free(q, n_questions);
    cJSON_Delete(golden);
}

static void test_demo(void)
{
    run_demo(NULL);
    if (!quick) run_demo("700");
}

/* ---- SmolLM2's shape ---- */

/* The CPU's answer to the prompt, every row of logits. */
static int ask_cpu(const char *model, const struct request *prompt, int n_tokens, struct answer *a,
                   struct seen_logits *seen)
{
    struct service s;
    open_on(&s, "cpu", model, NULL);
    struct request r = request_behind(prompt, NULL, 0);
    r.max_tokens = n_tokens;
    int rc = ask(&s, r, a, seen);
    CHECK_OK(rc);
    service_close(&s);
    return rc;
}

static void test_smollm2_shape(void)
{
    if (quick) return;
    struct random_checkpoint c = random_checkpoint_open();
    struct sums sums = sums_begin("smollm2_shape");
    struct seen_logits seen = {0};
    struct answer a;
    int32_t tokens[64];
    double margin[64];
    int n = golden_tokens(errors_of("smollm2_shape"), tokens);
    struct request prompt = request_random(RANDOM_SEED, RANDOM_PROMPT, RANDOM_VOCAB, n);
    int rc = ask_cpu(c.directory, &prompt, n, &a, &seen);
    if (!rc && a.n_tokens == n && seen.n >= n) {
        CHECK(answer_is(&a, tokens, n)); /* transformers' */
        struct reference want = {"smollm2_shape", seen.row, n, a.tokens, margin, n};
        margins_of(seen.row, n, seen.vocab, margin);
        struct service s;
        open_on(&s, device, c.directory, NULL);
        CHECK_OK(compare(&s, &prompt, &want, theirs_of("smollm2_shape", 0), &sums));
        service_close(&s);
        sums_end(&sums, "smollm2_shape");
    }
    CHECK(sums.rows >= n);
    printf("\n  ");
    free(seen.row);
    answer_free(&a);
    request_free(&prompt);
    random_checkpoint_close(&c);
}

int main(int argc, char **argv)
{
    static const struct check_case cases[] = {{"tiny models of every shape", test_shapes},
                                              {"prompts in chunks", test_chunks},
                                              {"the demo model", test_demo},
                                              {"a random model of SmolLM2's shape", test_smollm2_shape},
                                              {0}};
    quick = argc > 1 && !strcmp(argv[1], "--quick");
    if (argc > 1 && !quick) device = argv[1];
    if (ops_device_count(device) == 0) {
        printf("cuda_logits: skipped: no CUDA device\n");
        return 0;
    }
    ranks = ranks_open();
    errors = golden_load("bf16_error.json");
    int failed = ranks_run(&ranks, "cuda_logits", cases);
    cJSON_Delete(errors);
    return failed;
}
