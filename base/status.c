#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { MESSAGE_BYTES = 4096 };

static _Thread_local char message[MESSAGE_BYTES];
static _Thread_local char origin[128];

int status_set(int code, const char *file, int line, const char *format, ...)
{
    /* The arguments may point into the old message (wrapping it), so build aside first. */
    char text[MESSAGE_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    memcpy(message, text, sizeof message);
    snprintf(origin, sizeof origin, "%s:%d", file, line);
    return code;
}

int status_prefix(int code, const char *format, ...)
{
    char text[MESSAGE_BYTES];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (n < 0 || (size_t)n >= sizeof text) return code;
    size_t room = sizeof text - (size_t)n;
    snprintf(text + n, room, ": %.*s", (int)room, message);
    memcpy(message, text, sizeof message);
    return code;
}

const char *status_message(void) { return message; }

const char *status_origin(void) { return origin; }

const char *status_name(int code)
{
    static const char *const names[] = {"OK",          "ERR_ARG",  "ERR_CONFIG",      "ERR_FORMAT", "ERR_IO",
                                        "ERR_NOMEM",   "ERR_FULL", "ERR_UNSUPPORTED", "ERR_DEVICE", "ERR_COMM",
                                        "ERR_TIMEOUT", "ERR_PEER", "ERR_BUG",         "ERR_REQUEST"};
    int i = -code;
    return i >= 0 && i < (int)(sizeof names / sizeof *names) ? names[i] : "?";
}

int status_exit_code(int code)
{
    switch (code) {
    case OK: return 0;
    case ERR_REQUEST: return 1;
    case ERR_CONFIG:
    case ERR_ARG: return 2;
    case ERR_FORMAT:
    case ERR_IO:
    case ERR_UNSUPPORTED: return 3;
    case ERR_NOMEM:
    case ERR_FULL:
    case ERR_DEVICE: return 4;
    case ERR_COMM:
    case ERR_TIMEOUT:
    case ERR_PEER: return 5;
    default: return 6;
    }
}
