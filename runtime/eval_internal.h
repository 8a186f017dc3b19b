/* eval_internal - what the files of eval share: questions, answers, runs and their scores; eval.c runs them,
 * eval_runs.c lists them, eval_journal.c keeps what is finished, eval_score.c, eval_report.c and eval_plot.c say how
 * it went. */
#ifndef VITRAIL_RUNTIME_EVAL_INTERNAL_H
#define VITRAIL_RUNTIME_EVAL_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "runtime/batch_internal.h"
#include "runtime/eval.h"
#include "runtime/output.h"

enum { EVAL_MAX_RUNS = 256 };
/* Between two logits nearer than this, sums taken in another order may rightly choose the other. */
#define EVAL_TIE_MARGIN 0.05

struct eval_question {
    char *id, *prompt, *answer;              /* answer NULL: there is a continuation in its place */
    char *continuation;                      /* text that every run is made to say, and is scored by; NULL: none */
    char *task;                              /* NULL: none */
    char *followup_prompt, *followup_answer; /* a second turn, asked behind the first answer; NULL: none */
    bool is_long;                            /* the answer is five tokens or more */
    char **images;                           /* paths */
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
    bool done; /* what follows is filled in */
    char *text;
    size_t text_size;
    int32_t *tokens;
    int n_tokens, prompt_tokens, image_tokens;
    double kept_tokens; /* of a layer, mean */
    int64_t bytes_full, bytes_kept, bytes_host;
    double bytes_read_per_step, recall_bytes_per_step, recall_hit_rate, first_token_seconds, total_seconds;
    struct eval_followup { /* the second turn's; text NULL: none */
        char *text;
        size_t text_size;
        int32_t *tokens;
        int n_tokens;
    } followup;
    /* Of the continuation, else the full cache's answer, under this run's cache: sum of log-probabilities, and of how
     * many tokens. */
    bool scored;
    double log_likelihood;
    int n_likelihood;
};

/* How some of the questions went. */
struct eval_subset {
    int n, n_answers;                   /* questions; those with an answer, of which the next two rows are */
    int n_exact, n_like_full;           /* n_like_full: -1 where `full` is not among the runs */
    double exact_match, anls, token_f1; /* means */
    double log_likelihood;              /* mean over n_likelihood tokens, 0 of which: not known */
    int64_t n_likelihood;
};

struct eval_scores {
    struct eval_subset all;
    int n_reference, n_like_reference; /* questions with reference tokens, and answers equal to them */
    int64_t bytes_full, bytes_kept, bytes_host, prompt_tokens, generated_tokens;
    /* Means of the answers that took a decode step; the latter two: over the bus, and found on the device. */
    double bytes_read_per_step, recall_bytes_per_step, recall_hit_rate;
};

struct eval_one_run {
    struct policy_config config;
    const char *dtype;          /* the name of the cache's */
    struct eval_answer *answer; /* [n questions] */
    struct eval_scores scores;
    double seconds; /* of the answers, forced ones not counted */
};

/* eval__list_runs - every policy with every budget and dtype, the full cache once a dtype. runs [EVAL_MAX_RUNS];
 * *n_runs of them are to be freed by eval__free_runs, also after an error. */
int eval__list_runs(const struct eval_options *options, const struct config *config, int n_questions,
                    struct eval_one_run *runs, int *n_runs) MUST_CHECK;
void eval__free_runs(struct eval_one_run *runs, int n_runs, int n_questions);

/* eval__next_item - the next item of a comma list into buf; *list moves on, NULL behind the last. ERR_CONFIG. */
int eval__next_item(const char **list, const char *what, char *buf, size_t size) MUST_CHECK;

/* The two ways in which a question is asked. One with a continuation is asked once, in the first pass. */
enum eval_pass { EVAL_FREE, EVAL_FORCED };

/* The journal: a head line that says what the eval is of, then a line for each answer, written as it comes. */
struct eval_journal {
    char *path; /* NULL: there is no output, and every call does nothing */
    struct batch_output file;
    struct output_buffer line;
    int64_t n_records;
    bool ours; /* opened, and of this eval */
};

/* eval__journal_open - with options->resume the answers of an earlier eval are put into the runs and its torn last line
 * is cut off. eval__journal_add - one answer. eval__journal_close - removes the file if `finished` or if it holds no
 * answer. */
int eval__journal_open(struct eval_journal *journal, const struct eval_options *options, const struct config *config,
                       const struct eval_questions *questions, struct eval_one_run *runs, int n_runs) MUST_CHECK;
int eval__journal_add(struct eval_journal *journal, const struct eval_questions *questions,
                      const struct eval_one_run *run, int question, enum eval_pass pass) MUST_CHECK;
int eval__journal_close(struct eval_journal *journal, bool finished) MUST_CHECK;

bool eval__is_full(const struct eval_one_run *run);

/* eval__full_of - the run that the others are held against: the first of the full cache, or NULL. */
const struct eval_one_run *eval__full_of(const struct eval_one_run *runs, int n_runs);

/* eval__score - fills run->scores; `full` is the full cache's run or NULL. eval__score_subset - of the questions with
 * this task (NULL: any), or of the long ones; eval__score_followups - of all second turns. eval__f1 - overlap of two
 * texts' words. eval__anls - 1 less the Levenshtein distance over the longer length, in characters, lower case (of
 * ASCII) and without white space around; 0 from a distance of half the length on. */
struct eval_subset eval__score_followups(const struct eval_questions *questions, const struct eval_one_run *run,
                                         const struct eval_one_run *full);
struct eval_subset eval__score_subset(const struct eval_questions *questions, const struct eval_one_run *run,
                                      const struct eval_one_run *full, const char *task, bool only_long);
double eval__anls(const char *text, size_t size, const char *answer);
void eval__score(const struct eval_questions *questions, struct eval_one_run *run, const struct eval_one_run *full);
double eval__f1(const char *text, size_t size, const char *answer);
bool eval__correct(const struct eval_question *question, const struct eval_answer *answer);

/* eval__has_continuations - whether any question has one. */
bool eval__has_continuations(const struct eval_questions *questions);

/* eval__first_difference - index of the first token unlike the reference, -1 if there is none. */
int eval__first_difference(const struct eval_question *question, const struct eval_answer *answer);

/* eval__show - every question with its answers, a row a run. */
void eval__show(FILE *to, const struct eval_questions *questions, const struct eval_one_run *runs, int n_runs);

/* eval__plot - exact match against budget, a curve for each policy and dtype. */
int eval__plot(const char *path, const struct eval_options *options, const struct eval_one_run *runs,
               int n_runs) MUST_CHECK;

/* eval__print - the table, and below it the answers of the full cache that differ from the reference.
 * eval__write - the JSON file, put in place whole. */
void eval__print(FILE *to, const struct eval_questions *questions, const struct eval_one_run *runs, int n_runs);
int eval__write(const char *path, const struct config *config, const struct eval_options *options,
                const struct eval_questions *questions, const struct eval_one_run *runs, int n_runs) MUST_CHECK;

#endif
