/* bench_ops - speed of the op table against the machine's own ceilings, measured in the same run: linear chains of a
 * model's shapes as a 512-token prefill and as decode steps of 1 to 32 rows, compared with OpenBLAS's sgemm and with
 * sgemv over a float32 matrix of as many bytes as the weights; attention, sampling and the probe in milliseconds.
 *
 *   bench_ops [threads [repeats]]       best of `repeats` (default 5); run it on a quiet machine */
#include <cblas.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/hash.h"
#include "kernels/ops.h"

struct model {
    const char *name;
    enum dtype dtype;
    int hidden, ffn, n_heads, n_kv_heads, head_dim, n_layers, vocab;
};

struct bench {
    struct ops ops;
    int repeats;
    struct model model;
    struct tensor qkv, output, gate_up, down, head; /* weights, [n_layers * rows, columns] */
    struct tensor x, wide;                          /* activations [rows, widest] */
    size_t weight_bytes;
    double weights;
};

static void demand(int rc)
{
    if (!rc) return;
    fprintf(stderr, "bench_ops: %s\n", status_message());
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static struct tensor take(struct bench *b, struct tensor shape, float std)
{
    demand(ops_memory_take(&b->ops, tensor_bytes(shape), &shape.data));
    demand(ops_fill_normal(&b->ops, shape, 7, std, 0, 0, shape.dim[1]));
    return shape;
}

static struct tensor take_weight(struct bench *b, int64_t rows, int64_t columns)
{
    struct tensor w = take(b, tensor_2d(NULL, b->model.dtype, rows, columns), 0.02f);
    b->weight_bytes += tensor_bytes(w);
    b->weights += (double)tensor_count(w);
    return w;
}

static void give_back(struct bench *b, struct tensor t) { ops_memory_give_back(&b->ops, t.data, tensor_bytes(t)); }

enum { PROMPT = 512, CONTEXT = 2048, SEQS = 32, PAGE = 16, MAX_LAYERS = 100 };

static void open_bench(struct bench *b, struct model model, int n_threads, int repeats)
{
    const int64_t heads = (int64_t)model.n_heads * model.head_dim, kv = (int64_t)model.n_kv_heads * model.head_dim;
    const int64_t layers = model.n_layers, hidden = model.hidden, ffn = model.ffn;
    struct ops_limits limits = {.max_tokens = 1024,
                                .max_seqs = SEQS,
                                .max_context = CONTEXT,
                                .max_in_features = (int)(ffn > hidden ? ffn : hidden),
                                .max_heads = model.n_heads > 16 ? model.n_heads : 16,
                                .head_dim = 64,
                                .vocab_size = model.vocab};
    size_t scratch;
    *b = (struct bench){.repeats = repeats, .model = model};
    if (heads > limits.max_in_features) limits.max_in_features = (int)heads;
    demand(ops_open(&b->ops, "cpu", 0, n_threads));
    demand(ops_reserve(&b->ops, &limits, &scratch, false));
    b->qkv = take_weight(b, layers * (heads + 2 * kv), hidden);
    b->output = take_weight(b, layers * hidden, heads);
    b->gate_up = take_weight(b, layers * 2 * ffn, hidden);
    b->down = take_weight(b, layers * hidden, ffn);
    b->head = take_weight(b, model.vocab, hidden);
    b->x = take(b, tensor_2d(NULL, DTYPE_F32, PROMPT, limits.max_in_features), 1);
    int64_t widest = 2 * ffn > model.vocab ? 2 * ffn : model.vocab;
    b->wide = take(b, tensor_2d(NULL, DTYPE_F32, PROMPT, widest > heads + 2 * kv ? widest : heads + 2 * kv), 1);
    printf("\n%s: %.1f M weights of %s, %.1f MB, %d threads, %.1f MB scratch\n", model.name, b->weights * 1e-6,
           dtype_name(model.dtype), (double)b->weight_bytes * 1e-6, n_threads, (double)scratch * 1e-6);
}

static void close_bench(struct bench *b)
{
    struct tensor all[] = {b->qkv, b->output, b->gate_up, b->down, b->head, b->x, b->wide};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) give_back(b, all[i]);
    ops_close(&b->ops);
}

/* The first `columns` columns of n rows. */
static struct tensor view(struct tensor t, int64_t n, int64_t columns)
{
    t.dim[0] = n;
    t.dim[1] = columns;
    return t;
}

static void multiply(struct bench *b, struct tensor all, int layer, int layers, int n)
{
    int64_t rows = all.dim[0] / layers;
    demand(ops_linear(&b->ops, view(b->wide, n, rows), view(b->x, n, all.dim[1]), tensor_rows(all, layer * rows, rows),
                      NULL));
}

/* Seconds for all linears of all layers on n rows, and the head where `with_head`: of each layer the best of the
 * repeats, so that a moment's disturbance costs no whole pass. */
static double time_chain(struct bench *b, int n, bool with_head)
{
    double best[MAX_LAYERS + 1], sum = 0;
    const int layers = b->model.n_layers;
    for (int i = 0; i <= MAX_LAYERS; i++) best[i] = 1e9;
    for (int i = 0; i < b->repeats; i++)
        for (int layer = 0; layer <= layers - !with_head; layer++) {
            double start = now();
            if (layer == layers) {
                multiply(b, b->head, 0, 1, n);
            } else {
                multiply(b, b->qkv, layer, layers, n);
                multiply(b, b->output, layer, layers, n);
                multiply(b, b->gate_up, layer, layers, n);
                multiply(b, b->down, layer, layers, n);
            }
            double took = now() - start;
            best[layer] = took < best[layer] ? took : best[layer];
        }
    for (int i = 0; i <= layers - !with_head; i++) sum += best[i];
    return sum;
}

static double time_sgemm(struct bench *b, int m, int n, int k)
{
    struct tensor x = take(b, tensor_2d(NULL, DTYPE_F32, m, k), 1), w = take(b, tensor_2d(NULL, DTYPE_F32, n, k), 1);
    struct tensor y = take(b, tensor_2d(NULL, DTYPE_F32, m, n), 1);
    double best = 1e9;
    for (int i = 0; i < b->repeats * 4; i++) {
        double start = now();
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, n, k, 1, x.data, k, w.data, k, 0, y.data, n);
        double took = now() - start;
        best = took < best ? took : best;
    }
    give_back(b, x), give_back(b, w), give_back(b, y);
    return best;
}

/* Seconds of sgemv over a float32 matrix of as many bytes as the weights, in as many slices as there are layers; of
 * each the best. */
static double time_sgemv(struct bench *b)
{
    const int columns = b->model.hidden, slices = b->model.n_layers + 1;
    struct tensor w = take(b, tensor_2d(NULL, DTYPE_F32, (int64_t)b->weight_bytes / 4 / columns, columns), 1);
    struct tensor x = take(b, tensor_2d(NULL, DTYPE_F32, 1, columns), 1);
    struct tensor y = take(b, tensor_2d(NULL, DTYPE_F32, 1, w.dim[0]), 1);
    double best[MAX_LAYERS + 1], sum = 0;
    for (int i = 0; i <= MAX_LAYERS; i++) best[i] = 1e9;
    for (int i = 0; i < b->repeats; i++)
        for (int slice = 0; slice < slices; slice++) {
            int64_t first = w.dim[0] * slice / slices, end = w.dim[0] * (slice + 1) / slices;
            double start = now();
            cblas_sgemv(CblasRowMajor, CblasNoTrans, (int)(end - first), columns, 1, tensor_rows(w, first, 1).data,
                        columns, x.data, 1, 0, y.data, 1);
            double took = now() - start;
            best[slice] = took < best[slice] ? took : best[slice];
        }
    for (int i = 0; i < slices; i++) sum += best[i];
    give_back(b, w), give_back(b, x), give_back(b, y);
    return sum;
}

static void report_linear(struct bench *b)
{
    double layer_weights = b->weights - (double)tensor_count(b->head);
    double model_gemm =
        2.0 * PROMPT * b->model.ffn * b->model.hidden / time_sgemm(b, PROMPT, b->model.ffn, b->model.hidden) * 1e-9;
    double square = 2.0 * 2048 * 2048 * 2048 / time_sgemm(b, 2048, 2048, 2048) * 1e-9;
    double prefill = 2.0 * PROMPT * layer_weights / time_chain(b, PROMPT, false) * 1e-9;
    printf("  sgemm %d x %d x %d   %8.1f GFLOP/s\n  sgemm 2048^3           %8.1f GFLOP/s\n", PROMPT, b->model.ffn,
           b->model.hidden, model_gemm, square);
    printf("  linear, %d rows       %8.1f GFLOP/s   %.0f%% and %.0f%% of sgemm\n", PROMPT, prefill,
           100 * prefill / model_gemm, 100 * prefill / square);
    double gemv = time_sgemv(b), one = 0;
    printf("  sgemv, as many bytes   %8.1f GB/s\n", (double)b->weight_bytes / gemv * 1e-9);
    static const int rows[] = {1, 2, 3, 4, 5, 6, 8, 12, 16, 17, 24, 32, 64};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        double took = time_chain(b, rows[i], true);
        if (i == 0) one = took;
        printf("  linear, %2d rows        %8.1f GB/s     %6.2f ms, %.2f of one row, %.0f%% of sgemv, %.0f GFLOP/s\n",
               rows[i], (double)b->weight_bytes / took * 1e-9, took * 1e3, took / one, 100 * gemv / took,
               2 * b->weights * rows[i] / took * 1e-9);
    }
}

static struct kv_view take_cache(struct bench *b, int lanes)
{
    const int n = lanes * SEQS, pages = CONTEXT / PAGE;
    struct kv_view kv = {.page_size = PAGE,
                         .head_dim = b->model.head_dim,
                         .n_pages = n * pages,
                         .max_pages = pages,
                         .lanes_per_slot = lanes,
                         .n_slots = SEQS};
    kv.pool = tensor_3d(NULL, DTYPE_F32, kv.n_pages, 2 * PAGE, kv.head_dim);
    demand(ops_memory_take(&b->ops, tensor_bytes(kv.pool), &kv.pool.data));
    demand(ops_memory_take(&b->ops, (size_t)n * (size_t)pages * 4, (void **)&kv.page_row));
    demand(ops_memory_take(&b->ops, (size_t)n * 4, (void **)&kv.lane_len));
    demand(ops_memory_take(&b->ops, (size_t)kv.n_pages * 4, (void **)&kv.free_stack));
    demand(ops_memory_take(&b->ops, 4, (void **)&kv.free_count));
    demand(ops_memory_take(&b->ops, 4, (void **)&kv.error));
    demand(ops_kv_reset(&b->ops, &kv));
    return kv;
}

static void give_cache_back(struct bench *b, struct kv_view *kv)
{
    size_t n = (size_t)kv->lanes_per_slot * (size_t)kv->n_slots;
    ops_memory_give_back(&b->ops, kv->pool.data, tensor_bytes(kv->pool));
    ops_memory_give_back(&b->ops, kv->page_row, n * (size_t)kv->max_pages * 4);
    ops_memory_give_back(&b->ops, kv->lane_len, n * 4);
    ops_memory_give_back(&b->ops, kv->free_stack, (size_t)kv->n_pages * 4);
    ops_memory_give_back(&b->ops, kv->free_count, 4);
    ops_memory_give_back(&b->ops, kv->error, 4);
}

/* A view of [rows, heads, head_dim] in the wide activations. */
static struct tensor heads_view(struct bench *b, int rows, int first_head, int n_heads)
{
    const int dim = b->model.head_dim;
    struct tensor t = tensor_3d((float *)b->wide.data + (int64_t)first_head * dim, DTYPE_F32, rows, n_heads, dim);
    t.stride[0] = b->wide.stride[0];
    return t;
}

static void report_attention(struct bench *b)
{
    const struct model *m = &b->model;
    struct attention_heads heads = {m->n_heads, m->n_kv_heads, m->head_dim, 0, 0.125f};
    struct kv_view kv = take_cache(b, m->n_kv_heads);
    struct tensor q = heads_view(b, PROMPT, 0, m->n_heads), k = heads_view(b, PROMPT, m->n_heads, m->n_kv_heads);
    struct tensor out = tensor_3d(NULL, DTYPE_F32, PROMPT, m->n_heads, m->head_dim);
    demand(ops_memory_take(&b->ops, tensor_bytes(out), &out.data));
    int32_t slot[SEQS], cu[2] = {0, PROMPT};
    double prefill = 1e9, late = 1e9, decode[2] = {1e9, 1e9}, probe_time = 1e9;
    for (int s = 0; s < SEQS; s++) slot[s] = s;
    for (int s = 0; s < SEQS; s++)
        for (int i = 0; i < CONTEXT / PROMPT; i++) {
            struct seq_batch batch = {1, PROMPT, slot + s, cu, slot + s, cu};
            demand(ops_kv_append(&b->ops, &kv, &heads, k, k, &batch));
            double start = now();
            if (s < b->repeats) demand(ops_attention_prefill(&b->ops, out, q, k, k, &batch, &kv, &heads));
            double took = now() - start;
            if (s < b->repeats && i == 0) prefill = took < prefill ? took : prefill;
            if (s < b->repeats && i == CONTEXT / PROMPT - 1) late = took < late ? took : late;
        }
    for (int i = 0; i < 4 * b->repeats; i++)
        for (int j = 0; j < 2; j++) {
            int n = j ? SEQS : 1;
            struct seq_batch batch = {.n_seqs = n, .n_tokens = n, .slot = slot};
            double start = now();
            demand(ops_attention_decode(&b->ops, tensor_rows(out, 0, n), tensor_rows(q, 0, n), &batch, &kv, &heads));
            double took = now() - start;
            decode[j] = took < decode[j] ? took : decode[j];
        }
    float *columns = NULL;
    demand(ops_memory_take(&b->ops, (size_t)m->n_kv_heads * CONTEXT * 4, (void **)&columns));
    struct attention_probe probe = {
        .n_rows = 64, .first_position = CONTEXT - 64, .threshold = 0.01f, .column_sum = columns};
    for (int i = 0; i < b->repeats; i++) {
        double start = now();
        demand(ops_attention_probe(&b->ops, tensor_rows(q, 0, 64), &kv, &heads, &probe));
        double took = now() - start;
        probe_time = took < probe_time ? took : probe_time;
    }
    double flops = 4.0 * m->n_heads * m->head_dim * PROMPT;
    double lane_bytes = 8.0 * m->n_kv_heads * m->head_dim * CONTEXT;
    printf("  attention of a layer: prefill %d at 0: %.2f ms, %.0f GFLOP/s; at %d: %.2f ms, %.0f GFLOP/s\n", PROMPT,
           prefill * 1e3, flops * PROMPT / 2 / prefill * 1e-9, CONTEXT - PROMPT, late * 1e3,
           flops * (CONTEXT - PROMPT / 2.0) / late * 1e-9);
    printf("    decode over %d: 1 row %.3f ms, %.1f GB/s; %d rows %.2f ms, %.1f GB/s; probe of 64 rows: %.2f ms\n",
           CONTEXT, decode[0] * 1e3, lane_bytes / decode[0] * 1e-9, SEQS, decode[1] * 1e3,
           lane_bytes * SEQS / decode[1] * 1e-9, probe_time * 1e3);
    ops_memory_give_back(&b->ops, columns, (size_t)m->n_kv_heads * CONTEXT * 4);
    give_back(b, out);
    give_cache_back(b, &kv);
}

static double time_vision(struct bench *b, int tokens)
{
    struct tensor q = heads_view(b, tokens, 0, 16), out = tensor_3d(NULL, DTYPE_F32, tokens, 16, 64);
    q.dim[2] = 64;
    q.stride[1] = 64;
    q.data = calloc((size_t)tokens, 16 * 64 * sizeof(float));
    q.stride[0] = 16 * 64;
    out.data = malloc(tensor_bytes(out));
    double best = 1e9;
    for (int i = 0; i < b->repeats; i++) {
        double start = now();
        demand(ops_attention_vision(&b->ops, out, q, q, q, 1, 0.125f));
        double took = now() - start;
        best = took < best ? took : best;
    }
    free(q.data);
    free(out.data);
    return best;
}

static double time_sampling(struct bench *b, float temperature, float top_p, int n_logprobs)
{
    const int n = 8;
    struct sampling_params params[8];
    int32_t next[8] = {0}, position[8] = {0}, slot[8];
    float logprob[8 * (1 + MAX_LOGPROBS)];
    int32_t token[8 * (1 + MAX_LOGPROBS)];
    struct sampling_state state = {
        params, calloc((size_t)n * (size_t)b->model.vocab, 4), next, position, logprob, token, b->model.vocab, n, NULL,
        NULL};
    struct tensor logits = tensor_2d(malloc((size_t)n * (size_t)b->model.vocab * 4), DTYPE_F32, n, b->model.vocab);
    double best = 1e9;
    for (int i = 0; i < n; i++) {
        slot[i] = i;
        params[i] = (struct sampling_params){
            .temperature = temperature, .top_p = top_p, .repetition_penalty = 1, .n_logprobs = n_logprobs};
    }
    for (int i = 0; i < b->repeats; i++) {
        demand(ops_fill_normal(&b->ops, logits, (uint64_t)i, 3, 0, 0, b->model.vocab));
        double start = now();
        demand(ops_sample(&b->ops, logits, slot, &state));
        double took = now() - start;
        best = took < best ? took : best;
    }
    free(state.token_count);
    free(logits.data);
    return best;
}

static double time_layers(struct bench *b, int rows)
{
    const int hidden = b->model.hidden, ffn = b->model.ffn;
    struct tensor y = take(b, tensor_2d(NULL, DTYPE_F32, rows, hidden), 1);
    float *w = calloc((size_t)hidden, sizeof *w), frequency[64] = {0.5f};
    int32_t *position = calloc((size_t)rows, sizeof *position);
    double best = 1e9;
    for (int i = 0; i < b->repeats; i++) {
        double start = now();
        demand(ops_add_rms_norm(&b->ops, y, view(b->wide, rows, hidden), view(b->x, rows, hidden), w, 1e-5f));
        demand(ops_add_rms_norm(&b->ops, y, view(b->wide, rows, hidden), view(b->x, rows, hidden), w, 1e-5f));
        demand(
            ops_rope(&b->ops, heads_view(b, rows, 0, b->model.n_heads + b->model.n_kv_heads), position, frequency, 1));
        demand(ops_swiglu(&b->ops, view(b->x, rows, ffn), view(b->wide, rows, 2 * ffn)));
        double took = now() - start;
        best = took < best ? took : best;
    }
    free(w);
    free(position);
    give_back(b, y);
    return best;
}

int main(int argc, char **argv)
{
    static const struct model models[] = {{"SmolLM2-135M", DTYPE_F16, 576, 1536, 9, 3, 64, 30, 49152},
                                          {"demo-vlm", DTYPE_BF16, 256, 512, 8, 4, 64, 10, 1536}};
    int n_threads = argc > 1 ? (int)strtol(argv[1], NULL, 10) : 2;
    int repeats = argc > 2 ? (int)strtol(argv[2], NULL, 10) : 5;
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++) {
        struct bench b;
        open_bench(&b, models[i], n_threads, repeats);
        report_linear(&b);
        report_attention(&b);
        printf("    an image of 577 tokens, 16 heads of 64: %.2f ms\n", time_vision(&b, 577) * 1e3);
        printf("  norms, rope, swiglu of a layer: 512 rows %.2f ms, 1 row %.4f ms\n", time_layers(&b, PROMPT) * 1e3,
               time_layers(&b, 1) * 1e3);
        printf("  sampling 8 rows: greedy %.2f ms, temperature %.2f ms, top_p %.2f ms, 20 logprobs %.2f ms\n",
               time_sampling(&b, 0, 1, 0) * 1e3, time_sampling(&b, 1, 1, 0) * 1e3, time_sampling(&b, 1, 0.9f, 0) * 1e3,
               time_sampling(&b, 0, 1, 20) * 1e3);
        close_bench(&b);
    }
    return 0;
}
