/* bench - the speed of an open engine: prefill and decode of random prompts, for lists of batches, prompt lengths,
 * policies and budgets, held against what the device was measured to do in the same run. */
#ifndef VITRAIL_RUNTIME_BENCH_H
#define VITRAIL_RUNTIME_BENCH_H

#include <stdbool.h>
#include <stdio.h>

#include "parallel/liveness.h"
#include "runtime/engine.h"

struct bench_options {
    const char *batches;     /* "1,8,32" */
    const char *prompt_lens; /* "64,512": text tokens of a prompt */
    const char *policies;    /* "full,vl_cache" or NULL: the configured one */
    const char *budgets;     /* "0.1" or NULL */
    int gen_len;
    int n_images;       /* of each prompt, beside its text; for a model with a vision tower */
    int repeats;        /* of each run; the best counts */
    bool find_batch;    /* instead of `batches`: the largest that runs at once, for every other setting */
    const char *output; /* JSON file or NULL */
    const char *plot;   /* SVG file or NULL */
    const char *commit; /* of this build, or NULL */
    FILE *table;        /* for people */
    const struct liveness *liveness;
};

/* bench_run - rank 0, over an engine with nothing active. Random token ids and pixels, greedy, end tokens ignored. A
 * signal ends it after the run at hand; what was measured is written. Errors: ERR_CONFIG for a list that cannot be read
 * or asks for more than the configuration allows, naming the option; ERR_IO for a file that cannot be written, before
 * anything is measured. */
int bench_run(struct engine *engine, const struct bench_options *options) MUST_CHECK;

#endif
