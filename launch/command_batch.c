/* vitrail batch - an OpenAI batch file in, its answers out; see docs/batch.md. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "launch/launch.h"
#include "launch/ranks.h"
#include "runtime/batch.h"

struct job {
    struct batch_options options;
    struct model_dims dims;
    struct prompt_builder *builder;
};

/* Before the model is loaded: what can be known to fail is said now. */
static int prepare(const struct launch *launch, struct job *job)
{
    const struct arguments *arguments = &launch->arguments;
    struct batch_options *options = &job->options;
    int64_t in_flight = 0;
    options->input = arguments_text(arguments, "input");
    options->output = arguments_text(arguments, "output");
    options->resume = arguments_flag(arguments, "resume");
    options->progress = log_enabled(LOG_INFO);
    options->liveness = launch->liveness;
    if (!options->input || !options->output) FAIL(ERR_CONFIG, "vitrail batch needs --input FILE and --output FILE");
    TRY(arguments_int(arguments, "max-in-flight", 1, 1 << 20, &in_flight));
    options->max_in_flight = (int)in_flight;
    if (access(options->input, R_OK)) FAIL(ERR_IO, "%s: cannot open: %s", options->input, strerror(errno));
    TRY(model_dims_load(launch->config->model, &job->dims));
    TRY(prompt_open(launch->config, &job->dims, &job->builder));
    return prompt_check_chat(job->builder);
}

static int work(struct launch *launch, struct engine *engine, void *arg)
{
    struct job *job = arg;
    struct batch_result result = {0};
    engine_use_tokenizer(engine, prompt_tokenizer(job->builder));
    int rc = batch_run(engine, job->builder, &job->options, &result);
    (void)launch;
    if (rc) return rc;
    log_line(LOG_INFO,
             "%s: %" PRId64 " lines: %" PRId64 " answered, %" PRId64 " failed, %" PRId64 " finished before; %" PRId64
             " tokens in %.1f s (%.1f tokens/s)",
             job->options.output, result.n_lines, result.n_answered, result.n_failed, result.n_skipped,
             result.generated_tokens, result.seconds,
             result.seconds > 0 ? (double)result.generated_tokens / result.seconds : 0.0);
    if (result.stop_signal) {
        log_line(LOG_INFO, "stopped by signal %d before the end; the same command with --resume goes on",
                 result.stop_signal);
        return OK;
    }
    int64_t failed = result.n_failed + result.n_failed_before;
    if (failed)
        FAIL(ERR_REQUEST, "%" PRId64 " of %" PRId64 " lines failed; their error records stand in %s", failed,
             result.n_lines, job->options.output);
    return OK;
}

static int run(struct launch *launch)
{
    struct job job = {.builder = NULL};
    liveness_phase(launch->liveness, "job");
    int rc = launch->comm->rank == 0 ? prepare(launch, &job) : OK;
    rc = comm_agree(launch->comm, rc, "job");
    if (!rc) rc = ranks_serve(launch, work, &job);
    prompt_close(job.builder);
    return rc;
}

const struct command command_batch = {
    .name = "batch",
    .summary = "answer a file of requests into a file of answers; can be resumed",
    .usage = "[mpirun -np N] vitrail batch --config F --input jobs.jsonl --output out.jsonl [--resume]",
    .options = (const struct option[]){{"input", "FILE", false, "OpenAI batch file, one request a line; required"},
                                       {"output", "FILE", false, "one answer or error record a line; required"},
                                       {"resume", NULL, false, "go on with an output that was begun"},
                                       {"max-in-flight", "N", false, "requests read ahead (default: by max_num_seqs)"},
                                       {NULL, NULL, false, NULL}},
    .needs_model = true,
    .ranks = true,
    .run = run,
};
