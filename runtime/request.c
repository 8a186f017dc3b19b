#include "runtime/request.h"

#include <stdlib.h>
#include <string.h>

void request_free(struct request *request)
{
    free(request->ids);
    free(request->spans);
    free(request->pixels);
    free(request->forced);
    free(request->followup);
    for (int i = 0; i < request->n_stops; i++) free(request->stop[i]);
    memset(request, 0, sizeof *request);
}

const char *finish_reason_name(enum finish_reason reason)
{
    switch (reason) {
    case FINISH_STOP: return "stop";
    case FINISH_LENGTH: return "length";
    case FINISH_ABORT: return "abort";
    default: return "?";
    }
}
