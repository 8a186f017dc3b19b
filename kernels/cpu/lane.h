/* lane - addresses within the paged cache (struct kv_view): where a lane's tokens lie. */
#ifndef VITRAIL_KERNELS_CPU_LANE_H
#define VITRAIL_KERNELS_CPU_LANE_H

#include <string.h>

#include "kernels/ops.h"

static inline enum kv_format lane__format(const struct kv_view *kv, int lane)
{
    return kv->lane_format ? (enum kv_format)kv->lane_format[lane] : KV_PLAIN;
}

/* lane__pages - pages that `length` plain tokens take. lane__pages_of - that as many of a lane's take, as it is stored.
 */
static inline int lane__pages(const struct kv_view *kv, int length)
{
    return (int)(((int64_t)length + kv->page_size - 1) / kv->page_size);
}
static inline int lane__pages_of(const struct kv_view *kv, int lane, int64_t length)
{
    int tokens = kv_page_tokens(kv, lane__format(kv, lane));
    return (int)((length + tokens - 1) / tokens);
}

static inline int32_t *lane__page_row(const struct kv_view *kv, int lane)
{
    return kv->page_row + (int64_t)lane * kv->max_pages;
}

/* lane__page - the keys of a page of a lane, [page_size, head_dim]; its values follow. */
static inline float *lane__page(const struct kv_view *kv, int lane, int page)
{
    return (float *)kv->pool.data + lane__page_row(kv, lane)[page] * kv->pool.stride[0];
}

static inline float *lane__key(const struct kv_view *kv, int lane, int i)
{
    return lane__page(kv, lane, i / kv->page_size) + (int64_t)(i % kv->page_size) * kv->head_dim;
}

static inline float *lane__value(const struct kv_view *kv, int lane, int i)
{
    return lane__key(kv, lane, i) + (int64_t)kv->page_size * kv->head_dim;
}

/* lane__code_tokens - tokens of a page of codes. lane__key_codes, lane__value_codes - codes [head_dim] of token i of a
 * quantised lane, its page's next tokens behind them. lane__key_scale, lane__value_scale - their scales likewise. */
static inline int lane__code_tokens(const struct kv_view *kv) { return kv->page_size * (int)sizeof(float); }
static inline uint8_t *lane__key_codes(const struct kv_view *kv, int lane, int i)
{
    int tokens = lane__code_tokens(kv);
    return (uint8_t *)lane__page(kv, lane, i / tokens) + (int64_t)(i % tokens) * kv->head_dim;
}
static inline uint8_t *lane__value_codes(const struct kv_view *kv, int lane, int i)
{
    return lane__key_codes(kv, lane, i) + (int64_t)lane__code_tokens(kv) * kv->head_dim;
}
static inline float *lane__key_scale(const struct kv_view *kv, int lane, int i)
{
    int64_t tokens = lane__code_tokens(kv);
    return kv->scale + lane__page_row(kv, lane)[i / tokens] * 2 * tokens + i % tokens;
}
static inline float *lane__value_scale(const struct kv_view *kv, int lane, int i)
{
    return lane__key_scale(kv, lane, i) + lane__code_tokens(kv);
}

/* lane__move - entry `from` of a lane takes the place of entry `to`, as the lane is stored. */
static inline void lane__move(const struct kv_view *kv, int lane, int to, int from)
{
    const size_t dim = (size_t)kv->head_dim, bytes = dim * sizeof(float);
    if (lane__format(kv, lane) == KV_PLAIN) {
        memcpy(lane__key(kv, lane, to), lane__key(kv, lane, from), bytes);
        memcpy(lane__value(kv, lane, to), lane__value(kv, lane, from), bytes);
        return;
    }
    memcpy(lane__key_codes(kv, lane, to), lane__key_codes(kv, lane, from), dim);
    memcpy(lane__value_codes(kv, lane, to), lane__value_codes(kv, lane, from), dim);
    *lane__key_scale(kv, lane, to) = *lane__key_scale(kv, lane, from);
    *lane__value_scale(kv, lane, to) = *lane__value_scale(kv, lane, from);
}

/* lane__gather - keys and, unless v is NULL, values of tokens [first, first + n) into dense [n, head_dim] buffers. */
static inline void lane__gather(const struct kv_view *kv, int lane, int first, int n, float *k, float *v)
{
    const int64_t dim = kv->head_dim;
    for (int done = 0, run; done < n; done += run) {
        int rest = kv->page_size - (first + done) % kv->page_size;
        run = rest < n - done ? rest : n - done;
        size_t bytes = (size_t)(run * dim) * sizeof(float);
        memcpy(k + done * dim, lane__key(kv, lane, first + done), bytes);
        if (v) memcpy(v + done * dim, lane__value(kv, lane, first + done), bytes);
    }
}

#endif
