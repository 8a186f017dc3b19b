#include "runtime/bench.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/hash.h"
#include "base/log.h"

enum { MAX_BATCHES = 32, MAX_SETTINGS = 64 };

/* One line of the table. */
struct bench_run {
    char policy[32];
    struct kv_budget budget;
    int batch;
    double prefill_ms, decode_ms; /* of all prompts; of one full step */
    double tokens_per_s;          /* generated, prefill included */
    double decode_tokens_per_s;
    double fraction_of_gemm, fraction_of_floor;
    int64_t kv_bytes; /* kept of all prompts, all ranks */
};

struct bench {
    struct engine *engine;
    const struct bench_options *options;
    struct engine_floor floor;
    uint64_t seed;
    int n_done;
    int64_t kept_bytes;
};

/* ---- lists ---- */

static int parse_batches(const struct bench *b, int *out, int *n)
{
    const char *at = b->options->batches;
    int most = engine_config(b->engine)->max_num_seqs;
    for (*n = 0; *at && *n < MAX_BATCHES; at += *at == ',') {
        char *end;
        long value = strtol(at, &end, 10);
        if (end == at || (*end && *end != ',') || value < 1)
            FAIL(ERR_CONFIG, "--batch %s: expected numbers with commas between, as in 1,8,32", b->options->batches);
        if (value > most) FAIL(ERR_CONFIG, "--batch %ld exceeds max_num_seqs %d; raise that key", value, most);
        out[(*n)++] = (int)value;
        at = end;
    }
    return OK;
}

/* The i-th item of a comma list into buf; false past the end. */
static bool list_item(const char *list, int i, char *buf, size_t size)
{
    while (i-- > 0) {
        list = strchr(list, ',');
        if (!list) return false;
        list++;
    }
    snprintf(buf, size, "%.*s", (int)strcspn(list, ","), list);
    return true;
}

/* ---- one run ---- */

static void on_done(void *arg, const struct completion *done)
{
    struct bench *b = arg;
    b->n_done++;
    b->kept_bytes += done->bytes_kept;
}

static int submit(struct bench *b, struct kv_budget budget)
{
    const struct model_dims *dims = engine_dims(b->engine);
    const struct bench_options *o = b->options;
    struct request r = {.n_ids = o->prompt_len,
                        .max_tokens = o->gen_len,
                        .ignore_eos = true,
                        .sampling = {.top_p = 1, .repetition_penalty = 1},
                        .budget = budget};
    r.ids = malloc((size_t)o->prompt_len * sizeof *r.ids);
    if (!r.ids) FAIL(ERR_NOMEM, "bench: out of memory");
    for (int i = 0; i < o->prompt_len; i++) r.ids[i] = (int32_t)(hash_splitmix(b->seed++) % (uint64_t)dims->vocab_size);
    int rc = engine_submit(b->engine, &r, (struct sink){b, NULL, on_done});
    request_free(&r);
    return rc;
}

/* Clocks of a batch. Steps are only enqueued on a GPU, so the clock is read behind engine_finish: after each step with
 * prompt rows, and around the run of full steps, which overlap as they do in service. */
struct batch_clock {
    double prefill, full, full_start;
    int full_steps;
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
    bool prompts = after.prefill_tokens > before.prefill_tokens;
    bool full = !prompts && after.decode_tokens - before.decode_tokens == batch;
    if (full && !clock->in_full) {
        clock->in_full = true;
        clock->full_start = start;
    }
    if (full) clock->full_steps++;
    if (!full) TRY(end_full_steps(b, clock));
    if (!prompts) return OK;
    TRY(engine_finish(b->engine));
    clock->prefill += clock_seconds() - start;
    return OK;
}

static int run_batch(struct bench *b, struct bench_run *run)
{
    struct batch_clock clock = {.prefill = 0};
    int active;
    b->n_done = 0;
    b->kept_bytes = 0;
    for (int i = 0; i < run->batch; i++) TRY(submit(b, run->budget));
    double start = clock_seconds();
    do TRY(timed_step(b, run->batch, &clock, &active));
    while (active);
    TRY(end_full_steps(b, &clock));
    double seconds = clock_seconds() - start;
    TRY(engine_step(b->engine, &active)); /* releases the slots */
    run->prefill_ms = clock.prefill * 1e3;
    run->decode_ms = clock.full_steps ? clock.full / clock.full_steps * 1e3 : 0;
    run->tokens_per_s = (double)run->batch * b->options->gen_len / seconds;
    run->decode_tokens_per_s = run->decode_ms > 0 ? run->batch / run->decode_ms * 1e3 : 0;
    run->kv_bytes = b->kept_bytes;
    return OK;
}

/* Fractions of what the device can do. Prefill: products with the layers' matrices, and the causal half of attention
 * (the head, one row a prompt, is left out). Decode: bytes of weights and cache that a step must read. */
static void compare_with_floor(const struct bench *b, struct bench_run *run)
{
    double m = b->options->prompt_len, tokens = run->batch * m;
    double flops = 2.0 * tokens * (double)b->floor.layer_elements + 2.0 * tokens * m * (double)b->floor.attention_width;
    double generated = (double)run->batch * b->options->gen_len / 2.0;
    double bytes = (double)b->floor.weight_bytes + (double)run->kv_bytes + generated * (double)b->floor.kv_token_bytes;
    run->fraction_of_gemm = flops / (run->prefill_ms * 1e-3) / (b->floor.sum.gemm_tflops * 1e12);
    if (run->decode_ms > 0) run->fraction_of_floor = bytes / (run->decode_ms * 1e-3) / (b->floor.sum.gemv_gbs * 1e9);
}

static int best_of_repeats(struct bench *b, struct bench_run *best)
{
    for (int i = 0; i < b->options->repeats; i++) {
        struct bench_run run = *best;
        TRY(run_batch(b, &run));
        if (i == 0 || run.prefill_ms < best->prefill_ms) best->prefill_ms = run.prefill_ms;
        if (i == 0 || run.decode_ms < best->decode_ms) best->decode_ms = run.decode_ms;
        if (i == 0 || run.tokens_per_s > best->tokens_per_s) best->tokens_per_s = run.tokens_per_s;
        if (i == 0 || run.decode_tokens_per_s > best->decode_tokens_per_s)
            best->decode_tokens_per_s = run.decode_tokens_per_s;
        best->kv_bytes = run.kv_bytes;
    }
    compare_with_floor(b, best);
    return OK;
}

/* ---- output ---- */

static void print_head(const struct bench *b)
{
    const struct ops_ceilings *c = &b->floor.sum;
    fprintf(
        b->options->table,
        "ceilings, all ranks at once: gemm %.3f TFLOP/s, gemv %.2f GB/s, copy %.2f GB/s; weights read a step: %.1f MB\n"
        "prompt %d, generated %d\n%-14s %8s %6s %11s %10s %10s %10s %10s %9s\n",
        c->gemm_tflops, c->gemv_gbs, c->copy_gbs, (double)b->floor.weight_bytes * 1e-6, b->options->prompt_len,
        b->options->gen_len, "policy", "budget", "batch", "prefill ms", "of gemm", "decode ms", "of gemv", "tokens/s",
        "KV MiB");
}

static void print_run(FILE *out, const struct bench_run *run)
{
    char budget[32];
    fprintf(out, "%-14s %8s %6d %11.2f %9.0f%% %10.3f %9.0f%% %10.1f %9.2f\n", run->policy,
            kv_budget_print(run->budget, budget, sizeof budget), run->batch, run->prefill_ms,
            100 * run->fraction_of_gemm, run->decode_ms, 100 * run->fraction_of_floor, run->tokens_per_s,
            (double)run->kv_bytes / 1048576.0);
    fflush(out);
}

static int write_json(const struct bench *b, const struct bench_run *runs, int n)
{
    const struct ops_ceilings *c = &b->floor.sum;
    struct engine_counters counters;
    char budget[32];
    FILE *f = fopen(b->options->output, "w");
    if (!f) FAIL(ERR_IO, "%s: cannot write: %s", b->options->output, strerror(errno));
    engine_counters(b->engine, &counters);
    fprintf(f,
            "{\"device\": \"%s\", \"ranks\": %d, \"prompt_len\": %d, \"gen_len\": %d,\n \"ceilings\": "
            "{\"gemm_tflops\": %.5g, "
            "\"gemv_gbs\": %.5g, \"copy_gbs\": %.5g}, \"weight_bytes_per_step\": %zu, \"planned_bytes\": %zu, "
            "\"used_bytes\": %zu,\n \"runs\": [",
            engine_config(b->engine)->device == CONFIG_DEVICE_CUDA ? "cuda" : "cpu",
            engine_config(b->engine)->tensor_parallel_size, b->options->prompt_len, b->options->gen_len, c->gemm_tflops,
            c->gemv_gbs, c->copy_gbs, b->floor.weight_bytes, counters.planned_bytes, counters.used_bytes);
    for (int i = 0; i < n; i++)
        fprintf(f,
                "%s\n  {\"policy\": \"%s\", \"budget\": \"%s\", \"batch\": %d, \"prompt_len\": %d, \"gen_len\": %d, "
                "\"prefill_ms\": %.5g, \"decode_ms\": %.5g, \"tokens_per_s\": %.5g, \"decode_tokens_per_s\": %.5g, "
                "\"fraction_of_gemm\": %.4g, \"fraction_of_floor\": %.4g, \"kv_bytes\": %lld}",
                i ? "," : "", runs[i].policy, kv_budget_print(runs[i].budget, budget, sizeof budget), runs[i].batch,
                b->options->prompt_len, b->options->gen_len, runs[i].prefill_ms, runs[i].decode_ms,
                runs[i].tokens_per_s, runs[i].decode_tokens_per_s, runs[i].fraction_of_gemm, runs[i].fraction_of_floor,
                (long long)runs[i].kv_bytes);
    fprintf(f, "\n]}\n");
    if (fclose(f)) FAIL(ERR_IO, "%s: cannot write: %s", b->options->output, strerror(errno));
    return OK;
}

/* ---- the sweep ---- */

static int run_setting(struct bench *b, const struct policy_config *policy, const int *batches, int n_batches,
                       struct bench_run *runs, int *n_runs)
{
    TRY(engine_set_policy(b->engine, policy));
    for (int i = 0; i < n_batches && *n_runs < MAX_SETTINGS; i++) {
        struct bench_run *run = &runs[*n_runs];
        if (liveness_stop_requested(b->options->liveness)) return OK;
        *run = (struct bench_run){.budget = policy->budget, .batch = batches[i]};
        memcpy(run->policy, policy->policy, sizeof run->policy);
        TRY(best_of_repeats(b, run));
        (*n_runs)++;
        print_run(b->options->table, run);
    }
    return OK;
}

static int sweep(struct bench *b, struct bench_run *runs, int *n_runs)
{
    int batches[MAX_BATCHES], n_batches;
    struct policy_config policy = engine_config(b->engine)->kv_cache;
    const char *policies = b->options->policies ? b->options->policies : policy.policy;
    char name[sizeof policy.policy], budget[32];
    TRY(parse_batches(b, batches, &n_batches));
    for (int i = 0; list_item(policies, i, name, sizeof name); i++) {
        const struct policy_vt *vt;
        TRY(policy_find(name, &vt));
        memcpy(policy.policy, name, sizeof name);
        struct kv_budget whole = {1, 0};
        if (!vt->prefill_end) { /* budgets mean nothing to a policy without hooks */
            policy.budget = whole;
            TRY(run_setting(b, &policy, batches, n_batches, runs, n_runs));
            continue;
        }
        policy.budget = engine_config(b->engine)->kv_cache.budget;
        if (!b->options->budgets) TRY(run_setting(b, &policy, batches, n_batches, runs, n_runs));
        for (int j = 0; b->options->budgets && list_item(b->options->budgets, j, budget, sizeof budget); j++) {
            TRY(kv_budget_parse(budget, &policy.budget));
            TRY(run_setting(b, &policy, batches, n_batches, runs, n_runs));
        }
    }
    return OK;
}

int bench_run(struct engine *engine, const struct bench_options *options)
{
    struct bench b = {.engine = engine, .options = options, .seed = engine_config(engine)->seed};
    struct bench_run runs[MAX_SETTINGS];
    int n_runs = 0;
    log_line(LOG_INFO, "measuring what the device can do");
    TRY(engine_ceilings(engine, &b.floor));
    print_head(&b);
    TRY(sweep(&b, runs, &n_runs));
    return options->output ? write_json(&b, runs, n_runs) : OK;
}
