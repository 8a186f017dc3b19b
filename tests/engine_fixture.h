/* engine_fixture - for tests of the engine: opens one over a model and some settings, asks it, collects the answers,
 * sees the logits; reads dev-eval and the golden models.
 *
 * On several ranks all call service_open and service_close; the others follow rank 0 in between. What a test cannot do
 * without (opening, reading its own files) ends the program when it fails. */
#ifndef VITRAIL_TESTS_ENGINE_FIXTURE_H
#define VITRAIL_TESTS_ENGINE_FIXTURE_H

#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "parallel/liveness.h"
#include "runtime/engine_private.h"
#include "runtime/prompt.h"
#include "tests/check.h"
#include "tests/vectors.h"

#define DEMO SOURCE_DIR "/models/demo-vlm"
#define GOLDEN SOURCE_DIR "/tests/data/golden"
#define SMOLLM2 SOURCE_DIR "/models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

/* Builds with sanitizers are some ten times slower and get fewer cases. */
#if defined(__SANITIZE_ADDRESS__)
enum { SLOW_BUILD = 1 };
#else
enum { SLOW_BUILD = 0 };
#endif

#define DEMAND(call)                                                                                                   \
    do {                                                                                                               \
        if (call) {                                                                                                    \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, status_message());                           \
            exit(2);                                                                                                   \
        }                                                                                                              \
    } while (0)

static inline void *take(size_t bytes)
{
    void *p = calloc(1, bytes + 1);
    vectors_demand(p != NULL, "memory");
    return p;
}

/* ---- ranks: one communicator and one watch for the life of the program ---- */

struct ranks {
    struct comm *comm;
    struct liveness *liveness;
};

static inline struct ranks ranks_open(void)
{
    struct ranks r;
    struct liveness_options options = {.watchdog_timeout = 300, .stop_grace = 10};
    liveness_block_signals();
    DEMAND(comm_open_auto(&r.comm));
    log_set(LOG_WARNING, r.comm->rank);
    DEMAND(liveness_open(r.comm, &options, &r.liveness));
    return r;
}

/* Runs the suite and ends together: a rank whose checks failed fails the program on all. */
static inline int ranks_run(struct ranks *r, const char *suite, const struct check_case *cases)
{
    int failed = check_run(suite, cases);
    int rc = comm_agree(r->comm, failed ? status_set(ERR_BUG, __FILE__, __LINE__, "checks failed") : OK, "tests");
    comm_close(r->comm);
    liveness_leave(r->liveness);
    return rc != OK;
}

/* ---- an engine ---- */

struct service {
    struct ranks *ranks;
    struct config config;
    struct engine *engine;
    struct prompt_builder *builder; /* rank 0; NULL for models without tokenizer */
    struct tokenizer *tokenizer;    /* then this, the demo's */
    bool first, stopped;            /* this is rank 0; the others follow no more */
};

static inline struct config service_config(const char *model, const char *const *settings)
{
    struct config c;
    static const char *const preset[] = {"device", "cpu", "max_num_seqs", "4", "kv_cache.policy", "full", NULL};
    DEMAND(config_defaults(&c));
    DEMAND(config_set(&c, "model", model, "test"));
    for (int i = 0; policy_name(i); i++) { /* a test may set any policy */
        size_t at = strlen(c.other_policies);
        snprintf(c.other_policies + at, sizeof c.other_policies - at, "%s%s", at ? "," : "", policy_name(i));
    }
    for (int i = 0; preset[i]; i += 2) DEMAND(config_set(&c, preset[i], preset[i + 1], "test"));
    for (int i = 0; settings && settings[i]; i += 2) DEMAND(config_set(&c, settings[i], settings[i + 1], "test"));
    if (c.kv_cache.evicted == KV_EVICTED_HOST) /* not every policy's evicted tokens are recalled */
        snprintf(c.other_policies, sizeof c.other_policies, "full,vl_cache,snapkv,streaming_llm,cluster_kv");
    return c;
}

/* service_open - settings: key, value, ..., NULL. */
static inline void service_open(struct service *s, struct ranks *ranks, const char *model, const char *const *settings)
{
    *s = (struct service){.ranks = ranks, .config = service_config(model, settings), .first = ranks->comm->rank == 0};
    if (!s->config.cpu_threads) s->config.cpu_threads = 1; /* a second one would spin where tests share the cores */
    DEMAND(engine_open(&s->config, ranks->comm, ranks->liveness, &s->engine));
    if (!s->first) return;
    const struct tokenizer *tokenizer;
    char file[512];
    snprintf(file, sizeof file, "%.400s/tokenizer.json", model);
    if (!model_dims_is_gguf(model) && !file_exists(file)) {
        DEMAND(tokenizer_open_json(DEMO "/tokenizer.json", NULL, &s->tokenizer));
        tokenizer = s->tokenizer;
    } else {
        DEMAND(prompt_open(&s->config, engine_dims(s->engine), &s->builder));
        tokenizer = prompt_tokenizer(s->builder);
    }
    engine_use_tokenizer(s->engine, tokenizer);
}

/* service_follow - true on ranks that have nothing to do but follow: they return from it when rank 0 closes. */
static inline bool service_follow(struct service *s)
{
    if (s->first) return false;
    DEMAND(engine_follow(s->engine));
    return true;
}

/* service_stop - rank 0: the others return from following, and all ranks may look at their engine before it closes. */
static inline void service_stop(struct service *s)
{
    if (s->first && !s->stopped) DEMAND(engine_stop(s->engine));
    s->stopped = true;
}

static inline void service_close(struct service *s)
{
    service_stop(s);
    engine_close(s->engine);
    prompt_close(s->builder);
    tokenizer_close(s->tokenizer);
    memset(s, 0, sizeof *s);
}

/* ---- answers ---- */

enum { ANSWER_LAYERS = 64 };

struct answer {
    bool done;
    int32_t *tokens;
    int n_tokens, prompt_tokens, image_tokens, n_layers, n_logprobs, kept[ANSWER_LAYERS];
    char *text, *shown; /* of the completion; of all on_text calls */
    size_t text_size, shown_size;
    enum finish_reason reason;
    int64_t bytes_full, bytes_kept, bytes_host;
    double bytes_read_per_step, recall_bytes_per_step, recall_hit_rate;
    float *logprob;
    int32_t *logprob_token;
};

static inline void answer_show(void *arg, const char *text, size_t size)
{
    struct answer *a = arg;
    a->shown = realloc(a->shown, a->shown_size + size + 1);
    vectors_demand(a->shown != NULL, "memory");
    memcpy(a->shown + a->shown_size, text, size);
    a->shown_size += size;
    a->shown[a->shown_size] = 0;
}

static inline void *copy_of(const void *data, size_t bytes)
{
    void *p = take(bytes);
    if (bytes) memcpy(p, data, bytes);
    return p;
}

static inline void answer_done(void *arg, const struct completion *c)
{
    struct answer *a = arg;
    size_t pairs = (size_t)c->n_tokens * (size_t)(1 + c->n_logprobs);
    CHECK(!a->done);
    a->done = true;
    a->tokens = copy_of(c->tokens, (size_t)c->n_tokens * sizeof *c->tokens);
    a->n_tokens = c->n_tokens;
    a->text = copy_of(c->text, c->text_size);
    a->text_size = c->text_size;
    a->reason = c->finish_reason;
    a->prompt_tokens = c->prompt_tokens;
    a->image_tokens = c->image_tokens;
    a->n_layers = c->n_layers < ANSWER_LAYERS ? c->n_layers : ANSWER_LAYERS;
    for (int l = 0; l < a->n_layers; l++) a->kept[l] = c->kept_tokens_per_layer[l];
    a->bytes_full = c->bytes_full;
    a->bytes_kept = c->bytes_kept;
    a->bytes_read_per_step = c->bytes_read_per_step;
    a->bytes_host = c->bytes_host;
    a->recall_bytes_per_step = c->recall_bytes_per_step;
    a->recall_hit_rate = c->recall_hit_rate;
    a->n_logprobs = c->n_logprobs;
    if (!c->n_logprobs) return;
    a->logprob = copy_of(c->logprob, pairs * sizeof *c->logprob);
    a->logprob_token = copy_of(c->logprob_token, pairs * sizeof *c->logprob_token);
}

static inline void answer_free(struct answer *a)
{
    free(a->tokens);
    free(a->text);
    free(a->shown);
    free(a->logprob);
    free(a->logprob_token);
    memset(a, 0, sizeof *a);
}

static inline bool answer_is(const struct answer *a, const int32_t *tokens, int n)
{
    return a->done && a->n_tokens == n && !memcmp(a->tokens, tokens, (size_t)n * sizeof *tokens);
}

static inline bool answers_equal(const struct answer *a, const struct answer *b)
{
    return b->done && answer_is(a, b->tokens, b->n_tokens);
}

/* service_submit - into *answer (zeroed here), taking steps while the queue is full. */
static inline void service_submit(struct service *s, struct request *r, struct answer *answer)
{
    int rc, active;
    memset(answer, 0, sizeof *answer);
    struct sink sink = {answer, answer_show, answer_done};
    while ((rc = engine_submit(s->engine, r, sink)) == ERR_FULL) DEMAND(engine_step(s->engine, &active));
    DEMAND(rc);
}

/* service_run - to the end of all requests, and one step more, which releases the last slots. */
static inline void service_run(struct service *s)
{
    int active;
    do DEMAND(engine_step(s->engine, &active));
    while (active);
    DEMAND(engine_step(s->engine, &active));
}

static inline struct engine_counters service_counters(const struct service *s)
{
    struct engine_counters c;
    engine_counters(s->engine, &c);
    return c;
}

/* service_check_pages - no page is taken. */
static inline void service_check_pages(const struct service *s)
{
    struct engine_counters c = service_counters(s);
    CHECK(c.pages_free == c.pages_total && c.pages_total > 0);
}

/* service_ask - answers one request. service_refuse - one that is to be refused with these words. */
static inline struct answer service_ask(struct service *s, struct request r)
{
    struct answer a;
    service_submit(s, &r, &a);
    service_run(s);
    CHECK(a.done && a.shown_size == a.text_size && !memcmp(a.shown ? a.shown : "", a.text, a.text_size));
    return a;
}

static inline void service_refuse(struct service *s, struct request r, const char *part)
{
    struct answer a = {0};
    CHECK_FAILS(engine_submit(s->engine, &r, (struct sink){&a, NULL, answer_done}), ERR_REQUEST, part);
    CHECK(r.ids != NULL && !a.done);
    request_free(&r);
}

/* ---- requests ---- */

/* A greedy request for n tokens, whatever they are; ids are copied. */
static inline struct request request_of_ids(const int32_t *ids, int n_ids, int max_tokens)
{
    struct request r = {.n_ids = n_ids, .max_tokens = max_tokens, .ignore_eos = true, .budget = {1, 0}};
    r.sampling = (struct sampling_params){.top_p = 1, .repetition_penalty = 1};
    r.ids = copy_of(ids, (size_t)n_ids * sizeof *ids);
    return r;
}

/* Random text tokens of a golden model or the demo (ids from 4 on). */
static inline struct request request_random(uint64_t seed, int n_ids, int vocabulary, int max_tokens)
{
    int32_t *ids = take((size_t)n_ids * sizeof *ids);
    for (int i = 0; i < n_ids; i++) {
        seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
        ids[i] = 4 + (int32_t)((seed >> 33) % (uint64_t)(vocabulary - 4));
    }
    struct request r = request_of_ids(ids, n_ids, max_tokens);
    free(ids);
    return r;
}

/* request_forced - prompt 1 of 40 tokens, whose answer begins with the first n tokens of another one's. */
static inline struct request request_forced(const struct answer *like, int n, int vocabulary, int max_tokens)
{
    struct request r = request_random(1, 40, vocabulary, max_tokens);
    r.sampling.n_logprobs = 1;
    r.forced = copy_of(like->tokens, (size_t)n * sizeof *like->tokens);
    r.n_forced = n;
    return r;
}

static inline void request_stop(struct request *r, const char *text)
{
    r->stop[r->n_stops] = strdup(text);
    vectors_demand(r->stop[r->n_stops++] != NULL, "memory");
}

/* A golden prompt {"ids", "images": [{"start", "seed"}]} of an engine with this vision tower. */
static inline struct request request_golden(const cJSON *prompt, const struct vision_dims *v, int max_tokens)
{
    size_t n = 0;
    double *list = vectors_list(vectors_get(prompt, "ids"), &n);
    int32_t *ids = take(n * sizeof *ids);
    for (size_t i = 0; i < n; i++) ids[i] = (int32_t)list[i];
    struct request r = request_of_ids(ids, (int)n, max_tokens);
    free(list);
    free(ids);
    const cJSON *image, *images = vectors_get(prompt, "images");
    size_t bytes = (size_t)v->image_size * (size_t)v->image_size * 3;
    r.pixel_bytes = (size_t)cJSON_GetArraySize(images) * bytes;
    if (!r.pixel_bytes) return r;
    r.spans = take((size_t)cJSON_GetArraySize(images) * sizeof *r.spans);
    r.pixels = take(r.pixel_bytes);
    cJSON_ArrayForEach (image, images) {
        int start = vectors_int(image, "start");
        uint64_t x = (uint64_t)vectors_number(image, "seed");
        for (size_t i = 0; i < bytes; i++) {
            x = x * 6364136223846793005ULL + 1442695040888963407ULL;
            r.pixels[(size_t)r.n_images * bytes + i] = (uint8_t)(x >> 56);
        }
        r.spans[r.n_images++] = (struct image_span){start, start + v->n_image_tokens};
    }
    return r;
}

/* ---- dev-eval ---- */

struct question {
    cJSON *json;
    const char *id;
    int32_t *tokens; /* the reference answer */
    int n_tokens;
};

/* All questions, in the file's order; *n of them. */
static inline struct question *questions_load(int *n)
{
    char *text, *next;
    size_t size;
    struct question *q = take(1000 * sizeof *q);
    DEMAND(file_read_all(DEMO "/dev-eval/questions.jsonl", 1 << 24, &text, &size));
    *n = 0;
    for (char *line = strtok_r(text, "\n", &next); line && *n < 1000; line = strtok_r(NULL, "\n", &next)) {
        struct question *to = &q[(*n)++];
        const cJSON *token;
        DEMAND(json_parse(line, strlen(line), "question", &to->json));
        to->id = vectors_string(to->json, "id");
        to->tokens = take((size_t)cJSON_GetArraySize(vectors_get(to->json, "model_tokens")) * sizeof *to->tokens);
        cJSON_ArrayForEach (token, vectors_get(to->json, "model_tokens")) to->tokens[to->n_tokens++] = token->valueint;
    }
    free(text);
    return q;
}

static inline void questions_free(struct question *q, int n)
{
    for (int i = 0; i < n; i++) {
        cJSON_Delete(q[i].json);
        free(q[i].tokens);
    }
    free(q);
}

static inline const struct question *questions_find(const struct question *q, int n, const char *id)
{
    for (int i = 0; i < n; i++)
        if (!strcmp(q[i].id, id)) return &q[i];
    vectors_demand(0, id);
    return NULL;
}

/* The request of a question: greedy, its budget the configuration's. */
static inline struct request request_question(const struct service *s, const struct question *q)
{
    char path[8][512];
    const char *images[8];
    const cJSON *image, *list = vectors_get(q->json, "images");
    int n = 0;
    vectors_demand(cJSON_GetArraySize(list) <= 8, "at most 8 images");
    cJSON_ArrayForEach (image, list) {
        snprintf(path[n], sizeof path[n], DEMO "/dev-eval/%s", image->valuestring);
        images[n] = path[n];
        n++;
    }
    const char *prompt = vectors_string(q->json, "prompt");
    struct prompt_text text = {.text = prompt, .size = strlen(prompt), .images = images, .n_images = n, .raw = true};
    struct request r;
    DEMAND(prompt_from_text(s->builder, &text, NULL, q->id, &r));
    r.max_tokens = 200;
    r.sampling = (struct sampling_params){.top_p = 1, .repetition_penalty = 1};
    return r;
}

/* ---- golden files and logits ---- */

static inline cJSON *golden_load(const char *name)
{
    char path[512];
    cJSON *json;
    snprintf(path, sizeof path, GOLDEN "/%.200s", name);
    DEMAND(json_parse_file(path, 1 << 24, &json));
    return json;
}

/* float32 rows in base64; *n their number of values. The caller frees them. */
static inline float *golden_floats(const cJSON *object, const char *key, size_t *n)
{
    size_t bytes;
    uint8_t *raw = vectors_base64(vectors_string(object, key), &bytes);
    float *out = take(bytes);
    memcpy(out, raw, bytes);
    free(raw);
    *n = bytes / sizeof *out;
    return out;
}

static inline int golden_tokens(const cJSON *item, int32_t *tokens)
{
    int n = 0;
    const cJSON *token;
    cJSON_ArrayForEach (token, vectors_get(item, "tokens")) tokens[n++] = token->valueint;
    return n;
}

/* The prompt of an item of smollm2.json; its ids must be the reference's. */
static inline struct request request_smollm2(const struct service *s, const cJSON *item)
{
    const char *text = vectors_string(item, "prompt");
    struct prompt_text prompt = {.text = text, .size = strlen(text), .raw = true};
    struct request r;
    DEMAND(prompt_from_text(s->builder, &prompt, NULL, "smollm2", &r));
    CHECK(r.n_ids == cJSON_GetArraySize(vectors_get(item, "ids")));
    for (int i = 0; i < r.n_ids; i++) CHECK(r.ids[i] == cJSON_GetArrayItem(vectors_get(item, "ids"), i)->valueint);
    r.max_tokens = cJSON_GetArraySize(vectors_get(item, "tokens"));
    r.sampling = (struct sampling_params){.top_p = 1, .repetition_penalty = 1};
    return r;
}

/* Collects every call's first row of logits: the steps of a request that runs alone. */
struct seen_logits {
    struct ops *ops; /* the engine's, set by service_watch */
    float *row;      /* [n, vocab] */
    int n, room;
    size_t vocab;
};

static inline void seen_logits_add(void *arg, struct tensor logits)
{
    struct seen_logits *seen = arg;
    seen->vocab = (size_t)logits.dim[1];
    if (seen->n == seen->room) {
        seen->room = 2 * seen->room + 16;
        seen->row = realloc(seen->row, (size_t)seen->room * seen->vocab * sizeof(float));
        vectors_demand(seen->row != NULL, "memory");
    }
    float *to = seen->row + (size_t)seen->n++ * seen->vocab;
    DEMAND(ops_download(seen->ops, to, logits.data, seen->vocab * sizeof(float)));
}

static inline void service_watch(struct service *s, struct seen_logits *seen)
{
    if (seen) seen->ops = &s->engine->ops;
    model_watch_logits(s->engine->resources.model, seen ? seen_logits_add : NULL, seen);
}

static inline double spread(const float *x, size_t n)
{
    double sum = 0, squares = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i];
    for (size_t i = 0; i < n; i++) squares += ((double)x[i] - sum / (double)n) * ((double)x[i] - sum / (double)n);
    return sqrt(squares / (double)n);
}

/* Largest |got - want| over n values; NaN counts as infinite. */
static inline double distance(const float *got, const float *want, size_t n)
{
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)got[i] - (double)want[i]);
        if (!(d <= worst)) worst = d == d ? d : (double)INFINITY;
    }
    return worst;
}

/* ---- a batch of everything ---- */

/* Prompts of mixed lengths, the shortest shorter than any window, and of five budgets in turn. */
enum { MIXED_REQUESTS = 9 };
static inline struct request request_mixed(const struct service *s, int i, const struct kv_budget budgets[5])
{
    static const int lengths[MIXED_REQUESTS] = {1, 2, 7, 300, 33, 150, 90, 211, 12};
    struct request r = request_random((uint64_t)i + 40, lengths[i], engine_dims(s->engine)->vocab_size, 12 + 8 * i);
    r.budget = budgets[i % 5];
    return r;
}

/* All of them at once, or one after the other. */
static inline void service_ask_mixed(struct service *s, const struct kv_budget budgets[5],
                                     struct answer a[MIXED_REQUESTS], bool alone)
{
    for (int i = 0; i < MIXED_REQUESTS; i++) {
        struct request r = request_mixed(s, i, budgets);
        service_submit(s, &r, &a[i]);
        if (alone) service_run(s);
    }
    service_run(s);
}

#endif
