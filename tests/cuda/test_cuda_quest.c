/* CUDA's picking of pages against the CPU's: bounds of pages bit for bit, ranks and lists of steps over lanes of any
 * length, every head dimension and group size. Keys and queries are multiples of 1/16, so that both sides' sums are
 * exact and equal ranks are equal. */
#include <limits.h>

#include "tests/cuda/cuda_cache.h"

struct shape {
    int n_kv_heads, group, dim;
};
enum { MOST_ROWS = 64, PAGE = 16 };

/* Values of a twin put on the grid, few enough that pages tie now and then. */
static void coarsen(struct cuda_fixture *f, struct twin t)
{
    for (int64_t r = 0; r < t.cpu.dim[0]; r++)
        for (int64_t i = 0; i < twin_width(t); i++) {
            float *x = &fixture_row(t.cpu, r)[i];
            *x = rintf(*x * 2) / 16;
        }
    twin_send(f, t, true);
}

static struct twin coarse(struct cuda_fixture *f, int rows, int heads, int dim, int gap)
{
    struct twin t = twin_3d(f, rows, heads, dim, gap, 2);
    coarsen(f, t);
    return t;
}

/* A cache of two layers whose slots have prompts of just any lengths, the first one's `longest`. */
struct bench {
    struct cache c;
    struct shape s;
    struct twin bounds;
    struct pair limit;
    int slots;
};

static struct bench take_bench(struct cuda_fixture *f, struct shape s, int slots, int longest)
{
    struct bench b = {.s = s, .slots = slots};
    const int lanes = 2 * s.n_kv_heads, max_pages = (longest + 64) / PAGE + 1, n_pages = slots * lanes * max_pages;
    int32_t *limit = fixture_take(f->cpu, sizeof *limit * (size_t)slots);
    b.c = cache_take(f, slots, lanes, max_pages, n_pages, PAGE, s.dim, STALE_NAN);
    b.bounds = twin_3d(f, n_pages, 2, s.dim, 0, 0);
    for (int i = 0; i < slots; i++) {
        const int n = i ? fixture_int(f->cpu, 0, longest) : longest;
        const int32_t slot[1] = {i}, cu[2] = {0, n};
        const struct attention_heads all = {lanes, lanes, s.dim, 0, 1};
        limit[i] = i % 5 == 4 ? 0 : fixture_int(f->cpu, 1, n / PAGE / 2 + 3);
        struct batch prompt = batch_of(f, slot, cu, 1);
        if (n) cache_append(f, &b.c, &all, coarse(f, n, lanes, s.dim, 0), coarse(f, n, lanes, s.dim, 0), &prompt);
        RUN(f, ops_page_bounds(&f->gpu, b.bounds.gpu, &b.c.gpu, i, 0, lanes));
        RUN(f, ops_page_bounds(&f->cpu->ops, b.bounds.cpu, &b.c.cpu, i, 0, lanes));
    }
    b.limit = pair_of(f, limit, sizeof *limit * (size_t)slots);
    return b;
}

/* Bounds of all pages of all lanes are the CPU's, wherever the pages lie; of slots that are read whole they are left.
 */
static void check_bounds(struct cuda_fixture *f, const struct bench *b)
{
    const struct kv_view host = cache_fetch(f, &b->c);
    const uint16_t *raw = (const uint16_t *)twin_fetch(f, b->bounds) + cuda_guard(f);
    for (int lane = 0; lane < host.n_slots * host.lanes_per_slot; lane++)
        for (int page = ((const int32_t *)b->limit.cpu)[lane / host.lanes_per_slot] ? 0 : INT_MAX;
             page < (host.lane_len[lane] + PAGE - 1) / PAGE; page++) {
            const int64_t at = (int64_t)host.page_row[lane * host.max_pages + page] * 2 * b->s.dim;
            const float *want = fixture_row(b->bounds.cpu, b->c.cpu.page_row[lane * host.max_pages + page]);
            for (int i = 0; i < 2 * b->s.dim; i++)
                if (cuda_element(raw, f->dtype, at + i) != want[i]) {
                    cuda_wrong(f, "bounds of page %d of lane %d (%d tokens): [%d] is %g, expected %g", page, lane,
                               host.lane_len[lane], i, (double)cuda_element(raw, f->dtype, at + i), (double)want[i]);
                    return;
                }
        }
}

/* One step of a layer; lists beyond their counts are left as they were on both sides. */
static void compare_step(struct cuda_fixture *f, const struct bench *b, int layer, int step)
{
    const struct shape s = b->s;
    const struct attention_heads heads = {s.n_kv_heads * s.group, s.n_kv_heads, s.dim, layer * s.n_kv_heads, 1};
    int32_t slot[MOST_ROWS];
    int rows = 0;
    for (int i = 0; i < b->slots; i++) {
        if (rows % 4 == 1) slot[rows++] = -1;
        slot[rows++] = (i * 7 + step) % b->slots;
    }
    const int stride = b->c.cpu.max_pages * PAGE, lists = rows * s.n_kv_heads;
    struct batch batch = batch_of(f, slot, NULL, rows);
    struct twin q = coarse(f, rows, heads.n_heads, s.dim, 8), k = coarse(f, rows, s.n_kv_heads, s.dim, 0);
    cache_append(f, &b->c, &heads, k, coarse(f, rows, s.n_kv_heads, s.dim, 0), &batch);
    struct twin score = twin_make(f, DTYPE_F32, lists, b->c.cpu.max_pages, -1, 0, 0);
    struct pair entry = pair_of(f, NULL, sizeof(int32_t) * (size_t)lists * (size_t)stride);
    struct pair count = pair_of(f, NULL, sizeof(int32_t) * (size_t)lists);
    const struct page_pick gpu = {b->bounds.gpu, score.gpu, b->limit.gpu, entry.gpu, count.gpu, stride};
    const struct page_pick cpu = {b->bounds.cpu, score.cpu, b->limit.cpu, entry.cpu, count.cpu, stride};
    RUN(f, ops_pick_pages(&f->gpu, q.gpu, &batch.gpu, &b->c.gpu, &heads, &gpu));
    RUN(f, ops_pick_pages(&f->cpu->ops, q.cpu, &batch.cpu, &b->c.cpu, &heads, &cpu));
    pair_check(f, count, "count");
    pair_check(f, entry, "entry");
}

static void compare(struct cuda_fixture *f, struct shape s, int slots, int longest, int steps)
{
    cuda_what(f, "pages, %d/%d heads of %d, %d slots, lanes up to %d", s.n_kv_heads * s.group, s.n_kv_heads, s.dim,
              slots, longest);
    struct bench b = take_bench(f, s, slots, longest);
    check_bounds(f, &b);
    for (int step = 0; step < steps; step++) compare_step(f, &b, step % 2, step);
    check_bounds(f, &b);
    cuda_clear(f);
}

static const int dims[] = {8, 64, 72, 80, 96, 104, 128}, groups[] = {1, 2, 3, 4, 7, 8, 16};

static void test_shapes(void)
{
    static const int lengths[] = {1, 15, 16, 17, 200, 600, 1500};
    struct cuda_fixture *f = cuda_begin(1);
    for (int i = 0; i < 7; i++)
        for (int j = 0; j < 7; j++) {
            if (f->effort == QUICK && (i + j * 2) % 7) continue;
            if (f->effort == SOME && (i + j) % 3) continue;
            compare(f, (struct shape){1 + (i + j) % 3, groups[j], dims[i]}, f->effort == QUICK ? 2 : 6,
                    f->effort == QUICK ? 1 + 43 * i : lengths[(i * 3 + j) % 7], f->effort == QUICK ? 3 : 20);
        }
    cuda_end(f);
}

static void test_many(void)
{
    struct cuda_fixture *f = cuda_begin(2);
    if (f->effort == ALL) {
        compare(f, (struct shape){8, 4, 128}, 45, 300, 4);
        compare(f, (struct shape){2, 4, 128}, 2, 4200, 4); /* more pages than a list's block has threads */
    }
    cuda_end(f);
}

static void test_refusals(void)
{
    struct cuda_fixture *f = cuda_begin(3);
    struct bench b = take_bench(f, (struct shape){1, 1, 16}, 1, 20);
    const int32_t slot[1] = {0};
    const struct attention_heads heads = {17, 1, 16, 0, 1};
    struct batch batch = batch_of(f, slot, NULL, 1);
    struct twin q = coarse(f, 1, 17, 16, 0), score = twin_make(f, DTYPE_F32, 1, b.c.cpu.max_pages, -1, 0, 0);
    struct pair entry = pair_of(f, NULL, 400), count = pair_of(f, NULL, 4);
    const struct page_pick pick = {b.bounds.gpu, score.gpu, b.limit.gpu, entry.gpu, count.gpu, 96};
    cuda_what(f, "a group of 17");
    EXPECT(f, ops_pick_pages(&f->gpu, q.gpu, &batch.gpu, &b.c.gpu, &heads, &pick) == ERR_UNSUPPORTED);
    EXPECT(f, strstr(status_message(), "groups of 17") != NULL);
    cuda_end(f);
}

int main(int argc, char **argv)
{
    const struct check_case cases[] = {{"heads, groups and lengths", test_shapes},
                                       {"many rows, many pages", test_many},
                                       {"refusals", test_refusals},
                                       {0}};
    return cuda_main("cuda_quest", cases, argc, argv);
}
