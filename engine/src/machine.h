// What this process may use of the machine.
#pragma once

#include <cstdint>
#include <string>

namespace repvgg {

constexpr int MOST_THREADS = 1024;  // of a net

/// Processors of this process, no more than its container's quota of time; at least 1. root: in place of /, for tests.
int available_threads(const std::string &root);

/// Bytes of the machine's memory, or of its container's limit where that is less.
int64_t available_memory(const std::string &root);

}  // namespace repvgg
