/* gguf - "GGUF", version, counts, key-value pairs, tensor descriptions; then, aligned, the data.
 *
 * The length of the header is known only at its end. A file is read in a prefix that doubles until the header
 * fits; the parser says NEED_MORE when it ran out of a prefix that is not the whole file. Strings stay in that buffer.
 */
#include "model/gguf.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"

enum {
    NEED_MORE = 1, /* beside enum status: the prefix ended */
    FIRST_PREFIX = 1 << 20,
    MAX_HEADER = 512 << 20,
    MAX_KEYS = 1 << 16,
    MAX_TENSORS = 1 << 20,
    MAX_NAME = 1024,
    MAX_ALIGNMENT = 1 << 20,
    MIN_KEY_BYTES = 8 + 4 + 1,
    MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
};

struct entry {
    struct gguf_string key;
    enum gguf_type type;
    const uint8_t *value;      /* numbers and bool */
    struct gguf_string string; /* GGUF_STRING */
    struct gguf_array array;   /* GGUF_ARRAY */
};

struct gguf {
    char *path;
    uint8_t *data; /* the prefix */
    size_t size, at;
    uint64_t file_size;
    struct entry *entries; /* sorted by key */
    int n_entries;
    struct gguf_tensor *tensors; /* sorted by offset */
    const struct gguf_tensor **by_name;
    int n_tensors;
};

static const uint8_t type_bytes[GGUF_TYPE_N] = {
    [GGUF_U8] = 1,  [GGUF_I8] = 1,   [GGUF_U16] = 2, [GGUF_I16] = 2, [GGUF_U32] = 4, [GGUF_I32] = 4,
    [GGUF_F32] = 4, [GGUF_BOOL] = 1, [GGUF_U64] = 8, [GGUF_I64] = 8, [GGUF_F64] = 8};

static const char *const type_names[GGUF_TYPE_N] = {
    [GGUF_U8] = "uint8",      [GGUF_I8] = "int8",     [GGUF_U16] = "uint16", [GGUF_I16] = "int16",
    [GGUF_U32] = "uint32",    [GGUF_I32] = "int32",   [GGUF_F32] = "float",  [GGUF_BOOL] = "bool",
    [GGUF_STRING] = "string", [GGUF_ARRAY] = "array", [GGUF_U64] = "uint64", [GGUF_I64] = "int64",
    [GGUF_F64] = "double"};

/* Tensor types by their number in the file. Those with a size can be checked even where they cannot be read. */
static const struct tensor_type {
    const char *name;
    enum storage_type type;
    int block, bytes;
} tensor_types[] = {
    [0] = {"F32", STORAGE_F32, 1, 4},           [1] = {"F16", STORAGE_F16, 1, 2},
    [2] = {"Q4_0", STORAGE_Q4_0, 32, 18},       [3] = {"Q4_1", STORAGE_Q4_1, 32, 20},
    [6] = {"Q5_0", STORAGE_Q5_0, 32, 22},       [7] = {"Q5_1", STORAGE_Q5_1, 32, 24},
    [8] = {"Q8_0", STORAGE_Q8_0, 32, 34},       [9] = {"Q8_1", STORAGE_OTHER, 32, 40},
    [10] = {"Q2_K", STORAGE_OTHER, 256, 84},    [11] = {"Q3_K", STORAGE_OTHER, 256, 110},
    [12] = {"Q4_K", STORAGE_Q4_K, 256, 144},    [13] = {"Q5_K", STORAGE_Q5_K, 256, 176},
    [14] = {"Q6_K", STORAGE_Q6_K, 256, 210},    [15] = {"Q8_K", STORAGE_OTHER, 256, 292},
    [16] = {"IQ2_XXS", STORAGE_OTHER, 256, 66}, [17] = {"IQ2_XS", STORAGE_OTHER, 256, 74},
    [18] = {"IQ3_XXS", STORAGE_OTHER, 256, 98}, [19] = {"IQ1_S", STORAGE_OTHER, 256, 50},
    [20] = {"IQ4_NL", STORAGE_OTHER, 32, 18},   [21] = {"IQ3_S", STORAGE_OTHER, 256, 110},
    [22] = {"IQ2_S", STORAGE_OTHER, 256, 82},   [23] = {"IQ4_XS", STORAGE_OTHER, 256, 136},
    [24] = {"I8", STORAGE_OTHER, 1, 1},         [25] = {"I16", STORAGE_OTHER, 1, 2},
    [26] = {"I32", STORAGE_OTHER, 1, 4},        [27] = {"I64", STORAGE_OTHER, 1, 8},
    [28] = {"F64", STORAGE_OTHER, 1, 8},        [29] = {"IQ1_M", STORAGE_OTHER, 256, 56},
    [30] = {"BF16", STORAGE_BF16, 1, 2},        [34] = {"TQ1_0", STORAGE_OTHER, 256, 54},
    [35] = {"TQ2_0", STORAGE_OTHER, 256, 66},   [39] = {"MXFP4", STORAGE_OTHER, 32, 17},
};
static const struct tensor_type unknown_type = {"unknown", STORAGE_OTHER, 1, 0};

/* The next n bytes of the header, or NEED_MORE, or ERR_FORMAT where the file itself ends. */
static int take(struct gguf *g, uint64_t n, const uint8_t **out)
{
    if (n > g->size - g->at) {
        if (n <= g->file_size - g->at && g->size < MAX_HEADER) return NEED_MORE;
        FAIL(ERR_FORMAT,
             "%s: its header ends too early: %" PRIu64 " bytes expected at byte %zu of %" PRIu64
             "; the file is truncated or damaged",
             g->path, n, g->at, g->file_size);
    }
    *out = g->data + g->at;
    g->at += (size_t)n;
    return OK;
}

static uint64_t unsigned_of(const uint8_t *in, int bytes)
{
    uint64_t v = 0;
    for (int i = 0; i < bytes; i++) v |= (uint64_t)in[i] << 8 * i;
    return v;
}

static int take_number(struct gguf *g, int bytes, uint64_t *out)
{
    const uint8_t *in = NULL;
    TRY(take(g, (uint64_t)bytes, &in));
    *out = unsigned_of(in, bytes);
    return OK;
}

static int take_string(struct gguf *g, struct gguf_string *out)
{
    uint64_t size = 0;
    const uint8_t *text = NULL;
    TRY(take_number(g, 8, &size));
    TRY(take(g, size, &text));
    *out = (struct gguf_string){(const char *)text, (size_t)size};
    return OK;
}

static int take_type(struct gguf *g, const struct gguf_string *key, enum gguf_type *out)
{
    uint64_t type = 0;
    TRY(take_number(g, 4, &type));
    if (type >= GGUF_TYPE_N)
        FAIL(ERR_FORMAT, "%s: key %.*s has the unknown type %" PRIu64, g->path, (int)key->size, key->text, type);
    *out = (enum gguf_type)type;
    return OK;
}

static int take_array(struct gguf *g, const struct gguf_string *key, struct gguf_array *out)
{
    uint64_t n = 0, bytes;
    struct gguf_string skipped;
    const uint8_t *data = NULL;
    TRY(take_type(g, key, &out->type));
    TRY(take_number(g, 8, &n));
    if (out->type == GGUF_ARRAY)
        FAIL(ERR_UNSUPPORTED, "%s: key %.*s is an array of arrays, which is not read", g->path, (int)key->size,
             key->text);
    uint64_t least = out->type == GGUF_STRING ? 8 : type_bytes[out->type];
    if (__builtin_mul_overflow(n, least, &bytes) || bytes > g->file_size - g->at)
        FAIL(ERR_FORMAT, "%s: key %.*s claims %" PRIu64 " elements, more than the file can hold", g->path,
             (int)key->size, key->text, n);
    out->n = (int64_t)n;
    if (out->type != GGUF_STRING) return take(g, bytes, &out->data);
    TRY(take(g, 0, &data));
    for (uint64_t i = 0; i < n; i++) TRY(take_string(g, &skipped));
    out->data = data;
    return OK;
}

static int take_entry(struct gguf *g, struct entry *e)
{
    TRY(take_string(g, &e->key));
    if (e->key.size == 0 || e->key.size > MAX_NAME)
        FAIL(ERR_FORMAT, "%s: a key of %zu bytes at byte %zu; 1 to %d are allowed", g->path, e->key.size, g->at,
             MAX_NAME);
    TRY(take_type(g, &e->key, &e->type));
    if (e->type == GGUF_STRING) return take_string(g, &e->string);
    if (e->type == GGUF_ARRAY) return take_array(g, &e->key, &e->array);
    return take(g, type_bytes[e->type], &e->value);
}

/* Name, dimensions, type and offset (still relative to the data); sizes computed and checked. */
static int take_tensor(struct gguf *g, struct gguf_tensor *t)
{
    struct gguf_string name = {NULL, 0};
    uint64_t n_dims = 0, dim[4] = {0}, type = 0, elements = 1;
    TRY(take_string(g, &name));
    if (name.size == 0 || name.size > MAX_NAME || memchr(name.text, 0, name.size))
        FAIL(ERR_FORMAT, "%s: a tensor name of %zu bytes before byte %zu is not acceptable", g->path, name.size, g->at);
    t->name = strndup(name.text, name.size);
    if (!t->name) FAIL(ERR_NOMEM, "%s: out of memory", g->path);
    TRY(take_number(g, 4, &n_dims));
    if (n_dims < 1 || n_dims > 4)
        FAIL(ERR_FORMAT, "%s: tensor %.200s has %" PRIu64 " dimensions; 1 to 4 are allowed", g->path, t->name, n_dims);
    t->n_dims = (int)n_dims;
    for (int i = 0; i < t->n_dims; i++) {
        TRY(take_number(g, 8, &dim[i]));
        if (__builtin_mul_overflow(elements, dim[i], &elements) || elements > INT64_MAX || dim[i] > INT64_MAX)
            FAIL(ERR_FORMAT, "%s: tensor %.200s: its shape overflows 64 bits", g->path, t->name);
        t->dim[t->n_dims - 1 - i] = (int64_t)dim[i];
    }
    TRY(take_number(g, 4, &type));
    TRY(take_number(g, 8, &t->offset));
    const struct tensor_type *known = &unknown_type;
    if (type < sizeof tensor_types / sizeof *tensor_types && tensor_types[type].name) known = &tensor_types[type];
    t->type = known->type;
    t->type_name = known->name;
    if (dim[0] % (uint64_t)known->block)
        FAIL(ERR_FORMAT, "%s: tensor %.200s: rows of %" PRIu64 " elements are no multiple of the %s block of %d",
             g->path, t->name, dim[0], known->name, known->block);
    if (__builtin_mul_overflow(elements / (uint64_t)known->block, (uint64_t)known->bytes, &t->bytes))
        FAIL(ERR_FORMAT, "%s: tensor %.200s: its size overflows 64 bits", g->path, t->name);
    return OK;
}

static int compare_strings(struct gguf_string a, struct gguf_string b)
{
    int order = memcmp(a.text, b.text, a.size < b.size ? a.size : b.size);
    return order ? order : (a.size > b.size) - (a.size < b.size);
}

static int compare_entries(const void *a, const void *b)
{
    return compare_strings(((const struct entry *)a)->key, ((const struct entry *)b)->key);
}

static int compare_offsets(const void *a, const void *b)
{
    const struct gguf_tensor *x = a, *y = b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

static int compare_names(const void *a, const void *b)
{
    return strcmp((*(const struct gguf_tensor *const *)a)->name, (*(const struct gguf_tensor *const *)b)->name);
}

static int take_counts(struct gguf *g, uint64_t *n_tensors, uint64_t *n_keys)
{
    const uint8_t *magic = NULL;
    uint64_t version = 0;
    TRY(take(g, 4, &magic));
    if (memcmp(magic, "GGUF", 4)) FAIL(ERR_FORMAT, "%s: not a GGUF file: it does not begin with \"GGUF\"", g->path);
    TRY(take_number(g, 4, &version));
    if (version != 0 && (version & 0xffff) == 0)
        FAIL(ERR_UNSUPPORTED, "%s: a big-endian GGUF file; only little-endian ones are read", g->path);
    if (version != 2 && version != 3)
        FAIL(ERR_UNSUPPORTED, "%s: GGUF version %" PRIu64 "; versions 2 and 3 are read", g->path, version);
    TRY(take_number(g, 8, n_tensors));
    TRY(take_number(g, 8, n_keys));
    if (*n_keys > MAX_KEYS || *n_keys > g->file_size / MIN_KEY_BYTES)
        FAIL(ERR_FORMAT, "%s: %" PRIu64 " metadata keys, more than the file can hold or the limit of %d", g->path,
             *n_keys, MAX_KEYS);
    if (*n_tensors > MAX_TENSORS || *n_tensors > g->file_size / MIN_TENSOR_BYTES)
        FAIL(ERR_FORMAT, "%s: %" PRIu64 " tensors, more than the file can hold or the limit of %d", g->path, *n_tensors,
             MAX_TENSORS);
    return OK;
}

static int take_entries(struct gguf *g, uint64_t n)
{
    g->entries = calloc(n + 1, sizeof *g->entries);
    if (!g->entries) FAIL(ERR_NOMEM, "%s: out of memory", g->path);
    for (uint64_t i = 0; i < n; i++) {
        TRY(take_entry(g, &g->entries[i]));
        g->n_entries++;
    }
    qsort(g->entries, n, sizeof *g->entries, compare_entries);
    for (uint64_t i = 1; i < n; i++) {
        if (!compare_entries(&g->entries[i - 1], &g->entries[i]))
            FAIL(ERR_FORMAT, "%s: key %.*s stands twice", g->path, (int)g->entries[i].key.size, g->entries[i].key.text);
    }
    return OK;
}

static int take_tensors(struct gguf *g, uint64_t n)
{
    g->tensors = calloc(n + 1, sizeof *g->tensors);
    g->by_name = calloc(n + 1, sizeof *g->by_name);
    if (!g->tensors || !g->by_name) FAIL(ERR_NOMEM, "%s: out of memory", g->path);
    for (uint64_t i = 0; i < n; i++) {
        g->n_tensors++; /* first, so that a half-read one is freed */
        TRY(take_tensor(g, &g->tensors[i]));
    }
    qsort(g->tensors, n, sizeof *g->tensors, compare_offsets);
    for (uint64_t i = 0; i < n; i++) g->by_name[i] = &g->tensors[i];
    qsort(g->by_name, n, sizeof *g->by_name, compare_names);
    for (uint64_t i = 1; i < n; i++) {
        if (!strcmp(g->by_name[i - 1]->name, g->by_name[i]->name))
            FAIL(ERR_FORMAT, "%s: tensor %.200s stands twice", g->path, g->by_name[i]->name);
    }
    return OK;
}

/* Offsets become absolute; every tensor lies in the file, aligned, after the one before it. */
static int place_tensors(struct gguf *g)
{
    int64_t alignment = 32;
    TRY(gguf_int(g, "general.alignment", 1, MAX_ALIGNMENT, &alignment));
    if (alignment & (alignment - 1))
        FAIL(ERR_FORMAT, "%s: general.alignment is %" PRId64 ", not a power of two", g->path, alignment);
    uint64_t mask = (uint64_t)alignment - 1, data_start = (g->at + mask) & ~mask, at = data_start;
    for (int i = 0; i < g->n_tensors; i++) {
        struct gguf_tensor *t = &g->tensors[i];
        uint64_t end;
        if (t->offset & mask)
            FAIL(ERR_FORMAT, "%s: tensor %.200s: its offset %" PRIu64 " is no multiple of the alignment %" PRId64,
                 g->path, t->name, t->offset, alignment);
        if (__builtin_add_overflow(t->offset, data_start, &t->offset) ||
            __builtin_add_overflow(t->offset, t->bytes, &end) || end > g->file_size)
            FAIL(ERR_FORMAT,
                 "%s: tensor %.200s (%" PRIu64 " bytes) lies beyond the end of the file at byte %" PRIu64
                 ": it is truncated or its header is wrong; fetch it again",
                 g->path, t->name, t->bytes, g->file_size);
        if (t->offset < at)
            FAIL(ERR_FORMAT, "%s: tensor %.200s overlaps %.200s", g->path, t->name, i ? g->tensors[i - 1].name : "?");
        at = end;
    }
    return OK;
}

static void drop_lists(struct gguf *g)
{
    for (int i = 0; i < g->n_tensors; i++) free((char *)g->tensors[i].name);
    free(g->tensors);
    free(g->by_name);
    free(g->entries);
    g->tensors = NULL;
    g->by_name = NULL;
    g->entries = NULL;
    g->n_tensors = g->n_entries = 0;
    g->at = 0;
}

/* Parses the prefix from its beginning; may return NEED_MORE. */
static int parse(struct gguf *g)
{
    uint64_t n_tensors = 0, n_keys = 0;
    drop_lists(g);
    TRY(take_counts(g, &n_tensors, &n_keys));
    TRY(take_entries(g, n_keys));
    TRY(take_tensors(g, n_tensors));
    return place_tensors(g);
}

static int open_empty(const char *path, uint64_t file_size, struct gguf **out)
{
    struct gguf *g = calloc(1, sizeof *g);
    if (g) g->path = strdup(path);
    if (!g || !g->path) {
        free(g);
        FAIL(ERR_NOMEM, "%s: out of memory", path);
    }
    g->file_size = file_size;
    *out = g;
    return OK;
}

/* Makes the prefix `size` bytes long, from the file or from memory. */
static int extend(struct gguf *g, int fd, const void *memory, size_t size)
{
    uint8_t *data = realloc(g->data, size + 1);
    if (!data) FAIL(ERR_NOMEM, "%s: no memory for its header", g->path);
    g->data = data;
    if (memory)
        memcpy(data, memory, size);
    else
        TRY(file_pread(fd, g->path, data + g->size, size - g->size, g->size));
    g->size = size;
    return OK;
}

int gguf_parse(const void *data, size_t size, const char *path, struct gguf **out)
{
    struct gguf *g = NULL;
    TRY(open_empty(path, size, &g));
    int rc = extend(g, -1, data, size);
    if (!rc) rc = parse(g);
    if (rc == NEED_MORE) rc = status_set(ERR_BUG, __FILE__, __LINE__, "%s: the whole file was not enough", path);
    if (rc)
        gguf_close(g);
    else
        *out = g;
    return rc;
}

int gguf_read(int fd, const char *path, uint64_t file_size, struct gguf **out)
{
    struct gguf *g = NULL;
    uint64_t size = FIRST_PREFIX;
    int rc;
    TRY(open_empty(path, file_size, &g));
    do {
        if (size > file_size) size = file_size;
        if (size > MAX_HEADER) size = MAX_HEADER;
        rc = extend(g, fd, NULL, (size_t)size);
        if (!rc) rc = parse(g);
        size *= 2;
    } while (rc == NEED_MORE);
    if (rc)
        gguf_close(g);
    else
        *out = g;
    return rc;
}

void gguf_close(struct gguf *g)
{
    if (!g) return;
    drop_lists(g);
    free(g->data);
    free(g->path);
    free(g);
}

const char *gguf_path(const struct gguf *g) { return g->path; }
int gguf_count(const struct gguf *g) { return g->n_tensors; }
const struct gguf_tensor *gguf_at(const struct gguf *g, int i) { return &g->tensors[i]; }
uint64_t gguf_header_bytes(const struct gguf *g) { return g->size; }

const struct gguf_tensor *gguf_find(const struct gguf *g, const char *name)
{
    struct gguf_tensor wanted = {.name = name};
    const struct gguf_tensor *key = &wanted;
    const struct gguf_tensor **found =
        bsearch(&key, g->by_name, (size_t)g->n_tensors, sizeof *g->by_name, compare_names);
    return found ? *found : NULL;
}

static const struct entry *find_entry(const struct gguf *g, const char *key)
{
    struct entry wanted = {.key = {key, strlen(key)}};
    if (g->n_entries == 0) return NULL;
    return bsearch(&wanted, g->entries, (size_t)g->n_entries, sizeof *g->entries, compare_entries);
}

bool gguf_has(const struct gguf *g, const char *key) { return find_entry(g, key) != NULL; }

int gguf_int(const struct gguf *g, const char *key, int64_t min, int64_t max, int64_t *out)
{
    const struct entry *e = find_entry(g, key);
    int64_t v;
    if (!e) return OK;
    bool is_signed = e->type == GGUF_I8 || e->type == GGUF_I16 || e->type == GGUF_I32 || e->type == GGUF_I64;
    bool is_unsigned = e->type == GGUF_U8 || e->type == GGUF_U16 || e->type == GGUF_U32 || e->type == GGUF_U64;
    if (!is_signed && !is_unsigned)
        FAIL(ERR_FORMAT, "%s: %s must be an integer, not a value of type %s", g->path, key, type_names[e->type]);
    int bits = 8 * type_bytes[e->type];
    uint64_t raw = unsigned_of(e->value, type_bytes[e->type]);
    if (is_signed && bits < 64 && raw >> (bits - 1)) raw |= ~(uint64_t)0 << bits;
    if (is_unsigned && raw > INT64_MAX) raw = INT64_MAX;
    memcpy(&v, &raw, sizeof v);
    if (v < min || v > max)
        FAIL(ERR_FORMAT, "%s: %s must lie within %" PRId64 " and %" PRId64 ", found %" PRId64, g->path, key, min, max,
             v);
    *out = v;
    return OK;
}

int gguf_double(const struct gguf *g, const char *key, double min, double max, double *out)
{
    const struct entry *e = find_entry(g, key);
    double v;
    if (!e) return OK;
    if (e->type == GGUF_F32) {
        float f;
        memcpy(&f, e->value, sizeof f);
        v = (double)f;
    } else if (e->type == GGUF_F64) {
        memcpy(&v, e->value, sizeof v);
    } else {
        FAIL(ERR_FORMAT, "%s: %s must be a float, not a value of type %s", g->path, key, type_names[e->type]);
    }
    if (!isfinite(v) || v < min || v > max)
        FAIL(ERR_FORMAT, "%s: %s must lie within %g and %g, found %g", g->path, key, min, max, v);
    *out = v;
    return OK;
}

int gguf_bool(const struct gguf *g, const char *key, bool *out)
{
    const struct entry *e = find_entry(g, key);
    if (!e) return OK;
    if (e->type != GGUF_BOOL || *e->value > 1)
        FAIL(ERR_FORMAT, "%s: %s must be true or false (type %s)", g->path, key, type_names[e->type]);
    *out = *e->value == 1;
    return OK;
}

int gguf_string(const struct gguf *g, const char *key, struct gguf_string *out)
{
    const struct entry *e = find_entry(g, key);
    if (!e) return OK;
    if (e->type != GGUF_STRING)
        FAIL(ERR_FORMAT, "%s: %s must be a string, not a value of type %s", g->path, key, type_names[e->type]);
    *out = e->string;
    return OK;
}

int gguf_array(const struct gguf *g, const char *key, enum gguf_type type, enum gguf_type or_type,
               struct gguf_array *out)
{
    const struct entry *e = find_entry(g, key);
    *out = (struct gguf_array){.type = type};
    if (!e) return OK;
    if (e->type != GGUF_ARRAY || (e->array.type != type && e->array.type != or_type))
        FAIL(ERR_FORMAT, "%s: %s must be an array of type %s, found %s%s", g->path, key, type_names[type],
             e->type == GGUF_ARRAY ? "array of " : "", type_names[e->type == GGUF_ARRAY ? e->array.type : e->type]);
    *out = e->array;
    return OK;
}

struct gguf_string gguf_next_string(const uint8_t **cursor)
{
    uint64_t size = unsigned_of(*cursor, 8);
    struct gguf_string s = {(const char *)*cursor + 8, (size_t)size};
    *cursor += 8 + size;
    return s;
}

bool gguf_string_is(struct gguf_string s, const char *text)
{
    return s.size == strlen(text) && !memcmp(s.text, text, s.size);
}
