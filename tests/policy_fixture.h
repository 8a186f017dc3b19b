/* policy_fixture - for tests of policies against the oracle's vectors: an input of the vectors with its heads dealt
 * over the ranks as the engine deals them, a cache that holds the prompt, and a policy over it.
 *
 * Stage by stage, as the vectors' README asks: budgets from the counts in the file, selections with the k in the file.
 */
#ifndef VITRAIL_TESTS_POLICY_FIXTURE_H
#define VITRAIL_TESTS_POLICY_FIXTURE_H

#include "kvcache/vl_cache.h"
#include "parallel/comm.h"
#include "parallel/shard.h"
#include "tests/ops_fixture.h"
#include "tests/vectors.h"

static struct comm *comm; /* opened by policy_tests_run */

/* One input of the vectors, its heads dealt to this rank: a cache that holds the prompt, a policy over it. */
struct bench {
    struct fixture *f;
    struct kv_view kv;
    struct policy_layer *layers;
    struct shard_heads *shards;
    struct policy policy;
    struct policy_sequence sequence;
    struct image_span *spans;
    int L, H, G, m, extra, d, q_first, q_rows;
    float *Q, *K;
    const float *inverse_frequency; /* NULL: Q is taken as it is */
    void *state;
};

static inline void read_spans(struct bench *b, const cJSON *list)
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

static inline void deal_heads(struct bench *b)
{
    int lane = 0;
    b->layers = fixture_take(b->f, (size_t)b->L * sizeof *b->layers);
    b->shards = fixture_take(b->f, (size_t)b->L * sizeof *b->shards);
    for (int l = 0; l < b->L; l++) {
        struct shard_heads s = b->shards[l] = shard_kv_heads(b->G, comm->size, comm->rank, l);
        b->layers[l] = (struct policy_layer){
            {s.kv_count * (b->H / b->G), s.kv_count, b->d, lane, 1.0f / sqrtf((float)b->d)}, s.kv_first, s.counted};
        lane += s.kv_count;
    }
    int pages = (b->m + b->extra + 15) / 16;
    b->kv = fixture_cache(b->f, 1, lane, pages, lane * pages, 16, b->d);
}

/* Keys of layer l at positions [first, first + n), of this rank's heads: [n, n_kv_heads, d]. */
static inline struct tensor keys(struct bench *b, int l, int first, int n)
{
    int heads = b->shards[l].kv_count;
    struct tensor k =
        tensor_3d(fixture_take(b->f, (size_t)(n * heads * b->d) * sizeof(float)), DTYPE_F32, n, heads, b->d);
    for (int i = 0; i < n; i++)
        for (int h = 0; h < heads; h++) {
            size_t lane = (size_t)l * (size_t)b->G + (size_t)(b->shards[l].kv_first + h);
            memcpy((float *)k.data + ((size_t)i * (size_t)heads + (size_t)h) * (size_t)b->d,
                   b->K + (lane * (size_t)(b->m + b->extra) + (size_t)(first + i)) * (size_t)b->d,
                   (size_t)b->d * sizeof(float));
        }
    return k;
}

/* Appends the keys of positions [first, first + n) of layer l (values stay zero: nothing here reads them). */
static inline void append_keys(struct bench *b, int l, int first, int n)
{
    struct tensor k = keys(b, l, first, n), v = k;
    int32_t slot = 0, cu[2] = {0, n};
    struct seq_batch batch = {1, n, &slot, cu, &slot, cu};
    v.data = fixture_take(b->f, tensor_bytes(k));
    CHECK_OK(ops_kv_append(&b->f->ops, &b->kv, &b->layers[l].heads, k, v, &batch));
}

/* Puts the input's values of layer l into this rank's lanes. */
static inline void put_values(struct bench *b, const cJSON *input, int l)
{
    const cJSON *item;
    int at = 0, found = -1;
    cJSON_ArrayForEach (item, vectors_get(input, "v_layers")) {
        if (item->valueint == l) found = at;
        at++;
    }
    CHECK(found >= 0);
    float *V = vectors_array(vectors_get(input, "V"), NULL);
    for (int h = 0; h < b->shards[l].kv_count; h++)
        for (int i = 0; i < b->m; i++) {
            size_t lane = (size_t)found * (size_t)b->G + (size_t)(b->shards[l].kv_first + h);
            float *to = (float *)(uintptr_t)fixture_value(&b->kv, b->layers[l].heads.lane + h, i);
            memcpy(to, V + (lane * (size_t)(b->m + b->extra) + (size_t)i) * (size_t)b->d, (size_t)b->d * sizeof *to);
        }
    free(V);
}

static inline struct policy_env bench_env(struct bench *b)
{
    return (struct policy_env){.ops = &b->f->ops,
                               .comm = comm,
                               .kv = &b->kv,
                               .layers = b->layers,
                               .n_layers = b->L,
                               .inverse_frequency = b->inverse_frequency,
                               .g_n_heads = b->H,
                               .max_context = b->m + b->extra,
                               .max_prompt_tokens = b->m};
}

/* open_policy - the policy that `config` names, at its budget. */
static inline void open_policy(struct bench *b, const struct policy_config *config)
{
    struct policy_env env = bench_env(b);
    struct arena arena;
    arena_measure(&arena);
    CHECK_OK(policy_open(&b->policy, config, &env, &arena));
    policy_close(&b->policy);
    size_t bytes = arena.used;
    arena_init(&arena, b->state = fixture_take(b->f, bytes), bytes);
    CHECK_OK(policy_open(&b->policy, config, &env, &arena));
    CHECK(arena.used == bytes);
    b->sequence.budget = config->budget;
}

static inline struct bench bench_open(const cJSON *inputs, const char *name)
{
    struct bench b = {.f = fixture_open(1, 1)};
    const cJSON *x = vectors_get(vectors_get(inputs, "inputs"), name);
    b.L = vectors_int(x, "L"), b.H = vectors_int(x, "H"), b.G = vectors_int(x, "G");
    b.m = vectors_int(x, "m"), b.d = vectors_int(x, "d"), b.q_first = vectors_int(x, "q_first");
    b.extra = vectors_int(x, "extra");
    int n_keys = b.m + b.extra;
    b.q_rows = n_keys - b.q_first;
    b.Q = vectors_array(vectors_get(x, "Q"), NULL);
    b.K = vectors_array(vectors_get(x, "K"), NULL);
    b.sequence = (struct policy_sequence){.prompt_tokens = b.m, .last_turn_start = vectors_int(x, "last_turn_start")};
    read_spans(&b, vectors_get(x, "spans"));
    deal_heads(&b);
    for (int l = 0; l < b.L; l++) append_keys(&b, l, 0, b.m);
    return b;
}

static inline void bench_close(struct bench *b)
{
    policy_close(&b->policy);
    free(b->Q);
    free(b->K);
    fixture_close(b->f);
}

/* The judging rows' queries of this rank's heads in layer l. */
static inline struct tensor queries(struct bench *b, int l, int first, int rows)
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

static inline void observe(struct bench *b, int first, int rows)
{
    for (int l = 0; l < b->L; l++) {
        struct policy_prefill in = {l, queries(b, l, first, rows), first};
        CHECK_OK(b->policy.vt->prefill_layer(&b->policy, &b->sequence, &in));
    }
}

static inline void each_case(const char *method, const char *kind, void (*check)(const cJSON *inputs, const cJSON *c))
{
    cJSON *file = vectors_load(method), *inputs = vectors_load("inputs");
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

/* policy_tests_run - the main of such a program: all ranks fail if one does. */
static inline int policy_tests_run(const char *suite, const struct check_case *cases)
{
    if (comm_open_auto(&comm)) {
        fprintf(stderr, "%s\n", status_message());
        return 2;
    }
    int failed = check_run(suite, cases);
    failed = comm_agree(comm, failed ? status_set(ERR_BUG, __FILE__, __LINE__, "checks failed") : OK, "tests") != OK;
    comm_close(comm);
    return failed;
}

#endif
