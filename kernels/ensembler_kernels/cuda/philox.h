// Philox-4x32-10 (Salmon et al. 2011) and the exponential draws of one output.
#pragma once

#include "members.h"

struct Philox {
    uint32_t word[4];
};

HD uint32_t high_product(uint32_t a, uint32_t b) { return (uint32_t)(((uint64_t)a * b) >> 32); }

// The numbers that a draw depends on besides its token.
struct Noise {
    uint32_t key0, key1, prompt, sample, position;
};

HD Noise noise_of(const int64_t* numbers) {
    const uint64_t seed = (uint64_t)numbers[0];
    return {(uint32_t)seed, (uint32_t)(seed >> 32), (uint32_t)numbers[1], (uint32_t)numbers[2], (uint32_t)numbers[3]};
}

// Words for counter (counter, position, sample, prompt) under the two halves of the seed.
HD Philox philox(uint32_t counter, const Noise& noise) {
    uint32_t c0 = counter, c1 = noise.position, c2 = noise.sample, c3 = noise.prompt;
    uint32_t k0 = noise.key0, k1 = noise.key1;
    UNROLL_TO(5)  // all ten would have their keys kept in registers over all slots
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = high_product(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const uint32_t high1 = high_product(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// -log u of the four ids that start `shift` words into those of one counter and end in those of the next: word id % 4
// of counter id / 4 belongs to an id, and slots start at any.
HD void exponential_draws(const Philox& words, const Philox& after, int shift, float* draws) {
    const uint32_t w[8] = {words.word[0], words.word[1], words.word[2], words.word[3],
                           after.word[0], after.word[1], after.word[2], after.word[3]};
    UNROLL
    for (int i = 0; i < 4; ++i) {
        const uint32_t low = shift & 1 ? w[i + 1] : w[i], high = shift & 1 ? w[i + 3] : w[i + 2];
        const uint32_t bits = shift & 2 ? high : low;
        draws[i] = -logf(((float)(bits >> 9) + 0.5f) * as_float(0x34000000u));  // 2^-23; exact, never log 0 or log 1
    }
}
