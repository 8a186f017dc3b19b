/* comm_shared - the data plane among ranks of one host: everybody copies its part into shared memory, meets the others,
 * and reads theirs. Belongs to comm_mpi, which uses it when all ranks are on one host, and MPI messages if not. */
#ifndef VITRAIL_PARALLEL_COMM_SHARED_H
#define VITRAIL_PARALLEL_COMM_SHARED_H

#include "parallel/comm.h"

struct shared;

/* comm__shared_open - collective; every rank of c is on this host. `progress` is called now and then while
 * waiting. Errors: ERR_IO, ERR_NOMEM, agreed on. comm__shared_close - local. */
int comm__shared_open(struct comm *c, void (*progress)(struct comm *c), struct shared **out) MUST_CHECK;
void comm__shared_close(struct shared *s);

/* Collective, host memory. x [n] of dtype F32 or I64; out [size * bytes], in [bytes] may lie in its place in out. */
void comm__shared_sum(struct shared *s, void *x, enum dtype dtype, size_t n);
void comm__shared_gather(struct shared *s, void *out, const void *in, size_t bytes);

/* comm__ordered_sum - sum[i] = part[0][i] + part[1][i] + ..., in that order. sum may be part[0], no other. */
void comm__ordered_sum(void *sum, const void *const *part, int n_parts, enum dtype dtype, size_t n);

#endif
