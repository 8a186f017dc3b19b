/* Attention over paged caches, prompts and decode steps; the small kernels of a decode step; VL-Cache's statistics,
 * choice and packing. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "bench/bench_kernels.h"

enum { PAGE = 16, MOST_LAYERS = 40, MOST_LANES = 40 * MOST_LAYERS, HEAD_DIM = BENCH_HEAD_DIM, GROUPS = BENCH_GROUPS };

static double least(double a, double b) { return a < b ? a : b; }

/* ---- attention ---- */

struct attention_shape {
    int n_seqs, length, n_heads, n_kv_heads;
    bool uneven; /* lanes of 3/4 to 5/4 of the length */
};

struct attention {
    struct bench *b;
    struct kv_view kv;
    struct attention_heads heads;
    struct seq_batch batch;
    struct tensor qkv, out; /* [layers * tokens, columns] */
    struct tensor column_sum;
    int64_t *kept;
    int32_t *index, *host_len, *host_page_row, *host_free;
    int n_layers, budget, n_keep[MOST_LANES];
};

static int pages_of(int tokens) { return (tokens + PAGE - 1) / PAGE; }

/* A cache whose lanes hold `length` tokens each in pages that lie anywhere, with room for `spare` more. */
static void take_cache(struct attention *a, int n_slots, int length, int spare, bool uneven)
{
    struct bench *b = a->b;
    struct kv_view *kv = &a->kv;
    const int lanes_per_slot = a->heads.n_kv_heads * a->n_layers, lanes = n_slots * lanes_per_slot;
    const int most_tokens = uneven ? length * 5 / 4 : length, max_pages = pages_of(most_tokens + spare + 1);
    const int n_pages = lanes * max_pages;
    *kv = (struct kv_view){.page_size = PAGE,
                           .head_dim = HEAD_DIM,
                           .n_pages = n_pages,
                           .max_pages = max_pages,
                           .lanes_per_slot = lanes_per_slot,
                           .n_slots = n_slots};
    a->host_free = malloc((size_t)n_pages * 4), a->host_len = malloc((size_t)lanes * 4);
    a->host_page_row = calloc((size_t)n_pages, 4);
    if (!a->host_free || !a->host_len || !a->host_page_row) abort();
    int used = n_pages;
    uint64_t seed = 5;
    for (int i = 0; i < n_pages; i++) a->host_free[i] = i;
    for (int i = n_pages - 1; i > 0; i--) {
        int j = (int)(hash_splitmix(seed++) % (uint64_t)(i + 1)), page = a->host_free[i];
        a->host_free[i] = a->host_free[j], a->host_free[j] = page;
    }
    for (int lane = 0; lane < lanes; lane++) {
        a->host_len[lane] = uneven ? length * 3 / 4 + (int)(hash_splitmix(seed++) % (uint64_t)(length / 2)) : length;
        for (int i = 0; i < pages_of(a->host_len[lane]); i++)
            a->host_page_row[(int64_t)lane * max_pages + i] = a->host_free[--used];
    }
    struct tensor pool = bench_random(b, b->ops.dtype, (int64_t)n_pages * 2 * PAGE, HEAD_DIM, 1);
    kv->pool = tensor_3d(pool.data, b->ops.dtype, n_pages, 2 * PAGE, HEAD_DIM);
    kv->page_row = bench_array(b, a->host_page_row, (size_t)n_pages * 4);
    kv->lane_len = bench_array(b, a->host_len, (size_t)lanes * 4);
    kv->free_stack = bench_array(b, a->host_free, (size_t)n_pages * 4);
    kv->free_count = bench_array(b, &used, 4);
    kv->error = bench_array(b, (int32_t[]){0}, 4);
}

/* What every lane held at first. */
static void restore_cache(struct attention *a, int shorter)
{
    struct ops *o = &a->b->ops;
    const int lanes = a->kv.n_slots * a->kv.lanes_per_slot;
    int32_t *length = malloc((size_t)lanes * 4), used = a->kv.n_pages;
    if (!length) abort();
    for (int i = 0; i < lanes; i++) {
        length[i] = a->host_len[i] - shorter;
        used -= pages_of(a->host_len[i]);
    }
    bench_demand(ops_upload(o, a->kv.lane_len, length, (size_t)lanes * 4));
    bench_demand(ops_upload(o, a->kv.page_row, a->host_page_row, (size_t)a->kv.n_pages * 4));
    bench_demand(ops_upload(o, a->kv.free_stack, a->host_free, (size_t)a->kv.n_pages * 4));
    bench_demand(ops_upload(o, a->kv.free_count, &used, 4));
    free(length);
}

/* Opens the backend for this shape: `rows` query rows a sequence; 0 layers: as many as outrun the cache. */
static struct attention take_attention(struct bench *b, struct attention_shape s, int rows, int n_layers, int spare)
{
    const int tokens = s.n_seqs * rows;
    const double kv_bytes = 4.0 * s.n_seqs * s.length * s.n_kv_heads * HEAD_DIM;
    struct attention a = {.b = b, .heads = {s.n_heads, s.n_kv_heads, HEAD_DIM, 0, 0.0883883f}, .n_layers = n_layers};
    if (!n_layers) a.n_layers = (int)least(MOST_LAYERS, 1 + BENCH_BEYOND_CACHE / kv_bytes);
    const struct ops_limits limits = {.max_tokens = tokens,
                                      .max_seqs = s.n_seqs,
                                      .max_context = s.length * 5 / 4 + spare + PAGE,
                                      .max_in_features = 1024,
                                      .max_heads = s.n_heads,
                                      .head_dim = HEAD_DIM,
                                      .vocab_size = 1024,
                                      .max_lanes = s.n_kv_heads * a.n_layers};
    bench_open(b, &limits);
    take_cache(&a, s.n_seqs, s.length, spare, s.uneven);
    const int64_t columns = (s.n_heads + 2 * (int64_t)s.n_kv_heads) * HEAD_DIM;
    a.qkv = bench_random(b, b->ops.dtype, (int64_t)a.n_layers * tokens, columns, 1);
    a.out = bench_random(b, b->ops.dtype, (int64_t)a.n_layers * tokens, (int64_t)s.n_heads * HEAD_DIM, 1);
    int32_t *slot = malloc((size_t)s.n_seqs * 4), *cu = malloc((size_t)(s.n_seqs + 1) * 4);
    if (!slot || !cu) abort();
    for (int i = 0; i <= s.n_seqs; i++) cu[i] = i * rows;
    for (int i = 0; i < s.n_seqs; i++) slot[i] = i;
    a.batch = (struct seq_batch){.n_seqs = s.n_seqs, .n_tokens = tokens, .host_slot = slot, .host_cu_seqlens = cu};
    a.batch.slot = bench_array(b, slot, (size_t)s.n_seqs * 4);
    a.batch.cu_seqlens = bench_array(b, cu, (size_t)(s.n_seqs + 1) * 4);
    return a;
}

static void close_attention(struct attention *a)
{
    bench_close(a->b);
    free((void *)(uintptr_t)a->batch.host_slot), free((void *)(uintptr_t)a->batch.host_cu_seqlens);
    free(a->host_len), free(a->host_page_row), free(a->host_free);
}

/* Layer's q (part 0), k (1), v (2) or output (3) rows. */
static struct tensor part_of(const struct attention *a, int layer, int part)
{
    const int heads = a->heads.n_heads, kv = a->heads.n_kv_heads, n = a->batch.n_tokens;
    if (part == 3) return bench_heads(tensor_rows(a->out, (int64_t)layer * n, n), 0, heads, HEAD_DIM);
    const int64_t first = part == 0 ? 0 : heads + (part == 2 ? kv : 0);
    return bench_heads(tensor_rows(a->qkv, (int64_t)layer * n, n), first * HEAD_DIM, part ? kv : heads, HEAD_DIM);
}

static struct attention_heads layer_heads(const struct attention *a, int layer)
{
    struct attention_heads heads = a->heads;
    heads.lane = layer * heads.n_kv_heads;
    return heads;
}

static int prefill_layers(void *arg)
{
    const struct attention *a = arg;
    for (int i = 0; i < a->n_layers; i++) {
        const struct attention_heads heads = layer_heads(a, i);
        TRY(ops_attention_prefill(&a->b->ops, part_of(a, i, 3), part_of(a, i, 0), part_of(a, i, 1), part_of(a, i, 2),
                                  &a->batch, &a->kv, &heads));
    }
    return OK;
}

static int decode_layers(void *arg)
{
    const struct attention *a = arg;
    for (int i = 0; i < a->n_layers; i++) {
        const struct attention_heads heads = layer_heads(a, i);
        TRY(ops_attention_decode(&a->b->ops, part_of(a, i, 3), part_of(a, i, 0), &a->batch, &a->kv, &heads));
    }
    return OK;
}

struct vision {
    struct bench *b;
    struct tensor q, k, v, out;
    int n_images, dim;
};

static int vision_layer(void *arg)
{
    const struct vision *v = arg;
    return ops_attention_vision(&v->b->ops, v->out, v->q, v->k, v->v, v->n_images, 0.125f);
}

static void bench_vision(struct bench *b, int n_images, int tokens, int heads, int dim)
{
    char name[128];
    const int64_t n = (int64_t)n_images * tokens, width = (int64_t)heads * dim;
    struct ops_limits limits = {.max_tokens = (int)n, .max_seqs = n_images, .max_heads = heads, .head_dim = dim};
    limits.max_context = limits.max_in_features = limits.vocab_size = 1024, limits.max_lanes = heads;
    bench_open(b, &limits);
    struct tensor qkv = bench_random(b, b->ops.dtype, n, 3 * width, 1),
                  out = bench_random(b, b->ops.dtype, n, width, 1);
    struct vision v = {b,
                       bench_heads(qkv, 0, heads, dim),
                       bench_heads(qkv, width, heads, dim),
                       bench_heads(qkv, 2 * width, heads, dim),
                       bench_heads(out, 0, heads, dim),
                       n_images,
                       dim};
    double took = bench_time(b, vision_layer, &v, false);
    snprintf(name, sizeof name, "%d images x %d tokens, %d heads of %d", n_images, tokens, heads, dim);
    bench_report(b, "prefill", name, "ms", took * 1e3, "tflops",
                 4.0 * (double)n * tokens * (double)width / took * 1e-12, NULL);
    bench_close(b);
}

void bench_prefill(struct bench *b)
{
    static const struct attention_shape shapes[] = {{1, 2880, 32, 8, false},  {1, 8192, 32, 8, false},
                                                    {32, 512, 32, 8, false},  {1, 2880, 40, 40, false},
                                                    {1, 8192, 40, 40, false}, {32, 512, 40, 40, false}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        char name[128];
        const struct attention_shape s = shapes[i];
        const double bytes = 4.0 * s.n_seqs * s.length * (s.n_heads + s.n_kv_heads) * HEAD_DIM;
        struct attention a = take_attention(b, s, s.length, (int)(1 + BENCH_BEYOND_CACHE / 2 / bytes), 0);
        double took = bench_time(b, prefill_layers, &a, false) / a.n_layers;
        double flops = 2.0 * s.n_seqs * s.length * (double)s.length * s.n_heads * HEAD_DIM;
        snprintf(name, sizeof name, "causal %d x %d, %d/%d heads of %d", s.n_seqs, s.length, s.n_heads, s.n_kv_heads,
                 HEAD_DIM);
        bench_report(b, "prefill", name, "ms", took * 1e3, "tflops", flops / took * 1e-12, NULL);
        close_attention(&a);
    }
    bench_vision(b, 8, 577, 16, 64);
    bench_vision(b, 8, 729, 16, 72);
}

/* A chain of layers, at least eight, as a step's graph has them: one may begin while the one before ends. The list of
 * work is made for lanes one token shorter, as before the step's append. */
static void bench_decode_shape(struct bench *b, struct attention_shape s)
{
    enum { LEAST_LAYERS = 8 };
    char name[160];
    const double layer_bytes = 4.0 * s.n_seqs * s.length * s.n_kv_heads * HEAD_DIM;
    const int layers = (int)least(MOST_LAYERS, 1 + BENCH_BEYOND_CACHE / layer_bytes);
    struct attention a = take_attention(b, s, 1, layers < LEAST_LAYERS ? LEAST_LAYERS : layers, 1);
    struct seq_batch batch = {.n_seqs = s.n_seqs, .n_tokens = s.n_seqs, .slot = a.batch.slot};
    double bytes = 0;
    for (int lane = 0; lane < s.n_seqs * a.kv.lanes_per_slot; lane++) bytes += 4.0 * HEAD_DIM * a.host_len[lane];
    a.batch =
        (struct seq_batch){batch.n_seqs, batch.n_tokens, batch.slot, NULL, a.batch.host_slot, a.batch.host_cu_seqlens};
    restore_cache(&a, 1);
    bench_demand(ops_decode_begin(&b->ops, &batch, &a.kv));
    restore_cache(&a, 0);
    double took = bench_time(b, decode_layers, &a, true) / a.n_layers, gbs = bytes / a.n_layers / took * 1e-9;
    snprintf(name, sizeof name, "%d x %d%s, %d/%d heads of %d", s.n_seqs, s.length, s.uneven ? " uneven" : "",
             s.n_heads, s.n_kv_heads, HEAD_DIM);
    bench_report(b, "decode", name, "us", took * 1e6, "gbs", gbs, "of_copy", gbs / b->ceilings.copy_gbs, NULL);
    close_attention(&a);
}

void bench_decode(struct bench *b)
{
    static const struct attention_shape shapes[] = {
        {64, 2048, 32, 8, false},  {1, 32768, 32, 8, false}, {4, 32768, 32, 8, false},
        {1, 131072, 32, 8, false}, {1, 2048, 32, 8, false},  {32, 2048, 40, 40, false},
        {64, 205, 32, 8, false},   {64, 205, 32, 8, true},   {1, 576, 40, 40, false}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) bench_decode_shape(b, shapes[i]);
}

/* ---- the small kernels of a decode step of Llama-3-8B's shape ---- */

enum { HIDDEN = 4096, FFN = 14336, REPEATS = 32 };

struct small {
    struct attention a; /* its cache grows by a token a layer in each run */
    struct tensor x, y, residual, gate_up, gate, logits, source;
    float *norm, *frequency;
    int32_t *position;
    struct sampling_state state;
    int kind, rows;
};
enum { RMS_NORM, ADD_RMS_NORM, SWIGLU, ROPE_THEN_APPEND, ROPE_APPEND, DECODE_BEGIN, COPY_LOGITS, SAMPLE };

static int rope_append(const struct small *s, int layer)
{
    struct ops *o = &s->a.b->ops;
    const struct attention_heads heads = layer_heads(&s->a, layer);
    if (s->kind == ROPE_APPEND)
        return ops_rope_append(o, &s->a.kv, &heads, part_of(&s->a, layer, 0), part_of(&s->a, layer, 1),
                               part_of(&s->a, layer, 2), s->position, s->frequency, 1, &s->a.batch);
    TRY(ops_rope(o, part_of(&s->a, layer, 0), s->position, s->frequency, 1));
    TRY(ops_rope(o, part_of(&s->a, layer, 1), s->position, s->frequency, 1));
    return ops_kv_append(o, &s->a.kv, &heads, part_of(&s->a, layer, 1), part_of(&s->a, layer, 2), &s->a.batch);
}

static int run_small(void *arg)
{
    const struct small *s = arg;
    struct ops *o = &s->a.b->ops;
    if (s->kind >= ROPE_THEN_APPEND && s->kind <= DECODE_BEGIN) TRY(ops_decode_begin(o, &s->a.batch, &s->a.kv));
    if (s->kind >= COPY_LOGITS) TRY(ops_copy(o, s->logits.data, s->source.data, tensor_bytes(s->logits)));
    if (s->kind == SAMPLE) TRY(ops_sample(o, s->logits, s->a.batch.slot, &s->state));
    for (int i = 0; i < REPEATS && s->kind <= ROPE_APPEND; i++) {
        if (s->kind == RMS_NORM) TRY(ops_rms_norm(o, s->y, s->x, s->norm, 1e-5f));
        if (s->kind == ADD_RMS_NORM) TRY(ops_add_rms_norm(o, s->y, s->residual, s->x, s->norm, 1e-5f));
        if (s->kind == SWIGLU) TRY(ops_swiglu(o, s->gate, s->gate_up));
        if (s->kind >= ROPE_THEN_APPEND) TRY(rope_append(s, i));
    }
    return OK;
}

static void take_small(struct bench *b, struct small *s, int rows)
{
    const enum dtype dtype = b->ops.dtype;
    float ones[HIDDEN], frequency[HEAD_DIM / 2];
    int32_t position[64];
    for (int i = 0; i < HIDDEN; i++) ones[i] = 1;
    for (int i = 0; i < HEAD_DIM / 2; i++) frequency[i] = 1.0f / (float)(1 + i);
    for (int i = 0; i < 64; i++) position[i] = 500 + i;
    s->rows = rows;
    s->x = bench_random(b, dtype, rows, HIDDEN, 1), s->y = bench_random(b, dtype, rows, HIDDEN, 1);
    s->residual = bench_random(b, dtype, rows, HIDDEN, 1), s->gate = bench_random(b, dtype, rows, FFN, 1);
    s->gate_up = bench_random(b, dtype, rows, 2 * FFN, 1);
    s->norm = bench_array(b, ones, sizeof ones), s->frequency = bench_array(b, frequency, sizeof frequency);
    s->position = bench_array(b, position, sizeof position);
    s->a.batch.cu_seqlens = NULL;
}

static void take_sampling(struct bench *b, struct small *s, int vocab, const struct sampling_params *p)
{
    const size_t n = (size_t)s->rows;
    s->logits = bench_random(b, DTYPE_F32, s->rows, vocab, 3),
    s->source = bench_random(b, DTYPE_F32, s->rows, vocab, 3);
    s->state = (struct sampling_state){.params = bench_take(b, n * sizeof *p),
                                       .token_count = bench_take(b, n * (size_t)vocab * 4),
                                       .next_token = bench_take(b, n * 4),
                                       .position = bench_take(b, n * 4),
                                       .logprob = bench_take(b, n * (1 + MAX_LOGPROBS) * 4),
                                       .logprob_token = bench_take(b, n * (1 + MAX_LOGPROBS) * 4),
                                       .vocab_size = vocab,
                                       .n_slots = s->rows};
    for (int i = 0; i < s->rows; i++) bench_demand(ops_sampling_begin(&b->ops, &s->state, i, p, NULL, 0));
}

static void report_small(struct bench *b, struct small *s, int kind, const char *what, double per, double without)
{
    char name[128];
    s->kind = kind;
    double took = bench_time(b, run_small, s, true) / per - without;
    snprintf(name, sizeof name, "%s, %d rows", what, s->rows);
    bench_report(b, "small", name, "us", took * 1e6, NULL);
}

static void bench_sampling(struct bench *b, struct small *s, int vocab)
{
    static const struct {
        const char *name;
        struct sampling_params p;
    } kinds[] = {{"greedy", {0, 1, 0, 0, 0, 1, 0, 0, 1}},
                 {"temperature", {1, 1, 0, 0, 0, 1, 0, 0, 1}},
                 {"top_p 0.9", {1, 0.9f, 0, 0, 0, 1, 0, 0, 1}},
                 {"top_k 50, top_p 0.9", {1, 0.9f, 0, 0, 0, 1, 50, 0, 1}}};
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        char name[80];
        take_sampling(b, s, vocab, &kinds[i].p);
        s->kind = COPY_LOGITS; /* sampling may overwrite its logits: each run starts with a copy, which is taken off */
        double copy = bench_time(b, run_small, s, true);
        snprintf(name, sizeof name, "sample %s, %d tokens", kinds[i].name, vocab);
        report_small(b, s, SAMPLE, name, 1, copy);
    }
}

void bench_small(struct bench *b)
{
    static const int rows[] = {1, 32, 64};
    for (int i = 0; i < 3; i++) {
        struct small s = {.kind = 0};
        const struct attention_shape shape = {rows[i], 100, 32, 8, false};
        s.a = take_attention(b, shape, 1, REPEATS, 600); /* room for the tokens of all runs */
        take_small(b, &s, rows[i]);
        report_small(b, &s, RMS_NORM, "rms_norm of 4096", REPEATS, 0);
        report_small(b, &s, ADD_RMS_NORM, "add_rms_norm of 4096", REPEATS, 0);
        report_small(b, &s, SWIGLU, "swiglu of 14336", REPEATS, 0);
        report_small(b, &s, ROPE_THEN_APPEND, "rope of q and k, append, 32/8 heads", REPEATS, 0);
        restore_cache(&s.a, 0);
        report_small(b, &s, ROPE_APPEND, "rope_append, 32/8 heads", REPEATS, 0);
        report_small(b, &s, DECODE_BEGIN, "decode_begin, 256 lanes a slot", 1, 0);
        close_attention(&s.a);
        for (int j = 0; j < 2; j++) {
            const int vocab = j ? 128256 : 32000;
            struct ops_limits limits = {.max_tokens = 64, .max_seqs = 64, .max_context = 1024, .max_heads = 32};
            limits.max_in_features = 4096, limits.head_dim = HEAD_DIM, limits.vocab_size = vocab, limits.max_lanes = 8;
            bench_open(b, &limits);
            int32_t slot[64];
            for (int r = 0; r < 64; r++) slot[r] = r;
            s.a.batch.slot = bench_array(b, slot, sizeof slot);
            bench_sampling(b, &s, vocab);
            bench_close(b);
        }
    }
}

/* ---- VL-Cache: the statistics of a vision prompt, the choice, the packing; per layer ---- */

static int probe_layers(void *arg)
{
    const struct attention *a = arg;
    const int rows = a->batch.n_tokens, m = a->host_len[0];
    for (int i = 0; i < a->n_layers; i++) {
        const struct attention_heads heads = layer_heads(a, i);
        struct attention_probe probe = {.n_rows = rows, .first_position = m - rows, .threshold = 0.01f};
        probe.column_sum = (float *)a->column_sum.data + (int64_t)i * heads.n_kv_heads * m;
        probe.kept = a->kept + (int64_t)i * heads.n_heads;
        TRY(ops_attention_probe(&a->b->ops, part_of(a, i, 0), &a->kv, &heads, &probe));
    }
    return OK;
}

static int select_layers(void *arg)
{
    const struct attention *a = arg;
    const int n = a->heads.n_kv_heads;
    int k[MOST_LANES], window[MOST_LANES];
    const int lanes = a->n_layers * n;
    for (int i = 0; i < lanes; i++) k[i] = a->budget, window[i] = a->budget / 10;
    return ops_select_top(&a->b->ops, a->index, a->budget, tensor_rows(a->column_sum, 0, lanes), k, window);
}

static int pack_layers(void *arg)
{
    const struct attention *a = arg;
    return ops_kv_pack(&a->b->ops, &a->kv, 0, 0, a->n_layers * a->heads.n_kv_heads, a->index, a->budget, a->n_keep);
}

static void bench_vl_shape(struct bench *b, int n_heads, int n_kv_heads, int n_layers)
{
    enum { ROWS = 50, TOKENS = 2880 };
    char name[128];
    double took[GROUPS];
    struct attention a =
        take_attention(b, (struct attention_shape){1, TOKENS, n_heads, n_kv_heads, false}, ROWS, n_layers, 0);
    const int64_t lanes = (int64_t)n_layers * n_kv_heads;
    a.budget = TOKENS / 10;
    a.column_sum = bench_random(b, DTYPE_F32, lanes, TOKENS, 1);
    a.kept = bench_take(b, (size_t)(n_layers * n_heads) * sizeof *a.kept);
    a.index = bench_take(b, (size_t)lanes * (size_t)a.budget * sizeof *a.index);
    for (int i = 0; i < lanes; i++) a.n_keep[i] = a.budget;
    snprintf(name, sizeof name, "probe of %d rows, %d tokens, %d/%d heads", ROWS, TOKENS, n_heads, n_kv_heads);
    bench_report(b, "vl", name, "us", bench_time(b, probe_layers, &a, false) / n_layers * 1e6, NULL);
    snprintf(name, sizeof name, "select %d of %d, %d of %d rows", a.budget, TOKENS, n_kv_heads, n_kv_heads * n_layers);
    bench_report(b, "vl", name, "us", bench_time(b, select_layers, &a, false) / n_layers * 1e6, NULL);
    for (int i = 0; i < GROUPS; i++) {
        restore_cache(&a, 0);
        bench_demand(ops_finish(&b->ops));
        took[i] = bench_time_runs(b, pack_layers, &a, false, 1) / n_layers;
    }
    qsort(took, GROUPS, sizeof took[0], bench_by_size);
    snprintf(name, sizeof name, "pack of %d of %d lanes, %d to %d tokens", n_kv_heads, n_kv_heads * n_layers, TOKENS,
             a.budget);
    bench_report(b, "vl", name, "us", took[GROUPS / 2] * 1e6, NULL);
    close_attention(&a);
}

void bench_vl(struct bench *b)
{
    bench_vl_shape(b, 32, 8, 32);
    bench_vl_shape(b, 40, 40, 40);
}
