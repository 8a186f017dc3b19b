/* tokenizer_json - reads tokenizer.json and what tokenizer_config.json adds to it.
 *
 * The model and the added tokens are read here, the other components in tokenizer_json_parts.c. "truncation" and
 * "padding" say how a batch was once cut for training; like transformers, this does not apply them to a prompt. */
#include <stdio.h>
#include <stdlib.h>

#include "base/file.h"
#include "base/json.h"
#include "model/tokenizer_internal.h"

/* A member that must be absent, null, false, 0 or "". */
static int check_unused(const cJSON *model, const char *key, const char *what)
{
    const cJSON *item = json_get(model, key);
    if (!item || cJSON_IsFalse(item) || (cJSON_IsNumber(item) && item->valuedouble == 0) ||
        (cJSON_IsString(item) && !*item->valuestring))
        return OK;
    FAIL(ERR_UNSUPPORTED, "%s: model.%s is set; this build has no such option", what, key);
}

static int read_id(const cJSON *item, const char *token, const char *what, int *out)
{
    double v = cJSON_IsNumber(item) ? item->valuedouble : -1;
    if (!(v >= 0 && v < TOKENIZER_MAX_TOKENS) || v != (double)(int)v)
        FAIL(ERR_FORMAT, "%s: the id of token \"%.100s\" is no integer from 0 to %d", what, token,
             TOKENIZER_MAX_TOKENS - 1);
    *out = (int)v;
    return OK;
}

static int read_vocab(struct tokenizer *t, const cJSON *vocab, const char *what)
{
    const cJSON *item;
    int id = 0, n = 0;
    int32_t other;
    if (!cJSON_IsObject(vocab)) FAIL(ERR_FORMAT, "%s: model.vocab: an object of token and id expected", what);
    cJSON_ArrayForEach (item, vocab) {
        TRY(read_id(item, item->string, what, &id));
        if (id >= n) n = id + 1;
    }
    if (!n) FAIL(ERR_FORMAT, "%s: model.vocab is empty", what);
    TRY(tokenizer__resize(t, n, what));
    cJSON_ArrayForEach (item, vocab) {
        TRY(read_id(item, item->string, what, &id));
        TRY(tokenizer__set_token(t, id, item->string, strlen(item->string), 0, what));
        TRY(tokenizer__enter(t, id, &other));
        if (other >= 0) FAIL(ERR_FORMAT, "%s: token \"%.100s\" stands twice in the vocabulary", what, item->string);
    }
    return OK;
}

static int read_merge(struct tokenizer *t, const cJSON *item, uint32_t rank, const char *what)
{
    const char *left = NULL, *right = NULL;
    size_t left_size = 0;
    if (cJSON_IsString(item)) {
        const char *space = strchr(item->valuestring, ' ');
        if (space && !strchr(space + 1, ' ')) {
            left = item->valuestring;
            left_size = (size_t)(space - left);
            right = space + 1;
        }
    } else if (cJSON_IsArray(item) && cJSON_GetArraySize(item) == 2) {
        const cJSON *a = item->child, *b = a->next;
        if (cJSON_IsString(a) && cJSON_IsString(b)) {
            left = a->valuestring;
            left_size = strlen(left);
            right = b->valuestring;
        }
    }
    if (!left) FAIL(ERR_FORMAT, "%s: merge %u: \"left right\" or [left, right] expected", what, rank);
    return tokenizer__add_merge(t, left, left_size, right, strlen(right), rank, what);
}

static int read_merges(struct tokenizer *t, const cJSON *merges, const char *what)
{
    const cJSON *item;
    uint32_t rank = 0;
    if (!cJSON_IsArray(merges)) FAIL(ERR_FORMAT, "%s: model.merges: an array expected", what);
    int n = cJSON_GetArraySize(merges);
    if (n > TOKENIZER_MAX_TOKENS) FAIL(ERR_FORMAT, "%s: %d merges; at most %d", what, n, TOKENIZER_MAX_TOKENS);
    TRY(tokenizer__pairs_reserve(&t->pairs, (size_t)n));
    cJSON_ArrayForEach (item, merges) {
        if (cJSON_IsString(item) && !strncmp(item->valuestring, "#version", 8)) continue;
        TRY(read_merge(t, item, rank++, what));
    }
    return OK;
}

static int read_model(struct tokenizer *t, const cJSON *model, const char *what)
{
    const char *type = "BPE", *unk = NULL;
    if (!cJSON_IsObject(model)) FAIL(ERR_FORMAT, "%s: model: an object expected", what);
    TRY(json_string(model, what, "type", &type));
    if (strcmp(type, "BPE")) FAIL(ERR_UNSUPPORTED, "%s: model.type \"%.60s\"; this build has BPE only", what, type);
    TRY(check_unused(model, "dropout", what));
    TRY(check_unused(model, "continuing_subword_prefix", what));
    TRY(check_unused(model, "end_of_word_suffix", what));
    TRY(json_bool(model, what, "fuse_unk", &t->fuse_unk));
    TRY(json_bool(model, what, "byte_fallback", &t->byte_fallback));
    TRY(json_bool(model, what, "ignore_merges", &t->ignore_merges));
    TRY(json_string(model, what, "unk_token", &unk));
    TRY(read_vocab(t, json_get(model, "vocab"), what));
    TRY(read_merges(t, json_get(model, "merges"), what));
    if (!unk) return OK;
    t->unk = tokenizer__lookup(t, unk, strlen(unk));
    if (t->unk < 0) FAIL(ERR_FORMAT, "%s: model.unk_token \"%.100s\" is not in the vocabulary", what, unk);
    return OK;
}

static int read_added(struct tokenizer *t, const cJSON *item, int id, const char *what)
{
    struct tokenizer_added added = {.normalized = true};
    const char *content = NULL;
    TRY(json_string(item, what, "content", &content));
    if (!content || !*content) FAIL(ERR_FORMAT, "%s: an added token (id %d) has no content", what, id);
    TRY(json_bool(item, what, "special", &added.special));
    added.normalized = !added.special;
    TRY(json_bool(item, what, "normalized", &added.normalized));
    TRY(json_bool(item, what, "lstrip", &added.lstrip));
    TRY(json_bool(item, what, "rstrip", &added.rstrip));
    TRY(json_bool(item, what, "single_word", &added.single_word));
    int32_t known = tokenizer__lookup(t, content, strlen(content));
    if (known >= 0 && known != id)
        FAIL(ERR_FORMAT, "%s: added token \"%.100s\" has id %d, but %d in the vocabulary", what, content, id, known);
    added.id = id;
    if (known < 0) {
        TRY(tokenizer__resize(t, id + 1, what));
        TRY(tokenizer__set_token(t, id, content, strlen(content), 0, what));
    }
    return tokenizer__add_token(t, &added, what);
}

static int read_added_tokens(struct tokenizer *t, const cJSON *list, const char *what)
{
    const cJSON *item;
    int id = 0;
    if (list && !cJSON_IsArray(list)) FAIL(ERR_FORMAT, "%s: added_tokens: an array expected", what);
    cJSON_ArrayForEach (item, list) {
        const cJSON *content = json_get(item, "content");
        if (!cJSON_IsObject(item)) FAIL(ERR_FORMAT, "%s: added_tokens: objects expected", what);
        TRY(read_id(json_get(item, "id"), cJSON_IsString(content) ? content->valuestring : "?", what, &id));
        TRY(read_added(t, item, id, what));
    }
    return OK;
}

/* added_tokens_decoder of tokenizer_config.json: {"32000": {"content": ...}}; those not yet known are added. */
static int read_config_added(struct tokenizer *t, const cJSON *map, const char *what)
{
    const cJSON *item;
    cJSON_ArrayForEach (item, map) {
        char *end;
        long id = strtol(item->string, &end, 10);
        const cJSON *content = json_get(item, "content");
        if (*end || end == item->string || id < 0 || id >= TOKENIZER_MAX_TOKENS || !cJSON_IsString(content))
            FAIL(ERR_FORMAT, "%s: added_tokens_decoder: entry \"%.60s\" is no id with a content", what, item->string);
        if (id < t->n && t->token[id].flags & TOKEN_ADDED && !strcmp(tokenizer__text(t, (int)id), content->valuestring))
            continue;
        TRY(read_added(t, item, (int)id, what));
    }
    return OK;
}

/* A token that the config names, as a string or as {"content": ...}. It counts as special even if nothing says so. */
static int read_named(struct tokenizer *t, const cJSON *config, const char *key, const char *what, int32_t *id)
{
    const cJSON *item = json_get(config, key);
    if (cJSON_IsObject(item)) item = json_get(item, "content");
    if (!item) return OK;
    if (!cJSON_IsString(item)) FAIL(ERR_FORMAT, "%s: %s: a token's text expected", what, key);
    if (!*item->valuestring) return OK;
    int32_t found = tokenizer_find(t, item->valuestring);
    if (found < 0) FAIL(ERR_FORMAT, "%s: %s \"%.100s\" is not in the vocabulary", what, key, item->valuestring);
    *id = found;
    if (t->token[found].flags & TOKEN_ADDED) return OK;
    return tokenizer__add_token(t, &(struct tokenizer_added){.id = found, .special = true}, what);
}

static int read_config(struct tokenizer *t, const char *text, size_t size, const char *what)
{
    char name[512];
    snprintf(name, sizeof name, "%.400s (its tokenizer_config.json)", what);
    cJSON *config = NULL;
    if (!tokenizer__is_utf8(text, size)) FAIL(ERR_FORMAT, "%s: not UTF-8", name);
    TRY(json_parse(text, size, name, &config));
    const cJSON *map = json_get(config, "added_tokens_decoder");
    int rc = OK;
    if (!cJSON_IsObject(config) || (map && !cJSON_IsObject(map)))
        rc = status_set(ERR_FORMAT, __FILE__, __LINE__, "%s: an object with an object added_tokens_decoder expected",
                        name);
    if (!rc) rc = read_config_added(t, map, name);
    if (!rc) rc = read_named(t, config, "bos_token", name, &t->bos);
    if (!rc) rc = read_named(t, config, "eos_token", name, &t->eos);
    cJSON_Delete(config);
    return rc;
}

static int fill(struct tokenizer *t, const cJSON *root, const char *config, size_t config_size, const char *what)
{
    const char *version = "1.0";
    if (!cJSON_IsObject(root)) FAIL(ERR_FORMAT, "%s: an object expected", what);
    TRY(json_string(root, what, "version", &version));
    if (strcmp(version, "1.0")) FAIL(ERR_UNSUPPORTED, "%s: version \"%.20s\"; 1.0 expected", what, version);
    TRY(read_model(t, json_get(root, "model"), what));
    TRY(read_added_tokens(t, json_get(root, "added_tokens"), what));
    TRY(tokenizer__json_normalizer(t, json_get(root, "normalizer"), what));
    TRY(tokenizer__json_pre_tokenizer(t, json_get(root, "pre_tokenizer"), what));
    TRY(tokenizer__json_post_processor(t, json_get(root, "post_processor"), what));
    if (t->n_prefix) t->bos = t->prefix[0];
    if (config) TRY(read_config(t, config, config_size, what));
    TRY(tokenizer__json_decoder(t, json_get(root, "decoder"), what));
    return tokenizer__finish(t, what);
}

int tokenizer_open_json_memory(const char *json, size_t size, const char *config, size_t config_size, const char *what,
                               struct tokenizer **out)
{
    cJSON *root = NULL;
    if (!tokenizer__is_utf8(json, size)) FAIL(ERR_FORMAT, "%s: not UTF-8", what);
    TRY(json_parse(json, size, what, &root));
    struct tokenizer *t = tokenizer__new(TOKENIZER_BPE);
    int rc = t ? fill(t, root, config, config_size, what)
               : status_set(ERR_NOMEM, __FILE__, __LINE__, "%s: out of memory", what);
    cJSON_Delete(root);
    if (rc) {
        tokenizer_close(t);
        return rc;
    }
    *out = t;
    return OK;
}

int tokenizer_open_json(const char *tokenizer_json_path, const char *tokenizer_config_path, struct tokenizer **out)
{
    char *json = NULL, *config = NULL;
    size_t size = 0, config_size = 0;
    int rc = file_read_all(tokenizer_json_path, TOKENIZER_MAX_FILE, &json, &size);
    if (!rc && tokenizer_config_path)
        rc = file_read_all(tokenizer_config_path, TOKENIZER_MAX_FILE, &config, &config_size);
    if (!rc) rc = tokenizer_open_json_memory(json, size, config, config_size, tokenizer_json_path, out);
    free(json);
    free(config);
    return rc;
}
