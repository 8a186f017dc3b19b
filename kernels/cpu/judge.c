/* Rows of decode steps as judges of generated tokens: their attention to each, added up in integers. A task is one
 * query head of one row, which reads the keys of the tokens that it judges and no others: what its softmax divides by
 * is known from attention itself. Integers may be added in any order. */
#include <math.h>
#include <omp.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/lane.h"

enum { KEYS = 32 /* logits at once */ };

/* Weight of step t's row for a block, over the number of rows; 0: it is none of them. */
static float weight_of(const struct decode_judges *judges, const int32_t *block, int t)
{
    const int rows = block[1], age = block[0] - t;
    if (age < 0 || age >= rows) return 0;
    const float part = rows > 1 ? (float)(rows - 1 - age) / (float)(rows - 1) : 0;
    return (1 + (judges->newest - 1) * part) / (float)rows;
}

/* One query head over one lane. */
struct judge {
    const struct vector_ops *vector;
    const struct kv_view *kv;
    const float *q; /* [head_dim] */
    float *wide;    /* [KEYS, head_dim] for those of a lane in 8 bits */
    enum kv_format format;
    int lane;
    float scale, log_sum;
};

/* Logits of n entries, at most KEYS, that lie one after the other in a page. */
static void score_entries(const struct judge *j, float *score, int entry, int n)
{
    const int dim = j->kv->head_dim;
    if (j->format == KV_PLAIN) {
        j->vector->score_keys(score, j->q, lane__key(j->kv, j->lane, entry), n, dim, j->scale);
        return;
    }
    const float *scale = lane__key_scale(j->kv, j->lane, entry);
    j->vector->widen_codes(j->wide, lane__key_codes(j->kv, j->lane, entry), j->format == KV_FP8, (int64_t)n * dim);
    j->vector->score_keys(score, j->q, j->wide, n, dim, j->scale);
    for (int i = 0; i < n; i++) score[i] *= scale[i];
}

/* Adds the attention to n entries of the lane, times the row's weight, to their sums. */
static void judge_entries(const struct judge *j, int entry, int n, float weight, int64_t *sum)
{
    const int tokens = kv_page_tokens(j->kv, j->format);
    float score[KEYS];
    for (int done = 0, run; done < n; done += run) {
        const int at = entry + done, page_rest = tokens - at % tokens;
        run = cpu__min(cpu__min(page_rest, n - done), KEYS);
        score_entries(j, score, at, run);
        for (int i = 0; i < run; i++) {
            const float part = weight * expf(score[i] - j->log_sum);
            const int64_t fixed = part == part ? (int64_t)rint((double)part * 0x1p40) : 0;
#pragma omp atomic
            sum[done + i] += fixed;
        }
    }
}

static void judge_head(const struct judge *j, int slot, bool first_head, const struct decode_judges *judges)
{
    const int32_t *progress = judges->progress + 2 * slot;
    const int t = progress[0], tokens = judges->block_tokens, newest = (t + 1) / tokens;
    const int before = j->kv->lane_len[j->lane] - 2 - t; /* entries before token 0 */
    int64_t *of_slot = judges->sum + slot * judges->slot_stride;
    if (first_head && newest < judges->max_blocks) /* no other task comes here */
        of_slot[newest % judges->ring_blocks * judges->block_stride + (t + 1) % tokens] = 0;
    for (int b = progress[1]; b <= t / tokens && b < judges->max_blocks; b++) {
        const float weight = weight_of(judges, judges->block + 2 * ((int64_t)slot * judges->max_blocks + b), t);
        const int end = cpu__min((b + 1) * tokens, t + 1), first = b * tokens + before < 0 ? -before : b * tokens;
        int64_t *sum = of_slot + b % judges->ring_blocks * judges->block_stride;
        if (weight > 0) judge_entries(j, first + before, end - first, weight, sum + (first - b * tokens));
    }
}

int cpu__judge_columns(struct ops *o, struct tensor q, const float *log_sum, const struct seq_batch *batch,
                       const struct kv_view *kv, const struct attention_heads *heads,
                       const struct decode_judges *judges)
{
    const struct cpu *c = cpu__of(o);
    const int group = heads->n_heads / heads->n_kv_heads, room = KEYS * kv->head_dim;
    struct arena arena;
    float *wide; /* as large as the room that attention takes for the same */
    TRY(cpu__scratch(o, &arena));
    TRY(arena_take(&arena, (size_t)c->n_threads * (size_t)room * sizeof *wide, "judged keys", &wide));
#pragma omp parallel for num_threads(c->n_threads) schedule(dynamic, 1) collapse(2)
    for (int i = 0; i < batch->n_seqs; i++)
        for (int h = 0; h < heads->n_heads; h++) {
            const int slot = batch->slot[i];
            if (slot < 0 || judges->progress[2 * slot] < 0) continue;
            const int lane = slot * kv->lanes_per_slot + heads->lane + h / group;
            const struct judge judge = {.vector = c->vector,
                                        .kv = kv,
                                        .q = cpu__row(q, i) + (int64_t)h * heads->head_dim,
                                        .wide = wide + (int64_t)omp_get_thread_num() * room,
                                        .format = lane__format(kv, lane),
                                        .lane = lane,
                                        .scale = heads->scale,
                                        .log_sum = log_sum[(int64_t)i * heads->n_heads + h]};
            judge_head(&judge, slot, h == 0, judges);
        }
    return OK;
}
