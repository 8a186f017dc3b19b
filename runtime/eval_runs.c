/* The list of runs: policies times budgets times dtypes. */
#include <stdlib.h>
#include <string.h>

#include "runtime/eval_internal.h"

enum { MAX_ITEM = 64 };

int eval__next_item(const char **list, const char *what, char *buf, size_t size)
{
    const char *comma = strchr(*list, ',');
    size_t n = comma ? (size_t)(comma - *list) : strlen(*list);
    if (!n || n >= size) FAIL(ERR_CONFIG, "%s: \"%s\" is no comma list of names", what, *list);
    memcpy(buf, *list, n);
    buf[n] = 0;
    *list = comma ? comma + 1 : NULL;
    return OK;
}

struct listing {
    const struct eval_options *options;
    const struct config *config; /* with the dtype under way */
    int n_questions;
    struct eval_one_run *runs;
    int *n_runs;
};

static int add_run(const struct listing *l, const char *policy, struct kv_budget budget)
{
    if (*l->n_runs == EVAL_MAX_RUNS) FAIL(ERR_CONFIG, "more than %d runs of policies and budgets", EVAL_MAX_RUNS);
    struct eval_one_run *run = &l->runs[(*l->n_runs)++];
    memset(run, 0, sizeof *run);
    run->config = l->config->kv_cache;
    snprintf(run->config.policy, sizeof run->config.policy, "%s", policy);
    run->config.budget = budget;
    run->dtype = config_find("kv_cache.dtype")->names[run->config.dtype];
    TRY(policy_check(&run->config));
    run->answer = calloc((size_t)l->n_questions, sizeof *run->answer);
    if (!run->answer) FAIL(ERR_NOMEM, "no memory for %d answers", l->n_questions);
    return OK;
}

/* Every policy with every budget; the full cache once. */
static int list_policies(const struct listing *l)
{
    const char *policies = l->options->policies ? l->options->policies : l->config->kv_cache.policy;
    char policy[MAX_ITEM], text[MAX_ITEM];
    while (policies) {
        const struct policy_vt *found;
        const char *budgets = l->options->budgets;
        TRY(eval__next_item(&policies, "policies", policy, sizeof policy));
        TRY(policy_find(policy, &found));
        if (!strcmp(policy, "full")) {
            TRY(add_run(l, policy, (struct kv_budget){1, 0}));
            continue;
        }
        if (!budgets) TRY(add_run(l, policy, l->config->kv_cache.budget));
        while (budgets) {
            struct kv_budget budget;
            TRY(eval__next_item(&budgets, "budgets", text, sizeof text));
            TRY(kv_budget_parse(text, &budget));
            TRY(add_run(l, policy, budget));
        }
    }
    return OK;
}

int eval__list_runs(const struct eval_options *options, const struct config *config, int n_questions,
                    struct eval_one_run *runs, int *n_runs)
{
    struct config changed = *config;
    struct listing listing = {options, &changed, n_questions, runs, n_runs};
    const char *dtypes = options->dtypes;
    char dtype[MAX_ITEM];
    *n_runs = 0;
    if (!dtypes) return list_policies(&listing);
    while (dtypes) {
        TRY(eval__next_item(&dtypes, "--kv-cache-dtype", dtype, sizeof dtype));
        TRY(config_set(&changed, "kv_cache.dtype", dtype, "--kv-cache-dtype"));
        TRY(config_check(&changed));
        TRY(list_policies(&listing));
    }
    return OK;
}

void eval__free_runs(struct eval_one_run *runs, int n_runs, int n_questions)
{
    for (int i = 0; i < n_runs; i++) {
        for (int k = 0; runs[i].answer && k < n_questions; k++) {
            free(runs[i].answer[k].text);
            free(runs[i].answer[k].tokens);
            free(runs[i].answer[k].followup.text);
            free(runs[i].answer[k].followup.tokens);
        }
        free(runs[i].answer);
    }
    free(runs);
}
