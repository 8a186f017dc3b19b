/* status - the error convention of the whole tree.
 *
 * Every fallible function returns an int: 0 is success, anything else one of enum status. The text is
 * written once, where the failure happened, and names the object, what was expected, what was found and
 * what to do; callers only pass the code on (TRY) and the command that a person started prints it.
 * The message is thread-local, like errno, and is the one global that the house allows beside the log. */
#ifndef VITRAIL_BASE_STATUS_H
#define VITRAIL_BASE_STATUS_H

enum status {
    OK = 0,
    ERR_ARG = -1,         /* a caller broke a function's contract */
    ERR_CONFIG = -2,      /* configuration or command line */
    ERR_FORMAT = -3,      /* a file or message is malformed */
    ERR_IO = -4,          /* the system refused a read, write or open */
    ERR_NOMEM = -5,       /* memory: the plan does not fit */
    ERR_FULL = -6,        /* a bounded queue or pool is full */
    ERR_UNSUPPORTED = -7, /* well-formed, but not something this build serves */
    ERR_DEVICE = -8,      /* GPU runtime */
    ERR_COMM = -9,        /* communicator */
    ERR_TIMEOUT = -10,    /* a deadline passed */
    ERR_PEER = -11,       /* another rank failed */
    ERR_BUG = -12,        /* an invariant of this program broke */
    ERR_REQUEST = -13     /* one request is bad; the engine goes on */
};

#if defined(__GNUC__)
#define MUST_CHECK __attribute__((warn_unused_result))
#define PRINTF_LIKE(f, a) __attribute__((format(printf, f, a)))
#else
#define MUST_CHECK
#define PRINTF_LIKE(f, a)
#endif

/* status_set - records the message of a failure and returns `code`; use FAIL. */
int status_set(int code, const char *file, int line, const char *format, ...) PRINTF_LIKE(4, 5);

/* status_prefix - puts "text: " before the current message; for adding a file name on the way up. */
int status_prefix(int code, const char *format, ...) PRINTF_LIKE(2, 3);

/* status_message - text of this thread's last failure; valid until the next one. */
const char *status_message(void);

/* status_origin - "file.c:line" of the last failure, for logs at debug level. */
const char *status_origin(void);

/* status_name - "ERR_FORMAT" for a code; "?" for an unknown one. */
const char *status_name(int code);

/* status_exit_code - the process exit code of a status: 0 ok, 1 a job finished but some requests failed,
 * 2 usage or configuration, 3 model or other input, 4 device or memory, 5 communicator or peer, 6 bug. */
int status_exit_code(int code);

/* Records the message and returns the code from the calling function. */
#define FAIL(code, ...)                                                                                                \
    do {                                                                                                               \
        status_set((code), __FILE__, __LINE__, __VA_ARGS__);                                                           \
        return (code);                                                                                                 \
    } while (0)
#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        int try_rc = (call);                                                                                           \
        if (try_rc) return try_rc;                                                                                     \
    } while (0)
/* Cleanup form: leaves the code in rc and jumps. */
#define TRY_GOTO(call, rc, label)                                                                                      \
    do {                                                                                                               \
        (rc) = (call);                                                                                                 \
        if (rc) goto label;                                                                                            \
    } while (0)

#endif
