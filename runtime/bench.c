#include "runtime/bench.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/hash.h"
#include "base/log.h"
#include "runtime/bench_internal.h"

/* ---- one request ---- */

static void on_done(void *arg, const struct completion *done)
{
    struct bench *b = arg;
    b->bytes_kept += done->bytes_kept;
    b->bytes_full += done->bytes_full;
}

/* Images stand behind the first token, as behind a begin token, so that text follows them and judges the cache. */
static int add_images(struct bench *b, const struct vision_dims *v, struct request *r)
{
    size_t each = (size_t)v->image_size * (size_t)v->image_size * 3;
    int n = b->options->n_images, first = r->n_ids - n * v->n_image_tokens > 1;
    r->pixel_bytes = (size_t)n * each;
    r->spans = calloc((size_t)n, sizeof *r->spans);
    r->pixels = malloc(r->pixel_bytes);
    if (!r->spans || !r->pixels) FAIL(ERR_NOMEM, "bench: no memory for %d images (%zu bytes)", n, r->pixel_bytes);
    r->n_images = n;
    for (int i = 0; i < n; i++) {
        int start = first + i * v->n_image_tokens;
        r->spans[i] = (struct image_span){start, start + v->n_image_tokens};
        for (int k = 0; k < v->n_image_tokens; k++) r->ids[start + k] = v->image_token_id;
    }
    for (size_t i = 0; i < r->pixel_bytes; i += sizeof(uint64_t)) {
        uint64_t random = hash_splitmix(b->seed++);
        size_t left = r->pixel_bytes - i;
        memcpy(r->pixels + i, &random, left < sizeof random ? left : sizeof random);
    }
    return OK;
}

static int make_request(struct bench *b, const struct bench_run *run, struct request *r)
{
    const struct model_dims *dims = engine_dims(b->engine);
    int n = run->prompt_tokens;
    *r = (struct request){.n_ids = n,
                          .max_tokens = run->gen_len,
                          .ignore_eos = true,
                          .sampling = {.top_p = 1, .repetition_penalty = 1},
                          .budget = run->budget};
    r->ids = malloc((size_t)n * sizeof *r->ids);
    if (!r->ids) FAIL(ERR_NOMEM, "bench: out of memory");
    for (int i = 0; i < n; i++) r->ids[i] = (int32_t)(hash_splitmix(b->seed++) % (uint64_t)dims->vocab_size);
    return b->options->n_images ? add_images(b, &dims->vision, r) : OK;
}

static int submit(struct bench *b, const struct bench_run *run)
{
    struct request r;
    int rc = make_request(b, run, &r);
    if (!rc) rc = engine_submit(b->engine, &r, (struct sink){b, NULL, on_done});
    request_free(&r);
    return rc;
}

/* ---- one batch ---- */

/* Clocks of a batch. Steps are only enqueued on a GPU, so the clock is read behind engine_finish: after each step with
 * prompt rows, and around the run of full steps, which overlap as they do in service. */
struct batch_clock {
    double prefill, full, full_start;
    int full_steps, prompt_steps;
    int at_once; /* most sequences that decoded in one step */
    bool in_full;
};

static int end_full_steps(struct bench *b, struct batch_clock *clock)
{
    if (!clock->in_full) return OK;
    TRY(engine_finish(b->engine));
    clock->full += clock_seconds() - clock->full_start;
    clock->in_full = false;
    return OK;
}

/* One step. Full decode steps are those that decode the whole batch and nothing else. */
static int timed_step(struct bench *b, int batch, struct batch_clock *clock, int *active)
{
    struct engine_counters before, after;
    double start = clock_seconds();
    engine_progress(b->engine, &before);
    TRY(engine_step(b->engine, active));
    engine_progress(b->engine, &after);
    int decoded = (int)(after.decode_tokens - before.decode_tokens);
    bool prompts = after.prefill_tokens > before.prefill_tokens;
    bool full = !prompts && decoded == batch;
    if (decoded > clock->at_once) clock->at_once = decoded;
    if (full && !clock->in_full) {
        clock->in_full = true;
        clock->full_start = start;
    }
    if (full) clock->full_steps++;
    if (!full) TRY(end_full_steps(b, clock));
    if (!prompts) return OK;
    TRY(engine_finish(b->engine));
    clock->prefill += clock_seconds() - start;
    clock->prompt_steps++;
    return OK;
}

static void take_times(struct bench_run *run, const struct batch_clock *clock, double seconds, double vision)
{
    run->prefill_ms = clock->prefill * 1e3;
    run->decode_ms = clock->full_steps ? clock->full / clock->full_steps * 1e3 : 0;
    run->tokens_per_s = (double)run->batch * run->gen_len / seconds;
    run->decode_tokens_per_s = run->decode_ms > 0 ? run->batch / run->decode_ms * 1e3 : 0;
    run->images_per_s = (double)run->batch * run->n_images / seconds;
    run->stages = (struct bench_stages){.vision_ms = vision * 1e3,
                                        .prefill_ms = (clock->prefill - vision) * 1e3,
                                        .decode_ms = clock->full * 1e3,
                                        .other_ms = (seconds - clock->prefill - clock->full) * 1e3};
}

/* engine_counters looks at the device and stays outside of what is timed. */
static int run_batch(struct bench *b, struct bench_run *run, struct batch_clock *clock)
{
    struct engine_counters before, after;
    int active;
    *clock = (struct batch_clock){.prefill = 0};
    b->bytes_kept = b->bytes_full = 0;
    engine_counters(b->engine, &before);
    for (int i = 0; i < run->batch; i++) TRY(submit(b, run));
    double start = clock_seconds();
    do TRY(timed_step(b, run->batch, clock, &active));
    while (active);
    TRY(end_full_steps(b, clock));
    double seconds = clock_seconds() - start;
    TRY(engine_step(b->engine, &active)); /* releases the slots */
    engine_counters(b->engine, &after);
    take_times(run, clock, seconds, after.vision_seconds - before.vision_seconds);
    run->kv_bytes = b->bytes_kept;
    run->kv_bytes_full = b->bytes_full;
    run->peak_bytes = after.used_bytes;
    return OK;
}

/* ---- against what the device can do ---- */

double bench__floor_gbs(const struct bench *b) { return b->cuda ? b->floor.sum.copy_gbs : b->floor.sum.gemv_gbs; }

const char *bench__floor_name(const struct bench *b) { return b->cuda ? "copy" : "gemv"; }

/* Operations of one image: patches, the encoder's products and attention, the projector. */
static double image_flops(const struct model_dims *dims)
{
    const struct vision_dims *v = &dims->vision;
    double rows = v->n_patches + 1, width = v->hidden_size, out = dims->hidden_size;
    double layer = 2 * rows * (4 * width * width + 2 * width * v->intermediate_size) + 4 * rows * rows * width;
    double patches = 2.0 * v->n_patches * 3 * v->patch_size * v->patch_size * width;
    return patches + v->n_run_layers * layer + 2.0 * v->n_image_tokens * (width * out + out * out);
}

/* Prefill: products with the layers' matrices, and the causal half of attention (the head, one row a prompt, is left
 * out). Decode: bytes of weights and cache that a step must read. */
static void compare_with_floor(const struct bench *b, struct bench_run *run)
{
    double m = run->prompt_tokens, tokens = run->batch * m;
    double flops = 2.0 * tokens * (double)b->floor.layer_elements + 2.0 * tokens * m * (double)b->floor.attention_width;
    if (run->n_images) flops += (double)run->batch * run->n_images * image_flops(engine_dims(b->engine));
    double generated = (double)run->batch * run->gen_len / 2.0;
    double bytes = (double)b->floor.weight_bytes + (double)run->kv_bytes + generated * (double)b->floor.kv_token_bytes;
    run->floor_ms = bytes / (bench__floor_gbs(b) * 1e9) * 1e3;
    if (run->prefill_ms > 0)
        run->fraction_of_gemm = flops / (run->prefill_ms * 1e-3) / (b->floor.sum.gemm_tflops * 1e12);
    if (run->decode_ms > 0) run->fraction_of_floor = run->floor_ms / run->decode_ms;
}

static double run_ms(const struct bench_run *run)
{
    const struct bench_stages *s = &run->stages;
    return s->vision_ms + s->prefill_ms + s->decode_ms + s->other_ms;
}

/* Every figure at its best; stages and images of the repeat that was fastest as a whole. */
static void take_best(struct bench_run *best, const struct bench_run *run)
{
    struct bench_run fastest = run_ms(run) < run_ms(best) ? *run : *best;
    if (run->prefill_ms < best->prefill_ms) best->prefill_ms = run->prefill_ms;
    if (run->decode_ms < best->decode_ms) best->decode_ms = run->decode_ms;
    if (run->tokens_per_s > best->tokens_per_s) best->tokens_per_s = run->tokens_per_s;
    if (run->decode_tokens_per_s > best->decode_tokens_per_s) best->decode_tokens_per_s = run->decode_tokens_per_s;
    if (run->peak_bytes > best->peak_bytes) best->peak_bytes = run->peak_bytes;
    best->images_per_s = fastest.images_per_s;
    best->stages = fastest.stages;
}

static int best_of_repeats(struct bench *b, struct bench_run *best)
{
    struct batch_clock clock;
    for (int i = 0; i < b->options->repeats; i++) {
        struct bench_run run = *best;
        TRY(run_batch(b, &run, &clock));
        if (i)
            take_best(best, &run);
        else
            *best = run;
    }
    compare_with_floor(b, best);
    return OK;
}

/* ---- the largest batch ---- */

/* Whether a batch decodes all its sequences in one step. What the pool has no pages for waits in the scheduler's queue
 * and begins when others have ended, so memory is never tried. */
static int runs_at_once(struct bench *b, const struct bench_run *like, int batch, bool *good)
{
    struct bench_run run = *like;
    struct batch_clock clock;
    struct engine_counters counters;
    run.batch = batch;
    int rc = run_batch(b, &run, &clock);
    *good = !rc && clock.at_once == batch;
    if (rc == ERR_REQUEST) { /* not even one fits, and nothing was queued */
        log_line(LOG_WARNING, "%s: %s", like->policy, status_message());
        return OK;
    }
    TRY(rc);
    engine_counters(b->engine, &counters);
    if (!*good && counters.max_running >= batch && clock.prompt_steps >= run.gen_len)
        log_line(LOG_WARNING,
                 "batch %d: the first sequences may have ended before the last began to decode; raise --gen-len above "
                 "the %d steps that the prompts took",
                 batch, clock.prompt_steps);
    return OK;
}

/* Doubles to the first batch that does not run at once, then halves the gap. 0 if a signal came or none runs. */
static int find_batch(struct bench *b, struct bench_run *run)
{
    const struct config *c = engine_config(b->engine);
    int most = c->max_num_seqs < c->max_queued ? c->max_num_seqs : c->max_queued;
    int good = 0, bad = most + 1;
    while (good + 1 < bad) {
        bool runs;
        int next = good ? 2 * good : 1;
        if (bad <= most) next = good + (bad - good) / 2;
        if (next > most) next = most;
        if (liveness_stop_requested(b->options->liveness)) return OK;
        TRY(runs_at_once(b, run, next, &runs));
        *(runs ? &good : &bad) = next;
    }
    run->batch = good;
    run->found = true;
    run->at_limit = good == most;
    return OK;
}

/* ---- the sweep ---- */

static int add_run(struct bench *b, struct bench_run *run)
{
    if (b->options->find_batch) TRY(find_batch(b, run));
    if (!run->batch || liveness_stop_requested(b->options->liveness)) return OK;
    struct bench_run *more = realloc(b->runs, (size_t)(b->n_runs + 1) * sizeof *more);
    if (!more) FAIL(ERR_NOMEM, "bench: out of memory");
    b->runs = more;
    TRY(best_of_repeats(b, run));
    b->runs[b->n_runs++] = *run;
    bench__print_run(b, run);
    return OK;
}

static int run_policy(struct bench *b, const struct policy_config *policy)
{
    const struct bench_lists *l = &b->lists;
    const struct bench_options *o = b->options;
    int n_batches = o->find_batch ? 1 : l->n_batches;
    TRY(engine_set_policy(b->engine, policy));
    for (int i = 0; i < l->n_prompt_lens * n_batches; i++) {
        int text = l->prompt_len[i / n_batches];
        struct bench_run run = {.budget = policy->budget,
                                .batch = o->find_batch ? 0 : l->batch[i % n_batches],
                                .prompt_len = text,
                                .gen_len = o->gen_len,
                                .n_images = o->n_images,
                                .prompt_tokens = text};
        if (o->n_images) run.prompt_tokens += o->n_images * engine_dims(b->engine)->vision.n_image_tokens;
        memcpy(run.policy, policy->policy, sizeof run.policy);
        TRY(add_run(b, &run));
    }
    return OK;
}

static int sweep(struct bench *b)
{
    struct policy_config policy = engine_config(b->engine)->kv_cache;
    const struct policy_vt *vt;
    for (int i = 0; i < b->lists.n_policies; i++) {
        memcpy(policy.policy, b->lists.policy[i], sizeof policy.policy);
        TRY(policy_find(policy.policy, &vt));
        bool whole = !vt->open; /* budgets mean nothing to a policy without hooks */
        for (int j = 0; j < (whole ? 1 : b->lists.n_budgets); j++) {
            if (liveness_stop_requested(b->options->liveness)) return OK;
            policy.budget = whole ? (struct kv_budget){1, 0} : b->lists.budget[j];
            TRY(run_policy(b, &policy));
        }
    }
    return OK;
}

/* A file that cannot be written is better found now than after the measurements. */
static int check_writable(const char *path)
{
    if (!path) return OK;
    FILE *f = fopen(path, "a");
    if (!f) FAIL(ERR_IO, "%s: cannot write: %s", path, strerror(errno));
    fclose(f);
    return OK;
}

static int measure_all(struct bench *b)
{
    const struct bench_options *o = b->options;
    TRY(check_writable(o->output));
    TRY(check_writable(o->plot));
    log_line(LOG_INFO, "measuring what the device can do");
    TRY(engine_ceilings(b->engine, &b->floor));
    bench__print_head(b);
    int rc = sweep(b);
    if (rc && rc != ERR_REQUEST) return rc;
    /* A setting that does not fit ends the sweep; what came before it counts. */
    if (o->output) TRY(bench__write_json(b, o->output));
    if (o->plot) TRY(bench__write_plot(b, o->plot));
    return rc;
}

int bench_run(struct engine *engine, const struct bench_options *options)
{
    const struct config *config = engine_config(engine);
    struct bench b = {
        .engine = engine, .options = options, .cuda = config->device == CONFIG_DEVICE_CUDA, .seed = config->seed};
    int rc = bench__read_lists(options, config, engine_dims(engine), &b.lists);
    if (!rc) rc = measure_all(&b);
    free(b.runs);
    return rc;
}
