/* The checking wrappers of the ops that policies work with: on scores, and on parts of lanes. See ops.c. */
#include "kernels/ops.h"
#include "kernels/ops_check.h"

#define TENSOR(t, dtypes, n_dims, ...) TRY(ops_check__tensor(__func__, #t, t, (dtypes), (n_dims), __VA_ARGS__))
#define POINTER(p) TRY(ops_check__pointer(__func__, #p, (p)))

int ops_split_budgets(struct ops *o, int32_t *count, struct tensor score, const struct budget_group *group,
                      int n_groups)
{
    TENSOR(score, IS_F32, 2, ANY_SIZE, ANY_SIZE, 1);
    if (n_groups <= 0) return OK;
    POINTER(count);
    POINTER(group);
    for (int i = 0; i < n_groups; i++) {
        const struct budget_group *g = &group[i];
        if (g->first_row < 0 || g->n_rows < 1 || g->n_rows > score.dim[0] - g->first_row || g->n_columns < 0 ||
            g->n_columns > score.dim[1])
            FAIL(ERR_ARG, "ops_split_budgets: group %d has rows %d .. %d and %d columns of [%lld, %lld]", i,
                 g->first_row, g->first_row + g->n_rows, g->n_columns, (long long)score.dim[0],
                 (long long)score.dim[1]);
        if (g->own < 0 || (int64_t)g->n_rows * g->own > g->total || g->total > (int64_t)g->n_rows * g->n_columns)
            FAIL(ERR_ARG, "ops_split_budgets: group %d shares %d entries, %d of each of %d rows of %d columns first", i,
                 g->total, g->own, g->n_rows, g->n_columns);
    }
    return o->vt->split_budgets(o, count, score, group, n_groups);
}

int ops_average_pool(struct ops *o, struct tensor y, struct tensor x, int width)
{
    TENSOR(x, IS_F32, 2, ANY_SIZE, ANY_SIZE, 1);
    TENSOR(y, IS_F32, 2, x.dim[0], x.dim[1], 1);
    if (width < 1 || width % 2 == 0)
        FAIL(ERR_ARG, "ops_average_pool: width is %d, expected an odd number from 1 on", width);
    return tensor_count(x) ? o->vt->average_pool(o, y, x, width) : OK;
}

int ops_attention_decode_listed(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                                const struct kv_view *kv, const struct attention_heads *heads,
                                const struct kv_list *list)
{
    TRY(ops_check__kv(__func__, o, kv));
    TRY(ops_check__heads(__func__, kv, heads));
    TRY(ops_check__batch(__func__, kv, batch, true));
    TENSOR(q, 1u << o->dtype, 3, batch->n_seqs, heads->n_heads, heads->head_dim);
    TENSOR(out, 1u << o->dtype, 3, batch->n_seqs, heads->n_heads, heads->head_dim);
    POINTER(list);
    if (!batch->n_seqs) return OK;
    POINTER(list->entry);
    POINTER(list->count);
    if (list->stride < 1) FAIL(ERR_ARG, "ops_attention_decode_listed: lists of %d entries", list->stride);
    if (list->host) TRY(ops_check__host(__func__, o, kv, list->host));
    if (list->recent) TRY(ops_check__recent(__func__, o, kv, list->recent));
    return o->vt->attention_decode_listed(o, out, q, batch, kv, heads, list);
}

static int check_heavy(const char *op, const struct heavy_hitters *heavy)
{
    TRY(ops_check__pointer(op, "heavy", heavy));
    TRY(ops_check__pointer(op, "heavy.score", heavy->score));
    TRY(ops_check__pointer(op, "heavy.position", heavy->position));
    TRY(ops_check__pointer(op, "heavy.limit", heavy->limit));
    TRY(ops_check__pointer(op, "heavy.recent", heavy->recent));
    if (heavy->stride < 1) FAIL(ERR_ARG, "%s: heavy.stride is %d, expected at least 1", op, heavy->stride);
    return OK;
}

int ops_heavy_begin(struct ops *o, const struct kv_view *kv, const struct heavy_hitters *heavy, int slot,
                    struct tensor score, const int32_t *index, int index_stride)
{
    TRY(ops_check__kv(__func__, o, kv));
    TRY(check_heavy(__func__, heavy));
    if (slot < 0 || slot >= kv->n_slots) FAIL(ERR_ARG, "ops_heavy_begin: slot %d, the cache has %d", slot, kv->n_slots);
    TENSOR(score, IS_F32, 2, kv->lanes_per_slot, ANY_SIZE, 1);
    POINTER(index);
    return o->vt->heavy_begin(o, kv, heavy, slot, score, index, index_stride);
}

int ops_heavy_decode(struct ops *o, struct tensor q, const int32_t *position, const struct seq_batch *batch,
                     const struct kv_view *kv, const struct attention_heads *heads, const struct heavy_hitters *heavy)
{
    TRY(ops_check__kv(__func__, o, kv));
    TRY(ops_check__heads(__func__, kv, heads));
    TRY(ops_check__batch(__func__, kv, batch, true));
    TRY(check_heavy(__func__, heavy));
    TENSOR(q, 1u << o->dtype, 3, batch->n_seqs, heads->n_heads, heads->head_dim);
    if (!batch->n_seqs) return OK;
    POINTER(position);
    return o->vt->heavy_decode(o, q, position, batch, kv, heads, heavy);
}
