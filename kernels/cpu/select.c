/* The best k of a row. The k-th best value is found by counting digits from the top (radix selection): linear for any
 * input, exact on ties, and no scratch. */
#include "kernels/cpu/select.h"

#include <string.h>

#include "kernels/cpu/cpu.h"

uint32_t select__key(float value)
{
    uint32_t bits;
    value += 0.0f; /* -0 ranks as 0 */
    if (value != value) return 0;
    memcpy(&bits, &value, sizeof bits);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

uint32_t select__kth_key(const float *value, int64_t n, int64_t k, int64_t *n_equal)
{
    uint32_t prefix = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t count[256] = {0};
        for (int64_t i = 0; i < n; i++) {
            uint32_t key = select__key(value[i]);
            if (((uint64_t)(key ^ prefix) >> (shift + 8)) == 0) count[key >> shift & 255]++;
        }
        uint32_t digit = 255;
        for (; count[digit] < k && digit > 0; digit--) k -= count[digit];
        prefix |= digit << shift;
    }
    *n_equal = k;
    return prefix;
}

static void select_row(int32_t *index, const float *score, int n, int k, int window)
{
    int others = n - window, wanted = k - window;
    int64_t equal = 0;
    if (wanted > 0) {
        uint32_t bound = select__kth_key(score, others, wanted, &equal);
        for (int i = 0; i < others; i++) {
            uint32_t key = select__key(score[i]);
            if (key > bound || (key == bound && equal-- > 0)) *index++ = i;
        }
    }
    for (int i = others; i < n; i++) *index++ = i;
}

int cpu__select_top(struct ops *o, int32_t *index, int index_stride, struct tensor score, const int *k,
                    const int *window)
{
#pragma omp parallel for num_threads(cpu__of(o)->n_threads) if (score.dim[0] * score.dim[1] > CPU_PARALLEL_WORK)
    for (int64_t row = 0; row < score.dim[0]; row++)
        select_row(index + row * index_stride, cpu__row(score, row), (int)score.dim[1], k[row], window[row]);
    return OK;
}
