// Products of rows with packed weights, for each row alone: what stands beside it changes no bit.
//
// int8: y[t, n] = (sum over k of x[t, k] * w[n, k]) * w_scale[n] * x_scale[t] (+ bias[n]), the sum exact. Weights are
// stored as w + 128 (unsigned) in panels of 32 outputs: [N / 32][K / 4][32][4]. dot4 multiplies unsigned by signed
// bytes; 128 times the sum of x is taken off at the end.
//
// int8 or int4 by groups of inputs, with a scale each, of weights and of x: y[t, n] = sum over groups g, in order from
// 0, of (sum over k in g of x[t, k] * w[n, k]) * w_scale[n, g] * x_scale[t, g] (+ bias[n]). Scales of weights are bfloat16
// [N / 32][K / group][32]. int4 is stored as w + 8 by eights, [N / 32][K / 8][32][4]: input 8 i + j in the lower half of
// byte j, input 8 i + 4 + j in the upper.
//
// bfloat16: y[t, n] = sum over k of x[t, k] * w[n, k] (+ bias[n]), 32 products at a time, each 32 by pairs as in
// `attention.h`. Weights are stored by pairs: [N / 32][K / 2][32][2].
#pragma once

#include <algorithm>

#include "tiles.h"

namespace steelyard {

constexpr int PANEL = 32;

// What becomes of a product.
enum Epilogue { STORE = 0, ADD = 1, SILU_GATE = 2, GELU_GATE = 3 };

struct Product {
    const uint8_t* weight;   // packed
    const void* scale;       // [N] float32, padded to a multiple of 32; of groups bfloat16; null of bfloat16 weights
    const float* bias;       // [N] padded, or null
    const int8_t* x;         // [T][row_bytes]: int8 or bfloat16
    const float* x_scale;    // [T, groups]
    const int32_t* x_sum;    // [T, groups] sums over k of x
    float* y;                // [T, stride]
    int32_t inputs, outputs, stride, epilogue;
    int32_t bits, group;     // of a weight; inputs that share a scale

    INLINE bool dense() const { return bits == 16; }
    INLINE bool grouped() const { return bits == 4 || group != inputs; }
    INLINE int groups() const { return inputs / group; }
    INLINE int row_bytes() const { return dense() ? 2 * inputs : inputs; }
    INLINE int64_t panel_bytes() const { return (int64_t)inputs * bits / 8 * PANEL; }
    INLINE const uint8_t* panel(int panel) const { return weight + panel * panel_bytes(); }
    INLINE const int8_t* row(int t) const { return x + (int64_t)t * row_bytes(); }
};

// The values of one row and 16 outputs.
INLINE F scaled(I acc, const Product& p, int t, int n) {
    const F value = to_float(isub(acc, iset(128 * p.x_sum[t])));
    return mul(mul(value, load((const float*)p.scale + n)), set(p.x_scale[t]));
}

INLINE bool is_gate(int32_t epilogue) { return epilogue == SILU_GATE || epilogue == GELU_GATE; }

// What a gate lets through: x sigmoid(x), or gelu's x sigmoid(u).
INLINE F opened(F x, int32_t epilogue) {
    const F u = epilogue == GELU_GATE ? gelu_argument(x) : x;
    return div(x, add(set(1.0f), exp(sub(zero(), u))));
}

// What becomes of a row's values with one panel, from its output n on.
INLINE void finish(const Product& p, int t, int n, F first, F second) {
    if (p.bias) {
        first = add(first, load(p.bias + n));
        second = add(second, load(p.bias + n + 16));
    }
    const int left = p.outputs - n;
    if (is_gate(p.epilogue)) {  // 16 gates, then the 16 values that they open
        store(p.y + (int64_t)t * p.stride + n / 2, mul(opened(first, p.epilogue), second));
        return;
    }
    float* y = p.y + (int64_t)t * p.stride + n;
    alignas(64) float both[PANEL];
    float* out = left >= PANEL ? y : both;
    if (p.epilogue == ADD && left >= PANEL) {
        store(out, add(load(y), first));
        store(out + 16, add(load(y + 16), second));
        return;
    }
    store(out, first);
    store(out + 16, second);
    if (left < PANEL)
        for (int i = 0; i < left; i++) y[i] = p.epilogue == ADD ? y[i] + both[i] : both[i];
}

constexpr int MOST_ROWS = 12;  // 24 accumulators

template <int ROWS>
void panel_rows(const Product& p, int panel, int row) {
    const int groups = p.inputs / 4;
    const uint8_t* w = p.panel(panel);
    const int8_t* x = p.row(row);
    // Loops over ROWS are unrolled: an array that is indexed at run time would live in memory.
    I low[ROWS], high[ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) low[r] = high[r] = izero();
    for (int k = 0; k < groups; k++) {
        if (ROWS <= 6) {
            prefetch(w + 4096);
            prefetch(w + 4096 + 64);
        }
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            const I value = broadcast4(x + (int64_t)r * p.inputs + 4 * k);
            low[r] = dot4(low[r], load_bytes(w), value);
            high[r] = dot4(high[r], load_bytes(w + 64), value);
        }
        w += PANEL * 4;
    }
    I sums[2 * ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
        sums[2 * r] = low[r];
        sums[2 * r + 1] = high[r];
    }
    asm volatile("" : : "r"(sums) : "memory");  // the sums are in memory from here on, and only from here on
    for (int r = 0; r < ROWS; r++) {
        const int t = row + r, n = panel * PANEL;
        finish(p, t, n, scaled(sums[2 * r], p, t, n), scaled(sums[2 * r + 1], p, t, n + 16));
    }
}

constexpr int MOST_GROUPED_ROWS = 6;  // 12 accumulators and 12 totals

template <int ROWS, bool HALVES>
void grouped_rows(const Product& p, int panel, int row) {
    const int groups = p.groups(), step = HALVES ? 8 : 4;
    const uint8_t* w = p.panel(panel);
    const uint16_t* scale = (const uint16_t*)p.scale + (int64_t)panel * groups * PANEL;
    F total[2 * ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < 2 * ROWS; r++) total[r] = zero();
    for (int g = 0; g < groups; g++, scale += PANEL) {
        const int8_t* x = p.row(row) + g * p.group;
        I low[ROWS], high[ROWS];
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) low[r] = high[r] = iset((HALVES ? -8 : -128) * p.x_sum[(row + r) * groups + g]);
        for (int k = 0; k < p.group; k += step, w += PANEL * 4) {
            prefetch(w + 4096);
            prefetch(w + 4096 + 64);
            const U first = load_bytes(w), second = load_bytes(w + 64);
            const U first_low = HALVES ? lower(first) : first, second_low = HALVES ? lower(second) : second;
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                const I value = broadcast4(x + (int64_t)r * p.inputs + k);
                low[r] = dot4(low[r], first_low, value);
                high[r] = dot4(high[r], second_low, value);
            }
            if (!HALVES) continue;
            const U first_high = upper(first), second_high = upper(second);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                const I value = broadcast4(x + (int64_t)r * p.inputs + k + 4);
                low[r] = dot4(low[r], first_high, value);
                high[r] = dot4(high[r], second_high, value);
            }
        }
        const F first_scale = load_bf16(scale), second_scale = load_bf16(scale + 16);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            const F x_scale = set(p.x_scale[(row + r) * groups + g]);
            total[2 * r] = add(total[2 * r], mul(mul(to_float(low[r]), first_scale), x_scale));
            total[2 * r + 1] = add(total[2 * r + 1], mul(mul(to_float(high[r]), second_scale), x_scale));
        }
    }
    F sums[2 * ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < 2 * ROWS; r++) sums[r] = total[r];
    asm volatile("" : : "r"(sums) : "memory");
    for (int r = 0; r < ROWS; r++) finish(p, row + r, panel * PANEL, sums[2 * r], sums[2 * r + 1]);
}

constexpr int MOST_DENSE_ROWS = 4;  // 16 accumulators and 8 totals

template <int ROWS>
void dense_rows(const Product& p, int panel, int row) {
    const uint16_t* w = (const uint16_t*)p.panel(panel);
    F total[2 * ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < 2 * ROWS; r++) total[r] = zero();
    for (int begin = 0; begin < p.inputs; begin += 32) {
        F even[2 * ROWS], odd[2 * ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < 2 * ROWS; r++) even[r] = odd[r] = zero();
        for (int k = begin; k < begin + 32; k += 2, w += 2 * PANEL) {
            prefetch(w + 2048);
            prefetch(w + 2048 + 32);
            F first, second, first_high, second_high;
            load_pairs(w, first, second);
            load_pairs(w + PANEL, first_high, second_high);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                const uint16_t* x = (const uint16_t*)p.row(row + r) + k;
                const F a = set(from_bf16(x[0])), b = set(from_bf16(x[1]));
                even[2 * r] = fma(a, first, even[2 * r]);
                odd[2 * r] = fma(b, second, odd[2 * r]);
                even[2 * r + 1] = fma(a, first_high, even[2 * r + 1]);
                odd[2 * r + 1] = fma(b, second_high, odd[2 * r + 1]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < 2 * ROWS; r++) total[r] = add(total[r], add(even[r], odd[r]));
    }
    F sums[2 * ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < 2 * ROWS; r++) sums[r] = total[r];
    asm volatile("" : : "r"(sums) : "memory");
    for (int r = 0; r < ROWS; r++) finish(p, row + r, panel * PANEL, sums[2 * r], sums[2 * r + 1]);
}

using PanelRows = void (*)(const Product&, int, int);
static const PanelRows PANEL_ROWS[MOST_ROWS + 1] = {
    nullptr,       panel_rows<1>, panel_rows<2>, panel_rows<3>,  panel_rows<4>,  panel_rows<5>, panel_rows<6>,
    panel_rows<7>, panel_rows<8>, panel_rows<9>, panel_rows<10>, panel_rows<11>, panel_rows<12>};
static const PanelRows BYTE_GROUP_ROWS[MOST_GROUPED_ROWS + 1] = {
    nullptr,
    grouped_rows<1, false>, grouped_rows<2, false>, grouped_rows<3, false>,
    grouped_rows<4, false>, grouped_rows<5, false>, grouped_rows<6, false>};
static const PanelRows HALF_GROUP_ROWS[MOST_GROUPED_ROWS + 1] = {
    nullptr,
    grouped_rows<1, true>, grouped_rows<2, true>, grouped_rows<3, true>,
    grouped_rows<4, true>, grouped_rows<5, true>, grouped_rows<6, true>};
static const PanelRows DENSE_ROWS[MOST_DENSE_ROWS + 1] = {nullptr, dense_rows<1>, dense_rows<2>, dense_rows<3>,
                                                          dense_rows<4>};

#if LANES_AMX

constexpr int TILE_ROWS = 16, MOST_TILE_ROWS = 2 * TILE_ROWS, TILE_BYTES = 64;  // of a row
constexpr int FEWEST_TILE_ROWS = 2;  // fewer are read from memory as fast without tiles

// The lines from `at` to `end`, some at a time.
struct Fetch {
    const uint8_t *at, *end;
    int turns;

    INLINE void some() {
        for (int turn = 0; turn < turns && at < end; turn++, at += 4 * 64) {
            prefetch_far(at);
            prefetch_far(at + 64);
            prefetch_far(at + 128);
            prefetch_far(at + 192);
        }
    }
};

// Part `chunk` of `chunks` of the panel after `panel`, while `rows` rows are computed.
INLINE Fetch fetch_next(const Product& p, int panel, int chunk, int chunks, int rows) {
    const int64_t size = p.panel_bytes(), part = (size / chunks + 255) / 256 * 256;
    const uint8_t* next = p.panel(panel + 1);
    const int pauses = p.row_bytes() / TILE_BYTES + rows, groups = part / 256;
    return {next + chunk * part, std::min(next + (chunk + 1) * part, next + size), (groups + pauses - 1) / pauses};
}

template <bool DENSE, int SUMS, int X, int W>
INLINE void tile_product() {
    if (DENSE) tile_pairs<SUMS, X, W>();
    else tile_dot4<SUMS, X, W>();
}

// The same by tiles, for up to 32 rows; x may be read (and is not used) up to a multiple of 16 rows. Meanwhile a part of
// the next panel is fetched, spread over all that is to be done: few lines can be on their way at once.
template <bool DENSE>
void panel_tiles(const Product& p, int panel, int row, int rows, Fetch fetch) {
    const uint8_t* w = p.panel(panel);
    const int8_t* x = p.row(row);
    const int row_bytes = p.row_bytes();
    const bool both = rows > TILE_ROWS;
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int k = 0; k < row_bytes; k += TILE_BYTES) {
        fetch.some();
        tile_load<6>(w, PANEL * 4);
        tile_load<7>(w + 64, PANEL * 4);
        tile_load<4>(x + k, row_bytes);
        tile_product<DENSE, 0, 4, 6>();
        tile_product<DENSE, 1, 4, 7>();
        if (both) {
            tile_load<5>(x + k + TILE_ROWS * row_bytes, row_bytes);
            tile_product<DENSE, 2, 5, 6>();
            tile_product<DENSE, 3, 5, 7>();
        }
        w += PANEL * TILE_BYTES;
    }
    alignas(64) int32_t sums[MOST_TILE_ROWS * PANEL];
    tile_store<0>(sums, PANEL * 4);
    tile_store<1>(sums + 16, PANEL * 4);
    if (both) {
        tile_store<2>(sums + TILE_ROWS * PANEL, PANEL * 4);
        tile_store<3>(sums + TILE_ROWS * PANEL + 16, PANEL * 4);
    }
    for (int r = 0; r < rows; r++) {
        fetch.some();
        const int t = row + r, n = panel * PANEL;
        const __m512i low = _mm512_load_si512(sums + r * PANEL), high = _mm512_load_si512(sums + r * PANEL + 16);
        if (DENSE) finish(p, t, n, {_mm512_castsi512_ps(low)}, {_mm512_castsi512_ps(high)});
        else finish(p, t, n, scaled({low}, p, t, n), scaled({high}, p, t, n + 16));
    }
}

#endif

// The share of thread `me` of `threads`: a range of panels, all rows.
inline void product(const Product& p, Tiles& tiles, int tokens, int me, int threads) {
    const int panels = (p.outputs + PANEL - 1) / PANEL;
    const int first = (int64_t)panels * me / threads, last = (int64_t)panels * (me + 1) / threads;
#if LANES_AMX
    if (!p.grouped() && tokens >= FEWEST_TILE_ROWS && p.row_bytes() % TILE_BYTES == 0) {
        tiles.use(tokens < TILE_ROWS ? tokens : TILE_ROWS);
        const auto run = p.dense() ? panel_tiles<true> : panel_tiles<false>;
        const int chunks = (tokens + MOST_TILE_ROWS - 1) / MOST_TILE_ROWS;
        for (int panel = first; panel < last; panel++)
            for (int chunk = 0; chunk < chunks; chunk++) {
                const int row = chunk * MOST_TILE_ROWS, rows = std::min(tokens - row, MOST_TILE_ROWS);
                run(p, panel, row, rows, fetch_next(p, panel, chunk, chunks, rows));
            }
        return;
    }
#endif
    (void)tiles;
    const int most = p.dense() ? MOST_DENSE_ROWS : p.grouped() ? MOST_GROUPED_ROWS : MOST_ROWS;
    const int chunks = (tokens + most - 1) / most;
    const PanelRows* const grouped = p.bits == 4 ? HALF_GROUP_ROWS : BYTE_GROUP_ROWS;
    const PanelRows* const run = p.dense() ? DENSE_ROWS : p.grouped() ? grouped : PANEL_ROWS;
    for (int panel = first; panel < last; panel++)
        for (int c = 0; c < chunks; c++) {
            const int begin = (int64_t)tokens * c / chunks, end = (int64_t)tokens * (c + 1) / chunks;
            run[end - begin](p, panel, begin);
        }
}

}  // namespace steelyard
