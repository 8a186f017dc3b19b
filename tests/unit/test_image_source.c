/* Image URLs: data: and file: give the bytes; everything that would leave the allowed directory is refused. */
#include "model/image_source.h"

#include <fcntl.h>
#include <limits.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/check.h"

/* base/allowed/{a.png, "b c%.png", sub/d.png, out -> ../secret.png, dir -> .., fifo}, base/{secret.png, link ->
 * allowed, allowed-not/e.png} */
struct tree {
    char base[PATH_MAX], allowed[PATH_MAX + 16];
};

static void write_file(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");
    CHECK(f && fputs(text, f) >= 0 && !fclose(f));
}

static void make_tree(struct tree *tree)
{
    char made[] = P_tmpdir "/vitrail-images-XXXXXX", before[PATH_MAX];
    CHECK(mkdtemp(made) && realpath(made, tree->base));
    snprintf(tree->allowed, sizeof tree->allowed, "%s/allowed", tree->base);
    CHECK(getcwd(before, sizeof before) && !chdir(tree->base));
    CHECK(!mkdir("allowed", 0700) && !mkdir("allowed/sub", 0700) && !mkdir("allowed-not", 0700));
    write_file("allowed/sub/d.png", "deep");
    write_file("allowed-not/e.png", "elsewhere");
    write_file("secret.png", "secret");
    write_file("allowed/a.png", "plain");
    write_file("allowed/b c%.png", "odd name");
    write_file("allowed/empty.png", "");
    CHECK(!symlink("../secret.png", "allowed/out") && !symlink("..", "allowed/dir"));
    CHECK(!symlink("a.png", "allowed/inside") && !symlink("allowed", "link"));
    CHECK(!mkfifo("allowed/fifo", 0600));
    CHECK(!chdir(before));
}

static void remove_tree(const struct tree *tree)
{
    char command[PATH_MAX + 16];
    snprintf(command, sizeof command, "rm -r '%s'", tree->base);
    CHECK(system(command) == 0); /* NOLINT(cert-env33-c): a fixed command on our own directory */
}

static void check_read(const char *url, const char *allowed, const char *expected)
{
    uint8_t *bytes = NULL;
    size_t size = 0;
    CHECK_OK(image_source_read(url, allowed, NULL, &bytes, &size));
    CHECK(bytes && size == strlen(expected) && !memcmp(bytes, expected, size));
    free(bytes);
}

static void check_refused(const char *url, const char *allowed, int code, const char *part)
{
    uint8_t *bytes = NULL;
    size_t size = 0;
    int rc = image_source_read(url, allowed, NULL, &bytes, &size);
    bool good = rc == code && strstr(status_message(), part) && !bytes;
    if (!good) fprintf(stderr, "%s: %s: %s\n", url, status_name(rc), rc ? status_message() : "accepted");
    CHECK(good);
    free(bytes);
}

static void test_data(void)
{
    check_read("data:image/png;base64,aGVsbG8=", NULL, "hello");
    check_read("DATA:IMAGE/Jpeg;charset=x;BASE64,aGVsbG8", ".", "hello");
    check_read("data:image/jpg;base64,", NULL, "");
    check_refused("data:image/webp;base64,aGVsbG8=", NULL, ERR_REQUEST,
                  "data:image/webp;base64: image/png and image/jpeg");
    check_refused("data:image/png,aGVsbG8=", NULL, ERR_REQUEST, ";base64");
    check_refused("data:image/png;base64;x,aGVsbG8=", NULL, ERR_REQUEST, ";base64");
    check_refused("data:;base64,aGVsbG8=", NULL, ERR_REQUEST, "media type");
    check_refused("data:image/png;base64", NULL, ERR_REQUEST, "comma");
    check_refused("data:image/png;base64,aGVs bG8=", NULL, ERR_FORMAT, "data:image/png;base64: base64: byte 0x20");
    check_refused("data:image/png;base64,a", NULL, ERR_FORMAT, "cut off");
    char url[600], filler[500];
    memset(filler, 'y', sizeof filler);
    snprintf(url, sizeof url, "data:image/png;x=%.*s;base64,aGVs", (int)sizeof filler, filler);
    check_refused(url, NULL, ERR_REQUEST, "characters before the data");

    uint8_t *bytes = NULL;
    size_t size;
    struct image_limits limits = image_limits_default();
    limits.max_bytes = 4;
    CHECK_FAILS(image_source_read("data:image/png;base64,aGVsbG8=", NULL, &limits, &bytes, &size), ERR_FORMAT,
                "5 bytes, the limit is 4");
}

static void test_files(void)
{
    struct tree tree;
    char url[2 * PATH_MAX], link[PATH_MAX + 16];
    make_tree(&tree);
    snprintf(link, sizeof link, "%s/link", tree.base);
    static const struct {
        const char *format, *text;
    } cases[] = {
        {"file://%s/allowed/a.png", "plain"},          {"file:%s/allowed/a.png", "plain"},
        {"FILE://localhost%s/allowed/a.png", "plain"}, {"file://%s/allowed/b%%20c%%25.png", "odd name"},
        {"file://%s/allowed/sub/d.png", "deep"},       {"file://%s/allowed//./sub/../a.png", "plain"},
        {"file://%s/allowed/%%61.png", "plain"},       {"file://%s/allowed/empty.png", ""},
        {"file://%s/x/../allowed/a.png", "plain"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(url, sizeof url, cases[i].format, tree.base);
        check_read(url, tree.allowed, cases[i].text);
        check_read(url, link, cases[i].text); /* the directory itself may be named by a link */
        check_read(url, "/", cases[i].text);
    }
    snprintf(url, sizeof url, "file://%s/link/a.png", tree.base);
    check_read(url, link, "plain");
    uint8_t *bytes = NULL;
    size_t size;
    struct image_limits limits = image_limits_default();
    limits.max_bytes = 4;
    snprintf(url, sizeof url, "file://%s/allowed/a.png", tree.base);
    CHECK_FAILS(image_source_read(url, tree.allowed, &limits, &bytes, &size), ERR_FORMAT,
                "the limit for an image file");
    remove_tree(&tree);
}

static void test_hostile_files(void)
{
    struct tree tree;
    char url[2 * PATH_MAX];
    make_tree(&tree);
    static const struct {
        const char *format;
        int code;
        const char *part;
    } cases[] = {
        {"file://%s/secret.png", ERR_REQUEST, "not below the directory"},
        {"file://%s/allowed/../secret.png", ERR_REQUEST, "not below the directory"},
        {"file://%s/allowed/%%2e%%2e/secret.png", ERR_REQUEST, "not below the directory"},
        {"file://%s/allowed/sub/..%%2f..%%2fsecret.png", ERR_REQUEST, "not below the directory"},
        {"file://%s/allowed-not/e.png", ERR_REQUEST, "not below the directory"},
        {"file://%s/link/a.png", ERR_REQUEST, "not below the directory"},
        {"file://%s/allowed", ERR_REQUEST, "not below the directory"},
        {"file://%s/allowed/", ERR_REQUEST, "names no file"},
        {"file://%s/allowed/.", ERR_REQUEST, "not below the directory"},
        {"file://%s/allowed/a.png/", ERR_REQUEST, "names no file"},
        {"file://%s/allowed/out", ERR_REQUEST, "symbolic link"},
        {"file://%s/allowed/inside", ERR_REQUEST, "symbolic link"},
        {"file://%s/allowed/dir/secret.png", ERR_REQUEST, "symbolic link"},
        {"file://%s/allowed/a.png/b", ERR_REQUEST, "no directory"},
        {"file://%s/allowed/sub", ERR_REQUEST, "not a regular file"},
        {"file://%s/allowed/fifo", ERR_REQUEST, "not a regular file"},
        {"file://%s/allowed/a.png%%00.jpg", ERR_REQUEST, "zero byte"},
        {"file://%s/allowed/a%%2", ERR_REQUEST, "hexadecimal"},
        {"file://%s/allowed/a%%zz.png", ERR_REQUEST, "hexadecimal"},
        {"file://%s/allowed/a.png%%", ERR_REQUEST, "hexadecimal"},
        {"file://%s/allowed/none.png", ERR_IO, "cannot open: No such file"},
        {"file://host%s/allowed/a.png", ERR_REQUEST, "a host stands after file://"},
        {"file:///proc/self/root%s/secret.png", ERR_REQUEST, "not below the directory"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(url, sizeof url, cases[i].format, tree.base);
        check_refused(url, tree.allowed, cases[i].code, cases[i].part);
    }
    snprintf(url, sizeof url, "file://%s/allowed/a.png", tree.base);
    check_refused(url, NULL, ERR_REQUEST, "switched off");
    check_refused(url, "", ERR_REQUEST, "switched off");
    check_refused(url, "/nonexistent-directory", ERR_REQUEST, "not below the directory");
    check_refused("file:///proc/self/root/etc/passwd", "/proc", ERR_REQUEST, "symbolic link");
    check_refused("file:///nonexistent-directory/a", "/nonexistent-directory", ERR_IO, "allowed_local_media_path");
    memset(url, 'a', sizeof url);
    memcpy(url, "file:/", 6);
    url[sizeof url - 1] = 0;
    check_refused(url, "/", ERR_REQUEST, "longer than");
    url[PATH_MAX - 2] = 0;
    memcpy(url, "file:a", 6);
    check_refused(url, ".", ERR_REQUEST, "too long");
    remove_tree(&tree);
}

/* Relative URLs are relative to the working directory, which the tests run in: the root of the source tree. */
static void test_relative(void)
{
    uint8_t *bytes = NULL;
    size_t size = 0;
    char before[PATH_MAX];
    CHECK(getcwd(before, sizeof before) && !chdir(SOURCE_DIR "/tests"));
    CHECK_OK(image_source_read("file:data/image/kinds/rgb8.png", ".", NULL, &bytes, &size));
    free(bytes);
    CHECK_OK(image_source_read("file:data/image/kinds/rgb8.png", "data/../data", NULL, &bytes, &size));
    free(bytes);
    CHECK_OK(
        image_source_read("file:../tests/data/image/kinds/rgb8.png", SOURCE_DIR "/tests/data", NULL, &bytes, &size));
    free(bytes);
    check_refused("file:../LICENSE", ".", ERR_REQUEST, "not below the directory");
    check_refused("file:check.h", "data", ERR_REQUEST, "not below the directory");
    CHECK(!chdir(before));
}

static void test_other_schemes(void)
{
    check_refused("", ".", ERR_REQUEST, "empty URL");
    check_refused("file:", ".", ERR_REQUEST, "names no file");
    check_refused("file://", ".", ERR_REQUEST, "a host stands");
    check_refused("https://example.org/a.png", ".", ERR_REQUEST, "nothing is fetched over a network");
    check_refused("http://169.254.0.1/a.png", ".", ERR_REQUEST, "pass a data: or file: URL");
    check_refused("ftp:a", ".", ERR_REQUEST, "nothing is fetched");
    check_refused("a.png", ".", ERR_REQUEST, "not a URL");
    check_refused("fil\x01\xff:\n", ".", ERR_REQUEST, "fil??:?: nothing");
}

static void test_name(void)
{
    char buf[IMAGE_SOURCE_NAME_MAX], url[400];
    memset(url, 'x', sizeof url);
    url[sizeof url - 1] = 0;
    CHECK(strlen(image_source_name(url, buf)) == IMAGE_SOURCE_NAME_MAX - 1 && !strcmp(buf + 124, "..."));
    url[124] = 0;
    CHECK(!strcmp(image_source_name(url, buf), url));
    CHECK(!strcmp(image_source_name("data:image/png;base64,AAAA", buf), "data:image/png;base64"));
    CHECK(!strcmp(image_source_name("", buf), ""));
}

int main(void)
{
    return check_run("image_source", (struct check_case[]){{"data", test_data},
                                                           {"files", test_files},
                                                           {"hostile files", test_hostile_files},
                                                           {"relative", test_relative},
                                                           {"other schemes", test_other_schemes},
                                                           {"name", test_name},
                                                           {0}});
}
