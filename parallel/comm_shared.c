/* comm_shared - see comm_shared.h. Each rank has two buffers, used in turn, and one counter of meetings.
 *
 * Why two buffers suffice: a rank that fills a buffer for operation k + 2 has met all others in operation k + 1, and
 * whoever was there had finished reading operation k. Messages longer than a buffer are cut; one piece is one
 * operation. */
#include "parallel/comm_shared.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "parallel/comm_private.h"
#include "parallel/segment.h"
#include "parallel/shard.h"

enum {
    BUFFER_BYTES = 256 << 10, /* stays in a second-level cache between the copy and the sum */
    DIRECT_BYTES = 16 << 10,  /* up to here everybody sums everything, saving one meeting */
    SUM_BLOCK = 2048,
    PROGRESS_EVERY = 256
};

struct port {
    _Alignas(128) _Atomic uint64_t meetings; /* of this rank, so far */
    _Alignas(128) unsigned char buffer[2][BUFFER_BYTES];
};

struct shared {
    struct comm *comm;
    void (*progress)(struct comm *c);
    struct port *port; /* [size], shared */
    const void **part; /* [size], scratch */
    uint64_t meetings;
    unsigned turn; /* which buffer is next */
};

static void sum_f32(float *sum, const float *part, size_t n)
{
    for (size_t i = 0; i < n; i++) sum[i] += part[i];
}

/* Unsigned: wraps around without undefined behaviour. */
static void sum_i64(uint64_t *sum, const uint64_t *part, size_t n)
{
    for (size_t i = 0; i < n; i++) sum[i] += part[i];
}

void comm__ordered_sum(void *sum, const void *const *part, int n_parts, enum dtype dtype, size_t n)
{
    size_t element = dtype_size(dtype);
    for (size_t at = 0; at < n; at += SUM_BLOCK) {
        size_t count = n - at < SUM_BLOCK ? n - at : SUM_BLOCK, skip = at * element;
        unsigned char *to = (unsigned char *)sum + skip;
        if (part[0] != sum) memcpy(to, (const unsigned char *)part[0] + skip, count * element);
        for (int p = 1; p < n_parts; p++) {
            const unsigned char *from = (const unsigned char *)part[p] + skip;
            if (dtype == DTYPE_F32)
                sum_f32((float *)to, (const float *)from, count);
            else
                sum_i64((uint64_t *)to, (const uint64_t *)from, count);
        }
    }
}

/* meet - returns when all ranks have called it as often as this one; what they wrote before is visible. */
static void meet(struct shared *s)
{
    unsigned rounds = 0;
    uint64_t target = ++s->meetings;
    atomic_store_explicit(&s->port[s->comm->rank].meetings, target, memory_order_release);
    for (int r = 0; r < s->comm->size; r++)
        while (atomic_load_explicit(&s->port[r].meetings, memory_order_acquire) < target) {
            /* A message of the control plane may still hang on our progress. */
            if (++rounds % PROGRESS_EVERY == 0) s->progress(s->comm);
            sched_yield();
        }
}

/* sum_all - everybody sums the whole piece. */
static void sum_all(struct shared *s, void *x, enum dtype dtype, size_t n, unsigned turn)
{
    for (int r = 0; r < s->comm->size; r++) s->part[r] = s->port[r].buffer[turn];
    comm__ordered_sum(x, s->part, s->comm->size, dtype, n);
}

/* sum_slices - rank r sums slice r into its own buffer, where nobody else reads it before they meet again. */
static void sum_slices(struct shared *s, unsigned char *x, enum dtype dtype, size_t n, unsigned turn)
{
    int size = s->comm->size;
    size_t element = dtype_size(dtype);
    struct shard_range own = shard_range((int64_t)n, 1, size, s->comm->rank);
    size_t own_at = (size_t)own.first * element;
    for (int r = 0; r < size; r++) s->part[r] = s->port[r].buffer[turn] + own_at;
    comm__ordered_sum(x + own_at, s->part, size, dtype, (size_t)own.count);
    memcpy(s->port[s->comm->rank].buffer[turn] + own_at, x + own_at, (size_t)own.count * element);
    meet(s);
    for (int r = 0; r < size; r++) {
        struct shard_range slice = shard_range((int64_t)n, 1, size, r);
        size_t at = (size_t)slice.first * element;
        if (r != s->comm->rank) memcpy(x + at, s->port[r].buffer[turn] + at, (size_t)slice.count * element);
    }
}

void comm__shared_sum(struct shared *s, void *x, enum dtype dtype, size_t n)
{
    size_t element = dtype_size(dtype), most = BUFFER_BYTES / element;
    for (size_t at = 0; at < n; at += most) {
        size_t piece = n - at < most ? n - at : most;
        unsigned char *data = (unsigned char *)x + at * element;
        unsigned turn = s->turn++ % 2;
        memcpy(s->port[s->comm->rank].buffer[turn], data, piece * element);
        meet(s);
        /* On two ranks the slices would save no memory traffic. */
        if (s->comm->size == 2 || piece * element <= DIRECT_BYTES)
            sum_all(s, data, dtype, piece, turn);
        else
            sum_slices(s, data, dtype, piece, turn);
    }
}

void comm__shared_gather(struct shared *s, void *out, const void *in, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += BUFFER_BYTES) {
        size_t piece = bytes - at < BUFFER_BYTES ? bytes - at : BUFFER_BYTES;
        unsigned turn = s->turn++ % 2;
        memcpy(s->port[s->comm->rank].buffer[turn], (const unsigned char *)in + at, piece);
        meet(s);
        for (int r = 0; r < s->comm->size; r++)
            memcpy((unsigned char *)out + (size_t)r * bytes + at, s->port[r].buffer[turn], piece);
    }
}

int comm__shared_open(struct comm *c, void (*progress)(struct comm *c), struct shared **out)
{
    size_t size = (size_t)c->size;
    void *ports = NULL;
    struct shared *s = calloc(1, sizeof *s);
    const void **part = calloc(size, sizeof *part);
    int rc = s && part ? OK : status_set(ERR_NOMEM, __FILE__, __LINE__, "no memory for a communicator");
    TRY_GOTO(comm_agree(c, rc, c->phase), rc, failed);
    TRY_GOTO(segment_open(c, size * sizeof(struct port), "messages between ranks", &ports), rc, failed);
    /* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): without s the agreement failed */
    *s = (struct shared){.comm = c, .progress = progress, .port = ports, .part = part};
    *out = s;
    return OK;
failed:
    free(part);
    free(s);
    return rc;
}

void comm__shared_close(struct shared *s)
{
    if (!s) return;
    free(s->part);
    free(s);
}
