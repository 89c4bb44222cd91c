// The same bodies on the host, thread by thread between barriers: what tests on a machine without a GPU run. Built
// with the undefined-behaviour sanitizer, so that a misaligned vector load or an index outside a tile stops it.
#define COUNT_LOADS
#include <memory>
#include <utility>

#include "interface.h"

namespace {

bool reversed = false;

struct HostBlock {
    template <class T>
    struct PerThread {
        T values[THREADS];
        T& operator[](int thread) { return values[thread]; }
    };

    template <class Phase>
    void each(Phase phase) {
        for (int thread = 0; thread < THREADS; ++thread) phase(reversed ? THREADS - 1 - thread : thread);
    }
};

template <class Body>
void launch(const Problem& p, Body body) {
    for (int layer = 0; layer < p.layers; ++layer)
        for (int split = 0; split < p.splits; ++split)
            for (int output = 0; output < p.outputs; ++output) body(output, split, layer);
}

}  // namespace

#define RUN(NAME, SHARED)                                                                  \
    int ens_##NAME(const Problem* p, void*) {                                              \
        const auto shared = std::make_unique<SHARED>();                                    \
        HostBlock block;                                                                   \
        by_dtype(*p, [&](auto dtype) {                                                     \
            launch(*p, [&](int output, int split, int layer) {                             \
                NAME##_body<dtype>(block, *p, *shared, output, split, layer);              \
            });                                                                            \
        });                                                                                \
        return 0;                                                                          \
    }

extern "C" {
FOR_EACH_KERNEL(RUN)

const char* ens_error(int) { return "no error is known to the host harness"; }

// Run the threads of every phase last to first: a phase in which one thread needs what another writes then differs.
void ens_reverse_threads(int reverse) { reversed = reverse; }

// Slots read by 128-bit loads and value by value since the last call.
void ens_loads(int64_t* by_vector, int64_t* by_value) {
    *by_vector = std::exchange(slots_by_vector, 0);
    *by_value = std::exchange(slots_by_value, 0);
}
}
