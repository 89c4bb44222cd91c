// The body of `logprob`: the log-probs of a target at every point of a run, from one read of its row.
//
// With evenly spaced alphas exp z of the next point is that of the last times exp(step * ratio): one multiplication per
// id and point. The largest z is convex in alpha, so that relative to the chord of a tile's largest at the ends no term
// is above 1. A tile in which a term that matters could underflow takes an exponential per id and point.
#pragma once

#include "reduction.h"

constexpr float SAFE_SPREAD = 60.0f;  // nats: exp(-60) is far above the smallest float32
constexpr float SAFE_SIZE = 1e30f;    // a logit above it may come from an overflow, and is not linear in alpha
constexpr int PARTS = THREADS / MAX_POINTS;  // threads that share a point
constexpr int COLUMN = THREADS + 1;          // one word more, so that a column of threads lies in different banks

// The largest of a tile's z at both ends of a run, and of its rise and fall from one end to the other.
struct Ends {
    float first, last, rise, fall;
};

struct LogprobShared {
    Output output;
    float alpha[MAX_POINTS], threshold[MAX_POINTS], at_target[MAX_POINTS], pivot[MAX_POINTS];
    Sum sums[MAX_POINTS];
    Ends ends[THREADS];
    float columns[MAX_POINTS * COLUMN], parts[THREADS];  // one number per point and thread, and per point and part
    Sum merged[THREADS];
    uint32_t beaten[THREADS];
    int last;
};

// How far rounding may have moved a logit.
HD float slack_of(float z) { return 1e-3f + 1e-5f * fabsf(z); }

// Reduce columns over threads by `join` into parts; the first thread of a point then joins its parts.
template <class Block, class Join>
HD void fold_columns(Block& block, LogprobShared& s, int count, Join join) {
    block.each([&](int thread) {
        const int k = thread % MAX_POINTS, start = thread / MAX_POINTS * (THREADS / PARTS);
        if (k >= count) return;
        float mine = s.columns[k * COLUMN + start];
        for (int i = 1; i < THREADS / PARTS; ++i) mine = join(mine, s.columns[k * COLUMN + start + i]);
        s.parts[thread] = mine;
    });
}

template <class Join>
HD float fold_parts(const LogprobShared& s, int k, Join join) {
    float all = s.parts[k];
    for (int part = 1; part < PARTS; ++part) all = join(all, s.parts[part * MAX_POINTS + k]);
    return all;
}

HD float logit_at(const LogprobShared& s, const Slot& slot, int i, int k) {
    return combined_and_cut(slot.base[i], slot.ratio[i], s.alpha[k], s.threshold[k]);
}

HD void join_ends(Ends& a, const Ends& b) {
    a = {max_of(a.first, b.first), max_of(a.last, b.last), max_of(a.rise, b.rise), max_of(a.fall, b.fall)};
}

HD Ends ends_of(const Slot& slot, float alpha, float last_alpha) {
    Ends ends = {-infinity(), -infinity(), -infinity(), -infinity()};
    UNROLL
    for (int i = 0; i < LANES; ++i) {
        const float z = combined(slot.base[i], slot.ratio[i], alpha);
        const float z_last = combined(slot.base[i], slot.ratio[i], last_alpha);
        if (z == -infinity() && z_last == -infinity()) continue;
        const bool safe = fabsf(z) < SAFE_SIZE && fabsf(z_last) < SAFE_SIZE;  // not for NaN, nor forbidden at one end
        join_ends(ends, {z, z_last, safe ? z_last - z : infinity(), safe ? z - z_last : infinity()});
    }
    return ends;
}

// Whether there is an id, and each stays within SAFE_SPREAD of the chord.
HD bool is_safe(const Ends& ends) {
    const float rise = ends.last - ends.first;
    return ends.rise - rise <= SAFE_SPREAD && ends.fall + rise <= SAFE_SPREAD;
}

HD bool beats(float z, int id, float at_target, int64_t target) {
    return z > at_target || (z == at_target && id < target);
}

// Bits of the points at which an id of an evenly spaced tile beats the target. z is linear in alpha: an id that is
// nowhere near the target at either end beats it nowhere, and one that is above it at both ends everywhere.
HD uint32_t contenders(const LogprobShared& s, const Slot& slot, int first, int count, int64_t target) {
    const int last = count - 1;
    const float slack = slack_of(s.at_target[0]), slack_last = slack_of(s.at_target[last]);
    bool may = false, always = false;
    UNROLL
    for (int i = 0; i < LANES; ++i) {
        const float above = logit_at(s, slot, i, 0) - s.at_target[0];
        const float above_last = logit_at(s, slot, i, last) - s.at_target[last];
        may |= !(above < -slack && above_last < -slack_last) && first + i != target;
        always |= above > slack && above_last > slack_last;
    }
    if (always) return ~0u;
    uint32_t found = 0;
    for (int k = 0; k < count && may; ++k) {
        UNROLL
        for (int i = 0; i < LANES; ++i)
            found |= (uint32_t)beats(logit_at(s, slot, i, k), first + i, s.at_target[k], target) << k;
    }
    return found;
}

// Sums over a thread's ids for every point, by recurrence along the chord.
HD void sum_evenly(LogprobShared& s, const Slot& slot, int thread, int count) {
    const float last = (float)(count - 1), rise = (s.ends[0].last - s.ends[0].first) / last;
    float term[LANES], factor[LANES];
    UNROLL
    for (int i = 0; i < LANES; ++i) {
        const float z = logit_at(s, slot, i, 0), z_last = logit_at(s, slot, i, count - 1);
        term[i] = expf(z - s.ends[0].first);
        factor[i] = z == -infinity() ? 0.0f : expf((z_last - z) / last - rise);
    }
    for (int k = 0; k < count; ++k) {
        float sum = 0.0f;
        UNROLL
        for (int i = 0; i < LANES; ++i) {
            sum += term[i];
            term[i] *= factor[i];
        }
        s.columns[k * COLUMN + thread] = sum;
    }
}

// The same by an exponential per id and point, relative to the tile's largest; returns where an id beats the target.
HD uint32_t sum_exactly(LogprobShared& s, const Slot& slot, int thread, int first, int count, int64_t target) {
    uint32_t found = 0;
    for (int k = 0; k < count; ++k) {
        const float shift = s.pivot[k] == -infinity() ? 0.0f : s.pivot[k];
        float sum = 0.0f;
        UNROLL
        for (int i = 0; i < LANES; ++i) {
            const float z = logit_at(s, slot, i, k);
            sum += expf(z - shift);
            found |= (uint32_t)beats(z, first + i, s.at_target[k], target) << k;
        }
        s.columns[k * COLUMN + thread] = sum;
    }
    return found;
}

// Log-probs, greedy flags and log-sum-exps of the points from the partial results of all splits.
template <class Block>
HD void merge_splits(Block& block, const Problem& p, LogprobShared& s, const Run& run, int output, int layer,
                     bool is_id) {
    block.each([&](int thread) {
        const int k = thread / PARTS;  // neighbouring threads read neighbouring splits
        const Sum* partials = (const Sum*)p.partials + ((int64_t)(run.first + k) * p.outputs + output) * p.splits;
        const uint32_t* beaten = p.beaten + ((int64_t)layer * p.outputs + output) * p.splits;
        Sum mine = {-infinity(), 0.0f};
        uint32_t found = 0;
        for (int i = thread % PARTS; i < p.splits && k < run.count; i += PARTS) {
            merge(mine, load_fresh(partials + i));
            found |= load_fresh(beaten + i);
        }
        s.merged[thread] = mine;
        s.beaten[thread] = found;
    });
    block.each([&](int thread) {
        const int k = thread;
        if (k >= run.count) return;
        Sum all = s.merged[k * PARTS];
        uint32_t found = s.beaten[k * PARTS];
        for (int part = 1; part < PARTS; ++part) {
            merge(all, s.merged[k * PARTS + part]);
            found |= s.beaten[k * PARTS + part];
        }
        // in this order: z - (largest + log total) would lose what is small; -inf - -inf is NaN if all is forbidden
        const float log_total = logf(all.total), logprob = (s.at_target[k] - all.largest) - log_total;
        const int64_t at = (int64_t)(run.first + k) * p.outputs + output;
        p.logprobs[at] = is_id ? logprob : not_a_number();
        p.greedy[at] = is_id && logprob == logprob && !(found >> k & 1);
        if (p.totals) p.totals[at] = all.largest + log_total;
    });
}

// logprobs, greedy and totals (points, outputs); partials (points, outputs, splits): pivot and sum
template <int DTYPE, class Block>
HD void logprob_body(Block& block, const Problem& p, LogprobShared& s, int output, int split, int layer) {
    const Run run = p.runs[layer];
    const int64_t target = p.targets[output];
    const bool is_id = target >= 0 && target < p.width;
    const auto sum_of = [](float a, float b) { return a + b; };
    typename Block::template PerThread<Slot> slots;
    typename Block::template PerThread<uint32_t> beaten;

    begin<DTYPE>(block, p, output, run.first, s.output);
    block.each([&](int k) {
        beaten[k] = 0;
        if (k >= run.count) return;
        float base, ratio;
        load_single<DTYPE>(p, s.output, is_id ? (int)target : 0, base, ratio);
        const int64_t point = run.first + k;
        s.alpha[k] = p.table[point * p.point_stride + 2 * p.num_members];
        s.threshold[k] = p.thresholds ? p.thresholds[point * p.outputs + output] : -infinity();
        s.at_target[k] = combined_and_cut(base, ratio, s.alpha[k], s.threshold[k]);
        s.sums[k] = {-infinity(), 0.0f};
    });
    for (int tile = split; s.output.offset + tile * TILE < p.width; tile += p.splits) {
        const int start = s.output.offset + tile * TILE;
        bool is_even = run.is_even && !p.thresholds;
        block.each([&](int thread) {
            load_slot<DTYPE>(p, s.output, start + thread * LANES, slots[thread]);
            if (is_even) s.ends[thread] = ends_of(slots[thread], s.alpha[0], s.alpha[run.count - 1]);
        });
        if (is_even) {
            reduce(block, s.ends, join_ends);
            is_even = is_safe(s.ends[0]);
        }
        if (!is_even) {
            block.each([&](int thread) {
                for (int k = 0; k < run.count; ++k) {
                    float largest = -infinity();
                    UNROLL
                    for (int i = 0; i < LANES; ++i) largest = max_of(logit_at(s, slots[thread], i, k), largest);
                    s.columns[k * COLUMN + thread] = largest;
                }
            });
            fold_columns(block, s, run.count, max_of);
        }
        block.each([&](int k) {
            if (k >= run.count) return;
            const float rise = (s.ends[0].last - s.ends[0].first) / (float)(run.count - 1);
            s.pivot[k] = is_even ? s.ends[0].first + k * rise : fold_parts(s, k, max_of);
        });
        block.each([&](int thread) {
            const int first = start + thread * LANES;
            if (is_even) {
                if (beaten[thread] != ~0u) beaten[thread] |= contenders(s, slots[thread], first, run.count, target);
                sum_evenly(s, slots[thread], thread, run.count);
            } else {
                beaten[thread] |= sum_exactly(s, slots[thread], thread, first, run.count, target);
            }
        });
        fold_columns(block, s, run.count, sum_of);
        block.each([&](int k) {
            if (k < run.count) merge(s.sums[k], {s.pivot[k], fold_parts(s, k, sum_of)});
        });
    }

    block.each([&](int thread) {
        s.beaten[thread] = beaten[thread];
        const int64_t at = (int64_t)(run.first + thread) * p.outputs + output;
        if (thread < run.count) ((Sum*)p.partials)[at * p.splits + split] = s.sums[thread];
    });
    reduce(block, s.beaten, [](uint32_t& a, uint32_t b) { a |= b; });
    block.each([&](int thread) {
        if (thread != 0) return;
        const int64_t at = (int64_t)layer * p.outputs + output;
        p.beaten[at * p.splits + split] = s.beaten[0];
        s.last = is_last(p.counters + at, p.splits);
    });
    if (s.last) merge_splits(block, p, s, run, output, layer, is_id);
}
