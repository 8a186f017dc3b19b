#include "kernels/ops_check.h"

#include <limits.h>
#include <stdio.h>

/* "float32 or float16 [12, *]" into buf. */
static const char *describe_wanted(char *buf, size_t size, unsigned dtypes, int n_dims, const int64_t *dim)
{
    size_t n = 0;
    buf[0] = '\0';
    if (dtypes == IS_ANY) n += (size_t)snprintf(buf, size, "any dtype");
    for (int d = 0; dtypes != IS_ANY && d < DTYPE_N; d++)
        if (dtypes >> d & 1u)
            n += (size_t)snprintf(buf + n, size - n, "%s%s", n ? " or " : "", dtype_name((enum dtype)d));
    for (int i = 0; i < n_dims; i++) {
        if (dim[i] == ANY_SIZE)
            n += (size_t)snprintf(buf + n, size - n, "%s*", i ? ", " : " [");
        else
            n += (size_t)snprintf(buf + n, size - n, "%s%lld", i ? ", " : " [", (long long)dim[i]);
    }
    snprintf(buf + n, size - n, "]");
    return buf;
}

int ops_check__tensor(const char *op, const char *name, struct tensor t, unsigned dtypes, int n_dims, int64_t d0,
                      int64_t d1, int64_t d2)
{
    const int64_t dim[3] = {d0, d1, d2};
    char found[160], wanted[256];
    bool good = (unsigned)t.dtype < DTYPE_N && (dtypes >> t.dtype & 1u) && t.n_dims == n_dims;
    bool empty = false;
    for (int i = 0; good && i < n_dims; i++) {
        good = (dim[i] == ANY_SIZE || t.dim[i] == dim[i]) && t.dim[i] >= 0 && t.dim[i] <= INT_MAX;
        empty = empty || t.dim[i] == 0;
    }
    if (!good)
        FAIL(ERR_ARG, "%s: %s is %s, expected %s", op, name,
             (unsigned)t.dtype < DTYPE_N && t.n_dims >= 0 && t.n_dims <= 4 ? tensor_describe(t, found, sizeof found)
                                                                           : "no valid tensor",
             describe_wanted(wanted, sizeof wanted, dtypes, n_dims, dim));
    if (empty) return OK;
    if (!t.data) FAIL(ERR_ARG, "%s: %s has no data (NULL), expected %s", op, name, tensor_describe(t, found, 160));
    int64_t dense = 1;
    for (int i = n_dims - 1; i > 0; dense *= t.dim[i], i--)
        if (t.dim[i] != 1 && t.stride[i] != dense)
            FAIL(ERR_ARG, "%s: %s (%s) has stride %lld in dimension %d, expected %lld: only rows may be strided", op,
                 name, tensor_describe(t, found, sizeof found), (long long)t.stride[i], i, (long long)dense);
    if (t.dim[0] > 1 && t.stride[0] < dense)
        FAIL(ERR_ARG, "%s: rows of %s (%s) overlap: row stride %lld, expected at least %lld", op, name,
             tensor_describe(t, found, sizeof found), (long long)t.stride[0], (long long)dense);
    return OK;
}

int ops_check__pointer(const char *op, const char *name, const void *pointer)
{
    if (!pointer) FAIL(ERR_ARG, "%s: %s is NULL, expected an array", op, name);
    return OK;
}

int ops_check__kv(const char *op, const struct ops *o, const struct kv_view *kv)
{
    TRY(ops_check__pointer(op, "kv", kv));
    if (kv->page_size < 1 || kv->head_dim < 1 || kv->n_pages < 0 || kv->max_pages < 1 || kv->lanes_per_slot < 1 ||
        kv->n_slots < 1)
        FAIL(ERR_ARG,
             "%s: kv has page_size %d, head_dim %d, n_pages %d, max_pages %d, lanes_per_slot %d, n_slots %d: expected "
             "all of them positive",
             op, kv->page_size, kv->head_dim, kv->n_pages, kv->max_pages, kv->lanes_per_slot, kv->n_slots);
    TRY(ops_check__tensor(op, "kv.pool", kv->pool, 1u << o->dtype, 3, kv->n_pages, 2 * (int64_t)kv->page_size,
                          kv->head_dim));
    if (!tensor_is_dense(kv->pool)) FAIL(ERR_ARG, "%s: kv.pool is strided, expected dense pages", op);
    TRY(ops_check__pointer(op, "kv.page_row", kv->page_row));
    TRY(ops_check__pointer(op, "kv.lane_len", kv->lane_len));
    TRY(ops_check__pointer(op, "kv.free_stack", kv->free_stack));
    TRY(ops_check__pointer(op, "kv.free_count", kv->free_count));
    if ((unsigned)kv->format >= KV_FORMAT_N) FAIL(ERR_ARG, "%s: kv.format is %d", op, (int)kv->format);
    if (kv->format != KV_PLAIN) {
        TRY(ops_check__pointer(op, "kv.scale", kv->scale));
        TRY(ops_check__pointer(op, "kv.lane_format", kv->lane_format));
    }
    return ops_check__pointer(op, "kv.error", kv->error);
}

int ops_check__heads(const char *op, const struct kv_view *kv, const struct attention_heads *heads)
{
    TRY(ops_check__pointer(op, "heads", heads));
    if (heads->n_kv_heads < 1 || heads->n_heads < 1 || heads->n_heads % heads->n_kv_heads != 0)
        FAIL(ERR_ARG, "%s: %d query heads over %d KV heads, expected whole groups", op, heads->n_heads,
             heads->n_kv_heads);
    if (heads->head_dim != kv->head_dim)
        FAIL(ERR_ARG, "%s: heads of %d dimensions, the cache holds %d", op, heads->head_dim, kv->head_dim);
    if (heads->lane < 0 || heads->n_kv_heads > kv->lanes_per_slot - heads->lane)
        FAIL(ERR_ARG, "%s: lanes %d .. %d of a layer, a slot has %d", op, heads->lane, heads->lane + heads->n_kv_heads,
             kv->lanes_per_slot);
    return OK;
}

int ops_check__batch(const char *op, const struct kv_view *kv, const struct seq_batch *batch, bool decode)
{
    TRY(ops_check__pointer(op, "batch", batch));
    if (batch->n_seqs < 0 || batch->n_tokens < 0)
        FAIL(ERR_ARG, "%s: batch of %d sequences and %d tokens", op, batch->n_seqs, batch->n_tokens);
    if (batch->n_seqs > 0) TRY(ops_check__pointer(op, "batch.slot", batch->slot));
    if (decode) {
        if (batch->n_tokens != batch->n_seqs)
            FAIL(ERR_ARG, "%s: batch of %d tokens for %d sequences, expected one a sequence", op, batch->n_tokens,
                 batch->n_seqs);
        return OK;
    }
    TRY(ops_check__pointer(op, "batch.cu_seqlens", batch->cu_seqlens));
    TRY(ops_check__pointer(op, "batch.host_cu_seqlens", batch->host_cu_seqlens));
    TRY(ops_check__pointer(op, "batch.host_slot", batch->host_slot));
    const int32_t *cu = batch->host_cu_seqlens;
    if (cu[0] != 0 || cu[batch->n_seqs] != batch->n_tokens)
        FAIL(ERR_ARG, "%s: batch.host_cu_seqlens runs from %d to %d, expected 0 to %d", op, cu[0], cu[batch->n_seqs],
             batch->n_tokens);
    for (int i = 0; i < batch->n_seqs; i++) {
        if (cu[i + 1] < cu[i])
            FAIL(ERR_ARG, "%s: batch.host_cu_seqlens[%d] = %d is below its predecessor %d", op, i + 1, cu[i + 1],
                 cu[i]);
        if (batch->host_slot[i] >= kv->n_slots)
            FAIL(ERR_ARG, "%s: batch.host_slot[%d] = %d, the cache has %d slots", op, i, batch->host_slot[i],
                 kv->n_slots);
    }
    return OK;
}
