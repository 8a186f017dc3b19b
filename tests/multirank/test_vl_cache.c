/* test_vl_cache - the VL-Cache policy against the oracle's vectors, with the heads dealt over 1 to 4 ranks as the
 * engine deals them: judging rows, integer counts, budgets, windows, kept sets, all independent of the number of ranks.
 *
 * Stage by stage, as the vectors' README asks: budgets from the counts in the file, selections with the k in the file.
 */
#include "tests/policy_fixture.h"

static void open_vl_cache(struct bench *b, const char *rule, double alpha)
{
    struct policy_config config = {.policy = "vl_cache", .budget = {alpha, 0}};
    vl_cache_options_default(&config.vl_cache);
    if (!strcmp(rule, "largest_remainder")) config.vl_cache.rounding = VL_CACHE_LARGEST_REMAINDER;
    if (!strncmp(rule, "water_filled", 12)) config.vl_cache.rounding = VL_CACHE_WATER_FILLED;
    open_policy(b, &config);
}

/* Kept sets of this rank's heads with the k of the file. */
static void check_selection(struct bench *b, const cJSON *budget)
{
    const cJSON *k = vectors_get(budget, "k"), *window = vectors_get(budget, "window"),
                *layers = vectors_get(budget, "layers");
    struct policy_keep keep;
    int *ks = fixture_take(b->f, (size_t)b->L * sizeof *ks);
    size_t lane = 0;
    for (int l = 0; l < b->L; l++) ks[l] = cJSON_GetArrayItem(k, l)->valueint;
    CHECK_OK(b->policy.vt->select(&b->policy, &b->sequence, ks, &keep));
    for (int l = 0; l < b->L; l++) {
        int tokens = ks[l];
        CHECK(vl_cache_window(&b->policy.config.vl_cache, tokens, b->m, b->sequence.budget.share) ==
              cJSON_GetArrayItem(window, l)->valueint);
        for (int h = 0; h < b->shards[l].kv_count; h++, lane++) {
            const cJSON *want = cJSON_GetArrayItem(cJSON_GetArrayItem(layers, l), b->shards[l].kv_first + h);
            CHECK(vectors_kept_ok(want, keep.index + lane * (size_t)keep.stride, tokens, b->m));
        }
    }
}

/* A prompt's whole way: counts through the op and the reduction, budgets, selection; one case of the vectors. */
static void check_policy(const cJSON *inputs, const cJSON *c)
{
    const cJSON *budget, *budgets = vectors_get(c, "budgets"), *kept = vectors_get(c, "kept_per_layer");
    int doubtful = 0;
    const cJSON *row, *item;
    cJSON_ArrayForEach (row, vectors_get(c, "doubtful_per_head")) {
        cJSON_ArrayForEach (item, row) doubtful += item->valueint;
    }
    cJSON_ArrayForEach (budget, budgets) {
        struct bench b = bench_open(inputs, vectors_string(c, "input"));
        int *k = fixture_take(b.f, (size_t)b.L * sizeof *k), *want = fixture_take(b.f, (size_t)b.L * sizeof *want);
        int64_t *counts = fixture_take(b.f, (size_t)b.L * sizeof *counts);
        open_vl_cache(&b, vectors_string(budget, "rule"), vectors_number(budget, "alpha"));
        int tau = b.policy.vt->judging_rows(&b.policy, &b.sequence);
        CHECK(tau == vectors_int(c, "tau") && b.m - tau == vectors_int(c, "first_row"));
        observe(&b, b.m - tau, tau);
        CHECK_OK(b.policy.vt->prefill_end(&b.policy, &b.sequence, k));
        for (int l = 0; l < b.L; l++) counts[l] = (int64_t)cJSON_GetArrayItem(kept, l)->valuedouble;
        vl_cache_budgets(&b.policy.config.vl_cache, counts, b.L, b.m, b.sequence.budget.share, want);
        for (int l = 0; l < b.L; l++) {
            CHECK(want[l] == cJSON_GetArrayItem(vectors_get(budget, "k"), l)->valueint);
            if (!doubtful) CHECK(k[l] == want[l]); /* our own counts, reduced over ranks */
        }
        check_selection(&b, budget);
        bench_close(&b);
    }
}

static void test_policy(void) { each_case("vl_cache", "policy", check_policy); }

static void check_rows(const cJSON *inputs, const cJSON *c)
{
    struct vl_cache_options options;
    struct image_span spans[8];
    const cJSON *item, *max_rows = cJSON_GetObjectItem(c, "max_rows");
    int n = 0, m = vectors_int(c, "m");
    (void)inputs;
    vl_cache_options_default(&options);
    options.min_rows = vectors_int(c, "min_rows");
    options.no_image_rows = vectors_int(c, "no_image_rows");
    options.max_rows = cJSON_IsNumber(max_rows) ? max_rows->valueint : 0;
    cJSON_ArrayForEach (item, vectors_get(c, "spans")) {
        spans[n++] = (struct image_span){cJSON_GetArrayItem(item, 0)->valueint, cJSON_GetArrayItem(item, 1)->valueint};
    }
    CHECK(vl_cache_judging_rows(&options, m, spans, n, vectors_int(c, "last_turn_start")) == vectors_int(c, "tau"));
}

static void test_rows(void) { each_case("vl_cache", "rows", check_rows); }

static void check_budget(const cJSON *inputs, const cJSON *c)
{
    static const char *const keys[] = {"k", "k_largest_remainder", "k_water_filled"}; /* by enum vl_cache_rounding */
    struct vl_cache_options options;
    size_t n;
    double *kept = vectors_list(vectors_get(c, "kept"), &n);
    int64_t counts[64];
    int k[64];
    (void)inputs;
    for (size_t l = 0; l < n; l++) counts[l] = (int64_t)kept[l];
    for (int rule = 0; rule < 3; rule++) {
        vl_cache_options_default(&options);
        options.rounding = rule;
        vl_cache_budgets(&options, counts, (int)n, vectors_int(c, "m"), vectors_number(c, "alpha"), k);
        for (size_t l = 0; l < n; l++) CHECK(k[l] == cJSON_GetArrayItem(vectors_get(c, keys[rule]), (int)l)->valueint);
    }
    free(kept);
}

static void test_budgets(void) { each_case("vl_cache", "budget", check_budget); }

/* ALGORITHMS.md 8.1, by hand: with largest remainders k = 3, 3, 6 and these sets. */
static void test_worked_example(void)
{
    static const int want_k[3] = {3, 3, 6}, sets[3][6] = {{0, 5, 9}, {0, 5, 9}, {0, 2, 4, 5, 8, 9}};
    cJSON *inputs = vectors_load("inputs");
    struct bench b = bench_open(inputs, "worked_81");
    int k[3];
    open_vl_cache(&b, "largest_remainder", 0.4);
    observe(&b, 7, 3);
    CHECK_OK(b.policy.vt->prefill_end(&b.policy, &b.sequence, k));
    struct policy_keep keep;
    size_t lane = 0;
    CHECK_OK(b.policy.vt->select(&b.policy, &b.sequence, k, &keep));
    for (int l = 0; l < 3; l++, lane += (size_t)b.shards[l - 1].kv_count) {
        CHECK(k[l] == want_k[l]);
        for (int i = 0; i < k[l] && b.shards[l].kv_count; i++)
            CHECK(keep.index[lane * (size_t)keep.stride + (size_t)i] == sets[l][i]);
    }
    bench_close(&b);
    cJSON_Delete(inputs);
}

/* The sums that cross ranks: each split's own counts, and their total, are the file's. */
static void check_ranks(const cJSON *inputs, const cJSON *c)
{
    struct bench b = bench_open(inputs, vectors_string(c, "input"));
    int *k = fixture_take(b.f, (size_t)b.L * sizeof *k);
    open_vl_cache(&b, "floor", vectors_number(c, "alpha"));
    int tau = vectors_int(c, "tau");
    observe(&b, b.m - tau, tau);
    CHECK_OK(b.policy.vt->prefill_end(&b.policy, &b.sequence, k));
    for (int l = 0; l < b.L; l++) CHECK(k[l] == cJSON_GetArrayItem(vectors_get(c, "k"), l)->valueint);
    CHECK_OK(comm_same(comm, "budgets", hash_bytes(k, (size_t)b.L * sizeof *k)));
    bench_close(&b);
}

static void test_ranks(void) { each_case("vl_cache", "ranks", check_ranks); }

/* A budget of all tokens is not run at all, whatever the formula would give. */
static void test_whole_budget(void)
{
    cJSON *inputs = vectors_load("inputs");
    struct bench b = bench_open(inputs, "no_image");
    open_vl_cache(&b, "floor", 1.0);
    CHECK(!policy_runs(&b.policy, &b.sequence));
    b.sequence.budget = (struct kv_budget){1, b.m};
    CHECK(!policy_runs(&b.policy, &b.sequence));
    b.sequence.budget = (struct kv_budget){1, b.m - 1};
    CHECK(policy_runs(&b.policy, &b.sequence));
    bench_close(&b);
    cJSON_Delete(inputs);
}

int main(void)
{
    static const struct check_case cases[] = {{"judging rows", test_rows},
                                              {"budgets from counts", test_budgets},
                                              {"worked example 8.1", test_worked_example},
                                              {"counts, budgets and kept sets of every input", test_policy},
                                              {"budgets over ranks", test_ranks},
                                              {"a budget of everything", test_whole_budget},
                                              {0}};
    return policy_tests_run("vl_cache", cases);
}
