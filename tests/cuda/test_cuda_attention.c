/* CUDA's attention of many queries against the CPU's: images, prompts of unequal lengths, chunks after chunks and after
 * packing, every head dimension and group size. */
#include "tests/cuda/cuda_cache.h"

/* ---- images ---- */

static void compare_vision(struct cuda_fixture *f, int images, int tokens, int heads, int dim, int gap)
{
    const int64_t n = (int64_t)images * tokens, width = (int64_t)heads * dim;
    struct twin qkv = twin_2d(f, n, 3 * width, gap, 1.5f), out = twin_3d(f, n, heads, dim, gap, 0);
    struct twin q = twin_heads(qkv, 0, heads, dim), k = twin_heads(qkv, width, heads, dim);
    struct twin v = twin_heads(qkv, 2 * width, heads, dim);
    const float scale = 1.0f / sqrtf((float)dim);
    cuda_what(f, "vision: %d images of %d tokens, %d heads of %d, gap %d", images, tokens, heads, dim, gap);
    RUN(f, ops_attention_vision(&f->gpu, out.gpu, q.gpu, k.gpu, v.gpu, images, scale));
    RUN(f, ops_attention_vision(&f->cpu->ops, out.cpu, q.cpu, k.cpu, v.cpu, images, scale));
    twin_check(f, out, cuda_tolerance(f), "out");
    cuda_clear(f);
}

static void test_vision(void)
{
    struct cuda_fixture *f = cuda_begin(1);
    compare_vision(f, 1, 1, 1, 72, 0);
    compare_vision(f, 2, 65, 3, 64, 0);
    compare_vision(f, 3, 17, 2, 80, 8);
    if (f->effort > QUICK) {
        compare_vision(f, 1, 577, 16, 64, 0);
        compare_vision(f, 3, 577, 16, 64, 8);
        compare_vision(f, 1, 729, 16, 72, 0);
        compare_vision(f, 4, 729, 16, 72, 0);
        compare_vision(f, 2, 577, 5, 64, 24);
        compare_vision(f, 3, 65, 5, 80, 16);
        compare_vision(f, 1, 257, 2, 128, 0);
        compare_vision(f, 2, 196, 3, 96, 0);
        compare_vision(f, 5, 16, 2, 8, 0);
        compare_vision(f, 7, 128, 4, 64, 0);
        compare_vision(f, 2, 129, 4, 64, 0);
        compare_vision(f, 1, 1025, 2, 16, 0);
    }
    cuda_end(f);
}

/* ---- prompts ---- */

struct shape {
    int n_kv_heads, group, dim, page_size;
};

static struct attention_heads heads_of(struct shape s, int lane)
{
    return (struct attention_heads){s.n_kv_heads * s.group, s.n_kv_heads, s.dim, lane, 1.0f / sqrtf((float)s.dim)};
}

/* q, k, v of a chunk: columns of a fused product, with a gap after it. */
struct chunk {
    struct twin q, k, v, out;
};

static struct chunk take_chunk(struct cuda_fixture *f, struct shape s, int n, int gap)
{
    const int64_t kv = (int64_t)s.n_kv_heads * s.dim, q = kv * s.group;
    struct twin qkv = twin_2d(f, n, q + 2 * kv, gap, 1.3f);
    return (struct chunk){twin_heads(qkv, 0, (int64_t)s.n_kv_heads * s.group, s.dim),
                          twin_heads(qkv, q, s.n_kv_heads, s.dim), twin_heads(qkv, q + kv, s.n_kv_heads, s.dim),
                          twin_3d(f, n, (int64_t)s.n_kv_heads * s.group, s.dim, gap, 0)};
}

static void attend_chunk(struct cuda_fixture *f, const struct cache *c, const struct attention_heads *heads,
                         const struct chunk *x, const struct batch *b)
{
    cache_append(f, c, heads, x->k, x->v, b);
    RUN(f, ops_attention_prefill(&f->gpu, x->out.gpu, x->q.gpu, x->k.gpu, x->v.gpu, &b->gpu, &c->gpu, heads));
    RUN(f, ops_attention_prefill(&f->cpu->ops, x->out.cpu, x->q.cpu, x->k.cpu, x->v.cpu, &b->cpu, &c->cpu, heads));
    twin_check(f, x->out, cuda_tolerance(f), "out");
}

/* `rounds` chunks of each sequence, its lanes packed to unequal lengths in between. */
static void compare_prefill(struct cuda_fixture *f, struct shape s, const int *lengths, int n_seqs, int rounds, int gap,
                            enum stale stale)
{
    int longest = 0, total = 0;
    int32_t slot[16], cu[17] = {0};
    for (int i = 0; i < n_seqs; i++) total += lengths[i], longest = lengths[i] > longest ? lengths[i] : longest;
    const int max_pages = rounds * longest / s.page_size + 2, slots = n_seqs + 1, lanes = s.n_kv_heads + 1;
    struct cache c =
        cache_take(f, slots, lanes, max_pages, rounds * (total / s.page_size + 2 * n_seqs) * s.n_kv_heads + 3,
                   s.page_size, s.dim, stale);
    const struct attention_heads heads = heads_of(s, 1);
    for (int round = 0; round < rounds; round++) {
        for (int i = 0; i < n_seqs; i++) {
            slot[i] = (i + 2) % slots;
            cu[i + 1] = cu[i] + lengths[(i + round) % n_seqs];
        }
        struct batch b = batch_of(f, slot, cu, n_seqs);
        struct chunk x = take_chunk(f, s, cu[n_seqs], gap);
        cuda_what(f, "prefill, %d/%d heads of %d, pages of %d, %d sequences, the first of %d, chunk %d, gap %d",
                  heads.n_heads, s.n_kv_heads, s.dim, s.page_size, n_seqs, lengths[0], round, gap);
        attend_chunk(f, &c, &heads, &x, &b);
        for (int i = 0; i < n_seqs && round + 1 < rounds; i += 2)
            cache_pack(f, &c, slot[i], 1, s.n_kv_heads, 10 + 80 * i / n_seqs, 0);
    }
    cuda_clear(f);
}

static const int dims[] = {8, 16, 64, 72, 80, 96, 128}, groups[] = {1, 2, 3, 4, 7, 8, 16};
static const int edges[] = {1, 15, 16, 17, 127, 128, 129}, mixed[] = {257, 2, 0, 100};

static void test_prefill_shapes(void)
{
    struct cuda_fixture *f = cuda_begin(2);
    if (f->effort == QUICK) {
        compare_prefill(f, (struct shape){1, 4, 128, 16}, (const int[]){130, 1}, 2, 2, 0, STALE_LARGE);
        compare_prefill(f, (struct shape){2, 2, 64, 16}, (const int[]){65}, 1, 1, 0, STALE_LARGE);
        compare_prefill(f, (struct shape){1, 3, 72, 16}, (const int[]){17, 33}, 2, 2, 0, STALE_LARGE);
        compare_prefill(f, (struct shape){1, 1, 8, 16}, (const int[]){20}, 1, 1, 0, STALE_LARGE);
    }
    for (int i = 0; i < 7 && f->effort > QUICK; i++)
        for (int j = 0; j < 7; j++) {
            if (f->effort == SOME && (i + j) % 3) continue;
            compare_prefill(f, (struct shape){1 + (i + j) % 3, groups[j], dims[i], 16}, edges, 7, 2, (i + j) % 4 * 8,
                            STALE_LARGE);
            compare_prefill(f, (struct shape){2, groups[j], dims[i], 16}, mixed, 4, 3, 0, STALE_LARGE);
        }
    cuda_end(f);
}

static void test_prefill_long(void)
{
    struct cuda_fixture *f = cuda_begin(3);
    for (int i = 0; i < 7 && f->effort > QUICK; i++) {
        if (f->effort == SOME && i % 3) continue;
        compare_prefill(f, (struct shape){2, 4, dims[i], 16}, (const int[]){1000}, 1, 2, 0, STALE_LARGE);
        compare_prefill(f, (struct shape){1, 7, dims[i], 16}, (const int[]){2880}, 1, 1, 0, STALE_LARGE);
        compare_prefill(f, (struct shape){3, 1, dims[i], 16}, (const int[]){500, 1500, 3, 800}, 4, 1, 0, STALE_LARGE);
    }
    if (f->effort == ALL) compare_prefill(f, (struct shape){8, 4, 128, 16}, (const int[]){2880}, 1, 1, 0, STALE_LARGE);
    cuda_end(f);
}

/* Rows with gaps (of whole 16-byte pieces, as GPUs want them); pages of other sizes; pages that once held
 * not-a-numbers, which a mask must not let in. */
static void test_prefill_odd(void)
{
    struct cuda_fixture *f = cuda_begin(4);
    compare_prefill(f, (struct shape){1, 2, 64, 16}, (const int[]){33, 5}, 2, 2, 8, STALE_LARGE);
    if (f->effort > QUICK)
        for (int i = 0; i < 7; i++) {
            compare_prefill(f, (struct shape){2, 3, dims[i], 16}, edges, 7, 2, 8, STALE_LARGE);
            compare_prefill(f, (struct shape){2, 2, dims[i], 16}, edges, 7, 2, 0, STALE_NAN);
            compare_prefill(f, (struct shape){1, 2, dims[i], 48}, mixed, 4, 2, 0, STALE_LARGE);
            compare_prefill(f, (struct shape){1, 4, dims[i], 32}, mixed, 4, 2, 0, STALE_LARGE);
        }
    cuda_end(f);
}

/* A sequence gives the same bits again, alone, and in a batch. */
static void compare_alone(struct cuda_fixture *f, struct shape s, const int *lengths, int n_seqs)
{
    const struct attention_heads heads = heads_of(s, 0);
    int32_t slot[16], cu[17] = {0};
    for (int i = 0; i < n_seqs; i++) slot[i] = i, cu[i + 1] = cu[i] + lengths[i];
    const int n = cu[n_seqs];
    struct cache c =
        cache_take(f, n_seqs, s.n_kv_heads, n / 16 + 1, (n / 16 + n_seqs) * s.n_kv_heads, 16, s.dim, STALE_LARGE);
    struct chunk x = take_chunk(f, s, n, 0);
    struct batch b = batch_of(f, slot, cu, n_seqs);
    struct twin again = twin_3d(f, n, heads.n_heads, s.dim, 0, 0), alone = twin_3d(f, n, heads.n_heads, s.dim, 0, 0);
    cuda_what(f, "prefill of %d sequences in a batch and alone, head_dim %d", n_seqs, s.dim);
    attend_chunk(f, &c, &heads, &x, &b);
    RUN(f, ops_attention_prefill(&f->gpu, again.gpu, x.q.gpu, x.k.gpu, x.v.gpu, &b.gpu, &c.gpu, &heads));
    for (int i = 0; i < n_seqs; i++) {
        const int32_t one[2] = {0, lengths[i]};
        struct batch single = batch_of(f, slot + i, one, 1);
        RUN(f, ops_attention_prefill(&f->gpu, twin_rows(alone, cu[i], lengths[i]).gpu,
                                     twin_rows(x.q, cu[i], lengths[i]).gpu, twin_rows(x.k, cu[i], lengths[i]).gpu,
                                     twin_rows(x.v, cu[i], lengths[i]).gpu, &single.gpu, &c.gpu, &heads));
    }
    const size_t bytes = (size_t)(again.span + 2 * cuda_guard(f)) * sizeof(uint16_t);
    EXPECT(f, fixture_same(twin_fetch(f, x.out), twin_fetch(f, again), bytes));
    EXPECT(f, fixture_same(twin_fetch(f, x.out), twin_fetch(f, alone), bytes));
    cuda_clear(f);
}

static void test_prefill_alone(void)
{
    struct cuda_fixture *f = cuda_begin(5);
    compare_alone(f, (struct shape){2, 2, 128, 16}, (const int[]){40, 17, 130}, f->effort == QUICK ? 2 : 3);
    if (f->effort > QUICK) {
        compare_alone(f, (struct shape){4, 4, 128, 16}, (const int[]){600, 1, 129, 1300}, 4);
        compare_alone(f, (struct shape){2, 7, 64, 16}, (const int[]){256, 255, 257, 64}, 4);
        compare_alone(f, (struct shape){3, 1, 80, 16}, (const int[]){90, 400, 16}, 3);
    }
    cuda_end(f);
}

int main(int argc, char **argv)
{
    const struct check_case cases[] = {{"images", test_vision},
                                       {"prompts, heads and groups", test_prefill_shapes},
                                       {"long prompts", test_prefill_long},
                                       {"odd rows and pages", test_prefill_odd},
                                       {"prompts alone and in a batch", test_prefill_alone},
                                       {0}};
    return cuda_main("cuda_attention", cases, argc, argv);
}
