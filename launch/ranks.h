/* ranks - the start-up of a rank: joining the others, agreeing with them on what is run, and taking its share of the
 * host's cores or GPUs. The engine is opened after it, on ranks that are known to be alike. */
#ifndef VITRAIL_LAUNCH_RANKS_H
#define VITRAIL_LAUNCH_RANKS_H

#include "base/status.h"
#include "launch/launch.h"
#include "runtime/engine.h"

/* ranks_join - collective: opens the communicator and, for a command of all ranks, liveness; sets the log's rank, and
 * agrees on `rc`, what reading the command line gave on this rank. On error whatever was opened stays in *launch for
 * ranks_leave. */
int ranks_join(struct launch *launch, int rc) MUST_CHECK;

/* ranks_prepare - collective: checks that all ranks have the same build, command line and configuration and that their
 * number is tensor_parallel_size; chooses the device; frees this process from the cores that a launcher bound it to and
 * divides the host's cores. Fills in device, tensor_parallel_size and cpu_threads of the configuration. */
int ranks_prepare(struct launch *launch) MUST_CHECK;

/* ranks_serve - collective, after ranks_prepare: opens the engine; rank 0 then runs `work` and stops the others, which
 * follow it. An error of a request or an input file ends all ranks in good order; any other is fatal for all at once
 * and does not return. */
int ranks_serve(struct launch *launch, int (*work)(struct launch *launch, struct engine *engine, void *arg),
                void *arg) MUST_CHECK;

/* ranks_leave - the orderly end, with or without an error; collective. */
void ranks_leave(struct launch *launch);

/* ranks_cores - cores that this process may use: its affinity and the CPU quota of its control group; at least 1. */
int ranks_cores(void);

#endif
