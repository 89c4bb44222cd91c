// What every kernel is told: the members, the weights, and where results go. Plain C layout, so that ctypes can fill
// it (ensembler_kernels/cuda/library.py mirrors it; ens_problem_size() lets it check).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HD __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")  // an array that a loop indexes stays in registers only if the loop is unrolled
#define UNROLL_TO(n) UNROLL_PRAGMA(unroll n)
#define UNROLL_PRAGMA(x) _Pragma(#x)
#else
#define UNROLL_TO(n)
#define HD inline
#define UNROLL
#endif

constexpr int MAX_MEMBERS = 8;
constexpr int MAX_POINTS = 32;  // of a run
constexpr int MAX_RUNS = 32;    // of a launch
constexpr int THREADS = 128;    // 1024 ids per tile: one row of a usual vocabulary has a tile for every multiprocessor
constexpr int LANES = 8;        // token ids per thread: 8 values of two bytes are one 16-byte load
constexpr int TILE = THREADS * LANES;

enum Dtype : int32_t { FP32 = 0, BF16 = 1, FP16 = 2, MIXED = 3 };

struct Member {
    const void* data;
    int64_t row_stride, position_stride;  // in elements; the last dimension is contiguous
    int32_t limit;                        // ids that are read
    int32_t dtype;
};

// Points first .. first + count - 1 of the table: one rule, whose alphas are equally far apart if `is_even`.
struct Run {
    int32_t first, count, is_even;
};

struct Problem {
    Member members[MAX_MEMBERS];
    Run runs[MAX_RUNS];
    int32_t num_members;
    int32_t dtype;                     // the members' dtype, or MIXED
    int32_t outputs, splits, layers;   // the grid: a block for each of them; layers are points or runs, else 1
    int32_t num_rows, positions;       // row r of `num_rows` is row r / positions, position r % positions of members
    int32_t width, shared, held;       // ids of the result; ids that all members hold; ids that may be permitted
    int32_t raw;                       // bit i: member i is a score and not normalised
    int32_t table_stride, point_stride, temperature_stride;  // of an output, a point and an output
    const float* table;                // (outputs or points, 2 * num_members + 2): constants, slopes, alpha, cut-off
    const int32_t* rows;               // (outputs,): the row that each reads, or null: its own
    const float* log_sums;             // (num_rows, num_members): log-sum-exps, or null: nothing is normalised
    const float* thresholds;           // (layers, outputs): first sums below it are cut, or null
    const float* temperature;          // null: greedy
    const int64_t* noise;              // (outputs, 4): seed, prompt, sample, position
    const int64_t* targets;            // (outputs,)
    void* partials;                    // partial results, one per output and split
    uint32_t* beaten;                  // (layers, outputs, splits): bit k: an id beats the target at point k of the run
    uint32_t* counters;                // (layers, outputs): blocks that have finished; 0 before and after a launch
    float* out;                        // (outputs, width), or the pre-passes' results for each split
    int64_t* tokens;                   // (outputs,)
    float* logprobs;                   // (outputs,) or (points, outputs)
    uint8_t* greedy;                   // (points, outputs)
    float* totals;                     // (points, outputs): log-sum-exp of the result, or null
};
