/* CUDA's ops of policies over lanes in 8 bits against the CPU's: attention over lists of any length and order, of every
 * head dimension and group size, whole lanes among them, padding rows, the same bits alone and in a batch; lists that
 * name entries in host memory and recent places too; clusters of
 * keys of a prompt and of what follows it; pages picked by bounds of keys. */
#include "tests/cuda/cuda_cache.h"

enum { SLOTS = 3, FIRST_LANE = 2, ROWS = SLOTS + 2 };
static const enum kv_format formats[] = {KV_INT8, KV_FP8};

struct shape {
    int n_kv_heads, group, dim;
    enum kv_format format;
};

static void quantise(struct cuda_fixture *f, const struct cache *c, int slot)
{
    RUN(f, ops_kv_quantise(&f->gpu, &c->gpu, slot));
    RUN(f, ops_kv_quantise(&f->cpu->ops, &c->cpu, slot));
}

/* A layer behind FIRST_LANE other lanes: prompts of any lengths, one of `longest`, packed, in 8 bits, and what follows
 * them. Rows are its slots in another order and padding. */
struct layer {
    struct cache c;
    struct attention_heads heads;
    struct batch b;
    struct twin q, out;
    int32_t slot[ROWS];
};

static struct layer take_layer(struct cuda_fixture *f, struct shape s, int longest)
{
    static const int32_t slot[ROWS] = {2, -1, 0, -1, 1};
    struct layer x = {.heads = {s.n_kv_heads * s.group, s.n_kv_heads, s.dim, FIRST_LANE, 1.0f / sqrtf((float)s.dim)}};
    const int lanes = FIRST_LANE + s.n_kv_heads, pages = longest / 16 + 3;
    x.c = cache_take(f, SLOTS, lanes, pages, SLOTS * s.n_kv_heads * pages, 16, s.dim, STALE_NAN);
    cache_quantise(f, &x.c, s.format);
    for (int i = 0; i < SLOTS; i++) {
        const int n = i ? fixture_int(f->cpu, 0, longest) : longest;
        if (n) cache_fill(f, &x.c, &x.heads, i, n);
        if (i) cache_pack(f, &x.c, i, FIRST_LANE, s.n_kv_heads, 100 - 30 * i, 0);
        quantise(f, &x.c, i);
    }
    memcpy(x.slot, slot, sizeof slot);
    x.b = batch_of(f, slot, NULL, ROWS);
    for (int i = fixture_int(f->cpu, 0, 20); i > 0; i--)
        cache_append(f, &x.c, &x.heads, twin_3d(f, ROWS, s.n_kv_heads, s.dim, 0, 1),
                     twin_3d(f, ROWS, s.n_kv_heads, s.dim, 0, 1), &x.b);
    x.q = twin_3d(f, ROWS, x.heads.n_heads, s.dim, 8, 1.5f);
    x.out = twin_3d(f, ROWS, x.heads.n_heads, s.dim, 16, 0);
    return x;
}

static int lane_length(const struct layer *x, int list)
{
    const int slot = x->slot[list / x->heads.n_kv_heads];
    if (slot < 0 || slot >= SLOTS) return 0;
    return x->c.cpu.lane_len[slot * x->c.cpu.lanes_per_slot + FIRST_LANE + list % x->heads.n_kv_heads];
}

/* The first n of `deck` in a random order. */
static void shuffle(struct cuda_fixture *f, int32_t *deck, int n)
{
    for (int j = n - 1; j > 0; j--) {
        const int other = fixture_int(f->cpu, 0, j), kept = deck[j];
        deck[j] = deck[other], deck[other] = kept;
    }
}

/* ---- attention over lists ---- */

/* Rows alone, from the same lanes and lists: the same bits as in the batch. */
static void compare_alone(struct cuda_fixture *f, const struct layer *x, const struct kv_list *lists)
{
    const int heads = x->heads.n_kv_heads;
    struct twin alone = twin_3d(f, ROWS, x->heads.n_heads, x->heads.head_dim, 16, 0);
    for (int i = 0; i < ROWS; i++) {
        const struct seq_batch one = {.n_seqs = 1, .n_tokens = 1, .slot = x->b.gpu.slot + i};
        struct kv_list list = *lists;
        list.entry += (int64_t)i * heads * list.stride, list.count += i * heads;
        RUN(f, ops_attention_decode_listed(&f->gpu, twin_rows(alone, i, 1).gpu, twin_rows(x->q, i, 1).gpu, &one,
                                           &x->c.gpu, &x->heads, &list));
    }
    const size_t bytes = (size_t)(alone.span + 2 * cuda_guard(f)) * sizeof(uint16_t);
    if (!fixture_same(twin_fetch(f, x->out), twin_fetch(f, alone), bytes))
        cuda_wrong(f, "a row alone and in the batch differ");
}

static void compare_lists(struct cuda_fixture *f, struct shape s, int longest, int stride)
{
    struct layer x = take_layer(f, s, longest);
    const int lists = ROWS * s.n_kv_heads, room = longest + 64 > stride ? longest + 64 : stride;
    int32_t *entry = fixture_take(f->cpu, sizeof *entry * (size_t)lists * (size_t)stride);
    int32_t *count = fixture_take(f->cpu, sizeof *count * (size_t)lists);
    int32_t *deck = fixture_take(f->cpu, sizeof *deck * (size_t)room);
    cuda_what(f, "lists in format %d, %d/%d heads of %d, lanes up to %d, lists up to %d", s.format, x.heads.n_heads,
              s.n_kv_heads, s.dim, longest, stride);
    for (int i = 0; i < lists; i++) {
        const int length = lane_length(&x, i), most = length < stride ? length : stride;
        count[i] = i % 5 == 3 ? -1 : most * fixture_int(f->cpu, 0, 4) / 4;
        for (int j = 0; j < length; j++) deck[j] = j;
        shuffle(f, deck, length);
        for (int j = 0; j < stride; j++) entry[(int64_t)i * stride + j] = j < count[i] ? deck[j] : 1 << 28;
    }
    struct pair e = pair_of(f, entry, sizeof *entry * (size_t)lists * (size_t)stride);
    struct pair c = pair_of(f, count, sizeof *count * (size_t)lists);
    const struct kv_list gpu = {.entry = e.gpu, .count = c.gpu, .stride = stride};
    const struct kv_list cpu = {.entry = e.cpu, .count = c.cpu, .stride = stride};
    RUN(f, ops_attention_decode_listed(&f->gpu, x.out.gpu, x.q.gpu, &x.b.gpu, &x.c.gpu, &x.heads, &gpu));
    RUN(f, ops_attention_decode_listed(&f->cpu->ops, x.out.cpu, x.q.cpu, &x.b.cpu, &x.c.cpu, &x.heads, &cpu));
    twin_check(f, x.out, cuda_tolerance(f), "out");
    compare_alone(f, &x, &gpu);
    cuda_clear(f);
}

static const int dims[] = {8, 16, 40, 64, 72, 80, 96, 120, 128}, groups[] = {1, 2, 3, 4, 7, 8, 16};

static void test_lists(void)
{
    static const int lengths[] = {1, 16, 17, 32, 33, 65, 256, 600, 1000};
    struct cuda_fixture *f = cuda_begin(1);
    for (int i = 0; i < 9; i++)
        for (int j = 0; j < 7; j++) {
            if (f->effort == QUICK && (i + j * 2) % 9) continue;
            if (f->effort == SOME && (i + j) % 3) continue;
            for (int k = (i + j) % 3; k < 9; k += f->effort == QUICK ? 9 : 3) {
                const int longest = f->effort == QUICK ? 1 + 43 * i : lengths[k];
                compare_lists(f, (struct shape){1 + (i + j) % 3, groups[j], dims[i], formats[(i + j + k) % 2]}, longest,
                              (i + k) % 4 ? longest + 20 : (longest + 2) / 3);
            }
        }
    for (int i = 0; i < 2 && f->effort > QUICK; i++) {
        compare_lists(f, (struct shape){8, 4, 128, formats[i]}, 4200, 1400);
        compare_lists(f, (struct shape){2, 8, 64, formats[i]}, 4200, 4300); /* more than 32 short pieces */
    }
    cuda_end(f);
}

/* ---- lists of entries of three kinds ---- */

/* A layer most of whose tokens are in host memory. */
struct memories {
    struct layer x;
    struct cache host;
    size_t host_bytes;
};

static void split(struct cuda_fixture *f, const struct memories *m, int slot, int n)
{
    const int n_kv = m->x.heads.n_kv_heads, stride = n + 1;
    int32_t *keep = fixture_take(f->cpu, sizeof *keep * (size_t)(n_kv * stride)), n_keep[8] = {0}, n_other[8];
    for (int h = 0; h < n_kv; h++) {
        for (int j = 0; j < n; j++)
            if (fixture_int(f->cpu, 0, 3) == 0) keep[h * stride + n_keep[h]++] = j;
        n_other[h] = n - n_keep[h];
    }
    struct pair kept = pair_of(f, keep, sizeof *keep * (size_t)(n_kv * stride));
    struct pair other = pair_of(f, NULL, sizeof *keep * (size_t)(n_kv * stride));
    RUN(f, ops_list_others(&f->gpu, other.gpu, stride, kept.gpu, stride, n_keep, n, n_kv));
    RUN(f, ops_list_others(&f->cpu->ops, other.cpu, stride, kept.cpu, stride, n_keep, n, n_kv));
    RUN(f, ops_kv_split(&f->gpu, &m->x.c.gpu, &m->host.gpu, slot, FIRST_LANE, n_kv, other.gpu, stride, n_other));
    RUN(f, ops_kv_split(&f->cpu->ops, &m->x.c.cpu, &m->host.cpu, slot, FIRST_LANE, n_kv, other.cpu, stride, n_other));
    RUN(f, ops_kv_pack(&f->gpu, &m->x.c.gpu, slot, FIRST_LANE, n_kv, kept.gpu, stride, n_keep));
    RUN(f, ops_kv_pack(&f->cpu->ops, &m->x.c.cpu, slot, FIRST_LANE, n_kv, kept.cpu, stride, n_keep));
    quantise(f, &m->x.c, slot);
}

static struct memories take_memories(struct cuda_fixture *f, struct shape s, int longest)
{
    static const int32_t slot[ROWS] = {2, -1, 0, -1, 1};
    struct memories m = {
        .x.heads = {s.n_kv_heads * s.group, s.n_kv_heads, s.dim, FIRST_LANE, 1.0f / sqrtf((float)s.dim)}};
    const int lanes = FIRST_LANE + s.n_kv_heads, pages = longest / 16 + 3, n_pages = SLOTS * s.n_kv_heads * pages;
    m.x.c = cache_take(f, SLOTS, lanes, pages, n_pages, 16, s.dim, STALE_NAN);
    m.host = cache_take(f, SLOTS, lanes, pages + 1, n_pages, 16, s.dim, STALE_NAN);
    m.host_bytes = tensor_bytes(m.host.gpu.pool);
    m.host.gpu.pool.data = NULL;
    RUN(f, ops_host_take(&f->gpu, m.host_bytes, &m.host.gpu.pool.data));
    memset(m.host.gpu.pool.data, 0xff, m.host_bytes); /* not-a-numbers */
    cache_quantise(f, &m.x.c, s.format);
    for (int i = 0; i < SLOTS; i++) {
        const int n = i ? fixture_int(f->cpu, 1, longest) : longest;
        cache_fill(f, &m.x.c, &m.x.heads, i, n);
        split(f, &m, i, n);
    }
    m.x.b = batch_of(f, slot, NULL, ROWS);
    memcpy(m.x.slot, slot, sizeof slot);
    for (int i = 0; i < 5; i++)
        cache_append(f, &m.x.c, &m.x.heads, twin_3d(f, ROWS, s.n_kv_heads, s.dim, 0, 1),
                     twin_3d(f, ROWS, s.n_kv_heads, s.dim, 0, 1), &m.x.b);
    m.x.q = twin_3d(f, ROWS, m.x.heads.n_heads, s.dim, 8, 1.5f);
    m.x.out = twin_3d(f, ROWS, m.x.heads.n_heads, s.dim, 16, 0);
    return m;
}

struct recent {
    struct kv_recent gpu, cpu;
};

static struct recent take_recent(struct cuda_fixture *f, int n_lanes, int dim, int capacity, int max_entries)
{
    struct recent r = {.cpu = {.first_lane = FIRST_LANE,
                               .n_lanes = n_lanes,
                               .max_entries = max_entries,
                               .capacity = capacity,
                               .steps = 1}};
    const size_t rows = (size_t)(SLOTS * n_lanes), places = rows * (size_t)capacity;
    void *zeros = fixture_take(f->cpu, places * sizeof(int32_t) + 64 * SLOTS);
    r.gpu = r.cpu;
    r.cpu.pool = r.gpu.pool = tensor_3d(NULL, DTYPE_F32, (int64_t)places / 16, 32, dim);
    r.gpu.pool.dtype = f->dtype;
    r.cpu.pool.data = fixture_take(f->cpu, tensor_bytes(r.cpu.pool));
    r.gpu.pool.data = cuda_take(f, tensor_bytes(r.gpu.pool));
    struct pair p = pair_of(f, NULL, rows * (size_t)max_entries * sizeof(int32_t));
    r.gpu.place = p.gpu, r.cpu.place = p.cpu;
    p = pair_of(f, zeros, places * sizeof(int32_t));
    r.gpu.holder = p.gpu, r.cpu.holder = p.cpu;
    p = pair_of(f, zeros, places * sizeof(int32_t));
    r.gpu.stamp = p.gpu, r.cpu.stamp = p.cpu;
    p = pair_of(f, zeros, rows * sizeof(int32_t));
    r.gpu.step = p.gpu, r.cpu.step = p.cpu;
    p = pair_of(f, zeros, 2 * SLOTS * sizeof(int64_t));
    r.gpu.counts = p.gpu, r.cpu.counts = p.cpu;
    r.gpu.work = cuda_take(f, 2 * places * sizeof(int32_t));
    r.cpu.work = fixture_take(f->cpu, 2 * places * sizeof(int32_t));
    return r;
}

/* Attention over the lists where they are, and over what has become of them once they were recalled. */
static void compare_lists_of(struct cuda_fixture *f, const struct memories *m, const struct recent *r, struct pair e,
                             struct pair c, int stride)
{
    const struct layer *x = &m->x;
    struct twin near = twin_3d(f, ROWS, x->heads.n_heads, x->heads.head_dim, 16, 0);
    struct kv_list gpu = {.entry = e.gpu, .count = c.gpu, .stride = stride, .host = &m->host.gpu};
    struct kv_list cpu = {.entry = e.cpu, .count = c.cpu, .stride = stride, .host = &m->host.cpu};
    RUN(f, ops_attention_decode_listed(&f->gpu, x->out.gpu, x->q.gpu, &x->b.gpu, &x->c.gpu, &x->heads, &gpu));
    RUN(f, ops_attention_decode_listed(&f->cpu->ops, x->out.cpu, x->q.cpu, &x->b.cpu, &x->c.cpu, &x->heads, &cpu));
    twin_check(f, x->out, cuda_tolerance(f), "over the bus");
    compare_alone(f, x, &gpu);
    RUN(f, ops_recall(&f->gpu, e.gpu, c.gpu, stride, &x->b.gpu, &x->c.gpu, &x->heads, &m->host.gpu, &r->gpu));
    RUN(f, ops_recall(&f->cpu->ops, e.cpu, c.cpu, stride, &x->b.cpu, &x->c.cpu, &x->heads, &m->host.cpu, &r->cpu));
    pair_check(f, e, "lists");
    gpu.recent = &r->gpu;
    RUN(f, ops_attention_decode_listed(&f->gpu, near.gpu, x->q.gpu, &x->b.gpu, &x->c.gpu, &x->heads, &gpu));
    const size_t bytes = (size_t)(near.span + 2 * cuda_guard(f)) * sizeof(uint16_t);
    if (!fixture_same(twin_fetch(f, x->out), twin_fetch(f, near), bytes))
        cuda_wrong(f, "recent tokens give other bits than the same over the bus");
}

static void compare_mixed(struct cuda_fixture *f, struct shape s, int longest)
{
    struct memories m = take_memories(f, s, longest);
    const int lists = ROWS * s.n_kv_heads, stride = longest + 9;
    int32_t *entry = fixture_take(f->cpu, sizeof *entry * (size_t)(lists * stride));
    int32_t *count = fixture_take(f->cpu, sizeof *count * (size_t)lists);
    cuda_what(f, "lists of three kinds in format %d, %d/%d heads of %d, lanes up to %d", s.format, m.x.heads.n_heads,
              s.n_kv_heads, s.dim, longest);
    for (int i = 0; i < lists; i++) {
        const int slot = m.x.slot[i / s.n_kv_heads], lane = slot * (FIRST_LANE + s.n_kv_heads) + FIRST_LANE;
        const int own = lane_length(&m.x, i), n = slot < 0 ? 0 : own + m.host.cpu.lane_len[lane + i % s.n_kv_heads];
        for (int j = 0; j < stride; j++) entry[i * stride + j] = j >= n ? 1 << 28 : j < own ? j : ~(j - own);
        shuffle(f, entry + (int64_t)i * stride, n);
        count[i] = i == 2 ? -1 : i == 1 ? n : fixture_int(f->cpu, 0, n);
    }
    struct pair e = pair_of(f, entry, sizeof *entry * (size_t)(lists * stride));
    struct pair c = pair_of(f, count, sizeof *count * (size_t)lists);
    const struct recent r = take_recent(f, s.n_kv_heads, s.dim, (longest / 2 + 15) / 16 * 16, longest);
    compare_lists_of(f, &m, &r, e, c, stride);
    RUN(f, ops_finish(&f->gpu));
    ops_host_give_back(&f->gpu, m.host.gpu.pool.data, m.host_bytes);
    cuda_clear(f);
}

static void test_mixed(void)
{
    struct cuda_fixture *f = cuda_begin(4);
    for (int i = 0; i < 9; i++) {
        if (f->effort == QUICK && i % 4) continue;
        const struct shape s = {1 + i % 3, groups[i * 3 % 7], dims[i], formats[i % 2]};
        compare_mixed(f, s, 40);
        if (f->effort > QUICK) compare_mixed(f, s, 100 + 300 * i);
    }
    for (int i = 0; i < 2 && f->effort > QUICK; i++) compare_mixed(f, (struct shape){2, 16, 128, formats[i]}, 900);
    cuda_end(f);
}

/* ---- clusters ---- */

/* Keys that lie around as many directions as there are clusters, in turn: nothing nearly ties. */
static void append_around(struct cuda_fixture *f, struct layer *x, int n_clusters, int first, int n, bool prompt)
{
    const int n_kv = x->heads.n_kv_heads, dim = x->heads.head_dim;
    for (int done = 0, rows; done < n; done += rows) {
        const int32_t slot[1] = {1}, cu[2] = {0, prompt ? n : 1};
        rows = cu[1];
        struct twin k = twin_3d(f, rows, n_kv, dim, 0, 0.05f);
        for (int i = 0; i < rows; i++)
            for (int h = 0; h < n_kv; h++)
                fixture_row(k.cpu, i)[h * dim + (first + done + i + h) % n_clusters] += 1 + 0.5f * (float)(i % 3);
        twin_send(f, k, true);
        struct batch b = batch_of(f, slot, prompt ? cu : NULL, 1);
        cache_append(f, &x->c, &x->heads, k, twin_3d(f, rows, n_kv, dim, 0, 1), &b);
    }
}

static void run_job(struct cuda_fixture *f, const struct layer *x, int first, int n, int n_clusters)
{
    const int n_kv = x->heads.n_kv_heads, dim = x->heads.head_dim, rows = SLOTS * n_kv;
    int32_t *centre = fixture_take(f->cpu, sizeof *centre * (size_t)(n_kv * n_clusters));
    for (int i = 0; i < n_kv * n_clusters; i++) centre[i] = n_clusters - 1 - i % n_clusters;
    struct pair centres = pair_of(f, centre, sizeof *centre * (size_t)(n_kv * n_clusters));
    struct pair size = pair_of(f, NULL, sizeof(int32_t) * (size_t)(rows * n_clusters));
    struct pair entry = pair_of(f, NULL, sizeof(int32_t) * (size_t)(rows * n));
    struct pair state = pair_of(f, NULL, sizeof(struct cluster_state) * (size_t)rows);
    struct twin centroid = twin_3d(f, rows, n_clusters, dim, 0, 0);
    struct kv_clusters gpu = {.first_lane = FIRST_LANE, .n_lanes = n_kv, .max_clusters = n_clusters, .max_entries = n};
    struct kv_clusters cpu = gpu;
    gpu.centroid = centroid.gpu, gpu.size = size.gpu, gpu.entry = entry.gpu, gpu.state = state.gpu;
    cpu.centroid = centroid.cpu, cpu.size = size.cpu, cpu.entry = entry.cpu, cpu.state = state.cpu;
    gpu.work = cuda_take(f, ops_cluster_bytes(&f->gpu, n_kv, dim, n, n_clusters));
    cpu.work = fixture_take(f->cpu, ops_cluster_bytes(&f->cpu->ops, n_kv, dim, n, n_clusters));
    struct cluster_job job = {
        .slot = 1, .first_entry = first, .n_entries = n, .n_clusters = n_clusters, .iterations = 3};
    job.centre = centres.gpu;
    RUN(f, ops_cluster_keys(&f->gpu, &x->c.gpu, &gpu, &job));
    job.centre = centres.cpu;
    RUN(f, ops_cluster_keys(&f->cpu->ops, &x->c.cpu, &cpu, &job));
    const int32_t *sizes = pair_fetch(f, size), *entries = pair_fetch(f, entry);
    const void *raw = twin_fetch(f, centroid);
    EXPECT(f, fixture_same(sizes + n_kv * n_clusters, cpu.size + n_kv * n_clusters,
                           sizeof *sizes * (size_t)(n_kv * n_clusters)));
    EXPECT(f, fixture_same(entries + n_kv * n, cpu.entry + n_kv * n, sizeof *entries * (size_t)(n_kv * n)));
    double wrong = 0, all = 0;
    for (int64_t i = (int64_t)n_kv * n_clusters * dim; i < 2 * (int64_t)n_kv * n_clusters * dim; i++) {
        const double want = (double)((const float *)centroid.cpu.data)[i];
        const double got = (double)cuda_element(raw, f->dtype, cuda_guard(f) + i);
        wrong += (got - want) * (got - want), all += want * want;
    }
    if (!(sqrt(wrong) <= cuda_tolerance(f) * sqrt(all))) cuda_wrong(f, "centroids are off by %g of %g", wrong, all);
}

/* The prompt while its lanes are plain and when they are codes; then what followed it, from any place on. */
static void compare_clusters(struct cuda_fixture *f, struct shape s, int m, int more, int n_clusters)
{
    const int lanes = FIRST_LANE + s.n_kv_heads, pages = (m + more) / 16 + 2;
    struct layer x = {.heads = {s.n_kv_heads, s.n_kv_heads, s.dim, FIRST_LANE, 1}};
    x.c = cache_take(f, SLOTS, lanes, pages, lanes * pages, 16, s.dim, STALE_NAN);
    cache_quantise(f, &x.c, s.format);
    cuda_what(f, "%d clusters of %d and %d keys of %d in format %d", n_clusters, m, more, s.dim, s.format);
    append_around(f, &x, n_clusters, 0, m, true);
    run_job(f, &x, 3, m - 3, n_clusters);
    quantise(f, &x.c, 1);
    run_job(f, &x, 3, m - 3, n_clusters);
    append_around(f, &x, n_clusters, m, more, false);
    run_job(f, &x, m - 1, more + 1, n_clusters);
    cuda_clear(f);
}

static void test_clusters(void)
{
    struct cuda_fixture *f = cuda_begin(2);
    for (int i = 0; i < 2; i++) {
        compare_clusters(f, (struct shape){2, 1, 64, formats[i]}, 70, 20, 5);
        if (f->effort == QUICK) continue;
        compare_clusters(f, (struct shape){3, 1, 128, formats[i]}, 700, 90, 40);
        compare_clusters(f, (struct shape){1, 1, 72, formats[i]}, 300, 33, 9);
        compare_clusters(f, (struct shape){2, 1, 8, formats[i]}, 33, 10, 6);
    }
    cuda_end(f);
}

/* ---- pages ---- */

/* Values that codes hold exactly, few enough that pages tie now and then: multiples of 1/16, and in keys one in a row
 * that makes the scale a power of two. */
static struct twin take_exact(struct cuda_fixture *f, struct shape s, int rows, int heads, bool keys, int gap)
{
    struct twin t = twin_3d(f, rows, heads, s.dim, gap, 2);
    for (int i = 0; i < rows; i++)
        for (int h = 0; h < heads; h++) {
            float *x = fixture_row(t.cpu, i) + h * s.dim;
            for (int d = 0; d < s.dim; d++) x[d] = fminf(fmaxf(rintf(x[d] * 2), -16), 16) / 16;
            if (keys) x[fixture_int(f->cpu, 0, s.dim - 1)] = s.format == KV_INT8 ? 127.0f / 16 : 7;
        }
    twin_send(f, t, true);
    return t;
}

static void append_exact(struct cuda_fixture *f, const struct layer *x, struct shape s, const struct batch *b)
{
    cache_append(f, &x->c, &x->heads, take_exact(f, s, b->cpu.n_tokens, s.n_kv_heads, true, 0),
                 take_exact(f, s, b->cpu.n_tokens, s.n_kv_heads, true, 0), b);
}

static void find_bounds(struct cuda_fixture *f, const struct layer *x, struct tensor gpu, struct tensor cpu, int slot)
{
    RUN(f, ops_page_bounds(&f->gpu, gpu, &x->c.gpu, slot, FIRST_LANE, x->heads.n_kv_heads));
    RUN(f, ops_page_bounds(&f->cpu->ops, cpu, &x->c.cpu, slot, FIRST_LANE, x->heads.n_kv_heads));
}

static void compare_pages(struct cuda_fixture *f, struct shape s, int longest, int steps)
{
    static const int32_t slot[ROWS] = {2, -1, 0, -1, 1};
    struct layer x = {.heads = {s.n_kv_heads * s.group, s.n_kv_heads, s.dim, FIRST_LANE, 1}};
    const int lanes = FIRST_LANE + s.n_kv_heads, pages = (longest + steps) / 16 + 1, stride = 16 * pages;
    const int lists = ROWS * s.n_kv_heads, n_pages = SLOTS * lanes * pages;
    const int32_t limit[SLOTS] = {1 + longest / 40, 2, longest % 2 ? 0 : 3};
    x.c = cache_take(f, SLOTS, lanes, pages, n_pages, 16, s.dim, STALE_NAN);
    cache_quantise(f, &x.c, s.format);
    cuda_what(f, "pages in format %d, %d/%d heads of %d, lanes up to %d", s.format, x.heads.n_heads, s.n_kv_heads,
              s.dim, longest);
    struct tensor gpu = tensor_3d(NULL, f->dtype, n_pages, 2 * kv_picked_pages(&x.c.gpu), s.dim);
    struct tensor cpu = tensor_3d(NULL, DTYPE_F32, n_pages, 2 * kv_picked_pages(&x.c.cpu), s.dim);
    gpu.data = cuda_take(f, tensor_bytes(gpu));
    cpu.data = fixture_take(f->cpu, tensor_bytes(cpu));
    for (int32_t i = 0; i < SLOTS; i++) {
        const int32_t cu[2] = {0, i ? fixture_int(f->cpu, 1, longest) : longest};
        struct batch prompt = batch_of(f, &i, cu, 1);
        append_exact(f, &x, s, &prompt);
        if (i % 2 == 0) find_bounds(f, &x, gpu, cpu, i); /* of keys as they are */
        quantise(f, &x.c, i);
        if (i % 2) find_bounds(f, &x, gpu, cpu, i); /* of codes */
    }
    x.b = batch_of(f, slot, NULL, ROWS);
    struct pair limits = pair_of(f, limit, sizeof limit);
    for (int step = 0; step < steps; step++) {
        struct twin q = take_exact(f, s, ROWS, x.heads.n_heads, false, 8);
        struct twin score = twin_make(f, DTYPE_F32, lists, pages, -1, 0, 0);
        struct pair entry = pair_of(f, NULL, sizeof(int32_t) * (size_t)(lists * stride));
        struct pair count = pair_of(f, NULL, sizeof(int32_t) * (size_t)lists);
        const struct page_pick on_gpu = {gpu, score.gpu, limits.gpu, entry.gpu, count.gpu, stride};
        const struct page_pick on_cpu = {cpu, score.cpu, limits.cpu, entry.cpu, count.cpu, stride};
        append_exact(f, &x, s, &x.b);
        RUN(f, ops_pick_pages(&f->gpu, q.gpu, &x.b.gpu, &x.c.gpu, &x.heads, &on_gpu));
        RUN(f, ops_pick_pages(&f->cpu->ops, q.cpu, &x.b.cpu, &x.c.cpu, &x.heads, &on_cpu));
        pair_check(f, count, "count");
        pair_check(f, entry, "entry");
    }
    cache_check(f, &x.c);
    cuda_clear(f);
}

static void test_pages(void)
{
    static const int lengths[] = {1, 16, 17, 32, 33, 200, 600, 1500};
    struct cuda_fixture *f = cuda_begin(3);
    for (int i = 0; i < 8; i++) {
        if (f->effort == QUICK && i % 3) continue;
        const int longest = f->effort == QUICK ? 10 + 30 * i : lengths[i];
        for (int k = 0; k < 2; k++)
            compare_pages(f, (struct shape){1 + i % 3, groups[(i + 3 * k) % 7], dims[(2 * i + k) % 9], formats[k]},
                          longest, f->effort == QUICK ? 3 : 20);
    }
    if (f->effort == ALL) compare_pages(f, (struct shape){2, 4, 128, KV_FP8}, 4200, 4);
    cuda_end(f);
}

int main(int argc, char **argv)
{
    const struct check_case cases[] = {{"lists", test_lists},
                                       {"lists over both memories", test_mixed},
                                       {"clusters of keys", test_clusters},
                                       {"pages", test_pages},
                                       {0}};
    return cuda_main("cuda_codes", cases, argc, argv);
}
