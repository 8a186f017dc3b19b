/* choose - random choices that depend on a request's seed, a layer and a KV head's number over all ranks, and so not on
 * how the heads are dealt: splitmix64 streams, as ALGORITHMS.md's oracles define them. */
#ifndef VITRAIL_KVCACHE_CHOOSE_H
#define VITRAIL_KVCACHE_CHOOSE_H

#include <stdint.h>

#include "base/hash.h"

struct choose_stream {
    uint64_t state;
};

/* choose_stream - window: 0 for the prompt, 1, 2, ... for what is drawn for the blocks generated after it. */
static inline struct choose_stream choose_stream(uint64_t seed, int layer, int kv_head, int window)
{
    uint64_t s = hash_splitmix(seed);
    s = hash_splitmix(s ^ (uint64_t)layer);
    s = hash_splitmix(s ^ (uint64_t)kv_head);
    return (struct choose_stream){hash_splitmix(s ^ (uint64_t)window)};
}

/* choose - the first `count` of 0 .. n - 1 in random order, without replacement, into the first places of `choice`
 * [n]; 0 <= count <= n. */
static inline void choose(struct choose_stream *stream, int n, int count, int32_t *choice)
{
    for (int i = 0; i < n; i++) choice[i] = i;
    for (int i = 0; i < count; i++) {
        uint64_t random = hash_splitmix(stream->state);
        stream->state += 0x9E3779B97F4A7C15u;
        int other = i + (int)(((random >> 32) * (uint64_t)(n - i)) >> 32), kept = choice[i];
        choice[i] = choice[other];
        choice[other] = kept;
    }
}

#endif
