/* comm_nccl - the communicator of GPUs (comm_device_open): NCCL, and peer memory (comm_nvlink) where it is faster. Here
 * is what tests and measurements want of it; everybody else sees comm.h. */
#ifndef VITRAIL_PARALLEL_COMM_NCCL_H
#define VITRAIL_PARALLEL_COMM_NCCL_H

#include "parallel/comm.h"

/* The ways of a message over the link. */
enum comm_way { COMM_WAY_NCCL, COMM_WAY_LINES, COMM_WAY_CHUNKS, COMM_WAY_N };

/* comm__way_name - "nccl", "lines", "chunks". comm__has_peers - whether peer memory is in use. */
const char *comm__way_name(enum comm_way way);
bool comm__has_peers(const struct comm *c);

/* comm__use_way - from now on all sums and gathers that can go this way do; COMM_WAY_N: by the measured times again.
 * Alike on all ranks. comm__way_of_sum - the way that a sum of these bytes takes. */
void comm__use_way(struct comm *c, enum comm_way way);
enum comm_way comm__way_of_sum(const struct comm *c, size_t bytes);

#endif
