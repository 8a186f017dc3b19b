/* Attention of one query a sequence over its whole lane, or over listed entries of it, read from the pages.
 *
 * A task is CHUNK tokens of one lane, for all query heads of the KV head, so each page is read once; or of one list,
 * for the query heads that share it. Its partial result (maximum, sum, weighted values) is merged with the lane's
 * others in their order. Chunks are cut by position in the lane alone: a row's result does not depend on the batch or
 * on the number of threads. */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/lane.h"

enum { CHUNK = 256, WIDENED = 32 /* tokens of a quantised lane that are widened at once */ };

/* Partial results: per (sequence, query head, chunk): maximum, sum, values [head_dim]. */
struct partials {
    float *memory; /* [n_seqs, n_heads, n_chunks, 2 + head_dim] */
    float *score;  /* per thread [group, CHUNK] */
    float *wide;   /* per thread [WIDENED, head_dim] */
    int64_t n_chunks, stride;
};

static int place(const struct cpu *c, struct arena *arena, int64_t n_seqs, int64_t n_heads, int64_t longest,
                 int64_t head_dim, struct partials *p)
{
    p->n_chunks = longest ? (longest + CHUNK - 1) / CHUNK : 1;
    p->stride = 2 + head_dim;
    size_t rows = (size_t)(n_seqs * n_heads * p->n_chunks);
    TRY(arena_take(arena, rows * (size_t)p->stride * sizeof(float), "decode partials", &p->memory));
    TRY(arena_take(arena, (size_t)c->n_threads * (size_t)n_heads * CHUNK * sizeof(float), "decode scores", &p->score));
    return arena_take(arena, (size_t)c->n_threads * WIDENED * (size_t)head_dim * sizeof(float), "decode values",
                      &p->wide);
}

int cpu__decode_measure(const struct cpu *c, const struct ops_limits *limits, struct arena *arena)
{
    struct partials p;
    return place(c, arena, limits->max_seqs, limits->max_heads, limits->max_context, limits->head_dim, &p);
}

/* Asks for a page's rows before they are needed: pages lie anywhere, so the hardware cannot guess. */
static void fetch_ahead(const float *row, int64_t n)
{
    for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(row + i, 0, 2);
}

/* The queries of a group over one lane, and where a thread's scores stand. */
struct attend {
    const struct vector_ops *vector;
    const struct kv_view *kv, *host; /* host: where negative entries lie, plain */
    const float *recent;             /* the lane's first page of recent tokens, plain */
    const float *q;                  /* [group, head_dim] */
    float *score;                    /* [group, CHUNK] */
    float *wide;                     /* [WIDENED, head_dim] */
    const int32_t *entry;            /* the entries to attend to; NULL: all, in their order */
    enum kv_format format;
    int lane, group;
    float scale;
};

/* A chunk's tokens lie in runs, one a page (or one a listed entry): keys of run r for all queries, then, softened, its
 * values. */
static int run_length(const struct attend *a, int at, int end)
{
    if (a->entry) return 1;
    if (a->format == KV_PLAIN) return cpu__min(a->kv->page_size - at % a->kv->page_size, end - at);
    return cpu__min(cpu__min(lane__code_tokens(a->kv) - at % lane__code_tokens(a->kv), end - at), WIDENED);
}

/* Whether a run's tokens are codes: those of a quantised lane, not what is listed of host memory or of recent places.
 */
static bool is_coded(const struct attend *a, int at)
{
    return a->format != KV_PLAIN && (!a->entry || (a->entry[at] >= 0 && a->entry[at] < RECENT_ENTRY));
}

/* Key or value of a token that is stored as it is, wherever it lies. */
static const float *plain_row(const struct attend *a, int at, bool value)
{
    const int entry = a->entry ? a->entry[at] : at, size = a->kv->page_size;
    const int64_t from_key = value ? (int64_t)size * a->kv->head_dim : 0; /* alike in all of them */
    if (entry < 0) return lane__key(a->host, a->lane, ~entry) + from_key;
    if (entry < RECENT_ENTRY) return lane__key(a->kv, a->lane, entry) + from_key;
    const int place = entry - RECENT_ENTRY;
    return a->recent + ((int64_t)(place / size) * 2 * size + place % size) * a->kv->head_dim + from_key;
}

/* Where a lane's recent tokens begin; NULL: nowhere. */
static const float *recent_of(const struct kv_view *kv, const struct kv_list *list, int lane)
{
    if (!list || !list->recent) return NULL;
    const struct kv_recent *r = list->recent;
    const int slot = lane / kv->lanes_per_slot, row = slot * r->n_lanes + lane % kv->lanes_per_slot - r->first_lane;
    return (const float *)r->pool.data + (int64_t)row * (r->capacity / kv->page_size) * r->pool.stride[0];
}

/* The keys or values of the run of n tokens at `at`, and its tokens' scales; NULL: they have none. */
static const float *read_run(const struct attend *a, int at, int n, bool values, const float **scale)
{
    *scale = NULL;
    if (!is_coded(a, at)) return plain_row(a, at, values);
    const int token = a->entry ? a->entry[at] : at;
    *scale = values ? lane__value_scale(a->kv, a->lane, token) : lane__key_scale(a->kv, a->lane, token);
    a->vector->widen_codes(a->wide,
                           values ? lane__value_codes(a->kv, a->lane, token) : lane__key_codes(a->kv, a->lane, token),
                           a->format == KV_FP8, (int64_t)n * a->kv->head_dim);
    return a->wide;
}

/* Asks for the next run, at `at`, while one is used. */
static void fetch_run(const struct attend *a, int at, int end, bool values)
{
    if (at >= end || is_coded(a, at)) return;
    fetch_ahead(plain_row(a, at, values), (int64_t)run_length(a, at, end) * a->kv->head_dim);
}

/* Scores, or weights of values, of n tokens times the tokens' scales. */
static void apply_scales(float *score, const float *scale, int n)
{
    for (int i = 0; i < n; i++) score[i] *= scale[i];
}

/* Tokens [first, end) of the lane or list; the partial of query j at partial + j * stride. */
static void attend_chunk(const struct attend *a, int first, int end, float *partial, int64_t stride)
{
    const struct vector_ops *v = a->vector;
    const int dim = a->kv->head_dim;
    const float *scale;
    for (int at = first, n; at < end; at += n) {
        n = run_length(a, at, end);
        const float *keys = read_run(a, at, n, false, &scale);
        fetch_run(a, at + n, end, false);
        for (int j = 0; j < a->group; j++) {
            float *score = a->score + j * CHUNK + at - first;
            v->score_keys(score, a->q + (int64_t)j * dim, keys, n, dim, a->scale);
            if (scale) apply_scales(score, scale, n);
        }
    }
    for (int j = 0; j < a->group; j++) {
        float *part = partial + j * stride;
        part[0] = v->soften(a->score + j * CHUNK, end - first, -INFINITY, &part[1]);
        memset(part + 2, 0, (size_t)dim * sizeof(float));
    }
    for (int at = first, n; at < end; at += n) {
        n = run_length(a, at, end);
        const float *values = read_run(a, at, n, true, &scale);
        fetch_run(a, at + n, end, true);
        for (int j = 0; j < a->group; j++) {
            float *weight = a->score + j * CHUNK + at - first;
            if (scale) apply_scales(weight, scale, n);
            v->add_values(partial + j * stride + 2, weight, values, n, dim);
        }
    }
}

/* Returns the logarithm of the sum that the head's softmax divides by. */
static float merge(const struct vector_ops *v, float *out, const float *partial, int64_t stride, int n_chunks, int dim)
{
    float top = -INFINITY, sum = 0;
    memset(out, 0, (size_t)dim * sizeof(float));
    for (int c = 0; c < n_chunks; c++) top = partial[c * stride] > top ? partial[c * stride] : top;
    for (int c = 0; c < n_chunks; c++) {
        const float *part = partial + c * stride;
        float factor = expf(part[0] - top);
        sum += part[1] * factor;
        v->add_scaled(out, part + 2, factor, dim);
    }
    if (n_chunks) v->scale(out, 1 / sum, dim);
    return top + logf(sum);
}

/* Lists (or whole lanes) of a row. */
static int lists_of(const struct attention_heads *heads, const struct kv_list *list)
{
    return list && list->per_query_head ? heads->n_heads : heads->n_kv_heads;
}

/* The lane of list i of n_lists of a row; -1: the row is padding. */
static int lane_of(const struct seq_batch *batch, const struct kv_view *kv, const struct attention_heads *heads,
                   int sequence, int i, int n_lists)
{
    int slot = batch->slot[sequence], kv_head = i / (n_lists / heads->n_kv_heads);
    return slot < 0 || slot >= kv->n_slots ? -1 : slot * kv->lanes_per_slot + heads->lane + kv_head;
}

/* Entries of list i that are attended to in a lane; *entry is the list, NULL where they are the whole lane. */
static int entries_of(const struct kv_view *kv, int lane, const struct kv_list *list, int i, const int32_t **entry)
{
    bool listed = list && list->count[i] >= 0;
    *entry = listed ? list->entry + (int64_t)i * list->stride : NULL;
    return lane < 0 ? 0 : listed ? list->count[i] : kv->lane_len[lane];
}

static int attend_lanes(struct ops *o, struct tensor out, struct tensor q, float *log_sum,
                        const struct seq_batch *batch, const struct kv_view *kv, const struct attention_heads *heads,
                        const struct kv_list *list)
{
    const int32_t *entry;
    const struct cpu *c = cpu__of(o);
    const int n_lists = lists_of(heads, list), group = heads->n_heads / n_lists, dim = heads->head_dim;
    int longest = 0;
    for (int task = 0; task < batch->n_seqs * n_lists; task++) {
        int lane = lane_of(batch, kv, heads, task / n_lists, task % n_lists, n_lists);
        int length = entries_of(kv, lane, list, task, &entry);
        longest = length > longest ? length : longest;
        if (length > 0 && lane__format(kv, lane) != kv->format)
            FAIL(ERR_ARG, "attention of a decode step: lane %d is stored in format %d, kv.format is %d", lane,
                 (int)lane__format(kv, lane), (int)kv->format);
    }
    struct arena arena;
    struct partials p;
    TRY(cpu__scratch(o, &arena));
    TRY(place(c, &arena, batch->n_seqs, heads->n_heads, longest, dim, &p));
    const int n_lanes = batch->n_seqs * n_lists, n_chunks = (int)p.n_chunks;
#pragma omp parallel num_threads(c->n_threads) private(entry)
    {
        float *score = p.score + (size_t)omp_get_thread_num() * (size_t)heads->n_heads * CHUNK;
        float *wide = p.wide + (size_t)omp_get_thread_num() * WIDENED * (size_t)dim;
#pragma omp for schedule(dynamic, 1)
        for (int task = 0; task < n_lanes * n_chunks; task++) {
            int sequence = task / n_chunks / n_lists, i = task / n_chunks % n_lists, first = task % n_chunks * CHUNK;
            int lane = lane_of(batch, kv, heads, sequence, i, n_lists);
            int length = entries_of(kv, lane, list, task / n_chunks, &entry);
            if (first >= length) continue;
            int64_t head = (int64_t)sequence * heads->n_heads + (int64_t)i * group;
            const struct attend a = {.vector = c->vector,
                                     .kv = kv,
                                     .host = list ? list->host : NULL,
                                     .recent = recent_of(kv, list, lane),
                                     .q = cpu__row(q, sequence) + (int64_t)i * group * dim,
                                     .score = score,
                                     .wide = wide,
                                     .entry = entry,
                                     .format = lane__format(kv, lane),
                                     .lane = lane,
                                     .group = group,
                                     .scale = heads->scale};
            attend_chunk(&a, first, cpu__min(first + CHUNK, length),
                         p.memory + (head * n_chunks + task % n_chunks) * p.stride, n_chunks * p.stride);
        }
#pragma omp for
        for (int task = 0; task < batch->n_seqs * heads->n_heads; task++) {
            int sequence = task / heads->n_heads, head = task % heads->n_heads;
            int lane = lane_of(batch, kv, heads, sequence, head / group, n_lists);
            int used = (entries_of(kv, lane, list, sequence * n_lists + head / group, &entry) + CHUNK - 1) / CHUNK;
            const float log = merge(c->vector, cpu__row(out, sequence) + (int64_t)head * dim,
                                    p.memory + (int64_t)task * n_chunks * p.stride, p.stride, used, dim);
            if (log_sum && used) log_sum[task] = log;
        }
    }
    return OK;
}

int cpu__attention_decode(struct ops *o, struct tensor out, struct tensor q, float *log_sum,
                          const struct seq_batch *batch, const struct kv_view *kv, const struct attention_heads *heads)
{
    return attend_lanes(o, out, q, log_sum, batch, kv, heads, NULL);
}

int cpu__attention_decode_listed(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                                 const struct kv_view *kv, const struct attention_heads *heads,
                                 const struct kv_list *list)
{
    return attend_lanes(o, out, q, NULL, batch, kv, heads, list);
}
