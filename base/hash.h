/* hash - 64-bit hashes and the counter-based generator that everything seeded uses: the same on every machine and rank.
 */
#ifndef VITRAIL_BASE_HASH_H
#define VITRAIL_BASE_HASH_H

#include <stddef.h>
#include <stdint.h>

/* hash_splitmix - the splitmix64 step of ALGORITHMS.md's generator: a bijection of 64 bits. */
static inline uint64_t hash_splitmix(uint64_t x)
{
    uint64_t z = x + 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* hash_mix - one number from two, order matters. */
static inline uint64_t hash_mix(uint64_t a, uint64_t b) { return hash_splitmix(hash_splitmix(a) ^ b); }

/* hash_bytes - FNV-1a, then mixed; for names and configurations, not against attackers. */
static inline uint64_t hash_bytes(const void *bytes, size_t n)
{
    const unsigned char *p = bytes;
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * 0x100000001b3u;
    return hash_splitmix(h);
}

#endif
