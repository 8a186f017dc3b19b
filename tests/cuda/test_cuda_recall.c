/* CUDA's ops for tokens in host memory against the CPU's: what lists leave out, the copy there, clusters of what is
 * about to go, attention over entries of both memories, and the copies on the device of what was read lately. */
#include "tests/cuda/cuda_cache.h"

enum { SLOTS = 3, LANES = 5, FIRST_LANE = 1, N_LANES = 4, HEADS = 2 };

/* A cache and one of the same lanes whose pages the device reads over the bus. */
struct memories {
    struct cache kv, host;
    size_t host_bytes;
    int dim, longest;
    int length[SLOTS];
};

static struct memories memories_take(struct cuda_fixture *f, int dim, int longest)
{
    const int pages = longest / 16 + 2, lanes = SLOTS * LANES;
    struct memories m = {.kv = cache_take(f, SLOTS, LANES, pages, lanes * pages, 16, dim, STALE_NAN),
                         .host = cache_take(f, SLOTS, LANES, pages + 1, lanes * pages, 16, dim, STALE_NAN),
                         .dim = dim,
                         .longest = longest};
    m.host_bytes = tensor_bytes(m.host.gpu.pool);
    m.host.gpu.pool.data = NULL;
    RUN(f, ops_host_take(&f->gpu, m.host_bytes, &m.host.gpu.pool.data));
    memset(m.host.gpu.pool.data, 0xff, m.host_bytes); /* not-a-numbers */
    for (int s = 0; s < SLOTS; s++) {
        m.length[s] = s ? fixture_int(f->cpu, 1, longest) : longest;
        for (int l = 0; l < LANES; l++) {
            const struct attention_heads one = {1, 1, dim, l, 1};
            cache_fill(f, &m.kv, &one, s, m.length[s]);
        }
    }
    return m;
}

static void memories_free(struct cuda_fixture *f, struct memories *m)
{
    RUN(f, ops_finish(&f->gpu));
    ops_host_give_back(&f->gpu, m->host.gpu.pool.data, m->host_bytes);
    cuda_clear(f);
}

/* The pool in host memory as it stands there, tables fetched. */
static void check_host(struct cuda_fixture *f, const struct memories *m)
{
    struct cache tables = m->host;
    void *pages = tables.gpu.pool.data;
    tables.gpu.pool.data = cuda_take(f, m->host_bytes);
    RUN(f, ops_finish(&f->gpu));
    struct kv_view got = cache_fetch(f, &tables);
    got.pool.data = pages;
    EXPECT(f, *got.error == *m->host.cpu.error);
    if (!fixture_pages_ok(&got)) cuda_wrong(f, "host memory: a page is lost, or in two places");
    for (int lane = 0; lane < SLOTS * LANES; lane++) {
        if (got.lane_len[lane] != m->host.cpu.lane_len[lane]) {
            cuda_wrong(f, "lane %d in host memory holds %d, expected %d", lane, got.lane_len[lane],
                       m->host.cpu.lane_len[lane]);
            return;
        }
        for (int i = 0; i < got.lane_len[lane]; i++)
            if (!cache_token_same(&got, &m->host.cpu, lane, i)) {
                cuda_wrong(f, "token %d of lane %d in host memory differs", i, lane);
                return;
            }
    }
}

/* Lists of what to keep of each lane, and of the rest, as both backends find it. */
struct parts {
    struct pair keep, other;
    int32_t n_keep[N_LANES], n_other[N_LANES];
    int stride;
};

static struct parts draw_parts(struct cuda_fixture *f, const struct memories *m, int slot, bool even)
{
    struct parts p = {.stride = m->longest + 3};
    const int n = m->length[slot], chosen = fixture_int(f->cpu, 0, n);
    int32_t *keep = fixture_take(f->cpu, sizeof *keep * (size_t)(N_LANES * p.stride));
    for (int i = 0; i < N_LANES; i++) {
        const int wanted = even ? chosen : i == 1 ? 0 : i == 2 ? n : fixture_int(f->cpu, 0, n);
        for (int j = 0; j < n; j++) /* ascending, each lane others */
            if (fixture_int(f->cpu, 1, n - j) <= wanted - p.n_keep[i]) keep[i * p.stride + p.n_keep[i]++] = j;
        p.n_other[i] = n - p.n_keep[i];
    }
    p.keep = pair_of(f, keep, sizeof *keep * (size_t)(N_LANES * p.stride));
    p.other = pair_of(f, NULL, sizeof *keep * (size_t)(N_LANES * p.stride));
    RUN(f, ops_list_others(&f->gpu, p.other.gpu, p.stride, p.keep.gpu, p.stride, p.n_keep, n, N_LANES));
    RUN(f, ops_list_others(&f->cpu->ops, p.other.cpu, p.stride, p.keep.cpu, p.stride, p.n_keep, n, N_LANES));
    const int32_t *got = pair_fetch(f, p.other), *want = p.other.cpu;
    for (int i = 0; i < N_LANES; i++)
        if (memcmp(got + i * p.stride, want + i * p.stride, sizeof *got * (size_t)p.n_other[i]))
            cuda_wrong(f, "list %d of what is left of %d differs", i, n);
    return p;
}

static void split(struct cuda_fixture *f, struct memories *m, int slot, const struct parts *p)
{
    RUN(f, ops_kv_split(&f->gpu, &m->kv.gpu, &m->host.gpu, slot, FIRST_LANE, N_LANES, p->other.gpu, p->stride,
                        p->n_other));
    RUN(f, ops_kv_split(&f->cpu->ops, &m->kv.cpu, &m->host.cpu, slot, FIRST_LANE, N_LANES, p->other.cpu, p->stride,
                        p->n_other));
    check_host(f, m);
    RUN(f, ops_kv_pack(&f->gpu, &m->kv.gpu, slot, FIRST_LANE, N_LANES, p->keep.gpu, p->stride, p->n_keep));
    RUN(f, ops_kv_pack(&f->cpu->ops, &m->kv.cpu, slot, FIRST_LANE, N_LANES, p->keep.cpu, p->stride, p->n_keep));
    cache_check(f, &m->kv);
}

static const int dims[] = {64, 128, 8, 72, 96};

static void test_split(void)
{
    struct cuda_fixture *f = cuda_begin(1);
    for (int i = 0; i < (f->effort == QUICK ? 2 : 5); i++) {
        struct memories m = memories_take(f, dims[i], f->effort == QUICK ? 40 : 150 + 400 * i);
        for (int s = 0; s < SLOTS; s++) {
            cuda_what(f, "split of slot %d, %d tokens of %d dimensions", s, m.length[s], m.dim);
            struct parts p = draw_parts(f, &m, s, false);
            split(f, &m, s, &p);
        }
        for (int s = 0; s < SLOTS; s++) {
            RUN(f, ops_kv_release(&f->gpu, &m.host.gpu, s));
            RUN(f, ops_kv_release(&f->cpu->ops, &m.host.cpu, s));
        }
        check_host(f, &m);
        memories_free(f, &m);
    }
    cuda_end(f);
}

/* ---- clusters of what is about to go ---- */

static struct kv_clusters take_clusters(struct cuda_fixture *f, const struct memories *m, int n_lanes, int most)
{
    struct kv_clusters c = {.n_lanes = n_lanes, .max_clusters = most, .max_entries = m->longest};
    const size_t rows = (size_t)(SLOTS * n_lanes);
    c.centroid = tensor_3d(NULL, f->dtype, (int64_t)rows, most, m->dim);
    c.centroid.data = cuda_take(f, tensor_bytes(c.centroid));
    c.size = cuda_take(f, rows * (size_t)most * sizeof *c.size);
    c.entry = cuda_take(f, rows * (size_t)m->longest * sizeof *c.entry);
    c.state = cuda_take(f, rows * sizeof *c.state);
    c.work = cuda_take(f, ops_cluster_bytes(&f->gpu, n_lanes, m->dim, m->longest, most));
    return c;
}

static void fetch_clusters(struct cuda_fixture *f, const struct kv_clusters *c, int row, int32_t *size, int32_t *entry,
                           uint16_t *centroid)
{
    const size_t width = (size_t)(c->max_clusters * c->centroid.dim[2]);
    RUN(f, ops_download(&f->gpu, size, c->size + row * c->max_clusters, sizeof *size * (size_t)c->max_clusters));
    RUN(f, ops_download(&f->gpu, entry, c->entry + row * c->max_entries, sizeof *entry * (size_t)c->max_entries));
    RUN(f, ops_download(&f->gpu, centroid, (uint16_t *)c->centroid.data + (size_t)row * width, 2 * width));
}

/* A lane's list, clustered among others of other lengths, is what the same keys give alone, packed together: bit by
 * bit. */
static void compare_lane(struct cuda_fixture *f, const struct memories *m, int slot, int i, int n, int n_clusters,
                         const int32_t *centre, const struct kv_clusters *listed)
{
    const int most = listed->max_clusters;
    struct kv_clusters alone = take_clusters(f, m, 1, most);
    alone.first_lane = FIRST_LANE + i;
    const struct cluster_job job = {
        .slot = slot, .n_entries = n, .n_clusters = n_clusters, .iterations = 5, .centre = centre};
    if (n) RUN(f, ops_cluster_keys(&f->gpu, &m->kv.gpu, &alone, &job));
    int32_t *size[2], *entry[2];
    uint16_t *centroid[2];
    for (int k = 0; k < 2; k++) {
        size[k] = fixture_take(f->cpu, sizeof **size * (size_t)most);
        entry[k] = fixture_take(f->cpu, sizeof **entry * (size_t)m->longest);
        centroid[k] = fixture_take(f->cpu, 2 * (size_t)(most * m->dim));
        fetch_clusters(f, k ? &alone : listed, k ? slot : slot * N_LANES + i, size[k], entry[k], centroid[k]);
    }
    for (int j = 0; j < n; j++) entry[1][j] = ~entry[1][j];
    EXPECT(f, !memcmp(size[0], size[1], sizeof **size * (size_t)n_clusters));
    EXPECT(f, !memcmp(entry[0], entry[1], sizeof **entry * (size_t)n));
    EXPECT(f, !memcmp(centroid[0], centroid[1], 2 * (size_t)(n_clusters * m->dim)));
}

static void compare_listed_clusters(struct cuda_fixture *f, int dim, int longest, int per)
{
    struct memories m = memories_take(f, dim, longest);
    const int most = longest / per + 1;
    for (int s = 0; s < SLOTS; s++) {
        cuda_what(f, "clusters of listed keys, slot %d, %d tokens of %d dimensions", s, m.length[s], dim);
        struct parts p = draw_parts(f, &m, s, false);
        struct kv_clusters c = take_clusters(f, &m, N_LANES, most);
        c.first_lane = FIRST_LANE;
        struct cluster_count count[N_LANES];
        int32_t *centre = fixture_take(f->cpu, sizeof *centre * (size_t)(N_LANES * most));
        int longest_list = 0, widest = 0;
        for (int i = 0; i < N_LANES; i++) {
            const int n = p.n_other[i], k = n / per > 0 ? n / per : n > 0;
            count[i] = (struct cluster_count){n, k};
            longest_list = n > longest_list ? n : longest_list;
            widest = k > widest ? k : widest;
        }
        if (!longest_list) continue;
        for (int i = 0; i < N_LANES; i++)
            for (int j = 0; j < count[i].n_clusters; j++)
                centre[i * widest + j] = j * (count[i].n_entries / count[i].n_clusters);
        struct pair counts = pair_of(f, count, sizeof count);
        struct pair centres = pair_of(f, centre, sizeof *centre * (size_t)(N_LANES * most));
        const struct cluster_job job = {.slot = s,
                                        .n_entries = longest_list,
                                        .n_clusters = widest,
                                        .iterations = 5,
                                        .centre = centres.gpu,
                                        .index = p.other.gpu,
                                        .count = counts.gpu,
                                        .index_stride = p.stride};
        RUN(f, ops_cluster_keys(&f->gpu, &m.kv.gpu, &c, &job));
        RUN(f, ops_kv_pack(&f->gpu, &m.kv.gpu, s, FIRST_LANE, N_LANES, p.other.gpu, p.stride, p.n_other));
        for (int i = 0; i < N_LANES; i++)
            compare_lane(f, &m, s, i, count[i].n_entries, count[i].n_clusters, (int32_t *)centres.gpu + i * widest, &c);
    }
    memories_free(f, &m);
}

static void test_clusters(void)
{
    struct cuda_fixture *f = cuda_begin(2);
    compare_listed_clusters(f, 64, 90, 9);
    if (f->effort > QUICK) {
        compare_listed_clusters(f, 128, 2900, 80);
        compare_listed_clusters(f, 72, 700, 20);
        compare_listed_clusters(f, 8, 33, 1);
    }
    cuda_end(f);
}

/* ---- attention over both memories ---- */

static void compare_attention(struct cuda_fixture *f, int dim, int group, int longest)
{
    struct memories m = memories_take(f, dim, longest);
    const int stride = longest + 9, lists = (SLOTS + 1) * HEADS;
    const struct attention_heads heads = {HEADS * group, HEADS, dim, FIRST_LANE + 1, 1.0f / sqrtf((float)dim)};
    const int32_t slots[SLOTS + 1] = {2, 0, -1, 1};
    for (int s = 0; s < SLOTS; s++) {
        cuda_what(f, "attention over both memories, %d heads of %d, lanes of %d", HEADS * group, dim, m.length[s]);
        struct parts p = draw_parts(f, &m, s, s == 1);
        split(f, &m, s, &p);
    }
    int32_t *entry = fixture_take(f->cpu, sizeof *entry * (size_t)(lists * stride)), *count, *deck;
    count = fixture_take(f->cpu, sizeof *count * (size_t)lists);
    deck = fixture_take(f->cpu, sizeof *deck * (size_t)stride);
    for (int i = 0; i < lists; i++) {
        const int slot = slots[i / HEADS];
        for (int j = 0; j < stride; j++) entry[i * stride + j] = j % 2 ? 1 << 28 : -(1 << 28); /* beyond the count */
        if (slot < 0) continue;
        const int lane = slot * LANES + heads.lane + i % HEADS, own = m.kv.cpu.lane_len[lane];
        const int n = own + m.host.cpu.lane_len[lane];
        for (int j = 0; j < n; j++) deck[j] = j < own ? j : ~(j - own);
        count[i] = i == 1 ? n : fixture_int(f->cpu, 0, n);
        for (int j = 0; j < count[i]; j++) {
            const int at = fixture_int(f->cpu, j, n - 1), drawn = deck[at];
            deck[at] = deck[j], deck[j] = drawn;
            entry[i * stride + j] = drawn;
        }
    }
    struct pair e = pair_of(f, entry, sizeof *entry * (size_t)(lists * stride));
    struct pair c = pair_of(f, count, sizeof *count * (size_t)lists);
    const struct kv_list gpu = {e.gpu, c.gpu, stride, &m.host.gpu, NULL, false},
                         cpu = {e.cpu, c.cpu, stride, &m.host.cpu, NULL, false};
    struct batch b = batch_of(f, slots, NULL, SLOTS + 1);
    struct twin q = twin_3d(f, SLOTS + 1, heads.n_heads, dim, 8, 1.5f);
    struct twin out = twin_3d(f, SLOTS + 1, heads.n_heads, dim, 16, 0);
    RUN(f, ops_attention_decode_listed(&f->gpu, out.gpu, q.gpu, &b.gpu, &m.kv.gpu, &heads, &gpu));
    RUN(f, ops_attention_decode_listed(&f->cpu->ops, out.cpu, q.cpu, &b.cpu, &m.kv.cpu, &heads, &cpu));
    twin_check(f, out, cuda_tolerance(f), "out");
    memories_free(f, &m);
}

static void test_attention(void)
{
    static const int groups[] = {4, 1, 8, 3, 16};
    struct cuda_fixture *f = cuda_begin(3);
    for (int i = 0; i < (f->effort == QUICK ? 2 : 5); i++) {
        compare_attention(f, dims[i], groups[i], 40);
        if (f->effort > QUICK) compare_attention(f, dims[i], groups[i], 300 + 700 * i);
    }
    cuda_end(f);
}

/* ---- recent tokens ---- */

struct recent {
    struct kv_recent gpu, cpu;
    struct pair counts, step;
};

static struct recent take_recent(struct cuda_fixture *f, const struct memories *m, int capacity, int steps)
{
    struct recent r = {.cpu = {.first_lane = FIRST_LANE,
                               .n_lanes = N_LANES,
                               .max_entries = m->longest,
                               .capacity = capacity,
                               .steps = steps}};
    const size_t rows = SLOTS * N_LANES, places = rows * (size_t)capacity;
    int32_t *stale = fixture_take(f->cpu, sizeof *stale * rows * (size_t)m->longest);
    for (size_t i = 0; i < rows * (size_t)m->longest; i++) stale[i] = fixture_int(f->cpu, -9, capacity + 9);
    const struct pair place = pair_of(f, stale, sizeof *stale * rows * (size_t)m->longest);
    const struct pair holder = pair_of(f, stale, sizeof *stale * places); /* places <= longest of a lane */
    const struct pair stamp = pair_of(f, NULL, sizeof(int32_t) * places);
    r.step = pair_of(f, NULL, sizeof(int32_t) * rows);
    r.counts = pair_of(f, NULL, sizeof(int64_t) * 2 * SLOTS);
    memset(stamp.cpu, 0, sizeof(int32_t) * places);
    memset(r.step.cpu, 0, sizeof(int32_t) * rows);
    memset(r.counts.cpu, 0, sizeof(int64_t) * 2 * SLOTS);
    pair_send(f, stamp);
    pair_send(f, r.step);
    pair_send(f, r.counts);
    r.gpu = r.cpu;
    r.cpu.pool = tensor_3d(NULL, DTYPE_F32, (int64_t)places / 16, 32, m->dim);
    r.gpu.pool = r.cpu.pool;
    r.gpu.pool.dtype = f->dtype;
    r.cpu.pool.data = fixture_take(f->cpu, tensor_bytes(r.cpu.pool));
    r.gpu.pool.data = cuda_take(f, tensor_bytes(r.gpu.pool));
    r.gpu.place = place.gpu, r.cpu.place = place.cpu;
    r.gpu.holder = holder.gpu, r.cpu.holder = holder.cpu;
    r.gpu.stamp = stamp.gpu, r.cpu.stamp = stamp.cpu;
    r.gpu.step = r.step.gpu, r.cpu.step = r.step.cpu;
    r.gpu.counts = r.counts.gpu, r.cpu.counts = r.counts.cpu;
    r.gpu.work = cuda_take(f, 2 * sizeof(int32_t) * places);
    r.cpu.work = fixture_take(f->cpu, 2 * sizeof(int32_t) * places);
    return r;
}

/* All entries of the lane and up to `most` of those in host memory, from a window that moves with the steps. */
static int draw_list(struct cuda_fixture *f, const struct memories *m, int lane, int step, int most, int32_t *entry)
{
    const int own = m->kv.cpu.lane_len[lane], far = m->host.cpu.lane_len[lane];
    int n = 0;
    for (int j = 0; j < own; j++) entry[n++] = j;
    for (int j = 0, taken = 0; j < far && taken < most; j++) {
        const int at = (j + 7 * step) % far;
        if (fixture_int(f->cpu, 0, 2)) entry[n++] = ~at, taken++;
    }
    for (int j = n - 1; j > 0; j--) {
        const int other = fixture_int(f->cpu, 0, j), kept = entry[j];
        entry[j] = entry[other], entry[other] = kept;
    }
    return n;
}

static void compare_step(struct cuda_fixture *f, struct memories *m, struct recent *r, int step, int most)
{
    const int group = 4, stride = m->longest + 9, lists = (SLOTS + 1) * HEADS;
    const struct attention_heads heads = {HEADS * group, HEADS, m->dim, FIRST_LANE + 1, 1.0f / sqrtf((float)m->dim)};
    const int32_t slots[SLOTS + 1] = {2, 0, -1, 1};
    int32_t *entry = fixture_take(f->cpu, sizeof *entry * (size_t)(lists * stride));
    int32_t *count = fixture_take(f->cpu, sizeof *count * (size_t)lists);
    for (int i = 0; i < lists; i++) {
        const int slot = slots[i / HEADS];
        if (slot >= 0)
            count[i] = draw_list(f, m, slot * LANES + heads.lane + i % HEADS, step, most, entry + i * stride);
        if (i == 3 && step == 1) count[i] = -1;
    }
    struct pair plain = pair_of(f, entry, sizeof *entry * (size_t)(lists * stride));
    struct pair e = pair_of(f, entry, sizeof *entry * (size_t)(lists * stride));
    struct pair c = pair_of(f, count, sizeof *count * (size_t)lists);
    struct batch b = batch_of(f, slots, NULL, SLOTS + 1);
    struct twin q = twin_3d(f, SLOTS + 1, heads.n_heads, m->dim, 8, 1.5f);
    struct twin out = twin_3d(f, SLOTS + 1, heads.n_heads, m->dim, 16, 0);
    struct twin far = twin_3d(f, SLOTS + 1, heads.n_heads, m->dim, 16, 0);
    RUN(f, ops_recall(&f->gpu, e.gpu, c.gpu, stride, &b.gpu, &m->kv.gpu, &heads, &m->host.gpu, &r->gpu));
    RUN(f, ops_recall(&f->cpu->ops, e.cpu, c.cpu, stride, &b.cpu, &m->kv.cpu, &heads, &m->host.cpu, &r->cpu));
    pair_check(f, e, "lists");
    pair_check(f, r->counts, "counts");
    const struct kv_list gpu = {e.gpu, c.gpu, stride, &m->host.gpu, &r->gpu, false},
                         cpu = {e.cpu, c.cpu, stride, &m->host.cpu, &r->cpu, false},
                         over_the_bus = {plain.gpu, c.gpu, stride, &m->host.gpu, NULL, false};
    RUN(f, ops_attention_decode_listed(&f->gpu, out.gpu, q.gpu, &b.gpu, &m->kv.gpu, &heads, &gpu));
    RUN(f, ops_attention_decode_listed(&f->cpu->ops, out.cpu, q.cpu, &b.cpu, &m->kv.cpu, &heads, &cpu));
    RUN(f, ops_attention_decode_listed(&f->gpu, far.gpu, q.gpu, &b.gpu, &m->kv.gpu, &heads, &over_the_bus));
    twin_check(f, out, cuda_tolerance(f), "out");
    const size_t bytes = (size_t)(out.span + 2 * cuda_guard(f)) * sizeof(uint16_t);
    if (!fixture_same(twin_fetch(f, out), twin_fetch(f, far), bytes))
        cuda_wrong(f, "recent tokens give other bits than the same over the bus");
}

static void compare_recent(struct cuda_fixture *f, int dim, int longest, int capacity, int steps, int most)
{
    struct memories m = memories_take(f, dim, longest);
    for (int s = 0; s < SLOTS; s++) {
        struct parts p = draw_parts(f, &m, s, s == 1);
        split(f, &m, s, &p);
    }
    struct recent r = take_recent(f, &m, capacity, steps);
    for (int step = 0; step < 6; step++) {
        cuda_what(f, "recent tokens, step %d, %d places of %d dimensions for %d of %d steps, lanes up to %d", step,
                  capacity, dim, most, steps, longest);
        compare_step(f, &m, &r, step, most);
    }
    memories_free(f, &m);
}

static void test_recent(void)
{
    struct cuda_fixture *f = cuda_begin(4);
    compare_recent(f, 64, 60, 32, 1, 30);
    if (f->effort > QUICK) {
        compare_recent(f, 128, 900, 208, 1, 200);
        compare_recent(f, 72, 700, 304, 3, 100);
        compare_recent(f, 8, 400, 32, 2, 100); /* too few places */
        compare_recent(f, 96, 2100, 1040, 1, 1030);
    }
    cuda_end(f);
}

int main(int argc, char **argv)
{
    const struct check_case cases[] = {{"split", test_split},
                                       {"clusters of listed keys", test_clusters},
                                       {"attention over both memories", test_attention},
                                       {"recent tokens", test_recent},
                                       {0}};
    return cuda_main("cuda_recall", cases, argc, argv);
}
