/* test_pages - rank 0's page accounts against plain sums over ranks, layers and sequences. */
#include "kvcache/pages.h"

#include "parallel/shard.h"
#include "tests/check.h"

enum { LAYERS = 5, SLOTS = 7, PAGE = 16, MAX_RANKS = 4 };

static uint64_t state = 7;

static int random_int(int low, int high)
{
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return low + (int)((state >> 33) % (uint64_t)(high - low + 1));
}

/* The same books kept in full: what each slot holds in each layer. */
struct books {
    int ranks, heads[MAX_RANKS * LAYERS], tokens[SLOTS][LAYERS];
    int64_t total;
};

static int64_t held(const struct books *b, int rank, int slot)
{
    int64_t pages = 0;
    for (int l = 0; l < LAYERS; l++)
        pages += (int64_t)b->heads[rank * LAYERS + l] * ((b->tokens[slot][l] + PAGE - 1) / PAGE);
    return pages;
}

static int64_t least_free(const struct books *b)
{
    int64_t least = b->total;
    for (int r = 0; r < b->ranks; r++) {
        int64_t left = b->total;
        for (int s = 0; s < SLOTS; s++) left -= held(b, r, s);
        if (left < least) least = left;
    }
    return least;
}

static struct books open_books(struct pages **pages, int ranks, int kv_heads, int64_t total)
{
    struct books b = {.ranks = ranks, .total = total};
    for (int r = 0; r < ranks; r++)
        for (int l = 0; l < LAYERS; l++) b.heads[r * LAYERS + l] = shard_kv_heads(kv_heads, ranks, r, l).kv_count;
    CHECK_OK(pages_open(ranks, LAYERS, PAGE, SLOTS, b.heads, total, pages));
    return b;
}

static void set_all(struct books *b, int slot, int tokens)
{
    for (int l = 0; l < LAYERS; l++) b->tokens[slot][l] = tokens;
}

/* Reserves if the books say so; what pages_reserve said must agree. */
static void try_reserve(struct books *b, struct pages *pages, int slot)
{
    int tokens = random_int(1, 200);
    set_all(b, slot, tokens);
    bool fits = least_free(b) >= 0;
    CHECK(pages_reserve(pages, slot, tokens) == fits);
    if (!fits) set_all(b, slot, 0);
}

/* After a prompt: each layer keeps something of what it had, and room for the answer stays. */
static void resize(struct books *b, struct pages *pages, int slot)
{
    int length[LAYERS], least = b->tokens[slot][0];
    for (int l = 1; l < LAYERS; l++)
        if (b->tokens[slot][l] < least) least = b->tokens[slot][l];
    int extra = random_int(0, least - 1);
    for (int l = 0; l < LAYERS; l++) {
        length[l] = random_int(1, b->tokens[slot][l] - extra);
        b->tokens[slot][l] = length[l] + extra;
    }
    pages_resize(pages, slot, length, extra, false);
}

static void test_random(void)
{
    for (int round = 0; round < 60; round++) {
        struct pages *pages;
        struct books b = open_books(&pages, random_int(1, MAX_RANKS), random_int(1, 9), random_int(20, 400));
        for (int i = 0; i < 200; i++) {
            int slot = random_int(0, SLOTS - 1);
            if (!b.tokens[slot][0]) {
                try_reserve(&b, pages, slot);
            } else if (random_int(0, 1)) {
                resize(&b, pages, slot);
            } else {
                pages_release(pages, slot);
                set_all(&b, slot, 0);
            }
            CHECK(pages_free(pages) == least_free(&b));
        }
        for (int slot = 0; slot < SLOTS; slot++) pages_release(pages, slot);
        CHECK(pages_free(pages) == b.total);
        pages_close(pages);
    }
}

static void test_fits(void)
{
    struct pages *pages;
    /* 3 KV heads on 2 ranks: 5 layers give 8 and 7 lanes; the fuller rank decides. */
    struct books b = open_books(&pages, 2, 3, 24);
    CHECK(b.heads[0] + b.heads[LAYERS] == 3);
    CHECK(pages_fits(pages, 3 * PAGE));
    CHECK(!pages_fits(pages, 3 * PAGE + 1));
    CHECK(pages_reserve(pages, 0, PAGE) && pages_reserve(pages, 1, 2 * PAGE));
    CHECK(!pages_reserve(pages, 2, 1));
    CHECK(pages_fits(pages, 3 * PAGE)); /* of an empty pool */
    CHECK(pages_free(pages) == 0);
    pages_release(pages, 1);
    CHECK(pages_free(pages) == 16);
    pages_release(pages, 1); /* nothing left to give back */
    CHECK(pages_free(pages) == 16);
    int length[LAYERS] = {100, 100, 100, 100, 100};
    pages_resize(pages, 0, length, 5, false); /* never more than was reserved */
    CHECK(pages_free(pages) == 16);
    pages_close(pages);
    pages_close(NULL);
}

/* After a prompt a page may hold more tokens than before; a slot never gets more pages than it had. */
static void test_kept_pages(void)
{
    struct pages *pages;
    struct books b = open_books(&pages, 1, 2, 100);
    int length[LAYERS] = {40, 40, 40, 40, 1};
    CHECK(b.heads[0] == 2);
    pages_use_storage(pages, 2 * PAGE, 0);
    CHECK(pages_reserve(pages, 0, 3 * PAGE) && pages_free(pages) == 100 - LAYERS * 2 * 3);
    pages_resize_plain(pages, 0, length, 8, false);
    CHECK(pages_free(pages) == 100 - (4 * 2 * 3 + 2));
    pages_resize(pages, 0, length, 8, false);
    CHECK(pages_free(pages) == 100 - (4 * 2 * 2 + 2));
    pages_release(pages, 0);
    CHECK(pages_reserve(pages, 0, 3 * PAGE));
    pages_resize(pages, 0, length, 8, true); /* heads share 96 tokens (18): at most a page less a token more each */
    CHECK(pages_free(pages) == 100 - (4 * ((2 * 48 + 2 * 31) / 32) + (2 * 9 + 2 * 31) / 32));
    pages_release(pages, 0);
    CHECK(pages_free(pages) == 100);
    pages_close(pages);
}

/* Lanes in two parts: what they take while they are rewritten is reserved, what they take afterwards is kept. */
static void test_parts(void)
{
    struct pages *pages;
    struct books b = open_books(&pages, 1, 2, 90);
    int length[LAYERS] = {40, 40, 40, 40, 1};
    CHECK(b.heads[0] == 2);
    pages_use_storage(pages, 2 * PAGE, 20); /* 20 tokens take 2 pages, fewer than the codes of 80 */
    CHECK(pages_fits(pages, 100) && !pages_fits(pages, 113));
    CHECK(pages_reserve(pages, 0, 100) && pages_free(pages) == 90 - LAYERS * 2 * (7 + 2));
    pages_resize(pages, 0, length, 8, false); /* up to 36 plain, 28 in codes; 9 plain */
    CHECK(pages_free(pages) == 90 - (4 * 2 * (3 + 1) + 2));
    pages_release(pages, 0);
    CHECK(pages_reserve(pages, 0, 30) && pages_free(pages) == 90 - LAYERS * 2 * (2 + 1));
    pages_release(pages, 0);
    CHECK(pages_reserve(pages, 0, 20) && pages_free(pages) == 90 - LAYERS * 2 * 2); /* all of it plain */
    pages_release(pages, 0);
    CHECK(pages_reserve(pages, 0, 100));
    pages_resize(pages, 0, length, 8, true); /* any head may have 36 plain ones */
    CHECK(pages_free(pages) == 90 - (4 * (2 * 3 + (2 * 48 + 2 * 31) / 32) + 2 * 3 + (2 * 9 + 2 * 31) / 32));
    pages_release(pages, 0);
    CHECK(pages_free(pages) == 90);
    pages_close(pages);
}

int main(void)
{
    static const struct check_case cases[] = {{"what fits", test_fits},
                                              {"random reservations against plain sums", test_random},
                                              {"pages of another size after a prompt", test_kept_pages},
                                              {"lanes in two parts", test_parts},
                                              {0}};
    return check_run("pages", cases);
}
