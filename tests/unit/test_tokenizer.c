/* The ids of 20,000 lines for each kind of vocabulary, against hashes of what the reference libraries gave
 * (tests/tools/make_tokenizer_cases.py); what these ids decode to; llama.cpp's own test vectors. */
#include <time.h>

#include "model/tokenizer_internal.h"
#include "tests/check.h"
#include "tests/unit/tokenizer_fixture.h"
#include "tests/unit/tokenizer_lines.h"

/* Of all lines, by the Python generator. */
#define LINES_HASH 0x517f3548u

static struct line_material *material;

/* The line with each invalid sequence as U+FFFD: what decoding must give back. */
static size_t clean(const char *bytes, size_t size, char *out)
{
    char *to = out;
    for (size_t i = 0; i < size;) {
        uint32_t code;
        i += utf8_next(bytes + i, size - i, &code);
        to += utf8_put(code, to);
    }
    return (size_t)(to - out);
}

/* Pushes the ids one by one: every part must be whole characters, and together they must be `text`. */
static bool streams_as(const struct tokenizer *t, const int32_t *ids, size_t n, const char *text, size_t size)
{
    struct token_stream stream;
    char part[TOKEN_STREAM_BYTES];
    size_t done = 0;
    token_stream_init(&stream, t, false);
    for (size_t i = 0; i <= n; i++) {
        size_t k = i < n ? token_stream_push(&stream, ids[i], part) : token_stream_finish(&stream, part);
        if (k > size - done || memcmp(part, text + done, k)) return false;
        if (!tokenizer__is_utf8(part, k)) return false;
        done += k;
    }
    return done == size;
}

/* Whether every byte of the text has a token: SmolLM2's vocabulary lacks some, which no text in its training held. */
static bool has_all_bytes(const struct tokenizer *t, const char *text, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        char name[8];
        name[utf8_put(tokenizer__byte_char((unsigned char)text[i]), name)] = 0;
        if (tokenizer_find(t, name) < 0) return false;
    }
    return true;
}

enum exactness {
    EXACT_BYTES, /* byte-level: every line that the vocabulary has the bytes for comes back as it was */
    EXACT_SPACES /* SentencePiece: U+2581 comes back as a space, and a special token adds one behind it */
};

/* Decoding gives the cleaned line back, perhaps with a begin token in front of it; streaming gives the same. */
static bool round_trips(const struct tokenizer *t, const int32_t *ids, size_t n, const struct line_writer *line,
                        unsigned flags, enum exactness exactness)
{
    char *text = NULL, want[3 * MAX_LINE + 1], *hit;
    size_t size, expected = clean(line->bytes, line->size, want);
    if (tokenizer_decode(t, ids, n, false, &text, &size)) return false;
    bool good = streams_as(t, ids, n, text, size);
    while (exactness == EXACT_SPACES && (hit = memmem(want, expected, "\xe2\x96\x81", 3))) {
        *hit = ' ';
        memmove(hit + 1, hit + 3, (size_t)(want + expected - hit - 3));
        expected -= 2;
    }
    bool applies = exactness == EXACT_BYTES ? has_all_bytes(t, want, expected) : !(flags & TOKENIZER_PARSE_SPECIAL);
    if (applies) good = good && size >= expected && !memcmp(text + size - expected, want, expected);
    if (applies && !flags) good = good && size == expected;
    free(text);
    return good;
}

static void check_lines(const struct tokenizer *t, const char *name, enum exactness exactness)
{
    char path[512], *expected;
    size_t size;
    int wrong = 0, lost = 0;
    snprintf(path, sizeof path, TOKENIZER_DATA "%s.ids", name);
    CHECK_OK(file_read_all(path, 1 << 20, &expected, &size));
    CU_ASSERT_FATAL(size == 4 * N_LINES);
    for (uint64_t i = 0; i < N_LINES; i++) {
        struct line_writer line;
        int32_t *ids;
        uint32_t want;
        size_t n;
        line_make(&line, material, i);
        memcpy(&want, expected + 4 * i, 4);
        int rc = tokenizer_encode(t, line.bytes, line.size, line_flags(i), &ids, &n);
        if (rc || line_hash(ids, n) != want) {
            if (!wrong++) fprintf(stderr, "%s: line %d differs: %.*s\n", name, (int)i, (int)line.size, line.bytes);
        }
        if (rc) continue;
        if (!round_trips(t, ids, n, &line, line_flags(i), exactness)) {
            if (!lost++)
                fprintf(stderr, "%s: line %d is not decoded: %.*s\n", name, (int)i, (int)line.size, line.bytes);
        }
        free(ids);
    }
    if (wrong || lost) fprintf(stderr, "%s: %d lines differ, %d are not decoded\n", name, wrong, lost);
    CHECK(wrong == 0);
    CHECK(lost == 0);
    free(expected);
}

/* The lines of NAME.out are the ids of the texts in vectors.inp, encoded without special tokens. The answers for
 * smollm2 are of a time when the second text was another word. */
static void check_vectors(const struct tokenizer *t, const char *name)
{
    static const char separator[] = "\n__ggml_vocab_test__\n";
    char path[512], *texts, *answers;
    size_t size, answers_size;
    int n_texts = 0;
    snprintf(path, sizeof path, TOKENIZER_DATA "%s.out", name);
    CHECK_OK(file_read_all(TOKENIZER_DATA "vectors.inp", 1 << 20, &texts, &size));
    CHECK_OK(file_read_all(path, 1 << 20, &answers, &answers_size));
    char *answer = answers;
    for (char *text = texts, *next; text < texts + size; text = next, n_texts++) {
        char *end = strstr(text, separator);
        next = end ? end + strlen(separator) : texts + size;
        int32_t *ids;
        size_t n, same = 0;
        size_t text_size = (size_t)((end ? end : next) - text);
        bool other = n_texts == 1 && !strcmp(name, "smollm2");
        CHECK_OK(tokenizer_encode(t, other ? "F\xc3\xbchrer" : text, other ? 7 : text_size, 0, &ids, &n));
        char *stop = strchr(answer, '\n');
        for (; answer < stop; same++) {
            int32_t id = (int32_t)strtol(answer, &answer, 10);
            if (same >= n || ids[same] != id) break;
        }
        if (same != n || answer != stop) fprintf(stderr, "%s: vector %d differs\n", name, n_texts);
        CHECK(same == n && answer == stop);
        answer = stop + 1;
        free(ids);
    }
    CHECK(n_texts >= 46); /* the last text of the file is cut by its end */
    free(texts);
    free(answers);
}

static void check_vocab(const char *name, enum exactness exactness, bool vectors)
{
    struct tokenizer *t = NULL;
    CHECK_OK(fixture_tokenizer(name, &t));
    if (!t) return;
    check_lines(t, name, exactness);
    if (vectors) check_vectors(t, name);
    tokenizer_close(t);
}

static void check_json(const char *name, const char *path, const char *config, enum exactness exactness)
{
    struct tokenizer *t = NULL;
    CHECK_OK(tokenizer_open_json(path, config, &t));
    if (!t) return;
    check_lines(t, name, exactness);
    tokenizer_close(t);
}

static void test_demo(void)
{
    check_json("demo", SOURCE_DIR "/models/demo-vlm/tokenizer.json",
               SOURCE_DIR "/models/demo-vlm/tokenizer_config.json", EXACT_BYTES);
}

static void test_spm_json(void) { check_json("spm", TOKENIZER_DATA "spm.json", NULL, EXACT_SPACES); }

static void test_smollm2(void) { check_vocab("smollm2", EXACT_BYTES, true); }

static void test_gpt2(void) { check_vocab("gpt-2", EXACT_BYTES, true); }

static void test_default(void) { check_vocab("default", EXACT_BYTES, false); }

static void test_llama_bpe(void) { check_vocab("llama-bpe", EXACT_BYTES, true); }

static void test_qwen2(void) { check_vocab("qwen2", EXACT_BYTES, true); }

static void test_llama_spm(void) { check_vocab("llama-spm", EXACT_SPACES, true); }

/* The sentencepiece library knows no special tokens inside a text, so none are recognised here. */
static void test_sentencepiece(void)
{
    struct fixture f;
    struct tokenizer *t = NULL;
    CHECK_OK(fixture_open(&f, "sentencepiece"));
    for (int i = 0; i < f.vocab.n; i++)
        if (f.type[i] == TOKENIZER_TYPE_CONTROL || f.type[i] == TOKENIZER_TYPE_UNKNOWN)
            f.type[i] = TOKENIZER_TYPE_UNUSED;
    CHECK_OK(tokenizer_open_vocab(&f.vocab, "sentencepiece", &t));
    if (t) check_lines(t, "sentencepiece", EXACT_SPACES);
    tokenizer_close(t);
    fixture_close(&f);
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* MB of text a second of CPU time. */
static double speed(const struct tokenizer *t, const char *text, size_t size, size_t *n)
{
    int32_t *ids;
    double start = seconds();
    CHECK_OK(tokenizer_encode(t, text, size, TOKENIZER_PARSE_SPECIAL, &ids, n));
    free(ids);
    return (double)size / 1e6 / (seconds() - start);
}

/* A megabyte without a word boundary must take n log n steps, not n squared: seconds, not hours. The bound is loose,
 * for sanitizers and busy machines; the figure printed is what a release build is judged by. */
static void test_speed(void)
{
    static const char *const names[] = {"smollm2", "llama-spm"};
    static const char *const sentences[] = {
        "The reader opened the letter and found that the invoice for the third quarter had not been paid. ",
        "a",
        " ",
        "ab",
        "\n",
        "7",
        "\xe5\xa5\xbd",
        "\xff",
        " \xe2\x96\x81",
        "<|im_start|"};
    size_t size = 1 << 20, n;
    char *text = malloc(size);
    for (size_t v = 0; v < sizeof names / sizeof *names; v++) {
        struct tokenizer *t = NULL;
        CHECK_OK(fixture_tokenizer(names[v], &t));
        for (size_t s = 0; t && s < sizeof sentences / sizeof *sentences; s++) {
            size_t k = strlen(sentences[s]);
            for (size_t i = 0; i < size; i++) text[i] = sentences[s][i % k];
            double rate = speed(t, text, size, &n);
            if (!s) printf("%s: %.1f MB/s of English text ", names[v], rate);
            if (rate < 0.05) fprintf(stderr, "%s: \"%.20s\" repeated: %.3f MB/s\n", names[v], sentences[s], rate);
            CHECK(rate >= 0.05);
            CHECK(n > size / 256);
        }
        tokenizer_close(t);
    }
    free(text);
}

static void test_generator(void)
{
    uint32_t h = 0;
    for (uint64_t i = 0; i < N_LINES; i++) {
        struct line_writer line;
        line_make(&line, material, i);
        h = h * 31 + line_hash_bytes(line.bytes, line.size);
    }
    CHECK(h == LINES_HASH); /* else the two generators differ, and every other test says nothing */
}

int main(void)
{
    material = line_material_open(TOKENIZER_DATA "material.txt");
    if (!material) return 2;
    int rc = check_run("tokenizer", (struct check_case[]){{"the lines are those of the reference", test_generator},
                                                          {"demo vocabulary", test_demo},
                                                          {"SmolLM2", test_smollm2},
                                                          {"SentencePiece-style tokenizer.json", test_spm_json},
                                                          {"llama SPM", test_llama_spm},
                                                          {"sentencepiece library", test_sentencepiece},
                                                          {"llama 3", test_llama_bpe},
                                                          {"qwen2", test_qwen2},
                                                          {"gpt-2", test_gpt2},
                                                          {"default", test_default},
                                                          {"speed", test_speed},
                                                          {0}});
    line_material_close(material);
    return rc;
}
