/* test_memory - what ranks hold and read: weights and lanes shrink with the number of ranks, the bytes read from files
 * sum to one copy and what is replicated, and the memory plan is what the system then counts. */
#include "tests/engine_fixture.h"

static struct ranks ranks;

/* What one rank says of itself. */
struct share {
    int64_t decoder, vision, lanes, page_bytes, read; /* bytes of weights, lanes, bytes of a page, bytes read */
};

static int64_t row_bytes(const struct memory_plan *plan, const char *label)
{
    int64_t bytes = 0;
    for (int i = 0; i < plan->n_rows; i++)
        if (!strcmp(plan->row[i].label, label)) bytes += (int64_t)plan->row[i].bytes;
    return bytes;
}

/* The plan of a rank as `vitrail plan` computes it, with no other rank there. */
static struct share plan_share(const struct config *config, const struct model_dims *dims,
                               struct checkpoint *checkpoint, struct ops *ops, int rank, int n_ranks,
                               struct memory_plan *plan)
{
    struct comm comm = {.rank = rank, .size = n_ranks, .local_rank = rank, .local_size = n_ranks};
    struct resources r;
    DEMAND(resources_open(config, dims, ops, &comm, &r));
    DEMAND(plan_measure(&r, checkpoint, 0, 0, plan));
    resources_close(&r);
    return (struct share){row_bytes(plan, "decoder weights"), row_bytes(plan, "vision weights"), plan->lanes,
                          (int64_t)plan->page_bytes, 0};
}

/* ---- shares ---- */

/* Sums over ranks against one rank's: matrices are dealt out, vectors (float32) and their alignment replicated. */
static void check_shares(const char *name, const struct share *all, const struct share *whole,
                         const struct model_dims *d)
{
    int n = ranks.comm->size;
    int64_t decoder = 0, lanes = 0, fewest = INT64_MAX, most = 0;
    int64_t vectors = (4 * (int64_t)d->n_layers + 1) * (d->hidden_size * 4 + ARENA_ALIGNMENT) +
                      10 * (int64_t)d->n_layers * ARENA_ALIGNMENT + 2 * ARENA_ALIGNMENT;
    for (int r = 0; r < n; r++) {
        decoder += all[r].decoder;
        lanes += all[r].lanes;
        fewest = all[r].lanes < fewest ? all[r].lanes : fewest;
        most = all[r].lanes > most ? all[r].lanes : most;
        CHECK(all[r].vision == whole->vision && all[r].page_bytes == whole->page_bytes);
    }
    if (d->n_kv_heads >= n) {
        CHECK(lanes == (int64_t)d->n_layers * d->n_kv_heads && lanes == whole->lanes);
        CHECK(most - fewest <= 1);
        CHECK(decoder >= whole->decoder && decoder <= whole->decoder + n * vectors);
        if (d->n_heads * d->head_dim * d->n_layers > 2000)
            for (int r = 0; r < n; r++) CHECK(n * all[r].decoder < whole->decoder * 11 / 10 + n * vectors);
    } else {
        CHECK(lanes == (int64_t)d->n_layers * n); /* a group on every rank, some twice */
        CHECK(decoder > whole->decoder);
    }
    if (ranks.comm->rank == 0)
        printf("\n    %-16s decoder %.2f MB whole, %.2f MB on %d ranks; lanes %lld to %lld", name,
               (double)whole->decoder * 1e-6, (double)decoder * 1e-6, n, (long long)fewest, (long long)most);
}

/* Bytes that every rank reads whole: configuration and headers, and the vision tower as the file has it. */
static int64_t replicated_bytes(const char *model, const struct model_dims *d)
{
    struct model_dims dims;
    struct checkpoint *c;
    uint64_t before = file_bytes_read_by_process();
    DEMAND(model_dims_load(model, &dims));
    DEMAND(checkpoint_open(model, &c));
    int64_t bytes = (int64_t)(file_bytes_read_by_process() - before);
    for (int i = 0; i < checkpoint_count(c); i++) {
        const char *name = checkpoint_name(c, i);
        struct checkpoint_tensor t;
        int layer = -1;
        if (strncmp(name, "vision_tower.", 13) != 0 && strncmp(name, "multi_modal_projector.", 22) != 0) continue;
        if (strstr(name, "post_layernorm")) continue;
        if (sscanf(name, "vision_tower.vision_model.encoder.layers.%d.", &layer) == 1 &&
            layer >= d->vision.n_run_layers)
            continue;
        CHECK(checkpoint_find(c, name, &t));
        bytes += t.rows * t.cols * (int64_t)dtype_size(d->dtype);
    }
    checkpoint_close(c);
    return bytes;
}

/* The rest of what ranks read, against what one rank reads of it: as much as weights are held more than once. */
static void check_read(const struct share *all, const struct share *whole, int64_t replicated, int64_t dealt)
{
    int n = ranks.comm->size;
    int64_t sum = 0, decoder = 0;
    for (int r = 0; r < n; r++) {
        sum += all[r].read;
        decoder += all[r].decoder;
    }
    double copies = (double)(sum - n * replicated) / (double)dealt, held = (double)decoder / (double)whole->decoder;
    if (ranks.comm->rank == 0)
        printf("; read %.2f MB, %.2f of it by every rank, the rest %.3f times", (double)sum * 1e-6,
               (double)replicated * 1e-6, copies);
    CHECK(copies > 0.98 && copies < held + 0.02);
}

/* dealt: bytes of decoder weights in the files, 0 if they are too small to tell from the rest. */
static void run_shares(const char *name, const char *model, int64_t dealt)
{
    static const char *const settings[] = {"max_model_len", "256", "max_num_batched_tokens", "600", NULL};
    struct memory_plan plan;
    struct share mine, whole, *all = take((size_t)ranks.comm->size * sizeof *all);
    struct config config = service_config(model, settings);
    config.cpu_threads = 1;
    struct engine *e;
    uint64_t before = file_bytes_read_by_process();
    DEMAND(engine_open(&config, ranks.comm, ranks.liveness, &e));
    mine = (struct share){row_bytes(&e->plan, "decoder weights"), row_bytes(&e->plan, "vision weights"), e->plan.lanes,
                          (int64_t)e->plan.page_bytes, (int64_t)(file_bytes_read_by_process() - before)};
    DEMAND(comm_all_gather_host(ranks.comm, all, &mine, sizeof mine));
    struct checkpoint *checkpoint;
    struct ops ops;
    DEMAND(checkpoint_open(model, &checkpoint));
    DEMAND(ops_open(&ops, "cpu", 0, 1));
    whole = plan_share(&config, engine_dims(e), checkpoint, &ops, 0, 1, &plan);
    /* and what `vitrail plan` would have said of this rank is what it took */
    struct share said =
        plan_share(&config, engine_dims(e), checkpoint, &ops, ranks.comm->rank, ranks.comm->size, &plan);
    CHECK(said.decoder == mine.decoder && said.vision == mine.vision && said.lanes == mine.lanes);
    check_shares(name, all, &whole, engine_dims(e));
    if (dealt) check_read(all, &whole, replicated_bytes(model, engine_dims(e)), dealt);
    ops_close(&ops);
    checkpoint_close(checkpoint);
    engine_close(e);
    free(all);
}

static void test_shares(void)
{
    static const char *const names[] = {"heads_6", "heads_7", "heads_9", "heads_14", "heads_14_one_kv", "llava"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char path[512];
        snprintf(path, sizeof path, GOLDEN "/%s", names[i]);
        run_shares(names[i], path, 0);
    }
    run_shares("demo", DEMO, 16525824);
    if (!file_exists(SMOLLM2)) {
        printf("\n    SmolLM2 skipped: no models/smollm2\n  ");
        return;
    }
    if (!SLOW_BUILD) run_shares("SmolLM2", SMOLLM2, 96576768);
}

/* ---- the plan and the system ---- */

/* Fills every slot and the largest prompt step, then decodes with all of them. */
static void full_batch(struct service *s)
{
    const struct config *c = engine_config(s->engine);
    const struct model_dims *d = engine_dims(s->engine);
    int n = c->max_num_seqs, each = c->max_num_batched_tokens / n;
    struct answer *a = take((size_t)n * sizeof *a);
    if (each > c->max_model_len - 4) each = c->max_model_len - 4;
    for (int i = 0; i < n; i++) {
        struct request r = request_random((uint64_t)i, each, d->vocab_size, 4);
        r.budget = c->kv_cache.budget;
        service_submit(s, &r, &a[i]);
    }
    service_run(s);
    if (service_counters(s).max_running != n)
        fprintf(stderr, "%d ran at once, %d were to\n", service_counters(s).max_running, n);
    CHECK(service_counters(s).max_running == n);
    for (int i = 0; i < n; i++) answer_free(&a[i]);
    free(a);
}

/* Four pages, so that the vision tower's memory is used too. */
static void four_pages(struct service *s)
{
    int n;
    struct answer a;
    struct question *q = questions_load(&n);
    struct request r = request_question(s, questions_find(q, n, "dev-4p-0000"));
    r.max_tokens = 2;
    service_submit(s, &r, &a);
    service_run(s);
    answer_free(&a);
    questions_free(q, n);
}

static void run_plan(const char *name, const char *model, const char *const *settings, bool images)
{
    struct service s;
    service_open(&s, &ranks, model, settings);
    if (!service_follow(&s)) {
        full_batch(&s);
        if (images) four_pages(&s);
    }
    service_stop(&s);
    struct engine_counters c = service_counters(&s);
    double planned = (double)c.planned_bytes, grew = (double)c.used_bytes, off = fabs(grew - planned);
    double allowed = fmax(0.02 * planned, 16 * 1048576.0);
    printf("\n    rank %d, %-24s planned %7.1f MiB, grew %7.1f MiB", ranks.comm->rank, name, planned / 1048576,
           grew / 1048576);
    CHECK(SLOW_BUILD || off <= allowed); /* sanitizers take memory of their own */
    service_close(&s);
}

static void test_plan(void)
{
    static const char *const small[] = {
        "max_num_seqs", "8", "max_num_batched_tokens", "2400", "kv_cache_memory_bytes", "128MiB", "kv_cache.policy",
        "vl_cache",     NULL};
    static const char *const wide[] = {
        "max_num_seqs", "64", "max_num_batched_tokens", "600", "max_model_len", "512", "kv_cache_memory_bytes",
        "300MiB",       NULL};
    static const char *const floats[] = {"max_num_seqs",
                                         "4",
                                         "max_num_batched_tokens",
                                         "1152",
                                         "dtype",
                                         "float32",
                                         "kv_cache_memory_bytes",
                                         "64MiB",
                                         "load_format",
                                         "dummy",
                                         NULL};
    static const char *const smol[] = {"max_num_seqs",
                                       "16",
                                       "max_num_batched_tokens",
                                       "256",
                                       "max_model_len",
                                       "512",
                                       "kv_cache_memory_bytes",
                                       "96MiB",
                                       "kv_cache.policy",
                                       "vl_cache",
                                       NULL};
    run_plan("demo, VL-Cache", DEMO, small, !SLOW_BUILD);
    if (SLOW_BUILD) return;
    run_plan("demo, 64 sequences", DEMO, wide, false);
    run_plan("demo, dummy float32", DEMO, floats, false);
    if (file_exists(SMOLLM2)) run_plan("SmolLM2", SMOLLM2, smol, false);
    printf("\n  ");
}

int main(void)
{
    static const struct check_case cases[] = {
        {"weights, lanes and bytes read", test_shares}, {"the plan is what the system counts", test_plan}, {0}};
    ranks = ranks_open();
    return ranks_run(&ranks, "memory", cases);
}
