/* fuzz_safetensors - libFuzzer: any bytes as a safetensors file. Besides crashes, checks the promise that a parsed file
 * can be read by offset: every tensor lies in the data, and a readable one has exactly the bytes of its shape. */
#include <stdlib.h>
#include <string.h>

#include "model/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct safetensors *s = NULL;
    if (safetensors_parse(data, size, "fuzz", &s)) return 0;
    for (int i = 0; i < safetensors_count(s); i++) {
        const struct safetensors_tensor *t = safetensors_at(s, i);
        uint64_t bytes = (uint64_t)dequant_block_bytes(t->type);
        if (!t->name || !t->type_name || t->n_dims < 0 || t->n_dims > 4) abort();
        if (t->offset > size || t->bytes > size - t->offset) abort();
        for (int k = 0; k < t->n_dims; k++) {
            if (t->dim[k] < 0) abort();
            bytes *= (uint64_t)t->dim[k];
        }
        if (t->type != STORAGE_OTHER && bytes != t->bytes) abort();
    }
    safetensors_close(s);
    return 0;
}
