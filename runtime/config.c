#include "runtime/config.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/hash.h"
#include "base/nearest.h"
#include "base/yaml.h"
#include "runtime/config_value.h"

enum { MAX_NAMES = 128, MAX_KEYS = 128 };

int config_defaults(struct config *config)
{
    int n;
    const struct config_key *key = config_keys(&n);
    memset(config, 0, sizeof *config);
    for (int i = 0; i < n; i++, key++) {
        int rc = config__parse(key, (char *)config + key->offset, key->preset);
        if (rc) FAIL(ERR_BUG, "the default of a key is refused: %s", status_message());
    }
    return OK;
}

/* The nearest key or alias, by which a typing error is shown its cure. */
static const char *nearest_key(const char *path)
{
    const char *names[MAX_NAMES + 1];
    const struct config_key *row;
    const char *alias;
    int n, count = 0;
    const struct config_key *keys = config_keys(&n);
    for (int i = 0; i < n && count < MAX_NAMES; i++) names[count++] = keys[i].path;
    for (int i = 0; (alias = config_alias(i, &row)) && count < MAX_NAMES; i++) names[count++] = alias;
    names[count] = NULL;
    return nearest_name(path, names);
}

/* True if keys stand below this one: "kv_cache". */
static bool is_map(const char *path)
{
    int n;
    size_t length = strlen(path);
    const struct config_key *keys = config_keys(&n);
    for (int i = 0; i < n; i++)
        if (!strncmp(keys[i].path, path, length) && keys[i].path[length] == '.') return true;
    return false;
}

int config_set(struct config *config, const char *key, const char *value, const char *where)
{
    const struct config_key *row = config_find(key);
    int rc;
    if (!row) FAIL(ERR_CONFIG, "%s: unknown key \"%.200s\"; the nearest is \"%s\"", where, key, nearest_key(key));
    rc = config__parse(row, (char *)config + row->offset, value);
    return rc ? status_prefix(rc, "%s", where) : OK;
}

/* ---- YAML ---- */

struct yaml_load {
    struct config *config;
    const char *what;
    size_t line_of[MAX_KEYS]; /* where a row was set, 0: not yet; a row has several names */
};

static int on_entry(void *arg, const struct yaml_entry *e)
{
    struct yaml_load *load = arg;
    const char *what = load->what;
    const struct config_key *row = config_find(e->path);
    int n;
    bool map = is_map(e->path);
    if (!row && !map)
        FAIL(ERR_CONFIG, "%s:%zu:%zu: unknown key \"%s\"; the nearest is \"%s\"", what, e->line, e->column, e->path,
             nearest_key(e->path));
    if (map && !e->value) return OK;
    if (map && !*e->value && !e->quoted) return OK; /* "kv_cache:" with every line below it commented out */
    if (map)
        FAIL(ERR_CONFIG, "%s:%zu:%zu: %s is a map of keys (see --help), found the value \"%.80s\"", what, e->value_line,
             e->value_column, e->path, e->value);
    if (!e->value)
        FAIL(ERR_CONFIG, "%s:%zu:%zu: %s takes one value, found a map", what, e->value_line, e->value_column, e->path);
    if (!e->quoted && (!*e->value || !strcmp(e->value, "~") || !strcasecmp(e->value, "null")))
        FAIL(ERR_CONFIG, "%s:%zu:%zu: %s has no value; give one, or leave the key out for its default", what, e->line,
             e->column, e->path);
    size_t *line = &load->line_of[row - config_keys(&n)];
    if (*line)
        FAIL(ERR_CONFIG, "%s:%zu:%zu: %s is set already in line %zu, by another of its names; keep one", what, e->line,
             e->column, row->path, *line);
    *line = e->line;
    int rc = config__parse(row, (char *)load->config + row->offset, e->value);
    return rc ? status_prefix(rc, "%s:%zu:%zu", what, e->value_line, e->value_column) : OK;
}

int config_load_yaml_memory(struct config *config, const char *text, size_t size, const char *what)
{
    struct yaml_load load = {.config = config, .what = what};
    int n;
    (void)config_keys(&n);
    if (n > MAX_KEYS) FAIL(ERR_BUG, "%d keys in the table, room for %d", n, MAX_KEYS);
    return yaml_read(text, size, what, on_entry, &load);
}

int config_load_yaml(struct config *config, const char *path)
{
    char *text;
    size_t size;
    int rc = file_read_all(path, CONFIG_MAX_FILE, &text, &size);
    if (rc) return status_prefix(ERR_CONFIG, "configuration file");
    rc = config_load_yaml_memory(config, text, size, path);
    free(text);
    return rc;
}

int config_check(const struct config *config)
{
    const struct vl_cache_options *vl = &config->kv_cache.vl_cache;
    TRY(policy_check(&config->kv_cache));
    if (!*config->model)
        FAIL(ERR_CONFIG, "no model: give one by \"model: PATH\" in the --config file or by --model PATH");
    if (vl->clip_min > vl->clip_max)
        FAIL(ERR_CONFIG, "kv_cache.vl_cache.clip_min is %g, above clip_max, %g; lower one or raise the other",
             vl->clip_min, vl->clip_max);
    const struct {
        const char *key;
        int value;
    } kernels[] = {{"vl_cache", vl->kernel},
                   {"snapkv", config->kv_cache.snapkv.kernel},
                   {"pyramid_kv", config->kv_cache.pyramid_kv.kernel}};
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
        if (kernels[i].value % 2 == 0)
            FAIL(ERR_CONFIG,
                 "kv_cache.%s.kernel is %d; a token's own score is the middle of its average: give an odd one",
                 kernels[i].key, kernels[i].value);
    if (config->max_num_batched_tokens < config->max_num_seqs)
        FAIL(ERR_CONFIG,
             "max_num_batched_tokens is %d, below max_num_seqs, %d: a decode step has a token of each running "
             "sequence; raise the one or lower the other",
             config->max_num_batched_tokens, config->max_num_seqs);
    return OK;
}

/* ---- print and hash ---- */

int config_print(const struct config *config, FILE *out)
{
    int n;
    const struct config_key *key = config_keys(&n);
    char map[128] = "";
    for (int i = 0; i < n; i++, key++) {
        /* Open the maps of this path that the row before was not in. */
        const char *name = key->path;
        int depth = 0;
        for (const char *dot = strchr(name, '.'); dot; dot = strchr(name, '.'), depth++) {
            size_t length = (size_t)(dot - key->path);
            if (strncmp(map, key->path, length) != 0 || (map[length] && map[length] != '.')) {
                fprintf(out, "%*s%.*s:\n", 2 * depth, "", (int)(dot - name), name);
                snprintf(map, sizeof map, "%.*s", (int)length, key->path);
            }
            name = dot + 1;
        }
        char *value = config_value(config, key);
        if (!value) FAIL(ERR_NOMEM, "no memory to print the configuration");
        fprintf(out, "%*s%s: %s\n", 2 * depth, "", name, value);
        free(value);
    }
    if (fflush(out) || ferror(out)) FAIL(ERR_IO, "cannot print the configuration: %s", strerror(errno));
    return OK;
}

uint64_t config_hash(const struct config *config)
{
    int n;
    const struct config_key *key = config_keys(&n);
    uint64_t hash = 0;
    for (int i = 0; i < n; i++, key++) {
        const char *place = (const char *)config + key->offset;
        bool text = key->type == CONFIG_TEXT || key->type == CONFIG_POLICY;
        if (key->local) continue;
        size_t size = text ? strlen(place) : key->size;
        if (key->type == CONFIG_BUDGET) { /* a struct, whose padding is no value */
            const struct kv_budget *budget = (const void *)place;
            hash = hash_mix(hash, hash_bytes(&budget->tokens, sizeof budget->tokens));
            place = (const char *)&budget->share;
            size = sizeof budget->share;
        }
        hash = hash_mix(hash, hash_bytes(place, size));
    }
    return hash;
}
