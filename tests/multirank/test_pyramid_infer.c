/* test_pyramid_infer - PyramidInfer against the oracle's vectors, with the heads dealt over 1 to 4 ranks as the engine
 * deals them: schedules, solved ratios, fixed-point sums, the tokens that leave each layer, all independent of the
 * number of ranks.
 *
 * Stage by stage, as the vectors' README asks: a layer's tokens are those of the file. */
#include "kvcache/pyramid_infer.h"
#include "tests/policy_fixture.h"

enum { MOST_LAYERS = 128 };

static int item_int(const cJSON *list, int i)
{
    const cJSON *item = cJSON_GetArrayItem(list, i);
    return cJSON_IsNumber(item) ? item->valueint : -1;
}

/* ---- lengths ---- */

static struct pyramid_shape shape_of(const cJSON *c, double *decay)
{
    const cJSON *window = cJSON_GetObjectItem(c, "window");
    struct pyramid_shape shape = {.tokens = vectors_int(c, "S"),
                                  .n_layers = vectors_int(c, "L"),
                                  .interval = vectors_int(c, "interval"),
                                  .min_context = vectors_int(c, "min_ctx"),
                                  .window = cJSON_IsNumber(window) ? window->valueint : 0,
                                  .decay = decay};
    vectors_demand(shape.n_layers <= MOST_LAYERS, "layers");
    pyramid_infer_decay(shape.n_layers, decay);
    return shape;
}

static void check_schedule(const cJSON *inputs, const cJSON *c)
{
    double decay[MOST_LAYERS], rho = vectors_number(c, "rho");
    struct pyramid_shape shape = shape_of(c, decay);
    int stored[MOST_LAYERS], keep[MOST_LAYERS], final;
    (void)inputs;
    int64_t total = pyramid_infer_schedule(&shape, rho, vectors_number(c, "r"), stored, keep, &final);
    CHECK(pyramid_infer_window(&shape, rho) == vectors_int(c, "W") && final == vectors_int(c, "final"));
    CHECK((double)total / ((double)shape.tokens * shape.n_layers) == vectors_number(c, "mean_ratio"));
    for (int l = 0; l < shape.n_layers; l++) {
        CHECK(stored[l] == item_int(vectors_get(c, "stored"), l));
        CHECK(keep[l] == item_int(vectors_get(c, "keep_context"), l));
    }
}

static void test_schedules(void) { each_case("pyramid_infer", "schedule", check_schedule); }

/* The published lengths of ALGORITHMS.md 8.2. */
static void test_published_lengths(void)
{
    static const int want[40] = {512, 512, 512, 511, 511, 509, 509, 504, 504, 496, 496, 484, 484, 468,
                                 468, 448, 448, 424, 424, 396, 396, 366, 366, 335, 335, 304, 304, 274,
                                 274, 246, 246, 221, 221, 199, 199, 180, 180, 180, 180, 180};
    double decay[40];
    int stored[40];
    struct pyramid_shape shape = {.tokens = 512, .n_layers = 40, .interval = 2, .min_context = 64, .decay = decay};
    pyramid_infer_decay(40, decay);
    pyramid_infer_schedule(&shape, 0.2, 0.8, stored, NULL, NULL);
    for (int l = 0; l < 40; l++) CHECK(stored[l] == want[l]);
    shape = (struct pyramid_shape){.tokens = 1024, .n_layers = 32, .interval = 1, .min_context = 64, .decay = decay};
    pyramid_infer_decay(32, decay);
    pyramid_infer_schedule(&shape, 0.2, 0.9, stored, NULL, NULL);
    CHECK(stored[1] == 1024 && stored[2] == 1023 && stored[3] == 1022 && stored[16] == 824 && stored[31] == 380);
    CHECK(pyramid_infer_schedule(&shape, 0.2, 1, stored, NULL, NULL) == 1024 * 32);
}

static void check_solve(const cJSON *inputs, const cJSON *c)
{
    double decay[MOST_LAYERS], target = vectors_number(c, "target"), rho = 0.2, r = 0.8;
    struct pyramid_shape shape = shape_of(c, decay);
    double mean = pyramid_infer_solve(&shape, target, &rho, &r);
    (void)inputs;
    CHECK((fabs(mean - target) <= PYRAMID_INFER_WITHIN) == cJSON_IsTrue(vectors_get(c, "reachable")));
    CHECK(mean == vectors_number(c, "mean_ratio") && rho == vectors_number(c, "rho") && r == vectors_number(c, "r"));
    int64_t total = pyramid_infer_schedule(&shape, rho, r, NULL, NULL, NULL);
    CHECK((double)total / ((double)shape.tokens * shape.n_layers) == mean);
}

static void test_solve(void) { each_case("pyramid_infer", "solve", check_solve); }

static void check_block_keep(const cJSON *inputs, const cJSON *c)
{
    double decay[MOST_LAYERS];
    int n = vectors_int(c, "L");
    (void)inputs;
    pyramid_infer_decay(n, decay);
    for (int l = 0; l < n; l++)
        CHECK(pyramid_infer_block_keep(decay[l], vectors_int(c, "exceed"), vectors_number(c, "gen_compress"),
                                       vectors_number(c, "gen_decay")) == item_int(vectors_get(c, "keep"), l));
}

static void test_block_keep(void) { each_case("pyramid_infer", "generation_keep", check_block_keep); }

/* ---- scores ---- */

static double from_fixed(int64_t x) { return (double)x * 0x1p-40; }

static bool score_close(double got, double want) { return fabs(got - want) <= 1e-4 * fabs(want) + 1e-8; }

/* ALGORITHMS.md 8.2 by hand: attention of one head, its weighted sums, what stays. */
static void check_score(const cJSON *inputs, const cJSON *c)
{
    struct fixture *f = fixture_open(1, 1);
    size_t n;
    float *rows = vectors_array(vectors_get(c, "rows"), &n), weight[8];
    double *want = vectors_list(vectors_get(c, "score"), NULL);
    const int n_rows = item_int(vectors_get(vectors_get(c, "rows"), "shape"), 0), columns = (int)n / n_rows;
    const int sink = vectors_int(c, "sink"), k = cJSON_IsNumber(vectors_get(c, "k")) ? vectors_int(c, "k") : columns;
    float *sum = fixture_take(f, (size_t)columns * sizeof *sum);
    int64_t *score = fixture_take(f, (size_t)columns * sizeof *score);
    int32_t *index = fixture_take(f, (size_t)k * sizeof *index);
    (void)inputs;
    pyramid_infer_row_weights(n_rows, vectors_number(c, "dw"), weight);
    for (int i = 0; i < n_rows; i++)
        for (int j = 0; j < columns; j++) sum[j] += weight[i] * rows[i * columns + j];
    CHECK_OK(ops_sum_fixed(&f->ops, score, tensor_2d(sum, DTYPE_F32, 1, columns), 1.0 / n_rows));
    for (int j = 0; j < columns; j++) CHECK(score_close(from_fixed(score[j]), want[j]));
    struct row_choice choice = {
        .n_rows = columns, .first = sink, .n_competing = columns - sink, .keep = k - sink, .first_score = sink};
    CHECK_OK(ops_select_rows(&f->ops, index, score, &choice, 1));
    for (int i = 0; i < k; i++)
        CHECK(item_int(vectors_get(c, "context"), index[i]) == item_int(vectors_get(c, "kept"), i));
    free(rows);
    free(want);
    fixture_close(f);
}

static void test_scores(void) { each_case("pyramid_infer", "score", check_score); }

/* Heads' scores to integers: the file's to the last bit, whole and in the parts of 2, 3 and 4 ranks. */
static void check_fixed(const cJSON *inputs, const cJSON *c)
{
    struct fixture *f = fixture_open(1, 1);
    size_t n;
    float *scores = vectors_array(vectors_get(c, "head_scores"), &n);
    const cJSON *want = vectors_get(c, "sum"), *part, *cuts = vectors_get(c, "cuts");
    const int columns = cJSON_GetArraySize(want), heads = (int)n / columns;
    int64_t *sum = fixture_take(f, (size_t)columns * sizeof *sum);
    (void)inputs;
    CHECK_OK(ops_sum_fixed(&f->ops, sum, tensor_2d(scores, DTYPE_F32, heads, columns), 1));
    for (int j = 0; j < columns; j++) CHECK(sum[j] == (int64_t)cJSON_GetArrayItem(want, j)->valuedouble);
    cJSON_ArrayForEach (part, vectors_get(c, "rank_sums")) {
        const cJSON *cut = vectors_get(cuts, part->string);
        for (int r = 0; r < cJSON_GetArraySize(part); r++) {
            int first = r ? item_int(cut, r - 1) : 0, end = r < cJSON_GetArraySize(cut) ? item_int(cut, r) : heads;
            CHECK_OK(ops_sum_fixed(
                &f->ops, sum, tensor_2d(scores + (size_t)first * (size_t)columns, DTYPE_F32, end - first, columns), 1));
            for (int j = 0; j < columns; j++)
                CHECK(sum[j] == (int64_t)cJSON_GetArrayItem(cJSON_GetArrayItem(part, r), j)->valuedouble);
        }
    }
    free(scores);
    fixture_close(f);
}

static void test_fixed(void) { each_case("pyramid_infer", "fixed_point", check_fixed); }

/* ---- a prompt's way through the layers ---- */

static void open_pyramid(struct bench *b, const cJSON *c)
{
    const cJSON *window = cJSON_GetObjectItem(c, "window"), *interval = cJSON_GetObjectItem(c, "interval");
    struct policy_config config = {.policy = "pyramid_infer", .budget = {0.5, 0}};
    config.pyramid_infer =
        (struct pyramid_infer_options){.recent_ratio = vectors_number(c, "rho"),
                                       .ratio = vectors_number(c, "r"),
                                       .interval = interval ? interval->valueint : 1,
                                       .min_context = vectors_int(c, "min_ctx"),
                                       .sinks = vectors_int(c, "sink"),
                                       .recent_weight = vectors_number(c, "dw"),
                                       .judges = cJSON_IsNumber(window) ? PYRAMID_INFER_TEXT : PYRAMID_INFER_RECENT,
                                       .generation_decay = 0.1,
                                       .generation_compress = 0.9,
                                       .generation_block = 16};
    CHECK_OK(comm_reserve(comm, 1 << 16));
    open_policy(b, &config);
}

/* Leaves a layer's lanes with these of the prompt's tokens. */
static void pack_layer(struct bench *b, int l, const cJSON *tokens)
{
    const int n = cJSON_GetArraySize(tokens), lanes = b->shards[l].kv_count;
    int32_t *keep = fixture_take(b->f, (size_t)(n * (lanes + 1)) * sizeof *keep);
    int32_t *n_keep = fixture_take(b->f, (size_t)(lanes + 1) * sizeof *n_keep);
    for (int h = 0; h < lanes; h++) {
        n_keep[h] = n;
        for (int i = 0; i < n; i++) keep[h * n + i] = item_int(tokens, i);
    }
    if (lanes) CHECK_OK(ops_kv_pack(&b->f->ops, &b->kv, 0, b->layers[l].heads.lane, lanes, keep, n, n_keep));
}

/* The sum over all ranks' heads is the file's mean times the number of heads. */
static void check_layer_scores(struct bench *b, int l, int window, int n, double dw, const cJSON *score)
{
    const int context = n - window, heads = b->layers[l].counted ? b->layers[l].heads.n_heads : 0;
    float *weight = fixture_take(b->f, (size_t)window * sizeof *weight);
    float *column = fixture_take(b->f, (size_t)((heads + 1) * n) * sizeof *column);
    int64_t *sum = fixture_take(b->f, (size_t)context * sizeof *sum);
    double *want = vectors_list(score, NULL);
    pyramid_infer_row_weights(window, dw, weight);
    struct attention_probe probe = {
        .n_rows = window, .first_position = context, .row_weight = weight, .column_sum = column, .per_head = true};
    if (heads)
        CHECK_OK(
            ops_attention_probe(&b->f->ops, queries(b, l, b->m - window, window), &b->kv, &b->layers[l].heads, &probe));
    struct tensor columns = tensor_2d(column, DTYPE_F32, heads, context);
    columns.stride[0] = n;
    CHECK_OK(ops_sum_fixed(&b->f->ops, sum, columns, 1.0 / window));
    CHECK_OK(policy_sum_scores(&b->policy, sum, context));
    for (int j = 0; j < context; j++) CHECK(score_close(from_fixed(sum[j]) / b->H, want[j]));
    CHECK_OK(comm_same(comm, "scores", hash_bytes(sum, (size_t)context * sizeof *sum)));
    free(want);
}

static void check_layer(struct bench *b, int l, int window, const cJSON *layer, double dw)
{
    const cJSON *tokens = vectors_get(layer, "tokens"), *kept = vectors_get(layer, "kept");
    const int n = cJSON_GetArraySize(tokens), context = n - window, k = cJSON_GetArraySize(kept);
    const bool last = l + 1 == b->L, leaves = cJSON_IsArray(kept) && !last;
    pack_layer(b, l, tokens);
    struct policy_prefill seen = {l, queries(b, l, b->m - window, window), context};
    CHECK_OK(b->policy.vt->prefill_layer(&b->policy, &b->sequence, &seen));
    int32_t cu[2] = {0, n}, left[2];
    int32_t *row = fixture_take(b->f, (size_t)n * sizeof *row), *got = fixture_take(b->f, (size_t)n * sizeof *got);
    bool ends = true;
    struct policy_narrow narrow = {l, 1, &b->sequence, &ends, cu, left, row};
    CHECK_OK(b->policy.vt->narrow(&b->policy, &narrow));
    CHECK(left[0] == 0 && left[1] == (leaves ? k + window : n));
    if (cJSON_IsArray(kept)) check_layer_scores(b, l, window, n, dw, vectors_get(layer, "score"));
    if (!leaves) return;
    for (int i = 0; i < k; i++) got[i] = item_int(tokens, row[i]);
    CHECK(vectors_kept_ok(layer, got, k, b->m));
    for (int i = 0; i < window; i++) CHECK(row[k + i] == context + i);
    CHECK_OK(comm_same(comm, "rows", hash_bytes(row, (size_t)left[1] * sizeof *row)));
}

static void check_prefill(const cJSON *inputs, const cJSON *c)
{
    struct bench b = bench_open(inputs, vectors_string(c, "input"));
    const int window = vectors_int(c, "W");
    int k[MOST_LAYERS];
    open_pyramid(&b, c);
    CHECK(b.policy.vt->judging_rows(&b.policy, &b.sequence) == window);
    for (int l = 0; l < b.L; l++)
        check_layer(&b, l, window, cJSON_GetArrayItem(vectors_get(c, "layers"), l), vectors_number(c, "dw"));
    CHECK_OK(b.policy.vt->prefill_end(&b.policy, &b.sequence, k));
    for (int l = 0; l < b.L; l++) CHECK(k[l] == item_int(vectors_get(c, "stored"), l));
    bench_close(&b);
}

static void test_prefill(void) { each_case("pyramid_infer", "prefill", check_prefill); }

/* ---- generation ---- */

/* Appends the key of the token at `position` to the lanes of layer l. */
static void append_key(struct bench *b, int l, int position, int n_keys)
{
    const int n = b->shards[l].kv_count;
    int32_t slot = 0;
    float zero[512] = {0};
    struct tensor k = tensor_3d(fixture_take(b->f, (size_t)(n * b->d + 1) * sizeof(float)), DTYPE_F32, 1, n, b->d);
    struct tensor v = k;
    v.data = zero;
    for (int h = 0; h < n; h++)
        memcpy((float *)k.data + h * b->d,
               b->K + (((size_t)l * (size_t)b->G + (size_t)(b->shards[l].kv_first + h)) * (size_t)n_keys +
                       (size_t)position) *
                          (size_t)b->d,
               (size_t)b->d * sizeof(float));
    struct seq_batch batch = {.n_seqs = 1, .n_tokens = 1, .slot = &slot};
    if (n) CHECK_OK(ops_kv_append(&b->f->ops, &b->kv, &b->layers[l].heads, k, v, &batch));
}

/* The lanes of every layer hold these positions' keys. */
static void check_lanes(struct bench *b, const cJSON *tokens, int n_keys)
{
    for (int l = 0; l < b->L; l++) {
        const cJSON *list = cJSON_GetArrayItem(tokens, l);
        for (int h = 0; h < b->shards[l].kv_count; h++) {
            const int lane = b->layers[l].heads.lane + h, n = cJSON_GetArraySize(list);
            CHECK(b->kv.lane_len[lane] == n);
            for (int i = 0; i < n && i < b->kv.lane_len[lane]; i++)
                CHECK(
                    !memcmp(fixture_key(&b->kv, lane, i),
                            b->K + (((size_t)l * (size_t)b->G + (size_t)(b->shards[l].kv_first + h)) * (size_t)n_keys +
                                    (size_t)item_int(list, i)) *
                                       (size_t)b->d,
                            (size_t)b->d * sizeof(float)));
        }
    }
    CHECK(fixture_pages_ok(&b->kv));
}

/* The lanes as the prefill leaves them: the tokens of the case's end that are of the prompt, and those of the first
 * block, which the prompt's last token is in. */
static void pack_prompt(struct bench *b, const cJSON *c)
{
    for (int l = 0; l < b->L; l++) {
        cJSON *tokens = cJSON_CreateArray();
        const cJSON *item;
        cJSON_ArrayForEach (item, cJSON_GetArrayItem(vectors_get(c, "final_tokens"), l)) {
            if (item->valueint < b->m - 1) cJSON_AddItemToArray(tokens, cJSON_CreateNumber(item->valueint));
        }
        cJSON_AddItemToArray(tokens, cJSON_CreateNumber(b->m - 1));
        CHECK(cJSON_GetArraySize(tokens) == item_int(vectors_get(c, "stored"), l));
        pack_layer(b, l, tokens);
        cJSON_Delete(tokens);
    }
}

/* A whole generation: when what is dropped, in every layer and on any number of ranks. */
static void check_generation(const cJSON *inputs, const cJSON *c)
{
    const int steps = vectors_int(c, "steps");
    struct bench b = bench_open(inputs, vectors_string(c, "input"));
    const int n_keys =
        b.m + vectors_int(vectors_get(vectors_get(inputs, "inputs"), vectors_string(c, "input")), "extra");
    int32_t slot = 0;
    open_pyramid(&b, c);
    pack_prompt(&b, c);
    CHECK_OK(b.policy.vt->begin_decode(&b.policy, &b.sequence));
    for (int t = 0; t < steps; t++) {
        for (int l = 0; l < b.L; l++) {
            append_key(&b, l, b.m + t, n_keys);
            struct seq_batch batch = {.n_seqs = 1, .n_tokens = 1, .slot = &slot};
            struct tensor q = queries(&b, l, b.m + t, 1);
            float *out = fixture_take(b.f, tensor_bytes(q) + 1);
            struct policy_decode in = {
                .layer = l, .out = tensor_3d(out, DTYPE_F32, 1, q.dim[1], b.d), .q = q, .batch = &batch};
            if (q.dim[1]) CHECK_OK(b.policy.vt->decode_attention(&b.policy, &in));
        }
        CHECK_OK(b.policy.vt->decode_end(&b.policy, &slot, 1));
    }
    check_lanes(&b, vectors_get(c, "final_tokens"), n_keys);
    bench_close(&b);
}

static void test_generation(void) { each_case("pyramid_infer", "generation", check_generation); }

/* Steps and judging rows against a simulation that keeps each layer's tokens, for many lengths and ratios. */
static void test_blocks(void)
{
    enum { L = 7, STEPS = 900, BLOCKS = 100 };
    double decay[L];
    pyramid_infer_decay(L, decay);
    for (int i = 0; i < 60; i++) {
        const double rhos[] = {0, 0.01, 0.05, 0.2, 0.33, 0.6};
        const int block = (int[]){16, 1, 5}[i % 3], prompt = 1 + 37 * i;
        int length[L], base[L], next = 0, rows;
        struct pyramid_generation g = {.tokens = prompt, .block = block, .rho = rhos[i % 6]};
        int32_t settled[2 * BLOCKS];
        g.first_keep = pyramid_infer_block_keep(decay[0], block, 0.9, 0.1);
        g.window = rows = (int)(g.rho * prompt + 1e-9) + 1;
        for (int l = 0; l < L; l++) length[l] = base[l] = prompt - l * prompt / 10;
        pyramid_infer_blocks(&g, STEPS, BLOCKS, settled);
        for (int t = 0; t < STEPS && next < BLOCKS; t++) {
            const int recent = (int)(g.rho * (length[0] + 1) + 1e-9);
            int fell = 0;
            rows = rows + 1 < recent + 1 ? rows + 1 : recent + 1;
            for (int l = 0; l < L; l++) {
                if (++length[l] - recent - base[l] < block) continue;
                /* The block's first entry is the token that the closed form says. */
                CHECK(length[l] - (recent + 1) - block == length[l] - 2 - t + next * block);
                length[l] -= block - pyramid_infer_block_keep(decay[l], block, 0.9, 0.1);
                base[l] = length[l] - recent;
                fell++;
            }
            CHECK(fell == 0 || fell == L);
            if (!fell) continue;
            CHECK(settled[2 * next] == t && settled[2 * next + 1] == rows && rows <= recent + 1);
            next++;
        }
        for (; next < BLOCKS; next++) CHECK(settled[2 * next] == INT32_MAX);
    }
}

/* Several prompts between two layers: one that loses rows, one that does not end here, one with a budget of all. */
static void test_several(void)
{
    cJSON *inputs = vectors_load("inputs"),
          *options =
              cJSON_Parse("{\"rho\": 0.2, \"r\": 0.3, \"min_ctx\": 4, \"sink\": 4, \"dw\": 1.2, \"window\": null}");
    struct bench b = bench_open(inputs, "two_images");
    b.kv.n_slots = 3; /* of so many sequences, while it opens */
    open_pyramid(&b, options);
    b.kv.n_slots = 1;
    struct policy_sequence s[3] = {b.sequence, b.sequence, b.sequence};
    bool ends[3] = {true, false, true};
    int32_t cu[4] = {0, 50, 50 + b.m, 57 + b.m}, left[4], *row = fixture_take(b.f, 400 * sizeof *row);
    s[0].budget = (struct kv_budget){1, 0};
    const int window = b.policy.vt->judging_rows(&b.policy, &b.sequence);
    struct policy_prefill seen = {1, queries(&b, 1, b.m - window, window), b.m - window};
    ends[1] = true;
    ends[2] = false;
    CHECK_OK(b.policy.vt->prefill_layer(&b.policy, &s[1], &seen));
    struct policy_narrow narrow = {1, 3, s, ends, cu, left, row};
    CHECK_OK(b.policy.vt->narrow(&b.policy, &narrow));
    const int stay = left[2] - left[1];
    CHECK(left[1] == 50 && stay > window && stay < b.m && left[3] == left[2] + 7);
    for (int i = 0; i < 50; i++) CHECK(row[i] == i);
    for (int i = 0; i < 4; i++) CHECK(row[50 + i] == 50 + i); /* sinks */
    for (int i = 51; i < left[2]; i++) CHECK(row[i] > row[i - 1] && row[i] < 50 + b.m);
    for (int i = 0; i < 7; i++) CHECK(row[left[2] + i] == 50 + b.m + i);
    bench_close(&b);
    cJSON_Delete(inputs);
    cJSON_Delete(options);
}

int main(void)
{
    static const struct check_case cases[] = {{"schedules", test_schedules},
                                              {"published lengths", test_published_lengths},
                                              {"ratios for a budget", test_solve},
                                              {"generated tokens that stay", test_block_keep},
                                              {"worked example 8.2", test_scores},
                                              {"fixed-point sums", test_fixed},
                                              {"tokens of every layer", test_prefill},
                                              {"several prompts", test_several},
                                              {"steps at which blocks are judged", test_blocks},
                                              {"generated tokens of every layer", test_generation},
                                              {0}};
    return policy_tests_run("pyramid_infer", cases);
}
