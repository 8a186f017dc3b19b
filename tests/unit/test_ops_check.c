/* The checks above every backend: what they refuse, naming op, argument, expected and found; opening, memory, scratch,
 * random weights, marks. */
#include "tests/ops_fixture.h"

static void test_open(void)
{
    struct ops o;
    CHECK_FAILS(ops_open(&o, "tpu", 0, 1), ERR_UNSUPPORTED, "which has: cpu");
    ops_close(&o);
    CHECK(ops_open(&o, "cuda", 4096, 1) != OK); /* not in the build, or no such device */
    ops_close(&o);
    CHECK_FAILS(ops_open(&o, "cpu", 3, 1), ERR_ARG, "device 3");
    ops_close(&o);
    CHECK_FAILS(ops_open(&o, "cpu", 0, 0), ERR_ARG, "0 threads");
    ops_close(&o);
    CHECK(ops_device_count("cuda") == 0 && ops_device_count("cpu") == 1 && ops_device_count("x") == 0);
    CHECK_OK(ops_open(&o, "cpu", 0, 1));
    float x[4] = {0};
    uint16_t w[4] = {0};
    CHECK_FAILS(ops_linear(&o, tensor_2d(x, DTYPE_F32, 4, 1), tensor_2d(x, DTYPE_F32, 4, 1),
                           tensor_2d(w, DTYPE_F16, 1, 1), NULL),
                ERR_BUG, "before ops_reserve");
    ops_close(&o);
    ops_close(&o);
}

static void test_memory(void)
{
    struct fixture *f = fixture_open(1, 1);
    unsigned char *memory = NULL, copy[64];
    void *huge = copy;
    CHECK_OK(ops_memory_take(&f->ops, 5000001, (void **)&memory));
    CHECK((uintptr_t)memory % 256 == 0);
    size_t nonzero = 0;
    for (size_t i = 0; i < 5000001; i++) nonzero += memory[i] != 0;
    CHECK(nonzero == 0);
    for (int i = 0; i < 64; i++) copy[i] = (unsigned char)i;
    CHECK_OK(ops_upload(&f->ops, memory, copy, 64));
    CHECK_OK(ops_copy(&f->ops, memory + 100, memory, 64));
    CHECK_OK(ops_zero(&f->ops, memory, 64));
    memset(copy, 9, sizeof copy);
    CHECK_OK(ops_mark(&f->ops, 1));
    CHECK_OK(ops_download_marked(&f->ops, copy, memory + 100, 64, 1));
    CHECK(copy[5] == 5 && memory[5] == 0);
    CHECK_OK(ops_finish(&f->ops));
    CHECK_FAILS(ops_mark(&f->ops, 2), ERR_ARG, "mark 2");
    CHECK_FAILS(ops_upload(&f->ops, NULL, copy, 1), ERR_ARG, "to is NULL");
    ops_memory_give_back(&f->ops, memory, 5000001);
    CHECK_FAILS(ops_memory_take(&f->ops, (size_t)1 << 46, &huge), ERR_NOMEM, "67108864.0 MiB of memory wanted");
    CHECK(huge == NULL);
    fixture_close(f);
}

static int count_call(void *arg)
{
    ++*(int *)arg;
    return OK;
}

static void test_steps(void)
{
    struct fixture *f = fixture_open(1, 2);
    int calls = 0;
    CHECK(ops_bucket(&f->ops, 5) == 5);
    CHECK_OK(ops_run_step(&f->ops, 5, count_call, &calls));
    CHECK_OK(ops_run_step(&f->ops, 5, count_call, &calls));
    CHECK(calls == 2);
    CHECK_FAILS(ops_run_step(&f->ops, 0, count_call, &calls), ERR_ARG, "bucket of 0");
    struct ops_limits limits = {.max_tokens = -1};
    size_t bytes;
    CHECK_FAILS(ops_reserve(&f->ops, &limits, &bytes, true), ERR_ARG, "negative");
    fixture_close(f);
}

/* Calls whose shapes exceed what was reserved are refused, never written past the scratch. */
static void test_beyond_limits(void)
{
    struct fixture *f = fixture_open(1, 3);
    struct ops_limits small = {
        .max_tokens = 8, .max_seqs = 1, .max_context = 64, .max_in_features = 32, .max_heads = 1, .head_dim = 8};
    size_t bytes;
    CHECK_OK(ops_reserve(&f->ops, &small, &bytes, false));
    CHECK(bytes < 4 << 20);
    struct sampling_state state = {.params = (struct sampling_params[]){{.top_p = 1, .repetition_penalty = 1}},
                                   .token_count = fixture_take(f, 4 * 2000000),
                                   .next_token = (int32_t[]){0},
                                   .position = (int32_t[]){0},
                                   .logprob = fixture_floats(f, 1 + MAX_LOGPROBS, 1),
                                   .logprob_token = fixture_take(f, 4 * (1 + MAX_LOGPROBS)),
                                   .vocab_size = 2000000,
                                   .n_slots = 1};
    struct tensor logits = tensor_2d(fixture_take(f, 4 * 2000000), DTYPE_F32, 1, 2000000);
    CHECK_FAILS(ops_sample(&f->ops, logits, (int32_t[]){0}, &state), ERR_NOMEM, "sampling");
    fixture_close(f);
}

static void test_shapes(void)
{
    struct fixture *f = fixture_open(1, 4);
    struct ops *o = &f->ops;
    struct tensor a = fixture_2d(f, 3, 8, 0), b = fixture_2d(f, 3, 7, 0), w = fixture_2d(f, 5, 8, 0);
    struct tensor y = fixture_2d(f, 3, 5, 0), bad = a, none = a, narrow = a, thin = a;
    float *ones = fixture_floats(f, 8, 1);
    bad.dtype = DTYPE_I32, none.data = NULL, narrow.stride[0] = 4, thin.stride[1] = 2;
    CHECK_FAILS(ops_linear(o, y, a, fixture_2d(f, 5, 7, 0), NULL), ERR_ARG,
                "ops_linear: w is float32 [5, 7], expected float32 or float16 or bfloat16 [*, 8]");
    CHECK_FAILS(ops_linear(o, b, a, w, NULL), ERR_ARG, "ops_linear: y is float32 [3, 7], expected float32 [3, 5]");
    CHECK_FAILS(ops_linear(o, y, bad, w, NULL), ERR_ARG, "ops_linear: x is int32 [3, 8], expected float32 [*, *]");
    CHECK_FAILS(ops_linear(o, y, none, w, NULL), ERR_ARG, "ops_linear: x has no data");
    CHECK_FAILS(ops_linear(o, y, narrow, w, NULL), ERR_ARG, "rows of x (float32 [3, 8]) overlap");
    CHECK_FAILS(ops_linear(o, y, thin, w, NULL), ERR_ARG, "stride 2 in dimension 1");
    CHECK_FAILS(ops_rms_norm(o, a, b, ones, 1e-5f), ERR_ARG, "ops_rms_norm: y is");
    CHECK_FAILS(ops_rms_norm(o, a, a, NULL, 1e-5f), ERR_ARG, "ops_rms_norm: w is NULL");
    CHECK_FAILS(ops_layer_norm(o, a, a, ones, NULL, 1e-5f), ERR_ARG, "ops_layer_norm: b is NULL");
    CHECK_FAILS(ops_add_rms_norm(o, a, b, a, ones, 1e-5f), ERR_ARG, "residual is float32 [3, 7]");
    CHECK_FAILS(ops_swiglu(o, y, a), ERR_ARG, "gate_up is float32 [3, 8], expected float32 [3, 10]");
    CHECK_FAILS(ops_embed(o, a, b, (int32_t[]){0, 0, 0}, 0), ERR_ARG, "table is");
    CHECK_FAILS(ops_embed(o, a, a, NULL, 0), ERR_ARG, "ids is NULL");
    CHECK_FAILS(ops_gather_rows(o, a, b, (int32_t[]){0, 0, 0}), ERR_ARG, "ops_gather_rows: x is");
    CHECK_FAILS(ops_rope(o, fixture_3d(f, 2, 2, 5, 0), NULL, NULL, 1), ERR_ARG, "heads of 5 dimensions");
    CHECK_FAILS(ops_rope(o, a, NULL, NULL, 1), ERR_ARG, "x is float32 [3, 8], expected float32 [*, *, *]");
    CHECK_FAILS(ops_unshard_columns(o, y, fixture_3d(f, 2, 3, 3, 0), (int32_t[]){3, 3}), ERR_ARG,
                "adds up to 6 columns, y has 5");
    CHECK_FAILS(ops_unshard_columns(o, y, fixture_3d(f, 2, 3, 3, 0), (int32_t[]){1, 4}), ERR_ARG, "host_count[1] is 4");
    CHECK_FAILS(ops_attention_vision(o, fixture_3d(f, 4, 1, 8, 0), fixture_3d(f, 4, 1, 8, 0), fixture_3d(f, 4, 1, 8, 0),
                                     fixture_3d(f, 4, 1, 8, 0), 3, 1),
                ERR_ARG, "multiple of 3 images");
    CHECK_FAILS(ops_image_patches(o, a, NULL, 1, 28, 14, ones, ones), ERR_ARG, "y is");
    fixture_close(f);
}

static void test_cache(void)
{
    struct fixture *f = fixture_open(1, 5);
    struct ops *o = &f->ops;
    struct kv_view kv = fixture_cache(f, 2, 4, 2, 8, 16, 8), bad = kv;
    struct attention_heads heads = {4, 2, 8, 0, 1}, odd = {5, 2, 8, 0, 1}, high = {4, 2, 8, 3, 1},
                           wide = {4, 2, 16, 0, 1};
    struct tensor q = fixture_3d(f, 2, 4, 8, 0), k = fixture_3d(f, 2, 2, 8, 0);
    int32_t slot[1] = {0}, cu[2] = {0, 2}, beyond[1] = {2}, wrong[2] = {0, 3}, n_keep[2] = {1, 2};
    struct seq_batch batch = {1, 2, slot, cu, slot, cu}, decode = {.n_seqs = 1, .n_tokens = 2, .slot = slot};
    struct attention_probe probe = {.n_rows = 2, .slot = 5, .column_sum = fixture_floats(f, 4, 1)};
    bad.pool.dim[0] = 7;
    CHECK_FAILS(ops_kv_reset(o, &bad), ERR_ARG, "kv.pool is float32 [7, 32, 8], expected float32 [8, 32, 8]");
    bad = kv, bad.error = NULL;
    CHECK_FAILS(ops_kv_release(o, &bad, 0), ERR_ARG, "ops_kv_release: kv.error is NULL");
    bad = kv, bad.page_size = 0;
    CHECK_FAILS(ops_kv_reset(o, &bad), ERR_ARG, "page_size 0");
    CHECK_FAILS(ops_kv_release(o, &kv, 2), ERR_ARG, "slot 2");
    CHECK_FAILS(ops_kv_append(o, &kv, &odd, k, k, &batch), ERR_ARG, "5 query heads over 2");
    CHECK_FAILS(ops_kv_append(o, &kv, &high, k, k, &batch), ERR_ARG, "lanes 3 .. 5");
    CHECK_FAILS(ops_kv_append(o, &kv, &wide, k, k, &batch), ERR_ARG, "heads of 16 dimensions");
    CHECK_FAILS(ops_kv_append(o, &kv, &heads, q, k, &batch), ERR_ARG, "ops_kv_append: k is float32 [2, 4, 8]");
    CHECK_FAILS(ops_kv_append(o, &kv, &heads, k, k, &decode), ERR_ARG, "expected one a sequence");
    CHECK_FAILS(ops_kv_append(o, &kv, &heads, k, k, NULL), ERR_ARG, "batch is NULL");
    batch.host_slot = beyond;
    CHECK_FAILS(ops_kv_append(o, &kv, &heads, k, k, &batch), ERR_ARG, "host_slot[0] = 2");
    batch.host_slot = slot, batch.host_cu_seqlens = wrong;
    CHECK_FAILS(ops_attention_prefill(o, q, q, k, k, &batch, &kv, &heads), ERR_ARG, "runs from 0 to 3");
    batch.host_cu_seqlens = cu;
    CHECK_FAILS(ops_attention_prefill(o, q, q, q, k, &batch, &kv, &heads), ERR_ARG, "ops_attention_prefill: k is");
    CHECK_FAILS(ops_attention_decode(o, q, q, &decode, &kv, &heads), ERR_ARG, "2 tokens for 1 sequences");
    CHECK_FAILS(ops_attention_probe(o, q, &kv, &heads, &probe), ERR_ARG, "slot is 5");
    probe.slot = 0, probe.first_position = 31;
    CHECK_FAILS(ops_attention_probe(o, q, &kv, &heads, &probe), ERR_ARG, "a lane holds 32");
    probe.first_position = 0, probe.threshold = 2;
    CHECK_FAILS(ops_attention_probe(o, q, &kv, &heads, &probe), ERR_ARG, "threshold is 2");
    CHECK_FAILS(ops_kv_pack(o, &kv, 0, 3, 2, slot, 2, n_keep), ERR_ARG, "lanes 3 .. 5");
    CHECK_FAILS(ops_kv_pack(o, &kv, 0, 0, 2, slot, 1, n_keep), ERR_ARG, "n_keep[1] is 2");
    fixture_close(f);
}

static void test_sampling(void)
{
    struct fixture *f = fixture_open(1, 6);
    struct sampling_params params[1] = {{.n_logprobs = 21}};
    int32_t word[21];
    float logprob[21];
    struct sampling_state state = {params, word, word, word, logprob, word, 8, 1, NULL, NULL};
    struct tensor logits = fixture_2d(f, 1, 7, 0);
    CHECK_FAILS(ops_sample(&f->ops, logits, word, &state), ERR_ARG,
                "logits is float32 [1, 7], expected float32 [*, 8]");
    CHECK_FAILS(ops_sampling_begin(&f->ops, &state, 1, params, NULL, 0), ERR_ARG, "slot 1");
    CHECK_FAILS(ops_sampling_begin(&f->ops, &state, 0, params, NULL, 0), ERR_ARG, "n_logprobs is 21");
    CHECK_OK(ops_sampling_force(&f->ops, &state, 0, 0, NULL, 0));
    CHECK_FAILS(ops_sampling_force(&f->ops, &state, 0, 0, word, 1), ERR_ARG, "state.forced_span is NULL");
    state.forced_span = &(struct forced_span){0, 0};
    state.forced = fixture_take(f, MAX_FORCED * sizeof *state.forced);
    CHECK_FAILS(ops_sampling_force(&f->ops, &state, 1, 0, word, 1), ERR_ARG, "slot 1");
    CHECK_FAILS(ops_sampling_force(&f->ops, &state, 0, 0, word, MAX_FORCED + 1), ERR_ARG, "257 tokens");
    CHECK_FAILS(ops_sampling_force(&f->ops, &state, 0, 0, (int32_t[]){7, 8}, 2), ERR_ARG, "token 1 is 8");
    state.position = NULL;
    CHECK_FAILS(ops_decode_inputs(&f->ops, word, word, word, 1, &state), ERR_ARG, "state.position is NULL");
    fixture_close(f);
}

/* A shard of random weights holds the numbers of the whole, and they are about normal. */
static void test_fill(void)
{
    struct fixture *f = fixture_open(2, 7);
    enum { ROWS = 50, COLS = 400 };
    struct tensor whole = fixture_2d(f, ROWS, COLS, 0), part = fixture_2d(f, 7, 31, 5);
    CHECK_OK(ops_fill_normal(&f->ops, whole, 99, 0.5f, 0, 0, COLS));
    CHECK_OK(ops_fill_normal(&f->ops, part, 99, 0.5f, 11, 60, COLS));
    for (int i = 0; i < 7; i++)
        CHECK(fixture_same(fixture_row(part, i), fixture_row(whole, 11 + i) + 60, 31 * sizeof(float)));
    double sum = 0, squares = 0;
    for (int i = 0; i < ROWS * COLS; i++) {
        double x = (double)((float *)whole.data)[i];
        sum += x, squares += x * x;
    }
    CHECK(fabs(sum / (ROWS * COLS)) < 0.02 && fabs(squares / (ROWS * COLS) - 0.25) < 0.02);
    CHECK_FAILS(ops_fill_normal(&f->ops, part, 1, 1, 0, 370, COLS), ERR_ARG, "of 400");
    fixture_close(f);
}

int main(void)
{
    return check_run("ops_check", (struct check_case[]){{"open", test_open},
                                                        {"memory and copies", test_memory},
                                                        {"steps and limits", test_steps},
                                                        {"beyond the reserved limits", test_beyond_limits},
                                                        {"shapes", test_shapes},
                                                        {"cache", test_cache},
                                                        {"sampling", test_sampling},
                                                        {"random weights", test_fill},
                                                        {0}});
}
