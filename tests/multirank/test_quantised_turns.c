/* test_quantised_turns - second turns over a cache in 8 bits, whose lanes become plain while the follow-up is read: the
 * demo model answers as over a plain cache; 1 to 4 ranks answer alike under policies that evict and under none, from a
 * pool so small that requests wait for each other's pages, and all pages come back. */
#include "parallel/shard.h"
#include "tests/turns_fixture.h"

static struct ranks ranks;

static void set_dtype(struct service *s, int dtype)
{
    struct policy_config config = s->config.kv_cache;
    config.dtype = dtype;
    CHECK_OK(engine_set_policy(s->engine, &config));
}

/* ---- the demo model: another field of the page that it was asked about ---- */

static const struct {
    const char *id, *followup, *answer;
} asked[] = {{"dev-1p-0000", "USER: What is the value of DEPARTURE? ASSISTANT:", "09 Mar 2003"},
             {"dev-1p-0002", "USER: What is the value of SUBJECT? ASSISTANT:", "Math"}};
enum { PAGES = SLOW_BUILD ? 1 : sizeof asked / sizeof *asked };

static void ask_pages(struct service *s, const struct question *q, int n, struct turns *t)
{
    for (int i = 0; i < PAGES; i++) {
        struct request r = request_question(s, questions_find(q, n, asked[i].id));
        size_t n_next;
        DEMAND(tokenizer_encode(prompt_tokenizer(s->builder), asked[i].followup, strlen(asked[i].followup),
                                TOKENIZER_PARSE_SPECIAL, &r.followup, &n_next));
        r.n_followup = (int)n_next;
        r.followup_max_tokens = 30;
        turns_submit(s, &r, &t[i]);
    }
    service_run(s);
}

static void work_demo(struct service *s)
{
    static const int dtypes[] = {KV_DTYPE_AUTO, KV_DTYPE_FP8, KV_DTYPE_INT8};
    struct turns t[3][PAGES];
    int n;
    struct question *q = questions_load(&n);
    for (int d = 0; d < 3; d++) {
        set_dtype(s, dtypes[d]);
        ask_pages(s, q, n, t[d]);
    }
    for (int i = 0; i < PAGES; i++) {
        const struct answer *plain = &t[0][i].turn[1];
        CHECK(plain->done &&
              !strncmp(plain->text + strspn(plain->text, " "), asked[i].answer, strlen(asked[i].answer)));
        for (int d = 1; d < 3; d++) {
            CHECK(answers_equal(&t[d][i].turn[0], &t[0][i].turn[0]) && answers_equal(&t[d][i].turn[1], plain));
            CHECK(4 * t[d][i].turn[1].bytes_kept < plain->bytes_kept * 5 / 4);
        }
    }
    for (int d = 0; d < 3; d++)
        for (int i = 0; i < PAGES; i++) turns_free(&t[d][i]);
    service_check_pages(s);
    questions_free(q, n);
}

static void test_demo(void)
{
    static const char *const settings[] = {"kv_cache.dtype", "fp8", "max_num_batched_tokens", "1200", NULL};
    struct service s;
    service_open(&s, &ranks, DEMO, settings);
    if (!service_follow(&s)) work_demo(&s);
    service_close(&s);
}

/* ---- random models, pools of few pages ---- */

enum { ASKED = 12, NEXT = 20, LONGEST = 110, MOST_ANSWER = 1 + 3 * (ASKED - 1), THEN = 9 };

static void ask_all(struct service *s, struct turns *t)
{
    static const struct kv_budget budgets[] = {{1, 0}, {0.3, 0}, {1, 0}, {1, 20}, {1, 1}, {0.9, 0}};
    const int words = engine_dims(s->engine)->vocab_size;
    for (int i = 0; i < ASKED; i++) {
        const int prompt = i == 5 ? 1 : LONGEST - 3 * i, next = i == 7 ? 1 : NEXT;
        struct request r = request_random((uint64_t)i, prompt, words, 1 + 3 * i),
                       behind = request_random((uint64_t)i + 90, next, words, 1);
        r.budget = budgets[i % 6];
        request_follow(&r, behind.ids, next, THEN);
        request_free(&behind);
        turns_submit(s, &r, &t[i]);
    }
    service_run(s);
}

/* Of the rank that has the most. */
static int most_lanes(const struct model_dims *dims, int size)
{
    int most = 0;
    for (int r = 0; r < size; r++) {
        int lanes = 0;
        for (int l = 0; l < dims->n_layers; l++) lanes += shard_kv_heads(dims->n_kv_heads, size, r, l).kv_count;
        most = lanes > most ? lanes : most;
    }
    return most;
}

/* A pool of one and a half of the largest requests on each of so many ranks. */
static void service_small(struct service *s, struct ranks *on, const char *name, const char *const *chosen)
{
    const char *settings[32] = {"max_model_len", "200", "max_num_seqs", "8", "kv_cache_memory_bytes"};
    char path[512], bytes[32];
    struct model_dims dims;
    snprintf(path, sizeof path, GOLDEN "/%s", name);
    DEMAND(model_dims_load(path, &dims));
    const int pages = (LONGEST + MOST_ANSWER + NEXT + THEN + 15) / 16, page_bytes = 2 * (16 * dims.head_dim + 64) * 4;
    const int lanes = most_lanes(&dims, on->comm->size);
    snprintf(bytes, sizeof bytes, "%d", lanes * page_bytes * (pages * 3 / 2));
    settings[5] = bytes;
    settings[6] = "kv_cache.pyramid_infer.generation_block", settings[7] = "4";
    for (int i = 0; chosen[i]; i++) settings[8 + i] = chosen[i];
    service_open(s, on, path, settings);
}

/* Adaptive heads compete on their rank, so that answers depend on how many there are. */
static void work_random(struct service *s, const char *policy, bool adaptive, struct turns *want)
{
    struct turns got[ASKED];
    ask_all(s, got);
    for (int i = 0; i < ASKED; i++) {
        const bool same = adaptive || turns_equal(&got[i], &want[i]);
        if (!same) fprintf(stderr, "%s, request %d: not what one rank answers\n", policy, i);
        CHECK(same && got[i].n == 2 && got[i].turn[1].n_tokens == THEN);
        turns_free(&got[i]);
        turns_free(&want[i]);
    }
    CHECK(service_counters(s).max_running >= 2);
    service_check_pages(s);
}

/* Asked of one rank, which is rank 0 by itself, and of all. */
static void compare_ranks(const char *name, const char *policy, const char *dtype, const char *heads, const char *rows)
{
    const char *const chosen[] = {"kv_cache.policy",
                                  policy,
                                  "kv_cache.dtype",
                                  dtype,
                                  "kv_cache.heads",
                                  heads,
                                  "max_num_batched_tokens",
                                  rows,
                                  NULL};
    struct ranks alone = {.liveness = ranks.liveness};
    struct turns want[ASKED];
    struct service s;
    if (ranks.comm->rank == 0) {
        DEMAND(comm_open("self", &alone.comm));
        service_small(&s, &alone, name, chosen);
        ask_all(&s, want);
        service_check_pages(&s);
        service_close(&s);
        comm_close(alone.comm);
    }
    service_small(&s, &ranks, name, chosen);
    if (!service_follow(&s)) work_random(&s, policy, !strcmp(heads, "adaptive"), want);
    service_close(&s);
}

static void test_random_models(void)
{
    compare_ranks("heads_9", "full", "fp8", "equal", "13"); /* follow-ups in two chunks */
    compare_ranks("heads_9", "vl_cache", "int8", "equal", "200");
    compare_ranks("gqa_tied", "snapkv", "fp8", "adaptive", "200");
    compare_ranks("heads_7", "h2o", "int8", "equal", "200");
    compare_ranks("heads_9", "pyramid_infer", "fp8", "equal", "200");
    compare_ranks("heads_9", "quest", "int8", "equal", "200");
    compare_ranks("heads_7", "cluster_kv", "fp8", "equal", "200");
}

int main(void)
{
    static const struct check_case cases[] = {
        {"the demo model", test_demo}, {"random models, small pools", test_random_models}, {0}};
    ranks = ranks_open();
    return ranks_run(&ranks, "quantised_turns", cases);
}
