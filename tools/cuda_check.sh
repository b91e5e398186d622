#!/usr/bin/env bash
# The CUDA checks that need nvcc but no GPU and no CUDA torch: build for every architecture, hold
# registers and spills to the baseline, check what namm_cuda.so needs and exports.
#
#   tools/cuda_check.sh [--update-baseline]
#
# NAMM_CHECK_PYTHON names the interpreter with torch, pybind11, cmake and ninja (default: python).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${NAMM_CHECK_PYTHON:-python}
build=build/cuda-check
log=$build/ptxas.log

command -v nvcc > /dev/null || { echo "cuda_check: nvcc is not on PATH"; exit 1; }
mkdir -p build
cmake -S . -B "$build" -G Ninja -DNAMM_CUDA=ON -DPython_EXECUTABLE="$(command -v "$python")" \
  -DCMAKE_CUDA_FLAGS="-Xptxas -v" > "$build.configure.log" 2>&1 ||
  { cat "$build.configure.log"; exit 1; }

echo "== build for all architectures"
# From scratch: the report needs the output of every compilation.
cmake --build "$build" --target clean
cmake --build "$build" --target namm_cuda > "$log" 2>&1 ||
  { grep -v "ptxas info\|bytes stack frame" "$log"; exit 1; }
grep -E "warning" "$log" && { echo "cuda_check: warnings above"; exit 1; }

echo "== registers and spills"
if [ "${1:-}" = --update-baseline ]; then
  "$python" tools/ptxas_report.py "$log" --update
else
  "$python" tools/ptxas_report.py "$log"
fi

echo "== symbols of namm_cuda.so"
library=$(find "$build" -name namm_cuda.so -not -path "*/python/*" | head -1)
needed=$(readelf -d "$library" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | sort)
echo "needs: ${needed//$'\n'/ }"
for name in libtorch_cuda.so libtorch_cpu.so libcudart.so; do
  grep -q "^$name" <<< "$needed" || { echo "cuda_check: $name is not needed"; exit 1; }
done
# Only the C interface of torch's stable ABI, the CUDA runtime and the C and C++ libraries.
strange=$(nm -D --undefined-only "$library" | awk '{print $NF}' | sed 's/@.*//' |
  grep -vE '^(aoti_torch_|torch_|cuda|__cuda)' |
  c++filt | grep -E '^(at|c10|torch|caffe2|pybind11)::|^_?Py' || true)
[ -z "$strange" ] || { echo "cuda_check: unstable symbols:"; echo "$strange"; exit 1; }
exported=$(nm -D --defined-only "$library" | awk '{print $NF}' | c++filt | grep -c namm_ext || true)
[ "$exported" = 0 ] || { echo "cuda_check: $exported namm_ext symbols are exported"; exit 1; }
# What nvcc was told, since cuobjdump is not part of every nvcc package.
code=$(grep -oE 'code=\[[a-z0-9_,]+\]' "$build/compile_commands.json" | sort -u | tr '\n' ' ')
echo "code: $code"
for target in sm_80 sm_90 sm_100 compute_100; do
  grep -qE "[[,]${target}[],]" <<< "$code" || { echo "cuda_check: no code for $target"; exit 1; }
done
echo "cuda_check: all right"
