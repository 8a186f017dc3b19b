/* comm_self - one rank: sums and broadcasts are what they were, gathers are copies. No MPI call is made. */
#include <stdlib.h>
#include <string.h>

#include "parallel/comm_private.h"

static int all_reduce_sum(struct comm *c, struct tensor x, void *stream)
{
    (void)x, (void)stream;
    comm__enter(c);
    return OK;
}

static int all_gather(struct comm *c, struct tensor out, struct tensor in, void *stream)
{
    (void)stream;
    comm__enter(c);
    if (out.data != in.data) memcpy(out.data, in.data, tensor_bytes(in));
    return OK;
}

static int broadcast(struct comm *c, void *buf, size_t n, int root, bool idle)
{
    (void)buf, (void)n, (void)root, (void)idle;
    comm__enter(c);
    return OK;
}

static int all_gather_host(struct comm *c, void *out, const void *in, size_t n_each)
{
    comm__enter(c);
    if (out != in) memcpy(out, in, n_each);
    return OK;
}

static int gather(struct comm *c, void *out, const void *in, size_t n_each, int root)
{
    (void)root;
    return all_gather_host(c, out, in, n_each);
}

static int reserve(struct comm *c, size_t max_bytes)
{
    (void)c, (void)max_bytes;
    return OK;
}

static void abort_job(struct comm *c, int exit_code) { (void)c, (void)exit_code; }

static void close_self(struct comm *c) { free(c); }

static const struct comm_vt self_vt = {
    .name = "self",
    .all_reduce_sum = all_reduce_sum,
    .all_gather = all_gather,
    .broadcast = broadcast,
    .gather = gather,
    .all_gather_host = all_gather_host,
    .reserve = reserve,
    .abort = abort_job,
    .close = close_self,
};

int comm__open_self(struct comm **out)
{
    struct comm *c = calloc(1, sizeof *c);
    if (!c) FAIL(ERR_NOMEM, "no memory for a communicator");
    *c = (struct comm){.vt = &self_vt, .rank = 0, .size = 1, .local_rank = 0, .local_size = 1};
    *out = c;
    return OK;
}
