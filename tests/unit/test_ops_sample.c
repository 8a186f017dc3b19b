/* Sampling: greedy, penalties, each filter by the set of tokens it lets through, distributions, log-probabilities,
 * the same token for the same seed and position; and the selection of the best k. */
#include "tests/ops_fixture.h"

static const struct sampling_params off = {.top_p = 1, .repetition_penalty = 1};

static struct sampling_state take_state(struct fixture *f, int n_slots, int vocab_size)
{
    size_t slots = (size_t)n_slots, logprobs = slots * (1 + MAX_LOGPROBS);
    return (struct sampling_state){.params = fixture_take(f, slots * sizeof(struct sampling_params)),
                                   .token_count = fixture_take(f, slots * (size_t)vocab_size * sizeof(int32_t)),
                                   .next_token = fixture_take(f, slots * sizeof(int32_t)),
                                   .position = fixture_take(f, slots * sizeof(int32_t)),
                                   .logprob = fixture_take(f, logprobs * sizeof(float)),
                                   .logprob_token = fixture_take(f, logprobs * sizeof(int32_t)),
                                   .vocab_size = vocab_size,
                                   .n_slots = n_slots};
}

/* One token from a copy of `logits` in slot 0. */
static int sample_one(struct fixture *f, const struct sampling_state *state, const float *logits)
{
    float copy[64];
    const int32_t slot[1] = {0};
    memcpy(copy, logits, sizeof(float) * (size_t)state->vocab_size);
    CHECK_OK(ops_sample(&f->ops, tensor_2d(copy, DTYPE_F32, 1, state->vocab_size), slot, state));
    return state->next_token[0];
}

static void test_greedy(void)
{
    struct fixture *f = fixture_open(2, 1);
    enum { ROWS = 5, VOCAB = 1000 };
    struct sampling_state state = take_state(f, 4, VOCAB);
    const int32_t prompt[4] = {3, -1, VOCAB, 5}, slot[ROWS] = {2, -1, 0, 3, 1};
    float *logits = fixture_floats(f, ROWS * VOCAB, 1);
    for (int i = 0; i < 4; i++) CHECK_OK(ops_sampling_begin(&f->ops, &state, i, &off, prompt, 4));
    for (int i = 0; i < ROWS; i++) logits[i * VOCAB + 7 + i] = logits[i * VOCAB + 900] = 9; /* a tie: the lower id */
    state.next_token[1] = 77;
    CHECK_OK(ops_sample(&f->ops, tensor_2d(logits, DTYPE_F32, 4, VOCAB), slot, &state));
    CHECK(state.next_token[2] == 7 && state.next_token[0] == 9 && state.next_token[3] == 10);
    CHECK(state.next_token[1] == 77); /* not in this call */
    CHECK(state.position[2] == 4 && state.position[1] == 3);
    CHECK(state.token_count[2 * VOCAB + 7] == 1 && state.token_count[2 * VOCAB + 3] == TOKEN_IN_PROMPT);
    CHECK(state.token_count[2 * VOCAB + 5] == TOKEN_IN_PROMPT && state.token_count[2 * VOCAB + 8] == 0);
    int32_t ids[ROWS], position[ROWS];
    CHECK_OK(ops_decode_inputs(&f->ops, ids, position, slot, ROWS, &state));
    CHECK(ids[0] == 7 && position[0] == 4 && ids[1] == 0 && position[1] == 0 && ids[4] == 77 && position[4] == 3);
    fixture_close(f);
}

static void test_penalties(void)
{
    struct fixture *f = fixture_open(1, 2);
    struct sampling_state state = take_state(f, 1, 4);
    const int32_t prompt[1] = {0};
    struct sampling_params p = off;
    p.repetition_penalty = 2;
    CHECK_OK(ops_sampling_begin(&f->ops, &state, 0, &p, prompt, 1));
    CHECK(sample_one(f, &state, (float[]){3, 2, -1, -1}) == 1);      /* 3 / 2 < 2: the prompt counts */
    CHECK(sample_one(f, &state, (float[]){3, 2, -1, -1}) == 0);      /* now 2 / 2 < 3 / 2 */
    CHECK(sample_one(f, &state, (float[]){-3, -2, -4.5f, -5}) == 1); /* -6, -4, -4.5, -5 */
    p = off;
    p.frequency_penalty = 0.5f;
    CHECK_OK(ops_sampling_begin(&f->ops, &state, 0, &p, prompt, 1));
    CHECK(sample_one(f, &state, (float[]){1, 0, -1, -1}) == 0);    /* the prompt does not count */
    CHECK(sample_one(f, &state, (float[]){1, 0, -1, -1}) == 0);    /* 0.5 */
    CHECK(sample_one(f, &state, (float[]){0.9f, 0, -1, -1}) == 1); /* 0.9 - 2 * 0.5 */
    p = off;
    p.presence_penalty = 0.5f;
    CHECK_OK(ops_sampling_begin(&f->ops, &state, 0, &p, prompt, 1));
    for (int i = 0; i < 4; i++) CHECK(sample_one(f, &state, (float[]){1, 0.4f, -1, -1}) == 0); /* once, however often */
    CHECK(sample_one(f, &state, (float[]){1, 0.6f, -1, -1}) == 1);
    fixture_close(f);
}

/* Frequencies of `draws` samples at successive positions. */
static void draw_many(struct fixture *f, const struct sampling_state *state, struct sampling_params p,
                      const float *logits, int draws, double *share)
{
    CHECK_OK(ops_sampling_begin(&f->ops, state, 0, &p, NULL, 0));
    memset(share, 0, sizeof *share * (size_t)state->vocab_size);
    for (int i = 0; i < draws; i++) {
        int token = sample_one(f, state, logits);
        CHECK(token >= 0 && token < state->vocab_size);
        share[token] += 1.0 / draws;
    }
}

static void test_distribution(void)
{
    enum { VOCAB = 6, DRAWS = 20000 };
    struct fixture *f = fixture_open(1, 3);
    struct sampling_state state = take_state(f, 1, VOCAB);
    const double weight[VOCAB] = {0.05, 0.4, 0.1, 0.25, 0.15, 0.05};
    float logits[VOCAB];
    double share[VOCAB];
    struct sampling_params p = off;
    for (int i = 0; i < VOCAB; i++) logits[i] = (float)log(weight[i]) + 3;
    p.temperature = 1, p.seed = 42;
    draw_many(f, &state, p, logits, DRAWS, share);
    for (int i = 0; i < VOCAB; i++) CHECK(fabs(share[i] - weight[i]) < 0.015);
    p.temperature = 0.5f; /* squares */
    draw_many(f, &state, p, logits, DRAWS, share);
    for (int i = 0; i < VOCAB; i++) CHECK(fabs(share[i] - weight[i] * weight[i] / 0.26) < 0.015);
    p.temperature = 1, p.top_k = 2;
    draw_many(f, &state, p, logits, DRAWS, share);
    CHECK(fabs(share[1] - 0.4 / 0.65) < 0.015 && fabs(share[3] - 0.25 / 0.65) < 0.015);
    p.top_k = 1;
    draw_many(f, &state, p, logits, 100, share);
    CHECK(share[1] > 0.999);
    p.top_k = 0, p.top_p = 0.66f; /* .4 + .25 = .65 falls short, so .15 comes too */
    draw_many(f, &state, p, logits, DRAWS, share);
    CHECK(fabs(share[1] - 0.5) < 0.015 && fabs(share[4] - 0.15 / 0.8) < 0.015 && share[2] == 0 && share[0] == 0);
    p.top_p = 0.6f, p.top_k = 3; /* within the best three .8 is one: .5 + .3125 reach .6 */
    draw_many(f, &state, p, logits, DRAWS, share);
    CHECK(share[4] == 0 && fabs(share[3] - 0.25 / 0.65) < 0.015);
    p.top_p = 0, p.top_k = 0; /* the best one always stays */
    draw_many(f, &state, p, logits, 100, share);
    CHECK(share[1] > 0.999);
    p.top_p = 1, p.min_p = 0.3f; /* at least .3 of .4 */
    draw_many(f, &state, p, logits, DRAWS, share);
    CHECK(share[2] == 0 && share[0] == 0 && fabs(share[4] - 0.15 / 0.8) < 0.015);
    fixture_close(f);
}

struct weighted {
    double weight;
    int id;
};

static int by_rank(const void *a, const void *b)
{
    const struct weighted *x = a, *y = b;
    if (x->weight != y->weight) return x->weight < y->weight ? 1 : -1;
    return x->id - y->id;
}

/* Whether `token` is what a plain ranking of all tokens gives for the number u, within the rounding of weights. */
static int plainly_drawn(const float *logits, int n, const struct sampling_params *p, double u, int token)
{
    struct weighted *all = malloc(sizeof *all * (size_t)n);
    double best = -INFINITY, total = 0, sum = 0;
    int kept = 0, ok = 0;
    for (int i = 0; i < n; i++) best = (double)logits[i] > best ? (double)logits[i] : best;
    for (int i = 0; i < n; i++) {
        all[i] = (struct weighted){exp(((double)logits[i] - best) / (double)p->temperature), i};
        if (all[i].weight < (double)p->min_p) all[i].weight = 0;
    }
    qsort(all, (size_t)n, sizeof *all, by_rank);
    int most = p->top_k > 0 && p->top_k < n ? p->top_k : n;
    for (int i = 0; i < most; i++) total += all[i].weight;
    for (kept = 0; kept < most && (kept == 0 || sum < (double)p->top_p * total); kept++) sum += all[kept].weight;
    double at = u * sum, slack = 1e-5 * total, before = 0;
    for (int i = 0; i < kept && all[i].weight > 0; i++) {
        if (all[i].id == token) ok = at > before - slack && at < before + all[i].weight + slack;
        before += all[i].weight;
    }
    free(all);
    return ok;
}

static void test_plain_ranking(void)
{
    enum { MOST = 3000 };
    struct fixture *f = fixture_open(1, 8);
    struct sampling_state state = take_state(f, 1, MOST);
    const int32_t slot[1] = {0};
    float *logits = fixture_floats(f, MOST, 1);
    int wrong = 0;
    for (int i = 0; i < 3000; i++) {
        struct sampling_params p = {.temperature = 0.2f + (float)fixture_int(f, 0, 20) * 0.1f,
                                    .top_p = i % 3 ? (float)fixture_int(f, 0, 1000) * 0.001f + 0.00037f : 1,
                                    .min_p = i % 5 ? 0 : (float)fixture_int(f, 0, 100) * 0.00317f,
                                    .repetition_penalty = 1,
                                    .top_k = i % 2 ? fixture_int(f, 1, 100) : 0,
                                    .seed = (uint64_t)i};
        state.vocab_size = fixture_int(f, 1, i % 10 ? 60 : MOST);
        const float spread = (float)fixture_int(f, 1, 6);
        for (int j = 0; j < state.vocab_size; j++) {
            logits[j] = spread * fixture_normal(f);
            if (i % 4 == 0) logits[j] = rintf(logits[j]); /* ties */
        }
        CHECK_OK(ops_sampling_begin(&f->ops, &state, 0, &p, NULL, 0));
        CHECK_OK(ops_sample(&f->ops, tensor_2d(logits, DTYPE_F32, 1, state.vocab_size), slot, &state));
        double u = (double)(hash_mix(p.seed, 0) >> 11) * 0x1p-53;
        wrong += !plainly_drawn(logits, state.vocab_size, &p, u, state.next_token[0]);
    }
    CU_ASSERT_EQUAL(wrong, 0);
    fixture_close(f);
}

static void test_repeatable(void)
{
    enum { VOCAB = 49152, ROWS = 4 };
    struct fixture *f = fixture_open(2, 4), *one = fixture_open(1, 4);
    struct sampling_state a = take_state(f, ROWS, VOCAB), b = take_state(f, ROWS, VOCAB);
    const int32_t slot[ROWS] = {0, 1, 2, 3};
    int32_t first[ROWS] = {0};
    int changed = 0;
    float *logits = fixture_floats(f, ROWS * VOCAB, 2), *copy = fixture_floats(f, ROWS * VOCAB, 1);
    for (int i = 0; i < ROWS; i++) {
        struct sampling_params p = {0.9f, i & 1 ? 0.9f : 1, 0, 0.1f, 0.1f, 1.1f, i & 2 ? 50 : 0, 2, 7};
        CHECK_OK(ops_sampling_begin(&f->ops, &a, i, &p, NULL, 0));
        CHECK_OK(ops_sampling_begin(&one->ops, &b, i, &p, NULL, 0));
    }
    for (int step = 0; step < 12; step++) {
        memcpy(copy, logits, sizeof(float) * ROWS * VOCAB);
        CHECK_OK(ops_sample(&f->ops, tensor_2d(copy, DTYPE_F32, ROWS, VOCAB), slot, &a));
        for (int i = ROWS - 1; i >= 0; i--) { /* one by one, in another order, by one thread */
            memcpy(copy, logits + i * VOCAB, sizeof(float) * VOCAB);
            CHECK_OK(ops_sample(&one->ops, tensor_2d(copy, DTYPE_F32, 1, VOCAB), slot + i, &b));
        }
        CHECK(fixture_same(a.next_token, b.next_token, sizeof first));
        CHECK(fixture_same(a.logprob, b.logprob, sizeof(float) * ROWS * (1 + MAX_LOGPROBS)));
        if (step) changed += memcmp(a.next_token, first, sizeof first) != 0;
        memcpy(first, a.next_token, sizeof first);
    }
    CHECK(changed > 5); /* positions differ, so tokens do */
    fixture_close(one);
    fixture_close(f);
}

static void test_logprobs(void)
{
    enum { VOCAB = 50 };
    struct fixture *f = fixture_open(1, 5);
    struct sampling_state state = take_state(f, 1, VOCAB);
    float *logits = fixture_floats(f, VOCAB, 2);
    const int32_t prompt[1] = {11};
    struct sampling_params p = {2, 1, 0, 0, 0, 5, 0, MAX_LOGPROBS, 3};
    double sum = 0;
    for (int i = 0; i < VOCAB; i++) sum += exp((double)logits[i]);
    CHECK_OK(ops_sampling_begin(&f->ops, &state, 0, &p, prompt, 1));
    for (int step = 0; step < 20; step++) {
        int token = sample_one(f, &state, logits);
        CHECK(state.logprob_token[0] == token);
        CHECK(fabs((double)state.logprob[0] - ((double)logits[token] - log(sum))) < 1e-5);
        for (int i = 1; i <= MAX_LOGPROBS; i++) {
            int id = state.logprob_token[i], better = 0;
            for (int j = 0; j < VOCAB; j++) better += logits[j] > logits[id];
            CHECK(better == i - 1);
            CHECK(fabs((double)state.logprob[i] - ((double)logits[id] - log(sum))) < 1e-5);
        }
    }
    struct sampling_state narrow = take_state(f, 1, 3); /* fewer tokens than wanted */
    CHECK_OK(ops_sampling_begin(&f->ops, &narrow, 0, &p, NULL, 0));
    sample_one(f, &narrow, (float[]){1, 2, 0});
    CHECK(narrow.logprob_token[1] == 1 && narrow.logprob_token[3] == 2 && narrow.logprob_token[4] == -1);
    fixture_close(f);
}

/* Given tokens come out first, with their own log-probabilities and counts; then sampling goes on as ever, and a new
 * sequence in the slot starts without them. */
static void test_forced(void)
{
    enum { VOCAB = 50, FORCED = 3 };
    struct fixture *f = fixture_open(1, 8);
    struct sampling_state state = take_state(f, 2, VOCAB);
    const int32_t prompt[2] = {11, 12}, given[FORCED] = {40, 3, 40};
    float *logits = fixture_floats(f, VOCAB, 2);
    struct sampling_params p = off;
    double sum = 0;
    state.forced_span = fixture_take(f, 2 * sizeof(struct forced_span));
    state.forced = fixture_take(f, 2 * MAX_FORCED * sizeof(int32_t));
    for (int i = 0; i < VOCAB; i++) sum += exp((double)logits[i]);
    p.n_logprobs = 2, p.frequency_penalty = 100;
    for (int turn = 0; turn < 4; turn++) { /* greedy and not, with and without */
        p.temperature = turn & 1 ? 1.0f : 0;
        CHECK_OK(ops_sampling_begin(&f->ops, &state, 0, &p, prompt, 2));
        if (turn < 2) CHECK_OK(ops_sampling_force(&f->ops, &state, 0, 2, given, FORCED));
        CHECK_OK(ops_sampling_force(&f->ops, &state, 1, 2, (int32_t[]){9}, 1)); /* another slot's */
        for (int i = 0; i < FORCED; i++) {
            int token = sample_one(f, &state, logits);
            if (turn < 2) CHECK(token == given[i]);
            CHECK(state.logprob_token[0] == token && state.position[0] == 2 + i);
            CHECK(fabs((double)state.logprob[0] - ((double)logits[token] - log(sum))) < 1e-5);
            if (turn == 2) CHECK(i > 0 || token == state.logprob_token[1]);
        }
        if (turn < 2) CHECK(state.token_count[40] == 2 && state.token_count[3] == 1);
        int token = sample_one(f, &state, logits);
        if (turn == 0) CHECK(token == state.logprob_token[1] && token != 40 && token != 3);
    }
    fixture_close(f);
}

/* Masked, infinite and not-a-number logits give some valid token. */
static void test_odd_logits(void)
{
    struct fixture *f = fixture_open(1, 6);
    struct sampling_state state = take_state(f, 1, 4);
    for (int temperature = 0; temperature < 2; temperature++) {
        struct sampling_params p = {(float)temperature, 0.9f, 0, 0, 0, 1, 3, 1, 1};
        CHECK_OK(ops_sampling_begin(&f->ops, &state, 0, &p, NULL, 0));
        CHECK(sample_one(f, &state, (float[]){-INFINITY, -INFINITY, 0, -INFINITY}) == 2);
        CHECK(sample_one(f, &state, (float[]){NAN, 1, NAN, -100}) == 1);
        CHECK(sample_one(f, &state, (float[]){5, INFINITY, 5, 5}) == 1);
        int any = sample_one(f, &state, (float[]){NAN, NAN, NAN, NAN});
        CHECK(any >= 0 && any < 4);
        any = sample_one(f, &state, (float[]){-INFINITY, -INFINITY, -INFINITY, -INFINITY});
        CHECK(any >= 0 && any < 4);
    }
    fixture_close(f);
}

static void compare_select(struct fixture *f, int rows, int n, int k, int window, int levels)
{
    struct tensor score = fixture_2d(f, rows, n, 3);
    int32_t *index = fixture_take(f, sizeof(int32_t) * (size_t)(rows * k));
    for (int i = 0; i < rows && levels; i++) /* few different values: many ties, some of them -0 */
        for (int j = 0; j < n; j++) {
            int level = fixture_int(f, -levels, levels);
            fixture_row(score, i)[j] = level ? (float)level : j % 2 ? -0.0f : 0.0f;
        }
    CHECK_OK(fixture_select(&f->ops, index, score, k, window));
    for (int i = 0; i < rows; i++) {
        const float *s = fixture_row(score, i);
        int wrong = 0, count = 0;
        for (int j = 0; j < n; j++) {
            int before = 0; /* positions outside the window that rank before j */
            for (int m = 0; m < n - window; m++) before += s[m] > s[j] || (s[m] == s[j] && m < j);
            if (j >= n - window || before < k - window) wrong += count == k || index[i * k + count++] != j;
        }
        CHECK(wrong == 0 && count == k);
    }
}

static void test_select(void)
{
    struct fixture *f = fixture_open(2, 7);
    for (int i = 0; i < 200; i++) {
        int n = fixture_int(f, 1, 90), k = fixture_int(f, 0, n), window = fixture_int(f, 0, k);
        compare_select(f, fixture_int(f, 1, 4), n, k, window, i % 4);
    }
    compare_select(f, 9, 2400, 240, 24, 0);
    compare_select(f, 3, 600, 600, 0, 2);
    struct tensor score = fixture_2d(f, 1, 5, 0);
    int32_t index[5];
    CHECK_FAILS(fixture_select(&f->ops, index, score, 6, 0), ERR_ARG, "k 6 of 5 scores");
    CHECK_FAILS(fixture_select(&f->ops, index, score, 2, 3), ERR_ARG, "window 3");
    memcpy(score.data, (float[]){NAN, -INFINITY, 1, INFINITY, NAN}, 5 * sizeof(float));
    CHECK_OK(fixture_select(&f->ops, index, score, 3, 0));
    CHECK(index[0] == 1 && index[1] == 2 && index[2] == 3);
    fixture_close(f);
}

int main(void)
{
    return check_run("ops_sample", (struct check_case[]){{"greedy, ties, positions, counts", test_greedy},
                                                         {"penalties", test_penalties},
                                                         {"distributions of the filters", test_distribution},
                                                         {"as a plain ranking", test_plain_ranking},
                                                         {"same seed and position, same token", test_repeatable},
                                                         {"log-probabilities", test_logprobs},
                                                         {"given tokens", test_forced},
                                                         {"odd logits", test_odd_logits},
                                                         {"the best k", test_select},
                                                         {0}});
}
