#include "launch/arguments.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/nearest.h"

enum { MAX_NAME = 128, MAX_NAMES = 256 };

/* Options of every command, beside the keys of the configuration. */
static const char *const common_flags[] = {"help", "print-config", NULL};
static const char *const common_values[] = {"config", "inject-fault", NULL};

struct parser {
    struct arguments *out;
    int argc, at;
    char **argv;
    const char *config_path;
};

static bool listed(const char *const *names, const char *name)
{
    for (; *names; names++)
        if (!strcmp(*names, name)) return true;
    return false;
}

static int unknown_command(const struct command *const *commands, const char *word)
{
    const char *names[MAX_NAMES];
    char list[512] = "";
    int n = 0;
    for (; commands[n]; n++) {
        names[n] = commands[n]->name;
        size_t used = strlen(list);
        snprintf(list + used, sizeof list - used, "%s%s", n ? ", " : "", names[n]);
    }
    names[n] = NULL;
    FAIL(ERR_CONFIG, "unknown command \"%.64s\"; the nearest is \"%s\" (commands: %s; vitrail --help explains them)",
         word, nearest_name(word, names), list);
}

static int unknown_option(const struct command *command, const char *name)
{
    static _Thread_local char own[MAX_NAMES][MAX_NAME];
    const char *names[MAX_NAMES + 1];
    const struct config_key *keys, *row;
    int n = 0, n_keys;
    for (const struct option *o = command->options; o->name; o++) names[n++] = o->name;
    for (int i = 0; common_flags[i]; i++) names[n++] = common_flags[i];
    names[n++] = "config";
    keys = config_keys(&n_keys);
    for (int i = 0; i < n_keys && n < MAX_NAMES; i++, n++)
        names[n] = config_option_name(&keys[i], own[n], sizeof own[n]);
    for (int i = 0; n < MAX_NAMES && config_alias(i, &row); i++, n++) {
        snprintf(own[n], sizeof own[n], "%s", config_alias(i, &row));
        for (char *c = own[n]; *c; c++)
            if (*c == '_') *c = '-';
        names[n] = own[n];
    }
    names[n] = NULL;
    FAIL(ERR_CONFIG, "unknown option --%.64s; the nearest is --%s (vitrail %s --help lists all)", name,
         nearest_name(name, names), command->name);
}

static const struct option *find_option(const struct command *command, const char *name)
{
    for (const struct option *o = command->options; o->name; o++)
        if (!strcmp(o->name, name)) return o;
    return NULL;
}

/* A key of the configuration; the first entry of a list where the command takes one. */
static int set_key(struct parser *p, const struct config_key *key, const char *name, const char *value)
{
    struct arguments *out = p->out;
    char where[MAX_NAME + 2], first[64];
    bool policy = !strcmp(key->path, "kv_cache.policy"), budget = !strcmp(key->path, "kv_cache.budget");
    bool dtype = !strcmp(key->path, "kv_cache.dtype");
    snprintf(where, sizeof where, "--%s", name);
    if ((out->command->lists && (policy || budget)) || (out->command->dtype_lists && dtype)) {
        *(policy ? &out->policies : budget ? &out->budgets : &out->dtypes) = value;
        if (policy && strlen(value) >= sizeof out->config.other_policies)
            FAIL(ERR_CONFIG, "%s: a list of %zu bytes, at most %zu are taken", where, strlen(value),
                 sizeof out->config.other_policies - 1);
        if (policy) snprintf(out->config.other_policies, sizeof out->config.other_policies, "%s", value);
        if (dtype) snprintf(out->config.other_dtypes, sizeof out->config.other_dtypes, "%s", value);
        snprintf(first, sizeof first, "%.*s", (int)strcspn(value, ","), value);
        value = first;
    }
    return config_set(&out->config, key->path, value, where);
}

/* The value after "=" or the next word. */
static int take_value(struct parser *p, const char *name, const char *equals, const char **value)
{
    if (equals) {
        *value = equals + 1;
        return OK;
    }
    if (p->at >= p->argc) FAIL(ERR_CONFIG, "--%s needs a value: --%s VALUE or --%s=VALUE", name, name, name);
    *value = p->argv[p->at++];
    return OK;
}

static int no_value(const char *name, const char *equals)
{
    if (equals) FAIL(ERR_CONFIG, "--%s takes no value, found \"%.64s\"", name, equals + 1);
    return OK;
}

static void add_given(struct arguments *out, const struct option *option, const char *value)
{
    out->given[out->n].option = option;
    out->given[out->n++].value = value;
}

/* One word that begins with "--". In the first pass only --config counts, so that options override its file. */
static int take_option(struct parser *p, const char *word, bool first_pass)
{
    struct arguments *out = p->out;
    const struct command *command = out->command;
    char name[MAX_NAME];
    const char *equals = strchr(word, '='), *value = "";
    size_t length = equals ? (size_t)(equals - word) : strlen(word);
    if (length >= sizeof name) FAIL(ERR_CONFIG, "unknown option --%.64s...", word);
    for (size_t i = 0; i <= length; i++) name[i] = i == length ? 0 : word[i] == '_' ? '-' : word[i];
    const struct option *option = find_option(command, name);
    const struct config_key *key = option ? NULL : config_find_option(name);
    bool flag = option ? !option->value : listed(common_flags, name);
    if (!option && !key && !flag && !listed(common_values, name)) return unknown_option(command, name);
    if (flag)
        TRY(no_value(name, equals));
    else
        TRY(take_value(p, name, equals, &value));
    if (first_pass) {
        if (!strcmp(name, "config")) p->config_path = value;
        if (!strcmp(name, "help")) out->help = true;
        return OK;
    }
    if (option)
        add_given(out, option, value);
    else if (key)
        return set_key(p, key, name, value);
    else if (!strcmp(name, "print-config"))
        out->print_config = true;
    else if (!strcmp(name, "inject-fault"))
        out->inject_fault = value;
    return OK;
}

static int take_all(struct parser *p, bool first_pass)
{
    p->at = 2;
    while (p->at < p->argc) {
        const char *word = p->argv[p->at++];
        if (!strcmp(word, "-h")) word = "--help";
        if (strncmp(word, "--", 2) != 0 || !word[2])
            FAIL(ERR_CONFIG, "\"%.64s\" is no option: options begin with two dashes (vitrail %s --help lists them)",
                 word, p->out->command->name);
        TRY(take_option(p, word + 2, first_pass));
    }
    return OK;
}

int arguments_parse(const struct command *const *commands, int argc, char **argv, struct arguments *out)
{
    struct parser p = {.out = out, .argc = argc, .argv = argv};
    memset(out, 0, sizeof *out);
    TRY(config_defaults(&out->config));
    const char *word = argc > 1 ? argv[1] : "";
    out->help = !strcmp(word, "--help") || !strcmp(word, "-h") || !strcmp(word, "help");
    out->version = !strcmp(word, "--version");
    if (out->help || out->version) return OK;
    if (argc < 2) FAIL(ERR_CONFIG, "no command; vitrail --help lists them");
    for (int i = 0; commands[i]; i++)
        if (!strcmp(commands[i]->name, word)) out->command = commands[i];
    if (!out->command) return unknown_command(commands, word);
    out->given = calloc((size_t)argc, sizeof *out->given);
    if (!out->given) FAIL(ERR_NOMEM, "no memory for the command line");
    TRY(take_all(&p, true));
    if (out->help) return OK;
    if (p.config_path) TRY(config_load_yaml(&out->config, p.config_path));
    TRY(take_all(&p, false));
    const char *modelless = out->command->modelless;
    out->needs_model = out->command->needs_model && !(modelless && arguments_text(out, modelless));
    if (out->print_config || !out->needs_model) return OK;
    return config_check(&out->config);
}

void arguments_free(struct arguments *arguments)
{
    free(arguments->given);
    arguments->given = NULL;
    arguments->n = 0;
}

const char *arguments_nth(const struct arguments *arguments, const char *name, int i)
{
    for (int j = 0; j < arguments->n; j++)
        if (!strcmp(arguments->given[j].option->name, name) && i-- == 0) return arguments->given[j].value;
    return NULL;
}

const char *arguments_text(const struct arguments *arguments, const char *name)
{
    for (int j = arguments->n; j-- > 0;)
        if (!strcmp(arguments->given[j].option->name, name)) return arguments->given[j].value;
    return NULL;
}

bool arguments_flag(const struct arguments *arguments, const char *name)
{
    return arguments_text(arguments, name) != NULL;
}

int arguments_int(const struct arguments *arguments, const char *name, int64_t min, int64_t max, int64_t *out)
{
    const char *text = arguments_text(arguments, name);
    char *end;
    if (!text) return OK;
    errno = 0;
    int64_t v = strtoll(text, &end, 10);
    if (errno || end == text || *end || v < min || v > max)
        FAIL(ERR_CONFIG, "--%s must be a whole number, %" PRId64 " to %" PRId64 "; found \"%.64s\"", name, min, max,
             text);
    *out = v;
    return OK;
}

int arguments_double(const struct arguments *arguments, const char *name, double min, double max, double *out)
{
    const char *text = arguments_text(arguments, name);
    char *end;
    if (!text) return OK;
    double v = strtod(text, &end);
    if (end == text || *end || !isfinite(v) || v < min || v > max)
        FAIL(ERR_CONFIG, "--%s must be a number, %g to %g; found \"%.64s\"", name, min, max, text);
    *out = v;
    return OK;
}
