/* vision - the CLIP tower and the projector: pixels to rows of the decoder's hidden size. Whole on every rank; the
 * images of a step are dealt over the ranks and the features gathered. */
#ifndef VITRAIL_MODEL_VISION_H
#define VITRAIL_MODEL_VISION_H

#include "model/tensor_parallel.h"

struct vision {
    const struct model_dims *dims;
    const struct weights *weights;
    struct tensor_parallel *tp;
    int max_images;                                   /* of a step, over all ranks */
    float scale[3], shift[3];                         /* pixel * scale + shift is the normalised value */
    uint8_t *pixels;                                  /* one image, device */
    struct tensor patches, x, h, qkv, attention, mlp; /* of one image */
    int32_t *row_index;                               /* [patches] rows of x that patches go to */
    struct tensor mine, gathered; /* [share * image tokens, hidden], [ranks * share * image tokens, hidden] */
};

/* vision_place - buffers for steps of up to max_images images. scale, shift as image_processor gives them. */
int vision_place(struct vision *vision, struct arena *arena, enum dtype dtype) MUST_CHECK;

/* vision_begin - fills the constant tables; once after the arena has memory. */
int vision_begin(struct vision *vision) MUST_CHECK;

/* vision_encode - features of n images: pixels host [n, image_size, image_size, 3], image i on rank i mod N. On return
 * image i's rows are vision_rows(vision, i, n): [n_image_tokens, hidden]. Collective. */
int vision_encode(struct vision *vision, const uint8_t *pixels, int n) MUST_CHECK;
struct tensor vision_rows(const struct vision *vision, int image, int n);

#endif
