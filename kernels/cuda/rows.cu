/* Moving rows: embedding, gather and scatter, columns of shards, image patches, the inputs of a decode step; random
 * weights. A block a row, 16 bytes a thread where the row allows it. */
#include "kernels/cuda/device.cuh"

enum { ROW_THREADS = 128 };

/* Copies or zeroes `bytes` with the whole block; from NULL: zeros. */
__device__ static void move_row(char *to, const char *from, int64_t bytes)
{
    const uint64_t mask = (uint64_t)to | (uint64_t)from | (uint64_t)bytes;
    if (mask % 16 == 0) {
        for (int64_t i = threadIdx.x; i < bytes / 16; i += blockDim.x)
            ((uint4 *)to)[i] = from ? ((const uint4 *)from)[i] : make_uint4(0, 0, 0, 0);
    } else if (mask % 2 == 0) {
        for (int64_t i = threadIdx.x; i < bytes / 2; i += blockDim.x)
            ((uint16_t *)to)[i] = from ? ((const uint16_t *)from)[i] : (uint16_t)0;
    } else {
        for (int64_t i = threadIdx.x; i < bytes; i += blockDim.x) to[i] = from ? from[i] : (char)0;
    }
}

/* y[to] = x[from]: a row index on either side, none or both; rows past the end are left out. */
__global__ static void move_rows(char *y, int64_t y_stride, int64_t y_rows, const int32_t *y_index, const char *x,
                                 int64_t x_stride, int64_t x_rows, const int32_t *x_index, int first_row,
                                 int64_t row_bytes, bool zero_missing)
{
    let_successor_start();
    wait_for_predecessor();
    int64_t to = y_index ? y_index[blockIdx.x] : (int64_t)blockIdx.x;
    int64_t from = (x_index ? x_index[blockIdx.x] : (int64_t)blockIdx.x) - first_row;
    bool missing = from < 0 || from >= x_rows;
    if (to < 0 || to >= y_rows || (missing && !zero_missing)) return;
    move_row(y + to * y_stride, missing ? NULL : x + from * x_stride, row_bytes);
}

static int64_t stride_bytes(struct tensor t) { return t.stride[0] * (int64_t)dtype_size(t.dtype); }

int cuda__embed(struct ops *o, struct tensor y, struct tensor table, const int32_t *ids, int first_row)
{
    if (table.dtype != y.dtype)
        FAIL(ERR_UNSUPPORTED, "cuda: embeddings are %s, activations %s: expected the same", dtype_name(table.dtype),
             dtype_name(y.dtype));
    return cuda__launch(o, "embed", move_rows, dim3((unsigned)y.dim[0]), dim3(ROW_THREADS), 0, (char *)y.data,
                        stride_bytes(y), y.dim[0], (const int32_t *)NULL, (const char *)table.data, stride_bytes(table),
                        table.dim[0], ids, first_row, y.dim[1] * (int64_t)dtype_size(y.dtype), true);
}

int cuda__gather_rows(struct ops *o, struct tensor y, struct tensor x, const int32_t *index)
{
    return cuda__launch(o, "gather_rows", move_rows, dim3((unsigned)y.dim[0]), dim3(ROW_THREADS), 0, (char *)y.data,
                        stride_bytes(y), y.dim[0], (const int32_t *)NULL, (const char *)x.data, stride_bytes(x),
                        x.dim[0], index, 0, y.dim[1] * (int64_t)dtype_size(y.dtype), false);
}

int cuda__scatter_rows(struct ops *o, struct tensor y, const int32_t *index, struct tensor x)
{
    return cuda__launch(o, "scatter_rows", move_rows, dim3((unsigned)x.dim[0]), dim3(ROW_THREADS), 0, (char *)y.data,
                        stride_bytes(y), y.dim[0], index, (const char *)x.data, stride_bytes(x), x.dim[0],
                        (const int32_t *)NULL, 0, y.dim[1] * (int64_t)dtype_size(y.dtype), false);
}

__global__ static void decode_inputs_kernel(int32_t *ids, int32_t *position, const int32_t *slot, int n,
                                            const int32_t *next_token, const int32_t *state_position, int n_slots)
{
    let_successor_start();
    wait_for_predecessor();
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    int s = slot[i];
    bool used = s >= 0 && s < n_slots;
    ids[i] = used ? next_token[s] : 0;
    position[i] = used ? state_position[s] : 0;
}

int cuda__decode_inputs(struct ops *o, int32_t *ids, int32_t *position, const int32_t *slot, int n,
                        const struct sampling_state *state)
{
    return cuda__launch(o, "decode_inputs", decode_inputs_kernel, dim3((unsigned)(n + 127) / 128), dim3(128), 0, ids,
                        position, slot, n, (const int32_t *)state->next_token, (const int32_t *)state->position,
                        state->n_slots);
}

/* The ranks' counts travel as a launch argument. */
enum { MOST_RANKS = 64 };
struct shard_columns {
    int n;
    int32_t first[MOST_RANKS + 1];
};

__global__ static void unshard_kernel(char *y, int64_t y_stride, const char *shards, int64_t rank_stride,
                                      int64_t row_stride, struct shard_columns columns, int element)
{
    let_successor_start();
    wait_for_predecessor();
    const int r = (int)blockIdx.y;
    const int64_t row = blockIdx.x;
    move_row(y + row * y_stride + (int64_t)columns.first[r] * element, shards + r * rank_stride + row * row_stride,
             (int64_t)(columns.first[r + 1] - columns.first[r]) * element);
}

int cuda__unshard_columns(struct ops *o, struct tensor y, struct tensor shards, const int32_t *host_count)
{
    struct shard_columns columns = {};
    const int64_t element = (int64_t)dtype_size(y.dtype);
    columns.n = (int)shards.dim[0];
    if (columns.n > MOST_RANKS)
        FAIL(ERR_UNSUPPORTED, "ops_unshard_columns: %d ranks, the GPU serves at most %d", columns.n, (int)MOST_RANKS);
    for (int r = 0; r < columns.n; r++) columns.first[r + 1] = columns.first[r] + host_count[r];
    return cuda__launch(o, "unshard_columns", unshard_kernel, dim3((unsigned)y.dim[0], (unsigned)columns.n), dim3(512),
                        0, (char *)y.data, y.stride[0] * element, (const char *)shards.data, shards.stride[0] * element,
                        shards.stride[1] * element, columns, (int)element);
}

struct pixel_scale {
    float scale[3], shift[3];
};

template <typename T>
__global__ static void image_patches_kernel(T *y, int64_t y_stride, const uint8_t *pixels, int image_size,
                                            int patch_size, struct pixel_scale p)
{
    let_successor_start();
    wait_for_predecessor();
    const int side = image_size / patch_size, per_image = side * side, area = patch_size * patch_size;
    const int64_t row = blockIdx.x, image = row / per_image;
    const int patch_y = (int)(row % per_image) / side, patch_x = (int)(row % side);
    const uint8_t *from =
        pixels + ((image * image_size + patch_y * patch_size) * image_size + patch_x * patch_size) * 3;
    for (int i = (int)threadIdx.x; i < 3 * area; i += (int)blockDim.x) {
        int c = i / area, r = i % area / patch_size, col = i % patch_size;
        float x = (float)from[((int64_t)r * image_size + col) * 3 + c];
        y[row * y_stride + i] = from_float<T>(x * p.scale[c] + p.shift[c]);
    }
}

int cuda__image_patches(struct ops *o, struct tensor y, const uint8_t *pixels, int n_images, int image_size,
                        int patch_size, const float *scale, const float *shift)
{
    struct pixel_scale p;
    const int side = image_size / patch_size;
    for (int i = 0; i < 3; i++) p.scale[i] = scale[i], p.shift[i] = shift[i];
    WITH_TYPE(y.dtype, T,
              return cuda__launch(o, "image_patches", image_patches_kernel<T>,
                                  dim3((unsigned)n_images * (unsigned)(side * side)), dim3(192), 0, (T *)y.data,
                                  y.stride[0], pixels, image_size, patch_size, p));
}

/* ---- random weights: the same numbers as kernels/cpu/fill.c ---- */

template <typename T>
__global__ static void fill_normal_kernel(T *w, int64_t stride, int64_t rows, int64_t cols, uint64_t key, float std,
                                          int64_t first_row, int64_t first_column, int64_t whole_columns)
{
    wait_for_predecessor();
    for (int64_t r = blockIdx.x; r < rows; r += gridDim.x)
        for (int64_t c = threadIdx.x; c < cols; c += blockDim.x) {
            uint64_t place = (uint64_t)((first_row + r) * whole_columns + first_column + c);
            uint64_t bits = splitmix(key ^ splitmix(place));
            int sum =
                (int)(bits & 0xffff) + (int)(bits >> 16 & 0xffff) + (int)(bits >> 32 & 0xffff) + (int)(bits >> 48);
            w[r * stride + c] = from_float<T>(std * ((float)(sum - 131070) * (1.0f / 37837.227f)));
        }
}

int cuda__fill_normal(struct ops *o, struct tensor w, uint64_t key, float std, int64_t first_row, int64_t first_column,
                      int64_t whole_columns)
{
    const dim3 grid((unsigned)(w.dim[0] < 65536 ? w.dim[0] : 65536));
    if (w.dtype == DTYPE_F32)
        return cuda__launch(o, "fill_normal", fill_normal_kernel<float>, grid, dim3(256), 0, (float *)w.data,
                            w.stride[0], w.dim[0], w.dim[1], key, std, first_row, first_column, whole_columns);
    WITH_TYPE(w.dtype, T,
              return cuda__launch(o, "fill_normal", fill_normal_kernel<T>, grid, dim3(256), 0, (T *)w.data, w.stride[0],
                                  w.dim[0], w.dim[1], key, std, first_row, first_column, whole_columns));
}
