/* CUDA's lanes in two parts against the CPU's: the same entries, codes and scales after prompts, packs, ageing, tokens
 * and releases, with the invariant of the pages; how many pages ageing takes; decode attention over both parts, also
 * recorded and played again. */
#include "kernels/ops_aged.h"
#include "tests/cuda/cuda_cache.h"

enum { SLOTS = 4, KV_HEADS = 3, LAYERS = 2, LANES = KV_HEADS * LAYERS, LONGEST = 500, MOST_ROWS = 64, CODE_PAGE = 32 };
static const enum kv_format formats[] = {KV_INT8, KV_FP8};

/* A cache in two views; the pages are kv's. */
struct parts {
    struct cache kv, aged;
    int sinks, window;
};

static struct parts parts_take(struct cuda_fixture *f, int n_slots, int lanes, int max_pages, int n_pages, int dim,
                               enum kv_format format, int sinks, int window)
{
    struct parts p = {
        .kv = cache_take(f, n_slots, lanes, max_pages, n_pages, 16, dim, window % 2 ? STALE_NAN : STALE_LARGE),
        .sinks = sinks,
        .window = window};
    const size_t ints = (size_t)(n_slots * lanes) * sizeof(int32_t);
    p.aged.cpu = fixture_aged(f->cpu, &p.kv.cpu, format);
    p.aged.gpu = p.kv.gpu;
    p.aged.gpu.format = format;
    p.aged.gpu.page_row = cuda_take(f, ints * (size_t)max_pages);
    p.aged.gpu.lane_len = cuda_take(f, ints);
    p.aged.gpu.lane_format = cuda_take(f, ints);
    p.aged.gpu.scale = cuda_take(f, cache_scale_bytes(&p.aged.gpu));
    return p;
}

static void age(struct cuda_fixture *f, const struct parts *p, int slot)
{
    RUN(f, ops_kv_age(&f->gpu, &p->kv.gpu, &p->aged.gpu, slot, p->sinks, p->window));
    RUN(f, ops_kv_age(&f->cpu->ops, &p->kv.cpu, &p->aged.cpu, slot, p->sinks, p->window));
}

static void release(struct cuda_fixture *f, const struct parts *p, int slot)
{
    RUN(f, ops_kv_release(&f->gpu, &p->kv.gpu, slot));
    RUN(f, ops_kv_release(&f->cpu->ops, &p->kv.cpu, slot));
    RUN(f, ops_kv_release(&f->gpu, &p->aged.gpu, slot));
    RUN(f, ops_kv_release(&f->cpu->ops, &p->aged.cpu, slot));
}

static void check_parts(struct cuda_fixture *f, const struct parts *p)
{
    const struct kv_view kv = cache_fetch(f, &p->kv), aged = cache_fetch(f, &p->aged);
    EXPECT(f, *kv.error == *p->kv.cpu.error);
    if (!fixture_parts_ok(&kv, &aged)) {
        cuda_wrong(f, "pages: a page is lost, or in two places (%d of %d free)", *kv.free_count, kv.n_pages);
        return;
    }
    for (int lane = 0; lane < kv.n_slots * kv.lanes_per_slot; lane++) {
        if (kv.lane_len[lane] != p->kv.cpu.lane_len[lane] || aged.lane_len[lane] != p->aged.cpu.lane_len[lane] ||
            (aged.lane_len[lane] && aged.lane_format[lane] != p->aged.cpu.lane_format[lane])) {
            cuda_wrong(f, "lane %d: %d and %d entries, format %d, expected %d and %d, %d", lane, kv.lane_len[lane],
                       aged.lane_len[lane], aged.lane_format[lane], p->kv.cpu.lane_len[lane],
                       p->aged.cpu.lane_len[lane], p->aged.cpu.lane_format[lane]);
            return;
        }
        for (int i = 0; i < kv.lane_len[lane]; i++)
            if (!cache_token_same(&kv, &p->kv.cpu, lane, i)) {
                cuda_wrong(f, "entry %d of lane %d (%d entries) differs", i, lane, kv.lane_len[lane]);
                return;
            }
        for (int i = 0; i < aged.lane_len[lane]; i++)
            if (!cache_codes_same(&aged, &p->aged.cpu, lane, i)) {
                cuda_wrong(f, "aged entry %d of lane %d (%d entries) differs", i, lane, aged.lane_len[lane]);
                return;
            }
    }
}

static void append_one(struct cuda_fixture *f, const struct cache *c, const struct attention_heads *heads,
                       const int32_t *slot, int n)
{
    struct batch b = batch_of(f, slot, NULL, n);
    struct twin kv = twin_2d(f, n, 2 * heads->n_kv_heads * heads->head_dim, 4, 1);
    cache_append(f, c, heads, twin_heads(kv, 0, heads->n_kv_heads, heads->head_dim),
                 twin_heads(kv, heads->n_kv_heads * heads->head_dim, heads->n_kv_heads, heads->head_dim), &b);
}

static struct attention_heads heads_of(int n_kv_heads, int dim, int layer)
{
    return (struct attention_heads){n_kv_heads, n_kv_heads, dim, layer * n_kv_heads, 1};
}

/* ---- the cache ---- */

static void act(struct cuda_fixture *f, struct parts *p, int slot)
{
    const int dim = p->kv.cpu.head_dim, lane = slot * LANES;
    const int held = p->kv.cpu.lane_len[lane] + p->aged.cpu.lane_len[lane];
    if (held == 0) {
        const int n = fixture_int(f->cpu, 1, LONGEST - 100);
        cuda_what(f, "prompt of %d tokens, heads of %d, %d + %d stay", n, dim, p->sinks, p->window);
        for (int layer = 0; layer < LAYERS; layer++) {
            const struct attention_heads heads = heads_of(KV_HEADS, dim, layer);
            cache_fill(f, &p->kv, &heads, slot, n);
        }
        if (fixture_int(f->cpu, 0, 1)) cache_pack(f, &p->kv, slot, 0, LANES, fixture_int(f->cpu, 1, 10) * 10, 1);
        p->aged.gpu.format = p->aged.cpu.format = formats[fixture_int(f->cpu, 0, 1)]; /* of lanes that begin */
        age(f, p, slot);
        return;
    }
    if (fixture_int(f->cpu, 0, 6) == 0) {
        cuda_what(f, "release of slot %d", slot);
        release(f, p, slot);
        return;
    }
    cuda_what(f, "tokens for slot %d, heads of %d, %d + %d stay", slot, dim, p->sinks, p->window);
    for (int i = fixture_int(f->cpu, 1, 24); i > 0 && held + i < LONGEST - 60; i--)
        for (int layer = 0; layer < LAYERS; layer++) {
            const struct attention_heads heads = heads_of(KV_HEADS, dim, layer);
            const int32_t rows[2] = {slot, -1};
            append_one(f, &p->kv, &heads, rows, 2);
        }
    age(f, p, slot);
}

static void run_random(struct cuda_fixture *f, int dim, int sinks, int window, int steps)
{
    const int max_pages = (LONGEST + 15) / 16 + 1;
    struct parts p = parts_take(f, SLOTS, LANES, max_pages, 2 * SLOTS * LANES * max_pages, dim, KV_INT8, sinks, window);
    for (int step = 0; step < steps; step++) {
        act(f, &p, fixture_int(f->cpu, 0, SLOTS - 1));
        check_parts(f, &p);
    }
    for (int slot = 0; slot < SLOTS; slot++) release(f, &p, slot);
    check_parts(f, &p);
    EXPECT(f, *cache_fetch(f, &p.kv).free_count == p.kv.gpu.n_pages);
    cuda_clear(f);
}

static void test_random(void)
{
    static const struct {
        int dim, sinks, window;
    } of[] = {{64, 4, 32}, {128, 0, 1}, {72, 5, 0}, {8, 20, 300}, {40, 3, 17}, {128, 100, 60}};
    struct cuda_fixture *f = cuda_begin(1);
    for (int i = 0; i < (f->effort == QUICK ? 1 : 6); i++)
        run_random(f, of[i].dim, of[i].sinks, of[i].window, f->effort == ALL ? 36 : 15);
    cuda_end(f);
}

/* A pool with just the pages that ageing needs; one page less in every lane's worth: an error, and nothing is lost. */
static void test_pages(void)
{
    static const int lengths[] = {1, 16, 35, 36, 37, 52, 68, 69, 100, 101, 132, 133, 164, 165, 500, 1500};
    struct cuda_fixture *f = cuda_begin(2);
    for (int i = 0; i < (f->effort == QUICK ? 9 : 16); i++)
        for (int less = 0; less < 2; less++) {
            const int n = lengths[i], pages = (n + 15) / 16, stay = i % 3 ? 36 : 1, lanes = 5;
            const int more = kv_age_pages(n, stay, 16, CODE_PAGE);
            if (less && !more) continue;
            struct parts p = parts_take(f, 1, lanes, pages, lanes * (pages + more) - less, 64, formats[i % 2],
                                        i % 3 ? 4 : 0, i % 3 ? 32 : 1);
            const struct attention_heads heads = heads_of(lanes, 64, 0);
            cuda_what(f, "%d lanes of %d tokens, %d stay, %d pages short", lanes, n, stay, less);
            cache_fill(f, &p.kv, &heads, 0, n);
            const int left = n < stay ? n : stay;
            if (!less) {
                age(f, &p, 0);
                check_parts(f, &p);
                EXPECT(f, *cache_fetch(f, &p.kv).free_count ==
                              p.kv.gpu.n_pages - lanes * ((left + 15) / 16 + (n - left + CODE_PAGE - 1) / CODE_PAGE));
            } else {
                RUN(f, ops_kv_age(&f->gpu, &p.kv.gpu, &p.aged.gpu, 0, p.sinks, p.window));
                const struct kv_view kv = cache_fetch(f, &p.kv), aged = cache_fetch(f, &p.aged);
                EXPECT(f, *kv.error == KV_ERROR_NO_FREE_PAGE && fixture_parts_ok(&kv, &aged));
            }
            cuda_clear(f);
        }
    cuda_end(f);
}

/* ---- attention ---- */

struct shape {
    int n_kv_heads, group, dim;
};

/* Rows of a step: each slot once in mixed order, every fourth row padding. */
static int take_rows(int32_t *row, int slots)
{
    int n = 0;
    for (int i = 0; i < slots; i++) {
        if (n % 4 == 1) row[n++] = -1;
        row[n++] = (int32_t)((i * 7 + 2) % slots);
    }
    return n;
}

static struct parts take_lanes(struct cuda_fixture *f, struct shape s, int slots, int longest, enum kv_format format,
                               int sinks, int window)
{
    const int pages = longest / 16 + 2;
    struct parts p =
        parts_take(f, slots, s.n_kv_heads, pages, 2 * slots * s.n_kv_heads * pages, s.dim, format, sinks, window);
    const struct attention_heads heads = heads_of(s.n_kv_heads, s.dim, 0);
    for (int slot = 0; slot < slots; slot++) {
        const int n = slot == 0 ? longest : fixture_int(f->cpu, 0, longest);
        if (n) cache_fill(f, &p.kv, &heads, slot, n);
        if (slot > 0) cache_pack(f, &p.kv, slot, 0, s.n_kv_heads, 15 * (slot % 8), 0);
        age(f, &p, slot);
    }
    return p;
}

static void compare_decode(struct cuda_fixture *f, struct shape s, int slots, int longest, enum kv_format format,
                           int sinks, int window)
{
    int32_t slot[MOST_ROWS];
    const int rows = take_rows(slot, slots), n_heads = s.n_kv_heads * s.group;
    struct parts p = take_lanes(f, s, slots, longest, format, sinks, window);
    struct batch b = batch_of(f, slot, NULL, rows);
    const struct attention_heads heads = {n_heads, s.n_kv_heads, s.dim, 0, 1.0f / sqrtf((float)s.dim)};
    struct twin q = twin_3d(f, rows, n_heads, s.dim, 8, 1.5f), out = twin_3d(f, rows, n_heads, s.dim, 8, 0);
    struct twin alone = twin_3d(f, rows, n_heads, s.dim, 8, 0), plain = twin_3d(f, rows, n_heads, s.dim, 8, 0);
    cuda_what(f, "decode, %d/%d heads of %d in format %d, %d rows, lanes up to %d, %d + %d stay", n_heads, s.n_kv_heads,
              s.dim, format, rows, longest, sinks, window);
    const struct kv_view before = cache_fetch(f, &p.kv);
    RUN(f, ops_decode_begin_aged(&f->gpu, &b.gpu, &p.kv.gpu, &p.aged.gpu));
    append_one(f, &p.kv, &heads, slot, rows);
    RUN(f, ops_attention_decode_aged(&f->gpu, out.gpu, q.gpu, &b.gpu, &p.kv.gpu, &p.aged.gpu, &heads));
    RUN(f, ops_attention_decode_aged(&f->cpu->ops, out.cpu, q.cpu, &b.cpu, &p.kv.cpu, &p.aged.cpu, &heads));
    twin_check(f, out, cuda_tolerance(f), "out");
    check_parts(f, &p);
    const size_t bytes = (size_t)(out.span + 2 * cuda_guard(f)) * sizeof(uint16_t);
    if (sinks + window >= longest) { /* nothing has aged */
        RUN(f, ops_attention_decode(&f->gpu, plain.gpu, q.gpu, &b.gpu, &p.kv.gpu, &heads));
        if (!fixture_same(twin_fetch(f, out), twin_fetch(f, plain), bytes))
            cuda_wrong(f, "plain lanes alone are read otherwise");
    }
    /* The token just appended stands in its page: with the lengths of before, the lists come out as they were. */
    const struct kv_view after = cache_fetch(f, &p.kv);
    for (int i = 0; i < rows; i++) {
        const struct seq_batch one = {.n_seqs = 1, .n_tokens = 1, .slot = b.gpu.slot + i};
        cache_restore(f, &p.kv, &before);
        RUN(f, ops_decode_begin_aged(&f->gpu, &one, &p.kv.gpu, &p.aged.gpu));
        cache_restore(f, &p.kv, &after);
        RUN(f, ops_attention_decode_aged(&f->gpu, twin_rows(alone, i, 1).gpu, twin_rows(q, i, 1).gpu, &one, &p.kv.gpu,
                                         &p.aged.gpu, &heads));
    }
    if (!fixture_same(twin_fetch(f, out), twin_fetch(f, alone), bytes))
        cuda_wrong(f, "a row alone and in the batch differ");
    cuda_clear(f);
}

static const int dims[] = {8, 16, 40, 64, 72, 80, 96, 120, 128}, groups[] = {1, 2, 3, 4, 7, 8, 16};

static void test_decode_shapes(void)
{
    static const int lengths[] = {1, 17, 36, 37, 69, 256, 600, 1000}, windows[] = {32, 1, 300, 16, 2000};
    struct cuda_fixture *f = cuda_begin(3);
    for (int i = 0; i < 9; i++)
        for (int j = 0; j < 7; j++) {
            if (f->effort == QUICK && (i + j * 2) % 9) continue;
            if (f->effort == SOME && (i + j) % 3) continue;
            for (int k = (i + j) % 4; k < 8; k += f->effort == QUICK ? 8 : 4)
                compare_decode(f, (struct shape){1 + (i + j) % 3, groups[j], dims[i]}, f->effort == QUICK ? 2 : 5,
                               f->effort == QUICK ? 1 + 43 * i : lengths[k], formats[(i + j + k) % 2], (i + k) % 3 * 4,
                               windows[(i + 2 * j + k) % 5]);
        }
    cuda_end(f);
}

/* Long lanes in many pieces, and batches that are read by the kernel for many rows. */
static void test_decode_long(void)
{
    struct cuda_fixture *f = cuda_begin(4);
    for (int i = 0; i < 7 && f->effort > QUICK; i++) {
        if (f->effort == SOME && i % 3) continue;
        compare_decode(f, (struct shape){2, groups[i], dims[8 - i]}, 3, 4000, formats[i % 2], 4, i % 2 ? 32 : 1500);
    }
    for (int i = 0; i < 2 && f->effort == ALL; i++) {
        compare_decode(f, (struct shape){8, 4, 128}, 48, 300, formats[i], 4, 32);
        compare_decode(f, (struct shape){3, 3, 64}, 48, 700, formats[i], 0, 64);
    }
    cuda_end(f);
}

/* ---- steps as the model takes them: recorded once, ageing between them ---- */

struct step {
    struct cuda_fixture *f;
    const struct parts *p;
    struct attention_heads heads;
    struct batch batch;
    struct twin q, k, v, out;
};

static int step_body(void *arg)
{
    const struct step *s = arg;
    struct ops *o = &s->f->gpu;
    TRY(ops_decode_begin_aged(o, &s->batch.gpu, &s->p->kv.gpu, &s->p->aged.gpu));
    TRY(ops_kv_append(o, &s->p->kv.gpu, &s->heads, s->k.gpu, s->v.gpu, &s->batch.gpu));
    return ops_attention_decode_aged(o, s->out.gpu, s->q.gpu, &s->batch.gpu, &s->p->kv.gpu, &s->p->aged.gpu, &s->heads);
}

static void test_steps(void)
{
    enum { ROWS = 4, STEPS = 40, DIM = 64, GROUP = 4 };
    struct cuda_fixture *f = cuda_begin(5);
    struct parts p = take_lanes(f, (struct shape){KV_HEADS, GROUP, DIM}, ROWS - 1, 200, KV_FP8, 4, 32);
    const int32_t slot[ROWS] = {2, -1, 0, 1};
    struct step s = {.f = f, .p = &p, .heads = {GROUP * KV_HEADS, KV_HEADS, DIM, 0, 0.125f}};
    s.batch = batch_of(f, slot, NULL, ROWS);
    s.q = twin_3d(f, ROWS, GROUP * KV_HEADS, DIM, 8, 1.5f), s.out = twin_3d(f, ROWS, GROUP * KV_HEADS, DIM, 8, 0);
    s.k = twin_3d(f, ROWS, KV_HEADS, DIM, 0, 1), s.v = twin_3d(f, ROWS, KV_HEADS, DIM, 0, 1);
    for (int step = 1; step < STEPS; step++) {
        struct twin k = twin_3d(f, ROWS, KV_HEADS, DIM, 0, 1);
        memcpy(s.k.cpu.data, k.cpu.data, tensor_bytes(k.cpu));
        twin_send(f, s.k, true);
        cuda_what(f, "step %d", step);
        RUN(f, ops_run_step(&f->gpu, ROWS, step_body, &s));
        RUN(f, ops_kv_append(&f->cpu->ops, &p.kv.cpu, &s.heads, s.k.cpu, s.v.cpu, &s.batch.cpu));
        RUN(f, ops_attention_decode_aged(&f->cpu->ops, s.out.cpu, s.q.cpu, &s.batch.cpu, &p.kv.cpu, &p.aged.cpu,
                                         &s.heads));
        twin_check(f, s.out, cuda_tolerance(f), "out");
        for (int i = 0; i < ROWS - 1; i++)
            if ((step + 5 * i) % 16 == 0) age(f, &p, i);
    }
    check_parts(f, &p);
    ops_forget_steps(&f->gpu);
    cuda_end(f);
}

int main(int argc, char **argv)
{
    return cuda_main("cuda_aged",
                     (struct check_case[]){{"random prompts, packs, tokens, releases", test_random},
                                           {"pages that ageing takes", test_pages},
                                           {"decode attention", test_decode_shapes},
                                           {"decode attention, long lanes", test_decode_long},
                                           {"steps, recorded", test_steps},
                                           {0}},
                     argc, argv);
}
