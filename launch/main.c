/* main - vitrail COMMAND [options]: reads the command line, joins the ranks, runs the command, and is the one place
 * that prints an error: one line, by the lowest rank, with the exit code of status_exit_code. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "launch/launch.h"
#include "launch/ranks.h"

static const struct command *const commands[] = {
    &command_plan, &command_tokenize, &command_generate, &command_batch, &command_eval, &command_bench, NULL};

#ifdef VITRAIL_COMMIT
static const char build[] = VITRAIL_VERSION " (" VITRAIL_COMMIT ")";
#else
static const char build[] = VITRAIL_VERSION;
#endif

static int run(struct launch *launch)
{
    struct arguments *arguments = &launch->arguments;
    const struct command *command = arguments->command;
    bool first = launch->comm->rank == 0;
    if (arguments->version) {
        if (first) printf("vitrail %s\n", build);
        return OK;
    }
    if (arguments->help) {
        if (first) help_print(commands, command, stdout);
        return OK;
    }
    if (arguments->print_config) return first ? config_print(&arguments->config, stdout) : OK;
    if (!command->ranks) return first ? command->run(launch) : OK;
    TRY(ranks_prepare(launch));
    return command->run(launch);
}

/* Said before anything else is tried: a model that is not there is the likeliest first error. */
static int check_model(const struct arguments *arguments)
{
    const char *model = arguments->config.model;
    if (!arguments->needs_model || arguments->print_config) return OK;
    if (access(model, R_OK))
        FAIL(ERR_CONFIG, "model %s: %s; a relative path is from the working directory", model, strerror(errno));
    return OK;
}

/* Ranks no longer stand at the same place: no orderly end can be agreed on. */
static _Noreturn void fail_together(struct launch *launch, int rc)
{
    if (launch->liveness) liveness_fail(launch->liveness, rc, status_message());
    fprintf(stderr, "vitrail: %s\n", status_message());
    comm_abort(launch->comm, rc);
}

int main(int argc, char **argv)
{
    static struct launch launch;
    (void)signal(SIGPIPE, SIG_IGN); /* a reader that leaves is an error of a write, not the end of all ranks */
    launch.config = &launch.arguments.config;
    int rc = arguments_parse(commands, argc, argv, &launch.arguments);
    if (!rc) rc = check_model(&launch.arguments);
    /* A command of one rank alone ends at the first Ctrl-C; several ranks end together, so one thread takes signals. */
    if (launch.arguments.command && launch.arguments.command->ranks) liveness_block_signals();
    rc = ranks_join(&launch, rc);
    if (!rc) rc = run(&launch);
    if (rc && launch.comm && launch.comm->broken) fail_together(&launch, rc);
    if (!rc && (fflush(stdout) || ferror(stdout)))
        rc = status_set(ERR_IO, __FILE__, __LINE__, "cannot write to standard output");
    int signal_number = launch.liveness ? liveness_stop_requested(launch.liveness) : 0;
    if (rc && (!launch.comm || launch.comm->rank == 0)) {
        fprintf(stderr, "vitrail: %s\n", status_message());
        if (log_enabled(LOG_DEBUG)) log_line(LOG_DEBUG, "%s at %s", status_name(rc), status_origin());
    }
    ranks_leave(&launch);
    arguments_free(&launch.arguments);
    if (!rc && signal_number) return 128 + signal_number;
    return status_exit_code(rc);
}
