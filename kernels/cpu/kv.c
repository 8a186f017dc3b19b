/* The paged cache: append, pack, release. Page numbers are popped and pushed by one thread in a fixed order, so page
 * rows are the same in every run; rows of numbers are copied in parallel. Every op leaves free pages + pages below the
 * lanes' lengths = all pages, also when it reports an error. */
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/lane.h"

int cpu__kv_reset(struct ops *o, const struct kv_view *kv)
{
    (void)o;
    for (int i = 0; i < kv->n_pages; i++) kv->free_stack[i] = kv->n_pages - 1 - i;
    *kv->free_count = kv->n_pages;
    *kv->error = 0;
    memset(kv->lane_len, 0, (size_t)kv->n_slots * (size_t)kv->lanes_per_slot * sizeof *kv->lane_len);
    return OK;
}

/* Grows a lane by n tokens; its length before, or -1 (and the error word set) where it cannot grow. */
static int grow_lane(const struct kv_view *kv, int lane, int n)
{
    int length = kv->lane_len[lane], have = lane__pages(kv, length);
    int64_t wanted = ((int64_t)length + n + kv->page_size - 1) / kv->page_size;
    if (wanted > kv->max_pages) {
        *kv->error |= KV_ERROR_LANE_FULL;
        return -1;
    }
    if (wanted - have > *kv->free_count) {
        *kv->error |= KV_ERROR_NO_FREE_PAGE;
        return -1;
    }
    int32_t *row = lane__page_row(kv, lane);
    while (have < wanted) row[have++] = kv->free_stack[--*kv->free_count];
    kv->lane_len[lane] = length + n;
    return length;
}

static void shrink_lane(const struct kv_view *kv, int lane, int length)
{
    const int32_t *row = lane__page_row(kv, lane);
    int keep = lane__pages(kv, length);
    for (int i = lane__pages(kv, kv->lane_len[lane]) - 1; i >= keep; i--) kv->free_stack[(*kv->free_count)++] = row[i];
    kv->lane_len[lane] = length;
}

static void write_rows(const struct ops *o, const struct kv_view *kv, int lane, int first, const float *k,
                       const float *v, int64_t k_stride, int64_t v_stride, int n)
{
    const size_t bytes = (size_t)kv->head_dim * sizeof(float);
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) if ((int64_t)n * kv->head_dim > CPU_PARALLEL_WORK)
    for (int i = 0; i < n; i++) {
        memcpy(lane__key(kv, lane, first + i), k + i * k_stride, bytes);
        memcpy(lane__value(kv, lane, first + i), v + i * v_stride, bytes);
    }
}

int cpu__kv_append(struct ops *o, const struct kv_view *kv, const struct attention_heads *heads, struct tensor k,
                   struct tensor v, const struct seq_batch *batch)
{
    const int64_t dim = kv->head_dim;
    for (int i = 0; i < batch->n_seqs; i++) {
        int slot = batch->slot[i], row = batch->cu_seqlens ? batch->cu_seqlens[i] : i;
        int n = batch->cu_seqlens ? batch->cu_seqlens[i + 1] - row : 1;
        if (slot < 0 || n == 0) continue;
        if (slot >= kv->n_slots) FAIL(ERR_ARG, "ops_kv_append: slot[%d] is %d, the cache has %d", i, slot, kv->n_slots);
        if (row < 0 || n < 0 || n > batch->n_tokens - row)
            FAIL(ERR_ARG, "ops_kv_append: sequence %d has %d rows from %d on, of %d", i, n, row, batch->n_tokens);
        for (int h = 0; h < heads->n_kv_heads; h++) {
            int lane = slot * kv->lanes_per_slot + heads->lane + h, length = grow_lane(kv, lane, n);
            if (length >= 0)
                write_rows(o, kv, lane, length, cpu__row(k, row) + h * dim, cpu__row(v, row) + h * dim, k.stride[0],
                           v.stride[0], n);
        }
    }
    return OK;
}

static int check_keep(const struct kv_view *kv, int lane, int i, const int32_t *keep, int n)
{
    int length = kv->lane_len[lane];
    if (n > length) FAIL(ERR_ARG, "ops_kv_pack: lane %d keeps %d entries and holds %d", i, n, length);
    for (int j = 0; j < n; j++)
        if (keep[j] < (j ? keep[j - 1] + 1 : 0) || keep[j] >= length)
            FAIL(ERR_ARG, "ops_kv_pack: keep[%d] of lane %d is %d, expected ascending entries below %d", j, i, keep[j],
                 length);
    return OK;
}

int cpu__kv_pack(struct ops *o, const struct kv_view *kv, int slot, int lane, int n_lanes, const int32_t *keep,
                 int keep_stride, const int32_t *n_keep)
{
    const size_t bytes = (size_t)kv->head_dim * sizeof(float);
    const int first = slot * kv->lanes_per_slot + lane;
    for (int i = 0; i < n_lanes; i++) TRY(check_keep(kv, first + i, i, keep + (int64_t)i * keep_stride, n_keep[i]));
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) schedule(dynamic, 1)
    for (int i = 0; i < n_lanes; i++) {
        const int32_t *entry = keep + (int64_t)i * keep_stride;
        for (int j = 0; j < n_keep[i]; j++) { /* ascending, so entry[j] >= j and nothing unread is overwritten */
            if (entry[j] == j) continue;
            memcpy(lane__key(kv, first + i, j), lane__key(kv, first + i, entry[j]), bytes);
            memcpy(lane__value(kv, first + i, j), lane__value(kv, first + i, entry[j]), bytes);
        }
    }
    for (int i = 0; i < n_lanes; i++) shrink_lane(kv, first + i, n_keep[i]);
    return OK;
}

int cpu__kv_release(struct ops *o, const struct kv_view *kv, int slot)
{
    (void)o;
    for (int i = 0; i < kv->lanes_per_slot; i++) shrink_lane(kv, slot * kv->lanes_per_slot + i, 0);
    return OK;
}

static int check_drop(const struct kv_view *kv, int lane, const int32_t *index, const struct kv_drop *d)
{
    if (d->n_block > kv->lane_len[lane] - d->first)
        FAIL(ERR_ARG, "ops_kv_drop: entries %d .. %d of a lane of %d", d->first, d->first + d->n_block,
             kv->lane_len[lane]);
    for (int j = 0; j < d->n_keep; j++)
        if (index[j] < (j ? index[j - 1] + 1 : 0) || index[j] >= d->n_block)
            FAIL(ERR_ARG, "ops_kv_drop: index[%d] is %d, expected ascending entries below %d", j, index[j], d->n_block);
    return OK;
}

int cpu__kv_drop(struct ops *o, const struct kv_view *kv, int slot, const int32_t *index, const struct kv_drop *drop,
                 int n_drops)
{
    const size_t bytes = (size_t)kv->head_dim * sizeof(float);
    (void)o;
    for (int i = 0; i < n_drops; i++) {
        const struct kv_drop *d = &drop[i];
        for (int h = 0; h < d->n_lanes; h++) {
            const int lane = slot * kv->lanes_per_slot + d->lane + h;
            TRY(check_drop(kv, lane, index + d->first_index, d));
            const int n = kv->lane_len[lane] - d->first - d->n_block + d->n_keep;
            for (int j = 0; j < n; j++) { /* from >= j, so nothing unread is overwritten */
                const int from = j < d->n_keep ? index[d->first_index + j] : j - d->n_keep + d->n_block;
                if (from == j) continue;
                memcpy(lane__key(kv, lane, d->first + j), lane__key(kv, lane, d->first + from), bytes);
                memcpy(lane__value(kv, lane, d->first + j), lane__value(kv, lane, d->first + from), bytes);
            }
            shrink_lane(kv, lane, d->first + n);
        }
    }
    return OK;
}
