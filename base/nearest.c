#include "base/nearest.h"

#include <stddef.h>
#include <string.h>

enum { MAX_LENGTH = 63 };

/* Levenshtein distance in one row. */
static int distance(const char *a, const char *b)
{
    int row[MAX_LENGTH + 1];
    size_t n = strnlen(a, MAX_LENGTH), m = strnlen(b, MAX_LENGTH);
    for (size_t j = 0; j <= m; j++) row[j] = (int)j;
    for (size_t i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= m; j++) {
            int replace = diagonal + (a[i - 1] != b[j - 1]);
            int insert = (row[j] < row[j - 1] ? row[j] : row[j - 1]) + 1;
            diagonal = row[j];
            row[j] = replace < insert ? replace : insert;
        }
    }
    return row[m];
}

const char *nearest_name(const char *text, const char *const *names)
{
    const char *best = NULL;
    int least = 0;
    for (; *names; names++) {
        int d = distance(text, *names);
        if (best && d >= least) continue;
        best = *names;
        least = d;
    }
    return best;
}
