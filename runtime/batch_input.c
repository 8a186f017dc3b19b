#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "runtime/batch_internal.h"

enum { CHUNK = 256 << 10, KEEP = 1 << 20 };

int batch__input_open(struct batch_input *in, const char *path, size_t max_line)
{
    struct stat info;
    memset(in, 0, sizeof *in);
    in->path = path;
    in->max_line = max_line;
    in->fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    if (in->fd < 0) FAIL(ERR_IO, "%s: cannot open: %s", path, strerror(errno));
    if (fstat(in->fd, &info) || S_ISDIR(info.st_mode)) {
        batch__input_close(in);
        FAIL(ERR_IO, "%s: not a file of lines", path);
    }
    in->regular = S_ISREG(info.st_mode);
    if (in->regular) in->size = (uint64_t)info.st_size;
    return OK;
}

void batch__input_close(struct batch_input *in)
{
    if (in->fd >= 0) close(in->fd);
    free(in->buffer);
    in->buffer = NULL;
    in->fd = -1;
}

/* Moves what is left to the front and makes room for a chunk; gives a very long line's memory back. */
static int make_room(struct batch_input *in)
{
    size_t left = in->to - in->from, want = left + CHUNK;
    if (in->buffer && in->from) memmove(in->buffer, in->buffer + in->from, left);
    in->from = 0;
    in->to = left;
    size_t room = in->room;
    if (want > room)
        room = want < 2 * room ? 2 * room : want;
    else if (room > KEEP && want < KEEP)
        room = KEEP;
    if (room == in->room) return OK;
    char *buffer = realloc(in->buffer, room);
    if (!buffer) FAIL(ERR_NOMEM, "%s: no memory for line %" PRId64 " (over %zu bytes)", in->path, in->line + 1, left);
    in->buffer = buffer;
    in->room = room;
    return OK;
}

/* More bytes from the file; *got = 0 at its end. A pipe without data within the time: *state = BATCH_NOTHING_YET. */
static int fill(struct batch_input *in, double wait_seconds, size_t *got, enum batch_input_state *state)
{
    TRY(make_room(in));
    if (!in->regular) {
        struct pollfd p = {.fd = in->fd, .events = POLLIN};
        int ready = poll(&p, 1, (int)(wait_seconds * 1000));
        if (ready == 0 || (ready < 0 && errno == EINTR)) {
            *state = BATCH_NOTHING_YET;
            return OK;
        }
    }
    ssize_t n;
    do n = read(in->fd, in->buffer + in->to, in->room - in->to);
    while (n < 0 && errno == EINTR);
    if (n < 0) FAIL(ERR_IO, "%s: read failed at byte %" PRIu64 ": %s", in->path, in->bytes, strerror(errno));
    in->to += (size_t)n;
    *got = (size_t)n;
    return OK;
}

static bool is_blank(const char *text, size_t size)
{
    for (size_t i = 0; i < size; i++)
        if (!strchr(" \t\r\n", text[i]) || !text[i]) return false;
    return true;
}

static void use(struct batch_input *in, size_t n)
{
    in->from += n;
    in->bytes += n;
    in->searched = 0;
}

/* Takes the next line out of the buffer if all of it is there, or, at the end of the file, what is left. */
static bool take_line(struct batch_input *in, struct batch_line *line)
{
    char *start = in->buffer + in->from;
    size_t left = in->to - in->from;
    char *newline = left > in->searched ? memchr(start + in->searched, '\n', left - in->searched) : NULL;
    if (!newline && !(in->ended && (left || in->skipping))) {
        in->searched = left;
        if (left <= in->max_line && !in->skipping) return false;
        in->skipping = true; /* the rest of this line is read and dropped */
        use(in, left);
        return false;
    }
    size_t size = newline ? (size_t)(newline - start) : left;
    in->line++;
    *line = (struct batch_line){start, size, in->line, in->skipping || size > in->max_line, newline != NULL};
    if (in->line == 1 && size >= 3 && !memcmp(start, "\xef\xbb\xbf", 3)) { /* a byte order mark */
        line->text += 3;
        line->size -= 3;
    }
    if (line->too_long) line->size = 0;
    in->skipping = false;
    use(in, size + (newline != NULL));
    return true;
}

int batch__input_next(struct batch_input *in, double wait_seconds, struct batch_line *line,
                      enum batch_input_state *state)
{
    for (;;) {
        if (in->buffer && take_line(in, line)) {
            if (!line->too_long && is_blank(line->text, line->size)) continue;
            *state = BATCH_LINE;
            return OK;
        }
        if (in->ended) {
            *state = BATCH_END;
            return OK;
        }
        size_t got = 1;
        *state = BATCH_LINE;
        TRY(fill(in, wait_seconds, &got, state));
        if (*state == BATCH_NOTHING_YET) return OK;
        in->ended = got == 0;
    }
}
