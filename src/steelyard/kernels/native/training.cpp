// What a network's forward and backward pass do between two products, in bfloat16 with float32 inside.
//
// Sums over rows are made in `parts` of fixed extent and added up by the caller, so that no result depends on how many
// threads there are.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

using namespace steelyard;

namespace {

constexpr float LARGEST = 3.0e38f;
constexpr uint16_t NOT_A_NUMBER = 0x7fc0;

INLINE F sigmoid(F x) { return div(set(1.0f), add(set(1.0f), exp(sub(zero(), x)))); }

// The last elements of a row that is no multiple of 16: 0 behind them, or only they are written.
INLINE F load_some(const uint16_t* p, int count) {
    alignas(64) uint16_t padded[16] = {};
    std::memcpy(padded, p, 2 * count);
    return load_bf16(padded);
}

INLINE void store_some(uint16_t* p, F x, int count) {
    alignas(64) uint16_t padded[16];
    store_bf16(padded, x);
    std::memcpy(p, padded, 2 * count);
}

}  // namespace

extern "C" {

#define INLINE_LAMBDA __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

// y = w * (x / rms(x)), rounded once after the quotient and once after the product; width a multiple of 16. With an
// offset that is not 0: (offset + w) * (x / rms(x)), rounded once.
EXPORT void steelyard_rms_norm(const uint16_t* x, const uint16_t* weight, int64_t rows, int32_t width, float epsilon,
                               float offset, uint16_t* y, float* inverse) {
    const F more = set(offset);
#pragma omp parallel for
    for (int64_t t = 0; t < rows; t++) {
        const uint16_t* in = x + t * width;
        F squares = zero();
        for (int i = 0; i < width; i += 16) {
            const F v = load_bf16(in + i);
            squares = fma(v, v, squares);
        }
        inverse[t] = 1.0f / std::sqrt(sum(squares) / (float)width + epsilon);
        const F factor = set(inverse[t]);
        for (int i = 0; i < width; i += 16) {
            const F v = mul(load_bf16(in + i), factor), w = load_bf16(weight + i);
            store_bf16(y + t * width + i, offset == 0.0f ? mul(w, round_bf16(v)) : mul(add(more, w), v));
        }
    }
}

// With w for offset + weight: dx = r (w dy) - x r^3 / width sum(w dy x); dw [parts, width] = sums of dy x r over each
// part's rows, if it is wanted.
EXPORT void steelyard_rms_norm_backward(const uint16_t* x, const uint16_t* weight, const float* inverse,
                                        const uint16_t* dy, int64_t rows, int32_t width, float offset, uint16_t* dx,
                                        float* dw, int32_t parts) {
    const F more = set(offset);
#pragma omp parallel for
    for (int32_t part = 0; part < parts; part++) {
        float* sums = dw ? dw + (int64_t)part * width : nullptr;
        for (int64_t t = rows * part / parts; t < rows * (part + 1) / parts; t++) {
            const uint16_t *in = x + t * width, *up = dy + t * width;
            F dots = zero();
            for (int i = 0; i < width; i += 16)
                dots = fma(mul(add(more, load_bf16(weight + i)), load_bf16(up + i)), load_bf16(in + i), dots);
            const float r = inverse[t];
            const F along = set(-r * r * r * sum(dots) / (float)width), factor = set(r);
            for (int i = 0; i < width; i += 16) {
                const F v = load_bf16(in + i), d = load_bf16(up + i), w = add(more, load_bf16(weight + i));
                store_bf16(dx + t * width + i, fma(along, v, mul(factor, mul(w, d))));
                if (sums) store(sums + i, fma(d, mul(v, factor), load(sums + i)));
            }
        }
    }
}

// y = silu(gate) * value, rounded once after silu and once after the product; count a multiple of 16.
EXPORT void steelyard_silu_mul(const uint16_t* gate, const uint16_t* value, int64_t count, uint16_t* y) {
#pragma omp parallel for
    for (int64_t i = 0; i < count; i += 16) {
        const F g = load_bf16(gate + i);
        store_bf16(y + i, mul(round_bf16(mul(g, sigmoid(g))), load_bf16(value + i)));
    }
}

EXPORT void steelyard_silu_mul_backward(const uint16_t* gate, const uint16_t* value, const uint16_t* dy, int64_t count,
                                        uint16_t* dgate, uint16_t* dvalue) {
#pragma omp parallel for
    for (int64_t i = 0; i < count; i += 16) {
        const F g = load_bf16(gate + i), d = load_bf16(dy + i), s = sigmoid(g);
        const F slope = mul(s, fma(g, sub(set(1.0f), s), set(1.0f)));
        store_bf16(dvalue + i, mul(d, mul(g, s)));
        store_bf16(dgate + i, mul(mul(d, load_bf16(value + i)), slope));
    }
}

// The same with gelu(g) = g sigmoid(u), u = `gelu_argument(g)`.
EXPORT void steelyard_gelu_mul(const uint16_t* gate, const uint16_t* value, int64_t count, uint16_t* y) {
#pragma omp parallel for
    for (int64_t i = 0; i < count; i += 16) {
        const F g = load_bf16(gate + i);
        store_bf16(y + i, mul(round_bf16(mul(g, sigmoid(gelu_argument(g)))), load_bf16(value + i)));
    }
}

// Its slope is s + g s (1 - s) du/dg.
EXPORT void steelyard_gelu_mul_backward(const uint16_t* gate, const uint16_t* value, const uint16_t* dy, int64_t count,
                                        uint16_t* dgate, uint16_t* dvalue) {
#pragma omp parallel for
    for (int64_t i = 0; i < count; i += 16) {
        const F g = load_bf16(gate + i), d = load_bf16(dy + i), s = sigmoid(gelu_argument(g));
        const F steep = add(set(GELU_SLOPE), mul(set(3.0f * GELU_BEND), mul(g, g)));
        const F slope = mul(s, fma(mul(g, sub(set(1.0f), s)), steep, set(1.0f)));
        store_bf16(dvalue + i, mul(d, mul(g, s)));
        store_bf16(dgate + i, mul(mul(d, load_bf16(value + i)), slope));
    }
}

// Each pair (x[i], x[i + half]) of x [rows, heads, 2 half] turned by its row's angle, times `direction` (1 or -1).
EXPORT void steelyard_rotate(const uint16_t* x, const float* cosine, const float* sine, int64_t rows, int32_t heads,
                             int32_t half, float direction, uint16_t* y) {
#pragma omp parallel for
    for (int64_t t = 0; t < rows; t++)
        for (int32_t h = 0; h < heads; h++) {
            const int64_t at = (t * heads + h) * 2 * half;
            for (int i = 0; i < half; i += 16) {
                const F a = load_bf16(x + at + i), b = load_bf16(x + at + half + i);
                const F c = load(cosine + t * half + i), s = mul(load(sine + t * half + i), set(direction));
                store_bf16(y + at + i, sub(mul(a, c), mul(b, s)));
                store_bf16(y + at + half + i, add(mul(b, c), mul(a, s)));
            }
        }
}

// losses[n] = -log softmax(logits[n])[target]; the logits become their gradient, softmax - onehot.
EXPORT void steelyard_cross_entropy(uint16_t* logits, const int64_t* targets, int64_t rows, int32_t vocabulary,
                                    float* losses) {
    const int32_t whole = vocabulary / 16 * 16;
#pragma omp parallel for
    for (int64_t n = 0; n < rows; n++) {
        uint16_t* row = logits + n * vocabulary;
        const float wanted = from_bf16(row[targets[n]]);
        F most = set(from_bf16(row[0]));
        for (int i = 0; i < whole; i += 16) most = max(most, load_bf16(row + i));
        float peak = largest(most);
        for (int i = whole; i < vocabulary; i++) peak = peak > from_bf16(row[i]) ? peak : from_bf16(row[i]);
        const F top = set(peak);
        F sums = zero();
        for (int i = 0; i < whole; i += 16) sums = add(sums, exp(sub(load_bf16(row + i), top)));
        float total = sum(sums);
        for (int i = whole; i < vocabulary; i++) total += std::exp(from_bf16(row[i]) - peak);
        losses[n] = std::log(total) + peak - wanted;
        const F share = set(1.0f / total);
        for (int i = 0; i < whole; i += 16) store_bf16(row + i, mul(exp(sub(load_bf16(row + i), top)), share));
        alignas(64) float rest[16] = {};
        alignas(64) uint16_t rounded[16];
        for (int i = whole; i < vocabulary; i++) rest[i - whole] = std::exp(from_bf16(row[i]) - peak) / total;
        store_bf16(rounded, load(rest));
        for (int i = whole; i < vocabulary; i++) row[i] = rounded[i - whole];
        alignas(64) float one[16] = {std::exp(wanted - peak) / total - 1.0f};
        store_bf16(rounded, load(one));
        row[targets[n]] = rounded[0];
    }
}

// sum += x, float32 and bfloat16.
EXPORT void steelyard_accumulate(float* sum, const uint16_t* x, int64_t count) {
    const int64_t whole = count / 16;
#pragma omp parallel for
    for (int64_t i = 0; i < whole; i++) store(sum + 16 * i, add(load(sum + 16 * i), load_bf16(x + 16 * i)));
    for (int64_t i = 16 * whole; i < count; i++) sum[i] += from_bf16(x[i]);
}

// Between the products of attention's forward pass: scores = q k [rows, keys] become softmax(scale scores) in their
// places, and their log-sums lse [rows]. Row i sees its first seen[i] keys; keys is a multiple of 16. What is not finite
// makes the whole row NaN.
EXPORT void steelyard_attention_forward(uint16_t* scores, const int32_t* seen, int64_t rows, int32_t keys, float scale,
                                        float* lse) {
    alignas(64) float places[16];
    for (int i = 0; i < 16; i++) places[i] = (float)i;
    const F place = load(places), by = set(scale), lowest = set(-LARGEST);
#pragma omp parallel for schedule(dynamic, 64)
    for (int64_t row = 0; row < rows; row++) {
        const int32_t end = seen[row] < keys ? seen[row] : keys;
        uint16_t* s = scores + row * keys;
        F most = lowest, faults = zero();
        for (int32_t i = 0; i < end; i += 16) {
            const M in = less(add(place, set((float)i)), set((float)end));
            const F v = load_bf16(s + i);
            most = max(most, choose(in, mul(by, v), lowest));
            faults = fma(v, zero(), faults);
        }
        if (sum(faults) != 0) {
            for (int32_t i = 0; i < keys; i++) s[i] = NOT_A_NUMBER;
            lse[row] = NAN;
            continue;
        }
        const float peak = largest(most);
        F sums = zero();
        for (int32_t i = 0; i < end; i += 16) {
            const M in = less(add(place, set((float)i)), set((float)end));
            sums = add(sums, choose(in, exp(fma(by, load_bf16(s + i), set(-peak))), zero()));
        }
        lse[row] = peak + std::log(sum(sums));
        const F minus = set(-lse[row]);
        for (int32_t i = 0; i < keys; i += 16) {
            const M in = less(add(place, set((float)i)), set((float)end));
            store_bf16(s + i, i < end ? choose(in, exp(fma(by, load_bf16(s + i), minus)), zero()) : zero());
        }
    }
}

// Between the products of attention's backward pass: of scores = q k and dp = dout v, both [rows, keys], to
// p = exp(scale scores - lse) and ds = scale p (dp - delta), in their places. Row i sees its first seen[i] keys. lse and
// delta are [rows]; keys is a multiple of 16.
EXPORT void steelyard_attention_backward(uint16_t* scores, uint16_t* dp, const int32_t* seen, const float* lse,
                                         const float* delta, int64_t rows, int32_t keys, float scale) {
    alignas(64) float places[16];
    for (int i = 0; i < 16; i++) places[i] = (float)i;
    const F place = load(places);
#pragma omp parallel for schedule(dynamic, 64)
    for (int64_t row = 0; row < rows; row++) {
        const int32_t end = seen[row] < keys ? seen[row] : keys;
        const F minus = set(-lse[row]), less_delta = set(-delta[row]), by = set(scale);
        uint16_t *s = scores + row * keys, *d = dp + row * keys;
        for (int32_t i = 0; i < keys; i += 16) {
            if (i >= end) {
                store_bf16(s + i, zero());
                store_bf16(d + i, zero());
                continue;
            }
            const F in = choose(less(add(place, set((float)i)), set((float)end)), set(1.0f), zero());
            const F p = mul(exp(fma(by, load_bf16(s + i), minus)), in);
            store_bf16(s + i, p);
            store_bf16(d + i, mul(mul(by, p), add(load_bf16(d + i), less_delta)));
        }
    }
}

// Group normalisation of x [images, channels, places]: y = w (x - mean) / deviation + b, of every group of channels, and
// what is below zero becomes zero if `relu`. mean and inverse deviation are [images, groups].
EXPORT void steelyard_group_norm(const uint16_t* x, const uint16_t* weight, const uint16_t* bias, int32_t images,
                                 int32_t channels, int32_t groups, int32_t places, float epsilon, int32_t relu,
                                 uint16_t* y, float* means, float* inverses) {
    const int32_t width = channels / groups, whole = places / 16 * 16, rest = places - whole;
    const int64_t size = (int64_t)width * places;
#pragma omp parallel for
    for (int64_t group = 0; group < (int64_t)images * groups; group++) {
        const uint16_t* in = x + group * size;
        uint16_t* out = y + group * size;
        F total = zero();
        for (int64_t i = 0; i < size / 16 * 16; i += 16) total = add(total, load_bf16(in + i));
        if (size % 16) total = add(total, load_some(in + size / 16 * 16, size % 16));
        const float mean = sum(total) / (float)size;
        const F middle = set(mean);
        F squares = zero();
        for (int64_t i = 0; i < size / 16 * 16; i += 16) {
            const F away = sub(load_bf16(in + i), middle);
            squares = fma(away, away, squares);
        }
        float spread = sum(squares);
        for (int64_t i = size / 16 * 16; i < size; i++) {
            const float away = from_bf16(in[i]) - mean;
            spread += away * away;
        }
        const float inverse = 1.0f / std::sqrt(spread / (float)size + epsilon);
        means[group] = mean;
        inverses[group] = inverse;
        const F least = set(relu ? 0.0f : -LARGEST);
        for (int32_t c = 0; c < width; c++) {
            const int32_t channel = (int32_t)(group % groups) * width + c;
            const float by = from_bf16(weight[channel]) * inverse;
            const F scale = set(by), shift = set(from_bf16(bias[channel]) - by * mean);
            const int64_t at = (int64_t)c * places;
            for (int32_t i = 0; i < whole; i += 16)
                store_bf16(out + at + i, max(least, fma(scale, load_bf16(in + at + i), shift)));
            if (rest)
                store_some(out + at + whole, max(least, fma(scale, load_some(in + at + whole, rest), shift)), rest);
        }
    }
}

// dx of the same, and of every image dw and db [images, channels], to be summed over the images. With v = (x - mean) r
// and d = dy, 0 where relu hid y: dw = sum(d v), db = sum(d), dx = r (w d - mean(w d) - v mean(w d v)).
EXPORT void steelyard_group_norm_backward(const uint16_t* x, const uint16_t* weight, const uint16_t* bias,
                                          const float* means, const float* inverses, const uint16_t* dy, int32_t images,
                                          int32_t channels, int32_t groups, int32_t places, int32_t relu, uint16_t* dx,
                                          float* dw, float* db) {
    const int32_t width = channels / groups, whole = places / 16 * 16, rest = places - whole;
    const int64_t size = (int64_t)width * places;
#pragma omp parallel for
    for (int64_t group = 0; group < (int64_t)images * groups; group++) {
        const uint16_t *in = x + group * size, *up = dy + group * size;
        uint16_t* out = dx + group * size;
        const float mean = means[group], inverse = inverses[group];
        const F middle = set(mean), factor = set(inverse);
        float of_d = 0, of_dv = 0;
        for (int32_t c = 0; c < width; c++) {
            const int32_t channel = (int32_t)(group % groups) * width + c;
            const float w = from_bf16(weight[channel]);
            const F scale = set(w * inverse), shift = set(from_bf16(bias[channel]) - w * inverse * mean);
            const int64_t at = (int64_t)c * places;
            F along = zero(), across = zero();
            const auto take = [&](F v, F d) INLINE_LAMBDA {
                if (relu) d = choose(less(zero(), fma(scale, v, shift)), d, zero());
                along = add(along, d);
                across = fma(d, mul(sub(v, middle), factor), across);
            };
            for (int32_t i = 0; i < whole; i += 16) take(load_bf16(in + at + i), load_bf16(up + at + i));
            if (rest) take(load_some(in + at + whole, rest), load_some(up + at + whole, rest));
            const int64_t to = group / groups * channels + channel;
            db[to] = sum(along);
            dw[to] = sum(across);
            of_d += w * db[to];
            of_dv += w * dw[to];
        }
        const F away = set(of_d / (float)size), turn = set(of_dv / (float)size);
        for (int32_t c = 0; c < width; c++) {
            const int32_t channel = (int32_t)(group % groups) * width + c;
            const float w = from_bf16(weight[channel]);
            const F by = set(w), scale = set(w * inverse), shift = set(from_bf16(bias[channel]) - w * inverse * mean);
            const int64_t at = (int64_t)c * places;
            const auto make = [&](F v, F d) INLINE_LAMBDA {
                if (relu) d = choose(less(zero(), fma(scale, v, shift)), d, zero());
                v = mul(sub(v, middle), factor);
                return mul(factor, sub(sub(mul(by, d), away), mul(v, turn)));
            };
            for (int32_t i = 0; i < whole; i += 16)
                store_bf16(out + at + i, make(load_bf16(in + at + i), load_bf16(up + at + i)));
            if (rest)
                store_some(out + at + whole, make(load_some(in + at + whole, rest), load_some(up + at + whole, rest)),
                           rest);
        }
    }
}

}  // extern "C"
