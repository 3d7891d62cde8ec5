#!/usr/bin/env bash
# The engine's tests and a fuzz run (tests/fuzz.py) under AddressSanitizer with UBSan, and under ThreadSanitizer. Usage: sanitize.sh PYTHON
set -euo pipefail
python=$(realpath -s "$1")
cd "$(dirname "$0")/.."
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
for kind in address,undefined thread; do
    folder=build/${kind%%,*}
    cmake -S . -B "$folder" -G Ninja -DSANITIZE="$kind" >/dev/null
    cmake --build "$folder" >/dev/null
    rm -rf "$folder/package" && mkdir -p "$folder/package"
    cp -r repvgg_engine "$folder/package/"
    cp "$folder/librepvgg_engine.so" "$folder/package/repvgg_engine/"
    library=$(g++ -print-file-name="lib$([ "$kind" = thread ] && echo tsan || echo asan).so")
    # Python is not built for it, so the sanitizer's library has to come first, and C++'s, whose exceptions it watches. -P: not the
    # package in this folder, which is not built. Leaks and memory have tests of their own; the tuner has no C++ of its own, and is
    # too slow in such builds.
    watched() { LD_PRELOAD="$library $(g++ -print-file-name=libstdc++.so.6)" PYTHONPATH=$folder/package:tests "$python" -P "$@"; }
    watched tests/fuzz.py --cases 1000
    watched -m pytest -q -p no:cacheprovider tests/test_engine_{classify,conv,files,int8,integer,library,machine,net,plans,pool}.py -k "not leak and not fork and not changed_while and not more_processors and not blas and not goes_round and not in_c and not example and not memory and not packing_holds and not unloaded"
done
