// A net: its layers, their packed weights, its threads, and a plan for each size of input that is in use.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "plan.h"

namespace repvgg {

class Net {
  public:
    /// Throws std::invalid_argument for layers that cannot be.
    Net(const repvgg_layer *layers, int count, const repvgg_options &options);
    ~Net();

    void output_shape(int height, int width, int shape[3]) const;
    void run(const repvgg_images &images, float *output);
    void choose(int layer, const char *algorithm);
    /// The algorithm of that name, if it is one and fits the layer; otherwise null.
    const Algorithm *find(int layer, const char *name) const;
    const Algorithm *fitting(int layer, int i) const;
    const char *isa() const;
    int64_t weight_bytes(int layer, const Algorithm &algorithm) const;
    void profile(double *seconds);
    /// The multiplications of each piece that a convolution of n images is cut into, in vectors.
    std::vector<int64_t> work(int layer, int n, const int size[2]);

  private:
    /// Threads, and what they share. A forked process has none of its parent's threads, and its locks may be held by
    /// them; so it makes a runtime of its own, and leaves the old one where it is.
    struct Runtime {
        Runtime(int threads, bool pin, int forks) : pool(Pool::shared(threads, pin)), forks(forks) {}
        const std::shared_ptr<Pool> pool;
        const int forks;
        Mutex mutex;  // of `idle`, and of the net's choices and list of weights
        std::vector<std::unique_ptr<Plan>> idle;
    };

    Runtime &runtime();
    /// A plan for n images of that size, and which choice of algorithms it follows.
    std::unique_ptr<Plan> take_plan(Runtime &runtime, int n, const int size[2], int &choice);
    void pack(Runtime &runtime, int layer, Weights &weights) const;

    const Kernels *kernels_;
    std::vector<const Algorithm *> algorithms_;  // the first is direct
    const int threads_;
    const bool pin_;
    std::vector<std::unique_ptr<Layer>> layers_;
    std::vector<std::shared_ptr<Weights>>
        weights_;      // of each layer, by the algorithm that was chosen last; packed when they are wanted
    int choices_ = 0;  // made so far: plans of earlier ones are not used again
    std::atomic<bool> profiled_{false};  // from the first question on
    std::atomic<Runtime *> runtime_{nullptr};
};

}  // namespace repvgg
