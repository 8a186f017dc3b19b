#include "model/chat.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/utf8.h"

static const char *const names[CHAT_TEMPLATE_N] = {"llava-1.5", "llama-2", "llama-3", "llama-3.1", "chatml"};

const char *chat_name(int i) { return i >= 0 && i < CHAT_TEMPLATE_N ? names[i] : NULL; }

/* ---- choosing ---- */

/* The template that a Jinja text writes, told by the control words that only it has. */
static bool from_jinja(const char *jinja, enum chat_template *out)
{
    if (strstr(jinja, "<|start_header_id|>"))
        *out = strstr(jinja, "Cutting Knowledge Date") ? CHAT_LLAMA_3_1 : CHAT_LLAMA_3;
    else if (strstr(jinja, "<|im_start|>"))
        *out = CHAT_CHATML;
    else if (strstr(jinja, "[INST]") && strstr(jinja, "<<SYS>>"))
        *out = CHAT_LLAMA_2;
    else if (strstr(jinja, "ASSISTANT:"))
        *out = CHAT_LLAVA_1_5;
    else
        return false;
    return true;
}

static int choose(const char *jinja, enum model_family family, const struct tokenizer *tokenizer,
                  enum chat_template *out)
{
    if (jinja && from_jinja(jinja, out)) return OK;
    if (jinja)
        FAIL(ERR_CONFIG, "the model's chat template is none of those this build has: set chat_template to the one that "
                         "suits the model (llava-1.5, llama-2, llama-3, llama-3.1 or chatml), or use raw prompts");
    if (family == MODEL_LLAVA)
        *out = CHAT_LLAVA_1_5;
    else if (tokenizer_find(tokenizer, "<|start_header_id|>") >= 0 && tokenizer_find(tokenizer, "<|eot_id|>") >= 0)
        *out = CHAT_LLAMA_3;
    else if (tokenizer_find(tokenizer, "<|im_start|>") >= 0 && tokenizer_find(tokenizer, "<|im_end|>") >= 0)
        *out = CHAT_CHATML;
    else
        FAIL(ERR_CONFIG, "the model names no chat template and its vocabulary suggests none: set chat_template "
                         "(llava-1.5, llama-2, llama-3, llama-3.1 or chatml), or use raw prompts");
    return OK;
}

/* ChatML templates of some models put a system message where a conversation has none; it stands in their Jinja text as
 * a literal between the control tokens. */
static int find_default_system(const char *jinja, char **out)
{
    static const char open[] = "<|im_start|>system", close[] = "<|im_end|>";
    for (const char *at = jinja; at && (at = strstr(at, open));) {
        at += sizeof open - 1;
        const char *from = at;
        if (*from == '\n')
            from++;
        else if (from[0] == '\\' && from[1] == 'n')
            from += 2;
        else
            continue;
        const char *end = strstr(from, close);
        size_t n = end ? (size_t)(end - from) : 0;
        if (!n || n > 4096 || strcspn(from, "'\"{}\\") < n) continue;
        *out = strndup(from, n);
        if (!*out) FAIL(ERR_NOMEM, "no memory for a system message of %zu bytes", n);
        return OK;
    }
    *out = NULL;
    return OK;
}

static void copy_token(const struct tokenizer *tokenizer, int32_t id, const char *preset, char *out, size_t size)
{
    const char *token = id >= 0 ? tokenizer_token(tokenizer, id) : NULL;
    snprintf(out, size, "%s", token && strlen(token) < size ? token : preset);
}

int chat_open(struct chat *chat, const char *name, const char *jinja, enum model_family family,
              const struct tokenizer *tokenizer)
{
    memset(chat, 0, sizeof *chat);
    if (!strcmp(name, "auto")) {
        TRY(choose(jinja, family, tokenizer, &chat->template));
    } else {
        int i = 0;
        while (i < CHAT_TEMPLATE_N && strcmp(name, names[i])) i++;
        if (i == CHAT_TEMPLATE_N)
            FAIL(ERR_CONFIG, "chat_template %s: expected auto, llava-1.5, llama-2, llama-3, llama-3.1 or chatml", name);
        chat->template = (enum chat_template)i;
    }
    copy_token(tokenizer, tokenizer_bos(tokenizer), "", chat->bos, sizeof chat->bos);
    copy_token(tokenizer, tokenizer_eos(tokenizer), "", chat->eos, sizeof chat->eos);
    if (chat->template == CHAT_CHATML && jinja) TRY(find_default_system(jinja, &chat->default_system));
    return OK;
}

void chat_close(struct chat *chat)
{
    free(chat->default_system);
    memset(chat, 0, sizeof *chat);
}

/* ---- rendering ---- */

/* What is being written; the first failed allocation is remembered and ends it. */
struct render {
    const struct chat *chat;
    struct chat_prompt *out;
    size_t room;
    int segment_room;
    bool failed;
};

static void put(struct render *r, enum chat_segment_kind kind, const char *text, size_t size)
{
    struct chat_prompt *p = r->out;
    if (r->failed || (!size && kind != CHAT_IMAGE)) return;
    if (p->size + size + 1 > r->room) {
        size_t room = (p->size + size + 1) * 2;
        char *more = realloc(p->text, room);
        if (!more) {
            r->failed = true;
            return;
        }
        p->text = more;
        r->room = room;
    }
    struct chat_segment *last = p->n_segments ? &p->segments[p->n_segments - 1] : NULL;
    if (last && last->kind == kind && kind != CHAT_IMAGE) {
        last->size += size;
    } else {
        if (!p->segments || p->n_segments == r->segment_room) {
            int room = r->segment_room ? r->segment_room * 2 : 16;
            struct chat_segment *more = realloc(p->segments, (size_t)room * sizeof *more);
            if (!more) {
                r->failed = true;
                return;
            }
            p->segments = more;
            r->segment_room = room;
        }
        p->segments[p->n_segments++] = (struct chat_segment){kind, p->size, size};
    }
    if (size) memcpy(p->text + p->size, text, size);
    p->size += size;
    p->text[p->size] = 0;
}

static void control(struct render *r, const char *text) { put(r, CHAT_CONTROL, text, strlen(text)); }

static void images(struct render *r, const struct chat_message *m)
{
    for (int i = 0; i < m->n_images; i++) {
        put(r, CHAT_IMAGE, "", 0);
        control(r, "\n");
    }
}

/* White space as Python's str.strip sees it. */
static bool is_space(uint32_t c)
{
    return (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

enum strip { STRIP_NOTHING, STRIP_END, STRIP_BOTH };

/* Cuts white space off the ends of *text, *size. */
static void strip(enum strip what, const char **text, size_t *size)
{
    size_t first = *size, end = 0;
    for (size_t i = 0; i < *size;) {
        uint32_t code;
        size_t step = utf8_next(*text + i, *size - i, &code);
        if (!is_space(code)) {
            if (first == *size) first = i;
            end = i + step;
        }
        i += step;
    }
    if (what == STRIP_END || !end) first = 0;
    *text += first;
    *size = end - first;
}

/* The texts of a message, joined by newlines, after `before`, which is left out if nothing follows. */
static void content(struct render *r, const struct chat_message *m, const char *before, enum strip what)
{
    size_t size = 0;
    for (int i = 0; i < m->n_texts; i++) size += m->texts[i].size + 1;
    char *joined = malloc(size + 1), *to = joined;
    if (!joined) {
        r->failed = true;
        return;
    }
    for (int i = 0; i < m->n_texts; i++) {
        if (i) *to++ = '\n';
        if (m->texts[i].size) memcpy(to, m->texts[i].text, m->texts[i].size);
        to += m->texts[i].size;
    }
    const char *text = joined;
    size = (size_t)(to - joined);
    if (what != STRIP_NOTHING) strip(what, &text, &size);
    if (size) control(r, before);
    put(r, CHAT_CONTENT, text, size);
    free(joined);
}

static void turn_begins(struct render *r) { r->out->last_turn = r->out->size; }

static void render_llava(struct render *r, const struct chat_message *m, int n)
{
    static const char *const roles[] = {"", "USER: ", "ASSISTANT: "};
    r->out->add_special = true;
    for (const struct chat_message *end = m + n; m < end; m++) {
        if (m->role == CHAT_USER) turn_begins(r);
        control(r, roles[m->role]);
        images(r, m);
        for (int i = 0; i < m->n_texts; i++) {
            put(r, CHAT_CONTENT, m->texts[i].text, m->texts[i].size);
            if (m->role != CHAT_ASSISTANT) control(r, " ");
        }
        if (m->role == CHAT_ASSISTANT) control(r, r->chat->eos);
    }
    control(r, "ASSISTANT:");
}

static void render_llama_2(struct render *r, const struct chat_message *m, int n)
{
    const struct chat_message *system = m->role == CHAT_SYSTEM ? m : NULL, *end = m + n;
    for (m += system != NULL; m < end; m++) {
        if (m->role == CHAT_ASSISTANT) {
            control(r, " ");
            content(r, m, "", STRIP_BOTH);
            control(r, " ");
            control(r, r->chat->eos);
            continue;
        }
        turn_begins(r);
        control(r, r->chat->bos);
        control(r, "[INST] ");
        if (system) {
            control(r, "<<SYS>>\n");
            content(r, system, "", STRIP_NOTHING);
            control(r, "\n<</SYS>>");
            if (m->n_images) control(r, "\n\n");
        }
        images(r, m);
        /* The template strips system message and question as one text. */
        content(r, m, system && !m->n_images ? "\n\n" : "", system ? STRIP_END : STRIP_BOTH);
        system = NULL;
        control(r, " [/INST]");
    }
}

static void render_llama_3(struct render *r, const struct chat_message *m, int n)
{
    static const char *const roles[] = {"system", "user", "assistant"};
    const struct chat_message *end = m + n;
    control(r, r->chat->bos);
    if (r->chat->template == CHAT_LLAMA_3_1) {
        control(r, "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
                   "Today Date: 26 Jul 2024\n\n");
        if (m->role == CHAT_SYSTEM) content(r, m++, "", STRIP_BOTH);
        control(r, "<|eot_id|>");
    }
    for (; m < end; m++) {
        if (m->role == CHAT_USER) turn_begins(r);
        control(r, "<|start_header_id|>");
        control(r, roles[m->role]);
        control(r, "<|end_header_id|>\n\n");
        images(r, m);
        content(r, m, "", STRIP_BOTH);
        control(r, "<|eot_id|>");
    }
    control(r, "<|start_header_id|>assistant<|end_header_id|>\n\n");
}

static void render_chatml(struct render *r, const struct chat_message *m, int n)
{
    static const char *const roles[] = {"system\n", "user\n", "assistant\n"};
    if (m->role != CHAT_SYSTEM && r->chat->default_system) {
        control(r, "<|im_start|>system\n");
        control(r, r->chat->default_system);
        control(r, "<|im_end|>\n");
    }
    for (const struct chat_message *end = m + n; m < end; m++) {
        if (m->role == CHAT_USER) turn_begins(r);
        control(r, "<|im_start|>");
        control(r, roles[m->role]);
        images(r, m);
        content(r, m, "", STRIP_NOTHING);
        control(r, "<|im_end|>\n");
    }
    control(r, "<|im_start|>assistant\n");
}

static int check_messages(const struct chat *chat, const struct chat_message *m, int n)
{
    if (n < 1) FAIL(ERR_REQUEST, "messages is empty: a user message is needed");
    if (m[n - 1].role != CHAT_USER) FAIL(ERR_REQUEST, "messages must end with a message of role user");
    int first = m[0].role == CHAT_SYSTEM;
    for (int i = 0; i < n; i++) {
        if (m[i].n_images && m[i].role != CHAT_USER)
            FAIL(ERR_REQUEST, "messages[%d]: only messages of role user may hold images", i);
        if (i && m[i].role == CHAT_SYSTEM && (chat->template == CHAT_LLAMA_2 || chat->template == CHAT_LLAVA_1_5))
            FAIL(ERR_REQUEST, "messages[%d]: with the %s template only the first message may have role system", i,
                 names[chat->template]);
        if (chat->template == CHAT_LLAMA_2 && i >= first && (m[i].role == CHAT_USER) != ((i - first) % 2 == 0))
            FAIL(ERR_REQUEST, "messages[%d]: with the llama-2 template roles must alternate user, assistant, user", i);
    }
    return OK;
}

int chat_render(const struct chat *chat, const struct chat_message *messages, int n_messages, struct chat_prompt *out)
{
    static void (*const renderers[CHAT_TEMPLATE_N])(struct render *, const struct chat_message *, int) = {
        render_llava, render_llama_2, render_llama_3, render_llama_3, render_chatml};
    memset(out, 0, sizeof *out);
    TRY(check_messages(chat, messages, n_messages));
    struct render r = {.chat = chat, .out = out};
    renderers[chat->template](&r, messages, n_messages);
    if (r.failed) {
        chat_prompt_free(out);
        FAIL(ERR_NOMEM, "no memory for the text of a prompt");
    }
    return OK;
}

void chat_prompt_free(struct chat_prompt *prompt)
{
    free(prompt->text);
    free(prompt->segments);
    memset(prompt, 0, sizeof *prompt);
}
