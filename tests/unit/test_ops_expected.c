/* Expected attention against double on random shapes: there the queries stand before their rotation, the mean rotation
 * is a whole matrix, and mean and covariance are turned by it, as in the paper. What the op refuses. */
#include "tests/ops_fixture.h"

struct shape {
    int n_heads, n_kv_heads, dim, first_position, n_rows, sinks, future;
    float epsilon;
};

static int keys_of(const struct shape *s) { return s->first_position + s->n_rows; }

static void take_frequencies(float *frequency, int half)
{
    for (int i = 0; i < half; i++) frequency[i] = powf(10000, -(float)i / (float)half);
}

/* ---- in double ---- */

/* The mean rotation over the future positions, [dim, dim]. */
static double *mean_rotation(struct fixture *f, const struct shape *s, const float *frequency)
{
    const int dim = s->dim, half = dim / 2;
    double *turn = fixture_take(f, (size_t)(dim * dim) * sizeof *turn);
    for (int i = 0; i < half; i++)
        for (int p = keys_of(s); p < keys_of(s) + s->future; p++) {
            const double angle = (double)((float)p * frequency[i]);
            turn[i * dim + i] += cos(angle) / s->future;
            turn[(half + i) * dim + half + i] += cos(angle) / s->future;
            turn[i * dim + half + i] -= sin(angle) / s->future;
            turn[(half + i) * dim + i] += sin(angle) / s->future;
        }
    return turn;
}

/* y[dim, n] = turn x[dim, n], or x where there is nothing to turn. */
static double *turned(struct fixture *f, const double *turn, const double *x, int dim, int n)
{
    double *y = fixture_take(f, (size_t)(dim * n) * sizeof *y);
    for (int i = 0; i < dim; i++)
        for (int j = 0; j < n; j++)
            for (int a = 0; a < dim; a++) y[i * n + j] += (turn ? turn[i * dim + a] : i == a) * x[a * n + j];
    return y;
}

/* Of rows [first, n_rows) of a head: mean [dim], covariance [dim, dim], both turned. */
static void gaussian(struct fixture *f, const struct shape *s, struct tensor q, int head, const double *turn,
                     double **mean, double **sigma)
{
    const int dim = s->dim, first = s->sinks > s->first_position ? s->sinks - s->first_position : 0;
    double *mu = fixture_take(f, (size_t)dim * sizeof *mu), n = s->n_rows - first;
    double *cov = fixture_take(f, (size_t)(dim * dim) * sizeof *cov), *half;
    for (int r = first; r < s->n_rows; r++)
        for (int d = 0; d < dim; d++) mu[d] += (double)fixture_row(q, r)[head * dim + d] / n;
    for (int r = first; r < s->n_rows; r++) {
        const float *x = fixture_row(q, r) + head * dim;
        for (int i = 0; i < dim; i++)
            for (int j = 0; j < dim; j++) cov[i * dim + j] += ((double)x[i] - mu[i]) * ((double)x[j] - mu[j]) / n;
    }
    *mean = turned(f, turn, mu, dim, 1);
    half = turned(f, turn, cov, dim, dim); /* R S, and then R (R S)^T = R S R^T, S being symmetric */
    double *flipped = fixture_take(f, (size_t)(dim * dim) * sizeof *flipped);
    for (int i = 0; i < dim * dim; i++) flipped[i] = half[i % dim * dim + i / dim];
    *sigma = turned(f, turn, flipped, dim, dim);
}

static void add_head(struct fixture *f, const struct shape *s, const struct kv_view *kv, int lane, float scale,
                     const double *mean, const double *sigma, double *score)
{
    const int n = keys_of(s), dim = s->dim;
    double *z = fixture_take(f, (size_t)n * sizeof *z), top = -INFINITY, sum = 0;
    for (int i = s->sinks; i < n; i++) {
        const float *k = fixture_key(kv, lane, i);
        double linear = 0, square = 0;
        for (int a = 0; a < dim; a++) {
            linear += (double)k[a] * mean[a];
            for (int b = 0; b < dim; b++) square += (double)k[a] * sigma[a * dim + b] * (double)k[b];
        }
        z[i] = (double)scale * linear + (double)scale * (double)scale / 2 * square;
        top = fmax(top, z[i]);
    }
    for (int i = s->sinks; i < n; i++) sum += exp(z[i] - top);
    for (int i = s->sinks; i < n; i++) score[i] += exp(z[i] - top) / sum * s->n_kv_heads / s->n_heads;
}

static double length_of(const float *v, int dim)
{
    double sum = 0;
    for (int d = 0; d < dim; d++) sum += (double)v[d] * (double)v[d];
    return sqrt(sum);
}

/* q: before its rotation. */
static double *expected_scores(struct fixture *f, const struct shape *s, struct tensor q, const struct kv_view *kv,
                               const struct attention_heads *heads, const float *frequency)
{
    const int n = keys_of(s), group = s->n_heads / s->n_kv_heads;
    double *score = fixture_take(f, (size_t)(s->n_kv_heads * n) * sizeof *score), *mean, *sigma;
    double *turn = frequency ? mean_rotation(f, s, frequency) : NULL;
    for (int h = 0; h < s->n_heads; h++) {
        const int lane = kv->lanes_per_slot + heads->lane + h / group;
        gaussian(f, s, q, h, turn, &mean, &sigma);
        add_head(f, s, kv, lane, heads->scale, mean, sigma, score + h / group * n);
    }
    for (int g = 0; g < s->n_kv_heads; g++)
        for (int i = 0; i < n; i++) {
            double *x = &score[g * n + i];
            const float *v = fixture_value(kv, kv->lanes_per_slot + heads->lane + g, i);
            *x = i < s->sinks ? INFINITY : (*x + (double)s->epsilon) * length_of(v, s->dim);
        }
    return score;
}

/* ---- the op ---- */

/* The second of two slots, the second of two layers; the lanes hold 3 tokens more than are asked about. */
static struct kv_view fill_cache(struct fixture *f, const struct shape *s, struct attention_heads *heads)
{
    const int n = keys_of(s) + 3, pages = n / 16 + 1;
    struct kv_view kv = fixture_cache(f, 2, 2 * s->n_kv_heads, pages, 4 * s->n_kv_heads * pages, 16, s->dim);
    *heads = (struct attention_heads){s->n_heads, s->n_kv_heads, s->dim, s->n_kv_heads, 1.0f / sqrtf((float)s->dim)};
    for (int first = 0; first < n; first += 37) {
        int rows = n - first < 37 ? n - first : 37, cu[3] = {0, rows, 2 * rows}, slot[2] = {1, 0};
        struct tensor k = fixture_3d(f, 2 * rows, s->n_kv_heads, s->dim, 0);
        struct tensor v = fixture_3d(f, 2 * rows, s->n_kv_heads, s->dim, 0);
        const struct seq_batch batch = {2, 2 * rows, slot, cu, slot, cu};
        CHECK_OK(ops_kv_append(&f->ops, &kv, heads, k, v, &batch));
    }
    return kv;
}

/* Rows with a mean and unlike variances. */
static struct tensor take_queries(struct fixture *f, const struct shape *s)
{
    struct tensor q = fixture_3d(f, s->n_rows, s->n_heads, s->dim, 8);
    for (int r = 0; r < s->n_rows; r++)
        for (int i = 0; i < s->n_heads * s->dim; i++) {
            float *x = &fixture_row(q, r)[i];
            *x = *x * (0.3f + (float)(i % 5) * 0.4f) + (float)(i % 7 - 3) * 0.5f;
        }
    return q;
}

static void check_shape(const struct shape *s, int threads, bool rotated)
{
    struct fixture *f = fixture_open(threads, (uint64_t)(s->dim * 100 + s->n_rows));
    struct attention_heads heads;
    struct kv_view kv = fill_cache(f, s, &heads);
    struct tensor q = take_queries(f, s);
    float frequency[64];
    int32_t *position = fixture_take(f, (size_t)s->n_rows * sizeof *position);
    const int n = keys_of(s);
    take_frequencies(frequency, s->dim / 2);
    const double *want = expected_scores(f, s, q, &kv, &heads, rotated ? frequency : NULL);
    for (int i = 0; i < s->n_rows; i++) position[i] = s->first_position + i;
    if (rotated) CHECK_OK(ops_rope(&f->ops, q, position, frequency, 1));
    float *score = fixture_floats(f, (int64_t)s->n_kv_heads * n, 1);
    const struct expected_attention expected = {
        1, s->n_rows, s->first_position, s->sinks, s->future, rotated ? frequency : NULL, s->epsilon, score};
    CHECK_OK(ops_expected_attention(&f->ops, q, &kv, &heads, &expected));
    int wrong = 0;
    for (int i = 0; i < s->n_kv_heads * n; i++) {
        const bool close = fabs((double)score[i] - want[i]) <= 1e-4 * want[i] + 1e-8;
        if ((i % n < s->sinks ? score[i] == INFINITY : close) || wrong++) continue;
        fprintf(stderr, "%d heads of %d, %d rows: score[%d] is %g, expected %g\n", s->n_heads, s->dim, s->n_rows, i,
                (double)score[i], want[i]);
    }
    CHECK(wrong == 0);
    fixture_close(f);
}

static const struct shape shapes[] = {{1, 1, 8, 0, 1, 0, 1, 0},      {2, 1, 16, 0, 9, 4, 5, 0},
                                      {4, 2, 24, 30, 35, 4, 512, 0}, {6, 2, 32, 2, 60, 4, 64, 0.01f},
                                      {8, 1, 64, 0, 300, 4, 512, 0}, {3, 3, 128, 100, 157, 0, 33, 0.5f},
                                      {2, 2, 40, 0, 257, 256, 7, 0}, {4, 4, 16, 512, 1, 512, 100, 0}};

static void test_rotated(void)
{
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) check_shape(&shapes[i], 1 + (int)i % 3, true);
}

static void test_plain(void)
{
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) check_shape(&shapes[i], 1, false);
}

static void test_refused(void)
{
    struct fixture *f = fixture_open(1, 5);
    const struct shape s = {2, 1, 16, 3, 9, 4, 5, 0};
    struct attention_heads heads;
    struct kv_view kv = fill_cache(f, &s, &heads);
    struct tensor q = take_queries(f, &s);
    float score[12];
    const struct expected_attention good = {.slot = 1, .n_rows = 9, .first_position = 3, .future = 5, .score = score};
    struct expected_attention bad = good;
    CHECK_OK(ops_expected_attention(&f->ops, q, &kv, &heads, &good));
    bad.slot = 2;
    CHECK_FAILS(ops_expected_attention(&f->ops, q, &kv, &heads, &bad), ERR_ARG, "slot 2");
    bad = good, bad.sinks = 12;
    CHECK_FAILS(ops_expected_attention(&f->ops, q, &kv, &heads, &bad), ERR_ARG, "before 12");
    bad = good, bad.future = 0;
    CHECK_FAILS(ops_expected_attention(&f->ops, q, &kv, &heads, &bad), ERR_ARG, "future");
    bad = good, bad.score = NULL;
    CHECK_FAILS(ops_expected_attention(&f->ops, q, &kv, &heads, &bad), ERR_ARG, "score");
    bad = good, bad.first_position = 7;
    CHECK_FAILS(ops_expected_attention(&f->ops, q, &kv, &heads, &bad), ERR_ARG, "holds 15 tokens");
    bad = good, bad.n_rows = 8;
    CHECK_FAILS(ops_expected_attention(&f->ops, q, &kv, &heads, &bad), ERR_ARG, "q is");
    fixture_close(f);
}

int main(void)
{
    static const struct check_case cases[] = {{"queries turned to later positions", test_rotated},
                                              {"queries as they are", test_plain},
                                              {"what is refused", test_refused},
                                              {0}};
    return check_run("expected attention", cases);
}
