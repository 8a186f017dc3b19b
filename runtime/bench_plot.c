/* What bench found as a plot: decode ms against batch or prompt length, a line for every other setting. */
#include <stdlib.h>
#include <string.h>

#include "runtime/bench_internal.h"
#include "runtime/plot.h"

enum { NAME_BYTES = 128 };

struct drawing {
    const struct bench *b;
    bool by_prompt;             /* x is the prompt length, not the batch */
    double *x, *ms, *floor;     /* [n_runs] */
    char (*name)[NAME_BYTES];   /* [n_runs] of series */
    struct plot_series *series; /* [2 n_runs + 1] */
    int n_series;
};

/* Runs of one line stand together, as the sweep made them. */
static bool same_series(const struct drawing *d, const struct bench_run *a, const struct bench_run *b)
{
    return !strcmp(a->policy, b->policy) && a->budget.share == b->budget.share &&
           a->budget.tokens == b->budget.tokens && (d->by_prompt || a->prompt_len == b->prompt_len);
}

/* "vl_cache 0.1, prompt 512"; a budget that keeps all and a length that x shows go without saying. */
static void series_name(const struct drawing *d, const struct bench_run *run, char *buf, size_t size)
{
    char budget[32], prompt[32];
    bool whole = !run->budget.tokens && run->budget.share >= 1;
    snprintf(prompt, sizeof prompt, ", prompt %d", run->prompt_len);
    snprintf(buf, size, "%s%s%s%s", run->policy, whole ? "" : " ",
             whole ? "" : kv_budget_print(run->budget, budget, sizeof budget), d->by_prompt ? "" : prompt);
}

/* Two series for each line: the floor, and what was measured. */
static void make_series(struct drawing *d)
{
    const struct bench *b = d->b;
    for (int i = 0; i < b->n_runs; i++) {
        d->x[i] = d->by_prompt ? b->runs[i].prompt_len : b->runs[i].batch;
        d->ms[i] = b->runs[i].decode_ms;
        d->floor[i] = b->runs[i].floor_ms;
    }
    for (int first = 0, end, row = 0; first < b->n_runs; first = end, row++) {
        for (end = first; end < b->n_runs && same_series(d, &b->runs[first], &b->runs[end]);) end++;
        struct plot_series line = {.x = d->x + first, .n = end - first, .colour = row};
        series_name(d, &b->runs[first], d->name[row], sizeof d->name[row]);
        line.y = d->floor + first, line.style = PLOT_DASHED;
        d->series[d->n_series++] = line;
        line.y = d->ms + first, line.style = PLOT_POINTS, line.name = d->name[row];
        d->series[d->n_series++] = line;
    }
}

static int draw(struct drawing *d, const char *path)
{
    const struct bench *b = d->b;
    int ranks = engine_config(b->engine)->tensor_parallel_size;
    char title[160], floor[64], batch[32] = "";
    make_series(d);
    snprintf(floor, sizeof floor, "floor: bytes read / %s", bench__floor_name(b));
    d->series[d->n_series++] = (struct plot_series){.name = floor, .colour = -1, .style = PLOT_DASHED};
    if (d->by_prompt) snprintf(batch, sizeof batch, ", batch %d", b->lists.batch[0]);
    snprintf(title, sizeof title, "Decode step on %d %s rank%s%s, %d tokens generated", ranks, b->cuda ? "GPU" : "CPU",
             ranks == 1 ? "" : "s", batch, b->options->gen_len);
    struct plot plot = {.title = title,
                        .x_label = d->by_prompt ? "prompt length, tokens of text" : "batch, sequences at once",
                        .y_label = "ms a decode step",
                        .series = d->series,
                        .n_series = d->n_series};
    return plot_write(&plot, path);
}

int bench__write_plot(const struct bench *b, const char *path)
{
    struct drawing d = {.b = b,
                        .by_prompt = !b->options->find_batch && b->lists.n_batches == 1 && b->lists.n_prompt_lens > 1};
    size_t n = (size_t)b->n_runs + 1;
    double *numbers = calloc(3 * n, sizeof *numbers);
    d.name = calloc(n, sizeof *d.name);
    d.series = calloc(2 * n + 1, sizeof *d.series);
    int rc = ERR_NOMEM;
    if (numbers && d.name && d.series) {
        d.x = numbers, d.ms = numbers + n, d.floor = numbers + 2 * n;
        rc = draw(&d, path);
    } else {
        (void)status_set(rc, __FILE__, __LINE__, "%s: no memory for the plot of %d runs", path, b->n_runs);
    }
    free(numbers);
    free(d.name);
    free(d.series);
    return rc;
}
