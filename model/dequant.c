/* dequant - block layouts, as the GGUF format defines them. All integers are little-endian, as is every host we serve.
 *
 * Scales d and minima m are F16. In the 32-element types the low nibbles of the 16 bytes are elements 0 to 15, the high
 * ones 16 to 31; the K types hold 256 elements in sub-blocks of 32 (Q4_K, Q5_K: 6-bit scale and minimum each) or of
 * 16 (Q6_K: 8-bit scale each). */
#include "model/dequant.h"

#include <math.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "checkpoint files are little-endian, and so must the host be");

/* One block at `in` to its elements. */
typedef void dequant_block(const uint8_t *in, float *out);

static uint16_t read_u16(const uint8_t *in) { return (uint16_t)(in[0] | in[1] << 8); }
static float read_half(const uint8_t *in) { return half_to_float(read_u16(in)); }
static uint32_t read_u32(const uint8_t *in)
{
    return in[0] | (uint32_t)in[1] << 8 | (uint32_t)in[2] << 16 | (uint32_t)in[3] << 24;
}

static void block_f32(const uint8_t *in, float *out) { memcpy(out, in, 4); }
static void block_f16(const uint8_t *in, float *out) { *out = read_half(in); }
static void block_bf16(const uint8_t *in, float *out) { *out = bfloat_to_float(read_u16(in)); }

static void block_q8_0(const uint8_t *in, float *out)
{
    float d = read_half(in);
    for (int i = 0; i < 32; i++) out[i] = d * (float)(int8_t)in[2 + i];
}

static void block_q4_0(const uint8_t *in, float *out)
{
    float d = read_half(in);
    for (int i = 0; i < 16; i++) {
        out[i] = d * (float)((in[2 + i] & 15) - 8);
        out[i + 16] = d * (float)((in[2 + i] >> 4) - 8);
    }
}

static void block_q4_1(const uint8_t *in, float *out)
{
    float d = read_half(in), m = read_half(in + 2);
    for (int i = 0; i < 16; i++) {
        out[i] = d * (float)(in[4 + i] & 15) + m;
        out[i + 16] = d * (float)(in[4 + i] >> 4) + m;
    }
}

static void block_q5_0(const uint8_t *in, float *out)
{
    float d = read_half(in);
    uint32_t high = read_u32(in + 2);
    for (int i = 0; i < 16; i++) {
        int low_q = (in[6 + i] & 15) | (int)(high >> i & 1) << 4;
        int high_q = in[6 + i] >> 4 | (int)(high >> (i + 16) & 1) << 4;
        out[i] = d * (float)(low_q - 16);
        out[i + 16] = d * (float)(high_q - 16);
    }
}

static void block_q5_1(const uint8_t *in, float *out)
{
    float d = read_half(in), m = read_half(in + 2);
    uint32_t high = read_u32(in + 4);
    for (int i = 0; i < 16; i++) {
        int low_q = (in[8 + i] & 15) | (int)(high >> i & 1) << 4;
        int high_q = in[8 + i] >> 4 | (int)(high >> (i + 16) & 1) << 4;
        out[i] = d * (float)low_q + m;
        out[i + 16] = d * (float)high_q + m;
    }
}

/* The 12 bytes of 8 six-bit scales and 8 six-bit minima: bytes 0-3 and 4-7 hold scales and minima 0-3 in their low six
 * bits; bytes 8-11 hold the low nibbles of scales (low) and minima (high) 4-7, whose top two bits are those of 0-7. */
static void k_scales(const uint8_t *in, float scale[8], float minimum[8])
{
    for (int i = 0; i < 4; i++) {
        scale[i] = (float)(in[i] & 63);
        minimum[i] = (float)(in[i + 4] & 63);
        scale[i + 4] = (float)((in[i + 8] & 15) | (in[i] >> 6) << 4);
        minimum[i + 4] = (float)(in[i + 8] >> 4 | (in[i + 4] >> 6) << 4);
    }
}

static void block_q4_k(const uint8_t *in, float *out)
{
    float d = read_half(in), m = read_half(in + 2), scale[8], minimum[8];
    const uint8_t *quants = in + 16;
    k_scales(in + 4, scale, minimum);
    for (int sub = 0; sub < 8; sub++) {
        float d_sub = d * scale[sub], m_sub = m * minimum[sub];
        int shift = sub % 2 * 4;
        for (int i = 0; i < 32; i++) {
            int q = quants[sub / 2 * 32 + i] >> shift & 15;
            out[sub * 32 + i] = d_sub * (float)q - m_sub;
        }
    }
}

static void block_q5_k(const uint8_t *in, float *out)
{
    float d = read_half(in), m = read_half(in + 2), scale[8], minimum[8];
    const uint8_t *high = in + 16, *quants = in + 48;
    k_scales(in + 4, scale, minimum);
    for (int sub = 0; sub < 8; sub++) {
        float d_sub = d * scale[sub], m_sub = m * minimum[sub];
        int shift = sub % 2 * 4;
        for (int i = 0; i < 32; i++) {
            int q = (quants[sub / 2 * 32 + i] >> shift & 15) | (high[i] >> sub & 1) << 4;
            out[sub * 32 + i] = d_sub * (float)q - m_sub;
        }
    }
}

/* Each half of 128 elements has 64 bytes of low nibbles and 32 bytes of high bit pairs. */
static void block_q6_k(const uint8_t *in, float *out)
{
    const uint8_t *scales = in + 192;
    float d = read_half(in + 208);
    for (int part = 0; part < 8; part++) {
        const uint8_t *low = in + part / 4 * 64 + part % 2 * 32, *high = in + 128 + part / 4 * 32;
        int low_shift = part % 4 / 2 * 4, high_shift = part % 4 * 2;
        for (int i = 0; i < 32; i++) {
            int q = (low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4;
            float d_sub = d * (float)(int8_t)scales[part * 2 + i / 16];
            out[part * 32 + i] = d_sub * (float)(q - 32);
        }
    }
}

static const struct layout {
    int size, bytes;
    dequant_block *decode;
} layouts[STORAGE_N] = {
    [STORAGE_F32] = {1, 4, block_f32},       [STORAGE_F16] = {1, 2, block_f16},
    [STORAGE_BF16] = {1, 2, block_bf16},     [STORAGE_Q8_0] = {32, 34, block_q8_0},
    [STORAGE_Q4_0] = {32, 18, block_q4_0},   [STORAGE_Q4_1] = {32, 20, block_q4_1},
    [STORAGE_Q5_0] = {32, 22, block_q5_0},   [STORAGE_Q5_1] = {32, 24, block_q5_1},
    [STORAGE_Q4_K] = {256, 144, block_q4_k}, [STORAGE_Q5_K] = {256, 176, block_q5_k},
    [STORAGE_Q6_K] = {256, 210, block_q6_k}, [STORAGE_OTHER] = {0, 0, NULL},
};

int dequant_block_size(enum storage_type type) { return layouts[type].size; }
int dequant_block_bytes(enum storage_type type) { return layouts[type].bytes; }

enum dtype dequant_natural_dtype(enum storage_type type)
{
    if (type == STORAGE_F32) return DTYPE_F32;
    return type == STORAGE_BF16 ? DTYPE_BF16 : DTYPE_F16;
}

bool dequant_is_dtype(enum storage_type type, enum dtype dtype)
{
    return type <= STORAGE_BF16 && dequant_natural_dtype(type) == dtype;
}

/* The unquantised types, without a call for each element. */
static void floats(enum storage_type type, const uint8_t *in, int64_t n, float *out)
{
    if (type == STORAGE_F32) {
        memcpy(out, in, (size_t)n * 4);
    } else if (type == STORAGE_F16) {
        for (int64_t i = 0; i < n; i++) out[i] = read_half(in + 2 * i);
    } else {
        for (int64_t i = 0; i < n; i++) out[i] = bfloat_to_float(read_u16(in + 2 * i));
    }
}

void dequant_to_float(enum storage_type type, const void *blocks, int64_t first, int64_t n, float *out)
{
    const struct layout *l = &layouts[type];
    if (type <= STORAGE_BF16) {
        floats(type, (const uint8_t *)blocks + first * l->bytes, n, out);
        return;
    }
    while (n > 0) {
        float whole[DEQUANT_MAX_BLOCK];
        const uint8_t *in = (const uint8_t *)blocks + first / l->size * l->bytes;
        int64_t skip = first % l->size;
        int64_t take = l->size - skip < n ? l->size - skip : n;
        if (take == l->size) {
            l->decode(in, out);
        } else {
            l->decode(in, whole);
            memcpy(out, whole + skip, (size_t)take * sizeof *out);
        }
        first += take;
        n -= take;
        out += take;
    }
}

/* float_to_half and float_to_bfloat of base, bit for bit, without branches and calls: the compiler makes vectors of it,
 * and a large model is billions of these. */
static uint32_t bits_of(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static void to_half(const float *restrict in, int64_t n, uint16_t *restrict out)
{
    /* Signed, since SSE2 compares nothing else; without the sign bit it is the same. */
    const int32_t least_normal = 0x38800000, overflow = 0x477ff000, infinity = 0x7f800000;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = bits_of(in[i]);
        int32_t x = (int32_t)(bits & 0x7fffffffu);
        int32_t normal = (int32_t)((bits & 0x7fffffffu) + 0xfffu + (bits >> 13 & 1) - (112u << 23)) >> 13;
        /* The addition rounds a subnormal at its last place. */
        int32_t subnormal = (int32_t)bits_of(fabsf(in[i]) + 0.5f) - 0x3f000000;
        int32_t is_subnormal = -(x < least_normal), is_large = -(x >= overflow), is_nan = -(x > infinity);
        int32_t half = (subnormal & is_subnormal) | (normal & ~is_subnormal);
        half = (half & ~is_large) | (0x7c00 & is_large) | (0x0200 & is_nan);
        out[i] = (uint16_t)((uint32_t)half | (bits >> 16 & 0x8000u));
    }
}

static void to_bfloat(const float *in, int64_t n, uint16_t *out)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t x = bits_of(in[i]);
        uint32_t rounded = (x + 0x7fffu + (x >> 16 & 1)) >> 16, nan = x >> 16 | 0x40u;
        out[i] = (uint16_t)((x & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
    }
}

void dequant_convert(enum storage_type type, const void *blocks, int64_t first, int64_t n, enum dtype dtype, void *out)
{
    if (dequant_is_dtype(type, dtype)) {
        size_t bytes = dtype_size(dtype);
        memcpy(out, (const uint8_t *)blocks + (size_t)first * bytes, (size_t)n * bytes);
        return;
    }
    if (dtype == DTYPE_F32) {
        dequant_to_float(type, blocks, first, n, out);
        return;
    }
    uint16_t *to = out;
    while (n > 0) {
        float wide[DEQUANT_MAX_BLOCK];
        int64_t take = n < DEQUANT_MAX_BLOCK ? n : DEQUANT_MAX_BLOCK;
        dequant_to_float(type, blocks, first, take, wide);
        if (dtype == DTYPE_F16)
            to_half(wide, take, to);
        else
            to_bfloat(wide, take, to);
        first += take;
        n -= take;
        to += take;
    }
}
