/* Sampling: a block a row. Greedy rows are one pass; others turn logits into weights in place and cut their order
 * (falling weight, ties to the lower id) three times by radix selection: top_k by count, top_p and the draw by mass.
 * Masses are integers (weights times 2^40), so that sums do not depend on their order and all ranks draw the same. */
#include "kernels/cuda/select.cuh"

#define LEAST_TEMPERATURE 1e-5f
#define MASS_OF_ONE 1099511627776.0f /* 2^40 */

struct sampling_row {
    float *logits; /* adjusted and turned into weights in place */
    const int32_t *token_count;
    int n;
};

/* Shared by the passes of one row. */
struct sampling_block {
    unsigned long long mass[SELECT_DIGITS];
    int count[SELECT_DIGITS];
    unsigned long long best; /* key of a value and, below it, the complement of its id */
    struct cut cut;
    unsigned long long total;
    int chosen;
    double sum[32];
};

__device__ static unsigned long long ranked(float value, int id)
{
    return (unsigned long long)select_key(value) << 32 | (uint32_t)~id;
}
__device__ static int ranked_id(unsigned long long key) { return (int)~(uint32_t)key; }

/* The best of the values below `bound` in rank, 0 if none; whole block. */
__device__ static unsigned long long best_below(struct sampling_block *b, const float *value, int n,
                                                unsigned long long bound)
{
    unsigned long long best = 0;
    __syncthreads();
    if (threadIdx.x == 0) b->best = 0;
    __syncthreads();
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
        const unsigned long long key = ranked(value[i], i);
        if (key < bound && key > best) best = key;
    }
    for (int step = 16; step > 0; step >>= 1) {
        const unsigned long long other = __shfl_xor_sync(~0u, best, step);
        best = other > best ? other : best;
    }
    if (threadIdx.x % 32 == 0) atomicMax(&b->best, best);
    __syncthreads();
    return b->best;
}

__device__ static void penalise(const struct sampling_row *row, const struct sampling_params *p)
{
    if (p->repetition_penalty == 1 && p->frequency_penalty == 0 && p->presence_penalty == 0) return;
    for (int i = (int)threadIdx.x; i < row->n; i += (int)blockDim.x) {
        const int32_t seen = row->token_count[i], times = seen & TOKEN_COUNT_MASK;
        float x = row->logits[i];
        if (seen) x = x > 0 ? x / p->repetition_penalty : x * p->repetition_penalty;
        if (times) x -= (float)times * p->frequency_penalty + p->presence_penalty;
        row->logits[i] = x;
    }
    __syncthreads();
}

/* Logits become weights relative to the best, those below min_p of it 0. */
__device__ static void weigh(const struct sampling_row *row, const struct sampling_params *p, float best)
{
    const bool infinite = fabsf(best) == INFINITY;
    for (int i = (int)threadIdx.x; i < row->n; i += (int)blockDim.x) {
        const float x = row->logits[i];
        float weight = infinite ? (float)(x == best) : expf((x - best) / p->temperature);
        if (!(weight > 0) || weight < p->min_p) weight = 0;
        row->logits[i] = weight;
    }
    __syncthreads();
}

__device__ static unsigned long long mass_of(float weight) { return (unsigned long long)(weight * MASS_OF_ONE); }

/* Cuts the weights' order where their count (by_mass false) or mass reaches `target`, at least one element. total: the
 * mass up to the cut. Whole block. */
__device__ static void cut_weights(struct sampling_block *b, const struct sampling_row *row, bool by_mass,
                                   unsigned long long target)
{
    __syncthreads();
    if (threadIdx.x == 0) b->cut.key = 0, b->cut.above = 0, b->total = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = (int)threadIdx.x; i < SELECT_DIGITS; i += (int)blockDim.x) b->count[i] = 0, b->mass[i] = 0;
        __syncthreads();
        const uint32_t prefix = b->cut.key;
        for (int i = (int)threadIdx.x; i < row->n; i += (int)blockDim.x) {
            const float weight = row->logits[i];
            const uint32_t key = __float_as_uint(weight); /* not negative: bits rise with it */
            if (!(weight > 0) || (uint64_t)(key ^ prefix) >> (shift + 8) != 0) continue;
            atomicAdd(&b->count[key >> shift & 255], 1);
            atomicAdd(&b->mass[key >> shift & 255], mass_of(weight));
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int digit = 255, lowest = 255;
            while (lowest > 0 && !b->count[lowest]) lowest--;
            for (digit = lowest; digit > 0; digit--) {
                const unsigned long long here = by_mass ? b->mass[digit] : (unsigned long long)b->count[digit];
                if (b->count[digit]) lowest = digit;
                if (b->count[digit] && b->cut.above + here >= target) break;
                b->cut.above += here;
                b->total += b->mass[digit];
            }
            if (!b->count[digit]) { /* rounding: the order ends before the target */
                digit = lowest;
                b->cut.above -= by_mass ? b->mass[digit] : (unsigned long long)b->count[digit];
                b->total -= b->mass[digit];
            }
            b->cut.key |= (uint32_t)digit << shift;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        /* All that is left has the same key: whole elements up to the target. */
        const int digit = (int)(b->cut.key & 255);
        const unsigned long long each = by_mass ? b->mass[digit] / (unsigned long long)b->count[digit] : 1;
        unsigned long long n = target > b->cut.above ? target - b->cut.above : 0;
        n = each ? (n + each - 1) / each : 1;
        if (n < 1) n = 1;
        if (n > (unsigned long long)b->count[digit]) n = (unsigned long long)b->count[digit];
        b->cut.n_equal = (int64_t)n;
        b->total += n * (b->mass[digit] / (unsigned long long)b->count[digit]);
    }
    __syncthreads();
}

/* The id of the cut's last element. */
__device__ static int last_of_cut(struct sampling_block *b, const struct sampling_row *row)
{
    int64_t equal = 0;
    for (int first = 0; first < row->n; first += (int)blockDim.x) {
        const int i = first + (int)threadIdx.x;
        int n_equal;
        const bool tied = i < row->n && row->logits[i] > 0 && __float_as_uint(row->logits[i]) == b->cut.key;
        const int at = block_rank(tied, &n_equal);
        if (tied && equal + at == b->cut.n_equal - 1) b->chosen = i;
        equal += n_equal;
        if (equal >= b->cut.n_equal) break;
    }
    __syncthreads();
    return b->chosen;
}

__device__ static uint64_t splitmix(uint64_t x)
{
    uint64_t z = x + 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* A number in [0, 1) that depends on seed and position alone. */
__device__ static double uniform(uint64_t seed, int32_t position)
{
    return (double)(splitmix(splitmix(seed) ^ (uint32_t)position) >> 11) * 0x1p-53;
}

/* Draws from the weights: their best top_k, of these the shortest run with probability top_p. */
__device__ static int draw(struct sampling_block *b, const struct sampling_row *row, const struct sampling_params *p,
                           int32_t position)
{
    const unsigned long long all = ~0ull;
    cut_weights(b, row, false, p->top_k > 0 ? (unsigned long long)p->top_k : all >> 1);
    unsigned long long mass = b->total;
    if (p->top_p < 1) {
        cut_weights(b, row, true, (unsigned long long)((double)p->top_p * (double)mass));
        mass = b->total < mass ? b->total : mass;
    }
    unsigned long long target = (unsigned long long)(uniform(p->seed, position) * (double)mass) + 1;
    cut_weights(b, row, true, target < mass ? target : mass);
    return last_of_cut(b, row);
}

/* Natural log of the sum of exponentials, the same on all threads; fixed order. */
__device__ static double log_sum_exp(struct sampling_block *b, const float *logits, int n, float best)
{
    double sum = 0;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) sum += (double)expf(logits[i] - best);
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
    __syncthreads();
    if (threadIdx.x % 32 == 0) b->sum[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < (int)blockDim.x / 32; w++) sum += b->sum[w];
    return (double)best + log(sum);
}

/* Log-probabilities of the best tokens, before penalties; returns the log of the sum. */
__device__ static double best_logprobs(struct sampling_block *b, const struct sampling_row *row, int n_best,
                                       float *logprob, int32_t *token)
{
    unsigned long long key = best_below(b, row->logits, row->n, ~0ull);
    const double log_sum = log_sum_exp(b, row->logits, row->n, row->logits[ranked_id(key)]);
    for (int i = 0; i < n_best; i++) {
        if (threadIdx.x == 0) {
            logprob[i] = key ? (float)((double)row->logits[ranked_id(key)] - log_sum) : -INFINITY;
            token[i] = key ? ranked_id(key) : -1;
        }
        if (key) key = best_below(b, row->logits, row->n, key);
    }
    __syncthreads();
    return log_sum;
}

__global__ static void __launch_bounds__(SELECT_THREADS)
    sample_kernel(float *logits, int64_t stride, const int32_t *slots, struct sampling_state state, float *kept)
{
    __shared__ struct sampling_block block;
    wait_for_predecessor();
    let_successor_start();
    const int slot = slots[blockIdx.x], n = state.vocab_size;
    if (slot < 0 || slot >= state.n_slots) return;
    const struct sampling_params p = state.params[slot];
    int32_t *token_count = state.token_count + (int64_t)slot * n;
    float *logprob = state.logprob + (int64_t)slot * (1 + MAX_LOGPROBS);
    int32_t *logprob_token = state.logprob_token + (int64_t)slot * (1 + MAX_LOGPROBS);
    const struct sampling_row row = {logits + blockIdx.x * stride, token_count, n};
    const int32_t position = state.position[slot] + 1;
    const int n_logprobs = p.n_logprobs < MAX_LOGPROBS ? p.n_logprobs : MAX_LOGPROBS;
    double log_sum = 0;
    if (n_logprobs > 0) {
        log_sum = best_logprobs(&block, &row, n_logprobs, logprob + 1, logprob_token + 1);
        kept += (int64_t)blockIdx.x * n; /* the chosen token's logit is asked for after penalties have changed it */
        for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) kept[i] = row.logits[i];
    }
    penalise(&row, &p);
    const unsigned long long best = best_below(&block, row.logits, n, ~0ull);
    int chosen = best >> 32 ? ranked_id(best) : 0;
    if (p.temperature >= LEAST_TEMPERATURE && best >> 32) {
        weigh(&row, &p, row.logits[chosen]);
        chosen = draw(&block, &row, &p, position);
    }
    if (threadIdx.x) return;
    state.position[slot] = position;
    state.next_token[slot] = chosen;
    if ((token_count[chosen] & TOKEN_COUNT_MASK) < TOKEN_COUNT_MASK) token_count[chosen]++;
    if (n_logprobs > 0) {
        logprob[0] = (float)((double)kept[chosen] - log_sum);
        logprob_token[0] = chosen;
    }
}

int cuda__sample_measure(const struct cuda *c, const struct ops_limits *limits, struct arena *arena)
{
    float *kept;
    (void)c;
    return arena_take(arena, (size_t)limits->max_seqs * (size_t)limits->vocab_size * sizeof *kept, "op scratch", &kept);
}

int cuda__sample(struct ops *o, struct tensor logits, const int32_t *slot, const struct sampling_state *state)
{
    struct arena arena;
    float *kept;
    TRY(cuda__scratch(o, &arena));
    TRY(arena_take(&arena, (size_t)logits.dim[0] * (size_t)state->vocab_size * sizeof *kept, "op scratch", &kept));
    return cuda__launch(o, "sample", sample_kernel, dim3((unsigned)logits.dim[0]), dim3(SELECT_THREADS), 0,
                        (float *)logits.data, logits.stride[0], slot, *state, kept);
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
