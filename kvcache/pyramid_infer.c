#include "kvcache/pyramid_infer.h"

#include <math.h>

static int least(int a, int b) { return a < b ? a : b; }

void pyramid_infer_decay(int n_layers, double *decay)
{
    const double pi = 3.14159265358979323846;
    for (int l = 0; l < n_layers; l++) decay[l] = (1 + cos(pi * l / n_layers)) / 2;
}

double pyramid_infer_ratio(double decay, double r) { return (1 - r) * decay + r; }

int pyramid_infer_window(const struct pyramid_shape *shape, double rho)
{
    return least(shape->tokens, shape->window ? shape->window : policy_floor(rho * shape->tokens) + 1);
}

int64_t pyramid_infer_schedule(const struct pyramid_shape *shape, double rho, double r, int *stored, int *keep,
                               int *final)
{
    const int window = pyramid_infer_window(shape, rho), smallest = least(shape->min_context, shape->tokens - window);
    int64_t total = 0;
    int n = shape->tokens;
    for (int l = 0; l < shape->n_layers; l++) {
        const double ratio = pyramid_infer_ratio(shape->decay[l], r);
        const int context = n - window;
        int k = -1;
        if (stored) stored[l] = n;
        total += n;
        if (l % shape->interval == 0 && context > smallest && ratio < 1) k = policy_floor(context * ratio);
        if (k <= smallest || k >= context) k = -1; /* pruning stops there, it does not clamp */
        if (keep) keep[l] = k;
        if (k >= 0) n = k + window;
    }
    if (final) *final = n;
    return total;
}

/* The r whose mean is nearest to the target (equally near: the larger); its mean. */
static double best_ratio(const struct pyramid_shape *shape, double target, double rho, double *r)
{
    const double all = (double)shape->tokens * shape->n_layers;
    double best = INFINITY;
    for (int i = 10; i <= 1000; i++) {
        double mean = (double)pyramid_infer_schedule(shape, rho, i / 1000.0, NULL, NULL, NULL) / all;
        if (!(fabs(mean - target) <= fabs(best - target))) continue;
        best = mean;
        *r = i / 1000.0;
    }
    return best;
}

double pyramid_infer_solve(const struct pyramid_shape *shape, double target, double *rho, double *r)
{
    static const double rhos[] = {0.2, 0.15, 0.1, 0.05, 0.02, 0.01};
    double best = INFINITY;
    if (shape->window) return best_ratio(shape, target, *rho, r);
    for (size_t i = 0; i < sizeof rhos / sizeof *rhos && !(fabs(best - target) <= PYRAMID_INFER_WITHIN); i++) {
        double here, mean = best_ratio(shape, target, rhos[i], &here);
        if (!(fabs(mean - target) < fabs(best - target))) continue;
        best = mean;
        *rho = rhos[i];
        *r = here;
    }
    return best;
}

void pyramid_infer_row_weights(int n, double newest, float *weight)
{
    for (int i = 0; i < n; i++) weight[i] = n > 1 ? (float)(1 + (newest - 1) * i / (n - 1)) : 1;
}

int pyramid_infer_block_keep(double layer_decay, int block, double compress, double decay)
{
    int keep = policy_floor(block * compress * pyramid_infer_ratio(layer_decay, decay));
    return keep < 1 ? 1 : keep > block ? block : keep;
}

void pyramid_infer_blocks(const struct pyramid_generation *generation, int steps, int max_blocks, int32_t *settled)
{
    int length = generation->tokens, base = length, rows = generation->window, n = 0;
    for (int b = 0; b < max_blocks; b++) settled[2 * b] = INT32_MAX, settled[2 * b + 1] = 1;
    for (int t = 0; t < steps && n < max_blocks; t++) {
        const int recent = policy_floor(generation->rho * ++length);
        rows = least(rows + 1, recent + 1);
        if (length - recent - base < generation->block) continue;
        settled[2 * n] = t;
        settled[2 * n++ + 1] = rows;
        length -= generation->block - generation->first_keep;
        base = length - recent;
    }
}
