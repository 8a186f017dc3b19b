/* The ops with which rows and entries leave, on the CPU: against plain loops, and what their checks refuse. The
 * oracle's vectors are in tests/multirank/test_pyramid_infer.c. */
#include "tests/ops_fixture.h"

static void test_sums(void)
{
    struct fixture *f = fixture_open(2, 1);
    struct tensor x = fixture_2d(f, 7, 333, 5);
    int64_t sum[333], part[333], first[333];
    CHECK_OK(ops_sum_fixed(&f->ops, sum, x, 0.125));
    CHECK_OK(ops_sum_fixed(&f->ops, first, tensor_rows(x, 0, 3), 0.125));
    CHECK_OK(ops_sum_fixed(&f->ops, part, tensor_rows(x, 3, 4), 0.125));
    for (int j = 0; j < 333; j++) {
        double want = 0;
        for (int r = 0; r < 7; r++) want += (double)fixture_row(x, r)[j] / 8;
        CHECK(first[j] + part[j] == sum[j] && fabs((double)sum[j] * 0x1p-40 - want) < 7 * 0x1p-41 + 1e-15);
    }
    const float odd[] = {NAN, 0x1p-41f, 0x3p-41f, -0x3p-41f, INFINITY, 1};
    CHECK_OK(ops_sum_fixed(&f->ops, sum, tensor_2d((float *)odd, DTYPE_F32, 1, 6), 1));
    CHECK(sum[0] == 0 && sum[1] == 0 && sum[2] == 2 && sum[3] == -2 && sum[4] == 1ll << 53 && sum[5] == 1ll << 40);
    CHECK_OK(ops_sum_fixed(&f->ops, sum, tensor_2d(NULL, DTYPE_F32, 0, 3), 1));
    CHECK(sum[0] == 0 && sum[2] == 0);
    fixture_close(f);
}

/* Rank of competitor i: better ones, and equal ones before it. */
static int rank_of(const int64_t *score, int n, int i)
{
    int rank = 0;
    for (int j = 0; j < n; j++) rank += score[j] > score[i] || (score[j] == score[i] && j < i);
    return rank;
}

static void test_rows(void)
{
    struct fixture *f = fixture_open(1, 2);
    for (int round = 0; round < 50; round++) {
        struct row_choice choice[3];
        int64_t score[600];
        int32_t index[601];
        int rows = 0, at = 0;
        for (int i = 0; i < 600; i++)
            score[i] = round % 2 ? fixture_int(f, -2, 2) : (int64_t)fixture_bits(f) >> (round % 4 * 15);
        for (int i = 0; i < 3; i++) {
            int n = fixture_int(f, 0, 200), first = fixture_int(f, 0, n), competing = fixture_int(f, 0, n - first);
            choice[i] = (struct row_choice){rows, n, first, competing, fixture_int(f, 0, competing), 200 * i};
            rows += n;
        }
        CHECK_OK(ops_select_rows(&f->ops, index, score, choice, 3));
        for (int i = 0; i < 3; i++) {
            const struct row_choice *c = &choice[i];
            for (int j = 0; j < c->n_rows; j++) {
                const int competitor = j - c->first;
                const bool stays = competitor < 0 || competitor >= c->n_competing ||
                                   rank_of(score + c->first_score, c->n_competing, competitor) < c->keep;
                if (stays) CHECK(index[at++] == c->first_row + j);
            }
        }
    }
    int32_t index[4];
    int64_t score[4] = {0};
    CHECK_FAILS(ops_select_rows(&f->ops, index, score, &(struct row_choice){.n_rows = 3, .n_competing = 4}, 1), ERR_ARG,
                "rows 0 .. 4 of 3");
    CHECK_FAILS(
        ops_select_rows(&f->ops, index, score, &(struct row_choice){.n_rows = 3, .n_competing = 2, .keep = 3}, 1),
        ERR_ARG, "keeps 3 of 2");
    CHECK_FAILS(ops_select_rows(&f->ops, index, NULL, &(struct row_choice){.n_rows = 3, .n_competing = 2}, 1), ERR_ARG,
                "score");
    fixture_close(f);
}

static void fill(struct fixture *f, const struct kv_view *kv, const struct attention_heads *heads, int slot, int n)
{
    int32_t s = slot, cu[2] = {0, n};
    struct seq_batch batch = {1, n, &s, cu, &s, cu};
    CHECK_OK(ops_kv_append(&f->ops, kv, heads, fixture_3d(f, n, heads->n_kv_heads, heads->head_dim, 0),
                           fixture_3d(f, n, heads->n_kv_heads, heads->head_dim, 0), &batch));
}

/* Lanes in 8 bits as their codes times scales, in plain lanes. */
static void read_codes(struct fixture *f, const struct kv_view *kv, int slot)
{
    if (kv->format == KV_PLAIN) return;
    CHECK_OK(ops_kv_quantise(&f->ops, kv, slot));
    CHECK_OK(ops_kv_widen(&f->ops, kv, slot));
}

/* Once quantised again a scale may have another last bit. */
static bool near(const struct kv_view *kv, const float *got, const float *want)
{
    for (int d = 0; d < kv->head_dim; d++)
        if (fabsf(got[d] - want[d]) > (kv->format == KV_PLAIN ? 0 : 1e-6f * fabsf(want[d]))) return false;
    return true;
}

static void drop_from(enum kv_format format)
{
    struct fixture *f = fixture_open(1, 3);
    const struct attention_heads heads = {2, 2, 8, 1, 1};
    struct kv_view kv = fixture_cache(f, 2, 3, 8, 40, 16, 8);
    if (format != KV_PLAIN) fixture_quantise(f, &kv, format);
    fill(f, &kv, &heads, 1, 100);
    read_codes(f, &kv, 1);
    float *before = fixture_take(f, 2 * 100 * 8 * sizeof *before);
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < 100; i++)
            memcpy(before + (h * 100 + i) * 8, h ? fixture_value(&kv, 5, i) : fixture_key(&kv, 4, i), 32);
    const int32_t index[] = {9, 9, 1, 2, 15};
    struct kv_drop drop = {.lane = 1, .n_lanes = 2, .first = 40, .n_block = 16, .n_keep = 3, .first_index = 2};
    if (format != KV_PLAIN) CHECK_OK(ops_kv_quantise(&f->ops, &kv, 1));
    CHECK_OK(ops_kv_drop(&f->ops, &kv, 1, index, &drop, 1));
    if (format != KV_PLAIN) CHECK_OK(ops_kv_widen(&f->ops, &kv, 1));
    CHECK(kv.lane_len[4] == 87 && kv.lane_len[5] == 87 && kv.lane_len[3] == 0 && fixture_pages_ok(&kv));
    for (int i = 0; i < 87; i++) {
        const int from = i < 40 ? i : i < 43 ? 40 + index[2 + i - 40] : i + 13;
        CHECK(near(&kv, fixture_key(&kv, 4, i), before + from * 8));
        CHECK(near(&kv, fixture_value(&kv, 5, i), before + (100 + from) * 8));
    }
    drop.first = 80;
    CHECK_FAILS(ops_kv_drop(&f->ops, &kv, 1, index, &drop, 1), ERR_ARG, "entries 80 .. 96 of a lane of 87");
    drop.first = 0, drop.first_index = 0;
    CHECK_FAILS(ops_kv_drop(&f->ops, &kv, 1, index, &drop, 1), ERR_ARG, "expected ascending");
    drop.n_keep = 17;
    CHECK_FAILS(ops_kv_drop(&f->ops, &kv, 1, index, &drop, 1), ERR_ARG, "keeps 17 of 16");
    drop.lane = 2;
    CHECK_FAILS(ops_kv_drop(&f->ops, &kv, 1, index, &drop, 1), ERR_ARG, "lanes 2 .. 4 of 3");
    fixture_close(f);
}

static void test_drop(void)
{
    for (int format = KV_PLAIN; format < KV_FORMAT_N; format++) drop_from((enum kv_format)format);
}

/* What the judges add is the weighted softmax, head by head; the newest token's sum is cleared. */
static void judge(enum kv_format format)
{
    enum { PROMPT = 20, STEP = 37, N = PROMPT + STEP + 1, BLOCK = 4, BLOCKS = 12, RING = 12 };
    struct fixture *f = fixture_open(2, 4);
    const struct attention_heads heads = {4, 2, 16, 0, 0.25f};
    struct kv_view kv = fixture_cache(f, 1, 2, 8, 16, 16, 16);
    int64_t sum[RING * BLOCK], want[RING * BLOCK] = {0};
    int32_t progress[2] = {STEP, 2}, block[2 * BLOCKS], slot[2] = {-1, 0};
    float key[2][N][16];
    if (format != KV_PLAIN) fixture_quantise(f, &kv, format);
    fill(f, &kv, &heads, 0, N);
    read_codes(f, &kv, 0);
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < N; i++) memcpy(key[h][i], fixture_key(&kv, h, i), sizeof key[h][i]);
    if (format != KV_PLAIN) CHECK_OK(ops_kv_quantise(&f->ops, &kv, 0));
    for (int i = 0; i < RING * BLOCK; i++) sum[i] = want[i] = 1000 + i;
    for (int b = 0; b < BLOCKS; b++) block[2 * b] = STEP + 5 * (b - 4), block[2 * b + 1] = 11;
    struct tensor q = fixture_3d(f, 2, 4, 16, 3);
    struct decode_judges judges = {progress, block, BLOCKS, BLOCK, RING, 1.2f, sum, RING * BLOCK, BLOCK};
    struct seq_batch batch = {.n_seqs = 2, .n_tokens = 2, .slot = slot};
    float log_sum[8] = {-7, -7, -7, -7}; /* the first row is padding */
    CHECK_OK(ops_attention_decode_log_sum(&f->ops, fixture_3d(f, 2, 4, 16, 3), q, log_sum, &batch, &kv, &heads));
    for (int h = 0; h < 4; h++) CHECK(!(log_sum[h] < -7 || log_sum[h] > -7));
    CHECK_OK(ops_judge_columns(&f->ops, q, log_sum, &batch, &kv, &heads, &judges));
    for (int h = 0; h < 4; h++) {
        double p[N], total = 0;
        for (int i = 0; i < N; i++) {
            double dot = 0;
            for (int d = 0; d < 16; d++) dot += (double)fixture_row(q, 1)[h * 16 + d] * (double)key[h / 2][i][d];
            total += p[i] = exp(dot * 0.25);
        }
        CHECK(fabs((double)log_sum[4 + h] - log(total)) <= 1e-5);
        for (int g = 2 * BLOCK; g <= STEP; g++) {
            const int age = block[2 * (g / BLOCK)] - STEP, rows = 11;
            if (age < 0 || age >= rows) continue;
            const double weight = (1 + 0.2 * (rows - 1 - age) / (rows - 1)) / rows;
            want[g] += (int64_t)rint(weight * p[PROMPT - 1 + g] / total * 0x1p40);
        }
    }
    want[STEP + 1] = 0;
    int grew = 0;
    for (int g = 0; g < RING * BLOCK; g++) {
        CHECK(fabs((double)(sum[g] - want[g])) <= 1e-5 * fabs((double)want[g]));
        grew += sum[g] > 1000000;
    }
    CHECK(grew == 12 && sum[STEP + 1] == 0 && sum[4] == 1004); /* blocks 4 to 6: ages 0, 5, 10 */
    judges.ring_blocks = 0;
    CHECK_FAILS(ops_judge_columns(&f->ops, q, log_sum, &batch, &kv, &heads, &judges), ERR_ARG, "rings of 0");
    fixture_close(f);
}

static void test_judges(void)
{
    for (int format = KV_PLAIN; format < KV_FORMAT_N; format++) judge((enum kv_format)format);
}

int main(void)
{
    return check_run("ops_narrow", (struct check_case[]){{"fixed-point sums", test_sums},
                                                         {"rows that stay", test_rows},
                                                         {"entries dropped from lanes", test_drop},
                                                         {"judges of generated tokens", test_judges},
                                                         {0}});
}
