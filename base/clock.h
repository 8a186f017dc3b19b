/* clock - monotonic seconds, for durations and rates. */
#ifndef VITRAIL_BASE_CLOCK_H
#define VITRAIL_BASE_CLOCK_H

#include <time.h>

static inline double clock_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

#endif
