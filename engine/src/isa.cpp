#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "json.h"
#include "repvgg_engine.h"

namespace repvgg {

const Kernels *kernels_portable();
#ifndef __wasm__
const Kernels *kernels_portable_int16();
const Kernels *kernels_portable_int8();
#endif
#if defined(__x86_64__)
const Kernels *kernels_avx2();
const Kernels *kernels_avx2_int16();
const Kernels *kernels_avx2_int8();
const Kernels *kernels_avx512();
const Kernels *kernels_avx512_bf16();
const Kernels *kernels_avx512_int16();
const Kernels *kernels_avx512_vnni_int16();
const Kernels *kernels_avx512_int8();
const Kernels *kernels_avx512_vnni_int8();
#endif

namespace {

struct Set {
    const char *name;
    int precision;
    bool here;
    const Kernels *(*kernels)();
};

/// Best first. "avx512bw", AVX-512 as processors without VNNI have it, gives the same bits more slowly: for tests.
const std::vector<Set> &sets() {
    static const std::vector<Set> all = [] {
        std::vector<Set> found;
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
        const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
        found.push_back({"avx512", REPVGG_FP32, avx512, kernels_avx512});
        found.push_back({"avx512", REPVGG_BF16, avx512 && __builtin_cpu_supports("avx512bf16"), kernels_avx512_bf16});
        found.push_back({"avx512", REPVGG_INT16, vnni, kernels_avx512_vnni_int16});
        found.push_back({"avx512", REPVGG_INT16, avx512, kernels_avx512_int16});
        found.push_back({"avx512", REPVGG_INT8, vnni, kernels_avx512_vnni_int8});
        found.push_back({"avx512", REPVGG_INT8, avx512, kernels_avx512_int8});
        found.push_back({"avx512bw", REPVGG_FP32, avx512, kernels_avx512});
        found.push_back({"avx512bw", REPVGG_INT16, avx512, kernels_avx512_int16});
        found.push_back({"avx512bw", REPVGG_INT8, avx512, kernels_avx512_int8});
        found.push_back({"avx2", REPVGG_FP32, avx2, kernels_avx2});
        found.push_back({"avx2", REPVGG_INT16, avx2, kernels_avx2_int16});
        found.push_back({"avx2", REPVGG_INT8, avx2, kernels_avx2_int8});
#endif
        found.push_back({"portable", REPVGG_FP32, true, kernels_portable});
#ifndef __wasm__  // a page runs float32 alone
        found.push_back({"portable", REPVGG_INT16, true, kernels_portable_int16});
        found.push_back({"portable", REPVGG_INT8, true, kernels_portable_int8});
#endif
        return found;
    }();
    return all;
}

}  // namespace

const Kernels *find_kernels(const char *isa, int precision) {
#ifdef __wasm__
    const char *forced = isa;
#else
    const char *forced = isa && *isa ? isa : std::getenv("REPVGG_ENGINE_ISA");
#endif
    const std::string name = forced ? forced : "";
    for (const Set &set : sets())
        if (set.here && set.precision == precision && (name.empty() || name == set.name)) return set.kernels();
    if (precision == REPVGG_BF16)
        throw std::invalid_argument(
            "precision bf16 needs a processor with AVX512-BF16" +
            (name.empty() ? "" : ", and the instruction set avx512, not " + printable(name, 50)));
    if (precision < REPVGG_FP32 || precision > REPVGG_INT8)
        throw std::invalid_argument("unknown precision " + std::to_string(precision));
    if (name.empty()) throw std::invalid_argument("this build has no products of integers");
    throw std::invalid_argument("instruction set " + printable(name, 50) + ": this processor has " +
                                instruction_sets());
}

const char *instruction_sets() {
    static const std::string names = [] {
        std::string text;
        for (const Set &set : sets()) {
            const std::string name = set.precision == REPVGG_BF16 ? "bf16" : set.name;
            if (set.here && set.precision <= REPVGG_BF16 && name != "avx512bw")
                text += (text.empty() ? "" : " ") + name;
        }
        return text;
    }();
    return names.c_str();
}

}  // namespace repvgg
