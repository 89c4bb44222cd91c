// The bodies as CUDA kernels, one block of THREADS threads per (output, split, layer), and their launches.
#include <cuda_runtime.h>

#include "interface.h"

namespace {

struct GpuBlock {
    // A thread's own value, which it keeps from phase to phase.
    template <class T>
    struct PerThread {
        T value;
        HD T& operator[](int) { return value; }
    };

    template <class Phase>
    HD void each(Phase phase) {
#ifdef __CUDA_ARCH__
        phase((int)threadIdx.x);
        __syncthreads();
#endif
    }
};

// At least 6 blocks on a multiprocessor: 80 registers, the fewest with which no kernel spills.
#define KERNEL(NAME, SHARED)                                                                      \
    template <int DTYPE>                                                                          \
    __global__ __launch_bounds__(THREADS, 6) void NAME##_kernel(const __grid_constant__ Problem p) { \
        __shared__ SHARED shared;                                                                 \
        GpuBlock block;                                                                           \
        NAME##_body<DTYPE>(block, p, shared, blockIdx.x, blockIdx.y, blockIdx.z);                 \
    }

FOR_EACH_KERNEL(KERNEL)

}  // namespace

#define LAUNCH(NAME, SHARED)                                                                               \
    int ens_##NAME(const Problem* p, void* stream) {                                                       \
        by_dtype(*p, [&](auto dtype) {                                                                     \
            const dim3 grid(p->outputs, p->splits, p->layers);                                             \
            NAME##_kernel<dtype><<<grid, THREADS, 0, (cudaStream_t)stream>>>(*p);                          \
        });                                                                                                \
        return cudaGetLastError();                                                                         \
    }

extern "C" {
const char* ens_error(int code) { return cudaGetErrorString((cudaError_t)code); }
FOR_EACH_KERNEL(LAUNCH)
}
