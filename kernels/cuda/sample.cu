/* Sampling: a block a row. Greedy rows are one pass, with penalties folded in; others turn logits into weights and cut
 * their order (sample_order.cuh) up to three times: top_k by count, top_p and the draw by mass. No sum depends on the
 * order in which it is added up, so all ranks draw the same, wherever a row lies in memory. */
#include "kernels/cuda/sample_order.cuh"

#define LEAST_TEMPERATURE 1e-5f

enum { TOP_K, TOP_P, DRAW };
enum { MOST_BEST = 256 /* candidates for the best log-probabilities */ };

struct sampling_row {
    const float *logits;
    float *adjusted; /* where changed logits and weights go: the logits' own place, unless these are asked for later */
    const float *scored; /* logits after penalties: either of the two */
    const int32_t *token_count;
    int n;
};

/* Shared by the passes of one row. */
struct sampling_block {
    struct order order;
    unsigned long long candidate[MOST_BEST]; /* ranked() */
    unsigned long long warp_best[32], warp_mass[32];
    double log_sum; /* these two are thread 0's, kept out of its registers */
    int chosen;
};

/* A key that ranks values and, among equals, the lower id higher; below 2^32 for what is not a number. */
__device__ static inline unsigned long long ranked(float value, int id)
{
    return (unsigned long long)select_key(value) << 32 | (uint32_t)~id;
}
__device__ static inline int ranked_id(unsigned long long key) { return (int)~(uint32_t)key; }

/* The greatest of all threads' keys, on all threads. */
__device__ static unsigned long long block_best(struct sampling_block *b, unsigned long long key)
{
    for (int turn = 0; turn < 2; turn++) {
#pragma unroll
        for (int step = 16; step > 0; step >>= 1) {
            const unsigned long long other = __shfl_xor_sync(~0u, key, step);
            key = other > key ? other : key;
        }
        if (turn) break;
        __syncthreads();
        if (threadIdx.x % 32 == 0) b->warp_best[threadIdx.x / 32] = key;
        __syncthreads();
        key = b->warp_best[threadIdx.x % 32];
    }
    return key;
}

/* The best of the values below `bound` in rank, 0 if none; the slow way. Whole block. */
__device__ static unsigned long long best_below(struct sampling_block *b, const float *value, int n,
                                                unsigned long long bound)
{
    unsigned long long best = 0;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
        const unsigned long long key = ranked(value[i], i);
        if (key >> 32 && key < bound && key > best) best = key;
    }
    return block_best(b, best);
}

__device__ static float penalised(float x, int32_t seen, const struct sampling_params *p)
{
    const int32_t times = seen & TOKEN_COUNT_MASK;
    if (seen) x = x > 0 ? x / p->repetition_penalty : x * p->repetition_penalty;
    if (times) x -= (float)times * p->frequency_penalty + p->presence_penalty;
    return x;
}

/* The thread's best value over -infinity, the first of equals. */
struct thread_best {
    float value;
    int id; /* -1: none */
};
__device__ static inline void keep_best(struct thread_best *best, const float *x, int i)
{
#pragma unroll
    for (int c = 0; c < 4; c++)
        if (x[c] > best->value) best->value = x[c], best->id = i + c;
}
__device__ static inline unsigned long long best_key(struct thread_best best)
{
    return best.id >= 0 ? ranked(best.value, best.id) : 0;
}

/* Applies the penalties and returns the best, ranked; 0 where no logit is a number. Whole block. */
__device__ static unsigned long long score(struct sampling_block *b, struct sampling_row *row,
                                           const struct sampling_params *params)
{
    const struct sampling_params p = *params;
    struct thread_best mine = {-INFINITY, -1};
    if (p.repetition_penalty == 1 && p.frequency_penalty == 0 && p.presence_penalty == 0) {
        each_quad<false>(row->logits, NULL, row->n, [&](const float *x, int i) { keep_best(&mine, x, i); });
    } else {
        each_quad<true>(row->logits, row->adjusted, row->n, [&](float *x, int i) {
#pragma unroll
            for (int c = 0; c < 4; c++)
                if (i + c >= 0 && i + c < row->n) x[c] = penalised(x[c], row->token_count[i + c], &p);
            keep_best(&mine, x, i);
        });
        row->scored = row->adjusted;
    }
    const unsigned long long best = block_best(b, best_key(mine));
    return best ? best : best_below(b, row->scored, row->n, ~0ull);
}

/* Logits become weights relative to the best, those below min_p of it 0, and go into the first digit's bins. */
__device__ static struct bin weigh(struct order *o, const struct sampling_row *row, const struct sampling_params *p,
                                   float best)
{
    const bool infinite = fabsf(best) == INFINITY, counted = p->top_k > 0;
    const float least = fmaxf(p->min_p, LEAST_WEIGHT), factor = 1 / p->temperature;
    clear_bins(o, FIRST_BINS);
    each_quad<true>(row->scored, row->adjusted, row->n, [&](float *x, int i) {
        (void)i;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const float distance = infinite ? (x[c] == best ? 0 : -INFINITY) : x[c] - best;
            const float weight = expf(distance * factor);
            x[c] = weight >= least ? fminf(weight, 1) : 0;
        }
        add_to_first_bins(o, x, counted);
    });
    __syncthreads();
    return rank_bins(o, FIRST_BINS);
}

/* A number in [0, 1) that depends on seed and position alone. */
__device__ static double uniform(uint64_t seed, int32_t position)
{
    return (double)(splitmix(splitmix(seed) ^ (uint32_t)position) >> 11) * 0x1p-53;
}

/* Draws from the weights: their best top_k, of these the shortest run with probability top_p. -1: there are none. */
__device__ static int draw(struct order *o, const struct sampling_row *row, const struct sampling_params *p, float best,
                           int32_t position)
{
    __shared__ unsigned long long total;
    __shared__ int count;
    const struct bin first = weigh(o, row, p, best);
    struct order_row r = {row->adjusted, row->n, 32 - __clz(row->n - 1), 0, -1, 0};
    if (threadIdx.x == blockDim.x - 1) total = first.mass_upto, count = first.count_upto;
    __syncthreads();
    unsigned long long mass = total;
    if (!mass) return -1;
    struct group last = {0, 0, 0, 0, 0};
    for (int cut = TOP_K; cut <= DRAW; cut++) { /* a loop: cut_order's code is long and stands here once */
        unsigned long long target = (unsigned long long)p->top_k;
        if (cut == TOP_K && (p->top_k <= 0 || p->top_k >= count)) continue;
        if (cut == TOP_P && !(p->top_p < 1)) continue;
        if (cut == TOP_P) target = (unsigned long long)ceil((double)p->top_p * (double)mass);
        if (cut == DRAW) target = (unsigned long long)(uniform(p->seed, position) * (double)mass) + 1;
        if (cut != TOP_K) target = target < 1 ? 1 : target < mass ? target : mass;
        last = cut_order(o, &r, &first, cut != TOP_K, target);
        mass = last.mass_above + last.mass;
    }
    return only_member(o, &r, &last);
}

/* Sum over the block, on all threads. */
__device__ static unsigned long long block_mass(struct sampling_block *b, unsigned long long mass)
{
    for (int turn = 0; turn < 2; turn++) {
#pragma unroll
        for (int step = 16; step > 0; step >>= 1) mass += __shfl_xor_sync(~0u, mass, step);
        if (turn) break;
        __syncthreads();
        if (threadIdx.x % 32 == 0) b->warp_mass[threadIdx.x / 32] = mass;
        __syncthreads();
        mass = b->warp_mass[threadIdx.x % 32];
    }
    return mass;
}

/* Lists what may be among the best n_best; returns the log of the sum of exponentials. The n-th best of the threads'
 * own bests cannot rank above the row's n-th best, and few values do. Whole block. */
__device__ static double list_best(struct sampling_block *b, const struct sampling_row *row, int n_best)
{
    struct thread_best mine = {-INFINITY, -1};
    each_quad<false>(row->logits, NULL, row->n, [&](const float *x, int i) { keep_best(&mine, x, i); });
    const unsigned long long own = best_key(mine), first = block_best(b, own);
    unsigned long long least = first;
    for (int i = 1; i < n_best && least; i++) least = block_best(b, own < least ? own : 0);
    const float best = first ? row->logits[ranked_id(first)] : -INFINITY;
    const float bound = least ? row->logits[ranked_id(least)] : -INFINITY;
    unsigned long long mass = 0;
    if (threadIdx.x == 0) b->order.n_listed = 0;
    __syncthreads();
    each_quad<false>(row->logits, NULL, row->n, [&](const float *x, int i) {
        unsigned hits = 0;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const float weight = expf(x[c] - best);
            if (weight > 0) mass += mass_of(weight);
            if (x[c] >= bound && ranked(x[c], i + c) >= least) hits |= 1u << c;
        }
        append_ids(b->order.listed, &b->order.n_listed, MOST_BEST, i, hits);
    });
    return (double)best + log((double)block_mass(b, mass) / (double)MASS_OF_ONE);
}

__device__ static void put_logprob(const struct sampling_row *row, unsigned long long key, double log_sum,
                                   float *logprob, int32_t *token)
{
    *logprob = key ? (float)((double)row->logits[ranked_id(key)] - log_sum) : -INFINITY;
    *token = key ? ranked_id(key) : -1;
}

/* Log-probabilities of the best tokens, before penalties; returns the log of the sum. Whole block. */
__device__ static double best_logprobs(struct sampling_block *b, const struct sampling_row *row, int n_best,
                                       float *logprob, int32_t *token)
{
    const double log_sum = list_best(b, row, n_best);
    const int n = b->order.n_listed, me = (int)threadIdx.x; /* complete: list_best ends with a barrier */
    unsigned long long key = ~0ull;
    if (n <= MOST_BEST) {
        int rank = me;
        if (me < n) key = b->candidate[me] = ranked(row->logits[b->order.listed[me]], b->order.listed[me]);
        __syncthreads();
        if (me < n) {
            rank = 0;
            for (int i = 0; i < n; i++) rank += b->candidate[i] > key;
        }
        if (rank < n_best) put_logprob(row, me < n ? key : 0, log_sum, logprob + rank, token + rank);
    } else {
        for (int i = 0; i < n_best; i++) {
            if (key) key = best_below(b, row->logits, row->n, key);
            if (me == 0) put_logprob(row, key, log_sum, logprob + i, token + i);
        }
    }
    __syncthreads();
    return log_sum;
}

/* Scratch for a row of n values that is aligned to 16 bytes as any other. */
static __host__ __device__ size_t scratch_pitch(int n) { return ((size_t)n + 3 + 3) / 4 * 4; }

/* The token that the slot must take at a position; -1: what is sampled. */
__device__ static int forced_token(const struct sampling_state *state, int slot, int32_t position)
{
    if (!state->forced_span) return -1;
    const struct forced_span span = state->forced_span[slot];
    const int32_t at = position - span.first;
    return at >= 0 && at < span.n ? state->forced[(int64_t)slot * MAX_FORCED + at] : -1;
}

/* Into block.chosen; ends without a barrier. Whole block. */
__device__ static void choose(struct sampling_block *block, struct sampling_row *row, const struct sampling_params *p,
                              int32_t position)
{
    const unsigned long long best = score(block, row, p);
    const int first = best ? ranked_id(best) : 0;
    if (threadIdx.x == 0) block->chosen = first;
    if (p->temperature < LEAST_TEMPERATURE || !best) return;
    const int drawn = draw(&block->order, row, p, row->scored[first], position);
    if (threadIdx.x == 0 && drawn >= 0) block->chosen = drawn;
}

__global__ static void __launch_bounds__(SELECT_THREADS)
    sample_kernel(float *logits, int64_t stride, const int32_t *slots, struct sampling_state state, float *scratch)
{
    __shared__ struct sampling_block block;
    wait_for_predecessor();
    let_successor_start();
    const int slot = slots[blockIdx.x], n = state.vocab_size;
    if (slot < 0 || slot >= state.n_slots) return;
    const struct sampling_params *p = &state.params[slot]; /* read where needed: registers are short */
    float *logprob = state.logprob + (int64_t)slot * (1 + MAX_LOGPROBS);
    int32_t *logprob_token = state.logprob_token + (int64_t)slot * (1 + MAX_LOGPROBS);
    const int n_logprobs = p->n_logprobs < MAX_LOGPROBS ? p->n_logprobs : MAX_LOGPROBS;
    logits += blockIdx.x * stride;
    struct sampling_row row = {logits, logits, logits, state.token_count + (int64_t)slot * n, n};
    if (n_logprobs > 0) {
        const double log_sum = best_logprobs(&block, &row, n_logprobs, logprob + 1, logprob_token + 1);
        if (threadIdx.x == 0) block.log_sum = log_sum;
        row.adjusted = scratch + blockIdx.x * scratch_pitch(n) + (uintptr_t)logits / sizeof *logits % 4;
    }
    const int forced = forced_token(&state, slot, state.position[slot] + 1);
    if (forced >= 0)
        __syncthreads(); /* all have read the position that thread 0 moves on */
    else
        choose(&block, &row, p, state.position[slot] + 1);
    if (threadIdx.x) return;
    const int chosen = forced >= 0 ? forced : block.chosen;
    int32_t *token_count = state.token_count + (int64_t)slot * n + chosen;
    state.position[slot]++;
    state.next_token[slot] = chosen;
    if ((*token_count & TOKEN_COUNT_MASK) < TOKEN_COUNT_MASK) ++*token_count;
    if (n_logprobs > 0) {
        logprob[0] = (float)((double)logits[chosen] - block.log_sum);
        logprob_token[0] = chosen;
    }
}

int cuda__sample_measure(const struct cuda *c, const struct ops_limits *limits, struct arena *arena)
{
    float *scratch;
    (void)c;
    return arena_take(arena, (size_t)limits->max_seqs * scratch_pitch(limits->vocab_size) * sizeof *scratch,
                      "op scratch", &scratch);
}

int cuda__sample(struct ops *o, struct tensor logits, const int32_t *slot, const struct sampling_state *state)
{
    struct arena arena;
    float *scratch;
    TRY(cuda__scratch(o, &arena));
    TRY(arena_take(&arena, (size_t)logits.dim[0] * scratch_pitch(state->vocab_size) * sizeof *scratch, "op scratch",
                   &scratch));
    return cuda__launch(o, "sample", sample_kernel, dim3((unsigned)logits.dim[0]), dim3(SELECT_THREADS), 0,
                        (float *)logits.data, logits.stride[0], slot, *state, scratch);
}

__global__ static void begin_kernel(struct sampling_state state, int slot, struct sampling_params params, int n_prompt)
{
    wait_for_predecessor();
    int32_t *token_count = state.token_count + (int64_t)slot * state.vocab_size;
    const int first = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    for (int i = first; i < state.vocab_size; i += (int)(gridDim.x * blockDim.x)) token_count[i] = 0;
    if (first == 0) {
        state.params[slot] = params;
        state.position[slot] = n_prompt - 1;
        if (state.forced_span) state.forced_span[slot].n = 0;
    }
}

__global__ static void mark_prompt_kernel(struct sampling_state state, int slot, const int32_t *ids, int n_prompt)
{
    wait_for_predecessor();
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n_prompt && ids[i] >= 0 && ids[i] < state.vocab_size)
        state.token_count[(int64_t)slot * state.vocab_size + ids[i]] = TOKEN_IN_PROMPT;
}

int cuda__sampling_begin(struct ops *o, const struct sampling_state *state, int slot,
                         const struct sampling_params *params, const int32_t *prompt_ids, int n_prompt)
{
    TRY(cuda__launch(o, "sampling_begin", begin_kernel, dim3(32), dim3(512), 0, *state, slot, *params, n_prompt));
    if (n_prompt <= 0) return OK;
    return cuda__launch(o, "sampling_begin", mark_prompt_kernel, dim3((unsigned)(n_prompt + 255) / 256), dim3(256), 0,
                        *state, slot, prompt_ids, n_prompt);
}
