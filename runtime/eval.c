#include "runtime/eval.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "runtime/eval_internal.h"

enum { MAX_ITEM = 64 };

struct eval {
    struct engine *engine;
    const struct prompt_builder *builder;
    const struct eval_options *options;
    struct eval_result *result;
    struct eval_questions questions;
    struct eval_one_run *runs;
    int n_runs, max_in_flight;
    cJSON *sampling; /* the fields that every question is asked with */
    /* of the run under way */
    struct slot {
        struct eval *eval;
        struct eval_answer *answer;
    } * slots; /* [n questions] */
    int n_in_flight, n_done;
    bool engine_failed;
    int rc; /* of a callback */
    double last_report;
};

/* ---- the list of runs ---- */

/* The next item of a comma list into buf; *list moves on, NULL behind the last. */
static int next_item(const char **list, const char *what, char *buf, size_t size)
{
    const char *comma = strchr(*list, ',');
    size_t n = comma ? (size_t)(comma - *list) : strlen(*list);
    if (!n || n >= size) FAIL(ERR_CONFIG, "%s: \"%s\" is no comma list of names", what, *list);
    memcpy(buf, *list, n);
    buf[n] = 0;
    *list = comma ? comma + 1 : NULL;
    return OK;
}

static int add_run(struct eval *e, const char *policy, struct kv_budget budget)
{
    if (e->n_runs == EVAL_MAX_RUNS) FAIL(ERR_CONFIG, "more than %d runs of policies and budgets", EVAL_MAX_RUNS);
    struct eval_one_run *run = &e->runs[e->n_runs++];
    run->config = prompt_config(e->builder)->kv_cache;
    snprintf(run->config.policy, sizeof run->config.policy, "%s", policy);
    run->config.budget = budget;
    run->answer = calloc((size_t)e->questions.n, sizeof *run->answer);
    if (!run->answer) FAIL(ERR_NOMEM, "no memory for %d answers", e->questions.n);
    return OK;
}

/* Every policy with every budget; the full cache once. */
static int list_runs(struct eval *e)
{
    const struct config *config = prompt_config(e->builder);
    const char *policies = e->options->policies ? e->options->policies : config->kv_cache.policy;
    char policy[MAX_ITEM], text[MAX_ITEM];
    while (policies) {
        const struct policy_vt *found;
        const char *budgets = e->options->budgets;
        TRY(next_item(&policies, "policies", policy, sizeof policy));
        TRY(policy_find(policy, &found));
        if (!strcmp(policy, "full")) {
            TRY(add_run(e, policy, (struct kv_budget){1, 0}));
            continue;
        }
        if (!budgets) TRY(add_run(e, policy, config->kv_cache.budget));
        while (budgets) {
            struct kv_budget budget;
            TRY(next_item(&budgets, "budgets", text, sizeof text));
            TRY(kv_budget_parse(text, &budget));
            TRY(add_run(e, policy, budget));
        }
    }
    return OK;
}

/* ---- one run ---- */

static void on_done(void *arg, const struct completion *c)
{
    struct slot *slot = arg;
    struct eval *e = slot->eval;
    struct eval_answer *a = slot->answer;
    e->n_in_flight--;
    if (c->finish_reason == FINISH_ABORT) return;
    a->text = malloc(c->text_size + 1);
    a->tokens = malloc(((size_t)c->n_tokens + 1) * sizeof *a->tokens);
    if (!a->text || !a->tokens) {
        e->rc = status_set(ERR_NOMEM, __FILE__, __LINE__, "no memory for an answer of %zu bytes", c->text_size);
        return;
    }
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
    e->n_done++;
}

static void show_progress(struct eval *e, const struct eval_one_run *run, double start)
{
    char budget[32];
    double now = clock_seconds();
    if (!e->options->progress || (now - e->last_report < 5 && e->n_done < e->questions.n)) return;
    e->last_report = now;
    log_line(LOG_INFO, "eval: %s %s: %d of %d questions, %.1f s", run->config.policy,
             kv_budget_print(run->config.budget, budget, sizeof budget), e->n_done, e->questions.n, now - start);
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

static int ask(struct eval *e, const struct eval_one_run *run, int i)
{
    const struct eval_question *q = &e->questions.question[i];
    struct prompt_text text = {q->prompt, strlen(q->prompt), (const char *const *)q->images, q->n_images, true};
    struct request request;
    TRY(prompt_from_text(e->builder, &text, e->sampling, q->id, &request));
    request.budget = run->config.budget;
    e->slots[i] = (struct slot){e, &run->answer[i]};
    int rc;
    while ((rc = engine_submit(e->engine, &request, (struct sink){&e->slots[i], NULL, on_done})) == ERR_FULL) {
        rc = step(e);
        if (rc) break;
    }
    request_free(&request);
    e->n_in_flight += !rc;
    return rc == ERR_REQUEST ? status_prefix(rc, "%s", q->id) : rc;
}

static int run_one(struct eval *e, struct eval_one_run *run)
{
    double start = clock_seconds();
    int next = 0;
    e->n_done = 0;
    TRY(engine_set_policy(e->engine, &run->config));
    while (next < e->questions.n || e->n_in_flight) {
        e->result->stop_signal = stop_signal(e);
        if (e->result->stop_signal) return OK;
        while (next < e->questions.n && e->n_in_flight < e->max_in_flight) TRY(ask(e, run, next++));
        TRY(step(e));
        show_progress(e, run, start);
    }
    if (e->n_done != e->questions.n)
        FAIL(ERR_BUG, "the engine ended %d questions without an answer", e->questions.n - e->n_done);
    run->seconds = clock_seconds() - start;
    return OK;
}

/* ---- all ---- */

static int open_all(struct eval *e)
{
    TRY(eval__read(e->options->questions, &e->questions));
    TRY(list_runs(e));
    e->slots = calloc((size_t)e->questions.n, sizeof *e->slots);
    e->sampling = cJSON_CreateObject();
    if (!e->slots || !cJSON_AddNumberToObject(e->sampling, "temperature", 0) ||
        (e->options->max_tokens > 0 && !cJSON_AddNumberToObject(e->sampling, "max_tokens", e->options->max_tokens)))
        FAIL(ERR_NOMEM, "no memory for %d questions", e->questions.n);
    e->max_in_flight = e->options->max_in_flight;
    if (e->max_in_flight < 1) e->max_in_flight = prompt_config(e->builder)->max_num_seqs + 2;
    return OK;
}

static int report(struct eval *e)
{
    const struct eval_one_run *full = NULL;
    for (int i = 0; i < e->n_runs && !full; i++)
        if (eval__is_full(&e->runs[i])) full = &e->runs[i];
    for (int i = 0; i < e->n_runs; i++) eval__score(&e->questions, &e->runs[i], full);
    for (int i = 0; full && i < e->questions.n; i++) {
        const struct eval_question *q = &e->questions.question[i];
        if (!q->model_tokens || eval__first_difference(q, &full->answer[i]) < 0) continue;
        e->result->n_unlike_reference++;
        e->result->n_ties += q->min_margin >= 0 && q->min_margin < EVAL_TIE_MARGIN;
    }
    if (e->options->table && e->options->show) eval__show(e->options->table, &e->questions, e->runs, e->n_runs);
    if (e->options->table) eval__print(e->options->table, &e->questions, e->runs, e->n_runs);
    if (!e->options->output) return OK;
    return eval__write(e->options->output, prompt_config(e->builder), e->options, &e->questions, e->runs, e->n_runs);
}

static int run_all(struct eval *e)
{
    TRY(open_all(e));
    e->result->n_questions = e->questions.n;
    for (int i = 0; i < e->n_runs; i++) {
        TRY(run_one(e, &e->runs[i]));
        if (e->result->stop_signal) return OK;
        e->result->n_runs++;
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
    int aborted = abort_all(&e);
    if (rc)
        status_set(rc, __FILE__, __LINE__, "%s", message);
    else
        rc = aborted;
    for (int i = 0; i < e.n_runs; i++) {
        for (int k = 0; e.runs[i].answer && k < e.questions.n; k++) {
            free(e.runs[i].answer[k].text);
            free(e.runs[i].answer[k].tokens);
        }
        free(e.runs[i].answer);
    }
    free(e.runs);
    free(e.slots);
    cJSON_Delete(e.sampling);
    eval__free(&e.questions);
    return rc;
}
