/* launch - what main.c hands to a command, and the commands themselves. */
#ifndef VITRAIL_LAUNCH_LAUNCH_H
#define VITRAIL_LAUNCH_LAUNCH_H

#include "launch/arguments.h"
#include "parallel/comm.h"
#include "parallel/liveness.h"
#include "runtime/config.h"

/* One run of the program on one rank. */
struct launch {
    struct arguments arguments;
    const struct config *config; /* of the arguments; its auto values are filled in by ranks_prepare */
    struct comm *comm;
    struct liveness *liveness;
    double joined; /* clock_seconds when this rank began to wait for the others' heartbeats */
};

/* Commands, one file each. A run function returns a status; main.c prints the message and makes the exit code. It is
 * called on all ranks if the command says so, else on rank 0 alone. */
extern const struct command command_plan, command_tokenize, command_generate, command_batch, command_eval,
    command_bench;

/* help_print - --help of the program (command NULL) or of one command, from the tables. */
void help_print(const struct command *const *commands, const struct command *command, FILE *out);

#endif
