#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace repvgg {

namespace {

constexpr int64_t FORMAT_VERSION = 1, PLAN_VERSION = 1;
constexpr int64_t MOST_HEADER = 100000000, MOST_PLAN = 10000000;
constexpr int64_t MOST_SIDE = 8192, MOST_CHANNELS = 1 << 20, MOST_GEOMETRY = 1 << 16, MOST_WEIGHTS = 1 << 30;
/// Of an input's numbers, where calibration found the largest.
constexpr double MOST_INPUT = 1e12, LEAST_INPUT = 1e-12;
/// Of mean / std and of std: far from what float32 holds, and farther from any that makes sense.
constexpr double MOST_SHIFT = 1e15;

float from_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, digits = half & 0x3ff;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(digits), -24);
    const uint32_t bits = sign | (exponent == 31 ? 0xffu : exponent + 112) << 23 | digits << 13;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

/// Bytes of little-endian numbers, as every processor that this runs on has them.
template <class Number>
Number take(const char *from) {
    Number value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

struct Type {
    const char *name;
    int64_t bytes;
    float (*convert)(const char *);
};

float from_bfloat16(const char *from) {
    const uint32_t bits = static_cast<uint32_t>(take<uint16_t>(from)) << 16;
    return take<float>(reinterpret_cast<const char *>(&bits));
}

constexpr Type TYPES[] = {
    {"F32", 4, [](const char *from) { return take<float>(from); }},
    {"F64", 8, [](const char *from) { return static_cast<float>(take<double>(from)); }},
    {"F16", 2, [](const char *from) { return from_half(take<uint16_t>(from)); }},
    {"BF16", 2, from_bfloat16},
};

std::string shape_of(const std::vector<int64_t> &shape) {
    std::string text;
    for (const int64_t n : shape) text += (text.empty() ? "" : ", ") + std::to_string(n);
    return "[" + text + "]";
}

/// The safetensors file: its header, and where its tensors lie.
class Tensors {
  public:
    explicit Tensors(const Source &source) : source_(source) {
        uint64_t length = 0;
        if (source.size() >= 8) source.read(0, 8, &length);
        if (length < 2 || length > static_cast<uint64_t>(std::min(source.size() - 8, MOST_HEADER)))
            refuse("is not a safetensors file, or is truncated");
        std::string text(static_cast<size_t>(length), '\0');
        source.read(8, static_cast<int64_t>(length), &text[0]);
        header_ = Json::parse(text.data(), text.size());
        if (header_.kind() != Json::DICTIONARY) refuse("has a header that is no dictionary");
        data_ = 8 + static_cast<int64_t>(length);
        left_ = source.size() - data_;
    }

    const Json &header() const { return header_; }

    const Json &entry(const std::string &name) const {
        const Json *found = name == "__metadata__" ? nullptr : header_.find(name);
        if (!found) refuse("wants a tensor " + printable(name) + ", which the file lacks");
        return *found;
    }

    std::vector<float> read(const std::string &name, const std::vector<int64_t> &shape) {
        const Json &found = entry(name);
        const std::string &type_name = found.at("dtype").text(), shown = printable(name);
        const auto type =
            std::find_if(std::begin(TYPES), std::end(TYPES), [&](const Type &t) { return type_name == t.name; });
        if (type == std::end(TYPES))
            refuse("has " + shown + " of type " + printable(type_name) + ": F32, F64, F16, BF16 are read");
        const auto &offsets = found.at("data_offsets").list();
        if (offsets.size() != 2) refuse("has " + shown + " with offsets that are not two");
        const int64_t size = source_.size() - data_, start = offsets[0].integer(0, size),
                      end = offsets[1].integer(start, size);
        std::vector<int64_t> has;
        for (const Json &n : found.at("shape").list()) has.push_back(n.integer(0, INT64_MAX));
        int64_t count = 1;
        for (const int64_t n : shape) {  // each at least 1
            if (n > std::min(size, MOST_WEIGHTS) / count)
                refuse("has " + shown + ", which is larger than the file, or than any that is taken");
            count *= n;
        }
        if (has != shape || end - start != count * type->bytes)
            refuse("has " + shown + " of shape " + shape_of(has) + " in " + std::to_string(end - start) +
                   " bytes, not " + shape_of(shape) + " in " + type->name);
        left_ -= end - start;  // or a small file could hold as many layers as fill the memory
        if (left_ < 0) refuse("has " + shown + ", whose bytes belong to other layers too");
        std::vector<float> numbers = converted(*type, data_ + start, count);
        if (!std::all_of(numbers.begin(), numbers.end(), [](float x) { return std::isfinite(x); }))
            refuse("has NaN or Inf in " + shown + ": the file is damaged, or training diverged");
        return numbers;
    }

  private:
    std::vector<float> converted(const Type &type, int64_t start, int64_t count) const {
        std::vector<float> numbers(static_cast<size_t>(count));
        if (type.bytes == sizeof(float)) {
            source_.read(start, count * type.bytes, numbers.data());
            return numbers;
        }
        std::vector<char> part(1 << 16);
        const int64_t step = static_cast<int64_t>(part.size()) / type.bytes;
        for (int64_t i = 0; i < count; i += step) {
            const int64_t some = std::min(step, count - i);
            source_.read(start + i * type.bytes, some * type.bytes, part.data());
            for (int64_t j = 0; j < some; j++)
                numbers[static_cast<size_t>(i + j)] = type.convert(part.data() + j * type.bytes);
        }
        return numbers;
    }

    const Source &source_;
    Json header_;
    int64_t data_, left_;
};

Preprocessing read_preprocessing(const Json &given) {
    Preprocessing p;
    const auto &size = given.at("input_size").list();
    if (size.size() != 3) refuse("has an input_size that is not channels, height and width");
    p.channels = static_cast<int>(size[0].integer(1, MOST_SIDE));
    p.height = static_cast<int>(size[1].integer(1, MOST_SIDE));
    p.width = static_cast<int>(size[2].integer(1, MOST_SIDE));
    p.resize = static_cast<int>(given.at("resize").integer(1, MOST_SIDE));
    p.interpolation = printable(given.at("interpolation").text(), 50);
    for (const Json &x : given.at("mean").list()) p.mean.push_back(x.number());
    for (const Json &x : given.at("std").list()) p.std.push_back(x.number());
    if (p.mean.size() != p.std.size() || p.mean.size() != static_cast<size_t>(p.channels))
        refuse("has a mean and std that do not fit its channels");
    for (size_t i = 0; i < p.mean.size(); i++) {
        const double mean = p.mean[i], std = p.std[i];
        if (!(1 / MOST_SHIFT < std && std < MOST_SHIFT && std::fabs(mean) <= MOST_SHIFT * std))
            refuse("has a mean and std that turn images into no finite numbers");
        p.scale.push_back(static_cast<float>(1 / (255 * std)));
        p.shift.push_back(static_cast<float>(-mean / std));
    }
    return p;
}

/// Reads the layers one after another, with the channels and sides of what each gives; no sides after the pool.
class Layers {
  public:
    Layers(Tensors &tensors, Model &model)
        : tensors_(tensors),
          model_(model),
          channels_(model.preprocessing.channels),
          sides_{model.preprocessing.height, model.preprocessing.width} {}

    void read(const Json &spec) {
        const std::string &op = spec.at("op").text();
        repvgg_layer layer{};
        if (const Json *activation = spec.find("activation"); activation && !activation->is_nothing()) {
            if (activation->kind() != Json::TEXT || activation->text() != "relu")
                refuse("has an unknown activation, " + activation->shown());
            layer.relu = 1;
        }
        const bool known = op == "conv2d" || op == "squeeze_excite" || op == "global_avg_pool" || op == "linear";
        if (!known || (op == "linear") == has_sides_)
            refuse("is '" + printable(op, 50) + "', which " +
                   (known ? "cannot stand there" : "this engine does not know"));
        if (op == "conv2d") read_conv(spec, layer);
        else if (op == "linear") read_linear(spec, layer);
        else if (op == "squeeze_excite") read_excite(spec, layer);
        else layer = {}, layer.op = REPVGG_POOL, layer.in_channels = static_cast<int>(channels_), has_sides_ = false;
        model_.layers.push_back(layer);
    }

    int64_t channels() const { return channels_; }

  private:
    void read_conv(const Json &spec, repvgg_layer &layer) {
        const int64_t out = spec.at("out_channels").integer(1, MOST_CHANNELS),
                      groups = spec.at("groups").integer(1, MOST_CHANNELS);
        read_pair(spec.at("kernel_size"), 1, layer.kernel);
        read_pair(spec.at("stride"), 1, layer.stride);
        read_pair(spec.at("dilation"), 1, layer.dilation);
        read_pair(spec.at("padding"), 0, layer.padding);
        if (spec.at("in_channels").integer(1, MOST_CHANNELS) != channels_ || channels_ % groups || out % groups)
            refuse("has channels that do not fit the layer before it, or its groups");
        for (int axis = 0; axis < 2; axis++) {
            const int64_t reach = static_cast<int64_t>(layer.dilation[axis]) * (layer.kernel[axis] - 1);
            const int64_t padding = 2 * static_cast<int64_t>(layer.padding[axis]);
            if (padding > reach || sides_[axis] + padding <= reach)
                refuse("is a convolution that cannot be, by its kernel, padding and dilation");
            sides_[axis] = (sides_[axis] + padding - reach - 1) / layer.stride[axis] + 1;
        }
        layer.weight = tensor(spec.at("weight"), {out, channels_ / groups, layer.kernel[0], layer.kernel[1]});
        finish(spec, layer, out, groups);
    }

    void read_linear(const Json &spec, repvgg_layer &layer) {
        const int64_t out = spec.at("out_features").integer(1, MOST_CHANNELS);
        if (spec.at("in_features").integer(1, MOST_CHANNELS) != channels_)
            refuse("has channels that do not fit the layer before it");
        for (int axis = 0; axis < 2; axis++) layer.kernel[axis] = layer.stride[axis] = layer.dilation[axis] = 1;
        layer.weight = tensor(spec.at("weight"), {out, channels_});
        finish(spec, layer, out, 1);
    }

    void finish(const Json &spec, repvgg_layer &layer, int64_t out, int64_t groups) {
        if (const Json *largest = spec.find("largest_input"); largest && !largest->is_nothing()) {
            layer.largest_input = static_cast<float>(largest->number());
            if (!(largest->number() >= LEAST_INPUT && largest->number() <= MOST_INPUT))
                refuse("has a largest input of " + largest->shown() + ", which cannot be");
        }
        layer.op = REPVGG_CONV, layer.groups = static_cast<int>(groups);
        layer.in_channels = static_cast<int>(channels_), layer.out_channels = static_cast<int>(out);
        layer.bias = tensor(spec.at("bias"), {out});
        channels_ = out;
    }

    void read_excite(const Json &spec, repvgg_layer &layer) {
        const std::string &path = spec.at("path").text();
        if (spec.at("channels").integer(1, MOST_CHANNELS) != channels_)
            refuse("has channels that do not fit the layer before it");
        const auto &shape = tensors_.entry(path + ".reduce.weight").at("shape").list();
        const int64_t hidden = shape.empty() ? 0 : shape[0].integer(1, MOST_CHANNELS);
        if (hidden == 0) refuse("wants a tensor " + printable(path) + ".reduce.weight of four dimensions");
        layer.op = REPVGG_SQUEEZE_EXCITE;
        layer.in_channels = static_cast<int>(channels_), layer.out_channels = static_cast<int>(hidden);
        layer.weight = tensor(path + ".reduce.weight", {hidden, channels_, 1, 1});
        layer.weight2 = tensor(path + ".expand.weight", {channels_, hidden, 1, 1});
        layer.bias = tensor(path + ".reduce.bias", {hidden});
        layer.bias2 = tensor(path + ".expand.bias", {channels_});
    }

    const float *tensor(const Json &name, const std::vector<int64_t> &shape) { return tensor(name.text(), shape); }
    const float *tensor(const std::string &name, const std::vector<int64_t> &shape) {
        model_.weights.push_back(tensors_.read(name, shape));
        return model_.weights.back().data();
    }

    static void read_pair(const Json &values, int64_t least, int32_t pair[2]) {
        if (values.list().size() != 2)
            refuse("has a list of " + std::to_string(values.list().size()) + " where two numbers belong");
        for (size_t i = 0; i < 2; i++) pair[i] = static_cast<int32_t>(values.list()[i].integer(least, MOST_GEOMETRY));
    }

    Tensors &tensors_;
    Model &model_;
    int64_t channels_, sides_[2];
    bool has_sides_ = true;
};

}  // namespace

std::unique_ptr<Model> read_model(const Source &source) {
    Tensors tensors(source);
    const Json *metadata = tensors.header().find("__metadata__"), *text = metadata ? metadata->find("repvgg") : nullptr;
    if (!text) refuse("has no list of layers: write it with repvgg convert");
    const Json manifest = Json::parse(text->text().data(), text->text().size());
    const Json &version = manifest.at("format_version");
    if (version.kind() != Json::INTEGER || version.integer(INT64_MIN, INT64_MAX) != FORMAT_VERSION)
        refuse("is of format version " + version.shown() + ", this engine reads " + std::to_string(FORMAT_VERSION) +
               ": upgrade it");
    if (manifest.at("form").text() != "deploy") refuse("is in training form: run repvgg convert on it first");
    const Json &list = manifest.at("layers");
    if (list.kind() != Json::LIST || list.list().empty())
        refuse("has no list of layers: this network is no plain stack");
    auto model = std::make_unique<Model>();
    model->preprocessing = read_preprocessing(manifest.at("preprocessing"));
    Layers layers(tensors, *model);
    for (const Json &spec : list.list()) {
        try {
            layers.read(spec);
        } catch (const std::invalid_argument &error) {
            refuse("layer " + std::to_string(model->layers.size()) + " " + error.what());
        }
    }
    if (const Json *classes = manifest.find("classes"); classes && !classes->is_nothing()) {
        for (const Json &name : classes->list()) model->classes.push_back(name.text());
        if (static_cast<int64_t>(model->classes.size()) != layers.channels())
            refuse("has class names that do not fit its outputs");
    }
    source.check_unchanged();
    return model;
}

PlanWords read_plan(const Source &source) {
    if (source.size() > MOST_PLAN) refuse("is not a plan, or a damaged one");
    std::string text(static_cast<size_t>(source.size()), '\0');
    source.read(0, source.size(), &text[0]);
    const Json plan = Json::parse(text.data(), text.size());
    if (plan.at("repvgg_engine_plan").integer(0, INT64_MAX) != PLAN_VERSION)
        refuse("is a plan of another version, this engine reads " + std::to_string(PLAN_VERSION));
    PlanWords words{plan.at("isa").text(), plan.at("precision").text(), {}};
    for (const Json &name : plan.at("algorithms").list()) words.algorithms.push_back(name.text());
    return words;
}

}  // namespace repvgg
