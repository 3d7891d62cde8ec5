// Zeroed memory in huge pages where the system has them: transformed weights and tiles are walked in long strides,
// which small pages make expensive.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace repvgg {

class Memory {
  public:
    explicit Memory(int64_t floats) {
        const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
        size_ = bytes + HUGE_PAGE;
        base_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED) throw std::bad_alloc();
        const uintptr_t aligned = (reinterpret_cast<uintptr_t>(base_) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        floats_ = reinterpret_cast<float *>(aligned);
        // The last part of a huge page stays in small ones, so that little memory does not take much.
        if (bytes >= HUGE_PAGE) madvise(floats_, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    }
    ~Memory() { munmap(base_, size_); }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;

    float *floats() const { return floats_; }

  private:
    static constexpr size_t HUGE_PAGE = 2 << 20;
    void *base_;
    size_t size_;
    float *floats_;
};

}  // namespace repvgg
