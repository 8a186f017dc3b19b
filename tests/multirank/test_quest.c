/* test_quest - the Quest policy against the oracle's vectors, with the heads dealt over 1 to 4 ranks as the engine
 * deals them: bounds of pages after a prompt and after a decode step, ranks of pages, lists; and in the engine, over
 * the demo model: what it answers where every page is read, and where generation crosses the borders of pages. */
#include "kvcache/quest.h"
#include "tests/engine_fixture.h"
#include "tests/policy_fixture.h"

static struct ranks ranks;

static struct policy_config config_of(struct kv_budget budget, int full_layers)
{
    struct policy_config config = {.policy = "quest", .budget = budget, .quest = {3, full_layers}};
    return config;
}

/* ---- a lane of the vectors ---- */

static const struct quest *state_of(const struct bench *b) { return b->policy.state; }

/* Keeps the prompt but for its last token, which comes back as a decode step's; all values are 1. */
static void append_last(struct bench *b, int l)
{
    const int n = b->shards[l].kv_count;
    const struct attention_heads *heads = &b->layers[l].heads;
    struct tensor k = fixture_3d(b->f, 1, n, b->d, 0), v = fixture_3d(b->f, 1, n, b->d, 0);
    for (int64_t i = 0; i < tensor_count(v); i++) ((float *)v.data)[i] = 1;
    for (int h = 0; h < n; h++)
        for (int i = 0; i < b->m; i++)
            memcpy((float *)fixture_value(&b->kv, heads->lane + h, i), v.data, (size_t)b->d * sizeof(float));
    int32_t slot = 0;
    const struct seq_batch one = {.n_seqs = 1, .n_tokens = 1, .slot = &slot};
    for (int h = 0; h < n; h++)
        memcpy((float *)k.data + h * b->d, fixture_key(&b->kv, heads->lane + h, b->m - 1),
               (size_t)b->d * sizeof(float));
    int32_t *keep = fixture_take(b->f, (size_t)(n * b->m) * sizeof *keep);
    int *n_keep = fixture_take(b->f, (size_t)n * sizeof *n_keep);
    for (int h = 0; h < n; h++) {
        n_keep[h] = b->m - 1;
        for (int i = 0; i < b->m; i++) keep[h * b->m + i] = i;
    }
    CHECK_OK(ops_kv_pack(&b->f->ops, &b->kv, 0, heads->lane, n, keep, b->m, n_keep));
    CHECK_OK(b->policy.vt->begin_decode(&b->policy, &b->sequence)); /* as it stands before the step */
    CHECK_OK(ops_kv_append(&b->f->ops, &b->kv, heads, k, v, &one));
}

/* The attention of layer l of a step of one row; the output. */
static struct tensor attend(struct bench *b, int l, int32_t slot)
{
    const struct seq_batch batch = {.n_seqs = 1, .n_tokens = 1, .slot = &slot};
    struct tensor q = queries(b, l, b->m - 1, 1), out = fixture_3d(b->f, 1, q.dim[1], b->d, 0);
    const struct policy_decode in = {.layer = l, .out = out, .q = q, .batch = &batch};
    CHECK_OK(b->policy.vt->decode_attention(&b->policy, &in));
    return out;
}

/* low or high [pages, d] of the file against the bounds of a lane. */
static void check_bounds(struct bench *b, int lane, const cJSON *rows, int which)
{
    const cJSON *row;
    int page = 0;
    cJSON_ArrayForEach (row, rows) {
        size_t n;
        double *want = vectors_list(row, &n);
        const float *got = fixture_row(state_of(b)->pick.bounds, b->kv.page_row[lane * b->kv.max_pages + page++]);
        for (int d = 0; d < b->d; d++) CHECK((double)got[which * b->d + d] == want[d]);
        free(want);
    }
}

/* The pages of a list, which names whole pages in ascending order (the last as far as it is filled); their number. */
static int pages_of_list(const int32_t *entry, int count, int length, int32_t *pages)
{
    int n = 0;
    for (int i = 0; i < count; i++) {
        if (entry[i] % 16 == 0) pages[n++] = entry[i] / 16;
        CHECK(n > 0 && entry[i] == 16 * pages[n - 1] + entry[i] % 16 && entry[i] < length);
        CHECK(entry[i] % 16 == 0 || entry[i] == entry[i - 1] + 1);
        CHECK(entry[i] % 16 == 15 || entry[i] == length - 1 || i + 1 < count);
        CHECK(i == 0 || entry[i] > entry[i - 1]);
    }
    return n;
}

/* The bounds of a head's pages, the largest over its group; and the list made of them. */
static void check_head(struct bench *b, int l, int h, const cJSON *want)
{
    const struct page_pick *pick = &state_of(b)->pick;
    const cJSON *bounds;
    const int lane = b->layers[l].heads.lane + h, n_pages = (b->m + 15) / 16, listed = vectors_int(want, "pages");
    const int limit = quest_pages(&b->policy.config.quest, b->sequence.budget, b->m, 16);
    int32_t *pages = fixture_take(b->f, (size_t)n_pages * sizeof *pages);
    for (int p = 0; p < n_pages; p++) {
        double most = -INFINITY;
        cJSON_ArrayForEach (bounds, vectors_get(want, "bounds")) {
            const double x = cJSON_GetArrayItem(bounds, p)->valuedouble;
            most = x > most ? x : most;
        }
        CHECK(fabs((double)fixture_row(pick->score, h)[p] - most) <= 1e-6 * fabs(most));
    }
    CHECK(listed == (limit < n_pages ? limit : n_pages));
    CHECK((pick->count[h] < 0) == (limit >= n_pages)); /* all pages: the whole lane */
    if (pick->count[h] >= 0) {
        int n = pages_of_list(pick->entry + (int64_t)h * pick->stride, pick->count[h], b->m, pages);
        CHECK(vectors_kept_ok(vectors_get(want, "shared_max"), pages, n, n_pages));
    }
    if (cJSON_GetObjectItemCaseSensitive(want, "low")) {
        check_bounds(b, lane, vectors_get(want, "low"), 0);
        check_bounds(b, lane, vectors_get(want, "high"), 1);
    }
}

static void check_policy(const cJSON *inputs, const cJSON *c)
{
    struct bench b = bench_open(inputs, vectors_string(c, "input"));
    const int l = vectors_int(c, "layer");
    const int32_t slot = 0, padding = -1;
    struct policy_config config = config_of((struct kv_budget){1, vectors_int(c, "B")}, 0);
    open_policy(&b, &config);
    append_last(&b, l);
    struct tensor out = attend(&b, l, slot);
    for (int h = 0; h < b.shards[l].kv_count; h++) {
        if (policy_runs(&b.policy, &b.sequence))
            check_head(&b, l, h, cJSON_GetArrayItem(vectors_get(c, "heads"), b.shards[l].kv_first + h));
        else
            CHECK(b.m == 1 && state_of(&b)->pick.count[h] == -1); /* a budget of all there is */
    }
    for (int64_t i = 0; i < tensor_count(out); i++) CHECK(fabsf(((float *)out.data)[i] - 1) < 1e-5f);
    out = attend(&b, l, padding);
    for (int64_t i = 0; i < tensor_count(out); i++) CHECK(((float *)out.data)[i] == 0);
    for (int h = 0; h < b.shards[l].kv_count; h++) CHECK(state_of(&b)->pick.count[h] == 0);
    bench_close(&b);
}

static void test_policy(void) { each_case("quest", "policy", check_policy); }

/* ALGORITHMS.md 8.4, by the op: pages of 2, of which page 0 wins over the truly better page 1. */
static void check_worked(const cJSON *inputs, const cJSON *c)
{
    struct fixture *f = fixture_open(1, 1);
    float *K = vectors_array(vectors_get(vectors_get(vectors_get(inputs, "inputs"), "worked_84"), "K"), NULL);
    size_t n;
    double *want = vectors_list(vectors_get(c, "bounds"), &n), *q = vectors_list(vectors_get(c, "q"), NULL);
    struct kv_view kv = fixture_cache(f, 1, 1, 5, 7, 2, 2);
    const struct attention_heads heads = {1, 1, 2, 0, 1};
    const int32_t slot = 0, cu[2] = {0, 8}, limit = 2;
    struct seq_batch prompt = {1, 8, &slot, cu, &slot, cu}, step = {.n_seqs = 1, .n_tokens = 1, .slot = &slot};
    int32_t entry[10], count;
    float query[2] = {(float)q[0], (float)q[1]};
    struct page_pick pick = {fixture_3d(f, 7, 2, 2, 0), fixture_2d(f, 1, 5, 0), &limit, entry, &count, 10};
    struct tensor k = tensor_3d(K, DTYPE_F32, 8, 1, 2), row = tensor_3d(query, DTYPE_F32, 1, 1, 2);
    CHECK(n == 4 && vectors_int(c, "page") == 2);
    CHECK_OK(ops_kv_append(&f->ops, &kv, &heads, k, k, &prompt));
    CHECK_OK(ops_page_bounds(&f->ops, pick.bounds, &kv, 0, 0, 1));
    CHECK_OK(ops_pick_pages(&f->ops, row, &step, &kv, &heads, &pick));
    for (int p = 0; p < 4; p++) CHECK(fabs((double)fixture_row(pick.score, 0)[p] - want[p]) < 1e-6);
    CHECK(count == 4 && entry[0] == 0 && entry[1] == 1 && entry[2] == 6 && entry[3] == 7);
    pick.stride = 1;
    CHECK_FAILS(ops_pick_pages(&f->ops, row, &step, &kv, &heads, &pick), ERR_ARG, "lists of 1 entries");
    pick.stride = 10, pick.bounds = fixture_3d(f, 6, 2, 2, 0);
    CHECK_FAILS(ops_pick_pages(&f->ops, row, &step, &kv, &heads, &pick), ERR_ARG, "bounds");
    CHECK_FAILS(ops_page_bounds(&f->ops, fixture_3d(f, 7, 2, 2, 0), &kv, 1, 0, 1), ERR_ARG, "slot 1");
    free(K);
    free(want);
    free(q);
    fixture_close(f);
}

static void test_worked(void) { each_case("quest", "worked", check_worked); }

static void test_pages(void)
{
    const struct quest_options options = {3, 2};
    CHECK(quest_pages(&options, (struct kv_budget){0.1, 0}, 2000, 16) == 12);
    CHECK(quest_pages(&options, (struct kv_budget){0.1, 0}, 100, 16) == 3);
    CHECK(quest_pages(&options, (struct kv_budget){1, 64}, 2000, 16) == 4);
    CHECK(quest_pages(&options, (struct kv_budget){1, 0}, 2000, 16) == 0);
    CHECK(quest_pages(&options, (struct kv_budget){1, 2000}, 2000, 16) == 0);
}

/* ---- in the engine ---- */

enum { PROMPTS = 5, ANSWER = 60 };

/* Prompts of random tokens around borders of pages; their answers cross several. */
static void ask_all(struct service *s, struct answer *answers, struct kv_budget budget, bool together)
{
    static const int lengths[PROMPTS] = {1, 15, 16, 33, 180};
    for (int i = 0; i < PROMPTS; i++) {
        struct request r = request_random((uint64_t)i + 7, lengths[i], 200, ANSWER);
        r.budget = budget;
        service_submit(s, &r, &answers[i]);
        if (!together) service_run(s);
    }
    service_run(s);
}

/* Answers of the demo model under some settings, on rank 0; the others follow. */
static void serve(const char *const *settings, struct kv_budget budget, bool together, struct answer *answers)
{
    struct service s;
    service_open(&s, &ranks, DEMO, settings);
    if (!service_follow(&s)) ask_all(&s, answers, budget, together);
    service_close(&s);
}

static void free_all(struct answer *answers)
{
    for (int i = 0; i < PROMPTS && ranks.comm->rank == 0; i++) answer_free(&answers[i]);
}

static int count_equal(const struct answer *a, const struct answer *b)
{
    int n = 0;
    for (int i = 0; i < PROMPTS; i++) n += answers_equal(&a[i], &b[i]);
    return n;
}

/* A budget of everything, layers that are all full, or as many pages as there are: the full cache's answers. */
static void test_everything_read(void)
{
    static const char *const settings[4][7] = {
        {"kv_cache.policy", "full"},
        {"kv_cache.policy", "quest"},
        {"kv_cache.policy", "quest", "kv_cache.quest.full_layers", "100"},
        {"kv_cache.policy", "quest", "kv_cache.quest.full_layers", "0", "kv_cache.quest.min_pages", "100"}};
    struct answer full[PROMPTS], other[PROMPTS];
    serve(settings[0], (struct kv_budget){1, 0}, true, full);
    for (int i = 1; i < 4; i++) {
        serve(settings[i], (struct kv_budget){i == 1 ? 1 : 0.5, 0}, true, other);
        if (ranks.comm->rank == 0) CHECK(count_equal(full, other) == PROMPTS);
        free_all(other);
    }
    free_all(full);
}

/* Three pages of each lane: answers start as the full cache's, are the same alone and in a batch, and part from the
 * full cache's at last, or nothing would have been left out. */
static void test_pages_left_out(void)
{
    static const char *const whole[] = {"kv_cache.policy", "full", NULL};
    static const char *const settings[] = {"kv_cache.policy", "quest", "kv_cache.quest.full_layers", "0", NULL};
    struct answer full[PROMPTS], batch[PROMPTS], alone[PROMPTS];
    const struct kv_budget least = {0.1, 0};
    serve(whole, (struct kv_budget){1, 0}, true, full);
    serve(settings, least, true, batch);
    serve(settings, least, false, alone);
    if (ranks.comm->rank == 0) {
        CHECK(count_equal(batch, alone) == PROMPTS);
        CHECK(count_equal(batch, full) < PROMPTS);
        for (int i = 1; i < 4; i++) { /* up to 48 tokens, three pages are all */
            CHECK(full[i].n_tokens == ANSWER && batch[i].n_tokens == ANSWER);
            CHECK(!memcmp(full[i].tokens, batch[i].tokens, 14 * sizeof *full[i].tokens));
        }
    }
    free_all(full);
    free_all(batch);
    free_all(alone);
}

int main(void)
{
    static const struct check_case cases[] = {{"pages of a budget", test_pages},
                                              {"bounds, ranks and lists of every input", test_policy},
                                              {"worked example 8.4", test_worked},
                                              {"engine: everything is read", test_everything_read},
                                              {"engine: pages are left out", test_pages_left_out},
                                              {0}};
    ranks = ranks_open();
    comm = ranks.comm;
    return ranks_run(&ranks, "quest", cases);
}
