// The instruction sets that this library was built for and that this processor has.
#pragma once

#include "kernels.h"

namespace repvgg {

/// The best kernels of that precision (REPVGG_FP32, ...) that this processor has; isa: null or "" for any. Throws
/// std::invalid_argument where there are none.
const Kernels *find_kernels(const char *isa, int precision);

/// Names of the instruction sets, best first.
const char *instruction_sets();

}  // namespace repvgg
