/* comm_private - what the communicators of this room share and nobody else sees. */
#ifndef VITRAIL_PARALLEL_COMM_PRIVATE_H
#define VITRAIL_PARALLEL_COMM_PRIVATE_H

#include "parallel/comm.h"

enum { COMM__MAX_RANKS = 1024 };

/* Constructors; *out is zeroed but for vt, rank, size, local_rank, local_size and impl. */
int comm__open_self(struct comm **out) MUST_CHECK;
int comm__open_mpi(bool share_memory, struct comm **out) MUST_CHECK;
int comm__device_open(struct comm *control, int device, void *stream, size_t max_bytes, struct comm **out) MUST_CHECK;

/* comm__settle - remembers rc, if it is an error, as the failure of a collective, and returns it. For failures that the
 * other ranks may not share, within what is made of several collectives. */
int comm__settle(struct comm *c, int rc);

/* comm__enter - an implementation counts a collective on its way in, before it waits for anybody. */
static inline void comm__enter(struct comm *c)
{
    if (c->calls) atomic_fetch_add_explicit(c->calls, 1, memory_order_relaxed);
}

#endif
