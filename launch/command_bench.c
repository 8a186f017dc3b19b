/* vitrail bench - how fast this model runs here: a table for people, JSON for programs. */
#include <stdio.h>

#include "launch/launch.h"
#include "launch/ranks.h"
#include "runtime/bench.h"

static const struct option options[] = {
    {"batch", "LIST", false, "sequences at once, as in 1,8,32 (default: 1)"},
    {"prompt-len", "N", false, "tokens of a prompt, random ids (default: 512)"},
    {"gen-len", "N", false, "tokens to generate (default: 64)"},
    {"repeats", "N", false, "times each run is done; the best counts (default: 3)"},
    {"output", "FILE", false, "write the figures as JSON"},
    {NULL, NULL, false, NULL},
};

static int prepare(const struct launch *launch, struct bench_options *out)
{
    const struct arguments *a = &launch->arguments;
    int64_t prompt_len = 512, gen_len = 64, repeats = 3;
    TRY(arguments_int(a, "prompt-len", 1, 1 << 24, &prompt_len));
    TRY(arguments_int(a, "gen-len", 1, 1 << 24, &gen_len));
    TRY(arguments_int(a, "repeats", 1, 1000, &repeats));
    *out = (struct bench_options){.batches = arguments_text(a, "batch") ? arguments_text(a, "batch") : "1",
                                  .policies = a->policies,
                                  .budgets = a->budgets,
                                  .prompt_len = (int)prompt_len,
                                  .gen_len = (int)gen_len,
                                  .repeats = (int)repeats,
                                  .output = arguments_text(a, "output"),
                                  .table = stdout,
                                  .liveness = launch->liveness};
    return OK;
}

static int work(struct launch *launch, struct engine *engine, void *arg)
{
    (void)launch;
    return bench_run(engine, arg);
}

static int run(struct launch *launch)
{
    struct bench_options bench;
    liveness_phase(launch->liveness, "options");
    int rc = launch->comm->rank == 0 ? prepare(launch, &bench) : OK;
    rc = comm_agree(launch->comm, rc, "options");
    return rc ? rc : ranks_serve(launch, work, &bench);
}

const struct command command_bench = {
    .name = "bench",
    .summary = "measure prefill and decode on random prompts, beside what the device can do",
    .usage = "[mpirun -np N] vitrail bench --config F [--batch 1,8] [--prompt-len N] [--gen-len N] [--kv-policy "
             "full,vl_cache] [--output r.json]",
    .options = options,
    .lists = true,
    .needs_model = true,
    .ranks = true,
    .run = run,
};
