#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "runtime/batch_internal.h"

enum { LINE_BYTES = 256 };

void batch__progress_open(struct batch_progress *p, bool on)
{
    *p = (struct batch_progress){.on = on, .tty = isatty(STDERR_FILENO) == 1, .start = clock_seconds()};
    p->last = p->start;
}

static const char *duration(double seconds, char *buf, size_t size)
{
    int64_t s = (int64_t)(seconds + 0.5);
    if (s < 60)
        snprintf(buf, size, "%d s", (int)s);
    else if (s < 3600)
        snprintf(buf, size, "%d min %02d s", (int)(s / 60), (int)(s % 60));
    else
        snprintf(buf, size, "%" PRId64 " h %02d min", s / 3600, (int)(s % 3600 / 60));
    return buf;
}

const char *batch__progress_text(const struct batch_result *r, int64_t lines_total, double seconds,
                                 int64_t generated_tokens, char *buf, size_t size)
{
    int64_t done = r->n_answered + r->n_failed, finished = done + r->n_skipped;
    double rate = seconds > 0 ? (double)done / seconds : 0;
    char total[64] = "", left[64] = "", time[48];
    if (lines_total >= finished && lines_total > 0)
        snprintf(total, sizeof total, " of about %" PRId64 " (%d%%)", lines_total,
                 (int)(100.0 * (double)finished / (double)lines_total));
    if (*total && rate > 0)
        snprintf(left, sizeof left, ", %s left", duration((double)(lines_total - finished) / rate, time, sizeof time));
    snprintf(buf, size, "%" PRId64 "%s lines, %" PRId64 " failed, %.1f requests/s, %.0f tokens/s%s", finished, total,
             r->n_failed, rate, seconds > 0 ? (double)generated_tokens / seconds : 0.0, left);
    return buf;
}

void batch__progress_show(struct batch_progress *p, const struct batch_result *r, const struct batch_input *in,
                          int64_t generated_tokens)
{
    double now = clock_seconds();
    char text[LINE_BYTES], line[LINE_BYTES + 16];
    if (!p->on || now - p->last < (p->tty ? 0.25 : 5)) return;
    p->last = now;
    int64_t total = -1;
    if (in->size && in->bytes) total = (int64_t)((double)r->n_lines * (double)in->size / (double)in->bytes + 0.5);
    batch__progress_text(r, total, now - p->start, generated_tokens, text, sizeof text);
    if (!p->tty) {
        log_line(LOG_INFO, "batch: %s", text);
        return;
    }
    int n = snprintf(line, sizeof line, "\r\x1b[K%s", text);
    (void)!write(STDERR_FILENO, line, (size_t)n);
    p->shown = true;
}

void batch__progress_close(struct batch_progress *p)
{
    if (p->shown) (void)!write(STDERR_FILENO, "\r\x1b[K", 4);
    p->shown = false;
}
