/* The strict YAML reader: what it hands out, with places, and each thing it refuses. */
#include "base/yaml.h"

#include "tests/check.h"

struct trace {
    char text[2048];
    int stop_at;
    int n;
};

static int record(void *arg, const struct yaml_entry *e)
{
    struct trace *t = arg;
    size_t used = strlen(t->text);
    snprintf(t->text + used, sizeof t->text - used, "%s=%s%s@%zu:%zu/%zu:%zu;", e->path, e->value ? e->value : "{}",
             e->quoted ? "'" : "", e->line, e->column, e->value_line, e->value_column);
    if (++t->n == t->stop_at) FAIL(ERR_CONFIG, "stopped by the caller");
    return OK;
}

static int read_text(const char *text, struct trace *t)
{
    memset(t, 0, sizeof *t);
    return yaml_read(text, strlen(text), "f.yaml", record, t);
}

static void expect(const char *text, const char *want)
{
    struct trace t;
    CHECK_OK(read_text(text, &t));
    if (strcmp(t.text, want) != 0) fprintf(stderr, "got  %s\nwant %s\n", t.text, want);
    CHECK(!strcmp(t.text, want));
}

static void expect_error(const char *text, const char *part)
{
    struct trace t;
    CHECK_FAILS(read_text(text, &t), ERR_CONFIG, part);
}

static void test_events(void)
{
    expect("", "");
    expect("# nothing\n", "");
    expect("---\n...\n", "");
    expect("a: 1\nb: two words # and a remark\n", "a=1@1:1/1:4;b=two words@2:1/2:4;");
    expect("m:\n  x: 1\n  n: {y: 2, z: 3}\nq: ''\n",
           "m={}@1:1/2:3;m.x=1@2:3/2:6;m.n={}@3:3/3:6;m.n.y=2@3:7/3:10;m.n.z=3@3:13/3:16;q='@4:1/4:4;");
    expect("empty:\nother: \"a\\tb\"\n", "empty=@1:1/1:7;other=a\tb'@2:1/2:8;");
    expect("{a: 1}", "a=1@1:2/1:5;");
}

static void test_places(void)
{
    expect_error("a: 1\n\tb: 2\n", "f.yaml:2:1: not valid YAML");
    expect_error("a: 1\n\tb: 2\n", "tab");
    expect_error("a: [1, 2]\n", "f.yaml:1:4: a: a list is not accepted");
    expect_error("- a\n- b\n", "f.yaml:1:1: a list");
    expect_error("just text\n", "f.yaml:1:1: expected lines of \"key: value\"");
    expect_error("a: &x 1\n", "f.yaml:1:4: a: an anchor");
    expect_error("m: &x\n  a: 1\n", "an anchor");
    expect_error("a: *x\n", "an alias");
    expect_error("a: !!int 1\n", "a tag");
    expect_error("m: !thing\n  a: 1\n", "a tag");
    expect_error("? {a: 1}\n: 2\n", "a key must be a word");
    expect_error("a b: 1\n", "\"a b\" is no key");
    expect_error("a.b: 1\n", "\"a.b\" is no key");
    expect_error("a: 1\nb: 2\na: 3\n", "f.yaml:3:1: key \"a\" stands twice, first in line 1");
    expect_error("m:\n  a: 1\nm:\n  b: 2\n", "key \"m\" stands twice");
    expect_error("m: {a: 1, a: 2}\n", "key \"m.a\" stands twice");
    expect_error("a: 1\n---\nb: 2\n", "a second document");
    expect_error("a: \"x\\0y\"\n", "a zero byte");
    expect_error("a: {b: 1\n", "f.yaml:");
    expect_error("a: \"open\n", "f.yaml:");
    expect_error("a: \xff\n", "UTF-8");
    /* The same inner key in two maps is no repetition. */
    expect("m: {a: 1}\nn: {a: 2}\n", "m={}@1:1/1:4;m.a=1@1:5/1:8;n={}@2:1/2:4;n.a=2@2:5/2:8;");
}

/* "{a: {a: ... {} ... }}": `depth` maps, one inside the other. */
static const char *nested(int depth, char *buf, size_t size)
{
    size_t used = 0;
    for (int i = 1; i < depth; i++) used += (size_t)snprintf(buf + used, size - used, "{a: ");
    used += (size_t)snprintf(buf + used, size - used, "{}");
    for (int i = 1; i < depth; i++) used += (size_t)snprintf(buf + used, size - used, "}");
    return buf;
}

static void test_caps(void)
{
    static char big[YAML_MAX_BYTES + 2];
    struct trace t = {.n = 0};
    char deep[256];
    CHECK_OK(read_text(nested(YAML_MAX_DEPTH, deep, sizeof deep), &t));
    expect_error(nested(YAML_MAX_DEPTH + 1, deep, sizeof deep), "nested deeper than 16");

    memset(big, ' ', sizeof big);
    t = (struct trace){.n = 0};
    CHECK_OK(yaml_read(big, YAML_MAX_BYTES, "f.yaml", record, &t));
    CHECK_FAILS(yaml_read(big, YAML_MAX_BYTES + 1, "f.yaml", record, &t), ERR_CONFIG, "the limit is 1048576");
    memset(big, 'k', 400);
    memcpy(big + 400, ": 1\n", 5);
    expect_error(big, "too long");

    char *many = big;
    for (int i = 0; i <= YAML_MAX_KEYS; i++) many += sprintf(many, "k%d: 1\n", i);
    expect_error(big, "more than 4096 keys");
    /* Hostile flow nesting ends at the cap, not at the stack's end. */
    memset(big, '[', 100000);
    big[100000] = 0;
    expect_error(big, "a list");
    memset(big, '{', 100000);
    expect_error(big, "f.yaml:1:");
}

static void test_caller_stops(void)
{
    struct trace t = {.stop_at = 2};
    const char *text = "a: 1\nb: 2\nc: 3\n";
    CHECK_FAILS(yaml_read(text, strlen(text), "f.yaml", record, &t), ERR_CONFIG, "stopped by the caller");
    CHECK(t.n == 2);
}

int main(void)
{
    return check_run("yaml", (struct check_case[]){{"events", test_events},
                                                   {"places and refusals", test_places},
                                                   {"caps", test_caps},
                                                   {"the caller stops", test_caller_stops},
                                                   {0}});
}
