/* CUDA's ops for rows and entries that leave, against the CPU's: fixed-point sums and selections to the last bit, the
 * attention of judging rows within its rounding, entries dropped from the middle of lanes token by token. */
#include "tests/cuda/cuda_cache.h"

/* ---- sums and selections of integers ---- */

static void compare_sum(struct cuda_fixture *f, int rows, int n, int gap, double scale)
{
    struct twin x = twin_make(f, DTYPE_F32, rows, n, -1, gap, 0.01f);
    struct pair sum = pair_of(f, NULL, sizeof(int64_t) * (size_t)n);
    cuda_what(f, "fixed-point sum of %d rows of %d, scale %g", rows, n, scale);
    RUN(f, ops_sum_fixed(&f->gpu, sum.gpu, x.gpu, scale));
    RUN(f, ops_sum_fixed(&f->cpu->ops, sum.cpu, x.cpu, scale));
    pair_check(f, sum, "sum");
    cuda_clear(f);
}

static void test_sums(void)
{
    static const float odd[] = {NAN, 1e30f, -1e30f, INFINITY, -0.0f, 0x1p-41f, 0x3p-41f, -0x1p-41f, 1.0f, -0x3p-41f};
    struct cuda_fixture *f = cuda_begin(1);
    compare_sum(f, 4, 33, 3, 1);
    compare_sum(f, 1, 1, 0, 0.125);
    compare_sum(f, 0, 40, 0, 1);
    if (f->effort > QUICK) {
        compare_sum(f, 40, 3277, 820, 1.0 / 820);
        compare_sum(f, 7, 129, 0, 1.0 / 3);
    }
    struct pair x = pair_of(f, odd, sizeof odd), sum = pair_of(f, NULL, sizeof(int64_t) * 10);
    cuda_what(f, "fixed-point sum of odd numbers");
    RUN(f, ops_sum_fixed(&f->gpu, sum.gpu, tensor_2d(x.gpu, DTYPE_F32, 1, 10), 1));
    RUN(f, ops_sum_fixed(&f->cpu->ops, sum.cpu, tensor_2d(x.cpu, DTYPE_F32, 1, 10), 1));
    pair_check(f, sum, "sum");
    const int64_t *got = sum.cpu;
    EXPECT(f, got[0] == 0 && got[5] == 0 && got[6] == 2 && got[7] == 0 && got[8] == 1ll << 40 && got[9] == -2);
    cuda_end(f);
}

/* Sequences of all kinds one after the other; levels > 0: few different scores, so many ties. */
static void compare_rows(struct cuda_fixture *f, int n_choices, int most, int levels)
{
    struct row_choice *choice = fixture_take(f->cpu, sizeof *choice * (size_t)n_choices);
    int rows = 0, scores = 0, left = 0;
    for (int i = 0; i < n_choices; i++) {
        struct row_choice *c = &choice[i];
        *c = (struct row_choice){.first_row = rows, .n_rows = fixture_int(f->cpu, 0, most), .first_score = scores};
        c->first = fixture_int(f->cpu, 0, c->n_rows < 5 ? c->n_rows : 5);
        c->n_competing = i % 4 == 3 ? 0 : fixture_int(f->cpu, 0, c->n_rows - c->first);
        c->keep = i % 7 == 5 ? c->n_competing : fixture_int(f->cpu, 0, c->n_competing);
        rows += c->n_rows;
        scores += c->n_competing;
        left += c->n_rows - c->n_competing + c->keep;
    }
    int64_t *score = fixture_take(f->cpu, sizeof *score * (size_t)(scores + 1));
    for (int i = 0; i < scores; i++)
        score[i] = levels ? fixture_int(f->cpu, -levels, levels) : (int64_t)fixture_bits(f->cpu) >> (i % 3 * 20);
    struct pair s = pair_of(f, score, sizeof *score * (size_t)(scores + 1));
    struct pair index = pair_of(f, NULL, sizeof(int32_t) * (size_t)(left + 1));
    cuda_what(f, "%d selections of up to %d rows, %d levels", n_choices, most, levels);
    RUN(f, ops_select_rows(&f->gpu, index.gpu, s.gpu, choice, n_choices));
    RUN(f, ops_select_rows(&f->cpu->ops, index.cpu, s.cpu, choice, n_choices));
    pair_check(f, index, "index");
    cuda_clear(f);
}

static void test_rows(void)
{
    struct cuda_fixture *f = cuda_begin(2);
    for (int i = 0; i < (f->effort == QUICK ? 4 : 60); i++)
        compare_rows(f, fixture_int(f->cpu, 1, 9), i % 2 ? 60 : 3000, i % 4);
    if (f->effort > QUICK) compare_rows(f, 150, 500, 3);
    if (f->effort > QUICK) compare_rows(f, 80, 16, 0);
    cuda_end(f);
}

/* ---- columns of each head ---- */

static void compare_heads(struct cuda_fixture *f, int n_kv_heads, int group, int dim, int first, int rows)
{
    const int n = first + rows, n_heads = n_kv_heads * group, pages = n / 16 + 2;
    const struct attention_heads heads = {n_heads, n_kv_heads, dim, 1, 1.0f / sqrtf((float)dim)};
    struct cache c = cache_take(f, 1, n_kv_heads + 1, pages, pages * (n_kv_heads + 1), 16, dim, STALE_LARGE);
    cuda_what(f, "columns of each of %d/%d heads of %d, %d rows from %d on", n_heads, n_kv_heads, dim, rows, first);
    cache_fill(f, &c, &heads, 0, n);
    struct twin q = twin_3d(f, rows, n_heads, dim, 8, 2), column = twin_make(f, DTYPE_F32, n_heads, n, -1, 0, 0);
    struct pair weight = pair_floats(f, rows, 0.1f, 1);
    struct attention_probe gpu = {.n_rows = rows,
                                  .first_position = first,
                                  .row_weight = weight.gpu,
                                  .column_sum = column.gpu.data,
                                  .per_head = true};
    struct attention_probe cpu = gpu;
    cpu.row_weight = weight.cpu;
    cpu.column_sum = column.cpu.data;
    RUN(f, ops_attention_probe(&f->gpu, q.gpu, &c.gpu, &heads, &gpu));
    RUN(f, ops_attention_probe(&f->cpu->ops, q.cpu, &c.cpu, &heads, &cpu));
    twin_check(f, column, TOLERANCE_F32, "column_sum");
    cuda_clear(f);
}

static void test_heads(void)
{
    struct cuda_fixture *f = cuda_begin(3);
    compare_heads(f, 2, 3, 64, 20, 9);
    compare_heads(f, 3, 1, 72, 0, 5);
    if (f->effort > QUICK) {
        compare_heads(f, 8, 4, 128, 3277, 819); /* several passes */
        compare_heads(f, 5, 1, 128, 800, 200);
        compare_heads(f, 2, 8, 96, 300, 256);
        compare_heads(f, 1, 7, 80, 301, 257);
    }
    cuda_end(f);
}

/* All slots' lanes in a format; KV_PLAIN: as they are. */
static void quantise_slots(struct cuda_fixture *f, struct cache *c, enum kv_format format)
{
    if (format == KV_PLAIN) return;
    cache_quantise(f, c, format);
    for (int slot = 0; slot < c->cpu.n_slots; slot++) {
        RUN(f, ops_kv_quantise(&f->gpu, &c->gpu, slot));
        RUN(f, ops_kv_quantise(&f->cpu->ops, &c->cpu, slot));
    }
}

/* ---- judges of generated tokens ---- */

/* Sums of one step with three rows (one of them padding, one of a slot that is off) over what is in them already. */
static void compare_judges(struct cuda_fixture *f, int n_kv_heads, int group, int dim, int prompt, int step,
                           int settled, enum kv_format format)
{
    enum { SLOTS = 3, BLOCK = 16, LAYERS = 2 };
    const int n = prompt + step + 1, n_heads = n_kv_heads * group, pages = n / 16 + 2, blocks = (step + 2) / BLOCK + 2;
    const struct attention_heads heads = {n_heads, n_kv_heads, dim, 1, 1.0f / sqrtf((float)dim)};
    struct cache c = cache_take(f, SLOTS, n_kv_heads + 1, pages, SLOTS * pages * (n_kv_heads + 1), 16, dim, STALE_NAN);
    cuda_what(f, "judges of %d/%d heads of %d, step %d after %d, %d blocks settled, format %d", n_heads, n_kv_heads,
              dim, step, prompt, settled, format);
    for (int s = 0; s < SLOTS; s++) cache_fill(f, &c, &heads, s, n - 1);
    quantise_slots(f, &c, format);
    int32_t progress[2 * SLOTS] = {step, settled, -1, 0, step, settled}, slot[4] = {2, -1, 1, 0};
    int32_t *block = fixture_take(f->cpu, sizeof *block * 2 * (size_t)(SLOTS * blocks));
    for (int s = 0; s < SLOTS; s++)
        for (int b = 0; b < blocks; b++) {
            block[2 * (s * blocks + b)] = b == blocks - 1 ? INT32_MAX : step + (b - settled) * 20;
            block[2 * (s * blocks + b) + 1] = b == blocks - 1 ? 1 : 1 + fixture_int(f->cpu, 0, 60);
        }
    const int ring = (step + 2 - settled * BLOCK) / BLOCK + 2;
    const int64_t block_stride = LAYERS * BLOCK, slot_stride = block_stride * ring, n_sums = SLOTS * slot_stride;
    int64_t *start = fixture_take(f->cpu, sizeof *start * (size_t)n_sums);
    for (int64_t i = 0; i < n_sums; i++) start[i] = fixture_int(f->cpu, 0, 1 << 30);
    struct pair p = pair_of(f, progress, sizeof progress), sum = pair_of(f, start, sizeof *start * (size_t)n_sums);
    struct pair table = pair_of(f, block, sizeof *block * 2 * (size_t)(SLOTS * blocks));
    struct batch b = batch_of(f, slot, NULL, 4);
    struct twin q = twin_3d(f, 4, n_heads, dim, 8, 1), out = twin_3d(f, 4, n_heads, dim, 8, 0);
    struct twin k = twin_3d(f, 4, n_kv_heads, dim, 0, 1), v = twin_3d(f, 4, n_kv_heads, dim, 0, 1);
    float *none = fixture_take(f->cpu, sizeof *none * (size_t)(4 * n_heads));
    for (int i = 0; i < 4 * n_heads; i++) none[i] = -7;
    struct pair log_sum = pair_of(f, none, sizeof *none * (size_t)(4 * n_heads));
    struct decode_judges gpu = {.progress = p.gpu,
                                .block = table.gpu,
                                .max_blocks = blocks,
                                .block_tokens = BLOCK,
                                .ring_blocks = ring,
                                .newest = 1.2f,
                                .sum = (int64_t *)sum.gpu + BLOCK,
                                .slot_stride = slot_stride,
                                .block_stride = block_stride};
    struct decode_judges cpu = gpu;
    cpu.progress = p.cpu, cpu.block = table.cpu, cpu.sum = (int64_t *)sum.cpu + BLOCK;
    RUN(f, ops_decode_begin(&f->gpu, &b.gpu, &c.gpu));
    RUN(f, ops_kv_append(&f->gpu, &c.gpu, &heads, k.gpu, v.gpu, &b.gpu));
    RUN(f, ops_attention_decode_log_sum(&f->gpu, out.gpu, q.gpu, log_sum.gpu, &b.gpu, &c.gpu, &heads));
    RUN(f, ops_judge_columns(&f->gpu, q.gpu, log_sum.gpu, &b.gpu, &c.gpu, &heads, &gpu));
    RUN(f, ops_kv_append(&f->cpu->ops, &c.cpu, &heads, k.cpu, v.cpu, &b.cpu));
    RUN(f, ops_attention_decode_log_sum(&f->cpu->ops, out.cpu, q.cpu, log_sum.cpu, &b.cpu, &c.cpu, &heads));
    RUN(f, ops_judge_columns(&f->cpu->ops, q.cpu, log_sum.cpu, &b.cpu, &c.cpu, &heads, &cpu));
    const float *got_log = pair_fetch(f, log_sum), *want_log = log_sum.cpu;
    for (int i = 0; i < 4 * n_heads; i++)
        if (!(fabsf(got_log[i] - want_log[i]) <= (slot[i / n_heads] < 0 ? 0 : 1e-3f)))
            cuda_wrong(f, "log_sum[%d] is %g, expected %g", i, (double)got_log[i], (double)want_log[i]);
    const int64_t *got = pair_fetch(f, sum), *want = sum.cpu;
    int changed = 0;
    for (int64_t i = 0; i < n_sums; i++) {
        const double added = (double)(want[i] - start[i]), off = fabs((double)(got[i] - want[i]));
        changed += want[i] != start[i];
        if (want[i] == start[i] || want[i] == 0 ? off > 0 : off > 2e-3 * fabs(added) + 64)
            cuda_wrong(f, "sum[%lld] grew by %lld, expected %lld", (long long)i, (long long)(got[i] - start[i]),
                       (long long)(want[i] - start[i]));
    }
    EXPECT(f, changed > 2);
    cuda_clear(f);
}

static void test_judges(void)
{
    struct cuda_fixture *f = cuda_begin(4);
    for (int format = KV_PLAIN; format < KV_FORMAT_N; format++) {
        compare_judges(f, 2, 2, 64, 30, 40, 1, (enum kv_format)format);
        compare_judges(f, 3, 1, 72, 1, 20, 0, (enum kv_format)format);
        if (f->effort > QUICK) {
            compare_judges(f, 8, 4, 128, 2000, 700, 12, (enum kv_format)format);
            compare_judges(f, 5, 1, 128, 900, 150, 2, (enum kv_format)format);
            compare_judges(f, 2, 7, 80, 333, 99, 0, (enum kv_format)format);
            compare_judges(f, 1, 16, 96, 50, 300, 4, (enum kv_format)format);
            compare_judges(f, 1, 3, 8, 5, 60, 1, (enum kv_format)format);
        }
    }
    cuda_end(f);
}

/* ---- entries that leave the middle of lanes ---- */

static void compare_drop(struct cuda_fixture *f, int n_layers, int n_kv_heads, int dim, int page_size, int n,
                         enum kv_format format)
{
    enum { BLOCK = 16 };
    const int pages = n / page_size + 2, lanes = n_layers * n_kv_heads;
    struct cache c = cache_take(f, 2, lanes, pages, 2 * pages * lanes, page_size, dim, STALE_LARGE);
    struct kv_drop *drop = fixture_take(f->cpu, sizeof *drop * (size_t)n_layers);
    int32_t *index = fixture_take(f->cpu, sizeof *index * (size_t)(n_layers * BLOCK + 1));
    int n_index = 0;
    cuda_what(f, "drop from %d layers of %d lanes of about %d tokens, heads of %d, pages of %d, format %d", n_layers,
              n_kv_heads, n, dim, page_size, format);
    for (int l = 0; l < n_layers; l++) {
        const struct attention_heads heads = {n_kv_heads, n_kv_heads, dim, l * n_kv_heads, 1};
        const int length = BLOCK + fixture_int(f->cpu, 0, n - BLOCK);
        cache_fill(f, &c, &heads, 1, length);
        cache_fill(f, &c, &heads, 0, 3);
        drop[l] = (struct kv_drop){.lane = l * n_kv_heads,
                                   .n_lanes = n_kv_heads,
                                   .first = fixture_int(f->cpu, 0, length - BLOCK),
                                   .n_block = BLOCK,
                                   .first_index = n_index};
        for (int i = 0; i < BLOCK; i++)
            if (fixture_int(f->cpu, 0, n_layers) >= l) index[n_index++] = i;
        drop[l].n_keep = n_index - drop[l].first_index;
    }
    struct pair list = pair_of(f, index, sizeof *index * (size_t)(n_layers * BLOCK + 1));
    quantise_slots(f, &c, format);
    RUN(f, ops_kv_drop(&f->gpu, &c.gpu, 1, list.gpu, drop, n_layers));
    RUN(f, ops_kv_drop(&f->cpu->ops, &c.cpu, 1, list.cpu, drop, n_layers));
    cache_check(f, &c);
    cuda_clear(f);
}

static void test_drop(void)
{
    struct cuda_fixture *f = cuda_begin(5);
    compare_drop(f, 3, 2, 64, 16, 90, KV_PLAIN);
    compare_drop(f, 2, 1, 8, 16, 40, KV_PLAIN);
    compare_drop(f, 3, 2, 64, 16, 90, KV_FP8);
    compare_drop(f, 2, 1, 8, 16, 70, KV_INT8);
    if (f->effort > QUICK) {
        compare_drop(f, 40, 2, 128, 16, 600, KV_PLAIN);
        compare_drop(f, 130, 1, 64, 16, 200, KV_PLAIN);
        compare_drop(f, 4, 5, 72, 7, 300, KV_PLAIN);
        compare_drop(f, 4, 3, 96, 16, 1000, KV_PLAIN);
        compare_drop(f, 40, 2, 128, 16, 600, KV_INT8);
        compare_drop(f, 4, 5, 72, 16, 300, KV_FP8);
        compare_drop(f, 4, 3, 96, 16, 1000, KV_INT8);
    }
    cuda_end(f);
}

int main(int argc, char **argv)
{
    const struct check_case cases[] = {
        {"fixed-point sums", test_sums},           {"rows that stay", test_rows},
        {"columns of each head", test_heads},      {"judges of generated tokens", test_judges},
        {"entries dropped from lanes", test_drop}, {0}};
    return cuda_main("cuda_narrow", cases, argc, argv);
}
