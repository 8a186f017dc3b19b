/* test_image_pattern - pictures computed by formula, the same as tests/tools/make_image_resize.py computes, so that
 * tests of large pictures need no large files; and the hash that stands for a whole result. */
#ifndef VITRAIL_TESTS_UNIT_TEST_IMAGE_PATTERN_H
#define VITRAIL_TESTS_UNIT_TEST_IMAGE_PATTERN_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "model/image.h"

static inline uint32_t pattern_mix(uint32_t x, uint32_t y, uint32_t c, uint32_t seed)
{
    uint32_t h = (x * 0x9E3779B1u) ^ (y * 0x85EBCA77u) ^ ((seed * 4 + c) * 0xC2B2AE3Du);
    h = (h ^ (h >> 15)) * 0x2C1B3C6Du;
    return h ^ (h >> 12);
}

static inline uint8_t pattern_value(const char *kind, uint32_t x, uint32_t y, uint32_t c, uint32_t seed)
{
    uint32_t noise = pattern_mix(x, y, c, seed) >> 24;
    uint32_t t = (x * (c + 1) + y * (4 - c) + seed * 50) & 511, smooth = t < 256 ? t : 511 - t;
    uint32_t ink = pattern_mix(x / 2, y / 3, 0, seed) >> 13 & 1;
    uint32_t text = y / 9 % 2 == 1 ? 255 : ink * 255;
    if (!strcmp(kind, "noise")) return (uint8_t)noise;
    if (!strcmp(kind, "smooth")) return (uint8_t)smooth;
    if (!strcmp(kind, "text")) return (uint8_t)text;
    return (uint8_t)(text == 255 ? smooth : noise >> 2);
}

/* An RGB picture of this kind; NULL pixels if memory is short. */
static inline struct image pattern_image(const char *kind, int width, int height, uint32_t seed)
{
    struct image image = {width, height, malloc((size_t)width * (size_t)height * 3)};
    uint8_t *to = image.pixels;
    for (int y = 0; to && y < height; y++) {
        for (int x = 0; x < width; x++) {
            for (uint32_t c = 0; c < 3; c++) *to++ = pattern_value(kind, (uint32_t)x, (uint32_t)y, c, seed);
        }
    }
    return image;
}

static inline uint64_t fnv1a(const uint8_t *data, size_t n)
{
    uint64_t h = 0xCBF29CE484222325u;
    for (size_t i = 0; i < n; i++) h = (h ^ data[i]) * 0x100000001B3u;
    return h;
}

/* Value i of the 2 x n hex digits in `text`. */
static inline int hex_byte(const char *text, size_t i)
{
    char digits[3] = {text[2 * i], text[2 * i + 1], 0};
    return (int)strtol(digits, NULL, 16);
}

#endif
