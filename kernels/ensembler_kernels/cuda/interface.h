// The C interface of both libraries: the CUDA one, whose pointers are on the current device, and the host harness.
// Every function returns 0, or an error code that ens_error() explains. Work is queued on `stream`.
#pragma once

#include <type_traits>

#include "bodies.h"

extern "C" {
int ens_problem_size();
int ens_partial_size();
int ens_num_splits(int width);
const char* ens_error(int code);

int ens_combine(const Problem* problem, float* out, void* stream);
int ens_sample(const Problem* problem, const float* temperatures, const int64_t* seed, Partial* partials,
               int64_t* tokens, float* logprobs, void* stream);
int ens_logprob(const Problem* problem, const int64_t* targets, Partial* partials, float* at_target, float* logprobs,
                uint8_t* greedy, void* stream);
int ens_normalisers(const Problem* problem, float* out, void* stream);
int ens_anchor_max(const Problem* problem, float* out, void* stream);
}

// Call f with the dtype as a compile-time constant.
template <class F>
void by_dtype(const Problem& p, F f) {
    switch (p.dtype) {
        case FP32: return f(std::integral_constant<int, FP32>{});
        case BF16: return f(std::integral_constant<int, BF16>{});
        case FP16: return f(std::integral_constant<int, FP16>{});
        default: return f(std::integral_constant<int, MIXED>{});
    }
}
