#include "runtime/engine.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "runtime/engine_private.h"

/* Ends a start-up phase: all ranks go on, or all return the lowest failing rank's error. */
static int agree(struct engine *e, int rc, const char *phase, const char *next_phase)
{
    TRY(comm_agree(e->comm, rc, phase));
    liveness_phase(e->liveness, next_phase);
    return OK;
}

/* Rank 0's scheduler learns what was set. */
static void use_policy(struct engine *e)
{
    const struct resources *r = &e->resources;
    scheduler_use_policy(e->scheduler, &r->policy);
    scheduler_use_storage(e->scheduler, kv_page_tokens(&r->kv, resources_format(r)), resources_kept_token_bytes(r),
                          kv_plain_tokens(&r->config.kv_cache));
}

static int open_phases(struct engine *e, const struct config *config, struct checkpoint **checkpoint)
{
    struct model_dims dims;
    liveness_phase(e->liveness, "device");
    TRY(agree(e, engine__configure(e, config), "device", "model"));
    TRY(agree(e, engine__describe(e, config, &dims), "model", "connect"));
    TRY(agree(e, engine__connect(e, config, &dims), "connect", "plan"));
    TRY(agree(e, engine__plan(e, config, &dims, checkpoint), "plan", "memory"));
    TRY(comm_same(e->comm, "model", model_dims_hash(&dims)));
    TRY(agree(e, engine__allocate(e, *checkpoint), "memory", "load"));
    TRY(agree(e, engine__load(e, *checkpoint), "load", "warm"));
    TRY(agree(e, engine__warm(e), "warm", "ready"));
    if (e->scheduler) use_policy(e);
    liveness_step_end(e->liveness); /* the caller began the watch, when it joined the ranks */
    return OK;
}

int engine_open(const struct config *config, struct comm *comm, struct liveness *liveness, struct engine **out)
{
    struct checkpoint *checkpoint = NULL;
    struct engine *e = calloc(1, sizeof *e);
    double start = clock_seconds();
    *out = e;
    liveness_phase(liveness, "open");
    TRY(comm_agree(comm, e ? OK : status_set(ERR_NOMEM, __FILE__, __LINE__, "engine: out of memory"), "open"));
    e->comm = comm;
    e->liveness = liveness;
    int rc = open_phases(e, config, &checkpoint);
    checkpoint_close(checkpoint);
    if (!rc && comm->rank == 0) log_line(LOG_INFO, "ready for requests after %.2f s", clock_seconds() - start);
    return rc;
}

void engine_close(struct engine *e)
{
    if (!e) return;
    struct engine_prefill *p = &e->prefill;
    void *owned[] = {
        e->slots, e->spans,    p->ids,  p->position,    p->slot,         p->cu_seqlens,         p->image_row,
        p->ends,  p->sequence, p->kept, e->host_tokens, e->host_logprob, e->host_logprob_token, e->host_recall_counts};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    scheduler_close(e->scheduler);
    step_message_close(&e->message);
    resources_close(&e->resources);
    if (e->ops.vt) ops_memory_give_back(&e->ops, e->memory, e->plan.arena_bytes);
    if (e->ops.vt) ops_host_give_back(&e->ops, e->host_memory, e->plan.host_bytes);
    if (e->device_comm) ops_forget_steps(&e->ops);
    ops_watch(&e->ops, NULL, NULL);
    comm_close(e->device_comm); /* before the stream that it works on */
    ops_close(&e->ops);
    free(e);
}

const struct model_dims *engine_dims(const struct engine *e) { return &e->resources.dims; }

const struct config *engine_config(const struct engine *e) { return &e->resources.config; }

int engine_max_prompt_tokens(const struct engine *e) { return e->resources.config.max_model_len - 1; }

void engine_use_tokenizer(struct engine *e, const struct tokenizer *tokenizer)
{
    scheduler_use_tokenizer(e->scheduler, tokenizer);
}

int engine_submit(struct engine *e, struct request *request, struct sink sink)
{
    const struct policy *policy = &e->resources.policy;
    struct policy_sequence sequence = {.prompt_tokens = request->n_ids,
                                       .n_spans = request->n_images,
                                       .spans = request->spans,
                                       .last_turn_start = request->last_turn_start,
                                       .budget = request->budget};
    int judging = 1;
    if (request->n_images > e->resources.config.max_images_per_prompt)
        FAIL(ERR_REQUEST, "%d images in the prompt, at most %d are served (max_images_per_prompt)", request->n_images,
             e->resources.config.max_images_per_prompt);
    if (request->n_followup && policy->recall == policy)
        FAIL(ERR_REQUEST,
             "a follow-up would be read over the cache's part on the device alone: kv_cache.evicted: host "
             "with kv_cache.policy %s serves single turns",
             policy->vt->name);
    if (request->n_followup && policy->env.aged)
        FAIL(ERR_REQUEST, "a follow-up is read over the lanes of what came before, which kv_cache.plain_sinks and "
                          "kv_cache.plain_window store in two parts: follow-ups are served with both 0");
    if (request->n_ids > 0 && policy_runs(policy, &sequence)) {
        judging = policy_judging_rows(policy, &sequence);
        if (policy->vt->whole_prompt) judging = request->n_ids;
    }
    return scheduler_submit(e->scheduler, request, sink, judging);
}

/* Rank 0 sends the message; the others receive it, idling gently until there is one. */
static int exchange(struct engine *e)
{
    struct step_message *m = &e->message;
    TRY(comm_broadcast_idle(e->comm, &m->head, sizeof m->head, 0));
    if (m->head.body_bytes > m->capacity) FAIL(ERR_BUG, "step message of %zu bytes", (size_t)m->head.body_bytes);
    return m->head.body_bytes ? comm_broadcast(e->comm, m->body, m->head.body_bytes, 0) : OK;
}

int engine_step(struct engine *e, int *active)
{
    bool work;
    *active = 0;
    TRY(scheduler_plan(e->scheduler, &e->message, &work));
    if (work) {
        liveness_step_begin(e->liveness, e->message.head.number); /* the others are waiting from here on */
        TRY(exchange(e));
        TRY(engine__run_step(e));
    }
    /* One step late, unless there is no later step to wait for. */
    if (scheduler_pending(e->scheduler) && (!work || scheduler_pending(e->scheduler) != e->message.head.number))
        TRY(engine__collect(e));
    *active = scheduler_active(e->scheduler);
    return OK;
}

int engine_abort_all(struct engine *e) { return scheduler_abort_all(e->scheduler); }

/* Every rank measures at the same time and the sums come out on all. */
static int measure(struct engine *e, struct engine_floor *out)
{
    const struct weights *w = model_weights(e->resources.model);
    struct engine_floor mine = {.weight_bytes = weights_step_bytes(w), .layer_elements = weights_layer_elements(w)};
    struct engine_floor *all = calloc((size_t)e->comm->size, sizeof *all);
    if (!all) FAIL(ERR_NOMEM, "engine: out of host memory");
    int rc = comm_barrier(e->comm);
    if (!rc) rc = ops_ceilings(&e->ops, mine.weight_bytes, &mine.sum);
    if (!rc) rc = comm_all_gather_host(e->comm, all, &mine, sizeof mine);
    const struct model_dims *dims = &e->resources.dims;
    *out = (struct engine_floor){.kv_token_bytes = resources_kept_token_bytes(&e->resources),
                                 .attention_width = (int64_t)dims->n_layers * dims->n_heads * dims->head_dim};
    for (int r = 0; r < e->comm->size && !rc; r++) {
        out->sum.gemm_tflops += all[r].sum.gemm_tflops;
        out->sum.gemv_gbs += all[r].sum.gemv_gbs;
        out->sum.copy_gbs += all[r].sum.copy_gbs;
        out->weight_bytes += all[r].weight_bytes;
        out->layer_elements += all[r].layer_elements;
    }
    free(all);
    return rc;
}

int engine_ceilings(struct engine *e, struct engine_floor *out)
{
    e->message.head = (struct step_head){.kind = STEP_CEILINGS};
    TRY(exchange(e));
    return measure(e, out);
}

int engine_follow(struct engine *e)
{
    struct step_view v;
    for (;;) {
        TRY(exchange(e));
        if (e->message.head.kind == STEP_STOP) return OK;
        if (e->message.head.kind == STEP_CEILINGS) {
            struct engine_floor floor;
            TRY(measure(e, &floor));
            continue;
        }
        if (e->message.head.kind == STEP_SET_POLICY) {
            TRY(step_read(&e->message, e->limits.image_bytes, &v));
            TRY(resources_set_policy(&e->resources, v.policy));
            continue;
        }
        TRY(engine__run_step(e));
    }
}

int engine_stop(struct engine *e)
{
    e->message.head = (struct step_head){.kind = STEP_STOP};
    return exchange(e);
}

int engine_set_policy(struct engine *e, const struct policy_config *config)
{
    struct step_view v;
    if (scheduler_active(e->scheduler)) FAIL(ERR_BUG, "engine_set_policy with requests active");
    TRY(resources_check_policy(&e->resources, config));
    e->message.head = (struct step_head){.kind = STEP_SET_POLICY};
    TRY(step_layout(&e->message, e->limits.image_bytes, &v));
    memcpy((struct policy_config *)v.policy, config, sizeof *config);
    TRY(exchange(e));
    TRY(resources_set_policy(&e->resources, config));
    use_policy(e);
    return OK;
}

void engine_progress(const struct engine *e, struct engine_counters *out) { *out = e->counters; }

void engine_counters(struct engine *e, struct engine_counters *out)
{
    int32_t free_pages = 0;
    *out = e->counters;
    out->vision_seconds = model_vision_seconds(e->resources.model);
    out->max_running = e->scheduler ? scheduler_max_running(e->scheduler) : 0;
    out->pages_total = e->resources.kv.n_pages;
    if (!ops_download(&e->ops, &free_pages, e->resources.kv.free_count, sizeof free_pages))
        out->pages_free = free_pages;
    out->host_pages_total = e->resources.host.n_pages;
    if (out->host_pages_total && !ops_download(&e->ops, &free_pages, e->resources.host.free_count, sizeof free_pages))
        out->host_pages_free = free_pages;
    out->planned_bytes = e->plan.total;
    out->used_bytes = plan_used_bytes(&e->ops) - e->used_before;
}

int engine_finish(struct engine *e) { return ops_finish(&e->ops); }
