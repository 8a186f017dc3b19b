/* dims_gguf - the llama architecture's hyperparameters from the metadata and the tensor list of a GGUF file. Only what
 * the metadata leaves open is read off the tensors: vocabulary size, biases, a tied head, the rope divisors. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/file.h"
#include "model/dims_internal.h"
#include "model/gguf.h"
#include "model/gguf_llama.h"
#include "model/gguf_vocab.h"

/* A key that must be there. */
static int need_int(const struct gguf *g, const char *key, int max, int *out)
{
    int64_t v = 0;
    if (!gguf_has(g, key)) FAIL(ERR_FORMAT, "%s: %s is missing", gguf_path(g), key);
    TRY(gguf_int(g, key, 1, max, &v));
    *out = (int)v;
    return OK;
}

static int read_heads(const struct gguf *g, struct model_dims *out)
{
    int64_t n_kv_heads, head_dim, value_dim, rope_dim;
    TRY(need_int(g, "llama.attention.head_count", DIMS_MAX_HEADS, &out->n_heads));
    n_kv_heads = out->n_heads;
    head_dim = out->hidden_size / out->n_heads;
    TRY(gguf_int(g, "llama.attention.head_count_kv", 1, DIMS_MAX_HEADS, &n_kv_heads));
    TRY(gguf_int(g, "llama.attention.key_length", 1, MODEL_MAX_HEAD_DIM, &head_dim));
    value_dim = rope_dim = head_dim;
    TRY(gguf_int(g, "llama.attention.value_length", 1, MODEL_MAX_HEAD_DIM, &value_dim));
    TRY(gguf_int(g, "llama.rope.dimension_count", 1, INT32_MAX, &rope_dim));
    if (head_dim < 1 || head_dim > MODEL_MAX_HEAD_DIM)
        FAIL(ERR_FORMAT, "%s: llama.embedding_length %d over %d heads gives no head size between 1 and %d",
             gguf_path(g), out->hidden_size, out->n_heads, MODEL_MAX_HEAD_DIM);
    if (value_dim != head_dim || rope_dim != head_dim)
        FAIL(ERR_UNSUPPORTED,
             "%s: heads of %" PRId64 " keys, %" PRId64 " values and %" PRId64
             " rotary dimensions; only equal sizes are served",
             gguf_path(g), head_dim, value_dim, rope_dim);
    out->n_kv_heads = (int)n_kv_heads;
    out->head_dim = (int)head_dim;
    return OK;
}

/* rope_freqs.weight: a divisor for each frequency, with which converters write llama-3 scaling. */
static int read_rope_table(const struct gguf *g, int fd, const struct model_dims *d, struct rope_dims *rope)
{
    const struct gguf_tensor *t = gguf_find(g, "rope_freqs.weight");
    int n = d->head_dim / 2;
    if (!t) return OK;
    if (t->type != STORAGE_F32 || t->n_dims != 1 || t->dim[0] != n)
        FAIL(ERR_FORMAT,
             "%s: tensor rope_freqs.weight must be F32 [%d], found %s with %d dimensions, the first %" PRId64,
             gguf_path(g), n, t->type_name, t->n_dims, t->dim[0]);
    if (rope->scaling != ROPE_SCALING_NONE)
        FAIL(ERR_UNSUPPORTED, "%s: both llama.rope.scaling and rope_freqs.weight", gguf_path(g));
    TRY(file_pread(fd, gguf_path(g), rope->table, (size_t)n * sizeof *rope->table, t->offset));
    for (int i = 0; i < n; i++) {
        if (!isfinite(rope->table[i]) || rope->table[i] <= 0)
            FAIL(ERR_FORMAT, "%s: tensor rope_freqs.weight holds %g; divisors must be positive", gguf_path(g),
                 (double)rope->table[i]);
    }
    rope->scaling = ROPE_SCALING_TABLE;
    return OK;
}

static int read_rope(const struct gguf *g, int fd, struct model_dims *out)
{
    struct rope_dims *rope = &out->rope;
    struct gguf_string type = {"none", 4};
    bool old = gguf_has(g, "llama.rope.scale_linear");
    double factor = 1;
    rope->theta = 10000;
    TRY(gguf_double(g, "llama.rope.freq_base", 1, 1e15, &rope->theta));
    TRY(gguf_string(g, "llama.rope.scaling.type", &type));
    TRY(gguf_double(g, "llama.rope.scale_linear", 1, 1e6, &factor)); /* before scaling.* existed */
    TRY(gguf_double(g, "llama.rope.scaling.factor", 0, 1e6, &factor));
    bool is_linear = gguf_string_is(type, "linear") || (old && !gguf_has(g, "llama.rope.scaling.type"));
    if (!is_linear && !gguf_string_is(type, "none"))
        FAIL(ERR_UNSUPPORTED, "%s: llama.rope.scaling.type \"%.*s\"; none and linear are served", gguf_path(g),
             type.size < 40 ? (int)type.size : 40, type.text);
    if (is_linear && factor < 1)
        FAIL(ERR_FORMAT, "%s: llama.rope.scaling.factor is %g; at least 1 is expected", gguf_path(g), factor);
    if (is_linear && factor > 1) {
        rope->scaling = ROPE_SCALING_LINEAR;
        rope->factor = factor;
    }
    return read_rope_table(g, fd, out, rope);
}

static int read_tokens(const struct gguf *g, struct model_dims *out)
{
    static const char *const eos_keys[] = {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                                           "tokenizer.ggml.eom_token_id"};
    const struct gguf_tensor *embedding = gguf_find(g, "token_embd.weight");
    struct gguf_array tokens;
    if (!embedding || embedding->n_dims != 2 || embedding->dim[0] < 1 || embedding->dim[0] > DIMS_MAX_VOCAB)
        FAIL(ERR_FORMAT, "%s: tensor token_embd.weight is missing or has no shape [1 to %d, hidden]", gguf_path(g),
             DIMS_MAX_VOCAB);
    int64_t n = embedding->dim[0], stated = n;
    TRY(gguf_int(g, "llama.vocab_size", 1, DIMS_MAX_VOCAB, &stated));
    TRY(gguf_array(g, "tokenizer.ggml.tokens", GGUF_STRING, GGUF_STRING, &tokens));
    if (stated != n || tokens.n > n)
        FAIL(ERR_FORMAT,
             "%s: token_embd.weight has %" PRId64 " rows, but llama.vocab_size is %" PRId64
             " and tokenizer.ggml.tokens has %" PRId64,
             gguf_path(g), n, stated, tokens.n);
    out->vocab_size = (int)n;
    TRY(gguf_vocab_special_id(g, "tokenizer.ggml.bos_token_id", n, &out->bos_token_id));
    TRY(gguf_vocab_special_id(g, "tokenizer.ggml.padding_token_id", n, &out->pad_token_id));
    for (int i = 0; i < 3; i++) {
        int id;
        TRY(gguf_vocab_special_id(g, eos_keys[i], n, &id));
        if (id >= 0) TRY(dims__add_eos(out, gguf_path(g), id));
    }
    return OK;
}

static int read_dims(const struct gguf *g, int fd, struct model_dims *out)
{
    TRY(gguf_llama_check(g));
    TRY(need_int(g, "llama.block_count", DIMS_MAX_LAYERS, &out->n_layers));
    TRY(need_int(g, "llama.context_length", DIMS_MAX_POSITION, &out->max_position_embeddings));
    TRY(need_int(g, "llama.embedding_length", DIMS_MAX_HIDDEN, &out->hidden_size));
    TRY(need_int(g, "llama.feed_forward_length", DIMS_MAX_INTERMEDIATE, &out->intermediate_size));
    TRY(read_heads(g, out));
    if (!gguf_has(g, "llama.attention.layer_norm_rms_epsilon"))
        FAIL(ERR_FORMAT, "%s: llama.attention.layer_norm_rms_epsilon is missing", gguf_path(g));
    TRY(gguf_double(g, "llama.attention.layer_norm_rms_epsilon", 0, 1, &out->rms_norm_eps));
    TRY(read_tokens(g, out));
    TRY(read_rope(g, fd, out));
    const struct gguf_tensor *typical = gguf_find(g, "blk.0.attn_output.weight");
    out->family = MODEL_LLAMA;
    out->dtype = typical ? dequant_natural_dtype(typical->type) : DTYPE_F16;
    snprintf(out->architecture, sizeof out->architecture, "llama (GGUF)");
    out->qkv_bias = gguf_find(g, "blk.0.attn_q.bias") != NULL;
    out->o_bias = gguf_find(g, "blk.0.attn_output.bias") != NULL;
    out->mlp_bias = gguf_find(g, "blk.0.ffn_gate.bias") != NULL;
    out->tie_word_embeddings = gguf_find(g, "output.weight") == NULL;
    return dims__check(out, gguf_path(g));
}

int dims__load_gguf(const char *path, struct model_dims *out)
{
    struct gguf *g = NULL;
    int fd = -1;
    uint64_t size = 0;
    TRY(file_open_read(path, &fd, &size));
    int rc = gguf_read(fd, path, size, &g);
    if (!rc) rc = read_dims(g, fd, out);
    gguf_close(g);
    close(fd);
    return rc;
}
