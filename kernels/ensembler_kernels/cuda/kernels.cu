// The bodies as CUDA kernels, one block of THREADS threads per (row, split), and their launches.
#include <cuda_runtime.h>

#include "interface.h"

namespace {

struct GpuBlock {
    template <class Phase>
    HD void each(Phase phase) {
#ifdef __CUDA_ARCH__
        phase((int)threadIdx.x);
        __syncthreads();
#endif
    }
};

#define KERNEL __global__ __launch_bounds__(THREADS) void

template <int DTYPE>
KERNEL combine_kernel(const __grid_constant__ Problem p, float* out) {
    GpuBlock block;
    combine_body<DTYPE>(block, p, out, blockIdx.x, blockIdx.y);
}

template <int DTYPE>
KERNEL sample_kernel(const __grid_constant__ Problem p, const float* temperatures, const int64_t* seed,
                     Partial* partials) {
    __shared__ Reduction shared;
    GpuBlock block;
    sample_body<DTYPE>(block, p, temperatures, seed, partials, shared, blockIdx.x, blockIdx.y);
}

KERNEL sample_merge_kernel(const Partial* partials, int width, int64_t* tokens, float* logprobs) {
    __shared__ Reduction shared;
    GpuBlock block;
    sample_merge_body(block, partials, width, tokens, logprobs, shared, blockIdx.x);
}

template <int DTYPE>
KERNEL logprob_kernel(const __grid_constant__ Problem p, const int64_t* targets, Partial* partials, float* at_target) {
    __shared__ Tile tile;
    GpuBlock block;
    logprob_body<DTYPE>(block, p, targets, partials, at_target, tile, blockIdx.x, blockIdx.y);
}

KERNEL logprob_merge_kernel(const Partial* partials, const float* at_target, const int64_t* targets, int rows,
                            int width, float* logprobs, uint8_t* greedy) {
    __shared__ Reduction shared;
    GpuBlock block;
    logprob_merge_body(block, partials, at_target, targets, rows, width, logprobs, greedy, shared, blockIdx.x,
                       blockIdx.y);
}

template <int DTYPE>
KERNEL normaliser_kernel(const __grid_constant__ Problem p, float* out) {
    __shared__ Reduction shared;
    GpuBlock block;
    normaliser_body<DTYPE>(block, p, out, shared, blockIdx.x, blockIdx.y);
}

template <int DTYPE>
KERNEL anchor_max_kernel(const __grid_constant__ Problem p, float* out) {
    __shared__ Tile tile;
    GpuBlock block;
    anchor_max_body<DTYPE>(block, p, out, tile, blockIdx.x, blockIdx.y);
}

dim3 grid(const Problem& p) { return dim3(p.rows, num_splits(p.width)); }

}  // namespace

extern "C" {

int ens_problem_size() { return sizeof(Problem); }
int ens_partial_size() { return sizeof(Partial); }
int ens_num_splits(int width) { return num_splits(width); }
const char* ens_error(int code) { return cudaGetErrorString((cudaError_t)code); }

int ens_combine(const Problem* p, float* out, void* stream) {
    by_dtype(*p, [&](auto dtype) {
        combine_kernel<dtype><<<grid(*p), THREADS, 0, (cudaStream_t)stream>>>(*p, out);
    });
    return cudaGetLastError();
}

int ens_sample(const Problem* p, const float* temperatures, const int64_t* seed, Partial* partials, int64_t* tokens,
               float* logprobs, void* stream) {
    by_dtype(*p, [&](auto dtype) {
        sample_kernel<dtype><<<grid(*p), THREADS, 0, (cudaStream_t)stream>>>(*p, temperatures, seed, partials);
    });
    sample_merge_kernel<<<p->rows, THREADS, 0, (cudaStream_t)stream>>>(partials, p->width, tokens, logprobs);
    return cudaGetLastError();
}

int ens_logprob(const Problem* p, const int64_t* targets, Partial* partials, float* at_target, float* logprobs,
                uint8_t* greedy, void* stream) {
    by_dtype(*p, [&](auto dtype) {
        logprob_kernel<dtype><<<grid(*p), THREADS, 0, (cudaStream_t)stream>>>(*p, targets, partials, at_target);
    });
    logprob_merge_kernel<<<dim3(p->rows, p->num_alphas), THREADS, 0, (cudaStream_t)stream>>>(
        partials, at_target, targets, p->rows, p->width, logprobs, greedy);
    return cudaGetLastError();
}

int ens_normalisers(const Problem* p, float* out, void* stream) {
    by_dtype(*p, [&](auto dtype) {
        normaliser_kernel<dtype><<<grid(*p), THREADS, 0, (cudaStream_t)stream>>>(*p, out);
    });
    return cudaGetLastError();
}

int ens_anchor_max(const Problem* p, float* out, void* stream) {
    by_dtype(*p, [&](auto dtype) {
        anchor_max_kernel<dtype><<<grid(*p), THREADS, 0, (cudaStream_t)stream>>>(*p, out);
    });
    return cudaGetLastError();
}

}  // extern "C"
