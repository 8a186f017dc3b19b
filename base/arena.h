/* arena - one block of memory, planned, taken once, sealed.
 *
 * A module places its buffers with arena_take. While measuring, an arena has no memory: takes return NULL and only add
 * up, so the same function first states what a module needs (the memory plan) and then places it, and the two cannot
 * disagree. After arena_seal a take is a bug that names its call site: nothing is allocated on the decode path.
 * The arena does not own its memory: whoever provided the block (kernels' ops_memory_take) gives it back. */
#ifndef VITRAIL_BASE_ARENA_H
#define VITRAIL_BASE_ARENA_H

#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"
#include "base/tensor.h"

enum { ARENA_ALIGNMENT = 256, ARENA_MAX_ROWS = 24 };

struct arena {
    char *memory; /* NULL while measuring */
    size_t size, used;
    bool sealed;
    int n_rows; /* what was taken, by label: the rows of the memory plan */
    struct arena_row {
        const char *label;
        size_t bytes;
    } row[ARENA_MAX_ROWS];
};

/* arena_measure - an empty arena that only counts. arena_init - one over `size` bytes at `memory`. */
void arena_measure(struct arena *arena);
void arena_init(struct arena *arena, void *memory, size_t size);

/* arena_take - `bytes` aligned to 256; *out is NULL while measuring. `label` (static text) names the plan's row.
 * Errors: ERR_NOMEM if the plan was too small (a bug), ERR_BUG after sealing. */
#define arena_take(arena, bytes, label, out)                                                                           \
    arena_take_at((arena), (bytes), (label), (void **)(out), __FILE__, __LINE__)
int arena_take_at(struct arena *arena, size_t bytes, const char *label, void **out, const char *file,
                  int line) MUST_CHECK;

/* arena_tensor - takes a dense tensor; its data is NULL while measuring. */
#define arena_tensor(arena, shape, label, out) arena_tensor_at((arena), (shape), (label), (out), __FILE__, __LINE__)
int arena_tensor_at(struct arena *arena, struct tensor shape, const char *label, struct tensor *out, const char *file,
                    int line) MUST_CHECK;

void arena_seal(struct arena *arena);

#endif
