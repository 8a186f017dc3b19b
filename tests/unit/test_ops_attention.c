/* Attention against softmax in double: images, prompt chunks over pages, decode over packed lanes; GQA groups 1 to 16,
 * head dimensions that are no powers of two, strided views. */
#include "tests/ops_fixture.h"

/* out = softmax(scale * q . keys) values over n keys given by pointers. */
static void want_attention(float *out, const float *q, const float **key, const float **value, int n, int dim,
                           double scale)
{
    double *p = malloc(sizeof *p * (size_t)(n + 1)), top = -INFINITY, sum = 0;
    for (int j = 0; j < n; j++) {
        p[j] = 0;
        for (int d = 0; d < dim; d++) p[j] += (double)q[d] * (double)key[j][d];
        p[j] *= scale;
        top = p[j] > top ? p[j] : top;
    }
    for (int j = 0; j < n; j++) sum += p[j] = exp(p[j] - top);
    for (int d = 0; d < dim; d++) {
        double total = 0;
        for (int j = 0; j < n; j++) total += p[j] / sum * (double)value[j][d];
        out[d] = (float)total;
    }
    free(p);
}

static void compare_vision(struct fixture *f, int images, int tokens, int heads, int dim, int gap)
{
    struct tensor q = fixture_3d(f, images * tokens, heads, dim, gap),
                  k = fixture_3d(f, images * tokens, heads, dim, gap);
    struct tensor v = fixture_3d(f, images * tokens, heads, dim, 0),
                  out = fixture_3d(f, images * tokens, heads, dim, 1);
    const float **key = fixture_take(f, sizeof *key * (size_t)tokens),
                **value = fixture_take(f, sizeof *key * (size_t)tokens);
    float want[256];
    CHECK_OK(ops_attention_vision(&f->ops, out, q, k, v, images, 0.2f));
    for (int row = 0; row < images * tokens; row += 1 + tokens / 7)
        for (int h = 0; h < heads; h++) {
            for (int j = 0; j < tokens; j++) {
                key[j] = fixture_row(k, row / tokens * tokens + j) + h * dim;
                value[j] = fixture_row(v, row / tokens * tokens + j) + h * dim;
            }
            want_attention(want, fixture_row(q, row) + h * dim, key, value, tokens, dim, 0.2);
            CHECK_CLOSE(fixture_row(out, row) + h * dim, want, dim, 1e-5);
        }
}

static void test_vision(void)
{
    struct fixture *f = fixture_open(2, 1);
    compare_vision(f, 2, 577, 3, 64, 17);
    compare_vision(f, 1, 1, 1, 72, 0);
    compare_vision(f, 3, 65, 5, 80, 3);
    compare_vision(f, 1, 257, 2, 128, 0);
    fixture_close(f);
}

struct shape {
    int n_kv_heads, group, dim, page_size;
};

/* Chunks of several sequences, twice, so that the second finds tokens in pages; one slot is packed in between. */
static void compare_prefill(struct fixture *f, struct shape s, const int *lengths, int n_seqs)
{
    enum { SLOTS = 4 };
    const int n_heads = s.n_kv_heads * s.group, max_pages = 700 / s.page_size + 1;
    struct kv_view kv =
        fixture_cache(f, SLOTS, s.n_kv_heads + 1, max_pages, SLOTS * s.n_kv_heads * max_pages, s.page_size, s.dim);
    struct attention_heads heads = {n_heads, s.n_kv_heads, s.dim, 1, 1.0f / sqrtf((float)s.dim)};
    const float *key[1400], *value[1400];
    int32_t slot[SLOTS], cu[SLOTS + 1] = {0};
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < n_seqs; i++) {
            slot[i] = (i + 2) % SLOTS;
            cu[i + 1] = cu[i] + lengths[(i + round) % n_seqs];
        }
        int n = cu[n_seqs];
        struct seq_batch batch = {n_seqs, n, slot, cu, slot, cu};
        struct tensor q = fixture_3d(f, n, n_heads, s.dim, 9), k = fixture_3d(f, n, s.n_kv_heads, s.dim, 4);
        struct tensor v = fixture_3d(f, n, s.n_kv_heads, s.dim, 0), out = fixture_3d(f, n, n_heads, s.dim, 0);
        CHECK_OK(ops_kv_append(&f->ops, &kv, &heads, k, v, &batch));
        CHECK_OK(ops_attention_prefill(&f->ops, out, q, k, v, &batch, &kv, &heads));
        for (int i = 0; i < n_seqs; i++)
            for (int row = cu[i]; row < cu[i + 1]; row += 1 + (cu[i + 1] - cu[i]) / 5)
                for (int h = 0; h < n_heads; h += 1 + n_heads / 4) {
                    int kv_head = h / s.group, lane = slot[i] * kv.lanes_per_slot + 1 + kv_head, seen = 0;
                    int past = kv.lane_len[lane] - (cu[i + 1] - cu[i]);
                    for (; seen < past; seen++)
                        key[seen] = fixture_key(&kv, lane, seen), value[seen] = fixture_value(&kv, lane, seen);
                    for (int j = cu[i]; j <= row; j++, seen++) {
                        key[seen] = fixture_row(k, j) + kv_head * s.dim;
                        value[seen] = fixture_row(v, j) + kv_head * s.dim;
                    }
                    float want[256];
                    want_attention(want, fixture_row(q, row) + h * s.dim, key, value, seen, s.dim, (double)heads.scale);
                    CHECK_CLOSE(fixture_row(out, row) + h * s.dim, want, s.dim, 1e-5);
                }
        if (kv.lane_len[2 * kv.lanes_per_slot + 1] < 4) continue;
        int32_t keep[2] = {1, 3}, n_keep[1] = {2};
        for (int h = 0; h < s.n_kv_heads; h++) CHECK_OK(ops_kv_pack(&f->ops, &kv, 2, 1 + h, 1, keep, 2, n_keep));
    }
}

static void test_prefill(void)
{
    struct fixture *f = fixture_open(2, 2);
    compare_prefill(f, (struct shape){1, 1, 64, 16}, (int[]){1}, 1);
    compare_prefill(f, (struct shape){3, 3, 64, 16}, (int[]){64, 1, 130}, 3);
    compare_prefill(f, (struct shape){2, 16, 80, 16}, (int[]){65, 31}, 2);
    compare_prefill(f, (struct shape){5, 1, 72, 7}, (int[]){257, 2, 0, 100}, 4);
    compare_prefill(f, (struct shape){1, 4, 96, 16}, (int[]){300}, 1);
    compare_prefill(f, (struct shape){2, 2, 128, 32}, (int[]){48, 47}, 2);
    fixture_close(f);
}

/* The same prompt in one piece and in chunks, alone and beside another sequence: the same bits. */
static void test_chunks(void)
{
    enum { N = 300, KV = 2, GROUP = 3, DIM = 72, HEADS = KV * GROUP };
    struct fixture *f = fixture_open(2, 4);
    struct attention_heads heads = {HEADS, KV, DIM, 0, 0.11f};
    struct kv_view kv = fixture_cache(f, 3, KV, 30, 3 * KV * 30, 16, DIM);
    struct tensor q = fixture_3d(f, N, HEADS, DIM, 5), k = fixture_3d(f, N, KV, DIM, 0),
                  v = fixture_3d(f, N, KV, DIM, 0);
    struct tensor whole = fixture_3d(f, N, HEADS, DIM, 0), parts = fixture_3d(f, N, HEADS, DIM, 0);
    const int32_t slot[2] = {2, 0}, cu[2] = {0, N};
    struct seq_batch batch = {1, N, slot, cu, slot, cu};
    CHECK_OK(ops_kv_append(&f->ops, &kv, &heads, k, v, &batch));
    CHECK_OK(ops_attention_prefill(&f->ops, whole, q, k, v, &batch, &kv, &heads));
    for (int size = 37; size < N; size += 100) {
        CHECK_OK(ops_kv_reset(&f->ops, &kv));
        for (int at = 0, n; at < N; at += n) { /* rows at .. of slot 2, and once more as the tokens of slot 0 */
            n = N - at < size ? N - at : size;
            const int32_t two[3] = {0, n - n / 3, n}, only[2] = {0, n};
            struct seq_batch chunk = {1, n, slot, only, slot, only}, both = {2, n, slot, two, slot, two};
            struct tensor qc = tensor_rows(q, at, n), kc = tensor_rows(k, at, n), vc = tensor_rows(v, at, n);
            bool shared = at + n == N && n / 3 > 0;
            CHECK_OK(ops_kv_append(&f->ops, &kv, &heads, kc, vc, shared ? &both : &chunk));
            CHECK_OK(ops_attention_prefill(&f->ops, tensor_rows(parts, at, n), qc, kc, vc, shared ? &both : &chunk, &kv,
                                           &heads));
            CHECK(fixture_same(fixture_row(parts, at), fixture_row(whole, at),
                               sizeof(float) * (size_t)((shared ? n - n / 3 : n) * HEADS * DIM)));
        }
    }
    fixture_close(f);
}

/* Decode over lanes of random length that were packed to a random set, in a batch with a padding row. */
static void compare_decode(struct fixture *f, struct shape s, int longest)
{
    enum { SLOTS = 3, ROWS = 4 };
    const int n_heads = s.n_kv_heads * s.group, max_pages = longest / s.page_size + 1;
    struct kv_view kv =
        fixture_cache(f, SLOTS, s.n_kv_heads, max_pages, SLOTS * s.n_kv_heads * max_pages, s.page_size, s.dim);
    struct attention_heads heads = {n_heads, s.n_kv_heads, s.dim, 0, 0.1f};
    int32_t slot[ROWS] = {2, -1, 0, 1};
    for (int i = 0; i < SLOTS; i++) {
        int n = i == 0 ? longest : fixture_int(f, 1, longest);
        int32_t cu[2] = {0, n}, one[1] = {i};
        struct tensor k = fixture_3d(f, n, s.n_kv_heads, s.dim, 0), v = fixture_3d(f, n, s.n_kv_heads, s.dim, 0);
        CHECK_OK(ops_kv_append(&f->ops, &kv, &heads, k, v, &(struct seq_batch){1, n, one, cu, one, cu}));
        for (int h = 0; h < s.n_kv_heads && i > 0; h++) {
            int32_t *keep = fixture_take(f, sizeof(int32_t) * (size_t)n), n_keep[1] = {0};
            for (int j = 0; j < n; j++)
                if (fixture_int(f, 0, 2)) keep[n_keep[0]++] = j;
            CHECK_OK(ops_kv_pack(&f->ops, &kv, i, h, 1, keep, n, n_keep));
        }
    }
    struct tensor q = fixture_3d(f, ROWS, n_heads, s.dim, 3), out = fixture_3d(f, ROWS, n_heads, s.dim, 2);
    CHECK_OK(ops_attention_decode(&f->ops, out, q, &(struct seq_batch){.n_seqs = ROWS, .n_tokens = ROWS, .slot = slot},
                                  &kv, &heads));
    const float **key = fixture_take(f, sizeof *key * (size_t)longest);
    const float **value = fixture_take(f, sizeof *key * (size_t)longest);
    for (int row = 0; row < ROWS; row++) {
        float want[256] = {0}, *got = fixture_row(out, row);
        struct tensor alone = fixture_3d(f, 1, n_heads, s.dim, 0);
        struct seq_batch single = {.n_seqs = 1, .n_tokens = 1, .slot = slot + row};
        CHECK_OK(ops_attention_decode(&f->ops, alone, tensor_rows(q, row, 1), &single, &kv, &heads));
        CHECK(fixture_same(alone.data, got, sizeof(float) * (size_t)(n_heads * s.dim)));
        for (int h = 0; h < n_heads; h++) {
            int lane = slot[row] * s.n_kv_heads + h / s.group, n = slot[row] < 0 ? 0 : kv.lane_len[lane];
            for (int j = 0; j < n; j++) /* in reverse: attention is over a set */
                key[j] = fixture_key(&kv, lane, n - 1 - j), value[j] = fixture_value(&kv, lane, n - 1 - j);
            if (n) want_attention(want, fixture_row(q, row) + h * s.dim, key, value, n, s.dim, (double)heads.scale);
            if (!n) memset(want, 0, sizeof want);
            CHECK_CLOSE(got + h * s.dim, want, s.dim, 1e-5);
        }
    }
}

static void test_decode(void)
{
    struct fixture *f = fixture_open(2, 3);
    static const int groups[] = {1, 2, 3, 4, 5, 7, 8, 16}, dims[] = {64, 72, 80, 96, 128};
    for (int i = 0; i < 8; i++)
        for (int longest = 1; longest < 1000; longest = longest * 6 + 1)
            compare_decode(f, (struct shape){1 + i % 3, groups[i], dims[(i + longest) % 5], i == 5 ? 5 : 16}, longest);
    fixture_close(f);
}

int main(void)
{
    return check_run("ops_attention", (struct check_case[]){{"images", test_vision},
                                                            {"prompt chunks", test_prefill},
                                                            {"however a prompt is chunked", test_chunks},
                                                            {"decode over packed lanes", test_decode},
                                                            {0}});
}
