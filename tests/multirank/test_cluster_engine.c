/* test_cluster_engine - ClusterKV with a list for each query head, in the engine: answers do not depend on the batch or
 * the number of ranks, at any budget and length; the full cache where everything is attended to; the shared lists where
 * a KV head has one query head; and what a step is said to read. */
#include "tests/engine_fixture.h"

static struct ranks ranks;

#define CLUSTER(key) "kv_cache.cluster_kv." key
static const char *const settings[] = {"kv_cache.policy",
                                       "cluster_kv",
                                       CLUSTER("group"),
                                       "query_head",
                                       CLUSTER("tokens_per_cluster"),
                                       "12",
                                       CLUSTER("window"),
                                       "24",
                                       CLUSTER("window_clusters"),
                                       "3",
                                       CLUSTER("full_layers"),
                                       "1",
                                       CLUSTER("sinks"),
                                       "4",
                                       "max_model_len",
                                       "512",
                                       NULL};

static const char *model;

static void on_all_ranks(const char *of, void (*work)(struct service *s))
{
    struct service s;
    model = of;
    service_open(&s, &ranks, model, settings);
    if (!service_follow(&s)) work(&s);
    service_close(&s);
}

/* ---- batches and ranks ---- */

/* Among them one token, and all of them. */
static const struct kv_budget budgets[5] = {{0.5, 0}, {1, 0}, {1, 1}, {0.05, 0}, {1, 20}};

static void one_rank(struct answer a[MIXED_REQUESTS])
{
    struct ranks alone = {.liveness = ranks.liveness};
    struct service s;
    DEMAND(comm_open("self", &alone.comm));
    service_open(&s, &alone, model, settings);
    service_ask_mixed(&s, budgets, a, true);
    service_close(&s);
    comm_close(alone.comm);
}

static void work_mixed(struct service *s)
{
    struct answer want[MIXED_REQUESTS], got[MIXED_REQUESTS];
    one_rank(want);
    service_ask_mixed(s, budgets, got, false);
    for (int i = 0; i < MIXED_REQUESTS; i++) {
        const bool same = answers_equal(&got[i], &want[i]);
        if (!same) fprintf(stderr, "request %d is answered otherwise\n", i);
        CHECK(same && got[i].bytes_read_per_step == want[i].bytes_read_per_step);
        answer_free(&got[i]), answer_free(&want[i]);
    }
}

/* Three query heads a KV head, on KV heads that do not divide over the ranks; and seven alone. */
static void test_mixed(void)
{
    on_all_ranks(GOLDEN "/heads_9", work_mixed);
    on_all_ranks(GOLDEN "/heads_7", work_mixed);
}

/* ---- the logits ---- */

/* Logits of a prompt and the 60 tokens that follow, given tokens, so that runs do not part. */
static struct seen_logits watch(struct service *s, const char *policy, int group, int length, struct kv_budget budget,
                                double *read)
{
    struct seen_logits seen = {0};
    struct answer a;
    struct policy_config config = s->config.kv_cache;
    snprintf(config.policy, sizeof config.policy, "%s", policy);
    config.budget = budget;
    config.cluster_kv.group = group;
    struct request r = request_random(3, length, engine_dims(s->engine)->vocab_size, 60);
    r.budget = budget;
    r.forced = take(60 * sizeof *r.forced);
    r.n_forced = 60;
    for (int i = 0; i < 60; i++) r.forced[i] = 5 + 17 * i % 40;
    CHECK_OK(engine_set_policy(s->engine, &config));
    service_watch(s, &seen);
    service_submit(s, &r, &a);
    service_run(s);
    service_watch(s, NULL);
    CHECK(a.done && seen.n >= 60);
    *read = a.bytes_read_per_step;
    answer_free(&a);
    return seen;
}

static bool same_logits(struct seen_logits a, struct seen_logits b)
{
    const bool same = a.n == b.n && !memcmp(a.row, b.row, (size_t)a.n * a.vocab * sizeof(float));
    free(a.row);
    free(b.row);
    return same;
}

/* Three query heads a KV head, and five layers, of which the first is read whole. */
static void work_shared(struct service *s)
{
    static const int lengths[] = {260, 3};
    for (int i = 0; i < 2; i++) {
        const struct kv_budget all = {1, 0}, one = {1, 1}, tenth = {0.1, 0};
        double full, own, max;
        CHECK(same_logits(watch(s, "full", CLUSTER_KV_QUERY_HEAD, lengths[i], all, &full),
                          watch(s, "cluster_kv", CLUSTER_KV_QUERY_HEAD, lengths[i], all, &own)));
        CHECK(fabs(own / full - (1 + 4 * 3) / 5.0) < 1e-9); /* each query head its whole lane */
        CHECK(!same_logits(watch(s, "cluster_kv", CLUSTER_KV_MAX, lengths[i], i ? one : tenth, &max),
                           watch(s, "cluster_kv", CLUSTER_KV_QUERY_HEAD, lengths[i], i ? one : tenth, &own)));
        CHECK(own > 1.5 * max && own < 3 * max && max < full);
        CHECK(!same_logits(watch(s, "full", CLUSTER_KV_MAX, lengths[i], all, &full),
                           watch(s, "cluster_kv", CLUSTER_KV_QUERY_HEAD, lengths[i], one, &own)));
    }
}

static void test_shared(void) { on_all_ranks(GOLDEN "/heads_9", work_shared); }

static void work_alone(struct service *s)
{
    static const struct kv_budget some[] = {{0.2, 0}, {1, 1}, {0.9999, 0}, {1, 0}};
    for (int i = 0; i < 4; i++) {
        double max, mean, own;
        struct seen_logits want = watch(s, "cluster_kv", CLUSTER_KV_MAX, 160, some[i], &max), copy = want;
        copy.row = copy_of(want.row, (size_t)want.n * want.vocab * sizeof *want.row);
        CHECK(same_logits(want, watch(s, "cluster_kv", CLUSTER_KV_QUERY_HEAD, 160, some[i], &own)));
        CHECK(same_logits(copy, watch(s, "cluster_kv", CLUSTER_KV_MEAN, 160, some[i], &mean)));
        CHECK(own == max && mean == max && own > 0);
    }
}

static void test_alone(void) { on_all_ranks(GOLDEN "/heads_7", work_alone); }

int main(void)
{
    static const struct check_case cases[] = {{"mixed prompts and budgets in a batch", test_mixed},
                                              {"against shared lists and the full cache", test_shared},
                                              {"KV heads of one query head", test_alone},
                                              {0}};
    ranks = ranks_open();
    return ranks_run(&ranks, "cluster_engine", cases);
}
