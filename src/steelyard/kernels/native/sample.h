// From a row of logits to the next token: greedy, or drawn by a counter-based generator after temperature, top-k, top-p
// and min-p. The weights are float32, their sums float64 in one stated order, so that the twin draws the same token.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace steelyard {

// Philox 4x64, ten rounds (Salmon et al. 2011), as numpy's first number for this key and counter: 53 bits in [0, 1).
inline double philox(uint64_t key0, uint64_t key1, uint64_t counter) {
    uint64_t c[4] = {counter + 1, counter == UINT64_MAX, 0, 0};
    for (int round = 0; round < 10; round++) {
        const unsigned __int128 a = (unsigned __int128)0xD2E7470EE14C6C93u * c[0];
        const unsigned __int128 b = (unsigned __int128)0xCA5A826395121157u * c[2];
        const uint64_t next[4] = {(uint64_t)(b >> 64) ^ c[1] ^ key0, (uint64_t)b, (uint64_t)(a >> 64) ^ c[3] ^ key1, (uint64_t)a};
        std::memcpy(c, next, sizeof c);
        key0 += 0x9E3779B97F4A7C15u;
        key1 += 0xBB67AE8584CAA73Bu;
    }
    return (double)(c[0] >> 11) * 0x1.0p-53;
}

struct Draw {  // as `NativeDraw` in kernels/draw.py
    uint64_t seed, choice, position;
    float temperature, top_p, min_p;
    int32_t top_k;
};

struct Candidate {
    float weight;
    int32_t token;
};

// Heavier first; of equals the lower token.
INLINE bool heavier(const Candidate& a, const Candidate& b) {
    return a.weight > b.weight || (a.weight == b.weight && a.token < b.token);
}

// 0 to 1016 for weights of 0 to 1, never falling.
INLINE uint32_t leading_bits(float weight) {
    uint32_t bits;
    std::memcpy(&bits, &weight, 4);
    return bits >> 20;
}

// The drawn token; -1 if a logit is not finite. `candidates` is scratch.
inline int32_t draw_row(const float* logits, int vocabulary, const Draw& draw, std::vector<Candidate>& candidates) {
    float most = -INFINITY;
    int32_t likeliest = 0;
    const int whole = vocabulary / 16 * 16;
    {
        F peak = set(-INFINITY), strange = zero();
        for (int i = 0; i < whole; i += 16) {
            const F x = load(logits + i);
            peak = max(peak, x);
            strange = add(strange, sub(x, x));  // 0, or not a number for an infinity or none
        }
        float odd = sum(strange);
        most = whole ? largest(peak) : -INFINITY;
        for (int i = whole; i < vocabulary; i++) {
            odd += logits[i] - logits[i];
            most = logits[i] > most ? logits[i] : most;
        }
        if (!(odd == 0.0f)) return -1;
        while (logits[likeliest] != most) likeliest++;
    }
    if (draw.temperature == 0.0f) return likeliest;
    const bool filtered = (draw.top_k > 0 && draw.top_k < vocabulary) || draw.top_p < 1.0f || draw.min_p > 0.0f;
    candidates.resize(whole + 16);
    alignas(64) float weights[16];
    for (int i = 0; i < vocabulary; i += 16) {
        if (i < whole) {
            store(weights, exp(div(sub(load(logits + i), set(most)), set(draw.temperature))));
        } else {
            alignas(64) float rest[16];
            for (int j = 0; j < 16; j++) rest[j] = i + j < vocabulary ? logits[i + j] : most;
            store(weights, exp(div(sub(load(rest), set(most)), set(draw.temperature))));
        }
        for (int j = 0; j < 16; j++) candidates[i + j] = {weights[j], i + j};
    }
    const double share = philox(draw.seed, draw.choice, draw.position);
    Candidate* const begin = candidates.data();
    int count = vocabulary;
    if (filtered) {
        const bool few = draw.top_k > 0 && draw.top_k < vocabulary;
        double total = 0.0;
        int sorted = 0;
        if (few) {
            sorted = count = draw.top_k;
            std::nth_element(begin, begin + count - 1, begin + vocabulary, heavier);
            std::sort(begin, begin + count, heavier);
            for (int i = 0; i < count; i++) total += begin[i].weight;
        } else {
            // What can be among the smallest set is found by the leading bits of the weights; only that is sorted.
            std::vector<double> mass(1024, 0.0);
            for (int i = 0; i < vocabulary; i++) {
                total += begin[i].weight;
                mass[leading_bits(begin[i].weight)] += begin[i].weight;
            }
            int cut = draw.top_p < 1.0f ? 1023 : 0;
            for (double above = 0.0; cut > 0 && above < draw.top_p * total; cut--) above += mass[cut];
            const float least = draw.min_p;  // the heaviest weighs 1
            sorted = std::partition(begin, begin + count, [&](const Candidate& c) {
                         return (int)leading_bits(c.weight) >= cut && c.weight >= least;
                     }) - begin;
            std::sort(begin, begin + sorted, heavier);
        }
        // The smallest set that reaches top_p.
        double before = 0.0;
        int kept = 0;
        const double enough = (double)draw.top_p * total;
        while (kept < count) {
            if (kept && draw.top_p < 1.0f && before >= enough) break;
            if (kept == sorted) {
                if (draw.top_p >= 1.0f) break;  // the rest is too light for min_p
                std::sort(begin + sorted, begin + count, heavier);  // a sum of another order was off by its rounding
                sorted = count;
            }
            if (begin[kept].weight < draw.min_p * begin[0].weight) break;
            before += begin[kept].weight;
            kept++;
        }
        count = kept;
    }
    double total = 0.0;
    for (int i = 0; i < count; i++) total += begin[i].weight;
    const double target = share * total;
    double cumulative = 0.0;
    int32_t last = begin[0].token;
    for (int i = 0; i < count; i++) {
        if (begin[i].weight == 0.0f) continue;
        last = begin[i].token;
        cumulative += begin[i].weight;
        if (cumulative > target) break;
    }
    return last;
}

}  // namespace steelyard
