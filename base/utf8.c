#include "base/utf8.h"

/* Bytes a sequence with this lead byte needs, and the range its second byte must lie in (Unicode table 3-7). */
static size_t sequence(unsigned char lead, unsigned char *low, unsigned char *high)
{
    *low = 0x80;
    *high = 0xbf;
    if (lead < 0x80) return 1;
    if (lead < 0xc2 || lead > 0xf4) return 0;
    if (lead < 0xe0) return 2;
    if (lead < 0xf0) {
        if (lead == 0xe0) *low = 0xa0;
        if (lead == 0xed) *high = 0x9f;
        return 3;
    }
    if (lead == 0xf0) *low = 0x90;
    if (lead == 0xf4) *high = 0x8f;
    return 4;
}

/* Length of the valid prefix of one character; *need is its full length (0: not a lead byte). */
static size_t valid_prefix(const unsigned char *s, size_t size, size_t *need)
{
    unsigned char low, high;
    *need = sequence(s[0], &low, &high);
    if (!*need) return 0;
    size_t n = 1;
    while (n < *need && n < size && s[n] >= low && s[n] <= high) {
        n++;
        low = 0x80;
        high = 0xbf;
    }
    return n;
}

size_t utf8_next(const char *text, size_t size, uint32_t *code)
{
    const unsigned char *s = (const unsigned char *)text;
    size_t need, have = valid_prefix(s, size, &need);
    if (!need || have < need) {
        *code = 0xfffd;
        return have ? have : 1;
    }
    static const unsigned char mask[] = {0, 0x7f, 0x1f, 0x0f, 0x07};
    uint32_t c = s[0] & mask[need];
    for (size_t i = 1; i < need; i++) c = c << 6 | (s[i] & 0x3f);
    *code = c;
    return need;
}

size_t utf8_put(uint32_t code, char *out)
{
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    if (code < 0x800) {
        out[0] = (char)(0xc0 | code >> 6);
        out[1] = (char)(0x80 | (code & 0x3f));
        return 2;
    }
    if (code < 0x10000) {
        out[0] = (char)(0xe0 | code >> 12);
        out[1] = (char)(0x80 | (code >> 6 & 0x3f));
        out[2] = (char)(0x80 | (code & 0x3f));
        return 3;
    }
    out[0] = (char)(0xf0 | code >> 18);
    out[1] = (char)(0x80 | (code >> 12 & 0x3f));
    out[2] = (char)(0x80 | (code >> 6 & 0x3f));
    out[3] = (char)(0x80 | (code & 0x3f));
    return 4;
}

size_t utf8_pending(const char *text, size_t size)
{
    const unsigned char *s = (const unsigned char *)text;
    for (size_t back = 1; back <= 3 && back <= size; back++) {
        size_t need, have;
        if ((s[size - back] & 0xc0) == 0x80) continue;
        have = valid_prefix(s + size - back, back, &need);
        return need > back && have == back ? back : 0;
    }
    return 0;
}
