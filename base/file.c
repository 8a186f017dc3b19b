#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int file_open_read(const char *path, int *fd, uint64_t *size)
{
    struct stat info;
    int f = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (f < 0) FAIL(ERR_IO, "%s: cannot open: %s", path, strerror(errno));
    if (fstat(f, &info) || !S_ISREG(info.st_mode)) {
        close(f);
        FAIL(ERR_IO, "%s: not a regular file", path);
    }
    *fd = f;
    *size = (uint64_t)info.st_size;
    return OK;
}

int file_pread(int fd, const char *path, void *out, size_t n, uint64_t offset)
{
    char *to = out;
    while (n > 0) {
        ssize_t got = pread(fd, to, n, (off_t)offset);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) FAIL(ERR_IO, "%s: read at byte %" PRIu64 " failed: %s", path, offset, strerror(errno));
        if (got == 0) FAIL(ERR_IO, "%s: ends at byte %" PRIu64 ", %zu more were expected", path, offset, n);
        to += got;
        n -= (size_t)got;
        offset += (uint64_t)got;
    }
    return OK;
}

int file_read_all(const char *path, size_t max_bytes, char **out, size_t *size)
{
    int fd;
    uint64_t bytes;
    TRY(file_open_read(path, &fd, &bytes));
    if (bytes > max_bytes) {
        close(fd);
        FAIL(ERR_FORMAT, "%s: %" PRIu64 " bytes, the limit is %zu", path, bytes, max_bytes);
    }
    char *text = malloc((size_t)bytes + 1);
    if (!text) {
        close(fd);
        FAIL(ERR_NOMEM, "%s: no memory for %" PRIu64 " bytes", path, bytes);
    }
    int rc = file_pread(fd, path, text, (size_t)bytes, 0);
    close(fd);
    if (rc) {
        free(text);
        return rc;
    }
    text[bytes] = 0;
    *out = text;
    *size = (size_t)bytes;
    return OK;
}

bool file_exists(const char *path) { return access(path, F_OK) == 0; }

int path_join(char *buf, size_t size, const char *dir, const char *name)
{
    size_t n = strlen(dir);
    const char *slash = n && dir[n - 1] != '/' ? "/" : "";
    int wrote = snprintf(buf, size, "%s%s%s", dir, slash, name);
    if (wrote < 0 || (size_t)wrote >= size) FAIL(ERR_ARG, "path too long: %s/%s", dir, name);
    return OK;
}

int64_t file_number(const char *path, const char *label)
{
    char line[256];
    int64_t number = -1;
    FILE *f = fopen(path, "r");
    if (!f) return -1;
    while (number < 0 && fgets(line, sizeof line, f)) {
        if (strncmp(line, label, strlen(label)) != 0) continue;
        char *from = line + strlen(label), *end;
        long long value = strtoll(from, &end, 10);
        if (end != from)
            number = value;
        else if (!*label)
            break;
    }
    fclose(f);
    return number;
}

uint64_t file_bytes_read_by_process(void)
{
    int64_t bytes = file_number("/proc/self/io", "rchar:");
    return bytes > 0 ? (uint64_t)bytes : 0;
}
