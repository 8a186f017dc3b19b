/* CUDA's expected attention against the CPU's on random shapes: every head dimension, prompts from one row on, rows of
 * the whole prompt or of its end, sinks among them or not, rotated queries or queries as they are; a KV head alone gets
 * the bits that it gets beside others; and how long it takes, in print. */
#include "tests/cuda/cuda_cache.h"

enum { PAGE = 16 };

struct shape {
    int n_kv_heads, group, dim, first_position, n_rows, sinks, future;
    bool rotated;
    float epsilon;
};

/* The second of two slots and of two layers. */
struct layer {
    struct cache c;
    struct attention_heads heads;
    struct twin q;
    struct pair frequency, score;
    struct expected_attention gpu, cpu;
    int n_keys;
};

static struct layer take_layer(struct cuda_fixture *f, const struct shape *s)
{
    struct layer x = {
        .heads = {s->n_kv_heads * s->group, s->n_kv_heads, s->dim, s->n_kv_heads, 1.0f / sqrtf((float)s->dim)},
        .n_keys = s->first_position + s->n_rows};
    const int pages = x.n_keys / PAGE + 2, lanes = 2 * s->n_kv_heads;
    float frequency[128];
    x.c = cache_take(f, 2, lanes, pages, 2 * lanes * pages, PAGE, s->dim, STALE_NAN);
    for (int done = 0, n; done < x.n_keys; done += n) {
        n = x.n_keys - done < 301 ? x.n_keys - done : 301;
        cache_fill(f, &x.c, &x.heads, 1, n); /* pages of both slots by turns */
        cache_fill(f, &x.c, &x.heads, 0, n);
    }
    x.q = twin_3d(f, s->n_rows, x.heads.n_heads, s->dim, 8, 1);
    for (int r = 0; r < s->n_rows; r++)
        for (int i = 0; i < x.heads.n_heads * s->dim; i++) {
            float *q = &fixture_row(x.q.cpu, r)[i];
            *q = cuda_round(*q * (0.3f + (float)(i % 5) * 0.4f) + (float)(i % 7 - 3) * 0.5f, f->dtype);
        }
    twin_send(f, x.q, true);
    for (int i = 0; i < s->dim / 2; i++) frequency[i] = powf(10000, -2 * (float)i / (float)s->dim);
    x.frequency = pair_of(f, frequency, (size_t)(s->dim / 2) * sizeof(float));
    x.score = pair_of(f, NULL, (size_t)s->n_kv_heads * (size_t)x.n_keys * sizeof(float));
    x.cpu = (struct expected_attention){.slot = 1,
                                        .n_rows = s->n_rows,
                                        .first_position = s->first_position,
                                        .sinks = s->sinks,
                                        .future = s->future,
                                        .inverse_frequency = s->rotated ? x.frequency.cpu : NULL,
                                        .epsilon = s->epsilon,
                                        .score = x.score.cpu};
    x.gpu = x.cpu;
    x.gpu.inverse_frequency = s->rotated ? x.frequency.gpu : NULL;
    x.gpu.score = x.score.gpu;
    return x;
}

/* Scores of one KV head: near by themselves, or next to nothing beside the head's largest. */
static void compare_head(struct cuda_fixture *f, const struct layer *x, int head, const float *got, const float *want)
{
    float most = 0;
    for (int i = x->cpu.sinks; i < x->n_keys; i++) most = fmaxf(most, want[i]);
    EXPECT(f, most > 0 && most < INFINITY);
    for (int i = 0; i < x->n_keys; i++) {
        const float distance = fabsf(got[i] - want[i]);
        if (i < x->cpu.sinks ? got[i] == INFINITY : distance <= 1e-3f * want[i] + 1e-7f * most) continue;
        cuda_wrong(f, "score of key %d of head %d is %g, expected %g", i, head, (double)got[i],
                   (double)(i < x->cpu.sinks ? INFINITY : want[i]));
        return;
    }
}

/* Each KV head as the only one of its rank. */
static void compare_alone(struct cuda_fixture *f, const struct layer *x, const float *together)
{
    const int group = x->heads.n_heads / x->heads.n_kv_heads;
    const size_t bytes = (size_t)x->n_keys * sizeof(float);
    struct pair score = pair_of(f, NULL, bytes);
    for (int h = 0; h < x->heads.n_kv_heads; h++) {
        struct attention_heads heads = x->heads;
        struct expected_attention one = x->gpu;
        struct tensor q = x->q.gpu;
        heads.n_heads = group, heads.n_kv_heads = 1, heads.lane += h;
        q.dim[1] = group;
        q.data = (char *)q.data + (size_t)(h * group * heads.head_dim) * dtype_size(q.dtype);
        one.score = score.gpu;
        RUN(f, ops_expected_attention(&f->gpu, q, &x->c.gpu, &heads, &one));
        EXPECT(f, memcmp(pair_fetch(f, score), together + (size_t)h * (size_t)x->n_keys, bytes) == 0);
    }
}

static void compare(struct cuda_fixture *f, const struct shape *s)
{
    cuda_what(f, "expected attention: %d KV heads of %d, dim %d, %d rows from %d on, %d sinks, %d future%s",
              s->n_kv_heads, s->group, s->dim, s->n_rows, s->first_position, s->sinks, s->future,
              s->rotated ? ", rotated" : "");
    struct layer x = take_layer(f, s);
    RUN(f, ops_expected_attention(&f->gpu, x.q.gpu, &x.c.gpu, &x.heads, &x.gpu));
    RUN(f, ops_expected_attention(&f->cpu->ops, x.q.cpu, &x.c.cpu, &x.heads, &x.cpu));
    const float *got = pair_fetch(f, x.score), *want = x.score.cpu;
    for (int h = 0; h < s->n_kv_heads; h++)
        compare_head(f, &x, h, got + (int64_t)h * x.n_keys, want + (int64_t)h * x.n_keys);
    compare_alone(f, &x, got);
    cuda_clear(f);
}

static void test_shapes(void)
{
    static const int rows[] = {1, 2, 15, 17, 64, 65, 127, 300, 513, 1100};
    struct cuda_fixture *f = cuda_begin(21);
    for (int i = 0, dim = 8; dim <= 128; dim += 8, i++) {
        const int n = rows[i % 10], first = i % 4 == 1 ? 37 * i : 0, keys = first + n;
        struct shape s = {1 + i % 3, 1 + i * 3 % 8, dim, first, n, i % 3 ? 4 : 0, 1 + i * 97 % 600, i % 5 != 2, 0};
        if (s.sinks >= keys) s.sinks = keys - 1;
        if (i % 6 == 5) s.sinks = first + n / 2, s.epsilon = 0.01f;
        if (f->effort == SOME && i % 3 == 1) continue;
        if (f->effort == QUICK && i % 6 != 3) continue;
        compare(f, &s);
    }
    cuda_end(f);
}

static void test_long(void)
{
    struct cuda_fixture *f = cuda_begin(22);
    const struct shape whole = {2, 4, 128, 0, 4096, 4, 512, true, 0}, end = {2, 7, 96, 3500, 512, 4, 512, true, 0};
    if (f->effort == ALL) compare(f, &whole);
    if (f->effort > QUICK) compare(f, &end);
    cuda_end(f);
}

static void test_time(void)
{
    struct cuda_fixture *f = cuda_begin(23);
    const struct shape s = {8, 4, 128, 0, 4096, 4, 512, true, 0};
    enum { TIMES = 20 };
    if (f->effort == ALL) {
        cuda_what(f, "expected attention, time");
        struct layer x = take_layer(f, &s);
        RUN(f, ops_expected_attention(&f->gpu, x.q.gpu, &x.c.gpu, &x.heads, &x.gpu));
        RUN(f, ops_finish(&f->gpu));
        double start = clock_seconds();
        for (int i = 0; i < TIMES; i++) RUN(f, ops_expected_attention(&f->gpu, x.q.gpu, &x.c.gpu, &x.heads, &x.gpu));
        RUN(f, ops_finish(&f->gpu));
        printf("32 heads of 128 over 8 KV heads, 4096 rows and keys: %.1f us a layer; ",
               (clock_seconds() - start) / TIMES * 1e6);
    }
    cuda_end(f);
}

static void test_refused(void)
{
    struct cuda_fixture *f = cuda_begin(24);
    const struct shape s = {1, 1, 136, 0, 20, 4, 5, false, 0};
    cuda_what(f, "expected attention over heads of 136");
    struct layer x = take_layer(f, &s);
    EXPECT(f, ops_expected_attention(&f->gpu, x.q.gpu, &x.c.gpu, &x.heads, &x.gpu) == ERR_UNSUPPORTED);
    EXPECT(f, strstr(status_message(), "136 dimensions") != NULL);
    cuda_end(f);
}

int main(int argc, char **argv)
{
    static const struct check_case cases[] = {{"every head dimension", test_shapes},
                                              {"long prompts", test_long},
                                              {"time", test_time},
                                              {"what is refused", test_refused},
                                              {0}};
    return cuda_main("expected attention on CUDA", cases, argc, argv);
}
