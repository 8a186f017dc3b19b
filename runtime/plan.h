/* plan - the memory plan of a rank, in bytes, before anything is loaded: what the engine will take, row by row. */
#ifndef VITRAIL_RUNTIME_PLAN_H
#define VITRAIL_RUNTIME_PLAN_H

#include <stdbool.h>
#include <stdio.h>

#include "runtime/resources.h"
#include "runtime/step.h"

enum { PLAN_MAX_ROWS = 32 };

struct memory_plan {
    struct plan_row {
        const char *label;
        size_t bytes;
    } row[PLAN_MAX_ROWS];
    int n_rows;
    size_t total;          /* of all rows */
    size_t available;      /* what this rank may take of the host's or its GPU's memory; 0: unknown */
    int64_t n_pages;       /* of the KV pool */
    int64_t n_host_pages;  /* of the pool of evicted tokens */
    size_t host_bytes;     /* of its pages: host memory, which on CPU is in `total` too */
    size_t host_available; /* what this rank may take for it */
    size_t page_bytes;
    int lanes;          /* KV heads over all layers */
    size_t arena_bytes; /* device memory taken in one block: all rows but scratch, communicator and messages */
};

/* plan_measure - the plan of the rank whose comm and ops r was opened with. n_pages 0: from the configuration, the
 * smaller of max_num_seqs full sequences and the memory that is left (kv_cache_memory_bytes if set); n_host_pages 0:
 * the same for evicted tokens, none where they are freed. */
int plan_measure(struct resources *r, const struct checkpoint *checkpoint, int64_t n_pages, int64_t n_host_pages,
                 struct memory_plan *out) MUST_CHECK;

/* plan_step_limits - sizes of the step message for this configuration. */
struct step_limits plan_step_limits(const struct config *config, const struct model_dims *dims);

/* plan_print_table - for people, one rank's rows and how many sequences fit. */
void plan_print_table(const struct memory_plan *plan, const struct resources *r, FILE *out);

/* plan_print - the `vitrail plan` command: every rank of n_ranks, without starting any. gpu_memory_gib 0: this host.
 * For device: cuda the backend only measures; without it in the build, the CPU's sizes are shown. */
int plan_print(const struct config *config, int n_ranks, double gpu_memory_gib, bool json, FILE *out) MUST_CHECK;

/* plan_available_bytes - memory this host can still give (MemAvailable and the cgroup's limit). */
size_t plan_available_bytes(void);

/* plan_used_bytes - memory taken so far, as the system counts it: of this process (RssAnon), or of the whole device. */
size_t plan_used_bytes(struct ops *ops);

#endif
