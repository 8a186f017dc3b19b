/* image_source - see the header. A path is made absolute and cleaned of "." and ".." as text, the allowed directory is
 * cut off, and what remains is opened one component at a time from the directory's descriptor with O_NOFOLLOW: there is
 * no ".." left to climb with and no link to leave by, and nothing to race against. */
#include "model/image_source.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/base64.h"
#include "base/file.h"

enum { MAX_DATA_HEADER = 256 };

const char *image_source_name(const char *url, char buf[IMAGE_SOURCE_NAME_MAX])
{
    size_t n = strlen(url), shown = IMAGE_SOURCE_NAME_MAX - 4;
    if (!strncasecmp(url, "data:", 5)) n = strcspn(url, ",");
    bool is_cut = n > shown;
    if (is_cut) n = shown;
    for (size_t i = 0; i < n; i++) buf[i] = (char)(url[i] >= 0x20 && url[i] < 0x7f ? url[i] : '?');
    memcpy(buf + n, is_cut ? "..." : "", is_cut ? 4 : 1);
    return buf;
}

static bool is_served_type(const char *type, size_t n)
{
    static const char *const served[] = {"image/png", "image/jpeg", "image/jpg"};
    for (size_t i = 0; i < sizeof served / sizeof *served; i++) {
        if (strlen(served[i]) == n && !strncasecmp(type, served[i], n)) return true;
    }
    return false;
}

/* `rest` is what follows "data:": type[;parameter]*;base64,digits */
static int read_data(const char *rest, const char *name, const struct image_limits *limits, uint8_t **bytes,
                     size_t *size)
{
    const char *comma = strchr(rest, ',');
    if (!comma) FAIL(ERR_REQUEST, "%s: a data: URL without a comma before its data", name);
    size_t n = (size_t)(comma - rest), n_type = strcspn(rest, ";,");
    if (n > MAX_DATA_HEADER)
        FAIL(ERR_REQUEST, "%s: %zu characters before the data, the limit is %d", name, n, MAX_DATA_HEADER);
    if (!is_served_type(rest, n_type))
        FAIL(ERR_REQUEST, "%s: image/png and image/jpeg are served in data: URLs, not this media type", name);
    if (n < n_type + 7 || strncasecmp(comma - 7, ";base64", 7) != 0)
        FAIL(ERR_REQUEST, "%s: the data must be base64, announced by \";base64\" before the comma", name);
    int rc = base64_decode(comma + 1, strlen(comma + 1), limits->max_bytes, bytes, size);
    return rc ? status_prefix(rc, "%s", name) : OK;
}

static int hex_value(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

static int percent_decode(const char *text, const char *name, char out[PATH_MAX])
{
    size_t n = 0;
    for (; *text; text++) {
        int value = (unsigned char)*text;
        if (n + 1 >= PATH_MAX) FAIL(ERR_REQUEST, "%s: the path is longer than %d bytes", name, PATH_MAX - 1);
        if (*text == '%') {
            int high = hex_value(text[1]), low = high < 0 ? -1 : hex_value(text[2]);
            if (low < 0) FAIL(ERR_REQUEST, "%s: \"%%\" must be followed by two hexadecimal digits", name);
            value = high * 16 + low;
            text += 2;
        }
        if (!value) FAIL(ERR_REQUEST, "%s: a zero byte in the path", name);
        out[n++] = (char)value;
    }
    out[n] = 0;
    return OK;
}

/* The path in a file: URL, as RFC 8089 allows and as people write it. */
static int url_path(const char *rest, const char *name, char out[PATH_MAX])
{
    if (rest[0] == '/' && rest[1] == '/') {
        rest += 2;
        if (!strncasecmp(rest, "localhost/", 10)) rest += 9;
        if (*rest != '/')
            FAIL(ERR_REQUEST, "%s: a host stands after file://; write file:///absolute/path or file:relative/path",
                 name);
    }
    TRY(percent_decode(rest, name, out));
    size_t n = strlen(out);
    if (!n || out[n - 1] == '/') FAIL(ERR_REQUEST, "%s: names no file", name);
    return OK;
}

/* Absolute, without ".", "..", doubled or trailing slashes; "" for the root. Links are not looked at. */
static int clean_path(const char *path, const char *name, char out[PATH_MAX])
{
    char joined[2 * PATH_MAX] = "";
    if (*path != '/' && !getcwd(joined, PATH_MAX))
        FAIL(ERR_IO, "%s: the working directory is unknown: %s", name, strerror(errno));
    size_t n = strlen(joined);
    int wrote = snprintf(joined + n, sizeof joined - n, "/%s", path);
    if (wrote < 0 || (size_t)wrote >= sizeof joined - n) FAIL(ERR_REQUEST, "%s: the path is too long", name);
    n = 0;
    char *rest = joined;
    for (char *part; (part = strsep(&rest, "/"));) {
        size_t length = strlen(part);
        if (!length || !strcmp(part, ".")) continue;
        if (!strcmp(part, "..")) {
            while (n && out[--n] != '/') {
            }
            continue;
        }
        if (n + 1 + length >= PATH_MAX) FAIL(ERR_REQUEST, "%s: the path is too long", name);
        out[n] = '/';
        memcpy(out + n + 1, part, length);
        n += 1 + length;
    }
    out[n] = 0;
    return OK;
}

/* What of `path` lies below `dir`, without a leading slash; NULL if it does not. Both clean. */
static const char *below(const char *path, const char *dir)
{
    size_t n = strlen(dir);
    return !strncmp(path, dir, n) && path[n] == '/' ? path + n + 1 : NULL;
}

/* Opens a clean relative path from directory `dir`, which it closes. */
static int open_below(int dir, char *path, const char *name, int *out)
{
    for (char *part = strsep(&path, "/"); part;) {
        char *next = strsep(&path, "/");
        int flags = next ? O_PATH | O_DIRECTORY : O_RDONLY | O_NONBLOCK | O_NOCTTY;
        int fd = openat(dir, part, flags | O_NOFOLLOW | O_CLOEXEC);
        int error = errno;
        close(dir);
        if (fd < 0 && (error == ELOOP || error == ENOTDIR))
            FAIL(ERR_REQUEST, "%s: a symbolic link, which is not followed, or no directory at \"%.100s\"", name, part);
        if (fd < 0) FAIL(ERR_IO, "%s: cannot open: %s", name, strerror(error));
        dir = fd;
        part = next;
    }
    *out = dir;
    return OK;
}

static int open_allowed(const char *path, const char *allowed_dir, const char *name, int *fd)
{
    char wanted[PATH_MAX] = "", given[PATH_MAX] = "", real[PATH_MAX], relative[PATH_MAX];
    TRY(clean_path(path, name, wanted));
    TRY(clean_path(allowed_dir, name, given));
    /* The directory may be known by a path through links, too: either way of writing it is fine. */
    const char *rest = below(wanted, given);
    if (!rest && realpath(allowed_dir, real)) rest = below(wanted, strcmp(real, "/") ? real : "");
    if (!rest)
        FAIL(ERR_REQUEST, "%s: not below the directory that images may be read from (allowed_local_media_path)", name);
    memcpy(relative, rest, strlen(rest) + 1);
    int dir = open(allowed_dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (dir < 0) FAIL(ERR_IO, "allowed_local_media_path %s: cannot open: %s", allowed_dir, strerror(errno));
    return open_below(dir, relative, name, fd);
}

static int read_descriptor(int fd, const char *name, const struct image_limits *limits, uint8_t **bytes, size_t *size)
{
    struct stat info;
    if (fstat(fd, &info)) FAIL(ERR_IO, "%s: cannot be examined: %s", name, strerror(errno));
    if (!S_ISREG(info.st_mode)) FAIL(ERR_REQUEST, "%s: not a regular file", name);
    if ((uint64_t)info.st_size > limits->max_bytes)
        FAIL(ERR_FORMAT, "%s: %llu bytes, the limit for an image file is %zu", name, (unsigned long long)info.st_size,
             limits->max_bytes);
    uint8_t *buffer = malloc((size_t)info.st_size + 1);
    if (!buffer) FAIL(ERR_NOMEM, "%s: no memory for %llu bytes", name, (unsigned long long)info.st_size);
    int rc = file_pread(fd, name, buffer, (size_t)info.st_size, 0);
    if (rc) {
        free(buffer);
        return rc;
    }
    *bytes = buffer;
    *size = (size_t)info.st_size;
    return OK;
}

static int read_file(const char *rest, const char *name, const char *allowed_dir, const struct image_limits *limits,
                     uint8_t **bytes, size_t *size)
{
    char path[PATH_MAX] = "";
    int fd = -1;
    if (!allowed_dir || !*allowed_dir)
        FAIL(ERR_REQUEST, "%s: file: URLs are switched off; set allowed_local_media_path or pass a data: URL", name);
    TRY(url_path(rest, name, path));
    TRY(open_allowed(path, allowed_dir, name, &fd));
    int rc = read_descriptor(fd, name, limits, bytes, size);
    close(fd);
    return rc;
}

int image_source_read(const char *url, const char *allowed_dir, const struct image_limits *limits, uint8_t **bytes,
                      size_t *size)
{
    char name[IMAGE_SOURCE_NAME_MAX];
    struct image_limits defaults = image_limits_default();
    if (!limits) limits = &defaults;
    image_source_name(url, name);
    if (!strncasecmp(url, "data:", 5)) return read_data(url + 5, name, limits, bytes, size);
    if (!strncasecmp(url, "file:", 5)) return read_file(url + 5, name, allowed_dir, limits, bytes, size);
    if (!*url) FAIL(ERR_REQUEST, "an image with an empty URL; pass a data: or file: URL");
    if (!strstr(url, ":")) FAIL(ERR_REQUEST, "%s: not a URL; pass a data: URL, or file:path for a file", name);
    FAIL(ERR_REQUEST, "%s: nothing is fetched over a network or by this scheme; pass a data: or file: URL", name);
}
