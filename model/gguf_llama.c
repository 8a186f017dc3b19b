/* gguf_llama - the two tables of names, and the permutation of rotary pairs. */
#include "model/gguf_llama.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

struct name_row {
    const char *gguf, *hugging_face;
};
static const struct name_row globals[] = {
    {"token_embd", "model.embed_tokens"}, {"output_norm", "model.norm"}, {"output", "lm_head"}};
static const struct name_row layers[] = {
    {"attn_norm", "input_layernorm"}, {"attn_q", "self_attn.q_proj"},      {"attn_k", "self_attn.k_proj"},
    {"attn_v", "self_attn.v_proj"},   {"attn_output", "self_attn.o_proj"}, {"ffn_norm", "post_attention_layernorm"},
    {"ffn_gate", "mlp.gate_proj"},    {"ffn_up", "mlp.up_proj"},           {"ffn_down", "mlp.down_proj"}};

int gguf_llama_check(const struct gguf *g)
{
    struct gguf_string architecture = {"", 0};
    int64_t n_experts = 0;
    TRY(gguf_string(g, "general.architecture", &architecture));
    if (!gguf_string_is(architecture, "llama"))
        FAIL(ERR_UNSUPPORTED, "%s: general.architecture is \"%.*s\"; GGUF files of \"llama\" are served", gguf_path(g),
             architecture.size < 100 ? (int)architecture.size : 100, architecture.text);
    TRY(gguf_int(g, "llama.expert_count", 0, INT32_MAX, &n_experts));
    if (n_experts > 0)
        FAIL(ERR_UNSUPPORTED, "%s: llama.expert_count is %" PRId64 "; mixtures of experts are not served", gguf_path(g),
             n_experts);
    return OK;
}

/* The table's row whose GGUF name is name[0..size). */
static const char *look_up(const struct name_row *rows, size_t n, const char *name, size_t size)
{
    for (size_t i = 0; i < n; i++) {
        if (strlen(rows[i].gguf) == size && !memcmp(rows[i].gguf, name, size)) return rows[i].hugging_face;
    }
    return NULL;
}

/* Splits "blk.12.attn_q.weight" into layer 12 (digits), "attn_q" and ".weight"; false if it is not of this form. */
static bool split_layer(const char *name, int *layer_size, const char **part, size_t *part_size, const char **suffix)
{
    if (strncmp(name, "blk.", 4)) return false;
    size_t digits = strspn(name + 4, "0123456789");
    if (digits == 0 || digits > 6 || name[4 + digits] != '.') return false;
    *layer_size = (int)digits;
    *part = name + 4 + digits + 1;
    *suffix = strchr(*part, '.');
    if (!*suffix) return false;
    *part_size = (size_t)(*suffix - *part);
    return true;
}

void gguf_llama_name(const char *name, char out[GGUF_LLAMA_MAX_NAME])
{
    const char *part, *suffix = strchr(name, '.'), *found = NULL;
    size_t part_size;
    int layer_size;
    if (split_layer(name, &layer_size, &part, &part_size, &suffix)) {
        found = look_up(layers, sizeof layers / sizeof *layers, part, part_size);
        if (found) snprintf(out, GGUF_LLAMA_MAX_NAME, "model.layers.%.*s.%s%s", layer_size, name + 4, found, suffix);
    } else if (suffix) {
        found = look_up(globals, sizeof globals / sizeof *globals, name, (size_t)(suffix - name));
        if (found) snprintf(out, GGUF_LLAMA_MAX_NAME, "%s%s", found, suffix);
    }
    if (!found) snprintf(out, GGUF_LLAMA_MAX_NAME, "%s", name);
}

int gguf_llama_permuted_heads(const struct gguf *g, const struct gguf_tensor *t, int *n_heads)
{
    const char *part, *suffix;
    size_t part_size;
    int layer_size;
    *n_heads = 0;
    if (!split_layer(t->name, &layer_size, &part, &part_size, &suffix)) return OK;
    bool is_q = part_size == 6 && !memcmp(part, "attn_q", 6), is_k = part_size == 6 && !memcmp(part, "attn_k", 6);
    if (!is_q && !is_k) return OK;
    int64_t heads = 0;
    TRY(gguf_int(g, "llama.attention.head_count", 1, 65536, &heads));
    if (heads == 0) FAIL(ERR_FORMAT, "%s: llama.attention.head_count is missing", gguf_path(g));
    if (is_k) TRY(gguf_int(g, "llama.attention.head_count_kv", 1, 65536, &heads));
    if (t->dim[0] % (2 * heads))
        FAIL(ERR_FORMAT, "%s: tensor %.200s: %" PRId64 " rows are not %" PRId64 " heads of an even size", gguf_path(g),
             t->name, t->dim[0], heads);
    *n_heads = (int)heads;
    return OK;
}

int64_t gguf_llama_row(int64_t row, int64_t head_dim)
{
    int64_t in_head = row % head_dim;
    return row - in_head + in_head % 2 * (head_dim / 2) + in_head / 2;
}
