// How a net runs on n images of one size: where each feature map lies, how each layer is cut into pieces, in which
// order.
#pragma once

#include <memory>
#include <vector>

#include "layer.h"
#include "pool.h"

namespace repvgg {

static inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

/// A convolution's weights as one algorithm wants them.
struct Weights {
    Weights(const Algorithm *algorithm, int forks) : algorithm(algorithm), forks(forks) {}
    const Algorithm *const algorithm;
    const int forks;  // of the process that made them: another's lock may be held by a thread that is not here
    Mutex mutex;      // of `packed`
    std::unique_ptr<Memory> packed;
};

class Plan {
  public:
    /// weights: one for each layer, empty for those that are no convolutions.
    Plan(const Kernels &kernels, std::vector<std::unique_ptr<Layer>> &layers,
         std::vector<std::shared_ptr<Weights>> weights, int n, const int size[2], int threads);

    /// Not by two threads at once. profiled: note in each layer what it took.
    void run(Pool &pool, const repvgg_images &images, float *output, bool profiled);

    bool fits(int n, int height, int width) const {
        return n == n_ && height == tensors_[0].size[0] && width == tensors_[0].size[1];
    }

    /// Of a convolution: the multiplications of each piece, in vectors.
    std::vector<int64_t> work(int layer) const;

  private:
    /// A feature map of each image, with the zero border that the layer that reads it wants.
    struct Tensor {
        int channels, size[2], border[2], extent[2];
        bool local;  // one image at a time, in each thread's own memory
        bool bytes;  // not floats
        Map map;
        int64_t offset;  // of the padded map of the first image, in floats
        Tensor(int channels, const int size[2])
            : channels(channels),
              size{size[0], size[1]},
              border{0, 0},
              extent{size[0], size[1]},
              local(false),
              bytes(false),
              map{},
              offset(0) {}
    };
    struct Step {
        int layer, in, out;  // tensors
        Conv conv;
        const Algorithm *algorithm;
        std::vector<int> origins[2];
        int64_t tiles, block;  // of all images that it takes at once, and of a piece
        int blocks, splits;    // how many pieces of the tiles, and of the panels
    };

    void add_step(int index, int in);
    void set_tiling(Step &step);
    void choose_local(int threads);
    void place(int threads);
    void cut(Step &step, int threads);
    void cut_pool(Step &step, int threads);
    int64_t layout(bool local);
    static int best_splits(const Step &step, int wanted, int64_t blocks);
    int items(const Step &step) const;
    Piece piece_of(const Step &step, int item) const;
    void run_item(const Step &step, int item, int slot, int image);
    void compute(const Step &step, int item, int slot, int image);
    void read(const repvgg_images &images, int image, int band, int bands, int slot);
    void write(Pool &pool, float *output);
    float *corner(const Tensor &tensor, int slot, int image) const;
    float *inside(const Tensor &tensor, int slot, int image) const;

    const Kernels &kernels_;
    std::vector<std::unique_ptr<Layer>> &layers_;
    std::vector<std::shared_ptr<Weights>> weights_;
    int n_, local_steps_ = 0;
    bool profiled_ = false;
    std::vector<Tensor> tensors_;
    std::vector<Step> steps_;
    int64_t slot_offset_, slot_floats_, scratch_offset_;
    std::unique_ptr<Memory> memory_;
};

}  // namespace repvgg
