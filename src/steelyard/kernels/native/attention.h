// Attention over the cache of `cache.h`: K and V are read once for all query heads that share them.
//
// The context of a query is cut into partitions of 256 tokens at fixed places. Within a partition, in bfloat16 products
// with float32 sums: all scores, their maximum, exponentials, their sum by lane, and the weighted values block by block;
// partitions are merged in order. A sum over 32 products goes by pairs: those of even place by fma in order from 0,
// those of odd place likewise, and the sum of both is added to what came before. That is what an AMX tile does, so
// every form of this file has the same bits. A query's result is the same however the prompt was cut into chunks and
// whatever else runs.
#pragma once

#include <algorithm>
#include <vector>

#include "cache.h"
#include "tiles.h"

namespace steelyard {

constexpr int PARTITION = 256;
constexpr float MASKED = -1e30f;
constexpr int QUERIES = 16;     // consecutive tokens of a prompt that share what is read
#if LANES_AMX
constexpr int ROWS_AT_ONCE = 16;  // of a tile
#else
constexpr int ROWS_AT_ONCE = 6;  // whose sums stay in registers
#endif

struct Span {  // tokens of one sequence in a step
    int32_t start, computed, count, table;  // first token of the pack, cached before, new ones, place in `tables`
};

// Blocks that will be read next, fetched a few lines at a time wherever there is something to compute: few lines can be
// on their way at once, a block is a page of its own, and what the processor foresees ends with a page.
class Ahead {
  public:
    void begin() {
        count_ = block_ = 0;
        at_ = 0;
    }
    // The first `bytes` of a block, or, `every` being 128, each second line of them. Blocks are multiples of 1 KB.
    void add(const uint8_t* block, int64_t bytes, int every = 64) { parts_[count_++] = {block, (int32_t)bytes, every}; }
    INLINE void fetch() {
        if (block_ == count_) return;
        const Part& part = parts_[block_];
        const uint8_t* from = part.from + at_;
#pragma GCC unroll 8
        for (int line = 0; line < 8; line++) prefetch_far(from + part.every * line);
        at_ += 8 * part.every;
        if (at_ >= part.bytes) {
            at_ = 0;
            block_++;
        }
    }
    void fetch_rest() {
        while (block_ < count_) fetch();
    }

  private:
    struct Part {
        const uint8_t* from;
        int32_t bytes, every;
    };
    Part parts_[3 * PARTITION / BLOCK];
    int count_ = 0, block_ = 0, at_ = 0;
};

// What a thread works with.
struct Desk {
    Ahead ahead;
    Tiles tiles;
    std::vector<float> partials;
    std::vector<uint16_t> queries;  // [rows of a piece][padded], side by side
    std::vector<uint16_t> room;     // [PARTITION][padded]: int8 widened, the begun rest of a block; finite numbers
    alignas(64) float scores[ROWS_AT_ONCE * PARTITION];
    alignas(64) uint16_t weights[ROWS_AT_ONCE * PARTITION];  // the same, as bfloat16

    void lay(const Heads& h, int rows) {
        if (queries.size() < (size_t)rows * h.padded) queries.resize((size_t)rows * h.padded);
        if (room.size() < (size_t)PARTITION * h.padded) room.resize((size_t)PARTITION * h.padded);
    }
};

// Tokens in block `b` of some that hold `tokens`.
INLINE int used(int tokens, int b) { return std::min(BLOCK, tokens - b * BLOCK); }

// A block's keys as bfloat16: those in the cache, or int8 widened exactly into `room`.
INLINE const uint16_t* keys_of(const uint8_t* cached, const Heads& h, uint16_t* room) {
    if (h.bytes == 2) return (const uint16_t*)cached;
    for (int i = 0; i < h.padded * BLOCK; i += 16) store_exact_bf16(room + i, load_i8((const int8_t*)cached + i));
    return room;
}

// Its values likewise; of a block with `used` tokens only their pairs are read, and what else `room` holds is weighted
// by 0.
INLINE const uint16_t* values_of(const uint8_t* cached, int used, const Heads& h, uint16_t* room) {
    if (h.bytes == 2 && used == BLOCK) return (const uint16_t*)cached;
    const int numbers = (used + 1) / 2 * 2 * h.padded;
    if (h.bytes == 2) std::memcpy(room, cached, numbers * sizeof(uint16_t));
    else
        for (int i = 0; i < numbers; i += 16) store_exact_bf16(room + i, load_i8((const int8_t*)cached + i));
    return room;
}

#if LANES_AMX

// Scores of up to 16 queries [rows][padded] with the first 16 tokens of a block, into scores [rows][PARTITION].
INLINE void score_half(const uint16_t* queries, const uint16_t* keys, int padded, float* scores, Ahead& ahead) {
    tile_zero<0>();
    for (int e = 0; e < padded; e += 32) {
        tile_load<4>(queries + e, padded * 2);
        ahead.fetch();
        tile_load<6>(keys + (int64_t)e * BLOCK, BLOCK * 4);
        ahead.fetch();
        tile_pairs<0, 4, 6>();
    }
    tile_store<0>(scores, PARTITION * 4);
}

// The same with all, or with the half that is `used`.
INLINE void score_block(const uint16_t* queries, int, const uint16_t* keys, int used, int padded, float* scores,
                        Ahead& ahead) {
    if (used <= BLOCK / 2) return score_half(queries, keys, padded, scores, ahead);
    tile_zero<0>();
    tile_zero<1>();
    for (int e = 0; e < padded; e += 32) {
        const uint16_t* row = keys + (int64_t)e * BLOCK;
        tile_load<4>(queries + e, padded * 2);
        ahead.fetch();
        tile_load<6>(row, BLOCK * 4);
        ahead.fetch();
        tile_load<7>(row + BLOCK, BLOCK * 4);
        ahead.fetch();
        tile_pairs<0, 4, 6>();
        tile_pairs<1, 4, 7>();
    }
    tile_store<0>(scores, PARTITION * 4);
    tile_store<1>(scores + 16, PARTITION * 4);
}

// Sixteen coordinates of the weighted values of a block, to the sums of one tile.
template <int SUMS, int RIGHT>
INLINE void mix_tile(const uint16_t* values, int padded, Ahead& ahead) {
    ahead.fetch();
    tile_load<RIGHT>(values, (int64_t)padded * 4);
    tile_pairs<SUMS, 4, RIGHT>();
}

// The weighted values of COLUMNS coordinates (64 or 32) over some blocks -> out [rows][stride].
template <int COLUMNS>
INLINE void mix_columns(const uint16_t* weights, const uint16_t* const* blocks, int count, int column, int padded,
                        float* out, int stride, Ahead& ahead) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int b = 0; b < count; b++) {
        const uint16_t* values = blocks[b] + 2 * column;
        tile_load<4>(weights + b * BLOCK, PARTITION * 2);
        mix_tile<0, 6>(values, padded, ahead);
        mix_tile<1, 7>(values + 32, padded, ahead);
        if (COLUMNS > 32) {
            mix_tile<2, 6>(values + 64, padded, ahead);
            mix_tile<3, 7>(values + 96, padded, ahead);
        }
    }
    tile_store<0>(out, (int64_t)stride * 4);
    tile_store<1>(out + 16, (int64_t)stride * 4);
    if (COLUMNS > 32) {
        tile_store<2>(out + 32, (int64_t)stride * 4);
        tile_store<3>(out + 48, (int64_t)stride * 4);
    }
}

// The weighted values of some blocks -> out [rows][stride].
INLINE void mix(Desk& desk, int rows, const uint16_t* const* blocks, int count, int padded, float* out, int stride) {
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < count * BLOCK; i += 16)
            store_bf16(desk.weights + r * PARTITION + i, load(desk.scores + r * PARTITION + i));
    int e = 0;
    for (; e + 64 <= padded; e += 64) mix_columns<64>(desk.weights, blocks, count, e, padded, out + e, stride, desk.ahead);
    for (; e < padded; e += 32) mix_columns<32>(desk.weights, blocks, count, e, padded, out + e, stride, desk.ahead);
}

#else

template <int ROWS>
INLINE void score_rows(const uint16_t* queries, const uint16_t* keys, int used, int padded, float* scores, Ahead& ahead) {
    F total[2 * ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < 2 * ROWS; r++) total[r] = zero();
    for (int begin = 0; begin < padded; begin += 32) {
        for (int half = 0; half * (BLOCK / 2) < used; half++) {
            F even[ROWS], odd[ROWS];
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) even[r] = odd[r] = zero();
            for (int e = begin; e < begin + 32; e += 2) {
                F first, second;
                if (e % 16 == 0) ahead.fetch();
                load_pairs(keys + (int64_t)e * BLOCK + half * BLOCK, first, second);
#pragma GCC unroll 6
                for (int r = 0; r < ROWS; r++) {
                    even[r] = fma(set(from_bf16(queries[(int64_t)r * padded + e])), first, even[r]);
                    odd[r] = fma(set(from_bf16(queries[(int64_t)r * padded + e + 1])), second, odd[r]);
                }
            }
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                if (half) total[2 * r + 1] = add(total[2 * r + 1], add(even[r], odd[r]));
                else total[2 * r] = add(total[2 * r], add(even[r], odd[r]));
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
        store(scores + r * PARTITION, total[2 * r]);
        store(scores + r * PARTITION + 16, total[2 * r + 1]);
    }
}

INLINE void score_block(const uint16_t* queries, int rows, const uint16_t* keys, int used, int padded, float* scores,
                        Ahead& ahead) {
    switch (rows) {
        case 1: return score_rows<1>(queries, keys, used, padded, scores, ahead);
        case 2: return score_rows<2>(queries, keys, used, padded, scores, ahead);
        case 3: return score_rows<3>(queries, keys, used, padded, scores, ahead);
        case 4: return score_rows<4>(queries, keys, used, padded, scores, ahead);
        case 5: return score_rows<5>(queries, keys, used, padded, scores, ahead);
        default: return score_rows<6>(queries, keys, used, padded, scores, ahead);
    }
}

// out [ROWS][stride], 32 coordinates, += the weighted values of a block.
template <int ROWS>
INLINE void mix_rows(const float* weights, const uint16_t* values, int column, int padded, float* out, int stride,
                     Ahead& ahead) {
    values += 2 * column;
    out += column;
    F even[2 * ROWS], odd[2 * ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < 2 * ROWS; r++) even[r] = odd[r] = zero();
    for (int t = 0; t < BLOCK; t += 2) {
        F first, second, first_high, second_high;
        if (t % 8 == 0) ahead.fetch();
        load_pairs(values + (int64_t)t * padded, first, second);
        load_pairs(values + (int64_t)t * padded + 32, first_high, second_high);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            const F a = set(weights[r * PARTITION + t]), b = set(weights[r * PARTITION + t + 1]);
            even[2 * r] = fma(a, first, even[2 * r]);
            odd[2 * r] = fma(b, second, odd[2 * r]);
            even[2 * r + 1] = fma(a, first_high, even[2 * r + 1]);
            odd[2 * r + 1] = fma(b, second_high, odd[2 * r + 1]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
        float* row = out + (int64_t)r * stride;
        store(row, add(load(row), add(even[2 * r], odd[2 * r])));
        store(row + 16, add(load(row + 16), add(even[2 * r + 1], odd[2 * r + 1])));
    }
}

INLINE void mix_block(int rows, const float* weights, const uint16_t* values, int column, int padded, float* out, int stride,
                      Ahead& ahead) {
    switch (rows) {
        case 1: return mix_rows<1>(weights, values, column, padded, out, stride, ahead);
        case 2: return mix_rows<2>(weights, values, column, padded, out, stride, ahead);
        case 3: return mix_rows<3>(weights, values, column, padded, out, stride, ahead);
        case 4: return mix_rows<4>(weights, values, column, padded, out, stride, ahead);
        case 5: return mix_rows<5>(weights, values, column, padded, out, stride, ahead);
        default: return mix_rows<6>(weights, values, column, padded, out, stride, ahead);
    }
}

INLINE void mix(Desk& desk, int rows, const uint16_t* const* blocks, int count, int padded, float* out, int stride) {
    for (int r = 0; r < rows; r++) std::memset(out + (int64_t)r * stride, 0, padded * sizeof(float));
    for (int b = 0; b < count; b++)
        for (int e = 0; e < padded; e += 32)
            mix_block(rows, desk.scores + b * BLOCK, blocks[b], e, padded, out, stride, desk.ahead);
}

#endif

// The scores of a query with a partition's blocks -> its weights, times the values' scales, as bfloat16 numbers, in
// place; out: the largest score, the sum of the exponentials.
INLINE void soften(float* row, int blocks, const Heads& h, const int32_t* table, int head, float* out, Ahead& ahead) {
    F most = set(MASKED);
    for (int i = 0; i < blocks * BLOCK; i += 16) most = max(most, load(row + i));
    const float peak = largest(most);
    F total = zero();
    for (int i = 0; i < blocks * BLOCK; i += 16) {
        if (i % BLOCK == 0) ahead.fetch();
        F weight = exp(sub(load(row + i), set(peak)));
        total = add(total, weight);
        if (h.bytes == 1) weight = mul(weight, load(h.value_scales_at(table[i / BLOCK], head) + i % BLOCK));
        store(row + i, round_bf16(choose(less(weight, set(SMALLEST)), zero(), weight)));
    }
    out[0] = peak;
    out[1] = sum(total);
}

// Up to ROWS_AT_ONCE queries [rows][padded] against one partition: partial [rows][padded + 2] = weighted values, maximum,
// sum of exponentials.
inline void attend_partition(Desk& desk, const uint16_t* queries, int rows, const int* positions, const int32_t* table, int head, int partition,
                             const Heads& h, float* partial) {
#if LANES_AMX
    desk.tiles.use(rows);
#endif
    const int begin = partition * PARTITION;
    int last = 0;
    for (int r = 0; r < rows; r++) last = positions[r] > last ? positions[r] : last;
    const int tokens = last + 1 - begin < PARTITION ? last + 1 - begin : PARTITION;
    const int blocks = (tokens + BLOCK - 1) / BLOCK;
    const int stride = h.padded + 2;
    table += partition * (PARTITION / BLOCK);
    for (int b = 0; b < blocks; b++) {
        float* scores = desk.scores + b * BLOCK;
        score_block(queries, rows, keys_of(h.keys_at(table[b], head), h, desk.room.data()), used(tokens, b), h.padded,
                    scores, desk.ahead);
        if (h.bytes == 1) {
            const F low = load(h.key_scales_at(table[b], head)), high = load(h.key_scales_at(table[b], head) + 16);
            for (int r = 0; r < rows; r++) {
                store(scores + r * PARTITION, mul(load(scores + r * PARTITION), low));
                store(scores + r * PARTITION + 16, mul(load(scores + r * PARTITION + 16), high));
            }
        }
        const int first = begin + b * BLOCK;
        for (int r = 0; r < rows; r++) {
            // Tokens this query may not see: after it, or before its window.
            float* row = scores + r * PARTITION;
            for (int i = positions[r] + 1 - first < 0 ? 0 : positions[r] + 1 - first; i < BLOCK; i++) row[i] = MASKED;
            if (h.window)
                for (int i = 0; i < BLOCK && first + i + h.window <= positions[r]; i++) row[i] = MASKED;
        }
    }
    for (int r = 0; r < rows; r++)
        soften(desk.scores + r * PARTITION, blocks, h, table, head, partial + (int64_t)r * stride + h.padded,
               desk.ahead);
    const uint16_t* values[PARTITION / BLOCK];
    for (int b = 0; b < blocks; b++)
        values[b] = values_of(h.values_at(table[b], head), used(tokens, b), h, desk.room.data() + (int64_t)b * BLOCK * h.padded);
    mix(desk, rows, values, blocks, h.padded, partial, stride);
}

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

// What a piece reads in one partition: keys, values or both.
inline void foresee(Ahead& ahead, const Piece& piece, const Span& span, const int32_t* tables, int partition, const Heads& h,
                    bool keys) {
    const int end = std::min((partition + 1) * PARTITION, span.computed + piece.query + piece.queries);
    const int32_t* table = tables + span.table;
    const int64_t pair = 2 * h.padded * h.bytes, whole = h.block_bytes();
    for (int b = partition * (PARTITION / BLOCK); keys && b * BLOCK < end; b++)
        // Half of a bfloat16 block's tokens are in each second line.
        ahead.add(h.keys_at(table[b], piece.head), whole, h.bytes == 2 && used(end, b) <= BLOCK / 2 ? 128 : 64);
    for (int b = partition * (PARTITION / BLOCK); b * BLOCK < end; b++)
        ahead.add(h.values_at(table[b], piece.head), (used(end, b) + 1) / 2 * pair);
}

// queries [T, H, padded] bfloat16, out [T, out_stride]. `next` is the piece after it, or null; `first`: nothing of this
// one was foreseen.
inline void attend_piece(const Piece& piece, const Piece* next, bool first, const Span* spans, const int32_t* tables,
                         const Heads& h, Desk& desk, const uint16_t* queries, float* partials, float* out, int out_stride) {
    const Span& span = spans[piece.span];
    const int share = h.heads / h.kv_heads, rows = piece.queries * share, stride = h.padded + 2;
    const int64_t between = (int64_t)rows * stride;
    const size_t need = (size_t)(piece.last - piece.first) * between;
    if (piece.partial < 0 && desk.partials.size() < need) desk.partials.resize(need);
    float* store_at = piece.partial < 0 ? desk.partials.data() : partials + piece.partial;
    desk.lay(h, rows);
    for (int row = 0; row < rows; row++) {
        const int t = span.start + piece.query + row / share, head = piece.head * share + row % share;
        std::memcpy(desk.queries.data() + (int64_t)row * h.padded, queries + ((int64_t)t * h.heads + head) * h.padded,
                    h.padded * sizeof(uint16_t));
    }
    for (int p = piece.first; p < piece.last; p++) {
        desk.ahead.begin();
        if (first && p == piece.first) foresee(desk.ahead, piece, span, tables, p, h, false);
        if (p + 1 < piece.last) foresee(desk.ahead, piece, span, tables, p + 1, h, true);
        else if (next) foresee(desk.ahead, *next, spans[next->span], tables, next->first, h, true);
        for (int row = 0; row < rows; row += ROWS_AT_ONCE) {
            const int here = rows - row < ROWS_AT_ONCE ? rows - row : ROWS_AT_ONCE;
            int positions[ROWS_AT_ONCE];
            for (int r = 0; r < here; r++) positions[r] = span.computed + piece.query + (row + r) / share;
            attend_partition(desk, desk.queries.data() + (int64_t)row * h.padded, here, positions, tables + span.table,
                             piece.head, p, h, store_at + (p - piece.first) * between + (int64_t)row * stride);
        }
        desk.ahead.fetch_rest();
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
