/* test_ops_cluster - clustering some of a slot's lanes: the same bits as those lanes get when all are clustered, of
 * runs and of lists, and the others stay as they are; also in ops that run aside. */
#include "tests/ops_fixture.h"

enum { SLOTS = 2, SLOT = 1, LANES = 7, FIRST_LANE = 1, N_LANES = 5, DIM = 16, ENTRIES = 90, CLUSTERS = 9, FIRST = 4 };

struct lanes {
    struct fixture *f;
    struct kv_view kv;
    int32_t centre[N_LANES * CLUSTERS], index[N_LANES * ENTRIES];
    struct cluster_count count[N_LANES];
};

static struct kv_clusters take_clusters(struct lanes *t)
{
    struct kv_clusters c = {
        .first_lane = FIRST_LANE, .n_lanes = N_LANES, .max_clusters = CLUSTERS + 3, .max_entries = ENTRIES + 5};
    const int64_t rows = SLOTS * N_LANES;
    c.centroid = tensor_3d(NULL, DTYPE_F32, rows, c.max_clusters, DIM);
    c.centroid.data = fixture_take(t->f, tensor_bytes(c.centroid));
    c.size = fixture_take(t->f, (size_t)(rows * c.max_clusters) * sizeof *c.size);
    c.entry = fixture_take(t->f, (size_t)(rows * c.max_entries) * sizeof *c.entry);
    c.state = fixture_take(t->f, (size_t)rows * sizeof *c.state);
    c.work = fixture_take(t->f, ops_cluster_bytes(&t->f->ops, N_LANES, DIM, c.max_entries, c.max_clusters));
    return c;
}

static void open_lanes(struct lanes *t)
{
    const int pages = (FIRST + ENTRIES + 15) / 16, length = FIRST + ENTRIES;
    const int32_t slot = SLOT, cu[2] = {0, length};
    const struct seq_batch batch = {1, length, &slot, cu, &slot, cu};
    const struct attention_heads heads = {LANES, LANES, DIM, 0, 1};
    t->f = fixture_open(2, 5);
    t->kv = fixture_cache(t->f, SLOTS, LANES, pages, LANES * pages, 16, DIM);
    CHECK_OK(ops_kv_append(&t->f->ops, &t->kv, &heads, fixture_3d(t->f, length, LANES, DIM, 0),
                           fixture_3d(t->f, length, LANES, DIM, 0), &batch));
    for (int i = 0; i < N_LANES; i++) {
        t->count[i] = (struct cluster_count){ENTRIES - 11 * i, CLUSTERS - i};
        for (int c = 0; c < CLUSTERS; c++) t->centre[i * CLUSTERS + c] = (3 + i) * c % 46;
        for (int j = 0; j < ENTRIES; j++) t->index[i * ENTRIES + j] = j + (j > 30 + i ? FIRST : 0);
    }
}

/* A job over the lanes from `first` on, n of them (0: all). */
static struct cluster_job job_of(const struct lanes *t, bool listed, int first, int n)
{
    struct cluster_job job = {.slot = SLOT,
                              .first_entry = listed ? 0 : FIRST,
                              .n_entries = ENTRIES,
                              .first_cluster = 2,
                              .n_clusters = CLUSTERS,
                              .first_place = 3,
                              .iterations = 4,
                              .first_lane = first,
                              .n_lanes = n,
                              .centre = t->centre + first * CLUSTERS};
    if (listed) job.index = t->index + first * ENTRIES, job.count = t->count + first, job.index_stride = ENTRIES;
    return job;
}

static bool same_row(const struct kv_clusters *a, const struct kv_clusters *b, int row)
{
    const int64_t clusters = (int64_t)row * a->max_clusters, entries = (int64_t)row * a->max_entries;
    return fixture_same(fixture_row(a->centroid, row), fixture_row(b->centroid, row),
                        (size_t)a->max_clusters * DIM * sizeof(float)) &&
           fixture_same(a->size + clusters, b->size + clusters, (size_t)a->max_clusters * sizeof *a->size) &&
           fixture_same(a->entry + entries, b->entry + entries, (size_t)a->max_entries * sizeof *a->entry);
}

static void check_range(struct lanes *t, bool listed, int first, int n)
{
    struct ops *o = &t->f->ops;
    struct kv_clusters all = take_clusters(t), some = take_clusters(t), none = take_clusters(t);
    const struct cluster_job whole = job_of(t, listed, 0, 0), part = job_of(t, listed, first, n);
    CHECK_OK(ops_cluster_keys(o, &t->kv, &all, &whole));
    CHECK_OK(ops_aside_begin(o));
    CHECK_OK(ops_cluster_keys(o, &t->kv, &some, &part));
    ops_aside_end(o);
    CHECK_OK(ops_aside_join(o));
    for (int row = 0; row < SLOTS * N_LANES; row++) {
        const bool clustered = row >= SLOT * N_LANES + first && row < SLOT * N_LANES + first + n;
        CHECK(same_row(&some, clustered ? &all : &none, row));
        CHECK(same_row(&all, &none, row) == (row / N_LANES != SLOT));
    }
}

static void test_ranges(void)
{
    struct lanes t;
    open_lanes(&t);
    for (int listed = 0; listed < 2; listed++)
        for (int first = 0; first < N_LANES; first++)
            for (int n = 1; first + n <= N_LANES; n++) check_range(&t, listed, first, n);
    fixture_close(t.f);
}

static void test_arguments(void)
{
    static const struct {
        int first, n;
    } wrong[] = {{-1, 2}, {0, -1}, {0, N_LANES + 1}, {N_LANES, 1}, {3, 3}, {1, 0}, {1 << 30, 1}};
    struct lanes t;
    open_lanes(&t);
    struct kv_clusters c = take_clusters(&t);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        struct cluster_job job = job_of(&t, false, 0, 0);
        job.first_lane = wrong[i].first, job.n_lanes = wrong[i].n;
        CHECK_FAILS(ops_cluster_keys(&t.f->ops, &t.kv, &c, &job), ERR_ARG, "clusters are of 5");
    }
    fixture_close(t.f);
}

int main(void)
{
    const struct check_case cases[] = {{"some of the lanes", test_ranges}, {"arguments", test_arguments}, {0}};
    return check_run("ops_cluster", cases);
}
