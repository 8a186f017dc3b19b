#include "base/yaml.h"

#include <stdlib.h>
#include <string.h>
#include <yaml.h>

struct reader {
    yaml_parser_t parser;
    const char *what;
    int (*on_entry)(void *arg, const struct yaml_entry *entry);
    void *arg;
    char path[YAML_MAX_PATH];
    int n_seen;
    struct {
        char *path;
        size_t line;
    } seen[YAML_MAX_KEYS];
};

/* Fails at a place of the text; lines and columns are counted from 1. */
#define FAIL_AT(r, mark, ...)                                                                                          \
    do {                                                                                                               \
        yaml_mark_t at_ = (mark);                                                                                      \
        (void)status_set(ERR_CONFIG, __FILE__, __LINE__, __VA_ARGS__);                                                 \
        return status_prefix(ERR_CONFIG, "%s:%zu:%zu", (r)->what, at_.line + 1, at_.column + 1);                       \
    } while (0)

static int next_event(struct reader *r, yaml_event_t *event)
{
    if (yaml_parser_parse(&r->parser, event)) return OK;
    const yaml_parser_t *p = &r->parser;
    if (p->error == YAML_MEMORY_ERROR) FAIL(ERR_NOMEM, "%s: no memory for reading YAML", r->what);
    if (p->error == YAML_READER_ERROR)
        FAIL(ERR_CONFIG, "%s: byte %zu: %s; a YAML file is UTF-8 text", r->what, p->problem_offset,
             p->problem ? p->problem : "cannot be read");
    const char *tab =
        p->problem && strstr(p->problem, "cannot start any token") ? " (a tab? YAML is indented by spaces)" : "";
    FAIL_AT(r, p->problem_mark, "not valid YAML: %s%s%s%s", p->problem ? p->problem : "syntax error",
            p->context ? ", " : "", p->context ? p->context : "", tab);
}

static const char *refused(const yaml_event_t *e)
{
    switch (e->type) {
    case YAML_ALIAS_EVENT: return "an alias (*name) is not accepted here: write the value out";
    case YAML_SEQUENCE_START_EVENT: return "a list is not accepted here: every key takes one value or a map";
    case YAML_SCALAR_EVENT:
        if (e->data.scalar.anchor) return "an anchor (&name) is not accepted here: write the values out";
        if (e->data.scalar.tag) return "a tag (!type) is not accepted here: leave it out";
        if (memchr(e->data.scalar.value, 0, e->data.scalar.length)) return "a zero byte is not accepted in a value";
        return NULL;
    case YAML_MAPPING_START_EVENT:
        if (e->data.mapping_start.anchor) return "an anchor (&name) is not accepted here: write the values out";
        return e->data.mapping_start.tag ? "a tag (!type) is not accepted here: leave it out" : NULL;
    default: return NULL;
    }
}

/* Appends a key to the path; *length is the path's length, grown on success. */
static int enter_key(struct reader *r, const yaml_event_t *e, size_t *length)
{
    const char *key = (const char *)e->data.scalar.value;
    size_t n = e->data.scalar.length;
    bool word = n > 0;
    for (size_t i = 0; i < n; i++)
        word &= (key[i] >= 'a' && key[i] <= 'z') || (key[i] >= 'A' && key[i] <= 'Z') ||
                (key[i] >= '0' && key[i] <= '9') || key[i] == '_' || key[i] == '-';
    if (!word) FAIL_AT(r, e->start_mark, "\"%.80s\" is no key: a key is a word of letters, digits and '_'", key);
    if (*length + 1 + n >= sizeof r->path) FAIL_AT(r, e->start_mark, "unknown key \"%.80s...\": too long", key);
    if (*length) r->path[(*length)++] = '.';
    memcpy(r->path + *length, key, n + 1);
    *length += n;
    for (int i = 0; i < r->n_seen; i++)
        if (!strcmp(r->seen[i].path, r->path))
            FAIL_AT(r, e->start_mark, "key \"%s\" stands twice, first in line %zu; keep one", r->path, r->seen[i].line);
    if (r->n_seen == YAML_MAX_KEYS) FAIL_AT(r, e->start_mark, "more than %d keys", YAML_MAX_KEYS);
    char *copy = strdup(r->path);
    if (!copy) FAIL(ERR_NOMEM, "%s: no memory for reading YAML", r->what);
    r->seen[r->n_seen].path = copy;
    r->seen[r->n_seen++].line = e->start_mark.line + 1;
    return OK;
}

static int read_map(struct reader *r, size_t length, int depth);

/* The value that belongs to `key`, whose path is complete. */
static int read_value(struct reader *r, yaml_mark_t key, size_t length, int depth)
{
    yaml_event_t e;
    TRY(next_event(r, &e));
    struct yaml_entry entry = {
        r->path, NULL, false, key.line + 1, key.column + 1, e.start_mark.line + 1, e.start_mark.column + 1};
    yaml_mark_t mark = e.start_mark;
    const char *why = refused(&e);
    int rc = OK;
    bool map = e.type == YAML_MAPPING_START_EVENT;
    if (!why && !map) {
        entry.value = (const char *)e.data.scalar.value;
        entry.quoted = e.data.scalar.style != YAML_PLAIN_SCALAR_STYLE;
    }
    if (!why) rc = r->on_entry(r->arg, &entry);
    yaml_event_delete(&e);
    if (why) FAIL_AT(r, mark, "%s: %s", r->path, why);
    if (rc || !map) return rc;
    if (depth == YAML_MAX_DEPTH) FAIL_AT(r, mark, "maps are nested deeper than %d", YAML_MAX_DEPTH);
    return read_map(r, length, depth + 1);
}

static int read_map(struct reader *r, size_t length, int depth)
{
    for (;;) {
        yaml_event_t e;
        TRY(next_event(r, &e));
        yaml_mark_t mark = e.start_mark;
        bool end = e.type == YAML_MAPPING_END_EVENT;
        const char *why = refused(&e);
        if (!end && !why && e.type != YAML_SCALAR_EVENT) why = "a key must be a word, not a map";
        size_t inner = length;
        int rc = end || why ? OK : enter_key(r, &e, &inner);
        yaml_event_delete(&e);
        if (end) return OK;
        if (why) FAIL_AT(r, mark, "%s", why);
        if (!rc) rc = read_value(r, mark, inner, depth);
        if (rc) return rc;
        r->path[length] = 0;
    }
}

static int read_document(struct reader *r)
{
    yaml_event_t e;
    for (;;) {
        TRY(next_event(r, &e));
        yaml_event_type_t type = e.type;
        yaml_mark_t mark = e.start_mark;
        const char *why = refused(&e);
        bool empty = type == YAML_SCALAR_EVENT && !e.data.scalar.length && e.data.scalar.plain_implicit;
        yaml_event_delete(&e);
        if (type == YAML_STREAM_END_EVENT) return OK;
        if (type == YAML_STREAM_START_EVENT || type == YAML_DOCUMENT_START_EVENT || type == YAML_DOCUMENT_END_EVENT)
            continue;
        if (empty && !why) continue;
        if (why) FAIL_AT(r, mark, "%s", why);
        if (type != YAML_MAPPING_START_EVENT) FAIL_AT(r, mark, "expected lines of \"key: value\", found a bare value");
        break;
    }
    TRY(read_map(r, 0, 1));
    TRY(next_event(r, &e)); /* the document's end */
    yaml_event_delete(&e);
    TRY(next_event(r, &e));
    bool more = e.type != YAML_STREAM_END_EVENT;
    yaml_mark_t mark = e.start_mark;
    yaml_event_delete(&e);
    if (more) FAIL_AT(r, mark, "a second document follows; one file holds one document");
    return OK;
}

int yaml_read(const char *text, size_t size, const char *what,
              int (*on_entry)(void *arg, const struct yaml_entry *entry), void *arg)
{
    if (size > YAML_MAX_BYTES) FAIL(ERR_CONFIG, "%s: %zu bytes of YAML, the limit is %d", what, size, YAML_MAX_BYTES);
    struct reader *r = calloc(1, sizeof *r);
    if (!r || !yaml_parser_initialize(&r->parser)) {
        free(r);
        FAIL(ERR_NOMEM, "%s: no memory for reading YAML", what);
    }
    r->what = what;
    r->on_entry = on_entry;
    r->arg = arg;
    yaml_parser_set_encoding(&r->parser, YAML_UTF8_ENCODING);
    yaml_parser_set_input_string(&r->parser, (const unsigned char *)text, size);
    int rc = read_document(r);
    yaml_parser_delete(&r->parser);
    for (int i = 0; i < r->n_seen; i++) free(r->seen[i].path);
    free(r);
    return rc;
}
