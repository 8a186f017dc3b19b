/* test_quantised_lists - a cache in 8 bits under the policies whose decode steps attend to lists: 1 to 4 ranks answer
 * alike, alone and in a batch, whatever the prompt's length and the budget; what keeps everything is the full cache in
 * the same dtype; the count of bytes read; pages come back. */
#include "tests/engine_fixture.h"

static struct ranks ranks;

struct method {
    const char *policy, *dtype, *evicted;
};
static const struct method methods[] = {
    {"cluster_kv", "int8", "free"}, {"cluster_kv", "fp8", "free"},  {"quest", "int8", "free"},
    {"quest", "fp8", "free"},       {"vl_cache", "int8", "host"},   {"cluster_kv", "fp8", "host"},
    {"snapkv", "fp8", "host"},      {"cluster_kv", "int8", "host"},
};
enum { METHODS = sizeof methods / sizeof *methods };

static void open_method(struct service *s, struct ranks *of, const char *model, const struct method *m)
{
    const char *const settings[] = {"kv_cache.policy",
                                    m->policy,
                                    "kv_cache.dtype",
                                    m->dtype,
                                    "kv_cache.evicted",
                                    m->evicted,
                                    "kv_cache.recall_budget",
                                    "0.1",
                                    "kv_cache.recall_cache_steps",
                                    "2",
                                    "max_model_len",
                                    "512",
                                    "max_num_batched_tokens",
                                    "700",
                                    "kv_cache.cluster_kv.tokens_per_cluster",
                                    "12",
                                    "kv_cache.cluster_kv.window",
                                    "24",
                                    "kv_cache.cluster_kv.window_clusters",
                                    "3",
                                    "kv_cache.cluster_kv.full_layers",
                                    "1",
                                    "kv_cache.quest.full_layers",
                                    "1",
                                    "kv_cache.quest.min_pages",
                                    "1",
                                    NULL};
    service_open(s, of, model, settings);
}

static bool pools_full(const struct service *s)
{
    const struct engine_counters c = service_counters(s);
    return c.pages_free == c.pages_total && c.pages_total > 0 && c.host_pages_free == c.host_pages_total;
}

/* ---- ranks, batches, budgets ---- */

static const struct kv_budget budgets[5] = {{0.5, 0}, {0.1, 0}, {1, 0}, {1, 1}, {1, 20}};

static void compare(struct answer *got, struct answer *want, const struct method *m)
{
    for (int i = 0; i < MIXED_REQUESTS; i++) {
        const bool same = answers_equal(&got[i], &want[i]) && !memcmp(got[i].kept, want[i].kept, sizeof want[i].kept);
        if (!same) fprintf(stderr, "%s in %s: request %d is answered otherwise\n", m->policy, m->dtype, i);
        CHECK(same && got[i].done && got[i].n_tokens > 0 && got[i].bytes_host == want[i].bytes_host);
        CHECK(got[i].bytes_read_per_step == want[i].bytes_read_per_step);
        answer_free(&got[i]), answer_free(&want[i]);
    }
}

static void compare_ranks(const char *model, const struct method *m)
{
    struct ranks alone = {.liveness = ranks.liveness};
    struct answer want[MIXED_REQUESTS], got[MIXED_REQUESTS];
    struct service s;
    if (ranks.comm->rank == 0) {
        DEMAND(comm_open("self", &alone.comm));
        open_method(&s, &alone, model, m);
        service_ask_mixed(&s, budgets, want, true);
        service_close(&s);
        comm_close(alone.comm);
    }
    open_method(&s, &ranks, model, m);
    if (!service_follow(&s)) {
        service_ask_mixed(&s, budgets, got, false);
        compare(got, want, m);
        CHECK(pools_full(&s));
    }
    service_stop(&s);
    CHECK(pools_full(&s)); /* of this rank */
    service_close(&s);
}

static void test_ranks(void)
{
    static const char *const models[] = {GOLDEN "/heads_9", GOLDEN "/gqa_tied", GOLDEN "/head_dim"};
    for (int i = 0; i < METHODS; i++) compare_ranks(models[i % 3], &methods[i]);
}

/* ---- against the full cache ---- */

static struct policy_config config_of(const struct service *s, const char *policy, int dtype, double budget,
                                      double recall)
{
    struct policy_config config = s->config.kv_cache;
    snprintf(config.policy, sizeof config.policy, "%s", policy);
    config.dtype = dtype;
    config.budget = (struct kv_budget){budget, 0};
    config.recall_budget = (struct kv_budget){recall, 0};
    return config;
}

/* What a step reads: codes and scales, and what lies in host memory as it is; the policy's own beside it. */
static void check_read(const struct service *s, const struct answer *a, const struct policy_config *config)
{
    const struct model_dims *d = engine_dims(s->engine);
    const struct policy_sequence asked = {.prompt_tokens = 260, .budget = config->budget};
    const double lanes = 2.0 * d->n_layers * d->n_kv_heads, plain = 4.0 * d->head_dim;
    const double code = config->dtype == KV_DTYPE_AUTO ? plain : d->head_dim + 4;
    double kept = 0, sum = 0;
    for (int l = 0; l < d->n_layers; l++) kept += (double)a->kept[l] / d->n_layers;
    for (int i = 0; i + 1 < a->n_tokens; i++) {
        const struct policy_reads r = policy_step_reads(&s->engine->resources.policy, &asked, kept, i);
        CHECK(r.recalled <= r.tokens);
        sum += lanes * (r.tokens * code + r.recalled * (plain - code)) + (double)r.beside_bytes;
    }
    const double want = sum / (a->n_tokens - 1);
    CHECK(fabs(a->bytes_read_per_step - want) < 1e-6 * want);
}

/* Logits of a prompt of 260 tokens and the 60 that follow, given tokens, so that runs do not part. */
static struct seen_logits watch(struct service *s, struct policy_config config, struct answer *a)
{
    struct seen_logits seen = {0};
    struct request r = request_random(3, 260, engine_dims(s->engine)->vocab_size, 60);
    r.budget = config.budget;
    r.forced = take(60 * sizeof *r.forced);
    r.n_forced = 60;
    for (int i = 0; i < 60; i++) r.forced[i] = 5 + 17 * i % 100;
    CHECK_OK(engine_set_policy(s->engine, &config));
    service_watch(s, &seen);
    service_submit(s, &r, a);
    service_run(s);
    service_watch(s, NULL);
    CHECK(a->done && seen.n >= 60);
    check_read(s, a, &config);
    return seen;
}

static double off(const struct seen_logits *got, const struct seen_logits *want)
{
    const size_t n = (size_t)want->n * want->vocab;
    CHECK(got->n == want->n);
    return distance(got->row, want->row, n) / spread(want->row, n);
}

static void work_full(struct service *s)
{
    const struct policy_config own = s->config.kv_cache;
    const bool host = own.evicted == KV_EVICTED_HOST;
    const double most = !host ? 1 : strcmp(own.policy, "cluster_kv") ? 0.3 : 0.9999; /* the last: but for one token */
    struct answer a[5];
    struct seen_logits plain = watch(s, config_of(s, "full", KV_DTYPE_AUTO, 1, 1), &a[0]);
    struct seen_logits full = watch(s, config_of(s, "full", own.dtype, 1, 1), &a[1]);
    struct seen_logits all = watch(s, config_of(s, own.policy, own.dtype, most, 1), &a[2]);
    struct seen_logits part = watch(s, config_of(s, own.policy, own.dtype, 0.1, 0.1), &a[3]);
    struct seen_logits same = watch(s, config_of(s, own.policy, KV_DTYPE_AUTO, 0.1, 0.1), &a[4]);
    const double quantised = off(&full, &plain), whole = off(&all, host ? &plain : &full), some = off(&part, &plain),
                 without = off(&same, &plain);
    printf("\n    %s, %s: 8 bits move logits by %.4f, all of it by %.4f, a part of it by %.4f (%.4f in "
           "the model's dtype) ",
           own.policy, host ? "host" : "free", quantised, whole, some, without);
    CHECK(quantised > 0 && quantised < 0.5);
    if (!host) CHECK(whole == 0); /* the same bits */
    if (host) CHECK(whole > 0 && whole < 0.5);
    CHECK(some > 0 && some < 1.5 * without + quantised && off(&part, &same) > 0);
    CHECK(a[3].bytes_read_per_step < a[1].bytes_read_per_step || host);
    for (int i = 0; i < 5; i++) answer_free(&a[i]);
    free(plain.row), free(full.row), free(all.row), free(part.row), free(same.row);
    CHECK(pools_full(s));
}

static void test_full(void)
{
    for (int i = 0; i < METHODS; i++) {
        struct service s;
        open_method(&s, &ranks, GOLDEN "/gqa_tied", &methods[i]);
        if (!service_follow(&s)) work_full(&s);
        service_stop(&s);
        service_close(&s);
    }
}

/* An engine that begins in the model's dtype has room for what its policies keep beside a cache in 8 bits. */
static void test_room(void)
{
    static const char *const settings[] = {"max_model_len", "200", "kv_cache.policy", "quest", NULL};
    static const char *const policies[] = {"quest", "cluster_kv", "quest"};
    struct config c = service_config(GOLDEN "/heads_9", settings);
    struct engine *e;
    strcpy(c.other_dtypes, "auto,fp8");
    strcpy(c.other_policies, "quest,cluster_kv");
    if (!c.cpu_threads) c.cpu_threads = 1;
    DEMAND(engine_open(&c, ranks.comm, ranks.liveness, &e));
    CHECK(e->resources.kv.format == KV_PLAIN);
    if (ranks.comm->rank) DEMAND(engine_follow(e));
    for (int i = 0; i < 3 && ranks.comm->rank == 0; i++) {
        strcpy(c.kv_cache.policy, policies[i]);
        c.kv_cache.dtype = i < 2 ? KV_DTYPE_FP8 : KV_DTYPE_AUTO;
        CHECK_OK(engine_set_policy(e, &c.kv_cache));
        CHECK(e->resources.kv.format == (i < 2 ? KV_FP8 : KV_PLAIN));
    }
    if (ranks.comm->rank == 0) DEMAND(engine_stop(e));
    engine_close(e);
}

int main(void)
{
    static const struct check_case cases[] = {
        {"ranks, batches and budgets", test_ranks}, {"against the full cache", test_full}, {"room", test_room}, {0}};
    ranks = ranks_open();
    return ranks_run(&ranks, "quantised_lists", cases);
}
