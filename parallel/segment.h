/* segment - memory shared by the ranks of one host, that leaves nothing behind: the name is random, and gone as soon as
 * all have attached. It is never unmapped; it ends with its processes. */
#ifndef VITRAIL_PARALLEL_SEGMENT_H
#define VITRAIL_PARALLEL_SEGMENT_H

#include "parallel/comm.h"

/* segment_open - collective over all ranks of c: *out is `bytes` of zeroed memory, one and the same for all ranks of
 * this host, taken from the system at once. `what` names it in errors. Errors: ERR_IO, agreed on by all ranks. */
int segment_open(struct comm *c, size_t bytes, const char *what, void **out) MUST_CHECK;

#endif
