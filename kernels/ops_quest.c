/* The checking wrappers of the ops that pick pages of lanes by bounds of their keys. See ops.c. */
#include "kernels/ops.h"
#include "kernels/ops_check.h"

#define TENSOR(t, dtypes, n_dims, ...) TRY(ops_check__tensor(__func__, #t, t, (dtypes), (n_dims), __VA_ARGS__))
#define POINTER(p) TRY(ops_check__pointer(__func__, #p, (p)))

static int check_bounds(const char *op, const struct ops *o, struct tensor bounds, const struct kv_view *kv)
{
    TRY(ops_check__kv(op, o, kv));
    TRY(ops_check__tensor(op, "bounds", bounds, 1u << o->dtype, 3, kv->n_pages, 2 * (int64_t)kv_picked_pages(kv),
                          kv->head_dim));
    if (!tensor_is_dense(bounds)) FAIL(ERR_ARG, "%s: bounds are strided, expected dense", op);
    return OK;
}

int ops_page_bounds(struct ops *o, struct tensor bounds, const struct kv_view *kv, int slot, int lane, int n_lanes)
{
    TRY(check_bounds(__func__, o, bounds, kv));
    if (slot < 0 || slot >= kv->n_slots || lane < 0 || n_lanes < 0 || n_lanes > kv->lanes_per_slot - lane)
        FAIL(ERR_ARG, "ops_page_bounds: lanes %d .. %d of slot %d; there are %d slots of %d lanes", lane,
             lane + n_lanes, slot, kv->n_slots, kv->lanes_per_slot);
    return n_lanes ? o->vt->page_bounds(o, bounds, kv, slot, lane, n_lanes) : OK;
}

int ops_pick_pages(struct ops *o, struct tensor q, const struct seq_batch *batch, const struct kv_view *kv,
                   const struct attention_heads *heads, const struct page_pick *pick)
{
    POINTER(pick);
    TRY(check_bounds(__func__, o, pick->bounds, kv));
    TRY(ops_check__heads(__func__, kv, heads));
    TRY(ops_check__batch(__func__, kv, batch, true));
    TENSOR(q, 1u << o->dtype, 3, batch->n_seqs, heads->n_heads, heads->head_dim);
    TENSOR(pick->score, IS_F32, 2, (int64_t)batch->n_seqs * heads->n_kv_heads, kv->max_pages, 1);
    if (!tensor_is_dense(pick->score)) FAIL(ERR_ARG, "ops_pick_pages: score is strided, expected dense rows");
    if (!batch->n_seqs) return OK;
    POINTER(pick->limit);
    POINTER(pick->entry);
    POINTER(pick->count);
    if (pick->stride < kv->page_size)
        FAIL(ERR_ARG, "ops_pick_pages: lists of %d entries hold no page of %d", pick->stride, kv->page_size);
    return o->vt->pick_pages(o, q, batch, kv, heads, pick);
}
