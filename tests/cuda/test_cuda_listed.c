/* CUDA's decode attention over listed entries against the CPU's: lists of any length and order over lanes of any
 * length, every head dimension and group size, whole lanes among them, padding rows; the same bits alone and in a
 * batch; whole lanes against ops_attention_decode; and how fast it is, in print. */
#include "tests/cuda/cuda_cache.h"

struct shape {
    int n_kv_heads, group, dim, page_size;
};
enum { MOST_ROWS = 64 };

/* Which entries a list names. */
enum kind { DRAWN, IDENTITY, WHOLE };

/* A layer, the second of two, whose lanes have just any lengths up to `longest`, one of them just that. */
struct layer {
    struct cache c;
    struct attention_heads heads;
    struct twin q, out;
    struct batch b;
    int32_t slot[MOST_ROWS];
    int rows;
};

static struct layer take_layer(struct cuda_fixture *f, struct shape s, int slots, int longest, bool padding)
{
    struct layer x = {.heads = {s.n_kv_heads * s.group, s.n_kv_heads, s.dim, s.n_kv_heads, 1.0f / sqrtf((float)s.dim)}};
    const int lanes = 2 * s.n_kv_heads, max_pages = longest / s.page_size + 2;
    x.c = cache_take(f, slots, lanes, max_pages, slots * s.n_kv_heads * max_pages, s.page_size, s.dim, STALE_NAN);
    for (int i = 0; i < slots; i++) {
        const int n = i ? fixture_int(f->cpu, 0, longest) : longest;
        if (n) cache_fill(f, &x.c, &x.heads, i, n);
        if (i) cache_pack(f, &x.c, i, s.n_kv_heads, s.n_kv_heads, 100 - 10 * (i % 8), 0);
    }
    for (int i = 0; i < slots; i++) {
        if (padding && x.rows % 4 == 1) x.slot[x.rows++] = i % 3 ? -1 : slots;
        x.slot[x.rows++] = (i * 7 + 2) % slots;
    }
    x.b = batch_of(f, x.slot, NULL, x.rows);
    x.q = twin_3d(f, x.rows, x.heads.n_heads, s.dim, 8, 1.5f);
    x.out = twin_3d(f, x.rows, x.heads.n_heads, s.dim, 16, 0);
    return x;
}

static int lane_length(const struct layer *x, int row, int head)
{
    const int slot = x->slot[row];
    if (slot < 0 || slot >= x->c.cpu.n_slots) return 0;
    return x->c.cpu.lane_len[slot * x->c.cpu.lanes_per_slot + x->heads.lane + head];
}

struct lists {
    struct kv_list gpu, cpu;
};

/* Entries beyond a list's count, and the whole list of a lane that is read whole, would be far outside of the cache. */
static struct lists take_lists(struct cuda_fixture *f, const struct layer *x, int stride, enum kind kind, bool own)
{
    const int heads = own ? x->heads.n_heads : x->heads.n_kv_heads,
              lists = x->rows * heads; /* own: each query head's */
    int32_t *entry = fixture_take(f->cpu, sizeof *entry * (size_t)lists * (size_t)stride);
    int32_t *count = fixture_take(f->cpu, sizeof *count * (size_t)lists);
    int32_t *deck = fixture_take(f->cpu, sizeof *deck * (size_t)(x->c.cpu.max_pages * x->c.cpu.page_size));
    for (int i = 0; i < lists; i++) {
        const int length = lane_length(x, i / heads, i % heads * x->heads.n_kv_heads / heads),
                  most = length < stride ? length : stride;
        int32_t *list = entry + (int64_t)i * stride;
        count[i] = kind == IDENTITY ? most : kind == WHOLE || i % 5 == 3 ? -1 : most * fixture_int(f->cpu, 0, 4) / 4;
        for (int j = 0; j < length; j++) deck[j] = j;
        for (int j = 0; j < stride; j++) {
            const int at = kind == DRAWN && j < length ? fixture_int(f->cpu, j, length - 1) : j;
            const int drawn = j < length ? deck[at] : 0;
            if (j < length) deck[at] = deck[j], deck[j] = drawn;
            list[j] = j < count[i] ? drawn : 1 << 28;
        }
    }
    struct pair e = pair_of(f, entry, sizeof *entry * (size_t)lists * (size_t)stride);
    struct pair c = pair_of(f, count, sizeof *count * (size_t)lists);
    return (struct lists){{e.gpu, c.gpu, stride, NULL, NULL, own}, {e.cpu, c.cpu, stride, NULL, NULL, own}};
}

/* Rows alone, from the same lanes: the same bits as in the batch. */
static void compare_alone(struct cuda_fixture *f, const struct layer *x, const struct lists *l)
{
    const int heads = l->gpu.per_query_head ? x->heads.n_heads : x->heads.n_kv_heads;
    struct twin alone = twin_3d(f, x->rows, x->heads.n_heads, x->heads.head_dim, 16, 0);
    for (int i = 0; i < x->rows; i++) {
        const struct seq_batch one = {.n_seqs = 1, .n_tokens = 1, .slot = x->b.gpu.slot + i};
        const struct kv_list list = {l->gpu.entry + (int64_t)i * heads * l->gpu.stride,
                                     l->gpu.count + i * heads,
                                     l->gpu.stride,
                                     NULL,
                                     NULL,
                                     l->gpu.per_query_head};
        RUN(f, ops_attention_decode_listed(&f->gpu, twin_rows(alone, i, 1).gpu, twin_rows(x->q, i, 1).gpu, &one,
                                           &x->c.gpu, &x->heads, &list));
    }
    const size_t bytes = (size_t)(alone.span + 2 * cuda_guard(f)) * sizeof(uint16_t);
    if (!fixture_same(twin_fetch(f, x->out), twin_fetch(f, alone), bytes))
        cuda_wrong(f, "a row alone and in the batch differ");
}

static void compare_lists(struct cuda_fixture *f, struct shape s, int slots, int longest, int stride, bool own)
{
    struct layer x = take_layer(f, s, slots, longest, true);
    struct lists l = take_lists(f, &x, stride, DRAWN, own);
    cuda_what(f, "listed%s, %d/%d heads of %d, pages of %d, %d rows, lanes up to %d, lists up to %d",
              own ? " for each query head" : "", s.n_kv_heads * s.group, s.n_kv_heads, s.dim, s.page_size, x.rows,
              longest, stride);
    RUN(f, ops_attention_decode_listed(&f->gpu, x.out.gpu, x.q.gpu, &x.b.gpu, &x.c.gpu, &x.heads, &l.gpu));
    RUN(f, ops_attention_decode_listed(&f->cpu->ops, x.out.cpu, x.q.cpu, &x.b.cpu, &x.c.cpu, &x.heads, &l.cpu));
    twin_check(f, x.out, cuda_tolerance(f), "out");
    compare_alone(f, &x, &l);
    cuda_clear(f);
}

static void compare(struct cuda_fixture *f, struct shape s, int slots, int longest, int stride)
{
    compare_lists(f, s, slots, longest, stride, false);
    compare_lists(f, s, slots, longest, stride, true);
}

static const int dims[] = {8, 64, 72, 80, 96, 104, 128}, groups[] = {1, 2, 3, 4, 7, 8, 16};

static void test_shapes(void)
{
    static const int lengths[] = {1, 15, 16, 17, 64, 65, 255, 600, 1000};
    struct cuda_fixture *f = cuda_begin(1);
    for (int i = 0; i < 7; i++)
        for (int j = 0; j < 7; j++) {
            if (f->effort == QUICK && (i + j * 2) % 7) continue;
            if (f->effort == SOME && (i + j) % 3) continue;
            for (int k = (i + j) % 3; k < 9; k += f->effort == QUICK ? 9 : 3) {
                const int longest = f->effort == QUICK ? 1 + 43 * i : lengths[k];
                const int stride = (i + j + k) % 4 ? longest : (longest + 2) / 3;
                compare(f, (struct shape){1 + (i + j) % 3, groups[j], dims[i], k % 2 ? 16 : 48},
                        f->effort == QUICK ? 2 : 6, longest, stride);
            }
        }
    cuda_end(f);
}

static void test_long(void)
{
    struct cuda_fixture *f = cuda_begin(2);
    for (int i = 0; i < 7 && f->effort > QUICK; i++) {
        if (f->effort == SOME && i % 3) continue;
        compare(f, (struct shape){2, groups[i], dims[6 - i], 16}, 3, 4352, 1400);
        compare(f, (struct shape){1, groups[6 - i], dims[i], 16}, 2, 4100, 4352); /* more than 32 short pieces */
    }
    if (f->effort == ALL) {
        compare(f, (struct shape){8, 4, 128, 16}, 48, 700, 300);
        compare_lists(f, (struct shape){2, 17, 64, 16}, 5, 700, 300, true); /* more heads than can share a list */
        compare(f, (struct shape){32, 1, 128, 16}, 9, 300, 128);
    }
    cuda_end(f);
}

/* A token is appended as a step does; then all ways of attending to everything are one. */
static void compare_whole(struct cuda_fixture *f, struct shape s, int slots, int longest)
{
    struct layer x = take_layer(f, s, slots, longest, false);
    struct twin k = twin_3d(f, x.rows, s.n_kv_heads, s.dim, 0, 1), v = twin_3d(f, x.rows, s.n_kv_heads, s.dim, 0, 1);
    struct twin out[4] = {x.out};
    for (int i = 1; i < 4; i++) out[i] = twin_3d(f, x.rows, x.heads.n_heads, s.dim, 0, 0);
    cuda_what(f, "whole lanes, %d/%d heads of %d, %d rows, lanes up to %d", s.n_kv_heads * s.group, s.n_kv_heads, s.dim,
              x.rows, longest);
    RUN(f, ops_decode_begin(&f->gpu, &x.b.gpu, &x.c.gpu));
    cache_append(f, &x.c, &x.heads, k, v, &x.b);
    RUN(f, ops_attention_decode(&f->gpu, x.out.gpu, x.q.gpu, &x.b.gpu, &x.c.gpu, &x.heads));
    RUN(f, ops_attention_decode(&f->cpu->ops, x.out.cpu, x.q.cpu, &x.b.cpu, &x.c.cpu, &x.heads));
    twin_check(f, x.out, cuda_tolerance(f), "plain");
    for (int i = 0; i < 4; i++) {
        struct lists l = take_lists(f, &x, i ? longest + 1 : 40, i % 2 ? IDENTITY : WHOLE, i > 1);
        twin_send(f, out[i], false);
        for (int r = 0; r < x.rows && i; r++)
            memcpy(fixture_row(out[i].cpu, r), fixture_row(x.out.cpu, r), (size_t)twin_width(out[1]) * sizeof(float));
        RUN(f, ops_attention_decode_listed(&f->gpu, out[i].gpu, x.q.gpu, &x.b.gpu, &x.c.gpu, &x.heads, &l.gpu));
        twin_check(f, out[i], cuda_tolerance(f), i % 2 ? "list of all entries" : "count -1");
    }
    cuda_clear(f);
}

static void test_whole(void)
{
    struct cuda_fixture *f = cuda_begin(3);
    for (int i = 0; i < (f->effort == QUICK ? 2 : 7); i++) {
        compare_whole(f, (struct shape){2, groups[i], dims[(i * 3) % 7], 16}, 3, f->effort == QUICK ? 90 : 1500);
        compare_whole(f, (struct shape){1, groups[6 - i], dims[i], 16}, 5, 37);
    }
    cuda_end(f);
}

static void test_refusals(void)
{
    struct cuda_fixture *f = cuda_begin(4);
    struct layer x = take_layer(f, (struct shape){1, 17, 64, 16}, 1, 20, false);
    struct lists l = take_lists(f, &x, 20, IDENTITY, false);
    cuda_what(f, "a group of 17");
    EXPECT(f, ops_attention_decode_listed(&f->gpu, x.out.gpu, x.q.gpu, &x.b.gpu, &x.c.gpu, &x.heads, &l.gpu) ==
                  ERR_UNSUPPORTED);
    EXPECT(f, strstr(status_message(), "groups of 17") != NULL);
    cuda_end(f);
}

/* Time of a call, and the bytes of K and V that it reads a second; nothing is checked but that it runs. */
static void measure(struct cuda_fixture *f, struct shape s, int rows, int longest, int entries, bool own)
{
    enum { CALLS = 200 };
    struct layer x = take_layer(f, s, rows, longest, false);
    struct lists l = take_lists(f, &x, entries, DRAWN, own);
    const int lists = rows * s.n_kv_heads * (own ? s.group : 1);
    int32_t *entry = fixture_take(f->cpu, sizeof *entry * (size_t)lists * (size_t)entries);
    int32_t *count = fixture_take(f->cpu, sizeof *count * (size_t)lists);
    double bytes = 0;
    for (int i = 0; i < lists; i++) {
        const int lane = i / (own ? s.group : 1), n = lane_length(&x, lane / s.n_kv_heads, lane % s.n_kv_heads);
        count[i] = n < entries ? n : entries;
        for (int j = 0; j < count[i]; j++) entry[(int64_t)i * entries + j] = j;
        bytes += 4.0 * count[i] * s.dim;
    }
    RUN(f, ops_upload(&f->gpu, (void *)(uintptr_t)l.gpu.entry, entry, sizeof *entry * (size_t)(lists * entries)));
    RUN(f, ops_upload(&f->gpu, (void *)(uintptr_t)l.gpu.count, count, sizeof *count * (size_t)lists));
    double start = 0;
    for (int i = -20; i < CALLS; i++) {
        if (i == 0) {
            RUN(f, ops_finish(&f->gpu));
            start = clock_seconds();
        }
        RUN(f, ops_attention_decode_listed(&f->gpu, x.out.gpu, x.q.gpu, &x.b.gpu, &x.c.gpu, &x.heads, &l.gpu));
    }
    RUN(f, ops_finish(&f->gpu));
    const double seconds = (clock_seconds() - start) / CALLS;
    printf("\n    %d rows, %d/%d heads of %d, up to %d entries%s: %.1f us, %.0f GB/s ", rows, s.n_kv_heads * s.group,
           s.n_kv_heads, s.dim, entries, own ? " a query head" : "", seconds * 1e6, bytes / seconds * 1e-9);
    cuda_clear(f);
}

static void test_speed(void)
{
    struct cuda_fixture *f = cuda_begin(5);
    if (f->effort == ALL) {
        measure(f, (struct shape){8, 4, 128, 16}, 64, 3000, 300, false);
        measure(f, (struct shape){8, 4, 128, 16}, 64, 3000, 300, true);
        measure(f, (struct shape){8, 4, 128, 16}, 1, 4300, 1400, false);
        measure(f, (struct shape){8, 4, 128, 16}, 1, 4300, 1400, true);
        measure(f, (struct shape){32, 1, 128, 16}, 16, 3000, 300, false);
    }
    cuda_end(f);
}

int main(int argc, char **argv)
{
    const struct check_case cases[] = {{"heads, groups and lengths", test_shapes},
                                       {"long lists, many rows", test_long},
                                       {"whole lanes", test_whole},
                                       {"refusals", test_refusals},
                                       {"speed", test_speed},
                                       {0}};
    return cuda_main("cuda_listed", cases, argc, argv);
}
