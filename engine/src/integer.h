// Products of integers of 16 or 8 bits with sums in 32 bits: twice or four times float32's numbers in a register, and
// on processors with VNNI as many times its multiplications. (Direct convolutions of maps of bytes: bytes.h.)
//
// A number x of a transformed tile becomes round(x / s), where s is the tile's largest number in that product over
// the largest input there is: one scale for each tile and product, found at run time. So nothing has to be calibrated,
// no number is cut off, the scales of a smooth image's products may be far apart, and an image's numbers depend on that
// image alone, in whatever batch it comes. Weights have a scale for each product, output channel and chunk of the sum,
// found when they are packed. Sums are multiplied by both scales when they leave the registers, so that everything
// after the matrix product is in float32, as ever.
//
// No sum overflows. Of a chunk, sum_k |v_k w_k| <= largest input * sum_k |w_k|, whatever the image, and the scale of
// the weights is chosen such that sum_k |w_k| <= WEIGHTS_SUM and |w_k| <= the largest weight. For 16-bit weights of
// equal size this leaves 13 to 15 bits, about what the inputs have: both halves round about as much.
#pragma once

#include <math.h>

#include "gemm.h"
#include "kernels.h"

namespace repvgg::REPVGG_ISA {

constexpr int LARGEST_INPUT = 8191, LARGEST_WEIGHT = 32767, WEIGHTS_SUM = 1 << 18;
static_assert(static_cast<int64_t>(LARGEST_INPUT) * WEIGHTS_SUM <= INT32_MAX, "a sum of 32 bits would overflow");
constexpr int LARGEST_WEIGHT_8 = 127, WEIGHTS_SUM_8 = INT32_MAX / LARGEST_BYTE;
/// Smaller than this, numbers count as 0: their scales would be no normal floats.
constexpr float TINY = 1e-30f;

typedef uint32_t Bits __attribute__((vector_size(WIDTH * sizeof(uint32_t))));
typedef int16_t Pairs __attribute__((vector_size(WIDTH * sizeof(int32_t))));

/// Elements I of the 2n of a and b. GCC before 12 has it under another name.
template <int... I, class V>
REPVGG_INLINE V elements(V a, V b) {
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
    return __builtin_shuffle(a, b, V{I...});
#else
    return __builtin_shufflevector(a, b, I...);
#endif
}

/// Lanes exchanged with those `step` before and behind.
template <int STEP, int... I>
REPVGG_INLINE Ints rotated(Ints v, std::integer_sequence<int, I...>) {
    return elements<(I + STEP) % WIDTH...>(v, v);
}

template <int STEP>
REPVGG_INLINE Ints largest_of_lanes(Ints v) {
    const Ints other = rotated<STEP>(v, std::make_integer_sequence<int, WIDTH>{});
    const Ints larger = v > other ? v : other;
    if constexpr (STEP == 1) return larger;
    else return largest_of_lanes<STEP / 2>(larger);
}

/// The largest size of a product's numbers. As bits: so that a NaN is larger than all numbers.
REPVGG_INLINE float largest_size(const float *numbers, int vectors) {
    Ints most{};
    for (int v = 0; v < vectors; v++) {
        const Ints size = (Ints)load(numbers + v * WIDTH) & 0x7fffffff;
        most = size > most ? size : most;
    }
    return ((Vec)largest_of_lanes<WIDTH / 2>(most))[0];
}

/// The lower halves of both, side by side.
template <int... I>
REPVGG_INLINE Pairs lower_halves(Bits a, Bits b, std::integer_sequence<int, I...>) {
    return elements<(2 * I)...>((Pairs)a, (Pairs)b);
}

/// 32 bits in every lane.
REPVGG_INLINE Vec broadcast_bits(const float *p) {
    int32_t bits;
    memcpy(&bits, p, sizeof bits);
    return (Vec)(bits - Ints{});
}

/// A weight in units of its scale; 0 where that is no normal number.
template <class Weight>
Weight rounded_weight(double weight, float scale) {
    const bool usable = scale > TINY && scale < INFINITY;
    return static_cast<Weight>(usable ? lrint(weight / static_cast<double>(scale)) : 0);
}

#ifdef __SSE2__
/// A sum that is made now: compilers would otherwise keep many products, for which there are no registers, and add them
/// later in another order.
template <class V>
REPVGG_INLINE Vec in_turn(V sum) {
    asm("" : "+v"(sum));
    return (Vec)sum;
}
#endif

/// Adds the products of two pairs of 16-bit numbers to each sum.
REPVGG_INLINE Vec add_pairs(Vec w, Vec x, Vec sum) {
#if defined(__AVX512BW__)
    return in_turn(_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16((__m512i)w, (__m512i)x)));
#elif defined(__AVX2__)
    return in_turn(_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)w, (__m256i)x)));
#elif defined(__SSE2__)
    return in_turn(_mm_add_epi32((__m128i)sum, _mm_madd_epi16((__m128i)w, (__m128i)x)));
#else
    const Ints low = ((Ints)w << 16 >> 16) * ((Ints)x << 16 >> 16), high = ((Ints)w >> 16) * ((Ints)x >> 16);
    return (Vec)((Bits)sum + (Bits)low + (Bits)high);
#endif
}

/// Adds the products of four bytes, of which those of x have no sign, to each sum. Without VNNI as pairs of 16-bit
/// numbers, even bytes and odd ones: `vpmaddubsw`, which would take them as they are, cuts off what leaves 16 bits.
REPVGG_INLINE Vec add_fours(Vec w, Vec x, Vec sum) {
#if defined(__AVX512VNNI__)
    return (Vec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#else
    const Bits even = (Bits)x & 0x00ff00ff, odd = (Bits)x >> 8 & 0x00ff00ff;
    const Pairs even_weights = (Pairs)w << 8 >> 8, odd_weights = (Pairs)w >> 8;
    return add_pairs((Vec)odd_weights, (Vec)odd, add_pairs((Vec)even_weights, (Vec)even, sum));
#endif
}

/// What integers of either size have in common. Element::Weight: their type; `offset`: what is added to inputs, so that
/// they are bytes of no sign.
template <class Element>
struct Integers {
    static constexpr bool scaled = true, bytes = false;

    /// What sums are worth: to floats, without what the offset brought in (the second row of scales), times the scales
    /// of their rows and of their weights. A function of its own, so that it takes no registers from the sums while
    /// they are made.
    static __attribute__((noinline)) void finish(const float *sums, int rows, int vectors, const float *of_rows,
                                                 const float *of_weights, bool add, float *to) {
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++, sums += WIDTH, to += WIDTH) {
                Vec value = __builtin_convertvector((Ints)load(sums), Vec);
                if constexpr (Element::offset > 0) value -= load(of_weights + (vectors + v) * WIDTH);
                value = value * load(of_weights + v * WIDTH) * splat(of_rows[r]);
                store(to, add ? load(to) + value : value);
            }
    }

    /// Rounds a tile's transformed numbers, `depth` of each product, and notes their scales. from: product p at
    /// p * from_product; to: as Target says; scales: `tiles` apart.
    static inline void quantise(const float *from, int64_t from_product, int products, int depth, float *to,
                                int64_t to_product, int64_t to_block, float *scales, int64_t tiles) {
        constexpr float most = Element::largest_input;
        const int vectors = static_cast<int>(ceil_div(depth, WIDTH));
        for (int p = 0; p < products; p++, from += from_product, to += to_product, scales += tiles) {
            const float largest = largest_size(from, vectors);
            const bool usable = largest > TINY && largest < INFINITY;
            // Infinities and NaNs make NaNs of the tile's outputs.
            *scales = usable ? largest * (1.0f / most) : largest <= TINY ? 0 : NAN;
            Element::round_all(from, vectors, splat(usable ? most / largest : 0), to, to_block);
        }
    }

    /// Weights of a vector of output channels: row(p, k) is where the k-th 32 bits of product p lie, scales(p, c) the
    /// scales of its chunk c; transformed(i, sink) calls sink(p, numbers of the lanes) for channel i of each product.
    template <class Row, class Scales, class Transformed>
    static void pack_weights(const ConvShape &, int products, int depth, const Row &row, const Scales &scales,
                             const Transformed &transformed) {
        using Weight = typename Element::Weight;
        constexpr int length = Element::chunk * Element::pack;
        // In the places of the scales the sums of sizes, in a chunk's first row the largest.
        for (int i = 0; i < depth; i++)
            transformed(i, [&](int p, const double *numbers) {
                float *sum = scales(p, i / length), *largest = row(p, i / length * Element::chunk);
                for (int lane = 0; lane < WIDTH; lane++) {
                    const float size = static_cast<float>(fabs(numbers[lane]));
                    sum[lane] = (i % length ? sum[lane] : 0) + size;
                    largest[lane] = i % length && largest[lane] > size ? largest[lane] : size;
                }
            });
        for (int p = 0; p < products; p++)
            for (int c = 0; c < ceil_div(depth, length); c++) {
                float *sum = scales(p, c), *largest = row(p, c * Element::chunk);
                for (int lane = 0; lane < WIDTH; lane++) {
                    // Rounding adds at most a half for each weight; as much again for the roundings of this very sum.
                    // A NaN is in the sum, and stays.
                    const float by_sum = sum[lane] / (Element::weights_sum - length),
                                by_size = largest[lane] / Element::largest_weight;
                    sum[lane] = by_size > by_sum ? by_size : by_sum;
                    largest[lane] = 0;
                    if constexpr (Element::offset > 0) scales(p, c, 1)[lane] = 0;
                }
            }
        for (int i = 0; i < depth; i++)
            transformed(i, [&](int p, const double *numbers) {
                const float *scale = scales(p, i / length);
                char *to = reinterpret_cast<char *>(row(p, i / Element::pack));
                for (int lane = 0; lane < WIDTH; lane++) {
                    const auto rounded = rounded_weight<Weight>(numbers[lane], scale[lane]);
                    memcpy(to + lane * sizeof(float) + i % Element::pack * sizeof rounded, &rounded, sizeof rounded);
                    if constexpr (Element::offset > 0)
                        scales(p, i / length, 1)[lane] += static_cast<float>(Element::offset * rounded);
                }
            });
    }
};

/// 32 bits of inputs and weights hold two neighbouring channels.
struct Integer16 : Integers<Integer16> {
    using Weight = int16_t;
    static constexpr int pack = 2, chunk = 128, scale_rows = 1, offset = 0;
    static constexpr int largest_input = LARGEST_INPUT, largest_weight = LARGEST_WEIGHT, weights_sum = WEIGHTS_SUM;

    static REPVGG_INLINE Vec broadcast(const float *p) { return broadcast_bits(p); }
    static REPVGG_INLINE Vec multiply_add(Vec w, Vec x, Vec sum) {
#if defined(__AVX512VNNI__)
        return (Vec)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#else
        return add_pairs(w, x, sum);
#endif
    }
    static REPVGG_INLINE void round_all(const float *from, int vectors, Vec inverse, float *to, int64_t to_block) {
        const Vec round = splat(ROUND);
        for (int v = 0; v < vectors; v += 2, to += to_block) {
            const Vec first = load(from + v * WIDTH), second = v + 1 < vectors ? load(from + (v + 1) * WIDTH) : Vec{};
            store(to, (Vec)lower_halves((Bits)(first * inverse + round), (Bits)(second * inverse + round),
                                        std::make_integer_sequence<int, 2 * WIDTH>{}));
        }
    }
};

/// 32 bits of inputs and weights hold four neighbouring channels. Inputs are -127 to 127, and 128 more as bytes.
struct Integer8 : Integers<Integer8> {
    using Weight = int8_t;
    static constexpr int pack = 4, chunk = 64, scale_rows = 2, offset = 128;
    static constexpr int largest_input = 127, largest_weight = LARGEST_WEIGHT_8, weights_sum = WEIGHTS_SUM_8;

    static REPVGG_INLINE Vec broadcast(const float *p) { return broadcast_bits(p); }
    static REPVGG_INLINE Vec multiply_add(Vec w, Vec x, Vec sum) { return add_fours(w, x, sum); }
    static REPVGG_INLINE void round_all(const float *from, int vectors, Vec inverse, float *to, int64_t to_block) {
        const Vec round = splat(ROUND + offset);
        for (int v = 0; v < vectors; v++) {
            char *at = reinterpret_cast<char *>(to + v / pack * to_block) + v % pack * WIDTH;
            store_bytes(at, (Ints)(load(from + v * WIDTH) * inverse + round));
        }
    }
};

}  // namespace repvgg::REPVGG_ISA
