/* config_value - private to config*.c: the text of one value, by the type of its row. */
#ifndef VITRAIL_RUNTIME_CONFIG_VALUE_H
#define VITRAIL_RUNTIME_CONFIG_VALUE_H

#include "runtime/config.h"

/* config__parse - checks `text` against the row and stores it at `place`, which is untouched on error. The message
 * begins with the key; callers put the place in front. Errors: ERR_CONFIG. */
int config__parse(const struct config_key *key, void *place, const char *text) MUST_CHECK;

#endif
