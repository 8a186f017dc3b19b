/* The last step to a request: lengths checked, image tokens expanded, pictures read. In this order, so that a prompt
 * that is too long costs no decoding. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "model/image_source.h"
#include "runtime/prompt_internal.h"

int prompt__count_images(const struct prompt_builder *b, int n_images, const char *what)
{
    if (!n_images) return OK;
    if (!b->has_vision)
        FAIL(ERR_REQUEST, "%s: %d images for a model without a vision tower (%s)", what, n_images, b->config->model);
    if (n_images > b->config->max_images_per_prompt)
        FAIL(ERR_REQUEST, "%s: %d images, max_images_per_prompt is %d", what, n_images,
             b->config->max_images_per_prompt);
    return OK;
}

/* n_found image tokens must be the request's images; every other id must be the model's. */
static int check_ids(const struct prompt_builder *b, const int32_t *ids, size_t n, int n_images, const char *what)
{
    int n_found = 0;
    for (size_t i = 0; i < n; i++) {
        if (b->has_vision && ids[i] == b->dims->vision.image_token_id)
            n_found++;
        else if (ids[i] < 0 || ids[i] >= b->dims->vocab_size)
            FAIL(ERR_REQUEST, "%s: token %d of the tokenizer is not in the model's vocabulary of %d", what, ids[i],
                 b->dims->vocab_size);
    }
    if (n_found != n_images)
        FAIL(ERR_REQUEST, "%s: %d images, but the prompt has %d places for one (%s)", what, n_images, n_found,
             b->image_token ? b->image_token : "no image token");
    return OK;
}

static int check_length(const struct prompt_builder *b, size_t n_tokens, int image_tokens, bool max_tokens_given,
                        const char *what, struct request *out)
{
    int limit = b->max_model_len;
    if (n_tokens < 1) FAIL(ERR_REQUEST, "%s: the prompt is empty", what);
    if (n_tokens >= (size_t)limit)
        FAIL(ERR_REQUEST,
             "%s: the prompt has %zu tokens (%d of images), which leaves no room for an answer: max_model_len is %d",
             what, n_tokens, image_tokens, limit);
    int room = limit - (int)n_tokens;
    if (out->max_tokens > room) {
        if (max_tokens_given)
            FAIL(ERR_REQUEST,
                 "%s: the prompt has %zu tokens (%d of images) and max_tokens is %d: together more than max_model_len "
                 "%d",
                 what, n_tokens, image_tokens, out->max_tokens, limit);
        out->max_tokens = room;
        if (out->min_tokens > room) out->min_tokens = room;
    }
    return OK;
}

static int expand(const struct prompt_builder *b, const int32_t *ids, size_t n, size_t last_turn, int n_images,
                  struct request *out)
{
    int each = b->dims->vision.n_image_tokens, at = 0, image = 0;
    size_t total = n + (size_t)n_images * (size_t)(n_images ? each - 1 : 0);
    out->ids = malloc((total + 1) * sizeof *out->ids);
    out->spans = calloc((size_t)n_images + 1, sizeof *out->spans);
    if (!out->ids || !out->spans) FAIL(ERR_NOMEM, "no memory for a prompt of %zu tokens", total);
    for (size_t i = 0; i < n; i++) {
        if (i == last_turn) out->last_turn_start = at;
        if (image < n_images && ids[i] == b->dims->vision.image_token_id) {
            out->spans[image++] = (struct image_span){at, at + each};
            for (int k = 0; k < each; k++) out->ids[at++] = ids[i];
        } else {
            out->ids[at++] = ids[i];
        }
    }
    out->n_ids = at;
    out->n_images = n_images;
    return OK;
}

/* What an image is called in messages: its place, and its URL as far as it is for people. */
static const char *image_name(const struct prompt_image *image, int i, char *buf, size_t size)
{
    char name[IMAGE_SOURCE_NAME_MAX];
    snprintf(buf, size, "image %d (%.200s)", i + 1,
             image->trusted ? image->where : image_source_name(image->where, name));
    return buf;
}

static int read_image(const struct prompt_builder *b, const struct prompt_image *image, const char *name, uint8_t *to)
{
    const struct config *c = b->config;
    struct image_limits limits = image_limits_default();
    struct image picture = {0};
    uint8_t *bytes;
    char *text;
    size_t size;
    limits.max_bytes = (size_t)c->max_image_bytes;
    limits.max_pixels = c->max_image_pixels;
    if (image->trusted) {
        TRY(file_read_all(image->where, limits.max_bytes, &text, &size));
        bytes = (uint8_t *)text;
    } else {
        TRY(image_source_read(image->where, c->allowed_local_media_path, &limits, &bytes, &size));
    }
    int rc = image_decode(bytes, size, name, &limits, &picture);
    free(bytes);
    if (!rc) rc = image_process(&b->processor, &picture, to);
    image_free(&picture);
    return rc;
}

static int read_images(const struct prompt_builder *b, const struct prompt_image *images, int n_images,
                       const char *what, struct request *out)
{
    size_t side = (size_t)b->dims->vision.image_size, each = side * side * 3;
    char name[256];
    if (!n_images) return OK;
    if (size_mul(each, (size_t)n_images, &out->pixel_bytes))
        FAIL(ERR_REQUEST, "%s: %d images are too many", what, n_images);
    out->pixels = malloc(out->pixel_bytes);
    if (!out->pixels) FAIL(ERR_NOMEM, "no memory for %d images (%zu bytes)", n_images, out->pixel_bytes);
    for (int i = 0; i < n_images; i++) {
        int rc =
            read_image(b, &images[i], image_name(&images[i], i, name, sizeof name), out->pixels + (size_t)i * each);
        if (!rc) continue;
        /* The message of the image code may name the picture itself or not. */
        if (!strstr(status_message(), name)) status_prefix(rc, "%s", name);
        status_prefix(rc, "%s", what);
        return ERR_REQUEST;
    }
    return OK;
}

int prompt__finish(const struct prompt_builder *b, const int32_t *ids, size_t n, size_t last_turn,
                   const struct prompt_image *images, int n_images, bool max_tokens_given, const char *what,
                   struct request *out)
{
    TRY(check_ids(b, ids, n, n_images, what));
    size_t each = n_images ? (size_t)b->dims->vision.n_image_tokens : 0, image_tokens, total;
    if (size_mul(each, (size_t)n_images, &image_tokens) || image_tokens > INT32_MAX ||
        size_add(n - (size_t)n_images, image_tokens, &total))
        FAIL(ERR_REQUEST, "%s: %d images are too many", what, n_images);
    TRY(check_length(b, total, (int)image_tokens, max_tokens_given, what, out));
    TRY(expand(b, ids, n, last_turn, n_images, out));
    return read_images(b, images, n_images, what, out);
}
