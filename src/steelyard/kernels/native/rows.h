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
    float* scale;    // [T, width / group]
    int32_t* sum;    // [T, width / group]
};

// Round x [width] to int8, `group` values by their largest magnitude; or, if group is 0, to bfloat16.
inline void quantize_row(const float* x, int width, int group, const Quantized& q, int t) {
    if (!group) return to_bf16(x, width, (uint16_t*)q.values + (int64_t)t * width);
    int8_t* values = q.values + (int64_t)t * width;
    const int64_t first = (int64_t)t * (width / group);
    for (int g = 0; g < width / group; g++, x += group, values += group) {
        F most = zero();
        for (int i = 0; i < group; i += 16) most = max(most, abs(load(x + i)));
        float scale = largest(most) / LIMIT;
        if (scale < TINY) scale = 0.0f;
        const F inverse = set(scale > 0.0f ? 1.0f / scale : 0.0f);
        F total = zero();  // of integers up to 127 * width: exact
        for (int i = 0; i < group; i += 16) {
            const F rounded = min(max(round(mul(load(x + i), inverse)), set(-LIMIT)), set(LIMIT));
            total = add(total, rounded);
            store_i8(values + i, to_int(rounded));
        }
        q.scale[first + g] = scale;
        q.sum[first + g] = (int32_t)sum(total);
    }
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

// A table of packed rows (see product.h).
struct Table {
    const uint8_t* packed;
    const void* scale;
    const float* columns;  // [width]: by what each place is multiplied, or null
    int32_t width, bits, group;
};

// One of its rows, as float32 [width].
inline void embed_row(const Table& table, int token, float* out) {
    const int width = table.width, bits = table.bits, place = token % PANEL;
    const int64_t panel = token / PANEL;
    const uint8_t* base = table.packed + panel * width * bits / 8 * PANEL + place * 4;
    if (bits == 16) {
        const uint16_t* pairs = (const uint16_t*)table.packed + panel * width * PANEL + place * 2;
        for (int i = 0; i < width; i++) out[i] = from_bf16(pairs[(int64_t)(i / 2) * PANEL * 2 + i % 2]);
    } else if (bits == 8) {
        for (int i = 0; i < width; i++) out[i] = (float)((int)base[(int64_t)(i / 4) * PANEL * 4 + i % 4] - 128);
    } else {
        for (int i = 0; i < width; i++) {
            const int both = base[(int64_t)(i / 8) * PANEL * 4 + i % 4];
            out[i] = (float)((i % 8 < 4 ? both & 15 : both >> 4) - 8);
        }
    }
    if (bits == 8 && table.group == width) {
        const F scale = set(((const float*)table.scale)[token]);
        for (int i = 0; i < width; i += 16) store(out + i, mul(load(out + i), scale));
    } else if (bits != 16) {
        const int groups = width / table.group;
        const uint16_t* scales = (const uint16_t*)table.scale + panel * groups * PANEL + place;
        for (int i = 0; i < width; i += 16) {
            const F scale = set(from_bf16(scales[(int64_t)(i / table.group) * PANEL]));
            store(out + i, mul(load(out + i), scale));
        }
    }
    if (table.columns)
        for (int i = 0; i < width; i += 16) store(out + i, mul(load(out + i), load(table.columns + i)));
}

// x [2 * width], 16 gates and 16 values in turn -> out [width] = opened(gate) * value.
inline void gate_row(const float* x, int width, int32_t epilogue, float* out) {
    for (int i = 0; i < width; i += 16) store(out + i, mul(load(x + 2 * i + 16), opened(load(x + 2 * i), epilogue)));
}

}  // namespace steelyard
