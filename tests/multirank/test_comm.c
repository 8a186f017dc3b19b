/* test_comm [KIND] - the communicator under mpirun on 1 to 4 ranks (alone: "self"; KIND: as for comm_open): sums in
 * rank order, bit for bit the same everywhere, gathers, broadcasts, agreement, and what an idle rank costs.
 *
 * Every rank runs every check; none leaves between two collectives. main ends in an agreement over all counts. */
#include <sys/resource.h>
#include <time.h>

#include "parallel/comm.h"
#include "tests/check.h"

enum { LARGEST = 1 << 20, MAX_SIZE = 8 };

/* One process is one rank: the tests share its communicator. */
static struct comm *comm;

/* sample - element i of rank r: sizes apart by 2^40, so that another order of summation gives other bits. */
static float sample(int rank, int64_t i)
{
    uint32_t x = (uint32_t)(i * 2654435761u) ^ (uint32_t)(rank * 40503u + 77u);
    x ^= x >> 13;
    x *= 0x5bd1e995u;
    x ^= x >> 15;
    return ldexpf((float)(int32_t)x, (int)(x % 41) - 40);
}

static uint32_t bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static const int64_t counts[] = {1,    2,     3,     5,     7,     64,     257,         1000,
                                 4096, 16383, 16384, 16385, 40001, 262147, LARGEST - 1, LARGEST};
enum { N_COUNTS = sizeof counts / sizeof *counts };

static void test_all_reduce_f32(void)
{
    float *x = malloc(LARGEST * sizeof *x);
    CHECK_OK(comm_reserve(comm, LARGEST * sizeof *x));
    for (int k = 0; k < N_COUNTS; k++) {
        int64_t wrong = 0;
        for (int64_t i = 0; i < counts[k]; i++) x[i] = sample(comm->rank, i);
        CHECK_OK(comm_all_reduce_sum(comm, tensor_1d(x, DTYPE_F32, counts[k]), NULL));
        for (int64_t i = 0; i < counts[k]; i++) {
            float want = sample(0, i);
            for (int r = 1; r < comm->size; r++) want += sample(r, i);
            wrong += bits(want) != bits(x[i]);
        }
        CHECK(wrong == 0);
    }
    free(x);
}

static void test_all_reduce_i64(void)
{
    int64_t *x = malloc(LARGEST * sizeof *x);
    CHECK_OK(comm_reserve(comm, LARGEST * sizeof *x));
    for (int k = 0; k < N_COUNTS; k++) {
        int64_t wrong = 0;
        for (int64_t i = 0; i < counts[k]; i++) x[i] = (i - 5) * (INT64_C(1) << 33) + comm->rank;
        CHECK_OK(comm_all_reduce_sum(comm, tensor_2d(x, DTYPE_I64, 1, counts[k]), NULL));
        for (int64_t i = 0; i < counts[k]; i++)
            wrong += x[i] != comm->size * (i - 5) * (INT64_C(1) << 33) + comm->size * (comm->size - 1) / 2;
        CHECK(wrong == 0);
    }
    CHECK_OK(comm_all_reduce_sum(comm, tensor_1d(x, DTYPE_I64, 0), NULL));
    free(x);
}

/* Longer than one piece: what is left over goes by the small path. */
static void test_all_reduce_in_pieces(void)
{
    int64_t n = (4 << 20) / 4 * 2 + 3, wrong = 0, ranks = comm->size * (comm->size - 1) / 2;
    float *x = malloc((size_t)n * sizeof *x);
    CHECK_OK(comm_reserve(comm, (size_t)n * sizeof *x));
    for (int64_t i = 0; i < n; i++) x[i] = (float)(i % 1000 + comm->rank);
    CHECK_OK(comm_all_reduce_sum(comm, tensor_1d(x, DTYPE_F32, n), NULL));
    for (int64_t i = 0; i < n; i++) wrong += x[i] != (float)(i % 1000 * comm->size + ranks);
    CHECK(wrong == 0);
    free(x);
}

static void test_all_gather(void)
{
    static const int64_t rows[] = {0, 1, 3, 577};
    enum { WIDTH = 129 };
    float *out = malloc(MAX_SIZE * 577 * WIDTH * sizeof *out), *in = malloc(577 * WIDTH * sizeof *in);
    for (int k = 0; k < 8; k++) {
        int64_t n = rows[k % 4], wrong = 0, part = n * WIDTH;
        bool in_place = k >= 4;
        float *from = in_place ? out + comm->rank * part : in;
        for (int64_t i = 0; i < part; i++) from[i] = sample(comm->rank, i);
        CHECK_OK(comm_all_gather(comm, tensor_2d(out, DTYPE_F32, comm->size * n, WIDTH),
                                 tensor_2d(from, DTYPE_F32, n, WIDTH), NULL));
        for (int64_t i = 0; i < comm->size * part; i++) wrong += out[i] != sample((int)(i / part), i % part);
        CHECK(wrong == 0);
    }
    free(out);
    free(in);
}

static void test_broadcast(void)
{
    static const size_t sizes[] = {1, 9, 4096, 100001, (16 << 20) + 13, 40 << 20};
    unsigned char *buf = malloc(40 << 20);
    for (int k = 0; k < 6; k++)
        for (int root = 0; root < comm->size; root++) {
            size_t wrong = 0;
            if (sizes[k] > 1 << 20 && root > 0 && root < comm->size - 1) continue;
            for (size_t i = 0; i < sizes[k]; i++)
                buf[i] = comm->rank == root ? (unsigned char)(i * 7 + (size_t)root) : 0;
            if (k % 2)
                CHECK_OK(comm_broadcast(comm, buf, sizes[k], root));
            else
                CHECK_OK(comm_broadcast_idle(comm, buf, sizes[k], root));
            for (size_t i = 0; i < sizes[k]; i++) wrong += buf[i] != (unsigned char)(i * 7 + (size_t)root);
            CHECK(wrong == 0);
        }
    CHECK_OK(comm_broadcast(comm, NULL, 0, 0));
    free(buf);
}

static void test_gather_host(void)
{
    struct record {
        int rank;
        double value;
    } mine = {comm->rank, 1.5 * comm->rank}, all[MAX_SIZE];
    for (int root = 0; root < comm->size; root++) {
        memset(all, 0xff, sizeof all);
        CHECK_OK(comm_gather(comm, comm->rank == root ? all : NULL, &mine, sizeof mine, root));
        for (int r = 0; comm->rank == root && r < comm->size; r++) CHECK(all[r].rank == r && all[r].value == 1.5 * r);
    }
    memset(all, 0xff, sizeof all);
    CHECK_OK(comm_all_gather_host(comm, all, &mine, sizeof mine));
    for (int r = 0; r < comm->size; r++) CHECK(all[r].rank == r && all[r].value == 1.5 * r);
    CHECK_OK(comm_barrier(comm));
}

/* agree_with - every rank of the mask fails, each with a code and text of its own. */
static void agree_with(unsigned failing)
{
    char want[64];
    int lowest = 0, rc = OK;
    bool own = failing >> comm->rank & 1;
    while (!(failing >> lowest & 1)) lowest++;
    if (own) rc = status_set(ERR_CONFIG - comm->rank, __FILE__, __LINE__, "shard %d is missing", comm->rank);
    if (comm->size > 1)
        snprintf(want, sizeof want, "rank %d: shard %d is missing", lowest, lowest);
    else
        snprintf(want, sizeof want, "shard %d is missing", lowest);
    CHECK_FAILS(comm_agree(comm, rc, "load"), ERR_CONFIG - lowest, want);
    CHECK(!strcmp(status_message(), want));
}

static void test_agree(void)
{
    CHECK_OK(comm_agree(comm, OK, "config"));
    for (unsigned failing = 1; failing < 1u << comm->size; failing++) agree_with(failing);
    /* An agreement on an error breaks nothing. */
    CHECK_OK(comm_agree(comm, OK, "config"));
}

static void test_same(void)
{
    CHECK_OK(comm_same(comm, "the config", UINT64_C(0x123456789abcdef0)));
    for (int odd = 1; odd < comm->size; odd++) {
        char ranks[32];
        snprintf(ranks, sizeof ranks, "differs from rank %d;", odd);
        CHECK_FAILS(comm_same(comm, "the model", comm->rank == odd ? 2 : 1), ERR_PEER, ranks);
        CHECK(strstr(status_message(), "the model is not the same") != NULL);
    }
    if (comm->size > 2) CHECK_FAILS(comm_same(comm, "x", (uint64_t)comm->rank), ERR_PEER, "differs from rank 1, 2");
}

static double cpu_seconds(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + 1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

static void nap(double seconds)
{
    struct timespec t = {.tv_sec = (time_t)seconds, .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&t, NULL);
}

/* The share of a core that a wait takes, the most of all ranks. */
static double idle_share(void)
{
    const double seconds = 2;
    char token = 1;
    double most = 0, shares[64];
    CHECK_OK(comm_barrier(comm));
    double before = cpu_seconds();
    if (comm->rank == 0) nap(seconds);
    CHECK_OK(comm_broadcast_idle(comm, &token, 1, 0));
    double share = (cpu_seconds() - before) / seconds;
    CHECK_OK(comm_all_gather_host(comm, shares, &share, sizeof share));
    for (int r = 0; r < comm->size; r++) most = shares[r] > most ? shares[r] : most;
    return most;
}

/* A nap costs more where other programs keep taking the caches: the best of a few windows counts. */
static void test_idle_cost(void)
{
    double share = 1;
    for (int i = 0; i < 5 && share >= 0.02; i++) share = idle_share();
    if (share >= 0.02) fprintf(stderr, "idle ranks used %.1f%% of a core\n", 100 * share);
    CHECK(share < 0.02);
}

/* A message arriving between steps is taken up within the longest nap, not later. */
static void test_idle_wakes(void)
{
    for (int i = 0; i < 20; i++) {
        double sent = 0;
        struct timespec t;
        if (comm->rank == 0) nap(0.02);
        clock_gettime(CLOCK_MONOTONIC, &t);
        if (comm->rank == 0) sent = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
        CHECK_OK(comm_broadcast_idle(comm, &sent, sizeof sent, 0));
        clock_gettime(CLOCK_MONOTONIC, &t);
        CHECK((double)t.tv_sec + 1e-9 * (double)t.tv_nsec - sent < 0.5);
    }
}

static void test_calls_are_counted(void)
{
    static _Atomic uint64_t calls;
    static const _Atomic int no_signal;
    char token = 0;
    comm_watch(comm, &calls, &no_signal);
    CHECK_OK(comm_broadcast(comm, &token, 1, 0));
    CHECK_OK(comm_barrier(comm));
    CHECK(atomic_load(&calls) == 2);
}

/* A device communicator that is asked how it is. */
static int n_asked;

static int count_polls(struct comm *c)
{
    (void)c;
    n_asked++;
    return OK;
}

/* Who waits for a message, between steps or within one, keeps asking its own device: some twenty times a second. */
static void test_device_is_asked(void)
{
    static const struct comm_vt vt = {.poll = count_polls};
    struct comm device = {.vt = &vt, .rank = comm->rank, .size = comm->size, .control = comm};
    char token = 0;
    comm->device = &device;
    for (int idle = 0; idle < 2; idle++) {
        n_asked = 0;
        CHECK_OK(comm_barrier(comm));
        if (comm->rank == 0) nap(0.6);
        CHECK_OK(idle ? comm_broadcast_idle(comm, &token, 1, 0) : comm_broadcast(comm, &token, 1, 0));
        CHECK(comm->rank == 0 || (n_asked >= 4 && n_asked <= 14));
    }
    comm->device = NULL;
}

/* Last: an injected error breaks the communicator of the one rank that it happens on, and of nobody else. */
static void test_fault_injection(void)
{
    char spec[64];
    float x = 1;
    snprintf(spec, sizeof spec, "rank=%d,phase=load,call=2,action=error", comm->size - 1);
    CHECK_OK(comm_wrap_fault(&comm, spec));
    CHECK_OK(comm_all_reduce_sum(comm, tensor_1d(&x, DTYPE_F32, 1), NULL));
    test_device_is_asked();
    comm_phase(comm, "load");
    CHECK_OK(comm_barrier(comm));
    CHECK_FAILS(comm_agree(comm, OK, "load"), ERR_COMM, "injected fault at collective 2 in load");
    CHECK_OK(comm_agree(comm, OK, "load"));
}

/* A device communicator as far as faults see one. */
static int n_sums, n_broken;

static int sum_on_device(struct comm *c, struct tensor x, void *stream)
{
    (void)c, (void)x, (void)stream;
    n_sums++;
    return OK;
}

static int break_device(struct comm *c)
{
    (void)c;
    n_broken++;
    return OK;
}

/* Faults are injected into the communicator below, and count the calls of the one that stands on it. No message is
 * sent: each rank has its own. */
static void test_faults_of_a_device(void)
{
    static const struct comm_vt vt = {.all_reduce_sum = sum_on_device, .break_device = break_device};
    static const char *const specs[] = {"phase=prefill,call=3,action=error", "phase=prefill,call=3,action=sticky"};
    float x = 1;
    for (int sticky = 0; sticky < 2; sticky++) {
        struct comm *control, device;
        CHECK_OK(comm_open("self", &control));
        CHECK_OK(comm_wrap_fault(&control, specs[sticky]));
        device = *control;
        device.vt = &vt;
        device.control = control;
        device.reserved_bytes = sizeof x;
        n_sums = n_broken = 0;
        CHECK_OK(comm_all_reduce_sum(&device, tensor_1d(&x, DTYPE_F32, 1), NULL)); /* in another phase */
        comm_phase(&device, "prefill");
        for (int i = 0; i < 2; i++) CHECK_OK(comm_all_reduce_sum(&device, tensor_1d(&x, DTYPE_F32, 1), NULL));
        control->device = sticky ? &device : NULL;
        int rc = comm_all_reduce_sum(&device, tensor_1d(&x, DTYPE_F32, 1), NULL);
        CHECK(n_sums == 3 + sticky && n_broken == sticky);
        CHECK(sticky ? rc == OK : rc == ERR_COMM && strstr(status_message(), "collective 3 in prefill"));
        CHECK(sticky || (device.broken == ERR_COMM && control->broken == ERR_COMM));
        comm_close(control);
    }
}

int main(int n, char **arguments)
{
    if (n > 1 ? comm_open(arguments[1], &comm) : comm_open_auto(&comm)) {
        fprintf(stderr, "%s\n", status_message());
        return 2;
    }
    if (comm->size > MAX_SIZE) return 2;
    int rc = check_run("comm", (struct check_case[]){{"all-reduce float32: rank order, bit-equal", test_all_reduce_f32},
                                                     {"all-reduce int64", test_all_reduce_i64},
                                                     {"all-reduce in pieces", test_all_reduce_in_pieces},
                                                     {"all-gather", test_all_gather},
                                                     {"broadcast", test_broadcast},
                                                     {"gather of host bytes", test_gather_host},
                                                     {"agree", test_agree},
                                                     {"same", test_same},
                                                     {"idle costs under 2% of a core", test_idle_cost},
                                                     {"idle ranks wake", test_idle_wakes},
                                                     {"calls are counted", test_calls_are_counted},
                                                     {"faults of a device", test_faults_of_a_device},
                                                     {"who waits asks its device", test_device_is_asked},
                                                     {"fault injection", test_fault_injection},
                                                     {0}});
    int agreed = comm_agree(comm, rc ? status_set(ERR_BUG, __FILE__, __LINE__, "checks failed") : OK, "end");
    comm_close(comm);
    return agreed || rc;
}
