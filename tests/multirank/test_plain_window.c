/* test_plain_window - a cache in 8 bits whose first and newest tokens stay plain: 1 to 4 ranks answer alike; with a
 * window above everything the answers are those of a plain cache, with none those of 8 bits alone; what is held and
 * read is what the tokens take; a pool without a page to spare is enough; requests that are cut off leave nothing
 * behind. */
#include "tests/engine_fixture.h"

static struct ranks ranks;

enum { ASKED = 7, PAGE = 16, CODE_PAGE = 64 /* tokens of a page in 8 bits on CPU ranks */ };

/* Prompts from very short to long, all kept, a share, and a single token. */
static void ask_all(struct service *s, struct answer *a)
{
    static const struct kv_budget budgets[] = {{0.3, 0}, {1, 0}, {1, 1}};
    for (int i = 0; i < ASKED; i++) {
        struct request r =
            request_random((uint64_t)i, 1 + 41 * i, engine_dims(s->engine)->vocab_size, 9 + 11 * (i % 4));
        r.budget = budgets[i % 3];
        service_submit(s, &r, &a[i]);
    }
    service_run(s);
    service_check_pages(s);
}

static void free_all(struct answer *a, int n)
{
    for (int i = 0; i < n; i++) answer_free(&a[i]);
}

/* ---- what is held and read: a lane's plain tokens grow to a page's worth more than asked for, then are cut down ----
 */

struct lane {
    int plain, aged, since;
};

static int plain_of(const struct service *s)
{
    return s->config.kv_cache.plain_sinks + s->config.kv_cache.plain_window;
}

static struct lane lane_after_prompt(const struct service *s, int kept)
{
    const int most = plain_of(s), plain = kept < most ? kept : most;
    return (struct lane){plain, kept - plain, 0};
}

static void lane_token(const struct service *s, struct lane *lane)
{
    const int most = plain_of(s);
    lane->plain++;
    if (++lane->since < PAGE) return;
    lane->since = 0;
    if (lane->plain <= most) return;
    lane->aged += lane->plain - most;
    lane->plain = most;
}

static double lane_bytes(const struct service *s, struct lane lane)
{
    const struct model_dims *d = engine_dims(s->engine);
    return (double)d->n_kv_heads * 2 * (lane.plain * 4.0 * d->head_dim + lane.aged * (d->head_dim + 4.0));
}

static void check_bytes(const struct service *s, const struct answer *a)
{
    double kept = 0, read = 0;
    for (int l = 0; l < a->n_layers; l++) {
        struct lane lane = lane_after_prompt(s, a->kept[l]);
        kept += lane_bytes(s, lane);
        for (int i = 0; i + 1 < a->n_tokens; i++) { /* a step reads what stands when its token has come */
            struct lane now = lane;
            now.plain++;
            read += lane_bytes(s, now) / (a->n_tokens - 1);
            lane_token(s, &lane);
        }
    }
    CHECK((double)a->bytes_kept == kept);
    CHECK(fabs(a->bytes_read_per_step - read) < 1e-6 * read);
}

/* ---- ranks ---- */

static void work_random(struct service *s, const char *name, struct answer *want)
{
    struct answer got[ASKED];
    ask_all(s, got);
    for (int i = 0; i < ASKED; i++) {
        const bool equal = s->config.kv_cache.heads == KV_HEADS_EQUAL; /* others compete within a rank */
        bool same =
            !equal || (answers_equal(&got[i], &want[i]) && !memcmp(got[i].kept, want[i].kept, sizeof got[i].kept));
        if (!same) fprintf(stderr, "%s, request %d: not what one rank answers\n", name, i);
        CHECK(same);
        if (equal) check_bytes(s, &got[i]);
    }
    free_all(got, ASKED);
    free_all(want, ASKED);
}

static void compare_ranks(const char *name, const char *policy, const char *dtype, const char *sinks,
                          const char *window, const char *heads)
{
    const char *const settings[] = {"kv_cache.policy",
                                    policy,
                                    "kv_cache.dtype",
                                    dtype,
                                    "kv_cache.plain_sinks",
                                    sinks,
                                    "kv_cache.plain_window",
                                    window,
                                    "kv_cache.heads",
                                    heads,
                                    "max_num_batched_tokens",
                                    strcmp(policy, "pyramid_infer") ? "100" : "300", /* which reads prompts whole */
                                    "max_model_len",
                                    "300",
                                    "kv_cache.pyramid_infer.generation_block",
                                    "0",
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
    compare_ranks("heads_9", "vl_cache", "int8", "4", "32", "equal");
    compare_ranks("heads_9", "full", "fp8", "0", "16", "equal");
    compare_ranks("gqa_tied", "snapkv", "fp8", "3", "1", "equal");
    compare_ranks("heads_7", "streaming_llm", "int8", "7", "0", "equal");
    compare_ranks("head_dim", "pyramid_kv", "int8", "2", "150", "equal");
    compare_ranks("heads_9", "pyramid_infer", "fp8", "4", "20", "equal");
    compare_ranks("heads_9", "tova", "fp8", "4", "20", "adaptive");
}

/* ---- other settings of the same engine ---- */

static void set(struct service *s, int dtype, int sinks, int window)
{
    s->config.kv_cache.dtype = dtype;
    s->config.kv_cache.plain_sinks = sinks;
    s->config.kv_cache.plain_window = window;
    CHECK_OK(engine_set_policy(s->engine, &s->config.kv_cache));
}

static void compare_settings(struct service *s)
{
    struct answer plain[ASKED], eight[ASKED], parts[ASKED];
    int differ = 0;
    set(s, KV_DTYPE_AUTO, 4, 32);
    ask_all(s, plain);
    set(s, KV_DTYPE_FP8, 0, 0);
    ask_all(s, eight);
    set(s, KV_DTYPE_FP8, 0, 1000); /* nothing ages */
    ask_all(s, parts);
    for (int i = 0; i < ASKED; i++) {
        CHECK(answers_equal(&plain[i], &parts[i]));
        CHECK(parts[i].bytes_kept == plain[i].bytes_kept);
        CHECK(fabs(parts[i].bytes_read_per_step / plain[i].bytes_read_per_step - 1) < 1e-9);
        differ += !answers_equal(&plain[i], &eight[i]);
        CHECK(i == 0 || 2 * eight[i].bytes_kept < plain[i].bytes_kept);
    }
    CHECK(differ > 0); /* so that the above says something */
    free_all(parts, ASKED);
    set(s, KV_DTYPE_FP8, 4, 32);
    ask_all(s, parts);
    for (int i = 0; i < ASKED; i++) check_bytes(s, &parts[i]);
    free_all(parts, ASKED);
    set(s, KV_DTYPE_FP8, 0, 0); /* as if it had never been otherwise */
    ask_all(s, parts);
    for (int i = 0; i < ASKED; i++) CHECK(answers_equal(&parts[i], &eight[i]));
    free_all(parts, ASKED);
    free_all(plain, ASKED);
    free_all(eight, ASKED);
}

static const char *const windowed[] = {"kv_cache.dtype",
                                       "int8",
                                       "kv_cache.plain_sinks",
                                       "4",
                                       "kv_cache.plain_window",
                                       "32",
                                       "max_model_len",
                                       "300",
                                       "kv_cache.policy",
                                       "vl_cache",
                                       NULL};

static void test_settings(void)
{
    struct service s;
    service_open(&s, &ranks, GOLDEN "/heads_9", windowed);
    if (!service_follow(&s)) compare_settings(&s);
    service_close(&s);
}

/* ---- pages ---- */

static void watch_pages(struct service *s, int prompt)
{
    struct answer a;
    int active;
    struct request r = request_random(6, prompt, engine_dims(s->engine)->vocab_size, 80);
    service_submit(s, &r, &a);
    do DEMAND(engine_step(s->engine, &active));
    while (active && service_counters(s).prefill_tokens < prompt);
    const int64_t lanes = s->engine->resources.kv.lanes_per_slot;
    int64_t decoded = service_counters(s).decode_tokens;
    struct lane lane = lane_after_prompt(s, prompt);
    for (int i = 0; i < 60 && active; i++) {
        struct engine_counters c = service_counters(s);
        for (; decoded < c.decode_tokens; decoded++) lane_token(s, &lane);
        CHECK(c.pages_total - c.pages_free ==
              lanes * ((lane.plain + PAGE - 1) / PAGE + (lane.aged + CODE_PAGE - 1) / CODE_PAGE));
        DEMAND(engine_step(s->engine, &active));
    }
    service_run(s);
    CHECK(service_counters(s).pages_free == service_counters(s).pages_total);
    answer_free(&a);
}

/* A pool that one sequence fills: what others ask waits, and no lane is ever short of a page. */
static void run_tight(const char *policy, const char *heads, int prompt, int answer, const char *sinks,
                      const char *window)
{
    const int lane_tokens = prompt + answer, plain = atoi(sinks) + atoi(window);
    char bytes[32];
    struct service s;
    const char *settings[] = {"kv_cache.dtype",
                              "fp8",
                              "kv_cache.policy",
                              policy,
                              "kv_cache.heads",
                              heads,
                              "kv_cache.plain_sinks",
                              sinks,
                              "kv_cache.plain_window",
                              window,
                              "max_model_len",
                              "300",
                              "kv_cache_memory_bytes",
                              bytes,
                              NULL};
    struct config c = service_config(GOLDEN "/gqa_tied", NULL);
    struct model_dims dims;
    DEMAND(model_dims_load(c.model, &dims));
    const int lane_pages = (lane_tokens + PAGE - 1) / PAGE + kv_age_pages(lane_tokens, plain, PAGE, CODE_PAGE);
    const size_t page_bytes = (size_t)(2 * PAGE * dims.head_dim * 4 + 2 * CODE_PAGE * 4);
    snprintf(bytes, sizeof bytes, "%zu", page_bytes * (size_t)(lane_pages * dims.n_layers * dims.n_kv_heads));
    service_open(&s, &ranks, GOLDEN "/gqa_tied", settings);
    if (!service_follow(&s)) {
        struct answer a[12];
        for (int i = 0; i < 12; i++) {
            struct request r =
                request_random((uint64_t)i, i % 3 ? prompt / (i % 3 * 2) : prompt, dims.vocab_size, answer);
            r.budget = (struct kv_budget){i % 2 ? 1 : 0.2, 0};
            service_submit(&s, &r, &a[i]);
        }
        service_run(&s);
        for (int i = 0; i < 12; i++) CHECK(a[i].done && a[i].n_tokens == answer);
        struct engine_counters counters = service_counters(&s);
        CHECK(counters.pages_free == counters.pages_total);
        struct request r = request_random(1, prompt + PAGE, dims.vocab_size, answer);
        if (ranks.comm->size == 1)
            CHECK(engine_submit(s.engine, &r, (struct sink){&a[0], answer_show, answer_done}) == ERR_REQUEST);
        request_free(&r);
        free_all(a, 12);
    }
    service_close(&s);
}

static void test_pages(void)
{
    struct service s;
    if (ranks.comm->size == 1) {
        service_open(&s, &ranks, GOLDEN "/heads_9", windowed);
        set(&s, KV_DTYPE_INT8, 4, 32);
        watch_pages(&s, 120);
        watch_pages(&s, 20);
        set(&s, KV_DTYPE_FP8, 1, 16);
        watch_pages(&s, 200);
        service_close(&s);
    }
    run_tight("full", "equal", 200, 70, "4", "32");
    run_tight("snapkv", "equal", 160, 60, "0", "16");
    run_tight("snapkv", "adaptive", 150, 100, "4", "12");
    run_tight("full", "equal", 100, 90, "0", "120");
}

/* ---- requests that are cut off ---- */

static void cut_off(struct service *s)
{
    struct answer a[6], again, want;
    int active;
    const int vocabulary = engine_dims(s->engine)->vocab_size;
    struct request r = request_random(5, 70, vocabulary, 40);
    service_submit(s, &r, &want);
    service_run(s);
    for (int steps = 0; steps < 40; steps += 3) {
        for (int i = 0; i < 6; i++) {
            r = request_random((uint64_t)i, 20 + 40 * i, vocabulary, 1 + 10 * i);
            r.budget = (struct kv_budget){0.4, 0};
            service_submit(s, &r, &a[i]);
        }
        for (int i = 0; i < steps; i++) DEMAND(engine_step(s->engine, &active));
        CHECK_OK(engine_abort_all(s->engine));
        for (int i = 0; i < 6; i++) CHECK(a[i].done);
        free_all(a, 6);
        DEMAND(engine_step(s->engine, &active));
        CHECK(active == 0 && service_counters(s).pages_free == service_counters(s).pages_total);
    }
    r = request_random(5, 70, vocabulary, 40);
    service_submit(s, &r, &again);
    service_run(s);
    CHECK(answers_equal(&again, &want));
    answer_free(&again);
    answer_free(&want);
}

static void test_cut_off(void)
{
    struct service s;
    service_open(&s, &ranks, GOLDEN "/heads_9", windowed);
    if (!service_follow(&s)) cut_off(&s);
    service_close(&s);
}

/* ---- what is refused ---- */

static void refuse(struct service *s)
{
    struct policy_config config = s->config.kv_cache;
    strcpy(config.policy, "quest");
    CHECK_FAILS(engine_set_policy(s->engine, &config), ERR_CONFIG, "plain_window with kv_cache.policy quest");
    strcpy(config.policy, "vl_cache");
    config.evicted = KV_EVICTED_HOST;
    CHECK_FAILS(engine_set_policy(s->engine, &config), ERR_CONFIG, "plain_window with kv_cache.evicted host");
    struct answer a = {0};
    struct request r = request_random(5, 70, engine_dims(s->engine)->vocab_size, 4);
    const int32_t next[2] = {5, 6};
    r.followup = copy_of(next, sizeof next);
    r.n_followup = 2;
    r.followup_max_tokens = 2;
    CHECK_FAILS(engine_submit(s->engine, &r, (struct sink){&a, answer_show, answer_done}), ERR_REQUEST, "two parts");
    request_free(&r);
}

static void refuse_room(struct service *s)
{
    struct policy_config config = s->config.kv_cache;
    config.plain_window = 8;
    CHECK_FAILS(engine_set_policy(s->engine, &config), ERR_CONFIG, "no tables for lanes in two parts");
    config.dtype = KV_DTYPE_AUTO; /* there it means nothing */
    CHECK_OK(engine_set_policy(s->engine, &config));
}

static void test_refusals(void)
{
    static const char *const eight[] = {"kv_cache.dtype", "int8", "max_model_len", "300", NULL};
    struct service s;
    service_open(&s, &ranks, GOLDEN "/heads_9", windowed);
    if (!service_follow(&s)) refuse(&s);
    service_close(&s);
    service_open(&s, &ranks, GOLDEN "/heads_9", eight);
    if (!service_follow(&s)) refuse_room(&s);
    service_close(&s);
}

int main(void)
{
    static const struct check_case cases[] = {{"random models", test_random_models},
                                              {"a window above everything, and none", test_settings},
                                              {"pages", test_pages},
                                              {"requests that are cut off", test_cut_off},
                                              {"refusals", test_refusals},
                                              {0}};
    ranks = ranks_open();
    return ranks_run(&ranks, "plain_window", cases);
}
