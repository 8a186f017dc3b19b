#include "kvcache/vl_cache.h"

#include <math.h>
#include <string.h>

static int clamp_int(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

static double clamp(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

void vl_cache_options_default(struct vl_cache_options *options)
{
    *options = (struct vl_cache_options){.threshold = 0.01,
                                         .clip_min = 0.01,
                                         .clip_max = 1.0,
                                         .rounding = VL_CACHE_FLOOR,
                                         .window = 0.1,
                                         .window_of = VL_CACHE_WINDOW_OF_LAYER,
                                         .min_rows = 16,
                                         .no_image_rows = 64,
                                         .max_rows = 0,
                                         .kernel = 1};
}

int vl_cache_judging_rows(const struct vl_cache_options *options, int m, const struct image_span *spans, int n_spans,
                          int last_turn_start)
{
    int image_end = 0, first;
    for (int i = 0; i < n_spans; i++)
        if (spans[i].end > spans[i].start && spans[i].end > image_end) image_end = spans[i].end;
    if (!image_end) {
        first = m - clamp_int(options->no_image_rows, 1, m);
    } else {
        first = image_end > last_turn_start ? image_end : last_turn_start;
        /* A short last turn borrows rows from the text before it, but never from the image. */
        if (m - first < options->min_rows)
            first = m - options->min_rows > image_end ? m - options->min_rows : image_end;
        if (first >= m) first = m - clamp_int(options->min_rows, 1, m);
    }
    if (options->max_rows > 0 && m - first > options->max_rows) first = m - options->max_rows;
    return m - first;
}

/* The factor s with sum of clip(s * share_l) = alpha * L, by bisection: a clip that bit is made good by the others. */
static void water_fill(const struct vl_cache_options *o, double *share, int n, double alpha)
{
    double target = alpha * n, low = 0, least = INFINITY;
    if (target >= n * o->clip_max || target <= n * o->clip_min) {
        for (int l = 0; l < n; l++) share[l] = target >= n * o->clip_max ? o->clip_max : o->clip_min;
        return;
    }
    for (int l = 0; l < n; l++) least = fmin(least, share[l]);
    double high = o->clip_max / least;
    for (int step = 0; step < 200; step++) {
        double middle = 0.5 * (low + high), sum = 0;
        for (int l = 0; l < n; l++) sum += clamp(middle * share[l], o->clip_min, o->clip_max);
        if (sum < target)
            low = middle;
        else
            high = middle;
    }
    for (int l = 0; l < n; l++) share[l] = clamp(high * share[l], o->clip_min, o->clip_max);
}

/* Hands the tokens that floors lost to the layers with the largest remainders, one each (in millionths, ties to the
 * lower layer; a full layer is passed over). */
static void add_remainders(const double *share, int *k, int n, int m)
{
    double total = 0;
    for (int l = 0; l < n; l++) total += share[l] * m;
    int left = policy_floor(total);
    for (int l = 0; l < n; l++) left -= k[l];
    int64_t previous = INT64_MAX; /* remainder and layer of the last one served, as one descending key */
    while (left > 0) {
        int best = -1;
        int64_t best_key = -1;
        for (int l = 0; l < n; l++) {
            int64_t micro = (int64_t)floor((share[l] * m - policy_floor(share[l] * m)) * 1e6 + 0.5);
            int64_t key = (micro + 1) * (n + 1) + (n - l);
            if (key < previous && key > best_key) {
                best_key = key;
                best = l;
            }
        }
        if (best < 0) return;
        previous = best_key;
        if (k[best] < m) {
            k[best]++;
            left--;
        }
    }
}

void vl_cache_budgets(const struct vl_cache_options *options, const int64_t *kept, int n_layers, int m, double alpha,
                      int *k)
{
    enum { MAX_LAYERS = 1024 };
    double share[MAX_LAYERS], total = 0;
    if (n_layers > MAX_LAYERS) n_layers = MAX_LAYERS;
    for (int l = 0; l < n_layers; l++) total += (double)kept[l];
    for (int l = 0; l < n_layers; l++) share[l] = (double)kept[l] / total;
    if (options->rounding == VL_CACHE_WATER_FILLED) {
        water_fill(options, share, n_layers, alpha);
    } else {
        for (int l = 0; l < n_layers; l++)
            share[l] = clamp((double)kept[l] / total * alpha * n_layers, options->clip_min, options->clip_max);
    }
    for (int l = 0; l < n_layers; l++) k[l] = clamp_int(policy_floor(share[l] * m), 0, m);
    if (options->rounding == VL_CACHE_LARGEST_REMAINDER) add_remainders(share, k, n_layers, m);
    for (int l = 0; l < n_layers; l++) k[l] = clamp_int(k[l], 1, m);
}

int vl_cache_window(const struct vl_cache_options *options, int k, int m, double alpha)
{
    double base = options->window_of == VL_CACHE_WINDOW_OF_PROMPT ? alpha * m : k;
    return clamp_int(policy_floor(options->window * base), 1, k);
}
