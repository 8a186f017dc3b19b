/* nearest - "did you mean": the known name closest to what was typed. */
#ifndef VITRAIL_BASE_NEAREST_H
#define VITRAIL_BASE_NEAREST_H

/* nearest_name - the entry of the NULL-terminated list with the least edit distance to `text` (first of equals);
 * NULL if the list is empty. Only the first 63 characters of each are compared. */
const char *nearest_name(const char *text, const char *const *names);

#endif
