#include "runtime/plan.h"

#include <inttypes.h>
#include <string.h>

#include "base/file.h"

size_t plan_used_bytes(struct ops *ops)
{
    size_t left = 0, total = 0;
    if (!ops_memory_free(ops, &left, &total) && total) return total - left;
    int64_t kib = file_number("/proc/self/status", "RssAnon:");
    return kib > 0 ? (size_t)kib << 10 : 0;
}

size_t plan_available_bytes(void)
{
    int64_t kib = file_number("/proc/meminfo", "MemAvailable:");
    int64_t limit = file_number("/sys/fs/cgroup/memory.max", "");
    int64_t used = file_number("/sys/fs/cgroup/memory.current", "");
    size_t available = kib > 0 ? (size_t)kib << 10 : 0;
    if (limit < 0 || used < 0 || used > limit) return available;
    return (size_t)(limit - used) < available ? (size_t)(limit - used) : available;
}

struct step_limits plan_step_limits(const struct config *c, const struct model_dims *dims)
{
    int images = resources_max_images(c, dims);
    size_t side = dims->family == MODEL_LLAVA ? (size_t)dims->vision.image_size : 0;
    /* A sequence's whole prompt comes with its first rows beside the rows themselves. One prompt may exceed them, and
     * follow-ups bring conversations of up to all score columns with few rows. */
    int prompts = 2 * (c->max_num_batched_tokens + c->max_model_len), ids = prompts + c->max_num_seqs * MAX_FORCED;
    return (struct step_limits){.max_seqs = c->max_num_seqs,
                                .max_ids = ids,
                                .max_spans = images ? prompts / dims->vision.n_image_tokens + 1 : 0,
                                .max_images = images,
                                .image_bytes = side * side * 3};
}

static void add_row(struct memory_plan *plan, const char *label, size_t bytes)
{
    if (plan->n_rows == PLAN_MAX_ROWS || !bytes) return;
    plan->row[plan->n_rows++] = (struct plan_row){label, bytes};
    plan->total += bytes;
}

/* Pages of max_num_seqs sequences of max_model_len tokens on this rank: more are never used. */
static int64_t most_pages(const struct resources *r)
{
    const struct policy_config *kv = &r->config.kv_cache;
    const int plain = r->ages ? kv->plain_sinks + kv->plain_window : 0, code_tokens = kv_page_tokens(&r->kv, KV_INT8);
    const int while_ageing = kv_age_pages(r->config.max_model_len, plain, r->kv.page_size, code_tokens);
    return (int64_t)r->kv.n_slots * r->kv.lanes_per_slot * (r->kv.max_pages + while_ageing);
}

/* What this rank may take: of a GPU its share of all memory, less what is taken; of a host, divided by its ranks. */
static int find_available(const struct resources *r, bool *gpu, size_t *available)
{
    size_t left = 0, total = 0;
    TRY(ops_memory_free(r->ops, &left, &total));
    *gpu = r->config.device == CONFIG_DEVICE_CUDA;
    if (total) {
        size_t spared = (size_t)((1 - r->config.gpu_memory_utilization) * (double)total);
        *available = left > spared ? left - spared : 0;
        return OK;
    }
    int local_ranks = r->comm->local_size > 0 ? r->comm->local_size : r->comm->size;
    *available = *gpu ? 0 : plan_available_bytes() / (size_t)local_ranks;
    return OK;
}

/* Pages of the pool: as configured, else all that can be used; on a GPU at most what the rest leaves, on a host at most
 * a quarter of what is available. */
static int choose_pages(struct resources *r, bool gpu, size_t available, size_t rest, int64_t *n_pages)
{
    size_t page = resources_page_bytes(r) + resources_scale_bytes(r), beside; /* what policies keep of a page */
    int64_t most = most_pages(r), fit;
    TRY(resources_policy_page_bytes(r, &beside));
    if (r->config.kv_cache_memory_bytes)
        fit = r->config.kv_cache_memory_bytes / (int64_t)page;
    else if (gpu && available)
        fit = available > rest ? (int64_t)((available - rest) / (page + beside + sizeof(int32_t))) : 0;
    else
        fit = gpu ? most : (int64_t)(available / 4 / (page + beside));
    *n_pages = fit < most ? fit : most;
    return OK;
}

/* Pages of the pool in host memory: as configured, else all that can be used in a quarter of the free memory. */
static int64_t choose_host_pages(const struct resources *r, size_t *available)
{
    const int local_ranks = r->comm->local_size > 0 ? r->comm->local_size : r->comm->size;
    const int64_t page = (int64_t)resources_page_bytes(r), most = most_pages(r);
    if (!resources_keeps_evicted(r)) return 0;
    *available = plan_available_bytes() / 4 / (size_t)local_ranks;
    const int64_t configured = r->config.kv_host_memory_bytes;
    const int64_t fit = (configured ? configured : (int64_t)*available) / page;
    return fit < most ? fit : most;
}

static int measure_arena(struct resources *r, const struct checkpoint *checkpoint, int64_t n_pages,
                         struct memory_plan *out)
{
    struct arena arena;
    arena_measure(&arena);
    TRY(resources_place(r, &arena, checkpoint, n_pages, out->n_host_pages));
    out->arena_bytes = arena.used;
    for (int i = 0; i < arena.n_rows; i++) add_row(out, arena.row[i].label, arena.row[i].bytes);
    return OK;
}

static int measure_all(struct resources *r, const struct checkpoint *checkpoint, int64_t n_pages, bool gpu,
                       struct memory_plan *out)
{
    struct ops_limits limits = model_limits(r->model);
    struct step_limits step = plan_step_limits(&r->config, &r->dims);
    size_t scratch;
    out->n_rows = 0;
    out->total = 0;
    out->n_pages = n_pages;
    TRY(measure_arena(r, checkpoint, n_pages, out));
    TRY(ops_reserve(r->ops, &limits, &scratch, true));
    add_row(out, "op scratch", scratch);
    if (gpu) { /* the communicator has taken its part already, and messages lie in the host's memory */
        add_row(out, "decode graphs", ops_graph_bytes(r->ops, r->dims.n_layers));
        return OK;
    }
    add_row(out, "evicted KV pages", out->host_bytes);
    if (r->comm->size > 1)
        add_row(out, "communicator", comm_scratch_bytes(r->comm->size, model_reduce_bytes(r->model)));
    add_row(out, "step messages", step_message_bytes(&step));
    return OK;
}

int plan_measure(struct resources *r, const struct checkpoint *checkpoint, int64_t n_pages, int64_t n_host_pages,
                 struct memory_plan *out)
{
    bool gpu;
    memset(out, 0, sizeof *out);
    out->page_bytes = resources_page_bytes(r);
    out->lanes = r->kv.lanes_per_slot;
    TRY(find_available(r, &gpu, &out->available));
    if (r->gpu_memory) out->available = (size_t)((double)r->gpu_memory * r->config.gpu_memory_utilization);
    const int64_t chosen = choose_host_pages(r, &out->host_available);
    out->n_host_pages = n_host_pages ? n_host_pages : chosen;
    out->host_bytes = (size_t)out->n_host_pages * out->page_bytes;
    if (!n_pages) {
        TRY(measure_all(r, checkpoint, 0, gpu, out));
        TRY(choose_pages(r, gpu, out->available, out->total, &n_pages));
    }
    return measure_all(r, checkpoint, n_pages, gpu, out);
}

/* ---- printing ---- */

static double mib(size_t bytes) { return (double)bytes / 1048576.0; }

/* Sequences that a pool holds at once where a lane takes so many pages. */
static int64_t sequences_of(const struct memory_plan *plan, int64_t n_pages, int64_t lane_pages)
{
    int64_t pages = plan->lanes * lane_pages;
    return pages ? n_pages / pages : 0;
}

/* Those of the KV pool, as the configured dtype stores them. */
static int64_t sequences(const struct memory_plan *plan, const struct resources *r, int tokens)
{
    return sequences_of(plan, plan->n_pages, resources_lane_pages(r, tokens));
}

/* Tokens that the configured policy keeps of a prompt of max_model_len. */
static int kept_tokens(const struct resources *r)
{
    const struct policy_vt *vt;
    int m = r->config.max_model_len;
    if (policy_find(r->config.kv_cache.policy, &vt) || !vt->prefill_end) return m;
    return (int)(kv_budget_share(r->config.kv_cache.budget, m) * m);
}

void plan_print_table(const struct memory_plan *plan, const struct resources *r, FILE *out)
{
    fprintf(out, "memory of rank %d of %d:\n", r->comm->rank, r->comm->size);
    for (int i = 0; i < plan->n_rows; i++)
        fprintf(out, "  %-20s %10.1f MiB\n", plan->row[i].label, mib(plan->row[i].bytes));
    fprintf(out, "  %-20s %10.1f MiB", "total", mib(plan->total));
    if (plan->available) fprintf(out, " of %.1f MiB available", mib(plan->available));
    int most = r->config.max_model_len, kept = kept_tokens(r);
    fprintf(out, "\n  KV pool: %" PRId64 " pages of %d tokens hold %" PRId64 " sequences of %d tokens", plan->n_pages,
            kv_page_tokens(&r->kv, resources_format(r)), sequences(plan, r, most), most);
    if (kept < most)
        fprintf(out, "; %" PRId64 " once %s has kept %d of them", sequences(plan, r, kept), r->config.kv_cache.policy,
                kept);
    fputc('\n', out);
    if (plan->host_bytes)
        fprintf(out,
                "  evicted tokens: %.1f MiB of host memory, %" PRId64 " pages hold %" PRId64
                " sequences of %d tokens\n",
                mib(plan->host_bytes), plan->n_host_pages,
                sequences_of(plan, plan->n_host_pages, (most + r->host.page_size - 1) / r->host.page_size), most);
}

static void print_json(const struct memory_plan *plan, const struct resources *r, FILE *out)
{
    fprintf(out, "{\"rank\": %d, \"rows\": {", r->comm->rank);
    for (int i = 0; i < plan->n_rows; i++)
        fprintf(out, "%s\"%s\": %zu", i ? ", " : "", plan->row[i].label, plan->row[i].bytes);
    fprintf(out,
            "}, \"total_bytes\": %zu, \"available_bytes\": %zu, \"kv_pages\": %" PRId64
            ", \"page_bytes\": %zu, \"lanes\": %d, "
            "\"sequences_full\": %" PRId64 ", \"sequences_kept\": %" PRId64
            ", \"host_bytes\": %zu, \"host_pages\": %" PRId64 "}",
            plan->total, plan->available, plan->n_pages, plan->page_bytes, plan->lanes,
            sequences(plan, r, r->config.max_model_len), sequences(plan, r, kept_tokens(r)), plan->host_bytes,
            plan->n_host_pages);
}

/* What printing the plans of ranks needs; no rank is started, a comm is a mere pair of numbers. */
struct printing {
    const struct config *config;
    const struct model_dims *dims;
    const struct checkpoint *checkpoint;
    struct ops *ops;
    int n_ranks;
    size_t memory;   /* of a rank as given; 0: this host's */
    int64_t n_pages; /* of every rank's pool, the least of all; 0: not known yet */
    bool json, fits;
    FILE *out; /* NULL: only the pages are wanted */
};

static int plan_rank(struct printing *p, int rank)
{
    struct comm comm = {.rank = rank, .size = p->n_ranks, .local_rank = rank, .local_size = p->n_ranks};
    struct resources r;
    struct memory_plan plan;
    int rc = resources_open(p->config, p->dims, p->ops, &comm, &r);
    if (p->config->device == CONFIG_DEVICE_CUDA) r.gpu_memory = p->memory;
    if (!rc) rc = plan_measure(&r, p->checkpoint, p->out ? p->n_pages : 0, 0, &plan);
    if (!rc && !p->out && (!p->n_pages || plan.n_pages < p->n_pages)) p->n_pages = plan.n_pages;
    if (!rc && p->out) {
        if (p->memory && p->config->device != CONFIG_DEVICE_CUDA) plan.available = p->memory;
        p->fits = p->fits && (!plan.available || plan.total <= plan.available) && plan.n_pages >= plan.lanes;
        if (p->json) {
            fputs(rank ? ", " : "", p->out);
            print_json(&plan, &r, p->out);
        } else {
            plan_print_table(&plan, &r, p->out);
        }
    }
    resources_close(&r);
    return rc;
}

static int print_ranks(struct printing *p, FILE *out)
{
    for (int rank = 0; rank < p->n_ranks; rank++) TRY(plan_rank(p, rank));
    p->out = out;
    if (p->json) fprintf(out, "{\"ranks\": [");
    for (int rank = 0; rank < p->n_ranks; rank++) TRY(plan_rank(p, rank));
    if (p->json) {
        fprintf(out, "], \"fits\": %s}\n", p->fits ? "true" : "false");
        return OK;
    }
    if (!p->fits)
        FAIL(ERR_NOMEM, "the plan exceeds the memory of a rank: use more ranks, or lower max_num_seqs, max_model_len, "
                        "max_num_batched_tokens or kv_cache_memory_bytes");
    fprintf(out, "it fits\n");
    return OK;
}

int plan_print(const struct config *config, int n_ranks, double gpu_memory_gib, bool json, FILE *out)
{
    struct model_dims dims;
    struct ops ops = {.vt = NULL};
    struct checkpoint *checkpoint = NULL;
    if (n_ranks < 1) FAIL(ERR_CONFIG, "--gpus %d: expected at least 1", n_ranks);
    TRY(model_dims_load(config->model, &dims));
    if (config->load_format != CONFIG_LOAD_DUMMY) TRY(checkpoint_open(config->model, &checkpoint));
    struct printing p = {.config = config,
                         .dims = &dims,
                         .checkpoint = checkpoint,
                         .ops = &ops,
                         .n_ranks = n_ranks,
                         .memory = (size_t)(gpu_memory_gib * 1073741824.0),
                         .json = json,
                         .fits = true};
    int rc = config->device == CONFIG_DEVICE_CUDA ? ops_open(&ops, "cuda", OPS_NO_DEVICE, 1) : ERR_UNSUPPORTED;
    if (rc == ERR_UNSUPPORTED) rc = ops_open(&ops, "cpu", 0, 1);
    if (!rc) rc = resources_use_dtype(config, &dims, &ops);
    if (!rc) rc = print_ranks(&p, out);
    ops_close(&ops);
    checkpoint_close(checkpoint);
    return rc;
}
