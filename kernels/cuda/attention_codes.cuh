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

/* 16 codes of a row; WIDE: rows begin at multiples of 16 bytes. */
template <bool WIDE> __device__ static uint4 read_codes(const uint8_t *row, int at, int dim, bool valid)
{
    const uint2 none = make_uint2(0, 0);
    if (WIDE) return valid && at < dim ? __ldcg((const uint4 *)(row + at)) : make_uint4(0, 0, 0, 0);
    const uint2 first = valid && at < dim ? __ldcg((const uint2 *)(row + at)) : none;
    const uint2 second = valid && at + 8 < dim ? __ldcg((const uint2 *)(row + at + 8)) : none;
    return make_uint4(first.x, first.y, second.x, second.y);
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

/* Logits of 16 tokens before scaling, in two chains; -inf past the end. */
template <typename T, enum kv_format FORMAT, int HALVES, int PRODUCTS>
__device__ static void score_codes(float (*s)[4], const struct code_tile<HALVES> &x, const uint4 (*q)[HALVES][2],
                                   int n_valid)
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
            const uint32_t a0 = codes<T, FORMAT>::widen(low, 0), a1 = codes<T, FORMAT>::widen(high, 0);
            const uint32_t a2 = codes<T, FORMAT>::widen(low, 1), a3 = codes<T, FORMAT>::widen(high, 1);
#pragma unroll
            for (int p = 0; p < PRODUCTS; p++)
                mma_16816<T>(j % 2 ? other[p] : s[p], a0, a1, a2, a3, word_of(q[p][h][j / 2], j % 2 * 2),
                             word_of(q[p][h][j / 2], j % 2 * 2 + 1));
        }
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            s[p][i] = r + (i & 2) * 4 < n_valid ? (s[p][i] + other[p][i]) * x.key_scale[i / 2] : -INFINITY;
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

/* Takes the tile's values in. Of a word of each of four tokens two bytes make one product: the dimensions of its rows.
 */
template <typename T, enum kv_format FORMAT, int HALVES, int PRODUCTS>
__device__ static void take_codes(struct gathered<HALVES, PRODUCTS> *g, float (*s)[4],
                                  const struct code_tile<HALVES> &x, float scale)
{
    uint32_t weight[PRODUCTS][2];
#pragma unroll
    for (int p = 0; p < PRODUCTS; p++) {
        soften_tile<HALVES, PRODUCTS>(g, p, s[p], scale);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float by = x.value_scale[i] * weight_factor<FORMAT>();
            weight[p][i] = transpose_8x8(pack2<T>(s[p][2 * i] * by, s[p][2 * i + 1] * by));
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
            const uint32_t a0 = codes<T, FORMAT>::widen(first, 0), a1 = codes<T, FORMAT>::widen(first, 1);
            const uint32_t a2 = codes<T, FORMAT>::widen(second, 0), a3 = codes<T, FORMAT>::widen(second, 1);
#pragma unroll
            for (int p = 0; p < PRODUCTS; p++)
                mma_16816<T>(g->out[p][h][j], a0, a1, a2, a3, weight[p][0], weight[p][1]);
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
