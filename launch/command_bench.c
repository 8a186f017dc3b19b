/* vitrail bench - how fast this model runs here: a table for people, JSON for programs. */
#include <stdio.h>

#include "launch/launch.h"
#include "launch/ranks.h"
#include "runtime/bench.h"

static const struct option options[] = {
    {"batch", "LIST", false, "sequences at once, as in 1,8,32 (default: 1)"},
    {"prompt-len", "LIST", false, "text tokens of a prompt, random ids, as in 64,512,2048 (default: 512)"},
    {"gen-len", "N", false, "tokens to generate (default: 64)"},
    {"images", "N", false, "images in each prompt beside its text, random pixels (default: 0)"},
    {"find-batch", NULL, false, "instead of --batch: find the most sequences that run at once"},
    {"repeats", "N", false, "times each run is done; the best counts (default: 3)"},
    {"output", "FILE", false, "write the figures as JSON"},
    {"plot", "FILE", false, "draw the time of a decode step as SVG"},
    {NULL, NULL, false, NULL},
};

#ifdef VITRAIL_COMMIT
static const char *const commit = VITRAIL_COMMIT;
#else
static const char *const commit = NULL;
#endif

static const char *text_or(const struct arguments *a, const char *name, const char *preset)
{
    const char *text = arguments_text(a, name);
    return text ? text : preset;
}

static int prepare(const struct launch *launch, struct bench_options *out)
{
    const struct arguments *a = &launch->arguments;
    int64_t gen_len = 64, images = 0, repeats = 3;
    TRY(arguments_int(a, "gen-len", 1, 1 << 24, &gen_len));
    TRY(arguments_int(a, "images", 0, 4096, &images));
    TRY(arguments_int(a, "repeats", 1, 1000, &repeats));
    if (arguments_flag(a, "find-batch") && arguments_text(a, "batch"))
        FAIL(ERR_CONFIG, "--find-batch looks for the batch itself; leave --batch out");
    *out = (struct bench_options){.batches = text_or(a, "batch", "1"),
                                  .prompt_lens = text_or(a, "prompt-len", "512"),
                                  .policies = a->policies,
                                  .budgets = a->budgets,
                                  .gen_len = (int)gen_len,
                                  .n_images = (int)images,
                                  .repeats = (int)repeats,
                                  .find_batch = arguments_flag(a, "find-batch"),
                                  .output = arguments_text(a, "output"),
                                  .plot = arguments_text(a, "plot"),
                                  .commit = commit,
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
    .usage =
        "[mpirun -np N] vitrail bench --config F [--batch 1,8 | --find-batch] [--prompt-len 512,2048] [--gen-len N]\n"
        "      [--images N] [--kv-policy full,vl_cache] [--kv-budget 0.1,0.5] [--output r.json] [--plot r.svg]",
    .options = options,
    .lists = true,
    .needs_model = true,
    .ranks = true,
    .run = run,
};
