/* Copies between host and device. Uploads go through a ring of pinned pieces: the caller's memory is free on return,
 * small ones of one step share a piece, also those that run aside, and the host waits only when it is a whole ring
 * ahead of the device. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda.h"

enum { PIECES = 4, PIECE_BYTES = 8 << 20, UPLOAD_ALIGNMENT = 64 };

struct cuda_upload {
    char *pinned;
    cudaEvent_t done[PIECES][2]; /* the copies out of a piece, of either stream */
    bool recorded[PIECES];
    int piece;
    size_t used;
};

int cuda__upload_open(struct cuda *c)
{
    c->upload = calloc(1, sizeof *c->upload);
    if (!c->upload) FAIL(ERR_NOMEM, "cuda: out of host memory");
    CUDA_TRY(cudaHostAlloc((void **)&c->upload->pinned, (size_t)PIECES * PIECE_BYTES, cudaHostAllocDefault));
    for (int i = 0; i < 2 * PIECES; i++)
        CUDA_TRY(cudaEventCreateWithFlags(&c->upload->done[i / 2][i % 2], cudaEventDisableTiming));
    return OK;
}

void cuda__upload_close(struct cuda *c)
{
    struct cuda_upload *u = c->upload;
    if (!u) return;
    for (int i = 0; i < 2 * PIECES; i++)
        if (u->done[i / 2][i % 2]) (void)cudaEventDestroy(u->done[i / 2][i % 2]);
    if (u->pinned) (void)cudaFreeHost(u->pinned);
    free(u);
    c->upload = NULL;
}

static int next_piece(struct ops *o)
{
    struct cuda *c = cuda__of(o);
    struct cuda_upload *u = c->upload;
    CUDA_TRY(cudaEventRecord(u->done[u->piece][0], c->stream));
    CUDA_TRY(cudaEventRecord(u->done[u->piece][1], c->aside));
    u->recorded[u->piece] = true;
    u->piece = (u->piece + 1) % PIECES;
    u->used = 0;
    for (int i = 0; i < 2 && u->recorded[u->piece]; i++) TRY(cuda__await(o, c->stream, u->done[u->piece][i]));
    return OK;
}

int cuda__upload(struct ops *o, void *to, const void *from_host, size_t bytes)
{
    struct cuda *c = cuda__of(o);
    struct cuda_upload *u = c->upload;
    if (c->capturing) FAIL(ERR_BUG, "ops_upload within a captured step: it would repeat what it holds now");
    for (size_t at = 0; at < bytes;) {
        if (u->used == PIECE_BYTES) TRY(next_piece(o));
        size_t room = PIECE_BYTES - u->used, n = bytes - at < room ? bytes - at : room;
        char *from = u->pinned + (size_t)u->piece * PIECE_BYTES + u->used;
        memcpy(from, (const char *)from_host + at, n);
        CUDA_TRY(cudaMemcpyAsync((char *)to + at, from, n, cudaMemcpyHostToDevice, c->stream));
        at += n;
        size_t padded = (u->used + n + UPLOAD_ALIGNMENT - 1) / UPLOAD_ALIGNMENT * UPLOAD_ALIGNMENT;
        u->used = padded < PIECE_BYTES ? padded : PIECE_BYTES;
    }
    return OK;
}

int cuda__download(struct ops *o, void *to_host, const void *from, size_t bytes)
{
    struct cuda *c = cuda__of(o);
    if (c->capturing) FAIL(ERR_BUG, "ops_download within a captured step");
    CUDA_TRY(cudaMemcpyAsync(to_host, from, bytes, cudaMemcpyDeviceToHost, c->stream));
    return cuda__await(o, c->stream, NULL);
}
