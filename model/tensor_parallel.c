#include "model/tensor_parallel.h"

#include <stdlib.h>
#include <string.h>

int tensor_parallel_open(struct tensor_parallel *tp, struct ops *ops, struct comm *comm, int vocab_size)
{
    *tp = (struct tensor_parallel){.ops = ops, .comm = comm};
    tp->vocab_count = calloc((size_t)comm->size, sizeof *tp->vocab_count);
    if (!tp->vocab_count) FAIL(ERR_NOMEM, "tensor parallel: out of memory");
    for (int r = 0; r < comm->size; r++) tp->vocab_count[r] = (int32_t)shard_range(vocab_size, 1, comm->size, r).count;
    tp->vocab_widest = (int)shard_max_count(vocab_size, 1, comm->size);
    return OK;
}

void tensor_parallel_close(struct tensor_parallel *tp)
{
    free(tp->vocab_count);
    memset(tp, 0, sizeof *tp);
}

static int all_reduce(struct tensor_parallel *tp, struct tensor x)
{
    return tp->comm->size == 1 ? OK : comm_all_reduce_sum(tp->comm, x, tp->ops->stream);
}

int tp_embed(struct tensor_parallel *tp, struct tensor x, const struct weights *w, const int32_t *ids)
{
    TRY(ops_embed(tp->ops, x, w->embed, ids, (int)w->vocab.first));
    return all_reduce(tp, x);
}

int tp_row_add_norm(struct tensor_parallel *tp, struct tensor y, struct tensor residual, struct tensor partial,
                    struct tensor x, struct tensor w, struct tensor bias, bool counted, struct tensor norm, float eps)
{
    const float *bias_here = tp->comm->rank == 0 ? bias.data : NULL;
    if (counted && w.dim[1] > 0)
        TRY(ops_linear(tp->ops, partial, x, w, bias_here));
    else
        TRY(ops_zero(tp->ops, partial.data, tensor_bytes(partial)));
    int rc = comm_all_reduce_add_norm(tp->comm, partial, residual, norm, eps, y, tp->ops->stream);
    if (rc != COMM_DECLINED) return rc;
    TRY(all_reduce(tp, partial));
    return ops_add_rms_norm(tp->ops, y, residual, partial, norm.data, eps);
}

int tp_lm_head(struct tensor_parallel *tp, struct tensor logits, struct tensor local, struct tensor gathered,
               struct tensor x, struct tensor w)
{
    if (tp->comm->size == 1) return ops_linear(tp->ops, logits, x, w, NULL);
    struct tensor mine = local;
    mine.dim[1] = w.dim[0];
    if (w.dim[0] > 0) TRY(ops_linear(tp->ops, mine, x, w, NULL));
    TRY(comm_all_gather(tp->comm, gathered, local, tp->ops->stream));
    struct tensor shards = tensor_3d(gathered.data, DTYPE_F32, tp->comm->size, x.dim[0], tp->vocab_widest);
    return ops_unshard_columns(tp->ops, logits, shards, tp->vocab_count);
}

int tp_gather_features(struct tensor_parallel *tp, struct tensor out, struct tensor mine)
{
    return comm_all_gather(tp->comm, out, mine, tp->ops->stream);
}
