/* batch_internal - the parts of a batch job: the set of ids, the input's lines, the output file, the threads that
 * prepare requests, the progress line. Each is one file, batch_<part>.c. */
#ifndef VITRAIL_RUNTIME_BATCH_INTERNAL_H
#define VITRAIL_RUNTIME_BATCH_INTERNAL_H

#include <cjson/cJSON.h>
#include <pthread.h>
#include <stddef.h>
#include <sys/types.h>

#include "runtime/batch.h"
#include "runtime/output.h"

/* ---- ids: which lines are finished, and which ids the input has shown already ---- */

struct batch_key {
    uint64_t high, low; /* a hash of 126 bits; the two lowest bits of `low` are flags, 0 in a key */
};
enum { BATCH_FINISHED = 1, BATCH_SEEN = 2, BATCH_FLAGS = 3 };

/* An open-addressing set of 16-byte entries; zero-initialised. */
struct batch_ids {
    struct batch_key *slot;
    size_t room, n;
};

/* batch__key_of_id - from a custom_id as it stands in JSON, quotes included. batch__key_of_line - from a line number.
 */
struct batch_key batch__key_of_id(const char *quoted_id);
struct batch_key batch__key_of_line(int64_t line);
/* batch__ids_mark - adds a flag to a key; *before has the flags it had. ERR_NOMEM. */
int batch__ids_mark(struct batch_ids *ids, struct batch_key key, unsigned flag, unsigned *before) MUST_CHECK;
unsigned batch__ids_get(const struct batch_ids *ids, struct batch_key key);
void batch__ids_free(struct batch_ids *ids);

/* ---- input ---- */

struct batch_input {
    const char *path;
    int fd;
    bool regular, ended, skipping;
    char *buffer;
    size_t room, from, to; /* bytes [from, to) of buffer are read and not used yet */
    size_t searched;       /* bytes after `from` that hold no newline */
    size_t max_line;
    int64_t line;         /* number of the last line returned, from 1 */
    uint64_t bytes, size; /* used so far; of the file, 0 if unknown */
};

/* One line; text is valid until the next call. */
struct batch_line {
    const char *text;
    size_t size;
    int64_t number;
    bool too_long; /* longer than max_line: text is not given */
    bool complete; /* a newline ended it, not the end of the file */
};
enum batch_input_state { BATCH_LINE, BATCH_NOTHING_YET, BATCH_END };

int batch__input_open(struct batch_input *in, const char *path, size_t max_line) MUST_CHECK;
/* batch__input_next - the next line that is not blank. A pipe without data gives BATCH_NOTHING_YET after wait_seconds.
 */
int batch__input_next(struct batch_input *in, double wait_seconds, struct batch_line *line,
                      enum batch_input_state *state) MUST_CHECK;
void batch__input_close(struct batch_input *in);

/* ---- output ---- */

struct batch_output {
    const char *path;
    int fd;
    off_t size;
    pthread_t syncer;
    bool has_syncer;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    bool dirty, stop; /* under mutex */
    int sync_errno;   /* under mutex; of the first fsync that failed */
};

/* batch__output_open - opens and locks the file, for its life; refuses one that has lines unless resume. */
int batch__output_open(struct batch_output *out, const struct batch_options *options) MUST_CHECK;
/* batch__output_resume - marks what the file has as finished and cuts an unfinished record off its end. */
int batch__output_resume(struct batch_output *out, struct batch_ids *ids, struct batch_result *result) MUST_CHECK;
/* batch__output_append - one record, its newline included, by one write. Starts the thread that syncs every second. */
int batch__output_append(struct batch_output *out, const char *text, size_t size) MUST_CHECK;
/* batch__output_close - syncs and unlocks; errors of earlier syncs come out here. Fine on a failed open. */
int batch__output_close(struct batch_output *out) MUST_CHECK;

/* ---- one line's life ---- */

struct batch;
struct batch_item {
    struct batch *batch;
    struct batch_item *next;
    int64_t line;
    char *custom_id; /* NULL: not known */
    char *quoted_id; /* the same as JSON */
    struct batch_key key;
    cJSON *tree; /* the line; freed once the request is ready */
    const cJSON *body;
    int top_logprobs;
    int rc; /* of parsing or preparing */
    char *message;
    const char *code; /* of the error record; static */
    struct request request;
};

/* batch__item_parse - a line into a new item. What is wrong with the line is in its rc, message and code; the return
 * value is ERR_NOMEM or OK. */
int batch__item_parse(const struct batch_line *line, struct batch_item **out) MUST_CHECK;
/* batch__item_prepare - its request, or rc and message. Any thread. */
void batch__item_prepare(const struct prompt_builder *builder, struct batch_item *item);
/* batch__item_fail - notes an error, with the current status message. */
void batch__item_fail(struct batch_item *item, int rc, const char *code);
void batch__item_free(struct batch_item *item);

/* Records, newline included. by_line: the record is found again by its line number, not by its custom_id. */
void batch__put_answer(struct output_buffer *buffer, const struct batch_item *item,
                       const struct prompt_builder *builder, const struct completion *completion);
void batch__put_error(struct output_buffer *buffer, const struct batch_item *item, bool by_line);

/* ---- preparing in threads ---- */

struct batch_pool;
/* batch__pool_open - n_threads 0: items are prepared when given. */
int batch__pool_open(const struct prompt_builder *builder, int n_threads, struct batch_pool **out) MUST_CHECK;
void batch__pool_give(struct batch_pool *pool, struct batch_item *item);
/* batch__pool_take - a prepared item, or NULL if none gets ready within wait_seconds or none is under way. */
struct batch_item *batch__pool_take(struct batch_pool *pool, double wait_seconds);
/* batch__pool_close - ends the threads and frees what was not taken. NULL is fine. */
void batch__pool_close(struct batch_pool *pool);

/* ---- progress ---- */

struct batch_progress {
    bool on, tty, shown;
    double start, last;
};
void batch__progress_open(struct batch_progress *p, bool on);
/* batch__progress_show - a line if it is time for one. lines_total < 0: unknown. */
void batch__progress_show(struct batch_progress *p, const struct batch_result *r, const struct batch_input *in,
                          int64_t generated_tokens);
void batch__progress_close(struct batch_progress *p);
/* batch__progress_text - the line itself, into buf. */
const char *batch__progress_text(const struct batch_result *r, int64_t lines_total, double seconds,
                                 int64_t generated_tokens, char *buf, size_t size);

#endif
