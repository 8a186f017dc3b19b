/* test_text_stream - ids to text with stop strings, against a naive search in the decoded text, on random answers. */
#include "runtime/text_stream.h"

#include "base/utf8.h"
#include "tests/check.h"

#define DEMO SOURCE_DIR "/models/demo-vlm"
enum { MAX_IDS = 60, MAX_TEXT = 1 << 16 };

static struct tokenizer *tokenizer;
static uint64_t state = 3;

static int random_int(int low, int high)
{
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return low + (int)((state >> 33) % (uint64_t)(high - low + 1));
}

struct answer {
    int32_t ids[MAX_IDS];
    int n, min_tokens;
    struct request request;
};

/* What the whole must come to: where it ends, and whether a stop string ended it. */
struct expected {
    char text[MAX_TEXT];
    size_t size;
    int n_pushed;
    bool stopped;
};

/* Text after every token is decoded from scratch; the first token that completes a stop string ends it. A stop string
 * that was complete before min_tokens is text like any other. */
static void expect(const struct answer *a, struct expected *e)
{
    struct token_stream stream;
    const struct request *r = &a->request;
    token_stream_init(&stream, tokenizer, true);
    e->size = 0;
    e->stopped = false;
    for (int i = 0; i < a->n; i++) {
        size_t before = e->size;
        e->size += token_stream_push(&stream, a->ids[i], e->text + e->size);
        e->n_pushed = i + 1;
        size_t cut = SIZE_MAX, length = 0;
        for (int s = 0; s < r->n_stops && i + 1 >= a->min_tokens; s++) {
            size_t n = strlen(r->stop[s]);
            for (size_t at = 0; at + n <= e->size; at++) {
                if (at + n <= before || memcmp(e->text + at, r->stop[s], n)) continue;
                if (at < cut) cut = at, length = n;
                break;
            }
        }
        if (cut == SIZE_MAX) continue;
        e->size = cut + (r->include_stop ? length : 0);
        e->stopped = true;
        return;
    }
    e->size += token_stream_finish(&stream, e->text + e->size);
}

static bool whole_characters(const char *text, size_t size)
{
    for (size_t at = 0; at < size;) {
        uint32_t c;
        size_t n = utf8_next(text + at, size - at, &c);
        if (c == 0xfffd && n != 3) return false;
        at += n;
    }
    return true;
}

/* Some of the text itself, so that it is found; from any byte that begins a character. */
static void add_stop(struct request *r, const char *text, size_t size)
{
    size_t from = (size_t)random_int(0, (int)size - 1), n = (size_t)random_int(1, 12);
    while (from > 0 && (text[from] & 0xc0) == 0x80) from--;
    if (from + n > size) n = size - from;
    while (from + n < size && (text[from + n] & 0xc0) == 0x80) n++;
    char *stop = calloc(n + 2, 1);
    memcpy(stop, text + from, n);
    if (random_int(0, 2) == 0) stop[n - 1] = 'q'; /* one that begins as the text does and goes on otherwise */
    if (!whole_characters(stop, strlen(stop)) || !*stop) {
        free(stop);
        return;
    }
    r->stop[r->n_stops++] = stop;
}

static void make_answer(struct answer *a)
{
    char *text;
    size_t size;
    int vocabulary = tokenizer_size(tokenizer);
    *a = (struct answer){.n = random_int(1, MAX_IDS), .request = {.include_stop = random_int(0, 1)}};
    /* Few different ids make repeats, which is where searches go wrong; bytes make characters of several tokens. */
    int kinds = random_int(1, 20), base = random_int(0, vocabulary - 1);
    for (int i = 0; i < a->n; i++) a->ids[i] = (base + 37 * random_int(0, kinds)) % vocabulary;
    if (random_int(0, 3) == 0) a->min_tokens = random_int(1, a->n);
    CHECK_OK(tokenizer_decode(tokenizer, a->ids, (size_t)a->n, true, &text, &size));
    for (int i = random_int(0, 3); i > 0 && size; i--) add_stop(&a->request, text, size);
    free(text);
}

/* Runs the stream as a sequence does; everything shown must be a beginning of the final text. */
static void run_answer(const struct answer *a, const struct expected *e)
{
    static char shown[MAX_TEXT];
    struct text_stream s;
    size_t n_shown = 0, size;
    bool stopped = false, whole = true;
    int pushed = 0;
    CHECK_OK(text_stream_begin(&s, tokenizer, &a->request));
    while (pushed < a->n && !stopped) {
        CHECK_OK(text_stream_push(&s, a->ids[pushed], pushed + 1 >= a->min_tokens, &stopped));
        pushed++;
        if (stopped) break;
        const char *text = text_stream_show(&s, false, &size);
        whole = whole && whole_characters(text, size);
        memcpy(shown + n_shown, text, size);
        n_shown += size;
    }
    if (!stopped) CHECK_OK(text_stream_finish(&s));
    const char *text = text_stream_show(&s, true, &size);
    memcpy(shown + n_shown, text, size);
    n_shown += size;
    bool same =
        stopped == e->stopped && pushed == e->n_pushed && s.size == e->size && !memcmp(s.text, e->text, e->size);
    if (!same)
        fprintf(stderr, "got \"%s\" after %d tokens, wanted \"%.*s\" after %d\n", s.text, pushed, (int)e->size, e->text,
                e->n_pushed);
    CHECK(same);
    CHECK(whole && n_shown == e->size && !memcmp(shown, e->text, e->size));
    CHECK(s.text[s.size] == 0);
    text_stream_end(&s);
}

static void test_random(void)
{
    static struct expected e;
    int stopped = 0, rounds = 4000;
    for (int i = 0; i < rounds; i++) {
        struct answer a;
        make_answer(&a);
        expect(&a, &e);
        run_answer(&a, &e);
        stopped += e.stopped;
        for (int s = 0; s < a.request.n_stops; s++) free(a.request.stop[s]);
    }
    CHECK(stopped > rounds / 8 && stopped < rounds);
}

/* The ids of a text, for answers written by hand. */
static int encode(const char *text, int32_t *out)
{
    int32_t *ids;
    size_t n;
    CHECK_OK(tokenizer_encode(tokenizer, text, strlen(text), 0, &ids, &n));
    CHECK(n <= MAX_IDS);
    memcpy(out, ids, n * sizeof *out);
    free(ids);
    return (int)n;
}

static void check_text(const char *text, const char *stop, bool include, const char *want, size_t shown_early)
{
    struct answer a = {.request = {.include_stop = include}};
    struct text_stream s;
    size_t size, shown = 0;
    bool stopped = false;
    char *copy = strdup(stop);
    a.n = encode(text, a.ids);
    a.request.stop[a.request.n_stops++] = copy;
    CHECK_OK(text_stream_begin(&s, tokenizer, &a.request));
    for (int i = 0; i < a.n && !stopped; i++) {
        CHECK_OK(text_stream_push(&s, a.ids[i], true, &stopped));
        if (stopped) break;
        (void)text_stream_show(&s, false, &size);
        shown += size;
    }
    CHECK(shown == shown_early);
    if (strcmp(s.text, want) || shown != shown_early)
        fprintf(stderr, "\"%s\" stop \"%s\": got \"%s\", %zu bytes shown\n", text, stop, s.text, shown);
    CHECK(!strcmp(s.text, want));
    text_stream_end(&s);
    free(copy);
}

static void test_examples(void)
{
    check_text("12345678", "456", false, "123", 3);
    check_text("12345678", "456", true, "123456", 3);
    check_text("1234", "45", false, "1234", 3); /* held back: a stop string may begin there */
    check_text("aabaabaab", "baac", false, "aabaabaab", 8);
    check_text("12312124", "12124", false, "123", 3);
    check_text("99", "9", false, "", 0);
}

int main(void)
{
    static const struct check_case cases[] = {
        {"examples", test_examples}, {"random answers against a naive search", test_random}, {0}};
    if (tokenizer_open_json(DEMO "/tokenizer.json", DEMO "/tokenizer_config.json", &tokenizer)) {
        fprintf(stderr, "%s\n", status_message());
        return 2;
    }
    int failed = check_run("text_stream", cases);
    tokenizer_close(tokenizer);
    return failed;
}
