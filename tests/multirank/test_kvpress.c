/* test_kvpress - scores against those of kvpress, an implementation by others, for the same Q, K and V of a layer
 * (tests/tools/make_kvpress_scores.py), with the heads dealt over 1 to 4 ranks: SnapKV, TOVA, H2O's attention, Expected
 * Attention from queries before their rotation; and PyramidKV's budgets.
 *
 * Where a policy sums, a press takes a mean; what a press keeps in any case it scores with its maximum plus 1. */
#include "kvcache/eviction.h"
#include "kvcache/snapkv.h"
#include "tests/policy_fixture.h"

static const cJSON *press_scores(const cJSON *file, const char *press, int kv_head)
{
    return cJSON_GetArrayItem(vectors_get(vectors_get(file, "scores"), press), kv_head);
}

/* The bench with the whole layer in it, and the frequencies of its rotation. */
static struct bench layer_open(const cJSON *file)
{
    struct bench b = bench_open(file, "layer");
    float *frequency = fixture_take(b.f, (size_t)(b.d / 2) * sizeof *frequency);
    for (int i = 0; i < b.d / 2; i++)
        frequency[i] = (float)pow(vectors_number(file, "rope_theta"), -2.0 * i / (double)b.d);
    b.inverse_frequency = frequency;
    put_values(&b, vectors_get(vectors_get(file, "inputs"), "layer"), 0);
    return b;
}

/* Runs the judging rows, rotated to their positions, through the policy. Scores [KV heads of this rank, m]. */
static const float *judge(struct bench *b, const struct policy_config *config)
{
    open_policy(b, config);
    int rows = policy_judging_rows(&b->policy, &b->sequence), first = b->m - rows;
    int32_t *position = fixture_take(b->f, (size_t)rows * sizeof *position);
    struct policy_prefill in = {0, queries(b, 0, first, rows), first};
    for (int i = 0; i < rows; i++) position[i] = first + i;
    CHECK_OK(ops_rope(&b->f->ops, in.q, position, b->inverse_frequency, 1));
    CHECK_OK(b->policy.vt->prefill_layer(&b->policy, &b->sequence, &in));
    return eviction_scores((const struct eviction *)b->policy.state, &b->sequence, 0);
}

/* Keys [first, end) of every head of the rank: scores times `factor`, divided by the rows that see a key where `seen`,
 * against the press's. */
static void compare(struct bench *b, const cJSON *file, const char *press, const float *got, int first, int end,
                    double factor, bool seen)
{
    double worst = 0;
    for (int h = 0; h < b->shards[0].kv_count; h++) {
        size_t n;
        double *want = vectors_list(press_scores(file, press, b->shards[0].kv_first + h), &n);
        CHECK(n == (size_t)b->m);
        for (int i = first; i < end; i++) {
            double mine = (double)got[h * b->m + i] * factor / (seen ? b->m - i : 1);
            worst = fmax(worst, fabs(mine - want[i]) / want[i]);
        }
        free(want);
    }
    if (!(worst <= 1e-4)) fprintf(stderr, "%s: relative distance %g\n", press, worst);
    CHECK(worst <= 1e-4);
}

static void test_snapkv(void)
{
    cJSON *file = vectors_load("kvpress");
    struct bench b = layer_open(file);
    const struct policy_config config = {
        .policy = "snapkv", .budget = {1, 60}, .snapkv = {vectors_int(file, "window"), vectors_int(file, "kernel")}};
    const double rows = config.snapkv.window * (double)b.H / b.G;
    compare(&b, file, "snapkv", judge(&b, &config), 0, b.m - config.snapkv.window, 1 / rows, false);
    bench_close(&b);
    cJSON_Delete(file);
}

/* TOVA's press takes the mean of all heads for all of them: here that of the lanes, where one rank holds them all. */
static void test_tova(void)
{
    cJSON *file = vectors_load("kvpress");
    struct bench b = layer_open(file);
    const struct policy_config config = {.policy = "tova", .budget = {1, 60}};
    const float *got = judge(&b, &config);
    compare(&b, file, "tova_per_kv_head", got, 0, b.m - 1, (double)b.G / b.H, false);
    double *want = vectors_list(press_scores(file, "tova", 0), NULL);
    for (int i = 0; i < b.m - 1 && comm->size == 1; i++) {
        double sum = 0;
        for (int h = 0; h < b.G; h++) sum += (double)got[h * b.m + i] / b.H;
        CHECK(fabs(sum - want[i]) <= 1e-4 * want[i]);
    }
    free(want);
    bench_close(&b);
    cJSON_Delete(file);
}

/* The press divides by the number of rows that see a key; H2O does not. */
static void test_h2o(void)
{
    cJSON *file = vectors_load("kvpress");
    struct bench b = layer_open(file);
    const struct policy_config config = {.policy = "h2o", .budget = {1, 60}, .h2o = {0.5}};
    compare(&b, file, "observed", judge(&b, &config), 0, b.m, (double)b.G / b.H, true);
    bench_close(&b);
    cJSON_Delete(file);
}

static void check_expected(const cJSON *file, const char *press, struct expected_attention_options options)
{
    struct bench b = layer_open(file);
    const struct policy_config config = {
        .policy = "expected_attention", .budget = {1, 60}, .expected_attention = options};
    const float *got = judge(&b, &config);
    compare(&b, file, press, got, options.sinks, b.m, 1, false);
    for (int h = 0; h < b.shards[0].kv_count; h++)
        for (int i = 0; i < options.sinks; i++) CHECK(got[h * b.m + i] == INFINITY);
    bench_close(&b);
}

static void test_expected(void)
{
    cJSON *file = vectors_load("kvpress");
    check_expected(file, "expected", (struct expected_attention_options){.sinks = 4, .future = 512});
    check_expected(file, "expected_epsilon",
                   (struct expected_attention_options){.sinks = 4, .future = 512, .epsilon = 0.01});
    check_expected(file, "expected_near", (struct expected_attention_options){.future = 5});
    cJSON_Delete(file);
}

/* The press counts the window out of the mean and keeps no room for it, rounds each layer by itself, and falls back on
 * equal budgets where the last layer's would be smaller than the window. */
static void test_pyramid_kv(void)
{
    cJSON *file = vectors_load("kvpress");
    const cJSON *c;
    int compared = 0;
    cJSON_ArrayForEach (c, vectors_get(file, "budgets")) {
        const cJSON *want = vectors_get(c, "budgets");
        const int L = vectors_int(c, "layers"), m = vectors_int(c, "tokens"), window = vectors_int(c, "window");
        const int cap = (int)floor(m * (1 - vectors_number(c, "ratio")) + 0.5) + window;
        const struct pyramid_kv_options options = {window, 5, vectors_number(c, "beta")};
        int k[64];
        if (cJSON_GetArrayItem(want, 0)->valueint == cJSON_GetArrayItem(want, L - 1)->valueint) continue;
        pyramid_kv_budgets(&options, cap, m, L, k);
        for (int l = 0; l < L; l++) CHECK(abs(k[l] - window - cJSON_GetArrayItem(want, l)->valueint) <= L);
        compared++;
    }
    CHECK(compared >= 3);
    cJSON_Delete(file);
}

int main(void)
{
    static const struct check_case cases[] = {{"SnapKV", test_snapkv},
                                              {"TOVA", test_tova},
                                              {"H2O and ObservedAttention", test_h2o},
                                              {"Expected Attention", test_expected},
                                              {"PyramidKV: budgets", test_pyramid_kv},
                                              {0}};
    return policy_tests_run("kvpress", cases);
}
