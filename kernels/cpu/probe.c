/* Statistics of the prompt's attention, for policies: weighted column sums of the probabilities, and how many entries
 * of each head reach a share of their row's maximum.
 *
 * A task is one query head. It holds the logits of ROWS query rows at a time, never of all; the columns of the heads
 * of a group are added in head order afterwards. */
#include <cblas.h>
#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/lane.h"

enum { ROWS = 32, KEYS = 256 };

struct scratch {
    float *score;  /* per thread [ROWS, n_keys] */
    float *k;      /* per thread [KEYS, head_dim] */
    float *column; /* [n_heads, n_keys] */
};

static int place(const struct cpu *c, struct arena *arena, int64_t n_heads, int64_t head_dim, int64_t n_keys,
                 struct scratch *s)
{
    const size_t threads = (size_t)c->n_threads;
    TRY(arena_take(arena, threads * ROWS * (size_t)n_keys * sizeof(float), "probe scores", &s->score));
    TRY(arena_take(arena, threads * KEYS * (size_t)head_dim * sizeof(float), "probe keys", &s->k));
    return arena_take(arena, (size_t)(n_heads * n_keys) * sizeof(float), "probe columns", &s->column);
}

int cpu__probe_measure(const struct cpu *c, const struct ops_limits *limits, struct arena *arena)
{
    struct scratch s;
    return place(c, arena, limits->max_heads, limits->head_dim, limits->max_context, &s);
}

/* One row's logits: adds weight * probability to the columns; returns the entries at or above max + cut. */
static int64_t take_row(const struct vector_ops *v, float *score, int n, float weight, float cut, float *column)
{
    float sum, top = v->maximum(score, n);
    int64_t kept = cut < INFINITY ? v->count_from(score, n, top + cut) : 0;
    (void)v->soften(score, n, top, &sum);
    v->add_scaled(column, score, weight / sum, n);
    return kept;
}

static int64_t probe_head(const struct vector_ops *v, const float *q, int64_t q_stride, const struct kv_view *kv,
                          int lane, float scale, const struct attention_probe *probe, float *score, float *k,
                          float *column)
{
    const int n_keys = probe->first_position + probe->n_rows, dim = kv->head_dim;
    const float cut = probe->threshold > 0 ? logf(probe->threshold) : INFINITY;
    int64_t kept = 0;
    memset(column, 0, (size_t)n_keys * sizeof(float));
    for (int first = 0; first < probe->n_rows; first += ROWS) {
        int n = cpu__min(ROWS, probe->n_rows - first), visible = probe->first_position + first + n;
        for (int at = 0; at < visible; at += KEYS) {
            int width = cpu__min(KEYS, visible - at);
            lane__gather(kv, lane, at, width, k, NULL);
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, n, width, dim, scale, q + first * q_stride,
                        (int)q_stride, k, dim, 0.0f, score + at, n_keys);
        }
        for (int i = 0; i < n; i++) {
            float weight = probe->row_weight ? probe->row_weight[first + i] : 1.0f;
            kept +=
                take_row(v, score + (int64_t)i * n_keys, probe->first_position + first + i + 1, weight, cut, column);
        }
    }
    return kept;
}

int cpu__attention_probe(struct ops *o, struct tensor q, const struct kv_view *kv, const struct attention_heads *heads,
                         const struct attention_probe *probe)
{
    const struct cpu *c = cpu__of(o);
    const int n_keys = probe->first_position + probe->n_rows, group = heads->n_heads / heads->n_kv_heads;
    const int first_lane = probe->slot * kv->lanes_per_slot + heads->lane;
    for (int h = 0; h < heads->n_kv_heads; h++)
        if (kv->lane_len[first_lane + h] < n_keys)
            FAIL(ERR_ARG, "ops_attention_probe: KV head %d holds %d tokens, expected the whole prompt of %d", h,
                 kv->lane_len[first_lane + h], n_keys);
    struct arena arena;
    struct scratch s;
    TRY(cpu__scratch(o, &arena));
    TRY(place(c, &arena, heads->n_heads, heads->head_dim, n_keys, &s));
    if (probe->per_head) s.column = probe->column_sum;
#pragma omp parallel for num_threads(c->n_threads) schedule(dynamic, 1)
    for (int h = 0; h < heads->n_heads; h++) {
        const size_t thread = (size_t)omp_get_thread_num();
        int64_t kept = probe_head(c->vector, cpu__row(q, 0) + (int64_t)h * heads->head_dim, q.stride[0], kv,
                                  first_lane + h / group, heads->scale, probe, s.score + thread * ROWS * (size_t)n_keys,
                                  s.k + thread * KEYS * (size_t)heads->head_dim, s.column + (int64_t)h * n_keys);
        if (probe->kept) probe->kept[h] = kept;
    }
    if (probe->per_head) return OK;
#pragma omp parallel for num_threads(c->n_threads) if ((int64_t)heads->n_heads * n_keys > CPU_PARALLEL_WORK)
    for (int g = 0; g < heads->n_kv_heads; g++) {
        float *sum = probe->column_sum + (int64_t)g * n_keys;
        memset(sum, 0, (size_t)n_keys * sizeof(float));
        for (int h = g * group; h < (g + 1) * group; h++)
            c->vector->add_scaled(sum, s.column + (int64_t)h * n_keys, 1, n_keys);
    }
    return OK;
}
