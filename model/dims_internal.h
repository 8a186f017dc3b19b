/* dims_internal - what the files of dims share: the two sources, and the checks that both end with. */
#ifndef VITRAIL_MODEL_DIMS_INTERNAL_H
#define VITRAIL_MODEL_DIMS_INTERNAL_H

#include <cjson/cJSON.h>

#include "model/dims.h"

/* Limits of numbers in files; far above any model, far below what could overflow an int in a product of two. */
enum {
    DIMS_MAX_VOCAB = 1 << 24,
    DIMS_MAX_HIDDEN = 1 << 20,
    DIMS_MAX_INTERMEDIATE = 1 << 22,
    DIMS_MAX_LAYERS = 1024,
    DIMS_MAX_HEADS = 4096,
    DIMS_MAX_POSITION = 1 << 30,
    DIMS_MAX_IMAGE = 8192
};

/* dims__load_config - from a directory's config.json and generation_config.json into zeroed *out. */
int dims__load_config(const char *directory, struct model_dims *out) MUST_CHECK;

/* dims__load_vision - vision_config and the projector's keys of a llava config into out->vision. `path` names the
 * file; text dims are already there. */
int dims__load_vision(const cJSON *config, const char *path, struct model_dims *out) MUST_CHECK;

/* dims__load_gguf - from the metadata of a GGUF file into zeroed *out. */
int dims__load_gguf(const char *path, struct model_dims *out) MUST_CHECK;

/* dims__check - heads divide and fit; `what` names the file. */
int dims__check(const struct model_dims *dims, const char *what) MUST_CHECK;

/* dims__add_eos - appends an end token unless it is there already. ERR_FORMAT if it is no token or one too many. */
int dims__add_eos(struct model_dims *dims, const char *what, int64_t id) MUST_CHECK;

#endif
