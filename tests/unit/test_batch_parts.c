/* The parts of a batch job by themselves: the set of ids, the lines of the input, the progress line. */
#include "runtime/batch_internal.h"

#include <unistd.h>

#include "tests/check.h"

static void test_ids(void)
{
    struct batch_ids ids = {0};
    unsigned before;
    char id[32];
    for (int i = 0; i < 50000; i++) {
        snprintf(id, sizeof id, "\"id-%d\"", i % 25000);
        CHECK_OK(batch__ids_mark(&ids, batch__key_of_id(id), BATCH_SEEN, &before));
        if ((before != 0) != (i >= 25000)) CHECK(false);
    }
    CHECK(ids.n == 25000 && ids.room < 25000 * 2 && sizeof *ids.slot == 16);
    CHECK(!batch__ids_get(&ids, batch__key_of_line(1)));
    CHECK_OK(batch__ids_mark(&ids, batch__key_of_line(1), BATCH_FINISHED, &before));
    CHECK(batch__ids_get(&ids, batch__key_of_line(1)) == BATCH_FINISHED);
    batch__ids_free(&ids);
}

static void test_progress_text(void)
{
    struct batch_result r = {.n_answered = 118, .n_failed = 2, .n_skipped = 80};
    char text[256];
    batch__progress_text(&r, 1000, 60, 6000, text, sizeof text);
    CHECK(!strcmp(text, "200 of about 1000 (20%) lines, 2 failed, 2.0 requests/s, 100 tokens/s, 6 min 40 s left"));
    batch__progress_text(&r, -1, 60, 6000, text, sizeof text);
    CHECK(!strcmp(text, "200 lines, 2 failed, 2.0 requests/s, 100 tokens/s"));
}

/* Lines of every length around the limit, read through a pipe in pieces, or from a file. */
static void check_lines(bool from_pipe, size_t max_line)
{
    enum { LINES = 200 };
    int pipes[2];
    char path[64], text[LINES * 300];
    size_t length[LINES], n = 0;
    CHECK(pipe(pipes) == 0);
    for (int i = 0; i < LINES; i++) {
        length[i] = 1 + (size_t)(i * 7919) % 280;
        memset(text + n, 'a' + i % 26, length[i]);
        n += length[i];
        text[n++] = '\n';
    }
    FILE *f = tmpfile();
    CHECK(f && fwrite(text, 1, n, f) == n && fflush(f) == 0);
    snprintf(path, sizeof path, "/dev/fd/%d", from_pipe ? pipes[0] : fileno(f));
    struct batch_input in;
    struct batch_line line;
    enum batch_input_state state;
    CHECK_OK(batch__input_open(&in, path, max_line));
    int next = 0;
    size_t sent = 0;
    for (;;) {
        CHECK_OK(batch__input_next(&in, 0, &line, &state));
        if (state == BATCH_END) break;
        if (state == BATCH_NOTHING_YET) {
            size_t piece = n - sent < 37 ? n - sent : 37;
            CHECK(write(pipes[1], text + sent, piece) == (ssize_t)piece);
            sent += piece;
            if (sent == n) close(pipes[1]);
            continue;
        }
        CHECK(next < LINES && line.number == next + 1 && line.complete);
        CHECK(line.too_long == (length[next] > max_line));
        CHECK(line.too_long || (line.size == length[next] && line.text[line.size - 1] == 'a' + next % 26));
        next++;
    }
    CHECK(next == LINES && in.bytes == n && (from_pipe || in.size == n));
    batch__input_close(&in);
    close(pipes[0]);
    if (!from_pipe) close(pipes[1]);
    fclose(f);
}

static void test_input(void)
{
    for (size_t max_line = 1; max_line < 300; max_line += 13) {
        check_lines(false, max_line);
        check_lines(true, max_line);
    }
}

int main(void)
{
    return check_run("batch parts", (struct check_case[]){{"ids", test_ids},
                                                          {"lines of the input", test_input},
                                                          {"progress line", test_progress_text},
                                                          {0}});
}
