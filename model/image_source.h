/* image_source - the bytes of an image that a request names by URL: inline (data:) or a local file (file:).
 *
 * Requests are not trusted. Files are read only below one directory and never through a symbolic link; nothing is
 * fetched over a network. Files that a person names on the command line are trusted and do not come through here. */
#ifndef VITRAIL_MODEL_IMAGE_SOURCE_H
#define VITRAIL_MODEL_IMAGE_SOURCE_H

#include "model/image.h"

/* Room for a name by image_source_name. */
enum { IMAGE_SOURCE_NAME_MAX = 128 };

/* image_source_read - the encoded file, not yet looked at, malloc'd; the caller frees *bytes.
 *   url          data:image/png;base64,... or image/jpeg (image/jpg), case ignored;
 *                file:///absolute/path, file:/absolute/path, file:relative/to/the/working/directory,
 *                percent-encoded; "?" and "#" are part of the name
 *   allowed_dir  files must lie below it once "." and ".." are resolved; NULL or "": no file: URLs
 *   limits       NULL: the defaults; max_bytes is checked before memory is taken
 * Errors: ERR_REQUEST for a URL of another scheme or media type, outside allowed_dir, through a symbolic link, or not
 * of a regular file; ERR_FORMAT for bad base64 or above max_bytes; ERR_IO if the system refuses; ERR_NOMEM. */
int image_source_read(const char *url, const char *allowed_dir, const struct image_limits *limits, uint8_t **bytes,
                      size_t *size) MUST_CHECK;

/* image_source_name - a short printable name of the image for messages and logs: the URL, cut, with bytes that are not
 * printable ASCII as "?"; of a data: URL only what stands before the data. Returns buf. */
const char *image_source_name(const char *url, char buf[IMAGE_SOURCE_NAME_MAX]);

#endif
