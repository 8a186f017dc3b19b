/* fuzz_tokenizer - libFuzzer: bytes up to the first 0xff are a tokenizer.json, the next byte holds flags, the rest is
 * text to encode. Whatever opens must encode, and the whole decoding must equal the stream's and be valid UTF-8. */
#include <stdlib.h>
#include <string.h>

#include "model/tokenizer_internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_stream(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip, const char *text,
                         size_t size)
{
    struct token_stream stream;
    char part[TOKEN_STREAM_BYTES];
    size_t done = 0;
    token_stream_init(&stream, t, skip);
    for (size_t i = 0; i <= n; i++) {
        size_t k = i < n ? token_stream_push(&stream, ids[i], part) : token_stream_finish(&stream, part);
        if (k > size - done || memcmp(part, text + done, k)) abort();
        done += k;
    }
    if (done != size) abort();
    if (!tokenizer__is_utf8(text, size)) abort();
}

static void use(const struct tokenizer *t, const char *text, size_t size, unsigned flags)
{
    int32_t *ids;
    char *decoded;
    size_t n, decoded_size;
    bool skip = (flags & 4) != 0;
    if (tokenizer_encode(t, text, size, flags & 3, &ids, &n)) return;
    for (size_t i = 0; i < n; i++)
        if (!tokenizer_token(t, ids[i])) abort();
    if (!tokenizer_decode(t, ids, n, skip, &decoded, &decoded_size)) {
        check_stream(t, ids, n, skip, decoded, decoded_size);
        free(decoded);
    }
    free(ids);
}

static int open_vocab(const uint8_t *data, size_t size, struct tokenizer **t)
{
    enum { MAX = 256 };
    static const char *const pres[] = {"llama-bpe", "qwen2", "smollm", "gpt-2", "default", NULL};
    const char *token[MAX], *merge[MAX];
    size_t token_size[MAX], merge_size[MAX];
    float score[MAX];
    int32_t type[MAX];
    if (size < 2) return ERR_FORMAT;
    struct tokenizer_vocab v = {.kind = data[1] & 1 ? TOKENIZER_SPM : TOKENIZER_BPE,
                                .pre = pres[(data[1] >> 1) % 6],
                                .token = token,
                                .token_size = token_size,
                                .score = score,
                                .type = type,
                                .merge = merge,
                                .merge_size = merge_size,
                                .bos = 1,
                                .eos = -1,
                                .unk = data[1] & 16 ? 0 : -1,
                                .add_bos = (data[1] >> 5 & 1) - 1,
                                .add_eos = -1,
                                .add_space_prefix = (data[1] >> 6) - 1};
    for (const uint8_t *at = data + 2, *end = data + size, *stop; at < end && v.n < MAX && v.n_merges < MAX;
         at = stop + 1) {
        stop = memchr(at, 0xfd, (size_t)(end - at));
        if (!stop) stop = end;
        if (stop == at) continue;
        size_t n = (size_t)(stop - at) - 1;
        if (v.kind == TOKENIZER_BPE && n && memchr(at + 1, ' ', n)) {
            merge[v.n_merges] = (const char *)at + 1;
            merge_size[v.n_merges++] = n;
            continue;
        }
        token[v.n] = (const char *)at + 1;
        token_size[v.n] = n;
        score[v.n] = (float)(*at >> 4);
        type[v.n++] = *at & 7;
    }
    return tokenizer_open_vocab(&v, "fuzz", t);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint8_t *cut = size ? memchr(data, 0xff, size) : NULL;
    size_t json_size = cut ? (size_t)(cut - data) : size, left = size - json_size;
    struct tokenizer *t;
    int rc = size && *data == 0xfe ? open_vocab(data, json_size, &t)
                                   : tokenizer_open_json_memory((const char *)data, json_size, NULL, 0, "fuzz", &t);
    if (rc) return 0;
    if (left > 1) use(t, (const char *)cut + 2, left - 2, cut[1]);
    tokenizer_close(t);
    return 0;
}
