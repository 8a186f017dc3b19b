/* Attention of many queries: prompt chunks (causal, over pages and the chunk's dense keys) and images (full).
 *
 * A task is a block of queries of one head of one sequence. It walks blocks of keys, in order, with an online softmax:
 * scores by sgemm, then running maximum, sum and weighted values of each query. Tasks share nothing, and a task's
 * arithmetic depends on its own sequence alone. */
#include <cblas.h>
#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/lane.h"

enum { QUERIES = 64, KEYS = 256 };

/* What a thread needs for a task. */
struct scratch {
    float *score;  /* [QUERIES, KEYS] */
    float *k, *v;  /* [KEYS, head_dim] gathered from pages */
    float *output; /* [QUERIES, head_dim] */
};

/* One head of one sequence: dense rows, and tokens before them in a lane's pages. */
struct attend {
    const float *q, *k, *v;
    float *out;
    int64_t q_stride, k_stride, v_stride, out_stride;
    int n_rows, n_past, head_dim, lane;
    const struct kv_view *kv;
    const struct vector_ops *vector;
    bool causal;
    float scale;
};

static size_t scratch_floats(int64_t head_dim) { return QUERIES * KEYS + (size_t)head_dim * (2 * KEYS + QUERIES); }

static int place(const struct cpu *c, struct arena *arena, int64_t head_dim, float **memory)
{
    return arena_take(arena, (size_t)c->n_threads * scratch_floats(head_dim) * sizeof(float), "attention", memory);
}

int cpu__attention_measure(const struct cpu *c, const struct ops_limits *limits, struct arena *arena)
{
    float *memory;
    return place(c, arena, limits->head_dim, &memory);
}

static struct scratch of_thread(float *memory, int64_t head_dim)
{
    struct scratch s;
    s.score = memory + (size_t)omp_get_thread_num() * scratch_floats(head_dim);
    s.k = s.score + QUERIES * KEYS;
    s.v = s.k + KEYS * head_dim;
    s.output = s.v + KEYS * head_dim;
    return s;
}

/* Scores of one query over `visible` keys of a block become weights, the rest of the block 0; what was summed before
 * is scaled to the new maximum. */
static void soften(const struct vector_ops *v, float *score, int visible, int width, float *maximum, float *sum,
                   float *output, int dim)
{
    float total, top = v->soften(score, visible, *maximum, &total);
    for (int j = visible; j < width; j++) score[j] = 0;
    if (top > *maximum && *maximum > -INFINITY) {
        float factor = expf(*maximum - top);
        *sum *= factor;
        v->scale(output, factor, dim);
    }
    *maximum = top;
    *sum += total;
}

static void attend_queries(const struct attend *a, int first, int n, const struct scratch *s)
{
    const int dim = a->head_dim, n_keys = a->n_past + (a->causal ? first + n : a->n_rows);
    float maximum[QUERIES], sum[QUERIES] = {0};
    for (int i = 0; i < n; i++) maximum[i] = -INFINITY;
    memset(s->output, 0, (size_t)n * (size_t)dim * sizeof(float));
    for (int at = 0, width; at < n_keys; at += width) {
        const bool past = at < a->n_past;
        width = cpu__min(KEYS, (past ? a->n_past : n_keys) - at);
        const float *k = s->k, *v = s->v;
        int64_t k_stride = dim, v_stride = dim;
        if (past) {
            lane__gather(a->kv, a->lane, at, width, s->k, s->v);
        } else {
            k = a->k + (at - a->n_past) * a->k_stride, v = a->v + (at - a->n_past) * a->v_stride;
            k_stride = a->k_stride, v_stride = a->v_stride;
        }
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, n, width, dim, a->scale, a->q + first * a->q_stride,
                    (int)a->q_stride, k, (int)k_stride, 0.0f, s->score, KEYS);
        for (int i = 0; i < n; i++) {
            int visible = a->causal ? cpu__min(width, a->n_past + first + i + 1 - at) : width;
            if (visible > 0)
                soften(a->vector, s->score + i * KEYS, visible, width, &maximum[i], &sum[i], s->output + i * dim, dim);
            else
                memset(s->score + i * KEYS, 0, (size_t)width * sizeof(float));
        }
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, dim, width, 1.0f, s->score, KEYS, v, (int)v_stride,
                    1.0f, s->output, dim);
    }
    for (int i = 0; i < n; i++)
        for (int d = 0; d < dim; d++)
            a->out[(first + i) * a->out_stride + d] = sum[i] > 0 ? s->output[i * dim + d] / sum[i] : 0;
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
                           .head_dim = dim,
                           .scale = scale};
        struct scratch s = of_thread(memory, dim);
        attend_queries(&a, block * QUERIES, cpu__min(QUERIES, n_rows - block * QUERIES), &s);
    }
    return OK;
}

/* Finds the sequence of a task; returns the number of the task's query block within it. */
static int find_sequence(const struct seq_batch *batch, int64_t block, int *sequence)
{
    for (int i = 0; i < batch->n_seqs; i++) {
        int n = batch->cu_seqlens[i + 1] - batch->cu_seqlens[i], blocks = (n + QUERIES - 1) / QUERIES;
        *sequence = i;
        if (block < blocks) return blocks - 1 - (int)block; /* the longest first: the later queries of a chunk */
        block -= blocks;
    }
    return 0;
}

static void prefill_task(struct attend *a, const struct seq_batch *batch, const struct kv_view *kv,
                         const struct attention_heads *heads, int sequence, int head)
{
    const int slot = batch->slot[sequence], kv_head = head / (heads->n_heads / heads->n_kv_heads);
    a->n_rows = batch->cu_seqlens[sequence + 1] - batch->cu_seqlens[sequence];
    a->head_dim = heads->head_dim;
    a->scale = heads->scale;
    a->causal = true;
    a->kv = kv;
    a->n_past = 0;
    if (slot >= 0 && slot < kv->n_slots) {
        a->lane = slot * kv->lanes_per_slot + heads->lane + kv_head;
        a->n_past = kv->lane_len[a->lane] - a->n_rows;
        if (a->n_past < 0) a->n_past = 0; /* the append failed, and the error word says so */
    }
}

int cpu__attention_prefill(struct ops *o, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                           const struct seq_batch *batch, const struct kv_view *kv, const struct attention_heads *heads)
{
    const struct cpu *c = cpu__of(o);
    const int64_t dim = heads->head_dim, group = heads->n_heads / heads->n_kv_heads;
    struct arena arena;
    float *memory;
    int64_t blocks = 0;
    TRY(cpu__scratch(o, &arena));
    TRY(place(c, &arena, dim, &memory));
    for (int i = 0; i < batch->n_seqs; i++)
        blocks += (batch->cu_seqlens[i + 1] - batch->cu_seqlens[i] + QUERIES - 1) / QUERIES;
#pragma omp parallel for num_threads(c->n_threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < blocks * heads->n_heads; task++) {
        int head = (int)(task % heads->n_heads), sequence = 0;
        int first = find_sequence(batch, task / heads->n_heads, &sequence) * QUERIES;
        int64_t row = batch->cu_seqlens[sequence];
        struct attend a = {.vector = c->vector,
                           .q = cpu__row(q, row) + head * dim,
                           .k = cpu__row(k, row) + head / group * dim,
                           .v = cpu__row(v, row) + head / group * dim,
                           .out = cpu__row(out, row) + head * dim,
                           .q_stride = q.stride[0],
                           .k_stride = k.stride[0],
                           .v_stride = v.stride[0],
                           .out_stride = out.stride[0]};
        struct scratch s = of_thread(memory, dim);
        prefill_task(&a, batch, kv, heads, sequence, head);
        attend_queries(&a, first, cpu__min(QUERIES, a.n_rows - first), &s);
    }
    return OK;
}
