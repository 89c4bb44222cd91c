// Partial results, how two of them make one, and how the threads and then the blocks of an output merge theirs.
#pragma once

#include <climits>

#include "members.h"

// Sum of exp((z - largest) / T).
struct Sum {
    float largest, total;
};

// And the best score of all ids, relative to `largest`; the lowest id on a tie, and its z.
struct Best {
    Sum sum;
    float score, z;
    int32_t id;
};

HD float share_of(const Sum& a, float top, float inverse) {
    return a.largest == top ? 0.0f : (a.largest - top) * inverse;  // equal: inf - inf is undefined
}

HD void merge(Sum& a, const Sum& b, float inverse = 1.0f) {
    const float top = max_of(a.largest, b.largest);
    a.total = a.total * expf(share_of(a, top, inverse)) + b.total * expf(share_of(b, top, inverse));
    a.largest = top;
}

// The winner of two keeps its score as it is where it has the largest z, so that greedy choices are exact.
HD void merge(Best& a, const Best& b, float inverse) {
    const float top = max_of(a.sum.largest, b.sum.largest);
    const float score = b.score + share_of(b.sum, top, inverse);
    a.score += share_of(a.sum, top, inverse);
    if (score > a.score || (score == a.score && b.id < a.id)) {
        a.score = score;
        a.z = b.z;
        a.id = b.id;
    }
    merge(a.sum, b.sum, inverse);
}

// One more z into the running sum: NaN stays, a forbidden token adds nothing.
HD void add(Sum& a, float z) {
    if (z != z) {
        a.total = z;
    } else if (z > a.largest) {
        a.total = a.total * expf(a.largest - z) + 1.0f;
        a.largest = z;
    } else if (z != -infinity()) {
        a.total += z == a.largest ? 1.0f : expf(z - a.largest);
    }
}

// Join the values of all threads into values[0]; join(a, b) puts b into a.
template <class Block, class T, class Join>
HD void reduce(Block& block, T* values, Join join) {
    for (int stride = THREADS / 2; stride > 0; stride /= 2)
        block.each([&](int thread) {
            if (thread < stride) join(values[thread], values[thread + stride]);
        });
}

// Count a block that has stored its partial results; true for the last of `num`, which sees those of all others. The
// count goes back to 0 by itself. One thread calls it, after a barrier.
HD bool is_last(uint32_t* counter, uint32_t num) {
#ifdef __CUDA_ARCH__
    __threadfence();
    const bool last = atomicInc(counter, num - 1) == num - 1;
    __threadfence();
    return last;
#else
    *counter = (*counter + 1) % num;
    return *counter == 0;
#endif
}

// What another block of this launch has stored: past the L1 cache, which may hold what was there before.
template <class T>
HD T load_fresh(const T* from) {
#ifdef __CUDA_ARCH__
    uint32_t words[sizeof(T) / 4];
    UNROLL
    for (int i = 0; i < (int)(sizeof(T) / 4); ++i) words[i] = __ldcg((const uint32_t*)from + i);
    T value;
    memcpy(&value, words, sizeof value);
    return value;
#else
    return *from;
#endif
}
