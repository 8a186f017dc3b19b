/* test_cluster_aside - ClusterKV of long prompts with overlap on, whose layers are clustered one by one as the prompt's
 * last step comes to them: the same clusters as at the prompt's end, with the heads dealt over 1 to 4 ranks; that they
 * are made then, not later, and with overlap off at the end alone; and that nothing of a step that broke off is left.
 */
#include "kvcache/cluster_kv.h"
#include "tests/policy_fixture.h"

enum { SLOTS = 4, LAYERS = 4, FULL_LAYERS = 1, KV_HEADS = 3, DIM = 8, SINKS = 16, WINDOW = 32, LONGEST = 4500 };
enum { FEWEST_KEYS = 4096 /* that go one by one */ };

struct long_prompts {
    struct fixture *f;
    struct kv_view kv;
    struct policy_layer layers[LAYERS];
    struct policy policy;
    int lanes;
};

static struct long_prompts open_prompts(void)
{
    struct long_prompts e = {.f = fixture_open(2, 11)};
    const int pages = (LONGEST + 15) / 16;
    for (int l = 0; l < LAYERS; l++) {
        const struct shard_heads s = shard_kv_heads(KV_HEADS, comm->size, comm->rank, l);
        e.layers[l] = (struct policy_layer){{2 * s.kv_count, s.kv_count, DIM, e.lanes, 0.25f}, s.kv_first, s.counted};
        e.lanes += s.kv_count;
    }
    e.kv = fixture_cache(e.f, SLOTS, e.lanes, pages, SLOTS * e.lanes * pages, 16, DIM);
    return e;
}

static void open_its_policy(struct long_prompts *e, int single_text, bool overlap)
{
    const struct policy_env env = {.ops = &e->f->ops,
                                   .comm = comm,
                                   .kv = &e->kv,
                                   .layers = e->layers,
                                   .n_layers = LAYERS,
                                   .g_n_heads = 2 * KV_HEADS,
                                   .max_context = LONGEST,
                                   .max_prompt_tokens = LONGEST};
    const struct policy_config config = {
        .policy = "cluster_kv",
        .budget = {0.1, 0},
        .cluster_kv = {SINKS, FULL_LAYERS, 300, 3, WINDOW, 4, CLUSTER_KV_MAX, single_text, overlap}};
    struct arena arena;
    arena_measure(&arena);
    CHECK_OK(policy_open(&e->policy, &config, &env, &arena));
    policy_close(&e->policy);
    const size_t bytes = arena.used;
    arena_init(&arena, fixture_take(e->f, bytes), bytes);
    CHECK_OK(policy_open(&e->policy, &config, &env, &arena));
}

static void close_prompts(struct long_prompts *e)
{
    policy_close(&e->policy);
    fixture_close(e->f);
}

/* Appends n tokens to a layer's lanes in both slots, the same keys. */
static void append_to_both(struct long_prompts *e, int layer, int slot, int other, int n)
{
    struct tensor k = fixture_3d(e->f, n, e->layers[layer].heads.n_kv_heads, DIM, 0);
    for (int i = 0; i < 2; i++) {
        const int32_t to = i ? other : slot, cu[2] = {0, n};
        const struct seq_batch batch = {1, n, &to, cu, &to, cu};
        CHECK_OK(ops_kv_append(&e->f->ops, &e->kv, &e->layers[layer].heads, k, k, &batch));
    }
}

/* What a step does that ends this prompt: a layer has got its keys, then the policy sees it. */
static void show_layer(struct long_prompts *e, const struct policy_sequence *sequence, int layer)
{
    const struct policy_prefill in = {layer, fixture_3d(e->f, 1, e->layers[layer].heads.n_heads, DIM, 0),
                                      sequence->prompt_tokens - 1};
    CHECK_OK(e->policy.vt->prefill_layer(&e->policy, sequence, &in));
}

/* Turns a slot's keys around: clusters made from now on have other centroids. */
static void spoil_keys(struct long_prompts *e, int slot)
{
    for (int lane = slot * e->lanes; lane < (slot + 1) * e->lanes; lane++)
        for (int i = 0; i < e->kv.lane_len[lane]; i++) {
            float *key = (float *)(uintptr_t)fixture_key(&e->kv, lane, i);
            for (int d = 0; d < DIM; d++) key[d] = -key[d];
        }
}

/* Whether two slots have the same clusters, to the bit. */
static bool same_clusters(const struct long_prompts *e, int slot, int other)
{
    const struct kv_clusters *c = cluster_kv_clusters(&e->policy);
    bool same = true;
    for (int i = 0; i < c->n_lanes; i++) {
        const int64_t a = (int64_t)slot * c->n_lanes + i, b = (int64_t)other * c->n_lanes + i;
        const int n = c->state[a].n_clusters, clustered = c->state[a].end - c->state[a].first;
        CHECK(fixture_same(&c->state[a], &c->state[b], sizeof *c->state) && n > 1);
        same = same && fixture_same(fixture_row(c->centroid, a), fixture_row(c->centroid, b),
                                    (size_t)(n * DIM) * sizeof(float));
        same = same &&
               fixture_same(c->size + a * c->max_clusters, c->size + b * c->max_clusters, (size_t)n * sizeof *c->size);
        same = same && fixture_same(c->entry + a * c->max_entries, c->entry + b * c->max_entries,
                                    (size_t)clustered * sizeof *c->entry);
    }
    return same;
}

/* A window of generated tokens behind both. */
static void generate(struct long_prompts *e, int slot, int other)
{
    const int32_t slots[2] = {slot, other};
    for (int l = 0; l < LAYERS; l++) append_to_both(e, l, slot, other, WINDOW);
    for (int i = 0; i < WINDOW; i++) CHECK_OK(e->policy.vt->decode_end(&e->policy, slots, 2));
}

/* The size of the first cluster of a slot. */
static int32_t *first_size(const struct long_prompts *e, int slot)
{
    const struct kv_clusters *c = cluster_kv_clusters(&e->policy);
    return c->size + (int64_t)slot * c->n_lanes * c->max_clusters;
}

/* Two prompts that end in one step, against the same two clustered at their ends; aside: whether the first two are
 * clustered before their ends. */
static void check_layers(int single_text, bool overlap, const int length[2], bool aside)
{
    static const struct image_span spans[] = {{20, 2000}, {2100, 4100}};
    struct long_prompts e = open_prompts();
    struct policy_sequence sequence[SLOTS];
    open_its_policy(&e, single_text, overlap);
    for (int s = 0; s < SLOTS; s++)
        sequence[s] = (struct policy_sequence){.slot = s,
                                               .prompt_tokens = length[s % 2],
                                               .n_spans = 2,
                                               .spans = spans,
                                               .budget = {0.1, 0},
                                               .seed = (uint64_t)(7 + s % 2)};
    for (int s = 0; s < 2; s++) *first_size(&e, s) = -1;
    for (int l = 0; l < LAYERS; l++) {
        for (int s = 0; s < 2; s++) append_to_both(&e, l, s, s + 2, length[s]);
        for (int s = 0; s < 2; s++) show_layer(&e, &sequence[s], l);
    }
    for (int s = 0; s < 2; s++) CHECK((*first_size(&e, s) != -1) == aside);
    for (int s = 0; s < 2; s++) spoil_keys(&e, s);
    for (int s = 0; s < SLOTS; s++) CHECK_OK(e.policy.vt->begin_decode(&e.policy, &sequence[s]));
    for (int s = 0; s < 2; s++) CHECK(same_clusters(&e, s, s + 2) == aside);
    for (int s = 0; s < 2; s++) {
        spoil_keys(&e, s); /* and back */
        generate(&e, s, s + 2);
        CHECK(same_clusters(&e, s, s + 2) == aside);
        CHECK(cluster_kv_clusters(&e.policy)->state[s * cluster_kv_clusters(&e.policy)->n_lanes].end ==
              length[s] + WINDOW);
    }
    close_prompts(&e);
}

static void test_layers(void)
{
    check_layers(0, true, (const int[]){SINKS + FEWEST_KEYS, LONGEST - WINDOW}, true);
    check_layers(7, true, (const int[]){LONGEST - WINDOW - 90, SINKS + FEWEST_KEYS}, true);
}

/* The same prompts, shorter by a token, or cut into more pieces than they have keys for: all at the end. */
static void test_short(void)
{
    check_layers(0, true, (const int[]){SINKS + FEWEST_KEYS - 1, 700}, false);
    check_layers(600, true, (const int[]){LONGEST - WINDOW, LONGEST - WINDOW - 5}, false);
}

/* The prompts of test_layers with overlap off: the hook clusters nothing, all is clustered at the end. */
static void test_off(void)
{
    check_layers(0, false, (const int[]){SINKS + FEWEST_KEYS, LONGEST - WINDOW}, false);
    check_layers(7, false, (const int[]){LONGEST - WINDOW - 90, SINKS + FEWEST_KEYS}, false);
}

/* A step that breaks off behind some layers: what comes to the slot afterwards, long or short, is clustered whole. */
static void test_broken_off(void)
{
    static const int next[] = {LONGEST - 100, 700};
    struct long_prompts e = open_prompts();
    open_its_policy(&e, 0, true);
    for (int i = 0; i < 2; i++) {
        struct policy_sequence sequence = {
            .slot = 0, .prompt_tokens = SINKS + FEWEST_KEYS + 3, .budget = {0.1, 0}, .seed = 1};
        for (int l = 0; l < LAYERS - 1; l++) {
            append_to_both(&e, l, 0, 1, sequence.prompt_tokens);
            show_layer(&e, &sequence, l);
        }
        for (int s = 0; s < 2; s++) CHECK_OK(ops_kv_release(&e.f->ops, &e.kv, s));
        sequence.prompt_tokens = next[i], sequence.seed = 2;
        for (int l = 0; l < LAYERS; l++) {
            append_to_both(&e, l, 0, 1, sequence.prompt_tokens);
            show_layer(&e, &sequence, l);
        }
        CHECK_OK(e.policy.vt->begin_decode(&e.policy, &sequence));
        sequence.slot = 1;
        CHECK_OK(e.policy.vt->begin_decode(&e.policy, &sequence));
        CHECK(same_clusters(&e, 0, 1));
        for (int s = 0; s < 2; s++) CHECK_OK(ops_kv_release(&e.f->ops, &e.kv, s));
    }
    close_prompts(&e);
}

int main(void)
{
    const struct check_case cases[] = {{"layer by layer", test_layers},
                                       {"short prompts at their end", test_short},
                                       {"off: long prompts at their end", test_off},
                                       {"a step that broke off", test_broken_off},
                                       {0}};
    return policy_tests_run("cluster_aside", cases);
}
