/* image - from the bytes of a PNG or JPEG file to the uint8 pixels that a vision tower is fed with.
 *
 * Owns: decoding (image_png.c, image_jpeg.c, image_exif.c) and what preprocessor_config.json asks for up to the
 * crop (image_processor.c, image_resize.c). Does not own: fetching the bytes (image_source.h), and turning uint8
 * into floats, which every rank does for its own images with image_processor_scale_shift. The pixels are those of
 * the reference processors: equal to the Pillow-backed ones to the last bit (Pillow 13 aside, see image_resize.c),
 * within 2/255 of the torchvision-backed ones; what is decoded otherwise than by Pillow is said at image_decode. */
#ifndef VITRAIL_MODEL_IMAGE_H
#define VITRAIL_MODEL_IMAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* A decoded picture: RGB, row-major [height, width, 3], malloc'd; freed by image_free. */
struct image {
    int width, height;
    uint8_t *pixels;
};

/* What an image file may ask for. All are checked on the header, before pixel memory is taken. */
struct image_limits {
    size_t max_bytes;   /* of the encoded file */
    int64_t max_pixels; /* width x height; decoding takes about 11 bytes a pixel at its peak (progressive CMYK) */
    int max_side;       /* pixels of the longer side */
    double max_aspect;  /* longer side / shorter side: beyond it a centre crop shows nothing of the picture */
};

/* image_limits_default - 64 MiB of file, 64 x 2^20 pixels, 32,768 a side, aspect 200. */
struct image_limits image_limits_default(void);

/* image_decode - a whole PNG or JPEG, told apart by signature, with its EXIF orientation applied.
 *   what    names the image in messages; short
 *   limits  NULL: the defaults
 *   out     filled on success only; the caller frees it
 * Alpha and transparent colours are composited on white. 16-bit samples keep their high byte. Gamma, ICC profiles
 * and significant bits are ignored. CMYK is taken as Adobe writes it (inverted) and converted without a profile.
 * Of an animation the default picture is read.
 * Errors: ERR_FORMAT empty, damaged, truncated or above a limit; ERR_UNSUPPORTED another kind of file;
 * ERR_NOMEM. A picture that is not whole is an error, never a partial result. */
int image_decode(const void *bytes, size_t size, const char *what, const struct image_limits *limits,
                 struct image *out) MUST_CHECK;

/* image_free - frees the pixels and zeroes the struct; a zeroed struct is fine. */
void image_free(struct image *image);

/* Numbered as preprocessor_config.json numbers them. */
enum image_resample {
    IMAGE_NEAREST,
    IMAGE_LANCZOS,
    IMAGE_BILINEAR,
    IMAGE_BICUBIC,
    IMAGE_BOX,
    IMAGE_HAMMING,
    IMAGE_RESAMPLE_N
};

/* The steps of preprocessor_config.json, in the order in which they are done. POD. */
struct image_processor {
    bool do_convert_rgb; /* kept for show: pictures are always RGB here */
    bool do_pad;         /* to a square of the longer side, filled with int(255 x image_mean) */
    bool do_resize;
    int shortest_edge;               /* > 0: resize to this shorter side, the aspect kept */
    int resize_height, resize_width; /* used where shortest_edge is 0 */
    enum image_resample resample;
    bool do_center_crop; /* where the picture is smaller than the crop, zeros surround it */
    int crop_height, crop_width;
    bool do_rescale, do_normalize;
    double rescale_factor, image_mean[3], image_std[3];
};

/* image_processor_default - CLIP's: bicubic to a shorter side of image_size, centre crop to its square, 1/255,
 * CLIP's mean and standard deviation. */
struct image_processor image_processor_default(int image_size);

/* image_processor_load - reads preprocessor_config.json. Absent keys have the defaults of the processor class.
 * Errors: ERR_IO, ERR_FORMAT naming file and key; ERR_UNSUPPORTED for another image_processor_type than CLIP's and
 * LLaVA's (also their Fast variants), and for settings whose output size depends on the picture. */
int image_processor_load(const char *preprocessor_config_path, struct image_processor *out) MUST_CHECK;

/* image_processor_output_size - the fixed size of what image_process writes, in pixels. */
void image_processor_output_size(const struct image_processor *processor, int *height, int *width);

/* image_processor_scale_shift - rescale and normalise as one line: x = u8 * scale[c] + shift[c], c = R, G, B. */
void image_processor_scale_shift(const struct image_processor *processor, float scale[3], float shift[3]);

/* image_process - pad, resize and crop.
 *   out  uint8 [height, width, 3] of image_processor_output_size; the caller's
 * Only the part that the crop keeps is computed. Errors: ERR_NOMEM for its work memory, about 3 bytes x input
 * rows x output width; ERR_ARG for an empty picture. */
int image_process(const struct image_processor *processor, const struct image *image, uint8_t *out) MUST_CHECK;

#endif
