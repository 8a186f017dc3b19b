/* The checking wrappers of lanes in two parts (ops_aged.h). */
#include "kernels/ops_aged.h"

#include "kernels/ops_check.h"

/* The two views are parts of one cache. */
static int check_parts(const char *op, const struct ops *o, const struct kv_view *kv, const struct kv_view *aged)
{
    TRY(ops_check__kv(op, o, kv));
    TRY(ops_check__kv(op, o, aged));
    if (kv->format != KV_PLAIN || aged->format == KV_PLAIN)
        FAIL(ERR_ARG, "%s: kv.format is %d, aged.format is %d: expected plain lanes and 8-bit ones", op,
             (int)kv->format, (int)aged->format);
    if (aged->pool.data != kv->pool.data || aged->n_pages != kv->n_pages || aged->page_size != kv->page_size ||
        aged->head_dim != kv->head_dim || aged->max_pages != kv->max_pages ||
        aged->lanes_per_slot != kv->lanes_per_slot || aged->n_slots != kv->n_slots ||
        aged->free_stack != kv->free_stack || aged->free_count != kv->free_count || aged->error != kv->error)
        FAIL(ERR_ARG, "%s: kv and aged have different pages or lanes, expected two views of one cache", op);
    if (aged->page_row == kv->page_row || aged->lane_len == kv->lane_len || aged->lane_format == kv->lane_format)
        FAIL(ERR_ARG, "%s: kv and aged share their lanes, expected tables of their own", op);
    return OK;
}

int ops_kv_age(struct ops *o, const struct kv_view *kv, const struct kv_view *aged, int slot, int sinks, int window)
{
    TRY(check_parts(__func__, o, kv, aged));
    if (slot < 0 || slot >= kv->n_slots) FAIL(ERR_ARG, "ops_kv_age: slot %d, the cache has %d", slot, kv->n_slots);
    if (sinks < 0 || window < 0 || sinks > INT32_MAX - kv->page_size - window)
        FAIL(ERR_ARG, "ops_kv_age: %d first and %d newest entries stay plain, expected counts", sinks, window);
    return o->vt->kv_age(o, kv, aged, slot, sinks, window);
}

int ops_decode_begin_aged(struct ops *o, const struct seq_batch *batch, const struct kv_view *kv,
                          const struct kv_view *aged)
{
    TRY(check_parts(__func__, o, kv, aged));
    TRY(ops_check__batch(__func__, kv, batch, true));
    return batch->n_seqs ? o->vt->decode_begin(o, batch, kv, aged) : OK;
}

int ops_attention_decode_aged(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                              const struct kv_view *kv, const struct kv_view *aged, const struct attention_heads *heads)
{
    TRY(check_parts(__func__, o, kv, aged));
    TRY(ops_check__heads(__func__, kv, heads));
    TRY(ops_check__batch(__func__, kv, batch, true));
    TRY(ops_check__tensor(__func__, "q", q, 1u << o->dtype, 3, batch->n_seqs, heads->n_heads, heads->head_dim));
    TRY(ops_check__tensor(__func__, "out", out, 1u << o->dtype, 3, batch->n_seqs, heads->n_heads, heads->head_dim));
    return batch->n_seqs ? o->vt->attention_decode_aged(o, out, q, batch, kv, aged, heads) : OK;
}
