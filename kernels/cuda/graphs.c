/* The decode step as a CUDA graph: the first step of a bucket runs as it is, which loads every kernel it needs; the
 * second is recorded and replayed from then on. */
#include <stdlib.h>

#include "kernels/cuda/cuda.h"

enum { MOST_GRAPHS = 256 };

struct cuda_graphs {
    int n;
    struct {
        int bucket;
        cudaGraphExec_t exec; /* NULL until the second step */
    } entry[MOST_GRAPHS];
};

void cuda__graphs_close(struct cuda *c)
{
    if (!c->graphs) return;
    for (int i = 0; i < c->graphs->n; i++)
        if (c->graphs->entry[i].exec) (void)cudaGraphExecDestroy(c->graphs->entry[i].exec);
    free(c->graphs);
    c->graphs = NULL;
}

/* Powers of two, then steps that grow with the size: at most an eighth of the rows is padding. */
int cuda__bucket(const struct ops *o, int n)
{
    (void)o;
    int step = n <= 64 ? 8 : n <= 256 ? 16 : 64;
    if (n <= 2) return n;
    if (n <= 8) return n <= 4 ? 4 : 8;
    return (n + step - 1) / step * step;
}

/* A node of a graph takes about a kilobyte of the device, and a layer a dozen nodes. */
size_t cuda__graph_bytes(const struct ops *o, int n_layers)
{
    enum { NODES_A_LAYER = 16, NODES_BESIDE = 32, NODE_BYTES = 1024 };
    size_t buckets = 0;
    const int most = cuda__of(o)->limits.max_seqs;
    for (int n = 1; n <= most; n = cuda__bucket(o, n) + 1) buckets++;
    return buckets * (size_t)(n_layers * NODES_A_LAYER + NODES_BESIDE) * NODE_BYTES;
}

static int capture(struct cuda *c, cudaGraphExec_t *exec, int (*body)(void *arg), void *arg)
{
    cudaGraph_t graph = NULL;
    CUDA_TRY(cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal));
    c->capturing = true;
    int rc = body(arg);
    c->capturing = false;
    cudaError_t ended = cudaStreamEndCapture(c->stream, &graph);
    if (!rc && ended != cudaSuccess) rc = cuda__failed("recording a decode step", ended);
    if (!rc) {
        cudaError_t made = cudaGraphInstantiate(exec, graph, 0);
        if (made != cudaSuccess) rc = cuda__failed("cudaGraphInstantiate", made);
    }
    if (graph) (void)cudaGraphDestroy(graph);
    return rc;
}

int cuda__run_step(struct ops *o, int bucket, int (*body)(void *arg), void *arg)
{
    struct cuda *c = cuda__of(o);
    int i = 0;
    if (!c->graphs) c->graphs = calloc(1, sizeof *c->graphs);
    if (!c->graphs) FAIL(ERR_NOMEM, "cuda: out of host memory");
    struct cuda_graphs *g = c->graphs;
    while (i < g->n && g->entry[i].bucket != bucket) i++;
    if (i == g->n) {
        if (i < MOST_GRAPHS) g->entry[g->n++].bucket = bucket;
        return body(arg);
    }
    if (!g->entry[i].exec) TRY(capture(c, &g->entry[i].exec, body, arg));
    CUDA_TRY(cudaGraphLaunch(g->entry[i].exec, c->stream));
    return OK;
}
