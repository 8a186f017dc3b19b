/* policy - what decides which tokens of a prompt stay in the KV cache, and which of them a decode step reads. A policy
 * decides, the cache's ops execute.
 *
 * A policy is a table of optional hooks; `full` is the table with none. It sees this rank's heads, the op table and two
 * reductions over ranks (exact integers: counts on the host, scores on the device); it knows no rank number and no
 * vendor header. What must be equal on all ranks (budgets, and so lane lengths and page counts; rows that leave the
 * residual stream) may only follow from reduced integers; which tokens a lane keeps is each rank's own business. */
#ifndef VITRAIL_KVCACHE_POLICY_H
#define VITRAIL_KVCACHE_POLICY_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/arena.h"
#include "base/status.h"
#include "kernels/ops.h"
#include "parallel/comm.h"

/* How much of a prompt stays: a share of its tokens (1 = all), or a number of tokens if tokens > 0. */
struct kv_budget {
    double share;
    int tokens;
};

/* kv_budget_parse - "0.1" or "64t". Errors: ERR_CONFIG. kv_budget_share - the share kept of a prompt of m tokens, <= 1.
 * kv_budget_print - "0.1" or "64t" into buf, returned. */
int kv_budget_parse(const char *text, struct kv_budget *out) MUST_CHECK;
double kv_budget_share(struct kv_budget budget, int m);
const char *kv_budget_print(struct kv_budget budget, char *buf, size_t size);

enum vl_cache_rounding { VL_CACHE_FLOOR, VL_CACHE_LARGEST_REMAINDER, VL_CACHE_WATER_FILLED };
enum vl_cache_window_of { VL_CACHE_WINDOW_OF_LAYER, VL_CACHE_WINDOW_OF_PROMPT };

/* Options of VL-Cache (arXiv 2410.23317); defaults from vl_cache_options_default are ALGORITHMS.md section 11's. */
struct vl_cache_options {
    double threshold;          /* p: share of a row's maximum from which an entry counts, 0.01 */
    double clip_min, clip_max; /* of a layer's share of the prompt, 0.01 and 1 */
    int rounding;              /* enum vl_cache_rounding */
    double window;             /* newest tokens always kept, as a share of the layer's budget, 0.1 */
    int window_of;             /* enum vl_cache_window_of: of k_l, or of the overall budget alpha * m */
    int min_rows;              /* judging rows: extend back over text to this many, 16; 0 is the paper's rule */
    int no_image_rows;         /* judging rows of a prompt without image, 64 */
    int max_rows;              /* judge by the last max_rows rows only (the paper's speed runs: 50); 0: no cap */
    int kernel;                /* odd width of an average over neighbouring scores; 1: none, as the paper has it */
};
void vl_cache_options_default(struct vl_cache_options *options);

/* What becomes of tokens that are not kept: freed, or kept in host memory and recalled. */
enum kv_evicted { KV_EVICTED_FREE, KV_EVICTED_HOST };

/* How a layer's budget is split over its KV heads: alike, or by Ada-KV (arXiv 2407.11550). */
enum kv_heads { KV_HEADS_EQUAL, KV_HEADS_ADAPTIVE };

/* Options of the baselines; defaults in the configuration's table are ALGORITHMS.md section 5's. */
struct snapkv_options {
    int window; /* newest rows that judge, and newest tokens that stay, 32 */
    int kernel; /* width of the average over neighbouring scores, 5 (odd) */
};
struct pyramid_kv_options {
    int window, kernel; /* as SnapKV's */
    double beta;        /* the last layer's part of the mean budget is 1 / beta, 20 */
};
enum pyramid_infer_judges { PYRAMID_INFER_RECENT, PYRAMID_INFER_TEXT };
/* Options of PyramidInfer (arXiv 2405.12532), in the names of its code: ALGORITHMS.md section 2. */
struct pyramid_infer_options {
    int target_ratio; /* nonzero: recent_ratio and ratio are found for the budget, as a mean over layers */
    double recent_ratio,
        ratio;            /* rho: share of the prompt that is recent; r: decay of the context, at the last layer */
    int interval;         /* every so many layers rows leave */
    int min_context;      /* a context is not made smaller than this */
    int sinks;            /* first tokens of the context that stay */
    double recent_weight; /* weight of the newest judging row; the oldest one's is 1 */
    int judges;           /* enum pyramid_infer_judges: the recent rows, or those after the last image */
    double generation_decay, generation_compress;
    int generation_block; /* generated tokens that are judged at a time, 16; 0: all of them stay */
};
struct streaming_llm_options {
    int sinks; /* first tokens that stay, 4 */
};
struct h2o_options {
    double recent; /* the newest tokens' part of the budget, 0.5 */
};

/* Options of Quest, which evicts nothing and reads a part in each decode step. */
struct quest_options {
    int min_pages;   /* pages that a KV head reads at least, 3 */
    int full_layers; /* first layers that read everything, 2 */
};

/* Options of ClusterKV (arXiv 2412.03213). */
struct cluster_kv_options {
    int sinks;              /* first tokens, in no cluster and always attended to, 16 */
    int full_layers;        /* first layers that read their whole lanes, 2 */
    int tokens_per_cluster; /* of the prompt, 80 */
    int iterations;         /* of k-means, 20 */
    int window;             /* generated tokens that become clusters together; until then all are attended to, 320 */
    int window_clusters;    /* how many they become, 4 */
    int group;              /* enum cluster_kv_group: whose lists, by which scores of the query heads */
    int single_text;        /* last text tokens of a prompt that are each a cluster of its own, 0 */
    int overlap;            /* nonzero: long prompts are clustered layer by layer, beside the layers behind, 0 */
};

/* Options of Expected Attention. */
struct expected_attention_options {
    int sinks;      /* first tokens, which stay and do not count, 4 */
    int future;     /* positions after the prompt that queries are expected at, 512 */
    int window;     /* newest tokens that stay, 0 */
    int max_rows;   /* model queries by the last max_rows rows only; 0: by the whole prompt, which is the paper's */
    double epsilon; /* added to the attention before it is weighted by |v|, 0 */
};

/* How keys and values are stored once a prompt has ended: as activations, or in 8 bits with a scale for each token and
 * head. The last two are known and not served. */
enum kv_dtype { KV_DTYPE_AUTO, KV_DTYPE_FLOAT32, KV_DTYPE_FP8, KV_DTYPE_INT8, KV_DTYPE_FLOAT16, KV_DTYPE_BFLOAT16 };
static inline enum kv_format kv_dtype_format(int dtype)
{
    return dtype == KV_DTYPE_FP8 ? KV_FP8 : dtype == KV_DTYPE_INT8 ? KV_INT8 : KV_PLAIN;
}

/* The kv_cache part of the configuration, as far as policies read it. */
struct policy_config {
    char policy[32]; /* name in the registry */
    struct kv_budget budget;
    int dtype;                      /* enum kv_dtype */
    int plain_sinks, plain_window;  /* of a lane in 8 bits: first and newest entries that are stored as activations */
    int evicted;                    /* enum kv_evicted */
    struct kv_budget recall_budget; /* of a policy that evicts: how much of a prompt a decode step recalls */
    int recall_cache_steps;         /* recalled tokens of so many steps stay on the device; 0: none */
    int heads;                      /* enum kv_heads */
    double heads_floor;             /* adaptive: the part of an equal share that no head gets less than, 0.2 */
    struct vl_cache_options vl_cache;
    struct snapkv_options snapkv;
    struct pyramid_kv_options pyramid_kv;
    struct streaming_llm_options streaming_llm;
    struct h2o_options h2o;
    struct quest_options quest;
    struct pyramid_infer_options pyramid_infer;
    struct cluster_kv_options cluster_kv;
    struct expected_attention_options expected_attention;
};

/* kv_plain_tokens - entries of a lane that stay plain where the others are stored in 8 bits; 0: all are stored alike.
 */
static inline int kv_plain_tokens(const struct policy_config *config)
{
    return kv_dtype_format(config->dtype) == KV_PLAIN ? 0 : config->plain_sinks + config->plain_window;
}

/* This rank's share of one layer. */
struct policy_layer {
    struct attention_heads heads;
    int first_kv_head; /* number of the first of them over all ranks: what seeds are keyed by */
    bool counted;      /* this rank's heads enter sums over ranks; false on all but the lowest of several replicas */
};

/* What a policy is opened with; valid for its life. */
struct policy_env {
    struct ops *ops;
    struct comm *comm; /* for policy_sum_counts and policy_sum_scores alone */
    const struct kv_view *kv;
    const struct kv_view *host;        /* the evicted tokens' lanes, in host memory; NULL: there is none */
    const struct kv_view *aged;        /* the other part of lanes that are stored in two (ops_aged.h); NULL: in one */
    const struct policy_layer *layers; /* [n_layers] */
    int n_layers;
    const float *inverse_frequency; /* [head_dim / 2] device, of the queries' and keys' rotation; NULL: not rotated */
    int g_n_heads;                  /* query heads over all ranks */
    int max_context;                /* tokens of the longest prompt */
    int max_prompt_tokens;          /* tokens of all prompts that end their prefill in one step */
};

/* One sequence that finishes its prompt in this step. */
struct policy_sequence {
    int slot;
    int prompt_tokens; /* m */
    int first_column;  /* its offset among the prompts of this step, for the policy's buffers */
    int n_spans;       /* images: [start, end) token ranges */
    const struct image_span {
        int start, end;
    } * spans;
    int last_turn_start; /* first token of the last user turn */
    struct kv_budget budget;
    uint64_t seed;  /* the request's: of random choices, equal on all ranks */
    bool continues; /* a follow-up behind what the policy kept before: nothing is judged or evicted */
};

/* What a layer's prefill offers: q of the sequence's newest rows, post-RoPE. */
struct policy_prefill {
    int layer;
    struct tensor q;    /* [n_rows, n_heads, head_dim], the last n_rows rows of the prompt */
    int first_position; /* entry of the lane that q's first row belongs to: its position, unless rows have left */
};

/* The prompts of a step between two layers, for a policy that lets rows leave the residual stream. */
struct policy_narrow {
    int layer; /* the one that just ended */
    int n_seqs;
    const struct policy_sequence *sequence; /* [n_seqs] */
    const bool *ends;                       /* [n_seqs] those whose prompt ends in this step: only they may lose rows */
    const int32_t *cu_seqlens;              /* [n_seqs + 1] host: rows of each */
    int32_t *new_cu_seqlens;                /* [n_seqs + 1] host, out: rows that stay; all: nothing happens */
    int32_t *row_index;                     /* [rows] device, out: the ascending rows that stay, where some leave */
};

/* A decode step's rows in one layer, after their K and V were appended. */
struct policy_decode {
    int layer;
    struct tensor out, q; /* [n, n_heads, head_dim] */
    const struct seq_batch *batch;
    const int32_t *position; /* [n] of each row's token, device */
};

/* A policy's decision for one sequence: per lane of its slot on this rank (layers in order, KV heads within them) the
 * ascending entries to keep. */
struct policy_keep {
    const int32_t *index; /* [lanes, stride] device; valid until the next sequence's decision */
    int stride;
    const int32_t *n_keep; /* [lanes] host: how many each keeps */
    int lane;              /* the lists' first lane within the slot; those before it keep everything */
};

/* What a decode step of a sequence reads of the cache: entries (K and V) of a lane, once for each list that names them,
 * as the mean over layers, and bytes of what the policy keeps beside them, of all layers and the heads of all ranks. */
struct policy_reads {
    double tokens;
    int64_t beside_bytes;
    double recalled; /* those of the tokens that lie in host memory */
};

struct policy;
struct policy_vt {
    const char *name, *paper;
    bool whole_prompt; /* needs the prompt in one chunk */
    /* Places state in an arena (measuring or real); called before any other hook. */
    int (*open)(struct policy *policy, struct arena *arena);
    void (*close)(struct policy *policy);
    /* Judging rows of a prompt: the policy wants q of positions [first, m). Used to cut chunks so that the last holds
     * them. NULL: one. */
    int (*judging_rows)(const struct policy *policy, const struct policy_sequence *sequence);
    /* After each layer's attention of the chunk that ends the prompt. */
    int (*prefill_layer)(struct policy *policy, const struct policy_sequence *sequence,
                         const struct policy_prefill *in);
    /* After each layer of a step with prompts: which rows go on. Collective over ranks. */
    int (*narrow)(struct policy *policy, const struct policy_narrow *in);
    /* After the last layer: budgets for all layers, k [n_layers] (host), the mean over a layer's KV heads where heads
     * are adaptive; equal on all ranks. Collective over ranks. Absent: the policy evicts nothing. */
    int (*prefill_end)(struct policy *policy, const struct policy_sequence *sequence, int *k);
    /* The keep lists of all layers, given their k [n_layers], at most prompt_tokens. Absent: the lanes stay as they
     * are. */
    int (*select)(struct policy *policy, const struct policy_sequence *sequence, const int *k, struct policy_keep *out);
    /* After the lanes were packed: what a policy with a decode hook sets up for the slot, also for one that it does not
     * run for, whose lanes are whole; again when a follow-up's tokens were appended (sequence->continues). */
    int (*begin_decode)(struct policy *policy, const struct policy_sequence *sequence);
    /* In place of a layer's decode attention. Device work only, and the same for every step of a bucket: it is
     * captured. A row with slot < 0 is padding, out 0; a slot whose policy does not run (policy_runs) reads its whole
     * lane. Absent: the whole lane is read. */
    int (*decode_attention)(struct policy *policy, const struct policy_decode *in);
    /* After each decode step, outside of what is captured: slot [n] (host) has each got one more token. Collective. */
    int (*decode_end)(struct policy *policy, const int32_t *slot, int n);
    /* What a decode step reads of a sequence, also of one that the policy does not run for: prompt_tokens, images and
     * budget of `sequence` alone are looked at; `kept` tokens of the prompt stayed (mean over layers) and `before`
     * followed before this step's own. Arithmetic on the host. Absent: the whole lanes. */
    struct policy_reads (*reads)(const struct policy *policy, const struct policy_sequence *sequence, double kept,
                                 int before);
};

struct policy {
    const struct policy_vt *vt;
    struct policy_config config;
    struct policy_env env;
    void *state;           /* the policy's own, from its open */
    struct policy *recall; /* where evicted tokens stay in host memory: ClusterKV over them, which has the decode steps;
                              the policy itself, if that is ClusterKV; else NULL */
    bool beside;           /* is another policy's recall */
};

/* policy_find - by name; ERR_CONFIG listing the names and the nearest one. policy_name - i-th name, NULL past the end.
 */
int policy_find(const char *name, const struct policy_vt **out) MUST_CHECK;
const char *policy_name(int i);

/* policy_check - whether the parts of a configuration go together: ERR_CONFIG for a name that is none, and for
 * evicted tokens in host memory that cannot be recalled. */
int policy_check(const struct policy_config *config) MUST_CHECK;

/* policy_open - opens the configured policy, placing its state in `arena` (measure or place). policy_close undoes it.
 */
int policy_open(struct policy *policy, const struct policy_config *config, const struct policy_env *env,
                struct arena *arena) MUST_CHECK;
void policy_close(struct policy *policy);

/* policy_runs - false where the budget keeps all tokens of an m-token prompt, or the policy has no hooks. */
bool policy_runs(const struct policy *policy, const struct policy_sequence *sequence);

/* policy_decoder - whose hooks decode steps and begin_decode go to: the policy's own, or its recall's. */
struct policy *policy_decoder(struct policy *policy);

/* policy_evict - carries out a decision: what is not kept goes to host memory, if it is to stay there, and leaves the
 * lanes. */
int policy_evict(struct policy *policy, const struct policy_sequence *sequence,
                 const struct policy_keep *keep) MUST_CHECK;

/* policy_recall_counts - [n_slots, 2] device: tokens of host memory that a slot's decode steps attended to, over lanes
 * and steps, and how many of them were on the device already; NULL where nobody counts. */
const int64_t *policy_recall_counts(const struct policy *policy);

/* policy_host_tokens - tokens of an m-token prompt at this budget that may go to host memory in a layer, at most. */
int policy_host_tokens(const struct policy *policy, struct kv_budget budget, int m);

/* policy_judging_rows - the hook's number, or 1. */
int policy_judging_rows(const struct policy *policy, const struct policy_sequence *sequence);

/* policy_step_reads - what the hook says, or the whole lanes and nothing beside. */
struct policy_reads policy_step_reads(const struct policy *policy, const struct policy_sequence *sequence, double kept,
                                      int before);

/* policy_kv_heads - KV heads of a layer over all ranks. policy_most_heads, policy_most_kv_heads - the most query and KV
 * heads that a layer has on this rank. */
int policy_kv_heads(const struct policy *policy);
int policy_most_heads(const struct policy_env *env);
int policy_most_kv_heads(const struct policy_env *env);

/* policy_floor - a product that is whole but for rounding keeps its whole value, in any order of multiplication (rule
 * of record 7). */
static inline int policy_floor(double x) { return (int)floor(x + 1e-9); }

/* policy_speaks - of a message that every rank could give, this one gives it. */
bool policy_speaks(const struct policy *policy);

/* policy_sum_counts - sums n int64 (host) over ranks, exactly. policy_sum_scores - the same for device memory, in the
 * stream's order. Collective. */
int policy_sum_counts(struct policy *policy, int64_t *counts, int n) MUST_CHECK;
int policy_sum_scores(struct policy *policy, int64_t *scores, int64_t n) MUST_CHECK;

/* Registered tables. */
extern const struct policy_vt policy_full, policy_vl_cache, policy_snapkv, policy_pyramid_kv, policy_streaming_llm,
    policy_random, policy_h2o, policy_quest, policy_pyramid_infer, policy_cluster_kv, policy_expected_attention,
    policy_tova;
/* ClusterKV where what is not among the first tokens goes to host memory: in the place of policy_cluster_kv. */
extern const struct policy_vt policy_cluster_kv_host;

#endif
