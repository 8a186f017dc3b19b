/* test_comm_cuda [--bench FILE] - the communicator of GPUs, one rank a GPU: sums of every type and many sizes by every
 * way, bit for bit the sum in rank order and the same on all ranks; gathers; the sum with norm; graphs replayed a
 * thousand times. With --bench the times of dependent sums in a graph instead, as a table and as JSON. Passes on one
 * rank, and where there is no GPU a rank, having checked nothing of them. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "parallel/comm.h"

#ifndef VITRAIL_CUDA
int main(void)
{
    struct comm *control = NULL, *comm = NULL;
    if (comm_open_auto(&control)) return 2;
    /* Refused in every build: there is no CUDA, or no stream. */
    int rc = comm_device_open(control, 0, NULL, 1, &comm);
    bool refused = (rc == ERR_UNSUPPORTED || rc == ERR_ARG) && !comm;
    if (!refused) fprintf(stderr, "a communicator of GPUs without a stream: %d\n", rc);
    comm_close(control);
    return refused ? 0 : 1;
}
#else
#include <cuda_runtime_api.h>
#include <math.h>

#include "base/clock.h"
#include "parallel/comm_nccl.h"
#include "parallel/comm_nvlink.h"

enum { LARGEST = 32 << 20, MOST_RANKS = 8 };

static struct comm *control, *comm;
static cudaStream_t stream;
static int failures;

#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            failures++;                                                                                                \
            fprintf(stderr, "[rank %d] %s:%d: ", control->rank, __FILE__, __LINE__);                                   \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fputc('\n', stderr);                                                                                       \
        }                                                                                                              \
    } while (0)
/* What the rest cannot go on without. */
#define NEED(call)                                                                                                     \
    do {                                                                                                               \
        int need_rc = (int)(call);                                                                                     \
        if (need_rc) {                                                                                                 \
            fprintf(stderr, "[rank %d] %s:%d: %s: %d, %s\n", control->rank, __FILE__, __LINE__, #call, need_rc,        \
                    status_message());                                                                                 \
            comm_abort(control, ERR_DEVICE);                                                                           \
        }                                                                                                              \
    } while (0)

/* ---- numbers ---- */

static uint32_t mix(uint32_t x)
{
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

/* sample - element i of rank r: sizes apart by 2^12, so that another order or another rounding gives other bits. */
static float sample(int rank, int64_t i)
{
    static const float scale[] = {0x1p-36f, 0x1p-35f, 0x1p-34f, 0x1p-33f, 0x1p-32f, 0x1p-31f, 0x1p-30f,
                                  0x1p-29f, 0x1p-28f, 0x1p-27f, 0x1p-26f, 0x1p-25f, 0x1p-24f};
    uint32_t x = mix((uint32_t)i * 2654435761u + (uint32_t)rank * 40503u + 77u);
    return (float)(int32_t)x * scale[x % 13];
}

static float round_to(float x, enum dtype dtype)
{
    if (dtype == DTYPE_BF16) return bfloat_to_float(float_to_bfloat(x));
    return dtype == DTYPE_F16 ? half_to_float(float_to_half(x)) : x;
}

static uint32_t bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static void put(void *to, int64_t i, float x, enum dtype dtype)
{
    if (dtype == DTYPE_F32)
        ((float *)to)[i] = x;
    else if (dtype == DTYPE_I64)
        ((int64_t *)to)[i] = (int64_t)x * 1000003;
    else
        ((uint16_t *)to)[i] = dtype == DTYPE_BF16 ? float_to_bfloat(x) : float_to_half(x);
}

static float get(const void *from, int64_t i, enum dtype dtype)
{
    if (dtype == DTYPE_F32) return ((const float *)from)[i];
    uint16_t half = ((const uint16_t *)from)[i];
    return dtype == DTYPE_BF16 ? bfloat_to_float(half) : half_to_float(half);
}

static uint64_t hash(const void *data, size_t n)
{
    const unsigned char *byte = data;
    uint64_t h = 0xcbf29ce484222325u;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t word;
        memcpy(&word, byte + i, 8);
        h = (h ^ word) * 0x100000001b3u;
        h ^= h >> 29;
    }
    for (; i < n; i++) h = (h ^ byte[i]) * 0x100000001b3u;
    return h;
}

static void same_everywhere(const char *what, const void *data, size_t n)
{
    int rc = comm_same(comm, what, hash(data, n));
    CHECK(rc == OK, "%s", status_message());
}

static void upload(void *to, const void *from, size_t n)
{
    NEED(cudaMemcpyAsync(to, from, n, cudaMemcpyHostToDevice, stream));
    NEED(cudaStreamSynchronize(stream));
}

static void download(void *to, const void *from, size_t n)
{
    NEED(cudaMemcpyAsync(to, from, n, cudaMemcpyDeviceToHost, stream));
    NEED(cudaStreamSynchronize(stream));
}

/* ---- sums ---- */

static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_BF16, DTYPE_F16, DTYPE_I64};
/* Elements; the last are 32 MB of float32 and of bfloat16. */
static const int64_t counts[] = {1,      2,      3,      7,       8,       9,       31,          64,         257,
                                 1000,   4096,   8191,   8192,    16385,   32768,   40001,       65537,      131072,
                                 262147, 524287, 524288, 1048577, 2097153, 5000011, LARGEST / 4, LARGEST / 2};
enum { N_DTYPES = sizeof dtypes / sizeof *dtypes, N_COUNTS = sizeof counts / sizeof *counts };

/* ordered - what element i has to be: rank 0 + rank 1 + ... in float32, rounded once. */
static float ordered(int64_t i, enum dtype dtype)
{
    float sum = round_to(sample(0, i), dtype);
    for (int r = 1; r < comm->size; r++) sum += round_to(sample(r, i), dtype);
    return round_to(sum, dtype);
}

static int64_t count_wrong(const void *host, int64_t n, enum dtype dtype, bool exact)
{
    int64_t wrong = 0;
    for (int64_t i = 0; i < n; i++) {
        if (dtype == DTYPE_I64) {
            int64_t want = 0;
            for (int r = 0; r < comm->size; r++) want += (int64_t)sample(r, i) * 1000003;
            wrong += ((const int64_t *)host)[i] != want;
            continue;
        }
        float want = ordered(i, dtype), got = get(host, i, dtype), size = 0;
        for (int r = 0; r < comm->size; r++) size += fabsf(sample(r, i));
        wrong += exact ? bits(got) != bits(want) : !(fabsf(got - want) <= 0.02f * size + 1e-6f);
    }
    return wrong;
}

/* shift - bytes by which the message stands off a 16-byte boundary. */
static void check_sum(enum comm_way way, enum dtype dtype, int64_t n, size_t shift, void *device, void *host)
{
    size_t bytes = (size_t)n * dtype_size(dtype);
    void *x = (char *)device + shift;
    if (bytes > LARGEST || (n > 3 << 20 && dtype != DTYPE_F32 && dtype != DTYPE_BF16)) return; /* to save time */
    for (int64_t i = 0; i < n; i++) put(host, i, sample(comm->rank, i), dtype);
    upload(x, host, bytes);
    comm__use_way(comm, way);
    NEED(comm_all_reduce_sum(comm, tensor_1d(x, dtype, n), stream));
    comm__use_way(comm, COMM_WAY_N);
    memset(host, 0xff, bytes);
    download(host, x, bytes);
    /* Two float32 addends have one order, and so has what does not go through NCCL. */
    bool exact = comm->size == 2 || (way != COMM_WAY_NCCL && way != COMM_WAY_N);
    int64_t wrong = count_wrong(host, n, dtype, exact && comm__has_peers(comm));
    CHECK(wrong == 0, "sum of %lld %s by %s, off by %zu bytes: %lld are wrong", (long long)n, dtype_name(dtype),
          comm__way_name(way), shift, (long long)wrong);
    same_everywhere("a sum", host, bytes);
}

static void test_sums(void *device, void *host)
{
    for (enum comm_way way = 0; way <= COMM_WAY_N; way++)
        for (int d = 0; d < N_DTYPES; d++)
            for (int k = 0; k < N_COUNTS; k++) check_sum(way, dtypes[d], counts[k], 0, device, host);
    for (enum comm_way way = 0; way < COMM_WAY_N; way++)
        for (int k = 5; k < N_COUNTS - 5; k += 3) {
            check_sum(way, DTYPE_BF16, counts[k], 2, device, host);
            check_sum(way, DTYPE_F32, counts[k], 12, device, host);
        }
}

/* ---- gathers ---- */

static void check_gather(enum comm_way way, size_t bytes, bool in_place, char *device, unsigned char *host)
{
    size_t all = bytes * (size_t)comm->size, wrong = 0;
    char *out = device, *in = in_place ? out + (size_t)comm->rank * bytes : out + all + 256 - all % 256;
    for (size_t i = 0; i < bytes; i++) host[i] = (unsigned char)mix((uint32_t)i * 8 + (uint32_t)comm->rank);
    NEED(cudaMemsetAsync(out, 0, all, stream));
    upload(in, host, bytes);
    comm__use_way(comm, way);
    NEED(
        comm_all_gather(comm, tensor_1d(out, DTYPE_U8, (int64_t)all), tensor_1d(in, DTYPE_U8, (int64_t)bytes), stream));
    comm__use_way(comm, COMM_WAY_N);
    download(host, out, all);
    for (size_t i = 0; i < all; i++)
        wrong += host[i] != (unsigned char)mix((uint32_t)(i % bytes) * 8 + (uint32_t)(i / bytes));
    CHECK(wrong == 0, "gather of %zu bytes each by %s%s: %zu are wrong", bytes, comm__way_name(way),
          in_place ? ", in place" : "", wrong);
}

static void test_gathers(void *device, void *host)
{
    static const size_t sizes[] = {1, 2, 6, 16, 18, 1000, 16384, 64010, 128256, 262144, 513024, 1048592, 4194304};
    for (enum comm_way way = 0; way <= COMM_WAY_N; way++)
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
            check_gather(way, sizes[k], false, device, host);
            check_gather(way, sizes[k], true, device, host);
        }
}

/* ---- the sum with norm ---- */

static float value_of(int tag, int64_t i)
{
    return 2.0f * (float)(mix((uint32_t)i * 16 + (uint32_t)tag) >> 8) / (1 << 24) - 1;
}

/* The residual is exact. The norm sums in an order of its own, here in double: neighbours of the right value pass. */
static void check_norm_row(const uint16_t *residual, const uint16_t *out, int64_t row, int width, enum dtype dtype,
                           float epsilon, int64_t *wrong)
{
    double squares = 0;
    for (int i = 0; i < width; i++) {
        int64_t at = row * width + i;
        float sum = round_to(value_of(0, at), dtype);
        for (int r = 1; r < comm->size; r++) sum += round_to(value_of(r, at), dtype);
        float want = round_to(round_to(sum, dtype) + round_to(value_of(9, at), dtype), dtype);
        wrong[0] += get(residual, at, dtype) != want;
        squares += (double)want * want;
    }
    double scale = 1 / sqrt(squares / width + (double)epsilon);
    for (int i = 0; i < width; i++) {
        int64_t at = row * width + i;
        double want = get(residual, at, dtype) * scale * (double)value_of(10, i);
        wrong[1] +=
            !(fabs(get(out, at, dtype) - want) <= fabs(want) * (dtype == DTYPE_BF16 ? 1.0 / 256 : 1.0 / 2048) + 1e-7);
    }
}

static bool check_norm(int rows, int width, enum dtype dtype, char *device, char *host)
{
    int64_t n = (int64_t)rows * width, wrong[2] = {0, 0};
    size_t bytes = (size_t)n * 2, part = (bytes + 255) / 256 * 256;
    char *x = device, *residual = x + part, *out = residual + part, *weight = out + part;
    uint16_t *host_out = (uint16_t *)(host + part);
    for (int64_t i = 0; i < n; i++) put(host, i, value_of(comm->rank, i), dtype);
    upload(x, host, bytes);
    for (int64_t i = 0; i < n; i++) put(host, i, value_of(9, i), dtype);
    upload(residual, host, bytes);
    for (int i = 0; i < width; i++) ((float *)host)[i] = value_of(10, i);
    upload(weight, host, (size_t)width * sizeof(float));
    int rc = comm_all_reduce_add_norm(comm, tensor_2d(x, dtype, rows, width), tensor_2d(residual, dtype, rows, width),
                                      tensor_1d(weight, DTYPE_F32, width), 1e-5f, tensor_2d(out, dtype, rows, width),
                                      stream);
    if (rc == COMM_DECLINED) return false;
    NEED(rc);
    download(host, residual, bytes);
    download(host_out, out, bytes);
    for (int row = 0; row < rows; row++) check_norm_row((uint16_t *)host, host_out, row, width, dtype, 1e-5f, wrong);
    CHECK(wrong[0] + wrong[1] == 0, "sum with norm of %s [%d, %d]: %lld of the residual and %lld of the norm are wrong",
          dtype_name(dtype), rows, width, (long long)wrong[0], (long long)wrong[1]);
    same_everywhere("a norm", host_out, bytes);
    return true;
}

static void test_norms(void *device, void *host)
{
    static const int rows[] = {1, 2, 7, 32, 64, 128}, widths[] = {8, 64, 576, 2048, 4096, 5120, 8192};
    static const int odd[] = {12, 8200};
    int taken = 0;
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
        for (size_t w = 0; w < sizeof widths / sizeof *widths; w++)
            for (int d = 1; d <= 2; d++) { /* lines whatever was measured, and as was measured */
                comm__use_way(comm, COMM_WAY_LINES);
                taken += check_norm(rows[r], widths[w], dtypes[d], device, host);
                comm__use_way(comm, COMM_WAY_N);
                taken += check_norm(rows[r], widths[w], dtypes[d], device, host);
            }
    for (int i = 0; i < 2; i++) CHECK(!check_norm(2, odd[i], DTYPE_BF16, device, host), "width %d was taken", odd[i]);
    CHECK(taken > 0 || comm->size == 1 || !comm__has_peers(comm), "no sum with norm was taken");
    if (comm->rank == 0) printf("sums with norm: %d taken\n", taken);
}

/* ---- graphs ---- */

static cudaGraphExec_t end_capture(void)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    NEED(cudaStreamEndCapture(stream, &graph));
    NEED(cudaGraphInstantiate(&exec, graph, 0));
    NEED(cudaGraphDestroy(graph));
    return exec;
}

/* A message of 8 KB, one of 200 KB, one of 3 MB and a gather, a thousand times. Every sum is halved (by the number of
 * ranks) again, so that equal parts stay what they are: one lost or doubled message shows. */
static void test_graph(float *device, float *host)
{
    static const int64_t at[] = {0, 4096, 60000, 900000}, n[] = {2048, 51200, 786432};
    enum { REPLAYS = 1000, PART = 4096 };
    int64_t wrong = 0, gathered = at[3];
    float factor = 1.0f / (float)comm->size;
    for (int64_t i = 0; i < gathered; i++) host[i] = (float)(i % 4093);
    upload(device, host, (size_t)gathered * sizeof *host);
    for (int64_t i = 0; i < PART; i++) host[i] = (float)(i + comm->rank);
    upload(device + gathered + comm->rank * PART, host, PART * sizeof *host);
    NEED(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int k = 0; k < 3; k++) {
        NEED(comm_all_reduce_sum(comm, tensor_1d(device + at[k], DTYPE_F32, n[k]), stream));
        NEED(comm__nvlink_scale(device + at[k], (size_t)n[k], factor, stream));
    }
    NEED(comm_all_gather(comm, tensor_1d(device + gathered, DTYPE_F32, PART * comm->size),
                         tensor_1d(device + gathered + comm->rank * PART, DTYPE_F32, PART), stream));
    cudaGraphExec_t graph = end_capture();
    for (int i = 0; i < REPLAYS; i++) {
        NEED(cudaGraphLaunch(graph, stream));
        if (i % 100 == 7) NEED(comm_all_reduce_sum(comm, tensor_1d(device + 3000, DTYPE_F32, 1), stream));
        if (i % 100 == 7) NEED(comm__nvlink_scale(device + 3000, 1, factor, stream));
    }
    download(host, device, (size_t)(gathered + PART * comm->size) * sizeof *host);
    for (int64_t i = 0; i < gathered; i++) wrong += host[i] != (float)(i % 4093);
    for (int64_t i = 0; i < PART * comm->size; i++) {
        int64_t rank = i / PART;
        wrong += host[gathered + i] != (float)(i % PART + rank);
    }
    CHECK(wrong == 0 || (comm->size & (comm->size - 1)), "after %d replays %lld numbers are wrong", REPLAYS,
          (long long)wrong);
    same_everywhere("the result of a graph", host, (size_t)gathered * sizeof *host);
    NEED(cudaGraphExecDestroy(graph));
}

/* Last: rank 0 alone starts a sum, which waits for its peers until it is interrupted. */
static void test_interrupt(void *device)
{
    cudaError_t state = cudaSuccess;
    if (comm->rank > 0 || !comm__has_peers(comm)) return;
    for (enum comm_way way = COMM_WAY_LINES; way < COMM_WAY_N; way++) {
        comm__use_way(comm, way);
        NEED(comm_all_reduce_sum(comm, tensor_1d(device, DTYPE_F32, 5000), stream));
        double start = clock_seconds();
        while (way == COMM_WAY_LINES && clock_seconds() < start + 0.2) state = cudaStreamQuery(stream);
        if (way == COMM_WAY_LINES)
            CHECK(state == cudaErrorNotReady, "a sum did not wait for its peers: %d", (int)state);
        comm_interrupt(comm);
        start = clock_seconds();
        while ((state = cudaStreamQuery(stream)) == cudaErrorNotReady && clock_seconds() < start + 5) continue;
        CHECK(state == cudaSuccess, "a sum of %s was not interrupted: %d", comm__way_name(way), (int)state);
    }
}

/* ---- measurement ---- */

enum { CHAIN = 100, TRIES = 20, N_SIZES = 10 };
static const size_t bench_sizes[N_SIZES] = {1 << 10,   4 << 10, 16 << 10, 32 << 10, 64 << 10,
                                            256 << 10, 1 << 20, 4 << 20,  16 << 20, 64 << 20};

static int by_size(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* replay - the median of a graph's times, microseconds; destroys it. */
static double replay(cudaGraphExec_t graph)
{
    float ms[TRIES];
    cudaEvent_t begin, end;
    NEED(cudaEventCreate(&begin));
    NEED(cudaEventCreate(&end));
    for (int i = -3; i < TRIES; i++) {
        NEED(cudaStreamSynchronize(stream));
        NEED(comm_barrier(comm));
        NEED(cudaEventRecord(begin, stream));
        NEED(cudaGraphLaunch(graph, stream));
        NEED(cudaEventRecord(end, stream));
        NEED(cudaEventSynchronize(end));
        if (i >= 0) NEED(cudaEventElapsedTime(&ms[i], begin, end));
    }
    qsort(ms, TRIES, sizeof *ms, by_size);
    NEED(cudaGraphExecDestroy(graph));
    NEED(cudaEventDestroy(begin));
    NEED(cudaEventDestroy(end));
    return 1e3 * (double)ms[TRIES / 2];
}

/* chain - microseconds of one of `length` links: a sum (COMM_WAY_N + 1: none) and a kernel that scales it. */
static double chain(float *x, size_t bytes, int way, int length)
{
    if (way <= COMM_WAY_N) comm__use_way(comm, (enum comm_way)way);
    for (int pass = 0; pass < 2; pass++) { /* first as it is, which loads and connects what is needed */
        if (pass == 1) NEED(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < (pass ? length : 1); i++) {
            if (way <= COMM_WAY_N)
                NEED(comm_all_reduce_sum(comm, tensor_1d(x, DTYPE_BF16, (int64_t)bytes / 2), stream));
            NEED(comm__nvlink_scale(x, bytes / 4, 1.0f, stream));
        }
    }
    comm__use_way(comm, COMM_WAY_N);
    return replay(end_capture()) / length;
}

/* norm_chain - microseconds of one of a chain of sums with norm, in lines whatever was measured; 0: declined. */
static double norm_chain(char *device, int rows, int width)
{
    size_t part = (size_t)rows * (size_t)width * 2;
    struct tensor x = tensor_2d(device, DTYPE_BF16, rows, width), residual = x, out = x;
    struct tensor weight = tensor_1d(device + 3 * part, DTYPE_F32, width);
    NEED(cudaMemsetAsync(device, 0, 3 * part + (size_t)width * 4, stream));
    residual.data = device + part;
    out.data = device + 2 * part;
    comm__use_way(comm, COMM_WAY_LINES);
    int rc = comm_all_reduce_add_norm(comm, x, residual, weight, 1e-5f, out, stream);
    if (rc == COMM_DECLINED) {
        comm__use_way(comm, COMM_WAY_N);
        return 0;
    }
    NEED(rc);
    NEED(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < CHAIN; i++) /* the output of one is the next one's input */
        NEED(comm_all_reduce_add_norm(comm, i % 2 ? out : x, residual, weight, 1e-5f, i % 2 ? x : out, stream));
    comm__use_way(comm, COMM_WAY_N);
    return replay(end_capture()) / CHAIN;
}

static void write_number(FILE *f, const char *name, double us)
{
    fprintf(f, us > 0 ? ", \"%s\": %.3f" : ", \"%s\": null", name, us);
}

static void bench_norms(char *device, FILE *f)
{
    static const int rows[] = {1, 4, 8, 16, 32, 64, 128}, widths[] = {4096, 5120, 8192};
    for (int i = 0; i < 21; i++) {
        int r = rows[i % 7], w = widths[i / 7];
        double us = norm_chain(device, r, w);
        bool taken = us > 0 && comm__way_of_sum(comm, (size_t)r * (size_t)w * 2) == COMM_WAY_LINES;
        if (!f) continue;
        printf("sum with norm of [%d, %d]: ", r, w);
        printf(us > 0 ? "%.2f us, %s\n" : "no kernel\n", us, taken ? "taken" : "declined");
        fprintf(f, "%s\n  {\"rows\": %d, \"width\": %d, \"taken\": %s", i ? "," : "", r, w, taken ? "true" : "false");
        write_number(f, "us", us);
        fprintf(f, "}");
    }
}

static void bench(char *device, const char *path)
{
    FILE *f = comm->rank == 0 ? fopen(path, "w") : NULL;
    if (comm->rank == 0 && !f) CHECK(false, "cannot write %s", path);
    NEED(cudaMemsetAsync(device, 0, 64 << 20, stream));
    if (f) {
        printf("us a link: a sum and a kernel that touches it; \"kernel\" is that kernel alone, \"net\" chosen less "
               "kernel\n"
               "%9s %9s %9s %9s %9s %-7s %9s %9s\n",
               "KB", "nccl", "lines", "chunks", "chosen", "", "kernel", "net");
        fprintf(f, "{\"ranks\": %d, \"unit\": \"us\", \"chain\": %d, \"all_reduce\": [", comm->size, CHAIN);
    }
    for (int i = 0; i < N_SIZES; i++) {
        size_t bytes = bench_sizes[i];
        int length = bytes >= 16 << 20 ? CHAIN / 10 : CHAIN;
        double us[COMM_WAY_N + 1], kernel = chain((float *)device, bytes, COMM_WAY_N + 1, length);
        for (int way = 0; way <= COMM_WAY_N; way++) {
            bool peers = way == COMM_WAY_NCCL || way == COMM_WAY_N || comm__has_peers(comm);
            bool fits = way != COMM_WAY_LINES || bytes <= 1 << 20;
            us[way] = peers && fits ? chain((float *)device, bytes, way, length) : 0;
        }
        if (!f) continue;
        const char *chosen = comm__way_name(comm__way_of_sum(comm, bytes));
        printf("%9zu %9.2f %9.2f %9.2f %9.2f %-7s %9.2f %9.2f\n", bytes >> 10, us[0], us[1], us[2], us[3], chosen,
               kernel, us[3] - kernel);
        fprintf(f, "%s\n  {\"bytes\": %zu, \"way\": \"%s\"", i ? "," : "", bytes, chosen);
        for (int way = 0; way < COMM_WAY_N; way++) write_number(f, comm__way_name((enum comm_way)way), us[way]);
        write_number(f, "chosen", us[COMM_WAY_N]);
        write_number(f, "kernel", kernel);
        fprintf(f, "}");
    }
    if (f) fprintf(f, "\n], \"all_reduce_add_norm\": [");
    bench_norms(device, f);
    if (f) fprintf(f, "\n], \"device_bytes\": %zu}\n", comm->device_bytes);
    if (f) fclose(f);
}

/* ---- all of it ---- */

/* The control plane of the GPUs' communicator is the one that it stands on. */
static void test_control(void)
{
    char text[32];
    int all[MOST_RANKS], mine = 10 + comm->rank, lowest = comm->size > 1 ? 1 : 0;
    CHECK(comm_all_gather_host(comm, all, &mine, sizeof mine) == OK, "%s", status_message());
    for (int r = 0; r < comm->size; r++) CHECK(all[r] == 10 + r, "rank %d gathered %d", r, all[r]);
    int rc = comm->rank == lowest ? status_set(ERR_CONFIG, __FILE__, __LINE__, "shard %d", lowest) : OK;
    snprintf(text, sizeof text, comm->size > 1 ? "rank %d: shard %d" : "shard %d", lowest, lowest);
    rc = comm_agree(comm, rc, "a phase");
    CHECK(rc == ERR_CONFIG && strstr(status_message(), "shard"), "agreed on %d, %s", rc, status_message());
    CHECK(!strcmp(control->phase, "a phase"), "the phase of the control plane is '%s'", control->phase);
    CHECK(comm_poll(comm) == OK, "%s", status_message());
    CHECK(comm_agree(comm, OK, "tests") == OK, "%s", status_message());
}

static int enough_devices(void)
{
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess) n = 0;
    int enough = n >= control->local_size, all[1024] = {0}, every = 1;
    NEED(comm_all_gather_host(control, all, &enough, sizeof enough));
    for (int r = 0; r < control->size; r++) every = every && all[r];
    if (!every && control->rank == 0) printf("%d ranks, %d GPUs: nothing checked\n", control->local_size, n);
    return every && control->size <= MOST_RANKS;
}

static void run(const char *bench_path)
{
    void *device, *host = malloc(LARGEST * 4);
    double start = clock_seconds();
    NEED(host == NULL);
    NEED(cudaSetDevice(control->local_rank));
    NEED(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    NEED(cudaMalloc(&device, LARGEST * 4));
    NEED(comm_device_open(control, control->local_rank, stream, 64 << 20, &comm));
    if (control->rank == 0)
        printf("%d ranks, opened in %.2f s, %.1f MiB of each GPU, %s\n", control->size, clock_seconds() - start,
               (double)comm->device_bytes / (1 << 20),
               comm->size == 1         ? "alone"
               : comm__has_peers(comm) ? "peer memory"
                                       : "NCCL alone");
    if (bench_path) {
        if (comm->size > 1) bench(device, bench_path);
    } else {
        test_control();
        if (comm->size > 1) {
            test_sums(device, host);
            test_norms(device, host);
        }
        test_gathers(device, host);
        test_graph(device, host);
        test_interrupt(device);
    }
    NEED(cudaStreamSynchronize(stream));
    comm_close(comm);
    NEED(cudaFree(device));
    free(host);
}

int main(int n, char **arguments)
{
    const char *bench_path = n == 3 && !strcmp(arguments[1], "--bench") ? arguments[2] : NULL;
    if (comm_open_auto(&control)) {
        fprintf(stderr, "%s\n", status_message());
        return 2;
    }
    log_set(getenv("VITRAIL_TEST_DEBUG") ? LOG_DEBUG : LOG_WARNING, control->rank);
    if (enough_devices()) run(bench_path);
    int rc = failures ? status_set(ERR_BUG, __FILE__, __LINE__, "%d checks failed", failures) : OK;
    rc = comm_agree(control, rc, "end");
    if (control->rank == 0) puts(rc ? status_message() : "passed");
    comm_close(control);
    return rc ? 1 : 0;
}
#endif
