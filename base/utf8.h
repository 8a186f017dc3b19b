/* utf8 - decoding as Python's bytes.decode("utf-8", errors="replace") does it, and encoding. */
#ifndef VITRAIL_BASE_UTF8_H
#define VITRAIL_BASE_UTF8_H

#include <stddef.h>
#include <stdint.h>

/* utf8_next - the first code point of text[0..size), size >= 1. An invalid sequence gives U+FFFD and the number of
 * bytes that Python counts as one error (the longest prefix that could begin a character, at least 1).
 * Returns the bytes taken, 1 to 4. */
size_t utf8_next(const char *text, size_t size, uint32_t *code);

/* utf8_put - writes a code point (1 to 4 bytes, no NUL) and returns its length. */
size_t utf8_put(uint32_t code, char *out);

/* utf8_pending - how many bytes at the end of text are the beginning of a character that more bytes could complete;
 * 0 to 3. Streaming output holds these back. */
size_t utf8_pending(const char *text, size_t size);

#endif
