/* image_png - PNG of every colour type and depth to RGB, through libpng.
 *
 * libpng reports errors by a callback that must not return, so this file holds a setjmp: everything that has to be
 * freed lives in struct reader, in a frame that the jump leaves intact. */
#include <png.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

#include "base/tensor.h"
#include "model/image_internal.h"

/* Of the chunks that remain (palette, transparency, EXIF) none has a reason to be larger. */
enum { MAX_CHUNK_BYTES = 1 << 20 };

struct reader {
    const uint8_t *bytes;
    size_t size, at;
    const char *what;
    const struct image_limits *limits;
    png_structp png;
    png_infop info;
    uint8_t *pixels; /* [height, width, 3 or 4] */
    png_bytep *rows;
    uint32_t width, height;
    int orientation;
    int rc;
    jmp_buf jump;
};

static void on_error(png_structp png, png_const_charp text)
{
    struct reader *reader = png_get_error_ptr(png);
    if (!reader->rc) reader->rc = status_set(ERR_FORMAT, __FILE__, __LINE__, "%s: bad PNG: %s", reader->what, text);
    longjmp(reader->jump, 1);
}

/* What libpng only warns of never leaves pixels out. */
static void on_warning(png_structp png, png_const_charp text)
{
    (void)png;
    (void)text;
}

static void on_read(png_structp png, png_bytep to, size_t n)
{
    struct reader *reader = png_get_io_ptr(png);
    if (n > reader->size - reader->at) {
        reader->rc = status_set(ERR_FORMAT, __FILE__, __LINE__, "%s: bad PNG: the file is cut off after %zu bytes",
                                reader->what, reader->size);
        png_error(png, "cut off");
    }
    memcpy(to, reader->bytes + reader->at, n);
    reader->at += n;
}

static void stop(struct reader *reader, int rc)
{
    reader->rc = rc;
    longjmp(reader->jump, 1);
}

static void ignore_metadata(png_structp png)
{
    static const png_byte chunks[] = "bKGD\0cHRM\0gAMA\0hIST\0iCCP\0iTXt\0oFFs\0pCAL\0pHYs\0sBIT\0"
                                     "sCAL\0sPLT\0sRGB\0sTER\0tEXt\0tIME\0zTXt";
    png_set_keep_unknown_chunks(png, PNG_HANDLE_CHUNK_NEVER, NULL, 0);
    png_set_keep_unknown_chunks(png, PNG_HANDLE_CHUNK_NEVER, chunks, (int)(sizeof chunks / 5));
}

/* Everything to 8-bit RGB or RGBA. */
static void set_transforms(png_structp png, png_infop info)
{
    int color = png_get_color_type(png, info), depth = png_get_bit_depth(png, info);
    if (color == PNG_COLOR_TYPE_PALETTE) png_set_palette_to_rgb(png);
    if (color == PNG_COLOR_TYPE_GRAY && depth < 8) png_set_expand_gray_1_2_4_to_8(png);
    if (png_get_valid(png, info, PNG_INFO_tRNS)) png_set_tRNS_to_alpha(png);
    if (depth == 16) png_set_strip_16(png);
    if (!(color & PNG_COLOR_MASK_COLOR)) png_set_gray_to_rgb(png);
    (void)png_set_interlace_handling(png);
}

static void allocate(struct reader *reader, size_t row_bytes)
{
    size_t bytes;
    if (size_mul(row_bytes, reader->height, &bytes))
        stop(reader, status_set(ERR_FORMAT, __FILE__, __LINE__, "%s: too many pixels", reader->what));
    reader->pixels = malloc(bytes);
    reader->rows = malloc(reader->height * sizeof *reader->rows);
    if (!reader->pixels || !reader->rows)
        stop(reader,
             status_set(ERR_NOMEM, __FILE__, __LINE__, "%s: no memory for %zu bytes of pixels", reader->what, bytes));
    for (uint32_t y = 0; y < reader->height; y++) reader->rows[y] = reader->pixels + y * row_bytes;
}

/* round((c a + 255 (255 - a)) / 255): the picture over white, in place, 4 channels to 3. */
static void composite_on_white(uint8_t *pixels, size_t n)
{
    const uint8_t *from = pixels;
    for (size_t i = 0; i < n; i++, from += 4, pixels += 3) {
        unsigned alpha = from[3], white = 255 * (255 - alpha) + 127;
        for (int c = 0; c < 3; c++) pixels[c] = (uint8_t)((from[c] * alpha + white) / 255);
    }
}

static void read_picture(struct reader *reader)
{
    png_structp png = reader->png;
    png_infop info = reader->info;
    png_set_read_fn(png, reader, on_read);
    png_set_user_limits(png, PNG_UINT_31_MAX, PNG_UINT_31_MAX);
    png_set_chunk_malloc_max(png, MAX_CHUNK_BYTES);
    png_set_crc_action(png, PNG_CRC_ERROR_QUIT, PNG_CRC_ERROR_QUIT);
    ignore_metadata(png);
    png_read_info(png, info);
    reader->width = png_get_image_width(png, info);
    reader->height = png_get_image_height(png, info);
    int rc = image__check_size(reader->what, reader->limits, reader->width, reader->height);
    if (rc) stop(reader, rc);

    set_transforms(png, info);
    png_read_update_info(png, info);
    size_t n_channels = png_get_channels(png, info), row_bytes = png_get_rowbytes(png, info);
    if ((n_channels != 3 && n_channels != 4) || row_bytes != reader->width * n_channels)
        png_error(png, "unexpected row layout");
    allocate(reader, row_bytes);
    png_read_image(png, reader->rows);
    png_read_end(png, info);

    if (n_channels == 4) composite_on_white(reader->pixels, (size_t)reader->width * reader->height);
    png_uint_32 exif_bytes = 0;
    png_bytep exif = NULL;
    if (png_get_eXIf_1(png, info, &exif_bytes, &exif) && exif)
        reader->orientation = image__exif_orientation(exif, exif_bytes);
}

/* The frame that is jumped back to holds nothing but the pointer. */
static void read_guarded(struct reader *reader)
{
    if (setjmp(reader->jump)) return;
    reader->png = png_create_read_struct(PNG_LIBPNG_VER_STRING, reader, on_error, on_warning);
    if (reader->png) reader->info = png_create_info_struct(reader->png);
    if (reader->info)
        read_picture(reader);
    else
        reader->rc = status_set(ERR_NOMEM, __FILE__, __LINE__, "%s: no memory for a PNG reader", reader->what);
}

int image__decode_png(const uint8_t *bytes, size_t size, const char *what, const struct image_limits *limits,
                      struct image *out, int *orientation)
{
    struct reader reader = {.bytes = bytes, .size = size, .what = what, .limits = limits, .orientation = 1};
    read_guarded(&reader);
    if (reader.png) png_destroy_read_struct(&reader.png, &reader.info, NULL);
    free(reader.rows);
    if (reader.rc) {
        free(reader.pixels);
        return reader.rc;
    }
    size_t used = (size_t)reader.width * reader.height * 3;
    uint8_t *fitted = realloc(reader.pixels, used); /* gives the alpha channel's share back */
    *out = (struct image){(int)reader.width, (int)reader.height, fitted ? fitted : reader.pixels};
    *orientation = reader.orientation;
    return OK;
}
