// Zeroed memory in huge pages where the system has them: transformed weights and tiles are walked in long strides,
// which small pages make expensive.
#pragma once

#ifdef __wasm__  // which has one kind of pages
#include <cstdlib>
#else
#include <sys/mman.h>
#endif

#include <cstdint>
#include <new>

namespace repvgg {

class Memory {
  public:
    explicit Memory(int64_t floats) {
        const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
#ifdef __wasm__
        if (static_cast<uint64_t>(floats) > SIZE_MAX / sizeof(float) - ALIGNMENT) throw std::bad_alloc();
        base_ = std::calloc(bytes + ALIGNMENT, 1);
        if (!base_) throw std::bad_alloc();
        floats_ =
            reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(base_) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
#else
        size_ = bytes + HUGE_PAGE;
        base_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED) throw std::bad_alloc();
        const uintptr_t aligned = (reinterpret_cast<uintptr_t>(base_) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        floats_ = reinterpret_cast<float *>(aligned);
        // The last part of a huge page stays in small ones, so that little memory does not take much.
#ifdef MADV_HUGEPAGE
        if (bytes >= HUGE_PAGE) madvise(floats_, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
#endif
    }
    ~Memory() {
#ifdef __wasm__
        std::free(base_);
#else
        munmap(base_, size_);
#endif
    }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;

    float *floats() const { return floats_; }

  private:
#ifdef __wasm__
    static constexpr size_t ALIGNMENT = 64;
#else
    static constexpr size_t HUGE_PAGE = 2 << 20;
    size_t size_;
#endif
    void *base_;
    float *floats_;
};

}  // namespace repvgg
