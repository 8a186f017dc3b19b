/* model_files - for tests of the model file readers: a temporary directory, and GGUF and safetensors files put together
 * byte by byte, right or wrong on purpose. */
#ifndef VITRAIL_TESTS_MODEL_FILES_H
#define VITRAIL_TESTS_MODEL_FILES_H

#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/gguf.h"

/* ---- a directory of the test's own ---- */

struct temp {
    char path[64];
};

static inline struct temp temp_open(void)
{
    struct temp t;
    snprintf(t.path, sizeof t.path, "%s/vitrail-test-XXXXXX", P_tmpdir);
    if (!mkdtemp(t.path)) {
        perror("mkdtemp");
        exit(2);
    }
    return t;
}

/* The path of a file in it; valid until the next call. */
static inline const char *temp_file(const struct temp *t, const char *name)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/%s", t->path, name);
    return path;
}

static inline void temp_write(const struct temp *t, const char *name, const void *data, size_t size)
{
    FILE *f = fopen(temp_file(t, name), "wb");
    if (!f || fwrite(data, 1, size, f) != size || fclose(f)) {
        perror(name);
        exit(2);
    }
}

static inline void temp_text(const struct temp *t, const char *name, const char *text)
{
    temp_write(t, name, text, strlen(text));
}

static inline void temp_remove(const struct temp *t, const char *name) { unlink(temp_file(t, name)); }

static inline void temp_close(struct temp *t)
{
    DIR *dir = opendir(t->path);
    for (const struct dirent *d = dir ? readdir(dir) : NULL; d; d = readdir(dir)) unlink(temp_file(t, d->d_name));
    if (dir) closedir(dir);
    rmdir(t->path);
}

/* ---- bytes ---- */

struct bytes {
    uint8_t *data;
    size_t size;
};

static inline void put(struct bytes *b, const void *data, size_t size)
{
    b->data = realloc(b->data, b->size + size + 1);
    if (!b->data) abort();
    memcpy(b->data + b->size, data, size);
    b->size += size;
}

static inline void put_u32(struct bytes *b, uint32_t v) { put(b, &v, 4); }
static inline void put_u64(struct bytes *b, uint64_t v) { put(b, &v, 8); }
static inline void put_zeros(struct bytes *b, size_t n)
{
    uint8_t *zeros = calloc(n + 1, 1);
    put(b, zeros, n);
    free(zeros);
}
static inline void put_string(struct bytes *b, const char *s)
{
    put_u64(b, strlen(s));
    put(b, s, strlen(s));
}

static inline void bytes_free(struct bytes *b)
{
    free(b->data);
    *b = (struct bytes){0};
}

/* ---- safetensors ---- */

/* Header text and `data_size` data bytes (counting up, so that places can be told apart). */
static inline struct bytes safetensors_bytes(const char *header, size_t data_size)
{
    struct bytes b = {0};
    put_u64(&b, strlen(header));
    put(&b, header, strlen(header));
    for (size_t i = 0; i < data_size; i++) put(&b, &(uint8_t){(uint8_t)i}, 1);
    return b;
}

/* ---- GGUF ---- */

static inline void gguf_begin(struct bytes *b, uint32_t version, uint64_t n_tensors, uint64_t n_keys)
{
    put(b, "GGUF", 4);
    put_u32(b, version);
    put_u64(b, n_tensors);
    put_u64(b, n_keys);
}

static inline void gguf_key(struct bytes *b, const char *key, enum gguf_type type)
{
    put_string(b, key);
    put_u32(b, type);
}

static inline void gguf_put_u32(struct bytes *b, const char *key, uint32_t v)
{
    gguf_key(b, key, GGUF_U32);
    put_u32(b, v);
}

static inline void gguf_put_f32(struct bytes *b, const char *key, float v)
{
    gguf_key(b, key, GGUF_F32);
    put(b, &v, 4);
}

static inline void gguf_put_string(struct bytes *b, const char *key, const char *v)
{
    gguf_key(b, key, GGUF_STRING);
    put_string(b, v);
}

/* A tensor's description; dims as in the file, innermost first; a zero ends them. */
static inline void gguf_put_tensor(struct bytes *b, const char *name, uint64_t dim0, uint64_t dim1, uint32_t type,
                                   uint64_t offset)
{
    put_string(b, name);
    put_u32(b, dim1 ? 2 : 1);
    put_u64(b, dim0);
    if (dim1) put_u64(b, dim1);
    put_u32(b, type);
    put_u64(b, offset);
}

static inline void gguf_align(struct bytes *b, size_t alignment)
{
    put_zeros(b, (alignment - b->size % alignment) % alignment);
}

#endif
