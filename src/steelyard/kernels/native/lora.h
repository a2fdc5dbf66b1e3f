// Low-rank corrections: y += scale * B (A x), row by row, each row by its own adapter.
//
// A row's result depends on its own values and adapter alone: the products with A are summed in sixteen lanes and a
// tree, those with B in the order of the rank.
#pragma once

#include "simd.h"

namespace steelyard {

struct LowRank {           // one adapter's pair for one layer; rank 0: it has none there
    const uint16_t* a;     // [R, inputs] bfloat16
    const uint16_t* b;     // [R, outputs] bfloat16: B transposed
    int32_t rank;
    float scale;
};

constexpr int MOST_RANK = 1024;

// x [inputs] -> y: output n stands at n, or where 16 gates and 16 values take turns at 32 * (n / 16) + n % 16.
inline void low_rank_row(const LowRank& pair, const float* x, int inputs, int outputs, bool in_turns, float* y) {
    float hidden[MOST_RANK];
    for (int r = 0; r < pair.rank; r++) {
        const uint16_t* a = pair.a + (int64_t)r * inputs;
        F acc = zero();
        for (int k = 0; k < inputs; k += 16) acc = fma(load(x + k), load_bf16(a + k), acc);
        hidden[r] = sum(acc);
    }
    const F scale = set(pair.scale);
    for (int n = 0; n < outputs; n += 16) {
        F acc = zero();
        for (int r = 0; r < pair.rank; r++) acc = fma(set(hidden[r]), load_bf16(pair.b + (int64_t)r * outputs + n), acc);
        float* out = y + (in_turns ? 2 * n : n);
        store(out, fma(scale, acc, load(out)));
    }
}

}  // namespace steelyard
