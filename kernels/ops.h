/* ops - the op table: every computation of the engine, as one struct of function pointers with two complete
 * implementations, kernels/cpu (plain C and OpenBLAS, the reference) and kernels/cuda.
 *
 * Callers use the ops_* functions below: they check shapes and dtypes once, for all backends, and call the table.
 * Ops run in order on o->stream (but see ops_aside_begin) and return before a GPU has finished; only ops_finish and
 * ops_download wait.
 * Pointers and tensor data are memory of the backend ("device") unless a comment says host. Nothing allocates:
 * backends take their scratch at ops_reserve.
 *
 * Activations (x, y, q, k, v, out), logits and the KV cache have one activation dtype, o->dtype (float32 on CPU).
 * Weights (w) are float32, float16 or bfloat16 and are widened on use; accumulation is float32. Vectors of norms and
 * biases are float32. Row-major everywhere. On GPUs weights have the activations' dtype, and q, k, v of attention heads
 * in steps of 8 dimensions up to 128, rows in steps of 8 elements, pages in steps of 16 tokens: ERR_UNSUPPORTED beyond.
 */
#ifndef VITRAIL_KERNELS_OPS_H
#define VITRAIL_KERNELS_OPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "base/tensor.h"

struct ops {
    const struct ops_vt *vt;
    void *impl;              /* backend state */
    void *stream;            /* what communicators order their data plane on; NULL on CPU */
    enum dtype dtype;        /* of activations and of the KV cache */
    int (*watch)(void *arg); /* of ops_watch */
    void *watch_arg;
};

/* Upper bounds of the shapes that will be used; backends size their scratch by it. */
struct ops_limits {
    int max_tokens;      /* rows of one linear or attention call */
    int max_seqs;        /* sequences in one call */
    int max_context;     /* tokens of one lane */
    int max_in_features; /* columns of the widest weight */
    int max_heads, head_dim;
    int vocab_size;
    int max_lanes; /* lanes of a slot */
    bool aged;     /* lanes in two parts are attended to (ops_aged.h) */
};

/* How a lane's keys and values are stored: in o->dtype, or as one byte an element with float32 scales of each token
 * (kernels/quantise.h). */
enum kv_format { KV_PLAIN, KV_INT8, KV_FP8, KV_FORMAT_N };

/* The KV cache as ops see it. A page holds page_size tokens of K and V of one KV head; a lane is the cache of one
 * (sequence slot, layer, KV head): a row of page numbers and a length. lane = slot * lanes_per_slot + lane of the layer
 * + local KV head. A token's position is never derived from its place in the lane.
 *
 * With a `format` the lanes of a prompt are plain until ops_kv_quantise rewrites them, and again from ops_kv_widen on:
 * the same page then holds kv_page_tokens of them, codes [2 (K, V), tokens, head_dim], with the scales beside the pool.
 */
struct kv_view {
    struct tensor pool;  /* [n_pages, 2 (K, V) * page_size, head_dim] */
    int32_t *page_row;   /* [n_slots * lanes_per_slot, max_pages] page numbers, valid below the lane's length */
    int32_t *lane_len;   /* [n_slots * lanes_per_slot] tokens in the lane */
    int32_t *free_stack; /* [n_pages] numbers of free pages; the first *free_count are valid */
    int32_t *free_count; /* [1] */
    int32_t *error; /* [1] nonzero once a lane found the stack empty or its row full: fatal, read with the tokens */
    int page_size, head_dim, n_pages, max_pages, lanes_per_slot, n_slots;
    enum kv_format format; /* of lanes whose prompt has ended */
    float *scale;          /* [n_pages, 2 (K, V), kv_page_tokens of an 8-bit format]; NULL: plain lanes alone */
    int32_t *lane_format;  /* [n_slots * lanes_per_slot] enum kv_format of each lane; NULL: all plain */
};

/* kv_page_tokens - tokens of a page in a format. */
static inline int kv_page_tokens(const struct kv_view *kv, enum kv_format format)
{
    return format == KV_PLAIN ? kv->page_size : kv->page_size * (int)dtype_size(kv->pool.dtype);
}

/* kv_picked_pages - pages as struct page_pick has them in one of the pool, of lanes whose prompt has ended. */
static inline int kv_picked_pages(const struct kv_view *kv) { return kv_page_tokens(kv, kv->format) / kv->page_size; }

/* Sequences of a call: rows [cu_seqlens[i], cu_seqlens[i+1]) of q, k, v belong to slot[i]. Host copies stand beside the
 * device arrays where a backend needs sizes to launch; a captured decode step uses the device arrays alone. */
struct seq_batch {
    int n_seqs, n_tokens;
    const int32_t *slot;            /* [n_seqs] device */
    const int32_t *cu_seqlens;      /* [n_seqs + 1] device; NULL: one row a sequence (decode) */
    const int32_t *host_slot;       /* [n_seqs] host; NULL in decode */
    const int32_t *host_cu_seqlens; /* [n_seqs + 1] host; NULL in decode */
};

/* One layer's heads on this rank: query head h reads KV head h / (n_heads / n_kv_heads). */
struct attention_heads {
    int n_heads, n_kv_heads, head_dim;
    int lane; /* first lane of this layer within a slot */
    float scale;
};

/* Statistics that a policy asks of the prompt's attention (ALGORITHMS.md 1.4, DESIGN.md section 3). Query row i has
 * position first_position + i and sees the keys 0 .. its position of its lane. A = softmax of the scaled logits. */
struct attention_probe {
    int slot, n_rows, first_position;
    const float *row_weight; /* [n_rows] device; NULL: all ones */
    float threshold;   /* p: an entry counts if A >= p * its row's maximum, in logits s >= max + ln p; 0: no count */
    float *column_sum; /* [n_kv_heads, first_position + n_rows]: sum over rows and the group's heads of weight * A */
    bool per_head;     /* column_sum is [n_heads, ...], each query head's own */
    int64_t *kept;     /* [n_heads] entries at or above the threshold; NULL: not wanted */
};

/* What future queries are expected to be, and whom they would attend to: see ops_expected_attention. Query row i has
 * position first_position + i; the keys are the first_position + n_rows first ones of each lane. */
struct expected_attention {
    int slot, n_rows, first_position;
    int sinks;  /* rows and keys at positions before this one do not take part; below first_position + n_rows */
    int future; /* positions after the last row that queries are expected at, from 1 on */
    const float *inverse_frequency; /* [head_dim / 2] device, of the rotation; NULL: q is compared as it is */
    float epsilon;
    float *score; /* [n_kv_heads, first_position + n_rows] */
};

/* Rows of scores that share one budget: see ops_split_budgets. */
struct budget_group {
    int first_row, n_rows;
    int n_columns; /* only these take part, the first of each row */
    int own, total;
};

/* H2O's account of the lanes that it bounds: see ops_heavy_decode. Arrays are device memory; lane as in struct kv_view.
 */
struct heavy_hitters {
    float *score;      /* [lanes of all slots, stride] attention that an entry of the lane got so far */
    int32_t *position; /* the same shape: where in the sequence the entry stands */
    int32_t *limit;    /* [lanes of all slots] most entries of the lane; 0: it grows freely */
    int32_t *recent;   /* [lanes of all slots] newest entries that never go, below the limit */
    int stride;        /* above every limit */
};

/* The entries of lanes that a decode step attends to, device: list r * n_kv_heads + h for row r and KV head h of the
 * layer, or r * n_heads + h for row r and query head h. Entries of kv are stored as the lane is (kv.format), those in
 * host memory and at recent places as activations. */
struct kv_list {
    const int32_t *entry; /* [n_lists, stride] entries of the lane, each once, in any order; a negative one is entry
                             ~e of the same lane in `host` */
    const int32_t *count; /* [n_lists] how many, at most stride; < 0: the whole lane, of kv alone */
    int stride;
    const struct kv_view *host;     /* of kv's geometry; NULL: no entry is negative */
    const struct kv_recent *recent; /* entries from RECENT_ENTRY on are its places; NULL: there are none */
    bool per_query_head;            /* each query head has a list of its own, of its KV head's lane */
};
enum { RECENT_ENTRY = 1 << 30 };

/* Copies on the device of what decode steps have lately read of lanes in host memory: lanes first_lane .. first_lane +
 * n_lanes - 1 of every slot have `capacity` places each. Row r of an array is slot * n_lanes + lane - first_lane; all
 * are device memory. A place that no step touched has stamp 0: stamps and steps of a slot are zeroed when a sequence
 * begins, the rest may hold anything. */
struct kv_recent {
    struct tensor pool; /* [n_slots * n_lanes * capacity / page_size, 2 * page_size, head_dim]: place p of row r in page
                           r * capacity / page_size + p / page_size, as in struct kv_view */
    int32_t *place;     /* [n_slots * n_lanes, max_entries] of an entry in host memory: where it is, if it is */
    int32_t *holder;    /* [n_slots * n_lanes, capacity] the entry at a place */
    int32_t *stamp;     /* [n_slots * n_lanes, capacity] the step, from 1, that last listed it */
    int32_t *step;      /* [n_slots * n_lanes] steps so far */
    int32_t *work;      /* [n_slots * n_lanes, 2 * capacity] */
    int64_t *counts;    /* [n_slots, 2] entries of host memory that steps listed, and those of them that were here */
    int first_lane, n_lanes, max_entries;
    int capacity; /* whole pages */
    int steps;    /* what one of the last so many steps listed, this one included, keeps its place */
};

/* What ops_pick_pages works with. Its pages are page_size entries of a lane, however that is stored: of a lane in an
 * 8-bit format several lie in a page of the pool, and their bounds behind each other. */
struct page_pick {
    struct tensor bounds; /* [n_pages, kv_picked_pages * 2 (least, largest), head_dim] activations: of the keys of each,
                             per channel */
    struct tensor score;  /* [n_rows * n_kv_heads, max_pages] float32, dense; out, of lanes that are listed: ranks */
    const int32_t *limit; /* [n_slots] most pages of a list, at most stride / page_size; 0: the whole lane */
    int32_t *entry;       /* [n_rows * n_kv_heads, stride] out: a kv_list */
    int32_t *count;       /* [n_rows * n_kv_heads] out */
    int stride;
};

/* Rows of one sequence of which some leave: see ops_select_rows. */
struct row_choice {
    int first_row, n_rows;  /* of the sequence, among the rows of all */
    int first, n_competing; /* rows first .. first + n_competing - 1 of the sequence compete, the others stay */
    int keep;               /* so many of those stay */
    int64_t first_score;    /* place of the first one's score */
};

/* Generated tokens that later rows judge, block by block: see ops_judge_columns. Token g = 0 is the prompt's last, 1 is
 * the first generated one; block b is the tokens b * block_tokens ... At decode step t (from 0) token t + 1 enters its
 * lanes, and tokens from the first block on that is not yet settled stand at the lanes' end without a gap. */
struct decode_judges {
    const int32_t *progress; /* [n_slots, 2] device: the step t, < 0: nothing is judged; the first block not settled */
    const int32_t *block;    /* [n_slots, max_blocks, 2] device: the step that settles a block, the rows that judge it,
                                which are those of the newest steps up to that one */
    int max_blocks, block_tokens, ring_blocks;
    float newest; /* weight of the row of the settling step; the oldest of a block's rows weighs 1 */
    int64_t *sum; /* of slot s, block b, in its place: sum[s * slot_stride + b % ring_blocks * block_stride + place] */
    int64_t slot_stride, block_stride;
};

/* Entries that leave the middle of a layer's lanes: see ops_kv_drop. */
struct kv_drop {
    int lane, n_lanes;  /* within the slot */
    int first, n_block; /* entries first .. first + n_block - 1: */
    int n_keep;         /* so many of them stay, */
    int first_index;    /* those that index[first_index ...] names, counted from `first`, ascending */
};

/* What a lane holds in clusters: entries first .. end - 1, and n_host entries of the same lane in host memory, in
 * n_clusters clusters. Entries before and behind the former belong to none. budget: how many of the clustered ones a
 * decode step attends to, at least 1. */
struct cluster_state {
    int32_t n_clusters, first, end, budget, n_host;
};

/* Clusters of the entries of lanes first_lane .. first_lane + n_lanes - 1 of every slot, device. Row r of an array is
 * slot * n_lanes + lane - first_lane. Centroids have the activation dtype: a decode step reads all of them, beside a
 * few keys that have no more digits either. */
struct kv_clusters {
    struct tensor centroid;      /* [n_slots * n_lanes, max_clusters, head_dim] means of the keys, not normalised */
    int32_t *size;               /* [n_slots * n_lanes, max_clusters] entries of each cluster */
    int32_t *entry;              /* [n_slots * n_lanes, max_entries] entries, cluster after cluster, ascending within;
                                    ~e: entry e of the lane in host memory */
    struct cluster_state *state; /* [n_slots * n_lanes] */
    void *work;                  /* ops_cluster_bytes of room for one ops_cluster_keys */
    int first_lane, n_lanes, max_clusters, max_entries;
};
enum { MOST_CLUSTERS = 4096 /* of a lane */ };

/* A cluster's score: the largest or the mean q . centroid over the query heads of a KV head, which share a list; or
 * each query head's own, for a list of its own. */
enum cluster_kv_group { CLUSTER_KV_MAX, CLUSTER_KV_MEAN, CLUSTER_KV_QUERY_HEAD };

/* Entries of clustered lanes of a slot that become clusters of their own: a run, or listed ones that are about to go to
 * host memory, the i-th as entry i of the lane there. */
struct cluster_job {
    int slot, first_entry, n_entries; /* with a list first_entry is 0, and a lane has at most so many */
    int first_cluster, n_clusters;    /* the clusters that they become; with a list at most so many */
    int first_place;                  /* where in kv_clusters.entry they go: the entries clustered before */
    int iterations;
    int first_lane, n_lanes; /* which of the clusters' lanes; 0 lanes: all of them */
    const int32_t
        *centre; /* [n_lanes, n_clusters] device: the first centres, as numbers 0 .. n_entries - 1 of entries */
    const int32_t *index;              /* [n_lanes, index_stride] device, ascending entries; NULL: a run */
    const struct cluster_count *count; /* [n_lanes] device: how many of them a lane has; with index alone */
    int index_stride;
};
struct cluster_count {
    int32_t n_entries, n_clusters; /* a cluster has an entry at least: 0 and 0, or n_clusters <= n_entries */
};

enum activation { ACTIVATION_SILU, ACTIVATION_GELU, ACTIVATION_GELU_TANH, ACTIVATION_QUICK_GELU, ACTIVATION_N };

/* Sampling parameters of one slot. temperature 0 = greedy; top_k 0, top_p 1, min_p 0, penalties 0 / 0 / 1 = off. */
struct sampling_params {
    float temperature, top_p, min_p;
    float presence_penalty, frequency_penalty, repetition_penalty;
    int32_t top_k;
    int32_t n_logprobs; /* 0: none, else the chosen token's and this many best ones', at most MAX_LOGPROBS */
    uint64_t seed;      /* the random number of a token is keyed by (seed, its position) */
};
enum { MAX_LOGPROBS = 20 };

/* What ops on the cache add (by or) to its error word; the lane in question is left as it was. KV_ERROR_QUANTISED:
 * prompt rows for, or a pack of, a lane that is no longer plain (on the CPU ERR_ARG for the latter). */
enum { KV_ERROR_NO_FREE_PAGE = 1, KV_ERROR_LANE_FULL = 2, KV_ERROR_QUANTISED = 4 };

/* Per-slot state that sampling reads and writes; lives on the device for the whole run. */
struct sampling_state {
    struct sampling_params *params; /* [n_slots] */
    int32_t *token_count;   /* [n_slots, vocab_size]: low 24 bits = times generated; bit 30 = stands in the prompt */
    int32_t *next_token;    /* [n_slots] the sampled token, input of the next decode step */
    int32_t *position;      /* [n_slots] position of next_token */
    float *logprob;         /* [n_slots, 1 + MAX_LOGPROBS] of the chosen and the best tokens (before penalties
                               and temperature) */
    int32_t *logprob_token; /* [n_slots, 1 + MAX_LOGPROBS] */
    int vocab_size, n_slots;
    struct forced_span *forced_span; /* [n_slots]; NULL: tokens are never forced */
    int32_t *forced;                 /* [n_slots, MAX_FORCED] tokens of a slot's span */
};
/* Positions [first, first + n) of a slot take given tokens, whatever the logits say. */
struct forced_span {
    int32_t first, n;
};
enum { MAX_FORCED = 256 };
enum { TOKEN_COUNT_MASK = (1 << 24) - 1, TOKEN_IN_PROMPT = 1 << 30 };

/* What the device can do, measured, for bench: the bars that a step's speed is held against. */
struct ops_ceilings {
    double gemm_tflops; /* the vendor library's matrix product, float32 on CPU, the activation dtype on GPUs */
    double gemv_gbs;    /* reading a matrix as large as the weights once, by the vendor's matrix-vector product */
    double copy_gbs;    /* memory copy, bytes read plus written */
};

struct ops_vt {
    const char *name;
    int (*device_count)(void);
    int (*open)(struct ops *o, int device, int n_threads);
    void (*close)(struct ops *o);
    int (*use_dtype)(struct ops *o, enum dtype model_dtype);
    int (*memory_free)(struct ops *o, size_t *free_bytes, size_t *total_bytes);
    int (*reserve)(struct ops *o, const struct ops_limits *limits, size_t *bytes, bool measure);
    int (*memory_take)(struct ops *o, size_t bytes, void **out);
    void (*memory_give_back)(struct ops *o, void *memory, size_t bytes);
    int (*host_take)(struct ops *o, size_t bytes, void **out);
    void (*host_give_back)(struct ops *o, void *memory, size_t bytes);
    int (*upload)(struct ops *o, void *to, const void *from_host, size_t bytes);
    int (*download)(struct ops *o, void *to_host, const void *from, size_t bytes);
    int (*copy)(struct ops *o, void *to, const void *from, size_t bytes);
    int (*zero)(struct ops *o, void *to, size_t bytes);
    int (*finish)(struct ops *o);
    void (*forget_steps)(struct ops *o);
    int (*run_step)(struct ops *o, int bucket, int (*body)(void *arg), void *arg);
    int (*bucket)(const struct ops *o, int n);
    size_t (*graph_bytes)(const struct ops *o, int n_layers);
    int (*mark)(struct ops *o, int i);
    int (*download_marked)(struct ops *o, void *to_host, const void *from, size_t bytes, int i);
    int (*aside_begin)(struct ops *o), (*aside_join)(struct ops *o); /* NULL, all three: all ops run in their order */
    void (*aside_end)(struct ops *o);
    int (*ceilings)(struct ops *o, size_t weight_bytes, struct ops_ceilings *out);
    int (*fill_normal)(struct ops *o, struct tensor w, uint64_t key, float std, int64_t first_row, int64_t first_column,
                       int64_t whole_columns);
    /* tokens and rows */
    int (*embed)(struct ops *o, struct tensor y, struct tensor table, const int32_t *ids, int first_row);
    int (*gather_rows)(struct ops *o, struct tensor y, struct tensor x, const int32_t *index);
    int (*scatter_rows)(struct ops *o, struct tensor y, const int32_t *index, struct tensor x);
    int (*decode_inputs)(struct ops *o, int32_t *ids, int32_t *position, const int32_t *slot, int n,
                         const struct sampling_state *state);
    /* layers */
    int (*rms_norm)(struct ops *o, struct tensor y, struct tensor x, const float *w, float eps);
    int (*add_rms_norm)(struct ops *o, struct tensor y, struct tensor residual, struct tensor x, const float *w,
                        float eps);
    int (*layer_norm)(struct ops *o, struct tensor y, struct tensor x, const float *w, const float *b, float eps);
    int (*add)(struct ops *o, struct tensor y, struct tensor x);
    int (*linear)(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias);
    int (*rope)(struct ops *o, struct tensor x, const int32_t *position, const float *inverse_frequency, float scale);
    int (*swiglu)(struct ops *o, struct tensor y, struct tensor gate_up);
    int (*linear_swiglu)(struct ops *o, struct tensor y, struct tensor gate_up, struct tensor x, struct tensor w,
                         const float *bias);
    int (*activate)(struct ops *o, struct tensor x, enum activation kind);
    int (*image_patches)(struct ops *o, struct tensor y, const uint8_t *pixels, int n_images, int image_size,
                         int patch_size, const float *scale, const float *shift);
    /* attention */
    int (*attention_vision)(struct ops *o, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                            int n_images, float scale);
    int (*attention_prefill)(struct ops *o, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                             const struct seq_batch *batch, const struct kv_view *kv,
                             const struct attention_heads *heads);
    int (*decode_begin)(struct ops *o, const struct seq_batch *batch, const struct kv_view *kv,
                        const struct kv_view *aged); /* NULL: none */
    int (*attention_decode)(struct ops *o, struct tensor out, struct tensor q, float *log_sum,
                            const struct seq_batch *batch, const struct kv_view *kv,
                            const struct attention_heads *heads); /* log_sum NULL: not wanted */
    int (*attention_decode_aged)(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                                 const struct kv_view *kv, const struct kv_view *aged,
                                 const struct attention_heads *heads);
    int (*attention_decode_listed)(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                                   const struct kv_view *kv, const struct attention_heads *heads,
                                   const struct kv_list *list);
    int (*attention_probe)(struct ops *o, struct tensor q, const struct kv_view *kv,
                           const struct attention_heads *heads, const struct attention_probe *probe);
    int (*judge_columns)(struct ops *o, struct tensor q, const float *log_sum, const struct seq_batch *batch,
                         const struct kv_view *kv, const struct attention_heads *heads,
                         const struct decode_judges *judges);
    /* clusters of keys */
    size_t (*cluster_bytes)(const struct ops *o, int n_lanes, int head_dim, int max_entries, int max_clusters);
    int (*cluster_keys)(struct ops *o, const struct kv_view *kv, const struct kv_clusters *clusters,
                        const struct cluster_job *job);
    int (*select_clusters)(struct ops *o, int32_t *entry, int32_t *count, int stride, struct tensor q,
                           enum cluster_kv_group by, const struct seq_batch *batch, const struct kv_view *kv,
                           const struct attention_heads *heads, const struct kv_clusters *clusters);
    /* cache */
    int (*kv_reset)(struct ops *o, const struct kv_view *kv);
    int (*kv_append)(struct ops *o, const struct kv_view *kv, const struct attention_heads *heads, struct tensor k,
                     struct tensor v, const struct seq_batch *batch);
    int (*rope_append)(struct ops *o, const struct kv_view *kv, const struct attention_heads *heads, struct tensor q,
                       struct tensor k, struct tensor v, const int32_t *position, const float *inverse_frequency,
                       float scale, const struct seq_batch *batch);
    int (*kv_pack)(struct ops *o, const struct kv_view *kv, int slot, int lane, int n_lanes, const int32_t *keep,
                   int keep_stride, const int32_t *n_keep);
    int (*list_others)(struct ops *o, int32_t *other, int other_stride, const int32_t *keep, int keep_stride,
                       const int32_t *n_keep, int n, int n_lanes);
    int (*kv_split)(struct ops *o, const struct kv_view *kv, const struct kv_view *host, int slot, int lane,
                    int n_lanes, const int32_t *index, int index_stride, const int32_t *n_index);
    int (*recall)(struct ops *o, int32_t *entry, const int32_t *count, int stride, const struct seq_batch *batch,
                  const struct kv_view *kv, const struct attention_heads *heads, const struct kv_view *host,
                  const struct kv_recent *recent);
    int (*kv_drop)(struct ops *o, const struct kv_view *kv, int slot, const int32_t *index, const struct kv_drop *drop,
                   int n_drops);
    int (*kv_quantise)(struct ops *o, const struct kv_view *kv, int slot);
    int (*kv_widen)(struct ops *o, const struct kv_view *kv, int slot);
    int (*kv_age)(struct ops *o, const struct kv_view *kv, const struct kv_view *aged, int slot, int sinks, int window);
    int (*kv_release)(struct ops *o, const struct kv_view *kv, int slot);
    /* selection and sampling */
    int (*select_top)(struct ops *o, int32_t *index, int index_stride, struct tensor score, const int *k,
                      const int *window);
    int (*split_budgets)(struct ops *o, int32_t *count, struct tensor score, const struct budget_group *group,
                         int n_groups);
    int (*heavy_begin)(struct ops *o, const struct kv_view *kv, const struct heavy_hitters *heavy, int slot,
                       struct tensor score, const int32_t *index, int index_stride);
    int (*heavy_decode)(struct ops *o, struct tensor q, const int32_t *position, const struct seq_batch *batch,
                        const struct kv_view *kv, const struct attention_heads *heads,
                        const struct heavy_hitters *heavy);
    int (*average_pool)(struct ops *o, struct tensor y, struct tensor x, int width);
    int (*page_bounds)(struct ops *o, struct tensor bounds, const struct kv_view *kv, int slot, int lane, int n_lanes);
    int (*pick_pages)(struct ops *o, struct tensor q, const struct seq_batch *batch, const struct kv_view *kv,
                      const struct attention_heads *heads, const struct page_pick *pick);
    int (*sum_fixed)(struct ops *o, int64_t *sum, struct tensor x, double scale);
    int (*select_rows)(struct ops *o, int32_t *index, const int64_t *score, const struct row_choice *choice,
                       int n_choices);
    int (*expected_attention)(struct ops *o, struct tensor q, const struct kv_view *kv,
                              const struct attention_heads *heads, const struct expected_attention *expected);
    int (*unshard_columns)(struct ops *o, struct tensor y, struct tensor shards, const int32_t *host_count);
    int (*sample)(struct ops *o, struct tensor logits, const int32_t *slot, const struct sampling_state *state);
    int (*sampling_begin)(struct ops *o, const struct sampling_state *state, int slot,
                          const struct sampling_params *params, const int32_t *prompt_ids, int n_prompt);
};
extern const struct ops_vt ops_cpu, ops_cuda;

/* ops_open - opens a backend ("cpu" or "cuda") on a device number; n_threads: CPU threads of this rank (>= 1).
 * OPS_NO_DEVICE: only measures (ops_reserve), needs no GPU.
 * Errors: ERR_UNSUPPORTED naming what this build has, ERR_DEVICE. ops_close accepts a failed open. */
enum { OPS_NO_DEVICE = -1 };
int ops_open(struct ops *o, const char *backend, int device, int n_threads) MUST_CHECK;
void ops_close(struct ops *o);

/* ops_device_count - devices of the backend that this process can use: 0 for "cuda" without a GPU or in a CPU build. */
int ops_device_count(const char *backend);

/* ops_use_dtype - settles o->dtype for a model whose weights are stored as model_dtype: float32 on CPU; on GPUs float16
 * for float16, else bfloat16. Before ops_reserve. */
int ops_use_dtype(struct ops *o, enum dtype model_dtype) MUST_CHECK;

/* ops_memory_free - free and all memory of the device, bytes; 0 and 0 where the backend has no memory of its own. */
int ops_memory_free(struct ops *o, size_t *free_bytes, size_t *total_bytes) MUST_CHECK;

/* ops_reserve - takes the backend's scratch for these limits; with measure = true only adds it up into *bytes. */
int ops_reserve(struct ops *o, const struct ops_limits *limits, size_t *bytes, bool measure) MUST_CHECK;

/* Memory. ops_memory_take - zeroed, 256-byte aligned, really backed (a later page fault cannot fail);
 * ERR_NOMEM with the size. ops_upload/ops_download - host to device and back; download waits for it. */
int ops_memory_take(struct ops *o, size_t bytes, void **out) MUST_CHECK;
void ops_memory_give_back(struct ops *o, void *memory, size_t bytes);
/* ops_host_take - memory of the host that ops read and write as they do the device's, by the same address, at the pace
 * of the bus: pinned, zeroed. ops_host_give_back - accepts NULL. */
int ops_host_take(struct ops *o, size_t bytes, void **out) MUST_CHECK;
void ops_host_give_back(struct ops *o, void *memory, size_t bytes);
int ops_upload(struct ops *o, void *to, const void *from_host, size_t bytes) MUST_CHECK;
int ops_download(struct ops *o, void *to_host, const void *from, size_t bytes) MUST_CHECK;
int ops_copy(struct ops *o, void *to, const void *from, size_t bytes) MUST_CHECK;
int ops_zero(struct ops *o, void *to, size_t bytes) MUST_CHECK;
/* ops_finish - waits until all ops so far are done. */
int ops_finish(struct ops *o) MUST_CHECK;

/* ops_watch - while the host waits for the device (ops_finish, ops_download, ops_download_marked, a full ring of
 * uploads) watch(arg) is asked some twenty times a second: an error ends the wait and is what it returns; what was
 * waited for is undefined then. NULL: nobody. The CPU never waits. */
void ops_watch(struct ops *o, int (*watch)(void *arg), void *arg);

/* ops_run_step - runs body(arg), a decode step of `bucket` rows. A GPU backend captures it the first time a bucket is
 * seen and replays the graph afterwards, so body must issue the same ops for the same bucket. The CPU calls body. */
int ops_run_step(struct ops *o, int bucket, int (*body)(void *arg), void *arg) MUST_CHECK;

/* ops_forget_steps - drops what ops_run_step has captured: before the communicator goes whose calls are in it. */
void ops_forget_steps(struct ops *o);

/* ops_graph_bytes - device memory that captured steps of a model of n_layers take at most; 0 where nothing is captured.
 */
size_t ops_graph_bytes(const struct ops *o, int n_layers);

/* ops_bucket - rows that a decode step of n sequences is padded to: n itself where nothing is captured. */
int ops_bucket(const struct ops *o, int n);

/* ops_mark - notes in the stream that all ops so far belong to mark i (0 or 1). ops_download_marked - waits for mark i
 * alone and copies to the host, while later ops go on. This is how tokens come out one step late. */
int ops_mark(struct ops *o, int i) MUST_CHECK;
int ops_download_marked(struct ops *o, void *to_host, const void *from, size_t bytes, int i) MUST_CHECK;

/* ops_ceilings - measures for a second or two, in memory of its own that it gives back; weight_bytes: what a decode
 * step reads. Best of several tries. Not for the decode path. */
int ops_ceilings(struct ops *o, size_t weight_bytes, struct ops_ceilings *out) MUST_CHECK;

/* ops_fill_normal - w[r, c] = about normal(0, std), from (key, (first_row + r) * whole_columns + first_column + c)
 * alone: a shard holds the same numbers as the whole. w [rows, cols] of any floating dtype. */
int ops_fill_normal(struct ops *o, struct tensor w, uint64_t key, float std, int64_t first_row, int64_t first_column,
                    int64_t whole_columns) MUST_CHECK;

/* ops_embed - y[i] = table[ids[i] - first_row], or zeros where that row is not in this shard.
 *   y [n, hidden]; table [rows, hidden] weight dtype; ids [n] i32. */
int ops_embed(struct ops *o, struct tensor y, struct tensor table, const int32_t *ids, int first_row) MUST_CHECK;
/* ops_gather_rows - y[i] = x[index[i]]; ops_scatter_rows - y[index[i]] = x[i] where index[i] >= 0. index [rows] i32. */
int ops_gather_rows(struct ops *o, struct tensor y, struct tensor x, const int32_t *index) MUST_CHECK;
int ops_scatter_rows(struct ops *o, struct tensor y, const int32_t *index, struct tensor x) MUST_CHECK;
/* ops_decode_inputs - ids[i] = next_token[slot[i]], position[i] = state position of slot[i] (not changed; sample
 * advances it). slot[i] < 0 is a padding row: id 0, position 0. */
int ops_decode_inputs(struct ops *o, int32_t *ids, int32_t *position, const int32_t *slot, int n,
                      const struct sampling_state *state) MUST_CHECK;

/* ops_rms_norm - y = x / sqrt(mean(x^2) + eps) * w, per row; y may be x. w [hidden] float32.
 * ops_add_rms_norm - residual += x, then y = rms_norm(residual). */
int ops_rms_norm(struct ops *o, struct tensor y, struct tensor x, const float *w, float eps) MUST_CHECK;
int ops_add_rms_norm(struct ops *o, struct tensor y, struct tensor residual, struct tensor x, const float *w,
                     float eps) MUST_CHECK;
int ops_layer_norm(struct ops *o, struct tensor y, struct tensor x, const float *w, const float *b,
                   float eps) MUST_CHECK;
/* ops_add - y += x; x has y's shape, or fewer rows that repeat (y rows a multiple of x rows: position embeddings). */
int ops_add(struct ops *o, struct tensor y, struct tensor x) MUST_CHECK;
/* ops_linear - y = x w^T + bias. x [n, in], w [out, in], y [n, out] (row stride may exceed out; float32 y allowed for
 * logits), bias [out] float32 or NULL. Reads each weight once for the whole batch. */
int ops_linear(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias) MUST_CHECK;
/* ops_rope - rotates in place (rotate-half pairs i, i + head_dim/2). x [n, heads, head_dim] (row stride free),
 * position [n], inverse_frequency [head_dim/2] float32; cos and sin times `scale`. Angles in float32, as transformers.
 */
int ops_rope(struct ops *o, struct tensor x, const int32_t *position, const float *inverse_frequency,
             float scale) MUST_CHECK;
/* ops_swiglu - y[n, f] = silu(gate) * up; gate_up [n, 2f]: gate columns, then up columns. */
int ops_swiglu(struct ops *o, struct tensor y, struct tensor gate_up) MUST_CHECK;
/* ops_linear_swiglu - linear and swiglu in one: y [n, f] from x [n, in] and w [2f, in], gate rows first. gate_up
 * [n, 2f] is room for what lies between; what it holds afterwards is undefined. */
int ops_linear_swiglu(struct ops *o, struct tensor y, struct tensor gate_up, struct tensor x, struct tensor w,
                      const float *bias) MUST_CHECK;
int ops_activate(struct ops *o, struct tensor x, enum activation kind) MUST_CHECK;
/* ops_image_patches - uint8 pixels [n_images, image_size, image_size, 3] (device) to rows for the patch linear:
 * y [n_images * patches, 3 * patch_size^2] ordered channel, row, column, as a flattened conv weight [out, 3, p, p];
 * value = pixel * scale[c] + shift[c]; scale, shift host [3]. */
int ops_image_patches(struct ops *o, struct tensor y, const uint8_t *pixels, int n_images, int image_size,
                      int patch_size, const float *scale, const float *shift) MUST_CHECK;

/* ops_attention_vision - full attention within each image. q, k, v, out [n_images * tokens, heads, head_dim]; row
 * strides free. */
int ops_attention_vision(struct ops *o, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                         int n_images, float scale) MUST_CHECK;
/* ops_attention_prefill - causal attention of prompt chunks, called after kv_append of the same chunk: row j of
 * sequence i sees the lane's tokens before the chunk (lane_len - chunk rows of them, from the pages) and chunk rows
 * 0..j (from dense k, v). q, out [n, n_heads, head_dim], k, v [n, n_kv_heads, head_dim]; row strides free. */
int ops_attention_prefill(struct ops *o, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                          const struct seq_batch *batch, const struct kv_view *kv,
                          const struct attention_heads *heads) MUST_CHECK;
/* ops_decode_begin - once before the layers of a decode step: lists the work of its attention from the lanes' lengths
 * plus the one token that each is about to get. Until the step's last attention_decode the batch's slots stay as they
 * are and its lanes change by that append alone: a GPU reads their older tokens before the append has ended. */
int ops_decode_begin(struct ops *o, const struct seq_batch *batch, const struct kv_view *kv) MUST_CHECK;
/* ops_attention_decode - one query row a sequence over its whole lane, after kv_append. slot < 0: padding row, out 0. A
 * row's result does not depend on the other rows of the batch. All lanes are in kv->format: codes times their token's
 * scale where that is an 8-bit one. */
int ops_attention_decode(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                         const struct kv_view *kv, const struct attention_heads *heads) MUST_CHECK;
/* ops_attention_decode_log_sum - the same, and what the softmax of each query head divides by: log_sum [n_seqs,
 * n_heads] float32, dense, device, gets the natural logarithm of the sum of exp(scaled logit) over the lane. A padding
 * row's is left as it is. */
int ops_attention_decode_log_sum(struct ops *o, struct tensor out, struct tensor q, float *log_sum,
                                 const struct seq_batch *batch, const struct kv_view *kv,
                                 const struct attention_heads *heads) MUST_CHECK;
/* ops_attention_decode_listed - ops_attention_decode over the listed entries of each lane alone; what the list does not
 * name is never read. */
int ops_attention_decode_listed(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                                const struct kv_view *kv, const struct attention_heads *heads,
                                const struct kv_list *list) MUST_CHECK;
/* ops_attention_probe - see struct attention_probe. q [n_rows, n_heads, head_dim] post-RoPE; keys are read from the
 * lane, which still holds the whole prompt in order. column_sum and kept are written, not added to. */
int ops_attention_probe(struct ops *o, struct tensor q, const struct kv_view *kv, const struct attention_heads *heads,
                        const struct attention_probe *probe) MUST_CHECK;

/* ops_kv_reset - all pages free, all lanes empty. */
int ops_kv_reset(struct ops *o, const struct kv_view *kv) MUST_CHECK;
/* ops_kv_append - k, v [n, n_kv_heads, head_dim] rows go to the end of their sequences' lanes; pages are popped as
 * needed. A decode step's rows are quantised where the lane is. */
int ops_kv_append(struct ops *o, const struct kv_view *kv, const struct attention_heads *heads, struct tensor k,
                  struct tensor v, const struct seq_batch *batch) MUST_CHECK;
/* ops_rope_append - rope of q and k and kv_append in one: q [n, n_heads, head_dim] turns in place; the turned k and v
 * go to their lanes, and dense k is turned in place too where attention_prefill reads it (CPU), else undefined. */
int ops_rope_append(struct ops *o, const struct kv_view *kv, const struct attention_heads *heads, struct tensor q,
                    struct tensor k, struct tensor v, const int32_t *position, const float *inverse_frequency,
                    float scale, const struct seq_batch *batch) MUST_CHECK;
/* ops_kv_pack - keeps, in each of n_lanes lanes from `lane` on of a slot, the entries keep[i * keep_stride + 0 ..
 * n_keep[i]) (ascending, device; n_keep host) moved left inside the lane's own pages; pages beyond are pushed back. */
int ops_kv_pack(struct ops *o, const struct kv_view *kv, int slot, int lane, int n_lanes, const int32_t *keep,
                int keep_stride, const int32_t *n_keep) MUST_CHECK;
/* ops_kv_quantise - rewrites the plain lanes of a slot in kv->format (an 8-bit one), in place: page i from pages 2i,
 * 2i + 1 (a page holds as many times more tokens as the activation dtype has bytes); pages beyond are pushed back.
 * Lanes in an 8-bit format already stay as they are. */
int ops_kv_quantise(struct ops *o, const struct kv_view *kv, int slot) MUST_CHECK;
/* ops_kv_widen - the way back, before prompt rows that come behind: rewrites the lanes of a slot that are in an 8-bit
 * format as plain ones, in place, each element its code times the scale, rounded to the activation dtype; the pages
 * that they need beyond theirs are popped. A lane that gets none (the error word) and plain lanes stay as they are.
 * Quantised again a token has the same codes, and its scale but for rounding. */
int ops_kv_widen(struct ops *o, const struct kv_view *kv, int slot) MUST_CHECK;
/* ops_kv_release - empties all lanes of a slot and pushes their pages. */
int ops_kv_release(struct ops *o, const struct kv_view *kv, int slot) MUST_CHECK;

/* ops_select_top - per row i of score [rows, n] float32 the newest window[i] positions plus the best k[i] - window[i]
 * of the others, ascending, into index[i * index_stride ...]. k and window: host [rows], 0 <= window <= k <= n. Equal
 * scores: the lower position wins. */
int ops_select_top(struct ops *o, int32_t *index, int index_stride, struct tensor score, const int *k,
                   const int *window) MUST_CHECK;
/* ops_unshard_columns - y [n, sum of count] from shards [ranks, n, widest]: rank r's first host_count[r] columns. */
int ops_unshard_columns(struct ops *o, struct tensor y, struct tensor shards, const int32_t *host_count) MUST_CHECK;
/* ops_sample - samples one token for each row: logits [n, vocab] float32 (overwritten), slot [n] device (< 0: padding).
 * Order as vLLM's: repetition, frequency and presence penalties; temperature; min_p; top_k; top_p. Writes next_token,
 * logprob and token_count of the slot and adds 1 to its position. The same bits in give the same token out. A position
 * of the slot's forced_span takes its forced token instead. */
int ops_sample(struct ops *o, struct tensor logits, const int32_t *slot, const struct sampling_state *state) MUST_CHECK;
/* ops_sampling_begin - a new sequence in a slot: parameters, prompt marks (prompt_ids device [n_prompt], < 0 or past
 * the vocabulary ignored), counts zero, position such that the first sampled token has position n_prompt. */
int ops_sampling_begin(struct ops *o, const struct sampling_state *state, int slot,
                       const struct sampling_params *params, const int32_t *prompt_ids, int n_prompt) MUST_CHECK;
/* ops_sampling_force - after ops_sampling_begin: the slot's first n tokens (at most MAX_FORCED) behind a prompt of
 * n_prompt tokens will be `tokens` (host [n], copied); their log-probabilities, counts and positions are as if they had
 * been sampled. n 0 is fine. */
int ops_sampling_force(struct ops *o, const struct sampling_state *state, int slot, int n_prompt, const int32_t *tokens,
                       int n) MUST_CHECK;

#include "kernels/ops_aged.h"
#include "kernels/ops_policy.h"

#endif
