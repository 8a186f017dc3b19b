/* The CPU backend's table entry: opening, scratch and copies. "Device" memory is the process's own. */
#include <cblas.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

static int count_devices(void) { return 1; }

static int open_cpu(struct ops *o, int device, int n_threads)
{
    if (device != 0 && device != OPS_NO_DEVICE) FAIL(ERR_ARG, "cpu: device %d, expected 0", device);
    struct cpu *c = calloc(1, sizeof *c);
    if (!c) FAIL(ERR_NOMEM, "cpu: %zu bytes for the backend", sizeof *c);
    c->n_threads = n_threads;
    c->vector = vector__choose();
    o->impl = c;
    o->dtype = DTYPE_F32;
    omp_set_num_threads(n_threads);
    openblas_set_num_threads(n_threads);
    return OK;
}

static void close_cpu(struct ops *o)
{
    struct cpu *c = cpu__of(o);
    if (!c) return;
    if (c->scratch) cpu__memory_give_back(o, c->scratch, c->scratch_bytes);
    free(c);
    o->impl = NULL;
}

static int use_dtype(struct ops *o, enum dtype model_dtype)
{
    (void)o, (void)model_dtype; /* weights are widened on use */
    return OK;
}

/* The process's own memory: what is free of it is the plan's business. */
static int memory_free(struct ops *o, size_t *free_bytes, size_t *total_bytes)
{
    (void)o;
    *free_bytes = *total_bytes = 0;
    return OK;
}

static int reserve(struct ops *o, const struct ops_limits *limits, size_t *bytes, bool measure)
{
    static int (*const families[])(const struct cpu *, const struct ops_limits *, struct arena *) = {
        cpu__linear_measure, cpu__attention_measure, cpu__decode_measure, cpu__probe_measure,
        cpu__sample_measure, cpu__expected_measure,  cpu__aged_measure};
    struct cpu *c = cpu__of(o);
    size_t most = ARENA_ALIGNMENT;
    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++) {
        struct arena arena;
        arena_measure(&arena);
        TRY(families[i](c, limits, &arena));
        most = arena.used > most ? arena.used : most;
    }
    *bytes = most;
    if (measure) return OK;
    c->limits = *limits;
    if (c->scratch) cpu__memory_give_back(o, c->scratch, c->scratch_bytes);
    c->scratch = NULL;
    TRY(cpu__memory_take(o, most, &c->scratch));
    c->scratch_bytes = most;
    return OK;
}

int cpu__scratch(struct ops *o, struct arena *arena)
{
    struct cpu *c = cpu__of(o);
    if (!c->scratch) FAIL(ERR_BUG, "cpu: an op needs scratch before ops_reserve");
    arena_init(arena, c->scratch, c->scratch_bytes);
    return OK;
}

static int upload(struct ops *o, void *to, const void *from_host, size_t bytes)
{
    (void)o;
    memcpy(to, from_host, bytes);
    return OK;
}

static int download(struct ops *o, void *to_host, const void *from, size_t bytes)
{
    (void)o;
    memcpy(to_host, from, bytes);
    return OK;
}

static int copy(struct ops *o, void *to, const void *from, size_t bytes)
{
    (void)o;
    memmove(to, from, bytes);
    return OK;
}

static int zero(struct ops *o, void *to, size_t bytes)
{
    (void)o;
    memset(to, 0, bytes);
    return OK;
}

static int finish(struct ops *o)
{
    (void)o;
    return OK;
}

/* Fused ops are their parts here. */
static int linear_swiglu(struct ops *o, struct tensor y, struct tensor gate_up, struct tensor x, struct tensor w,
                         const float *bias)
{
    TRY(cpu__linear(o, gate_up, x, w, bias));
    return cpu__swiglu(o, y, gate_up);
}

static int rope_append(struct ops *o, const struct kv_view *kv, const struct attention_heads *heads, struct tensor q,
                       struct tensor k, struct tensor v, const int32_t *position, const float *inverse_frequency,
                       float scale, const struct seq_batch *batch)
{
    TRY(cpu__rope(o, q, position, inverse_frequency, scale));
    TRY(cpu__rope(o, k, position, inverse_frequency, scale));
    return cpu__kv_append(o, kv, heads, k, v, batch);
}

static int decode_begin(struct ops *o, const struct seq_batch *batch, const struct kv_view *kv,
                        const struct kv_view *aged)
{
    (void)o, (void)batch, (void)kv, (void)aged;
    return OK;
}

static int run_step(struct ops *o, int bucket, int (*body)(void *arg), void *arg)
{
    (void)o, (void)bucket;
    return body(arg);
}

static void forget_steps(struct ops *o) { (void)o; }

static int bucket(const struct ops *o, int n)
{
    (void)o;
    return n;
}

static size_t graph_bytes(const struct ops *o, int n_layers)
{
    (void)o, (void)n_layers;
    return 0;
}

/* Ops are done when they return: a mark has nothing to note and a download nothing to wait for. */
static int mark(struct ops *o, int i)
{
    (void)o, (void)i;
    return OK;
}

static int download_marked(struct ops *o, void *to_host, const void *from, size_t bytes, int i)
{
    (void)i;
    return download(o, to_host, from, bytes);
}

const struct ops_vt ops_cpu = {
    .name = "cpu",
    .device_count = count_devices,
    .open = open_cpu,
    .close = close_cpu,
    .use_dtype = use_dtype,
    .memory_free = memory_free,
    .reserve = reserve,
    .memory_take = cpu__memory_take,
    .memory_give_back = cpu__memory_give_back,
    .host_take = cpu__memory_take,
    .host_give_back = cpu__memory_give_back,
    .upload = upload,
    .download = download,
    .copy = copy,
    .zero = zero,
    .finish = finish,
    .forget_steps = forget_steps,
    .run_step = run_step,
    .bucket = bucket,
    .graph_bytes = graph_bytes,
    .mark = mark,
    .download_marked = download_marked,
    .ceilings = cpu__ceilings,
    .fill_normal = cpu__fill_normal,
    .embed = cpu__embed,
    .gather_rows = cpu__gather_rows,
    .scatter_rows = cpu__scatter_rows,
    .decode_inputs = cpu__decode_inputs,
    .rms_norm = cpu__rms_norm,
    .add_rms_norm = cpu__add_rms_norm,
    .layer_norm = cpu__layer_norm,
    .add = cpu__add,
    .linear = cpu__linear,
    .rope = cpu__rope,
    .swiglu = cpu__swiglu,
    .linear_swiglu = linear_swiglu,
    .activate = cpu__activate,
    .image_patches = cpu__image_patches,
    .attention_vision = cpu__attention_vision,
    .attention_prefill = cpu__attention_prefill,
    .decode_begin = decode_begin,
    .attention_decode = cpu__attention_decode,
    .attention_decode_aged = cpu__attention_decode_aged,
    .attention_decode_listed = cpu__attention_decode_listed,
    .attention_probe = cpu__attention_probe,
    .judge_columns = cpu__judge_columns,
    .cluster_bytes = cpu__cluster_bytes,
    .cluster_keys = cpu__cluster_keys,
    .select_clusters = cpu__select_clusters,
    .kv_reset = cpu__kv_reset,
    .kv_append = cpu__kv_append,
    .rope_append = rope_append,
    .kv_pack = cpu__kv_pack,
    .list_others = cpu__list_others,
    .kv_split = cpu__kv_split,
    .recall = cpu__recall,
    .kv_drop = cpu__kv_drop,
    .kv_quantise = cpu__kv_quantise,
    .kv_widen = cpu__kv_widen,
    .kv_age = cpu__kv_age,
    .kv_release = cpu__kv_release,
    .select_top = cpu__select_top,
    .split_budgets = cpu__split_budgets,
    .heavy_begin = cpu__heavy_begin,
    .heavy_decode = cpu__heavy_decode,
    .average_pool = cpu__average_pool,
    .page_bounds = cpu__page_bounds,
    .pick_pages = cpu__pick_pages,
    .sum_fixed = cpu__sum_fixed,
    .select_rows = cpu__select_rows,
    .expected_attention = cpu__expected_attention,
    .unshard_columns = cpu__unshard_columns,
    .sample = cpu__sample,
    .sampling_begin = cpu__sampling_begin,
};
