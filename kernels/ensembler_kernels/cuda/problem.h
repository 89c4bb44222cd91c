// What every kernel is told: the members, the combination, and where its numbers per row are. Plain C layout, so that
// ctypes can fill it (ensembler_kernels/cuda/library.py mirrors it; ens_problem_size() lets it check).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HD __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")  // an array that a loop indexes stays in registers only if the loop is unrolled
#else
#define HD inline
#define UNROLL
#endif

constexpr int MAX_MEMBERS = 8;
constexpr int MAX_ALPHAS = 32;
constexpr int THREADS = 256;
constexpr int LANES = 8;  // token ids per thread: 8 values of two bytes are one 16-byte load
constexpr int TILE = THREADS * LANES;

enum Dtype : int32_t { FP32 = 0, BF16 = 1, FP16 = 2, MIXED = 3 };

struct Member {
    const void* data;
    int64_t row_stride, position_stride;  // in elements; the last dimension is contiguous
    float constant, slope;
    int32_t dtype;
    int32_t in_normaliser;
};

struct Problem {
    Member members[MAX_MEMBERS];
    int32_t num_members;
    int32_t dtype;                      // the members' dtype, or MIXED
    int32_t rows, positions;            // row r of `rows` is row r / positions, position r % positions of the tensors
    int32_t width, shared, held;        // of the anchor; ids that all members hold; ids that may be permitted
    int32_t num_alphas;
    int32_t alpha_step, row_step;       // alpha k of row r is alphas[k * alpha_step + (r / positions) * row_step]
    const float* alphas;
    const float* normalisers;           // (rows,), or null where members are not normalised
    const float* thresholds;            // (num_alphas, rows), or null without a cutoff
};

// Token ids of a row in slots of LANES, split over blocks. Slot 0 ends where the row is first aligned to 16 bytes, so
// all slots but the first and the last are whole and aligned, whatever the row's address.
HD int num_splits(int width) { return ((width + LANES - 1) / LANES + 1 + THREADS - 1) / THREADS; }

HD float alpha_of(const Problem& p, int k, int row) {
    return p.alphas[(int64_t)k * p.alpha_step + (int64_t)(row / p.positions) * p.row_step];
}
