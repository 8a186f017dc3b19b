/* The output file. Everything that makes a job restartable is here: an exclusive lock for the life of the process, one
 * write a record, an fsync at least every second by a thread of its own (so that a slow disk delays no step), and
 * reading back what is finished. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libgen.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/json.h"
#include "runtime/batch_internal.h"

/* Every record begins so; a file that does not is not cut. */
static const char record_start[] = "{\"id\":\"batch_req_";
enum { MAX_RECORD = 1 << 30 };

static int lock(const struct batch_output *out, const struct batch_options *options)
{
    double wait = options->lock_seconds > 0 ? options->lock_seconds : 10, start = clock_seconds();
    while (flock(out->fd, LOCK_EX | LOCK_NB)) {
        if (errno != EWOULDBLOCK && errno != EINTR)
            FAIL(ERR_IO, "%s: cannot be locked: %s", out->path, strerror(errno));
        if (options->liveness && liveness_stop_requested(options->liveness))
            FAIL(ERR_CONFIG, "%s: stopped while another batch job is writing it", out->path);
        if (clock_seconds() - start >= wait)
            FAIL(ERR_CONFIG,
                 "%s: another batch job is writing it (waited %.0f s); stop that job, or name another output",
                 out->path, wait);
        usleep(50000);
    }
    return OK;
}

/* So that the file's name survives a power cut as well; file systems that cannot are left alone. */
static void sync_folder(const char *path)
{
    char *copy = strdup(path);
    int fd = copy ? open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    free(copy);
    if (fd < 0) return;
    (void)!fsync(fd);
    close(fd);
}

static int check_file(const struct batch_output *out, const struct batch_options *options, off_t *size)
{
    struct stat info, input;
    if (fstat(out->fd, &info)) FAIL(ERR_IO, "%s: %s", out->path, strerror(errno));
    if (!S_ISREG(info.st_mode)) FAIL(ERR_CONFIG, "%s: the output must be a regular file", out->path);
    if (!stat(options->input, &input) && input.st_dev == info.st_dev && input.st_ino == info.st_ino)
        FAIL(ERR_CONFIG, "%s is the input and the output: name another output", out->path);
    *size = info.st_size;
    return OK;
}

static int open_checked(struct batch_output *out, const struct batch_options *options)
{
    TRY(check_file(out, options, &out->size));
    TRY(lock(out, options));
    TRY(check_file(out, options, &out->size)); /* the job that held the lock may have written */
    if (out->size && !options->resume)
        FAIL(ERR_CONFIG, "%s exists and has %" PRId64 " bytes: --resume goes on with it, else name another output",
             out->path, (int64_t)out->size);
    sync_folder(out->path);
    return OK;
}

int batch__output_open(struct batch_output *out, const struct batch_options *options)
{
    memset(out, 0, sizeof *out);
    out->path = options->output;
    pthread_mutex_init(&out->mutex, NULL);
    pthread_cond_init(&out->wake, NULL);
    out->fd = open(out->path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0666);
    if (out->fd < 0) FAIL(ERR_IO, "%s: cannot open for writing: %s", out->path, strerror(errno));
    return open_checked(out, options);
}

/* ---- resuming ---- */

static int mark_record(const struct batch_output *out, const struct batch_line *line, struct batch_ids *ids,
                       struct batch_result *result)
{
    /* Not json_parse: it refuses the zero bytes that a model may have put into its text. */
    cJSON *record = line->too_long ? NULL : cJSON_ParseWithLength(line->text, line->size);
    char *quoted = NULL;
    unsigned before;
    if (!record)
        FAIL(ERR_FORMAT, "%s: line %" PRId64 " is no record of a batch job: this output cannot be resumed", out->path,
             line->number);
    const cJSON *id = json_get(record, "custom_id"), *number = json_get(record, "line");
    bool failed = json_get(record, "error") != NULL;
    int rc = OK;
    if (cJSON_IsNumber(number)) {
        rc = batch__ids_mark(ids, batch__key_of_line((int64_t)number->valuedouble), BATCH_FINISHED, &before);
    } else if (cJSON_IsString(id) && (quoted = json_quote(id->valuestring, strlen(id->valuestring)))) {
        rc = batch__ids_mark(ids, batch__key_of_id(quoted), BATCH_FINISHED, &before);
    } else {
        rc = status_set(ERR_FORMAT, __FILE__, __LINE__,
                        "%s: line %" PRId64 " has neither custom_id nor line: this output cannot be resumed", out->path,
                        line->number);
    }
    free(quoted);
    cJSON_Delete(record);
    result->n_failed_before += failed;
    return rc;
}

/* What stands behind the last newline was being written when the job was killed, if it begins like a record (or with
 * the zeros that some file systems leave after a power cut). */
static int cut(struct batch_output *out, const struct batch_line *line, off_t keep)
{
    size_t n = line->size < sizeof record_start - 1 ? line->size : sizeof record_start - 1;
    if (!line->too_long && line->text[0] && memcmp(line->text, record_start, n))
        FAIL(ERR_FORMAT, "%s: ends in something that is no record of a batch job: this output cannot be resumed",
             out->path);
    if (ftruncate(out->fd, keep) || fsync(out->fd))
        FAIL(ERR_IO, "%s: cannot cut an unfinished record off its end: %s", out->path, strerror(errno));
    out->size = keep;
    return OK;
}

int batch__output_resume(struct batch_output *out, struct batch_ids *ids, struct batch_result *result)
{
    struct batch_input in;
    struct batch_line line;
    enum batch_input_state state;
    TRY(batch__input_open(&in, out->path, MAX_RECORD));
    int rc;
    off_t end_of_last = 0;
    while (!(rc = batch__input_next(&in, 0, &line, &state)) && state == BATCH_LINE) {
        rc = line.complete ? mark_record(out, &line, ids, result) : cut(out, &line, end_of_last);
        if (rc) break;
        end_of_last = (off_t)in.bytes;
    }
    batch__input_close(&in);
    return rc;
}

/* ---- writing ---- */

static void *sync_every_second(void *argument)
{
    struct batch_output *out = argument;
    struct timespec until;
    pthread_mutex_lock(&out->mutex);
    while (!out->stop) {
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += 900000000;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&out->wake, &out->mutex, &until);
        if (!out->dirty) continue;
        out->dirty = false;
        pthread_mutex_unlock(&out->mutex);
        int failed = fsync(out->fd) ? errno : 0;
        pthread_mutex_lock(&out->mutex);
        if (failed && !out->sync_errno) out->sync_errno = failed;
    }
    pthread_mutex_unlock(&out->mutex);
    return NULL;
}

static int check_sync(struct batch_output *out, bool now_dirty)
{
    pthread_mutex_lock(&out->mutex);
    if (now_dirty) out->dirty = true;
    int failed = out->sync_errno;
    pthread_mutex_unlock(&out->mutex);
    if (failed)
        FAIL(ERR_IO, "%s: cannot be written to disk: %s; the job can be resumed with --resume", out->path,
             strerror(failed));
    return OK;
}

int batch__output_append(struct batch_output *out, const char *text, size_t size)
{
    if (!out->has_syncer) {
        if (pthread_create(&out->syncer, NULL, sync_every_second, out))
            FAIL(ERR_NOMEM, "%s: cannot start the thread that syncs it", out->path);
        out->has_syncer = true;
    }
    ssize_t n;
    do n = write(out->fd, text, size);
    while (n < 0 && errno == EINTR);
    if (n != (ssize_t)size) {
        int error = n < 0 ? errno : ENOSPC;
        /* A part of a record helps nobody; --resume would cut it as well. */
        if (n > 0) (void)!ftruncate(out->fd, out->size);
        FAIL(ERR_IO, "%s: a record of %zu bytes cannot be written: %s; make room and go on with --resume", out->path,
             size, strerror(error));
    }
    out->size += n;
    return check_sync(out, true);
}

int batch__output_close(struct batch_output *out)
{
    int rc = OK;
    if (out->has_syncer) {
        pthread_mutex_lock(&out->mutex);
        out->stop = true;
        pthread_cond_signal(&out->wake);
        pthread_mutex_unlock(&out->mutex);
        pthread_join(out->syncer, NULL);
        out->has_syncer = false;
    }
    if (out->fd >= 0) {
        rc = check_sync(out, false);
        if (!rc && fsync(out->fd))
            rc =
                status_set(ERR_IO, __FILE__, __LINE__, "%s: cannot be written to disk: %s", out->path, strerror(errno));
        close(out->fd);
    }
    out->fd = -1;
    pthread_mutex_destroy(&out->mutex);
    pthread_cond_destroy(&out->wake);
    return rc;
}
