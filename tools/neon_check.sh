#!/usr/bin/env bash
# The torch-free kernels and their C++ tests on 64-bit Arm: cross-compiled without warnings, with
# NEON in the hot loops, and run under qemu. On Arm the baseline file of every kernel is the NEON
# version: the 4-lane vectors of cpp/kernels/simd.h become v registers.
#
#   tools/neon_check.sh
#
# Needs aarch64-linux-gnu-g++ (on Debian: g++-aarch64-linux-gnu) and, to run, qemu-aarch64
# (qemu-user). What is missing is said and skipped; the status is 0 then.
set -euo pipefail
cd "$(dirname "$0")/.."
cross=aarch64-linux-gnu
build=build/neon

command -v "$cross-g++" > /dev/null ||
  { echo "neon-check: no $cross-g++ on this machine, skipped"; exit 0; }
mkdir -p "$build"
rm -f "$build"/*
flags=(-std=c++17 -Wall -Wextra -Wno-unknown-pragmas -Werror -Icpp/include -Icpp/kernels)

echo "== kernels for aarch64"
for source in cpp/kernels/*.cpp; do
  # What CMakeLists.txt leaves out on other processors.
  [[ $source =~ _(avx2|avx512|avx512bf16|amx)\.cpp$ ]] && continue
  "$cross-g++" "${flags[@]}" -O3 -fno-math-errno -fno-trapping-math \
    -c "$source" -o "$build/$(basename "$source" .cpp).o"
done
for kernel in attend bam mlp window; do
  count=$("$cross-objdump" -d "$build/${kernel}_base.o" | grep -cE 'fmla\s+v[0-9]+\.4s' || true)
  echo "${kernel}_base: $count 4-lane multiply-adds"
  [ "$count" -gt 0 ] || { echo "neon-check: ${kernel}_base.cpp has no NEON in it"; exit 1; }
done

echo "== tests"
for source in tests/cpp/test_*.cpp; do
  "$cross-g++" "${flags[@]}" -O2 -static "$source" "$build"/*_base.o "$build"/*_cpu.o \
    "$build"/dispatch.o -o "$build/$(basename "$source" .cpp)"
done
command -v qemu-aarch64 > /dev/null ||
  { echo "neon-check: compiled and linked; no qemu-aarch64 on this machine, tests not run"; exit 0; }
for source in tests/cpp/test_*.cpp; do
  qemu-aarch64 "$build/$(basename "$source" .cpp)"
done
echo "neon-check: all right"
