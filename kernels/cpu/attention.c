/* Attention of many queries: prompt chunks (causal, over pages and the chunk's dense keys) and images (full).
 *
 * A task is a block of queries of some heads that share a KV head, of one sequence. It walks blocks of keys in order
 * with an online softmax: the block's keys are transposed and its values gathered once for all the task's queries;
 * then, few queries at a time and all of it in cache, scores, weights, weighted values. Blocks of keys are cut by
 * position in the lane alone: a query's result is the same bits however a prompt is divided into chunks, whatever
 * else is in the batch, and for any number of threads. */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/lane.h"

enum { QUERIES = 96, KEYS = 128, HEADS = 4 };

/* What a thread needs for a task. */
struct scratch {
    float *k;       /* [head_dim, KEYS] transposed */
    float *v;       /* [KEYS, padded head_dim] */
    float *score;   /* [VECTOR_ROWS, KEYS] */
    float *output;  /* [HEADS, QUERIES, padded head_dim] */
    float *maximum; /* [HEADS, QUERIES] */
    float *sum;     /* [HEADS, QUERIES] */
};

/* Some heads of one sequence: dense rows, and tokens before them in a lane's pages. */
struct attend {
    const struct vector_ops *vector;
    const float *q, *k, *v; /* q: row 0 of the first head; head_dim apart */
    float *out;
    int64_t q_stride, k_stride, v_stride, out_stride;
    int n_rows, n_past, n_heads, head_dim, padded_dim, lane;
    const struct kv_view *kv;
    bool causal;
    float scale;
};

static size_t scratch_floats(int64_t head_dim)
{
    size_t dim = (size_t)vector__round_up((int)head_dim);
    return KEYS * 2 * dim + VECTOR_ROWS * KEYS + HEADS * QUERIES * (dim + 2);
}

static int place(const struct cpu *c, struct arena *arena, int64_t head_dim, float **memory)
{
    return arena_take(arena, (size_t)c->n_threads * scratch_floats(head_dim) * sizeof(float), "attention", memory);
}

int cpu__attention_measure(const struct cpu *c, const struct ops_limits *limits, struct arena *arena)
{
    float *memory;
    return place(c, arena, limits->head_dim, &memory);
}

static struct scratch of_thread(float *memory, int head_dim)
{
    const int dim = vector__round_up(head_dim);
    struct scratch s = {.k = memory + (size_t)omp_get_thread_num() * scratch_floats(head_dim)};
    s.v = s.k + KEYS * dim;
    s.score = s.v + KEYS * dim;
    s.output = s.score + VECTOR_ROWS * KEYS;
    s.maximum = s.output + HEADS * QUERIES * dim;
    s.sum = s.maximum + HEADS * QUERIES;
    return s;
}

/* Keys [at, at + width) of the sequence, from pages or dense rows, transposed; and their values. */
static void gather_block(const struct attend *a, int at, int width, const struct scratch *s)
{
    const float *row[KEYS];
    const size_t bytes = (size_t)a->head_dim * sizeof(float);
    for (int i = 0; i < width; i++) {
        const int dense = at + i - a->n_past;
        const float *value = dense < 0 ? lane__value(a->kv, a->lane, at + i) : a->v + dense * a->v_stride;
        row[i] = dense < 0 ? lane__key(a->kv, a->lane, at + i) : a->k + dense * a->k_stride;
        memcpy(s->v + i * a->padded_dim, value, bytes);
        memset(s->v + i * a->padded_dim + a->head_dim, 0, (size_t)(a->padded_dim - a->head_dim) * sizeof(float));
    }
    a->vector->transpose(s->k, KEYS, row, width, a->head_dim);
}

/* Scores of one query over `visible` keys become weights, up to `width` 0; what was summed is scaled to the new
 * maximum. */
static void soften(const struct attend *a, float *score, int visible, int width, float *maximum, float *sum,
                   float *output)
{
    const int padded = cpu__min(vector__round_up(visible), KEYS); /* whole vectors: exp(-inf) is 0 */
    for (int j = visible; j < padded; j++) score[j] = -INFINITY;
    float total, top = a->vector->soften(score, padded, *maximum, &total);
    for (int j = padded; j < width; j++) score[j] = 0;
    if (top > *maximum && *maximum > -INFINITY) {
        float factor = expf(*maximum - top);
        *sum *= factor;
        a->vector->scale(output, factor, a->padded_dim);
    }
    *maximum = top;
    *sum += total;
}

/* n <= VECTOR_ROWS queries of a head from row `first` on, over the gathered keys [at, at + width); state: the place of
 * the first one in the scratch. */
static void attend_rows(const struct attend *a, int head, int first, int n, int at, int width, int state,
                        const struct scratch *s)
{
    const int newest = a->n_past + first - at + 1; /* keys of the block that the first query sees, if causal */
    const int seen = a->causal ? cpu__min(width, newest + n - 1) : width;
    if (seen <= 0) return;
    const struct vector_product scores = {.c = s->score,
                                          .a = a->q + first * a->q_stride + head * a->head_dim,
                                          .b = s->k,
                                          .c_stride = KEYS,
                                          .a_stride = a->q_stride,
                                          .b_stride = KEYS,
                                          .m = n,
                                          .n = vector__round_up(seen),
                                          .k = a->head_dim,
                                          .scale = a->scale};
    const struct vector_product values = {.c = s->output + state * a->padded_dim,
                                          .a = s->score,
                                          .b = s->v,
                                          .c_stride = a->padded_dim,
                                          .a_stride = KEYS,
                                          .b_stride = a->padded_dim,
                                          .m = n,
                                          .n = a->padded_dim,
                                          .k = seen,
                                          .add = true};
    a->vector->multiply(&scores);
    for (int i = 0; i < n; i++) {
        int visible = a->causal ? cpu__min(width, newest + i) : width;
        if (visible > 0)
            soften(a, s->score + i * KEYS, visible, seen, s->maximum + state + i, s->sum + state + i,
                   s->output + (state + i) * a->padded_dim);
        else
            memset(s->score + i * KEYS, 0, (size_t)seen * sizeof(float));
    }
    a->vector->multiply(&values);
}

/* n <= QUERIES queries from row `first` on, all heads of the task. */
static void attend_queries(const struct attend *a, int first, int n, const struct scratch *s)
{
    const int n_keys = a->n_past + (a->causal ? first + n : a->n_rows);
    for (int i = 0; i < a->n_heads * QUERIES; i++) s->maximum[i] = -INFINITY, s->sum[i] = 0;
    memset(s->output, 0, (size_t)(a->n_heads * QUERIES * a->padded_dim) * sizeof(float));
    for (int at = 0; at < n_keys; at += KEYS) {
        const int width = cpu__min(KEYS, n_keys - at);
        gather_block(a, at, width, s);
        for (int head = 0; head < a->n_heads; head++)
            for (int i = 0; i < n; i += VECTOR_ROWS)
                attend_rows(a, head, first + i, cpu__min(VECTOR_ROWS, n - i), at, width, head * QUERIES + i, s);
    }
    for (int head = 0; head < a->n_heads; head++)
        for (int i = 0; i < n; i++) {
            const float *from = s->output + (head * QUERIES + i) * a->padded_dim, sum = s->sum[head * QUERIES + i];
            float *to = a->out + (first + i) * a->out_stride + head * a->head_dim;
            for (int d = 0; d < a->head_dim; d++) to[d] = from[d] / sum;
        }
}

int cpu__attention_vision(struct ops *o, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                          int n_images, float scale)
{
    const struct cpu *c = cpu__of(o);
    const int n_rows = (int)(q.dim[0] / n_images), n_heads = (int)q.dim[1], dim = (int)q.dim[2];
    const int blocks = (n_rows + QUERIES - 1) / QUERIES;
    struct arena arena;
    float *memory;
    TRY(cpu__scratch(o, &arena));
    TRY(place(c, &arena, dim, &memory));
#pragma omp parallel for num_threads(c->n_threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < (int64_t)n_images * n_heads * blocks; task++) {
        int block = (int)(task % blocks), head = (int)(task / blocks % n_heads);
        int first = n_rows * block / blocks, end = n_rows * (block + 1) / blocks;
        int64_t row = task / blocks / n_heads * n_rows, offset = (int64_t)head * dim;
        struct attend a = {.vector = c->vector,
                           .q = cpu__row(q, row) + offset,
                           .k = cpu__row(k, row) + offset,
                           .v = cpu__row(v, row) + offset,
                           .out = cpu__row(out, row) + offset,
                           .q_stride = q.stride[0],
                           .k_stride = k.stride[0],
                           .v_stride = v.stride[0],
                           .out_stride = out.stride[0],
                           .n_rows = n_rows,
                           .n_heads = 1,
                           .head_dim = dim,
                           .padded_dim = vector__round_up(dim),
                           .scale = scale};
        struct scratch s = of_thread(memory, dim);
        attend_queries(&a, first, end - first, &s);
    }
    return OK;
}

/* Finds the sequence of a block of queries; returns the block's number within it, last ones first: they are longest. */
static int find_sequence(const struct seq_batch *batch, int64_t block, int *sequence)
{
    for (int i = 0; i < batch->n_seqs; i++) {
        int n = batch->cu_seqlens[i + 1] - batch->cu_seqlens[i], blocks = (n + QUERIES - 1) / QUERIES;
        *sequence = i;
        if (block < blocks) return blocks - 1 - (int)block;
        block -= blocks;
    }
    return 0;
}

/* The lane of a sequence's KV head and its tokens before this chunk. */
static void find_past(struct attend *a, int slot, int kv_head, const struct attention_heads *heads)
{
    if (slot < 0 || slot >= a->kv->n_slots) return;
    a->lane = slot * a->kv->lanes_per_slot + heads->lane + kv_head;
    a->n_past = a->kv->lane_len[a->lane] - a->n_rows;
    if (a->n_past < 0) a->n_past = 0; /* the append failed, and the error word says so */
}

int cpu__attention_prefill(struct ops *o, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                           const struct seq_batch *batch, const struct kv_view *kv, const struct attention_heads *heads)
{
    const struct cpu *c = cpu__of(o);
    const int dim = heads->head_dim, group = heads->n_heads / heads->n_kv_heads;
    const int parts = (group + HEADS - 1) / HEADS, tasks_of_block = heads->n_kv_heads * parts;
    struct arena arena;
    float *memory;
    int64_t blocks = 0;
    TRY(cpu__scratch(o, &arena));
    TRY(place(c, &arena, dim, &memory));
    for (int i = 0; i < batch->n_seqs; i++)
        blocks += (batch->cu_seqlens[i + 1] - batch->cu_seqlens[i] + QUERIES - 1) / QUERIES;
#pragma omp parallel for num_threads(c->n_threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < blocks * tasks_of_block; task++) {
        int kv_head = (int)(task % tasks_of_block) / parts, part = (int)(task % tasks_of_block) % parts, sequence = 0;
        int first = find_sequence(batch, task / tasks_of_block, &sequence) * QUERIES;
        int64_t row = batch->cu_seqlens[sequence];
        int head = kv_head * group + group * part / parts, end = kv_head * group + group * (part + 1) / parts;
        struct attend a = {.vector = c->vector,
                           .q = cpu__row(q, row) + (int64_t)head * dim,
                           .k = cpu__row(k, row) + (int64_t)kv_head * dim,
                           .v = cpu__row(v, row) + (int64_t)kv_head * dim,
                           .out = cpu__row(out, row) + (int64_t)head * dim,
                           .q_stride = q.stride[0],
                           .k_stride = k.stride[0],
                           .v_stride = v.stride[0],
                           .out_stride = out.stride[0],
                           .n_rows = batch->cu_seqlens[sequence + 1] - batch->cu_seqlens[sequence],
                           .n_heads = end - head,
                           .head_dim = dim,
                           .padded_dim = vector__round_up(dim),
                           .kv = kv,
                           .causal = true,
                           .scale = heads->scale};
        struct scratch s = of_thread(memory, dim);
        find_past(&a, batch->slot[sequence], kv_head, heads);
        attend_queries(&a, first, cpu__min(QUERIES, a.n_rows - first), &s);
    }
    return OK;
}
