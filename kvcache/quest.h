/* quest - the state of the Quest policy, for tests; the policy is policies/quest.c. */
#ifndef VITRAIL_KVCACHE_QUEST_H
#define VITRAIL_KVCACHE_QUEST_H

#include "kvcache/policy.h"

struct quest {
    struct page_pick pick; /* bounds of all pages of the pool; scores and lists of one layer, device */
    int32_t *limit;        /* [n_slots] pick.limit, device */
};

/* quest_pages - most pages that a KV head reads of an m-token prompt's sequence in a step: max(min_pages, B /
 * page_size) for a budget of B tokens; 0 (the whole lane) where the budget is everything. */
int quest_pages(const struct quest_options *options, struct kv_budget budget, int m, int page_size);

#endif
