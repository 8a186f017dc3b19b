/* json - strict reading of JSON from files and clients, over cJSON.
 *
 * Stricter than cJSON: nothing may follow the value, nesting is at most 64, a key may not repeat in an object,
 * \u0000 is refused (cJSON would cut the string there), bytes must be UTF-8 or are reported. Getters check type
 * and range and say which key of which object is wrong ("config.json: text_config.hidden_size: ..."). */
#ifndef VITRAIL_BASE_JSON_H
#define VITRAIL_BASE_JSON_H

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* json_parse - one JSON value. `what` names the text in errors. Caller frees *out with cJSON_Delete. */
int json_parse(const char *text, size_t size, const char *what, cJSON **out) MUST_CHECK;

/* json_parse_file - the same for a file of at most max_bytes. */
int json_parse_file(const char *path, size_t max_bytes, cJSON **out) MUST_CHECK;

/* json_get - member of an object, or NULL if absent, or JSON null, or `object` is NULL or no object. */
const cJSON *json_get(const cJSON *object, const char *key);

/* Typed members. An absent or null member leaves *out untouched and is OK: callers preset defaults.
 * Errors: ERR_FORMAT naming what, key, expected and found. json_int: integral and within [min, max];
 * json_double: finite and within [min, max]; json_string: pointer into the tree. */
int json_int(const cJSON *object, const char *what, const char *key, int64_t min, int64_t max, int64_t *out) MUST_CHECK;
int json_double(const cJSON *object, const char *what, const char *key, double min, double max, double *out) MUST_CHECK;
int json_bool(const cJSON *object, const char *what, const char *key, bool *out) MUST_CHECK;
int json_string(const cJSON *object, const char *what, const char *key, const char **out) MUST_CHECK;

/* json_quote - text as a JSON string with its quotes, malloc'd; each invalid UTF-8 sequence becomes U+FFFD. */
char *json_quote(const char *text, size_t size);

#endif
