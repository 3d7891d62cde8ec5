#include "plan.h"

#include <time.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>

namespace repvgg {

namespace {

/// Floats that are worth handing to a thread: some ten microseconds' work.
constexpr int64_t WORTH_A_PIECE = 1 << 16;
constexpr int64_t ALIGNMENT = 1024;
constexpr int64_t MOST_FLOATS = int64_t{1} << 36;

/// First outputs of the tiles along an axis. A convolution of dilation d is d interleaved plain ones.
std::vector<int> tile_origins(int size, int dilation, int outputs) {
    std::vector<int> origins;
    for (int phase = 0; phase < std::min(dilation, size); phase++)
        for (int first = phase; first < size; first += outputs * dilation) origins.push_back(first);
    return origins;
}

/// Nanoseconds that this thread has computed, where the system counts them: what others take of its processor is not
/// its layers' cost.
int64_t own_time() {
#ifdef CLOCK_THREAD_CPUTIME_ID
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<int64_t>(now.tv_sec) * 1000000000 + now.tv_nsec;
#else
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
#endif
}

}  // namespace

Plan::Plan(const Kernels &kernels, std::vector<std::unique_ptr<Layer>> &layers,
           std::vector<std::shared_ptr<Weights>> weights, int n, const int size[2], int threads)
    : kernels_(kernels), layers_(layers), weights_(std::move(weights)), n_(n) {
    tensors_.emplace_back(layers[0]->spec.in_channels, size);
    for (int i = 0; i < static_cast<int>(layers.size()); i++) add_step(i, i > 0 ? steps_.back().out : 0);
    choose_local(threads);
    place(threads);
}

void Plan::add_step(int index, int in) {
    const Layer &layer = *layers_[index];
    Step step{};
    step.layer = index, step.in = in, step.out = in;
    if (layer.spec.op != REPVGG_SQUEEZE_EXCITE) {  // which works in place
        int size[2];
        output_size(layer, index, tensors_[in].size, size);
        tensors_.emplace_back(layer.out_channels(), size);
        step.out++;
    }
    if (layer.is_conv()) {
        step.algorithm = weights_[index]->algorithm;
        set_tiling(step);
    }
    steps_.push_back(std::move(step));
}

/// Cuts the output into tiles, and sees to it that the input map reaches as far as they read.
void Plan::set_tiling(Step &step) {
    const Layer &layer = *layers_[step.layer];
    Tensor &from = tensors_[step.in];
    static_cast<ConvShape &>(step.conv) = layer.shape;
    from.bytes = step.algorithm->bytes;
    step.conv.products = products_of(layer.shape, step.algorithm->frequencies);
    step.conv.depth = depth_of(layer.shape, step.algorithm->frequencies);
    for (int axis = 0; axis < 2; axis++) {
        const int dilation = step.algorithm->frequencies ? layer.spec.dilation[axis] : 1;
        step.conv.size[axis] = tensors_[step.out].size[axis];
        step.origins[axis] = tile_origins(step.conv.size[axis], dilation, step.algorithm->outputs);
        step.conv.tiles[axis] = static_cast<int>(step.origins[axis].size());
        const int last = *std::max_element(step.origins[axis].begin(), step.origins[axis].end());
        from.border[axis] = layer.spec.padding[axis];
        from.extent[axis] = std::max(from.size[axis] + 2 * from.border[axis],
                                     last * layer.spec.stride[axis] + (step.algorithm->samples - 1) * dilation + 1);
    }
}

/// Early layers, whose maps are larger than their weights, run image by image, so that maps stay in the cache; the
/// others layer by layer, so that weights do.
void Plan::choose_local(int threads) {
    if (n_ == 1 || (n_ % threads != 0 && n_ < 4 * threads)) return;
    for (const Step &step : steps_) {
        const repvgg_layer &spec = layers_[step.layer]->spec;
        const Tensor &in = tensors_[step.in], &out = tensors_[step.out];
        const int64_t maps = static_cast<int64_t>(in.size[0]) * in.size[1] * in.channels +
                             static_cast<int64_t>(out.size[0]) * out.size[1] * out.channels;
        const int64_t weights =
            static_cast<int64_t>(spec.out_channels) * step.conv.in_channels * spec.kernel[0] * spec.kernel[1];
        if (spec.op == REPVGG_POOL || (layers_[step.layer]->is_conv() && maps < weights)) break;
        local_steps_++;
    }
    for (int i = 0; i < local_steps_; i++) tensors_[steps_[i].in].local = true;
    if (local_steps_ > 0) tensors_[steps_[local_steps_ - 1].out].local = false;
}

/// Gives each tensor its place, tensors that are alike the same two in turn: their borders are zero from the start and
/// stay so.
int64_t Plan::layout(bool local) {
    struct Buffer {
        int like, last;  // tensors: the first and the last that it was given to
    };
    std::vector<Buffer> buffers;
    int64_t end = 0;
    const int count = static_cast<int>(tensors_.size());
    for (int i = 0; i < count; i++) {
        Tensor &t = tensors_[i];
        if (t.local != local) continue;
        const auto alike = [&](const Buffer &buffer) {
            const Tensor &b = tensors_[buffer.like];
            return buffer.last != i - 1 && b.channels == t.channels && b.map.pixel == t.map.pixel &&
                   std::equal(b.size, b.size + 2, t.size) && std::equal(b.extent, b.extent + 2, t.extent) &&
                   std::equal(b.border, b.border + 2, t.border);
        };
        const auto found = std::find_if(buffers.begin(), buffers.end(), alike);
        if (found != buffers.end()) {
            found->last = i;
            t.offset = tensors_[found->like].offset;
            continue;
        }
        buffers.push_back({i, i});
        t.offset = end;
        end += round_up((local ? 1 : n_) * t.map.image + 2 * kernels_.width, ALIGNMENT);
        if (end > MOST_FLOATS) throw std::bad_alloc();
    }
    return end;
}

void Plan::place(int threads) {
    for (Tensor &a : tensors_)  // tensors that differ in what a layer's tiles read beyond them take the larger extent,
                                // and so are alike
        for (Tensor &b : tensors_)
            if (a.channels == b.channels && a.local == b.local && std::equal(a.size, a.size + 2, b.size) &&
                std::equal(a.border, a.border + 2, b.border))
                for (int axis = 0; axis < 2; axis++)
                    a.extent[axis] = b.extent[axis] = std::max(a.extent[axis], b.extent[axis]);
    for (Tensor &t : tensors_) {
        t.map.pixel = &t == &tensors_[0] ? t.channels : round_up(t.channels, kernels_.width) / (t.bytes ? BYTES : 1);
        t.map.row = t.extent[1] * t.map.pixel;
        t.map.image = t.extent[0] * t.map.row;
        if (t.map.image > MOST_FLOATS) throw std::bad_alloc();
    }
    slot_offset_ = layout(false);
    scratch_offset_ = layout(true);
    int64_t scratch = 0;
    for (Step &step : steps_) {
        if (layers_[step.layer]->is_conv()) {
            cut(step, threads);
            scratch = std::max(scratch, step.algorithm->scratch(step.conv, step.block));
        } else {
            const repvgg_layer &spec =
                layers_[step.layer]->spec;  // room for squeeze-excite's means, hidden numbers and gates
            cut_pool(step, threads);
            scratch =
                std::max(scratch, 4 * static_cast<int64_t>(spec.in_channels) + spec.out_channels + 4 * kernels_.width);
        }
    }
    slot_floats_ = scratch_offset_ + round_up(scratch, ALIGNMENT);
    memory_ = std::make_unique<Memory>(slot_offset_ + threads * slot_floats_);
}

/// Cuts a pool or a max-pool into pieces of channels, where those are worth it; squeeze-excite is one piece an image.
void Plan::cut_pool(Step &step, int threads) {
    const Tensor &in = tensors_[step.in];
    const int64_t pieces = static_cast<int64_t>(in.channels) * in.size[0] * in.size[1] / WORTH_A_PIECE;
    const int64_t most = std::min(ceil_div(in.channels, kernels_.width), ceil_div(threads, n_));
    const bool whole = in.local || layers_[step.layer]->spec.op == REPVGG_SQUEEZE_EXCITE;
    step.splits = whole ? 1 : static_cast<int>(std::clamp<int64_t>(pieces, 1, most));
}

float *Plan::corner(const Tensor &tensor, int slot, int image) const {
    float *base = memory_->floats() + tensor.offset;
    return tensor.local ? base + slot_offset_ + slot * slot_floats_ : base + image * tensor.map.image;
}

float *Plan::inside(const Tensor &tensor, int slot, int image) const {
    return corner(tensor, slot, image) + tensor.border[0] * tensor.map.row + tensor.border[1] * tensor.map.pixel;
}

void Plan::run_item(const Step &step, int item, int slot, int image) {
    if (!profiled_) return compute(step, item, slot, image);
    const int64_t start = own_time();
    compute(step, item, slot, image);
    layers_[step.layer]->nanoseconds += own_time() - start;
}

/// image: the one at hand where the step is local, otherwise 0.
void Plan::compute(const Step &step, int item, int slot, int image) {
    const Layer &layer = *layers_[step.layer];
    const Tensor &in = tensors_[step.in], &out = tensors_[step.out];
    float *scratch = memory_->floats() + slot_offset_ + slot * slot_floats_ + scratch_offset_;
    if (layer.is_conv()) {
        Piece piece = piece_of(step, item);
        piece.in = corner(in, slot, image), piece.out = inside(out, slot, image), piece.scratch = scratch;
        step.algorithm->run(step.conv, piece);
        return;
    }
    image += item / step.splits;
    const int vectors = static_cast<int>(ceil_div(in.channels, kernels_.width)), split = item % step.splits;
    const int first = panel_start(vectors, step.splits, split) * kernels_.width;
    const int channels = std::min(in.channels, panel_start(vectors, step.splits, split + 1) * kernels_.width) - first;
    float *from = inside(in, slot, image) + first, *to = inside(out, slot, image) + first;
    if (layer.spec.op == REPVGG_POOL) {
        kernels_.pool(from, in.map, channels, in.size, to);
    } else if (layer.spec.op == REPVGG_MAX_POOL) {
        const repvgg_layer &s = layer.spec;
        const MaxPool pool{channels,
                           {s.kernel[0], s.kernel[1]},
                           {s.stride[0], s.stride[1]},
                           {s.padding[0], s.padding[1]},
                           {in.size[0], in.size[1]},
                           {out.size[0], out.size[1]},
                           in.map,
                           out.map};
        kernels_.max_pool(pool, from, to);
    } else {
        const repvgg_layer &s = layer.spec;
        const Excite excite{s.in_channels, s.out_channels, s.relu != 0, s.weight, s.bias, s.weight2, s.bias2};
        kernels_.excite(excite, from, in.map, in.size, scratch);
    }
}

void Plan::read(const repvgg_images &images, int image, int band, int bands, int slot) {
    const Tensor &t = tensors_[0];
    const int64_t offset = static_cast<int64_t>(image) * t.channels * t.size[0] * t.size[1];
    const int first = panel_start(t.size[0], bands, band), last = panel_start(t.size[0], bands, band + 1);
    float *to = inside(t, slot, image);
    if (images.bytes)
        kernels_.read_bytes(static_cast<const uint8_t *>(images.data) + offset, t.channels, t.size, first, last,
                            images.scale, images.shift, t.map, to);
    else
        kernels_.read_floats(static_cast<const float *>(images.data) + offset, t.channels, t.size, first, last, t.map,
                             to);
}

void Plan::run(Pool &pool, const repvgg_images &images, float *output, bool profiled) {
    profiled_ = profiled;
    const int bands = std::min(8, tensors_[0].size[0]);
    if (local_steps_ > 0)
        pool.run(n_, [&](int image, int slot) {
            read(images, image, 0, 1, slot);
            for (int s = 0; s < local_steps_; s++)
                for (int item = 0; item < items(steps_[s]); item++) run_item(steps_[s], item, slot, image);
        });
    else pool.run(n_ * bands, [&](int item, int slot) { read(images, item / bands, item % bands, bands, slot); });
    for (size_t s = local_steps_; s < steps_.size(); s++)
        pool.run(items(steps_[s]), [&](int item, int slot) { run_item(steps_[s], item, slot, 0); });
    write(pool, output);
}

/// The last map to the caller's memory, in pieces that are worth a thread.
void Plan::write(Pool &pool, float *output) {
    const Tensor &last = tensors_.back();
    const int64_t row = static_cast<int64_t>(last.channels) * last.size[1], image = row * last.size[0];
    const int bands = static_cast<int>(std::clamp<int64_t>(image / WORTH_A_PIECE, 1, last.size[0]));
    const auto write_band = [&](int item, int) {
        const int i = item / bands, band = item % bands;
        const int first = panel_start(last.size[0], bands, band), end = panel_start(last.size[0], bands, band + 1);
        kernels_.write(inside(last, 0, i), last.map, last.channels, last.size, first, end, output + i * image);
    };
    if (n_ * image < WORTH_A_PIECE)
        for (int item = 0; item < n_ * bands; item++) write_band(item, 0);
    else pool.run(n_ * bands, write_band);
}

}  // namespace repvgg
