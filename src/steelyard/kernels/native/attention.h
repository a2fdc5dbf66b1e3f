// Attention over a cache of keys and values in blocks of 32 tokens, K and V read once for all query heads that share
// them, and the rotary positions and cache writes before it.
//
// Per layer, block and key-value head: keys [E][32] and values [32][E] in bfloat16, E padded to a multiple of 16.
// The context of a query is cut into partitions of 256 tokens at fixed places. Within a partition: all scores, their
// maximum, exponentials, their sum by lane, and the weighted values token by token; partitions are merged in order.
// So a query's result is the same to the bit however the prompt was cut into chunks and whatever else runs.
#pragma once

#include <algorithm>
#include <vector>

#include "rows.h"

namespace steelyard {

constexpr int BLOCK = 32, PARTITION = 256;
constexpr float MASKED = -1e30f;
constexpr int QUERIES = 4;  // consecutive tokens of a prompt that share what is read

struct Span {  // tokens of one sequence in a step
    int32_t start, computed, count, table;  // first token of the pack, cached before, new ones, place in `tables`
};

struct Heads {
    int32_t heads, kv_heads, size, padded;  // padded: size rounded up to a multiple of 16
    int32_t window;                         // most tokens seen, itself included; 0 means all
    uint16_t *keys, *values;                // this layer's
    int64_t block_stride;                   // elements of a block, all heads
};

INLINE uint16_t* cached_keys(const Heads& h, int block, int head) {
    return h.keys + block * h.block_stride + (int64_t)head * h.padded * BLOCK;
}
INLINE uint16_t* cached_values(const Heads& h, int block, int head) {
    return h.values + block * h.block_stride + (int64_t)head * h.padded * BLOCK;
}

INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

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

// float32 [size] -> bfloat16.
inline void narrow(const float* x, int size, uint16_t* out) {
    int i = 0;
    for (; i + 16 <= size; i += 16) store_bf16(out + i, load(x + i));
    for (; i < size; i++) out[i] = to_bf16(x[i]);
}

constexpr int MOST_WIDTH = 1024;  // of a head

struct Rotary {
    const float *cos, *sin;  // [context, size / 2]
    const float *query_norm, *key_norm;  // [padded], or null
    float epsilon;
};

// One token: qkv [(H + 2 K) * E] -> queries [H, padded], times 1 / sqrt(E); keys and values into the cache.
inline void rotate_and_cache(const float* qkv, int position, int block, const Heads& h, const Rotary& r, float* queries) {
    const int size = h.size, half = size / 2, offset = position % BLOCK;
    const float *cos = r.cos + (int64_t)position * half, *sin = r.sin + (int64_t)position * half;
    const float factor = 1.0f / std::sqrt((float)size);
    alignas(64) float plain[MOST_WIDTH], turned[MOST_WIDTH];
    alignas(64) uint16_t narrowed[MOST_WIDTH];
    std::memset(plain, 0, h.padded * sizeof(float));
    for (int head = 0; head < h.heads + h.kv_heads; head++) {
        const bool query = head < h.heads;
        const float* x = qkv + (int64_t)head * size;
        const float* norm = query ? r.query_norm : r.key_norm;
        if (norm) {
            std::memcpy(plain, x, size * sizeof(float));
            normalize_row(plain, norm, h.padded, size, r.epsilon, plain);
            x = plain;
        }
        if (query) {
            rotate(x, cos, sin, size, factor, queries + (int64_t)head * h.padded);
            continue;
        }
        rotate(x, cos, sin, size, 1.0f, turned);
        uint16_t* keys = cached_keys(h, block, head - h.heads) + offset;
        narrow(turned, size, narrowed);
        for (int e = 0; e < size; e++) keys[e * BLOCK] = narrowed[e];
    }
    for (int head = 0; head < h.kv_heads; head++) {
        const float* x = qkv + (int64_t)(h.heads + h.kv_heads + head) * size;
        narrow(x, size, cached_values(h, block, head) + (int64_t)offset * h.padded);
    }
}

// Scores of ROWS queries [ROWS][padded] with one block of keys, into scores [ROWS][PARTITION]. A block is a page of
// its own, and what the processor foresees ends with it: `ahead`, the block that comes next, is fetched meanwhile.
template <int ROWS>
INLINE void score_block(const float* const* queries, const uint16_t* keys, int padded, float* scores,
                        const uint16_t* ahead) {
    F low[ROWS], high[ROWS];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) low[r] = high[r] = zero();
    for (int e = 0; e < padded; e++) {
        prefetch(ahead + e * BLOCK);
        const F a = load_bf16(keys + e * BLOCK), b = load_bf16(keys + e * BLOCK + 16);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            const F q = set(queries[r][e]);
            low[r] = fma(q, a, low[r]);
            high[r] = fma(q, b, high[r]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
        store(scores + r * PARTITION, low[r]);
        store(scores + r * PARTITION + 16, high[r]);
    }
}

// out [ROWS][stride] += weights [ROWS][PARTITION] times values, token by token.
template <int ROWS, int VECTORS>
INLINE void mix_block(const float* weights, const uint16_t* values, int padded, int tokens, float* out, int stride,
                      const uint16_t* ahead) {
    F acc[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) acc[r][v] = load(out + (int64_t)r * stride + 16 * v);
    for (int i = 0; i < tokens; i++) {
        for (int v = 0; v < VECTORS; v += 2) prefetch(ahead + (int64_t)i * padded + 16 * v);
        F value[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) value[v] = load_bf16(values + (int64_t)i * padded + 16 * v);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            const F p = set(weights[r * PARTITION + i]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) acc[r][v] = fma(p, value[v], acc[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) store(out + (int64_t)r * stride + 16 * v, acc[r][v]);
}

template <int ROWS>
INLINE void mix_rows(const float* weights, const uint16_t* values, int padded, int tokens, float* out, int stride,
                     const uint16_t* ahead) {
    int e = 0;
    for (; e + 64 <= padded; e += 64) mix_block<ROWS, 4>(weights, values + e, padded, tokens, out + e, stride, ahead + e);
    for (; e < padded; e += 16) mix_block<ROWS, 1>(weights, values + e, padded, tokens, out + e, stride, ahead + e);
}

// ROWS queries against one partition: partial [ROWS][padded + 2] = weighted values, maximum, sum of exponentials.
// `ahead` are the keys that will be wanted after it.
template <int ROWS>
void attend_partition(const float* const* queries, const int* positions, const int32_t* table, int head, int partition,
                      const Heads& h, float* partial, const uint16_t* ahead) {
    alignas(64) float scores[ROWS * PARTITION];
    const int begin = partition * PARTITION;
    int last = 0;
    for (int r = 0; r < ROWS; r++) last = positions[r] > last ? positions[r] : last;
    const int tokens = last + 1 - begin < PARTITION ? last + 1 - begin : PARTITION;
    const int blocks = (tokens + BLOCK - 1) / BLOCK;
    const int stride = h.padded + 2;
    table += partition * (PARTITION / BLOCK);
    for (int b = 0; b < blocks; b++) {
        const uint16_t* next = b + 1 < blocks ? cached_keys(h, table[b + 1], head) : cached_values(h, table[0], head);
        score_block<ROWS>(queries, cached_keys(h, table[b], head), h.padded, scores + b * BLOCK, next);
        for (int r = 0; r < ROWS; r++) {
            // Tokens this query may not see: after it, or before its window.
            const int first = begin + b * BLOCK;
            float* row = scores + r * PARTITION + b * BLOCK;
            for (int i = positions[r] + 1 - first < 0 ? 0 : positions[r] + 1 - first; i < BLOCK; i++) row[i] = MASKED;
            if (h.window)
                for (int i = 0; i < BLOCK && first + i + h.window <= positions[r]; i++) row[i] = MASKED;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        float* row = scores + r * PARTITION;
        F most = set(MASKED);
        for (int i = 0; i < blocks * BLOCK; i += 16) most = max(most, load(row + i));
        const float peak = largest(most);
        F total = zero();
        for (int i = 0; i < blocks * BLOCK; i += 16) {
            const F weight = exp(sub(load(row + i), set(peak)));
            store(row + i, weight);
            total = add(total, weight);
        }
        float* out = partial + (int64_t)r * stride;
        std::memset(out, 0, h.padded * sizeof(float));
        out[h.padded] = peak;
        out[h.padded + 1] = sum(total);
    }
    for (int b = 0; b < blocks; b++) {
        const int here = tokens - b * BLOCK < BLOCK ? tokens - b * BLOCK : BLOCK;
        const uint16_t* next = b + 1 < blocks ? cached_values(h, table[b + 1], head) : ahead;
        mix_rows<ROWS>(scores + b * BLOCK, cached_values(h, table[b], head), h.padded, here, partial, stride, next);
    }
}

using AttendPartition = void (*)(const float* const*, const int*, const int32_t*, int, int, const Heads&, float*,
                                 const uint16_t*);
constexpr int MOST_QUERY_ROWS = 6;
static const AttendPartition ATTEND[MOST_QUERY_ROWS + 1] = {nullptr,
                                                            attend_partition<1>,
                                                            attend_partition<2>,
                                                            attend_partition<3>,
                                                            attend_partition<4>,
                                                            attend_partition<5>,
                                                            attend_partition<6>};

// Merge the partials of one query head, `between` floats apart, in order -> out [size].
inline void merge(const float* partials, int count, int64_t between, const Heads& h, float* out) {
    float peak = MASKED;
    for (int p = 0; p < count; p++) peak = std::fmax(peak, partials[p * between + h.padded]);
    float total = 0.0f;
    std::vector<float> factors(count);
    for (int p = 0; p < count; p++) {
        factors[p] = lane(exp(set(partials[p * between + h.padded] - peak)), 0);
        total = total + partials[p * between + h.padded + 1] * factors[p];
    }
    alignas(64) float whole[16];
    for (int e = 0; e < h.padded; e += 16) {
        F acc = zero();
        for (int p = 0; p < count; p++) acc = fma(set(factors[p]), load(partials + p * between + e), acc);
        store(whole, div(acc, set(total)));
        for (int i = 0; i < 16 && e + i < h.size; i++) out[e + i] = whole[i];
    }
}

// A piece of a step's attention: some consecutive queries of a span, one key-value head, some partitions.
struct Piece {
    int32_t span, query, queries, head, first, last;  // partitions first .. last - 1
    int64_t partial;                                  // where its partials go, in floats; -1: merged at once
};

struct AttentionWork {
    std::vector<Piece> pieces;
    std::vector<int64_t> cost;  // of the pieces up to each one, itself included
    std::vector<Piece> merges;  // single queries whose partitions were computed apart
    int64_t partials = 0;       // floats

    void add(const Piece& piece, int64_t own) {
        pieces.push_back(piece);
        cost.push_back(own + (cost.empty() ? 0 : cost.back()));
    }
    // The first piece of thread `me` of `threads`: equal shares of the cost, each a run of neighbours.
    int share(int me, int threads) const {
        if (cost.empty()) return 0;
        return std::lower_bound(cost.begin(), cost.end(), cost.back() * me / threads + (me > 0)) - cost.begin();
    }
};

inline int first_partition(const Heads& h, int position) {
    return h.window && position >= h.window ? (position - h.window + 1) / PARTITION : 0;
}

// Long contexts of single tokens are cut into their partitions when there are few pieces, so that all threads work.
inline AttentionWork plan_attention(const Span* spans, int count, const Heads& h, int threads) {
    AttentionWork work;
    const int share = h.heads / h.kv_heads, stride = h.padded + 2;
    for (int s = 0; s < count; s++) {
        const Span& span = spans[s];
        for (int q = 0; q < span.count; q += QUERIES) {
            const int queries = span.count - q < QUERIES ? span.count - q : QUERIES;
            const int position = span.computed + q;
            const int first = first_partition(h, position), last = (position + queries - 1) / PARTITION + 1;
            for (int head = 0; head < h.kv_heads; head++) {
                Piece piece{s, q, queries, head, first, last, -1};
                const int64_t tokens = position + queries - (int64_t)first * PARTITION;
                if (span.count > 1 || last - first == 1 || count * h.kv_heads > 8 * threads) {
                    work.add(piece, tokens * ((queries * share + 2) / 3) + 32);
                    continue;
                }
                piece.partial = work.partials;
                work.merges.push_back(piece);
                for (int p = first; p < last; p++) {
                    work.add({s, q, 1, head, p, p + 1, work.partials}, PARTITION);
                    work.partials += (int64_t)share * stride;
                }
            }
        }
    }
    return work;
}

// queries [T, H, padded], out [T, out_stride].
inline void attend_piece(const Piece& piece, const Span& span, const int32_t* tables, const Heads& h,
                         const uint16_t* ahead, const float* queries, float* partials, float* scratch, float* out, int out_stride) {
    const int share = h.heads / h.kv_heads, rows = piece.queries * share, stride = h.padded + 2;
    float* store_at = piece.partial < 0 ? scratch : partials + piece.partial;
    const int64_t between = (int64_t)rows * stride;
    for (int p = piece.first; p < piece.last; p++)
        for (int row = 0; row < rows; row += MOST_QUERY_ROWS) {
            const int here = rows - row < MOST_QUERY_ROWS ? rows - row : MOST_QUERY_ROWS;
            const float* starts[MOST_QUERY_ROWS];
            int positions[MOST_QUERY_ROWS];
            for (int r = 0; r < here; r++) {
                const int q = piece.query + (row + r) / share, head = piece.head * share + (row + r) % share;
                starts[r] = queries + ((int64_t)(span.start + q) * h.heads + head) * h.padded;
                positions[r] = span.computed + q;
            }
            ATTEND[here](starts, positions, tables + span.table, piece.head, p, h,
                         store_at + (p - piece.first) * between + (int64_t)row * stride, ahead);
        }
    if (piece.partial >= 0) return;
    for (int row = 0; row < rows; row++) {
        const int q = piece.query + row / share, head = piece.head * share + row % share;
        // A query does not see partitions after its own: those were computed for its neighbours.
        const int own = (span.computed + q) / PARTITION + 1 - piece.first;
        const int skip = first_partition(h, span.computed + q) - piece.first;
        merge(store_at + skip * between + (int64_t)row * stride, own - skip, between, h,
              out + (int64_t)(span.start + q) * out_stride + (int64_t)head * h.size);
    }
}

}  // namespace steelyard
