#include "launch/ranks.h"

#include <inttypes.h>
#include <link.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/hash.h"
#include "base/log.h"
#include "kernels/ops.h"

/* The one wait that no heartbeat watches is the one for the heartbeats. Called in a thread of its own when it took too
 * long. Who is missing cannot be told. The lowest rank speaks: Open MPI 4.1 takes up to 2 s to end the others, so each
 * waits for its turn; and one that comes too late was the stopped one, which the end has woken up. */
static void give_up(union sigval value)
{
    enum { TURN_SECONDS = 4, LATE_SECONDS = 2 };
    const struct launch *launch = value.sival_ptr;
    double limit = launch->config->watchdog_timeout;
    bool late = clock_seconds() > launch->joined + limit + LATE_SECONDS;
    sleep((unsigned)(launch->comm->rank * TURN_SECONDS));
    if (!late)
        fprintf(stderr, "vitrail: rank %d: a rank did not come through the start within %g s (watchdog_timeout)\n",
                launch->comm->rank, limit);
    _exit(status_exit_code(ERR_PEER));
}

static int open_liveness(struct launch *launch)
{
    double limit = launch->config->watchdog_timeout;
    struct liveness_options options = {.watchdog_timeout = limit};
    struct sigevent event = {
        .sigev_notify = SIGEV_THREAD, .sigev_value.sival_ptr = launch, .sigev_notify_function = give_up};
    struct itimerspec time = {.it_value = {(time_t)limit, (long)((limit - (double)(time_t)limit) * 1e9)}};
    timer_t timer;
    launch->joined = clock_seconds();
    bool timed = launch->comm->size > 1 && limit > 0 && !timer_create(CLOCK_MONOTONIC, &event, &timer);
    if (timed) (void)timer_settime(timer, 0, &time, NULL);
    int rc = liveness_open(launch->comm, &options, &launch->liveness);
    if (timed) (void)timer_delete(timer);
    if (rc) return rc;
    liveness_phase(launch->liveness, "config");
    /* A rank may hang at the start too; every agreement is progress, and engine_open ends the watch. */
    liveness_step_begin(launch->liveness, 0);
    return OK;
}

int ranks_join(struct launch *launch, int rc)
{
    struct arguments *arguments = &launch->arguments;
    char message[1024] = "";
    if (rc) snprintf(message, sizeof message, "%s", status_message()); /* the calls below may write their own */
    TRY(comm_open_auto(&launch->comm));
    if (arguments->inject_fault) TRY(comm_wrap_fault(&launch->comm, arguments->inject_fault));
    log_set((enum log_level)arguments->config.log_level, launch->comm->size > 1 ? launch->comm->rank : -1);
    if (arguments->command && arguments->command->ranks) TRY(open_liveness(launch));
    if (rc) (void)status_set(rc, __FILE__, __LINE__, "%s", message);
    return comm_agree(launch->comm, rc, "config");
}

/* ---- agreement ---- */

/* The linker's build id lies in a note of the program itself, the first object that is visited. */
static int find_build_id(struct dl_phdr_info *info, size_t size, void *arg)
{
    uint64_t *hash = arg;
    (void)size;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        if (info->dlpi_phdr[i].p_type != PT_NOTE) continue;
        const char *p = (const char *)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr); /* NOLINT: that is its address */
        const char *end = p + info->dlpi_phdr[i].p_memsz;
        while (end - p >= (ptrdiff_t)sizeof(ElfW(Nhdr))) {
            ElfW(Nhdr) note;
            memcpy(&note, p, sizeof note);
            const char *name = p + sizeof note, *id = name + ((note.n_namesz + 3) & ~3u);
            if (note.n_type == NT_GNU_BUILD_ID && note.n_namesz == 4 && !memcmp(name, "GNU", 4))
                *hash = hash_bytes(id, note.n_descsz);
            p = id + ((note.n_descsz + 3) & ~3u);
        }
    }
    return 1;
}

static int same_everywhere(struct launch *launch)
{
    uint64_t build = hash_bytes(VITRAIL_VERSION, strlen(VITRAIL_VERSION));
    uint64_t command = hash_bytes(launch->arguments.command->name, strlen(launch->arguments.command->name));
    const struct arguments *arguments = &launch->arguments;
    (void)dl_iterate_phdr(find_build_id, &build);
    for (int i = 0; i < arguments->n; i++) {
        const struct argument *a = &arguments->given[i];
        command = hash_mix(command, hash_bytes(a->option->name, strlen(a->option->name)));
        command = hash_mix(command, hash_bytes(a->value, strlen(a->value)));
    }
    TRY(comm_same(launch->comm, "the build of vitrail", build));
    TRY(comm_same(launch->comm, "the command line", command));
    return comm_same(launch->comm, "the configuration", config_hash(launch->config));
}

static int check_size(struct launch *launch)
{
    struct config *config = &launch->arguments.config;
    int size = launch->comm->size, want = config->tensor_parallel_size;
    if (want && want != size)
        FAIL(ERR_CONFIG,
             "tensor_parallel_size is %d, but %d rank%s started; start with mpirun -np %d, or set "
             "tensor_parallel_size: auto",
             want, size, size == 1 ? " was" : "s were", want);
    config->tensor_parallel_size = size;
    return OK;
}

/* ---- device and cores ---- */

static int choose_device(struct launch *launch)
{
    struct config *config = &launch->arguments.config;
    int gpus = ops_device_count("cuda"), local = launch->comm->local_size;
    if (config->device == CONFIG_DEVICE_AUTO) config->device = gpus > 0 ? CONFIG_DEVICE_CUDA : CONFIG_DEVICE_CPU;
    if (config->device == CONFIG_DEVICE_CPU) return OK;
    if (gpus == 0)
        FAIL(ERR_CONFIG,
             "device is cuda, but no GPU can be used here (none is there, or this is a build for CPUs); set "
             "device: cpu or auto");
    if (local > gpus)
        FAIL(ERR_CONFIG,
             "%d ranks on this host share %d GPU%s, one rank needs one; start at most %d here with mpirun "
             "-np, or set device: cpu",
             local, gpus, gpus == 1 ? "" : "s", gpus);
    return OK;
}

/* The n-th number of a one-line file; -1 if there is none ("max": no quota). */
static long read_number(const char *path, int n)
{
    char line[128] = "", *at = line;
    FILE *f = fopen(path, "r");
    if (!f) return -1;
    if (!fgets(line, sizeof line, f)) line[0] = 0;
    fclose(f);
    long value = -1;
    for (int i = 0; i <= n; i++) {
        char *end;
        value = strtol(at, &end, 10);
        if (end == at) return -1;
        at = end;
    }
    return value;
}

/* Cores that the control group's quota pays for; 0: no quota. */
static int quota_cores(void)
{
    long quota = read_number("/sys/fs/cgroup/cpu.max", 0), period = read_number("/sys/fs/cgroup/cpu.max", 1);
    if (quota <= 0) {
        quota = read_number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", 0);
        period = read_number("/sys/fs/cgroup/cpu/cpu.cfs_period_us", 0);
    }
    return quota > 0 && period > 0 ? (int)((quota + period - 1) / period) : 0;
}

int ranks_cores(void)
{
    enum { MOST = 8192 };
    int cores = 1, quota = quota_cores();
    cpu_set_t *set = CPU_ALLOC(MOST);
    if (!set) return 1;
    if (!sched_getaffinity(0, CPU_ALLOC_SIZE(MOST), set)) cores = CPU_COUNT_S(CPU_ALLOC_SIZE(MOST), set);
    CPU_FREE(set);
    if (quota && quota < cores) cores = quota;
    return cores > 0 ? cores : 1;
}

/* Launchers bind each rank to one core. The kernel cuts the full set down to what the control group allows. */
static void reset_affinity(void)
{
    enum { MOST = 8192 };
    cpu_set_t *set = CPU_ALLOC(MOST);
    if (!set) return;
    memset(set, 0xff, CPU_ALLOC_SIZE(MOST));
    if (sched_setaffinity(0, CPU_ALLOC_SIZE(MOST), set)) log_line(LOG_DEBUG, "the CPU affinity could not be reset");
    CPU_FREE(set);
}

static void divide_cores(struct launch *launch)
{
    struct config *config = &launch->arguments.config;
    const struct comm *comm = launch->comm;
    /* Without a launcher a binding is the user's own (taskset, numactl) and stays. */
    if (strcmp(comm->vt->name, "self") != 0) reset_affinity();
    int cores = ranks_cores();
    if (!config->cpu_threads) config->cpu_threads = cores > comm->local_size ? cores / comm->local_size : 1;
    if (comm->rank == 0)
        log_line(LOG_INFO, "%d rank%s on %s: %d core%s on this host, %d thread%s a rank", comm->size,
                 comm->size == 1 ? "" : "s", config->device == CONFIG_DEVICE_CUDA ? "GPUs" : "CPU", cores,
                 cores == 1 ? "" : "s", config->cpu_threads, config->cpu_threads == 1 ? "" : "s");
}

int ranks_prepare(struct launch *launch)
{
    TRY(same_everywhere(launch));
    liveness_phase(launch->liveness, "device");
    int rc = check_size(launch);
    if (!rc) rc = choose_device(launch);
    TRY(comm_agree(launch->comm, rc, "device"));
    TRY(comm_same(launch->comm, "the device (cuda or cpu)", (uint64_t)launch->config->device));
    divide_cores(launch);
    return OK;
}

/* ---- engine ---- */

/* Errors that rank 0 meets outside of steps: the other ranks are waiting for a plan and can be told to end. */
static bool is_orderly(int rc)
{
    return rc == ERR_REQUEST || rc == ERR_CONFIG || rc == ERR_FORMAT || rc == ERR_IO || rc == ERR_UNSUPPORTED;
}

int ranks_serve(struct launch *launch, int (*work)(struct launch *launch, struct engine *engine, void *arg), void *arg)
{
    struct engine *engine = NULL;
    struct comm *comm = launch->comm;
    int rc = engine_open(launch->config, comm, launch->liveness, &engine);
    if (rc && comm->broken) liveness_fail(launch->liveness, rc, status_message());
    if (rc) return rc;
    if (comm->rank > 0) {
        rc = engine_follow(engine);
    } else {
        rc = work(launch, engine, arg);
        if (is_orderly(rc)) {
            char message[4096];
            snprintf(message, sizeof message, "%s", status_message());
            int stop = engine_stop(engine);
            if (stop) liveness_fail(launch->liveness, stop, status_message());
            engine_close(engine);
            (void)status_set(rc, __FILE__, __LINE__, "%s", message);
            return rc;
        }
        if (!rc) rc = engine_stop(engine);
    }
    if (rc) liveness_fail(launch->liveness, rc, status_message());
    engine_close(engine);
    return OK;
}

void ranks_leave(struct launch *launch)
{
    if (launch->comm) comm_close(launch->comm);
    liveness_leave(launch->liveness);
    launch->comm = NULL;
    launch->liveness = NULL;
}
