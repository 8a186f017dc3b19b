/* Pages of a lane (struct page_pick), ranked by what a key within the page's bounds could give to the queries at hand.
 */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/lane.h"
#include "kernels/cpu/select.h"
#include "kernels/quantise.h"

/* Where a page of a lane has its bounds: the least of each channel, then the largest. */
static float *bounds_of(struct tensor bounds, const struct kv_view *kv, int lane, int page)
{
    const int each = kv_picked_pages(kv);
    return cpu__row(bounds, lane__page_row(kv, lane)[page / each]) + (int64_t)(page % each) * 2 * kv->head_dim;
}

static void bound_page(struct tensor bounds, const struct kv_view *kv, int lane, int page)
{
    const int dim = kv->head_dim, first = page * kv->page_size, n = cpu__min(kv->page_size, kv->lane_len[lane] - first);
    const enum kv_format format = lane__format(kv, lane);
    float *least = bounds_of(bounds, kv, lane, page), *largest = least + dim;
    for (int i = 0; i < n; i++) {
        const bool plain = format == KV_PLAIN;
        const float *key = plain ? lane__key(kv, lane, first + i) : NULL;
        const uint8_t *code = plain ? NULL : lane__key_codes(kv, lane, first + i);
        const float scale = plain ? 1 : *lane__key_scale(kv, lane, first + i);
        for (int d = 0; d < dim; d++) {
            const float x = plain ? key[d] : quantise_value(format, code[d]) * scale;
            least[d] = i == 0 || x < least[d] ? x : least[d];
            largest[d] = i == 0 || x > largest[d] ? x : largest[d];
        }
    }
}

int cpu__page_bounds(struct ops *o, struct tensor bounds, const struct kv_view *kv, int slot, int lane, int n_lanes)
{
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) schedule(dynamic, 1)
    for (int i = 0; i < n_lanes; i++) {
        const int at = slot * kv->lanes_per_slot + lane + i, n = lane__pages(kv, kv->lane_len[at]);
        for (int page = 0; page < n; page++) bound_page(bounds, kv, at, page);
    }
    return OK;
}

/* The most that a key within the bounds gives to q, in eight sums that the compiler adds side by side. */
static float most_of(const float *q, const float *least, int dim)
{
    const float *largest = least + dim;
    float sum[8] = {0}, all = 0;
    int d = 0;
    for (; d + 8 <= dim; d += 8)
        for (int i = 0; i < 8; i++) {
            const float low = q[d + i] * least[d + i], high = q[d + i] * largest[d + i];
            sum[i] += low > high ? low : high;
        }
    for (; d < dim; d++) {
        const float low = q[d] * least[d], high = q[d] * largest[d];
        all += low > high ? low : high;
    }
    for (int i = 0; i < 8; i++) all += sum[i];
    return all;
}

/* Entries of the best `limit` of n pages; the number of entries. */
static int list_pages(int32_t *entry, const float *score, int n, int limit, int page_size, int length)
{
    int64_t equal = 0;
    const uint32_t bound = select__kth_key(score, n, limit, &equal);
    int count = 0;
    for (int page = 0; page < n; page++) {
        const uint32_t key = select__key(score[page]);
        if (key < bound || (key == bound && equal-- <= 0)) continue;
        for (int i = page * page_size; i < (page + 1) * page_size && i < length; i++) entry[count++] = i;
    }
    return count;
}

static void pick_lane(const float *q, const struct kv_view *kv, const struct attention_heads *heads,
                      const struct page_pick *pick, int slot, int i)
{
    const int dim = kv->head_dim, group = heads->n_heads / heads->n_kv_heads, head = i % heads->n_kv_heads;
    const int lane = slot * kv->lanes_per_slot + heads->lane + head, length = kv->lane_len[lane];
    const int n = lane__pages(kv, length), limit = cpu__min(pick->limit[slot], pick->stride / kv->page_size);
    float *score = cpu__row(pick->score, i);
    pick->count[i] = -1;
    if (limit <= 0 || n == 0 || n > kv->max_pages) return;
    bound_page(pick->bounds, kv, lane, n - 1);
    for (int page = 0; page < n; page++) {
        const float *least = bounds_of(pick->bounds, kv, lane, page);
        for (int j = 0; j < group; j++) {
            const float most = most_of(q + (int64_t)(head * group + j) * dim, least, dim);
            score[page] = j && score[page] > most ? score[page] : most;
        }
    }
    if (limit < n)
        pick->count[i] = list_pages(pick->entry + (int64_t)i * pick->stride, score, n, limit, kv->page_size, length);
}

int cpu__pick_pages(struct ops *o, struct tensor q, const struct seq_batch *batch, const struct kv_view *kv,
                    const struct attention_heads *heads, const struct page_pick *pick)
{
    const int n_kv = heads->n_kv_heads;
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) schedule(dynamic, 1)
    for (int i = 0; i < batch->n_seqs * n_kv; i++) {
        const int slot = batch->slot[i / n_kv];
        if (slot < 0 || slot >= kv->n_slots)
            pick->count[i] = 0;
        else
            pick_lane(cpu__row(q, i / n_kv), kv, heads, pick, slot, i);
    }
    return OK;
}
