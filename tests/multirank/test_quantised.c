/* test_quantised - a cache in 8 bits: 1 to 4 ranks answer alike, under policies that evict and under none; the demo
 * model reads its pages as it does with the full cache; tokens take the pages and bytes that they should; the dtype
 * changes between runs, and what does not go together is refused. */
#include "tests/engine_fixture.h"

static struct ranks ranks;

enum {
    ASKED = 10,
    LONG = 6 /* of them are, the others have 1 to 10 tokens */,
    CODE_PAGE = 64 /* tokens of a page in 8 bits on CPU ranks */
};

static void ask_all(struct service *s, struct answer *a)
{
    static const struct kv_budget budgets[] = {{0.3, 0}, {1, 0}, {1, 20}, {1, 1}};
    for (int i = 0; i < ASKED; i++) {
        const bool is_short = i >= LONG;
        const int tokens = is_short ? 1 + (i - LONG) * (i - LONG) : 30 + 40 * i;
        struct request r = request_random((uint64_t)i, tokens, engine_dims(s->engine)->vocab_size, 12);
        r.budget = budgets[is_short && i % 2 ? 3 : i % 3];
        service_submit(s, &r, &a[i]);
    }
    service_run(s);
}

static int64_t expected_bytes(const struct service *s, const struct answer *a, bool plain)
{
    const struct model_dims *d = engine_dims(s->engine);
    int64_t tokens = 0;
    for (int l = 0; l < a->n_layers; l++) tokens += a->kept[l];
    return tokens * d->n_kv_heads * 2 * (plain ? 4 * d->head_dim : d->head_dim + 4);
}

static void work_random(struct service *s, const char *name, struct answer *want)
{
    struct answer got[ASKED];
    ask_all(s, got);
    for (int i = 0; i < ASKED; i++) {
        bool same = answers_equal(&got[i], &want[i]) && !memcmp(got[i].kept, want[i].kept, sizeof got[i].kept);
        if (!same) fprintf(stderr, "%s, request %d: not what one rank answers\n", name, i);
        CHECK(same);
        CHECK(got[i].bytes_kept == expected_bytes(s, &got[i], false));
        answer_free(&got[i]);
        answer_free(&want[i]);
    }
    service_check_pages(s);
}

/* Asked of one rank, which is rank 0 by itself, and of all. */
static void compare_ranks(const char *name, const char *policy, const char *dtype)
{
    /* PyramidInfer and H2O read prompts whole. */
    const char *rows = strcmp(policy, "pyramid_infer") && strcmp(policy, "h2o") ? "100" : "300";
    const char *const settings[] = {"kv_cache.policy",
                                    policy,
                                    "kv_cache.dtype",
                                    dtype,
                                    "max_num_batched_tokens",
                                    rows,
                                    "max_model_len",
                                    "300",
                                    "kv_cache.pyramid_infer.generation_block",
                                    "4",
                                    NULL};
    struct ranks alone = {.liveness = ranks.liveness};
    struct answer want[ASKED];
    struct service s;
    char path[512];
    snprintf(path, sizeof path, GOLDEN "/%s", name);
    if (ranks.comm->rank == 0) {
        DEMAND(comm_open("self", &alone.comm));
        service_open(&s, &alone, path, settings);
        ask_all(&s, want);
        service_close(&s);
        comm_close(alone.comm);
    }
    service_open(&s, &ranks, path, settings);
    if (!service_follow(&s)) work_random(&s, name, want);
    service_close(&s);
}

static void test_random_models(void)
{
    compare_ranks("heads_9", "vl_cache", "int8");
    compare_ranks("heads_9", "full", "fp8");
    compare_ranks("gqa_tied", "snapkv", "fp8");
    compare_ranks("heads_7", "streaming_llm", "int8");
    compare_ranks("head_dim", "pyramid_kv", "int8");
    compare_ranks("heads_9", "pyramid_infer", "fp8");
    compare_ranks("heads_9", "h2o", "fp8");
    compare_ranks("gqa_tied", "h2o", "int8");
}

/* ---- the demo model ---- */

static void work_demo(struct service *s)
{
    int n, right = 0, asked = SLOW_BUILD ? 1 : 4;
    struct question *q = questions_load(&n);
    for (int i = 0; i < asked; i++) {
        struct answer a;
        const struct question *ask = &q[i * (n / asked)];
        struct request r = request_question(s, ask);
        service_submit(s, &r, &a);
        service_run(s);
        right += answer_is(&a, ask->tokens, ask->n_tokens);
        CHECK(4 * a.bytes_kept < a.bytes_full * 5 / 4);
        answer_free(&a);
    }
    printf("\n    %d of %d answers are the full cache's\n  ", right, asked);
    CHECK(right == asked);
    questions_free(q, n);
}

static void test_demo(void)
{
    static const char *const dtypes[] = {"int8", "fp8"};
    for (int i = 0; i < 2; i++) {
        const char *const settings[] = {"kv_cache.dtype", dtypes[i], "max_num_batched_tokens", "2400", NULL};
        struct service s;
        service_open(&s, &ranks, DEMO, settings);
        if (!service_follow(&s)) work_demo(&s);
        service_close(&s);
    }
}

/* ---- pages, and what changes between runs ---- */

static struct answer ask_one(struct service *s, int tokens)
{
    struct answer a;
    struct request r = request_random(5, tokens, engine_dims(s->engine)->vocab_size, 40);
    service_submit(s, &r, &a);
    service_run(s);
    CHECK(a.done && a.n_tokens == 40);
    return a;
}

/* Pages that a sequence takes while it generates: its tokens, which a step may be ahead of those counted. */
static void watch_pages(struct service *s, int prompt, int page_tokens)
{
    struct answer a;
    int active;
    struct request r = request_random(6, prompt, engine_dims(s->engine)->vocab_size, 40);
    service_submit(s, &r, &a);
    do DEMAND(engine_step(s->engine, &active));
    while (active && service_counters(s).prefill_tokens < prompt);
    const int64_t prefilled = service_counters(s).decode_tokens, lanes = s->engine->resources.kv.lanes_per_slot;
    for (int i = 0; i < 20 && active; i++) {
        struct engine_counters c = service_counters(s);
        int64_t tokens = prompt + c.decode_tokens - prefilled;
        CHECK(c.pages_total - c.pages_free == lanes * ((tokens + page_tokens - 1) / page_tokens));
        DEMAND(engine_step(s->engine, &active));
    }
    service_run(s);
    CHECK(service_counters(s).pages_free == service_counters(s).pages_total);
    answer_free(&a);
}

static void set_dtype(struct service *s, int dtype)
{
    struct policy_config config = s->config.kv_cache;
    config.dtype = dtype;
    CHECK_OK(engine_set_policy(s->engine, &config));
}

static void work_changes(struct service *s)
{
    struct policy_config config = s->config.kv_cache;
    struct answer first = ask_one(s, 110);
    set_dtype(s, KV_DTYPE_AUTO);
    struct answer plain = ask_one(s, 110);
    CHECK(plain.bytes_kept == plain.bytes_full && plain.bytes_kept == expected_bytes(s, &plain, true));
    set_dtype(s, KV_DTYPE_FP8);
    struct answer fp8 = ask_one(s, 110);
    CHECK(fp8.bytes_kept == expected_bytes(s, &fp8, false) && fp8.bytes_full == plain.bytes_full);
    set_dtype(s, KV_DTYPE_INT8);
    struct answer again = ask_one(s, 110);
    CHECK(answers_equal(&first, &again) && again.bytes_kept == fp8.bytes_kept);
    strcpy(config.policy, "h2o");
    config.dtype = KV_DTYPE_FP8;
    config.evicted = KV_EVICTED_HOST;
    CHECK_FAILS(engine_set_policy(s->engine, &config), ERR_CONFIG, "is not served with kv_cache.policy h2o");
    struct answer *list[] = {&first, &plain, &fp8, &again};
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) answer_free(list[i]);
    if (ranks.comm->size > 1) return;
    service_run(s);
    watch_pages(s, 120, CODE_PAGE);
    set_dtype(s, KV_DTYPE_AUTO);
    watch_pages(s, 120, 16);
}

static void test_changes(void)
{
    static const char *const settings[] = {"kv_cache.dtype", "int8", "max_model_len", "200", NULL};
    struct service s;
    service_open(&s, &ranks, GOLDEN "/heads_9", settings);
    if (!service_follow(&s)) work_changes(&s);
    service_stop(&s);
    struct engine_counters c = service_counters(&s);
    CHECK(c.pages_free == c.pages_total && c.pages_total > 0);
    service_close(&s);
}

/* Room for scales is made where the list of a command names an 8-bit dtype, and an engine without it refuses one. */
static void test_room(void)
{
    static const char *const settings[] = {"max_model_len", "200", NULL};
    size_t planned[2];
    for (int i = 0; i < 2; i++) {
        struct config c = service_config(GOLDEN "/heads_9", settings);
        struct engine *e;
        if (i) strcpy(c.other_dtypes, "auto,fp8");
        if (!c.cpu_threads) c.cpu_threads = 1;
        DEMAND(engine_open(&c, ranks.comm, ranks.liveness, &e));
        planned[i] = e->plan.total;
        CHECK(e->resources.kv.format == KV_PLAIN && (e->resources.kv.scale != NULL) == i);
        if (ranks.comm->rank) {
            DEMAND(engine_follow(e));
        } else {
            c.kv_cache.dtype = KV_DTYPE_FP8;
            if (i)
                CHECK_OK(engine_set_policy(e, &c.kv_cache));
            else
                CHECK_FAILS(engine_set_policy(e, &c.kv_cache), ERR_CONFIG, "no room for scales");
            DEMAND(engine_stop(e));
        }
        CHECK(e->resources.kv.format == (i ? KV_FP8 : KV_PLAIN));
        engine_close(e);
    }
    CHECK(planned[1] > planned[0]);
}

int main(void)
{
    static const struct check_case cases[] = {{"random models", test_random_models},
                                              {"the demo model", test_demo},
                                              {"pages, other dtypes between runs", test_changes},
                                              {"room for scales", test_room},
                                              {0}};
    ranks = ranks_open();
    return ranks_run(&ranks, "quantised", cases);
}
