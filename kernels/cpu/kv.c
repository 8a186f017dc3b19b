/* The paged cache: append, pack, quantise, widen, release. Page numbers are popped and pushed by one thread in a fixed
 * order, so page rows are the same in every run; rows of numbers are copied in parallel. Every op leaves free pages +
 * pages below the lanes' lengths = all pages, also when it reports an error. */
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/lane.h"
#include "kernels/quantise.h"

int cpu__kv_reset(struct ops *o, const struct kv_view *kv)
{
    (void)o;
    for (int i = 0; i < kv->n_pages; i++) kv->free_stack[i] = kv->n_pages - 1 - i;
    *kv->free_count = kv->n_pages;
    *kv->error = 0;
    const size_t lanes = (size_t)kv->n_slots * (size_t)kv->lanes_per_slot;
    memset(kv->lane_len, 0, lanes * sizeof *kv->lane_len);
    if (kv->lane_format) memset(kv->lane_format, 0, lanes * sizeof *kv->lane_format);
    return OK;
}

/* Pops what a lane of `have` pages lacks; false (and the error word set) where there are none. */
static bool take_pages(const struct kv_view *kv, int lane, int have, int wanted)
{
    int32_t *row = lane__page_row(kv, lane);
    if (wanted > kv->max_pages) {
        *kv->error |= KV_ERROR_LANE_FULL;
        return false;
    }
    if (wanted - have > *kv->free_count) {
        *kv->error |= KV_ERROR_NO_FREE_PAGE;
        return false;
    }
    while (have < wanted) row[have++] = kv->free_stack[--*kv->free_count];
    return true;
}

/* Grows a lane by n tokens; its length before, or -1 (and the error word set) where it cannot grow. */
static int grow_lane(const struct kv_view *kv, int lane, int n)
{
    const int length = kv->lane_len[lane], wanted = lane__pages_of(kv, lane, (int64_t)length + n);
    if (!take_pages(kv, lane, lane__pages_of(kv, lane, length), wanted)) return -1;
    kv->lane_len[lane] = length + n;
    return length;
}

static void shrink_lane(const struct kv_view *kv, int lane, int length)
{
    const int32_t *row = lane__page_row(kv, lane);
    int keep = lane__pages_of(kv, lane, length), have = lane__pages_of(kv, lane, kv->lane_len[lane]);
    for (int i = have - 1; i >= keep; i--) kv->free_stack[(*kv->free_count)++] = row[i];
    kv->lane_len[lane] = length;
}

/* Codes may be written over the elements that they come from: each is read before a byte of it is overwritten. */
static void quantise_row(enum kv_format format, uint8_t *code, float *scale, const float *x, int dim)
{
    uint32_t largest = 0;
    for (int d = 0; d < dim; d++) {
        const uint32_t magnitude = quantise_magnitude(x[d]);
        largest = magnitude > largest ? magnitude : largest;
    }
    const float by = quantise_scale(format, largest);
    for (int d = 0; d < dim; d++) code[d] = quantise_code(format, x[d], by);
    *scale = by;
}

static void quantise_token(const struct kv_view *kv, enum kv_format format, int lane, int i, const float *k,
                           const float *v)
{
    quantise_row(format, lane__key_codes(kv, lane, i), lane__key_scale(kv, lane, i), k, kv->head_dim);
    quantise_row(format, lane__value_codes(kv, lane, i), lane__value_scale(kv, lane, i), v, kv->head_dim);
}

static void write_rows(const struct ops *o, const struct kv_view *kv, int lane, int first, const float *k,
                       const float *v, int64_t k_stride, int64_t v_stride, int n)
{
    const size_t bytes = (size_t)kv->head_dim * sizeof(float);
    const enum kv_format format = lane__format(kv, lane);
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) if ((int64_t)n * kv->head_dim > CPU_PARALLEL_WORK)
    for (int i = 0; i < n; i++) {
        if (format != KV_PLAIN) {
            quantise_token(kv, format, lane, first + i, k + i * k_stride, v + i * v_stride);
            continue;
        }
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
            int lane = slot * kv->lanes_per_slot + heads->lane + h, length = -1;
            if (batch->cu_seqlens && lane__format(kv, lane) != KV_PLAIN)
                *kv->error |= KV_ERROR_QUANTISED;
            else
                length = grow_lane(kv, lane, n);
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
    if (lane__format(kv, lane) != KV_PLAIN) FAIL(ERR_ARG, "ops_kv_pack: lane %d is quantised: pack before", i);
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

int cpu__list_others(struct ops *o, int32_t *other, int other_stride, const int32_t *keep, int keep_stride,
                     const int32_t *n_keep, int n, int n_lanes)
{
    (void)o;
    for (int i = 0; i < n_lanes; i++) {
        const int32_t *kept = keep + (int64_t)i * keep_stride;
        int32_t *out = other + (int64_t)i * other_stride;
        for (int j = 0, at = 0; j < n; j++) {
            if (at < n_keep[i] && kept[at] == j)
                at++;
            else
                out[j - at] = j;
        }
    }
    return OK;
}

/* An entry of kv to the place i of the lane in host memory. */
static void copy_entry(const struct kv_view *kv, const struct kv_view *host, int lane, int entry, int i)
{
    const size_t bytes = (size_t)kv->head_dim * sizeof(float);
    memcpy(lane__key(host, lane, i), lane__key(kv, lane, entry), bytes);
    memcpy(lane__value(host, lane, i), lane__value(kv, lane, entry), bytes);
}

int cpu__kv_split(struct ops *o, const struct kv_view *kv, const struct kv_view *host, int slot, int lane, int n_lanes,
                  const int32_t *index, int index_stride, const int32_t *n_index)
{
    const int first = slot * kv->lanes_per_slot + lane;
    for (int i = 0; i < n_lanes; i++)
        for (int j = 0; j < n_index[i]; j++) {
            const int entry = index[(int64_t)i * index_stride + j];
            if (entry < 0 || entry >= kv->lane_len[first + i])
                FAIL(ERR_ARG, "ops_kv_split: index[%d] of lane %d is %d, the lane holds %d entries", j, i, entry,
                     kv->lane_len[first + i]);
        }
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) schedule(dynamic, 1) ordered
    for (int i = 0; i < n_lanes; i++) {
        bool grown = false;
#pragma omp ordered
        {
            if (host->lane_len[first + i])
                *host->error |= KV_ERROR_LANE_FULL;
            else
                grown = n_index[i] > 0 && grow_lane(host, first + i, n_index[i]) == 0;
        }
        for (int j = 0; grown && j < n_index[i]; j++)
            copy_entry(kv, host, first + i, index[(int64_t)i * index_stride + j], j);
    }
    return OK;
}

int cpu__kv_quantise(struct ops *o, const struct kv_view *kv, int slot)
{
    const int first = slot * kv->lanes_per_slot, end = first + kv->lanes_per_slot;
    /* In place: tokens ascend, so a token's codes lie before all elements that are still to be read. */
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) schedule(dynamic, 1)
    for (int lane = first; lane < end; lane++)
        for (int i = 0; i < kv->lane_len[lane] && lane__format(kv, lane) == KV_PLAIN; i++)
            quantise_token(kv, kv->format, lane, i, lane__key(kv, lane, i), lane__value(kv, lane, i));
    for (int lane = first; lane < end; lane++) {
        const int32_t *row = lane__page_row(kv, lane);
        const int had = lane__pages_of(kv, lane, kv->lane_len[lane]);
        if (lane__format(kv, lane) != KV_PLAIN) continue;
        kv->lane_format[lane] = (int32_t)kv->format;
        for (int i = had - 1; i >= lane__pages_of(kv, lane, kv->lane_len[lane]); i--)
            kv->free_stack[(*kv->free_count)++] = row[i];
    }
    return OK;
}

/* The elements of a key or value, from the last piece to the first: of codes that lie where the elements begin none is
 * overwritten before it is read. */
static void widen_row(const struct vector_ops *v, enum kv_format format, float *x, const uint8_t *code, float scale,
                      int dim)
{
    enum { PIECE = 64 };
    uint8_t copy[PIECE];
    for (int first = (dim - 1) / PIECE * PIECE; first >= 0; first -= PIECE) {
        const int n = cpu__min(PIECE, dim - first);
        memcpy(copy, code + first, (size_t)n);
        v->widen_codes(x + first, copy, format == KV_FP8, n);
        v->scale(x + first, scale, n);
    }
}

int cpu__kv_widen(struct ops *o, const struct kv_view *kv, int slot)
{
    const int first = slot * kv->lanes_per_slot, end = first + kv->lanes_per_slot;
    const struct vector_ops *v = cpu__of(o)->vector;
    /* In place: tokens descend, so a token's elements lie behind all codes that are still to be read. */
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) schedule(dynamic, 1) ordered
    for (int lane = first; lane < end; lane++) {
        const enum kv_format format = lane__format(kv, lane);
        const int length = kv->lane_len[lane];
        bool widens = false;
#pragma omp ordered
        widens = format != KV_PLAIN && take_pages(kv, lane, lane__pages_of(kv, lane, length), lane__pages(kv, length));
        for (int i = length - 1; widens && i >= 0; i--) {
            widen_row(v, format, lane__key(kv, lane, i), lane__key_codes(kv, lane, i), *lane__key_scale(kv, lane, i),
                      kv->head_dim);
            widen_row(v, format, lane__value(kv, lane, i), lane__value_codes(kv, lane, i),
                      *lane__value_scale(kv, lane, i), kv->head_dim);
        }
        if (widens) kv->lane_format[lane] = KV_PLAIN;
    }
    return OK;
}

int cpu__kv_release(struct ops *o, const struct kv_view *kv, int slot)
{
    (void)o;
    for (int i = slot * kv->lanes_per_slot; i < (slot + 1) * kv->lanes_per_slot; i++) {
        shrink_lane(kv, i, 0);
        if (kv->lane_format) kv->lane_format[i] = KV_PLAIN;
    }
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
    (void)o;
    for (int i = 0; i < n_drops; i++) {
        const struct kv_drop *d = &drop[i];
        for (int h = 0; h < d->n_lanes; h++) {
            const int lane = slot * kv->lanes_per_slot + d->lane + h;
            TRY(check_drop(kv, lane, index + d->first_index, d));
            const int n = kv->lane_len[lane] - d->first - d->n_block + d->n_keep;
            for (int j = 0; j < n; j++) { /* from >= j, so nothing unread is overwritten */
                const int from = j < d->n_keep ? index[d->first_index + j] : j - d->n_keep + d->n_block;
                if (from != j) lane__move(kv, lane, d->first + j, d->first + from);
            }
            shrink_lane(kv, lane, d->first + n);
        }
    }
    return OK;
}

/* ---- lanes in two parts (ops_aged.h) ---- */

/* The lane moves as it is to aged and gets fresh pages for what stays, from which the rest is quantised in place: a
 * token's codes lie before all elements that are still to be read. */
static void age_in_place(const struct kv_view *kv, const struct kv_view *aged, int lane, int sinks, int stay)
{
    const size_t bytes = (size_t)kv->head_dim * sizeof(float);
    const int length = kv->lane_len[lane], n = length - stay;
    const int had = lane__pages(kv, length), fresh = lane__pages(kv, stay);
    int32_t *row = lane__page_row(kv, lane), *old = lane__page_row(aged, lane);
    memcpy(old, row, (size_t)had * sizeof *old);
    for (int i = 0; i < fresh; i++) row[i] = kv->free_stack[--*kv->free_count];
    for (int j = 0; j < stay; j++) {
        const int from = j < sinks ? j : j + n;
        memcpy(lane__key(kv, lane, j), lane__key(aged, lane, from), bytes);
        memcpy(lane__value(kv, lane, j), lane__value(aged, lane, from), bytes);
    }
    for (int i = 0; i < n; i++)
        quantise_token(aged, aged->format, lane, i, lane__key(aged, lane, sinks + i),
                       lane__value(aged, lane, sinks + i));
    kv->lane_len[lane] = stay;
    aged->lane_len[lane] = n;
    aged->lane_format[lane] = (int32_t)aged->format;
    for (int i = had - 1; i >= lane__pages_of(aged, lane, n); i--) kv->free_stack[(*kv->free_count)++] = old[i];
}

static void age_to_end(const struct kv_view *kv, const struct kv_view *aged, int lane, int sinks, int stay)
{
    const size_t bytes = (size_t)kv->head_dim * sizeof(float);
    const int n = kv->lane_len[lane] - stay;
    if (aged->lane_len[lane] == 0) aged->lane_format[lane] = (int32_t)aged->format;
    const int at = grow_lane(aged, lane, n);
    if (at < 0) return;
    for (int i = 0; i < n; i++)
        quantise_token(aged, lane__format(aged, lane), lane, at + i, lane__key(kv, lane, sinks + i),
                       lane__value(kv, lane, sinks + i));
    for (int j = sinks; j < stay; j++) {
        memcpy(lane__key(kv, lane, j), lane__key(kv, lane, j + n), bytes);
        memcpy(lane__value(kv, lane, j), lane__value(kv, lane, j + n), bytes);
    }
    shrink_lane(kv, lane, stay);
}

int cpu__kv_age(struct ops *o, const struct kv_view *kv, const struct kv_view *aged, int slot, int sinks, int window)
{
    const int stay = sinks + window, code_tokens = lane__code_tokens(kv);
    (void)o;
    for (int lane = slot * kv->lanes_per_slot; lane < (slot + 1) * kv->lanes_per_slot; lane++) {
        const int n = kv->lane_len[lane] - stay, fresh = lane__pages(kv, stay);
        if (lane__format(kv, lane) != KV_PLAIN) FAIL(ERR_ARG, "ops_kv_age: lane %d of kv is quantised", lane);
        if (n <= 0) continue;
        if (aged->lane_len[lane] > 0 || fresh >= (n + code_tokens - 1) / code_tokens)
            age_to_end(kv, aged, lane, sinks, stay);
        else if (fresh > *kv->free_count)
            *kv->error |= KV_ERROR_NO_FREE_PAGE;
        else
            age_in_place(kv, aged, lane, sinks, stay);
    }
    return OK;
}
