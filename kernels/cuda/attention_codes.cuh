/* attention_codes - products of 16 tokens in an 8-bit format with a group's queries: what the kernels of decode
 * attention over such lanes and over lists of them share. Included by their .cu files only.
 *
 * Codes become 16-bit numbers in registers, exactly, and enter the same products as plain keys and values; the scale of
 * a token's key multiplies its logits, that of its value its weights. Weights times scales are rounded to 16 bits, so a
 * power of two goes with them, which brings them to the size that weights have beside plain values. */
#ifndef VITRAIL_KERNELS_CUDA_ATTENTION_CODES_CUH
#define VITRAIL_KERNELS_CUDA_ATTENTION_CODES_CUH

#include "kernels/cuda/attention_decode.cuh"
#include "kernels/cuda/quantised.cuh"

/* ---- two codes of a word (bytes 0, 1 or bytes 2, 3) as two numbers of the activations ---- */

template <typename T, enum kv_format FORMAT> struct codes;

/* x y + z on pairs of bfloat16; exact here. */
__device__ static inline uint32_t bfloat_fma(uint32_t x, uint32_t y, uint32_t z)
{
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(y), "r"(z));
    return d;
}

/* 128 + the low seven bits, less 128 or (negative) 256. */
template <> struct codes<bfloat, KV_INT8> {
    __device__ static uint32_t widen(uint32_t word, int pair)
    {
        const uint32_t x = __byte_perm(word, 0, pair ? 0x4342 : 0x4140);
        return bfloat_fma((x & 0x00800080u) | 0x43004300u, 0xbf80bf80u, (x & 0x007f007fu) | 0x43004300u);
    }
};

/* 1024 + the code as 0 .. 255, less 1152. */
template <> struct codes<__half, KV_INT8> {
    __device__ static uint32_t widen(uint32_t word, int pair)
    {
        uint32_t d;
        const uint32_t x = __byte_perm(word ^ 0x80808080u, 0x64646464u, pair ? 0x4342 : 0x4140);
        asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(x), "r"(0x64806480u));
        return d;
    }
};

/* Exponent and mantissa moved to their places below the sign: the number times 2^-120. */
template <> struct codes<bfloat, KV_FP8> {
    __device__ static uint32_t widen(uint32_t word, int pair)
    {
        const uint32_t x = __byte_perm(word, 0, pair ? 0x3424 : 0x1404);
        return bfloat_fma((x & 0x80008000u) | (x >> 4 & 0x07f007f0u), 0x7b807b80u, 0x80008000u);
    }
};

template <> struct codes<__half, KV_FP8> {
    __device__ static uint32_t widen(uint32_t word, int pair)
    {
        uint32_t d;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
        const unsigned short x = (unsigned short)(pair ? word >> 16 : word);
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(x));
#else
        const uint32_t x = __byte_perm(word, 0, pair ? 0x3424 : 0x1404); /* likewise, times 2^-8 */
        asm("mul.f16x2 %0, %1, %2;" : "=r"(d) : "r"((x & 0x80008000u) | (x >> 1 & 0x3f803f80u)), "r"(0x5c005c00u));
#endif
        return d;
    }
};

/* What weights are multiplied by beside their scale: no product leaves a float16's range. */
template <enum kv_format FORMAT> __device__ static constexpr float weight_factor(void)
{
    return FORMAT == KV_INT8 ? 64.0f : 256.0f;
}

/* ---- 16 tokens of a lane ---- */

/* Codes on their way into a warp's registers, and the scales of tokens r and r + 8. HALVES of 64 dimensions. */
template <int HALVES> struct code_tile {
    uint4 low[HALVES], high[HALVES]; /* keys of tokens r and r + 8 at dims half * 64 + t * 16 */
    uint2 v[HALVES][4];              /* values of tokens 2t, 2t + 1, 2t + 8, 2t + 9 at dims half * 64 + r * 8 */
    float key_scale[2], value_scale[2];
};

/* GLOBAL: memory of the device, each byte of which is read once; else shared memory. */
template <bool GLOBAL> __device__ static inline uint2 read_8(const uint8_t *from)
{
    return GLOBAL ? __ldcg((const uint2 *)from) : *(const uint2 *)from;
}
template <bool GLOBAL> __device__ static inline float read_scale(const float *from)
{
    return GLOBAL ? __ldcg(from) : *from;
}

/* 16 codes of a row; WIDE: rows begin at multiples of 16 bytes. */
template <bool WIDE, bool GLOBAL = true>
__device__ static uint4 read_codes(const uint8_t *row, int at, int dim, bool valid)
{
    const uint2 none = make_uint2(0, 0);
    if (WIDE) return valid && at < dim ? read_16<GLOBAL>((const char *)row + at) : make_uint4(0, 0, 0, 0);
    const uint2 first = valid && at < dim ? read_8<GLOBAL>(row + at) : none;
    const uint2 second = valid && at + 8 < dim ? read_8<GLOBAL>(row + at + 8) : none;
    return make_uint4(first.x, first.y, second.x, second.y);
}

/* The keys, then the values of a tile, its rows and scales one behind the other. FULL: all its tokens are the lane's.
 */
template <int HALVES, bool WIDE, bool FULL, bool GLOBAL>
__device__ static __forceinline__ void load_code_keys(struct code_tile<HALVES> *x, const uint8_t *keys,
                                                      const float *scale, int dim, int n_valid)
{
    const int thread = (int)threadIdx.x % 32, r = thread / 4, t = thread % 4;
    const uint8_t *low = keys + r * dim, *high = low + 8 * dim;
    const bool first = FULL || r < n_valid, second = FULL || r + 8 < n_valid;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        x->low[h] = read_codes<WIDE, GLOBAL>(low, h * 64 + t * 16, dim, first);
        x->high[h] = read_codes<WIDE, GLOBAL>(high, h * 64 + t * 16, dim, second);
    }
    x->key_scale[0] = first ? read_scale<GLOBAL>(scale + r) : 0;
    x->key_scale[1] = second ? read_scale<GLOBAL>(scale + r + 8) : 0;
}
template <int HALVES, bool FULL, bool GLOBAL>
__device__ static __forceinline__ void load_code_values(struct code_tile<HALVES> *x, const uint8_t *values,
                                                        const float *scale, int dim, int n_valid)
{
    const int thread = (int)threadIdx.x % 32, r = thread / 4, t = thread % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int token = 2 * t + (i & 1) + (i & 2) * 4;
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            const int at = h * 64 + r * 8;
            x->v[h][i] =
                (FULL || token < n_valid) && at < dim ? read_8<GLOBAL>(values + token * dim + at) : make_uint2(0, 0);
        }
    }
    x->value_scale[0] = FULL || r < n_valid ? read_scale<GLOBAL>(scale + r) : 0;
    x->value_scale[1] = FULL || r + 8 < n_valid ? read_scale<GLOBAL>(scale + r + 8) : 0;
}

/* The queries of a group: head n of a product at dims half * 64 + t * 16. */
template <typename T, int HALVES, int PRODUCTS>
__device__ static void load_code_queries(uint4 (*q)[HALVES][2], const struct decode_arguments &a, int row, int head)
{
    const int thread = (int)threadIdx.x % 32, n = thread / 4, t = thread % 4, dim = a.kv.head_dim;
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++) {
        const int in_group = p * COLUMNS + n;
        const T *from = (const T *)a.q + row * a.q_stride + (int64_t)(head * a.group + in_group) * dim;
#pragma unroll
        for (int i = 0; i < 2 * HALVES; i++) {
            const int at = i / 2 * 64 + t * 16 + i % 2 * 8;
            q[p][i / 2][i % 2] = in_group < a.group && at < dim ? *(const uint4 *)(from + at) : make_uint4(0, 0, 0, 0);
        }
    }
}

/* The softmax so far over the tile's logits: leaves weights in their place. */
template <int HALVES, int PRODUCTS>
__device__ static void soften_tile(struct gathered<HALVES, PRODUCTS> *g, int p, float *s, float scale)
{
    float best[2];
#pragma unroll
    for (int e = 0; e < 2; e++) best[e] = fmaxf(s[e], s[e + 2]);
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
        best[0] = fmaxf(best[0], __shfl_xor_sync(~0u, best[0], step));
        best[1] = fmaxf(best[1], __shfl_xor_sync(~0u, best[1], step));
    }
    best[0] = fmaxf(best[0], g->top[p][0]), best[1] = fmaxf(best[1], g->top[p][1]);
    if (__any_sync(~0u, best[0] > g->top[p][0] || best[1] > g->top[p][1]))
        shrink_gathered<HALVES>(g->out[p], g->top[p], g->sum[p], best, scale);
#pragma unroll
    for (int e = 0; e < 2; e++) {
        s[e] = power_of_2((s[e] - best[e]) * scale);
        s[e + 2] = power_of_2((s[e + 2] - best[e]) * scale);
        g->sum[p][e] += s[e] + s[e + 2];
    }
}

/* ---- products in float16, whatever the activations are: codes are exact there, at one instruction for two ---- */

/* A group's queries, as load_code_queries has them, each head's divided by a power of two that brings its largest
 * element to [1, 2); undo: these powers, of heads 2t and 2t + 1 of each product. */
template <int HALVES, int PRODUCTS> struct half_queries {
    uint4 q[PRODUCTS][HALVES][2];
    float undo[PRODUCTS][2];
};

/* The exponent of the largest of some magnitudes; that of 1 where no power of two helps. */
__device__ static inline uint32_t exponent_of(uint32_t largest)
{
    const uint32_t exponent = largest >> 23;
    return exponent == 0 || exponent > 253 ? 127 : exponent;
}
/* 2^(exponent - 127), and its inverse. */
__device__ static inline float power_at(uint32_t exponent) { return __uint_as_float(exponent << 23); }
__device__ static inline float inverse_at(uint32_t exponent) { return __uint_as_float((254 - exponent) << 23); }

template <typename T> __device__ static inline uint32_t scale_to_half(uint32_t pair, float by)
{
    const float2 x = unpack2<T>(pair);
    const __half2 y = __floats2half2_rn(x.x * by, x.y * by);
    return *(const uint32_t *)&y;
}

template <typename T, int HALVES, int PRODUCTS>
__device__ static void load_half_queries(struct half_queries<HALVES, PRODUCTS> *to, const struct decode_arguments &a,
                                         int row, int head)
{
    const int t = (int)threadIdx.x % 4;
    load_code_queries<T, HALVES, PRODUCTS>(to->q, a, row, head);
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++) {
        uint32_t largest = 0;
#pragma unroll
        for (int i = 0; i < 8 * HALVES; i++)
            largest = max(largest, largest_of(unpack2<T>(word_of(to->q[p][i / 8][i / 4 % 2], i % 4))));
        largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
        const uint32_t exponent = exponent_of(largest);
#pragma unroll
        for (int i = 0; i < 2 * HALVES; i++) {
            const uint4 x = to->q[p][i / 2][i % 2];
            const float by = inverse_at(exponent);
            to->q[p][i / 2][i % 2] = make_uint4(scale_to_half<T>(x.x, by), scale_to_half<T>(x.y, by),
                                                scale_to_half<T>(x.z, by), scale_to_half<T>(x.w, by));
        }
#pragma unroll
        for (int e = 0; e < 2; e++) to->undo[p][e] = power_at(__shfl_sync(~0u, exponent, (2 * t + e) * 4));
    }
}

/* Logits of 16 tokens before scaling, in two chains; -inf past the end. FULL: all tokens of the tile are the lane's. */
template <enum kv_format FORMAT, int HALVES, int PRODUCTS, bool FULL>
__device__ static void score_codes(float (*s)[4], const struct code_tile<HALVES> &x,
                                   const struct half_queries<HALVES, PRODUCTS> &queries, int n_valid)
{
    const int r = (int)threadIdx.x % 32 / 4;
    float other[PRODUCTS][4];
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[p][i] = other[p][i] = 0;
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t low = word_of(x.low[h], j), high = word_of(x.high[h], j);
            const uint32_t a0 = codes<__half, FORMAT>::widen(low, 0), a1 = codes<__half, FORMAT>::widen(high, 0);
            const uint32_t a2 = codes<__half, FORMAT>::widen(low, 1), a3 = codes<__half, FORMAT>::widen(high, 1);
#pragma unroll
            for (int p = 0; p < PRODUCTS; p++)
                mma_16816<__half>(j % 2 ? other[p] : s[p], a0, a1, a2, a3, word_of(queries.q[p][h][j / 2], j % 2 * 2),
                                  word_of(queries.q[p][h][j / 2], j % 2 * 2 + 1));
        }
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            s[p][i] = FULL || r + (i & 2) * 4 < n_valid
                          ? (s[p][i] + other[p][i]) * (x.key_scale[i / 2] * queries.undo[p][i & 1])
                          : -INFINITY;
}

/* What a warp has gathered of values counts in units of 2^(unit - 127), above every value's scale so far, so that
 * weights times scales fit a float16. A larger scale raises it: rare after the first tiles. */
template <int HALVES, int PRODUCTS>
__device__ static void raise_unit(struct gathered<HALVES, PRODUCTS> *g, uint32_t *unit, const float *value_scale)
{
    const uint32_t mine = max(quantise_magnitude(value_scale[0]), quantise_magnitude(value_scale[1]));
    const uint32_t wanted = min(__reduce_max_sync(~0u, mine) >> 23, 252u) + 1;
    if (wanted <= *unit) return;
    const float shrink = wanted - *unit < 127 ? power_at(127 - (wanted - *unit)) : 0;
    *unit = wanted;
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++)
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int i = 0; i < 16; i++) g->out[p][h][i / 4][i % 4] *= shrink;
}
template <int HALVES, int PRODUCTS>
__device__ static void undo_unit(struct gathered<HALVES, PRODUCTS> *g, uint32_t unit)
{
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++)
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int i = 0; i < 16; i++) g->out[p][h][i / 4][i % 4] *= power_at(unit);
}

/* Takes the tile's values in. Of a word of each of four tokens two bytes make one product: the dimensions of its rows.
 */
template <enum kv_format FORMAT, int HALVES, int PRODUCTS>
__device__ static void take_codes(struct gathered<HALVES, PRODUCTS> *g, uint32_t *unit, float (*s)[4],
                                  const struct code_tile<HALVES> &x, float scale)
{
    uint32_t weight[PRODUCTS][2];
    raise_unit<HALVES, PRODUCTS>(g, unit, x.value_scale);
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++) {
        soften_tile<HALVES, PRODUCTS>(g, p, s[p], scale);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float by = x.value_scale[i] * inverse_at(*unit);
            const __half2 pair = __floats2half2_rn(s[p][2 * i] * by, s[p][2 * i + 1] * by);
            weight[p][i] = transpose_8x8(*(const uint32_t *)&pair);
        }
    }
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t c0 = j < 2 ? x.v[h][0].x : x.v[h][0].y, c1 = j < 2 ? x.v[h][1].x : x.v[h][1].y;
            const uint32_t c2 = j < 2 ? x.v[h][2].x : x.v[h][2].y, c3 = j < 2 ? x.v[h][3].x : x.v[h][3].y;
            const uint32_t first = __byte_perm(c0, c1, j % 2 ? 0x7362 : 0x5140);
            const uint32_t second = __byte_perm(c2, c3, j % 2 ? 0x7362 : 0x5140);
            const uint32_t a0 = codes<__half, FORMAT>::widen(first, 0), a1 = codes<__half, FORMAT>::widen(first, 1);
            const uint32_t a2 = codes<__half, FORMAT>::widen(second, 0), a3 = codes<__half, FORMAT>::widen(second, 1);
#pragma unroll
            for (int p = 0; p < PRODUCTS; p++)
                mma_16816<__half>(g->out[p][h][j], a0, a1, a2, a3, weight[p][0], weight[p][1]);
        }
}

template <enum kv_format FORMAT, int HALVES, int PRODUCTS>
__device__ static void undo_weight_factor(struct gathered<HALVES, PRODUCTS> *g)
{
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++)
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int i = 0; i < 16; i++) g->out[p][h][i / 4][i % 4] *= 1 / weight_factor<FORMAT>();
}

/* Blocks that a multiprocessor's registers have room for. */
__host__ __device__ static constexpr int resident_blocks(int halves, int products)
{
    return products == 2 ? 2 : halves == 2 ? 3 : 4;
}

#endif
