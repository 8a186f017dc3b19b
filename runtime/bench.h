/* bench - the speed of an open engine: prefill and decode of random prompts, for lists of batches, policies and
 * budgets, held against what the device was measured to do in the same run. */
#ifndef VITRAIL_RUNTIME_BENCH_H
#define VITRAIL_RUNTIME_BENCH_H

#include <stdio.h>

#include "model/tokenizer.h"
#include "parallel/liveness.h"
#include "runtime/engine.h"

struct bench_options {
    const char *batches;  /* "1,8,32" */
    const char *policies; /* "full,vl_cache" or NULL: the configured one */
    const char *budgets;  /* "0.1" or NULL */
    int prompt_len, gen_len;
    int repeats;        /* of each run; the best counts */
    const char *output; /* JSON file or NULL */
    FILE *table;        /* for people */
    const struct liveness *liveness;
};

/* bench_run - rank 0, over an engine with nothing active. Random token ids, greedy,
 * end tokens ignored. Errors: ERR_CONFIG for a list that cannot be read or a batch over max_num_seqs. */
int bench_run(struct engine *engine, const struct bench_options *options) MUST_CHECK;

#endif
