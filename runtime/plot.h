/* plot - curves over a logarithmic x axis as one SVG file: what bench and eval draw. */
#ifndef VITRAIL_RUNTIME_PLOT_H
#define VITRAIL_RUNTIME_PLOT_H

#include <stdbool.h>

#include "base/status.h"

enum plot_style {
    PLOT_POINTS, /* a line with a dot at every point */
    PLOT_DASHED, /* a thin dashed line; a single point is a short dash */
    PLOT_ACROSS  /* y[0] over the whole width, dashed */
};

/* One curve; n 0: only its line in the legend. */
struct plot_series {
    const char *name;    /* in the legend; NULL: not there */
    const double *x, *y; /* [n] x > 0 and ascending; y >= 0 */
    int n;
    int colour; /* an index, the same for curves that belong together; -1: grey */
    enum plot_style style;
};

struct plot {
    const char *title, *x_label, *y_label;
    double y_top; /* of the axis; 0: as the highest point needs */
    const struct plot_series *series;
    int n_series;
};

/* plot_write - over what `path` holds. Errors: ERR_IO naming it. */
int plot_write(const struct plot *plot, const char *path) MUST_CHECK;

#endif
