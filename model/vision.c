#include "model/vision.h"

#include <math.h>
#include <stdlib.h>

static const char label[] = "vision activations";

/* Images on the rank that has most. */
static int share_of(const struct vision *v, int n_images)
{
    int ranks = v->tp->comm->size;
    return (n_images + ranks - 1) / ranks;
}

int vision_place(struct vision *v, struct arena *arena, enum dtype dtype)
{
    const struct vision_dims *d = &v->dims->vision;
    int64_t n = d->n_patches + 1, h = d->hidden_size, text = v->dims->hidden_size;
    int64_t share = share_of(v, v->max_images), widest = d->intermediate_size > text ? d->intermediate_size : text;
    TRY(arena_take(arena, (size_t)d->image_size * (size_t)d->image_size * 3, label, &v->pixels));
    TRY(arena_tensor(arena, tensor_2d(NULL, dtype, d->n_patches, 3 * (int64_t)d->patch_size * d->patch_size), label,
                     &v->patches));
    TRY(arena_tensor(arena, tensor_2d(NULL, dtype, n, h), label, &v->x));
    TRY(arena_tensor(arena, tensor_2d(NULL, dtype, n, h), label, &v->h));
    TRY(arena_tensor(arena, tensor_2d(NULL, dtype, n, 3 * h), label, &v->qkv));
    TRY(arena_tensor(arena, tensor_2d(NULL, dtype, n, h), label, &v->attention));
    TRY(arena_tensor(arena, tensor_2d(NULL, dtype, n, widest), label, &v->mlp));
    TRY(arena_take(arena, (size_t)n * sizeof *v->row_index, label, &v->row_index));
    int64_t rows = share * d->n_image_tokens;
    TRY(arena_tensor(arena, tensor_2d(NULL, dtype, rows, text), label, &v->mine));
    if (v->tp->comm->size == 1) {
        v->gathered = v->mine;
        return OK;
    }
    return arena_tensor(arena, tensor_2d(NULL, dtype, rows * v->tp->comm->size, text), label, &v->gathered);
}

int vision_begin(struct vision *v)
{
    int n = v->dims->vision.n_patches + 1;
    int32_t *rows = malloc((size_t)n * sizeof *rows);
    if (!rows) FAIL(ERR_NOMEM, "vision: out of memory");
    for (int i = 0; i < n - 1; i++) rows[i] = i + 1; /* patch i stands behind the class token */
    rows[n - 1] = 0;
    int rc = ops_upload(v->tp->ops, v->row_index, rows, (size_t)n * sizeof *rows);
    if (!rc) rc = ops_finish(v->tp->ops);
    free(rows);
    return rc;
}

/* x = pre_norm(embeddings of class token and patches + positions). */
static int embed_image(struct vision *v, const uint8_t *pixels)
{
    const struct vision_dims *d = &v->dims->vision;
    const struct weights *w = v->weights;
    struct ops *o = v->tp->ops;
    float eps = (float)d->layer_norm_eps;
    TRY(ops_upload(o, v->pixels, pixels, (size_t)d->image_size * (size_t)d->image_size * 3));
    TRY(ops_image_patches(o, v->patches, v->pixels, 1, d->image_size, d->patch_size, v->scale, v->shift));
    TRY(ops_linear(o, tensor_rows(v->h, 0, d->n_patches), v->patches, w->patch_embedding, NULL));
    TRY(ops_scatter_rows(o, v->x, v->row_index, tensor_rows(v->h, 0, d->n_patches)));
    TRY(ops_scatter_rows(o, v->x, v->row_index + d->n_patches, w->class_embedding));
    TRY(ops_add(o, v->x, w->position_embedding));
    return ops_layer_norm(o, v->x, v->x, w->pre_norm.data, w->pre_norm_bias.data, eps);
}

static struct tensor heads_of(const struct vision *v, int part)
{
    const struct vision_dims *d = &v->dims->vision;
    struct tensor t = tensor_3d(v->qkv.data, v->qkv.dtype, v->qkv.dim[0], d->n_heads, d->head_dim);
    t.stride[0] = v->qkv.stride[0];
    t.data = (char *)t.data + (size_t)part * (size_t)d->hidden_size * dtype_size(t.dtype);
    return t;
}

static int run_layer(struct vision *v, const struct vision_layer *w)
{
    const struct vision_dims *d = &v->dims->vision;
    struct ops *o = v->tp->ops;
    float eps = (float)d->layer_norm_eps;
    struct tensor out = tensor_3d(v->attention.data, v->attention.dtype, v->x.dim[0], d->n_heads, d->head_dim);
    struct tensor mlp = tensor_2d(v->mlp.data, v->mlp.dtype, v->x.dim[0], d->intermediate_size);
    TRY(ops_layer_norm(o, v->h, v->x, w->norm1.data, w->norm1_bias.data, eps));
    TRY(ops_linear(o, v->qkv, v->h, w->qkv, w->qkv_bias.data));
    TRY(ops_attention_vision(o, out, heads_of(v, 0), heads_of(v, 1), heads_of(v, 2), 1,
                             1.0f / sqrtf((float)d->head_dim)));
    TRY(ops_linear(o, v->h, v->attention, w->out, w->out_bias.data));
    TRY(ops_add(o, v->x, v->h));
    TRY(ops_layer_norm(o, v->h, v->x, w->norm2.data, w->norm2_bias.data, eps));
    TRY(ops_linear(o, mlp, v->h, w->fc1, w->fc1_bias.data));
    TRY(ops_activate(o, mlp, d->hidden_act));
    TRY(ops_linear(o, v->h, mlp, w->fc2, w->fc2_bias.data));
    return ops_add(o, v->x, v->h);
}

/* The projector: selected rows of x to `out` [n_image_tokens, hidden]. */
static int project(struct vision *v, struct tensor out)
{
    const struct vision_dims *d = &v->dims->vision;
    struct ops *o = v->tp->ops;
    struct tensor selected = tensor_rows(v->x, d->select_full ? 0 : 1, d->n_image_tokens);
    struct tensor middle = tensor_2d(v->mlp.data, v->mlp.dtype, d->n_image_tokens, v->dims->hidden_size);
    TRY(ops_linear(o, middle, selected, v->weights->linear_1, v->weights->linear_1_bias.data));
    TRY(ops_activate(o, middle, d->projector_act));
    return ops_linear(o, out, middle, v->weights->linear_2, v->weights->linear_2_bias.data);
}

int vision_encode(struct vision *v, const uint8_t *pixels, int n)
{
    const struct vision_dims *d = &v->dims->vision;
    struct comm *comm = v->tp->comm;
    size_t image_bytes = (size_t)d->image_size * (size_t)d->image_size * 3;
    for (int i = 0; i < n; i++) {
        if (shard_image(i, comm->size) != comm->rank) continue;
        TRY(embed_image(v, pixels + (size_t)i * image_bytes));
        for (int l = 0; l < v->weights->n_vision_layers; l++) TRY(run_layer(v, &v->weights->vision_layers[l]));
        TRY(project(v, tensor_rows(v->mine, (int64_t)(i / comm->size) * d->n_image_tokens, d->n_image_tokens)));
    }
    if (comm->size == 1) return OK;
    int64_t rows = (int64_t)share_of(v, n) * d->n_image_tokens;
    return tp_gather_features(v->tp, tensor_rows(v->gathered, 0, rows * comm->size), tensor_rows(v->mine, 0, rows));
}

struct tensor vision_rows(const struct vision *v, int image, int n)
{
    int ranks = v->tp->comm->size, tokens = v->dims->vision.n_image_tokens;
    int64_t place = (int64_t)shard_image(image, ranks) * share_of(v, n) + image / ranks;
    return tensor_rows(v->gathered, place * tokens, tokens);
}
