/* dequant against the Python package gguf: every type bit for bit, whole, in odd parts, and narrowed. */
#include "model/dequant.h"

#include "base/file.h"
#include "tests/check.h"

static const enum storage_type types[] = {STORAGE_F16,  STORAGE_BF16, STORAGE_Q8_0, STORAGE_Q4_0, STORAGE_Q4_1,
                                          STORAGE_Q5_0, STORAGE_Q5_1, STORAGE_Q4_K, STORAGE_Q5_K, STORAGE_Q6_K};
enum { N_TYPES = sizeof types / sizeof *types, MAX_VALUES = 24 * 256 };

/* Calls `check` for every type of the vectors with its blocks and its n values. */
static void each_type(void (*check)(enum storage_type type, const void *blocks, const float *want, int64_t n))
{
    char *data = NULL;
    size_t size = 0, at = 0;
    CHECK_OK(file_read_all(SOURCE_DIR "/tests/data/checkpoint/dequant.bin", 1 << 20, &data, &size));
    for (int i = 0; i < N_TYPES && data; i++) {
        static float want[MAX_VALUES];
        uint32_t n_blocks = 0;
        memcpy(&n_blocks, data + at, 4);
        size_t bytes = n_blocks * (size_t)dequant_block_bytes(types[i]);
        int64_t n = n_blocks * (int64_t)dequant_block_size(types[i]);
        CHECK(n > 0 && n <= MAX_VALUES && at + 4 + bytes + (size_t)n * 4 <= size);
        memcpy(want, data + at + 4 + bytes, (size_t)n * 4);
        check(types[i], data + at + 4, want, n);
        at += 4 + bytes + (size_t)n * 4;
    }
    CHECK(at == size);
    free(data);
}

static void check_whole(enum storage_type type, const void *blocks, const float *want, int64_t n)
{
    static float got[MAX_VALUES];
    dequant_to_float(type, blocks, 0, n, got);
    int64_t differ = 0;
    for (int64_t i = 0; i < n; i++) differ += got[i] != want[i];
    if (differ) fprintf(stderr, "type %d: %lld of %lld values differ\n", type, (long long)differ, (long long)n);
    CHECK(differ == 0);
}

static void test_whole(void) { each_type(check_whole); }

static void check_parts(enum storage_type type, const void *blocks, const float *want, int64_t n)
{
    static const int64_t counts[] = {1, 7, 31, 32, 33, 100, 256, 257, 500};
    float got[512];
    for (int64_t first = 0; first < n; first += 13) {
        int64_t count = counts[first % 9];
        if (first + count > n) count = n - first;
        got[count] = 12345;
        dequant_to_float(type, blocks, first, count, got);
        CHECK(!memcmp(got, want + first, (size_t)count * 4) && got[count] == 12345);
    }
}

static void test_parts(void) { each_type(check_parts); }

static void check_narrow(enum storage_type type, const void *blocks, const float *want, int64_t n)
{
    static uint16_t got[MAX_VALUES];
    static float wide[MAX_VALUES];
    int64_t differ = 0;
    dequant_convert(type, blocks, 3, n - 3, DTYPE_F16, got);
    for (int64_t i = 3; i < n; i++) differ += got[i - 3] != float_to_half(want[i]);
    dequant_convert(type, blocks, 3, n - 3, DTYPE_BF16, got);
    for (int64_t i = 3; i < n; i++) differ += got[i - 3] != float_to_bfloat(want[i]);
    dequant_convert(type, blocks, 3, n - 3, DTYPE_F32, wide);
    CHECK(differ == 0 && !memcmp(wide, want + 3, (size_t)(n - 3) * 4));
}

static void test_narrow(void) { each_type(check_narrow); }

static void test_f32(void)
{
    float in[] = {1.5f, -2.25f, 3e-30f, 65520.0f}, out[3];
    uint16_t half[2];
    dequant_to_float(STORAGE_F32, in, 1, 3, out);
    CHECK(!memcmp(out, in + 1, sizeof out));
    dequant_convert(STORAGE_F32, in, 2, 2, DTYPE_F16, half);
    CHECK(half[0] == 0 && half[1] == 0x7c00);
    CHECK(dequant_natural_dtype(STORAGE_F32) == DTYPE_F32 && dequant_natural_dtype(STORAGE_BF16) == DTYPE_BF16);
    CHECK(dequant_natural_dtype(STORAGE_Q6_K) == DTYPE_F16 && !dequant_is_dtype(STORAGE_Q6_K, DTYPE_F16));
    CHECK(dequant_is_dtype(STORAGE_F16, DTYPE_F16) && !dequant_is_dtype(STORAGE_F16, DTYPE_BF16));
}

/* The vectorised narrowing equals base's, over the whole range of bit patterns. */
static void test_sweep(void)
{
    enum { N = 4096 };
    int64_t differ = 0;
    for (uint64_t bits = 0; bits < UINT64_C(1) << 32;) {
        float in[N];
        uint16_t half[N], bfloat[N];
        for (int i = 0; i < N; i++, bits += 1021) {
            uint32_t u = (uint32_t)bits;
            memcpy(&in[i], &u, sizeof u);
        }
        dequant_convert(STORAGE_F32, in, 0, N, DTYPE_F16, half);
        dequant_convert(STORAGE_F32, in, 0, N, DTYPE_BF16, bfloat);
        for (int i = 0; i < N; i++) differ += half[i] != float_to_half(in[i]) || bfloat[i] != float_to_bfloat(in[i]);
    }
    CHECK(differ == 0);
}

int main(void)
{
    return check_run("dequant", (struct check_case[]){{"every type equals the reference", test_whole},
                                                      {"parts of blocks", test_parts},
                                                      {"narrowing", test_narrow},
                                                      {"unquantised", test_f32},
                                                      {"every region of bit patterns", test_sweep},
                                                      {0}});
}
