/* The checking wrappers of the ops with which a policy lets rows leave: exact sums of scores, and the rows that stay.
 * See ops.c. */
#include "kernels/ops.h"
#include "kernels/ops_check.h"

#define TENSOR(t, dtypes, n_dims, ...) TRY(ops_check__tensor(__func__, #t, t, (dtypes), (n_dims), __VA_ARGS__))
#define POINTER(p) TRY(ops_check__pointer(__func__, #p, (p)))

int ops_sum_fixed(struct ops *o, int64_t *sum, struct tensor x, double scale)
{
    TENSOR(x, IS_F32, 2, ANY_SIZE, ANY_SIZE, 1);
    if (x.dim[1] == 0) return OK;
    POINTER(sum);
    return o->vt->sum_fixed(o, sum, x, scale);
}

static int check_choice(const struct row_choice *c, int i)
{
    if (c->first_row < 0 || c->n_rows < 0 || c->first < 0 || c->n_competing < 0 || c->first > c->n_rows ||
        c->n_competing > c->n_rows - c->first || c->first_score < 0)
        FAIL(ERR_ARG, "ops_select_rows: choice %d: rows %d .. %d of %d from %d on compete, scores from %lld", i,
             c->first, c->first + c->n_competing, c->n_rows, c->first_row, (long long)c->first_score);
    if (c->keep < 0 || c->keep > c->n_competing)
        FAIL(ERR_ARG, "ops_select_rows: choice %d keeps %d of %d rows", i, c->keep, c->n_competing);
    return OK;
}

int ops_select_rows(struct ops *o, int32_t *index, const int64_t *score, const struct row_choice *choice, int n_choices)
{
    bool reads = false;
    if (n_choices <= 0) return OK;
    POINTER(index);
    POINTER(choice);
    for (int i = 0; i < n_choices; i++) {
        TRY(check_choice(&choice[i], i));
        reads |= choice[i].keep < choice[i].n_competing;
    }
    if (reads) POINTER(score);
    return o->vt->select_rows(o, index, score, choice, n_choices);
}

int ops_judge_columns(struct ops *o, struct tensor q, const float *log_sum, const struct seq_batch *batch,
                      const struct kv_view *kv, const struct attention_heads *heads, const struct decode_judges *judges)
{
    TRY(ops_check__kv(__func__, o, kv));
    TRY(ops_check__heads(__func__, kv, heads));
    TRY(ops_check__batch(__func__, kv, batch, true));
    TENSOR(q, 1u << o->dtype, 3, batch->n_seqs, heads->n_heads, heads->head_dim);
    POINTER(log_sum);
    POINTER(judges);
    POINTER(judges->progress);
    POINTER(judges->block);
    POINTER(judges->sum);
    if (judges->max_blocks < 1 || judges->block_tokens < 1 || judges->ring_blocks < 1 ||
        judges->block_stride < judges->block_tokens || judges->slot_stride < judges->block_stride * judges->ring_blocks)
        FAIL(ERR_ARG, "ops_judge_columns: %d blocks of %d tokens in rings of %d, strides %lld and %lld",
             judges->max_blocks, judges->block_tokens, judges->ring_blocks, (long long)judges->block_stride,
             (long long)judges->slot_stride);
    return batch->n_seqs && heads->n_heads ? o->vt->judge_columns(o, q, log_sum, batch, kv, heads, judges) : OK;
}

int ops_kv_drop(struct ops *o, const struct kv_view *kv, int slot, const int32_t *index, const struct kv_drop *drop,
                int n_drops)
{
    TRY(ops_check__kv(__func__, o, kv));
    if (slot < 0 || slot >= kv->n_slots) FAIL(ERR_ARG, "ops_kv_drop: slot is %d, the cache has %d", slot, kv->n_slots);
    if (n_drops <= 0) return OK;
    POINTER(index);
    POINTER(drop);
    for (int i = 0; i < n_drops; i++) {
        const struct kv_drop *d = &drop[i];
        if (d->lane < 0 || d->n_lanes < 0 || d->n_lanes > kv->lanes_per_slot - d->lane)
            FAIL(ERR_ARG, "ops_kv_drop: drop %d has lanes %d .. %d of %d", i, d->lane, d->lane + d->n_lanes,
                 kv->lanes_per_slot);
        if (d->first < 0 || d->n_keep < 0 || d->n_keep > d->n_block || d->first_index < 0)
            FAIL(ERR_ARG, "ops_kv_drop: drop %d keeps %d of %d entries from %d on, listed from %d on", i, d->n_keep,
                 d->n_block, d->first, d->first_index);
    }
    return o->vt->kv_drop(o, kv, slot, index, drop, n_drops);
}
