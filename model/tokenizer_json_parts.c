/* tokenizer_json_parts - normalizer, pre_tokenizer, post_processor and decoder of a tokenizer.json.
 *
 * Sequences are flattened into lists of elementary steps. A component, or an option of one, that has no step here is
 * refused by its name. */
#include <stdlib.h>

#include "base/json.h"
#include "base/utf8.h"
#include "model/tokenizer_internal.h"

static int component_type(const cJSON *node, const char *role, const char *what, const char **type)
{
    *type = NULL;
    if (!cJSON_IsObject(node)) FAIL(ERR_FORMAT, "%s: %s: an object with a type expected", what, role);
    TRY(json_string(node, what, "type", type));
    if (!*type) FAIL(ERR_FORMAT, "%s: %s has no type", what, role);
    return OK;
}

static int unsupported(const char *role, const char *type, const char *what)
{
    FAIL(ERR_UNSUPPORTED, "%s: %s \"%.60s\" is not supported by this build", what, role, type);
}

/* {"String": text} or {"Regex": text}. */
static int read_pattern(const cJSON *node, const char *role, const char *what, const char **text, bool *literal)
{
    const cJSON *pattern = json_get(node, "pattern");
    *text = NULL;
    *literal = true;
    TRY(json_string(pattern, what, "String", text));
    if (*text) return OK;
    *literal = false;
    TRY(json_string(pattern, what, "Regex", text));
    if (!*text) FAIL(ERR_FORMAT, "%s: %s: pattern: {\"String\": ...} or {\"Regex\": ...} expected", what, role);
    return OK;
}

static int sequence_items(const cJSON *node, const char *key, const char *what, const cJSON **list)
{
    *list = json_get(node, key);
    if (!cJSON_IsArray(*list)) FAIL(ERR_FORMAT, "%s: a Sequence without its array \"%s\"", what, key);
    return OK;
}

/* ---- normalizer ---- */

static int add_replace(struct tokenizer *t, const cJSON *node, const char *what)
{
    struct tokenizer_normalize_step step = {.kind = NORMALIZE_REPLACE};
    const char *text, *content = NULL;
    bool literal;
    TRY(read_pattern(node, "normalizer Replace", what, &text, &literal));
    TRY(json_string(node, what, "content", &content));
    if (!content) FAIL(ERR_FORMAT, "%s: normalizer Replace has no content", what);
    if (literal && !*text) return OK; /* the empty pattern matches nowhere */
    TRY(tokenizer__regex_open(text, strlen(text), literal, what, &step.regex));
    int rc = tokenizer__add_normalize(t, &step, content, what);
    if (rc) tokenizer__regex_close(step.regex);
    return rc;
}

int tokenizer__json_normalizer(struct tokenizer *t, const cJSON *node, const char *what)
{
    struct tokenizer_normalize_step step = {0};
    const char *type, *prepend = NULL;
    if (!node) return OK;
    TRY(component_type(node, "normalizer", what, &type));
    if (!strcmp(type, "Sequence")) {
        const cJSON *list, *item;
        TRY(sequence_items(node, "normalizers", what, &list));
        cJSON_ArrayForEach (item, list) TRY(tokenizer__json_normalizer(t, item, what));
        return OK;
    }
    if (!strcmp(type, "Replace")) return add_replace(t, node, what);
    if (!strcmp(type, "Prepend")) {
        step.kind = NORMALIZE_PREPEND;
        TRY(json_string(node, what, "prepend", &prepend));
        if (!prepend) FAIL(ERR_FORMAT, "%s: normalizer Prepend has no prepend", what);
    } else if (!strcmp(type, "NFC")) {
        step.kind = NORMALIZE_NFC;
    } else if (!strcmp(type, "NFD")) {
        step.kind = NORMALIZE_NFD;
    } else if (!strcmp(type, "Strip")) {
        step.kind = NORMALIZE_STRIP;
        step.left = step.right = true;
        TRY(json_bool(node, what, "strip_left", &step.left));
        TRY(json_bool(node, what, "strip_right", &step.right));
    } else {
        return unsupported("normalizer", type, what);
    }
    return tokenizer__add_normalize(t, &step, prepend, what);
}

/* ---- pre_tokenizer ---- */

static int read_behavior(const cJSON *node, const char *what, enum tokenizer_split_behavior *out)
{
    static const char *const names[] = {"Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
    const char *name = NULL;
    TRY(json_string(node, what, "behavior", &name));
    if (!name) FAIL(ERR_FORMAT, "%s: pre_tokenizer Split has no behavior", what);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(name, names[i])) continue;
        *out = (enum tokenizer_split_behavior)i;
        return OK;
    }
    FAIL(ERR_FORMAT,
         "%s: pre_tokenizer: behavior \"%.60s\"; Isolated, Removed, MergedWithPrevious, MergedWithNext or "
         "Contiguous expected",
         what, name);
}

static int add_split(struct tokenizer *t, const cJSON *node, const char *what)
{
    enum tokenizer_split_behavior behavior = SPLIT_ISOLATED;
    const char *text;
    bool literal, invert = false;
    TRY(read_pattern(node, "pre_tokenizer Split", what, &text, &literal));
    TRY(read_behavior(node, what, &behavior));
    TRY(json_bool(node, what, "invert", &invert));
    return tokenizer__add_split(t, text, literal, behavior, invert, what);
}

static int add_byte_level(struct tokenizer *t, const cJSON *node, const char *what)
{
    bool prefix = true, regex = true;
    TRY(json_bool(node, what, "add_prefix_space", &prefix));
    TRY(json_bool(node, what, "use_regex", &regex));
    if (prefix) TRY(tokenizer__add_step(t, &(struct tokenizer_step){.kind = STEP_PREFIX_SPACE}, what));
    if (regex) TRY(tokenizer__add_split(t, tokenizer__gpt2_pattern, false, SPLIT_ISOLATED, false, what));
    return tokenizer__add_step(t, &(struct tokenizer_step){.kind = STEP_BYTES}, what);
}

/* replacement and prepend_scheme of a Metaspace; add_prefix_space is the older spelling of the latter. */
static int read_metaspace(const cJSON *node, const char *what, char replacement[5], size_t *size,
                          enum tokenizer_prepend *prepend)
{
    const char *text = "\xe2\x96\x81", *scheme = "always";
    bool prefix = true;
    uint32_t code;
    TRY(json_string(node, what, "replacement", &text));
    TRY(json_string(node, what, "prepend_scheme", &scheme));
    TRY(json_bool(node, what, "add_prefix_space", &prefix));
    *size = *text ? utf8_next(text, strlen(text), &code) : 0;
    if (!*size || text[*size]) FAIL(ERR_FORMAT, "%s: Metaspace: replacement: one character expected", what);
    memcpy(replacement, text, *size);
    if (!strcmp(scheme, "always") || !strcmp(scheme, "first"))
        *prepend = *scheme == 'f' ? PREPEND_FIRST : PREPEND_ALWAYS;
    else if (!strcmp(scheme, "never"))
        *prepend = PREPEND_NEVER;
    else
        FAIL(ERR_FORMAT, "%s: Metaspace: prepend_scheme \"%.60s\"; always, first or never expected", what, scheme);
    if (!prefix && *prepend != PREPEND_NEVER && json_get(node, "prepend_scheme"))
        FAIL(ERR_FORMAT, "%s: Metaspace: add_prefix_space contradicts prepend_scheme", what);
    if (!prefix) *prepend = PREPEND_NEVER;
    return OK;
}

static int add_metaspace(struct tokenizer *t, const cJSON *node, const char *what)
{
    struct tokenizer_step step = {.kind = STEP_METASPACE};
    bool split = true;
    TRY(read_metaspace(node, what, step.replacement, &step.replacement_size, &step.prepend));
    TRY(json_bool(node, what, "split", &split));
    TRY(tokenizer__add_step(t, &step, what));
    return split ? tokenizer__add_split(t, step.replacement, true, SPLIT_NEXT, false, what) : OK;
}

static int add_simple(struct tokenizer *t, const cJSON *node, const char *type, const char *what)
{
    if (!strcmp(type, "Digits")) {
        bool single = false;
        TRY(json_bool(node, what, "individual_digits", &single));
        return tokenizer__add_split(t, "\\p{N}", false, single ? SPLIT_ISOLATED : SPLIT_CONTIGUOUS, false, what);
    }
    if (!strcmp(type, "Punctuation")) {
        enum tokenizer_split_behavior behavior = SPLIT_ISOLATED;
        if (json_get(node, "behavior")) TRY(read_behavior(node, what, &behavior));
        return tokenizer__add_split(t, "[\\p{P}$+<=>\\^`|~]", false, behavior, false, what);
    }
    if (!strcmp(type, "WhitespaceSplit")) return tokenizer__add_split(t, "\\s", false, SPLIT_REMOVED, false, what);
    if (!strcmp(type, "Whitespace")) {
        static const char words[] = "[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{200c}\\x{200d}]+|"
                                    "[^\\s\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{200c}\\x{200d}]+";
        return tokenizer__add_split(t, words, false, SPLIT_REMOVED, true, what);
    }
    if (!strcmp(type, "CharDelimiterSplit")) {
        const char *delimiter = NULL;
        TRY(json_string(node, what, "delimiter", &delimiter));
        if (!delimiter) FAIL(ERR_FORMAT, "%s: pre_tokenizer CharDelimiterSplit has no delimiter", what);
        return tokenizer__add_split(t, delimiter, true, SPLIT_REMOVED, false, what);
    }
    return unsupported("pre_tokenizer", type, what);
}

int tokenizer__json_pre_tokenizer(struct tokenizer *t, const cJSON *node, const char *what)
{
    const char *type;
    if (!node) return OK;
    TRY(component_type(node, "pre_tokenizer", what, &type));
    if (!strcmp(type, "Sequence")) {
        const cJSON *list, *item;
        TRY(sequence_items(node, "pretokenizers", what, &list));
        cJSON_ArrayForEach (item, list) TRY(tokenizer__json_pre_tokenizer(t, item, what));
        return OK;
    }
    if (!strcmp(type, "Split")) return add_split(t, node, what);
    if (!strcmp(type, "ByteLevel")) return add_byte_level(t, node, what);
    if (!strcmp(type, "Metaspace")) return add_metaspace(t, node, what);
    return add_simple(t, node, type, what);
}

/* ---- post_processor ---- */

struct frame {
    int32_t ids[TOKENIZER_MAX_FRAME];
    int n;
};

static int frame_add(struct tokenizer *t, struct frame *frame, const cJSON *id, const char *what)
{
    double v = cJSON_IsNumber(id) ? id->valuedouble : -1;
    if (!(v >= 0 && v < t->n) || v != (double)(int)v || !(t->token[(int)v].flags & TOKEN_PRESENT))
        FAIL(ERR_FORMAT, "%s: post_processor: a special token's id is not in the vocabulary", what);
    if (frame->n == TOKENIZER_MAX_FRAME)
        FAIL(ERR_UNSUPPORTED, "%s: post_processor: more than %d special tokens", what, TOKENIZER_MAX_FRAME);
    frame->ids[frame->n++] = (int32_t)v;
    return OK;
}

/* Puts `before` before all that is there, `after` behind it. */
static int wrap(struct tokenizer *t, struct frame *before, const struct frame *after, const char *what)
{
    if (before->n + t->n_prefix > TOKENIZER_MAX_FRAME || after->n + t->n_suffix > TOKENIZER_MAX_FRAME)
        FAIL(ERR_UNSUPPORTED, "%s: post_processor: more than %d special tokens", what, TOKENIZER_MAX_FRAME);
    for (int i = 0; i < t->n_prefix; i++) before->ids[before->n++] = t->prefix[i];
    memcpy(t->prefix, before->ids, sizeof t->prefix);
    t->n_prefix = before->n;
    for (int i = 0; i < after->n; i++) t->suffix[t->n_suffix++] = after->ids[i];
    return OK;
}

static int add_template(struct tokenizer *t, const cJSON *node, const char *what)
{
    struct frame before = {.n = 0}, after = {.n = 0};
    const cJSON *single = json_get(node, "single"), *specials = json_get(node, "special_tokens"), *piece, *id;
    int sequences = 0;
    if (!cJSON_IsArray(single))
        FAIL(ERR_UNSUPPORTED, "%s: post_processor TemplateProcessing: single is no array", what);
    cJSON_ArrayForEach (piece, single) {
        const char *name = NULL;
        if (json_get(piece, "Sequence")) {
            sequences++;
            continue;
        }
        TRY(json_string(json_get(piece, "SpecialToken"), what, "id", &name));
        const cJSON *ids = name ? json_get(json_get(specials, name), "ids") : NULL;
        if (!cJSON_IsArray(ids))
            FAIL(ERR_FORMAT, "%s: post_processor: special token \"%.100s\" is not explained in special_tokens", what,
                 name ? name : "?");
        cJSON_ArrayForEach (id, ids) TRY(frame_add(t, sequences ? &after : &before, id, what));
    }
    if (sequences != 1)
        FAIL(ERR_UNSUPPORTED, "%s: post_processor TemplateProcessing: the text stands %d times in single", what,
             sequences);
    return wrap(t, &before, &after, what);
}

/* BertProcessing and RobertaProcessing: cls and sep as [token, id]. */
static int add_cls_sep(struct tokenizer *t, const cJSON *node, const char *what)
{
    struct frame before = {.n = 0}, after = {.n = 0};
    TRY(frame_add(t, &before, cJSON_GetArrayItem(json_get(node, "cls"), 1), what));
    TRY(frame_add(t, &after, cJSON_GetArrayItem(json_get(node, "sep"), 1), what));
    return wrap(t, &before, &after, what);
}

int tokenizer__json_post_processor(struct tokenizer *t, const cJSON *node, const char *what)
{
    const char *type;
    if (!node) return OK;
    TRY(component_type(node, "post_processor", what, &type));
    if (!strcmp(type, "Sequence")) {
        const cJSON *list, *item;
        TRY(sequence_items(node, "processors", what, &list));
        cJSON_ArrayForEach (item, list) TRY(tokenizer__json_post_processor(t, item, what));
        return OK;
    }
    if (!strcmp(type, "ByteLevel")) return OK; /* trims offsets, which are not computed here */
    if (!strcmp(type, "TemplateProcessing")) return add_template(t, node, what);
    if (!strcmp(type, "BertProcessing") || !strcmp(type, "RobertaProcessing")) return add_cls_sep(t, node, what);
    return unsupported("post_processor", type, what);
}
