/* vitrail tokenize - token ids of a text or of each line of a file, as prompts of the model are tokenized. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "launch/launch.h"
#include "model/tokenizer.h"
#include "runtime/prompt.h"

static int print_ids(const struct tokenizer *tokenizer, const char *text, size_t size, unsigned flags)
{
    int32_t *ids;
    size_t n;
    TRY(tokenizer_encode(tokenizer, text, size, flags, &ids, &n));
    for (size_t i = 0; i < n; i++) printf("%s%d", i ? " " : "", ids[i]);
    free(ids);
    if (putchar('\n') == EOF) FAIL(ERR_IO, "cannot write token ids: %s", strerror(errno));
    return OK;
}

/* Lines end in '\n' alone: every other character, '\r' too, belongs to the text. */
static int print_file(const struct tokenizer *tokenizer, const char *path, unsigned flags)
{
    FILE *f = strcmp(path, "-") ? fopen(path, "r") : stdin;
    char *line = NULL;
    size_t room = 0, number = 0;
    int rc = OK;
    if (!f) FAIL(ERR_IO, "%s: cannot open: %s", path, strerror(errno));
    for (ssize_t n; !rc && (n = getline(&line, &room, f)) >= 0;) {
        number++;
        if (n > 0 && line[n - 1] == '\n') n--;
        rc = print_ids(tokenizer, line, (size_t)n, flags);
        if (rc) rc = status_prefix(rc, "%s:%zu", path, number);
    }
    if (!rc && ferror(f))
        rc = status_set(ERR_IO, __FILE__, __LINE__, "%s: cannot read behind line %zu: %s", path, number,
                        strerror(errno));
    free(line);
    if (f != stdin) fclose(f);
    return rc;
}

static int run(struct launch *launch)
{
    const struct arguments *arguments = &launch->arguments;
    const char *text = arguments_text(arguments, "text"), *path = arguments_text(arguments, "file");
    unsigned flags = TOKENIZER_PARSE_SPECIAL;
    struct tokenizer *tokenizer;
    if (!text == !path) FAIL(ERR_CONFIG, "vitrail tokenize needs either --text TEXT or --file FILE");
    if (!arguments_flag(arguments, "no-special")) flags |= TOKENIZER_ADD_SPECIAL;
    TRY(prompt_tokenizer_open(launch->config->model, &tokenizer));
    int rc = text ? print_ids(tokenizer, text, strlen(text), flags) : print_file(tokenizer, path, flags);
    tokenizer_close(tokenizer);
    return rc;
}

const struct command command_tokenize = {
    .name = "tokenize",
    .summary = "print token ids, one line for each line of input",
    .usage = "vitrail tokenize --model M (--text T | --file F)",
    .options = (const struct option[]){{"text", "TEXT", false, "one text, line ends included"},
                                       {"file", "FILE", false, "each line of a file (- is standard input)"},
                                       {"no-special", NULL, false, "without the begin and end tokens of the model"},
                                       {NULL, NULL, false, NULL}},
    .needs_model = true,
    .run = run,
};
