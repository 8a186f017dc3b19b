/* Memory of the CPU backend: anonymous pages, zeroed and touched at once, so that a shortage shows at start-up with
 * the sizes in the message. What is asked for is compared with what the system and the process's memory cgroups still
 * have before anything is touched: beyond that the kernel would not refuse, it would kill. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels/cpu/cpu.h"

enum { HUGE_PAGE = 2 << 20 };

/* The number after `key` in a file of "key number" lines (key "": the first word), or -1: no file, no key, "max". */
static int64_t read_number(const char *path, const char *key)
{
    char line[256];
    int64_t value = -1;
    size_t length = strlen(key);
    FILE *file = fopen(path, "re");
    if (!file) return -1;
    while (value < 0 && fgets(line, sizeof line, file)) {
        char *end = line;
        if (strncmp(line, key, length) != 0) continue;
        long long number = strtoll(line + length, &end, 10);
        if (end != line + length && number >= 0) value = number;
    }
    fclose(file);
    return value;
}

/* What one cgroup directory leaves: its limit less what is charged, page cache not counted because it gives way. */
static int64_t cgroup_left(const char *directory, const char *limit_file, const char *usage_file)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/%s", directory, limit_file);
    int64_t limit = read_number(path, "");
    snprintf(path, sizeof path, "%s/%s", directory, usage_file);
    int64_t usage = read_number(path, "");
    if (limit < 0 || usage < 0) return INT64_MAX;
    snprintf(path, sizeof path, "%s/memory.stat", directory);
    int64_t inactive = read_number(path, "inactive_file "), active = read_number(path, "active_file ");
    usage -= (inactive > 0 ? inactive : 0) + (active > 0 ? active : 0);
    return limit > usage ? limit - (usage > 0 ? usage : 0) : 0;
}

/* The least that the cgroup at root + path and its parents leave. */
static int64_t cgroups_left(const char *root, char *path, const char *limit_file, const char *usage_file)
{
    char directory[4100];
    int64_t least = INT64_MAX;
    for (;;) {
        snprintf(directory, sizeof directory, "%s%s", root, path);
        int64_t left = cgroup_left(directory, limit_file, usage_file);
        least = left < least ? left : least;
        char *slash = strrchr(path, '/');
        if (!slash) return least;
        *slash = '\0';
    }
}

static int64_t available_bytes(void)
{
    int64_t kib = read_number("/proc/meminfo", "MemAvailable:");
    int64_t least = kib < 0 ? INT64_MAX : kib * 1024;
    char line[4096];
    FILE *file = fopen("/proc/self/cgroup", "re");
    if (!file) return least;
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = '\0';
        int64_t left = INT64_MAX;
        char *memory = strstr(line, ":memory:");
        if (!strncmp(line, "0::", 3))
            left = cgroups_left("/sys/fs/cgroup", line + 3, "memory.max", "memory.current");
        else if (memory)
            left = cgroups_left("/sys/fs/cgroup/memory", memory + 8, "memory.limit_in_bytes", "memory.usage_in_bytes");
        least = left < least ? left : least;
    }
    fclose(file);
    return least;
}

static size_t whole_pages(size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return bytes ? (bytes + page - 1) / page * page : page;
}

/* Backs the pages; false where the system has not enough. Kernels before 5.14 cannot say so. */
static bool touch(char *memory, size_t bytes)
{
#ifdef MADV_POPULATE_WRITE
    if (madvise(memory, bytes, MADV_POPULATE_WRITE) == 0) return true;
    if (errno == ENOMEM) return false;
#endif
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (size_t at = 0; at < bytes; at += page) ((volatile char *)memory)[at] = 0;
    return true;
}

int cpu__memory_take(struct ops *o, size_t bytes, void **out)
{
    (void)o;
    const double mib = 1 << 20;
    int64_t available = available_bytes();
    if (bytes > (size_t)available)
        FAIL(ERR_NOMEM, "cpu: %.1f MiB of memory wanted, %.1f MiB available (system and cgroup)", (double)bytes / mib,
             (double)available / mib);
    size_t size = whole_pages(bytes);
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory != MAP_FAILED && size >= HUGE_PAGE) (void)madvise(memory, size, MADV_HUGEPAGE); /* only an advice */
    if (memory == MAP_FAILED || !touch(memory, size)) {
        if (memory != MAP_FAILED) munmap(memory, size);
        FAIL(ERR_NOMEM, "cpu: the system refused %.1f MiB of memory (%.1f MiB available)", (double)bytes / mib,
             (double)available / mib);
    }
    *out = memory;
    return OK;
}

void cpu__memory_give_back(struct ops *o, void *memory, size_t bytes)
{
    (void)o;
    munmap(memory, whole_pages(bytes));
}
