/* gguf: right headers of both versions, every value type, the vocabulary, and every way in which a header can be wrong.
 */
#include "model/gguf.h"

#include "base/file.h"
#include "model/gguf_llama.h"
#include "model/gguf_vocab.h"
#include "model_files.h"
#include "tests/check.h"

static int parse(const struct bytes *b, struct gguf **g)
{
    uint8_t *exact = malloc(b->size ? b->size : 1); /* so that a read beyond it is seen */
    memcpy(exact, b->data, b->size);
    int rc = gguf_parse(exact, b->size, "x.gguf", g);
    free(exact);
    return rc;
}

/* Metadata of every type, and three tensors. */
static struct bytes full_file(uint32_t version)
{
    struct bytes b = {0};
    gguf_begin(&b, version, 3, 13);
    gguf_key(&b, "u8", GGUF_U8), put(&b, "\xff", 1);
    gguf_key(&b, "i8", GGUF_I8), put(&b, "\xff", 1);
    gguf_key(&b, "u16", GGUF_U16), put(&b, "\xff\xff", 2);
    gguf_key(&b, "i16", GGUF_I16), put(&b, "\xfe\xff", 2);
    gguf_put_u32(&b, "u32", UINT32_MAX);
    gguf_key(&b, "i32", GGUF_I32), put_u32(&b, (uint32_t)-3);
    gguf_put_f32(&b, "f32", 0.5f);
    gguf_key(&b, "bool", GGUF_BOOL), put(&b, "\1", 1);
    gguf_put_string(&b, "string", "text");
    gguf_key(&b, "u64", GGUF_U64), put_u64(&b, UINT64_MAX);
    gguf_key(&b, "i64", GGUF_I64), put_u64(&b, (uint64_t)-4);
    gguf_key(&b, "f64", GGUF_F64), put(&b, (double[]){0.25}, 8);
    gguf_key(&b, "strings", GGUF_ARRAY), put_u32(&b, GGUF_STRING), put_u64(&b, 3);
    put_string(&b, "a"), put_string(&b, ""), put_string(&b, "ccc");
    gguf_put_tensor(&b, "second", 32, 2, 2, 64);   /* Q4_0: 36 bytes */
    gguf_put_tensor(&b, "first", 3, 4, 0, 0);      /* F32: 48 bytes */
    gguf_put_tensor(&b, "third", 256, 0, 77, 128); /* a type nobody knows */
    gguf_align(&b, 32);
    put_zeros(&b, 128);
    return b;
}

static void check_values(const struct gguf *g)
{
    int64_t i = 0;
    double d = 0;
    bool flag = false;
    struct gguf_string s = {NULL, 0};
    struct gguf_array array;
    static const struct {
        const char *key;
        int64_t value;
    } ints[] = {{"u8", 255},         {"i8", -1},  {"u16", 65535}, {"i16", -2},
                {"u32", UINT32_MAX}, {"i32", -3}, {"i64", -4},    {"u64", INT64_MAX}};
    for (size_t k = 0; k < sizeof ints / sizeof *ints; k++) {
        CHECK_OK(gguf_int(g, ints[k].key, INT64_MIN, INT64_MAX, &i));
        CHECK(i == ints[k].value);
    }
    CHECK_OK(gguf_double(g, "f32", 0, 1, &d));
    CHECK(d == 0.5);
    CHECK_OK(gguf_double(g, "f64", 0, 1, &d));
    CHECK(d == 0.25);
    CHECK_OK(gguf_bool(g, "bool", &flag));
    CHECK(flag);
    CHECK_OK(gguf_string(g, "string", &s));
    CHECK(gguf_string_is(s, "text") && !gguf_string_is(s, "texts"));
    CHECK_OK(gguf_array(g, "strings", GGUF_STRING, GGUF_STRING, &array));
    const uint8_t *cursor = array.data;
    CHECK(array.n == 3 && gguf_string_is(gguf_next_string(&cursor), "a"));
    CHECK(gguf_string_is(gguf_next_string(&cursor), "") && gguf_string_is(gguf_next_string(&cursor), "ccc"));
    i = 7;
    CHECK_OK(gguf_int(g, "absent", 0, 1, &i));
    CHECK(i == 7 && !gguf_has(g, "absent") && gguf_has(g, "u8"));
    CHECK_OK(gguf_array(g, "absent", GGUF_I32, GGUF_I32, &array));
    CHECK(array.n == 0);
    CHECK_FAILS(gguf_int(g, "u8", 0, 254, &i), ERR_FORMAT, "u8 must lie within 0 and 254, found 255");
    CHECK_FAILS(gguf_int(g, "string", 0, 1, &i), ERR_FORMAT, "type string");
    CHECK_FAILS(gguf_double(g, "u32", 0, 1, &d), ERR_FORMAT, "u32 must be a float");
    CHECK_FAILS(gguf_double(g, "f32", 0, 0.1, &d), ERR_FORMAT, "f32");
    CHECK_FAILS(gguf_bool(g, "u8", &flag), ERR_FORMAT, "u8");
    CHECK_FAILS(gguf_string(g, "strings", &s), ERR_FORMAT, "strings");
    CHECK_FAILS(gguf_array(g, "strings", GGUF_I32, GGUF_U32, &array), ERR_FORMAT, "array of string");
    CHECK_FAILS(gguf_array(g, "u8", GGUF_I32, GGUF_U32, &array), ERR_FORMAT, "u8");
}

static void test_right(void)
{
    for (uint32_t version = 2; version <= 3; version++) {
        struct gguf *g = NULL;
        struct bytes b = full_file(version);
        CHECK_OK(parse(&b, &g));
        if (!g) return;
        check_values(g);
        CHECK(gguf_count(g) == 3 && !strcmp(gguf_at(g, 0)->name, "first"));
        const struct gguf_tensor *t = gguf_find(g, "second");
        CHECK(t && t->type == STORAGE_Q4_0 && t->n_dims == 2 && t->dim[0] == 2 && t->dim[1] == 32 && t->bytes == 36);
        CHECK(t && t->offset == b.size - 64 && !gguf_find(g, "fourth"));
        t = gguf_find(g, "third");
        CHECK(t && t->type == STORAGE_OTHER && t->bytes == 0);
        gguf_close(g);
        bytes_free(&b);
    }
}

static void test_truncated(void)
{
    struct bytes b = full_file(3);
    struct gguf *g = NULL;
    size_t whole = b.size;
    for (b.size = 0; b.size < whole - 128 + 64 + 36; b.size++) CHECK_FAILS(parse(&b, &g), ERR_FORMAT, "x.gguf: ");
    b.size = whole - 128 + 64 + 35;
    CHECK_FAILS(parse(&b, &g), ERR_FORMAT, "tensor second (36 bytes) lies beyond the end");
    bytes_free(&b);
}

/* One tensor's description after n keys that `keys` holds, and `data` bytes. */
static int parse_tensor(uint64_t n_keys, const struct bytes *keys, uint32_t n_dims, const uint64_t *dims, uint32_t type,
                        uint64_t offset, size_t data)
{
    struct bytes b = {0};
    struct gguf *g = NULL;
    gguf_begin(&b, 3, 1, n_keys);
    if (keys) put(&b, keys->data, keys->size);
    put_string(&b, "w");
    put_u32(&b, n_dims);
    for (uint32_t i = 0; i < n_dims && i < 8; i++) put_u64(&b, dims[i]);
    put_u32(&b, type);
    put_u64(&b, offset);
    gguf_align(&b, 32);
    put_zeros(&b, data);
    int rc = parse(&b, &g);
    bytes_free(&b);
    if (!rc) gguf_close(g);
    return rc;
}

static void test_wrong_tensors(void)
{
    static const struct {
        uint32_t n_dims;
        uint64_t dims[5];
        uint32_t type;
        uint64_t offset;
        int code;
        const char *part;
    } rows[] = {
        {1, {16}, 0, 0, OK, ""},
        {1, {17}, 0, 0, ERR_FORMAT, "beyond the end"},
        {1, {8}, 0, 32, OK, ""},
        {1, {9}, 0, 32, ERR_FORMAT, "beyond the end"},
        {1, {8}, 0, 16, ERR_FORMAT, "alignment"},
        {1, {1}, 0, 0xffffffffffffffe0u, ERR_FORMAT, "beyond the end"},
        {1, {1}, 0, 0x7fffffffffffffe0u, ERR_FORMAT, "beyond the end"},
        {0, {0}, 0, 0, ERR_FORMAT, "0 dimensions"},
        {5, {1, 1, 1, 1, 1}, 0, 0, ERR_FORMAT, "5 dimensions"},
        {2, {0x100000000u, 0x100000000u}, 0, 0, ERR_FORMAT, "overflows"},
        {2, {0x80000000u, 0x100000000u}, 0, 0, ERR_FORMAT, "overflows"},
        {2, {0x7fffffffffffffffu, 2}, 0, 0, ERR_FORMAT, "overflows"},
        {1, {0x4000000000000001u}, 0, 0, ERR_FORMAT, "overflows"}, /* times 4 wraps to 4 */
        {2, {0, UINT64_MAX}, 0, 0, ERR_FORMAT, "overflows"},
        {1, {33}, 2, 0, ERR_FORMAT, "block of 32"},
        {1, {128}, 12, 0, ERR_FORMAT, "block of 256"},
        {2, {32, 3}, 2, 0, OK, ""},
        {2, {32, 4}, 2, 0, ERR_FORMAT, "beyond the end"},
        {1, {5}, 4000000000u, 0, OK, ""},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        int rc = parse_tensor(0, NULL, rows[i].n_dims, rows[i].dims, rows[i].type, rows[i].offset, 64);
        bool good = rc == rows[i].code &&
                    (!rc || (strstr(status_message(), rows[i].part) && strstr(status_message(), "x.gguf: tensor w")));
        if (!good) fprintf(stderr, "row %zu: %s %s\n", i, status_name(rc), rc ? status_message() : "");
        CHECK(good);
    }
    struct bytes keys = {0};
    gguf_put_u32(&keys, "general.alignment", 64);
    CHECK_FAILS(parse_tensor(1, &keys, 1, (uint64_t[]){1}, 0, 32, 128), ERR_FORMAT, "alignment 64");
    keys.data[keys.size - 4] = 48;
    CHECK_FAILS(parse_tensor(1, &keys, 1, (uint64_t[]){1}, 0, 0, 128), ERR_FORMAT, "not a power of two");
    keys.data[keys.size - 4] = 0;
    CHECK_FAILS(parse_tensor(1, &keys, 1, (uint64_t[]){1}, 0, 0, 128), ERR_FORMAT, "general.alignment");
    bytes_free(&keys);
}

static void test_pairs(void)
{
    static const struct {
        const char *name;
        uint64_t offset;
        const char *part;
    } rows[] = {{"b", 32, "tensor b overlaps a"}, {"a", 64, "tensor a stands twice"}, {"b", 64, NULL}};
    for (size_t i = 0; i < 3; i++) {
        struct bytes b = {0};
        struct gguf *g = NULL;
        gguf_begin(&b, 3, 2, 0);
        gguf_put_tensor(&b, "a", 9, 0, 0, 0); /* 36 bytes */
        gguf_put_tensor(&b, rows[i].name, 8, 0, 0, rows[i].offset);
        gguf_align(&b, 32);
        put_zeros(&b, 96);
        if (rows[i].part)
            CHECK_FAILS(parse(&b, &g), ERR_FORMAT, rows[i].part);
        else
            CHECK_OK(parse(&b, &g));
        if (!rows[i].part) gguf_close(g);
        bytes_free(&b);
    }
}

static void test_wrong_keys(void)
{
    struct gguf *g = NULL;
    struct bytes b = {0};
    gguf_begin(&b, 3, 0, 2);
    gguf_put_u32(&b, "same", 1);
    gguf_put_u32(&b, "same", 2);
    CHECK_FAILS(parse(&b, &g), ERR_FORMAT, "key same stands twice");
    bytes_free(&b);
    static const struct {
        uint32_t type, element;
        uint64_t n;
        int code;
        const char *part;
    } rows[] = {
        {13, 0, 0, ERR_FORMAT, "unknown type 13"},
        {GGUF_ARRAY, 99, 1, ERR_FORMAT, "unknown type 99"},
        {GGUF_ARRAY, GGUF_ARRAY, 1, ERR_UNSUPPORTED, "array of arrays"},
        {GGUF_ARRAY, GGUF_U32, 0x4000000000000001u, ERR_FORMAT, "claims"},
        {GGUF_ARRAY, GGUF_U8, UINT64_MAX, ERR_FORMAT, "claims"},
        {GGUF_ARRAY, GGUF_STRING, 0x2000000000000001u, ERR_FORMAT, "claims"},
        {GGUF_ARRAY, GGUF_STRING, 12, ERR_FORMAT, "ends too early"},
        {GGUF_ARRAY, GGUF_U8, 101, ERR_FORMAT, "claims"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        gguf_begin(&b, 3, 0, 1);
        gguf_key(&b, "k", rows[i].type);
        put_u32(&b, rows[i].element);
        put_u64(&b, rows[i].n);
        for (int k = 0; k < 100; k++) put(&b, "\1", 1);
        CHECK_FAILS(parse(&b, &g), rows[i].code, rows[i].part);
        bytes_free(&b);
    }
    gguf_begin(&b, 3, 0, 1);
    put_u64(&b, UINT64_MAX - 3);
    put_zeros(&b, 100);
    CHECK_FAILS(parse(&b, &g), ERR_FORMAT, "ends too early");
    bytes_free(&b);
}

static void test_wrong_counts(void)
{
    static const struct {
        uint32_t version;
        uint64_t n_tensors, n_keys;
        int code;
        const char *part;
    } rows[] = {
        {1, 0, 0, ERR_UNSUPPORTED, "version 1"},
        {4, 0, 0, ERR_UNSUPPORTED, "version 4"},
        {3u << 24, 0, 0, ERR_UNSUPPORTED, "big-endian"},
        {3, 0, UINT64_MAX, ERR_FORMAT, "metadata keys"},
        {3, UINT64_MAX, 0, ERR_FORMAT, "tensors"},
        {3, 0, 100, ERR_FORMAT, "metadata keys"},
        {3, 100, 0, ERR_FORMAT, "tensors"},
        {3, 1u << 31, 0, ERR_FORMAT, "tensors"},
    };
    struct bytes b = {0};
    struct gguf *g = NULL;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        gguf_begin(&b, rows[i].version, rows[i].n_tensors, rows[i].n_keys);
        CHECK_FAILS(parse(&b, &g), rows[i].code, rows[i].part);
        bytes_free(&b);
    }
    put(&b, "GGML\3\0\0\0", 8);
    CHECK_FAILS(parse(&b, &g), ERR_FORMAT, "not a GGUF file");
    bytes_free(&b);
}

/* A header larger than the first prefix that is read. */
static void test_long_header(void)
{
    struct temp temp = temp_open();
    struct bytes b = {0};
    struct gguf *g = NULL;
    struct gguf_array array = {0};
    uint64_t size = 0;
    int fd = -1;
    gguf_begin(&b, 3, 1, 1);
    gguf_key(&b, "strings", GGUF_ARRAY);
    put_u32(&b, GGUF_STRING);
    put_u64(&b, 300);
    char text[10001] = "";
    memset(text, 'x', 10000);
    for (int i = 0; i < 300; i++) put_string(&b, text);
    gguf_put_tensor(&b, "w", 4, 0, 0, 0);
    gguf_align(&b, 32);
    size_t header = b.size;
    put(&b, (float[]){1, 2, 3, 4}, 16);
    put_zeros(&b, 8 << 20);
    temp_write(&temp, "m", b.data, b.size);
    CHECK_OK(file_open_read(temp_file(&temp, "m"), &fd, &size));
    CHECK_OK(gguf_read(fd, "m", size, &g));
    CHECK_OK(gguf_array(g, "strings", GGUF_STRING, GGUF_STRING, &array));
    const uint8_t *cursor = array.data;
    for (int i = 0; i < 299; i++) gguf_next_string(&cursor);
    CHECK(array.n == 300 && gguf_string_is(gguf_next_string(&cursor), text));
    CHECK(gguf_find(g, "w")->offset == header && gguf_header_bytes(g) == 4 << 20);
    gguf_close(g);
    CHECK_FAILS(gguf_read(fd, "m", 2 << 20, &g), ERR_FORMAT, "ends too early");
    close(fd);
    bytes_free(&b);
    temp_close(&temp);
}

static void test_names(void)
{
    static const char *const rows[][2] = {
        {"token_embd.weight", "model.embed_tokens.weight"},
        {"output_norm.weight", "model.norm.weight"},
        {"output.weight", "lm_head.weight"},
        {"blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"},
        {"blk.17.attn_k.bias", "model.layers.17.self_attn.k_proj.bias"},
        {"blk.17.attn_output.weight", "model.layers.17.self_attn.o_proj.weight"},
        {"blk.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight"},
        {"blk.3.attn_norm.weight", "model.layers.3.input_layernorm.weight"},
        {"blk.3.ffn_down.weight", "model.layers.3.mlp.down_proj.weight"},
        {"rope_freqs.weight", "rope_freqs.weight"},
        {"blk.3.ffn_gate_inp.weight", "blk.3.ffn_gate_inp.weight"},
        {"blk.x.attn_q.weight", "blk.x.attn_q.weight"},
        {"blk.1", "blk.1"},
        {"", ""},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char name[GGUF_LLAMA_MAX_NAME];
        gguf_llama_name(rows[i][0], name);
        if (strcmp(name, rows[i][1])) fprintf(stderr, "%s became %s\n", rows[i][0], name);
        CHECK(!strcmp(name, rows[i][1]));
    }
    bool seen[64] = {false};
    for (int64_t row = 64; row < 128; row++) { /* file row 2 j + s of a head is row s * 32 + j */
        int64_t to = gguf_llama_row(row, 64);
        CHECK(to == 64 + (row % 2) * 32 + (row - 64) / 2);
        seen[to - 64] = true;
    }
    for (int i = 0; i < 64; i++) CHECK(seen[i]);
}

static struct bytes vocab_file(const char *model, uint64_t n_scores, uint32_t eos)
{
    struct bytes b = {0};
    gguf_begin(&b, 3, 0, 8);
    gguf_put_string(&b, "tokenizer.ggml.model", model);
    gguf_put_string(&b, "tokenizer.ggml.pre", "smollm");
    gguf_key(&b, "tokenizer.ggml.tokens", GGUF_ARRAY), put_u32(&b, GGUF_STRING), put_u64(&b, 3);
    put_string(&b, "a"), put_string(&b, "b"), put_string(&b, "ab");
    gguf_key(&b, "tokenizer.ggml.scores", GGUF_ARRAY), put_u32(&b, GGUF_F32), put_u64(&b, n_scores);
    for (uint64_t i = 0; i < n_scores; i++) put(&b, (float[]){-(float)i}, 4);
    gguf_key(&b, "tokenizer.ggml.token_type", GGUF_ARRAY), put_u32(&b, GGUF_I32), put_u64(&b, 3);
    put_u32(&b, 3), put_u32(&b, 1), put_u32(&b, 6);
    gguf_key(&b, "tokenizer.ggml.merges", GGUF_ARRAY), put_u32(&b, GGUF_STRING), put_u64(&b, 1);
    put_string(&b, "a b");
    gguf_put_u32(&b, "tokenizer.ggml.eos_token_id", eos);
    gguf_key(&b, "tokenizer.ggml.add_bos_token", GGUF_BOOL), put(&b, "\0", 1);
    return b;
}

static int open_vocab(struct bytes b, struct gguf **g, struct gguf_vocab **v)
{
    int rc = parse(&b, g);
    bytes_free(&b);
    CHECK_OK(rc);
    rc = gguf_vocab_open(*g, v);
    if (rc) gguf_close(*g);
    return rc;
}

static void test_vocab(void)
{
    struct gguf *g = NULL;
    struct gguf_vocab *v = NULL;
    CHECK_OK(open_vocab(vocab_file("gpt2", 3, 2), &g, &v));
    if (!v) return;
    const struct tokenizer_vocab *t = gguf_vocab_get(v);
    CHECK(t->kind == TOKENIZER_BPE && !strcmp(t->pre, "smollm") && t->n == 3 && t->n_merges == 1);
    CHECK(t->token_size[2] == 2 && !memcmp(t->token[2], "ab", 2) && t->merge_size[0] == 3);
    CHECK(!memcmp(t->merge[0], "a b", 3) && t->score[2] == -2 && t->type[0] == 3 && t->type[2] == 6);
    CHECK(t->bos == -1 && t->eos == 2 && t->unk == -1 && t->add_bos == 0 && t->add_eos == -1);
    CHECK(t->add_space_prefix == -1);
    gguf_vocab_close(v);
    gguf_close(g);
    CHECK_FAILS(open_vocab(vocab_file("bert", 3, 2), &g, &v), ERR_UNSUPPORTED, "\"bert\"");
    CHECK_FAILS(open_vocab(vocab_file("llama", 2, 2), &g, &v), ERR_FORMAT, "scores has 2 entries for 3");
    CHECK_FAILS(open_vocab(vocab_file("llama", 3, 3), &g, &v), ERR_FORMAT, "eos_token_id is 3");
    CHECK_OK(open_vocab(vocab_file("llama", 3, UINT32_MAX), &g, &v));
    CHECK(gguf_vocab_get(v)->eos == -1 && gguf_vocab_get(v)->kind == TOKENIZER_SPM);
    gguf_vocab_close(v);
    gguf_close(g);
}

static void test_smollm2(void)
{
    const char *path = SOURCE_DIR "/models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
    struct tokenizer *t = NULL;
    char *chat_template = NULL;
    if (access(path, R_OK)) {
        fprintf(stderr, "skipped: %s is not there (launch/get-model smollm2 fetches it)\n", path);
        return;
    }
    CHECK_OK(gguf_vocab_open_tokenizer(path, &t));
    CHECK(t && tokenizer_size(t) == 49152 && tokenizer_find(t, "<|im_start|>") == 1 && tokenizer_eos(t) == 2);
    tokenizer_close(t);
    CHECK_OK(gguf_vocab_chat_template(path, &chat_template));
    CHECK(chat_template && strstr(chat_template, "<|im_start|>") != NULL);
    free(chat_template);
    CHECK_OK(gguf_vocab_chat_template(SOURCE_DIR "/tests/data/checkpoint/small.gguf", &chat_template));
    CHECK(chat_template == NULL);
}

int main(void)
{
    return check_run("gguf", (struct check_case[]){{"every value type, both versions", test_right},
                                                   {"truncated anywhere", test_truncated},
                                                   {"wrong tensors", test_wrong_tensors},
                                                   {"overlaps and duplicates", test_pairs},
                                                   {"wrong keys", test_wrong_keys},
                                                   {"wrong counts and versions", test_wrong_counts},
                                                   {"a header longer than the first read", test_long_header},
                                                   {"names and rows of llama", test_names},
                                                   {"vocabulary", test_vocab},
                                                   {"vocabulary of SmolLM2", test_smollm2},
                                                   {0}});
}
