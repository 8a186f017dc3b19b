/* base64: RFC 4648 section 10's vectors, every length both ways, and everything that is not base64. */
#include "base/base64.h"

#include <stdbool.h>

#include "tests/check.h"

static void check_text(const char *text, const char *expected)
{
    uint8_t *out = NULL;
    size_t size = 99;
    CHECK_OK(base64_decode(text, strlen(text), 100, &out, &size));
    CHECK(out && size == strlen(expected) && !memcmp(out, expected, size));
    free(out);
}

static void test_vectors(void)
{
    static const char *const vectors[][2] = {{"", ""},
                                             {"Zg==", "f"},
                                             {"Zm8=", "fo"},
                                             {"Zm9v", "foo"},
                                             {"Zm9vYg==", "foob"},
                                             {"Zm9vYmE=", "fooba"},
                                             {"Zm9vYmFy", "foobar"},
                                             {"Zg", "f"},
                                             {"Zm8", "fo"},
                                             {"Zm9vYg", "foob"},
                                             {"Pz8/Pj4+", "??\?>>>"}};
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) check_text(vectors[i][0], vectors[i][1]);
}

static size_t encode(const uint8_t *bytes, size_t n, bool pad, char *to)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char *start = to;
    for (size_t i = 0; i < n; i += 3) {
        uint32_t bits = (uint32_t)bytes[i] << 16 | (uint32_t)(i + 1 < n ? bytes[i + 1] : 0) << 8 |
                        (uint32_t)(i + 2 < n ? bytes[i + 2] : 0);
        for (size_t k = 0; k < 4; k++) {
            bool used = k < 2 || i + k - 1 < n;
            if (used) *to++ = digits[bits >> (18 - 6 * k) & 63];
            if (!used && pad) *to++ = '=';
        }
    }
    return (size_t)(to - start);
}

static void test_round_trip(void)
{
    uint8_t bytes[300];
    char text[500];
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (uint8_t)(i * 151 + i / 7);
    for (size_t n = 0; n <= sizeof bytes; n++) {
        for (int pad = 0; pad < 2; pad++) {
            uint8_t *out = NULL;
            size_t size = 0;
            CHECK_OK(base64_decode(text, encode(bytes, n, pad, text), n, &out, &size));
            CHECK(size == n && !memcmp(out, bytes, n));
            free(out);
        }
    }
}

static void test_errors(void)
{
    static const struct {
        const char *text, *part;
    } cases[] = {
        {"Zm9v\n", "0x0a at position 4"},
        {"Zm9\nv", "0x0a at position 3"},
        {"Zm 9", "0x20 at position 2"},
        {"Zm9-", "0x2d"},
        {"Zm9_", "0x5f"},
        {"Z", "cut off"},
        {"Zm9vY", "cut off"},
        {"Zg=", "multiple of 4"},
        {"Zm9v=", "multiple of 4"},
        {"Zm9v==", "multiple of 4"},
        {"Zm9v====", "0x3d at"},
        {"Z===", "0x3d at"},
        {"=", "multiple of 4"},
        {"====", "0x3d at"},
        {"Zg==Zg==", "0x3d at"},
        {"Z=g=", "0x3d at"},
        {"Zh==", "unused bits"},
        {"Zm9=", "unused bits"},
        {"Zh", "unused bits"},
        {"\xc3\xa9zz", "0xc3"},
    };
    uint8_t *out = NULL;
    size_t size = 7;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        CHECK_FAILS(base64_decode(cases[i].text, strlen(cases[i].text), 100, &out, &size), ERR_FORMAT, cases[i].part);
    CHECK_FAILS(base64_decode("Zm9vYmFy", 8, 5, &out, &size), ERR_FORMAT, "6 bytes, the limit is 5");
    CHECK_FAILS(base64_decode("Zg\0=", 4, 5, &out, &size), ERR_FORMAT, "0x00");
    CHECK(!out && size == 7);
}

int main(void)
{
    return check_run("base64",
                     (struct check_case[]){
                         {"vectors", test_vectors}, {"round trip", test_round_trip}, {"errors", test_errors}, {0}});
}
