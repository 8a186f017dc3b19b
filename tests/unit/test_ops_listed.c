/* test_ops_listed - decode attention over listed entries on the CPU: against a softmax over the same set in double,
 * whatever the order of the list; whole lanes bit for bit as ops_attention_decode has them; padding; what is refused.
 */
#include "tests/ops_fixture.h"

struct shape {
    int rows, n_kv_heads, group, dim, longest;
};

/* A layer that is the second of two in a cache whose lanes have just any lengths; each row its own slot. */
struct layer {
    struct fixture *f;
    struct kv_view kv;
    struct attention_heads heads;
    struct tensor q;
    int32_t slot[16];
    struct seq_batch batch;
};

static void open_layer(struct layer *x, struct shape s, uint64_t seed)
{
    struct fixture *f = x->f = fixture_open(3, seed);
    const int lanes = 2 * s.n_kv_heads, pages = (s.longest + 15) / 16 + 1;
    x->kv = fixture_cache(f, s.rows, lanes, pages, s.rows * lanes * pages, 16, s.dim);
    x->heads =
        (struct attention_heads){s.n_kv_heads * s.group, s.n_kv_heads, s.dim, s.n_kv_heads, 1.0f / sqrtf((float)s.dim)};
    for (int r = 0; r < s.rows; r++) {
        const int n = r ? fixture_int(f, 1, s.longest) : s.longest;
        int32_t slot = x->slot[r] = (r * 5 + 3) % s.rows, cu[2] = {0, n};
        struct seq_batch one = {1, n, &slot, cu, &slot, cu};
        CHECK_OK(ops_kv_append(&f->ops, &x->kv, &x->heads, fixture_3d(f, n, s.n_kv_heads, s.dim, 0),
                               fixture_3d(f, n, s.n_kv_heads, s.dim, 0), &one));
    }
    x->q = fixture_3d(f, s.rows, (int64_t)s.n_kv_heads * s.group, s.dim, 8);
    x->batch = (struct seq_batch){.n_seqs = s.rows, .n_tokens = s.rows, .slot = x->slot};
}

static int lane_of(const struct layer *x, int row, int head)
{
    return x->slot[row] * x->kv.lanes_per_slot + x->heads.lane + head;
}

/* `n` entries of each lane, or as many as it has, drawn without replacement in random order. own: each query head's. */
static struct kv_list draw_lists(struct layer *x, int stride, int least, bool own)
{
    const int heads = own ? x->heads.n_heads : x->heads.n_kv_heads, lists = x->batch.n_seqs * heads;
    int32_t *entry = fixture_take(x->f, sizeof *entry * (size_t)(lists * stride));
    int32_t *count = fixture_take(x->f, sizeof *count * (size_t)lists);
    int32_t *deck = fixture_take(x->f, sizeof *deck * (size_t)(x->kv.max_pages * x->kv.page_size));
    for (int i = 0; i < lists; i++) {
        const int length = x->kv.lane_len[lane_of(x, i / heads, i % heads * x->heads.n_kv_heads / heads)];
        const int most = length < stride ? length : stride;
        count[i] = fixture_int(x->f, least < most ? least : most, most);
        for (int j = 0; j < length; j++) deck[j] = j;
        for (int j = 0; j < stride; j++) {
            const int other = j < length ? fixture_int(x->f, j, length - 1) : 0, drawn = deck[other];
            if (j < length) deck[other] = deck[j], deck[j] = drawn;
            entry[i * stride + j] = j < count[i] ? drawn : 1 << 30; /* beyond the count nobody may look */
        }
    }
    return (struct kv_list){entry, count, stride, NULL, NULL, own};
}

/* The reference: query head h of a row over its list, in double. */
static void attend(const struct layer *x, const struct kv_list *list, int row, int h, double *out)
{
    const int dim = x->kv.head_dim, group = x->heads.n_heads / x->heads.n_kv_heads, lane = lane_of(x, row, h / group);
    const int i = list->per_query_head ? row * x->heads.n_heads + h : row * x->heads.n_kv_heads + h / group;
    const int n = list->count[i];
    const int32_t *entry = list->entry + (int64_t)i * list->stride;
    const float *q = fixture_row(x->q, row) + h * dim;
    double top = -INFINITY, sum = 0;
    double *s = fixture_take(x->f, sizeof *s * (size_t)(n + 1));
    for (int j = 0; j < n; j++) {
        for (int d = 0; d < dim; d++) s[j] += (double)q[d] * (double)fixture_key(&x->kv, lane, entry[j])[d];
        s[j] *= (double)x->heads.scale;
        top = s[j] > top ? s[j] : top;
    }
    memset(out, 0, sizeof *out * (size_t)dim);
    for (int j = 0; j < n; j++) {
        const double p = exp(s[j] - top);
        sum += p;
        for (int d = 0; d < dim; d++) out[d] += p * (double)fixture_value(&x->kv, lane, entry[j])[d];
    }
    for (int d = 0; d < dim && n; d++) out[d] /= sum;
}

static void compare_lists(struct shape s, int stride, int least, uint64_t seed, bool own)
{
    struct layer x;
    double want[128], worst = 0;
    open_layer(&x, s, seed);
    struct kv_list list = draw_lists(&x, stride, least, own);
    struct tensor out = fixture_3d(x.f, s.rows, x.heads.n_heads, s.dim, 4);
    CHECK_OK(ops_attention_decode_listed(&x.f->ops, out, x.q, &x.batch, &x.kv, &x.heads, &list));
    for (int r = 0; r < s.rows; r++)
        for (int h = 0; h < x.heads.n_heads; h++) {
            attend(&x, &list, r, h, want);
            for (int d = 0; d < s.dim; d++) {
                const double off = fabs((double)fixture_row(out, r)[h * s.dim + d] - want[d]);
                worst = off > worst || off != off ? off : worst;
            }
        }
    CHECK(worst < 2e-5);
    fixture_close(x.f);
}

static void compare(struct shape s, int stride, int least, uint64_t seed)
{
    compare_lists(s, stride, least, seed, false);
    compare_lists(s, stride, least, seed, true);
}

static void test_lists(void)
{
    static const struct shape shapes[] = {{1, 1, 1, 8, 40},    {3, 2, 4, 64, 300},  {2, 3, 3, 72, 90},
                                          {5, 1, 16, 80, 130}, {2, 2, 1, 128, 700}, {4, 2, 2, 96, 257},
                                          {1, 5, 7, 16, 33}};
    for (int i = 0; i < 7; i++) {
        compare(shapes[i], 1 + shapes[i].longest / 3, 1, 10 + (uint64_t)i);
        compare(shapes[i], shapes[i].longest, 0, 20 + (uint64_t)i);           /* some of them empty: out 0 */
        compare(shapes[i], shapes[i].longest + 9, 1 << 20, 30 + (uint64_t)i); /* all entries, in another order */
    }
}

/* Whole lanes, by count -1 and by the list of all entries in their order. */
static void test_whole(void)
{
    struct layer x;
    open_layer(&x, (struct shape){5, 2, 3, 64, 600}, 3);
    const int lists = 10, stride = 600;
    int32_t *entry = fixture_take(x.f, sizeof *entry * (size_t)(lists * stride)), count[10];
    struct tensor want = fixture_3d(x.f, 5, 6, 64, 0), out = fixture_3d(x.f, 5, 6, 64, 0);
    struct kv_list list = {entry, count, 1, NULL, NULL, false};
    for (int i = 0; i < lists; i++) count[i] = -1;
    CHECK_OK(ops_attention_decode(&x.f->ops, want, x.q, &x.batch, &x.kv, &x.heads));
    CHECK_OK(ops_attention_decode_listed(&x.f->ops, out, x.q, &x.batch, &x.kv, &x.heads, &list));
    CHECK(fixture_same(out.data, want.data, tensor_bytes(want)));
    for (int i = 0; i < lists; i++) {
        count[i] = x.kv.lane_len[lane_of(&x, i / 2, i % 2)];
        for (int j = 0; j < count[i]; j++) entry[i * stride + j] = j;
    }
    list.stride = stride;
    memset(out.data, 0, tensor_bytes(out));
    CHECK_OK(ops_attention_decode_listed(&x.f->ops, out, x.q, &x.batch, &x.kv, &x.heads, &list));
    CHECK_CLOSE((float *)out.data, (float *)want.data, tensor_count(want), 1e-6);
    fixture_close(x.f);
}

/* Query heads that have the same list each for themselves, some of them the whole lane: bit for bit as with one list
 * for their KV head. */
static void test_own(void)
{
    struct layer x;
    open_layer(&x, (struct shape){5, 2, 3, 64, 600}, 5);
    enum { STRIDE = 400, KV_HEADS = 2, HEADS = 6, ROWS = 5 };
    struct kv_list shared = draw_lists(&x, STRIDE, 0, false);
    int32_t *count = fixture_take(x.f, sizeof *count * ROWS * HEADS);
    int32_t *entry = fixture_take(x.f, sizeof *entry * ROWS * HEADS * STRIDE);
    ((int32_t *)(uintptr_t)shared.count)[3] = -1;
    x.slot[2] = -1;
    for (int i = 0; i < ROWS * HEADS; i++) {
        const int from = i / HEADS * KV_HEADS + i % HEADS / (HEADS / KV_HEADS);
        count[i] = shared.count[from];
        memcpy(entry + i * STRIDE, shared.entry + from * STRIDE, STRIDE * sizeof *entry);
    }
    const struct kv_list own = {entry, count, STRIDE, NULL, NULL, true};
    struct tensor want = fixture_3d(x.f, ROWS, HEADS, 64, 0), out = fixture_3d(x.f, ROWS, HEADS, 64, 4);
    CHECK_OK(ops_attention_decode_listed(&x.f->ops, want, x.q, &x.batch, &x.kv, &x.heads, &shared));
    CHECK_OK(ops_attention_decode_listed(&x.f->ops, out, x.q, &x.batch, &x.kv, &x.heads, &own));
    for (int r = 0; r < ROWS; r++)
        CHECK(fixture_same(fixture_row(out, r), fixture_row(want, r), HEADS * 64 * sizeof(float)));
    fixture_close(x.f);
}

/* Entries that no list names may hold anything; padding rows get zeros. */
static void test_not_read(void)
{
    struct layer x;
    open_layer(&x, (struct shape){4, 2, 2, 32, 100}, 4);
    struct kv_list list = draw_lists(&x, 20, 1, false);
    struct tensor out = fixture_3d(x.f, 4, 4, 32, 0);
    x.slot[1] = -1, x.slot[3] = 99;
    for (int r = 0; r < 4; r += 2)
        for (int h = 0; h < 2; h++) {
            const int lane = lane_of(&x, r, h), i = r * 2 + h;
            for (int e = 0; e < x.kv.lane_len[lane]; e++) {
                bool named = false;
                for (int j = 0; j < list.count[i]; j++) named |= list.entry[i * 20 + j] == e;
                if (named) continue;
                ((float *)fixture_key(&x.kv, lane, e))[3] = NAN;
                ((float *)fixture_value(&x.kv, lane, e))[5] = NAN;
            }
        }
    CHECK_OK(ops_attention_decode_listed(&x.f->ops, out, x.q, &x.batch, &x.kv, &x.heads, &list));
    for (int r = 0; r < 4; r++)
        for (int i = 0; i < 4 * 32; i++) {
            const float got = fixture_row(out, r)[i];
            CHECK(r % 2 ? got == 0 : isfinite(got) && got != 0);
        }
    list.stride = 0;
    CHECK_FAILS(ops_attention_decode_listed(&x.f->ops, out, x.q, &x.batch, &x.kv, &x.heads, &list), ERR_ARG,
                "lists of 0 entries");
    fixture_close(x.f);
}

int main(void)
{
    static const struct check_case cases[] = {{"lists in any order", test_lists},
                                              {"whole lanes", test_whole},
                                              {"lists of each query head", test_own},
                                              {"what is not named, padding, refusals", test_not_read},
                                              {0}};
    return check_run("attention over lists", cases);
}
