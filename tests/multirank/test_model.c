/* test_model - the number of ranks changes nothing: 1 to 4 ranks give the reference's tokens and the same budgets, on
 * the demo model, SmolLM2 if it is there, and random models whose heads, MLP columns and vocabulary do not divide.
 *
 * Partial sums differ in their last bits between numbers of ranks, so a difference is accepted only with its cause: a
 * logit margin below 0.05 at the first token that differs, or entries near VL-Cache's threshold. Each is printed. */
#include "tests/engine_fixture.h"

static struct ranks ranks;

/* Opens an engine on all ranks; rank 0 runs `work` with arg. */
static void on_all_ranks(const char *model, const char *const *settings,
                         void (*work)(struct service *s, const void *arg), const void *arg)
{
    struct service s;
    service_open(&s, &ranks, model, settings);
    if (!service_follow(&s)) work(&s, arg);
    service_close(&s);
}

/* ---- against the reference ---- */

/* Whether an answer is the reference's, or differs where the reference itself had hardly a preference. */
static bool tokens_agree(const cJSON *item, const struct answer *a)
{
    int32_t tokens[256];
    int n = golden_tokens(item, tokens), at = 0;
    if (answer_is(a, tokens, n)) return true;
    while (at < n && at < a->n_tokens && tokens[at] == a->tokens[at]) at++;
    double margin = at < n ? cJSON_GetArrayItem(vectors_get(item, "margins"), at)->valuedouble : INFINITY;
    fprintf(stderr, "%s at %g: token %d differs, where the reference's margin is %g\n", vectors_string(item, "id"),
            vectors_number(item, "budget"), at, margin);
    return margin < 0.05;
}

static bool budgets_agree(const cJSON *item, const struct answer *a)
{
    const cJSON *k;
    int l = 0, different = 0;
    cJSON_ArrayForEach (k, vectors_get(item, "kept")) different += l >= a->n_layers || a->kept[l++] != k->valueint;
    if (!different && l == a->n_layers) return true;
    fprintf(stderr, "%s at %g: %d layers keep another number; %d entries lie near the threshold\n",
            vectors_string(item, "id"), vectors_number(item, "budget"), different, vectors_int(item, "doubtful"));
    return vectors_int(item, "doubtful") > 0;
}

static void check_item(struct service *s, const cJSON *item, struct request *r)
{
    struct answer a;
    r->budget = (struct kv_budget){vectors_number(item, "budget"), 0};
    service_submit(s, r, &a);
    service_run(s);
    CHECK(tokens_agree(item, &a));
    CHECK(budgets_agree(item, &a));
    answer_free(&a);
}

/* ---- random models ---- */

enum { ASKED = 9 };

/* Prompts and budgets of a random model: the golden prompts whole, then random ones compressed. */
static struct request tiny_request(const struct service *s, const cJSON *prompts, int i)
{
    static const struct kv_budget budgets[] = {{1, 0}, {0.1, 0}, {0.3, 0}, {1, 5}};
    int n_golden = cJSON_GetArraySize(prompts);
    const struct model_dims *d = engine_dims(s->engine);
    if (i < 2 * n_golden && i % 2 == 0) return request_golden(cJSON_GetArrayItem(prompts, i / 2), &d->vision, 4);
    struct request r = i < 2 * n_golden ? request_golden(cJSON_GetArrayItem(prompts, i / 2), &d->vision, 8)
                                        : request_random((uint64_t)i, 40 + 30 * i, d->vocab_size, 10);
    r.budget = budgets[1 + i % 3];
    return r;
}

/* The same requests on one rank, which is rank 0 by itself. */
static void ask_all(struct service *s, const cJSON *prompts, struct answer *a)
{
    for (int i = 0; i < ASKED; i++) {
        struct request r = tiny_request(s, prompts, i);
        service_submit(s, &r, &a[i]);
    }
    service_run(s);
}

static const char *const tiny_settings[] = {"kv_cache.policy", "vl_cache", "max_num_batched_tokens", "70", NULL};

static void one_rank(const char *model, const cJSON *prompts, struct answer *a)
{
    struct ranks alone = {.liveness = ranks.liveness};
    struct service s;
    DEMAND(comm_open("self", &alone.comm));
    service_open(&s, &alone, model, tiny_settings);
    ask_all(&s, prompts, a);
    service_close(&s);
    comm_close(alone.comm);
}

/* The golden prompts one by one: tokens and logits of transformers. */
static double check_golden(struct service *s, const cJSON *prompts)
{
    const cJSON *prompt;
    double worst = 0;
    cJSON_ArrayForEach (prompt, prompts) {
        struct seen_logits seen = {0};
        struct answer a;
        int32_t tokens[64];
        size_t n;
        int steps = golden_tokens(prompt, tokens);
        struct request r = request_golden(prompt, &engine_dims(s->engine)->vision, steps);
        float *want = golden_floats(prompt, "logits", &n);
        service_watch(s, &seen);
        service_submit(s, &r, &a);
        service_run(s);
        service_watch(s, NULL);
        CHECK(answer_is(&a, tokens, steps) && seen.n >= steps);
        for (size_t i = 0; i < (size_t)steps && i < (size_t)seen.n; i++)
            worst = fmax(worst, distance(seen.row + i * seen.vocab, want + i * seen.vocab, seen.vocab) /
                                    spread(want + i * seen.vocab, seen.vocab));
        answer_free(&a);
        free(seen.row);
        free(want);
        const cJSON *item = cJSON_GetObjectItemCaseSensitive(prompt, "compressed");
        if (!item) continue;
        r = request_golden(prompt, &engine_dims(s->engine)->vision, steps);
        check_item(s, item, &r);
    }
    CHECK(worst <= 1e-3);
    return worst;
}

struct tiny {
    const char *name, *path;
    const cJSON *prompts;
};

static void work_tiny(struct service *s, const void *arg)
{
    const struct tiny *tiny = arg;
    struct answer want[ASKED], got[ASKED];
    double worst = check_golden(s, tiny->prompts);
    one_rank(tiny->path, tiny->prompts, want);
    ask_all(s, tiny->prompts, got);
    for (int i = 0; i < ASKED; i++) {
        bool same = answers_equal(&got[i], &want[i]) && !memcmp(got[i].kept, want[i].kept, sizeof got[i].kept) &&
                    got[i].bytes_kept == want[i].bytes_kept;
        if (!same) fprintf(stderr, "%s, request %d: not what one rank answers\n", tiny->name, i);
        CHECK(same);
        answer_free(&got[i]);
        answer_free(&want[i]);
    }
    struct engine_counters c = service_counters(s);
    CHECK(c.pages_free == c.pages_total);
    printf("\n    %-16s worst difference %.1e of the logits' spread", tiny->name, worst);
}

static void test_random_models(void)
{
    static const char *const names[] = {"heads_6", "heads_7",  "heads_9", "heads_14",         "heads_14_one_kv",
                                        "llava",   "head_dim", "biases",  "llava_embeddings", "gqa_tied"};
    size_t n = SLOW_BUILD ? 3 : sizeof names / sizeof *names;
    for (size_t i = 0; i < n; i++) {
        char path[512];
        snprintf(path, sizeof path, "%s/golden.json", names[i]);
        cJSON *golden = golden_load(path);
        snprintf(path, sizeof path, GOLDEN "/%s", names[i]);
        struct tiny tiny = {names[i], path, vectors_get(golden, "prompts")};
        on_all_ranks(path, tiny_settings, work_tiny, &tiny);
        cJSON_Delete(golden);
    }
}

/* ---- real models ---- */

static void work_demo(struct service *s, const void *arg)
{
    int n, done = 0;
    const cJSON *item;
    struct question *q = questions_load(&n);
    cJSON_ArrayForEach (item, vectors_get(arg, "items")) {
        bool pages = vectors_int(item, "prompt_tokens") > 1000, full = vectors_number(item, "budget") >= 1;
        if ((pages && full) || (SLOW_BUILD && done == 2)) continue; /* the full cache of one page is enough */
        struct request r = request_question(s, questions_find(q, n, vectors_string(item, "id")));
        check_item(s, item, &r);
        done++;
    }
    printf("\n    %d answers\n  ", done);
    questions_free(q, n);
}

static void test_demo(void)
{
    static const char *const settings[] = {"kv_cache.policy", "vl_cache", "max_num_batched_tokens", "2400", NULL};
    cJSON *golden = golden_load("demo.json");
    on_all_ranks(DEMO, settings, work_demo, golden);
    cJSON_Delete(golden);
}

static void work_smollm2(struct service *s, const void *arg)
{
    const cJSON *item;
    cJSON_ArrayForEach (item, vectors_get(arg, "items")) {
        struct request r = request_smollm2(s, item);
        check_item(s, item, &r);
    }
}

/* 9 heads in 3 KV groups: 2 ranks hold 2 and 1 of them by turns, on 4 ranks one group stands twice. */
static void test_smollm2(void)
{
    static const char *const settings[] = {
        "kv_cache.policy", "vl_cache", "max_model_len", "256", "max_num_batched_tokens", "256", NULL};
    if (SLOW_BUILD || !file_exists(SMOLLM2)) {
        printf("\n    skipped: %s\n  ", SLOW_BUILD ? "a build with sanitizers" : "no models/smollm2");
        return;
    }
    cJSON *golden = golden_load("smollm2.json");
    on_all_ranks(SMOLLM2, settings, work_smollm2, golden);
    cJSON_Delete(golden);
}

/* ---- what rank 0 changes under way ---- */

static struct answer ask_random(struct service *s)
{
    struct answer a;
    struct request r = request_random(5, 150, engine_dims(s->engine)->vocab_size, 6);
    r.budget = (struct kv_budget){0.2, 0};
    service_submit(s, &r, &a);
    service_run(s);
    CHECK(a.done && a.n_tokens == 6);
    return a;
}

static void work_changes(struct service *s, const void *arg)
{
    struct policy_config policy = s->config.kv_cache;
    struct answer first = ask_random(s), crowd[6];
    int active;
    (void)arg;
    strcpy(policy.policy, "full");
    CHECK_OK(engine_set_policy(s->engine, &policy));
    struct answer full = ask_random(s);
    CHECK(first.kept[0] < 150 && full.kept[0] == 150 && full.bytes_kept == full.bytes_full);
    CHECK_OK(engine_set_policy(s->engine, &s->config.kv_cache));
    for (int steps = 0; steps < 9; steps += 2) {
        for (int i = 0; i < 6; i++) {
            struct request r = request_random((uint64_t)i, 30 + 20 * i, engine_dims(s->engine)->vocab_size, 3 + i);
            service_submit(s, &r, &crowd[i]);
        }
        for (int i = 0; i < steps; i++) DEMAND(engine_step(s->engine, &active));
        CHECK_OK(engine_abort_all(s->engine));
        for (int i = 0; i < 6; i++) {
            CHECK(crowd[i].done);
            answer_free(&crowd[i]);
        }
    }
    struct answer again = ask_random(s);
    CHECK(answers_equal(&first, &again) && !memcmp(first.kept, again.kept, sizeof first.kept));
    struct engine_counters c = service_counters(s);
    CHECK(c.pages_free == c.pages_total);
    answer_free(&first);
    answer_free(&full);
    answer_free(&again);
}

/* Another policy between runs and an abort at any step reach all ranks: answers and pages are as before. Every rank
 * looks at its own pool at the end. */
static void test_changes(void)
{
    struct service s;
    service_open(&s, &ranks, GOLDEN "/heads_9", tiny_settings);
    if (!service_follow(&s)) work_changes(&s, NULL);
    service_stop(&s);
    struct engine_counters c = service_counters(&s);
    CHECK(c.pages_free == c.pages_total && c.pages_total > 0 && c.steps > 20);
    service_close(&s);
}

int main(void)
{
    static const struct check_case cases[] = {{"random models that do not divide", test_random_models},
                                              {"the demo model", test_demo},
                                              {"another policy, an abort", test_changes},
                                              {"SmolLM2", test_smollm2},
                                              {0}};
    ranks = ranks_open();
    return ranks_run(&ranks, "model", cases);
}
