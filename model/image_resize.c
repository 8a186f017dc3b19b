/* image_resize - separable resampling with antialiasing, equal to Pillow's to the last bit.
 *
 * Why the bits matter: a test against the reference processors is only as sharp as the agreement. So: weights are
 * computed in double, normalised, rounded to 22 fractional bits; columns are resized first, rows second; between the
 * passes pixels are rounded and clipped to uint8; a pass that keeps the size is left out. The order is that of
 * torchvision (never more than 2/255 away) and of Pillow up to 12; Pillow 13 swaps it where the height shrinks by
 * more than twice what the width does. Only the wanted region is computed, which changes no pixel of it. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/tensor.h"
#include "model/image_internal.h"

enum { WEIGHT_BITS = 22 };

/* One dimension: output i is the weighted sum of inputs first[i] .. first[i] + n[i]. */
struct taps {
    size_t pitch;     /* weights reserved for each output */
    int32_t *first;   /* [outputs]; owns the memory of all three */
    const int32_t *n; /* [outputs] */
    int32_t *weights; /* [outputs, pitch]; NULL: the size stays, there is nothing to sum */
};

static double box(double x) { return x > -0.5 && x <= 0.5 ? 1 : 0; }

static double bilinear(double x)
{
    x = fabs(x);
    return x < 1 ? 1 - x : 0;
}

/* Hann-like window of half-width 1 on a sinc: 0.54 + 0.46 cos. */
static double hamming(double x)
{
    x = fabs(x);
    if (x == 0) return 1;
    if (x >= 1) return 0;
    x *= M_PI;
    return sin(x) / x * (0.54 + 0.46 * cos(x));
}

/* Keys' cubic convolution with a = -1/2. */
static double bicubic(double x)
{
    const double a = -0.5;
    x = fabs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

static double sinc(double x)
{
    if (x == 0) return 1;
    x *= M_PI;
    return sin(x) / x;
}

static double lanczos(double x) { return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0; }

static const struct filter {
    double (*weight)(double x);
    double support; /* half-width, in pixels of the coarser of input and output */
} filters[IMAGE_RESAMPLE_N] = {
    [IMAGE_LANCZOS] = {lanczos, 3}, [IMAGE_BILINEAR] = {bilinear, 1}, [IMAGE_BICUBIC] = {bicubic, 2},
    [IMAGE_BOX] = {box, 0.5},       [IMAGE_HAMMING] = {hamming, 1},
};

static void taps_free(struct taps *taps)
{
    free(taps->first);
    *taps = (struct taps){0};
}

/* n weights of one output whose centre is at `center` of the input, in units of 2^-22. */
static void make_weights(const struct filter *filter, double center, double widen, int first, int n, double *exact,
                         int32_t *weights)
{
    double sum = 0;
    for (int k = 0; k < n; k++) {
        exact[k] = filter->weight((k + first - center + 0.5) * (1 / widen));
        sum += exact[k];
    }
    for (int k = 0; k < n; k++) {
        double weight = (sum != 0 ? exact[k] / sum : exact[k]) * (1 << WEIGHT_BITS);
        weights[k] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
}

/* Taps of outputs begin .. begin + n_out of a dimension resized from `from` to `to` pixels. */
static int taps_make(struct taps *taps, const struct filter *filter, int from, int to, int begin, int n_out)
{
    double scale = (double)from / to, widen = scale > 1 ? scale : 1, support = filter->support * widen;
    size_t pitch = (size_t)ceil(support) * 2 + 1, bytes;
    if (size_mul((size_t)n_out * sizeof(int32_t), pitch + 2, &bytes))
        FAIL(ERR_NOMEM, "image resize: %d x %zu weights are too many", n_out, pitch);
    double *exact = malloc(pitch * sizeof *exact);
    int32_t *first = malloc(bytes), *n = first + n_out;
    if (!exact || !first) {
        free(exact);
        free(first);
        FAIL(ERR_NOMEM, "image resize: no memory for %zu bytes of weights", bytes);
    }
    *taps = (struct taps){.pitch = pitch, .first = first, .n = n, .weights = n + n_out};
    for (int i = 0; i < n_out; i++) {
        double center = (begin + i + 0.5) * scale;
        int low = (int)(center - support + 0.5), high = (int)(center + support + 0.5);
        first[i] = low > 0 ? low : 0;
        n[i] = (high < from ? high : from) - first[i];
        make_weights(filter, center, widen, first[i], n[i], exact, taps->weights + (size_t)i * pitch);
    }
    free(exact);
    return OK;
}

static inline uint8_t clip(int32_t sum)
{
    sum >>= WEIGHT_BITS;
    return (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

static bool is_fill_row(const struct image__canvas *canvas, int y)
{
    return y < canvas->top || y >= canvas->top + canvas->image->height;
}

/* Row y of the canvas, [width, 3]: the picture's own memory, or put together in `scratch`. */
static const uint8_t *canvas_row(const struct image__canvas *canvas, int y, uint8_t *scratch)
{
    const struct image *image = canvas->image;
    bool fill = is_fill_row(canvas, y);
    const uint8_t *row = fill ? NULL : image->pixels + (size_t)(y - canvas->top) * (size_t)image->width * 3;
    if (row && image->width == canvas->width) return row;
    for (int x = 0; x < canvas->width; x++) memcpy(scratch + (size_t)x * 3, canvas->fill, 3);
    if (row) memcpy(scratch + (size_t)canvas->left * 3, row, (size_t)image->width * 3);
    return scratch;
}

/* One row of the first pass: columns x .. x + n of the resized row. Without taps the width stays. */
static void resize_row(const uint8_t *row, const struct taps *taps, int x, int n, uint8_t *out)
{
    if (!taps->weights) {
        memcpy(out, row + (size_t)x * 3, (size_t)n * 3);
        return;
    }
    for (int i = 0; i < n; i++, out += 3) {
        const uint8_t *from = row + (size_t)taps->first[i] * 3;
        const int32_t *weights = taps->weights + (size_t)i * taps->pitch;
        int32_t red = 1 << (WEIGHT_BITS - 1), green = red, blue = red;
        for (int k = 0; k < taps->n[i]; k++, from += 3) {
            red += from[0] * weights[k];
            green += from[1] * weights[k];
            blue += from[2] * weights[k];
        }
        out[0] = clip(red);
        out[1] = clip(green);
        out[2] = clip(blue);
    }
}

/* First pass, rows first_row .. first_row + n_rows of the canvas into rows `stride` apart. */
static void resize_columns(const struct image__canvas *canvas, const struct taps *taps,
                           const struct image__region *region, int first_row, int n_rows, uint8_t *out, size_t stride,
                           uint8_t *scratch)
{
    size_t bytes = (size_t)region->width * 3;
    for (int y = 0; y < n_rows; y++, out += stride) {
        int row = first_row + y;
        if (y && is_fill_row(canvas, row) && is_fill_row(canvas, row - 1))
            memcpy(out, out - stride, bytes);
        else
            resize_row(canvas_row(canvas, row, scratch), taps, region->x, region->width, out);
    }
}

/* Second pass: rows of the region from the first pass's rows, which begin at first_row of the canvas. */
static void resize_rows(const uint8_t *rows, int first_row, const struct taps *taps, const struct image__region *region,
                        int32_t *sums)
{
    size_t n = (size_t)region->width * 3;
    for (int y = 0; y < region->height; y++) {
        const uint8_t *row = rows + (size_t)(taps->first[y] - first_row) * n;
        const int32_t *weights = taps->weights + (size_t)y * taps->pitch;
        uint8_t *out = region->out + (size_t)y * region->stride;
        for (size_t i = 0; i < n; i++) sums[i] = 1 << (WEIGHT_BITS - 1);
        for (int k = 0; k < taps->n[y]; k++, row += n) {
            int32_t weight = weights[k];
            for (size_t i = 0; i < n; i++) sums[i] += row[i] * weight;
        }
        for (size_t i = 0; i < n; i++) out[i] = clip(sums[i]);
    }
}

/* Both passes; either taps may be empty. */
static int resize_passes(const struct image__canvas *canvas, const struct taps *columns, const struct taps *rows,
                         const struct image__region *region)
{
    size_t row_bytes = (size_t)region->width * 3, scratch_bytes = (size_t)canvas->width * 3, bytes = 0;
    int first = 0, n_rows = 0;
    if (rows->weights) {
        int last = region->height - 1;
        first = rows->first[0];
        n_rows = rows->first[last] + rows->n[last] - first;
        if (size_mul(row_bytes, (size_t)n_rows, &bytes)) FAIL(ERR_NOMEM, "image resize: %d rows are too many", n_rows);
    }
    uint8_t *scratch = malloc(scratch_bytes), *between = malloc(bytes + 1);
    int32_t *sums = malloc(row_bytes * sizeof *sums);
    int rc = OK;
    if (!scratch || !between || !sums) {
        rc = status_set(ERR_NOMEM, __FILE__, __LINE__, "image resize: no memory for %zu bytes", bytes);
    } else if (rows->weights) {
        resize_columns(canvas, columns, region, first, n_rows, between, row_bytes, scratch);
        resize_rows(between, first, rows, region, sums);
    } else {
        resize_columns(canvas, columns, region, region->y, region->height, region->out, region->stride, scratch);
    }
    free(scratch);
    free(between);
    free(sums);
    return rc;
}

/* The reference adds up the step instead of multiplying it, and so do we: the sums differ in the last bit. */
static void nearest_indices(int from, int to, int begin, int n, int *out)
{
    double step = (double)from / to, at = step * 0.5;
    for (int i = 0; i < begin + n; i++, at += step) {
        if (i >= begin) out[i - begin] = at < from ? (int)at : from - 1;
    }
}

static int resize_nearest(const struct image__canvas *canvas, int width, int height, const struct image__region *region)
{
    int *columns = calloc((size_t)region->width, sizeof *columns);
    int *rows = calloc((size_t)region->height, sizeof *rows);
    uint8_t *scratch = malloc((size_t)canvas->width * 3);
    int rc = OK;
    if (columns && rows && scratch) {
        nearest_indices(canvas->width, width, region->x, region->width, columns);
        nearest_indices(canvas->height, height, region->y, region->height, rows);
        for (int y = 0; y < region->height; y++) {
            const uint8_t *row = canvas_row(canvas, rows[y], scratch);
            uint8_t *out = region->out + (size_t)y * region->stride;
            for (int x = 0; x < region->width; x++, out += 3) memcpy(out, row + (size_t)columns[x] * 3, 3);
        }
    } else {
        rc = status_set(ERR_NOMEM, __FILE__, __LINE__, "image resize: no memory for a row of %d pixels", canvas->width);
    }
    free(columns);
    free(rows);
    free(scratch);
    return rc;
}

int image__resize(const struct image__canvas *canvas, enum image_resample resample, int width, int height,
                  const struct image__region *region)
{
    struct taps columns = {0}, rows = {0};
    int rc = OK;
    if (region->width < 1 || region->height < 1) return OK;
    if (resample == IMAGE_NEAREST) return resize_nearest(canvas, width, height, region);
    const struct filter *filter = &filters[resample];
    if (width != canvas->width)
        TRY_GOTO(taps_make(&columns, filter, canvas->width, width, region->x, region->width), rc, out);
    if (height != canvas->height)
        TRY_GOTO(taps_make(&rows, filter, canvas->height, height, region->y, region->height), rc, out);
    rc = resize_passes(canvas, &columns, &rows, region);
out:
    taps_free(&columns);
    taps_free(&rows);
    return rc;
}
