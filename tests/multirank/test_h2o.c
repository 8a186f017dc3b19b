/* test_h2o - H2O against the oracle's vectors, with the heads dealt over 1 to 4 ranks: accumulated attention, the sets
 * kept after the prompt, and which entries go at each decode step. */
#include "kvcache/h2o.h"
#include "tests/policy_fixture.h"

static int list_int(const cJSON *list, int i) { return cJSON_GetArrayItem(list, i)->valueint; }

/* The whole prompt judges, in every layer. */
static void observe_all(struct bench *b)
{
    for (int l = 0; l < b->L; l++) {
        struct policy_prefill in = {l, queries(b, l, 0, b->m), 0};
        CHECK_OK(b->policy.vt->prefill_layer(&b->policy, &b->sequence, &in));
    }
}

/* Keeps heavy + recent tokens in every layer, whatever share of so short a prompt that is. */
static void compress(struct bench *b, const cJSON *layers, int k_all)
{
    struct policy_keep keep;
    int *k = fixture_take(b->f, (size_t)b->L * sizeof *k), lane = 0;
    for (int l = 0; l < b->L; l++) k[l] = k_all;
    CHECK_OK(b->policy.vt->select(&b->policy, &b->sequence, k, &keep));
    for (int l = 0; l < b->L; l++)
        for (int h = 0; h < b->shards[l].kv_count; h++, lane++) {
            const cJSON *want =
                cJSON_GetArrayItem(vectors_get(cJSON_GetArrayItem(layers, l), "prefill"), b->shards[l].kv_first + h);
            CHECK(vectors_kept_ok(want, keep.index + (size_t)lane * (size_t)keep.stride, k_all, b->m));
        }
    CHECK_OK(ops_kv_pack(&b->f->ops, &b->kv, 0, 0, lane, keep.index, keep.stride, keep.n_keep));
    CHECK_OK(b->policy.vt->begin_decode(&b->policy, &b->sequence));
}

/* A token at position m + t in layer l, as a decode step has it. */
static void decode(struct bench *b, int l, int t)
{
    struct tensor q = queries(b, l, b->m + t, 1), out = q;
    int32_t slot = 0, position = b->m + t;
    struct seq_batch batch = {1, 1, &slot, NULL, NULL, NULL};
    out.data = fixture_take(b->f, tensor_bytes(q));
    append_keys(b, l, b->m + t, 1);
    struct policy_decode in = {.layer = l, .out = out, .q = q, .batch = &batch, .position = &position};
    CHECK_OK(b->policy.vt->decode_attention(&b->policy, &in));
}

/* What a lane holds at the end, by the account that the policy's state keeps; scores of the vectors. */
static void check_lane(const struct bench *b, const struct heavy_hitters *heavy, int lane, const cJSON *want)
{
    const cJSON *kept = vectors_get(want, "kept"), *acc = vectors_get(want, "acc");
    int n = cJSON_GetArraySize(kept);
    CHECK(b->kv.lane_len[lane] == n);
    for (int i = 0; i < n; i++) {
        double score = -1;
        for (int j = 0; j < n; j++)
            if (heavy->position[(size_t)lane * (size_t)heavy->stride + (size_t)j] == list_int(kept, i))
                score = (double)heavy->score[(size_t)lane * (size_t)heavy->stride + (size_t)j];
        CHECK(fabs(score - cJSON_GetArrayItem(acc, i)->valuedouble) <= 1e-4 * fabs(score) + 1e-8);
    }
}

static void check_policy(const cJSON *inputs, const cJSON *c)
{
    struct bench b = bench_open(inputs, vectors_string(c, "input"));
    const cJSON *layers = vectors_get(c, "layers");
    int heavy = vectors_int(c, "heavy"), recent = vectors_int(c, "recent"), k = heavy + recent, steps = b.extra;
    struct policy_config config = {.policy = "h2o", .budget = {1, k}, .h2o = {(double)recent / k}};
    open_policy(&b, &config);
    CHECK(b.policy.vt->judging_rows(&b.policy, &b.sequence) == b.m);
    if (k < b.m && b.q_first == 0) {
        observe_all(&b);
        compress(&b, layers, k);
        if (steps > 24) steps = 24;
        for (int t = 0; t < steps; t++)
            for (int l = 0; l < b.L; l++) decode(&b, l, t);
        const struct heavy_hitters *state = h2o_account(&b.policy);
        for (int l = 0, lane = 0; l < b.L; l++)
            for (int h = 0; h < b.shards[l].kv_count; h++, lane++) {
                const cJSON *want =
                    cJSON_GetArrayItem(vectors_get(cJSON_GetArrayItem(layers, l), "decode"), b.shards[l].kv_first + h);
                if (cJSON_IsTrue(vectors_get(want, "safe"))) check_lane(&b, state, lane, want);
            }
        CHECK_OK(ops_kv_release(&b.f->ops, &b.kv, 0));
        CHECK(*b.kv.free_count == b.kv.n_pages);
    }
    bench_close(&b);
}

static void test_policy(void) { each_case("h2o", "policy", check_policy); }

int main(void)
{
    static const struct check_case cases[] = {{"scores, kept sets and evictions while decoding", test_policy}, {0}};
    return policy_tests_run("h2o", cases);
}
