// What happens to one token's row between two products: embedding, normalisation, rounding to int8, gating.
#pragma once

#include "product.h"

namespace steelyard {

constexpr float LIMIT = 127.0f;
constexpr float TINY = 1.17549435e-38f;  // below it a scale has no inverse

constexpr float SMALLEST = 8.8817842e-16f;  // 2^-50: smaller ones are 0, so that no product of two is subnormal, nor a sum
constexpr float LARGEST_BF16 = 3.3895314e38f;

// Finite, and no smaller than is told apart from 0.
INLINE F storable(F x) {
    x = max(min(x, set(LARGEST_BF16)), set(-LARGEST_BF16));  // not a number becomes the largest
    return choose(less(abs(x), set(SMALLEST)), zero(), x);
}

// x [width] as the bfloat16 products read it.
inline void to_bf16(const float* x, int width, uint16_t* out) {
    for (int i = 0; i < width; i += 16) store_bf16(out + i, storable(load(x + i)));
}

struct Quantized {
    int8_t* values;  // [T, width], or of bfloat16 [T, 2 * width]
    float* scale;    // [T]
    int32_t* sum;    // [T]
};

// Round x [width] to int8 by its largest magnitude, or to bfloat16.
inline void quantize_row(const float* x, int width, bool dense, const Quantized& q, int t) {
    if (dense) return to_bf16(x, width, (uint16_t*)q.values + (int64_t)t * width);
    F most = zero();
    for (int i = 0; i < width; i += 16) most = max(most, abs(load(x + i)));
    float scale = largest(most) / LIMIT;
    if (scale < TINY) scale = 0.0f;
    const F inverse = set(scale > 0.0f ? 1.0f / scale : 0.0f);
    int8_t* values = q.values + (int64_t)t * width;
    F total = zero();  // of integers up to 127 * width: exact
    for (int i = 0; i < width; i += 16) {
        const F rounded = min(max(round(mul(load(x + i), inverse)), set(-LIMIT)), set(LIMIT));
        total = add(total, rounded);
        store_i8(values + i, to_int(rounded));
    }
    q.scale[t] = scale;
    q.sum[t] = (int32_t)sum(total);
}

// out = x / rms(x) * weight; x and weight are padded with zeros to a multiple of 16. In place is fine.
inline void normalize_row(const float* x, const float* weight, int width, int size, float epsilon, float* out) {
    F squares = zero();
    for (int i = 0; i < width; i += 16) {
        const F v = load(x + i);
        squares = add(squares, mul(v, v));
    }
    const F factor = set(1.0f / std::sqrt(sum(squares) / (float)size + epsilon));
    for (int i = 0; i < width; i += 16) store(out + i, mul(mul(load(x + i), factor), load(weight + i)));
}

// A row of the packed table (see product.h), as float32 [width]; bfloat16 where there are no scales. columns [width]: by
// what each place is multiplied, or null.
inline void embed_row(const uint8_t* packed, const float* scale, const float* columns, int token, int width, float* out) {
    if (!scale) {
        const uint16_t* pairs = (const uint16_t*)packed + (int64_t)(token / PANEL) * width * PANEL + (token % PANEL) * 2;
        for (int i = 0; i < width; i++) out[i] = from_bf16(pairs[(int64_t)(i / 2) * PANEL * 2 + i % 2]);
        return;
    }
    const int groups = width / 4;
    const uint8_t* base = packed + (int64_t)(token / PANEL) * groups * PANEL * 4 + (token % PANEL) * 4;
    for (int g = 0; g < groups; g++)
        for (int j = 0; j < 4; j++) out[4 * g + j] = (float)((int)base[(int64_t)g * PANEL * 4 + j] - 128) * scale[token];
    if (columns)
        for (int i = 0; i < width; i += 16) store(out + i, mul(load(out + i), load(columns + i)));
}

// x [2 * width], 16 gates and 16 values in turn -> out [width] = silu(gate) * value.
inline void gate_row(const float* x, int width, float* out) {
    for (int i = 0; i < width; i += 16) store(out + i, mul(load(x + 2 * i + 16), silu(load(x + 2 * i))));
}

}  // namespace steelyard
