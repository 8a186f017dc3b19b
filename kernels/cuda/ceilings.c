/* What this device can do: cuBLASLt's product of large matrices, our own reading of a weight matrix for one row, and a
 * device-to-device copy of 4 GiB. */
#include <stdlib.h>

#include "kernels/cuda/cuda.h"

enum { SIDE = 8192, TRIES = 20 };

/* Seconds of one body run, the median of TRIES; events of our own. */
static int time_body(struct ops *o, int (*body)(struct ops *o, void *arg), void *arg, double *seconds)
{
    struct cuda *c = cuda__of(o);
    float ms[TRIES];
    cudaEvent_t first, last;
    CUDA_TRY(cudaEventCreate(&first));
    CUDA_TRY(cudaEventCreate(&last));
    int rc = body(o, arg); /* warm */
    for (int i = 0; i < TRIES && !rc; i++) {
        CUDA_TRY(cudaEventRecord(first, c->stream));
        rc = body(o, arg);
        CUDA_TRY(cudaEventRecord(last, c->stream));
        CUDA_TRY(cudaEventSynchronize(last));
        CUDA_TRY(cudaEventElapsedTime(&ms[i], first, last));
        for (int j = i; j > 0 && ms[j] < ms[j - 1]; j--) {
            float swap = ms[j];
            ms[j] = ms[j - 1], ms[j - 1] = swap;
        }
    }
    (void)cudaEventDestroy(first);
    (void)cudaEventDestroy(last);
    if (!rc) *seconds = (double)ms[TRIES / 2] * 1e-3;
    return rc;
}

struct work {
    char *memory;
    size_t bytes;
    struct tensor x, w, y;
};

static int copy_body(struct ops *o, void *arg)
{
    struct work *work = arg;
    return ops_copy(o, work->memory, work->memory + work->bytes / 2, work->bytes / 2);
}

static int linear_body(struct ops *o, void *arg)
{
    struct work *work = arg;
    return ops_linear(o, work->y, work->x, work->w, NULL);
}

static int measure_gemm(struct ops *o, struct work *work, double *tflops)
{
    double seconds = 0;
    const size_t matrix = (size_t)SIDE * SIDE * dtype_size(o->dtype);
    work->x = tensor_2d(work->memory, o->dtype, SIDE, SIDE);
    work->w = tensor_2d(work->memory + matrix, o->dtype, SIDE, SIDE);
    work->y = tensor_2d(work->memory + 2 * matrix, o->dtype, SIDE, SIDE);
    TRY(ops_fill_normal(o, work->x, 1, 1, 0, 0, SIDE));
    TRY(ops_fill_normal(o, work->w, 2, 0.02f, 0, 0, SIDE));
    TRY(time_body(o, linear_body, work, &seconds));
    *tflops = 2.0 * SIDE * SIDE * SIDE / seconds * 1e-12;
    return OK;
}

/* A matrix beyond every cache, read once for one row. */
static int measure_gemv(struct ops *o, struct work *work, size_t weight_bytes, double *gbs)
{
    double seconds = 0;
    size_t row = SIDE * dtype_size(o->dtype);
    size_t rows = (weight_bytes < work->bytes / 2 ? weight_bytes : work->bytes / 2) / row;
    if (rows < SIDE) rows = SIDE;
    work->w = tensor_2d(work->memory, o->dtype, (int64_t)rows, SIDE);
    work->x = tensor_2d(work->memory + rows * row, o->dtype, 1, SIDE);
    work->y = tensor_2d(work->memory + (rows + 1) * row, DTYPE_F32, 1, (int64_t)rows);
    TRY(ops_fill_normal(o, work->w, 3, 0.02f, 0, 0, SIDE));
    TRY(ops_fill_normal(o, work->x, 4, 1, 0, 0, SIDE));
    TRY(time_body(o, linear_body, work, &seconds));
    *gbs = (double)(rows * row) / seconds * 1e-9;
    return OK;
}

int cuda__ceilings(struct ops *o, size_t weight_bytes, struct ops_ceilings *out)
{
    size_t left = 0, total = 0;
    struct work work = {.bytes = (size_t)8 << 30};
    double seconds = 0;
    TRY(ops_memory_free(o, &left, &total));
    while (work.bytes > left - (left >> 3) && work.bytes > (size_t)1 << 29) work.bytes /= 2;
    TRY(ops_memory_take(o, work.bytes, (void **)&work.memory));
    int rc = time_body(o, copy_body, &work, &seconds);
    if (!rc) out->copy_gbs = (double)work.bytes / seconds * 1e-9;
    if (!rc) rc = measure_gemm(o, &work, &out->gemm_tflops);
    if (!rc) rc = measure_gemv(o, &work, weight_bytes, &out->gemv_gbs);
    ops_memory_give_back(o, work.memory, work.bytes);
    return rc;
}
