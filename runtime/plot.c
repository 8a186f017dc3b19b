#include "runtime/plot.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { WIDTH = 860, LEFT = 70, RIGHT = 250, TOP = 46, BOTTOM = 58, INSET = 24, LEGEND_ROW = 20, TICK_GAP = 34 };
enum { LEAST_HEIGHT = 480 };

static const char *const colours[] = {"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                      "#e69f00", "#56b4e9", "#000000", "#7f7f7f"};
static const char dashes[] = "stroke-dasharray=\"5 4\"";

struct canvas {
    const struct plot *plot;
    FILE *f;
    int height;
    double x_min, x_max, y_top, y_step; /* x_max 0: there are no points */
};

static const char *colour_of(const struct plot_series *series)
{
    return series->colour < 0 ? "#444" : colours[(size_t)series->colour % (sizeof colours / sizeof *colours)];
}

/* Steps of 1, 2 or 5 times a power of ten, at most 8 of them. */
static double nice_step(double most)
{
    double power = pow(10, floor(log10(most / 8)));
    double ratio = most / 8 / power;
    return power * (ratio <= 1 ? 1 : ratio <= 2 ? 2 : ratio <= 5 ? 5 : 10);
}

static void measure(struct canvas *c)
{
    const struct plot *p = c->plot;
    double most = 0;
    int n_named = 0;
    for (int s = 0; s < p->n_series; s++) {
        const struct plot_series *series = &p->series[s];
        n_named += series->name != NULL;
        for (int i = 0; i < series->n; i++) {
            most = fmax(most, series->y[i]);
            if (series->style == PLOT_ACROSS) continue;
            if (c->x_max <= 0 || series->x[i] < c->x_min) c->x_min = series->x[i];
            if (series->x[i] > c->x_max) c->x_max = series->x[i];
        }
    }
    if (p->y_top > 0) most = p->y_top;
    c->y_step = nice_step(most > 0 ? most : 1);
    c->y_top = p->y_top > 0 ? p->y_top : c->y_step * fmax(1, ceil(most / c->y_step));
    int legend = TOP + (n_named + 1) * LEGEND_ROW + BOTTOM;
    c->height = legend > LEAST_HEIGHT ? legend : LEAST_HEIGHT;
}

static double place_x(const struct canvas *c, double x)
{
    double left = LEFT + INSET, right = WIDTH - RIGHT - INSET;
    if (c->x_max <= c->x_min) return (left + right) / 2;
    return left + (right - left) * log(x / c->x_min) / log(c->x_max / c->x_min);
}

static double place_y(const struct canvas *c, double y)
{
    return TOP + (c->height - TOP - BOTTOM) * (1 - y / c->y_top);
}

static void draw_text(const struct canvas *c, double x, double y, const char *attributes, const char *text)
{
    fprintf(c->f, "<text x=\"%.1f\" y=\"%.1f\" %s>", x, y, attributes);
    for (; *text; text++) {
        if (*text == '&')
            fputs("&amp;", c->f);
        else if (*text == '<')
            fputs("&lt;", c->f);
        else if (*text == '>')
            fputs("&gt;", c->f);
        else
            fputc((unsigned char)*text < 0x20 ? ' ' : *text, c->f);
    }
    fputs("</text>\n", c->f);
}

static void draw_line(const struct canvas *c, double x1, double y1, double x2, double y2, const char *attributes)
{
    fprintf(c->f, "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" %s/>\n", x1, y1, x2, y2, attributes);
}

/* The least x of all points that is above `above`; infinity if there is none. */
static double next_x(const struct plot *p, double above)
{
    double next = INFINITY;
    for (int s = 0; s < p->n_series; s++)
        for (int i = 0; i < p->series[s].n && p->series[s].style != PLOT_ACROSS; i++)
            if (p->series[s].x[i] > above && p->series[s].x[i] < next) next = p->series[s].x[i];
    return next;
}

/* A tick at every value that there is, as far as their numbers do not touch. */
static void draw_x_axis(const struct canvas *c)
{
    double bottom = c->height - BOTTOM, last = -TICK_GAP;
    char text[32];
    for (double x = 0; isfinite(x = next_x(c->plot, x));) {
        double at = place_x(c, x);
        draw_line(c, at, bottom, at, bottom + 5, "stroke=\"#444\"");
        if (at - last < TICK_GAP) continue;
        last = at;
        snprintf(text, sizeof text, "%.4g", x);
        draw_text(c, at, bottom + 19, "text-anchor=\"middle\"", text);
    }
    draw_line(c, LEFT, bottom, WIDTH - RIGHT, bottom, "stroke=\"#444\"");
    draw_text(c, (LEFT + WIDTH - RIGHT) / 2.0, bottom + 42, "text-anchor=\"middle\"", c->plot->x_label);
}

static void draw_y_axis(const struct canvas *c)
{
    char text[32], turned[96];
    double middle = (TOP + c->height - BOTTOM) / 2.0;
    for (int i = 0; i <= (int)floor(c->y_top / c->y_step + 1e-6); i++) {
        double y = place_y(c, i * c->y_step);
        snprintf(text, sizeof text, "%.4g", i * c->y_step);
        if (i) draw_line(c, LEFT, y, WIDTH - RIGHT, y, "stroke=\"#ddd\"");
        draw_text(c, LEFT - 8, y + 4, "text-anchor=\"end\"", text);
    }
    draw_line(c, LEFT, TOP, LEFT, c->height - BOTTOM, "stroke=\"#444\"");
    snprintf(turned, sizeof turned, "text-anchor=\"middle\" transform=\"rotate(-90 20 %.1f)\"", middle);
    draw_text(c, 20, middle, turned, c->plot->y_label);
}

static void line_attributes(const struct plot_series *series, char *buf, size_t size)
{
    bool points = series->style == PLOT_POINTS;
    snprintf(buf, size, "stroke=\"%s\" stroke-width=\"%s\" %s", colour_of(series), points ? "2" : "1.5",
             points ? "" : dashes);
}

static void draw_series(const struct canvas *c, const struct plot_series *series)
{
    char attributes[128];
    line_attributes(series, attributes, sizeof attributes);
    if (!series->n) return;
    if (series->style == PLOT_ACROSS) {
        double y = place_y(c, series->y[0]);
        draw_line(c, LEFT, y, WIDTH - RIGHT, y, attributes);
        return;
    }
    double wide = series->style == PLOT_DASHED && series->n == 1 ? 12 : 0;
    fprintf(c->f, "<polyline fill=\"none\" %s points=\"", attributes);
    for (int i = 0; i < series->n; i++) {
        double x = place_x(c, series->x[i]), y = place_y(c, series->y[i]);
        fprintf(c->f, "%s%.1f,%.1f", i ? " " : "", x - wide, y);
        if (wide > 0) fprintf(c->f, " %.1f,%.1f", x + wide, y);
    }
    fprintf(c->f, "\"/>\n");
    for (int i = 0; i < series->n && series->style == PLOT_POINTS; i++)
        fprintf(c->f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"%s\"/>\n", place_x(c, series->x[i]),
                place_y(c, series->y[i]), colour_of(series));
}

static void draw_legend(const struct canvas *c)
{
    char attributes[128];
    double x = WIDTH - RIGHT + 16, y = TOP + 8;
    for (int s = 0; s < c->plot->n_series; s++) {
        const struct plot_series *series = &c->plot->series[s];
        if (!series->name) continue;
        line_attributes(series, attributes, sizeof attributes);
        draw_line(c, x, y, x + 26, y, attributes);
        draw_text(c, x + 34, y + 4, "", series->name);
        y += LEGEND_ROW;
    }
}

int plot_write(const struct plot *plot, const char *path)
{
    struct canvas c = {.plot = plot, .f = fopen(path, "we")};
    if (!c.f) FAIL(ERR_IO, "%s: cannot write: %s", path, strerror(errno));
    measure(&c);
    fprintf(c.f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" "
            "font-family=\"sans-serif\" font-size=\"13\" fill=\"#222\">\n"
            "<rect width=\"%d\" height=\"%d\" fill=\"#fff\"/>\n",
            WIDTH, c.height, WIDTH, c.height, WIDTH, c.height);
    draw_text(&c, LEFT, 26, "font-size=\"16\"", plot->title);
    draw_y_axis(&c);
    draw_x_axis(&c);
    for (int s = 0; s < plot->n_series; s++) draw_series(&c, &plot->series[s]);
    draw_legend(&c);
    fprintf(c.f, "</svg>\n");
    bool failed = ferror(c.f) != 0;
    if (fclose(c.f) || failed) FAIL(ERR_IO, "%s: cannot write: %s", path, strerror(errno));
    return OK;
}
