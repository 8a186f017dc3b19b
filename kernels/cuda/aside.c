/* What runs beside the ops: a second stream that changes places with the first one while ops are issued to it.
 *
 * Its priority is the lowest, the first one's the highest: what runs aside takes the multiprocessors that the ops
 * leave. A kernel that may begin before its predecessor ends (cuda__launch) is let in by a kernel of its own stream;
 * whether it would also overtake an event that its stream waits for is not written down, so the first one behind an
 * event is launched as one that may not. */
#include "kernels/cuda/cuda.h"

enum { BEGIN, JOIN };

int cuda__open_streams(struct cuda *c)
{
    int lowest = 0, highest = 0;
    CUDA_TRY(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
    CUDA_TRY(cudaStreamCreateWithPriority(&c->stream, cudaStreamNonBlocking, highest));
    CUDA_TRY(cudaStreamCreateWithPriority(&c->aside, cudaStreamNonBlocking, lowest));
    for (int i = BEGIN; i <= JOIN; i++) CUDA_TRY(cudaEventCreateWithFlags(&c->aside_event[i], cudaEventDisableTiming));
    return OK;
}

void cuda__aside_close(struct cuda *c)
{
    for (int i = BEGIN; i <= JOIN; i++)
        if (c->aside_event[i]) (void)cudaEventDestroy(c->aside_event[i]);
    if (c->aside) (void)cudaStreamDestroy(c->aside);
}

static void change_places(struct cuda *c)
{
    cudaStream_t other = c->aside;
    c->aside = c->stream;
    c->stream = other;
    c->is_aside = !c->is_aside;
    c->behind_event = true;
}

int cuda__aside_begin(struct ops *o)
{
    struct cuda *c = cuda__of(o);
    if (c->is_aside || c->capturing)
        FAIL(ERR_BUG, "ops_aside_begin %s", c->is_aside ? "twice" : "within a captured step");
    CUDA_TRY(cudaEventRecord(c->aside_event[BEGIN], c->stream));
    CUDA_TRY(cudaStreamWaitEvent(c->aside, c->aside_event[BEGIN], 0));
    change_places(c);
    c->ran_aside = true;
    return OK;
}

void cuda__aside_end(struct ops *o)
{
    struct cuda *c = cuda__of(o);
    if (c->is_aside) change_places(c);
}

int cuda__aside_join(struct ops *o)
{
    struct cuda *c = cuda__of(o);
    if (c->is_aside || (c->ran_aside && c->capturing))
        FAIL(ERR_BUG, "ops_aside_join %s", c->is_aside ? "before ops_aside_end" : "within a captured step");
    if (!c->ran_aside) return OK;
    CUDA_TRY(cudaEventRecord(c->aside_event[JOIN], c->aside));
    CUDA_TRY(cudaStreamWaitEvent(c->stream, c->aside_event[JOIN], 0));
    c->ran_aside = false;
    c->behind_event = true;
    return OK;
}

void cuda__drain(const struct cuda *c)
{
    if (c->aside) (void)cudaStreamSynchronize(c->aside);
    if (c->stream) (void)cudaStreamSynchronize(c->stream);
}
