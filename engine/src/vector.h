// One vector of floats, as wide as the instruction set's registers: compiler extensions of GCC and Clang, so the same
// source becomes AVX-512, AVX2, SSE2 or NEON. Everything is in the instruction set's own namespace.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__wasm_relaxed_simd__)
#include <wasm_simd128.h>
#endif

namespace repvgg::REPVGG_ISA {

#if defined(__AVX512F__)
constexpr int WIDTH = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int WIDTH = 4, REGISTERS = 32;
#else
constexpr int WIDTH = 4, REGISTERS = 16;
#endif

#define REPVGG_INLINE inline __attribute__((always_inline))
#define REPVGG_INLINE_LAMBDA __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(WIDTH * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(WIDTH * sizeof(int32_t))));
typedef float Unaligned
    __attribute__((vector_size(WIDTH * sizeof(float)), aligned(sizeof(float))));  // a vector may alias its floats

REPVGG_INLINE Vec load(const float *p) { return *reinterpret_cast<const Unaligned *>(p); }
REPVGG_INLINE void store(float *p, Vec v) { *reinterpret_cast<Unaligned *>(p) = v; }
REPVGG_INLINE Vec splat(float x) { return x - Vec{}; }       // x - 0 is x; x + 0 would not be, for x = -0
REPVGG_INLINE Vec relu(Vec v) { return v < 0 ? Vec{} : v; }  // NaN stays NaN

template <int... I>
constexpr Ints counted(std::integer_sequence<int, I...>) {
    return Ints{I...};
}
/// -1 in lanes [first, last), 0 in the others.
REPVGG_INLINE Ints lanes_between(int first, int last) {
    constexpr Ints lane = counted(std::make_integer_sequence<int, WIDTH>{});
    return (lane >= first) & (lane < last);
}

/// sum + w * x, in one instruction where there is one.
REPVGG_INLINE Vec multiply_add(Vec w, Vec x, Vec sum) {
#if defined(__wasm_relaxed_simd__)
    return (Vec)wasm_f32x4_relaxed_madd((v128_t)w, (v128_t)x, (v128_t)sum);
#else
    return sum + w * x;
#endif
}

/// The first n lanes only.
REPVGG_INLINE void store(float *p, Vec v, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
#else
    for (int lane = 0; lane < n; lane++) p[lane] = v[lane];
#endif
}

/// The lowest byte of each lane, side by side.
REPVGG_INLINE void store_bytes(void *to, Ints v) {
#if defined(__AVX512F__)
    _mm_storeu_si128(static_cast<__m128i *>(to), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v));
#elif defined(__SSE2__)
    v &= 0xff;
#if defined(__AVX2__)
    const __m128i low = _mm256_castsi256_si128((__m256i)v), high = _mm256_extracti128_si256((__m256i)v, 1);
#else
    const __m128i low = (__m128i)v, high = low;
#endif
    const __m128i halves = _mm_packs_epi32(low, high), bytes = _mm_packus_epi16(halves, halves);
    memcpy(to, &bytes, WIDTH);
#else
    for (int lane = 0; lane < WIDTH; lane++) static_cast<char *>(to)[lane] = static_cast<char>(v[lane]);
#endif
}
/// At 1.5 * 2^23 a float's last bit is worth 1: an addition rounds, and leaves the integer in the lowest bits.
constexpr float ROUND = 12582912.0f;

REPVGG_INLINE void prefetch(const float *p) { __builtin_prefetch(p, 0, 2); }
REPVGG_INLINE void prefetch_to_write(const float *p) { __builtin_prefetch(p, 1, 3); }

template <int N>
struct Index {
    static constexpr int value = N;
};

template <class F, int... I>
REPVGG_INLINE void each(F &&f, std::integer_sequence<int, I...>) {
    (f(Index<I>{}), ...);
}

/// f(Index<0>{}), f(Index<1>{}), ..., f(Index<N - 1>{}): a loop that is certainly unrolled.
template <int N, class F>
REPVGG_INLINE void each(F &&f) {
    each(f, std::make_integer_sequence<int, N>{});
}

}  // namespace repvgg::REPVGG_ISA
