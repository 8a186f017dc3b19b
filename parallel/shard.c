/* shard - see shard.h. The remainder of r = heads mod ranks goes, in layer l, to ranks (l r + i) mod ranks, i < r:
 * taken layer by layer this walks round the ranks without a gap, so totals never differ by more than one head. */
#include "parallel/shard.h"

/* extra - 1 if `rank` holds one of the r left-over heads of this layer. */
static int extra(int remainder, int tp_size, int rank, int layer)
{
    int start = (int)((int64_t)layer * remainder % tp_size);
    int distance = (rank - start + tp_size) % tp_size;
    return distance < remainder;
}

struct shard_heads shard_kv_heads(int n_kv_heads, int tp_size, int rank, int layer)
{
    if (n_kv_heads < tp_size) {
        int head = (int)((int64_t)rank * n_kv_heads / tp_size);
        int before = rank > 0 ? (int)((int64_t)(rank - 1) * n_kv_heads / tp_size) : -1;
        return (struct shard_heads){.kv_first = head, .kv_count = 1, .counted = head != before};
    }
    int base = n_kv_heads / tp_size, remainder = n_kv_heads % tp_size, first = rank * base;
    for (int t = 0; t < rank; t++) first += extra(remainder, tp_size, t, layer);
    return (struct shard_heads){
        .kv_first = first, .kv_count = base + extra(remainder, tp_size, rank, layer), .counted = true};
}

struct shard_range shard_query_heads(int n_heads, int n_kv_heads, int tp_size, int rank, int layer)
{
    struct shard_heads kv = shard_kv_heads(n_kv_heads, tp_size, rank, layer);
    int64_t group = n_heads / n_kv_heads;
    return (struct shard_range){.first = kv.kv_first * group, .count = kv.kv_count * group};
}

int shard_max_kv_heads(int n_kv_heads, int tp_size) { return n_kv_heads / tp_size + (n_kv_heads % tp_size != 0); }

int64_t shard_kv_heads_total(int n_kv_heads, int tp_size, int rank, int n_layers)
{
    int64_t total = 0;
    for (int layer = 0; layer < n_layers; layer++) total += shard_kv_heads(n_kv_heads, tp_size, rank, layer).kv_count;
    return total;
}

struct shard_range shard_range(int64_t total, int64_t unit, int tp_size, int rank)
{
    int64_t units = total / unit + (total % unit != 0);
    int64_t base = units / tp_size, remainder = units % tp_size;
    int64_t first = rank * base + (rank < remainder ? rank : remainder);
    int64_t end = first + base + (rank < remainder);
    /* Only a last, short unit makes the difference: its end is the end of the items. */
    first = first * unit < total ? first * unit : total;
    end = end * unit < total ? end * unit : total;
    return (struct shard_range){.first = first, .count = end - first};
}

int64_t shard_max_count(int64_t total, int64_t unit, int tp_size) { return shard_range(total, unit, tp_size, 0).count; }

int64_t shard_mlp_unit(int64_t intermediate_size) { return intermediate_size % 16 == 0 ? 16 : 1; }

int shard_image(int64_t i, int tp_size) { return (int)(i % tp_size); }
