/* The attention probe: column sums of the judging rows' attention and the count of its entries above a threshold,
 * without ever storing the attention. Three launches for each 256 rows: every row's maximum and sum within each tile of
 * 128 keys; these joined over the tiles; then, with the logits computed a second time, columns and counts. A thread's
 * operands are 16 consecutive bytes of a key, as in attention_decode.cu; keys stay in registers while the rows pass. */
#include "kernels/cuda/device.cuh"

enum {
    PROBE_WARPS = 4,
    KEYS_A_WARP = 32,
    KEYS_A_BLOCK = PROBE_WARPS * KEYS_A_WARP,
    ROWS_AT_ONCE = 256, /* of one head and pass; whole tiles of 16 */
    ROW_TILE = 16
};

struct probe_arguments {
    struct kv_view kv;
    const void *q;
    int64_t q_stride;
    int lane, n_kv_heads, group;
    int n_rows, first_position; /* of this pass */
    int n_keys, n_tiles, total_keys;
    bool first_pass;
    const float *row_weight;
    float scale, cut; /* of logits in powers of two; log2 of the threshold, -inf counts nothing */
    float2 *part;     /* [kv head, tile, group, ROWS_AT_ONCE] maximum and sum of a tile */
    float2 *whole;    /* [kv head, group, ROWS_AT_ONCE] the same over all keys */
    float *column_sum;
    unsigned long long *kept;
};

/* A warp's keys: token lane / 4 of each of 4 groups of 8, dims chunk * 32 + t * 8. */
template <int CHUNKS>
__device__ static void load_probe_keys(uint4 (*k)[CHUNKS], const struct probe_arguments &a, int lane, int first)
{
    const int thread = (int)threadIdx.x % 32, t = thread % 4, dim = a.kv.head_dim;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const int token = first + n * 8 + thread / 4;
        const char *key = (const char *)a.kv.pool.data;
        if (token < a.n_keys) key += cache_key(a.kv, lane, token) * 2;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const int at = c * 32 + t * 8;
            k[n][c] = token < a.n_keys && at < dim ? *(const uint4 *)(key + at * 2) : make_uint4(0, 0, 0, 0);
        }
    }
}

/* Logits of 16 rows and the warp's 32 keys; s[n][i]: rows lane / 4 and + 8, keys n * 8 + 2t and + 1. Entries outside
 * the causal triangle are -inf. */
template <typename T, int CHUNKS>
__device__ static void probe_logits(float (*s)[4], const uint4 (*k)[CHUNKS], const struct probe_arguments &a, int head,
                                    int first_row, int first_key)
{
    const int thread = (int)threadIdx.x % 32, r = thread / 4, t = thread % 4, dim = a.kv.head_dim;
    const T *low = (const T *)a.q + (first_row + r) * a.q_stride + (int64_t)head * dim, *high = low + 8 * a.q_stride;
    memset(s, 0, 16 * sizeof(float));
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int at = c * 32 + t * 8;
        const uint4 none = make_uint4(0, 0, 0, 0);
        const uint4 x = at < dim && first_row + r < a.n_rows ? *(const uint4 *)(low + at) : none;
        const uint4 y = at < dim && first_row + r + 8 < a.n_rows ? *(const uint4 *)(high + at) : none;
#pragma unroll
        for (int n = 0; n < 4; n++) {
            mma_16816<T>(s[n], x.x, y.x, x.y, y.y, k[n][c].x, k[n][c].y);
            mma_16816<T>(s[n], x.z, y.z, x.w, y.w, k[n][c].z, k[n][c].w);
        }
    }
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int key = first_key + n * 8 + 2 * t + (i & 1), row = first_row + r + (i & 2) * 4;
            s[n][i] = row < a.n_rows && key <= a.first_position + row ? s[n][i] * a.scale : -INFINITY;
        }
}

__device__ static int64_t part_of(const struct probe_arguments &a, int kv_head, int tile, int in_group)
{
    return (((int64_t)kv_head * a.n_tiles + tile) * a.group + in_group) * ROWS_AT_ONCE;
}

/* Grid: tiles x KV heads. */
template <typename T, int CHUNKS>
__global__ static void __launch_bounds__(PROBE_WARPS * 32) probe_rows_kernel(struct probe_arguments a)
{
    __shared__ float2 part[PROBE_WARPS][ROW_TILE];
    wait_for_predecessor();
    let_successor_start();
    const int warp = (int)threadIdx.x / 32, thread = (int)threadIdx.x % 32, kv_head = (int)blockIdx.y;
    const int first_key = (int)blockIdx.x * KEYS_A_BLOCK + warp * KEYS_A_WARP;
    uint4 k[4][CHUNKS];
    load_probe_keys<CHUNKS>(k, a, a.lane + kv_head, first_key);
    for (int g = 0; g < a.group; g++)
        for (int row = 0; row < a.n_rows; row += ROW_TILE) {
            float s[4][4];
            probe_logits<T, CHUNKS>(s, k, a, kv_head * a.group + g, row, first_key);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float top = -INFINITY, sum = 0;
#pragma unroll
                for (int n = 0; n < 4; n++) top = fmaxf(top, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
                for (int step = 1; step < 4; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
#pragma unroll
                for (int n = 0; n < 4; n++)
                    if (top != -INFINITY) sum += exp2f(s[n][half * 2] - top) + exp2f(s[n][half * 2 + 1] - top);
                for (int step = 1; step < 4; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
                if (thread % 4 == 0) part[warp][thread / 4 + half * 8] = make_float2(top, sum);
            }
            __syncthreads();
            if (threadIdx.x < ROW_TILE) {
                float top = -INFINITY, sum = 0;
                for (int w = 0; w < PROBE_WARPS; w++) top = fmaxf(top, part[w][threadIdx.x].x);
                for (int w = 0; w < PROBE_WARPS; w++)
                    if (part[w][threadIdx.x].x != -INFINITY)
                        sum += part[w][threadIdx.x].y * exp2f(part[w][threadIdx.x].x - top);
                a.part[part_of(a, kv_head, (int)blockIdx.x, g) + row + (int)threadIdx.x] = make_float2(top, sum);
            }
            __syncthreads();
        }
}

/* Grid: heads; a thread a row. Also clears the counts before the pass that adds to them. */
__global__ static void __launch_bounds__(ROWS_AT_ONCE) probe_join_kernel(struct probe_arguments a)
{
    wait_for_predecessor();
    let_successor_start();
    const int kv_head = (int)blockIdx.x / a.group, g = (int)blockIdx.x % a.group, row = (int)threadIdx.x;
    if (row == 0 && a.kept && a.first_pass) a.kept[blockIdx.x] = 0;
    if (row >= a.n_rows) return;
    float top = -INFINITY, sum = 0;
    for (int tile = 0; tile < a.n_tiles; tile++) top = fmaxf(top, a.part[part_of(a, kv_head, tile, g) + row].x);
    for (int tile = 0; tile < a.n_tiles; tile++) {
        const float2 p = a.part[part_of(a, kv_head, tile, g) + row];
        if (p.x != -INFINITY) sum += p.y * exp2f(p.x - top);
    }
    a.whole[(int64_t)blockIdx.x * ROWS_AT_ONCE + row] = make_float2(top, sum);
}

template <typename T, int CHUNKS>
__global__ static void __launch_bounds__(PROBE_WARPS * 32) probe_columns_kernel(struct probe_arguments a)
{
    wait_for_predecessor();
    let_successor_start();
    const int warp = (int)threadIdx.x / 32, thread = (int)threadIdx.x % 32, r = thread / 4, t = thread % 4;
    const int kv_head = (int)blockIdx.y, first_key = (int)blockIdx.x * KEYS_A_BLOCK + warp * KEYS_A_WARP;
    float column[4][2] = {};
    uint4 k[4][CHUNKS];
    load_probe_keys<CHUNKS>(k, a, a.lane + kv_head, first_key);
    for (int g = 0; g < a.group; g++) {
        const int head = kv_head * a.group + g;
        int kept = 0;
        for (int row = 0; row < a.n_rows; row += ROW_TILE) {
            float s[4][4];
            probe_logits<T, CHUNKS>(s, k, a, head, row, first_key);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at = row + r + half * 8;
                if (at >= a.n_rows) continue;
                const float2 whole = a.whole[(int64_t)head * ROWS_AT_ONCE + at];
                const float weight = (a.row_weight ? a.row_weight[at] : 1.0f) / whole.y;
#pragma unroll
                for (int n = 0; n < 4; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float d = s[n][half * 2 + e] - whole.x;
                        column[n][e] += weight * exp2f(d);
                        kept += d >= a.cut && d != -INFINITY;
                    }
            }
        }
        for (int step = 16; step > 0; step >>= 1) kept += __shfl_xor_sync(~0u, kept, step);
        if (a.kept && thread == 0 && kept) atomicAdd(&a.kept[head], (unsigned long long)kept);
    }
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float sum = column[n][e];
            for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
            const int key = first_key + n * 8 + 2 * t + e;
            if (r == 0 && key < a.total_keys) {
                float *to = a.column_sum + (int64_t)kv_head * a.total_keys + key;
                *to = a.first_pass ? sum : *to + sum;
            }
        }
}

static int place_probe(int n_heads, int n_keys, struct arena *arena, struct probe_arguments *a)
{
    static const char label[] = "op scratch";
    const size_t tiles = (size_t)(n_keys + KEYS_A_BLOCK - 1) / KEYS_A_BLOCK, rows = (size_t)n_heads * ROWS_AT_ONCE;
    TRY(arena_take(arena, rows * tiles * sizeof *a->part, label, &a->part));
    return arena_take(arena, rows * sizeof *a->whole, label, &a->whole);
}

int cuda__probe_measure(const struct cuda *c, const struct ops_limits *limits, struct arena *arena)
{
    struct probe_arguments a;
    (void)c;
    return place_probe(limits->max_heads, limits->max_context, arena, &a);
}

template <typename T, int CHUNKS> static int launch_probe(struct ops *o, const struct probe_arguments &a)
{
    /* The last pass sees all keys; earlier rows see fewer, and the columns beyond get zeros from the first. */
    const dim3 grid((unsigned)a.n_tiles, (unsigned)a.n_kv_heads), block(PROBE_WARPS * 32);
    TRY(cuda__launch(o, "attention_probe", probe_rows_kernel<T, CHUNKS>, grid, block, 0, a));
    TRY(cuda__launch(o, "attention_probe", probe_join_kernel, dim3((unsigned)(a.n_kv_heads * a.group)),
                     dim3(ROWS_AT_ONCE), 0, a));
    return cuda__launch(o, "attention_probe", probe_columns_kernel<T, CHUNKS>, grid, block, 0, a);
}

template <typename T> static int launch_probe_for_dim(struct ops *o, const struct probe_arguments &a)
{
    if (a.kv.head_dim <= 32) return launch_probe<T, 1>(o, a);
    if (a.kv.head_dim <= 64) return launch_probe<T, 2>(o, a);
    if (a.kv.head_dim <= 96) return launch_probe<T, 3>(o, a);
    return launch_probe<T, 4>(o, a);
}

static int zero_results(struct ops *o, const struct attention_heads *heads, const struct attention_probe *probe)
{
    const size_t keys = (size_t)(probe->first_position + probe->n_rows);
    TRY(ops_zero(o, probe->column_sum, (size_t)heads->n_kv_heads * keys * sizeof(float)));
    return probe->kept ? ops_zero(o, probe->kept, (size_t)heads->n_heads * sizeof *probe->kept) : OK;
}

int cuda__attention_probe(struct ops *o, struct tensor q, const struct kv_view *kv, const struct attention_heads *heads,
                          const struct attention_probe *probe)
{
    struct probe_arguments a = {};
    struct arena arena;
    if (kv->head_dim % 8 || kv->head_dim > 128 || q.stride[0] % 8 || (uint64_t)q.data % 16)
        FAIL(ERR_UNSUPPORTED, "cuda: attention probe over heads of %d dimensions; served are steps of 8 up to 128",
             kv->head_dim);
    if (probe->n_rows == 0) return zero_results(o, heads, probe);
    a.kv = *kv;
    a.q_stride = q.stride[0];
    a.lane = probe->slot * kv->lanes_per_slot + heads->lane;
    a.n_kv_heads = heads->n_kv_heads;
    a.group = heads->n_heads / heads->n_kv_heads;
    a.total_keys = probe->first_position + probe->n_rows;
    a.n_keys = a.total_keys;
    a.n_tiles = (a.n_keys + KEYS_A_BLOCK - 1) / KEYS_A_BLOCK;
    a.scale = heads->scale * 1.44269504088896f;
    a.cut = probe->threshold > 0 ? log2f(probe->threshold) : INFINITY;
    a.column_sum = probe->column_sum;
    a.kept = (unsigned long long *)probe->kept;
    TRY(cuda__scratch(o, &arena));
    TRY(place_probe(heads->n_heads, a.n_keys, &arena, &a));
    for (int first = 0; first < probe->n_rows; first += ROWS_AT_ONCE) {
        a.q = (const char *)q.data + first * q.stride[0] * 2;
        a.n_rows = probe->n_rows - first < ROWS_AT_ONCE ? probe->n_rows - first : ROWS_AT_ONCE;
        a.first_position = probe->first_position + first;
        a.row_weight = probe->row_weight ? probe->row_weight + first : NULL;
        a.first_pass = first == 0;
        WITH_TYPE(q.dtype, T, TRY(launch_probe_for_dim<T>(o, a)));
    }
    return OK;
}
