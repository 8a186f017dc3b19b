/* config_table - the rows of every configuration key, their aliases, and how a row is found.
 * What a key does when it is absent stands here alone: docs/configuration.md and --help repeat it. */
#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "runtime/config.h"

static const char *const device_names[] = {"auto", "cuda", "cpu", NULL};
static const char *const dtype_names[] = {"auto", "float32", "float16", "bfloat16", NULL};
static const char *const kv_dtype_names[] = {"auto", "float32", "fp8", "int8", "float16", "bfloat16", NULL};
static const char *const heads_names[] = {"equal", "adaptive", NULL};
static const char *const evicted_names[] = {"free", "host", NULL};
static const char *const load_names[] = {"auto", "dummy", NULL};
static const char *const chat_names[] = {"auto", "llava-1.5", "llama-2", "llama-3", "llama-3.1", "chatml", NULL};
static const char *const log_names[] = {"error", "warning", "info", "debug", NULL};
static const char *const rounding_names[] = {"floor", "largest_remainder", "water_filled", NULL};
static const char *const judges_names[] = {"recent", "text", NULL};
static const char *const switch_names[] = {"off", "on", NULL};
static const char *const window_of_names[] = {"layer", "prompt", NULL};
static const char *const group_names[] = {"max", "mean", "query_head", NULL};

#define ROW(key, kind, member, text, ...)                                                                              \
    {                                                                                                                  \
        .path = (key), .type = (kind), .offset = offsetof(struct config, member),                                      \
        .size = sizeof(((struct config *)0)->member), .preset = (text), __VA_ARGS__                                    \
    }
#define TEXT(key, member, text, h) ROW(key, CONFIG_TEXT, member, text, .help = (h))
#define WORD(key, member, text, list, h) ROW(key, CONFIG_TEXT, member, text, .names = (list), .help = (h))
#define CHOICE(key, member, text, list, served, h)                                                                     \
    ROW(key, CONFIG_CHOICE, member, text, .names = (list), .n_served = (served), .help = (h))
#define NUMBER(key, kind, member, text, low, high, h)                                                                  \
    ROW(key, kind, member, text, .min = (low), .max = (high), .help = (h))
#define AUTO(key, kind, member, low, high, h)                                                                          \
    ROW(key, kind, member, "auto", .min = (low), .max = (high), .automatic = true, .help = (h))
#define VL(name) "kv_cache.vl_cache." name
#define SNAPKV(name) "kv_cache.snapkv." name
#define PYRAMID_INFER(name) "kv_cache.pyramid_infer." name
#define PYRAMID_KV(name) "kv_cache.pyramid_kv." name
#define CLUSTER_KV(name) "kv_cache.cluster_kv." name
#define EXPECTED(name) "kv_cache.expected_attention." name

#define MAX_BYTES 0x1p50

static const struct config_key table[] = {
    TEXT("model", model, "", "model directory (safetensors) or .gguf file; no default"),
    CHOICE("device", device, "auto", device_names, 0, "where ranks compute; auto: cuda where there is a GPU, else cpu"),
    CHOICE("dtype", dtype, "auto", dtype_names, 0, "dtype of the weights in memory; auto: as the checkpoint has them"),
    AUTO("tensor_parallel_size", CONFIG_INT, tensor_parallel_size, 1, 1024,
         "ranks that share the model; auto: as many as mpirun started; else checked against that"),
    NUMBER("data_parallel_size", CONFIG_INT, data_parallel_size, "1", 1, 1, "copies of the model; this build serves 1"),
    AUTO("max_model_len", CONFIG_INT, max_model_len, 1, 1 << 24,
         "longest sequence in tokens, prompt and answer; auto: the smaller of the model's and 4096"),
    NUMBER("max_num_seqs", CONFIG_INT, max_num_seqs, "64", 1, 4096, "most sequences that run at once"),
    NUMBER("max_num_batched_tokens", CONFIG_INT, max_num_batched_tokens, "8192", 1, 1 << 20,
           "most prompt tokens computed in one step; longer prompts are cut into chunks"),
    NUMBER("gpu_memory_utilization", CONFIG_DOUBLE, gpu_memory_utilization, "0.92", 0.01, 1,
           "share of each GPU's memory to use; on CPU ranks it has no effect"),
    AUTO("kv_cache_memory_bytes", CONFIG_BYTES, kv_cache_memory_bytes, 1, MAX_BYTES,
         "KV cache of each rank (256MiB, 4GiB); auto: what is left of the GPU, or on CPU ranks a quarter of the "
         "free memory over them, at most what max_num_seqs sequences can fill"),
    ROW("kv_cache.policy", CONFIG_POLICY, kv_cache.policy, "vl_cache",
        .help = "which tokens of a prompt stay in the cache: full (all of them), vl_cache, or one of the baselines"),
    ROW("kv_cache.budget", CONFIG_BUDGET, kv_cache.budget, "0.1",
        .help = "how much of a prompt is KEPT: a share (0.1 = 10%; 1 = all), or a number of tokens (64t)"),
    CHOICE("kv_cache.dtype", kv_cache.dtype, "auto", kv_dtype_names, 4,
           "dtype of keys and values in the cache, once a prompt has ended; auto: the activations'"),
    NUMBER("kv_cache.plain_sinks", CONFIG_INT, kv_cache.plain_sinks, "0", 0, 1 << 20,
           "dtype fp8 and int8: first tokens of each lane that stay in the activations' dtype"),
    NUMBER(
        "kv_cache.plain_window", CONFIG_INT, kv_cache.plain_window, "0", 0, 1 << 20,
        "dtype fp8 and int8: newest tokens of each lane, generated ones included, that stay in the activations' dtype"),
    NUMBER("kv_cache.page_size", CONFIG_INT, kv_page_size, "16", 16, 16, "tokens of a page; this build serves 16"),
    CHOICE("kv_cache.heads", kv_cache.heads, "equal", heads_names, 0,
           "how a layer's budget is split over its KV heads: alike, or by Ada-KV's competition of their scores"),
    NUMBER("kv_cache.heads_floor", CONFIG_DOUBLE, kv_cache.heads_floor, "0.2", 0, 1,
           "adaptive heads: the part of an equal share that no head gets less than"),
    CHOICE("kv_cache.evicted", kv_cache.evicted, "free", evicted_names, 0,
           "what becomes of tokens that are not kept: freed, or kept in host memory and recalled in decode steps"),
    ROW("kv_cache.recall_budget", CONFIG_BUDGET, kv_cache.recall_budget, "0.05",
        .help = "evicted: host, of a policy that evicts: how much of a prompt a decode step recalls, as a share or a "
                "number of tokens"),
    NUMBER("kv_cache.recall_cache_steps", CONFIG_INT, kv_cache.recall_cache_steps, "1", 0, 64,
           "evicted: host: what the last so many decode steps recalled stays on the device; 0: nothing does"),
    AUTO(
        "kv_cache.host_memory_bytes", CONFIG_BYTES, kv_host_memory_bytes, 1, MAX_BYTES,
        "host memory of each rank for evicted tokens; auto: what max_num_seqs sequences can fill, at most a quarter of "
        "the free memory over the ranks of the host"),
    NUMBER(VL("threshold"), CONFIG_DOUBLE, kv_cache.vl_cache.threshold, "0.01", 0, 1,
           "share of a row's largest attention from which an entry counts as not sparse"),
    NUMBER(VL("clip_min"), CONFIG_DOUBLE, kv_cache.vl_cache.clip_min, "0.01", 0, 1,
           "least share of the prompt that a layer keeps"),
    NUMBER(VL("clip_max"), CONFIG_DOUBLE, kv_cache.vl_cache.clip_max, "1", 0, 1,
           "largest share of the prompt that a layer keeps"),
    CHOICE(VL("rounding"), kv_cache.vl_cache.rounding, "floor", rounding_names, 0,
           "how layer shares become token counts"),
    NUMBER(VL("window"), CONFIG_DOUBLE, kv_cache.vl_cache.window, "0.1", 0, 1,
           "newest tokens that are always kept, as a share of a budget"),
    CHOICE(VL("window_of"), kv_cache.vl_cache.window_of, "layer", window_of_names, 0,
           "of which budget: the layer's own, or the whole prompt's"),
    NUMBER(VL("min_rows"), CONFIG_INT, kv_cache.vl_cache.min_rows, "16", 0, 1 << 20,
           "judging rows behind the last image: go back over text to this many; 0: as the paper has it"),
    NUMBER(VL("no_image_rows"), CONFIG_INT, kv_cache.vl_cache.no_image_rows, "64", 1, 1 << 20,
           "judging rows of a prompt without image"),
    NUMBER(VL("max_rows"), CONFIG_INT, kv_cache.vl_cache.max_rows, "0", 0, 1 << 20,
           "judge by the last so many rows only; 0: by all of them"),
    NUMBER(VL("kernel"), CONFIG_INT, kv_cache.vl_cache.kernel, "1", 1, 1023,
           "odd width of an average over neighbouring scores; 1: none, as the paper has it"),
    NUMBER(SNAPKV("window"), CONFIG_INT, kv_cache.snapkv.window, "32", 1, 1 << 20,
           "newest rows that judge the prompt's tokens, and newest tokens that stay"),
    NUMBER(SNAPKV("kernel"), CONFIG_INT, kv_cache.snapkv.kernel, "5", 1, 1023,
           "odd width of the average over neighbouring scores"),
    NUMBER(PYRAMID_KV("window"), CONFIG_INT, kv_cache.pyramid_kv.window, "32", 1, 1 << 20, "as SnapKV's"),
    NUMBER(PYRAMID_KV("kernel"), CONFIG_INT, kv_cache.pyramid_kv.kernel, "5", 1, 1023, "as SnapKV's"),
    NUMBER(PYRAMID_KV("beta"), CONFIG_DOUBLE, kv_cache.pyramid_kv.beta, "20", 1, 1e6,
           "the last layer keeps 1 / beta of the mean budget, the first one the rest of twice the mean"),
    NUMBER("kv_cache.streaming_llm.sinks", CONFIG_INT, kv_cache.streaming_llm.sinks, "4", 0, 1 << 20,
           "first tokens of a prompt that stay"),
    NUMBER("kv_cache.h2o.recent", CONFIG_DOUBLE, kv_cache.h2o.recent, "0.5", 0, 1,
           "the newest tokens' part of the budget; the rest are the most attended ones"),
    NUMBER("kv_cache.quest.min_pages", CONFIG_INT, kv_cache.quest.min_pages, "3", 1, 1 << 20,
           "pages that a KV head reads at least in a decode step"),
    NUMBER("kv_cache.quest.full_layers", CONFIG_INT, kv_cache.quest.full_layers, "2", 0, 1 << 20,
           "first layers that read the whole cache in every step"),
    CHOICE(PYRAMID_INFER("target_ratio"), kv_cache.pyramid_infer.target_ratio, "on", switch_names, 0,
           "on: recent_ratio and ratio are found for the budget, as the mean over the layers; off: they are as given"),
    NUMBER(PYRAMID_INFER("recent_ratio"), CONFIG_DOUBLE, kv_cache.pyramid_infer.recent_ratio, "0.2", 0, 1,
           "newest rows that judge and stay, as a share of the prompt; the paper's rho"),
    NUMBER(PYRAMID_INFER("ratio"), CONFIG_DOUBLE, kv_cache.pyramid_infer.ratio, "0.8", 0, 1,
           "share of the context that stays after a layer, at the last one; 1 at the first"),
    NUMBER(PYRAMID_INFER("interval"), CONFIG_INT, kv_cache.pyramid_infer.interval, "2", 1, 1024,
           "tokens leave after every so many layers"),
    NUMBER(PYRAMID_INFER("min_context"), CONFIG_INT, kv_cache.pyramid_infer.min_context, "64", 0, 1 << 20,
           "a context that would fall to so many tokens or below stays as it is"),
    NUMBER(PYRAMID_INFER("sinks"), CONFIG_INT, kv_cache.pyramid_infer.sinks, "4", 0, 1 << 20,
           "first tokens of a prompt that stay"),
    NUMBER(PYRAMID_INFER("recent_weight"), CONFIG_DOUBLE, kv_cache.pyramid_infer.recent_weight, "1.2", 0, 1000,
           "weight of the newest judging row; the oldest one's is 1"),
    CHOICE(PYRAMID_INFER("judges"), kv_cache.pyramid_infer.judges, "recent", judges_names, 0,
           "rows that judge and stay: the recent share, or the text after the last image as VL-Cache has it"),
    NUMBER(PYRAMID_INFER("generation_decay"), CONFIG_DOUBLE, kv_cache.pyramid_infer.generation_decay, "0.1", 0, 1,
           "generated tokens: share of a block that stays at the last layer, before generation_compress"),
    NUMBER(PYRAMID_INFER("generation_compress"), CONFIG_DOUBLE, kv_cache.pyramid_infer.generation_compress, "0.9", 0, 1,
           "generated tokens: what that share is multiplied by in every layer"),
    NUMBER(PYRAMID_INFER("generation_block"), CONFIG_INT, kv_cache.pyramid_infer.generation_block, "16", 0, 1024,
           "generated tokens that are judged at a time; 0: all of them stay"),
    NUMBER(CLUSTER_KV("sinks"), CONFIG_INT, kv_cache.cluster_kv.sinks, "16", 0, 1 << 20,
           "first tokens, in no cluster and always attended to"),
    NUMBER(CLUSTER_KV("full_layers"), CONFIG_INT, kv_cache.cluster_kv.full_layers, "2", 0, 1 << 20,
           "first layers that attend to everything"),
    NUMBER(CLUSTER_KV("tokens_per_cluster"), CONFIG_INT, kv_cache.cluster_kv.tokens_per_cluster, "80", 1, 1 << 20,
           "a prompt's tokens over its clusters"),
    NUMBER(CLUSTER_KV("iterations"), CONFIG_INT, kv_cache.cluster_kv.iterations, "20", 1, 1000, "rounds of k-means"),
    NUMBER(CLUSTER_KV("window"), CONFIG_INT, kv_cache.cluster_kv.window, "320", 1, 1 << 20,
           "generated tokens that are clustered together; until then all of them are attended to"),
    NUMBER(CLUSTER_KV("window_clusters"), CONFIG_INT, kv_cache.cluster_kv.window_clusters, "4", 1, 4096,
           "clusters that they become"),
    CHOICE(CLUSTER_KV("group"), kv_cache.cluster_kv.group, "max", group_names, 0,
           "whose lists: a KV head's, by the largest or mean score of its query heads, or each query head's own"),
    NUMBER(CLUSTER_KV("single_text"), CONFIG_INT, kv_cache.cluster_kv.single_text, "0", 0, 1024,
           "last text tokens of a prompt, counted from its end, that are each a cluster of its own"),
    CHOICE(CLUSTER_KV("overlap"), kv_cache.cluster_kv.overlap, "off", switch_names, 0,
           "on: cluster the layers of prompts of 4,096 tokens and more beside the computation of the layers behind "
           "them, not at the prompt's end"),
    NUMBER(EXPECTED("sinks"), CONFIG_INT, kv_cache.expected_attention.sinks, "4", 0, 1 << 20,
           "first tokens of a prompt that stay, and whose queries do not count"),
    NUMBER(EXPECTED("future"), CONFIG_INT, kv_cache.expected_attention.future, "512", 1, 1 << 20,
           "positions after the prompt that queries are expected at"),
    NUMBER(EXPECTED("window"), CONFIG_INT, kv_cache.expected_attention.window, "0", 0, 1 << 20,
           "newest tokens that stay"),
    NUMBER(EXPECTED("max_rows"), CONFIG_INT, kv_cache.expected_attention.max_rows, "0", 0, 1 << 20,
           "model queries by the last so many rows only; 0: by the whole prompt"),
    NUMBER(EXPECTED("epsilon"), CONFIG_DOUBLE, kv_cache.expected_attention.epsilon, "0", 0, 1,
           "added to the expected attention before the value's length weighs it"),
    TEXT("allowed_local_media_path", allowed_local_media_path, ".",
         "directory under which file: URLs of requests must lie; files named on the command line may be anywhere"),
    CHOICE("load_format", load_format, "auto", load_names, 0,
           "auto: read the checkpoint; dummy: random weights from config.json alone"),
    ROW("seed", CONFIG_SEED, seed, "0", .help = "seed of sampling where a request brings none, and of dummy weights"),
    WORD("chat_template", chat_template, "auto", chat_names, "how messages become a prompt; auto: by the model"),
    NUMBER("max_queued", CONFIG_INT, max_queued, "256", 1, 1 << 20, "most requests that wait inside the engine"),
    NUMBER("max_images_per_prompt", CONFIG_INT, max_images_per_prompt, "64", 0, 4096, "most images of one request"),
    NUMBER("max_image_bytes", CONFIG_BYTES, max_image_bytes, "64MiB", 1, 1LL << 31, "largest image file"),
    NUMBER("max_image_pixels", CONFIG_INT, max_image_pixels, "67108864", 1, 1LL << 31,
           "most pixels of an image, width x height"),
    NUMBER("max_request_bytes", CONFIG_BYTES, max_request_bytes, "64MiB", 1024, 1LL << 31,
           "longest line of a batch file"),
    ROW("cpu_threads", CONFIG_INT, cpu_threads, "auto", .min = 1, .max = 1024, .automatic = true, .local = true,
        .help = "threads of each CPU rank; auto: the cores that this job may use over the ranks of the host"),
    NUMBER("watchdog_timeout", CONFIG_DOUBLE, watchdog_timeout, "300", 0, 1e6,
           "seconds that a rank may spend in a step without progress before the job is ended; 0: no limit"),
    CHOICE("log_level", log_level, "info", log_names, 0, "least level of lines on standard error"),
};

/* Other names of a key, mostly those of vLLM, SGLang, TensorRT-LLM and LMDeploy. */
static const struct {
    const char *alias, *path;
} aliases[] = {
    {"kv_policy", "kv_cache.policy"},
    {"kv_budget", "kv_cache.budget"},
    {"block_size", "kv_cache.page_size"},
    {"kv_cache_dtype", "kv_cache.dtype"},
    {"model_path", "model"},
    {"tp", "tensor_parallel_size"},
    {"tp_size", "tensor_parallel_size"},
    {"dp", "data_parallel_size"},
    {"dp_size", "data_parallel_size"},
    {"context_length", "max_model_len"},
    {"max_seq_len", "max_model_len"},
    {"session_len", "max_model_len"},
    {"max_running_requests", "max_num_seqs"},
    {"max_batch_size", "max_num_seqs"},
    {"max_num_tokens", "max_num_batched_tokens"},
    {"chunked_prefill_size", "max_num_batched_tokens"},
    {"max_queued_requests", "max_queued"},
};
enum { N_KEYS = sizeof table / sizeof *table, N_ALIASES = sizeof aliases / sizeof *aliases };

const struct config_key *config_keys(int *n)
{
    *n = N_KEYS;
    return table;
}

const struct config_key *config_find(const char *path)
{
    for (int i = 0; i < N_KEYS; i++)
        if (!strcmp(table[i].path, path)) return &table[i];
    for (int i = 0; i < N_ALIASES; i++)
        if (!strcmp(aliases[i].alias, path)) return config_find(aliases[i].path);
    return NULL;
}

static const char *dashed(const char *name, char *buf, size_t size)
{
    snprintf(buf, size, "%s", name);
    for (char *c = buf; *c; c++)
        if (*c == '_' || *c == '.') *c = '-';
    return buf;
}

const struct config_key *config_find_option(const char *option)
{
    char name[128], own[128];
    if (strlen(option) >= sizeof name || strchr(option, '.')) return NULL;
    dashed(option, name, sizeof name);
    for (int i = 0; i < N_KEYS; i++)
        if (!strcmp(dashed(table[i].path, own, sizeof own), name)) return &table[i];
    for (int i = 0; i < N_ALIASES; i++)
        if (!strcmp(dashed(aliases[i].alias, own, sizeof own), name)) return config_find(aliases[i].path);
    return NULL;
}

const char *config_option_name(const struct config_key *key, char *buf, size_t size)
{
    return dashed(key->path, buf, size);
}

const char *config_alias(int i, const struct config_key **key)
{
    if (i < 0 || i >= N_ALIASES) return NULL;
    *key = config_find(aliases[i].path);
    return aliases[i].alias;
}
