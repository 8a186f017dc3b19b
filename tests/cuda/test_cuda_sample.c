/* CUDA's sampling against the CPU's: the same tokens, counts, positions and log-probabilities, step after step.
 *
 * Greedy choices are exact. A drawn token may differ where the number drawn, or a cut of min_p or top_p, falls within
 * the rounding of the weights' sums, and a penalised choice where two logits come that close: at most ALLOWED in a
 * thousand. After a difference the device's state is set to the CPU's, so that the next step is a fair one. */
#include "tests/cuda/cuda_fixture.h"

enum { ALLOWED = 2, SLOTS = 64 };

struct state {
    struct sampling_state gpu, cpu;
    struct pair params, token_count, next_token, position, logprob, logprob_token, forced_span, forced;
};

static struct state take_state(struct cuda_fixture *f, int slots, int vocab)
{
    const size_t n = (size_t)slots, logprobs = n * (1 + MAX_LOGPROBS) * 4;
    struct state s = {.params = pair_of(f, NULL, n * sizeof(struct sampling_params)),
                      .token_count = pair_of(f, NULL, n * (size_t)vocab * 4),
                      .next_token = pair_of(f, NULL, n * 4),
                      .position = pair_of(f, NULL, n * 4),
                      .logprob = pair_of(f, NULL, logprobs),
                      .logprob_token = pair_of(f, NULL, logprobs),
                      .forced_span = pair_of(f, NULL, n * sizeof(struct forced_span)),
                      .forced = pair_of(f, NULL, n * MAX_FORCED * 4)};
    s.gpu = (struct sampling_state){
        s.params.gpu, s.token_count.gpu, s.next_token.gpu, s.position.gpu, s.logprob.gpu, s.logprob_token.gpu, vocab,
        slots,        s.forced_span.gpu, s.forced.gpu};
    s.cpu = (struct sampling_state){
        s.params.cpu, s.token_count.cpu, s.next_token.cpu, s.position.cpu, s.logprob.cpu, s.logprob_token.cpu, vocab,
        slots,        s.forced_span.cpu, s.forced.cpu};
    return s;
}

static void begin(struct cuda_fixture *f, const struct state *s, int slot, const struct sampling_params *p,
                  const int32_t *prompt, int n)
{
    struct pair ids = pair_of(f, prompt, sizeof *prompt * (size_t)n);
    RUN(f, ops_sampling_begin(&f->gpu, &s->gpu, slot, p, n ? ids.gpu : NULL, n));
    RUN(f, ops_sampling_begin(&f->cpu->ops, &s->cpu, slot, p, n ? ids.cpu : NULL, n));
}

static void check_logprobs(struct cuda_fixture *f, const struct state *s, const int32_t *slot, int rows,
                           const bool *differs)
{
    const float *got = pair_fetch(f, s->logprob), *want = s->logprob.cpu;
    const int32_t *token = pair_fetch(f, s->logprob_token), *wanted = s->logprob_token.cpu;
    for (int r = 0; r < rows; r++) {
        if (slot[r] < 0 || slot[r] >= s->cpu.n_slots) continue;
        const int wide = s->cpu.params[slot[r]].n_logprobs;
        for (int i = differs[r]; i <= wide && wide > 0; i++) {
            const int at = slot[r] * (1 + MAX_LOGPROBS) + i;
            bool close = got[at] == want[at] || fabsf(got[at] - want[at]) <= 1e-4f + 1e-5f * fabsf(want[at]);
            if (close && token[at] == wanted[at]) continue;
            cuda_wrong(f, "row %d, log-probability %d: %g of token %d, expected %g of token %d", r, i, (double)got[at],
                       token[at], (double)want[at], wanted[at]);
            break;
        }
    }
}

/* One step on both sides from the same logits; returns the number of rows whose tokens differ. Everything that the
 * step must leave alone (other slots, padding) is compared with the rest. */
static int compare_step(struct cuda_fixture *f, struct state *s, struct twin logits, const int32_t *slot, int rows)
{
    struct pair at = pair_of(f, slot, sizeof *slot * (size_t)rows);
    bool differs[SLOTS + 8] = {0};
    int n_differ = 0;
    twin_send(f, logits, true);
    RUN(f, ops_sample(&f->gpu, twin_rows(logits, 0, rows).gpu, at.gpu, &s->gpu));
    RUN(f, ops_sample(&f->cpu->ops, twin_rows(logits, 0, rows).cpu, at.cpu, &s->cpu));
    const int32_t *got = pair_fetch(f, s->next_token), *want = s->next_token.cpu;
    for (int r = 0; r < rows; r++) {
        if (slot[r] < 0 || slot[r] >= s->cpu.n_slots) continue;
        differs[r] = got[slot[r]] != want[slot[r]];
        n_differ += differs[r];
        if (differs[r] && s->cpu.params[slot[r]].temperature < 1e-5f && s->cpu.params[slot[r]].repetition_penalty == 1)
            cuda_wrong(f, "row %d: token %d, expected the greedy %d", r, got[slot[r]], want[slot[r]]);
    }
    check_logprobs(f, s, slot, rows, differs);
    pair_check(f, s->position, "position");
    twin_check_poison(f, logits, twin_fetch(f, logits), "logits");
    if (n_differ == 0) {
        pair_check(f, s->token_count, "token_count");
        pair_check(f, s->next_token, "next_token");
        return 0;
    }
    pair_send(f, s->next_token);
    pair_send(f, s->token_count);
    return n_differ;
}

/* Rows in mixed order, padding and slots that are not there in between. */
static int take_rows(int32_t *slot, int slots)
{
    int n = 0;
    for (int i = 0; i < slots; i++) {
        if (i % 17 == 1) slot[n++] = i % 2 ? -1 : slots;
        slot[n++] = (int32_t)((i * 7 + 3) % slots);
    }
    return n;
}

static struct sampling_params take_params(struct cuda_fixture *f, int i)
{
    struct fixture *r = f->cpu;
    struct sampling_params p = {.top_p = 1, .repetition_penalty = 1, .seed = fixture_bits(r)};
    if (i % 8 == 0) return p; /* greedy */
    p.temperature = i % 16 == 8 ? 0 : (float)fixture_int(r, 1, 20) * 0.1f;
    p.top_p = i % 3 ? (float)fixture_int(r, 0, 1000) * 0.001f + 0.00037f : 1;
    p.min_p = i % 5 ? 0 : (float)fixture_int(r, 0, 100) * 0.00317f;
    p.top_k = i % 2 ? fixture_int(r, 1, 100) : 0;
    p.repetition_penalty = i % 4 == 3 ? 1.3f : 1;
    p.frequency_penalty = i % 7 == 2 ? 0.4f : 0;
    p.presence_penalty = i % 7 == 5 ? 0.7f : 0;
    p.n_logprobs = i % 3 == 1 ? fixture_int(r, 1, MAX_LOGPROBS) : 0;
    return p;
}

/* Many steps of all slots; some logits are whole numbers, so that there are ties. Adds to *drawn and *different. */
static void compare_vocab(struct cuda_fixture *f, int slots, int vocab, int steps, int *drawn, int *different)
{
    int32_t slot[SLOTS + 8], prompt[300];
    struct state s = take_state(f, slots, vocab);
    const int rows = take_rows(slot, slots);
    cuda_what(f, "sampling of %d rows from %d tokens", rows, vocab);
    for (int i = 0; i < slots; i++) {
        struct sampling_params p = take_params(f, i + vocab);
        for (int j = 0; j < 300; j++) prompt[j] = fixture_int(f->cpu, -1, vocab);
        begin(f, &s, i, &p, prompt, i % 4 ? 300 : 0);
    }
    pair_check(f, s.token_count, "token_count after sampling_begin");
    pair_check(f, s.position, "position after sampling_begin");
    for (int step = 0; step < steps; step++) {
        struct twin logits = twin_make(f, DTYPE_F32, rows, vocab, -1, step % 3, (float)fixture_int(f->cpu, 1, 6));
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < vocab && (r + step) % 4 == 0; j++)
                fixture_row(logits.cpu, r)[j] = rintf(fixture_row(logits.cpu, r)[j]);
        *different += compare_step(f, &s, logits, slot, rows);
        *drawn += slots;
    }
    cuda_clear(f);
}

static void test_steps(void)
{
    struct cuda_fixture *f = cuda_begin(1);
    int drawn = 0, different = 0;
    compare_vocab(f, 5, 50, f->effort == QUICK ? 2 : 40, &drawn, &different);
    compare_vocab(f, 3, 1, 2, &drawn, &different);
    compare_vocab(f, f->effort == QUICK ? 2 : 32, 1536, f->effort == QUICK ? 2 : 10, &drawn, &different);
    if (f->effort > QUICK) {
        compare_vocab(f, 64, 32000, f->effort == ALL ? 12 : 4, &drawn, &different);
        compare_vocab(f, 16, 49152, 5, &drawn, &different);
        compare_vocab(f, 16, 128256, f->effort == ALL ? 8 : 3, &drawn, &different);
        compare_vocab(f, 1, 128255, 4, &drawn, &different);
    }
    printf("(%d tokens of %d differ) ", different, drawn);
    cuda_what(f, "sampling, %d tokens of %d differ", different, drawn);
    EXPECT(f, different * 1000 <= ALLOWED * (drawn < 1000 ? 1000 : drawn));
    cuda_end(f);
}

/* Given tokens: some slots have none, some two, some more than are sampled; a new sequence forgets them. */
static void test_forced(void)
{
    struct cuda_fixture *f = cuda_begin(6);
    enum { ROWS = 6, VOCAB = 3000, STEPS = 4 };
    struct state s = take_state(f, ROWS, VOCAB);
    int32_t given[MAX_FORCED], slot[ROWS], from[ROWS];
    for (int i = 0; i < MAX_FORCED; i++) given[i] = fixture_int(f->cpu, 0, VOCAB - 1);
    for (int turn = 0; turn < 2; turn++) {
        for (int i = 0; i < ROWS; i++) {
            struct sampling_params p = {.top_p = 1, .repetition_penalty = 1, .n_logprobs = i % 2 ? 3 : 0};
            p.frequency_penalty = i == 3 ? 50 : 0;
            slot[i] = ROWS - 1 - i;
            from[i] = i == 5 ? MAX_FORCED - 2 : 2 * i;
            begin(f, &s, i, &p, given, 3);
            const int n = turn ? 0 : i == 0 ? 0 : i == 5 ? 2 : i == 1 ? MAX_FORCED : 2;
            const int32_t *tokens = n == MAX_FORCED ? given : given + from[i];
            RUN(f, ops_sampling_force(&f->gpu, &s.gpu, i, 3, tokens, n));
            RUN(f, ops_sampling_force(&f->cpu->ops, &s.cpu, i, 3, tokens, n));
        }
        for (int step = 0; step < STEPS; step++) {
            struct twin logits = twin_make(f, DTYPE_F32, ROWS, VOCAB, -1, 0, 3);
            cuda_what(f, "given tokens, turn %d, step %d", turn, step);
            EXPECT(f, compare_step(f, &s, logits, slot, ROWS) == 0);
            const int32_t *got = pair_fetch(f, s.next_token);
            if (turn == 0) EXPECT(f, got[1] == given[step]);
            if (turn == 0 && step < 2) EXPECT(f, got[3] == given[from[3] + step] && got[5] == given[from[5] + step]);
        }
    }
    cuda_end(f);
}

/* Ties go to the lower id, wherever the equals stand. */
static void test_greedy(void)
{
    struct cuda_fixture *f = cuda_begin(2);
    const int vocab = f->effort == QUICK ? 5000 : 128256;
    const int32_t slot[5] = {2, -1, 0, 3, 1};
    const struct sampling_params p = {.top_p = 1, .repetition_penalty = 1};
    struct state s = take_state(f, 4, vocab);
    for (int i = 0; i < 4; i++) begin(f, &s, i, &p, (const int32_t[]){3, -1, vocab, 5}, 4);
    for (int step = 0; step < 8; step++) {
        struct twin logits = twin_make(f, DTYPE_F32, 5, vocab, -1, 0, 1);
        for (int r = 0; r < 5; r++) {
            int low = fixture_int(f->cpu, 0, vocab - 1), high = fixture_int(f->cpu, low, vocab - 1);
            for (int j = low; j <= high; j += 1 + (high - low) / 5) fixture_row(logits.cpu, r)[j] = 9;
        }
        cuda_what(f, "ties, step %d", step);
        EXPECT(f, compare_step(f, &s, logits, slot, 5) == 0);
    }
    cuda_end(f);
}

/* The same bits in give the same token out: the same state and logits, other rows beside them, another order. */
static void test_again(void)
{
    struct cuda_fixture *f = cuda_begin(3);
    enum { VOCAB = 32000, ROWS = 8 };
    struct state s = take_state(f, ROWS, VOCAB);
    int32_t slot[ROWS], first[ROWS];
    struct twin logits = twin_make(f, DTYPE_F32, ROWS, VOCAB, -1, 0, 3);
    const struct sampling_params p = {.temperature = 0.9f, .top_p = 0.9f, .repetition_penalty = 1.1f, .seed = 7};
    for (int i = 0; i < ROWS; i++) slot[i] = i;
    for (int turn = 0; turn < 3; turn++) {
        for (int i = 0; i < ROWS; i++) begin(f, &s, i, &p, NULL, 0);
        twin_send(f, logits, true);
        struct pair at = pair_of(f, slot, sizeof slot);
        cuda_what(f, "the same draw, turn %d", turn);
        for (int r = 0; r < ROWS; r += turn == 2 ? 1 : ROWS) /* at last one by one */
            RUN(f, ops_sample(&f->gpu, twin_rows(logits, r, turn == 2 ? 1 : ROWS).gpu, (int32_t *)at.gpu + r, &s.gpu));
        const int32_t *got = pair_fetch(f, s.next_token);
        if (turn == 0) memcpy(first, got, sizeof first);
        EXPECT(f, fixture_same(first, got, sizeof first));
    }
    cuda_end(f);
}

/* Masked, infinite and not-a-number logits give the CPU's token, which is a valid one. */
static void test_odd_logits(void)
{
    static const float odd[][4] = {
        {-INFINITY, -INFINITY, 0, -INFINITY},         {NAN, 1, NAN, -100}, {5, INFINITY, 5, 5}, {NAN, NAN, NAN, NAN},
        {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, {-0.0f, 0, -0.0f, 0}};
    struct cuda_fixture *f = cuda_begin(4);
    struct state s = take_state(f, 1, 4);
    const int32_t slot[1] = {0};
    for (int i = 0; i < 12; i++) {
        const struct sampling_params p = {(float)(i % 2), 0.9f, 0, 0, 0, 1, 3, 0, (uint64_t)i};
        begin(f, &s, 0, &p, NULL, 0);
        struct pair logits = pair_of(f, odd[i / 2], sizeof odd[0]), at = pair_of(f, slot, sizeof slot);
        cuda_what(f, "odd logits %d, temperature %d", i / 2, i % 2);
        RUN(f, ops_sample(&f->gpu, tensor_2d(logits.gpu, DTYPE_F32, 1, 4), at.gpu, &s.gpu));
        RUN(f, ops_sample(&f->cpu->ops, tensor_2d(logits.cpu, DTYPE_F32, 1, 4), slot, &s.cpu));
        const int32_t *got = pair_fetch(f, s.next_token);
        EXPECT(f, got[0] >= 0 && got[0] < 4);
        pair_check(f, s.next_token, "next_token");
        pair_check(f, s.token_count, "token_count");
    }
    cuda_end(f);
}

/* Inputs of a decode step: slots in any order, padding, slots that are not there. */
static void test_decode_inputs(void)
{
    struct cuda_fixture *f = cuda_begin(5);
    enum { ROWS = 64 };
    struct state s = take_state(f, ROWS, 8);
    int32_t slot[ROWS];
    for (int i = 0; i < ROWS; i++) {
        ((int32_t *)s.next_token.cpu)[i] = fixture_int(f->cpu, 0, 128255);
        ((int32_t *)s.position.cpu)[i] = fixture_int(f->cpu, 0, 100000);
        slot[i] = i % 9 == 4 ? -1 : i % 11 == 3 ? ROWS : (i * 13 + 5) % ROWS;
    }
    pair_send(f, s.next_token);
    pair_send(f, s.position);
    for (int n = 1; n <= ROWS; n += 21) {
        struct pair at = pair_of(f, slot, sizeof slot), ids = pair_of(f, NULL, (size_t)n * 4);
        struct pair position = pair_of(f, NULL, (size_t)n * 4);
        cuda_what(f, "inputs of %d rows", n);
        RUN(f, ops_decode_inputs(&f->gpu, ids.gpu, position.gpu, at.gpu, n, &s.gpu));
        RUN(f, ops_decode_inputs(&f->cpu->ops, ids.cpu, position.cpu, at.cpu, n, &s.cpu));
        pair_check(f, ids, "ids");
        pair_check(f, position, "position");
    }
    pair_check(f, s.position, "position of the state");
    cuda_end(f);
}

int main(int argc, char **argv)
{
    const struct check_case cases[] = {{"steps as on the CPU", test_steps},
                                       {"greedy, ties", test_greedy},
                                       {"given tokens", test_forced},
                                       {"the same draw again", test_again},
                                       {"odd logits", test_odd_logits},
                                       {"decode inputs", test_decode_inputs},
                                       {0}};
    return cuda_main("cuda_sample", cases, argc, argv);
}
