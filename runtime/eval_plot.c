/* Exact match against budget as a plot: of runs that were just made, or of result files. A budget is drawn as the share
 * of the prompts' cache that was kept, in percent, so that budgets in tokens have their place beside shares. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "runtime/eval_internal.h"
#include "runtime/plot.h"

enum { MAX_RESULT = 1 << 30, NAME_BYTES = 160, PATH_BYTES = 4096, MAX_POINTS = 4096 };

struct point {
    char name[NAME_BYTES]; /* of its curve */
    bool full;
    double percent, exact;
};

struct points {
    struct point *point; /* [MAX_POINTS] */
    int n;
    char title[NAME_BYTES];
};

static int add(struct points *p, const char *policy, const char *dtype, const char *of, double share, double exact)
{
    bool plain = !strcmp(dtype, "auto");
    if (p->n == MAX_POINTS) FAIL(ERR_CONFIG, "a plot of more than %d runs", MAX_POINTS);
    struct point *to = &p->point[p->n++];
    *to = (struct point){.full = !strcmp(policy, "full"), .percent = 100 * share, .exact = exact};
    snprintf(to->name, sizeof to->name, "%.40s%s%.16s%s%.80s", policy, plain ? "" : " ", plain ? "" : dtype,
             *of ? ", " : "", of);
    return OK;
}

/* ---- drawing ---- */

/* By curve in the order of their first points, and within a curve by budget: a stable order whatever was run first. */
static void sort(struct points *p)
{
    for (int done = 0; done < p->n;) {
        int first = done;
        for (int i = first; i < p->n; i++) {
            if (strcmp(p->point[i].name, p->point[first].name) != 0) continue;
            struct point moving = p->point[i];
            int to = done++;
            memmove(&p->point[to + 1], &p->point[to], (size_t)(i - to) * sizeof moving);
            for (; to > first && p->point[to - 1].percent > moving.percent; to--) p->point[to] = p->point[to - 1];
            p->point[to] = moving;
        }
    }
}

static int make_series(const struct points *p, double *x, double *y, struct plot_series *series)
{
    int n = 0, colour = 0;
    for (int i = 0; i < p->n; i++) {
        x[i] = p->point[i].percent;
        y[i] = p->point[i].exact;
        if (i && !strcmp(p->point[i].name, p->point[i - 1].name)) {
            series[n - 1].n++;
            continue;
        }
        bool full = p->point[i].full;
        series[n++] = (struct plot_series){.name = p->point[i].name,
                                           .x = x + i,
                                           .y = y + i,
                                           .n = 1,
                                           .colour = full ? -1 : colour++,
                                           .style = full ? PLOT_ACROSS : PLOT_POINTS};
    }
    return n;
}

static int draw(struct points *p, const char *path)
{
    size_t n = (size_t)p->n + 1;
    double *x = calloc(2 * n, sizeof *x);
    struct plot_series *series = calloc(n, sizeof *series);
    int rc = ERR_NOMEM;
    if (x && series) {
        sort(p);
        struct plot plot = {.title = p->title,
                            .x_label = "KV cache kept of the prompt, %",
                            .y_label = "exact match",
                            .y_top = 1,
                            .series = series,
                            .n_series = make_series(p, x, x + n, series)};
        rc = plot_write(&plot, path);
    } else {
        (void)status_set(rc, __FILE__, __LINE__, "%s: no memory for a plot of %d runs", path, p->n);
    }
    free(x);
    free(series);
    return rc;
}

/* ---- where runs come from ---- */

static const char *last_part(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static double share_of(const struct eval_scores *s)
{
    return s->bytes_full > 0 && s->bytes_kept > 0 ? (double)s->bytes_kept / (double)s->bytes_full : 1;
}

int eval__plot(const char *path, const struct eval_options *options, const struct eval_one_run *runs, int n_runs)
{
    struct points p = {.point = calloc(MAX_POINTS, sizeof *p.point)};
    int rc = OK;
    if (!p.point) FAIL(ERR_NOMEM, "%s: no memory for the plot", path);
    snprintf(p.title, sizeof p.title, "%.100s: %d questions", last_part(options->questions), runs[0].scores.all.n);
    for (int i = 0; i < n_runs && !rc; i++)
        rc = add(&p, runs[i].config.policy, runs[i].dtype, "", share_of(&runs[i].scores),
                 runs[i].scores.all.exact_match);
    if (!rc) rc = draw(&p, path);
    free(p.point);
    return rc;
}

static int add_run(struct points *p, const cJSON *run, const char *what, const char *of)
{
    const char *policy = "", *dtype = "auto";
    double share = -1, exact = -1;
    TRY(json_string(run, what, "policy", &policy));
    TRY(json_string(run, what, "dtype", &dtype));
    TRY(json_double(run, what, "kept_share", 0, 1e6, &share));
    TRY(json_double(run, what, "exact_match", 0, 1, &exact));
    if (!*policy || share <= 0 || exact < 0)
        FAIL(ERR_FORMAT, "%s: a run without policy, kept_share or exact_match: no result of vitrail eval", what);
    return add(p, policy, dtype, of, share, exact);
}

/* Curves of several files carry the files' names. */
static int add_file(struct points *p, const char *path, bool only)
{
    cJSON *tree;
    TRY(json_parse_file(path, MAX_RESULT, &tree));
    const cJSON *runs = json_get(tree, "runs"), *run;
    int rc = cJSON_IsArray(runs) ? OK
                                 : status_set(ERR_FORMAT, __FILE__, __LINE__,
                                              "%s: has no list `runs`: no result of vitrail eval", path);
    cJSON_ArrayForEach (run, runs)
        if (!rc) rc = add_run(p, run, path, only ? "" : last_part(path));
    const cJSON *questions = json_get(tree, "questions");
    if (cJSON_IsString(questions)) snprintf(p->title, sizeof p->title, "%.150s", last_part(questions->valuestring));
    cJSON_Delete(tree);
    return rc;
}

int eval_plot_files(const char *files, const char *plot)
{
    struct points p = {.point = calloc(MAX_POINTS, sizeof *p.point)};
    char path[PATH_BYTES];
    bool only = !strchr(files, ',');
    int rc = OK;
    if (!p.point) FAIL(ERR_NOMEM, "%s: no memory for the plot", plot);
    while (files && !rc) {
        rc = eval__next_item(&files, "--from", path, sizeof path);
        if (!rc) rc = add_file(&p, path, only);
    }
    if (!rc) rc = draw(&p, plot);
    free(p.point);
    return rc;
}
