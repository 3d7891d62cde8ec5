#include "layer.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace repvgg {

namespace {

constexpr int MOST_CHANNELS = 1 << 20, MOST_GEOMETRY = 1 << 16, MOST_SIDE = 1 << 20;
/// Of a convolution's kernel, and numbers in all of a layer's kernels, so that no product of a layer's sizes overflows.
constexpr int64_t MOST_TAPS = 1 << 20, MOST_WEIGHTS = 1 << 30;
/// Of an input's numbers; of those in 8 bits also the least that the largest is, so that scales are normal numbers.
constexpr float MOST_INPUT = 1e15f, LEAST_INPUT = 1e-15f;

void check_channels(const repvgg_layer &spec, const Layer *before, const std::string &where) {
    const auto check = [&](int n) {
        if (n < 1 || n > MOST_CHANNELS) throw std::invalid_argument(where + " has " + std::to_string(n) + " channels");
    };
    check(spec.in_channels);
    if (spec.op == REPVGG_CONV || spec.op == REPVGG_SQUEEZE_EXCITE) check(spec.out_channels);
    if (!before && spec.op != REPVGG_CONV) throw std::invalid_argument("the first layer is no convolution");
    if (before && spec.in_channels != before->out_channels())
        throw std::invalid_argument(where + " does not fit the one before it");
}

void check_conv(const repvgg_layer &spec, const std::string &where) {
    for (int axis = 0; axis < 2; axis++)
        if (std::min({spec.kernel[axis], spec.stride[axis], spec.dilation[axis]}) < 1 || spec.padding[axis] < 0 ||
            std::max({spec.kernel[axis], spec.stride[axis], spec.dilation[axis], spec.padding[axis]}) > MOST_GEOMETRY)
            throw std::invalid_argument(where + " is a convolution that cannot be");
    const float range = spec.largest_input;
    if (range != 0 && !(range >= LEAST_INPUT && range <= MOST_INPUT))
        throw std::invalid_argument(where + " has a largest input that cannot be");
    if (spec.groups < 1 || spec.in_channels % spec.groups || spec.out_channels % spec.groups)
        throw std::invalid_argument(where + " has " + std::to_string(spec.groups) +
                                    " groups, which do not divide its channels");
}

void check_max_pool(const repvgg_layer &spec, const std::string &where) {
    for (int axis = 0; axis < 2; axis++)
        if (std::min(spec.kernel[axis], spec.stride[axis]) < 1 || spec.padding[axis] < 0 ||
            spec.padding[axis] > spec.kernel[axis] / 2 ||
            std::max(spec.kernel[axis], spec.stride[axis]) > MOST_GEOMETRY)
            throw std::invalid_argument(where + " is a max-pool that cannot be");
}

void check_weights(const repvgg_layer &spec, const std::string &where) {
    const int64_t taps = spec.op == REPVGG_CONV ? static_cast<int64_t>(spec.kernel[0]) * spec.kernel[1] : 1;
    const int64_t depth = spec.op == REPVGG_CONV ? spec.in_channels / spec.groups : spec.in_channels;
    if (taps > MOST_TAPS || taps * depth > MOST_WEIGHTS / spec.out_channels)
        throw std::invalid_argument(where + " has more weights than this engine takes");
    if (!spec.weight || !spec.bias || (spec.op == REPVGG_SQUEEZE_EXCITE && !(spec.weight2 && spec.bias2)))
        throw std::invalid_argument(where + " has no weights");
}

/// dense: a pixel's channels are next to the next pixel's, without a gap.
ConvShape conv_shape(const repvgg_layer &spec, bool dense, const Kernels &kernels) {
    ConvShape c;
    c.groups = spec.groups, c.in_channels = spec.in_channels / spec.groups,
    c.out_channels = spec.out_channels / spec.groups;
    std::copy(spec.kernel, spec.kernel + 2, c.kernel);
    std::copy(spec.stride, spec.stride + 2, c.stride);
    std::copy(spec.dilation, spec.dilation + 2, c.dilation);
    c.relu = spec.relu != 0;
    c.largest_input = spec.largest_input;
    const bool rows = dense && spec.groups == 1 && spec.dilation[1] == 1;
    const int taps = c.kernel[0] * c.kernel[1];
    c.joined = !rows ? 1 : static_cast<int64_t>(taps) * c.in_channels <= MOST_JOINED ? taps : c.kernel[1];
    const int vectors = static_cast<int>(ceil_div(c.out_channels, kernels.width));
    const int panels = static_cast<int>(ceil_div(vectors, kernels.max_panel));
    c.panels = std::min(vectors, panels > 1 ? panels + panels % 2 : 1);  // even, for two threads to share
    c.rows = kernels.rows(static_cast<int>(ceil_div(vectors, c.panels)));
    return c;
}

std::vector<float> padded_bias(const repvgg_layer &spec, const ConvShape &c, int width) {
    const int64_t lanes = ceil_div(c.out_channels, width) * width;
    std::vector<float> bias(static_cast<size_t>(c.groups * lanes));
    for (int i = 0; i < spec.out_channels; i++)
        bias[static_cast<size_t>(i / c.out_channels * lanes + i % c.out_channels)] = spec.bias[i];
    return bias;
}

/// Whether its input can be a map of bytes: without a sign, and so few to a sum that it does not overflow.
bool fits_bytes(const Layer &layer) {
    const int64_t taps = static_cast<int64_t>(layer.spec.kernel[0]) * layer.spec.kernel[1];
    return layer.after_relu && layer.spec.groups == 1 && taps * layer.spec.in_channels <= MOST_BYTES;
}

}  // namespace

std::unique_ptr<Layer> make_layer(const repvgg_layer &spec, int index, const Layer *before, const Kernels &kernels) {
    const std::string where = "layer " + std::to_string(index);
    if (spec.op < REPVGG_CONV || spec.op > REPVGG_MAX_POOL)
        throw std::invalid_argument(where + " has an unknown operator, " + std::to_string(spec.op));
    check_channels(spec, before, where);
    if (spec.op == REPVGG_CONV) check_conv(spec, where);
    if (spec.op == REPVGG_MAX_POOL) check_max_pool(spec, where);
    if (spec.op == REPVGG_CONV || spec.op == REPVGG_SQUEEZE_EXCITE) check_weights(spec, where);
    auto layer = std::make_unique<Layer>();
    layer->spec = spec;
    if (!layer->is_conv()) std::fill(layer->spec.dilation, layer->spec.dilation + 2, 1);
    if (layer->is_conv()) {
        layer->shape = conv_shape(spec, !before || spec.in_channels % kernels.width == 0, kernels);
        layer->bias = padded_bias(spec, layer->shape, kernels.width);
        layer->after_relu = before && before->is_conv() && before->shape.relu && before->shape.groups == 1;
    }
    return layer;
}

bool fits(const Layer &layer, const Algorithm &algorithm) {
    const repvgg_layer &s = layer.spec;
    if (!layer.is_conv() || (algorithm.ranged && !(s.largest_input > 0))) return false;
    if (algorithm.bytes && !fits_bytes(layer)) return false;
    if (algorithm.frequencies == 0) return true;
    const bool square = s.kernel[0] == 3 && s.kernel[1] == 3 && s.stride[0] == s.stride[1],
               dilated = s.dilation[0] > 1 || s.dilation[1] > 1;
    return square && s.stride[0] == algorithm.stride && !(dilated && s.stride[0] > 1);
}

int64_t packed_floats(const ConvShape &c, const Algorithm &algorithm, int width) {
    const int64_t rows = static_cast<int64_t>(c.groups) * products_of(c, algorithm.frequencies) *
                         algorithm.weight_rows(depth_of(c, algorithm.frequencies));
    return rows * ceil_div(c.out_channels, width) * width;
}

void output_size(const Layer &layer, int index, const int size[2], int out[2]) {
    const repvgg_layer &spec = layer.spec;
    for (int axis = 0; axis < 2; axis++) {
        out[axis] = spec.op == REPVGG_POOL ? 1 : size[axis];
        if (!layer.has_windows()) continue;
        const int64_t reach = static_cast<int64_t>(spec.dilation[axis]) * (spec.kernel[axis] - 1);
        const int64_t padded = size[axis] + 2 * static_cast<int64_t>(spec.padding[axis]);
        if (padded <= reach || padded > MOST_SIDE)
            throw std::invalid_argument("images of that size do not fit layer " + std::to_string(index) +
                                        ": its input would be " + std::to_string(size[0]) + " x " +
                                        std::to_string(size[1]));
        out[axis] = static_cast<int>((padded - reach - 1) / spec.stride[axis] + 1);
    }
}

}  // namespace repvgg
