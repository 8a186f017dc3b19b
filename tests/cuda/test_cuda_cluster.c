/* CUDA's clustering of keys and choice of clusters against the CPU's.
 *
 * Clustering: after one round labels may differ only where two cosines nearly tie, which is counted; after many rounds
 * such a key has moved centres, and there every key must lie within rounding of its best centre. Choice: centroids and
 * queries are small integers, so that every score is exact and ties are many: the same lists. */
#include "tests/cuda/cuda_cache.h"

/* Clusters on both sides. */
struct clusters {
    struct kv_clusters gpu, cpu;
    struct pair size, entry, state, centre;
    struct twin centroid;
};

static struct clusters clusters_take(struct cuda_fixture *f, const struct cache *c, int first_lane, int n_lanes,
                                     int max_clusters, int max_entries)
{
    struct clusters x = {
        .cpu = {
            .first_lane = first_lane, .n_lanes = n_lanes, .max_clusters = max_clusters, .max_entries = max_entries}};
    const size_t rows = (size_t)(c->cpu.n_slots * n_lanes);
    x.centroid = twin_3d(f, (int64_t)rows, max_clusters, c->cpu.head_dim, 0, 0);
    x.size = pair_of(f, NULL, rows * (size_t)max_clusters * sizeof(int32_t));
    x.entry = pair_of(f, NULL, rows * (size_t)max_entries * sizeof(int32_t));
    x.state = pair_of(f, NULL, rows * sizeof(struct cluster_state));
    x.gpu = x.cpu;
    x.gpu.centroid = x.centroid.gpu, x.cpu.centroid = x.centroid.cpu;
    x.gpu.size = x.size.gpu, x.cpu.size = x.size.cpu;
    x.gpu.entry = x.entry.gpu, x.cpu.entry = x.entry.cpu;
    x.gpu.state = x.state.gpu, x.cpu.state = x.state.cpu;
    x.gpu.work = cuda_take(f, ops_cluster_bytes(&f->gpu, n_lanes, c->cpu.head_dim, max_entries, max_clusters));
    x.cpu.work =
        fixture_take(f->cpu, ops_cluster_bytes(&f->cpu->ops, n_lanes, c->cpu.head_dim, max_entries, max_clusters));
    return x;
}

/* ---- k-means ---- */

/* Labels of a lane from its sizes and entries; false if an entry is missing, twice, or out of order in its cluster. */
static bool labels_of(const struct cluster_job *job, const int32_t *size, const int32_t *entry, int32_t *label)
{
    int at = 0;
    for (int i = 0; i < job->n_entries; i++) label[i] = -1;
    for (int c = 0; c < job->n_clusters; c++)
        for (int j = 0; j < size[c]; j++, at++) {
            const int i = at < job->n_entries ? entry[at] - job->first_entry : -1;
            if (i < 0 || i >= job->n_entries || label[i] >= 0 || (j > 0 && entry[at] <= entry[at - 1])) return false;
            label[i] = c;
        }
    return at == job->n_entries;
}

static double cosine(const float *a, const float *b, int dim)
{
    double dot = 0, aa = 0, bb = 0;
    for (int d = 0; d < dim; d++) {
        dot += (double)a[d] * (double)b[d];
        aa += (double)a[d] * (double)a[d];
        bb += (double)b[d] * (double)b[d];
    }
    return aa > 0 && bb > 0 ? dot / sqrt(aa * bb) : 0;
}

/* Keys that have a centre nearer than their own by more than the centroids' rounding explains. */
static int badly_placed(const struct cuda_fixture *f, const struct cache *c, const struct cluster_job *job, int lane,
                        const float *centroid, const int32_t *label)
{
    const double slack = f->dtype == DTYPE_F16 ? 2e-3 : 1e-2;
    const int dim = c->cpu.head_dim, step = 1 + job->n_entries / 200;
    int n = 0;
    for (int i = 0; i < job->n_entries; i += step) {
        const float *key = fixture_key(&c->cpu, lane, job->first_entry + i);
        const double own = cosine(key, centroid + (int64_t)label[i] * dim, dim);
        for (int k = 0; k < job->n_clusters; k++)
            if (cosine(key, centroid + (int64_t)k * dim, dim) > own + slack) {
                n++;
                break;
            }
    }
    return n;
}

/* All lanes of a slot: sorted lists in order, labels as the CPU's but for near ties (one round), centroids alike. */
static void check_clusters(struct cuda_fixture *f, const struct cache *c, const struct clusters *x,
                           const struct cluster_job *job)
{
    const int dim = c->cpu.head_dim;
    const int32_t *sizes = pair_fetch(f, x->size), *entries = pair_fetch(f, x->entry);
    const void *raw = twin_fetch(f, x->centroid);
    int32_t *got = fixture_take(f->cpu, (size_t)job->n_entries * 4),
            *want = fixture_take(f->cpu, (size_t)job->n_entries * 4);
    float *centroid = fixture_take(f->cpu, (size_t)(job->n_clusters * dim) * sizeof *centroid);
    int differ = 0, bad = 0, far = 0;
    for (int i = 0; i < x->cpu.n_lanes; i++) {
        const int64_t row = (int64_t)job->slot * x->cpu.n_lanes + i,
                      first = row * x->cpu.max_clusters + job->first_cluster;
        const int64_t place = row * x->cpu.max_entries + job->first_place;
        const int lane = job->slot * c->cpu.lanes_per_slot + x->cpu.first_lane + i;
        if (!labels_of(job, sizes + first, entries + place, got)) {
            cuda_wrong(f, "lane %d: its lists do not name each entry once, in order", i);
            continue;
        }
        EXPECT(f, labels_of(job, x->cpu.size + first, x->cpu.entry + place, want));
        for (int j = 0; j < job->n_entries; j++) differ += got[j] != want[j];
        for (int j = 0; j < job->n_clusters; j++) {
            double wrong = 0, all = 0;
            for (int d = 0; d < dim; d++) {
                const float mean = ((const float *)x->cpu.centroid.data)[(first + j) * dim + d];
                const float have = cuda_element(raw, f->dtype, cuda_guard(f) + (first + j) * dim + d);
                centroid[j * dim + d] = have;
                wrong += (double)(have - mean) * (double)(have - mean);
                all += (double)mean * (double)mean;
            }
            far += !(sqrt(wrong) <= cuda_tolerance(f) * sqrt(all));
        }
        if (job->iterations > 1) bad += badly_placed(f, c, job, lane, centroid, got);
    }
    const int keys = x->cpu.n_lanes * job->n_entries;
    if (f->effort > QUICK && differ) printf("\n    %s: %d of %d labels differ", f->what, differ, keys);
    if (job->iterations == 1 && differ > 4 + keys / 500)
        cuda_wrong(f, "%d of %d labels differ from the CPU's", differ, keys);
    if (job->iterations == 1 && far > 2 + x->cpu.n_lanes * job->n_clusters / 100)
        cuda_wrong(f, "%d of %d centroids are not the CPU's", far, x->cpu.n_lanes * job->n_clusters);
    if (bad) cuda_wrong(f, "%d keys have a nearer centre", bad);
}

struct shape {
    int dim, n_kv_heads, layers, first_entry, n_entries, n_clusters, iterations;
};

/* First centres of all lanes, without repeats: a stride through the entries. */
static void draw(struct cuda_fixture *f, int32_t *centre, int lanes, int n_entries, int n_clusters)
{
    for (int i = 0; i < lanes; i++) {
        const int step = n_entries / n_clusters, first = fixture_int(f->cpu, 0, step - 1);
        for (int j = 0; j < n_clusters; j++) centre[i * n_clusters + j] = first + j * step;
    }
}

static void compare_clusters(struct cuda_fixture *f, struct shape s)
{
    const int lanes = s.n_kv_heads * s.layers, length = s.first_entry + s.n_entries + 3, max_pages = length / 16 + 1;
    struct cache c = cache_take(f, 2, lanes + 1, max_pages, max_pages * (lanes + 1), 16, s.dim, STALE_NAN);
    struct clusters x = clusters_take(f, &c, 1, lanes, s.n_clusters + 5, s.n_entries + 7);
    int32_t *centre = fixture_take(f->cpu, (size_t)(lanes * s.n_clusters) * sizeof *centre);
    cuda_what(f, "%d entries from %d on in %d clusters, %d lanes of %d, %d rounds", s.n_entries, s.first_entry,
              s.n_clusters, lanes, s.dim, s.iterations);
    for (int l = 0; l < s.layers; l++) {
        const struct attention_heads heads = {s.n_kv_heads, s.n_kv_heads, s.dim, 1 + l * s.n_kv_heads, 1};
        cache_fill(f, &c, &heads, 1, length);
    }
    draw(f, centre, lanes, s.n_entries, s.n_clusters);
    struct pair p = pair_of(f, centre, (size_t)(lanes * s.n_clusters) * sizeof *centre);
    struct cluster_job gpu = {.slot = 1,
                              .first_entry = s.first_entry,
                              .n_entries = s.n_entries,
                              .first_cluster = 3,
                              .n_clusters = s.n_clusters,
                              .first_place = 2,
                              .iterations = s.iterations,
                              .centre = p.gpu},
                       cpu = gpu;
    cpu.centre = p.cpu;
    RUN(f, ops_cluster_keys(&f->gpu, &c.gpu, &x.gpu, &gpu));
    RUN(f, ops_cluster_keys(&f->cpu->ops, &c.cpu, &x.cpu, &cpu));
    check_clusters(f, &c, &x, &cpu);
    const void *size = pair_fetch(f, x.size), *entry = pair_fetch(f, x.entry), *centroid = twin_fetch(f, x.centroid);
    RUN(f, ops_cluster_keys(&f->gpu, &c.gpu, &x.gpu, &gpu)); /* and the same bits again */
    EXPECT(f, fixture_same(size, pair_fetch(f, x.size), x.size.bytes));
    EXPECT(f, fixture_same(entry, pair_fetch(f, x.entry), x.entry.bytes));
    EXPECT(f, fixture_same(centroid, twin_fetch(f, x.centroid),
                           (size_t)(x.centroid.span + 2 * cuda_guard(f)) * dtype_size(f->dtype)));
    cuda_clear(f);
}

/* ---- some of the lanes, aside ---- */

/* A layer's lanes after the other, as a prompt's last step issues them: layer l + 1 gets its keys while layer l is
 * clustered aside, its first centres uploaded there; and uploads on both sides that take the ring of pinned memory
 * around. What all lanes at once come to are the bits to be had. */
static void compare_layers(struct cuda_fixture *f, struct shape s, size_t beside)
{
    const int lanes = s.n_kv_heads * s.layers, length = s.first_entry + s.n_entries, max_pages = length / 16 + 1;
    struct cache c = cache_take(f, 2, lanes + 1, max_pages, max_pages * (lanes + 1), 16, s.dim, STALE_NAN);
    struct clusters want = clusters_take(f, &c, 1, lanes, s.n_clusters + 5, s.n_entries + 7),
                    got = clusters_take(f, &c, 1, lanes, s.n_clusters + 5, s.n_entries + 7);
    int32_t *centre = fixture_take(f->cpu, (size_t)(lanes * s.n_clusters) * sizeof *centre);
    struct cluster_job job = {.slot = 1,
                              .first_entry = s.first_entry,
                              .n_entries = s.n_entries,
                              .first_cluster = 3,
                              .n_clusters = s.n_clusters,
                              .first_place = 2,
                              .iterations = s.iterations};
    cuda_what(f, "%d layers aside, %d entries in %d clusters, %d lanes of %d, %zu bytes beside", s.layers, s.n_entries,
              s.n_clusters, lanes, s.dim, beside);
    draw(f, centre, lanes, s.n_entries, s.n_clusters);
    const size_t bytes = (size_t)(s.n_kv_heads * s.n_clusters) * sizeof *centre;
    struct pair all = pair_of(f, centre, bytes * (size_t)s.layers),
                other = pair_floats(f, (int64_t)beside / 4 + 1, 1, 0);
    void *room = cuda_take(f, bytes);
    RUN(f, ops_zero(&f->gpu, other.gpu, other.bytes));
    for (int l = 0; l < s.layers; l++) {
        const struct attention_heads heads = {s.n_kv_heads, s.n_kv_heads, s.dim, 1 + l * s.n_kv_heads, 1};
        cache_fill(f, &c, &heads, 1, length);
        job.first_lane = l * s.n_kv_heads, job.n_lanes = s.n_kv_heads, job.centre = room;
        RUN(f, ops_aside_begin(&f->gpu));
        RUN(f, ops_upload(&f->gpu, room, centre + (int64_t)job.first_lane * s.n_clusters, bytes));
        RUN(f, ops_cluster_keys(&f->gpu, &c.gpu, &got.gpu, &job));
        ops_aside_end(&f->gpu);
        RUN(f, ops_upload(&f->gpu, other.gpu, other.cpu, other.bytes));
    }
    RUN(f, ops_aside_join(&f->gpu));
    const void *size = pair_fetch(f, got.size), *entry = pair_fetch(f, got.entry);
    const void *centroid = twin_fetch(f, got.centroid);
    job.first_lane = job.n_lanes = 0, job.centre = all.gpu;
    RUN(f, ops_cluster_keys(&f->gpu, &c.gpu, &want.gpu, &job));
    EXPECT(f, fixture_same(size, pair_fetch(f, want.size), want.size.bytes));
    EXPECT(f, fixture_same(entry, pair_fetch(f, want.entry), want.entry.bytes));
    EXPECT(f, fixture_same(centroid, twin_fetch(f, want.centroid),
                           (size_t)(want.centroid.span + 2 * cuda_guard(f)) * dtype_size(f->dtype)));
    pair_check(f, other, "what was uploaded beside");
    cuda_clear(f);
}

static void test_aside(void)
{
    struct cuda_fixture *f = cuda_begin(3);
    RUN(f, ops_aside_join(&f->gpu)); /* of nothing */
    compare_layers(f, (struct shape){64, 2, 3, 5, 90, 8, 3}, 1000);
    if (f->effort > QUICK) {
        compare_layers(f, (struct shape){128, 8, 4, 16, 4100, 51, 20}, 9 << 20);
        compare_layers(f, (struct shape){128, 1, 6, 16, 4100, 51, 5}, 1 << 20);
        compare_layers(f, (struct shape){72, 3, 12, 16, 700, 9, 20}, 9 << 20);
    }
    RUN(f, ops_aside_begin(&f->gpu));
    EXPECT(f, ops_aside_begin(&f->gpu) == ERR_BUG && ops_aside_join(&f->gpu) == ERR_BUG);
    ops_aside_end(&f->gpu);
    ops_aside_end(&f->gpu); /* nothing to end */
    RUN(f, ops_finish(&f->gpu));
    cuda_end(f);
}

/* ---- all lanes ---- */

static void test_clusters(void)
{
    struct cuda_fixture *f = cuda_begin(1);
    static const int dims[] = {64, 128, 8, 72, 96, 80, 24};
    for (int i = 0; i < 7; i++) {
        if (f->effort == QUICK && i > 1) break;
        const int n = f->effort == QUICK ? 70 : 300 + 61 * i;
        compare_clusters(f, (struct shape){dims[i], 1 + i % 3, 2, 16 - i, n, 1 + 7 * i, 1});
        compare_clusters(f, (struct shape){dims[i], 1 + i % 3, 2, i, n, n / 8, 20});
    }
    compare_clusters(f, (struct shape){64, 1, 1, 0, 1, 1, 1});
    compare_clusters(f, (struct shape){64, 2, 1, 3, 40, 40, 2});
    compare_clusters(f, (struct shape){64, 4, 2, 578, 9, 9, 1}); /* single tokens behind an image */
    if (f->effort > QUICK) {
        compare_clusters(f, (struct shape){64, 4, 8, 16, 584, 7, 1});
        compare_clusters(f, (struct shape){128, 8, 3, 16, 2864, 36, 1});
        compare_clusters(f, (struct shape){128, 8, 1, 16, 2864, 36, 20});
        compare_clusters(f, (struct shape){128, 2, 1, 16, 4100, 512, 1});
        compare_clusters(f, (struct shape){128, 8, 1, 2880, 320, 4, 20});
        compare_clusters(f, (struct shape){64, 1, 1, 0, 4090, 2045, 1});
    }
    cuda_end(f);
}

/* ---- the choice ---- */

enum { SLOTS = 4, FIRST = 5 };

static int compare_entries(const void *a, const void *b) { return *(const int32_t *)a - *(const int32_t *)b; }

/* Random sizes, some of them 0, that add up to n; entries FIRST .. FIRST + n - 1 in a random order, ascending within.
 */
static void invent_clusters(struct cuda_fixture *f, struct clusters *x, int64_t row, int n_clusters, int n)
{
    int32_t *size = x->cpu.size + row * x->cpu.max_clusters, *entry = x->cpu.entry + row * x->cpu.max_entries;
    for (int i = 0; i < x->cpu.max_clusters; i++) size[i] = i < n_clusters ? 0 : 1000000; /* stale behind */
    for (int i = 0; i < n; i++) size[fixture_int(f->cpu, 0, n_clusters - 1) * (i % 3 > 0)]++;
    for (int i = 0; i < n; i++) entry[i] = FIRST + i;
    for (int i = n - 1; i > 0; i--) {
        const int j = fixture_int(f->cpu, 0, i), kept = entry[i];
        entry[i] = entry[j], entry[j] = kept;
    }
    for (int i = 0, at = 0; i < n_clusters; at += size[i++])
        qsort(entry + at, (size_t)size[i], sizeof *entry, compare_entries);
}

static void small_integers(struct cuda_fixture *f, struct twin t, int most)
{
    for (int64_t r = 0; r < t.cpu.dim[0]; r++)
        for (int64_t i = 0; i < twin_width(t); i++)
            fixture_row(t.cpu, r)[i] = fixture_int(f->cpu, 0, 2) ? 0 : (float)fixture_int(f->cpu, -most, most);
    twin_send(f, t, true);
}

static void compare_choice(struct cuda_fixture *f, int dim, int n_kv_heads, int group, int n_clusters, int n,
                           enum cluster_kv_group by)
{
    static const char *const names[] = {"", ", mean", ", each query head"};
    const int lists = by == CLUSTER_KV_QUERY_HEAD ? n_kv_heads * group : n_kv_heads; /* of a row */
    const int most = n + FIRST + 40, stride = (most > n_clusters ? most : n_clusters) + 3, rows = SLOTS + 2;
    const struct attention_heads heads = {n_kv_heads * group, n_kv_heads, dim, 2, 1};
    struct cache c = cache_take(f, SLOTS, n_kv_heads + 3, 1, 1, 16, dim, STALE_NAN);
    struct clusters x = clusters_take(f, &c, 1, n_kv_heads + 2, n_clusters, n);
    struct cluster_state *state = x.state.cpu;
    struct pair length = pair_of(f, c.cpu.lane_len, (size_t)(SLOTS * (n_kv_heads + 3)) * sizeof(int32_t));
    cuda_what(f, "choice from %d clusters of %d entries, %d/%d heads of %d%s", n_clusters, n, n_kv_heads * group,
              n_kv_heads, dim, names[by]);
    for (int s = 0; s < SLOTS; s++) {
        const int budget = fixture_int(f->cpu, 1, s == 0 ? n : s == 3 ? 2 * n : n / 8 + 1);
        for (int i = 0; i < n_kv_heads + 2; i++) {
            const int row = s * (n_kv_heads + 2) + i;
            invent_clusters(f, &x, row, n_clusters, n);
            state[row] = (struct cluster_state){n_clusters, FIRST, FIRST + n, budget, 0};
            if (s < 2) continue;
            state[row].end = FIRST + (s == 2 ? n / 2 : 0); /* the others lie in host memory */
            state[row].n_host = n - (state[row].end - FIRST);
            for (int j = 0; j < n; j++)
                if (x.cpu.entry[row * n + j] >= state[row].end) x.cpu.entry[row * n + j] = ~x.cpu.entry[row * n + j];
        }
        for (int i = 0; i < n_kv_heads + 3; i++)
            ((int32_t *)length.cpu)[s * (n_kv_heads + 3) + i] = state[s * (n_kv_heads + 2)].end + (s == 1 ? 0 : 40 - s);
    }
    /* These lanes are read whole. */
    for (int i = 0; i < n_kv_heads + 2 && n > 30; i += 2) state[2 * (n_kv_heads + 2) + i].n_clusters = 0;
    pair_send(f, length);
    pair_send(f, x.size);
    pair_send(f, x.entry);
    pair_send(f, x.state);
    small_integers(f, x.centroid, 3);
    c.gpu.lane_len = length.gpu, c.cpu.lane_len = length.cpu;
    const int32_t slots[] = {3, -1, 0, 1, 0, 2};
    struct batch b = batch_of(f, slots, NULL, rows);
    struct twin q = twin_3d(f, rows, n_kv_heads * group, dim, 8, 1);
    small_integers(f, q, 2);
    struct pair entry = pair_of(f, NULL, (size_t)(rows * lists * stride) * sizeof(int32_t));
    struct pair count = pair_of(f, NULL, (size_t)(rows * lists) * sizeof(int32_t));
    RUN(f, ops_select_clusters(&f->gpu, entry.gpu, count.gpu, stride, q.gpu, by, &b.gpu, &c.gpu, &heads, &x.gpu));
    RUN(f, ops_select_clusters(&f->cpu->ops, entry.cpu, count.cpu, stride, q.cpu, by, &b.cpu, &c.cpu, &heads, &x.cpu));
    pair_check(f, count, "count");
    int32_t *got = pair_fetch(f, entry), *want = entry.cpu;
    for (int i = 0; i < rows * lists; i++) {
        const int k = ((int32_t *)count.cpu)[i];
        if (k <= 0) continue;
        qsort(got + (int64_t)i * stride, (size_t)k, sizeof *got, compare_entries);
        qsort(want + (int64_t)i * stride, (size_t)k, sizeof *want, compare_entries);
    }
    for (int64_t i = 0; i < (int64_t)rows * lists * stride; i++)
        if (i % stride < ((int32_t *)count.cpu)[i / stride] && got[i] != want[i]) {
            cuda_wrong(f, "list %lld of %d, place %lld: entry %d, expected %d", (long long)i / stride, rows * lists,
                       (long long)i % stride, got[i], want[i]);
            break;
        }
    cuda_clear(f);
}

static void test_choice(void)
{
    struct cuda_fixture *f = cuda_begin(2);
    static const int dims[] = {64, 128, 8, 72, 96}, groups[] = {1, 4, 2, 3, 8, 16};
    for (int i = 0; i < (f->effort == QUICK ? 4 : 60); i++) {
        const int n_clusters = i % 3 == 0 ? fixture_int(f->cpu, 1, 40) : i % 3 == 1 ? fixture_int(f->cpu, 1, 600) : 36;
        compare_choice(f, dims[i % 5], 1 + i % 4, groups[i % 6], n_clusters,
                       fixture_int(f->cpu, 1, f->effort == QUICK ? 90 : 3000),
                       (enum cluster_kv_group)((i + i / 3) % 3));
    }
    compare_choice(f, 64, 1, 2, 1, 1, CLUSTER_KV_MAX);
    if (f->effort > QUICK) {
        compare_choice(f, 128, 8, 4, 36, 2864, CLUSTER_KV_MAX);
        compare_choice(f, 128, 8, 4, 36, 2864, CLUSTER_KV_QUERY_HEAD);
        compare_choice(f, 128, 2, 4, 512, 3000, CLUSTER_KV_MAX);
        compare_choice(f, 128, 2, 4, 513, 3000, CLUSTER_KV_MEAN);
        compare_choice(f, 128, 2, 4, 513, 3000, CLUSTER_KV_QUERY_HEAD);
        compare_choice(f, 64, 1, 4, 4096, 8000, CLUSTER_KV_MAX);
        compare_choice(f, 64, 2, 17, 100, 900, CLUSTER_KV_QUERY_HEAD); /* more heads than can share a list */
    }
    cuda_end(f);
}

int main(int argc, char **argv)
{
    const struct check_case cases[] = {
        {"clusters", test_clusters}, {"some lanes aside", test_aside}, {"choice of clusters", test_choice}, {0}};
    return cuda_main("cuda_cluster", cases, argc, argv);
}
