#include "kvcache/pages.h"

#include <stdlib.h>

#include "kernels/ops.h"

struct pages {
    int n_ranks, n_layers, page_size, kept_page_size, plain_tokens, n_slots;
    int *heads;        /* [n_ranks, n_layers] */
    int64_t total;     /* pages of every rank's pool */
    int64_t *free;     /* [n_ranks] */
    int64_t *reserved; /* [n_slots, n_ranks] */
};

int pages_open(int n_ranks, int n_layers, int page_size, int n_slots, const int *heads, int64_t total,
               struct pages **out)
{
    struct pages *p = calloc(1, sizeof *p);
    if (!p) FAIL(ERR_NOMEM, "page accounts: out of memory");
    size_t cells = (size_t)n_ranks * (size_t)n_layers;
    *p = (struct pages){.n_ranks = n_ranks,
                        .n_layers = n_layers,
                        .page_size = page_size,
                        .kept_page_size = page_size,
                        .n_slots = n_slots,
                        .total = total};
    p->heads = calloc(cells, sizeof *p->heads);
    p->free = calloc((size_t)n_ranks, sizeof *p->free);
    p->reserved = calloc((size_t)n_slots * (size_t)n_ranks, sizeof *p->reserved);
    if (!p->heads || !p->free || !p->reserved) {
        pages_close(p);
        FAIL(ERR_NOMEM, "page accounts: out of memory");
    }
    for (size_t i = 0; i < cells; i++) p->heads[i] = heads[i];
    for (int r = 0; r < n_ranks; r++) p->free[r] = total;
    *out = p;
    return OK;
}

void pages_close(struct pages *p)
{
    if (!p) return;
    free(p->heads);
    free(p->free);
    free(p->reserved);
    free(p);
}

static int64_t pages_of(const struct pages *p, int length)
{
    const int64_t pages = ((int64_t)length + p->page_size - 1) / p->page_size;
    return pages + kv_age_pages(length, p->plain_tokens, p->page_size, p->kept_page_size);
}

static int64_t lanes_of(const struct pages *p, int rank)
{
    int64_t lanes = 0;
    for (int l = 0; l < p->n_layers; l++) lanes += p->heads[rank * p->n_layers + l];
    return lanes;
}

bool pages_fits(const struct pages *p, int length)
{
    for (int r = 0; r < p->n_ranks; r++)
        if (lanes_of(p, r) * pages_of(p, length) > p->total) return false;
    return true;
}

bool pages_reserve(struct pages *p, int slot, int length)
{
    for (int r = 0; r < p->n_ranks; r++)
        if (lanes_of(p, r) * pages_of(p, length) > p->free[r]) return false;
    for (int r = 0; r < p->n_ranks; r++) {
        int64_t need = lanes_of(p, r) * pages_of(p, length);
        p->free[r] -= need;
        p->reserved[slot * p->n_ranks + r] = need;
    }
    return true;
}

void pages_use_storage(struct pages *p, int kept_page_size, int plain_tokens)
{
    p->kept_page_size = kept_page_size;
    p->plain_tokens = plain_tokens;
}

/* Pages of `heads` lanes of `length` tokens in two parts, or of as many in uneven ones: the plain part grows by a page
 * before what exceeds it is rewritten. */
static int64_t pages_in_parts(const struct pages *p, int64_t heads, int length, bool uneven)
{
    const int64_t size = p->kept_page_size, most = (int64_t)p->plain_tokens + p->page_size;
    const int64_t plain = most < length || uneven ? most : length;
    const int64_t codes = uneven ? length : length > p->plain_tokens ? length - p->plain_tokens : 0;
    const int64_t waste = heads * (size - 1); /* a head has most of a page to spare */
    return heads * ((plain + p->page_size - 1) / p->page_size) +
           (uneven ? (heads * codes + waste) / size : heads * ((codes + size - 1) / size));
}

/* Pages of `size` tokens of `heads` lanes of `length` tokens each, or of as many tokens in uneven parts. */
static int64_t pages_of_heads(int64_t size, int64_t heads, int length, bool uneven)
{
    if (!uneven) return heads * ((length + size - 1) / size);
    return (heads * length + heads * (size - 1)) / size;
}

static void resize(struct pages *p, int slot, bool plain, const int *length, int extra, bool uneven)
{
    const int64_t size = plain ? p->page_size : p->kept_page_size;
    for (int r = 0; r < p->n_ranks; r++) {
        int64_t need = 0, *had = &p->reserved[slot * p->n_ranks + r];
        for (int l = 0; l < p->n_layers; l++) {
            const int64_t heads = p->heads[r * p->n_layers + l];
            need += p->plain_tokens && !plain ? pages_in_parts(p, heads, length[l] + extra, uneven)
                                              : pages_of_heads(size, heads, length[l] + extra, uneven);
        }
        if (need > *had) need = *had;
        p->free[r] += *had - need;
        *had = need;
    }
}

void pages_resize(struct pages *p, int slot, const int *length, int extra, bool uneven)
{
    resize(p, slot, false, length, extra, uneven);
}

void pages_resize_plain(struct pages *p, int slot, const int *length, int extra, bool uneven)
{
    resize(p, slot, true, length, extra, uneven);
}

void pages_release(struct pages *p, int slot)
{
    for (int r = 0; r < p->n_ranks; r++) {
        int64_t *had = &p->reserved[slot * p->n_ranks + r];
        p->free[r] += *had;
        *had = 0;
    }
}

int64_t pages_free(const struct pages *p)
{
    int64_t least = p->free[0];
    for (int r = 1; r < p->n_ranks; r++)
        if (p->free[r] < least) least = p->free[r];
    return least;
}
