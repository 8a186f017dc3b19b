/* fuzz_gguf - libFuzzer: any bytes as a GGUF file. Besides crashes, checks the promise that a parsed file can be read
 * by offset, by dequantising the ends of every readable tensor, and opens the vocabulary. */
#include <stdlib.h>
#include <string.h>

#include "model/gguf.h"
#include "model/gguf_llama.h"
#include "model/gguf_vocab.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_tensor(const struct gguf *g, const struct gguf_tensor *t, const uint8_t *data, size_t size)
{
    char name[GGUF_LLAMA_MAX_NAME];
    int heads = 0;
    float first, last;
    int64_t n = 1;
    if (t->offset > size || t->bytes > size - t->offset || gguf_find(g, t->name) != t) abort();
    gguf_llama_name(t->name, name);
    if (!gguf_llama_permuted_heads(g, t, &heads) && heads > 0 && t->dim[0] % (2 * heads)) abort();
    for (int i = 0; i < t->n_dims; i++)
        if (t->dim[i] == 0) return; /* nothing to read, however large the others are */
    for (int i = 0; i < t->n_dims; i++) n *= t->dim[i];
    if (t->type == STORAGE_OTHER) return;
    dequant_to_float(t->type, data + t->offset, 0, 1, &first);
    dequant_to_float(t->type, data + t->offset, n - 1, 1, &last);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct gguf *g = NULL;
    struct gguf_vocab *v = NULL;
    if (gguf_parse(data, size, "fuzz", &g)) return 0;
    for (int i = 0; i < gguf_count(g); i++) check_tensor(g, gguf_at(g, i), data, size);
    if (!gguf_llama_check(g) && !gguf_vocab_open(g, &v)) {
        const struct tokenizer_vocab *t = gguf_vocab_get(v);
        size_t bytes = 0;
        for (int i = 0; i < t->n; i++) bytes += t->token_size[i] ? (size_t)(unsigned char)t->token[i][0] : 0;
        if (t->n < 1 || t->eos >= t->n || bytes > (size_t)t->n * 255) abort();
    }
    gguf_vocab_close(v);
    gguf_close(g);
    return 0;
}
