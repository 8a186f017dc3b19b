/* checkpoint - one sorted list of tensors over all files, and the three ways to read a range of one:
 * a contiguous run of elements; wide column ranges as chunks of whole rows, cut in memory; narrow ones row by row. */
#include "model/checkpoint.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/file.h"
#include "base/json.h"
#include "model/dims.h"
#include "model/gguf.h"
#include "model/gguf_llama.h"
#include "model/safetensors.h"

enum { BOUNCE_BYTES = 4 << 20, MAX_FILES = 2048, MAX_INDEX = 100 * 1000 * 1000, MAX_PATH = 4096 };

struct entry {
    struct checkpoint_tensor info;
    char *canonical; /* info.name */
    enum storage_type type;
    int file;
    uint64_t offset;
    int permuted_head_dim; /* rows of a head whose rotary pairs are interleaved (GGUF q and k); 0: rows in order */
};

struct file {
    char *path;
    int fd;
    uint64_t size;
    struct safetensors *safetensors;
    struct gguf *gguf;
};

struct checkpoint {
    char *path;
    struct file *files;
    int n_files;
    struct entry *entries; /* sorted by canonical name */
    int n_entries;
    uint8_t *bounce;
    uint64_t bytes_read;
};

/* LLaVA checkpoints spell the parts' prefixes in four ways; the first row that matches applies. */
static const struct {
    const char *stored, *canonical;
} prefixes[] = {
    {"language_model.model.", "model."},
    {"language_model.lm_head.", "lm_head."},
    {"language_model.", "model."},
    {"model.language_model.", "model."},
    {"model.multi_modal_projector.", "multi_modal_projector."},
    {"model.vision_tower.vision_model.", "vision_tower.vision_model."},
    {"model.vision_tower.", "vision_tower.vision_model."},
    {"vision_tower.vision_model.", "vision_tower.vision_model."},
    {"vision_tower.", "vision_tower.vision_model."},
};

static char *canonical_name(const char *stored)
{
    const char *head = "", *tail = stored;
    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++) {
        size_t n = strlen(prefixes[i].stored);
        if (strncmp(stored, prefixes[i].stored, n)) continue;
        head = prefixes[i].canonical;
        tail = stored + n;
        break;
    }
    size_t size = strlen(head) + strlen(tail) + 1;
    char *name = malloc(size);
    if (name) snprintf(name, size, "%s%s", head, tail);
    return name;
}

bool checkpoint_name_is_ignored(const char *name)
{
    static const char *const suffixes[] = {".rotary_emb.inv_freq", ".position_ids"};
    static const char *const starts[] = {"rope_freqs.", "vision_tower.vision_model.post_layernorm."};
    size_t size = strlen(name);
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++) {
        size_t n = strlen(suffixes[i]);
        if (size >= n && !strcmp(name + size - n, suffixes[i])) return true;
    }
    for (size_t i = 0; i < sizeof starts / sizeof *starts; i++) {
        if (!strncmp(name, starts[i], strlen(starts[i]))) return true;
    }
    return false;
}

/* ---- opening ---- */

/* Shape as a matrix. The parsers have checked that the product fits, unless a dimension is zero. */
static void set_matrix(struct checkpoint_tensor *info)
{
    bool empty = false;
    info->rows = info->n_dims > 0 ? info->dim[0] : 1;
    info->cols = 1;
    for (int i = 0; i < info->n_dims; i++) empty |= info->dim[i] == 0;
    for (int i = 1; i < info->n_dims && !empty; i++) info->cols *= info->dim[i];
    if (empty) info->rows = info->cols = 0;
}

static int grow_entries(struct checkpoint *c, int n)
{
    struct entry *entries = realloc(c->entries, ((size_t)c->n_entries + (size_t)n + 1) * sizeof *entries);
    if (!entries) FAIL(ERR_NOMEM, "%s: no memory for a list of %d tensors", c->path, c->n_entries + n);
    c->entries = entries;
    return OK;
}

static int add_safetensors(struct checkpoint *c, int file)
{
    struct file *f = &c->files[file];
    int rc = safetensors_read(f->fd, f->path, f->size, &f->safetensors);
    if (rc) return rc;
    c->bytes_read += safetensors_header_bytes(f->safetensors);
    TRY(grow_entries(c, safetensors_count(f->safetensors)));
    for (int i = 0; i < safetensors_count(f->safetensors); i++) {
        const struct safetensors_tensor *t = safetensors_at(f->safetensors, i);
        struct entry e = {.type = t->type, .file = file, .offset = t->offset};
        e.info = (struct checkpoint_tensor){.stored_name = t->name,
                                            .file = f->path,
                                            .type_name = t->type_name,
                                            .readable = t->type != STORAGE_OTHER,
                                            .n_dims = t->n_dims};
        memcpy(e.info.dim, t->dim, sizeof t->dim);
        set_matrix(&e.info);
        e.canonical = canonical_name(t->name);
        if (!e.canonical) FAIL(ERR_NOMEM, "%s: out of memory", f->path);
        c->entries[c->n_entries++] = e;
    }
    return OK;
}

static int add_gguf(struct checkpoint *c, int file)
{
    struct file *f = &c->files[file];
    int rc = gguf_read(f->fd, f->path, f->size, &f->gguf);
    if (rc) return rc;
    TRY(gguf_llama_check(f->gguf));
    c->bytes_read += gguf_header_bytes(f->gguf);
    TRY(grow_entries(c, gguf_count(f->gguf)));
    for (int i = 0; i < gguf_count(f->gguf); i++) {
        const struct gguf_tensor *t = gguf_at(f->gguf, i);
        char name[GGUF_LLAMA_MAX_NAME];
        int heads = 0;
        struct entry e = {.type = t->type, .file = file, .offset = t->offset};
        e.info = (struct checkpoint_tensor){.stored_name = t->name,
                                            .file = f->path,
                                            .type_name = t->type_name,
                                            .readable = t->type != STORAGE_OTHER,
                                            .n_dims = t->n_dims};
        memcpy(e.info.dim, t->dim, sizeof t->dim);
        set_matrix(&e.info);
        TRY(gguf_llama_permuted_heads(f->gguf, t, &heads));
        if (heads > 0) e.permuted_head_dim = (int)(t->dim[0] / heads);
        gguf_llama_name(t->name, name);
        e.canonical = strdup(name);
        if (!e.canonical) FAIL(ERR_NOMEM, "%s: out of memory", f->path);
        c->entries[c->n_entries++] = e;
    }
    return OK;
}

static int compare_entries(const void *a, const void *b)
{
    return strcmp(((const struct entry *)a)->canonical, ((const struct entry *)b)->canonical);
}

static int sort_entries(struct checkpoint *c)
{
    qsort(c->entries, (size_t)c->n_entries, sizeof *c->entries, compare_entries);
    for (int i = 0; i < c->n_entries; i++) {
        const struct entry *e = &c->entries[i], *next = e + 1;
        c->entries[i].info.name = e->canonical;
        if (i + 1 < c->n_entries && !compare_entries(e, next))
            FAIL(ERR_FORMAT, "tensor %.200s stands twice: in %s (as %.200s) and in %s (as %.200s)", e->canonical,
                 e->info.file, e->info.stored_name, next->info.file, next->info.stored_name);
    }
    return OK;
}

static int add_file(struct checkpoint *c, const char *path)
{
    struct file f = {.fd = -1};
    if (c->n_files == MAX_FILES) FAIL(ERR_FORMAT, "%s: more than %d files", c->path, MAX_FILES);
    struct file *files = realloc(c->files, ((size_t)c->n_files + 1) * sizeof *files);
    if (!files) FAIL(ERR_NOMEM, "%s: out of memory", c->path);
    c->files = files;
    TRY(file_open_read(path, &f.fd, &f.size));
    f.path = strdup(path);
    files[c->n_files++] = f;
    if (!f.path) FAIL(ERR_NOMEM, "%s: out of memory", c->path);
    return OK;
}

/* A shard's name from the index: it must stay in the directory. */
static int check_shard_name(const cJSON *item, const char *index_path)
{
    if (!cJSON_IsString(item))
        FAIL(ERR_FORMAT, "%s: weight_map: tensor %.200s does not name a file", index_path, item->string);
    const char *name = item->valuestring;
    if (!*name || strchr(name, '/') || !strcmp(name, ".") || !strcmp(name, ".."))
        FAIL(ERR_FORMAT,
             "%s: weight_map: tensor %.200s names the file \"%.200s\"; a file of the same directory is expected",
             index_path, item->string, name);
    return OK;
}

static bool has_file(const struct checkpoint *c, const char *path)
{
    for (int i = c->n_files - 1; i >= 0; i--) { /* neighbours in the index are mostly of one file */
        if (!strcmp(c->files[i].path, path)) return true;
    }
    return false;
}

static int open_shards(struct checkpoint *c, const cJSON *weight_map, const char *index_path)
{
    const cJSON *item;
    cJSON_ArrayForEach (item, weight_map) {
        char path[MAX_PATH];
        TRY(check_shard_name(item, index_path));
        TRY(path_join(path, sizeof path, c->path, item->valuestring));
        if (has_file(c, path)) continue;
        int rc = add_file(c, path);
        if (rc) return status_prefix(rc, "%s: tensor %.200s", index_path, item->string);
    }
    for (int i = 0; i < c->n_files; i++) TRY(add_safetensors(c, i));
    return sort_entries(c);
}

static const struct entry *find(const struct checkpoint *c, const char *name)
{
    struct entry wanted = {.canonical = (char *)name};
    if (c->n_entries == 0) return NULL;
    return bsearch(&wanted, c->entries, (size_t)c->n_entries, sizeof *c->entries, compare_entries);
}

/* Every tensor of the index is in the file it names, and every tensor of the files is in the index. */
static int cross_check(const struct checkpoint *c, const cJSON *weight_map, const char *index_path)
{
    const cJSON *item;
    cJSON_ArrayForEach (item, weight_map) {
        char *name = canonical_name(item->string);
        if (!name) FAIL(ERR_NOMEM, "%s: out of memory", index_path);
        const struct entry *e = find(c, name);
        free(name);
        if (!e || strcmp(e->info.stored_name, item->string))
            FAIL(ERR_FORMAT, "%s: tensor %.200s is not in %s, as the index says, nor in another shard", index_path,
                 item->string, item->valuestring);
        const char *file = strrchr(e->info.file, '/');
        if (strcmp(file ? file + 1 : e->info.file, item->valuestring))
            FAIL(ERR_FORMAT, "%s: tensor %.200s is in %s, but the index says %s", index_path, item->string,
                 e->info.file, item->valuestring);
    }
    if (cJSON_GetArraySize(weight_map) == c->n_entries) return OK;
    for (int i = 0; i < c->n_entries; i++) {
        const struct checkpoint_tensor *t = &c->entries[i].info;
        if (!json_get(weight_map, t->stored_name))
            FAIL(ERR_FORMAT, "%s: tensor %.200s of %s is not in the index", index_path, t->stored_name, t->file);
    }
    FAIL(ERR_BUG, "%s: the index and the shards differ in number alone", index_path);
}

static int open_sharded(struct checkpoint *c, const char *index_path)
{
    cJSON *index = NULL;
    TRY(json_parse_file(index_path, MAX_INDEX, &index));
    const cJSON *weight_map = json_get(index, "weight_map");
    int rc;
    if (!cJSON_IsObject(weight_map) || !weight_map->child)
        rc = status_set(ERR_FORMAT, __FILE__, __LINE__, "%s: weight_map must be an object with tensors", index_path);
    else
        rc = open_shards(c, weight_map, index_path);
    if (!rc) rc = cross_check(c, weight_map, index_path);
    cJSON_Delete(index);
    return rc;
}

/* No safetensors: says what is there instead. */
static int refuse_directory(const char *path)
{
    char pickle[256] = "";
    DIR *dir = opendir(path);
    if (!dir) FAIL(ERR_IO, "%s: cannot open as a model directory or .gguf file: %s", path, strerror(errno));
    for (const struct dirent *d = readdir(dir); d; d = readdir(dir)) {
        const char *dot = strrchr(d->d_name, '.');
        bool is_pickle = dot && (!strcmp(dot, ".bin") || !strcmp(dot, ".pt") || !strcmp(dot, ".pth"));
        if (is_pickle && (!*pickle || strcmp(d->d_name, pickle) < 0)) snprintf(pickle, sizeof pickle, "%s", d->d_name);
    }
    closedir(dir);
    if (*pickle)
        FAIL(ERR_UNSUPPORTED,
             "%s: has only pickle files (%s), which can run code when read and are refused; convert the model to "
             "safetensors (save_pretrained does it)",
             path, pickle);
    FAIL(ERR_IO, "%s: has neither model.safetensors nor model.safetensors.index.json", path);
}

static int open_directory(struct checkpoint *c)
{
    char single[MAX_PATH], index[MAX_PATH];
    TRY(path_join(single, sizeof single, c->path, "model.safetensors"));
    TRY(path_join(index, sizeof index, c->path, "model.safetensors.index.json"));
    if (file_exists(single)) {
        TRY(add_file(c, single));
        TRY(add_safetensors(c, 0));
        return sort_entries(c);
    }
    if (file_exists(index)) return open_sharded(c, index);
    return refuse_directory(c->path);
}

static int open_gguf(struct checkpoint *c)
{
    TRY(add_file(c, c->path));
    TRY(add_gguf(c, 0));
    return sort_entries(c);
}

int checkpoint_open(const char *model_path, struct checkpoint **out)
{
    struct checkpoint *c = calloc(1, sizeof *c);
    if (!c) FAIL(ERR_NOMEM, "%s: out of memory", model_path);
    c->path = strdup(model_path);
    c->bounce = malloc(BOUNCE_BYTES);
    if (!c->path || !c->bounce) {
        checkpoint_close(c);
        FAIL(ERR_NOMEM, "%s: out of memory", model_path);
    }
    int rc = model_dims_is_gguf(model_path) ? open_gguf(c) : open_directory(c);
    if (rc) {
        checkpoint_close(c);
        return rc;
    }
    *out = c;
    return OK;
}

void checkpoint_close(struct checkpoint *c)
{
    if (!c) return;
    for (int i = 0; i < c->n_entries; i++) free(c->entries[i].canonical);
    for (int i = 0; i < c->n_files; i++) {
        safetensors_close(c->files[i].safetensors);
        gguf_close(c->files[i].gguf);
        close(c->files[i].fd);
        free(c->files[i].path);
    }
    free(c->entries);
    free(c->files);
    free(c->bounce);
    free(c->path);
    free(c);
}

/* ---- looking up ---- */

bool checkpoint_find(const struct checkpoint *c, const char *name, struct checkpoint_tensor *info)
{
    const struct entry *e = find(c, name);
    if (e && info) *info = e->info;
    return e != NULL;
}

int checkpoint_count(const struct checkpoint *c) { return c->n_entries; }
void checkpoint_at(const struct checkpoint *c, int i, struct checkpoint_tensor *info) { *info = c->entries[i].info; }
const char *checkpoint_name(const struct checkpoint *c, int i) { return c->entries[i].canonical; }
uint64_t checkpoint_bytes_read(const struct checkpoint *c) { return c->bytes_read; }

uint64_t checkpoint_file_bytes(const struct checkpoint *c)
{
    uint64_t bytes = 0;
    for (int i = 0; i < c->n_files; i++) bytes += c->files[i].size;
    return bytes;
}

static int find_readable(const struct checkpoint *c, const char *name, const struct entry **out)
{
    const struct entry *e = find(c, name);
    if (!e) FAIL(ERR_FORMAT, "%s: there is no tensor %.200s", c->path, name);
    if (e->type == STORAGE_OTHER)
        FAIL(ERR_UNSUPPORTED,
             "%s: tensor %.200s is of type %.40s; F32, F16, BF16 and, in GGUF files, Q8_0, Q4_0, Q4_1, "
             "Q5_0, Q5_1, Q4_K, Q5_K, Q6_K are read",
             e->info.file, e->info.stored_name, e->info.type_name);
    *out = e;
    return OK;
}

int checkpoint_natural_dtype(const struct checkpoint *c, const char *name, enum dtype *out)
{
    const struct entry *e = NULL;
    TRY(find_readable(c, name, &e));
    *out = dequant_natural_dtype(e->type);
    return OK;
}

/* ---- reading ---- */

static int read_bytes(struct checkpoint *c, const struct entry *e, void *out, size_t n, uint64_t offset)
{
    const struct file *f = &c->files[e->file];
    c->bytes_read += n;
    int rc = file_pread(f->fd, f->path, out, n, e->offset + offset);
    return rc ? status_prefix(rc, "tensor %.200s", e->info.stored_name) : OK;
}

/* Brings the blocks that cover elements [first, first + n) into the bounce buffer, which must be large enough;
 * *skip is where the first element stands in it. */
static int fetch(struct checkpoint *c, const struct entry *e, int64_t first, int64_t n, int64_t *skip)
{
    int64_t block = dequant_block_size(e->type), bytes = dequant_block_bytes(e->type);
    int64_t from = first / block, to = (first + n + block - 1) / block;
    *skip = first - from * block;
    return read_bytes(c, e, c->bounce, (size_t)((to - from) * bytes), (uint64_t)(from * bytes));
}

/* Elements [first, first + n) in file order to out. */
static int read_run(struct checkpoint *c, const struct entry *e, int64_t first, int64_t n, enum dtype dtype, char *out)
{
    int64_t block = dequant_block_size(e->type), size = (int64_t)dtype_size(dtype);
    int64_t most = BOUNCE_BYTES / dequant_block_bytes(e->type) * block;
    if (dequant_is_dtype(e->type, dtype)) return read_bytes(c, e, out, (size_t)(n * size), (uint64_t)(first * size));
    while (n > 0) {
        int64_t skip = 0, take = most - first % block < n ? most - first % block : n;
        TRY(fetch(c, e, first, take, &skip));
        dequant_convert(e->type, c->bounce, skip, take, dtype, out);
        first += take;
        n -= take;
        out += take * size;
    }
    return OK;
}

/* A rectangle, and where it goes. */
struct range {
    int64_t row_first, row_count, col_first, col_count;
    enum dtype dtype;
    char *out;
};

/* Where file row `row` belongs in out; NULL if it is not asked for. */
static char *out_row(const struct entry *e, const struct range *r, int64_t row)
{
    int64_t to = (e->permuted_head_dim ? gguf_llama_row(row, e->permuted_head_dim) : row) - r->row_first;
    if (to < 0 || to >= r->row_count) return NULL;
    return r->out + to * r->col_count * (int64_t)dtype_size(r->dtype);
}

/* File rows [first, end) as chunks of whole rows, from which the columns are cut. */
static int read_wide(struct checkpoint *c, const struct entry *e, const struct range *r, int64_t first, int64_t end,
                     int64_t rows_in_chunk)
{
    int64_t cols = e->info.cols;
    for (int64_t row = first; row < end; row += rows_in_chunk) {
        int64_t skip = 0, n = end - row < rows_in_chunk ? end - row : rows_in_chunk;
        TRY(fetch(c, e, row * cols, n * cols, &skip));
        for (int64_t i = 0; i < n; i++) {
            char *to = out_row(e, r, row + i);
            if (to) dequant_convert(e->type, c->bounce, skip + i * cols + r->col_first, r->col_count, r->dtype, to);
        }
    }
    return OK;
}

static int read_narrow(struct checkpoint *c, const struct entry *e, const struct range *r, int64_t first, int64_t end)
{
    for (int64_t row = first; row < end; row++) {
        char *to = out_row(e, r, row);
        if (to) TRY(read_run(c, e, row * e->info.cols + r->col_first, r->col_count, r->dtype, to));
    }
    return OK;
}

static int read_range(struct checkpoint *c, const struct entry *e, const struct range *r)
{
    int64_t cols = e->info.cols, head_dim = e->permuted_head_dim;
    int64_t first = r->row_first, end = r->row_first + r->row_count;
    if (r->col_count == cols && !head_dim) return read_run(c, e, first * cols, r->row_count * cols, r->dtype, r->out);
    if (head_dim) { /* the rows of a head are mixed: look at all rows of the heads that are touched */
        first -= first % head_dim;
        end += (head_dim - end % head_dim) % head_dim;
    }
    /* One block more than the rows themselves may be needed at either end. */
    int64_t block = dequant_block_size(e->type);
    int64_t rows_in_chunk = (BOUNCE_BYTES / dequant_block_bytes(e->type) - 2) * block / cols;
    bool wide = 9 * (cols - r->col_count) < cols;
    if (wide && rows_in_chunk > 0) return read_wide(c, e, r, first, end, rows_in_chunk);
    return read_narrow(c, e, r, first, end);
}

int checkpoint_read(struct checkpoint *c, const char *name, int64_t row_first, int64_t row_count, int64_t col_first,
                    int64_t col_count, enum dtype out_dtype, void *out)
{
    const struct entry *e = NULL;
    TRY(find_readable(c, name, &e));
    int64_t rows = e->info.rows, cols = e->info.cols;
    if (out_dtype != DTYPE_F32 && out_dtype != DTYPE_F16 && out_dtype != DTYPE_BF16)
        FAIL(ERR_ARG, "tensor %.200s cannot be read as %s", name, dtype_name(out_dtype));
    if (row_first < 0 || row_count < 0 || row_first > rows - row_count || col_first < 0 || col_count < 0 ||
        col_first > cols - col_count)
        FAIL(ERR_FORMAT,
             "%s: tensor %.200s is [%" PRId64 ", %" PRId64 "]; rows %" PRId64 " + %" PRId64 ", columns %" PRId64
             " + %" PRId64 " do not lie in it",
             e->info.file, e->info.stored_name, rows, cols, row_first, row_count, col_first, col_count);
    if (row_count == 0 || col_count == 0) return OK;
    struct range r = {row_first, row_count, col_first, col_count, out_dtype, out};
    return read_range(c, e, &r);
}
