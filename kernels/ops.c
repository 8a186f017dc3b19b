/* The table of backends and the checking wrappers: shapes, dtypes and NULLs are checked here once, for every backend,
 * so that tests on the CPU test the checks that guard a GPU. Values in device memory (ids, slots, lengths) cannot be
 * looked at from here; a backend must stay within its buffers whatever they are. */
#include "kernels/ops.h"

#include <string.h>

#include "kernels/ops_check.h"

#ifdef VITRAIL_CUDA
static const struct ops_vt *const backends[] = {&ops_cpu, &ops_cuda};
#else
static const struct ops_vt *const backends[] = {&ops_cpu};
#endif
enum { N_BACKENDS = sizeof backends / sizeof backends[0] };

#define TENSOR(t, dtypes, n_dims, ...) TRY(ops_check__tensor(__func__, #t, t, (dtypes), (n_dims), __VA_ARGS__))
#define POINTER(p) TRY(ops_check__pointer(__func__, #p, (p)))
#define ACTIVATION_OF(o) (1u << (o)->dtype)

static const struct ops_vt *find_backend(const char *name)
{
    for (int i = 0; i < N_BACKENDS; i++)
        if (!strcmp(backends[i]->name, name)) return backends[i];
    return NULL;
}

int ops_open(struct ops *o, const char *backend, int device, int n_threads)
{
    memset(o, 0, sizeof *o);
    const struct ops_vt *vt = find_backend(backend);
    if (!vt)
        FAIL(ERR_UNSUPPORTED, "backend \"%s\" is not in this build, which has: cpu%s", backend,
             N_BACKENDS > 1 ? ", cuda" : "");
    if (n_threads < 1) FAIL(ERR_ARG, "ops_open: %d threads, expected at least 1", n_threads);
    o->vt = vt;
    return vt->open(o, device, n_threads);
}

void ops_close(struct ops *o)
{
    if (o->vt) o->vt->close(o);
    memset(o, 0, sizeof *o);
}

int ops_device_count(const char *backend)
{
    const struct ops_vt *vt = find_backend(backend);
    return vt ? vt->device_count() : 0;
}

int ops_use_dtype(struct ops *o, enum dtype model_dtype) { return o->vt->use_dtype(o, model_dtype); }

int ops_memory_free(struct ops *o, size_t *free_bytes, size_t *total_bytes)
{
    POINTER(free_bytes);
    POINTER(total_bytes);
    return o->vt->memory_free(o, free_bytes, total_bytes);
}

int ops_reserve(struct ops *o, const struct ops_limits *limits, size_t *bytes, bool measure)
{
    POINTER(limits);
    POINTER(bytes);
    if (limits->max_tokens < 0 || limits->max_seqs < 0 || limits->max_context < 0 || limits->max_in_features < 0 ||
        limits->max_heads < 0 || limits->head_dim < 0 || limits->vocab_size < 0 || limits->max_lanes < 0)
        FAIL(ERR_ARG, "ops_reserve: a limit is negative");
    return o->vt->reserve(o, limits, bytes, measure);
}

int ops_memory_take(struct ops *o, size_t bytes, void **out)
{
    POINTER(out);
    *out = NULL;
    return o->vt->memory_take(o, bytes, out);
}

void ops_memory_give_back(struct ops *o, void *memory, size_t bytes)
{
    if (memory) o->vt->memory_give_back(o, memory, bytes);
}

int ops_host_take(struct ops *o, size_t bytes, void **out)
{
    POINTER(out);
    *out = NULL;
    return o->vt->host_take(o, bytes, out);
}

void ops_host_give_back(struct ops *o, void *memory, size_t bytes)
{
    if (memory) o->vt->host_give_back(o, memory, bytes);
}

int ops_upload(struct ops *o, void *to, const void *from_host, size_t bytes)
{
    if (!bytes) return OK;
    POINTER(to);
    POINTER(from_host);
    return o->vt->upload(o, to, from_host, bytes);
}

int ops_download(struct ops *o, void *to_host, const void *from, size_t bytes)
{
    if (!bytes) return OK;
    POINTER(to_host);
    POINTER(from);
    return o->vt->download(o, to_host, from, bytes);
}

int ops_copy(struct ops *o, void *to, const void *from, size_t bytes)
{
    if (!bytes) return OK;
    POINTER(to);
    POINTER(from);
    return o->vt->copy(o, to, from, bytes);
}

int ops_zero(struct ops *o, void *to, size_t bytes)
{
    if (!bytes) return OK;
    POINTER(to);
    return o->vt->zero(o, to, bytes);
}

int ops_finish(struct ops *o) { return o->vt->finish(o); }

void ops_watch(struct ops *o, int (*watch)(void *arg), void *arg)
{
    o->watch = watch;
    o->watch_arg = arg;
}

int ops_run_step(struct ops *o, int bucket, int (*body)(void *arg), void *arg)
{
    if (bucket < 1) FAIL(ERR_ARG, "ops_run_step: bucket of %d rows, expected at least 1", bucket);
    if (!body) FAIL(ERR_ARG, "ops_run_step: body is NULL");
    return o->vt->run_step(o, bucket, body, arg);
}

void ops_forget_steps(struct ops *o)
{
    if (o->vt) o->vt->forget_steps(o);
}

size_t ops_graph_bytes(const struct ops *o, int n_layers) { return o->vt->graph_bytes(o, n_layers); }

int ops_bucket(const struct ops *o, int n) { return o->vt->bucket(o, n); }

int ops_mark(struct ops *o, int i)
{
    if (i < 0 || i > 1) FAIL(ERR_ARG, "ops_mark: mark %d, expected 0 or 1", i);
    return o->vt->mark(o, i);
}

int ops_download_marked(struct ops *o, void *to_host, const void *from, size_t bytes, int i)
{
    if (i < 0 || i > 1) FAIL(ERR_ARG, "ops_download_marked: mark %d, expected 0 or 1", i);
    if (!bytes) return OK;
    POINTER(to_host);
    POINTER(from);
    return o->vt->download_marked(o, to_host, from, bytes, i);
}

int ops_ceilings(struct ops *o, size_t weight_bytes, struct ops_ceilings *out)
{
    POINTER(out);
    return o->vt->ceilings(o, weight_bytes, out);
}

int ops_fill_normal(struct ops *o, struct tensor w, uint64_t key, float std, int64_t first_row, int64_t first_column,
                    int64_t whole_columns)
{
    TENSOR(w, IS_WEIGHT, 2, ANY_SIZE, ANY_SIZE, 1);
    if (first_row < 0 || first_column < 0 || first_column > whole_columns - w.dim[1])
        FAIL(ERR_ARG, "ops_fill_normal: w has columns %lld .. %lld of %lld", (long long)first_column,
             (long long)(first_column + w.dim[1]), (long long)whole_columns);
    return tensor_count(w) ? o->vt->fill_normal(o, w, key, std, first_row, first_column, whole_columns) : OK;
}

int ops_embed(struct ops *o, struct tensor y, struct tensor table, const int32_t *ids, int first_row)
{
    TENSOR(y, ACTIVATION_OF(o), 2, ANY_SIZE, ANY_SIZE, 1);
    TENSOR(table, IS_WEIGHT, 2, ANY_SIZE, y.dim[1], 1);
    if (y.dim[0] == 0) return OK;
    POINTER(ids);
    return o->vt->embed(o, y, table, ids, first_row);
}

/* Both of gather and scatter: rows of the same dtype and length. */
static int check_rows(const char *op, struct tensor y, struct tensor x)
{
    TRY(ops_check__tensor(op, "y", y, IS_ANY, 2, ANY_SIZE, ANY_SIZE, 1));
    return ops_check__tensor(op, "x", x, 1u << y.dtype, 2, ANY_SIZE, y.dim[1], 1);
}

int ops_gather_rows(struct ops *o, struct tensor y, struct tensor x, const int32_t *index)
{
    TRY(check_rows(__func__, y, x));
    if (y.dim[0] == 0) return OK;
    POINTER(index);
    return o->vt->gather_rows(o, y, x, index);
}

int ops_scatter_rows(struct ops *o, struct tensor y, const int32_t *index, struct tensor x)
{
    TRY(check_rows(__func__, y, x));
    if (x.dim[0] == 0) return OK;
    POINTER(index);
    return o->vt->scatter_rows(o, y, index, x);
}

static int check_sampling_state(const char *op, const struct sampling_state *state)
{
    TRY(ops_check__pointer(op, "state", state));
    if (state->vocab_size < 1 || state->n_slots < 1)
        FAIL(ERR_ARG, "%s: state for %d slots of %d tokens, expected both positive", op, state->n_slots,
             state->vocab_size);
    TRY(ops_check__pointer(op, "state.params", state->params));
    TRY(ops_check__pointer(op, "state.token_count", state->token_count));
    TRY(ops_check__pointer(op, "state.next_token", state->next_token));
    TRY(ops_check__pointer(op, "state.position", state->position));
    TRY(ops_check__pointer(op, "state.logprob", state->logprob));
    return ops_check__pointer(op, "state.logprob_token", state->logprob_token);
}

int ops_decode_inputs(struct ops *o, int32_t *ids, int32_t *position, const int32_t *slot, int n,
                      const struct sampling_state *state)
{
    TRY(check_sampling_state(__func__, state));
    if (n < 0) FAIL(ERR_ARG, "ops_decode_inputs: %d rows", n);
    if (n == 0) return OK;
    POINTER(ids);
    POINTER(position);
    POINTER(slot);
    return o->vt->decode_inputs(o, ids, position, slot, n, state);
}

int ops_rms_norm(struct ops *o, struct tensor y, struct tensor x, const float *w, float eps)
{
    TENSOR(x, ACTIVATION_OF(o), 2, ANY_SIZE, ANY_SIZE, 1);
    TENSOR(y, ACTIVATION_OF(o), 2, x.dim[0], x.dim[1], 1);
    POINTER(w);
    return x.dim[0] ? o->vt->rms_norm(o, y, x, w, eps) : OK;
}

int ops_add_rms_norm(struct ops *o, struct tensor y, struct tensor residual, struct tensor x, const float *w, float eps)
{
    TENSOR(x, ACTIVATION_OF(o), 2, ANY_SIZE, ANY_SIZE, 1);
    TENSOR(residual, ACTIVATION_OF(o), 2, x.dim[0], x.dim[1], 1);
    TENSOR(y, ACTIVATION_OF(o), 2, x.dim[0], x.dim[1], 1);
    POINTER(w);
    return x.dim[0] ? o->vt->add_rms_norm(o, y, residual, x, w, eps) : OK;
}

int ops_layer_norm(struct ops *o, struct tensor y, struct tensor x, const float *w, const float *b, float eps)
{
    TENSOR(x, ACTIVATION_OF(o), 2, ANY_SIZE, ANY_SIZE, 1);
    TENSOR(y, ACTIVATION_OF(o), 2, x.dim[0], x.dim[1], 1);
    POINTER(w);
    POINTER(b);
    return x.dim[0] ? o->vt->layer_norm(o, y, x, w, b, eps) : OK;
}

int ops_add(struct ops *o, struct tensor y, struct tensor x)
{
    TENSOR(y, ACTIVATION_OF(o), 2, ANY_SIZE, ANY_SIZE, 1);
    TENSOR(x, ACTIVATION_OF(o), 2, ANY_SIZE, y.dim[1], 1);
    if (y.dim[0] == 0) return OK;
    if (x.dim[0] == 0 || y.dim[0] % x.dim[0])
        FAIL(ERR_ARG, "ops_add: x has %lld rows, expected a divisor of y's %lld", (long long)x.dim[0],
             (long long)y.dim[0]);
    return o->vt->add(o, y, x);
}

int ops_linear(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias)
{
    TENSOR(x, ACTIVATION_OF(o), 2, ANY_SIZE, ANY_SIZE, 1);
    TENSOR(w, IS_WEIGHT, 2, ANY_SIZE, x.dim[1], 1);
    TENSOR(y, ACTIVATION_OF(o) | IS_F32, 2, x.dim[0], w.dim[0], 1);
    return x.dim[0] && w.dim[0] ? o->vt->linear(o, y, x, w, bias) : OK;
}

int ops_rope(struct ops *o, struct tensor x, const int32_t *position, const float *inverse_frequency, float scale)
{
    TENSOR(x, ACTIVATION_OF(o), 3, ANY_SIZE, ANY_SIZE, ANY_SIZE);
    if (x.dim[2] % 2) FAIL(ERR_ARG, "ops_rope: x has heads of %lld dimensions, expected even", (long long)x.dim[2]);
    if (tensor_count(x) == 0) return OK;
    POINTER(position);
    POINTER(inverse_frequency);
    return o->vt->rope(o, x, position, inverse_frequency, scale);
}

int ops_swiglu(struct ops *o, struct tensor y, struct tensor gate_up)
{
    TENSOR(y, ACTIVATION_OF(o), 2, ANY_SIZE, ANY_SIZE, 1);
    TENSOR(gate_up, ACTIVATION_OF(o), 2, y.dim[0], 2 * y.dim[1], 1);
    return y.dim[0] ? o->vt->swiglu(o, y, gate_up) : OK;
}

int ops_linear_swiglu(struct ops *o, struct tensor y, struct tensor gate_up, struct tensor x, struct tensor w,
                      const float *bias)
{
    TENSOR(x, ACTIVATION_OF(o), 2, ANY_SIZE, ANY_SIZE, 1);
    TENSOR(y, ACTIVATION_OF(o), 2, x.dim[0], ANY_SIZE, 1);
    TENSOR(w, IS_WEIGHT, 2, 2 * y.dim[1], x.dim[1], 1);
    TENSOR(gate_up, ACTIVATION_OF(o), 2, x.dim[0], 2 * y.dim[1], 1);
    return x.dim[0] && y.dim[1] ? o->vt->linear_swiglu(o, y, gate_up, x, w, bias) : OK;
}

int ops_activate(struct ops *o, struct tensor x, enum activation kind)
{
    TENSOR(x, ACTIVATION_OF(o), 2, ANY_SIZE, ANY_SIZE, 1);
    if ((unsigned)kind >= ACTIVATION_N)
        FAIL(ERR_ARG, "ops_activate: kind %d, expected 0 .. %d", (int)kind, ACTIVATION_N - 1);
    return x.dim[0] ? o->vt->activate(o, x, kind) : OK;
}

int ops_image_patches(struct ops *o, struct tensor y, const uint8_t *pixels, int n_images, int image_size,
                      int patch_size, const float *scale, const float *shift)
{
    if (n_images < 0 || image_size < 1 || patch_size < 1 || patch_size > image_size || image_size > 1 << 14)
        FAIL(ERR_ARG, "ops_image_patches: %d images of %d pixels in patches of %d", n_images, image_size, patch_size);
    int64_t side = image_size / patch_size;
    TENSOR(y, ACTIVATION_OF(o), 2, n_images * side * side, 3 * (int64_t)patch_size * patch_size, 1);
    if (n_images == 0) return OK;
    POINTER(pixels);
    POINTER(scale);
    POINTER(shift);
    return o->vt->image_patches(o, y, pixels, n_images, image_size, patch_size, scale, shift);
}

int ops_attention_vision(struct ops *o, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                         int n_images, float scale)
{
    TENSOR(q, ACTIVATION_OF(o), 3, ANY_SIZE, ANY_SIZE, ANY_SIZE);
    TENSOR(k, ACTIVATION_OF(o), 3, q.dim[0], q.dim[1], q.dim[2]);
    TENSOR(v, ACTIVATION_OF(o), 3, q.dim[0], q.dim[1], q.dim[2]);
    TENSOR(out, ACTIVATION_OF(o), 3, q.dim[0], q.dim[1], q.dim[2]);
    if (tensor_count(q) == 0) return OK;
    if (n_images < 1 || q.dim[0] % n_images)
        FAIL(ERR_ARG, "ops_attention_vision: q has %lld rows, expected a multiple of %d images", (long long)q.dim[0],
             n_images);
    return o->vt->attention_vision(o, out, q, k, v, n_images, scale);
}

int ops_attention_prefill(struct ops *o, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                          const struct seq_batch *batch, const struct kv_view *kv, const struct attention_heads *heads)
{
    TRY(ops_check__kv(__func__, o, kv));
    TRY(ops_check__heads(__func__, kv, heads));
    TRY(ops_check__batch(__func__, kv, batch, false));
    TENSOR(q, ACTIVATION_OF(o), 3, batch->n_tokens, heads->n_heads, heads->head_dim);
    TENSOR(k, ACTIVATION_OF(o), 3, batch->n_tokens, heads->n_kv_heads, heads->head_dim);
    TENSOR(v, ACTIVATION_OF(o), 3, batch->n_tokens, heads->n_kv_heads, heads->head_dim);
    TENSOR(out, ACTIVATION_OF(o), 3, batch->n_tokens, heads->n_heads, heads->head_dim);
    return batch->n_tokens ? o->vt->attention_prefill(o, out, q, k, v, batch, kv, heads) : OK;
}

int ops_decode_begin(struct ops *o, const struct seq_batch *batch, const struct kv_view *kv)
{
    TRY(ops_check__kv(__func__, o, kv));
    TRY(ops_check__batch(__func__, kv, batch, true));
    return batch->n_seqs ? o->vt->decode_begin(o, batch, kv, NULL) : OK;
}

static int attend(const char *op, struct ops *o, struct tensor out, struct tensor q, float *log_sum,
                  const struct seq_batch *batch, const struct kv_view *kv, const struct attention_heads *heads)
{
    TRY(ops_check__kv(op, o, kv));
    TRY(ops_check__heads(op, kv, heads));
    TRY(ops_check__batch(op, kv, batch, true));
    TRY(ops_check__tensor(op, "q", q, ACTIVATION_OF(o), 3, batch->n_seqs, heads->n_heads, heads->head_dim));
    TRY(ops_check__tensor(op, "out", out, ACTIVATION_OF(o), 3, batch->n_seqs, heads->n_heads, heads->head_dim));
    return batch->n_seqs ? o->vt->attention_decode(o, out, q, log_sum, batch, kv, heads) : OK;
}

int ops_attention_decode(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                         const struct kv_view *kv, const struct attention_heads *heads)
{
    return attend(__func__, o, out, q, NULL, batch, kv, heads);
}

int ops_attention_decode_log_sum(struct ops *o, struct tensor out, struct tensor q, float *log_sum,
                                 const struct seq_batch *batch, const struct kv_view *kv,
                                 const struct attention_heads *heads)
{
    POINTER(log_sum);
    return attend(__func__, o, out, q, log_sum, batch, kv, heads);
}

int ops_attention_probe(struct ops *o, struct tensor q, const struct kv_view *kv, const struct attention_heads *heads,
                        const struct attention_probe *probe)
{
    TRY(ops_check__kv(__func__, o, kv));
    TRY(ops_check__heads(__func__, kv, heads));
    POINTER(probe);
    if (probe->slot < 0 || probe->slot >= kv->n_slots)
        FAIL(ERR_ARG, "ops_attention_probe: probe.slot is %d, the cache has %d", probe->slot, kv->n_slots);
    if (probe->n_rows < 0 || probe->first_position < 0 ||
        (int64_t)probe->first_position + probe->n_rows > (int64_t)kv->max_pages * kv->page_size)
        FAIL(ERR_ARG, "ops_attention_probe: %d rows from position %d, a lane holds %lld tokens", probe->n_rows,
             probe->first_position, (long long)kv->max_pages * kv->page_size);
    if (!(probe->threshold >= 0 && probe->threshold <= 1))
        FAIL(ERR_ARG, "ops_attention_probe: probe.threshold is %g, expected 0 .. 1", (double)probe->threshold);
    TENSOR(q, ACTIVATION_OF(o), 3, probe->n_rows, heads->n_heads, heads->head_dim);
    POINTER(probe->column_sum);
    return o->vt->attention_probe(o, q, kv, heads, probe);
}

int ops_kv_reset(struct ops *o, const struct kv_view *kv)
{
    TRY(ops_check__kv(__func__, o, kv));
    return o->vt->kv_reset(o, kv);
}

int ops_kv_append(struct ops *o, const struct kv_view *kv, const struct attention_heads *heads, struct tensor k,
                  struct tensor v, const struct seq_batch *batch)
{
    TRY(ops_check__kv(__func__, o, kv));
    TRY(ops_check__heads(__func__, kv, heads));
    TRY(ops_check__batch(__func__, kv, batch, !batch || !batch->cu_seqlens));
    TENSOR(k, ACTIVATION_OF(o), 3, batch->n_tokens, heads->n_kv_heads, heads->head_dim);
    TENSOR(v, ACTIVATION_OF(o), 3, batch->n_tokens, heads->n_kv_heads, heads->head_dim);
    return batch->n_tokens ? o->vt->kv_append(o, kv, heads, k, v, batch) : OK;
}

int ops_rope_append(struct ops *o, const struct kv_view *kv, const struct attention_heads *heads, struct tensor q,
                    struct tensor k, struct tensor v, const int32_t *position, const float *inverse_frequency,
                    float scale, const struct seq_batch *batch)
{
    TRY(ops_check__kv(__func__, o, kv));
    TRY(ops_check__heads(__func__, kv, heads));
    TRY(ops_check__batch(__func__, kv, batch, !batch || !batch->cu_seqlens));
    TENSOR(q, ACTIVATION_OF(o), 3, batch->n_tokens, heads->n_heads, heads->head_dim);
    TENSOR(k, ACTIVATION_OF(o), 3, batch->n_tokens, heads->n_kv_heads, heads->head_dim);
    TENSOR(v, ACTIVATION_OF(o), 3, batch->n_tokens, heads->n_kv_heads, heads->head_dim);
    if (heads->head_dim % 2) FAIL(ERR_ARG, "ops_rope_append: heads of %d dimensions, expected even", heads->head_dim);
    if (!batch->n_tokens) return OK;
    POINTER(position);
    POINTER(inverse_frequency);
    return o->vt->rope_append(o, kv, heads, q, k, v, position, inverse_frequency, scale, batch);
}

int ops_kv_pack(struct ops *o, const struct kv_view *kv, int slot, int lane, int n_lanes, const int32_t *keep,
                int keep_stride, const int32_t *n_keep)
{
    TRY(ops_check__kv(__func__, o, kv));
    if (slot < 0 || slot >= kv->n_slots) FAIL(ERR_ARG, "ops_kv_pack: slot %d, the cache has %d", slot, kv->n_slots);
    if (lane < 0 || n_lanes < 0 || lane > kv->lanes_per_slot - n_lanes)
        FAIL(ERR_ARG, "ops_kv_pack: lanes %d .. %d, a slot has %d", lane, lane + n_lanes, kv->lanes_per_slot);
    if (n_lanes == 0) return OK;
    POINTER(n_keep);
    int most = 0;
    for (int i = 0; i < n_lanes; i++) {
        if (n_keep[i] < 0 || (n_lanes > 1 && n_keep[i] > keep_stride))
            FAIL(ERR_ARG, "ops_kv_pack: n_keep[%d] is %d, expected 0 .. keep_stride (%d)", i, n_keep[i], keep_stride);
        most = n_keep[i] > most ? n_keep[i] : most;
    }
    if (most > 0) POINTER(keep);
    return o->vt->kv_pack(o, kv, slot, lane, n_lanes, keep, keep_stride, n_keep);
}

int ops_kv_quantise(struct ops *o, const struct kv_view *kv, int slot)
{
    TRY(ops_check__kv(__func__, o, kv));
    if (kv->format == KV_PLAIN) FAIL(ERR_ARG, "ops_kv_quantise: kv.format is plain, expected an 8-bit one");
    if (slot < 0 || slot >= kv->n_slots) FAIL(ERR_ARG, "ops_kv_quantise: slot %d, the cache has %d", slot, kv->n_slots);
    return o->vt->kv_quantise(o, kv, slot);
}

int ops_kv_widen(struct ops *o, const struct kv_view *kv, int slot)
{
    TRY(ops_check__kv(__func__, o, kv));
    if (kv->format == KV_PLAIN) FAIL(ERR_ARG, "ops_kv_widen: kv.format is plain, expected an 8-bit one");
    if (slot < 0 || slot >= kv->n_slots) FAIL(ERR_ARG, "ops_kv_widen: slot %d, the cache has %d", slot, kv->n_slots);
    return o->vt->kv_widen(o, kv, slot);
}

int ops_kv_release(struct ops *o, const struct kv_view *kv, int slot)
{
    TRY(ops_check__kv(__func__, o, kv));
    if (slot < 0 || slot >= kv->n_slots) FAIL(ERR_ARG, "ops_kv_release: slot %d, the cache has %d", slot, kv->n_slots);
    return o->vt->kv_release(o, kv, slot);
}

int ops_select_top(struct ops *o, int32_t *index, int index_stride, struct tensor score, const int *k,
                   const int *window)
{
    TENSOR(score, IS_F32, 2, ANY_SIZE, ANY_SIZE, 1);
    if (score.dim[0] == 0) return OK;
    POINTER(k);
    POINTER(window);
    for (int64_t i = 0; i < score.dim[0]; i++)
        if (window[i] < 0 || window[i] > k[i] || k[i] > score.dim[1] || k[i] > index_stride)
            FAIL(ERR_ARG,
                 "ops_select_top: row %lld: window %d, k %d of %lld scores into rows of %d, expected 0 <= window <= k "
                 "<= "
                 "both",
                 (long long)i, window[i], k[i], (long long)score.dim[1], index_stride);
    if (index_stride == 0) return OK;
    POINTER(index);
    return o->vt->select_top(o, index, index_stride, score, k, window);
}

int ops_unshard_columns(struct ops *o, struct tensor y, struct tensor shards, const int32_t *host_count)
{
    TENSOR(y, IS_ANY, 2, ANY_SIZE, ANY_SIZE, 1);
    TENSOR(shards, 1u << y.dtype, 3, ANY_SIZE, y.dim[0], ANY_SIZE);
    POINTER(host_count);
    int64_t sum = 0;
    for (int64_t r = 0; r < shards.dim[0]; r++) {
        if (host_count[r] < 0 || host_count[r] > shards.dim[2])
            FAIL(ERR_ARG, "ops_unshard_columns: host_count[%lld] is %d, shards are %lld wide", (long long)r,
                 host_count[r], (long long)shards.dim[2]);
        sum += host_count[r];
    }
    if (sum != y.dim[1])
        FAIL(ERR_ARG, "ops_unshard_columns: host_count adds up to %lld columns, y has %lld", (long long)sum,
             (long long)y.dim[1]);
    return tensor_count(y) ? o->vt->unshard_columns(o, y, shards, host_count) : OK;
}

int ops_sample(struct ops *o, struct tensor logits, const int32_t *slot, const struct sampling_state *state)
{
    TRY(check_sampling_state(__func__, state));
    TENSOR(logits, IS_F32, 2, ANY_SIZE, state->vocab_size, 1);
    if (logits.dim[0] == 0) return OK;
    POINTER(slot);
    return o->vt->sample(o, logits, slot, state);
}

int ops_sampling_begin(struct ops *o, const struct sampling_state *state, int slot,
                       const struct sampling_params *params, const int32_t *prompt_ids, int n_prompt)
{
    TRY(check_sampling_state(__func__, state));
    if (slot < 0 || slot >= state->n_slots)
        FAIL(ERR_ARG, "ops_sampling_begin: slot %d, the state has %d", slot, state->n_slots);
    POINTER(params);
    if (params->n_logprobs < 0 || params->n_logprobs > MAX_LOGPROBS)
        FAIL(ERR_ARG, "ops_sampling_begin: params.n_logprobs is %d, expected 0 .. %d", params->n_logprobs,
             MAX_LOGPROBS);
    if (n_prompt < 0) FAIL(ERR_ARG, "ops_sampling_begin: prompt of %d tokens", n_prompt);
    if (n_prompt) POINTER(prompt_ids);
    return o->vt->sampling_begin(o, state, slot, params, prompt_ids, n_prompt);
}

int ops_sampling_force(struct ops *o, const struct sampling_state *state, int slot, int n_prompt, const int32_t *tokens,
                       int n)
{
    TRY(check_sampling_state(__func__, state));
    if (n == 0) return OK;
    if (slot < 0 || slot >= state->n_slots)
        FAIL(ERR_ARG, "ops_sampling_force: slot %d, the state has %d", slot, state->n_slots);
    POINTER(tokens);
    TRY(ops_check__pointer(__func__, "state.forced_span", state->forced_span));
    TRY(ops_check__pointer(__func__, "state.forced", state->forced));
    if (n < 0 || n > MAX_FORCED) FAIL(ERR_ARG, "ops_sampling_force: %d tokens, expected 0 .. %d", n, MAX_FORCED);
    for (int i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= state->vocab_size)
            FAIL(ERR_ARG, "ops_sampling_force: token %d is %d, the vocabulary has %d", i, tokens[i], state->vocab_size);
    struct forced_span span = {n_prompt, n};
    TRY(ops_upload(o, state->forced + (size_t)slot * MAX_FORCED, tokens, (size_t)n * sizeof *tokens));
    return ops_upload(o, state->forced_span + slot, &span, sizeof span);
}
