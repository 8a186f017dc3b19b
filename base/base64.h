/* base64 - strict decoding of RFC 4648, for data: URLs inside requests. */
#ifndef VITRAIL_BASE_BASE64_H
#define VITRAIL_BASE_BASE64_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* base64_decode - the bytes of text[0..size) in the standard alphabet, malloc'd; the caller frees *out, which is never
 * NULL on success. Padding may be left out, but if it is there it must be right. Errors: ERR_FORMAT for any other
 * character (white space too), a length that no bytes have, padding in the wrong place, unused bits that are not
 * zero, and more than max_out bytes, which is checked before memory is taken; ERR_NOMEM. */
int base64_decode(const char *text, size_t size, size_t max_out, uint8_t **out, size_t *out_size) MUST_CHECK;

#endif
