/* Resizing, cropping and padding against what the reference processors made of the same pictures. The results are
 * equal to the last bit, so a hash of all pixels is compared; the samples only help to see what is wrong. */
#include <inttypes.h>

#include "base/file.h"
#include "model/image.h"
#include "tests/check.h"
#include "tests/unit/test_image_pattern.h"

#define DATA SOURCE_DIR "/tests/data/image/"

enum { N_SAMPLES = 32 };

struct row {
    char processor[32], kind[16], samples[2 * N_SAMPLES + 1];
    uint32_t seed;
    int width, height, out_width, out_height;
    uint64_t hash;
};

static int check_row(const struct row *row)
{
    char path[512];
    struct image_processor processor;
    int height, width;
    snprintf(path, sizeof path, DATA "processor/%s.json", row->processor);
    int rc = image_processor_load(path, &processor);
    if (rc) return rc;
    image_processor_output_size(&processor, &height, &width);
    if (height != row->out_height || width != row->out_width) FAIL(ERR_BUG, "output is %d x %d", width, height);
    size_t n = (size_t)height * (size_t)width * 3;
    struct image image = pattern_image(row->kind, row->width, row->height, row->seed);
    uint8_t *out = malloc(n);
    rc = image_process(&processor, &image, out);
    if (!rc && fnv1a(out, n) != row->hash) {
        int worst = 0;
        for (size_t i = 0; i < N_SAMPLES; i++) {
            int d = abs(out[pattern_mix((uint32_t)i, 0, 0, 1) % n] - hex_byte(row->samples, i));
            worst = d > worst ? d : worst;
        }
        rc = status_set(ERR_BUG, __FILE__, __LINE__, "pixels differ, the samples by up to %d", worst);
    }
    image_free(&image);
    free(out);
    return rc;
}

static void test_reference(void)
{
    char *text;
    size_t size;
    int n_rows = 0, n_sizes = 0;
    CHECK_OK(file_read_all(DATA "resize.tsv", 1 << 20, &text, &size));
    char *rest = text;
    for (char *line; (line = strsep(&rest, "\n"));) {
        struct row row;
        if (!*line || *line == '#') continue;
        /* NOLINTNEXTLINE(cert-err34-c): our own table */
        int n = sscanf(line, "%31s %15s %" SCNu32 " %d %d %d %d %" SCNx64 " %64s", row.processor, row.kind, &row.seed,
                       &row.width, &row.height, &row.out_width, &row.out_height, &row.hash, row.samples);
        CHECK(n == 9);
        if (n != 9) continue;
        int rc = check_row(&row);
        if (rc) fprintf(stderr, "%s %s %dx%d: %s\n", row.processor, row.kind, row.width, row.height, status_message());
        CHECK(rc == OK);
        n_rows++;
        n_sizes += !strcmp(row.processor, "clip336");
    }
    CHECK(n_rows >= 150);
    CHECK(n_sizes >= 70);
    free(text);
}

static void test_same_size_is_a_copy(void)
{
    struct image_processor processor = image_processor_default(60);
    struct image image = pattern_image("noise", 60, 60, 3);
    uint8_t out[60 * 60 * 3];
    CHECK_OK(image_process(&processor, &image, out));
    CHECK(!memcmp(out, image.pixels, sizeof out));
    image_free(&image);
}

/* A flat picture stays flat at every size: weights sum to one. */
static void test_flat_stays_flat(void)
{
    for (int resample = 0; resample < IMAGE_RESAMPLE_N; resample++) {
        struct image_processor processor = image_processor_default(48);
        processor.resample = (enum image_resample)resample;
        for (int width = 1; width < 400; width += 37) {
            struct image image = {width, 90, malloc((size_t)width * 90 * 3)};
            uint8_t out[48 * 48 * 3];
            int n_wrong = 0;
            memset(image.pixels, 199, (size_t)width * 90 * 3);
            CHECK_OK(image_process(&processor, &image, out));
            for (size_t i = 0; i < sizeof out; i++) n_wrong += out[i] != 199;
            CHECK(n_wrong == 0);
            image_free(&image);
        }
    }
}

static void test_scale_shift(void)
{
    struct image_processor processor = image_processor_default(336);
    float scale[3], shift[3];
    image_processor_scale_shift(&processor, scale, shift);
    for (int c = 0; c < 3; c++) {
        double expected = (200 / 255.0 - processor.image_mean[c]) / processor.image_std[c];
        CHECK(fabs((double)(200 * scale[c] + shift[c]) - expected) < 1e-5);
    }
    processor.do_normalize = false;
    image_processor_scale_shift(&processor, scale, shift);
    CHECK(scale[1] == (float)(1 / 255.0) && shift[1] == 0);
    processor.do_rescale = false;
    image_processor_scale_shift(&processor, scale, shift);
    CHECK(scale[2] == 1 && shift[2] == 0);
}

static void test_empty_picture(void)
{
    struct image_processor processor = image_processor_default(4);
    uint8_t out[48];
    CHECK_FAILS(image_process(&processor, &(struct image){0}, out), ERR_ARG, "empty picture");
}

int main(void)
{
    return check_run("image_resize", (struct check_case[]){{"reference", test_reference},
                                                           {"same size is a copy", test_same_size_is_a_copy},
                                                           {"flat stays flat", test_flat_stays_flat},
                                                           {"scale and shift", test_scale_shift},
                                                           {"empty picture", test_empty_picture},
                                                           {0}});
}
