/* svg - whether a text is well-formed XML of the kind that runtime/plot writes. */
#ifndef VITRAIL_TESTS_SVG_H
#define VITRAIL_TESTS_SVG_H

#include <ctype.h>
#include <stdbool.h>
#include <string.h>

enum { SVG_MAX_DEPTH = 8 };

/* One tag behind its '<'; NULL if its attributes are not name="value". Every tag ends in '>' or '/>'. */
static inline const char *svg_read_tag(const char *at, bool *empty)
{
    while (isalnum((unsigned char)*at)) at++;
    for (;;) {
        while (isspace((unsigned char)*at)) at++;
        *empty = *at == '/';
        if (*at == '>' || (*at == '/' && at[1] == '>')) return at + 1 + *empty;
        const char *name = at;
        while (isalnum((unsigned char)*at) || *at == '-') at++;
        if (at == name || strncmp(at, "=\"", 2) != 0) return NULL;
        at += 2 + strcspn(at + 2, "\"<");
        if (*at++ != '"') return NULL;
    }
}

/* Tags nest and close, attributes are quoted, no stray & or >; one root. The part of XML that the plot writes. */
static inline bool svg_well_formed(const char *text)
{
    const char *open[SVG_MAX_DEPTH];
    int depth = 0, roots = 0;
    while (*text) {
        if (*text == '&' || *text == '>' || (!depth && *text != '<' && !isspace((unsigned char)*text))) return false;
        if (*text++ != '<') continue;
        if (*text == '/') {
            size_t n = strcspn(++text, ">");
            if (!depth || strncmp(open[--depth], text, n) != 0 || isalnum((unsigned char)open[depth][n])) return false;
            text += n + 1;
            continue;
        }
        bool empty;
        const char *name = text;
        if (!(text = svg_read_tag(text, &empty)) || depth == SVG_MAX_DEPTH) return false;
        if (!depth) roots++;
        if (!empty) open[depth++] = name;
    }
    return !depth && roots == 1;
}

#endif
