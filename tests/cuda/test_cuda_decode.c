/* CUDA's decode attention against the CPU's: lanes of unequal lengths in each layer and head, every head dimension and
 * group size, padding rows; the same bits alone and in a batch; and a decode step as ops_run_step replays it. */
#include "tests/cuda/cuda_cache.h"

struct shape {
    int n_kv_heads, group, dim, page_size;
};
enum { LAYERS = 2, MOST_ROWS = 64 };

/* A cache of two layers whose lanes have just any lengths, up to `longest` and one of them just that; some are empty.
 */
static struct cache take_lanes(struct cuda_fixture *f, struct shape s, int slots, int longest, enum stale stale)
{
    const int lanes = LAYERS * s.n_kv_heads, max_pages = longest / s.page_size + 2;
    struct cache c = cache_take(f, slots, lanes, max_pages, slots * lanes * max_pages, s.page_size, s.dim, stale);
    for (int layer = 0; layer < LAYERS; layer++)
        for (int slot = 0; slot < slots; slot++) {
            const struct attention_heads heads = {s.n_kv_heads, s.n_kv_heads, s.dim, layer * s.n_kv_heads, 1};
            const int n = slot == 0 ? longest : fixture_int(f->cpu, 0, longest);
            if (n) cache_fill(f, &c, &heads, slot, n);
            if (slot > 0 || layer > 0) cache_pack(f, &c, slot, heads.lane, s.n_kv_heads, 15 * (slot % 8), 0);
        }
    return c;
}

/* Rows of a step: each slot once in mixed order, every fourth row padding. Returns their number. */
static int take_rows(int32_t *row, int slots)
{
    int n = 0;
    for (int i = 0; i < slots; i++) {
        if (n % 4 == 1) row[n++] = -1;
        row[n++] = (int32_t)((i * 7 + 2) % slots);
    }
    return n;
}

struct step {
    struct twin q, k, v, out;
    struct attention_heads heads;
};

static struct step take_step(struct cuda_fixture *f, struct shape s, int rows, int layer)
{
    const int64_t kv = (int64_t)s.n_kv_heads * s.dim, q = kv * s.group;
    struct twin qkv = twin_2d(f, rows, q + 2 * kv, layer * 8, 1.5f);
    return (struct step){
        .q = twin_heads(qkv, 0, (int64_t)s.n_kv_heads * s.group, s.dim),
        .k = twin_heads(qkv, q, s.n_kv_heads, s.dim),
        .v = twin_heads(qkv, q + kv, s.n_kv_heads, s.dim),
        .out = twin_3d(f, rows, (int64_t)s.n_kv_heads * s.group, s.dim, layer * 8, 0),
        .heads = {s.n_kv_heads * s.group, s.n_kv_heads, s.dim, layer * s.n_kv_heads, 1.0f / sqrtf((float)s.dim)}};
}

/* Rows [first, first + n) of the step of all layers, on the device. */
static void run_rows(struct cuda_fixture *f, const struct cache *c, const struct step *steps, struct twin *outs,
                     const struct seq_batch *batch, int first, int n)
{
    RUN(f, ops_decode_begin(&f->gpu, batch, &c->gpu));
    for (int layer = 0; layer < LAYERS; layer++) {
        const struct step *s = &steps[layer];
        RUN(f, ops_kv_append(&f->gpu, &c->gpu, &s->heads, twin_rows(s->k, first, n).gpu, twin_rows(s->v, first, n).gpu,
                             batch));
        RUN(f, ops_attention_decode(&f->gpu, twin_rows(outs[layer], first, n).gpu, twin_rows(s->q, first, n).gpu, batch,
                                    &c->gpu, &s->heads));
    }
}

static void run_cpu(struct cuda_fixture *f, const struct cache *c, const struct step *steps, const struct batch *b)
{
    for (int layer = 0; layer < LAYERS; layer++) {
        const struct step *s = &steps[layer];
        RUN(f, ops_kv_append(&f->cpu->ops, &c->cpu, &s->heads, s->k.cpu, s->v.cpu, &b->cpu));
        RUN(f, ops_attention_decode(&f->cpu->ops, s->out.cpu, s->q.cpu, &b->cpu, &c->cpu, &s->heads));
    }
}

/* One step of all rows against the CPU; then, from the same lanes, row by row: the same bits. */
static void compare_decode(struct cuda_fixture *f, struct shape s, int slots, int longest, enum stale stale)
{
    int32_t slot[MOST_ROWS];
    const int rows = take_rows(slot, slots);
    struct cache c = take_lanes(f, s, slots, longest, stale);
    struct batch b = batch_of(f, slot, NULL, rows);
    struct step steps[LAYERS];
    struct twin outs[LAYERS], alone[LAYERS];
    cuda_what(f, "decode, %d/%d heads of %d, pages of %d, %d rows, lanes up to %d", s.n_kv_heads * s.group,
              s.n_kv_heads, s.dim, s.page_size, rows, longest);
    for (int layer = 0; layer < LAYERS; layer++) {
        steps[layer] = take_step(f, s, rows, layer);
        outs[layer] = steps[layer].out;
        alone[layer] = twin_3d(f, rows, (int64_t)s.n_kv_heads * s.group, s.dim, layer * 8, 0);
    }
    const struct kv_view before = cache_fetch(f, &c);
    run_rows(f, &c, steps, outs, &b.gpu, 0, rows);
    run_cpu(f, &c, steps, &b);
    for (int layer = 0; layer < LAYERS; layer++) twin_check(f, steps[layer].out, cuda_tolerance(f), "out");
    cache_check(f, &c);
    cache_restore(f, &c, &before);
    for (int i = 0; i < rows; i++) {
        const struct seq_batch one = {.n_seqs = 1, .n_tokens = 1, .slot = b.gpu.slot + i};
        run_rows(f, &c, steps, alone, &one, i, 1);
    }
    for (int layer = 0; layer < LAYERS; layer++) {
        const size_t bytes = (size_t)(outs[layer].span + 2 * cuda_guard(f)) * sizeof(uint16_t);
        if (!fixture_same(twin_fetch(f, outs[layer]), twin_fetch(f, alone[layer]), bytes))
            cuda_wrong(f, "layer %d: a row alone and in the batch differ", layer);
    }
    cuda_clear(f);
}

static const int dims[] = {8, 16, 64, 72, 80, 96, 128}, groups[] = {1, 2, 3, 4, 7, 8, 16};

static void test_shapes(void)
{
    static const int lengths[] = {1, 15, 16, 17, 255, 256, 257, 600, 1000};
    struct cuda_fixture *f = cuda_begin(1);
    for (int i = 0; i < 7; i++)
        for (int j = 0; j < 7; j++) {
            if (f->effort == QUICK && (i + j * 2) % 7) continue;
            if (f->effort == SOME && (i + j) % 3) continue;
            for (int k = (i + j) % 3; k < 9; k += f->effort == QUICK ? 9 : 3) {
                const int longest = f->effort == QUICK ? 1 + 43 * i : lengths[k];
                compare_decode(f, (struct shape){1 + (i + j) % 3, groups[j], dims[i], 16}, f->effort == QUICK ? 2 : 5,
                               longest, STALE_LARGE);
            }
        }
    cuda_end(f);
}

static void test_long(void)
{
    struct cuda_fixture *f = cuda_begin(2);
    for (int i = 0; i < 7 && f->effort > QUICK; i++) {
        if (f->effort == SOME && i % 3) continue;
        compare_decode(f, (struct shape){2, groups[i], dims[6 - i], 16}, 3, 4095, STALE_LARGE);
        compare_decode(f, (struct shape){1, groups[6 - i], dims[i], 16}, 2, 2049, STALE_LARGE);
    }
    if (f->effort == ALL) {
        compare_decode(f, (struct shape){8, 4, 128, 16}, 48, 300, STALE_LARGE);
        compare_decode(f, (struct shape){3, 3, 64, 16}, 48, 700, STALE_LARGE);
        compare_decode(f, (struct shape){32, 1, 128, 16}, 9, 200, STALE_LARGE);
    }
    cuda_end(f);
}

static void reserve_for(struct cuda_fixture *f, int max_seqs, int max_context)
{
    const struct ops_limits limits = {.max_tokens = 4096,
                                      .max_seqs = max_seqs,
                                      .max_context = max_context,
                                      .max_in_features = 14336,
                                      .max_heads = 64,
                                      .head_dim = 128,
                                      .vocab_size = 128256,
                                      .max_lanes = MOST_LANES};
    size_t bytes;
    RUN(f, ops_reserve(&f->cpu->ops, &limits, &bytes, false));
    RUN(f, ops_reserve(&f->gpu, &limits, &bytes, false));
}

/* A backend for few sequences, whose pieces are shorter: lanes of one piece, of two, of the most and of the most that
 * are longer than others' are; groups of every size; and more rows than the kernel for few takes. */
static void test_pieces(void)
{
    static const int lengths[] = {0, 1, 63, 64, 127, 128, 129, 255, 2047, 6143, 6144, 6145, 9001, 20000};
    struct cuda_fixture *f = cuda_begin(6);
    reserve_for(f, 12, 20480);
    for (int i = 0; i < 14; i++) {
        if (f->effort == SOME && i % 3) continue;
        if (f->effort == QUICK && lengths[i] != 129) continue;
        compare_decode(f, (struct shape){1 + i % 2, groups[i % 7], dims[6 - i % 7], 16}, 2, lengths[i], STALE_LARGE);
        compare_decode(f, (struct shape){1, groups[(i + 3) % 7], 128, 16 + i % 3 * 16}, 2, lengths[i], STALE_NAN);
    }
    for (int group = 1; group <= 16 && f->effort == ALL; group++)
        compare_decode(f, (struct shape){1, group, group % 2 ? 128 : 64, 16}, 2, 6200 + 17 * group, STALE_LARGE);
    for (int i = 0; i < 7 && f->effort == ALL; i += 2)
        compare_decode(f, (struct shape){2, groups[i], dims[6 - i], 16}, 8, 6300 + i, STALE_LARGE);
    reserve_for(f, 64, 4352);
    cuda_end(f);
}

/* Pages of other sizes, and pages that once held not-a-numbers. */
static void test_odd_pages(void)
{
    struct cuda_fixture *f = cuda_begin(3);
    for (int i = 0; i < (f->effort == QUICK ? 1 : 7); i++) {
        const int longest = f->effort == QUICK ? 40 : 500;
        compare_decode(f, (struct shape){2, groups[i], dims[i], 16}, 4, longest, STALE_NAN);
        compare_decode(f, (struct shape){1, groups[i], dims[i], 48}, 3, longest, STALE_LARGE);
        compare_decode(f, (struct shape){1, groups[i], dims[i], 32}, 3, longest, STALE_LARGE);
    }
    cuda_end(f);
}

/* ---- the step as a graph ---- */

enum { STEPS = 6, N_KV = 2, GROUP = 3, DIM = 64, HIDDEN = N_KV * GROUP * DIM, QKV = HIDDEN + 2 * N_KV * DIM };
enum { VOCAB = 700, FIRST_LENGTH = 29 };

/* A model of two layers, small but of every kind of op that a decode step has; weights are shared, state is not. */
struct weights {
    struct twin table, qkv[LAYERS], output[LAYERS], head;
    struct pair norm, frequency;
};
struct decoder {
    struct cuda_fixture *f;
    const struct weights *w;
    int rows, n_calls, fail_at;
    struct cache cache;
    struct sampling_state state;
    struct seq_batch batch;
    int32_t *ids, *position, *slot;
    struct twin x, y, z, qkv, attended, logits;
};

static struct weights take_weights(struct cuda_fixture *f)
{
    struct weights w = {.table = twin_2d(f, VOCAB, HIDDEN, 0, 1), .head = twin_2d(f, VOCAB, HIDDEN, 0, 0.1f)};
    for (int i = 0; i < LAYERS; i++) {
        w.qkv[i] = twin_2d(f, QKV, HIDDEN, 0, 0.05f);
        w.output[i] = twin_2d(f, HIDDEN, HIDDEN, 0, 0.05f);
    }
    w.norm = pair_floats(f, HIDDEN, 0.1f, 1);
    w.frequency = pair_floats(f, DIM / 2, 0.01f, 0.1f);
    return w;
}

static struct sampling_state take_state(struct cuda_fixture *f, int slots)
{
    const size_t n = (size_t)slots, logprobs = n * (1 + MAX_LOGPROBS);
    return (struct sampling_state){.params = cuda_take(f, n * sizeof(struct sampling_params)),
                                   .token_count = cuda_take(f, n * VOCAB * sizeof(int32_t)),
                                   .next_token = cuda_take(f, n * sizeof(int32_t)),
                                   .position = cuda_take(f, n * sizeof(int32_t)),
                                   .logprob = cuda_take(f, logprobs * sizeof(float)),
                                   .logprob_token = cuda_take(f, logprobs * sizeof(int32_t)),
                                   .vocab_size = VOCAB,
                                   .n_slots = slots};
}

/* The same prompt tokens in every decoder: the random numbers start anew. */
static struct decoder take_decoder(struct cuda_fixture *f, const struct weights *w, int rows, int used)
{
    struct decoder d = {.f = f, .w = w, .rows = rows, .fail_at = -1};
    const struct shape shape = {N_KV, GROUP, DIM, 16};
    int32_t slot[MOST_ROWS];
    f->cpu->seed = 99;
    d.cache = take_lanes(f, shape, rows, FIRST_LENGTH, STALE_LARGE);
    d.state = take_state(f, rows);
    for (int i = 0; i < rows; i++) {
        struct sampling_params p = {.temperature = i % 2 ? 0.8f : 0, .top_p = 0.9f, .repetition_penalty = 1.1f};
        p.seed = (uint64_t)i, p.n_logprobs = i % 3;
        RUN(f, ops_sampling_begin(&f->gpu, &d.state, i, &p, NULL, 0));
        slot[i] = i < used ? (i * 5 + 1) % used : -1;
    }
    d.slot = pair_of(f, slot, sizeof *slot * (size_t)rows).gpu;
    d.ids = cuda_take(f, sizeof(int32_t) * (size_t)rows);
    d.position = cuda_take(f, sizeof(int32_t) * (size_t)rows);
    d.batch = (struct seq_batch){.n_seqs = rows, .n_tokens = rows, .slot = d.slot};
    d.x = twin_2d(f, rows, HIDDEN, 0, 0), d.y = twin_2d(f, rows, HIDDEN, 0, 0), d.qkv = twin_2d(f, rows, QKV, 0, 0);
    d.z = twin_2d(f, rows, HIDDEN, 0, 0), d.attended = twin_2d(f, rows, HIDDEN, 0, 0);
    d.logits = twin_make(f, DTYPE_F32, rows, VOCAB, -1, 0, 0);
    return d;
}

static int decode_layer(struct decoder *d, int layer)
{
    struct ops *o = &d->f->gpu;
    const struct weights *w = d->w;
    const struct attention_heads heads = {N_KV * GROUP, N_KV, DIM, layer * N_KV, 0.125f};
    struct tensor q = twin_heads(d->qkv, 0, N_KV * GROUP, DIM).gpu, k = twin_heads(d->qkv, HIDDEN, N_KV, DIM).gpu;
    struct tensor v = twin_heads(d->qkv, HIDDEN + N_KV * DIM, N_KV, DIM).gpu;
    TRY(ops_linear(o, d->qkv.gpu, d->y.gpu, w->qkv[layer].gpu, NULL));
    TRY(ops_rope(o, q, d->position, w->frequency.gpu, 1));
    TRY(ops_rope(o, k, d->position, w->frequency.gpu, 1));
    TRY(ops_kv_append(o, &d->cache.gpu, &heads, k, v, &d->batch));
    TRY(ops_attention_decode(o, twin_heads(d->attended, 0, N_KV * GROUP, DIM).gpu, q, &d->batch, &d->cache.gpu,
                             &heads));
    TRY(ops_linear(o, d->z.gpu, d->attended.gpu, w->output[layer].gpu, NULL));
    return ops_add_rms_norm(o, d->y.gpu, d->x.gpu, d->z.gpu, w->norm.gpu, 1e-5f);
}

static int decode_step(void *arg)
{
    struct decoder *d = arg;
    struct ops *o = &d->f->gpu;
    const struct weights *w = d->w;
    TRY(ops_decode_inputs(o, d->ids, d->position, d->slot, d->rows, &d->state));
    TRY(ops_decode_begin(o, &d->batch, &d->cache.gpu));
    TRY(ops_embed(o, d->x.gpu, w->table.gpu, d->ids, 0));
    TRY(ops_rms_norm(o, d->y.gpu, d->x.gpu, w->norm.gpu, 1e-5f));
    for (int i = 0; i < LAYERS; i++) TRY(decode_layer(d, i));
    if (d->n_calls++ == d->fail_at) FAIL(ERR_ARG, "the body fails, as the test wants");
    TRY(ops_linear(o, d->logits.gpu, d->y.gpu, w->head.gpu, NULL));
    return ops_sample(o, d->logits.gpu, d->slot, &d->state);
}

/* Tokens, log-probabilities and the residual stream of both are the same bits, and the lanes have grown alike. */
static void same_decoders(struct cuda_fixture *f, const struct decoder *a, const struct decoder *b, int step)
{
    const size_t logprobs = (size_t)a->rows * (1 + MAX_LOGPROBS) * sizeof(float), tokens = (size_t)a->rows * 4;
    char *x = fixture_take(f->cpu, logprobs), *y = fixture_take(f->cpu, logprobs);
    const struct kv_view c = cache_fetch(f, &a->cache), d = cache_fetch(f, &b->cache);
    cuda_what(f, "decode step %d of %d rows, plain and replayed", step, a->rows);
    RUN(f, ops_download(&f->gpu, x, a->state.next_token, tokens));
    RUN(f, ops_download(&f->gpu, y, b->state.next_token, tokens));
    EXPECT(f, fixture_same(x, y, tokens));
    RUN(f, ops_download(&f->gpu, x, a->state.logprob, logprobs));
    RUN(f, ops_download(&f->gpu, y, b->state.logprob, logprobs));
    EXPECT(f, fixture_same(x, y, logprobs));
    EXPECT(f, fixture_same(twin_fetch(f, a->x), twin_fetch(f, b->x), (size_t)a->x.span * 2));
    EXPECT(f, fixture_same(c.lane_len, d.lane_len, (size_t)(a->rows * LAYERS * N_KV) * 4));
    EXPECT(f, fixture_pages_ok(&d) && *d.error == 0);
}

static void test_run_step(void)
{
    struct cuda_fixture *f = cuda_begin(4);
    const struct weights w = take_weights(f);
    const int rows[2] = {4, 8}, used[2] = {3, 8};
    struct decoder plain[2], replayed[2];
    for (int i = 0; i < 2; i++) {
        plain[i] = take_decoder(f, &w, rows[i], used[i]);
        replayed[i] = take_decoder(f, &w, rows[i], used[i]);
    }
    for (int step = 0; step < STEPS; step++)
        for (int i = 0; i < 2; i++) {
            RUN(f, decode_step(&plain[i]));
            RUN(f, ops_run_step(&f->gpu, rows[i], decode_step, &replayed[i]));
            same_decoders(f, &plain[i], &replayed[i], step);
        }
    EXPECT(f, plain[0].n_calls == STEPS);
    printf("(body ran %d and %d times of %d) ", replayed[0].n_calls, replayed[1].n_calls, STEPS);
    cuda_end(f);
}

/* A body that fails, at once or while it is recorded, gives its error; the backend goes on. */
static void test_failing_step(void)
{
    struct cuda_fixture *f = cuda_begin(5);
    const struct weights w = take_weights(f);
    cuda_what(f, "a step that fails");
    for (int fail_at = 0; fail_at < 2; fail_at++) {
        struct decoder d = take_decoder(f, &w, 4, 4);
        d.fail_at = fail_at;
        for (int step = 0; step < 4; step++) {
            int calls = d.n_calls, rc = ops_run_step(&f->gpu, 20 + fail_at, decode_step, &d);
            bool failed = calls == fail_at && d.n_calls > calls;
            EXPECT(f, rc == (failed ? ERR_ARG : OK));
        }
        RUN(f, ops_finish(&f->gpu));
    }
    cuda_end(f);
}

int main(int argc, char **argv)
{
    const struct check_case cases[] = {{"heads, groups and lengths", test_shapes},
                                       {"long lanes, many rows", test_long},
                                       {"few and many pieces", test_pieces},
                                       {"odd pages", test_odd_pages},
                                       {"steps replayed", test_run_step},
                                       {"steps that fail", test_failing_step},
                                       {0}};
    return cuda_main("cuda_decode", cases, argc, argv);
}
