// Sixteen lanes of float32 or int32 under one set of names: AVX-512, AVX2 with FMA, or plain C++.
//
// Every operation rounds as IEEE 754 says (fma once), so that all three give the same bits. No contraction happens
// behind our back: the files are compiled with -ffp-contract=off, and fma() is written where it is meant.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define LANES_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES_AVX2 1
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace steelyard {

#if LANES_AVX512

struct F { __m512 v; };
struct I { __m512i v; };

INLINE F zero() { return {_mm512_setzero_ps()}; }
INLINE F set(float x) { return {_mm512_set1_ps(x)}; }
INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
INLINE F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE F abs(F a) { return {_mm512_abs_ps(a.v)}; }
INLINE F round(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
INLINE I izero() { return {_mm512_setzero_si512()}; }
INLINE I iset(int32_t x) { return {_mm512_set1_epi32(x)}; }
INLINE I iadd(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
INLINE I isub(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
INLINE F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
INLINE I to_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }  // nearest, ties to even
// 2^n for n in -126..127, as bits.
INLINE F power2(I n) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n.v, _mm512_set1_epi32(127)), 23))}; }
// 1 where a < b, in a form for choose().
struct M { __mmask16 m; };
INLINE M less(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
INLINE F choose(M m, F yes, F no) { return {_mm512_mask_blend_ps(m.m, no.v, yes.v)}; }
// bfloat16 in memory, float32 in the lanes.
INLINE F load_bf16(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
INLINE void store_bf16(uint16_t* p, F x) {  // nearest, ties to even; finite input
    __m512i bits = _mm512_castps_si512(x.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}
// Sixteen pairs of bfloat16 in memory: the first of each, the second of each.
INLINE void load_pairs(const uint16_t* p, F& first, F& second) {
    const __m512i both = _mm512_loadu_si512(p);
    first = {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))};
    second = {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int32_t)0xffff0000u)))};
}
// To the nearest bfloat16, ties to even, as float32; finite input.
INLINE F round_bf16(F x) {
    __m512i bits = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int32_t)0xffff0000u)))};
}
INLINE void store_i8(int8_t* p, I x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x.v)); }
INLINE F load_i8(const int8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
INLINE float lane(F x, int i) { alignas(64) float out[16]; _mm512_store_ps(out, x.v); return out[i]; }
// 64 unsigned bytes; of each the lower or the upper half.
struct U { __m512i v; };
INLINE U load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
INLINE U lower(U a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
INLINE U upper(U a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
// acc[i] += sum over j < 4 of w[4 i + j] * x[j]: w unsigned bytes, x signed bytes. Exact.
INLINE I dot4(I acc, U w, I x) { return {_mm512_dpbusd_epi32(acc.v, w.v, x.v)}; }
INLINE I broadcast4(const int8_t* x) { int32_t bits; std::memcpy(&bits, x, 4); return {_mm512_set1_epi32(bits)}; }
// Exact for integers of eight bits.
INLINE void store_exact_bf16(uint16_t* p, F x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x.v), 16)));
}
INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
INLINE void prefetch_far(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

#elif LANES_AVX2

struct F { __m256 a, b; };
struct I { __m256i a, b; };

INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE F abs(F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
INLINE F round(F x) {
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
INLINE I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE I iset(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE I iadd(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE I isub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE F power2(I n) {
    const __m256i bias = _mm256_set1_epi32(127);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.a, bias), 23)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.b, bias), 23))};
}
struct M { __m256 a, b; };
INLINE M less(F x, F y) { return {_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)}; }
INLINE F choose(M m, F yes, F no) { return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)}; }
INLINE __m256 widen_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE F load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
INLINE void load_pairs(const uint16_t* p, F& first, F& second) {
    const __m256i low = _mm256_loadu_si256((const __m256i*)p), high = _mm256_loadu_si256((const __m256i*)(p + 16));
    const __m256i upper = _mm256_set1_epi32((int32_t)0xffff0000u);
    first = {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
    second = {_mm256_castsi256_ps(_mm256_and_si256(low, upper)), _mm256_castsi256_ps(_mm256_and_si256(high, upper))};
}
INLINE __m256 round_half(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32((int32_t)0xffff0000u)));
}
INLINE F round_bf16(F x) { return {round_half(x.a), round_half(x.b)}; }
INLINE void store_bf16(uint16_t* p, F x) {
    alignas(32) float wide[16];
    store(wide, x);
    for (int i = 0; i < 16; i++) {
        uint32_t bits;
        std::memcpy(&bits, wide + i, 4);
        p[i] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}
INLINE void store_i8(int8_t* p, I x) {
    alignas(32) int32_t wide[16];
    _mm256_store_si256((__m256i*)wide, x.a);
    _mm256_store_si256((__m256i*)(wide + 8), x.b);
    for (int i = 0; i < 16; i++) p[i] = (int8_t)wide[i];
}
INLINE F load_i8(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
INLINE float lane(F x, int i) { alignas(32) float out[16]; store(out, x); return out[i]; }
// vpmaddubsw would saturate at 16 bits: widen first, so that the sums are exact.
INLINE __m256i dot4_half(__m256i acc, __m256i w, __m256i x16) {
    __m256i low = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(w)), x16);
    __m256i high = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(w, 1)), x16);
    __m256i sums = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xd8);
    return _mm256_add_epi32(acc, sums);
}
INLINE I broadcast4(const int8_t* x) {
    int32_t bits;
    std::memcpy(&bits, x, 4);
    __m256i wide = _mm256_cvtepi8_epi16(_mm_set1_epi32(bits));
    return {wide, wide};
}
struct U { __m256i a, b; };
INLINE U load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
INLINE U lower(U x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
INLINE U upper(U x) { return lower({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
INLINE I dot4(I acc, U w, I x) { return {dot4_half(acc.a, w.a, x.a), dot4_half(acc.b, w.b, x.a)}; }
INLINE void store_exact_bf16(uint16_t* p, F x) { store_bf16(p, x); }
INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
INLINE void prefetch_far(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

#else

struct F { float v[16]; };
struct I { int32_t v[16]; };
struct M { bool v[16]; };
#define EACH for (int i = 0; i < 16; i++)

INLINE F zero() { return {}; }
INLINE F set(float x) { F r; EACH r.v[i] = x; return r; }
INLINE F load(const float* p) { F r; std::memcpy(r.v, p, 64); return r; }
INLINE void store(float* p, F x) { std::memcpy(p, x.v, 64); }
INLINE F add(F a, F b) { EACH a.v[i] += b.v[i]; return a; }
INLINE F sub(F a, F b) { EACH a.v[i] -= b.v[i]; return a; }
INLINE F mul(F a, F b) { EACH a.v[i] *= b.v[i]; return a; }
INLINE F div(F a, F b) { EACH a.v[i] /= b.v[i]; return a; }
INLINE F fma(F a, F b, F c) { EACH a.v[i] = std::fma(a.v[i], b.v[i], c.v[i]); return a; }
INLINE F max(F a, F b) { EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
INLINE F min(F a, F b) { EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
INLINE F abs(F a) { EACH a.v[i] = std::fabs(a.v[i]); return a; }
INLINE F round(F a) { EACH a.v[i] = std::nearbyint(a.v[i]); return a; }
INLINE I izero() { return {}; }
INLINE I iset(int32_t x) { I r; EACH r.v[i] = x; return r; }
INLINE I iadd(I a, I b) { EACH a.v[i] += b.v[i]; return a; }
INLINE I isub(I a, I b) { EACH a.v[i] -= b.v[i]; return a; }
INLINE F to_float(I a) { F r; EACH r.v[i] = (float)a.v[i]; return r; }
INLINE I to_int(F a) { I r; EACH r.v[i] = (int32_t)std::nearbyint(a.v[i]); return r; }
INLINE F power2(I n) { F r; EACH { int32_t bits = (n.v[i] + 127) << 23; std::memcpy(r.v + i, &bits, 4); } return r; }
INLINE M less(F a, F b) { M m; EACH m.v[i] = a.v[i] < b.v[i]; return m; }
INLINE F choose(M m, F yes, F no) { EACH if (m.v[i]) no.v[i] = yes.v[i]; return no; }
INLINE F load_bf16(const uint16_t* p) { F r; EACH { uint32_t bits = (uint32_t)p[i] << 16; std::memcpy(r.v + i, &bits, 4); } return r; }
INLINE void load_pairs(const uint16_t* p, F& first, F& second) {
    EACH {
        const uint32_t a = (uint32_t)p[2 * i] << 16, b = (uint32_t)p[2 * i + 1] << 16;
        std::memcpy(first.v + i, &a, 4);
        std::memcpy(second.v + i, &b, 4);
    }
}
INLINE F round_bf16(F x) {
    EACH { uint32_t bits; std::memcpy(&bits, x.v + i, 4); bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u; std::memcpy(x.v + i, &bits, 4); }
    return x;
}
INLINE void store_bf16(uint16_t* p, F x) {
    EACH { uint32_t bits; std::memcpy(&bits, x.v + i, 4); p[i] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16); }
}
INLINE void store_i8(int8_t* p, I x) { EACH p[i] = (int8_t)x.v[i]; }
INLINE F load_i8(const int8_t* p) { F r; EACH r.v[i] = (float)p[i]; return r; }
INLINE float lane(F x, int i) { return x.v[i]; }
INLINE I broadcast4(const int8_t* x) { I r; for (int i = 0; i < 4; i++) r.v[i] = x[i]; return r; }
struct U { uint8_t v[64]; };
INLINE U load_bytes(const uint8_t* p) { U r; std::memcpy(r.v, p, 64); return r; }
INLINE U lower(U a) { for (int i = 0; i < 64; i++) a.v[i] &= 15; return a; }
INLINE U upper(U a) { for (int i = 0; i < 64; i++) a.v[i] >>= 4; return a; }
INLINE I dot4(I acc, U w, I x) {
    EACH acc.v[i] += w.v[4 * i] * x.v[0] + w.v[4 * i + 1] * x.v[1] + w.v[4 * i + 2] * x.v[2] + w.v[4 * i + 3] * x.v[3];
    return acc;
}
INLINE void store_exact_bf16(uint16_t* p, F x) { store_bf16(p, x); }
INLINE void prefetch(const void*) {}
INLINE void prefetch_far(const void*) {}
#undef EACH

#endif

INLINE float from_bf16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Sum of the lanes as a tree: 8, 4, 2, 1.
INLINE float sum(F x) {
    alignas(64) float v[16];
    store(v, x);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) v[i] += v[i + width];
    return v[0];
}
INLINE float largest(F x) {
    alignas(64) float v[16];
    store(v, x);
    float found = v[0];
    for (int i = 1; i < 16; i++) found = found > v[i] ? found : v[i];
    return found;
}

// e^x, as if x were at most 88, 0 below -87.3; at most 2 units in the last place (Cephes' polynomial of degree 5 after
// x = n ln 2 + r). Every step is one IEEE operation, so that the twin in PyTorch gives the same bits.
INLINE F exp(F x) {
    const M tiny = less(x, set(-87.3f));
    x = min(max(x, set(-87.3f)), set(88.0f));
    const F n = round(mul(x, set(1.44269504088896341f)));
    F r = fma(n, set(-0.693359375f), x);
    r = fma(n, set(2.12194440e-4f), r);
    F p = set(1.9875691500e-4f);
    p = fma(p, r, set(1.3981999507e-3f));
    p = fma(p, r, set(8.3334519073e-3f));
    p = fma(p, r, set(4.1665795894e-2f));
    p = fma(p, r, set(1.6666665459e-1f));
    p = fma(p, r, set(5.0000001201e-1f));
    p = add(fma(p, mul(r, r), r), set(1.0f));
    return choose(tiny, zero(), mul(p, power2(to_int(n))));
}

// gelu by its approximation with tanh is x sigmoid(u): u = 2 sqrt(2 / pi) (x + 0.044715 x^3).
constexpr float GELU_SLOPE = 1.5957691216f, GELU_BEND = 0.0713548163f;
INLINE F gelu_argument(F x) { return mul(x, fma(mul(x, x), set(GELU_BEND), set(GELU_SLOPE))); }

}  // namespace steelyard
