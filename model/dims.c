/* dims - what both sources share: the last checks, the hash, and the frequencies that the rope fields mean. */
#include "model/dims.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "model/dims_internal.h"

bool model_dims_is_gguf(const char *model_path)
{
    size_t n = strlen(model_path);
    return n >= 5 && !strcmp(model_path + n - 5, ".gguf");
}

int model_dims_load(const char *model_path, struct model_dims *out)
{
    memset(out, 0, sizeof *out);
    out->bos_token_id = out->pad_token_id = -1;
    return model_dims_is_gguf(model_path) ? dims__load_gguf(model_path, out) : dims__load_config(model_path, out);
}

int dims__check(const struct model_dims *d, const char *what)
{
    if (d->n_heads % d->n_kv_heads)
        FAIL(ERR_FORMAT, "%s: %d attention heads are no multiple of %d key-value heads", what, d->n_heads,
             d->n_kv_heads);
    if (d->head_dim % 2) FAIL(ERR_FORMAT, "%s: head_dim is %d; rotary embedding needs an even one", what, d->head_dim);
    return OK;
}

int dims__add_eos(struct model_dims *d, const char *what, int64_t id)
{
    if (id < 0 || id >= d->vocab_size)
        FAIL(ERR_FORMAT, "%s: eos_token_id %" PRId64 " is no token of a vocabulary of %d", what, id, d->vocab_size);
    for (int i = 0; i < d->n_eos_ids; i++) {
        if (d->eos_ids[i] == id) return OK;
    }
    if (d->n_eos_ids == MODEL_MAX_EOS_IDS)
        FAIL(ERR_UNSUPPORTED, "%s: more than %d different eos_token_id", what, MODEL_MAX_EOS_IDS);
    d->eos_ids[d->n_eos_ids++] = (int)id;
    return OK;
}

/* 64-bit FNV-1a over the bytes of each field: never over a struct, whose padding is undefined. */
static void mix(uint64_t *hash, const void *bytes, size_t n)
{
    const uint8_t *b = bytes;
    for (size_t i = 0; i < n; i++) *hash = (*hash ^ b[i]) * 0x100000001b3u;
}
#define MIX(field) mix(&hash, &(field), sizeof(field))

static uint64_t mix_vision(uint64_t hash, const struct vision_dims *v)
{
    MIX(v->image_size), MIX(v->patch_size), MIX(v->n_patches), MIX(v->hidden_size), MIX(v->intermediate_size);
    MIX(v->n_layers), MIX(v->n_heads), MIX(v->head_dim), MIX(v->hidden_act), MIX(v->layer_norm_eps);
    MIX(v->n_run_layers), MIX(v->select_full), MIX(v->n_image_tokens), MIX(v->image_token_id);
    MIX(v->image_seq_length), MIX(v->projector_act), MIX(v->projector_bias);
    return hash;
}

static uint64_t mix_sampling(uint64_t hash, const struct sampling_defaults *s)
{
    MIX(s->has_do_sample), MIX(s->has_temperature), MIX(s->has_top_k), MIX(s->has_top_p), MIX(s->has_max_new_tokens);
    MIX(s->has_repetition_penalty), MIX(s->do_sample), MIX(s->temperature), MIX(s->top_p);
    MIX(s->repetition_penalty), MIX(s->top_k), MIX(s->max_new_tokens);
    return hash;
}

uint64_t model_dims_hash(const struct model_dims *d)
{
    uint64_t hash = 0xcbf29ce484222325u;
    mix(&hash, d->architecture, strnlen(d->architecture, sizeof d->architecture));
    MIX(d->family), MIX(d->dtype), MIX(d->vocab_size), MIX(d->hidden_size), MIX(d->intermediate_size);
    MIX(d->n_layers), MIX(d->n_heads), MIX(d->n_kv_heads), MIX(d->head_dim), MIX(d->max_position_embeddings);
    MIX(d->rms_norm_eps), MIX(d->qkv_bias), MIX(d->o_bias), MIX(d->mlp_bias), MIX(d->tie_word_embeddings);
    MIX(d->bos_token_id), MIX(d->pad_token_id), MIX(d->n_eos_ids), MIX(d->eos_ids);
    MIX(d->rope.theta), MIX(d->rope.scaling), MIX(d->rope.factor), MIX(d->rope.low_freq_factor);
    MIX(d->rope.high_freq_factor), MIX(d->rope.original_max_position), MIX(d->rope.table);
    return mix_sampling(mix_vision(hash, &d->vision), &d->sampling);
}

/* Frequencies whose wavelength is short stay, long ones are divided by `factor`, those between are interpolated. */
static float llama3_frequency(const struct rope_dims *r, float frequency)
{
    const double pi = 3.14159265358979323846;
    float original = (float)r->original_max_position, low = (float)r->low_freq_factor,
          high = (float)r->high_freq_factor;
    float wavelength = (float)(2 * pi) / frequency;
    if (wavelength < original / high) return frequency;
    if (wavelength > original / low) return frequency / (float)r->factor;
    float smooth = (original / wavelength - low) / (high - low);
    return (1 - smooth) * frequency / (float)r->factor + smooth * frequency;
}

void model_dims_rope_frequencies(const struct model_dims *d, float *out)
{
    const struct rope_dims *r = &d->rope;
    for (int i = 0; i < d->head_dim / 2; i++) {
        float exponent = (float)(2 * i) / (float)d->head_dim;
        float frequency = 1.0f / (float)pow((double)(float)r->theta, (double)exponent);
        if (r->scaling == ROPE_SCALING_LINEAR) frequency /= (float)r->factor;
        if (r->scaling == ROPE_SCALING_LLAMA3) frequency = llama3_frequency(r, frequency);
        if (r->scaling == ROPE_SCALING_TABLE) frequency /= r->table[i];
        out[i] = frequency;
    }
}
