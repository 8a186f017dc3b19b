#include "runtime/sequence.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

int sequence_begin(struct sequence *seq, struct request *request, struct sink sink, const struct tokenizer *tokenizer,
                   int judging)
{
    memset(seq, 0, sizeof *seq);
    seq->request = *request;
    memset(request, 0, sizeof *request);
    seq->sink = sink;
    seq->judging = judging;
    seq->state = SEQUENCE_QUEUED;
    seq->submitted_at = clock_seconds();
    size_t n = (size_t)seq->request.max_tokens, pairs = n * (size_t)(1 + seq->request.sampling.n_logprobs);
    seq->tokens = malloc(n * sizeof *seq->tokens);
    if (seq->request.sampling.n_logprobs) {
        seq->logprob = malloc(pairs * sizeof *seq->logprob);
        seq->logprob_token = malloc(pairs * sizeof *seq->logprob_token);
    }
    if (!seq->tokens || (seq->request.sampling.n_logprobs && (!seq->logprob || !seq->logprob_token)))
        FAIL(ERR_NOMEM, "request: out of memory");
    return text_stream_begin(&seq->stream, tokenizer, &seq->request);
}

void sequence_clear(struct sequence *seq)
{
    int *kept = seq->kept;
    text_stream_end(&seq->stream);
    request_free(&seq->request);
    free(seq->tokens);
    free(seq->logprob);
    free(seq->logprob_token);
    memset(seq, 0, sizeof *seq);
    seq->kept = kept;
}

/* The prompt, the answer and the follow-up in one, malloc'd. */
static int32_t *conversation(const struct sequence *seq, int *n)
{
    const struct request *r = &seq->request;
    size_t prompt = (size_t)r->n_ids, answer = (size_t)seq->n_tokens, next = (size_t)r->n_followup;
    int32_t *ids = malloc((prompt + answer + next) * sizeof *ids);
    if (!ids) return NULL;
    memcpy(ids, r->ids, prompt * sizeof *ids);
    memcpy(ids + prompt, seq->tokens, answer * sizeof *ids);
    memcpy(ids + prompt + answer, r->followup, next * sizeof *ids);
    *n = (int)(prompt + answer + next);
    return ids;
}

int sequence_continue(struct sequence *seq, const struct tokenizer *tokenizer)
{
    struct request *r = &seq->request;
    int n, behind = seq->n_tokens + r->n_followup;
    int32_t *ids = conversation(seq, &n), *tokens = malloc((size_t)r->followup_max_tokens * sizeof *tokens);
    if (!ids || !tokens) {
        free(ids);
        free(tokens);
        FAIL(ERR_NOMEM, "request: out of memory");
    }
    /* A decode step appends the token before the one that it samples. */
    seq->n_prefilled = r->n_ids + seq->n_issued - 1;
    free(r->ids);
    free(seq->tokens);
    r->ids = ids;
    r->n_ids = n;
    seq->tokens = tokens;
    seq->n_tokens = seq->n_issued = 0;
    r->max_tokens = r->followup_max_tokens;
    r->min_tokens = r->n_forced = r->n_followup = 0;
    r->sampling.n_logprobs = 0;
    seq->n_behind = behind;
    seq->turn = 1;
    seq->judging = 1;
    seq->begun = false;
    seq->state = SEQUENCE_PREFILL;
    seq->submitted_at = seq->admitted_at = clock_seconds();
    text_stream_end(&seq->stream);
    return text_stream_begin(&seq->stream, tokenizer, r);
}

static bool ends_generation(const struct sequence *seq, const struct sequence_facts *facts, int32_t token)
{
    const struct request *r = &seq->request;
    if (seq->n_tokens < r->min_tokens || seq->n_tokens < r->n_forced) return false;
    for (int i = 0; i < r->n_stop_ids; i++)
        if (token == r->stop_id[i]) return true;
    for (int i = 0; !r->ignore_eos && i < facts->n_eos_ids; i++)
        if (token == facts->eos_ids[i]) return true;
    return false;
}

static void show(struct sequence *seq, bool all)
{
    size_t size;
    const char *text = text_stream_show(&seq->stream, all, &size);
    if (size && seq->sink.on_text) seq->sink.on_text(seq->sink.arg, text, size);
}

static void store_logprobs(struct sequence *seq, const float *logprob, const int32_t *token)
{
    size_t width = 1 + (size_t)seq->request.sampling.n_logprobs, at = (size_t)seq->n_tokens * width;
    if (!seq->logprob || !logprob) return;
    memcpy(seq->logprob + at, logprob, width * sizeof *logprob);
    memcpy(seq->logprob_token + at, token, width * sizeof *token);
}

int sequence_push(struct sequence *seq, const struct sequence_facts *facts, int32_t token, const float *logprob,
                  const int32_t *logprob_token)
{
    const struct request *r = &seq->request;
    bool stopped = false, may_stop;
    if (!seq->n_tokens) seq->first_token_at = clock_seconds();
    store_logprobs(seq, logprob, logprob_token);
    seq->tokens[seq->n_tokens++] = token;
    if (ends_generation(seq, facts, token)) return sequence_complete(seq, facts, FINISH_STOP);
    may_stop = seq->n_tokens >= r->min_tokens && seq->n_tokens >= r->n_forced;
    TRY(text_stream_push(&seq->stream, token, may_stop, &stopped));
    if (stopped) return sequence_complete(seq, facts, FINISH_STOP);
    if (seq->n_tokens == r->max_tokens) return sequence_complete(seq, facts, FINISH_LENGTH);
    show(seq, false);
    return OK;
}

/* Tokens that are stored as the prompt's, over layers, in the step that appends the n-th behind it (0: before all):
 * whenever a page's worth has come, lanes are cut down to plain_tokens. Of heads with budgets of their own the mean
 * counts. */
static int64_t plain_tokens(const struct sequence *seq, const struct sequence_facts *facts, int n)
{
    int64_t tokens = 0;
    if (!facts->plain_tokens) return 0;
    const int aged = n ? (n - 1) / facts->page_tokens * facts->page_tokens : 0;
    for (int l = 0; l < facts->n_layers; l++) {
        const int length = seq->kept[l] + aged;
        tokens += (length < facts->plain_tokens ? length : facts->plain_tokens) + n - aged;
    }
    return tokens;
}

static int64_t kept_bytes(const struct sequence *seq, const struct sequence_facts *facts)
{
    const int64_t plain = plain_tokens(seq, facts, 0);
    int64_t tokens = 0;
    for (int l = 0; l < facts->n_layers; l++) tokens += seq->kept[l] + seq->n_behind;
    return ((tokens - plain) * facts->kept_token_bytes + plain * facts->token_bytes) / facts->n_layers;
}

/* Tokens of the prompt that the policy decided on: the first turn's. */
static int judged_tokens(const struct sequence *seq) { return seq->request.n_ids - (seq->turn ? seq->n_behind : 0); }

/* What of a prompt went to host memory. */
static int64_t host_bytes(const struct sequence *seq, const struct sequence_facts *facts)
{
    const int m = judged_tokens(seq);
    int64_t tokens = 0;
    if (!policy_host_tokens(facts->policy, seq->request.budget, m)) return 0;
    for (int l = 0; l < facts->n_layers; l++) tokens += m - seq->kept[l];
    return tokens * facts->token_bytes / facts->n_layers;
}

/* Mean bytes that attention reads of the cache in a decode step, by the policy's count, and those of them from host
 * memory. */
static double read_per_step(const struct sequence *seq, const struct sequence_facts *facts, double *recalled)
{
    const struct policy_sequence asked = {.prompt_tokens = judged_tokens(seq),
                                          .n_spans = seq->request.n_images,
                                          .spans = seq->request.spans,
                                          .budget = seq->request.budget};
    double sum = 0, kept = 0;
    *recalled = 0;
    if (!seq->kept || seq->n_tokens < 2) return 0;
    for (int l = 0; l < facts->n_layers; l++) kept += (double)seq->kept[l] / facts->n_layers;
    for (int i = 0; i + 1 < seq->n_tokens; i++) {
        const struct policy_reads reads = policy_step_reads(facts->policy, &asked, kept, seq->n_behind + i);
        const double far = reads.recalled * (double)facts->token_bytes; /* stays as it is */
        const double plain = (double)plain_tokens(seq, facts, i + 1) / facts->n_layers;
        sum += (reads.tokens - reads.recalled - plain) * (double)facts->kept_token_bytes +
               plain * (double)facts->token_bytes + far + (double)reads.beside_bytes;
        *recalled += far;
    }
    *recalled /= seq->n_tokens - 1;
    return sum / (seq->n_tokens - 1);
}

int sequence_complete(struct sequence *seq, const struct sequence_facts *facts, enum finish_reason reason)
{
    const struct request *r = &seq->request;
    double now = clock_seconds(), recalled, read = read_per_step(seq, facts, &recalled);
    const int64_t *counts = seq->recall_counts;
    const double hit_rate = counts[0] ? (double)counts[1] / (double)counts[0] : 0;
    if (reason == FINISH_LENGTH) TRY(text_stream_finish(&seq->stream));
    if (reason != FINISH_ABORT) show(seq, true);
    struct completion done = {.text = seq->stream.text,
                              .text_size = seq->stream.size,
                              .tokens = seq->tokens,
                              .n_tokens = seq->n_tokens,
                              .finish_reason = reason,
                              .turn = seq->turn,
                              .more = r->n_followup && reason != FINISH_ABORT,
                              .prompt_tokens = r->n_ids,
                              .policy = facts->policy->vt->name,
                              .budget = r->budget,
                              .kept_tokens_per_layer = seq->kept,
                              .n_layers = seq->kept ? facts->n_layers : 0,
                              .bytes_full = facts->token_bytes * r->n_ids,
                              .bytes_kept = seq->kept ? kept_bytes(seq, facts) : 0,
                              .bytes_host = seq->kept ? host_bytes(seq, facts) : 0,
                              .bytes_read_per_step = read,
                              .recall_bytes_per_step = recalled * (1 - hit_rate),
                              .recall_hit_rate = hit_rate,
                              .queue_seconds = (seq->admitted_at > 0 ? seq->admitted_at : now) - seq->submitted_at,
                              .first_token_seconds = seq->n_tokens ? seq->first_token_at - seq->submitted_at : 0,
                              .total_seconds = now - seq->submitted_at,
                              .logprob = seq->logprob,
                              .logprob_token = seq->logprob_token,
                              .n_logprobs = r->sampling.n_logprobs};
    for (int i = 0; i < r->n_images; i++) done.image_tokens += r->spans[i].end - r->spans[i].start;
    seq->sink.on_done(seq->sink.arg, &done);
    seq->state = seq->state == SEQUENCE_QUEUED ? SEQUENCE_FREE : SEQUENCE_DONE;
    return OK;
}
