#include <inttypes.h>
#include <libgen.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"
#include "runtime/eval_internal.h"

enum { MAX_FILE = 1 << 30, MAX_TOKENS = 1 << 24 };

static char *copy_string(const cJSON *object, const char *key)
{
    const cJSON *item = json_get(object, key);
    return cJSON_IsString(item) ? strdup(item->valuestring) : NULL;
}

static int read_images(const cJSON *object, const char *folder, const char *what, struct eval_question *q)
{
    const cJSON *images = json_get(object, "images"), *item;
    if (!images) return OK;
    if (!cJSON_IsArray(images)) FAIL(ERR_FORMAT, "%s: images must be a list of file names", what);
    q->images = calloc((size_t)cJSON_GetArraySize(images) + 1, sizeof *q->images);
    if (!q->images) FAIL(ERR_NOMEM, "%s: no memory", what);
    cJSON_ArrayForEach (item, images) {
        if (!cJSON_IsString(item)) FAIL(ERR_FORMAT, "%s: images must be a list of file names", what);
        const char *name = item->valuestring;
        size_t size = strlen(folder) + strlen(name) + 2;
        char *path = malloc(size);
        if (!path) FAIL(ERR_NOMEM, "%s: no memory", what);
        q->images[q->n_images++] = path;
        TRY(path_join(path, size, *name == '/' ? "" : folder, name));
    }
    return OK;
}

static int read_tokens(const cJSON *object, const char *what, struct eval_question *q)
{
    const cJSON *tokens = json_get(object, "model_tokens"), *item;
    if (!tokens) return OK;
    if (!cJSON_IsArray(tokens)) FAIL(ERR_FORMAT, "%s: model_tokens must be a list of token ids", what);
    q->model_tokens = calloc((size_t)cJSON_GetArraySize(tokens) + 1, sizeof *q->model_tokens);
    if (!q->model_tokens) FAIL(ERR_NOMEM, "%s: no memory", what);
    cJSON_ArrayForEach (item, tokens) {
        if (!cJSON_IsNumber(item) || item->valuedouble != (double)item->valueint || item->valueint < 0)
            FAIL(ERR_FORMAT, "%s: model_tokens must be a list of token ids", what);
        q->model_tokens[q->n_model_tokens++] = item->valueint;
    }
    return OK;
}

static int read_followup(const cJSON *object, const char *what, struct eval_question *q)
{
    const cJSON *followup = json_get(object, "followup");
    if (!followup) return OK;
    q->followup_prompt = copy_string(followup, "prompt");
    q->followup_answer = copy_string(followup, "answer");
    if (!q->followup_prompt || !*q->followup_prompt || !q->followup_answer)
        FAIL(ERR_FORMAT, "%s: followup must be an object with a prompt and an answer", what);
    return OK;
}

/* A continuation says by itself what is to come: nothing else may. */
static int read_continuation(const cJSON *object, const char *what, struct eval_question *q)
{
    static const char *const others[] = {"answer", "followup", "model_tokens"};
    if (!json_get(object, "continuation")) return OK;
    q->continuation = copy_string(object, "continuation");
    if (!q->continuation || !*q->continuation) FAIL(ERR_FORMAT, "%s: continuation must be a text, not empty", what);
    for (int i = 0; i < 3; i++)
        if (json_get(object, others[i]))
            FAIL(ERR_FORMAT, "%s: has a continuation and %s: leave one of them out", what, others[i]);
    return OK;
}

static int read_question(const cJSON *object, const char *folder, const char *what, struct eval_question *q)
{
    if (!cJSON_IsObject(object)) FAIL(ERR_FORMAT, "%s: must be an object with id, prompt and answer", what);
    q->min_margin = -1;
    q->id = copy_string(object, "id");
    q->prompt = copy_string(object, "prompt");
    q->answer = copy_string(object, "answer");
    TRY(read_continuation(object, what, q));
    if (!q->id || !q->prompt || (!q->answer && !q->continuation))
        FAIL(ERR_FORMAT, "%s: id, prompt and answer must be strings; %s is not", what,
             !q->id ? "id" : (!q->prompt ? "prompt" : "answer"));
    const char *task = NULL;
    TRY(json_string(object, what, "task", &task));
    if (task && !(q->task = strdup(task))) FAIL(ERR_NOMEM, "%s: no memory", what);
    TRY(json_bool(object, what, "long", &q->is_long));
    TRY(json_double(object, what, "min_margin", 0, 1e9, &q->min_margin));
    TRY(read_followup(object, what, q));
    TRY(read_images(object, folder, what, q));
    return read_tokens(object, what, q);
}

static int read_line(const char *text, size_t size, const char *folder, const char *what, struct eval_questions *out)
{
    cJSON *tree;
    TRY(json_parse(text, size, what, &tree));
    if (!(out->n & (out->n - 1))) { /* room doubles */
        size_t room = out->n ? 2 * (size_t)out->n : 1;
        struct eval_question *more = realloc(out->question, room * sizeof *more);
        if (!more) {
            cJSON_Delete(tree);
            FAIL(ERR_NOMEM, "%s: no memory", what);
        }
        out->question = more;
    }
    struct eval_question *q = &out->question[out->n++];
    memset(q, 0, sizeof *q);
    int rc = read_question(tree, folder, what, q);
    cJSON_Delete(tree);
    return rc;
}

static int read_lines(const char *text, size_t size, const char *path, const char *folder, struct eval_questions *out)
{
    char what[512];
    int line = 0;
    for (const char *at = text, *end = text + size; at < end;) {
        const char *newline = memchr(at, '\n', (size_t)(end - at)), *stop = newline ? newline : end;
        line++;
        snprintf(what, sizeof what, "%.400s line %d", path, line);
        if (strspn(at, " \t\r") < (size_t)(stop - at)) TRY(read_line(at, (size_t)(stop - at), folder, what, out));
        at = stop + 1;
    }
    if (!out->n) FAIL(ERR_FORMAT, "%s: no questions", path);
    return OK;
}

int eval__read(const char *path, struct eval_questions *out)
{
    char *text, *copy;
    size_t size;
    memset(out, 0, sizeof *out);
    TRY(file_read_all(path, MAX_FILE, &text, &size));
    copy = strdup(path);
    int rc = copy ? read_lines(text, size, path, dirname(copy), out) : ERR_NOMEM;
    free(copy);
    free(text);
    return rc;
}

void eval__free(struct eval_questions *questions)
{
    for (int i = 0; i < questions->n; i++) {
        struct eval_question *q = &questions->question[i];
        for (int k = 0; k < q->n_images; k++) free(q->images[k]);
        free(q->images);
        free(q->id);
        free(q->prompt);
        free(q->answer);
        free(q->continuation);
        free(q->task);
        free(q->followup_prompt);
        free(q->followup_answer);
        free(q->model_tokens);
    }
    free(questions->question);
    memset(questions, 0, sizeof *questions);
}
