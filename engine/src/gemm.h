// The one micro-kernel: a few rows (tiles or pixels) times a panel of output channels, with all sums in registers.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace repvgg::REPVGG_ISA {

constexpr int ROWS = 8;
constexpr int LINE = 16;  // floats in a cache line
/// Vectors in a panel, at most.
constexpr int MAX_PANEL = REGISTERS == 32 ? 4 : 2;
/// Rows for a panel of so many vectors: rows x vectors sums, one row of weights and one input fit the registers.
constexpr int rows_for(int vectors) { return vectors < MAX_PANEL ? ROWS : 6; }

/// What floats of either size have in common.
template <class Element>
struct Floating {
    /// A sum over more than so many numbers of 32 bits is made of parts, so that rounding errors grow with the parts'
    /// length, not with the whole.
    static constexpr int chunk = 192;
    static constexpr int scale_rows = 0;
    static constexpr bool scaled = false, bytes = false;

    /// The weights of a vector of output channels: row(p, k) is where the k-th 32 bits of product p lie;
    /// transformed(i, sink) calls sink(p, numbers of the lanes) for channel i of each product.
    template <class Row, class Scales, class Transformed>
    static void pack_weights(const ConvShape &, int, int depth, const Row &row, const Scales &,
                             const Transformed &transformed) {
        for (int i = 0; i < depth; i++)
            transformed(i, [&](int p, const double *numbers) {
                float *to = row(p, i / Element::pack);
                for (int lane = 0; lane < WIDTH; lane++)
                    Element::weight(to + lane, i % Element::pack, static_cast<float>(numbers[lane]));
            });
    }
};

/// What 32 bits of the transformed inputs and weights hold: one float, or two neighbouring channels in bfloat16 (or two
/// or four as integers: integer.h, bytes.h). `scaled`: inputs get scales at run time, and sums are floats when they
/// leave the registers; `scale_rows`: that follow a chunk's weights.
struct Float32 : Floating<Float32> {
    static constexpr int pack = 1;
    static REPVGG_INLINE void put(float *at, int, Vec v) { store(at, v); }
    static REPVGG_INLINE void weight(float *at, int, float w) { *at = w; }
    static REPVGG_INLINE Vec broadcast(const float *p) { return splat(*p); }
    static REPVGG_INLINE Vec multiply_add(Vec w, Vec x, Vec sum) { return REPVGG_ISA::multiply_add(w, x, sum); }
};

#ifdef __AVX512BF16__
struct BFloat16 : Floating<BFloat16> {
    static constexpr int pack = 2;
    static REPVGG_INLINE void put(float *at, int half, Vec v) {
        typedef float Half __attribute__((vector_size(32), aligned(sizeof(float))));
        reinterpret_cast<Half *>(at + half * WIDTH / 2)[0] = (Half)_mm512_cvtneps_pbh(v);
    }
    static REPVGG_INLINE void weight(float *at, int half, float w) {
        uint32_t bits;
        memcpy(&bits, &w, sizeof bits);
        const uint16_t rounded =
            static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
        memcpy(reinterpret_cast<char *>(at) + 2 * half, &rounded, sizeof rounded);
    }
    static REPVGG_INLINE Vec broadcast(const float *p) {
        int bits;
        memcpy(&bits, p, sizeof bits);
        return (Vec)_mm512_set1_epi32(bits);
    }
    static REPVGG_INLINE Vec multiply_add(Vec w, Vec x, Vec sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
    }
};
#endif

/// Numbers of at least 0 as bytes; larger ones than 255 become 255.
REPVGG_INLINE void store_rounded(float *to, Vec v) {
    const Vec largest = splat(LARGEST_BYTE);
    store_bytes(to, (Ints)((v > largest ? largest : v) + splat(ROUND)));
}

template <class Element>
REPVGG_INLINE Vec plus(Vec a, Vec b) {
    if constexpr (Element::bytes) return (Vec)((Ints)a + (Ints)b);
    else return a + b;
}

/// sums[r][n] = sum over k of v[k][r] * u[k][n], or added to what is there. v: blocks of WIDTH k, in each R rows of
/// WIDTH numbers; u: k rows of N vectors, then perhaps rows of scales; sums: R rows of N vectors; scales: of the R
/// rows, if they have any. `ahead`: weights that will be needed next, fetched by the way, so many lines of the cache
/// for each k.
template <class Element, int R, int N>
void multiply(const float *v, const float *u, float *sums, int k, bool add, const float *scales, const float *ahead,
              int lines) {
    Vec sum[R][N] = {};
    const auto step = [&](const float *x, const float *w) REPVGG_INLINE_LAMBDA {
        Vec weights[N];
        each<N>([&](auto n) REPVGG_INLINE_LAMBDA { weights[n.value] = load(w + n.value * WIDTH); });
        each<R>([&](auto r) REPVGG_INLINE_LAMBDA {
            const Vec input = Element::broadcast(x + r.value * WIDTH);
            each<N>([&](auto n) REPVGG_INLINE_LAMBDA {
                sum[r.value][n.value] = Element::multiply_add(weights[n.value], input, sum[r.value][n.value]);
            });
        });
    };
    for (; k >= WIDTH; k -= WIDTH) {
        each<WIDTH>([&](auto lane) REPVGG_INLINE_LAMBDA {
            step(v + lane.value, u + lane.value * N * WIDTH);
            prefetch(ahead + lane.value * LINE);
        });
        for (int line = WIDTH; line < lines * WIDTH; line++) prefetch(ahead + line * LINE);
        v += R * WIDTH;
        u += WIDTH * N * WIDTH;
        ahead += lines * WIDTH * LINE;
    }
    for (; k > 0; k--, v++, u += N * WIDTH) step(v, u);
    const auto put = [&](float *to, bool added) REPVGG_INLINE_LAMBDA {
        each<R>([&](auto r) REPVGG_INLINE_LAMBDA {
            each<N>([&](auto n) REPVGG_INLINE_LAMBDA {
                float *at = to + (r.value * N + n.value) * WIDTH;
                store(at, added ? plus<Element>(load(at), sum[r.value][n.value]) : sum[r.value][n.value]);
            });
        });
    };
    if constexpr (Element::scaled) {
        float raw[R * N * WIDTH];
        put(raw, false);
        Element::finish(raw, R, N, scales, u, add, sums);
    } else {
        put(sums, add);
    }
}

using Multiply = void (*)(const float *, const float *, float *, int, bool, const float *, const float *, int);

template <class Element, int... I>
constexpr Multiply pick(int rows, int vectors, std::integer_sequence<int, I...>) {
    constexpr Multiply all[] = {
        multiply<Element, (I / MAX_PANEL < rows_for(I % MAX_PANEL + 1) ? I / MAX_PANEL + 1 : 1), I % MAX_PANEL + 1>...};
    return all[(rows - 1) * MAX_PANEL + vectors - 1];
}

/// The kernel for so many rows and vectors.
template <class Element>
Multiply multiply_for(int rows, int vectors) {
    return pick<Element>(rows, vectors, std::make_integer_sequence<int, ROWS * MAX_PANEL>{});
}

}  // namespace repvgg::REPVGG_ISA
