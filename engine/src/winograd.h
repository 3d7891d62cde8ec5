// Winograd's minimal filtering in one dimension: matrices made from points at compile time, and their application to
// vectors.
//
// Toom and Cook: m outputs of an r-tap filter are the values of a polynomial product at n - 1 points and at infinity, n
// = m + r - 1:
//
//     y = A [(G w) * (B d)],   A: m x n,  G: n x r,  B: n x n,   * elementwise
//
// For the points p_j: A[i][j] = p_j^i, G[j][k] = p_j^k / prod_{l != j} (p_j - p_l), and row j of B holds the
// coefficients of prod_{l != j} (x - p_l). In two dimensions each matrix is applied to rows and then to columns.
//
// The points decide how rounding errors grow. Those below minimise sum_ij A[i][j]^2 |G_j|^2 |B_j|^2, the predicted
// error for random weights and inputs, and are then rounded to few bits, so that the matrices' entries are exact in
// float, but for some of F(7)'s, which have up to 31 bits. They are symmetric, +p and -p side by side, so that the
// rows of B (and the columns of A) come in pairs that share their even and their odd halves.
#pragma once

#include "vector.h"

namespace repvgg::REPVGG_ISA {

template <int ROWS, int COLUMNS>
struct Matrix {
    double at[ROWS][COLUMNS] = {};
    static constexpr int rows = ROWS, columns = COLUMNS;
};

template <int N>
struct Points {
    double at[N];
};

template <int OUTPUTS, int TAPS>
struct ToomCook {
    static constexpr int n = OUTPUTS + TAPS - 1;
    Matrix<OUTPUTS, n> output;
    Matrix<n, TAPS> weights;
    Matrix<n, n> input;

    constexpr explicit ToomCook(const Points<n - 1> &points) {
        for (int j = 0; j < n; j++) {
            // Row j of B: all factors but the j-th; at infinity (j = n - 1), all.
            input.at[j][0] = 1;
            double scale = 1;
            for (int l = 0, degree = 0; l < n - 1; l++) {
                if (l == j) continue;
                degree++;
                for (int i = degree; i >= 0; i--)
                    input.at[j][i] =
                        (i > 0 ? input.at[j][i - 1] : 0) - points.at[l] * (i < degree ? input.at[j][i] : 0);
                if (j < n - 1) scale *= points.at[j] - points.at[l];
            }
            if (j < n - 1) {
                double power = 1;
                for (int i = 0; i < (OUTPUTS > TAPS ? OUTPUTS : TAPS); i++, power *= points.at[j]) {
                    if (i < OUTPUTS) output.at[i][j] = power;
                    if (i < TAPS) weights.at[j][i] = power / scale;
                }
            }
        }
        output.at[OUTPUTS - 1][n - 1] = 1;
        weights.at[n - 1][TAPS - 1] = 1;
    }
};

template <int OUTPUTS, int TAPS>
constexpr Points<OUTPUTS + TAPS - 2> points = {};
template <>
constexpr Points<3> points<2, 3> = {{0, 1, -1}};
template <>
constexpr Points<5> points<4, 3> = {{0, .625, -.625, 1.5, -1.5}};
template <>
constexpr Points<6> points<5, 3> = {{.28125, -.28125, .84375, -.84375, 1.75, -1.75}};
template <>
constexpr Points<7> points<6, 3> = {{0, .5, -.5, 1, -1, 2, -2}};
template <>
constexpr Points<8> points<7, 3> = {{.234375, -.234375, .6875, -.6875, 1.125, -1.125, 2.1875, -2.1875}};
template <>
constexpr Points<2> points<2, 2> = {{.625, -.625}};
template <>
constexpr Points<4> points<4, 2> = {{.375, -.375, 1.25, -1.25}};
template <>
constexpr Points<7> points<7, 2> = {{0, .5, -.5, 1, -1, 2, -2}};

/// Sum of coefficient times number over columns `first`, `first + step`, ... of a row; zeros cost nothing and ones an
/// addition.
template <class M, int row, int first, int step>
REPVGG_INLINE Vec dot(const Vec *in) {
    constexpr auto &c = M::matrix.at[row];
    Vec sum{};
    bool empty = true;
    // Backwards, because the last coefficient is often 1: then the sum starts with the number itself.
    each<M::matrix.columns>([&](auto i) REPVGG_INLINE_LAMBDA {
        constexpr int j = M::matrix.columns - 1 - decltype(i)::value;
        if constexpr (j >= first && (j - first) % step == 0 && c[j] != 0) {
            constexpr float x = static_cast<float>(c[j]);
            if (empty) {
                sum = x == 1 ? in[j] : in[j] * x;
                empty = false;
            } else {
                sum = x == 1 ? sum + in[j] : sum + in[j] * x;
            }
        }
    });
    return sum;
}

/// +1 or -1 where row i + 1 is that times row i with every other sign changed: a pair of points +p, -p. 0 otherwise.
template <class M>
constexpr int mirrored(int i) {
    if (i < 0 || i + 1 >= M::matrix.rows) return 0;
    for (int sign = -1; sign <= 1; sign += 2) {
        bool fits = true, both[2] = {false, false};
        for (int j = 0; j < M::matrix.columns; j++) {
            const double a = M::matrix.at[i][j], b = M::matrix.at[i + 1][j];
            fits = fits && b == (j % 2 ? -sign : sign) * a;
            both[j % 2] = both[j % 2] || a != 0;
        }
        if (fits && both[0] && both[1]) return sign;
    }
    return 0;
}

/// out = matrix * in, where rows come in mirrored pairs.
template <class M>
REPVGG_INLINE void apply_rows(const Vec *in, Vec *out) {
    each<M::matrix.rows>([&](auto index) REPVGG_INLINE_LAMBDA {
        constexpr int i = decltype(index)::value, sign = mirrored<M>(i);
        if constexpr (sign != 0) {
            const Vec even = dot<M, i, 0, 2>(in), odd = dot<M, i, 1, 2>(in);
            out[i] = even + odd;
            out[i + 1] = sign > 0 ? even - odd : odd - even;
        } else if constexpr (mirrored<M>(i - 1) == 0) {
            out[i] = dot<M, i, 0, 1>(in);
        }
    });
}

/// Whether columns j and j + 1 belong to a pair of points +p, -p.
template <class M>
constexpr bool mirrored_columns(int j) {
    if (j < 0 || j + 1 >= M::matrix.columns || M::matrix.at[0][j] == 0) return false;
    for (int i = 0; i < M::matrix.rows; i++)
        if (M::matrix.at[i][j + 1] != (i % 2 ? -1 : 1) * M::matrix.at[i][j] || M::matrix.at[i][j] == 0) return false;
    return true;
}

/// The columns of a pair weigh, in even rows, their sum; in odd rows, their difference.
template <class M>
constexpr auto halved() {
    auto half = M::matrix;
    for (int j = 0; j < half.columns; j++)
        if (mirrored_columns<M>(j))
            for (int i = 0; i < half.rows; i++) {
                if (i % 2) half.at[i][j + 1] = half.at[i][j];
                half.at[i][i % 2 ? j : j + 1] = 0;
            }
    return half;
}

template <class M>
struct Halves {
    static constexpr auto matrix = halved<M>();
};

/// out = matrix * in, where columns come in mirrored pairs.
template <class M>
REPVGG_INLINE void apply_columns(const Vec *in, Vec *out) {
    Vec halves[M::matrix.columns];
    each<M::matrix.columns>([&](auto index) REPVGG_INLINE_LAMBDA {
        constexpr int j = decltype(index)::value;
        if constexpr (mirrored_columns<M>(j)) {
            halves[j] = in[j] + in[j + 1];
            halves[j + 1] = in[j] - in[j + 1];
        } else if constexpr (!mirrored_columns<M>(j - 1)) {
            halves[j] = in[j];
        }
    });
    each<M::matrix.rows>([&](auto i) REPVGG_INLINE_LAMBDA {
        out[decltype(i)::value] = dot<Halves<M>, decltype(i)::value, 0, 1>(halves);
    });
}

/// OUTPUTS outputs of a 3-tap filter of stride 1.
template <int OUTPUTS, int STRIDE>
struct Winograd {
    static constexpr int outputs = OUTPUTS, samples = OUTPUTS + 2, frequencies = OUTPUTS + 2;
    static constexpr ToomCook<OUTPUTS, 3> cook{points<OUTPUTS, 3>};
    struct Input {
        static constexpr auto matrix = cook.input;
    };
    struct Output {
        static constexpr auto matrix = cook.output;
    };
    static constexpr Matrix<frequencies, 3> weights = cook.weights;

    static REPVGG_INLINE void input(const Vec *samples, Vec *out) { apply_rows<Input>(samples, out); }
    static REPVGG_INLINE void output(const Vec *sums, Vec *out) { apply_columns<Output>(sums, out); }
};

template <int OUTPUTS>
constexpr Matrix<2 * OUTPUTS + 1, 3> strided_weights(const ToomCook<OUTPUTS, 2> &cook) {
    Matrix<2 * OUTPUTS + 1, 3> all;
    for (int j = 0; j <= OUTPUTS; j++) {
        all.at[j][0] = cook.weights.at[j][0];
        all.at[j][2] = cook.weights.at[j][1];
        if (j < OUTPUTS) all.at[OUTPUTS + 1 + j][1] = 1;
    }
    return all;
}

/// Stride 2: the even samples meet the two outer taps, in a Winograd algorithm of their own; the odd ones meet the
/// middle tap alone.
template <int OUTPUTS>
struct Winograd<OUTPUTS, 2> {
    static constexpr int outputs = OUTPUTS, samples = 2 * OUTPUTS + 1, frequencies = 2 * OUTPUTS + 1;
    static constexpr ToomCook<OUTPUTS, 2> cook{points<OUTPUTS, 2>};
    struct Input {
        static constexpr auto matrix = cook.input;
    };
    struct Output {
        static constexpr auto matrix = cook.output;
    };
    static constexpr Matrix<frequencies, 3> weights = strided_weights<OUTPUTS>(cook);

    static REPVGG_INLINE void input(const Vec *samples, Vec *out) {
        Vec even[OUTPUTS + 1];
        for (int i = 0; i <= OUTPUTS; i++) even[i] = samples[2 * i];
        apply_rows<Input>(even, out);
        for (int i = 0; i < OUTPUTS; i++) out[OUTPUTS + 1 + i] = samples[2 * i + 1];
    }
    static REPVGG_INLINE void output(const Vec *sums, Vec *out) {
        apply_columns<Output>(sums, out);
        for (int i = 0; i < OUTPUTS; i++) out[i] += sums[OUTPUTS + 1 + i];
    }
};

}  // namespace repvgg::REPVGG_ISA
