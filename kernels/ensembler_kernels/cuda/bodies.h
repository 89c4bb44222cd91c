// The bodies of the kernels, as phases that all threads of a block run between barriers: block.each(phase). On a GPU
// each() is one call per thread and a barrier; in the harness it is a loop over the threads. Nothing else differs.
// A block reads the slots of its split of one output; logprob.h has the body of `logprob`.
#pragma once

#include "philox.h"
#include "reduction.h"

struct RowShared {
    Output output;
    Best best[THREADS];
    Sum sums[THREADS];
    int last;
};

// out (outputs, width)
template <int DTYPE, class Block>
HD void combine_body(Block& block, const Problem& p, RowShared& shared, int output, int split, int) {
    const Output& o = shared.output;
    begin<DTYPE>(block, p, output, 0, shared.output);
    block.each([&](int thread) {
        each_slot(p, o, split, thread, [&](int first) {
            Slot s;
            load_slot<DTYPE>(p, o, first, s);
            float z[LANES];
            UNROLL
            for (int i = 0; i < LANES; ++i) z[i] = logit(o, s, i);
            float* at = p.out + ((int64_t)output * p.width + first);
            if (first >= 0 && first + LANES <= p.width && ((uintptr_t)at & 15) == 0) {
                struct alignas(16) Quad {
                    float z[4];
                };
                ((Quad*)at)[0] = {{z[0], z[1], z[2], z[3]}};
                ((Quad*)at)[1] = {{z[4], z[5], z[6], z[7]}};
            } else {
                UNROLL
                for (int i = 0; i < LANES; ++i)
                    if (first + i >= 0 && first + i < p.width) at[i] = z[i];
            }
        });
    });
}

// tokens (outputs,): -1 where everything is forbidden; logprobs (outputs,): NaN where the row holds NaN.
// argmax of z / T + gumbel is argmax of p / e, with p = exp((z - largest) / T), which the log-sum-exp needs anyway, and
// e = -log u: an exponential race, run by each thread relative to its own largest z. partials (outputs, splits)
template <int DTYPE, class Block>
HD void sample_body(Block& block, const Problem& p, RowShared& shared, int output, int split, int) {
    const Output& o = shared.output;
    Best* partials = (Best*)p.partials + (int64_t)output * p.splits;
    const float temperature = p.temperature ? p.temperature[(int64_t)output * p.temperature_stride] : 0.0f;
    const bool is_drawn = temperature > 0.0f;
    const float inverse = is_drawn ? fminf(1.0f / temperature, largest_float()) : 1.0f;
    const auto better = [&](Best& a, const Best& b) { merge(a, b, inverse); };

    begin<DTYPE>(block, p, output, 0, shared.output);
    block.each([&](int thread) {
        float largest = -largest_float(), total = 0.0f, race = 0.0f, best_z = -infinity();
        int32_t best_id = INT_MAX;
        const Noise noise = is_drawn ? noise_of(p.noise + 4 * (int64_t)output) : Noise{};
        each_slot(p, o, split, thread, [&](int first) {
            Slot s;
            load_slot<DTYPE>(p, o, first, s);
            float z[LANES], top = largest;
            UNROLL
            for (int i = 0; i < LANES; ++i) {
                z[i] = logit(o, s, i);
                top = max_of(z[i], top);
            }
            const float shrink = top > largest ? expf((largest - top) * inverse) : 1.0f;
            largest = top;
            total *= shrink;
            race *= shrink;
            const int shift = first & 3, counter = (first - shift) / 4;
            Philox words = {}, after = {};
            if (is_drawn) words = philox((uint32_t)counter, noise);
            UNROLL_TO(1)  // all draws of a slot at once would take twice the registers
            for (int done = 0; done < LANES; done += 4) {
                float draw[4] = {};
                if (is_drawn) {
                    if (shift || done + 4 < LANES) after = philox((uint32_t)(counter + done / 4 + 1), noise);
                    exponential_draws(words, after, shift, draw);
                    words = after;
                }
                UNROLL
                for (int i = 0; i < 4; ++i) {
                    const float here = done ? z[i + 4] : z[i], share = expf((here - top) * inverse);
                    total += share;
                    if (is_drawn ? share > race * draw[i] : here > best_z) {
                        if (is_drawn) race = share / draw[i];
                        best_z = here;
                        best_id = first + done + i;
                    }
                }
            }
        });
        const float score = best_id == INT_MAX ? -infinity() : is_drawn ? logf(race) : (best_z - largest);
        shared.best[thread] = {{largest, total}, score, best_z, best_id};
    });
    reduce(block, shared.best, better);

    block.each([&](int thread) {
        if (thread != 0) return;
        partials[split] = shared.best[0];
        shared.last = is_last(p.counters + output, p.splits);
    });
    if (!shared.last) return;
    block.each([&](int thread) {
        Best mine = {{-largest_float(), 0.0f}, -infinity(), -infinity(), INT_MAX};
        for (int i = thread; i < p.splits; i += THREADS) merge(mine, load_fresh(partials + i), inverse);
        shared.best[thread] = mine;
    });
    reduce(block, shared.best, better);
    block.each([&](int thread) {
        if (thread != 0) return;
        const Best& all = shared.best[0];
        const bool forbidden = all.sum.total == 0.0f;
        p.tokens[output] = forbidden ? -1 : all.id < p.width ? all.id : 0;
        // (z - largest) - log total keeps what z - (largest + log total) would round away
        p.logprobs[output] = forbidden ? not_a_number() : (all.z - all.sum.largest) * inverse - logf(all.sum.total);
    });
}

// Pre-pass for `neutral` and log Z: out (outputs, num_members, splits), log-sum-exp of a split of every member
template <int DTYPE, class Block>
HD void normaliser_body(Block& block, const Problem& p, RowShared& shared, int output, int split, int) {
    const Output& o = shared.output;
    begin<DTYPE>(block, p, output, 0, shared.output);
    for (int n = 0; n < p.num_members; ++n) {
        block.each([&](int thread) {
            Sum mine = {-infinity(), 0.0f};
            each_slot(p, o, split, thread, [&](int first) {
                Bits<DTYPE> bits;
                float z[LANES];
                load_bits(p, o, n, first, bits);
                values_of(p, o, n, first, bits, -infinity(), z);
                UNROLL
                for (int i = 0; i < LANES; ++i) add(mine, z[i]);
            });
            shared.sums[thread] = mine;
        });
        reduce(block, shared.sums, [](Sum& a, const Sum& b) { merge(a, b); });
        block.each([&](int thread) {
            const Sum& all = shared.sums[0];
            if (thread == 0)
                p.out[((int64_t)output * p.num_members + n) * p.splits + split] = all.largest + logf(all.total);
        });
    }
}

// Pre-pass for a cut-off: out (layers, outputs, splits), the largest first sum of the ids that are allowed; +inf where
// it is NaN, because then nothing is cut
template <int DTYPE, class Block>
HD void threshold_body(Block& block, const Problem& p, RowShared& shared, int output, int split, int layer) {
    const Output& o = shared.output;
    begin<DTYPE>(block, p, output, layer, shared.output);
    block.each([&](int thread) {
        float largest = -infinity();
        each_slot(p, o, split, thread, [&](int first) {
            Slot s;
            load_slot<DTYPE>(p, o, first, s);
            UNROLL
            for (int i = 0; i < LANES; ++i) {
                const float base = s.base[i] != s.base[i] ? infinity() : s.base[i];
                if (base > largest && combined(s.base[i], s.ratio[i], o.alpha) != -infinity()) largest = base;
            }
        });
        shared.sums[thread].largest = largest;
    });
    reduce(block, shared.sums, [](Sum& a, const Sum& b) { a.largest = max_of(a.largest, b.largest); });
    block.each([&](int thread) {
        if (thread == 0) p.out[((int64_t)layer * p.outputs + output) * p.splits + split] = shared.sums[0].largest;
    });
}
