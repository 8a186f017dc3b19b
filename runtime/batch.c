#include "runtime/batch.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "runtime/batch_internal.h"

enum { MANY_LINES = 4096 /* read at most so many between two engine steps: finished ones go by fast */ };

struct batch {
    struct engine *engine;
    const struct prompt_builder *builder;
    const struct batch_options *options;
    struct batch_result *result;
    struct batch_input input;
    struct batch_output output;
    struct batch_ids ids;
    struct batch_pool *pool;
    struct batch_progress progress;
    struct output_buffer record;
    struct batch_item *ready; /* prepared, and the engine's queue was full */
    int n_in_flight, n_submitted, max_in_flight;
    int64_t tokens_before; /* the engine's counter at the start */
    bool input_ended, stopping, engine_failed;
    int rc; /* of a callback */
};

static int write_record(struct batch *b)
{
    TRY(output_check(&b->record));
    return batch__output_append(&b->output, b->record.text, b->record.size);
}

/* The error record of an item, which ends here. */
static int fail_item(struct batch *b, struct batch_item *item, bool by_line)
{
    batch__put_error(&b->record, item, by_line);
    batch__item_free(item);
    TRY(write_record(b));
    b->result->n_failed++;
    return OK;
}

/* ---- from the input to the engine ---- */

/* Whether a line is still to be answered: finished ones are dropped, a repeated custom_id becomes an error record. */
static int sort_out(struct batch *b, struct batch_item *item, bool *todo)
{
    struct batch_key line = batch__key_of_line(item->line);
    unsigned before = 0;
    bool by_line = !item->quoted_id;
    *todo = false;
    if (!by_line) {
        TRY(batch__ids_mark(&b->ids, item->key, BATCH_SEEN, &before));
        by_line = (before & BATCH_SEEN) != 0;
    }
    if (by_line) before = batch__ids_get(&b->ids, line);
    if (before & BATCH_FINISHED) {
        b->result->n_skipped++;
        batch__item_free(item);
        return OK;
    }
    if (by_line && item->quoted_id) {
        int rc = status_set(ERR_REQUEST, __FILE__, __LINE__, "line %" PRId64 ": custom_id %s stands in an earlier line",
                            item->line, item->quoted_id);
        batch__item_fail(item, rc, "duplicate_custom_id");
    }
    *todo = !item->rc;
    return *todo ? OK : fail_item(b, item, by_line);
}

static int admit_line(struct batch *b, const struct batch_line *line)
{
    struct batch_item *item;
    bool todo;
    b->result->n_lines++;
    TRY(batch__item_parse(line, &item));
    item->batch = b;
    TRY(sort_out(b, item, &todo));
    if (!todo) return OK;
    b->n_in_flight++;
    batch__pool_give(b->pool, item);
    return OK;
}

static int admit(struct batch *b)
{
    struct batch_line line;
    enum batch_input_state state;
    for (int i = 0; i < MANY_LINES && !b->input_ended && b->n_in_flight < b->max_in_flight; i++) {
        TRY(batch__input_next(&b->input, b->n_in_flight ? 0 : 0.1, &line, &state));
        if (state == BATCH_NOTHING_YET) return OK;
        if (state == BATCH_LINE)
            TRY(admit_line(b, &line));
        else
            b->input_ended = true;
    }
    return OK;
}

static void on_done(void *arg, const struct completion *completion)
{
    struct batch_item *item = arg;
    struct batch *b = item->batch;
    int rc = OK;
    b->n_in_flight--;
    b->n_submitted--;
    if (completion->finish_reason != FINISH_ABORT) {
        batch__put_answer(&b->record, item, b->builder, completion);
        rc = write_record(b);
        b->result->n_answered += !rc;
        b->result->generated_tokens += completion->n_tokens;
    } else if (!b->stopping) {
        rc = status_set(ERR_BUG, __FILE__, __LINE__, "line %" PRId64 ": the engine ended the request without an answer",
                        item->line);
    }
    if (rc && !b->rc) b->rc = rc;
    batch__item_free(item);
}

/* One prepared item to the engine; it stays b->ready if the engine's queue is full. */
static int submit_item(struct batch *b, struct batch_item *item)
{
    int rc = item->rc;
    if (!rc) {
        rc = engine_submit(b->engine, &item->request, (struct sink){item, NULL, on_done});
        if (rc == ERR_FULL) {
            b->ready = item;
            return OK;
        }
        if (rc == ERR_REQUEST) batch__item_fail(item, rc, "invalid_request");
    } else if (rc != ERR_REQUEST) {
        status_set(rc, __FILE__, __LINE__, "%s", item->message ? item->message : "no memory");
    }
    if (!rc) {
        b->n_submitted++;
        return OK;
    }
    b->n_in_flight--;
    if (rc == ERR_REQUEST) return fail_item(b, item, false);
    batch__item_free(item);
    return rc;
}

static int submit(struct batch *b)
{
    struct batch_item *item;
    do {
        item = b->ready ? b->ready : batch__pool_take(b->pool, b->n_submitted ? 0 : 0.02);
        b->ready = NULL;
        if (item) TRY(submit_item(b, item));
    } while (item && !b->ready);
    return OK;
}

/* ---- the run ---- */

/* So far, tokens of answers under way included. */
static int64_t generated(const struct batch *b)
{
    struct engine_counters counters;
    engine_counters(b->engine, &counters);
    return counters.decode_tokens - b->tokens_before;
}

static int step(struct batch *b)
{
    int active, rc = engine_step(b->engine, &active);
    b->engine_failed = rc != OK;
    return rc ? rc : b->rc;
}

/* Ends what runs, without a record: a resumed job answers those lines. */
static int abort_all(struct batch *b)
{
    b->stopping = true;
    if (b->engine_failed || !b->n_submitted) return OK;
    TRY(engine_abort_all(b->engine));
    int active = 1;
    while (b->n_submitted && active) TRY(engine_step(b->engine, &active));
    return OK;
}

static int stop_signal(const struct batch *b)
{
    return b->options->liveness ? liveness_stop_requested(b->options->liveness) : 0;
}

static int run(struct batch *b)
{
    while (!b->input_ended || b->n_in_flight) {
        b->result->stop_signal = stop_signal(b);
        if (b->result->stop_signal) return OK;
        TRY(admit(b));
        TRY(submit(b));
        TRY(step(b));
        batch__progress_show(&b->progress, b->result, &b->input, generated(b));
    }
    return OK;
}

static int n_threads(const struct batch_options *options)
{
    if (options->n_threads) return options->n_threads > 0 ? options->n_threads : 0;
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    return cores >= 16 ? 4 : cores >= 8 ? 2 : 1;
}

static int open_parts(struct batch *b)
{
    const struct config *config = prompt_config(b->builder);
    TRY(batch__input_open(&b->input, b->options->input, (size_t)config->max_request_bytes));
    if (b->options->resume) TRY(batch__output_resume(&b->output, &b->ids, b->result));
    b->max_in_flight = b->options->max_in_flight;
    if (b->max_in_flight < 1) b->max_in_flight = config->max_num_seqs + 4 + 2 * n_threads(b->options);
    return batch__pool_open(b->builder, n_threads(b->options), &b->pool);
}

int batch_run(struct engine *engine, const struct prompt_builder *builder, const struct batch_options *options,
              struct batch_result *result)
{
    struct batch b = {.engine = engine, .builder = builder, .options = options, .result = result, .input.fd = -1};
    char message[4096];
    memset(result, 0, sizeof *result);
    TRY(prompt_check_chat(builder));
    batch__progress_open(&b.progress, options->progress);
    b.tokens_before = generated(&b);
    int rc = batch__output_open(&b.output, options);
    if (!rc) rc = open_parts(&b);
    if (!rc) rc = run(&b);
    snprintf(message, sizeof message, "%s", status_message());
    int ended = abort_all(&b), closed = batch__output_close(&b.output);
    if (rc)
        status_set(rc, __FILE__, __LINE__, "%s", message); /* the first error is the one to report */
    else
        rc = ended ? ended : closed;
    batch__progress_close(&b.progress);
    batch__pool_close(b.pool);
    batch__item_free(b.ready);
    batch__input_close(&b.input);
    batch__ids_free(&b.ids);
    output_free(&b.record);
    result->seconds = clock_seconds() - b.progress.start;
    return rc;
}
