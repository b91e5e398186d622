#!/usr/bin/env bash
# Everything a GPU can tell, in one run of less than ten minutes: build for this GPU, op tests on
# it, compute-sanitizer, benchmarks. A short table comes last.
#
#   bench/gpu_check.sh [--dry-run]
#
# Needs nvcc and a Python with a CUDA torch, scikit-build-core, pybind11, pytest, numpy and
# transformers; nothing is downloaded. Results go to $OUT if that is set, else to
# bench/results/<date>-<gpu>-<commit>.*; the exit status is that of the tests. --dry-run is for
# machines without a GPU: it builds for one architecture and runs the benchmarks on tiny shapes.
#
#   NAMM_CHECK_PYTHON   the interpreter (default: python3)
#   NAMM_CHECK_SECONDS  the time all of it may take (default: 560)
#   NAMM_CHECK_COMMIT   the commit, where the sources came without .git
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${NAMM_CHECK_PYTHON:-python3}
seconds=${NAMM_CHECK_SECONDS:-560}
dry=; [ "${1:-}" = --dry-run ] && dry=1
started=$SECONDS
left() { echo $((seconds - (SECONDS - started))); }
# A step's share of the time, in 560ths, and never past the end; at least 1 second.
limit() {
  local share=$(($1 * seconds / 560)) rest
  rest=$(left)
  share=$((rest < share ? rest : share))
  echo $((share > 0 ? share : 1))
}
say() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - started)); }
declare -A outcome

if [ -n "$dry" ]; then
  gpu=none arch=90
else
  gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace("NVIDIA ", ""))') ||
    { echo "gpu_check: $python has no torch that sees a GPU"; exit 1; }
  arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
fi
commit=${NAMM_CHECK_COMMIT:-$(git rev-parse --short HEAD 2> /dev/null || echo unknown)}
export NAMM_CHECK_COMMIT=$commit
name=$(date +%F)-$(tr ' /' '__' <<< "$gpu")-$commit
results=${OUT:-bench/results}
mkdir -p "$results"
echo "gpu_check: $gpu, sm_$arch, commit $commit, results in $results/$name.*"

say build
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
timeout "$(limit 240)" "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps \
  --no-compile --target "$site" -Cbuild-dir=build/gpu-check -Ccmake.define.NAMM_CUDA=ON \
  -Ccmake.define.CMAKE_CUDA_ARCHITECTURES="$arch-real" . > "$results/$name-build.log" 2>&1 ||
  { tail -40 "$results/$name-build.log"; echo "gpu_check: the build failed"; exit 1; }
# The table is for figures: deprecations of other packages stay out.
export PYTHONPATH=$site PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore::FutureWarning
"$python" - "$dry" <<'EOF' || exit 1
import sys
import namm_ext
from namm_ext._library import libraries
print(f"namm_ext {namm_ext.__file__}, CUDA ops: {libraries.cuda_status}")
# Without them every test below would be skipped, which must not pass for success.
sys.exit(not (libraries.has_cuda or sys.argv[1]))
EOF

ops_tests=(tests/test_cuda.py tests/test_ops_append.py tests/test_ops_attend.py
  tests/test_ops_compact.py tests/test_ops_scores.py tests/test_ops_select.py
  tests/test_ops_window.py)
say tests
timeout "$(limit 200)" "$python" -m pytest -q -p no:cacheprovider "${ops_tests[@]}" tests/test_golden.py \
  -k "cuda" --durations=5 2>&1 | tee "$results/$name-tests.log" | tail -40
outcome[tests]=${PIPESTATUS[0]}
[ -n "$dry" ] && [ "${outcome[tests]}" = 0 ] && outcome[tests]=skipped

# Smaller inputs: the sanitizer is slow. Bit-repeat, 32-bit and model tests add nothing here.
sanitize="(D64 or D128-G4 or D72 or select or compact or append or scores) and not equal_bits"
sanitize+=" and not 32_bits and not drop_in and not stream and not 300"
for tool in memcheck racecheck; do
  say "compute-sanitizer $tool"
  if [ -n "$dry" ] || ! command -v compute-sanitizer > /dev/null; then
    outcome[$tool]=skipped
  else
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$(limit 60)" compute-sanitizer --tool $tool \
      --kernel-regex kns=namm_ext --error-exitcode 9 "$python" -m pytest -q -x \
      -p no:cacheprovider tests/test_cuda.py -k "$sanitize" \
      > "$results/$name-$tool.log" 2>&1
    outcome[$tool]=$?
    tail -4 "$results/$name-$tool.log"
  fi
done

smoke=; [ -n "$dry" ] && smoke=--smoke
say "ops against their floors and rivals"
timeout "$(limit 150)" "$python" bench/bench_cuda.py $smoke --out "$results/$name.json" 2>&1 |
  tee "$results/$name.txt"
outcome[bench]=${PIPESTATUS[0]}
say "end to end"
timeout "$(limit 300)" "$python" bench/bench_e2e_cuda.py $smoke --seconds "$(($(left) - 60))" \
  --out "$results/$name-e2e.json" 2>&1 | tee -a "$results/$name.txt"
outcome[e2e]=${PIPESTATUS[0]}

# The short table: in Markdown for bench/results, and here.
{
  echo "# $gpu, $(date +%F), commit $commit"
  echo
  for step in tests memcheck racecheck bench e2e; do
    case ${outcome[$step]} in
      0) verdict=passed ;;
      124) verdict="cut short by the time limit" ;;
      skipped) verdict=skipped ;;
      *) verdict="FAILED (status ${outcome[$step]})" ;;
    esac
    echo "* $step: $verdict"
  done
  echo; echo '```'
  cat "$results/$name.txt" 2>/dev/null
  echo '```'
} > "$results/$name.md"
rm -f "$results/$name.txt" "$results/$name-build.log"
say "summary"
cat "$results/$name.md"
[ "${outcome[tests]}" = skipped ] || exit "${outcome[tests]}"
