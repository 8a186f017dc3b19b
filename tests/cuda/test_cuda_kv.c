/* CUDA's paged cache against the CPU's: random appends, packs and releases, token by token and with the invariant that
 * every page is free or in just one lane; many lanes that cross a page at once; what an empty stack and a full lane do.
 */
#include "tests/cuda/cuda_cache.h"

enum { SLOTS = 5, KV_HEADS = 3, LAYERS = 2, LANES = KV_HEADS * LAYERS, LONGEST = 200 };

static struct attention_heads heads_of(int n_kv_heads, int dim, int layer)
{
    return (struct attention_heads){n_kv_heads, n_kv_heads, dim, layer * n_kv_heads, 1};
}

/* Appends to a layer of several slots at once; decode form: one token each and a padding row. */
static void append(struct cuda_fixture *f, const struct cache *c, bool decode)
{
    int32_t slot[SLOTS + 1], cu[SLOTS + 2] = {0};
    const int layer = fixture_int(f->cpu, 0, LAYERS - 1), first = fixture_int(f->cpu, 0, SLOTS - 1);
    const int dim = c->cpu.head_dim, count = fixture_int(f->cpu, 1, SLOTS);
    int n = 0;
    for (int i = 0; i < count; i++) {
        const int s = (first + i) % SLOTS, rows = decode ? 1 : fixture_int(f->cpu, 0, 40);
        int longest = 0;
        for (int h = 0; h < KV_HEADS; h++) {
            const int length = c->cpu.lane_len[s * LANES + layer * KV_HEADS + h];
            longest = length > longest ? length : longest;
        }
        if (longest + rows > LONGEST) continue;
        slot[n] = s, cu[n + 1] = cu[n] + rows, n++;
    }
    if (decode || fixture_int(f->cpu, 0, 3) == 0) slot[n] = -1, cu[n + 1] = cu[n] + 1, n++;
    if (n == 0) return;
    struct batch b = batch_of(f, slot, decode ? NULL : cu, n);
    const struct attention_heads heads = heads_of(KV_HEADS, dim, layer);
    struct twin kv = twin_2d(f, cu[n], 2 * KV_HEADS * dim, fixture_int(f->cpu, 0, 2) * 4, 1);
    cuda_what(f, "append of %d rows to %d sequences, %s", cu[n], n, decode ? "decode" : "prompt");
    if (decode) RUN(f, ops_decode_begin(&f->gpu, &b.gpu, &c->gpu));
    cache_append(f, c, &heads, twin_heads(kv, 0, KV_HEADS, dim), twin_heads(kv, KV_HEADS * dim, KV_HEADS, dim), &b);
}

static void run_random(struct cuda_fixture *f, int page_size, int dim, int steps)
{
    const int max_pages = (LONGEST + page_size - 1) / page_size;
    for (int round = 0; round < steps; round += 50) {
        struct cache c = cache_take(f, SLOTS, LANES, max_pages, SLOTS * LANES * max_pages, page_size, dim, STALE_LARGE);
        for (int step = 0; step < 50; step++) {
            const int kind = fixture_int(f->cpu, 0, 9), slot = fixture_int(f->cpu, 0, SLOTS - 1);
            const int lane = fixture_int(f->cpu, 0, LANES - 1), n_lanes = fixture_int(f->cpu, 0, LANES - lane);
            if (kind < 7) {
                append(f, &c, kind >= 3);
            } else if (kind < 9) {
                cuda_what(f, "pack of %d lanes from %d on of slot %d, pages of %d", n_lanes, lane, slot, page_size);
                cache_pack(f, &c, slot, lane, n_lanes, fixture_int(f->cpu, 0, 11) * 10, 0);
            } else {
                cuda_what(f, "release of slot %d, pages of %d", slot, page_size);
                RUN(f, ops_kv_release(&f->gpu, &c.gpu, slot));
                RUN(f, ops_kv_release(&f->cpu->ops, &c.cpu, slot));
            }
            cache_check(f, &c);
        }
        for (int slot = 0; slot < SLOTS; slot++) {
            RUN(f, ops_kv_release(&f->gpu, &c.gpu, slot));
            RUN(f, ops_kv_release(&f->cpu->ops, &c.cpu, slot));
        }
        cache_check(f, &c);
        RUN(f, ops_kv_reset(&f->gpu, &c.gpu));
        RUN(f, ops_kv_reset(&f->cpu->ops, &c.cpu));
        cache_check(f, &c);
        cuda_clear(f);
    }
}

static void test_random(void)
{
    struct cuda_fixture *f = cuda_begin(1);
    const int steps = f->effort == ALL ? 400 : 50;
    run_random(f, 16, 8, steps);
    if (f->effort > QUICK) run_random(f, 16, 72, steps / 2);
    if (f->effort == ALL) {
        run_random(f, 16, 128, 50);
        run_random(f, 1, 8, steps / 2);
        run_random(f, 7, 16, steps / 2);
    }
    cuda_end(f);
}

/* Every lane of a full batch takes a page in the same step, again and again; then most of it is packed away. */
static void compare_many(struct cuda_fixture *f, int slots, int n_kv_heads, int layers, int dim)
{
    int32_t slot[64], cu[65] = {0};
    struct cache c =
        cache_take(f, slots, n_kv_heads * layers, 8, slots * n_kv_heads * layers * 6, 16, dim, STALE_LARGE);
    for (int i = 0; i < slots; i++) slot[i] = slots - 1 - i;
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < slots; i++) cu[i + 1] = cu[i] + (round == 1 ? 1 + i % 33 : 16);
        struct batch b = batch_of(f, slot, cu, slots), one = batch_of(f, slot, NULL, slots);
        for (int layer = 0; layer < layers; layer++) {
            const struct attention_heads heads = heads_of(n_kv_heads, dim, layer);
            struct twin k = twin_3d(f, cu[slots], n_kv_heads, dim, 0, 1),
                        v = twin_3d(f, cu[slots], n_kv_heads, dim, 8, 1);
            cuda_what(f, "prompt rows to %d slots of %d lanes, round %d", slots, n_kv_heads * layers, round);
            cache_append(f, &c, &heads, k, v, &b);
        }
        RUN(f, ops_decode_begin(&f->gpu, &one.gpu, &c.gpu));
        for (int layer = 0; layer < layers; layer++) {
            const struct attention_heads heads = heads_of(n_kv_heads, dim, layer);
            struct twin k = twin_3d(f, slots, n_kv_heads, dim, 0, 1), v = twin_3d(f, slots, n_kv_heads, dim, 0, 1);
            cuda_what(f, "a token to %d slots of %d lanes, round %d", slots, n_kv_heads * layers, round);
            cache_append(f, &c, &heads, k, v, &one);
        }
        cache_check(f, &c);
    }
    for (int i = 0; i < slots; i++) cache_pack(f, &c, i, 0, n_kv_heads * layers, 1 + i * 3 % 100, 0);
    cuda_what(f, "pack of %d slots of %d lanes", slots, n_kv_heads * layers);
    cache_check(f, &c);
    for (int i = 0; i < slots; i += 2) {
        RUN(f, ops_kv_release(&f->gpu, &c.gpu, i));
        RUN(f, ops_kv_release(&f->cpu->ops, &c.cpu, i));
    }
    cache_check(f, &c);
    cuda_clear(f);
}

static void test_many_lanes(void)
{
    struct cuda_fixture *f = cuda_begin(2);
    compare_many(f, 3, 2, 2, 8);
    if (f->effort > QUICK) {
        compare_many(f, 64, 8, 4, 64);
        compare_many(f, 33, 40, 1, 128);
        compare_many(f, 7, 1, 64, 16);
        compare_many(f, 2, 40, 16, 8); /* a whole slot of 640 lanes packed at once */
    }
    cuda_end(f);
}

/* Long lanes, as a vision prompt leaves them, packed to a tenth, to nothing, and not at all. */
static void test_long_pack(void)
{
    struct cuda_fixture *f = cuda_begin(3);
    const int length = f->effort == QUICK ? 150 : 2880, heads_kv = f->effort == QUICK ? 2 : 8;
    for (int round = 0; round < (f->effort == QUICK ? 2 : 4); round++) {
        const int percent[] = {10, 0, 100, 50}, dim = round % 2 ? 128 : 80, max_pages = length / 16 + 2;
        struct cache c = cache_take(f, 2, heads_kv, max_pages, 2 * heads_kv * max_pages, 16, dim, STALE_LARGE);
        const struct attention_heads heads = heads_of(heads_kv, dim, 0);
        cache_fill(f, &c, &heads, 1, length);
        cache_fill(f, &c, &heads, 0, length / 3);
        cuda_what(f, "pack of %d tokens to %d percent, head_dim %d", length, percent[round], dim);
        cache_pack(f, &c, 1, 0, heads_kv, percent[round], round % 2);
        cache_check(f, &c);
        cache_pack(f, &c, 0, heads_kv / 2, 1, 30, 0);
        cache_fill(f, &c, &heads, 1, 17);
        cache_check(f, &c);
        cuda_clear(f);
    }
    cuda_end(f);
}

/* With the pool or a lane full the error word is set, nothing is written, and the pages stay whole. */
static void test_exhaustion(void)
{
    struct cuda_fixture *f = cuda_begin(4);
    struct cache c = cache_take(f, 2, 1, 3, 4, 16, 8, STALE_LARGE);
    const struct attention_heads heads = heads_of(1, 8, 0);
    cuda_what(f, "a lane, then the pool runs out");
    cache_fill(f, &c, &heads, 0, 48);
    cache_check(f, &c);
    cache_fill(f, &c, &heads, 0, 1);
    EXPECT(f, *c.cpu.error == KV_ERROR_LANE_FULL);
    cache_check(f, &c);
    cache_fill(f, &c, &heads, 1, 17);
    EXPECT(f, *c.cpu.error == (KV_ERROR_LANE_FULL | KV_ERROR_NO_FREE_PAGE));
    cache_check(f, &c);
    RUN(f, ops_kv_reset(&f->gpu, &c.gpu));
    RUN(f, ops_kv_reset(&f->cpu->ops, &c.cpu));
    cache_check(f, &c);
    const int32_t slot[1] = {0}, cu[2] = {0, 5}; /* attention after a failed append stays within its buffers */
    struct batch b = batch_of(f, slot, cu, 1), one = batch_of(f, slot, NULL, 1);
    struct twin k = twin_3d(f, 5, 1, 8, 0, 1), out = twin_3d(f, 5, 1, 8, 8, 0);
    cuda_what(f, "attention after a failed append");
    RUN(f, ops_attention_prefill(&f->gpu, out.gpu, k.gpu, k.gpu, k.gpu, &b.gpu, &c.gpu, &heads));
    twin_check_poison(f, out, twin_fetch(f, out), "out");
    RUN(f, ops_decode_begin(&f->gpu, &one.gpu, &c.gpu));
    RUN(f, ops_attention_decode(&f->gpu, twin_rows(out, 0, 1).gpu, twin_rows(k, 0, 1).gpu, &one.gpu, &c.gpu, &heads));
    twin_check_poison(f, out, twin_fetch(f, out), "out");
    cuda_end(f);
}

/* Too few pages for many lanes at once: each lane has grown by all of its rows, or is as it was. */
static void test_shortage(void)
{
    enum { SLOTS_HERE = 16, HEADS = 4, ROWS = 20, DIM = 8, ALL_LANES = SLOTS_HERE * HEADS, PAGES = 70 };
    struct cuda_fixture *f = cuda_begin(5);
    int32_t slot[SLOTS_HERE], cu[SLOTS_HERE + 1] = {0};
    const struct attention_heads heads = heads_of(HEADS, DIM, 0);
    struct cache c = cache_take(f, SLOTS_HERE, HEADS, 2, PAGES, 16, DIM, STALE_LARGE);
    for (int i = 0; i < SLOTS_HERE; i++) slot[i] = i, cu[i + 1] = cu[i] + ROWS;
    struct batch b = batch_of(f, slot, cu, SLOTS_HERE);
    struct twin k = twin_3d(f, SLOTS_HERE * ROWS, HEADS, DIM, 0, 1);
    cuda_what(f, "two pages for each of %d lanes, out of %d", ALL_LANES, PAGES);
    for (int round = 0; round < 2; round++) {
        int grown = 0;
        RUN(f, ops_kv_reset(&f->gpu, &c.gpu));
        RUN(f, ops_kv_append(&f->gpu, &c.gpu, &heads, k.gpu, k.gpu, &b.gpu));
        const struct kv_view host = cache_fetch(f, &c);
        EXPECT(f, *host.error == KV_ERROR_NO_FREE_PAGE && fixture_pages_ok(&host));
        for (int lane = 0; lane < ALL_LANES; lane++) {
            EXPECT(f, host.lane_len[lane] == 0 || host.lane_len[lane] == ROWS);
            grown += host.lane_len[lane] == ROWS;
            for (int i = 0; i < host.lane_len[lane]; i++) {
                const int64_t page = host.page_row[lane * 2 + i / 16], at = (page * 32 + i % 16) * DIM;
                const float *want = fixture_row(k.cpu, lane / HEADS * ROWS + i) + lane % HEADS * DIM;
                for (int d = 0; d < DIM; d++) EXPECT(f, cuda_element(host.pool.data, f->dtype, at + d) == want[d]);
            }
        }
        EXPECT(f, grown == PAGES / 2);
    }
    cuda_end(f);
}

/* ---- turned and appended in one ---- */

/* Keys are turned in float32 on both sides and rounded on one: all of them by relative L2. Values are exact. */
static void check_turned(struct cuda_fixture *f, const struct cache *c)
{
    const struct kv_view host = cache_fetch(f, c);
    const double tolerance = cuda_tolerance(f);
    double wrong = 0, all = 0;
    EXPECT(f, *host.error == 0 && fixture_pages_ok(&host));
    for (int lane = 0; lane < host.n_slots * host.lanes_per_slot; lane++) {
        if (host.lane_len[lane] != c->cpu.lane_len[lane]) {
            cuda_wrong(f, "lane %d holds %d tokens, expected %d", lane, host.lane_len[lane], c->cpu.lane_len[lane]);
            return;
        }
        for (int i = 0; i < host.lane_len[lane]; i++) {
            const int64_t page = host.page_row[(int64_t)lane * host.max_pages + i / host.page_size];
            const int64_t key = (page * 2 * host.page_size + i % host.page_size) * host.head_dim;
            for (int d = 0; d < host.head_dim; d++) {
                double got = (double)cuda_element(host.pool.data, f->dtype, key + d);
                double want = (double)fixture_key(&c->cpu, lane, i)[d];
                wrong += (got - want) * (got - want), all += want * want;
                if (!(fabs(got - want) <= 3 * tolerance * (fabs(want) + 1)) ||
                    cuda_element(host.pool.data, f->dtype, key + (int64_t)host.page_size * host.head_dim + d) !=
                        fixture_value(&c->cpu, lane, i)[d]) {
                    cuda_wrong(f, "token %d of lane %d, dimension %d: key %g, expected %g, or its value differs", i,
                               lane, d, got, want);
                    return;
                }
            }
        }
    }
    EXPECT(f, sqrt(wrong) <= tolerance * sqrt(all));
}

/* The device may leave k, and q of rows that belong to no slot, as it likes: their values are taken over. */
static void check_turned_rows(struct cuda_fixture *f, struct twin qkv, int q_columns, int k_columns,
                              const struct batch *b)
{
    const void *raw = twin_fetch(f, qkv);
    for (int i = 0; i < b->cpu.n_seqs; i++) {
        const int first = b->cpu.cu_seqlens ? b->cpu.cu_seqlens[i] : i;
        const int end = b->cpu.cu_seqlens ? b->cpu.cu_seqlens[i + 1] : i + 1;
        for (int row = first; row < end; row++)
            for (int j = b->cpu.slot[i] < 0 ? 0 : q_columns; j < q_columns + k_columns; j++)
                fixture_row(qkv.cpu, row)[j] = cuda_element(raw, f->dtype, cuda_guard(f) + row * qkv.cpu.stride[0] + j);
    }
    twin_check(f, qkv, cuda_tolerance(f), "q, k, v");
}

static void compare_turned(struct cuda_fixture *f, int n_kv_heads, int group, int dim, int gap)
{
    enum { HERE = 4, ROUNDS = 4 };
    const int n_heads = n_kv_heads * group, q_columns = n_heads * dim, k_columns = n_kv_heads * dim;
    const struct attention_heads heads = {n_heads, n_kv_heads, dim, 1, 1};
    struct cache c = cache_take(f, HERE, n_kv_heads + 1, 12, HERE * n_kv_heads * 12, 16, dim, STALE_LARGE);
    struct pair turn = pair_floats(f, dim / 2, 0.2f, 0.3f);
    for (int round = 0; round < ROUNDS; round++) { /* a prompt's chunks, then steps of decode */
        const int32_t slot[HERE] = {2, round % 2 ? -1 : 0, 3, 1}, lengths[HERE] = {37, 1, 16, 15};
        int32_t cu[HERE + 1] = {0}, position[128];
        for (int i = 0; i < HERE; i++) cu[i + 1] = cu[i] + lengths[(i + round) % HERE];
        struct batch b = batch_of(f, slot, round < 2 ? cu : NULL, HERE);
        const int n = b.cpu.n_tokens;
        for (int i = 0; i < n; i++) position[i] = fixture_int(f->cpu, 0, 8000);
        struct pair at = pair_of(f, position, sizeof *position * (size_t)n);
        struct twin qkv = twin_2d(f, n, q_columns + 2 * k_columns, gap, 1), q = twin_heads(qkv, 0, n_heads, dim);
        struct twin k = twin_heads(qkv, q_columns, n_kv_heads, dim);
        struct twin v = twin_heads(qkv, q_columns + k_columns, n_kv_heads, dim);
        cuda_what(f, "rope_append of %d rows, %d/%d heads of %d, gap %d, round %d", n, n_heads, n_kv_heads, dim, gap,
                  round);
        if (round >= 2) RUN(f, ops_decode_begin(&f->gpu, &b.gpu, &c.gpu));
        RUN(f, ops_rope_append(&f->gpu, &c.gpu, &heads, q.gpu, k.gpu, v.gpu, at.gpu, turn.gpu, 1.25f, &b.gpu));
        RUN(f, ops_rope_append(&f->cpu->ops, &c.cpu, &heads, q.cpu, k.cpu, v.cpu, at.cpu, turn.cpu, 1.25f, &b.cpu));
        check_turned_rows(f, qkv, q_columns, k_columns, &b);
        check_turned(f, &c);
    }
    cuda_clear(f);
}

static void test_turned(void)
{
    static const int dims[] = {8, 16, 64, 72, 80, 96, 128}, groups[] = {1, 2, 3, 4, 7, 8, 16};
    struct cuda_fixture *f = cuda_begin(6);
    for (int i = 0; i < 7; i += f->effort == QUICK ? 3 : 1)
        for (int j = 0; j < 3; j++)
            if (f->effort == ALL || j == i % 3)
                compare_turned(f, 1 + (i + j) % 3, groups[(i + 2 * j) % 7], dims[i], j * 8);
    if (f->effort == ALL) compare_turned(f, 40, 1, 128, 0);
    cuda_end(f);
}

int main(int argc, char **argv)
{
    const struct check_case cases[] = {{"random append, pack, release", test_random},
                                       {"many lanes at once", test_many_lanes},
                                       {"long lanes packed", test_long_pack},
                                       {"pool and lane exhausted", test_exhaustion},
                                       {"too few pages for all", test_shortage},
                                       {"turned and appended", test_turned},
                                       {0}};
    return cuda_main("cuda_kv", cases, argc, argv);
}
