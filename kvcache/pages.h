/* pages - rank 0's count of free pages on every rank, from lengths alone: what admission asks.
 *
 * The pages themselves live on the device of each rank and are popped and pushed there by ops; lengths are equal on all
 * ranks, and which rank holds which heads is the shard plan, so one host can keep the books of all. A sequence reserves
 * the most it can come to use, so a lane never finds the stack empty. */
#ifndef VITRAIL_KVCACHE_PAGES_H
#define VITRAIL_KVCACHE_PAGES_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

struct pages;

/* pages_open - n_ranks pools of `total` pages; heads [n_ranks, n_layers] = KV heads of a rank in a layer (copied). */
int pages_open(int n_ranks, int n_layers, int page_size, int n_slots, const int *heads, int64_t total,
               struct pages **out) MUST_CHECK;
void pages_close(struct pages *pages);

/* pages_fits - whether lanes of `length` tokens in every layer fit an empty pool on every rank. */
bool pages_fits(const struct pages *pages, int length);

/* pages_reserve - reserves a free slot's lanes at `length` tokens in every layer; false if some rank lacks the pages.
 */
bool pages_reserve(struct pages *pages, int slot, int length);

/* pages_resize - changes a slot's reservation to `length[l] + extra` tokens in layer l; never above what it had.
 * uneven: a rank's heads share that many a head in any parts, so that each may waste most of a page. */
void pages_resize(struct pages *pages, int slot, const int *length, int extra, bool uneven);

/* pages_resize_plain - the same for lanes that a prompt is still to come behind: in pages of a prompt's lanes. */
void pages_resize_plain(struct pages *pages, int slot, const int *length, int extra, bool uneven);

/* pages_use_storage - how lanes are stored whose prompt has ended, where not as a prompt's: tokens of a page, by which
 * pages_resize counts, and how many tokens of a lane stay as they were (ops_aged.h; 0: none), for which pages_reserve
 * adds what a lane takes more while it is rewritten. With no slot reserved. */
void pages_use_storage(struct pages *pages, int kept_page_size, int plain_tokens);

/* pages_release - gives a slot's reservation back. pages_free - of the rank that has the fewest. */
void pages_release(struct pages *pages, int slot);
int64_t pages_free(const struct pages *pages);

#endif
