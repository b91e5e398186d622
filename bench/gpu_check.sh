#!/usr/bin/env bash
# Everything a GPU can tell, in one run of less than nine minutes. A short table comes last, whatever
# happened before; the exit status is the worst one of all stages.
#
#   bench/gpu_check.sh [--dry-run | --stub STAGE] [MODEL]
#
# Needs nvcc, cmake and a Python with a CUDA torch, pybind11, pytest, numpy and transformers; nothing
# is downloaded. Results go to $OUT if that is set, else to bench/results/<date>-<gpu>-<commit>.*
#
#   MODEL               a real model, a folder or a GGUF file; its stage is left out without one
#   --dry-run           for machines without a GPU: builds for one architecture, runs the benchmarks
#                       on tiny shapes
#   --stub STAGE        runs nothing; every stage passes but STAGE ("none": all pass). Shows what the
#                       table looks like then
#   NAMM_CHECK_PYTHON   the interpreter (default: python3)
#   NAMM_CHECK_SECONDS  the time all of it may take (default: 520)
#   NAMM_CHECK_COMMIT   the commit, where the sources came without .git
#
# What each stage prints if all is well (bench/results/README.md, what else there may be):
#
#   gpu        the card's name and its sm_ number
#   build      namm_ext .../build/gpu-check/python/..., CUDA ops: loaded
#   shapes     N passed, M deselected; no failure, no skip. head_dim 64 and 128 in bf16, the drop-in
#   kernels    "copy bandwidth", then 46 lines; each with ms, x floor, x rivals; none FAILED
#   e2e        10 lines; "131072 tokens batch 8 full" says cannot fit below 200 GB
#   model      6 lines; float32 ends in "0 unlike the CPU" or 1
#   ops        N passed, M skipped; skipped are only head_dims beyond 256
#   memcheck   "ERROR SUMMARY: 0 errors"
#   racecheck  "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${NAMM_CHECK_PYTHON:-python3}
seconds=${NAMM_CHECK_SECONDS:-520}
dry='' stub='' model=''
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=1 ;;
    --stub) stub=${2:?--stub needs a stage}; shift ;;
    *) model=$(realpath "$1") || exit 1 ;;
  esac
  shift
done
started=$SECONDS
# A stage's share of the time, in 520ths, and never past the end; at least 1 second.
limit() {
  local share=$(($1 * seconds / 520)) rest=$((seconds - (SECONDS - started)))
  share=$((rest < share ? rest : share))
  echo $((share > 0 ? share : 1))
}
stages=(gpu build shapes kernels e2e model ops memcheck racecheck)
declare -A outcome
for stage in "${stages[@]}"; do outcome[$stage]="not run"; done
if [ -n "$stub" ] && [ "$stub" != none ] && [ -z "${outcome[$stub]:-}" ]; then
  echo "gpu_check: --stub must be a stage (${stages[*]}) or none, got $stub"
  exit 2
fi
export NAMM_CHECK_COMMIT=${NAMM_CHECK_COMMIT:-$(git rev-parse --short HEAD 2> /dev/null || echo unknown)}
results=${OUT:-bench/results}
mkdir -p "$results"

# run STAGE SECONDS COMMAND...: its output here and in a log of its own, its status in the table.
run() {
  local stage=$1 most
  most=$(limit "$2")
  shift 2
  printf '\n== %s (at %d s, at most %d s)\n' "$stage" $((SECONDS - started)) "$most"
  if [ -n "$stub" ]; then
    echo "$stage: stub"
    outcome[$stage]=$([ "$stub" = "$stage" ] && echo 7 || echo 0)
    return
  fi
  timeout --kill-after=3 "$most" "$@" 2>&1 | tee "$results/$name-$stage.log"
  outcome[$stage]=${PIPESTATUS[0]}
}
skip() { [ -n "$stub" ] || outcome[$1]=skipped; }

# The short table: in Markdown for bench/results, and here.
finish() {
  local status worst=0 verdict
  {
    echo "# $gpu, $(date +%F), commit $NAMM_CHECK_COMMIT"
    echo
    for stage in "${stages[@]}"; do
      status=${outcome[$stage]}
      case $status in
        0) verdict=passed ;;
        124 | 137) verdict="FAILED (cut short by the time limit)" ;;
        skipped | "not run") verdict=$status ;;
        *) verdict="FAILED (status $status)" ;;
      esac
      echo "* $stage: $verdict"
    done
    for stage in kernels e2e model; do
      [ -f "$results/$name-$stage.log" ] || continue
      printf '\n```\n%s\n```\n' "$(cat "$results/$name-$stage.log")"
    done
  } > "$results/$name.md"
  for status in "${outcome[@]}"; do
    [[ $status =~ ^[0-9]+$ ]] && worst=$((status > worst ? status : worst))
  done
  printf '\n== summary (%d s)\n' $((SECONDS - started))
  cat "$results/$name.md"
  exit "$worst"
}

gpu=none arch=90 name=$(date +%F)-none-$NAMM_CHECK_COMMIT
find_gpu() {
  "$python" - << 'EOF'
import torch
print(torch.cuda.get_device_name().replace("NVIDIA ", ""))
print("%d%d" % torch.cuda.get_device_capability())
EOF
}
if [ -n "$dry" ]; then
  outcome[gpu]=skipped
else
  run gpu 30 bash -c "$(declare -f find_gpu); python='$python'; find_gpu"
  [ "${outcome[gpu]}" = 0 ] || finish
  if [ -z "$stub" ]; then
    { read -r gpu && read -r arch; } < <(tail -2 "$results/$name-gpu.log")
    rm -f "$results/$name-gpu.log"
    name=$(date +%F)-$(tr ' /' '__' <<< "$gpu")-$NAMM_CHECK_COMMIT
  fi
fi
echo "gpu_check: $gpu, sm_$arch, commit $NAMM_CHECK_COMMIT, results in $results/$name.*"

build() {
  set -e
  cmake -S . -B build/gpu-check -DNAMM_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$arch-real" \
    -DPython_EXECUTABLE="$python"
  cmake --build build/gpu-check --parallel "$(nproc)"
  # Without the CUDA ops every test below would be skipped, which must not pass for success.
  PYTHONPATH=build/gpu-check/python "$python" - "$dry" << 'EOF'
import sys
import namm_ext
from namm_ext._library import libraries
print(f"namm_ext {namm_ext.__file__}, CUDA ops: {libraries.cuda_status}")
sys.exit(not (libraries.has_cuda or sys.argv[1]))
EOF
}
python=$(command -v "$python") || { outcome[build]=127; finish; }
run build 150 bash -c "$(declare -f build); arch=$arch dry=$dry python='$python'; build"
[ "${outcome[build]}" = 0 ] || finish
PYTHONPATH=$PWD/build/gpu-check/python
# The table is for figures: deprecations of other packages stay out.
export PYTHONPATH PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore::FutureWarning
# Each update makes a new, larger store; see bench_e2e_cuda.py.
export PYTORCH_ALLOC_CONF=expandable_segments:True
smoke=()
[ -z "$dry" ] || smoke=(--smoke)
tests=("$python" -m pytest -q -p no:cacheprovider --durations=5)
common="D128-G4 or D64-G4 or drop_in or select or compact_and_append or scores"

if [ -n "$dry" ]; then
  skip shapes
else
  run shapes 70 "${tests[@]}" tests/test_cuda.py -k "($common) and not equal_bits and not 32_bits"
fi
run kernels 100 "$python" bench/bench_cuda.py "${smoke[@]}" --out "$results/$name.json"
run e2e 110 "$python" bench/bench_e2e_cuda.py "${smoke[@]}" --seconds "$(($(limit 110) - 30))" \
  --out "$results/$name-e2e.json"
if [ -n "$model" ] || [ -n "$stub" ]; then
  run model 60 "$python" bench/bench_model_cuda.py "$model" "${smoke[@]}" \
    --out "$results/$name-model.json"
else
  skip model
fi
if [ -n "$dry" ]; then
  skip ops
else
  run ops 110 "${tests[@]}" tests/test_cuda.py tests/test_ops_{append,attend,compact,gate,record}.py \
    tests/test_ops_{scores,select,window}.py tests/test_golden*.py -k cuda
fi
# Smaller inputs: the sanitizer is slow. Bit-repeat, 32-bit and model tests add nothing here.
# do_not_wait calls every op once.
sanitize="(D64 or D128-G4 or D72 or select or compact or append or scores or do_not_wait)"
sanitize+=" and not equal_bits and not 32_bits and not drop_in and not stream and not 300"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck; do
  if [ -n "$dry" ] || { [ -z "$stub" ] && ! command -v compute-sanitizer > /dev/null; }; then
    skip $tool
  else
    run $tool 60 compute-sanitizer --tool $tool --kernel-regex kns=namm_ext --error-exitcode 9 \
      "$python" -m pytest -q -x -p no:cacheprovider tests/test_cuda.py -k "$sanitize"
  fi
done
finish
