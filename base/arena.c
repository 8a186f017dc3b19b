#include "base/arena.h"

#include <string.h>

void arena_measure(struct arena *arena) { memset(arena, 0, sizeof *arena); }

void arena_init(struct arena *arena, void *memory, size_t size)
{
    memset(arena, 0, sizeof *arena);
    arena->memory = memory;
    arena->size = size;
}

static void add_row(struct arena *arena, const char *label, size_t bytes)
{
    int i = 0;
    while (i < arena->n_rows && strcmp(arena->row[i].label, label)) i++;
    if (i == ARENA_MAX_ROWS) i--; /* the last row collects what has no row of its own */
    if (i == arena->n_rows) arena->row[arena->n_rows++] = (struct arena_row){label, 0};
    arena->row[i].bytes += bytes;
}

int arena_take_at(struct arena *arena, size_t bytes, const char *label, void **out, const char *file, int line)
{
    size_t padded = (bytes + ARENA_ALIGNMENT - 1) / ARENA_ALIGNMENT * ARENA_ALIGNMENT;
    if (arena->sealed)
        return status_set(ERR_BUG, file, line, "%s: allocation after start-up (%s:%d)", label, file, line);
    if (padded < bytes) return status_set(ERR_NOMEM, file, line, "%s: size overflows", label);
    if (arena->memory && arena->size - arena->used < padded)
        return status_set(ERR_NOMEM, file, line, "%s: %zu bytes planned, %zu used, %zu more wanted (%s:%d)", label,
                          arena->size, arena->used, padded, file, line);
    *out = arena->memory ? arena->memory + arena->used : NULL;
    arena->used += padded;
    add_row(arena, label, padded);
    return OK;
}

int arena_tensor_at(struct arena *arena, struct tensor shape, const char *label, struct tensor *out, const char *file,
                    int line)
{
    *out = shape;
    return arena_take_at(arena, tensor_bytes(shape), label, &out->data, file, line);
}

void arena_seal(struct arena *arena) { arena->sealed = true; }
