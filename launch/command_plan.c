/* vitrail plan - who would hold what, and does it fit: before anything is loaded, and without a GPU. */
#include "launch/launch.h"
#include "runtime/plan.h"

static int run(struct launch *launch)
{
    const struct arguments *arguments = &launch->arguments;
    int64_t ranks = launch->config->tensor_parallel_size;
    double gib = 0;
    if (!ranks) ranks = launch->comm->size;
    TRY(arguments_int(arguments, "gpus", 1, 1024, &ranks));
    TRY(arguments_double(arguments, "gpu-memory", 0.001, 1e6, &gib));
    return plan_print(launch->config, (int)ranks, gib, arguments_flag(arguments, "json"), stdout);
}

const struct command command_plan = {
    .name = "plan",
    .summary = "print the memory plan of every rank; loads nothing and needs no GPU",
    .usage = "vitrail plan --config F [--gpus N] [--gpu-memory GIB] [--json]",
    .options =
        (const struct option[]){{"gpus", "N", false, "ranks to plan for (default: tensor_parallel_size, else 1)"},
                                {"gpu-memory", "GIB", false, "memory of each GPU (default: this host's memory)"},
                                {"json", NULL, false, "print JSON"},
                                {NULL, NULL, false, NULL}},
    .needs_model = true,
    .run = run,
};
