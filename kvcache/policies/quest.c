/* Quest (arXiv 2406.10774): all tokens stay in the cache, and each decode step reads the pages that matter to it.
 *
 * Of every page the least and the largest of each channel of its keys are kept. From them follows, for the query at
 * hand, the most that a key of the page could give; each KV head reads the pages with the highest such bound, taken
 * over the query heads of its group. The first layers read everything, as in the paper: their attention is spread. All
 * is local to a rank, and the newest page has no privilege. Pages are kv_cache.page_size tokens also where lanes are
 * kept in 8 bits; the prompt's bounds are those of its keys as they were, the others' of what the codes stand for. */
#include <math.h>
#include <stdlib.h>

#include "kvcache/eviction.h"
#include "kvcache/quest.h"

static int quest_open(struct policy *policy, struct arena *arena)
{
    static const char label[] = "policy state";
    const struct policy_env *env = &policy->env;
    const struct kv_view *kv = env->kv;
    struct quest *s = calloc(1, sizeof *s);
    policy->state = s;
    if (!s) FAIL(ERR_NOMEM, "quest: out of memory");
    const int64_t lists = (int64_t)kv->n_slots * policy_most_kv_heads(env);
    s->pick.stride = kv->max_pages * kv->page_size;
    struct tensor bounds =
        tensor_3d(NULL, env->ops->dtype, kv->n_pages, 2 * (int64_t)kv_picked_pages(kv), kv->head_dim);
    TRY(arena_tensor(arena, bounds, label, &s->pick.bounds));
    TRY(arena_tensor(arena, tensor_2d(NULL, DTYPE_F32, lists, kv->max_pages), label, &s->pick.score));
    TRY(arena_take(arena, (size_t)lists * (size_t)s->pick.stride * sizeof(int32_t), label, &s->pick.entry));
    TRY(arena_take(arena, (size_t)lists * sizeof(int32_t), label, &s->pick.count));
    TRY(arena_take(arena, (size_t)kv->n_slots * sizeof(int32_t), label, &s->limit));
    s->pick.limit = s->limit;
    return OK;
}

static void quest_close(struct policy *policy) { free(policy->state); }

int quest_pages(const struct quest_options *options, struct kv_budget budget, int m, int page_size)
{
    if (kv_budget_share(budget, m) >= 1.0) return 0;
    int pages = eviction_tokens(budget, m) / page_size;
    return pages > options->min_pages ? pages : options->min_pages;
}

/* Of a follow-up only the bounds of its pages are new: how many are read stays as the first prompt's budget had it. */
static int quest_begin_decode(struct policy *policy, const struct policy_sequence *sequence)
{
    const struct quest *s = policy->state;
    const struct kv_view *kv = policy->env.kv;
    if (!sequence->continues) {
        int32_t limit = quest_pages(&policy->config.quest, sequence->budget, sequence->prompt_tokens, kv->page_size);
        TRY(ops_upload(policy->env.ops, s->limit + sequence->slot, &limit, sizeof limit));
        if (!limit) return OK;
    }
    return ops_page_bounds(policy->env.ops, s->pick.bounds, kv, sequence->slot, 0, kv->lanes_per_slot);
}

static int quest_decode_attention(struct policy *policy, const struct policy_decode *in)
{
    const struct quest *s = policy->state;
    const struct policy_env *env = &policy->env;
    const struct attention_heads *heads = &env->layers[in->layer].heads;
    if (in->layer < policy->config.quest.full_layers)
        return ops_attention_decode(env->ops, in->out, in->q, in->batch, env->kv, heads);
    struct page_pick pick = s->pick;
    pick.score = tensor_rows(pick.score, 0, (int64_t)in->batch->n_seqs * heads->n_kv_heads);
    TRY(ops_pick_pages(env->ops, in->q, in->batch, env->kv, heads, &pick));
    const struct kv_list list = {.entry = pick.entry, .count = pick.count, .stride = pick.stride};
    return ops_attention_decode_listed(env->ops, in->out, in->q, in->batch, env->kv, heads, &list);
}

static struct policy_reads quest_reads(const struct policy *policy, const struct policy_sequence *sequence, double kept,
                                       int before)
{
    const struct policy_env *env = &policy->env;
    const int size = env->kv->page_size, most = policy->config.quest.full_layers;
    const int full = most < env->n_layers ? most : env->n_layers, layers = env->n_layers - full;
    const double lane = kept + before + 1, pages = ceil(lane / size);
    const int limit = quest_pages(&policy->config.quest, sequence->budget, sequence->prompt_tokens, size);
    if (!limit || limit >= pages) return (struct policy_reads){.tokens = lane};
    const double bounds = 2.0 * env->kv->head_dim * (double)dtype_size(env->ops->dtype);
    return (struct policy_reads){.tokens = (full * lane + layers * (double)limit * size) / env->n_layers,
                                 .beside_bytes = (int64_t)(policy_kv_heads(policy) * layers * pages * bounds)};
}

const struct policy_vt policy_quest = {
    .name = "quest",
    .paper = "Quest, arXiv 2406.10774",
    .open = quest_open,
    .close = quest_close,
    .begin_decode = quest_begin_decode,
    .decode_attention = quest_decode_attention,
    .reads = quest_reads,
};
