#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace repvgg {

const Kernels *kernels_portable();
#if defined(__x86_64__)
const Kernels *kernels_avx2();
const Kernels *kernels_avx512();
const Kernels *kernels_avx512_bf16();
#endif

namespace {

struct Set {
    const char *name;
    bool bf16, here;
    const Kernels *(*kernels)();
};

/// Best first.
const std::vector<Set> &sets() {
    static const std::vector<Set> all = [] {
        std::vector<Set> found;
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
        found.push_back({"avx512", true, avx512 && __builtin_cpu_supports("avx512bf16"), kernels_avx512_bf16});
        found.push_back({"avx512", false, avx512, kernels_avx512});
        found.push_back({"avx2", false, avx2, kernels_avx2});
#endif
        found.push_back({"portable", false, true, kernels_portable});
        return found;
    }();
    return all;
}

}  // namespace

const Kernels *find_kernels(const char *isa, bool bf16) {
#ifdef __wasm__
    const char *forced = isa;
#else
    const char *forced = isa && *isa ? isa : std::getenv("REPVGG_ENGINE_ISA");
#endif
    const std::string name = forced ? forced : "";
    for (const Set &set : sets())
        if (set.here && set.bf16 == bf16 && (name.empty() || name == set.name)) return set.kernels();
    if (bf16)
        throw std::invalid_argument("precision bf16 needs a processor with AVX512-BF16" +
                                    (name.empty() ? "" : ", and REPVGG_ENGINE_ISA=avx512, not " + name));
    throw std::invalid_argument("REPVGG_ENGINE_ISA=" + name + ": this processor has " + instruction_sets());
}

const char *instruction_sets() {
    static const std::string names = [] {
        std::string text;
        for (const Set &set : sets())
            if (set.here) text += (text.empty() ? "" : " ") + std::string(set.bf16 ? "bf16" : set.name);
        return text;
    }();
    return names.c_str();
}

}  // namespace repvgg
