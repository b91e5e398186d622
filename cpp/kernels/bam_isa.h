// Between the plan of bam_scores (bam_cpu.cpp) and its arithmetic (bam_isa.inc).
#pragma once

#include <cstdint>

#include "namm_ext/params.h"

namespace namm_ext {

constexpr int kBamRows = 64;     // rows of a segment that one task scores
constexpr int kBamTokens = 256;  // tokens whose features one task computes; whole vectors

struct BamIsa {
  // Bytes of one candidate folded, of the features of one segment, and of a task's scratch memory.
  int64_t folded_bytes;
  int64_t (*features_bytes)(int64_t num_tokens);
  int64_t scratch_bytes;
  void (*fold)(const float* params, char* folded);
  // Features of tokens [begin, end) of a segment, of which begin is a multiple of kBamTokens.
  void (*features)(const ScoreParams&, int64_t segment, int32_t begin, int32_t end, char* features);
  // Scores of rows [begin, begin + kBamRows) of a segment, as far as it has them.
  void (*scores)(const ScoreParams&, int64_t segment, int32_t begin, const char* folded,
                 const char* features, char* scratch);
};

namespace base {
extern const BamIsa kBam;
}
namespace avx2 {
extern const BamIsa kBam;
}
namespace avx512 {
extern const BamIsa kBam;
}
namespace amx {
extern const BamIsa kBam;
}

}  // namespace namm_ext
