// Reading members: 128-bit loads where the address allows, single values at the edges of a row, and both sums.
#pragma once

#include <cmath>
#include <cstring>

#include "problem.h"

#ifdef COUNT_LOADS  // the harness tells its tests how slots were read
inline int64_t slots_by_vector = 0, slots_by_value = 0;
#define COUNT(slots) (++(slots))
#else
#define COUNT(slots)
#endif

struct alignas(16) Vector {
    uint32_t word[4];
};

HD float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// One 128-bit load of values that nobody writes while the kernel runs. Left to itself the compiler splits it up where
// the words are used one by one.
HD Vector load_vector(const void* aligned) {
#ifdef __CUDA_ARCH__
    const uint4 v = __ldg((const uint4*)aligned);
    return {{v.x, v.y, v.z, v.w}};
#else
    return *(const Vector*)aligned;
#endif
}

HD float infinity() { return as_float(0x7f800000u); }
HD float not_a_number() { return as_float(0x7fc00000u); }
HD float largest_float() { return as_float(0x7f7fffffu); }

HD float from_bf16(uint32_t bits) { return as_float(bits << 16); }

HD float from_fp16(uint32_t bits) {
    const uint32_t magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
    if ((bits & 0x7c00u) == 0x7c00u) return as_float(sign | 0x7f800000u | magnitude);
    return as_float(sign | 0x3f800000u) * (as_float(magnitude) * as_float(0x77800000u));  // exponents differ by 112
}

template <int DTYPE>
HD int element_size(const Member& m) {
    return (DTYPE == MIXED ? m.dtype : DTYPE) == FP32 ? 4 : 2;
}

template <int DTYPE>
HD const char* row_start(const Problem& p, const Member& m, int row) {
    const int64_t offset = (row / p.positions) * m.row_stride + (row % p.positions) * m.position_stride;
    return (const char*)m.data + offset * element_size<DTYPE>(m);
}

HD void unpack(const Vector& v, int dtype, float* z) {
    UNROLL
    for (int i = 0; i < 4; ++i) {
        const uint32_t low = v.word[i] & 0xffffu, high = v.word[i] >> 16;
        z[2 * i] = dtype == BF16 ? from_bf16(low) : from_fp16(low);
        z[2 * i + 1] = dtype == BF16 ? from_bf16(high) : from_fp16(high);
    }
}

HD float load_one(const char* start, int dtype, int id) {
    if (dtype == FP32) return ((const float*)start)[id];
    const uint32_t bits = ((const uint16_t*)start)[id];
    return dtype == BF16 ? from_bf16(bits) : from_fp16(bits);
}

// z[0..LANES): logits of ids first .. first + LANES - 1, `other` for those outside [0, limit), which are not read.
template <int DTYPE>
HD void load_lanes(const Problem& p, const Member& m, int row, int first, int limit, float other, float* z) {
    const int dtype = DTYPE == MIXED ? m.dtype : DTYPE;
    const char* start = row_start<DTYPE>(p, m, row);
    const char* at = start + (int64_t)first * element_size<DTYPE>(m);
    if (first >= 0 && first + LANES <= limit && ((uintptr_t)at & 15) == 0) {
        COUNT(slots_by_vector);
        if (dtype == FP32) {
            const Vector a = load_vector(at), b = load_vector(at + sizeof(Vector));
            UNROLL
            for (int i = 0; i < 4; ++i) {
                z[i] = as_float(a.word[i]);
                z[4 + i] = as_float(b.word[i]);
            }
        } else {
            unpack(load_vector(at), dtype, z);
        }
        return;
    }
    COUNT(slots_by_value);
    UNROLL
    for (int i = 0; i < LANES; ++i)
        z[i] = first + i >= 0 && first + i < limit ? load_one(start, dtype, first + i) : other;
}

// The first id of a thread's slot. The slots follow the alignment of the first two-byte member, or of the anchor where
// all are fp32; a member whose rows are aligned otherwise is read value by value.
template <int DTYPE>
HD int first_id(const Problem& p, int row, int split, int thread) {
    int leader = 0;
    if (DTYPE == MIXED)
        while (leader < p.num_members - 1 && p.members[leader].dtype == FP32) ++leader;
    const Member& m = p.members[leader];
    const int past = (int)((uintptr_t)row_start<DTYPE>(p, m, row) & 15);
    const int head = past ? (16 - past) / element_size<DTYPE>(m) : 0;
    return head - LANES + (split * THREADS + thread) * LANES;
}

// First sum, log-ratio and anchor logits of one slot, made such that combined() holds for every alpha: a NaN that a
// member gave is in `base`; `ratio` is 0 where it is undefined and outside the shared ids.
struct Slot {
    float base[LANES], ratio[LANES], anchor[LANES];
};

template <int DTYPE>
HD void load_slot(const Problem& p, int row, int first, bool needs_anchor, Slot& s) {
    uint32_t given_nan = 0;
    UNROLL
    for (int i = 0; i < LANES; ++i) s.base[i] = s.ratio[i] = s.anchor[i] = 0.0f;
    if (first < p.held)
        for (int n = 0; n < p.num_members; ++n) {
            const Member& m = p.members[n];
            const bool is_anchor = n == 0 && needs_anchor, in_base = m.constant != 0.0f, in_ratio = m.slope != 0.0f;
            if (!(is_anchor || in_base || in_ratio)) continue;
            float z[LANES];
            load_lanes<DTYPE>(p, m, row, first, is_anchor || in_base ? p.held : p.shared, 0.0f, z);
            UNROLL
            for (int i = 0; i < LANES; ++i) {
                const bool shared = first + i < p.shared, is_nan = z[i] != z[i];
                if (is_anchor) s.anchor[i] = z[i];
                if (in_base) s.base[i] += z[i] * m.constant;
                if (in_ratio) s.ratio[i] += z[i] * m.slope;
                given_nan |= (uint32_t)(is_nan && (in_base || (in_ratio && shared))) << i;
            }
        }
    const float normaliser = p.normalisers ? p.normalisers[row] : 0.0f;
    UNROLL
    for (int i = 0; i < LANES; ++i) {
        const bool nan = given_nan >> i & 1;
        const float base = s.base[i], ratio = s.ratio[i] - normaliser;
        const bool forbidden = base == infinity() || base != base || first + i >= p.held;
        s.base[i] = nan ? not_a_number() : forbidden ? -infinity() : base;
        s.ratio[i] = nan || ratio != ratio || first + i >= p.shared ? 0.0f : ratio;
    }
}

// base + alpha * ratio: an undefined or infinite term counts as 0, a finite ratio that overflows as the largest float.
HD float combined(float base, float ratio, float alpha) {
    float term = alpha * ratio;
    if (term == infinity()) term = fabsf(ratio) < infinity() ? largest_float() : 0.0f;
    return base + (term != term ? 0.0f : term);
}

// The combined logit, forbidden where alpha is not 0 and the anchor's logit is below the cutoff's threshold.
HD float cut(float z, float anchor, float threshold, float alpha) {
    return alpha != 0.0f && anchor < threshold ? -infinity() : z;
}
