// The C interface to model files.
#include <algorithm>
#include <cstring>

#include "api.h"
#include "machine.h"

using repvgg::guarded;
using repvgg::refuse;

namespace {

/// Without a plan: by F2 from so many channels on, which keeps the error within twice that of direct convolutions.
constexpr int ENOUGH_CHANNELS = 16;

/// A caller's struct, which may be of an older or a newer header than this library's: what it has beyond ours must be
/// zero, what it lacks is. name: what it is called in words.
template <class Struct>
Struct versioned(const Struct *given, const std::string &name) {
    Struct ours{};
    if (!given) return ours;
    if (given->size < sizeof given->size) refuse(name + " without its size: set size to the sizeof of its struct");
    const auto *bytes = reinterpret_cast<const unsigned char *>(given);
    if (given->size > 4096 ||
        std::any_of(bytes + std::min(sizeof ours, given->size), bytes + given->size, [](auto b) { return b != 0; }))
        refuse(name + " that this version of the library does not know: upgrade it");
    std::memcpy(&ours, bytes, std::min(sizeof ours, given->size));
    return ours;
}

void follow(repvgg::Net &net, const std::vector<repvgg_layer> &layers, const std::vector<std::string> &algorithms,
            bool features) {
    if (algorithms.size() != layers.size() && !(features && algorithms.size() > layers.size()))
        refuse("the plan is of " + std::to_string(algorithms.size()) + " layers, the net has " +
               std::to_string(layers.size()));
    for (size_t i = 0; i < layers.size(); i++)
        if (layers[i].op == REPVGG_CONV || !algorithms[i].empty())
            net.choose(static_cast<int>(i), repvgg::printable(algorithms[i], 50).c_str());
}

void choose_safely(repvgg::Net &net, const std::vector<repvgg_layer> &layers) {
    for (size_t i = 0; i < layers.size(); i++) {
        const repvgg_layer &l = layers[i];
        if (l.op == REPVGG_CONV && std::min(l.in_channels, l.out_channels) / l.groups >= ENOUGH_CHANNELS &&
            net.find(static_cast<int>(i), "F2"))
            net.choose(static_cast<int>(i), "F2");
    }
}

int32_t precision_of(const std::string &name) {
    if (name == "fp32") return REPVGG_FP32;
    if (name == "bf16") return REPVGG_BF16;
    if (name == "int16") return REPVGG_INT16;
    if (name == "int8") return REPVGG_INT8;
    refuse("is of precision '" + repvgg::printable(name, 50) + "': fp32, bf16, int16 and int8 are known");
}

repvgg::PlanWords plan_of(const repvgg_open_options &wanted) {
    try {
        const auto source = wanted.plan ? repvgg::open_file(wanted.plan)
                                        : repvgg::open_bytes(wanted.plan_text, std::strlen(wanted.plan_text));
        repvgg::PlanWords plan = repvgg::read_plan(*source);
        precision_of(plan.precision);
        return plan;
    } catch (const std::invalid_argument &error) {
        refuse(std::string(wanted.plan ? wanted.plan : "the plan") + ": " + error.what());
    }
}

repvgg_net *opened(std::unique_ptr<repvgg_model> model, const repvgg_open_options &wanted) {
    std::vector<repvgg_layer> layers = model->model->layers;
    if (wanted.features)
        layers.erase(
            std::find_if(layers.begin(), layers.end(), [](const repvgg_layer &l) { return l.op == REPVGG_POOL; }),
            layers.end());
    repvgg_options options{};
    options.threads = wanted.threads ? wanted.threads : repvgg::available_threads("");
    options.pin = wanted.pin, options.isa = wanted.isa;
    repvgg::PlanWords plan;
    const bool planned = wanted.plan || wanted.plan_text;
    if (planned) {
        plan = plan_of(wanted);
        options.isa = plan.isa.c_str(), options.precision = precision_of(plan.precision);
    }
    std::unique_ptr<repvgg_net> net(
        new repvgg_net{std::move(model), {layers.data(), static_cast<int>(layers.size()), options}});
    if (planned) follow(net->net, layers, plan.algorithms, wanted.features != 0);
    else choose_safely(net->net, layers);
    return net.release();
}

}  // namespace

extern "C" {

repvgg_model *repvgg_read(const char *path, char *error, size_t size) {
    repvgg_model *model = nullptr;
    guarded(error, size, path, "its weights", [&] {
        if (!path) refuse("no path");
        model = new repvgg_model(repvgg::read_model(*repvgg::open_file(path)));
    });
    return model;
}

repvgg_model *repvgg_read_bytes(const void *bytes, size_t count, char *error, size_t size) {
    repvgg_model *model = nullptr;
    guarded(error, size, "the model", "its weights", [&] {
        if (!bytes) refuse("no bytes");
        model = new repvgg_model(repvgg::read_model(*repvgg::open_bytes(bytes, count)));
    });
    return model;
}

void repvgg_free(repvgg_model *model) { delete model; }

int repvgg_describe(const repvgg_model *model, repvgg_description *description) {
    if (!model || !description || description->size < sizeof description->size) return -1;
    const repvgg::Model &m = *model->model;
    const repvgg::Preprocessing &p = m.preprocessing;
    repvgg_description d{};
    d.size = std::min(description->size, sizeof d);
    d.layers = m.layers.data(), d.layer_count = static_cast<int32_t>(m.layers.size());
    d.channels = p.channels, d.height = p.height, d.width = p.width, d.resize = p.resize;
    d.interpolation = p.interpolation.c_str();
    d.mean = p.mean.data(), d.std = p.std.data(), d.scale = p.scale.data(), d.shift = p.shift.data();
    d.classes = m.classes.empty() ? nullptr : model->classes.data();
    d.class_count = static_cast<int32_t>(m.classes.size());
    std::memcpy(description, &d, d.size);
    return 0;
}

int repvgg_prepare(const repvgg_description *description, const uint8_t *pixels, int32_t height, int32_t width,
                   uint8_t *out, char *error, size_t size) {
    return guarded(error, size, nullptr, "resizing that image", [&] {
        const repvgg_description d = versioned(description, "a description");
        if (!d.interpolation || !pixels || !out) refuse("no description, no pixels or no room for the input");
        repvgg::prepare({d.channels, d.height, d.width, d.resize, d.interpolation, {}, {}, {}, {}}, pixels, height,
                        width, out);
    });
}

repvgg_net *repvgg_open(const char *path, const repvgg_open_options *options, char *error, size_t size) {
    repvgg_model *model = repvgg_read(path, error, size);
    return model ? repvgg_open_model(model, options, error, size) : nullptr;
}

repvgg_net *repvgg_open_model(repvgg_model *model, const repvgg_open_options *options, char *error, size_t size) {
    std::unique_ptr<repvgg_model> owned(model);
    repvgg_net *net = nullptr;
    guarded(error, size, nullptr, "a net of that model", [&] {
        if (!owned) refuse("no model");
        net = opened(std::move(owned), versioned(options, "a struct of options"));
    });
    return net;
}

const repvgg_model *repvgg_net_model(const repvgg_net *net) { return net ? net->model.get() : nullptr; }
}
