/* bench_kernels - what the files of this program share: an open backend, memory that a part gives back at its end, the
 * median time of a body, lines of the table. */
#ifndef VITRAIL_BENCH_BENCH_KERNELS_H
#define VITRAIL_BENCH_BENCH_KERNELS_H

#include <cjson/cJSON.h>
#include <stdbool.h>

#include "kernels/ops.h"

enum { BENCH_GROUPS = 5, BENCH_BLOCKS = 256, BENCH_HEAD_DIM = 128 };
#define BENCH_BEYOND_CACHE 4e8 /* bytes that take turns: several times the second-level cache */

struct bench {
    struct ops ops;
    struct ops_ceilings ceilings;
    int device, bucket, n_blocks;
    struct {
        void *memory;
        size_t bytes;
    } block[BENCH_BLOCKS];
    cJSON *rows;
};

/* bench_demand - ends the program with the message of a failure. */
void bench_demand(int rc);

/* bench_open, bench_close - the backend with scratch for one part; all that was taken goes back at its close. */
void bench_open(struct bench *b, const struct ops_limits *limits);
void bench_close(struct bench *b);
void *bench_take(struct bench *b, size_t bytes);
void *bench_array(struct bench *b, const void *values, size_t bytes);
/* bench_random - [rows, cols] of normal numbers. bench_heads - columns from `first` on as [rows, heads, dim]. */
struct tensor bench_random(struct bench *b, enum dtype dtype, int64_t rows, int64_t cols, float std);
struct tensor bench_heads(struct tensor t, int64_t first, int64_t heads, int64_t dim);

/* bench_time - median seconds of a run of the body; as a graph it is recorded once and replayed.
 * bench_time_runs - mean seconds of n runs, now. */
typedef int bench_body(void *arg);
double bench_time(struct bench *b, bench_body *step, void *arg, bool graph);
double bench_time_runs(struct bench *b, bench_body *step, void *arg, bool graph, int n);
int bench_by_size(const void *a, const void *b); /* doubles, for qsort */

/* bench_report - a line of the table and an object of the file: pairs of a unit and a double, then NULL. */
void bench_report(struct bench *b, const char *part, const char *name, ...);

/* The parts. */
void bench_prefill(struct bench *b);
void bench_decode(struct bench *b);
void bench_small(struct bench *b);
void bench_vl(struct bench *b);

#endif
