/* What bench found as an SVG: decode ms against batch or prompt length, a line for every other setting. */
#include <errno.h>
#include <math.h>
#include <string.h>

#include "runtime/bench_internal.h"

enum { WIDTH = 860, LEFT = 70, RIGHT = 250, TOP = 46, BOTTOM = 58, INSET = 24, LEGEND_ROW = 20, TICK_GAP = 34 };

static const char *const colours[] = {"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                      "#e69f00", "#56b4e9", "#000000", "#7f7f7f"};

struct plot {
    const struct bench *b;
    FILE *f;
    bool by_prompt; /* x is the prompt length, not the batch */
    int height, n_series;
    double x_min, x_max, y_top, y_step;
};

static int x_of(const struct plot *p, const struct bench_run *run)
{
    return p->by_prompt ? run->prompt_len : run->batch;
}

/* Runs of one line stand together, as the sweep made them. */
static bool same_series(const struct plot *p, const struct bench_run *a, const struct bench_run *b)
{
    return !strcmp(a->policy, b->policy) && a->budget.share == b->budget.share &&
           a->budget.tokens == b->budget.tokens && (p->by_prompt || a->prompt_len == b->prompt_len);
}

static int series_end(const struct plot *p, int first)
{
    int end = first;
    while (end < p->b->n_runs && same_series(p, &p->b->runs[first], &p->b->runs[end])) end++;
    return end;
}

/* Steps of 1, 2 or 5 times a power of ten, at most 8 of them. */
static double nice_step(double most)
{
    double power = pow(10, floor(log10(most / 8)));
    double ratio = most / 8 / power;
    return power * (ratio <= 1 ? 1 : ratio <= 2 ? 2 : ratio <= 5 ? 5 : 10);
}

static void measure(struct plot *p)
{
    const struct bench *b = p->b;
    double most = 0;
    p->by_prompt = !b->options->find_batch && b->lists.n_batches == 1 && b->lists.n_prompt_lens > 1;
    for (int i = 0; i < b->n_runs; i++) {
        const struct bench_run *run = &b->runs[i];
        int x = x_of(p, run);
        if (!i || x < p->x_min) p->x_min = x;
        if (!i || x > p->x_max) p->x_max = x;
        most = fmax(most, fmax(run->decode_ms, run->floor_ms));
    }
    p->y_step = nice_step(most > 0 ? most : 1);
    p->y_top = p->y_step * fmax(1, ceil(most / p->y_step));
    for (int i = 0; i < b->n_runs; i = series_end(p, i)) p->n_series++;
    int legend = TOP + (p->n_series + 2) * LEGEND_ROW + BOTTOM;
    p->height = legend > 480 ? legend : 480;
}

/* Batches and lengths go by factors, so x is logarithmic. */
static double place_x(const struct plot *p, double x)
{
    double left = LEFT + INSET, right = WIDTH - RIGHT - INSET;
    if (p->x_max <= p->x_min) return (left + right) / 2;
    return left + (right - left) * log(x / p->x_min) / log(p->x_max / p->x_min);
}

static double place_y(const struct plot *p, double y) { return TOP + (p->height - TOP - BOTTOM) * (1 - y / p->y_top); }

static void draw_text(const struct plot *p, double x, double y, const char *attributes, const char *text)
{
    fprintf(p->f, "<text x=\"%.1f\" y=\"%.1f\" %s>%s</text>\n", x, y, attributes, text);
}

static void draw_line(const struct plot *p, double x1, double y1, double x2, double y2, const char *attributes)
{
    fprintf(p->f, "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" %s/>\n", x1, y1, x2, y2, attributes);
}

/* A tick at every value that was run, ascending, as far as their numbers do not touch. */
static void draw_x_axis(const struct plot *p)
{
    double bottom = p->height - BOTTOM, last = -TICK_GAP;
    char text[32];
    for (int x = 0, next; p->b->n_runs && x < (int)p->x_max; x = next) {
        next = (int)p->x_max;
        for (int i = 0; i < p->b->n_runs; i++)
            if (x_of(p, &p->b->runs[i]) > x && x_of(p, &p->b->runs[i]) < next) next = x_of(p, &p->b->runs[i]);
        double at = place_x(p, next);
        draw_line(p, at, bottom, at, bottom + 5, "stroke=\"#444\"");
        if (at - last < TICK_GAP) continue;
        last = at;
        snprintf(text, sizeof text, "%d", next);
        draw_text(p, at, bottom + 19, "text-anchor=\"middle\"", text);
    }
    draw_line(p, LEFT, bottom, WIDTH - RIGHT, bottom, "stroke=\"#444\"");
    draw_text(p, (LEFT + WIDTH - RIGHT) / 2.0, bottom + 42, "text-anchor=\"middle\"",
              p->by_prompt ? "prompt length, tokens of text" : "batch, sequences at once");
}

static void draw_y_axis(const struct plot *p)
{
    char text[32], turned[96];
    double middle = (TOP + p->height - BOTTOM) / 2.0;
    for (int i = 0; i <= (int)lround(p->y_top / p->y_step); i++) {
        double y = place_y(p, i * p->y_step);
        snprintf(text, sizeof text, "%.4g", i * p->y_step);
        if (i) draw_line(p, LEFT, y, WIDTH - RIGHT, y, "stroke=\"#ddd\"");
        draw_text(p, LEFT - 8, y + 4, "text-anchor=\"end\"", text);
    }
    draw_line(p, LEFT, TOP, LEFT, p->height - BOTTOM, "stroke=\"#444\"");
    snprintf(turned, sizeof turned, "text-anchor=\"middle\" transform=\"rotate(-90 20 %.1f)\"", middle);
    draw_text(p, 20, middle, turned, "ms a decode step");
}

/* A line through one figure of a series; a floor of a single run is a short dash below its point. */
static void draw_curve(const struct plot *p, int first, int end, bool floor, const char *colour)
{
    const struct bench_run *runs = p->b->runs;
    double wide = floor && end == first + 1 ? 12 : 0;
    fprintf(p->f, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"%s\"%s points=\"", colour, floor ? "1.5" : "2",
            floor ? " stroke-dasharray=\"5 4\"" : "");
    for (int i = first; i < end; i++) {
        double x = place_x(p, x_of(p, &runs[i])), y = place_y(p, floor ? runs[i].floor_ms : runs[i].decode_ms);
        fprintf(p->f, "%s%.1f,%.1f", i > first ? " " : "", x - wide, y);
        if (wide > 0) fprintf(p->f, " %.1f,%.1f", x + wide, y);
    }
    fprintf(p->f, "\"/>\n");
    for (int i = first; i < end && !floor; i++)
        fprintf(p->f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"%s\"/>\n", place_x(p, x_of(p, &runs[i])),
                place_y(p, runs[i].decode_ms), colour);
}

static void draw_legend_row(const struct plot *p, int row, const char *attributes, const char *text)
{
    double x = WIDTH - RIGHT + 16, y = TOP + row * LEGEND_ROW + 8;
    draw_line(p, x, y, x + 26, y, attributes);
    draw_text(p, x + 34, y + 4, "", text);
}

/* "vl_cache 0.1, prompt 512"; a budget that keeps all and a length that x shows go without saying. */
static void series_name(const struct plot *p, const struct bench_run *run, char *buf, size_t size)
{
    char budget[32], prompt[32];
    bool whole = !run->budget.tokens && run->budget.share >= 1;
    snprintf(prompt, sizeof prompt, ", prompt %d", run->prompt_len);
    snprintf(buf, size, "%s%s%s%s", run->policy, whole ? "" : " ",
             whole ? "" : kv_budget_print(run->budget, budget, sizeof budget), p->by_prompt ? "" : prompt);
}

static void draw_series(const struct plot *p)
{
    int row = 0;
    char text[128], attributes[96];
    for (int first = 0, end; first < p->b->n_runs; first = end, row++) {
        const struct bench_run *run = &p->b->runs[first];
        const char *colour = colours[(size_t)row % (sizeof colours / sizeof *colours)];
        end = series_end(p, first);
        draw_curve(p, first, end, true, colour);
        draw_curve(p, first, end, false, colour);
        series_name(p, run, text, sizeof text);
        snprintf(attributes, sizeof attributes, "stroke=\"%s\" stroke-width=\"2\"", colour);
        draw_legend_row(p, row, attributes, text);
    }
    snprintf(text, sizeof text, "floor: bytes read / %s", bench__floor_name(p->b));
    draw_legend_row(p, row, "stroke=\"#444\" stroke-width=\"1.5\" stroke-dasharray=\"5 4\"", text);
}

static void draw_title(const struct plot *p)
{
    const struct bench *b = p->b;
    int ranks = engine_config(b->engine)->tensor_parallel_size;
    char text[160], batch[32] = "";
    if (p->by_prompt) snprintf(batch, sizeof batch, ", batch %d", b->lists.batch[0]);
    snprintf(text, sizeof text, "Decode step on %d %s rank%s%s, %d tokens generated", ranks, b->cuda ? "GPU" : "CPU",
             ranks == 1 ? "" : "s", batch, b->options->gen_len);
    draw_text(p, LEFT, 26, "font-size=\"16\"", text);
}

int bench__write_plot(const struct bench *b, const char *path)
{
    struct plot p = {.b = b, .f = fopen(path, "w")};
    if (!p.f) FAIL(ERR_IO, "%s: cannot write: %s", path, strerror(errno));
    measure(&p);
    fprintf(p.f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" "
            "font-family=\"sans-serif\" font-size=\"13\" fill=\"#222\">\n"
            "<rect width=\"%d\" height=\"%d\" fill=\"#fff\"/>\n",
            WIDTH, p.height, WIDTH, p.height, WIDTH, p.height);
    draw_title(&p);
    draw_y_axis(&p);
    draw_x_axis(&p);
    draw_series(&p);
    fprintf(p.f, "</svg>\n");
    bool failed = ferror(p.f) != 0;
    if (fclose(p.f) || failed) FAIL(ERR_IO, "%s: cannot write: %s", path, strerror(errno));
    return OK;
}
