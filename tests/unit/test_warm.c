/* test_warm - what model_warm does before the first request: on a backend that captures, every size of a decode step
 * runs twice, and rows of padding leave no trace in lanes, pages and sampling state. The CPU backend captures nothing,
 * so a table stands in for one that does: the CPU's ops, a GPU's sizes of steps, and a count of what was run. */
#include "tests/engine_fixture.h"

enum { SLOTS = 11, MOST_ROWS = 64 };

static struct ranks ranks;
static int n_runs[MOST_ROWS + 1], n_linears;

static size_t some_bytes(const struct ops *o, int n_layers)
{
    (void)o;
    return (size_t)n_layers;
}

static int power_of_two(const struct ops *o, int n)
{
    int bucket = 1;
    (void)o;
    while (bucket < n) bucket *= 2;
    return bucket;
}

static int count_and_run(struct ops *o, int bucket, int (*body)(void *arg), void *arg)
{
    (void)o;
    if (bucket <= MOST_ROWS) n_runs[bucket]++;
    return body(arg);
}

static int count_linears(struct ops *o, struct tensor y, struct tensor x, struct tensor w, const float *bias)
{
    n_linears += x.dim[0] > MOST_ROWS;
    return ops_cpu.linear(o, y, x, w, bias);
}

static struct ops_vt capturing(void)
{
    struct ops_vt vt = ops_cpu;
    vt.graph_bytes = some_bytes;
    vt.bucket = power_of_two;
    vt.run_step = count_and_run;
    vt.linear = count_linears;
    return vt;
}

/* ---- the state that a request leaves behind or works on ---- */

struct part {
    const void *data;
    size_t bytes;
    void *before;
};

enum { PARTS = 12 };

static void list_parts(const struct resources *r, struct part *part)
{
    const struct kv_view *kv = &r->kv;
    const struct sampling_state *s = &r->sampling;
    const size_t lanes = (size_t)kv->n_slots * (size_t)kv->lanes_per_slot, slots = (size_t)s->n_slots;
    const struct part parts[PARTS] = {
        {kv->pool.data, tensor_bytes(kv->pool), NULL},
        {kv->page_row, lanes * (size_t)kv->max_pages * sizeof(int32_t), NULL},
        {kv->lane_len, lanes * sizeof(int32_t), NULL},
        {kv->free_stack, (size_t)kv->n_pages * sizeof(int32_t), NULL},
        {kv->free_count, sizeof(int32_t), NULL},
        {kv->error, sizeof(int32_t), NULL},
        {s->params, slots * sizeof *s->params, NULL},
        {s->token_count, slots * (size_t)s->vocab_size * sizeof(int32_t), NULL},
        {s->next_token, slots * sizeof(int32_t), NULL},
        {s->position, slots * sizeof(int32_t), NULL},
        {s->logprob, slots * (1 + MAX_LOGPROBS) * sizeof(float), NULL},
        {s->logprob_token, slots * (1 + MAX_LOGPROBS) * sizeof(int32_t), NULL},
    };
    memcpy(part, parts, sizeof parts);
    for (int i = 0; i < PARTS; i++) part[i].before = copy_of(part[i].data, part[i].bytes);
}

static void check_untouched(struct part *part)
{
    for (int i = 0; i < PARTS; i++) {
        bool same = !memcmp(part[i].data, part[i].before, part[i].bytes);
        if (!same) fprintf(stderr, "part %d of the state has changed\n", i);
        CHECK(same);
        free(part[i].before);
    }
}

/* ---- the tests ---- */

static void open_tiny(struct service *s, const char *name)
{
    static const char *const settings[] = {"max_num_seqs", "11", "max_num_batched_tokens", "80", NULL};
    char path[512];
    snprintf(path, sizeof path, GOLDEN "/%s", name);
    service_open(s, &ranks, path, settings);
}

/* Nothing to do where nothing is captured. */
static void test_cpu(void)
{
    struct service s;
    int n_buckets = -1;
    open_tiny(&s, "gqa_tied");
    struct resources *r = &s.engine->resources;
    CHECK_OK(model_warm(r->model, &r->kv, &r->policy, &r->sampling, &n_buckets));
    CHECK(n_buckets == 0);
    service_close(&s);
}

/* Warm at the start and, as when a policy changes, again with sequences under way: they go on as if nothing was. */
static void check_warm(const char *name)
{
    struct service s;
    struct answer want[3], got[3];
    struct part part[PARTS];
    int active, n_buckets = 0;
    open_tiny(&s, name);
    struct resources *r = &s.engine->resources;
    struct ops_vt vt = capturing();
    for (int pass = 0; pass < 2; pass++) {
        struct answer *a = pass ? got : want;
        for (int i = 0; i < 3; i++) {
            struct request q = request_random((uint64_t)i, 5 + 20 * i, engine_dims(s.engine)->vocab_size, 12);
            q.sampling.temperature = i ? 1.0f : 0.0f;
            q.sampling.repetition_penalty = 1.1f;
            q.sampling.seed = 7;
            q.sampling.n_logprobs = 3;
            service_submit(&s, &q, &a[i]);
        }
        for (int i = 0; i < 6; i++) DEMAND(engine_step(s.engine, &active));
        if (pass) {
            list_parts(r, part);
            CHECK(*r->kv.free_count < r->kv.n_pages); /* there is something to disturb */
            memset(n_runs, 0, sizeof n_runs);
            n_linears = 0;
            s.engine->ops.vt = &vt;
            CHECK_OK(model_warm(r->model, &r->kv, &r->policy, &r->sampling, &n_buckets));
            s.engine->ops.vt = &ops_cpu;
            check_untouched(part);
        }
        service_run(&s);
    }
    CHECK(n_buckets == 5); /* 1, 2, 4, 8 and, as 16 are more than there are slots, 11 */
    for (int n = 0; n <= MOST_ROWS; n++)
        CHECK(n_runs[n] == (n == 1 || n == 2 || n == 4 || n == 8 || n == SLOTS ? 2 : 0));
    CHECK(n_linears >= 4);
    for (int i = 0; i < 3; i++) {
        CHECK(answers_equal(&want[i], &got[i]));
        CHECK(!memcmp(want[i].logprob, got[i].logprob, (size_t)want[i].n_tokens * 4 * sizeof(float)));
        answer_free(&want[i]);
        answer_free(&got[i]);
    }
    service_close(&s);
}

static void test_warm(void)
{
    check_warm("gqa_tied");
    check_warm("heads_7");
    check_warm("biases");
    check_warm("head_dim");
}

/* Padding beside sequences: rows without a slot within a step change nothing of the others. */
static void test_padding_rows(void)
{
    struct service s;
    struct part part[PARTS];
    struct answer a;
    int32_t none[SLOTS];
    int active;
    open_tiny(&s, "gqa_tied");
    struct resources *r = &s.engine->resources;
    struct request q = request_random(3, 40, engine_dims(s.engine)->vocab_size, 8);
    service_submit(&s, &q, &a);
    for (int i = 0; i < 4; i++) DEMAND(engine_step(s.engine, &active));
    list_parts(r, part);
    for (int i = 0; i < SLOTS; i++) none[i] = -1;
    CHECK_OK(model_decode(r->model, none, SLOTS, &r->kv, &r->policy, &r->sampling));
    check_untouched(part);
    /* The same step with its slot in the last row does change them: the comparison sees what it is for. */
    list_parts(r, part);
    none[SLOTS - 1] = 0;
    CHECK_OK(model_decode(r->model, none, SLOTS, &r->kv, &r->policy, &r->sampling));
    CHECK(memcmp(part[2].data, part[2].before, part[2].bytes) != 0);
    CHECK(memcmp(part[9].data, part[9].before, part[9].bytes) != 0);
    for (int i = 0; i < PARTS; i++) free(part[i].before);
    service_run(&s);
    answer_free(&a);
    service_close(&s);
}

int main(void)
{
    static const struct check_case cases[] = {{"nothing is captured on CPU", test_cpu},
                                              {"every size of a step twice, and no trace", test_warm},
                                              {"padding rows", test_padding_rows},
                                              {0}};
    ranks = ranks_open();
    return ranks_run(&ranks, "warm", cases);
}
