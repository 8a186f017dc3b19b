/* fuzz_image - any bytes as an image file: decoded within small limits, then processed by a processor that the last
 * byte picks. Seeds: tests/data/image/kinds. libpng's checksums would stop nearly every mutation, so those of the
 * chunks are set right first. */
#include <stdlib.h>

#include "model/image.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct image_processor pick(uint8_t byte)
{
    struct image_processor processor = image_processor_default(20);
    processor.resample = (enum image_resample)(byte % IMAGE_RESAMPLE_N);
    processor.do_pad = byte & 8;
    processor.do_center_crop = !(byte & 16) || !processor.do_pad;
    processor.do_resize = !(byte & 32) || !processor.do_center_crop;
    processor.crop_width = byte & 64 ? 33 : 20;
    return processor;
}

static uint32_t crc32_of(const uint8_t *bytes, size_t n)
{
    uint32_t crc = 0xffffffff;
    for (size_t i = 0; i < n; i++) {
        crc ^= bytes[i];
        for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    }
    return ~crc;
}

static void mend_checksums(uint8_t *bytes, size_t size)
{
    if (size < 8 || bytes[0] != 0x89) return;
    for (size_t at = 8; size - at >= 12;) {
        size_t n = (size_t)bytes[at] << 24 | (size_t)bytes[at + 1] << 16 | (size_t)bytes[at + 2] << 8 | bytes[at + 3];
        if (n > size - at - 12) return;
        uint32_t crc = crc32_of(bytes + at + 4, n + 4);
        for (size_t i = 0; i < 4; i++) bytes[at + 8 + n + i] = (uint8_t)(crc >> (24 - 8 * i));
        at += 12 + n;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct image_limits limits = {.max_bytes = 1 << 16, .max_pixels = 1 << 14, .max_side = 4096, .max_aspect = 200};
    struct image image = {0};
    uint8_t *file = malloc(size + 1);
    if (!file) return 0;
    for (size_t i = 0; i < size; i++) file[i] = data[i];
    mend_checksums(file, size);
    struct image_processor processor = pick(size ? data[size - 1] : 0);
    if (!image_decode(file, size, "fuzz", &limits, &image)) {
        int height, width;
        image_processor_output_size(&processor, &height, &width);
        uint8_t *out = malloc((size_t)height * (size_t)width * 3);
        if (out && image_process(&processor, &image, out)) abort(); /* what decodes can be processed */
        free(out);
        image_free(&image);
    }
    free(file);
    return 0;
}
