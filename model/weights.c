#include "model/weights.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"

enum { NAME_BYTES = 112, BOUNCE_BYTES = 8 << 20, MAX_PIECES = 3 };

/* Rows and columns of one checkpoint tensor. */
struct piece {
    char name[NAME_BYTES];
    int64_t rows, cols; /* whole shape, as checkpoint.h sees it */
    int64_t row_first, row_count, col_first, col_count;
};

enum parameter_kind { MATRIX, EMBEDDING, NORM, BIAS };

/* One destination, made of 1 to 3 pieces placed below each other. */
struct parameter {
    enum parameter_kind kind;
    struct tensor *into;
    const char *label; /* row of the memory plan */
    int n_pieces;
    struct piece piece[MAX_PIECES];
};

struct weights_table {
    struct model_dims dims;
    struct parameter *parameter;
    int n, capacity;
};

/* ---- the table ---- */

static struct parameter *add_parameter(struct weights_table *t, enum parameter_kind kind, struct tensor *into,
                                       const char *label)
{
    struct parameter *p = &t->parameter[t->n++];
    *p = (struct parameter){.kind = kind, .into = into, .label = label};
    return p;
}

PRINTF_LIKE(4, 5)
static struct piece *add_piece(struct parameter *p, int64_t rows, int64_t cols, const char *format, ...)
{
    struct piece *piece = &p->piece[p->n_pieces++];
    *piece = (struct piece){.rows = rows, .cols = cols, .row_count = rows, .col_count = cols};
    va_list args;
    va_start(args, format);
    vsnprintf(piece->name, sizeof piece->name, format, args);
    va_end(args);
    return piece;
}

static void take_rows(struct piece *piece, int64_t first, int64_t count)
{
    piece->row_first = first;
    piece->row_count = count;
}

static void take_columns(struct piece *piece, int64_t first, int64_t count)
{
    piece->col_first = first;
    piece->col_count = count;
}

static const char decoder_label[] = "decoder weights";
static const char vision_label[] = "vision weights";

static void add_attention(struct weights_table *t, struct decoder_layer *layer, int l, struct shard_heads kv)
{
    const struct model_dims *d = &t->dims;
    int64_t hd = d->head_dim, group = d->n_heads / d->n_kv_heads, hidden = d->hidden_size;
    static const char *const names[3] = {"q_proj", "k_proj", "v_proj"};
    int64_t whole[3] = {d->n_heads * hd, d->n_kv_heads * hd, d->n_kv_heads * hd};
    int64_t first[3] = {kv.kv_first * group * hd, kv.kv_first * hd, kv.kv_first * hd};
    int64_t count[3] = {kv.kv_count * group * hd, kv.kv_count * hd, kv.kv_count * hd};
    struct parameter *p = add_parameter(t, MATRIX, &layer->qkv, decoder_label);
    for (int i = 0; i < 3; i++)
        take_rows(add_piece(p, whole[i], hidden, "model.layers.%d.self_attn.%s.weight", l, names[i]), first[i],
                  count[i]);
    if (d->qkv_bias) {
        p = add_parameter(t, BIAS, &layer->qkv_bias, decoder_label);
        for (int i = 0; i < 3; i++)
            take_rows(add_piece(p, whole[i], 1, "model.layers.%d.self_attn.%s.bias", l, names[i]), first[i], count[i]);
    }
    p = add_parameter(t, MATRIX, &layer->o, decoder_label);
    take_columns(add_piece(p, hidden, whole[0], "model.layers.%d.self_attn.o_proj.weight", l), first[0], count[0]);
    if (d->o_bias)
        add_piece(add_parameter(t, BIAS, &layer->o_bias, decoder_label), hidden, 1,
                  "model.layers.%d.self_attn.o_proj.bias", l);
}

static void add_mlp(struct weights_table *t, struct decoder_layer *layer, int l, struct shard_range columns)
{
    const struct model_dims *d = &t->dims;
    int64_t hidden = d->hidden_size, f = d->intermediate_size;
    struct parameter *p = add_parameter(t, MATRIX, &layer->gate_up, decoder_label);
    take_rows(add_piece(p, f, hidden, "model.layers.%d.mlp.gate_proj.weight", l), columns.first, columns.count);
    take_rows(add_piece(p, f, hidden, "model.layers.%d.mlp.up_proj.weight", l), columns.first, columns.count);
    p = add_parameter(t, MATRIX, &layer->down, decoder_label);
    take_columns(add_piece(p, hidden, f, "model.layers.%d.mlp.down_proj.weight", l), columns.first, columns.count);
    if (!d->mlp_bias) return;
    p = add_parameter(t, BIAS, &layer->gate_up_bias, decoder_label);
    take_rows(add_piece(p, f, 1, "model.layers.%d.mlp.gate_proj.bias", l), columns.first, columns.count);
    take_rows(add_piece(p, f, 1, "model.layers.%d.mlp.up_proj.bias", l), columns.first, columns.count);
    add_piece(add_parameter(t, BIAS, &layer->down_bias, decoder_label), hidden, 1, "model.layers.%d.mlp.down_proj.bias",
              l);
}

static void add_decoder(struct weights_table *t, struct weights *w, int tp_size, int rank)
{
    const struct model_dims *d = &t->dims;
    struct shard_range columns = shard_range(d->intermediate_size, shard_mlp_unit(d->intermediate_size), tp_size, rank);
    w->vocab = shard_range(d->vocab_size, 1, tp_size, rank);
    take_rows(add_piece(add_parameter(t, MATRIX, &w->embed, decoder_label), d->vocab_size, d->hidden_size,
                        "model.embed_tokens.weight"),
              w->vocab.first, w->vocab.count);
    for (int l = 0; l < d->n_layers; l++) {
        struct decoder_layer *layer = &w->layers[l];
        struct shard_heads kv = shard_kv_heads(d->n_kv_heads, tp_size, rank, l);
        layer->heads = (struct attention_heads){.n_heads = kv.kv_count * (d->n_heads / d->n_kv_heads),
                                                .n_kv_heads = kv.kv_count,
                                                .head_dim = d->head_dim,
                                                .lane = w->lanes,
                                                .scale = 1.0f / sqrtf((float)d->head_dim)};
        layer->first_kv_head = kv.kv_first;
        layer->counted = kv.counted;
        layer->n_columns = (int)columns.count;
        w->lanes += kv.kv_count;
        add_piece(add_parameter(t, NORM, &layer->input_norm, decoder_label), d->hidden_size, 1,
                  "model.layers.%d.input_layernorm.weight", l);
        add_attention(t, layer, l, kv);
        add_piece(add_parameter(t, NORM, &layer->post_norm, decoder_label), d->hidden_size, 1,
                  "model.layers.%d.post_attention_layernorm.weight", l);
        add_mlp(t, layer, l, columns);
    }
    add_piece(add_parameter(t, NORM, &w->norm, decoder_label), d->hidden_size, 1, "model.norm.weight");
    if (!d->tie_word_embeddings)
        take_rows(add_piece(add_parameter(t, MATRIX, &w->lm_head, decoder_label), d->vocab_size, d->hidden_size,
                            "lm_head.weight"),
                  w->vocab.first, w->vocab.count);
}

/* A weight and its bias of the vision side. */
static void add_pair(struct weights_table *t, enum parameter_kind kind, struct tensor *weight, struct tensor *bias,
                     int64_t rows, int64_t cols, const char *stem)
{
    add_piece(add_parameter(t, kind, weight, vision_label), rows, cols, "%s.weight", stem);
    if (bias) add_piece(add_parameter(t, BIAS, bias, vision_label), rows, 1, "%s.bias", stem);
}

#define TOWER "vision_tower.vision_model."

static void add_vision_layer(struct weights_table *t, struct vision_layer *layer, int l)
{
    const struct vision_dims *v = &t->dims.vision;
    int64_t h = v->hidden_size, f = v->intermediate_size;
    char stem[NAME_BYTES];
    static const char *const names[3] = {"q_proj", "k_proj", "v_proj"};
    snprintf(stem, sizeof stem, TOWER "encoder.layers.%d.layer_norm1", l);
    add_pair(t, NORM, &layer->norm1, &layer->norm1_bias, h, 1, stem);
    struct parameter *p = add_parameter(t, MATRIX, &layer->qkv, vision_label);
    for (int i = 0; i < 3; i++) add_piece(p, h, h, TOWER "encoder.layers.%d.self_attn.%s.weight", l, names[i]);
    p = add_parameter(t, BIAS, &layer->qkv_bias, vision_label);
    for (int i = 0; i < 3; i++) add_piece(p, h, 1, TOWER "encoder.layers.%d.self_attn.%s.bias", l, names[i]);
    snprintf(stem, sizeof stem, TOWER "encoder.layers.%d.self_attn.out_proj", l);
    add_pair(t, MATRIX, &layer->out, &layer->out_bias, h, h, stem);
    snprintf(stem, sizeof stem, TOWER "encoder.layers.%d.layer_norm2", l);
    add_pair(t, NORM, &layer->norm2, &layer->norm2_bias, h, 1, stem);
    snprintf(stem, sizeof stem, TOWER "encoder.layers.%d.mlp.fc1", l);
    add_pair(t, MATRIX, &layer->fc1, &layer->fc1_bias, f, h, stem);
    snprintf(stem, sizeof stem, TOWER "encoder.layers.%d.mlp.fc2", l);
    add_pair(t, MATRIX, &layer->fc2, &layer->fc2_bias, h, f, stem);
}

static void add_vision(struct weights_table *t, struct weights *w)
{
    const struct model_dims *d = &t->dims;
    const struct vision_dims *v = &d->vision;
    int64_t h = v->hidden_size;
    add_piece(add_parameter(t, EMBEDDING, &w->class_embedding, vision_label), h, 1, TOWER "embeddings.class_embedding");
    add_pair(t, MATRIX, &w->patch_embedding, NULL, h, 3 * (int64_t)v->patch_size * v->patch_size,
             TOWER "embeddings.patch_embedding");
    add_pair(t, EMBEDDING, &w->position_embedding, NULL, v->n_patches + 1, h, TOWER "embeddings.position_embedding");
    add_pair(t, NORM, &w->pre_norm, &w->pre_norm_bias, h, 1, TOWER "pre_layrnorm");
    for (int l = 0; l < w->n_vision_layers; l++) add_vision_layer(t, &w->vision_layers[l], l);
    add_pair(t, MATRIX, &w->linear_1, v->projector_bias ? &w->linear_1_bias : NULL, d->hidden_size, h,
             "multi_modal_projector.linear_1");
    add_pair(t, MATRIX, &w->linear_2, v->projector_bias ? &w->linear_2_bias : NULL, d->hidden_size, d->hidden_size,
             "multi_modal_projector.linear_2");
}

int weights_open(const struct model_dims *dims, int tp_size, int rank, struct weights *w)
{
    memset(w, 0, sizeof *w);
    w->n_layers = dims->n_layers;
    w->n_vision_layers = dims->family == MODEL_LLAVA ? dims->vision.n_run_layers : 0;
    w->layers = calloc((size_t)w->n_layers, sizeof *w->layers);
    w->vision_layers = calloc((size_t)w->n_vision_layers + 1, sizeof *w->vision_layers);
    w->table = calloc(1, sizeof *w->table);
    if (!w->layers || !w->vision_layers || !w->table) FAIL(ERR_NOMEM, "weights: out of memory");
    struct weights_table *t = w->table;
    t->dims = *dims;
    t->capacity = 3 + 10 * w->n_layers + 16 + 12 * w->n_vision_layers;
    t->parameter = calloc((size_t)t->capacity, sizeof *t->parameter);
    if (!t->parameter) FAIL(ERR_NOMEM, "weights: out of memory");
    add_decoder(t, w, tp_size, rank);
    if (dims->family == MODEL_LLAVA) add_vision(t, w);
    if (t->n > t->capacity) FAIL(ERR_BUG, "weights: %d parameters in a table of %d", t->n, t->capacity);
    return OK;
}

void weights_close(struct weights *w)
{
    if (w->table) free(w->table->parameter);
    free(w->table);
    free(w->layers);
    free(w->vision_layers);
    memset(w, 0, sizeof *w);
}

/* ---- against a checkpoint ---- */

/* Collects problems into one message; counts what no longer fits. */
struct problems {
    char text[3500];
    size_t used;
    int n, left_out;
};

PRINTF_LIKE(2, 3)
static void add_problem(struct problems *p, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    size_t room = sizeof p->text - p->used;
    int n = vsnprintf(p->text + p->used, room, format, args);
    va_end(args);
    p->n++;
    if (n > 0 && (size_t)n < room) {
        p->used += (size_t)n;
    } else {
        p->text[p->used] = 0;
        p->left_out++;
    }
}

static void check_piece(const struct piece *piece, const struct checkpoint *c, struct problems *problems)
{
    struct checkpoint_tensor info;
    if (!checkpoint_find(c, piece->name, &info)) {
        add_problem(problems, "\n  missing: %s", piece->name);
    } else if (info.rows != piece->rows || info.cols != piece->cols) {
        add_problem(problems, "\n  %s has shape [%" PRId64 ", %" PRId64 "], expected [%" PRId64 ", %" PRId64 "]",
                    info.stored_name, info.rows, info.cols, piece->rows, piece->cols);
    } else if (!info.readable) {
        add_problem(problems, "\n  %s is stored as %s, which is not served", info.stored_name, info.type_name);
    }
}

/* Tensors that a table does not read and yet belong: vision layers above the feature layer, a tied head. */
static bool is_expected(const struct weights_table *t, const char *name)
{
    static const char layers[] = TOWER "encoder.layers.";
    if (checkpoint_name_is_ignored(name)) return true;
    if (!strcmp(name, "lm_head.weight")) return t->dims.tie_word_embeddings;
    if (strncmp(name, layers, strlen(layers)) != 0) return false;
    return strtol(name + strlen(layers), NULL, 10) < t->dims.vision.n_layers;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static int check_unexpected(const struct weights_table *t, const struct checkpoint *c, struct problems *problems)
{
    const char **known = malloc((size_t)t->n * MAX_PIECES * sizeof *known);
    size_t n = 0;
    if (!known) FAIL(ERR_NOMEM, "weights: out of memory");
    for (int i = 0; i < t->n; i++)
        for (int j = 0; j < t->parameter[i].n_pieces; j++) known[n++] = t->parameter[i].piece[j].name;
    qsort(known, n, sizeof *known, compare_names);
    for (int i = 0; i < checkpoint_count(c); i++) {
        const char *name = checkpoint_name(c, i);
        if (!bsearch(&name, known, n, sizeof *known, compare_names) && !is_expected(t, name))
            add_problem(problems, "\n  unexpected: %s", name);
    }
    free(known);
    return OK;
}

int weights_check(const struct weights *w, const struct checkpoint *c)
{
    const struct weights_table *t = w->table;
    struct problems problems = {.n = 0};
    for (int i = 0; i < t->n; i++)
        for (int j = 0; j < t->parameter[i].n_pieces; j++) check_piece(&t->parameter[i].piece[j], c, &problems);
    TRY(check_unexpected(t, c, &problems));
    if (!problems.n) return OK;
    if (problems.left_out)
        FAIL(ERR_FORMAT, "%d tensors do not fit the configuration:%s\n  and %d more", problems.n, problems.text,
             problems.left_out);
    FAIL(ERR_FORMAT, "%d tensor%s not fit the configuration:%s", problems.n, problems.n == 1 ? " does" : "s do",
         problems.text);
}

/* ---- placing ---- */

static int64_t parameter_rows(const struct parameter *p)
{
    int64_t rows = 0;
    for (int i = 0; i < p->n_pieces; i++) rows += p->piece[i].row_count;
    return rows;
}

/* The dtype of a matrix: what was asked for, else what all its pieces have in the file, else float32. */
static int matrix_dtype(const struct weights_table *t, const struct parameter *p, const struct checkpoint *c,
                        enum dtype wanted, enum dtype *out)
{
    *out = wanted != DTYPE_N ? wanted : t->dims.dtype;
    if (wanted != DTYPE_N || !c) return OK;
    for (int i = 0; i < p->n_pieces; i++) {
        enum dtype natural;
        TRY(checkpoint_natural_dtype(c, p->piece[i].name, &natural));
        if (i == 0)
            *out = natural;
        else if (natural != *out)
            *out = DTYPE_F32;
    }
    return OK;
}

int weights_place(struct weights *w, struct arena *arena, const struct checkpoint *checkpoint, enum dtype dtype,
                  enum dtype activation)
{
    struct weights_table *t = w->table;
    for (int i = 0; i < t->n; i++) {
        struct parameter *p = &t->parameter[i];
        int64_t rows = parameter_rows(p), cols = p->piece[0].col_count;
        struct tensor shape;
        if (p->kind == MATRIX) {
            enum dtype of_matrix;
            TRY(matrix_dtype(t, p, checkpoint, dtype, &of_matrix));
            shape = tensor_2d(NULL, of_matrix, rows, cols);
        } else if (p->kind == EMBEDDING) {
            /* The class embedding is a vector in the file and a row here. */
            shape = cols == 1 ? tensor_2d(NULL, activation, 1, rows) : tensor_2d(NULL, activation, rows, cols);
        } else {
            shape = tensor_1d(NULL, DTYPE_F32, rows);
        }
        TRY(arena_tensor(arena, shape, p->label, p->into));
    }
    if (t->dims.tie_word_embeddings) w->lm_head = w->embed;
    return OK;
}

int64_t weights_layer_elements(const struct weights *w)
{
    int64_t n = 0;
    for (int l = 0; l < w->n_layers; l++) {
        const struct decoder_layer *layer = &w->layers[l];
        n += tensor_count(layer->qkv) + tensor_count(layer->o) + tensor_count(layer->gate_up) +
             tensor_count(layer->down);
    }
    return n;
}

size_t weights_step_bytes(const struct weights *w)
{
    size_t n = tensor_bytes(w->lm_head);
    for (int l = 0; l < w->n_layers; l++) {
        const struct decoder_layer *layer = &w->layers[l];
        n += tensor_bytes(layer->qkv) + tensor_bytes(layer->o) + tensor_bytes(layer->gate_up) +
             tensor_bytes(layer->down);
    }
    return n;
}

/* ---- loading ---- */

struct load {
    struct ops *ops;
    struct checkpoint *checkpoint;
    const struct load_progress *progress;
    void *bounce;
    size_t done, total;
};

static size_t piece_bytes(const struct piece *piece, enum dtype dtype)
{
    return (size_t)(piece->row_count * piece->col_count) * dtype_size(dtype);
}

static void report(struct load *load, size_t more)
{
    load->done += more;
    if (load->progress) load->progress->report(load->progress->arg, load->done, load->total);
}

static int load_piece(struct load *load, const struct piece *piece, enum dtype dtype, char *to)
{
    size_t row_bytes = (size_t)piece->col_count * dtype_size(dtype);
    if (!row_bytes || !piece->row_count) return OK;
    int64_t at_once = row_bytes > BOUNCE_BYTES ? 1 : (int64_t)(BOUNCE_BYTES / row_bytes);
    for (int64_t row = 0; row < piece->row_count; row += at_once) {
        int64_t n = piece->row_count - row < at_once ? piece->row_count - row : at_once;
        TRY(checkpoint_read(load->checkpoint, piece->name, piece->row_first + row, n, piece->col_first,
                            piece->col_count, dtype, load->bounce));
        TRY(ops_upload(load->ops, to + (size_t)row * row_bytes, load->bounce, (size_t)n * row_bytes));
        report(load, (size_t)n * row_bytes);
    }
    return OK;
}

static size_t total_bytes(const struct weights_table *t, size_t *longest_row)
{
    size_t total = 0;
    for (int i = 0; i < t->n; i++) {
        const struct parameter *p = &t->parameter[i];
        for (int j = 0; j < p->n_pieces; j++) {
            size_t row = (size_t)p->piece[j].col_count * dtype_size(p->into->dtype);
            total += piece_bytes(&p->piece[j], p->into->dtype);
            if (row > *longest_row) *longest_row = row;
        }
    }
    return total;
}

int weights_load(struct weights *w, struct ops *ops, struct checkpoint *checkpoint,
                 const struct load_progress *progress)
{
    const struct weights_table *t = w->table;
    struct load load = {.ops = ops, .checkpoint = checkpoint, .progress = progress};
    size_t longest_row = 0;
    load.total = total_bytes(t, &longest_row);
    load.bounce = malloc(longest_row > BOUNCE_BYTES ? longest_row : BOUNCE_BYTES);
    if (!load.bounce) FAIL(ERR_NOMEM, "weights: no memory for the bounce buffer");
    int rc = OK;
    for (int i = 0; i < t->n && !rc; i++) {
        const struct parameter *p = &t->parameter[i];
        char *to = p->into->data;
        for (int j = 0; j < p->n_pieces && !rc; j++) {
            rc = load_piece(&load, &p->piece[j], p->into->dtype, to);
            to += piece_bytes(&p->piece[j], p->into->dtype);
        }
    }
    if (!rc) rc = ops_finish(ops); /* before the bounce buffer goes */
    free(load.bounce);
    return rc;
}

static int fill_vector(struct ops *ops, const struct parameter *p)
{
    size_t n = (size_t)tensor_count(*p->into);
    if (p->kind == BIAS) return ops_zero(ops, p->into->data, n * sizeof(float));
    float *ones = malloc((n + 1) * sizeof *ones);
    if (!ones) FAIL(ERR_NOMEM, "weights: out of memory");
    for (size_t i = 0; i < n; i++) ones[i] = 1.0f;
    int rc = ops_upload(ops, p->into->data, ones, n * sizeof *ones);
    if (!rc) rc = ops_finish(ops);
    free(ones);
    return rc;
}

int weights_fill(struct weights *w, struct ops *ops, uint64_t seed, const struct load_progress *progress)
{
    const struct weights_table *t = w->table;
    struct load load = {.ops = ops, .progress = progress};
    size_t longest_row = 0;
    load.total = total_bytes(t, &longest_row);
    for (int i = 0; i < t->n; i++) {
        const struct parameter *p = &t->parameter[i];
        struct tensor rest = *p->into;
        if (p->kind == NORM || p->kind == BIAS) {
            TRY(fill_vector(ops, p));
            continue;
        }
        for (int j = 0; j < p->n_pieces; j++) {
            const struct piece *piece = &p->piece[j];
            int64_t rows = rest.n_dims == 2 && piece->cols == 1 ? 1 : piece->row_count;
            struct tensor part = tensor_rows(rest, 0, rows);
            if (tensor_count(part))
                TRY(ops_fill_normal(ops, part, hash_mix(seed, hash_bytes(piece->name, strlen(piece->name))), 0.02f,
                                    piece->row_first, piece->col_first, piece->cols == 1 ? piece->rows : piece->cols));
            rest = tensor_rows(rest, rows, rest.dim[0] - rows);
            report(&load, tensor_bytes(part));
        }
    }
    return OK;
}
