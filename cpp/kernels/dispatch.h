// Which instruction set the kernels use: the best one of this CPU, unless a test forces another.
//
// The choice lives in the binary this is linked into; namm_ops.so exposes it as the op force_isa.
#pragma once

#include <cstdint>

namespace namm_ext {

// Ordered: each one contains those before it. On other CPUs than x86-64 there is only kBase.
enum class Isa : int32_t { kBase = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
constexpr int kNumIsas = 5;

// AVX2 with FMA and F16C; AVX-512 F, BW, DQ, VL; AVX-512 BF16; AMX tiles with BF16, for which the
// kernel must have given this process permission (asked for here).
bool isa_supported(Isa isa);
Isa best_isa();

// The one in force. Kernels read it once per call.
Isa current_isa();
// False, and nothing happens, if this CPU lacks it.
bool set_isa(Isa isa);

// The entry of a table, one per instruction set, for the set in force: its own, or the next lower
// one there is. Null entries have none of their own; the first one, the baseline, is never null.
template <class Pointer, int kSize>
Pointer version_in_force(const Pointer (&table)[kSize]) {
  int i = static_cast<int>(current_isa());
  if (i >= kSize) i = kSize - 1;
  while (table[i] == nullptr) --i;
  return table[i];
}

// "base", "avx2", "avx512", "avx512bf16", "amx".
const char* isa_name(Isa isa);
bool parse_isa(const char* name, Isa* isa);

}  // namespace namm_ext
