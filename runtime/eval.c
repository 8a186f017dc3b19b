#include "runtime/eval.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "runtime/eval_internal.h"

struct eval {
    struct engine *engine;
    const struct prompt_builder *builder;
    const struct eval_options *options;
    struct eval_result *result;
    struct eval_questions questions;
    struct eval_journal journal;
    struct eval_one_run *runs;
    int n_runs, max_in_flight;
    cJSON *sampling; /* the fields that every question is asked with */
    /* of the run under way */
    struct eval_one_run *run;
    const struct eval_one_run *full; /* whose answers are forced */
    enum eval_pass pass;
    struct slot {
        struct eval *eval;
        int question;
    } * slots; /* [n questions] */
    int n_in_flight, n_done;
    double start, seconds_before;
    bool engine_failed;
    int rc; /* of a callback */
    double last_report;
};

/* ---- answers ---- */

static int keep_answer(struct eval_answer *a, const struct completion *c)
{
    a->text = malloc(c->text_size + 1);
    a->tokens = malloc(((size_t)c->n_tokens + 1) * sizeof *a->tokens);
    if (!a->text || !a->tokens) FAIL(ERR_NOMEM, "no memory for an answer of %zu bytes", c->text_size);
    if (c->text_size) memcpy(a->text, c->text, c->text_size);
    a->text[c->text_size] = 0;
    a->text_size = c->text_size;
    if (c->n_tokens) memcpy(a->tokens, c->tokens, (size_t)c->n_tokens * sizeof *a->tokens);
    a->n_tokens = c->n_tokens;
    a->prompt_tokens = c->prompt_tokens;
    a->image_tokens = c->image_tokens;
    for (int l = 0; l < c->n_layers; l++) a->kept_tokens += (double)c->kept_tokens_per_layer[l] / c->n_layers;
    a->first_token_seconds = c->first_token_seconds;
    a->total_seconds = c->total_seconds;
    a->bytes_full = c->bytes_full;
    a->bytes_kept = c->bytes_kept;
    a->bytes_read_per_step = c->bytes_read_per_step;
    a->bytes_host = c->bytes_host;
    a->recall_bytes_per_step = c->recall_bytes_per_step;
    a->recall_hit_rate = c->recall_hit_rate;
    a->done = true;
    return OK;
}

/* Sums the log-probabilities of as many tokens as can be forced. */
static void keep_likelihood(struct eval_answer *a, const struct completion *c)
{
    int width = 1 + c->n_logprobs;
    a->scored = true;
    a->n_likelihood = c->n_tokens < MAX_FORCED ? c->n_tokens : MAX_FORCED;
    a->log_likelihood = 0;
    for (int i = 0; i < a->n_likelihood; i++) a->log_likelihood += (double)c->logprob[i * width];
}

static int keep_followup(struct eval_followup *f, const struct completion *c)
{
    f->text = calloc(c->text_size + 1, 1);
    f->tokens = malloc(((size_t)c->n_tokens + 1) * sizeof *f->tokens);
    if (!f->text || !f->tokens) FAIL(ERR_NOMEM, "no memory for an answer of %zu bytes", c->text_size);
    if (c->text_size) memcpy(f->text, c->text, c->text_size);
    f->text_size = c->text_size;
    if (c->n_tokens) memcpy(f->tokens, c->tokens, (size_t)c->n_tokens * sizeof *f->tokens);
    f->n_tokens = c->n_tokens;
    return OK;
}

/* Between two turns nothing is finished yet. An answer whose second turn is aborted is asked again. */
static void on_done(void *arg, const struct completion *c)
{
    const struct slot *slot = arg;
    struct eval *e = slot->eval;
    struct eval_answer *a = &e->run->answer[slot->question];
    e->n_in_flight -= !c->more;
    if (c->finish_reason == FINISH_ABORT || e->rc) return;
    if (c->n_logprobs) keep_likelihood(a, c);
    if (e->pass == EVAL_FREE) {
        e->run->seconds = e->seconds_before + clock_seconds() - e->start;
        e->rc = c->turn ? keep_followup(&a->followup, c) : keep_answer(a, c);
    }
    if (c->more) return;
    if (!e->rc) e->rc = eval__journal_add(&e->journal, &e->questions, e->run, slot->question, e->pass);
    e->n_done++;
}

/* ---- one pass ---- */

static void show_progress(struct eval *e)
{
    char budget[32], left[32] = "";
    double now = clock_seconds(), took = now - e->start;
    int at = (int)(e->run - e->runs) + 1, n = e->questions.n;
    if (!e->options->progress || (now - e->last_report < 5 && e->n_done < n)) return;
    e->last_report = now;
    if (e->n_done && e->n_done < n) snprintf(left, sizeof left, ", %.0f s left", took / e->n_done * (n - e->n_done));
    log_line(LOG_INFO, "eval: run %d of %d, %s %s%s: %d of %d questions, %.1f s%s", at, e->n_runs,
             e->run->config.policy, kv_budget_print(e->run->config.budget, budget, sizeof budget),
             e->pass == EVAL_FORCED ? ", forced answers" : "", e->n_done, n, took, left);
}

static int step(struct eval *e)
{
    int active, rc = engine_step(e->engine, &active);
    e->engine_failed = rc != OK;
    return rc ? rc : e->rc;
}

/* Takes back what is in the engine: it must not call us any more. */
static int abort_all(struct eval *e)
{
    int active = 1;
    if (e->engine_failed || !e->n_in_flight) return OK;
    TRY(engine_abort_all(e->engine));
    while (e->n_in_flight && active) TRY(engine_step(e->engine, &active));
    return OK;
}

static int stop_signal(const struct eval *e)
{
    return e->options->liveness ? liveness_stop_requested(e->options->liveness) : 0;
}

/* These tokens are to be given, as far as they can be forced, and nothing more. */
static int force(struct request *request, const int32_t *tokens, size_t n)
{
    request->n_forced = n < MAX_FORCED ? (int)n : MAX_FORCED;
    request->max_tokens = request->n_forced;
    request->forced = malloc((size_t)request->n_forced * sizeof *request->forced);
    if (!request->forced) FAIL(ERR_NOMEM, "no memory for %d tokens", request->n_forced);
    memcpy(request->forced, tokens, (size_t)request->n_forced * sizeof *request->forced);
    return OK;
}

/* The text goes to the tokenizer as it stands, without a begin token. */
static int force_text(const struct eval *e, struct request *request, const char *text)
{
    int32_t *tokens;
    size_t n;
    TRY(tokenizer_encode(prompt_tokenizer(e->builder), text, strlen(text), TOKENIZER_PARSE_SPECIAL, &tokens, &n));
    int rc = force(request, tokens, n);
    free(tokens);
    return rc;
}

/* The second turn's text goes to the tokenizer as it stands, without a begin token. */
static int add_followup(const struct eval *e, struct request *request, const char *prompt)
{
    size_t n;
    TRY(tokenizer_encode(prompt_tokenizer(e->builder), prompt, strlen(prompt), TOKENIZER_PARSE_SPECIAL,
                         &request->followup, &n));
    request->n_followup = n < INT32_MAX ? (int)n : INT32_MAX;
    request->followup_max_tokens = request->max_tokens;
    return OK;
}

static int submit(struct eval *e, struct request *request, int i)
{
    int rc;
    const char *continuation = e->questions.question[i].continuation;
    request->budget = e->run->config.budget;
    if (continuation)
        TRY(force_text(e, request, continuation));
    else if (e->pass == EVAL_FORCED)
        TRY(force(request, e->full->answer[i].tokens, (size_t)e->full->answer[i].n_tokens));
    if (request->n_forced || e->run == e->full) request->sampling.n_logprobs = 1;
    e->slots[i] = (struct slot){e, i};
    while ((rc = engine_submit(e->engine, request, (struct sink){&e->slots[i], NULL, on_done})) == ERR_FULL)
        TRY(step(e));
    e->n_in_flight += !rc;
    return rc;
}

static int ask(struct eval *e, int i)
{
    const struct eval_question *q = &e->questions.question[i];
    const struct eval_answer *a = &e->run->answer[i];
    struct prompt_text text = {q->prompt, strlen(q->prompt), (const char *const *)q->images, q->n_images, true};
    struct request request;
    if (e->pass == EVAL_FREE ? a->done : a->scored || !e->full->answer[i].n_tokens) { /* from the journal */
        e->n_done++;
        return OK;
    }
    TRY(prompt_from_text(e->builder, &text, e->sampling, q->id, &request));
    int rc = OK;
    if (q->followup_prompt && e->pass == EVAL_FREE) rc = add_followup(e, &request, q->followup_prompt);
    if (!rc) rc = submit(e, &request, i);
    request_free(&request);
    return rc == ERR_REQUEST ? status_prefix(rc, "%s", q->id) : rc;
}

static int run_pass(struct eval *e, enum eval_pass pass)
{
    int next = 0;
    e->pass = pass;
    e->n_done = 0;
    e->start = clock_seconds();
    e->seconds_before = e->run->seconds;
    while (next < e->questions.n || e->n_in_flight) {
        e->result->stop_signal = stop_signal(e);
        if (e->result->stop_signal) return OK;
        while (next < e->questions.n && e->n_in_flight < e->max_in_flight) TRY(ask(e, next++));
        if (e->n_in_flight) TRY(step(e));
        show_progress(e);
    }
    if (e->n_done != e->questions.n)
        FAIL(ERR_BUG, "the engine ended %d questions without an answer", e->questions.n - e->n_done);
    return OK;
}

/* ---- all ---- */

static int open_all(struct eval *e)
{
    const struct config *config = prompt_config(e->builder);
    TRY(eval__read(e->options->questions, &e->questions));
    TRY(eval__list_runs(e->options, config, e->questions.n, e->runs, &e->n_runs));
    e->slots = calloc((size_t)e->questions.n, sizeof *e->slots);
    e->sampling = cJSON_CreateObject();
    if (!e->slots || !cJSON_AddNumberToObject(e->sampling, "temperature", 0) ||
        (e->options->max_tokens > 0 && !cJSON_AddNumberToObject(e->sampling, "max_tokens", e->options->max_tokens)))
        FAIL(ERR_NOMEM, "no memory for %d questions", e->questions.n);
    e->max_in_flight = e->options->max_in_flight;
    if (e->max_in_flight < 1) e->max_in_flight = config->max_num_seqs + 2;
    return eval__journal_open(&e->journal, e->options, config, &e->questions, e->runs, e->n_runs);
}

static int report(struct eval *e)
{
    const struct eval_one_run *full = e->full;
    for (int i = 0; i < e->n_runs; i++) eval__score(&e->questions, &e->runs[i], full);
    for (int i = 0; full && i < e->questions.n; i++) {
        const struct eval_question *q = &e->questions.question[i];
        if (!q->model_tokens || eval__first_difference(q, &full->answer[i]) < 0) continue;
        e->result->n_unlike_reference++;
        e->result->n_ties += q->min_margin >= 0 && q->min_margin < EVAL_TIE_MARGIN;
    }
    if (e->options->table && e->options->show) eval__show(e->options->table, &e->questions, e->runs, e->n_runs);
    if (e->options->table) eval__print(e->options->table, &e->questions, e->runs, e->n_runs);
    if (e->options->plot) TRY(eval__plot(e->options->plot, e->options, e->runs, e->n_runs));
    if (!e->options->output) return OK;
    return eval__write(e->options->output, prompt_config(e->builder), e->options, &e->questions, e->runs, e->n_runs);
}

static int run_one(struct eval *e, struct eval_one_run *run)
{
    e->run = run;
    TRY(engine_set_policy(e->engine, &run->config));
    TRY(run_pass(e, EVAL_FREE));
    if (!e->result->stop_signal && e->full && run != e->full && !e->options->no_forced) TRY(run_pass(e, EVAL_FORCED));
    e->result->n_runs += !e->result->stop_signal;
    return OK;
}

/* The full cache goes first: its answers are forced on the others. */
static int run_all(struct eval *e)
{
    TRY(open_all(e));
    e->result->n_questions = e->questions.n;
    e->full = eval__full_of(e->runs, e->n_runs);
    for (int full = 1; full >= 0; full--)
        for (int i = 0; i < e->n_runs; i++) {
            if (eval__is_full(&e->runs[i]) != full) continue;
            TRY(run_one(e, &e->runs[i]));
            if (e->result->stop_signal) return OK;
        }
    return report(e);
}

int eval_run(struct engine *engine, const struct prompt_builder *builder, const struct eval_options *options,
             struct eval_result *result)
{
    struct eval e = {.engine = engine, .builder = builder, .options = options, .result = result};
    memset(result, 0, sizeof *result);
    char message[4096];
    e.runs = calloc(EVAL_MAX_RUNS, sizeof *e.runs);
    if (!e.runs) FAIL(ERR_NOMEM, "no memory for the runs");
    int rc = run_all(&e);
    snprintf(message, sizeof message, "%s", status_message());
    int aborted = abort_all(&e), closed = eval__journal_close(&e.journal, !rc && !result->stop_signal);
    if (rc)
        status_set(rc, __FILE__, __LINE__, "%s", message);
    else
        rc = aborted ? aborted : closed;
    eval__free_runs(e.runs, e.n_runs, e.questions.n);
    free(e.slots);
    cJSON_Delete(e.sampling);
    eval__free(&e.questions);
    return rc;
}
