/* driver - runs a fuzz target without libFuzzer: over each file of a folder, then over random changes of them.
 * The changes are the same in every run, so a failure repeats; the input that was last tried is left in a file.
 *   usage: fuzz_x SEEDS RUNS        (SEEDS may be missing: the changes then start from nothing) */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_SEEDS = 1024, INPUT_BYTES = 1 << 20 };

struct seed {
    uint8_t *data;
    size_t size;
};

static uint64_t state = 88172645463325252u;
static uint64_t random_below(uint64_t n)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return n ? state % n : 0;
}

static int read_seed(const char *dir, const char *name, struct seed *out)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "rb");
    out->data = malloc(INPUT_BYTES);
    if (!f || !out->data) return -1;
    out->size = fread(out->data, 1, INPUT_BYTES, f);
    fclose(f);
    return 0;
}

static int by_name(const struct dirent **a, const struct dirent **b) { return strcmp((*a)->d_name, (*b)->d_name); }

static int read_seeds(const char *dir, struct seed *seeds)
{
    struct dirent **names;
    int n = 0, found = scandir(dir, &names, NULL, by_name);
    for (int i = 0; i < found; i++) {
        if (names[i]->d_name[0] != '.' && n < MAX_SEEDS) n += read_seed(dir, names[i]->d_name, &seeds[n]) == 0;
        free(names[i]);
    }
    if (found >= 0) free(names);
    return n;
}

/* Copies a seed and changes a few places: bits, bytes, cuts, repeats, pieces of another seed. */
static size_t change(const struct seed *seed, const struct seed *other, uint8_t *out)
{
    static const uint8_t edge[] = {0, 1, 0x7f, 0x80, 0xff, '"', '\\', '{', '[', '\n', ':', '-', '9', ' '};
    size_t size = seed->size;
    memcpy(out, seed->data, size);
    for (uint64_t i = 0, n = 1 + random_below(8); i < n; i++) {
        size_t at = size ? random_below(size) : 0, length = 1 + random_below(size - at < 64 ? size - at : 64);
        switch (random_below(6)) {
        case 0:
            if (size) out[at] ^= (uint8_t)(1u << random_below(8));
            break;
        case 1:
            if (size) out[at] = edge[random_below(sizeof edge)];
            break;
        case 2:
            if (at + length > size) break;
            memmove(out + at, out + at + length, size - at - length);
            size -= length;
            break;
        case 3:
            if (at + length > size || size + length > INPUT_BYTES) break;
            memmove(out + at + length, out + at, size - at);
            size += length;
            break;
        case 4:
            if (other->size < length || at + length > size) break;
            memcpy(out + at, other->data + random_below(other->size - length + 1), length);
            break;
        default: size = random_below(8) ? size : at; break;
        }
    }
    return size;
}

/* The bytes behind the input belong to the address sanitizer: each input has memory of exactly its size. */
static void run(const uint8_t *data, size_t size)
{
    uint8_t *exact = malloc(size ? size : 1);
    if (!exact) abort();
    memcpy(exact, data, size);
    (void)LLVMFuzzerTestOneInput(exact, size);
    free(exact);
}

int main(int argc, char **argv)
{
    static struct seed seeds[MAX_SEEDS];
    static uint8_t buffer[INPUT_BYTES];
    char last[4096];
    if (argc != 3) {
        fprintf(stderr, "usage: %s SEEDS RUNS\n", argv[0]);
        return 2;
    }
    int n = read_seeds(argv[1], seeds);
    for (int i = 0; i < n; i++) run(seeds[i].data, seeds[i].size);
    printf("%d seeds from %s\n", n, argv[1]);
    uint8_t none[1] = {0};
    struct seed nothing = {none, 0};
    snprintf(last, sizeof last, "%s.last", argv[0]);
    for (long i = 0, runs = strtol(argv[2], NULL, 10); i < runs; i++) {
        const struct seed *seed = n ? &seeds[random_below((uint64_t)n)] : &nothing;
        const struct seed *other = n ? &seeds[random_below((uint64_t)n)] : &nothing;
        size_t size = change(seed, other, buffer);
        FILE *f = fopen(last, "wb"); /* what to look at if the next line does not return */
        if (f) {
            fwrite(buffer, 1, size, f);
            fclose(f);
        }
        run(buffer, size);
    }
    remove(last);
    printf("%s changed inputs\n", argv[2]);
    for (int i = 0; i < n; i++) free(seeds[i].data);
    return 0;
}
