#include <string.h>

#include "base/clock.h"
#include "runtime/engine_private.h"

/* New sequences take their slots: sampling state on the device, image spans on the host. */
static int begin_sequences(struct engine *e, const struct step_view *v)
{
    int max_spans = e->resources.config.max_images_per_prompt;
    for (int i = 0; i < e->message.head.n_begin; i++) {
        const struct step_begin *b = &v->begin[i];
        struct engine_slot *slot = &e->slots[b->slot];
        if (b->n_spans > max_spans) FAIL(ERR_BUG, "step: %d images in a prompt, at most %d", b->n_spans, max_spans);
        slot->budget = b->budget;
        slot->seed = b->sampling.seed;
        slot->last_turn_start = b->last_turn_start;
        slot->n_spans = b->n_spans;
        if (b->n_spans) memcpy(slot->spans, v->spans + b->first_span, (size_t)b->n_spans * sizeof *slot->spans);
        TRY(model_begin_sequence(e->resources.model, b->slot, v->ids + b->first_id, b->n_ids, &b->sampling,
                                 &e->resources.sampling));
        TRY(ops_sampling_force(&e->ops, &e->resources.sampling, b->slot, b->n_ids, v->ids + b->first_forced,
                               b->n_forced));
    }
    return OK;
}

/* Lays the chunks of the step one after the other. Returns the number of rows. */
static int lay_chunk(struct engine *e, const struct step_view *v, int i, int row)
{
    const struct step_chunk *c = &v->chunk[i];
    const struct engine_slot *slot = &e->slots[c->slot];
    struct engine_prefill *p = &e->prefill;
    int image = c->first_image;
    memcpy(p->ids + row, v->ids + c->first_id, (size_t)c->n_tokens * sizeof *p->ids);
    for (int j = 0; j < c->n_tokens; j++) p->position[row + j] = c->first + j;
    for (int j = 0; j < slot->n_spans; j++)
        if (slot->spans[j].start >= c->first && slot->spans[j].start < c->first + c->n_tokens)
            p->image_row[image++] = row + slot->spans[j].start - c->first;
    p->slot[i] = c->slot;
    p->ends[i] = c->ends;
    p->sequence[i] = (struct policy_sequence){.slot = c->slot,
                                              .prompt_tokens = c->prompt_tokens,
                                              .first_column = c->first_column,
                                              .n_spans = slot->n_spans,
                                              .spans = slot->spans,
                                              .last_turn_start = slot->last_turn_start,
                                              .budget = slot->budget,
                                              .seed = slot->seed,
                                              .continues = c->continues};
    return row + c->n_tokens;
}

static int run_prefill(struct engine *e, const struct step_view *v)
{
    const struct step_head *h = &e->message.head;
    struct engine_prefill *p = &e->prefill;
    struct resources *r = &e->resources;
    int rows = 0;
    if (!h->n_chunks) return OK;
    double start = clock_seconds();
    p->cu_seqlens[0] = 0;
    for (int i = 0; i < h->n_chunks; i++) p->cu_seqlens[i + 1] = rows = lay_chunk(e, v, i, rows);
    struct prefill in = {.ids = p->ids,
                         .position = p->position,
                         .n_seqs = h->n_chunks,
                         .n_tokens = rows,
                         .slot = p->slot,
                         .cu_seqlens = p->cu_seqlens,
                         .n_images = h->n_images,
                         .pixels = v->pixels,
                         .image_row = p->image_row,
                         .ends = p->ends,
                         .sequence = p->sequence,
                         .kept = p->kept};
    TRY(model_prefill(r->model, &in, &r->kv, &r->policy, &r->sampling));
    for (int i = 0; e->scheduler && i < h->n_chunks; i++)
        if (p->ends[i])
            scheduler_prompt_ended(e->scheduler, p->slot[i], p->kept + (size_t)i * (size_t)r->dims.n_layers);
    e->counters.prefill_tokens += rows;
    e->counters.prefill_seconds += clock_seconds() - start;
    return OK;
}

static int run_decode(struct engine *e, const struct step_view *v)
{
    struct resources *r = &e->resources;
    int n = e->message.head.n_decode;
    if (!n) return OK;
    double start = clock_seconds();
    TRY(model_decode(r->model, v->decode, n, &r->kv, &r->policy, &r->sampling));
    e->counters.decode_tokens += n;
    e->counters.decode_seconds += clock_seconds() - start;
    return OK;
}

/* Copies the step's results aside on the device, where the next step does not touch them. */
static int set_aside(struct engine *e)
{
    struct resources *r = &e->resources;
    size_t slots = (size_t)r->kv.n_slots, pairs = slots * (1 + MAX_LOGPROBS), turn = e->message.head.number & 1;
    int32_t *tokens = r->tokens + turn * (slots + 1);
    TRY(ops_copy(&e->ops, tokens, r->sampling.next_token, slots * sizeof *tokens));
    TRY(ops_copy(&e->ops, tokens + slots, r->kv.error, sizeof *tokens));
    TRY(ops_copy(&e->ops, r->logprob + turn * pairs, r->sampling.logprob, pairs * sizeof *r->logprob));
    TRY(ops_copy(&e->ops, r->logprob_token + turn * pairs, r->sampling.logprob_token,
                 pairs * sizeof *r->logprob_token));
    const int64_t *counts = policy_recall_counts(&r->policy);
    if (counts) TRY(ops_copy(&e->ops, r->recall_counts + turn * 2 * slots, counts, 2 * slots * sizeof *counts));
    return ops_mark(&e->ops, (int)turn);
}

#ifdef VITRAIL_CHECK_RANKS
#include "base/hash.h"

/* Debug builds hold the ranks against each other: what was sampled must be the same bits everywhere. */
static int compare_ranks(struct engine *e)
{
    size_t slots = (size_t)e->resources.kv.n_slots;
    TRY(ops_download(&e->ops, e->host_tokens, e->resources.sampling.next_token, slots * sizeof *e->host_tokens));
    return comm_same(e->comm, "sampled tokens", hash_bytes(e->host_tokens, slots * sizeof *e->host_tokens));
}
#else
static int compare_ranks(struct engine *e)
{
    (void)e;
    return OK;
}
#endif

static int release(struct engine *e, int slot)
{
    TRY(ops_kv_release(&e->ops, &e->resources.kv, slot));
    if (e->resources.ages) TRY(ops_kv_release(&e->ops, &e->resources.aged, slot));
    return resources_keeps_evicted(&e->resources) ? ops_kv_release(&e->ops, &e->resources.host, slot) : OK;
}

int engine__run_step(struct engine *e)
{
    struct step_view v;
    const struct step_head *h = &e->message.head;
    TRY(comm_poll(e->comm));
    TRY(step_read(&e->message, e->limits.image_bytes, &v));
    liveness_phase(e->liveness, h->n_chunks ? "prefill" : "decode");
    liveness_step_begin(e->liveness, h->number);
    for (int i = 0; i < h->n_release; i++) TRY(release(e, v.release[i]));
    TRY(begin_sequences(e, &v));
    TRY(run_prefill(e, &v));
    TRY(run_decode(e, &v));
    TRY(set_aside(e));
    TRY(compare_ranks(e));
    liveness_step_end(e->liveness);
    e->counters.steps++;
    return OK;
}

int engine__collect(struct engine *e)
{
    struct resources *r = &e->resources;
    uint64_t step = scheduler_pending(e->scheduler);
    size_t slots = (size_t)r->kv.n_slots, pairs = slots * (1 + MAX_LOGPROBS), turn = step & 1;
    struct step_results results = {.step = step, .token = e->host_tokens};
    liveness_step_begin(e->liveness, step); /* a GPU's step goes on until its results are there */
    TRY(ops_download_marked(&e->ops, e->host_tokens, r->tokens + turn * (slots + 1), (slots + 1) * sizeof(int32_t),
                            (int)turn));
    if (e->host_tokens[slots]) FAIL(ERR_BUG, "step %llu: a lane found no free page", (unsigned long long)step);
    if (scheduler_wants_logprobs(e->scheduler)) {
        TRY(ops_download_marked(&e->ops, e->host_logprob, r->logprob + turn * pairs, pairs * sizeof(float), (int)turn));
        TRY(ops_download_marked(&e->ops, e->host_logprob_token, r->logprob_token + turn * pairs,
                                pairs * sizeof(int32_t), (int)turn));
        results.logprob = e->host_logprob;
        results.logprob_token = e->host_logprob_token;
    }
    if (policy_recall_counts(&r->policy)) {
        TRY(ops_download_marked(&e->ops, e->host_recall_counts, r->recall_counts + turn * 2 * slots,
                                2 * slots * sizeof *e->host_recall_counts, (int)turn));
        results.recall_counts = e->host_recall_counts;
    }
    liveness_step_end(e->liveness);
    return scheduler_collect(e->scheduler, &results);
}
