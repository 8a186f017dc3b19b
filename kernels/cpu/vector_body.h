/* vector_body - the source of all tables of vector.h. A file that includes it has set the instruction set and
 * VECTOR_TABLE, and VECTOR_WIDTH (floats in a register: 16, 8 or 4). No header guard: it is included once a file.
 *
 * Explicit vectors stand only where the compiler would do worse: products with weights, and attention of one query.
 * Everything else is a loop that it vectorises; reductions say so to it, since strict IEEE order forbids it else. */
#include <math.h>
#include <string.h>

#include "kernels/cpu/vector.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

#define EXP_MAGIC 12582912.0f

/* Keeps the compiler from loading a vector anew for each of its uses. */
#if VECTOR_WIDTH > 4
#define IN_REGISTER(a) __asm__("" : "+v"(a))
#else
#define IN_REGISTER(a) (void)(a)
#endif

#if VECTOR_WIDTH == 16
typedef __m512 vec;
INLINE vec vec_min(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE float vec_sum(vec a) { return _mm512_reduce_add_ps(a); }
INLINE vec vec_load(const float *x) { return _mm512_loadu_ps(x); }
INLINE void vec_store(float *y, vec a) { _mm512_storeu_ps(y, a); }
INLINE vec vec_zero(void) { return _mm512_setzero_ps(); }
INLINE vec vec_set(float x) { return _mm512_set1_ps(x); }
INLINE vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec vec_max(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE float vec_top(vec a) { return _mm512_reduce_max_ps(a); }
INLINE vec vec_half(const uint16_t *x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)x)); }
INLINE vec vec_brain(const uint16_t *x)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
#elif VECTOR_WIDTH == 8
typedef __m256 vec;
typedef int32_t vec_int __attribute__((vector_size(32)));
INLINE vec vec_min(vec a, vec b) { return _mm256_min_ps(a, b); }
INLINE float vec_sum(vec a)
{
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
}
INLINE vec vec_load(const float *x) { return _mm256_loadu_ps(x); }
INLINE void vec_store(float *y, vec a) { _mm256_storeu_ps(y, a); }
INLINE vec vec_zero(void) { return _mm256_setzero_ps(); }
INLINE vec vec_set(float x) { return _mm256_set1_ps(x); }
INLINE vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec vec_max(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE float vec_top(vec a)
{
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_shuffle_ps(b, b, 1)));
}
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
typedef int32_t vec_int __attribute__((vector_size(16)));
INLINE float vec_sum(vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
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
/* As the instructions do: the second one if either is no number. */
INLINE float larger(float a, float b) { return a > b ? a : b; }
INLINE float smaller(float a, float b) { return a < b ? a : b; }
INLINE vec vec_min(vec a, vec b)
{
    return (vec){smaller(a[0], b[0]), smaller(a[1], b[1]), smaller(a[2], b[2]), smaller(a[3], b[3])};
}
INLINE vec vec_max(vec a, vec b)
{
    return (vec){larger(a[0], b[0]), larger(a[1], b[1]), larger(a[2], b[2]), larger(a[3], b[3])};
}
INLINE float vec_top(vec a) { return larger(larger(a[0], a[1]), larger(a[2], a[3])); }
INLINE vec vec_half(const uint16_t *x)
{
    return (vec){half_to_float(x[0]), half_to_float(x[1]), half_to_float(x[2]), half_to_float(x[3])};
}
INLINE vec vec_brain(const uint16_t *x)
{
    return (vec){bfloat_to_float(x[0]), bfloat_to_float(x[1]), bfloat_to_float(x[2]), bfloat_to_float(x[3])};
}
#endif

/* The sums of eight vectors, each folded by halves: a sum's bits do not depend on its place among the eight. */
INLINE void sum_eight(float *y, const vec *a)
{
#if VECTOR_WIDTH == 16
    vec four[2];
    UNROLL for (int i = 0; i < 2; i++)
    {
        const vec *b = a + 4 * i;
        vec p = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x44), _mm512_shuffle_f32x4(b[0], b[1], 0xee));
        vec q = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x44), _mm512_shuffle_f32x4(b[2], b[3], 0xee));
        four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));
    }
    /* Lane l of four[i] holds what is left of a[4 i + l]. */
    vec both = _mm512_add_ps(_mm512_unpacklo_ps(four[0], four[1]), _mm512_unpackhi_ps(four[0], four[1]));
    both = _mm512_add_ps(both, _mm512_permute_ps(both, 0x4e));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm256_storeu_ps(y, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, both)));
#elif VECTOR_WIDTH == 8
    UNROLL for (int i = 0; i < 8; i += 4)
    {
        __m128 p = vec_quarter(a[i]), q = vec_quarter(a[i + 1]), r = vec_quarter(a[i + 2]), s = vec_quarter(a[i + 3]);
        __m128 pq = _mm_add_ps(_mm_unpacklo_ps(p, q), _mm_unpackhi_ps(p, q));
        __m128 rs = _mm_add_ps(_mm_unpacklo_ps(r, s), _mm_unpackhi_ps(r, s));
        _mm_storeu_ps(y + i, _mm_add_ps(_mm_movelh_ps(pq, rs), _mm_movehl_ps(rs, pq)));
    }
#else
    for (int i = 0; i < 8; i++) y[i] = (a[i][0] + a[i][2]) + (a[i][1] + a[i][3]);
#endif
}

INLINE size_t weight_size(const enum dtype dtype) { return dtype == DTYPE_F32 ? sizeof(float) : sizeof(uint16_t); }

INLINE vec load_weight(const char *w, int c, const enum dtype dtype)
{
    if (dtype == DTYPE_F32) return vec_load((const float *)(const void *)w + c);
    const uint16_t *narrow = (const uint16_t *)(const void *)w + c;
    return dtype == DTYPE_F16 ? vec_half(narrow) : vec_brain(narrow);
}

/* The most rows of x and of weights in a tile, and the weight rows of a block: they stay in cache while the tiles of
 * several groups of x rows pass over them, and results leave a block at a time. */
enum { TILE_ROWS = VECTOR_WIDTH == 16 ? 8 : 4, TILE_WEIGHTS = 8, TILE_SUMS = 24, BLOCK = 24 };

/* The rows of a tile: places beyond the last row repeat it, and their results are dropped. */
struct tile {
    const float *x[TILE_ROWS];
    const char *w[TILE_WEIGHTS];
    float padded_x[TILE_ROWS][VECTOR_WIDTH];
    float padded_w[TILE_WEIGHTS][VECTOR_WIDTH];
};

/* Adds `columns` (whole vectors) of m rows of x times r weight rows; fetches the weights `ahead` bytes further on,
 * which are the next tile's: rows are too short for the hardware to see where this is going. m, r, dtype are constants
 * where it is inlined. */
INLINE void multiply_tile(vec *sum, const struct tile *t, int columns, size_t ahead, const int m, const int r,
                          const enum dtype dtype)
{
    const float *x[TILE_ROWS];
    const char *w[TILE_WEIGHTS];
    UNROLL for (int i = 0; i < m; i++) x[i] = t->x[i];
    UNROLL for (int j = 0; j < r; j++) w[j] = t->w[j];
    for (int c = 0; c < columns; c += VECTOR_WIDTH) {
        vec weight[TILE_WEIGHTS];
        UNROLL for (int j = 0; j < r; j++) weight[j] = load_weight(w[j], c, dtype);
        UNROLL for (int j = 0; j < r; j++) __builtin_prefetch(w[j] + ahead + (size_t)c * weight_size(dtype));
        UNROLL for (int i = 0; i < m; i++)
        {
            vec xi = vec_load(x[i] + c);
            IN_REGISTER(xi);
            UNROLL for (int j = 0; j < r; j++) sum[j * m + i] = vec_fma(xi, weight[j], sum[j * m + i]);
        }
    }
}

/* The last columns, fewer than a vector, go to buffers padded with zeros. */
static __attribute__((noinline)) void pad_tile(struct tile *t, int whole, int rest, int m, int r, enum dtype dtype)
{
    const size_t size = weight_size(dtype);
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

/* Up to m rows of x from `first` on, times up to r weight rows [row, end); m * r is a multiple of eight. One
 * accumulator a result, along the columns: the order of a sum is the same in every tile. result [r, m]. */
INLINE void linear_tile(const struct vector_linear *a, int first, int64_t row, int64_t end, float *result, const int m,
                        const int r, const enum dtype dtype)
{
    const size_t w_bytes = (size_t)a->w_stride * weight_size(dtype);
    const int rows = a->m - first, weights = (int)(end - row), rest = a->k % VECTOR_WIDTH, whole = a->k - rest;
    struct tile t;
    vec sum[TILE_SUMS];
    UNROLL for (int i = 0; i < m; i++) t.x[i] = a->x + (first + (i < rows ? i : rows - 1)) * a->x_stride;
    UNROLL for (int j = 0; j < r; j++) t.w[j] =
        (const char *)a->w + (size_t)(row + (j < weights ? j : weights - 1)) * w_bytes;
    UNROLL for (int i = 0; i < m * r; i++) sum[i] = vec_zero();
    multiply_tile(sum, &t, whole, (size_t)r * w_bytes, m, r, dtype);
    if (rest) {
        pad_tile(&t, whole, rest, m, r, dtype);
        multiply_tile(sum, &t, VECTOR_WIDTH, 0, m, r, dtype);
    }
    UNROLL for (int i = 0; i < m * r; i += 8) sum_eight(result + i, sum + i);
}

/* A block of weight rows [row, end) by m rows of x (fewer at the end of x). */
INLINE void linear_block(const struct vector_linear *a, int first, int64_t row, int64_t end, const int m, const int r,
                         const enum dtype dtype)
{
    float result[(BLOCK + TILE_WEIGHTS) * TILE_ROWS];
    const int rows = a->m - first < m ? a->m - first : m, n = (int)(end - row);
    for (int at = 0; at < n; at += r) linear_tile(a, first, row + at, end, result + at * m, m, r, dtype);
    for (int i = 0; i < rows; i++) {
        float *y = a->y + (first + i) * a->y_stride + row;
        if (a->bias)
            for (int j = 0; j < n; j++) y[j] = result[j * m + i] + a->bias[row + j];
        else
            for (int j = 0; j < n; j++) y[j] = result[j * m + i];
    }
}

/* A block by the next rows of x; returns how many. Few registers allow few sums, and many sums want few weights. */
INLINE int linear_rows(const struct vector_linear *a, int first, int64_t row, int64_t end, const enum dtype dtype)
{
    const int left = a->m - first;
#if VECTOR_WIDTH == 16
    if (left > 4) {
        linear_block(a, first, row, end, 8, 3, dtype);
        return 8;
    }
#endif
    if (left > 2) {
        linear_block(a, first, row, end, 4, VECTOR_WIDTH == 16 ? 4 : 2, dtype);
        return 4;
    }
    if (left == 2) {
        linear_block(a, first, row, end, 2, VECTOR_WIDTH == 16 ? 8 : 4, dtype);
        return 2;
    }
    linear_block(a, first, row, end, 1, 8, dtype);
    return 1;
}

INLINE void linear_of(const struct vector_linear *a, const enum dtype dtype)
{
    for (int64_t row = 0; row < a->n; row += BLOCK)
        for (int first = 0; first < a->m;)
            first += linear_rows(a, first, row, row + BLOCK < a->n ? row + BLOCK : a->n, dtype);
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

/* An e4m3 number's bits, set at the same distance below a float's sign, are that number times 2^-120. */
INLINE float widen_fp8(uint32_t code)
{
    const uint32_t bits = (code & 0x80) << 24 | (code & 0x7f) << 20 | ((code & 0x7f) == 0x7f ? 0x7fc00000 : 0);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x * 0x1p120f;
}

static void widen_codes(float *y, const uint8_t *codes, bool fp8, int64_t n)
{
    if (fp8)
        for (int64_t i = 0; i < n; i++) y[i] = widen_fp8(codes[i]);
    else
        for (int64_t i = 0; i < n; i++) y[i] = (float)(int8_t)codes[i];
}

/* The last n < VECTOR_WIDTH values of an array, or a whole vector. */
INLINE vec load_some(const float *x, int64_t n, float rest)
{
    float wide[VECTOR_WIDTH];
    if (n >= VECTOR_WIDTH) return vec_load(x);
    for (int i = 0; i < VECTOR_WIDTH; i++) wide[i] = i < n ? x[i] : rest;
    return vec_load(wide);
}

INLINE void store_some(float *y, vec a, int64_t n)
{
    float wide[VECTOR_WIDTH];
    if (n >= VECTOR_WIDTH) {
        vec_store(y, a);
        return;
    }
    vec_store(wide, a);
    memcpy(y, wide, (size_t)n * sizeof(float));
}

/* p * 2^n for whole n from -150 to 128: in two steps, so that neither the factor nor the middle leaves the range. */
INLINE vec vec_scale(vec p, vec n_and_magic)
{
#if VECTOR_WIDTH == 16
    return _mm512_scalef_ps(p, n_and_magic - vec_set(EXP_MAGIC));
#else
    vec_int e = (vec_int)n_and_magic - 0x4b400000, half = e >> 1;
    return p * (vec)((half + 127) << 23) * (vec)((e - half + 127) << 23);
#endif
}

/* exp(x) within 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2 and the polynomial of the Cephes library.
 * Underflow is gradual, -inf gives 0, NaN stays. Adding 1.5 * 2^23 rounds to a whole number, and leaves it in the low
 * bits. */
INLINE vec vec_exp(vec x)
{
    x = vec_max(vec_set(-104.0f), vec_min(vec_set(89.0f), x)); /* a NaN passes as the second operand */
    vec shifted = vec_fma(x, vec_set(1.44269504f), vec_set(EXP_MAGIC)), n = shifted - vec_set(EXP_MAGIC);
    vec r = vec_fma(n, vec_set(-1.42860677e-6f), vec_fma(n, vec_set(-0.693145752f), x));
    vec p = vec_fma(vec_set(1.9875691500e-4f), r, vec_set(1.3981999507e-3f));
    p = vec_fma(p, r, vec_set(8.3334519073e-3f));
    p = vec_fma(p, r, vec_set(4.1665795894e-2f));
    p = vec_fma(p, r, vec_set(1.6666665459e-1f));
    p = vec_fma(p, r, vec_set(5.0000001201e-1f));
    p = vec_fma(p, r * r, r) + vec_set(1.0f);
    return vec_scale(p, shifted);
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

static float maximum(const float *x, int64_t n)
{
    vec a = vec_set(-INFINITY), b = a;
    int64_t i = 0;
    for (; i + 2 * VECTOR_WIDTH <= n; i += 2 * VECTOR_WIDTH) {
        a = vec_max(vec_load(x + i), a);
        b = vec_max(vec_load(x + i + VECTOR_WIDTH), b);
    }
    float top = vec_top(vec_max(a, b));
    for (; i < n; i++) top = x[i] > top ? x[i] : top;
    return top;
}

static float soften(float *x, int64_t n, float floor, float *sum)
{
    float top = maximum(x, n);
    top = top > floor ? top : floor;
    const vec centre = vec_set(top);
    vec total = vec_zero();
    for (int64_t i = 0; i < n; i += VECTOR_WIDTH) {
        vec e = vec_exp(load_some(x + i, n - i, -INFINITY) - centre);
        store_some(x + i, e, n - i);
        total += e;
    }
    *sum = vec_sum(total);
    return top;
}

static void exponentials(float *y, const float *x, float top, float factor, int64_t n)
{
    for (int64_t i = 0; i < n; i += VECTOR_WIDTH)
        store_some(y + i, vec_exp((load_some(x + i, n - i, 0) - vec_set(top)) * vec_set(factor)), n - i);
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

/* x / (1 + exp(-u)). */
INLINE vec vec_gate(vec x, vec u) { return x / (vec_set(1) + vec_exp(-u)); }

static void swiglu(float *y, const float *gate, const float *up, int64_t n)
{
    for (int64_t i = 0; i < n; i += VECTOR_WIDTH) {
        vec x = load_some(gate + i, n - i, 0);
        store_some(y + i, vec_gate(x, x) * load_some(up + i, n - i, 0), n - i);
    }
}

static void sigmoid_gate(float *x, float factor, int64_t n)
{
    for (int64_t i = 0; i < n; i += VECTOR_WIDTH) {
        vec a = load_some(x + i, n - i, 0);
        store_some(x + i, vec_gate(a, a * vec_set(factor)), n - i);
    }
}

/* 0.5 x (1 + tanh u) = x / (1 + exp(-2 u)). */
static void gelu_tanh(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i += VECTOR_WIDTH) {
        vec a = load_some(x + i, n - i, 0);
        vec u = vec_set(1.59576912160573072f) * (a + vec_set(0.044715f) * a * a * a);
        store_some(x + i, vec_gate(a, u), n - i);
    }
}

/* VECTOR_ROWS rows from `first` on (at the end of a the last one repeats, with the same result), times a strip of
 * `strip` vectors of b from a column on. Each sum is one accumulator along k. */
INLINE void multiply_strip(const struct vector_product *p, int first, int column, const int strip)
{
    vec sum[VECTOR_ROWS * 4];
    const float *row[VECTOR_ROWS], *b = p->b + column;
    float *to[VECTOR_ROWS];
    const int64_t b_stride = p->b_stride;
    const int k = p->k, last = p->m - 1;
    UNROLL for (int i = 0; i < VECTOR_ROWS; i++)
    {
        row[i] = p->a + (first + i < last ? first + i : last) * p->a_stride;
        to[i] = p->c + (first + i < last ? first + i : last) * p->c_stride + column;
    }
    UNROLL for (int i = 0; i < VECTOR_ROWS * strip; i++) sum[i] =
        p->add ? vec_load(to[i / strip] + i % strip * VECTOR_WIDTH) : vec_zero();
    for (int at = 0; at < k; at++, b += b_stride) {
        vec part[4];
        UNROLL for (int j = 0; j < strip; j++)
        {
            part[j] = vec_load(b + j * VECTOR_WIDTH);
            IN_REGISTER(part[j]);
        }
        UNROLL for (int i = 0; i < VECTOR_ROWS; i++)
        {
            vec value = vec_set(row[i][at]);
            UNROLL for (int j = 0; j < strip; j++) sum[i * strip + j] = vec_fma(value, part[j], sum[i * strip + j]);
        }
    }
    const vec factor = vec_set(p->add ? 1 : p->scale);
    UNROLL for (int i = 0; i < VECTOR_ROWS * strip; i++)
        vec_store(to[i / strip] + i % strip * VECTOR_WIDTH, sum[i] * factor);
}

static void multiply(const struct vector_product *p)
{
    enum { STRIP = VECTOR_WIDTH == 16 ? 4 : 2 };
    for (int first = 0; first < p->m; first += VECTOR_ROWS) {
        int column = 0;
        for (; column + STRIP * VECTOR_WIDTH <= p->n; column += STRIP * VECTOR_WIDTH)
            multiply_strip(p, first, column, STRIP);
        for (; column < p->n; column += VECTOR_WIDTH) multiply_strip(p, first, column, 1);
    }
}

#if VECTOR_WIDTH == 16
/* 16 x 16 values: pairs of rows, pairs of pairs, then whole quarters change places. */
INLINE void transpose_square(float *to, int64_t to_stride, const vec *a)
{
    vec t[16], u[16];
    UNROLL for (int i = 0; i < 16; i += 2)
    {
        t[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) UNROLL for (int j = 0; j < 2; j++)
    {
        __m512d p = _mm512_castps_pd(t[i + j]), q = _mm512_castps_pd(t[i + j + 2]);
        u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, q));
        u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, q));
    }
    UNROLL for (int j = 0; j < 4; j++) /* u[4 i + j] holds, in quarter l, rows 4 i .. 4 i + 3 of column 4 l + j */
    {
        vec even0 = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), odd0 = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
        vec even1 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
        vec odd1 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
        vec_store(to + j * to_stride, _mm512_shuffle_f32x4(even0, even1, 0x88));
        vec_store(to + (4 + j) * to_stride, _mm512_shuffle_f32x4(odd0, odd1, 0x88));
        vec_store(to + (8 + j) * to_stride, _mm512_shuffle_f32x4(even0, even1, 0xdd));
        vec_store(to + (12 + j) * to_stride, _mm512_shuffle_f32x4(odd0, odd1, 0xdd));
    }
}
#endif

static void transpose(float *to, int64_t to_stride, const float *const *row, int n, int dim)
{
    int d = 0;
#if VECTOR_WIDTH == 16
    for (; d + 16 <= dim; d += 16)
        for (int j = 0; j < n; j += 16) {
            vec a[16];
            for (int i = 0; i < 16; i++) a[i] = j + i < n ? vec_load(row[j + i] + d) : vec_zero();
            transpose_square(to + d * to_stride + j, to_stride, a);
        }
#endif
    const int end = vector__round_up(n);
    for (; d < dim; d++) {
        float *line = to + d * to_stride;
        for (int j = 0; j < n; j++) line[j] = row[j][d];
        for (int j = n; j < end; j++) line[j] = 0;
    }
}

/* Eight keys at a time; a rest repeats its last key, whose scores are dropped. */
static void score_keys(float *score, const float *q, const float *keys, int n, int dim, float factor)
{
    const int whole = dim - dim % VECTOR_WIDTH;
    for (int i = 0; i < n; i += 8) {
        const float *key[8];
        vec sum[8];
        float result[8];
        UNROLL for (int j = 0; j < 8; j++) key[j] = keys + (int64_t)(i + j < n ? i + j : n - 1) * dim;
        UNROLL for (int j = 0; j < 8; j++) sum[j] = vec_zero();
        for (int d = 0; d < whole; d += VECTOR_WIDTH) {
            vec part = vec_load(q + d);
            UNROLL for (int j = 0; j < 8; j++) sum[j] = vec_fma(part, vec_load(key[j] + d), sum[j]);
        }
        if (whole < dim) {
            vec part = load_some(q + whole, dim - whole, 0);
            for (int j = 0; j < 8; j++) sum[j] = vec_fma(part, load_some(key[j] + whole, dim - whole, 0), sum[j]);
        }
        sum_eight(result, sum);
        for (int j = 0; j < 8 && i + j < n; j++) score[i + j] = result[j] * factor;
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
    .widen_codes = widen_codes,
    .sum_squares = sum_squares,
    .scale_by = scale_by,
    .soften = soften,
    .add_scaled = add_scaled,
    .scale = scale,
    .multiply = multiply,
    .transpose = transpose,
    .score_keys = score_keys,
    .add_values = add_values,
    .swiglu = swiglu,
    .sigmoid_gate = sigmoid_gate,
    .gelu_tanh = gelu_tanh,
    .count_from = count_from,
    .exponentials = exponentials,
    .maximum = maximum,
};
