#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/eval_internal.h"

bool eval__is_full(const struct eval_one_run *run) { return !strcmp(run->config.policy, "full"); }

static bool is_space(char c) { return c == ' ' || (c >= 9 && c <= 13); }

/* The text without the white space around it. */
static void trim(const char **text, size_t *size)
{
    while (*size && is_space(**text)) {
        (*text)++;
        (*size)--;
    }
    while (*size && is_space((*text)[*size - 1])) (*size)--;
}

static bool same_text(const char *a, size_t n, const char *b)
{
    size_t m = strlen(b);
    trim(&a, &n);
    trim(&b, &m);
    return n == m && !memcmp(a, b, n);
}

bool eval__correct(const struct eval_question *question, const struct eval_answer *answer)
{
    return question->answer && same_text(answer->text, answer->text_size, question->answer);
}

struct word {
    const char *text;
    size_t size;
};

static int compare_words(const void *a, const void *b)
{
    const struct word *x = a, *y = b;
    for (size_t i = 0; i < x->size && i < y->size; i++) {
        int c = tolower((unsigned char)x->text[i]), d = tolower((unsigned char)y->text[i]);
        if (c != d) return c - d;
    }
    return (x->size > y->size) - (x->size < y->size);
}

/* Words between white space, sorted; malloc'd, NULL without memory. */
static struct word *words(const char *text, size_t size, size_t *n)
{
    struct word *out = malloc((size / 2 + 1) * sizeof *out);
    *n = 0;
    for (size_t i = 0; out && i < size;) {
        while (i < size && is_space(text[i])) i++;
        size_t start = i;
        while (i < size && !is_space(text[i])) i++;
        if (i > start) out[(*n)++] = (struct word){text + start, i - start};
    }
    if (out) qsort(out, *n, sizeof *out, compare_words);
    return out;
}

double eval__f1(const char *text, size_t size, const char *answer)
{
    size_t n, m, i = 0, k = 0, same = 0;
    struct word *a = words(text, size, &n), *b = words(answer, strlen(answer), &m);
    while (a && b && i < n && k < m) {
        int c = compare_words(&a[i], &b[k]);
        same += c == 0;
        i += c <= 0;
        k += c >= 0;
    }
    free(a);
    free(b);
    if (!n && !m) return 1;
    return same ? 2.0 * (double)same / (double)(n + m) : 0;
}

static bool same_tokens(const int32_t *a, int n, const int32_t *b, int m)
{
    return n == m && (!n || !memcmp(a, b, (size_t)n * sizeof *a));
}

int eval__first_difference(const struct eval_question *q, const struct eval_answer *a)
{
    int i = 0;
    if (same_tokens(a->tokens, a->n_tokens, q->model_tokens, q->n_model_tokens)) return -1;
    while (i < a->n_tokens && i < q->n_model_tokens && a->tokens[i] == q->model_tokens[i]) i++;
    return i;
}

/* ---- average normalised Levenshtein similarity ---- */

/* The characters of a text, in lower case as far as ASCII goes; malloc'd, NULL without memory. */
static uint32_t *characters(const char *text, size_t size, size_t *n)
{
    uint32_t *out = malloc((size + 1) * sizeof *out);
    *n = 0;
    for (size_t i = 0; out && i < size; i++) {
        unsigned char c = (unsigned char)text[i];
        if ((c & 0xc0) == 0x80 && *n)
            out[*n - 1] = out[*n - 1] << 8 | c; /* a character is its bytes */
        else
            out[(*n)++] = c >= 'A' && c <= 'Z' ? c + 32u : c;
    }
    return out;
}

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* row [m + 1] is room for the distances of one prefix of a to all prefixes of b. */
static size_t distance(const uint32_t *a, size_t n, const uint32_t *b, size_t m, size_t *row)
{
    for (size_t k = 0; k <= m; k++) row[k] = k;
    for (size_t i = 1; i <= n; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t k = 1; k <= m; k++) {
            size_t changed = diagonal + (a[i - 1] != b[k - 1]);
            diagonal = row[k];
            row[k] = least(changed, 1 + least(row[k], row[k - 1]));
        }
    }
    return row[m];
}

double eval__anls(const char *text, size_t size, const char *answer)
{
    size_t n, m, answer_size = strlen(answer);
    trim(&text, &size);
    trim(&answer, &answer_size);
    uint32_t *a = characters(text, size, &n), *b = characters(answer, answer_size, &m);
    size_t *row = malloc((m + 1) * sizeof *row);
    double similarity = 0;
    if (a && b && row) {
        size_t longer = n > m ? n : m;
        double far = longer ? (double)distance(a, n, b, m, row) / (double)longer : 0;
        similarity = far < 0.5 ? 1 - far : 0;
    }
    free(a);
    free(b);
    free(row);
    return similarity;
}

/* ---- a run ---- */

const struct eval_one_run *eval__full_of(const struct eval_one_run *runs, int n_runs)
{
    for (int i = 0; i < n_runs; i++)
        if (eval__is_full(&runs[i])) return &runs[i];
    return NULL;
}

bool eval__has_continuations(const struct eval_questions *questions)
{
    for (int i = 0; i < questions->n; i++)
        if (questions->question[i].continuation) return true;
    return false;
}

static void finish(struct eval_subset *s)
{
    double n = s->n_answers ? s->n_answers : 1;
    s->exact_match = s->n_exact / n;
    s->anls /= n;
    s->token_f1 /= n;
    if (s->n_likelihood) s->log_likelihood /= (double)s->n_likelihood;
}

struct eval_subset eval__score_followups(const struct eval_questions *questions, const struct eval_one_run *run,
                                         const struct eval_one_run *full)
{
    struct eval_subset s = {.n_like_full = full ? 0 : -1};
    for (int i = 0; i < questions->n; i++) {
        const char *answer = questions->question[i].followup_answer;
        const struct eval_followup *f = &run->answer[i].followup;
        if (!answer || !f->text) continue;
        s.n++;
        s.n_answers++;
        s.n_exact += same_text(f->text, f->text_size, answer);
        s.anls += eval__anls(f->text, f->text_size, answer);
        s.token_f1 += eval__f1(f->text, f->text_size, answer);
        if (full)
            s.n_like_full +=
                same_tokens(f->tokens, f->n_tokens, full->answer[i].followup.tokens, full->answer[i].followup.n_tokens);
    }
    finish(&s);
    return s;
}

struct eval_subset eval__score_subset(const struct eval_questions *questions, const struct eval_one_run *run,
                                      const struct eval_one_run *full, const char *task, bool only_long)
{
    struct eval_subset s = {.n_like_full = full ? 0 : -1};
    for (int i = 0; i < questions->n; i++) {
        const struct eval_question *q = &questions->question[i];
        const struct eval_answer *a = &run->answer[i];
        if ((task && (!q->task || strcmp(q->task, task) != 0)) || (only_long && !q->is_long)) continue;
        s.n++;
        if (a->scored) {
            s.log_likelihood += a->log_likelihood;
            s.n_likelihood += a->n_likelihood;
        }
        if (!q->answer) continue;
        s.n_answers++;
        s.n_exact += eval__correct(q, a);
        s.anls += eval__anls(a->text, a->text_size, q->answer);
        s.token_f1 += eval__f1(a->text, a->text_size, q->answer);
        if (full)
            s.n_like_full += same_tokens(a->tokens, a->n_tokens, full->answer[i].tokens, full->answer[i].n_tokens);
    }
    finish(&s);
    return s;
}

void eval__score(const struct eval_questions *questions, struct eval_one_run *run, const struct eval_one_run *full)
{
    struct eval_scores *s = &run->scores;
    int n_read = 0;
    memset(s, 0, sizeof *s);
    s->all = eval__score_subset(questions, run, full, NULL, false);
    for (int i = 0; i < questions->n; i++) {
        const struct eval_question *q = &questions->question[i];
        const struct eval_answer *a = &run->answer[i];
        if (q->model_tokens) {
            s->n_reference++;
            s->n_like_reference += eval__first_difference(q, a) < 0;
        }
        s->bytes_full += a->bytes_full;
        s->bytes_kept += a->bytes_kept;
        s->bytes_host += a->bytes_host;
        s->bytes_read_per_step += a->bytes_read_per_step;
        s->recall_bytes_per_step += a->recall_bytes_per_step;
        s->recall_hit_rate += a->recall_hit_rate;
        n_read += a->bytes_read_per_step > 0;
        s->prompt_tokens += a->prompt_tokens;
        s->generated_tokens += a->n_tokens;
    }
    if (n_read) s->bytes_read_per_step /= n_read;
    if (n_read) s->recall_bytes_per_step /= n_read;
    if (n_read) s->recall_hit_rate /= n_read;
}
