/* test_ops_codes - the policies' ops over lanes in 8 bits on the CPU, against the same ops over plain lanes that hold
 * the numbers which the codes stand for: attention over lists, also of entries
 * in host memory and at recent places, clusters of keys, bounds and choice of pages. */
#include "kernels/cpu/vector.h"
#include "tests/ops_fixture.h"

enum { SLOTS = 3, FIRST_LANE = 1, PAGE = 16 };
static const enum kv_format formats[] = {KV_INT8, KV_FP8};

/* A layer of n_kv_heads lanes behind FIRST_LANE others: its slots' lanes in 8 bits, and as plain numbers. */
struct twins {
    struct fixture *f;
    struct kv_view codes, plain;
    struct attention_heads heads;
    struct seq_batch batch;
    int32_t slot[SLOTS];
};

/* Key or value of a token of a quantised lane. */
static void read_codes(const struct kv_view *kv, int lane, int i, bool value, float *to)
{
    const int tokens = kv_page_tokens(kv, kv->format), place = i % tokens + (value ? tokens : 0);
    const int64_t page = kv->page_row[lane * kv->max_pages + i / tokens];
    const uint8_t *code = (const uint8_t *)((const float *)kv->pool.data + page * kv->pool.stride[0]);
    const float scale = kv->scale[page * 2 * tokens + place];
    vector__base.widen_codes(to, code + (int64_t)place * kv->head_dim, kv->lane_format[lane] == KV_FP8, kv->head_dim);
    for (int d = 0; d < kv->head_dim; d++) to[d] *= scale;
}

/* What the lanes in 8 bits have more than the plain ones. */
static void follow(struct twins *t)
{
    const int dim = t->codes.head_dim, n_kv = t->heads.n_kv_heads;
    for (int i = 0; i < SLOTS * n_kv; i++) {
        const struct attention_heads one = {1, 1, dim, FIRST_LANE + i % n_kv, 1};
        const int lane = i / n_kv * t->codes.lanes_per_slot + one.lane, had = t->plain.lane_len[lane];
        const int n = t->codes.lane_len[lane] - had;
        if (n == 0) continue;
        struct tensor k = fixture_3d(t->f, n, 1, dim, 0), v = fixture_3d(t->f, n, 1, dim, 0);
        for (int j = 0; j < n; j++) {
            read_codes(&t->codes, lane, had + j, false, fixture_row(k, j));
            read_codes(&t->codes, lane, had + j, true, fixture_row(v, j));
        }
        int32_t slot = i / n_kv, cu[2] = {0, n};
        CHECK_OK(ops_kv_append(&t->f->ops, &t->plain, &one, k, v, &(struct seq_batch){1, n, &slot, cu, &slot, cu}));
    }
}

static void append_tokens(struct twins *t, int n)
{
    const int n_kv = t->heads.n_kv_heads, dim = t->codes.head_dim;
    for (int i = 0; i < n; i++)
        CHECK_OK(ops_kv_append(&t->f->ops, &t->codes, &t->heads, fixture_3d(t->f, SLOTS, n_kv, dim, 0),
                               fixture_3d(t->f, SLOTS, n_kv, dim, 0), &t->batch));
    follow(t);
}

/* Prompts of up to `longest` tokens, some generated tokens behind them. */
static void open_twins(struct twins *t, enum kv_format format, int n_kv, int group, int dim, int longest, uint64_t seed)
{
    struct fixture *f = t->f = fixture_open(2, seed);
    const int lanes = FIRST_LANE + n_kv, pages = (longest + 40) / PAGE + 1;
    t->codes = fixture_cache(f, SLOTS, lanes, pages, SLOTS * lanes * pages, PAGE, dim);
    t->plain = fixture_cache(f, SLOTS, lanes, pages, SLOTS * lanes * pages, PAGE, dim);
    fixture_quantise(f, &t->codes, format);
    t->heads = (struct attention_heads){n_kv * group, n_kv, dim, FIRST_LANE, 1 / sqrtf((float)dim)};
    for (int i = 0; i < SLOTS; i++) {
        const int n = i ? fixture_int(f, 1, longest) : longest;
        int32_t slot = t->slot[i] = (i + 1) % SLOTS, cu[2] = {0, n};
        CHECK_OK(ops_kv_append(&f->ops, &t->codes, &t->heads, fixture_3d(f, n, n_kv, dim, 0),
                               fixture_3d(f, n, n_kv, dim, 0), &(struct seq_batch){1, n, &slot, cu, &slot, cu}));
        CHECK_OK(ops_kv_quantise(&f->ops, &t->codes, slot));
    }
    t->batch = (struct seq_batch){.n_seqs = SLOTS, .n_tokens = SLOTS, .slot = t->slot};
    append_tokens(t, fixture_int(f, 1, 20));
}

static int lane_of(const struct twins *t, int list)
{
    return t->slot[list / t->heads.n_kv_heads] * t->codes.lanes_per_slot + FIRST_LANE + list % t->heads.n_kv_heads;
}

static void check_same_output(struct twins *t, const struct kv_list *codes, const struct kv_list *plain)
{
    const int dim = t->codes.head_dim, n_heads = t->heads.n_heads;
    struct tensor q = fixture_3d(t->f, SLOTS, n_heads, dim, 4), got = fixture_3d(t->f, SLOTS, n_heads, dim, 8);
    struct tensor want = fixture_3d(t->f, SLOTS, n_heads, dim, 0);
    CHECK_OK(ops_attention_decode_listed(&t->f->ops, got, q, &t->batch, &t->codes, &t->heads, codes));
    CHECK_OK(ops_attention_decode_listed(&t->f->ops, want, q, &t->batch, &t->plain, &t->heads, plain));
    for (int i = 0; i < SLOTS; i++) CHECK_CLOSE(fixture_row(got, i), fixture_row(want, i), n_heads * dim, 2e-5);
}

/* ---- lists of one lane's entries ---- */

static void compare_lists(enum kv_format format, int n_kv, int group, int dim, int longest, uint64_t seed)
{
    struct twins t;
    open_twins(&t, format, n_kv, group, dim, longest, seed);
    const int lists = SLOTS * n_kv, stride = longest + 21;
    int32_t *entry = fixture_take(t.f, sizeof *entry * (size_t)(lists * stride));
    int32_t *count = fixture_take(t.f, sizeof *count * (size_t)lists);
    for (int i = 0; i < lists; i++) {
        const int length = t.codes.lane_len[lane_of(&t, i)];
        for (int j = 0; j < stride; j++) entry[i * stride + j] = j < length ? j : 1 << 28;
        for (int j = length - 1; j > 0; j--) {
            const int other = fixture_int(t.f, 0, j), kept = entry[i * stride + j];
            entry[i * stride + j] = entry[i * stride + other], entry[i * stride + other] = kept;
        }
        count[i] = i % 4 == 3 ? -1 : fixture_int(t.f, i == 1 ? 0 : 1, length);
    }
    const struct kv_list list = {.entry = entry, .count = count, .stride = stride};
    check_same_output(&t, &list, &list);
    fixture_close(t.f);
}

static void test_lists(void)
{
    for (int i = 0; i < 2; i++) {
        compare_lists(formats[i], 2, 3, 64, 300, 1);
        compare_lists(formats[i], 1, 1, 20, 7, 2);
        compare_lists(formats[i], 3, 7, 72, 130, 3);
        compare_lists(formats[i], 2, 16, 128, 700, 4);
    }
}

/* ---- lists of entries of three kinds ---- */

/* Prompts of which every third token stays, in 8 bits, and the others are in `host`. */
static void open_split(struct twins *t, struct kv_view *host, enum kv_format format, int n_kv, int group, int dim,
                       int longest, uint64_t seed)
{
    struct fixture *f = t->f = fixture_open(2, seed);
    const int lanes = FIRST_LANE + n_kv, pages = (longest + 40) / PAGE + 1;
    t->codes = fixture_cache(f, SLOTS, lanes, pages, SLOTS * lanes * pages, PAGE, dim);
    t->plain = fixture_cache(f, SLOTS, lanes, pages, SLOTS * lanes * pages, PAGE, dim);
    *host = fixture_cache(f, SLOTS, lanes, pages, SLOTS * lanes * pages, PAGE, dim);
    fixture_quantise(f, &t->codes, format);
    t->heads = (struct attention_heads){n_kv * group, n_kv, dim, FIRST_LANE, 1 / sqrtf((float)dim)};
    int32_t *keep = fixture_take(f, (size_t)(n_kv * longest) * sizeof *keep), n_keep[8], n_other[8];
    int32_t *other = fixture_take(f, (size_t)(n_kv * longest) * sizeof *other);
    for (int i = 0; i < SLOTS; i++) {
        const int n = i ? fixture_int(f, 1, longest) : longest;
        int32_t slot = t->slot[i] = (i + 1) % SLOTS, cu[2] = {0, n};
        CHECK_OK(ops_kv_append(&f->ops, &t->codes, &t->heads, fixture_3d(f, n, n_kv, dim, 0),
                               fixture_3d(f, n, n_kv, dim, 0), &(struct seq_batch){1, n, &slot, cu, &slot, cu}));
        for (int h = 0; h < n_kv; h++) {
            for (int j = n_keep[h] = 0; j < n; j++)
                if ((j + h) % 3 == 0) keep[h * longest + n_keep[h]++] = j;
            n_other[h] = n - n_keep[h];
        }
        CHECK_OK(ops_list_others(&f->ops, other, longest, keep, longest, n_keep, n, n_kv));
        CHECK_OK(ops_kv_split(&f->ops, &t->codes, host, slot, FIRST_LANE, n_kv, other, longest, n_other));
        CHECK_OK(ops_kv_pack(&f->ops, &t->codes, slot, FIRST_LANE, n_kv, keep, longest, n_keep));
        CHECK_OK(ops_kv_quantise(&f->ops, &t->codes, slot));
    }
    t->batch = (struct seq_batch){.n_seqs = SLOTS, .n_tokens = SLOTS, .slot = t->slot};
    append_tokens(t, fixture_int(f, 1, 20));
}

static struct kv_recent take_recent(struct twins *t, int capacity, int max_entries)
{
    struct kv_recent r = {.first_lane = FIRST_LANE,
                          .n_lanes = t->heads.n_kv_heads,
                          .max_entries = max_entries,
                          .capacity = capacity,
                          .steps = 1};
    const size_t rows = (size_t)(SLOTS * r.n_lanes), places = rows * (size_t)capacity;
    r.pool = fixture_3d(t->f, (int64_t)places / PAGE, 2 * PAGE, t->codes.head_dim, 0);
    r.place = fixture_take(t->f, rows * (size_t)max_entries * sizeof *r.place);
    r.holder = fixture_take(t->f, places * sizeof *r.holder);
    r.stamp = fixture_take(t->f, places * sizeof *r.stamp);
    r.step = fixture_take(t->f, rows * sizeof *r.step);
    r.work = fixture_take(t->f, 2 * places * sizeof *r.work);
    r.counts = fixture_take(t->f, 2 * SLOTS * sizeof *r.counts);
    return r;
}

/* Lists of codes, of host memory and, once they were recalled, of recent places: attention as over plain lanes. */
static void compare_mixed(enum kv_format format, int n_kv, int group, int dim, int longest, uint64_t seed)
{
    struct twins t;
    struct kv_view host;
    open_split(&t, &host, format, n_kv, group, dim, longest, seed);
    const int lists = SLOTS * n_kv, stride = longest + 21;
    int32_t *entry = fixture_take(t.f, sizeof *entry * (size_t)(lists * stride));
    int32_t *near = fixture_take(t.f, sizeof *near * (size_t)(lists * stride));
    int32_t *count = fixture_take(t.f, sizeof *count * (size_t)lists);
    for (int i = 0; i < lists; i++) {
        const int own = t.codes.lane_len[lane_of(&t, i)], n = own + host.lane_len[lane_of(&t, i)];
        for (int j = 0; j < n; j++) entry[i * stride + j] = j < own ? j : ~(j - own);
        for (int j = n - 1; j > 0; j--) {
            const int other = fixture_int(t.f, 0, j), kept = entry[i * stride + j];
            entry[i * stride + j] = entry[i * stride + other], entry[i * stride + other] = kept;
        }
        count[i] = i == 3 ? -1 : i == 1 ? n : fixture_int(t.f, 1, n);
    }
    const struct kv_list far = {.entry = entry, .count = count, .stride = stride, .host = &host};
    check_same_output(&t, &far, &far);
    const struct kv_recent recent = take_recent(&t, 32, longest);
    const struct kv_list lately = {.entry = near, .count = count, .stride = stride, .host = &host, .recent = &recent};
    int placed = 0;
    for (int step = 0; step < 2; step++) {
        memcpy(near, entry, sizeof *near * (size_t)(lists * stride));
        CHECK_OK(ops_recall(&t.f->ops, near, count, stride, &t.batch, &t.codes, &t.heads, &host, &recent));
        for (int i = 0; i < lists; i++)
            for (int j = 0; j < count[i]; j++) placed += near[i * stride + j] >= RECENT_ENTRY;
        check_same_output(&t, &lately, &far);
    }
    CHECK(placed > 0);
    fixture_close(t.f);
}

static void test_mixed(void)
{
    for (int i = 0; i < 2; i++) {
        compare_mixed(formats[i], 2, 3, 64, 300, 21);
        compare_mixed(formats[i], 3, 1, 20, 9, 22);
        compare_mixed(formats[i], 2, 8, 128, 120, 23);
    }
}

/* ---- clusters ---- */

static struct kv_clusters take_clusters(struct twins *t, int max_clusters, int max_entries)
{
    struct kv_clusters c = {.first_lane = FIRST_LANE,
                            .n_lanes = t->heads.n_kv_heads,
                            .max_clusters = max_clusters,
                            .max_entries = max_entries};
    const size_t rows = (size_t)(SLOTS * c.n_lanes);
    c.centroid = fixture_3d(t->f, (int64_t)rows, max_clusters, t->codes.head_dim, 0);
    c.size = fixture_take(t->f, rows * (size_t)max_clusters * sizeof *c.size);
    c.entry = fixture_take(t->f, rows * (size_t)max_entries * sizeof *c.entry);
    c.state = fixture_take(t->f, rows * sizeof *c.state);
    c.work = fixture_take(t->f, ops_cluster_bytes(&t->f->ops, c.n_lanes, t->codes.head_dim, max_entries, max_clusters));
    return c;
}

/* Runs of entries, from the middle of a page on, become the same clusters, bit for bit. */
static void compare_clusters(enum kv_format format, int dim, int first, int n, int n_clusters, uint64_t seed)
{
    struct twins t;
    open_twins(&t, format, 2, 1, dim, 200, seed);
    struct kv_clusters got = take_clusters(&t, n_clusters + 2, n + 5), want = take_clusters(&t, n_clusters + 2, n + 5);
    int32_t *centre = fixture_take(t.f, sizeof *centre * (size_t)(2 * n_clusters));
    for (int i = 0; i < 2 * n_clusters; i++) centre[i] = i % n_clusters * (n / n_clusters) + i / n_clusters;
    const struct cluster_job job = {.slot = t.slot[0],
                                    .first_entry = first,
                                    .n_entries = n,
                                    .first_cluster = 1,
                                    .n_clusters = n_clusters,
                                    .first_place = 3,
                                    .iterations = 6,
                                    .centre = centre};
    CHECK_OK(ops_cluster_keys(&t.f->ops, &t.codes, &got, &job));
    CHECK_OK(ops_cluster_keys(&t.f->ops, &t.plain, &want, &job));
    for (int i = 0; i < 2; i++) {
        const int row = job.slot * 2 + i;
        const int64_t at = (int64_t)row * got.max_clusters + 1, place = (int64_t)row * got.max_entries + 3;
        CHECK(fixture_same(got.size + at, want.size + at, (size_t)n_clusters * sizeof *got.size));
        CHECK(fixture_same(got.entry + place, want.entry + place, (size_t)n * sizeof *got.entry));
        CHECK(fixture_same((float *)got.centroid.data + at * dim, (float *)want.centroid.data + at * dim,
                           (size_t)(n_clusters * dim) * sizeof(float)));
        for (int c = 0, all = 0; c < n_clusters; c++) {
            all += got.size[at + c];
            CHECK(c + 1 < n_clusters || all == n);
        }
    }
    fixture_close(t.f);
}

static void test_clusters(void)
{
    for (int i = 0; i < 2; i++) {
        compare_clusters(formats[i], 64, 0, 200, 10, 5);
        compare_clusters(formats[i], 24, 67, 60, 4, 6);
        compare_clusters(formats[i], 128, 31, 33, 33, 7);
    }
}

/* ---- pages ---- */

static void find_bounds(struct twins *t, const struct kv_view *kv, struct tensor bounds, int slot)
{
    CHECK_OK(ops_page_bounds(&t->f->ops, bounds, kv, slot, FIRST_LANE, t->heads.n_kv_heads));
}

static const float *bounds_at(const struct kv_view *kv, struct tensor bounds, int lane, int page)
{
    const int each = kv->format == KV_PLAIN ? 1 : (int)sizeof(float);
    const int32_t number = kv->page_row[lane * kv->max_pages + page / each];
    return fixture_row(bounds, number) + (int64_t)(page % each) * 2 * kv->head_dim;
}

static void check_bounds(struct twins *t, struct tensor codes, struct tensor plain)
{
    for (int slot = 0; slot < SLOTS; slot++)
        for (int h = 0; h < t->heads.n_kv_heads; h++) {
            const int lane = slot * t->codes.lanes_per_slot + FIRST_LANE + h;
            for (int page = 0; page * PAGE < t->plain.lane_len[lane]; page++)
                CHECK(fixture_same(bounds_at(&t->codes, codes, lane, page), bounds_at(&t->plain, plain, lane, page),
                                   2 * (size_t)t->codes.head_dim * sizeof(float)));
        }
}

static struct page_pick take_pick(struct twins *t, const struct kv_view *kv, const int32_t *limit)
{
    const int64_t lists = (int64_t)SLOTS * t->heads.n_kv_heads, stride = (int64_t)kv->max_pages * PAGE;
    return (struct page_pick){
        .bounds = fixture_3d(t->f, kv->n_pages, 2 * kv_picked_pages(kv), kv->head_dim, 0),
        .score = fixture_2d(t->f, lists, kv->max_pages, 0),
        .limit = limit,
        .entry = fixture_take(t->f, (size_t)(lists * stride) * sizeof(int32_t)),
        .count = fixture_take(t->f, (size_t)lists * sizeof(int32_t)),
        .stride = (int)stride,
    };
}

/* Bounds and lists are the plain lanes', step after step and across the borders of pages of both kinds. */
static void compare_pages(enum kv_format format, int n_kv, int group, int dim, int longest, uint64_t seed)
{
    struct twins t;
    open_twins(&t, format, n_kv, group, dim, longest, seed);
    const int32_t limit[SLOTS] = {2, 0, 1 + longest / PAGE / 2};
    struct page_pick codes = take_pick(&t, &t.codes, limit), plain = take_pick(&t, &t.plain, limit);
    int listed = 0;
    for (int i = 0; i < SLOTS; i++) find_bounds(&t, &t.codes, codes.bounds, i);
    for (int i = 0; i < SLOTS; i++) find_bounds(&t, &t.plain, plain.bounds, i);
    check_bounds(&t, codes.bounds, plain.bounds);
    for (int step = 0; step < 18; step++) {
        append_tokens(&t, 1);
        struct tensor q = fixture_3d(t.f, SLOTS, t.heads.n_heads, dim, 4);
        CHECK_OK(ops_pick_pages(&t.f->ops, q, &t.batch, &t.codes, &t.heads, &codes));
        CHECK_OK(ops_pick_pages(&t.f->ops, q, &t.batch, &t.plain, &t.heads, &plain));
        for (int i = 0; i < SLOTS * n_kv; i++) {
            CHECK(codes.count[i] == plain.count[i]);
            for (int j = 0; j < plain.count[i]; j++)
                CHECK(codes.entry[i * codes.stride + j] == plain.entry[i * plain.stride + j]);
            listed += plain.count[i] > 0;
        }
    }
    CHECK(listed > 0 || longest < PAGE);
    fixture_close(t.f);
}

/* Bounds of a prompt, taken before its lanes are rewritten, are where they are looked for afterwards. */
static void compare_prompt(enum kv_format format, int n)
{
    struct twins t = {.f = fixture_open(2, (uint64_t)n)};
    const int dim = 24, n_kv = 2, lanes = FIRST_LANE + n_kv, pages = n / PAGE + 1;
    t.codes = fixture_cache(t.f, SLOTS, lanes, pages, lanes * pages, PAGE, dim);
    t.plain = fixture_cache(t.f, SLOTS, lanes, pages, lanes * pages, PAGE, dim);
    fixture_quantise(t.f, &t.codes, format);
    t.heads = (struct attention_heads){n_kv, n_kv, dim, FIRST_LANE, 1};
    int32_t slot = 1, cu[2] = {0, n};
    const struct seq_batch prompt = {1, n, &slot, cu, &slot, cu};
    struct tensor k = fixture_3d(t.f, n, n_kv, dim, 0), v = fixture_3d(t.f, n, n_kv, dim, 0);
    struct tensor codes = fixture_3d(t.f, lanes * pages, 2 * kv_picked_pages(&t.codes), dim, 0);
    struct tensor plain = fixture_3d(t.f, lanes * pages, 2, dim, 0);
    CHECK_OK(ops_kv_append(&t.f->ops, &t.codes, &t.heads, k, v, &prompt));
    CHECK_OK(ops_kv_append(&t.f->ops, &t.plain, &t.heads, k, v, &prompt));
    find_bounds(&t, &t.codes, codes, 1);
    find_bounds(&t, &t.plain, plain, 1);
    CHECK_OK(ops_kv_quantise(&t.f->ops, &t.codes, 1));
    CHECK(t.codes.lane_format[lanes + FIRST_LANE] == (int)format);
    check_bounds(&t, codes, plain);
    CHECK_FAILS(ops_page_bounds(&t.f->ops, plain, &t.codes, 1, 0, 1), ERR_ARG, "bounds");
    fixture_close(t.f);
}

/* A lane may hold more tokens in 8 bits than scores have room for. */
static void test_long(void)
{
    struct twins t;
    open_twins(&t, KV_FP8, 1, 1, 8, 60, 9);
    const int32_t limit[SLOTS] = {1, 1, 1};
    struct page_pick pick = take_pick(&t, &t.codes, limit);
    const int held = t.codes.max_pages * PAGE;
    for (int i = 0; i < SLOTS; i++) find_bounds(&t, &t.codes, pick.bounds, i);
    for (int length = 0; length <= held;) {
        struct tensor q = fixture_3d(t.f, SLOTS, 1, 8, 0);
        CHECK_OK(ops_kv_append(&t.f->ops, &t.codes, &t.heads, q, q, &t.batch));
        CHECK_OK(ops_pick_pages(&t.f->ops, q, &t.batch, &t.codes, &t.heads, &pick));
        length = t.codes.lane_len[lane_of(&t, 0)];
        CHECK((pick.count[0] < 0) == (length > held || length <= PAGE));
    }
    CHECK(pick.count[0] == -1 && *t.codes.error == 0);
    fixture_close(t.f);
}

static void test_pages(void)
{
    static const int lengths[] = {1, 15, 16, 17, 48, 64, 65, 200, 256};
    for (int i = 0; i < 2; i++) {
        compare_pages(formats[i], 2, 3, 64, 300, 11);
        compare_pages(formats[i], 1, 1, 20, 7, 12);
        compare_pages(formats[i], 3, 4, 72, 130, 13);
        for (size_t j = 0; j < sizeof lengths / sizeof *lengths; j++) compare_prompt(formats[i], lengths[j]);
    }
}

int main(void)
{
    return check_run("ops_codes", (struct check_case[]){{"lists", test_lists},
                                                        {"lists over both memories", test_mixed},
                                                        {"clusters of keys", test_clusters},
                                                        {"pages", test_pages},
                                                        {"long lanes", test_long},
                                                        {0}});
}
