/* Recent tokens of lanes in host memory: which of them a step's lists find on the "device", and what is copied there.
 * On the CPU both are the same memory, and this the reference for what is not.
 *
 * A place is free when none of the last steps listed it. With places for as many steps' lists as keep theirs, a list
 * always finds room for what is missing. */
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/lane.h"

/* One list and the places of its lane. */
struct lane_recall {
    const struct kv_view *kv, *host;
    const struct kv_recent *recent;
    int32_t *entry, *place, *holder, *stamp;
    int n, lane, step;
    int64_t row;
};

/* Entries that are here become their places; how many, of the `listed` ones in host memory. */
static int find_resident(const struct lane_recall *a, int *listed)
{
    int found = 0;
    *listed = 0;
    for (int i = 0; i < a->n; i++) {
        if (a->entry[i] >= 0) continue;
        const int wanted = ~a->entry[i], at = a->place[wanted];
        ++*listed;
        if (at < 0 || at >= a->recent->capacity || !a->stamp[at] || a->holder[at] != wanted) continue;
        a->stamp[at] = a->step;
        a->entry[i] = RECENT_ENTRY + at;
        found++;
    }
    return found;
}

static void fetch(const struct lane_recall *a, int wanted, int at)
{
    const struct kv_view *kv = a->kv;
    const int64_t size = kv->page_size, page = a->row * (a->recent->capacity / size) + at / size;
    const size_t bytes = (size_t)kv->head_dim * sizeof(float);
    float *key = (float *)a->recent->pool.data + (page * 2 * size + at % size) * kv->head_dim;
    memcpy(key, lane__key(a->host, a->lane, wanted), bytes);
    memcpy(key + size * kv->head_dim, lane__value(a->host, a->lane, wanted), bytes);
    a->holder[at] = wanted;
    a->place[wanted] = at;
    a->stamp[at] = a->step;
}

static void fetch_missing(const struct lane_recall *a)
{
    int at = 0;
    for (int i = 0; i < a->n; i++) {
        if (a->entry[i] >= 0) continue;
        while (at < a->recent->capacity && a->stamp[at] && a->stamp[at] + a->recent->steps > a->step) at++;
        if (at == a->recent->capacity) return;
        fetch(a, ~a->entry[i], at);
        a->entry[i] = RECENT_ENTRY + at++;
    }
}

int cpu__recall(struct ops *o, int32_t *entry, const int32_t *count, int stride, const struct seq_batch *batch,
                const struct kv_view *kv, const struct attention_heads *heads, const struct kv_view *host,
                const struct kv_recent *recent)
{
    (void)o;
    for (int item = 0; item < batch->n_seqs * heads->n_kv_heads; item++) {
        const int slot = batch->slot[item / heads->n_kv_heads], lane = heads->lane + item % heads->n_kv_heads;
        if (slot < 0 || slot >= kv->n_slots || count[item] <= 0) continue;
        const int64_t row = (int64_t)slot * recent->n_lanes + lane - recent->first_lane;
        const struct lane_recall a = {.kv = kv,
                                      .host = host,
                                      .recent = recent,
                                      .entry = entry + (int64_t)item * stride,
                                      .place = recent->place + row * recent->max_entries,
                                      .holder = recent->holder + row * recent->capacity,
                                      .stamp = recent->stamp + row * recent->capacity,
                                      .n = count[item],
                                      .lane = slot * kv->lanes_per_slot + lane,
                                      .step = ++recent->step[row],
                                      .row = row};
        int listed;
        recent->counts[2 * slot + 1] += find_resident(&a, &listed);
        recent->counts[2 * slot] += listed;
        fetch_missing(&a);
    }
    return OK;
}
