/* log - one line per event on standard error, with the rank in front. The only mutable global beside the
 * status message: a level and a rank, set once by launch/. Results go to standard output, never here. */
#ifndef VITRAIL_BASE_LOG_H
#define VITRAIL_BASE_LOG_H

#include <stdbool.h>

#include "base/status.h"

enum log_level { LOG_ERROR, LOG_WARNING, LOG_INFO, LOG_DEBUG };

/* log_set - level from which on lines are dropped, and this process's rank (-1: no "[rank r]" prefix). */
void log_set(enum log_level level, int rank);

/* log_enabled - true if a line of this level would be written. */
bool log_enabled(enum log_level level);

/* log_line - writes "[rank r] text\n" in one write(2); text is cut at 4 KiB. */
void log_line(enum log_level level, const char *format, ...) PRINTF_LIKE(2, 3);

#endif
