/* ops_fixture - what the tests of the op table share: an open backend with scratch, random numbers from a seed, arrays
 * and tensors that a test need not free one by one, and a small paged cache with the invariant of its pages. */
#ifndef VITRAIL_TESTS_OPS_FIXTURE_H
#define VITRAIL_TESTS_OPS_FIXTURE_H

#include "base/hash.h"
#include "kernels/ops.h"
#include "tests/check.h"

/* Everything taken with fixture_take is freed by fixture_close. */
struct fixture {
    struct ops ops;
    uint64_t seed;
    int n_blocks;
    void *block[4096];
};

static inline uint64_t fixture_bits(struct fixture *f) { return hash_splitmix(f->seed++); }
static inline int fixture_int(struct fixture *f, int low, int high) /* low .. high, both included */
{
    return low + (int)((fixture_bits(f) >> 33) % (uint64_t)(high - low + 1));
}
static inline float fixture_normal(struct fixture *f)
{
    double sum = 0;
    for (int i = 0; i < 12; i++) sum += (double)(fixture_bits(f) >> 11) * 0x1p-53;
    return (float)(sum - 6);
}

static inline struct fixture *fixture_open(int n_threads, uint64_t seed)
{
    struct fixture *f = calloc(1, sizeof *f);
    struct ops_limits limits = {.max_tokens = 1024,
                                .max_seqs = 16,
                                .max_context = 4096,
                                .max_in_features = 4096,
                                .max_heads = 48,
                                .head_dim = 128,
                                .vocab_size = 50000,
                                .aged = true};
    size_t planned = 0, taken = 0;
    if (!f) abort();
    f->seed = hash_splitmix(seed);
    CHECK_OK(ops_open(&f->ops, "cpu", 0, n_threads));
    CHECK_OK(ops_reserve(&f->ops, &limits, &planned, true));
    CHECK_OK(ops_reserve(&f->ops, &limits, &taken, false));
    CHECK(planned > 0 && planned == taken);
    return f;
}

static inline void fixture_close(struct fixture *f)
{
    for (int i = 0; i < f->n_blocks; i++) free(f->block[i]);
    ops_close(&f->ops);
    free(f);
}

/* Zeroed and of just this size, so that AddressSanitizer sees a step past the end. */
static inline void *fixture_take(struct fixture *f, size_t bytes)
{
    void *memory = calloc(1, bytes ? bytes : 1);
    if (!memory || f->n_blocks == 4096) abort();
    return f->block[f->n_blocks++] = memory;
}

static inline float *fixture_floats(struct fixture *f, int64_t n, float scale)
{
    float *x = fixture_take(f, (size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = scale * fixture_normal(f);
    return x;
}

/* Random tensors whose rows are `gap` elements apart from each other. */
static inline struct tensor fixture_3d(struct fixture *f, int64_t a, int64_t b, int64_t c, int gap)
{
    struct tensor t = tensor_3d(NULL, DTYPE_F32, a, b, c);
    t.stride[0] += gap;
    t.data = fixture_floats(f, a * t.stride[0] - (a ? gap : 0), 1);
    return t;
}
static inline struct tensor fixture_2d(struct fixture *f, int64_t rows, int64_t cols, int gap)
{
    struct tensor t = tensor_2d(NULL, DTYPE_F32, rows, cols);
    t.stride[0] += gap;
    t.data = fixture_floats(f, rows * t.stride[0] - (rows ? gap : 0), 1);
    return t;
}
static inline float *fixture_row(struct tensor t, int64_t i) { return (float *)t.data + i * t.stride[0]; }

/* ops_select_top with one k and window for all rows. */
static inline int fixture_select(struct ops *o, int32_t *index, struct tensor score, int k, int window)
{
    int ks[64], windows[64];
    if (score.dim[0] > 64) abort();
    for (int i = 0; i < 64; i++) ks[i] = k, windows[i] = window;
    return ops_select_top(o, index, k, score, ks, windows);
}

/* Same bits. */
static inline int fixture_same(const void *a, const void *b, size_t bytes) { return memcmp(a, b, bytes) == 0; }

/* A cache of its own memory, reset. */
static inline struct kv_view fixture_cache(struct fixture *f, int n_slots, int lanes_per_slot, int max_pages,
                                           int n_pages, int page_size, int head_dim)
{
    size_t lanes = (size_t)(n_slots * lanes_per_slot);
    struct kv_view kv = {.page_size = page_size,
                         .head_dim = head_dim,
                         .n_pages = n_pages,
                         .max_pages = max_pages,
                         .lanes_per_slot = lanes_per_slot,
                         .n_slots = n_slots};
    kv.pool = tensor_3d(NULL, DTYPE_F32, n_pages, 2 * (int64_t)page_size, head_dim);
    kv.pool.data = fixture_take(f, tensor_bytes(kv.pool));
    kv.page_row = fixture_take(f, lanes * (size_t)max_pages * sizeof(int32_t));
    kv.lane_len = fixture_take(f, lanes * sizeof(int32_t));
    kv.free_stack = fixture_take(f, (size_t)n_pages * sizeof(int32_t));
    kv.free_count = fixture_take(f, sizeof(int32_t));
    kv.error = fixture_take(f, sizeof(int32_t));
    CHECK_OK(ops_kv_reset(&f->ops, &kv));
    return kv;
}

/* Gives a cache what lanes in an 8-bit format need. */
static inline void fixture_quantise(struct fixture *f, struct kv_view *kv, enum kv_format format)
{
    kv->format = format;
    kv->scale = fixture_take(f, (size_t)kv->n_pages * 2 * (size_t)kv_page_tokens(kv, format) * sizeof(float));
    kv->lane_format = fixture_take(f, (size_t)(kv->n_slots * kv->lanes_per_slot) * sizeof(int32_t));
}

/* Pages that a lane holds, as it is stored. */
static inline int fixture_lane_pages(const struct kv_view *kv, int lane)
{
    int tokens = kv_page_tokens(kv, kv->lane_format ? (enum kv_format)kv->lane_format[lane] : KV_PLAIN);
    return (kv->lane_len[lane] + tokens - 1) / tokens;
}

/* The permanent invariant: every page is free or in one lane, none twice. */
static inline int fixture_pages_ok(const struct kv_view *kv)
{
    char *seen = calloc((size_t)kv->n_pages + 1, 1);
    int count = *kv->free_count, ok = seen != NULL && count >= 0 && count <= kv->n_pages;
    for (int i = 0; ok && i < count; i++) {
        int page = kv->free_stack[i];
        ok = page >= 0 && page < kv->n_pages && !seen[page]++;
    }
    for (int lane = 0; ok && lane < kv->n_slots * kv->lanes_per_slot; lane++)
        for (int i = 0; ok && i < fixture_lane_pages(kv, lane); i++, count++) {
            int page = kv->page_row[lane * kv->max_pages + i];
            ok = page >= 0 && page < kv->n_pages && !seen[page]++;
        }
    free(seen);
    return ok && count == kv->n_pages;
}

/* The cache's lanes once more, in 8 bits and empty (kernels/ops_aged.h). */
static inline struct kv_view fixture_aged(struct fixture *f, const struct kv_view *kv, enum kv_format format)
{
    struct kv_view aged = *kv;
    const size_t lanes = (size_t)(kv->n_slots * kv->lanes_per_slot);
    fixture_quantise(f, &aged, format);
    aged.page_row = fixture_take(f, lanes * (size_t)kv->max_pages * sizeof(int32_t));
    aged.lane_len = fixture_take(f, lanes * sizeof(int32_t));
    return aged;
}

/* The invariant where two views share the pages. */
static inline int fixture_parts_ok(const struct kv_view *kv, const struct kv_view *aged)
{
    const struct kv_view *views[] = {kv, aged};
    char *seen = calloc((size_t)kv->n_pages + 1, 1);
    int count = *kv->free_count, ok = seen != NULL && count >= 0 && count <= kv->n_pages;
    for (int i = 0; ok && i < count; i++) {
        int page = kv->free_stack[i];
        ok = page >= 0 && page < kv->n_pages && !seen[page]++;
    }
    for (int lane = 0; ok && lane < 2 * kv->n_slots * kv->lanes_per_slot; lane++) {
        const struct kv_view *view = views[lane % 2];
        for (int i = 0; ok && i < fixture_lane_pages(view, lane / 2); i++, count++) {
            int page = view->page_row[lane / 2 * kv->max_pages + i];
            ok = page >= 0 && page < kv->n_pages && !seen[page]++;
        }
    }
    free(seen);
    return ok && count == kv->n_pages;
}

static inline const float *fixture_key(const struct kv_view *kv, int lane, int i)
{
    int page = kv->page_row[lane * kv->max_pages + i / kv->page_size];
    return (const float *)kv->pool.data + ((int64_t)page * 2 * kv->page_size + i % kv->page_size) * kv->head_dim;
}
static inline const float *fixture_value(const struct kv_view *kv, int lane, int i)
{
    return fixture_key(kv, lane, i) + (int64_t)kv->page_size * kv->head_dim;
}

#endif
