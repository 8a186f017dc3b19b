/* cuda - the CUDA backend's state and its ops, one file a family; the table stands in ops_cuda.c.
 *
 * Activations and weights are bfloat16 or float16 (o->dtype), accumulation is float32. Everything runs in order on one
 * stream, but for what runs aside: between ops_aside_begin and ops_aside_end `stream` and `aside` change places, and
 * o->stream, which communicators know, stays. Results depend on shapes and lengths alone, never on the other rows of a
 * batch or on timing: no atomics on floats, fixed splits. Scratch is one block, reserved for the greediest op and laid
 * out anew by each call (cuda__scratch); what must live longer (the decode step's work list, counters that stay zero
 * between launches) has places of its own. Nothing is allocated after ops_reserve. */
#ifndef VITRAIL_KERNELS_CUDA_CUDA_H
#define VITRAIL_KERNELS_CUDA_CUDA_H

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "base/arena.h"
#include "kernels/ops.h"

struct cuda_upload; /* upload.c: pinned memory on its way up */
struct cuda_graphs; /* graphs.c: one captured decode step a bucket */
struct cuda_linear; /* linear.c: cuBLASLt, its workspace and its choices */

enum { CUDA_FEW_ROWS = 8 /* rows up to which linears are bound by memory alone: gemv.cu */ };
enum { CUDA_MARKS = 2, CUDA_WORKSPACE_BYTES = 32 << 20, CUDA_LEAST_COUNTERS = 256 };

struct cuda {
    int device, n_multiprocessors;
    int arch;             /* compute capability, 90 for 9.0 */
    int max_shared_bytes; /* of a block that asks for it */
    bool capturing;       /* a decode step is being recorded: launches do not run */
    cudaStream_t stream;
    cudaStream_t aside;         /* of ops_aside_begin */
    cudaEvent_t aside_event[2]; /* where it begins and where it joins */
    bool is_aside, ran_aside;   /* the streams have changed places; something ran aside since the last join */
    bool behind_event;          /* the next kernel waits for all that stands before it in its stream */
    cudaEvent_t mark[CUDA_MARKS];
    cudaStream_t copy_stream; /* downloads of marked results, beside the ops */
    void *scratch;
    size_t scratch_first, scratch_bytes; /* where the part that every call lays out anew begins; the whole */
    struct ops_limits limits;            /* of ops_reserve */
    int32_t *work_item;                  /* [max_lanes, work_capacity, 4] decode attention: the pieces of every lane */
    int32_t *work_count;                 /* [max_lanes] pieces of each lane */
    int32_t *aged_item, *aged_count;     /* the same of the other part of lanes in two (ops_aged.h) */
    int work_capacity, split_tokens, most_pieces;
    void *workspace;  /* of cuBLASLt and linear_rows.cu */
    int32_t *counter; /* [n_counters] zero between launches: how many pieces of a sequence's head, or sums, are done */
    int n_counters;
    struct cuda_upload *upload;
    struct cuda_graphs *graphs;
    struct cuda_linear *linear;
};

static inline struct cuda *cuda__of(const struct ops *o) { return (struct cuda *)o->impl; }

/* cuda__failed - ERR_DEVICE naming the call and what the driver said. CUDA_TRY - returns it. */
int cuda__failed(const char *what, cudaError_t error);
#define CUDA_TRY(call)                                                                                                 \
    do {                                                                                                               \
        cudaError_t cuda_error = (call);                                                                               \
        if (cuda_error != cudaSuccess) return cuda__failed(#call, cuda_error);                                         \
    } while (0)

/* cuda__launched - the error of the launch just made, if any. */
int cuda__launched(const char *kernel) MUST_CHECK;

/* cuda__await - waits for the event, or if NULL for all of the stream, without keeping the core to itself, and asks who
 * watches (ops_watch). */
int cuda__await(struct ops *o, cudaStream_t stream, cudaEvent_t event) MUST_CHECK;

/* cuda__scratch - an arena over the backend's scratch. ERR_BUG before ops_reserve. */
int cuda__scratch(struct ops *o, struct arena *arena) MUST_CHECK;

/* Scratch of each family for shapes within `limits`: takes it from the (measuring) arena. */
int cuda__kv_measure(const struct cuda *c, const struct ops_limits *limits, struct arena *arena) MUST_CHECK;
int cuda__decode_measure(const struct cuda *c, const struct ops_limits *limits, struct arena *arena) MUST_CHECK;
int cuda__listed_measure(const struct cuda *c, const struct ops_limits *limits, struct arena *arena) MUST_CHECK;
int cuda__probe_measure(const struct cuda *c, const struct ops_limits *limits, struct arena *arena) MUST_CHECK;
int cuda__expected_measure(const struct cuda *c, const struct ops_limits *limits, struct arena *arena) MUST_CHECK;
int cuda__aged_measure(const struct cuda *c, const struct ops_limits *limits, struct arena *arena) MUST_CHECK;
int cuda__sample_measure(const struct cuda *c, const struct ops_limits *limits, struct arena *arena) MUST_CHECK;

/* attention_quantised.cu - decode attention over lanes in an 8-bit format, and its scratch. */
int cuda__quantised_measure(const struct cuda *c, const struct ops_limits *limits, struct arena *arena) MUST_CHECK;
int cuda__attention_quantised(struct ops *o, struct tensor out, struct tensor q, float *log_sum,
                              const struct seq_batch *batch, const struct kv_view *kv,
                              const struct attention_heads *heads) MUST_CHECK;
/* ... by another list of pieces than the step's. */
int cuda__attention_pieces(struct ops *o, struct tensor out, struct tensor q, float *log_sum,
                           const struct seq_batch *batch, const struct kv_view *kv, const struct attention_heads *heads,
                           const int32_t *item, const int32_t *count) MUST_CHECK;

/* aside.c - the second stream: see ops_aside_begin. cuda__open_streams - makes both, whose priorities belong together.
 * cuda__drain - waits for both, before memory is given back. */
int cuda__open_streams(struct cuda *c) MUST_CHECK;
void cuda__aside_close(struct cuda *c);
int cuda__aside_begin(struct ops *o);
void cuda__aside_end(struct ops *o);
int cuda__aside_join(struct ops *o);
void cuda__drain(const struct cuda *c);

/* upload.c - copies through a ring of pinned pieces, so that the caller's memory is free on return and nothing waits
 * unless the ring is full. */
int cuda__upload_open(struct cuda *c) MUST_CHECK;
void cuda__upload_close(struct cuda *c);
int cuda__upload(struct ops *o, void *to, const void *from_host, size_t bytes);
int cuda__download(struct ops *o, void *to_host, const void *from, size_t bytes);

/* graphs.c */
int cuda__run_step(struct ops *o, int bucket, int (*body)(void *arg), void *arg);
int cuda__bucket(const struct ops *o, int n);
size_t cuda__graph_bytes(const struct ops *o, int n_layers);
void cuda__graphs_close(struct cuda *c);

/* linear.c */
int cuda__linear_open(struct cuda *c) MUST_CHECK;
void cuda__linear_close(struct cuda *c);
/* activation.cu - y += bias, for either float. */
int cuda__add_bias(struct ops *o, struct tensor y, const float *bias) MUST_CHECK;
/* gemv.cu - y = x w^T + bias (may be NULL) for few rows; false: this shape is not for it. */
bool cuda__gemv_fits(const struct cuda *c, struct tensor y, struct tensor x, struct tensor w);
/* ... and for any shape at all, slowly. */
int cuda__linear_plain(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias) MUST_CHECK;
int cuda__gemv_swiglu(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias) MUST_CHECK;
int cuda__gemv(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias) MUST_CHECK;

/* linear_rows.cu - the same for more rows, up to 32, on Hopper. Scratch: the workspace, the counters. */
bool cuda__linear_rows_fits(const struct cuda *c, struct tensor y, struct tensor x, struct tensor w);
int cuda__linear_rows(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias) MUST_CHECK;
int cuda__linear_rows_swiglu(struct ops *o, struct tensor y, struct tensor x, struct tensor w,
                             const float *bias) MUST_CHECK;

/* attention_hopper.cu - prompt attention with wgmma and the tensor copy engine; false: not for this device or shape. */
bool cuda__attention_hopper_fits(const struct cuda *c, const struct kv_view *kv, const struct attention_heads *heads);
int cuda__attention_hopper(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                           const struct kv_view *kv, const struct attention_heads *heads) MUST_CHECK;

/* The ops, as ops.h defines them. */
int cuda__embed(struct ops *o, struct tensor y, struct tensor table, const int32_t *ids, int first_row);
int cuda__gather_rows(struct ops *o, struct tensor y, struct tensor x, const int32_t *index);
int cuda__scatter_rows(struct ops *o, struct tensor y, const int32_t *index, struct tensor x);
int cuda__decode_inputs(struct ops *o, int32_t *ids, int32_t *position, const int32_t *slot, int n,
                        const struct sampling_state *state);
int cuda__unshard_columns(struct ops *o, struct tensor y, struct tensor shards, const int32_t *host_count);
int cuda__ceilings(struct ops *o, size_t weight_bytes, struct ops_ceilings *out);
int cuda__fill_normal(struct ops *o, struct tensor w, uint64_t key, float std, int64_t first_row, int64_t first_column,
                      int64_t whole_columns);
int cuda__image_patches(struct ops *o, struct tensor y, const uint8_t *pixels, int n_images, int image_size,
                        int patch_size, const float *scale, const float *shift);
int cuda__rms_norm(struct ops *o, struct tensor y, struct tensor x, const float *w, float eps);
int cuda__add_rms_norm(struct ops *o, struct tensor y, struct tensor residual, struct tensor x, const float *w,
                       float eps);
int cuda__layer_norm(struct ops *o, struct tensor y, struct tensor x, const float *w, const float *b, float eps);
int cuda__add(struct ops *o, struct tensor y, struct tensor x);
int cuda__linear(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias);
int cuda__rope(struct ops *o, struct tensor x, const int32_t *position, const float *inverse_frequency, float scale);
int cuda__swiglu(struct ops *o, struct tensor y, struct tensor gate_up);
int cuda__linear_swiglu(struct ops *o, struct tensor y, struct tensor gate_up, struct tensor x, struct tensor w,
                        const float *bias);
int cuda__activate(struct ops *o, struct tensor x, enum activation kind);
int cuda__attention_vision(struct ops *o, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                           int n_images, float scale);
int cuda__attention_prefill(struct ops *o, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                            const struct seq_batch *batch, const struct kv_view *kv,
                            const struct attention_heads *heads);
int cuda__decode_begin(struct ops *o, const struct seq_batch *batch, const struct kv_view *kv,
                       const struct kv_view *aged);
int cuda__attention_decode(struct ops *o, struct tensor out, struct tensor q, float *log_sum,
                           const struct seq_batch *batch, const struct kv_view *kv,
                           const struct attention_heads *heads);
int cuda__attention_decode_aged(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                                const struct kv_view *kv, const struct kv_view *aged,
                                const struct attention_heads *heads);
int cuda__attention_decode_listed(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                                  const struct kv_view *kv, const struct attention_heads *heads,
                                  const struct kv_list *list);
int cuda__attention_probe(struct ops *o, struct tensor q, const struct kv_view *kv, const struct attention_heads *heads,
                          const struct attention_probe *probe);
size_t cuda__cluster_bytes(const struct ops *o, int n_lanes, int head_dim, int max_entries, int max_clusters);
int cuda__cluster_keys(struct ops *o, const struct kv_view *kv, const struct kv_clusters *clusters,
                       const struct cluster_job *job);
int cuda__select_clusters(struct ops *o, int32_t *entry, int32_t *count, int stride, struct tensor q,
                          enum cluster_kv_group by, const struct seq_batch *batch, const struct kv_view *kv,
                          const struct attention_heads *heads, const struct kv_clusters *clusters);
int cuda__kv_reset(struct ops *o, const struct kv_view *kv);
int cuda__kv_append(struct ops *o, const struct kv_view *kv, const struct attention_heads *heads, struct tensor k,
                    struct tensor v, const struct seq_batch *batch);
int cuda__rope_append(struct ops *o, const struct kv_view *kv, const struct attention_heads *heads, struct tensor q,
                      struct tensor k, struct tensor v, const int32_t *position, const float *inverse_frequency,
                      float scale, const struct seq_batch *batch);
int cuda__kv_pack(struct ops *o, const struct kv_view *kv, int slot, int lane, int n_lanes, const int32_t *keep,
                  int keep_stride, const int32_t *n_keep);
int cuda__judge_columns(struct ops *o, struct tensor q, const float *log_sum, const struct seq_batch *batch,
                        const struct kv_view *kv, const struct attention_heads *heads,
                        const struct decode_judges *judges);
int cuda__list_others(struct ops *o, int32_t *other, int other_stride, const int32_t *keep, int keep_stride,
                      const int32_t *n_keep, int n, int n_lanes);
int cuda__kv_split(struct ops *o, const struct kv_view *kv, const struct kv_view *host, int slot, int lane, int n_lanes,
                   const int32_t *index, int index_stride, const int32_t *n_index);
int cuda__recall(struct ops *o, int32_t *entry, const int32_t *count, int stride, const struct seq_batch *batch,
                 const struct kv_view *kv, const struct attention_heads *heads, const struct kv_view *host,
                 const struct kv_recent *recent);
int cuda__kv_drop(struct ops *o, const struct kv_view *kv, int slot, const int32_t *index, const struct kv_drop *drop,
                  int n_drops);
int cuda__kv_age(struct ops *o, const struct kv_view *kv, const struct kv_view *aged, int slot, int sinks, int window);
int cuda__kv_quantise(struct ops *o, const struct kv_view *kv, int slot);
int cuda__kv_widen(struct ops *o, const struct kv_view *kv, int slot);
int cuda__kv_release(struct ops *o, const struct kv_view *kv, int slot);
int cuda__select_top(struct ops *o, int32_t *index, int index_stride, struct tensor score, const int *k,
                     const int *window);
int cuda__split_budgets(struct ops *o, int32_t *count, struct tensor score, const struct budget_group *group,
                        int n_groups);
int cuda__heavy_begin(struct ops *o, const struct kv_view *kv, const struct heavy_hitters *heavy, int slot,
                      struct tensor score, const int32_t *index, int index_stride);
int cuda__heavy_decode(struct ops *o, struct tensor q, const int32_t *position, const struct seq_batch *batch,
                       const struct kv_view *kv, const struct attention_heads *heads,
                       const struct heavy_hitters *heavy);
int cuda__average_pool(struct ops *o, struct tensor y, struct tensor x, int width);
int cuda__page_bounds(struct ops *o, struct tensor bounds, const struct kv_view *kv, int slot, int lane, int n_lanes);
int cuda__pick_pages(struct ops *o, struct tensor q, const struct seq_batch *batch, const struct kv_view *kv,
                     const struct attention_heads *heads, const struct page_pick *pick);
int cuda__sum_fixed(struct ops *o, int64_t *sum, struct tensor x, double scale);
int cuda__select_rows(struct ops *o, int32_t *index, const int64_t *score, const struct row_choice *choice,
                      int n_choices);
int cuda__expected_attention(struct ops *o, struct tensor q, const struct kv_view *kv,
                             const struct attention_heads *heads, const struct expected_attention *expected);
int cuda__sample(struct ops *o, struct tensor logits, const int32_t *slot, const struct sampling_state *state);
int cuda__sampling_begin(struct ops *o, const struct sampling_state *state, int slot,
                         const struct sampling_params *params, const int32_t *prompt_ids, int n_prompt);

#ifdef __cplusplus
}
#endif

#endif
