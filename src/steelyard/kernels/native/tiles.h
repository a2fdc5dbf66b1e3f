// The matrix tiles of AMX: sixteen rows of 64 bytes. Tiles 0 to 3 hold sums, 4 and 5 rows of the left factor, 6 and 7
// of the right one. Other forms have the type and none of its uses.
#pragma once

#include "simd.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && LANES_AVX512
#define LANES_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace steelyard {

#if LANES_AMX

// Linux lends the tiles to a process that asks; false: not here.
inline bool ask_for_tiles() {
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

// One thread's tiles, while it lives.
class Tiles {
  public:
    Tiles() = default;
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
    ~Tiles() {
        if (rows_) _tile_release();
    }
    // Tiles of `rows` rows on the left and in the sums, 1 to 16. Forgets what the tiles hold if that is a change.
    INLINE void use(int rows) {
        if (rows != rows_) configure(rows);
    }

  private:
    void configure(int rows) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int tile = 0; tile < 8; tile++) {
            shape.bytes[tile] = 64;
            shape.rows[tile] = tile < 6 ? rows : 16;
        }
        asm volatile("ldtilecfg %0" : : "m"(shape) : "memory");
        rows_ = rows;
    }
    int rows_ = 0;
};

// The compiler's own wrappers do not say that they read memory.
template <int TILE>
INLINE void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
INLINE void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}
// sums += signed bytes of x times unsigned bytes of w, by fours. Exact.
template <int SUMS, int X, int W>
INLINE void tile_dot4() {
    asm volatile("tdpbsud %%tmm%c0, %%tmm%c1, %%tmm%c2" : : "i"(W), "i"(X), "i"(SUMS));
}
// sums += (products of the first of each pair, by fma in order) + (those of the second): see `attention.h`.
template <int SUMS, int X, int W>
INLINE void tile_pairs() {
    asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" : : "i"(W), "i"(X), "i"(SUMS));
}

#else

inline bool ask_for_tiles() { return true; }
struct Tiles {};

#endif

}  // namespace steelyard
