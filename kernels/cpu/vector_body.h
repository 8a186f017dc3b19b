/* vector_body - the source of all tables of vector.h. A file that includes it has set the instruction set and
 * VECTOR_TABLE, and VECTOR_WIDTH (floats in a register: 16, 8 or 4). No header guard: it is included once a file.
 *
 * Explicit vectors stand only where the compiler would do worse: products with weights, and attention of one query.
 * Everything else is a loop that it vectorises; reductions say so to it, since strict IEEE order forbids it else. */
#include <math.h>
#include <string.h>

#include "kernels/cpu/vector.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#if VECTOR_WIDTH == 16
typedef __m512 vec;
INLINE vec vec_load(const float *x) { return _mm512_loadu_ps(x); }
INLINE void vec_store(float *y, vec a) { _mm512_storeu_ps(y, a); }
INLINE vec vec_zero(void) { return _mm512_setzero_ps(); }
INLINE vec vec_set(float x) { return _mm512_set1_ps(x); }
INLINE vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec vec_half(const uint16_t *x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)x)); }
INLINE vec vec_brain(const uint16_t *x)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE __m128 vec_quarter(vec a)
{
    __m256 low = _mm512_castps512_ps256(a), high = _mm512_extractf32x8_ps(a, 1);
    __m256 sum = _mm256_add_ps(low, high);
    return _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
}
#elif VECTOR_WIDTH == 8
typedef __m256 vec;
INLINE vec vec_load(const float *x) { return _mm256_loadu_ps(x); }
INLINE void vec_store(float *y, vec a) { _mm256_storeu_ps(y, a); }
INLINE vec vec_zero(void) { return _mm256_setzero_ps(); }
INLINE vec vec_set(float x) { return _mm256_set1_ps(x); }
INLINE vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec vec_half(const uint16_t *x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)x)); }
INLINE vec vec_brain(const uint16_t *x)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE __m128 vec_quarter(vec a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
#else
/* Any machine: four floats as the compiler's own vectors. */
typedef float vec __attribute__((vector_size(16)));
INLINE vec vec_load(const float *x)
{
    vec a;
    memcpy(&a, x, sizeof a);
    return a;
}
INLINE void vec_store(float *y, vec a) { memcpy(y, &a, sizeof a); }
INLINE vec vec_zero(void) { return (vec){0, 0, 0, 0}; }
INLINE vec vec_set(float x) { return (vec){x, x, x, x}; }
INLINE vec vec_fma(vec a, vec b, vec c) { return a * b + c; }
INLINE vec vec_half(const uint16_t *x)
{
    return (vec){half_to_float(x[0]), half_to_float(x[1]), half_to_float(x[2]), half_to_float(x[3])};
}
INLINE vec vec_brain(const uint16_t *x)
{
    return (vec){bfloat_to_float(x[0]), bfloat_to_float(x[1]), bfloat_to_float(x[2]), bfloat_to_float(x[3])};
}
#endif

/* The sums of four vectors, each folded by halves: its bits do not depend on its place among the four. */
INLINE void sum_four(float *y, const vec *a)
{
#if VECTOR_WIDTH > 4
    __m128 p = vec_quarter(a[0]), q = vec_quarter(a[1]), r = vec_quarter(a[2]), s = vec_quarter(a[3]);
    __m128 pq = _mm_add_ps(_mm_unpacklo_ps(p, q), _mm_unpackhi_ps(p, q));
    __m128 rs = _mm_add_ps(_mm_unpacklo_ps(r, s), _mm_unpackhi_ps(r, s));
    _mm_storeu_ps(y, _mm_add_ps(_mm_movelh_ps(pq, rs), _mm_movehl_ps(rs, pq)));
#else
    for (int i = 0; i < 4; i++) y[i] = (a[i][0] + a[i][2]) + (a[i][1] + a[i][3]);
#endif
}

INLINE vec load_weight(const char *w, int c, const enum dtype dtype)
{
    if (dtype == DTYPE_F32) return vec_load((const float *)(const void *)w + c);
    const uint16_t *narrow = (const uint16_t *)(const void *)w + c;
    return dtype == DTYPE_F16 ? vec_half(narrow) : vec_brain(narrow);
}

/* The most rows of x in a tile, and the weight rows that stay in cache while several tiles pass over them. */
enum { TILE_ROWS = VECTOR_WIDTH == 16 ? 8 : 4, TILE_WEIGHTS = 8, TILE_SUMS = 24, BLOCK = 24 };

/* The rows of a tile: places beyond the last row repeat it, and their results are dropped. */
struct tile {
    const float *x[TILE_ROWS];
    const char *w[TILE_WEIGHTS];
    float padded_x[TILE_ROWS][VECTOR_WIDTH];
    float padded_w[TILE_WEIGHTS][VECTOR_WIDTH];
};

/* Adds `columns` (whole vectors) of m rows of x times r weight rows. m, r, dtype are constants where it is inlined. */
INLINE void multiply_tile(vec *sum, const struct tile *t, int columns, const int m, const int r, const enum dtype dtype)
{
    const float *x[TILE_ROWS];
    const char *w[TILE_WEIGHTS];
    UNROLL for (int i = 0; i < m; i++) x[i] = t->x[i];
    UNROLL for (int j = 0; j < r; j++) w[j] = t->w[j];
    for (int c = 0; c < columns; c += VECTOR_WIDTH) {
        vec weight[TILE_WEIGHTS];
        UNROLL for (int j = 0; j < r; j++) weight[j] = load_weight(w[j], c, dtype);
        UNROLL for (int i = 0; i < m; i++)
        {
            vec xi = vec_load(x[i] + c);
            UNROLL for (int j = 0; j < r; j++) sum[i * r + j] = vec_fma(xi, weight[j], sum[i * r + j]);
        }
    }
}

/* The last columns, fewer than a vector, go to buffers padded with zeros. */
static __attribute__((noinline)) void pad_tile(struct tile *t, int whole, int rest, int m, int r, enum dtype dtype)
{
    const size_t size = dtype == DTYPE_F32 ? sizeof(float) : sizeof(uint16_t);
    memset(t->padded_x, 0, sizeof t->padded_x);
    memset(t->padded_w, 0, sizeof t->padded_w);
    for (int i = 0; i < m; i++) {
        memcpy(t->padded_x[i], t->x[i] + whole, (size_t)rest * sizeof(float));
        t->x[i] = t->padded_x[i];
    }
    for (int j = 0; j < r; j++) {
        memcpy(t->padded_w[j], t->w[j] + (size_t)whole * size, (size_t)rest * size);
        t->w[j] = (const char *)t->padded_w[j];
    }
}

/* Up to m rows of x from `first` on, times up to r weight rows [row, end). One accumulator a result, along the
 * columns: the order of a sum is the same in every tile. */
INLINE void linear_tile(const struct vector_linear *a, int first, int64_t row, int64_t end, const int m, const int r,
                        const enum dtype dtype)
{
    const size_t w_bytes = (size_t)a->w_stride * (dtype == DTYPE_F32 ? sizeof(float) : sizeof(uint16_t));
    const int rows = a->m - first < m ? a->m - first : m, weights = end - row < r ? (int)(end - row) : r;
    const int rest = a->k % VECTOR_WIDTH, whole = a->k - rest;
    struct tile t;
    vec sum[TILE_SUMS];
    float result[TILE_SUMS] = {0};
    UNROLL for (int i = 0; i < m; i++) t.x[i] = a->x + (first + (i < rows ? i : rows - 1)) * a->x_stride;
    UNROLL for (int j = 0; j < r; j++) t.w[j] =
        (const char *)a->w + (size_t)(row + (j < weights ? j : weights - 1)) * w_bytes;
    UNROLL for (int i = 0; i < m * r; i++) sum[i] = vec_zero();
    multiply_tile(sum, &t, whole, m, r, dtype);
    if (rest) {
        pad_tile(&t, whole, rest, m, r, dtype);
        multiply_tile(sum, &t, VECTOR_WIDTH, m, r, dtype);
    }
    UNROLL for (int i = 0; i < m * r; i += 4) sum_four(result + i, sum + i);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < weights; j++)
            a->y[(first + i) * a->y_stride + row + j] = result[i * r + j] + (a->bias ? a->bias[row + j] : 0);
}

/* Weight rows [row, end) by rows of x from `first` on; returns the rows of x done. */
INLINE int linear_rows(const struct vector_linear *a, int first, int64_t row, int64_t end, const enum dtype dtype)
{
    const int left = a->m - first;
    if (VECTOR_WIDTH == 16 && left > 6) {
        for (; row < end; row += 3) linear_tile(a, first, row, end, 8, 3, dtype);
        return 8;
    }
    if (left > 2) {
        const int r = VECTOR_WIDTH == 16 ? 4 : 2;
        for (; row < end; row += r) linear_tile(a, first, row, end, 4, r, dtype);
        return 4;
    }
    if (left == 2) {
        const int r = VECTOR_WIDTH == 16 ? 8 : 4;
        for (; row < end; row += r) linear_tile(a, first, row, end, 2, r, dtype);
        return 2;
    }
    for (; row < end; row += 8) linear_tile(a, first, row, end, 1, 8, dtype);
    return 1;
}

INLINE void linear_of(const struct vector_linear *a, const enum dtype dtype)
{
    const int64_t block = a->m > TILE_ROWS ? BLOCK : a->n;
    for (int64_t row = 0; row < a->n; row += block)
        for (int first = 0; first < a->m;)
            first += linear_rows(a, first, row, row + block < a->n ? row + block : a->n, dtype);
}

static void linear(const struct vector_linear *a)
{
    if (a->dtype == DTYPE_F32)
        linear_of(a, DTYPE_F32);
    else if (a->dtype == DTYPE_F16)
        linear_of(a, DTYPE_F16);
    else
        linear_of(a, DTYPE_BF16);
}

static void widen(float *y, const void *x, enum dtype dtype, int64_t n)
{
    const uint16_t *narrow = x;
    int64_t i = 0;
    if (dtype == DTYPE_F32) {
        memcpy(y, x, (size_t)n * sizeof *y);
        return;
    }
    if (dtype == DTYPE_F16)
        for (; i + VECTOR_WIDTH <= n; i += VECTOR_WIDTH) vec_store(y + i, vec_half(narrow + i));
    else
        for (; i + VECTOR_WIDTH <= n; i += VECTOR_WIDTH) vec_store(y + i, vec_brain(narrow + i));
    for (; i < n; i++) y[i] = dtype == DTYPE_F16 ? half_to_float(narrow[i]) : bfloat_to_float(narrow[i]);
}

/* exp(x) within 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2 and a polynomial of degree 6. Underflow is
 * gradual, -inf gives 0, NaN stays. The addition of 1.5 * 2^23 rounds to a whole number and leaves it in the bits. */
INLINE float exponential(float x)
{
    const float magic = 12582912.0f;
    union {
        float f;
        uint32_t u;
    } n, low, high;
    x = x > 89.0f ? 89.0f : x;
    x = x < -104.0f ? -104.0f : x;
    n.f = x * 1.44269504f + magic;
    float whole = n.f - magic;
    float r = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
    float p = 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    int32_t e = (int32_t)(n.u - 0x4b400000u), half = e >> 1;
    low.u = (uint32_t)(half + 127) << 23;
    high.u = (uint32_t)(e - half + 127) << 23;
    return p * low.f * high.f;
}

static float sum_squares(const float *x, int64_t n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

static void scale_by(float *y, const float *x, float factor, const float *w, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor * w[i];
}

/* Lane by lane, which the compiler turns into vectors without being allowed to reorder floats. */
static float maximum(const float *x, int64_t n)
{
    float lane[VECTOR_WIDTH], top = -INFINITY;
    int64_t i = 0;
    for (int j = 0; j < VECTOR_WIDTH; j++) lane[j] = -INFINITY;
    for (; i + VECTOR_WIDTH <= n; i += VECTOR_WIDTH)
        for (int j = 0; j < VECTOR_WIDTH; j++) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    for (; i < n; i++) top = x[i] > top ? x[i] : top;
    for (int j = 0; j < VECTOR_WIDTH; j++) top = lane[j] > top ? lane[j] : top;
    return top;
}

static float soften(float *x, int64_t n, float floor, float *sum)
{
    float top = maximum(x, n), total = 0;
    top = top > floor ? top : floor;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) {
        float e = exponential(x[i] - top);
        x[i] = e;
        total += e;
    }
    *sum = total;
    return top;
}

static void exponentials(float *restrict y, const float *restrict x, float top, float factor, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] = exponential((x[i] - top) * factor);
}

static int64_t count_from(const float *x, int64_t n, float bound)
{
    int64_t count = 0;
    for (int64_t at = 0; at < n; at += 1 << 20) { /* an int counts as many lanes at once as a float has */
        int end = n - at < 1 << 20 ? (int)(n - at) : 1 << 20, part = 0;
#pragma omp simd reduction(+ : part)
        for (int i = 0; i < end; i++) part += x[at + i] >= bound;
        count += part;
    }
    return count;
}

static void add_scaled(float *restrict y, const float *restrict x, float factor, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] += x[i] * factor;
}

static void scale(float *x, float factor, int64_t n)
{
    for (int64_t i = 0; i < n; i++) x[i] *= factor;
}

static void swiglu(float *restrict y, const float *restrict gate, const float *restrict up, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
}

static void sigmoid_gate(float *x, float factor, int64_t n)
{
    for (int64_t i = 0; i < n; i++) x[i] = x[i] / (1 + exponential(-factor * x[i]));
}

/* 0.5 x (1 + tanh u) = x / (1 + exp(-2 u)). */
static void gelu_tanh(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        float u = 0.79788456080286536f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
        x[i] = x[i] / (1 + exponential(-2 * u));
    }
}

INLINE vec load_tail(const float *x, int n)
{
    float wide[VECTOR_WIDTH] = {0};
    memcpy(wide, x, (size_t)n * sizeof(float));
    return vec_load(wide);
}

/* Four keys at a time; a rest repeats its last key, whose scores are dropped. */
static void score_keys(float *score, const float *q, const float *keys, int n, int dim, float factor)
{
    const int whole = dim - dim % VECTOR_WIDTH;
    for (int i = 0; i < n; i += 4) {
        const float *key[4];
        vec sum[4];
        float result[4];
        for (int j = 0; j < 4; j++) key[j] = keys + (int64_t)(i + j < n ? i + j : n - 1) * dim;
        UNROLL for (int j = 0; j < 4; j++) sum[j] = vec_zero();
        for (int d = 0; d < whole; d += VECTOR_WIDTH) {
            vec part = vec_load(q + d);
            UNROLL for (int j = 0; j < 4; j++) sum[j] = vec_fma(part, vec_load(key[j] + d), sum[j]);
        }
        if (whole < dim) {
            vec part = load_tail(q + whole, dim - whole);
            UNROLL for (int j = 0; j < 4; j++) sum[j] = vec_fma(part, load_tail(key[j] + whole, dim - whole), sum[j]);
        }
        sum_four(result, sum);
        for (int j = 0; j < 4 && i + j < n; j++) score[i + j] = result[j] * factor;
    }
}

INLINE void add_values_at(float *out, const float *p, const float *values, int n, int dim, const int vectors)
{
    vec sum[4];
    UNROLL for (int j = 0; j < vectors; j++) sum[j] = vec_load(out + j * VECTOR_WIDTH);
    for (int i = 0; i < n; i++) {
        vec weight = vec_set(p[i]);
        const float *value = values + (int64_t)i * dim;
        UNROLL for (int j = 0; j < vectors; j++) sum[j] = vec_fma(weight, vec_load(value + j * VECTOR_WIDTH), sum[j]);
    }
    UNROLL for (int j = 0; j < vectors; j++) vec_store(out + j * VECTOR_WIDTH, sum[j]);
}

static void add_values(float *out, const float *p, const float *values, int n, int dim)
{
    int d = 0;
    for (; d + 4 * VECTOR_WIDTH <= dim; d += 4 * VECTOR_WIDTH) add_values_at(out + d, p, values + d, n, dim, 4);
    for (; d + VECTOR_WIDTH <= dim; d += VECTOR_WIDTH) add_values_at(out + d, p, values + d, n, dim, 1);
    for (; d < dim; d++)
        for (int i = 0; i < n; i++) out[d] += p[i] * values[(int64_t)i * dim + d];
}

const struct vector_ops VECTOR_TABLE = {
    .name = VECTOR_NAME,
    .linear = linear,
    .widen = widen,
    .sum_squares = sum_squares,
    .scale_by = scale_by,
    .soften = soften,
    .add_scaled = add_scaled,
    .scale = scale,
    .score_keys = score_keys,
    .add_values = add_values,
    .swiglu = swiglu,
    .sigmoid_gate = sigmoid_gate,
    .gelu_tanh = gelu_tanh,
    .count_from = count_from,
    .exponentials = exponentials,
    .maximum = maximum,
};
