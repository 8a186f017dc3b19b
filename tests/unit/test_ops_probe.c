/* The attention probe against the oracles' vectors (counts, column sums, for ones and for weights that rise along the
 * rows), and against double on random shapes. The last row's attention output comes with the vectors and is tested as
 * a decode step over the same pages. */
#include "tests/ops_fixture.h"
#include "tests/vectors.h"

struct input {
    int n_heads, n_kv_heads, head_dim, m, q_first, n_q, n_k;
    float *q, *k, *v; /* of the layer: [n_heads, n_q, head_dim], [n_kv_heads, n_k, head_dim]; v may be NULL */
};

static float *take_layer(struct fixture *f, const cJSON *array, int layer)
{
    size_t n;
    int layers = cJSON_GetArrayItem(vectors_get(array, "shape"), 0)->valueint;
    float *all = vectors_array(array, &n);
    size_t of_layer = n / (size_t)layers;
    float *out = fixture_take(f, of_layer * sizeof *out);
    memcpy(out, all + of_layer * (size_t)layer, of_layer * sizeof *out);
    free(all);
    return out;
}

static struct input read_input(struct fixture *f, const cJSON *input, int layer)
{
    struct input in = {.n_heads = vectors_int(input, "H"),
                       .n_kv_heads = vectors_int(input, "G"),
                       .head_dim = vectors_int(input, "d"),
                       .m = vectors_int(input, "m"),
                       .q_first = vectors_int(input, "q_first")};
    in.n_k = in.m + vectors_int(input, "extra");
    in.n_q = in.n_k - in.q_first;
    in.q = take_layer(f, vectors_get(input, "Q"), layer);
    in.k = take_layer(f, vectors_get(input, "K"), layer);
    int at = 0;
    const cJSON *item;
    cJSON_ArrayForEach (item, vectors_get(input, "v_layers")) {
        if (item->valueint == layer) in.v = take_layer(f, vectors_get(input, "V"), at);
        at++;
    }
    return in;
}

/* A cache of one slot with the m prompt tokens, as a layer's prefill leaves it. */
static struct kv_view fill_cache(struct fixture *f, const struct input *in, struct attention_heads *heads)
{
    const int pages = in->m / 16 + 1, dim = in->head_dim;
    struct kv_view kv = fixture_cache(f, 1, in->n_kv_heads, pages, pages * in->n_kv_heads, 16, dim);
    struct tensor k = fixture_3d(f, in->m, in->n_kv_heads, dim, 0), v = fixture_3d(f, in->m, in->n_kv_heads, dim, 0);
    for (int g = 0; g < in->n_kv_heads; g++)
        for (int i = 0; i < in->m; i++) {
            size_t from = (size_t)(g * in->n_k + i) * (size_t)dim, bytes = (size_t)dim * sizeof(float);
            memcpy(fixture_row(k, i) + g * dim, in->k + from, bytes);
            if (in->v) memcpy(fixture_row(v, i) + g * dim, in->v + from, bytes);
        }
    int32_t slot[1] = {0}, cu[2] = {0, in->m};
    *heads = (struct attention_heads){in->n_heads, in->n_kv_heads, dim, 0, 1.0f / sqrtf((float)dim)};
    CHECK_OK(ops_kv_append(&f->ops, &kv, heads, k, v, &(struct seq_batch){1, in->m, slot, cu, slot, cu}));
    return kv;
}

static struct tensor query_rows(struct fixture *f, const struct input *in, int first, int n)
{
    struct tensor q = fixture_3d(f, n, in->n_heads, in->head_dim, 6);
    for (int h = 0; h < in->n_heads; h++)
        for (int i = 0; i < n; i++)
            memcpy(fixture_row(q, i) + h * in->head_dim,
                   in->q + (size_t)(h * in->n_q + first - in->q_first + i) * (size_t)in->head_dim,
                   (size_t)in->head_dim * sizeof(float));
    return q;
}

static void check_columns(struct fixture *f, const cJSON *columns, const float *got, int n_heads, int n_kv_heads, int m)
{
    const int group = n_heads / n_kv_heads;
    int wrong = 0;
    for (int g = 0; g < n_kv_heads; g++) {
        double *sum = fixture_take(f, sizeof *sum * (size_t)m);
        for (int h = g * group; h < (g + 1) * group; h++) {
            double *head = vectors_list(cJSON_GetArrayItem(columns, h), NULL);
            for (int j = 0; j < m; j++) sum[j] += head[j];
            free(head);
        }
        for (int j = 0; j < m; j++)
            wrong += !(fabs((double)got[g * m + j] - sum[j]) <= 1e-4 * fabs(sum[j]) + 1e-8 * group);
    }
    CU_ASSERT_EQUAL(wrong, 0);
}

static void check_last_row(struct fixture *f, const cJSON *expected, const struct input *in, const struct kv_view *kv,
                           const struct attention_heads *heads)
{
    int32_t slot[1] = {0};
    struct tensor q = query_rows(f, in, in->m - 1, 1), out = fixture_3d(f, 1, in->n_heads, in->head_dim, 0);
    CHECK_OK(ops_attention_decode(&f->ops, out, q, &(struct seq_batch){.n_seqs = 1, .n_tokens = 1, .slot = slot}, kv,
                                  heads));
    for (int h = 0; h < in->n_heads; h++) {
        size_t n;
        double *want = vectors_list(cJSON_GetArrayItem(expected, h), &n);
        CHECK(n == (size_t)in->head_dim);
        for (int d = 0; d < in->head_dim; d++)
            CHECK(fabs((double)fixture_row(out, 0)[h * in->head_dim + d] - want[d]) <= 2e-5);
        free(want);
    }
}

static void check_case_of_file(const cJSON *entry, const cJSON *inputs)
{
    struct fixture *f = fixture_open(2, 1);
    struct input in = read_input(f, vectors_get(inputs, vectors_string(entry, "input")), vectors_int(entry, "layer"));
    struct attention_heads heads;
    struct kv_view kv = fill_cache(f, &in, &heads);
    const int first = vectors_int(entry, "first_row"), rows = in.m - first;
    float *weight = fixture_take(f, sizeof(float) * (size_t)rows);
    bool rising = !strcmp(vectors_string(entry, "row_weights"), "pyramid");
    for (int i = 0; i < rows; i++) weight[i] = rows > 1 ? (float)(1 + 0.2 * i / (rows - 1)) : 1;
    int64_t *kept = fixture_take(f, sizeof(int64_t) * (size_t)in.n_heads);
    struct attention_probe probe = {.n_rows = rows,
                                    .first_position = first,
                                    .row_weight = rising ? weight : NULL,
                                    .threshold = (float)vectors_number(entry, "p"),
                                    .column_sum = fixture_floats(f, (int64_t)in.n_kv_heads * in.m, 1),
                                    .kept = kept};
    CHECK_OK(ops_attention_probe(&f->ops, query_rows(f, &in, first, rows), &kv, &heads, &probe));
    for (int h = 0; h < in.n_heads; h++) {
        double want = cJSON_GetArrayItem(vectors_get(entry, "counts"), h)->valuedouble;
        double doubtful = cJSON_GetArrayItem(vectors_get(entry, "doubtful"), h)->valuedouble;
        CHECK(fabs((double)kept[h] - want) <= doubtful);
    }
    const cJSON *columns = cJSON_GetObjectItemCaseSensitive(entry, "columns");
    if (columns) check_columns(f, columns, probe.column_sum, in.n_heads, in.n_kv_heads, in.m);
    const cJSON *output = cJSON_GetObjectItemCaseSensitive(entry, "output_last_row");
    if (output && in.v) check_last_row(f, output, &in, &kv, &heads);
    fixture_close(f);
}

static void test_vectors(void)
{
    cJSON *file = vectors_load("attention_probe"), *inputs_file = vectors_load("inputs");
    const cJSON *entry, *inputs = vectors_get(inputs_file, "inputs");
    int n = 0;
    cJSON_ArrayForEach (entry, vectors_get(file, "cases")) {
        check_case_of_file(entry, inputs);
        n++;
    }
    CHECK(n > 50);
    cJSON_Delete(file);
    cJSON_Delete(inputs_file);
}

/* Column sums of all rows with weight one add up to rows * group heads; without a threshold nothing is counted; a
 * lane that no longer holds the prompt is refused. */
static void test_sums(void)
{
    struct fixture *f = fixture_open(2, 2);
    static const int groups[] = {1, 3, 16};
    for (int i = 0; i < 3; i++) {
        struct input in = {.n_heads = 2 * groups[i], .n_kv_heads = 2, .head_dim = 72 + 8 * i, .m = 300 + i};
        in.n_q = in.n_k = in.m;
        in.q = fixture_floats(f, (int64_t)in.n_heads * in.n_q * in.head_dim, 1);
        in.k = fixture_floats(f, (int64_t)in.n_kv_heads * in.n_k * in.head_dim, 1);
        struct attention_heads heads;
        struct kv_view kv = fill_cache(f, &in, &heads);
        int64_t kept[32];
        float *sum = fixture_floats(f, 2 * in.m, 1);
        struct attention_probe probe = {.n_rows = 250, .first_position = in.m - 250, .column_sum = sum, .kept = kept};
        CHECK_OK(ops_attention_probe(&f->ops, query_rows(f, &in, in.m - 250, 250), &kv, &heads, &probe));
        for (int g = 0; g < 2; g++) {
            double total = 0;
            for (int j = 0; j < in.m; j++) total += (double)sum[g * in.m + j];
            CHECK(fabs(total - 250.0 * groups[i]) < 1e-3 * groups[i]);
        }
        for (int h = 0; h < in.n_heads; h++) CHECK(kept[h] == 0);
        int32_t keep[1] = {0}, n_keep[1] = {1};
        CHECK_OK(ops_kv_pack(&f->ops, &kv, 0, 1, 1, keep, 1, n_keep));
        CHECK_FAILS(ops_attention_probe(&f->ops, query_rows(f, &in, in.m - 250, 250), &kv, &heads, &probe), ERR_ARG,
                    "KV head 1 holds 1 tokens");
    }
    fixture_close(f);
}

int main(void)
{
    return check_run(
        "ops_probe",
        (struct check_case[]){{"vectors of the oracles", test_vectors}, {"sums over all keys", test_sums}, {0}});
}
