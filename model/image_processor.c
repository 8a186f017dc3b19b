/* image_processor - preprocessor_config.json, and the order of its steps: pad, resize, crop. */
#include <math.h>
#include <string.h>

#include "base/json.h"
#include "model/image_internal.h"

/* MAX_EDGE bounds the work: an output pixel costs a few bytes and a few taps. */
enum { MAX_CONFIG_BYTES = 1 << 20, MAX_EDGE = 8192, CLASS_DEFAULT_EDGE = 224 };

struct image_processor image_processor_default(int image_size)
{
    return (struct image_processor){
        .do_convert_rgb = true,
        .do_resize = true,
        .shortest_edge = image_size,
        .resample = IMAGE_BICUBIC,
        .do_center_crop = true,
        .crop_height = image_size,
        .crop_width = image_size,
        .do_rescale = true,
        .do_normalize = true,
        .rescale_factor = 1 / 255.0,
        .image_mean = {0.48145466, 0.4578275, 0.40821073},
        .image_std = {0.26862954, 0.26130258, 0.27577711},
    };
}

/* Accepts CLIP's and LLaVA's classes; *is_llava tells which meaning do_pad has. No class named: CLIP's, as old
 * checkpoints leave it out. */
static int parse_type(const cJSON *config, const char *path, bool *is_llava)
{
    static const struct {
        const char *name;
        bool is_llava;
    } served[] = {
        {"CLIPImageProcessor", false}, {"CLIPImageProcessorFast", false}, {"CLIPFeatureExtractor", false},
        {"LlavaImageProcessor", true}, {"LlavaImageProcessorFast", true},
    };
    const char *type = NULL;
    TRY(json_string(config, path, "feature_extractor_type", &type));
    TRY(json_string(config, path, "image_processor_type", &type));
    *is_llava = false;
    if (!type) return OK;
    for (size_t i = 0; i < sizeof served / sizeof *served; i++) {
        if (strcmp(type, served[i].name) != 0) continue;
        *is_llava = served[i].is_llava;
        return OK;
    }
    FAIL(ERR_UNSUPPORTED,
         "%s: image_processor_type \"%.100s\" is not served; CLIPImageProcessor and LlavaImageProcessor are", path,
         type);
}

static int parse_edge(const cJSON *object, const char *path, const char *key, int *out)
{
    int64_t value = 0;
    TRY(json_int(object, path, key, 1, MAX_EDGE, &value));
    *out = (int)value;
    return OK;
}

/* size: an integer (the shortest edge), {"shortest_edge"}, or {"height", "width"}. */
static int parse_size(const cJSON *config, const char *path, struct image_processor *out)
{
    const cJSON *size = json_get(config, "size");
    if (!size) return OK;
    out->shortest_edge = out->resize_height = out->resize_width = 0;
    if (cJSON_IsNumber(size)) return parse_edge(config, path, "size", &out->shortest_edge);
    if (json_get(size, "longest_edge") || json_get(size, "max_height") || json_get(size, "max_width"))
        FAIL(ERR_UNSUPPORTED,
             "%s: size with longest_edge, max_height or max_width is not served; shortest_edge or height and width are",
             path);
    TRY(parse_edge(size, path, "shortest_edge", &out->shortest_edge));
    TRY(parse_edge(size, path, "height", &out->resize_height));
    TRY(parse_edge(size, path, "width", &out->resize_width));
    if (out->shortest_edge ? out->resize_height || out->resize_width : !out->resize_height || !out->resize_width)
        FAIL(ERR_FORMAT, "%s: size must be {\"shortest_edge\"} or {\"height\", \"width\"}", path);
    return OK;
}

/* crop_size: an integer (a square), or {"height", "width"}. */
static int parse_crop_size(const cJSON *config, const char *path, struct image_processor *out)
{
    const cJSON *crop = json_get(config, "crop_size");
    if (!crop) return OK;
    out->crop_height = out->crop_width = 0;
    if (cJSON_IsNumber(crop)) {
        TRY(parse_edge(config, path, "crop_size", &out->crop_height));
        out->crop_width = out->crop_height;
        return OK;
    }
    TRY(parse_edge(crop, path, "height", &out->crop_height));
    TRY(parse_edge(crop, path, "width", &out->crop_width));
    if (!out->crop_height || !out->crop_width)
        FAIL(ERR_FORMAT, "%s: crop_size must be an integer or {\"height\", \"width\"}", path);
    return OK;
}

/* One number for all channels, or three. */
static int parse_channels(const cJSON *config, const char *path, const char *key, double min, double max, double out[3])
{
    const cJSON *item = json_get(config, key);
    if (!item) return OK;
    bool is_list = cJSON_IsArray(item) && cJSON_GetArraySize(item) == 3;
    if (!is_list && !cJSON_IsNumber(item)) FAIL(ERR_FORMAT, "%s: %s must be 3 numbers, or one for all", path, key);
    for (int c = 0; c < 3; c++) {
        const cJSON *number = is_list ? cJSON_GetArrayItem(item, c) : item;
        if (!cJSON_IsNumber(number) || !(number->valuedouble >= min && number->valuedouble <= max))
            FAIL(ERR_FORMAT, "%s: %s[%d] must be a number within %g and %g", path, key, c, min, max);
        out[c] = number->valuedouble;
    }
    return OK;
}

static int parse_flags(const cJSON *config, const char *path, bool is_llava, struct image_processor *out)
{
    TRY(json_bool(config, path, "do_convert_rgb", &out->do_convert_rgb));
    TRY(json_bool(config, path, "do_resize", &out->do_resize));
    TRY(json_bool(config, path, "do_center_crop", &out->do_center_crop));
    TRY(json_bool(config, path, "do_rescale", &out->do_rescale));
    TRY(json_bool(config, path, "do_normalize", &out->do_normalize));
    TRY(json_bool(config, path, "do_pad", &out->do_pad));
    if (is_llava || !out->do_pad) return OK;
    /* CLIP's classes pad a batch to one size, which pictures of one size need not. */
    if (json_get(config, "pad_size"))
        FAIL(ERR_UNSUPPORTED, "%s: do_pad with pad_size is not served; LlavaImageProcessor's do_pad is", path);
    out->do_pad = false;
    return OK;
}

/* Vision towers take one size, so settings that let the picture decide are refused here and not at the first image. */
static int check_fixed_size(const struct image_processor *p, const char *path)
{
    if (p->do_center_crop) return OK;
    if (!p->do_resize)
        FAIL(ERR_UNSUPPORTED, "%s: neither do_resize nor do_center_crop: the output size would be the picture's own",
             path);
    if (p->shortest_edge && !p->do_pad)
        FAIL(ERR_UNSUPPORTED,
             "%s: size.shortest_edge without do_center_crop: the output size would depend on the picture; give size "
             "as height and width, or crop",
             path);
    return OK;
}

static int parse(const cJSON *config, const char *path, struct image_processor *out)
{
    bool is_llava;
    int64_t resample = out->resample;
    if (!cJSON_IsObject(config)) FAIL(ERR_FORMAT, "%s: a JSON object was expected", path);
    TRY(parse_type(config, path, &is_llava));
    TRY(parse_flags(config, path, is_llava, out));
    TRY(parse_size(config, path, out));
    TRY(parse_crop_size(config, path, out));
    TRY(json_int(config, path, "resample", 0, IMAGE_RESAMPLE_N - 1, &resample));
    out->resample = (enum image_resample)resample;
    TRY(json_double(config, path, "rescale_factor", 0, 1e6, &out->rescale_factor));
    TRY(parse_channels(config, path, "image_mean", -1e6, 1e6, out->image_mean));
    TRY(parse_channels(config, path, "image_std", 1e-6, 1e6, out->image_std));
    return check_fixed_size(out, path);
}

int image_processor_load(const char *preprocessor_config_path, struct image_processor *out)
{
    cJSON *config;
    struct image_processor processor = image_processor_default(CLASS_DEFAULT_EDGE);
    TRY(json_parse_file(preprocessor_config_path, MAX_CONFIG_BYTES, &config));
    int rc = parse(config, preprocessor_config_path, &processor);
    cJSON_Delete(config);
    if (!rc) *out = processor;
    return rc;
}

void image_processor_output_size(const struct image_processor *processor, int *height, int *width)
{
    const struct image_processor *p = processor;
    *height = p->do_center_crop ? p->crop_height : p->shortest_edge ? p->shortest_edge : p->resize_height;
    *width = p->do_center_crop ? p->crop_width : p->shortest_edge ? p->shortest_edge : p->resize_width;
}

void image_processor_scale_shift(const struct image_processor *processor, float scale[3], float shift[3])
{
    double factor = processor->do_rescale ? processor->rescale_factor : 1;
    for (int c = 0; c < 3; c++) {
        double mean = processor->do_normalize ? processor->image_mean[c] : 0;
        double std = processor->do_normalize ? processor->image_std[c] : 1;
        scale[c] = (float)(factor / std);
        shift[c] = (float)(-mean / std);
    }
}

static struct image__canvas make_canvas(const struct image_processor *p, const struct image *image)
{
    struct image__canvas canvas = {.image = image, .width = image->width, .height = image->height};
    if (!p->do_pad) return canvas;
    int side = image->width > image->height ? image->width : image->height;
    canvas.width = canvas.height = side;
    canvas.left = (side - image->width) / 2;
    canvas.top = (side - image->height) / 2;
    for (int c = 0; c < 3; c++) {
        double fill = p->image_mean[c] * 255;
        canvas.fill[c] = (uint8_t)(fill < 0 ? 0 : fill > 255 ? 255 : fill);
    }
    return canvas;
}

static void resized_size(const struct image_processor *p, const struct image__canvas *canvas, int *width, int *height)
{
    int64_t shorter = canvas->width < canvas->height ? canvas->width : canvas->height;
    int64_t longer = canvas->width < canvas->height ? canvas->height : canvas->width;
    *width = canvas->width;
    *height = canvas->height;
    if (p->do_resize && !p->shortest_edge) {
        *width = p->resize_width;
        *height = p->resize_height;
    } else if (p->do_resize) {
        int edge = p->shortest_edge;
        int long_edge = (int)((double)(edge * longer) / (double)shorter);
        *width = canvas->width <= canvas->height ? edge : long_edge;
        *height = canvas->width <= canvas->height ? long_edge : edge;
    }
}

/* A centre crop in one dimension: the part of `from` pixels that is kept, and where in the output it lands. Halves
 * round down for what is cut off and up for what is added. */
static void center(int from, int to, int *first, int *n, int *at)
{
    *first = from > to ? (from - to) / 2 : 0;
    *n = from > to ? to : from;
    *at = from > to ? 0 : (to - from + 1) / 2;
}

int image_process(const struct image_processor *processor, const struct image *image, uint8_t *out)
{
    int width, height, out_width, out_height, x, y;
    struct image__region region;
    if (!image->pixels || image->width < 1 || image->height < 1)
        FAIL(ERR_ARG, "image_process: an empty picture, %d x %d", image->width, image->height);
    struct image__canvas canvas = make_canvas(processor, image);
    resized_size(processor, &canvas, &width, &height);
    image_processor_output_size(processor, &out_height, &out_width);
    center(width, out_width, &region.x, &region.width, &x);
    center(height, out_height, &region.y, &region.height, &y);
    if (region.width < out_width || region.height < out_height)
        memset(out, 0, (size_t)out_height * (size_t)out_width * 3);
    region.stride = (size_t)out_width * 3;
    region.out = out + (size_t)y * region.stride + (size_t)x * 3;
    return image__resize(&canvas, processor->resample, width, height, &region);
}
