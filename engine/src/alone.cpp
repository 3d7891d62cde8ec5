// The pool where there are no threads.
#include "machine.h"
#include "pool.h"

namespace repvgg {

int available_threads(const std::string &) { return 1; }

int Pool::forks() { return 0; }

std::shared_ptr<Pool> Pool::shared(int threads, bool pin) { return std::make_shared<Pool>(threads, pin); }

Pool::Pool(int, bool) {}
Pool::~Pool() = default;
int Pool::threads() const { return 1; }

void Pool::run_items(int items, Call call, const void *work) {
    for (int item = 0; item < items; item++) call(work, item, 0);
}

}  // namespace repvgg
