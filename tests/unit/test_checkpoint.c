/* checkpoint: any rectangle equals the same part of the whole, in every type and order; names of every layout; only the
 * needed bytes are read; and directories that do not fit together are refused by name. */
#include "model/checkpoint.h"

#include <sys/stat.h>

#include "base/file.h"
#include "model/dequant.h"
#include "model_files.h"
#include "tests/check.h"

#define DATA SOURCE_DIR "/tests/data/checkpoint/"
#define DEMO SOURCE_DIR "/models/demo-vlm"
#define SMOLLM2 SOURCE_DIR "/models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

/* A small random number, the same in every run. */
static int64_t draw(int64_t below)
{
    static uint64_t state = 88172645463325252u;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (int64_t)(state % (uint64_t)below);
}

/* The whole tensor as floats, malloc'd. */
static float *read_whole(struct checkpoint *c, const struct checkpoint_tensor *t)
{
    float *whole = malloc((size_t)(t->rows * t->cols) * sizeof *whole + 1);
    CHECK_OK(checkpoint_read(c, t->name, 0, t->rows, 0, t->cols, DTYPE_F32, whole));
    return whole;
}

static uint16_t narrow(float f, enum dtype dtype) { return dtype == DTYPE_F16 ? float_to_half(f) : float_to_bfloat(f); }

/* Whether rows and columns of tensor t, read as dtype, are those of `whole`. */
static bool rectangle_equals(struct checkpoint *c, const struct checkpoint_tensor *t, const float *whole, int64_t row,
                             int64_t n_rows, int64_t col, int64_t n_cols, enum dtype dtype)
{
    size_t n = (size_t)(n_rows * n_cols);
    char *got = malloc(n * dtype_size(dtype) + 1);
    got[n * dtype_size(dtype)] = 77;
    CHECK_OK(checkpoint_read(c, t->name, row, n_rows, col, n_cols, dtype, got));
    bool equal = got[n * dtype_size(dtype)] == 77;
    for (size_t i = 0; i < n && equal; i++) {
        float want = whole[(row + (int64_t)i / n_cols) * t->cols + col + (int64_t)i % n_cols];
        if (dtype == DTYPE_F32)
            equal = ((float *)got)[i] == want;
        else
            equal = ((uint16_t *)got)[i] == narrow(want, dtype);
    }
    if (!equal)
        fprintf(stderr, "%s: rows %lld + %lld, columns %lld + %lld as %s differ\n", t->name, (long long)row,
                (long long)n_rows, (long long)col, (long long)n_cols, dtype_name(dtype));
    free(got);
    return equal;
}

/* Random rectangles of every tensor, among them full and nearly full rows. */
static void check_rectangles(struct checkpoint *c, int tries)
{
    for (int i = 0; i < checkpoint_count(c); i++) {
        struct checkpoint_tensor t;
        checkpoint_at(c, i, &t);
        float *whole = read_whole(c, &t);
        for (int k = 0; k < tries; k++) {
            int64_t row = draw(t.rows), n_rows = 1 + draw(t.rows - row);
            int64_t col = k % 3 == 0 ? 0 : draw(k % 3 == 1 ? t.cols : 1 + t.cols / 16);
            int64_t n_cols = k % 3 == 1 ? 1 + draw(t.cols - col) : t.cols - col;
            CHECK(rectangle_equals(c, &t, whole, row, n_rows, col, n_cols, (enum dtype)draw(3)));
        }
        free(whole);
    }
}

static void test_demo(void)
{
    struct checkpoint *c = NULL;
    struct checkpoint_tensor t;
    enum dtype dtype;
    CHECK_OK(checkpoint_open(DEMO, &c));
    if (!c) return;
    CHECK(checkpoint_find(c, "model.embed_tokens.weight", &t) && t.rows == 1536 && t.cols == 256 && t.n_dims == 2);
    CHECK(!strcmp(t.type_name, "BF16") && t.readable && strstr(t.file, "safetensors") != NULL);
    CHECK(checkpoint_find(c, "model.layers.9.mlp.down_proj.weight", &t) && t.rows == 256 && t.cols == 512);
    CHECK(checkpoint_find(c, "multi_modal_projector.linear_1.bias", &t) && t.rows == 256 && t.cols == 1);
    CHECK(checkpoint_find(c, "vision_tower.vision_model.embeddings.patch_embedding.weight", &t));
    CHECK(t.n_dims == 4 && t.dim[1] == 3 && t.dim[3] == 14 && t.rows == 256 && t.cols == 588);
    CHECK(!checkpoint_find(c, "lm_head.weight", &t) && !checkpoint_find(c, "", NULL));
    CHECK_OK(checkpoint_natural_dtype(c, "model.norm.weight", &dtype));
    CHECK(dtype == DTYPE_BF16);
    for (int i = 1; i < checkpoint_count(c); i++) CHECK(strcmp(checkpoint_name(c, i - 1), checkpoint_name(c, i)) < 0);
    check_rectangles(c, 6);
    checkpoint_close(c);
}

/* Two ranks with half of each matrix read together little more than the file, as the system counts it. */
static void test_bytes_read(void)
{
    uint64_t asked = 0, before = file_bytes_read_by_process(), file_bytes = 0;
    for (int rank = 0; rank < 2; rank++) {
        struct checkpoint *c = NULL;
        CHECK_OK(checkpoint_open(DEMO, &c));
        if (!c) return;
        for (int i = 0; i < checkpoint_count(c); i++) {
            struct checkpoint_tensor t;
            checkpoint_at(c, i, &t);
            bool by_rows = i % 2 == 0 || t.cols == 1;
            int64_t rows = by_rows ? t.rows / 2 : t.rows, cols = by_rows ? t.cols : t.cols / 2;
            char *out = malloc((size_t)(rows * cols) * 2 + 1);
            CHECK_OK(checkpoint_read(c, t.name, by_rows ? rank * rows : 0, rows, by_rows ? 0 : rank * cols, cols,
                                     DTYPE_BF16, out));
            free(out);
        }
        asked += checkpoint_bytes_read(c);
        file_bytes = checkpoint_file_bytes(c);
        checkpoint_close(c);
    }
    uint64_t counted = file_bytes_read_by_process() - before;
    CHECK(asked <= file_bytes + file_bytes / 100 && asked >= file_bytes - file_bytes / 100);
    CHECK(before == 0 || (counted >= asked && counted <= asked + 200000)); /* two reads of the index, /proc itself */
}

static void test_gguf_equals_hugging_face(void)
{
    struct temp temp = temp_open();
    struct checkpoint *gguf = NULL, *want = NULL;
    CHECK(symlink(DATA "small.safetensors", temp_file(&temp, "model.safetensors")) == 0);
    CHECK_OK(checkpoint_open(DATA "small.gguf", &gguf));
    CHECK_OK(checkpoint_open(temp.path, &want));
    CHECK(gguf && want && checkpoint_count(gguf) == checkpoint_count(want));
    for (int i = 0; gguf && want && i < checkpoint_count(want); i++) {
        struct checkpoint_tensor t, stored;
        checkpoint_at(want, i, &t);
        CHECK(checkpoint_find(gguf, t.name, &stored) && stored.rows == t.rows && stored.cols == t.cols);
        float *expected = read_whole(want, &t), *got = read_whole(gguf, &t);
        CHECK(!memcmp(expected, got, (size_t)(t.rows * t.cols) * 4));
        free(expected);
        free(got);
    }
    if (gguf) check_rectangles(gguf, 60);
    if (want) check_rectangles(want, 10);
    enum dtype dtype;
    CHECK_OK(checkpoint_natural_dtype(gguf, "model.embed_tokens.weight", &dtype));
    CHECK(dtype == DTYPE_F16);
    CHECK_OK(checkpoint_natural_dtype(gguf, "model.layers.0.mlp.up_proj.weight", &dtype));
    CHECK(dtype == DTYPE_BF16);
    checkpoint_close(gguf);
    checkpoint_close(want);
    temp_close(&temp);
}

/* Tensors larger than the bounce buffer, and rows larger than it. */
static void test_large(void)
{
    struct temp temp = temp_open();
    struct checkpoint *c = NULL;
    struct bytes b =
        safetensors_bytes("{\"wide\":{\"dtype\":\"F16\",\"shape\":[2,3000000],\"data_offsets\":[0,12000000]},"
                          "\"long\":{\"dtype\":\"F32\",\"shape\":[6000000],\"data_offsets\":[12000000,36000000]}}",
                          0);
    uint16_t *values = malloc(36000000);
    for (int i = 0; i < 6000000; i++) values[i] = (uint16_t)(i % 30000); /* finite halves */
    for (int i = 0; i < 6000000; i++) ((float *)values)[3000000 + i] = (float)i;
    put(&b, values, 36000000);
    temp_write(&temp, "model.safetensors", b.data, b.size);
    CHECK_OK(checkpoint_open(temp.path, &c));
    for (int i = 0; c && i < 2; i++) {
        struct checkpoint_tensor t;
        checkpoint_at(c, i, &t);
        float *whole = read_whole(c, &t);
        CHECK(i ? whole[5999999] == half_to_float(5999999 % 30000) : whole[5999999] == 5999999.0f);
        CHECK(rectangle_equals(c, &t, whole, 0, t.rows, 0, t.cols, DTYPE_BF16));
        CHECK(rectangle_equals(c, &t, whole, 1, t.rows - 1, 0, t.cols, DTYPE_F32));
        if (t.cols > 1) CHECK(rectangle_equals(c, &t, whole, 0, 2, 1, t.cols - 1, DTYPE_BF16));
        if (t.cols > 1) CHECK(rectangle_equals(c, &t, whole, 0, 2, 1500000, 7, DTYPE_F16));
        free(whole);
    }
    checkpoint_close(c);
    free(values);
    bytes_free(&b);
    temp_close(&temp);
}

/* A file with one F16 element under each of these names. */
static void write_named(const struct temp *temp, const char *file, const char *const *names, int n)
{
    char header[4096] = "{";
    for (int i = 0; i < n; i++)
        sprintf(header + strlen(header), "%s\"%s\":{\"dtype\":\"F16\",\"shape\":[1],\"data_offsets\":[%d,%d]}",
                i ? "," : "", names[i], 2 * i, 2 * i + 2);
    struct bytes b = safetensors_bytes(strcat(header, "}"), 2 * (size_t)n);
    temp_write(temp, file, b.data, b.size);
    bytes_free(&b);
}

static void test_layouts(void)
{
    static const char *const canonical[] = {"model.embed_tokens.weight",
                                            "model.layers.3.mlp.up_proj.weight",
                                            "model.norm.weight",
                                            "lm_head.weight",
                                            "multi_modal_projector.linear_1.weight",
                                            "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"};
    static const char *const layouts[][6] = {
        {"language_model.model.embed_tokens.weight", "language_model.model.layers.3.mlp.up_proj.weight",
         "language_model.model.norm.weight", "language_model.lm_head.weight", "multi_modal_projector.linear_1.weight",
         "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"},
        {"model.language_model.embed_tokens.weight", "model.language_model.layers.3.mlp.up_proj.weight",
         "model.language_model.norm.weight", "lm_head.weight", "model.multi_modal_projector.linear_1.weight",
         "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"},
        {"language_model.model.embed_tokens.weight", "language_model.model.layers.3.mlp.up_proj.weight",
         "language_model.model.norm.weight", "language_model.lm_head.weight", "multi_modal_projector.linear_1.weight",
         "vision_tower.encoder.layers.0.mlp.fc1.bias"}, /* transformers 5 */
        {"model.language_model.embed_tokens.weight", "model.language_model.layers.3.mlp.up_proj.weight",
         "model.language_model.norm.weight", "lm_head.weight", "model.multi_modal_projector.linear_1.weight",
         "model.vision_tower.encoder.layers.0.mlp.fc1.bias"},
        {"model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight",
         "multi_modal_projector.linear_1.weight", "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"},
    };
    for (size_t k = 0; k < sizeof layouts / sizeof *layouts; k++) {
        struct temp temp = temp_open();
        struct checkpoint *c = NULL;
        struct checkpoint_tensor t;
        write_named(&temp, "model.safetensors", layouts[k], 6);
        CHECK_OK(checkpoint_open(temp.path, &c));
        for (int i = 0; i < 6; i++) {
            CHECK(checkpoint_find(c, canonical[i], &t) && !strcmp(t.name, canonical[i]));
            CHECK(!strcmp(t.stored_name, layouts[k][i]));
            uint16_t value = 0;
            CHECK_OK(checkpoint_read(c, canonical[i], 0, 1, 0, 1, DTYPE_F16, &value));
            CHECK(value == ((2 * i + 1) << 8 | 2 * i));
        }
        checkpoint_close(c);
        temp_close(&temp);
    }
    CHECK(checkpoint_name_is_ignored("vision_tower.vision_model.embeddings.position_ids"));
    CHECK(checkpoint_name_is_ignored("model.layers.3.self_attn.rotary_emb.inv_freq"));
    CHECK(checkpoint_name_is_ignored("vision_tower.vision_model.post_layernorm.bias"));
    CHECK(checkpoint_name_is_ignored("rope_freqs.weight") && !checkpoint_name_is_ignored("model.norm.weight"));
}

static int open_only(const char *path)
{
    struct checkpoint *c = NULL;
    int rc = checkpoint_open(path, &c);
    if (!rc) checkpoint_close(c);
    return rc;
}

static void test_index(void)
{
    static const struct {
        const char *weight_map;
        int code;
        const char *part;
    } rows[] = {
        {"{\"a\":\"1.safetensors\",\"b\":\"1.safetensors\",\"c\":\"2.safetensors\"}", OK, ""},
        {"{\"a\":\"1.safetensors\",\"c\":\"2.safetensors\"}", ERR_FORMAT, "tensor b of"},
        {"{\"a\":\"1.safetensors\",\"b\":\"2.safetensors\",\"c\":\"2.safetensors\"}", ERR_FORMAT, "tensor b is in"},
        {"{\"a\":\"1.safetensors\",\"b\":\"1.safetensors\",\"c\":\"2.safetensors\",\"d\":\"2.safetensors\"}",
         ERR_FORMAT, "tensor d is not in 2.safetensors"},
        {"{\"a\":\"1.safetensors\",\"b\":\"1.safetensors\",\"c\":\"3.safetensors\"}", ERR_IO, "tensor c: "},
        {"{\"a\":\"1.safetensors\",\"b\":\"1.safetensors\",\"c\":\"4.safetensors\"}", ERR_FORMAT, "stands twice"},
        {"{\"a\":\"../1.safetensors\"}", ERR_FORMAT, "tensor a names the file"},
        {"{\"a\":\"/etc/passwd\"}", ERR_FORMAT, "tensor a names the file"},
        {"{\"a\":\"..\"}", ERR_FORMAT, "tensor a names the file"},
        {"{\"a\":\"\"}", ERR_FORMAT, "tensor a names the file"},
        {"{\"a\":7}", ERR_FORMAT, "tensor a does not name"},
        {"{}", ERR_FORMAT, "weight_map"},
        {"[]", ERR_FORMAT, "weight_map"},
        {"{\"a\":\"junk.safetensors\"}", ERR_FORMAT, "junk.safetensors"},
    };
    struct temp temp = temp_open();
    write_named(&temp, "1.safetensors", (const char *const[]){"a", "b"}, 2);
    write_named(&temp, "2.safetensors", (const char *const[]){"c"}, 1);
    write_named(&temp, "4.safetensors", (const char *const[]){"c", "a"}, 2);
    temp_text(&temp, "junk.safetensors", "version https://git-lfs.github.com/spec/v1");
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char index[400];
        snprintf(index, sizeof index, "{\"metadata\":{},\"weight_map\":%s}", rows[i].weight_map);
        temp_text(&temp, "model.safetensors.index.json", index);
        if (rows[i].code)
            CHECK_FAILS(open_only(temp.path), rows[i].code, rows[i].part);
        else
            CHECK_OK(open_only(temp.path));
    }
    temp_close(&temp);
}

static void test_refused_directories(void)
{
    struct temp temp = temp_open();
    CHECK_FAILS(open_only(temp.path), ERR_IO, "neither model.safetensors nor");
    temp_text(&temp, "pytorch_model-00002-of-00002.bin", "x");
    temp_text(&temp, "pytorch_model-00001-of-00002.bin", "x");
    CHECK_FAILS(open_only(temp.path), ERR_UNSUPPORTED, "pickle files (pytorch_model-00001-of-00002.bin)");
    CHECK_FAILS(open_only("/nonexistent"), ERR_IO, "/nonexistent");
    CHECK_FAILS(open_only(DATA "small.safetensors"), ERR_IO, "model directory or .gguf");
    CHECK_FAILS(open_only("/nonexistent.gguf"), ERR_IO, "/nonexistent.gguf");
    static const char *const twice[] = {"lm_head.weight", "language_model.lm_head.weight"};
    write_named(&temp, "model.safetensors", twice, 2);
    CHECK_FAILS(open_only(temp.path), ERR_FORMAT, "tensor lm_head.weight stands twice");
    mkdir(temp_file(&temp, "x.gguf"), 0700);
    char path[512];
    snprintf(path, sizeof path, "%s", temp_file(&temp, "x.gguf"));
    CHECK_FAILS(open_only(path), ERR_IO, "not a regular file");
    rmdir(path);
    struct bytes b = {0};
    gguf_begin(&b, 3, 0, 1);
    gguf_put_string(&b, "general.architecture", "clip");
    temp_write(&temp, "x.gguf", b.data, b.size);
    CHECK_FAILS(open_only(path), ERR_UNSUPPORTED, "general.architecture is \"clip\"");
    bytes_free(&b);
    temp_close(&temp);
}

static void test_wrong_reads(void)
{
    struct temp temp = temp_open();
    struct checkpoint *c = NULL;
    enum dtype dtype;
    float out[16];
    struct bytes b = safetensors_bytes("{\"w\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
                                       "\"i\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[24,32]},"
                                       "\"s\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[32,36]},"
                                       "\"e\":{\"dtype\":\"F32\",\"shape\":[0,5],\"data_offsets\":[36,36]},"
                                       "\"x\":{\"dtype\":\"F32\",\"shape\":[0,9007199254740992,9007199254740992],"
                                       "\"data_offsets\":[36,36]}}",
                                       36);
    temp_write(&temp, "model.safetensors", b.data, b.size);
    CHECK_OK(checkpoint_open(temp.path, &c));
    CHECK_FAILS(checkpoint_read(c, "v", 0, 1, 0, 1, DTYPE_F32, out), ERR_FORMAT, "no tensor v");
    CHECK_FAILS(checkpoint_natural_dtype(c, "v", &dtype), ERR_FORMAT, "no tensor v");
    CHECK_FAILS(checkpoint_read(c, "i", 0, 1, 0, 1, DTYPE_F32, out), ERR_UNSUPPORTED, "tensor i is of type I64");
    CHECK_FAILS(checkpoint_read(c, "w", 0, 1, 0, 1, DTYPE_I32, out), ERR_ARG, "int32");
    static const int64_t ranges[][4] = {{0, 3, 0, 3}, {2, 1, 0, 3},  {-1, 1, 0, 3},        {0, 2, 1, 3},
                                        {0, 2, 3, 1}, {0, 2, 0, -1}, {INT64_MAX, 1, 0, 3}, {1, INT64_MAX, 0, 3}};
    for (int i = 0; i < 8; i++)
        CHECK_FAILS(checkpoint_read(c, "w", ranges[i][0], ranges[i][1], ranges[i][2], ranges[i][3], DTYPE_F32, out),
                    ERR_FORMAT, "tensor w is [2, 3]");
    CHECK_OK(checkpoint_read(c, "w", 2, 0, 0, 3, DTYPE_F32, NULL));
    CHECK_OK(checkpoint_read(c, "s", 0, 1, 0, 1, DTYPE_F32, out));
    CHECK_OK(checkpoint_read(c, "e", 0, 0, 0, 0, DTYPE_F32, NULL));
    CHECK(truncate(temp_file(&temp, "model.safetensors"), (off_t)b.size - 20) == 0);
    CHECK_FAILS(checkpoint_read(c, "w", 0, 2, 0, 3, DTYPE_F32, out), ERR_IO, "tensor w: ");
    checkpoint_close(c);
    CHECK_FAILS(open_only(temp.path), ERR_FORMAT, "model.safetensors: tensor w ends at byte");
    bytes_free(&b);
    temp_close(&temp);
}

static void test_smollm2(void)
{
    struct checkpoint *c = NULL;
    struct checkpoint_tensor t;
    if (access(SMOLLM2, R_OK)) {
        fprintf(stderr, "skipped: %s is not there (launch/get-model smollm2 fetches it)\n", SMOLLM2);
        return;
    }
    CHECK_OK(checkpoint_open(SMOLLM2, &c));
    if (!c) return;
    CHECK(checkpoint_count(c) == 272 && checkpoint_find(c, "model.layers.29.self_attn.k_proj.weight", &t));
    CHECK(t.rows == 192 && t.cols == 576 && !strcmp(t.type_name, "Q4_1") &&
          !checkpoint_find(c, "lm_head.weight", NULL));
    static const char *const names[] = {"model.layers.0.self_attn.q_proj.weight",
                                        "model.layers.7.self_attn.k_proj.weight", "model.layers.7.mlp.down_proj.weight",
                                        "model.norm.weight"};
    for (int i = 0; i < 4; i++) {
        CHECK(checkpoint_find(c, names[i], &t));
        float *whole = read_whole(c, &t);
        for (int k = 0; k < 40; k++) {
            int64_t row = draw(t.rows), n_rows = 1 + draw(t.rows - row), col = draw(t.cols);
            int64_t n_cols = 1 + draw(t.cols - col);
            CHECK(rectangle_equals(c, &t, whole, row, n_rows, k % 2 ? col : 0, k % 2 ? n_cols : t.cols, DTYPE_F16));
        }
        free(whole);
    }
    checkpoint_close(c);
}

int main(void)
{
    return check_run("checkpoint", (struct check_case[]){{"the demo model", test_demo},
                                                         {"only the needed bytes", test_bytes_read},
                                                         {"GGUF equals Hugging Face", test_gguf_equals_hugging_face},
                                                         {"larger than the buffer", test_large},
                                                         {"names of every layout", test_layouts},
                                                         {"index and shards", test_index},
                                                         {"refused directories", test_refused_directories},
                                                         {"wrong reads", test_wrong_reads},
                                                         {"SmolLM2", test_smollm2},
                                                         {0}});
}
