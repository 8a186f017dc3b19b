#include "runtime/resources.h"

#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "model/image.h"

static const char tables_label[] = "KV tables";

size_t resources_page_bytes(const struct resources *r)
{
    return 2 * (size_t)r->config.kv_page_size * (size_t)r->dims.head_dim * dtype_size(r->ops->dtype);
}

size_t resources_scale_bytes(const struct resources *r)
{
    return r->quantises ? 2 * (size_t)kv_page_tokens(&r->kv, KV_INT8) * sizeof(float) : 0;
}

enum kv_format resources_format(const struct resources *r) { return kv_dtype_format(r->config.kv_cache.dtype); }

static int64_t pages_of(int64_t tokens, int page_tokens) { return (tokens + page_tokens - 1) / page_tokens; }

int64_t resources_lane_pages(const struct resources *r, int tokens)
{
    const int plain = kv_plain_tokens(&r->config.kv_cache), most = plain + r->kv.page_size;
    const int code_tokens = kv_page_tokens(&r->kv, resources_format(r));
    if (!plain) return pages_of(tokens, code_tokens);
    return pages_of(tokens < most ? tokens : most, r->kv.page_size) +
           (tokens > plain ? pages_of(tokens - plain, code_tokens) : 0);
}

int64_t resources_kept_token_bytes(const struct resources *r)
{
    const struct model_dims *dims = &r->dims;
    if (resources_format(r) == KV_PLAIN) return resources_token_bytes(dims, r->ops->dtype);
    return 2 * (int64_t)dims->n_layers * dims->n_kv_heads * (dims->head_dim + (int64_t)sizeof(float));
}

int64_t resources_token_bytes(const struct model_dims *dims, enum dtype dtype)
{
    return 2 * (int64_t)dims->n_layers * dims->n_kv_heads * dims->head_dim * (int64_t)dtype_size(dtype);
}

bool resources_keeps_evicted(const struct resources *r) { return r->config.kv_cache.evicted == KV_EVICTED_HOST; }

int resources_max_images(const struct config *config, const struct model_dims *dims)
{
    return dims->family == MODEL_LLAVA ? config->max_num_batched_tokens / dims->vision.n_image_tokens : 0;
}

int resources_max_prompt_tokens(const struct config *config)
{
    return config->max_num_batched_tokens > config->max_model_len ? config->max_num_batched_tokens
                                                                  : config->max_model_len;
}

/* Resolves automatic limits and refuses what cannot work. */
static int resolve_limits(struct config *c, const struct model_dims *dims)
{
    if (!c->max_model_len)
        c->max_model_len = dims->max_position_embeddings < CONFIG_AUTO_MODEL_LEN ? dims->max_position_embeddings
                                                                                 : CONFIG_AUTO_MODEL_LEN;
    if (c->max_model_len > dims->max_position_embeddings)
        FAIL(ERR_CONFIG, "max_model_len is %d, but the model has %d positions (max_position_embeddings)",
             c->max_model_len, dims->max_position_embeddings);
    if (dims->family == MODEL_LLAVA && c->max_num_batched_tokens < dims->vision.n_image_tokens)
        FAIL(ERR_CONFIG, "max_num_batched_tokens is %d, but one image of this model takes %d tokens in one step",
             c->max_num_batched_tokens, dims->vision.n_image_tokens);
    return OK;
}

/* How the tower wants its pixels, from preprocessor_config.json or CLIP's defaults. */
static int find_pixel_scale(const struct resources *r, struct model_options *options)
{
    struct image_processor processor;
    char path[CONFIG_PATH_BYTES];
    TRY(path_join(path, sizeof path, r->config.model, "preprocessor_config.json"));
    int height, width, size = r->dims.vision.image_size;
    processor = image_processor_default(size);
    if (file_exists(path)) TRY(image_processor_load(path, &processor));
    image_processor_output_size(&processor, &height, &width);
    if (height != size || width != size)
        FAIL(ERR_FORMAT, "%s: images come out as %d x %d, the vision tower takes %d x %d", path, width, height, size,
             size);
    image_processor_scale_shift(&processor, options->pixel_scale, options->pixel_shift);
    return OK;
}

static enum dtype weight_dtype(const struct config *config)
{
    switch (config->dtype) {
    case CONFIG_DTYPE_FLOAT32: return DTYPE_F32;
    case CONFIG_DTYPE_FLOAT16: return DTYPE_F16;
    case CONFIG_DTYPE_BFLOAT16: return DTYPE_BF16;
    default: return DTYPE_N;
    }
}

int resources_use_dtype(const struct config *config, const struct model_dims *dims, struct ops *ops)
{
    enum dtype wanted = weight_dtype(config);
    if (config->device == CONFIG_DEVICE_CUDA && wanted == DTYPE_F32)
        FAIL(ERR_CONFIG, "dtype is float32, which is served on CPU only; set bfloat16, float16 or auto");
    return ops_use_dtype(ops, wanted != DTYPE_N ? wanted : dims->dtype);
}

/* Lanes to come are plain, or in 8 bits, or in two parts; others know how they are stored. True where that changed. */
static bool use_format(struct resources *r, const struct policy_config *config)
{
    const enum kv_format kv = r->kv.format, aged = r->aged.format, format = kv_dtype_format(config->dtype);
    const bool parts = kv_plain_tokens(config) > 0;
    r->kv.format = parts ? KV_PLAIN : format;
    r->aged.format = parts ? format : KV_PLAIN;
    return r->kv.format != kv || r->aged.format != aged;
}

int resources_open(const struct config *config, const struct model_dims *dims, struct ops *ops, struct comm *comm,
                   struct resources *r)
{
    memset(r, 0, sizeof *r);
    r->config = *config;
    r->dims = *dims;
    r->ops = ops;
    r->comm = comm;
    TRY(resolve_limits(&r->config, dims));
    r->quantises = kv_dtype_format(config->kv_cache.dtype) != KV_PLAIN || strstr(config->other_dtypes, "fp8") ||
                   strstr(config->other_dtypes, "int8");
    r->ages = r->quantises && config->kv_cache.plain_sinks + config->kv_cache.plain_window > 0;
    struct model_options options = {.max_tokens = r->config.max_num_batched_tokens,
                                    .max_seqs = r->config.max_num_seqs,
                                    .max_context = r->config.max_model_len,
                                    .max_images = resources_max_images(&r->config, dims),
                                    .aged = r->ages,
                                    /* A GPU multiplies weights and activations of one dtype. */
                                    .weight_dtype = ops->dtype == DTYPE_F32 ? weight_dtype(config) : ops->dtype};
    if (dims->family == MODEL_LLAVA) TRY(find_pixel_scale(r, &options));
    TRY(model_open(dims, &options, ops, comm, &r->model));
    r->kv = (struct kv_view){.page_size = r->config.kv_page_size,
                             .head_dim = dims->head_dim,
                             .max_pages = (r->config.max_model_len + r->config.kv_page_size) / r->config.kv_page_size,
                             .lanes_per_slot = model_lanes(r->model),
                             .n_slots = r->config.max_num_seqs};
    r->kv.pool.dtype = ops->dtype;
    r->host = r->kv;
    use_format(r, &config->kv_cache);
    return OK;
}

void resources_close(struct resources *r)
{
    policy_close(&r->policy);
    model_close(r->model);
    memset(r, 0, sizeof *r);
}

static struct policy_env policy_env(const struct resources *r)
{
    return (struct policy_env){.ops = r->ops,
                               .comm = r->comm,
                               .kv = &r->kv,
                               .host = resources_keeps_evicted(r) ? &r->host : NULL,
                               .aged = r->aged.format != KV_PLAIN ? &r->aged : NULL,
                               .layers = model_layers(r->model),
                               .n_layers = r->dims.n_layers,
                               .inverse_frequency = model_inverse_frequency(r->model),
                               .g_n_heads = r->dims.n_heads,
                               .max_context = r->config.max_model_len,
                               .max_prompt_tokens = resources_max_prompt_tokens(&r->config)};
}

static int measure_policy(struct resources *r, const char *name, size_t length, bool other)
{
    struct policy_config config = r->config.kv_cache;
    if (other) config.dtype = KV_DTYPE_AUTO; /* which of them go together is known when one is set */
    struct policy_env env = policy_env(r);
    struct kv_view kv = r->kv;
    struct policy policy;
    struct arena arena;
    if (r->quantises) kv.format = KV_INT8; /* in 8 bits, whichever, some keep more */
    env.kv = &kv;
    snprintf(config.policy, sizeof config.policy, "%.*s", (int)length, name);
    arena_measure(&arena);
    int rc = policy_open(&policy, &config, &env, &arena);
    policy_close(&policy);
    if (!rc && arena.used > r->policy_bytes) r->policy_bytes = arena.used;
    return rc;
}

/* The most that the configured policy's state takes, or that of another one that the command is going to set. */
static int measure_policies(struct resources *r)
{
    r->policy_bytes = 0;
    TRY(measure_policy(r, r->config.kv_cache.policy, strlen(r->config.kv_cache.policy), false));
    for (const char *name = r->config.other_policies; *name;) {
        size_t length = strcspn(name, ",");
        TRY(measure_policy(r, name, length, true));
        name += length + (name[length] == ',');
    }
    return OK;
}

int resources_policy_page_bytes(struct resources *r, size_t *bytes)
{
    enum { MANY = 1 << 24 }; /* more than fit: the state grows no faster up to here than it does on the way to it */
    r->kv.n_pages = 0;
    TRY(measure_policies(r));
    const size_t none = r->policy_bytes;
    r->kv.n_pages = MANY;
    TRY(measure_policies(r));
    *bytes = (r->policy_bytes - none + MANY - 1) / MANY;
    r->kv.n_pages = 0;
    return OK;
}

static int place_kv(struct resources *r, struct arena *arena, int64_t n_pages)
{
    struct kv_view *kv = &r->kv;
    size_t lanes = (size_t)kv->n_slots * (size_t)kv->lanes_per_slot;
    TRY(arena_take(arena, lanes * (size_t)kv->max_pages * sizeof(int32_t), tables_label, &kv->page_row));
    TRY(arena_take(arena, lanes * sizeof(int32_t), tables_label, &kv->lane_len));
    TRY(arena_take(arena, (size_t)n_pages * sizeof(int32_t), tables_label, &kv->free_stack));
    TRY(arena_take(arena, sizeof(int32_t), tables_label, &kv->free_count));
    TRY(arena_take(arena, sizeof(int32_t), tables_label, &kv->error));
    if (r->quantises) {
        TRY(arena_take(arena, lanes * sizeof(int32_t), tables_label, &kv->lane_format));
        TRY(arena_take(arena, (size_t)n_pages * resources_scale_bytes(r), "KV scales", &kv->scale));
    }
    return arena_tensor(arena, tensor_3d(NULL, r->ops->dtype, n_pages, 2 * (int64_t)kv->page_size, kv->head_dim),
                        "KV pages", &kv->pool);
}

/* The same pages in other lanes. */
static int place_aged(struct resources *r, struct arena *arena)
{
    const enum kv_format format = r->aged.format;
    struct kv_view *aged = &r->aged;
    *aged = r->kv;
    aged->format = format;
    if (!r->ages) return OK;
    const size_t lanes = (size_t)aged->n_slots * (size_t)aged->lanes_per_slot;
    TRY(arena_take(arena, lanes * (size_t)aged->max_pages * sizeof(int32_t), tables_label, &aged->page_row));
    TRY(arena_take(arena, lanes * sizeof(int32_t), tables_label, &aged->lane_len));
    return arena_take(arena, lanes * sizeof(int32_t), tables_label, &aged->lane_format);
}

/* The same tables for pages that lie elsewhere. An error there is one of the cache. */
static int place_host(struct resources *r, struct arena *arena, int64_t n_pages)
{
    struct kv_view *host = &r->host;
    const size_t lanes = (size_t)host->n_slots * (size_t)host->lanes_per_slot;
    host->n_pages = (int)n_pages;
    host->pool = tensor_3d(host->pool.data, r->ops->dtype, n_pages, 2 * (int64_t)host->page_size, host->head_dim);
    host->error = r->kv.error;
    if (!resources_keeps_evicted(r)) return OK;
    TRY(arena_take(arena, lanes * (size_t)host->max_pages * sizeof(int32_t), tables_label, &host->page_row));
    TRY(arena_take(arena, lanes * sizeof(int32_t), tables_label, &host->lane_len));
    TRY(arena_take(arena, (size_t)n_pages * sizeof(int32_t), tables_label, &host->free_stack));
    return arena_take(arena, sizeof(int32_t), tables_label, &host->free_count);
}

void resources_use_host(struct resources *r, void *memory) { r->host.pool.data = memory; }

static int place_sampling(struct resources *r, struct arena *arena)
{
    struct sampling_state *s = &r->sampling;
    size_t slots = (size_t)r->kv.n_slots, pairs = slots * (1 + MAX_LOGPROBS);
    static const char label[] = "sampling";
    s->vocab_size = r->dims.vocab_size;
    s->n_slots = r->kv.n_slots;
    TRY(arena_take(arena, slots * sizeof *s->params, label, &s->params));
    TRY(arena_take(arena, slots * (size_t)s->vocab_size * sizeof *s->token_count, label, &s->token_count));
    TRY(arena_take(arena, slots * sizeof *s->next_token, label, &s->next_token));
    TRY(arena_take(arena, slots * sizeof *s->position, label, &s->position));
    TRY(arena_take(arena, pairs * sizeof *s->logprob, label, &s->logprob));
    TRY(arena_take(arena, pairs * sizeof *s->logprob_token, label, &s->logprob_token));
    TRY(arena_take(arena, slots * sizeof *s->forced_span, label, &s->forced_span));
    TRY(arena_take(arena, slots * MAX_FORCED * sizeof *s->forced, label, &s->forced));
    TRY(arena_take(arena, 2 * (slots + 1) * sizeof *r->tokens, label, &r->tokens));
    TRY(arena_take(arena, 2 * pairs * sizeof *r->logprob, label, &r->logprob));
    if (resources_keeps_evicted(r))
        TRY(arena_take(arena, 4 * slots * sizeof *r->recall_counts, label, &r->recall_counts));
    return arena_take(arena, 2 * pairs * sizeof *r->logprob_token, label, &r->logprob_token);
}

int resources_place(struct resources *r, struct arena *arena, const struct checkpoint *checkpoint, int64_t n_pages,
                    int64_t n_host_pages)
{
    TRY(model_place(r->model, arena, checkpoint));
    TRY(place_sampling(r, arena));
    if (n_pages > INT32_MAX || n_host_pages > INT32_MAX)
        FAIL(ERR_CONFIG,
             "kv_cache_memory_bytes, kv_cache.host_memory_bytes: %lld and %lld pages, at most %d are served",
             (long long)n_pages, (long long)n_host_pages, INT32_MAX);
    r->kv.n_pages = (int)n_pages; /* a policy may keep something for each */
    TRY(measure_policies(r));
    TRY(arena_take(arena, r->policy_bytes, "policy state", &r->policy_memory));
    TRY(place_kv(r, arena, n_pages));
    TRY(place_aged(r, arena));
    return place_host(r, arena, n_host_pages);
}

int resources_check_policy(const struct resources *r, const struct policy_config *config)
{
    TRY(policy_check(config));
    if (kv_dtype_format(config->dtype) != KV_PLAIN && !r->quantises)
        FAIL(ERR_CONFIG, "kv_cache.dtype: the cache has no room for scales; set fp8 or int8 when the engine starts");
    if (kv_plain_tokens(config) > 0 && !r->ages)
        FAIL(ERR_CONFIG, "kv_cache.plain_sinks, kv_cache.plain_window: the cache has no tables for lanes in two parts; "
                         "set one of them when the engine starts");
    return OK;
}

int resources_set_policy(struct resources *r, const struct policy_config *config)
{
    struct arena arena;
    TRY(resources_check_policy(r, config));
    bool warm = r->policy.vt != NULL, hooked = warm && policy_decoder(&r->policy)->vt->decode_attention;
    int n_buckets;
    policy_close(&r->policy);
    arena_init(&arena, r->policy_memory, r->policy_bytes);
    r->config.kv_cache = *config;
    bool other_format = use_format(r, config);
    struct policy_env env = policy_env(r);
    TRY(policy_open(&r->policy, config, &env, &arena));
    if (!warm || !(hooked || policy_decoder(&r->policy)->vt->decode_attention || other_format)) return OK;
    /* The ops of a policy that has some in decode steps, and the format that others read, were recorded with them. */
    ops_forget_steps(r->ops);
    return model_warm(r->model, &r->kv, &r->policy, &r->sampling, &n_buckets);
}

int resources_begin(struct resources *r, struct checkpoint *checkpoint, const struct load_progress *progress)
{
    TRY(model_load(r->model, checkpoint, r->config.seed, progress));
    TRY(ops_kv_reset(r->ops, &r->kv));
    if (r->ages) TRY(ops_kv_reset(r->ops, &r->aged));
    if (resources_keeps_evicted(r)) TRY(ops_kv_reset(r->ops, &r->host));
    return resources_set_policy(r, &r->config.kv_cache);
}
