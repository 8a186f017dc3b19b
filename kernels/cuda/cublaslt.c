#include "kernels/cuda/cublaslt.h"

#include <cuda_runtime_api.h>

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

static int find(struct cublaslt *lt, const char *name, void *function)
{
    void *symbol = dlsym(lt->library, name);
    if (!symbol)
        FAIL(ERR_DEVICE, "the cuBLASLt library lacks %s: install the one of CUDA %d", name, CUDART_VERSION / 1000);
    memcpy(function, &symbol, sizeof symbol); /* ISO C has no cast from data to function pointers */
    return OK;
}

int cublaslt_load(struct cublaslt *lt)
{
    char name[32];
    memset(lt, 0, sizeof *lt);
    snprintf(name, sizeof name, "libcublasLt.so.%d", CUBLAS_VER_MAJOR);
    lt->library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!lt->library) FAIL(ERR_DEVICE, "cannot open %s, which matrix products on the GPU need: %s", name, dlerror());
    TRY(find(lt, "cublasLtCreate", &lt->create));
    TRY(find(lt, "cublasLtDestroy", &lt->destroy));
    TRY(find(lt, "cublasLtGetStatusString", &lt->status_string));
    TRY(find(lt, "cublasLtMatmulDescCreate", &lt->matmul_create));
    TRY(find(lt, "cublasLtMatmulDescDestroy", &lt->matmul_destroy));
    TRY(find(lt, "cublasLtMatmulDescSetAttribute", &lt->matmul_set));
    TRY(find(lt, "cublasLtMatrixLayoutCreate", &lt->layout_create));
    TRY(find(lt, "cublasLtMatrixLayoutDestroy", &lt->layout_destroy));
    TRY(find(lt, "cublasLtMatmulPreferenceCreate", &lt->preference_create));
    TRY(find(lt, "cublasLtMatmulPreferenceDestroy", &lt->preference_destroy));
    TRY(find(lt, "cublasLtMatmulPreferenceSetAttribute", &lt->preference_set));
    TRY(find(lt, "cublasLtMatmulAlgoGetHeuristic", &lt->heuristic));
    return find(lt, "cublasLtMatmul", &lt->matmul);
}

void cublaslt_unload(struct cublaslt *lt)
{
    if (lt->library) dlclose(lt->library);
    memset(lt, 0, sizeof *lt);
}
