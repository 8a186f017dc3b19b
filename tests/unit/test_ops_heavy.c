/* H2O's account of plain lanes and of lanes in 8 bits, against double precision on the numbers that they hold: scores,
 * who goes, where the others stand, their keys and values bit by bit, and the invariant of the pages. */
#include "kernels/cpu/vector.h"
#include "kernels/quantise.h"
#include "tests/ops_fixture.h"

enum { SLOTS = 3, KV_HEADS = 2, LANES = KV_HEADS, MOST_DIM = 72, LONGEST = 150, STEPS = 40, STRIDE = LONGEST + STEPS };

/* A token's key and value as the lane holds them: elements, or codes; their scales. */
struct row {
    float element[MOST_DIM];
    uint8_t code[MOST_DIM];
    float scale;
};
struct entry {
    struct row key, value;
    double score;
    bool here;
};

/* A lane's tokens by their position. */
struct lane_model {
    struct entry entry[STRIDE];
    int n;
};

struct account {
    struct fixture *f;
    struct kv_view kv;
    struct attention_heads heads;
    struct heavy_hitters heavy;
    struct lane_model *lane; /* [SLOTS * LANES] */
    int length[SLOTS];       /* tokens of each sequence so far */
};

static struct row read_row(const struct kv_view *kv, int lane, int i, bool value)
{
    struct row r = {.scale = 1};
    const enum kv_format format = (enum kv_format)kv->lane_format[lane];
    const int tokens = kv_page_tokens(kv, format), dim = kv->head_dim;
    const int64_t page = kv->page_row[lane * kv->max_pages + i / tokens];
    const int64_t row = (page * 2 + value) * tokens + i % tokens;
    if (format == KV_PLAIN) {
        memcpy(r.element, (const float *)kv->pool.data + row * dim, (size_t)dim * sizeof(float));
        return r;
    }
    r.scale = kv->scale[row];
    memcpy(r.code, (const uint8_t *)kv->pool.data + row * dim, (size_t)dim);
    vector__base.widen_codes(r.element, r.code, format == KV_FP8, dim);
    return r;
}

static struct account open_account(uint64_t seed, enum kv_format format, int group, int page_size, int dim)
{
    struct account a = {.f = fixture_open(2, seed), .heads = {KV_HEADS * group, KV_HEADS, dim, 0, 0.4f}};
    const int max_pages = STRIDE / page_size + 2;
    a.kv = fixture_cache(a.f, SLOTS, LANES, max_pages, SLOTS * LANES * max_pages, page_size, dim);
    fixture_quantise(a.f, &a.kv, format == KV_PLAIN ? KV_INT8 : format);
    a.kv.format = format;
    a.heavy = (struct heavy_hitters){.score = fixture_take(a.f, sizeof(float) * SLOTS * LANES * STRIDE),
                                     .position = fixture_take(a.f, sizeof(int32_t) * SLOTS * LANES * STRIDE),
                                     .limit = fixture_take(a.f, sizeof(int32_t) * SLOTS * LANES),
                                     .recent = fixture_take(a.f, sizeof(int32_t) * SLOTS * LANES),
                                     .stride = STRIDE};
    a.lane = fixture_take(a.f, sizeof *a.lane * SLOTS * LANES);
    return a;
}

/* One entry, a page's border, all of the prompt, just any; slot 1 has no limits. */
static int choose_limit(struct account *a, int slot, int lane, int m)
{
    const int kind = fixture_int(a->f, 0, 4), border = kv_page_tokens(&a->kv, a->kv.format);
    int limit = kind == 0 ? 1 : kind == 1 && m >= border ? border : kind == 2 ? m : fixture_int(a->f, 1, m);
    if (slot == 1) limit = 0;
    a->heavy.limit[lane] = limit;
    a->heavy.recent[lane] = limit ? fixture_int(a->f, 1, limit) : 0;
    return limit;
}

/* A prompt of m tokens, packed to the lanes' limits and stored as it is to be. */
static void begin_slot(struct account *a, int slot, int m)
{
    int32_t one[1] = {slot}, cu[2] = {0, m}, *keep = fixture_take(a->f, sizeof *keep * (size_t)(LANES * m));
    int32_t n_keep[LANES];
    struct tensor score = fixture_2d(a->f, LANES, m, 3);
    CHECK_OK(ops_kv_append(&a->f->ops, &a->kv, &a->heads, fixture_3d(a->f, m, KV_HEADS, a->kv.head_dim, 0),
                           fixture_3d(a->f, m, KV_HEADS, a->kv.head_dim, 5),
                           &(struct seq_batch){1, m, one, cu, one, cu}));
    for (int i = 0; i < LANES; i++) {
        const int limit = choose_limit(a, slot, slot * LANES + i, m);
        n_keep[i] = limit ? limit : m;
        for (int j = 0, kept = 0; j < m; j++) {
            fixture_row(score, i)[j] = fabsf(fixture_row(score, i)[j]);
            if (fixture_int(a->f, 1, m - j) <= n_keep[i] - kept) keep[i * m + kept++] = j;
        }
    }
    CHECK_OK(ops_kv_pack(&a->f->ops, &a->kv, slot, 0, LANES, keep, m, n_keep));
    CHECK_OK(ops_heavy_begin(&a->f->ops, &a->kv, &a->heavy, slot, score, keep, m));
    if (a->kv.format != KV_PLAIN) CHECK_OK(ops_kv_quantise(&a->f->ops, &a->kv, slot));
    for (int i = 0; i < LANES; i++) {
        struct lane_model *l = &a->lane[slot * LANES + i];
        for (int j = 0; j < n_keep[i]; j++)
            l->entry[keep[i * m + j]] = (struct entry){read_row(&a->kv, slot * LANES + i, j, false),
                                                       read_row(&a->kv, slot * LANES + i, j, true),
                                                       (double)fixture_row(score, i)[keep[i * m + j]], true};
        l->n = n_keep[i];
    }
    a->length[slot] = m;
}

/* The attention of a query head to all that is here. */
static void pay(struct lane_model *l, const float *q, int dim, double scale)
{
    double logit[STRIDE], top = -INFINITY, sum = 0;
    for (int i = 0; i < STRIDE; i++) {
        logit[i] = 0;
        if (!l->entry[i].here) continue;
        for (int d = 0; d < dim; d++) logit[i] += (double)q[d] * (double)l->entry[i].key.element[d];
        logit[i] *= scale * (double)l->entry[i].key.scale;
        top = logit[i] > top ? logit[i] : top;
    }
    for (int i = 0; i < STRIDE; i++) sum += l->entry[i].here ? exp(logit[i] - top) : 0;
    for (int i = 0; i < STRIDE; i++) l->entry[i].score += l->entry[i].here ? exp(logit[i] - top) / sum : 0;
}

/* Before the step's op: its token joins, attention is paid. */
static void expect_step(struct account *a, int lane, int position, const float *q)
{
    struct lane_model *l = &a->lane[lane];
    const int group = a->heads.n_heads / KV_HEADS, last = a->kv.lane_len[lane] - 1;
    CHECK(last == l->n);
    l->entry[position] =
        (struct entry){read_row(&a->kv, lane, last, false), read_row(&a->kv, lane, last, true), 0, true};
    l->n++;
    if (!a->heavy.limit[lane]) return;
    for (int h = 0; h < group; h++)
        pay(l, q + (int64_t)h * a->heads.head_dim, a->heads.head_dim, (double)a->heads.scale);
}

static bool row_is(const struct kv_view *kv, int lane, int i, bool value, const struct row *want)
{
    const struct row got = read_row(kv, lane, i, value);
    return fixture_same(&got.scale, &want->scale, sizeof got.scale) &&
           fixture_same(got.code, want->code, (size_t)kv->head_dim) &&
           fixture_same(got.element, want->element, (size_t)kv->head_dim * sizeof(float));
}

/* What is left: scores, keys and values by position; of those that may go the least went, as many as had to. */
static bool lane_ok(struct account *a, int lane, int newest)
{
    struct lane_model *l = &a->lane[lane];
    const int n = a->kv.lane_len[lane], limit = a->heavy.limit[lane], before = l->n;
    const int32_t *position = a->heavy.position + lane * STRIDE;
    bool stays[STRIDE] = {false};
    double worst_gone = -INFINITY, best_left = INFINITY;
    for (int i = 0; i < n; i++) {
        const int at = limit ? position[i] : -1;
        if (!limit) continue;
        if (at < 0 || at > newest || !l->entry[at].here || stays[at]) return false;
        stays[at] = true;
        if (fabs((double)a->heavy.score[lane * STRIDE + i] - l->entry[at].score) > 2e-5 * (1 + l->entry[at].score) ||
            !row_is(&a->kv, lane, i, false, &l->entry[at].key) || !row_is(&a->kv, lane, i, true, &l->entry[at].value))
            return false;
    }
    if (!limit) return n == before;
    for (int i = 0; i <= newest; i++) {
        if (!l->entry[i].here || i > newest - a->heavy.recent[lane]) continue;
        if (stays[i] && l->entry[i].score < best_left) best_left = l->entry[i].score;
        if (!stays[i] && l->entry[i].score > worst_gone) worst_gone = l->entry[i].score;
    }
    for (int i = 0; i <= newest; i++) {
        if (i > newest - a->heavy.recent[lane] && l->entry[i].here && !stays[i]) return false;
        l->entry[i].here = stays[i];
    }
    l->n = n;
    return n == (before < limit ? before : limit) && worst_gone <= best_left + 1e-4;
}

static void step(struct account *a, const int32_t *slot, int rows)
{
    const int dim = a->kv.head_dim, group = a->heads.n_heads / KV_HEADS;
    int32_t position[SLOTS + 1];
    struct seq_batch batch = {.n_seqs = rows, .n_tokens = rows, .slot = slot};
    struct tensor q = fixture_3d(a->f, rows, a->heads.n_heads, dim, 4);
    for (int i = 0; i < rows; i++) position[i] = slot[i] < 0 ? 1 << 29 : a->length[slot[i]]++;
    CHECK_OK(ops_kv_append(&a->f->ops, &a->kv, &a->heads, fixture_3d(a->f, rows, KV_HEADS, dim, 0),
                           fixture_3d(a->f, rows, KV_HEADS, dim, 0), &batch));
    for (int i = 0; i < rows; i++)
        for (int h = 0; h < KV_HEADS && slot[i] >= 0; h++)
            expect_step(a, slot[i] * LANES + h, position[i], fixture_row(q, i) + h * group * dim);
    CHECK_OK(ops_heavy_decode(&a->f->ops, q, position, &batch, &a->kv, &a->heads, &a->heavy));
    for (int i = 0; i < rows; i++)
        for (int h = 0; h < KV_HEADS && slot[i] >= 0; h++) CHECK(lane_ok(a, slot[i] * LANES + h, position[i]));
    CHECK(fixture_pages_ok(&a->kv) && *a->kv.error == 0);
}

/* Half of the room goes: a step evicts many, and whole pages. */
static void tighten(struct account *a, int slot)
{
    for (int lane = slot * LANES; lane < (slot + 1) * LANES; lane++) {
        a->heavy.limit[lane] = (a->heavy.limit[lane] + 1) / 2;
        if (a->heavy.recent[lane] > a->heavy.limit[lane]) a->heavy.recent[lane] = a->heavy.limit[lane];
    }
}

static void run_case(uint64_t seed, enum kv_format format, int group, int page_size, int dim, int longest)
{
    struct account a = open_account(seed, format, group, page_size, dim);
    for (int slot = 0; slot < SLOTS; slot++) begin_slot(&a, slot, slot ? fixture_int(a.f, 1, longest) : longest);
    for (int t = 0; t < STEPS; t++) {
        int32_t slot[SLOTS + 1];
        int rows = 0;
        for (int i = 0; i < SLOTS; i++) {
            if (i == t % 4) slot[rows++] = -1;
            if ((i + t) % 5) slot[rows++] = (i + t) % SLOTS; /* elsewhere a slot pauses */
        }
        if (t == STEPS / 2) tighten(&a, 0);
        step(&a, slot, rows);
    }
    for (int slot = 0; slot < SLOTS; slot++) CHECK_OK(ops_kv_release(&a.f->ops, &a.kv, slot));
    CHECK(*a.kv.free_count == a.kv.n_pages);
    fixture_close(a.f);
}

static void test_format(enum kv_format format)
{
    static const int longest[] = {1, 2, 17, 64, 65, LONGEST}, dims[] = {8, 24, MOST_DIM}, pages[] = {16, 1, 7};
    for (int i = 0; i < 18; i++)
        run_case((uint64_t)i, format, 1 + i % 4, pages[i % 3], dims[i / 2 % 3], longest[i % 6]);
}

static void test_plain(void) { test_format(KV_PLAIN); }
static void test_int8(void) { test_format(KV_INT8); }
static void test_fp8(void) { test_format(KV_FP8); }

int main(void)
{
    return check_run("ops_heavy",
                     (struct check_case[]){
                         {"plain lanes", test_plain}, {"lanes in int8", test_int8}, {"lanes in fp8", test_fp8}, {0}});
}
