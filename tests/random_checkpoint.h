/* random_checkpoint - a model directory of SmolLM2-135M's shape with seeded random weights in bfloat16, for comparing
 * backends where the real file is not at hand. tests/tools/make_golden_bf16_error.py makes the same numbers and keeps
 * what transformers answers with them ("smollm2_shape" of tests/data/golden/bf16_error.json).
 *
 * Norms are about 1, matrices keep their input's size, so that every layer counts and attention is neither even nor on
 * one token. 270 MB in P_tmpdir for as long as it is open; what goes wrong ends the program. */
#ifndef VITRAIL_TESTS_RANDOM_CHECKPOINT_H
#define VITRAIL_TESTS_RANDOM_CHECKPOINT_H

#include <unistd.h>

#include "base/hash.h"
#include "tests/engine_fixture.h"

enum { RANDOM_SEED = 2, RANDOM_PROMPT = 64, RANDOM_LAYERS = 30, RANDOM_TENSORS = 2 + 9 * RANDOM_LAYERS };
enum { RANDOM_HIDDEN = 576, RANDOM_KV = 192, RANDOM_MIDDLE = 1536, RANDOM_VOCAB = 49152 };

static const char random_config[] =
    "{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", \"torch_dtype\": \"bfloat16\","
    " \"vocab_size\": 49152, \"hidden_size\": 576, \"intermediate_size\": 1536, \"num_hidden_layers\": 30,"
    " \"num_attention_heads\": 9, \"num_key_value_heads\": 3, \"head_dim\": 64, \"hidden_act\": \"silu\","
    " \"max_position_embeddings\": 8192, \"rms_norm_eps\": 1e-05, \"rope_theta\": 100000.0,"
    " \"tie_word_embeddings\": true, \"bos_token_id\": 1, \"eos_token_id\": 2, \"pad_token_id\": 2}\n";

struct random_tensor {
    char name[64];
    int64_t rows, cols; /* cols 0: the weight of a norm */
};

struct random_checkpoint {
    char directory[64];
};

static inline FILE *random_file(const struct random_checkpoint *c, const char *name)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", c->directory, name);
    FILE *f = fopen(path, "wb");
    vectors_demand(f != NULL, path);
    return f;
}

/* The tensors of the model in the order of the file. */
static inline void random_tensors(struct random_tensor *t)
{
    static const struct random_tensor layer[9] = {
        {"self_attn.q_proj", RANDOM_HIDDEN, RANDOM_HIDDEN}, {"self_attn.k_proj", RANDOM_KV, RANDOM_HIDDEN},
        {"self_attn.v_proj", RANDOM_KV, RANDOM_HIDDEN},     {"self_attn.o_proj", RANDOM_HIDDEN, RANDOM_HIDDEN},
        {"mlp.gate_proj", RANDOM_MIDDLE, RANDOM_HIDDEN},    {"mlp.up_proj", RANDOM_MIDDLE, RANDOM_HIDDEN},
        {"mlp.down_proj", RANDOM_HIDDEN, RANDOM_MIDDLE},    {"input_layernorm", RANDOM_HIDDEN, 0},
        {"post_attention_layernorm", RANDOM_HIDDEN, 0}};
    *t++ = (struct random_tensor){"model.embed_tokens.weight", RANDOM_VOCAB, RANDOM_HIDDEN};
    for (int l = 0; l < RANDOM_LAYERS; l++)
        for (int i = 0; i < 9; i++, t++) {
            *t = layer[i];
            snprintf(t->name, sizeof t->name, "model.layers.%d.%.32s.weight", l, layer[i].name);
        }
    *t = (struct random_tensor){"model.norm.weight", RANDOM_HIDDEN, 0};
}

static inline void random_header(FILE *f, const struct random_tensor *t)
{
    char *text = take(RANDOM_TENSORS * 200);
    size_t n = 0;
    int64_t at = 0;
    for (int i = 0; i < RANDOM_TENSORS; i++) {
        char shape[48];
        int64_t bytes = 2 * t[i].rows * (t[i].cols ? t[i].cols : 1);
        snprintf(shape, sizeof shape, t[i].cols ? "%lld, %lld" : "%lld", (long long)t[i].rows, (long long)t[i].cols);
        n += (size_t)snprintf(text + n, 200,
                              "%s\"%s\": {\"dtype\": \"BF16\", \"shape\": [%s], \"data_offsets\": [%lld, %lld]}",
                              i ? ", " : "{", t[i].name, shape, (long long)at, (long long)(at + bytes));
        at += bytes;
    }
    text[n++] = '}';
    while (n % 8) text[n++] = ' ';
    for (int i = 0; i < 8; i++) putc((int)((uint64_t)n >> (8 * i) & 255), f);
    vectors_demand(fwrite(text, 1, n, f) == n, "random checkpoint");
    free(text);
}

/* One tensor's numbers, from its name. */
static inline void random_values(FILE *f, struct ops *ops, const struct random_tensor *t)
{
    const int64_t cols = t->cols ? t->cols : 1, count = t->rows * cols;
    const uint64_t key = hash_mix(RANDOM_SEED, hash_bytes(t->name, strlen(t->name)));
    const double scale = !t->cols ? 0.2 : strstr(t->name, "embed") ? 0.3 : 1.2 / sqrt((double)cols);
    float *noise = take((size_t)count * sizeof *noise);
    uint16_t *value = take((size_t)count * sizeof *value);
    DEMAND(ops_fill_normal(ops, tensor_2d(noise, DTYPE_F32, t->rows, cols), key, (float)scale, 0, 0, cols));
    for (int64_t i = 0; i < count; i++) value[i] = float_to_bfloat(noise[i] + (t->cols ? 0.0f : 1.0f));
    vectors_demand(fwrite(value, sizeof *value, (size_t)count, f) == (size_t)count, "no room for a random checkpoint");
    free(noise);
    free(value);
}

static inline struct random_checkpoint random_checkpoint_open(void)
{
    struct random_checkpoint c;
    struct random_tensor *t = take(RANDOM_TENSORS * sizeof *t);
    struct ops ops;
    snprintf(c.directory, sizeof c.directory, "%s/vitrail-test-XXXXXX", P_tmpdir);
    vectors_demand(mkdtemp(c.directory) != NULL, c.directory);
    FILE *f = random_file(&c, "config.json");
    vectors_demand(fputs(random_config, f) >= 0 && !fclose(f), "random checkpoint");
    f = random_file(&c, "model.safetensors");
    DEMAND(ops_open(&ops, "cpu", 0, 1));
    random_tensors(t);
    random_header(f, t);
    for (int i = 0; i < RANDOM_TENSORS; i++) random_values(f, &ops, &t[i]);
    ops_close(&ops);
    vectors_demand(!fclose(f), "no room for a random checkpoint");
    free(t);
    return c;
}

static inline void random_checkpoint_close(const struct random_checkpoint *c)
{
    static const char *const names[] = {"config.json", "model.safetensors"};
    char path[128];
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", c->directory, names[i]);
        unlink(path);
    }
    rmdir(c->directory);
}

#endif
