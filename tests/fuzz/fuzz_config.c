/* Any text as a deployment file: an error or a configuration, and what was accepted prints and loads back the same. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct config config, again;
    char *text = NULL;
    size_t length = 0;
    if (config_defaults(&config)) abort();
    if (config_load_yaml_memory(&config, (const char *)data, size, "input")) return 0;
    FILE *f = open_memstream(&text, &length);
    if (!f || config_print(&config, f)) abort();
    fclose(f);
    if (config_defaults(&again) || config_load_yaml_memory(&again, text, length, "printed") ||
        config_hash(&again) != config_hash(&config)) {
        fprintf(stderr, "%s\nprinted:\n%s\n", status_message(), text);
        abort();
    }
    free(text);
    return 0;
}
