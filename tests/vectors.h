/* vectors - reading the test vectors of the KV-cache policies (tests/data/oracles): arrays as floats, kept lists.
 *
 * An array is {"shape", "values": [...]} or {"shape", "type": "i8" | "u8" | "f32", "base64", "scale" for i8}. The files
 * are our own, so a malformed one ends the test program. */
#ifndef VITRAIL_TESTS_VECTORS_H
#define VITRAIL_TESTS_VECTORS_H

#include <cjson/cJSON.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static inline void vectors_demand(int condition, const char *what)
{
    if (condition) return;
    fprintf(stderr, "test vectors: %s\n", what);
    exit(2);
}

/* vectors_load - tests/data/oracles/<name>.json; the caller deletes it with cJSON_Delete. */
static inline cJSON *vectors_load(const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "%s/tests/data/oracles/%s.json", SOURCE_DIR, name);
    FILE *file = fopen(path, "rb");
    vectors_demand(file != NULL, path);
    fseek(file, 0, SEEK_END);
    size_t size = (size_t)ftell(file);
    rewind(file);
    char *text = malloc(size + 1);
    vectors_demand(text && fread(text, 1, size, file) == size, path);
    fclose(file);
    cJSON *json = cJSON_ParseWithLength(text, size);
    free(text);
    vectors_demand(json != NULL, path);
    return json;
}

static inline const cJSON *vectors_get(const cJSON *object, const char *key)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
    vectors_demand(item != NULL, key);
    return item;
}
static inline int vectors_int(const cJSON *object, const char *key) { return vectors_get(object, key)->valueint; }
static inline double vectors_number(const cJSON *object, const char *key)
{
    return vectors_get(object, key)->valuedouble;
}
static inline const char *vectors_string(const cJSON *object, const char *key)
{
    const char *text = vectors_get(object, key)->valuestring;
    vectors_demand(text != NULL, key);
    return text;
}

static inline int vectors_digit(char c)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const char *at = c ? strchr(digits, c) : NULL;
    vectors_demand(at != NULL, "base64");
    return (int)(at - digits);
}

/* Decodes into a new buffer of *n bytes. */
static inline uint8_t *vectors_base64(const char *text, size_t *n)
{
    uint8_t *out = malloc(strlen(text) / 4 * 3 + 3);
    uint32_t bits = 0;
    int n_bits = 0;
    if (!out) exit(2);
    for (*n = 0; *text && *text != '='; text++) {
        bits = bits << 6 | (uint32_t)vectors_digit(*text);
        n_bits += 6;
        if (n_bits < 8) continue;
        n_bits -= 8;
        out[(*n)++] = (uint8_t)(bits >> n_bits);
    }
    return out;
}

/* vectors_array - an array as float32, row-major; *n (may be NULL) its number of values. The caller frees it. */
static inline float *vectors_array(const cJSON *array, size_t *n)
{
    size_t count = 1, bytes = 0, i = 0;
    const cJSON *item, *values = cJSON_GetObjectItemCaseSensitive(array, "values");
    cJSON_ArrayForEach (item, vectors_get(array, "shape")) count *= (size_t)item->valuedouble;
    float *out = malloc((count + 1) * sizeof *out);
    if (!out) exit(2);
    if (n) *n = count;
    if (values) {
        vectors_demand((size_t)cJSON_GetArraySize(values) == count, "values and shape differ");
        cJSON_ArrayForEach (item, values) out[i++] = (float)item->valuedouble;
        return out;
    }
    const char *type = vectors_string(array, "type");
    float scale = strcmp(type, "i8") ? 1 : (float)vectors_number(array, "scale");
    uint8_t *raw = vectors_base64(vectors_string(array, "base64"), &bytes);
    vectors_demand(bytes == count * (strcmp(type, "f32") ? 1 : 4), "base64 and shape differ");
    for (i = 0; i < count && strcmp(type, "f32"); i++)
        out[i] = strcmp(type, "i8") ? (float)raw[i] : (float)(int8_t)raw[i] * scale;
    if (!strcmp(type, "f32")) memcpy(out, raw, bytes);
    free(raw);
    return out;
}

/* vectors_list - a plain list of numbers as doubles; null becomes NaN. The caller frees it. */
static inline double *vectors_list(const cJSON *list, size_t *n)
{
    size_t count = (size_t)cJSON_GetArraySize(list), i = 0;
    double *out = calloc(count + 1, sizeof *out);
    const cJSON *item;
    if (!out) exit(2);
    cJSON_ArrayForEach (item, list) out[i++] = cJSON_IsNumber(item) ? item->valuedouble : (double)NAN;
    if (n) *n = count;
    return out;
}

/* vectors_kept_ok - whether `got` (any order) is the kept list of a selection {kept, cut, loose}: of its length, and
 * different only in positions that the vectors call loose. */
static inline int vectors_kept_ok(const cJSON *selection, const int32_t *got, int n, int n_positions)
{
    char *odd = calloc((size_t)n_positions + 1, 1);
    const cJSON *item, *kept = vectors_get(selection, "kept");
    int ok = odd != NULL && n == cJSON_GetArraySize(kept);
    for (int i = 0; ok && i < n; i++) ok = got[i] >= 0 && got[i] < n_positions;
    if (ok) {
        cJSON_ArrayForEach (item, kept) odd[item->valueint] ^= 1;
        for (int i = 0; i < n; i++) odd[got[i]] ^= 1;
        cJSON_ArrayForEach (item, cJSON_GetObjectItemCaseSensitive(selection, "loose")) odd[item->valueint] = 0;
        for (int i = 0; i < n_positions; i++) ok &= !odd[i];
    }
    free(odd);
    return ok;
}

#endif
