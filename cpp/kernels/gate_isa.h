// Between the tasks of gate_ (gate_cpu.cpp) and its arithmetic (gate_isa.inc).
#pragma once

#include <cstdint>

#include "namm_ext/params.h"

namespace namm_ext {

constexpr int kGateTokens = 4;     // tokens that share the loads of the weights
constexpr int kGateMaxLanes = 16;  // inputs of a token are padded to a multiple of it

// Gates of the new tokens [begin, end) of batch row b; scratch holds kGateTokens * stride floats,
// stride = the number of inputs, rounded up to kGateMaxLanes.
using GateRows = void (*)(const GateParams& params, int32_t b, int32_t begin, int32_t end,
                          int64_t stride, float* scratch);

namespace base {
extern const GateRows kGateRows;
}
namespace avx2 {
extern const GateRows kGateRows;
}
namespace avx512 {
extern const GateRows kGateRows;
}

}  // namespace namm_ext
