#include "base/base64.h"

#include <stdbool.h>
#include <stdlib.h>

enum { NOT_A_DIGIT = 64 };

static inline uint32_t digit_value(char c)
{
    if (c >= 'A' && c <= 'Z') return (uint32_t)(c - 'A');
    if (c >= 'a' && c <= 'z') return (uint32_t)(c - 'a' + 26);
    if (c >= '0' && c <= '9') return (uint32_t)(c - '0' + 52);
    if (c == '+') return 62;
    return c == '/' ? 63 : NOT_A_DIGIT;
}

/* Writes the bytes of n digits; *rest gets the bits that fill no byte. false at a character that is no digit. */
static bool decode_digits(const char *text, size_t n, uint8_t *to, uint32_t *rest)
{
    uint32_t bits = 0;
    int n_bits = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t value = digit_value(text[i]);
        if (value == NOT_A_DIGIT) return false;
        bits = bits << 6 | value;
        n_bits += 6;
        if (n_bits < 8) continue;
        n_bits -= 8;
        *to++ = (uint8_t)(bits >> n_bits);
        bits &= (1u << n_bits) - 1;
    }
    *rest = bits;
    return true;
}

/* The reason why n digits and their padding are no base64; a stray character explains a wrong length, too. */
static int fail(const char *text, size_t n, size_t n_padding)
{
    for (size_t i = 0; i < n; i++) {
        if (digit_value(text[i]) == NOT_A_DIGIT)
            FAIL(ERR_FORMAT, "base64: byte 0x%02x at position %zu is no digit of the standard alphabet",
                 (unsigned)(unsigned char)text[i], i);
    }
    if (n % 4 == 1) FAIL(ERR_FORMAT, "base64: %zu digits encode no whole number of bytes; the text is cut off", n);
    if (n_padding && (n + n_padding) % 4 != 0)
        FAIL(ERR_FORMAT, "base64: %zu digits with %zu padding characters, together no multiple of 4", n, n_padding);
    FAIL(ERR_FORMAT, "base64: the unused bits of the last digit are not zero");
}

int base64_decode(const char *text, size_t size, size_t max_out, uint8_t **out, size_t *out_size)
{
    size_t n = size, n_padding = 0;
    uint32_t rest = 0;
    while (n && n_padding < 2 && text[n - 1] == '=') {
        n--;
        n_padding++;
    }
    if ((n_padding && size % 4 != 0) || n % 4 == 1) return fail(text, n, n_padding);
    size_t n_bytes = n / 4 * 3 + (n % 4 ? n % 4 - 1 : 0);
    if (n_bytes > max_out) FAIL(ERR_FORMAT, "base64: %zu bytes, the limit is %zu", n_bytes, max_out);
    uint8_t *bytes = malloc(n_bytes + 1);
    if (!bytes) FAIL(ERR_NOMEM, "base64: no memory for %zu bytes", n_bytes);
    if (!decode_digits(text, n, bytes, &rest) || rest) {
        free(bytes);
        return fail(text, n, n_padding);
    }
    *out = bytes;
    *out_size = n_bytes;
    return OK;
}
