/* liveness - joining and leaving the watch, and the marks that the program sets; see liveness_watch.c for the thread.
 *
 * The segment's name is random, exists only until all ranks of the host have attached, and nothing is left behind
 * however the job ends. It is never unmapped: the communicator counts its calls in it until the process is gone. */
#include "parallel/liveness.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "parallel/liveness_private.h"

void liveness__signals(sigset_t *set)
{
    static const int wanted[] = {SIGTERM, SIGINT, SIGHUP};
    sigemptyset(set);
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        struct sigaction action;
        /* nohup and shells' background jobs ignore some; a blocked signal would be taken in spite of that. */
        if (!sigaction(wanted[i], NULL, &action) && action.sa_handler != SIG_IGN) sigaddset(set, wanted[i]);
    }
}

void liveness_block_signals(void)
{
    sigset_t set;
    liveness__signals(&set);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
}

static size_t segment_bytes(int n_slots) { return sizeof(struct segment) + (size_t)n_slots * sizeof(struct slot); }

static int map(struct liveness *l, int fd)
{
    int flags = fd < 0 ? MAP_SHARED | MAP_ANONYMOUS : MAP_SHARED;
    void *at = mmap(NULL, segment_bytes(l->n_slots), PROT_READ | PROT_WRITE, flags, fd, 0);
    if (at == MAP_FAILED) FAIL(ERR_IO, "cannot map shared memory for the ranks' heartbeats: %s", strerror(errno));
    l->segment = at;
    return OK;
}

/* create - the first local rank makes the segment; its memory is taken now, since a full /dev/shm met at the
 * first write would be a SIGBUS. */
static int create(struct liveness *l, const char *name)
{
    int fd = shm_open(name, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0) FAIL(ERR_IO, "cannot create shared memory %s (/dev/shm): %s", name, strerror(errno));
    int error = posix_fallocate(fd, 0, (off_t)segment_bytes(l->n_slots));
    int rc = error ? status_set(ERR_IO, __FILE__, __LINE__, "cannot take %zu bytes of shared memory in /dev/shm: %s",
                                segment_bytes(l->n_slots), strerror(error))
                   : map(l, fd);
    close(fd);
    return rc;
}

static int attach(struct liveness *l, const char *name)
{
    int fd = shm_open(name, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) FAIL(ERR_IO, "cannot open shared memory %s of the first rank of this host: %s", name, strerror(errno));
    int rc = map(l, fd);
    close(fd);
    return rc;
}

static void set_phase(struct slot *slot, const char *phase)
{
    uint64_t words[LIVENESS__PHASE_WORDS] = {0};
    strncpy((char *)words, phase, sizeof words - 1);
    for (int i = 0; i < LIVENESS__PHASE_WORDS; i++)
        atomic_store_explicit(&slot->phase[i], words[i], memory_order_relaxed);
}

static ino_t pid_namespace(void)
{
    struct stat s;
    return stat("/proc/self/ns/pid", &s) ? 0 : s.st_ino;
}

/* join - fills the own slot and starts the thread. */
static int join(struct liveness *l)
{
    struct slot *own = &l->segment->slot[l->me];
    own->rank = l->rank;
    own->pid = getpid();
    liveness__process(own->pid, 0, &own->start_time);
    own->pid_namespace = pid_namespace();
    set_phase(own, "start");
    atomic_store_explicit(&own->state, SLOT_RUNNING, memory_order_release);
    liveness_block_signals(); /* a no-op if main did it, as it should */
    int error = pthread_create(&l->thread, NULL, liveness__watch, l);
    if (!error) return OK;
    atomic_store_explicit(&own->state, SLOT_LEFT, memory_order_release);
    FAIL(ERR_IO, "cannot start the heartbeat thread: %s", strerror(error));
}

/* attach_all - the collective part: the first local rank creates, the others attach, all join. Every early return
 * is one that all ranks take. */
static int attach_all(struct liveness *l, bool *joined)
{
    struct comm *c = l->comm;
    uint64_t id = 0;
    char name[40];
    if (c->rank == 0 && getrandom(&id, sizeof id, 0) != sizeof id) id = (uint64_t)getpid();
    TRY(comm_broadcast(c, &id, sizeof id, 0));
    snprintf(name, sizeof name, "/vitrail-%016llx", (unsigned long long)id);
    int rc = l->n_slots == 1 ? map(l, -1) : l->me == 0 ? create(l, name) : OK;
    rc = comm_agree(c, rc, "start");
    if (!rc) {
        if (l->me > 0) rc = attach(l, name);
        if (!rc) rc = join(l);
        *joined = !rc;
        rc = comm_agree(c, rc, "start");
    }
    if (l->me == 0 && l->n_slots > 1) shm_unlink(name);
    return rc;
}

int liveness_open(struct comm *c, const struct liveness_options *options, struct liveness **out)
{
    *out = NULL;
    bool joined = false;
    struct liveness *l = calloc(1, sizeof *l);
    struct sight *sight = calloc((size_t)c->local_size, sizeof *sight);
    int rc = l && sight ? OK : status_set(ERR_NOMEM, __FILE__, __LINE__, "no memory for %d heartbeats", c->local_size);
    TRY_GOTO(comm_agree(c, rc, "start"), rc, failed);
    *l = (struct liveness){.comm = c,
                           .options = *options,
                           .rank = c->rank,
                           .size = c->size,
                           .n_slots = c->local_size,
                           .me = c->local_rank,
                           .sight = sight};
    if (l->options.stop_grace <= 0) l->options.stop_grace = 10;
    TRY_GOTO(attach_all(l, &joined), rc, failed);
    comm_watch(c, &l->segment->slot[l->me].calls, &l->segment->stop_signal);
    *out = l;
    return OK;
failed:
    if (joined) {
        liveness_leave(l);
        return rc;
    }
    free(sight);
    free(l);
    return rc;
}

void liveness_phase(struct liveness *l, const char *phase)
{
    set_phase(&l->segment->slot[l->me], phase);
    comm_phase(l->comm, phase);
}

void liveness_step_begin(struct liveness *l, uint64_t step)
{
    struct slot *own = &l->segment->slot[l->me];
    atomic_store_explicit(&own->step, step, memory_order_relaxed);
    atomic_store_explicit(&own->stepped, true, memory_order_relaxed);
    atomic_store_explicit(&own->busy, true, memory_order_release);
}

void liveness_step_end(struct liveness *l)
{
    atomic_store_explicit(&l->segment->slot[l->me].busy, false, memory_order_release);
}

int liveness_stop_requested(const struct liveness *l)
{
    return atomic_load_explicit(&l->segment->stop_signal, memory_order_relaxed);
}

_Noreturn void liveness_fail(struct liveness *l, int code, const char *text)
{
    char line[LIVENESS__LINE_BYTES];
    if (l->size > 1)
        snprintf(line, sizeof line, "vitrail: stopped by rank %d: %s", l->rank, text);
    else
        snprintf(line, sizeof line, "vitrail: %s", text);
    liveness__end(l, (struct ending){.exit_code = status_exit_code(code), .line = line, .kill_slot = -1});
}

void liveness_leave(struct liveness *l)
{
    if (!l) return;
    atomic_store_explicit(&l->segment->slot[l->me].state, SLOT_LEFT, memory_order_release);
    atomic_store_explicit(&l->leaving, true, memory_order_release);
    pthread_kill(l->thread, SIGTERM); /* only to wake it: it looks at `leaving` first */
    pthread_join(l->thread, NULL);
    free(l->sight);
    free(l);
}
