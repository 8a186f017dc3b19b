/* What bench found: the table for people and the JSON for programs. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "runtime/bench_internal.h"

/* ---- for people ---- */

void bench__print_head(const struct bench *b)
{
    const struct ops_ceilings *c = &b->floor.sum;
    const struct bench_options *o = b->options;
    char of_floor[16];
    snprintf(of_floor, sizeof of_floor, "of %s", bench__floor_name(b));
    fprintf(
        o->table,
        "ceilings, all ranks at once: gemm %.3f TFLOP/s, gemv %.2f GB/s, copy %.2f GB/s; weights read a step: %.1f MB\n"
        "generated %d",
        c->gemm_tflops, c->gemv_gbs, c->copy_gbs, (double)b->floor.weight_bytes * 1e-6, o->gen_len);
    if (o->n_images)
        fprintf(o->table, "; %d image%s of %d tokens in a prompt, beside the text", o->n_images,
                o->n_images == 1 ? "" : "s", engine_dims(b->engine)->vision.n_image_tokens);
    if (o->find_batch) fprintf(o->table, "; batch: the most that run at once, * bound by max_num_seqs");
    fprintf(o->table, "\n%-18s %8s %7s %7s %11s %8s %10s %8s %10s %9s", "policy", "budget", "prompt", "batch",
            "prefill ms", "of gemm", "decode ms", of_floor, "tokens/s", "KV MiB");
    if (o->n_images) fprintf(o->table, " %10s %9s", "vision ms", "images/s");
    fputc('\n', o->table);
}

void bench__print_run(const struct bench *b, const struct bench_run *run)
{
    FILE *to = b->options->table;
    char budget[32], batch[32];
    snprintf(batch, sizeof batch, "%s%d", run->at_limit ? "*" : "", run->batch);
    fprintf(to, "%-18s %8s %7d %7s %11.2f %7.0f%% %10.3f %7.0f%% %10.1f %9.2f", run->policy,
            kv_budget_print(run->budget, budget, sizeof budget), run->prompt_len, batch, run->prefill_ms,
            100 * run->fraction_of_gemm, run->decode_ms, 100 * run->fraction_of_floor, run->tokens_per_s,
            (double)run->kv_bytes / 1048576.0);
    if (run->n_images) fprintf(to, " %10.2f %9.2f", run->stages.vision_ms, run->images_per_s);
    fputc('\n', to);
    fflush(to);
}

/* ---- for programs ---- */

static void write_head(FILE *f, const struct bench *b)
{
    const struct ops_ceilings *c = &b->floor.sum;
    const struct bench_options *o = b->options;
    struct engine_counters counters;
    engine_counters(b->engine, &counters);
    fprintf(f, "{\"device\": \"%s\", ", b->cuda ? "cuda" : "cpu");
    if (o->commit) fprintf(f, "\"commit\": \"%s\", ", o->commit);
    fprintf(f, "\"ranks\": %d, ", engine_config(b->engine)->tensor_parallel_size);
    if (b->lists.n_prompt_lens == 1) fprintf(f, "\"prompt_len\": %d, ", b->lists.prompt_len[0]);
    fprintf(f, "\"gen_len\": %d, \"images\": %d,\n ", o->gen_len, o->n_images);
    fprintf(f,
            "\"ceilings\": {\"copy_gbs\": %.5g, \"gemm_tflops\": %.5g, \"gemv_gbs\": %.5g}, \"floor_of\": \"%s\",\n ",
            c->copy_gbs, c->gemm_tflops, c->gemv_gbs, bench__floor_name(b));
    fprintf(f, "\"weight_bytes_per_step\": %zu, \"planned_bytes\": %zu, \"used_bytes\": %zu,\n ", b->floor.weight_bytes,
            counters.planned_bytes, counters.used_bytes);
}

static void write_run(FILE *f, const struct bench_run *run)
{
    const struct bench_stages *s = &run->stages;
    char budget[32];
    fprintf(f, "{\"policy\": \"%s\", \"budget\": \"%s\", \"batch\": %d, \"prompt_len\": %d, \"gen_len\": %d, ",
            run->policy, kv_budget_print(run->budget, budget, sizeof budget), run->batch, run->prompt_len,
            run->gen_len);
    if (run->n_images)
        fprintf(f, "\"images\": %d, \"prompt_tokens\": %d, \"images_per_s\": %.5g, ", run->n_images, run->prompt_tokens,
                run->images_per_s);
    if (run->found)
        fprintf(f, "\"largest_batch\": true, \"limit\": \"%s\", ", run->at_limit ? "max_num_seqs" : "kv_pool");
    fprintf(f, "\"prefill_ms\": %.5g, \"decode_ms\": %.5g, \"tokens_per_s\": %.5g, \"decode_tokens_per_s\": %.5g, ",
            run->prefill_ms, run->decode_ms, run->tokens_per_s, run->decode_tokens_per_s);
    fprintf(f, "\"fraction_of_gemm\": %.4g, \"fraction_of_floor\": %.4g, \"floor_ms\": %.5g, ", run->fraction_of_gemm,
            run->fraction_of_floor, run->floor_ms);
    fprintf(f, "\"kv_bytes\": %" PRId64 ", \"kv_bytes_full\": %" PRId64 ", \"peak_bytes\": %zu, ", run->kv_bytes,
            run->kv_bytes_full, run->peak_bytes);
    fprintf(f, "\"stages\": {\"vision_ms\": %.5g, \"prefill_ms\": %.5g, \"decode_ms\": %.5g, \"other_ms\": %.5g}}",
            s->vision_ms, s->prefill_ms, s->decode_ms, s->other_ms);
}

int bench__write_json(const struct bench *b, const char *path)
{
    FILE *f = fopen(path, "w");
    if (!f) FAIL(ERR_IO, "%s: cannot write: %s", path, strerror(errno));
    write_head(f, b);
    fprintf(f, "\"runs\": [");
    for (int i = 0; i < b->n_runs; i++) {
        fputs(i ? ",\n  " : "\n  ", f);
        write_run(f, &b->runs[i]);
    }
    fprintf(f, "\n]}\n");
    bool failed = ferror(f) != 0;
    if (fclose(f) || failed) FAIL(ERR_IO, "%s: cannot write: %s", path, strerror(errno));
    return OK;
}
