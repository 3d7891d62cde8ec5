// Where the numbers of one transformed tile go: put(p, index, v) takes the vector `index` of its channels, of product
// p.
#pragma once

#include "gemm.h"
#include "kernels.h"

namespace repvgg::REPVGG_ISA {

/// To V, as products of that kind want them.
template <class Element>
struct Target {
    static constexpr int numbers = 1;  // in a lane of what is put
    float *at;
    int64_t product, block;
    REPVGG_INLINE void put(int p, int index, Vec v) const {
        Element::put(at + p * product + index / Element::pack * block, index % Element::pack, v);
    }
};

/// For maps of bytes, four of which are in a lane and stay so.
struct Copied {
    static constexpr int numbers = BYTES;
    float *at;
    int64_t product, block;
    REPVGG_INLINE void put(int p, int index, Vec v) const { store(at + p * product + index * block, v); }
};

/// The lanes that are channels. Those beyond the last channel hold what lies there, perhaps another image's pixels:
/// they become 0.
struct Lanes {
    int vectors;
    Ints last;  // that count in the last vector
    explicit Lanes(int depth)
        : vectors(static_cast<int>(ceil_div(depth, WIDTH))), last(lanes_between(0, depth - (vectors - 1) * WIDTH)) {}
    REPVGG_INLINE Vec cleared(int index, Vec v) const {
        const Ints counting = index + 1 < vectors ? ~Ints{} : last;
        return (Vec)((Ints)v & counting);
    }
};

/// To V, where channels are odd and two share 32 bits: what is beside the last one meets a weight of 0, so it must be
/// no NaN.
template <class Element>
struct Odd {
    static constexpr int numbers = 1;
    Target<Element> to;
    Lanes lanes;
    REPVGG_INLINE void put(int p, int index, Vec v) const { to.put(p, index, lanes.cleared(index, v)); }
};

/// As floats, for one tile that is scaled afterwards.
struct Staged {
    static constexpr int numbers = 1;
    float *at;
    int64_t product;
    Lanes lanes;
    REPVGG_INLINE void put(int p, int index, Vec v) const {
        store(at + p * product + index * WIDTH, lanes.cleared(index, v));
    }
};

}  // namespace repvgg::REPVGG_ISA
