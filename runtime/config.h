/* config - the configuration: one flat struct, filled from defaults, then a YAML file, then the command line.
 *
 * One table of rows {key, type, place, default, range, help} drives all of it: YAML, options, --help, --print-config
 * and the test that docs/configuration.md names every key. A key that the table lacks is an error with file, line,
 * column and the nearest name; so is a value of the wrong type or out of range, or one that this build does not serve.
 * The struct holds no pointers. Does not own: what options of a command mean (launch/), nor whether the model fits
 * (runtime/plan.h). */
#ifndef VITRAIL_RUNTIME_CONFIG_H
#define VITRAIL_RUNTIME_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "base/status.h"
#include "kvcache/policy.h"

enum config_device { CONFIG_DEVICE_AUTO, CONFIG_DEVICE_CUDA, CONFIG_DEVICE_CPU };
enum config_dtype {
    CONFIG_DTYPE_AUTO, /* as the file has them */
    CONFIG_DTYPE_FLOAT32,
    CONFIG_DTYPE_FLOAT16,
    CONFIG_DTYPE_BFLOAT16
};
enum config_load_format { CONFIG_LOAD_AUTO, CONFIG_LOAD_DUMMY };

enum { CONFIG_PATH_BYTES = 4096, CONFIG_MAX_FILE = 1 << 20 };

struct config {
    char model[CONFIG_PATH_BYTES]; /* directory or .gguf file; "" until it is given */
    int device;                    /* enum config_device */
    int dtype;                     /* enum config_dtype, of weights and (on GPUs) activations */
    int tensor_parallel_size;      /* 0: auto, the number of ranks */
    int data_parallel_size;
    int max_model_len; /* tokens; 0: auto, the smaller of the model's and CONFIG_AUTO_MODEL_LEN */
    int max_num_seqs;
    int max_num_batched_tokens; /* of all prompt chunks of a step */
    double gpu_memory_utilization;
    int64_t kv_cache_memory_bytes; /* of one rank's pool; 0: auto, by device */
    struct policy_config kv_cache; /* policy, budget and the policies' options */
    /* Comma lists: what engine_set_policy may change to; no keys, set by commands. */
    char other_policies[512], other_dtypes[64];
    int kv_page_size;             /* tokens */
    int64_t kv_host_memory_bytes; /* of one rank's pool for evicted tokens; 0: auto */
    char allowed_local_media_path[CONFIG_PATH_BYTES];
    int load_format;        /* enum config_load_format */
    uint64_t seed;          /* of requests that bring none, and of dummy weights */
    char chat_template[32]; /* "auto" or a name of model/chat.h */
    int max_queued;         /* requests waiting inside the engine */
    int max_images_per_prompt;
    int64_t max_image_bytes, max_image_pixels; /* of one image file; of one decoded image */
    int64_t max_request_bytes;                 /* of one batch line or client message */
    int cpu_threads;                           /* of this rank; 0: auto, until launch/ranks.c has counted */
    double watchdog_timeout;                   /* seconds; 0: off */
    int log_level;                             /* enum log_level of base/log.h */
};
enum { CONFIG_AUTO_MODEL_LEN = 4096 };

/* One row of the table. */
enum config_type {
    CONFIG_TEXT,
    CONFIG_POLICY, /* text that policy_find knows */
    CONFIG_CHOICE,
    CONFIG_INT,
    CONFIG_BYTES, /* an integer with a suffix such as MiB */
    CONFIG_SEED,
    CONFIG_DOUBLE,
    CONFIG_BUDGET
};
struct config_key {
    const char *path;         /* "kv_cache.policy" */
    const char *preset;       /* the default, as it is written in YAML */
    const char *help;         /* one line for people */
    const char *const *names; /* choices, NULL-terminated; the value is the index (CONFIG_TEXT: the word) */
    size_t offset, size;      /* in struct config */
    double min, max;          /* of numbers */
    enum config_type type;
    int n_served;   /* the first n_served names are served by this build; 0: all */
    bool automatic; /* integers: the word auto is accepted and stored as 0 */
    bool local;     /* may differ between ranks: not in the hash */
};

/* config_keys - the table; *n rows, keys of one map together. */
const struct config_key *config_keys(int *n);

/* config_find - the row of a YAML key ("kv_cache.policy") or of an alias ("block_size"); NULL if unknown.
 * config_find_option - the same for an option's name without its dashes: "kv-cache-policy", "kv-policy", "tp". */
const struct config_key *config_find(const char *path);
const struct config_key *config_find_option(const char *option);

/* config_option_name - "kv-cache-policy" of a row into buf, returned. */
const char *config_option_name(const struct config_key *key, char *buf, size_t size);

/* config_alias - i-th other name of a key, as YAML accepts it ("tp"; options with dashes), NULL past the end. *key gets
 * its row. */
const char *config_alias(int i, const struct config_key **key);

/* config_defaults - presets everything. Errors: ERR_BUG if the table contradicts itself. */
int config_defaults(struct config *config) MUST_CHECK;

/* config_load_yaml - applies a YAML file of at most CONFIG_MAX_FILE bytes over what *config holds. Errors: ERR_IO;
 * ERR_CONFIG "file:line:column: ...". On error *config may be changed in part. config_load_yaml_memory - the same from
 * memory; `what` stands for the file's name. */
int config_load_yaml(struct config *config, const char *path) MUST_CHECK;
int config_load_yaml_memory(struct config *config, const char *text, size_t size, const char *what) MUST_CHECK;

/* config_set - one key (or alias) from its text, as YAML would have it. `where` goes in front of messages
 * ("--kv-budget"). Errors: ERR_CONFIG. */
int config_set(struct config *config, const char *key, const char *value, const char *where) MUST_CHECK;

/* config_check - what no single key can tell: a model is named, limits agree. ERR_CONFIG. */
int config_check(const struct config *config) MUST_CHECK;

/* config_value - the value of a row as YAML has it, malloc'd; NULL without memory. config_print - the whole
 * configuration as YAML that loads back to the same struct. ERR_IO if the stream fails. */
char *config_value(const struct config *config, const struct config_key *key);
int config_print(const struct config *config, FILE *out) MUST_CHECK;

/* config_hash - equal for equal configurations on any machine; ranks compare it. */
uint64_t config_hash(const struct config *config);

#endif
