/* Text to token ids. A prompt is encoded as one text, so that its tokens are those of the reference, which tokenizes
 * the rendered conversation as a whole. Only where a user's text spells a special token is it cut: that stretch is
 * encoded without special tokens. */
#include <stdlib.h>
#include <string.h>

#include "runtime/prompt_internal.h"

/* A conversation with the image tokens' text put in, and which bytes came from messages. */
struct flat {
    char *text;
    size_t size, last_turn;
    struct range {
        size_t start, end;
    } * content, *plain; /* plain: stretches to encode without special tokens */
    int n_content, n_plain, plain_room;
};

static void flat_free(struct flat *f)
{
    free(f->text);
    free(f->content);
    free(f->plain);
}

static int flatten(const struct prompt_builder *b, const struct chat_prompt *p, struct flat *f)
{
    size_t image_size = b->image_token ? strlen(b->image_token) : 0, size = p->size + 1;
    for (int i = 0; i < p->n_segments; i++)
        if (p->segments[i].kind == CHAT_IMAGE) size += image_size;
    f->text = malloc(size);
    f->content = calloc((size_t)p->n_segments + 1, sizeof *f->content);
    if (!f->text || !f->content) FAIL(ERR_NOMEM, "no memory for a prompt of %zu bytes", size);
    for (int i = 0; i < p->n_segments; i++) {
        const struct chat_segment *s = &p->segments[i];
        if (s->start <= p->last_turn && p->last_turn <= s->start + s->size)
            f->last_turn = f->size + (p->last_turn - s->start);
        if (s->kind == CHAT_IMAGE) {
            if (b->image_token) memcpy(f->text + f->size, b->image_token, image_size);
            f->size += image_size;
            continue;
        }
        if (s->kind == CHAT_CONTENT) f->content[f->n_content++] = (struct range){f->size, f->size + s->size};
        memcpy(f->text + f->size, p->text + s->start, s->size);
        f->size += s->size;
    }
    return OK;
}

/* Bytes of the longest special token that text begins with, 0 if none: the sorted list is narrowed byte by byte. */
static size_t match_special(const struct prompt_builder *b, const char *text, size_t size)
{
    int low = 0, high = b->n_special;
    size_t found = 0;
    for (size_t k = 0; low < high; k++) {
        if (!b->special[low][k]) { /* the shortest of those that share this prefix sorts first */
            found = k;
            while (low < high && !b->special[low][k]) low++;
        }
        if (k == size) break;
        unsigned char c = (unsigned char)text[k];
        int from = low, to = high;
        while (from < to) {
            int mid = (from + to) / 2;
            if ((unsigned char)b->special[mid][k] < c)
                from = mid + 1;
            else
                to = mid;
        }
        low = from;
        to = high;
        while (from < to) {
            int mid = (from + to) / 2;
            if ((unsigned char)b->special[mid][k] <= c)
                from = mid + 1;
            else
                to = mid;
        }
        high = from;
    }
    return found;
}

static int add_plain(struct flat *f, size_t start, size_t end)
{
    struct range *last = f->n_plain ? &f->plain[f->n_plain - 1] : NULL;
    if (last && start <= last->end) {
        if (end > last->end) last->end = end;
        return OK;
    }
    if (!f->plain || f->n_plain == f->plain_room) {
        int room = f->plain_room ? f->plain_room * 2 : 8;
        struct range *more = realloc(f->plain, (size_t)room * sizeof *more);
        if (!more) FAIL(ERR_NOMEM, "no memory for a prompt");
        f->plain = more;
        f->plain_room = room;
    }
    f->plain[f->n_plain++] = (struct range){start, end};
    return OK;
}

/* Finds the texts of special tokens that lie in messages, or reach into one. */
static int find_plain(const struct prompt_builder *b, struct flat *f)
{
    int next = 0; /* first content range that ends behind `at` */
    for (size_t at = 0; at < f->size; at++) {
        while (next < f->n_content && f->content[next].end <= at) next++;
        if (next == f->n_content) break;
        size_t n = match_special(b, f->text + at, f->size - at);
        if (n && at + n > f->content[next].start) TRY(add_plain(f, at, at + n));
    }
    return OK;
}

static int append(const struct prompt_builder *b, const char *text, size_t size, unsigned flags, int32_t **ids,
                  size_t *n)
{
    int32_t *more, *grown;
    size_t n_more;
    TRY(tokenizer_encode(b->tokenizer, text, size, flags, &more, &n_more));
    if (!*ids) {
        *ids = more;
        *n = n_more;
        return OK;
    }
    grown = realloc(*ids, (*n + n_more + 1) * sizeof **ids);
    if (grown) {
        memcpy(grown + *n, more, n_more * sizeof **ids);
        *ids = grown;
        *n += n_more;
    }
    free(more);
    if (!grown) FAIL(ERR_NOMEM, "no memory for %zu token ids", n_more);
    return OK;
}

/* The first `size` bytes of f, in stretches with and without special tokens. *ids is the caller's also on error. */
static int encode(const struct prompt_builder *b, const struct flat *f, size_t size, bool add_special, int32_t **ids,
                  size_t *n)
{
    size_t at = 0;
    unsigned first = add_special ? TOKENIZER_ADD_SPECIAL : 0;
    *ids = NULL;
    *n = 0;
    for (int i = 0; i <= f->n_plain && at < size; i++) {
        size_t start = i < f->n_plain && f->plain[i].start < size ? f->plain[i].start : size;
        size_t end = i < f->n_plain && f->plain[i].end < size ? f->plain[i].end : size;
        if (start > at || first) {
            TRY(append(b, f->text + at, start - at, TOKENIZER_PARSE_SPECIAL | first, ids, n));
            first = 0;
        }
        if (end > start) TRY(append(b, f->text + start, end - start, 0, ids, n));
        at = end;
    }
    return OK;
}

static int encode_flat(const struct prompt_builder *b, const struct chat_prompt *prompt, struct flat *f, int32_t **ids,
                       size_t *n, size_t *last_turn)
{
    TRY(flatten(b, prompt, f));
    TRY(find_plain(b, f));
    TRY(encode(b, f, f->size, prompt->add_special, ids, n));
    *last_turn = 0;
    if (!f->last_turn) return OK;
    /* Tokens may straddle the turn's beginning: what both encodings share lies before it for sure. */
    int32_t *before;
    size_t n_before, same = 0;
    int rc = encode(b, f, f->last_turn, prompt->add_special, &before, &n_before);
    if (!rc)
        while (same < n_before && same < *n && before[same] == (*ids)[same]) same++;
    free(before);
    *last_turn = same;
    return rc;
}

int prompt__encode_chat(const struct prompt_builder *b, const struct chat_prompt *prompt, int32_t **ids, size_t *n,
                        size_t *last_turn)
{
    struct flat f = {0};
    *ids = NULL;
    int rc = encode_flat(b, prompt, &f, ids, n, last_turn);
    flat_free(&f);
    if (rc) {
        free(*ids);
        *ids = NULL;
    }
    return rc;
}

int prompt__encode_raw(const struct prompt_builder *b, const char *text, size_t size, int32_t **ids, size_t *n)
{
    return tokenizer_encode(b->tokenizer, text, size, TOKENIZER_ADD_SPECIAL | TOKENIZER_PARSE_SPECIAL, ids, n);
}
