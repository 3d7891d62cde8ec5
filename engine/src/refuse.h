// What is wrong with what a caller or a file gives, in words.
#pragma once

#include <stdexcept>
#include <string>

namespace repvgg {

[[noreturn]] inline void refuse(const std::string &reason) { throw std::invalid_argument(reason); }

}  // namespace repvgg
