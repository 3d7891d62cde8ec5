#include "net.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "isa.h"
#include "machine.h"
#include "refuse.h"

namespace repvgg {

namespace {

/// More images than this, or than so many for each thread, are taken in parts: of RepVGG-A0 at 2 threads, 32 at a time
/// are 2% faster than 8 and take 15 MB more; 4 are 4% slower.
constexpr int FEW_IMAGES = 8, IMAGES_OF_A_THREAD = 4;
/// Plans that are kept for sizes of input that may come again.
constexpr size_t MOST_IDLE = 4;
constexpr int MOST_SIDE = 1 << 16, MOST_LAYERS = 1 << 12;

}  // namespace

Net::Net(const repvgg_layer *layers, int count, const repvgg_options &options)
    : kernels_(find_kernels(options.isa, options.precision)), threads_(options.threads), pin_(options.pin != 0) {
    if (threads_ < 1 || threads_ > MOST_THREADS)
        refuse("threads is " + std::to_string(threads_) + ": it is between 1 and " + std::to_string(MOST_THREADS));
    if (count < 1 || count > MOST_LAYERS)
        refuse("a net has at least one layer, and at most " + std::to_string(MOST_LAYERS));
    const auto take = [&](const Kernels &kernels, int first, int last) {
        for (int i = first; i < last; i++) algorithms_.push_back(kernels.algorithms + i);
    };
    if (options.precision == REPVGG_INT8) {  // direct in 8 bits, or in 16 where inputs are no bytes; then the others
        const Kernels &wider = *find_kernels(options.isa, REPVGG_INT16);
        take(*kernels_, 0, 1), take(wider, 0, 1);
        take(*kernels_, 1, kernels_->count), take(wider, 1, wider.count);
    } else {
        take(*kernels_, 0, kernels_->count);
    }
    if (options.precision != REPVGG_FP32) {  // as wide; a layer may be faster by them, and is more accurate
        const Kernels &floats = *find_kernels(options.isa, REPVGG_FP32);
        take(floats, 0, floats.count);
    }
    for (int i = 0; i < count; i++) {
        layers_.push_back(make_layer(layers[i], i, i > 0 ? layers_.back().get() : nullptr, *kernels_));
        const Algorithm *first = fitting(i, 0);
        weights_.push_back(first ? std::make_shared<Weights>(first, Pool::forks()) : nullptr);
    }
    if (options.precision == REPVGG_INT8 &&
        std::none_of(layers, layers + count, [](const repvgg_layer &layer) { return layer.largest_input > 0; }))
        refuse("precision int8 needs a calibrated model: repvgg quantize MODEL --data DATA --to native --out FOLDER");
}

Net::~Net() {
    Runtime *runtime = runtime_.load();
    if (runtime && runtime->forks == Pool::forks()) delete runtime;
}

const Algorithm *Net::fitting(int index, int i) const {
    if (index < 0 || index >= static_cast<int>(layers_.size())) return nullptr;
    for (const Algorithm *algorithm : algorithms_)
        if (fits(*layers_[index], *algorithm) && i-- == 0) return algorithm;
    return nullptr;
}

const Algorithm *Net::find(int layer, const char *name) const {
    const Algorithm *algorithm;
    for (int i = 0; (algorithm = fitting(layer, i)); i++)
        if (std::strcmp(algorithm->name, name) == 0) return algorithm;
    return nullptr;
}

int64_t Net::weight_bytes(int layer, const Algorithm &algorithm) const {
    return packed_floats(layers_[layer]->shape, algorithm, kernels_->width) * static_cast<int64_t>(sizeof(float));
}

const char *Net::isa() const { return kernels_->isa; }

void Net::choose(int layer, const char *name) {
    const Algorithm *algorithm = find(layer, name);
    if (!algorithm) refuse("layer " + std::to_string(layer) + " cannot be computed by " + name);
    Runtime &shared = runtime();
    Lock lock(shared.mutex);
    if (weights_[layer]->algorithm == algorithm) return;
    weights_[layer] = std::make_shared<Weights>(algorithm, shared.forks);
    shared.idle.clear();
    choices_++;
}

Net::Runtime &Net::runtime() {
    Runtime *current = runtime_.load();
    const int forks = Pool::forks();
    if (!current || current->forks != forks) {
        auto *made = new Runtime(threads_, pin_, forks);
        if (runtime_.compare_exchange_strong(current, made)) return *made;
        delete made;  // another thread was first
    }
    return *current;
}

/// Once for each weights; other callers that want the same ones wait, and nobody else.
void Net::pack(Runtime &runtime, int index, Weights &weights) const {
    if (weights.forks != runtime.forks && weights.packed) return;  // a parent's lock stays as it is
    Lock lock(weights.mutex);
    if (weights.packed) return;
    const Algorithm &algorithm = *weights.algorithm;
    const ConvShape &shape = layers_[index]->shape;
    auto memory = std::make_unique<Memory>(packed_floats(shape, algorithm, kernels_->width));
    runtime.pool->run(shape.groups * shape.panels, [&](int item, int) {
        algorithm.pack(shape, layers_[index]->spec.weight, item / shape.panels, item % shape.panels, memory->floats());
    });
    weights.packed = std::move(memory);
}

std::unique_ptr<Plan> Net::take_plan(Runtime &runtime, int n, const int size[2], int &choice) {
    std::vector<std::shared_ptr<Weights>> weights;
    {
        Lock lock(runtime.mutex);
        choice = choices_;
        for (auto plan = runtime.idle.begin(); plan != runtime.idle.end(); ++plan)
            if ((*plan)->fits(n, size[0], size[1])) {
                auto found = std::move(*plan);
                runtime.idle.erase(plan);
                return found;
            }
        // Threads of a parent may have been packing these; who did keeps them alive, lock and all.
        for (auto &own : weights_)
            if (own && own->forks != runtime.forks && !own->packed)
                own = std::make_shared<Weights>(own->algorithm, runtime.forks);
        weights = weights_;
    }
    for (size_t i = 0; i < weights.size(); i++)
        if (weights[i]) pack(runtime, static_cast<int>(i), *weights[i]);
    return std::make_unique<Plan>(*kernels_, layers_, std::move(weights), n, size, runtime.pool->threads());
}

void Net::output_shape(int height, int width, int shape[3]) const {
    int size[2] = {height, width};
    if (std::min(height, width) < 1 || std::max(height, width) > MOST_SIDE)
        refuse("images of " + std::to_string(height) + " x " + std::to_string(width) + " pixels");
    for (size_t i = 0; i < layers_.size(); i++) {
        int out[2];
        output_size(*layers_[i], static_cast<int>(i), size, out);
        std::copy(out, out + 2, size);
    }
    shape[0] = layers_.back()->out_channels(), shape[1] = size[0], shape[2] = size[1];
}

void Net::run(const repvgg_images &images, float *output) {
    int shape[3];
    output_shape(images.height, images.width, shape);
    if (images.n < 1) refuse("no images");
    const int size[2] = {images.height, images.width}, most = std::max(FEW_IMAGES, IMAGES_OF_A_THREAD * threads_),
              parts = static_cast<int>(ceil_div(images.n, most));
    const int64_t pixel_bytes = layers_[0]->spec.in_channels * static_cast<int64_t>(images.bytes ? 1 : sizeof(float));
    const int64_t floats = static_cast<int64_t>(shape[0]) * shape[1] * shape[2];
    Runtime &shared = runtime();
    for (int part = 0; part < parts; part++) {
        const int first = panel_start(images.n, parts, part);
        repvgg_images some = images;
        some.n = panel_start(images.n, parts, part + 1) - first;
        some.data = static_cast<const char *>(images.data) + first * pixel_bytes * size[0] * size[1];
        int choice;
        auto plan = take_plan(shared, some.n, size, choice);
        plan->run(*shared.pool, some, output + first * floats, profiled_.load());
        Lock lock(shared.mutex);
        if (choice != choices_) continue;
        shared.idle.push_back(std::move(plan));
        if (shared.idle.size() > MOST_IDLE) shared.idle.erase(shared.idle.begin());
    }
}

std::vector<int64_t> Net::work(int layer, int n, const int size[2]) {
    int shape[3], choice;
    output_shape(size[0], size[1], shape);
    if (!fitting(layer, 0) || n < 1) refuse("no images, or layer " + std::to_string(layer) + " is no convolution");
    return take_plan(runtime(), n, size, choice)->work(layer);
}

void Net::profile(double *seconds) {
    profiled_ = true;
    for (size_t i = 0; i < layers_.size(); i++)
        seconds[i] = static_cast<double>(layers_[i]->nanoseconds.exchange(0)) * 1e-9;
}

}  // namespace repvgg
