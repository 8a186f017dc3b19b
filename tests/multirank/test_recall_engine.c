/* test_recall_engine - evicted tokens in host memory, in the engine on the demo model: a recall that takes everything
 * is the full cache, ClusterKV does not notice where its tokens lie, answers do not depend on the batch or the number
 * of ranks, every token is in one of the two pools, and pages of both come back. */
#include "tests/engine_fixture.h"

static struct ranks ranks;

#define CLUSTER(key) "kv_cache.cluster_kv." key
#define COMMON                                                                                                         \
    "kv_cache.recall_cache_steps", "3", "max_model_len", "512", "max_num_batched_tokens", "700",                       \
        CLUSTER("tokens_per_cluster"), "12", CLUSTER("window"), "24", CLUSTER("window_clusters"), "3",                 \
        CLUSTER("full_layers"), "1"
static const char *const host[] = {
    "kv_cache.evicted", "host", "kv_cache.policy", "vl_cache", "kv_cache.recall_budget", "0.1", COMMON, NULL};
static const char *const freed[] = {"kv_cache.policy", "cluster_kv", COMMON, NULL};

static bool pools_full(const struct service *s)
{
    struct engine_counters c = service_counters(s);
    return c.pages_free == c.pages_total && c.host_pages_free == c.host_pages_total && c.host_pages_total > 0;
}

static const char *model = DEMO;

static void on_all_ranks(const char *const *settings, void (*work)(struct service *s))
{
    struct service s;
    service_open(&s, &ranks, model, settings);
    if (!service_follow(&s)) work(&s);
    service_stop(&s);
    CHECK(pools_full(&s) || settings != host);
    service_close(&s);
}

static struct policy_config config_of(const struct service *s, const char *policy, double budget, double recall)
{
    struct policy_config config = s->config.kv_cache;
    snprintf(config.policy, sizeof config.policy, "%s", policy);
    config.budget = (struct kv_budget){budget, 0};
    config.recall_budget = (struct kv_budget){recall, 0};
    config.recall_cache_steps = 1;
    return config;
}

/* Logits of a prompt of 260 tokens and the 60 that follow, given tokens, so that runs do not part. */
static struct seen_logits watch(struct service *s, const struct policy_config *config, struct answer *a)
{
    struct seen_logits seen = {0};
    struct request r = request_random(3, 260, engine_dims(s->engine)->vocab_size, 60);
    r.budget = config->budget;
    r.forced = take(60 * sizeof *r.forced);
    r.n_forced = 60;
    for (int i = 0; i < 60; i++) r.forced[i] = 5 + 17 * i % 1000;
    CHECK_OK(engine_set_policy(s->engine, config));
    service_watch(s, &seen);
    service_submit(s, &r, a);
    service_run(s);
    service_watch(s, NULL);
    CHECK(a->done && seen.n >= 60);
    return seen;
}

/* ---- what is recalled ---- */

/* Where recalled tokens are read changes no bit; more steps find more. */
static void check_cache(struct service *s, struct policy_config *config, const struct seen_logits *want, double of_one)
{
    struct answer a;
    double before = 0;
    for (int steps = 0; steps < 4; steps += 1 + (steps > 0)) {
        config->recall_cache_steps = steps;
        struct seen_logits got = watch(s, config, &a);
        CHECK(got.n == want->n && !memcmp(got.row, want->row, (size_t)want->n * want->vocab * sizeof(float)));
        CHECK(steps != 1 || a.recall_hit_rate == of_one);
        CHECK(steps ? a.recall_hit_rate > before : a.recall_hit_rate == 0);
        const double moved = a.recall_bytes_per_step / (1 - a.recall_hit_rate) / (double)a.bytes_full;
        CHECK(moved > 0.099 && moved < 0.101);
        before = a.recall_hit_rate;
        answer_free(&a);
        free(got.row);
    }
}

static void work_everything(struct service *s)
{
    static const char *const policies[] = {"vl_cache", "snapkv", "streaming_llm", "cluster_kv"};
    struct answer a;
    struct policy_config config = config_of(s, "full", 1, 1);
    struct seen_logits want = watch(s, &config, &a);
    answer_free(&a);
    for (int p = 0; p < 4; p++) {
        config = config_of(s, policies[p], p == 3 ? 0.9999 : 0.1, 1); /* of ClusterKV: all but one token */
        struct seen_logits got = watch(s, &config, &a);
        const double off = distance(got.row, want.row, (size_t)want.n * want.vocab);
        const double scale = spread(want.row, (size_t)want.n * want.vocab);
        if (p < 3) CHECK(got.n == want.n && off < 2e-5 * (1 + scale));
        if (p == 3) CHECK(got.n == want.n && off > 0);
        CHECK(a.bytes_kept < a.bytes_full && a.bytes_kept + a.bytes_host == a.bytes_full && a.bytes_host > 0);
        CHECK(a.bytes_read_per_step > 0.9 * (double)a.bytes_full && a.recall_hit_rate > 0);
        answer_free(&a);
        free(got.row);
        CHECK(pools_full(s));
    }
    /* Less is something else, and evicting without recall something else again. */
    config = config_of(s, "vl_cache", 0.1, 0.1);
    struct seen_logits got = watch(s, &config, &a);
    CHECK(distance(got.row, want.row, (size_t)want.n * want.vocab) > 1e-2);
    CHECK(a.recall_hit_rate > 0.05 && a.recall_hit_rate < 1 && a.recall_bytes_per_step < 0.099 * (double)a.bytes_full);
    check_cache(s, &config, &got, a.recall_hit_rate);
    answer_free(&a);
    free(got.row);
    free(want.row);
}

static void test_everything(void) { on_all_ranks(host, work_everything); }

/* ClusterKV with its tokens on the device and in host memory: the same bits, generated clusters included. */
static struct seen_logits cluster_logits;
static void work_cluster(struct service *s)
{
    struct answer a;
    struct policy_config config = config_of(s, "cluster_kv", 0.15, 0.5);
    struct seen_logits seen = watch(s, &config, &a);
    if (config.evicted == KV_EVICTED_FREE) {
        cluster_logits = seen;
        CHECK(a.kept[0] == 260 && a.kept[9] == 260 && a.bytes_host == 0 && a.recall_bytes_per_step == 0);
    } else {
        CHECK(seen.n == cluster_logits.n &&
              !memcmp(seen.row, cluster_logits.row, (size_t)seen.n * seen.vocab * sizeof(float)));
        CHECK(a.kept[0] == 260 && a.kept[1] == 16 && a.kept[9] == 16);
        free(seen.row);
        free(cluster_logits.row);
    }
    answer_free(&a);
}

static void test_cluster(void)
{
    on_all_ranks(freed, work_cluster);
    on_all_ranks(host, work_cluster);
}

/* ---- batches and ranks ---- */

static const struct kv_budget mixed_budgets[5] = {{0.5, 0}, {0.1, 0}, {1, 0}, {0.05, 0}, {1, 20}};

static void compare(struct answer *got, struct answer *want, const char *what)
{
    for (int i = 0; i < MIXED_REQUESTS; i++) {
        bool same = answers_equal(&got[i], &want[i]) && !memcmp(got[i].kept, want[i].kept, sizeof want[i].kept);
        if (!same) fprintf(stderr, "%s: request %d is answered otherwise\n", what, i);
        CHECK(same && got[i].bytes_host == want[i].bytes_host);
        CHECK(got[i].bytes_host + got[i].bytes_kept == got[i].bytes_full);
    }
    for (int i = 0; i < MIXED_REQUESTS; i++) answer_free(&got[i]), answer_free(&want[i]);
}

static const char *const mixed_policies[] = {"vl_cache", "cluster_kv"};
static void one_rank(struct answer (*a)[MIXED_REQUESTS])
{
    struct ranks alone = {.liveness = ranks.liveness};
    struct service s;
    DEMAND(comm_open("self", &alone.comm));
    service_open(&s, &alone, model, host);
    for (int p = 0; p < 2; p++) {
        struct policy_config config = config_of(&s, mixed_policies[p], 0.1, 0.1);
        CHECK_OK(engine_set_policy(s.engine, &config));
        service_ask_mixed(&s, mixed_budgets, a[p], true);
    }
    service_close(&s);
    comm_close(alone.comm);
}

static void work_mixed(struct service *s)
{
    struct answer want[2][MIXED_REQUESTS], got[MIXED_REQUESTS];
    one_rank(want);
    for (int p = 0; p < 2; p++) {
        struct policy_config config = config_of(s, mixed_policies[p], 0.1, 0.1);
        CHECK_OK(engine_set_policy(s->engine, &config));
        service_ask_mixed(s, mixed_budgets, got, false);
        compare(got, want[p], mixed_policies[p]);
        CHECK(pools_full(s));
    }
}

static void test_mixed(void) { on_all_ranks(host, work_mixed); }

/* Heads that compete, so that lanes of a layer differ, and heads that do not divide. */
static void test_uneven(void)
{
    static const char *const settings[] = {
        "kv_cache.evicted", "host", "kv_cache.policy", "vl_cache", "kv_cache.heads", "equal", COMMON, NULL};
    model = GOLDEN "/heads_9";
    on_all_ranks(settings, work_mixed);
    model = DEMO;
}

static void work_adaptive(struct service *s)
{
    struct answer a;
    struct policy_config config = config_of(s, "full", 1, 1);
    struct seen_logits want = watch(s, &config, &a);
    answer_free(&a);
    config = config_of(s, "snapkv", 0.3, 1);
    struct seen_logits got = watch(s, &config, &a);
    CHECK(distance(got.row, want.row, (size_t)want.n * want.vocab) <
          2e-5 * (1 + spread(want.row, (size_t)want.n * want.vocab)));
    CHECK(pools_full(s));
    answer_free(&a);
    free(got.row);
    free(want.row);
}

static void test_adaptive(void)
{
    static const char *const settings[] = {
        "kv_cache.evicted", "host", "kv_cache.policy", "snapkv", "kv_cache.heads", "adaptive", COMMON, NULL};
    on_all_ranks(settings, work_adaptive);
}

/* ---- the pool ---- */

/* Pages that a prompt takes are there while it is answered, and come back when it is cancelled. */
static void work_pages(struct service *s)
{
    struct answer a;
    int active;
    struct request r = request_random(9, 200, engine_dims(s->engine)->vocab_size, 200);
    r.budget = (struct kv_budget){0.2, 0};
    service_submit(s, &r, &a);
    for (int i = 0; i < 20; i++) DEMAND(engine_step(s->engine, &active));
    const struct engine_counters c = service_counters(s);
    int lanes = 0;
    for (int l = 0; l < 10; l++) lanes += model_layers(s->engine->resources.model)[l].heads.n_kv_heads;
    CHECK(c.host_pages_total - c.host_pages_free >= lanes * 9 && c.host_pages_total - c.host_pages_free <= lanes * 12);
    CHECK_OK(engine_abort_all(s->engine));
    service_run(s);
    CHECK(a.done && a.reason == FINISH_ABORT && pools_full(s));
    answer_free(&a);
}

static void test_pages(void) { on_all_ranks(host, work_pages); }

/* Room for one such prompt at a time: the others wait. More than all of it is refused. */
static void work_narrow(struct service *s)
{
    struct answer a[3];
    struct request r = request_random(5, 500, engine_dims(s->engine)->vocab_size, 4);
    r.budget = (struct kv_budget){0.2, 0};
    CHECK_FAILS(engine_submit(s->engine, &r, (struct sink){0}), ERR_REQUEST, "raise kv_cache.host_memory_bytes");
    request_free(&r);
    for (int i = 0; i < 3; i++) {
        r = request_random((uint64_t)i, 180, engine_dims(s->engine)->vocab_size, 20);
        r.budget = (struct kv_budget){0.1, 0};
        service_submit(s, &r, &a[i]);
    }
    service_run(s);
    CHECK(service_counters(s).max_running == 1);
    for (int i = 0; i < 3; i++) {
        CHECK(a[i].done && a[i].bytes_host > 0);
        answer_free(&a[i]);
    }
    CHECK(pools_full(s));
}

static void test_narrow(void)
{
    /* On every rank pages for 16 lanes of 256 tokens or more: 10 layers of 4 KV heads over at most 4 ranks. */
    static const char *const pages[] = {"", "5000KiB", "2560KiB", "1792KiB", "1280KiB"};
    const char *const settings[] = {"kv_cache.evicted",
                                    "host",
                                    "kv_cache.policy",
                                    "vl_cache",
                                    "kv_cache.host_memory_bytes",
                                    pages[ranks.comm->size],
                                    COMMON,
                                    NULL};
    on_all_ranks(settings, work_narrow);
}

static void test_refusals(void)
{
    static const char *const settings[] = {"kv_cache.evicted", "host", "kv_cache.policy", "h2o", COMMON, NULL};
    struct ranks alone = {.liveness = ranks.liveness};
    struct config config = service_config(model, settings);
    struct engine *engine = NULL;
    config.cpu_threads = 1;
    DEMAND(comm_open("self", &alone.comm));
    CHECK_FAILS(engine_open(&config, alone.comm, alone.liveness, &engine), ERR_CONFIG, "host is not served with");
    engine_close(engine);
    comm_close(alone.comm);
}

int main(void)
{
    static const struct check_case cases[] = {{"everything recalled is the full cache", test_everything},
                                              {"ClusterKV in host memory", test_cluster},
                                              {"mixed prompts in a batch", test_mixed},
                                              {"uneven heads", test_uneven},
                                              {"adaptive heads", test_adaptive},
                                              {"pages", test_pages},
                                              {"a narrow pool", test_narrow},
                                              {"refusals", test_refusals},
                                              {0}};
    ranks = ranks_open();
    return ranks_run(&ranks, "recall_engine", cases);
}
