/* tensor_map - the host's side of tensor copies: maps that tell the copy engine a matrix's place, shape and boxes.
 * Included by .cu files only. */
#ifndef VITRAIL_KERNELS_CUDA_TENSOR_MAP_CUH
#define VITRAIL_KERNELS_CUDA_TENSOR_MAP_CUH

#include <cudaTypedefs.h>

#include "kernels/cuda/cuda.h"

typedef PFN_cuTensorMapEncodeTiled_v12000 encode_tiled;

static inline int find_encoder(encode_tiled *encode)
{
    void *function = NULL;
    cudaDriverEntryPointQueryResult found;
    CUDA_TRY(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess || !function)
        FAIL(ERR_DEVICE, "CUDA: the driver has no cuTensorMapEncodeTiled, expected that of CUDA 12.0 or later");
    *encode = (encode_tiled)function;
    return OK;
}

/* A map of n_dims dimensions, the dense one first; stride[i]: bytes from one to the next along dimension i + 1. */
static inline int encode_map(encode_tiled encode, CUtensorMap *map, const char *name, const struct tensor *t,
                             int n_dims, const cuuint64_t *size, const cuuint64_t *stride, const cuuint32_t *box)
{
    static const cuuint32_t every[4] = {1, 1, 1, 1};
    const CUtensorMapDataType type =
        t->dtype == DTYPE_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    CUresult result =
        encode(map, type, (cuuint32_t)n_dims, t->data, size, stride, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        FAIL(ERR_DEVICE, "CUDA: cuTensorMapEncodeTiled: error %d for %s, [%lld, %lld, %lld]", (int)result, name,
             (long long)t->dim[0], (long long)t->dim[1], (long long)t->dim[2]);
    return OK;
}

#endif
