#include "pool.h"

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <chrono>
#include <exception>

namespace repvgg {

namespace {

/// Between two layers a thread waits microseconds, so it looks about for a while before it sleeps; and it yields as it
/// does, so that whatever else wants the processor gets it.
constexpr auto PATIENCE = std::chrono::microseconds(200);

template <class Condition>
bool wait_for(Condition condition, std::chrono::nanoseconds patience) {
    for (int i = 0; i < 200; i++) {
        if (condition()) return true;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
    const auto start = std::chrono::steady_clock::now();
    while (!condition()) {
        std::this_thread::yield();
        if (std::chrono::steady_clock::now() - start > patience) return false;
    }
    return true;
}

void pin_to(std::thread &thread, int index) {
#ifdef __linux__
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) {  // where there may be more processors than the set holds
        CPU_ZERO(&allowed);
        const unsigned all = std::thread::hardware_concurrency();
        for (unsigned cpu = 0; cpu < all && cpu < CPU_SETSIZE; cpu++) CPU_SET(cpu, &allowed);
    }
    if (CPU_COUNT(&allowed) == 0) return;
    index %= CPU_COUNT(&allowed);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &allowed) || index-- > 0) continue;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        pthread_setaffinity_np(thread.native_handle(), sizeof one, &one);
        return;
    }
#else
    (void)thread, (void)index;  // macOS has no such thing
#endif
}

}  // namespace

namespace {

std::atomic<int> forks_so_far{0};
std::mutex shared_mutex;  // of the list below

struct Shared {
    int threads, forks;
    bool pin;
    std::weak_ptr<Pool> pool;
};

std::vector<Shared> &shared_pools() {
    static auto *pools = new std::vector<Shared>;  // for ever: threads may still ask for one when the process ends
    return *pools;
}

}  // namespace

int Pool::forks() {
    // The list's lock is held over a fork, so that no other thread's half-done change is copied.
    static const int registered = pthread_atfork([] { shared_mutex.lock(); }, [] { shared_mutex.unlock(); },
                                                 [] { forks_so_far++, shared_mutex.unlock(); });
    (void)registered;
    return forks_so_far.load();
}

std::shared_ptr<Pool> Pool::shared(int threads, bool pin) {
    const int now = forks();
    std::lock_guard<std::mutex> lock(shared_mutex);
    auto &pools = shared_pools();
    pools.erase(std::remove_if(pools.begin(), pools.end(), [](const Shared &s) { return s.pool.expired(); }),
                pools.end());
    for (const Shared &s : pools)
        if (s.threads == threads && s.pin == pin && s.forks == now)
            if (auto pool = s.pool.lock()) return pool;
    auto pool = std::make_shared<Pool>(threads, pin);
    pools.push_back({threads, now, pin, pool});
    return pool;
}

int Pool::threads() const { return static_cast<int>(workers_.size()) + 1; }

Pool::Pool(int threads, bool pin) {
    workers_.reserve(static_cast<size_t>(std::max(threads - 1, 0)));
    for (int slot = 1; slot < threads; slot++) {
        try {
            workers_.emplace_back([this, slot] { serve(slot); });
        } catch (const std::exception &) {
            return;  // there are no more threads, or no memory for them: work with those there are
        }
        if (pin) pin_to(workers_.back(), slot);
    }
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    posted_.fetch_add(1);
    wake_.notify_all();
    for (std::thread &worker : workers_) worker.join();
}

void Pool::Job::work_on(int slot) {
    for (int item; (item = next.fetch_add(1)) < items;) {
        call(work, item, slot);
        done.fetch_add(1);
    }
}

void Pool::run_items(int items, Call call, const void *work) {
    if (items <= 1 || workers_.empty()) {
        for (int item = 0; item < items; item++) call(work, item, 0);
        return;
    }
    const auto job =
        std::make_shared<Job>();  // shared, because a late thread may still look at it when the job is done
    job->call = call, job->work = work, job->items = items;
    bool sleepers;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        jobs_.push_back(job);
        posted_.fetch_add(1);
        sleepers = asleep_ > 0;
    }
    if (sleepers) wake_.notify_all();
    job->work_on(0);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        jobs_.erase(std::find(jobs_.begin(), jobs_.end(), job));
    }
    while (!wait_for([&] { return job->done.load() == items; }, PATIENCE)) {
    }
}

std::shared_ptr<Pool::Job> Pool::find_job() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto &job : jobs_)
        if (job->next.load() < job->items) return job;
    return nullptr;
}

void Pool::serve(int slot) {
    for (;;) {
        const uint64_t seen = posted_.load();
        while (const auto job = find_job()) job->work_on(slot);
        if (wait_for([&] { return posted_.load() != seen; }, PATIENCE)) {
            std::lock_guard<std::mutex> lock(mutex_);
            if (stop_) return;
            continue;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_++;
        wake_.wait(lock, [&] { return stop_ || posted_.load() != seen; });
        asleep_--;
        if (stop_) return;
    }
}

}  // namespace repvgg
