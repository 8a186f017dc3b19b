/* comm_fault - a communicator that breaks on purpose: tests place a fault at a counted collective or in a named
 * phase of one rank, and watch the others. The rest of the program cannot tell it from the communicator inside. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "parallel/comm_private.h"

enum action {
    ACTION_NONE,
    ACTION_ERROR,
    ACTION_EXIT,
    ACTION_KILL,
    ACTION_STOP,
    ACTION_HANG,
    ACTION_STICKY,
    ACTION_DELAY
};

struct fault {
    struct comm *inner;
    enum action action;
    int rank;       /* -1: every rank */
    char phase[32]; /* "": any */
    uint64_t call;  /* 1 = the first */
    uint64_t seen;  /* calls so far that matched the phase */
    long delay_ms;
    bool in_agreement; /* the call was counted by before_agree already */
};

static const char *const action_names[] = {"", "error", "exit", "kill", "stop", "hang", "sticky", "delay"};

static void sleep_ms(long ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

/* strike - counts this call and, if it is the one, does what was asked. ERR_COMM for action=error. */
static int strike(struct comm *c)
{
    struct fault *f = c->impl;
    f->inner->device = c->device; /* who waits there asks it */
    if (f->rank >= 0 && f->rank != c->rank) return OK;
    if (f->phase[0] && strcmp(f->phase, c->phase) != 0) return OK;
    f->seen++;
    if (f->action == ACTION_DELAY ? f->seen < f->call : f->seen != f->call) return OK;
    switch (f->action) {
    case ACTION_ERROR:
        FAIL(ERR_COMM, "injected fault at collective %llu%s%s", (unsigned long long)f->seen, c->phase[0] ? " in " : "",
             c->phase);
    case ACTION_EXIT: _exit(9);
    case ACTION_KILL: raise(SIGKILL); break;
    case ACTION_STOP: raise(SIGSTOP); break;
    case ACTION_HANG:
        for (;;) sleep_ms(1000);
    case ACTION_STICKY:
        if (!c->device) FAIL(ERR_UNSUPPORTED, "injected fault: action sticky, but no device communicator is open");
        return c->device->vt->break_device(c->device);
    case ACTION_DELAY: sleep_ms(f->delay_ms); break;
    case ACTION_NONE: break;
    }
    return OK;
}

static struct comm *inner_of(struct comm *c) { return ((struct fault *)c->impl)->inner; }

static int all_reduce_sum(struct comm *c, struct tensor x, void *stream)
{
    TRY(strike(c));
    return inner_of(c)->vt->all_reduce_sum(inner_of(c), x, stream);
}

static int all_gather(struct comm *c, struct tensor out, struct tensor in, void *stream)
{
    TRY(strike(c));
    return inner_of(c)->vt->all_gather(inner_of(c), out, in, stream);
}

static int broadcast(struct comm *c, void *buf, size_t n, int root, bool idle)
{
    TRY(strike(c));
    return inner_of(c)->vt->broadcast(inner_of(c), buf, n, root, idle);
}

static int gather(struct comm *c, void *out, const void *in, size_t n_each, int root)
{
    TRY(strike(c));
    return inner_of(c)->vt->gather(inner_of(c), out, in, n_each, root);
}

static int all_gather_host(struct comm *c, void *out, const void *in, size_t n_each)
{
    struct fault *f = c->impl;
    bool counted = f->in_agreement;
    f->in_agreement = false;
    if (!counted) TRY(strike(c));
    return f->inner->vt->all_gather_host(f->inner, out, in, n_each);
}

static int before_agree(struct comm *c, int code)
{
    struct fault *f = c->impl;
    f->in_agreement = c->size > 1;
    int rc = strike(c);
    return rc ? rc : code;
}

static int reserve(struct comm *c, size_t max_bytes) { return inner_of(c)->vt->reserve(inner_of(c), max_bytes); }

static void watch(struct comm *c, _Atomic uint64_t *calls, const _Atomic int *stop_signal)
{
    comm_watch(inner_of(c), calls, stop_signal);
}

static void abort_job(struct comm *c, int exit_code) { inner_of(c)->vt->abort(inner_of(c), exit_code); }

static void close_fault(struct comm *c)
{
    struct fault *f = c->impl;
    f->inner->broken = c->broken;
    comm_close(f->inner);
    free(f);
    free(c);
}

static const struct comm_vt fault_vt = {
    .name = "fault",
    .all_reduce_sum = all_reduce_sum,
    .all_gather = all_gather,
    .broadcast = broadcast,
    .gather = gather,
    .all_gather_host = all_gather_host,
    .reserve = reserve,
    .before_agree = before_agree,
    .before_data = strike,
    .watch = watch,
    .abort = abort_job,
    .close = close_fault,
};

static int parse_number(const char *spec, const char *text, long min, long *out)
{
    char *end;
    long value = strtol(text, &end, 10);
    if (end == text || *end || value < min || value > 1000000000)
        FAIL(ERR_CONFIG, "fault '%s': '%s' is not a number of at least %ld", spec, text, min);
    *out = value;
    return OK;
}

static int parse_action(struct fault *f, const char *spec, char *value)
{
    char *milliseconds = strchr(value, ':');
    if (milliseconds) *milliseconds++ = '\0';
    for (int a = ACTION_ERROR; a <= ACTION_DELAY; a++)
        if (!strcmp(value, action_names[a])) f->action = (enum action)a;
    if (f->action == ACTION_NONE || (f->action == ACTION_DELAY) != (milliseconds != NULL))
        FAIL(ERR_CONFIG, "fault '%s': action must be error, exit, kill, stop, hang, sticky or delay:MS", spec);
    return milliseconds ? parse_number(spec, milliseconds, 0, &f->delay_ms) : OK;
}

static int parse_item(struct fault *f, const char *spec, char *item)
{
    long number = 0;
    char *value = strchr(item, '=');
    if (!value) FAIL(ERR_CONFIG, "fault '%s': expected key=value, found '%s'", spec, item);
    *value++ = '\0';
    if (!strcmp(item, "action")) return parse_action(f, spec, value);
    if (!strcmp(item, "rank")) {
        TRY(parse_number(spec, value, 0, &number));
        f->rank = (int)number;
        return OK;
    }
    if (!strcmp(item, "call")) {
        TRY(parse_number(spec, value, 1, &number));
        f->call = (uint64_t)number;
        return OK;
    }
    if (strcmp(item, "phase") != 0)
        FAIL(ERR_CONFIG, "fault '%s': '%s' is none of rank, call, phase, action", spec, item);
    snprintf(f->phase, sizeof f->phase, "%s", value);
    return OK;
}

static int parse(struct fault *f, const char *spec)
{
    char copy[256], *save = NULL;
    if (snprintf(copy, sizeof copy, "%s", spec) >= (int)sizeof copy)
        FAIL(ERR_CONFIG, "fault '%.40s...' is longer than %zu bytes", spec, sizeof copy - 1);
    for (char *item = strtok_r(copy, ",", &save); item; item = strtok_r(NULL, ",", &save))
        TRY(parse_item(f, spec, item));
    if (f->action == ACTION_NONE) FAIL(ERR_CONFIG, "fault '%s' has no action", spec);
    return OK;
}

int comm_wrap_fault(struct comm **c, const char *spec)
{
    struct fault parsed = {.inner = *c, .rank = -1, .call = 1};
    TRY(parse(&parsed, spec));
    struct fault *f = malloc(sizeof *f);
    struct comm *outer = malloc(sizeof *outer);
    if (!f || !outer) {
        free(f);
        free(outer);
        FAIL(ERR_NOMEM, "no memory for a communicator");
    }
    *f = parsed;
    *outer = **c;
    outer->vt = &fault_vt;
    outer->impl = f;
    *c = outer;
    return OK;
}
