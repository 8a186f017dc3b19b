/* comm_nvlink - sums and gathers over peer memory: the GPUs of one host write into each other's windows, over NVLink or
 * PCIe. Belongs to comm_nccl, which opens it where all GPUs reach each other and chooses by size, from times taken at
 * start-up, between NCCL and the two ways below. Knows nothing of communicators: the caller carries the cards.
 *
 *   lines   every 8 bytes that cross hold 4 of data and 4 that say which operation they belong to: no flag, no
 *           fence, one way across and done. Twice the bytes, so for small messages.
 *   chunks  plain copies, a flag behind each chunk; a block has one chunk on its way while it adds up the one before.
 *
 * Everybody sends all to everybody and adds up in rank order, in float32, rounded once: the same bits on every rank.
 * What an operation needs to know of the ones before it is counted in device memory by the kernels themselves, so they
 * may be captured in a graph and replayed. */
#ifndef VITRAIL_PARALLEL_COMM_NVLINK_H
#define VITRAIL_PARALLEL_COMM_NVLINK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "base/status.h"
#include "base/tensor.h"

enum { NVLINK_MAX_RANKS = 8 };

struct nvlink;

/* What a rank tells the others about its window. */
struct nvlink_card {
    unsigned char handle[64]; /* cudaIpcMemHandle_t */
    char bus_id[32];          /* of its device */
};

/* comm__nvlink_open - takes this rank's window on `device` and fills in its card. comm__nvlink_connect - maps the
 * others' windows; `cards` of all ranks. Both local; ERR_UNSUPPORTED where the devices cannot reach each other.
 * comm__nvlink_disconnect - lets go of the others' windows, comm__nvlink_close - of the own one, which nobody may have
 * mapped then. NULL is fine. */
int comm__nvlink_open(int rank, int size, int device, struct nvlink_card *card, struct nvlink **out) MUST_CHECK;
int comm__nvlink_connect(struct nvlink *n, const struct nvlink_card *cards) MUST_CHECK;
void comm__nvlink_disconnect(struct nvlink *n);
void comm__nvlink_close(struct nvlink *n);

/* comm__nvlink_interrupt - kernels that wait for a peer end, with garbage, and so do all later ones. Any thread. */
void comm__nvlink_interrupt(struct nvlink *n);

/* comm__nvlink_takes - whether a message of these bytes can go this way: by the size alone, the same on all ranks. */
bool comm__nvlink_takes(const struct nvlink *n, bool lines, size_t bytes);

/* The operations, enqueued on `stream`. all_reduce: dtype F32, BF16 or F16, in place, any alignment of whole elements.
 * all_gather: out[r * bytes] := rank r's `in`; bytes even; `in` may be its own place in out. */
int comm__nvlink_all_reduce(struct nvlink *n, bool lines, void *x, enum dtype dtype, size_t bytes,
                            void *stream) MUST_CHECK;
int comm__nvlink_all_gather(struct nvlink *n, bool lines, void *out, const void *in, size_t bytes,
                            void *stream) MUST_CHECK;

/* comm__nvlink_add_norm - lines, a block a row: residual += sum over ranks of x; out = RMSNorm(residual) * weight. All
 * [rows, width], dense, 16-byte aligned, BF16 or F16; weight float32. comm__nvlink_norm_takes - by shape and dtype. */
bool comm__nvlink_norm_takes(const struct nvlink *n, int64_t rows, int64_t width, enum dtype dtype);
int comm__nvlink_add_norm(struct nvlink *n, const void *x, void *residual, const float *weight, float epsilon,
                          void *out, int64_t rows, int64_t width, enum dtype dtype, void *stream) MUST_CHECK;

/* comm__nvlink_scale - x *= factor: for tests, the dependent step between two sums. Needs no window. */
int comm__nvlink_scale(float *x, size_t n, float factor, void *stream) MUST_CHECK;

/* comm__nvlink_break - for tests: a kernel that writes where no memory is. Every later call of the process on this
 * device fails. */
int comm__nvlink_break(void *stream) MUST_CHECK;

/* comm__cuda_failed - ERR_DEVICE naming the call and what the driver said. */
int comm__cuda_failed(const char *what, int error) MUST_CHECK;
#define COMM_CUDA_TRY(call)                                                                                            \
    do {                                                                                                               \
        int cuda_error = (int)(call);                                                                                  \
        if (cuda_error) return comm__cuda_failed(#call, cuda_error);                                                   \
    } while (0)

#ifdef __cplusplus
}
#endif

#endif
