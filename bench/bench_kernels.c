/* bench_kernels - speed of the CUDA backend's kernels through the op table, against what the same machine copies and
 * multiplies in the same run.
 *
 * What a decode step would replay runs as a graph (ops_run_step, one bucket a measurement); a prompt's ops run as they
 * are. Caches, weights and activations take turns over layers, so that nothing is read from the second-level cache
 * that a model would not find there. Times are medians of groups of repeats, from clock_seconds around ops_finish.
 *
 *   bench_kernels [--only prefill,decode,linear,small,vl] [--output FILE] [--device N] */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "bench/bench_kernels.h"

#define GROUP_SECONDS 0.01

void bench_demand(int rc)
{
    if (!rc) return;
    fprintf(stderr, "bench_kernels: %s\n", status_message());
    exit(1);
}

/* ---- memory ---- */

void bench_open(struct bench *b, const struct ops_limits *limits)
{
    size_t bytes;
    bench_demand(ops_open(&b->ops, "cuda", b->device, 1));
    bench_demand(ops_reserve(&b->ops, limits, &bytes, false));
    b->bucket = b->n_blocks = 0;
}

void bench_close(struct bench *b)
{
    bench_demand(ops_finish(&b->ops));
    for (int i = 0; i < b->n_blocks; i++) ops_memory_give_back(&b->ops, b->block[i].memory, b->block[i].bytes);
    ops_close(&b->ops);
}

void *bench_take(struct bench *b, size_t bytes)
{
    void *memory;
    if (b->n_blocks == BENCH_BLOCKS) abort();
    bench_demand(ops_memory_take(&b->ops, bytes, &memory));
    b->block[b->n_blocks].memory = memory;
    b->block[b->n_blocks++].bytes = bytes;
    return memory;
}

void *bench_array(struct bench *b, const void *values, size_t bytes)
{
    void *memory = bench_take(b, bytes);
    bench_demand(ops_upload(&b->ops, memory, values, bytes));
    return memory;
}

struct tensor bench_random(struct bench *b, enum dtype dtype, int64_t rows, int64_t cols, float std)
{
    struct tensor t = tensor_2d(NULL, dtype, rows, cols);
    t.data = bench_take(b, tensor_bytes(t));
    bench_demand(ops_fill_normal(&b->ops, t, 7 + (uint64_t)b->n_blocks, std, 0, 0, cols));
    return t;
}

struct tensor bench_heads(struct tensor t, int64_t first, int64_t heads, int64_t dim)
{
    struct tensor view = tensor_3d((char *)t.data + (size_t)first * dtype_size(t.dtype), t.dtype, t.dim[0], heads, dim);
    view.stride[0] = t.stride[0];
    return view;
}

/* ---- time and reports ---- */

int bench_by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void run_once(struct bench *b, bench_body *step, void *arg, bool graph)
{
    bench_demand(graph ? ops_run_step(&b->ops, b->bucket, step, arg) : step(arg));
}

double bench_time_runs(struct bench *b, bench_body *step, void *arg, bool graph, int n)
{
    double start = clock_seconds();
    for (int i = 0; i < n; i++) run_once(b, step, arg, graph);
    bench_demand(ops_finish(&b->ops));
    return (clock_seconds() - start) / n;
}

/* The first runs load kernels and, as a graph, record it. */
double bench_time(struct bench *b, bench_body *step, void *arg, bool graph)
{
    double took[BENCH_GROUPS];
    b->bucket++;
    (void)bench_time_runs(b, step, arg, graph, 3);
    double wanted = GROUP_SECONDS / bench_time_runs(b, step, arg, graph, 1);
    int n = wanted < 1 ? 1 : wanted > 100 ? 100 : (int)wanted;
    for (int i = 0; i < BENCH_GROUPS; i++) took[i] = bench_time_runs(b, step, arg, graph, n);
    qsort(took, BENCH_GROUPS, sizeof took[0], bench_by_size);
    return took[BENCH_GROUPS / 2];
}

void bench_report(struct bench *b, const char *part, const char *name, ...)
{
    va_list args;
    const char *unit;
    cJSON *row = cJSON_CreateObject();
    cJSON_AddStringToObject(row, "part", part);
    cJSON_AddStringToObject(row, "name", name);
    printf("%-8s %-46s", part, name);
    va_start(args, name);
    while ((unit = va_arg(args, const char *)) != NULL) {
        double value = va_arg(args, double);
        cJSON_AddNumberToObject(row, unit, value);
        printf(value < 10 ? "  %8.3f %s" : "  %8.1f %s", value, unit);
    }
    va_end(args);
    printf("\n");
    fflush(stdout);
    cJSON_AddItemToArray(b->rows, row);
}

/* ---- linears ---- */

struct model {
    const char *name;
    int shape[4][2]; /* rows and columns of qkv, o, gate_up, down */
    int n_layers;    /* that take turns */
};

struct chain {
    struct bench *b;
    const struct model *model;
    struct tensor w[4], x[4], y[4];
    int m, only; /* only: one of the four, or -1 */
    bool gated;  /* gate_up with its swiglu, which gives down its input */
};

static struct tensor few_rows(struct tensor t, int n) { return tensor_rows(t, 0, n); }

static int run_chain(void *arg)
{
    const struct chain *c = arg;
    for (int layer = 0; layer < c->model->n_layers; layer++)
        for (int i = 0; i < 4; i++) {
            const int rows = c->model->shape[i][0];
            if (c->only >= 0 && c->only != i) continue;
            const struct tensor w = tensor_rows(c->w[i], (int64_t)layer * rows, rows);
            const struct tensor x = few_rows(c->x[i], c->m), y = few_rows(c->y[i], c->m);
            if (c->gated && i == 2)
                TRY(ops_linear_swiglu(&c->b->ops, few_rows(c->x[3], c->m), y, x, w, NULL));
            else
                TRY(ops_linear(&c->b->ops, y, x, w, NULL));
        }
    return OK;
}

static double chain_weights(const struct chain *c)
{
    double sum = 0;
    for (int i = 0; i < 4; i++)
        if (c->only < 0 || c->only == i) sum += (double)c->model->shape[i][0] * c->model->shape[i][1];
    return sum;
}

static void report_chain(struct chain *c, bool graph)
{
    static const char *const parts[] = {"qkv", "o", "gate_up", "down"};
    char name[128];
    double took = bench_time(c->b, run_chain, c, graph) / c->model->n_layers, weights = chain_weights(c);
    double gbs = 2 * weights / took * 1e-9, tflops = 2 * weights * c->m / took * 1e-12;
    snprintf(name, sizeof name, "%s, %d rows%s%s%s", c->model->name, c->m, c->only < 0 ? "" : ", ",
             c->only < 0 ? "" : parts[c->only], c->gated ? ", with swiglu" : "");
    if (graph)
        bench_report(c->b, "linear", name, "us", took * 1e6, "gbs", gbs, "of_copy", gbs / c->b->ceilings.copy_gbs,
                     NULL);
    else
        bench_report(c->b, "linear", name, "us", took * 1e6, "tflops", tflops, "of_gemm",
                     tflops / c->b->ceilings.gemm_tflops, NULL);
}

static void report_few(struct chain *c)
{
    c->only = -1;
    report_chain(c, true);
    c->gated = true;
    report_chain(c, true);
    c->gated = false;
    for (int j = 0; j < 4 && c->m != 2 && c->m != 4; j++) {
        c->only = j;
        report_chain(c, true);
    }
}

static void bench_model(struct bench *b, const struct model *model)
{
    static const int few[] = {1, 2, 4, 8, 16, 32, 48, 64}, many[] = {2048, 8192, 16384};
    const int widest = model->shape[3][1];
    const struct ops_limits limits = {.max_tokens = 16384,
                                      .max_seqs = 64,
                                      .max_context = 1024,
                                      .max_in_features = widest,
                                      .max_heads = 64,
                                      .head_dim = BENCH_HEAD_DIM,
                                      .vocab_size = 1024,
                                      .max_lanes = 8};
    struct chain c = {.b = b, .model = model};
    bench_open(b, &limits);
    for (int i = 0; i < 4; i++) {
        const int rows = model->shape[i][0], columns = model->shape[i][1];
        c.w[i] = bench_random(b, b->ops.dtype, (int64_t)model->n_layers * rows, columns, 0.02f);
        c.x[i] = bench_random(b, b->ops.dtype, 16384, columns, 1);
        c.y[i] = bench_random(b, b->ops.dtype, 16384, rows, 1);
    }
    for (size_t i = 0; i < sizeof few / sizeof few[0]; i++) {
        c.m = few[i];
        report_few(&c);
    }
    c.only = -1;
    for (size_t i = 0; i < sizeof many / sizeof many[0]; i++) {
        c.m = many[i];
        report_chain(&c, false);
    }
    bench_close(b);
}

static void bench_linear(struct bench *b)
{
    static const struct model models[] = {
        {"Llama-2-13B", {{15360, 5120}, {5120, 5120}, {27648, 5120}, {5120, 13824}}, 2},
        {"Llama-3-8B", {{6144, 4096}, {4096, 4096}, {28672, 4096}, {4096, 14336}}, 3}, /* and Mistral-7B */
        {"Llama-2-70B / 2", {{5120, 8192}, {8192, 4096}, {28672, 8192}, {8192, 14336}}, 2}};
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++) bench_model(b, &models[i]);
}

/* ---- the program ---- */

static void measure_ceilings(struct bench *b)
{
    const struct ops_limits limits = {16384, 1, 1024, 8192, 1, BENCH_HEAD_DIM, 1024, 1, false};
    bench_open(b, &limits);
    bench_demand(ops_ceilings(&b->ops, (size_t)2 << 30, &b->ceilings));
    bench_report(b, "machine", "ceilings", "gemm_tflops", b->ceilings.gemm_tflops, "gemv_gbs", b->ceilings.gemv_gbs,
                 "copy_gbs", b->ceilings.copy_gbs, NULL);
    bench_close(b);
}

static void write_rows(const cJSON *rows, const char *path)
{
    char *text = cJSON_Print(rows);
    FILE *file = fopen(path, "w");
    if (!text || !file || fprintf(file, "%s\n", text) < 0 || fclose(file) != 0) {
        fprintf(stderr, "bench_kernels: cannot write %s\n", path);
        exit(1);
    }
    free(text);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(struct bench *b);
    } parts[] = {{"prefill", bench_prefill},
                 {"decode", bench_decode},
                 {"linear", bench_linear},
                 {"small", bench_small},
                 {"vl", bench_vl}};
    struct bench b = {.rows = cJSON_CreateArray()};
    const char *only = NULL, *output = NULL;
    double start = clock_seconds();
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--only")) only = argv[i + 1];
        if (!strcmp(argv[i], "--output")) output = argv[i + 1];
        if (!strcmp(argv[i], "--device")) b.device = (int)strtol(argv[i + 1], NULL, 10);
    }
    if (ops_device_count("cuda") == 0) {
        printf("bench_kernels: skipped: no CUDA device\n");
        return 0;
    }
    measure_ceilings(&b);
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++)
        if (!only || strstr(only, parts[i].name)) parts[i].run(&b);
    if (output) write_rows(b.rows, output);
    printf("%.1f s\n", clock_seconds() - start);
    cJSON_Delete(b.rows);
    return 0;
}
