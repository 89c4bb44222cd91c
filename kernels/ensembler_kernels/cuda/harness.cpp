// The same bodies on the host, thread by thread between barriers: what tests on a machine without a GPU run. Built
// with the undefined-behaviour sanitizer, so that a misaligned vector load or an index outside a tile stops it.
#define COUNT_LOADS
#include <memory>
#include <utility>

#include "interface.h"

namespace {

bool reversed = false;

struct HostBlock {
    template <class Phase>
    void each(Phase phase) {
        for (int thread = 0; thread < THREADS; ++thread) phase(reversed ? THREADS - 1 - thread : thread);
    }
};

template <class Body>
void launch(int grid_x, int grid_y, Body body) {
    HostBlock block;
    for (int x = 0; x < grid_x; ++x)
        for (int y = 0; y < grid_y; ++y) body(block, x, y);
}

}  // namespace

extern "C" {

int ens_problem_size() { return sizeof(Problem); }
int ens_partial_size() { return sizeof(Partial); }
int ens_num_splits(int width) { return num_splits(width); }
// Run the threads of every phase last to first: a phase in which one thread needs what another writes then differs.
void ens_reverse_threads(int reverse) { reversed = reverse; }

// Slots read by 128-bit loads and value by value since the last call.
void ens_loads(int64_t* by_vector, int64_t* by_value) {
    *by_vector = std::exchange(slots_by_vector, 0);
    *by_value = std::exchange(slots_by_value, 0);
}

const char* ens_error(int) { return "no error is known to the host harness"; }

int ens_combine(const Problem* p, float* out, void*) {
    by_dtype(*p, [&](auto dtype) {
        launch(p->rows, num_splits(p->width),
               [&](HostBlock& block, int row, int split) { combine_body<dtype>(block, *p, out, row, split); });
    });
    return 0;
}

int ens_sample(const Problem* p, const float* temperatures, const int64_t* seed, Partial* partials, int64_t* tokens,
               float* logprobs, void*) {
    const auto shared = std::make_unique<Reduction>();
    by_dtype(*p, [&](auto dtype) {
        launch(p->rows, num_splits(p->width), [&](HostBlock& block, int row, int split) {
            sample_body<dtype>(block, *p, temperatures, seed, partials, *shared, row, split);
        });
    });
    launch(p->rows, 1, [&](HostBlock& block, int row, int) {
        sample_merge_body(block, partials, p->width, tokens, logprobs, *shared, row);
    });
    return 0;
}

int ens_logprob(const Problem* p, const int64_t* targets, Partial* partials, float* at_target, float* logprobs,
                uint8_t* greedy, void*) {
    const auto tile = std::make_unique<Tile>();
    const auto shared = std::make_unique<Reduction>();
    by_dtype(*p, [&](auto dtype) {
        launch(p->rows, num_splits(p->width), [&](HostBlock& block, int row, int split) {
            logprob_body<dtype>(block, *p, targets, partials, at_target, *tile, row, split);
        });
    });
    launch(p->rows, p->num_alphas, [&](HostBlock& block, int row, int k) {
        logprob_merge_body(block, partials, at_target, targets, p->rows, p->width, logprobs, greedy, *shared, row, k);
    });
    return 0;
}

int ens_normalisers(const Problem* p, float* out, void*) {
    const auto shared = std::make_unique<Reduction>();
    by_dtype(*p, [&](auto dtype) {
        launch(p->rows, num_splits(p->width), [&](HostBlock& block, int row, int split) {
            normaliser_body<dtype>(block, *p, out, *shared, row, split);
        });
    });
    return 0;
}

int ens_anchor_max(const Problem* p, float* out, void*) {
    const auto tile = std::make_unique<Tile>();
    by_dtype(*p, [&](auto dtype) {
        launch(p->rows, num_splits(p->width), [&](HostBlock& block, int row, int split) {
            anchor_max_body<dtype>(block, *p, out, *tile, row, split);
        });
    });
    return 0;
}

}  // extern "C"
