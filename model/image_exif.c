/* image_exif - the one EXIF tag that changes what a picture shows: its orientation.
 * Hostile metadata must not cost the picture: whatever is malformed counts as absent. */
#include "model/image_internal.h"

enum { TAG_ORIENTATION = 0x0112, TYPE_SHORT = 3, TYPE_LONG = 4, ENTRY_BYTES = 12 };

static uint32_t number(const uint8_t *at, int n, bool big_endian)
{
    uint32_t value = 0;
    for (int i = 0; i < n; i++) value = value << 8 | at[big_endian ? i : n - 1 - i];
    return value;
}

int image__exif_orientation(const uint8_t *tiff, size_t size)
{
    if (size < 8 || tiff[0] != tiff[1] || (tiff[0] != 'I' && tiff[0] != 'M')) return 1;
    bool big = tiff[0] == 'M';
    if (number(tiff + 2, 2, big) != 42) return 1;
    size_t at = number(tiff + 4, 4, big);
    if (at > size - 2) return 1;
    uint32_t n_entries = number(tiff + at, 2, big);
    at += 2;
    for (uint32_t i = 0; i < n_entries && size - at >= ENTRY_BYTES; i++, at += ENTRY_BYTES) {
        if (number(tiff + at, 2, big) != TAG_ORIENTATION) continue;
        uint32_t type = number(tiff + at + 2, 2, big), count = number(tiff + at + 4, 4, big);
        if (count != 1 || (type != TYPE_SHORT && type != TYPE_LONG)) return 1;
        uint32_t value = number(tiff + at + 8, type == TYPE_SHORT ? 2 : 4, big);
        return value >= 1 && value <= 8 ? (int)value : 1;
    }
    return 1;
}
