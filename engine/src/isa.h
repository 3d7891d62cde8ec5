// The instruction sets that this library was built for and that this processor has.
#pragma once

#include "kernels.h"

namespace repvgg {

/// The best kernels of those names that this processor has; isa: null or "" for any. Throws std::invalid_argument where
/// there are none.
const Kernels *find_kernels(const char *isa, bool bf16);

/// Names of the instruction sets, best first.
const char *instruction_sets();

}  // namespace repvgg
