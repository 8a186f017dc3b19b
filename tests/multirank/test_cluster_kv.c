/* test_cluster_kv - the ClusterKV policy against the oracle's vectors, with the heads dealt over 1 to 4 ranks as the
 * engine deals them: the generator, the worked example, labels and centroids of prompts and of what is generated behind
 * them, selections and attention over them; and that a sequence does not notice its neighbours. */
#include "kvcache/choose.h"
#include "kvcache/cluster_kv.h"
#include "tests/policy_fixture.h"

/* ---- the generator ---- */

static void check_choice(const cJSON *stream, const char *key, int n, int count)
{
    const cJSON *want = vectors_get(stream, key);
    struct choose_stream s =
        choose_stream(strtoull(vectors_string(stream, "seed"), NULL, 10), vectors_int(stream, "layer"),
                      vectors_int(stream, "head"), vectors_int(stream, "window"));
    int32_t choice[600];
    choose(&s, n, count, choice);
    CHECK(cJSON_GetArraySize(want) == count);
    for (int i = 0; i < count; i++) CHECK(choice[i] == cJSON_GetArrayItem(want, i)->valueint);
}

static void check_rng(const cJSON *inputs, const cJSON *c)
{
    const cJSON *stream;
    (void)inputs;
    CHECK(hash_splitmix(0) == strtoull(vectors_string(c, "splitmix_0"), NULL, 10));
    cJSON_ArrayForEach (stream, vectors_get(c, "streams")) {
        check_choice(stream, "choose_7_of_584", 584, 7);
        check_choice(stream, "choose_5_of_5", 5, 5);
    }
}

static void test_rng(void) { each_case("clusterkv", "rng", check_rng); }

/* ---- the worked example, on the ops alone ---- */

/* Whether a list names the entries 0 .. first - 1 and those of `want`, each once. */
static int list_is(const int32_t *list, int n, int first, const cJSON *want, int n_entries)
{
    char *mark = calloc((size_t)n_entries, 1);
    const cJSON *item;
    int ok = n == first + cJSON_GetArraySize(want);
    for (int i = 0; i < n && ok; i++) ok = list[i] >= 0 && list[i] < n_entries && !mark[list[i]]++;
    for (int i = 0; i < first && ok; i++) ok = mark[i];
    cJSON_ArrayForEach (item, want) {
        ok = ok && mark[item->valueint];
    }
    free(mark);
    return ok;
}

static struct kv_clusters take_clusters(struct fixture *f, const struct kv_view *kv, int max_clusters, int max_entries)
{
    const int64_t lanes = kv->n_slots * kv->lanes_per_slot;
    struct kv_clusters c = {.n_lanes = kv->lanes_per_slot, .max_clusters = max_clusters, .max_entries = max_entries};
    c.centroid = tensor_3d(NULL, DTYPE_F32, lanes, max_clusters, kv->head_dim);
    c.centroid.data = fixture_take(f, tensor_bytes(c.centroid));
    c.size = fixture_take(f, (size_t)(lanes * max_clusters) * sizeof *c.size);
    c.entry = fixture_take(f, (size_t)(lanes * max_entries) * sizeof *c.entry);
    c.state = fixture_take(f, (size_t)lanes * sizeof *c.state);
    c.work = fixture_take(f, ops_cluster_bytes(&f->ops, c.n_lanes, kv->head_dim, max_entries, max_clusters));
    return c;
}

static void check_worked_selection(struct fixture *f, const struct kv_view *kv, struct kv_clusters *c,
                                   const cJSON *selection)
{
    const struct attention_heads heads = {1, 1, 2, 0, 1 / sqrtf(2)};
    const int32_t slot = 0;
    const struct seq_batch batch = {.n_seqs = 1, .n_tokens = 1, .slot = &slot};
    int32_t entry[12], count;
    float out[2], q[2];
    for (int d = 0; d < 2; d++) q[d] = (float)cJSON_GetArrayItem(vectors_get(selection, "q"), d)->valuedouble;
    c->state[0] = (struct cluster_state){3, 2, 12, vectors_int(selection, "B"), 0};
    CHECK_OK(ops_select_clusters(&f->ops, entry, &count, 12, tensor_3d(q, DTYPE_F32, 1, 1, 2), CLUSTER_KV_MAX, &batch,
                                 kv, &heads, c));
    const int all = c->state[0].budget == 10;
    CHECK(all ? count == -1 : list_is(entry, count, 2, vectors_get(selection, "selected"), 12));
    const struct kv_list list = {entry, &count, 12, NULL, NULL, false};
    CHECK_OK(ops_attention_decode_listed(&f->ops, tensor_3d(out, DTYPE_F32, 1, 1, 2), tensor_3d(q, DTYPE_F32, 1, 1, 2),
                                         &batch, kv, &heads, &list));
    for (int d = 0; d < 2; d++)
        CHECK(fabs((double)out[d] - cJSON_GetArrayItem(vectors_get(selection, "output"), d)->valuedouble) < 2e-5);
}

static void check_worked(const cJSON *inputs, const cJSON *c)
{
    (void)inputs;
    struct fixture *f = fixture_open(1, 1);
    struct kv_view kv = fixture_cache(f, 1, 1, 1, 1, 16, 2);
    struct kv_clusters clusters = take_clusters(f, &kv, 3, 10);
    float *k = vectors_array(vectors_get(c, "K"), NULL), *v = vectors_array(vectors_get(c, "V"), NULL), *mu;
    int32_t slot = 0, cu[2] = {0, 12}, centre[3];
    const struct attention_heads heads = {1, 1, 2, 0, 1 / sqrtf(2)};
    const struct seq_batch batch = {1, 12, &slot, cu, &slot, cu};
    CHECK_OK(ops_kv_append(&f->ops, &kv, &heads, tensor_3d(k, DTYPE_F32, 12, 1, 2), tensor_3d(v, DTYPE_F32, 12, 1, 2),
                           &batch));
    for (int i = 0; i < 3; i++) centre[i] = cJSON_GetArrayItem(vectors_get(c, "init"), i)->valueint - 2;
    const struct cluster_job job = {
        .first_entry = 2, .n_entries = 10, .n_clusters = 3, .iterations = 20, .centre = centre};
    CHECK_OK(ops_cluster_keys(&f->ops, &kv, &clusters, &job));
    mu = clusters.centroid.data;
    for (int i = 0; i < 6; i++) {
        const cJSON *row = cJSON_GetArrayItem(vectors_get(c, "mu"), i / 2);
        CHECK(fabs((double)mu[i] - cJSON_GetArrayItem(row, i % 2)->valuedouble) < 1e-6);
    }
    for (int i = 0; i < 3; i++) CHECK(clusters.size[i] == cJSON_GetArrayItem(vectors_get(c, "sizes"), i)->valueint);
    for (int i = 0; i < 10; i++) CHECK(clusters.entry[i] == cJSON_GetArrayItem(vectors_get(c, "sorted"), i)->valueint);
    const cJSON *selection;
    cJSON_ArrayForEach (selection, vectors_get(c, "selections")) {
        check_worked_selection(f, &kv, &clusters, selection);
    }
    free(k);
    free(v);
    fixture_close(f);
}

static void test_worked(void) { each_case("clusterkv", "worked", check_worked); }

/* ---- prompts ---- */

static struct policy_config config_of(const cJSON *c, int budget)
{
    const cJSON *per = cJSON_GetObjectItem(c, "per"), *window = cJSON_GetObjectItem(c, "window");
    return (struct policy_config){.policy = "cluster_kv",
                                  .budget = {1, budget},
                                  .cluster_kv = {.sinks = 16,
                                                 .full_layers = 0,
                                                 .tokens_per_cluster = per ? per->valueint : 80,
                                                 .iterations = 20,
                                                 .window = window ? window->valueint : 320,
                                                 .window_clusters = 4}};
}

/* The lane of a KV head (numbered over all ranks) of a layer within a slot; -1: another rank's. */
static int lane_of(const struct bench *b, int layer, int head)
{
    const struct shard_heads *s = &b->shards[layer];
    return head < s->kv_first || head >= s->kv_first + s->kv_count ? -1
                                                                   : b->layers[layer].heads.lane + head - s->kv_first;
}

/* Tokens [first, first + n) of layer l with their values, appended to the lanes of slot 0. */
static void append(struct bench *b, const cJSON *input, const float *V, int l, int first, int n)
{
    const struct attention_heads *heads = &b->layers[l].heads;
    const cJSON *item, *v_layers = vectors_get(input, "v_layers");
    const size_t d = (size_t)b->d, row = (size_t)heads->n_kv_heads * d;
    float *k = calloc((size_t)n * row, sizeof *k), *v = calloc((size_t)n * row, sizeof *v);
    int v_layer = -1, at = 0;
    cJSON_ArrayForEach (item, v_layers) {
        if (item->valueint == l) v_layer = at;
        at++;
    }
    for (int i = 0; i < n; i++)
        for (int h = 0; h < heads->n_kv_heads; h++) {
            const size_t g = (size_t)(b->shards[l].kv_first + h), G = (size_t)b->G;
            const size_t in_k = (((size_t)l * G + g) * (size_t)(b->m + b->extra) + (size_t)(first + i)) * d;
            const size_t in_v = (((size_t)v_layer * G + g) * (size_t)(b->m + b->extra) + (size_t)(first + i)) * d;
            memcpy(k + (size_t)i * row + (size_t)h * d, b->K + in_k, d * sizeof *k);
            if (v_layer >= 0) memcpy(v + (size_t)i * row + (size_t)h * d, V + in_v, d * sizeof *v);
        }
    int32_t slot = 0, cu[2] = {0, n};
    const struct seq_batch batch = {1, n, &slot, cu, &slot, cu};
    CHECK_OK(ops_kv_append(&b->f->ops, &b->kv, heads, tensor_3d(k, DTYPE_F32, n, heads->n_kv_heads, b->d),
                           tensor_3d(v, DTYPE_F32, n, heads->n_kv_heads, b->d), &batch));
    free(k);
    free(v);
}

/* One clustered block of a head against the file; whether the labels are equal. */
static int check_block(const struct bench *b, const cJSON *want, int first_cluster)
{
    const struct kv_clusters *c = cluster_kv_clusters(&b->policy);
    const int lane = lane_of(b, vectors_int(want, "layer"), vectors_int(want, "head"));
    const int first = vectors_int(want, "first"), n = vectors_int(want, "count");
    const cJSON *sizes = vectors_get(want, "sizes"), *labels = vectors_get(want, "labels");
    const int fragile = cJSON_IsTrue(vectors_get(want, "fragile"));
    const int32_t *size = c->size + lane * c->max_clusters + first_cluster;
    const int32_t *entry = c->entry + (int64_t)lane * c->max_entries + first - 16;
    int same = 0, at = 0;
    for (int i = 0; i < cJSON_GetArraySize(sizes); i++) {
        if (!fragile) CHECK(size[i] == cJSON_GetArrayItem(sizes, i)->valueint);
        for (int j = 0; j < size[i] && at < n; j++, at++) {
            CHECK(entry[at] >= first && entry[at] < first + n && (j == 0 || entry[at] > entry[at - 1]));
            same += cJSON_GetArrayItem(labels, entry[at] - first)->valueint == i;
        }
    }
    CHECK(at == n && (fragile ? same * 100 >= n * 99 : same == n));
    if (!cJSON_GetObjectItem(want, "mu") || same < n) return same == n;
    const float *got = (const float *)c->centroid.data + ((int64_t)lane * c->max_clusters + first_cluster) * b->d;
    for (int i = 0; i < cJSON_GetArraySize(sizes); i++)
        for (int d = 0; d < b->d; d++) {
            const cJSON *row = cJSON_GetArrayItem(vectors_get(want, "mu"), i);
            CHECK(fabs((double)got[i * b->d + d] - cJSON_GetArrayItem(row, d)->valuedouble) < 2e-5);
        }
    return 1;
}

/* The list of one KV head, or query head, under a selection's budget and way to share. */
static int select_head(struct bench *b, const cJSON *selection, int32_t *entry)
{
    struct kv_clusters *c = (struct kv_clusters *)(uintptr_t)cluster_kv_clusters(&b->policy);
    const int l = vectors_int(selection, "layer"), head = vectors_int(selection, "head"), group = b->H / b->G;
    const char *share = vectors_string(selection, "share");
    const struct attention_heads *heads = &b->layers[l].heads;
    const enum cluster_kv_group by = !strcmp(share, "none")   ? CLUSTER_KV_QUERY_HEAD
                                     : !strcmp(share, "mean") ? CLUSTER_KV_MEAN
                                                              : CLUSTER_KV_MAX;
    const int local = lane_of(b, l, head) - heads->lane, n_lists = heads->n_heads;
    const int list =
        by == CLUSTER_KV_QUERY_HEAD ? local * group + vectors_int(selection, "query_head") - head * group : local;
    const int32_t slot = 0;
    const struct seq_batch batch = {.n_seqs = 1, .n_tokens = 1, .slot = &slot};
    struct tensor q = queries(b, l, b->m - 1, 1);
    int32_t *count = fixture_take(b->f, (size_t)n_lists * sizeof *count);
    int32_t *lists = fixture_take(b->f, (size_t)(n_lists * c->max_entries) * sizeof *lists);
    for (int i = 0; i < c->n_lanes; i++) c->state[i].budget = vectors_int(selection, "B");
    CHECK_OK(ops_select_clusters(&b->f->ops, lists, count, c->max_entries, q, by, &batch, &b->kv, heads, c));
    for (int i = 0; i < count[list]; i++) entry[i] = lists[list * c->max_entries + i];
    return count[list];
}

/* Attention of the layer through the policy's hook; the group of one head against the file. */
static void check_output(struct bench *b, int l, int head, int position, const cJSON *output)
{
    const struct attention_heads *heads = &b->layers[l].heads;
    const int local = lane_of(b, l, head) - heads->lane, group = b->H / b->G;
    const int32_t slot = 0;
    const struct seq_batch batch = {.n_seqs = 1, .n_tokens = 1, .slot = &slot};
    struct tensor q = queries(b, l, position, 1), out = q;
    out.data = fixture_take(b->f, tensor_bytes(q));
    const struct policy_decode in = {.layer = l, .out = out, .q = q, .batch = &batch};
    CHECK_OK(b->policy.vt->decode_attention(&b->policy, &in));
    for (int g = 0; g < group; g++)
        for (int d = 0; d < b->d; d++) {
            const double want = cJSON_GetArrayItem(cJSON_GetArrayItem(output, g), d)->valuedouble;
            CHECK(fabs((double)((float *)out.data)[(local * group + g) * b->d + d] - want) < 2e-5);
        }
}

static void check_selection(struct bench *b, const cJSON *selection)
{
    const cJSON *output = cJSON_GetObjectItem(selection, "output");
    int32_t *entry = fixture_take(b->f, (size_t)((b->m + b->extra) + 16) * sizeof *entry);
    const int n = select_head(b, selection, entry);
    if (!cJSON_IsTrue(vectors_get(selection, "safe"))) return;
    const cJSON *want = vectors_get(selection, "selected_sorted");
    const int all = vectors_int(selection, "B") >= b->m - 16;
    CHECK(all ? n == -1 && cJSON_GetArraySize(want) == b->m - 16 : list_is(entry, n, 16, want, b->m));
    if (!output) return;
    b->policy.config.cluster_kv.group =
        strcmp(vectors_string(selection, "share"), "mean") ? CLUSTER_KV_MAX : CLUSTER_KV_MEAN;
    check_output(b, vectors_int(selection, "layer"), vectors_int(selection, "head"), b->m - 1, output);
}

/* A cache with the prompt and a policy whose sequence has begun to decode; returns the values (to be freed). */
static float *begin(struct bench *b, const cJSON *inputs, const cJSON *c, int budget)
{
    const cJSON *input = vectors_get(vectors_get(inputs, "inputs"), vectors_string(c, "input"));
    struct policy_config config = config_of(c, budget);
    *b = bench_open(inputs, vectors_string(c, "input"));
    float *V = vectors_array(vectors_get(input, "V"), NULL);
    CHECK_OK(ops_kv_release(&b->f->ops, &b->kv, 0));
    for (int l = 0; l < b->L; l++) append(b, input, V, l, 0, b->m);
    open_policy(b, &config);
    b->sequence.seed = strtoull(vectors_string(c, "seed"), NULL, 10);
    CHECK_OK(b->policy.vt->begin_decode(&b->policy, &b->sequence));
    return V;
}

static void check_prompt(const cJSON *inputs, const cJSON *c)
{
    const cJSON *item;
    struct bench b;
    if (cJSON_GetObjectItem(c, "window")) return;
    float *V = begin(&b, inputs, c, 1);
    int *equal = fixture_take(b.f, (size_t)(b.L * b.G) * sizeof *equal), n = 0;
    const struct cluster_state *state = cluster_kv_clusters(&b.policy)->state;
    cJSON_ArrayForEach (item, vectors_get(c, "heads")) {
        const int l = vectors_int(item, "layer"), h = vectors_int(item, "head");
        if (n++ == 0)
            CHECK(state->n_clusters == cJSON_GetArraySize(vectors_get(item, "sizes")) && state->first == 16 &&
                  state->end == b.m);
        if (lane_of(&b, l, h) >= 0) equal[l * b.G + h] = check_block(&b, item, 0);
    }
    if (n == 0) CHECK(state->n_clusters == 0);
    cJSON_ArrayForEach (item, vectors_get(c, "selections")) {
        if (equal[vectors_int(item, "layer") * b.G + vectors_int(item, "head")]) check_selection(&b, item);
    }
    free(V);
    bench_close(&b);
}

static void test_prompts(void) { each_case("clusterkv", "clusters", check_prompt); }

/* ---- generated tokens ---- */

static void check_state(struct bench *b, const cJSON *want)
{
    const struct kv_clusters *c = cluster_kv_clusters(&b->policy);
    const cJSON *sizes = vectors_get(want, "sizes");
    const int lane = lane_of(b, 0, vectors_int(want, "head")), length = b->m + vectors_int(want, "generated");
    CHECK(c->state->end == vectors_int(want, "unclustered_from"));
    CHECK(c->state->n_clusters == vectors_int(want, "clusters"));
    for (int i = 0; i < cJSON_GetArraySize(sizes); i++)
        CHECK(c->size[lane * c->max_clusters + i] == cJSON_GetArrayItem(sizes, i)->valueint);
    check_output(b, 0, vectors_int(want, "head"), length - 1, vectors_get(want, "output"));
    const struct policy_reads reads = policy_step_reads(&b->policy, &b->sequence, b->m, vectors_int(want, "generated"));
    CHECK((int)reads.tokens == vectors_int(want, "attended") + 1); /* of the next step, with its own token */
    CHECK(reads.beside_bytes ==
          (int64_t)b->G * b->L * (c->state->n_clusters * (b->d * 4 + 4) + vectors_int(want, "B") * 4));
}

static void check_decode(const cJSON *inputs, const cJSON *c)
{
    const cJSON *item;
    struct bench b;
    if (!cJSON_GetObjectItem(c, "window")) return;
    float *V = begin(&b, inputs, c, 24);
    const cJSON *input = vectors_get(vectors_get(inputs, "inputs"), vectors_string(c, "input"));
    const int first = cluster_kv_clusters(&b.policy)->state->n_clusters;
    const int32_t slot = 0;
    for (int t = 1; t <= b.extra; t++) {
        for (int l = 0; l < b.L; l++) append(&b, input, V, l, b.m + t - 1, 1);
        CHECK_OK(b.policy.vt->decode_end(&b.policy, &slot, 1));
        cJSON_ArrayForEach (item, vectors_get(c, "states")) {
            if (vectors_int(item, "generated") == t && lane_of(&b, 0, vectors_int(item, "head")) >= 0)
                check_state(&b, item);
        }
    }
    cJSON_ArrayForEach (item, vectors_get(c, "heads")) {
        if (lane_of(&b, vectors_int(item, "layer"), vectors_int(item, "head")) >= 0)
            CHECK(check_block(&b, item, first + 4 * (vectors_int(item, "window") - 1)));
    }
    free(V);
    bench_close(&b);
}

static void test_decode(void) { each_case("clusterkv", "clusters", check_decode); }

/* ---- a batch of several lengths ---- */

enum { SLOTS = 5, LAYERS = 3, KV_HEADS = 2, GROUP = 3, DIM = 16, LONGEST = 200 };

struct engine_like {
    struct fixture *f;
    struct kv_view kv;
    struct policy_layer layers[LAYERS];
    struct policy policy;
};

static struct engine_like open_engine_like(void)
{
    struct engine_like e = {.f = fixture_open(2, 7)};
    const int pages = (LONGEST + 1 + 15) / 16, lanes = LAYERS * KV_HEADS;
    e.kv = fixture_cache(e.f, SLOTS + 1, lanes, pages, SLOTS * lanes * pages, 16, DIM);
    for (int l = 0; l < LAYERS; l++)
        e.layers[l] = (struct policy_layer){{KV_HEADS * GROUP, KV_HEADS, DIM, l * KV_HEADS, 0.25f}, 0, true};
    return e;
}

/* Returns the bytes of its state. */
static size_t open_its_policy(struct engine_like *e, enum cluster_kv_group group)
{
    struct policy_env env = {.ops = &e->f->ops,
                             .comm = comm,
                             .kv = &e->kv,
                             .layers = e->layers,
                             .n_layers = LAYERS,
                             .g_n_heads = KV_HEADS * GROUP,
                             .max_context = LONGEST,
                             .max_prompt_tokens = LONGEST};
    const struct policy_config config = {
        .policy = "cluster_kv", .budget = {0.2, 0}, .cluster_kv = {16, 1, 10, 20, 32, 4, (int)group}};
    struct arena arena;
    arena_measure(&arena);
    CHECK_OK(policy_open(&e->policy, &config, &env, &arena));
    policy_close(&e->policy);
    const size_t bytes = arena.used;
    arena_init(&arena, fixture_take(e->f, bytes), bytes);
    CHECK_OK(policy_open(&e->policy, &config, &env, &arena));
    return bytes;
}

/* Query heads with lists of their own: each as if its KV head had no other. Heads without others: the same bits by any
 * of the three ways to share. */
static void check_heads_alone(struct engine_like *e, const struct policy_decode *in)
{
    struct attention_heads heads = e->layers[in->layer].heads;
    const int n = in->batch->n_seqs, stride = e->kv.max_pages * e->kv.page_size, n_lists = n * KV_HEADS;
    const struct kv_clusters *c = cluster_kv_clusters(&e->policy);
    if (in->layer < e->policy.config.cluster_kv.full_layers ||
        e->policy.config.cluster_kv.group != CLUSTER_KV_QUERY_HEAD)
        return;
    int32_t *entry = fixture_take(e->f, (size_t)(n_lists * stride) * sizeof *entry);
    int32_t *count = fixture_take(e->f, (size_t)n_lists * sizeof *count);
    struct tensor q = fixture_3d(e->f, n, KV_HEADS, DIM, 0), out = fixture_3d(e->f, n, KV_HEADS, DIM, 0);
    heads.n_heads = KV_HEADS;
    for (int g = 0; g < GROUP * 3; g++) {
        const enum cluster_kv_group by = (enum cluster_kv_group)(g / GROUP);
        const struct kv_list list = {entry, count, stride, NULL, NULL, by == CLUSTER_KV_QUERY_HEAD};
        for (int i = 0; i < n_lists; i++)
            memcpy((float *)q.data + i * DIM, (float *)in->q.data + (i * GROUP + g % GROUP) * DIM, DIM * sizeof(float));
        CHECK_OK(ops_select_clusters(&e->f->ops, entry, count, stride, q, by, in->batch, &e->kv, &heads, c));
        CHECK_OK(ops_attention_decode_listed(&e->f->ops, out, q, in->batch, &e->kv, &heads, &list));
        for (int i = 0; i < n_lists; i++)
            CHECK(fixture_same((float *)out.data + i * DIM, (float *)in->out.data + (i * GROUP + g % GROUP) * DIM,
                               DIM * sizeof(float)));
    }
}

/* Prompts of all slots: the third is too short for clusters, the fourth keeps everything. */
static void begin_all(struct engine_like *e)
{
    static const int prompt[SLOTS] = {150, 60, 9, 80, 33};
    for (int s = 0; s < SLOTS; s++) {
        int32_t slot = s, cu[2] = {0, prompt[s]};
        const struct seq_batch batch = {1, prompt[s], &slot, cu, &slot, cu};
        for (int l = 0; l < LAYERS; l++)
            CHECK_OK(ops_kv_append(&e->f->ops, &e->kv, &e->layers[l].heads,
                                   fixture_3d(e->f, prompt[s], KV_HEADS, DIM, 0),
                                   fixture_3d(e->f, prompt[s], KV_HEADS, DIM, 0), &batch));
        const struct policy_sequence sequence = {
            .slot = s, .prompt_tokens = prompt[s], .budget = {s == 3 ? 1 : 0.2, 0}, .seed = (uint64_t)s};
        CHECK_OK(e->policy.vt->begin_decode(&e->policy, &sequence));
    }
}

static void check_batch(enum cluster_kv_group group)
{
    struct engine_like e = open_engine_like();
    const int32_t slots[SLOTS + 1] = {3, 0, -1, 4, 1, 2};
    const size_t row = KV_HEADS * GROUP * DIM;
    open_its_policy(&e, group);
    begin_all(&e);
    for (int step = 0; step < 40; step++) {
        struct seq_batch all = {.n_seqs = SLOTS + 1, .n_tokens = SLOTS + 1, .slot = slots};
        struct tensor q = fixture_3d(e.f, SLOTS + 1, KV_HEADS * GROUP, DIM, 0), out = q, alone = q, whole = q;
        out.data = fixture_take(e.f, tensor_bytes(q));
        alone.data = fixture_take(e.f, tensor_bytes(q));
        whole.data = fixture_take(e.f, tensor_bytes(q));
        for (int l = 0; l < LAYERS; l++) {
            CHECK_OK(ops_kv_append(&e.f->ops, &e.kv, &e.layers[l].heads, fixture_3d(e.f, SLOTS + 1, KV_HEADS, DIM, 0),
                                   fixture_3d(e.f, SLOTS + 1, KV_HEADS, DIM, 0), &all));
            struct policy_decode in = {.layer = l, .out = out, .q = q, .batch = &all};
            CHECK_OK(e.policy.vt->decode_attention(&e.policy, &in));
            CHECK_OK(ops_attention_decode(&e.f->ops, whole, q, &all, &e.kv, &e.layers[l].heads));
            for (int i = 0; i <= SLOTS; i++) {
                struct seq_batch one = {.n_seqs = 1, .n_tokens = 1, .slot = &slots[i]};
                struct policy_decode own = {
                    .layer = l, .out = tensor_rows(alone, i, 1), .q = tensor_rows(q, i, 1), .batch = &one};
                CHECK_OK(e.policy.vt->decode_attention(&e.policy, &own));
                const int listed =
                    l > 0 && (slots[i] == 0 || slots[i] == 1 || slots[i] == 4 || (slots[i] == 2 && step > 31));
                CHECK(fixture_same(fixture_row(out, i), fixture_row(whole, i), row * sizeof(float)) == !listed);
            }
            CHECK(fixture_same(out.data, alone.data, tensor_bytes(out)));
            check_heads_alone(&e, &in);
        }
        const int32_t advanced[SLOTS] = {3, 0, 4, 1, 2};
        CHECK_OK(e.policy.vt->decode_end(&e.policy, advanced, SLOTS));
    }
    const struct policy_sequence nine = {.prompt_tokens = 9, .budget = {0.1, 0}},
                                 whole = {.prompt_tokens = 80, .budget = {1, 0}};
    const struct policy_reads short_prompt = policy_step_reads(&e.policy, &nine, 9, 39),
                              all = policy_step_reads(&e.policy, &whole, 80, 39);
    const int lists = group == CLUSTER_KV_QUERY_HEAD ? GROUP : 1; /* that are read of a lane, in 2 layers of 3 */
    CHECK(all.tokens == 40 + 80 * lists && all.beside_bytes == 0);
    /* 9 tokens and 40 generated: 32 of them in 4 clusters, of which the budget of 1 token is read in 2 layers of 3 */
    CHECK(fabs(short_prompt.tokens - (49 + lists * 2 * (49 - 32 + 1)) / 3.0) < 1e-12);
    CHECK(short_prompt.beside_bytes == lists * 2 * KV_HEADS * (4 * (DIM * 4 + 4) + 4));
    policy_close(&e.policy);
    fixture_close(e.f);
}

static void test_batch(void)
{
    check_batch(CLUSTER_KV_MAX);
    check_batch(CLUSTER_KV_QUERY_HEAD);
}

/* What the lists take: room for one more for each query head that is not its KV head's first. */
static void test_state(void)
{
    struct engine_like shared = open_engine_like(), own = open_engine_like();
    const size_t a = open_its_policy(&shared, CLUSTER_KV_MEAN), b = open_its_policy(&own, CLUSTER_KV_QUERY_HEAD);
    const size_t lists = (size_t)own.kv.n_slots * KV_HEADS * (GROUP - 1);
    const size_t bytes = lists * ((size_t)(own.kv.max_pages * own.kv.page_size) + 1) * sizeof(int32_t);
    CHECK(b - a + 2 * ARENA_ALIGNMENT > bytes && b - a < bytes + 2 * ARENA_ALIGNMENT); /* both are rounded up */
    policy_close(&shared.policy);
    policy_close(&own.policy);
    fixture_close(shared.f);
    fixture_close(own.f);
}

/* ---- text tokens as clusters of their own ---- */

/* The engine's likeness with so many single text tokens. */
static void open_singles(struct engine_like *e, int single_text)
{
    *e = open_engine_like();
    open_its_policy(e, CLUSTER_KV_MAX);
    struct policy_config config = e->policy.config;
    const struct policy_env env = e->policy.env;
    struct arena arena;
    config.cluster_kv.single_text = single_text;
    policy_close(&e->policy);
    arena_measure(&arena);
    CHECK_OK(policy_open(&e->policy, &config, &env, &arena));
    policy_close(&e->policy);
    const size_t bytes = arena.used;
    arena_init(&arena, fixture_take(e->f, bytes), bytes);
    CHECK_OK(policy_open(&e->policy, &config, &env, &arena));
}

struct piece {
    int first, end, n_clusters;
};

/* A prompt of 150 tokens with two images, cut into these pieces by so many single tokens: each piece's clusters hold
 * its entries, single ones one each; then as many bytes are counted as there are centroids. */
static void check_pieces(int single_text, const struct piece *piece, int n_pieces)
{
    struct engine_like e;
    open_singles(&e, single_text);
    static const struct image_span spans[] = {{20, 70}, {80, 140}};
    const struct policy_sequence sequence = {
        .slot = 1, .prompt_tokens = 150, .n_spans = 2, .spans = spans, .budget = {0.2, 0}, .seed = 5};
    const int32_t slot = 1, cu[2] = {0, 150};
    const struct seq_batch batch = {1, 150, &slot, cu, &slot, cu};
    for (int l = 0; l < LAYERS; l++)
        CHECK_OK(ops_kv_append(&e.f->ops, &e.kv, &e.layers[l].heads, fixture_3d(e.f, 150, KV_HEADS, DIM, 0),
                               fixture_3d(e.f, 150, KV_HEADS, DIM, 0), &batch));
    CHECK_OK(e.policy.vt->begin_decode(&e.policy, &sequence));
    const struct kv_clusters *c = cluster_kv_clusters(&e.policy);
    int n_clusters = 0;
    for (int r = c->n_lanes; r < 2 * c->n_lanes; r++) {
        const int32_t *entry = c->entry + (int64_t)r * c->max_entries, *size = c->size + r * c->max_clusters;
        bool seen[150] = {false};
        n_clusters = 0;
        for (const struct piece *p = piece; p < piece + n_pieces; p++) {
            const bool single = p->n_clusters == p->end - p->first;
            int n = 0;
            for (int i = 0; i < p->n_clusters; n += size[n_clusters + i++]) CHECK(!single || size[n_clusters + i] == 1);
            CHECK(n == p->end - p->first);
            for (; n > 0; n--, entry++) {
                CHECK(*entry >= p->first && *entry < p->end && !seen[*entry]);
                seen[*entry] = true;
            }
            n_clusters += p->n_clusters;
        }
        CHECK(c->state[r].n_clusters == n_clusters && c->state[r].first == 16 && c->state[r].end == 150);
    }
    const struct policy_reads reads = policy_step_reads(&e.policy, &sequence, 150, 0);
    CHECK(reads.beside_bytes == 2 * KV_HEADS * (n_clusters * (DIM * 4 + 4) + 30 * 4));
    policy_close(&e.policy);
    fixture_close(e.f);
}

static void test_singles(void)
{
    check_pieces(0, (struct piece[]){{16, 150, 15}}, 1);
    check_pieces(7, (struct piece[]){{16, 143, 12}, {143, 150, 7}}, 2);
    check_pieces(14, (struct piece[]){{16, 76, 6}, {76, 80, 4}, {80, 140, 6}, {140, 150, 10}}, 4);
    check_pieces(64, (struct piece[]){{16, 20, 4}, {20, 70, 5}, {70, 80, 10}, {80, 140, 6}, {140, 150, 10}}, 5);
}

/* A key that the query asks for, at the prompt's end: lost in the mean of an image's cluster, read where it is single.
 * Of the clustered tokens one is read. */
static void test_needle(void)
{
    for (int single_text = 0; single_text <= 1; single_text++) {
        struct engine_like e;
        open_singles(&e, single_text);
        enum { M = 160 };
        const struct attention_heads *heads = &e.layers[1].heads;
        const int32_t slot = 0, cu[2] = {0, M};
        const struct seq_batch batch = {1, M, &slot, cu, &slot, cu}, step = {.n_seqs = 1, .n_tokens = 1, .slot = &slot};
        const struct policy_sequence sequence = {.prompt_tokens = M, .budget = {0, 1}, .seed = 5};
        struct tensor k = fixture_3d(e.f, M, KV_HEADS, DIM, 0), q = fixture_3d(e.f, 1, KV_HEADS * GROUP, DIM, 0);
        int32_t *entry = fixture_take(e.f, KV_HEADS * 256 * sizeof *entry), count[KV_HEADS];
        float *key = k.data, *query = q.data;
        /* the needle points where an earlier token does, and a little to where no other key does */
        for (int i = 0; i < M * KV_HEADS; i++) key[i * DIM] = 4, key[i * DIM + 1] = 0;
        for (int h = 0; h < KV_HEADS; h++) {
            float *needle = key + ((M - 1) * KV_HEADS + h) * DIM;
            memcpy(needle, key + (100 * KV_HEADS + h) * DIM, DIM * sizeof *needle);
            needle[1] = 0.5f;
        }
        for (int i = 0; i < KV_HEADS * GROUP * DIM; i++) query[i] = i % DIM == 1 ? 8 : 0;
        CHECK_OK(ops_kv_append(&e.f->ops, &e.kv, heads, k, fixture_3d(e.f, M, KV_HEADS, DIM, 0), &batch));
        for (int l = 0; l < LAYERS; l += 2) CHECK_OK(ops_kv_append(&e.f->ops, &e.kv, &e.layers[l].heads, k, k, &batch));
        CHECK_OK(e.policy.vt->begin_decode(&e.policy, &sequence));
        CHECK_OK(ops_select_clusters(&e.f->ops, entry, count, 256, q, CLUSTER_KV_MAX, &step, &e.kv, heads,
                                     cluster_kv_clusters(&e.policy)));
        for (int h = 0; h < KV_HEADS; h++) {
            CHECK(count[h] == 17);
            CHECK(!single_text || entry[h * 256 + 16] == M - 1);
            CHECK(single_text || entry[h * 256 + 16] != M - 1);
        }
        policy_close(&e.policy);
        fixture_close(e.f);
    }
}

static void test_limits(void)
{
    struct engine_like e = open_engine_like();
    open_its_policy(&e, CLUSTER_KV_MAX);
    struct policy_config config = e.policy.config;
    struct policy_env env = e.policy.env;
    struct policy other;
    struct arena arena;
    arena_measure(&arena);
    config.cluster_kv.tokens_per_cluster = 1;
    env.max_context = 5000;
    CHECK(policy_open(&other, &config, &env, &arena) == ERR_CONFIG);
    policy_close(&other);
    config.cluster_kv.full_layers = LAYERS; /* nothing to do, and no room taken */
    arena_measure(&arena);
    CHECK_OK(policy_open(&other, &config, &env, &arena));
    CHECK(arena.used == 0);
    policy_close(&other);
    CHECK(cluster_kv_count(&config.cluster_kv, 600, 584) == 584);
    config.evicted = KV_EVICTED_HOST;
    CHECK_OK(policy_check(&config));
    config.cluster_kv.group = CLUSTER_KV_QUERY_HEAD;
    CHECK_FAILS(policy_check(&config), ERR_CONFIG, "kv_cache.evicted: host with kv_cache.cluster_kv.group query_head");
    config.cluster_kv.tokens_per_cluster = 80;
    CHECK(cluster_kv_count(&config.cluster_kv, 600, 584) == 7 && cluster_kv_count(&config.cluster_kv, 33, 17) == 1);
    config.cluster_kv.group = CLUSTER_KV_MAX;
    CHECK_OK(policy_check(&config));
    config.cluster_kv.single_text = 8;
    CHECK_FAILS(policy_check(&config), ERR_CONFIG, "single_text 8 with kv_cache.evicted: host");
    policy_close(&e.policy);
    fixture_close(e.f);
}

static void test_arguments(void)
{
    struct fixture *f = fixture_open(1, 3);
    struct kv_view kv = fixture_cache(f, 2, 3, 2, 12, 16, 8);
    struct kv_clusters c = take_clusters(f, &kv, 5, 20);
    const struct attention_heads heads = {2, 1, 8, 1, 1};
    int32_t centre[15] = {0}, slot[2] = {1, -1}, entry[40], count[2];
    const struct seq_batch batch = {.n_seqs = 2, .n_tokens = 2, .slot = slot};
    const struct cluster_job good = {.slot = 1, .n_entries = 6, .n_clusters = 5, .iterations = 1, .centre = centre};
    struct tensor q = fixture_3d(f, 2, 2, 8, 0);
    struct cluster_job job = good;
    CHECK_FAILS(ops_cluster_keys(&f->ops, &kv, &c, &job), ERR_ARG, "holds 0 entries");
    job.slot = 2;
    CHECK_FAILS(ops_cluster_keys(&f->ops, &kv, &c, &job), ERR_ARG, "job.slot is 2");
    job = good, job.n_clusters = 7;
    CHECK_FAILS(ops_cluster_keys(&f->ops, &kv, &c, &job), ERR_ARG, "6 entries in clusters 0 .. 7");
    job = good, job.first_cluster = 1;
    CHECK_FAILS(ops_cluster_keys(&f->ops, &kv, &c, &job), ERR_ARG, "clusters 1 .. 6");
    job = good, job.first_place = 15;
    CHECK_FAILS(ops_cluster_keys(&f->ops, &kv, &c, &job), ERR_ARG, "there is room for 20");
    job = good, job.first_entry = 27;
    CHECK_FAILS(ops_cluster_keys(&f->ops, &kv, &c, &job), ERR_ARG, "a lane holds 32");
    job = good, job.iterations = 0;
    CHECK_FAILS(ops_cluster_keys(&f->ops, &kv, &c, &job), ERR_ARG, "0 iterations");
    job = good, job.n_entries = 0;
    CHECK_OK(ops_cluster_keys(&f->ops, &kv, &c, &job));
    CHECK_OK(ops_select_clusters(&f->ops, entry, count, 20, q, CLUSTER_KV_MAX, &batch, &kv, &heads, &c));
    CHECK(count[0] == -1 && count[1] == 0);
    CHECK_FAILS(ops_select_clusters(&f->ops, entry, count, 0, q, CLUSTER_KV_MAX, &batch, &kv, &heads, &c), ERR_ARG,
                "lists of 0");
    c.first_lane = 2, c.n_lanes = 1;
    c.centroid.dim[0] = 2;
    CHECK_FAILS(ops_select_clusters(&f->ops, entry, count, 20, q, CLUSTER_KV_MAX, &batch, &kv, &heads, &c), ERR_ARG,
                "a layer of lanes 1 .. 2");
    fixture_close(f);
}

int main(void)
{
    const struct check_case cases[] = {{"random choices", test_rng},
                                       {"the worked example", test_worked},
                                       {"prompts", test_prompts},
                                       {"generated tokens", test_decode},
                                       {"a batch of several lengths", test_batch},
                                       {"room for lists", test_state},
                                       {"single text tokens", test_singles},
                                       {"a single needle", test_needle},
                                       {"limits", test_limits},
                                       {"arguments", test_arguments},
                                       {0}};
    return policy_tests_run("cluster_kv", cases);
}
