// Philox-4x32-10 (Salmon et al. 2011) and the Gumbel draw of one (seed, row, token id).
#pragma once

#include "members.h"

struct Philox {
    uint32_t word[4];
};

HD uint32_t high_product(uint32_t a, uint32_t b) { return (uint32_t)(((uint64_t)a * b) >> 32); }

// Words for counter (counter, row, 0, 0) under the two halves of the seed.
HD Philox philox(uint32_t counter, uint32_t row, uint64_t seed) {
    uint32_t c0 = counter, c1 = row, c2 = 0, c3 = 0, k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
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

// Word id % 4 belongs to the id: four ids share a counter.
HD float gumbel(const Philox& words, int id) {
    const int j = id & 3;
    const uint32_t bits = j < 2 ? (j ? words.word[1] : words.word[0]) : (j == 2 ? words.word[2] : words.word[3]);
    const float uniform = ((float)(bits >> 9) + 0.5f) * as_float(0x34000000u);  // 2^-23; exact, never 0 or 1
    return -logf(-logf(uniform));
}
