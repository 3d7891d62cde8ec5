// What the machine-independent half of the engine (net.cpp) asks of the half that is compiled once for each instruction set
// (kernels.cpp). Plain data and function pointers only: a function compiled for AVX-512 must never be linked in the place of its
// portable twin, so the two halves share no inline function with external linkage.
#pragma once

#include <cstdint>

namespace repvgg {

/// A kernel that meets no more numbers than this is one sum.
constexpr int MOST_JOINED = 64;

/// Where the numbers of a feature map lie: NHWC, distances in floats. The channels of a pixel are contiguous.
struct Map {
    long pixel, row, image;
};

/// A convolution on maps of one size, by one algorithm.
struct Conv {
    int groups, in_channels, out_channels;  // channels of one group
    int kernel[2], stride[2], dilation[2];
    bool relu;
    int joined;   // direct: so many taps of the kernel are one sum: 1, or a row, which meets contiguous numbers, or all where they are few
    int products;  // matrix products that a block of tiles takes
    int k;         // channels that each of them sums over
    int panels;    // the output channels of a group are cut into so many panels
    int rows;      // tiles that are multiplied at a time
    Map in, out;
    int size[2];                        // rows and columns of the output
    const int *origins[2];              // first output row of each row of tiles, first output column of each column of tiles
    int tiles[2];
    const float *weights, *bias;        // packed; bias: one number for each lane of each vector
};

/// A piece of it for one thread: tiles [first, last) of all images, panels [first_panel, last_panel) of one group.
struct Piece {
    const float *in;  // sample (-padding, -padding) of the first image
    float *out;       // sample (0, 0)
    int group, first_panel, last_panel;
    long first, last;
    float *scratch;
};

/// Squeeze-excite: channels times sigmoid(expand(relu(reduce(means)))), then perhaps a ReLU, in place.
struct Excite {
    int channels, hidden;
    bool relu;
    const float *reduce, *reduce_bias, *expand, *expand_bias;
};

/// One way to compute a convolution: tiles of outputs x outputs; `samples` inputs across, `products` multiplications across.
struct Algorithm {
    const char *name;
    int outputs, samples, products, stride;  // outputs = 1, products = 0: direct, for any geometry
    int packed;                              // channels in 32 bits of inputs and weights: 1, or 2 in bfloat16
    void (*run)(const Conv &, const Piece &);
    /// Transforms and packs the weights of one panel of one group; `weights` are the layer's own.
    void (*pack)(const Conv &, const float *weights, int group, int panel, float *packed);
    /// Floats of scratch memory that a piece of `tiles` tiles needs.
    long (*scratch)(const Conv &, long tiles);
};

struct Kernels {
    const char *isa;
    int width;       // floats in a vector
    int max_panel;   // vectors in a panel of output channels, at most
    int (*rows)(int vectors);  // for panels of so many vectors
    const Algorithm *algorithms;
    int count;
    /// Rows of an NCHW or NHWC image to a map, a map to an NCHW image, a map's means; `size`: rows and columns.
    void (*read_floats)(const float *image, int channels, const int size[2], int first_row, int last_row, const Map &, float *out);
    void (*read_bytes)(const uint8_t *image, int channels, const int size[2], int first_row, int last_row, const float *scale,
                       const float *shift, const Map &, float *out);
    void (*write)(const float *map, const Map &, int channels, const int size[2], float *image);
    void (*pool)(const float *map, const Map &, int channels, const int size[2], float *means);
    void (*excite)(const Excite &, float *map, const Map &, const int size[2], float *scratch);
};

/// Vectors of output channels before panel `i` of `panels`.
static inline int panel_start(int vectors, int panels, int i) { return static_cast<int>(static_cast<long>(vectors) * i / panels); }

/// Vectors, or blocks, that `n` takes in units of `of`.
static inline long ceil_div(long n, long of) { return (n + of - 1) / of; }

}  // namespace repvgg
