/* test_expected - Expected Attention and TOVA against the oracle's vectors, with the heads dealt over 1 to 4 ranks; and
 * what Expected Attention keeps beside its best tokens: sinks and a window, also with adaptive heads. */
#include "kvcache/eviction.h"
#include "tests/policy_fixture.h"

static float *scores_of(struct bench *b, int layer)
{
    return eviction_scores((const struct eviction *)b->policy.state, &b->sequence, layer);
}

static struct policy_config config_of(const char *policy, int tokens)
{
    struct policy_config config = {
        .budget = {1, tokens}, .heads_floor = 0.2, .expected_attention = {.sinks = 4, .future = 512}};
    snprintf(config.policy, sizeof config.policy, "%s", policy);
    return config;
}

static void judge(struct bench *b, const struct policy_config *config)
{
    open_policy(b, config);
    int rows = policy_judging_rows(&b->policy, &b->sequence);
    observe(b, b->m - rows, rows);
}

static bool near(double got, double want) { return fabs(got - want) <= 1e-4 * fabs(want) + 1e-8; }

/* ---- Expected Attention ---- */

/* The vectors take queries as they are, and all of the given rows. */
static void check_core(const cJSON *inputs, const cJSON *c)
{
    const cJSON *input = vectors_get(vectors_get(inputs, "inputs"), vectors_string(c, "input"));
    struct bench b = bench_open(inputs, vectors_string(c, "input"));
    int l = vectors_int(c, "layer"), tokens = vectors_int(c, "k"), *k = fixture_take(b.f, (size_t)b.L * sizeof *k);
    struct policy_config config = config_of("expected_attention", tokens);
    struct policy_keep keep;
    config.expected_attention =
        (struct expected_attention_options){.future = 1, .max_rows = b.m - vectors_int(c, "first_row")};
    put_values(&b, input, l);
    judge(&b, &config);
    CHECK_OK(b.policy.vt->prefill_end(&b.policy, &b.sequence, k));
    CHECK_OK(b.policy.vt->select(&b.policy, &b.sequence, k, &keep));
    for (int h = 0; h < b.shards[l].kv_count; h++) {
        size_t n;
        int lane = b.layers[l].heads.lane + h, head = b.shards[l].kv_first + h;
        double *want = vectors_list(cJSON_GetArrayItem(vectors_get(c, "scores"), head), &n);
        CHECK(n == (size_t)b.m && keep.n_keep[lane] == tokens);
        for (size_t i = 0; i < n; i++) CHECK(near((double)scores_of(&b, l)[h * b.m + (int)i], want[i]));
        CHECK(vectors_kept_ok(cJSON_GetArrayItem(vectors_get(c, "heads"), head),
                              keep.index + (int64_t)lane * keep.stride, keep.n_keep[lane], b.m));
        free(want);
    }
    bench_close(&b);
}

static void test_core(void) { each_case("expected_attention", "core", check_core); }

/* Whether a lane's list is ascending, begins with `sinks` tokens from 0 on and ends with the newest `window`. */
static bool list_holds(const int32_t *list, int n, int sinks, int window, int m)
{
    bool good = n >= sinks + window;
    for (int i = 1; i < n; i++) good &= list[i] > list[i - 1];
    for (int i = 0; i < sinks && i < n; i++) good &= list[i] == i;
    for (int i = 0; i < window && i < n; i++) good &= list[n - 1 - i] == m - 1 - i;
    return good;
}

/* Sinks and window stay in every lane, budgets are spent, and no lane is left without a token. */
static void check_lists(const cJSON *inputs, const char *name, int tokens, int window, int heads)
{
    struct bench b = bench_open(inputs, name);
    struct policy_config config = config_of("expected_attention", tokens);
    int *k = fixture_take(b.f, (size_t)b.L * sizeof *k), room = tokens > window ? tokens - window : 0;
    int sinks = room < 4 ? room : 4;
    struct policy_keep keep;
    config.heads = heads, config.expected_attention.window = window;
    config.expected_attention.max_rows = b.q_rows - b.extra;
    put_values(&b, vectors_get(vectors_get(inputs, "inputs"), name), 0);
    judge(&b, &config);
    CHECK_OK(b.policy.vt->prefill_end(&b.policy, &b.sequence, k));
    CHECK_OK(b.policy.vt->select(&b.policy, &b.sequence, k, &keep));
    for (int l = 0, lane = 0; l < b.L; l++) {
        int total = 0, held = window < tokens ? window : tokens;
        for (int h = 0; h < b.shards[l].kv_count; h++, lane++) {
            total += keep.n_keep[lane];
            CHECK(keep.n_keep[lane] >= 1);
            CHECK(list_holds(keep.index + (int64_t)lane * keep.stride, keep.n_keep[lane], sinks, held, b.m));
            if (heads == KV_HEADS_EQUAL) CHECK(keep.n_keep[lane] == tokens);
        }
        CHECK(total == b.shards[l].kv_count * tokens);
    }
    bench_close(&b);
}

static void test_lists(void)
{
    static const int tokens[] = {1, 3, 4, 5, 12, 40}, windows[] = {0, 1, 6};
    cJSON *inputs = vectors_load("inputs");
    for (int i = 0; i < 6; i++)
        for (int w = 0; w < 3; w++) {
            check_lists(inputs, "uneven", tokens[i], windows[w], KV_HEADS_EQUAL);
            check_lists(inputs, "uneven", tokens[i], windows[w], KV_HEADS_ADAPTIVE);
        }
    cJSON_Delete(inputs);
}

/* Prompts shorter than the sinks, and rows: the whole prompt, or as many as the option says. */
static void test_short(void)
{
    cJSON *inputs = vectors_load("inputs");
    struct bench b = bench_open(inputs, "two_tokens");
    struct policy_config config = config_of("expected_attention", 1);
    struct policy_keep keep;
    int k[2];
    judge(&b, &config);
    CHECK(policy_judging_rows(&b.policy, &b.sequence) == 2);
    CHECK_OK(b.policy.vt->prefill_end(&b.policy, &b.sequence, k));
    CHECK_OK(b.policy.vt->select(&b.policy, &b.sequence, k, &keep));
    for (int lane = 0; lane < b.kv.lanes_per_slot; lane++) CHECK(keep.n_keep[lane] == 1);
    b.policy.config.expected_attention.max_rows = 512;
    b.sequence.prompt_tokens = 9000;
    CHECK(policy_judging_rows(&b.policy, &b.sequence) == 512);
    b.policy.config.expected_attention.max_rows = 0;
    CHECK(policy_judging_rows(&b.policy, &b.sequence) == 9000);
    b.sequence.prompt_tokens = 2;
    bench_close(&b);
    cJSON_Delete(inputs);
}

/* ---- TOVA ---- */

static void check_tova(const cJSON *inputs, const cJSON *c)
{
    struct bench b = bench_open(inputs, vectors_string(c, "input"));
    struct policy_config config = config_of("tova", vectors_int(c, "cap"));
    struct policy_keep keep;
    int *k = fixture_take(b.f, (size_t)b.L * sizeof *k), lane = 0;
    judge(&b, &config);
    CHECK(policy_judging_rows(&b.policy, &b.sequence) == 1);
    CHECK_OK(b.policy.vt->prefill_end(&b.policy, &b.sequence, k));
    CHECK_OK(b.policy.vt->select(&b.policy, &b.sequence, k, &keep));
    for (int l = 0; l < b.L; l++)
        for (int h = 0; h < b.shards[l].kv_count; h++, lane++) {
            const cJSON *layer = cJSON_GetArrayItem(vectors_get(c, "layers"), l);
            const cJSON *want = cJSON_GetArrayItem(vectors_get(layer, "per_kv_head"), b.shards[l].kv_first + h);
            CHECK(vectors_kept_ok(want, keep.index + (int64_t)lane * keep.stride, keep.n_keep[lane], b.m));
        }
    bench_close(&b);
}

static void test_tova(void) { each_case("tova", "policy", check_tova); }

int main(void)
{
    static const struct check_case cases[] = {{"Expected Attention: scores and kept sets", test_core},
                                              {"Expected Attention: sinks, window, adaptive heads", test_lists},
                                              {"Expected Attention: short prompts, judging rows", test_short},
                                              {"TOVA: kept sets of every input", test_tova},
                                              {0}};
    return policy_tests_run("expected", cases);
}
