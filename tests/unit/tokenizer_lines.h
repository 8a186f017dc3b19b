/* tokenizer_lines - the 20,000 test lines of the tokenizer tests, made from tests/data/tokenizer/material.txt.
 * tests/tools/tokenizer_lines.py is the same generator in Python; the expected ids were made with it. */
#ifndef VITRAIL_TESTS_TOKENIZER_LINES_H
#define VITRAIL_TESTS_TOKENIZER_LINES_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/utf8.h"
#include "model/tokenizer.h"

enum { N_LINES = 20000, MAX_MATERIAL = 512, MAX_LINE = 4096 };
enum line_kind {
    LINE_WORD,
    LINE_CONTRACTION,
    LINE_SPACE,
    LINE_EMOJI,
    LINE_CODE,
    LINE_INVALID,
    LINE_SPECIAL,
    LINE_REPEAT,
    N_LINE_KINDS
};

struct line_text {
    char *bytes;
    size_t size;
};
struct line_material {
    struct line_text item[N_LINE_KINDS][MAX_MATERIAL];
    uint64_t n[N_LINE_KINDS];
    uint32_t low[MAX_MATERIAL], high[MAX_MATERIAL];
    uint64_t n_ranges;
};
struct line_writer {
    const struct line_material *material;
    uint64_t state;
    char bytes[MAX_LINE];
    size_t size;
};

static inline size_t line_unescape(char *text)
{
    static const char from[] = "ntr\\s", to[] = "\n\t\r\\ ";
    char *out = text;
    for (const char *at = text; *at; at++) {
        const char *hit = *at == '\\' && at[1] ? strchr(from, at[1]) : NULL;
        if (*at == '\\' && at[1] == 'x') {
            char hex[3] = {at[2], at[3], 0};
            *out++ = (char)strtol(hex, NULL, 16);
            at += 3;
        } else if (hit) {
            *out++ = to[hit - from];
            at++;
        } else {
            *out++ = *at;
        }
    }
    return (size_t)(out - text);
}

static inline struct line_material *line_material_open(const char *path)
{
    static const char *const names[] = {"word", "contraction", "space",   "emoji",
                                        "code", "invalid",     "special", "repeat"};
    struct line_material *m = calloc(1, sizeof *m);
    char *text, *save = NULL;
    size_t size;
    if (!m || file_read_all(path, 1 << 20, &text, &size)) return NULL;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        char *value = strchr(line, ' ');
        if (*line == '#' || !value) continue;
        *value++ = 0;
        if (!strcmp(line, "range")) {
            m->low[m->n_ranges] = (uint32_t)strtoul(value, &value, 16);
            m->high[m->n_ranges++] = (uint32_t)strtoul(value, NULL, 16);
        }
        for (int k = 0; k < N_LINE_KINDS; k++) {
            if (strcmp(line, names[k])) continue;
            struct line_text *item = &m->item[k][m->n[k]++];
            item->bytes = strdup(value);
            item->size = line_unescape(item->bytes);
        }
    }
    free(text);
    return m;
}

static inline void line_material_close(struct line_material *m)
{
    for (int k = 0; k < N_LINE_KINDS; k++)
        for (uint64_t i = 0; i < m->n[k]; i++) free(m->item[k][i].bytes);
    free(m);
}

static inline uint64_t line_next(struct line_writer *w, uint64_t n) /* splitmix64 */
{
    uint64_t z = w->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (z ^ z >> 31) % n;
}

static inline void line_put(struct line_writer *w, const char *bytes, size_t size)
{
    if (w->size + size > MAX_LINE) abort();
    memcpy(w->bytes + w->size, bytes, size);
    w->size += size;
}

static inline void line_byte(struct line_writer *w, uint64_t byte) { line_put(w, (const char[]){(char)byte}, 1); }

static inline void line_pick(struct line_writer *w, enum line_kind kind)
{
    const struct line_text *item = &w->material->item[kind][line_next(w, w->material->n[kind])];
    line_put(w, item->bytes, item->size);
}

static inline void line_script(struct line_writer *w)
{
    uint64_t r = line_next(w, w->material->n_ranges), n = 1 + line_next(w, 8);
    for (uint64_t i = 0; i < n; i++) {
        char text[4];
        uint32_t low = w->material->low[r], code = low + (uint32_t)line_next(w, w->material->high[r] - low + 1);
        if (code < 0xd800 || code > 0xdfff) line_put(w, text, utf8_put(code, text));
    }
}

static inline void line_numbers(struct line_writer *w, uint64_t slot)
{
    static const char marks[] = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~";
    uint64_t n = 1 + line_next(w, slot == 4 ? 8 : 5);
    for (uint64_t i = 0; i < n; i++) {
        if (slot == 5) {
            line_byte(w, (unsigned char)marks[line_next(w, sizeof marks - 1)]);
        } else if (line_next(w, 6) == 0) {
            line_byte(w, (unsigned char)".,-/:"[line_next(w, 5)]);
        } else {
            line_byte(w, '0' + line_next(w, 10));
        }
    }
}

static inline void line_controls(struct line_writer *w)
{
    uint64_t n = 1 + line_next(w, 3);
    for (uint64_t i = 0; i < n; i++) line_byte(w, line_next(w, 8) ? line_next(w, 32) : 0x7f);
}

static inline void line_invalid(struct line_writer *w)
{
    if (line_next(w, 2)) {
        line_pick(w, LINE_INVALID);
        return;
    }
    uint64_t n = 1 + line_next(w, 3);
    for (uint64_t i = 0; i < n; i++) line_byte(w, 0x80 + line_next(w, 128));
}

static inline void line_repeat(struct line_writer *w)
{
    const struct line_text *item = &w->material->item[LINE_REPEAT][line_next(w, w->material->n[LINE_REPEAT])];
    uint64_t n = 1 + line_next(w, 40);
    for (uint64_t i = 0; i < n; i++) line_put(w, item->bytes, item->size);
}

static inline void line_part(struct line_writer *w)
{
    uint64_t slot = line_next(w, 16), n;
    if (slot < 3) {
        n = 1 + line_next(w, 3);
        for (uint64_t i = 0; i < n; i++) {
            if (i) line_byte(w, ' ');
            line_pick(w, LINE_WORD);
        }
    } else if (slot == 3) {
        line_pick(w, LINE_CONTRACTION);
    } else if (slot < 6) {
        line_numbers(w, slot);
    } else if (slot == 6) {
        n = 1 + line_next(w, 6);
        for (uint64_t i = 0; i < n; i++) line_pick(w, LINE_SPACE);
    } else if (slot < 10) {
        line_script(w);
    } else if (slot == 10 || slot == 11 || slot == 14) {
        line_pick(w, slot == 10 ? LINE_EMOJI : slot == 11 ? LINE_CODE : LINE_SPECIAL);
    } else if (slot == 12) {
        line_controls(w);
    } else if (slot == 13) {
        line_invalid(w);
    } else {
        line_repeat(w);
    }
    if (line_next(w, 3)) line_byte(w, ' ');
}

/* Line i into w->bytes[0..w->size). */
static inline void line_make(struct line_writer *w, const struct line_material *m, uint64_t i)
{
    w->material = m;
    w->state = 0x7669747261696cu ^ i * 0xd1342543de82ef95u;
    w->size = 0;
    uint64_t n = 1 + line_next(w, 10);
    for (uint64_t k = 0; k < n; k++) line_part(w);
}

static inline uint32_t line_hash(const int32_t *ids, size_t n)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++) {
        h = (h ^ (uint32_t)ids[i]) * 0x100000001b3u;
        h ^= h >> 29;
    }
    return (uint32_t)(h ^ h >> 32);
}

static inline uint32_t line_hash_bytes(const char *bytes, size_t n)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++) {
        h = (h ^ (unsigned char)bytes[i]) * 0x100000001b3u;
        h ^= h >> 29;
    }
    return (uint32_t)(h ^ h >> 32);
}

/* The flags that line i is encoded with. */
static inline unsigned line_flags(uint64_t i)
{
    static const unsigned flags[] = {TOKENIZER_ADD_SPECIAL | TOKENIZER_PARSE_SPECIAL, TOKENIZER_PARSE_SPECIAL, 0};
    return flags[i % 3];
}

#endif
