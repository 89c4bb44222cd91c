// Partial results of a row and how two of them make one.
#pragma once

#include <climits>

#include "members.h"

// Largest z, sum of exp(z - largest); the best score of all ids, the lowest id on a tie, and its z.
struct Partial {
    float largest, total, score, z;
    int32_t id;
};

HD Partial nothing() { return {-infinity(), 0.0f, -infinity(), -infinity(), INT_MAX}; }

HD void take_better(Partial& a, float score, float z, int id) {
    if (score > a.score || (score == a.score && id < a.id)) {
        a.score = score;
        a.z = z;
        a.id = id;
    }
}

// One more z into the running sum: NaN stays, a forbidden token adds nothing.
HD void add(Partial& a, float z) {
    if (z != z) {
        a.total = z;
    } else if (z > a.largest) {
        a.total = a.total * expf(a.largest - z) + 1.0f;
        a.largest = z;
    } else if (z != -infinity()) {
        a.total += z == a.largest ? 1.0f : expf(z - a.largest);
    }
}

HD void merge(Partial& a, const Partial& b) {
    const float top = a.largest > b.largest ? a.largest : b.largest;
    const float a_share = a.largest == top ? 1.0f : expf(a.largest - top);  // equal: inf - inf has no exponential
    const float b_share = b.largest == top ? 1.0f : expf(b.largest - top);
    a.total = a.total * a_share + b.total * b_share;
    a.largest = top;
    take_better(a, b.score, b.z, b.id);
}

// log of the softmax at z: (z - largest) - log total keeps what z - (largest + log total) would round away.
HD float log_softmax(float z, const Partial& a) { return (z - a.largest) - logf(a.total); }

// Merge the partials of all threads that are equal modulo `groups`, a power of two, into those below `groups`.
template <class Block>
HD void reduce(Block& block, Partial* partials, int groups) {
    for (int stride = THREADS / 2; stride >= groups; stride /= 2)
        block.each([&](int thread) {
            if (thread < stride) merge(partials[thread], partials[thread + stride]);
        });
}
