/* test_engine_tokens - the engine's tokens on one rank: seeds, log-probabilities against the logits, tokens that are
 * given in advance, penalties, and second turns. A tiny random model. */
#include "tests/turns_fixture.h"

#define TINY GOLDEN "/gqa_tied"
enum { TINY_VOCABULARY = 131 };

static struct ranks ranks;

/* ---- sampling ---- */

static struct request sampled(uint64_t prompt, uint64_t seed)
{
    struct request r = request_random(prompt, 40, TINY_VOCABULARY, 20);
    r.sampling.temperature = 1;
    r.sampling.seed = seed;
    return r;
}

static void test_seeds(void)
{
    struct service s;
    struct answer crowd[6];
    service_open(&s, &ranks, TINY, NULL);
    struct answer a = service_ask(&s, sampled(1, 7)), b = service_ask(&s, sampled(1, 7)),
                  c = service_ask(&s, sampled(1, 8));
    CHECK(answers_equal(&a, &b) && !answers_equal(&a, &c));
    for (int i = 0; i < 6; i++) { /* among others, some with the same prompt, some with the same seed */
        struct request r = sampled(i % 2 ? 1 : (uint64_t)i + 2, i % 3 ? 7 : 100 + (uint64_t)i);
        service_submit(&s, &r, &crowd[i]);
    }
    service_run(&s);
    CHECK(answers_equal(&a, &crowd[1]) && answers_equal(&a, &crowd[5]));
    CHECK(!answers_equal(&a, &crowd[3]) && !answers_equal(&a, &crowd[2]));
    for (int i = 0; i < 6; i++) answer_free(&crowd[i]);
    struct request r = sampled(1, 9);
    r.sampling.top_k = 1;
    struct answer greedy = service_ask(&s, request_random(1, 40, TINY_VOCABULARY, 20)), top = service_ask(&s, r);
    CHECK(answers_equal(&greedy, &top));
    struct answer *list[] = {&a, &b, &c, &greedy, &top};
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) answer_free(list[i]);
    service_close(&s);
}

/* Log-probabilities against the logits that were sampled from. */
static void test_logprobs(void)
{
    struct service s;
    struct seen_logits seen = {0};
    service_open(&s, &ranks, TINY, NULL);
    struct request r = sampled(3, 5);
    r.sampling.n_logprobs = 20;
    service_watch(&s, &seen);
    struct answer a = service_ask(&s, r);
    service_watch(&s, NULL);
    CHECK(a.n_logprobs == 20 && a.n_tokens == 20 && seen.n >= 20);
    for (int i = 0; i < a.n_tokens && i < seen.n; i++) {
        const float *row = seen.row + (size_t)i * seen.vocab, *p = a.logprob + i * 21;
        const int32_t *id = a.logprob_token + i * 21;
        double sum = 0, total = 0;
        for (size_t k = 0; k < seen.vocab; k++) sum += exp((double)row[k]);
        CHECK(id[0] == a.tokens[i]);
        for (int k = 0; k < 21; k++) {
            CHECK(fabs((double)p[k] - ((double)row[id[k]] - log(sum))) < 1e-4);
            if (k > 1) CHECK(p[k] <= p[k - 1]);
            if (k > 0) total += exp((double)p[k]);
        }
        CHECK(total > 0.15 && total <= 1 + 1e-6);
    }
    free(seen.row);
    answer_free(&a);
    service_close(&s);
}

/* Forced with its own greedy tokens a request gives the same tokens and log-probabilities, all of them or a part;
 * forced with another's it gives those, with the log-probabilities that the logits have for them. */
static void test_forced(void)
{
    struct service s;
    struct seen_logits seen = {0};
    service_open(&s, &ranks, TINY, NULL);
    struct request r = request_forced(&(struct answer){0}, 0, TINY_VOCABULARY, 20);
    struct answer greedy = service_ask(&s, r), other = service_ask(&s, sampled(1, 3));
    struct answer same = service_ask(&s, request_forced(&greedy, 20, TINY_VOCABULARY, 20)),
                  part = service_ask(&s, request_forced(&greedy, 7, TINY_VOCABULARY, 20));
    CHECK(answers_equal(&same, &greedy) && answers_equal(&part, &greedy) && !answers_equal(&other, &greedy));
    CHECK(!memcmp(same.logprob, greedy.logprob, 40 * sizeof(float)));
    CHECK(!memcmp(part.logprob, greedy.logprob, 40 * sizeof(float)));
    service_watch(&s, &seen);
    struct answer foreign = service_ask(&s, request_forced(&other, 20, TINY_VOCABULARY, 20));
    service_watch(&s, NULL);
    CHECK(answers_equal(&foreign, &other) && seen.n >= 20 && foreign.reason == FINISH_LENGTH);
    for (int i = 0; i < foreign.n_tokens && i < seen.n; i++) {
        const float *row = seen.row + (size_t)i * seen.vocab;
        double sum = 0;
        for (size_t k = 0; k < seen.vocab; k++) sum += exp((double)row[k]);
        CHECK(foreign.logprob_token[2 * i] == other.tokens[i]);
        CHECK(fabs((double)foreign.logprob[2 * i] - ((double)row[other.tokens[i]] - log(sum))) < 1e-4);
    }
    /* Kept prompt and, in the step that makes token i, the i tokens behind it: 40 + 10 on the mean of 19 steps. */
    CHECK(fabs(greedy.bytes_read_per_step - 50.0 / 40 * (double)greedy.bytes_kept) < 1e-6);
    int32_t end[3] = {engine_dims(s.engine)->eos_ids[0], 5, engine_dims(s.engine)->eos_ids[0]};
    struct answer ends = {.tokens = end};
    r = request_forced(&ends, 3, TINY_VOCABULARY, 9);
    r.ignore_eos = false;
    struct answer stopped = service_ask(&s, r); /* the end among the given tokens ends nothing, at their end it does */
    CHECK(stopped.n_tokens == 3 && stopped.reason == FINISH_STOP);
    struct answer *list[] = {&greedy, &other, &same, &part, &foreign, &stopped};
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) answer_free(list[i]);
    free(seen.row);
    service_close(&s);
}

/* Over the full cache a follow-up's answer is that to the conversation as one prompt, wherever the first answer ends
 * and whatever runs beside it; over a compressed one it is given all the same. All pages come back. */
static void check_followups(struct service *s, bool full)
{
    enum { MOST = 5, NEXT = 9, THEN = 7, PROMPT = 60 };
    struct turns t[MOST] = {0};
    int32_t conversation[PROMPT + 40 + NEXT];
    for (int i = 0; i < MOST; i++) {
        struct request q = request_random((uint64_t)i + 20, PROMPT, TINY_VOCABULARY, 1),
                       next = request_random((uint64_t)i + 50, NEXT, TINY_VOCABULARY, 1),
                       r = request_two_turns(q.ids, PROMPT, 1 + 6 * i, next.ids, NEXT, THEN);
        r.budget = full ? (struct kv_budget){1, 0} : (struct kv_budget){0.3, 0};
        turns_submit(s, &r, &t[i]);
        request_free(&q);
        request_free(&next);
    }
    service_run(s);
    for (int i = 0; i < MOST; i++) {
        struct request q = request_random((uint64_t)i + 20, PROMPT, TINY_VOCABULARY, 1),
                       next = request_random((uint64_t)i + 50, NEXT, TINY_VOCABULARY, 1);
        int n = t[i].turn[0].n_tokens;
        CHECK(t[i].n == 2 && n == 1 + 6 * i && t[i].turn[1].n_tokens == THEN);
        CHECK(t[i].turn[1].prompt_tokens == PROMPT + n + NEXT);
        memcpy(conversation, q.ids, PROMPT * sizeof *conversation);
        memcpy(conversation + PROMPT, t[i].turn[0].tokens, (size_t)n * sizeof *conversation);
        memcpy(conversation + PROMPT + n, next.ids, NEXT * sizeof *conversation);
        struct answer whole = service_ask(s, request_of_ids(conversation, PROMPT + n + NEXT, THEN));
        if (full) CHECK(answers_equal(&t[i].turn[1], &whole));
        CHECK((t[i].turn[1].bytes_kept == whole.bytes_full) == full);
        answer_free(&whole);
        turns_free(&t[i]);
        request_free(&q);
        request_free(&next);
    }
    service_check_pages(s);
}

/* The first answer ends by a stop token, so that a surplus step has run. */
static void check_followup_of_stop(struct service *s)
{
    struct turns t = {0};
    struct request q = request_random(70, 40, TINY_VOCABULARY, 12);
    struct answer free_running = service_ask(s, request_of_ids(q.ids, 40, 12));
    int32_t next[3] = {5, 6, 7}, conversation[60];
    struct request r = request_two_turns(q.ids, 40, 12, next, 3, 6);
    r.stop_id[r.n_stop_ids++] = free_running.tokens[4];
    turns_submit(s, &r, &t);
    service_run(s);
    int n = t.turn[0].n_tokens;
    CHECK(t.n == 2 && n <= 5 && t.turn[0].reason == FINISH_STOP);
    memcpy(conversation, q.ids, 40 * sizeof *conversation);
    memcpy(conversation + 40, t.turn[0].tokens, (size_t)n * sizeof *conversation);
    memcpy(conversation + 40 + n, next, sizeof next);
    r = request_of_ids(conversation, 43 + n, 6);
    r.stop_id[r.n_stop_ids++] = free_running.tokens[4];
    struct answer whole = service_ask(s, r);
    CHECK(answers_equal(&t.turn[1], &whole));
    struct answer *list[] = {&free_running, &whole, &t.turn[0], &t.turn[1]};
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) answer_free(list[i]);
    request_free(&q);
    service_check_pages(s);
}

static void test_followups(void)
{
    static const char *const full[] = {"max_num_batched_tokens", "50", NULL};
    static const char *const small[] = {"kv_cache.policy", "vl_cache", "kv_cache.vl_cache.no_image_rows", "20", NULL};
    struct service s;
    service_open(&s, &ranks, TINY, full);
    check_followups(&s, true);
    check_followup_of_stop(&s);
    service_refuse(&s, request_two_turns((int32_t[]){4}, 1, 9, (int32_t[]){4}, 1, 1 << 20), "max_model_len");
    service_close(&s);
    service_open(&s, &ranks, TINY, small);
    check_followups(&s, false);
    service_close(&s);
}

static void test_penalties(void)
{
    struct service s;
    service_open(&s, &ranks, TINY, NULL);
    struct request r = request_random(4, 30, TINY_VOCABULARY, 60);
    r.sampling.presence_penalty = 2;
    r.sampling.frequency_penalty = 100; /* nothing twice */
    struct answer a = service_ask(&s, r);
    char seen[TINY_VOCABULARY] = {0};
    for (int i = 0; i < a.n_tokens; i++) CHECK(!seen[a.tokens[i]]++);
    CHECK(a.n_tokens == 60);
    answer_free(&a);
    service_close(&s);
}

int main(void)
{
    static const struct check_case cases[] = {{"seeds", test_seeds},          {"log-probabilities", test_logprobs},
                                              {"forced tokens", test_forced}, {"follow-ups", test_followups},
                                              {"penalties", test_penalties},  {0}};
    ranks = ranks_open();
    return ranks_run(&ranks, "engine's tokens", cases);
}
