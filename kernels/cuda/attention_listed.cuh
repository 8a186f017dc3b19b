/* attention_listed - what the kernels of decode attention over listed entries share: the list of a block and how it is
 * cut, the way through its pieces, the launch. Included by their .cu files only. */
#ifndef VITRAIL_KERNELS_CUDA_ATTENTION_LISTED_CUH
#define VITRAIL_KERNELS_CUDA_ATTENTION_LISTED_CUH

#include "kernels/cuda/attention_decode.cuh"

enum {
    STEP = WARPS * TILE, /* entries that a block takes at once */
    WAVES = 4            /* of blocks that a launch is to have */
};

struct listed_arguments {
    struct decode_arguments decode;
    const int32_t *entry, *count;
    int stride, list_piece, lane_piece, most_pieces;
    int lane_lists;               /* lists of a lane: 1, or one for each of its query heads */
    const int32_t *host_page_row; /* of negative entries' lanes, whose pages lie in host memory */
    int64_t host_offset;          /* of that memory from the pool, bytes: one address space has both */
    int host_max_pages;
    int64_t recent_offset; /* the same of recent tokens' places */
    int recent_first_lane, recent_lanes, recent_pages;
};

/* A piece in the terms of attention_decode.cuh, and its list (NULL: the lane from its first entry on). */
struct listed_item {
    struct decode_item item;
    const int32_t *entry;
    int recent_page; /* the lane's first one */
};

/* Entries of the block's list and how they are cut; 0 pieces: nothing to attend to. */
__device__ static int find_list(const struct listed_arguments &a, struct listed_item *listed, int *length)
{
    const struct decode_arguments &d = a.decode;
    struct decode_item *item = &listed->item;
    item->head = (int)blockIdx.y, item->row = (int)blockIdx.z;
    const int64_t list = (int64_t)item->row * d.n_kv_heads + item->head;
    const int slot = d.slot[item->row], count = a.count[list];
    *length = 0;
    if (slot < 0 || slot >= d.kv.n_slots) return 0;
    const int lane = d.lane + item->head / a.lane_lists;
    item->lane = cache_lane(d.kv, slot, lane);
    listed->entry = count < 0 ? NULL : a.entry + list * a.stride;
    listed->recent_page = (slot * a.recent_lanes + lane - a.recent_first_lane) * a.recent_pages;
    *length = count < 0 ? d.kv.lane_len[item->lane] : count < a.stride ? count : a.stride;
    const int piece = count < 0 ? a.lane_piece : a.list_piece;
    const int n = (*length + piece - 1) / piece, most = n < a.most_pieces ? n : a.most_pieces;
    if (most <= 0) return 0;
    const int tokens = piece_tokens(*length, most);
    return (*length + tokens - 1) / tokens;
}

/* The block's pieces: gather(g, listed) takes a piece's entries in. Whole block. */
template <typename T, int HALVES, int PRODUCTS, typename F>
__device__ static __forceinline__ void attend_lists(const struct listed_arguments &a, struct block_part *part, F gather)
{
    const struct decode_arguments &d = a.decode;
    struct listed_item listed;
    int length;
    struct decode_item *item = &listed.item;
    item->n_splits = find_list(a, &listed, &length);
    const int width = d.group * d.kv.head_dim, n_splits = item->n_splits;
    if (n_splits == 0 && blockIdx.x == 0)
        for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x)
            ((T *)d.out)[item->row * d.out_stride + (int64_t)item->head * width + i] = from_float<T>(0.0f);
    if ((int)blockIdx.x >= n_splits) return;
    const int tokens = piece_tokens(length, n_splits);
    for (int split = (int)blockIdx.x; split < n_splits; split += (int)gridDim.x) {
        struct gathered<HALVES, PRODUCTS> g;
        item->split = split, item->at = item->row * a.most_pieces + split;
        item->first = split * tokens;
        item->end = length - item->first < tokens ? length : item->first + tokens;
        begin_gathering<HALVES, PRODUCTS>(&g);
        gather(&g, listed);
        finish_item<T, HALVES, PRODUCTS>(d, part, &g, *item, [] {});
    }
}

/* halves: of 64 dimensions, as the kernel has them. */
static inline int launch_lists(struct ops *o, void (*kernel)(struct listed_arguments), const struct listed_arguments &a,
                               int halves)
{
    const struct decode_arguments &d = a.decode;
    const size_t shared = block_part_bytes(halves, d.group);
    const int pieces = (a.stride + a.list_piece - 1) / a.list_piece, lanes = d.n_seqs * d.n_kv_heads;
    const int wanted = (WAVES * 3 * cuda__of(o)->n_multiprocessors + lanes - 1) / lanes;
    if (shared > 48 << 10)
        CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    return cuda__launch(o, "attention_decode_listed", kernel,
                        dim3((unsigned)(pieces < wanted ? pieces : wanted), (unsigned)d.n_kv_heads, (unsigned)d.n_seqs),
                        dim3(WARPS * 32), shared, a);
}

/* Lists over lanes of an 8-bit format. attention_listed_codes.cu: of their entries alone; attention_listed_mixed.cu: of
 * entries in host memory and at recent places too, which are plain. */
int cuda__listed_codes(struct ops *o, enum dtype dtype, const struct listed_arguments &a) MUST_CHECK;
int cuda__listed_mixed(struct ops *o, enum dtype dtype, const struct listed_arguments &a) MUST_CHECK;

#endif
