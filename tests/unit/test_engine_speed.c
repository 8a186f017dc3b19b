/* test_engine_speed - decode reads each weight once a step for the whole batch: eight sequences together give at least
 * three times the tokens a second of one. On SmolLM2, if it is there; a short-context language model is all weights.
 *
 * One thread, and its CPU time rather than the clock: the ratio then holds on a machine that is busy with other things.
 */
#include <time.h>

#include "tests/engine_fixture.h"

enum { PROMPT = 24, NEW_TOKENS = SLOW_BUILD ? 4 : 24, ROUNDS = SLOW_BUILD ? 1 : 3, BATCH = 8 };

static struct ranks ranks;

static double cpu_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Tokens a second of the steps in which all of n sequences decode and nothing else is done. */
static double decode_rate(struct service *s, int n)
{
    struct answer a[BATCH];
    double seconds = 0;
    int64_t tokens = 0;
    int active = 1;
    for (int i = 0; i < n; i++) {
        struct request r = request_random((uint64_t)i, PROMPT, engine_dims(s->engine)->vocab_size, NEW_TOKENS);
        service_submit(s, &r, &a[i]);
    }
    while (active) {
        struct engine_counters before = service_counters(s);
        double start = cpu_seconds();
        DEMAND(engine_step(s->engine, &active));
        double took = cpu_seconds() - start;
        struct engine_counters after = service_counters(s);
        if (after.prefill_tokens != before.prefill_tokens || after.decode_tokens - before.decode_tokens != n) continue;
        seconds += took;
        tokens += n;
    }
    service_run(s);
    for (int i = 0; i < n; i++) {
        CHECK(a[i].n_tokens == NEW_TOKENS);
        answer_free(&a[i]);
    }
    CHECK(tokens >= n * (NEW_TOKENS - 2));
    return (double)tokens / seconds;
}

static void test_batch_of_eight(void)
{
    static const char *const settings[] = {
        "max_num_seqs", "8", "max_model_len", "128", "max_num_batched_tokens", "256", "cpu_threads", "1", NULL};
    struct service s;
    double one = 0, eight = 0;
    if (!file_exists(SMOLLM2)) {
        printf("\n    skipped: no models/smollm2 (launch/get-model smollm2)\n  ");
        return;
    }
    service_open(&s, &ranks, SMOLLM2, settings);
    for (int i = 0; i < ROUNDS; i++) { /* by turns; the best of each, since others can only slow a round down */
        one = fmax(one, decode_rate(&s, 1));
        eight = fmax(eight, decode_rate(&s, BATCH));
    }
    printf("\n    one sequence %.1f tokens/s, eight together %.1f: %.1f times\n  ", one, eight, eight / one);
    CHECK(SLOW_BUILD || eight >= 3 * one);
    service_close(&s);
}

int main(void)
{
    static const struct check_case cases[] = {{"eight decode three times as fast as one", test_batch_of_eight}, {0}};
    ranks = ranks_open();
    return ranks_run(&ranks, "engine_speed", cases);
}
