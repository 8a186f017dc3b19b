/* Decoding: every kind of PNG and JPEG gives the expected pixels; everything damaged, cut off or too large is an error.
 */
#include <inttypes.h>
#include <stdio.h> /* jpeglib.h needs it */
#include <unistd.h>

#include <jpeglib.h>

#include "base/file.h"
#include "model/image.h"
#include "tests/check.h"
#include "tests/unit/test_image_pattern.h"

#define DATA SOURCE_DIR "/tests/data/image/"

enum { N_SAMPLES = 32 };

struct file {
    char *bytes;
    size_t size;
};

static struct file read_kind(const char *name)
{
    char path[512];
    struct file file = {0};
    snprintf(path, sizeof path, DATA "kinds/%s", name);
    CHECK_OK(file_read_all(path, 1 << 20, &file.bytes, &file.size));
    return file;
}

static struct file copy_of(struct file file)
{
    struct file copy = {malloc(file.size), file.size};
    memcpy(copy.bytes, file.bytes, file.size);
    return copy;
}

/* Calls `visit` with each line of kinds.tsv. */
static int for_each_kind(void (*visit)(const char *name, struct file file, const char *line))
{
    char *text, name[64];
    size_t size;
    int n = 0;
    CHECK_OK(file_read_all(DATA "kinds.tsv", 1 << 20, &text, &size));
    char *rest = text;
    for (char *line; (line = strsep(&rest, "\n"));) {
        if (!*line || *line == '#' || sscanf(line, "%63s", name) != 1) continue;
        struct file file = read_kind(name);
        visit(name, file, line);
        free(file.bytes);
        n++;
    }
    free(text);
    return n;
}

static void check_pixels(const char *name, struct file file, const char *line)
{
    int width, height, worst = 0;
    uint64_t hash;
    char samples[2 * N_SAMPLES + 1];
    struct image image = {0};
    /* NOLINTNEXTLINE(cert-err34-c): our own table */
    int n = sscanf(line, "%*s %d %d %" SCNx64 " %64s", &width, &height, &hash, samples);
    CHECK(n == 4);
    CHECK_OK(image_decode(file.bytes, file.size, name, NULL, &image));
    size_t n_bytes = (size_t)width * (size_t)height * 3;
    bool good = n == 4 && image.width == width && image.height == height && fnv1a(image.pixels, n_bytes) == hash;
    for (size_t i = 0; !good && image.width == width && image.height == height && i < N_SAMPLES; i++) {
        int d = abs(image.pixels[pattern_mix((uint32_t)i, 0, 0, 1) % n_bytes] - hex_byte(samples, i));
        worst = d > worst ? d : worst;
    }
    if (!good)
        fprintf(stderr, "%s: %d x %d, expected %d x %d; samples differ by up to %d\n", name, image.width, image.height,
                width, height, worst);
    CHECK(good);
    image_free(&image);
}

static void test_kinds(void) { CHECK(for_each_kind(check_pixels) >= 70); }

static void check_truncations(const char *name, struct file file, const char *line)
{
    (void)line;
    int n_accepted = 0;
    size_t whole = strcmp(name, "trailing.jpg") ? file.size : file.size - strlen("bytes after the end marker");
    for (size_t n = 0; n < whole; n++) {
        struct image image = {0};
        char *cut = malloc(n + 1); /* of its own, so that a sanitizer sees a read past the end */
        memcpy(cut, file.bytes, n);
        int rc = image_decode(cut, n, name, NULL, &image);
        n_accepted += rc == OK || image.pixels;
        if (rc == OK) fprintf(stderr, "%s: accepted with %zu of %zu bytes\n", name, n, file.size);
        free(cut);
    }
    CHECK(n_accepted == 0);
}

static void test_truncated(void) { (void)for_each_kind(check_truncations); }

/* Any byte may be wrong: there is an answer or an error, and of a PNG, whose chunks are all guarded, only an error. */
static void check_corruptions(const char *name, struct file file, const char *line)
{
    (void)line;
    int n_accepted = 0;
    struct image_limits limits = image_limits_default(); /* a wrong size byte must not cost seconds */
    limits.max_pixels = 1 << 16;
    bool is_png = strstr(name, ".png") != NULL;
    for (size_t i = 0; i < file.size; i++) {
        struct image image = {0};
        char kept = file.bytes[i];
        file.bytes[i] = (char)(kept ^ (i % 2 ? 0x10 : 0xff));
        int rc = image_decode(file.bytes, file.size, name, &limits, &image);
        n_accepted += rc == OK;
        image_free(&image);
        file.bytes[i] = kept;
    }
    if (is_png && n_accepted) fprintf(stderr, "%s: %d corruptions went unnoticed\n", name, n_accepted);
    CHECK(!is_png || n_accepted == 0);
}

static void test_corrupt(void) { (void)for_each_kind(check_corruptions); }

static void test_not_an_image(void)
{
    struct image image = {0};
    static const struct {
        const char *bytes;
        size_t size;
        const char *part;
    } cases[] = {
        {"GIF89a\1\0\1\0", 10, "GIF"},
        {"BM\0\0\0\0\0\0", 8, "BMP"},
        {"RIFF\0\0\0\0WEBPVP8 ", 16, "WebP"},
        {"\0\0\0\x1c"
         "ftypavif",
         12, "AVIF"},
        {"II*\0\0\0\0\0", 8, "TIFF"},
        {"%PDF-1.4", 8, "PDF"},
        {"P6 1 1 255 abc", 14, "something else"},
        {"\x89PNG\r\n", 6, "something else"},
        {"\xff\xd8", 2, "something else"},
        {"<svg/>", 6, "PNG and JPEG"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        CHECK_FAILS(image_decode(cases[i].bytes, cases[i].size, "x", NULL, &image), ERR_UNSUPPORTED, cases[i].part);
    CHECK_FAILS(image_decode("", 0, "page.png", NULL, &image), ERR_FORMAT, "page.png: an empty file");
    CHECK(image.pixels == NULL);
}

static uint32_t crc32_of(const char *bytes, size_t n)
{
    uint32_t crc = 0xffffffff;
    for (size_t i = 0; i < n; i++) {
        crc ^= (uint8_t)bytes[i];
        for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    }
    return ~crc;
}

static void put32(char *to, uint32_t value)
{
    for (int i = 0; i < 4; i++) to[i] = (char)(value >> (24 - 8 * i));
}

/* A valid PNG whose header lies about its size. */
static struct file png_of_size(uint32_t width, uint32_t height)
{
    struct file file = read_kind("rgb8.png");
    put32(file.bytes + 16, width);
    put32(file.bytes + 20, height);
    put32(file.bytes + 29, crc32_of(file.bytes + 12, 17));
    return file;
}

/* A JPEG whose frame header lies about its size. */
static struct file jpeg_of_size(const char *name, uint32_t width, uint32_t height)
{
    struct file file = read_kind(name);
    for (size_t i = 2; i + 9 < file.size;
         i += 2 + (size_t)(uint8_t)file.bytes[i + 2] * 256 + (uint8_t)file.bytes[i + 3]) {
        uint8_t marker = (uint8_t)file.bytes[i + 1];
        if (marker != 0xc0 && marker != 0xc2) continue;
        file.bytes[i + 5] = (char)(height >> 8);
        file.bytes[i + 6] = (char)height;
        file.bytes[i + 7] = (char)(width >> 8);
        file.bytes[i + 8] = (char)width;
        return file;
    }
    CU_FAIL("no frame header");
    return file;
}

static void check_refused(struct file file, const char *part)
{
    struct image image = {0};
    CHECK_FAILS(image_decode(file.bytes, file.size, "x.img", NULL, &image), ERR_FORMAT, part);
    CHECK(image.pixels == NULL);
    free(file.bytes);
}

static void test_limits(void)
{
    check_refused(png_of_size(1, 20000), "1 x 20000 pixels, one side more than 200 times the other");
    check_refused(png_of_size(20000, 1), "20000 x 1 pixels, one side more than 200 times the other");
    check_refused(png_of_size(40000, 40000), "the limit is 32768 a side");
    check_refused(png_of_size(30000, 30000), "the limit is 67108864 in all");
    check_refused(png_of_size(0x7fffffff, 0x7fffffff), "the limit is 32768 a side");
    check_refused(png_of_size(0xffffffff, 0xffffffff), "bad PNG");
    check_refused(png_of_size(0, 5), "bad PNG");
    check_refused(jpeg_of_size("ycc420.jpg", 65500, 65500), "the limit is 32768 a side");
    check_refused(jpeg_of_size("ycc420.jpg", 20000, 20000), "the limit is 67108864 in all");
    check_refused(jpeg_of_size("ycc420.jpg", 1, 20000), "one side more than 200 times the other");
    check_refused(jpeg_of_size("ycc420.jpg", 0, 10), "bad JPEG");
    /* Within the limits, but the data of a small picture cannot fill them. */
    check_refused(png_of_size(4000, 3000), "bad PNG");
    check_refused(jpeg_of_size("ycc420.jpg", 1000, 900), "bad JPEG");
    check_refused(jpeg_of_size("ycc420-progressive.jpg", 1000, 900), "bad JPEG");

    struct image image = {0};
    struct file file = read_kind("rgb8.png");
    struct image_limits limits = image_limits_default();
    limits.max_bytes = file.size - 1;
    CHECK_FAILS(image_decode(file.bytes, file.size, "x", &limits, &image), ERR_FORMAT, "the limit for an image file");
    limits.max_bytes = file.size;
    limits.max_pixels = 23 * 17;
    CHECK_OK(image_decode(file.bytes, file.size, "x", &limits, &image));
    image_free(&image);
    free(file.bytes);
}

/* A progressive JPEG of one grey block, sent one bit of one coefficient at a time: 6 x 63 + 1 scans. Each would cost a
 * pass over all of a large picture. */
static void test_many_scans(void)
{
    static jpeg_scan_info scans[1 + 6 * 63];
    struct jpeg_error_mgr errors;
    struct jpeg_compress_struct jpeg = {.err = jpeg_std_error(&errors)};
    unsigned char *bytes = NULL;
    unsigned long size = 0;
    int n_scans = 0;
    scans[n_scans++] = (jpeg_scan_info){.comps_in_scan = 1};
    for (int bit = 5; bit >= 0; bit--) {
        for (int k = 1; k < 64; k++)
            scans[n_scans++] =
                (jpeg_scan_info){.comps_in_scan = 1, .Ss = k, .Se = k, .Ah = bit == 5 ? 0 : bit + 1, .Al = bit};
    }
    jpeg_create_compress(&jpeg);
    jpeg_mem_dest(&jpeg, &bytes, &size);
    jpeg.image_width = jpeg.image_height = 8;
    jpeg.input_components = 1;
    jpeg.in_color_space = JCS_GRAYSCALE;
    jpeg_set_defaults(&jpeg);
    jpeg.scan_info = scans;
    jpeg.num_scans = n_scans;
    jpeg_start_compress(&jpeg, TRUE);
    for (int y = 0; y < 8; y++) {
        JSAMPLE row[8] = {0, 200, 13, (JSAMPLE)(y * 9), 90, 255, 31, 7};
        JSAMPROW rows = row;
        (void)jpeg_write_scanlines(&jpeg, &rows, 1);
    }
    jpeg_finish_compress(&jpeg);
    jpeg_destroy_compress(&jpeg);
    check_refused((struct file){(char *)bytes, size}, "more than 200 scans");
}

static void test_messages(void)
{
    struct image image = {0};
    struct file file = read_kind("rgb8.png");
    struct file bad = copy_of(file);
    bad.bytes[file.size - 14] ^= 1; /* the checksum of the last IDAT */
    CHECK_FAILS(image_decode(bad.bytes, bad.size, "a.png", NULL, &image), ERR_FORMAT,
                "a.png: bad PNG: IDAT: CRC error");
    CHECK_FAILS(image_decode(file.bytes, file.size - 1, "a.png", NULL, &image), ERR_FORMAT, "cut off after");
    free(bad.bytes);
    free(file.bytes);
    file = read_kind("ycc444.jpg");
    CHECK_FAILS(image_decode(file.bytes, file.size - 2, "a.jpg", NULL, &image), ERR_FORMAT,
                "a.jpg: bad JPEG: the file is cut");
    free(file.bytes);
}

static void test_free(void)
{
    struct image image = {0};
    image_free(&image);
    CHECK(image.pixels == NULL);
}

/* The processor's config, as JSON text in a file. */
static int load(const char *json, struct image_processor *out)
{
    char path[] = P_tmpdir "/vitrail-processor-XXXXXX";
    int fd = mkstemp(path);
    FILE *f = fdopen(fd, "w");
    fputs(json, f);
    fclose(f);
    int rc = image_processor_load(path, out);
    unlink(path);
    return rc;
}

static void test_processor(void)
{
    struct image_processor p;
    int height, width;
    CHECK_OK(image_processor_load(SOURCE_DIR "/models/demo-vlm/preprocessor_config.json", &p));
    struct image_processor clip = image_processor_default(336);
    CHECK(p.shortest_edge == 336 && p.crop_height == 336 && p.resample == IMAGE_BICUBIC && p.do_normalize);
    for (int c = 0; c < 3; c++) CHECK(p.image_mean[c] == clip.image_mean[c] && p.image_std[c] == clip.image_std[c]);
    CHECK_OK(load("{}", &p));
    image_processor_output_size(&p, &height, &width);
    CHECK(height == 224 && width == 224 && p.do_center_crop && p.do_resize && !p.do_pad);
    CHECK_OK(
        load("{\"feature_extractor_type\": \"CLIPFeatureExtractor\", \"size\": 64, \"crop_size\": 32, \"resample\": 2,"
             "\"image_mean\": 0.5, \"do_pad\": true}",
             &p));
    CHECK(p.shortest_edge == 64 && p.crop_width == 32 && p.resample == IMAGE_BILINEAR && p.image_mean[2] == 0.5);
    CHECK(!p.do_pad);
    CHECK_OK(load(
        "{\"image_processor_type\": \"LlavaImageProcessorFast\", \"do_pad\": true, \"do_center_crop\": false}", &p));
    CHECK(p.do_pad);
    CHECK_OK(load("{\"size\": {\"height\": 30, \"width\": 40}, \"do_center_crop\": false}", &p));
    image_processor_output_size(&p, &height, &width);
    CHECK(height == 30 && width == 40);
}

static void test_processor_errors(void)
{
    static const struct {
        const char *json;
        int code;
        const char *part;
    } cases[] = {
        {"{\"image_processor_type\": \"SiglipImageProcessor\"}", ERR_UNSUPPORTED,
         "\"SiglipImageProcessor\" is not served"},
        {"{\"image_processor_type\": \"LlavaNextImageProcessor\"}", ERR_UNSUPPORTED, "LlavaNextImageProcessor"},
        {"{\"image_processor_type\": 3}", ERR_FORMAT, "image_processor_type must be a string"},
        {"{\"do_center_crop\": false}", ERR_UNSUPPORTED, "shortest_edge without do_center_crop"},
        {"{\"do_center_crop\": false, \"do_resize\": false}", ERR_UNSUPPORTED, "neither do_resize nor do_center_crop"},
        {"{\"size\": {\"shortest_edge\": 9, \"longest_edge\": 12}}", ERR_UNSUPPORTED, "longest_edge"},
        {"{\"size\": {\"shortest_edge\": 9, \"height\": 12}}", ERR_FORMAT, "size must be"},
        {"{\"size\": {\"height\": 12}}", ERR_FORMAT, "size must be"},
        {"{\"size\": {}}", ERR_FORMAT, "size must be"},
        {"{\"size\": \"big\"}", ERR_FORMAT, "size must be"},
        {"{\"size\": -4}", ERR_FORMAT, "size must lie within"},
        {"{\"size\": 1000000}", ERR_FORMAT, "size must lie within"},
        {"{\"crop_size\": {\"height\": 4}}", ERR_FORMAT, "crop_size must be"},
        {"{\"crop_size\": []}", ERR_FORMAT, "crop_size must be"},
        {"{\"crop_size\": {\"height\": 4, \"width\": 4.5}}", ERR_FORMAT, "width must be an integer"},
        {"{\"resample\": 6}", ERR_FORMAT, "resample must lie within 0 and 5"},
        {"{\"image_std\": [0.5, 0.5, 0]}", ERR_FORMAT, "image_std[2]"},
        {"{\"image_std\": [0.5, 0.5]}", ERR_FORMAT, "image_std must be 3 numbers"},
        {"{\"image_mean\": [0.5, \"x\", 0]}", ERR_FORMAT, "image_mean[1]"},
        {"{\"do_pad\": true, \"pad_size\": {\"height\": 4, \"width\": 4}}", ERR_UNSUPPORTED, "pad_size"},
        {"{\"do_resize\": 1}", ERR_FORMAT, "do_resize must be true or false"},
        {"[]", ERR_FORMAT, "object was expected"},
        {"{", ERR_FORMAT, "not valid JSON"},
    };
    struct image_processor p;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        CHECK_FAILS(load(cases[i].json, &p), cases[i].code, cases[i].part);
    CHECK_FAILS(image_processor_load("/nonexistent/preprocessor_config.json", &p), ERR_IO, "preprocessor_config.json");
}

int main(void)
{
    return check_run("image", (struct check_case[]){{"kinds", test_kinds},
                                                    {"truncated", test_truncated},
                                                    {"corrupt", test_corrupt},
                                                    {"not an image", test_not_an_image},
                                                    {"limits", test_limits},
                                                    {"many scans", test_many_scans},
                                                    {"messages", test_messages},
                                                    {"free", test_free},
                                                    {"processor", test_processor},
                                                    {"processor errors", test_processor_errors},
                                                    {0}});
}
