/* The attention probe: column sums of the judging rows' attention and the count of its entries above a threshold,
 * without ever storing the attention. Three launches for each 256 rows of a head: every row's maximum and sum within
 * each tile of keys; these joined over the tiles; then, with the logits computed a second time, columns and counts.
 *
 * The rows of a group's heads stand one head after the other in one list, which goes through shared memory 64 rows at
 * a time. A warp keeps 32 keys in registers while the rows pass; where keys are few, several warps share them and deal
 * the rows among themselves. A thread's operands are 16 consecutive bytes, as in attention_decode.cu. */
#include "kernels/cuda/attention_instructions.cuh"

enum {
    PROBE_WARPS = 4,
    PROBE_THREADS = PROBE_WARPS * 32,
    PROBE_BLOCKS = 4, /* on a multiprocessor, for the compiler */
    KEYS_A_WARP = 32,
    ROWS_AT_ONCE = 256, /* of one head and pass */
    ROW_TILE = 16,
    STAGE_ROWS = 64, /* in shared memory, two stages */
    MOST_GROUP = 128,
    FEW_KEYS = 8192,     /* up to here warps may share keys */
    WANTED_BLOCKS = 256, /* a fixed number: results do not depend on the device */
    JOIN_WARPS = 8,
    JOIN_AT_ONCE = 4
};

/* A row in shared memory is padded so that 8 threads that read 16 bytes each of 2 rows meet all banks. */
#define STAGE_STRIDE(chunks) ((chunks)*64 + ((chunks) % 2 ? 0 : 64))

struct probe_arguments {
    struct kv_view kv;
    const void *q;
    int64_t q_stride;
    int lane, group;
    int heads_a_lane;           /* blocks' heads that share a lane: 1, or with per_head a group's */
    int n_rows, first_position; /* of this pass */
    int n_listed;               /* rows of the list: group * n_rows */
    int n_keys, n_tiles;        /* that this pass sees */
    int total_keys, key_groups; /* a block's groups of 32 keys: 1, 2 or 4, each with 4, 2 or 1 warps */
    bool first_pass;
    const float *row_weight;
    float scale, cut; /* of logits in powers of two; log2 of the threshold, +inf counts nothing */
    float2 *part;     /* [kv head, tile, group * ROWS_AT_ONCE] maximum and sum within a tile of keys */
    float2 *whole;    /* [kv head, group * ROWS_AT_ONCE] maximum over all keys, weight / sum */
    float *column_sum;
    unsigned long long *kept;
};

/* Copies the list's rows from `first` on into a stage, zeros where there are none. */
template <typename T, int CHUNKS>
__device__ static void load_stage(char *stage, const struct probe_arguments &a, int kv_head, int first)
{
    const int threads_a_row = CHUNKS == 3 ? 16 : CHUNKS * 4, step = PROBE_THREADS / threads_a_row;
    const int piece = (int)threadIdx.x % threads_a_row, dim = a.kv.head_dim;
    const int rest = (a.n_listed - first + ROW_TILE - 1) / ROW_TILE * ROW_TILE;
    int i = (int)threadIdx.x / threads_a_row, in_group = (first + i) / a.n_rows, row = (first + i) % a.n_rows;
    const uint32_t to = shared_address(stage) + (uint32_t)piece * 16;
    for (; i < STAGE_ROWS && i < rest; i += step) {
        const bool valid = first + i < a.n_listed && piece * 8 < dim;
        const T *from = (const T *)a.q;
        if (valid) from += row * a.q_stride + (int64_t)(kv_head * a.group + in_group) * dim + piece * 8;
        if (piece < CHUNKS * 4) copy_16(to + (uint32_t)i * STAGE_STRIDE(CHUNKS), from, valid);
        for (row += step; row >= a.n_rows; row -= a.n_rows) in_group++;
    }
    copies_begin();
}

/* A warp's keys: token lane / 4 of each of 4 groups of 8, dims chunk * 32 + t * 8; beyond the last key that again, for
 * no row sees it. All pages are looked up first. Past the first cache, which a kernel that reads before it waits must
 * not trust. */
template <int CHUNKS>
__device__ static void load_probe_keys(uint4 (*k)[CHUNKS], const struct probe_arguments &a, int lane, int first)
{
    const int thread = (int)threadIdx.x % 32, t = thread % 4, dim = a.kv.head_dim, size = a.kv.page_size;
    const int32_t *pages = a.kv.page_row + (int64_t)lane * a.kv.max_pages;
    int token[4], page[4];
#pragma unroll
    for (int n = 0; n < 4; n++) {
        token[n] = min(first + n * 8 + thread / 4, a.n_keys - 1);
        page[n] = __ldcg(pages + token[n] / size);
    }
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const char *key = (const char *)a.kv.pool.data + ((int64_t)page[n] * 2 * size + token[n] % size) * dim * 2;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const int at = c * 32 + t * 8;
            k[n][c] = at < dim ? __ldcg((const uint4 *)(key + at * 2)) : make_uint4(0, 0, 0, 0);
        }
    }
}

/* Logits of 16 rows in shared memory and the warp's 32 keys; s[n][i]: rows r = lane / 4 and r + 8, keys n * 8 + 2t and
 * + 1. `row` is row r's number in the list. Entries outside the causal triangle are -inf; false: all of them are. */
template <typename T, int CHUNKS>
__device__ static bool probe_logits(float (*s)[4], const uint4 (*k)[CHUNKS], const struct probe_arguments &a,
                                    const char *rows, int row, int first_key)
{
    const int r = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4;
    const bool cut = first_key + KEYS_A_WARP - 1 > a.first_position; /* not every row sees every key */
    int seen[2] = {0, 0};                                            /* last key that a row sees, counted from ours */
    if (cut) {
        seen[0] = a.first_position + row % a.n_rows - first_key;
        seen[1] = a.first_position + (row + 8) % a.n_rows - first_key;
        if (!__any_sync(~0u, seen[0] >= 0 || seen[1] >= 0)) return false;
    }
    const char *low = rows + r * STAGE_STRIDE(CHUNKS) + t * 16, *high = low + 8 * STAGE_STRIDE(CHUNKS);
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][i] = 0;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const uint4 x = *(const uint4 *)(low + c * 64), y = *(const uint4 *)(high + c * 64);
#pragma unroll
        for (int n = 0; n < 4; n++) mma_16816<T>(s[n], x.x, y.x, x.y, y.y, k[n][c].x, k[n][c].y);
#pragma unroll
        for (int n = 0; n < 4; n++) mma_16816<T>(s[n], x.z, y.z, x.w, y.w, k[n][c].z, k[n][c].w);
    }
    /* Rounded before anything is subtracted: the maximum less itself must be 0, or a threshold of 1 would miss it. */
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][i] = __fmul_rn(s[n][i], a.scale);
    if (cut)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (n * 8 + 2 * t + (i & 1) > seen[i / 2]) s[n][i] = -INFINITY;
    return true;
}

/* Maximum and sum of the warp's keys for rows r and r + 8, on all threads. */
__device__ static void take_rows(float2 *result, const float (*s)[4])
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = -INFINITY, sum = 0;
#pragma unroll
        for (int n = 0; n < 4; n++) top = fmaxf(top, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
#pragma unroll
        for (int step = 1; step < 4; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
        const float base = top == -INFINITY ? 0 : top;
#pragma unroll
        for (int n = 0; n < 4; n++) sum += power_of_2(s[n][half * 2] - base) + power_of_2(s[n][half * 2 + 1] - base);
#pragma unroll
        for (int step = 1; step < 4; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
        result[half] = make_float2(top, sum);
    }
}

/* Joins a stage's rows over the block's groups of keys. */
__device__ static void store_part(const struct probe_arguments &a, const float2 (*part)[STAGE_ROWS], int first)
{
    const int i = (int)threadIdx.x, listed = a.group * ROWS_AT_ONCE;
    if (i >= STAGE_ROWS || first + i >= a.n_listed) return;
    float top = -INFINITY, sum = 0;
    for (int g = 0; g < a.key_groups; g++) top = fmaxf(top, part[g][i].x);
    const float base = top == -INFINITY ? 0 : top;
    for (int g = 0; g < a.key_groups; g++) sum += part[g][i].y * power_of_2(part[g][i].x - base);
    a.part[((int64_t)blockIdx.y * a.n_tiles + blockIdx.x) * listed + first + i] = make_float2(top, sum);
}

/* Grid: tiles x KV heads. It waits before it lets the others in: when they start, the keys stand in the cache. */
template <typename T, int CHUNKS>
__global__ static void __launch_bounds__(PROBE_THREADS, PROBE_BLOCKS) probe_rows_kernel(struct probe_arguments a)
{
    __shared__ __align__(16) char stage[2][STAGE_ROWS * STAGE_STRIDE(CHUNKS)];
    __shared__ float2 part[2][PROBE_WARPS][STAGE_ROWS];
    wait_for_predecessor();
    let_successor_start();
    const int warp = (int)threadIdx.x / 32, thread = (int)threadIdx.x % 32, r = thread / 4, kv_head = (int)blockIdx.y;
    const int key_group = warp % a.key_groups, share = warp / a.key_groups, shares = PROBE_WARPS / a.key_groups;
    const int first_key = ((int)blockIdx.x * a.key_groups + key_group) * KEYS_A_WARP;
    uint4 k[4][CHUNKS];
    load_stage<T, CHUNKS>(stage[0], a, kv_head, 0);
    load_probe_keys<CHUNKS>(k, a, a.lane + kv_head / a.heads_a_lane, first_key);
    int at = 0;
    for (int first = 0; first < a.n_listed; first += STAGE_ROWS, at ^= 1) {
        copies_end();
        __syncthreads();
        if (first > 0) store_part(a, part[at ^ 1], first - STAGE_ROWS);
        if (first + STAGE_ROWS < a.n_listed) load_stage<T, CHUNKS>(stage[at ^ 1], a, kv_head, first + STAGE_ROWS);
        for (int i = share * ROW_TILE; i < STAGE_ROWS && first + i < a.n_listed; i += shares * ROW_TILE) {
            float s[4][4];
            float2 result[2] = {{-INFINITY, 0}, {-INFINITY, 0}};
            if (probe_logits<T, CHUNKS>(s, k, a, stage[at] + i * STAGE_STRIDE(CHUNKS), first + i + r, first_key))
                take_rows(result, s);
            if (thread % 4 == 0) part[at][key_group][i + r] = result[0], part[at][key_group][i + r + 8] = result[1];
        }
    }
    __syncthreads();
    store_part(a, part[at ^ 1], (a.n_listed - 1) / STAGE_ROWS * STAGE_ROWS);
}

/* Grid: 32 rows of the list x KV heads; a thread a row and an eighth of the tiles. Also clears the counts before the
 * pass that adds to them. */
__global__ static void __launch_bounds__(JOIN_WARPS * 32) probe_join_kernel(struct probe_arguments a)
{
    __shared__ float2 part[JOIN_WARPS][32];
    let_successor_start();
    wait_for_predecessor();
    const int warp = (int)threadIdx.x / 32, thread = (int)threadIdx.x % 32, kv_head = (int)blockIdx.y;
    const int row = (int)blockIdx.x * 32 + thread, listed = a.group * ROWS_AT_ONCE;
    if (a.kept && a.first_pass && blockIdx.x == 0 && (int)threadIdx.x < a.group)
        a.kept[kv_head * a.group + (int)threadIdx.x] = 0;
    const float2 *from = a.part + (int64_t)kv_head * a.n_tiles * listed + row;
    float top = -INFINITY, sum = 0;
    for (int first = warp; first < a.n_tiles; first += JOIN_WARPS * JOIN_AT_ONCE) {
        float2 p[JOIN_AT_ONCE];
        float best = top;
#pragma unroll
        for (int i = 0; i < JOIN_AT_ONCE; i++) {
            const int tile = first + i * JOIN_WARPS;
            p[i] = row < a.n_listed && tile < a.n_tiles ? from[(int64_t)tile * listed] : make_float2(-INFINITY, 0);
        }
#pragma unroll
        for (int i = 0; i < JOIN_AT_ONCE; i++) best = fmaxf(best, p[i].x);
        const float base = best == -INFINITY ? 0 : best;
        sum *= power_of_2(top - base);
#pragma unroll
        for (int i = 0; i < JOIN_AT_ONCE; i++) sum += p[i].y * power_of_2(p[i].x - base);
        top = best;
    }
    part[warp][thread] = make_float2(top, sum);
    __syncthreads();
    if (warp > 0 || row >= a.n_listed) return;
    sum = 0;
    for (int w = 0; w < JOIN_WARPS; w++) top = fmaxf(top, part[w][thread].x);
    for (int w = 0; w < JOIN_WARPS; w++) sum += part[w][thread].y * power_of_2(part[w][thread].x - top);
    const float weight = a.row_weight ? a.row_weight[row % a.n_rows] : 1;
    a.whole[kv_head * listed + row] = make_float2(top, weight / sum);
}

/* Adds the counts of a tile's rows to their heads: n[0] of row `row`, n[1] of the row 8 below. The tile begins with
 * row `first` of the list, in head *head, which moves on with it. */
__device__ static void add_kept(int *kept, const int *n, const struct probe_arguments &a, int first, int row, int *head)
{
    const int last = (first + ROW_TILE < a.n_listed ? first + ROW_TILE : a.n_listed) - 1;
    while (first >= (*head + 1) * a.n_rows) ++*head;
    if (last < (*head + 1) * a.n_rows) {
        const int sum = __reduce_add_sync(~0u, n[0] + n[1]);
        if (threadIdx.x % 32 == 0 && sum) atomicAdd(&kept[*head], sum);
    } else {
        if (n[0]) atomicAdd(&kept[row / a.n_rows], n[0]);
        if (n[1]) atomicAdd(&kept[(row + 8) / a.n_rows], n[1]);
    }
}

/* Adds the block's results to the caller's: columns over the warps that share keys in their order, and the counts. */
__device__ static void store_columns(const struct probe_arguments &a, float (*column)[2], float (*sum)[KEYS_A_WARP],
                                     const int *kept)
{
    const int warp = (int)threadIdx.x / 32, thread = (int)threadIdx.x % 32, kv_head = (int)blockIdx.y;
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float x = column[n][e];
#pragma unroll
            for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(~0u, x, step);
            if (thread < 4) sum[warp][n * 8 + 2 * thread + e] = x;
        }
    __syncthreads();
    const int key = ((int)blockIdx.x * a.key_groups + warp) * KEYS_A_WARP + thread;
    if (warp < a.key_groups && key < a.total_keys) {
        float *to = a.column_sum + (int64_t)kv_head * a.total_keys + key, x = 0;
        for (int w = warp; w < PROBE_WARPS; w += a.key_groups) x += sum[w][thread];
        *to = a.first_pass ? x : *to + x;
    }
    if (a.kept && (int)threadIdx.x < a.group && kept[threadIdx.x])
        atomicAdd(&a.kept[kv_head * a.group + (int)threadIdx.x], (unsigned long long)kept[threadIdx.x]);
}

/* Grid: tiles x KV heads. Keys and the first rows, which stood there before the rows' kernel let anything start, are
 * fetched while that and the join still run. */
template <typename T, int CHUNKS>
__global__ static void __launch_bounds__(PROBE_THREADS, PROBE_BLOCKS) probe_columns_kernel(struct probe_arguments a)
{
    __shared__ __align__(16) char stage[2][STAGE_ROWS * STAGE_STRIDE(CHUNKS)];
    __shared__ float sum[PROBE_WARPS][KEYS_A_WARP];
    __shared__ int kept[MOST_GROUP];
    const int warp = (int)threadIdx.x / 32, r = (int)threadIdx.x % 32 / 4, kv_head = (int)blockIdx.y;
    const int key_group = warp % a.key_groups, share = warp / a.key_groups, shares = PROBE_WARPS / a.key_groups;
    const int first_key = ((int)blockIdx.x * a.key_groups + key_group) * KEYS_A_WARP;
    const float2 *whole = a.whole + kv_head * a.group * ROWS_AT_ONCE;
    float column[4][2] = {};
    int head = 0, at = 0;
    uint4 k[4][CHUNKS];
    let_successor_start();
    load_stage<T, CHUNKS>(stage[0], a, kv_head, 0);
    load_probe_keys<CHUNKS>(k, a, a.lane + kv_head / a.heads_a_lane, first_key);
    if ((int)threadIdx.x < MOST_GROUP) kept[threadIdx.x] = 0;
    wait_for_predecessor();
    for (int first = 0; first < a.n_listed; first += STAGE_ROWS, at ^= 1) {
        copies_end();
        __syncthreads();
        if (first + STAGE_ROWS < a.n_listed) load_stage<T, CHUNKS>(stage[at ^ 1], a, kv_head, first + STAGE_ROWS);
        for (int i = share * ROW_TILE; i < STAGE_ROWS && first + i < a.n_listed; i += shares * ROW_TILE) {
            const int row = first + i + r;
            const float2 none = make_float2(INFINITY, 0);
            const float2 of[2] = {row < a.n_listed ? whole[row] : none, row + 8 < a.n_listed ? whole[row + 8] : none};
            int n_kept[2] = {0, 0};
            float s[4][4];
            if (!probe_logits<T, CHUNKS>(s, k, a, stage[at] + i * STAGE_STRIDE(CHUNKS), row, first_key)) continue;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float limit = of[half].x + a.cut;
#pragma unroll
                for (int n = 0; n < 4; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float x = s[n][half * 2 + e];
                        column[n][e] += of[half].y * power_of_2(x - of[half].x);
                        n_kept[half] += x >= limit;
                    }
            }
            if (a.kept) add_kept(kept, n_kept, a, first + i, row, &head);
        }
    }
    store_columns(a, column, sum, kept);
}

/* ---- the host's side ---- */

static int tiles_of(int n_keys, int key_groups)
{
    return (int)(((int64_t)n_keys + key_groups * KEYS_A_WARP - 1) / (key_groups * KEYS_A_WARP));
}

/* Never less for more keys. */
static int most_tiles(int n_keys)
{
    const int few = tiles_of(n_keys < FEW_KEYS ? n_keys : FEW_KEYS, 1), many = tiles_of(n_keys, PROBE_WARPS);
    return few > many ? few : many;
}

static int place_probe(int n_heads, int n_keys, struct arena *arena, struct probe_arguments *a)
{
    static const char label[] = "op scratch";
    const size_t rows = (size_t)n_heads * ROWS_AT_ONCE;
    TRY(arena_take(arena, rows * (size_t)most_tiles(n_keys) * sizeof *a->part, label, &a->part));
    return arena_take(arena, rows * sizeof *a->whole, label, &a->whole);
}

int cuda__probe_measure(const struct cuda *c, const struct ops_limits *limits, struct arena *arena)
{
    struct probe_arguments a;
    (void)c;
    return place_probe(limits->max_heads, limits->max_context, arena, &a);
}

/* Few blocks: fewer keys for each, and the rows dealt to more warps, if there are as many tiles of rows. */
static int choose_key_groups(int n_kv_heads, int n_listed, int n_keys)
{
    int groups = PROBE_WARPS;
    if (n_keys > FEW_KEYS) return groups;
    while (groups > 1 && n_kv_heads * tiles_of(n_keys, groups) < WANTED_BLOCKS &&
           n_listed > (PROBE_WARPS / groups * 2 - 1) * ROW_TILE)
        groups /= 2;
    return groups;
}

template <typename T, int CHUNKS>
static int launch_probe(struct ops *o, const struct probe_arguments &a, unsigned n_kv_heads)
{
    /* The last pass sees all keys; an earlier one fewer, and the first clears the columns beyond. */
    const unsigned tiles = (unsigned)a.n_tiles,
                   column_tiles = a.first_pass ? (unsigned)tiles_of(a.total_keys, a.key_groups) : tiles;
    TRY(cuda__launch(o, "attention_probe", probe_rows_kernel<T, CHUNKS>, dim3(tiles, n_kv_heads), dim3(PROBE_THREADS),
                     0, a));
    TRY(cuda__launch(o, "attention_probe", probe_join_kernel, dim3(((unsigned)a.n_listed + 31) / 32, n_kv_heads),
                     dim3(JOIN_WARPS * 32), 0, a));
    return cuda__launch(o, "attention_probe", probe_columns_kernel<T, CHUNKS>, dim3(column_tiles, n_kv_heads),
                        dim3(PROBE_THREADS), 0, a);
}

template <typename T>
static int launch_probe_for_dim(struct ops *o, const struct probe_arguments &a, unsigned n_kv_heads)
{
    if (a.kv.head_dim <= 32) return launch_probe<T, 1>(o, a, n_kv_heads);
    if (a.kv.head_dim <= 64) return launch_probe<T, 2>(o, a, n_kv_heads);
    if (a.kv.head_dim <= 96) return launch_probe<T, 3>(o, a, n_kv_heads);
    return launch_probe<T, 4>(o, a, n_kv_heads);
}

static int zero_results(struct ops *o, const struct attention_heads *heads, const struct attention_probe *probe)
{
    const size_t keys = (size_t)(probe->first_position + probe->n_rows);
    const int rows = probe->per_head ? heads->n_heads : heads->n_kv_heads;
    TRY(ops_zero(o, probe->column_sum, (size_t)rows * keys * sizeof(float)));
    return probe->kept ? ops_zero(o, probe->kept, (size_t)heads->n_heads * sizeof *probe->kept) : OK;
}

int cuda__attention_probe(struct ops *o, struct tensor q, const struct kv_view *kv, const struct attention_heads *heads,
                          const struct attention_probe *probe)
{
    struct probe_arguments a = {};
    struct arena arena;
    const int group = heads->n_heads / heads->n_kv_heads;
    if (kv->head_dim % 8 || kv->head_dim > 128 || group > MOST_GROUP || q.stride[0] % 8 || (uint64_t)q.data % 16)
        FAIL(ERR_UNSUPPORTED,
             "cuda: attention probe over heads of %d dimensions, %d query heads a KV head; served are steps of 8 up to "
             "128 and up to %d heads",
             kv->head_dim, group, MOST_GROUP);
    if (probe->n_rows == 0) return zero_results(o, heads, probe);
    a.kv = *kv;
    a.q_stride = q.stride[0];
    a.lane = probe->slot * kv->lanes_per_slot + heads->lane;
    /* Columns of each head: every query head is a group of its own, which reads its KV head's lane. */
    const int n_groups = probe->per_head ? heads->n_heads : heads->n_kv_heads;
    a.group = probe->per_head ? 1 : group;
    a.heads_a_lane = probe->per_head ? group : 1;
    a.total_keys = probe->first_position + probe->n_rows;
    a.key_groups = choose_key_groups(n_groups, a.group * (probe->n_rows < ROWS_AT_ONCE ? probe->n_rows : ROWS_AT_ONCE),
                                     a.total_keys);
    a.scale = heads->scale * 1.44269504088896f;
    a.cut = probe->threshold > 0 ? log2f(probe->threshold) : INFINITY;
    a.column_sum = probe->column_sum;
    a.kept = (unsigned long long *)probe->kept;
    TRY(cuda__scratch(o, &arena));
    TRY(place_probe(heads->n_heads, a.total_keys, &arena, &a));
    for (int first = 0; first < probe->n_rows; first += ROWS_AT_ONCE) {
        a.q = (const char *)q.data + first * q.stride[0] * 2;
        a.n_rows = probe->n_rows - first < ROWS_AT_ONCE ? probe->n_rows - first : ROWS_AT_ONCE;
        a.n_listed = a.group * a.n_rows;
        a.first_position = probe->first_position + first;
        a.n_keys = a.first_position + a.n_rows;
        a.n_tiles = tiles_of(a.n_keys, a.key_groups);
        a.row_weight = probe->row_weight ? probe->row_weight + first : NULL;
        a.first_pass = first == 0;
        WITH_TYPE(q.dtype, T, TRY(launch_probe_for_dim<T>(o, a, (unsigned)n_groups)));
    }
    return OK;
}
