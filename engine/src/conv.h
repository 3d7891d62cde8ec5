// A convolution block by block: for a block of tiles that fits the cache, transform the inputs once; then for each
// panel of output channels multiply, transform back, add the bias, apply the ReLU, store.
//
//     input maps --input()--> V [product][tile][channel] --multiply--> M [product][tile][panel] --output()--> maps
//
// Winograd's algorithms and the direct one differ in `input` and `output` alone. For the direct one a tile is a pixel,
// its products are the taps of the kernel (or whole rows of them, or all), and they all add into one M.
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "targets.h"
#include "winograd.h"

namespace repvgg::REPVGG_ISA {

/// Where a tile reads and writes, and how many of its outputs exist.
struct Tile {
    const float *in;
    float *out;
    int rows, columns;
};

/// Where a block's numbers lie in scratch memory. Tiles are taken in groups of at most c.rows, about equally many in
/// each.
template <class Algorithm, class Element>
struct Block {
    int64_t tiles, groups, depth;  // depth: of a tile in V, in floats
    int64_t v_product,
        m_product;  // from one product to the next; not a power of two, or they would all meet in one set of the cache
    int64_t staged_product;
    Tile *tile;
    float *v, *m;
    float *scales, *staged;  // where V is scaled: [product][tile], and one tile before it is, [product][channel]
    float *end;

    Block(const Conv &c, int64_t tiles, float *scratch) : tiles(tiles) {
        groups = ceil_div(tiles, c.rows);
        depth = ceil_div(c.depth, WIDTH * Element::pack) * WIDTH;
        v_product = tiles * depth + LINE;
        m_product = Algorithm::one_sum ? 0 : tiles * MAX_PANEL * WIDTH + LINE;
        staged_product = ceil_div(c.depth, LINE) * LINE + LINE;
        tile = reinterpret_cast<Tile *>(scratch);
        v = scratch + ceil_div(tiles * static_cast<int64_t>(sizeof(Tile) / sizeof(float)), LINE) * LINE;
        m = v + c.products * v_product;
        scales = m + c.products * m_product + tiles * MAX_PANEL * WIDTH;
        staged = scales + (Element::scaled ? ceil_div(c.products * tiles, LINE) * LINE : 0);
        end = staged + (Element::scaled ? c.products * staged_product : 0);
    }
    int64_t first(int64_t group) const { return tiles * group / groups; }
    int64_t floats() const { return end - reinterpret_cast<float *>(tile); }
};

/// The transformed inputs of tile `index`, the `row`-th of `rows` in its group; `next`: the tile that comes after it.
template <class Algorithm, class Element>
REPVGG_INLINE void transform(const Conv &c, const Block<Algorithm, Element> &block, int64_t index, int64_t row,
                             int64_t rows) {
    const Tile &tile = block.tile[index], &next = block.tile[index + (index + 1 < block.tiles)];
    float *v = block.v + (index - row) * block.depth + row * WIDTH;
    if constexpr (Element::scaled) {
        Algorithm::input(c, tile, next, Staged{block.staged, block.staged_product, Lanes(c.depth)});
        Element::quantise(block.staged, block.staged_product, c.products, c.depth, v, block.v_product, rows * WIDTH,
                          block.scales + index, block.tiles);
    } else {
        using To = std::conditional_t<Element::bytes, Copied, Target<Element>>;
        const To to{v, block.v_product, rows * WIDTH};
        if constexpr (!Element::bytes && Element::pack > 1)
            if (c.depth % Element::pack) return Algorithm::input(c, tile, next, Odd<Element>{to, Lanes(c.depth)});
        Algorithm::input(c, tile, next, to);
    }
}

/// Rows of a product's packed weights.
template <class Element>
int64_t packed_rows(int depth) {
    const int64_t k = ceil_div(depth, Element::pack);
    return k + Element::scale_rows * ceil_div(k, Element::chunk);
}

struct Direct {
    static constexpr int outputs = 1, samples = 1, frequencies = 0, stride = 0;
    static constexpr bool one_sum = true;

    template <class To>
    static REPVGG_INLINE void input(const Conv &c, const Tile &tile, const Tile &, const To &target) {
        const int vectors = static_cast<int>(ceil_div(c.depth, WIDTH * To::numbers));
        if (c.joined > c.kernel[1]) return joined_input(c, tile, target, vectors);
        for (int p = 0; p < c.products; p++) {
            const int y = p * c.joined / c.kernel[1], x = p * c.joined % c.kernel[1];
            const float *in = tile.in + y * c.dilation[0] * c.in.row + x * c.dilation[1] * c.in.pixel;
            for (int v = 0; v < vectors; v++) target.put(p, v, load(in + v * WIDTH));
        }
    }

    /// The rows of the kernel one after the other.
    template <class To>
    static REPVGG_INLINE void joined_input(const Conv &c, const Tile &tile, const To &target, int vectors) {
        const int row = c.kernel[1] * c.in_channels / To::numbers;
        for (int v = 0; v < vectors; v++) {
            Vec numbers{};
            for (int y = 0; y < c.kernel[0]; y++) {
                const int start = y * row - v * WIDTH;  // the lane where this row begins
                if (start + row <= 0 || start >= WIDTH) continue;
                const Vec own = load(tile.in + y * c.dilation[0] * c.in.row - start);
                numbers = lanes_between(start, start + row) ? own : numbers;
            }
            target.put(0, v, numbers);
        }
    }

    template <class Finish>
    static REPVGG_INLINE void output(const Conv &c, const Tile &tile, const float *m, int64_t, int channel,
                                     const Finish &finish) {
        prefetch_to_write(tile.out + 8 * c.out.pixel + channel);
        finish(tile.out, load(m));
    }

    /// For lanes of output channels from `weights` on, and the k-th number of each product: sink(product, numbers of
    /// the lanes).
    template <class Sink>
    static void weights(const ConvShape &c, const float *weights, int lanes, int k, const Sink &sink) {
        const int taps = c.kernel[0] * c.kernel[1], channel = k % c.in_channels;
        for (int p = 0; p < products_of(c, 0); p++) {
            const int tap = p * c.joined + k / c.in_channels;
            double numbers[WIDTH] = {};
            for (int lane = 0; lane < lanes; lane++)
                numbers[lane] = weights[(static_cast<int64_t>(lane) * c.in_channels + channel) * taps + tap];
            sink(p, numbers);
        }
    }
};

template <int OUTPUTS, int STRIDE>
struct Tiled {
    using Line = Winograd<OUTPUTS, STRIDE>;
    static constexpr int outputs = OUTPUTS, samples = Line::samples, frequencies = Line::frequencies, stride = STRIDE;
    static constexpr bool one_sum = false;

    template <class To>
    static REPVGG_INLINE void input(const Conv &c, const Tile &tile, const Tile &next, const To &target) {
        const int64_t row = c.dilation[0] * c.in.row, column = c.dilation[1] * c.in.pixel;
        const int vectors = static_cast<int>(ceil_div(c.in_channels, WIDTH));
        for (int v = 0; v < vectors; v++) {
            Vec across[samples][frequencies], line[samples], out[frequencies];
            const float *in = tile.in + v * WIDTH, *ahead = v + 1 < vectors ? in + WIDTH : next.in;
            for (int i = 0; i < samples; i++) {
                each<samples>([&](auto j) REPVGG_INLINE_LAMBDA {
                    line[j.value] = load(in + i * row + j.value * column);
                    prefetch(ahead + i * row + j.value * column);
                });
                Line::input(line, across[i]);
            }
            for (int j = 0; j < frequencies; j++) {
                each<samples>([&](auto i) REPVGG_INLINE_LAMBDA { line[i.value] = across[i.value][j]; });
                Line::input(line, out);
                each<frequencies>([&](auto i)
                                      REPVGG_INLINE_LAMBDA { target.put(i.value * frequencies + j, v, out[i.value]); });
            }
        }
    }

    template <class Finish>
    static REPVGG_INLINE void output(const Conv &c, const Tile &tile, const float *m, int64_t product, int channel,
                                     const Finish &finish) {
        const int64_t row = c.dilation[0] * c.out.row, column = c.dilation[1] * c.out.pixel;
        Vec down[outputs][frequencies], line[frequencies], out[outputs];
        for (int i = 0; i < outputs; i++)
            each<outputs>([&](auto j) REPVGG_INLINE_LAMBDA {
                prefetch_to_write(tile.out + i * row + j.value * column + channel);
            });
        for (int j = 0; j < frequencies; j++) {
            each<frequencies>(
                [&](auto i) REPVGG_INLINE_LAMBDA { line[i.value] = load(m + (i.value * frequencies + j) * product); });
            Line::output(line, out);
            each<outputs>([&](auto i) REPVGG_INLINE_LAMBDA { down[i.value][j] = out[i.value]; });
        }
        for (int i = 0; i < tile.rows; i++) {
            Line::output(down[i], out);
            each<outputs>([&](auto j) REPVGG_INLINE_LAMBDA {
                if (j.value < tile.columns) finish(tile.out + i * row + j.value * column, out[j.value]);
            });
        }
    }

    /// As in Direct. In double, so that it adds no error but one rounding.
    template <class Sink>
    static void weights(const ConvShape &c, const float *weights, int lanes, int k, const Sink &sink) {
        double taps[3][3][WIDTH] = {}, across[3][frequencies][WIDTH] = {};
        for (int lane = 0; lane < lanes; lane++)
            for (int t = 0; t < 9; t++)
                taps[t / 3][t % 3][lane] = weights[(static_cast<int64_t>(lane) * c.in_channels + k) * 9 + t];
        for (int row = 0; row < 3; row++)
            for (int j = 0; j < frequencies; j++)
                for (int t = 0; t < 3; t++)
                    for (int lane = 0; lane < WIDTH; lane++)
                        across[row][j][lane] += Line::weights.at[j][t] * taps[row][t][lane];
        for (int i = 0; i < frequencies; i++)
            for (int j = 0; j < frequencies; j++) {
                double numbers[WIDTH] = {};
                for (int t = 0; t < 3; t++)
                    for (int lane = 0; lane < WIDTH; lane++)
                        numbers[lane] += Line::weights.at[i][t] * across[t][j][lane];
                sink(i * frequencies + j, numbers);
            }
    }
};

template <class Algorithm>
void find_tiles(const Conv &c, const Piece &piece, Tile *tile) {
    const int64_t rows = c.tiles[0], columns = c.tiles[1];
    int64_t image = piece.first / (rows * columns), y = piece.first / columns % rows, x = piece.first % columns;
    const float *in = piece.in + piece.group * c.in_channels;
    float *out = piece.out + piece.group * c.out_channels;
    const auto exist = [&](int axis, int64_t first) {
        const int64_t left = ceil_div(c.size[axis] - first, Algorithm::one_sum ? 1 : c.dilation[axis]);
        return static_cast<int>(left < Algorithm::outputs ? left : Algorithm::outputs);
    };
    for (int64_t t = piece.first; t < piece.last; t++, tile++) {
        const int64_t row = c.origins[0][y], column = c.origins[1][x];
        tile->in = in + image * c.in.image + row * c.stride[0] * c.in.row + column * c.stride[1] * c.in.pixel;
        tile->out = out + image * c.out.image + row * c.out.row + column * c.out.pixel;
        tile->rows = exist(0, row);
        tile->columns = exist(1, column);
        if (++x == columns) {
            x = 0;
            if (++y == rows) y = 0, image++;
        }
    }
}

/// Multiplies the block's V by one panel's weights.
template <class Algorithm, class Element>
void multiply_panel(const Conv &c, const Block<Algorithm, Element> &block, const float *weights, int vectors) {
    const int64_t k = ceil_div(c.depth, Element::pack);
    // The weights of the next product, this many cache lines for each k: each group of tiles fetches its share.
    const int64_t lines = ceil_div(vectors * WIDTH, LINE);
    const int share = static_cast<int>(ceil_div(lines, block.groups));
    for (int p = 0; p < c.products; p++) {
        for (int64_t start = 0; start < k; start += Element::chunk) {
            const int64_t length = k - start < Element::chunk ? k - start : Element::chunk;
            const float *next = weights + (length + Element::scale_rows) * vectors * WIDTH;
            for (int64_t g = 0; g < block.groups; g++) {
                const int64_t first = block.first(g), rows = block.first(g + 1) - first;
                const float *v = block.v + p * block.v_product + first * block.depth + start * rows;
                float *m = block.m + p * block.m_product + first * vectors * WIDTH;
                const bool add = start > 0 || (Algorithm::one_sum && p > 0);
                const float *ahead = next + (g * share < lines ? g * share : 0) * length * LINE;
                multiply_for<Element>(static_cast<int>(rows), vectors)(
                    v, weights, m, static_cast<int>(length), add, block.scales + p * block.tiles + first, ahead, share);
            }
            weights = next;
        }
    }
}

template <class Algorithm, class Element>
void run(const Conv &c, const Piece &piece) {
    const Block<Algorithm, Element> block(c, piece.last - piece.first, piece.scratch);
    find_tiles<Algorithm>(c, piece, block.tile);
    for (int64_t g = 0; g < block.groups; g++) {
        const int64_t first = block.first(g), rows = block.first(g + 1) - first;
        for (int64_t r = 0; r < rows; r++) transform(c, block, first + r, r, rows);
    }
    const int vectors = static_cast<int>(ceil_div(c.out_channels, WIDTH));
    const int64_t vector_weights = c.products * packed_rows<Element>(c.depth) * WIDTH;
    for (int panel = piece.first_panel; panel < piece.last_panel; panel++) {
        const int start = panel_start(vectors, c.panels, panel),
                  width = panel_start(vectors, c.panels, panel + 1) - start;
        const float *weights = c.weights + (static_cast<int64_t>(piece.group) * vectors + start) * vector_weights;
        multiply_panel<Algorithm, Element>(c, block, weights, width);
        const float *scales = weights + ceil_div(c.depth, Element::pack) * width * WIDTH;  // of sums of bytes
        const float *bias = c.bias + (static_cast<int64_t>(piece.group) * vectors + start) * WIDTH;
        for (int64_t t = 0; t < block.tiles; t++)
            for (int v = 0; v < width; v++) {
                const int channel = (start + v) * WIDTH, lanes = c.out_channels - channel;
                const bool whole =
                    lanes >= WIDTH || c.groups == 1;  // a group's last lanes would be the next group's first
                const Vec shift = load(bias + v * WIDTH);
                Vec scale{};
                if constexpr (Element::bytes) scale = load(scales + v * WIDTH);
                const auto finish = [&](float *pixel, Vec sum) REPVGG_INLINE_LAMBDA {
                    if constexpr (Element::bytes) sum = __builtin_convertvector((Ints)sum, Vec) * scale;
                    const Vec y = c.relu ? relu(sum + shift) : sum + shift;
                    if (c.bytes_of_one > 0) store_rounded(pixel + channel / BYTES, y * c.bytes_of_one);
                    else if (whole) store(pixel + channel, y);
                    else store(pixel + channel, y, lanes);
                };
                Algorithm::output(c, block.tile[t], block.m + (t * width + v) * WIDTH, block.m_product, channel,
                                  finish);
            }
    }
}

/// Packs the weights of a panel: [product][k][vector][lane]; where they are scaled, rows of scales after each chunk.
template <class Algorithm, class Element>
void pack(const ConvShape &c, const float *weights, int group, int panel, float *packed) {
    const int vectors = static_cast<int>(ceil_div(c.out_channels, WIDTH));
    const int start = panel_start(vectors, c.panels, panel), width = panel_start(vectors, c.panels, panel + 1) - start;
    const int products = products_of(c, Algorithm::frequencies), depth = depth_of(c, Algorithm::frequencies);
    const int64_t k = ceil_div(depth, Element::pack), rows = packed_rows<Element>(depth),
                  filter = static_cast<int64_t>(c.in_channels) * c.kernel[0] * c.kernel[1];
    packed += (static_cast<int64_t>(group) * vectors + start) * products * rows * WIDTH;
    for (int v = 0; v < width; v++) {
        const int channel = (start + v) * WIDTH, left = c.out_channels - channel, lanes = left < WIDTH ? left : WIDTH;
        const float *of_lanes = weights + (static_cast<int64_t>(group) * c.out_channels + channel) * filter;
        const auto at = [&](int64_t p, int64_t row) { return packed + ((p * rows + row) * width + v) * WIDTH; };
        const auto row = [&](int64_t p, int64_t i) { return at(p, i + i / Element::chunk * Element::scale_rows); };
        const auto scales = [&](int64_t p, int64_t chunk, int which = 0) {
            const int64_t end = (chunk + 1) * Element::chunk;
            return at(p, (end < k ? end : k) + chunk * Element::scale_rows + which);
        };
        Element::pack_weights(c, products, depth, row, scales,
                              [&](int i, const auto &sink) { Algorithm::weights(c, of_lanes, lanes, i, sink); });
    }
}

}  // namespace repvgg::REPVGG_ISA
