/* The checking wrapper of expected attention. See ops.c. */
#include "kernels/ops.h"
#include "kernels/ops_check.h"

#define TENSOR(t, dtypes, n_dims, ...) TRY(ops_check__tensor(__func__, #t, t, (dtypes), (n_dims), __VA_ARGS__))
#define POINTER(p) TRY(ops_check__pointer(__func__, #p, (p)))

int ops_expected_attention(struct ops *o, struct tensor q, const struct kv_view *kv,
                           const struct attention_heads *heads, const struct expected_attention *expected)
{
    TRY(ops_check__kv(__func__, o, kv));
    TRY(ops_check__heads(__func__, kv, heads));
    POINTER(expected);
    POINTER(expected->score);
    const struct expected_attention *e = expected;
    if (e->slot < 0 || e->slot >= kv->n_slots)
        FAIL(ERR_ARG, "ops_expected_attention: slot %d, the cache has %d", e->slot, kv->n_slots);
    if (e->n_rows < 1 || e->first_position < 0 || e->sinks < 0 || e->sinks - e->first_position >= e->n_rows)
        FAIL(ERR_ARG,
             "ops_expected_attention: %d rows from position %d on of which those before %d do not count: expected at "
             "least one that does",
             e->n_rows, e->first_position, e->sinks);
    if (e->first_position + e->n_rows > (int64_t)kv->max_pages * kv->page_size)
        FAIL(ERR_ARG, "ops_expected_attention: %d keys, a lane holds at most %lld", e->first_position + e->n_rows,
             (long long)kv->max_pages * kv->page_size);
    if (e->future < 1) FAIL(ERR_ARG, "ops_expected_attention: %d future positions, expected at least 1", e->future);
    if (e->inverse_frequency && kv->head_dim % 2)
        FAIL(ERR_ARG, "ops_expected_attention: heads of %d dimensions have no pairs to rotate", kv->head_dim);
    TENSOR(q, 1u << o->dtype, 3, e->n_rows, heads->n_heads, heads->head_dim);
    return o->vt->expected_attention(o, q, kv, heads, expected);
}
