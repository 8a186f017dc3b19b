/* H2O's decode step: scores of a lane's entries grow by the attention that each new row pays them, and the least goes
 * when the lane is full. */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/lane.h"

/* A KV head's lane and its account. */
struct account {
    const struct kv_view *kv;
    float *score;
    int32_t *position;
    int lane, limit, recent;
    enum kv_format format;
};

static struct account account_of(const struct kv_view *kv, const struct heavy_hitters *heavy, int lane)
{
    int64_t first = (int64_t)lane * heavy->stride;
    return (struct account){kv,
                            heavy->score + first,
                            heavy->position + first,
                            lane,
                            heavy->limit[lane],
                            heavy->recent[lane],
                            lane__format(kv, lane)};
}

int cpu__heavy_begin(struct ops *o, const struct kv_view *kv, const struct heavy_hitters *heavy, int slot,
                     struct tensor score, const int32_t *index, int index_stride)
{
    (void)o;
    for (int i = 0; i < kv->lanes_per_slot; i++) {
        struct account a = account_of(kv, heavy, slot * kv->lanes_per_slot + i);
        const int32_t *entry = index + (int64_t)i * index_stride;
        for (int j = 0; j < a.limit; j++) {
            a.score[j] = cpu__row(score, i)[entry[j]];
            a.position[j] = entry[j];
        }
    }
    return OK;
}

/* An entry's logit; its codes are widened into wide [head_dim]. */
static float logit_of(const struct vector_ops *v, const struct account *a, int i, const float *q, float scale,
                      float *wide)
{
    const struct kv_view *kv = a->kv;
    float score;
    if (a->format == KV_PLAIN) {
        v->score_keys(&score, q, lane__key(kv, a->lane, i), 1, kv->head_dim, scale);
        return score;
    }
    v->widen_codes(wide, lane__key_codes(kv, a->lane, i), a->format == KV_FP8, kv->head_dim);
    v->score_keys(&score, q, wide, 1, kv->head_dim, scale);
    return score * *lane__key_scale(kv, a->lane, i);
}

/* Adds a query head's attention to the scores; the keys are visited twice, so that nothing has to be stored. */
static void add_attention(const struct vector_ops *v, const struct account *a, const float *q, float scale, float *wide)
{
    int n = a->kv->lane_len[a->lane];
    float top = -INFINITY, sum = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < n; i++) {
            const float score = logit_of(v, a, i, q, scale, wide);
            if (pass) {
                a->score[i] += expf(score - top) / sum;
            } else if (score > top) {
                sum = sum * expf(top - score) + 1;
                top = score;
            } else {
                sum += expf(score - top);
            }
        }
}

/* The entry that goes: the least score outside the newest ones, of equal ones the latest. */
static int worst_of(const struct account *a, int n, int newest)
{
    int worst = -1;
    for (int i = 0; i < n; i++) {
        if (a->position[i] > newest - a->recent) continue;
        if (worst < 0 || a->score[i] < a->score[worst] ||
            (a->score[i] == a->score[worst] && a->position[i] > a->position[worst]))
            worst = i;
    }
    return worst;
}

/* The lane's last entry takes the place of entry i. */
static void drop(const struct account *a, int i, int last)
{
    if (i == last) return;
    lane__move(a->kv, a->lane, i, last);
    a->score[i] = a->score[last];
    a->position[i] = a->position[last];
}

int cpu__heavy_decode(struct ops *o, struct tensor q, const int32_t *position, const struct seq_batch *batch,
                      const struct kv_view *kv, const struct attention_heads *heads, const struct heavy_hitters *heavy)
{
    const int group = heads->n_heads / heads->n_kv_heads;
    struct arena arena;
    float *wide; /* of the room that attention takes for more of them */
    TRY(cpu__scratch(o, &arena));
    TRY(arena_take(&arena, (size_t)kv->head_dim * sizeof *wide, "a key", &wide));
    for (int task = 0; task < batch->n_seqs * heads->n_kv_heads; task++) {
        int row = task / heads->n_kv_heads, head = task % heads->n_kv_heads, slot = batch->slot[row];
        if (slot < 0 || slot >= kv->n_slots) continue;
        struct account a = account_of(kv, heavy, slot * kv->lanes_per_slot + heads->lane + head);
        int n = kv->lane_len[a.lane];
        if (a.limit <= 0 || n > heavy->stride) continue;
        a.score[n - 1] = 0;
        a.position[n - 1] = position[row];
        for (int j = 0; j < group; j++)
            add_attention(cpu__of(o)->vector, &a, cpu__row(q, row) + (int64_t)(head * group + j) * heads->head_dim,
                          heads->scale, wide);
        for (int worst; n > a.limit && (worst = worst_of(&a, n, position[row])) >= 0; n--) drop(&a, worst, n - 1);
        for (int page = lane__pages_of(kv, a.lane, kv->lane_len[a.lane]) - 1; page >= lane__pages_of(kv, a.lane, n);
             page--)
            kv->free_stack[(*kv->free_count)++] = lane__page_row(kv, a.lane)[page];
        kv->lane_len[a.lane] = n;
    }
    return OK;
}
