#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

static struct {
    enum log_level level;
    int rank;
} state = {LOG_INFO, -1};

void log_set(enum log_level level, int rank)
{
    state.level = level;
    state.rank = rank;
}

bool log_enabled(enum log_level level) { return level <= state.level; }

void log_line(enum log_level level, const char *format, ...)
{
    static const char *const names[] = {"error: ", "warning: ", "", ""};
    if (level > state.level) return;
    char line[4096];
    int n = state.rank >= 0 ? snprintf(line, sizeof line, "[rank %d] %s", state.rank, names[level])
                            : snprintf(line, sizeof line, "%s", names[level]);
    va_list args;
    va_start(args, format);
    int m = vsnprintf(line + n, sizeof line - (size_t)n - 1, format, args);
    va_end(args);
    n += m < 0 ? 0 : m;
    if ((size_t)n > sizeof line - 2) n = (int)sizeof line - 2;
    line[n++] = '\n';
    /* A full pipe or closed stderr must not stop the engine. */
    ssize_t ignored = write(STDERR_FILENO, line, (size_t)n);
    (void)ignored;
}
