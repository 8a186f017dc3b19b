/* pyramid_infer - the arithmetic of PyramidInfer (arXiv 2405.12532) as pure functions, so that tests can hold each step
 * against the worked example and the oracle's vectors; the policy itself is policies/pyramid_infer.c.
 *
 * All lengths follow from the prompt's length and the options, before anything is computed: layer l stores stored[l]
 * tokens; after it its context, which is what stands before the newest `window` rows, shrinks to keep[l] tokens. */
#ifndef VITRAIL_KVCACHE_PYRAMID_INFER_H
#define VITRAIL_KVCACHE_PYRAMID_INFER_H

#include "kvcache/policy.h"

/* What a schedule depends on beside the two ratios. */
struct pyramid_shape {
    int tokens; /* of the prompt, S */
    int n_layers;
    int interval;        /* layers l with l % interval == 0 let rows leave */
    int min_context;     /* a context that would not stay larger than this stays as it is */
    int window;          /* rows that judge and always stay; 0: floor(rho * S) + 1 */
    const double *decay; /* [n_layers] of pyramid_infer_decay */
};

/* pyramid_infer_decay - (1 + cos(pi * l / n_layers)) / 2 for each layer, into decay [n_layers]. */
void pyramid_infer_decay(int n_layers, double *decay);

/* pyramid_infer_ratio - share of the context that stays after a layer: 1 at the first, towards r at the last. */
double pyramid_infer_ratio(double decay, double r);

/* pyramid_infer_window - rows that judge at a recent ratio rho, at most the prompt. */
int pyramid_infer_window(const struct pyramid_shape *shape, double rho);

/* pyramid_infer_schedule - fills stored [n_layers] and keep [n_layers] (-1: nothing leaves), either may be NULL.
 * Returns the tokens stored in all layers; *final (may be NULL): rows that would leave the last layer. */
int64_t pyramid_infer_schedule(const struct pyramid_shape *shape, double rho, double r, int *stored, int *keep,
                               int *final);

/* pyramid_infer_solve - rho and r whose schedule stores nearest to `target` of the prompt, as a mean over the layers:
 * rho from .2 down to .01, the first that comes within PYRAMID_INFER_WITHIN, r in steps of .001. A given window leaves
 * rho as it is. Returns the mean that it found. The mean is not monotonic in r, so all are tried. */
#define PYRAMID_INFER_WITHIN 0.005
double pyramid_infer_solve(const struct pyramid_shape *shape, double target, double *rho, double *r);

/* pyramid_infer_row_weights - of n judging rows: 1 for the oldest, `newest` for the newest, evenly between. */
void pyramid_infer_row_weights(int n, double newest, float *weight);

/* pyramid_infer_block_keep - generated tokens of a block that stay in a layer: max(1, floor(block * compress * ratio)).
 */
int pyramid_infer_block_keep(double layer_decay, int block, double compress, double decay);

/* When blocks of generated tokens are judged. Block b is the tokens b * block .. of those from the prompt's last token
 * on; it is settled at decode step settled[2b] (from 0) by the rows of the newest settled[2b + 1] steps. The recent
 * rows are floor(rho * length of layer 0) + 1 at every step, and a block is judged as soon as so many stand behind it.
 * This is the same in all layers, for what a layer's length has lost its prompt's length lacks too. */
struct pyramid_generation {
    int tokens; /* of the prompt */
    int block;
    int first_keep; /* what stays of a block in layer 0 */
    int window;     /* of the prompt */
    double rho;
};

/* pyramid_infer_blocks - of `steps` decode steps, into settled [2 * max_blocks]; blocks that are not settled by then,
 * and room behind them: INT32_MAX steps, 1 row. */
void pyramid_infer_blocks(const struct pyramid_generation *generation, int steps, int max_blocks, int32_t *settled);

#endif
