/* Keys and values in 8 bits: codes and scales against the oracle's vectors, attention over them, and random prompts,
 * packs, quantisings, decode steps, ways back and releases against plain arrays, with the invariant of the pages. */
#include "kernels/cpu/vector.h"
#include "kernels/quantise.h"
#include "tests/ops_fixture.h"
#include "tests/vectors.h"

static const struct vector_ops *const tables[] = {&vector__base, &vector__v3, &vector__v4};
static const enum kv_format formats[] = {KV_INT8, KV_FP8};
static const char *const format_names[KV_FORMAT_N] = {"none", "int8", "fp8"};

/* ---- reading a quantised lane ---- */

static const uint8_t *codes_of(const struct kv_view *kv, int lane, int i, bool value)
{
    int tokens = kv_page_tokens(kv, KV_INT8), page = kv->page_row[lane * kv->max_pages + i / tokens];
    return (const uint8_t *)((const float *)kv->pool.data + (int64_t)page * 2 * kv->page_size * kv->head_dim) +
           (int64_t)(i % tokens + (value ? tokens : 0)) * kv->head_dim;
}

static float scale_of(const struct kv_view *kv, int lane, int i, bool value)
{
    int tokens = kv_page_tokens(kv, KV_INT8), page = kv->page_row[lane * kv->max_pages + i / tokens];
    return kv->scale[(int64_t)page * 2 * tokens + (value ? tokens : 0) + i % tokens];
}

/* ---- vectors ---- */

static const cJSON *find_case(const cJSON *file, const char *kind)
{
    const cJSON *item;
    cJSON_ArrayForEach (item, vectors_get(file, "cases")) {
        if (!strcmp(vectors_string(item, "kind"), kind)) return item;
    }
    vectors_demand(0, kind);
    return NULL;
}

static void test_fp8_table(void)
{
    cJSON *file = vectors_load("kv_dtype");
    size_t n;
    double *want = vectors_list(vectors_get(find_case(file, "fp8_table"), "values"), &n);
    uint8_t codes[256];
    float got[256];
    CHECK(n == 256);
    for (int i = 0; i < 256; i++) codes[i] = (uint8_t)i;
    for (int t = 0; t < 3; t++) {
        if (!vector__runs(tables[t])) continue;
        tables[t]->widen_codes(got, codes, true, 256);
        for (int i = 0; i < 256; i++) {
            CHECK(isnan(want[i]) ? isnan(got[i]) : (double)got[i] == want[i]);
            if (!isnan(want[i])) CHECK(quantise_fp8(got[i]) == i);
        }
        tables[t]->widen_codes(got, codes, false, 256);
        for (int i = 0; i < 256; i++) CHECK(got[i] == (float)(i < 128 ? i : i - 256));
    }
    free(want);
    cJSON_Delete(file);
}

static void test_fp8_encode(void)
{
    cJSON *file = vectors_load("kv_dtype");
    const cJSON *test = find_case(file, "fp8_encode"), *bits = vectors_get(test, "bits");
    CHECK(cJSON_GetArraySize(bits) > 300);
    for (int i = 0; i < cJSON_GetArraySize(bits); i++) {
        uint32_t word = (uint32_t)strtoul(cJSON_GetArrayItem(bits, i)->valuestring, NULL, 16);
        float x;
        memcpy(&x, &word, sizeof x);
        CHECK(quantise_fp8(x) == cJSON_GetArrayItem(vectors_get(test, "codes"), i)->valueint);
    }
    cJSON_Delete(file);
}

static bool is_fragile(const cJSON *test, int row, int column)
{
    const cJSON *item, *list = cJSON_GetObjectItemCaseSensitive(test, "fragile");
    cJSON_ArrayForEach (item, list) {
        if (cJSON_GetArrayItem(item, 0)->valueint == row && cJSON_GetArrayItem(item, 1)->valueint == column)
            return true;
    }
    return false;
}

static void append_prompt(struct fixture *f, const struct kv_view *kv, const struct attention_heads *heads, int slot,
                          struct tensor k, struct tensor v)
{
    int32_t cu[2] = {0, (int32_t)k.dim[0]}, one[1] = {slot};
    CHECK_OK(ops_kv_append(&f->ops, kv, heads, k, v, &(struct seq_batch){1, cu[1], one, cu, one, cu}));
}

/* The rows as keys of a prompt, and once more as values. */
static void check_rows(enum kv_format format, const char *kind)
{
    cJSON *file = vectors_load("kv_dtype");
    const cJSON *test = find_case(file, kind), *codes = vectors_get(test, "codes");
    struct fixture *f = fixture_open(1, 1);
    size_t n, n_scales;
    float *x = vectors_array(vectors_get(test, "x"), &n), *scale = vectors_array(vectors_get(test, "scale"), &n_scales);
    float *want = vectors_array(vectors_get(test, "dequantised"), NULL), got[16];
    const int rows = (int)n_scales, dim = (int)n / rows;
    struct kv_view kv = fixture_cache(f, 1, 1, 2, 2, 16, dim);
    fixture_quantise(f, &kv, format);
    struct attention_heads heads = {1, 1, dim, 0, 1};
    struct tensor t = tensor_3d(x, DTYPE_F32, rows, 1, dim);
    append_prompt(f, &kv, &heads, 0, t, t);
    CHECK_OK(ops_kv_quantise(&f->ops, &kv, 0));
    CHECK(kv.lane_format[0] == (int)format && *kv.free_count == 1 && dim == 16);
    for (int i = 0; i < rows; i++)
        for (int value = 0; value < 2; value++) {
            const uint8_t *row = codes_of(&kv, 0, i, value);
            CHECK(scale_of(&kv, 0, i, value) == scale[i]);
            vector__base.widen_codes(got, row, format == KV_FP8, dim);
            for (int d = 0; d < dim; d++) {
                int code = cJSON_GetArrayItem(cJSON_GetArrayItem(codes, i), d)->valueint;
                if (is_fragile(test, i, d)) continue;
                CHECK(row[d] == (uint8_t)code);
                CHECK(got[d] * scale[i] == want[i * dim + d]);
            }
        }
    free(x), free(scale), free(want);
    fixture_close(f);
    cJSON_Delete(file);
}

static void test_rows(void)
{
    check_rows(KV_INT8, "int8_rows");
    check_rows(KV_FP8, "fp8_rows");
}

/* One layer's [heads, tokens, dim] as rows [tokens, heads, dim]. */
static struct tensor rows_of(struct fixture *f, const float *x, int heads, int tokens, int stride, int dim)
{
    struct tensor t = fixture_3d(f, tokens, heads, dim, 0);
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < tokens; i++)
            memcpy(fixture_row(t, i) + h * dim, x + ((int64_t)h * stride + i) * dim, (size_t)dim * sizeof(float));
    return t;
}

static void check_attention(const cJSON *test, const cJSON *input, enum kv_format format)
{
    struct fixture *f = fixture_open(2, 1);
    int H = vectors_int(input, "H"), G = vectors_int(input, "G"), m = vectors_int(input, "m");
    int dim = vectors_int(input, "d"), layer = vectors_int(test, "layer");
    int stride = m + vectors_int(input, "extra"), q_rows = stride - vectors_int(input, "q_first"), pages = m / 16 + 1;
    size_t n_values;
    float *Q = vectors_array(vectors_get(input, "Q"), NULL), *K = vectors_array(vectors_get(input, "K"), NULL);
    float *V = vectors_array(vectors_get(input, "V"), &n_values);
    const cJSON *v_layers = vectors_get(input, "v_layers"),
                *want = vectors_get(vectors_get(test, "outputs"), format_names[format]);
    int v_stride = (int)(n_values / (size_t)(cJSON_GetArraySize(v_layers) * G * dim));
    CHECK(cJSON_GetArrayItem(v_layers, 0)->valueint == layer && cJSON_GetArraySize(want) == H);
    struct kv_view kv = fixture_cache(f, 1, G, pages, G * pages, 16, dim);
    struct attention_heads heads = {H, G, dim, 0, 1 / sqrtf((float)dim)};
    if (format != KV_PLAIN) fixture_quantise(f, &kv, format);
    append_prompt(f, &kv, &heads, 0, rows_of(f, K + (int64_t)layer * G * stride * dim, G, m, stride, dim),
                  rows_of(f, V, G, m, v_stride, dim));
    if (format != KV_PLAIN) CHECK_OK(ops_kv_quantise(&f->ops, &kv, 0));
    struct tensor q = fixture_3d(f, 1, H, dim, 0), out = fixture_3d(f, 1, H, dim, 0);
    const float *last = Q + ((int64_t)layer * H * q_rows + (m - 1 - vectors_int(input, "q_first"))) * dim;
    for (int h = 0; h < H; h++)
        memcpy(fixture_row(q, 0) + h * dim, last + (int64_t)h * q_rows * dim, (size_t)dim * sizeof(float));
    const int32_t slot[1] = {0};
    CHECK_OK(ops_attention_decode(&f->ops, out, q, &(struct seq_batch){.n_seqs = 1, .n_tokens = 1, .slot = slot}, &kv,
                                  &heads));
    for (int h = 0; h < H; h++) {
        float row[256];
        for (int d = 0; d < dim; d++) row[d] = (float)cJSON_GetArrayItem(cJSON_GetArrayItem(want, h), d)->valuedouble;
        CHECK_CLOSE(fixture_row(out, 0) + h * dim, row, dim, 2e-5);
    }
    free(Q), free(K), free(V);
    fixture_close(f);
}

static void test_attention_vectors(void)
{
    cJSON *file = vectors_load("kv_dtype"), *inputs = vectors_load("inputs");
    const cJSON *test;
    int n = 0;
    cJSON_ArrayForEach (test, vectors_get(file, "cases")) {
        if (strcmp(vectors_string(test, "kind"), "attention")) continue;
        const cJSON *input = vectors_get(vectors_get(inputs, "inputs"), vectors_string(test, "input"));
        for (int format = KV_PLAIN; format < KV_FORMAT_N; format++)
            check_attention(test, input, (enum kv_format)format);
        n++;
    }
    CHECK(n == 3);
    cJSON_Delete(file);
    cJSON_Delete(inputs);
}

/* ---- random work against plain arrays ---- */

enum { SLOTS = 4, KV_HEADS = 2, LAYERS = 2, LANES = KV_HEADS * LAYERS, DIM = 24, LONGEST = 400 };

/* The same cache as plain arrays: keys and values of each lane's tokens, before any quantising. */
struct model {
    int length[SLOTS * LANES];
    bool quantised[SLOTS];
    enum kv_format format[SLOTS];
    float row[SLOTS * LANES][LONGEST][2][DIM];
};

static int row_same(const struct kv_view *kv, int lane, int i, bool value, enum kv_format format, const float *x)
{
    if (format == KV_PLAIN)
        return fixture_same(value ? fixture_value(kv, lane, i) : fixture_key(kv, lane, i), x, DIM * sizeof *x);
    uint32_t largest = 0;
    for (int d = 0; d < DIM; d++)
        if (quantise_magnitude(x[d]) > largest) largest = quantise_magnitude(x[d]);
    float scale = quantise_scale(format, largest);
    int same = scale_of(kv, lane, i, value) == scale;
    for (int d = 0; d < DIM; d++) same &= codes_of(kv, lane, i, value)[d] == quantise_code(format, x[d], scale);
    return same;
}

static int same_as_model(const struct kv_view *kv, const struct model *m)
{
    for (int lane = 0; lane < SLOTS * LANES; lane++) {
        enum kv_format format = m->quantised[lane / LANES] ? m->format[lane / LANES] : KV_PLAIN;
        if (kv->lane_len[lane] != m->length[lane] || kv->lane_format[lane] != (int)format) return 0;
        for (int i = 0; i < m->length[lane]; i++)
            if (!row_same(kv, lane, i, false, format, m->row[lane][i][0]) ||
                !row_same(kv, lane, i, true, format, m->row[lane][i][1]))
                return 0;
    }
    return 1;
}

/* n tokens for all layers of a slot, as a prompt's rows or a step's token. */
static void append(struct fixture *f, const struct kv_view *kv, struct model *m, int slot, int n, bool decode)
{
    for (int layer = 0; layer < LAYERS; layer++) {
        struct attention_heads heads = {KV_HEADS, KV_HEADS, DIM, layer * KV_HEADS, 1};
        struct tensor k = fixture_3d(f, n, KV_HEADS, DIM, 3), v = fixture_3d(f, n, KV_HEADS, DIM, 0);
        for (int i = 0; i < n && fixture_int(f, 0, 9) == 0; i++) memset(fixture_row(v, i), 0, DIM * sizeof(float));
        for (int h = 0; h < KV_HEADS; h++)
            for (int i = 0; i < n; i++) {
                int lane = slot * LANES + layer * KV_HEADS + h, at = m->length[lane]++;
                memcpy(m->row[lane][at][0], fixture_row(k, i) + h * DIM, DIM * sizeof(float));
                memcpy(m->row[lane][at][1], fixture_row(v, i) + h * DIM, DIM * sizeof(float));
            }
        int32_t one[1] = {slot};
        if (decode)
            CHECK_OK(
                ops_kv_append(&f->ops, kv, &heads, k, v, &(struct seq_batch){.n_seqs = 1, .n_tokens = 1, .slot = one}));
        else
            append_prompt(f, kv, &heads, slot, k, v);
    }
}

static void pack(struct fixture *f, const struct kv_view *kv, struct model *m, int slot)
{
    int32_t *keep = fixture_take(f, sizeof *keep * LANES * LONGEST), n_keep[LANES];
    for (int i = 0; i < LANES; i++) {
        int lane = slot * LANES + i, n = 0, share = fixture_int(f, 0, 10);
        for (int j = 0; j < m->length[lane]; j++)
            if (fixture_int(f, 1, 10) <= share) {
                memmove(m->row[lane][n], m->row[lane][j], sizeof m->row[lane][j]);
                keep[i * LONGEST + n++] = j;
            }
        m->length[lane] = n_keep[i] = n;
    }
    CHECK_OK(ops_kv_pack(&f->ops, kv, slot, 0, LANES, keep, LONGEST, n_keep));
}

static int longest_of(const struct model *m, int slot)
{
    int longest = 0;
    for (int i = 0; i < LANES; i++)
        if (m->length[slot * LANES + i] > longest) longest = m->length[slot * LANES + i];
    return longest;
}

/* Back to plain lanes: codes times scales. */
static void widen(struct fixture *f, const struct kv_view *kv, struct model *m, int slot)
{
    for (int lane = slot * LANES; lane < (slot + 1) * LANES; lane++)
        for (int i = 0; i < m->length[lane]; i++)
            for (int value = 0; value < 2; value++)
                for (int d = 0; d < DIM; d++)
                    m->row[lane][i][value][d] =
                        quantise_value(m->format[slot], codes_of(kv, lane, i, value)[d]) * scale_of(kv, lane, i, value);
    m->quantised[slot] = false;
    CHECK_OK(ops_kv_widen(&f->ops, kv, slot));
    if (fixture_int(f, 0, 1)) CHECK_OK(ops_kv_widen(&f->ops, kv, slot)); /* changes nothing */
}

/* A prompt and perhaps a pack, then quantised in the format of the moment; tokens; perhaps plain again, for the rows of
 * a second prompt; a release. */
static void act(struct fixture *f, struct kv_view *kv, struct model *m, int slot)
{
    int longest = longest_of(m, slot), kind = fixture_int(f, 0, 9);
    if (longest == 0 && !m->quantised[slot]) {
        append(f, kv, m, slot, fixture_int(f, 1, LONGEST - 50), false);
    } else if (m->quantised[slot] && kind < 3) {
        widen(f, kv, m, slot);
        if (longest < LONGEST) append(f, kv, m, slot, fixture_int(f, 1, LONGEST - longest), false);
    } else if (!m->quantised[slot]) {
        if (fixture_int(f, 0, 1)) pack(f, kv, m, slot);
        if (fixture_int(f, 0, 3) == 0) kv->format = formats[fixture_int(f, 0, 1)];
        m->quantised[slot] = true;
        m->format[slot] = kv->format;
        CHECK_OK(ops_kv_quantise(&f->ops, kv, slot));
        if (fixture_int(f, 0, 1)) CHECK_OK(ops_kv_quantise(&f->ops, kv, slot)); /* changes nothing */
    } else if (kind == 3 || longest == LONGEST) {
        enum kv_format format = kv->format;
        kv->format = KV_PLAIN; /* lanes know how they are stored */
        CHECK_OK(ops_kv_release(&f->ops, kv, slot));
        kv->format = format;
        m->quantised[slot] = false;
        for (int i = 0; i < LANES; i++) m->length[slot * LANES + i] = 0;
    } else {
        append(f, kv, m, slot, 1, true);
    }
}

static void run_random(int page_size, uint64_t seed)
{
    struct model *m = calloc(1, sizeof *m);
    if (!m) abort();
    for (int round = 0; round < 2; round++) {
        struct fixture *f = fixture_open(2, seed + (uint64_t)round);
        int max_pages = (LONGEST + page_size - 1) / page_size;
        struct kv_view kv = fixture_cache(f, SLOTS, LANES, max_pages, SLOTS * LANES * max_pages, page_size, DIM);
        fixture_quantise(f, &kv, formats[round & 1]);
        memset(m, 0, sizeof *m);
        for (int step = 0; step < 150; step++) {
            act(f, &kv, m, fixture_int(f, 0, SLOTS - 1));
            CHECK(fixture_pages_ok(&kv));
            CHECK(same_as_model(&kv, m));
        }
        CHECK(*kv.error == 0);
        for (int slot = 0; slot < SLOTS; slot++) CHECK_OK(ops_kv_release(&f->ops, &kv, slot));
        CHECK(*kv.free_count == kv.n_pages && fixture_pages_ok(&kv));
        fixture_close(f);
    }
    free(m);
}

static void test_random(void)
{
    run_random(16, 1);
    run_random(1, 5);
    run_random(7, 9);
}

/* ---- the way back ---- */

/* Rows of all sizes, of zeros, of one element: what is quantised once more has the same codes, and its scale but for
 * the rounding of a product and a quotient. */
static void check_again(enum kv_format format, int dim, int n, uint64_t seed)
{
    struct fixture *f = fixture_open(2, seed);
    const int pages = (n + 15) / 16;
    struct kv_view kv = fixture_cache(f, 1, KV_HEADS, pages, KV_HEADS * pages, 16, dim);
    const struct attention_heads heads = {KV_HEADS, KV_HEADS, dim, 0, 1};
    struct tensor k = fixture_3d(f, n, KV_HEADS, dim, 0), v = fixture_3d(f, n, KV_HEADS, dim, 3);
    uint8_t *code = fixture_take(f, (size_t)(KV_HEADS * n * 2 * dim));
    float *scale = fixture_take(f, sizeof *scale * (size_t)(KV_HEADS * n * 2));
    for (int i = 0; i < n; i++)
        for (int d = 0; d < KV_HEADS * dim; d++) {
            fixture_row(k, i)[d] = i % 7 == 3 ? 0 : ldexpf(fixture_row(k, i)[d], i % 60 - 30);
            if (i % 5 == 2 && d % dim != i % dim) fixture_row(v, i)[d] = 0;
        }
    fixture_quantise(f, &kv, format);
    append_prompt(f, &kv, &heads, 0, k, v);
    for (int turn = 0; turn < 3; turn++) {
        CHECK_OK(ops_kv_quantise(&f->ops, &kv, 0));
        for (int row = 0; row < KV_HEADS * n * 2; row++) {
            const int lane = row / 2 / n, i = row / 2 % n;
            const uint8_t *now = codes_of(&kv, lane, i, row % 2);
            const float by = scale_of(&kv, lane, i, row % 2);
            if (turn) CHECK(fixture_same(now, code + row * dim, (size_t)dim) && fabsf(by - scale[row]) <= 3e-7f * by);
            memcpy(code + row * dim, now, (size_t)dim);
            scale[row] = by;
        }
        CHECK_OK(ops_kv_widen(&f->ops, &kv, 0));
        for (int row = 0; row < KV_HEADS * n * 2; row++) {
            const float *x =
                row % 2 ? fixture_value(&kv, row / 2 / n, row / 2 % n) : fixture_key(&kv, row / 2 / n, row / 2 % n);
            for (int d = 0; d < dim; d++) CHECK(x[d] == quantise_value(format, code[row * dim + d]) * scale[row]);
        }
        CHECK(fixture_pages_ok(&kv) && *kv.free_count == 0 && *kv.error == 0);
    }
    fixture_close(f);
}

static void test_again(void)
{
    static const int dims[] = {8, 64, 65, 128, 200}, lengths[] = {1, 15, 16, 17, 63, 64, 65, 129};
    for (int i = 0; i < 16; i++) check_again(formats[i % 2], dims[i % 5], lengths[i % 8], (uint64_t)i);
}

/* Lanes that find no page stay as they are, the others become plain. */
static void test_no_page(void)
{
    struct fixture *f = fixture_open(1, 6);
    struct kv_view kv = fixture_cache(f, 2, 2, 5, 13, 4, 8); /* 16 codes a page */
    const struct attention_heads heads = {2, 2, 8, 0, 1};
    struct tensor x = fixture_3d(f, 20, 2, 8, 0);
    fixture_quantise(f, &kv, KV_INT8);
    append_prompt(f, &kv, &heads, 0, x, x); /* 10 pages, then 4 */
    CHECK_OK(ops_kv_quantise(&f->ops, &kv, 0));
    append_prompt(f, &kv, &heads, 1, tensor_rows(x, 0, 9), tensor_rows(x, 0, 9)); /* 6 */
    CHECK(*kv.free_count == 3);
    const uint8_t code = codes_of(&kv, 1, 19, true)[7];
    CHECK_OK(ops_kv_widen(&f->ops, &kv, 0));
    CHECK(*kv.error == KV_ERROR_NO_FREE_PAGE && *kv.free_count == 0 && fixture_pages_ok(&kv));
    CHECK(kv.lane_format[0] == KV_PLAIN && kv.lane_format[1] == KV_INT8 && codes_of(&kv, 1, 19, true)[7] == code);
    CHECK_OK(ops_kv_release(&f->ops, &kv, 1));
    *kv.error = 0;
    CHECK_OK(ops_kv_widen(&f->ops, &kv, 0));
    CHECK(*kv.error == 0 && kv.lane_format[1] == KV_PLAIN && *kv.free_count == 3 && fixture_pages_ok(&kv));
    CHECK(fabsf(fixture_value(&kv, 1, 19)[7] - fixture_row(x, 19)[15]) < 0.02f);
    CHECK_OK(ops_kv_quantise(&f->ops, &kv, 0));
    kv.max_pages = 4; /* one too few */
    int32_t *row = fixture_take(f, sizeof *row * 16);
    for (int lane = 0; lane < 4; lane++) memcpy(row + 4 * lane, kv.page_row + 5 * lane, sizeof *row * 4);
    kv.page_row = row;
    CHECK_OK(ops_kv_widen(&f->ops, &kv, 0));
    CHECK(*kv.error == KV_ERROR_LANE_FULL && kv.lane_format[0] == KV_INT8 && fixture_pages_ok(&kv));
    fixture_close(f);
}

/* ---- attention over random lanes, against double precision on the numbers that the codes stand for ---- */

static void want_attention(double *out, const float *q, const struct kv_view *kv, int lane, int dim, double scale)
{
    const int n = kv->lane_len[lane];
    const bool fp8 = kv->lane_format[lane] == KV_FP8;
    double *logit = calloc((size_t)n + 1, sizeof *logit), top = -INFINITY, sum = 0;
    float wide[128];
    if (!logit) abort();
    for (int i = 0; i < n; i++) {
        vector__base.widen_codes(wide, codes_of(kv, lane, i, false), fp8, dim);
        for (int d = 0; d < dim; d++)
            logit[i] += scale * (double)q[d] * (double)wide[d] * (double)scale_of(kv, lane, i, false);
        top = logit[i] > top ? logit[i] : top;
    }
    memset(out, 0, sizeof *out * (size_t)dim);
    for (int i = 0; i < n; i++) sum += exp(logit[i] - top);
    for (int i = 0; i < n; i++) {
        vector__base.widen_codes(wide, codes_of(kv, lane, i, true), fp8, dim);
        double weight = exp(logit[i] - top) / sum * (double)scale_of(kv, lane, i, true);
        for (int d = 0; d < dim; d++) out[d] += weight * (double)wide[d];
    }
    free(logit);
}

static void compare_decode(struct fixture *f, enum kv_format format, int n_kv_heads, int group, int dim, int longest)
{
    enum { ROWS = 4 };
    const int n_heads = n_kv_heads * group, max_pages = longest / 16 + 2;
    struct kv_view kv = fixture_cache(f, 3, n_kv_heads, max_pages, 3 * n_kv_heads * max_pages, 16, dim);
    struct attention_heads heads = {n_heads, n_kv_heads, dim, 0, 0.1f};
    const int32_t slot[ROWS] = {2, -1, 0, 1};
    struct seq_batch batch = {.n_seqs = ROWS, .n_tokens = ROWS, .slot = slot};
    fixture_quantise(f, &kv, format);
    for (int i = 0; i < 3; i++) {
        int n = i == 0 ? longest : fixture_int(f, 1, longest);
        append_prompt(f, &kv, &heads, i, fixture_3d(f, n, n_kv_heads, dim, 0), fixture_3d(f, n, n_kv_heads, dim, 0));
        CHECK_OK(ops_kv_quantise(&f->ops, &kv, i));
    }
    CHECK_OK(ops_kv_append(&f->ops, &kv, &heads, fixture_3d(f, ROWS, n_kv_heads, dim, 0),
                           fixture_3d(f, ROWS, n_kv_heads, dim, 1), &batch));
    struct tensor q = fixture_3d(f, ROWS, n_heads, dim, 3), out = fixture_3d(f, ROWS, n_heads, dim, 2);
    CHECK_OK(ops_attention_decode(&f->ops, out, q, &batch, &kv, &heads));
    for (int row = 0; row < ROWS; row++) {
        struct tensor alone = fixture_3d(f, 1, n_heads, dim, 0);
        struct seq_batch single = {.n_seqs = 1, .n_tokens = 1, .slot = slot + row};
        CHECK_OK(ops_attention_decode(&f->ops, alone, tensor_rows(q, row, 1), &single, &kv, &heads));
        CHECK(fixture_same(alone.data, fixture_row(out, row), sizeof(float) * (size_t)(n_heads * dim)));
        for (int h = 0; h < n_heads; h++) {
            double want[128] = {0};
            float rounded[128];
            if (slot[row] >= 0)
                want_attention(want, fixture_row(q, row) + h * dim, &kv, slot[row] * n_kv_heads + h / group, dim,
                               (double)heads.scale);
            for (int d = 0; d < dim; d++) rounded[d] = (float)want[d];
            CHECK_CLOSE(fixture_row(out, row) + h * dim, rounded, dim, 1e-5);
        }
    }
}

static void test_decode(void)
{
    struct fixture *f = fixture_open(2, 3);
    static const int groups[] = {1, 2, 5, 16}, dims[] = {64, 72, 20, 128};
    for (int i = 0; i < 8; i++)
        for (int longest = 1; longest < 1000; longest = longest * 6 + 1)
            compare_decode(f, formats[i & 1], 1 + i % 3, groups[i / 2], dims[(i + longest) % 4], longest);
    fixture_close(f);
}

/* ---- what is refused ---- */

static void test_refusals(void)
{
    struct fixture *f = fixture_open(1, 4);
    struct kv_view kv = fixture_cache(f, 2, 1, 3, 6, 4, 8);
    struct attention_heads heads = {1, 1, 8, 0, 1};
    const int32_t keep[1] = {0}, n_keep[1] = {1}, slots[1] = {1};
    struct tensor x = fixture_3d(f, 3, 1, 8, 0), out = fixture_3d(f, 1, 1, 8, 0);
    struct seq_batch one = {.n_seqs = 1, .n_tokens = 1, .slot = slots};
    CHECK_FAILS(ops_kv_quantise(&f->ops, &kv, 0), ERR_ARG, "plain");
    CHECK_FAILS(ops_kv_widen(&f->ops, &kv, 0), ERR_ARG, "plain");
    kv.format = KV_INT8;
    CHECK_FAILS(ops_kv_quantise(&f->ops, &kv, 0), ERR_ARG, "kv.scale is NULL");
    fixture_quantise(f, &kv, KV_FP8);
    CHECK_FAILS(ops_kv_quantise(&f->ops, &kv, 2), ERR_ARG, "slot 2");
    CHECK_FAILS(ops_kv_widen(&f->ops, &kv, -1), ERR_ARG, "slot -1");
    for (int slot = 0; slot < 2; slot++) append_prompt(f, &kv, &heads, slot, x, x);
    CHECK_OK(ops_kv_quantise(&f->ops, &kv, 0));
    CHECK_FAILS(ops_kv_pack(&f->ops, &kv, 0, 0, 1, keep, 1, n_keep), ERR_ARG, "quantised");
    append_prompt(f, &kv, &heads, 0, x, x);
    CHECK(*kv.error == KV_ERROR_QUANTISED && kv.lane_len[0] == 3 && fixture_pages_ok(&kv));
    CHECK_FAILS(ops_attention_decode(&f->ops, out, tensor_rows(x, 0, 1), &one, &kv, &heads), ERR_ARG, "format");
    kv.format = (enum kv_format)7;
    CHECK_FAILS(ops_kv_release(&f->ops, &kv, 0), ERR_ARG, "kv.format is 7");
    kv.format = KV_FP8;
    CHECK_OK(ops_kv_reset(&f->ops, &kv));
    CHECK(kv.lane_format[0] == KV_PLAIN && *kv.free_count == 6 && *kv.error == 0);
    fixture_close(f);
}

/* A token that is not finite makes what reads it not finite: it is not hidden. */
static void test_not_finite(void)
{
    for (int i = 0; i < 4; i++) {
        struct fixture *f = fixture_open(1, 5);
        struct kv_view kv = fixture_cache(f, 1, 1, 1, 1, 16, 8);
        struct attention_heads heads = {1, 1, 8, 0, 1};
        const int32_t slot[1] = {0};
        struct tensor x = fixture_3d(f, 3, 1, 8, 0), out = fixture_3d(f, 1, 1, 8, 0);
        fixture_quantise(f, &kv, formats[i & 1]);
        fixture_row(x, 1)[5] = i < 2 ? NAN : -INFINITY;
        append_prompt(f, &kv, &heads, 0, x, x);
        CHECK_OK(ops_kv_quantise(&f->ops, &kv, 0));
        CHECK(!isfinite(scale_of(&kv, 0, 1, true)) && isfinite(scale_of(&kv, 0, 2, true)));
        CHECK_OK(ops_attention_decode(&f->ops, out, tensor_rows(x, 0, 1),
                                      &(struct seq_batch){.n_seqs = 1, .n_tokens = 1, .slot = slot}, &kv, &heads));
        CHECK(isnan(fixture_row(out, 0)[0]));
        fixture_close(f);
    }
}

int main(void)
{
    return check_run("ops_quantised", (struct check_case[]){{"e4m3, decoded", test_fp8_table},
                                                            {"e4m3, encoded", test_fp8_encode},
                                                            {"rows of the oracle", test_rows},
                                                            {"attention of the oracle", test_attention_vectors},
                                                            {"random lanes and their pages", test_random},
                                                            {"plain again, and quantised again", test_again},
                                                            {"plain again without pages", test_no_page},
                                                            {"decode over quantised lanes", test_decode},
                                                            {"refusals", test_refusals},
                                                            {"values that are not finite", test_not_finite},
                                                            {0}});
}
