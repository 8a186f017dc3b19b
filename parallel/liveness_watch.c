/* liveness_watch - the thread: one heartbeat a tick, a look at the peers, and the signals of the process.
 *
 * Time is counted in this thread's own ticks, never read from a clock of another process: whoever was stopped, or
 * starved of its core, counted nothing meanwhile and accuses nobody when it wakes up. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "parallel/liveness_private.h"

enum { TURN_MS = 100, POLL_MS = 5, REPORT_WAIT_MS = 500, DOUBLED_SIGNAL_TICKS = 2 };

static void sleep_ms(int ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    nanosleep(&t, NULL);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

bool liveness__process(pid_t pid, unsigned long long start_time, unsigned long long *found)
{
    char path[40], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0) close(fd);
    if (n <= 0) return kill(pid, 0) == 0 || errno != ESRCH;
    text[n] = '\0';
    /* The second field is the name in brackets and may hold anything; state is field 3, start time field 22. */
    const char *at = strrchr(text, ')');
    char state = at && at[1] ? at[2] : '\0';
    for (int field = 2; at && field < 22; field++) at = strchr(at + 1, ' ');
    if (!at) return kill(pid, 0) == 0 || errno != ESRCH;
    unsigned long long start = strtoull(at, NULL, 10);
    if (found) *found = start;
    return state != 'Z' && state != 'X' && (!start_time || start == start_time);
}

/* print_line - one line, one write: lines of several ranks must not mix. Text of files may hold line breaks. */
static void print_line(const char *text)
{
    char line[LIVENESS__LINE_BYTES + 1];
    size_t n = 0;
    for (; text[n] && n < sizeof line - 1; n++) line[n] = text[n] == '\n' || text[n] == '\r' ? ' ' : text[n];
    line[n++] = '\n';
    ssize_t ignored = write(STDERR_FILENO, line, n);
    (void)ignored;
}

_Noreturn void liveness__end(struct liveness *l, struct ending ending)
{
    struct segment *s = l->segment;
    int none = REPORT_NONE, wait_ms = ending.turn * TURN_MS;
    for (int ms = 0; ms < wait_ms && atomic_load(&s->report) == REPORT_NONE; ms += POLL_MS) sleep_ms(POLL_MS);
    if (atomic_compare_exchange_strong(&s->report, &none, REPORT_CLAIMED)) {
        atomic_store(&s->exit_code, ending.exit_code);
        if (ending.line) print_line(ending.line);
        struct slot *slot = ending.kill_slot < 0 ? NULL : &s->slot[ending.kill_slot];
        /* The pid is checked against reuse once more. */
        if (slot && liveness__process(slot->pid, slot->start_time, NULL)) kill(slot->pid, SIGKILL);
        atomic_store(&s->report, REPORT_DONE);
    }
    for (int ms = 0; ms < REPORT_WAIT_MS && atomic_load(&s->report) != REPORT_DONE; ms += POLL_MS) sleep_ms(POLL_MS);
    if (l->options.cleanup) l->options.cleanup(l->options.cleanup_argument);
    int decided = atomic_load(&s->exit_code);
    _exit(decided ? decided : ending.exit_code);
}

/* where - "decode, step 117" of a slot. */
static const char *where(struct slot *slot, char *buf, size_t size)
{
    uint64_t words[LIVENESS__PHASE_WORDS + 1] = {0};
    for (int i = 0; i < LIVENESS__PHASE_WORDS; i++)
        words[i] = atomic_load_explicit(&slot->phase[i], memory_order_relaxed);
    int n = snprintf(buf, size, "%s", (const char *)words);
    if (atomic_load(&slot->stepped) && n >= 0 && (size_t)n < size)
        snprintf(buf + n, size - (size_t)n, ", step %llu", (unsigned long long)atomic_load(&slot->step));
    return buf;
}

static bool running(struct slot *slot)
{
    return atomic_load_explicit(&slot->state, memory_order_acquire) == SLOT_RUNNING;
}

/* turn_of - how many living ranks come before this one: the lowest prints, the next only if it does not. */
static int turn_of(struct liveness *l, int culprit)
{
    int turn = 0;
    for (int i = 0; i < l->n_slots; i++)
        if (i != culprit && (i < l->me || l->me == culprit)) turn += running(&l->segment->slot[i]);
    return turn;
}

_Noreturn static void end_by_signal(struct liveness *l, int signal_number)
{
    char line[160];
    snprintf(line, sizeof line, "vitrail: ended by %s before the work was finished", strsignal(signal_number));
    liveness__end(
        l, (struct ending){.exit_code = 128 + signal_number, .line = line, .turn = turn_of(l, -1), .kill_slot = -1});
}

/* accuse - ends the job on account of `culprit`. During a stop a vanished rank is no news: the launcher lost
 * its patience, and the signal is what the user should read. */
_Noreturn static void accuse(struct liveness *l, int culprit, bool kill_it, const char *verb, const char *how)
{
    char place[96], line[256];
    struct slot *slot = &l->segment->slot[culprit];
    int stop = atomic_load(&l->segment->stop_signal);
    if (stop) end_by_signal(l, stop);
    snprintf(line, sizeof line, "vitrail: rank %d (pid %d) %s during %s: %s; all ranks stop", slot->rank,
             (int)slot->pid, verb, where(slot, place, sizeof place), how);
    liveness__end(l, (struct ending){.exit_code = status_exit_code(ERR_PEER),
                                     .line = line,
                                     .turn = turn_of(l, culprit),
                                     .kill_slot = kill_it ? culprit : -1});
}

/* look_for_the_dead - peers whose process is gone. A rank that exits in good order left before. */
static void look_for_the_dead(struct liveness *l)
{
    if (atomic_load(&l->segment->report) != REPORT_NONE)
        liveness__end(l, (struct ending){.exit_code = status_exit_code(ERR_PEER), .kill_slot = -1});
    const struct slot *own = &l->segment->slot[l->me];
    for (int i = 0; i < l->n_slots; i++) {
        struct slot *slot = &l->segment->slot[i];
        if (i == l->me || !running(slot) || slot->pid_namespace != own->pid_namespace) continue;
        if (liveness__process(slot->pid, slot->start_time, NULL)) continue;
        /* Read again, since it may have left between the two looks. A rank that reported and exited is no death. */
        if (running(slot) && atomic_load(&l->segment->report) == REPORT_NONE)
            accuse(l, i, false, "died", "killed or crashed");
    }
}

/* look_for_the_still - peers whose heartbeat stopped. They cannot answer any signal but one. */
static void look_for_the_still(struct liveness *l)
{
    for (int i = 0; i < l->n_slots; i++) {
        struct slot *slot = &l->segment->slot[i];
        struct sight *sight = &l->sight[i];
        if (i == l->me || !running(slot)) continue;
        uint64_t heartbeat = atomic_load_explicit(&slot->heartbeat, memory_order_relaxed);
        sight->still_ticks = heartbeat == sight->heartbeat ? sight->still_ticks + 1 : 0;
        sight->heartbeat = heartbeat;
        if (sight->still_ticks < LIVENESS__STILL_TICKS) continue;
        /* Killed by us as well: not every launcher ends a stopped process. */
        char how[64];
        snprintf(how, sizeof how, "no heartbeat for %d s", LIVENESS__STILL_TICKS * LIVENESS__TICK_MS / 1000);
        accuse(l, i, true, "stopped responding", how);
    }
}

/* look_for_the_stuck - the watchdog: a rank inside a step that neither changes step nor enters a collective. It may be
 * waiting in one for others; the rank that entered the fewest is the cause, also if it did not begin the step yet. */
static void look_for_the_stuck(struct liveness *l)
{
    int culprit = -1;
    uint64_t fewest = UINT64_MAX;
    bool expired = false, culprit_stuck = false;
    if (l->options.watchdog_timeout <= 0) return;
    for (int i = 0; i < l->n_slots; i++) {
        struct slot *slot = &l->segment->slot[i];
        struct sight *sight = &l->sight[i];
        uint64_t step = atomic_load(&slot->step), calls = atomic_load(&slot->calls);
        bool still = running(slot) && step == sight->step && calls == sight->calls;
        bool stuck = still && atomic_load(&slot->busy);
        sight->stuck_ticks = stuck ? sight->stuck_ticks + 1 : 0;
        sight->step = step;
        sight->calls = calls;
        if (!still) continue;
        expired = expired || (stuck && sight->stuck_ticks * LIVENESS__TICK_MS >= 1000 * l->options.watchdog_timeout);
        if (calls < fewest || (calls == fewest && stuck && !culprit_stuck)) {
            fewest = calls;
            culprit = i;
            culprit_stuck = stuck;
        }
    }
    if (!expired) return;
    char how[96];
    snprintf(how, sizeof how, "no progress for %g s (watchdog_timeout)", l->options.watchdog_timeout);
    accuse(l, culprit, false, "hung", how);
}

/* take_signal - first look who died: the launcher sends SIGTERM to the survivors of a crash. Else it is a request to
 * stop in good order, and a second one a while later means at once (launchers send some twice in a row). */
static void take_signal(struct liveness *l, int signal_number)
{
    look_for_the_dead(l);
    int none = 0;
    atomic_compare_exchange_strong(&l->segment->stop_signal, &none, signal_number);
    if (l->signals++ == 0)
        l->ticks_since_signal = 0;
    else if (l->ticks_since_signal >= DOUBLED_SIGNAL_TICKS)
        end_by_signal(l, signal_number);
}

static void tick(struct liveness *l)
{
    atomic_fetch_add_explicit(&l->segment->slot[l->me].heartbeat, 1, memory_order_relaxed);
    look_for_the_dead(l);
    look_for_the_still(l);
    look_for_the_stuck(l);
    l->ticks_since_signal++;
    int stop = atomic_load(&l->segment->stop_signal);
    if (stop && ++l->ticks_since_stop * LIVENESS__TICK_MS > 1000 * l->options.stop_grace) end_by_signal(l, stop);
}

void *liveness__watch(void *argument)
{
    struct liveness *l = argument;
    sigset_t set;
    liveness__signals(&set);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    double next = now();
    for (;;) {
        double wait = next - now();
        if (wait < 0) wait = 0;
        struct timespec t = {.tv_sec = (time_t)wait, .tv_nsec = (long)((wait - (double)(time_t)wait) * 1e9)};
        int signal_number = sigtimedwait(&set, NULL, &t);
        if (atomic_load_explicit(&l->leaving, memory_order_acquire)) return NULL;
        if (signal_number > 0) take_signal(l, signal_number);
        if (now() < next) continue;
        tick(l);
        next = now() + LIVENESS__TICK_MS / 1000.0;
    }
}
