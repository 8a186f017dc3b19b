/* test_policies - SnapKV, PyramidKV, Ada-KV's head budgets, StreamingLLM and random against the oracle's vectors and
 * the worked examples of ALGORITHMS.md 8.4, with the heads dealt over 1 to 4 ranks as the engine deals them.
 *
 * Scores and kept sets do not depend on the ranks; budgets of adaptive heads do, since they are shared within a rank.
 */
#include "kvcache/eviction.h"
#include "kvcache/snapkv.h"
#include "tests/policy_fixture.h"

/* Each policy's state begins with what they share. */
static float *scores_of(struct bench *b, int layer)
{
    return eviction_scores((const struct eviction *)b->policy.state, &b->sequence, layer);
}

static struct policy_config config_of(const char *policy, int tokens)
{
    struct policy_config config = {
        .budget = {1, tokens}, .heads_floor = 0.2, .snapkv = {32, 5}, .pyramid_kv = {32, 5, 20}, .streaming_llm = {4}};
    snprintf(config.policy, sizeof config.policy, "%s", policy);
    vl_cache_options_default(&config.vl_cache);
    return config;
}

/* A prompt through the judging layers of the policy that `config` names. */
static void judge(struct bench *b, const struct policy_config *config)
{
    open_policy(b, config);
    int rows = policy_judging_rows(&b->policy, &b->sequence);
    observe(b, b->m - rows, rows);
}

/* ---- rankings by brute force ---- */

struct ranked {
    float score;
    int row, column;
    bool own;
};

/* Best first; equal scores: the lower row, then the lower column. */
static int by_rank(const void *left, const void *right)
{
    const struct ranked *a = left, *b = right;
    if (a->own != b->own) return a->own ? -1 : 1;
    if (a->score != b->score) return a->score > b->score ? -1 : 1;
    return a->row != b->row ? a->row - b->row : a->column - b->column;
}

/* Marks the entries that the rows of score [rows, n] (row stride `stride`) keep: each its best `own`, then the best of
 * all others, `total` in all. kept [rows, n]. */
static void rank_rows(struct fixture *f, const float *score, int stride, int rows, int n, int own, int total,
                      char *kept)
{
    struct ranked *all = fixture_take(f, (size_t)(rows * n) * sizeof *all);
    for (int r = 0; r < rows; r++) {
        struct ranked *row = all + r * n;
        for (int i = 0; i < n; i++) row[i] = (struct ranked){score[r * stride + i], r, i, false};
        qsort(row, (size_t)n, sizeof *row, by_rank);
        for (int i = 0; i < own; i++) row[i].own = true;
    }
    qsort(all, (size_t)(rows * n), sizeof *all, by_rank);
    for (int i = 0; i < total; i++) kept[all[i].row * n + all[i].column] = 1;
}

/* The lists of a layer's lanes are `kept` [heads, m - window] and the window. Returns whether; lane: the first one. */
static bool lists_are(const struct policy_keep *keep, int lane, int heads, const char *kept, int m, int window)
{
    bool same = true;
    for (int h = 0; h < heads; h++) {
        const int32_t *list = keep->index + (int64_t)(lane + h) * keep->stride;
        int n = 0;
        for (int i = 0; i < m; i++) {
            if (i < m - window && !kept[h * (m - window) + i]) continue;
            same &= n < keep->n_keep[lane + h] && list[n] == i;
            n++;
        }
        same &= n == keep->n_keep[lane + h];
    }
    return same;
}

/* All lists of the policy at hand, given k and windows, against rankings of its own scores. */
static void check_lists(struct bench *b, const int *k, const int *window, bool adaptive)
{
    struct policy_keep keep;
    CHECK_OK(b->policy.vt->select(&b->policy, &b->sequence, k, &keep));
    for (int l = 0, lane = 0; l < b->L; l++) {
        int heads = b->shards[l].kv_count, w = window[l] < k[l] ? window[l] : k[l], n = b->m - w, best = k[l] - w;
        int floor_of = (int)floor(0.2 * best + 1e-9);
        char *kept = fixture_take(b->f, (size_t)(heads * n));
        for (int h = 0; h < heads && !adaptive; h++)
            rank_rows(b->f, scores_of(b, l) + h * b->m, b->m, 1, n, 0, best, kept + h * n);
        if (adaptive) rank_rows(b->f, scores_of(b, l), b->m, heads, n, floor_of, heads * best, kept);
        CHECK(lists_are(&keep, lane, heads, kept, b->m, w));
        lane += heads;
    }
}

/* ---- SnapKV ---- */

static bool near(double got, double want) { return fabs(got - want) <= 1e-4 * fabs(want) + 1e-8; }

/* The vectors average over a group's heads where the probe sums. */
static void check_scores(struct bench *b, const cJSON *score, int window)
{
    for (int l = 0; l < b->L; l++)
        for (int h = 0; h < b->shards[l].kv_count; h++) {
            size_t n;
            double *want =
                vectors_list(cJSON_GetArrayItem(cJSON_GetArrayItem(score, l), b->shards[l].kv_first + h), &n);
            const float *got = scores_of(b, l) + (int64_t)h * b->m;
            CHECK(n == (size_t)(b->m > window ? b->m - window : 0));
            for (size_t i = 0; i < n; i++) CHECK(near((double)got[i] * b->G / b->H, want[i]));
            free(want);
        }
}

static void check_kept(struct bench *b, const cJSON *layers, const struct policy_keep *keep)
{
    int lane = 0;
    for (int l = 0; l < b->L; l++)
        for (int h = 0; h < b->shards[l].kv_count; h++, lane++) {
            const cJSON *want = cJSON_GetArrayItem(cJSON_GetArrayItem(layers, l), b->shards[l].kv_first + h);
            CHECK(vectors_kept_ok(want, keep->index + (int64_t)lane * keep->stride, keep->n_keep[lane], b->m));
        }
}

static void check_snapkv(const cJSON *inputs, const cJSON *c)
{
    const cJSON *budget;
    cJSON_ArrayForEach (budget, vectors_get(c, "budgets")) {
        struct bench b = bench_open(inputs, vectors_string(c, "input"));
        struct policy_config config = config_of("snapkv", vectors_int(budget, "cap"));
        struct policy_keep keep;
        int *k = fixture_take(b.f, (size_t)b.L * sizeof *k);
        config.snapkv = (struct snapkv_options){vectors_int(c, "w"), vectors_int(c, "kernel")};
        judge(&b, &config);
        CHECK(policy_judging_rows(&b.policy, &b.sequence) == vectors_int(c, "rows"));
        check_scores(&b, vectors_get(c, "score"), config.snapkv.window);
        CHECK_OK(b.policy.vt->prefill_end(&b.policy, &b.sequence, k));
        for (int l = 0; l < b.L; l++) CHECK(k[l] == vectors_int(budget, "cap"));
        CHECK_OK(b.policy.vt->select(&b.policy, &b.sequence, k, &keep));
        check_kept(&b, vectors_get(budget, "layers"), &keep);
        bench_close(&b);
    }
}

static void test_snapkv(void) { each_case("snapkv", "policy", check_snapkv); }

static void check_worked(const cJSON *inputs, const cJSON *c)
{
    struct bench b = bench_open(inputs, vectors_string(c, "input"));
    struct policy_config config = config_of("snapkv", vectors_int(c, "cap"));
    struct policy_keep keep;
    int k[1];
    size_t n;
    double *score = vectors_list(vectors_get(c, "score"), &n);
    config.snapkv = (struct snapkv_options){vectors_int(c, "w"), vectors_int(c, "kernel")};
    CHECK(b.L == 1 && b.G == 1 && n == (size_t)(b.m - config.snapkv.window));
    judge(&b, &config);
    for (size_t i = 0; i < n && b.shards[0].kv_count; i++) CHECK(near((double)scores_of(&b, 0)[i], score[i]));
    CHECK_OK(b.policy.vt->prefill_end(&b.policy, &b.sequence, k));
    CHECK_OK(b.policy.vt->select(&b.policy, &b.sequence, k, &keep));
    if (b.shards[0].kv_count) CHECK(vectors_kept_ok(c, keep.index, keep.n_keep[0], b.m));
    free(score);
    bench_close(&b);
}

static void test_worked(void) { each_case("snapkv", "worked", check_worked); }

/* ---- PyramidKV ---- */

static void check_caps(const cJSON *inputs, const cJSON *c)
{
    const struct pyramid_kv_options options = {vectors_int(c, "w"), 5, vectors_number(c, "beta")};
    int k[64], L = vectors_int(c, "L");
    (void)inputs;
    CHECK(L <= 64 && L == cJSON_GetArraySize(vectors_get(c, "tokens")));
    pyramid_kv_budgets(&options, vectors_int(c, "cap"), vectors_int(c, "S"), L, k);
    for (int l = 0; l < L; l++) CHECK(k[l] == cJSON_GetArrayItem(vectors_get(c, "tokens"), l)->valueint);
}

static void test_caps(void) { each_case("pyramid_kv", "caps", check_caps); }

/* The whole policy on the input of 600 tokens: 60 a layer on average are 87, 69, 51 and 33 (the vectors' fourth case),
 * by SnapKV's scores. */
static void test_pyramid_kv(void)
{
    static const int want[4] = {87, 69, 51, 33}, window[4] = {32, 32, 32, 32};
    cJSON *inputs = vectors_load("inputs");
    struct bench b = bench_open(inputs, "medium");
    struct policy_config config = config_of("pyramid_kv", 60);
    int k[4];
    judge(&b, &config);
    CHECK(b.L == 4 && policy_judging_rows(&b.policy, &b.sequence) == 32);
    CHECK_OK(b.policy.vt->prefill_end(&b.policy, &b.sequence, k));
    for (int l = 0; l < 4; l++) CHECK(k[l] == want[l]);
    check_lists(&b, k, window, false);
    bench_close(&b);
    cJSON_Delete(inputs);
}

/* ---- Ada-KV ---- */

/* The op's counts for `heads` rows of a table. */
static void check_split(struct fixture *f, struct tensor score, const cJSON *sizes, int B)
{
    const int heads = (int)score.dim[0], n = (int)score.dim[1];
    struct budget_group group = {
        .n_rows = heads, .n_columns = n, .own = (int)floor(0.2 * B + 1e-9), .total = heads * B};
    int32_t *count = fixture_take(f, (size_t)heads * sizeof *count);
    CHECK(cJSON_GetArraySize(sizes) == heads);
    if (!heads) return;
    CHECK_OK(ops_split_budgets(&f->ops, count, score, &group, 1));
    for (int h = 0; h < heads; h++) CHECK(count[h] == cJSON_GetArrayItem(sizes, h)->valueint);
}

/* Rows of a table, some of them, with a gap between rows. */
static struct tensor pick_rows(struct fixture *f, const float *table, int n, const cJSON *rows)
{
    struct tensor score = fixture_2d(f, cJSON_GetArraySize(rows), n, 3);
    const cJSON *row;
    int i = 0;
    cJSON_ArrayForEach (row, rows)
        memcpy(fixture_row(score, i++), table + row->valueint * n, (size_t)n * sizeof(float));
    return score;
}

static void check_pool(const cJSON *inputs, const cJSON *c)
{
    const cJSON *budget, *local, *shape = vectors_get(vectors_get(c, "scores"), "shape");
    struct fixture *f = fixture_open(1, 1);
    float *table = vectors_array(vectors_get(c, "scores"), NULL);
    int heads = cJSON_GetArrayItem(shape, 0)->valueint, n = cJSON_GetArrayItem(shape, 1)->valueint;
    struct tensor all = tensor_2d(table, DTYPE_F32, heads, n);
    (void)inputs;
    cJSON_ArrayForEach (budget, vectors_get(c, "budgets")) {
        check_split(f, all, vectors_get(budget, "sizes"), vectors_int(budget, "B"));
        cJSON_ArrayForEach (local, vectors_get(budget, "local"))
            for (int r = 0; r < vectors_int(local, "T"); r++)
                check_split(f, pick_rows(f, table, n, cJSON_GetArrayItem(vectors_get(local, "kv_heads"), r)),
                            cJSON_GetArrayItem(vectors_get(local, "sizes"), r), vectors_int(budget, "B"));
    }
    free(table);
    fixture_close(f);
}

static void test_pool(void) { each_case("ada_kv", "pool", check_pool); }

/* The vectors' heads compete over all ranks, ours within one: with one rank they are the file's, with more the rankings
 * of each rank's own heads. */
static void check_ada_kv(const cJSON *inputs, const cJSON *c)
{
    struct bench b = bench_open(inputs, vectors_string(c, "input"));
    int window = vectors_int(c, "w"), tokens = vectors_int(c, "B") + window;
    struct policy_config config = config_of("snapkv", tokens);
    struct policy_keep keep;
    int *k = fixture_take(b.f, (size_t)b.L * sizeof *k), *windows = fixture_take(b.f, (size_t)b.L * sizeof *k);
    config.heads = KV_HEADS_ADAPTIVE;
    judge(&b, &config);
    CHECK_OK(b.policy.vt->prefill_end(&b.policy, &b.sequence, k));
    for (int l = 0; l < b.L; l++) {
        CHECK(k[l] == tokens);
        windows[l] = window;
    }
    check_lists(&b, k, windows, true);
    CHECK_OK(b.policy.vt->select(&b.policy, &b.sequence, k, &keep));
    for (int l = 0, lane = 0; l < b.L && comm->size == 1; l++) {
        const cJSON *layer = cJSON_GetArrayItem(vectors_get(c, "layers"), l);
        CHECK(!strcmp(vectors_string(layer, "cut"), "clear"));
        for (int h = 0; h < b.G; h++, lane++) {
            const cJSON *list = cJSON_GetArrayItem(vectors_get(layer, "kept"), h), *item;
            const int32_t *got = keep.index + (int64_t)lane * keep.stride;
            CHECK(keep.n_keep[lane] == cJSON_GetArrayItem(vectors_get(layer, "sizes"), h)->valueint + window);
            cJSON_ArrayForEach (item, list) CHECK(item->valueint == *got++);
        }
    }
    bench_close(&b);
}

static void test_ada_kv(void) { each_case("ada_kv", "policy", check_ada_kv); }

/* Adaptive heads over VL-Cache: each layer's k from its own budgets, shared among its heads beside the window. */
static void test_adaptive_vl_cache(void)
{
    static const char *const names[] = {"uneven", "mha_odd", "medium", "ties"};
    cJSON *inputs = vectors_load("inputs");
    for (int i = 0; i < 4; i++) {
        struct bench b = bench_open(inputs, names[i]);
        struct policy_config config = config_of("vl_cache", 0);
        int *k = fixture_take(b.f, (size_t)b.L * sizeof *k), *window = fixture_take(b.f, (size_t)b.L * sizeof *k);
        config.heads = KV_HEADS_ADAPTIVE, config.budget.share = 0.25;
        judge(&b, &config);
        CHECK_OK(b.policy.vt->prefill_end(&b.policy, &b.sequence, k));
        for (int l = 0; l < b.L; l++) window[l] = vl_cache_window(&config.vl_cache, k[l], b.m, 0.25);
        check_lists(&b, k, window, true);
        CHECK_OK(comm_same(comm, "budgets", hash_bytes(k, (size_t)b.L * sizeof *k)));
        bench_close(&b);
    }
    cJSON_Delete(inputs);
}

/* ---- policies that do not look ---- */

/* A policy over a prompt of m tokens and `layers` layers of 8 KV heads that nobody runs. */
static struct bench plain_open(const struct policy_config *config, int m, int layers)
{
    struct bench b = {.f = fixture_open(1, 1), .L = layers, .H = 8, .G = 8, .m = m, .d = 8};
    b.sequence = (struct policy_sequence){.prompt_tokens = m};
    deal_heads(&b);
    open_policy(&b, config);
    return b;
}

/* All lanes of two layers under either setting of `heads`, which is nothing to a policy that does not score. */
static void check_positions(const cJSON *c, const struct policy_config *config)
{
    struct bench b = plain_open(config, vectors_int(c, "n"), 2);
    struct policy_keep keep;
    int k[2], lanes = b.shards[0].kv_count + b.shards[1].kv_count;
    CHECK_OK(b.policy.vt->prefill_end(&b.policy, &b.sequence, k));
    CHECK_OK(b.policy.vt->select(&b.policy, &b.sequence, k, &keep));
    for (int lane = 0; lane < lanes; lane++)
        CHECK(vectors_kept_ok(c, keep.index + (int64_t)lane * keep.stride, keep.n_keep[lane], b.m));
    bench_close(&b);
}

static void check_streaming_llm(const cJSON *inputs, const cJSON *c)
{
    struct policy_config config = config_of("streaming_llm", vectors_int(c, "cap"));
    (void)inputs;
    config.streaming_llm.sinks = vectors_int(c, "sinks");
    check_positions(c, &config);
    config.heads = KV_HEADS_ADAPTIVE;
    check_positions(c, &config);
}

static void test_streaming_llm(void) { each_case("streaming_llm", "positions", check_streaming_llm); }

static void check_random(const cJSON *inputs, const cJSON *c)
{
    struct policy_config config = config_of("random", vectors_int(c, "k"));
    int layer = vectors_int(c, "layer"), head = vectors_int(c, "head");
    struct bench b = plain_open(&config, vectors_int(c, "n"), layer + 1);
    struct policy_keep keep;
    int *k = fixture_take(b.f, (size_t)b.L * sizeof *k), lane = b.layers[layer].heads.lane;
    (void)inputs;
    b.sequence.seed = strtoull(vectors_string(c, "seed"), NULL, 10);
    CHECK_OK(b.policy.vt->prefill_end(&b.policy, &b.sequence, k));
    CHECK(k[layer] == vectors_int(c, "k"));
    CHECK_OK(b.policy.vt->select(&b.policy, &b.sequence, k, &keep));
    int h = head - b.shards[layer].kv_first;
    if (h >= 0 && h < b.shards[layer].kv_count)
        CHECK(vectors_kept_ok(c, keep.index + (int64_t)(lane + h) * keep.stride, keep.n_keep[lane + h], b.m));
    bench_close(&b);
}

static void test_random(void) { each_case("random", "positions", check_random); }

/* ---- budgets ---- */

/* A budget in tokens is just that many, whatever the division and the product back round to. */
static void test_tokens(void)
{
    for (int m = 1; m <= 2500; m += m < 200 ? 1 : 61)
        for (int tokens = 1; tokens <= m + 1; tokens++)
            CHECK(eviction_tokens((struct kv_budget){1, tokens}, m) == (tokens < m ? tokens : m));
    CHECK(eviction_tokens((struct kv_budget){0.1, 0}, 600) == 60);
    CHECK(eviction_tokens((struct kv_budget){0.1, 0}, 9) == 1);
    CHECK(eviction_tokens((struct kv_budget){0.3, 0}, 10) == 3);
    CHECK(eviction_tokens((struct kv_budget){1, 0}, 7) == 7);
}

int main(void)
{
    static const struct check_case cases[] = {{"budgets in tokens", test_tokens},
                                              {"SnapKV: scores and kept sets of every input", test_snapkv},
                                              {"SnapKV: worked example 8.4", test_worked},
                                              {"PyramidKV: budgets", test_caps},
                                              {"PyramidKV: a prompt", test_pyramid_kv},
                                              {"Ada-KV: head budgets of tables, also within ranks", test_pool},
                                              {"Ada-KV: over SnapKV", test_ada_kv},
                                              {"Ada-KV: over VL-Cache", test_adaptive_vl_cache},
                                              {"StreamingLLM: positions", test_streaming_llm},
                                              {"random: positions", test_random},
                                              {0}};
    return policy_tests_run("policies", cases);
}
