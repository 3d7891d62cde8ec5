// The engine's arithmetic. Compiled once for each instruction set, under a name of its own (REPVGG_ISA), with
// everything hidden.
#include "kernels.h"

#include "conv.h"
#if defined(REPVGG_INT8)
#include "bytes.h"
#elif defined(REPVGG_INT16)
#include "integer.h"
#endif

namespace repvgg::REPVGG_ISA {

#if defined(REPVGG_INT8)
using Element = Integer8;
#define REPVGG_NAMED(name) name " int8"
#elif defined(REPVGG_INT16)
using Element = Integer16;
#define REPVGG_NAMED(name) name " int16"
#elif defined(__AVX512BF16__)
using Element = BFloat16;
#define REPVGG_NAMED(name) name " bf16"
#else
using Element = Float32;
#define REPVGG_NAMED(name) name
#endif

template <class A, class E>
int64_t scratch(const Conv &c, int64_t tiles) {
    return Block<A, E>(c, tiles, nullptr).floats();
}

template <class A, class E = Element>
constexpr Algorithm algorithm(const char *name, bool ranged = false) {
    return {name,     A::outputs, A::samples,     A::frequencies, A::stride,    ranged,
            E::bytes, run<A, E>,  packed_rows<E>, pack<A, E>,     scratch<A, E>};
}

constexpr Algorithm algorithms[] = {
#ifdef REPVGG_INT8
    algorithm<Direct, Bytes>(REPVGG_NAMED("direct"), true),
    algorithm<Tiled<2, 1>>(REPVGG_NAMED("F2"), true),
    algorithm<Tiled<4, 1>>(REPVGG_NAMED("F4"), true),
    algorithm<Tiled<2, 2>>(REPVGG_NAMED("F2"), true),
#else
    algorithm<Direct>(REPVGG_NAMED("direct")),  algorithm<Tiled<2, 1>>(REPVGG_NAMED("F2")),
    algorithm<Tiled<4, 1>>(REPVGG_NAMED("F4")), algorithm<Tiled<5, 1>>(REPVGG_NAMED("F5")),
    algorithm<Tiled<6, 1>>(REPVGG_NAMED("F6")), algorithm<Tiled<7, 1>>(REPVGG_NAMED("F7")),
    algorithm<Tiled<2, 2>>(REPVGG_NAMED("F2")), algorithm<Tiled<4, 2>>(REPVGG_NAMED("F4")),
    algorithm<Tiled<7, 2>>(REPVGG_NAMED("F7")),
#endif
};

/// Planes to pixels. CHANNELS: how many, where the compiler should know.
template <int CHANNELS>
void interleave(const float *row, int64_t plane, int channels, int64_t width, int64_t pixel, float *out) {
    const int count = CHANNELS ? CHANNELS : channels;
    for (int64_t x = 0; x < width; x++)
        for (int64_t c = 0; c < count; c++) out[x * pixel + c] = row[c * plane + x];
}

void read_floats(const float *image, int channels, const int size[2], int first_row, int last_row, const Map &map,
                 float *out) {
    const int64_t plane = static_cast<int64_t>(size[0]) * size[1];
    const auto read_row = channels == 3 && map.pixel == 3 ? interleave<3> : interleave<0>;
    for (int64_t y = first_row; y < last_row; y++)
        read_row(image + y * size[1], plane, channels, size[1], map.pixel, out + y * map.row);
}

void read_bytes(const uint8_t *image, int channels, const int size[2], int first_row, int last_row, const float *scale,
                const float *shift, const Map &map, float *out) {
    for (int64_t y = first_row; y < last_row; y++)
        for (int64_t x = 0; x < size[1]; x++) {
            const uint8_t *from = image + (y * size[1] + x) * channels;
            float *to = out + y * map.row + x * map.pixel;
            for (int c = 0; c < channels; c++) to[c] = static_cast<float>(from[c]) * scale[c] + shift[c];
        }
}

/// Pixels to planes: squares of WIDTH pixels and WIDTH channels at a time, so that both sides are walked in whole
/// lines.
void write(const float *map, const Map &strides, int channels, const int size[2], int first_row, int last_row,
           float *image) {
    const int64_t plane = static_cast<int64_t>(size[0]) * size[1];
    for (int64_t y = first_row; y < last_row; y++)
        for (int64_t c = 0; c < channels; c += WIDTH)
            for (int64_t x = 0; x < size[1]; x += WIDTH) {
                const int columns = static_cast<int>(size[1] - x < WIDTH ? size[1] - x : WIDTH);
                const int planes = static_cast<int>(channels - c < WIDTH ? channels - c : WIDTH);
                float square[WIDTH][WIDTH];  // [channel][pixel]
                for (int i = 0; i < columns; i++) {
                    const Vec pixel = load(map + y * strides.row + (x + i) * strides.pixel + c);
                    for (int lane = 0; lane < WIDTH; lane++) square[lane][i] = pixel[lane];
                }
                for (int lane = 0; lane < planes; lane++)
                    memcpy(image + (c + lane) * plane + y * size[1] + x, square[lane],
                           static_cast<size_t>(columns) * sizeof(float));
            }
}

void pool(const float *map, const Map &strides, int channels, const int size[2], float *means) {
    const float scale = 1.0f / (static_cast<float>(size[0]) * static_cast<float>(size[1]));
    for (int64_t c = 0; c < channels; c += WIDTH) {
        Vec sum{};
        for (int64_t y = 0; y < size[0]; y++) {
            Vec row{};  // rows first: shorter sums, smaller rounding errors
            for (int64_t x = 0; x < size[1]; x++) row += load(map + y * strides.row + x * strides.pixel + c);
            sum += row;
        }
        store(means + c, sum * splat(scale));
    }
}

void max_pool(const MaxPool &p, const float *map, float *out) {
    for (int y = 0; y < p.out_size[0]; y++)
        for (int x = 0; x < p.out_size[1]; x++) {
            const int at[2] = {y * p.stride[0] - p.padding[0], x * p.stride[1] - p.padding[1]};
            int first[2], last[2];
            for (int axis = 0; axis < 2; axis++) {
                const int end = at[axis] + p.kernel[axis];
                first[axis] = at[axis] > 0 ? at[axis] : 0, last[axis] = end < p.size[axis] ? end : p.size[axis];
            }
            for (int64_t c = 0; c < p.channels; c += WIDTH) {
                Vec most = load(map + first[0] * p.in.row + first[1] * p.in.pixel + c);
                for (int64_t i = first[0]; i < last[0]; i++)
                    for (int64_t j = first[1]; j < last[1]; j++) {
                        const Vec v = load(map + i * p.in.row + j * p.in.pixel + c);
                        most = ((v > most) | (v != v)) ? v : most;  // NaN stays NaN
                    }
                store(out + y * p.out.row + x * p.out.pixel + c, most);
            }
        }
}

/// e^x, to half a unit in the last place. A C library's may differ from processor to processor; this one does not.
float exponential(float x) {
    if (!(x > -87.0f && x < 88.0f)) return x != x ? x : x > 0 ? __builtin_inff() : 0.0f;
    const double twos = static_cast<double>(x) * 1.4426950408889634;
    const int whole = static_cast<int>(twos + (twos < 0 ? -0.5 : 0.5));
    const double rest = static_cast<double>(x) - whole * 0.6931471805599453;  // at most 0.35 in size
    double sum = 1;
    for (int i = 10; i > 0; i--) sum = 1 + sum * rest / i;  // Taylor
    const uint64_t bits = static_cast<uint64_t>(1023 + whole) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return static_cast<float>(sum * power);
}

void excite(const Excite &e, float *map, const Map &strides, const int size[2], float *scratch) {
    float *means = scratch, *hidden = means + e.channels + WIDTH, *gate = hidden + e.hidden + WIDTH;
    pool(map, strides, e.channels, size, means);
    for (int64_t h = 0; h < e.hidden; h++) {
        float sum = e.reduce_bias[h];
        for (int64_t c = 0; c < e.channels; c++) sum += e.reduce[h * e.channels + c] * means[c];
        hidden[h] = sum < 0 ? 0 : sum;  // NaN stays NaN
    }
    for (int64_t c = 0; c < e.channels; c++) {
        float sum = e.expand_bias[c];
        for (int64_t h = 0; h < e.hidden; h++) sum += e.expand[c * e.hidden + h] * hidden[h];
        gate[c] = 1 / (1 + exponential(-sum));
    }
    for (int64_t c = e.channels; c < e.channels + WIDTH; c++) gate[c] = 0;  // lanes beyond the last channel stay zero
    for (int64_t y = 0; y < size[0]; y++)
        for (int64_t x = 0; x < size[1]; x++) {
            float *pixel = map + y * strides.row + x * strides.pixel;
            for (int64_t c = 0; c < e.channels; c += WIDTH) {
                const Vec scaled = load(pixel + c) * load(gate + c);
                store(pixel + c, e.relu ? relu(scaled) : scaled);
            }
        }
}

}  // namespace repvgg::REPVGG_ISA

#define REPVGG_TEXT_OF(x) #x
#define REPVGG_TEXT(x) REPVGG_TEXT_OF(x)
#define REPVGG_JOIN_OF(a, b) a##b
#define REPVGG_JOIN(a, b) REPVGG_JOIN_OF(a, b)

namespace repvgg {

/// kernels_avx512() and its like.
const Kernels *REPVGG_JOIN(kernels_, REPVGG_ISA)() {
    using namespace REPVGG_ISA;
    static constexpr Kernels kernels = {
        REPVGG_TEXT(REPVGG_SET),
        WIDTH,
        MAX_PANEL,
        [](int vectors) { return rows_for(vectors); },
        algorithms,
        sizeof algorithms / sizeof *algorithms,
        read_floats,
        read_bytes,
        write,
        REPVGG_ISA::pool,
        max_pool,
        REPVGG_ISA::excite,
    };
    return &kernels;
}

}  // namespace repvgg
