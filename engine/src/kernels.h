// What the machine-independent half of the engine (net.cpp, plan.cpp) asks of the half that is compiled once for each
// instruction set (kernels.cpp). Plain data and function pointers only: a function compiled for AVX-512 must never be
// linked in the place of its portable twin, so the two halves share no inline function with external linkage.
//
// The words:
//     sample     a number of the input map that a tile reads
//     tile       m x m outputs computed together, from (m + 2) x (m + 2) samples; for the direct algorithm one output
//     frequency  a row of Winograd's transform: a tile has m + 2 across
//     product    a matrix product of tiles by channels: for each pair of frequencies (Winograd), or each tap (direct)
//     tap        a weight's place in the kernel; a 3x3 kernel has 9
//     group      of channels, as in a grouped convolution; of tiles, those that the micro-kernel multiplies at a time
//     panel      of a group's output channels: as many vectors as the micro-kernel multiplies at a time
//     block      of tiles: as many as fit a core's cache once they are transformed
//     piece      a block times some panels: what a thread computes in one go
//     slot       a thread's number in a job, and the scratch memory that goes with it
//     lane       one number of a vector
#pragma once

#include <cstdint>

namespace repvgg {

/// A kernel that meets no more numbers than this is one sum.
constexpr int MOST_JOINED = 64;
/// Channels that share 32 bits in a map of bytes, and what the largest byte is.
constexpr int BYTES = 4, LARGEST_BYTE = 255;
/// A sum of bytes is of no more numbers than this, so that it fits 32 bits (bytes.h).
constexpr int MOST_BYTES = 1 << 22;

/// Where the numbers of a feature map lie: NHWC, distances in floats. The channels of a pixel are contiguous; in a map
/// of bytes a float's place holds four of them.
struct Map {
    int64_t pixel, row, image;
};

/// What a convolution is, whatever the size of its input: made when a net is loaded.
struct ConvShape {
    int groups, in_channels, out_channels;  // channels of one group
    int kernel[2], stride[2], dilation[2];
    bool relu;
    int joined;  // direct: so many taps are one product: 1, or a row, which meets contiguous numbers, or all where they
                 // are few
    int panels;  // of a group
    int rows;    // tiles that are multiplied at a time
    float largest_input;  // as far as it is known: the number that becomes the largest byte; otherwise 0
};

/// How an algorithm cuts its output into tiles: made for each plan.
struct ConvTiling {
    int products, depth;    // matrix products of a block, and the numbers that each of them sums over
    int size[2], tiles[2];  // rows and columns of the output, and of tiles
    const int *origins[2];  // first output row of each row of tiles, first output column of each column of tiles
};

/// A convolution by one algorithm on maps that have their places.
struct Conv : ConvShape, ConvTiling {
    Map in, out;
    const float *weights, *bias;  // packed; bias: one number for each lane of each vector
    float bytes_of_one;           // where the output is a map of bytes: what 1 becomes; otherwise 0
};

/// A piece of it for one thread: tiles [first, last) of all images, panels [first_panel, last_panel) of one group.
struct Piece {
    const float *in;  // sample (-padding, -padding) of the first image
    float *out;       // sample (0, 0)
    int group, first_panel, last_panel;
    int64_t first, last;
    float *scratch;
};

/// Squeeze-excite: channels times sigmoid(expand(relu(reduce(means)))), then perhaps a ReLU, in place.
struct Excite {
    int channels, hidden;
    bool relu;
    const float *reduce, *reduce_bias, *expand, *expand_bias;
};

/// The largest number of each channel in each window, which is cut off at the map's edge. Sizes: rows and columns.
struct MaxPool {
    int channels, kernel[2], stride[2], padding[2], size[2], out_size[2];
    Map in, out;
};

/// One way to compute a convolution. Numbers are across: a tile has outputs x outputs outputs.
struct Algorithm {
    const char *name;
    int outputs, samples, frequencies, stride;  // direct, for any geometry: 1 output, 0 frequencies
    bool ranged, bytes;  // for layers whose largest input is known; for inputs that are maps of bytes
    void (*run)(const Conv &, const Piece &);
    /// Rows of a product's packed weights, for sums over so many numbers.
    int64_t (*weight_rows)(int depth);
    /// Transforms and packs the weights of one panel of one group; `weights` are the layer's own.
    void (*pack)(const ConvShape &, const float *weights, int group, int panel, float *packed);
    /// Floats of scratch memory that a piece of `tiles` tiles needs.
    int64_t (*scratch)(const Conv &, int64_t tiles);
};

struct Kernels {
    const char *isa;
    int width;                 // floats in a vector
    int max_panel;             // vectors in a panel of output channels, at most
    int (*rows)(int vectors);  // for panels of so many vectors
    const Algorithm *algorithms;
    int count;
    /// Rows of an NCHW or NHWC image to a map, rows of a map to an NCHW image, a map's means; `size`: rows and columns.
    void (*read_floats)(const float *image, int channels, const int size[2], int first_row, int last_row, const Map &,
                        float *out);
    void (*read_bytes)(const uint8_t *image, int channels, const int size[2], int first_row, int last_row,
                       const float *scale, const float *shift, const Map &, float *out);
    void (*write)(const float *map, const Map &, int channels, const int size[2], int first_row, int last_row,
                  float *image);
    void (*pool)(const float *map, const Map &, int channels, const int size[2], float *means);
    void (*max_pool)(const MaxPool &, const float *map, float *out);
    void (*excite)(const Excite &, float *map, const Map &, const int size[2], float *scratch);
};

/// Matrix products that a block takes, and the numbers that each of them sums over, by an algorithm of so many
/// frequencies.
static inline int products_of(const ConvShape &c, int frequencies) {
    return frequencies ? frequencies * frequencies : c.kernel[0] * c.kernel[1] / c.joined;
}
static inline int depth_of(const ConvShape &c, int frequencies) {
    return frequencies ? c.in_channels : c.joined * c.in_channels;
}

/// Vectors of output channels before panel `i` of `panels`.
static inline int panel_start(int vectors, int panels, int i) {
    return static_cast<int>(static_cast<int64_t>(vectors) * i / panels);
}

/// Vectors, or blocks, that `n` takes in units of `of`.
static inline int64_t ceil_div(int64_t n, int64_t of) { return (n + of - 1) / of; }

}  // namespace repvgg
