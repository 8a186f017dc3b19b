/* safetensors - the header of one .safetensors file: which tensor lies where. Reads no tensor data.
 *
 * A header from outside is not trusted: it may take 100 MB at most; every tensor's shape times its type must equal its
 * byte range, and the ranges must follow each other without gap or overlap and end where the file ends. A file that
 * passes can be read by offset without another check. Types that this program does not compute with are listed as
 * STORAGE_OTHER, so that an unused one does no harm. */
#ifndef VITRAIL_MODEL_SAFETENSORS_H
#define VITRAIL_MODEL_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "model/dequant.h"

struct safetensors;

struct safetensors_tensor {
    const char *name;      /* lives as long as the struct safetensors */
    const char *type_name; /* as the file has it: "F32", "F8_E4M3", ... */
    enum storage_type type;
    int n_dims; /* 0 for a scalar */
    int64_t dim[4];
    uint64_t offset, bytes; /* from the start of the file */
};

/* safetensors_parse - a whole file in memory; `path` names it in errors. The data is not kept.
 * safetensors_read - the same from a descriptor of a file of file_size bytes: one pread of 8 bytes, one of the header.
 * Errors: ERR_FORMAT naming path and tensor; ERR_UNSUPPORTED more than 4 dimensions; ERR_IO; ERR_NOMEM. */
int safetensors_parse(const void *data, size_t size, const char *path, struct safetensors **out) MUST_CHECK;
int safetensors_read(int fd, const char *path, uint64_t file_size, struct safetensors **out) MUST_CHECK;
void safetensors_close(struct safetensors *s);

/* The tensors, in the order of their data. */
int safetensors_count(const struct safetensors *s);
const struct safetensors_tensor *safetensors_at(const struct safetensors *s, int i);

/* safetensors_header_bytes - bytes that reading the header took. */
uint64_t safetensors_header_bytes(const struct safetensors *s);

#endif
