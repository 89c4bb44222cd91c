// The body of every kernel, as phases that all threads of a block run between barriers: block.each(phase). On a GPU
// each() is one call per thread and a barrier; in the harness it is a loop over the threads. Nothing else differs.
#pragma once

#include "philox.h"
#include "reduction.h"

struct Reduction {
    Partial partials[THREADS];
};

struct Tile {
    alignas(16) float base[TILE], ratio[TILE], anchor[TILE];
    Partial partials[THREADS];
};

// out (rows, width)
template <int DTYPE, class Block>
HD void combine_body(Block& block, const Problem& p, float* out, int row, int split) {
    block.each([&](int thread) {
        const int first = first_id<DTYPE>(p, row, split, thread);
        if (first >= p.width) return;
        Slot s;
        load_slot<DTYPE>(p, row, first, p.thresholds, s);
        const float alpha = alpha_of(p, 0, row), threshold = p.thresholds ? p.thresholds[row] : -infinity();
        float z[LANES];
        UNROLL
        for (int i = 0; i < LANES; ++i)
            z[i] = cut(combined(s.base[i], s.ratio[i], alpha), s.anchor[i], threshold, alpha);
        float* at = out + (int64_t)row * p.width + first;
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
}

// partials (rows, num_splits): the best id of a block under z / temperature + Gumbel, and its part of the softmax
template <int DTYPE, class Block>
HD void sample_body(Block& block, const Problem& p, const float* temperatures, const int64_t* seed, Partial* partials,
                    Reduction& shared, int row, int split) {
    block.each([&](int thread) {
        Partial mine = nothing();
        const int first = first_id<DTYPE>(p, row, split, thread);
        if (first < p.width) {
            Slot s;
            load_slot<DTYPE>(p, row, first, p.thresholds, s);
            const float alpha = alpha_of(p, 0, row), threshold = p.thresholds ? p.thresholds[row] : -infinity();
            const float temperature = temperatures[row];
            Philox words = {};
            UNROLL
            for (int i = 0; i < LANES; ++i) {
                const int id = first + i;
                if (id < 0 || id >= p.width) continue;
                float z = cut(combined(s.base[i], s.ratio[i], alpha), s.anchor[i], threshold, alpha), score = z;
                if (temperature > 0.0f) {
                    if (i == 0 || id % 4 == 0) words = philox((uint32_t)id / 4, (uint32_t)row, (uint64_t)*seed);
                    z /= temperature;
                    score = z + gumbel(words, id);
                }
                add(mine, z);
                take_better(mine, score, z, id);
            }
        }
        shared.partials[thread] = mine;
    });
    reduce(block, shared.partials, 1);
    block.each([&](int thread) {
        if (thread == 0) partials[(int64_t)row * num_splits(p.width) + split] = shared.partials[0];
    });
}

// The partials of one row's blocks, merged into shared.partials[0].
template <class Block>
HD void merge_body(Block& block, const Partial* partials, int splits, Reduction& shared) {
    block.each([&](int thread) {
        Partial mine = nothing();
        for (int split = thread; split < splits; split += THREADS) merge(mine, partials[split]);
        shared.partials[thread] = mine;
    });
    reduce(block, shared.partials, 1);
}

// tokens (rows,): -1 where everything is forbidden; logprobs (rows,): NaN where the row holds NaN
template <class Block>
HD void sample_merge_body(Block& block, const Partial* partials, int width, int64_t* tokens, float* logprobs,
                          Reduction& shared, int row) {
    const int splits = num_splits(width);
    merge_body(block, partials + (int64_t)row * splits, splits, shared);
    block.each([&](int thread) {
        if (thread != 0) return;
        const Partial& all = shared.partials[0];
        tokens[row] = all.total == 0.0f ? -1 : all.id < width ? all.id : 0;
        logprobs[row] = log_softmax(all.z, all);
    });
}

HD int alpha_groups(int num_alphas) {
    int groups = 1;
    while (groups < num_alphas) groups *= 2;
    return groups;
}

// Both sums of a block's ids into shared memory, once for all alphas; the ids follow one another.
template <int DTYPE, class Block>
HD void fill_tile(Block& block, const Problem& p, bool needs_anchor, Tile& tile, int row, int split) {
    block.each([&](int thread) {
        Slot s;
        load_slot<DTYPE>(p, row, first_id<DTYPE>(p, row, split, thread), needs_anchor, s);
        UNROLL
        for (int i = 0; i < LANES; ++i) {
            tile.base[thread * LANES + i] = s.base[i];
            tile.ratio[thread * LANES + i] = s.ratio[i];
            tile.anchor[thread * LANES + i] = s.anchor[i];
        }
    });
}

// partials (num_alphas, rows, num_splits); at_target (num_alphas, rows): z of the target, from the block that holds it.
// Threads that are equal modulo the (padded) number of alphas share an alpha: a warp reads one word of the tile, or
// neighbouring ones.
template <int DTYPE, class Block>
HD void logprob_body(Block& block, const Problem& p, const int64_t* targets, Partial* partials, float* at_target,
                     Tile& tile, int row, int split) {
    const int groups = alpha_groups(p.num_alphas), start = first_id<DTYPE>(p, row, split, 0);
    fill_tile<DTYPE>(block, p, p.thresholds, tile, row, split);
    block.each([&](int thread) {
        Partial mine = nothing();
        const int k = thread % groups, begin = start < 0 ? -start : 0;
        const int end = p.width - start < TILE ? p.width - start : TILE;
        if (k < p.num_alphas) {
            const int64_t at = (int64_t)k * p.rows + row, target = targets[row] - start;
            const float alpha = alpha_of(p, k, row), threshold = p.thresholds ? p.thresholds[at] : -infinity();
            for (int i = thread / groups; i < end; i += THREADS / groups) {
                if (i < begin) continue;
                const float z = cut(combined(tile.base[i], tile.ratio[i], alpha), tile.anchor[i], threshold, alpha);
                add(mine, z);
                take_better(mine, z, z, start + i);
                if (i == target) at_target[at] = z;
            }
        }
        tile.partials[thread] = mine;
    });
    reduce(block, tile.partials, groups);
    block.each([&](int thread) {
        if (thread < p.num_alphas)
            partials[((int64_t)thread * p.rows + row) * num_splits(p.width) + split] = tile.partials[thread];
    });
}

// logprobs, greedy (num_alphas, rows): NaN where the row holds NaN or everything is forbidden
template <class Block>
HD void logprob_merge_body(Block& block, const Partial* partials, const float* at_target, const int64_t* targets,
                           int rows, int width, float* logprobs, uint8_t* greedy, Reduction& shared, int row, int k) {
    const int64_t at = (int64_t)k * rows + row;
    const int splits = num_splits(width);
    merge_body(block, partials + at * splits, splits, shared);
    block.each([&](int thread) {
        if (thread != 0) return;
        logprobs[at] = log_softmax(at_target[at], shared.partials[0]);
        greedy[at] = shared.partials[0].id == targets[row];
    });
}

// Pre-pass for `neutral`: out (rows, MAX_MEMBERS, num_splits), log of the sum of exp of a block's shared logits
template <int DTYPE, class Block>
HD void normaliser_body(Block& block, const Problem& p, float* out, Reduction& shared, int row, int split) {
    for (int n = 0; n < p.num_members; ++n) {
        if (!p.members[n].in_normaliser) continue;
        block.each([&](int thread) {
            Partial mine = nothing();
            float z[LANES];
            const int first = first_id<DTYPE>(p, row, split, thread);
            load_lanes<DTYPE>(p, p.members[n], row, first, p.shared, -infinity(), z);
            UNROLL
            for (int i = 0; i < LANES; ++i) add(mine, z[i]);
            shared.partials[thread] = mine;
        });
        reduce(block, shared.partials, 1);
        block.each([&](int thread) {
            const Partial& all = shared.partials[0];
            if (thread == 0)
                out[((int64_t)row * MAX_MEMBERS + n) * num_splits(p.width) + split] = all.largest + logf(all.total);
        });
    }
}

// Pre-pass for `cutoff`: out (num_alphas, rows, num_splits), the largest anchor logit of the tokens that are allowed;
// +inf where the anchor gave NaN, because then nothing is cut
template <int DTYPE, class Block>
HD void anchor_max_body(Block& block, const Problem& p, float* out, Tile& tile, int row, int split) {
    const int groups = alpha_groups(p.num_alphas), start = first_id<DTYPE>(p, row, split, 0);
    fill_tile<DTYPE>(block, p, true, tile, row, split);
    block.each([&](int thread) {
        Partial mine = nothing();
        const int k = thread % groups, begin = start < 0 ? -start : 0;
        const int end = p.width - start < TILE ? p.width - start : TILE;
        if (k < p.num_alphas) {
            const float alpha = alpha_of(p, k, row);
            for (int i = thread / groups; i < end; i += THREADS / groups) {
                if (i < begin || combined(tile.base[i], tile.ratio[i], alpha) == -infinity()) continue;
                const float anchor = tile.anchor[i] != tile.anchor[i] ? infinity() : tile.anchor[i];
                take_better(mine, anchor, anchor, start + i);
            }
        }
        tile.partials[thread] = mine;
    });
    reduce(block, tile.partials, groups);
    block.each([&](int thread) {
        if (thread < p.num_alphas)
            out[((int64_t)thread * p.rows + row) * num_splits(p.width) + split] = tile.partials[thread].score;
    });
}
