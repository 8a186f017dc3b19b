/* gguf_vocab - plain arrays over the strings of the header; numbers are copied, since a file does not align them. */
#include "model/gguf_vocab.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/file.h"

struct gguf_vocab {
    struct tokenizer_vocab vocab;
    char *pre;
    const char **text; /* tokens, then merges */
    size_t *size;
    float *score;
    int32_t *type;
};

int gguf_vocab_special_id(const struct gguf *g, const char *key, int64_t n_tokens, int *out)
{
    int64_t id = -1;
    *out = -1;
    TRY(gguf_int(g, key, -1, UINT32_MAX, &id));
    if (id == -1 || id == UINT32_MAX) return OK;
    if (id >= n_tokens)
        FAIL(ERR_FORMAT, "%s: %s is %" PRId64 ", but there are only %" PRId64 " tokens", gguf_path(g), key, id,
             n_tokens);
    *out = (int)id;
    return OK;
}

static int read_flag(const struct gguf *g, const char *key, int *out)
{
    bool flag = false;
    TRY(gguf_bool(g, key, &flag));
    *out = gguf_has(g, key) ? flag : -1;
    return OK;
}

static int read_kind(const struct gguf *g, struct gguf_vocab *v)
{
    struct gguf_string model = {"", 0}, pre = {"", 0};
    TRY(gguf_string(g, "tokenizer.ggml.model", &model));
    TRY(gguf_string(g, "tokenizer.ggml.pre", &pre));
    if (gguf_string_is(model, "llama")) {
        v->vocab.kind = TOKENIZER_SPM;
    } else if (gguf_string_is(model, "gpt2")) {
        v->vocab.kind = TOKENIZER_BPE;
    } else {
        FAIL(ERR_UNSUPPORTED, "%s: tokenizer.ggml.model is \"%.*s\"; \"llama\" and \"gpt2\" are served", gguf_path(g),
             model.size < 100 ? (int)model.size : 100, model.text);
    }
    if (!gguf_has(g, "tokenizer.ggml.pre")) return OK;
    v->pre = strndup(pre.text, pre.size);
    if (!v->pre) FAIL(ERR_NOMEM, "%s: out of memory", gguf_path(g));
    v->vocab.pre = v->pre;
    return OK;
}

static int read_strings(const struct gguf *g, struct gguf_vocab *v)
{
    struct gguf_array tokens, merges;
    TRY(gguf_array(g, "tokenizer.ggml.tokens", GGUF_STRING, GGUF_STRING, &tokens));
    TRY(gguf_array(g, "tokenizer.ggml.merges", GGUF_STRING, GGUF_STRING, &merges));
    if (tokens.n < 1 || tokens.n > TOKENIZER_MAX_TOKENS || merges.n > TOKENIZER_MAX_TOKENS)
        FAIL(ERR_FORMAT,
             "%s: tokenizer.ggml.tokens has %" PRId64 " and merges %" PRId64 " entries; 1 to %d and up to %d"
             " are allowed",
             gguf_path(g), tokens.n, merges.n, TOKENIZER_MAX_TOKENS, TOKENIZER_MAX_TOKENS);
    size_t n = (size_t)(tokens.n + merges.n);
    v->text = malloc(n * sizeof *v->text);
    v->size = malloc(n * sizeof *v->size);
    if (!v->text || !v->size) FAIL(ERR_NOMEM, "%s: no memory for %zu tokens and merges", gguf_path(g), n);
    const uint8_t *cursor = tokens.data;
    for (size_t i = 0; i < n; i++) {
        if (i == (size_t)tokens.n) cursor = merges.data;
        struct gguf_string s = gguf_next_string(&cursor);
        v->text[i] = s.text;
        v->size[i] = s.size;
    }
    v->vocab.n = (int)tokens.n;
    v->vocab.token = v->text;
    v->vocab.token_size = v->size;
    v->vocab.n_merges = (int)merges.n;
    v->vocab.merge = v->text + tokens.n;
    v->vocab.merge_size = v->size + tokens.n;
    return OK;
}

/* An array of n four-byte numbers, copied to where they are aligned; *out stays NULL if the key is absent. */
static int read_numbers(const struct gguf *g, const char *key, enum gguf_type type, enum gguf_type or_type, int n,
                        void *out)
{
    struct gguf_array array;
    TRY(gguf_array(g, key, type, or_type, &array));
    if (!gguf_has(g, key)) return OK;
    if (n < 1 || array.n != n)
        FAIL(ERR_FORMAT, "%s: %s has %" PRId64 " entries for %d tokens", gguf_path(g), key, array.n, n);
    void *copy = malloc((size_t)n * 4);
    if (!copy) FAIL(ERR_NOMEM, "%s: out of memory", gguf_path(g));
    memcpy(copy, array.data, (size_t)n * 4);
    memcpy(out, &copy, sizeof copy);
    return OK;
}

static int read_vocab(const struct gguf *g, struct gguf_vocab *v)
{
    struct tokenizer_vocab *t = &v->vocab;
    TRY(read_kind(g, v));
    TRY(read_strings(g, v));
    TRY(read_numbers(g, "tokenizer.ggml.scores", GGUF_F32, GGUF_F32, t->n, &v->score));
    TRY(read_numbers(g, "tokenizer.ggml.token_type", GGUF_I32, GGUF_U32, t->n, &v->type));
    t->score = v->score;
    t->type = v->type;
    if (t->kind == TOKENIZER_SPM && !t->score)
        FAIL(ERR_FORMAT, "%s: tokenizer.ggml.scores is missing, which a \"llama\" vocabulary needs", gguf_path(g));
    TRY(gguf_vocab_special_id(g, "tokenizer.ggml.bos_token_id", t->n, &t->bos));
    TRY(gguf_vocab_special_id(g, "tokenizer.ggml.eos_token_id", t->n, &t->eos));
    TRY(gguf_vocab_special_id(g, "tokenizer.ggml.unknown_token_id", t->n, &t->unk));
    TRY(read_flag(g, "tokenizer.ggml.add_bos_token", &t->add_bos));
    TRY(read_flag(g, "tokenizer.ggml.add_eos_token", &t->add_eos));
    return read_flag(g, "tokenizer.ggml.add_space_prefix", &t->add_space_prefix);
}

int gguf_vocab_open(const struct gguf *g, struct gguf_vocab **out)
{
    struct gguf_vocab *v = calloc(1, sizeof *v);
    if (!v) FAIL(ERR_NOMEM, "%s: out of memory", gguf_path(g));
    int rc = read_vocab(g, v);
    if (rc)
        gguf_vocab_close(v);
    else
        *out = v;
    return rc;
}

void gguf_vocab_close(struct gguf_vocab *v)
{
    if (!v) return;
    free(v->pre);
    free(v->text);
    free(v->size);
    free(v->score);
    free(v->type);
    free(v);
}

const struct tokenizer_vocab *gguf_vocab_get(const struct gguf_vocab *v) { return &v->vocab; }

static int open_file(const char *path, struct gguf **out)
{
    int fd;
    uint64_t size;
    TRY(file_open_read(path, &fd, &size));
    int rc = gguf_read(fd, path, size, out);
    close(fd);
    return rc;
}

int gguf_vocab_open_tokenizer(const char *path, struct tokenizer **out)
{
    struct gguf *g = NULL;
    struct gguf_vocab *v = NULL;
    TRY(open_file(path, &g));
    int rc = gguf_vocab_open(g, &v);
    if (!rc) {
        rc = tokenizer_open_vocab(&v->vocab, path, out);
        gguf_vocab_close(v);
    }
    gguf_close(g);
    return rc;
}

int gguf_vocab_chat_template(const char *path, char **out)
{
    struct gguf *g = NULL;
    struct gguf_string text = {NULL, 0};
    TRY(open_file(path, &g));
    int rc = gguf_string(g, "tokenizer.chat_template", &text);
    *out = NULL;
    if (!rc && text.text) {
        *out = strndup(text.text, text.size);
        if (!*out) rc = status_set(ERR_NOMEM, __FILE__, __LINE__, "%s: out of memory", path);
    }
    gguf_close(g);
    return rc;
}
