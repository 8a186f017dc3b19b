#include "runtime/step.h"

#include <stdlib.h>
#include <string.h>

/* Arrays start at multiples of 8 bytes. */
static size_t padded(size_t bytes) { return (bytes + 7) / 8 * 8; }

size_t step_message_bytes(const struct step_limits *l)
{
    size_t seqs = (size_t)l->max_seqs;
    return padded(seqs * sizeof(int32_t)) + padded(seqs * sizeof(struct step_begin)) +
           padded(seqs * sizeof(struct step_chunk)) + padded(seqs * sizeof(int32_t)) +
           padded((size_t)l->max_ids * sizeof(int32_t)) + padded((size_t)l->max_spans * sizeof(struct image_span)) +
           padded((size_t)l->max_images * l->image_bytes) + padded(sizeof(struct policy_config));
}

int step_message_open(struct step_message *message, const struct step_limits *limits)
{
    memset(message, 0, sizeof *message);
    message->capacity = step_message_bytes(limits);
    message->body = malloc(message->capacity);
    if (!message->body) FAIL(ERR_NOMEM, "step message: no memory for %zu bytes", message->capacity);
    return OK;
}

void step_message_close(struct step_message *message)
{
    free(message->body);
    memset(message, 0, sizeof *message);
}

static const void *place(const struct step_message *m, size_t *at, size_t count, size_t size)
{
    const void *p = m->body + *at;
    *at += padded(count * size);
    return p;
}

static size_t place_all(const struct step_message *m, size_t image_bytes, struct step_view *v)
{
    const struct step_head *h = &m->head;
    size_t at = 0;
    v->release = place(m, &at, (size_t)h->n_release, sizeof *v->release);
    v->begin = place(m, &at, (size_t)h->n_begin, sizeof *v->begin);
    v->chunk = place(m, &at, (size_t)h->n_chunks, sizeof *v->chunk);
    v->decode = place(m, &at, (size_t)h->n_decode, sizeof *v->decode);
    v->ids = place(m, &at, (size_t)h->n_ids, sizeof *v->ids);
    v->spans = place(m, &at, (size_t)h->n_spans, sizeof *v->spans);
    v->pixels = place(m, &at, (size_t)h->n_images, image_bytes);
    v->policy = place(m, &at, h->kind == STEP_SET_POLICY, sizeof *v->policy);
    return at;
}

int step_layout(struct step_message *message, size_t image_bytes, struct step_view *view)
{
    size_t bytes = place_all(message, image_bytes, view);
    if (bytes > message->capacity)
        FAIL(ERR_BUG, "step message of %zu bytes in a buffer of %zu", bytes, message->capacity);
    message->head.body_bytes = bytes;
    return OK;
}

int step_read(const struct step_message *message, size_t image_bytes, struct step_view *view)
{
    const struct step_head *h = &message->head;
    if (h->n_release < 0 || h->n_begin < 0 || h->n_chunks < 0 || h->n_decode < 0 || h->n_ids < 0 || h->n_spans < 0 ||
        h->n_images < 0 || place_all(message, image_bytes, view) != h->body_bytes)
        FAIL(ERR_BUG, "step %llu: the message's counts and size disagree", (unsigned long long)h->number);
    return OK;
}
