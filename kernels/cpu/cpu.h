/* cpu - the CPU backend's state and its ops, one file a family; the table stands in ops_cpu.c.
 *
 * Everything is float32 but the weights. Loops run on OpenMP threads, and matrix products on OpenBLAS, whose OpenMP
 * build shares those threads: inside a parallel region it runs on the calling thread alone. Work is divided by shapes
 * only, so results are the same bits for the same shapes, ISA and number of threads, and for most ops for any.
 * Scratch is one block, reserved for the greediest op and laid out anew by each call (cpu__scratch). */
#ifndef VITRAIL_KERNELS_CPU_CPU_H
#define VITRAIL_KERNELS_CPU_CPU_H

#include "base/arena.h"
#include "kernels/cpu/vector.h"
#include "kernels/ops.h"

struct cpu {
    int n_threads;
    const struct vector_ops *vector;
    void *scratch;
    size_t scratch_bytes;
    struct ops_limits limits; /* that it is for */
};

static inline struct cpu *cpu__of(const struct ops *o) { return o->impl; }
static inline float *cpu__row(struct tensor t, int64_t i) { return (float *)t.data + i * t.stride[0]; }
static inline int cpu__min(int a, int b) { return a < b ? a : b; }

/* Below this many elements of work a loop is not worth waking the other threads. */
enum { CPU_PARALLEL_WORK = 1 << 14 };

/* cpu__scratch - an arena over the backend's scratch. ERR_BUG before ops_reserve. */
int cpu__scratch(struct ops *o, struct arena *arena) MUST_CHECK;

/* Scratch of each family for shapes within `limits`: takes it from the (measuring) arena. */
int cpu__linear_measure(const struct cpu *c, const struct ops_limits *limits, struct arena *arena) MUST_CHECK;
int cpu__attention_measure(const struct cpu *c, const struct ops_limits *limits, struct arena *arena) MUST_CHECK;
int cpu__decode_measure(const struct cpu *c, const struct ops_limits *limits, struct arena *arena) MUST_CHECK;
int cpu__probe_measure(const struct cpu *c, const struct ops_limits *limits, struct arena *arena) MUST_CHECK;
int cpu__expected_measure(const struct cpu *c, const struct ops_limits *limits, struct arena *arena) MUST_CHECK;
int cpu__aged_measure(const struct cpu *c, const struct ops_limits *limits, struct arena *arena) MUST_CHECK;
int cpu__sample_measure(const struct cpu *c, const struct ops_limits *limits, struct arena *arena) MUST_CHECK;

/* memory.c */
int cpu__memory_take(struct ops *o, size_t bytes, void **out) MUST_CHECK;
void cpu__memory_give_back(struct ops *o, void *memory, size_t bytes);

/* The ops, as ops.h defines them. */
int cpu__embed(struct ops *o, struct tensor y, struct tensor table, const int32_t *ids, int first_row);
int cpu__gather_rows(struct ops *o, struct tensor y, struct tensor x, const int32_t *index);
int cpu__scatter_rows(struct ops *o, struct tensor y, const int32_t *index, struct tensor x);
int cpu__decode_inputs(struct ops *o, int32_t *ids, int32_t *position, const int32_t *slot, int n,
                       const struct sampling_state *state);
int cpu__unshard_columns(struct ops *o, struct tensor y, struct tensor shards, const int32_t *host_count);
int cpu__ceilings(struct ops *o, size_t weight_bytes, struct ops_ceilings *out);
int cpu__fill_normal(struct ops *o, struct tensor w, uint64_t key, float std, int64_t first_row, int64_t first_column,
                     int64_t whole_columns);
int cpu__image_patches(struct ops *o, struct tensor y, const uint8_t *pixels, int n_images, int image_size,
                       int patch_size, const float *scale, const float *shift);
int cpu__rms_norm(struct ops *o, struct tensor y, struct tensor x, const float *w, float eps);
int cpu__add_rms_norm(struct ops *o, struct tensor y, struct tensor residual, struct tensor x, const float *w,
                      float eps);
int cpu__layer_norm(struct ops *o, struct tensor y, struct tensor x, const float *w, const float *b, float eps);
int cpu__add(struct ops *o, struct tensor y, struct tensor x);
int cpu__linear(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias);
int cpu__rope(struct ops *o, struct tensor x, const int32_t *position, const float *inverse_frequency, float scale);
int cpu__swiglu(struct ops *o, struct tensor y, struct tensor gate_up);
int cpu__activate(struct ops *o, struct tensor x, enum activation kind);
int cpu__attention_vision(struct ops *o, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                          int n_images, float scale);
int cpu__attention_prefill(struct ops *o, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                           const struct seq_batch *batch, const struct kv_view *kv,
                           const struct attention_heads *heads);
int cpu__attention_decode(struct ops *o, struct tensor out, struct tensor q, float *log_sum,
                          const struct seq_batch *batch, const struct kv_view *kv, const struct attention_heads *heads);
int cpu__attention_decode_aged(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                               const struct kv_view *kv, const struct kv_view *aged,
                               const struct attention_heads *heads);
int cpu__attention_decode_listed(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                                 const struct kv_view *kv, const struct attention_heads *heads,
                                 const struct kv_list *list);
int cpu__attention_probe(struct ops *o, struct tensor q, const struct kv_view *kv, const struct attention_heads *heads,
                         const struct attention_probe *probe);
size_t cpu__cluster_bytes(const struct ops *o, int n_lanes, int head_dim, int max_entries, int max_clusters);
int cpu__cluster_keys(struct ops *o, const struct kv_view *kv, const struct kv_clusters *clusters,
                      const struct cluster_job *job);
int cpu__select_clusters(struct ops *o, int32_t *entry, int32_t *count, int stride, struct tensor q,
                         enum cluster_kv_group by, const struct seq_batch *batch, const struct kv_view *kv,
                         const struct attention_heads *heads, const struct kv_clusters *clusters);
int cpu__kv_reset(struct ops *o, const struct kv_view *kv);
int cpu__kv_append(struct ops *o, const struct kv_view *kv, const struct attention_heads *heads, struct tensor k,
                   struct tensor v, const struct seq_batch *batch);
int cpu__kv_pack(struct ops *o, const struct kv_view *kv, int slot, int lane, int n_lanes, const int32_t *keep,
                 int keep_stride, const int32_t *n_keep);
int cpu__judge_columns(struct ops *o, struct tensor q, const float *log_sum, const struct seq_batch *batch,
                       const struct kv_view *kv, const struct attention_heads *heads,
                       const struct decode_judges *judges);
int cpu__list_others(struct ops *o, int32_t *other, int other_stride, const int32_t *keep, int keep_stride,
                     const int32_t *n_keep, int n, int n_lanes);
int cpu__kv_split(struct ops *o, const struct kv_view *kv, const struct kv_view *host, int slot, int lane, int n_lanes,
                  const int32_t *index, int index_stride, const int32_t *n_index);
int cpu__recall(struct ops *o, int32_t *entry, const int32_t *count, int stride, const struct seq_batch *batch,
                const struct kv_view *kv, const struct attention_heads *heads, const struct kv_view *host,
                const struct kv_recent *recent);
int cpu__kv_drop(struct ops *o, const struct kv_view *kv, int slot, const int32_t *index, const struct kv_drop *drop,
                 int n_drops);
int cpu__kv_age(struct ops *o, const struct kv_view *kv, const struct kv_view *aged, int slot, int sinks, int window);
int cpu__kv_quantise(struct ops *o, const struct kv_view *kv, int slot);
int cpu__kv_widen(struct ops *o, const struct kv_view *kv, int slot);
int cpu__kv_release(struct ops *o, const struct kv_view *kv, int slot);
int cpu__select_top(struct ops *o, int32_t *index, int index_stride, struct tensor score, const int *k,
                    const int *window);
int cpu__split_budgets(struct ops *o, int32_t *count, struct tensor score, const struct budget_group *group,
                       int n_groups);
int cpu__heavy_begin(struct ops *o, const struct kv_view *kv, const struct heavy_hitters *heavy, int slot,
                     struct tensor score, const int32_t *index, int index_stride);
int cpu__heavy_decode(struct ops *o, struct tensor q, const int32_t *position, const struct seq_batch *batch,
                      const struct kv_view *kv, const struct attention_heads *heads, const struct heavy_hitters *heavy);
int cpu__average_pool(struct ops *o, struct tensor y, struct tensor x, int width);
int cpu__page_bounds(struct ops *o, struct tensor bounds, const struct kv_view *kv, int slot, int lane, int n_lanes);
int cpu__pick_pages(struct ops *o, struct tensor q, const struct seq_batch *batch, const struct kv_view *kv,
                    const struct attention_heads *heads, const struct page_pick *pick);
int cpu__sum_fixed(struct ops *o, int64_t *sum, struct tensor x, double scale);
int cpu__select_rows(struct ops *o, int32_t *index, const int64_t *score, const struct row_choice *choice,
                     int n_choices);
int cpu__expected_attention(struct ops *o, struct tensor q, const struct kv_view *kv,
                            const struct attention_heads *heads, const struct expected_attention *expected);
int cpu__sample(struct ops *o, struct tensor logits, const int32_t *slot, const struct sampling_state *state);
int cpu__sampling_begin(struct ops *o, const struct sampling_state *state, int slot,
                        const struct sampling_params *params, const int32_t *prompt_ids, int n_prompt);

#endif
