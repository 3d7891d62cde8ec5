#!/usr/bin/env bash
# The numeric tests as other processors would run them. Usage: isa.sh PYTHON [SETTING...], a setting such as ATEN_CPU_CAPABILITY=avx2.
set -uo pipefail
python=$1
cd "$(dirname "$0")/.."
settings=("${@:2}")
[ $# -gt 1 ] || settings=(none ATEN_CPU_CAPABILITY={default,avx2} ONEDNN_MAX_CPU_ISA={SSE41,AVX2} REPVGG_ENGINE_ISA={portable,avx2})
numeric=(tests/fold tests/deploy tests/test_rounding.py tests/models/test_{repvgg,pspnet,baselines,convert,zoo}.py
    tests/train/test_{trainer,evaluate,optimizer,batches}.py tests/predict/test_{labels,masks}.py tests/data/test_transforms.py)
native=(engine/tests tests/deploy/test_native.py)

for isa in avx512bw avx2 sse4_1; do grep -qw "$isa" /proc/cpuinfo && break; done
echo "processor: $(sed -n 's/^model name\s*: //p' /proc/cpuinfo | head -1), with $isa"
failed=()
for setting in "${settings[@]}"; do
    tests=("${numeric[@]}")
    [[ $setting == REPVGG_ENGINE_ISA=* ]] && tests=("${native[@]}")
    echo "--- $setting"
    # a cache of its own: torch.compile keeps what it has made for one kind of processor, and takes it for another
    env "${setting/none/_=}" TORCHINDUCTOR_CACHE_DIR="$(mktemp -d)" "$python" -m pytest -n 2 --dist loadfile "${tests[@]}" || failed+=("$setting")
done
[ ${#failed[@]} -eq 0 ] || { echo "failed with: ${failed[*]}"; exit 1; }
echo "all settings passed: ${settings[*]}"
