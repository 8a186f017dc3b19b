/* tokenizer_regex - regular expressions of tokenizer files, on PCRE2 with the meaning that Oniguruma gives them.
 *
 * The two disagree on \s (PCRE2 adds U+180E), \w, \h, \v, \uHHHH and on nested classes, and their Unicode tables differ
 * in age. So an expression is rewritten item by item; what has no equal is refused by name. A literal string needs no
 * regex and is searched directly. Steps per match are limited, so that a hostile text or pattern costs bounded time. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdlib.h>

#include "base/utf8.h"
#include "model/tokenizer_internal.h"
#include "model/tokenizer_regex_tables.h"

struct tokenizer_regex {
    pcre2_code *code; /* NULL: literal */
    char *literal;
    size_t literal_size;
    char pattern[120]; /* for messages, cut */
};

/* One item of the source language: its spelling, and its members as they may stand inside a class. `negated` ones are
 * written [^...] outside a class and have no spelling inside one, unless `inside` says so. */
struct item {
    const char *from, *members;
    bool negated;
    const char *inside;
};
#define CATEGORY(name, more)                                                                                           \
    {"\\p{" name "}", "\\p{" name "}" more, false, NULL}, {"\\P{" name "}", "\\p{" name "}" more, true, NULL},         \
    {                                                                                                                  \
        "\\p{^" name "}", "\\p{" name "}" more, true, NULL                                                             \
    }
static const struct item items[] = {
    CATEGORY("L", NEW_LETTERS),
    CATEGORY("Lu", NEW_UPPERCASE),
    CATEGORY("Ll", NEW_LOWERCASE),
    CATEGORY("Lm", NEW_MODIFIERS),
    CATEGORY("Lo", NEW_OTHER_LETTERS),
    CATEGORY("M", NEW_MARKS),
    CATEGORY("N", NEW_NUMBERS),
    CATEGORY("Nd", NEW_DIGITS),
    CATEGORY("P", NEW_PUNCTUATION),
    CATEGORY("S", NEW_SYMBOLS),
    {"\\s", "\\p{White_Space}", false, NULL},
    {"\\S", "\\p{White_Space}", true, "\\P{White_Space}"},
    {"\\d", "\\p{Nd}" NEW_DIGITS, false, NULL},
    {"\\D", "\\p{Nd}" NEW_DIGITS, true, NULL},
    {"\\w", "\\p{Alphabetic}\\p{M}\\p{N}\\p{Pc}" NEW_LETTERS NEW_MARKS NEW_NUMBERS, false, NULL},
    {"\\W", "\\p{Alphabetic}\\p{M}\\p{N}\\p{Pc}" NEW_LETTERS NEW_MARKS NEW_NUMBERS, true, NULL},
    {"\\h", "0-9a-fA-F", false, NULL},
    {"\\H", "0-9a-fA-F", true, NULL},
    {"\\v", "\\x0b", false, NULL},
};

struct translation {
    const char *pattern, *at, *end, *what;
    bool in_class;
    struct tokenizer_buffer out;
};

static int put(struct translation *r, const char *text) { return tokenizer__append(&r->out, text, strlen(text)); }

static int refuse(const struct translation *r, size_t size)
{
    size_t left = (size_t)(r->end - r->at);
    FAIL(ERR_UNSUPPORTED, "%s: regular expression \"%.200s\": \"%.*s\" at byte %zu is not supported", r->what,
         r->pattern, (int)(size < left ? size : left), r->at, (size_t)(r->at - r->pattern));
}

static int put_item(struct translation *r, const struct item *item)
{
    if (r->in_class) {
        if (item->negated && !item->inside) return refuse(r, strlen(item->from));
        TRY(put(r, item->inside ? item->inside : item->members));
    } else {
        TRY(put(r, item->negated ? "[^" : "["));
        TRY(put(r, item->members));
        TRY(put(r, "]"));
    }
    r->at += strlen(item->from);
    return OK;
}

static bool begins(const struct translation *r, const char *text)
{
    size_t size = strlen(text);
    return (size_t)(r->end - r->at) >= size && !memcmp(r->at, text, size);
}

static bool is_hex(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'); }

/* \uHHHH, \xHH and \x{H...}: rewritten in braces. */
static int put_code_point(struct translation *r)
{
    bool braces = r->at + 2 < r->end && r->at[1] == 'x' && r->at[2] == '{';
    const char *digit = r->at + (braces ? 3 : 2), *stop = digit;
    size_t most = r->at[1] == 'u' ? 4 : braces ? 6 : 2;
    while (stop < r->end && (size_t)(stop - digit) < most && is_hex(*stop)) stop++;
    if (stop == digit || (r->at[1] == 'u' && stop - digit != 4)) return refuse(r, 6);
    if (braces && (stop == r->end || *stop != '}')) return refuse(r, 10);
    TRY(put(r, "\\x{"));
    TRY(tokenizer__append(&r->out, digit, (size_t)(stop - digit)));
    TRY(put(r, "}"));
    r->at = stop + braces;
    return OK;
}

/* \p{...} and \P{...} of properties that both know by the same name. */
static int put_property(struct translation *r)
{
    const char *close = r->at + 2 < r->end ? memchr(r->at, '}', (size_t)(r->end - r->at)) : NULL;
    if (!close || r->at[2] != '{') return refuse(r, 3);
    TRY(tokenizer__append(&r->out, r->at, (size_t)(close + 1 - r->at)));
    r->at = close + 1;
    return OK;
}

static int put_escape(struct translation *r)
{
    if (r->at + 1 == r->end) return refuse(r, 1);
    for (size_t i = 0; i < sizeof items / sizeof *items; i++)
        if (begins(r, items[i].from)) return put_item(r, &items[i]);
    char c = r->at[1];
    if (c == 'u' || c == 'x') return put_code_point(r);
    if (c == 'p' || c == 'P') return put_property(r);
    bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    bool control = c == 'n' || c == 'r' || c == 't' || c == 'f' || c == 'a' || c == 'e';
    bool anchor = !r->in_class && (c == 'A' || c == 'z' || c == 'Z');
    if ((letter && !control && !anchor) || (unsigned char)c >= 0x80) return refuse(r, 2);
    TRY(tokenizer__append(&r->out, r->at, 2));
    r->at += 2;
    return OK;
}

static int put_class_char(struct translation *r, const char *class_start)
{
    if (*r->at == '[' || begins(r, "&&")) return refuse(r, 3); /* nested classes and intersections */
    if (*r->at == ']' && r->at != class_start) r->in_class = false;
    return tokenizer__append(&r->out, r->at++, 1);
}

static int put_group(struct translation *r)
{
    static const char *const known[] = {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:", "(?i)", "(?-i:"};
    if (!begins(r, "(?")) return tokenizer__append(&r->out, r->at++, 1);
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (!begins(r, known[i])) continue;
        TRY(put(r, known[i]));
        r->at += strlen(known[i]);
        return OK;
    }
    return refuse(r, 5);
}

/* PCRE2 expression of the pattern, NUL-terminated in r->out. */
static int translate(struct translation *r)
{
    const char *class_start = NULL;
    while (r->at < r->end) {
        if (*r->at == '\\') {
            TRY(put_escape(r));
        } else if (r->in_class) {
            TRY(put_class_char(r, class_start));
        } else if (*r->at == '[') {
            r->in_class = true;
            TRY(tokenizer__append(&r->out, r->at++, 1));
            if (r->at < r->end && *r->at == '^') TRY(tokenizer__append(&r->out, r->at++, 1));
            class_start = r->at;
        } else if (*r->at == '(') {
            TRY(put_group(r));
        } else if (begins(r, "}+")) {
            return refuse(r, 2); /* possessive in PCRE2, a repeated group in Oniguruma */
        } else {
            TRY(tokenizer__append(&r->out, r->at++, 1));
        }
    }
    return tokenizer__append(&r->out, "", 1);
}

static int compile(struct tokenizer_regex *regex, const char *pattern, size_t size, const char *what)
{
    struct translation r = {.pattern = pattern, .at = pattern, .end = pattern + size, .what = what};
    int rc = translate(&r), error = 0;
    PCRE2_SIZE where = 0;
    if (!rc) {
        pcre2_compile_context *context = pcre2_compile_context_create(NULL);
        if (context) pcre2_set_newline(context, PCRE2_NEWLINE_LF);
        regex->code = pcre2_compile((PCRE2_SPTR)r.out.data, r.out.size - 1, PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE,
                                    &error, &where, context);
        pcre2_compile_context_free(context);
        if (!regex->code) {
            PCRE2_UCHAR text[120] = "";
            pcre2_get_error_message(error, text, sizeof text);
            rc = status_set(ERR_FORMAT, __FILE__, __LINE__, "%s: regular expression \"%.200s\": %s", what, pattern,
                            (char *)text);
        }
    }
    free(r.out.data);
    if (!rc) (void)pcre2_jit_compile(regex->code, PCRE2_JIT_COMPLETE); /* without JIT the interpreter serves */
    return rc;
}

int tokenizer__regex_open(const char *pattern, size_t size, bool literal, const char *what,
                          struct tokenizer_regex **out)
{
    if (!size || size > TOKENIZER_MAX_STRING || memchr(pattern, 0, size))
        FAIL(ERR_FORMAT, "%s: a pattern of %zu bytes; 1 to %d without a zero byte expected", what, size,
             TOKENIZER_MAX_STRING);
    struct tokenizer_regex *regex = calloc(1, sizeof *regex);
    if (!regex) FAIL(ERR_NOMEM, "%s: out of memory", what);
    size_t shown = size < sizeof regex->pattern ? size : sizeof regex->pattern - 1;
    memcpy(regex->pattern, pattern, shown);
    int rc = OK;
    if (literal) {
        regex->literal = malloc(size);
        regex->literal_size = size;
        if (regex->literal)
            memcpy(regex->literal, pattern, size);
        else
            rc = status_set(ERR_NOMEM, __FILE__, __LINE__, "%s: out of memory", what);
    } else {
        char *copy = strndup(pattern, size);
        rc = copy ? compile(regex, copy, size, what)
                  : status_set(ERR_NOMEM, __FILE__, __LINE__, "%s: out of memory", what);
        free(copy);
    }
    if (rc) {
        tokenizer__regex_close(regex);
        return rc;
    }
    *out = regex;
    return OK;
}

void tokenizer__regex_close(struct tokenizer_regex *regex)
{
    if (!regex) return;
    pcre2_code_free(regex->code);
    free(regex->literal);
    free(regex);
}

void tokenizer__regex_release(struct tokenizer_encoder *e)
{
    pcre2_match_data_free(e->match_data);
    pcre2_match_context_free(e->match_context);
}

static int prepare(struct tokenizer_encoder *e)
{
    e->match_data = pcre2_match_data_create(1, NULL);
    e->match_context = pcre2_match_context_create(NULL);
    if (!e->match_data || !e->match_context) FAIL(ERR_NOMEM, "tokenizer: no memory for a regular expression");
    return OK;
}

static int search(const struct tokenizer_regex *regex, struct tokenizer_encoder *e, const char *text, size_t size,
                  struct tokenizer_match *m, bool *found)
{
    if (regex->literal) {
        const char *hit = memmem(text + m->at, size - m->at, regex->literal, regex->literal_size);
        *found = hit != NULL;
        if (hit) m->start = (size_t)(hit - text);
        if (hit) m->end = m->start + regex->literal_size;
        return OK;
    }
    if (!e->match_data || !e->match_context) TRY(prepare(e));
    /* A run of n spaces may cost n steps before an alternative fails; more than a few per byte is a runaway pattern. */
    pcre2_set_match_limit(e->match_context, (uint32_t)(1000000 + 16 * size));
    int rc =
        pcre2_match(regex->code, (PCRE2_SPTR)text, size, m->at, PCRE2_NO_UTF_CHECK, e->match_data, e->match_context);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
        rc = pcre2_match(regex->code, (PCRE2_SPTR)text, size, m->at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, e->match_data,
                         e->match_context);
    *found = rc >= 0;
    if (rc < 0 && rc != PCRE2_ERROR_NOMATCH)
        FAIL(ERR_REQUEST,
             "tokenizer: the regular expression \"%s\" takes too many steps on this text (PCRE2 error %d); shorten the "
             "text or the run of equal characters in it",
             regex->pattern, rc);
    if (*found) {
        const PCRE2_SIZE *span = pcre2_get_ovector_pointer(e->match_data);
        m->start = span[0];
        m->end = span[1] < span[0] ? span[0] : span[1];
    }
    return OK;
}

int tokenizer__regex_next(const struct tokenizer_regex *regex, struct tokenizer_encoder *e, const char *text,
                          size_t size, struct tokenizer_match *m, bool *found)
{
    for (;;) {
        *found = false;
        if (m->at > size) return OK;
        TRY(search(regex, e, text, size, m, found));
        if (!*found) return OK;
        m->at = m->end;
        if (m->start != m->end || m->end != m->last_end) break;
        /* An empty match right behind the last one: step over one character, as the reference does. */
        uint32_t code;
        m->at += m->at < size ? utf8_next(text + m->at, size - m->at, &code) : 1;
    }
    m->last_end = m->end;
    return OK;
}
