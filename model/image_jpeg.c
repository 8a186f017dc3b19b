/* image_jpeg - JPEG of every process and colour space that libjpeg-turbo reads, to RGB.
 *
 * libjpeg goes on after damaged data with a warning and grey blocks; here such a warning is an error, because part
 * of a picture must not pass for the whole. Its errors come by a callback that must not return, hence the setjmp:
 * what has to be freed lives in struct reader, in a frame that the jump leaves intact. */
#include <stdio.h> /* jpeglib.h needs it */

#include <jpeglib.h>

#include <jerror.h> /* needs jpeglib.h */
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

#include "base/tensor.h"
#include "model/image_internal.h"

/* A small progressive file can ask for any number of passes over all of a large picture. */
enum { MAX_SCANS = 200, EXIF_HEADER = 6 };

struct reader {
    struct jpeg_error_mgr errors; /* first: libjpeg hands back a pointer to it */
    struct jpeg_decompress_struct jpeg;
    struct jpeg_progress_mgr progress;
    const char *what;
    const struct image_limits *limits;
    uint8_t *pixels; /* [height, width, 3] */
    uint8_t *row;    /* CMYK [width, 4] */
    int orientation;
    int rc;
    jmp_buf jump;
};

static void stop(struct reader *reader, int rc)
{
    reader->rc = rc;
    longjmp(reader->jump, 1);
}

static void on_error(j_common_ptr jpeg)
{
    struct reader *reader = (struct reader *)jpeg->err;
    char text[JMSG_LENGTH_MAX];
    jpeg->err->format_message(jpeg, text);
    stop(reader, status_set(ERR_FORMAT, __FILE__, __LINE__, "%s: bad JPEG: %s", reader->what, text));
}

static void on_message(j_common_ptr jpeg, int level)
{
    struct reader *reader = (struct reader *)jpeg->err;
    if (level >= 0) return; /* a trace */
    switch (jpeg->err->msg_code) {
    case JWRN_EXTRANEOUS_DATA:
    case JWRN_TOO_MUCH_DATA:
    case JWRN_ADOBE_XFORM:
    case JWRN_JFIF_MAJOR:
    case JWRN_BOGUS_ICC: break; /* oddities of the writer: the picture is whole */
    case JWRN_JPEG_EOF:
        stop(reader, status_set(ERR_FORMAT, __FILE__, __LINE__,
                                "%s: bad JPEG: the file is cut off before its end marker", reader->what));
        break;
    default: on_error(jpeg);
    }
}

static void on_output(j_common_ptr jpeg) { (void)jpeg; }

static void on_progress(j_common_ptr jpeg)
{
    struct reader *reader = (struct reader *)jpeg->err;
    if (reader->jpeg.input_scan_number > MAX_SCANS)
        stop(reader,
             status_set(ERR_FORMAT, __FILE__, __LINE__, "%s: bad JPEG: more than %d scans", reader->what, MAX_SCANS));
}

static void find_orientation(struct reader *reader)
{
    for (jpeg_saved_marker_ptr marker = reader->jpeg.marker_list; marker; marker = marker->next) {
        if (marker->data_length < EXIF_HEADER || memcmp(marker->data, "Exif\0\0", EXIF_HEADER) != 0) continue;
        reader->orientation = image__exif_orientation(marker->data + EXIF_HEADER, marker->data_length - EXIF_HEADER);
        return;
    }
}

static void choose_colors(struct reader *reader)
{
    struct jpeg_decompress_struct *jpeg = &reader->jpeg;
    switch (jpeg->jpeg_color_space) {
    case JCS_GRAYSCALE:
    case JCS_RGB:
    case JCS_YCbCr: jpeg->out_color_space = JCS_RGB; break;
    case JCS_CMYK:
    case JCS_YCCK: jpeg->out_color_space = JCS_CMYK; break;
    default:
        stop(reader, status_set(ERR_UNSUPPORTED, __FILE__, __LINE__,
                                "%s: a JPEG of %d components; 1 (grey), 3 (colour) and 4 (CMYK) are served",
                                reader->what, jpeg->num_components));
    }
}

/* Adobe writes ink inverted, 255 for none: c and k are then light let through, and red is round(c k / 255). */
static void cmyk_to_rgb(const uint8_t *cmyk, uint8_t *rgb, size_t n)
{
    for (size_t i = 0; i < n; i++, cmyk += 4, rgb += 3) {
        for (int c = 0; c < 3; c++) rgb[c] = (uint8_t)((cmyk[c] * cmyk[3] + 127) / 255);
    }
}

static void read_rows(struct reader *reader)
{
    struct jpeg_decompress_struct *jpeg = &reader->jpeg;
    size_t width = jpeg->output_width, bytes;
    bool is_cmyk = jpeg->out_color_space == JCS_CMYK;
    if (size_mul(width * 3, jpeg->output_height, &bytes))
        stop(reader, status_set(ERR_FORMAT, __FILE__, __LINE__, "%s: too many pixels", reader->what));
    reader->pixels = malloc(bytes);
    reader->row = is_cmyk ? malloc(width * 4) : NULL;
    if (!reader->pixels || (is_cmyk && !reader->row))
        stop(reader,
             status_set(ERR_NOMEM, __FILE__, __LINE__, "%s: no memory for %zu bytes of pixels", reader->what, bytes));
    while (jpeg->output_scanline < jpeg->output_height) {
        uint8_t *to = reader->pixels + jpeg->output_scanline * width * 3;
        JSAMPROW row = is_cmyk ? reader->row : to;
        (void)jpeg_read_scanlines(jpeg, &row, 1);
        if (is_cmyk) cmyk_to_rgb(reader->row, to, width);
    }
}

static void read_picture(struct reader *reader, const uint8_t *bytes, size_t size)
{
    struct jpeg_decompress_struct *jpeg = &reader->jpeg;
    jpeg_create_decompress(jpeg);
    reader->progress.progress_monitor = on_progress;
    jpeg->progress = &reader->progress;
    jpeg_mem_src(jpeg, bytes, (unsigned long)size);
    jpeg_save_markers(jpeg, JPEG_APP0 + 1, 0xffff);
    (void)jpeg_read_header(jpeg, TRUE);
    int rc = image__check_size(reader->what, reader->limits, jpeg->image_width, jpeg->image_height);
    if (rc) stop(reader, rc);
    find_orientation(reader);
    choose_colors(reader);
    (void)jpeg_start_decompress(jpeg);
    read_rows(reader);
    (void)jpeg_finish_decompress(jpeg);
}

/* The frame that is jumped back to holds nothing but the pointer. */
static void read_guarded(struct reader *reader, const uint8_t *bytes, size_t size)
{
    if (!setjmp(reader->jump)) read_picture(reader, bytes, size);
}

int image__decode_jpeg(const uint8_t *bytes, size_t size, const char *what, const struct image_limits *limits,
                       struct image *out, int *orientation)
{
    struct reader reader = {.what = what, .limits = limits, .orientation = 1};
    reader.jpeg.err = jpeg_std_error(&reader.errors);
    reader.errors.error_exit = on_error;
    reader.errors.emit_message = on_message;
    reader.errors.output_message = on_output;
    read_guarded(&reader, bytes, size);
    struct image image = {(int)reader.jpeg.output_width, (int)reader.jpeg.output_height, reader.pixels};
    jpeg_destroy_decompress(&reader.jpeg);
    free(reader.row);
    if (reader.rc) {
        image_free(&image);
        return reader.rc;
    }
    *out = image;
    *orientation = reader.orientation;
    return OK;
}
