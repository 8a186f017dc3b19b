/* batch - `vitrail batch`: an OpenAI batch file in, its answers out, for jobs that run for days.
 *
 * Owns: reading lines as they are needed, the output file and everything that makes the job restartable. A line of the
 * output is one write(2) to a file that this process alone holds locked; nothing else is remembered, so whatever is
 * killed, a resumed job reads its own output and goes on: no line is lost and none repeated. Memory is constant but for
 * a 16-byte entry a line. Does not own: what a request means (runtime/prompt.h) nor how it runs (runtime/engine.h). */
#ifndef VITRAIL_RUNTIME_BATCH_H
#define VITRAIL_RUNTIME_BATCH_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "parallel/liveness.h"
#include "runtime/engine.h"
#include "runtime/prompt.h"

struct batch_options {
    const char *input, *output; /* paths; input may be a pipe */
    bool resume;                /* go on with an output that has lines already */
    bool progress;              /* report on standard error */
    int max_in_flight;          /* requests read but not answered yet; 0: a little more than run at once */
    int n_threads;              /* that prepare images ahead; 0: by the machine's cores; -1: none */
    double lock_seconds;        /* how long to wait for another job's lock; 0: 10 */
    struct liveness *liveness;  /* asked between steps whether to stop; NULL: never */
};

struct batch_result {
    int64_t n_lines;          /* of the input, as far as it was read; empty ones not counted */
    int64_t n_answered;       /* by this run */
    int64_t n_failed;         /* error records written by this run */
    int64_t n_skipped;        /* lines found finished in the output */
    int64_t n_failed_before;  /* error records among what the output had */
    int64_t generated_tokens; /* of this run's answers */
    int stop_signal;          /* not 0: stopped by it before the end; resumable */
    double seconds;           /* of this run */
};

/* batch_run - rank 0: runs the job to its end, or to a signal. Lines that fail get an error record and do not end it.
 * Errors, all of which leave an output that --resume continues: ERR_CONFIG (the output exists, is the input, or belongs
 * to a running job; no chat template), ERR_IO (also: disk full), ERR_FORMAT (the output to resume is something else),
 * and what engine_step returns. *result is filled in any case. */
int batch_run(struct engine *engine, const struct prompt_builder *builder, const struct batch_options *options,
              struct batch_result *result) MUST_CHECK;

#endif
