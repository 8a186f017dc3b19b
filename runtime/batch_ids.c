#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "runtime/batch_internal.h"

static struct batch_key hash_key(const char *text, size_t size, uint64_t kind)
{
    uint64_t a = hash_mix(kind, size), b = hash_mix(~kind, size);
    for (size_t i = 0; i < size; i += 8) {
        uint64_t word = 0;
        memcpy(&word, text + i, size - i < 8 ? size - i : 8);
        a = hash_mix(a, word);
        b = hash_mix(b, word);
    }
    if (!a && !(b & ~(uint64_t)BATCH_FLAGS)) a = 1; /* all zero is an empty slot */
    return (struct batch_key){a, b & ~(uint64_t)BATCH_FLAGS};
}

struct batch_key batch__key_of_id(const char *quoted_id) { return hash_key(quoted_id, strlen(quoted_id), 1); }

struct batch_key batch__key_of_line(int64_t line) { return hash_key((const char *)&line, sizeof line, 2); }

/* The slot of a key, or the empty one where it belongs. There always is an empty one. */
static struct batch_key *find(struct batch_key *slot, size_t room, struct batch_key key)
{
    size_t i = (size_t)((unsigned __int128)key.high * room >> 64);
    for (;; i = i + 1 < room ? i + 1 : 0) {
        struct batch_key *s = &slot[i];
        if (!s->high && !s->low) return s;
        if (s->high == key.high && (s->low & ~(uint64_t)BATCH_FLAGS) == key.low) return s;
    }
}

static int grow(struct batch_ids *ids)
{
    size_t room = ids->room ? ids->room + ids->room / 2 : 1024;
    struct batch_key *slot = calloc(room, sizeof *slot);
    if (!slot) FAIL(ERR_NOMEM, "no memory for the ids of %zu lines", ids->n);
    for (size_t i = 0; i < ids->room; i++) {
        struct batch_key key = ids->slot[i];
        if (!key.high && !key.low) continue;
        uint64_t flags = key.low & BATCH_FLAGS;
        key.low &= ~(uint64_t)BATCH_FLAGS;
        *find(slot, room, key) = (struct batch_key){key.high, key.low | flags};
    }
    free(ids->slot);
    ids->slot = slot;
    ids->room = room;
    return OK;
}

int batch__ids_mark(struct batch_ids *ids, struct batch_key key, unsigned flag, unsigned *before)
{
    if (ids->n + ids->n / 6 >= ids->room) TRY(grow(ids));
    struct batch_key *slot = find(ids->slot, ids->room, key);
    if (!slot->high && !slot->low) {
        *slot = key;
        ids->n++;
    }
    *before = (unsigned)(slot->low & BATCH_FLAGS);
    slot->low |= flag;
    return OK;
}

unsigned batch__ids_get(const struct batch_ids *ids, struct batch_key key)
{
    if (!ids->room) return 0;
    return (unsigned)(find(ids->slot, ids->room, key)->low & BATCH_FLAGS);
}

void batch__ids_free(struct batch_ids *ids)
{
    free(ids->slot);
    memset(ids, 0, sizeof *ids);
}
