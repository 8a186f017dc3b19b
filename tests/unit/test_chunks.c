/* test_chunks - cutting prompts into chunks: no cut inside an image, the judging rows together in the last chunk,
 * progress from every place, and a refusal exactly where no cutting exists. */
#include "runtime/chunks.h"

#include "tests/check.h"

enum { MAX_PROMPT = 512, MAX_SPANS = 16 };

struct prompt {
    int m, n_spans, image, room, judging;
    struct image_span span[MAX_SPANS];
};

static uint64_t state = 1;

/* A number from low to high, both included. */
static int random_int(int low, int high)
{
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return low + (int)((state >> 33) % (uint64_t)(high - low + 1));
}

static struct prompt random_prompt(void)
{
    struct prompt p = {.image = random_int(1, 30), .n_spans = random_int(0, 5)};
    int at = 0;
    for (int i = 0; i < p.n_spans; i++) {
        at += random_int(0, 1) ? random_int(0, 40) : 0; /* images may follow each other at once */
        p.span[i] = (struct image_span){at, at + p.image};
        at += p.image;
    }
    p.m = at + (at && random_int(0, 3) == 0 ? 0 : random_int(1, 60));
    p.room = random_int(p.image, 2 * p.image + 40);
    p.judging = random_int(1, p.m < 2 * p.room ? p.m : p.room);
    return p;
}

static bool inside_image(const struct prompt *p, int at)
{
    for (int i = 0; i < p->n_spans; i++)
        if (at > p->span[i].start && at < p->span[i].end) return true;
    return false;
}

/* Whether any cutting exists, by trying all places from the end backwards. */
static bool cutting_exists(const struct prompt *p)
{
    bool good[MAX_PROMPT + 1] = {false};
    for (int at = p->m - 1; at >= 0; at--) {
        if (inside_image(p, at)) continue;
        good[at] = p->m - at <= p->room && at <= p->m - p->judging;
        for (int end = at + 1; end < p->m && end - at <= p->room; end++) good[at] = good[at] || good[end];
    }
    return good[0];
}

static int next(const struct prompt *p, int done, int room)
{
    return chunk_next(p->m, done, room, p->span, p->n_spans, p->judging);
}

static bool possible(const struct prompt *p) { return chunk_possible(p->m, p->room, p->span, p->n_spans, p->judging); }

static void test_possible(void)
{
    int yes = 0, no = 0;
    for (int i = 0; i < 20000; i++) {
        struct prompt p = random_prompt();
        bool want = cutting_exists(&p);
        if (possible(&p) != want) {
            fprintf(stderr, "m %d room %d judging %d image %d: possible %d\n", p.m, p.room, p.judging, p.image, !want);
            CHECK(possible(&p) == want);
        }
        yes += want;
        no += !want;
    }
    CHECK(yes > 1000 && no > 1000);
}

/* Steps with whatever room others leave; a step with all the room always gets on. */
static void walk(const struct prompt *p)
{
    int done = 0, steps = 0;
    while (done < p->m && steps++ < 10 * MAX_PROMPT) {
        int room = random_int(0, 2) ? random_int(0, p->room) : p->room;
        int n = next(p, done, room);
        bool sound = n >= 0 && n <= room && (n > 0 || room < p->room) && !inside_image(p, done + n) &&
                     (done + n < p->m || done <= p->m - p->judging);
        if (!sound) fprintf(stderr, "m %d done %d room %d judging %d: chunk %d\n", p->m, done, room, p->judging, n);
        CHECK(sound);
        if (!sound) return;
        done += n;
    }
    CHECK(done == p->m);
}

static void test_walk(void)
{
    for (int i = 0; i < 20000; i++) {
        struct prompt p = random_prompt();
        if (possible(&p)) walk(&p);
    }
}

static void test_examples(void)
{
    struct image_span page = {5, 581};
    CHECK(chunk_next(600, 0, 1000, &page, 1, 16) == 600);
    CHECK(chunk_next(600, 0, 580, &page, 1, 16) == 5);   /* up to the image */
    CHECK(chunk_next(600, 5, 580, &page, 1, 16) == 579); /* up to the judging rows */
    CHECK(chunk_next(600, 5, 577, &page, 1, 16) == 577);
    CHECK(chunk_next(600, 581, 577, &page, 1, 16) == 19);
    CHECK(chunk_next(600, 5, 400, &page, 1, 16) == 0); /* waits */
    CHECK(chunk_next(1, 0, 1, NULL, 0, 1) == 1);
    CHECK(chunk_next(1, 0, 0, NULL, 0, 1) == 0);
    CHECK(chunk_possible(600, 576, &page, 1, 19));
    CHECK(!chunk_possible(600, 575, &page, 1, 1));
    CHECK(!chunk_possible(100, 64, NULL, 0, 65));
    CHECK(chunk_possible(100, 100, NULL, 0, 100));
}

int main(void)
{
    static const struct check_case cases[] = {{"examples", test_examples},
                                              {"possible exactly where a cutting exists", test_possible},
                                              {"any walk is sound and ends", test_walk},
                                              {0}};
    return check_run("chunks", cases);
}
