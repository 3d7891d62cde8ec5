#!/usr/bin/env bash
# The engine as WebAssembly: repvgg_engine.wasm, with 128-bit vectors, on one thread. Usage: build.sh PYTHON OUT
# The compiler is zig's, from the Python package ziglang, which brings a C++ library for WebAssembly along.
set -euo pipefail
python=$(realpath -s "$1") out=$(realpath "$2")
cd "$(dirname "$0")/../src"
"$python" -m ziglang c++ -target wasm32-wasi -mexec-model=reactor -std=gnu++17 -O3 -msimd128 -fexceptions -DREPVGG_ISA=portable \
    -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi -s -Wl,--strip-all -Wl,-z,stack-size=1048576 \
    alone.cpp api.cpp isa.cpp json.cpp kernels.cpp layer.cpp model.cpp net.cpp open.cpp plan.cpp prepare.cpp source.cpp \
    ../wasm/web.cpp -o "$out"
