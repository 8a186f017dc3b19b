#include "base/json.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/utf8.h"

enum { MAX_DEPTH = 64 };

/* Depth and \u0000 are checked on the text, before cJSON recurses or cuts a string. */
static int check_text(const char *text, size_t size, const char *what)
{
    int depth = 0;
    bool in_string = false;
    for (size_t i = 0; i < size; i++) {
        char c = text[i];
        if (in_string) {
            if (c == '\\') {
                if (size - i > 5 && !memcmp(text + i, "\\u0000", 6))
                    FAIL(ERR_FORMAT, "%s: \\u0000 in a string at byte %zu is not accepted", what, i);
                i++;
            } else if (c == '"') {
                in_string = false;
            } else if (c == 0) {
                FAIL(ERR_FORMAT, "%s: zero byte in a string at byte %zu", what, i);
            }
        } else if (c == '"') {
            in_string = true;
        } else if (c == '{' || c == '[') {
            if (++depth > MAX_DEPTH) FAIL(ERR_FORMAT, "%s: nested deeper than %d at byte %zu", what, MAX_DEPTH, i);
        } else if (c == '}' || c == ']') {
            depth--;
        }
    }
    return OK;
}

static int compare_keys(const void *a, const void *b)
{
    return strcmp((*(const cJSON *const *)a)->string, (*(const cJSON *const *)b)->string);
}

static int check_duplicates(const cJSON *node, const char *what)
{
    const cJSON *child;
    if (cJSON_IsObject(node)) {
        size_t n = (size_t)cJSON_GetArraySize(node), i = 0;
        const cJSON **sorted = malloc((n ? n : 1) * sizeof *sorted);
        if (!sorted) FAIL(ERR_NOMEM, "%s: out of memory", what);
        cJSON_ArrayForEach (child, node) sorted[i++] = child;
        qsort(sorted, n, sizeof *sorted, compare_keys);
        for (i = 1; i < n; i++) {
            if (strcmp(sorted[i - 1]->string, sorted[i]->string)) continue;
            int rc = status_set(ERR_FORMAT, __FILE__, __LINE__, "%s: key \"%.200s\" stands twice in one object", what,
                                sorted[i]->string);
            free(sorted);
            return rc;
        }
        free(sorted);
    }
    cJSON_ArrayForEach (child, node) {
        if (cJSON_IsObject(child) || cJSON_IsArray(child)) TRY(check_duplicates(child, what));
    }
    return OK;
}

static bool blank(const char *from, const char *end)
{
    while (from < end && (*from == ' ' || *from == '\t' || *from == '\n' || *from == '\r')) from++;
    return from == end;
}

int json_parse(const char *text, size_t size, const char *what, cJSON **out)
{
    const char *end = NULL;
    TRY(check_text(text, size, what));
    cJSON *tree = cJSON_ParseWithLengthOpts(text, size, &end, 0);
    if (!tree) {
        size_t at = end && end >= text && end <= text + size ? (size_t)(end - text) : size;
        FAIL(ERR_FORMAT, "%s: not valid JSON at byte %zu%s", what, at, at >= size ? " (the text ends too early)" : "");
    }
    int rc = OK;
    if (!blank(end, text + size))
        rc = status_set(ERR_FORMAT, __FILE__, __LINE__, "%s: something follows the JSON value at byte %zu", what,
                        (size_t)(end - text));
    if (!rc) rc = check_duplicates(tree, what);
    if (rc) {
        cJSON_Delete(tree);
        return rc;
    }
    *out = tree;
    return OK;
}

int json_parse_file(const char *path, size_t max_bytes, cJSON **out)
{
    char *text;
    size_t size;
    TRY(file_read_all(path, max_bytes, &text, &size));
    int rc = json_parse(text, size, path, out);
    free(text);
    return rc;
}

const cJSON *json_get(const cJSON *object, const char *key)
{
    if (!cJSON_IsObject(object)) return NULL;
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
    return item && !cJSON_IsNull(item) ? item : NULL;
}

static const char *type_name(const cJSON *item)
{
    if (cJSON_IsString(item)) return "a string";
    if (cJSON_IsNumber(item)) return "a number";
    if (cJSON_IsBool(item)) return "a boolean";
    if (cJSON_IsArray(item)) return "an array";
    return cJSON_IsObject(item) ? "an object" : "something else";
}

int json_int(const cJSON *object, const char *what, const char *key, int64_t min, int64_t max, int64_t *out)
{
    const cJSON *item = json_get(object, key);
    if (!item) return OK;
    if (!cJSON_IsNumber(item)) FAIL(ERR_FORMAT, "%s: %s must be an integer, not %s", what, key, type_name(item));
    double v = item->valuedouble;
    if (!isfinite(v) || v != floor(v) || fabs(v) > 9007199254740992.0)
        FAIL(ERR_FORMAT, "%s: %s must be an integer, found %g", what, key, v);
    if (v < (double)min || v > (double)max)
        FAIL(ERR_FORMAT, "%s: %s must lie within %" PRId64 " and %" PRId64 ", found %.0f", what, key, min, max, v);
    *out = (int64_t)v;
    return OK;
}

int json_double(const cJSON *object, const char *what, const char *key, double min, double max, double *out)
{
    const cJSON *item = json_get(object, key);
    if (!item) return OK;
    if (!cJSON_IsNumber(item)) FAIL(ERR_FORMAT, "%s: %s must be a number, not %s", what, key, type_name(item));
    double v = item->valuedouble;
    if (!isfinite(v) || v < min || v > max)
        FAIL(ERR_FORMAT, "%s: %s must lie within %g and %g, found %g", what, key, min, max, v);
    *out = v;
    return OK;
}

int json_bool(const cJSON *object, const char *what, const char *key, bool *out)
{
    const cJSON *item = json_get(object, key);
    if (!item) return OK;
    if (!cJSON_IsBool(item)) FAIL(ERR_FORMAT, "%s: %s must be true or false, not %s", what, key, type_name(item));
    *out = cJSON_IsTrue(item);
    return OK;
}

int json_string(const cJSON *object, const char *what, const char *key, const char **out)
{
    const cJSON *item = json_get(object, key);
    if (!item) return OK;
    if (!cJSON_IsString(item)) FAIL(ERR_FORMAT, "%s: %s must be a string, not %s", what, key, type_name(item));
    *out = item->valuestring;
    return OK;
}

char *json_quote(const char *text, size_t size)
{
    /* Worst case 6 bytes each ("\u001f"), an invalid byte becomes 3. */
    char *out = malloc(size * 6 + 3);
    if (!out) return NULL;
    char *to = out;
    *to++ = '"';
    for (size_t i = 0; i < size;) {
        unsigned char c = (unsigned char)text[i];
        if (c < 0x80) {
            i++;
            const char *escape = strchr("\"\"\\\\\nn\tt\rr\bb\ff", c);
            if (c == '"' || c == '\\') {
                *to++ = '\\';
                *to++ = (char)c;
            } else if (c < 0x20) {
                if (c && escape && escape[1] >= 'a') {
                    *to++ = '\\';
                    *to++ = escape[1];
                } else {
                    to += sprintf(to, "\\u%04x", c);
                }
            } else {
                *to++ = (char)c;
            }
            continue;
        }
        uint32_t code;
        size_t n = utf8_next(text + i, size - i, &code);
        to += utf8_put(code, to);
        i += n;
    }
    *to++ = '"';
    *to = 0;
    return out;
}
