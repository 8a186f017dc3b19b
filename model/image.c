/* image - limits, the choice of decoder, and turning a picture upright. */
#include "model/image.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/tensor.h"
#include "model/image_internal.h"

struct image_limits image_limits_default(void)
{
    return (struct image_limits){
        .max_bytes = (size_t)64 << 20, .max_pixels = (int64_t)64 << 20, .max_side = 32768, .max_aspect = 200};
}

void image_free(struct image *image)
{
    free(image->pixels);
    *image = (struct image){0};
}

int image__check_size(const char *what, const struct image_limits *limits, uint64_t width, uint64_t height)
{
    if (!width || !height)
        FAIL(ERR_FORMAT, "%s: the header says %" PRIu64 " x %" PRIu64 " pixels: an empty picture", what, width, height);
    uint64_t longer = width > height ? width : height, shorter = width > height ? height : width;
    if (longer > (uint64_t)limits->max_side)
        FAIL(ERR_FORMAT, "%s: %" PRIu64 " x %" PRIu64 " pixels, the limit is %d a side: reduce the image", what, width,
             height, limits->max_side);
    if ((int64_t)(width * height) > limits->max_pixels)
        FAIL(ERR_FORMAT, "%s: %" PRIu64 " x %" PRIu64 " pixels, the limit is %" PRId64 " in all: reduce the image",
             what, width, height, limits->max_pixels);
    if ((double)longer > limits->max_aspect * (double)shorter)
        FAIL(ERR_FORMAT,
             "%s: %" PRIu64 " x %" PRIu64 " pixels, one side more than %g times the other: cut the image into pieces",
             what, width, height, limits->max_aspect);
    return OK;
}

static bool starts(const uint8_t *bytes, size_t size, const char *signature, size_t n)
{
    return size >= n && !memcmp(bytes, signature, n);
}

/* The name of a kind that is not served, so that the message says what to convert. */
static const char *other_kind(const uint8_t *bytes, size_t size)
{
    if (starts(bytes, size, "GIF8", 4)) return "a GIF file";
    if (starts(bytes, size, "BM", 2)) return "a BMP file";
    if (starts(bytes, size, "II*\0", 4) || starts(bytes, size, "MM\0*", 4)) return "a TIFF file";
    if (size >= 12 && !memcmp(bytes, "RIFF", 4) && !memcmp(bytes + 8, "WEBP", 4)) return "a WebP file";
    if (size >= 12 && !memcmp(bytes + 4, "ftyp", 4)) return "a HEIF, AVIF or MP4 file";
    if (starts(bytes, size, "%PDF", 4)) return "a PDF file";
    return "something else";
}

int image_decode(const void *bytes, size_t size, const char *what, const struct image_limits *limits, struct image *out)
{
    struct image_limits defaults = image_limits_default();
    struct image image = {0};
    int orientation = 1, rc;
    if (!limits) limits = &defaults;
    if (!size) FAIL(ERR_FORMAT, "%s: an empty file, a PNG or JPEG image was expected", what);
    if (size > limits->max_bytes)
        FAIL(ERR_FORMAT, "%s: %zu bytes, the limit for an image file is %zu", what, size, limits->max_bytes);
    if (starts(bytes, size, "\x89PNG\r\n\x1a\n", 8))
        rc = image__decode_png(bytes, size, what, limits, &image, &orientation);
    else if (starts(bytes, size, "\xff\xd8\xff", 3))
        rc = image__decode_jpeg(bytes, size, what, limits, &image, &orientation);
    else
        FAIL(ERR_UNSUPPORTED, "%s: PNG and JPEG images are served, this is %s", what, other_kind(bytes, size));
    if (!rc) rc = image__orient(&image, orientation, what);
    if (rc) {
        image_free(&image);
        return rc;
    }
    *out = image;
    return OK;
}

/* Orientation k says which edges of the scene the first row and the first column of the file show. */
int image__orient(struct image *image, int orientation, const char *what)
{
    /* mirrored in x, mirrored in y, then rows and columns exchanged */
    static const struct {
        bool flip_x, flip_y, transpose;
    } turns[9] = {
        [2] = {true, false, false}, [3] = {true, true, false}, [4] = {false, true, false}, [5] = {false, false, true},
        [6] = {false, true, true},  [7] = {true, true, true},  [8] = {true, false, true},
    };
    if (orientation < 2 || orientation > 8) return OK;
    bool transpose = turns[orientation].transpose;
    ptrdiff_t width = image->width, height = image->height;
    size_t bytes;
    if (size_mul((size_t)(width * height), 3, &bytes)) FAIL(ERR_FORMAT, "%s: too many pixels", what);
    uint8_t *pixels = malloc(bytes);
    if (!pixels) FAIL(ERR_NOMEM, "%s: no memory for %zu bytes of pixels", what, bytes);

    ptrdiff_t step_x = turns[orientation].flip_x ? -3 : 3, step_y = (turns[orientation].flip_y ? -3 : 3) * width;
    const uint8_t *row = image->pixels + (turns[orientation].flip_x ? (width - 1) * 3 : 0) +
                         (turns[orientation].flip_y ? (height - 1) * width * 3 : 0);
    ptrdiff_t along = transpose ? step_y : step_x, across = transpose ? step_x : step_y;
    ptrdiff_t out_width = transpose ? height : width, out_height = transpose ? width : height;
    uint8_t *to = pixels;
    for (ptrdiff_t y = 0; y < out_height; y++) {
        for (ptrdiff_t x = 0; x < out_width; x++, to += 3) memcpy(to, row + y * across + x * along, 3);
    }
    free(image->pixels);
    *image = (struct image){.width = (int)out_width, .height = (int)out_height, .pixels = pixels};
    return OK;
}
