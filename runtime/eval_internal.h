/* eval_internal - what the files of eval share: questions, answers, runs and their scores. */
#ifndef VITRAIL_RUNTIME_EVAL_INTERNAL_H
#define VITRAIL_RUNTIME_EVAL_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "runtime/eval.h"

enum { EVAL_MAX_RUNS = 256 };
/* Between two logits nearer than this, sums taken in another order may rightly choose the other. */
#define EVAL_TIE_MARGIN 0.05

struct eval_question {
    char *id, *prompt, *answer;
    char **images; /* paths */
    int n_images;
    int32_t *model_tokens; /* reference; NULL: none */
    int n_model_tokens;
    double min_margin; /* of the reference's logits; < 0: not given */
};

struct eval_questions {
    struct eval_question *question;
    int n;
};

/* eval__read - a questions file. eval__free - frees what it took, also after an error. */
int eval__read(const char *path, struct eval_questions *out) MUST_CHECK;
void eval__free(struct eval_questions *questions);

struct eval_answer {
    char *text;
    size_t text_size;
    int32_t *tokens;
    int n_tokens, prompt_tokens, image_tokens;
    double kept_tokens; /* of a layer, mean */
    int64_t bytes_full, bytes_kept;
    double first_token_seconds, total_seconds;
};

struct eval_scores {
    double exact_match, token_f1;      /* shares of all questions */
    int n_exact, n_like_full;          /* n_like_full: -1 where `full` is not among the runs */
    int n_reference, n_like_reference; /* questions with reference tokens, and answers equal to them */
    int64_t bytes_full, bytes_kept, prompt_tokens, generated_tokens;
};

struct eval_one_run {
    struct policy_config config;
    struct eval_answer *answer; /* [n questions] */
    struct eval_scores scores;
    double seconds;
};

bool eval__is_full(const struct eval_one_run *run);

/* eval__score - fills run->scores; `full` is the full cache's run or NULL. eval__f1 - overlap of two texts' words. */
void eval__score(const struct eval_questions *questions, struct eval_one_run *run, const struct eval_one_run *full);
double eval__f1(const char *text, size_t size, const char *answer);
bool eval__correct(const struct eval_question *question, const struct eval_answer *answer);

/* eval__first_difference - index of the first token unlike the reference, -1 if there is none. */
int eval__first_difference(const struct eval_question *question, const struct eval_answer *answer);

/* eval__show - every question with its answers, a row a run. */
void eval__show(FILE *to, const struct eval_questions *questions, const struct eval_one_run *runs, int n_runs);

/* eval__print - the table, and below it the answers of the full cache that differ from the reference.
 * eval__write - the JSON file, put in place whole. */
void eval__print(FILE *to, const struct eval_questions *questions, const struct eval_one_run *runs, int n_runs);
int eval__write(const char *path, const struct config *config, const struct eval_options *options,
                const struct eval_questions *questions, const struct eval_one_run *runs, int n_runs) MUST_CHECK;

#endif
