/* The paged cache: random appends, packs and releases against plain arrays, with the invariant that every page is free
 * or in just one lane after each of them; what an empty stack and a full lane do. */
#include "tests/ops_fixture.h"

enum { SLOTS = 5, KV_HEADS = 3, LAYERS = 2, LANES = KV_HEADS * LAYERS, DIM = 8, LONGEST = 200 };

/* The same cache as plain arrays: tokens are numbers that keys and values are made of. */
struct model {
    int length[SLOTS * LANES];
    int token[SLOTS * LANES][LONGEST];
};

static float element(int token, int lane_of_slot, int d, bool value)
{
    return (float)token + (float)(lane_of_slot * DIM + d) * 0.001f + (value ? 0.5f : 0);
}

static int same_as_model(const struct kv_view *kv, const struct model *m)
{
    for (int lane = 0; lane < SLOTS * LANES; lane++) {
        if (kv->lane_len[lane] != m->length[lane]) return 0;
        for (int i = 0; i < m->length[lane]; i++)
            for (int d = 0; d < DIM; d++)
                if (fixture_key(kv, lane, i)[d] != element(m->token[lane][i], lane % LANES, d, false) ||
                    fixture_value(kv, lane, i)[d] != element(m->token[lane][i], lane % LANES, d, true))
                    return 0;
    }
    return 1;
}

static struct attention_heads heads_of(int layer)
{
    return (struct attention_heads){
        .n_heads = KV_HEADS, .n_kv_heads = KV_HEADS, .head_dim = DIM, .lane = layer * KV_HEADS, .scale = 1};
}

/* Appends to a layer of several slots at once; decode form: one token each and a padding row. */
static void append(struct fixture *f, const struct kv_view *kv, struct model *m, int *next_token, bool decode)
{
    int32_t slot[SLOTS + 1], cu[SLOTS + 2] = {0};
    int layer = fixture_int(f, 0, LAYERS - 1), n_seqs = 0, first = fixture_int(f, 0, SLOTS - 1);
    int count = fixture_int(f, 1, SLOTS);
    for (int i = 0; i < count; i++) {
        int s = (first + i) % SLOTS, n = decode ? 1 : fixture_int(f, 0, 40), longest = 0;
        for (int h = 0; h < KV_HEADS; h++) {
            int length = m->length[s * LANES + layer * KV_HEADS + h];
            longest = length > longest ? length : longest;
        }
        if (longest + n > LONGEST) continue;
        slot[n_seqs] = s;
        cu[n_seqs + 1] = cu[n_seqs] + n;
        n_seqs++;
    }
    if (decode) {
        slot[n_seqs] = -1;
        cu[n_seqs + 1] = cu[n_seqs] + 1;
        n_seqs++;
    }
    int rows = cu[n_seqs];
    struct tensor k = fixture_3d(f, rows, KV_HEADS, DIM, 5), v = fixture_3d(f, rows, KV_HEADS, DIM, 0);
    for (int i = 0; i < n_seqs; i++)
        for (int row = cu[i]; row < cu[i + 1]; row++) {
            int token = (*next_token)++;
            for (int h = 0; h < KV_HEADS; h++) {
                int of_slot = layer * KV_HEADS + h, lane = slot[i] * LANES + of_slot;
                if (slot[i] >= 0) m->token[lane][m->length[lane]++] = token;
                for (int d = 0; d < DIM; d++) {
                    fixture_row(k, row)[h * DIM + d] = element(token, of_slot, d, false);
                    fixture_row(v, row)[h * DIM + d] = element(token, of_slot, d, true);
                }
            }
        }
    struct attention_heads heads = heads_of(layer);
    struct seq_batch batch = {.n_seqs = n_seqs, .n_tokens = rows, .slot = slot};
    if (!decode) batch.cu_seqlens = batch.host_cu_seqlens = cu, batch.host_slot = slot;
    CHECK_OK(ops_kv_append(&f->ops, kv, &heads, k, v, &batch));
}

static void pack(struct fixture *f, const struct kv_view *kv, struct model *m)
{
    int slot = fixture_int(f, 0, SLOTS - 1), lane = fixture_int(f, 0, LANES - 1);
    int n_lanes = fixture_int(f, 0, LANES - lane), stride = LONGEST + fixture_int(f, 0, 3);
    int32_t *keep = fixture_take(f, sizeof(int32_t) * (size_t)(LANES * stride)), n_keep[LANES];
    for (int i = 0; i < n_lanes; i++) {
        int at = slot * LANES + lane + i, n = 0, share = fixture_int(f, 0, 10);
        for (int j = 0; j < m->length[at]; j++)
            if (fixture_int(f, 1, 10) <= share) {
                m->token[at][n] = m->token[at][j];
                keep[i * stride + n++] = j;
            }
        m->length[at] = n_keep[i] = n;
    }
    CHECK_OK(ops_kv_pack(&f->ops, kv, slot, lane, n_lanes, keep, stride, n_keep));
}

static void run_random(int page_size, uint64_t seed)
{
    struct fixture *f = fixture_open(2, seed);
    int max_pages = (LONGEST + page_size - 1) / page_size, next_token = 0;
    struct kv_view kv = fixture_cache(f, SLOTS, LANES, max_pages, SLOTS * LANES * max_pages, page_size, DIM);
    struct model *m = fixture_take(f, sizeof *m);
    for (int step = 0; step < 400; step++) {
        int kind = fixture_int(f, 0, 9);
        if (kind < 3) {
            append(f, &kv, m, &next_token, false);
        } else if (kind < 7) {
            append(f, &kv, m, &next_token, true);
        } else if (kind < 9) {
            pack(f, &kv, m);
        } else {
            int slot = fixture_int(f, 0, SLOTS - 1);
            CHECK_OK(ops_kv_release(&f->ops, &kv, slot));
            for (int i = 0; i < LANES; i++) m->length[slot * LANES + i] = 0;
        }
        CHECK(fixture_pages_ok(&kv));
        CHECK(same_as_model(&kv, m));
    }
    CHECK(*kv.error == 0);
    for (int slot = 0; slot < SLOTS; slot++) CHECK_OK(ops_kv_release(&f->ops, &kv, slot));
    CHECK(*kv.free_count == kv.n_pages);
    CHECK(fixture_pages_ok(&kv));
    fixture_close(f);
}

static void test_random(void)
{
    run_random(16, 1);
    run_random(1, 2);
    run_random(7, 3);
}

/* With the pool or a lane full the error word is set, nothing is written, and the pages stay whole. */
static void test_exhaustion(void)
{
    struct fixture *f = fixture_open(1, 4);
    struct kv_view kv = fixture_cache(f, 2, 1, 3, 4, 4, DIM);
    struct attention_heads heads = {.n_heads = 1, .n_kv_heads = 1, .head_dim = DIM, .scale = 1};
    struct tensor k = fixture_3d(f, 13, 1, DIM, 0);
    int32_t slot[1] = {0}, cu[2] = {0, 12};
    struct seq_batch batch = {1, 12, slot, cu, slot, cu};
    CHECK_OK(ops_kv_append(&f->ops, &kv, &heads, tensor_rows(k, 0, 12), tensor_rows(k, 0, 12), &batch));
    CHECK(*kv.error == 0 && kv.lane_len[0] == 12 && *kv.free_count == 1);
    batch.n_tokens = cu[1] = 1;
    CHECK_OK(ops_kv_append(&f->ops, &kv, &heads, tensor_rows(k, 0, 1), tensor_rows(k, 0, 1), &batch));
    CHECK(*kv.error == KV_ERROR_LANE_FULL && kv.lane_len[0] == 12 && fixture_pages_ok(&kv));
    slot[0] = 1, batch.n_tokens = cu[1] = 5;
    CHECK_OK(ops_kv_append(&f->ops, &kv, &heads, tensor_rows(k, 0, 5), tensor_rows(k, 0, 5), &batch));
    CHECK(*kv.error == (KV_ERROR_LANE_FULL | KV_ERROR_NO_FREE_PAGE) && kv.lane_len[1] == 0 && fixture_pages_ok(&kv));
    CHECK_OK(ops_kv_reset(&f->ops, &kv));
    CHECK(*kv.error == 0 && *kv.free_count == 4);
    /* attention after a failed append stays within its buffers */
    struct tensor out = fixture_3d(f, 5, 1, DIM, 0);
    CHECK_OK(ops_attention_prefill(&f->ops, out, tensor_rows(k, 0, 5), tensor_rows(k, 0, 5), tensor_rows(k, 0, 5),
                                   &batch, &kv, &heads));
    fixture_close(f);
}

static void test_bad_keep(void)
{
    struct fixture *f = fixture_open(1, 5);
    struct kv_view kv = fixture_cache(f, 1, 1, 2, 2, 4, DIM);
    struct attention_heads heads = {.n_heads = 1, .n_kv_heads = 1, .head_dim = DIM, .scale = 1};
    struct tensor k = fixture_3d(f, 5, 1, DIM, 0);
    const int32_t slot[1] = {0}, cu[2] = {0, 5}, up[2] = {1, 5}, twice[2] = {3, 3}, n[1] = {2}, many[1] = {6};
    struct seq_batch batch = {1, 5, slot, cu, slot, cu};
    CHECK_OK(ops_kv_append(&f->ops, &kv, &heads, k, k, &batch));
    CHECK_FAILS(ops_kv_pack(&f->ops, &kv, 0, 0, 1, up, 2, n), ERR_ARG, "keep[1] of lane 0 is 5");
    CHECK_FAILS(ops_kv_pack(&f->ops, &kv, 0, 0, 1, twice, 2, n), ERR_ARG, "keep[1] of lane 0 is 3");
    CHECK_FAILS(ops_kv_pack(&f->ops, &kv, 0, 0, 1, twice, 6, many), ERR_ARG, "keeps 6 entries and holds 5");
    CHECK(kv.lane_len[0] == 5 && fixture_pages_ok(&kv));
    fixture_close(f);
}

int main(void)
{
    return check_run("ops_kv", (struct check_case[]){{"random append, pack, release", test_random},
                                                     {"pool and lane exhausted", test_exhaustion},
                                                     {"keep lists that are none", test_bad_keep},
                                                     {0}});
}
