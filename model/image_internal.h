/* image_internal - what the files image*.c share; nobody else includes it. */
#ifndef VITRAIL_MODEL_IMAGE_INTERNAL_H
#define VITRAIL_MODEL_IMAGE_INTERNAL_H

#include "model/image.h"

/* image__check_size - the limits on what a header says; before any memory is taken. */
int image__check_size(const char *what, const struct image_limits *limits, uint64_t width, uint64_t height) MUST_CHECK;

/* Both decoders: a whole file to RGB as stored, and the EXIF orientation (1 to 8, 1 if there is none). */
int image__decode_png(const uint8_t *bytes, size_t size, const char *what, const struct image_limits *limits,
                      struct image *out, int *orientation) MUST_CHECK;
int image__decode_jpeg(const uint8_t *bytes, size_t size, const char *what, const struct image_limits *limits,
                       struct image *out, int *orientation) MUST_CHECK;

/* image__exif_orientation - the orientation tag of a TIFF structure (what follows "Exif\0\0" in a JPEG, the content
 * of eXIf in a PNG); 1 if it is absent, malformed or out of range, as viewers do. */
int image__exif_orientation(const uint8_t *tiff, size_t size);

/* image__orient - turns and mirrors *image so that it is upright; orientation 1 does nothing. */
int image__orient(struct image *image, int orientation, const char *what) MUST_CHECK;

/* A picture on a larger ground, without the memory for it: pixels outside `image` have the colour `fill`. */
struct image__canvas {
    const struct image *image;
    int width, height; /* of the whole; at least the picture's */
    int left, top;     /* where the picture begins */
    uint8_t fill[3];
};

/* A rectangle of the resized picture, and where its pixels go. */
struct image__region {
    int x, y, width, height; /* within the resized picture */
    uint8_t *out;            /* uint8 [height, width, 3] with rows `stride` bytes apart */
    size_t stride;
};

/* image__resize - the region of `canvas` resized to width x height, both at least 1. */
int image__resize(const struct image__canvas *canvas, enum image_resample resample, int width, int height,
                  const struct image__region *region) MUST_CHECK;

#endif
