/* ops_check - what the checking wrappers of ops.c share: one tensor, pointer, cache view or batch against what an op
 * expects. Messages name op, argument, expected and found. Private to kernels/ops.c. */
#ifndef VITRAIL_KERNELS_OPS_CHECK_H
#define VITRAIL_KERNELS_OPS_CHECK_H

#include "kernels/ops.h"

/* A dimension that may have any size, and sets of dtypes as bits. */
enum { ANY_SIZE = -1 };
enum {
    IS_F32 = 1 << DTYPE_F32,
    IS_U8 = 1 << DTYPE_U8,
    IS_WEIGHT = 1 << DTYPE_F32 | 1 << DTYPE_F16 | 1 << DTYPE_BF16,
    IS_ANY = (1 << DTYPE_N) - 1
};

/* ops_check__tensor - dtype among `dtypes`, n_dims dimensions of the sizes d0, d1, d2 (ANY_SIZE: free), all but the
 * outermost dense, rows that do not overlap, data unless it is empty. ERR_ARG. */
int ops_check__tensor(const char *op, const char *name, struct tensor t, unsigned dtypes, int n_dims, int64_t d0,
                      int64_t d1, int64_t d2) MUST_CHECK;
/* ops_check__pointer - not NULL. ERR_ARG. */
int ops_check__pointer(const char *op, const char *name, const void *pointer) MUST_CHECK;
/* ops_check__kv - a complete view whose pool has the shape that its numbers say, in o->dtype. */
int ops_check__kv(const char *op, const struct ops *o, const struct kv_view *kv) MUST_CHECK;
/* ops_check__host - a view of host memory whose lanes and pages are those of kv in number and shape. */
int ops_check__host(const char *op, const struct ops *o, const struct kv_view *kv,
                    const struct kv_view *host) MUST_CHECK;
/* ops_check__recent - lanes of kv, whole pages, a pool of the shape that its numbers say. */
int ops_check__recent(const char *op, const struct ops *o, const struct kv_view *kv,
                      const struct kv_recent *recent) MUST_CHECK;
/* ops_check__heads - the layer's lanes lie within a slot, groups are whole, head_dim is the cache's. */
int ops_check__heads(const char *op, const struct kv_view *kv, const struct attention_heads *heads) MUST_CHECK;
/* ops_check__batch - counts and arrays; decode: one row a sequence, else host arrays that ascend to n_tokens and name
 * slots of the cache. */
int ops_check__batch(const char *op, const struct kv_view *kv, const struct seq_batch *batch, bool decode) MUST_CHECK;

#endif
