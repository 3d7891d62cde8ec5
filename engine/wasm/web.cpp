// What JavaScript calls (repvgg_engine.mjs). There are no exceptions here: a throw ends in the host's `refuse`, which
// throws one of its own through all that is on the stack.
#include <algorithm>
#include <cstdlib>
#include <exception>
#include <initializer_list>
#include <typeinfo>
#include <vector>

#include "../src/repvgg_engine.h"

#define EXPORT(name) __attribute__((export_name(#name)))

extern "C" {

__attribute__((import_module("env"), import_name("refuse"))) [[noreturn]] void refuse_in_host(const char *reason);

void *__cxa_allocate_exception(size_t bytes) noexcept { return std::malloc(bytes); }
void __cxa_free_exception(void *thrown) noexcept { std::free(thrown); }
/// All that is thrown here begins with its std::exception.
[[noreturn]] void __cxa_throw(void *thrown, std::type_info *, void (*)(void *)) {
    refuse_in_host(static_cast<std::exception *>(thrown)->what());
}

/// Their product. Addresses have 32 bits: it would begin again at 0.
static size_t bytes_of(std::initializer_list<int32_t> sizes) {
    constexpr uint64_t MOST = uint64_t{1} << 31;
    uint64_t bytes = 1;
    for (const int32_t size : sizes)
        if ((bytes *= static_cast<uint32_t>(size)) > MOST) refuse_in_host("images that take more than 2 GiB");
    return static_cast<size_t>(bytes);
}

static float *room_for(int32_t n, const int32_t shape[3]) {
    auto *room = static_cast<float *>(std::malloc(bytes_of({sizeof(float), n, shape[0], shape[1], shape[2]})));
    if (!room) refuse_in_host("there is not enough memory");
    return room;
}

EXPORT(room) void *room(size_t bytes) { return std::malloc(bytes); }
EXPORT(release) void release(void *room) { std::free(room); }

/// plan: its text, or null.
EXPORT(open) repvgg_net *open_net(const void *model, size_t bytes, const char *plan) {
    repvgg_open_options options{};
    options.size = sizeof options, options.plan_text = plan, options.threads = 1;
    return repvgg_open_model(repvgg_read_bytes(model, bytes, nullptr, 0), &options, nullptr, 0);
}
EXPORT(close) void close_net(repvgg_net *net) { repvgg_destroy(net); }

/// channels, height and width of the input, outputs, class names (an array of `outputs` pointers, or null).
EXPORT(about) const int32_t *about(const repvgg_net *net) {
    static int32_t numbers[5];
    repvgg_description d{};
    d.size = sizeof d;
    repvgg_describe(repvgg_net_model(net), &d);
    const repvgg_layer *end = d.layers + d.layer_count, &last = end[-1];
    const bool pools = std::any_of(d.layers, end, [](const repvgg_layer &layer) { return layer.op == REPVGG_POOL; });
    if (!pools || last.op != REPVGG_CONV)
        refuse_in_host("the model ends before its classes: export one that was made with num_classes");
    numbers[0] = d.channels, numbers[1] = d.height, numbers[2] = d.width;
    numbers[3] = last.out_channels;
    numbers[4] = static_cast<int32_t>(reinterpret_cast<uintptr_t>(d.classes));
    return numbers;
}

/// images: float32 [n, channels, height, width]. Returns room with the output, which the caller releases.
EXPORT(run) float *run(repvgg_net *net, const float *data, int32_t n, int32_t height, int32_t width) {
    repvgg_images images{};
    images.data = data, images.n = n, images.height = height, images.width = width;
    int32_t shape[3];
    repvgg_output_shape(net, height, width, shape, nullptr, 0);
    float *output = room_for(n, shape);
    repvgg_run(net, &images, output, nullptr, 0);
    return output;
}

/// A canvas's pixels, RGBA, to logits: resized, cropped and normalised as the model file says.
EXPORT(classify) float *classify(repvgg_net *net, const uint8_t *rgba, int32_t height, int32_t width) {
    repvgg_description d{};
    d.size = sizeof d;
    repvgg_describe(repvgg_net_model(net), &d);
    static std::vector<uint8_t> pixels, input;  // kept: a refusal destroys nothing that is on the stack
    pixels.resize(bytes_of({height, width, d.channels})), input.resize(bytes_of({d.height, d.width, d.channels}));
    const size_t count = bytes_of({height, width});
    for (size_t i = 0; i < count; i++)
        for (int c = 0; c < d.channels; c++)
            pixels[i * d.channels + c] =
                d.channels == 3
                    ? rgba[4 * i + c]
                    : (19595 * rgba[4 * i] + 38470 * rgba[4 * i + 1] + 7471 * rgba[4 * i + 2] + 32768) >> 16;
    repvgg_prepare(&d, pixels.data(), height, width, input.data(), nullptr, 0);
    repvgg_images images{};
    images.data = input.data(), images.bytes = 1, images.n = 1, images.height = d.height, images.width = d.width;
    images.scale = d.scale, images.shift = d.shift;
    int32_t shape[3];
    repvgg_output_shape(net, d.height, d.width, shape, nullptr, 0);
    float *output = room_for(1, shape);
    repvgg_run(net, &images, output, nullptr, 0);
    return output;
}
}
