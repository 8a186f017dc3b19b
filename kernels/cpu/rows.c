/* Moving rows: embedding, gather and scatter, columns of shards, image patches, the inputs of a decode step; random
 * weights. */
#include <string.h>

#include "kernels/cpu/cpu.h"

int cpu__embed(struct ops *o, struct tensor y, struct tensor table, const int32_t *ids, int first_row)
{
    const int64_t n = y.dim[1];
    const size_t row_bytes = (size_t)table.stride[0] * dtype_size(table.dtype);
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) if (y.dim[0] * n > CPU_PARALLEL_WORK)
    for (int64_t i = 0; i < y.dim[0]; i++) {
        int64_t row = (int64_t)ids[i] - first_row;
        if (row >= 0 && row < table.dim[0])
            cpu__of(o)->vector->widen(cpu__row(y, i), (const char *)table.data + (size_t)row * row_bytes, table.dtype,
                                      n);
        else
            memset(cpu__row(y, i), 0, (size_t)n * sizeof(float));
    }
    return OK;
}

static int check_index(const char *op, const int32_t *index, int64_t n, int64_t least, int64_t rows)
{
    for (int64_t i = 0; i < n; i++)
        if (index[i] < least || index[i] >= rows)
            FAIL(ERR_ARG, "%s: index[%lld] is %d, expected %lld .. %lld", op, (long long)i, index[i], (long long)least,
                 (long long)rows - 1);
    return OK;
}

static char *row_at(struct tensor t, int64_t i)
{
    return (char *)t.data + (size_t)(i * t.stride[0]) * dtype_size(t.dtype);
}

int cpu__gather_rows(struct ops *o, struct tensor y, struct tensor x, const int32_t *index)
{
    const size_t bytes = (size_t)y.dim[1] * dtype_size(y.dtype);
    TRY(check_index("ops_gather_rows", index, y.dim[0], 0, x.dim[0]));
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) if (y.dim[0] * y.dim[1] > CPU_PARALLEL_WORK)
    for (int64_t i = 0; i < y.dim[0]; i++) memcpy(row_at(y, i), row_at(x, index[i]), bytes);
    return OK;
}

int cpu__scatter_rows(struct ops *o, struct tensor y, const int32_t *index, struct tensor x)
{
    const size_t bytes = (size_t)x.dim[1] * dtype_size(x.dtype);
    TRY(check_index("ops_scatter_rows", index, x.dim[0], INT32_MIN, y.dim[0]));
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) if (x.dim[0] * x.dim[1] > CPU_PARALLEL_WORK)
    for (int64_t i = 0; i < x.dim[0]; i++)
        if (index[i] >= 0) memcpy(row_at(y, index[i]), row_at(x, i), bytes);
    return OK;
}

int cpu__decode_inputs(struct ops *o, int32_t *ids, int32_t *position, const int32_t *slot, int n,
                       const struct sampling_state *state)
{
    (void)o;
    for (int i = 0; i < n; i++) {
        bool used = slot[i] >= 0 && slot[i] < state->n_slots;
        ids[i] = used ? state->next_token[slot[i]] : 0;
        position[i] = used ? state->position[slot[i]] : 0;
    }
    return OK;
}

int cpu__unshard_columns(struct ops *o, struct tensor y, struct tensor shards, const int32_t *host_count)
{
    const size_t size = dtype_size(y.dtype);
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) if (y.dim[0] * y.dim[1] > CPU_PARALLEL_WORK)
    for (int64_t i = 0; i < y.dim[0]; i++) {
        char *to = row_at(y, i);
        for (int64_t r = 0; r < shards.dim[0]; r++) {
            size_t bytes = (size_t)host_count[r] * size;
            memcpy(to, (char *)shards.data + (size_t)(r * shards.stride[0] + i * shards.stride[1]) * size, bytes);
            to += bytes;
        }
    }
    return OK;
}

int cpu__image_patches(struct ops *o, struct tensor y, const uint8_t *pixels, int n_images, int image_size,
                       int patch_size, const float *scale, const float *shift)
{
    const int64_t side = image_size / patch_size, per_image = side * side;
#pragma omp parallel for num_threads(cpu__of(o)->n_threads)
    for (int64_t row = 0; row < n_images * per_image; row++) {
        float *to = cpu__row(y, row);
        int64_t image = row / per_image, patch_y = row % per_image / side, patch_x = row % side;
        const uint8_t *from =
            pixels + ((image * image_size + patch_y * patch_size) * image_size + patch_x * patch_size) * 3;
        for (int c = 0; c < 3; c++)
            for (int r = 0; r < patch_size; r++)
                for (int col = 0; col < patch_size; col++)
                    *to++ = (float)from[((int64_t)r * image_size + col) * 3 + c] * scale[c] + shift[c];
    }
    return OK;
}
