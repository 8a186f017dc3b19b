/* vitrail eval - a file of questions under lists of policies and budgets: a table for people, JSON for programs. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "launch/launch.h"
#include "launch/ranks.h"
#include "runtime/eval.h"

struct sweep {
    struct eval_options options;
    struct model_dims dims;
    struct prompt_builder *builder;
};

/* Before the model is loaded: what can be known to fail is said now. */
static int prepare(const struct launch *launch, struct sweep *sweep)
{
    const struct arguments *arguments = &launch->arguments;
    struct eval_options *options = &sweep->options;
    int64_t max_tokens = 0, max_in_flight = 0;
    options->questions = arguments_text(arguments, "questions");
    options->output = arguments_text(arguments, "output");
    options->policies = arguments->policies;
    options->budgets = arguments->budgets;
    options->dtypes = arguments->dtypes;
    options->plot = arguments_text(arguments, "plot");
    options->resume = arguments_flag(arguments, "resume");
    options->no_forced = arguments_flag(arguments, "no-forced");
    options->progress = log_enabled(LOG_INFO);
    options->table = stdout;
    options->liveness = launch->liveness;
    if (!options->questions) FAIL(ERR_CONFIG, "vitrail eval needs --questions FILE");
    if (options->resume && !options->output) FAIL(ERR_CONFIG, "--resume goes on with --output FILE: name it");
    TRY(arguments_int(arguments, "max-tokens", 1, 1 << 20, &max_tokens));
    options->max_tokens = (int)max_tokens;
    TRY(arguments_int(arguments, "max-concurrency", 1, 1 << 20, &max_in_flight));
    options->max_in_flight = (int)max_in_flight;
    options->show = arguments_flag(arguments, "show");
    if (access(options->questions, R_OK)) FAIL(ERR_IO, "%s: cannot open: %s", options->questions, strerror(errno));
    TRY(model_dims_load(launch->config->model, &sweep->dims));
    return prompt_open(launch->config, &sweep->dims, &sweep->builder);
}

static int work(struct launch *launch, struct engine *engine, void *arg)
{
    struct sweep *sweep = arg;
    struct eval_result result = {0};
    (void)launch;
    engine_use_tokenizer(engine, prompt_tokenizer(sweep->builder));
    return eval_run(engine, sweep->builder, &sweep->options, &result);
}

/* --from: results that are there already. */
static int plot_only(struct launch *launch, const char *files)
{
    const char *plot = arguments_text(&launch->arguments, "plot");
    int rc = OK;
    if (launch->comm->rank == 0)
        rc = plot ? eval_plot_files(files, plot)
                  : status_set(ERR_CONFIG, __FILE__, __LINE__, "--from draws results: name the drawing by --plot FILE");
    return comm_agree(launch->comm, rc, "plot");
}

static int run(struct launch *launch)
{
    struct sweep sweep = {.builder = NULL};
    const char *files = arguments_text(&launch->arguments, "from");
    if (files) return plot_only(launch, files);
    liveness_phase(launch->liveness, "questions");
    int rc = launch->comm->rank == 0 ? prepare(launch, &sweep) : OK;
    rc = comm_agree(launch->comm, rc, "questions");
    if (!rc) rc = ranks_serve(launch, work, &sweep);
    prompt_close(sweep.builder);
    return rc;
}

const struct command command_eval = {
    .name = "eval",
    .summary = "answer a file of questions under several policies and budgets, and score the answers",
    .usage = "[mpirun -np N] vitrail eval --config F --questions q.jsonl [--kv-policy full,vl_cache] [--kv-budget "
             "0.1,0.2] [--output r.json [--resume]] [--plot r.svg]\n"
             "  vitrail eval --from r.json[,r2.json...] --plot r.svg",
    .options =
        (const struct option[]){
            {"questions", "FILE", false,
             "{id, images, prompt, answer, ...} a line; images are relative to it; required"},
            {"output", "FILE", false,
             "write scores and answers as JSON; FILE.partial keeps what is finished until then"},
            {"resume", NULL, false,
             "go on with an eval that was stopped: skip the answers in FILE.partial of --output"},
            {"plot", "FILE", false, "draw exact match against budget as SVG, a curve for each policy"},
            {"from", "FILES", false, "draw results of --output, separated by commas, and run nothing"},
            {"no-forced", NULL, false, "do not score the full cache's answers under the other caches"},
            {"show", NULL, false, "print every answer beside its tokens, cache and times"},
            {"max-concurrency", "N", false, "questions at once (default: as many as run); 1 gives each its own times"},
            {"max-tokens", "N", false, "longest answer in tokens (default: the model's)"},
            {NULL, NULL, false, NULL}},
    .lists = true,
    .dtype_lists = true,
    .modelless = "from",
    .needs_model = true,
    .ranks = true,
    .run = run,
};
