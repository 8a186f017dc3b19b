/* Prompt attention with Hopper's asynchronous units: keys and values come from the pages through the tensor copy
 * engine, products are wgmma's.
 *
 * A block stays on its multiprocessor and takes tasks, 128 queries of one head each, from a common counter, long ones
 * first. Its first warp finds the tasks and starts the copies: queries into one of two places, keys and values in
 * tiles of 128, two of each in flight. Two warpgroups of 64 queries each compute. A warpgroup begins the scores of a
 * tile and the weighted values of the tile before together, and makes weights of the scores while the values are
 * summed; the two take turns at beginning products, so that one's weights are made under the other's products.
 *
 * In shared memory a row holds 64 columns, 128 bytes, with the 128-byte swizzle. Queries of 128 columns are two such
 * halves; keys and values change halves every 8 rows, which lets 16 whole rows of a page be one box of the copy engine,
 * so that pages of any multiple of 16 make the same tiles.
 * Tiles are cut by position in the lane alone: a query's result is the same bits however a prompt is divided into
 * chunks and whatever else is in the batch. */
#include "kernels/cuda/attention_instructions.cuh"
#include "kernels/cuda/tensor_map.cuh"

enum { QUERIES = 128, KEYS = 128, STAGES = 2, UNIT = 16, GROUP = 128 };
enum { CONSUMERS = 2, CONSUMER_WARPS = 8, THREADS = GROUP * (1 + CONSUMERS) };
enum { ENTRY_REGISTERS = 168, PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232 }; /* of a thread */
static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= (1 + CONSUMERS) * ENTRY_REGISTERS,
              "consumers take what the producer releases");
enum { TURN = 1, WITHIN = TURN + CONSUMERS }; /* named barriers, one of each a consumer */
enum { L2_BYTES = 32 << 20 };                 /* keys and values that a round of tasks may spread over */

struct attend {
    CUtensorMap q_map, pages_map;
    void *out;
    int64_t out_stride;
    const int32_t *slot, *cu_seqlens;
    struct kv_view kv;
    int32_t *counter; /* tasks handed out beyond each block's first; blocks that are done */
    int n_seqs, n_heads, group, lane, n_tasks;
    float scale; /* times log2(e) */
};

/* 128 queries of a head. */
struct task {
    int head; /* < 0: no more tasks */
    int row;  /* the first query's row in q and out */
    int n_rows;
    int first;  /* keys that the first query sees; each further one sees one more, up to n_keys */
    int n_keys; /* 0: none */
    int lane;   /* of the KV head, in the cache */
};

template <int DIM> struct memory {
    uint16_t q[2][DIM / 64][QUERIES][64];
    uint16_t k[STAGES][KEYS / 8][DIM / 64][8][64];
    uint16_t v[STAGES][KEYS / 8][DIM / 64][8][64];
    uint64_t q_full[2], q_empty[2], k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    struct task task[2];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

INLINE int tiles_of(int n, int tile) { return (n + tile - 1) / tile; }

/* ---- tasks ---- */

/* Finds the sequence of a task, all lanes of a warp together: *index becomes the task's number within it. */
INLINE int find_sequence(const struct attend &a, int *index)
{
    const int lane = threadIdx.x % 32;
    for (int base = 0;; base += 32) {
        const int i = base + lane, n = i < a.n_seqs ? a.cu_seqlens[i + 1] - a.cu_seqlens[i] : 0;
        const int tasks = tiles_of(n, QUERIES) * a.n_heads;
        int end = tasks;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int before = __shfl_up_sync(~0u, end, step);
            end += lane >= step ? before : 0;
        }
        const uint32_t beyond = __ballot_sync(~0u, *index < end);
        if (beyond || base + 32 >= a.n_seqs) {
            const int found = beyond ? __ffs((int)beyond) - 1 : a.n_seqs - 1 - base;
            *index -= __shfl_sync(~0u, end - tasks, found);
            return base + found;
        }
        *index -= __shfl_sync(~0u, end, 31);
    }
}

/* Within a sequence as many KV heads go together as leave their keys and values in L2, long tasks first, and the heads
 * that share keys next to each other. */
template <int DIM> INLINE void find_task(const struct attend &a, int index, struct task *t)
{
    const int sequence = find_sequence(a, &index), slot = a.slot[sequence];
    const int begin = a.cu_seqlens[sequence], n_rows = a.cu_seqlens[sequence + 1] - begin;
    const bool valid = slot >= 0 && slot < a.kv.n_slots;
    const int first_lane = valid ? cache_lane(a.kv, slot, a.lane) : 0;
    const int tiles = tiles_of(n_rows, QUERIES);
    const int most = L2_BYTES / (DIM * 4) / max(valid ? a.kv.lane_len[first_lane] : 1, 1);
    const int together = min(max(most, 1) * a.group, a.n_heads);
    const int part = index / (tiles * together), heads = min(together, a.n_heads - part * together);
    index -= part * tiles * together;
    const int query = (tiles - 1 - index / heads) * QUERIES;
    t->head = part * together + index % heads;
    t->lane = first_lane + t->head / a.group;
    t->row = begin + query;
    t->n_rows = min(n_rows - query, (int)QUERIES);
    const int length = valid ? a.kv.lane_len[t->lane] : 0;
    const int past = max(length - n_rows, 0); /* below 0 the append failed, and the error word says so */
    t->first = past + query + 1;
    t->n_keys = min(past + query + t->n_rows, length);
}

/* ---- the producer: one warp ---- */

/* 16 rows of a page for each of 8 lanes, once their place is free. */
template <int DIM>
INLINE void load_tile(const struct attend &a, const uint16_t (*to)[DIM / 64][8][64], const uint64_t *full,
                      const uint64_t *empty, int round, int row, bool mine)
{
    const int unit = threadIdx.x % 8;
    barrier_wait(shared_address(empty), (round + 1) % 2);
    if (mine && unit == 0) barrier_expect(shared_address(full), KEYS * DIM * 2);
    __syncwarp();
    if (mine) tensor_load(shared_address(to[unit * UNIT / 8]), &a.pages_map, shared_address(full), 0, 0, 0, row / 8);
}

/* Keys and values of a task; tile: how many tiles the block has seen. Lanes 0 - 7 copy keys, lanes 8 - 15 values of the
 * tile before: that is the order in which they are used and places fall free. */
template <int DIM> INLINE void load_tiles(const struct attend &a, const struct task &t, int tile, struct memory<DIM> *m)
{
    const int lane = threadIdx.x % 32, part = lane / 8, n = tiles_of(t.n_keys, KEYS);
    const int outside = a.kv.n_pages * 2 * a.kv.page_size;
    const int32_t *pages = a.kv.page_row + (int64_t)t.lane * a.kv.max_pages;
    int key = lane % 8 * UNIT - part * KEYS;
    int page = part < 2 && key >= 0 && key < t.n_keys ? pages[key / a.kv.page_size] : 0;
    for (int j = 0; j <= n; j++) {
        const int row =
            key >= 0 && key < t.n_keys ? (page * 2 + part) * a.kv.page_size + key % a.kv.page_size : outside;
        key += KEYS;
        page = part < 2 && key >= 0 && key < t.n_keys ? pages[key / a.kv.page_size] : 0; /* for the next round */
        const int now = (tile + j) % STAGES, before = (tile + j - 1) % STAGES;
        if (j < n) load_tile<DIM>(a, m->k[now], &m->k_full[now], &m->k_empty[now], (tile + j) / STAGES, row, part == 0);
        if (j > 0)
            load_tile<DIM>(a, m->v[before], &m->v_full[before], &m->v_empty[before], (tile + j - 1) / STAGES, row,
                           part == 1);
    }
}

/* Hands a task to the consumers, with its queries. */
template <int DIM> INLINE void give_task(const struct attend &a, const struct task &t, int place, struct memory<DIM> *m)
{
    const uint32_t barrier = shared_address(&m->q_full[place]);
    m->task[place] = t;
    if (t.head < 0 || t.n_keys <= 0) {
        barrier_arrive(barrier);
        return;
    }
    barrier_expect(barrier, sizeof m->q[0]);
    for (int half = 0; half < DIM / 64; half++)
        tensor_load(shared_address(m->q[place][half]), &a.q_map, barrier, half * 64, t.head, t.row);
}

template <int DIM> INLINE void produce(const struct attend &a, struct memory<DIM> *m)
{
    const bool leader = threadIdx.x % 32 == 0;
    int tile = 0;
    for (int n = 0, index = blockIdx.x, next = 0;; n++, index = __shfl_sync(~0u, next, 0)) {
        struct task t = {.head = -1};
        if (index < a.n_tasks) find_task<DIM>(a, index, &t);
        if (index < a.n_tasks && leader) next = gridDim.x + atomicAdd(&a.counter[0], 1);
        barrier_wait(shared_address(&m->q_empty[n % 2]), (n / 2 + 1) % 2);
        if (leader) give_task<DIM>(a, t, n % 2, m);
        if (index >= a.n_tasks) break;
        load_tiles<DIM>(a, t, tile, m);
        tile += tiles_of(t.n_keys, KEYS);
    }
    /* The last block to get here leaves the counters as it found them. */
    if (leader && atomicAdd(&a.counter[1], 1) == (int)gridDim.x - 1) a.counter[0] = a.counter[1] = 0;
}

/* ---- consumers: warpgroups of 64 queries ---- */

/* What a thread of a consumer knows: it holds two rows of the warpgroup's 64, `row` and the one 8 below. */
struct consumer {
    int group, warp, lane, row;
};

/* The score of two rows: the first elements of a fragment belong to `row`, the last two to the one 8 below. */
INLINE void mask_scores(float *score, int seen, int seen_below)
{
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++)
        if (i / 4 * 8 + (int)threadIdx.x % 4 * 2 + i % 2 >= (i % 4 < 2 ? seen : seen_below)) score[i] = -INFINITY;
}

/* Scores become weights; maxima and sums move on; what was summed before is to be scaled by factor. Four chains of
 * maxima a row and two of sums keep the pipeline full. */
INLINE void soften(float *score, float *maximum, float *sum, float *factor, float scale)
{
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top[4] = {maximum[r], score[2 * r], score[2 * r + 1], score[2 * r + 4]};
#pragma unroll
        for (int i = 1; i < KEYS / 4; i++) top[i % 4] = fmaxf(top[i % 4], score[i / 2 * 4 + i % 2 + 2 * r]);
        float best = fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3]));
        best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
        best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
        factor[r] = power_of_2((maximum[r] - best) * scale);
        maximum[r] = best;
        shift[r] = best * scale;
        sum[r] *= factor[r];
    }
    float part[4] = {sum[0], 0, sum[1], 0};
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) {
        score[i] = power_of_2(fmaf(score[i], scale, -shift[i % 4 / 2]));
        part[i % 4] += score[i];
    }
    sum[0] = part[0] + part[1];
    sum[1] = part[2] + part[3];
}

template <typename T> INLINE void pack_weights(uint32_t *weight, const float *score)
{
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) weight[i] = pack2<T>(score[2 * i], score[2 * i + 1]);
}

template <typename T, int DIM>
INLINE void begin_scores(float *score, const struct consumer &me, const struct memory<DIM> *m, int place, int stage)
{
    const uint32_t q = matrix_descriptor(shared_address(m->q[place][0][me.group * 64]), 0);
    const uint32_t k = matrix_descriptor(shared_address(m->k[stage]), 0);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < DIM / 16; i++)
        wgmma_scores<T, 1024, DIM * 16>(score, q + i / 4 * (QUERIES * 128 / 16) + i % 4 * 2,
                                        k + i / 4 * (1024 / 16) + i % 4 * 2, i > 0);
    wgmma_commit();
}

template <typename T, int DIM>
INLINE void begin_values(float *output, const uint32_t *weight, const struct memory<DIM> *m, int stage)
{
    const uint32_t v = matrix_descriptor(shared_address(m->v[stage]), 1024);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++)
        wgmma_values<T, DIM, DIM * 16>(output, weight + 4 * i, v + i * (16 * DIM * 2 / 16));
    wgmma_commit();
}

/* One arrival a warp. */
INLINE void release(const struct consumer &me, const uint64_t *barrier)
{
    if (me.lane == 0) barrier_arrive(shared_address(barrier));
}

/* The last unit's values beyond the last key may be anything, even NaN, of which a weight of 0 makes no 0. */
template <int DIM> INLINE void clear_values(const struct consumer &me, struct memory<DIM> *m, int stage, int n_keys)
{
    const int first = n_keys % KEYS, n = UNIT - n_keys % UNIT;
    for (int i = threadIdx.x % GROUP; i < n * DIM / 8; i += GROUP) {
        const int row = first + i / (DIM / 8), chunk = i % (DIM / 8);
        *(uint4 *)(m->v[stage][row / 8][chunk / 8][row % 8] + chunk % 8 * 8) = make_uint4(0, 0, 0, 0);
    }
    async_fence();
    group_sync(WITHIN + me.group, GROUP);
}

/* Waits for the keys or values of a tile, counted from the block's first. */
INLINE void await_tile(const uint64_t *full, int tile)
{
    barrier_wait(shared_address(&full[tile % STAGES]), tile / STAGES % 2);
}

/* output = the task's weighted values, not yet divided by sum. tile: how many tiles the block has seen. */
template <typename T, int DIM>
INLINE void attend_tiles(const struct attend &a, const struct task &t, const struct consumer &me, struct memory<DIM> *m,
                         int place, int tile, float *output, float *sum)
{
    const int end = tile + tiles_of(t.n_keys, KEYS), whole = min(t.first + me.group * 64, t.n_keys);
    int seen = min(t.first + me.row, t.n_keys), seen_below = min(t.first + me.row + 8, t.n_keys), seen_by_all = whole;
    float score[KEYS / 2], maximum[2] = {-INFINITY, -INFINITY}, factor[2];
    uint32_t weight[KEYS / 4];
    await_tile(m->k_full, tile);
    begin_scores<T, DIM>(score, me, m, place, tile % STAGES);
    wgmma_wait<0>();
    hold<KEYS / 2>(score);
    release(me, &m->k_empty[tile % STAGES]);
    if (seen_by_all < KEYS) mask_scores(score, seen, seen_below);
    soften(score, maximum, sum, factor, a.scale);
    pack_weights<T>(weight, score);
    if (tile + 1 < end) await_tile(m->k_full, tile + 1);
    for (tile++; tile < end; tile++) {
        group_sync(TURN + me.group, CONSUMERS * GROUP);
        begin_scores<T, DIM>(score, me, m, place, tile % STAGES);
        await_tile(m->v_full, tile - 1);
        begin_values<T, DIM>(output, weight, m, (tile - 1) % STAGES);
        group_arrive(TURN + (me.group + 1) % CONSUMERS, CONSUMERS * GROUP);
        wgmma_wait<1>();
        hold<KEYS / 2>(score);
        release(me, &m->k_empty[tile % STAGES]);
        seen -= KEYS, seen_below -= KEYS, seen_by_all -= KEYS;
        if (seen_by_all < KEYS) mask_scores(score, seen, seen_below);
        soften(score, maximum, sum, factor, a.scale);
        hold<KEYS / 2>(score);
        if (tile + 1 < end) await_tile(m->k_full, tile + 1); /* here, so that the compiler leaves the next wait here */
        wgmma_wait<0>();
        hold<DIM / 2>(output);
        hold<KEYS / 4>(weight);
        release(me, &m->v_empty[(tile - 1) % STAGES]);
        pack_weights<T>(weight, score);
#pragma unroll
        for (int i = 0; i < DIM / 2; i++) output[i] *= factor[i % 4 / 2];
    }
    const int stage = (end - 1) % STAGES;
    await_tile(m->v_full, end - 1);
    if (t.n_keys % UNIT) clear_values<DIM>(me, m, stage, t.n_keys);
    begin_values<T, DIM>(output, weight, m, stage);
    wgmma_wait<0>();
    hold<DIM / 2>(output);
    hold<KEYS / 4>(weight);
    release(me, &m->v_empty[stage]);
}

/* A warpgroup whose queries would all lie past the last row takes its turns and frees the tiles, no more. */
template <int DIM> INLINE void skip_tiles(const struct consumer &me, struct memory<DIM> *m, int tile, int n_tiles)
{
    for (int i = 0; i < n_tiles; i++, tile++) {
        await_tile(m->k_full, tile);
        __syncwarp(); /* products would have kept the warp together */
        release(me, &m->k_empty[tile % STAGES]);
        if (i > 0) group_sync(TURN + me.group, CONSUMERS * GROUP);
        if (i > 0) group_arrive(TURN + (me.group + 1) % CONSUMERS, CONSUMERS * GROUP);
        await_tile(m->v_full, tile);
        __syncwarp();
        release(me, &m->v_empty[tile % STAGES]);
    }
}

/* Divides by the sums, turns the warp's 16 rows round in the place of its queries and writes 16 bytes a thread. Rows
 * that saw no key are zeros. */
template <typename T, int DIM>
INLINE void store_output(const struct attend &a, const struct task &t, const struct consumer &me, struct memory<DIM> *m,
                         int place, const float *output, const float *sum)
{
    const int first = me.group * 64 + me.warp * 16;
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = sum[r] + __shfl_xor_sync(~0u, sum[r], 1);
        total += __shfl_xor_sync(~0u, total, 2);
        factor[r] = total > 0 ? __fdividef(1, total) : 0;
    }
    group_sync(WITHIN + me.group, GROUP); /* all scores of the warpgroup are made */
#pragma unroll
    for (int i = 0; i < DIM / 16; i++) {
        const int row = first + me.lane % 16, chunk = (2 * i + me.lane / 16) % 8 ^ row % 8;
        const float *d = output + 8 * i;
        store_matrices(shared_address(m->q[place][i / 4][row] + chunk * 8),
                       pack2<T>(d[0] * factor[0], d[1] * factor[0]), pack2<T>(d[2] * factor[1], d[3] * factor[1]),
                       pack2<T>(d[4] * factor[0], d[5] * factor[0]), pack2<T>(d[6] * factor[1], d[7] * factor[1]));
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < DIM / 16; i++) {
        const int at = i * 32 + me.lane, row = first + at / (DIM / 8), chunk = at % (DIM / 8);
        const uint4 x = *(const uint4 *)(m->q[place][chunk / 8][row] + (chunk % 8 ^ row % 8) * 8);
        if (row < t.n_rows) *(uint4 *)((T *)a.out + (t.row + row) * a.out_stride + t.head * DIM + chunk * 8) = x;
    }
    async_fence();
    __syncwarp();
    release(me, &m->q_empty[place]);
}

template <typename T, int DIM> INLINE void consume(const struct attend &a, struct memory<DIM> *m)
{
    const int thread = threadIdx.x - GROUP;
    const struct consumer me = {.group = __shfl_sync(~0u, thread / GROUP, 0), /* known to be the same in a warp */
                                .warp = thread / 32 % 4,
                                .lane = thread % 32,
                                .row = thread / 32 * 16 + thread % 32 / 4};
    if (me.group == CONSUMERS - 1) group_arrive(TURN, CONSUMERS * GROUP); /* the first one's turn */
    for (int n = 0, tile = 0;; n++) {
        barrier_wait(shared_address(&m->q_full[n % 2]), n / 2 % 2);
        const struct task t = m->task[n % 2];
        if (t.head < 0) break;
        float output[DIM / 2] = {}, sum[2] = {};
        const int n_tiles = tiles_of(t.n_keys, KEYS);
        if (me.group * 64 >= t.n_rows)
            skip_tiles<DIM>(me, m, tile, n_tiles);
        else if (n_tiles > 0)
            attend_tiles<T, DIM>(a, t, me, m, n % 2, tile, output, sum);
        tile += n_tiles;
        store_output<T, DIM>(a, t, me, m, n % 2, output, sum);
    }
}

#endif

/* ---- the kernel ---- */

template <typename T, int DIM>
__global__ void __launch_bounds__(THREADS, 1) attention_hopper_kernel(const __grid_constant__ struct attend a)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) unsigned char dynamic[];
    struct memory<DIM> *m = (struct memory<DIM> *)(dynamic + (1024 - shared_address(dynamic) % 1024) % 1024);
    if (threadIdx.x == 0) {
        tensor_map_prefetch(&a.q_map);
        tensor_map_prefetch(&a.pages_map);
        for (int i = 0; i < 2; i++) {
            barrier_init(shared_address(&m->q_full[i]), 1);
            barrier_init(shared_address(&m->q_empty[i]), CONSUMER_WARPS);
        }
        for (int i = 0; i < STAGES; i++) {
            barrier_init(shared_address(&m->k_full[i]), 1);
            barrier_init(shared_address(&m->v_full[i]), 1);
            barrier_init(shared_address(&m->k_empty[i]), CONSUMER_WARPS);
            barrier_init(shared_address(&m->v_empty[i]), CONSUMER_WARPS);
        }
        barriers_ready();
    }
    let_successor_start();
    wait_for_predecessor();
    __syncthreads();
    if (threadIdx.x < GROUP) {
        registers_release<PRODUCER_REGISTERS>();
        if (threadIdx.x < 32) produce<DIM>(a, m);
    } else {
        registers_acquire<CONSUMER_REGISTERS>();
        consume<T, DIM>(a, m);
    }
#endif
}

/* ---- the host's side ---- */

/* Queries: boxes of 64 columns, 1 head, 128 rows. */
static int encode_queries(encode_tiled encode, CUtensorMap *map, const struct tensor *q)
{
    const int64_t row = q->dim[0] > 1 ? q->stride[0] : q->dim[1] * q->dim[2]; /* a single row's may be anything */
    const cuuint64_t size[3] = {(cuuint64_t)q->dim[2], (cuuint64_t)q->dim[1], (cuuint64_t)q->dim[0]};
    const cuuint64_t stride[2] = {(cuuint64_t)q->dim[2] * 2, (cuuint64_t)row * 2};
    const cuuint32_t box[3] = {64, 1, QUERIES};
    return encode_map(encode, map, "q", q, 3, size, stride, box);
}

/* Pages: boxes of 64 columns, 8 rows, all halves, 2 times 8 rows. */
static int encode_pages(encode_tiled encode, CUtensorMap *map, const struct kv_view *kv)
{
    const cuuint64_t row = (cuuint64_t)kv->head_dim * 2, halves = (cuuint64_t)kv->head_dim / 64;
    const cuuint64_t size[4] = {64, 8, halves, (cuuint64_t)kv->n_pages * 2 * (cuuint64_t)kv->page_size / 8};
    const cuuint64_t stride[3] = {row, 128, 8 * row};
    const cuuint32_t box[4] = {64, 8, (cuuint32_t)halves, UNIT / 8};
    return encode_map(encode, map, "kv.pool", &kv->pool, 4, size, stride, box);
}

bool cuda__attention_hopper_fits(const struct cuda *c, const struct kv_view *kv, const struct attention_heads *heads)
{
    const int64_t rows = (int64_t)kv->n_pages * 2 * kv->page_size;
    return c->arch == 90 && (heads->head_dim == 64 || heads->head_dim == 128) && kv->page_size % UNIT == 0 &&
           rows < INT32_MAX && rows > 0 && c->n_counters >= 2;
}

template <typename T, int DIM> static int launch(struct ops *o, const struct attend *a)
{
    const struct cuda *c = cuda__of(o);
    const size_t bytes = sizeof(struct memory<DIM>) + 1024;
    const int n_blocks = a->n_tasks < c->n_multiprocessors ? a->n_tasks : c->n_multiprocessors;
    CUDA_TRY(
        cudaFuncSetAttribute(attention_hopper_kernel<T, DIM>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    return cuda__launch(o, "attention_hopper", attention_hopper_kernel<T, DIM>, dim3((unsigned)n_blocks), dim3(THREADS),
                        bytes, *a);
}

int cuda__attention_hopper(struct ops *o, struct tensor out, struct tensor q, const struct seq_batch *batch,
                           const struct kv_view *kv, const struct attention_heads *heads)
{
    struct attend a = {.out = out.data,
                       .out_stride = out.stride[0],
                       .slot = batch->slot,
                       .cu_seqlens = batch->cu_seqlens,
                       .kv = *kv,
                       .counter = cuda__of(o)->counter,
                       .n_seqs = batch->n_seqs,
                       .n_heads = heads->n_heads,
                       .group = heads->n_heads / heads->n_kv_heads,
                       .lane = heads->lane,
                       .scale = heads->scale * 1.44269504f};
    encode_tiled encode = NULL;
    for (int i = 0; i < batch->n_seqs; i++)
        a.n_tasks +=
            (batch->host_cu_seqlens[i + 1] - batch->host_cu_seqlens[i] + QUERIES - 1) / QUERIES * heads->n_heads;
    if (a.n_tasks == 0) return OK;
    TRY(find_encoder(&encode));
    TRY(encode_queries(encode, &a.q_map, &q));
    TRY(encode_pages(encode, &a.pages_map, kv));
    WITH_TYPE(o->dtype, T, { return heads->head_dim == 128 ? launch<T, 128>(o, &a) : launch<T, 64>(o, &a); });
}
