/* Attention of many queries with the matrix instructions that every GPU since compute capability 8.0 has: prompt
 * chunks (causal, keys and values from the lane's pages) where the Hopper kernel does not fit, and images (full, dense
 * keys and values).
 *
 * A block of 4 warps takes 64 queries of one head of one sequence, 16 a warp, and walks tiles of 64 keys in order with
 * an online softmax. Queries, scores and outputs stay in registers; a tile's keys arrive in shared memory while the
 * previous tile's values are in use, and its values while its scores are made. Tiles are cut by position in the lane
 * alone: a query's result is the same bits however a prompt is divided into chunks and whatever else is in the batch.
 * Head dimensions are padded with zeros to one of five sizes. */
#include "kernels/cuda/attention_instructions.cuh"

enum { WARPS = 4, ROWS = 16, QUERIES = WARPS * ROWS, KEYS = 64, PAD = 8 };

struct attend {
    const void *q, *k, *v; /* prompts: k and v are the first page's keys and values */
    void *out;
    int64_t q_stride, k_stride, v_stride, out_stride;
    bool is_prompt;
    int n_rows; /* of an image */
    int n_tiles, group, head_dim;
    float scale; /* times log2(e) */
    /* prompts */
    const int32_t *slot, *cu_seqlens;
    struct kv_view kv;
    int lane; /* of the layer */
};

/* One block's work. */
struct task {
    int head, kv_head, lane; /* lane: of the KV head, in the cache */
    int row, n_rows;         /* first row of the sequence in q, and how many it has */
    int query;               /* first query of this block within the sequence */
    int first;               /* keys before the sequence's row 0 */
    int n_keys;              /* keys that some query of the block sees; 0: none */
};

/* ---- the task and its memory ---- */

/* Blocks come heads first, so that the heads of a group share keys in L2, and long blocks before short ones. False:
 * this sequence has no such block. */
__device__ static inline bool find_task(const struct attend &a, struct task *t)
{
    const int sequence = blockIdx.y;
    *t = {};
    t->head = blockIdx.x;
    t->kv_head = t->head / a.group;
    t->query = (a.n_tiles - 1 - (int)blockIdx.z) * QUERIES;
    if (!a.is_prompt) {
        t->row = sequence * a.n_rows;
        t->n_rows = t->n_keys = a.n_rows;
        return t->query < t->n_rows;
    }
    t->row = a.cu_seqlens[sequence];
    t->n_rows = a.cu_seqlens[sequence + 1] - t->row;
    if (t->query >= t->n_rows) return false;
    const int slot = a.slot[sequence];
    if (slot < 0 || slot >= a.kv.n_slots) return true;
    t->lane = cache_lane(a.kv, slot, a.lane + t->kv_head);
    const int length = a.kv.lane_len[t->lane];
    t->first = max(length - t->n_rows, 0); /* below 0 the append failed, and the error word says so */
    t->n_keys = min(t->first + min(t->query + QUERIES, t->n_rows), length);
    return true;
}

/* Row of k and v that holds key i, a multiple of 16, and with the 15 rows after it the next keys. Keys past the last
 * one are not read: any row will do for them. */
__device__ static inline int64_t find_row(const struct attend &a, const struct task &t, int i)
{
    if (i >= t.n_keys) return a.is_prompt ? 0 : t.row;
    if (!a.is_prompt) return t.row + i;
    const int64_t page = a.kv.page_row[(int64_t)t.lane * a.kv.max_pages + i / a.kv.page_size];
    return page * 2 * a.kv.page_size + i % a.kv.page_size;
}

/* A warp copies 16 rows, of which n are valid, to shared memory; zeros after them and beyond head_dim. */
template <typename T, int DIM>
__device__ static inline void copy_rows(uint32_t to, const T *from, int64_t stride, int n, int head_dim)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < ROWS * DIM / 8 / 32; i++) {
        const int row = (i * 32 + lane) / (DIM / 8), column = (i * 32 + lane) % (DIM / 8) * 8;
        const bool valid = row < n && column < head_dim;
        copy_16(to + (row * (DIM + PAD) + column) * 2, valid ? from + row * stride + column : from, valid);
    }
}

/* The warp's 16 queries as fragments of A. */
template <typename T, int DIM>
__device__ static inline void load_queries(const struct attend &a, const struct task &t, uint32_t (*q)[4])
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int query = t.query + warp * ROWS + lane / 4;
    const T *from = (const T *)a.q + (t.row + query) * a.q_stride + t.head * a.head_dim;
#pragma unroll
    for (int i = 0; i < DIM / 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int row = j % 2 * 8, column = i * 16 + j / 2 * 8 + lane % 4 * 2;
            const bool valid = query + row < t.n_rows && column < a.head_dim;
            q[i][j] = valid ? *(const uint32_t *)(from + row * a.q_stride + column) : 0;
        }
}

/* ---- a tile ---- */

/* score[j] = queries times keys 8 j .. 8 j + 7 of the tile. */
template <typename T, int DIM>
__device__ static inline void score_tile(float (*score)[4], const uint32_t (*q)[4], uint32_t keys)
{
    const int lane = threadIdx.x % 32;
    keys += ((lane / 16 * 8 + lane % 8) * (DIM + PAD) + lane / 8 % 2 * 8) * 2;
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++) score[j][0] = score[j][1] = score[j][2] = score[j][3] = 0;
#pragma unroll
    for (int i = 0; i < DIM / 16; i++)
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            uint32_t b[4];
            load_matrices(b, keys + (j * 16 * (DIM + PAD) + i * 16) * 2);
            mma_16816<T>(score[2 * j], q[i][0], q[i][1], q[i][2], q[i][3], b[0], b[1]);
            mma_16816<T>(score[2 * j + 1], q[i][0], q[i][1], q[i][2], q[i][3], b[2], b[3]);
        }
}

/* Minus infinity for keys that a query does not see: the thread's first row sees `seen` keys of the tile, the row 8
 * further down seen_below. */
__device__ static inline void mask_tile(float (*score)[4], int seen, int seen_below)
{
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (j * 8 + (int)threadIdx.x % 4 * 2 + i % 2 >= (i < 2 ? seen : seen_below)) score[j][i] = -INFINITY;
}

/* Scores of the thread's two rows become weights; sums and outputs are scaled to the new maxima. A quad of threads
 * shares a row; each keeps the sum over its own columns. */
template <int DIM>
__device__ static inline void soften_tile(float (*score)[4], float (*output)[4], float *maximum, float *sum,
                                          float scale)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = maximum[r];
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) top = fmaxf(top, fmaxf(score[j][2 * r], score[j][2 * r + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float factor = power_of_2((maximum[r] - top) * scale), shift = top * scale;
        maximum[r] = top;
        sum[r] *= factor;
#pragma unroll
        for (int j = 0; j < DIM / 8; j++) output[j][2 * r] *= factor, output[j][2 * r + 1] *= factor;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; i++) {
                score[j][i] = power_of_2(fmaf(score[j][i], scale, -shift));
                sum[r] += score[j][i];
            }
    }
}

/* output += weights times values. The scores' fragments are, pair by pair, fragments of A. */
template <typename T, int DIM>
__device__ static inline void add_values(float (*output)[4], const float (*score)[4], uint32_t values)
{
    const int lane = threadIdx.x % 32;
    values += ((lane / 8 % 2 * 8 + lane % 8) * (DIM + PAD) + lane / 16 * 8) * 2;
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) {
        const uint32_t a0 = pack2<T>(score[2 * i][0], score[2 * i][1]), a1 = pack2<T>(score[2 * i][2], score[2 * i][3]);
        const uint32_t a2 = pack2<T>(score[2 * i + 1][0], score[2 * i + 1][1]);
        const uint32_t a3 = pack2<T>(score[2 * i + 1][2], score[2 * i + 1][3]);
#pragma unroll
        for (int j = 0; j < DIM / 16; j++) {
            uint32_t b[4];
            load_matrices_transposed(b, values + (i * 16 * (DIM + PAD) + j * 16) * 2);
            mma_16816<T>(output[2 * j], a0, a1, a2, a3, b[0], b[1]);
            mma_16816<T>(output[2 * j + 1], a0, a1, a2, a3, b[2], b[3]);
        }
    }
}

/* Divides by the sums and writes; rows that saw no key are zeros. */
template <typename T, int DIM>
__device__ static inline void store_output(const struct attend &a, const struct task &t, const float (*output)[4],
                                           const float *sum)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int query = t.query + warp * ROWS + r * 8 + lane / 4;
        float total = sum[r] + __shfl_xor_sync(~0u, sum[r], 1);
        total += __shfl_xor_sync(~0u, total, 2);
        const float factor = total > 0 ? 1 / total : 0;
        if (query >= t.n_rows) continue;
        T *to = (T *)a.out + (t.row + query) * a.out_stride + t.head * a.head_dim + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < DIM / 8; j++)
            if (j * 8 < a.head_dim)
                *(uint32_t *)(to + j * 8) = pack2<T>(output[j][2 * r] * factor, output[j][2 * r + 1] * factor);
    }
}

/* ---- the kernel ---- */

template <typename T, int DIM>
__global__ void __launch_bounds__(WARPS * 32, DIM > 64 ? 2 : 3)
    attention_kernel(const __grid_constant__ struct attend a)
{
    __shared__ __align__(16) T keys[KEYS * (DIM + PAD)], values[KEYS * (DIM + PAD)];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t my_keys = shared_address(keys + warp * ROWS * (DIM + PAD));
    const uint32_t my_values = shared_address(values + warp * ROWS * (DIM + PAD));
    uint32_t q[DIM / 16][4];
    float score[KEYS / 8][4], output[DIM / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    struct task t;
    let_successor_start();
    wait_for_predecessor();
    if (!find_task(a, &t)) return;
    const int64_t column = a.is_prompt ? 0 : t.kv_head * a.head_dim;
    const T *k = (const T *)a.k + column, *v = (const T *)a.v + column;
    const int first = t.first + t.query + warp * ROWS + 1; /* keys that the warp's first query sees, in a prompt */
    load_queries<T, DIM>(a, t, q);
    int64_t row = find_row(a, t, warp * ROWS), next_row;
    if (t.n_keys > 0) copy_rows<T, DIM>(my_keys, k + row * a.k_stride, a.k_stride, t.n_keys - warp * ROWS, a.head_dim);
    copies_begin();
    for (int at = 0; at < t.n_keys; at += KEYS, row = next_row) {
        const int next = at + KEYS;
        next_row = find_row(a, t, next + warp * ROWS);
        copies_end();
        __syncthreads(); /* the keys are here, and the last tile's values are done with */
        copy_rows<T, DIM>(my_values, v + row * a.v_stride, a.v_stride, t.n_keys - at - warp * ROWS, a.head_dim);
        copies_begin();
        score_tile<T, DIM>(score, q, shared_address(keys));
        copies_end();
        __syncthreads(); /* the values are here, and the keys are done with */
        if (next < t.n_keys)
            copy_rows<T, DIM>(my_keys, k + next_row * a.k_stride, a.k_stride, t.n_keys - next - warp * ROWS,
                              a.head_dim);
        copies_begin();
        const int seen = (a.is_prompt ? min(first + lane / 4, t.n_keys) : t.n_keys) - at;
        const int seen_below = (a.is_prompt ? min(first + 8 + lane / 4, t.n_keys) : t.n_keys) - at;
        if ((a.is_prompt ? min(first, t.n_keys) : t.n_keys) < next) mask_tile(score, seen, seen_below);
        soften_tile<DIM>(score, output, maximum, sum, a.scale);
        add_values<T, DIM>(output, score, shared_address(values));
    }
    store_output<T, DIM>(a, t, output, sum);
}

static int launch(struct ops *o, const struct attend *a, int n_heads, int n_sequences)
{
    const dim3 grid((unsigned)n_heads, (unsigned)n_sequences, (unsigned)a->n_tiles), block(WARPS * 32);
    WITH_TYPE(o->dtype, T, {
        if (a->head_dim <= 32) return cuda__launch(o, "attention", attention_kernel<T, 32>, grid, block, 0, *a);
        if (a->head_dim <= 64) return cuda__launch(o, "attention", attention_kernel<T, 64>, grid, block, 0, *a);
        if (a->head_dim <= 80) return cuda__launch(o, "attention", attention_kernel<T, 80>, grid, block, 0, *a);
        if (a->head_dim <= 96) return cuda__launch(o, "attention", attention_kernel<T, 96>, grid, block, 0, *a);
        return cuda__launch(o, "attention", attention_kernel<T, 128>, grid, block, 0, *a);
    });
}

/* Rows are read and written 16 bytes at a time. */
static int check_rows(const char *op, const char *name, struct tensor t)
{
    if ((uintptr_t)t.data % 16 || t.stride[0] % 8)
        FAIL(ERR_UNSUPPORTED, "%s: %s begins at %p with row stride %lld, expected multiples of 16 bytes", op, name,
             t.data, (long long)t.stride[0]);
    return OK;
}

static int check_head_dim(const char *op, int head_dim)
{
    if (head_dim % 8 || head_dim > 128)
        FAIL(ERR_UNSUPPORTED, "%s: head_dim is %d, the CUDA backend has multiples of 8 up to 128", op, head_dim);
    return OK;
}

int cuda__attention_vision(struct ops *o, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                           int n_images, float scale)
{
    if (n_images <= 0 || q.dim[0] == 0) return OK;
    const int n_rows = (int)(q.dim[0] / n_images);
    const struct attend a = {.q = q.data,
                             .k = k.data,
                             .v = v.data,
                             .out = out.data,
                             .q_stride = q.stride[0],
                             .k_stride = k.stride[0],
                             .v_stride = v.stride[0],
                             .out_stride = out.stride[0],
                             .n_rows = n_rows,
                             .n_tiles = (n_rows + QUERIES - 1) / QUERIES,
                             .group = 1,
                             .head_dim = (int)q.dim[2],
                             .scale = scale * 1.44269504f};
    TRY(check_head_dim("attention_vision", a.head_dim));
    TRY(check_rows("attention_vision", "q", q));
    TRY(check_rows("attention_vision", "k", k));
    TRY(check_rows("attention_vision", "v", v));
    TRY(check_rows("attention_vision", "out", out));
    return launch(o, &a, (int)q.dim[1], n_images);
}

int cuda__attention_prefill(struct ops *o, struct tensor out, struct tensor q, struct tensor k, struct tensor v,
                            const struct seq_batch *batch, const struct kv_view *kv,
                            const struct attention_heads *heads)
{
    (void)k, (void)v; /* the append has put them into the pages */
    int n_rows = 0;
    for (int i = 0; i < batch->n_seqs; i++) {
        const int n = batch->host_cu_seqlens[i + 1] - batch->host_cu_seqlens[i];
        n_rows = n > n_rows ? n : n_rows;
    }
    if (n_rows == 0) return OK;
    if (kv->page_size % 16)
        FAIL(ERR_UNSUPPORTED, "attention_prefill: page_size is %d, the CUDA backend has multiples of 16",
             kv->page_size);
    TRY(check_head_dim("attention_prefill", heads->head_dim));
    TRY(check_rows("attention_prefill", "q", q));
    TRY(check_rows("attention_prefill", "out", out));
    if (cuda__attention_hopper_fits(cuda__of(o), kv, heads)) return cuda__attention_hopper(o, out, q, batch, kv, heads);
    const size_t page_keys = (size_t)kv->page_size * (size_t)kv->head_dim * dtype_size(o->dtype);
    const struct attend a = {.q = q.data,
                             .k = kv->pool.data,
                             .v = (const char *)kv->pool.data + page_keys,
                             .out = out.data,
                             .q_stride = q.stride[0],
                             .k_stride = kv->head_dim,
                             .v_stride = kv->head_dim,
                             .out_stride = out.stride[0],
                             .is_prompt = true,
                             .n_tiles = (n_rows + QUERIES - 1) / QUERIES,
                             .group = heads->n_heads / heads->n_kv_heads,
                             .head_dim = heads->head_dim,
                             .scale = heads->scale * 1.44269504f,
                             .slot = batch->slot,
                             .cu_seqlens = batch->cu_seqlens,
                             .kv = *kv,
                             .lane = heads->lane};
    return launch(o, &a, heads->n_heads, batch->n_seqs);
}
