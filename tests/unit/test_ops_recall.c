/* test_ops_recall - the CPU's ops for tokens in host memory: what lists leave out, the copy there, clusters of listed
 * keys, attention over both memories, recent tokens and their counts, and what is refused. */
#include "tests/ops_fixture.h"

enum { SLOTS = 2, LANES = 3, DIM = 16, LENGTH = 70 };

struct memories {
    struct fixture *f;
    struct kv_view kv, host, before; /* before: the lanes as they were */
};

static struct memories open_memories(uint64_t seed)
{
    struct memories m = {.f = fixture_open(2, seed)};
    const int pages = LENGTH / 16 + 2;
    int32_t slot = 1, cu[2] = {0, LENGTH};
    const struct seq_batch batch = {1, LENGTH, &slot, cu, &slot, cu};
    const struct attention_heads heads = {LANES, LANES, DIM, 0, 1};
    struct tensor k = fixture_3d(m.f, LENGTH, LANES, DIM, 0), v = fixture_3d(m.f, LENGTH, LANES, DIM, 0);
    m.kv = fixture_cache(m.f, SLOTS, LANES, pages, SLOTS * LANES * pages, 16, DIM);
    m.before = fixture_cache(m.f, SLOTS, LANES, pages, SLOTS * LANES * pages, 16, DIM);
    m.host = fixture_cache(m.f, SLOTS, LANES, pages + 2, LANES * pages, 16, DIM);
    CHECK_OK(ops_kv_append(&m.f->ops, &m.kv, &heads, k, v, &batch));
    CHECK_OK(ops_kv_append(&m.f->ops, &m.before, &heads, k, v, &batch));
    return m;
}

/* Keeps every third entry of lane 0, none of lane 1, all of lane 2. */
static void split(struct memories *m, int32_t *other, int32_t *n_other)
{
    int32_t keep[LANES * LENGTH] = {0}, n_keep[LANES] = {0};
    for (int i = 0; i < LANES; i++) {
        for (int j = 0; j < LENGTH; j++)
            if (i == 2 || (i == 0 && j % 3 == 0)) keep[i * LENGTH + n_keep[i]++] = j;
        n_other[i] = LENGTH - n_keep[i];
    }
    CHECK_OK(ops_list_others(&m->f->ops, other, LENGTH, keep, LENGTH, n_keep, LENGTH, LANES));
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < n_other[i]; j++) CHECK(other[i * LENGTH + j] == (i ? j : j / 2 * 3 + 1 + j % 2));
    CHECK_OK(ops_kv_split(&m->f->ops, &m->kv, &m->host, 1, 0, LANES, other, LENGTH, n_other));
    CHECK_OK(ops_kv_pack(&m->f->ops, &m->kv, 1, 0, LANES, keep, LENGTH, n_keep));
}

static void test_split(void)
{
    struct memories m = open_memories(1);
    int32_t other[LANES * LENGTH], n_other[LANES];
    split(&m, other, n_other);
    CHECK(fixture_pages_ok(&m.host) && fixture_pages_ok(&m.kv) && *m.host.error == 0);
    for (int i = 0; i < LANES; i++) {
        const int lane = LANES + i;
        CHECK(m.host.lane_len[lane] == n_other[i] && m.kv.lane_len[lane] == LENGTH - n_other[i]);
        for (int j = 0; j < n_other[i]; j++) {
            const int was = other[i * LENGTH + j];
            CHECK(fixture_same(fixture_key(&m.host, lane, j), fixture_key(&m.before, lane, was), DIM * sizeof(float)));
            CHECK(fixture_same(fixture_value(&m.host, lane, j), fixture_value(&m.before, lane, was),
                               DIM * sizeof(float)));
        }
    }
    /* A lane that holds something takes nothing; the others do. */
    CHECK_OK(ops_kv_split(&m.f->ops, &m.kv, &m.host, 1, 2, 1, (int32_t[]){5}, 1, (int32_t[]){1}));
    CHECK(m.host.lane_len[LANES + 2] == 1 && *m.host.error == 0);
    CHECK_OK(ops_kv_split(&m.f->ops, &m.kv, &m.host, 1, 2, 1, (int32_t[]){5}, 1, (int32_t[]){1}));
    CHECK(m.host.lane_len[LANES + 2] == 1 && *m.host.error == KV_ERROR_LANE_FULL);
    CHECK_OK(ops_kv_release(&m.f->ops, &m.host, 1));
    CHECK(*m.host.free_count == m.host.n_pages && fixture_pages_ok(&m.host));
    fixture_close(m.f);
}

/* One query of lane `lane` over a list; out [DIM]. */
static void attend(struct memories *m, const struct kv_view *kv, int lane, int32_t *entry, int32_t n,
                   const struct kv_recent *recent, struct tensor q, float *out)
{
    const struct attention_heads heads = {1, 1, DIM, lane, 0.25f};
    const int32_t slot = 1;
    const struct seq_batch batch = {.n_seqs = 1, .n_tokens = 1, .slot = &slot};
    const struct kv_list list = {entry, &n, 2 * LENGTH, &m->host, recent, false};
    CHECK_OK(
        ops_attention_decode_listed(&m->f->ops, tensor_3d(out, DTYPE_F32, 1, 1, DIM), q, &batch, kv, &heads, &list));
}

/* Everything, from wherever it lies now, is what it was; so it is from recent copies, to the last bit. */
static void test_attention(void)
{
    struct memories m = open_memories(2);
    int32_t other[LANES * LENGTH], n_other[LANES];
    split(&m, other, n_other);
    struct tensor q = fixture_3d(m.f, 1, 1, DIM, 0);
    enum { PLACES = 48 };
    float pool[SLOTS * LANES * PLACES * 2 * DIM];
    int32_t place[SLOTS * LANES * LENGTH], holder[SLOTS * LANES * PLACES], stamp[SLOTS * LANES * PLACES] = {0};
    int32_t step[SLOTS * LANES] = {0}, work[SLOTS * LANES * 2 * PLACES];
    int64_t counts[2 * SLOTS] = {0};
    for (int i = 0; i < SLOTS * LANES * LENGTH; i++) place[i] = i % 60 - 5; /* an earlier sequence's */
    for (int i = 0; i < SLOTS * LANES * PLACES; i++) holder[i] = i % 50;
    const struct kv_recent recent = {.pool = tensor_3d(pool, DTYPE_F32, SLOTS * LANES * PLACES / 16, 32, DIM),
                                     .place = place,
                                     .holder = holder,
                                     .stamp = stamp,
                                     .step = step,
                                     .work = work,
                                     .counts = counts,
                                     .n_lanes = LANES,
                                     .max_entries = LENGTH,
                                     .capacity = PLACES,
                                     .steps = 1};
    for (int lane = 0; lane < LANES; lane++) {
        int32_t all[2 * LENGTH], was[2 * LENGTH], n = 0;
        float got[DIM], near[DIM], want[DIM];
        for (int j = 0; j < LENGTH - n_other[lane]; j++) all[n++] = j;
        for (int j = 0; j < n_other[lane]; j++) all[n++] = ~j;
        for (int j = 0; j < LENGTH; j++) was[j] = j;
        attend(&m, &m.kv, lane, all, n, NULL, q, got);
        attend(&m, &m.before, lane, was, LENGTH, NULL, q, want);
        CHECK_CLOSE(got, want, DIM, 2e-5);
        const struct attention_heads heads = {1, 1, DIM, lane, 0.25f};
        const int32_t slot = 1;
        const struct seq_batch batch = {.n_seqs = 1, .n_tokens = 1, .slot = &slot};
        for (int s = 0; s < 3; s++) {
            memcpy(was, all, sizeof was);
            CHECK_OK(ops_recall(&m.f->ops, was, &n, 2 * LENGTH, &batch, &m.kv, &heads, &m.host, &recent));
            int placed = 0;
            for (int j = 0; j < n; j++) placed += was[j] >= RECENT_ENTRY;
            CHECK(placed == (n_other[lane] < PLACES ? n_other[lane] : PLACES));
            attend(&m, &m.kv, lane, was, n, &recent, q, near);
            CHECK(fixture_same(near, got, sizeof got));
        }
    }
    /* Lane 0 has 46 there, all of which fit; of lane 1's 70 the first 48 do and stay, as long as they are wanted. */
    CHECK(counts[0] == 0 && counts[1] == 0 && counts[2] == 3 * (46 + 70) && counts[3] == 2 * (46 + 48));
    fixture_close(m.f);
}

/* Places of what the last `steps` steps listed are kept, older ones given to others. */
static void test_steps(void)
{
    struct memories m = open_memories(3);
    int32_t other[LANES * LENGTH], n_other[LANES];
    split(&m, other, n_other);
    for (int steps = 1; steps <= 3; steps++) {
        float pool[SLOTS * LANES * 16 * 2 * DIM];
        int32_t place[SLOTS * LANES * LENGTH] = {0}, holder[SLOTS * LANES * 16] = {0}, stamp[SLOTS * LANES * 16] = {0};
        int32_t step[SLOTS * LANES] = {0}, work[SLOTS * LANES * 32];
        int64_t counts[2 * SLOTS] = {0};
        const struct kv_recent recent = {.pool = tensor_3d(pool, DTYPE_F32, SLOTS * LANES, 32, DIM),
                                         .place = place,
                                         .holder = holder,
                                         .stamp = stamp,
                                         .step = step,
                                         .work = work,
                                         .counts = counts,
                                         .n_lanes = LANES,
                                         .max_entries = LENGTH,
                                         .capacity = 16,
                                         .steps = steps};
        const struct attention_heads heads = {1, 1, DIM, 1, 1};
        const int32_t slot = 1, n = 5;
        const struct seq_batch batch = {.n_seqs = 1, .n_tokens = 1, .slot = &slot};
        /* Sets A, B, C, A of five: A is found again if three steps are kept, else its places went to C. */
        for (int s = 0; s < 4; s++) {
            int32_t entry[5];
            for (int j = 0; j < 5; j++) entry[j] = ~(s % 3 * 5 + j);
            CHECK_OK(ops_recall(&m.f->ops, entry, &n, 5, &batch, &m.kv, &heads, &m.host, &recent));
            const int at = s % steps * 5; /* with three steps the fourth one finds the first one's */
            for (int j = 0; j < 5; j++) CHECK(entry[j] >= RECENT_ENTRY && entry[j] == RECENT_ENTRY + at + j);
        }
        CHECK(counts[2] == 20 && counts[3] == (steps == 3 ? 5 : 0));
    }
    fixture_close(m.f);
}

static void test_refusals(void)
{
    struct memories m = open_memories(4);
    struct ops *o = &m.f->ops;
    struct kv_view other_shape = fixture_cache(m.f, SLOTS, LANES, 3, 9, 16, DIM * 2);
    int32_t list[8] = {0, 1, 2, 3}, n[LANES] = {2, 2, 2}, far[2] = {3, LENGTH};
    CHECK_FAILS(ops_kv_split(o, &m.kv, &other_shape, 1, 0, 1, list, 4, n), ERR_ARG, "host memory has pages");
    CHECK_FAILS(ops_kv_split(o, &m.kv, &m.host, 2, 0, 1, list, 4, n), ERR_ARG, "slot 2");
    CHECK_FAILS(ops_kv_split(o, &m.kv, &m.host, 1, 2, 2, list, 4, n), ERR_ARG, "lanes 2 .. 4");
    CHECK_FAILS(ops_kv_split(o, &m.kv, &m.host, 1, 0, 2, list, 1, n), ERR_ARG, "n_index[0] is 2");
    CHECK_FAILS(ops_kv_split(o, &m.kv, &m.host, 1, 0, 1, far, 2, n), ERR_ARG, "index[1] of lane 0 is 70");
    CHECK_FAILS(ops_list_others(o, list, 4, list, 4, n, 1, 1), ERR_ARG, "n_keep[0] is 2");
    CHECK_FAILS(ops_list_others(o, list, 3, list, 4, n, 6, 2), ERR_ARG, "room for 4 and 3");
    const struct kv_recent uneven = {.n_lanes = LANES, .max_entries = 9, .capacity = 17, .steps = 1};
    const struct attention_heads heads = {1, 1, DIM, 1, 1};
    const int32_t slot = 1;
    const struct seq_batch batch = {.n_seqs = 1, .n_tokens = 1, .slot = &slot};
    CHECK_FAILS(ops_recall(o, list, n, 4, &batch, &m.kv, &heads, &m.host, &uneven), ERR_ARG, "whole pages of 16");
    fixture_close(m.f);
}

int main(void)
{
    const struct check_case cases[] = {{"split", test_split},
                                       {"attention over both memories", test_attention},
                                       {"steps that are kept", test_steps},
                                       {"refusals", test_refusals},
                                       {0}};
    return check_run("ops_recall", cases);
}
