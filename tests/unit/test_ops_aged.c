/* Lanes in two parts: random prompts, packs, tokens, ageing and releases against plain lists, with the invariant of the
 * pages of both views; how many pages ageing needs; attention over both parts against double precision; refusals. */
#include "kernels/cpu/vector.h"
#include "kernels/quantise.h"
#include "tests/ops_fixture.h"

static const enum kv_format formats[] = {KV_INT8, KV_FP8};

static void append_prompt(struct fixture *f, const struct kv_view *kv, const struct attention_heads *heads, int slot,
                          struct tensor k, struct tensor v)
{
    int32_t cu[2] = {0, (int32_t)k.dim[0]}, one[1] = {slot};
    CHECK_OK(ops_kv_append(&f->ops, kv, heads, k, v, &(struct seq_batch){1, cu[1], one, cu, one, cu}));
}

/* ---- random work against lists ---- */

enum { SLOTS = 3, KV_HEADS = 2, LAYERS = 2, LANES = KV_HEADS * LAYERS, DIM = 24, LONGEST = 700 };

/* Keys and values of each lane in the order in which they came, and which of them each part holds. */
struct model {
    int n_rows[SLOTS * LANES], n_plain[SLOTS * LANES], n_aged[SLOTS * LANES];
    int plain[SLOTS * LANES][LONGEST], aged[SLOTS * LANES][LONGEST];
    enum kv_format format[SLOTS * LANES];
    float row[SLOTS * LANES][LONGEST][2][DIM];
};

static bool codes_same(const struct kv_view *kv, int lane, int i, bool value, const float *x)
{
    const enum kv_format format = (enum kv_format)kv->lane_format[lane];
    const int tokens = kv_page_tokens(kv, format), page = kv->page_row[lane * kv->max_pages + i / tokens];
    const int64_t at = (int64_t)page * 2 * tokens + (value ? tokens : 0) + i % tokens;
    uint32_t largest = 0;
    for (int d = 0; d < DIM; d++)
        if (quantise_magnitude(x[d]) > largest) largest = quantise_magnitude(x[d]);
    const float scale = quantise_scale(format, largest);
    bool same = kv->scale[at] == scale;
    for (int d = 0; d < DIM; d++)
        same &= ((const uint8_t *)kv->pool.data)[at * DIM + d] == quantise_code(format, x[d], scale);
    return same;
}

static bool same_as_model(const struct kv_view *kv, const struct kv_view *aged, const struct model *m)
{
    bool same = true;
    for (int lane = 0; lane < SLOTS * LANES && same; lane++) {
        same = kv->lane_len[lane] == m->n_plain[lane] && aged->lane_len[lane] == m->n_aged[lane];
        if (m->n_aged[lane]) same &= aged->lane_format[lane] == (int)m->format[lane];
        for (int i = 0; i < m->n_plain[lane] && same; i++) {
            const float(*row)[DIM] = m->row[lane][m->plain[lane][i]];
            same = fixture_same(fixture_key(kv, lane, i), row[0], sizeof *row) &&
                   fixture_same(fixture_value(kv, lane, i), row[1], sizeof *row);
        }
        for (int i = 0; i < m->n_aged[lane] && same; i++)
            for (int value = 0; value < 2; value++)
                same &= codes_same(aged, lane, i, value, m->row[lane][m->aged[lane][i]][value]);
    }
    return same;
}

static void append(struct fixture *f, const struct kv_view *kv, struct model *m, int slot, int n, bool decode)
{
    for (int layer = 0; layer < LAYERS; layer++) {
        struct attention_heads heads = {KV_HEADS, KV_HEADS, DIM, layer * KV_HEADS, 1};
        struct tensor k = fixture_3d(f, n, KV_HEADS, DIM, 3), v = fixture_3d(f, n, KV_HEADS, DIM, 0);
        const int32_t one[1] = {slot};
        for (int h = 0; h < KV_HEADS; h++)
            for (int i = 0; i < n; i++) {
                const int lane = slot * LANES + layer * KV_HEADS + h, at = m->n_rows[lane]++;
                memcpy(m->row[lane][at][0], fixture_row(k, i) + h * DIM, DIM * sizeof(float));
                memcpy(m->row[lane][at][1], fixture_row(v, i) + h * DIM, DIM * sizeof(float));
                m->plain[lane][m->n_plain[lane]++] = at;
            }
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
        for (int j = 0; j < m->n_plain[lane]; j++)
            if (fixture_int(f, 1, 10) <= share) {
                m->plain[lane][n] = m->plain[lane][j];
                keep[i * LONGEST + n++] = j;
            }
        m->n_plain[lane] = n_keep[i] = n;
    }
    CHECK_OK(ops_kv_pack(&f->ops, kv, slot, 0, LANES, keep, LONGEST, n_keep));
}

static void age(struct fixture *f, const struct kv_view *kv, const struct kv_view *aged, struct model *m, int slot,
                int sinks, int window)
{
    const int stay = sinks + window;
    for (int lane = slot * LANES; lane < (slot + 1) * LANES; lane++) {
        const int n = m->n_plain[lane] - stay;
        if (n <= 0) continue;
        if (m->n_aged[lane] == 0) m->format[lane] = aged->format;
        memcpy(m->aged[lane] + m->n_aged[lane], m->plain[lane] + sinks, (size_t)n * sizeof(int));
        memmove(m->plain[lane] + sinks, m->plain[lane] + sinks + n, (size_t)window * sizeof(int));
        m->n_aged[lane] += n, m->n_plain[lane] = stay;
    }
    CHECK_OK(ops_kv_age(&f->ops, kv, aged, slot, sinks, window));
}

static void release(struct fixture *f, const struct kv_view *kv, const struct kv_view *aged, struct model *m, int slot)
{
    CHECK_OK(ops_kv_release(&f->ops, aged, slot));
    CHECK_OK(ops_kv_release(&f->ops, kv, slot));
    for (int lane = slot * LANES; lane < (slot + 1) * LANES; lane++)
        m->n_rows[lane] = m->n_plain[lane] = m->n_aged[lane] = 0;
}

static void run_random(int page_size, int sinks, int window, uint64_t seed)
{
    struct model *m = calloc(1, sizeof *m);
    struct fixture *f = fixture_open(2, seed);
    const int max_pages = (LONGEST + page_size - 1) / page_size;
    if (!m) abort();
    struct kv_view kv = fixture_cache(f, SLOTS, LANES, max_pages, SLOTS * LANES * (max_pages + 8), page_size, DIM);
    struct kv_view aged = fixture_aged(f, &kv, formats[seed % 2]);
    for (int step = 0; step < 70; step++) {
        const int slot = fixture_int(f, 0, SLOTS - 1), n = m->n_rows[slot * LANES];
        if (n == 0) {
            append(f, &kv, m, slot, fixture_int(f, 1, 500), false);
            if (fixture_int(f, 0, 2)) pack(f, &kv, m, slot);
            if (fixture_int(f, 0, 3) == 0) aged.format = formats[fixture_int(f, 0, 1)]; /* of lanes that begin */
            age(f, &kv, &aged, m, slot, sinks, window);
        } else if (fixture_int(f, 0, 9) == 0 || n > LONGEST - 40) {
            release(f, &kv, &aged, m, slot);
        } else {
            for (int i = fixture_int(f, 1, 20); i > 0; i--) append(f, &kv, m, slot, 1, true);
            if (fixture_int(f, 0, 1)) age(f, &kv, &aged, m, slot, sinks, window);
        }
        CHECK(fixture_parts_ok(&kv, &aged));
        CHECK(same_as_model(&kv, &aged, m));
    }
    CHECK(*kv.error == 0);
    for (int slot = 0; slot < SLOTS; slot++) release(f, &kv, &aged, m, slot);
    CHECK(*kv.free_count == kv.n_pages && fixture_parts_ok(&kv, &aged));
    fixture_close(f);
    free(m);
}

static void test_random(void)
{
    run_random(16, 4, 32, 1);
    run_random(16, 0, 1, 2);
    run_random(16, 1, 0, 3);
    run_random(16, 7, 90, 4);
    run_random(16, 0, 2000, 5); /* nothing ages */
    run_random(1, 3, 5, 6);
    run_random(7, 2, 20, 7);
}

/* ---- pages: what kv_age_pages says is enough, and one less is an error that changes nothing ---- */

static void check_pages(int length, int sinks, int window)
{
    const int stay = sinks + window, more = kv_age_pages(length, stay, 16, 64), pages = (length + 15) / 16;
    CHECK(more <= (stay + 15) / 16);
    for (int less = 0; less < (more ? 2 : 1); less++) {
        struct fixture *f = fixture_open(1, (uint64_t)length);
        struct kv_view kv = fixture_cache(f, 1, 1, pages, pages + more - less, 16, 8);
        struct kv_view aged = fixture_aged(f, &kv, KV_INT8);
        struct attention_heads heads = {1, 1, 8, 0, 1};
        struct tensor x = fixture_3d(f, length, 1, 8, 0);
        append_prompt(f, &kv, &heads, 0, x, x);
        CHECK(*kv.free_count == more - less);
        CHECK_OK(ops_kv_age(&f->ops, &kv, &aged, 0, sinks, window));
        CHECK(*kv.error == (less ? KV_ERROR_NO_FREE_PAGE : 0));
        const int left = less || length < stay ? length : stay;
        CHECK(kv.lane_len[0] == left && aged.lane_len[0] == length - left && fixture_parts_ok(&kv, &aged));
        CHECK(*kv.free_count == kv.n_pages - (left + 15) / 16 - (length - left + 63) / 64);
        CHECK(fixture_same(fixture_key(&kv, 0, 0), fixture_row(x, less || sinks || length <= stay ? 0 : length - stay),
                           8 * sizeof(float)));
        fixture_close(f);
    }
}

static void test_pages(void)
{
    for (int length = 1; length < 400; length += length < 140 ? 1 : 37) {
        check_pages(length, 4, 32);
        check_pages(length, 0, 1);
        check_pages(length, 20, 0);
        check_pages(length, 5, 200);
    }
}

/* ---- attention ---- */

/* A lane's tokens with the numbers that they are read as. */
static int read_lane(const struct kv_view *kv, int lane, double (*rows)[2][128], int n)
{
    float wide[128];
    const bool plain = kv->format == KV_PLAIN;
    for (int i = 0; i < kv->lane_len[lane]; i++, n++)
        for (int value = 0; value < 2; value++) {
            const int tokens = kv_page_tokens(kv, kv->format), page = kv->page_row[lane * kv->max_pages + i / tokens];
            const int64_t at = (int64_t)page * 2 * tokens + (value ? tokens : 0) + i % tokens;
            if (plain)
                memcpy(wide, value ? fixture_value(kv, lane, i) : fixture_key(kv, lane, i),
                       sizeof(float) * kv->head_dim);
            else
                vector__base.widen_codes(wide, (const uint8_t *)kv->pool.data + at * kv->head_dim, kv->format == KV_FP8,
                                         kv->head_dim);
            for (int d = 0; d < kv->head_dim; d++)
                rows[n][value][d] = (double)wide[d] * (plain ? 1 : (double)kv->scale[at]);
        }
    return n;
}

static void want_attention(float *out, const float *q, double (*rows)[2][128], int n, int dim, double scale)
{
    double *logit = calloc((size_t)n + 1, sizeof *logit), top = -INFINITY, sum = 0, total[128] = {0};
    if (!logit) abort();
    for (int i = 0; i < n; i++) {
        for (int d = 0; d < dim; d++) logit[i] += scale * (double)q[d] * rows[i][0][d];
        top = logit[i] > top ? logit[i] : top;
    }
    for (int i = 0; i < n; i++) sum += exp(logit[i] - top);
    for (int i = 0; i < n; i++)
        for (int d = 0; d < dim; d++) total[d] += exp(logit[i] - top) / sum * rows[i][1][d];
    for (int d = 0; d < dim; d++) out[d] = (float)total[d];
    free(logit);
}

static void compare_decode(struct fixture *f, enum kv_format format, int n_kv_heads, int group, int dim, int longest,
                           int sinks, int window)
{
    enum { ROWS = 4 };
    const int n_heads = n_kv_heads * group, max_pages = longest / 16 + 2;
    struct kv_view kv = fixture_cache(f, 3, n_kv_heads, max_pages, 6 * n_kv_heads * max_pages, 16, dim);
    struct kv_view aged = fixture_aged(f, &kv, format);
    const struct attention_heads heads = {n_heads, n_kv_heads, dim, 0, 0.1f};
    const int32_t slot[ROWS] = {2, -1, 0, 1};
    const struct seq_batch batch = {.n_seqs = ROWS, .n_tokens = ROWS, .slot = slot};
    double(*rows)[2][128] = fixture_take(f, sizeof *rows * (size_t)(longest + 1));
    for (int i = 0; i < 3; i++) {
        const int n = i == 0 ? longest : fixture_int(f, 1, longest);
        append_prompt(f, &kv, &heads, i, fixture_3d(f, n, n_kv_heads, dim, 0), fixture_3d(f, n, n_kv_heads, dim, 0));
        CHECK_OK(ops_kv_age(&f->ops, &kv, &aged, i, sinks, window));
    }
    CHECK_OK(ops_decode_begin_aged(&f->ops, &batch, &kv, &aged));
    CHECK_OK(ops_kv_append(&f->ops, &kv, &heads, fixture_3d(f, ROWS, n_kv_heads, dim, 0),
                           fixture_3d(f, ROWS, n_kv_heads, dim, 1), &batch));
    struct tensor q = fixture_3d(f, ROWS, n_heads, dim, 3), out = fixture_3d(f, ROWS, n_heads, dim, 2);
    struct tensor alone = fixture_3d(f, 1, n_heads, dim, 0), plain = fixture_3d(f, 1, n_heads, dim, 0);
    const size_t head_bytes = sizeof(float) * (size_t)dim;
    CHECK_OK(ops_attention_decode_aged(&f->ops, out, q, &batch, &kv, &aged, &heads));
    for (int row = 0; row < ROWS; row++) {
        const struct seq_batch single = {.n_seqs = 1, .n_tokens = 1, .slot = slot + row};
        CHECK_OK(ops_attention_decode_aged(&f->ops, alone, tensor_rows(q, row, 1), &single, &kv, &aged, &heads));
        CHECK_OK(ops_attention_decode(&f->ops, plain, tensor_rows(q, row, 1), &single, &kv, &heads));
        CHECK(fixture_same(alone.data, fixture_row(out, row), head_bytes * (size_t)n_heads));
        for (int h = 0; h < n_heads; h++) {
            float want[128] = {0};
            const float *got = fixture_row(out, row) + h * dim;
            const int lane = slot[row] * n_kv_heads + h / group;
            if (slot[row] >= 0) {
                const int n = read_lane(&kv, lane, rows, read_lane(&aged, lane, rows, 0));
                want_attention(want, fixture_row(q, row) + h * dim, rows, n, dim, (double)heads.scale);
            }
            CHECK_CLOSE(got, want, dim, 1e-5);
            if (slot[row] < 0 || aged.lane_len[lane] == 0)
                CHECK(fixture_same(got, fixture_row(plain, 0) + h * dim, head_bytes));
        }
    }
}

static void test_decode(void)
{
    static const int groups[] = {1, 2, 5, 16}, dims[] = {64, 72, 20, 128}, windows[] = {32, 1, 300, 5000};
    for (int i = 0; i < 8; i++)
        for (int longest = 1; longest < 1000; longest = longest * 6 + 1) {
            struct fixture *f = fixture_open(2, (uint64_t)(i + longest));
            compare_decode(f, formats[i & 1], 1 + i % 3, groups[i / 2], dims[(i + longest) % 4], longest, 4 * (i % 3),
                           windows[(i + longest) % 4]);
            fixture_close(f);
        }
}

/* Where the plain part is empty the aged one is all; where it holds all the weight the result is its own. */
static void test_one_part(void)
{
    struct fixture *f = fixture_open(1, 3);
    struct kv_view kv = fixture_cache(f, 1, 1, 8, 32, 16, 16), aged = fixture_aged(f, &kv, KV_INT8), alone;
    const struct attention_heads heads = {2, 1, 16, 0, 1};
    const int32_t slot[1] = {0};
    const struct seq_batch batch = {.n_seqs = 1, .n_tokens = 1, .slot = slot};
    struct tensor x = fixture_3d(f, 100, 1, 16, 0), q = fixture_3d(f, 1, 2, 16, 0);
    struct tensor out = fixture_3d(f, 1, 2, 16, 0), want = fixture_3d(f, 1, 2, 16, 0);
    append_prompt(f, &kv, &heads, 0, x, x);
    CHECK_OK(ops_kv_age(&f->ops, &kv, &aged, 0, 0, 0));
    CHECK(kv.lane_len[0] == 0 && aged.lane_len[0] == 100 && fixture_parts_ok(&kv, &aged));
    alone = aged;
    CHECK_OK(ops_attention_decode_aged(&f->ops, out, q, &batch, &kv, &aged, &heads));
    CHECK_OK(ops_attention_decode(&f->ops, want, q, &batch, &alone, &heads));
    CHECK(fixture_same(out.data, want.data, 32 * sizeof(float)));
    for (int d = 0; d < 16; d++) fixture_row(x, 0)[d] = 100 * fixture_row(q, 0)[d];
    memcpy(fixture_row(q, 0) + 16, fixture_row(q, 0), 16 * sizeof(float));
    append_prompt(f, &kv, &heads, 0, tensor_rows(x, 0, 1), tensor_rows(x, 0, 1));
    CHECK_OK(ops_attention_decode_aged(&f->ops, out, q, &batch, &kv, &aged, &heads));
    CHECK_CLOSE(fixture_row(out, 0), fixture_row(x, 0), 16, 1e-6);
    fixture_close(f);
}

/* ---- what is refused ---- */

static void test_refusals(void)
{
    struct fixture *f = fixture_open(1, 4);
    struct kv_view kv = fixture_cache(f, 2, 1, 3, 6, 4, 8), aged = fixture_aged(f, &kv, KV_FP8), wrong = aged;
    const struct attention_heads heads = {1, 1, 8, 0, 1};
    const int32_t slots[1] = {1};
    const struct seq_batch one = {.n_seqs = 1, .n_tokens = 1, .slot = slots};
    struct tensor x = fixture_3d(f, 3, 1, 8, 0), out = fixture_3d(f, 1, 1, 8, 0);
    CHECK_FAILS(ops_kv_age(&f->ops, &kv, &aged, 2, 0, 1), ERR_ARG, "slot 2");
    CHECK_FAILS(ops_kv_age(&f->ops, &kv, &aged, 0, -1, 1), ERR_ARG, "-1 first");
    CHECK_FAILS(ops_kv_age(&f->ops, &kv, &aged, 0, INT32_MAX, 1), ERR_ARG, "newest");
    CHECK_FAILS(ops_kv_age(&f->ops, &kv, &kv, 0, 0, 1), ERR_ARG, "format");
    wrong.page_row = kv.page_row;
    CHECK_FAILS(ops_kv_age(&f->ops, &kv, &wrong, 0, 0, 1), ERR_ARG, "tables of their own");
    wrong = aged;
    wrong.free_count = kv.error;
    CHECK_FAILS(ops_decode_begin_aged(&f->ops, &one, &kv, &wrong), ERR_ARG, "two views of one cache");
    CHECK_FAILS(ops_attention_decode_aged(&f->ops, out, x, &one, &kv, &aged, &heads), ERR_ARG, "q is");
    const struct ops_limits limits = {.max_tokens = 16,
                                      .max_seqs = 2,
                                      .max_context = 64,
                                      .max_in_features = 64,
                                      .max_heads = 4,
                                      .head_dim = 8,
                                      .vocab_size = 64,
                                      .max_lanes = 2};
    size_t bytes, with;
    struct ops_limits both = limits;
    both.aged = true;
    CHECK_OK(ops_reserve(&f->ops, &both, &with, true));
    CHECK_OK(ops_reserve(&f->ops, &limits, &bytes, false));
    CHECK(with >= bytes);
    CHECK_FAILS(ops_attention_decode_aged(&f->ops, out, tensor_rows(x, 0, 1), &one, &kv, &aged, &heads), ERR_BUG,
                "ops_reserve");
    fixture_close(f);
}

int main(void)
{
    return check_run("ops_aged", (struct check_case[]){{"random lanes and their pages", test_random},
                                                       {"pages that ageing takes", test_pages},
                                                       {"decode over both parts", test_decode},
                                                       {"one part alone", test_one_part},
                                                       {"refusals", test_refusals},
                                                       {0}});
}
