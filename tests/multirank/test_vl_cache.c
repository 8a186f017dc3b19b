/* test_vl_cache - the VL-Cache policy against the oracle's vectors, with the heads dealt over 1 to 4 ranks as the
 * engine deals them: judging rows, integer counts, budgets, windows, kept sets, all independent of the number of ranks.
 *
 * Stage by stage, as the vectors' README asks: budgets from the counts in the file, selections with the k in the file.
 */
#include "kvcache/vl_cache.h"
#include "parallel/comm.h"
#include "parallel/shard.h"
#include "tests/ops_fixture.h"
#include "tests/vectors.h"

static struct comm *comm;

/* One input of the vectors, its heads dealt to this rank: a cache that holds the prompt, a policy over it. */
struct bench {
    struct fixture *f;
    struct kv_view kv;
    struct policy_layer *layers;
    struct shard_heads *shards;
    struct policy policy;
    struct policy_sequence sequence;
    struct image_span *spans;
    int L, H, G, m, d, q_first, q_rows;
    float *Q, *K;
    void *state;
};

static void read_spans(struct bench *b, const cJSON *list)
{
    const cJSON *item;
    b->sequence.n_spans = cJSON_GetArraySize(list);
    struct image_span *spans = fixture_take(b->f, (size_t)b->sequence.n_spans * sizeof *spans);
    int i = 0;
    cJSON_ArrayForEach (item, list) {
        spans[i++] = (struct image_span){cJSON_GetArrayItem(item, 0)->valueint, cJSON_GetArrayItem(item, 1)->valueint};
    }
    b->sequence.spans = b->spans = spans;
}

static void deal_heads(struct bench *b)
{
    int lane = 0;
    b->layers = fixture_take(b->f, (size_t)b->L * sizeof *b->layers);
    b->shards = fixture_take(b->f, (size_t)b->L * sizeof *b->shards);
    for (int l = 0; l < b->L; l++) {
        struct shard_heads s = b->shards[l] = shard_kv_heads(b->G, comm->size, comm->rank, l);
        b->layers[l] = (struct policy_layer){
            {s.kv_count * (b->H / b->G), s.kv_count, b->d, lane, 1.0f / sqrtf((float)b->d)}, s.counted};
        lane += s.kv_count;
    }
    int pages = (b->m + 15) / 16;
    b->kv = fixture_cache(b->f, 1, lane, pages, lane * pages, 16, b->d);
}

/* Appends the prompt's keys of layer l (values stay zero: nothing here reads them). */
static void append_keys(struct bench *b, int l, int n_keys)
{
    int n = b->shards[l].kv_count;
    struct tensor k =
        tensor_3d(fixture_take(b->f, (size_t)(b->m * n * b->d) * sizeof(float)), DTYPE_F32, b->m, n, b->d);
    struct tensor v = tensor_3d(fixture_take(b->f, tensor_bytes(k)), DTYPE_F32, b->m, n, b->d);
    int32_t slot = 0, cu[2] = {0, b->m};
    struct seq_batch batch = {1, b->m, &slot, cu, &slot, cu};
    for (int i = 0; i < b->m; i++)
        for (int h = 0; h < n; h++)
            memcpy((float *)k.data + ((size_t)i * (size_t)n + (size_t)h) * (size_t)b->d,
                   b->K +
                       (((size_t)l * (size_t)b->G + (size_t)(b->shards[l].kv_first + h)) * (size_t)n_keys + (size_t)i) *
                           (size_t)b->d,
                   (size_t)b->d * sizeof(float));
    CHECK_OK(ops_kv_append(&b->f->ops, &b->kv, &b->layers[l].heads, k, v, &batch));
}

static struct policy_env bench_env(struct bench *b)
{
    return (struct policy_env){.ops = &b->f->ops,
                               .comm = comm,
                               .kv = &b->kv,
                               .layers = b->layers,
                               .n_layers = b->L,
                               .g_n_heads = b->H,
                               .max_context = b->m,
                               .max_prompt_tokens = b->m};
}

static void open_policy(struct bench *b, const char *rule, double alpha)
{
    struct policy_config config = {.policy = "vl_cache", .budget = {alpha, 0}};
    struct policy_env env = bench_env(b);
    struct arena arena;
    vl_cache_options_default(&config.vl_cache);
    if (!strcmp(rule, "largest_remainder")) config.vl_cache.rounding = VL_CACHE_LARGEST_REMAINDER;
    if (!strncmp(rule, "water_filled", 12)) config.vl_cache.rounding = VL_CACHE_WATER_FILLED;
    arena_measure(&arena);
    CHECK_OK(policy_open(&b->policy, &config, &env, &arena));
    policy_close(&b->policy);
    size_t bytes = arena.used;
    arena_init(&arena, b->state = fixture_take(b->f, bytes), bytes);
    CHECK_OK(policy_open(&b->policy, &config, &env, &arena));
    CHECK(arena.used == bytes);
    b->sequence.budget = config.budget;
}

static struct bench bench_open(const cJSON *inputs, const char *name)
{
    struct bench b = {.f = fixture_open(1, 1)};
    const cJSON *x = vectors_get(vectors_get(inputs, "inputs"), name);
    b.L = vectors_int(x, "L"), b.H = vectors_int(x, "H"), b.G = vectors_int(x, "G");
    b.m = vectors_int(x, "m"), b.d = vectors_int(x, "d"), b.q_first = vectors_int(x, "q_first");
    int n_keys = b.m + vectors_int(x, "extra");
    b.q_rows = n_keys - b.q_first;
    b.Q = vectors_array(vectors_get(x, "Q"), NULL);
    b.K = vectors_array(vectors_get(x, "K"), NULL);
    b.sequence = (struct policy_sequence){.prompt_tokens = b.m, .last_turn_start = vectors_int(x, "last_turn_start")};
    read_spans(&b, vectors_get(x, "spans"));
    deal_heads(&b);
    for (int l = 0; l < b.L; l++) append_keys(&b, l, n_keys);
    return b;
}

static void bench_close(struct bench *b)
{
    policy_close(&b->policy);
    free(b->Q);
    free(b->K);
    fixture_close(b->f);
}

/* The judging rows' queries of this rank's heads in layer l. */
static struct tensor queries(struct bench *b, int l, int first, int rows)
{
    int n = b->layers[l].heads.n_heads, h0 = b->shards[l].kv_first * (b->H / b->G);
    struct tensor q =
        tensor_3d(fixture_take(b->f, (size_t)(rows * n * b->d) * sizeof(float)), DTYPE_F32, rows, n, b->d);
    for (int i = 0; i < rows; i++)
        for (int h = 0; h < n; h++)
            memcpy((float *)q.data + ((size_t)i * (size_t)n + (size_t)h) * (size_t)b->d,
                   b->Q + (((size_t)l * (size_t)b->H + (size_t)(h0 + h)) * (size_t)b->q_rows +
                           (size_t)(first + i - b->q_first)) *
                              (size_t)b->d,
                   (size_t)b->d * sizeof(float));
    return q;
}

static void observe(struct bench *b, int first, int rows)
{
    for (int l = 0; l < b->L; l++) {
        struct policy_prefill in = {l, queries(b, l, first, rows), first};
        CHECK_OK(b->policy.vt->prefill_layer(&b->policy, &b->sequence, &in));
    }
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
        open_policy(&b, vectors_string(budget, "rule"), vectors_number(budget, "alpha"));
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

static void each_case(const char *kind, void (*check)(const cJSON *inputs, const cJSON *c))
{
    cJSON *file = vectors_load("vl_cache"), *inputs = vectors_load("inputs");
    const cJSON *c;
    int n = 0;
    cJSON_ArrayForEach (c, vectors_get(file, "cases")) {
        if (strcmp(vectors_string(c, "kind"), kind)) continue;
        check(inputs, c);
        n++;
    }
    CHECK(n > 0);
    cJSON_Delete(file);
    cJSON_Delete(inputs);
}

static void test_policy(void) { each_case("policy", check_policy); }

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

static void test_rows(void) { each_case("rows", check_rows); }

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

static void test_budgets(void) { each_case("budget", check_budget); }

/* ALGORITHMS.md 8.1, by hand: with largest remainders k = 3, 3, 6 and these sets. */
static void test_worked_example(void)
{
    static const int want_k[3] = {3, 3, 6}, sets[3][6] = {{0, 5, 9}, {0, 5, 9}, {0, 2, 4, 5, 8, 9}};
    cJSON *inputs = vectors_load("inputs");
    struct bench b = bench_open(inputs, "worked_81");
    int k[3];
    open_policy(&b, "largest_remainder", 0.4);
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
    open_policy(&b, "floor", vectors_number(c, "alpha"));
    int tau = vectors_int(c, "tau");
    observe(&b, b.m - tau, tau);
    CHECK_OK(b.policy.vt->prefill_end(&b.policy, &b.sequence, k));
    for (int l = 0; l < b.L; l++) CHECK(k[l] == cJSON_GetArrayItem(vectors_get(c, "k"), l)->valueint);
    CHECK_OK(comm_same(comm, "budgets", hash_bytes(k, (size_t)b.L * sizeof *k)));
    bench_close(&b);
}

static void test_ranks(void) { each_case("ranks", check_ranks); }

/* A budget of all tokens is not run at all, whatever the formula would give. */
static void test_whole_budget(void)
{
    cJSON *inputs = vectors_load("inputs");
    struct bench b = bench_open(inputs, "no_image");
    open_policy(&b, "floor", 1.0);
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
    if (comm_open_auto(&comm)) {
        fprintf(stderr, "%s\n", status_message());
        return 2;
    }
    int failed = check_run("vl_cache", cases);
    failed = comm_agree(comm, failed ? status_set(ERR_BUG, __FILE__, __LINE__, "checks failed") : OK, "tests") != OK;
    comm_close(comm);
    return failed;
}
