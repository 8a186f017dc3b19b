/* safetensors - eight bytes of header size, a JSON object {name: {dtype, shape, data_offsets}}, then the data. */
#include "model/safetensors.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"

enum { MAX_HEADER = 100 * 1000 * 1000, MAX_TENSORS = 1 << 20 };
#define MAX_EXACT 9007199254740992.0 /* 2^53: JSON numbers above are not exact */

struct safetensors {
    cJSON *json; /* owns the strings */
    struct safetensors_tensor *tensors;
    int n_tensors;
    uint64_t header_bytes;
};

/* Bytes of an element. Types that are not listed (packed ones among them) have no size that could be checked. */
static const struct type_row {
    const char *name;
    enum storage_type type;
    int bytes;
} type_rows[] = {
    {"F32", STORAGE_F32, 4},       {"F16", STORAGE_F16, 2},       {"BF16", STORAGE_BF16, 2},  {"F64", STORAGE_OTHER, 8},
    {"I64", STORAGE_OTHER, 8},     {"U64", STORAGE_OTHER, 8},     {"I32", STORAGE_OTHER, 4},  {"U32", STORAGE_OTHER, 4},
    {"I16", STORAGE_OTHER, 2},     {"U16", STORAGE_OTHER, 2},     {"I8", STORAGE_OTHER, 1},   {"U8", STORAGE_OTHER, 1},
    {"F8_E4M3", STORAGE_OTHER, 1}, {"F8_E5M2", STORAGE_OTHER, 1}, {"BOOL", STORAGE_OTHER, 1},
};

static int read_shape(const cJSON *shape, const char *path, struct safetensors_tensor *t)
{
    const cJSON *item;
    if (!cJSON_IsArray(shape)) FAIL(ERR_FORMAT, "%s: tensor %.200s: shape must be an array", path, t->name);
    cJSON_ArrayForEach (item, shape) {
        double v = item->valuedouble;
        if (!cJSON_IsNumber(item) || !(v >= 0 && v <= MAX_EXACT) || v != (double)(int64_t)v)
            FAIL(ERR_FORMAT, "%s: tensor %.200s: its shape holds something other than whole numbers", path, t->name);
        if (t->n_dims == 4)
            FAIL(ERR_UNSUPPORTED, "%s: tensor %.200s has more than 4 dimensions; at most 4 are read", path, t->name);
        t->dim[t->n_dims++] = (int64_t)v;
    }
    return OK;
}

static int read_offsets(const cJSON *offsets, const char *path, uint64_t data_start, struct safetensors_tensor *t)
{
    double v[2] = {-1, -1};
    int n = 0;
    const cJSON *item;
    if (cJSON_IsArray(offsets)) {
        cJSON_ArrayForEach (item, offsets) {
            if (n < 2 && cJSON_IsNumber(item)) v[n] = item->valuedouble;
            n++;
        }
    }
    bool good = n == 2 && v[0] >= 0 && v[1] >= v[0] && v[1] <= MAX_EXACT;
    if (!good || v[0] != (double)(uint64_t)v[0] || v[1] != (double)(uint64_t)v[1])
        FAIL(ERR_FORMAT, "%s: tensor %.200s: data_offsets must be [begin, end], whole numbers with begin <= end", path,
             t->name);
    t->offset = data_start + (uint64_t)v[0]; /* both below 2^54 */
    t->bytes = (uint64_t)v[1] - (uint64_t)v[0];
    return OK;
}

static int read_tensor(const cJSON *item, const char *path, uint64_t data_start, struct safetensors_tensor *t)
{
    size_t element = 0, bytes;
    t->name = item->string;
    if (!cJSON_IsObject(item)) FAIL(ERR_FORMAT, "%s: tensor %.200s: its entry is not an object", path, t->name);
    const cJSON *dtype = json_get(item, "dtype");
    if (!cJSON_IsString(dtype)) FAIL(ERR_FORMAT, "%s: tensor %.200s: dtype must be a string", path, t->name);
    TRY(read_shape(json_get(item, "shape"), path, t));
    TRY(read_offsets(json_get(item, "data_offsets"), path, data_start, t));
    t->type_name = dtype->valuestring;
    t->type = STORAGE_OTHER;
    for (size_t i = 0; i < sizeof type_rows / sizeof *type_rows; i++) {
        if (strcmp(type_rows[i].name, t->type_name)) continue;
        t->type = type_rows[i].type;
        element = (size_t)type_rows[i].bytes;
    }
    bytes = element ? element : 1;
    for (int i = 0; i < t->n_dims; i++) {
        if (size_mul(bytes, (size_t)t->dim[i], &bytes) || bytes > INT64_MAX)
            FAIL(ERR_FORMAT, "%s: tensor %.200s: its shape overflows 64 bits", path, t->name);
    }
    if (element && bytes != t->bytes)
        FAIL(ERR_FORMAT, "%s: tensor %.200s: %.20s and its shape take %zu bytes, but data_offsets span %" PRIu64, path,
             t->name, t->type_name, bytes, t->bytes);
    return OK;
}

static int compare_offsets(const void *a, const void *b)
{
    const struct safetensors_tensor *x = a, *y = b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

/* The format demands that the data be covered exactly, which finds a truncated file by its last tensor. */
static int check_cover(const struct safetensors *s, const char *path, uint64_t data_start, uint64_t file_size)
{
    uint64_t at = data_start;
    for (int i = 0; i < s->n_tensors; i++) {
        const struct safetensors_tensor *t = &s->tensors[i];
        if (t->offset + t->bytes > file_size)
            FAIL(ERR_FORMAT,
                 "%s: tensor %.200s ends at byte %" PRIu64 ", but the file has %" PRIu64
                 ": it is truncated or its header is wrong; fetch it again",
                 path, t->name, t->offset + t->bytes, file_size);
        if (t->offset < at)
            FAIL(ERR_FORMAT, "%s: tensor %.200s overlaps %.200s", path, t->name, i ? s->tensors[i - 1].name : "?");
        if (t->offset > at)
            FAIL(ERR_FORMAT, "%s: %" PRIu64 " bytes before tensor %.200s belong to no tensor", path, t->offset - at,
                 t->name);
        at = t->offset + t->bytes;
    }
    if (at != file_size) FAIL(ERR_FORMAT, "%s: %" PRIu64 " bytes at its end belong to no tensor", path, file_size - at);
    return OK;
}

static int read_tensors(struct safetensors *s, const char *path, uint64_t data_start, uint64_t file_size)
{
    const cJSON *item;
    if (!cJSON_IsObject(s->json)) FAIL(ERR_FORMAT, "%s: its header is not a JSON object", path);
    int n = cJSON_GetArraySize(s->json);
    if (n > MAX_TENSORS) FAIL(ERR_FORMAT, "%s: %d tensors, the limit is %d", path, n, MAX_TENSORS);
    s->tensors = calloc((size_t)n + 1, sizeof *s->tensors);
    if (!s->tensors) FAIL(ERR_NOMEM, "%s: no memory for a list of %d tensors", path, n);
    cJSON_ArrayForEach (item, s->json) {
        if (!strcmp(item->string, "__metadata__")) continue;
        TRY(read_tensor(item, path, data_start, &s->tensors[s->n_tensors]));
        s->n_tensors++;
    }
    qsort(s->tensors, (size_t)s->n_tensors, sizeof *s->tensors, compare_offsets);
    return check_cover(s, path, data_start, file_size);
}

/* The size in the first 8 bytes, checked. */
static int header_size(const uint8_t first[8], const char *path, uint64_t file_size, size_t *out)
{
    uint64_t size = 0;
    for (int i = 0; i < 8; i++) size |= (uint64_t)first[i] << 8 * i;
    if (size > MAX_HEADER)
        FAIL(ERR_FORMAT, "%s: its header claims %" PRIu64 " bytes, the limit is %d: not a safetensors file?", path,
             size, MAX_HEADER);
    if (size > file_size - 8)
        FAIL(ERR_FORMAT, "%s: its header claims %" PRIu64 " bytes, but the file has %" PRIu64 ": it is truncated", path,
             size, file_size);
    *out = (size_t)size;
    return OK;
}

static int parse_header(const char *text, size_t size, const char *path, uint64_t file_size, struct safetensors **out)
{
    struct safetensors *s = calloc(1, sizeof *s);
    if (!s) FAIL(ERR_NOMEM, "%s: out of memory", path);
    s->header_bytes = 8 + size;
    int rc = json_parse(text, size, path, &s->json);
    if (!rc) rc = read_tensors(s, path, s->header_bytes, file_size);
    if (rc) {
        safetensors_close(s);
        return rc;
    }
    *out = s;
    return OK;
}

int safetensors_parse(const void *data, size_t size, const char *path, struct safetensors **out)
{
    size_t header = 0;
    if (size < 8) FAIL(ERR_FORMAT, "%s: %zu bytes are too few for a safetensors file", path, size);
    TRY(header_size(data, path, size, &header));
    return parse_header((const char *)data + 8, header, path, size, out);
}

int safetensors_read(int fd, const char *path, uint64_t file_size, struct safetensors **out)
{
    uint8_t first[8];
    size_t header = 0;
    if (file_size < 8) FAIL(ERR_FORMAT, "%s: %" PRIu64 " bytes are too few for a safetensors file", path, file_size);
    TRY(file_pread(fd, path, first, 8, 0));
    TRY(header_size(first, path, file_size, &header));
    char *text = malloc(header + 1);
    if (!text) FAIL(ERR_NOMEM, "%s: no memory for its header of %zu bytes", path, header);
    int rc = file_pread(fd, path, text, header, 8);
    if (!rc) rc = parse_header(text, header, path, file_size, out);
    free(text);
    return rc;
}

void safetensors_close(struct safetensors *s)
{
    if (!s) return;
    cJSON_Delete(s->json);
    free(s->tensors);
    free(s);
}

int safetensors_count(const struct safetensors *s) { return s->n_tensors; }
const struct safetensors_tensor *safetensors_at(const struct safetensors *s, int i) { return &s->tensors[i]; }
uint64_t safetensors_header_bytes(const struct safetensors *s) { return s->header_bytes; }
