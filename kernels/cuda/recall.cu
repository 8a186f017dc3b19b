/* Recent tokens of lanes in host memory: which of them a step's lists find on the device, and what is pulled over the
 * bus. A block a list: everything about it is found in integers and in the order of the list and of the places, so that
 * what stands where depends on nothing else; then sixteen threads copy a token each. */
#include "kernels/cuda/select.cuh"

enum { THREADS = 512, COPIERS = 16, COPIES = THREADS / COPIERS };

struct recall_arguments {
    struct kv_view kv, host;
    struct kv_recent recent;
    int32_t *entry;
    const int32_t *count, *slot;
    int stride, n_kv_heads, lane, row_bytes;
};

/* The places of a list's lane. */
struct places {
    int32_t *place, *holder, *stamp, *free, *missing;
    int64_t row;
    int lane, step;
};

__device__ static struct places places_of(const struct recall_arguments &a, int slot, int lane)
{
    const struct kv_recent &r = a.recent;
    struct places p;
    p.row = (int64_t)slot * r.n_lanes + lane - r.first_lane;
    p.place = r.place + p.row * r.max_entries;
    p.holder = r.holder + p.row * r.capacity;
    p.stamp = r.stamp + p.row * r.capacity;
    p.free = r.work + p.row * 2 * r.capacity;
    p.missing = p.free + r.capacity;
    p.lane = cache_lane(a.kv, slot, lane);
    p.step = r.step[p.row] + 1;
    return p;
}

/* Entries that are here become their places; those that are not are listed by their place in the list, as many as there
 * are places. Stamps are only ever raised here, so that what others read of them stays true. Whole block. */
__device__ static int find_resident(const struct recall_arguments &a, const struct places &p, int32_t *entry, int n,
                                    int *found)
{
    int n_missing = 0, n_found = 0, total;
    for (int first = 0; first < n; first += THREADS) {
        const int i = first + (int)threadIdx.x, wanted = i < n ? ~entry[i] : -1;
        const bool far = wanted >= 0 && wanted < a.recent.max_entries;
        const int at = far ? p.place[wanted] : -1;
        const bool here = at >= 0 && at < a.recent.capacity && p.stamp[at] > 0 && p.holder[at] == wanted;
        const int rank = block_rank(far && !here, &total);
        if (here) {
            p.stamp[at] = p.step;
            entry[i] = RECENT_ENTRY + at;
        } else if (far && n_missing + rank < a.recent.capacity) {
            p.missing[n_missing + rank] = i;
        }
        n_missing += total;
        n_found += __syncthreads_count(here);
    }
    *found = n_found;
    return n_missing;
}

/* Ascending places that none of the last steps listed. Whole block, after find_resident. */
__device__ static int find_free(const struct recall_arguments &a, const struct places &p)
{
    int n_free = 0, total;
    for (int first = 0; first < a.recent.capacity; first += THREADS) {
        const int at = first + (int)threadIdx.x, stamp = at < a.recent.capacity ? p.stamp[at] : 0;
        const bool free = at < a.recent.capacity && (stamp == 0 || stamp + a.recent.steps <= p.step);
        const int rank = block_rank(free, &total);
        if (free) p.free[n_free + rank] = at;
        n_free += total;
    }
    __syncthreads();
    return n_free;
}

/* Rows in pieces of 16 bytes; keys and values are both on their way before either is stored. */
__device__ static void pull(const struct recall_arguments &a, const struct places &p, int32_t *entry, int n)
{
    const int copy = (int)threadIdx.x / COPIERS, piece = (int)threadIdx.x % COPIERS, size = a.kv.page_size;
    const int64_t value = (int64_t)size * a.row_bytes;
    for (int first = 0; first < n; first += COPIES) {
        const int k = first + copy;
        const bool mine = k < n;
        const int i = mine ? p.missing[k] : 0, at = mine ? p.free[k] : 0, wanted = mine ? ~entry[i] : 0;
        __syncwarp(); /* all have read the entry that one is about to change */
        if (!mine) continue;
        const int64_t page = p.row * (a.recent.capacity / size) + at / size;
        const int64_t from_page = a.host.page_row[(int64_t)p.lane * a.host.max_pages + wanted / size];
        char *to = (char *)a.recent.pool.data + (page * 2 * size + at % size) * a.row_bytes;
        const char *from = (const char *)a.host.pool.data + (from_page * 2 * size + wanted % size) * a.row_bytes;
        if (16 * piece < a.row_bytes) {
            const uint4 key = __ldcg((const uint4 *)(from + 16 * piece));
            const uint4 its_value = __ldcg((const uint4 *)(from + value + 16 * piece));
            *(uint4 *)(to + 16 * piece) = key;
            *(uint4 *)(to + value + 16 * piece) = its_value;
        }
        if (piece) continue;
        p.holder[at] = wanted;
        p.place[wanted] = at;
        p.stamp[at] = p.step;
        entry[i] = RECENT_ENTRY + at;
    }
}

__global__ static void __launch_bounds__(THREADS) recall_kernel(struct recall_arguments a)
{
    let_successor_start();
    wait_for_predecessor();
    const int item = (int)blockIdx.x, slot = a.slot[item / a.n_kv_heads];
    if (slot < 0 || slot >= a.kv.n_slots || a.count[item] <= 0) return;
    const int n = a.count[item] < a.stride ? a.count[item] : a.stride;
    const struct places p = places_of(a, slot, a.lane + item % a.n_kv_heads);
    int32_t *entry = a.entry + (int64_t)item * a.stride;
    int found;
    const int n_missing = find_resident(a, p, entry, n, &found);
    const int n_free = find_free(a, p), n_pulled = n_missing < n_free ? n_missing : n_free;
    pull(a, p, entry, n_pulled);
    if (threadIdx.x) return;
    a.recent.step[p.row] = p.step;
    atomicAdd((unsigned long long *)&a.recent.counts[2 * slot], (unsigned long long)(n_missing + found));
    atomicAdd((unsigned long long *)&a.recent.counts[2 * slot + 1], (unsigned long long)found);
}

int cuda__recall(struct ops *o, int32_t *entry, const int32_t *count, int stride, const struct seq_batch *batch,
                 const struct kv_view *kv, const struct attention_heads *heads, const struct kv_view *host,
                 const struct kv_recent *recent)
{
    struct recall_arguments a = {};
    a.row_bytes = kv->head_dim * (int)dtype_size(kv->pool.dtype);
    if (a.row_bytes % 16 || a.row_bytes > 16 * COPIERS)
        FAIL(ERR_UNSUPPORTED, "cuda: recall of tokens of %d dimensions; served are steps of 8 up to %d", kv->head_dim,
             8 * COPIERS);
    a.kv = *kv, a.host = *host, a.recent = *recent;
    a.entry = entry, a.count = count, a.stride = stride;
    a.slot = batch->slot;
    a.n_kv_heads = heads->n_kv_heads, a.lane = heads->lane;
    return cuda__launch(o, "recall", recall_kernel, dim3((unsigned)(batch->n_seqs * heads->n_kv_heads)), dim3(THREADS),
                        0, a);
}
