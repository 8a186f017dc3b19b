/* test_scheduler - continuous batching without tensors: made-up ranks execute each step plan, check it against all
 * rules (slots, rows, images, pages) and answer one step late with made-up tokens; every request must end as its own
 * rules say, whatever it ran beside. */
#include "runtime/scheduler.h"

#include <math.h>

#include "parallel/shard.h"
#include "runtime/plan.h"
#include "runtime/sequence.h"
#include "tests/check.h"

enum { LAYERS = 3, KV_HEADS = 3, RANKS = 2, SLOTS = 6, IMAGE_TOKENS = 9, SIDE = 2, IMAGE_BYTES = SIDE * SIDE * 3 };
enum { MAX_JOBS = 400, MAX_PROMPT = 200, MAX_IMAGES = 6, EOS = 2, TOKEN_BYTES = LAYERS * 100 };

static struct tokenizer *tokenizer;
static uint64_t state = 11;

static int random_int(int low, int high)
{
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return low + (int)((state >> 33) % (uint64_t)(high - low + 1));
}

/* A request and what becomes of it. */
struct job {
    int n_ids, n_images, judging, max_tokens, min_tokens, eos_at; /* eos_at: index of the token that is EOS, or -1 */
    bool ignore_eos;
    struct image_span span[MAX_IMAGES];
    int kept[LAYERS];
    bool begun, done;
    int n_sampled; /* steps that sampled a token for it, surplus ones too */
    enum finish_reason reason;
    int n_tokens;
};

/* What ranks know of a slot. */
struct sim_slot {
    int job; /* -1: free */
    int n_rows;
    bool running;
    int length[LAYERS];
};

struct sim {
    struct config config;
    struct model_dims dims;
    struct pages *pages;
    struct scheduler *scheduler;
    struct step_message message;
    struct sim_slot slot[SLOTS];
    int heads[RANKS * LAYERS];
    int64_t total;
    struct job job[MAX_JOBS];
    int n_jobs, n_begun, n_done, n_steps, n_surplus, most_running;
    int32_t token[2][SLOTS]; /* results of the last two steps */
};

static int32_t id_of(int job, int i) { return 1000 * (job + 1) + i; }
static int32_t token_of(const struct sim *s, int job, int i)
{
    return i == s->job[job].eos_at ? EOS : 10 + (job * 31 + i * 7) % 1000;
}

/* ---- opening ---- */

static struct sim *sim_open(int max_len, int batched, int queued, int64_t total)
{
    struct sim *s = calloc(1, sizeof *s);
    CHECK_OK(config_defaults(&s->config));
    s->config.max_model_len = max_len;
    s->config.max_num_batched_tokens = batched;
    s->config.max_queued = queued;
    s->config.max_num_seqs = SLOTS;
    s->dims = (struct model_dims){.family = MODEL_LLAVA, .n_layers = LAYERS, .n_eos_ids = 1, .eos_ids = {EOS}};
    s->dims.vision = (struct vision_dims){.n_image_tokens = IMAGE_TOKENS, .image_size = SIDE};
    s->total = total;
    for (int r = 0; r < RANKS; r++)
        for (int l = 0; l < LAYERS; l++) s->heads[r * LAYERS + l] = shard_kv_heads(KV_HEADS, RANKS, r, l).kv_count;
    struct step_limits limits = plan_step_limits(&s->config, &s->dims);
    CHECK(limits.image_bytes == IMAGE_BYTES);
    CHECK_OK(pages_open(RANKS, LAYERS, 16, SLOTS, s->heads, total, &s->pages));
    CHECK_OK(step_message_open(&s->message, &limits));
    struct scheduler_options options = {&s->config, &s->dims, s->pages, NULL, TOKEN_BYTES, IMAGE_BYTES};
    CHECK_OK(scheduler_open(&options, &s->scheduler));
    scheduler_use_tokenizer(s->scheduler, tokenizer);
    static const struct policy_vt made_up = {.name = "made up"};
    static const struct policy policy = {.vt = &made_up};
    scheduler_use_policy(s->scheduler, &policy);
    for (int i = 0; i < SLOTS; i++) s->slot[i].job = -1;
    return s;
}

static void sim_close(struct sim *s)
{
    scheduler_close(s->scheduler);
    step_message_close(&s->message);
    free(s);
}

/* ---- requests ---- */

/* A text prompt that ends at max_tokens. */
static struct job plain_job(int n_ids, int max_tokens)
{
    struct job j = {.n_ids = n_ids, .judging = 1, .max_tokens = max_tokens, .eos_at = -1};
    for (int l = 0; l < LAYERS; l++) j.kept[l] = n_ids;
    return j;
}

static struct job random_job(void)
{
    struct job j = {.n_images = random_int(0, 2) ? 0 : random_int(1, MAX_IMAGES), .judging = 1};
    int at = 0;
    for (int i = 0; i < j.n_images; i++) {
        at += random_int(0, 1) ? random_int(0, 15) : 0;
        j.span[i] = (struct image_span){at, at + IMAGE_TOKENS};
        at += IMAGE_TOKENS;
    }
    j.n_ids = at + random_int(1, 50);
    if (random_int(0, 1)) j.judging = random_int(1, j.n_ids < 25 ? j.n_ids : 25);
    j.max_tokens = random_int(1, 30);
    j.eos_at = random_int(0, 2) ? random_int(0, j.max_tokens + 3) : -1;
    j.ignore_eos = random_int(0, 5) == 0;
    j.min_tokens = random_int(0, 4) ? 0 : random_int(1, j.max_tokens);
    for (int l = 0; l < LAYERS; l++) j.kept[l] = random_int(0, 3) ? random_int(1, j.n_ids) : j.n_ids;
    return j;
}

/* How many tokens the job's answer has, and why it ends. */
static int expected_tokens(const struct job *j, enum finish_reason *reason)
{
    bool ends = !j->ignore_eos && j->eos_at >= 0 && j->eos_at < j->max_tokens && j->eos_at + 1 >= j->min_tokens;
    *reason = ends ? FINISH_STOP : FINISH_LENGTH;
    return ends ? j->eos_at + 1 : j->max_tokens;
}

struct sim_sink {
    struct sim *sim;
    int job;
};

static void on_done(void *arg, const struct completion *c)
{
    struct sim_sink *sink = arg;
    struct sim *s = sink->sim;
    struct job *j = &s->job[sink->job];
    int64_t bytes = 0;
    CHECK(!j->done);
    j->done = true;
    j->reason = c->finish_reason;
    j->n_tokens = c->n_tokens;
    s->n_done++;
    for (int i = 0; i < c->n_tokens; i++) CHECK(c->tokens[i] == token_of(s, sink->job, i));
    CHECK(c->prompt_tokens == j->n_ids && c->image_tokens == j->n_images * IMAGE_TOKENS);
    CHECK(c->bytes_full == (int64_t)j->n_ids * TOKEN_BYTES);
    for (int l = 0; l < c->n_layers; l++) {
        CHECK(c->kept_tokens_per_layer[l] == (c->n_tokens ? j->kept[l] : c->kept_tokens_per_layer[l]));
        bytes += c->kept_tokens_per_layer[l] * TOKEN_BYTES / LAYERS;
    }
    CHECK(c->bytes_kept == bytes);
    if (!c->n_tokens && !j->n_sampled) CHECK(c->bytes_kept == 0); /* its prompt never came to an end */
    CHECK(!strcmp(c->policy, "made up"));
    free(sink);
}

static int sim_submit(struct sim *s, struct job j)
{
    struct request r = {.n_ids = j.n_ids,
                        .n_images = j.n_images,
                        .max_tokens = j.max_tokens,
                        .min_tokens = j.min_tokens,
                        .ignore_eos = j.ignore_eos,
                        .budget = {1, 0}};
    struct sim_sink *sink = malloc(sizeof *sink);
    *sink = (struct sim_sink){s, s->n_jobs};
    r.ids = malloc((size_t)(j.n_ids + 1) * sizeof *r.ids);
    r.spans = malloc(sizeof j.span);
    r.pixels = malloc(MAX_IMAGES * IMAGE_BYTES);
    for (int i = 0; i < j.n_ids; i++) r.ids[i] = id_of(s->n_jobs, i);
    memcpy(r.spans, j.span, sizeof j.span);
    for (int i = 0; i < MAX_IMAGES; i++) memset(r.pixels + i * IMAGE_BYTES, (s->n_jobs * 7 + i) & 255, IMAGE_BYTES);
    r.pixel_bytes = (size_t)j.n_images * IMAGE_BYTES;
    s->job[s->n_jobs] = j;
    int rc = scheduler_submit(s->scheduler, &r, (struct sink){sink, NULL, on_done}, j.judging);
    if (rc) {
        CHECK(r.ids != NULL); /* a refused request stays the caller's */
        free(sink);
        request_free(&r);
    } else {
        CHECK(r.ids == NULL);
        s->n_jobs++;
    }
    return rc;
}

/* ---- executing a step ---- */

static void check_pages(const struct sim *s)
{
    for (int r = 0; r < RANKS; r++) {
        int64_t used = 0;
        for (int i = 0; i < SLOTS; i++)
            for (int l = 0; s->slot[i].job >= 0 && l < LAYERS; l++)
                used += (int64_t)s->heads[r * LAYERS + l] * ((s->slot[i].length[l] + 15) / 16);
        CHECK(used <= s->total);
    }
}

static void execute_release(struct sim *s, const struct step_view *v)
{
    for (int i = 0; i < s->message.head.n_release; i++) {
        struct sim_slot *slot = &s->slot[v->release[i]];
        CHECK(slot->job < 0 || s->job[slot->job].done); /* aborted before its first step: nothing to free */
        *slot = (struct sim_slot){.job = -1};
    }
}

static void execute_begin(struct sim *s, const struct step_view *v)
{
    for (int i = 0; i < s->message.head.n_begin; i++) {
        const struct step_begin *b = &v->begin[i];
        int job = v->ids[b->first_id] / 1000 - 1;
        struct job *j = &s->job[job];
        CHECK(s->slot[b->slot].job == -1);
        CHECK(job == s->n_begun++ || s->job[job - 1].done); /* first come, first served; aborted ones are passed over */
        s->n_begun = job + 1;
        CHECK(!j->begun && b->n_ids == j->n_ids && b->n_spans == j->n_images);
        for (int k = 0; k < b->n_ids; k++) CHECK(v->ids[b->first_id + k] == id_of(job, k));
        for (int k = 0; k < b->n_spans; k++) CHECK(v->spans[b->first_span + k].start == j->span[k].start);
        j->begun = true;
        s->slot[b->slot] = (struct sim_slot){.job = job};
    }
}

static void check_chunk_images(const struct sim *s, const struct step_view *v, const struct step_chunk *c, int job)
{
    int n = 0;
    for (int k = 0; k < s->job[job].n_images; k++) {
        const struct image_span *span = &s->job[job].span[k];
        if (span->start < c->first || span->start >= c->first + c->n_tokens) continue;
        CHECK(span->end <= c->first + c->n_tokens);
        const uint8_t *pixels = v->pixels + (size_t)(c->first_image + n) * IMAGE_BYTES;
        CHECK(pixels[0] == ((job * 7 + k) & 255) && pixels[IMAGE_BYTES - 1] == pixels[0]);
        n++;
    }
    CHECK(n == c->n_images);
}

static void execute_chunks(struct sim *s, const struct step_view *v, int32_t *token)
{
    int tokens = 0, columns = 0;
    for (int i = 0; i < s->message.head.n_chunks; i++) {
        const struct step_chunk *c = &v->chunk[i];
        struct sim_slot *slot = &s->slot[c->slot];
        CHECK(slot->job >= 0 && !slot->running && c->n_tokens > 0 && c->first == slot->n_rows);
        const struct job *j = &s->job[slot->job];
        CHECK(!j->done && c->prompt_tokens == j->n_ids);
        for (int k = 0; k < c->n_tokens; k++) CHECK(v->ids[c->first_id + k] == id_of(slot->job, c->first + k));
        check_chunk_images(s, v, c, slot->job);
        slot->n_rows += c->n_tokens;
        tokens += c->n_tokens;
        for (int l = 0; l < LAYERS; l++) slot->length[l] = slot->n_rows;
        CHECK(c->ends == (slot->n_rows == j->n_ids));
        if (!c->ends) continue;
        CHECK(c->n_tokens >= j->judging && c->first_column == columns);
        columns += j->n_ids;
    }
    CHECK(tokens <= s->config.max_num_batched_tokens && columns <= resources_max_prompt_tokens(&s->config));
    check_pages(s); /* all whole prompts are in the cache now */
    for (int i = 0; i < s->message.head.n_chunks; i++) {
        const struct step_chunk *c = &v->chunk[i];
        struct sim_slot *slot = &s->slot[c->slot];
        struct job *j = &s->job[slot->job];
        if (!c->ends) continue;
        memcpy(slot->length, j->kept, sizeof j->kept);
        token[c->slot] = token_of(s, slot->job, j->n_sampled++);
        scheduler_prompt_ended(s->scheduler, c->slot, j->kept);
    }
}

static void execute_decode(struct sim *s, const struct step_view *v, int32_t *token)
{
    enum finish_reason reason;
    for (int i = 0; i < s->message.head.n_decode; i++) {
        struct sim_slot *slot = &s->slot[v->decode[i]];
        CHECK(slot->job >= 0 && slot->running);
        struct job *j = &s->job[slot->job];
        CHECK(!j->done && j->n_sampled < j->max_tokens);
        for (int l = 0; l < LAYERS; l++) slot->length[l]++;
        if (j->n_sampled >= expected_tokens(j, &reason)) s->n_surplus++;
        CHECK(j->n_sampled <= expected_tokens(j, &reason)); /* one surplus step at most */
        token[v->decode[i]] = token_of(s, slot->job, j->n_sampled++);
    }
    for (int i = 0; i < s->message.head.n_chunks; i++)
        if (v->chunk[i].ends) s->slot[v->chunk[i].slot].running = true;
    check_pages(s);
}

/* One engine_step with these ranks; *work as scheduler_plan says. */
static void sim_step(struct sim *s, bool *work)
{
    struct step_view v;
    CHECK_OK(scheduler_plan(s->scheduler, &s->message, work));
    if (*work) {
        int running = 0;
        int32_t *token = s->token[s->message.head.number & 1];
        memset(token, 0x7f, sizeof s->token[0]);
        CHECK_OK(step_read(&s->message, IMAGE_BYTES, &v));
        execute_release(s, &v);
        execute_begin(s, &v);
        execute_chunks(s, &v, token);
        execute_decode(s, &v, token);
        for (int i = 0; i < SLOTS; i++) running += s->slot[i].job >= 0;
        if (running > s->most_running) s->most_running = running;
        s->n_steps++;
    }
    uint64_t pending = scheduler_pending(s->scheduler);
    if (!pending || (*work && pending == s->message.head.number)) return;
    struct step_results results = {.step = pending, .token = s->token[pending & 1]};
    CHECK_OK(scheduler_collect(s->scheduler, &results));
}

/* To the end, and to the step behind it, which releases the slots that the last results freed. */
static void sim_finish(struct sim *s)
{
    bool work = true;
    for (int i = 0, idle = 0; i < 20000 && idle < 2; i++) {
        sim_step(s, &work);
        idle = work ? 0 : idle + 1;
    }
    CHECK(!work && !scheduler_active(s->scheduler) && !scheduler_pending(s->scheduler));
    CHECK(pages_free(s->pages) == s->total);
    CHECK(s->n_done == s->n_jobs);
    for (int i = 0; i < SLOTS; i++) CHECK(s->slot[i].job == -1);
}

static void check_answers(const struct sim *s)
{
    for (int i = 0; i < s->n_jobs; i++) {
        enum finish_reason reason;
        int n = expected_tokens(&s->job[i], &reason);
        CHECK(s->job[i].n_tokens == n && s->job[i].reason == reason);
    }
}

/* ---- tests ---- */

static void test_random(void)
{
    for (int round = 0; round < 30; round++) {
        struct sim *s = sim_open(200, random_int(30, 120), random_int(1, 20), random_int(80, 300));
        bool work;
        while (s->n_jobs < 120) {
            int rc = sim_submit(s, random_job());
            if (rc == ERR_FULL || random_int(0, 3) == 0) sim_step(s, &work);
            CHECK(rc == OK || rc == ERR_FULL || rc == ERR_REQUEST);
        }
        sim_finish(s);
        check_answers(s);
        CHECK(s->n_surplus > 0 && s->most_running == scheduler_max_running(s->scheduler));
        sim_close(s);
    }
}

static void test_abort(void)
{
    for (int round = 0; round < 60; round++) {
        struct sim *s = sim_open(200, random_int(30, 60), 50, 150);
        bool work;
        for (int i = 0; i < 30; i++) (void)sim_submit(s, random_job());
        for (int i = random_int(0, 40); i > 0; i--) sim_step(s, &work);
        int before = s->n_done, aborted = 0;
        CHECK_OK(scheduler_abort_all(s->scheduler));
        CHECK(s->n_done == s->n_jobs && scheduler_active(s->scheduler) == 0);
        for (int i = 0; i < s->n_jobs; i++) aborted += s->job[i].reason == FINISH_ABORT;
        CHECK(aborted == s->n_jobs - before);
        int old = s->n_jobs;
        for (int i = 0; i < 10; i++) (void)sim_submit(s, random_job()); /* life goes on */
        sim_finish(s);
        for (int i = old; i < s->n_jobs; i++) CHECK(s->job[i].reason != FINISH_ABORT);
        sim_close(s);
    }
}

/* One token: the prompt's step alone, nothing to decode, then the release. */
static void test_one_token(void)
{
    struct sim *s = sim_open(100, 100, 4, 100);
    bool work;
    CHECK_OK(sim_submit(s, plain_job(10, 1)));
    CHECK(scheduler_active(s->scheduler) == 1);
    sim_step(s, &work); /* the prompt */
    CHECK(work && s->message.head.n_chunks == 1 && s->message.head.n_decode == 0);
    CHECK(s->n_done == 0 && scheduler_pending(s->scheduler) == 1);
    sim_step(s, &work); /* nothing to run: the result is read */
    CHECK(!work && s->n_done == 1 && s->job[0].n_tokens == 1 && s->job[0].reason == FINISH_LENGTH);
    CHECK(scheduler_active(s->scheduler) == 0);
    sim_step(s, &work); /* the slot is released, and nothing else done */
    CHECK(work && s->message.head.n_release == 1 && !s->message.head.n_chunks && !s->message.head.n_decode);
    sim_step(s, &work);
    CHECK(!work && s->n_steps == 2);
    sim_finish(s);
    sim_close(s);
}

/* A sequence that ends early runs one step more; its token is dropped and its slot goes to the next. */
static void test_surplus(void)
{
    struct sim *s = sim_open(100, 100, 4, 24); /* pages for one sequence at a time */
    bool work;
    struct job j = plain_job(20, 20);
    j.eos_at = 2;
    CHECK_OK(sim_submit(s, j));
    CHECK_OK(sim_submit(s, plain_job(30, 2)));
    for (int i = 0; i < 4; i++) sim_step(s, &work);
    CHECK(s->n_done == 1 && s->job[0].n_tokens == 3 && s->job[0].n_sampled == 4 && s->n_surplus == 1);
    CHECK(s->slot[1].job == -1); /* no pages for the second one until now */
    sim_step(s, &work);
    CHECK(s->message.head.n_release == 1 && s->message.head.n_begin == 1 && s->message.head.n_decode == 0);
    sim_finish(s);
    check_answers(s);
    CHECK(s->most_running <= 2 && s->n_surplus == 1);
    sim_close(s);
}

/* A long prompt at the head of the queue is not overtaken by short ones that would fit. */
static void test_order(void)
{
    struct sim *s = sim_open(200, 200, 10, 40);
    bool work;
    CHECK_OK(sim_submit(s, plain_job(40, 30)));
    CHECK_OK(sim_submit(s, plain_job(100, 10)));
    CHECK_OK(sim_submit(s, plain_job(5, 2)));
    for (int i = 0; i < 10; i++) sim_step(s, &work);
    CHECK(s->job[0].begun && !s->job[1].begun && !s->job[2].begun);
    sim_finish(s);
    check_answers(s);
    sim_close(s);
}

static void test_refusals(void)
{
    struct sim *s = sim_open(100, 64, 2, 40);
    struct request empty = {.max_tokens = 1};
    CHECK_FAILS(scheduler_submit(s->scheduler, &empty, (struct sink){0}, 1), ERR_REQUEST, "empty");
    CHECK_FAILS(sim_submit(s, plain_job(10, 0)), ERR_REQUEST, "max_tokens is 0");
    CHECK_FAILS(sim_submit(s, plain_job(90, 11)), ERR_REQUEST, "exceed max_model_len 100");
    CHECK_FAILS(sim_submit(s, plain_job(10, INT32_MAX)), ERR_REQUEST, "max_model_len 100");
    struct job judged = plain_job(80, 5);
    judged.judging = 65;
    CHECK_FAILS(sim_submit(s, judged), ERR_REQUEST, "max_num_batched_tokens 64");
    CHECK(s->n_jobs == 0 && scheduler_active(s->scheduler) == 0);
    CHECK_OK(sim_submit(s, plain_job(90, 10)));
    CHECK_OK(sim_submit(s, plain_job(90, 10)));
    CHECK_FAILS(sim_submit(s, plain_job(5, 5)), ERR_FULL, "2 requests wait");
    sim_finish(s);
    check_answers(s);
    sim_close(s);
    s = sim_open(100, 64, 2, 24); /* 5 lanes on the fuller rank, 4 pages each */
    CHECK_OK(sim_submit(s, plain_job(60, 4)));
    CHECK_FAILS(sim_submit(s, plain_job(61, 4)), ERR_REQUEST, "do not fit the KV pool");
    sim_finish(s);
    sim_close(s);
}

/* Results come for the oldest step only. */
static void test_results_order(void)
{
    struct sim *s = sim_open(100, 64, 2, 40);
    bool work;
    CHECK_OK(sim_submit(s, plain_job(10, 5)));
    sim_step(s, &work);
    struct step_results wrong = {.step = 2, .token = s->token[0]};
    CHECK_FAILS(scheduler_collect(s->scheduler, &wrong), ERR_BUG, "another step");
    sim_finish(s);
    check_answers(s);
    sim_close(s);
}

/* ---- what a policy is asked when a turn ends ---- */

static int asked_about; /* prompt tokens */

/* ---- a second turn's pages, where what is kept takes fewer ---- */

static void ignore_done(void *arg, const struct completion *c) { *(int *)arg += c->n_tokens > 0; }

/* Free pages of the fullest rank once `n` tokens were kept in every lane, in pages of so many tokens. */
static int64_t free_with(const struct sim *s, int n, int page_tokens)
{
    int64_t first = 0, second = 0;
    for (int l = 0; l < LAYERS; l++) first += s->heads[l], second += s->heads[LAYERS + l];
    return s->total - (first > second ? first : second) * ((n + page_tokens - 1) / page_tokens);
}

static void test_pages_of_second_turn(void)
{
    enum { PROMPT = 100, KEPT = 50, FIRST = 9, NEXT = 40, SECOND = 20, CODE_PAGE = 32, EARLY = 4 };
    struct sim *s = sim_open(300, 100, 4, 200);
    struct request r = {.n_ids = PROMPT, .max_tokens = FIRST, .budget = {1, 0}, .n_followup = NEXT};
    const int kept[LAYERS] = {KEPT, KEPT, KEPT};
    int32_t token[SLOTS] = {0};
    int done = 0, ended = 0;
    bool work = true;
    r.followup_max_tokens = SECOND;
    r.ids = calloc(PROMPT, sizeof *r.ids);
    r.followup = calloc(NEXT, sizeof *r.followup);
    scheduler_use_storage(s->scheduler, CODE_PAGE, TOKEN_BYTES / 2, 0);
    CHECK_OK(scheduler_submit(s->scheduler, &r, (struct sink){&done, NULL, ignore_done}, 1));
    for (int i = 0; i < 100 && work; i++) {
        CHECK_OK(scheduler_plan(s->scheduler, &s->message, &work));
        if (work && s->message.head.n_chunks) {
            struct step_view v;
            CHECK_OK(step_read(&s->message, IMAGE_BYTES, &v));
            const bool ends = v.chunk[0].ends, second = v.chunk[0].continues;
            CHECK(second == (ended > 0));
            /* A follow-up's prompt is read over plain lanes, and what it needs stays reserved until it has ended. */
            if (!second) CHECK(pages_free(s->pages) == free_with(s, PROMPT + FIRST + NEXT + SECOND, 16));
            if (second) CHECK(pages_free(s->pages) == free_with(s, KEPT + FIRST + NEXT + SECOND, 16));
            if (ends) scheduler_prompt_ended(s->scheduler, v.chunk[0].slot, kept);
            if (ends && second) CHECK(pages_free(s->pages) == free_with(s, KEPT + EARLY + NEXT + SECOND, CODE_PAGE));
            ended += ends;
        }
        token[0] = ended == 1 && s->message.head.number == EARLY ? EOS : 10; /* the first answer ends early */
        const uint64_t pending = scheduler_pending(s->scheduler);
        if (pending) CHECK_OK(scheduler_collect(s->scheduler, &(struct step_results){.step = pending, .token = token}));
    }
    CHECK(done == 2 && ended == 2 && pages_free(s->pages) == s->total);
    sim_close(s);
}

static struct policy_reads note_reads(const struct policy *policy, const struct policy_sequence *sequence, double kept,
                                      int before)
{
    (void)policy;
    asked_about = sequence->prompt_tokens;
    return (struct policy_reads){.tokens = kept + before + 1};
}

static int open_nothing(struct policy *policy, struct arena *arena)
{
    (void)policy, (void)arena;
    return OK;
}

static void take_reads(void *arg, const struct completion *c) { *(double *)arg = c->bytes_read_per_step; }

/* The policy decided on the first turn's prompt: of the second turn's ids, which are the whole conversation, it is
 * asked about those alone. */
static void test_reads_of_second_turn(void)
{
    static const struct policy_vt vt = {.name = "noting", .open = open_nothing, .reads = note_reads};
    static const struct policy policy = {.vt = &vt};
    const struct sequence_facts facts = {
        .policy = &policy, .n_layers = LAYERS, .token_bytes = LAYERS, .kept_token_bytes = LAYERS};
    int kept[LAYERS];
    double read = 0;
    for (int l = 0; l < LAYERS; l++) kept[l] = 10;
    struct sequence seq = {.state = SEQUENCE_RUNNING,
                           .turn = 1,
                           .n_behind = 5,
                           .n_tokens = 3,
                           .kept = kept,
                           .sink = {&read, NULL, take_reads},
                           .request = {.n_ids = 25, .budget = {0.5, 0}}};
    CHECK_OK(sequence_complete(&seq, &facts, FINISH_ABORT));
    CHECK(asked_about == 20);
    CHECK(fabs(read - LAYERS * (10 + 5 + 1.5)) <
          1e-9); /* two steps, whose own tokens are the sixth and seventh behind */
}

int main(void)
{
    static const struct check_case cases[] = {{"one token", test_one_token},
                                              {"surplus tokens are dropped, slots used again", test_surplus},
                                              {"first come, first served", test_order},
                                              {"refusals", test_refusals},
                                              {"results in order", test_results_order},
                                              {"random work, every step and answer checked", test_random},
                                              {"abort at any step", test_abort},
                                              {"pages of a second turn", test_pages_of_second_turn},
                                              {"what a second turn reads", test_reads_of_second_turn},
                                              {0}};
    if (tokenizer_open_json(SOURCE_DIR "/models/demo-vlm/tokenizer.json", NULL, &tokenizer)) {
        fprintf(stderr, "%s\n", status_message());
        return 2;
    }
    int failed = check_run("scheduler", cases);
    tokenizer_close(tokenizer);
    return failed;
}
