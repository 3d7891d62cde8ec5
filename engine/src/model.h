// Model files of `repvgg` in deploy form: safetensors whose metadata lists the layers one by one.
//
// Files of strangers are hostile: every length is checked against the file's before it is used, and whatever is wrong
// becomes one line. Weights are read into memory, once: what happens to the file afterwards changes no answer.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "json.h"
#include "repvgg_engine.h"

namespace repvgg {

/// Bytes that a model is read from: a file's, or a caller's.
class Source {
  public:
    virtual ~Source() = default;
    virtual int64_t size() const = 0;
    virtual void read(int64_t start, int64_t length, void *to) const = 0;
    /// Throws if the bytes are no longer those that were there at first.
    virtual void check_unchanged() const {}
};

/// A regular file. Throws std::invalid_argument for what is none, or cannot be read.
std::unique_ptr<Source> open_file(const char *path);
std::unique_ptr<Source> open_bytes(const void *bytes, size_t count);

/// From image to input: resize the short side, crop the centre, scale to 0..1, subtract mean, divide by std.
struct Preprocessing {
    int channels, height, width, resize;
    std::string interpolation;
    std::vector<double> mean, std;
    std::vector<float> scale, shift;  // a byte becomes byte * scale + shift
};

/// What a file holds. `layers` point into `weights`.
struct Model {
    std::vector<repvgg_layer> layers;
    std::vector<std::vector<float>> weights;
    Preprocessing preprocessing;
    std::vector<std::string> classes;
};

/// Throws std::invalid_argument for what is no model file in deploy form, or a damaged one.
std::unique_ptr<Model> read_model(const Source &source);

/// The centre of an image, resized as the model wants it. rgb: uint8 [height, width, channels]; out: the same of the
/// model's size. As Pillow does it, bit for bit. Throws std::invalid_argument for sizes that cannot be.
void prepare(const Preprocessing &preprocessing, const uint8_t *pixels, int height, int width, uint8_t *out);

/// A plan file's words.
struct PlanWords {
    std::string isa, precision;
    std::vector<std::string> algorithms;
};
PlanWords read_plan(const Source &source);

}  // namespace repvgg
