/* yaml - strict reading of small YAML files: maps of scalars, as events with their place in the text. libyaml stays in
 * yaml.c.
 *
 * Only what a deployment file needs: one document, a map at the root, maps inside it, scalars. Lists, tags, anchors and
 * aliases are refused by name; so are a key that stands twice in a map, keys other than words (letters, digits, '_',
 * '-'), zero bytes, and anything past the caps below. What a key means, and what its value may be, is the caller's. */
#ifndef VITRAIL_BASE_YAML_H
#define VITRAIL_BASE_YAML_H

#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"

enum {
    YAML_MAX_BYTES = 1 << 20, /* of a document */
    YAML_MAX_DEPTH = 16,      /* maps inside maps */
    YAML_MAX_KEYS = 4096,     /* in a document */
    YAML_MAX_PATH = 256       /* bytes of "outer.inner.key" with its NUL */
};

/* One key of the document, valid during the callback. */
struct yaml_entry {
    const char *path;    /* "kv_cache.policy": the keys from the root, joined by dots */
    const char *value;   /* the scalar's text, NUL-terminated; NULL: a map follows */
    bool quoted;         /* the scalar stood in quotes or was a block, so that "" and "~" are text, not nothing */
    size_t line, column; /* of the key, from 1 */
    size_t value_line, value_column;
};

/* yaml_read - calls on_entry for every key, in order; its error ends the reading and is returned as it is.
 * `what` names the text in errors. Errors: ERR_CONFIG, "what:line:column: ...". */
int yaml_read(const char *text, size_t size, const char *what,
              int (*on_entry)(void *arg, const struct yaml_entry *entry), void *arg) MUST_CHECK;

#endif
