/* gguf - the header of one GGUF file (version 2 or 3, little-endian): metadata by key, and which tensor lies where.
 *
 * A header from outside is not trusted: every count is bounded by the bytes that are left before memory is taken, every
 * tensor's offset and size, computed with overflow checks, lies in the file and overlaps no other. A file that passes
 * can be read by offset without another check. What the keys mean is model/gguf_llama.h's business. */
#ifndef VITRAIL_MODEL_GGUF_H
#define VITRAIL_MODEL_GGUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "model/dequant.h"

/* Metadata types, numbered as in the file. */
enum gguf_type {
    GGUF_U8,
    GGUF_I8,
    GGUF_U16,
    GGUF_I16,
    GGUF_U32,
    GGUF_I32,
    GGUF_F32,
    GGUF_BOOL,
    GGUF_STRING,
    GGUF_ARRAY,
    GGUF_U64,
    GGUF_I64,
    GGUF_F64,
    GGUF_TYPE_N
};

struct gguf_tensor {
    const char *name;      /* NUL-terminated; lives as long as the struct gguf */
    const char *type_name; /* "F32", "Q4_K", "IQ2_XS", ... */
    enum storage_type type;
    int n_dims;             /* 1 to 4 */
    int64_t dim[4];         /* outermost first, as in PyTorch (the file has them reversed) */
    uint64_t offset, bytes; /* from the start of the file; bytes is 0 for a type of unknown size */
};

/* Bytes of the file; not NUL-terminated. */
struct gguf_string {
    const char *text;
    size_t size;
};

struct gguf_array {
    enum gguf_type type; /* of the elements */
    int64_t n;
    const uint8_t *data; /* numbers: unaligned, little-endian; strings: use gguf_next_string */
};

struct gguf;

/* gguf_parse - a whole file in memory; `path` names it in errors. The header is copied.
 * gguf_read - the same from a descriptor of a file of file_size bytes, reading little more than the header.
 * Errors: ERR_FORMAT naming path and tensor or key; ERR_UNSUPPORTED version 1, big-endian; ERR_IO; ERR_NOMEM. */
int gguf_parse(const void *data, size_t size, const char *path, struct gguf **out) MUST_CHECK;
int gguf_read(int fd, const char *path, uint64_t file_size, struct gguf **out) MUST_CHECK;
void gguf_close(struct gguf *g);

const char *gguf_path(const struct gguf *g);
int gguf_count(const struct gguf *g);
const struct gguf_tensor *gguf_at(const struct gguf *g, int i);              /* in the order of their data */
const struct gguf_tensor *gguf_find(const struct gguf *g, const char *name); /* NULL if absent */

/* gguf_header_bytes - bytes that reading the header took. */
uint64_t gguf_header_bytes(const struct gguf *g);

/* Typed metadata. An absent key leaves *out untouched and is OK: callers preset defaults. Integers of every width are
 * accepted for gguf_int, floats of both for gguf_double. Errors: ERR_FORMAT naming path, key, expected and found. */
bool gguf_has(const struct gguf *g, const char *key);
int gguf_int(const struct gguf *g, const char *key, int64_t min, int64_t max, int64_t *out) MUST_CHECK;
int gguf_double(const struct gguf *g, const char *key, double min, double max, double *out) MUST_CHECK;
int gguf_bool(const struct gguf *g, const char *key, bool *out) MUST_CHECK;
int gguf_string(const struct gguf *g, const char *key, struct gguf_string *out) MUST_CHECK;

/* gguf_array - an array whose elements have one of two types (give one twice); out->n is 0 if the key is absent. */
int gguf_array(const struct gguf *g, const char *key, enum gguf_type type, enum gguf_type or_type,
               struct gguf_array *out) MUST_CHECK;

/* gguf_next_string - the string at *cursor (begin with array.data) of a string array; moves on. At most array.n times.
 */
struct gguf_string gguf_next_string(const uint8_t **cursor);

bool gguf_string_is(struct gguf_string s, const char *text);

#endif
