// An operator of a net, checked once, with what holds for images of any size.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "repvgg_engine.h"

namespace repvgg {

struct Layer {
    repvgg_layer spec;
    ConvShape shape;          // of a convolution
    std::vector<float> bias;  // a number for each lane of each vector of each group
    // Whether what comes before is a convolution with ReLU and without groups, so that this layer's input can be bytes.
    bool after_relu = false;
    std::atomic<int64_t> nanoseconds{0};  // that threads have spent in it

    bool is_conv() const { return spec.op == REPVGG_CONV; }
    bool has_windows() const { return is_conv() || spec.op == REPVGG_MAX_POOL; }
    int out_channels() const { return is_conv() ? spec.out_channels : spec.in_channels; }
};

/// Layer `index` of a net, after `before` (null: the first). Throws std::invalid_argument for what cannot be.
std::unique_ptr<Layer> make_layer(const repvgg_layer &spec, int index, const Layer *before, const Kernels &kernels);

/// Whether an algorithm computes this layer.
bool fits(const Layer &layer, const Algorithm &algorithm);

/// Floats of a convolution's packed weights.
int64_t packed_floats(const ConvShape &shape, const Algorithm &algorithm, int width);

/// Rows and columns of what a layer makes of a map of that size. Throws std::invalid_argument where it cannot be.
void output_size(const Layer &layer, int index, const int size[2], int out[2]);

}  // namespace repvgg
