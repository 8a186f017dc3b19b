/* CUDA's H2O account against the CPU's: which entries go at each decode step, the scores of those that stay, their keys
 * and values, and the pages that evictions free; plain lanes and lanes in 8 bits, every head dimension and group size,
 * lanes bounded alike, otherwise or not at all, several evictions in a step, padding rows.
 *
 * Entries are compared by position, for their order within a lane is nobody's business. Whenever the least scores on
 * both sides of a cut come close, the one that stays is raised on both sides: rounding decides nothing here. */
#include "tests/cuda/cuda_cache.h"

enum { PAGE = 16, MOST_SLOTS = 6, MOST_STEPS = 48 };

struct heavy_case {
    int n_kv_heads, group, dim, slots, longest, steps;
    enum kv_format format;
};

/* A layer is one of two; all lanes of both are accounted for. */
struct bounded {
    struct cache c;
    struct attention_heads heads[2];
    struct heavy_hitters gpu, cpu;
    struct pair score, position, limit, recent; /* the CPU's arrays are the CPU's account */
    float *gpu_score;                           /* what the device holds, fetched */
    int32_t *gpu_position;
    int length[MOST_SLOTS]; /* tokens of each sequence so far */
    int lanes;              /* of all slots */
};

static int lanes_of(const struct bounded *x) { return x->c.cpu.lanes_per_slot; }

static struct bounded take_bounded(struct cuda_fixture *f, const struct heavy_case *s)
{
    const int per_slot = 2 * s->n_kv_heads, max_pages = (s->longest + MOST_STEPS) / PAGE + 2;
    struct bounded x = {.lanes = s->slots * per_slot};
    for (int l = 0; l < 2; l++)
        x.heads[l] = (struct attention_heads){s->n_kv_heads * s->group, s->n_kv_heads, s->dim, l * s->n_kv_heads,
                                              1.0f / sqrtf((float)s->dim)};
    x.c = cache_take(f, s->slots, per_slot, max_pages, x.lanes * max_pages, PAGE, s->dim, STALE_NAN);
    if (s->format != KV_PLAIN) cache_quantise(f, &x.c, s->format);
    x.cpu.stride = s->longest + MOST_STEPS + 1;
    const size_t words = (size_t)x.lanes * (size_t)x.cpu.stride * sizeof(int32_t);
    x.score = pair_of(f, NULL, words), x.position = pair_of(f, NULL, words);
    x.limit = pair_of(f, NULL, (size_t)x.lanes * sizeof(int32_t));
    x.recent = pair_of(f, NULL, (size_t)x.lanes * sizeof(int32_t));
    x.cpu.score = x.score.cpu, x.cpu.position = x.position.cpu;
    x.cpu.limit = x.limit.cpu, x.cpu.recent = x.recent.cpu;
    x.gpu = (struct heavy_hitters){x.score.gpu, x.position.gpu, x.limit.gpu, x.recent.gpu, x.cpu.stride};
    return x;
}

/* How many entries a lane of m may hold, and how many of them are safe: none, one, a page's border or just any. */
static void choose_limit(struct cuda_fixture *f, struct bounded *x, int slot, int lane, int m)
{
    const int kind = fixture_int(f->cpu, 0, 9), page = kv_page_tokens(&x->c.gpu, x->c.gpu.format);
    int limit = fixture_int(f->cpu, 1, m);
    if (kind == 0) limit = 1;
    if (kind == 1 && m >= page) limit = fixture_int(f->cpu, 1, m / page) * page;
    if (kind == 2) limit = m;
    if (slot == 1 || kind == 3) limit = 0;
    x->cpu.limit[lane] = limit;
    x->cpu.recent[lane] = limit ? fixture_int(f->cpu, 1, limit) : 0;
}

/* A prompt in a slot: filled, packed to the limits, its account begun. Scores are far apart. */
static void begin_slot(struct cuda_fixture *f, struct bounded *x, int slot, int m)
{
    const int lanes = lanes_of(x);
    int32_t *index = fixture_take(f->cpu, (size_t)(lanes * m) * sizeof *index), n_keep[MOST_LANES];
    struct twin score = twin_make(f, DTYPE_F32, lanes, m, -1, slot, 1);
    for (int l = 0; l < 2; l++) cache_fill(f, &x->c, &x->heads[l], slot, m);
    for (int i = 0; i < lanes; i++) {
        choose_limit(f, x, slot, slot * lanes + i, m);
        const int limit = x->cpu.limit[slot * lanes + i];
        n_keep[i] = limit ? limit : m;
        for (int j = 0, kept = 0; j < m; j++) {
            /* A slot whose prompt is whole has no scores at all: it must read none. */
            fixture_row(score.cpu, i)[j] = limit ? 0.25f * (float)((j * 37 + i) % 1021) + 0.125f : NAN;
            if (fixture_int(f->cpu, 1, m - j) <= n_keep[i] - kept) index[i * m + kept++] = j;
        }
    }
    twin_send(f, score, true);
    pair_send(f, x->limit), pair_send(f, x->recent);
    struct pair keep = pair_of(f, index, (size_t)(lanes * m) * sizeof *index);
    RUN(f, ops_kv_pack(&f->gpu, &x->c.gpu, slot, 0, lanes, keep.gpu, m, n_keep));
    RUN(f, ops_kv_pack(&f->cpu->ops, &x->c.cpu, slot, 0, lanes, keep.cpu, m, n_keep));
    RUN(f, ops_heavy_begin(&f->gpu, &x->c.gpu, &x->gpu, slot, score.gpu, keep.gpu, m));
    RUN(f, ops_heavy_begin(&f->cpu->ops, &x->c.cpu, &x->cpu, slot, score.cpu, keep.cpu, m));
    if (x->c.gpu.format != KV_PLAIN) {
        RUN(f, ops_kv_quantise(&f->gpu, &x->c.gpu, slot));
        RUN(f, ops_kv_quantise(&f->cpu->ops, &x->c.cpu, slot));
    }
    x->length[slot] = m;
}

static void fetch_account(struct cuda_fixture *f, struct bounded *x)
{
    x->gpu_score = pair_fetch(f, x->score);
    x->gpu_position = pair_fetch(f, x->position);
}

/* The entry of the device's lane with that position, or -1. */
static int find(const struct bounded *x, int lane, int n, int position)
{
    for (int i = 0; i < n; i++)
        if (x->gpu_position[(int64_t)lane * x->cpu.stride + i] == position) return i;
    return -1;
}

/* ---- no close decisions ---- */

struct candidate {
    float score;
    int position;
};

static int by_score(const void *left, const void *right)
{
    const struct candidate *a = left, *b = right;
    if (a->score != b->score) return a->score < b->score ? -1 : 1;
    return b->position - a->position;
}

/* The scores of one lane as they will be before anything goes, `grown`, sorted: the first that stays of the candidates
 * must be well above the last that goes. Returns its position, or -1. */
static int close_call(const struct bounded *x, const struct heavy_hitters *grown, int lane, int n, int newest)
{
    struct candidate *c = malloc((size_t)n * sizeof *c);
    const int gone = n - x->cpu.limit[lane];
    int count = 0, close = -1;
    if (!c) abort();
    for (int i = 0; i < n; i++) {
        const int64_t at = (int64_t)lane * x->cpu.stride + i;
        if (grown->position[at] <= newest - x->cpu.recent[lane])
            c[count++] = (struct candidate){grown->score[at], grown->position[at]};
    }
    qsort(c, (size_t)count, sizeof *c, by_score);
    if (gone > 0 && gone < count && c[gone].score - c[gone - 1].score < 3e-4f * (1 + c[gone].score))
        close = c[gone].position;
    free(c);
    return close;
}

/* Raises an entry on both sides; its account stands at the front of the lane, for the newest has not joined. */
static void raise(struct cuda_fixture *f, struct bounded *x, int lane, int n, int position)
{
    const int64_t first = (int64_t)lane * x->cpu.stride;
    const int there = find(x, lane, n, position);
    EXPECT(f, there >= 0);
    for (int i = 0; i < n && there >= 0; i++) {
        if (x->cpu.position[first + i] != position) continue;
        x->cpu.score[first + i] += 1;
        x->gpu_score[first + there] += 1;
        RUN(f, ops_upload(&f->gpu, x->gpu.score + first + there, x->gpu_score + first + there, sizeof(float)));
    }
}

/* Tries the step on a copy of the CPU's account that nothing leaves, and moves apart what is too close. The row's token
 * is in the cache. Returns whether all was well. */
static bool move_apart(struct cuda_fixture *f, struct bounded *x, int l, struct twin q, const int32_t *position,
                       const struct batch *b)
{
    const size_t words = (size_t)x->lanes * (size_t)x->cpu.stride * sizeof(float);
    struct heavy_hitters grown = x->cpu;
    grown.score = memcpy(fixture_take(f->cpu, words), x->cpu.score, words);
    grown.position = memcpy(fixture_take(f->cpu, words), x->cpu.position, words);
    grown.limit = fixture_take(f->cpu, (size_t)x->lanes * sizeof(int32_t));
    for (int i = 0; i < x->lanes; i++) grown.limit[i] = x->cpu.limit[i] ? x->cpu.stride : 0;
    RUN(f, ops_heavy_decode(&f->cpu->ops, q.cpu, position, &b->cpu, &x->c.cpu, &x->heads[l], &grown));
    bool well = true;
    for (int row = 0; row < b->cpu.n_seqs; row++)
        for (int h = 0; h < x->heads[l].n_kv_heads; h++) {
            const int slot = b->cpu.slot[row], lane = slot * lanes_of(x) + x->heads[l].lane + h;
            if (slot < 0 || slot >= x->c.cpu.n_slots || !x->cpu.limit[lane]) continue;
            const int n = x->c.cpu.lane_len[lane], which = close_call(x, &grown, lane, n, position[row]);
            if (which < 0) continue;
            raise(f, x, lane, n - 1, which);
            well = false;
        }
    return well;
}

/* ---- comparison ---- */

/* Whether entry i of a fetched lane is entry j of the CPU's: keys and values, or their codes and scales, bit by bit. */
static bool same_entry(const struct kv_view *host, int i, const struct kv_view *cpu, int j, int lane)
{
    for (int value = 0; value < 2; value++) {
        if (host->format == KV_PLAIN) {
            const int64_t page = host->page_row[(int64_t)lane * host->max_pages + i / host->page_size];
            const int64_t at = ((page * 2 + value) * host->page_size + i % host->page_size) * host->head_dim;
            const float *want = value ? fixture_value(cpu, lane, j) : fixture_key(cpu, lane, j);
            for (int d = 0; d < host->head_dim; d++)
                if (cuda_element(host->pool.data, host->pool.dtype, at + d) != want[d]) return false;
            continue;
        }
        float got, want;
        const uint8_t *a = cache_codes(host, lane, i, value, &got), *b = cache_codes(cpu, lane, j, value, &want);
        if (!fixture_same(&got, &want, sizeof got) || !fixture_same(a, b, (size_t)cpu->head_dim)) return false;
    }
    return true;
}

/* A bounded lane: the same positions, near scores, the same keys and values. */
static void compare_lane(struct cuda_fixture *f, const struct bounded *x, const struct kv_view *host, int lane)
{
    const int n = host->lane_len[lane];
    const int64_t first = (int64_t)lane * x->cpu.stride;
    for (int i = 0; i < n; i++) {
        const int position = x->cpu.position[first + i], there = find(x, lane, n, position);
        if (there < 0) {
            cuda_wrong(f, "lane %d of %d entries lost position %d", lane, n, position);
            return;
        }
        const float got = x->gpu_score[first + there], want = x->cpu.score[first + i];
        if (!(fabsf(got - want) <= 2e-4f * fabsf(want) + 1e-6f)) {
            cuda_wrong(f, "lane %d: the score at position %d is %g, expected %g", lane, position, (double)got,
                       (double)want);
            return;
        }
        if (!same_entry(host, there, &x->c.cpu, i, lane)) {
            cuda_wrong(f, "lane %d: keys or values at position %d differ", lane, position);
            return;
        }
    }
}

static void compare(struct cuda_fixture *f, struct bounded *x)
{
    const struct kv_view host = cache_fetch(f, &x->c);
    fetch_account(f, x);
    pair_check(f, x->limit, "limit"), pair_check(f, x->recent, "recent");
    EXPECT(f, *host.error == 0 && *x->c.cpu.error == 0);
    if (!fixture_pages_ok(&host)) {
        cuda_wrong(f, "a page is lost, or in two places (%d of %d free)", *host.free_count, host.n_pages);
        return;
    }
    for (int lane = 0; lane < x->lanes; lane++) {
        const int n = host.lane_len[lane];
        if (n != x->c.cpu.lane_len[lane]) {
            cuda_wrong(f, "lane %d holds %d entries, expected %d", lane, n, x->c.cpu.lane_len[lane]);
            return;
        }
        if (x->cpu.limit[lane]) {
            compare_lane(f, x, &host, lane);
            continue;
        }
        for (int i = 0; i < n; i++)
            if (!same_entry(&host, i, &x->c.cpu, i, lane)) cuda_wrong(f, "unbounded lane %d changed", lane);
    }
}

/* ---- steps ---- */

static void step(struct cuda_fixture *f, struct bounded *x, const int32_t *slot, int rows)
{
    int32_t *position = fixture_take(f->cpu, (size_t)rows * sizeof *position);
    struct batch b = batch_of(f, slot, NULL, rows);
    for (int i = 0; i < rows; i++)
        position[i] = slot[i] < 0 || slot[i] >= x->c.cpu.n_slots ? 1 << 29 : x->length[slot[i]]++;
    struct pair at = pair_of(f, position, (size_t)rows * sizeof *position);
    for (int l = 0; l < 2; l++) {
        const struct attention_heads *heads = &x->heads[l];
        struct twin q = twin_3d(f, rows, heads->n_heads, heads->head_dim, 8, 1.5f);
        struct twin k = twin_3d(f, rows, heads->n_kv_heads, heads->head_dim, 8, 1);
        struct twin v = twin_3d(f, rows, heads->n_kv_heads, heads->head_dim, 0, 1);
        cache_append(f, &x->c, heads, k, v, &b);
        fetch_account(f, x);
        for (int tries = 0; !move_apart(f, x, l, q, at.cpu, &b); tries++)
            if (tries == 20) {
                cuda_wrong(f, "scores do not come apart");
                break;
            }
        RUN(f, ops_heavy_decode(&f->gpu, q.gpu, at.gpu, &b.gpu, &x->c.gpu, heads, &x->gpu));
        RUN(f, ops_heavy_decode(&f->cpu->ops, q.cpu, at.cpu, &b.cpu, &x->c.cpu, heads, &x->cpu));
    }
}

/* Lanes of slot 0 lose half of their room: the next step evicts many at once, and whole pages. */
static void tighten(struct cuda_fixture *f, struct bounded *x)
{
    for (int i = 0; i < lanes_of(x); i++) {
        const int limit = (x->cpu.limit[i] + 1) / 2;
        x->cpu.limit[i] = limit;
        if (x->cpu.recent[i] > limit) x->cpu.recent[i] = limit;
    }
    pair_send(f, x->limit), pair_send(f, x->recent);
}

static void run_case(struct cuda_fixture *f, const struct heavy_case *s)
{
    int32_t slot[2 * MOST_SLOTS];
    cuda_what(f, "heavy: %d KV heads of %d, dim %d, %d slots of up to %d tokens, format %d", s->n_kv_heads, s->group,
              s->dim, s->slots, s->longest, s->format);
    struct bounded x = take_bounded(f, s);
    memset(x.cpu.limit, 0, x.limit.bytes), memset(x.cpu.recent, 0, x.recent.bytes);
    for (int i = 0; i < s->slots; i++) begin_slot(f, &x, i, i ? fixture_int(f->cpu, 1, s->longest) : s->longest);
    compare(f, &x);
    for (int t = 0; t < s->steps && !f->wrong; t++) {
        int rows = 0;
        for (int i = 0; i < s->slots; i++) {
            if ((i + t) % 3 == 1) slot[rows++] = -1; /* padding; elsewhere a slot pauses */
            if ((i * 5 + t) % 7 != 6) slot[rows++] = (i + t) % s->slots;
        }
        if (t == s->steps / 2) tighten(f, &x);
        if (rows) step(f, &x, slot, rows);
        compare(f, &x);
    }
    cuda_clear(f);
}

static void test_shapes(void)
{
    struct cuda_fixture *f = cuda_begin(11);
    for (int i = 0, group = 1; group <= 16; group++, i++) {
        struct heavy_case s = {1 + i % 3, group, 64 + 8 * (i % 9), 2 + i % 4, 20 + 23 * (i % 7), 14, KV_PLAIN};
        if (f->effort == SOME && i % 3) continue;
        if (f->effort == QUICK && i % 7 != 3) continue;
        run_case(f, &s);
        s.format = i / 3 % 2 ? KV_INT8 : KV_FP8;
        run_case(f, &s);
    }
    cuda_end(f);
}

/* Lanes longer than the block's threads, and 48 steps over three page borders. */
static void test_long(void)
{
    struct cuda_fixture *f = cuda_begin(12);
    struct heavy_case wide = {2, 4, 128, 3, 900, 6, KV_PLAIN}, many = {2, 2, 64, 4, 70, MOST_STEPS, KV_PLAIN},
                      one = {1, 1, 64, 2, 1, 9, KV_PLAIN};
    for (int format = KV_PLAIN; format < KV_FORMAT_N; format++) {
        wide.format = many.format = one.format = (enum kv_format)format;
        if (f->effort > QUICK) run_case(f, &wide);
        if (f->effort > QUICK) run_case(f, &many);
        run_case(f, &one);
    }
    cuda_end(f);
}

/* A slot alone and in a batch of others: the same scores, bit by bit. */
static void test_alone(void)
{
    struct cuda_fixture *f = cuda_begin(13);
    const struct heavy_case s = {2, 8, 128, 3, 300, 1, KV_PLAIN};
    uint32_t *bits[2] = {NULL, NULL};
    size_t bytes = 0;
    for (int together = 0; together < 2; together++) {
        f->cpu->seed = hash_splitmix(14);
        cuda_what(f, "heavy: a row alone and in a batch");
        struct bounded x = take_bounded(f, &s);
        memset(x.cpu.limit, 0, x.limit.bytes), memset(x.cpu.recent, 0, x.recent.bytes);
        for (int i = 0; i < s.slots; i++) begin_slot(f, &x, i, s.longest);
        int32_t slot[3] = {0, 1, 2}, position[3] = {s.longest, s.longest, s.longest};
        struct batch b = batch_of(f, slot, NULL, 3);
        struct pair at = pair_of(f, position, sizeof position);
        struct twin q = twin_3d(f, 3, s.n_kv_heads * s.group, s.dim, 8, 1.5f);
        struct twin k = twin_3d(f, 3, s.n_kv_heads, s.dim, 0, 1), v = twin_3d(f, 3, s.n_kv_heads, s.dim, 0, 1);
        cache_append(f, &x.c, &x.heads[0], k, v, &b);
        for (int i = 0; i < (together ? 1 : 3); i++) {
            struct seq_batch one = b.gpu;
            if (!together) one.n_seqs = one.n_tokens = 1, one.slot = b.gpu.slot + i;
            RUN(f, ops_heavy_decode(&f->gpu, together ? q.gpu : twin_rows(q, i, 1).gpu, (int32_t *)at.gpu + i, &one,
                                    &x.c.gpu, &x.heads[0], &x.gpu));
        }
        bytes = x.score.bytes;
        bits[together] = malloc(bytes);
        if (!bits[together]) abort();
        RUN(f, ops_download(&f->gpu, bits[together], x.gpu.score, bytes));
        cuda_clear(f);
    }
    EXPECT(f, memcmp(bits[0], bits[1], bytes) == 0);
    free(bits[0]), free(bits[1]);
    cuda_end(f);
}

int main(int argc, char **argv)
{
    static const struct check_case cases[] = {{"heads of every shape, over steps", test_shapes},
                                              {"long lanes, many steps, one token", test_long},
                                              {"a row alone and in a batch", test_alone},
                                              {0}};
    return cuda_main("heavy hitters on CUDA", cases, argc, argv);
}
