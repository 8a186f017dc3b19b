/* test_pyramid_engine - PyramidInfer in the engine, on the demo model: without a decay it is the full cache to the last
 * bit, a prompt's answer does not depend on what it is batched with, and the number of ranks changes nothing. */
#include "kvcache/pyramid_infer.h"
#include "tests/engine_fixture.h"

static struct ranks ranks;

#define PYRAMID(key) "kv_cache.pyramid_infer." key
static const char *const settings[] = {"kv_cache.policy",
                                       "pyramid_infer",
                                       "max_model_len",
                                       "512",
                                       "max_num_batched_tokens",
                                       "700",
                                       PYRAMID("min_context"),
                                       "8",
                                       NULL};

static const char *model = DEMO, *dtype = "auto";

static void on_all_ranks(void (*work)(struct service *s))
{
    const char *all[32] = {"kv_cache.dtype", dtype};
    struct service s;
    for (int i = 0; settings[i]; i++) all[2 + i] = settings[i];
    service_open(&s, &ranks, model, all);
    if (!service_follow(&s)) work(&s);
    service_stop(&s);
    struct engine_counters c = service_counters(&s);
    CHECK(c.pages_free == c.pages_total && c.pages_total > 0);
    service_close(&s);
}

static const struct kv_budget mixed_budgets[5] = {{0.5, 0}, {0.3, 0}, {1, 0}, {0.7, 0}, {1, 20}};

static void compare(const struct answer *a, const struct answer *b, const char *what)
{
    for (int i = 0; i < MIXED_REQUESTS; i++) {
        bool same = answers_equal(&a[i], &b[i]) && !memcmp(a[i].kept, b[i].kept, sizeof a[i].kept);
        if (!same) fprintf(stderr, "%s: request %d is answered otherwise\n", what, i);
        CHECK(same);
    }
}

static void free_all(struct answer *a)
{
    for (int i = 0; i < MIXED_REQUESTS; i++) answer_free(&a[i]);
}

/* ---- without a decay ---- */

static struct seen_logits watch(struct service *s, const struct policy_config *config)
{
    struct seen_logits seen = {0};
    struct answer a;
    struct request r = request_random(3, 260, engine_dims(s->engine)->vocab_size, 40);
    r.budget = (struct kv_budget){0.5, 0};
    CHECK_OK(engine_set_policy(s->engine, config));
    service_watch(s, &seen);
    service_submit(s, &r, &a);
    service_run(s);
    service_watch(s, NULL);
    CHECK(a.done && a.kept[9] == 260 && seen.n >= 40);
    answer_free(&a);
    return seen;
}

static void work_no_decay(struct service *s)
{
    struct policy_config config = s->config.kv_cache;
    config.pyramid_infer.target_ratio = 0;
    config.pyramid_infer.ratio = 1;
    config.pyramid_infer.generation_block = 0;
    struct seen_logits got = watch(s, &config);
    strcpy(config.policy, "full");
    struct seen_logits want = watch(s, &config);
    CHECK(got.n == want.n && !memcmp(got.row, want.row, (size_t)want.n * want.vocab * sizeof(float)));
    CHECK_OK(engine_set_policy(s->engine, &s->config.kv_cache));
    free(got.row);
    free(want.row);
}

static void test_no_decay(void) { on_all_ranks(work_no_decay); }

/* ---- batches and ranks ---- */

static void check_kept(const struct answer *a)
{
    double mean = 0, decay[10];
    int stored[10];
    struct pyramid_shape shape = {.tokens = 300, .n_layers = 10, .interval = 2, .min_context = 8, .decay = decay};
    pyramid_infer_decay(10, decay);
    double rho = 0.2, r = 0.8, want = pyramid_infer_solve(&shape, 0.7, &rho, &r); /* request 3 */
    pyramid_infer_schedule(&shape, rho, r, stored, NULL, NULL);
    for (int l = 0; l < 10; l++) {
        CHECK(a[3].kept[l] == stored[l]);
        mean += a[3].kept[l] / 3000.0;
    }
    CHECK(fabs(mean - want) < 1e-12 && fabs(mean - 0.7) <= PYRAMID_INFER_WITHIN);
    for (int l = 0; l < 10; l++) CHECK(a[0].kept[l] == 1 && a[1].kept[l] == 2 && a[7].kept[l] == 211);
    CHECK(a[5].kept[9] < 150 && a[6].kept[9] < 90);
}

static void one_rank(struct answer *a)
{
    struct ranks alone = {.liveness = ranks.liveness};
    struct service s;
    DEMAND(comm_open("self", &alone.comm));
    service_open(&s, &alone, model, settings);
    service_ask_mixed(&s, mixed_budgets, a, true);
    service_close(&s);
    comm_close(alone.comm);
}

static void work_mixed(struct service *s)
{
    struct answer want[MIXED_REQUESTS], got[MIXED_REQUESTS];
    one_rank(want);
    if (!strcmp(model, DEMO)) check_kept(want);
    service_ask_mixed(s, mixed_budgets, got, false);
    compare(got, want, "in a batch");
    free_all(got);
    free_all(want);
}

static void test_mixed(void) { on_all_ranks(work_mixed); }

/* Heads that do not divide, and KV heads that stand on several ranks: each is counted once. */
static void test_uneven(void)
{
    static const char *const models[] = {GOLDEN "/heads_9", GOLDEN "/heads_14_one_kv", GOLDEN "/heads_7"};
    for (int i = 0; i < (SLOW_BUILD ? 1 : 3); i++) {
        model = models[i];
        on_all_ranks(work_mixed);
    }
    model = DEMO;
}

/* ---- generated tokens ---- */

/* Free pages of rank 0 some way into a long answer. */
static int64_t pages_free_after(struct service *s, int block, int steps)
{
    struct policy_config config = s->config.kv_cache;
    struct answer a;
    int active;
    config.pyramid_infer.generation_block = block;
    CHECK_OK(engine_set_policy(s->engine, &config));
    struct request r = request_random(9, 100, engine_dims(s->engine)->vocab_size, 300);
    r.budget = (struct kv_budget){0.6, 0};
    service_submit(s, &r, &a);
    for (int i = 0; i < steps; i++) DEMAND(engine_step(s->engine, &active));
    int64_t pages = service_counters(s).pages_free;
    CHECK_OK(engine_abort_all(s->engine));
    service_run(s);
    CHECK(a.done && a.n_tokens > steps - 5);
    answer_free(&a);
    return pages;
}

/* Pages come back while text is generated: in the last layer 1 of 16 tokens stays, in the first 14. A page of codes
 * holds four times as many. */
static void work_thinning(struct service *s)
{
    int lanes = 0;
    for (int l = 0; l < 10; l++) lanes += model_layers(s->engine->resources.model)[l].heads.n_kv_heads;
    const int64_t all = pages_free_after(s, 0, 250), thinned = pages_free_after(s, 16, 250);
    const bool plain = s->engine->resources.kv.format == KV_PLAIN;
    CHECK(2 * thinned >= 2 * all + (plain ? 4 : 1) * lanes);
    CHECK_OK(engine_set_policy(s->engine, &s->config.kv_cache));
}

static void test_thinning(void)
{
    static const char *const dtypes[] = {"auto", "int8", "fp8"};
    for (int i = 0; i < 3; i++) {
        dtype = dtypes[i];
        on_all_ranks(work_thinning);
    }
    dtype = "auto";
}

int main(void)
{
    static const struct check_case cases[] = {{"no decay is the full cache", test_no_decay},
                                              {"mixed prompts in a batch", test_mixed},
                                              {"uneven heads", test_uneven},
                                              {"pages of generated tokens", test_thinning},
                                              {0}};
    ranks = ranks_open();
    return ranks_run(&ranks, "pyramid_engine", cases);
}
