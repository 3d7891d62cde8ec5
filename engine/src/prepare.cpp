// The resized centre of an image, as Pillow makes it, bit for bit: antialiased, rows first, in whole numbers.
#include <algorithm>
#include <cmath>

#include "model.h"

namespace repvgg {

namespace {

constexpr int64_t MOST_PIXELS = 100000000;
constexpr int MOST_SIDE = 8192;
constexpr int64_t MOST_RESIZED = int64_t{1} << 31;
constexpr int64_t LONGEST = 32;  // times the short side: what is beyond is cut off first
constexpr int BITS = 22;         // of the weights of samples

double bilinear(double x) { return std::max(0.0, 1 - std::fabs(x)); }

double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

struct Filter {
    const char *name;
    double reach;
    double (*weight)(double);
};

constexpr Filter FILTERS[] = {{"nearest", 0, nullptr}, {"bilinear", 1, bilinear}, {"bicubic", 2, bicubic}};

/// What new sample `at` of an axis is made of: old samples from `first` on, with these weights.
struct Taps {
    int64_t first = 0;
    std::vector<int32_t> weights;
};

Taps taps_of(const Filter &filter, int64_t at, int64_t before, int64_t after) {
    const double scale = static_cast<double>(before) / static_cast<double>(after);
    const double centre = (static_cast<double>(at) + 0.5) * scale;
    if (!filter.weight) return {std::min(static_cast<int64_t>(centre), before - 1), {1 << BITS}};
    const double spread = std::max(1.0, scale), reach = filter.reach * spread;
    const int64_t first = std::max<int64_t>(0, static_cast<int64_t>(centre - reach + 0.5));
    const int64_t end = std::min(before, static_cast<int64_t>(centre + reach + 0.5));
    std::vector<double> exact;
    double sum = 0;
    for (int64_t i = first; i < end; i++) {
        exact.push_back(filter.weight((static_cast<double>(i) - centre + 0.5) * (1 / spread)));
        sum += exact.back();
    }
    Taps taps{first, {}};
    for (const double w : exact) {
        const double share = sum != 0 ? w / sum : w;
        taps.weights.push_back(static_cast<int32_t>(share * (1 << BITS) + (share < 0 ? -0.5 : 0.5)));
    }
    return taps;
}

/// Along an axis: resized from `before` samples to `after`, then cut (or filled up with black) to `wanted`.
struct Axis {
    int64_t skip, before, after, wanted;  // skip: samples that are cut off at first
    int64_t first() const { return centred(after, wanted); }
    bool inside(int64_t i) const { return i + first() >= 0 && i + first() < after; }

    /// Where the centre of `wanted` samples begins: a half goes to the even neighbour; of black that fills up, the
    /// smaller half comes first.
    static int64_t centred(int64_t samples, int64_t wanted) {
        if (wanted > samples) return -((wanted - samples) / 2);
        return static_cast<int64_t>(std::nearbyint(static_cast<double>(samples - wanted) / 2));
    }
};

Axis axis_of(int64_t side, int64_t other, int64_t resize, int64_t wanted) {
    const int64_t kept = std::min(side, LONGEST * other), least = std::min(kept, std::min(other, LONGEST * side));
    return {Axis::centred(side, kept), kept, resize * kept / least, wanted};
}

uint8_t level(int64_t sum) {
    return static_cast<uint8_t>(std::clamp<int64_t>((sum + (1 << (BITS - 1))) >> BITS, 0, 255));
}

/// One axis of `lines` lines: sample `i` of line `l`, channel `c` lies at l * line + i * step + c.
void resample(const Filter &filter, const Axis &axis, int64_t lines, int64_t channels, const uint8_t *in,
              int64_t in_line, int64_t in_step, uint8_t *out, int64_t out_line, int64_t out_step) {
    std::vector<Taps> taps;  // none of what is outside: black, as it was made
    for (int64_t i = 0; i < axis.wanted; i++)
        taps.push_back(axis.inside(i) ? taps_of(filter, i + axis.first(), axis.before, axis.after) : Taps{});
    for (int64_t l = 0; l < lines; l++)
        for (int64_t i = 0; i < axis.wanted; i++) {
            const Taps &of = taps[static_cast<size_t>(i)];
            const uint8_t *from = in + l * in_line + (axis.skip + of.first) * in_step;
            for (int64_t c = 0; c < channels && !of.weights.empty(); c++) {
                int64_t sum = 0;
                for (size_t t = 0; t < of.weights.size(); t++)
                    sum += of.weights[t] * static_cast<int64_t>(from[static_cast<int64_t>(t) * in_step + c]);
                out[l * out_line + i * out_step + c] = level(sum);
            }
        }
}

}  // namespace

void prepare(const Preprocessing &p, const uint8_t *pixels, int height, int width, uint8_t *out) {
    if (height < 1 || width < 1 || static_cast<int64_t>(height) * width > MOST_PIXELS)
        refuse("an image of " + std::to_string(height) + " x " + std::to_string(width) + " pixels");
    if (std::min({p.channels, p.height, p.width, p.resize}) < 1 ||
        std::max({p.channels, p.height, p.width, p.resize}) > MOST_SIDE)
        refuse("an input that is no image of at most " + std::to_string(MOST_SIDE) + " pixels a side");
    const auto filter = std::find_if(std::begin(FILTERS), std::end(FILTERS),
                                     [&](const Filter &f) { return p.interpolation == f.name; });
    if (filter == std::end(FILTERS)) refuse("no interpolation '" + p.interpolation + "': nearest, bilinear, bicubic");
    const Axis columns = axis_of(width, height, p.resize, p.width), rows = axis_of(height, width, p.resize, p.height);
    const int64_t channels = p.channels, line = columns.wanted * channels;
    if (std::max(rows.before, rows.wanted) * line > MOST_RESIZED)  // of 32 bits, some addresses would begin again at 0
        refuse("an image that takes more than 2 GiB while it is resized");
    std::vector<uint8_t> half(static_cast<size_t>(rows.before * line));
    resample(*filter, columns, rows.before, channels, pixels + rows.skip * width * channels, width * channels, channels,
             half.data(), line, channels);
    std::fill(out, out + rows.wanted * line, uint8_t{0});
    const Axis whole{0, rows.before, rows.after, rows.wanted};
    resample(*filter, whole, columns.wanted, channels, half.data(), channels, line, out, channels, line);
}

}  // namespace repvgg
