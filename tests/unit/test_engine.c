/* test_engine - the engine on one rank: continuous batching gives what single runs give, chunks give what whole prompts
 * give, VL-Cache frees pages that others then use, and every request ends by its own rules. Real prompts on the demo
 * model where the cache matters, a tiny random model where many requests do. */
#include "tests/engine_fixture.h"

#define TINY GOLDEN "/gqa_tied"
#define TINY_LLAVA GOLDEN "/llava"
enum { TINY_VOCABULARY = 131 };

static struct ranks ranks;

/* ---- batches ---- */

static const char *const mixed_ids[] = {"dev-1p-0000", "dev-1p-0099", "dev-1p-0001", "dev-1p-0005",
                                        "dev-1p-0009", "dev-4p-0011", "dev-1p-0042", "dev-4p-0000"};
enum { MIXED = sizeof mixed_ids / sizeof *mixed_ids };

static struct request mixed_request(const struct service *s, const struct question *q, int n, int i, double temperature)
{
    struct request r = request_question(s, questions_find(q, n, mixed_ids[i]));
    r.sampling.temperature = (float)temperature;
    r.sampling.seed = 1000 + (uint64_t)i;
    if (temperature > 0) r.max_tokens = 12;
    r.ignore_eos = temperature > 0;
    return r;
}

/* Prompts of one and four pages: alone, then all at once, then joining while others decode. */
static void check_mixed(struct service *s, const struct question *q, int n, double temperature, int n_mixed)
{
    struct answer alone[MIXED], together[MIXED], joining[MIXED];
    int active;
    for (int i = 0; i < n_mixed; i++) {
        struct request r = mixed_request(s, q, n, i, temperature);
        service_submit(s, &r, &alone[i]);
        service_run(s);
        if (temperature > 0) continue;
        const struct question *item = questions_find(q, n, mixed_ids[i]);
        if (s->config.kv_cache.budget.share >= 1) CHECK(answer_is(&alone[i], item->tokens, item->n_tokens));
    }
    for (int i = 0; i < n_mixed; i++) {
        struct request r = mixed_request(s, q, n, i, temperature);
        service_submit(s, &r, &together[i]);
    }
    service_run(s);
    for (int i = n_mixed - 1; i >= 0; i--) {
        struct request r = mixed_request(s, q, n, i, temperature);
        service_submit(s, &r, &joining[i]);
        for (int step = 0; step < 1 + i % 3; step++) DEMAND(engine_step(s->engine, &active));
    }
    service_run(s);
    for (int i = 0; i < n_mixed; i++) {
        if (!answers_equal(&alone[i], &together[i]) || !answers_equal(&alone[i], &joining[i]))
            fprintf(stderr, "%s: alone \"%s\", together \"%s\", joining \"%s\"\n", mixed_ids[i], alone[i].text,
                    together[i].text, joining[i].text);
        CHECK(answers_equal(&alone[i], &together[i]));
        CHECK(answers_equal(&alone[i], &joining[i]));
        CHECK(!memcmp(alone[i].kept, joining[i].kept, sizeof alone[i].kept));
        answer_free(&alone[i]);
        answer_free(&together[i]);
        answer_free(&joining[i]);
    }
    service_check_pages(s);
}

static void test_batch_of_eight(void)
{
    static const char *const settings[] = {
        "kv_cache.policy", "vl_cache", "max_num_seqs", "8", "max_num_batched_tokens", "3000", NULL};
    struct service s;
    int n;
    struct question *q = questions_load(&n);
    service_open(&s, &ranks, DEMO, settings);
    check_mixed(&s, q, n, 0, SLOW_BUILD ? 3 : MIXED);
    if (!SLOW_BUILD) check_mixed(&s, q, n, 1.5, 5);
    CHECK(service_counters(&s).max_running == (SLOW_BUILD ? 3 : MIXED));
    service_close(&s);
    questions_free(q, n);
}

/* Chunks that no image fits beside another, and a queue that overflows: the same answers. */
static void test_chunked_batch(void)
{
    static const char *const settings[] = {
        "kv_cache.budget", "1", "max_num_seqs", "3", "max_num_batched_tokens", "600", "max_queued", "2", NULL};
    struct service s;
    struct answer a[MIXED];
    int n, n_mixed = SLOW_BUILD ? 2 : MIXED;
    struct question *q = questions_load(&n);
    service_open(&s, &ranks, DEMO, settings);
    for (int i = 0; i < n_mixed; i++) {
        struct request r = mixed_request(&s, q, n, i, 0);
        service_submit(&s, &r, &a[i]);
    }
    service_run(&s);
    for (int i = 0; i < n_mixed; i++) {
        const struct question *item = questions_find(q, n, mixed_ids[i]);
        CHECK(answer_is(&a[i], item->tokens, item->n_tokens));
        answer_free(&a[i]);
    }
    service_check_pages(&s);
    service_close(&s);
    questions_free(q, n);
}

/* More sequences decode at once than prompt tokens fit a step. */
static void test_narrow_steps(void)
{
    static const char *const narrow[] = {"max_num_batched_tokens", "3", "max_num_seqs", "12", NULL};
    struct service s;
    struct answer want[12], got[12];
    for (int pass = 0; pass < 2; pass++) {
        service_open(&s, &ranks, TINY, pass ? narrow : NULL);
        for (int i = 0; i < 12; i++) {
            struct request r = request_random((uint64_t)i, 1 + 2 * i, TINY_VOCABULARY, 40);
            service_submit(&s, &r, pass ? &got[i] : &want[i]);
        }
        service_run(&s);
        if (pass) CHECK(service_counters(&s).max_running >= 10);
        service_close(&s);
    }
    for (int i = 0; i < 12; i++) {
        CHECK(answers_equal(&want[i], &got[i]));
        answer_free(&want[i]);
        answer_free(&got[i]);
    }
}

/* ---- pages ---- */

/* The pool holds four full sequences; with a tenth of each prompt kept, twenty and more run at once. */
static void run_many(const char *model, const char *pool, int most_running, int n_requests,
                     struct request (*make)(const struct service *s, int i))
{
    const char *settings[] = {"kv_cache.policy",
                              "vl_cache",
                              "max_num_seqs",
                              "32",
                              "kv_cache_memory_bytes",
                              pool,
                              "max_num_batched_tokens",
                              "2400",
                              NULL};
    struct service s;
    struct answer *a = take((size_t)n_requests * sizeof *a);
    for (int full = 1; full >= 0; full--) {
        if (full && SLOW_BUILD) continue;
        service_open(&s, &ranks, model, settings);
        int n = full ? 6 : n_requests, same_length = 0;
        for (int i = 0; i < n; i++) {
            struct request r = make(&s, i);
            if (full) r.budget = (struct kv_budget){1, 0};
            service_submit(&s, &r, &a[i]);
        }
        service_run(&s);
        int running = service_counters(&s).max_running;
        printf("\n    %s: %d at once, %lld pages%s", full ? "full cache" : "VL-Cache at 10%", running,
               (long long)service_counters(&s).pages_total, full ? "" : "\n  ");
        CHECK(full ? running == 4 : running >= most_running);
        for (int i = 0; i < n; i++) {
            same_length += a[i].kept[0] == a[i].kept[1];
            CHECK(a[i].done && (full ? a[i].bytes_kept == a[i].bytes_full : 8 * a[i].bytes_kept < a[i].bytes_full));
            answer_free(&a[i]);
        }
        CHECK(full || same_length < n); /* budgets differ by layer */
        service_check_pages(&s);
        service_close(&s);
    }
    free(a);
}

static struct request make_page(const struct service *s, int i)
{
    int n;
    char id[32];
    struct question *q = questions_load(&n);
    snprintf(id, sizeof id, "dev-1p-%04d", i);
    struct request r = request_question(s, questions_find(q, n, id));
    r.max_tokens = 16;
    r.ignore_eos = true;
    questions_free(q, n);
    return r;
}

static struct request make_tiny_images(const struct service *s, int i)
{
    const struct vision_dims *v = &engine_dims(s->engine)->vision;
    int images = 25, n = images * v->n_image_tokens + 20;
    struct request r = request_random((uint64_t)i + 1, n, TINY_VOCABULARY, 40);
    size_t bytes = (size_t)v->image_size * (size_t)v->image_size * 3;
    r.spans = take((size_t)images * sizeof *r.spans);
    r.pixel_bytes = (size_t)images * bytes;
    r.pixels = take(r.pixel_bytes);
    for (size_t k = 0; k < r.pixel_bytes; k++) r.pixels[k] = (uint8_t)(k * (size_t)(i + 3) >> 3);
    for (; r.n_images < images; r.n_images++) {
        int start = 2 + r.n_images * v->n_image_tokens;
        r.spans[r.n_images] = (struct image_span){start, start + v->n_image_tokens};
        for (int k = start; k < start + v->n_image_tokens; k++) r.ids[k] = v->image_token_id;
    }
    r.budget = s->config.kv_cache.budget;
    return r;
}

/* At most 596 + 16 tokens are 39 pages in each of 40 lanes; 4 sequences, of pages of 8 KiB. */
static void test_many_pages(void)
{
    if (!SLOW_BUILD) run_many(DEMO, "51118080", 20, 26, make_page);
}

/* 420 + 40 tokens are 29 pages in each of 4 lanes; 4 sequences, of pages of 1 KiB. */
static void test_many_tiny(void) { run_many(TINY_LLAVA, "475136", 12, 60, make_tiny_images); }

static void test_pages_used_again(void)
{
    static const char *const settings[] = {"kv_cache.policy",
                                           "vl_cache",
                                           "kv_cache.budget",
                                           "0.3",
                                           "max_num_seqs",
                                           "6",
                                           "kv_cache_memory_bytes",
                                           "65536",
                                           "max_num_batched_tokens",
                                           "64",
                                           "max_queued",
                                           "400",
                                           NULL};
    struct service s;
    enum { N = SLOW_BUILD ? 60 : 400 };
    struct answer *a = take(N * sizeof *a);
    service_open(&s, &ranks, TINY, settings);
    int64_t tokens = 0;
    for (int i = 0; i < N; i++) {
        struct request r = request_random((uint64_t)i, 1 + i * 7 % 90, TINY_VOCABULARY, 1 + i * 5 % 13);
        r.budget = s.config.kv_cache.budget;
        service_submit(&s, &r, &a[i]);
    }
    service_run(&s);
    for (int i = 0; i < N; i++) {
        CHECK(a[i].done && a[i].n_tokens == 1 + i * 5 % 13 && a[i].reason == FINISH_LENGTH);
        tokens += 1 + i * 7 % 90;
        answer_free(&a[i]);
    }
    CHECK(service_counters(&s).prefill_tokens == tokens);
    CHECK(service_counters(&s).max_running >= 3);
    service_check_pages(&s);
    service_close(&s);
    free(a);
}

static void test_abort(void)
{
    static const char *const settings[] = {"kv_cache.policy", "vl_cache", "max_num_batched_tokens", "64", NULL};
    struct service s;
    struct answer a[10], again, want;
    int active;
    service_open(&s, &ranks, TINY, settings);
    for (int steps = 0; steps < 12; steps++) {
        for (int i = 0; i < 10; i++) {
            struct request r = request_random((uint64_t)i, 20 + 15 * i, TINY_VOCABULARY, 1 + 3 * i);
            r.budget = s.config.kv_cache.budget;
            service_submit(&s, &r, &a[i]);
        }
        for (int i = 0; i < steps; i++) DEMAND(engine_step(s.engine, &active));
        CHECK_OK(engine_abort_all(s.engine));
        for (int i = 0; i < 10; i++) {
            CHECK(a[i].done && (a[i].reason == FINISH_ABORT || a[i].n_tokens == 1 + 3 * i));
            answer_free(&a[i]);
        }
        DEMAND(engine_step(s.engine, &active));
        CHECK(active == 0);
        service_check_pages(&s);
    }
    /* and what comes after is as if nothing had been */
    struct request r = request_random(5, 70, TINY_VOCABULARY, 9);
    service_submit(&s, &r, &again);
    service_run(&s);
    service_close(&s);
    service_open(&s, &ranks, TINY, settings);
    r = request_random(5, 70, TINY_VOCABULARY, 9);
    service_submit(&s, &r, &want);
    service_run(&s);
    CHECK(answers_equal(&again, &want));
    answer_free(&again);
    answer_free(&want);
    service_close(&s);
}

/* ---- budgets ---- */

static struct answer ask_budget(struct service *s, int n_ids, struct kv_budget budget)
{
    struct answer a;
    struct request r = request_random(77, n_ids, TINY_VOCABULARY, 5);
    r.budget = budget;
    service_submit(s, &r, &a);
    service_run(s);
    CHECK(a.done && a.n_tokens == 5 && a.n_layers == 2);
    return a;
}

static void test_budgets(void)
{
    static const char *const settings[] = {"kv_cache.policy", "vl_cache", NULL};
    struct service s;
    service_open(&s, &ranks, TINY, settings);
    struct answer one = ask_budget(&s, 100, (struct kv_budget){1, 1});
    CHECK(one.kept[0] >= 1 && one.kept[0] <= 2 && one.kept[1] >= 1 && one.kept[1] <= 2);
    struct answer all = ask_budget(&s, 100, (struct kv_budget){1, 0});
    CHECK(all.kept[0] == 100 && all.kept[1] == 100 && all.bytes_kept == all.bytes_full);
    struct answer more = ask_budget(&s, 100, (struct kv_budget){1, 5000});
    CHECK(more.kept[0] == 100 && answers_equal(&more, &all));
    struct answer half = ask_budget(&s, 100, (struct kv_budget){0.5, 0});
    struct answer fifty = ask_budget(&s, 100, (struct kv_budget){1, 50});
    CHECK(answers_equal(&half, &fifty) && half.kept[0] == fifty.kept[0]);
    CHECK(half.kept[0] + half.kept[1] <= 100 && half.kept[0] + half.kept[1] >= 98);
    struct answer small = ask_budget(&s, 1, (struct kv_budget){0.1, 0}); /* shorter than every window */
    CHECK(small.kept[0] == 1 && small.kept[1] == 1);
    struct answer three = ask_budget(&s, 3, (struct kv_budget){0.4, 0});
    CHECK(three.kept[0] >= 1 && three.kept[0] <= 3);
    struct answer *list[] = {&one, &all, &more, &half, &fifty, &small, &three};
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) answer_free(list[i]);
    service_check_pages(&s);
    service_close(&s);
}

/* Another policy or budget over the same engine, as a fresh engine would have it. */
static void test_set_policy(void)
{
    static const char *const settings[] = {"kv_cache.policy", "vl_cache", "kv_cache.budget", "0.2", NULL};
    struct service s;
    struct kv_budget fifth = {0.2, 0};
    service_open(&s, &ranks, TINY, settings);
    struct answer first = ask_budget(&s, 120, fifth);
    struct policy_config config = s.config.kv_cache;
    strcpy(config.policy, "full");
    CHECK_OK(engine_set_policy(s.engine, &config));
    struct answer full = ask_budget(&s, 120, fifth); /* full ignores budgets */
    CHECK(full.kept[0] == 120 && full.kept[1] == 120);
    config = s.config.kv_cache;
    config.vl_cache.window = 1; /* the newest tokens and nothing else */
    CHECK_OK(engine_set_policy(s.engine, &config));
    struct answer window = ask_budget(&s, 120, fifth);
    CHECK(window.kept[0] == first.kept[0] && window.kept[1] == first.kept[1]);
    CHECK_OK(engine_set_policy(s.engine, &s.config.kv_cache));
    struct answer again = ask_budget(&s, 120, fifth);
    CHECK(answers_equal(&first, &again) && !memcmp(first.kept, again.kept, sizeof first.kept));
    strcpy(config.policy, "vl_cash");
    CHECK_FAILS(engine_set_policy(s.engine, &config), ERR_CONFIG, "vl_cache");
    struct answer last = ask_budget(&s, 120, fifth);
    CHECK(answers_equal(&first, &last));
    struct answer *list[] = {&first, &full, &window, &again, &last};
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) answer_free(list[i]);
    service_close(&s);
}

/* ---- how requests end ---- */

/* " $3606.21" of dev-1p-0005: a token a character, and the end token. */
static struct request amount(const struct service *s, const struct question *q, int n)
{
    return request_question(s, questions_find(q, n, "dev-1p-0005"));
}

static void check_ends(struct service *s, struct request r, const char *text, int n_tokens, enum finish_reason reason)
{
    struct answer a = service_ask(s, r);
    if (strcmp(a.text, text) || a.n_tokens != n_tokens || a.reason != reason)
        fprintf(stderr, "got \"%s\", %d tokens, %s; wanted \"%s\", %d, %s\n", a.text, a.n_tokens,
                finish_reason_name(a.reason), text, n_tokens, finish_reason_name(reason));
    CHECK(!strcmp(a.text, text) && a.n_tokens == n_tokens && a.reason == reason);
    answer_free(&a);
}

static void check_stops(struct service *s, const struct question *q, int n)
{
    struct request r = amount(s, q, n);
    request_stop(&r, "06.2"); /* begins and ends inside other tokens' text */
    check_ends(s, r, " $36", 8, FINISH_STOP);
    r = amount(s, q, n);
    request_stop(&r, "06.2");
    r.include_stop = true;
    check_ends(s, r, " $3606.2", 8, FINISH_STOP);
    r = amount(s, q, n);
    request_stop(&r, "606.9");
    request_stop(&r, ".");
    check_ends(s, r, " $3606", 7, FINISH_STOP);
    r = amount(s, q, n);
    request_stop(&r, "$");
    r.min_tokens = 3; /* too early to count */
    check_ends(s, r, " $3606.21", 10, FINISH_STOP);
    r = amount(s, q, n);
    r.stop_id[r.n_stop_ids++] = 17; /* "." as a token ends the answer and stands in its tokens only */
    check_ends(s, r, " $3606", 7, FINISH_STOP);
}

static void test_ends(void)
{
    struct service s;
    int n;
    struct question *q = questions_load(&n);
    service_open(&s, &ranks, DEMO, (const char *const[]){"max_num_batched_tokens", "700", NULL});
    struct request r = amount(&s, q, n);
    check_ends(&s, r, " $3606.21", 10, FINISH_STOP);
    r = amount(&s, q, n);
    r.max_tokens = 1;
    check_ends(&s, r, " ", 1, FINISH_LENGTH);
    r = amount(&s, q, n);
    r.max_tokens = 4;
    check_ends(&s, r, " $36", 4, FINISH_LENGTH);
    r = amount(&s, q, n);
    r.max_tokens = 10; /* the end token is the last one allowed */
    check_ends(&s, r, " $3606.21", 10, FINISH_STOP);
    check_stops(&s, q, n);
    r = amount(&s, q, n);
    r.ignore_eos = true;
    r.max_tokens = 14;
    struct answer a = service_ask(&s, r);
    CHECK(a.n_tokens == 14 && a.reason == FINISH_LENGTH && a.tokens[9] == 2 && !strncmp(a.text, " $3606.21", 9));
    answer_free(&a);
    r = amount(&s, q, n);
    r.min_tokens = 12;
    a = service_ask(&s, r);
    CHECK(a.n_tokens >= 12 && a.tokens[9] == 2);
    answer_free(&a);
    service_close(&s);
    questions_free(q, n);
}

/* ---- refusals ---- */

static void test_refusals(void)
{
    static const char *const settings[] = {"kv_cache.policy",
                                           "vl_cache",
                                           "max_model_len",
                                           "200",
                                           "max_queued",
                                           "3",
                                           "max_num_batched_tokens",
                                           "50",
                                           "max_images_per_prompt",
                                           "2",
                                           "kv_cache.vl_cache.no_image_rows",
                                           "60",
                                           NULL};
    struct service s;
    struct answer a[4];
    service_open(&s, &ranks, TINY_LLAVA, settings);
    CHECK(engine_max_prompt_tokens(s.engine) == 199);
    service_refuse(&s, request_random(1, 200, TINY_VOCABULARY, 1), "max_model_len 200");
    service_refuse(&s, request_random(1, 100, TINY_VOCABULARY, 101), "max_model_len 200");
    struct request r = request_random(1, 100, TINY_VOCABULARY, 5);
    r.budget = (struct kv_budget){0.1, 0}; /* 60 rows judge the cache together, 50 fit a step */
    service_refuse(&s, r, "max_num_batched_tokens 50");
    service_refuse(&s, request_forced(&(struct answer){.tokens = (int32_t[]){4, 5, 6}}, 3, TINY_VOCABULARY, 2),
                   "3 forced tokens");
    service_refuse(&s,
                   request_forced(&(struct answer){.tokens = (int32_t[]){4, TINY_VOCABULARY}}, 2, TINY_VOCABULARY, 5),
                   "forced token 1 is 131");
    r = request_random(1, 100, TINY_VOCABULARY, 5);
    r.n_images = 3;
    r.spans = take(3 * sizeof *r.spans);
    service_refuse(&s, r, "3 images");
    for (int i = 0; i < 3; i++) {
        r = request_random(1, 199, TINY_VOCABULARY, 1);
        service_submit(&s, &r, &a[i]);
    }
    r = request_random(1, 5, TINY_VOCABULARY, 1);
    CHECK_FAILS(engine_submit(s.engine, &r, (struct sink){&a[3], NULL, answer_done}), ERR_FULL, "3 requests wait");
    CHECK(r.ids != NULL);
    request_free(&r);
    service_run(&s);
    for (int i = 0; i < 3; i++) {
        CHECK(a[i].done && a[i].n_tokens == 1 && answers_equal(&a[i], &a[0]));
        if (i) answer_free(&a[i]);
    }
    answer_free(&a[0]);
    service_check_pages(&s);
    service_close(&s);
}

int main(void)
{
    static const struct check_case cases[] = {{"budgets from one token to all", test_budgets},
                                              {"another policy between runs", test_set_policy},
                                              {"pages used again by hundreds of requests", test_pages_used_again},
                                              {"steps of three prompt tokens", test_narrow_steps},
                                              {"abort at any step", test_abort},
                                              {"refusals", test_refusals},
                                              {"many at once, small", test_many_tiny},
                                              {"stop strings, ids, lengths", test_ends},
                                              {"a batch of eight is eight single runs", test_batch_of_eight},
                                              {"chunked prompts, a full queue", test_chunked_batch},
                                              {"twenty at once where four would fit", test_many_pages},
                                              {0}};
    ranks = ranks_open();
    return ranks_run(&ranks, "engine", cases);
}
