// The C interface of both libraries: the CUDA one, whose pointers are on the current device, and the host harness. Each
// kernel is int ens_<name>(const Problem*, void* stream), which returns 0 or an error code that ens_error() explains.
// Work is queued on `stream`.
#pragma once

#include <type_traits>

#include "bodies.h"
#include "logprob.h"

// Every kernel and what its threads share.
#define FOR_EACH_KERNEL(X)    \
    X(combine, RowShared)     \
    X(sample, RowShared)      \
    X(logprob, LogprobShared) \
    X(normaliser, RowShared)  \
    X(threshold, RowShared)

extern "C" {
inline __attribute__((used)) int ens_problem_size() { return sizeof(Problem); }
inline __attribute__((used)) int ens_tile() { return TILE; }
inline __attribute__((used)) int ens_best_size() { return sizeof(Best); }
const char* ens_error(int code);
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
