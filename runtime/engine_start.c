#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/hash.h"
#include "base/log.h"
#include "runtime/engine_private.h"

/* ---- device ---- */

int engine__configure(struct engine *e, const struct config *config)
{
    bool cuda = config->device == CONFIG_DEVICE_CUDA;
    TRY(ops_open(&e->ops, cuda ? "cuda" : "cpu", cuda ? e->comm->local_rank : 0,
                 config->cpu_threads > 0 ? config->cpu_threads : 1));
    e->used_before = plan_used_bytes(&e->ops);
    return OK;
}

/* ---- plan ---- */

/* Pages of every rank's pool: the least that any rank can have, so that one count serves all. */
static int agree_on_pages(struct engine *e, int64_t *n_pages)
{
    int64_t *all = calloc((size_t)e->comm->size, sizeof *all);
    if (!all) FAIL(ERR_NOMEM, "engine: out of host memory");
    int rc = comm_all_gather_host(e->comm, all, n_pages, sizeof *n_pages);
    for (int i = 0; i < e->comm->size && !rc; i++)
        if (all[i] < *n_pages) *n_pages = all[i];
    free(all);
    return rc;
}

static int check_fit(const struct engine *e)
{
    const struct memory_plan *plan = &e->plan;
    int64_t one_token = e->plan.lanes;
    if (plan->n_pages < one_token)
        FAIL(ERR_NOMEM,
             "the KV pool has %" PRId64 " pages, a sequence takes at least %" PRId64 "; raise kv_cache_memory_bytes",
             plan->n_pages, one_token);
    if (resources_keeps_evicted(&e->resources) && plan->n_host_pages < one_token)
        FAIL(ERR_NOMEM,
             "the pool of evicted tokens has %" PRId64 " pages, a sequence takes at least %" PRId64
             "; raise kv_cache.host_memory_bytes",
             plan->n_host_pages, one_token);
    if (plan->host_bytes / 4 > plan->host_available)
        FAIL(ERR_NOMEM,
             "%zu MiB of host memory for evicted tokens, %zu MiB are free a rank; lower kv_cache.host_memory_bytes",
             plan->host_bytes >> 20, plan->host_available >> 18);
    if (!plan->available || plan->total <= plan->available) return OK;
    plan_print_table(plan, &e->resources, stderr);
    FAIL(ERR_NOMEM,
         "the plan takes %zu MiB a rank, %zu MiB are available; use more ranks or lower max_num_seqs, max_model_len, "
         "max_num_batched_tokens or kv_cache_memory_bytes",
         plan->total >> 20, plan->available >> 20);
}

int engine__describe(struct engine *e, const struct config *config, struct model_dims *dims)
{
    TRY(model_dims_load(config->model, dims));
    return resources_use_dtype(config, dims, &e->ops);
}

/* Operations between GPUs fail after they were enqueued: the wait for the stream is where that is heard of. */
static int poll_device_comm(void *comm) { return comm_poll(comm); }

int engine__connect(struct engine *e, const struct config *config, const struct model_dims *dims)
{
    if (config->device != CONFIG_DEVICE_CUDA || e->comm->size == 1) return OK;
    int rows =
        config->max_num_batched_tokens > config->max_num_seqs ? config->max_num_batched_tokens : config->max_num_seqs;
    size_t bytes = (size_t)rows * (size_t)dims->hidden_size * dtype_size(e->ops.dtype);
    TRY(comm_device_open(e->comm, e->comm->local_rank, e->ops.stream, bytes, &e->device_comm));
    e->comm = e->device_comm;
    ops_watch(&e->ops, poll_device_comm, e->device_comm);
    e->used_before = plan_used_bytes(&e->ops);
    return OK;
}

int engine__plan(struct engine *e, const struct config *config, const struct model_dims *dims,
                 struct checkpoint **checkpoint)
{
    if (config->load_format != CONFIG_LOAD_DUMMY) TRY(checkpoint_open(config->model, checkpoint));
    TRY(resources_open(config, dims, &e->ops, e->comm, &e->resources));
    if (*checkpoint) TRY(weights_check(model_weights(e->resources.model), *checkpoint));
    return plan_measure(&e->resources, *checkpoint, 0, 0, &e->plan);
}

/* ---- memory ---- */

static int allocate_host(struct engine *e)
{
    const struct config *c = &e->resources.config;
    struct engine_prefill *p = &e->prefill;
    size_t slots = (size_t)c->max_num_seqs, tokens = (size_t)c->max_num_batched_tokens;
    size_t spans = (size_t)c->max_images_per_prompt, layers = (size_t)e->resources.dims.n_layers;
    TRY(step_message_open(&e->message, &e->limits));
    e->slots = calloc(slots, sizeof *e->slots);
    e->spans = calloc(slots * spans + 1, sizeof *e->spans);
    p->ids = calloc(tokens, sizeof *p->ids);
    p->position = calloc(tokens, sizeof *p->position);
    p->slot = calloc(slots, sizeof *p->slot);
    p->cu_seqlens = calloc(slots + 1, sizeof *p->cu_seqlens);
    p->image_row = calloc((size_t)e->limits.max_images + 1, sizeof *p->image_row);
    p->ends = calloc(slots, sizeof *p->ends);
    p->sequence = calloc(slots, sizeof *p->sequence);
    p->kept = calloc(slots * layers, sizeof *p->kept);
    e->host_tokens = calloc(slots + 1, sizeof *e->host_tokens);
    e->host_logprob = calloc(slots * (1 + MAX_LOGPROBS), sizeof *e->host_logprob);
    e->host_logprob_token = calloc(slots * (1 + MAX_LOGPROBS), sizeof *e->host_logprob_token);
    e->host_recall_counts = calloc(2 * slots, sizeof *e->host_recall_counts);
    if (!e->host_recall_counts || !e->slots || !e->spans || !p->ids || !p->position || !p->slot || !p->cu_seqlens ||
        !p->image_row || !p->ends || !p->sequence || !p->kept || !e->host_tokens || !e->host_logprob ||
        !e->host_logprob_token)
        FAIL(ERR_NOMEM, "engine: out of host memory");
    for (size_t i = 0; i < slots; i++) e->slots[i].spans = e->spans + i * spans;
    return OK;
}

/* Rank 0's books: KV heads of every rank in every layer, by the shard plan. */
static int open_scheduler(struct engine *e)
{
    struct resources *r = &e->resources;
    int ranks = e->comm->size, layers = r->dims.n_layers;
    struct scheduler_options options = {.config = &r->config,
                                        .dims = &r->dims,
                                        .token_bytes = resources_token_bytes(&r->dims, e->ops.dtype),
                                        .image_bytes = e->limits.image_bytes};
    int *heads = calloc((size_t)ranks * (size_t)layers, sizeof *heads);
    if (!heads) FAIL(ERR_NOMEM, "engine: out of host memory");
    for (int rank = 0; rank < ranks; rank++)
        for (int l = 0; l < layers; l++)
            heads[rank * layers + l] = shard_kv_heads(r->dims.n_kv_heads, ranks, rank, l).kv_count;
    int rc = pages_open(ranks, layers, r->kv.page_size, r->kv.n_slots, heads, r->kv.n_pages, &options.pages);
    if (!rc && resources_keeps_evicted(r))
        rc = pages_open(ranks, layers, r->host.page_size, r->host.n_slots, heads, r->host.n_pages, &options.host_pages);
    free(heads);
    if (rc) pages_close(options.pages);
    return rc ? rc : scheduler_open(&options, &e->scheduler);
}

int engine__allocate(struct engine *e, const struct checkpoint *checkpoint)
{
    struct resources *r = &e->resources;
    struct ops_limits limits = model_limits(r->model);
    struct arena arena;
    size_t scratch;
    int64_t n_pages = e->plan.n_pages, n_host_pages = e->plan.n_host_pages;
    TRY(agree_on_pages(e, &n_pages));
    TRY(agree_on_pages(e, &n_host_pages));
    TRY(plan_measure(r, checkpoint, n_pages, n_host_pages, &e->plan));
    TRY(check_fit(e));
    if (log_enabled(e->comm->rank == 0 ? LOG_INFO : LOG_DEBUG)) plan_print_table(&e->plan, r, stderr);
    e->limits = plan_step_limits(&r->config, &r->dims);
    TRY(allocate_host(e));
    TRY(ops_reserve(&e->ops, &limits, &scratch, false));
    TRY(comm_reserve(e->comm, model_reduce_bytes(r->model)));
    TRY(ops_memory_take(&e->ops, e->plan.arena_bytes, &e->memory));
    arena_init(&arena, e->memory, e->plan.arena_bytes);
    TRY(resources_place(r, &arena, checkpoint, n_pages, e->plan.n_host_pages));
    arena_seal(&arena);
    if (e->plan.host_bytes) TRY(ops_host_take(&e->ops, e->plan.host_bytes, &e->host_memory));
    resources_use_host(r, e->host_memory);
    return e->comm->rank == 0 ? open_scheduler(e) : OK;
}

/* ---- load ---- */

struct progress {
    struct engine *engine;
    double start, shown;
};

/* The watchdog sees every piece as progress; people see a line about once a second. */
static void show_progress(void *arg, size_t done, size_t total)
{
    struct progress *p = arg;
    double now = clock_seconds();
    liveness_step_begin(p->engine->liveness, (uint64_t)done + 1);
    if (p->engine->comm->rank || now - p->shown < 1.0 || done == total) return;
    p->shown = now;
    log_line(LOG_INFO, "loading: %.1f of %.1f GB (%.0f%%), %.2f GB/s", (double)done * 1e-9, (double)total * 1e-9,
             100.0 * (double)done / (double)total, (double)done * 1e-9 / (now - p->start));
}

int engine__load(struct engine *e, struct checkpoint *checkpoint)
{
    struct progress p = {e, clock_seconds(), clock_seconds()};
    struct load_progress progress = {&p, show_progress};
    TRY(resources_begin(&e->resources, checkpoint, &progress));
    liveness_step_begin(e->liveness, 0); /* pieces are no steps of an answer */
    e->load_seconds = clock_seconds() - p.start;
    size_t bytes = 0;
    for (int i = 0; i < e->plan.n_rows; i++)
        if (strstr(e->plan.row[i].label, "weights")) bytes += e->plan.row[i].bytes;
    log_line(LOG_INFO, "rank %d: %.1f MB of weights in %.2f s (%.2f GB/s), %.1f MB read from files", e->comm->rank,
             (double)bytes * 1e-6, e->load_seconds, (double)bytes * 1e-9 / (e->load_seconds + 1e-9),
             checkpoint ? (double)checkpoint_bytes_read(checkpoint) * 1e-6 : 0.0);
    return OK;
}

/* ---- warm ---- */

int engine__warm(struct engine *e)
{
    struct resources *r = &e->resources;
    double start = clock_seconds();
    int n_buckets = 0;
    TRY(model_warm(r->model, &r->kv, &r->policy, &r->sampling, &n_buckets));
    if (n_buckets)
        log_line(LOG_INFO, "rank %d: decode steps of %d sizes, up to %d sequences, recorded in %.2f s", e->comm->rank,
                 n_buckets, r->config.max_num_seqs, clock_seconds() - start);
    return OK;
}
