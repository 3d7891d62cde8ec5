#include "net.h"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace repvgg {

const Kernels *kernels_portable();
#if defined(__x86_64__)
const Kernels *kernels_avx2();
const Kernels *kernels_avx512();
const Kernels *kernels_avx512_bf16();
#endif

namespace {

/// More images than this are taken in parts: they would gain nothing, and take memory.
constexpr int MOST_IMAGES = 32;
/// Plans that are kept for sizes of input that may come again.
constexpr size_t MOST_IDLE = 4;
constexpr int MOST_CHANNELS = 1 << 20;
/// Of a convolution's kernel, and numbers in all of a layer's kernels, so that no product of a layer's sizes overflows.
constexpr int64_t MOST_TAPS = 1 << 20, MOST_WEIGHTS = int64_t{1} << 30;

std::atomic<int> forks{0};

struct Set {
    const char *name;
    bool bf16, here;
    const Kernels *(*kernels)();
};

/// Best first.
const std::vector<Set> &sets() {
    static const std::vector<Set> all = [] {
        std::vector<Set> found;
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
        found.push_back({"avx512", true, avx512 && __builtin_cpu_supports("avx512bf16"), kernels_avx512_bf16});
        found.push_back({"avx512", false, avx512, kernels_avx512});
        found.push_back({"avx2", false, avx2, kernels_avx2});
#endif
        found.push_back({"portable", false, true, kernels_portable});
        return found;
    }();
    return all;
}

[[noreturn]] void refuse(const std::string &reason) { throw std::invalid_argument(reason); }

}  // namespace

const Kernels *find_kernels(const char *isa, bool bf16) {
    const char *forced = isa && *isa ? isa : std::getenv("REPVGG_ENGINE_ISA");
    const std::string name = forced ? forced : "";
    for (const Set &set : sets())
        if (set.here && set.bf16 == bf16 && (name.empty() || name == set.name)) return set.kernels();
    if (bf16) refuse("precision bf16 needs a processor with AVX512-BF16" + (name.empty() ? "" : ", and REPVGG_ENGINE_ISA=avx512, not " + name));
    refuse("REPVGG_ENGINE_ISA=" + name + ": this processor has " + instruction_sets());
}

const char *instruction_sets() {
    static const std::string names = [] {
        std::string text;
        for (const Set &set : sets())
            if (set.here) text += (text.empty() ? "" : " ") + std::string(set.bf16 ? "bf16" : set.name);
        return text;
    }();
    return names.c_str();
}

Net::Net(const repvgg_layer *layers, int count, const repvgg_options &options)
    : kernels_(find_kernels(options.isa, options.bf16 != 0)), threads_(options.threads), pin_(options.pin != 0) {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { forks++; });
    (void)registered;
    if (threads_ < 1 || threads_ > 1024) refuse("threads is " + std::to_string(threads_) + ": it is between 1 and 1024");
    if (count < 1) refuse("a net has at least one layer");
    const auto take = [&](const Kernels &kernels) {
        for (int i = 0; i < kernels.count; i++) algorithms_.push_back(kernels.algorithms + i);
    };
    take(*kernels_);
    if (options.bf16) take(*find_kernels(options.isa, false));  // as wide; a layer may be faster by them, and is more accurate
    for (int i = 0; i < count; i++) add(layers[i]);
    weights_.resize(layers_.size());
}

Net::~Net() {
    Runtime *runtime = runtime_.load();
    if (runtime && runtime->forks == forks.load()) delete runtime;
}

void Net::add(const repvgg_layer &spec) {
    const std::string where = "layer " + std::to_string(layers_.size());
    const auto channels = [&](int n) {
        if (n < 1 || n > MOST_CHANNELS) refuse(where + " has " + std::to_string(n) + " channels");
    };
    channels(spec.in_channels);
    if (spec.op != REPVGG_POOL) {
        channels(spec.out_channels);
        if (!spec.weight || !spec.bias || (spec.op == REPVGG_SQUEEZE_EXCITE && !(spec.weight2 && spec.bias2))) refuse(where + " has no weights");
    }
    if (spec.op == REPVGG_SQUEEZE_EXCITE && static_cast<int64_t>(spec.in_channels) * spec.out_channels > MOST_WEIGHTS)
        refuse(where + " has more weights than this engine takes");
    if (layers_.empty()) {
        if (spec.op != REPVGG_CONV) refuse("the first layer is no convolution");
    } else {
        const repvgg_layer &last = layers_.back()->spec;
        if (spec.in_channels != (last.op == REPVGG_CONV ? last.out_channels : last.in_channels)) refuse(where + " does not fit the one before it");
    }
    auto layer = std::make_unique<Layer>();
    layer->spec = spec;
    layer->choice[0] = layer->choice[1] = nullptr;
    if (spec.op == REPVGG_CONV) {
        for (int axis = 0; axis < 2; axis++)
            if (std::min({spec.kernel[axis], spec.stride[axis], spec.dilation[axis]}) < 1 || spec.padding[axis] < 0 ||
                std::max({spec.kernel[axis], spec.stride[axis], spec.dilation[axis], spec.padding[axis]}) > 1 << 16)
                refuse(where + " is a convolution that cannot be");
        if (spec.groups < 1 || spec.in_channels % spec.groups || spec.out_channels % spec.groups)
            refuse(where + " has " + std::to_string(spec.groups) + " groups, which do not divide its channels");
        const int64_t taps = static_cast<int64_t>(spec.kernel[0]) * spec.kernel[1];
        if (taps > MOST_TAPS || taps * (spec.in_channels / spec.groups) > MOST_WEIGHTS / spec.out_channels)
            refuse(where + " has more weights than this engine takes");
        Conv &c = layer->conv;
        c.groups = spec.groups, c.in_channels = spec.in_channels / spec.groups, c.out_channels = spec.out_channels / spec.groups;
        std::copy(spec.kernel, spec.kernel + 2, c.kernel);
        std::copy(spec.stride, spec.stride + 2, c.stride);
        std::copy(spec.dilation, spec.dilation + 2, c.dilation);
        c.relu = spec.relu != 0;
        const bool dense = layers_.empty() || spec.in_channels % kernels_->width == 0;  // a pixel's channels are next to the next one's
        const bool rows = dense && spec.groups == 1 && spec.dilation[1] == 1;
        const bool all = rows && c.kernel[0] * c.kernel[1] * c.in_channels <= MOST_JOINED;
        c.joined = all ? c.kernel[0] * c.kernel[1] : rows ? c.kernel[1] : 1;
        const int width = kernels_->width, vectors = static_cast<int>(ceil_div(c.out_channels, width));
        const int panels = static_cast<int>(ceil_div(vectors, kernels_->max_panel));
        c.panels = std::min(vectors, panels > 1 ? panels + panels % 2 : 1);  // even, for two threads to share
        c.rows = kernels_->rows(static_cast<int>(ceil_div(vectors, c.panels)));
        layer->bias.resize(static_cast<size_t>(c.groups) * vectors * width);
        for (int i = 0; i < spec.out_channels; i++)
            layer->bias[static_cast<size_t>(i / c.out_channels) * vectors * width + i % c.out_channels] = spec.bias[i];
    } else if (spec.op != REPVGG_POOL && spec.op != REPVGG_SQUEEZE_EXCITE) {
        refuse(where + " has an unknown operator, " + std::to_string(spec.op));
    }
    layers_.push_back(std::move(layer));
    const int index = static_cast<int>(layers_.size()) - 1;
    layers_[index]->choice[0] = layers_[index]->choice[1] = fitting(index, 0);
}

const Algorithm *Net::fitting(int index, int i) const {
    if (index < 0 || index >= static_cast<int>(layers_.size()) || layers_[index]->spec.op != REPVGG_CONV) return nullptr;
    const repvgg_layer &s = layers_[index]->spec;
    const bool square = s.kernel[0] == 3 && s.kernel[1] == 3 && s.stride[0] == s.stride[1];
    const bool dilated = s.dilation[0] > 1 || s.dilation[1] > 1;
    for (const Algorithm *algorithm : algorithms_) {
        const bool fits = algorithm->products == 0 || (square && s.stride[0] == algorithm->stride && !(dilated && s.stride[0] > 1));
        if (fits && i-- == 0) return algorithm;
    }
    return nullptr;
}

const Algorithm *Net::find(int layer, const char *name) const {
    const Algorithm *algorithm;
    for (int i = 0; (algorithm = fitting(layer, i)); i++)
        if (std::strcmp(algorithm->name, name) == 0) return algorithm;
    return nullptr;
}

void Net::choose(int batch, int layer, const char *name) {
    const Algorithm *algorithm = find(layer, name);
    if (!algorithm || batch < 0 || batch > 1) refuse("layer " + std::to_string(layer) + " cannot be computed by " + name);
    Runtime &shared = runtime();
    std::lock_guard<std::mutex> lock(shared.mutex);
    Layer &l = *layers_[layer];
    l.choice[batch] = algorithm;
    shared.idle.clear();
    choices_++;
    auto &all = weights_[layer];
    const auto unused = [&](const Weights &w) { return w.algorithm != l.choice[0] && w.algorithm != l.choice[1]; };
    all.erase(std::remove_if(all.begin(), all.end(), unused), all.end());
}

long Net::weight_floats(int layer, const Algorithm &algorithm) const {
    const Conv c = with_algorithm(layers_[layer]->conv, algorithm);
    return static_cast<long>(c.groups) * c.products * ceil_div(c.k, algorithm.packed) * ceil_div(c.out_channels, kernels_->width) * kernels_->width;
}

std::shared_ptr<Memory> Net::packed(Runtime &runtime, int index, const Algorithm &algorithm) {
    auto &all = weights_[index];
    for (const Weights &w : all)
        if (w.algorithm == &algorithm) return w.packed;
    const auto memory = std::make_shared<Memory>(weight_floats(index, algorithm));
    const Conv c = with_algorithm(layers_[index]->conv, algorithm);
    const float *weights = layers_[index]->spec.weight;
    runtime.pool.run(c.groups * c.panels, [&](int item, int) { algorithm.pack(c, weights, item / c.panels, item % c.panels, memory->floats()); });
    all.push_back({&algorithm, memory});
    return memory;
}

Net::Runtime &Net::runtime() {
    Runtime *current = runtime_.load();
    if (!current || current->forks != forks.load()) {
        auto *made = new Runtime(threads_, pin_, forks.load());
        if (runtime_.compare_exchange_strong(current, made)) return *made;
        delete made;  // another thread was first
    }
    return *current;
}

std::unique_ptr<Plan> Net::take_plan(Runtime &runtime, int n, const int size[2], int &choice) {
    std::lock_guard<std::mutex> lock(runtime.mutex);
    choice = choices_;
    for (auto plan = runtime.idle.begin(); plan != runtime.idle.end(); ++plan)
        if ((*plan)->fits(n, size[0], size[1])) {
            auto found = std::move(*plan);
            runtime.idle.erase(plan);
            return found;
        }
    std::vector<Weights> weights(layers_.size());
    for (int i = 0; i < static_cast<int>(layers_.size()); i++) {
        const Algorithm *algorithm = layers_[i]->choice[n >= REPVGG_LARGE_BATCH];
        if (algorithm) weights[i] = {algorithm, packed(runtime, i, *algorithm)};
    }
    return std::make_unique<Plan>(*kernels_, layers_, std::move(weights), n, size, runtime.pool.threads());
}

void Net::output_shape(int height, int width, int shape[3]) const {
    int size[2] = {height, width};
    if (std::min(height, width) < 1 || std::max(height, width) > 1 << 16) refuse("images of " + std::to_string(height) + " x " + std::to_string(width) + " pixels");
    shape[0] = layers_[0]->spec.in_channels;
    for (int i = 0; i < static_cast<int>(layers_.size()); i++) {
        int out[2];
        output_size(*layers_[i], i, size, out);
        std::copy(out, out + 2, size);
        if (layers_[i]->spec.op == REPVGG_CONV) shape[0] = layers_[i]->spec.out_channels;
    }
    shape[1] = size[0], shape[2] = size[1];
}

void Net::run(const repvgg_images &images, float *output) {
    int shape[3];
    output_shape(images.height, images.width, shape);
    if (images.n < 1) refuse("no images");
    const int size[2] = {images.height, images.width}, parts = static_cast<int>(ceil_div(images.n, MOST_IMAGES));
    const long image_bytes = static_cast<long>(layers_[0]->spec.in_channels) * size[0] * size[1] * (images.bytes ? 1 : sizeof(float));
    const long floats = static_cast<long>(shape[0]) * shape[1] * shape[2];
    Runtime &shared = runtime();
    for (int part = 0; part < parts; part++) {
        const int first = panel_start(images.n, parts, part), n = panel_start(images.n, parts, part + 1) - first;
        repvgg_images some = images;
        some.n = n;
        some.data = static_cast<const char *>(images.data) + first * image_bytes;
        int choice;
        auto plan = take_plan(shared, n, size, choice);
        plan->run(shared.pool, some, output + first * floats);
        std::lock_guard<std::mutex> lock(shared.mutex);
        if (choice != choices_) continue;
        shared.idle.push_back(std::move(plan));
        if (shared.idle.size() > MOST_IDLE) shared.idle.erase(shared.idle.begin());
    }
}

void Net::profile(double *seconds) {
    for (size_t i = 0; i < layers_.size(); i++) seconds[i] = static_cast<double>(layers_[i]->nanoseconds.exchange(0)) * 1e-9;
}

}  // namespace repvgg
