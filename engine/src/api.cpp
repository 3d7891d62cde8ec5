// The C interface to nets of layers at hand; that to model files is in open.cpp.
#include <algorithm>
#include <stdexcept>

#include "api.h"
#include "isa.h"

using repvgg::guarded;

extern "C" {

int32_t repvgg_abi_version(size_t sizes[3]) {
    if (sizes) sizes[0] = sizeof(repvgg_layer), sizes[1] = sizeof(repvgg_options), sizes[2] = sizeof(repvgg_images);
    return REPVGG_ABI_VERSION;
}

repvgg_net *repvgg_create(const repvgg_layer *layers, int32_t count, const repvgg_options *options, char *error,
                          size_t size) {
    repvgg_net *net = nullptr;
    guarded(error, size, nullptr, "a net of these layers", [&] {
        if (!layers || !options) throw std::invalid_argument("no layers, or no options");
        net = new repvgg_net{nullptr, {layers, count, *options}};
    });
    return net;
}

void repvgg_destroy(repvgg_net *net) { delete net; }

int repvgg_output_shape(const repvgg_net *net, int32_t height, int32_t width, int32_t shape[3], char *error,
                        size_t size) {
    return guarded(error, size, nullptr, "its shape", [&] {
        if (!net || !shape) throw std::invalid_argument("no net, or no shape");
        net->net.output_shape(height, width, shape);
    });
}

int repvgg_run(repvgg_net *net, const repvgg_images *images, float *output, char *error, size_t size) {
    return guarded(error, size, nullptr, "images of that size and number", [&] {
        if (!net || !images || !images->data || !output) throw std::invalid_argument("no net, no images or no output");
        if (images->bytes && !(images->scale && images->shift))
            throw std::invalid_argument("images of bytes have a scale and a shift");
        net->net.run(*images, output);
    });
}

int repvgg_choose(repvgg_net *net, int32_t layer, const char *algorithm, char *error, size_t size) {
    return guarded(error, size, nullptr, "the choice", [&] {
        if (!net || !algorithm) throw std::invalid_argument("no net, or no algorithm");
        net->net.choose(layer, algorithm);
    });
}

const char *repvgg_isa(const repvgg_net *net) { return net ? net->net.isa() : nullptr; }

const char *repvgg_algorithm(const repvgg_net *net, int32_t layer, int32_t i) {
    const repvgg::Algorithm *algorithm = net ? net->net.fitting(layer, i) : nullptr;
    return algorithm ? algorithm->name : nullptr;
}

int64_t repvgg_weight_bytes(const repvgg_net *net, int32_t layer, const char *name) {
    const repvgg::Algorithm *algorithm = net && name ? net->net.find(layer, name) : nullptr;
    return algorithm ? net->net.weight_bytes(layer, *algorithm) : 0;
}

void repvgg_profile(repvgg_net *net, double *seconds) {
    if (net && seconds) net->net.profile(seconds);
}

int repvgg_work(repvgg_net *net, int32_t layer, const repvgg_images *images, int64_t *work, int32_t room, char *error,
                size_t size) {
    int32_t count = -1;
    guarded(error, size, nullptr, "images of that size and number", [&] {
        if (!net || !images || !work) throw std::invalid_argument("no net, no images or no room for their work");
        const int sides[2] = {images->height, images->width};
        const auto found = net->net.work(layer, images->n, sides);
        count = static_cast<int32_t>(found.size());
        std::copy(found.begin(), found.begin() + std::clamp(room, 0, count), work);
    });
    return count;
}

const char *repvgg_instruction_sets(void) { return repvgg::instruction_sets(); }
}
