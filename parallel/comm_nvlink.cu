/* comm_nvlink - see comm_nvlink.h. The host's side: windows, which kernel for which size, launches. */
#include <cuda_runtime.h>
#include <stdlib.h>
#include <string.h>

#include "parallel/comm_nvlink_kernels.cuh"

struct nvlink {
    struct peers peers;
    uint32_t *stop;
    size_t bytes;
    int device;
    int n_multiprocessors;
    bool early; /* kernels may be launched before their predecessor ends */
};

int comm__cuda_failed(const char *what, int error)
{
    (void)cudaGetLastError(); /* else a later launch would report it */
    FAIL(ERR_DEVICE, "CUDA: %s: %s (%s)", what, cudaGetErrorString((cudaError_t)error),
         cudaGetErrorName((cudaError_t)error));
}

static int launch(bool early, const char *name, const void *kernel, unsigned grid, unsigned block, void **arguments,
                  void *stream)
{
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(block);
    config.stream = (cudaStream_t)stream;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    cudaError_t error = cudaLaunchKernelExC(&config, kernel, arguments);
    return error == cudaSuccess ? OK : comm__cuda_failed(name, error);
}

static int arch_of(int device, int *major)
{
    COMM_CUDA_TRY(cudaDeviceGetAttribute(major, cudaDevAttrComputeCapabilityMajor, device));
    return OK;
}

/* Kernels come for 2, up to 4 and up to 8 ranks. */
template <int KIND> static const void *lines_of(int size)
{
    if (size <= 2) return (const void *)lines_kernel<KIND, 2>;
    return size <= 4 ? (const void *)lines_kernel<KIND, 4> : (const void *)lines_kernel<KIND, 8>;
}
template <int KIND> static const void *chunks_of(int size)
{
    if (size <= 2) return (const void *)chunks_kernel<KIND, 2>;
    return size <= 4 ? (const void *)chunks_kernel<KIND, 4> : (const void *)chunks_kernel<KIND, 8>;
}
template <int KIND, int N> static const void *norm_of_pieces(int pieces)
{
    if (pieces <= 1) return (const void *)norm_kernel<KIND, N, 1>;
    return pieces <= 2 ? (const void *)norm_kernel<KIND, N, 2> : (const void *)norm_kernel<KIND, N, 4>;
}
template <int KIND> static const void *norm_of(int size, int pieces)
{
    if (size <= 2) return norm_of_pieces<KIND, 2>(pieces);
    return size <= 4 ? norm_of_pieces<KIND, 4>(pieces) : norm_of_pieces<KIND, 8>(pieces);
}

static size_t window_bytes(const struct peers *p)
{
    return (size_t)p->chunks_at + (size_t)(p->size - 1) * CHUNK_BLOCKS * CHUNK_SLOTS * (size_t)p->chunk_bytes;
}

static int take_window(struct nvlink *n, struct nvlink_card *card)
{
    cudaIpcMemHandle_t handle;
    static_assert(sizeof handle == sizeof card->handle, "a card holds one memory handle");
    COMM_CUDA_TRY(cudaSetDevice(n->device));
    int major = 0;
    TRY(arch_of(n->device, &major));
    n->early = major >= 9;
    COMM_CUDA_TRY(cudaDeviceGetAttribute(&n->n_multiprocessors, cudaDevAttrMultiProcessorCount, n->device));
    COMM_CUDA_TRY(cudaHostAlloc((void **)&n->stop, sizeof *n->stop, cudaHostAllocMapped | cudaHostAllocPortable));
    *(volatile uint32_t *)n->stop = 0;
    COMM_CUDA_TRY(cudaHostGetDevicePointer((void **)&n->peers.stop, n->stop, 0));
    COMM_CUDA_TRY(cudaMalloc((void **)&n->peers.window[n->peers.rank], n->bytes));
    COMM_CUDA_TRY(cudaMemset(n->peers.window[n->peers.rank], 0, n->bytes));
    COMM_CUDA_TRY(cudaDeviceSynchronize()); /* before a peer writes */
    COMM_CUDA_TRY(cudaIpcGetMemHandle(&handle, n->peers.window[n->peers.rank]));
    memcpy(card->handle, &handle, sizeof handle);
    COMM_CUDA_TRY(cudaDeviceGetPCIBusId(card->bus_id, sizeof card->bus_id, n->device));
    return OK;
}

int comm__nvlink_open(int rank, int size, int device, struct nvlink_card *card, struct nvlink **out)
{
    *out = NULL;
    memset(card, 0, sizeof *card);
    if (size < 2 || size > NVLINK_MAX_RANKS)
        FAIL(ERR_UNSUPPORTED, "%d ranks: peer memory is for 2 to %d", size, NVLINK_MAX_RANKS);
    struct nvlink *n = (struct nvlink *)calloc(1, sizeof *n);
    if (!n) FAIL(ERR_NOMEM, "no memory for a communicator");
    n->device = device;
    n->peers.rank = rank;
    n->peers.size = size;
    n->peers.chunk_bytes = size == 2 ? 32 << 10 : size <= 4 ? 16 << 10 : 8 << 10;
    n->peers.chunks_at = HEAD_BYTES + (int64_t)2 * (size - 1) * LINE_BLOCKS * LINE_REGION;
    n->bytes = window_bytes(&n->peers);
    *out = n;
    return take_window(n, card);
}

/* A device that this process cannot see may still be mapped: then the mapping itself tells. */
static int check_access(const struct nvlink *n, int rank, const char *bus_id)
{
    int device = -1, reachable = 0;
    if (cudaDeviceGetByPCIBusId(&device, bus_id) != cudaSuccess) {
        (void)cudaGetLastError();
        return OK;
    }
    if (device == n->device)
        FAIL(ERR_UNSUPPORTED, "rank %d uses the same device, %s; each rank needs one of its own", rank, bus_id);
    COMM_CUDA_TRY(cudaDeviceCanAccessPeer(&reachable, n->device, device));
    if (!reachable) FAIL(ERR_UNSUPPORTED, "device %d cannot reach rank %d's, %s", n->device, rank, bus_id);
    return OK;
}

int comm__nvlink_connect(struct nvlink *n, const struct nvlink_card *cards)
{
    for (int r = 0; r < n->peers.size; r++) {
        cudaIpcMemHandle_t handle;
        void *window = NULL;
        if (r == n->peers.rank) continue;
        TRY(check_access(n, r, cards[r].bus_id));
        memcpy(&handle, cards[r].handle, sizeof handle);
        COMM_CUDA_TRY(cudaIpcOpenMemHandle(&window, handle, cudaIpcMemLazyEnablePeerAccess));
        n->peers.window[r] = (char *)window;
    }
    return OK;
}

void comm__nvlink_disconnect(struct nvlink *n)
{
    if (!n) return;
    for (int r = 0; r < n->peers.size; r++) {
        if (r == n->peers.rank || !n->peers.window[r]) continue;
        (void)cudaIpcCloseMemHandle(n->peers.window[r]);
        n->peers.window[r] = NULL;
    }
}

void comm__nvlink_close(struct nvlink *n)
{
    if (!n) return;
    comm__nvlink_disconnect(n);
    if (n->peers.window[n->peers.rank]) (void)cudaFree(n->peers.window[n->peers.rank]);
    if (n->stop) (void)cudaFreeHost(n->stop);
    free(n);
}

void comm__nvlink_interrupt(struct nvlink *n)
{
    if (n && n->stop) __atomic_store_n(n->stop, 1, __ATOMIC_SEQ_CST);
}

/* Blocks of a line kernel: small ones, over many multiprocessors, as long as there are enough. */
static int line_threads(size_t vectors)
{
    int threads = 128;
    while ((size_t)threads * LINE_BLOCKS < vectors) threads *= 2;
    return threads;
}

bool comm__nvlink_takes(const struct nvlink *n, bool lines, size_t bytes)
{
    /* All blocks of a kernel must be on the device together: 1,024 threads a multiprocessor are on any. */
    size_t threads = (size_t)n->n_multiprocessors * 1024, most = (size_t)LINE_BLOCKS * LINE_VECTORS;
    if (bytes == 0 || bytes % 2) return false;
    return !lines || (bytes + 15) / 16 <= (threads < most ? threads : most);
}

static int run_lines(struct nvlink *n, const void *kernel, void *out, const void *in, size_t bytes, void *stream)
{
    size_t vectors = (bytes + 15) / 16;
    int threads = line_threads(vectors);
    int64_t size = (int64_t)bytes;
    void *arguments[] = {&n->peers, &out, &in, &size};
    return launch(n->early, "lines between ranks", kernel, (unsigned)((vectors + threads - 1) / threads),
                  (unsigned)threads, arguments, stream);
}

/* About four chunks a block, so that sending and adding overlap, within the sizes there are. */
static int run_chunks(struct nvlink *n, const void *kernel, void *out, const void *in, size_t bytes, void *stream)
{
    size_t most = (size_t)n->n_multiprocessors < CHUNK_BLOCKS ? (size_t)n->n_multiprocessors : CHUNK_BLOCKS;
    size_t chunk = bytes / (4 * most) / CHUNK_LEAST * CHUNK_LEAST;
    if (chunk < CHUNK_LEAST) chunk = CHUNK_LEAST;
    if (chunk > (size_t)n->peers.chunk_bytes) chunk = (size_t)n->peers.chunk_bytes;
    size_t blocks = (bytes + chunk - 1) / chunk;
    int64_t size = (int64_t)bytes;
    int chunk_bytes = (int)chunk;
    void *arguments[] = {&n->peers, &out, &in, &size, &chunk_bytes};
    return launch(n->early, "chunks between ranks", kernel, (unsigned)(blocks < most ? blocks : most),
                  CHUNK_THREADS + 32, arguments, stream);
}

int comm__nvlink_all_reduce(struct nvlink *n, bool lines, void *x, enum dtype dtype, size_t bytes, void *stream)
{
    const int size = n->peers.size;
    const void *kernel = NULL;
    if (dtype == DTYPE_F32) kernel = lines ? lines_of<SUM_F32>(size) : chunks_of<SUM_F32>(size);
    if (dtype == DTYPE_BF16) kernel = lines ? lines_of<SUM_BF16>(size) : chunks_of<SUM_BF16>(size);
    if (dtype == DTYPE_F16) kernel = lines ? lines_of<SUM_F16>(size) : chunks_of<SUM_F16>(size);
    if (!kernel) FAIL(ERR_BUG, "peer memory: no sum of %s", dtype_name(dtype));
    return (lines ? run_lines : run_chunks)(n, kernel, x, x, bytes, stream);
}

int comm__nvlink_all_gather(struct nvlink *n, bool lines, void *out, const void *in, size_t bytes, void *stream)
{
    const void *kernel = lines ? lines_of<GATHER>(n->peers.size) : chunks_of<GATHER>(n->peers.size);
    return (lines ? run_lines : run_chunks)(n, kernel, out, in, bytes, stream);
}

bool comm__nvlink_norm_takes(const struct nvlink *n, int64_t rows, int64_t width, enum dtype dtype)
{
    return (dtype == DTYPE_BF16 || dtype == DTYPE_F16) && rows <= LINE_BLOCKS && width % 8 == 0 &&
           width / 8 <= LINE_VECTORS && rows <= n->n_multiprocessors;
}

int comm__nvlink_add_norm(struct nvlink *n, const void *x, void *residual, const float *weight, float epsilon,
                          void *out, int64_t rows, int64_t width, enum dtype dtype, void *stream)
{
    if (((uint64_t)x | (uint64_t)residual | (uint64_t)weight | (uint64_t)out) % 16)
        FAIL(ERR_BUG, "all-reduce with norm: an argument is not 16-byte aligned");
    int columns = (int)width, pieces = (columns / 8 + NORM_THREADS - 1) / NORM_THREADS;
    const void *kernel =
        dtype == DTYPE_BF16 ? norm_of<SUM_BF16>(n->peers.size, pieces) : norm_of<SUM_F16>(n->peers.size, pieces);
    void *arguments[] = {&n->peers, &x, &residual, &weight, &epsilon, &out, &columns};
    return launch(n->early, "all-reduce with norm", kernel, (unsigned)rows, NORM_THREADS, arguments, stream);
}

int comm__nvlink_scale(float *x, size_t n, float factor, void *stream)
{
    int device = 0, major = 0;
    int64_t count = (int64_t)n;
    COMM_CUDA_TRY(cudaGetDevice(&device));
    TRY(arch_of(device, &major));
    void *arguments[] = {&x, &count, &factor};
    size_t blocks = (n + 255) / 256;
    return launch(major >= 9, "scale", (const void *)scale_kernel, (unsigned)(blocks < 1024 ? blocks : 1024), 256,
                  arguments, stream);
}

/* An argument, so that the compiler does not see where it points. */
__global__ static void break_kernel(int *nowhere) { *nowhere = 1; }

int comm__nvlink_break(void *stream)
{
    int *nowhere = NULL;
    void *arguments[] = {&nowhere};
    return launch(false, "break", (const void *)break_kernel, 1, 1, arguments, stream);
}
