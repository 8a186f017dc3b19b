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

bool eval__correct(const struct eval_question *question, const struct eval_answer *answer)
{
    const char *a = answer->text, *b = question->answer;
    size_t n = answer->text_size, m = strlen(b);
    trim(&a, &n);
    trim(&b, &m);
    return n == m && !memcmp(a, b, n);
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

void eval__score(const struct eval_questions *questions, struct eval_one_run *run, const struct eval_one_run *full)
{
    struct eval_scores *s = &run->scores;
    double f1 = 0;
    memset(s, 0, sizeof *s);
    if (!full) s->n_like_full = -1;
    for (int i = 0; i < questions->n; i++) {
        const struct eval_question *q = &questions->question[i];
        const struct eval_answer *a = &run->answer[i];
        s->n_exact += eval__correct(q, a);
        f1 += eval__f1(a->text, a->text_size, q->answer);
        if (full)
            s->n_like_full += same_tokens(a->tokens, a->n_tokens, full->answer[i].tokens, full->answer[i].n_tokens);
        if (q->model_tokens) {
            s->n_reference++;
            s->n_like_reference += eval__first_difference(q, a) < 0;
        }
        s->bytes_full += a->bytes_full;
        s->bytes_kept += a->bytes_kept;
        s->prompt_tokens += a->prompt_tokens;
        s->generated_tokens += a->n_tokens;
    }
    s->exact_match = (double)s->n_exact / questions->n;
    s->token_f1 = f1 / questions->n;
}
