#include "model/model.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "model/tensor_parallel.h"
#include "model/vision.h"

struct model {
    struct model_dims dims;
    struct model_options options;
    struct ops *ops;
    struct tensor_parallel tp;
    struct weights weights;
    struct policy_layer *layers;
    struct vision vision;
    double vision_seconds;
    float *inverse_frequency; /* [head_dim / 2] device */
    /* activations; T = max_tokens rows or max_seqs if that is more, S = max_seqs */
    struct tensor x;       /* [T, hidden] the residual stream */
    struct tensor h;       /* [T, hidden] normed */
    struct tensor partial; /* [T, hidden] before the sum over ranks */
    char *work;            /* qkv and attention, then gate_up and the MLP's middle: never both */
    struct tensor last;    /* [S, hidden] rows that go to the head */
    struct tensor logits, logits_local, logits_gathered;
    /* integers of a step, device */
    int32_t *ids, *position, *slot, *cu_seqlens, *row_index;
    int32_t *host_index;      /* [T] scratch for indices on their way up */
    int32_t *host_slot;       /* [S] the same for slots */
    int32_t *host_cu_seqlens; /* [2, S + 1] rows of a step's prompts before and after some leave */
    int *n_recent;            /* [S] tokens appended to a slot's lanes since they last aged, where they do */
    int n_rows;
    void (*watch)(void *arg, struct tensor logits);
    void *watch_arg;
};

/* ---- opening and sizes ---- */

static int open_layers(struct model *m)
{
    m->layers = calloc((size_t)m->dims.n_layers, sizeof *m->layers);
    if (!m->layers) FAIL(ERR_NOMEM, "model: out of memory");
    for (int l = 0; l < m->dims.n_layers; l++)
        m->layers[l] = (struct policy_layer){.heads = m->weights.layers[l].heads,
                                             .first_kv_head = m->weights.layers[l].first_kv_head,
                                             .counted = m->weights.layers[l].counted};
    return OK;
}

int model_open(const struct model_dims *dims, const struct model_options *options, struct ops *ops, struct comm *comm,
               struct model **out)
{
    struct model *m = calloc(1, sizeof *m);
    if (!m) FAIL(ERR_NOMEM, "model: out of memory");
    *out = m;
    m->dims = *dims;
    m->options = *options;
    m->ops = ops;
    m->n_rows = options->max_tokens > options->max_seqs ? options->max_tokens : options->max_seqs;
    TRY(tensor_parallel_open(&m->tp, ops, comm, dims->vocab_size));
    TRY(weights_open(dims, comm->size, comm->rank, &m->weights));
    TRY(open_layers(m));
    m->host_index = calloc((size_t)m->n_rows, sizeof *m->host_index);
    m->host_slot = calloc((size_t)options->max_seqs, sizeof *m->host_slot);
    m->host_cu_seqlens = calloc(2 * ((size_t)options->max_seqs + 1), sizeof *m->host_cu_seqlens);
    m->n_recent = calloc((size_t)options->max_seqs, sizeof *m->n_recent);
    if (!m->host_index || !m->host_slot || !m->host_cu_seqlens || !m->n_recent) FAIL(ERR_NOMEM, "model: out of memory");
    m->vision =
        (struct vision){.dims = &m->dims, .weights = &m->weights, .tp = &m->tp, .max_images = options->max_images};
    memcpy(m->vision.scale, options->pixel_scale, sizeof m->vision.scale);
    memcpy(m->vision.shift, options->pixel_shift, sizeof m->vision.shift);
    return OK;
}

void model_close(struct model *m)
{
    if (!m) return;
    weights_close(&m->weights);
    tensor_parallel_close(&m->tp);
    free(m->layers);
    free(m->host_index);
    free(m->host_slot);
    free(m->host_cu_seqlens);
    free(m->n_recent);
    free(m);
}

const struct weights *model_weights(const struct model *m) { return &m->weights; }

const struct policy_layer *model_layers(const struct model *m) { return m->layers; }

int model_lanes(const struct model *m) { return m->weights.lanes; }

const float *model_inverse_frequency(const struct model *m) { return m->inverse_frequency; }

double model_vision_seconds(const struct model *m) { return m->vision_seconds; }

void model_watch_logits(struct model *m, void (*watch)(void *arg, struct tensor logits), void *arg)
{
    m->watch = watch;
    m->watch_arg = arg;
}

static int max_int(int a, int b) { return a > b ? a : b; }

struct ops_limits model_limits(const struct model *m)
{
    const struct model_dims *d = &m->dims;
    struct ops_limits limits = {.max_tokens = m->n_rows,
                                .max_seqs = m->options.max_seqs,
                                .max_context = m->options.max_context,
                                .max_in_features =
                                    max_int(max_int(d->hidden_size, d->intermediate_size), d->n_heads * d->head_dim),
                                .max_heads = d->n_heads,
                                .head_dim = d->head_dim,
                                .vocab_size = d->vocab_size,
                                .max_lanes = m->weights.lanes,
                                .aged = m->options.aged};
    if (d->family != MODEL_LLAVA) return limits;
    const struct vision_dims *v = &d->vision;
    limits.max_tokens = max_int(limits.max_tokens, v->n_patches + 1);
    limits.max_context = max_int(limits.max_context, v->n_patches + 1);
    limits.max_in_features =
        max_int(limits.max_in_features, max_int(v->intermediate_size, 3 * v->patch_size * v->patch_size));
    limits.max_heads = max_int(limits.max_heads, v->n_heads);
    limits.head_dim = max_int(limits.head_dim, v->head_dim);
    return limits;
}

size_t model_reduce_bytes(const struct model *m)
{
    return (size_t)m->n_rows * (size_t)m->dims.hidden_size * dtype_size(m->ops->dtype);
}

/* ---- placing ---- */

/* Columns of the work area that attention and the MLP need, whichever is more. */
static int64_t work_columns(const struct model *m)
{
    int64_t most = 0;
    for (int l = 0; l < m->dims.n_layers; l++) {
        const struct decoder_layer *layer = &m->weights.layers[l];
        int64_t attention = (2 * layer->heads.n_heads + 2 * layer->heads.n_kv_heads) * (int64_t)layer->heads.head_dim;
        int64_t mlp = 3 * (int64_t)layer->n_columns;
        if (attention > most) most = attention;
        if (mlp > most) most = mlp;
    }
    return most;
}

static int place_logits(struct model *m, struct arena *arena)
{
    int64_t seqs = m->options.max_seqs, ranks = m->tp.comm->size;
    static const char label[] = "logits";
    TRY(arena_tensor(arena, tensor_2d(NULL, DTYPE_F32, seqs, m->dims.vocab_size), label, &m->logits));
    if (ranks == 1) return OK;
    TRY(arena_tensor(arena, tensor_2d(NULL, DTYPE_F32, seqs, m->tp.vocab_widest), label, &m->logits_local));
    return arena_tensor(arena, tensor_2d(NULL, DTYPE_F32, ranks * seqs, m->tp.vocab_widest), label,
                        &m->logits_gathered);
}

static int place_activations(struct model *m, struct arena *arena)
{
    static const char label[] = "activations";
    enum dtype dtype = m->ops->dtype;
    int64_t rows = m->n_rows, hidden = m->dims.hidden_size;
    size_t ints = (size_t)rows * sizeof(int32_t), seqs = (size_t)m->options.max_seqs;
    TRY(arena_tensor(arena, tensor_2d(NULL, dtype, rows, hidden), label, &m->x));
    TRY(arena_tensor(arena, tensor_2d(NULL, dtype, rows, hidden), label, &m->h));
    TRY(arena_tensor(arena, tensor_2d(NULL, dtype, rows, hidden), label, &m->partial));
    TRY(arena_take(arena, (size_t)(rows * work_columns(m)) * dtype_size(dtype), label, &m->work));
    TRY(arena_tensor(arena, tensor_2d(NULL, dtype, m->options.max_seqs, hidden), label, &m->last));
    size_t context = (size_t)max_int(m->n_rows, m->options.max_context) * sizeof(int32_t);
    TRY(arena_take(arena, context, label, &m->ids)); /* a whole prompt when a sequence begins */
    TRY(arena_take(arena, ints, label, &m->position));
    TRY(arena_take(arena, ints, label, &m->row_index));
    TRY(arena_take(arena, seqs * sizeof(int32_t), label, &m->slot));
    TRY(arena_take(arena, (seqs + 1) * sizeof(int32_t), label, &m->cu_seqlens));
    return arena_take(arena, (size_t)m->dims.head_dim / 2 * sizeof(float), label, &m->inverse_frequency);
}

int model_place(struct model *m, struct arena *arena, const struct checkpoint *checkpoint)
{
    TRY(weights_place(&m->weights, arena, checkpoint, m->options.weight_dtype, m->ops->dtype));
    TRY(place_activations(m, arena));
    TRY(place_logits(m, arena));
    return m->dims.family == MODEL_LLAVA ? vision_place(&m->vision, arena, m->ops->dtype) : OK;
}

int model_load(struct model *m, struct checkpoint *checkpoint, uint64_t seed, const struct load_progress *progress)
{
    float frequency[MODEL_MAX_HEAD_DIM / 2];
    if (checkpoint)
        TRY(weights_load(&m->weights, m->ops, checkpoint, progress));
    else
        TRY(weights_fill(&m->weights, m->ops, seed, progress));
    model_dims_rope_frequencies(&m->dims, frequency);
    TRY(ops_upload(m->ops, m->inverse_frequency, frequency, (size_t)m->dims.head_dim / 2 * sizeof(float)));
    if (m->dims.family == MODEL_LLAVA) TRY(vision_begin(&m->vision));
    return ops_finish(m->ops);
}

/* ---- the layers ---- */

/* Views of the work area for n rows of one layer. */
struct attention_views {
    struct tensor qkv, q, k, v, out, out_rows;
};

static struct tensor columns_of(struct tensor t, int64_t first, int64_t heads, int64_t head_dim)
{
    struct tensor view =
        tensor_3d((char *)t.data + (size_t)first * dtype_size(t.dtype), t.dtype, t.dim[0], heads, head_dim);
    view.stride[0] = t.stride[0];
    return view;
}

static struct attention_views attention_views(const struct model *m, const struct attention_heads *heads, int64_t n)
{
    struct attention_views a;
    enum dtype dtype = m->ops->dtype;
    int64_t d = heads->head_dim, q = heads->n_heads * d, kv = heads->n_kv_heads * d;
    a.qkv = tensor_2d(m->work, dtype, n, q + 2 * kv);
    a.q = columns_of(a.qkv, 0, heads->n_heads, d);
    a.k = columns_of(a.qkv, q, heads->n_kv_heads, d);
    a.v = columns_of(a.qkv, q + kv, heads->n_kv_heads, d);
    a.out_rows = tensor_2d(m->work + tensor_bytes(a.qkv), dtype, n, q);
    a.out = columns_of(a.out_rows, 0, heads->n_heads, d);
    return a;
}

/* h -> q, k, v with RoPE, K and V appended to the lanes. */
static int project_and_append(struct model *m, const struct decoder_layer *w, const struct attention_views *a,
                              const struct seq_batch *batch, const struct kv_view *kv)
{
    TRY(ops_linear(m->ops, a->qkv, tensor_rows(m->h, 0, a->qkv.dim[0]), w->qkv, w->qkv_bias.data));
    return ops_rope_append(m->ops, kv, &w->heads, a->q, a->k, a->v, m->position, m->inverse_frequency, 1.0f, batch);
}

/* The rest of a layer after attention; leaves the next layer's normed input in h (next_norm). */
static int finish_layer(struct model *m, const struct decoder_layer *w, const struct attention_views *a,
                        struct tensor next_norm)
{
    int64_t n = a->qkv.dim[0], f = w->n_columns;
    float eps = (float)m->dims.rms_norm_eps;
    struct tensor x = tensor_rows(m->x, 0, n), h = tensor_rows(m->h, 0, n), partial = tensor_rows(m->partial, 0, n);
    TRY(tp_row_add_norm(&m->tp, h, x, partial, a->out_rows, w->o, w->o_bias, w->counted, w->post_norm, eps));
    struct tensor gate_up = tensor_2d(m->work, m->ops->dtype, n, 2 * f);
    struct tensor middle = tensor_2d(m->work + tensor_bytes(gate_up), m->ops->dtype, n, f);
    if (f > 0) TRY(ops_linear_swiglu(m->ops, middle, gate_up, h, w->gate_up, w->gate_up_bias.data));
    return tp_row_add_norm(&m->tp, h, x, partial, middle, w->down, w->down_bias, true, next_norm, eps);
}

static struct tensor next_norm(const struct model *m, int layer)
{
    return layer + 1 < m->dims.n_layers ? m->weights.layers[layer + 1].input_norm : m->weights.norm;
}

static int first_norm(struct model *m, int n)
{
    return ops_rms_norm(m->ops, tensor_rows(m->h, 0, n), tensor_rows(m->x, 0, n), m->weights.layers[0].input_norm.data,
                        (float)m->dims.rms_norm_eps);
}

/* Head and sampling for `rows` [n, hidden] that belong to slots (device [n]). */
static int sample_rows(struct model *m, struct tensor rows, const int32_t *slot, const struct sampling_state *sampling)
{
    int64_t n = rows.dim[0];
    struct tensor logits = tensor_rows(m->logits, 0, n), local = m->logits_local, gathered = m->logits_gathered;
    if (m->tp.comm->size > 1) {
        local = tensor_rows(local, 0, n);
        gathered = tensor_rows(gathered, 0, n * m->tp.comm->size);
    }
    TRY(tp_lm_head(&m->tp, logits, local, gathered, rows, m->weights.lm_head));
    if (m->watch) m->watch(m->watch_arg, logits);
    return ops_sample(m->ops, logits, slot, sampling);
}

/* ---- prompts ---- */

/* Image features replace the embeddings of their placeholder rows. */
static int insert_images(struct model *m, const struct prefill *in)
{
    int tokens = m->dims.vision.n_image_tokens;
    if (!in->n_images) return OK;
    double start = clock_seconds();
    TRY(vision_encode(&m->vision, in->pixels, in->n_images));
    for (int i = 0; i < in->n_images; i++) {
        struct tensor rows = tensor_rows(m->x, in->image_row[i], tokens);
        TRY(ops_copy(m->ops, rows.data, vision_rows(&m->vision, i, in->n_images).data, tensor_bytes(rows)));
    }
    m->vision_seconds += clock_seconds() - start;
    return OK;
}

static bool compresses(const struct policy *policy, const struct policy_sequence *sequence)
{
    return !sequence->continues && policy_runs(policy, sequence);
}

static int rows_of(const struct prefill *in, int i) { return in->cu_seqlens[i + 1] - in->cu_seqlens[i]; }

/* The policy looks at the newest rows of each prompt that ends here; `now`: what is left of `in`. */
static int observe_layer(const struct prefill *in, const struct prefill *now, struct policy *policy, int layer,
                         struct tensor q)
{
    for (int i = 0; i < in->n_seqs; i++) {
        if (!in->ends[i] || !compresses(policy, &in->sequence[i]) || !policy->vt->prefill_layer) continue;
        int rows = policy_judging_rows(policy, &in->sequence[i]), end = now->cu_seqlens[i + 1];
        int left = rows_of(in, i) - rows_of(now, i);
        struct policy_prefill seen = {.layer = layer,
                                      .q = tensor_rows(q, end - rows, rows),
                                      .first_position = in->sequence[i].prompt_tokens - left - rows};
        TRY(policy->vt->prefill_layer(policy, &in->sequence[i], &seen));
    }
    return OK;
}

/* ---- rows that leave ----
 * What is gathered goes into room that nothing is in at the end of a layer (partial for rows, ids for positions), which
 * then changes places with what it came from, until the step is over. */

struct places {
    struct tensor x, h, partial;
    int32_t *ids, *position;
};

static struct places places_of(const struct model *m)
{
    return (struct places){m->x, m->h, m->partial, m->ids, m->position};
}

/* A captured decode step knows the places by their addresses. */
static void restore_places(struct model *m, const struct places *places)
{
    m->x = places->x, m->h = places->h, m->partial = places->partial;
    m->ids = places->ids, m->position = places->position;
}

static int gather(struct model *m, struct tensor *rows, int n, int n_left)
{
    struct tensor room = m->partial;
    TRY(ops_gather_rows(m->ops, tensor_rows(room, 0, n_left), tensor_rows(*rows, 0, n), m->row_index));
    m->partial = *rows;
    *rows = room;
    return OK;
}

static int gather_positions(struct model *m, int n, int n_left)
{
    int32_t *room = m->ids;
    TRY(ops_gather_rows(m->ops, tensor_2d(room, DTYPE_I32, n_left, 1), tensor_2d(m->position, DTYPE_I32, n, 1),
                        m->row_index));
    m->ids = m->position;
    m->position = room;
    return OK;
}

/* After a layer: lets the rows leave that the policy does without, in `now` and in the batch. */
static int narrow(struct model *m, struct policy *policy, int layer, struct prefill *now, struct seq_batch *batch)
{
    int n = now->n_tokens, seqs = now->n_seqs;
    int32_t *left = m->host_cu_seqlens;
    if (!policy->vt->narrow || layer + 1 == m->dims.n_layers) return OK;
    if (now->cu_seqlens == left) left += m->options.max_seqs + 1;
    struct policy_narrow in = {.layer = layer,
                               .n_seqs = seqs,
                               .sequence = now->sequence,
                               .ends = now->ends,
                               .cu_seqlens = now->cu_seqlens,
                               .new_cu_seqlens = left,
                               .row_index = m->row_index};
    TRY(policy->vt->narrow(policy, &in));
    if (left[seqs] == n) return OK;
    TRY(gather(m, &m->x, n, left[seqs]));
    TRY(gather(m, &m->h, n, left[seqs]));
    TRY(gather_positions(m, n, left[seqs]));
    TRY(ops_upload(m->ops, m->cu_seqlens, left, ((size_t)seqs + 1) * sizeof *left));
    now->cu_seqlens = batch->host_cu_seqlens = left;
    now->n_tokens = batch->n_tokens = left[seqs];
    return OK;
}

/* What of a slot's lanes exceeds the tokens that stay plain goes to their other part. */
static int age(struct model *m, const struct policy *policy, const struct kv_view *kv, int slot)
{
    const struct policy_config *config = &policy->config;
    m->n_recent[slot] = 0;
    return ops_kv_age(m->ops, kv, policy->env.aged, slot, config->plain_sinks, config->plain_window);
}

/* Keeps what the policy decides of one prompt's lanes; k [n_layers] out. */
static int compress(struct model *m, const struct policy_sequence *sequence, struct policy *policy,
                    const struct kv_view *kv, int *k)
{
    struct policy_keep keep;
    for (int l = 0; l < m->dims.n_layers; l++) k[l] = sequence->prompt_tokens;
    if (compresses(policy, sequence) && policy->vt->prefill_end) TRY(policy->vt->prefill_end(policy, sequence, k));
    if (compresses(policy, sequence) && policy->vt->select) {
        TRY(policy->vt->select(policy, sequence, k, &keep));
        TRY(policy_evict(policy, sequence, &keep));
    }
    struct policy *decoder = policy_decoder(policy);
    if (decoder->vt->begin_decode) TRY(decoder->vt->begin_decode(decoder, sequence));
    if (policy->env.aged) return age(m, policy, kv, sequence->slot);
    return kv->format == KV_PLAIN ? OK : ops_kv_quantise(m->ops, kv, sequence->slot);
}

/* Samples for the prompts that end in this step and compresses their lanes. */
static int end_prompts(struct model *m, const struct prefill *in, const struct kv_view *kv, struct policy *policy,
                       const struct sampling_state *sampling)
{
    int n = 0;
    for (int i = 0; i < in->n_seqs; i++) {
        if (!in->ends[i]) continue;
        m->host_slot[n] = in->slot[i];
        m->host_index[n++] = in->cu_seqlens[i + 1] - 1;
    }
    if (!n) return OK;
    TRY(ops_upload(m->ops, m->row_index, m->host_index, (size_t)n * sizeof(int32_t)));
    TRY(ops_upload(m->ops, m->slot, m->host_slot, (size_t)n * sizeof(int32_t)));
    struct tensor rows = tensor_rows(m->last, 0, n);
    TRY(ops_gather_rows(m->ops, rows, tensor_rows(m->h, 0, in->n_tokens), m->row_index));
    TRY(sample_rows(m, rows, m->slot, sampling));
    for (int i = 0; i < in->n_seqs; i++)
        if (in->ends[i])
            TRY(compress(m, &in->sequence[i], policy, kv, in->kept + (size_t)i * (size_t)m->dims.n_layers));
    return OK;
}

static int upload_prefill(struct model *m, const struct prefill *in)
{
    size_t rows = (size_t)in->n_tokens * sizeof(int32_t), seqs = (size_t)in->n_seqs * sizeof(int32_t);
    TRY(ops_upload(m->ops, m->ids, in->ids, rows));
    TRY(ops_upload(m->ops, m->position, in->position, rows));
    TRY(ops_upload(m->ops, m->slot, in->slot, seqs));
    return ops_upload(m->ops, m->cu_seqlens, in->cu_seqlens, seqs + sizeof(int32_t));
}

/* All layers over the step's rows; `now`: those that are left at the end. */
static int prefill_layers(struct model *m, const struct prefill *in, const struct kv_view *kv, struct policy *policy,
                          struct prefill *now)
{
    struct seq_batch batch = {.n_seqs = in->n_seqs,
                              .n_tokens = in->n_tokens,
                              .slot = m->slot,
                              .cu_seqlens = m->cu_seqlens,
                              .host_slot = in->slot,
                              .host_cu_seqlens = in->cu_seqlens};
    for (int l = 0; l < m->dims.n_layers; l++) {
        const struct decoder_layer *w = &m->weights.layers[l];
        struct attention_views a = attention_views(m, &w->heads, now->n_tokens);
        TRY(project_and_append(m, w, &a, &batch, kv));
        TRY(ops_attention_prefill(m->ops, a.out, a.q, a.k, a.v, &batch, kv, &w->heads));
        TRY(observe_layer(in, now, policy, l, a.q));
        TRY(finish_layer(m, w, &a, next_norm(m, l)));
        TRY(narrow(m, policy, l, now, &batch));
    }
    return OK;
}

/* Lanes that an earlier turn left in 8 bits become plain: a follow-up's rows come behind them. */
static int widen_lanes(struct model *m, const struct prefill *in, const struct kv_view *kv)
{
    for (int i = 0; i < in->n_seqs && kv->format != KV_PLAIN; i++)
        if (in->sequence[i].continues) TRY(ops_kv_widen(m->ops, kv, in->slot[i]));
    return OK;
}

int model_prefill(struct model *m, const struct prefill *in, const struct kv_view *kv, struct policy *policy,
                  const struct sampling_state *sampling)
{
    struct prefill now = *in;
    if (in->n_tokens > m->n_rows || in->n_seqs > m->options.max_seqs || in->n_images > m->options.max_images)
        FAIL(ERR_BUG, "prefill of %d tokens, %d sequences, %d images; opened for %d, %d, %d", in->n_tokens, in->n_seqs,
             in->n_images, m->n_rows, m->options.max_seqs, m->options.max_images);
    TRY(widen_lanes(m, in, kv));
    TRY(upload_prefill(m, in));
    TRY(tp_embed(&m->tp, tensor_rows(m->x, 0, in->n_tokens), &m->weights, m->ids));
    TRY(insert_images(m, in));
    TRY(first_norm(m, in->n_tokens));
    const struct places places = places_of(m);
    int rc = prefill_layers(m, in, kv, policy, &now);
    if (!rc) rc = end_prompts(m, &now, kv, policy, sampling);
    restore_places(m, &places);
    return rc;
}

/* ---- decode ---- */

struct decode_step {
    struct model *model;
    int n;
    const struct kv_view *kv;
    struct policy *policy;
    const struct sampling_state *sampling;
};

static int attend(const struct decode_step *step, int layer, const struct attention_views *a,
                  const struct seq_batch *batch)
{
    struct policy_decode in = {
        .layer = layer, .out = a->out, .q = a->q, .batch = batch, .position = step->model->position};
    struct policy *decoder = policy_decoder(step->policy);
    struct ops *ops = step->model->ops;
    const struct attention_heads *heads = &step->model->layers[layer].heads;
    const struct kv_view *aged = step->policy->env.aged;
    if (aged) return ops_attention_decode_aged(ops, a->out, a->q, batch, step->kv, aged, heads);
    if (decoder->vt->decode_attention) return decoder->vt->decode_attention(decoder, &in);
    return ops_attention_decode(ops, a->out, a->q, batch, step->kv, heads);
}

/* Everything of a decode step that runs on the device: what a graph captures. */
static int decode_body(void *arg)
{
    const struct decode_step *step = arg;
    struct model *m = step->model;
    struct seq_batch batch = {.n_seqs = step->n, .n_tokens = step->n, .slot = m->slot};
    TRY(ops_decode_inputs(m->ops, m->ids, m->position, m->slot, step->n, step->sampling));
    const struct kv_view *aged = step->policy->env.aged;
    if (aged)
        TRY(ops_decode_begin_aged(m->ops, &batch, step->kv, aged));
    else
        TRY(ops_decode_begin(m->ops, &batch, step->kv));
    TRY(tp_embed(&m->tp, tensor_rows(m->x, 0, step->n), &m->weights, m->ids));
    TRY(first_norm(m, step->n));
    for (int l = 0; l < m->dims.n_layers; l++) {
        const struct decoder_layer *w = &m->weights.layers[l];
        struct attention_views a = attention_views(m, &w->heads, step->n);
        TRY(project_and_append(m, w, &a, &batch, step->kv));
        TRY(attend(step, l, &a, &batch));
        TRY(finish_layer(m, w, &a, next_norm(m, l)));
    }
    return sample_rows(m, tensor_rows(m->h, 0, step->n), m->slot, step->sampling);
}

/* A step of `bucket` rows, of which the first n have slots and the rest are padding. */
static int decode_rows(struct model *m, const int32_t *slot, int n, int bucket, const struct kv_view *kv,
                       struct policy *policy, const struct sampling_state *sampling)
{
    for (int i = 0; i < bucket; i++) m->host_index[i] = i < n ? slot[i] : -1;
    TRY(ops_upload(m->ops, m->slot, m->host_index, (size_t)bucket * sizeof(int32_t)));
    struct decode_step step = {m, bucket, kv, policy, sampling};
    if (m->watch) return decode_body(&step); /* who watches reads results between the ops */
    return ops_run_step(m->ops, bucket, decode_body, &step);
}

static int bucket_of(const struct model *m, int n)
{
    int bucket = ops_bucket(m->ops, n);
    return bucket < m->options.max_seqs ? bucket : m->options.max_seqs;
}

int model_decode(struct model *m, const int32_t *slot, int n, const struct kv_view *kv, struct policy *policy,
                 const struct sampling_state *sampling)
{
    TRY(decode_rows(m, slot, n, bucket_of(m, n), kv, policy, sampling));
    for (int i = 0; i < n && policy->env.aged; i++)
        if (slot[i] >= 0 && ++m->n_recent[slot[i]] >= kv->page_size) TRY(age(m, policy, kv, slot[i]));
    struct policy *decoder = policy_decoder(policy);
    return decoder->vt->decode_end ? decoder->vt->decode_end(decoder, slot, n) : OK;
}

/* ---- before the first request ---- */

static bool same_shapes(const struct decoder_layer *a, const struct decoder_layer *b)
{
    return a->heads.n_heads == b->heads.n_heads && a->heads.n_kv_heads == b->heads.n_kv_heads &&
           a->counted == b->counted && a->n_columns == b->n_columns;
}

/* The matrix products of a full chunk, once a shape, on what happens to stand in the work area: a library is asked how
 * to do a shape when it first comes. No collectives: the ranks' layers need not repeat their shapes alike. */
static int warm_linears(struct model *m)
{
    const int64_t n = m->options.max_tokens;
    struct tensor h = tensor_rows(m->h, 0, n), partial = tensor_rows(m->partial, 0, n);
    for (int l = 0; l < m->dims.n_layers; l++) {
        const struct decoder_layer *w = &m->weights.layers[l];
        const int64_t f = w->n_columns;
        if (l > 0 && same_shapes(w, w - 1)) continue;
        struct attention_views a = attention_views(m, &w->heads, n);
        TRY(ops_linear(m->ops, a.qkv, h, w->qkv, NULL));
        if (w->counted && w->o.dim[1] > 0) TRY(ops_linear(m->ops, partial, a.out_rows, w->o, NULL));
        struct tensor gate_up = tensor_2d(m->work, m->ops->dtype, n, 2 * f);
        struct tensor middle = tensor_2d(m->work + tensor_bytes(gate_up), m->ops->dtype, n, f);
        if (f == 0) continue;
        TRY(ops_linear(m->ops, gate_up, h, w->gate_up, NULL));
        TRY(ops_linear(m->ops, partial, middle, w->down, NULL));
    }
    return OK;
}

int model_warm(struct model *m, const struct kv_view *kv, struct policy *policy, const struct sampling_state *sampling,
               int *n_buckets)
{
    *n_buckets = 0;
    if (!ops_graph_bytes(m->ops, m->dims.n_layers)) return OK;
    TRY(warm_linears(m));
    for (int bucket, n = 1; n <= m->options.max_seqs; n = bucket + 1) {
        bucket = bucket_of(m, n);
        for (int i = 0; i < 2; i++)
            TRY(decode_rows(m, NULL, 0, bucket, kv, policy, sampling)); /* runs, then is recorded */
        ++*n_buckets;
    }
    return ops_finish(m->ops);
}

int model_begin_sequence(struct model *m, int slot, const int32_t *ids, int n, const struct sampling_params *params,
                         const struct sampling_state *sampling)
{
    TRY(ops_upload(m->ops, m->ids, ids, (size_t)n * sizeof(int32_t)));
    return ops_sampling_begin(m->ops, sampling, slot, params, m->ids, n);
}
