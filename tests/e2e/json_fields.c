/* json_fields FILE PATH... - reads one JSON object a line, strictly, and prints the values at the paths, unformatted
 * and separated by tabs: for shell scripts that look into answers. A path is keys and list places joined by dots
 * (response.body.choices.0.message.content); "." is the whole line, "a.*" the keys of a; what is absent prints as "-".
 * A zero byte in a text, which a model may well say, is shown as its symbol. Exit code 1, naming the line, if one is no
 * JSON object or has no newline at its end. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"

/* The item at `path`; *keys if the path ends in "*". */
static const cJSON *find(const cJSON *item, const char *path, bool *keys)
{
    char copy[512], *save = NULL;
    *keys = false;
    if (!strcmp(path, ".") || snprintf(copy, sizeof copy, "%s", path) >= (int)sizeof copy) return item;
    for (char *part = strtok_r(copy, ".", &save); part && item; part = strtok_r(NULL, ".", &save)) {
        if (!strcmp(part, "*")) {
            *keys = true;
            return item;
        }
        item =
            cJSON_IsArray(item) ? cJSON_GetArrayItem(item, atoi(part)) : cJSON_GetObjectItemCaseSensitive(item, part);
    }
    return item;
}

static void print_keys(const cJSON *object)
{
    const cJSON *item;
    cJSON_ArrayForEach (item, object) printf("%s%s", item == object->child ? "" : ",", item->string);
}

static int print_value(const cJSON *item)
{
    char *text = cJSON_PrintUnformatted(item);
    if (!text) return 1;
    fputs(text, stdout);
    free(text);
    return 0;
}

static int print_fields(const cJSON *line, int n_paths, char **paths)
{
    bool keys;
    for (int i = 0; i < n_paths; i++) {
        const cJSON *item = find(line, paths[i], &keys);
        if (i) putchar('\t');
        if (!item)
            putchar('-');
        else if (keys)
            print_keys(item);
        else if (print_value(item))
            return 1;
    }
    putchar('\n');
    return 0;
}

/* The strict reader refuses a zero byte, since it would end a C string. */
static void show_zero_bytes(char *text, size_t size)
{
    for (size_t i = 0; i + 6 <= size; i++) {
        if (text[i] != '\\') continue;
        if (!memcmp(text + i, "\\u0000", 6)) memcpy(text + i, "\\u2400", 6);
        i++;
    }
}

static int print_line(const char *path, int number, char *text, size_t size, int n_paths, char **paths)
{
    char what[256];
    show_zero_bytes(text, size);
    cJSON *line;
    snprintf(what, sizeof what, "%.200s: line %d", path, number);
    if (json_parse(text, size, what, &line)) {
        fprintf(stderr, "%s\n", status_message());
        return 1;
    }
    int rc = cJSON_IsObject(line) ? print_fields(line, n_paths, paths) : 1;
    if (rc) fprintf(stderr, "%s: no JSON object\n", what);
    cJSON_Delete(line);
    return rc;
}

int main(int argc, char **argv)
{
    char *text;
    size_t size;
    int rc = 0, number = 0;
    if (argc < 3) {
        fprintf(stderr, "usage: json_fields FILE PATH...\n");
        return 2;
    }
    if (file_read_all(argv[1], (size_t)1 << 30, &text, &size)) {
        fprintf(stderr, "%s\n", status_message());
        return 2;
    }
    for (size_t at = 0; at < size && !rc;) {
        const char *end = memchr(text + at, '\n', size - at);
        if (!end) {
            fprintf(stderr, "%s: line %d has no end\n", argv[1], number + 1);
            rc = 1;
            break;
        }
        size_t length = (size_t)(end - (text + at));
        rc = print_line(argv[1], ++number, text + at, length, argc - 2, argv + 2);
        at += length + 1;
    }
    free(text);
    return rc;
}
