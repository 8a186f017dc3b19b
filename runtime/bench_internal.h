/* bench_internal - the parts of bench: bench_lists.c (what to run), bench.c (running it), bench_report.c (table and
 * JSON), bench_plot.c (SVG). */
#ifndef VITRAIL_RUNTIME_BENCH_INTERNAL_H
#define VITRAIL_RUNTIME_BENCH_INTERNAL_H

#include "runtime/bench.h"

enum { BENCH_LIST_MAX = 32 };

/* The options' lists, read and checked. */
struct bench_lists {
    int batch[BENCH_LIST_MAX], n_batches;
    int prompt_len[BENCH_LIST_MAX], n_prompt_lens;
    char policy[BENCH_LIST_MAX][32];
    int n_policies;
    struct kv_budget budget[BENCH_LIST_MAX];
    int n_budgets;
};

/* One line of the table. Times are the best of the repeats; the stages are those of the fastest repeat as a whole. */
struct bench_run {
    char policy[32];
    struct kv_budget budget;
    int batch, prompt_len, gen_len, n_images;
    int prompt_tokens;                                      /* with its images */
    bool found;                                             /* by find_batch: the largest batch that ran at once */
    bool at_limit;                                          /* found, and max_num_seqs is what bounds it */
    double prefill_ms;                                      /* of all prompts */
    double decode_ms;                                       /* of one full step */
    double tokens_per_s, decode_tokens_per_s, images_per_s; /* generated, prefill included; full steps; whole run */
    double fraction_of_gemm, fraction_of_floor, floor_ms;
    int64_t kv_bytes, kv_bytes_full; /* of all prompts, all ranks: kept, and before compression */
    size_t peak_bytes;               /* of rank 0 */
    struct bench_stages {
        double vision_ms, prefill_ms, decode_ms, other_ms; /* their sum is the run */
    } stages;
};

struct bench {
    struct engine *engine;
    const struct bench_options *options;
    struct bench_lists lists;
    struct engine_floor floor;
    bool cuda;
    struct bench_run *runs;
    int n_runs;
    uint64_t seed; /* of the next random number */
    int64_t bytes_kept, bytes_full;
};

/* bench__read_lists - options->... against the engine's configuration. bench__read_numbers - "1,8,32" with values from
 * 1 to `most`; `option` stands in messages, and `limit` for what sets `most`. Errors: ERR_CONFIG. */
int bench__read_lists(const struct bench_options *options, const struct config *config, const struct model_dims *dims,
                      struct bench_lists *out) MUST_CHECK;
int bench__read_numbers(const char *option, const char *text, int most, const char *limit, int *out, int *n) MUST_CHECK;

/* bench__floor_gbs - the bandwidth that decode is held against, GB/s: on a GPU that of a copy, on a CPU that of gemv.
 * bench__floor_name - "copy" or "gemv". */
double bench__floor_gbs(const struct bench *b);
const char *bench__floor_name(const struct bench *b);

void bench__print_head(const struct bench *b);
void bench__print_run(const struct bench *b, const struct bench_run *run);
int bench__write_json(const struct bench *b, const char *path) MUST_CHECK;

/* bench__write_plot - decode ms against batch, or against prompt length where only that differs; a line for every other
 * setting, the floor dashed. */
int bench__write_plot(const struct bench *b, const char *path) MUST_CHECK;

#endif
