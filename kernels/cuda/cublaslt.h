/* cublaslt - the functions of cuBLASLt that linear.c calls, found at run time: one program serves hosts with and
 * without the library, and starts without mapping its half gigabyte. */
#ifndef VITRAIL_KERNELS_CUDA_CUBLASLT_H
#define VITRAIL_KERNELS_CUDA_CUBLASLT_H

#include <cublasLt.h>

#include "base/status.h"

struct cublaslt {
    void *library;
    __typeof__(cublasLtCreate) *create;
    __typeof__(cublasLtDestroy) *destroy;
    __typeof__(cublasLtGetStatusString) *status_string;
    __typeof__(cublasLtMatmulDescCreate) *matmul_create;
    __typeof__(cublasLtMatmulDescDestroy) *matmul_destroy;
    __typeof__(cublasLtMatmulDescSetAttribute) *matmul_set;
    __typeof__(cublasLtMatrixLayoutCreate) *layout_create;
    __typeof__(cublasLtMatrixLayoutDestroy) *layout_destroy;
    __typeof__(cublasLtMatmulPreferenceCreate) *preference_create;
    __typeof__(cublasLtMatmulPreferenceDestroy) *preference_destroy;
    __typeof__(cublasLtMatmulPreferenceSetAttribute) *preference_set;
    __typeof__(cublasLtMatmulAlgoGetHeuristic) *heuristic;
    __typeof__(cublasLtMatmul) *matmul;
};

/* cublaslt_load - opens the library; ERR_DEVICE saying what is missing. cublaslt_unload accepts a failed one. */
int cublaslt_load(struct cublaslt *lt) MUST_CHECK;
void cublaslt_unload(struct cublaslt *lt);

#endif
