/* safetensors: a right header, and every way in which one can be wrong, each named with file and tensor. */
#include "model/safetensors.h"

#include <fcntl.h>

#include "base/file.h"
#include "model_files.h"
#include "tests/check.h"

#define TENSOR(name, dtype, shape, offsets)                                                                            \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static int parse(const char *header, size_t data_size, struct safetensors **s)
{
    struct bytes b = safetensors_bytes(header, data_size);
    int rc = safetensors_parse(b.data, b.size, "x.safetensors", s);
    bytes_free(&b);
    return rc;
}

static void test_right(void)
{
    struct safetensors *s = NULL;
    const char *header = "{\"__metadata__\":{\"format\":\"pt\"}," TENSOR("b", "BF16", "[2,3]", "[8,20]") "," TENSOR(
        "a", "F32", "[2]",
        "[0,8]") "," TENSOR("scalar", "F16", "[]",
                            "[20,22]") "," TENSOR("empty", "F32", "[0,5]",
                                                  "[22,22]") "," TENSOR("fp8", "F8_E4M3", "[1,1,1,2]",
                                                                        "[22,24]") "," TENSOR("new", "F4", "[3]",
                                                                                              "[24,26]") "}  ";
    CHECK_OK(parse(header, 26, &s));
    if (!s) return;
    CHECK(safetensors_count(s) == 6 && safetensors_header_bytes(s) == 8 + strlen(header));
    const struct safetensors_tensor *a = safetensors_at(s, 0), *b = safetensors_at(s, 1);
    CHECK(!strcmp(a->name, "a") && a->type == STORAGE_F32 && a->n_dims == 1 && a->dim[0] == 2 && a->bytes == 8);
    CHECK(a->offset == 8 + strlen(header));
    CHECK(!strcmp(b->name, "b") && b->type == STORAGE_BF16 && b->n_dims == 2 && b->dim[1] == 3);
    CHECK(b->offset == a->offset + 8 && b->bytes == 12);
    CHECK(safetensors_at(s, 2)->n_dims == 0 && safetensors_at(s, 5)->type == STORAGE_OTHER);
    CHECK(!strcmp(safetensors_at(s, 4)->type_name, "F8_E4M3"));
    safetensors_close(s);
    CHECK_OK(parse("{}", 0, &s));
    CHECK(safetensors_count(s) == 0);
    safetensors_close(s);
}

static void test_wrong_tensors(void)
{
    static const struct {
        const char *header;
        int code;
        const char *part;
    } rows[] = {
        {"{" TENSOR("w", "F32", "[2]", "[0,7]") "}", ERR_FORMAT, "w: F32 and its shape take 8 bytes"},
        {"{" TENSOR("w", "F32", "[2]", "[0,8]") "}", ERR_FORMAT, "w ends at byte"},
        {"{" TENSOR("w", "F32", "[1]", "[0,4]") "}", ERR_FORMAT, "3 bytes at its end"},
        {"{" TENSOR("w", "U8", "[6]", "[1,7]") "}", ERR_FORMAT, "1 bytes before tensor w"},
        {"{" TENSOR("v", "U8", "[4]", "[0,4]") "," TENSOR("w", "U8", "[4]", "[3,7]") "}", ERR_FORMAT, "w overlaps v"},
        {"{" TENSOR("w", "U8", "[3]", "[5,2]") "}", ERR_FORMAT, "w: data_offsets"},
        {"{" TENSOR("w", "U8", "[3]", "[-1,2]") "}", ERR_FORMAT, "w: data_offsets"},
        {"{" TENSOR("w", "U8", "[3]", "[0,2.5]") "}", ERR_FORMAT, "w: data_offsets"},
        {"{" TENSOR("w", "U8", "[3]", "[0,3,3]") "}", ERR_FORMAT, "w: data_offsets"},
        {"{" TENSOR("w", "U8", "[3]", "[0,18446744073709551615]") "}", ERR_FORMAT, "w: data_offsets"},
        {"{" TENSOR("w", "U8", "[3]", "\"0\"") "}", ERR_FORMAT, "w: data_offsets"},
        {"{" TENSOR("w", "U8", "[9007199254740993]", "[0,7]") "}", ERR_FORMAT, "w: "},
        {"{" TENSOR("w", "F32", "[4294967296,4294967296]", "[0,7]") "}", ERR_FORMAT, "w: its shape overflows"},
        {"{" TENSOR("w", "F4", "[4294967296,4294967296]", "[0,7]") "}", ERR_FORMAT, "w: its shape overflows"},
        {"{" TENSOR("w", "F32", "[4611686018427387905]", "[0,4]") "}", ERR_FORMAT, "w: "},
        {"{" TENSOR("w", "U8", "[-7]", "[0,7]") "}", ERR_FORMAT, "w: its shape"},
        {"{" TENSOR("w", "U8", "[\"7\"]", "[0,7]") "}", ERR_FORMAT, "w: its shape"},
        {"{" TENSOR("w", "U8", "7", "[0,7]") "}", ERR_FORMAT, "w: shape"},
        {"{" TENSOR("w", "U8", "[1,1,1,1,7]", "[0,7]") "}", ERR_UNSUPPORTED, "w has more than 4"},
        {"{\"w\":{\"shape\":[7],\"data_offsets\":[0,7]}}", ERR_FORMAT, "w: dtype"},
        {"{\"w\":{\"dtype\":3,\"shape\":[7],\"data_offsets\":[0,7]}}", ERR_FORMAT, "w: dtype"},
        {"{\"w\":{\"dtype\":\"U8\",\"data_offsets\":[0,7]}}", ERR_FORMAT, "w: shape"},
        {"{\"w\":[]}", ERR_FORMAT, "w: its entry"},
        {"{" TENSOR("w", "U8", "[7]", "[0,7]") "," TENSOR("w", "U8", "[7]", "[0,7]") "}", ERR_FORMAT, "twice"},
        {"[]", ERR_FORMAT, "not a JSON object"},
        {"{\"w\":", ERR_FORMAT, "not valid JSON"},
        {"{} x", ERR_FORMAT, "follows"},
        {"", ERR_FORMAT, "not valid JSON"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct safetensors *s = NULL;
        CHECK_FAILS(parse(rows[i].header, 7, &s), rows[i].code, rows[i].part);
        CHECK(!strncmp(status_message(), "x.safetensors: ", 15));
    }
}

static void test_wrong_sizes(void)
{
    struct safetensors *s = NULL;
    const char *header = "{" TENSOR("w", "F32", "[2]", "[0,8]") "}";
    struct bytes b = safetensors_bytes(header, 8);
    for (size_t size = 0; size < b.size; size++) {
        uint8_t *cut = malloc(size + 1); /* its own block, so that a read beyond it is seen */
        memcpy(cut, b.data, size);
        CHECK_FAILS(safetensors_parse(cut, size, "x.safetensors", &s), ERR_FORMAT, "x.safetensors");
        free(cut);
    }
    static const uint64_t sizes[] = {100000001, UINT64_MAX, UINT64_MAX - 7, 1000000};
    for (size_t i = 0; i < 4; i++) {
        memcpy(b.data, &sizes[i], 8);
        CHECK_FAILS(safetensors_parse(b.data, b.size, "x.safetensors", &s), ERR_FORMAT, "its header claims");
    }
    bytes_free(&b);
}

static void test_from_file(void)
{
    struct temp temp = temp_open();
    struct safetensors *s = NULL;
    uint64_t size = 0;
    int fd = -1;
    struct bytes b = safetensors_bytes("{" TENSOR("w", "F32", "[2]", "[0,8]") "}", 8);
    temp_write(&temp, "m", b.data, b.size);
    CHECK_OK(file_open_read(temp_file(&temp, "m"), &fd, &size));
    CHECK_OK(safetensors_read(fd, "m", size, &s));
    CHECK(safetensors_count(s) == 1 && safetensors_at(s, 0)->bytes == 8);
    safetensors_close(s);
    CHECK_FAILS(safetensors_read(fd, "m", size - 1, &s), ERR_FORMAT, "tensor w");
    CHECK_FAILS(safetensors_read(fd, "m", 7, &s), ERR_FORMAT, "too few");
    CHECK_FAILS(safetensors_read(fd, "m", 1u << 30, &s), ERR_FORMAT, "at its end");
    close(fd);
    bytes_free(&b);
    temp_close(&temp);
}

int main(void)
{
    return check_run("safetensors", (struct check_case[]){{"a right header", test_right},
                                                          {"wrong tensors", test_wrong_tensors},
                                                          {"truncated and overflowing headers", test_wrong_sizes},
                                                          {"from a file", test_from_file},
                                                          {0}});
}
