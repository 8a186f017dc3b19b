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

int comm_device_open(struct comm *control, int device, void *stream, size_t max_bytes, struct comm **out)
{
    *out = NULL;
#ifdef VITRAIL_CUDA
    TRY(comm__device_open(control, device, stream, max_bytes, out));
    control->device = *out;
    return OK;
#else
    (void)control, (void)stream, (void)max_bytes;
    FAIL(ERR_UNSUPPORTED, "communicator of device %d: this build has no CUDA; configure with -DVITRAIL_CUDA=ON",
         device);
#endif
}

void comm_close(struct comm *c)
{
    if (!c) return;
    if (c->control) c->control->device = NULL;
    c->vt->close(c);
}

/* sound - the error of an earlier collective, whose message comes back with it. */
static int sound(const struct comm *c)
{
    for (; c; c = c->control)
        if (c->broken) FAIL(c->broken, "%s", c->broken_text);
    return OK;
}

/* comm__settle - remembers the first failure: ranks no longer stand at the same collective, so no other may start, nor
 * one of the communicator that this one stands on. */
int comm__settle(struct comm *c, int rc)
{
    for (; rc && c; c = c->control) {
        c->broken = rc;
        snprintf(c->broken_text, sizeof c->broken_text, "%s", status_message());
    }
    return rc;
}

int comm_reserve(struct comm *c, size_t max_bytes)
{
    if (max_bytes <= c->reserved_bytes) return OK;
    TRY(c->vt->reserve(c, max_bytes));
    c->reserved_bytes = max_bytes;
    return OK;
}

/* before_data - for faults: they are injected into the communicator below. */
static int before_data(struct comm *c)
{
    return c->control && c->control->vt->before_data ? c->control->vt->before_data(c->control) : OK;
}

static int check_all_reduce(const struct comm *c, struct tensor x)
{
    char shape[96];
    bool half = x.dtype == DTYPE_F16 || x.dtype == DTYPE_BF16;
    if (x.dtype != DTYPE_F32 && x.dtype != DTYPE_I64 && !(half && c->vt->sums_half))
        FAIL(ERR_BUG, "all-reduce of %s: only float32 and int64 are summed%s", tensor_describe(x, shape, sizeof shape),
             half ? ", 16-bit floats on GPUs alone" : "");
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
    if (!rc) rc = before_data(c);
    return comm__settle(c, rc ? rc : c->vt->all_reduce_sum(c, x, stream));
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
    if (!rc) rc = before_data(c);
    return comm__settle(c, rc ? rc : c->vt->all_gather(c, out, in, stream));
}

/* check_add_norm - model/ passes what it would pass to the norm op: only what the kernel relies on. */
static int check_add_norm(struct tensor x, struct tensor residual, struct tensor weight, struct tensor out)
{
    char a[96], b[96], w[96];
    bool alike = x.n_dims == 2 && tensor_is_dense(x);
    const struct tensor *other[] = {&residual, &out};
    for (int i = 0; i < 2; i++)
        alike = alike && other[i]->n_dims == 2 && other[i]->dtype == x.dtype && tensor_is_dense(*other[i]) &&
                other[i]->dim[0] == x.dim[0] && other[i]->dim[1] == x.dim[1];
    if (alike && weight.dtype == DTYPE_F32 && tensor_is_dense(weight) && tensor_count(weight) == x.dim[1]) return OK;
    FAIL(ERR_BUG,
         "all-reduce with norm of %s, residual %s, weight %s: expected dense rows alike and a float32 of each "
         "column",
         tensor_describe(x, a, sizeof a), tensor_describe(residual, b, sizeof b), tensor_describe(weight, w, sizeof w));
}

int comm_all_reduce_add_norm(struct comm *c, struct tensor x, struct tensor residual, struct tensor weight,
                             float epsilon, struct tensor out, void *stream)
{
    TRY(sound(c));
    if (!c->vt->all_reduce_add_norm || c->size == 1 || tensor_count(x) == 0) return COMM_DECLINED;
    int rc = check_all_reduce(c, x);
    if (!rc) rc = check_add_norm(x, residual, weight, out);
    if (!rc) rc = c->vt->all_reduce_add_norm(c, x, residual, weight, epsilon, out, stream);
    if (!rc) rc = before_data(c); /* afterwards: what is declined comes again as a plain sum */
    return rc == COMM_DECLINED ? rc : comm__settle(c, rc);
}

int comm_broadcast(struct comm *c, void *buf, size_t n, int root)
{
    TRY(sound(c));
    return n ? comm__settle(c, c->vt->broadcast(c, buf, n, root, false)) : OK;
}

int comm_broadcast_idle(struct comm *c, void *buf, size_t n, int root)
{
    TRY(sound(c));
    return n ? comm__settle(c, c->vt->broadcast(c, buf, n, root, true)) : OK;
}

int comm_gather(struct comm *c, void *out, const void *in, size_t n_each, int root)
{
    TRY(sound(c));
    return n_each ? comm__settle(c, c->vt->gather(c, out, in, n_each, root)) : OK;
}

int comm_all_gather_host(struct comm *c, void *out, const void *in, size_t n_each)
{
    TRY(sound(c));
    return n_each ? comm__settle(c, c->vt->all_gather_host(c, out, in, n_each)) : OK;
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
    for (; c; c = c->control) /* comm_agree(c, rc, c->phase) is fine */
        if (phase != c->phase) snprintf(c->phase, sizeof c->phase, "%s", phase);
}

void comm_watch(struct comm *c, _Atomic uint64_t *calls, const _Atomic int *stop_signal)
{
    if (c->vt->watch) c->vt->watch(c, calls, stop_signal);
    /* Of a wrapper too, which counts nothing itself: a device communicator opened on it later takes them from here. */
    c->calls = calls;
    c->stop_signal = stop_signal;
}

int comm_poll(struct comm *c)
{
    TRY(sound(c));
    return c->vt->poll ? comm__settle(c, c->vt->poll(c)) : OK;
}

void comm_interrupt(struct comm *c)
{
    if (c && c->vt->interrupt) c->vt->interrupt(c);
}

_Noreturn void comm_abort(struct comm *c, int code)
{
    c->vt->abort(c, status_exit_code(code));
    _exit(status_exit_code(code));
}
