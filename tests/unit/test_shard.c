/* test_shard - the shard plan, over every count that a model can have: complete, disjoint, level, and equal to the
 * plan that the oracles of the cache policies were dealt by. */
#include "base/json.h"
#include "parallel/shard.h"
#include "tests/check.h"

enum { MAX_HEADS = 64, MAX_RANKS = 8, MAX_LAYERS = 10 };

/* owners_ok - whole groups dealt: every head has exactly one owner, in ascending order, all counted, one apart. */
static bool owners_ok(int heads, int ranks, int layer)
{
    int next = 0;
    for (int rank = 0; rank < ranks; rank++) {
        struct shard_heads s = shard_kv_heads(heads, ranks, rank, layer);
        if (s.kv_first != next || !s.counted) return false;
        if (s.kv_count < heads / ranks || s.kv_count > (heads + ranks - 1) / ranks) return false;
        if (s.kv_count < 1 || s.kv_count > shard_max_kv_heads(heads, ranks)) return false;
        next += s.kv_count;
    }
    return next == heads;
}

/* replicas_ok - more ranks than groups: one group a rank, ascending, every group held and counted exactly once. */
static bool replicas_ok(int heads, int ranks, int layer)
{
    int counted = 0, previous = -1;
    for (int rank = 0; rank < ranks; rank++) {
        struct shard_heads s = shard_kv_heads(heads, ranks, rank, layer);
        if (s.kv_count != 1 || s.kv_first < previous || s.kv_first > previous + 1) return false;
        if (s.counted != (s.kv_first != previous)) return false;
        counted += s.counted;
        previous = s.kv_first;
    }
    return counted == heads && previous == heads - 1 && shard_max_kv_heads(heads, ranks) == 1;
}

static void test_kv_heads_partition(void)
{
    for (int heads = 1; heads <= MAX_HEADS; heads++)
        for (int ranks = 1; ranks <= MAX_RANKS; ranks++)
            for (int layer = 0; layer < MAX_LAYERS; layer++)
                CHECK(heads >= ranks ? owners_ok(heads, ranks, layer) : replicas_ok(heads, ranks, layer));
}

static void test_kv_heads_level_over_layers(void)
{
    for (int heads = 1; heads <= MAX_HEADS; heads++)
        for (int ranks = 1; ranks <= MAX_RANKS; ranks++)
            for (int layers = 1; layers <= MAX_LAYERS; layers++) {
                int64_t least = INT64_MAX, most = 0;
                for (int rank = 0; rank < ranks; rank++) {
                    int64_t n = shard_kv_heads_total(heads, ranks, rank, layers);
                    least = n < least ? n : least;
                    most = n > most ? n : most;
                }
                CHECK(most - least <= 1);
            }
}

static void test_query_heads(void)
{
    const int cases[][2] = {{9, 3}, {6, 6}, {7, 7}, {14, 2}, {14, 7}, {32, 8}, {5, 5}, {64, 1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int ranks = 1; ranks <= MAX_RANKS; ranks++)
            for (int layer = 0; layer < MAX_LAYERS; layer++) {
                int64_t counted = 0;
                for (int rank = 0; rank < ranks; rank++) {
                    struct shard_heads kv = shard_kv_heads(cases[i][1], ranks, rank, layer);
                    struct shard_range q = shard_query_heads(cases[i][0], cases[i][1], ranks, rank, layer);
                    int group = cases[i][0] / cases[i][1];
                    CHECK(q.first == kv.kv_first * group && q.count == kv.kv_count * group);
                    if (kv.counted) counted += q.count;
                }
                CHECK(counted == cases[i][0]);
            }
}

static void check_range(int64_t total, int64_t unit, int ranks)
{
    int64_t next = 0, least = INT64_MAX, most = 0;
    for (int rank = 0; rank < ranks; rank++) {
        struct shard_range r = shard_range(total, unit, ranks, rank);
        bool good = r.first == next && r.count >= 0 && r.count <= shard_max_count(total, unit, ranks);
        good = good && (r.first % unit == 0 || r.first == total);
        CHECK(good);
        next = r.first + r.count;
        least = r.count < least ? r.count : least;
        most = r.count > most ? r.count : most;
    }
    CHECK(next == total);
    CHECK(total % unit == 0 ? most - least <= unit : most - least < 2 * unit); /* the last unit may be short */
    CHECK(most == shard_max_count(total, unit, ranks));
}

static void test_ranges(void)
{
    for (int ranks = 1; ranks <= MAX_RANKS; ranks++) {
        for (int64_t total = 0; total <= 300; total++)
            for (int64_t unit = 1; unit <= 17; unit += 4) check_range(total, unit, ranks);
        check_range(49152, 1, ranks);
        check_range(1536, 16, ranks);
        check_range(INT64_C(1) << 40, 16, ranks);
    }
    CHECK(shard_range(2, 1, 4, 1).count == 1);
    CHECK(shard_range(2, 1, 4, 2).count == 0 && shard_range(2, 1, 4, 3).count == 0);
    CHECK(shard_mlp_unit(1536) == 16 && shard_mlp_unit(1000) == 1 && shard_mlp_unit(7) == 1);
}

static void test_images(void)
{
    for (int ranks = 1; ranks <= MAX_RANKS; ranks++)
        for (int64_t i = 0; i < 40; i++) CHECK(shard_image(i, ranks) == (int)(i % ranks));
}

/* same_heads - a JSON list of KV heads is [first, first + count). */
static bool same_heads(const cJSON *list, int first, int count)
{
    if (cJSON_GetArraySize(list) != count) return false;
    for (int i = 0; i < count; i++)
        if (cJSON_GetArrayItem(list, i)->valueint != first + i) return false;
    return true;
}

static int check_split(const cJSON *split, int heads)
{
    const cJSON *ranks = cJSON_GetObjectItem(split, "ranks");
    int n_ranks = cJSON_GetArraySize(ranks), compared = 0;
    for (int rank = 0; rank < n_ranks; rank++) {
        const cJSON *entry = cJSON_GetArrayItem(ranks, rank);
        const cJSON *held = cJSON_GetObjectItem(entry, "kv_heads"), *counted = cJSON_GetObjectItem(entry, "counted");
        for (int layer = 0; layer < cJSON_GetArraySize(held); layer++, compared++) {
            struct shard_heads s = shard_kv_heads(heads, n_ranks, rank, layer);
            CHECK(same_heads(cJSON_GetArrayItem(held, layer), s.kv_first, s.kv_count));
            CHECK(same_heads(cJSON_GetArrayItem(counted, layer), s.kv_first, s.counted ? s.kv_count : 0));
        }
    }
    return compared;
}

static void test_oracle_plans(void)
{
    cJSON *file = NULL;
    CHECK_OK(json_parse_file(SOURCE_DIR "/tests/data/oracles/vl_cache.json", 16 << 20, &file));
    const cJSON *entry, *split;
    int compared = 0;
    cJSON_ArrayForEach (entry, cJSON_GetObjectItem(file, "cases")) {
        if (strcmp(cJSON_GetObjectItem(entry, "kind")->valuestring, "ranks") != 0) continue;
        /* On one rank all heads are held: that is how the case tells their number. */
        const cJSON *splits = cJSON_GetObjectItem(entry, "splits");
        const cJSON *whole = cJSON_GetObjectItem(cJSON_GetArrayItem(splits, 0), "ranks");
        const cJSON *all = cJSON_GetObjectItem(cJSON_GetArrayItem(whole, 0), "kv_heads");
        int heads = cJSON_GetArraySize(cJSON_GetArrayItem(all, 0));
        cJSON_ArrayForEach (split, splits) compared += check_split(split, heads);
    }
    CHECK(compared > 100);
    cJSON_Delete(file);
}

int main(void)
{
    return check_run("shard", (struct check_case[]){{"KV heads: complete, disjoint, balanced", test_kv_heads_partition},
                                                    {"KV heads: level over layers", test_kv_heads_level_over_layers},
                                                    {"query heads follow their group", test_query_heads},
                                                    {"ranges: uneven, short and empty", test_ranges},
                                                    {"images", test_images},
                                                    {"plans of the oracles", test_oracle_plans},
                                                    {0}});
}
