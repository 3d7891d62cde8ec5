// Direct convolutions of 8-bit integers: feature maps are bytes, and stay so between layers that are both computed so.
//
// A number x of a map becomes round(x / s), at most 255, where s is the largest number that the map held when the model
// was calibrated over 255: `repvgg quantize --to native` writes it into the model file. Maps are what a ReLU leaves, so
// bytes have no sign. A layer that reads bytes has whoever comes before it write them, when the bias is added and the
// ReLU applied; float32 is not written. Weights have a scale for each output channel. With sums of a pixel's bytes the
// bits are the same on every instruction set, alone and in any batch. Larger numbers than the calibration met become
// 255, and what is no number becomes one: a map of bytes cannot hold it.
//
// No sum overflows: sum_k |x_k w_k| <= 255 * sum_k |w_k|, and the scale of the weights is chosen such that sum_k |w_k|
// <= WEIGHTS_SUM_8. For fewer than 66,000 numbers |w_k| <= 127 says that already.
#pragma once

#include "integer.h"

namespace repvgg::REPVGG_ISA {

static_assert(static_cast<int64_t>(LARGEST_BYTE) * WEIGHTS_SUM_8 <= INT32_MAX, "a sum of 32 bits would overflow");
static_assert(MOST_BYTES < WEIGHTS_SUM_8, "the roundings of so many weights would leave no room for them");

/// 32 bits of inputs and weights hold four neighbouring channels. Sums are integers until a pixel's are whole, and then
/// worth the scale that follows the weights of the first product.
struct Bytes {
    static constexpr int pack = BYTES, chunk = MOST_BYTES, scale_rows = 1;
    static constexpr bool scaled = false, bytes = true;

    static REPVGG_INLINE Vec broadcast(const float *p) { return broadcast_bits(p); }
    static REPVGG_INLINE Vec multiply_add(Vec w, Vec x, Vec sum) { return add_fours(w, x, sum); }

    /// As in Integers; one scale for all products, because they all add into one sum.
    template <class Row, class Scales, class Transformed>
    static void pack_weights(const ConvShape &c, int products, int depth, const Row &row, const Scales &scales,
                             const Transformed &transformed) {
        double sum[WIDTH] = {}, largest[WIDTH] = {};
        for (int i = 0; i < depth; i++)
            transformed(i, [&](int, const double *numbers) {
                for (int lane = 0; lane < WIDTH; lane++) {
                    const double size = fabs(numbers[lane]);
                    sum[lane] += size;
                    largest[lane] = largest[lane] > size ? largest[lane] : size;
                }
            });
        float scale[WIDTH];
        for (int lane = 0; lane < WIDTH; lane++) {
            // Rounding adds at most a half for each weight; as much again for the rounding of this very scale.
            // A NaN is in the sum, and stays.
            const double by_sum = sum[lane] / (WEIGHTS_SUM_8 - static_cast<int64_t>(products) * depth),
                         by_size = largest[lane] / LARGEST_WEIGHT_8;
            scale[lane] = static_cast<float>(by_size > by_sum ? by_size : by_sum);
            scales(0, 0)[lane] = scale[lane] * (c.largest_input / LARGEST_BYTE);
        }
        for (int i = 0; i < depth; i++)
            transformed(i, [&](int p, const double *numbers) {
                char *to = reinterpret_cast<char *>(row(p, i / pack));
                for (int lane = 0; lane < WIDTH; lane++) {
                    const auto rounded = rounded_weight<int8_t>(numbers[lane], scale[lane]);
                    memcpy(to + lane * sizeof(float) + i % pack, &rounded, sizeof rounded);
                }
            });
    }
};

}  // namespace repvgg::REPVGG_ISA
