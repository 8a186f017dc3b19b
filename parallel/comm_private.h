/* comm_private - what the communicators of this room share and nobody else sees. */
#ifndef VITRAIL_PARALLEL_COMM_PRIVATE_H
#define VITRAIL_PARALLEL_COMM_PRIVATE_H

#include "parallel/comm.h"

enum { COMM__MAX_RANKS = 1024 };

/* Constructors; *out is zeroed but for vt, rank, size, local_rank, local_size and impl. */
int comm__open_self(struct comm **out) MUST_CHECK;
int comm__open_mpi(bool share_memory, struct comm **out) MUST_CHECK;

/* comm__enter - an implementation counts a collective on its way in, before it waits for anybody. */
static inline void comm__enter(struct comm *c)
{
    if (c->calls) atomic_fetch_add_explicit(c->calls, 1, memory_order_relaxed);
}

#endif
