/* arguments - the command line: which command, its own options, and the configuration after defaults, YAML and
 * options. Nothing is printed or decided here: main.c does that, once, for all ranks. */
#ifndef VITRAIL_LAUNCH_ARGUMENTS_H
#define VITRAIL_LAUNCH_ARGUMENTS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "runtime/config.h"

/* An option of a command; those of the configuration are not repeated here. */
struct option {
    const char *name;  /* "max-tokens" */
    const char *value; /* what --help calls its value; NULL: a flag */
    bool repeats;      /* may be given several times; otherwise the last one counts */
    const char *help;
};

struct launch;

struct command {
    const char *name, *summary, *usage;
    const struct option *options; /* ends with a zeroed one */
    bool lists;                   /* --kv-policy and --kv-budget may be lists; the configuration gets the first */
    bool dtype_lists;             /* and --kv-cache-dtype */
    bool needs_model;             /* config_check before it runs */
    const char *modelless;        /* the option with which it needs none; NULL: there is none */
    bool ranks;                   /* runs on all ranks; else on rank 0 alone */
    int (*run)(struct launch *launch);
};

struct arguments {
    const struct command *command; /* NULL: only --help or --version */
    bool help, version, print_config;
    const char *inject_fault;       /* for tests: parallel/comm.h, comm_wrap_fault */
    const char *policies, *budgets; /* the raw lists of a command with `lists`; NULL: not given */
    const char *dtypes;             /* the same of one with `dtype_lists` */
    bool needs_model;               /* the command does, with these options */
    struct config config;
    int n;
    struct argument {
        const struct option *option;
        const char *value; /* "" for a flag */
    } * given;             /* [n] in order */
};

/* arguments_parse - argv as main has it; the strings are kept by reference. Errors: ERR_CONFIG with the nearest name;
 * those of the YAML file. *out is usable after an error too (defaults), and arguments_free accepts it. */
int arguments_parse(const struct command *const *commands, int argc, char **argv, struct arguments *out) MUST_CHECK;
void arguments_free(struct arguments *arguments);

/* arguments_text - value of the last `name`, or NULL. arguments_nth - of the i-th one given, or NULL. */
const char *arguments_text(const struct arguments *arguments, const char *name);
const char *arguments_nth(const struct arguments *arguments, const char *name, int i);
bool arguments_flag(const struct arguments *arguments, const char *name);

/* Typed values; an option that was not given leaves *out. Errors: ERR_CONFIG naming option, range and value. */
int arguments_int(const struct arguments *arguments, const char *name, int64_t min, int64_t max,
                  int64_t *out) MUST_CHECK;
int arguments_double(const struct arguments *arguments, const char *name, double min, double max,
                     double *out) MUST_CHECK;

#endif
