/* Decode attention over lanes in two parts (ops_aged.h): each part's own, joined by the logarithms of their sums. A
 * part that is empty leaves the other's result as it is, bit for bit. */
#include <math.h>

#include "kernels/cpu/cpu.h"

/* What is kept of the two parts: the aged one's output, and both logarithms. */
struct parts {
    float *out;           /* [n_seqs, n_heads, head_dim] */
    float *aged, *recent; /* [n_seqs, n_heads] */
};

static int place(struct arena *arena, int64_t n_seqs, int64_t n_heads, int64_t head_dim, struct parts *p)
{
    const size_t rows = (size_t)(n_seqs * n_heads);
    TRY(arena_take(arena, rows * (size_t)head_dim * sizeof(float), "decode parts", &p->out));
    TRY(arena_take(arena, rows * sizeof(float), "decode parts", &p->aged));
    return arena_take(arena, rows * sizeof(float), "decode parts", &p->recent);
}

/* Behind the scratch of decode attention, which works meanwhile. */
int cpu__aged_measure(const struct cpu *c, const struct ops_limits *limits, struct arena *arena)
{
    struct parts p;
    if (!limits->aged) return OK;
    TRY(cpu__decode_measure(c, limits, arena));
    return place(arena, limits->max_seqs, limits->max_heads, limits->head_dim, &p);
}

/* One head's two results into the one over both, in `out`. */
static void join(const struct vector_ops *v, float *out, const float *aged, float log_out, float log_aged, int dim)
{
    const float top = log_out > log_aged ? log_out : log_aged;
    const float mine = expf(log_out - top), others = expf(log_aged - top);
    v->scale(out, mine / (mine + others), dim);
    v->add_scaled(out, aged, others / (mine + others), dim);
}

int cpu__attention_decode_aged(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                               const struct kv_view *kv, const struct kv_view *aged,
                               const struct attention_heads *heads)
{
    const struct cpu *c = cpu__of(o);
    const int n_heads = heads->n_heads, group = n_heads / heads->n_kv_heads, dim = heads->head_dim;
    struct arena arena;
    struct parts p;
    if (!c->limits.aged || batch->n_seqs > c->limits.max_seqs || n_heads > c->limits.max_heads)
        FAIL(ERR_BUG, "ops_attention_decode_aged: %d sequences of %d heads, more than ops_reserve was told",
             batch->n_seqs, n_heads);
    TRY(cpu__scratch(o, &arena));
    TRY(cpu__decode_measure(c, &c->limits, &arena));
    TRY(place(&arena, batch->n_seqs, n_heads, dim, &p));
    const struct tensor other = tensor_3d(p.out, DTYPE_F32, batch->n_seqs, n_heads, dim);
    TRY(cpu__attention_decode(o, other, q, p.aged, batch, aged, heads));
    TRY(cpu__attention_decode(o, out, q, p.recent, batch, kv, heads));
#pragma omp parallel for num_threads(c->n_threads)
    for (int i = 0; i < batch->n_seqs * n_heads; i++) {
        const int row = i / n_heads, head = i % n_heads, slot = batch->slot[row];
        if (slot < 0 || slot >= kv->n_slots) continue;
        const int lane = slot * kv->lanes_per_slot + heads->lane + head / group;
        float *to = cpu__row(out, row) + (int64_t)head * dim;
        const float *from = p.out + (int64_t)i * dim;
        if (aged->lane_len[lane] > 0)
            join(c->vector, to, from, kv->lane_len[lane] > 0 ? p.recent[i] : -INFINITY, p.aged[i], dim);
    }
    return OK;
}
