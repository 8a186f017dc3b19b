/* Expected attention: a Gaussian model of the queries to come, and what they would attend to.
 *
 * Rotations are factors on pairs of dimensions (i, i + head_dim / 2), taken as complex numbers. Going back from a row's
 * position and on to the mean of the future ones is one factor a row and pair, the same for all heads. A task is one
 * query head; the heads of a group are joined in head order afterwards. */
#include <cblas.h>
#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/lane.h"

enum { ROWS = 256 /* of queries or keys at once */ };

struct scratch {
    float *turn;  /* [n_rows, head_dim] a row's factors: real parts, then imaginary ones */
    float *mean;  /* per thread [head_dim] */
    float *sigma; /* per thread [head_dim, head_dim] */
    float *rows;  /* per thread [ROWS, head_dim] */
    float *spare; /* the same */
    float *logit; /* [n_heads, n_keys], then the attention */
    float *norm;  /* [n_kv_heads, n_keys] */
};

/* The rows of one head that count, and their factors; NULL where nothing turns. */
struct query_rows {
    const float *q, *turn;
    int64_t q_stride;
    int n, dim;
};

static int place(const struct cpu *c, struct arena *arena, int64_t n_heads, int64_t head_dim, int64_t n_keys,
                 struct scratch *s)
{
    const size_t threads = (size_t)c->n_threads, dim = (size_t)head_dim, part = threads * ROWS * dim * sizeof(float);
    TRY(arena_take(arena, (size_t)n_keys * dim * sizeof(float), "expected turns", &s->turn));
    TRY(arena_take(arena, threads * dim * sizeof(float), "expected means", &s->mean));
    TRY(arena_take(arena, threads * dim * dim * sizeof(float), "expected covariances", &s->sigma));
    TRY(arena_take(arena, part, "expected rows", &s->rows));
    TRY(arena_take(arena, part, "expected rows", &s->spare));
    TRY(arena_take(arena, (size_t)(n_heads * n_keys) * sizeof(float), "expected logits", &s->logit));
    return arena_take(arena, (size_t)(n_heads * n_keys) * sizeof(float), "expected norms", &s->norm);
}

int cpu__expected_measure(const struct cpu *c, const struct ops_limits *limits, struct arena *arena)
{
    struct scratch s;
    return place(c, arena, limits->max_heads, limits->head_dim, limits->max_context, &s);
}

/* Factors of pair i: the mean over the future positions of e^(i p f), times each row's e^(-i p f). */
static void turn_pair(const struct expected_attention *e, int first, int i, int half, float *turn)
{
    const float frequency = e->inverse_frequency[i];
    const int end = e->first_position + e->n_rows;
    double real = 0, imaginary = 0;
    for (int p = end; p < end + e->future; p++) {
        real += (double)cosf((float)p * frequency);
        imaginary += (double)sinf((float)p * frequency);
    }
    const float mean_real = (float)(real / e->future), mean_imaginary = (float)(imaginary / e->future);
    for (int row = first; row < e->n_rows; row++, turn += 2 * half) {
        const float angle = (float)(e->first_position + row) * frequency, cosine = cosf(angle), sine = sinf(angle);
        turn[i] = mean_real * cosine + mean_imaginary * sine;
        turn[half + i] = mean_imaginary * cosine - mean_real * sine;
    }
}

/* Rows [first, first + n) of a head, turned. */
static void take_rows(const struct query_rows *r, int first, int n, float *out)
{
    const int half = r->dim / 2;
    for (int row = first; row < first + n; row++, out += r->dim) {
        const float *q = r->q + row * r->q_stride, *turn = r->turn;
        if (!turn) {
            memcpy(out, q, (size_t)r->dim * sizeof *out);
            continue;
        }
        turn += (int64_t)row * r->dim;
        for (int i = 0; i < half; i++) {
            out[i] = q[i] * turn[i] - q[half + i] * turn[half + i];
            out[half + i] = q[half + i] * turn[i] + q[i] * turn[half + i];
        }
    }
}

/* Mean and population covariance of a head's rows. */
static void find_gaussian(const struct query_rows *r, float *rows, float *mean, float *sigma)
{
    const int dim = r->dim;
    memset(mean, 0, (size_t)dim * sizeof *mean);
    for (int pass = 0; pass < 2; pass++) {
        for (int first = 0; first < r->n; first += ROWS) {
            const int n = cpu__min(ROWS, r->n - first);
            take_rows(r, first, n, rows);
            for (int row = 0; row < n; row++)
                for (int d = 0; d < dim; d++) {
                    if (pass)
                        rows[row * dim + d] -= mean[d];
                    else
                        mean[d] += rows[row * dim + d];
                }
            if (pass)
                cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, dim, dim, n, 1 / (float)r->n, rows, dim, rows, dim,
                            first ? 1.0f : 0.0f, sigma, dim);
        }
        for (int d = 0; d < dim && !pass; d++) mean[d] /= (float)r->n;
    }
}

/* z of every key of a lane. */
static void expect_logits(const struct kv_view *kv, int lane, int n_keys, float scale, const float *mean,
                          const float *sigma, float *k, float *product, float *logit)
{
    const int dim = kv->head_dim;
    for (int first = 0; first < n_keys; first += ROWS) {
        const int n = cpu__min(ROWS, n_keys - first);
        lane__gather(kv, lane, first, n, k, NULL);
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, dim, dim, 1, k, dim, sigma, dim, 0, product, dim);
        for (int i = 0; i < n; i++) {
            float linear = 0, square = 0;
            for (int d = 0; d < dim; d++) {
                linear += k[i * dim + d] * mean[d];
                square += k[i * dim + d] * product[i * dim + d];
            }
            logit[first + i] = scale * linear + scale * scale / 2 * square;
        }
    }
}

static void find_norms(const struct kv_view *kv, int lane, int n_keys, float *norm)
{
    for (int i = 0; i < n_keys; i++) {
        const float *v = lane__value(kv, lane, i);
        float sum = 0;
        for (int d = 0; d < kv->head_dim; d++) sum += v[d] * v[d];
        norm[i] = sqrtf(sum);
    }
}

/* Joins a group's heads: logit [group, n_keys] holds exponentials of the keys from `sinks` on, sum [group] theirs. */
static void join_group(const struct expected_attention *e, const float *attention, int group, int n_keys,
                       const float *norm, float *score)
{
    for (int i = 0; i < n_keys; i++) {
        float sum = 0;
        for (int j = 0; j < group; j++) sum += attention[(int64_t)j * n_keys + i];
        score[i] = i < e->sinks ? INFINITY : (sum / (float)group + e->epsilon) * norm[i];
    }
}

int cpu__expected_attention(struct ops *o, struct tensor q, const struct kv_view *kv,
                            const struct attention_heads *heads, const struct expected_attention *e)
{
    const struct cpu *c = cpu__of(o);
    const int n_keys = e->first_position + e->n_rows, group = heads->n_heads / heads->n_kv_heads, dim = kv->head_dim;
    const int first_lane = e->slot * kv->lanes_per_slot + heads->lane;
    const int first = e->sinks > e->first_position ? e->sinks - e->first_position : 0; /* row that counts */
    struct arena arena;
    struct scratch s;
    for (int h = 0; h < heads->n_kv_heads; h++)
        if (kv->lane_len[first_lane + h] < n_keys)
            FAIL(ERR_ARG, "ops_expected_attention: KV head %d holds %d tokens, expected the whole prompt of %d", h,
                 kv->lane_len[first_lane + h], n_keys);
    TRY(cpu__scratch(o, &arena));
    TRY(place(c, &arena, heads->n_heads, dim, n_keys, &s));
#pragma omp parallel for num_threads(c->n_threads)
    for (int i = 0; i < (e->inverse_frequency ? dim / 2 : 0); i++) turn_pair(e, first, i, dim / 2, s.turn);
#pragma omp parallel for num_threads(c->n_threads) schedule(dynamic, 1)
    for (int h = 0; h < heads->n_heads; h++) {
        const size_t thread = (size_t)omp_get_thread_num(), part = thread * ROWS * (size_t)dim;
        const struct query_rows rows = {cpu__row(q, first) + (int64_t)h * dim, e->inverse_frequency ? s.turn : NULL,
                                        q.stride[0], e->n_rows - first, dim};
        float *mean = s.mean + thread * (size_t)dim, *sigma = s.sigma + thread * (size_t)(dim * dim);
        float *logit = s.logit + (int64_t)h * n_keys, sum;
        find_gaussian(&rows, s.rows + part, mean, sigma);
        expect_logits(kv, first_lane + h / group, n_keys, heads->scale, mean, sigma, s.rows + part, s.spare + part,
                      logit);
        (void)c->vector->soften(logit + e->sinks, n_keys - e->sinks, -INFINITY, &sum);
        c->vector->scale(logit + e->sinks, 1 / sum, n_keys - e->sinks);
    }
#pragma omp parallel for num_threads(c->n_threads)
    for (int g = 0; g < heads->n_kv_heads; g++) {
        float *norm = s.norm + (int64_t)g * n_keys;
        find_norms(kv, first_lane + g, n_keys, norm);
        join_group(e, s.logit + (int64_t)g * group * n_keys, group, n_keys, norm, e->score + (int64_t)g * n_keys);
    }
    return OK;
}
