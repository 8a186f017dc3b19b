/* turns_fixture - second turns for tests: requests that have one, and what comes of both. */
#ifndef VITRAIL_TESTS_TURNS_FIXTURE_H
#define VITRAIL_TESTS_TURNS_FIXTURE_H

#include "tests/engine_fixture.h"

struct turns {
    struct answer turn[2];
    int n;
};

static inline void turn_done(void *arg, const struct completion *c)
{
    struct turns *t = arg;
    CHECK(t->n < 2 && c->turn == t->n && c->more == (c->turn == 0));
    if (t->n < 2) answer_done(&t->turn[t->n++], c);
}

static inline void turns_free(struct turns *t)
{
    for (int i = 0; i < t->n; i++) answer_free(&t->turn[i]);
    memset(t, 0, sizeof *t);
}

static inline bool turns_equal(const struct turns *a, const struct turns *b)
{
    return a->n == 2 && b->n == 2 && answers_equal(&a->turn[0], &b->turn[0]) &&
           answers_equal(&a->turn[1], &b->turn[1]) && a->turn[1].bytes_kept == b->turn[1].bytes_kept;
}

/* turns_submit - waits, by steps, for room in the queue. */
static inline void turns_submit(struct service *s, struct request *r, struct turns *t)
{
    int rc, active;
    memset(t, 0, sizeof *t);
    while ((rc = engine_submit(s->engine, r, (struct sink){t, NULL, turn_done})) == ERR_FULL)
        DEMAND(engine_step(s->engine, &active));
    DEMAND(rc);
}

/* request_follow - gives a request a second turn of n ids, answered in at most max_tokens. */
static inline void request_follow(struct request *r, const int32_t *ids, int n, int max_tokens)
{
    r->followup = copy_of(ids, (size_t)n * sizeof *ids);
    r->n_followup = n;
    r->followup_max_tokens = max_tokens;
}

static inline struct request request_two_turns(const int32_t *ids, int n, int max_tokens, const int32_t *next,
                                               int n_next, int then)
{
    struct request r = request_of_ids(ids, n, max_tokens);
    request_follow(&r, next, n_next, then);
    return r;
}

#endif
