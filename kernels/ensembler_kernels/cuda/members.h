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

// The larger; of NaN and a number the number, if it is `b`.
HD float max_of(float a, float b) { return a > b ? a : b; }

HD float from_bf16(uint32_t bits) { return as_float(bits << 16); }

HD float from_fp16(uint32_t bits) {
    const uint32_t magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
    if ((bits & 0x7c00u) == 0x7c00u) return as_float(sign | 0x7f800000u | magnitude);
    return as_float(sign | 0x3f800000u) * (as_float(magnitude) * as_float(0x77800000u));  // exponents differ by 112
}

HD float load_one(const char* start, int dtype, int id) {
    if (dtype == FP32) return ((const float*)start)[id];
    const uint32_t bits = ((const uint16_t*)start)[id];
    return dtype == BF16 ? from_bf16(bits) : from_fp16(bits);
}

template <int DTYPE>
HD int dtype_of(const Problem& p, int n) {
    return DTYPE == MIXED ? p.members[n].dtype : DTYPE;
}

template <int DTYPE>
HD int size_of(const Problem& p, int n) {
    return dtype_of<DTYPE>(p, n) == FP32 ? 4 : 2;
}

// What a block knows of its output, in shared memory: where its row of each member starts, and its weights.
struct Output {
    const char* start[MAX_MEMBERS];
    float constant[MAX_MEMBERS], slope[MAX_MEMBERS];
    int32_t end[MAX_MEMBERS];  // ids that are read: none of a member without weight, or if there is no such row
    float alpha, threshold, normaliser;
    int32_t allowed;           // ids that every member of the first sum holds
    int32_t offset;            // the first id of slot 0
    int32_t exists;
};

template <int DTYPE>
HD const char* row_start(const Problem& p, int n, int row) {
    const Member& m = p.members[n];
    const int64_t offset = (row / p.positions) * m.row_stride + (row % p.positions) * m.position_stride;
    return (const char*)m.data + offset * size_of<DTYPE>(p, n);
}

// Token ids in slots of LANES. Slot 0 starts at or before id 0 where the row is aligned to 16 bytes, so that all slots
// but the first and the last are whole and aligned, whatever the row's address. The slots follow the first two-byte
// member, or the first of all if there is none; a member whose rows are aligned otherwise is read value by value.
template <int DTYPE>
HD int slot_offset(const Problem& p, int row) {
    int leader = 0;
    if (DTYPE == MIXED)
        while (leader < p.num_members - 1 && p.members[leader].dtype == FP32) ++leader;
    return -(int)((uintptr_t)row_start<DTYPE>(p, leader, row) & 15) / size_of<DTYPE>(p, leader);
}

// Fill in what a block knows of its output; `point` is the row of the table if points have rows of their own.
template <int DTYPE, class Block>
HD void begin(Block& block, const Problem& p, int output, int point, Output& o) {
    block.each([&](int thread) {
        const int n = thread, num = p.num_members;
        if (n >= num && n != THREADS - 1) return;
        const int row = p.rows ? p.rows[output] : output;
        const bool exists = row >= 0 && row < p.num_rows;
        const float* weights = p.table + (int64_t)output * p.table_stride + (int64_t)point * p.point_stride;
        if (n < num) {
            const int limit = p.members[n].limit;
            o.constant[n] = p.table ? weights[n] : 1.0f;  // the normalisers know no weights
            o.slope[n] = p.table ? weights[num + n] : 0.0f;
            o.start[n] = exists ? row_start<DTYPE>(p, n, row) : nullptr;
            const int of_ratio = o.slope[n] == 0.0f ? 0 : limit < p.shared ? limit : p.shared;
            o.end[n] = !exists ? 0 : o.constant[n] != 0.0f ? limit : of_ratio;
            return;
        }
        o.exists = exists;
        o.offset = exists ? slot_offset<DTYPE>(p, row) : 0;
        o.allowed = p.held;
        o.normaliser = 0.0f;
        o.alpha = p.table ? weights[2 * num] : 0.0f;
        o.threshold = p.thresholds ? p.thresholds[output] : -infinity();
        for (int i = 0; i < num && p.table && exists; ++i) {
            if (weights[i] != 0.0f && p.members[i].limit < o.allowed) o.allowed = p.members[i].limit;
            if (p.log_sums && !(p.raw >> i & 1) && weights[num + i] != 0.0f)
                o.normaliser += p.log_sums[(int64_t)row * num + i] * weights[num + i];
        }
    });
}

// First sum and log-ratio of id first + i, made such that combined() holds for every alpha: the log-ratio is 0 where it
// is undefined and outside the shared ids, and a NaN that a member gave (bit i of `given_nan`) is in the first sum.
HD void finish(const Problem& p, const Output& o, int first, int i, uint32_t given_nan, float& base, float& ratio) {
    const int id = first + i;
    const bool forbidden = base == infinity() || base != base || (uint32_t)id >= (uint32_t)o.allowed;
    ratio -= o.normaliser;
    base = given_nan >> i & 1 || !o.exists ? not_a_number() : forbidden ? -infinity() : base;
    ratio = ratio != ratio || id >= p.shared ? 0.0f : ratio;
}

// Add logit i of member n; returns its bit of `given_nan`.
HD uint32_t add_weighted(const Output& o, int n, int i, float z, float& base, float& ratio) {
    if (o.constant[n] != 0.0f) base += z * o.constant[n];
    if (o.slope[n] != 0.0f) ratio += z * o.slope[n];
    return (uint32_t)(z != z) << i;
}

template <int DTYPE>
HD void load_single(const Problem& p, const Output& o, int id, float& base, float& ratio) {
    uint32_t given_nan = 0;
    base = ratio = 0.0f;
    for (int n = 0; n < p.num_members; ++n)
        if (id < o.end[n])
            given_nan |= add_weighted(o, n, 0, load_one(o.start[n], dtype_of<DTYPE>(p, n), id), base, ratio);
    finish(p, o, id, 0, given_nan, base, ratio);
}

// The bits of one slot of a member, loaded before they are looked at.
template <int DTYPE>
struct Bits {
    static constexpr int PARTS = DTYPE == FP32 || DTYPE == MIXED ? 2 : 1;
    Vector part[PARTS];
    bool is_whole;
};

template <int DTYPE>
HD void load_bits(const Problem& p, const Output& o, int n, int first, Bits<DTYPE>& bits) {
    const char* at = o.start[n] + (int64_t)first * size_of<DTYPE>(p, n);
    bits.is_whole = first >= 0 && first + LANES <= o.end[n] && ((uintptr_t)at & 15) == 0;
    if (!bits.is_whole) return;
    COUNT(slots_by_vector);
    bits.part[0] = load_vector(at);
    if (dtype_of<DTYPE>(p, n) == FP32) bits.part[Bits<DTYPE>::PARTS - 1] = load_vector(at + sizeof(Vector));
}

// z[0..LANES): logits of the slot, `other` for ids that are not read.
template <int DTYPE>
HD void values_of(const Problem& p, const Output& o, int n, int first, const Bits<DTYPE>& bits, float other, float* z) {
    const int dtype = dtype_of<DTYPE>(p, n);
    if (!bits.is_whole) {
        COUNT(slots_by_value);
        UNROLL
        for (int i = 0; i < LANES; ++i) {
            const int id = first + i;
            z[i] = id >= 0 && id < o.end[n] ? load_one(o.start[n], dtype, id) : other;
        }
        return;
    }
    UNROLL
    for (int i = 0; i < LANES; ++i) {
        if (dtype == FP32) {
            z[i] = as_float(bits.part[i / 4 % Bits<DTYPE>::PARTS].word[i % 4]);
        } else {
            const uint32_t word = bits.part[0].word[i / 2], half = i % 2 ? word >> 16 : word & 0xffffu;
            z[i] = dtype == BF16 ? from_bf16(half) : from_fp16(half);
        }
    }
}

// First sums and log-ratios of one slot; ids outside the result are forbidden ones.
struct Slot {
    float base[LANES], ratio[LANES];
};

template <int DTYPE>
HD void load_slot(const Problem& p, const Output& o, int first, Slot& s) {
    constexpr int GROUP = DTYPE == BF16 || DTYPE == FP16 ? 4 : 2;  // members whose loads are under way at once
    uint32_t given_nan = 0;
    UNROLL
    for (int i = 0; i < LANES; ++i) s.base[i] = s.ratio[i] = 0.0f;
    for (int start = 0; start < p.num_members; start += GROUP) {
        Bits<DTYPE> bits[GROUP];
        UNROLL
        for (int j = 0; j < GROUP; ++j)
            if (start + j < p.num_members) load_bits<DTYPE>(p, o, start + j, first, bits[j]);
        UNROLL
        for (int j = 0; j < GROUP; ++j) {
            const int n = start + j;
            if (n >= p.num_members || first >= o.end[n]) continue;
            float z[LANES];
            values_of<DTYPE>(p, o, n, first, bits[j], 0.0f, z);
            UNROLL
            for (int i = 0; i < LANES; ++i) given_nan |= add_weighted(o, n, i, z[i], s.base[i], s.ratio[i]);
        }
    }
    UNROLL
    for (int i = 0; i < LANES; ++i) finish(p, o, first, i, given_nan, s.base[i], s.ratio[i]);
}

// Call f with the first id of every slot of a thread, ascending.
template <class F>
HD void each_slot(const Problem& p, const Output& o, int split, int thread, F f) {
    for (int first = o.offset + split * TILE + thread * LANES; first < p.width; first += p.splits * TILE) f(first);
}

// base + alpha * ratio: an infinite term, or that of an infinite ratio and alpha 0, counts as 0; a finite ratio that
// overflows as the largest float.
HD float combined(float base, float ratio, float alpha) {
    float term = alpha * ratio;
    if (term == infinity()) term = fabsf(ratio) < infinity() ? largest_float() : 0.0f;
    return base + (term != term && ratio == ratio ? 0.0f : term);
}

// The combined logit, forbidden where alpha is not 0 and the first sum is below the threshold.
HD float combined_and_cut(float base, float ratio, float alpha, float threshold) {
    return alpha != 0.0f && base < threshold ? -infinity() : combined(base, ratio, alpha);
}

HD float logit(const Output& o, const Slot& s, int i) {
    return combined_and_cut(s.base[i], s.ratio[i], o.alpha, o.threshold);
}
