// Threads that share out the items of a job. A job ends when its items are done, not when all threads have arrived: a
// thread that the system has put aside holds up nobody but the item it is at.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>
#ifndef __wasm__
#include <condition_variable>
#include <mutex>
#include <thread>
#endif

namespace repvgg {

#ifdef __wasm__  // one thread, and nobody to wait for: alone.cpp
struct Mutex {};
struct Lock {
    explicit Lock(Mutex &) {}
};
#else
using Mutex = std::mutex;
using Lock = std::lock_guard<std::mutex>;
#endif

class Pool {
  public:
    /// The pool of this process for so many threads: nets that run in turns share it.
    static std::shared_ptr<Pool> shared(int threads, bool pin);
    /// How often this process has been forked off another: pools of a parent have no threads here.
    static int forks();

    /// threads: that work at a job, its caller among them. pin: each further one to a processor of its own.
    Pool(int threads, bool pin);
    ~Pool();
    Pool(const Pool &) = delete;
    Pool &operator=(const Pool &) = delete;

    int threads() const;

    /// work(item, slot) for each item; slot is in [0, threads) and no other thread's at the same time in this job.
    /// `work` must not throw. Several threads may call this at once.
    template <class Work>
    void run(int items, const Work &work) {
        run_items(
            items, [](const void *self, int item, int slot) { (*static_cast<const Work *>(self))(item, slot); }, &work);
    }

  private:
    using Call = void (*)(const void *, int, int);
    struct Job {
        Call call;
        const void *work;
        int items;
        std::atomic<int> next{0}, done{0};
        void work_on(int slot);
    };

    void run_items(int items, Call call, const void *work);
#ifndef __wasm__
    void serve(int slot);
    std::shared_ptr<Job> find_job();

    std::vector<std::thread> workers_;
    std::vector<std::shared_ptr<Job>> jobs_;  // that may have items left
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> posted_{0};  // jobs so far: a change is news
    int asleep_ = 0;
    bool stop_ = false;
#endif
};

}  // namespace repvgg
