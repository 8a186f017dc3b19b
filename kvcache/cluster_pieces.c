/* How ClusterKV cuts a prompt: what is clustered together, and how many clusters it becomes. Host arithmetic. */
#include "kvcache/cluster_kv.h"

static int least(int a, int b) { return a < b ? a : b; }

int cluster_kv_count(const struct cluster_kv_options *options, int m, int n_keys)
{
    int n = m / options->tokens_per_cluster;
    return least(n > 1 ? n : 1, n_keys);
}

/* A prompt of m tokens and what is generated behind it: m / per + (max_context - m) / window * new is largest at one of
 * its ends; a short prompt has a cluster all the same. Single tokens cut a prompt into at most one piece more than they
 * are, each of which may be too short for the cluster that it gets. */
int64_t cluster_kv_most(const struct cluster_kv_options *options, int max_context)
{
    int64_t prompt = max_context / options->tokens_per_cluster;
    int64_t generated = (int64_t)max_context * least(options->window_clusters, options->window) / options->window;
    int64_t singles = options->single_text ? 2 * (int64_t)options->single_text + 1 : 0;
    return least(max_context, (int)((prompt > generated ? prompt : generated) + 1 + singles));
}

/* ---- a prompt's pieces ---- */

/* Where the last `n` text tokens begin, at `first` or behind it. */
static int singles_from(const struct policy_sequence *sequence, int first, int n)
{
    int at = sequence->prompt_tokens;
    for (int i = sequence->n_spans; i >= 0 && at > first; i--) {
        const int behind = i ? sequence->spans[i - 1].end : 0, start = behind > first ? behind : first;
        if (at - start >= n) return at - n;
        n -= at - start;
        at = i ? sequence->spans[i - 1].start : first;
    }
    return first;
}

/* The end of what from `at` on is clustered together: all before `singles`, the first text token that is to be single;
 * from there images that follow each other, and runs of single tokens. */
static int piece_end(const struct policy_sequence *sequence, int at, int singles, bool *single)
{
    int end = at;
    *single = false;
    if (at < singles) return singles;
    for (int i = 0; i < sequence->n_spans; i++) {
        const struct image_span *span = &sequence->spans[i];
        if (span->end <= end) continue;
        if (span->start > end && end > at) return end;
        *single = span->start > end;
        if (*single) return span->start;
        end = span->end;
    }
    *single = end == at;
    return *single ? sequence->prompt_tokens : end;
}

struct cluster_count cluster_kv_next_piece(const struct cluster_kv_options *options,
                                           const struct policy_sequence *sequence, int *at)
{
    const int m = sequence->prompt_tokens, from = *at, n_single = options->single_text;
    bool single = false;
    if (!n_single)
        *at = m;
    else
        *at = piece_end(sequence, from, singles_from(sequence, least(options->sinks, m), n_single), &single);
    const int n = *at - from;
    return (struct cluster_count){n, single ? n : cluster_kv_count(options, n_single ? n : m, n)};
}
