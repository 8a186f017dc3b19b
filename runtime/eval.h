/* eval - `vitrail eval`: a file of questions under a list of policies and budgets, scored.
 *
 * Owns: the questions file, one run of continuous batching for each policy and budget over the same weights, and the
 * scores, as a table, as JSON and as a plot. Questions are asked greedily, so that runs can be compared token by token:
 * with the answer, with the full cache's tokens, and with the reference tokens that the file may bring. Then the full
 * cache's answers are forced on every other run, which says how likely they are to it; a text that the file brings as a
 * continuation is forced on every run. Finished answers are kept in a journal beside the output until that is in place,
 * so that an eval that was killed can go on. */
#ifndef VITRAIL_RUNTIME_EVAL_H
#define VITRAIL_RUNTIME_EVAL_H

#include <stdbool.h>
#include <stdio.h>

#include "base/status.h"
#include "parallel/liveness.h"
#include "runtime/engine.h"
#include "runtime/prompt.h"

struct eval_options {
    const char *questions; /* a JSON object a line; its images are relative to this file, and trusted */
    const char *output;    /* JSON file to write, or NULL; its journal is <output>.partial */
    const char *plot;      /* SVG file: exact match against budget, or NULL */
    const char *policies;  /* comma list; NULL: the configuration's */
    const char *budgets;   /* comma list; NULL: the configuration's */
    const char *dtypes;    /* comma list of kv_cache.dtype; NULL: the configuration's */
    bool resume;           /* go on with the journal of `output`; without one begin anew */
    bool no_forced;        /* leave the pass with forced answers out */
    int max_tokens;        /* of an answer; 0: the model's default */
    int max_in_flight;     /* 0: as many as run at once */
    bool progress;         /* on standard error */
    bool show;             /* every answer in the table, not only the scores */
    FILE *table;           /* where the table goes; NULL: nowhere */
    struct liveness *liveness;
};

struct eval_result {
    int n_questions, n_runs;
    int n_unlike_reference; /* answers whose tokens differ from the file's, in runs of the full cache */
    int n_ties;             /* of those: explained by two nearly equal logits */
    int stop_signal;        /* not 0: stopped by it, no results */
};

/* eval_run - rank 0: runs it all. Errors: ERR_IO, ERR_FORMAT naming the line of the questions file or of the journal;
 * ERR_CONFIG unknown policy or budget, a journal that is in the way or of something else; ERR_REQUEST a question that
 * cannot be asked (an image that is missing, a prompt too long), naming its id; and what the engine returns. */
int eval_run(struct engine *engine, const struct prompt_builder *builder, const struct eval_options *options,
             struct eval_result *result) MUST_CHECK;

/* eval_plot_files - the plot of results that eval_run wrote: `files` is a comma list of paths. Needs no model. */
int eval_plot_files(const char *files, const char *plot) MUST_CHECK;

#endif
