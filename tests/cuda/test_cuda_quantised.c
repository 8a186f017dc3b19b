/* CUDA's lanes in 8 bits against the CPU's: the same codes and scales after prompts, packs, quantising, decode steps,
 * ways back to plain lanes and releases, with the invariant of the pages; RoPE's keys; decode attention of every shape;
 * what is refused. */
#include "kernels/quantise.h"
#include "tests/cuda/cuda_cache.h"

enum { SLOTS = 4, KV_HEADS = 3, LAYERS = 2, LANES = KV_HEADS * LAYERS, LONGEST = 300, MOST_ROWS = 64 };
static const enum kv_format formats[] = {KV_INT8, KV_FP8};

static void quantise(struct cuda_fixture *f, const struct cache *c, int slot)
{
    RUN(f, ops_kv_quantise(&f->gpu, &c->gpu, slot));
    RUN(f, ops_kv_quantise(&f->cpu->ops, &c->cpu, slot));
}

/* Back to plain lanes: the CPU's products are rounded as the device rounds them. */
static void widen(struct cuda_fixture *f, const struct cache *c, int slot)
{
    RUN(f, ops_kv_widen(&f->gpu, &c->gpu, slot));
    RUN(f, ops_kv_widen(&f->cpu->ops, &c->cpu, slot));
    for (int lane = slot * c->cpu.lanes_per_slot; lane < (slot + 1) * c->cpu.lanes_per_slot; lane++)
        for (int i = 0; i < c->cpu.lane_len[lane]; i++)
            for (int value = 0; value < 2; value++) {
                float *x = (float *)(value ? fixture_value(&c->cpu, lane, i) : fixture_key(&c->cpu, lane, i));
                for (int d = 0; d < c->cpu.head_dim; d++) x[d] = cuda_round(x[d], f->dtype);
            }
}

static void release(struct cuda_fixture *f, const struct cache *c, int slot)
{
    RUN(f, ops_kv_release(&f->gpu, &c->gpu, slot));
    RUN(f, ops_kv_release(&f->cpu->ops, &c->cpu, slot));
}

/* One token for the slots given, in a layer. */
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

static int longest_of(const struct cache *c, int slot)
{
    int longest = 0;
    for (int i = slot * LANES; i < (slot + 1) * LANES; i++)
        longest = c->cpu.lane_len[i] > longest ? c->cpu.lane_len[i] : longest;
    return longest;
}

enum stage { EMPTY, PROMPT, QUANTISED };

static enum stage act(struct cuda_fixture *f, struct cache *c, int slot, enum stage stage)
{
    const int dim = c->cpu.head_dim;
    if (stage == EMPTY) {
        const int n = fixture_int(f->cpu, 1, LONGEST - 60);
        cuda_what(f, "prompt of %d tokens, heads of %d", n, dim);
        for (int layer = 0; layer < LAYERS; layer++) {
            const struct attention_heads heads = heads_of(KV_HEADS, dim, layer);
            cache_fill(f, c, &heads, slot, n);
        }
        if (fixture_int(f->cpu, 0, 1)) cache_pack(f, c, slot, 0, LANES, fixture_int(f->cpu, 0, 10) * 10, 0);
        return PROMPT;
    }
    if (stage == PROMPT) {
        const enum kv_format format = formats[fixture_int(f->cpu, 0, 1)]; /* of this slot from now on */
        c->gpu.format = c->cpu.format = format;
        cuda_what(f, "quantising slot %d in format %d, heads of %d", slot, format, dim);
        quantise(f, c, slot);
        return QUANTISED;
    }
    if (fixture_int(f->cpu, 0, 5) == 0) {
        cuda_what(f, "release of slot %d", slot);
        release(f, c, slot);
        return EMPTY;
    }
    const int rest = LONGEST - longest_of(c, slot); /* a plain lane has room for no more */
    if (rest > 0 && fixture_int(f->cpu, 0, 3) == 0) {
        cuda_what(f, "slot %d plain again, heads of %d", slot, dim);
        widen(f, c, slot);
        if (fixture_int(f->cpu, 0, 1)) widen(f, c, slot); /* changes nothing */
        for (int layer = 0; layer < LAYERS; layer++) {
            const struct attention_heads heads = heads_of(KV_HEADS, dim, layer);
            cache_fill(f, c, &heads, slot, (rest + 1) / 2);
        }
        return PROMPT;
    }
    cuda_what(f, "tokens for slot %d, heads of %d", slot, dim);
    for (int i = fixture_int(f->cpu, 1, 20); i > 0 && c->cpu.lane_len[slot * LANES] < LONGEST - 1; i--)
        for (int layer = 0; layer < LAYERS; layer++) {
            const struct attention_heads heads = heads_of(KV_HEADS, dim, layer);
            const int32_t rows[2] = {slot, -1};
            append_one(f, c, &heads, rows, 2);
        }
    return QUANTISED;
}

static void run_random(struct cuda_fixture *f, int dim, int steps)
{
    const int max_pages = (LONGEST + 15) / 16 + 1;
    struct cache c = cache_take(f, SLOTS, LANES, max_pages, SLOTS * LANES * max_pages, 16, dim, STALE_NAN);
    enum stage stage[SLOTS] = {EMPTY};
    cache_quantise(f, &c, KV_INT8);
    for (int step = 0; step < steps; step++) {
        const int slot = fixture_int(f->cpu, 0, SLOTS - 1);
        stage[slot] = act(f, &c, slot, stage[slot]);
        cache_check(f, &c);
    }
    for (int slot = 0; slot < SLOTS; slot++) release(f, &c, slot);
    cache_check(f, &c);
    EXPECT(f, *cache_fetch(f, &c).free_count == c.gpu.n_pages);
    RUN(f, ops_kv_reset(&f->gpu, &c.gpu));
    RUN(f, ops_kv_reset(&f->cpu->ops, &c.cpu));
    cache_check(f, &c);
    cuda_clear(f);
}

static void test_random(void)
{
    static const int dims[] = {64, 128, 72, 8, 40};
    struct cuda_fixture *f = cuda_begin(1);
    for (int i = 0; i < (f->effort == QUICK ? 1 : 5); i++) run_random(f, dims[i], f->effort == ALL ? 60 : 20);
    cuda_end(f);
}

/* Whole pages, one token more, one less; many lanes at once; rows of zeros. */
static void test_many_lanes(void)
{
    static const int lengths[] = {1, 15, 16, 17, 31, 32, 33, 64, 1000, 2880};
    struct cuda_fixture *f = cuda_begin(2);
    for (int i = 0; i < (f->effort == QUICK ? 6 : 10); i++) {
        const int n = lengths[i], pages = n / 16 + 2, lanes = f->effort == ALL && n < 100 ? 320 : 6;
        struct cache c = cache_take(f, 1, lanes, pages, lanes * pages, 16, i % 2 ? 128 : 96, STALE_LARGE);
        const struct attention_heads heads = heads_of(lanes, c.cpu.head_dim, 0);
        const int32_t slot[1] = {0}, cu[2] = {0, n};
        struct batch b = batch_of(f, slot, cu, 1);
        struct twin k = twin_3d(f, n, lanes, c.cpu.head_dim, 0, 30), v = twin_3d(f, n, lanes, c.cpu.head_dim, 0, 0.01f);
        for (int row = 0; row < n; row += 5) memset(fixture_row(v.cpu, row), 0, sizeof(float) * (size_t)twin_width(v));
        twin_send(f, v, true);
        cache_quantise(f, &c, formats[i / 2 % 2]);
        cache_append(f, &c, &heads, k, v, &b);
        cuda_what(f, "%d lanes of %d tokens", lanes, n);
        quantise(f, &c, 0);
        cache_check(f, &c);
        EXPECT(f, *cache_fetch(f, &c).free_count == c.gpu.n_pages - lanes * ((n + 31) / 32));
        quantise(f, &c, 0); /* changes nothing */
        append_one(f, &c, &heads, slot, 1);
        cache_check(f, &c);
        cuda_what(f, "%d lanes of %d tokens, plain again", lanes, n + 1);
        widen(f, &c, 0);
        cache_check(f, &c);
        cuda_what(f, "%d lanes of %d tokens, quantised again", lanes, n + 1);
        quantise(f, &c, 0);
        cache_check(f, &c);
        cuda_clear(f);
    }
    cuda_end(f);
}

/* ---- RoPE: a quantised lane gets the codes of what a plain one gets ---- */

static void compare_turned(struct cuda_fixture *f, int dim, enum kv_format format)
{
    enum { N_KV = 2, GROUP = 3, STEPS = 40 };
    struct cache c = cache_take(f, 2, N_KV, 8, 32, 16, dim, STALE_LARGE);
    const struct attention_heads heads = {N_KV * GROUP, N_KV, dim, 0, 1};
    const int32_t slot[2] = {0, 1};
    struct batch b = batch_of(f, slot, NULL, 2);
    struct pair frequency = pair_floats(f, dim / 2, 0.01f, 0.1f);
    cuda_what(f, "RoPE of heads of %d into format %d", dim, format);
    cache_quantise(f, &c, format);
    RUN(f, ops_kv_quantise(&f->gpu, &c.gpu, 1)); /* an empty lane */
    for (int step = 0; step < STEPS; step++) {
        const int64_t n_kv = (int64_t)N_KV * dim, width = (GROUP + 2) * n_kv;
        const int32_t place[2] = {100 + step, 100 + step};
        struct pair position = pair_of(f, place, sizeof place);
        struct twin qkv = twin_2d(f, 2, width, 0, 1);
        memcpy(fixture_row(qkv.cpu, 1), fixture_row(qkv.cpu, 0), sizeof(float) * (size_t)width);
        twin_send(f, qkv, true);
        RUN(f, ops_rope_append(&f->gpu, &c.gpu, &heads, twin_heads(qkv, 0, N_KV * GROUP, dim).gpu,
                               twin_heads(qkv, GROUP * n_kv, N_KV, dim).gpu,
                               twin_heads(qkv, (GROUP + 1) * n_kv, N_KV, dim).gpu, position.gpu, frequency.gpu, 1,
                               &b.gpu));
    }
    const struct kv_view host = cache_fetch(f, &c);
    EXPECT(f, *host.error == 0 && fixture_pages_ok(&host));
    for (int h = 0; h < N_KV; h++)
        for (int i = 0; i < STEPS; i++)
            for (int value = 0; value < 2; value++) {
                const int64_t page = host.page_row[h * host.max_pages + i / 16];
                const int64_t row = ((page * 2 + value) * 16 + i % 16) * dim;
                uint32_t largest = 0;
                float got;
                const uint8_t *code = cache_codes(&host, N_KV + h, i, value, &got);
                for (int d = 0; d < dim; d++) {
                    const uint32_t size = quantise_magnitude(cuda_element(host.pool.data, f->dtype, row + d));
                    largest = size > largest ? size : largest;
                }
                const float scale = quantise_scale(format, largest);
                bool same = got == scale && scale > 0;
                for (int d = 0; d < dim; d++)
                    same &= code[d] == quantise_code(format, cuda_element(host.pool.data, f->dtype, row + d), scale);
                if (!same) cuda_wrong(f, "head %d, token %d, %s differ", h, i, value ? "values" : "keys");
            }
    cuda_clear(f);
}

static void test_rope(void)
{
    static const int dims[] = {64, 128, 80, 96, 8};
    struct cuda_fixture *f = cuda_begin(3);
    for (int i = 0; i < (f->effort == QUICK ? 2 : 5); i++) compare_turned(f, dims[i], formats[i % 2]);
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

static struct cache take_lanes(struct cuda_fixture *f, struct shape s, int slots, int longest, enum kv_format format)
{
    const int pages = longest / 16 + 2;
    struct cache c = cache_take(f, slots, s.n_kv_heads, pages, slots * s.n_kv_heads * pages, 16, s.dim,
                                longest % 2 ? STALE_NAN : STALE_LARGE);
    const struct attention_heads heads = heads_of(s.n_kv_heads, s.dim, 0);
    cache_quantise(f, &c, format);
    for (int slot = 0; slot < slots; slot++) {
        const int n = slot == 0 ? longest : fixture_int(f->cpu, 0, longest);
        if (n) cache_fill(f, &c, &heads, slot, n);
        if (slot > 0) cache_pack(f, &c, slot, 0, s.n_kv_heads, 15 * (slot % 8), 0);
        quantise(f, &c, slot);
    }
    return c;
}

static void compare_decode(struct cuda_fixture *f, struct shape s, int slots, int longest, enum kv_format format)
{
    int32_t slot[MOST_ROWS];
    const int rows = take_rows(slot, slots), n_heads = s.n_kv_heads * s.group;
    struct cache c = take_lanes(f, s, slots, longest, format);
    struct batch b = batch_of(f, slot, NULL, rows);
    const struct attention_heads heads = {n_heads, s.n_kv_heads, s.dim, 0, 1.0f / sqrtf((float)s.dim)};
    struct twin q = twin_3d(f, rows, n_heads, s.dim, 8, 1.5f), out = twin_3d(f, rows, n_heads, s.dim, 8, 0);
    struct twin alone = twin_3d(f, rows, n_heads, s.dim, 8, 0);
    cuda_what(f, "decode, %d/%d heads of %d in format %d, %d rows, lanes up to %d", n_heads, s.n_kv_heads, s.dim,
              format, rows, longest);
    const struct kv_view before = cache_fetch(f, &c);
    RUN(f, ops_decode_begin(&f->gpu, &b.gpu, &c.gpu));
    append_one(f, &c, &heads, slot, rows);
    RUN(f, ops_attention_decode(&f->gpu, out.gpu, q.gpu, &b.gpu, &c.gpu, &heads));
    RUN(f, ops_attention_decode(&f->cpu->ops, out.cpu, q.cpu, &b.cpu, &c.cpu, &heads));
    twin_check(f, out, cuda_tolerance(f), "out");
    cache_check(f, &c);
    /* The token just appended stands in its page: with the lengths of before, the list comes out as it was. */
    const struct kv_view after = cache_fetch(f, &c);
    for (int i = 0; i < rows; i++) {
        const struct seq_batch one = {.n_seqs = 1, .n_tokens = 1, .slot = b.gpu.slot + i};
        cache_restore(f, &c, &before);
        RUN(f, ops_decode_begin(&f->gpu, &one, &c.gpu));
        cache_restore(f, &c, &after);
        RUN(f, ops_attention_decode(&f->gpu, twin_rows(alone, i, 1).gpu, twin_rows(q, i, 1).gpu, &one, &c.gpu, &heads));
    }
    const size_t bytes = (size_t)(out.span + 2 * cuda_guard(f)) * sizeof(uint16_t);
    if (!fixture_same(twin_fetch(f, out), twin_fetch(f, alone), bytes))
        cuda_wrong(f, "a row alone and in the batch differ");
    cuda_clear(f);
}

static const int dims[] = {8, 16, 40, 64, 72, 80, 96, 120, 128}, groups[] = {1, 2, 3, 4, 7, 8, 16};

static void test_decode_shapes(void)
{
    static const int lengths[] = {1, 15, 16, 17, 31, 32, 255, 256, 257, 600, 1000};
    struct cuda_fixture *f = cuda_begin(4);
    for (int i = 0; i < 9; i++)
        for (int j = 0; j < 7; j++) {
            if (f->effort == QUICK && (i + j * 2) % 9) continue;
            if (f->effort == SOME && (i + j) % 3) continue;
            for (int k = (i + j) % 4; k < 11; k += f->effort == QUICK ? 11 : 4)
                compare_decode(f, (struct shape){1 + (i + j) % 3, groups[j], dims[i]}, f->effort == QUICK ? 2 : 5,
                               f->effort == QUICK ? 1 + 43 * i : lengths[k], formats[(i + j + k) % 2]);
        }
    cuda_end(f);
}

static void test_decode_long(void)
{
    struct cuda_fixture *f = cuda_begin(5);
    for (int i = 0; i < 7 && f->effort > QUICK; i++) {
        if (f->effort == SOME && i % 3) continue;
        compare_decode(f, (struct shape){2, groups[i], dims[8 - i]}, 3, 4095, formats[i % 2]);
        compare_decode(f, (struct shape){1, groups[6 - i], dims[i + 2]}, 2, 2049, formats[1 - i % 2]);
    }
    for (int i = 0; i < 2 && f->effort == ALL; i++) {
        compare_decode(f, (struct shape){8, 4, 128}, 48, 300, formats[i]);
        compare_decode(f, (struct shape){3, 3, 64}, 48, 700, formats[i]);
        compare_decode(f, (struct shape){32, 1, 128}, 9, 200, formats[i]);
    }
    cuda_end(f);
}

/* ---- what is refused ---- */

static void test_refusals(void)
{
    struct cuda_fixture *f = cuda_begin(6);
    const struct attention_heads heads = heads_of(2, 16, 0);
    const int32_t keep[2] = {0, 0}, n_keep[2] = {1, 1};
    struct pair kept = pair_of(f, keep, sizeof keep);
    struct cache c = cache_take(f, 1, 2, 4, 8, 16, 16, STALE_LARGE);
    cuda_what(f, "a quantised lane");
    cache_quantise(f, &c, KV_FP8);
    cache_fill(f, &c, &heads, 0, 20);
    quantise(f, &c, 0);
    cache_fill(f, &c, &heads, 0, 5); /* prompt rows */
    EXPECT(f, *c.cpu.error == KV_ERROR_QUANTISED && c.cpu.lane_len[0] == 20);
    cache_check(f, &c);
    RUN(f, ops_zero(&f->gpu, c.gpu.error, sizeof(int32_t)));
    RUN(f, ops_kv_pack(&f->gpu, &c.gpu, 0, 0, 2, kept.gpu, 1, n_keep));
    cache_check(f, &c); /* as on the CPU: refused, and said so */
    struct cache full = cache_take(f, 2, 1, 4, 3, 16, 16, STALE_LARGE);
    const struct attention_heads one = heads_of(1, 16, 0);
    cuda_what(f, "a lane that finds no page to become plain, then one");
    cache_quantise(f, &full, KV_INT8);
    cache_fill(f, &full, &one, 0, 20);
    quantise(f, &full, 0);
    cache_fill(f, &full, &one, 1, 20);
    widen(f, &full, 1); /* is plain */
    RUN(f, ops_kv_widen(&f->gpu, &full.gpu, 0));
    RUN(f, ops_kv_widen(&f->cpu->ops, &full.cpu, 0));
    EXPECT(f, *full.cpu.error == KV_ERROR_NO_FREE_PAGE && full.cpu.lane_format[0] == KV_INT8);
    cache_check(f, &full);
    release(f, &full, 1);
    widen(f, &full, 0);
    cache_check(f, &full);
    struct cache wide = cache_take(f, 1, 1, 2, 2, 32, 16, STALE_LARGE);
    cache_quantise(f, &wide, KV_INT8);
    EXPECT(f, ops_kv_quantise(&f->gpu, &wide.gpu, 0) == ERR_UNSUPPORTED);
    EXPECT(f, ops_kv_widen(&f->gpu, &wide.gpu, 0) == ERR_UNSUPPORTED);
    cuda_end(f);
}

int main(int argc, char **argv)
{
    return cuda_main("cuda_quantised",
                     (struct check_case[]){{"random prompts, packs, tokens, releases", test_random},
                                           {"many lanes, whole pages", test_many_lanes},
                                           {"RoPE", test_rope},
                                           {"decode attention", test_decode_shapes},
                                           {"decode attention, long lanes", test_decode_long},
                                           {"refusals", test_refusals},
                                           {0}},
                     argc, argv);
}
