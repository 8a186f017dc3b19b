/* tokenizer.json component by component against the reference; files that are broken or ask for what is not served;
 * what tokenizer_config.json adds; GGUF vocabularies that are broken. */
#include <cjson/cJSON.h>

#include "base/json.h"
#include "model/tokenizer.h"
#include "tests/check.h"
#include "tests/unit/tokenizer_fixture.h"
#include "tests/unit/tokenizer_lines.h"

enum { N_COMPONENT_LINES = 2000 };

static struct line_material *material;

/* The model of spm.json or bytes.json as JSON text. */
static char *model_text(const char *name)
{
    char path[512];
    cJSON *root = NULL;
    snprintf(path, sizeof path, TOKENIZER_DATA "%s.json", name);
    CHECK_OK(json_parse_file(path, 1 << 20, &root));
    char *text = cJSON_PrintUnformatted(json_get(root, "model"));
    cJSON_Delete(root);
    return text;
}

/* One hash over the ids of all lines, one over what they decode to. */
static void hash_lines(const struct tokenizer *t, uint32_t *ids_hash, uint32_t *text_hash)
{
    *ids_hash = *text_hash = 0;
    for (uint64_t i = 0; i < N_COMPONENT_LINES; i++) {
        struct line_writer line;
        int32_t *ids = NULL;
        char *text = NULL;
        size_t n = 0, size = 0;
        line_make(&line, material, i);
        CHECK_OK(tokenizer_encode(t, line.bytes, line.size, line_flags(i), &ids, &n));
        CHECK_OK(tokenizer_decode(t, ids, n, i % 2 == 0, &text, &size));
        *ids_hash = *ids_hash * 31 + line_hash(ids, n);
        *text_hash = *text_hash * 31 + line_hash_bytes(text, size);
        free(ids);
        free(text);
    }
}

static void check_component(const cJSON *item, const char *model)
{
    const char *name = json_get(item, "name")->valuestring;
    char *body = cJSON_PrintUnformatted(json_get(item, "body"));
    size_t size = strlen(body) + strlen(model) + 64;
    char *text = malloc(size);
    struct tokenizer *t = NULL;
    uint32_t ids, decoded;
    snprintf(text, size, "{\"version\":\"1.0\",\"model\":%s,%s", model, body + 1);
    CHECK_OK(tokenizer_open_json_memory(text, strlen(text), NULL, 0, name, &t));
    if (t) {
        hash_lines(t, &ids, &decoded);
        bool same_ids = ids == (uint32_t)json_get(item, "ids")->valuedouble;
        bool same_text = decoded == (uint32_t)json_get(item, "text")->valuedouble;
        if (!same_ids || !same_text)
            fprintf(stderr, "component \"%s\": ids %s, text %s\n", name, same_ids ? "same" : "DIFFER",
                    same_text ? "same" : "DIFFERS");
        CHECK(same_ids);
        CHECK(same_text);
    }
    tokenizer_close(t);
    free(body);
    free(text);
}

static void test_components(void)
{
    cJSON *cases = NULL;
    const cJSON *item;
    char *spm = model_text("spm"), *bytes = model_text("bytes");
    CHECK_OK(json_parse_file(TOKENIZER_DATA "components.json", 1 << 20, &cases));
    CHECK(cJSON_GetArraySize(cases) > 60);
    cJSON_ArrayForEach (item, cases)
        check_component(item, strcmp(json_get(item, "model")->valuestring, "spm") ? bytes : spm);
    cJSON_Delete(cases);
    cJSON_free(spm);
    cJSON_free(bytes);
}

#define MODEL "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2,\"c\":3},\"merges\":[\"a b\"]}"
#define DECODER "\"decoder\":{\"type\":\"ByteLevel\"}"

static int open_text(const char *text, const char *config, struct tokenizer **t)
{
    *t = NULL;
    return tokenizer_open_json_memory(text, strlen(text), config, config ? strlen(config) : 0, "t.json", t);
}

static void check_broken(const char *text, int code, const char *part)
{
    struct tokenizer *t = NULL;
    CHECK_FAILS(open_text(text, NULL, &t), code, part);
    CHECK_FAILS(open_text(text, NULL, &t), code, "t.json");
    tokenizer_close(t);
}

static void test_broken_model(void)
{
    check_broken("", ERR_FORMAT, "JSON");
    check_broken("[]", ERR_FORMAT, "an object expected");
    check_broken("{\"model\":", ERR_FORMAT, "not valid JSON");
    check_broken("{" MODEL "," DECODER ",\"x\":\"\xff\"}", ERR_FORMAT, "not UTF-8");
    check_broken("{" DECODER "}", ERR_FORMAT, "model");
    check_broken("{\"version\":\"2.0\"," MODEL "}", ERR_UNSUPPORTED, "version \"2.0\"");
    check_broken("{\"model\":{\"type\":\"Unigram\",\"vocab\":[]}}", ERR_UNSUPPORTED, "Unigram");
    check_broken("{\"model\":{\"type\":\"BPE\",\"merges\":[]}}", ERR_FORMAT, "model.vocab");
    check_broken("{\"model\":{\"vocab\":{},\"merges\":[]}}", ERR_FORMAT, "empty");
    check_broken("{\"model\":{\"vocab\":{\"a\":0}}}", ERR_FORMAT, "model.merges");
    check_broken("{\"model\":{\"vocab\":{\"a\":-1},\"merges\":[]}}", ERR_FORMAT, "id of token \"a\"");
    check_broken("{\"model\":{\"vocab\":{\"a\":1e18},\"merges\":[]}}", ERR_FORMAT, "id of token \"a\"");
    check_broken("{\"model\":{\"vocab\":{\"a\":0.5},\"merges\":[]}}", ERR_FORMAT, "id of token \"a\"");
    check_broken("{\"model\":{\"vocab\":{\"a\":\"0\"},\"merges\":[]}}", ERR_FORMAT, "id of token \"a\"");
    check_broken("{\"model\":{\"vocab\":{\"a\":0,\"b\":0},\"merges\":[]}}", ERR_FORMAT, "two tokens");
    check_broken("{\"model\":{\"vocab\":{\"a\":0,\"a\":1},\"merges\":[]}}", ERR_FORMAT, "twice");
    check_broken("{\"model\":{\"vocab\":{\"a\":0},\"merges\":[\"a x\"]}}", ERR_FORMAT,
                 "\"x\" is not in the vocabulary");
    check_broken("{\"model\":{\"vocab\":{\"a\":0},\"merges\":[\"a a\"]}}", ERR_FORMAT, "result \"aa\"");
    check_broken("{\"model\":{\"vocab\":{\"a\":0},\"merges\":[\"aa\"]}}", ERR_FORMAT, "merge 0");
    check_broken("{\"model\":{\"vocab\":{\"a\":0},\"merges\":[\"a a a\"]}}", ERR_FORMAT, "merge 0");
    check_broken("{\"model\":{\"vocab\":{\"a\":0},\"merges\":[[\"a\"]]}}", ERR_FORMAT, "merge 0");
    check_broken("{\"model\":{\"vocab\":{\"a\":0},\"merges\":[[\"a\",1]]}}", ERR_FORMAT, "merge 0");
    check_broken("{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"unk_token\":\"u\"}}", ERR_FORMAT, "unk_token \"u\"");
    check_broken("{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"dropout\":0.1}}", ERR_UNSUPPORTED, "dropout");
    check_broken("{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"end_of_word_suffix\":\"</w>\"}}", ERR_UNSUPPORTED,
                 "end_of_word_suffix");
    check_broken("{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"byte_fallback\":3}}", ERR_FORMAT, "byte_fallback");
}

static void test_broken_parts(void)
{
    static const struct {
        const char *member;
        int code;
        const char *part;
    } cases[] = {
        {"\"decoder\":null", ERR_UNSUPPORTED, "decoder"},
        {"\"decoder\":{\"type\":\"WordPiece\"}", ERR_UNSUPPORTED, "WordPiece"},
        {"\"decoder\":{\"type\":\"Sequence\"}", ERR_FORMAT, "decoders"},
        {"\"decoder\":{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}", ERR_UNSUPPORTED, "Strip"},
        {"\"decoder\":{\"type\":\"Replace\",\"content\":\" \"}", ERR_FORMAT, "Replace"},
        {"\"normalizer\":{\"type\":\"Lowercase\"}", ERR_UNSUPPORTED, "Lowercase"},
        {"\"normalizer\":{}", ERR_FORMAT, "no type"},
        {"\"normalizer\":7", ERR_FORMAT, "normalizer"},
        {"\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFKC\"}]}", ERR_UNSUPPORTED, "NFKC"},
        {"\"normalizer\":{\"type\":\"Prepend\"}", ERR_FORMAT, "prepend"},
        {"\"pre_tokenizer\":{\"type\":\"UnicodeScripts\"}", ERR_UNSUPPORTED, "UnicodeScripts"},
        {"\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\"}", ERR_FORMAT, "pattern"},
        {"\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"String\":\"a\"},\"behavior\":\"Odd\"}", ERR_FORMAT,
         "Odd"},
        {"\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(\"},\"behavior\":\"Removed\"}", ERR_FORMAT,
         "parenthesis"},
        {"\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\\\\b\"},\"behavior\":\"Removed\"}",
         ERR_UNSUPPORTED, "\"\\b\" at byte 0"},
        {"\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"[a&&b]\"},\"behavior\":\"Removed\"}",
         ERR_UNSUPPORTED, "&&"},
        {"\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a{1,2}+\"},\"behavior\":\"Removed\"}",
         ERR_UNSUPPORTED, "}+"},
        {"\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"__\"}", ERR_FORMAT, "one character"},
        {"\"pre_tokenizer\":{\"type\":\"Metaspace\",\"prepend_scheme\":\"x\"}", ERR_FORMAT, "prepend_scheme"},
        {"\"post_processor\":{\"type\":\"Other\"}", ERR_UNSUPPORTED, "Other"},
        {"\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[]}", ERR_UNSUPPORTED, "0 times"},
        {"\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"q\"}}]}",
         ERR_FORMAT, "\"q\""},
        {"\"post_processor\":{\"type\":\"RobertaProcessing\",\"cls\":[\"a\",99],\"sep\":[\"a\",0]}", ERR_FORMAT, "id"},
        {"\"added_tokens\":{}", ERR_FORMAT, "array"},
        {"\"added_tokens\":[1]", ERR_FORMAT, "objects"},
        {"\"added_tokens\":[{\"id\":9}]", ERR_FORMAT, "content"},
        {"\"added_tokens\":[{\"id\":9,\"content\":\"\"}]", ERR_FORMAT, "content"},
        {"\"added_tokens\":[{\"id\":9,\"content\":\"a\"}]", ERR_FORMAT, "0 in the vocabulary"},
        {"\"added_tokens\":[{\"id\":1,\"content\":\"new\"}]", ERR_FORMAT, "two tokens"},
        {"\"added_tokens\":[{\"id\":9,\"content\":\"x\"},{\"id\":9,\"content\":\"y\"}]", ERR_FORMAT, "two tokens"},
        {"\"added_tokens\":[{\"id\":1,\"content\":\"b\"},{\"id\":1,\"content\":\"b\"}]", ERR_FORMAT, "twice"},
        {"\"added_tokens\":[{\"content\":\"x\"}]", ERR_FORMAT, "id of token \"x\""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[1024];
        bool decoder = strstr(cases[i].member, "\"decoder\"") == cases[i].member;
        snprintf(text, sizeof text, "{" MODEL ",%s%s}", cases[i].member, decoder ? "" : "," DECODER);
        check_broken(text, cases[i].code, cases[i].part);
    }
}

/* Every prefix of a good file is refused, and none crashes. */
static void test_truncated(void)
{
    char *text;
    size_t size;
    CHECK_OK(file_read_all(TOKENIZER_DATA "bytes.json", 1 << 20, &text, &size));
    for (size_t cut = 0; cut < size; cut += 1 + cut / 16) {
        struct tokenizer *t = NULL;
        int rc = tokenizer_open_json_memory(text, cut, NULL, 0, "cut", &t);
        CHECK(rc == ERR_FORMAT);
        tokenizer_close(t);
    }
    free(text);
}

static void test_missing_file(void)
{
    struct tokenizer *t = NULL;
    CHECK_FAILS(tokenizer_open_json("absent/tokenizer.json", NULL, &t), ERR_IO, "absent/tokenizer.json");
    CHECK_FAILS(tokenizer_open_json(TOKENIZER_DATA "bytes.json", "absent/config.json", &t), ERR_IO,
                "absent/config.json");
}

static void test_config(void)
{
    static const char good[] = "{\"bos_token\":{\"content\":\"c\"},\"eos_token\":\"<e>\",\"add_bos_token\":true,"
                               "\"added_tokens_decoder\":{\"7\":{\"content\":\"<e>\",\"special\":true}}}";
    struct tokenizer *t;
    int32_t *ids;
    size_t n;
    CHECK_OK(open_text("{" MODEL "," DECODER "}", good, &t));
    CHECK(tokenizer_bos(t) == 3 && tokenizer_eos(t) == 7 && tokenizer_size(t) == 8);
    CHECK(tokenizer_find(t, "<e>") == 7 && tokenizer_is_special(t, 7) && tokenizer_is_special(t, 3));
    CHECK(tokenizer_find(t, "ab") == 2 && tokenizer_find(t, "none") == -1);
    CHECK(!tokenizer_token(t, 5) && !tokenizer_token(t, -1) && !tokenizer_token(t, 8));
    CHECK(!strcmp(tokenizer_token(t, 2), "ab"));
    CHECK_OK(tokenizer_encode(t, "ab<e>z", 6, TOKENIZER_ADD_SPECIAL | TOKENIZER_PARSE_SPECIAL, &ids, &n));
    CHECK(n == 2 && ids[0] == 2 && ids[1] == 7); /* no template, so no begin token; z is not in the vocabulary */
    free(ids);
    tokenizer_close(t);
    CHECK_FAILS(open_text("{" MODEL "," DECODER "}", "{\"bos_token\":\"none\"}", &t), ERR_FORMAT, "bos_token \"none\"");
    CHECK_FAILS(open_text("{" MODEL "," DECODER "}", "{\"bos_token\":3}", &t), ERR_FORMAT, "bos_token");
    CHECK_FAILS(open_text("{" MODEL "," DECODER "}", "[]", &t), ERR_FORMAT, "tokenizer_config.json");
    CHECK_FAILS(open_text("{" MODEL "," DECODER "}", "{\"added_tokens_decoder\":{\"x\":{\"content\":\"q\"}}}", &t),
                ERR_FORMAT, "entry \"x\"");
}

static void check_encode(const struct tokenizer *t, const char *text, unsigned flags, const char *want)
{
    char got[512] = "";
    int32_t *ids;
    size_t n, at = 0;
    CHECK_OK(tokenizer_encode(t, text, strlen(text), flags, &ids, &n));
    for (size_t i = 0; i < n; i++) at += (size_t)snprintf(got + at, sizeof got - at, "%s%d", i ? " " : "", ids[i]);
    if (strcmp(got, want)) fprintf(stderr, "\"%s\": %s, wanted %s\n", text, got, want);
    CHECK(!strcmp(got, want));
    free(ids);
}

/* Unknowns and partial byte fallback, in the order that the reference writes them. */
static void test_unknown(void)
{
    static const char fused[] =
        "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"u\":0,\"a\":1,\"<0xC3>\":2,\"<0xA9>\":3},\"merges\":[],"
        "\"unk_token\":\"u\",\"fuse_unk\":%s,\"byte_fallback\":true},\"decoder\":{\"type\":\"Sequence\",\"decoders\":["
        "{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"}]}}";
    char text[512];
    struct tokenizer *t;
    snprintf(text, sizeof text, fused, "true");
    CHECK_OK(open_text(text, NULL, &t));
    check_encode(t, "axxa", 0, "1 0 1");
    check_encode(t,
                 "x\xc3\xa9"
                 "a",
                 0, "2 3 0 1");
    check_encode(t, "", 3, "");
    tokenizer_close(t);
    snprintf(text, sizeof text, fused, "false");
    CHECK_OK(open_text(text, NULL, &t));
    check_encode(t, "axxa", 0, "1 0 0 1");
    check_encode(t, "xx", 0, "0 0");
    tokenizer_close(t);
}

/* A pattern that backtracks without end is stopped and reported, as this request's error. */
static void test_runaway_pattern(void)
{
    static const char evil[] = "{" MODEL "," DECODER ",\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":"
                               "\"(?:a+)+(?:a+)+(?:a+)+b\"},\"behavior\":\"Isolated\"}}";
    struct tokenizer *t;
    int32_t *ids;
    size_t n;
    char text[4000];
    memset(text, 'a', sizeof text);
    memcpy(text + sizeof text - 2, "cb", 2);
    CHECK_OK(open_text(evil, NULL, &t));
    CHECK_FAILS(tokenizer_encode(t, text, sizeof text, 0, &ids, &n), ERR_REQUEST, "too many steps");
    tokenizer_close(t);
}

static void test_too_long(void)
{
    struct tokenizer *t;
    int32_t *ids;
    size_t n;
    CHECK_OK(open_text("{" MODEL "," DECODER "}", NULL, &t));
    CHECK_FAILS(tokenizer_encode(t, "a", (size_t)TOKENIZER_MAX_TEXT + 1, 0, &ids, &n), ERR_REQUEST, "bytes");
    tokenizer_close(t);
}

static const struct tokenizer_vocab tiny = {
    .kind = TOKENIZER_BPE,
    .pre = "gpt-2",
    .n = 5,
    .token = (const char *const[]){"a", "b", "ab", "<s>", "</s>"},
    .token_size = (const size_t[]){1, 1, 2, 3, 4},
    .type = (const int32_t[]){1, 1, 1, 3, 3},
    .n_merges = 1,
    .merge = (const char *const[]){"a b"},
    .merge_size = (const size_t[]){3},
    .bos = 3,
    .eos = 4,
    .unk = -1,
    .add_bos = -1,
    .add_eos = -1,
    .add_space_prefix = -1,
};

static void check_bad_vocab(struct tokenizer_vocab v, int code, const char *part)
{
    struct tokenizer *t = NULL;
    CHECK_FAILS(tokenizer_open_vocab(&v, "m.gguf", &t), code, part);
    tokenizer_close(t);
}

static void test_broken_vocab(void)
{
    struct tokenizer_vocab v = tiny;
    v.pre = "unheard-of";
    check_bad_vocab(v, ERR_UNSUPPORTED, "\"unheard-of\"");
    v = tiny, v.n = 0;
    check_bad_vocab(v, ERR_FORMAT, "tokens");
    v = tiny, v.kind = (enum tokenizer_kind)9;
    check_bad_vocab(v, ERR_ARG, "kind 9");
    v = tiny, v.kind = TOKENIZER_SPM;
    check_bad_vocab(v, ERR_FORMAT, "scores");
    v = tiny, v.bos = 5;
    check_bad_vocab(v, ERR_FORMAT, "bos_token_id 5");
    v = tiny, v.bos = -1, v.add_bos = 1;
    check_bad_vocab(v, ERR_FORMAT, "add_bos_token");
    v = tiny, v.merge_size = (const size_t[]){2};
    check_bad_vocab(v, ERR_FORMAT, "merges: entry 0");
    v = tiny, v.merge = (const char *const[]){"a x"};
    check_bad_vocab(v, ERR_FORMAT, "\"x\"");
    v = tiny, v.n_merges = -1;
    check_bad_vocab(v, ERR_FORMAT, "merges");
    v = tiny, v.token_size = (const size_t[]){1, 1, 2, 3, 1 << 20};
    check_bad_vocab(v, ERR_FORMAT, "1048576 bytes");
}

static void test_vocab_frame(void)
{
    static const unsigned both = TOKENIZER_ADD_SPECIAL | TOKENIZER_PARSE_SPECIAL;
    struct tokenizer *t;
    struct tokenizer_vocab v = tiny;
    CHECK_OK(tokenizer_open_vocab(&v, "m.gguf", &t));
    check_encode(t, "ab<s>", both, "2 3");
    check_encode(t, "ab<s>a", 0, "2 0"); /* without PARSE_SPECIAL "<s>" is text, which this vocabulary cannot write */
    CHECK(tokenizer_bos(t) == 3 && tokenizer_eos(t) == 4);
    tokenizer_close(t);
    v.add_bos = v.add_eos = 1;
    CHECK_OK(tokenizer_open_vocab(&v, "m.gguf", &t));
    check_encode(t, "ab", both, "3 2 4");
    check_encode(t, "ab", TOKENIZER_PARSE_SPECIAL, "2");
    check_encode(t, "", both, "3 4");
    tokenizer_close(t);
    v = tiny, v.pre = "llama-bpe";
    CHECK_OK(tokenizer_open_vocab(&v, "m.gguf", &t));
    check_encode(t, "ab", both, "3 2"); /* llama 3 adds its begin token unless told otherwise */
    tokenizer_close(t);
}

/* Bytes that do not form a character; a space in front; ids without a token. */
static void test_decode_edges(void)
{
    struct tokenizer *t = NULL;
    char out[TOKEN_STREAM_BYTES], *text;
    size_t size;
    struct token_stream s;
    CHECK_OK(tokenizer_open_json(TOKENIZER_DATA "spm.json", NULL, &t));
    if (!t) return;
    const int32_t e2 = tokenizer_find(t, "<0xE2>"), x82 = tokenizer_find(t, "<0x82>"), ac = tokenizer_find(t, "<0xAC>");
    const int32_t a = tokenizer_find(t, "a"), space = tokenizer_find(t, "\xe2\x96\x81"), bos = tokenizer_find(t, "<s>");
    const int32_t ids[] = {bos, space, space, e2, x82, ac, e2, x82, a, -5, 1 << 30, e2, e2, x82};
    CHECK_OK(tokenizer_decode(t, ids, sizeof ids / sizeof *ids, true, &text, &size));
    CHECK(!strcmp(text, " \xe2\x82\xac\xef\xbf\xbd"
                        "a\xef\xbf\xbd\xef\xbf\xbd") &&
          size == strlen(text));
    free(text);
    CHECK_OK(tokenizer_decode(t, ids, 3, false, &text, &size));
    CHECK(!strcmp(text, "<s>  ")); /* only a space at the very start is dropped */
    free(text);
    CHECK_OK(tokenizer_decode(t, ids, 0, false, &text, &size));
    CHECK(size == 0 && !*text);
    free(text);
    token_stream_init(&s, t, true);
    CHECK(token_stream_push(&s, space, out) == 0);
    CHECK(token_stream_push(&s, e2, out) == 0 && token_stream_push(&s, x82, out) == 0);
    CHECK(token_stream_push(&s, ac, out) == 3 && !memcmp(out, "\xe2\x82\xac", 3));
    CHECK(token_stream_push(&s, e2, out) == 0 && token_stream_finish(&s, out) == 3 && !memcmp(out, "\xef\xbf\xbd", 3));
    CHECK(token_stream_push(&s, space, out) == 0); /* as after init */
    tokenizer_close(t);
}

int main(void)
{
    material = line_material_open(TOKENIZER_DATA "material.txt");
    if (!material) return 2;
    int rc = check_run("tokenizer_json", (struct check_case[]){{"components", test_components},
                                                               {"broken models", test_broken_model},
                                                               {"broken components", test_broken_parts},
                                                               {"truncated", test_truncated},
                                                               {"missing file", test_missing_file},
                                                               {"tokenizer_config.json", test_config},
                                                               {"unknown characters", test_unknown},
                                                               {"runaway pattern", test_runaway_pattern},
                                                               {"too long", test_too_long},
                                                               {"broken vocabularies", test_broken_vocab},
                                                               {"begin and end tokens", test_vocab_frame},
                                                               {"decoding edges", test_decode_edges},
                                                               {0}});
    line_material_close(material);
    return rc;
}
