/* cuda_cache - the paged cache on both sides, for the tests of attention and of the cache itself: filled with the same
 * tokens, packed to the same entries, compared token by token. Page numbers may differ, what they hold may not. */
#ifndef VITRAIL_TESTS_CUDA_CUDA_CACHE_H
#define VITRAIL_TESTS_CUDA_CUDA_CACHE_H

#include "tests/cuda/cuda_fixture.h"

struct cache {
    struct kv_view gpu, cpu;
};

/* What pages hold before anything is written to them: numbers too large to go unseen, or not-a-numbers. */
enum stale { STALE_LARGE, STALE_NAN };

static inline struct cache cache_take(struct cuda_fixture *f, int n_slots, int lanes_per_slot, int max_pages,
                                      int n_pages, int page_size, int head_dim, enum stale stale)
{
    struct cache c = {.cpu = fixture_cache(f->cpu, n_slots, lanes_per_slot, max_pages, n_pages, page_size, head_dim)};
    const size_t lanes = (size_t)(n_slots * lanes_per_slot), bytes = tensor_bytes(c.cpu.pool) / 2;
    c.gpu = c.cpu;
    c.gpu.pool.dtype = f->dtype;
    c.gpu.pool.data = cuda_take(f, bytes);
    c.gpu.page_row = cuda_take(f, lanes * (size_t)max_pages * sizeof(int32_t));
    c.gpu.lane_len = cuda_take(f, lanes * sizeof(int32_t));
    c.gpu.free_stack = cuda_take(f, (size_t)n_pages * sizeof(int32_t));
    c.gpu.free_count = cuda_take(f, sizeof(int32_t));
    c.gpu.error = cuda_take(f, sizeof(int32_t));
    uint16_t *raw = malloc(bytes + 1), bits[4];
    if (!raw) abort();
    cuda_set_element(bits, f->dtype, 0, stale == STALE_NAN ? NAN : 9984);
    cuda_set_element(bits, f->dtype, 1, stale == STALE_NAN ? NAN : -7040);
    for (size_t i = 0; i < bytes / 2; i++) raw[i] = bits[i % 3 == 0];
    RUN(f, ops_upload(&f->gpu, c.gpu.pool.data, raw, bytes));
    RUN(f, ops_kv_reset(&f->gpu, &c.gpu));
    free(raw);
    return c;
}

static inline size_t cache_scale_bytes(const struct kv_view *kv)
{
    return (size_t)kv->n_pages * 2 * (size_t)kv_page_tokens(kv, KV_INT8) * sizeof(float);
}

/* Gives both caches what lanes in an 8-bit format need. */
static inline void cache_quantise(struct cuda_fixture *f, struct cache *c, enum kv_format format)
{
    fixture_quantise(f->cpu, &c->cpu, format);
    c->gpu.format = format;
    c->gpu.scale = cuda_take(f, cache_scale_bytes(&c->gpu));
    c->gpu.lane_format = cuda_take(f, (size_t)(c->gpu.n_slots * c->gpu.lanes_per_slot) * sizeof(int32_t));
}

/* The device's cache as host arrays, the pool in its own dtype. */
static inline struct kv_view cache_fetch(struct cuda_fixture *f, const struct cache *c)
{
    const size_t lanes = (size_t)(c->gpu.n_slots * c->gpu.lanes_per_slot), bytes = tensor_bytes(c->gpu.pool);
    const size_t row_bytes = lanes * (size_t)c->gpu.max_pages * sizeof(int32_t);
    struct kv_view host = c->gpu;
    host.pool.data = fixture_take(f->cpu, bytes);
    host.page_row = fixture_take(f->cpu, row_bytes);
    host.lane_len = fixture_take(f->cpu, lanes * sizeof(int32_t));
    host.free_stack = fixture_take(f->cpu, (size_t)c->gpu.n_pages * sizeof(int32_t));
    host.free_count = fixture_take(f->cpu, sizeof(int32_t));
    host.error = fixture_take(f->cpu, sizeof(int32_t));
    RUN(f, ops_download(&f->gpu, host.pool.data, c->gpu.pool.data, bytes));
    RUN(f, ops_download(&f->gpu, host.page_row, c->gpu.page_row, row_bytes));
    RUN(f, ops_download(&f->gpu, host.lane_len, c->gpu.lane_len, lanes * sizeof(int32_t)));
    RUN(f, ops_download(&f->gpu, host.free_stack, c->gpu.free_stack, (size_t)c->gpu.n_pages * sizeof(int32_t)));
    RUN(f, ops_download(&f->gpu, host.free_count, c->gpu.free_count, sizeof(int32_t)));
    RUN(f, ops_download(&f->gpu, host.error, c->gpu.error, sizeof(int32_t)));
    if (!c->gpu.lane_format) return host;
    host.lane_format = fixture_take(f->cpu, lanes * sizeof(int32_t));
    host.scale = fixture_take(f->cpu, cache_scale_bytes(&host));
    RUN(f, ops_download(&f->gpu, host.lane_format, c->gpu.lane_format, lanes * sizeof(int32_t)));
    RUN(f, ops_download(&f->gpu, host.scale, c->gpu.scale, cache_scale_bytes(&host)));
    return host;
}

/* Puts page rows, lengths and the stack of free pages back as they were fetched; not the pages themselves. */
static inline void cache_restore(struct cuda_fixture *f, const struct cache *c, const struct kv_view *host)
{
    const size_t lanes = (size_t)(c->gpu.n_slots * c->gpu.lanes_per_slot);
    RUN(f, ops_upload(&f->gpu, c->gpu.page_row, host->page_row, lanes * (size_t)c->gpu.max_pages * sizeof(int32_t)));
    RUN(f, ops_upload(&f->gpu, c->gpu.lane_len, host->lane_len, lanes * sizeof(int32_t)));
    RUN(f, ops_upload(&f->gpu, c->gpu.free_stack, host->free_stack, (size_t)c->gpu.n_pages * sizeof(int32_t)));
    RUN(f, ops_upload(&f->gpu, c->gpu.free_count, host->free_count, sizeof(int32_t)));
}

/* Whether token i of a fetched lane is the CPU's, keys and values, bit by bit. */
static inline bool cache_token_same(const struct kv_view *host, const struct kv_view *cpu, int lane, int i)
{
    const int64_t page = host->page_row[(int64_t)lane * host->max_pages + i / host->page_size];
    const int64_t key = (page * 2 * host->page_size + i % host->page_size) * host->head_dim;
    const int64_t value = key + (int64_t)host->page_size * host->head_dim;
    for (int d = 0; d < host->head_dim; d++)
        if (cuda_element(host->pool.data, host->pool.dtype, key + d) != fixture_key(cpu, lane, i)[d] ||
            cuda_element(host->pool.data, host->pool.dtype, value + d) != fixture_value(cpu, lane, i)[d])
            return false;
    return true;
}

/* Codes of token i of a quantised lane, key or value, and its scale. */
static inline const uint8_t *cache_codes(const struct kv_view *kv, int lane, int i, int value, float *scale)
{
    const int tokens = kv_page_tokens(kv, KV_INT8);
    const int64_t page = kv->page_row[(int64_t)lane * kv->max_pages + i / tokens];
    const int64_t row = (page * 2 + value) * tokens + i % tokens;
    *scale = kv->scale[row];
    return (const uint8_t *)kv->pool.data + row * kv->head_dim;
}

static inline bool cache_codes_same(const struct kv_view *host, const struct kv_view *cpu, int lane, int i)
{
    bool same = true;
    for (int value = 0; value < 2; value++) {
        float got, want;
        const uint8_t *a = cache_codes(host, lane, i, value, &got), *b = cache_codes(cpu, lane, i, value, &want);
        same = same && fixture_same(&got, &want, sizeof got) && fixture_same(a, b, (size_t)cpu->head_dim);
    }
    return same;
}

/* cache_check - the invariant of pages, the same lengths and error word, the same tokens. */
static inline void cache_check(struct cuda_fixture *f, const struct cache *c)
{
    const struct kv_view host = cache_fetch(f, c);
    EXPECT(f, *host.error == *c->cpu.error);
    if (!fixture_pages_ok(&host)) {
        cuda_wrong(f, "pages: a page is lost, or in two places (%d of %d free)", *host.free_count, host.n_pages);
        return;
    }
    for (int lane = 0; lane < host.n_slots * host.lanes_per_slot; lane++) {
        if (host.lane_len[lane] != c->cpu.lane_len[lane]) {
            cuda_wrong(f, "lane %d holds %d tokens, expected %d", lane, host.lane_len[lane], c->cpu.lane_len[lane]);
            return;
        }
        const int format = host.lane_format ? host.lane_format[lane] : KV_PLAIN;
        if (host.lane_format && format != c->cpu.lane_format[lane]) {
            cuda_wrong(f, "lane %d is stored in format %d, expected %d", lane, format, c->cpu.lane_format[lane]);
            return;
        }
        for (int i = 0; i < host.lane_len[lane]; i++)
            if (format ? !cache_codes_same(&host, &c->cpu, lane, i) : !cache_token_same(&host, &c->cpu, lane, i)) {
                cuda_wrong(f, "token %d of lane %d (%d tokens) differs", i, lane, host.lane_len[lane]);
                return;
            }
    }
}

/* ---- the same op on both sides ---- */

/* A batch on both sides; decode: one row a sequence. */
struct batch {
    struct seq_batch gpu, cpu;
};

static inline struct batch batch_of(struct cuda_fixture *f, const int32_t *slot, const int32_t *cu, int n_seqs)
{
    struct pair s = pair_of(f, slot, sizeof *slot * (size_t)n_seqs);
    struct batch b = {.cpu = {.n_seqs = n_seqs, .n_tokens = cu ? cu[n_seqs] : n_seqs, .slot = s.cpu}};
    b.gpu = b.cpu;
    b.gpu.slot = s.gpu;
    if (!cu) return b;
    struct pair c = pair_of(f, cu, sizeof *cu * (size_t)(n_seqs + 1));
    b.gpu.cu_seqlens = c.gpu;
    b.cpu.cu_seqlens = b.cpu.host_cu_seqlens = b.gpu.host_cu_seqlens = c.cpu;
    b.cpu.host_slot = b.gpu.host_slot = s.cpu;
    return b;
}

static inline void cache_append(struct cuda_fixture *f, const struct cache *c, const struct attention_heads *heads,
                                struct twin k, struct twin v, const struct batch *b)
{
    RUN(f, ops_kv_append(&f->gpu, &c->gpu, heads, k.gpu, v.gpu, &b->gpu));
    RUN(f, ops_kv_append(&f->cpu->ops, &c->cpu, heads, k.cpu, v.cpu, &b->cpu));
}

/* n random tokens at the end of one slot's lanes of a layer. */
static inline void cache_fill(struct cuda_fixture *f, const struct cache *c, const struct attention_heads *heads,
                              int slot, int n)
{
    const int32_t s[1] = {slot}, cu[2] = {0, n};
    struct batch b = batch_of(f, s, cu, 1);
    struct twin k = twin_3d(f, n, heads->n_kv_heads, heads->head_dim, 0, 1);
    struct twin v = twin_3d(f, n, heads->n_kv_heads, heads->head_dim, 0, 1);
    cache_append(f, c, heads, k, v, &b);
}

/* Keeps about `percent` of the tokens of n_lanes lanes, of each lane others, and at least `least` where it has them. */
static inline void cache_pack(struct cuda_fixture *f, const struct cache *c, int slot, int lane, int n_lanes,
                              int percent, int least)
{
    const int stride = c->cpu.max_pages * c->cpu.page_size + 1;
    int32_t *keep = fixture_take(f->cpu, sizeof *keep * (size_t)(stride * n_lanes)), n_keep[MOST_LANES] = {0};
    for (int i = 0; i < n_lanes; i++) {
        const int length = c->cpu.lane_len[slot * c->cpu.lanes_per_slot + lane + i];
        for (int j = 0; j < length; j++)
            if (fixture_int(f->cpu, 1, 100) <= percent || n_keep[i] + length - j <= least)
                keep[i * stride + n_keep[i]++] = j;
    }
    struct pair kept = pair_of(f, keep, sizeof *keep * (size_t)(stride * n_lanes));
    RUN(f, ops_kv_pack(&f->gpu, &c->gpu, slot, lane, n_lanes, kept.gpu, stride, n_keep));
    RUN(f, ops_kv_pack(&f->cpu->ops, &c->cpu, slot, lane, n_lanes, kept.cpu, stride, n_keep));
}

#endif
