/* What bench is asked to run: comma lists, read and checked before anything is measured. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/bench_internal.h"

int bench__read_numbers(const char *option, const char *text, int most, const char *limit, int *out, int *n)
{
    *n = 0;
    for (const char *at = text;; at++) {
        char *end;
        errno = 0;
        long value = strtol(at, &end, 10);
        if (errno || end == at || (*end && *end != ',') || value < 1)
            FAIL(ERR_CONFIG, "%s %.64s: expected whole numbers from 1 with commas between, as in 1,8,32", option, text);
        if (value > most) FAIL(ERR_CONFIG, "%s %ld exceeds %d, %s", option, value, most, limit);
        if (*n == BENCH_LIST_MAX) FAIL(ERR_CONFIG, "%s: more than %d numbers", option, BENCH_LIST_MAX);
        out[(*n)++] = (int)value;
        at = end;
        if (!*at) return OK;
    }
}

/* The next item of a comma list into buf; *list moves on, NULL behind the last. */
static int next_item(const char *option, const char **list, char *buf, size_t size)
{
    size_t n = strcspn(*list, ",");
    if (!n || n >= size) FAIL(ERR_CONFIG, "%s: \"%.64s\" is no comma list", option, *list);
    memcpy(buf, *list, n);
    buf[n] = 0;
    *list = (*list)[n] ? *list + n + 1 : NULL;
    return OK;
}

static int read_policies(const char *list, struct bench_lists *out)
{
    const struct policy_vt *vt;
    for (out->n_policies = 0; list; out->n_policies++) {
        if (out->n_policies == BENCH_LIST_MAX) FAIL(ERR_CONFIG, "--kv-policy: more than %d names", BENCH_LIST_MAX);
        char *name = out->policy[out->n_policies];
        TRY(next_item("--kv-policy", &list, name, sizeof out->policy[0]));
        if (policy_find(name, &vt)) return status_prefix(ERR_CONFIG, "--kv-policy");
    }
    return OK;
}

static int read_budgets(const char *list, struct bench_lists *out)
{
    char budget[32];
    for (out->n_budgets = 0; list; out->n_budgets++) {
        if (out->n_budgets == BENCH_LIST_MAX) FAIL(ERR_CONFIG, "--kv-budget: more than %d budgets", BENCH_LIST_MAX);
        TRY(next_item("--kv-budget", &list, budget, sizeof budget));
        if (kv_budget_parse(budget, &out->budget[out->n_budgets])) return status_prefix(ERR_CONFIG, "--kv-budget");
    }
    return OK;
}

static int check_images(const struct bench_options *o, const struct config *config, const struct model_dims *dims)
{
    if (!o->n_images) return OK;
    if (dims->family != MODEL_LLAVA)
        FAIL(ERR_CONFIG, "--images %d for a model without a vision tower (%.200s)", o->n_images, config->model);
    if (o->n_images > config->max_images_per_prompt)
        FAIL(ERR_CONFIG, "--images %d exceeds max_images_per_prompt %d; raise that key", o->n_images,
             config->max_images_per_prompt);
    return OK;
}

/* Text that a prompt may have beside images and answer. */
static int read_prompt_lens(const struct bench_options *o, const struct config *config, const struct model_dims *dims,
                            struct bench_lists *out)
{
    char limit[128];
    int64_t images = o->n_images ? (int64_t)o->n_images * dims->vision.n_image_tokens : 0;
    int64_t most = config->max_model_len - images - o->gen_len;
    if (most < 1)
        FAIL(ERR_CONFIG,
             "--images and --gen-len leave no room for text: %lld tokens of images, %d to generate, "
             "max_model_len is %d",
             (long long)images, o->gen_len, config->max_model_len);
    snprintf(limit, sizeof limit, "what max_model_len %d leaves beside %lld tokens of images and %d to generate",
             config->max_model_len, (long long)images, o->gen_len);
    return bench__read_numbers("--prompt-len", o->prompt_lens, (int)most, limit, out->prompt_len, &out->n_prompt_lens);
}

int bench__read_lists(const struct bench_options *o, const struct config *config, const struct model_dims *dims,
                      struct bench_lists *out)
{
    bool slots = config->max_num_seqs <= config->max_queued;
    TRY(bench__read_numbers("--batch", o->batches, slots ? config->max_num_seqs : config->max_queued,
                            slots ? "max_num_seqs; raise that key" : "max_queued; raise that key", out->batch,
                            &out->n_batches));
    TRY(check_images(o, config, dims));
    TRY(read_prompt_lens(o, config, dims, out));
    if (o->find_batch && o->gen_len < 2)
        FAIL(ERR_CONFIG, "--find-batch needs a --gen-len of at least 2: sequences count as at once when they decode "
                         "in one step");
    TRY(read_policies(o->policies ? o->policies : config->kv_cache.policy, out));
    out->budget[0] = config->kv_cache.budget;
    out->n_budgets = 1;
    return o->budgets ? read_budgets(o->budgets, out) : OK;
}
