#include "runtime/chunks.h"

/* The last place at or before `end` that is not inside an image. */
static int before_image(int end, const struct image_span *spans, int n_spans)
{
    for (int i = 0; i < n_spans; i++)
        if (end > spans[i].start && end < spans[i].end) return spans[i].start;
    return end;
}

int chunk_next(int m, int done, int room, const struct image_span *spans, int n_spans, int judging)
{
    int end = m - done <= room ? m : done + room;
    if (end < m) {
        if (end > m - judging) end = m - judging;
        end = before_image(end, spans, n_spans);
    }
    return end > done ? end - done : 0;
}

bool chunk_possible(int m, int room, const struct image_span *spans, int n_spans, int judging)
{
    for (int done = 0; done < m;) {
        int n = chunk_next(m, done, room, spans, n_spans, judging);
        if (!n) return false;
        done += n;
    }
    return true;
}
