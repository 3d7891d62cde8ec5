#!/usr/bin/env bash
# The engine as WebAssembly, on one thread: repvgg_engine.wasm, with vectors of 128 bits, and repvgg_engine.relaxed.wasm for those that
# can multiply and add at once (relaxed SIMD). Usage: build.sh PYTHON FOLDER
# The compiler is zig's, from the Python package ziglang, which brings a C++ library for WebAssembly along.
set -euo pipefail
python=$(realpath -s "$1") folder=$(realpath "$2")
cd "$(dirname "$0")/../src"
build() {
    "$python" -m ziglang c++ -target wasm32-wasi -mexec-model=reactor -std=gnu++17 -O3 -fexceptions -DREPVGG_ISA=portable \
        -DREPVGG_SET=portable -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi -s -Wl,--strip-all \
        -Wl,-z,stack-size=1048576 -Wl,--export=__stack_pointer "${@:2}" -o "$folder/$1" \
        alone.cpp api.cpp isa.cpp json.cpp kernels.cpp layer.cpp model.cpp net.cpp open.cpp pieces.cpp plan.cpp prepare.cpp source.cpp ../wasm/web.cpp
}
build repvgg_engine.wasm -msimd128
build repvgg_engine.relaxed.wasm -msimd128 -mrelaxed-simd
chmod 644 "$folder"/repvgg_engine*.wasm  # zig marks them as programs
