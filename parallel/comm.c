/* comm - what all communicators have in common: argument checks, the broken state, and the collectives that are
 * made of others (agreement, same-hash, barrier). */
#include "parallel/comm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "parallel/comm_private.h"

enum { AGREE_TEXT_BYTES = 4096 };

int comm_open(const char *kind, struct comm **out)
{
    *out = NULL;
    if (!strcmp(kind, "self")) return comm__open_self(out);
    if (!strcmp(kind, "mpi")) return comm__open_mpi(true, out);
    if (!strcmp(kind, "mpi-messages")) return comm__open_mpi(false, out);
    FAIL(ERR_CONFIG, "communicator '%s' is unknown: expected self, mpi or mpi-messages", kind);
}

int comm_open_auto(struct comm **out)
{
    /* Set by the launcher in each rank: Open MPI, MPICH and Slurm (PMI-1, PMI-2), anything that speaks PMIx. */
    static const char *const launcher[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK", "PMIX_RANK"};
    for (size_t i = 0; i < sizeof launcher / sizeof *launcher; i++)
        if (getenv(launcher[i])) return comm_open("mpi", out);
    return comm_open("self", out);
}

void comm_close(struct comm *c)
{
    if (c) c->vt->close(c);
}

/* sound - the error of an earlier collective, whose message comes back with it. */
static int sound(const struct comm *c)
{
    if (c->broken) FAIL(c->broken, "%s", c->broken_text);
    return OK;
}

/* settle - remembers the first failure: ranks no longer stand at the same collective, so no other may start. */
static int settle(struct comm *c, int rc)
{
    if (!rc) return OK;
    c->broken = rc;
    snprintf(c->broken_text, sizeof c->broken_text, "%s", status_message());
    return rc;
}

int comm_reserve(struct comm *c, size_t max_bytes)
{
    if (max_bytes <= c->reserved_bytes) return OK;
    TRY(c->vt->reserve(c, max_bytes));
    c->reserved_bytes = max_bytes;
    return OK;
}

static int check_all_reduce(const struct comm *c, struct tensor x)
{
    char shape[96];
    if (x.dtype != DTYPE_F32 && x.dtype != DTYPE_I64)
        FAIL(ERR_BUG, "all-reduce of %s: only float32 and int64 are summed", tensor_describe(x, shape, sizeof shape));
    if (!tensor_is_dense(x))
        FAIL(ERR_BUG, "all-reduce of %s: the view is not dense", tensor_describe(x, shape, sizeof shape));
    if (tensor_bytes(x) > c->reserved_bytes)
        FAIL(ERR_BUG, "all-reduce of %s takes %zu bytes, but comm_reserve announced %zu at start-up",
             tensor_describe(x, shape, sizeof shape), tensor_bytes(x), c->reserved_bytes);
    return OK;
}

int comm_all_reduce_sum(struct comm *c, struct tensor x, void *stream)
{
    TRY(sound(c));
    if (tensor_count(x) == 0) return OK;
    int rc = check_all_reduce(c, x);
    return settle(c, rc ? rc : c->vt->all_reduce_sum(c, x, stream));
}

static int check_all_gather(const struct comm *c, struct tensor out, struct tensor in)
{
    char a[96], b[96];
    if (out.dtype == in.dtype && tensor_is_dense(out) && tensor_is_dense(in) &&
        tensor_count(out) == tensor_count(in) * c->size)
        return OK;
    FAIL(ERR_BUG,
         "all-gather of %s over %d ranks into %s: expected dense views of one dtype, the result %d times as large",
         tensor_describe(in, a, sizeof a), c->size, tensor_describe(out, b, sizeof b), c->size);
}

int comm_all_gather(struct comm *c, struct tensor out, struct tensor in, void *stream)
{
    TRY(sound(c));
    int rc = check_all_gather(c, out, in);
    if (!rc && tensor_count(in) == 0) return OK;
    return settle(c, rc ? rc : c->vt->all_gather(c, out, in, stream));
}

int comm_broadcast(struct comm *c, void *buf, size_t n, int root)
{
    TRY(sound(c));
    return n ? settle(c, c->vt->broadcast(c, buf, n, root, false)) : OK;
}

int comm_broadcast_idle(struct comm *c, void *buf, size_t n, int root)
{
    TRY(sound(c));
    return n ? settle(c, c->vt->broadcast(c, buf, n, root, true)) : OK;
}

int comm_gather(struct comm *c, void *out, const void *in, size_t n_each, int root)
{
    TRY(sound(c));
    return n_each ? settle(c, c->vt->gather(c, out, in, n_each, root)) : OK;
}

int comm_all_gather_host(struct comm *c, void *out, const void *in, size_t n_each)
{
    TRY(sound(c));
    return n_each ? settle(c, c->vt->all_gather_host(c, out, in, n_each)) : OK;
}

int comm_agree(struct comm *c, int code, const char *phase)
{
    int codes[COMM__MAX_RANKS];
    char text[AGREE_TEXT_BYTES];
    TRY(sound(c));
    comm_phase(c, phase);
    if (c->vt->before_agree) code = c->vt->before_agree(c, code);
    if (c->size == 1) return code;
    /* Taken before any call below can write a message of its own. */
    snprintf(text, sizeof text, "%s", code ? status_message() : "");
    TRY(comm_all_gather_host(c, codes, &code, sizeof code));
    int failed = 0;
    while (failed < c->size && codes[failed] == OK) failed++;
    if (failed == c->size) return OK;
    TRY(comm_broadcast(c, text, sizeof text, failed));
    text[sizeof text - 1] = '\0';
    FAIL(codes[failed], "rank %d: %s", failed, text);
}

int comm_same(struct comm *c, const char *what, uint64_t hash)
{
    uint64_t hashes[COMM__MAX_RANKS];
    char list[256] = "";
    size_t used = 0;
    TRY(comm_all_gather_host(c, hashes, &hash, sizeof hash));
    for (int r = 1; r < c->size && used < sizeof list - 16; r++)
        if (hashes[r] != hashes[0])
            used += (size_t)snprintf(list + used, sizeof list - used, "%s%d", used ? ", " : "", r);
    if (!used) return OK;
    FAIL(ERR_PEER,
         "%s is not the same on all ranks: rank 0 differs from rank %s; start the same program with the same arguments "
         "and files everywhere",
         what, list);
}

int comm_barrier(struct comm *c)
{
    char token = 0, tokens[COMM__MAX_RANKS];
    return comm_all_gather_host(c, tokens, &token, sizeof token);
}

void comm_phase(struct comm *c, const char *phase)
{
    if (phase != c->phase) snprintf(c->phase, sizeof c->phase, "%s", phase); /* comm_agree(c, rc, c->phase) is fine */
}

void comm_watch(struct comm *c, _Atomic uint64_t *calls, const _Atomic int *stop_signal)
{
    if (c->vt->watch) {
        c->vt->watch(c, calls, stop_signal);
        return;
    }
    c->calls = calls;
    c->stop_signal = stop_signal;
}

_Noreturn void comm_abort(struct comm *c, int code)
{
    c->vt->abort(c, status_exit_code(code));
    _exit(status_exit_code(code));
}
