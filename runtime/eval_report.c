#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runtime/eval_internal.h"

/* ---- for people ---- */

static const char *share(int n, int of, char *buf, size_t size)
{
    if (n < 0 || !of)
        snprintf(buf, size, "-");
    else
        snprintf(buf, size, "%d/%d", n, of);
    return buf;
}

static double mib(int64_t bytes) { return (double)bytes / (1 << 20); }

static void print_mismatches(FILE *to, const struct eval_questions *questions, const struct eval_one_run *run)
{
    for (int i = 0; i < questions->n; i++) {
        const struct eval_question *q = &questions->question[i];
        int at = q->model_tokens ? eval__first_difference(q, &run->answer[i]) : -1;
        if (at < 0) continue;
        fprintf(to, "  %s: unlike the reference from token %d on", q->id, at);
        if (q->min_margin >= 0)
            fprintf(to, "; smallest logit margin of the reference %g%s", q->min_margin,
                    q->min_margin < EVAL_TIE_MARGIN ? ", a tie" : "");
        fprintf(to, "\n");
    }
}

/* At most `width` characters of a text on one line; what is cut or unprintable is marked. */
static void print_clipped(FILE *to, const char *text, int width)
{
    int n = 0;
    for (const char *c = text; *c && n < width; c++) {
        if (((unsigned char)*c & 0xc0) != 0x80 && ++n == width && c[1]) break;
        fputc((unsigned char)*c < 0x20 ? ' ' : *c, to);
    }
    if (n == width) fputs("~", to);
    fprintf(to, "%*s", width > n ? width - n : 0, "");
}

static void show_answer(FILE *to, const struct eval_question *q, const struct eval_one_run *run,
                        const struct eval_answer *a)
{
    char name[64], budget[32];
    double seconds = a->total_seconds - a->first_token_seconds;
    snprintf(name, sizeof name, "%s %s", run->config.policy,
             eval__is_full(run) ? "" : kv_budget_print(run->config.budget, budget, sizeof budget));
    fprintf(to, "  %-18s %6d %6d %8.1f %8.2f %8.2f %9.0f %8.1f  %-5s ", name, a->prompt_tokens, a->image_tokens,
            a->kept_tokens, mib(a->bytes_full), mib(a->bytes_kept), a->first_token_seconds * 1e3,
            a->n_tokens > 1 && seconds > 0 ? (a->n_tokens - 1) / seconds : 0.0,
            !q->answer ? "-" : (eval__correct(q, a) ? "right" : "wrong"));
    print_clipped(to, a->text, 48);
    fputc('\n', to);
}

void eval__show(FILE *to, const struct eval_questions *questions, const struct eval_one_run *runs, int n_runs)
{
    fprintf(to, "  %-18s %6s %6s %8s %8s %8s %9s %8s\n", "", "prompt", "image", "kept", "KV full", "KV kept", "first",
            "tokens");
    fprintf(to, "  %-18s %6s %6s %8s %8s %8s %9s %8s  %-5s %s\n", "cache", "tokens", "tokens", "a layer", "MiB", "MiB",
            "token ms", "/ s", "", "answer");
    for (int i = 0; i < questions->n; i++) {
        const struct eval_question *q = &questions->question[i];
        fprintf(to, "%s: ", q->id);
        print_clipped(to, q->prompt, 96);
        fputc('\n', to);
        for (int r = 0; r < n_runs; r++) show_answer(to, q, &runs[r], &runs[r].answer[i]);
    }
    fputc('\n', to);
}

static double perplexity(const struct eval_subset *s) { return exp(-s->log_likelihood); }

static void print_run(FILE *to, const struct eval_questions *questions, const struct eval_one_run *r)
{
    char budget[32], exact[32], full[32], reference[32], likelihood[32] = "-", column[32] = "";
    const struct eval_scores *s = &r->scores;
    const struct eval_subset *all = &s->all;
    double kept = s->bytes_full ? 100.0 * (double)s->bytes_kept / (double)s->bytes_full : 0;
    if (all->n_likelihood) snprintf(likelihood, sizeof likelihood, "%.4f", all->log_likelihood);
    if (eval__has_continuations(questions))
        snprintf(column, sizeof column, " %10.4g", all->n_likelihood ? perplexity(all) : NAN);
    fprintf(to, "%-18s %8s %8s %10s %6.3f %8.3f %8s %12s %10s%s %9.1f %9.1f %6.1f%% %9.3f %8.1f %9.1f\n",
            r->config.policy, kv_budget_print(r->config.budget, budget, sizeof budget), r->dtype,
            share(all->n_exact, all->n_answers, exact, sizeof exact), all->anls, all->token_f1,
            share(all->n_like_full, all->n_answers, full, sizeof full),
            share(s->n_like_reference, s->n_reference, reference, sizeof reference), likelihood, column,
            mib(s->bytes_full), mib(s->bytes_kept), kept, s->bytes_read_per_step / (1 << 20), r->seconds,
            r->seconds > 0 ? (double)s->generated_tokens / r->seconds : 0.0);
}

void eval__print(FILE *to, const struct eval_questions *questions, const struct eval_one_run *runs, int n_runs)
{
    const char *column = eval__has_continuations(questions) ? " perplexity" : "";
    fprintf(to, "%-18s %8s %8s %10s %6s %8s %8s %12s %10s%*s %9s %9s %7s %9s %8s %9s\n", "", "", "", "", "", "token",
            "", "", "full's", (int)strlen(column), "", "KV full", "KV kept", "", "read/step", "", "");
    fprintf(to, "%-18s %8s %8s %10s %6s %8s %8s %12s %10s%s %9s %9s %7s %9s %8s %9s\n", "policy", "budget", "dtype",
            "exact", "ANLS", "F1", "as full", "as reference", "log-likel.", column, "MiB", "MiB", "kept", "MiB",
            "seconds", "tokens/s");
    for (int i = 0; i < n_runs; i++) print_run(to, questions, &runs[i]);
    for (int i = 0; i < n_runs; i++)
        if (eval__is_full(&runs[i])) print_mismatches(to, questions, &runs[i]);
    fflush(to);
}

/* ---- for programs ---- */

static void put_name(struct output_buffer *b, const char *key, const char *value)
{
    output_printf(b, "\"%s\":", key);
    output_string(b, value, strlen(value));
    output_printf(b, ",");
}

static void put_policy(struct output_buffer *b, const struct eval_one_run *run)
{
    char budget[32];
    const char *quote = run->config.budget.tokens ? "\"" : "";
    put_name(b, "policy", run->config.policy);
    output_printf(b, "\"budget\":%s%s%s,", quote, kv_budget_print(run->config.budget, budget, sizeof budget), quote);
    put_name(b, "dtype", run->dtype);
}

static void put_mismatches(struct output_buffer *b, const struct eval_questions *questions,
                           const struct eval_one_run *run)
{
    const char *comma = "";
    output_printf(b, "\"unlike_reference\":[");
    for (int i = 0; i < questions->n; i++) {
        const struct eval_question *q = &questions->question[i];
        int at = q->model_tokens ? eval__first_difference(q, &run->answer[i]) : -1;
        if (at < 0) continue;
        output_printf(b, "%s{", comma);
        put_name(b, "id", q->id);
        output_printf(b, "\"first_difference\":%d,\"min_margin\":", at);
        if (q->min_margin >= 0)
            output_printf(b, "%.9g,\"tie\":%s}", q->min_margin, q->min_margin < EVAL_TIE_MARGIN ? "true" : "false");
        else
            output_printf(b, "null,\"tie\":false}");
        comma = ",";
    }
    output_printf(b, "]");
}

static void put_share(struct output_buffer *b, const char *key, int n, int of)
{
    if (n < 0 || !of)
        output_printf(b, "\"%s\":null,", key);
    else
        output_printf(b, "\"%s\":%.9g,", key, (double)n / of);
}

static void put_mean(struct output_buffer *b, const char *key, double mean, int64_t of)
{
    if (of && isfinite(mean))
        output_printf(b, ",\"%s\":%.9g", key, mean);
    else
        output_printf(b, ",\"%s\":null", key);
}

static void put_subset(struct output_buffer *b, const struct eval_subset *s)
{
    output_printf(b, "\"n\":%d", s->n);
    put_mean(b, "exact_match", s->exact_match, s->n_answers);
    put_mean(b, "anls", s->anls, s->n_answers);
    put_mean(b, "token_f1", s->token_f1, s->n_answers);
    put_mean(b, "same_as_full", s->n_answers ? (double)s->n_like_full / s->n_answers : 0,
             s->n_like_full < 0 ? 0 : s->n_answers);
    put_mean(b, "log_likelihood", s->log_likelihood, s->n_likelihood);
    put_mean(b, "perplexity", perplexity(s), s->n_likelihood);
}

/* Whether no question before it has the task of question i. */
static bool first_of_task(const struct eval_questions *questions, int i)
{
    const char *task = questions->question[i].task;
    for (int k = 0; task && k < i; k++)
        if (questions->question[k].task && !strcmp(questions->question[k].task, task)) return false;
    return task != NULL;
}

/* Every task by its name, in the order of the file; then the long answers and the second turns, if the file has any. */
static void put_subsets(struct output_buffer *b, const struct eval_questions *questions, const struct eval_one_run *run,
                        const struct eval_one_run *full)
{
    const char *comma = "";
    output_printf(b, "\"tasks\":{");
    for (int i = 0; i < questions->n; i++) {
        const char *task = questions->question[i].task;
        if (!first_of_task(questions, i)) continue;
        struct eval_subset s = eval__score_subset(questions, run, full, task, false);
        output_printf(b, "%s", comma);
        output_string(b, task, strlen(task));
        output_printf(b, ":{");
        put_subset(b, &s);
        output_printf(b, "}");
        comma = ",";
    }
    output_printf(b, "},");
    const struct eval_subset groups[] = {eval__score_subset(questions, run, full, NULL, true),
                                         eval__score_followups(questions, run, full)};
    for (int i = 0; i < 2; i++) {
        if (!groups[i].n) continue;
        output_printf(b, "\"%s\":{", i ? "followup" : "long");
        put_subset(b, &groups[i]);
        output_printf(b, "},");
    }
}

static void put_run(struct output_buffer *b, const struct eval_questions *questions, const struct eval_one_run *run,
                    const struct eval_one_run *full)
{
    const struct eval_scores *s = &run->scores;
    output_printf(b, "{");
    put_policy(b, run);
    put_subset(b, &s->all);
    output_printf(b, ",");
    put_share(b, "same_as_reference", s->n_like_reference, s->n_reference);
    output_printf(b,
                  "\"n_reference\":%d,\"bytes_full\":%" PRId64 ",\"bytes_kept\":%" PRId64 ",\"kept_share\":%.9g,"
                  "\"bytes_host\":%" PRId64 ",\"bytes_read_per_step\":%.9g,\"recall_bytes_per_step\":%.9g,"
                  "\"recall_hit_rate\":%.9g,"
                  "\"prompt_tokens\":%" PRId64 ",\"generated_tokens\":%" PRId64 ",\"seconds\":%.3f,",
                  s->n_reference, s->bytes_full, s->bytes_kept,
                  s->bytes_full ? (double)s->bytes_kept / (double)s->bytes_full : 0.0, s->bytes_host,
                  s->bytes_read_per_step, s->recall_bytes_per_step, s->recall_hit_rate, s->prompt_tokens,
                  s->generated_tokens, run->seconds);
    put_subsets(b, questions, run, full);
    put_mismatches(b, questions, run);
    output_printf(b, "}");
}

static void put_items(struct output_buffer *b, const struct eval_questions *questions, const struct eval_one_run *run)
{
    for (int i = 0; i < questions->n; i++) {
        const struct eval_question *q = &questions->question[i];
        const struct eval_answer *a = &run->answer[i];
        output_printf(b, "%s\n{", i ? "," : "");
        put_name(b, "id", q->id);
        put_policy(b, run);
        output_printf(b, "\"text\":");
        output_string(b, a->text, a->text_size);
        output_printf(b, ",\"tokens\":[");
        for (int k = 0; k < a->n_tokens; k++) output_printf(b, "%s%d", k ? "," : "", a->tokens[k]);
        output_printf(b, "]");
        if (q->answer)
            output_printf(b, ",\"correct\":%s,\"anls\":%.9g", eval__correct(q, a) ? "true" : "false",
                          eval__anls(a->text, a->text_size, q->answer));
        if (a->followup.text) {
            output_printf(b, ",\"followup\":");
            output_string(b, a->followup.text, a->followup.text_size);
        }
        if (a->n_likelihood && isfinite(a->log_likelihood))
            output_printf(b, ",\"log_likelihood\":%.9g,\"likelihood_tokens\":%d", a->log_likelihood / a->n_likelihood,
                          a->n_likelihood);
        output_printf(b, "}");
    }
}

/* Written beside its place and renamed into it, so that a reader never sees a part. */
static int put_in_place(const char *path, const struct output_buffer *b)
{
    char beside[4200];
    int n = snprintf(beside, sizeof beside, "%s.part", path);
    if (n < 0 || (size_t)n >= sizeof beside) FAIL(ERR_CONFIG, "%s: the name is too long", path);
    FILE *f = fopen(beside, "we");
    if (!f) FAIL(ERR_IO, "%s: cannot open for writing: %s", beside, strerror(errno));
    bool good = fwrite(b->text, 1, b->size, f) == b->size;
    good = !fflush(f) && !fsync(fileno(f)) && good;
    good = !fclose(f) && good;
    if (!good || rename(beside, path)) {
        int error = errno;
        unlink(beside);
        FAIL(ERR_IO, "%s: cannot be written: %s", path, strerror(error));
    }
    return OK;
}

int eval__write(const char *path, const struct config *config, const struct eval_options *options,
                const struct eval_questions *questions, const struct eval_one_run *runs, int n_runs)
{
    struct output_buffer b = {0};
    output_printf(&b, "{");
    put_name(&b, "model", config->model);
    put_name(&b, "questions", options->questions);
    output_printf(&b, "\"runs\":[");
    for (int i = 0; i < n_runs; i++) {
        output_printf(&b, "%s\n", i ? "," : "");
        put_run(&b, questions, &runs[i], eval__full_of(runs, n_runs));
    }
    output_printf(&b, "],\"items\":[");
    for (int i = 0; i < n_runs; i++) {
        if (i) output_printf(&b, ",");
        put_items(&b, questions, &runs[i]);
    }
    output_printf(&b, "]}\n");
    int rc = output_check(&b);
    if (!rc) rc = put_in_place(path, &b);
    output_free(&b);
    return rc;
}
