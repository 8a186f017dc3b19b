#include "runtime/scheduler.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "runtime/chunks.h"
#include "runtime/resources.h"
#include "runtime/sequence.h"

enum { PENDING_STEPS = 2 };

/* Who sampled a token in a step whose results were not collected yet. */
struct pending {
    uint64_t step; /* 0: none */
    bool logprobs;
    int n;
    struct sampled {
        int slot;
        uint64_t serial; /* a slot may have a new sequence by the time the token is read */
    } * sampled;         /* [2 n_slots] */
};

struct scheduler {
    const struct config *config;
    const struct model_dims *dims;
    struct pages *pages, *host_pages;
    size_t image_bytes;
    struct sequence_facts facts;
    const struct tokenizer *tokenizer;
    struct sequence *slots; /* [n_slots] */
    struct sequence *queue; /* ring of max_queued */
    int n_slots, queue_first, n_queued;
    int *prefilling; /* slots in SEQUENCE_PREFILL, oldest first */
    int n_prefilling;
    struct pending pending[PENDING_STEPS]; /* oldest first */
    uint64_t next_step, next_serial;
    int max_running;
    /* the step being planned */
    struct step_head head;
    struct step_chunk *chunk;   /* [n_slots] */
    struct sequence **chunk_of; /* [n_slots] whose they are */
    int room, columns;          /* prompt tokens and score columns left */
    int *gone;                  /* [n_layers] evicted tokens of the prompt at hand */
};

/* ---- opening ---- */

static int allocate(struct scheduler *s)
{
    size_t n = (size_t)s->n_slots;
    s->slots = calloc(n, sizeof *s->slots);
    s->queue = calloc((size_t)s->config->max_queued, sizeof *s->queue);
    s->prefilling = calloc(n, sizeof *s->prefilling);
    s->chunk = calloc(n, sizeof *s->chunk);
    s->chunk_of = calloc(n, sizeof *s->chunk_of);
    s->gone = calloc((size_t)s->dims->n_layers, sizeof *s->gone);
    bool complete = s->slots && s->queue && s->prefilling && s->chunk && s->chunk_of && s->gone;
    for (int i = 0; i < PENDING_STEPS; i++)
        if (!(s->pending[i].sampled = calloc(2 * n, sizeof *s->pending[i].sampled))) complete = false;
    for (size_t i = 0; complete && i < n; i++)
        if (!(s->slots[i].kept = calloc((size_t)s->dims->n_layers, sizeof(int)))) complete = false;
    if (!complete) FAIL(ERR_NOMEM, "scheduler: out of memory");
    return OK;
}

int scheduler_open(const struct scheduler_options *options, struct scheduler **out)
{
    struct scheduler *s = calloc(1, sizeof *s);
    *out = s;
    if (!s) FAIL(ERR_NOMEM, "scheduler: out of memory");
    s->config = options->config;
    s->dims = options->dims;
    s->pages = options->pages;
    s->host_pages = options->host_pages;
    s->image_bytes = options->image_bytes;
    s->n_slots = s->config->max_num_seqs;
    s->next_step = s->next_serial = 1;
    s->facts = (struct sequence_facts){.n_layers = s->dims->n_layers,
                                       .token_bytes = options->token_bytes,
                                       .kept_token_bytes = options->token_bytes,
                                       .page_tokens = s->config->kv_page_size,
                                       .eos_ids = s->dims->eos_ids,
                                       .n_eos_ids = s->dims->n_eos_ids};
    return allocate(s);
}

void scheduler_close(struct scheduler *s)
{
    if (!s) return;
    for (int i = 0; s->slots && i < s->n_slots; i++) {
        sequence_clear(&s->slots[i]);
        free(s->slots[i].kept);
    }
    for (int i = 0; s->queue && i < s->config->max_queued; i++) sequence_clear(&s->queue[i]);
    for (int i = 0; i < PENDING_STEPS; i++) free(s->pending[i].sampled);
    pages_close(s->pages);
    pages_close(s->host_pages);
    free(s->slots);
    free(s->queue);
    free(s->prefilling);
    free(s->chunk);
    free(s->chunk_of);
    free(s->gone);
    free(s);
}

void scheduler_use_tokenizer(struct scheduler *s, const struct tokenizer *tokenizer) { s->tokenizer = tokenizer; }

void scheduler_use_policy(struct scheduler *s, const struct policy *policy) { s->facts.policy = policy; }

void scheduler_use_storage(struct scheduler *s, int page_tokens, int64_t token_bytes, int plain_tokens)
{
    pages_use_storage(s->pages, page_tokens, plain_tokens);
    s->facts.kept_token_bytes = token_bytes;
    s->facts.plain_tokens = plain_tokens;
}

int scheduler_max_running(const struct scheduler *s) { return s->max_running; }

static bool holds_slot(const struct sequence *seq)
{
    return seq->state == SEQUENCE_PREFILL || seq->state == SEQUENCE_RUNNING;
}

int scheduler_active(const struct scheduler *s)
{
    int n = s->n_queued;
    for (int i = 0; i < s->n_slots; i++) n += holds_slot(&s->slots[i]);
    return n;
}

/* ---- requests in ---- */

/* Tokens that come behind the prompt at most: the answer, and a follow-up with its answer. */
static int tokens_behind(const struct request *r)
{
    return r->max_tokens + (r->n_followup ? r->n_followup + r->followup_max_tokens : 0);
}

/* Tokens of its prompt that may go to host memory, in a layer. */
static int tokens_evicted(const struct scheduler *s, const struct request *r)
{
    return s->host_pages ? policy_host_tokens(s->facts.policy, r->budget, r->n_ids) : 0;
}

static int check_request(const struct scheduler *s, const struct request *r, int judging)
{
    const struct config *c = s->config;
    if (r->n_ids < 1) FAIL(ERR_REQUEST, "the prompt is empty");
    if (r->max_tokens < 1) FAIL(ERR_REQUEST, "max_tokens is %d, expected at least 1", r->max_tokens);
    if (r->n_followup < 0 || (r->n_followup && (r->followup_max_tokens < 1 || r->n_followup > c->max_model_len ||
                                                r->followup_max_tokens > c->max_model_len)))
        FAIL(ERR_REQUEST, "a follow-up of %d tokens and max_tokens %d: max_model_len is %d", r->n_followup,
             r->followup_max_tokens, c->max_model_len);
    if (r->n_followup && (r->n_ids > c->max_model_len || r->max_tokens > c->max_model_len - r->n_ids ||
                          tokens_behind(r) > c->max_model_len - r->n_ids))
        FAIL(ERR_REQUEST, "prompt of %d tokens, a follow-up of %d and max_tokens %d and %d exceed max_model_len %d",
             r->n_ids, r->n_followup, r->max_tokens, r->followup_max_tokens, c->max_model_len);
    if (r->n_ids > c->max_model_len - r->max_tokens)
        FAIL(ERR_REQUEST, "prompt of %d tokens and max_tokens %d exceed max_model_len %d", r->n_ids, r->max_tokens,
             c->max_model_len);
    if (r->n_forced < 0 || r->n_forced > MAX_FORCED || r->n_forced > r->max_tokens)
        FAIL(ERR_REQUEST, "%d forced tokens, at most %d and max_tokens %d are served", r->n_forced, MAX_FORCED,
             r->max_tokens);
    for (int i = 0; i < r->n_forced; i++)
        if (r->forced[i] < 0 || r->forced[i] >= s->dims->vocab_size)
            FAIL(ERR_REQUEST, "forced token %d is %d, the vocabulary has %d", i, r->forced[i], s->dims->vocab_size);
    if (!pages_fits(s->pages, r->n_ids + tokens_behind(r)))
        FAIL(ERR_REQUEST, "prompt of %d tokens and max_tokens %d do not fit the KV pool; raise kv_cache_memory_bytes",
             r->n_ids, r->max_tokens);
    if (s->host_pages && !pages_fits(s->host_pages, tokens_evicted(s, r)))
        FAIL(ERR_REQUEST,
             "prompt of %d tokens does not fit the pool of evicted tokens; raise kv_cache.host_memory_bytes", r->n_ids);
    if (!chunk_possible(r->n_ids, c->max_num_batched_tokens, r->spans, r->n_images, judging))
        FAIL(ERR_REQUEST,
             "prompt of %d tokens cannot be cut into chunks of max_num_batched_tokens %d: its last %d tokens judge the "
             "cache together; raise that key, or set max_rows of vl_cache or expected_attention",
             r->n_ids, c->max_num_batched_tokens, judging);
    return OK;
}

int scheduler_submit(struct scheduler *s, struct request *request, struct sink sink, int judging)
{
    int capacity = s->config->max_queued;
    TRY(check_request(s, request, judging));
    if (s->n_queued == capacity) FAIL(ERR_FULL, "%d requests wait already (max_queued)", capacity);
    struct sequence *q = &s->queue[(s->queue_first + s->n_queued) % capacity];
    int rc = sequence_begin(q, request, sink, s->tokenizer, judging);
    if (rc) {
        sequence_clear(q);
        return rc;
    }
    q->serial = s->next_serial++;
    s->n_queued++;
    return OK;
}

static bool reserve_pages(struct scheduler *s, int slot, const struct request *r)
{
    if (!pages_reserve(s->pages, slot, r->n_ids + tokens_behind(r))) return false;
    if (!s->host_pages || pages_reserve(s->host_pages, slot, tokens_evicted(s, r))) return true;
    pages_release(s->pages, slot);
    return false;
}

/* Moves the oldest queued request into a slot, if one is free and its pages are there; first come, first served. */
static bool admit(struct scheduler *s)
{
    int slot = 0;
    struct sequence *q = &s->queue[s->queue_first];
    if (!s->n_queued) return false;
    while (slot < s->n_slots && s->slots[slot].state != SEQUENCE_FREE) slot++;
    if (slot == s->n_slots || !reserve_pages(s, slot, &q->request)) return false;
    struct sequence *seq = &s->slots[slot];
    int *kept = seq->kept;
    *seq = *q;
    seq->kept = kept;
    memset(kept, 0, (size_t)s->dims->n_layers * sizeof *kept); /* its last sequence's */
    seq->stream.request = &seq->request;                       /* it moved with the sequence */
    seq->slot = slot;
    seq->state = SEQUENCE_PREFILL;
    seq->admitted_at = clock_seconds();
    memset(q, 0, sizeof *q);
    s->queue_first = (s->queue_first + 1) % s->config->max_queued;
    s->n_queued--;
    s->prefilling[s->n_prefilling++] = slot;
    return true;
}

/* ---- planning ---- */

/* Adds the next rows of a prompt to the step; false if they do not fit. */
static bool draft_chunk(struct scheduler *s, struct sequence *seq)
{
    const struct request *r = &seq->request;
    struct step_head *h = &s->head;
    int n = chunk_next(r->n_ids, seq->n_prefilled, s->room, r->spans, r->n_images, seq->judging);
    bool ends = seq->n_prefilled + n == r->n_ids;
    if (!n || (ends && r->n_ids > s->columns)) return false;
    struct step_chunk *c = &s->chunk[h->n_chunks];
    s->chunk_of[h->n_chunks++] = seq;
    *c = (struct step_chunk){.slot = seq->slot,
                             .first = seq->n_prefilled,
                             .n_tokens = n,
                             .first_id = h->n_ids,
                             .prompt_tokens = r->n_ids,
                             .ends = ends,
                             .continues = seq->turn > 0,
                             .first_column = resources_max_prompt_tokens(s->config) - s->columns,
                             .first_image = h->n_images};
    for (int i = 0; i < r->n_images; i++)
        c->n_images += r->spans[i].start >= c->first && r->spans[i].start < c->first + n;
    s->room -= n;
    if (ends) s->columns -= r->n_ids;
    h->n_images += c->n_images;
    h->n_ids += n;
    if (seq->begun) return true;
    h->n_begin++;
    h->n_ids += r->n_ids + r->n_forced;
    h->n_spans += r->n_images;
    return true;
}

/* Prompts that have begun go on first, then new ones join, while tokens, pages and slots last. */
static void draft_prefill(struct scheduler *s)
{
    s->room = s->config->max_num_batched_tokens;
    s->columns = resources_max_prompt_tokens(s->config);
    for (int i = 0; s->room > 0; i++) {
        if (i == s->n_prefilling && !admit(s)) return;
        if (!draft_chunk(s, &s->slots[s->prefilling[i]])) return;
        /* Only the last prompt of a step may be cut, so a message never carries more than one prompt's ids to spare. */
        if (!s->chunk[s->head.n_chunks - 1].ends) return;
    }
}

static bool decodes(const struct sequence *seq)
{
    return seq->state == SEQUENCE_RUNNING && seq->n_issued < seq->request.max_tokens;
}

static void pack_begin(const struct sequence *seq, struct step_begin *to, int32_t *ids, int *n_ids,
                       struct image_span *spans, int *n_spans)
{
    const struct request *r = &seq->request;
    *to = (struct step_begin){.sampling = r->sampling,
                              .budget = r->budget,
                              .slot = seq->slot,
                              .n_ids = r->n_ids,
                              .first_id = *n_ids,
                              .n_spans = r->n_images,
                              .first_span = *n_spans,
                              .last_turn_start = r->last_turn_start,
                              .n_forced = r->n_forced,
                              .first_forced = *n_ids + r->n_ids};
    memcpy(ids + *n_ids, r->ids, (size_t)r->n_ids * sizeof *ids);
    *n_ids += r->n_ids;
    if (r->n_forced) memcpy(ids + *n_ids, r->forced, (size_t)r->n_forced * sizeof *ids);
    *n_ids += r->n_forced;
    if (r->n_images) memcpy(spans + *n_spans, r->spans, (size_t)r->n_images * sizeof *spans);
    *n_spans += r->n_images;
}

static void pack_pixels(const struct scheduler *s, const struct sequence *seq, const struct step_chunk *chunk,
                        uint8_t *pixels)
{
    const struct request *r = &seq->request;
    int at = chunk->first_image;
    for (int i = 0; i < r->n_images; i++)
        if (r->spans[i].start >= chunk->first && r->spans[i].start < chunk->first + chunk->n_tokens)
            memcpy(pixels + (size_t)at++ * s->image_bytes, r->pixels + (size_t)i * s->image_bytes, s->image_bytes);
}

/* The arrays of a message are laid out as const; rank 0 fills them here, before anyone reads. */
static int pack(struct scheduler *s, struct step_message *message)
{
    struct step_view v;
    int n_ids = 0, n_spans = 0, n_begin = 0, n_release = 0, n_decode = 0;
    message->head = s->head;
    TRY(step_layout(message, s->image_bytes, &v));
    int32_t *release = (int32_t *)v.release, *decode = (int32_t *)v.decode, *ids = (int32_t *)v.ids;
    for (int i = 0; i < s->n_slots; i++) {
        if (s->slots[i].state == SEQUENCE_DONE) release[n_release++] = i;
        if (decodes(&s->slots[i])) decode[n_decode++] = i;
    }
    for (int i = 0; i < s->head.n_chunks; i++) {
        const struct sequence *seq = s->chunk_of[i];
        struct step_chunk *c = &s->chunk[i];
        if (!seq->begun)
            pack_begin(seq, (struct step_begin *)&v.begin[n_begin++], ids, &n_ids, (struct image_span *)v.spans,
                       &n_spans);
        c->first_id = n_ids;
        memcpy(ids + n_ids, seq->request.ids + c->first, (size_t)c->n_tokens * sizeof *ids);
        n_ids += c->n_tokens;
        pack_pixels(s, seq, c, (uint8_t *)v.pixels);
        ((struct step_chunk *)v.chunk)[i] = *c;
    }
    return OK;
}

/* The slots that this step frees are free for the pages' books at once: ranks release before they append. */
static void release_done(struct scheduler *s)
{
    for (int i = 0; i < s->n_slots; i++) {
        if (s->slots[i].state != SEQUENCE_DONE) continue;
        pages_release(s->pages, i);
        if (s->host_pages) pages_release(s->host_pages, i);
        s->head.n_release++;
    }
}

static void note_sampled(struct pending *p, const struct sequence *seq)
{
    p->sampled[p->n++] = (struct sampled){seq->slot, seq->serial};
    p->logprobs = p->logprobs || seq->request.sampling.n_logprobs > 0;
}

/* After packing: what the step will have done is noted as done. */
static void advance(struct scheduler *s)
{
    struct pending *p = &s->pending[s->pending[0].step ? 1 : 0];
    int running = 0, still = 0;
    *p = (struct pending){.step = s->head.number, .sampled = p->sampled};
    for (int i = 0; i < s->n_slots; i++) {
        struct sequence *seq = &s->slots[i];
        if (seq->state == SEQUENCE_DONE) sequence_clear(seq);
        if (!decodes(seq)) continue;
        seq->n_issued++;
        note_sampled(p, seq);
    }
    for (int i = 0; i < s->head.n_chunks; i++) {
        struct sequence *seq = s->chunk_of[i];
        seq->begun = true;
        seq->n_prefilled += s->chunk[i].n_tokens;
        if (!s->chunk[i].ends) continue;
        seq->state = SEQUENCE_RUNNING;
        seq->n_issued = 1;
        note_sampled(p, seq);
    }
    for (int i = 0; i < s->n_prefilling; i++)
        if (s->slots[s->prefilling[i]].state == SEQUENCE_PREFILL) s->prefilling[still++] = s->prefilling[i];
    s->n_prefilling = still;
    for (int i = 0; i < s->n_slots; i++) running += holds_slot(&s->slots[i]);
    if (running > s->max_running) s->max_running = running;
}

int scheduler_plan(struct scheduler *s, struct step_message *message, bool *work)
{
    s->head = (struct step_head){.number = s->next_step, .kind = STEP_RUN};
    release_done(s);
    draft_prefill(s);
    for (int i = 0; i < s->n_slots; i++) s->head.n_decode += decodes(&s->slots[i]);
    *work = s->head.n_release || s->head.n_chunks || s->head.n_decode;
    if (!*work) return OK;
    TRY(pack(s, message));
    advance(s);
    s->next_step++;
    return OK;
}

void scheduler_prompt_ended(struct scheduler *s, int slot, const int *kept)
{
    struct sequence *seq = &s->slots[slot];
    const bool uneven = s->config->kv_cache.heads == KV_HEADS_ADAPTIVE;
    if (seq->turn) {
        pages_resize(s->pages, slot, seq->kept, seq->n_behind + seq->request.max_tokens, uneven);
        return;
    }
    memcpy(seq->kept, kept, (size_t)s->dims->n_layers * sizeof *kept);
    /* A follow-up's prompt finds plain lanes again, whatever the answer before it reads. */
    (seq->request.n_followup ? pages_resize_plain : pages_resize)(s->pages, slot, kept, tokens_behind(&seq->request),
                                                                  uneven);
    if (!s->host_pages) return;
    for (int l = 0; l < s->dims->n_layers; l++) s->gone[l] = seq->request.n_ids - kept[l];
    pages_resize(s->host_pages, slot, s->gone, 0, uneven);
}

/* ---- results ---- */

uint64_t scheduler_pending(const struct scheduler *s) { return s->pending[0].step; }

bool scheduler_wants_logprobs(const struct scheduler *s) { return s->pending[0].logprobs; }

/* The follow-up joins the prompts. Its new number makes a surplus token of the turn before a stranger's. */
static int go_on(struct scheduler *s, struct sequence *seq)
{
    TRY(sequence_continue(seq, s->tokenizer));
    seq->serial = s->next_serial++;
    s->prefilling[s->n_prefilling++] = seq->slot;
    return OK;
}

int scheduler_collect(struct scheduler *s, const struct step_results *results)
{
    struct pending first = s->pending[0];
    size_t width = 1 + MAX_LOGPROBS;
    if (first.step != results->step) FAIL(ERR_BUG, "scheduler: results of another step than the oldest pending one");
    for (int i = 0; i < first.n; i++) {
        struct sequence *seq = &s->slots[first.sampled[i].slot];
        size_t at = (size_t)first.sampled[i].slot * width;
        if (seq->serial != first.sampled[i].serial || seq->state != SEQUENCE_RUNNING) continue; /* a surplus token */
        if (results->recall_counts)
            memcpy(seq->recall_counts, results->recall_counts + 2 * seq->slot, sizeof seq->recall_counts);
        TRY(sequence_push(seq, &s->facts, results->token[first.sampled[i].slot],
                          results->logprob ? results->logprob + at : NULL,
                          results->logprob_token ? results->logprob_token + at : NULL));
        if (seq->state == SEQUENCE_DONE && seq->request.n_followup) TRY(go_on(s, seq));
    }
    s->pending[0] = s->pending[1];
    s->pending[1] = (struct pending){.sampled = first.sampled};
    return OK;
}

int scheduler_abort_all(struct scheduler *s)
{
    for (; s->n_queued; s->n_queued--) {
        struct sequence *q = &s->queue[s->queue_first];
        TRY(sequence_complete(q, &s->facts, FINISH_ABORT));
        sequence_clear(q);
        s->queue_first = (s->queue_first + 1) % s->config->max_queued;
    }
    for (int i = 0; i < s->n_slots; i++)
        if (holds_slot(&s->slots[i])) TRY(sequence_complete(&s->slots[i], &s->facts, FINISH_ABORT));
    s->n_prefilling = 0;
    return OK;
}
