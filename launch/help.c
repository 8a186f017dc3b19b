/* help - --help, written from the tables of commands, options and configuration keys. */
#include <stdlib.h>
#include <string.h>

#include "launch/launch.h"

enum { NAME_COLUMNS = 34, LINE_COLUMNS = 110 };

/* "  --name VALUE      text", the text wrapped and indented. */
static void print_row(FILE *out, const char *left, const char *text)
{
    int column = fprintf(out, "  %s", left);
    if (column >= NAME_COLUMNS) {
        fputc('\n', out);
        column = 0;
    }
    column += fprintf(out, "%*s", NAME_COLUMNS - column, "");
    for (const char *space = ""; *text; space = " ") {
        int word = (int)strcspn(text, " ");
        if (*space && column + 1 + word > LINE_COLUMNS) {
            column = fprintf(out, "\n%*s", NAME_COLUMNS, "") - 1;
            space = "";
        }
        column += fprintf(out, "%s%.*s", space, word, text);
        text += word + (text[word] == ' ');
    }
    fputc('\n', out);
}

static const char *value_name(const struct config_key *key)
{
    switch (key->type) {
    case CONFIG_TEXT:
    case CONFIG_POLICY:
    case CONFIG_CHOICE: return key->names || key->type != CONFIG_TEXT ? "NAME" : "PATH";
    case CONFIG_BYTES: return "BYTES";
    case CONFIG_BUDGET: return "B";
    case CONFIG_INT:
    case CONFIG_SEED: return "N";
    case CONFIG_DOUBLE: return "X";
    }
    return "VALUE";
}

/* "help (a | b; default: x)". */
static void print_key(FILE *out, const struct config_key *key)
{
    char left[160], name[128], text[1024], names[256] = "";
    snprintf(left, sizeof left, "--%s %s", config_option_name(key, name, sizeof name), value_name(key));
    for (int i = 0; key->names && key->names[i] && (!key->n_served || i < key->n_served); i++) {
        size_t used = strlen(names);
        snprintf(names + used, sizeof names - used, "%s%s", i ? " | " : "", key->names[i]);
    }
    snprintf(text, sizeof text, "%s (%s%s%s%s)", key->help, names, *names && *key->preset ? "; " : "",
             *key->preset ? "default: "
             : *names     ? ""
                          : "required",
             key->preset);
    print_row(out, left, text);
}

static void print_options(FILE *out, const struct option *options)
{
    for (const struct option *o = options; o->name; o++) {
        char left[160];
        snprintf(left, sizeof left, "--%s%s%s%s", o->name, o->value ? " " : "", o->value ? o->value : "",
                 o->repeats ? " ..." : "");
        print_row(out, left, o->help);
    }
}

void help_print(const struct command *const *commands, const struct command *command, FILE *out)
{
    static const struct option common[] = {
        {"config", "FILE", false, "YAML deployment file; options override it"},
        {"print-config", NULL, false, "print the resulting configuration as YAML and exit"},
        {"inject-fault", "SPEC", false, "for tests: rank=R,phase=P,call=N,action=error|exit|kill|stop|hang"},
        {"help", NULL, false, "print this and exit"},
        {NULL, NULL, false, NULL},
    };
    int n;
    const struct config_key *keys = config_keys(&n);
    if (!command) {
        fprintf(out, "Vitrail serves vision-language models over many ranks with a compressed KV cache.\n\n"
                     "  [mpirun -np N] vitrail COMMAND [--config FILE] [options]\n\nCommands:\n");
        for (int i = 0; commands[i]; i++) print_row(out, commands[i]->name, commands[i]->summary);
        fprintf(out,
                "\nvitrail COMMAND --help lists the options of a command; vitrail --version prints the version.\n");
        return;
    }
    fprintf(out, "%s\n\n  %s\n", command->summary, command->usage);
    if (command->options->name) fprintf(out, "\nOptions of %s:\n", command->name);
    print_options(out, command->options);
    fprintf(out, "\nOptions of every command:\n");
    print_options(out, common);
    if (command->lists)
        fprintf(out, "\n--kv-policy%s take lists here, separated by commas: every combination is run.\n",
                command->dtype_lists ? ", --kv-budget and --kv-cache-dtype" : " and --kv-budget");
    fprintf(out, "\nConfiguration (the same keys stand in the YAML file, with _ for - and maps for kv-cache-...;\n"
                 "--kv-policy and --kv-budget are short for --kv-cache-policy and --kv-cache-budget):\n");
    for (int i = 0; i < n; i++) print_key(out, &keys[i]);
}
