/* text_stream - generated ids to text for one request: whole characters, stop strings cut out, nothing shown that a
 * stop string might still swallow. */
#ifndef VITRAIL_RUNTIME_TEXT_STREAM_H
#define VITRAIL_RUNTIME_TEXT_STREAM_H

#include <stdbool.h>
#include <stddef.h>

#include "model/tokenizer.h"
#include "runtime/request.h"

struct text_stream {
    struct token_stream tokens;
    bool has_text;                 /* false without a tokenizer: the text stays empty */
    const struct request *request; /* its stop strings */
    char *text;                    /* all text so far, malloc'd; NUL-terminated */
    size_t size, capacity;
    size_t shown; /* bytes already given to the sink */
};

/* text_stream_begin - for a request whose stop strings stay valid; tokenizer NULL: no text (bench). text_stream_end
 * frees. */
int text_stream_begin(struct text_stream *stream, const struct tokenizer *tokenizer,
                      const struct request *request) MUST_CHECK;
void text_stream_end(struct text_stream *stream);

/* text_stream_push - appends a token; *stopped becomes true when it completes a stop string: the text then ends before
 * it (or after it with include_stop). may_stop false: the answer is too short to end, stop strings are text. */
int text_stream_push(struct text_stream *stream, int32_t id, bool may_stop, bool *stopped) MUST_CHECK;

/* text_stream_finish - no more tokens: what was held back belongs to the text. */
int text_stream_finish(struct text_stream *stream) MUST_CHECK;

/* text_stream_show - the part that may be shown now and was not yet; *size may be 0. `all`: nothing more will come. */
const char *text_stream_show(struct text_stream *stream, bool all, size_t *size);

#endif
