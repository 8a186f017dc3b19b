/* vector - the inner loops that want the widest registers of the machine: one table of functions per instruction set,
 * all made of the same source (vector_body.h), chosen once at open. Sums run in an order that depends on the vector
 * width alone: results are the same bits on machines of one instruction set, and close on others. */
#ifndef VITRAIL_KERNELS_CPU_VECTOR_H
#define VITRAIL_KERNELS_CPU_VECTOR_H

#include <stdbool.h>
#include <stdint.h>

#include "base/tensor.h"

/* A product of a few rows with a slice of weight rows: y[m, n] = x[m, k] w[n, k]^T + bias. Strides in elements. */
struct vector_linear {
    float *y;
    const float *x, *bias; /* bias of the slice's first row, or NULL */
    const void *w;
    int64_t y_stride, x_stride, w_stride;
    int m, k;  /* rows of x; columns */
    int64_t n; /* rows of the slice */
    enum dtype dtype;
};

/* What the columns of multiply come in, on every machine; and the rows of x that it takes at once. */
enum { VECTOR_MULTIPLE = 16, VECTOR_ROWS = 6 };

static inline int vector__round_up(int n) { return (n + VECTOR_MULTIPLE - 1) / VECTOR_MULTIPLE * VECTOR_MULTIPLE; }

/* c[m, n] = scale * a[m, k] b[k, n], or c += a b where `add`; n a multiple of VECTOR_MULTIPLE. A row of c does not
 * depend on the other rows. */
struct vector_product {
    float *c;
    const float *a, *b;
    int64_t c_stride, a_stride, b_stride;
    int m, n, k;
    float scale;
    bool add;
};

struct vector_ops {
    const char *name;
    /* A row's results do not depend on m nor on how weight rows are cut into slices. */
    void (*linear)(const struct vector_linear *a);
    /* Widening of n weights of any dtype. */
    void (*widen)(float *y, const void *x, enum dtype dtype, int64_t n);
    /* The numbers that n codes of a quantised row stand for, before its scale: int8, or e4m3 where fp8. */
    void (*widen_codes)(float *y, const uint8_t *codes, bool fp8, int64_t n);
    /* sum of x^2. */
    float (*sum_squares)(const float *x, int64_t n);
    /* y = x * factor * w. */
    void (*scale_by)(float *y, const float *x, float factor, const float *w, int64_t n);
    /* x[i] = exp(x[i] - top) with top = the maximum of x and `floor`; *sum = their sum; returns top. */
    float (*soften)(float *x, int64_t n, float floor, float *sum);
    /* y += factor * x. */
    void (*add_scaled)(float *y, const float *x, float factor, int64_t n);
    void (*scale)(float *x, float factor, int64_t n);
    void (*multiply)(const struct vector_product *p);
    /* to[d, j] = row[j][d] for n rows of dim values; columns up to the next multiple of VECTOR_MULTIPLE become 0. */
    void (*transpose)(float *to, int64_t to_stride, const float *const *row, int n, int dim);
    /* score[i] = scale * q . key[i], keys [n, dim] dense; out += sum of p[i] * value[i]. */
    void (*score_keys)(float *score, const float *q, const float *keys, int n, int dim, float scale);
    void (*add_values)(float *out, const float *p, const float *values, int n, int dim);
    /* y = silu(gate) * up; x = silu(factor * x) / factor. */
    void (*swiglu)(float *y, const float *gate, const float *up, int64_t n);
    void (*sigmoid_gate)(float *x, float factor, int64_t n);
    void (*gelu_tanh)(float *x, int64_t n);
    /* Number of x[i] >= bound. */
    int64_t (*count_from)(const float *x, int64_t n, float bound);
    /* y[i] = exp((x[i] - top) * factor). */
    void (*exponentials)(float *y, const float *x, float top, float factor, int64_t n);
    float (*maximum)(const float *x, int64_t n);
};

extern const struct vector_ops vector__base, vector__v3, vector__v4;

/* vector__choose - the best table that this machine runs. */
const struct vector_ops *vector__choose(void);

/* vector__runs - whether this machine runs a table; for tests that compare them. */
bool vector__runs(const struct vector_ops *v);

#endif
