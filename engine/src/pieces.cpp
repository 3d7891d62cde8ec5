// How a layer is cut into pieces, which threads share out.
#include <algorithm>

#include "plan.h"

namespace repvgg {

namespace {

/// Transformed tiles and their products should stay in a core's second-level cache.
constexpr int64_t BLOCK_BYTES = 640 << 10;
/// But each block reads all weights; where those come from memory rather than the cache, fewer and larger blocks do.
constexpr int64_t BLOCKS_OF_WEIGHTS = 32;
/// And so many tiles make a block whatever its size: with fewer, the micro-kernel's last group is a large part of it.
constexpr int64_t SMALLEST_BLOCK = 48;
/// Fewer rows than this for each thread, or so many times more weights than transformed inputs, and threads share out
/// output channels rather than tiles: each weight is then read once, though each input is transformed by every thread.
constexpr int64_t FEW_TILES = 8, MANY_WEIGHTS = 8;
/// From so many blocks a thread on, blocks are of whole groups of tiles; fewer would then be unequal work for the
/// threads.
constexpr int64_t WHOLE_GROUPS = 4;

}  // namespace

/// Cuts a convolution into pieces: as few as fit the cache, but no fewer than there are threads.
void Plan::cut(Step &step, int threads) {
    Conv &c = step.conv;
    c.in = tensors_[step.in].map, c.out = tensors_[step.out].map;
    c.origins[0] = step.origins[0].data(), c.origins[1] = step.origins[1].data();
    c.weights = weights_[step.layer]->packed->floats(), c.bias = layers_[step.layer]->bias.data();
    if (tensors_[step.out].bytes) c.bytes_of_one = LARGEST_BYTE / layers_[step.layer + 1]->spec.largest_input;
    const bool local = &step - steps_.data() < local_steps_;
    step.tiles = static_cast<int64_t>(c.tiles[0]) * c.tiles[1] * (local ? 1 : n_);
    const int64_t tile_bytes =
        (step.algorithm->scratch(c, 2) - step.algorithm->scratch(c, 1)) * static_cast<int64_t>(sizeof(float));
    const int wanted = local ? 1 : static_cast<int>(ceil_div(threads, c.groups));
    step.splits = 1;
    const int64_t weight_bytes = packed_floats(c, *step.algorithm, 1) * static_cast<int64_t>(sizeof(float));
    int64_t blocks = ceil_div(
        step.tiles, std::max(SMALLEST_BLOCK, std::max(BLOCK_BYTES, weight_bytes / BLOCKS_OF_WEIGHTS) / tile_bytes));
    if (blocks < wanted) {
        // By panels first, and where there are more threads than panels by tiles too.
        if (step.tiles < FEW_TILES * wanted || step.tiles * MANY_WEIGHTS < c.out_channels)
            step.splits = best_splits(step, wanted, blocks);
        blocks = std::min(step.tiles, std::max(blocks, ceil_div(wanted, step.splits)));
    } else {
        blocks = round_up(blocks, wanted);
    }
    step.block = ceil_div(step.tiles, blocks);
    if (blocks >= WHOLE_GROUPS * wanted) step.block = round_up(step.block, c.rows);
    step.blocks = static_cast<int>(ceil_div(step.tiles, step.block));
}

/// Into how many parts of the panels, with as many blocks of tiles as the rest of the threads take, so that they are
/// done first; the most parts of those, for less is read twice.
int Plan::best_splits(const Step &step, int wanted, int64_t blocks) {
    int best = 1;
    int64_t least = INT64_MAX;
    for (int splits = std::min(wanted, step.conv.panels); splits >= 1; splits--) {
        const int64_t parts = std::min(step.tiles, std::max(blocks, ceil_div(wanted, splits)));
        const int64_t largest = ceil_div(step.conv.panels, splits) * ceil_div(step.tiles, parts);
        const int64_t time = ceil_div(splits * parts, wanted) * largest;
        if (time < least) least = time, best = splits;
    }
    return best;
}

int Plan::items(const Step &step) const {
    if (layers_[step.layer]->is_conv()) return step.conv.groups * step.splits * step.blocks;
    return &step - steps_.data() < local_steps_ ? 1 : n_ * step.splits;
}

/// Which tiles and panels it is. Blocks change fastest, so that threads work with the same weights.
Piece Plan::piece_of(const Step &step, int item) const {
    const int block = item % step.blocks, split = item / step.blocks % step.splits;
    Piece piece{};
    piece.group = item / step.blocks / step.splits;
    piece.first_panel = panel_start(step.conv.panels, step.splits, split),
    piece.last_panel = panel_start(step.conv.panels, step.splits, split + 1);
    piece.first = block * step.block, piece.last = std::min(step.tiles, piece.first + step.block);
    return piece;
}

std::vector<int64_t> Plan::work(int layer) const {
    const Step &step = steps_[layer];
    const int vectors = static_cast<int>(ceil_div(step.conv.out_channels, kernels_.width));
    std::vector<int64_t> found;
    for (int item = 0; item < items(step); item++) {
        const Piece piece = piece_of(step, item);
        const auto start = [&](int panel) { return panel_start(vectors, step.conv.panels, panel); };
        found.push_back((piece.last - piece.first) * (start(piece.last_panel) - start(piece.first_panel)) *
                        step.conv.products * step.conv.depth);
    }
    return found;
}

}  // namespace repvgg
