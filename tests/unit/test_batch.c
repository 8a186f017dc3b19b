/* Batch jobs on an engine that only pretends: broken lines, resuming after a kill at every byte, the lock, signals, and
 * memory over 100,000 lines. */
#include "runtime/batch.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "runtime/batch_internal.h"
#include "tests/check.h"
#include "tests/fake_engine.h"

#if defined(__SANITIZE_ADDRESS__)
#define SANITIZED /* freed memory stays resident */
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SANITIZED
#endif
#endif
#define MODEL SOURCE_DIR "/models/demo-vlm"

static struct config config;
static struct model_dims dims;
static struct prompt_builder *builder;
static struct engine engine;
static char folder[64], input[256], output[256];

/* The signal that the test wants to have arrived, once so many answers are out. */
static struct {
    int signal, after_finished;
} stopping;

int liveness_stop_requested(const struct liveness *l)
{
    (void)l;
    return stopping.signal && engine.n_finished >= stopping.after_finished ? stopping.signal : 0;
}

static void open_builder(void)
{
    log_set(LOG_ERROR, -1);
    /* In memory if there is such a place: the fsyncs of thousands of jobs take minutes on a disk. */
    snprintf(folder, sizeof folder, "%s/test_batch.XXXXXX", access("/dev/shm", W_OK) ? P_tmpdir : "/dev/shm");
    CHECK(mkdtemp(folder) != NULL);
    snprintf(input, sizeof input, "%s/in.jsonl", folder);
    snprintf(output, sizeof output, "%s/out.jsonl", folder);
    CHECK_OK(config_defaults(&config));
    strcpy(config.model, MODEL);
    strcpy(config.allowed_local_media_path, MODEL);
    config.max_num_seqs = 8;
    config.max_request_bytes = 4096;
    CHECK_OK(model_dims_load(MODEL, &dims));
    CHECK_OK(prompt_open(&config, &dims, &builder));
}

static void write_file(const char *path, const char *text, size_t size)
{
    FILE *f = fopen(path, "w");
    CHECK(f && fwrite(text, 1, size, f) == size);
    if (f) fclose(f);
}

static void write_text(const char *path, const char *text) { write_file(path, text, strlen(text)); }

static int run(bool resume, struct batch_result *result)
{
    memset(&engine, 0, sizeof engine);
    engine.max_queued = 6;
    strcpy(engine.policy.policy, "full");
    struct batch_options options = {
        .input = input, .output = output, .resume = resume, .lock_seconds = 0.2, .n_threads = resume ? -1 : 2};
    options.liveness = (struct liveness *)&stopping;
    return batch_run(&engine, builder, &options, result);
}

/* The output's records in order; *n of them. */
static cJSON **records(int *n)
{
    char *text;
    size_t size;
    cJSON **out = calloc(4096, sizeof *out);
    *n = 0;
    CHECK_OK(file_read_all(output, 64 << 20, &text, &size));
    CHECK(!size || text[size - 1] == '\n');
    for (char *at = text; at < text + size;) {
        char *end = memchr(at, '\n', size - (size_t)(at - text));
        CHECK_OK(json_parse(at, (size_t)(end - at), "record", &out[(*n)++]));
        at = end + 1;
    }
    free(text);
    return out;
}

static void records_free(cJSON **r, int n)
{
    for (int i = 0; i < n; i++) cJSON_Delete(r[i]);
    free(r);
}

static int add_line(char *to, int i)
{
    return sprintf(
        to,
        "{\"custom_id\":\"r-%d\",\"method\":\"POST\",\"url\":\"/v1/chat/completions\",\"body\":{\"messages\":"
        "[{\"role\":\"user\",\"content\":\"What is the value of FIELD %d?\"}]}}\n",
        i, i);
}

static const cJSON *at(const cJSON *o, const char *a, const char *b) { return json_get(json_get(o, a), b); }

static void test_answers(void)
{
    char text[8192];
    int n = 0, found[20] = {0}, n_records;
    struct batch_result r;
    for (int i = 0; i < 20; i++) n += add_line(text + n, i);
    n += sprintf(text + n, "{\"custom_id\":\"with image \\u00e9\\n\\\"\",\"body\":{\"messages\":[{\"role\":\"user\","
                           "\"content\":[{\"type\":\"image_url\",\"image_url\":{\"url\":\"file:" MODEL
                           "/dev-eval/images/dev-1p-0000.png\"}},{\"type\":\"text\",\"text\":\"x\"}]}]}}");
    write_text(input, text); /* without a newline at its end */
    unlink(output);
    CHECK_OK(run(false, &r));
    CHECK(r.n_lines == 21 && r.n_answered == 21 && !r.n_failed && !r.n_skipped && !r.stop_signal);
    CHECK(engine.most <= 6 && r.generated_tokens == 63);
    cJSON **record = records(&n_records);
    CHECK(n_records == 21);
    for (int i = 0; i < n_records; i++) {
        const char *id = json_get(record[i], "custom_id")->valuestring;
        const cJSON *body = at(record[i], "response", "body"), *choice = json_get(body, "choices")->child;
        CHECK(!json_get(record[i], "error"));
        CHECK(!strncmp(json_get(record[i], "id")->valuestring, "batch_req_", 10));
        CHECK(at(record[i], "response", "status_code")->valueint == 200);
        CHECK(!strcmp(json_get(body, "object")->valuestring, "chat.completion"));
        CHECK(!strncmp(at(choice, "message", "content")->valuestring, "answer ", 7));
        CHECK(!strcmp(json_get(choice, "finish_reason")->valuestring, "stop"));
        CHECK(at(body, "usage", "completion_tokens")->valueint == 3);
        CHECK(at(body, "usage", "total_tokens")->valueint == at(body, "usage", "prompt_tokens")->valueint + 3);
        CHECK(!strcmp(at(body, "kv_cache", "policy")->valuestring, "full"));
        CHECK(cJSON_GetArraySize(at(body, "kv_cache", "kept_tokens_per_layer")) == FAKE_LAYERS);
        if (!strcmp(id, "with image \xc3\xa9\n\"")) {
            CHECK(at(body, "usage", "image_tokens")->valueint == 576);
        } else {
            found[atoi(id + 2)]++;
        }
    }
    for (int i = 0; i < 20; i++) CHECK(found[i] == 1);
    records_free(record, n_records);
}

static const struct bad_line {
    const char *text, *code, *message;
    const char *id; /* of the record; NULL: the line's number */
} bad_lines[] = {
    {"{", "invalid_json", "not valid JSON", NULL},
    {"nonsense", "invalid_json", "not valid JSON", NULL},
    {"{\"custom_id\":\"a\"} trailing", "invalid_json", "something follows", NULL},
    {"{\"custom_id\":\"dup-key\",\"custom_id\":\"b\"}", "invalid_json", "twice", NULL},
    {"{\"custom_id\":\"zero\\u0000\"}", "invalid_json", "u0000", NULL},
    {"[1,2]", "invalid_request", "must be an object", NULL},
    {"{}", "invalid_request", "custom_id must be", NULL},
    {"{\"custom_id\":5}", "invalid_request", "custom_id must be", NULL},
    {"{\"custom_id\":\"\"}", "invalid_request", "custom_id must be", NULL},
    {"{\"custom_id\":\"e-body\"}", "invalid_request", "body must be", "e-body"},
    {"{\"custom_id\":\"e-body-type\",\"body\":[]}", "invalid_request", "body must be", "e-body-type"},
    {"{\"custom_id\":\"e-url\",\"url\":\"/v1/embeddings\",\"body\":{}}", "invalid_request", "url must be", "e-url"},
    {"{\"custom_id\":\"e-method\",\"method\":\"GET\",\"body\":{}}", "invalid_request", "method must be", "e-method"},
    {"{\"custom_id\":\"e-messages\",\"body\":{}}", "invalid_request", "messages must be a list", "e-messages"},
    {"{\"custom_id\":\"e-n\",\"body\":{\"n\":3,\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}}",
     "invalid_request", "n must be 1", "e-n"},
    {"{\"custom_id\":\"e-long\",\"body\":{\"max_tokens\":5000,\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}}",
     "invalid_request", "more than max_model_len 4096", "e-long"},
    {"{\"custom_id\":\"e-url-http\",\"body\":{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\","
     "\"image_url\":{\"url\":\"http://example.com/x.png\"}}]}]}}",
     "invalid_request", "image 1", "e-url-http"},
    {"{\"custom_id\":\"e-missing\",\"body\":{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\","
     "\"image_url\":{\"url\":\"file:missing.png\"}}]}]}}",
     "invalid_request", "missing.png", "e-missing"},
    {"{\"custom_id\":\"r-1\",\"body\":{\"messages\":[{\"role\":\"user\",\"content\":\"again\"}]}}",
     "duplicate_custom_id", "stands in an earlier line", NULL},
    {"{\"custom_id\":\"e-n\",\"body\":{}}", "duplicate_custom_id", "stands in an earlier line", NULL},
};
enum { N_BAD = sizeof bad_lines / sizeof *bad_lines };

/* Good lines, all the bad ones, a line that is too long, blank lines, good lines. */
static int write_bad_input(void)
{
    static char text[65536];
    int n = 0, lines = 0;
    n += sprintf(text, "\xef\xbb\xbf");
    for (int i = 0; i < 3; i++) n += add_line(text + n, lines++);
    for (int i = 0; i < N_BAD; i++, lines++) n += sprintf(text + n, "%s\r\n", bad_lines[i].text);
    n += sprintf(text + n, "\n  \t\n");
    memset(text + n, 'x', 20000);
    n += 20000;
    n += sprintf(text + n, "\n");
    for (int i = 0; i < 3; i++) n += add_line(text + n, 10 + i);
    write_file(input, text, (size_t)n);
    return 3 + N_BAD + 1 + 3;
}

static void test_bad_lines(void)
{
    struct batch_result r;
    int lines = write_bad_input(), n_records, n_answers = 0, n_long = 0, seen[N_BAD] = {0};
    unlink(output);
    CHECK_OK(run(false, &r));
    CHECK(r.n_lines == lines && r.n_answered == 6 && r.n_failed == N_BAD + 1);
    cJSON **record = records(&n_records);
    CHECK(n_records == lines);
    for (int i = 0; i < n_records; i++) {
        const cJSON *error = json_get(record[i], "error"), *line = json_get(record[i], "line"),
                    *id = json_get(record[i], "custom_id");
        if (!error) {
            n_answers++;
            continue;
        }
        const char *code = json_get(error, "code")->valuestring, *message = json_get(error, "message")->valuestring;
        CHECK(!json_get(record[i], "response"));
        if (!strcmp(code, "line_too_long")) {
            n_long++;
            CHECK(line && line->valueint == 3 + N_BAD + 3 && strstr(message, "max_request_bytes"));
            continue;
        }
        int k = line ? line->valueint - 4 : 0;
        while (!line && k < N_BAD && !(bad_lines[k].id && !strcmp(bad_lines[k].id, id->valuestring))) k++;
        CHECK(k >= 0 && k < N_BAD);
        if (k < 0 || k >= N_BAD) continue;
        seen[k]++;
        CHECK((line == NULL) == (bad_lines[k].id != NULL));
        if (strcmp(code, bad_lines[k].code) || !strstr(message, bad_lines[k].message))
            fprintf(stderr, "%s: got %s \"%s\"\n", bad_lines[k].text, code, message);
        CHECK(!strcmp(code, bad_lines[k].code) && strstr(message, bad_lines[k].message));
    }
    for (int k = 0; k < N_BAD; k++) CHECK(seen[k] == 1);
    CHECK(n_answers == 6 && n_long == 1);
    records_free(record, n_records);
}

static int compare_text(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

/* The records as sorted lines, the time of their making blanked: what must not depend on kills. *all is to be freed. */
static char **sorted_lines(char **all, int *n)
{
    size_t size;
    char **line = calloc(4096, sizeof *line);
    CHECK_OK(file_read_all(output, 64 << 20, all, &size));
    *n = 0;
    for (char *p = strtok(*all, "\n"); p; p = strtok(NULL, "\n")) {
        char *created = strstr(p, "\"created\":");
        if (created)
            for (created += 10; *created >= '0' && *created <= '9'; created++) *created = '0';
        line[(*n)++] = p;
    }
    qsort(line, (size_t)*n, sizeof *line, compare_text);
    return line;
}

/* A kill leaves some prefix of the output. From each one, a resumed job gets to the same set of records. */
static void test_every_cut(void)
{
    struct batch_result r;
    char *whole, *want_text, *got_text;
    size_t size;
    int n_want, n_got, bad = 0;
    int lines = write_bad_input();
    unlink(output);
    CHECK_OK(run(false, &r));
    CHECK_OK(file_read_all(output, 64 << 20, &whole, &size));
    char **want = sorted_lines(&want_text, &n_want);
    CHECK(n_want == lines);
    for (size_t cut = 0; cut <= size; cut++) {
        write_file(output, whole, cut);
        int rc = run(true, &r);
        char **got = sorted_lines(&got_text, &n_got);
        bool same = rc == OK && n_got == n_want && r.n_skipped + r.n_answered + r.n_failed == lines;
        same = same && r.n_failed + r.n_failed_before == N_BAD + 1;
        for (int i = 0; same && i < n_want; i++) same = !strcmp(want[i], got[i]);
        if (!same && !bad++) fprintf(stderr, "cut at %zu: %s\n", cut, rc ? status_message() : "another set of records");
        free(got);
        free(got_text);
    }
    CHECK(bad == 0);
    /* A finished job resumed does nothing. */
    CHECK_OK(run(true, &r));
    CHECK(r.n_skipped == lines && !r.n_answered && !r.n_failed && r.n_failed_before == N_BAD + 1);
    free(whole);
    free(want);
    free(want_text);
}

static void test_refused(void)
{
    struct batch_result r;
    char line[512], *text;
    size_t size;
    add_line(line, 1);
    write_text(input, line);
    write_text(output, "precious\n");
    CHECK_FAILS(run(false, &r), ERR_CONFIG, "exists and has 9 bytes: --resume");
    CHECK_FAILS(run(true, &r), ERR_FORMAT, "line 1 is no record");
    write_text(output, "precious");
    CHECK_FAILS(run(true, &r), ERR_FORMAT, "cannot be resumed");
    write_text(output, "{\"a\":1}\n");
    CHECK_FAILS(run(true, &r), ERR_FORMAT, "neither custom_id nor line");
    CHECK_OK(file_read_all(output, 100, &text, &size)); /* nothing of it was cut */
    CHECK(size == 8);
    free(text);
    char saved[256];
    strcpy(saved, output);
    strcpy(output, input);
    CHECK_FAILS(run(true, &r), ERR_CONFIG, "is the input and the output");
    snprintf(output, sizeof output, "%s/link", folder);
    CHECK(symlink("in.jsonl", output) == 0);
    CHECK_FAILS(run(true, &r), ERR_CONFIG, "is the input and the output");
    unlink(output);
    strcpy(output, folder);
    CHECK_FAILS(run(false, &r), ERR_IO, folder);
    snprintf(output, sizeof output, "%s/none/out", folder);
    CHECK_FAILS(run(false, &r), ERR_IO, "cannot open for writing");
    strcpy(output, saved);
    unlink(output);
    unlink(input);
    CHECK_FAILS(run(false, &r), ERR_IO, "in.jsonl: cannot open");
    unlink(output);
}

static void test_lock(void)
{
    struct batch_result r;
    char line[512];
    add_line(line, 1);
    write_text(input, line);
    unlink(output);
    int other = open(output, O_RDWR | O_CREAT, 0666);
    CHECK(other >= 0 && flock(other, LOCK_EX) == 0);
    CHECK_FAILS(run(false, &r), ERR_CONFIG, "out.jsonl: another batch job is writing it");
    close(other);
    CHECK_OK(run(false, &r));
    CHECK(r.n_answered == 1);
}

static void *unlock_later(void *arg)
{
    usleep(300000);
    close(*(int *)arg);
    return NULL;
}

/* The killed job's process may linger a moment: the next one waits for it. */
static void test_lock_waits(void)
{
    struct batch_result r;
    pthread_t thread;
    unlink(output);
    int other = open(output, O_RDWR | O_CREAT, 0666);
    CHECK(flock(other, LOCK_EX) == 0);
    CHECK(pthread_create(&thread, NULL, unlock_later, &other) == 0);
    memset(&engine, 0, sizeof engine);
    engine.max_queued = 6;
    struct batch_options options = {.input = input, .output = output, .lock_seconds = 5, .n_threads = -1};
    CHECK_OK(batch_run(&engine, builder, &options, &r));
    CHECK(r.n_answered == 1);
    pthread_join(thread, NULL);
}

static void test_signal(void)
{
    enum { LINES = 200 };
    char *text = malloc(LINES * 256);
    int n = 0, n_records, total = 0;
    struct batch_result r;
    for (int i = 0; i < LINES; i++) n += add_line(text + n, i);
    write_file(input, text, (size_t)n);
    unlink(output);
    stopping.signal = SIGTERM;
    stopping.after_finished = 20;
    for (int round = 0; round < 100; round++) {
        CHECK_OK(run(round > 0, &r));
        CHECK(engine.n == 0 && r.n_skipped <= total + LINES);
        total += (int)r.n_answered;
        if (!r.stop_signal) break;
        CHECK(r.stop_signal == SIGTERM && r.n_answered >= 20 && r.n_answered < 30);
    }
    stopping.signal = 0;
    CHECK(total == LINES && !r.stop_signal);
    cJSON **record = records(&n_records);
    records_free(record, n_records);
    CHECK(n_records == LINES);
    free(text);
}

/* kill -9 at any moment, again and again: in the end every line has one record. */
static void test_killed(void)
{
    enum { LINES = 300 };
    char *text = malloc(LINES * 256);
    bool seen[LINES] = {false};
    int n = 0, n_records, status = 1, rounds = 0;
    for (int i = 0; i < LINES; i++) n += add_line(text + n, i);
    write_file(input, text, (size_t)n);
    unlink(output);
    for (; status && rounds < 500; rounds++) {
        pid_t child = fork();
        if (child == 0) {
            struct batch_result r;
            memset(&engine, 0, sizeof engine);
            engine.max_queued = 6;
            engine.step_microseconds = 500;
            struct batch_options options = {.input = input, .output = output, .resume = true};
            _exit(batch_run(&engine, builder, &options, &r) != OK);
        }
        usleep(3000 + (useconds_t)(rounds * 7919 % 40000));
        kill(child, SIGKILL);
        waitpid(child, &status, 0);
    }
    CHECK(status == 0 && rounds > 2);
    cJSON **record = records(&n_records);
    CHECK(n_records == LINES);
    for (int i = 0; i < n_records; i++) {
        int k = atoi(json_get(record[i], "custom_id")->valuestring + 2);
        CHECK(k >= 0 && k < LINES && !seen[k]);
        if (k >= 0 && k < LINES) seen[k] = true;
    }
    records_free(record, n_records);
    free(text);
}

static void test_engine_failures(void)
{
    struct batch_result r;
    char text[8192];
    int n = 0;
    for (int i = 0; i < 20; i++) n += add_line(text + n, i);
    write_text(input, text);
    unlink(output);
    memset(&engine, 0, sizeof engine);
    engine.max_queued = 64;
    engine.fail_after = 3;
    struct batch_options options = {.input = input, .output = output, .resume = true};
    CHECK_FAILS(batch_run(&engine, builder, &options, &r), ERR_PEER, "rank 1 died");
    CHECK(r.n_answered < 20);
    for (int i = 0; i < engine.n; i++) { /* what the dying process would take along */
        batch__item_free(engine.running[i].sink.arg);
        request_free(&engine.running[i].request);
    }
    CHECK_OK(run(true, &r));
    CHECK(r.n_skipped + r.n_answered == 20);
    /* What the engine can never fit is an error record of that line. */
    unlink(output);
    memset(&engine, 0, sizeof engine);
    engine.max_queued = 64;
    engine.refuse_prompt_tokens = 1;
    CHECK_OK(batch_run(&engine, builder, &options, &r));
    CHECK(r.n_failed == 20 && !r.n_answered);
}

/* A zero byte in an answer is JSON's \u0000, and resuming reads it. */
static void test_zero_byte(void)
{
    struct batch_result r;
    char line[512], *text;
    size_t size;
    add_line(line, 1);
    write_text(input, line);
    unlink(output);
    memset(&engine, 0, sizeof engine);
    engine.max_queued = 1;
    engine.zero_byte = true;
    struct batch_options options = {.input = input, .output = output, .n_threads = -1};
    CHECK_OK(batch_run(&engine, builder, &options, &r));
    CHECK_OK(file_read_all(output, 1 << 20, &text, &size));
    CHECK(strstr(text, "\\u0000\"}") != NULL);
    free(text);
    CHECK_OK(run(true, &r));
    CHECK(r.n_skipped == 1 && !r.n_answered);
}

/* A file that may not grow stands for a full disk: the job ends with a message, what is there is whole, and it goes on.
 */
static void test_disk_full(void)
{
    struct batch_result r;
    struct rlimit old, small;
    char text[8192];
    int n = 0, n_records;
    for (int i = 0; i < 20; i++) n += add_line(text + n, i);
    write_text(input, text);
    unlink(output);
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old);
    small = (struct rlimit){3000, old.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);
    int rc = run(false, &r);
    setrlimit(RLIMIT_FSIZE, &old);
    CHECK(rc == ERR_IO && strstr(status_message(), "--resume") && engine.n == 0);
    cJSON **record = records(&n_records);
    records_free(record, n_records);
    CHECK(n_records >= 2 && n_records < 20);
    CHECK_OK(run(true, &r));
    CHECK(r.n_skipped == n_records && r.n_skipped + r.n_answered == 20);
}

static void test_pipe(void)
{
    struct batch_result r;
    int pipes[2], n = 0;
    char text[8192], saved[256];
    CHECK(pipe(pipes) == 0);
    for (int i = 0; i < 20; i++) n += add_line(text + n, i);
    CHECK(write(pipes[1], text, (size_t)n) == n);
    close(pipes[1]);
    strcpy(saved, input);
    snprintf(input, sizeof input, "/dev/fd/%d", pipes[0]);
    unlink(output);
    CHECK_OK(run(false, &r));
    CHECK(r.n_answered == 20);
    close(pipes[0]);
    strcpy(input, saved);
}

static long resident_kib(void)
{
    long pages = 0, ignored;
    FILE *f = fopen("/proc/self/statm", "r");
    if (f && fscanf(f, "%ld %ld", &ignored, &pages) != 2) pages = 0;
    if (f) fclose(f);
    return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

static void write_many(int lines)
{
    FILE *f = fopen(input, "w");
    char line[512];
    for (int i = 0; i < lines; i++) {
        int n = add_line(line, i);
        CHECK(fwrite(line, 1, (size_t)n, f) == (size_t)n);
    }
    fclose(f);
}

/* Memory after 100,000 lines is that after 2,000 but for the table of ids; the output is not in memory. */
static void test_many_lines(void)
{
    enum { LINES = 100000 };
    struct batch_result r;
    write_many(2000);
    unlink(output);
    CHECK_OK(run(false, &r));
    long before = resident_kib();
    write_many(LINES);
    unlink(output);
    CHECK_OK(run(false, &r));
    CHECK(r.n_answered == LINES);
    long after = resident_kib();
    CHECK_OK(run(true, &r));
    CHECK(r.n_skipped == LINES && !r.n_answered);
    long resumed = resident_kib();
    printf("resident %ld KiB, after 100,000 lines %ld KiB, after resuming %ld KiB ...", before, after, resumed);
#ifndef SANITIZED
    CHECK(after - before < 8 << 10);
    CHECK(resumed - before < 8 << 10);
#endif
}

static void close_builder(void)
{
    prompt_close(builder);
    unlink(input);
    unlink(output);
    CHECK(rmdir(folder) == 0);
}

int main(void)
{
    return check_run("batch", (struct check_case[]){{"open", open_builder},
                                                    {"answers", test_answers},
                                                    {"broken lines", test_bad_lines},
                                                    {"killed at every byte of the output", test_every_cut},
                                                    {"outputs that are refused", test_refused},
                                                    {"locked output", test_lock},
                                                    {"lock let go in time", test_lock_waits},
                                                    {"stopped by a signal", test_signal},
                                                    {"killed again and again", test_killed},
                                                    {"engine failures", test_engine_failures},
                                                    {"a zero byte in an answer", test_zero_byte},
                                                    {"disk full", test_disk_full},
                                                    {"input from a pipe", test_pipe},
                                                    {"100,000 lines", test_many_lines},
                                                    {"close", close_builder},
                                                    {0}});
}
