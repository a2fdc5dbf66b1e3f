// The cache of keys and values, and what is done with a token's queries, keys and values before attention: rotary
// positions, rounding, the write.
//
// Blocks of 32 tokens. Per layer, block and key-value head, E padded to a multiple of 32:
//     keys   [E / 2][32 tokens][2]      pairs of coordinates of a token
//     values [32 / 2][E][2]             pairs of tokens of a coordinate
// so that one load brings sixteen pairs, in the form that the processors' bfloat16 products take. A cached number is a
// bfloat16, or an int8 with a float32 scale per token and head. Every number is finite: attention multiplies what
// former holders of a block have left by a weight of 0.
#pragma once

#include "rows.h"

namespace steelyard {

constexpr int BLOCK = 32;
constexpr int MOST_WIDTH = 1024;  // of a head

struct Heads {
    int32_t heads, kv_heads, size, padded;  // padded: size rounded up to a multiple of 32
    int32_t window;                         // most tokens seen, itself included; 0 means all
    int32_t bytes;                          // of a cached number: 2 bfloat16, 1 int8
    uint8_t *keys, *values;                 // this layer's
    float *key_scales, *value_scales;       // [blocks][K][32], of int8

    INLINE int64_t place(int block, int head) const { return (int64_t)block * kv_heads + head; }
    INLINE int64_t block_bytes() const { return (int64_t)padded * BLOCK * bytes; }
    INLINE uint8_t* keys_at(int block, int head) const { return keys + place(block, head) * block_bytes(); }
    INLINE uint8_t* values_at(int block, int head) const { return values + place(block, head) * block_bytes(); }
    INLINE float* key_scales_at(int block, int head) const { return key_scales + place(block, head) * BLOCK; }
    INLINE float* value_scales_at(int block, int head) const { return value_scales + place(block, head) * BLOCK; }
};

struct Rotary {
    const float *cos, *sin;              // [context, size / 2]
    const float *query_norm, *key_norm;  // [size padded to 16], or null
    float epsilon;
};

// x [size] rotated by its position: pairs (i, i + size / 2), cos and sin [size / 2].
inline void rotate(const float* x, const float* cos, const float* sin, int size, float factor, float* out) {
    const int half = size / 2;
    int i = 0;
    for (; i + 16 <= half; i += 16) {
        const F a = load(x + i), b = load(x + i + half), c = load(cos + i), s = load(sin + i);
        store(out + i, mul(sub(mul(a, c), mul(b, s)), set(factor)));
        store(out + i + half, mul(add(mul(b, c), mul(a, s)), set(factor)));
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[i + half];
        const float ac = a * cos[i], bs = b * sin[i], bc = b * cos[i], as = a * sin[i];
        out[i] = (ac - bs) * factor;
        out[i + half] = (bc + as) * factor;
    }
}

// x [size, zeros up to padded] as bytes; returns their scale.
inline float to_bytes(const float* x, int padded, int8_t* out) {
    F most = zero();
    for (int i = 0; i < padded; i += 16) most = max(most, abs(storable(load(x + i))));
    float scale = largest(most) / LIMIT;
    if (scale < TINY) scale = 0.0f;
    const F inverse = set(scale > 0.0f ? 1.0f / scale : 0.0f);
    for (int i = 0; i < padded; i += 16)
        store_i8(out + i, to_int(min(max(round(mul(storable(load(x + i)), inverse)), set(-LIMIT)), set(LIMIT))));
    return scale;
}

// One token's key or value [padded] to its place in a block.
template <class Number>
INLINE void write_key(const Number* x, int padded, int offset, Number* keys) {
    for (int e = 0; e < padded; e += 2) std::memcpy(keys + e * BLOCK + 2 * offset, x + e, 2 * sizeof(Number));
}
template <class Number>
INLINE void write_value(const Number* x, int padded, int offset, Number* values) {
    Number* row = values + (int64_t)(offset / 2) * 2 * padded + offset % 2;
    for (int e = 0; e < padded; e++) row[2 * e] = x[e];
}

// The lines that a token's key and value will be written to.
INLINE void fetch_written(const Heads& h, int block, int head, int offset) {
    const uint8_t* key = h.keys_at(block, head) + 2 * offset * h.bytes;
    for (int e = 0; e < h.padded; e += 2) prefetch(key + e * BLOCK * h.bytes);
    const int pair = 2 * h.padded * h.bytes;
    const uint8_t* value = h.values_at(block, head) + offset / 2 * pair;
    for (int i = 0; i < pair; i += 64) prefetch(value + i);
}

// One token: qkv [(H + 2 K) * E] -> queries [H, padded] bfloat16, times 1 / sqrt(E); keys and values into the cache.
inline void rotate_and_cache(const float* qkv, int position, int block, const Heads& h, const Rotary& r, uint16_t* queries) {
    const int size = h.size, half = size / 2, offset = position % BLOCK;
    const float *cos = r.cos + (int64_t)position * half, *sin = r.sin + (int64_t)position * half;
    const float factor = 1.0f / std::sqrt((float)size);
    alignas(64) float plain[MOST_WIDTH], turned[MOST_WIDTH];
    alignas(64) uint16_t narrow[MOST_WIDTH];
    alignas(64) int8_t bytes[MOST_WIDTH];
    std::memset(plain, 0, h.padded * sizeof(float));
    std::memset(turned, 0, h.padded * sizeof(float));
    for (int n = 0; n < h.heads + 2 * h.kv_heads; n++) {
        const bool query = n < h.heads, value = n >= h.heads + h.kv_heads;
        const int head = n - h.heads - (value ? h.kv_heads : 0);
        const float* x = qkv + (int64_t)n * size;
        const float* norm = query ? r.query_norm : value ? nullptr : r.key_norm;
        if (norm) {
            std::memcpy(plain, x, size * sizeof(float));
            normalize_row(plain, norm, (size + 15) / 16 * 16, size, r.epsilon, plain);
            x = plain;
        }
        if (value) std::memcpy(turned, x, size * sizeof(float));
        else rotate(x, cos, sin, size, query ? factor : 1.0f, turned);
        if (query) {
            if (n < h.kv_heads) fetch_written(h, block, n, offset);
            to_bf16(turned, h.padded, queries + (int64_t)n * h.padded);
        } else if (h.bytes == 2) {
            to_bf16(turned, h.padded, narrow);
            if (value) write_value(narrow, h.padded, offset, (uint16_t*)h.values_at(block, head));
            else write_key(narrow, h.padded, offset, (uint16_t*)h.keys_at(block, head));
        } else {
            const float scale = to_bytes(turned, h.padded, bytes);
            (value ? h.value_scales_at(block, head) : h.key_scales_at(block, head))[offset] = scale;
            if (value) write_value(bytes, h.padded, offset, (int8_t*)h.values_at(block, head));
            else write_key(bytes, h.padded, offset, (int8_t*)h.keys_at(block, head));
        }
    }
}

}  // namespace steelyard
