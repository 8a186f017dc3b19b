/* The journal of an eval: <output>.partial, one JSON object a line, each by one write. The first line has hashes of the
 * configuration, the model and the questions file, so that no answer of another eval is taken over. */
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "runtime/eval_internal.h"

enum { MAX_QUESTIONS_FILE = 1 << 30, MAX_LINE = 1 << 28, HASH_BYTES = 20 };

static const char suffix[] = ".partial";
static const char *const parts[] = {"configuration", "model", "questions"};
enum { CONFIGURATION, MODEL, QUESTIONS, PARTS };

/* ---- what an eval is of ---- */

/* Without what differs from run to run; with what the command line adds. */
static uint64_t hash_configuration(const struct config *config, const struct eval_options *options)
{
    struct config same = *config;
    memset(same.kv_cache.policy, 0, sizeof same.kv_cache.policy);
    same.kv_cache.budget = (struct kv_budget){1, 0};
    same.kv_cache.dtype = KV_DTYPE_AUTO;
    return hash_mix(config_hash(&same), (uint64_t)options->max_tokens);
}

static uint64_t hash_file(const char *name, const struct stat *info)
{
    uint64_t hash = hash_bytes(name, strlen(name));
    return hash_mix(hash_mix(hash, (uint64_t)info->st_size), (uint64_t)info->st_mtime);
}

/* Names, sizes and times of the model's files, in any order. */
static int hash_model(const char *path, uint64_t *hash)
{
    struct stat info;
    if (stat(path, &info)) FAIL(ERR_IO, "%s: %s", path, strerror(errno));
    *hash = hash_file("", &info);
    if (!S_ISDIR(info.st_mode)) return OK;
    DIR *folder = opendir(path);
    if (!folder) FAIL(ERR_IO, "%s: %s", path, strerror(errno));
    *hash = 0;
    for (const struct dirent *entry; (entry = readdir(folder));)
        if (!fstatat(dirfd(folder), entry->d_name, &info, 0) && S_ISREG(info.st_mode))
            *hash += hash_file(entry->d_name, &info);
    closedir(folder);
    return OK;
}

static int hash_all(const struct eval_options *options, const struct config *config, char text[PARTS][HASH_BYTES])
{
    char *questions;
    size_t size;
    uint64_t hash[PARTS];
    TRY(file_read_all(options->questions, MAX_QUESTIONS_FILE, &questions, &size));
    hash[QUESTIONS] = hash_bytes(questions, size);
    free(questions);
    hash[CONFIGURATION] = hash_configuration(config, options);
    TRY(hash_model(config->model, &hash[MODEL]));
    for (int i = 0; i < PARTS; i++) snprintf(text[i], HASH_BYTES, "%016" PRIx64, hash[i]);
    return OK;
}

/* ---- reading ---- */

struct reading {
    struct eval_journal *journal;
    const struct eval_questions *questions;
    struct eval_one_run *runs;
    int n_runs;
    char (*hash)[HASH_BYTES]; /* [PARTS] */
};

static int check_head(const struct reading *r, const cJSON *head)
{
    for (int i = 0; i < PARTS; i++) {
        const char *found = "";
        TRY(json_string(head, r->journal->path, parts[i], &found));
        if (strcmp(found, r->hash[i]) != 0)
            FAIL(ERR_CONFIG, "%s was made with another %s%s: remove it to begin anew, or name another output",
                 r->journal->path, parts[i], i == QUESTIONS ? " file" : "");
    }
    return OK;
}

static double number(const cJSON *record, const char *key)
{
    const cJSON *item = json_get(record, key);
    return cJSON_IsNumber(item) ? item->valuedouble : 0;
}

static const char *string(const cJSON *record, const char *key)
{
    const cJSON *item = json_get(record, key);
    return cJSON_IsString(item) ? item->valuestring : "";
}

static int take_tokens(const cJSON *tokens, int32_t **out, int *n)
{
    const cJSON *item;
    *n = 0;
    *out = calloc((size_t)cJSON_GetArraySize(tokens) + 1, sizeof **out);
    if (!*out) FAIL(ERR_NOMEM, "no memory for an answer");
    cJSON_ArrayForEach (item, tokens) (*out)[(*n)++] = item->valueint;
    return OK;
}

static int take_followup(const cJSON *record, struct eval_followup *f)
{
    if (!json_get(record, "followup")) return OK;
    f->text = strdup(string(record, "followup"));
    if (!f->text) FAIL(ERR_NOMEM, "no memory for an answer");
    f->text_size = strlen(f->text);
    return take_tokens(json_get(record, "followup_tokens"), &f->tokens, &f->n_tokens);
}

/* Leaves the answer alone where its text has a zero byte, which cJSON cuts at: it is asked again. */
static int take_answer(const cJSON *record, struct eval_answer *a)
{
    const char *text = string(record, "text");
    size_t size = (size_t)number(record, "text_size");
    if (a->done || strlen(text) != size ||
        strlen(string(record, "followup")) != (size_t)number(record, "followup_size"))
        return OK;
    a->text = strdup(text);
    if (!a->text) FAIL(ERR_NOMEM, "no memory for an answer of %zu bytes", size);
    a->text_size = size;
    TRY(take_tokens(json_get(record, "tokens"), &a->tokens, &a->n_tokens));
    TRY(take_followup(record, &a->followup));
    a->prompt_tokens = (int)number(record, "prompt_tokens");
    a->image_tokens = (int)number(record, "image_tokens");
    a->kept_tokens = number(record, "kept_tokens");
    a->bytes_full = (int64_t)number(record, "bytes_full");
    a->bytes_kept = (int64_t)number(record, "bytes_kept");
    a->bytes_read_per_step = number(record, "bytes_read_per_step");
    a->bytes_host = (int64_t)number(record, "bytes_host");
    a->recall_bytes_per_step = number(record, "recall_bytes_per_step");
    a->recall_hit_rate = number(record, "recall_hit_rate");
    a->first_token_seconds = number(record, "first_token_seconds");
    a->total_seconds = number(record, "total_seconds");
    a->done = true;
    return OK;
}

static int take_record(const struct reading *r, const cJSON *record)
{
    char budget[32];
    int i = (int)number(record, "question");
    if (!json_get(record, "question") || i < 0 || i >= r->questions->n ||
        strcmp(string(record, "id"), r->questions->question[i].id) != 0)
        FAIL(ERR_FORMAT, "%s: a line is of no question of this file: remove it to begin anew", r->journal->path);
    r->journal->n_records++;
    for (int k = 0; k < r->n_runs; k++) {
        struct eval_one_run *run = &r->runs[k];
        if (strcmp(string(record, "policy"), run->config.policy) != 0 ||
            strcmp(string(record, "budget"), kv_budget_print(run->config.budget, budget, sizeof budget)) != 0 ||
            strcmp(string(record, "dtype"), run->dtype) != 0)
            continue;
        struct eval_answer *a = &run->answer[i];
        if (!strcmp(string(record, "pass"), "free")) {
            TRY(take_answer(record, a));
            run->seconds = fmax(run->seconds, number(record, "run_seconds"));
        }
        if (!json_get(record, "log_likelihood")) continue;
        a->scored = true;
        a->log_likelihood = number(record, "log_likelihood");
        a->n_likelihood = (int)number(record, "n_likelihood");
    }
    return OK;
}

static int read_line(const struct reading *r, const struct batch_line *line)
{
    cJSON *tree = line->too_long ? NULL : cJSON_ParseWithLength(line->text, line->size);
    if (!tree)
        FAIL(ERR_FORMAT, "%s: line %" PRId64 " is no JSON: remove the file to begin anew", r->journal->path,
             line->number);
    int rc = line->number == 1 ? check_head(r, tree) : take_record(r, tree);
    cJSON_Delete(tree);
    return rc;
}

/* What stands behind the last newline was being written when the eval was killed. */
static int cut(struct batch_output *file, off_t keep)
{
    if (ftruncate(file->fd, keep)) FAIL(ERR_IO, "%s: cannot be cut: %s", file->path, strerror(errno));
    file->size = keep;
    return OK;
}

static int read_journal(const struct reading *r)
{
    struct batch_input in;
    struct batch_line line;
    enum batch_input_state state;
    off_t end_of_last = 0;
    int rc;
    TRY(batch__input_open(&in, r->journal->path, MAX_LINE));
    while (!(rc = batch__input_next(&in, 0, &line, &state)) && state == BATCH_LINE) {
        rc = line.complete ? read_line(r, &line) : cut(&r->journal->file, end_of_last);
        if (rc) break;
        end_of_last = (off_t)in.bytes;
    }
    batch__input_close(&in);
    return rc;
}

/* ---- opening and closing ---- */

static int append(struct eval_journal *j)
{
    int rc = output_check(&j->line);
    return rc ? rc : batch__output_append(&j->file, j->line.text, j->line.size);
}

static int put_head(struct eval_journal *j, char hash[PARTS][HASH_BYTES])
{
    output_clear(&j->line);
    for (int i = 0; i < PARTS; i++) output_printf(&j->line, "%s\"%s\":\"%s\"", i ? "," : "{", parts[i], hash[i]);
    output_printf(&j->line, "}\n");
    return append(j);
}

int eval__journal_open(struct eval_journal *j, const struct eval_options *options, const struct config *config,
                       const struct eval_questions *questions, struct eval_one_run *runs, int n_runs)
{
    char hash[PARTS][HASH_BYTES];
    memset(j, 0, sizeof *j);
    if (!options->output) return OK;
    TRY(hash_all(options, config, hash));
    size_t size = strlen(options->output) + sizeof suffix;
    j->path = malloc(size);
    if (!j->path) FAIL(ERR_NOMEM, "no memory for a file name");
    snprintf(j->path, size, "%s%s", options->output, suffix);
    struct batch_options file = {.input = options->questions,
                                 .output = j->path,
                                 .resume = options->resume,
                                 .lock_seconds = options->resume ? 0 : 0.1,
                                 .liveness = options->liveness};
    TRY(batch__output_open(&j->file, &file));
    struct reading reading = {j, questions, runs, n_runs, hash};
    if (j->file.size) TRY(read_journal(&reading));
    if (!j->file.size) TRY(put_head(j, hash));
    j->ours = true;
    return OK;
}

int eval__journal_close(struct eval_journal *j, bool finished)
{
    if (!j->path) return OK;
    /* Before the lock is given back: who opens it then makes a new one. */
    if (j->ours && (finished || !j->n_records)) unlink(j->path);
    int rc = batch__output_close(&j->file);
    output_free(&j->line);
    free(j->path);
    j->path = NULL;
    return rc;
}

/* ---- writing ---- */

static void put_answer(struct output_buffer *b, const struct eval_one_run *run, const struct eval_answer *a)
{
    output_printf(b, ",\"text_size\":%zu,\"text\":", a->text_size);
    output_string(b, a->text, a->text_size);
    output_printf(b, ",\"tokens\":[");
    for (int k = 0; k < a->n_tokens; k++) output_printf(b, "%s%d", k ? "," : "", a->tokens[k]);
    output_printf(b,
                  "],\"prompt_tokens\":%d,\"image_tokens\":%d,\"kept_tokens\":%.17g,\"bytes_full\":%" PRId64
                  ",\"bytes_kept\":%" PRId64 ",\"bytes_host\":%" PRId64
                  ",\"bytes_read_per_step\":%.17g,\"recall_bytes_per_step\":%.17g,"
                  "\"recall_hit_rate\":%.17g,\"first_token_seconds\":%.6f,"
                  "\"total_seconds\":%.6f,\"run_seconds\":%.6f",
                  a->prompt_tokens, a->image_tokens, a->kept_tokens, a->bytes_full, a->bytes_kept, a->bytes_host,
                  a->bytes_read_per_step, a->recall_bytes_per_step, a->recall_hit_rate, a->first_token_seconds,
                  a->total_seconds, run->seconds);
    if (!a->followup.text) return;
    output_printf(b, ",\"followup_size\":%zu,\"followup\":", a->followup.text_size);
    output_string(b, a->followup.text, a->followup.text_size);
    output_printf(b, ",\"followup_tokens\":[");
    for (int k = 0; k < a->followup.n_tokens; k++) output_printf(b, "%s%d", k ? "," : "", a->followup.tokens[k]);
    output_printf(b, "]");
}

int eval__journal_add(struct eval_journal *j, const struct eval_questions *questions, const struct eval_one_run *run,
                      int question, enum eval_pass pass)
{
    const struct eval_answer *a = &run->answer[question];
    const char *id = questions->question[question].id;
    char budget[32];
    if (!j->path) return OK;
    output_clear(&j->line);
    output_printf(&j->line,
                  "{\"policy\":\"%s\",\"budget\":\"%s\",\"dtype\":\"%s\",\"pass\":\"%s\",\"question\":%d,\"id\":",
                  run->config.policy, kv_budget_print(run->config.budget, budget, sizeof budget), run->dtype,
                  pass == EVAL_FREE ? "free" : "forced", question);
    output_string(&j->line, id, strlen(id));
    if (pass == EVAL_FREE) put_answer(&j->line, run, a);
    if (a->scored)
        output_printf(&j->line, ",\"log_likelihood\":%.17g,\"n_likelihood\":%d", a->log_likelihood, a->n_likelihood);
    output_printf(&j->line, "}\n");
    j->n_records++;
    return append(j);
}
