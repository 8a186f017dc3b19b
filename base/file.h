/* file - whole-file reads with a cap, exact preads, and what the system counted. */
#ifndef VITRAIL_BASE_FILE_H
#define VITRAIL_BASE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* file_read_all - the whole file into a malloc'd buffer with a terminating NUL (not counted in *size).
 * Errors: ERR_IO naming the path; ERR_FORMAT if larger than max_bytes. The caller frees *out. */
int file_read_all(const char *path, size_t max_bytes, char **out, size_t *size) MUST_CHECK;

/* file_open_read - a read-only descriptor and the size of a regular file. */
int file_open_read(const char *path, int *fd, uint64_t *size) MUST_CHECK;

/* file_pread - exactly n bytes at offset; a short read is ERR_IO naming `path`. */
int file_pread(int fd, const char *path, void *out, size_t n, uint64_t offset) MUST_CHECK;

bool file_exists(const char *path);

/* path_join - "dir/name" (or name alone if dir is empty) into buf; ERR_ARG if it does not fit. */
int path_join(char *buf, size_t size, const char *dir, const char *name) MUST_CHECK;

/* file_number - the number that follows `label` on the first line that begins with it, as in /proc's "MemAvailable: 123
 * kB"; label "": the first number of the file. -1: no such file, line or number ("max"). */
int64_t file_number(const char *path, const char *label);

/* file_bytes_read_by_process - rchar of /proc/self/io: bytes this process asked the system to read; 0 if unknown. */
uint64_t file_bytes_read_by_process(void);

#endif
