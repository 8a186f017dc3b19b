/* quantise - the 8-bit forms of a token's key or value of one KV head, the same bits on host and device: one float32
 * scale, and a code for each element.
 *
 * KV_INT8: symmetric, scale = largest magnitude / 127, code = x / scale to the nearest, half to even. KV_FP8: e4m3 (the
 * finite one: no infinities, 0x7f is not-a-number), scale = largest magnitude / 448, saturating. A row of zeros has
 * scale 0 and codes 0; a row with an element that is not finite has a scale that is not, and reads as not-a-numbers. */
#ifndef VITRAIL_KERNELS_QUANTISE_H
#define VITRAIL_KERNELS_QUANTISE_H

#include <math.h>
#include <string.h>

#include "kernels/ops.h"

#ifndef QUANTISE_FUNCTION /* set by who compiles for a device */
#define QUANTISE_FUNCTION static inline
#endif

/* The bits of |x|: in their order magnitudes are, with not-a-numbers above all. */
QUANTISE_FUNCTION uint32_t quantise_magnitude(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffffu;
}

/* The scale of a row whose largest magnitude has these bits. */
QUANTISE_FUNCTION float quantise_scale(enum kv_format format, uint32_t largest)
{
    float top;
    memcpy(&top, &largest, sizeof top);
    return top / (format == KV_INT8 ? 127.0f : 448.0f);
}

/* float32 to e4m3. */
QUANTISE_FUNCTION uint8_t quantise_fp8(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7f;
    if (magnitude >= 0x43e00000u) return (uint8_t)(sign | 0x7eu);                             /* 448 and more */
    if (magnitude < 0x3c800000u) return (uint8_t)(sign | (uint32_t)rintf(fabsf(x) * 0x1p9f)); /* subnormal */
    const uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
    return (uint8_t)(sign | ((rounded >> 20) - ((127u - 7u) << 3)));
}

/* The code of an element of a row of this scale, as its byte. */
QUANTISE_FUNCTION uint8_t quantise_code(enum kv_format format, float x, float scale)
{
    const float quotient = x / (scale > 0 ? scale : 1.0f);
    if (format == KV_FP8) return quantise_fp8(quotient);
    const float code = rintf(quotient);
    if (!(code > -127.0f)) return code <= -127.0f ? (uint8_t)-127 : 0; /* a quotient that is none: 0 */
    return (uint8_t)(int8_t)(code < 127.0f ? code : 127.0f);
}

/* The number that a code stands for, before its scale. An e4m3's bits in a float32's places are it times 2^-120. */
QUANTISE_FUNCTION float quantise_value(enum kv_format format, uint8_t code)
{
    if (format == KV_INT8) return (float)(int8_t)code;
    const uint32_t bits = (code & 0x80u) << 24 | (code & 0x7fu) << 20;
    float small;
    memcpy(&small, &bits, sizeof small);
    return (code & 0x7fu) == 0x7fu ? NAN : small * 0x1p120f;
}

#endif
