/* config_value - one value of the configuration from text and to text, by the type of its row. */
#include "runtime/config_value.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/nearest.h"
#include "base/utf8.h"

static const struct {
    const char *suffix;
    int shift;
} units[] = {{"KiB", 10}, {"MiB", 20}, {"GiB", 30}, {"TiB", 40}};
enum { N_UNITS = sizeof units / sizeof *units };

/* Digits, sign, point and exponent only: strtod would also take "nan", "inf" and hexadecimal. */
static bool parse_number(const char *text, double *out, const char **end)
{
    size_t n = strspn(text, "0123456789+-.eE");
    char buf[64], *stop;
    if (!n || n >= sizeof buf) return false;
    memcpy(buf, text, n);
    buf[n] = 0;
    *out = strtod(buf, &stop);
    *end = text + n;
    return !*stop && isfinite(*out);
}

static bool parse_integer(const char *text, int64_t *out)
{
    const char *digits = text + (*text == '-' || *text == '+');
    if (!*digits || digits[strspn(digits, "0123456789")]) return false;
    errno = 0;
    *out = strtoll(text, NULL, 10);
    return errno == 0;
}

static const char *range_text(const struct config_key *key, char *buf, size_t size)
{
    const char *or_auto = key->automatic ? ", or auto" : "";
    if (key->min >= key->max)
        snprintf(buf, size, "%.15g%s", key->min, or_auto);
    else
        snprintf(buf, size, "%.15g to %.15g%s", key->min, key->max, or_auto);
    return buf;
}

static int set_integer(const struct config_key *key, void *place, int64_t v)
{
    if (key->size == sizeof(int)) {
        int narrow = (int)v;
        memcpy(place, &narrow, sizeof narrow);
    } else {
        memcpy(place, &v, sizeof v);
    }
    return OK;
}

static int parse_int(const struct config_key *key, void *place, const char *text)
{
    char range[96];
    int64_t v;
    if (key->automatic && !strcmp(text, "auto")) return set_integer(key, place, 0);
    if (!parse_integer(text, &v))
        FAIL(ERR_CONFIG, "%s must be a whole number, %s; found \"%.80s\"", key->path,
             range_text(key, range, sizeof range), text);
    if ((double)v < key->min || (double)v > key->max)
        FAIL(ERR_CONFIG, "%s must be %s; found %" PRId64, key->path, range_text(key, range, sizeof range), v);
    return set_integer(key, place, v);
}

static int parse_bytes(const struct config_key *key, void *place, const char *text)
{
    double v;
    const char *end;
    const char *or_auto = key->automatic ? ", or auto" : "";
    if (key->automatic && !strcmp(text, "auto")) return set_integer(key, place, 0);
    bool good = parse_number(text, &v, &end);
    while (good && *end == ' ') end++;
    int unit = -1;
    for (int i = 0; good && i < N_UNITS; i++)
        if (!strcmp(end, units[i].suffix)) unit = i;
    if (!good || (*end && unit < 0))
        FAIL(ERR_CONFIG, "%s must be a number of bytes such as 1048576, 512KiB, 256MiB or 4GiB%s; found \"%.80s\"",
             key->path, or_auto, text);
    if (unit >= 0) v = ldexp(v, units[unit].shift);
    if (v < key->min || v > key->max)
        FAIL(ERR_CONFIG, "%s must be %.15g to %.15g bytes%s; found %.15g", key->path, key->min, key->max, or_auto, v);
    return set_integer(key, place, (int64_t)v);
}

static int parse_seed(const struct config_key *key, void *place, const char *text)
{
    errno = 0;
    bool digits = *text && !text[strspn(text, "0123456789")];
    uint64_t v = digits ? strtoull(text, NULL, 10) : 0;
    if (!digits || errno)
        FAIL(ERR_CONFIG, "%s must be a whole number, 0 to %" PRIu64 "; found \"%.80s\"", key->path, UINT64_MAX, text);
    memcpy(place, &v, sizeof v);
    return OK;
}

static int parse_double(const struct config_key *key, void *place, const char *text)
{
    char range[96];
    double v;
    const char *end;
    if (!parse_number(text, &v, &end) || *end)
        FAIL(ERR_CONFIG, "%s must be a number, %s; found \"%.80s\"", key->path, range_text(key, range, sizeof range),
             text);
    if (v < key->min || v > key->max)
        FAIL(ERR_CONFIG, "%s must be %s; found %.80s", key->path, range_text(key, range, sizeof range), text);
    if (v == 0) v = 0; /* -0 would print as another text than it hashes to */
    memcpy(place, &v, sizeof v);
    return OK;
}

/* "a, b or c" of the first n names (all if n is 0). */
static const char *list_names(const char *const *names, int n, char *buf, size_t size)
{
    int count = 0;
    while (names[count] && (!n || count < n)) count++;
    buf[0] = 0;
    for (int i = 0; i < count; i++) {
        size_t used = strlen(buf);
        const char *between = i == 0 ? "" : i == count - 1 ? " or " : ", ";
        snprintf(buf + used, size - used, "%s%s", between, names[i]);
    }
    return buf;
}

static int find_choice(const struct config_key *key, const char *text, int *out)
{
    char list[256];
    int i = 0;
    while (key->names[i] && strcmp(key->names[i], text) != 0) i++;
    if (!key->names[i]) {
        FAIL(ERR_CONFIG, "%s must be %s; found \"%.80s\" (nearest: %s)", key->path,
             list_names(key->names, key->n_served, list, sizeof list), text, nearest_name(text, key->names));
    }
    if (key->n_served && i >= key->n_served)
        FAIL(ERR_CONFIG, "%s: %s is not served by this build; it serves %s", key->path, text,
             list_names(key->names, key->n_served, list, sizeof list));
    *out = i;
    return OK;
}

/* What YAML cannot print as it stands is no path or name either. */
static bool printable(const char *text)
{
    for (size_t left = strlen(text); left > 0;) {
        uint32_t c;
        size_t n = utf8_next(text, left, &c);
        if (c < 0x20 || (c >= 0x7f && c < 0xa0) || c == 0x2028 || c == 0x2029 || c == 0xfeff || c >= 0xfffd) {
            if (c < 0x10000) return false;
        }
        text += n;
        left -= n;
    }
    return true;
}

static int parse_text(const struct config_key *key, void *place, const char *text)
{
    const struct policy_vt *policy;
    int choice;
    if (!printable(text)) FAIL(ERR_CONFIG, "%s: the value holds control characters or is not UTF-8", key->path);
    if (strlen(text) >= key->size)
        FAIL(ERR_CONFIG, "%s: the value has %zu bytes, the limit is %zu", key->path, strlen(text), key->size - 1);
    if (key->names) TRY(find_choice(key, text, &choice));
    if (key->type == CONFIG_POLICY) TRY(policy_find(text, &policy));
    memset(place, 0, key->size);
    memcpy(place, text, strlen(text));
    return OK;
}

static int parse_budget(const struct config_key *key, void *place, const char *text)
{
    struct kv_budget budget;
    int rc = kv_budget_parse(text, &budget);
    if (rc) return status_prefix(rc, "%s", key->path);
    memcpy(place, &budget, sizeof budget);
    return OK;
}

int config__parse(const struct config_key *key, void *place, const char *text)
{
    int choice = 0;
    switch (key->type) {
    case CONFIG_TEXT:
    case CONFIG_POLICY: return parse_text(key, place, text);
    case CONFIG_CHOICE: TRY(find_choice(key, text, &choice)); return set_integer(key, place, choice);
    case CONFIG_INT: return parse_int(key, place, text);
    case CONFIG_BYTES: return parse_bytes(key, place, text);
    case CONFIG_SEED: return parse_seed(key, place, text);
    case CONFIG_DOUBLE: return parse_double(key, place, text);
    case CONFIG_BUDGET: return parse_budget(key, place, text);
    }
    FAIL(ERR_BUG, "%s: a row of unknown type %d", key->path, key->type);
}

/* ---- printing ---- */

static int64_t get_integer(const struct config_key *key, const void *place)
{
    int narrow;
    int64_t wide;
    if (key->size == sizeof narrow) {
        memcpy(&narrow, place, sizeof narrow);
        return narrow;
    }
    memcpy(&wide, place, sizeof wide);
    return wide;
}

static void print_double(double v, char *buf, size_t size)
{
    for (int digits = 6; digits <= 17; digits++) {
        snprintf(buf, size, "%.*g", digits, v);
        if (strtod(buf, NULL) == v) return;
    }
}

static void print_bytes(int64_t v, char *buf, size_t size)
{
    for (int i = N_UNITS; v && i-- > 0;) {
        if (v & ((INT64_C(1) << units[i].shift) - 1)) continue;
        snprintf(buf, size, "%" PRId64 "%s", v >> units[i].shift, units[i].suffix);
        return;
    }
    snprintf(buf, size, "%" PRId64, v);
}

/* Plain where YAML surely reads the text back as it is, else in double quotes. */
static char *print_text(const char *text)
{
    static const char safe[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./+-";
    size_t n = strlen(text);
    bool plain = n && !text[strspn(text, safe)] && (text[0] == '.' || text[0] == '/' || text[0] > '9') &&
                 strcmp(text, "null") != 0 && strcmp(text, "Null") != 0 && strcmp(text, "NULL") != 0 &&
                 strcmp(text, "...") != 0;
    char *out = malloc(2 * n + 3), *to = out;
    if (!out) return NULL;
    if (!plain) *to++ = '"';
    for (size_t i = 0; i < n; i++) {
        if (text[i] == '"' || text[i] == '\\') *to++ = '\\';
        *to++ = text[i];
    }
    if (!plain) *to++ = '"';
    *to = 0;
    return out;
}

char *config_value(const struct config *config, const struct config_key *key)
{
    const void *place = (const char *)config + key->offset;
    struct kv_budget budget;
    uint64_t seed;
    double real;
    char buf[64] = "";
    if (key->automatic && get_integer(key, place) == 0) return strdup("auto");
    switch (key->type) {
    case CONFIG_TEXT:
    case CONFIG_POLICY: return print_text(place);
    case CONFIG_CHOICE: return strdup(key->names[get_integer(key, place)]);
    case CONFIG_INT: snprintf(buf, sizeof buf, "%" PRId64, get_integer(key, place)); break;
    case CONFIG_BYTES: print_bytes(get_integer(key, place), buf, sizeof buf); break;
    case CONFIG_SEED:
        memcpy(&seed, place, sizeof seed);
        snprintf(buf, sizeof buf, "%" PRIu64, seed);
        break;
    case CONFIG_DOUBLE:
        memcpy(&real, place, sizeof real);
        print_double(real, buf, sizeof buf);
        break;
    case CONFIG_BUDGET:
        memcpy(&budget, place, sizeof budget);
        if (budget.tokens)
            kv_budget_print(budget, buf, sizeof buf);
        else
            print_double(budget.share, buf, sizeof buf); /* all digits: it must load back to the same */
        break;
    }
    return strdup(buf);
}
