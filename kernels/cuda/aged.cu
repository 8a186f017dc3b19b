/* Lanes in two parts (ops_aged.h): entries on their way from plain lanes into those of codes, and decode attention over
 * both, each part by its own kernel, joined by the logarithms of their sums. */
#include "kernels/cuda/lanes.cuh"

enum {
    AGE_WARPS = 8,
    AGE_THREADS = AGE_WARPS * WARP,
    CODE_TOKENS = 32, /* of a page: what a block takes at once */
    WARP_TOKENS = CODE_TOKENS / AGE_WARPS,
    HELD = 4,      /* pieces of 16 bytes in a thread's registers */
    MOST_DIM = 128 /* four elements a thread */
};

/* ---- ageing: pages are taken, entries move, pages are given back, a kernel each ---- */

/* What becomes of a lane. */
struct ageing {
    int32_t n;        /* entries that leave the plain part; 0: nothing happens */
    int32_t at;       /* where they begin in the aged one */
    int32_t in_place; /* the aged part has taken the plain one's pages over, which fresh ones stand in for */
    int32_t pages;    /* that the plain part had */
};

/* The aged lane gets the plain one's pages, that one fresh ones; a whole warp. False: there are none. */
__device__ static bool take_over(const struct kv_view &kv, const struct kv_view &aged, int lane, int had, int fresh)
{
    const int thread = (int)threadIdx.x % WARP;
    int32_t *row = kv.page_row + (int64_t)lane * kv.max_pages, *to = aged.page_row + (int64_t)lane * kv.max_pages;
    int base = 0;
    if (thread == 0) {
        base = atomicSub(kv.free_count, fresh) - fresh;
        if (base < 0) {
            atomicAdd(kv.free_count, fresh);
            atomicOr(kv.error, KV_ERROR_NO_FREE_PAGE);
        }
    }
    base = __shfl_sync(~0u, base, 0);
    if (base < 0) return false;
    for (int i = thread; i < had; i += WARP) { /* a thread reads a place before it writes it */
        to[i] = row[i];
        if (i < fresh) row[i] = kv.free_stack[base + fresh - 1 - i];
    }
    return true;
}

/* A warp a lane. */
__global__ static void begin_age_kernel(struct kv_view kv, struct kv_view aged, int first_lane, int n_lanes, int stay,
                                        struct ageing *ageing)
{
    let_successor_start();
    wait_for_predecessor();
    const int i = (int)blockIdx.x * LANES_A_BLOCK + (int)threadIdx.x / WARP, thread = (int)threadIdx.x % WARP;
    if (i >= n_lanes) return;
    const int lane = first_lane + i, length = kv.lane_len[lane], n = length - stay, there = aged.lane_len[lane];
    const int had = pages_of(kv, lane, length);
    struct ageing s = {};
    if (lane_format(kv, lane) != KV_PLAIN) {
        if (thread == 0) atomicOr(kv.error, KV_ERROR_QUANTISED);
    } else if (n > 0) {
        const int fresh = (stay + kv.page_size - 1) / kv.page_size;
        s.in_place = there == 0 && fresh < (n + CODE_TOKENS - 1) / CODE_TOKENS;
        if (there == 0 && thread == 0) aged.lane_format[lane] = aged.format;
        __syncwarp(); /* what follows counts pages by it */
        s.at = s.in_place ? 0 : grow_lane(aged, lane, n);
        s.n = (s.in_place ? take_over(kv, aged, lane, had, fresh) : s.at >= 0) ? n : 0;
        s.pages = had;
    }
    if (thread == 0) ageing[i] = s;
}

/* Entries of a plain lane become codes, those from `entry` on of `from` the ones from `at` on of `to`; a whole block.
 * In place (from's pages are to's, at 0) a page of codes stands at or before the two whose entries it gets: a round has
 * read its 32 entries before it writes, and what it writes no later round reads. */
template <typename T>
__device__ static void move_to_codes(const struct kv_view &from, const struct kv_view &to, int lane, int entry, int at,
                                     int n)
{
    const int thread = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, dim = to.head_dim, d = 4 * thread;
    const enum kv_format format = lane_format(to, lane);
    for (int first = 0; first < n; first += CODE_TOKENS) {
        uint32_t code[WARP_TOKENS][2];
        float scale[WARP_TOKENS][2];
#pragma unroll
        for (int i = 0; i < WARP_TOKENS; i++) {
            const int token = first + warp * WARP_TOKENS + i;
            uint2 k = make_uint2(0, 0), v = k;
            if (token < n && d < dim) {
                const T *row = (const T *)from.pool.data + cache_key(from, lane, entry + token) + d;
                k = *(const uint2 *)row;
                v = *(const uint2 *)(row + (int64_t)from.page_size * dim);
            }
            code[i][0] = quantise_four<T>(format, k, &scale[i][0]);
            code[i][1] = quantise_four<T>(format, v, &scale[i][1]);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < WARP_TOKENS; i++) {
            const int token = first + warp * WARP_TOKENS + i;
            if (token >= n) break;
            const int64_t key = code_row(to, lane, at + token);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int64_t row = key + half * CODE_TOKENS;
                if (d < dim) *(uint32_t *)((uint8_t *)to.pool.data + row * dim + d) = code[i][half];
                if (thread == 0) to.scale[row] = scale[i][half];
            }
        }
    }
}

/* The w-th piece of 16 bytes of a lane's entries, keys before values within each. */
template <typename T> __device__ static uint4 *piece_of(const struct kv_view &kv, int lane, int entry, int w)
{
    const int half = kv.head_dim / 8;
    const int64_t key = cache_key(kv, lane, entry) + (w < half ? 0 : (int64_t)kv.page_size * kv.head_dim);
    return (uint4 *)((T *)kv.pool.data + key) + (w < half ? w : w - half);
}

/* Entries [first, end) of a plain lane from `shift` places further on in the same lane of `from`; a whole block. Within
 * one lane: all of a round is read before any of it is written, and its targets lie before all later sources. */
template <typename T>
__device__ static void move_entries(const struct kv_view &kv, const struct kv_view &from, int lane, int first, int end,
                                    int shift)
{
    const int words = kv.head_dim / 4; /* of an entry */
    const int64_t all = (int64_t)(end - first) * words;
    for (int64_t begin = 0; begin < all; begin += AGE_THREADS * HELD) {
        uint4 held[HELD];
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            const int64_t w = begin + k * AGE_THREADS + (int)threadIdx.x;
            if (w < all) held[k] = *piece_of<T>(from, lane, first + (int)(w / words) + shift, (int)(w % words));
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            const int64_t w = begin + k * AGE_THREADS + (int)threadIdx.x;
            if (w < all) *piece_of<T>(kv, lane, first + (int)(w / words), (int)(w % words)) = held[k];
        }
    }
}

/* A block a lane. */
template <typename T>
__global__ static void __launch_bounds__(AGE_THREADS) age_kernel(struct kv_view kv, struct kv_view aged, int first_lane,
                                                                 int sinks, int window, const struct ageing *ageing)
{
    let_successor_start();
    wait_for_predecessor();
    const int lane = first_lane + (int)blockIdx.x;
    const struct ageing s = ageing[blockIdx.x];
    if (s.n <= 0) return;
    if (s.in_place) {
        move_entries<T>(kv, aged, lane, 0, sinks, 0);
        move_entries<T>(kv, aged, lane, sinks, sinks + window, s.n);
        __syncthreads(); /* all that stays has been read */
        move_to_codes<T>(aged, aged, lane, sinks, 0, s.n);
    } else {
        move_to_codes<T>(kv, aged, lane, sinks, s.at, s.n);
        __syncthreads(); /* all that leaves has been read */
        move_entries<T>(kv, kv, lane, sinks, sinks + window, s.n);
    }
}

/* A warp a lane. */
__global__ static void end_age_kernel(struct kv_view kv, struct kv_view aged, int first_lane, int n_lanes, int stay,
                                      const struct ageing *ageing)
{
    let_successor_start();
    wait_for_predecessor();
    const int i = (int)blockIdx.x * LANES_A_BLOCK + (int)threadIdx.x / WARP, thread = (int)threadIdx.x % WARP;
    if (i >= n_lanes) return;
    const int lane = first_lane + i;
    const struct ageing s = ageing[i];
    if (s.n <= 0) return;
    if (!s.in_place) {
        shrink_lane(kv, lane, stay);
        return;
    }
    const int keep = (s.n + CODE_TOKENS - 1) / CODE_TOKENS, freed = s.pages - keep;
    const int32_t *row = aged.page_row + (int64_t)lane * aged.max_pages + keep;
    int base = 0;
    if (thread == 0) {
        base = atomicAdd(kv.free_count, freed);
        kv.lane_len[lane] = stay;
        aged.lane_len[lane] = s.n;
    }
    base = __shfl_sync(~0u, base, 0);
    for (int j = thread; j < freed; j += WARP) kv.free_stack[base + j] = row[freed - 1 - j];
}

int cuda__kv_age(struct ops *o, const struct kv_view *kv, const struct kv_view *aged, int slot, int sinks, int window)
{
    const int n = kv->lanes_per_slot, first = slot * n, stay = sinks + window;
    const dim3 grid((unsigned)(n + LANES_A_BLOCK - 1) / LANES_A_BLOCK), block(LANES_A_BLOCK * WARP);
    struct arena arena;
    struct ageing *ageing;
    if (2 * kv->page_size != CODE_TOKENS || kv->head_dim % 8 || kv->head_dim > MOST_DIM)
        FAIL(ERR_UNSUPPORTED,
             "cuda: keys and values in 8 bits of heads of %d dimensions, pages of %d tokens; served are dimensions in "
             "steps of 8 up to %d, pages of %d",
             kv->head_dim, kv->page_size, MOST_DIM, CODE_TOKENS / 2);
    TRY(cuda__scratch(o, &arena));
    TRY(arena_take(&arena, (size_t)n * sizeof *ageing, "op scratch", &ageing));
    TRY(cuda__launch(o, "kv_age", begin_age_kernel, grid, block, 0, *kv, *aged, first, n, stay, ageing));
    WITH_TYPE(kv->pool.dtype, T,
              TRY(cuda__launch(o, "kv_age", age_kernel<T>, dim3((unsigned)n), dim3(AGE_THREADS), 0, *kv, *aged, first,
                               sinks, window, (const struct ageing *)ageing)));
    return cuda__launch(o, "kv_age", end_age_kernel, grid, block, 0, *kv, *aged, first, n, stay,
                        (const struct ageing *)ageing);
}

/* ---- attention ---- */

/* The aged part's output, and the logarithms of both parts' sums. */
struct parts {
    void *out;            /* [n_seqs, n_heads, head_dim] activations */
    float *aged, *recent; /* [n_seqs, n_heads] */
};

/* Behind what both kernels of decode attention work in. */
static int place_parts(const struct cuda *c, const struct ops_limits *limits, struct arena *arena, struct parts *p)
{
    static const char label[] = "op scratch";
    const size_t rows = (size_t)limits->max_seqs * (size_t)limits->max_heads;
    struct arena plain, quantised;
    char *pieces;
    arena_measure(&plain);
    arena_measure(&quantised);
    TRY(cuda__decode_measure(c, limits, &plain));
    TRY(cuda__quantised_measure(c, limits, &quantised));
    TRY(arena_take(arena, plain.used > quantised.used ? plain.used : quantised.used, label, &pieces));
    TRY(arena_take(arena, rows * (size_t)limits->head_dim * sizeof(uint16_t), label, &p->out));
    TRY(arena_take(arena, rows * sizeof(float), label, &p->aged));
    return arena_take(arena, rows * sizeof(float), label, &p->recent);
}

int cuda__aged_measure(const struct cuda *c, const struct ops_limits *limits, struct arena *arena)
{
    struct parts p;
    struct arena ageing;
    struct ageing *of_lanes;
    if (!limits->aged) return OK;
    arena_measure(&ageing);
    TRY(arena_take(&ageing, (size_t)limits->max_lanes * sizeof *of_lanes, "op scratch", &of_lanes));
    TRY(place_parts(c, limits, arena, &p));
    arena->used = ageing.used > arena->used ? ageing.used : arena->used;
    return OK;
}

struct join_arguments {
    struct parts parts;
    void *out; /* of the plain part; then of both */
    int64_t out_stride;
    const int32_t *slot, *aged_len;
    int n_seqs, n_heads, group, head_dim, lane, lanes_per_slot, n_slots;
};

/* A warp a row's head. A row whose aged part is empty stays as it is. */
template <typename T> __global__ static void join_parts_kernel(struct join_arguments a)
{
    let_successor_start();
    wait_for_predecessor();
    const int item = (int)blockIdx.x * LANES_A_BLOCK + (int)threadIdx.x / WARP, thread = (int)threadIdx.x % WARP;
    const int row = item / a.n_heads, head = item % a.n_heads;
    if (row >= a.n_seqs) return;
    const int slot = a.slot[row];
    if (slot < 0 || slot >= a.n_slots || a.aged_len[slot * a.lanes_per_slot + a.lane + head / a.group] == 0) return;
    const float log_out = a.parts.recent[item], log_aged = a.parts.aged[item], top = fmaxf(log_out, log_aged);
    const float mine = expf(log_out - top), others = expf(log_aged - top), inverse = 1 / (mine + others);
    uint32_t *out = (uint32_t *)((T *)a.out + row * a.out_stride + (int64_t)head * a.head_dim);
    const uint32_t *from = (const uint32_t *)((const T *)a.parts.out + (int64_t)item * a.head_dim);
    for (int i = thread; i < a.head_dim / 2; i += WARP) {
        const float2 x = unpack2<T>(out[i]), y = unpack2<T>(from[i]);
        out[i] = pack2<T>((x.x * mine + y.x * others) * inverse, (x.y * mine + y.y * others) * inverse);
    }
}

int cuda__attention_decode_aged(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                                const struct kv_view *kv, const struct kv_view *aged,
                                const struct attention_heads *heads)
{
    const struct cuda *c = cuda__of(o);
    const int items = batch->n_seqs * heads->n_heads;
    struct join_arguments a = {};
    struct arena arena;
    if (!c->limits.aged || batch->n_seqs > c->limits.max_seqs || heads->n_heads > c->limits.max_heads ||
        heads->head_dim > c->limits.head_dim)
        FAIL(ERR_BUG, "ops_attention_decode_aged: %d sequences of %d heads, more than ops_reserve was told",
             batch->n_seqs, heads->n_heads);
    TRY(cuda__scratch(o, &arena));
    TRY(place_parts(c, &c->limits, &arena, &a.parts));
    const struct tensor other = tensor_3d(a.parts.out, out.dtype, batch->n_seqs, heads->n_heads, heads->head_dim);
    TRY(cuda__attention_pieces(o, other, q, a.parts.aged, batch, aged, heads, c->aged_item, c->aged_count));
    TRY(cuda__attention_decode(o, out, q, a.parts.recent, batch, kv, heads));
    a.out = out.data, a.out_stride = out.stride[0];
    a.slot = batch->slot, a.aged_len = aged->lane_len;
    a.n_seqs = batch->n_seqs, a.n_heads = heads->n_heads, a.group = heads->n_heads / heads->n_kv_heads;
    a.head_dim = heads->head_dim, a.lane = heads->lane;
    a.lanes_per_slot = kv->lanes_per_slot, a.n_slots = kv->n_slots;
    WITH_TYPE(out.dtype, T,
              return cuda__launch(o, "attention_aged", join_parts_kernel<T>,
                                  dim3((unsigned)(items + LANES_A_BLOCK - 1) / LANES_A_BLOCK),
                                  dim3(LANES_A_BLOCK * WARP), 0, a));
}
