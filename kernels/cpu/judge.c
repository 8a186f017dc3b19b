/* Rows of decode steps as judges of generated tokens: their attention to each, added up in integers. A task is one
 * query head of one row; integers may be added in any order. */
#include <cblas.h>
#include <math.h>
#include <omp.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/lane.h"

enum { KEYS = 256 };

struct scratch {
    float *score; /* per thread [max_context] */
    float *k;     /* per thread [KEYS, head_dim] */
};

static int place(const struct cpu *c, struct arena *arena, int64_t head_dim, int64_t n_keys, struct scratch *s)
{
    const size_t threads = (size_t)c->n_threads;
    TRY(arena_take(arena, threads * (size_t)n_keys * sizeof(float), "judge scores", &s->score));
    return arena_take(arena, threads * KEYS * (size_t)head_dim * sizeof(float), "judge keys", &s->k);
}

int cpu__judge_measure(const struct cpu *c, const struct ops_limits *limits, struct arena *arena)
{
    struct scratch s;
    return place(c, arena, limits->head_dim, limits->max_context + 1, &s);
}

/* Weight of step t's row for a block, over the number of rows; 0: it is none of them. */
static float weight_of(const struct decode_judges *judges, const int32_t *block, int t)
{
    const int rows = block[1], age = block[0] - t;
    if (age < 0 || age >= rows) return 0;
    const float part = rows > 1 ? (float)(rows - 1 - age) / (float)(rows - 1) : 0;
    return (1 + (judges->newest - 1) * part) / (float)rows;
}

/* Logits of a query over a whole lane; returns what its probabilities divide by, after *top is subtracted. */
static float lane_logits(const float *q, const struct kv_view *kv, int lane, float scale, float *score, float *k,
                         float *top)
{
    const int n = kv->lane_len[lane], dim = kv->head_dim;
    float most = -INFINITY, sum = 0;
    for (int at = 0; at < n; at += KEYS) {
        const int width = cpu__min(KEYS, n - at);
        lane__gather(kv, lane, at, width, k, NULL);
        cblas_sgemv(CblasRowMajor, CblasNoTrans, width, dim, scale, k, dim, q, 1, 0.0f, score + at, 1);
    }
    for (int i = 0; i < n; i++) most = score[i] > most ? score[i] : most;
    for (int i = 0; i < n; i++) sum += expf(score[i] - most);
    *top = most;
    return sum;
}

static void judge_head(const float *q, int slot, const struct kv_view *kv, int lane, float scale, bool first_head,
                       const struct decode_judges *judges, float *score, float *k)
{
    const int32_t *progress = judges->progress + 2 * slot;
    const int t = progress[0], n = kv->lane_len[lane], tokens = judges->block_tokens;
    float top, sum = lane_logits(q, kv, lane, scale, score, k, &top);
    int64_t *of_slot = judges->sum + slot * judges->slot_stride;
    for (int g = progress[1] * tokens; g <= t + 1; g++) {
        const int b = g / tokens, entry = n - 2 - t + g;
        if (entry < 0 || b >= judges->max_blocks) continue;
        int64_t *to = of_slot + b % judges->ring_blocks * judges->block_stride + g % tokens;
        if (g == t + 1) {
            if (first_head) *to = 0; /* no other task comes here */
            continue;
        }
        const float weight = weight_of(judges, judges->block + 2 * ((int64_t)slot * judges->max_blocks + b), t);
        if (!(weight > 0)) continue;
        const float part = weight * (expf(score[entry] - top) / sum);
        const int64_t fixed = part == part ? (int64_t)rint((double)part * 0x1p40) : 0;
#pragma omp atomic
        *to += fixed;
    }
}

static int longest_lane(const struct seq_batch *batch, const struct kv_view *kv, const struct attention_heads *heads)
{
    int most = 0;
    for (int i = 0; i < batch->n_seqs; i++) {
        const int32_t *length = kv->lane_len + (int64_t)batch->slot[i] * kv->lanes_per_slot + heads->lane;
        for (int h = 0; h < heads->n_kv_heads && batch->slot[i] >= 0; h++) most = length[h] > most ? length[h] : most;
    }
    return most;
}

int cpu__judge_columns(struct ops *o, struct tensor q, const struct seq_batch *batch, const struct kv_view *kv,
                       const struct attention_heads *heads, const struct decode_judges *judges)
{
    const struct cpu *c = cpu__of(o);
    const int group = heads->n_heads / heads->n_kv_heads, n_keys = longest_lane(batch, kv, heads);
    struct arena arena;
    struct scratch s;
    TRY(cpu__scratch(o, &arena));
    TRY(place(c, &arena, heads->head_dim, n_keys, &s));
#pragma omp parallel for num_threads(c->n_threads) schedule(dynamic, 1) collapse(2)
    for (int i = 0; i < batch->n_seqs; i++)
        for (int h = 0; h < heads->n_heads; h++) {
            const size_t thread = (size_t)omp_get_thread_num();
            const int slot = batch->slot[i];
            if (slot < 0 || judges->progress[2 * slot] < 0) continue;
            judge_head(cpu__row(q, i) + (int64_t)h * heads->head_dim, slot, kv,
                       slot * kv->lanes_per_slot + heads->lane + h / group, heads->scale, h == 0, judges,
                       s.score + thread * (size_t)n_keys, s.k + thread * KEYS * (size_t)heads->head_dim);
        }
    return OK;
}
