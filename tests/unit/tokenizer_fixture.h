/* tokenizer_fixture - opens the vocabularies of tests/data/tokenizer (*.vocab, written by make_tokenizer_cases.py) as
 * struct tokenizer_vocab. Tokens that compaction dropped are empty and unused. */
#ifndef VITRAIL_TESTS_TOKENIZER_FIXTURE_H
#define VITRAIL_TESTS_TOKENIZER_FIXTURE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "model/tokenizer.h"

#define TOKENIZER_DATA SOURCE_DIR "/tests/data/tokenizer/"

struct fixture {
    struct tokenizer_vocab vocab;
    char *file, pre[64];
    const char **token, **merge;
    size_t *token_size, *merge_size;
    float *score;
    int32_t *type;
};

static inline void fixture_close(struct fixture *f)
{
    for (int i = 0; i < f->vocab.n_merges; i++) free((void *)f->merge[i]);
    free(f->file);
    free(f->token);
    free(f->merge);
    free(f->token_size);
    free(f->merge_size);
    free(f->score);
    free(f->type);
}

static inline uint32_t fixture_u32(const unsigned char **at, int bytes)
{
    uint32_t v = 0;
    for (int i = 0; i < bytes; i++) v |= (uint32_t) * (*at)++ << 8 * i;
    return v;
}

static inline void fixture_tokens(struct fixture *f, const unsigned char **at, uint32_t n)
{
    for (int i = 0; i < f->vocab.n; i++) {
        f->token[i] = "";
        f->type[i] = TOKENIZER_TYPE_UNUSED;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t word = fixture_u32(at, 4), id = word >> 8;
        f->type[id] = (int32_t)(word & 255);
        f->token_size[id] = fixture_u32(at, 1);
        f->token[id] = (const char *)*at;
        *at += f->token_size[id];
        if (f->vocab.kind != TOKENIZER_SPM) continue;
        uint32_t bits = fixture_u32(at, 4);
        memcpy(&f->score[id], &bits, 4);
    }
}

static inline void fixture_merges(struct fixture *f, const unsigned char **at)
{
    for (int i = 0; i < f->vocab.n_merges; i++) {
        uint32_t a = fixture_u32(at, 3), b = fixture_u32(at, 3);
        size_t size = f->token_size[a] + 1 + f->token_size[b];
        char *merge = malloc(size);
        memcpy(merge, f->token[a], f->token_size[a]);
        merge[f->token_size[a]] = ' ';
        memcpy(merge + f->token_size[a] + 1, f->token[b], f->token_size[b]);
        f->merge[i] = merge;
        f->merge_size[i] = size;
    }
}

/* fixture_open - reads NAME.vocab; f->vocab can be changed before tokenizer_open_vocab. */
static inline int fixture_open(struct fixture *f, const char *name)
{
    char path[512];
    size_t size;
    int32_t v[10];
    memset(f, 0, sizeof *f);
    snprintf(path, sizeof path, TOKENIZER_DATA "%s.vocab", name);
    TRY(file_read_all(path, 16 << 20, &f->file, &size));
    if (memcmp(f->file, "VTK1", 4)) FAIL(ERR_FORMAT, "%s: no vocabulary", path);
    const unsigned char *at = (const unsigned char *)f->file + 4;
    uint32_t pre = fixture_u32(&at, 1);
    memcpy(f->pre, at, pre);
    at += pre;
    for (int i = 0; i < 10; i++) v[i] = (int32_t)fixture_u32(&at, 4);
    size_t n = (size_t)v[1];
    f->token = calloc(n, sizeof *f->token);
    f->token_size = calloc(n, sizeof *f->token_size);
    f->score = calloc(n, sizeof *f->score);
    f->type = calloc(n, sizeof *f->type);
    f->merge = calloc((size_t)v[3] + 1, sizeof *f->merge);
    f->merge_size = calloc((size_t)v[3] + 1, sizeof *f->merge_size);
    f->vocab = (struct tokenizer_vocab){.kind = (enum tokenizer_kind)v[0],
                                        .pre = *f->pre ? f->pre : NULL,
                                        .n = v[1],
                                        .n_merges = v[3],
                                        .bos = v[4],
                                        .eos = v[5],
                                        .unk = v[6],
                                        .add_bos = v[7],
                                        .add_eos = v[8],
                                        .add_space_prefix = v[9]};
    fixture_tokens(f, &at, (uint32_t)v[2]);
    fixture_merges(f, &at);
    f->vocab.token = f->token;
    f->vocab.token_size = f->token_size;
    f->vocab.score = f->score;
    f->vocab.type = f->type;
    f->vocab.merge = f->merge;
    f->vocab.merge_size = f->merge_size;
    return OK;
}

static inline int fixture_tokenizer(const char *name, struct tokenizer **out)
{
    struct fixture f;
    int rc = fixture_open(&f, name);
    if (!rc) rc = tokenizer_open_vocab(&f.vocab, name, out);
    fixture_close(&f);
    return rc;
}

#endif
