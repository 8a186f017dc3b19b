/* sample_order - the rank order of a row's weights (falling weight, ties to the lower id), made only where it is looked
 * at. An element's place in it is a code: the bits of its weight and, below them, the complement of its id, so that no
 * two are equal. The first digit is counted and summed once while the weights are made; a cut of the order (by count or
 * by mass) finds its bin there and goes on with 9 bits at a time among the bin's members alone, listed if they are few.
 * Masses are integers: sums do not depend on their order, and a bin is found exactly. For one block of 1,024 threads.
 */
#ifndef VITRAIL_KERNELS_CUDA_SAMPLE_ORDER_CUH
#define VITRAIL_KERNELS_CUDA_SAMPLE_ORDER_CUH

#include "kernels/cuda/select.cuh"

#define MASS_OF_ONE 1099511627776.0f /* 2^40 */
#define LEAST_WEIGHT 0x1p-40f        /* of mass 1; smaller ones count as 0 */

enum {
    LEAST_KEY = 87 << 23, /* bits of LEAST_WEIGHT */
    FIRST_SHIFT = 19,     /* the first digit: exponent and 4 bits of the mantissa */
    FIRST_BINS = ((127 - 87) << 4) + 1,
    NEXT_BITS = 9,
    BIN_COPIES =
        4, /* a lane's modulo its number: threads of a warp that hit the same bin get out of each other's way */
    MOST_LISTED = 3072,
    QUADS = 4 /* 16-byte loads that a thread has under way */
};

/* Shared memory of the order. */
struct order {
    uint32_t low[FIRST_BINS][BIN_COPIES], high[FIRST_BINS][BIN_COPIES]; /* halves of the masses: 64-bit atomics loop */
    uint32_t count[FIRST_BINS][BIN_COPIES];
    int listed[MOST_LISTED];
    int n_listed;
    unsigned long long warp_mass[32];
    int warp_count[32];
    unsigned long long target; /* what is left of it: thread 0 writes, barriers lie between */
    unsigned long long found_above, found_mass, found_mass_above;
    int found_digit, found_count;
};

/* What a thread holds of bin number n_bins - 1 - its own: its members, and those of this and all higher bins. */
struct bin {
    unsigned long long mass, mass_upto;
    int count, count_upto;
};

/* The elements whose codes begin alike (code >> shift == prefix), and what ranks above them. */
struct group {
    unsigned long long prefix;
    int shift, count; /* count 0: not known */
    unsigned long long mass, mass_above;
};

/* The same on all threads: the weights, and the group whose members are listed. */
struct order_row {
    const float *weight;
    int n, id_bits;
    unsigned long long list_prefix;
    int list_shift, n_listed; /* list_shift -1: no list */
};

/* ---- passes over a row ---- */

/* Values from i on of n; NaN where there are none. */
__device__ static inline void load_quad(const float *value, int n, int i, float *x)
{
    if (i >= 0 && i + 4 <= n) {
        const float4 quad = *(const float4 *)(value + i);
        x[0] = quad.x, x[1] = quad.y, x[2] = quad.z, x[3] = quad.w;
    } else {
#pragma unroll
        for (int c = 0; c < 4; c++) x[c] = i + c >= 0 && i + c < n ? value[i + c] : NAN;
    }
}
__device__ static inline void store_quad(float *value, int n, int i, const float *x)
{
    if (i >= 0 && i + 4 <= n) {
        *(float4 *)(value + i) = make_float4(x[0], x[1], x[2], x[3]);
    } else {
#pragma unroll
        for (int c = 0; c < 4; c++)
            if (i + c >= 0 && i + c < n) value[i + c] = x[c];
    }
}

/* f(x, i) for each aligned quad of a row, ids rising on each thread; x[c] belongs to id i + c, which may lie outside of
 * the row (x[c] is NaN). STORE: x goes to `out` afterwards, which is aligned as `in` is. */
template <bool STORE, typename F> __device__ static inline void each_quad(const float *in, float *out, int n, F f)
{
    const int skew = (int)((uintptr_t)in / sizeof *in % 4), n_quads = (skew + n + 3) / 4, stride = (int)blockDim.x;
    for (int first = (int)threadIdx.x; first < n_quads; first += QUADS * stride) {
        float x[QUADS][4];
#pragma unroll
        for (int u = 0; u < QUADS; u++) load_quad(in, n, 4 * (first + u * stride) - skew, x[u]);
#pragma unroll
        for (int u = 0; u < QUADS; u++) {
            const int i = 4 * (first + u * stride) - skew;
            f(x[u], i);
            if (STORE) store_quad(out, n, i, x[u]);
        }
    }
}

/* Appends the ids i + c of the bits c of `hits` to a list with room for `most`, in no order; the length counts on. One
 * atomic for the threads of a warp that come together. */
__device__ static inline void append_ids(int *list, int *n, int most, int i, unsigned hits)
{
    for (; hits; hits &= hits - 1) {
        const unsigned together = __activemask(), lane = threadIdx.x % 32;
        const int leader = __ffs((int)together) - 1;
        int at = 0;
        if ((int)lane == leader) at = atomicAdd(n, __popc(together));
        at = __shfl_sync(together, at, leader) + __popc(together & ((1u << lane) - 1));
        if (at < most) list[at] = i + __ffs((int)hits) - 1;
    }
}

/* ---- bins ---- */

__device__ static inline unsigned long long mass_of(float weight) { return (unsigned long long)(weight * MASS_OF_ONE); }

__device__ static inline unsigned long long order_code(const struct order_row *r, float weight, int id)
{
    const unsigned long long last_id = (1ull << r->id_bits) - 1;
    return (unsigned long long)(__float_as_uint(weight) - LEAST_KEY) << r->id_bits | (last_id - (unsigned)id);
}

__device__ static inline void clear_bins(struct order *o, int n_bins)
{
    const int i = (int)threadIdx.x;
    for (int c = 0; c < BIN_COPIES && i < n_bins; c++) o->low[i][c] = o->high[i][c] = o->count[i][c] = 0;
    __syncthreads();
}

__device__ static inline void add_to_bin(struct order *o, int bin, float weight)
{
    const unsigned long long mass = mass_of(weight);
    const int copy = (int)threadIdx.x % BIN_COPIES;
    const uint32_t low = (uint32_t)mass, before = atomicAdd(&o->low[bin][copy], low);
    const uint32_t high = (uint32_t)(mass >> 32) + (before + low < low); /* with what the low half carries */
    if (high) atomicAdd(&o->high[bin][copy], high);
    atomicAdd(&o->count[bin][copy], 1u);
}

/* The same for 4 weights and the first digit, those of 0 left out; the atomics of the 4 wait together. */
__device__ static inline void add_to_first_bins(struct order *o, const float *weight, bool counted)
{
    const int copy = (int)threadIdx.x % BIN_COPIES;
    uint32_t low[4], high[4], before[4];
    int bin[4];
#pragma unroll
    for (int c = 0; c < 4; c++) {
        const unsigned long long mass = mass_of(weight[c]);
        low[c] = (uint32_t)mass, high[c] = (uint32_t)(mass >> 32), before[c] = 0;
        bin[c] = (int)((__float_as_uint(weight[c]) - LEAST_KEY) >> FIRST_SHIFT);
    }
#pragma unroll
    for (int c = 0; c < 4; c++)
        if (weight[c] > 0) before[c] = atomicAdd(&o->low[bin[c]][copy], low[c]);
#pragma unroll
    for (int c = 0; c < 4; c++) {
        high[c] += before[c] + low[c] < low[c];
        if (high[c]) atomicAdd(&o->high[bin[c]][copy], high[c]);
        if (counted && weight[c] > 0) atomicAdd(&o->count[bin[c]][copy], 1u);
    }
}

/* After additions and a barrier: each thread's bin, with the sums over all higher ones. */
__device__ static struct bin rank_bins(struct order *o, int n_bins)
{
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, i = n_bins - 1 - (int)threadIdx.x;
    struct bin b = {0, 0, 0, 0};
    for (int c = 0; c < BIN_COPIES && i >= 0; c++) {
        b.mass += o->low[i][c] + ((unsigned long long)o->high[i][c] << 32);
        b.count += (int)o->count[i][c];
    }
    b.mass_upto = b.mass, b.count_upto = b.count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const unsigned long long mass = __shfl_up_sync(~0u, b.mass_upto, step);
        const int count = __shfl_up_sync(~0u, b.count_upto, step);
        if (lane >= step) b.mass_upto += mass, b.count_upto += count;
    }
    if (lane == 31) o->warp_mass[warp] = b.mass_upto, o->warp_count[warp] = b.count_upto;
    __syncthreads();
    unsigned long long mass = lane < warp ? o->warp_mass[lane] : 0;
    int count = lane < warp ? o->warp_count[lane] : 0;
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) {
        mass += __shfl_xor_sync(~0u, mass, step);
        count += __shfl_xor_sync(~0u, count, step);
    }
    b.mass_upto += mass, b.count_upto += count;
    return b;
}

/* Narrows the group to the bin in which its count or mass reaches the target, 1 up to what the bins hold in all, and
 * takes off the target what ranks above the bin. */
__device__ static void enter_bin(struct order *o, const struct bin *b, int bits, int n_bins, bool by_mass,
                                 struct group *g)
{
    const unsigned long long upto = by_mass ? b->mass_upto : (unsigned long long)b->count_upto;
    const unsigned long long here = by_mass ? b->mass : (unsigned long long)b->count;
    __syncthreads(); /* what was found before has been read, and the target is written */
    const unsigned long long target = o->target;
    if (upto >= target && upto - here < target) {
        o->found_digit = n_bins - 1 - (int)threadIdx.x;
        o->found_mass = b->mass, o->found_mass_above = b->mass_upto - b->mass;
        o->found_count = b->count, o->found_above = upto - here;
    }
    __syncthreads();
    if (threadIdx.x == 0) o->target = target - o->found_above;
    g->prefix = g->prefix << bits | (unsigned)o->found_digit;
    g->shift -= bits;
    g->mass = o->found_mass, g->mass_above += o->found_mass_above;
    g->count = o->found_count;
}

/* ---- cuts ---- */

/* Lists the group's members, in no order, unless they stand in the list; counts them if nobody has. false: they are too
 * many. Whole block. */
__device__ static bool list_members(struct order *o, struct order_row *r, struct group *g)
{
    if (r->list_shift >= g->shift && g->prefix >> (r->list_shift - g->shift) == r->list_prefix) {
        if (!g->count) g->count = r->n_listed; /* a whole bin of the first digit, the only one not counted */
        return true;
    }
    if (g->count > MOST_LISTED) return false;
    __syncthreads();
    if (threadIdx.x == 0) o->n_listed = 0;
    __syncthreads();
    const unsigned long long first = g->prefix << g->shift, last = first + (1ull << g->shift) - 1;
    const uint32_t lowest = (uint32_t)(first >> r->id_bits), range = (uint32_t)(last >> r->id_bits) - lowest;
    each_quad<false>(r->weight, NULL, r->n, [&](const float *x, int i) {
        unsigned hits = 0;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            if (__float_as_uint(x[c]) - (LEAST_KEY + lowest) > range) continue;
            if (order_code(r, x[c], i + c) >> g->shift == g->prefix) hits |= 1u << c;
        }
        append_ids(o->listed, &o->n_listed, MOST_LISTED, i, hits);
    });
    __syncthreads();
    r->n_listed = g->count = o->n_listed;
    r->list_prefix = g->prefix;
    r->list_shift = r->n_listed <= MOST_LISTED ? g->shift : -1;
    return r->list_shift >= 0;
}

/* The id of the only member of a group. Whole block. */
__device__ static int only_member(struct order *o, struct order_row *r, struct group *g)
{
    list_members(o, r, g);
    __syncthreads();
    for (int j = (int)threadIdx.x; j < r->n_listed; j += (int)blockDim.x) {
        const int i = o->listed[j];
        if (order_code(r, r->weight[i], i) >> g->shift == g->prefix) o->found_digit = i;
    }
    __syncthreads();
    return o->found_digit;
}

/* The element in which the order's count (by_mass false) or mass reaches `target`, which is 1 up to what there is in
 * all: a group of one. first: the first digit's bins, counted if the cut is by count. Whole block. */
__device__ static struct group cut_order(struct order *o, struct order_row *r, const struct bin *first, bool by_mass,
                                         unsigned long long target)
{
    struct group g = {0, r->id_bits + FIRST_SHIFT, 0, 0, 0};
    if (threadIdx.x == 0) o->target = target;
    enter_bin(o, first, 0, FIRST_BINS, by_mass, &g);
    while (g.count != 1) {
        const bool listed = list_members(o, r, &g);
        if (g.count == 1 || g.shift == 0) break;
        const int bits = g.shift < NEXT_BITS ? g.shift : NEXT_BITS, n = listed ? r->n_listed : r->n;
        clear_bins(o, 1 << bits);
        for (int j = (int)threadIdx.x; j < n; j += (int)blockDim.x) {
            const int i = listed ? o->listed[j] : j;
            const float weight = r->weight[i];
            const unsigned long long code = order_code(r, weight, i);
            if (!(weight > 0) || code >> g.shift != g.prefix) continue;
            add_to_bin(o, (int)(code >> (g.shift - bits) & ((1u << bits) - 1)), weight);
        }
        __syncthreads();
        const struct bin b = rank_bins(o, 1 << bits);
        enter_bin(o, &b, bits, 1 << bits, by_mass, &g);
    }
    return g;
}

#endif
