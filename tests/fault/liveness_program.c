/* liveness_program - a small stand-in for the engine, for run_liveness.sh to kill: it opens the communicator and
 * liveness as the engine does, goes to the phase that was asked for and stays there until it is told to stop.
 *
 *   liveness_program PHASE [watchdog=SECONDS] [fault=SPEC] [fail=RANK:STEP] [mark=FILE] [deaf]
 *
 * PHASE load: works without a collective; decode: steps with all-reduces; idle: waits between steps.
 * Standard output: "ready RANK PID" once the phase has begun. At an orderly end "work RANK" is appended to the file
 * `mark` by each rank when its work is done, and "clean 0" by rank 0 as the very last thing; to a file, since mpirun
 * drops what ranks print once it has been told to stop. `deaf` ignores a request to stop. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "parallel/comm.h"
#include "parallel/liveness.h"

enum { ALL_REDUCES = 4, WIDTH = 257, LONGEST_MS = 60000 };

struct program {
    const char *phase, *fault, *mark;
    double watchdog;
    int fail_rank;
    unsigned long long fail_step;
    bool deaf;
    struct comm *comm;
    struct liveness *live;
};

struct plan {
    int stop;
};

static void sleep_ms(long ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

static int parse(struct program *p, int n, char **arguments)
{
    *p = (struct program){.phase = "decode", .watchdog = 300, .fail_rank = -1};
    if (n > 1) p->phase = arguments[1];
    for (int i = 2; i < n; i++) {
        const char *a = arguments[i];
        char *end;
        if (!strncmp(a, "watchdog=", 9))
            p->watchdog = strtod(a + 9, NULL);
        else if (!strncmp(a, "fault=", 6))
            p->fault = a + 6;
        else if (!strncmp(a, "mark=", 5))
            p->mark = a + 5;
        else if (!strcmp(a, "deaf"))
            p->deaf = true;
        else if (!strncmp(a, "fail=", 5)) {
            p->fail_rank = (int)strtol(a + 5, &end, 10);
            p->fail_step = strtoull(end + 1, NULL, 10);
        } else
            FAIL(ERR_CONFIG, "unknown argument %s", a);
    }
    return OK;
}

static void ready(const struct program *p)
{
    char line[64];
    int n = snprintf(line, sizeof line, "ready %d %d\n", p->comm->rank, (int)getpid());
    if (write(STDOUT_FILENO, line, (size_t)n) != n) abort();
}

static void append(const char *path, const char *what, int rank)
{
    FILE *file = path ? fopen(path, "a") : NULL;
    if (!file) return;
    fprintf(file, "%s %d\n", what, rank);
    fclose(file);
}

static bool stopping(const struct program *p) { return !p->deaf && liveness_stop_requested(p->live); }

static int load(struct program *p)
{
    ready(p);
    for (int i = 0; i < LONGEST_MS && !stopping(p); i++) {
        liveness_step_begin(p->live, (uint64_t)i);
        sleep_ms(1);
    }
    liveness_step_end(p->live);
    return comm_agree(p->comm, OK, "load");
}

static int step(struct program *p, uint64_t number)
{
    float x[WIDTH];
    for (int i = 0; i < ALL_REDUCES; i++) {
        for (int k = 0; k < WIDTH; k++) x[k] = (float)(p->comm->rank + k);
        TRY(comm_all_reduce_sum(p->comm, tensor_1d(x, DTYPE_F32, WIDTH), NULL));
    }
    if (p->comm->rank == p->fail_rank && number == p->fail_step) FAIL(ERR_BUG, "the test\nsays so");
    return OK;
}

/* steps - as the engine: rank 0 plans and broadcasts, everybody runs the step. Idle: rank 0 has nothing to do. */
static int steps(struct program *p, bool idle)
{
    ready(p);
    for (uint64_t number = 1;; number++) {
        if (idle) sleep_ms(p->comm->rank ? 0 : 50);
        struct plan plan = {.stop = p->comm->rank == 0 && stopping(p)};
        TRY(comm_broadcast_idle(p->comm, &plan, sizeof plan, 0));
        if (plan.stop) return OK;
        liveness_step_begin(p->live, number);
        TRY(step(p, number));
        if (!idle) sleep_ms(1);
        liveness_step_end(p->live);
    }
}

static int run(struct program *p)
{
    TRY(comm_reserve(p->comm, WIDTH * sizeof(float)));
    liveness_phase(p->live, p->phase);
    if (!strcmp(p->phase, "load")) return load(p);
    return steps(p, !strcmp(p->phase, "idle"));
}

static int start(struct program *p, int n, char **arguments)
{
    TRY(parse(p, n, arguments));
    TRY(comm_open_auto(&p->comm));
    if (p->fault) TRY(comm_wrap_fault(&p->comm, p->fault));
    struct liveness_options options = {.watchdog_timeout = p->watchdog, .stop_grace = 3};
    return liveness_open(p->comm, &options, &p->live);
}

int main(int n, char **arguments)
{
    struct program p;
    liveness_block_signals();
    int rc = start(&p, n, arguments);
    if (rc) {
        fprintf(stderr, "vitrail: %s\n", status_message());
        return status_exit_code(rc);
    }
    rc = run(&p);
    if (rc) liveness_fail(p.live, rc, status_message());
    int stop = liveness_stop_requested(p.live), rank = p.comm->rank;
    append(p.mark, "work", rank);
    comm_close(p.comm);
    liveness_leave(p.live);
    if (rank == 0) append(p.mark, "clean", rank);
    return stop ? 128 + stop : 0;
}
